//! What Status says, from how the KEKs really fared: requests and the keyring's own round trips.
//!
//! Status itself costs no token call. It must be an error, and not a soft `healthz`, when Encrypt or Decrypt would
//! fail: with a soft one the API server goes on to write under an old seed for ever (kubernetes/kubernetes#138950).

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard};

use tokio::sync::Notify;

use crate::identity::Identity;
use crate::provider::KekError;
use crate::sync::lock;

/// What last went wrong with each KEK, until something goes right.
#[derive(Default)]
pub struct Health {
    faults: Mutex<BTreeMap<Identity, String>>,
    worse: Notify,
}

impl Health {
    /// Remembers how a KEK fared in a request.
    ///
    /// A damaged ciphertext proves that the KEK works. A full queue proves nothing, nor does a deadline: the client
    /// chose it.
    pub fn note<T>(&self, kek: Identity, outcome: &Result<T, KekError>) {
        match outcome {
            Ok(_) | Err(KekError::BadInput) => drop(self.faults().remove(&kek)),
            Err(KekError::Busy(_) | KekError::Deadline(_)) => (),
            Err(error) => self.fault(kek, error),
        }
    }

    /// Remembers that a KEK cannot be used.
    pub fn fault(&self, kek: Identity, error: &KekError) {
        if self.faults().insert(kek, error.to_string()).is_none() {
            self.worse.notify_one();
        }
    }

    /// Returns when something goes wrong with a KEK that was well. For one who waits.
    pub async fn worsens(&self) {
        self.worse.notified().await;
    }

    /// What is wrong with a KEK, if anything is.
    pub fn fault_of(&self, kek: Identity) -> Option<String> {
        self.faults().get(&kek).cloned()
    }

    fn faults(&self) -> MutexGuard<'_, BTreeMap<Identity, String>> {
        lock(&self.faults)
    }
}
