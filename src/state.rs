//! The few small files that one host remembers between runs: references, the activation mark, wrap counters, and what
//! became of a PIN ([`pins`]).
//!
//! Each is JSON, written aside, synced and renamed, so that a power loss leaves the old one or the new one. Other
//! processes of this host (`key generate` beside `serve`) use the same directory: a KEK has files of its own, and what
//! is read, changed and written happens under a lock; marks are written by `serve` alone. A file that is damaged is
//! never taken for one that is missing. When the disk takes nothing, what was learned is kept in memory and the service
//! goes on; the log says so.

mod pins;
mod transit;
mod unwritten;

use std::collections::HashMap;
use std::fmt;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use jiff::Timestamp;
use rustix::fs::{FlockOperation, OFlags};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

pub use self::pins::{PinRecord, RefusedPin};
pub use self::transit::{RefusedLogin, SeenKey};
use crate::disk;
use crate::identity::Identity;
use crate::sync::lock;

/// A random value that a KEK wrapped when it was first seen, by which that KEK is recognised later.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Reference {
    /// The wrapped value, in hex.
    pub wrapped: String,
    /// SHA-256 of the value, in hex.
    pub sha256: String,
}

/// The KEK that this host has made active for one provider, and never leaves for a lower one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Mark {
    /// The provider's name when the mark was made, for people: a mark belongs to whoever has the KEK.
    pub provider: String,
    /// The KEK.
    pub identity: Identity,
    /// Its activation instant.
    pub not_before: Timestamp,
    /// Its name within the provider (pkcs11: CKA_ID) in hex, which orders KEKs of one instant.
    pub id: String,
}

/// Envelopes that lack the recipient of one KEK.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Gap {
    /// Under which they were sealed.
    pub key_id: String,
    /// The provider that could not wrap, for people.
    pub provider: String,
    /// Its active KEK.
    pub identity: Identity,
    /// When the first of them was sealed.
    pub since: Timestamp,
    /// How many this host has sealed, at least.
    pub envelopes: u64,
}

/// The directory of state files. All methods block on the disk; they are called seldom.
#[derive(Debug)]
pub struct State {
    directory: PathBuf,
    remembered: Mutex<Remembered>,
}

/// What the files say, or would say if the disk had taken it.
#[derive(Debug, Default)]
struct Remembered {
    references: HashMap<Identity, Reference>,
    /// `None`: not read yet, or damaged when last tried.
    marks: Option<Vec<Mark>>,
    gaps: Vec<Gap>,
    unwritten: HashMap<String, unwritten::Unwritten>,
}

/// The state directory, or a file in it, cannot be used.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{path}: {what}", path = .path.display())]
pub struct StateError {
    path: PathBuf,
    what: String,
    remedy: String,
    /// The operating system refused this user.
    pub is_forbidden: bool,
    /// The disk is full, or read-only, or another process holds the lock.
    is_disk: bool,
}

impl StateError {
    fn new(path: &Path, what: impl Into<String>) -> Self {
        let user = rustix::process::geteuid().as_raw();
        let remedy = format!("give uid {user} a directory of its own with mode 0700, and name it with keyring.state");
        Self { path: path.to_owned(), what: what.into(), remedy, is_forbidden: false, is_disk: false }
    }

    fn io(path: &Path, what: &str, cause: &io::Error) -> Self {
        let is_forbidden = cause.kind() == io::ErrorKind::PermissionDenied;
        let error = Self { is_forbidden, ..Self::new(path, format!("{what}: {cause}")) };
        match disk::remedy(cause) {
            Some(remedy) => Self { remedy: remedy.into(), is_disk: true, ..error },
            None => error,
        }
    }

    fn damaged(path: &Path, cause: impl fmt::Display) -> Self {
        let remedy = "bring the file back from a backup, or remove it if this host may forget what it says".into();
        Self { remedy, ..Self::new(path, format!("cannot be read: {cause}")) }
    }

    /// What to do about it.
    #[must_use]
    pub fn remedy(&self) -> &str {
        &self.remedy
    }
}

