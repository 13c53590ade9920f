//! `trousseau key …`: makes KEKs, lists them, and asks a serving plugin about one.

mod expect;
mod generate;
mod list;

use std::process::Command;
use std::time::Duration;

use clap::Subcommand;

pub(super) use self::generate::ensure_first;
use super::output::Failure;
use super::{assemble, attest};
use crate::config::Config;
use crate::keyring::Keyring;
use crate::provider::transit::Purpose;
use crate::runtime::Leader;

/// How long the tokens may take.
const TIMEOUT: Duration = Duration::from_secs(60);
/// How much longer whoever knows what was begun by then has to say so.
const LAST_WORD: Duration = Duration::from_secs(1);

#[derive(Subcommand)]
pub(super) enum KeyVerb {
    /// Make a KEK in the token: 256-bit AES that never leaves it.
    #[command(after_help = generate::EXAMPLES)]
    Generate(generate::GenerateArgs),
    /// List the KEKs, and the keys that look like one and are not used.
    #[command(after_help = list::EXAMPLES)]
    List(list::ListArgs),
    /// Report what the tokens say of the KEKs, and whether a key like them can be got out.
    #[command(after_help = attest::EXAMPLES)]
    Attest(attest::AttestArgs),
}

pub(super) fn run(verb: KeyVerb) -> Result<(), Failure> {
    let runtime = super::runtime()?;
    match verb {
        KeyVerb::Generate(args) => runtime.block_on(generate::run(&args)),
        KeyVerb::List(args) => runtime.block_on(list::run(&args)),
        KeyVerb::Attest(args) => runtime.block_on(attest::attest(&args)),
    }
}

/// What the kernel says of its clock, whoever keeps it (adjtimex(2)). `None`: there is no systemd to ask, as in a
/// container, and no other safe way to that call.
pub(super) fn clock_is_synchronized() -> Option<bool> {
    let asked = Command::new("timedatectl").args(["show", "--property=NTPSynchronized", "--value"]).output();
    match asked.ok()?.stdout.trim_ascii() {
        b"yes" => Some(true),
        b"no" => Some(false),
        _ => None,
    }
}

/// The work, unless the tokens keep it waiting.
async fn in_time<T>(work: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    let late =
        |_| Failure::unavailable("the tokens did not answer within a minute", "see what their vendor's tools say");
    tokio::time::timeout(TIMEOUT + LAST_WORD, work).await.unwrap_or_else(|elapsed| Err(late(elapsed)))
}

/// The keyring of this configuration, which has looked at its tokens once.
async fn look(config: &Config) -> Result<Keyring, Failure> {
    let keyring = assemble::keyring(config, assemble::state(config)?, &Leader::default(), Purpose::Look)?;
    in_time(async {
        keyring.settled().await;
        keyring.find_keks().await;
        Ok(())
    })
    .await?;
    Ok(keyring)
}
