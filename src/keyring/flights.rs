//! Calls that are under way, shared by whoever asks for the same thing meanwhile.
//!
//! When API servers start, they have the same few seeds decrypted again and again. A call belongs to all that wait for
//! it: each of them drives it, so none is missed when it leaves, and the last one to leave ends it. Nothing is kept
//! after it, its answer least of all.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::future::Future;
use std::hash::Hash;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use futures_util::FutureExt;
use futures_util::future::{Shared, WeakShared};

use crate::sync::lock;

/// The calls that are under way, each with what it was asked for.
pub(super) struct Flights<Q, A: Clone>(Arc<Mutex<UnderWay<Q, A>>>);

struct UnderWay<Q, A: Clone> {
    calls: HashMap<Arc<Q>, Flight<A>>,
    /// The number of the next call.
    next: u64,
}

struct Flight<A: Clone> {
    number: u64,
    /// Held by those who wait, and by nobody else.
    call: WeakShared<Call<A>>,
    /// The latest deadline of all who have asked.
    until: Arc<Mutex<Instant>>,
}

type Call<A> = Pin<Box<dyn Future<Output = A> + Send>>;

impl<Q: Hash + Eq + Send + Sync + 'static, A: Clone + Send + Sync + 'static> Flights<Q, A> {
    pub(super) fn new() -> Self {
        Self(Arc::new(Mutex::new(UnderWay { calls: HashMap::new(), next: 0 })))
    }

    /// The call that is under way for `asked`, else a new one until `deadline`. If its answer `is_late`, while somebody
    /// who has come later has time left, the call is made once more. The future may be dropped at any time.
    pub(super) fn join<F: Future<Output = A> + Send>(
        &self,
        asked: Q,
        deadline: Instant,
        is_late: fn(&A) -> bool,
        call: impl Fn(Arc<Q>, Instant) -> F + Send + 'static,
    ) -> Shared<Call<A>> {
        let asked = Arc::new(asked);
        let mut under_way = lock(&self.0);
        let number = under_way.next;
        let entry = under_way.calls.entry(Arc::clone(&asked));
        if let Entry::Occupied(flight) = &entry
            && let Some(call) = flight.get().call.upgrade()
        {
            let mut until = lock(&flight.get().until);
            *until = deadline.max(*until);
            drop(until);
            tracing::debug!("an identical request is under way: its answer is shared");
            return call;
        }
        let until = Arc::new(Mutex::new(deadline));
        let latest = Arc::clone(&until);
        let landing = Landing { flights: Arc::clone(&self.0), asked, number };
        let call: Call<A> = Box::pin(async move {
            let landing = landing; // when there is an answer, or nobody waits for one
            loop {
                let deadline = *lock(&latest);
                let answer = call(Arc::clone(&landing.asked), deadline).await;
                if !is_late(&answer) || *lock(&latest) <= deadline {
                    return answer;
                }
            }
        });
        let call = call.shared();
        if let Some(weak) = call.downgrade() {
            entry.insert_entry(Flight { number, call: weak, until });
            under_way.next += 1;
        }
        call
    }
}

/// Ends a call's being known.
struct Landing<Q: Hash + Eq, A: Clone> {
    flights: Arc<Mutex<UnderWay<Q, A>>>,
    asked: Arc<Q>,
    number: u64,
}