impl State {
    /// Opens the directory, and makes it (0700) where it is missing. A full or read-only disk must not keep a host from
    /// booting: the log says of it what is said of one that takes nothing later on.
    ///
    /// # Errors
    /// It cannot be made or written for another reason, or belongs to, or can be written by, others.
    pub fn open(directory: &Path) -> Result<Self, StateError> {
        let state = Self { directory: directory.to_owned(), remembered: Mutex::default() };
        match state.check() {
            Err(error) if !error.is_disk => return Err(error),
            Err(error) => tracing::error!(%error, "state cannot be kept on disk; it is kept in memory"),
            Ok(()) => (),
        }
        Ok(state)
    }

    /// Where it is.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Whether the directory can be used.
    ///
    /// # Errors
    /// Why not.
    pub fn check(&self) -> Result<(), StateError> {
        let directory = self.directory.as_path();
        let failed = |what| move |cause| StateError::io(directory, what, &cause);
        DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(failed("cannot be made"))?;
        let metadata = fs::metadata(directory).map_err(failed("cannot be read"))?;
        let (mode, user) = (metadata.mode(), rustix::process::geteuid());
        // Root works beside the daemon's user, and for it.
        if !user.is_root() && metadata.uid() != user.as_raw() {
            return Err(StateError::new(directory, format!("belongs to uid {}", metadata.uid())));
        }
        if mode & 0o022 != 0 {
            let what = format!("can be changed by others: its mode is {:04o}", mode & 0o7777);
            return Err(StateError::new(directory, what));
        }
        self.lock_directory().map(drop).map_err(failed("cannot be written"))
    }

    /// The reference of a KEK that was seen before.
    ///
    /// # Errors
    /// There is one, and it is damaged.
    pub fn reference(&self, identity: Identity) -> Result<Option<Reference>, StateError> {
        if let Some(reference) = lock(&self.remembered).references.get(&identity) {
            return Ok(Some(reference.clone()));
        }
        let reference: Option<Reference> = self.read(&reference_file(identity))?;
        if let Some(reference) = &reference {
            lock(&self.remembered).references.insert(identity, reference.clone());
        }
        Ok(reference)
    }

    /// Keeps the reference of a KEK that is seen for the first time. If another process was first, its reference is
    /// the one that stays, and is returned.
    ///
    /// # Errors
    /// Another process left a damaged one.
    pub fn keep_reference(&self, identity: Identity, reference: Reference) -> Result<Reference, StateError> {
        let name = reference_file(identity);
        let kept = self.locked(|| match self.read(&name) {
            Ok(None) => self.write(&name, &reference).map(|()| Ok(reference.clone())),
            Ok(Some(first)) => Ok(Ok(first)),
            Err(damaged) => Ok(Err(damaged)),
        });
        let reference = kept.unwrap_or(Ok(reference))?;
        lock(&self.remembered).references.insert(identity, reference.clone());
        Ok(reference)
    }

    /// Every mark that this host has made.
    ///
    /// # Errors
    /// Their file is damaged.
    pub fn marks(&self) -> Result<Vec<Mark>, StateError> {
        let mut remembered = lock(&self.remembered);
        if let Some(marks) = &remembered.marks {
            return Ok(marks.clone());
        }
        let marks: Vec<Mark> = self.read(MARKS_FILE)?.unwrap_or_default();
        remembered.marks = Some(marks.clone());
        Ok(marks)
    }

    /// Replaces the marks: at once in memory, soon on the disk, which must not hold up who serves.
    pub fn set_marks(self: &Arc<Self>, marks: Vec<Mark>) {
        lock(&self.remembered).marks = Some(marks);
        self.soon(Self::write_marks);
    }

    /// Has a thread of its own write. What the disk does not take is kept in memory.
    fn soon(self: &Arc<Self>, write: impl FnOnce(&Self) + Send + 'static) {
        let state = Arc::clone(self);
        if let Err(error) = std::thread::Builder::new().name("state".into()).spawn(move || write(&state)) {
            tracing::error!(directory = %self.directory.display(), %error, "state cannot be kept on disk; it is kept in memory");
        }
    }

