//! `trousseau pin …`: what only a person may decide about a PIN.

use clap::{Args, Subcommand};

use super::output::{Failure, print};
use super::{ConfigArgs, assemble};
use crate::config::Config;
use crate::provider::pkcs11::{Retry, allow_pin_retry};

#[derive(Subcommand)]
pub(super) enum PinVerb {
    /// Have the PIN tried once more, although the token has refused it.
    #[command(after_help = RETRY_EXAMPLES)]
    Retry(RetryArgs),
}

const RETRY_EXAMPLES: &str = "A token locks its PIN after a few wrong ones. So a PIN that was refused is not tried \
again, by no verb and after no restart, until its file holds another one; nor is one that was being tried when the \
process ended, nor one that never worked on this host while the token counts wrong ones. This allows one try, and makes \
none itself: a serving plugin does so within five seconds, without a restart.

Use it when the PIN in the file is right by now: it was changed, or unlocked, in the token.

Examples:
  trousseau pin retry
  trousseau pin retry --provider hsm --config ./trousseau.toml";

#[derive(Args)]
pub(super) struct RetryArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// The provider, where the configuration has several.
    #[arg(long, value_name = "NAME")]
    provider: Option<String>,
    /// Go on although the next wrong PIN locks the token.
    #[arg(long)]
    final_try_ok: bool,
}

pub(super) fn run(verb: &PinVerb) -> Result<(), Failure> {
    let PinVerb::Retry(args) = verb;
    let config = Config::load(&args.config.config)?;
    let provider = assemble::choose_provider(&config, args.provider.as_deref(), |transit| {
        let what = format!("provider {} has no PIN: it logs in to Vault or OpenBao", transit.name);
        Failure::usage(what, "`trousseau doctor` says how its login fares")
    })?;
    let state = assemble::state(&config)?;
    let mut failures = Vec::new();
    for (token, done) in allow_pin_retry(provider, &state, args.final_try_ok) {
        match done {
            Ok(Retry::NothingHeldBack) => print(&format!("{token}: no PIN is held back"))?,
            Ok(Retry::Allowed(refused)) => {
                print(&format!("{token}: the PIN in {} is tried once more", provider.pin))?;
                for what in refused {
                    print(&format!("  before: {what}"))?;
                }
                print("  by a serving plugin within five seconds, else when the next one starts, or by the next verb")?;
            }
            Ok(Retry::FinalTry) => {
                let what = format!("{token}: the next wrong PIN locks it, so the PIN stays held back");
                let remedy =
                    "make sure that the PIN is right, for example with the vendor's tools; then --final-try-ok";
                failures.push(Failure::failed(what, remedy));
            }
            // These texts end with what to do.
            Err(why) => failures.push(Failure::unavailable(format!("{token}: {why}"), "")),
        }
    }
    let last = failures.pop();
    for failure in failures {
        let _last_ones_code = failure.report();
    }
    last.map_or(Ok(()), Err)
}
