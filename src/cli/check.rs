//! `trousseau check`: the daemon's own loader, no token touched.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use clap::Args;
use serde::Serialize;

use super::output::{Failure, Format, print, print_json};
use super::{ConfigArgs, OutputArgs};
use crate::config::{Config, Status};
use crate::envelope;

pub(super) const EXAMPLES: &str = "Examples:
  trousseau check
  trousseau check --config ./trousseau.toml --output json";

#[derive(Args)]
pub(super) struct CheckArgs {
    #[command(flatten)]
    config: ConfigArgs,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Summary {
    socket: PathBuf,
    v1beta1: bool,
    cluster: String,
    state: PathBuf,
    /// Bytes in the envelope of a 32-byte seed, at most.
    envelope_size: usize,
    providers: Vec<ProviderSummary>,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct ProviderSummary {
    name: String,
    seal: bool,
    profile: String,
    profile_status: Status,
    /// That nobody has run the profile, if that is so.
    profile_caveat: Option<String>,
    module: PathBuf,
    tokens: Vec<String>,
    label: String,
    sessions: usize,
}

pub(super) fn run(args: &CheckArgs) -> Result<(), Failure> {
    let config = Config::load(&args.config.config)?;
    let summary = summary(&config);
    match args.output.output {
        Format::Json => print_json(&summary),
        Format::Text => print(&text(&args.config.config, &summary)),
    }
}

fn summary(config: &Config) -> Summary {
    let longest = config.providers.iter().filter(|provider| provider.seal).map(|provider| provider.longest_algorithm());
    Summary {
        socket: config.listen.socket.clone(),
        v1beta1: config.listen.v1beta1,
        cluster: config.keyring.cluster.clone(),
        state: config.keyring.state.clone(),
        envelope_size: envelope::sealed_len(&longest.collect::<Vec<_>>(), 32),
        providers: config
            .providers
            .iter()
            .map(|provider| ProviderSummary {
                name: provider.name.clone(),
                seal: provider.seal,
                profile: provider.profile.name.clone(),
                profile_status: provider.profile.status,
                profile_caveat: provider.profile.caveat(),
                module: provider.module.clone(),
                tokens: provider.tokens.iter().map(ToString::to_string).collect(),
                label: provider.label.clone(),
                sessions: provider.sessions,
            })
            .collect(),
    }
}

fn text(file: &Path, summary: &Summary) -> String {
    let mut text = format!(
        "{}: good\n  cluster   {}\n  socket    {} (v2{})\n  state     {}\n  envelope  {} bytes at most for a 32-byte seed",
        file.display(),
        summary.cluster,
        summary.socket.display(),
        if summary.v1beta1 { " and v1beta1" } else { "" },
        summary.state.display(),
        summary.envelope_size,
    );
    for provider in &summary.providers {
        let role = if provider.seal { "seals" } else { "only unwraps" };
        let _infallible = write!(
            text,
            "\n  provider  {} ({role}): profile {}, {} sessions, KEKs labelled {}\n              module {}",
            provider.name,
            provider.profile,
            provider.sessions,
            provider.label,
            provider.module.display(),
        );
        if let Some(caveat) = &provider.profile_caveat {
            let _infallible = write!(text, "\n              {caveat}");
        }
        for token in &provider.tokens {
            let _infallible = write!(text, "\n              token  {token}");
        }
    }
    text
}
