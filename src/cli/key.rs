//! `trousseau key …`: makes KEKs and lists them.

use std::process::Command;
use std::time::{Duration, Instant};

use clap::{Args, Subcommand};
use jiff::{SignedDuration, Timestamp};
use serde::Serialize;

use super::output::{Failure, Format, print, print_json, table};
use super::{ConfigArgs, OutputArgs, assemble, attest, duration};
use crate::config::{Config, Mode, ProviderConfig};
use crate::identity::Identity;
use crate::keyring::KekDescription;
use crate::provider::Refused;
use crate::provider::pkcs11::{Generated, LONGEST_WAIT, Pkcs11};
use crate::runtime::Leader;

/// How long the tokens may take.
const TIMEOUT: Duration = Duration::from_secs(60);

/// How long a KEK waits before it becomes active, so that every control plane has seen it by then.
const DEFAULT_WAIT: SignedDuration = SignedDuration::from_mins(10);

#[derive(Subcommand)]
pub(super) enum KeyVerb {
    /// Make a KEK in the token: 256-bit AES that never leaves it.
    #[command(after_help = GENERATE_EXAMPLES)]
    Generate(GenerateArgs),
    /// List the KEKs, and the keys that look like one and are not used.
    #[command(after_help = LIST_EXAMPLES)]
    List(ListArgs),
    /// Report what the tokens say of the KEKs, and whether a key like them can be got out.
    #[command(after_help = attest::EXAMPLES)]
    Attest(attest::AttestArgs),
}

const GENERATE_EXAMPLES: &str = "Every plugin that uses the token sees the new KEK within 30 seconds, unwraps with it \
from then on, and makes it active at its instant. The first KEK of a keyring is active at once.

Back up the token before a KEK wraps anything that you cannot lose.

Examples:
  trousseau key generate
  trousseau key generate --activate-in 1h
  trousseau key generate --provider hsm --mode gcm --output json";

const LIST_EXAMPLES: &str = "Examples:
  trousseau key list
  trousseau key list --config ./trousseau.toml --output json";

#[derive(Args)]
pub(super) struct GenerateArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// The provider, where the configuration has several.
    #[arg(long, value_name = "NAME")]
    provider: Option<String>,
    /// When it becomes active, from now [default: 10m; at once for the first KEK].
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    activate_in: Option<SignedDuration>,
    /// How it wraps [default: the profile's first mode].
    #[arg(long)]
    mode: Option<Mode>,
    /// Go on although this host's clock is not synchronized.
    #[arg(long)]
    unsynchronized_clock_ok: bool,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Args)]
pub(super) struct ListArgs {
    #[command(flatten)]
    config: ConfigArgs,
    #[command(flatten)]
    output: OutputArgs,
}

