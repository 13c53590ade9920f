//! What this host remembers of a token's PIN: that it worked, or that it must not be tried again. Never the PIN itself.

use std::fs;
use std::io;
use std::time::Duration;

use jiff::Timestamp;
use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};

use super::{File, OpenOptions, State, StateError, not_later_than_now};
use crate::disk;

/// One token's file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct PinRecord {
    /// The token, for people.
    pub token: String,
    /// Goes into every hash of this file, in hex: one hash tells all that is asked of a PIN.
    pub salt: String,
    /// How slow the hashes are.
    pub rounds: u32,
    /// The hash of the PIN that worked last.
    pub worked: Option<String>,
    /// The latch: PINs that have been tried since one worked.
    pub refused: Vec<RefusedPin>,
    /// A person wants one login, whatever the token's count says.
    pub retry: bool,
}

/// A PIN that is not tried again by itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct RefusedPin {
    /// Its hash. `None`: the process ended before it knew that too, and any PIN may be the one.
    pub hash: Option<String>,
    /// When it was tried.
    pub at: Timestamp,
    /// What the token said. `None`: the process ended before it knew.
    pub answer: Option<String>,
    /// Whether one more try is due, since the token did not blame the PIN.
    pub again: bool,
}

impl RefusedPin {
    /// Whether the PIN with this hash may be the one.
    #[must_use]
    pub fn may_be(&self, hash: Option<&str>) -> bool {
        self.hash.is_none() || self.hash.as_deref() == hash
    }
}

impl State {
    /// Keeps every other login to this token away until the returned file is dropped, or its process has ended.
    ///
    /// # Errors
    /// [`io::ErrorKind::ResourceBusy`]: another one has been under way for so long. All else: the disk takes no lock.
    pub fn lock_login(&self, token: &str, patience: Duration) -> io::Result<File> {
        let mut options = OpenOptions::new();
        let file = self.open_file(&format!("{token}.lock"), options.write(true).create(true).truncate(false))?;
        disk::lock(&file, FlockOperation::NonBlockingLockExclusive, patience)?;
        Ok(file)
    }

    /// A token's record. It is read from the disk each time: `pin retry` changes it there.
    ///
    /// # Errors
    /// There is one, and it is damaged.
    pub fn pin_record(&self, token: &str) -> Result<Option<PinRecord>, StateError> {
        let noted = self.noted_login(token);
        Ok(self.kept_pin_record(token)?.map(|mut record| {
            record.refused.extend(noted.map(|at| RefusedPin { hash: None, at, answer: None, again: true }));
            record
        }))
    }

    fn kept_pin_record(&self, token: &str) -> Result<Option<PinRecord>, StateError> {
        if self.catch_up(&file_of(token)) {
            self.forget_noted_login(token);
        }
        let mut record: Option<PinRecord> = self.kept(&file_of(token))?;
        let refused = record.iter_mut().flat_map(|record| &mut record.refused);
        if not_later_than_now(refused.map(|refused| &mut refused.at)) {
            self.keep(&file_of(token), &record); // a note of a login stays
        }
        Ok(record)
    }

    /// Writes a token's record, durably when this returns.
    ///
    /// # Errors
    /// The disk does not take it.
    pub fn write_pin_record(&self, token: &str, record: &PinRecord) -> io::Result<()> {
        let _lock = self.lock_directory()?;
        self.write(&file_of(token), record)?;
        self.forget_noted_login(token);
        Ok(())
    }

    /// Keeps a token's record: on the disk or, if it does not take it, in memory until it does.
    pub fn keep_pin_record(&self, token: &str, record: &PinRecord) {
        // If the disk does not take it, the note stays, and latches in its place.
        if self.keep(&file_of(token), record) {
            self.forget_noted_login(token);
        }
    }

    /// Notes that a login begins, without a wait for the disk: should this process end before the login does,
    /// [`State::pin_record`] has a [`RefusedPin`] without hash and answer. A loss of power may take the note along.
    ///
    /// # Errors
    /// The disk does not take it.
    pub fn note_login(&self, token: &str) -> io::Result<()> {
        self.open_file(&note_of(token), OpenOptions::new().write(true).create_new(true)).map(drop)
    }

    /// The login has ended.
    pub fn forget_noted_login(&self, token: &str) {
        match fs::remove_file(self.directory.join(note_of(token))) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(token, %error, "the note of a login stays: the next start takes this one for a crash");
            }
            _ => (),
        }
    }

    fn noted_login(&self, token: &str) -> Option<Timestamp> {
        let noted = fs::symlink_metadata(self.directory.join(note_of(token))).ok().filter(fs::Metadata::is_file)?;
        Some(noted.modified().ok().and_then(|at| at.try_into().ok()).unwrap_or_else(Timestamp::now))
    }
}

fn file_of(token: &str) -> String {
    format!("{token}.json")
}

fn note_of(token: &str) -> String {
    format!("{token}.login")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn an_instant_of_a_clock_that_was_ahead_counts_as_the_one_at_which_it_is_read_first() {
        let directory = tempfile::tempdir().unwrap();
        let state = State::open(directory.path()).unwrap();
        let refused = vec![RefusedPin { hash: None, at: Timestamp::MAX, answer: None, again: false }];
        let (token, salt) = ("t".to_owned(), "00".to_owned());
        state.keep_pin_record("t", &PinRecord { token, salt, rounds: 1, worked: None, refused, retry: false });
        let read = state.pin_record("t").unwrap();
        assert!(read.as_ref().unwrap().refused.iter().all(|refused| refused.at <= Timestamp::now()), "{read:?}");
        assert_eq!(state.pin_record("t").unwrap(), read, "and no later than that when it is read again");
    }
}
