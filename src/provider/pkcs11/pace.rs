//! How a token's calls fare: how long they take of late, and whether any still returns.

use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use crate::sync::lock;

/// What a quick job takes on average, at most. To have a worker do it costs some 50 µs of CPU.
const QUICK: Duration = Duration::from_micros(100);
/// What a job is thought to take before any has ended.
const UNKNOWN: Duration = Duration::from_millis(1);
/// A token that is late by less than this is not called hung.
const LEAST_PATIENCE: Duration = Duration::from_millis(50);
/// A token is called hung when it takes so many times what its slowest job of late took.
const PATIENCE: u32 = 4;
/// The slowest of so many is their 99th percentile.
const RECENT: usize = 100;

/// The jobs of one token. Shared by reference; a few stores under a lock each.
pub(super) struct Pace(Mutex<Inner>);

struct Inner {
    average: Duration,
    recent: [Duration; RECENT],
    ended: usize,
    /// Jobs under way, by the instant when nobody waits for them any more.
    under_way: Vec<(u64, Instant)>,
    begun: u64,
    /// When a job last ended, or the first of those under way began.
    moved: Instant,
}

/// A job that was begun.
pub(super) struct Begun {
    number: u64,
    at: Instant,
}

impl Pace {
    pub(super) fn new() -> Self {
        Self(Mutex::new(Inner {
            average: UNKNOWN,
            recent: [Duration::ZERO; RECENT],
            ended: 0,
            under_way: Vec::new(),
            begun: 0,
            moved: Instant::now(),
        }))
    }

    /// A job goes to the token; after `deadline` nobody waits for it.
    pub(super) fn begin(&self, deadline: Instant) -> Begun {
        let mut inner = self.inner();
        let begun = Begun { number: inner.begun, at: Instant::now() };
        inner.begun += 1;
        if inner.under_way.is_empty() {
            inner.moved = begun.at;
        }
        inner.under_way.push((begun.number, deadline));
        begun
    }

    /// It has come back. `is_typical`: what it took tells what the next one will take.
    pub(super) fn end(&self, Begun { number, at }: Begun, is_typical: bool) {
        let mut inner = self.inner();
        inner.moved = Instant::now();
        let took = inner.moved - at;
        inner.under_way.retain(|(other, _)| *other != number);
        if !is_typical {
            return;
        }
        // A job that was only preempted once must not make the token slow.
        let counted = took.min(inner.average.max(QUICK) * 4);
        inner.average = inner.average * 7 / 8 + counted / 8;
        let place = inner.ended % RECENT;
        if let Some(oldest) = inner.recent.get_mut(place) {
            *oldest = took;
        }
        inner.ended += 1;
    }

    /// Whether the token answers sooner than a thread is woken.
    pub(super) fn is_quick(&self) -> bool {
        self.inner().average < QUICK
    }

    /// It is not as quick as it was thought.
    pub(super) fn is_slow(&self) {
        self.inner().average = UNKNOWN;
    }

    /// How long a job takes on average.
    pub(super) fn average(&self) -> Duration {
        self.inner().average
    }

    /// How long to wait for the token before another one is asked.
    pub(super) fn patience(&self) -> Duration {
        self.inner().patience()
    }

    /// For how long nothing has come back, if that is longer than it should be.
    pub(super) fn hung_for(&self) -> Option<Duration> {
        let inner = self.inner();
        let still = inner.moved.elapsed();
        (!inner.under_way.is_empty() && still > inner.patience()).then_some(still)
    }

    /// Jobs under way for which nobody waits any more.
    pub(super) fn stuck(&self) -> usize {
        let now = Instant::now();
        self.inner().under_way.iter().filter(|(_, deadline)| *deadline < now).count()
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        lock(&self.0)
    }
}

impl Inner {
    fn patience(&self) -> Duration {
        let slowest = self.recent.iter().max().copied().unwrap_or_default();
        (slowest * PATIENCE).max(LEAST_PATIENCE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_hung_while_nothing_comes_back_and_stuck_once_nobody_waits() {
        let pace = Pace::new();
        assert!(pace.hung_for().is_none() && !pace.is_quick());
        let soon = Instant::now() + Duration::from_secs(60);
        let call = pace.begin(soon);
        assert!(pace.hung_for().is_none(), "it has only just begun");
        lock(&pace.0).moved -= LEAST_PATIENCE * 2;
        assert!(pace.hung_for().is_some() && pace.stuck() == 0);
        let other = pace.begin(Instant::now() - Duration::from_millis(1));
        assert!(pace.hung_for().is_some() && pace.stuck() == 1, "another one proves nothing before it comes back");
        pace.end(other, true);
        assert!(pace.hung_for().is_none() && pace.stuck() == 0);
        pace.end(call, true);
    }

    #[test]
    fn patience_follows_the_slowest_of_the_last_hundred() {
        let pace = Pace::new();
        let take = |time: Duration| {
            let begun = pace.begin(Instant::now());
            pace.end(Begun { at: begun.at - time, ..begun }, true);
        };
        take(Duration::from_secs(1));
        assert!(pace.patience() >= Duration::from_secs(4));
        for _ in 0..RECENT {
            take(Duration::from_micros(10));
        }
        assert_eq!(pace.patience(), LEAST_PATIENCE);
        assert!(pace.is_quick());
        pace.is_slow();
        assert!(!pace.is_quick());
    }
}
