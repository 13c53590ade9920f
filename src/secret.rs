//! Types for bytes that must not outlive their use.
//!
//! They zeroize on drop, and have no `Display`, no `Serialize` and a redacted `Debug`. A [`Dek`] also lies in
//! memory that is locked into RAM. A seed passes through tonic's and hyper's own buffers, which nothing here can
//! lock or wipe; `SECURITY.md` says what follows from that.

use std::fmt;
use std::sync::{Mutex, Once};

use crate::sync::lock;
use zeroize::{Zeroize, Zeroizing};

/// Plaintext of a request or an answer: a seed under KMS v2. Zeroized on drop.
pub type Plaintext = Zeroizing<Vec<u8>>;

/// A data key: 256 bits, made for one Encrypt, zeroized on drop, its page locked.
pub struct Dek(Slot);

impl Dek {
    /// Bytes in a DEK.
    pub const LEN: usize = 32;

    /// A new key from getrandom(2).
    ///
    /// # Errors
    /// The operating system has no randomness to give.
    pub fn generate() -> Result<Self, getrandom::Error> {
        let mut dek = Self(take_slot());
        getrandom::fill(dek.0.as_mut_slice())?;
        Ok(dek)
    }

    /// The key that a token handed back, or `None` when it is not [`Dek::LEN`] bytes.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let mut dek = Self(take_slot());
        if bytes.len() != Self::LEN {
            return None;
        }
        dek.0.copy_from_slice(bytes);
        Some(dek)
    }

    /// The key itself.
    #[must_use]
    pub fn expose(&self) -> &[u8; Self::LEN] {
        &self.0
    }
}

impl Drop for Dek {
    fn drop(&mut self) {
        self.0.zeroize();
        give_back(std::mem::take(&mut self.0));
    }
}

impl fmt::Debug for Dek {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Dek(..)")
    }
}

/// A place for one DEK, locked when it was first made and then used again and again.
///
/// Locks count per page and not per object: unlocking one place would unlock its neighbours. So places are never
/// freed; there are as many as there were ever DEKs at one moment, which the queues bound.
type Slot = Box<[u8; Dek::LEN]>;

static FREE: Mutex<Vec<Slot>> = Mutex::new(Vec::new());

fn take_slot() -> Slot {
    let free = lock(&FREE).pop();
    free.unwrap_or_else(new_locked_slot)
}

fn give_back(slot: Slot) {
    lock(&FREE).push(slot);
}

fn new_locked_slot() -> Slot {
    let slot = Slot::default();
    match region::lock(slot.as_ptr(), Dek::LEN) {
        Ok(guard) => std::mem::forget(guard), // locked for good
        Err(error) => warn_once(&error),
    }
    slot
}

fn warn_once(error: &region::Error) {
    static WARNED: Once = Once::new();
    WARNED.call_once(|| {
        tracing::warn!(%error, "data keys cannot be locked into memory and may reach swap: raise LimitMEMLOCK");
    });
}
