//! The file of rules: read again whenever it has changed.

use std::ffi::OsString;
use std::fs::{File, Metadata};
use std::io::{ErrorKind, Read};
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, LazyLock, PoisonError, RwLock};
use std::{env, fs};

use crate::rules::{Action, Rules};

static PATH: LazyLock<Option<OsString>> = LazyLock::new(|| env::var_os("TROUSSEAU_FAULT_RULES"));
/// Rules that stand behind the file's, whatever it says: what the token is dressed as.
static DRESS: LazyLock<String> = LazyLock::new(|| env::var("TROUSSEAU_FAULT_DRESS").unwrap_or_default());
static SEEN: LazyLock<RwLock<Seen>> = LazyLock::new(|| RwLock::new(Seen::without_file()));

#[derive(Default)]
struct Seen {
    /// What the file looked like when it was read; `None`: it was not there.
    stamp: Option<Stamp>,
    /// The last rules that could be read.
    rules: Arc<Rules>,
    malformed: bool,
}

type Stamp = (u64, u64, i64, i64, u64);

fn stamp(file: &Metadata) -> Stamp {
    (file.dev(), file.ino(), file.mtime(), file.mtime_nsec(), file.size())
}

/// The rules that are in the file now. `None`: it cannot be understood.
pub fn current() -> Option<Arc<Rules>> {
    let path = PATH.as_ref();
    let now = path.and_then(|path| fs::metadata(path).ok()).map(|file| stamp(&file));
    let seen = SEEN.read().unwrap_or_else(PoisonError::into_inner);
    let Some(path) = path.filter(|_| seen.stamp != now) else { return seen.answer() };
    drop(seen);
    let mut seen = SEEN.write().unwrap_or_else(PoisonError::into_inner);
    seen.read(path);
    seen.answer()
}

impl Seen {
    fn without_file() -> Self {
        let mut seen = Self::default();
        let read = seen.parse("");
        seen.take(read, "TROUSSEAU_FAULT_DRESS");
        seen
    }

    fn answer(&self) -> Option<Arc<Rules>> {
        (!self.malformed).then(|| Arc::clone(&self.rules))
    }

    fn read(&mut self, path: &OsString) {
        let before = self.stamp.take();
        let read = match File::open(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => self.parse(""),
            Err(error) => Err(error.to_string()),
            Ok(mut file) => {
                let now = file.metadata().ok().map(|file| stamp(&file));
                if now == before && before.is_some() {
                    self.stamp = now; // another thread has read it
                    return;
                }
                self.stamp = now;
                let mut text = String::new();
                let read = file.read_to_string(&mut text).map_err(|error| error.to_string());
                read.and_then(|_| self.parse(&text))
            }
        };
        self.take(read, &path.to_string_lossy());
    }

    fn take(&mut self, read: Result<Rules, String>, whence: &str) {
        self.malformed = read.is_err();
        match read {
            Ok(rules) => self.rules = Arc::new(rules),
            Err(error) => eprintln!("{whence}:{error}: every call answers CKR_GENERAL_ERROR"),
        }
    }

    fn parse(&self, text: &str) -> Result<Rules, String> {
        let text = format!("{text}\n{}", *DRESS);
        let rules = Rules::parse(&text, &self.rules).map_err(|(n, error)| format!("{n}: {error}"))?;
        let counts = rules.0.iter().any(|rule| matches!(rule.action, Action::LockAfter(_)));
        match counts && env::var_os("TROUSSEAU_FAULT_PIN_COUNT").is_none() {
            true => Err(" lock-after needs TROUSSEAU_FAULT_PIN_COUNT".into()),
            false => Ok(rules),
        }
    }
}
