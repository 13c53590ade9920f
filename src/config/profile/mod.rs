//! Profiles: what is known of a family of tokens, as data (`hsm-profiles/*.toml`). The code knows no device by name.

mod mode;

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, c_ulong};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

pub use self::mode::{Excusable, GcmIv, Mode, Omissible};
use super::{Codes, ConfigError};

/// One token family.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Profile {
    /// The file's name without its ending.
    #[serde(skip)]
    pub name: String,
    /// What people call the family.
    pub title: String,
    /// How its content came to be known.
    pub status: Status,
    /// From where it is known, unless it was tested.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sources: Vec<String>,
    /// What whoever sets such a token up should know, a sentence each.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
    /// Where its module is found, the first that exists being taken. Of one without a directory only the name is known.
    pub module_paths: Vec<PathBuf>,
    /// Names of environment variables without which the module does not work.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub environment: Vec<String>,
    /// The ways to wrap that its tokens know, the preferred first.
    pub modes: Vec<Mode>,
    /// Codes by which its tokens know a mode's mechanism, where these are not the standard's.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    mechanisms: BTreeMap<Mode, c_ulong>,
    /// Whether AES-KW and AES-KWP are given their initial value, which is the standard's, as a parameter.
    #[serde(default, skip_serializing_if = "is_default")]
    pub explicit_iv: bool,
    /// Who makes the IV of AES-GCM.
    #[serde(default, skip_serializing_if = "is_default")]
    pub gcm_iv: GcmIv,
    /// Attributes that are left out when a KEK is made.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub omit_attributes: BTreeSet<Omissible>,
    /// What its tokens cannot say of a KEK, which is one all the same.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub excuses: BTreeSet<Excusable>,
    /// Sessions that a token gives one process, if it does not give any number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_sessions: Option<usize>,
    /// Return codes by which its tokens mean something else than the standard.
    #[serde(default, skip_serializing_if = "is_default")]
    pub errors: Codes,
    /// Whether the module shows keys that another process has made since it was initialized. Where it does not, each plugin
    /// must be started anew before a new KEK's instant.
    #[serde(default = "yes", skip_serializing_if = "is_yes")]
    pub sees_new_keys: bool,
    /// Whether a key lives and dies with one host: it has no replica, and no backup that another host could use.
    #[serde(default, skip_serializing_if = "is_default")]
    pub one_host: bool,
    /// Whether the module stands C_Initialize after C_Finalize in one process. Where it does not, it stays initialized,
    /// and the process ends when it has lost the module's last token: its supervisor starts it anew.
    #[serde(default = "yes", skip_serializing_if = "is_yes")]
    pub reinitialize: bool,
    /// Objects made and destroyed (wraps and unwraps of the mode `wrapkey`) after which the module is finalized and
    /// initialized again, because it does not free what they took before that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub renew_after: Option<u64>,
    /// Bits in the RSA keys of a new KEK of the mode `oaep`: 2048 or 3072.
    #[serde(default = "three_thousand", skip_serializing_if = "is_three_thousand")]
    pub rsa_bits: u16,
}

fn yes() -> bool {
    true
}

fn three_thousand() -> u16 {
    3072
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

fn is_yes(value: &bool) -> bool {
    *value
}

fn is_three_thousand(bits: &u16) -> bool {
    *bits == three_thousand()
}

/// A pool has so many sessions beside its workers': the one that keeps the login, and the leader's.
pub(super) const SESSIONS_BESIDE: usize = 2;

/// Where the keys of a profile are explained.
const REFERENCE: &str =
    "`man trousseau-profile`, or hsm-profiles/README.md in the source, has every key with its meaning";

/// The profiles that every binary carries, each with its name, in order: what build.rs found in `hsm-profiles/`. A file
/// of the same name in the configuration's `hsm-profiles/` goes first.
const SHIPPED: &[(&str, &str)] = include!(concat!(env!("OUT_DIR"), "/profiles.rs"));

/// How a profile's content came to be known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Status {
    /// The whole test suite ran on such a token.
    Tested,
    /// It says what the vendor's documentation or source says, and nobody has run it.
    Documented,
    /// It says what others report, and nobody has run it.
    Community,
}

