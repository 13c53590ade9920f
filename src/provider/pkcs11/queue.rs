//! The bounded queue between async callers and the worker threads of one token.
//!
//! It is ours because a request that is cancelled, or whose deadline passes while it waits, must free its place at
//! once: that takes a removal from the middle, which channels do not have.

use crate::sync::lock;
use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Jobs in the order they came. Shared by reference; all methods may be called from any thread.
pub(super) struct Queue<J> {
    inner: Mutex<Inner<J>>,
    arrived: Condvar,
    /// A new round, or the end.
    turned: Condvar,
    capacity: usize,
}

struct Inner<J> {
    jobs: VecDeque<(Ticket, J)>,
    next_ticket: u64,
    round: u64,
    closed: bool,
    /// Jobs, of those that wait, that somebody else will come for with [`Queue::try_next`]: no worker takes the last so many.
    promised: usize,
    /// Workers that wait: to wake one is a system call, which nobody needs while all are at work.
    idle: usize,
}

/// Names a job for as long as it waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ticket(u64);

/// What a worker gets.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Next<J> {
    /// The oldest job, and its ticket.
    Job(Ticket, J),
    /// What the workers hold is of an earlier round: give it up. The new round's number.
    Round(u64),
    /// No job will come any more.
    Closed,
}

impl<J> Queue<J> {
    pub(super) fn new(capacity: usize) -> Self {
        let inner = Inner {
            jobs: VecDeque::with_capacity(capacity),
            next_ticket: 0,
            round: 0,
            closed: false,
            promised: 0,
            idle: 0,
        };
        Self { inner: Mutex::new(inner), arrived: Condvar::new(), turned: Condvar::new(), capacity }
    }

    /// Adds a job at the end, for a worker ([`Queue::wake`]) or for whoever promises to come ([`Queue::promise`]), and
    /// returns how many wait before it. Hands it back when the queue is full or closed.
    pub(super) fn push(&self, job: J) -> Result<(Ticket, usize), J> {
        let mut inner = self.lock();
        if inner.closed || inner.jobs.len() >= self.capacity {
            return Err(job);
        }
        let ticket = Ticket(inner.next_ticket);
        inner.next_ticket += 1;
        let before = inner.jobs.len();
        inner.jobs.push_back((ticket, job));
        Ok((ticket, before))
    }

    /// How many wait.
    pub(super) fn len(&self) -> usize {
        self.lock().jobs.len()
    }

    /// Somebody will come for one job: [`Queue::keeps_promise`].
    pub(super) fn promise(&self) {
        self.lock().promised += 1;
    }

    /// Whoever promised to come is there, or will not come.
    pub(super) fn keeps_promise(&self) {
        let mut inner = self.lock();
        inner.promised = inner.promised.saturating_sub(1);
    }

    /// Nobody comes of those who promised to: all that waits is the workers'.
    pub(super) fn breaks_promises(&self) {
        let mut inner = self.lock();
        inner.promised = 0;
        self.wake_for_all(inner);
    }

    /// Has a worker see to what waits, if one is idle.
    pub(super) fn wake(&self) {
        let somebody_waits = self.lock().idle > 0;
        if somebody_waits {
            self.arrived.notify_one();
        }
    }

    /// Has a worker see to each job that is promised to nobody, as far as there are idle ones.
    fn wake_for_all(&self, inner: MutexGuard<'_, Inner<J>>) {
        let jobs = inner.jobs.len().saturating_sub(inner.promised).min(inner.idle);
        drop(inner);
        (0..jobs).for_each(|_| self.arrived.notify_one());
    }

    /// Puts a job that was taken back into its place; the bound does not count it again.
    pub(super) fn give_back(&self, ticket: Ticket, job: J) {
        let mut inner = self.lock();
        let place = inner.jobs.partition_point(|(waiting, _)| waiting.0 < ticket.0);
        inner.jobs.insert(place, (ticket, job));
        drop(inner);
        self.wake();
    }

    /// Waits, whatever comes, until a new round, the end, or for so long.
    pub(super) fn pause(&self, round: u64, time: Duration) {
        let inner = self.lock();
        let goes_on = |inner: &mut Inner<J>| inner.round == round && !inner.closed;
        drop(self.turned.wait_timeout_while(inner, time, goes_on).unwrap_or_else(PoisonError::into_inner));
    }

    /// Takes a job back out, if no worker has begun it.
    pub(super) fn withdraw(&self, ticket: Ticket) -> Option<J> {
        let mut inner = self.lock();
        // Tickets ascend from front to back.
        let place = inner.jobs.binary_search_by_key(&ticket.0, |(waiting, _)| waiting.0).ok()?;
        inner.jobs.remove(place).map(|(_, job)| job)
    }

    /// Waits for the next job that is promised to nobody, or for a round later than the caller's. Jobs that wait come before
    /// the end.
    pub(super) fn next(&self, round: u64) -> Next<J> {
        let mut inner = self.lock();
        loop {
            let is_promised = inner.jobs.len() <= inner.promised && inner.round == round && !inner.closed;
            if let Some(next) = (!is_promised).then(|| inner.next(round, |_| true)).flatten() {
                return next;
            }
            inner.idle += 1;
            inner = self.arrived.wait(inner).unwrap_or_else(PoisonError::into_inner);
            inner.idle -= 1;
        }
    }

    /// What [`Queue::next`] would return at once, if nothing were promised and no other jobs waited than those that fit.
    ///
    /// For whoever keeps a promise by it: if nothing fits, workers may have left what waits for the sake of that promise,
    /// and nobody else would wake them.
    pub(super) fn try_next(&self, round: u64, fits: impl Fn(&J) -> bool) -> Option<Next<J>> {
        let mut inner = self.lock();
        let next = inner.next(round, fits);
        if next.is_none() {
            self.wake_for_all(inner);
        }
        next
    }

