//! The configuration: read from one TOML file, checked once, and from then on of types that cannot be invalid.
//!
//! [`Config::load`] is what `serve` and `check` both call; it touches no token. Its parts end at the constructors that
//! take them: no other room reads a file of the administrator's.

mod codes;
mod credential;
mod error;
mod file;
mod legacy;
mod profile;
mod uri;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use jiff::{SignedDuration, Span, SpanRelativeTo, Timestamp};
use serde::{Deserialize, Serialize};

pub use self::codes::{Class, Code, Codes};
pub use self::credential::{Credential, CredentialError};
pub use self::error::ConfigError;
pub use self::legacy::Legacy;
pub use self::profile::{Excusable, GcmIv, Mode, Omissible, Profile, Status};
pub use self::uri::TokenUri;
use crate::envelope::{MAX_RECIPIENTS, WrapAlgorithm};

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
    "the reference configuration, packaging/trousseau.toml in the source, has every key with its meaning";

/// A whole, valid configuration.
#[derive(Debug)]
pub struct Config {
    /// The socket.
    pub listen: Listen,
    /// What holds for all KEKs.
    pub keyring: KeyringConfig,
    /// Where metrics are served. `None`: nowhere.
    pub observe: Option<SocketAddr>,
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

/// A `[[provider.kek]]`: a KEK made elsewhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Admission {
    /// Its activation instant.
    pub not_before: Timestamp,
    /// Why it is a KEK although the token does not vouch for its history.
    pub exception: Option<String>,
}

/// One `[[provider]]` of type `pkcs11`.
#[derive(Debug)]
pub struct ProviderConfig {
    /// For people; renaming is harmless.
    pub name: String,
    /// Whether its active KEK wraps new DEKs; otherwise its KEKs only unwrap.
    pub seal: bool,
    /// What is known of its tokens.
    pub profile: Arc<Profile>,
    /// The module's file. It need not exist yet.
    pub module: PathBuf,
    /// The tokens, replicas of each other, in the order of preference: at least one.
    pub tokens: Vec<TokenUri>,
    /// CKA_LABEL of the KEKs.
    pub label: String,
    /// The user PIN.
    pub pin: Credential,
    /// Sessions, and so worker threads, a token: 1 to 256.
    pub sessions: usize,
    /// KEKs made elsewhere, by CKA_ID.
    pub admitted: BTreeMap<Vec<u8>, Admission>,
    /// `[policy]`: what becomes of a token that hands keys out.
    pub exportable: Exportable,
}

impl ProviderConfig {
    /// The wrap algorithm of its modes that makes the longest recipient.
    #[must_use]
    pub fn longest_algorithm(&self) -> WrapAlgorithm {
        let algorithms = self.profile.modes.iter().map(|mode| mode.algorithm());
        algorithms.max_by_key(|algorithm| algorithm.wrapped_len()).unwrap_or(WrapAlgorithm::LONGEST)
    }
}

impl Config {
    /// Reads and checks the file, the profiles that it names, and the secrets that it points to.
    ///
    /// # Errors
    /// [`ConfigError`] with the line or the field, and what to do.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|error| {
            ConfigError::new(path, format!("cannot be read: {error}"), "name another file with --config FILE")
        })?;
        refuse_if_writable_by_others(path)?;
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
        let listen = check.listen(file.listen)?;
        let names = providers.iter().map(|provider| &*provider.name);
        let legacy = file.legacy.map(|legacy| Legacy::new(legacy, listen.v1beta1, names)).transpose();
        let legacy = legacy.map_err(|(what, remedy)| check.error(what, remedy))?;
        Ok(Self { listen, keyring, observe, providers, legacy })
    }
}

/// Whoever can change what we read decides what we load and whom we serve.
fn refuse_if_writable_by_others(path: &Path) -> Result<(), ConfigError> {
    let metadata = std::fs::metadata(path).map_err(|error| ConfigError::new(path, error.to_string(), "try again"))?;
    let (owner, mode) = (metadata.uid(), metadata.mode());
    if owner != 0 && owner != rustix::process::geteuid().as_raw() {
        let what = format!("belongs to uid {owner}, who could change it");
        return Err(ConfigError::new(path, what, format!("chown root {}", path.display())));
    }
    if mode & 0o022 != 0 {
        let what = format!("can be changed by others: its mode is {:04o}", mode & 0o7777);
        return Err(ConfigError::new(path, what, format!("chmod go-w {}", path.display())));
    }
    Ok(())
}

/// What [`is_cluster_name`] takes.
pub(crate) const CLUSTER_NAME: &str = "1 to 63 letters, digits, `-`, `.` and `_`";

pub(crate) fn is_cluster_name(text: &str) -> bool {
    let named = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
    (1..=63).contains(&text.len()) && text.chars().all(named)
}

