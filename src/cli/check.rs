//! `trousseau check`: the daemon's own loader, no token touched.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use clap::Args;
use serde::Serialize;

use super::audit::unusable;
use super::output::{Failure, Format, print, print_json};
use super::{ConfigArgs, OutputArgs};
use crate::audit::foresee;
use crate::config::{Config, ConfigError, ProviderConfig, Status};
use crate::envelope;
use crate::service::listener;

pub(super) const EXAMPLES: &str = "A secret that systemd hands to the unit alone is named, and not looked at.

Examples:
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
    /// What `serve` would not work with, as the host is now.
    warnings: Vec<String>,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct ProviderSummary {
    name: String,
    seal: bool,
    #[serde(flatten)]
    service: Service,
}

#[derive(Serialize)]
#[serde(tag = "type", rename_all = "kebab-case", rename_all_fields = "kebab-case")]
enum Service {
    Pkcs11 {
        profile: String,
        profile_status: Status,
        /// That nobody has run the profile, if that is so.
        profile_caveat: Option<String>,
        module: PathBuf,
        tokens: Vec<String>,
        label: String,
        sessions: usize,
    },
    Transit {
        address: String,
        namespace: Option<String>,
        mount: String,
        key: String,
        auth: &'static str,
        auth_mount: String,
    },
}

impl Service {
    fn of(provider: &ProviderConfig) -> Self {
        match provider {
            ProviderConfig::Pkcs11(config) => Self::Pkcs11 {
                profile: config.profile.name.clone(),
                profile_status: config.profile.status,
                profile_caveat: config.profile.caveat(),
                module: config.module.clone(),
                tokens: config.tokens.iter().map(ToString::to_string).collect(),
                label: config.label.clone(),
                sessions: config.sessions,
            },
            ProviderConfig::Transit(config) => Self::Transit {
                address: config.address.to_string(),
                namespace: config.namespace.clone(),
                mount: config.mount.clone(),
                key: config.key.clone(),
                auth: config.auth.method.as_str(),
                auth_mount: config.auth.mount.clone(),
            },
        }
    }
}

pub(super) fn run(args: &CheckArgs) -> Result<(), Failure> {
    let file = &args.config.config;
    let config = Config::read(file)?;
    let of_the_unit = config.see_secrets(file)?;
    let summary = summary(&config, of_the_unit);
    match args.output.output {
        Format::Json => print_json(&summary),
        Format::Text => print(&text(file, &summary)),
    }
}

fn summary(config: &Config, of_the_unit: Vec<ConfigError>) -> Summary {
    let sealing = config.providers.iter().filter(|provider| provider.seals());
    let longest: Vec<_> = sealing.map(ProviderConfig::longest_algorithm).collect();
    Summary {
        socket: config.listen.socket.clone(),
        v1beta1: config.listen.v1beta1,
        cluster: config.keyring.cluster.clone(),
        state: config.keyring.state.clone(),
        envelope_size: envelope::sealed_len(&longest, 32),
        providers: config
            .providers
            .iter()
            .map(|provider| ProviderSummary {
                name: provider.name().to_owned(),
                seal: provider.seals(),
                service: Service::of(provider),
            })
            .collect(),
        warnings: warnings(config, of_the_unit),
    }
}

fn warnings(config: &Config, of_the_unit: Vec<ConfigError>) -> Vec<String> {
    let socket = listener::foresee(&config.listen).err().map(|error| Failure::from(error).to_string());
    let modules = config.pkcs11().filter(|provider| !provider.module.is_file()).map(|provider| {
        format!("provider {}: module {} is no file: install it", provider.name, provider.module.display())
    });
    let unseen = of_the_unit.into_iter().map(|error| Failure::from(error).to_string());
    let audit = config.audit.as_ref().and_then(|log| foresee(log, None).err());
    let audit = audit.map(|error| unusable(&error).to_string());
    socket.into_iter().chain(audit).chain(modules).chain(unseen).collect()
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
    for ProviderSummary { name, seal, service } in &summary.providers {
        let role = if *seal { "seals" } else { "only unwraps" };
        let _infallible = write!(text, "\n  provider  {name} ({role}): {}", service.text());
    }
    for warning in &summary.warnings {
        let _infallible = write!(text, "\n  warning   {warning}");
    }
    text
}

impl Service {
    fn text(&self) -> String {
        match self {
            Self::Pkcs11 { profile, profile_caveat, module, tokens, label, sessions, .. } => {
                let mut text = format!("profile {profile}, {sessions} sessions, KEKs labelled {label}");
                let module = format!("module {}", module.display());
                let tokens = tokens.iter().map(|token| format!("token  {token}"));
                for line in [module].into_iter().chain(profile_caveat.clone()).chain(tokens) {
                    let _infallible = write!(text, "\n              {line}");
                }
                text
            }
            Self::Transit { address, namespace, mount, key, auth, auth_mount } => {
                let namespace = namespace.as_ref().map(|name| format!(" of namespace {name}")).unwrap_or_default();
                format!("key {key} of {mount}{namespace}\n              {address}, login {auth} at auth/{auth_mount}")
            }
        }
    }
}