    /// The round that goes on.
    pub(super) fn round(&self) -> u64 {
        self.lock().round
    }

    /// Whether what belongs to this round is still to be kept.
    pub(super) fn goes_on(&self, round: u64) -> bool {
        let inner = self.lock();
        inner.round == round && !inner.closed
    }

    /// Begins a new round: every worker hears of it before its next job.
    pub(super) fn begin_round(&self) {
        self.lock().round += 1;
        self.turned.notify_all();
        self.arrived.notify_all();
    }

    /// Whether no further job is taken.
    pub(super) fn is_closed(&self) -> bool {
        self.lock().closed
    }

    /// No further job is taken; those that wait are still served.
    pub(super) fn close(&self) {
        self.lock().closed = true;
        self.turned.notify_all();
        self.arrived.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Inner<J>> {
        lock(&self.inner)
    }
}

impl<J> Inner<J> {
    fn next(&mut self, round: u64, fits: impl Fn(&J) -> bool) -> Option<Next<J>> {
        if self.round != round {
            return Some(Next::Round(self.round));
        }
        let place = self.jobs.iter().position(|(_, job)| fits(job));
        let job = place.and_then(|place| self.jobs.remove(place)).map(|(ticket, job)| Next::Job(ticket, job));
        job.or_else(|| self.closed.then_some(Next::Closed))
    }
}

#[cfg(test)]
#[allow(clippy::panic)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn jobs_come_in_order_within_the_bound_and_can_be_withdrawn() {
        let queue = Queue::new(3);
        let pushed = (1..=3).map(|job| queue.push(job));
        let (tickets, before): (Vec<_>, Vec<_>) = pushed.filter_map(Result::ok).unzip();
        assert_eq!(before, [0, 1, 2]);
        assert_eq!(queue.push(4), Err(4), "full");
        assert_eq!(tickets.get(1).and_then(|ticket| queue.withdraw(*ticket)), Some(2));
        assert_eq!(tickets.get(1).and_then(|ticket| queue.withdraw(*ticket)), None);
        assert!(queue.push(5).is_ok(), "the withdrawn job's place is free");
        assert!(matches!(queue.next(0), Next::Job(_, 1)));
        assert_eq!(tickets.first().and_then(|ticket| queue.withdraw(*ticket)), None, "begun");
        queue.begin_round();
        assert_eq!(queue.next(0), Next::Round(1));
        queue.close();
        assert_eq!(queue.push(6), Err(6), "closed");
        let Next::Job(ticket, 3) = queue.next(1) else { panic!("the oldest") };
        queue.give_back(ticket, 3);
        assert!(matches!(queue.next(1), Next::Job(_, 3)), "given back, it is the oldest again");
        assert!(matches!(queue.next(1), Next::Job(_, 5)));
        assert_eq!(queue.next(1), Next::Closed);
    }

    #[test]
    fn workers_leave_what_is_promised_until_nobody_comes_for_it() {
        let queue = Queue::new(3);
        std::thread::scope(|scope| {
            queue.promise();
            assert_eq!(queue.push(1).ok().map(|(_, before)| before), Some(0));
            let worker = scope.spawn(|| (queue.next(0), queue.next(0)));
            assert!(queue.push(2).is_ok());
            queue.wake();
            while queue.len() > 1 {
                std::thread::yield_now();
            }
            assert_eq!(queue.len(), 1, "one is promised");
            queue.breaks_promises();
            let Ok((Next::Job(_, 1), Next::Job(_, 2))) = worker.join() else { panic!("in their order") };
        });
        queue.promise();
        queue.keeps_promise();
        assert!(queue.push(3).is_ok());
        assert!(matches!(queue.next(0), Next::Job(_, 3)));
        assert!((4..6).all(|job| queue.push(job).is_ok()));
        assert!(matches!(queue.try_next(0, |job| job % 2 == 1), Some(Next::Job(_, 5))), "what fits is not held up");
        assert_eq!(queue.try_next(0, |job| job % 2 == 1), None);
        assert!(matches!(queue.next(0), Next::Job(_, 4)));
        queue.promise();
        queue.close();
        assert_eq!(queue.next(0), Next::Closed, "the end is not waited for");
    }

    #[test]
    fn what_a_worker_left_for_a_promise_is_its_when_that_is_kept_for_nothing() {
        let queue = Queue::new(2);
        let (taken, takes) = mpsc::channel();
        std::thread::scope(|scope| {
            queue.promise();
            assert!((1..3).all(|job| queue.push(job).is_ok()));
            scope.spawn(|| {
                while let Next::Job(_, job) = queue.next(0) {
                    let _nobody_waits = taken.send(job);
                }
            });
            // The worker takes the oldest, as it may, and leaves the other.
            while queue.lock().idle == 0 {
                std::thread::yield_now();
            }
            queue.keeps_promise();
            assert_eq!(queue.try_next(0, |job| *job == 1), None);
            let both = [(); 2].map(|()| takes.recv_timeout(Duration::from_secs(10)).ok());
            queue.close();
            assert_eq!(both, [Some(1), Some(2)]);
        });
    }

    #[test]
    fn every_waiting_worker_hears_of_a_round_and_of_the_end() {
        let queue = Queue::<()>::new(1);
        std::thread::scope(|scope| {
            let workers: Vec<_> = (0..4).map(|_| scope.spawn(|| (queue.next(0), queue.next(1)))).collect();
            queue.begin_round();
            queue.close();
            for worker in workers {
                assert_eq!(worker.join().ok(), Some((Next::Round(1), Next::Closed)));
            }
        });
    }
}
