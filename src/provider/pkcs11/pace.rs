//! How a token's calls fare: how long they take of late, and whether any still returns.

use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use crate::sync::lock;

/// What a quick job takes on average, at most. To have a worker do it costs some 50 µs of CPU.
const QUICK: Duration = Duration::from_micros(100);
/// What a job is thought to take before any has ended.
const UNKNOWN: Duration = Duration::from_millis(1);
/// Another token is asked after so many times what the slowest job of late took, within these bounds.
const PATIENCE: u32 = 4;
const LEAST_PATIENCE: Duration = Duration::from_millis(50);
const MOST_PATIENCE: Duration = Duration::from_millis(1500);
/// A job is overdue, and not only late, when its deadline has passed by so much and by twice what the slowest took.
const GRACE: Duration = Duration::from_secs(1);
/// A token lags when its last job took so many times what the quickest one's take, and so long.
const LAG: u32 = 4;
const LEAST_LAG: Duration = Duration::from_millis(20);
/// One that lags is left alone for so long: then one request shows whether it still does.
const REST: Duration = Duration::from_millis(500);
/// The slowest of so many is their 99th percentile.
const RECENT: usize = 100;

/// The jobs of one token. Shared by reference; a few stores under a lock each.
pub(super) struct Pace(Mutex<Inner>);

struct Inner {
    average: Duration,
    last: Duration,
    recent: [Duration; RECENT],
    ended: usize,
    under_way: Vec<UnderWay>,
    begun: u64,
    /// When a typical job last ended, or the first of those under way began.
    moved: Instant,
}

struct UnderWay {
    number: u64,
    deadline: Instant,
    kind: Kind,
}

/// What a job tells of the token.
#[derive(Clone, Copy)]
pub(super) struct Kind {
    /// It is one call for a request, as most are: its time tells what the next one will take.
    pub(super) is_typical: bool,
    /// A worker does it, and not the leader.
    pub(super) is_workers: bool,
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
            last: Duration::ZERO,
            recent: [Duration::ZERO; RECENT],
            ended: 0,
            under_way: Vec::new(),
            begun: 0,
            moved: Instant::now(),
        }))
    }

    /// A job goes to the token; after `deadline` nobody waits for it.
    pub(super) fn begin(&self, deadline: Instant, kind: Kind) -> Begun {
        let mut inner = self.inner();
        let begun = Begun { number: inner.begun, at: Instant::now() };
        inner.begun += 1;
        if kind.is_typical && !inner.is_awaited() {
            inner.moved = begun.at;
        }
        inner.under_way.push(UnderWay { number: begun.number, deadline, kind });
        begun
    }

    /// It has come back. `has_run`: the token did it.
    pub(super) fn end(&self, Begun { number, at }: Begun, has_run: bool) {
        let mut inner = self.inner();
        let Some(place) = inner.under_way.iter().position(|job| job.number == number) else { return };
        let UnderWay { deadline, kind, .. } = inner.under_way.swap_remove(place);
        if !(kind.is_typical && has_run) {
            return;
        }
        let now = Instant::now();
        inner.moved = now;
        let took = now.saturating_duration_since(at);
        inner.last = took;
        // A job that was only preempted once must not make the token slow.
        let counted = took.min(inner.average.max(QUICK) * 4);
        inner.average = inner.average * 7 / 8 + counted / 8;
        // One that hung tells nothing of the next.
        if now <= deadline {
            let place = inner.ended % RECENT;
            if let Some(oldest) = inner.recent.get_mut(place) {
                *oldest = took;
            }
            inner.ended += 1;
        }
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

    /// Whether it was much slower a moment ago than one whose jobs take `quickest` on average. The last job alone tells,
    /// so that one that is well again is used again at once; and a quick one that was only preempted rests, at most.
    pub(super) fn lags(&self, quickest: Duration) -> bool {
        let inner = self.inner();
        inner.last > (quickest * LAG).max(LEAST_LAG) && (inner.is_awaited() || inner.moved.elapsed() < REST)
    }

    /// How long to wait for the token before another one is asked.
    pub(super) fn patience(&self) -> Duration {
        self.inner().patience()
    }

    /// For how long nothing has come back, if that is longer than it should be.
    pub(super) fn hung_for(&self) -> Option<Duration> {
        let inner = self.inner();
        let still = inner.moved.elapsed();
        (inner.is_awaited() && still > inner.patience().max(inner.slowest() * 2)).then_some(still)
    }

    /// Jobs that have begun and not ended.
    pub(super) fn under_way(&self) -> usize {
        self.inner().under_way.len()
    }

    /// Workers' jobs that are long overdue.
    pub(super) fn stuck(&self) -> usize {
        let inner = self.inner();
        let grace = GRACE.max(inner.slowest() * 2);
        let is_stuck = |job: &&UnderWay| job.kind.is_workers && job.deadline.elapsed() > grace;
        inner.under_way.iter().filter(is_stuck).count()
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        lock(&self.0)
    }
}