    /// Whichever thread comes last writes the newest marks.
    fn write_marks(&self) {
        let _logged = self.locked(|| {
            let marks = lock(&self.remembered).marks.clone();
            self.write(MARKS_FILE, &marks.unwrap_or_default())
        });
    }

    /// The gaps that this host has made.
    ///
    /// # Errors
    /// Their file is damaged.
    pub fn gaps(&self) -> Result<Vec<Gap>, StateError> {
        Ok(self.read(GAPS_FILE)?.unwrap_or_default())
    }

    /// Replaces the gaps, soon, on the disk. Whichever thread comes last writes the newest.
    pub fn set_gaps(self: &Arc<Self>, gaps: Vec<Gap>) {
        lock(&self.remembered).gaps = gaps;
        self.soon(|state| {
            let _logged = state.locked(|| {
                let gaps = lock(&state.remembered).gaps.clone();
                state.write(GAPS_FILE, &gaps)
            });
        });
    }

    /// Sets the next `count` wraps of a KEK aside for this process and returns how many this host had set aside
    /// before: a crash can only make the counter run ahead. `None`: the disk does not take it.
    pub fn reserve_wraps(&self, identity: Identity, count: u64) -> Option<u64> {
        let name = format!("wraps-{identity}.json");
        self.locked(|| {
            let before: u64 = self.read(&name).map_err(io::Error::other)?.unwrap_or_default();
            self.write(&name, &before.saturating_add(count))?;
            Ok(before)
        })
        .ok()
    }

    /// Runs `change` while no other process changes anything here; a failure is logged.
    fn locked<T>(&self, change: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        let changed = self.lock_directory().and_then(|_lock| change());
        changed.inspect_err(|error| {
            tracing::error!(directory = %self.directory.display(), %error, "state cannot be kept on disk; it is kept in memory");
        })
    }

    /// Holds the lock until the file is dropped.
    fn lock_directory(&self) -> io::Result<File> {
        let file = self.open_file("lock", OpenOptions::new().write(true).create(true).truncate(false))?;
        disk::lock(&file, FlockOperation::NonBlockingLockExclusive, disk::PATIENCE)?;
        Ok(file)
    }

    fn read<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>, StateError> {
        self.parse(name, self.text(name)?)
    }

    fn parse<T: DeserializeOwned>(&self, name: &str, text: Option<Vec<u8>>) -> Result<Option<T>, StateError> {
        text.map(|text| serde_json::from_slice(&text).map_err(|cause| self.damaged(name, cause))).transpose()
    }

    fn damaged(&self, name: &str, cause: impl fmt::Display) -> StateError {
        StateError::damaged(&self.directory.join(name), cause)
    }

    fn text(&self, name: &str) -> Result<Option<Vec<u8>>, StateError> {
        let mut text = Vec::new();
        match self.open_file(name, OpenOptions::new().read(true)).and_then(|mut file| file.read_to_end(&mut text)) {
            Ok(_) => Ok(Some(text)),
            Err(cause) if cause.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(cause) => Err(StateError::io(&self.directory.join(name), "cannot be read", &cause)),
        }
    }

    fn write<T: Serialize>(&self, name: &str, value: &T) -> io::Result<()> {
        let aside = format!("{name}.new");
        match fs::remove_file(self.directory.join(&aside)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => (),
        }
        let mut file = self.open_file(&aside, OpenOptions::new().write(true).create_new(true))?;
        serde_json::to_writer(&mut file, value)?;
        file.write_all(b"\n")?;
        file.sync_all()?;
        fs::rename(self.directory.join(aside), self.directory.join(name))?;
        File::open(&self.directory)?.sync_all()
    }

    /// Opens a plain file, made 0600 and for the directory's owner. Where root works beside the daemon's user, that
    /// user must not be able to point root at another file, or to hold it up with a FIFO.
    fn open_file(&self, name: &str, options: &mut OpenOptions) -> io::Result<File> {
        let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
        let file = options.mode(0o600).custom_flags(flags.bits() as i32).open(self.directory.join(name))?;
        let metadata = file.metadata()?;
        if !metadata.is_file() || metadata.nlink() > 1 {
            return Err(io::Error::other(format!("{name} is not a plain file of its own")));
        }
        let directory = fs::metadata(&self.directory)?;
        if rustix::process::geteuid().is_root() && metadata.uid() != directory.uid() {
            std::os::unix::fs::fchown(&file, Some(directory.uid()), Some(directory.gid()))?;
        }
        Ok(file)
    }
}

