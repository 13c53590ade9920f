//! What this host remembers of a Transit provider: when each version of its key was made, and logins that were refused.
//! Never a credential itself.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{State, StateError};

/// The versions of a key that were seen.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct SeenKey {
    /// The key, for people.
    pub key: String,
    /// Its versions, and the second of Unix time at which each was made.
    pub versions: BTreeMap<u32, i64>,
}

/// A login that was refused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct RefusedLogin {
    /// When.
    pub at: Timestamp,
    /// SHA-256 of what was shown, in hex: a role id, a secret id, a JWT. They have far more entropy than a PIN.
    pub shown: String,
}

impl State {
    /// The versions that were seen under this name.
    ///
    /// # Errors
    /// The file is there, and is damaged.
    pub fn seen_key(&self, name: &str) -> Result<Option<SeenKey>, StateError> {
        self.read(&key_file(name))
    }

    /// Remembers the versions that were seen, soon: the disk must not hold up who serves. One that does not take it is
    /// logged.
    pub fn keep_seen_key(self: &Arc<Self>, name: &str, seen: SeenKey) {
        let file = key_file(name);
        self.soon(move |state| drop(state.locked(|| state.write(&file, &seen))));
    }

    /// Where [`State::seen_key`] has it.
    #[must_use]
    pub fn seen_key_file(&self, name: &str) -> PathBuf {
        self.directory.join(key_file(name))
    }

    /// Logins that were refused.
    ///
    /// # Errors
    /// The file is there, and is damaged.
    pub fn refused_logins(&self, name: &str) -> Result<Vec<RefusedLogin>, StateError> {
        Ok(self.read(&logins_file(name))?.unwrap_or_default())
    }

    /// Remembers the logins that were refused; a disk that does not take it is logged.
    pub fn keep_refused_logins(&self, name: &str, refused: &[RefusedLogin]) {
        let _logged = self.locked(|| self.write(&logins_file(name), &refused));
    }

    /// Where [`State::refused_logins`] has them.
    #[must_use]
    pub fn refused_logins_file(&self, name: &str) -> PathBuf {
        self.directory.join(logins_file(name))
    }
}

fn key_file(name: &str) -> String {
    format!("transit-{name}.json")
}

fn logins_file(name: &str) -> String {
    format!("logins-{name}.json")
}
