//! The configuration: read from one TOML file, checked once, and from then on of types that cannot be invalid.
//!
//! [`Config::load`] is what `serve` and `check` both call; it touches no token. Its parts end at the constructors that
//! take them: no other room reads a file of the administrator's.

mod audit;
mod codes;
mod credential;
mod error;
mod file;
mod legacy;
mod pkcs11;
mod profile;
mod provider;
mod transit;
mod uri;

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use jiff::{SignedDuration, Span, SpanRelativeTo};
use serde::{Deserialize, Serialize};

pub use self::audit::{AuditConfig, OnFailure, Sync};
pub use self::codes::{Class, Code, Codes};
pub use self::credential::{Credential, CredentialError};
pub use self::error::ConfigError;
pub use self::legacy::Legacy;
pub use self::pkcs11::{Admission, Pkcs11Config};
pub use self::profile::{Excusable, GcmIv, Mode, Omissible, Profile, Status};
pub use self::provider::ProviderConfig;
pub use self::transit::{Auth, Method, TransitConfig};
pub use self::uri::TokenUri;
use crate::{disk, telemetry};

/// Where the configuration lies when nothing else is said.
pub const DEFAULT_PATH: &str = "/etc/trousseau/trousseau.toml";

/// The uid as which every user of another user namespace is seen (user_namespaces(7)): it is nobody in particular.
pub const OVERFLOW_UID: u32 = 65_534;

/// Where the socket lies when nothing else is said.
pub const DEFAULT_SOCKET: &str = "/run/trousseau/kms.sock";

/// Where the small state files lie when neither the configuration nor systemd says so.
const DEFAULT_STATE: &str = "/var/lib/trousseau";

/// Where the keys of the configuration are explained.
const REFERENCE: &str =
    "`man trousseau.toml`, or packaging/trousseau.toml in the source, has every key with its meaning";

/// A whole, valid configuration.
#[derive(Debug)]
pub struct Config {
    /// The socket.
    pub listen: Listen,
    /// What holds for all KEKs.
    pub keyring: KeyringConfig,
    /// Where metrics are served. `None`: nowhere.
    pub observe: Option<SocketAddr>,
    /// How much is logged: a filter, such as `debug`.
    pub log_level: String,
    /// The audit log. `None`: none is kept.
    pub audit: Option<AuditConfig>,
    /// Where KEKs are: at least one, of which at least one seals.
    pub providers: Vec<ProviderConfig>,
    /// What older plugins wrote and is still to be read. `None`: nothing.
    pub legacy: Option<Legacy>,
}

/// `[listen]`
#[derive(Debug, PartialEq, Eq)]
pub struct Listen {
    /// An absolute path.
    pub socket: PathBuf,
    /// The socket's permission bits.
    pub mode: u32,
    /// The group that owns the socket, where it is not our own.
    pub group: Option<String>,
    /// Who may connect (SO_PEERCRED), besides ourselves.
    pub allow_uids: BTreeSet<u32>,
    /// Whether KMS v1beta1 is served beside v2.
    pub v1beta1: bool,
}

/// `[keyring]`
#[derive(Debug, PartialEq, Eq)]
pub struct KeyringConfig {
    /// Part of every key_id: two clusters that share an HSM have two names.
    pub cluster: String,
    /// What Encrypt does while a provider is out of reach.
    pub seal_under: SealUnder,
    /// How long a KEK is to wrap, before somebody is told that it is old. `None`: for ever.
    pub max_age: Option<SignedDuration>,
    /// The directory of the small state files.
    pub state: PathBuf,
}

/// What Encrypt does while a provider that seals is out of reach.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SealUnder {
    /// It goes on with those that are there.
    #[default]
    Any,
    /// It fails.
    All,
}

/// What becomes of a token from which a throw-away key's bytes can be got out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Exportable {
    /// No KEK is made in it.
    #[default]
    Refuse,
    /// A KEK is made in it, with a warning.
    Warn,
}

impl Exportable {
    /// The word for it in the configuration.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Refuse => "refuse",
            Self::Warn => "warn",
        }
    }
}