/// An instant later than now was told by a clock that was ahead: it would hold something back until that comes. Whether
/// one was changed.
fn not_later_than_now<'t>(instants: impl Iterator<Item = &'t mut Timestamp>) -> bool {
    let now = Timestamp::now();
    let later = instants.filter(|at| **at > now).map(|at| *at = now);
    later.count() > 0
}

const MARKS_FILE: &str = "active.json";
const GAPS_FILE: &str = "gaps.json";

fn reference_file(identity: Identity) -> String {
    format!("reference-{identity}.json")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    const KEK: Identity = Identity::from_bytes([7; 16]);

    fn reference(fill: &str) -> Reference {
        Reference { wrapped: fill.into(), sha256: fill.into() }
    }

    #[test]
    fn what_is_kept_is_there_in_the_next_run() {
        let directory = tempfile::tempdir().unwrap();
        let mark = Mark { provider: "hsm".into(), identity: KEK, not_before: Timestamp::now(), id: "00".into() };
        let first = Arc::new(State::open(directory.path()).unwrap());
        first.set_marks(vec![mark.clone()]);
        first.write_marks(); // as its thread does
        assert_eq!(first.keep_reference(KEK, reference("aa")).unwrap(), reference("aa"));
        assert_eq!(first.reserve_wraps(KEK, 10), Some(0));

        let next = State::open(directory.path()).unwrap();
        assert_eq!(next.marks().unwrap(), [mark]);
        assert_eq!(next.keep_reference(KEK, reference("bb")).unwrap(), reference("aa"), "the first one stays");
        assert_eq!(next.reference(KEK).unwrap(), Some(reference("aa")));
        assert_eq!(next.reserve_wraps(KEK, 10), Some(10));
        assert_eq!(next.reference(Identity::from_bytes([8; 16])).unwrap(), None);
    }

    #[test]
    fn a_damaged_file_is_not_taken_for_a_missing_one() {
        for damage in ["", "[{", "{}", "\0\0\0\0"] {
            let directory = tempfile::tempdir().unwrap();
            let state = State::open(directory.path()).unwrap();
            fs::write(directory.path().join(reference_file(KEK)), damage).unwrap();
            assert!(state.reference(KEK).is_err(), "{damage}");
            let error = state.keep_reference(KEK, reference("aa")).unwrap_err();
            assert!(error.to_string().contains("reference-") && error.remedy().contains("backup"), "{error}");
            assert_eq!(state.reserve_wraps(KEK, 1), Some(0));

            fs::write(directory.path().join(MARKS_FILE), damage).unwrap();
            let error = State::open(directory.path()).unwrap().marks().unwrap_err();
            assert!(error.to_string().contains(MARKS_FILE), "{error}");
        }
    }

    #[test]
    fn what_is_not_a_plain_file_is_not_followed() {
        let directory = tempfile::tempdir().unwrap();
        let state = State::open(directory.path()).unwrap();
        let victim = directory.path().join("victim");
        fs::write(&victim, "[]").unwrap();
        let at = |name: &str| directory.path().join(name);
        std::os::unix::fs::symlink(&victim, at(MARKS_FILE)).unwrap();
        assert!(state.marks().is_err());
        fs::hard_link(&victim, at(&reference_file(KEK))).unwrap();
        assert!(state.reference(KEK).is_err());
        std::os::unix::fs::symlink(&victim, at(&format!("wraps-{KEK}.json.new"))).unwrap();
        assert_eq!(state.reserve_wraps(KEK, 1), Some(0), "the link is replaced");
        assert_eq!(fs::read(&victim).unwrap(), b"[]");
    }

    #[test]
    fn a_directory_that_others_can_write_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o777)).unwrap();
        let error = State::open(directory.path()).unwrap_err();
        assert!(error.to_string().contains("0777"), "{error}");
    }
}
