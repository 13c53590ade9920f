//! How a token's calls fare: how long they take of late, and whether any still returns.

use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use crate::sync::lock;

/// What a quick job takes, at most. An Encrypt is two calls. To have a worker do it costs some 50 µs of CPU, and on machines
/// that wake threads slowly, where the calls take longer too, twice that and more.
const QUICK: Duration = Duration::from_micros(200);
/// A token is quick no more when so many jobs took longer, less one for every two that did not: one in three may be
/// preempted.
const STRIKES: u32 = 4;
/// It may be quick again when the quickest of so many jobs was. The others may have waited for each other: for the cores,
/// or for the library's own locks.
const TRIAL: u32 = 16;
/// After it was called quick for less than this it is thought slow for so long, and twice as long each time that happens
/// again.
const SHORT: Duration = Duration::from_millis(100);
const LEAST_SLOW: Duration = Duration::from_millis(5);
const MOST_SLOW: Duration = Duration::from_secs(1);
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
    quick: Quick,
    average: Duration,
    last: Duration,
    recent: [Duration; RECENT],
    ended: usize,
    under_way: Vec<UnderWay>,
    begun: u64,
    /// A later typical job than all below this number has come back: what still hangs of those is not waited for.
    overtaken: u64,
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
    /// Of the queue, when its session was opened, or would have been.
    pub(super) round: u64,
}

/// A job that was begun.
pub(super) struct Begun {
    number: u64,
    at: Instant,
}

impl Pace {
    pub(super) fn new() -> Self {
        Self(Mutex::new(Inner {
            quick: Quick::new(Instant::now()),
            average: UNKNOWN,
            last: Duration::ZERO,
            recent: [Duration::ZERO; RECENT],
            ended: 0,
            under_way: Vec::new(),
            begun: 0,
            overtaken: 0,
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
        inner.overtaken = inner.overtaken.max(number + 1);
        let took = now.saturating_duration_since(at);
        inner.last = took;
        inner.quick.took(took, now);
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
        self.inner().quick.is_quick
    }

    /// It is not as quick as it was thought.
    pub(super) fn is_slow(&self) {
        let mut inner = self.inner();
        inner.average = UNKNOWN;
        inner.quick.turn(false, Instant::now());
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
        inner.silent_for().filter(|_| inner.is_awaited())
    }

    /// Whether nothing has come back for long, asked for or not.
    pub(super) fn is_silent(&self) -> bool {
        self.inner().silent_for().is_some()
    }

    /// Jobs that have begun and not ended.
    pub(super) fn under_way(&self) -> usize {
        self.inner().under_way.len()
    }

    /// Workers' jobs that are long overdue.
    pub(super) fn stuck(&self) -> usize {
        self.inner().overdue(|job| job.kind.is_workers)
    }

    /// Jobs that are long overdue, of this round or of all; the leader's among them.
    pub(super) fn overdue(&self, round: Option<u64>) -> usize {
        self.inner().overdue(|job| round.is_none_or(|round| job.kind.round == round))
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        lock(&self.0)
    }
}

/// Whether a token answers sooner than a thread is woken.
struct Quick {
    is_quick: bool,
    since: Instant,
    /// How long it is thought slow.
    slow_for: Duration,
    /// While it is quick: two for each job that took longer, less one for each that did not.
    strikes: u32,
    /// While it is slow: jobs that have ended, and the least that one took.
    ended: u32,
    least: Duration,
}

impl Quick {
    const fn new(now: Instant) -> Self {
        let (strikes, ended, least) = (0, 0, Duration::MAX);
        Self { is_quick: false, since: now, slow_for: Duration::ZERO, strikes, ended, least }
    }

    fn took(&mut self, took: Duration, now: Instant) {
        if self.is_quick {
            self.strikes = if took < QUICK { self.strikes.saturating_sub(1) } else { self.strikes + 2 };
            if self.strikes >= 2 * STRIKES {
                self.turn(false, now);
            }
            return;
        }
        self.ended = self.ended.saturating_add(1);
        self.least = self.least.min(took);
        if self.ended >= TRIAL && now.saturating_duration_since(self.since) >= self.slow_for {
            if self.least < QUICK {
                self.turn(true, now);
            } else {
                (self.ended, self.least) = (0, Duration::MAX);
            }
        }
    }

    fn turn(&mut self, is_quick: bool, now: Instant) {
        let slow_for = match (self.is_quick, is_quick) {
            (true, false) if now.saturating_duration_since(self.since) < SHORT => {
                (self.slow_for * 2).clamp(LEAST_SLOW, MOST_SLOW)
            }
            (true, false) => Duration::ZERO,
            _ => self.slow_for,
        };
        *self = Self { is_quick, slow_for, ..Self::new(now) };
    }
}

impl Inner {
    /// Whether an answer would tell how the token is.
    fn is_awaited(&self) -> bool {
        self.under_way.iter().any(|job| job.kind.is_typical && job.number >= self.overtaken)
    }

    fn overdue(&self, counts: impl Fn(&UnderWay) -> bool) -> usize {
        let grace = GRACE.max(self.slowest() * 2);
        self.under_way.iter().filter(|job| counts(job) && job.deadline.elapsed() > grace).count()
    }

    fn silent_for(&self) -> Option<Duration> {
        let still = self.moved.elapsed();
        (still > self.patience().max(self.slowest() * 2)).then_some(still)
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

    const TYPICAL: Kind = Kind { is_typical: true, is_workers: true, round: 0 };

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
        pace.end(late, true);
        lock(&pace.0).moved -= LEAST_PATIENCE * 2;
        assert!(pace.hung_for().is_some(), "a later one is awaited");
        for job in [overdue, leaders] {
            pace.end(job, true);
        }
        lock(&pace.0).moved -= LEAST_PATIENCE * 2;
        assert!(pace.hung_for().is_none() && pace.is_silent(), "the first still hangs, and the token is well");
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
    }

    #[test]
    fn a_token_is_quick_as_long_as_most_jobs_are_and_again_when_one_of_many_was() {
        let (us, ms) = (Duration::from_micros, Duration::from_millis);
        let start = Instant::now();
        let mut quick = Quick::new(start);
        let mut take = |at: Duration, jobs: &[u64]| {
            jobs.iter().for_each(|took| quick.took(us(*took), start + at));
            quick.is_quick
        };
        assert!(!take(ms(0), &[20; 15]), "little is known yet");
        assert!(take(ms(0), &[20]));
        assert!(take(ms(60), &[20, 20, 900].repeat(100)), "one in three is preempted");
        assert!(!take(ms(70), &[900; 4]));
        assert!(!take(ms(74), &[20; 100]), "for 5 ms, since it was quick for so short a time");
        assert!(take(ms(75), &[20]));
        assert!(!take(ms(76), &[900; 4]));
        assert!(!take(ms(85), &[20; 100]), "for 10 ms the second time");
        assert!(take(ms(86), &[20]));
        assert!(!take(ms(1200), &[900; 4]));
        assert!(!take(ms(1200), &[400; 200]), "none is quick");
        assert!(!take(ms(1200), &[400; 7]));
        assert!(take(ms(1200), &[60]), "the others waited for each other");
    }
}
