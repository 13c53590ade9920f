//! Who is let in, and how many at a time: what a listener and its connections share.

use std::cmp::Reverse;
use std::collections::{BTreeSet, HashMap};
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, RwLock};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use futures_util::task::AtomicWaker;

use super::WHOLE_BY;
use crate::audit::Peer;
use crate::sync::{lock, read, write};
use crate::telemetry::Repeats;

/// Connections at a time that speak HTTP/2. An API server has one or two; a silent peer takes nobody's place.
const PLACES: usize = 256;
/// A first request comes sooner than this behind the preface, if anybody waits for its answer.
const FIRST_REQUEST: Duration = Duration::from_secs(5);

/// What a listener and its connections share.
pub(super) struct Door {
    allowed: RwLock<BTreeSet<u32>>,
    /// The places that are taken.
    taken: Mutex<Vec<Arc<Place>>>,
    repeats: Repeats,
}

/// A connection, as the others see it.
pub(super) struct Place {
    pub(super) peer: Peer,
    /// From then on no request of it can be under way, unless another one comes.
    idle_from: Mutex<Instant>,
    is_lost: AtomicBool,
    waker: AtomicWaker,
}

impl Door {
    /// Admits these users.
    pub(super) fn new(allowed: BTreeSet<u32>) -> Self {
        Self { allowed: RwLock::new(allowed), taken: Mutex::default(), repeats: Repeats::default() }
    }

    /// Admits these users from now on, and no other one that is in.
    pub(super) fn admit_only(&self, allowed: BTreeSet<u32>) {
        *write(&self.allowed) = allowed;
    }

    /// What the log was told of peers lately.
    pub(super) fn repeats(&self) -> &Repeats {
        &self.repeats
    }

    /// Whether this peer is allowed; if not, the log says so.
    pub(super) fn admits(&self, peer: Peer) -> bool {
        let is_allowed = read(&self.allowed).contains(&peer.uid);
        if !is_allowed {
            self.warn(peer, "peer is not in listen.allow-uids: closed");
        }
        is_allowed
    }

    /// The preface has come. With no place free, a connection that asks nothing loses its own, or else the newest one
    /// is ended, so that those that serve go on.
    ///
    /// # Errors
    /// It is this one that is to end.
    pub(super) fn take(&self, place: &Arc<Place>) -> io::Result<()> {
        let mut taken = lock(&self.taken);
        if taken.len() >= PLACES {
            let Some(at) = dispensable(&taken, place.peer, Instant::now()) else {
                self.warn(place.peer, &full("the newest"));
                return Err(io::ErrorKind::QuotaExceeded.into());
            };
            let lost = taken.swap_remove(at);
            self.warn(lost.peer, &full("one that asks nothing"));
            lost.is_lost.store(true, Ordering::Release);
            lost.waker.wake();
        }
        taken.push(Arc::clone(place));
        Ok(())
    }

    /// The connection has ended.
    pub(super) fn leave(&self, place: &Arc<Place>) {
        lock(&self.taken).retain(|taken| !Arc::ptr_eq(taken, place));
    }

    /// Told once and then counted: what a peer does in a loop must not fill the log.
    fn warn(&self, peer: Peer, what: &str) {
        if self.repeats.is_news(&format!("uid {}: {what}", peer.uid), Instant::now()) {
            tracing::warn!(uid = peer.uid, pid = peer.pid, "{what}");
        }
    }
}

fn full(closed: &str) -> String {
    format!("{PLACES} connections are open: {closed} is closed; see which process keeps them")
}

/// Which connection can be spared for another one of `newcomer`: of the process that has most, the one that has been
/// idle longest. Nobody takes one of a process that has fewer than itself.
fn dispensable(taken: &[Arc<Place>], newcomer: Peer, now: Instant) -> Option<usize> {
    let mut of_process: HashMap<Peer, usize> = HashMap::new();
    for place in taken {
        *of_process.entry(place.peer).or_default() += 1;
    }
    let count = |peer: Peer| of_process.get(&peer).copied().unwrap_or_default();
    let idle = taken.iter().enumerate().filter_map(|(at, place)| {
        let idle_from = *lock(&place.idle_from);
        let is_dispensable = idle_from <= now && count(place.peer) >= count(newcomer);
        is_dispensable.then(|| (count(place.peer), Reverse(idle_from), at))
    });
    idle.max().map(|(.., at)| at)
}

impl Place {
    /// Of a connection that has just been accepted.
    pub(super) fn new(peer: Peer) -> Self {
        let idle_from = Mutex::new(Instant::now() + FIRST_REQUEST);
        Self { peer, idle_from, is_lost: AtomicBool::new(false), waker: AtomicWaker::new() }
    }

    /// A request has come: it is over by [`WHOLE_BY`] at the latest.
    pub(super) fn note_request(&self) {
        *lock(&self.idle_from) = Instant::now() + WHOLE_BY;
    }

    /// Ready once somebody else has the place.
    pub(super) fn poll_lost(&self, cx: &Context<'_>) -> Poll<()> {
        self.waker.register(cx.waker());
        if self.is_lost.load(Ordering::Acquire) { Poll::Ready(()) } else { Poll::Pending }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of process `pid`, idle since so many seconds, or not for so many.
    fn place(pid: i32, idle: i64, now: Instant) -> Arc<Place> {
        let place = Place::new(Peer { pid, uid: 0 });
        let seconds = Duration::from_secs(idle.unsigned_abs());
        *lock(&place.idle_from) = if idle < 0 { now + seconds } else { now - seconds };
        Arc::new(place)
    }

    #[test]
    fn the_process_that_has_most_places_loses_the_one_that_it_uses_least() {
        let now = Instant::now() + Duration::from_secs(3600);
        for (case, taken, newcomer, spared) in [
            ("the API server asks once a minute", &[(1, 50), (2, 1), (2, 9), (2, 3)][..], 3, Some(2)),
            ("it has come back", &[(1, 50), (2, 1), (2, 9), (2, 3)], 1, Some(2)),
            ("who has most opens more", &[(1, 50), (2, 1), (2, 9)], 2, Some(2)),
            ("requests are under way on all of the others'", &[(1, 50), (2, -1), (2, -35)], 3, Some(0)),
            ("who has most opens more, with requests on all", &[(1, 50), (2, -1), (2, -35)], 2, None),
            ("requests are under way on all", &[(1, -5), (2, -1)], 3, None),
            ("each has one", &[(1, 4), (2, 5), (4, 3)], 3, Some(1)),
        ] {
            let taken: Vec<_> = taken.iter().map(|(pid, idle)| place(*pid, *idle, now)).collect();
            assert_eq!(dispensable(&taken, Peer { pid: newcomer, uid: 0 }, now), spared, "{case}");
        }
    }
}
