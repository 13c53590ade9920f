//! Files that are kept in memory while the disk takes nothing: without one, what was learned would be learned again, and
//! some of it costs a try at a login.

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{State, StateError};
use crate::sync::lock;

/// What a file would say if the disk had taken it, and what it says in its place.
#[derive(Clone, Debug)]
pub(super) struct Unwritten {
    on_disk: Option<Vec<u8>>,
    value: serde_json::Value,
}

impl State {
    /// Writes a file. What the disk does not take is kept in memory until it does, or until somebody else has changed
    /// the file: a disk that took that is the better witness. Whether it is on the disk.
    pub(super) fn keep<T: Serialize>(&self, name: &str, value: &T) -> bool {
        if self.locked(|| self.write(name, value)).is_ok() {
            lock(&self.remembered).unwritten.remove(name);
            return true;
        }
        let unwritten = Unwritten {
            on_disk: self.text(name).unwrap_or_default(),
            value: serde_json::to_value(value).unwrap_or_default(), // plain fields always can be
        };
        lock(&self.remembered).unwritten.insert(name.to_owned(), unwritten);
        false
    }

    /// Offers the disk once more what [`State::keep`] has in memory. Whether it took it now.
    pub(super) fn catch_up(&self, name: &str) -> bool {
        if !lock(&self.remembered).unwritten.contains_key(name) {
            return false; // as nearly always: the disk need not be asked
        }
        let Some(value) = self.text(name).ok().and_then(|on_disk| self.unwritten(name, on_disk.as_deref())) else {
            return false;
        };
        let is_written = self.lock_directory().and_then(|_lock| self.write(name, &value)).is_ok();
        if is_written {
            lock(&self.remembered).unwritten.remove(name);
        }
        is_written
    }

    /// What [`State::keep`] was given last, here or by another process.
    pub(super) fn kept<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>, StateError> {
        let on_disk = self.text(name)?;
        match self.unwritten(name, on_disk.as_deref()) {
            Some(value) => serde_json::from_value(value).map(Some).map_err(|cause| self.damaged(name, cause)),
            None => self.parse(name, on_disk),
        }
    }

    fn unwritten(&self, name: &str, on_disk: Option<&[u8]>) -> Option<serde_json::Value> {
        let mut remembered = lock(&self.remembered);
        let unwritten = remembered.unwritten.get(name)?;
        if unwritten.on_disk.as_deref() == on_disk {
            return Some(unwritten.value.clone());
        }
        remembered.unwritten.remove(name);
        None
    }
}