impl Config {
    /// Reads and checks the file, the profiles that it names, and the secrets that it points to.
    ///
    /// # Errors
    /// [`ConfigError`] with the line or the field, and what to do.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let config = Self::read(path)?;
        match config.see_secrets(path)?.into_iter().next() {
            Some(of_the_unit) => Err(of_the_unit),
            None => Ok(config),
        }
    }

    /// Reads and checks the file and the profiles that it names: for who logs in nowhere.
    ///
    /// # Errors
    /// As [`Config::load`].
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|error| ConfigError::from_io(path, &error))?;
        refuse_if_changeable_by_others(path)?;
        let file: file::File =
            toml::from_str(&text).map_err(|error| ConfigError::from_toml(path, &text, &error, REFERENCE))?;
        let profiles = path.parent().unwrap_or(Path::new("/")).join("hsm-profiles");
        let check = Check { path, profiles };
        let keyring = check.keyring(file.keyring)?;
        let providers: Vec<ProviderConfig> = file
            .provider
            .into_iter()
            .map(|provider| check.provider(provider, &keyring.cluster, file.policy.exportable))
            .collect::<Result<_, _>>()?;
        check.providers_together(&providers)?;
        let observe = check.observe(file.observe)?;
        let log_level = check.log_level(file.log)?;
        let audit = file.audit.map(|audit| check.audit(audit)).transpose()?;
        let listen = check.listen(file.listen)?;
        let legacy = file.legacy.map(|legacy| Legacy::new(legacy, listen.v1beta1, &providers)).transpose();
        let legacy = legacy.map_err(|(what, remedy)| check.error(what, remedy))?;
        Ok(Self { listen, keyring, observe, log_level, audit, providers, legacy })
    }

    /// Sees that the secrets can be read that the file, at `path`, points to. Returns why some cannot by this process:
    /// systemd hands them to the unit alone.
    ///
    /// # Errors
    /// As [`Config::load`].
    pub fn see_secrets(&self, path: &Path) -> Result<Vec<ConfigError>, ConfigError> {
        let mut of_the_unit = Vec::new();
        for provider in &self.providers {
            for (field, secret) in provider.secrets() {
                let wrong = |error: CredentialError| {
                    let what = format!("provider {}: {field}: {error}", provider.name());
                    ConfigError::from_credential(path, what, &error)
                };
                match (secret.path(), provider) {
                    (Err(error), _) => of_the_unit.push(wrong(error)),
                    (Ok(_), ProviderConfig::Pkcs11(_)) => drop(secret.read().map_err(wrong)?),
                    // Somebody else puts it there, and may be late.
                    (Ok(_), ProviderConfig::Transit(_)) => (),
                }
            }
        }
        Ok(of_the_unit)
    }

    /// The providers of type `pkcs11`.
    pub fn pkcs11(&self) -> impl Iterator<Item = &Pkcs11Config> {
        self.providers.iter().filter_map(|provider| match provider {
            ProviderConfig::Pkcs11(config) => Some(config),
            ProviderConfig::Transit(_) => None,
        })
    }

    /// The providers of type `transit`.
    pub fn transit(&self) -> impl Iterator<Item = &TransitConfig> {
        self.providers.iter().filter_map(|provider| match provider {
            ProviderConfig::Transit(config) => Some(config),
            ProviderConfig::Pkcs11(_) => None,
        })
    }
}

fn refuse_if_changeable_by_others(path: &Path) -> Result<(), ConfigError> {
    let metadata = std::fs::metadata(path).map_err(|error| ConfigError::new(path, error.to_string(), "try again"))?;
    disk::refuse_if_changeable_by_others(path, &metadata).map_err(|(what, remedy)| ConfigError::new(path, what, remedy))
}

/// What [`is_cluster_name`] takes.
pub(crate) const CLUSTER_NAME: &str = "1 to 63 letters, digits, `-`, `.` and `_`";

pub(crate) fn is_cluster_name(text: &str) -> bool {
    let named = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
    (1..=63).contains(&text.len()) && text.chars().all(named)
}

