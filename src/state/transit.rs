//! What this host remembers of a Transit provider: when each version of its key was made, and logins that were refused.
//! Never a credential itself.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{State, StateError, not_later_than_now};

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
    /// Whether the role was locked: that says nothing of what was shown.
    #[serde(default)]
    pub is_locked: bool,
}

impl State {
    /// The versions that were seen under this name.
    ///
    /// # Errors
    /// The file is there, and is damaged.
    pub fn seen_key(&self, name: &str) -> Result<Option<SeenKey>, StateError> {
        self.catch_up(&key_file(name));
        self.kept(&key_file(name))
    }

    /// Remembers the versions that were seen, soon: the disk must not hold up who serves.
    pub fn keep_seen_key(self: &Arc<Self>, name: &str, seen: SeenKey) {
        let file = key_file(name);
        self.soon(move |state| {
            state.keep(&file, &seen);
        });
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
        self.catch_up(&logins_file(name));
        let mut refused: Vec<RefusedLogin> = self.kept(&logins_file(name))?.unwrap_or_default();
        if not_later_than_now(refused.iter_mut().map(|refused| &mut refused.at)) {
            self.keep_refused_logins(name, &refused);
        }
        Ok(refused)
    }

    /// Remembers the logins that were refused.
    pub fn keep_refused_logins(&self, name: &str, refused: &[RefusedLogin]) {
        self.keep(&logins_file(name), &refused);
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn what_the_disk_does_not_take_is_remembered_until_it_does_or_somebody_changes_the_file() {
        let directory = tempfile::tempdir().unwrap();
        let state = State::open(directory.path()).unwrap();
        let refused =
            |shown: &str| vec![RefusedLogin { at: Timestamp::UNIX_EPOCH, shown: shown.into(), is_locked: false }];
        let seen = SeenKey { key: "kek".into(), versions: [(1, 7)].into() };
        state.keep_refused_logins("x", &refused("first"));
        // As on a full disk, nothing can be written aside: not even root can remove a directory as if it were a file.
        let in_the_way = [logins_file("x"), key_file("x")].map(|name| directory.path().join(name + ".new"));
        in_the_way.iter().for_each(|aside| fs::create_dir(aside).unwrap());
        state.keep_refused_logins("x", &refused("second"));
        assert!(!state.keep(&key_file("x"), &seen));
        for _ in 0..2 {
            assert_eq!(state.refused_logins("x").unwrap(), refused("second"));
            assert_eq!(state.seen_key("x").unwrap(), Some(seen.clone()));
        }
        assert_eq!(State::open(directory.path()).unwrap().refused_logins("x").unwrap(), refused("first"));

        in_the_way.iter().for_each(|aside| fs::remove_dir(aside).unwrap());
        assert_eq!(state.seen_key("x").unwrap(), Some(seen.clone()));
        fs::remove_file(state.refused_logins_file("x")).unwrap(); // a person wants one more try
        assert_eq!(state.refused_logins("x").unwrap(), []);
        let next = State::open(directory.path()).unwrap();
        assert_eq!((next.seen_key("x").unwrap(), next.refused_logins("x").unwrap()), (Some(seen), Vec::new()));
    }

    #[test]
    fn an_instant_of_a_clock_that_was_ahead_counts_as_the_one_at_which_it_is_read_first() {
        let directory = tempfile::tempdir().unwrap();
        let state = State::open(directory.path()).unwrap();
        let (past, before) = (Timestamp::UNIX_EPOCH, Timestamp::now());
        let refused = [past, Timestamp::MAX].map(|at| RefusedLogin { at, shown: "it".into(), is_locked: true });
        state.keep_refused_logins("x", &refused);
        let read = state.refused_logins("x").unwrap();
        let is_now = (before..=Timestamp::now()).contains(&read.last().unwrap().at);
        assert!(read.first().unwrap().at == past && is_now, "{read:?}");
        assert_eq!(state.refused_logins("x").unwrap(), read, "and no later than that when it is read again");
    }
}
