//! `trousseau key list`: every KEK as this host sees it.

use std::path::PathBuf;

use clap::Args;
use jiff::Timestamp;
use serde::Serialize;

use super::super::output::{Failure, Format, print, print_json, table};
use super::super::{ConfigArgs, OutputArgs};
use super::{expect, look};
use crate::config::Config;
use crate::keyring::{KekDescription, Keyring};
use crate::provider::{Refused, Value};

pub(super) const EXAMPLES: &str = "With --expect it asks the plugin that serves on this host instead: whether it sees \
this KEK, unwraps with it, and has the same key_id as this configuration. Run it on every host before the KEK's \
instant: it prints one line, and its exit code is 0 if all is well. It wraps one random value under the KEK and has \
the plugin decrypt it; nothing is kept of that but, in mode gcm, its count.

Examples:
  trousseau key list
  trousseau key list --attributes
  trousseau key list --config ./trousseau.toml --output json
  trousseau key list --expect 019aaf2c4c007a1b8c2d3e4f50617283
  trousseau key list --expect 019aaf2c4c007a1b8c2d3e4f50617283 --socket /run/trousseau/kms.sock";

#[derive(Args)]
pub(in super::super) struct ListArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// Show as well what each token says of each KEK.
    #[arg(long, conflicts_with = "expect")]
    attributes: bool,
    /// Ask the serving plugin whether it is ready for this KEK, by its identity or id, or the first 8 digits or more of
    /// one.
    #[arg(long, value_name = "ID", value_parser = expect::name)]
    expect: Option<String>,
    /// The socket of the serving plugin [default: the configuration's].
    #[arg(long, value_name = "PATH", requires = "expect")]
    socket: Option<PathBuf>,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Serialize)]
struct Listing {
    keks: Vec<KekDescription>,
    refused: Vec<Refused>,
    exceptions: Vec<String>,
    outages: Vec<String>,
    warnings: Vec<String>,
}

impl Listing {
    fn of(keyring: &Keyring) -> Self {
        let now = Timestamp::now();
        let (keks, refused) = keyring.describe(now);
        let (exceptions, outages) = (keyring.exceptions(), keyring.outages());
        let warnings = keyring.nothing_active(now).into_iter().chain(keyring.concerns(now)).collect();
        Self { keks, refused, exceptions, outages, warnings }
    }
}

pub(super) async fn run(args: &ListArgs) -> Result<(), Failure> {
    let config = Config::load(&args.config.config)?;
    let keyring = look(&config).await?;
    if let Some(wanted) = &args.expect {
        let socket = args.socket.as_ref().unwrap_or(&config.listen.socket);
        return expect::run(&keyring, wanted, socket, args.output.output).await;
    }
    let listing = Listing::of(&keyring);
    match args.output.output {
        Format::Json => print_json(&listing)?,
        Format::Text => print(&text(&listing, args.attributes))?,
    }
    match listing.outages.first() {
        Some(outage) => Err(Failure::unavailable(outage.clone(), "")),
        None => Ok(()),
    }
}

fn text(listing: &Listing, with_attributes: bool) -> String {
    let row = |kek: &KekDescription| {
        vec![
            kek.identity.to_string(),
            kek.id.clone(),
            kek.state.as_str().to_owned(),
            kek.not_before.to_string(),
            kek.mode.clone(),
            kek.provider.clone(),
            kek.held_by.len().to_string(),
        ]
    };
    let header = ["KEK", "ID", "STATE", "ACTIVE FROM", "MODE", "PROVIDER", "TOKENS"];
    let mut text = match (listing.keks.as_slice(), listing.outages.as_slice()) {
        ([], []) => "no KEK".to_owned(), // a warning says what to do
        ([], _) => "no KEK can be seen".to_owned(),
        (keks, _) => table(&header, keks.iter().map(row).collect()),
    };
    for kek in &listing.keks {
        for (token, said) in kek.attributes.iter().filter(|_| with_attributes) {
            let said: Vec<String> = said.iter().map(|(name, value)| shown(name, value)).collect();
            text.push_str(&format!("\n{token} says of {}: {}", kek.identity, said.join(" ")));
        }
        for token in &kek.lacked_by {
            text.push_str(&format!("\nlacking: token {token} lacks KEK {}: clone it there", kek.identity));
        }
    }
    for refused in &listing.refused {
        text.push_str(&format!("\nnot used: {}: {}", refused.key, refused.reason));
    }
    for exception in &listing.exceptions {
        text.push_str(&format!("\nexception: {exception}"));
    }
    for warning in &listing.warnings {
        text.push_str(&format!("\nwarning: {warning}"));
    }
    text
}

/// A flag that is not set has a minus before it.
fn shown(name: &str, value: &Value) -> String {
    match value {
        Value::Flag(true) => name.to_owned(),
        Value::Flag(false) => format!("-{name}"),
        value => format!("{name}={value}"),
    }
}