/// A length of time such as `90d`, `1w` or `12h`: days have 24 hours here, and months have no length.
pub(crate) fn period(text: &str) -> Option<SignedDuration> {
    let span: Span = text.parse().ok()?;
    span.to_duration(SpanRelativeTo::days_are_24_hours()).ok().filter(|period| !period.is_negative())
}

/// Makes the parts of a file into their typed forms; it knows the file's name for the errors.
struct Check<'a> {
    path: &'a Path,
    profiles: PathBuf,
}

impl Check<'_> {
    fn error(&self, what: impl Into<String>, remedy: impl Into<String>) -> ConfigError {
        ConfigError::new(self.path, what, remedy)
    }

    fn listen(&self, file: file::Listen) -> Result<Listen, ConfigError> {
        let default_mode = if file.group.is_some() { "0660" } else { "0600" };
        let text = file.mode.as_deref().unwrap_or(default_mode);
        let mode = u32::from_str_radix(text, 8).ok().filter(|mode| mode & !0o660 == 0 && mode & 0o600 == 0o600);
        let mode = mode.ok_or_else(|| {
            self.error(
                format!("listen.mode `{text}` is not a socket's mode"),
                "write \"0600\", or \"0660\" with a group",
            )
        })?;
        if mode & 0o060 != 0 && file.group.is_none() {
            return Err(
                self.error("listen.mode lets a group in, and listen.group names none", "name it, or write \"0600\"")
            );
        }
        // 104: sun_path holds 108 bytes, and people put the path into `unix://` URLs with room to spare.
        if !file.socket.is_absolute() || file.socket.as_os_str().len() > 104 {
            let what =
                format!("listen.socket `{}` is not an absolute path of at most 104 bytes", file.socket.display());
            return Err(self.error(what, "write for example \"/run/trousseau/kms.sock\""));
        }
        if file.allow_uids.contains(&OVERFLOW_UID) {
            let what = "listen.allow-uids has 65534, as which every user of another user namespace is seen";
            return Err(self.error(what, "name the API server's own uid"));
        }
        let file::Listen { socket, group, allow_uids, v1beta1, .. } = file;
        Ok(Listen { socket, mode, group, allow_uids, v1beta1 })
    }

    fn keyring(&self, file: file::Keyring) -> Result<KeyringConfig, ConfigError> {
        if !is_cluster_name(&file.cluster) {
            let what = format!("keyring.cluster `{}` is not a name", file.cluster);
            return Err(self.error(what, format!("use {CLUSTER_NAME}; it can never be changed")));
        }
        let state = file.state.or_else(|| std::env::var_os("STATE_DIRECTORY").map(PathBuf::from));
        let state = state.unwrap_or_else(|| DEFAULT_STATE.into());
        if !state.is_absolute() {
            return Err(self.error(format!("keyring.state `{}` is relative", state.display()), "write the whole path"));
        }
        let max_age = period(&file.max_age).ok_or_else(|| {
            let what = format!("keyring.max-age `{}` is not a length of time", file.max_age);
            self.error(what, "write for example \"90d\", or \"0d\" if no age is too great")
        })?;
        let max_age = (!max_age.is_zero()).then_some(max_age);
        Ok(KeyringConfig { cluster: file.cluster, seal_under: file.seal_under, max_age, state })
    }

    fn log_level(&self, file: file::Log) -> Result<String, ConfigError> {
        if telemetry::is_level(&file.level) {
            return Ok(file.level);
        }
        let what = format!("log.level `{}` is not a log filter", file.level);
        Err(self.error(what, "write \"error\", \"warn\", \"info\" or \"debug\", or for example \"info,h2=debug\""))
    }

    fn observe(&self, file: file::Observe) -> Result<Option<SocketAddr>, ConfigError> {
        let Some(text) = file.http else { return Ok(None) };
        let wrong = |_| {
            let what = format!("observe.http `{text}` is not an address and a port");
            self.error(what, "write for example \"127.0.0.1:9990\", or \"[::1]:9990\"")
        };
        text.parse().map(Some).map_err(wrong)
    }
}