/// A length of time such as `90d` or `12h`: days have 24 hours here, and months have no length.
fn period(text: &str) -> Option<SignedDuration> {
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

    fn observe(&self, file: file::Observe) -> Result<Option<SocketAddr>, ConfigError> {
        let Some(text) = file.http else { return Ok(None) };
        let wrong = |_| {
            let what = format!("observe.http `{text}` is not an address and a port");
            self.error(what, "write for example \"127.0.0.1:9990\", or \"[::1]:9990\"")
        };
        text.parse().map(Some).map_err(wrong)
    }

    fn provider(
        &self,
        file: file::Provider,
        cluster: &str,
        exportable: Exportable,
    ) -> Result<ProviderConfig, ConfigError> {
        let name = file.name;
        let wrong =
            |field: &str, what: &str, remedy: &str| self.error(format!("provider {name}: {field}: {what}"), remedy);
        let profile = match (&file.profile, &file.module) {
            (Some(profile), _) => Profile::load(profile, &self.profiles, self.path)?,
            (None, Some(module)) => Profile::of_module(module, &self.profiles, self.path)?,
            (None, None) => return Err(wrong("profile", "not named, and no module either", "name the token's family")),
        };
        let module = match file.module.or_else(|| profile.find_module().cloned()) {
            Some(module) if module.is_absolute() => module,
            Some(module) => {
                return Err(wrong("module", &format!("`{}` is relative", module.display()), "write the whole path"));
            }
            None => {
                let paths: Vec<_> = profile.module_paths.iter().map(|path| path.display().to_string()).collect();
                let what = match paths.as_slice() {
                    [] => format!("the profile {} knows no module", profile.name),
                    paths => format!("{} is not installed: none of {} exists", profile.title, paths.join(", ")),
                };
                return Err(wrong("module", &what, "install it, and name its file with `module = …`"));
            }
        };
        let tokens: Vec<TokenUri> = file
            .tokens
            .iter()
            .map(|text| {
                text.parse().map_err(|what: String| {
                    wrong("tokens", &format!("`{text}`: {what}"), "write for example \"pkcs11:token=trousseau\"")
                })
            })
            .collect::<Result<_, _>>()?;
        if tokens.is_empty() {
            return Err(wrong("tokens", "no token is named", "write for example [\"pkcs11:token=trousseau\"]"));
        }
        if !(1..=256).contains(&file.sessions) {
            return Err(wrong("sessions", "not a number from 1 to 256", "4 is a good start"));
        }
        if let Some(most) = profile.max_sessions.filter(|most| file.sessions >= *most) {
            let what =
                format!("the tokens of profile {} give {most} sessions, one of which holds the login", profile.name);
            return Err(wrong("sessions", &what, &format!("write {} at most", most - 1)));
        }
        let pin = Credential::parse(&file.pin_file).map_err(|what| wrong("pin-file", &what, "name the PIN's file"))?;
        pin.read().map_err(|error| wrong("pin-file", &error.to_string(), error.remedy()))?;
        let admitted = file.kek.into_iter().map(|kek| self.admitted(&name, &kek)).collect::<Result<_, _>>()?;
        let label = file.label.unwrap_or_else(|| format!("trousseau-{cluster}"));
        Ok(ProviderConfig {
            seal: file.seal,
            profile: Arc::new(profile),
            module,
            tokens,
            label,
            pin,
            sessions: file.sessions,
            admitted,
            exportable,
            name,
        })
    }

    fn admitted(&self, provider: &str, kek: &file::AdmittedKek) -> Result<(Vec<u8>, Admission), ConfigError> {
        let id = base16ct::lower::decode_vec(&kek.id).ok().filter(|id| !id.is_empty());
        let id = id.ok_or_else(|| {
            let what = format!("provider {provider}: kek.id `{}` is not a CKA_ID in lower-case hex digits", kek.id);
            self.error(what, "`trousseau key list` shows the ids of all keys with the label")
        })?;
        let not_before = kek.not_before.to_string().parse().map_err(|_| {
            let what = format!("provider {provider}: kek.not-before `{}` is not an instant", kek.not_before);
            self.error(what, "write it with its zone, for example 2026-11-23T00:00:00Z")
        })?;
        let said = |why: &&String| !why.trim().is_empty() && why.len() <= 200 && !why.contains(char::is_control);
        if let Some(why) = kek.exception.as_ref().filter(|why| !said(why)) {
            let what = format!("provider {provider}: kek.exception `{}` is not a reason", why.escape_debug());
            return Err(self.error(what, "say in at most 200 letters of one line where the key was before"));
        }
        Ok((id, Admission { not_before, exception: kek.exception.clone() }))
    }

    /// What holds for the providers as a whole.
    fn providers_together(&self, providers: &[ProviderConfig]) -> Result<(), ConfigError> {
        let sealing = providers.iter().filter(|provider| provider.seal).count();
        if sealing == 0 {
            return Err(self.error("no [[provider]] seals", "add one, or remove `seal = false`"));
        }
        if sealing > MAX_RECIPIENTS {
            let what = format!("{sealing} providers seal, and an envelope has at most {}", MAX_RECIPIENTS);
            return Err(self.error(what, "set `seal = false` for some"));
        }
        let mut names = BTreeSet::new();
        match providers.iter().find(|provider| !names.insert(&provider.name)) {
            Some(twice) => Err(self.error(format!("two providers are named {}", twice.name), "rename one")),
            None => Ok(()),
        }
    }
}
