//! `trousseau status`: what a serving plugin says of itself, and who can open what it seals.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use serde::Serialize;

use super::output::{Failure, Format, print, print_json};
use super::{OutputArgs, SocketArgs, assemble};
use crate::config::{Config, ProviderConfig};
use crate::identity::{Identity, KeySet};
use crate::service::client::{Client, PluginStatus};
use crate::state::{Gap, Mark};

pub(super) const EXAMPLES: &str =
    "With --config it also says which KEKs open what is sealed under this key_id, any one of \
them alone, and which ciphertexts of this host lack one of them: from what the host remembers, asking no token.

Examples:
  trousseau status
  trousseau status --config /etc/trousseau/trousseau.toml
  trousseau status --socket /run/trousseau/kms.sock --output json";

#[derive(Args)]
pub(super) struct StatusArgs {
    #[command(flatten)]
    socket: SocketArgs,
    /// The plugin's configuration: say as well who can open what.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Report {
    #[serde(flatten)]
    status: PluginStatus,
    #[serde(flatten)]
    openers: Option<Openers>,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Openers {
    /// Any one of them opens it.
    opened_by: Vec<Opener>,
    /// What one of them does not open.
    gaps: Vec<Gap>,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Opener {
    provider: String,
    kek: Identity,
}

pub(super) fn run(args: &StatusArgs) -> Result<(), Failure> {
    let config = args.config.as_deref().map(Config::read).transpose()?;
    let status = super::runtime()?.block_on(async {
        let mut client = Client::connect(args.socket.of(config.as_ref()), Duration::from_secs(3)).await?;
        client.status().await
    })?;
    let known = args.config.as_deref().zip(config.as_ref());
    let openers = known.map(|(file, config)| openers(file, config, &status.key_id)).transpose()?;
    let report = Report { status, openers };
    match args.output.output {
        Format::Json => print_json(&report),
        Format::Text => print(&text(&report)),
    }
}

/// What this host remembers of a key_id.
fn openers(file: &Path, config: &Config, key_id: &str) -> Result<Openers, Failure> {
    let state = assemble::state(config)?;
    let seals = |mark: &Mark| {
        let of = config.providers.iter().find(|provider| provider.name() == mark.provider);
        of.is_some_and(ProviderConfig::seals)
    };
    let marks: Vec<Mark> = state.marks()?.into_iter().filter(seals).collect();
    let identities: Vec<Identity> = marks.iter().map(|mark| mark.identity).collect();
    if KeySet::of(&config.keyring.cluster, &identities).to_string() != key_id {
        let what = format!("{} is not the configuration of the plugin that serves {key_id}", file.display());
        return Err(Failure::failed(what, "or it has not been read since it was changed: systemctl reload trousseau"));
    }
    let opener = |mark: Mark| Opener { provider: mark.provider, kek: mark.identity };
    let gaps = state.gaps()?.into_iter().filter(|gap| gap.key_id == key_id).collect();
    Ok(Openers { opened_by: marks.into_iter().map(opener).collect(), gaps })
}

fn text(Report { status, openers }: &Report) -> String {
    let mut text = format!("version  {}\nhealthz  {}\nkey_id   {}", status.version, status.healthz, status.key_id);
    let Some(Openers { opened_by, gaps }) = openers else { return text };
    let opener = |Opener { provider, kek }: &Opener| format!("KEK {kek} of provider {provider}");
    let by: Vec<String> = opened_by.iter().map(opener).collect();
    text.push_str(&format!("\nopens    with {}", by.join(", or ")));
    for Gap { provider, since, envelopes, .. } in gaps {
        let lack = format!("{envelopes} ciphertexts or more, since {since}, do not open with provider {provider}");
        text.push_str(&format!("\nlacking  {lack}: it could not wrap then"));
    }
    text
}
