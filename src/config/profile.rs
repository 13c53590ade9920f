//! Profiles: what is known of a family of tokens, as data (`hsm-profiles/*.toml`). The code knows no device by name.

use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::{Codes, ConfigError};
use crate::envelope::WrapAlgorithm;

/// How a KEK wraps a DEK inside a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// C_WrapKey with CKM_AES_KEY_WRAP, on a session object that holds the DEK.
    Wrapkey,
    /// C_Encrypt with CKM_AES_KEY_WRAP over the DEK's bytes.
    Encrypt,
    /// C_Encrypt with CKM_AES_GCM over the DEK's bytes, with an IV of ours.
    Gcm,
}

impl Mode {
    /// What the mode makes.
    #[must_use]
    pub const fn algorithm(self) -> WrapAlgorithm {
        match self {
            Self::Wrapkey | Self::Encrypt => WrapAlgorithm::AesKw,
            Self::Gcm => WrapAlgorithm::AesGcm,
        }
    }

    /// The word for it in profiles and tables.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Wrapkey => "wrapkey",
            Self::Encrypt => "encrypt",
            Self::Gcm => "gcm",
        }
    }
}

/// One token family.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Profile {
    /// The file's name without its ending.
    #[serde(skip)]
    pub name: String,
    /// What people call the family.
    pub title: String,
    /// How its content came to be known.
    pub status: Status,
    /// Where its module is found, the first that exists being taken.
    pub module_paths: Vec<PathBuf>,
    /// The ways to wrap that its tokens know, the preferred first.
    pub modes: Vec<Mode>,
    /// Return codes by which its tokens mean something else than the standard.
    #[serde(default)]
    pub errors: Codes,
    /// Whether the module stands C_Initialize after C_Finalize in one process. Where it does not, it stays initialized,
    /// and the process ends when it has lost the module's last token: its supervisor starts it anew.
    #[serde(default = "yes")]
    pub reinitialize: bool,
    /// Objects made and destroyed (wraps and unwraps of the mode `wrapkey`) after which the module is finalized and
    /// initialized again, because it does not free what they took before that.
    #[serde(default)]
    pub renew_after: Option<u64>,
}

fn yes() -> bool {
    true
}

/// Where the keys of a profile are explained.
const REFERENCE: &str = "README.md, under Profiles, has every key of a profile with its meaning";

/// How a profile's content came to be known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Status {
    /// The whole test suite ran on such a token.
    Tested,
    /// It says what others report, and nobody has run it.
    Community,
}

/// Profiles that every binary carries; a file of the same name in the configuration's `hsm-profiles/` goes first.
const SHIPPED: [(&str, &str); 2] = [
    ("kryoptic", include_str!("../../hsm-profiles/kryoptic.toml")),
    ("softhsm", include_str!("../../hsm-profiles/softhsm.toml")),
];

impl Profile {
    /// Loads the profile `name`: from `directory`, else from those that were shipped.
    pub(super) fn load(name: &str, directory: &Path, config: &Path) -> Result<Self, ConfigError> {
        let path = directory.join(format!("{name}.toml"));
        if name.contains('/') {
            return Err(ConfigError::new(config, format!("profile `{name}` is not a name"), known(directory)));
        }
        match std::fs::read_to_string(&path) {
            Ok(text) => {
                super::refuse_if_writable_by_others(&path)?;
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

    fn parse(name: &str, path: &Path, text: &str) -> Result<Self, ConfigError> {
        let profile: Self =
            toml::from_str(text).map_err(|error| ConfigError::from_toml(path, text, &error, REFERENCE))?;
        if profile.modes.is_empty() {
            return Err(ConfigError::new(path, "modes is empty", "name at least one way to wrap"));
        }
        if profile.renew_after.is_some() && !profile.reinitialize {
            let what = "renew-after contradicts reinitialize = false";
            return Err(ConfigError::new(path, what, "remove one of them"));
        }
        if profile.renew_after == Some(0) {
            return Err(ConfigError::new(path, "renew-after is 0", "leave it out, or give a number of objects"));
        }
        Ok(Self { name: name.to_owned(), ..profile })
    }

    /// The module's file: the first of [`Profile::module_paths`] that is there.
    #[must_use]
    pub fn find_module(&self) -> Option<&PathBuf> {
        self.module_paths.iter().find(|path| path.exists())
    }
}

fn known(directory: &Path) -> String {
    let names: Vec<&str> = SHIPPED.iter().map(|(name, _)| *name).collect();
    format!("shipped profiles: {}; others go into {}", names.join(", "), directory.display())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn shipped_profiles_load_and_every_file_is_shipped() {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("hsm-profiles");
        let files = std::fs::read_dir(&directory)
            .unwrap()
            .filter(|file| file.as_ref().unwrap().path().extension().is_some_and(|extension| extension == "toml"));
        assert_eq!(files.count(), SHIPPED.len());
        for (name, text) in SHIPPED {
            Profile::parse(name, Path::new(name), text).unwrap();
        }
    }
}