impl Profile {
    /// Loads the profile `name`: from `directory`, else from those that were shipped.
    pub(super) fn load(name: &str, directory: &Path, config: &Path) -> Result<Self, ConfigError> {
        let path = directory.join(format!("{name}.toml"));
        if name.contains('/') {
            return Err(ConfigError::new(config, format!("profile `{name}` is not a name"), known(directory)));
        }
        match std::fs::read_to_string(&path) {
            Ok(text) => {
                super::refuse_if_changeable_by_others(&path)?;
                Self::parse(name, &path, &text)
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                let Some((_, text)) = SHIPPED.iter().find(|(shipped, _)| *shipped == name) else {
                    return Err(ConfigError::new(config, format!("profile `{name}` is unknown"), known(directory)));
                };
                Self::parse(name, &path, text)
            }
            Err(error) => Err(ConfigError::new(&path, format!("cannot be read: {error}"), "make it readable")),
        }
    }

    /// The one profile that has a module of this file's name among its paths, when the configuration names none.
    pub(super) fn of_module(module: &Path, directory: &Path, config: &Path) -> Result<Self, ConfigError> {
        let own = std::fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path());
        let own = own.filter(|path| path.extension() == Some(OsStr::new("toml")));
        let own = own.filter_map(|path| Some(path.file_stem()?.to_str()?.to_owned()));
        let names: BTreeSet<String> = own.chain(SHIPPED.iter().map(|(name, _)| (*name).to_owned())).collect();
        let mut matching = Vec::new();
        for name in names {
            let profile = Self::load(&name, directory, config)?;
            if profile.module_paths.iter().any(|path| path.file_name() == module.file_name()) {
                matching.push(profile);
            }
        }
        let wrong = |what: &str, remedy: String| {
            Err(ConfigError::new(config, format!("{what} has the module {}", module.display()), remedy))
        };
        match matching.as_slice() {
            [profile] => Ok(profile.clone()),
            [] => wrong("no profile", "write `profile = \"generic\"`, or one of your own".into()),
            several => {
                let names: Vec<&str> = several.iter().map(|profile| profile.name.as_str()).collect();
                wrong("more than one profile", format!("write which is meant: profile = {}", names.join(" or ")))
            }
        }
    }

    fn parse(name: &str, path: &Path, text: &str) -> Result<Self, ConfigError> {
        let profile: Self =
            toml::from_str(text).map_err(|error| ConfigError::from_toml(path, text, &error, REFERENCE))?;
        match profile.contradiction() {
            None => Ok(Self { name: name.to_owned(), ..profile }),
            Some((what, remedy)) => Err(ConfigError::new(path, what, remedy)),
        }
    }

    /// What in it cannot be meant, and what to do.
    fn contradiction(&self) -> Option<(String, &'static str)> {
        if ![2048, 3072].contains(&self.rsa_bits) {
            // Two times 4096 bits are more than a v2 answer holds.
            return Some((format!("rsa-bits is {}", self.rsa_bits), "write 2048 or 3072"));
        }
        if self.modes.is_empty() {
            return Some(("modes is empty".into(), "name at least one way to wrap"));
        }
        if let Some(name) = self.environment.iter().find(|name| !is_variable(name)) {
            let what = format!("environment has `{}`, which is no variable's name", name.escape_debug());
            return Some((what, "write the name alone: letters, digits and `_`, and no digit first"));
        }
        if let Some(mode) = self.mechanisms.keys().find(|mode| !self.modes.contains(mode)) {
            let what = format!("mechanisms has {}, which is not in modes", mode.as_str());
            return Some((what, "add it there, or remove it here"));
        }
        if self.mechanisms.contains_key(&Mode::Oaep) {
            let what = "mechanisms has oaep, whose mechanism is always CKM_RSA_PKCS_OAEP";
            return Some((what.into(), "remove it"));
        }
        if self.gcm_iv != GcmIv::Ours && !self.modes.contains(&Mode::Gcm) {
            return Some(("gcm-iv is for the mode gcm, which is not in modes".into(), "add it there, or remove this"));
        }
        let alike = |wraps| self.modes.iter().filter(|mode| mode.wraps_objects() == wraps).count();
        if self.omit_attributes.contains(&Omissible::CkaAllowedMechanisms) && (alike(true) > 1 || alike(false) > 1) {
            let what = "without CKA_ALLOWED_MECHANISMS nothing tells which of its modes a KEK is for";
            return Some((what.into(), "name one mode with `wrapkey` in its name, and one without, at most"));
        }
        if self.max_sessions.is_some_and(|most| most <= SESSIONS_BESIDE) {
            let remedy = "two sessions are open beside those that work: one keeps the login";
            return Some(("max-sessions is less than 3".into(), remedy));
        }
        if self.sources.is_empty() && self.status != Status::Tested {
            return Some(("sources is empty".into(), "say from where the profile is known, unless it was tested"));
        }
        if self.renew_after.is_some() && !self.reinitialize {
            return Some(("renew-after contradicts reinitialize = false".into(), "remove one of them"));
        }
        if self.renew_after == Some(0) {
            return Some(("renew-after is 0".into(), "leave it out, or give a number of objects"));
        }
        None
    }

    /// The module's file: the first of [`Profile::module_paths`] that is there.
    #[must_use]
    pub fn find_module(&self) -> Option<&PathBuf> {
        self.module_paths.iter().find(|path| path.is_absolute() && path.exists())
    }

    /// The code by which its tokens know a mode's mechanism.
    #[must_use]
    pub fn mechanism(&self, mode: Mode) -> c_ulong {
        self.mechanisms.get(&mode).copied().unwrap_or(mode.standard_mechanism())
    }

    /// Its quirks, for a token of which no more is known than that these of its modes work through this module.
    #[must_use]
    pub fn of_token(&self, title: String, source: &str, module: &Path, works: impl Fn(Mode) -> bool) -> Self {
        let mut found = self.clone();
        found.modes.retain(|mode| works(*mode));
        found.mechanisms.retain(|mode, _| works(*mode));
        if !works(Mode::Gcm) {
            found.gcm_iv = GcmIv::default();
        }
        Self {
            title,
            status: Status::Community,
            sources: vec![source.into()],
            module_paths: vec![module.into()],
            ..found
        }
    }

    /// As it is read from a file.
    ///
    /// # Errors
    /// TOML cannot say it.
    pub fn to_toml(&self) -> Result<String, toml::ser::Error> {
        toml::to_string_pretty(self)
    }

    /// What of its tokens whoever uses KEKs in them must know, and what to do.
    #[must_use]
    pub fn warnings(&self) -> Vec<String> {
        let of = &self.name;
        let sees_none = (!self.sees_new_keys).then(|| {
            format!(
                "profile {of} says that the module sees a new key only when it is initialized: after `key generate`, \
                 restart every plugin, before the KEK's instant"
            )
        });
        let one_host = self.one_host.then(|| {
            format!(
                "profile {of} says that a KEK lives in this one host, without a replica or a backup: if the host is \
                 lost, so is everything that it wrapped"
            )
        });
        sees_none.into_iter().chain(one_host).collect()
    }

    /// That nobody has run it, if that is so, and from where its content is known.
    #[must_use]
    pub fn caveat(&self) -> Option<String> {
        let from = match self.status {
            Status::Tested => return None,
            Status::Documented => "documentation",
            Status::Community => "what others report",
        };
        Some(format!("profile {} was written from {from}, and nobody has run it yet", self.name))
    }
}

fn is_variable(name: &str) -> bool {
    let may_stand = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    name.bytes().all(may_stand) && name.bytes().next().is_some_and(|first| !first.is_ascii_digit())
}

fn known(directory: &Path) -> String {
    let names: Vec<&str> = SHIPPED.iter().map(|(name, _)| *name).collect();
    format!("shipped profiles: {}; others go into {}", names.join(", "), directory.display())
}

#[cfg(test)]
mod tests;