impl<Q: Hash + Eq, A: Clone> Drop for Landing<Q, A> {
    fn drop(&mut self) {
        let mut under_way = lock(&self.flights);
        // Between the last one's leaving and now, another call may have taken its place.
        if let Entry::Occupied(flight) = under_way.calls.entry(Arc::clone(&self.asked))
            && flight.get().number == self.number
        {
            flight.remove();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    use futures_util::future::join_all;
    use tokio::sync::watch;

    use super::*;

    /// Counts its calls; each answers how many were made once it is let go.
    struct Token {
        flights: Flights<&'static str, usize>,
        made: Arc<AtomicUsize>,
        dropped: Arc<AtomicUsize>,
        held: watch::Sender<bool>,
    }

    impl Token {
        fn held() -> Self {
            let (made, dropped) = Default::default();
            Self { flights: Flights::new(), made, dropped, held: watch::Sender::new(true) }
        }

        fn ask(&self, what: &'static str) -> Shared<Call<usize>> {
            let (made, held, dropped) = (Arc::clone(&self.made), self.held.subscribe(), Arc::clone(&self.dropped));
            self.flights.join(
                what,
                Instant::now(),
                |_| false,
                move |_, _| {
                    let (made, mut held, dropped) = (Arc::clone(&made), held.clone(), Counts(Arc::clone(&dropped)));
                    async move {
                        let _dropped = dropped;
                        let call = 1 + made.fetch_add(1, Ordering::Relaxed);
                        drop(held.wait_for(|held| !held).await);
                        call
                    }
                },
            )
        }

        fn counts(&self) -> (usize, usize, usize) {
            let (made, dropped) = (self.made.load(Ordering::Relaxed), self.dropped.load(Ordering::Relaxed));
            (made, dropped, lock(&self.flights.0).calls.len())
        }
    }

    struct Counts(Arc<AtomicUsize>);

    impl Drop for Counts {
        fn drop(&mut self) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[tokio::test]
    async fn all_who_ask_for_the_same_share_one_call_and_nothing_is_kept_after_it() {
        let token = Token::held();
        let mut waiters: Vec<_> = (0..10).map(|_| tokio::spawn(token.ask("same"))).collect();
        waiters.push(tokio::spawn(token.ask("other")));
        tokio::task::yield_now().await;
        assert_eq!(token.counts(), (2, 0, 2));
        token.held.send_replace(false);
        let answers: Vec<_> = join_all(waiters).await.into_iter().flatten().collect();
        assert_eq!(answers, [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2]);
        assert_eq!(token.counts(), (2, 2, 0));
        assert_eq!(token.ask("same").await, 3, "an answer is not kept for the next");
    }

    #[tokio::test]
    async fn whoever_leaves_takes_nothing_from_those_who_stay() {
        let token = Token::held();
        // Whoever began, whoever drove the call last, and somebody in between.
        for leaving in 0..3 {
            token.held.send_replace(true);
            let (made, ..) = token.counts();
            let mut waiters: Vec<_> = (0..3).map(|_| tokio::spawn(token.ask("same"))).collect();
            tokio::task::yield_now().await;
            let gone = waiters.remove(leaving);
            gone.abort();
            assert!(gone.await.is_err());
            token.held.send_replace(false);
            let answers: Vec<_> = join_all(waiters).await.into_iter().flatten().collect();
            assert_eq!((answers, token.counts().0), (vec![made + 1; 2], made + 1), "number {leaving} left");
        }
    }

    #[tokio::test]
    async fn the_last_who_leaves_ends_the_call() {
        let token = Token::held();
        let (mut one, mut two) = (token.ask("same"), token.ask("same"));
        assert!((&mut one).now_or_never().is_none());
        assert!((&mut two).now_or_never().is_none());
        drop(one);
        assert_eq!(token.counts(), (1, 0, 1));
        drop(two);
        assert_eq!(token.counts(), (1, 1, 0));
        drop(token.ask("never begun"));
        assert_eq!(token.counts(), (1, 1, 0));
    }

    #[tokio::test]
    async fn a_late_answer_is_one_only_for_those_whose_time_is_up() {
        let now = Instant::now();
        let [soon, later, much_later] = [1, 2, 3].map(|seconds| now + Duration::from_secs(seconds));
        let held = watch::Sender::new(true);
        let made = Arc::new(AtomicUsize::new(0));
        let flights = Flights::new();
        // A call is late unless it has time until `much_later`.
        let ask = |deadline| {
            let (held, made) = (held.subscribe(), Arc::clone(&made));
            flights.join((), deadline, Result::is_err, move |_, deadline| {
                made.fetch_add(1, Ordering::Relaxed);
                let mut held = held.clone();
                async move {
                    drop(held.wait_for(|held| !held).await);
                    if deadline == much_later { Ok(deadline) } else { Err(deadline) }
                }
            })
        };
        let mut first = ask(soon);
        assert!((&mut first).now_or_never().is_none(), "the call is under way, until `soon`");
        let others = [much_later, later].map(&ask);
        held.send_replace(false);
        assert_eq!(first.await, Ok(much_later));
        assert_eq!(join_all(others).await, [Ok(much_later); 2]);
        assert_eq!(made.swap(0, Ordering::Relaxed), 2, "once more, for all");
        assert_eq!(ask(later).await, Err(later));
        assert_eq!(made.load(Ordering::Relaxed), 1, "nobody has time left");
    }
}
