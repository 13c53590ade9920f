//! What this host remembers of a token's PIN: that it worked, or that it must not be tried again. Never the PIN itself.

use std::fs;
use std::io;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};

use super::{File, OpenOptions, State, StateError};
use crate::sync::lock;

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

/// A record that the disk did not take, and what the disk says in its place.
#[derive(Debug)]
pub(super) struct Unwritten {
    on_disk: Option<PinRecord>,
    record: PinRecord,
}

impl State {
    /// Keeps every other login to this token away until the returned file is dropped, or its process has ended.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`]: another one has been under way for so long. All else: the disk takes no lock.
    pub fn lock_login(&self, token: &str, patience: Duration) -> io::Result<File> {
        let mut options = OpenOptions::new();
        let file = self.open_file(&format!("{token}.lock"), options.write(true).create(true).truncate(false))?;
        let end = Instant::now() + patience;
        loop {
            match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(file),
                // flock(2) has no timeout.
                Err(rustix::io::Errno::WOULDBLOCK) if Instant::now() < end => {
                    std::thread::sleep(Duration::from_millis(10));
                }
                Err(error) => return Err(error.into()),
            }
        }
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
        let on_disk = self.read(&file_of(token))?;
        let unwritten = lock(&self.remembered).unwritten_pins.remove(token);
        // Somebody else has changed it since: a disk that took that is the better witness.
        let Some(Unwritten { record, .. }) = unwritten.filter(|unwritten| unwritten.on_disk == on_disk) else {
            return Ok(on_disk);
        };
        if self.write_pin_record(token, &record).is_err() {
            self.remember(token, on_disk, &record);
        }
        Ok(Some(record))
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
        match self.locked(|| self.write(&file_of(token), record)) {
            Ok(()) => self.forget_noted_login(token),
            // The note stays, and latches in its place.
            Err(_) => self.remember(token, self.read(&file_of(token)).unwrap_or_default(), record),
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

    fn remember(&self, token: &str, on_disk: Option<PinRecord>, record: &PinRecord) {
        let unwritten = Unwritten { on_disk, record: record.clone() };
        lock(&self.remembered).unwritten_pins.insert(token.to_owned(), unwritten);
    }
}

fn file_of(token: &str) -> String {
    format!("{token}.json")
}

fn note_of(token: &str) -> String {
    format!("{token}.login")
}
