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
    faults: Mutex<Faults>,
    proofs: Mutex<BTreeMap<Identity, Timestamp>>,
    worse: Notify,
}

/// What is wrong with a KEK: with all that it does, or with one work that fails while the other succeeds. Each is kept
/// for itself, so that a token that was away for a moment does not make one forget what is refused, or too slow.
type Faults = BTreeMap<(Identity, Option<Work>), String>;

/// What a KEK was to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Work {
    /// [`Kek::wrap_dek`](crate::provider::Kek::wrap_dek).
    Wrap,
    /// [`Kek::unwrap_dek`](crate::provider::Kek::unwrap_dek).
    Unwrap,
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
                faults.remove(&(kek, None));
                faults.remove(&(kek, Some(work)));
            }
            Err(KekError::Busy(_) | KekError::Deadline(_) | KekError::OfOneValue(_)) => (),
            Err(error @ (KekError::Denied(_) | KekError::Refused(_))) => self.fails_at(kek, work, error),
            Err(error) => self.fault(kek, error),
        }
    }

    /// Remembers that a KEK cannot be used.
    pub fn fault(&self, kek: Identity, error: &KekError) {
        self.insert(kek, None, error);
    }

    /// Remembers that a KEK cannot be used for this: success with the other work proves nothing of it.
    pub fn fails_at(&self, kek: Identity, work: Work, error: &KekError) {
        self.insert(kek, Some(work), error);
    }

    /// Forgets what went wrong with a KEK that becomes active: nobody has seen since whether it still does. For one who
    /// waits it gets worse, since now that matters.
    pub fn begins_anew(&self, kek: Identity) {
        let mut faults = self.faults();
        let known = faults.len();
        faults.retain(|(of, _), _| *of != kek);
        let has_forgotten = faults.len() < known;
        drop(faults);
        if has_forgotten {
            self.worse.notify_one();
        }
    }

    fn insert(&self, kek: Identity, work: Option<Work>, error: &KekError) {
        let mut faults = self.faults();
        let was_well = fault_of(&faults, kek).is_none();
        faults.insert((kek, work), error.to_string());
        drop(faults);
        if was_well {
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
        fault_of(&self.faults(), kek).cloned()
    }

    fn faults(&self) -> MutexGuard<'_, Faults> {
        lock(&self.faults)
    }
}

/// What concerns all its work comes first.
fn fault_of(faults: &Faults, kek: Identity) -> Option<&String> {
    [None, Some(Work::Wrap), Some(Work::Unwrap)].iter().find_map(|work| faults.get(&(kek, *work)))
}

#[cfg(test)]
mod tests {
    use super::*;

    type Event = (Work, Result<(), KekError>);

    #[test]
    fn only_what_failed_proves_that_it_works_again() {
        use Work::{Unwrap, Wrap};
        let (done, away) = (|| Ok(()), || Err(KekError::Unavailable("away".into())));
        let denied = || Err(KekError::Denied("denied".into()));
        // (what happens to one KEK, what is then wrong with it)
        let cases: [(&[Event], Option<&str>); 8] = [
            (&[], None),
            (&[(Wrap, away())], Some("away")),
            (&[(Wrap, away()), (Unwrap, done())], None),
            (&[(Wrap, denied())], Some("denied")),
            (&[(Wrap, denied()), (Unwrap, done())], Some("denied")),
            (&[(Wrap, denied()), (Wrap, done())], None),
            (&[(Wrap, denied()), (Unwrap, away())], Some("away")),
            (&[(Wrap, denied()), (Unwrap, away()), (Unwrap, done())], Some("denied")),
        ];
        for (number, (events, wrong)) in (0..).zip(cases) {
            let (health, kek) = (Health::default(), Identity::from_bytes([number; 16]));
            events.iter().for_each(|(work, outcome)| health.note(kek, *work, outcome));
            assert_eq!(health.fault_of(kek).as_deref(), wrong, "case {number}");
            health.begins_anew(kek);
            assert_eq!(health.fault_of(kek), None, "case {number}");
        }
    }
}
