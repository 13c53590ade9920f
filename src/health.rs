//! What Status says, from how the KEKs really fared: requests and the keyring's own round trips.
//!
//! Status itself costs no token call. It must be an error, and not a soft `healthz`, when Encrypt or Decrypt would
//! fail: with a soft one the API server goes on to write under an old seed for ever (kubernetes/kubernetes#138950).

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard};

use jiff::Timestamp;
use tokio::sync::Notify;

use crate::identity::Identity;
use crate::provider::KekError;
use crate::sync::lock;

/// What last went wrong with each KEK, until something goes right.
#[derive(Default)]
pub struct Health {
    faults: Mutex<BTreeMap<Identity, Fault>>,
    proofs: Mutex<BTreeMap<Identity, Timestamp>>,
    worse: Notify,
}

/// What a KEK was to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// [`Kek::wrap_dek`](crate::provider::Kek::wrap_dek).
    Wrap,
    /// [`Kek::unwrap_dek`](crate::provider::Kek::unwrap_dek).
    Unwrap,
}

struct Fault {
    what: String,
    /// The work that fails, where success with the other one proves nothing of it: it is refused, or too slow.
    work: Option<Work>,
}

impl Health {
    /// Remembers how a KEK fared in a request.
    ///
    /// A damaged ciphertext proves that the KEK works. A full queue proves nothing, nor does a deadline: the client
    /// chose it. Nor what is said of one value alone: whoever stored that value could have it said again and again.
    pub fn note<T>(&self, kek: Identity, work: Work, outcome: &Result<T, KekError>) {
        match outcome {
            Ok(_) | Err(KekError::BadInput) => {
                let mut faults = self.faults();
                if faults.get(&kek).is_some_and(|fault| fault.work.is_none_or(|failed| failed == work)) {
                    faults.remove(&kek);
                }
            }
            Err(KekError::Busy(_) | KekError::Deadline(_) | KekError::OfOneValue(_)) => (),
            Err(error @ (KekError::Denied(_) | KekError::Refused(_))) => self.fails_at(kek, work, error),
            Err(error) => self.fault(kek, error),
        }
    }

    /// Remembers that a KEK cannot be used.
    pub fn fault(&self, kek: Identity, error: &KekError) {
        self.insert(kek, Fault { what: error.to_string(), work: None });
    }

    /// Remembers that a KEK cannot be used for this, whatever else works.
    pub fn fails_at(&self, kek: Identity, work: Work, error: &KekError) {
        self.insert(kek, Fault { what: error.to_string(), work: Some(work) });
    }

    fn insert(&self, kek: Identity, fault: Fault) {
        if self.faults().insert(kek, fault).is_none() {
            self.worse.notify_one();
        }
    }

    /// A KEK has wrapped and unwrapped a value of the keyring's own.
    pub fn proves(&self, kek: Identity) {
        lock(&self.proofs).insert(kek, Timestamp::now());
    }

    /// When each KEK has last done so.
    pub fn proofs(&self) -> BTreeMap<Identity, Timestamp> {
        lock(&self.proofs).clone()
    }

    /// Returns when something goes wrong with a KEK that was well. For one who waits.
    pub async fn worsens(&self) {
        self.worse.notified().await;
    }

    /// What is wrong with a KEK, if anything is.
    pub fn fault_of(&self, kek: Identity) -> Option<String> {
        self.faults().get(&kek).map(|fault| fault.what.clone())
    }

    fn faults(&self) -> MutexGuard<'_, BTreeMap<Identity, Fault>> {
        lock(&self.faults)
    }
}