impl Inner {
    fn is_awaited(&self) -> bool {
        self.under_way.iter().any(|job| job.kind.is_typical)
    }

    fn slowest(&self) -> Duration {
        self.recent.iter().max().copied().unwrap_or_default()
    }

    fn patience(&self) -> Duration {
        (self.slowest() * PATIENCE).clamp(LEAST_PATIENCE, MOST_PATIENCE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TYPICAL: Kind = Kind { is_typical: true, is_workers: true };

    #[test]
    fn a_token_is_hung_while_nothing_comes_back_and_a_job_is_stuck_once_it_is_long_overdue() {
        let pace = Pace::new();
        let soon = Instant::now() + Duration::from_secs(60);
        let look = pace.begin(soon, Kind { is_typical: false, ..TYPICAL });
        lock(&pace.0).moved -= LEAST_PATIENCE * 2;
        assert!(pace.hung_for().is_none(), "a look is many calls");
        let call = pace.begin(soon, TYPICAL);
        assert!(pace.hung_for().is_none(), "it has only just begun");
        lock(&pace.0).moved -= LEAST_PATIENCE * 2;
        assert!(pace.hung_for().is_some() && pace.stuck() == 0);
        let late = pace.begin(Instant::now() - GRACE / 2, TYPICAL);
        let overdue = pace.begin(Instant::now() - GRACE * 2, TYPICAL);
        let leaders = pace.begin(Instant::now() - GRACE * 2, Kind { is_workers: false, ..TYPICAL });
        assert!(pace.hung_for().is_some() && pace.stuck() == 1, "another one proves nothing before it comes back");
        for job in [overdue, late, leaders] {
            pace.end(job, true);
        }
        assert!(pace.hung_for().is_none() && pace.stuck() == 0);
        pace.end(call, true);
        pace.end(look, true);
    }

    #[test]
    fn a_token_lags_behind_a_quicker_one_until_it_has_rested_and_one_job_was_quick() {
        let take = |pace: &Pace, time: Duration| {
            let begun = pace.begin(Instant::now() + Duration::from_secs(60), TYPICAL);
            pace.end(Begun { at: begun.at - time, ..begun }, true);
        };
        let ms = Duration::from_millis;
        for (took, quickest, lags) in [(200, 1, true), (15, 1, false), (200, 60, false), (200, 40, true)] {
            let pace = Pace::new();
            take(&pace, ms(took));
            assert_eq!(pace.lags(ms(quickest)), lags, "{took} ms beside {quickest} ms");
        }
        let pace = Pace::new();
        assert!(!pace.lags(ms(1)), "nothing is known of it");
        take(&pace, ms(200));
        lock(&pace.0).moved -= REST;
        assert!(!pace.lags(ms(1)), "it has rested");
        let asked = pace.begin(Instant::now() + Duration::from_secs(60), TYPICAL);
        assert!(pace.lags(ms(1)), "one job is enough to tell");
        pace.end(asked, true);
        assert!(!pace.lags(ms(1)), "it is well again");
    }

    #[test]
    fn patience_follows_the_slowest_of_the_last_hundred_that_came_in_time() {
        let pace = Pace::new();
        let take = |time: Duration, deadline: Duration| {
            let begun = pace.begin(Instant::now() + deadline, TYPICAL);
            pace.end(Begun { at: begun.at - time, ..begun }, true);
        };
        let later = Duration::from_secs(60);
        take(Duration::from_secs(30), Duration::ZERO);
        assert_eq!(pace.patience(), LEAST_PATIENCE, "it hung");
        take(Duration::from_millis(100), later);
        assert!(pace.patience() >= Duration::from_millis(400));
        take(Duration::from_secs(2), later);
        assert_eq!(pace.patience(), MOST_PATIENCE);
        for _ in 0..RECENT {
            take(Duration::from_micros(10), later);
        }
        assert_eq!(pace.patience(), LEAST_PATIENCE);
        assert!(pace.is_quick());
        pace.is_slow();
        assert!(!pace.is_quick());
    }
}