pub(super) fn run(verb: KeyVerb) -> Result<(), Failure> {
    let runtime = super::runtime()?;
    match verb {
        KeyVerb::Generate(args) => runtime.block_on(generate(&args)),
        KeyVerb::List(args) => runtime.block_on(list(&args)),
        KeyVerb::Attest(args) => runtime.block_on(attest::attest(&args)),
    }
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct GeneratedSummary {
    identity: Identity,
    id: String,
    not_before: Timestamp,
    mode: &'static str,
    held_by: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    way_out: Option<String>,
}

async fn generate(args: &GenerateArgs) -> Result<(), Failure> {
    let config = Config::load(&args.config.config)?;
    let provider = assemble::choose_provider(&config, args.provider.as_deref())?;
    let generated = in_time(make_kek(&config, provider, args)).await?;
    let summary = GeneratedSummary {
        identity: generated.identity,
        id: base16ct::lower::encode_string(&generated.id),
        not_before: generated.not_before,
        mode: generated.mode.as_str(),
        held_by: generated.held_by,
        way_out: generated.way_out,
    };
    match args.output.output {
        Format::Json => print_json(&summary),
        Format::Text => {
            let mut text = format!(
                "KEK {} made on provider {}\n  id          {}\n  mode        {}\n  active from {}\n  held by     {} of {} \
                 tokens: if all of them are lost, so is everything that it wrapped",
                summary.identity,
                provider.name,
                summary.id,
                summary.mode,
                summary.not_before,
                summary.held_by.len(),
                provider.tokens.len(),
            );
            if let Some(way) = &summary.way_out {
                text.push_str(&format!("\n  WARNING     such a key leaves its token: {way}"));
            }
            print(&text)
        }
    }
}

/// The work, unless the tokens keep it waiting.
async fn in_time<T>(work: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    let late =
        |_| Failure::unavailable("the tokens did not answer within a minute", "see what their vendor's tools say");
    tokio::time::timeout(TIMEOUT, work).await.unwrap_or_else(|elapsed| Err(late(elapsed)))
}

/// Makes a KEK on a provider whose every token is within reach.
async fn make_kek(config: &Config, provider: &ProviderConfig, args: &GenerateArgs) -> Result<Generated, Failure> {
    let (pkcs11, newest, deadline) = reach(config, provider).await?;
    let wait = match (args.activate_in, newest) {
        (Some(wait), _) => wait,
        (None, Some(_)) => DEFAULT_WAIT,
        (None, None) => SignedDuration::ZERO,
    };
    let not_before = activation_instant(Timestamp::now(), wait, newest, args.unsynchronized_clock_ok)?;
    Ok(pkcs11.generate(not_before, args.mode, deadline).await?)
}

/// Makes the first KEK of a provider that has none.
pub(super) fn ensure_first(config: &Config, provider: &ProviderConfig) -> Result<(), Failure> {
    super::runtime()?.block_on(in_time(async {
        let (pkcs11, newest, deadline) = reach(config, provider).await?;
        if newest.is_none() {
            pkcs11.generate(Timestamp::now(), None, deadline).await?;
        }
        Ok(())
    }))
}

/// The provider with every token connected, the activation instant of its newest KEK, and by when all must be done.
async fn reach(config: &Config, provider: &ProviderConfig) -> Result<(Pkcs11, Option<Timestamp>, Instant), Failure> {
    let deadline = Instant::now() + TIMEOUT;
    let pkcs11 = assemble::provider(provider, &assemble::state(config)?, &Leader::default())?;
    pkcs11.reach_every_token().await?;
    let newest = pkcs11.newest(deadline).await?;
    Ok((pkcs11, newest, deadline))
}

/// The instant, unless this host's clock cannot be right, or the KEK would never become active.
fn activation_instant(
    now: Timestamp,
    wait: SignedDuration,
    newest: Option<Timestamp>,
    unsynchronized_clock_ok: bool,
) -> Result<Timestamp, Failure> {
    let out_of_range = || Failure::failed(format!("--activate-in {wait:#} is out of range"), "0s to 720h");
    if wait.is_negative() || wait > LONGEST_WAIT {
        return Err(out_of_range());
    }
    // The id of the KEK, which carries the instant, counts milliseconds.
    let instant = now.saturating_add(wait).ok().and_then(|at| Timestamp::from_millisecond(at.as_millisecond()).ok());
    let instant = instant.ok_or_else(out_of_range)?;
    // The first KEK's instant is compared with nothing.
    let Some(newest) = newest else { return Ok(instant) };
    if newest >= instant {
        let what =
            format!("the newest KEK is active from {newest}, and this one would be from {instant}: never active");
        return Err(Failure::failed(what, "set this host's clock right, or activate it later with --activate-in"));
    }
    if !unsynchronized_clock_ok && clock_is_unsynchronized() {
        let what = "this host's clock is not synchronized: other hosts would switch to the KEK at another moment";
        return Err(Failure::failed(what, "start chrony or systemd-timesyncd, or give --unsynchronized-clock-ok"));
    }
    Ok(instant)
}

/// What the kernel says of its clock, whoever keeps it (adjtimex(2)); without systemd to ask, nobody vouches for it.
pub(super) fn clock_is_unsynchronized() -> bool {
    let asked = Command::new("timedatectl").args(["show", "--property=NTPSynchronized", "--value"]).output();
    !asked.is_ok_and(|answer| answer.stdout.trim_ascii() == b"yes")
}

#[derive(Serialize)]
struct Listing {
    keks: Vec<KekDescription>,
    refused: Vec<Refused>,
    exceptions: Vec<String>,
    outages: Vec<String>,
}

async fn list(args: &ListArgs) -> Result<(), Failure> {
    let config = Config::load(&args.config.config)?;
    let keyring = assemble::keyring(&config, assemble::state(&config)?, &Leader::default())?;
    in_time(async {
        keyring.settled().await;
        keyring.find_keks().await;
        Ok(())
    })
    .await?;
    let (keks, refused) = keyring.describe(Timestamp::now());
    let listing = Listing { keks, refused, exceptions: keyring.exceptions(), outages: keyring.outages() };
    match args.output.output {
        Format::Json => print_json(&listing)?,
        Format::Text => print(&text(&listing))?,
    }
    match listing.outages.first() {
        Some(outage) => Err(Failure::unavailable(outage.clone(), "")),
        None => Ok(()),
    }
}

fn text(listing: &Listing) -> String {
    let row = |kek: &KekDescription| {
        vec![
            kek.identity.to_string(),
            kek.state.as_str().to_owned(),
            kek.not_before.to_string(),
            kek.mode.clone(),
            kek.provider.clone(),
            kek.held_by.len().to_string(),
        ]
    };
    let header = ["KEK", "STATE", "ACTIVE FROM", "MODE", "PROVIDER", "TOKENS"];
    let mut text = match (listing.keks.as_slice(), listing.outages.as_slice()) {
        ([], []) => "no KEK: make one with `trousseau key generate`".to_owned(),
        ([], _) => "no KEK can be seen".to_owned(),
        (keks, _) => table(&header, keks.iter().map(row).collect()),
    };
    for refused in &listing.refused {
        text.push_str(&format!("\nnot used: {}: {}", refused.key, refused.reason));
    }
    for exception in &listing.exceptions {
        text.push_str(&format!("\nexception: {exception}"));
    }
    text
}
