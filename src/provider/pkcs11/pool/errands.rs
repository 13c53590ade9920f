//! The pool's calls that the thread which leads the runtime makes, in a session of its own.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use super::{NoSession, Pool, Seat};
use crate::provider::pkcs11::queue::Next;
use crate::runtime::{Deliver, Errand};
use crate::sync::lock;

/// How long a worker without a session leaves the jobs to those that have one.
const NO_SESSION: Duration = Duration::from_secs(5);
/// The same, while the leader makes a call in a session that may be the only one.
const LEADERS_CALL: Duration = Duration::from_millis(20);

impl Pool {
    /// Whether the thread that leads the runtime sees to the job that was just pushed.
    pub(super) fn leader_will_come(self: &Arc<Self>) -> bool {
        self.queue.promise();
        let comes = self.leader.send(Arc::clone(self) as Arc<dyn Errand>);
        if !comes {
            self.queue.keeps_promise();
        }
        comes
    }

    /// For a worker that has no session: the leader gives up its own, since it is asked only while the token is quick.
    /// The leader never takes a worker's, so the two do not take turns. If others have theirs the worker leaves the jobs to
    /// them.
    pub(super) fn make_room(&self, round: u64) {
        let leaders = lock(&self.leaders).as_mut().map(|seat| seat.lane.take());
        match leaders {
            Some(Some(lane)) => drop(lane), // calls into the module, with nothing locked
            Some(None) => self.queue.pause(round, NO_SESSION),
            None => self.queue.pause(round, LEADERS_CALL),
        }
    }

    /// By a thread of its own: whoever asks for this may not wait for a call into the module, which may not return.
    pub(super) fn empty_leaders_seat(&self) {
        let lane = lock(&self.leaders).as_mut().and_then(|seat| seat.lane.take());
        if let Some(lane) = lane {
            let _closed_here_then = thread::Builder::new().name("close".into()).spawn(move || drop(lane));
        }
    }

    /// Keeps the session for the leader's next call, unless every session was given up since.
    fn keep(&self, seat: Seat) {
        let mut leaders = lock(&self.leaders);
        let gone = if self.queue.goes_on(seat.round) {
            leaders.replace(seat) // of another thread, which led while this one was held up
        } else {
            leaders.get_or_insert_default();
            Some(seat)
        };
        drop(leaders);
        drop(gone); // calls into the module, with nothing locked
    }
}

impl Errand for Pool {
    fn run(&self) -> Option<Box<dyn Deliver>> {
        if !self.pace.is_quick() {
            self.queue.breaks_promises();
            return None;
        }
        self.queue.keeps_promise();
        let mut seat = lock(&self.leaders).take().unwrap_or_default();
        loop {
            // A look at a token is dozens of calls: those are a worker's.
            match self.queue.try_next(seat.round, |job| job.is_typical()) {
                Some(Next::Job(ticket, job)) => {
                    let job = self.serve(ticket, job, &mut seat);
                    self.keep(seat);
                    return match job {
                        Ok(job) => Some(job),
                        Err(NoSession) => {
                            self.pass_on();
                            None
                        }
                    };
                }
                Some(Next::Round(round)) => seat = Seat { round, lane: None, ..seat },
                Some(Next::Closed) => return None,
                None => {
                    self.keep(seat);
                    return None;
                }
            }
        }
    }

    fn pass_on(&self) {
        self.pace.is_slow();
        self.queue.breaks_promises();
    }
}
