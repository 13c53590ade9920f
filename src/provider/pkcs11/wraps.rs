//! Counts what a KEK wraps with random nonces. SP 800-38D section 8.3 allows 2^32 invocations of GCM for one key; a
//! host knows only its own share, so it warns and stops well before.

use std::sync::{Arc, Mutex};
use std::thread;

use super::admission::KekSpec;
use super::error::{CallError, Class};
use crate::config::Mode;
use crate::identity::Identity;
use crate::state::State;
use crate::sync::lock;

/// One host warns from here on.
const WARN_AT: u64 = 1 << 27;
/// One host wraps no more from here on.
const STOP_AT: u64 = 1 << 29;
/// Wraps that are set aside by one write to the disk. Each restart wastes two of these at most: a quarter of a million
/// restarts would bring a KEK to its stop.
const BLOCK: u64 = 1 << 10;

/// The wraps of one KEK on this host. It counts in gcm mode only.
pub(super) struct WrapCounter {
    identity: Identity,
    counts: bool,
    state: Arc<State>,
    reserved: Mutex<Reserved>,
}

/// The wraps from `next` to `end` are set aside on the disk and not yet done.
#[derive(Default)]
struct Reserved {
    next: u64,
    end: u64,
    /// Where the block after this one begins, once that is set aside.
    ahead: Option<u64>,
}

impl WrapCounter {
    pub(super) fn new(kek: &KekSpec, state: Arc<State>) -> Self {
        let reserved = Mutex::default();
        Self { identity: kek.identity, counts: kek.mode == Mode::Gcm, state, reserved }
    }

    /// Counts one wrap that is about to be done. Half-way through a block the next one is set aside on a thread of its
    /// own, since the disk must not hold up who wraps.
    ///
    /// # Errors
    /// The KEK has wrapped as often as is safe.
    pub(super) fn count(self: &Arc<Self>) -> Result<(), CallError> {
        if !self.counts {
            return Ok(());
        }
        let mut reserved = lock(&self.reserved);
        if reserved.next == reserved.end {
            let ahead = reserved.ahead.take().or_else(|| self.reserve());
            // Where the disk takes nothing, the count goes on in memory.
            let next = ahead.unwrap_or(reserved.end);
            *reserved = Reserved { next, end: next.saturating_add(BLOCK), ahead: None };
            if next >= WARN_AT {
                tracing::warn!(kek = %self.identity, wraps = next, stop = STOP_AT, "KEK wraps often: make a new one");
            }
        }
        if reserved.end - reserved.next == BLOCK / 2 {
            let counter = Arc::clone(self);
            let reserve_ahead = move || {
                let ahead = counter.reserve();
                lock(&counter.reserved).ahead = ahead;
            };
            // Without a thread, it is set aside when it is needed.
            drop(thread::Builder::new().name("state".into()).spawn(reserve_ahead));
        }
        if reserved.next >= STOP_AT {
            let what = "has wrapped as often as AES-GCM allows: make a new one with `trousseau key generate`";
            return Err(CallError::new(Class::Refused, format!("KEK {} {what}", self.identity)));
        }
        reserved.next += 1;
        Ok(())
    }

    fn reserve(&self) -> Option<u64> {
        self.state.reserve_wraps(self.identity, BLOCK)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn counter(mode: Mode, directory: &tempfile::TempDir) -> Arc<WrapCounter> {
        let identity = Identity::from_bytes([1; 16]);
        let kek = KekSpec { identity, id: vec![], label: String::new(), mode, pair: None };
        Arc::new(WrapCounter::new(&kek, Arc::new(State::open(directory.path()).unwrap())))
    }

    #[test]
    fn a_crash_makes_the_count_run_ahead_and_never_behind() {
        let directory = tempfile::tempdir().unwrap();
        for run in 0..3 {
            let counter = counter(Mode::Gcm, &directory);
            counter.count().unwrap();
            assert_eq!(counter.reserved.lock().unwrap().next, run * BLOCK + 1);
        }
    }

    #[test]
    fn every_wrap_is_set_aside_before_it_is_done() {
        let directory = tempfile::tempdir().unwrap();
        let counter = counter(Mode::Gcm, &directory);
        for n in 1..4 * BLOCK {
            counter.count().unwrap();
            if n % (BLOCK / 8) == 1 {
                let next = counter.reserved.lock().unwrap().next;
                assert!(counter.state.reserve_wraps(counter.identity, 0).unwrap() >= next, "{next}");
            }
        }
    }

    #[test]
    fn the_last_wrap_is_the_one_before_the_limit() {
        let directory = tempfile::tempdir().unwrap();
        let counter = counter(Mode::Gcm, &directory);
        counter.state.reserve_wraps(counter.identity, STOP_AT - BLOCK);
        counter.count().unwrap();
        counter.reserved.lock().unwrap().next = STOP_AT - 1;
        counter.count().unwrap();
        let error = counter.count().unwrap_err();
        assert!(error.to_string().contains("key generate"), "{error}");
    }

    #[test]
    fn other_modes_have_no_limit() {
        let directory = tempfile::tempdir().unwrap();
        let counter = counter(Mode::Wrapkey, &directory);
        counter.state.reserve_wraps(counter.identity, u64::MAX);
        counter.count().unwrap();
    }
}
