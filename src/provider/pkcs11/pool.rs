//! The session pool: worker threads that own a session each, and the way from an async caller to them and back.
//!
//! A C call blocks and cannot be cancelled. So it runs on a thread of its own kind, its caller waits no longer than
//! its deadline, and a caller that goes away takes its place in the queue along.

use std::sync::Arc;
use std::time::Instant;

use tokio::sync::oneshot;

use super::connection::Connected;
use super::error::{CallError, Class};
use super::lane::Lane;
use super::link::Link;
use super::queue::{Next, Queue, Ticket};
use crate::provider::KekError;
use crate::state::State;

/// Places in the queue for each session: a request at the end waits as long as this many calls.
const QUEUE_PER_SESSION: usize = 64;

/// The queue of one token's workers.
pub(super) struct Pool {
    queue: Queue<Box<dyn Job>>,
}

/// Something to be done with a session.
trait Job: Send {
    /// Whether somebody still wants the answer.
    fn is_wanted(&self) -> bool;

    /// Does it. On success the answer is sent; after a failure it can be tried again, or refused.
    fn attempt(&mut self, lane: &mut Lane) -> Result<(), CallError>;

    /// Sends a failure.
    fn refuse(&mut self, error: KekError);
}

struct Call<T, W> {
    work: W,
    deadline: Instant,
    answer: Option<oneshot::Sender<Result<T, KekError>>>,
}

impl<T: Send, W: FnMut(&mut Lane) -> Result<T, CallError> + Send> Job for Call<T, W> {
    fn is_wanted(&self) -> bool {
        Instant::now() < self.deadline && self.answer.as_ref().is_some_and(|answer| !answer.is_closed())
    }

    fn attempt(&mut self, lane: &mut Lane) -> Result<(), CallError> {
        let done = (self.work)(lane)?;
        self.send(Ok(done));
        Ok(())
    }

    fn refuse(&mut self, error: KekError) {
        self.send(Err(error));
    }
}

impl<T, W> Call<T, W> {
    fn send(&mut self, answer: Result<T, KekError>) {
        if let Some(sender) = self.answer.take() {
            let _caller_gone = sender.send(answer);
        }
    }
}

impl Pool {
    pub(super) fn new(sessions: usize) -> Self {
        Self { queue: Queue::new(sessions * QUEUE_PER_SESSION) }
    }

    /// Has a worker do `work`, twice at most, and returns its answer before the deadline.
    pub(super) async fn run<T, W>(&self, link: &Link, deadline: Instant, work: W) -> Result<T, KekError>
    where
        T: Send + 'static,
        W: FnMut(&mut Lane) -> Result<T, CallError> + Send + 'static,
    {
        link.check()?;
        let (answer, answered) = oneshot::channel();
        let job = Box::new(Call { work, deadline, answer: Some(answer) });
        let ticket = self.queue.push(job).map_err(|_| KekError::Busy(link.name.clone()))?;
        let _place = Place { queue: &self.queue, ticket };
        match tokio::time::timeout_at(deadline.into(), answered).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(_)) | Err(_) => Err(KekError::Deadline(link.name.clone())),
        }
    }

    /// What a worker thread does until the pool is closed.
    pub(super) fn work(&self, link: &Link, state: &Arc<State>) {
        let mut lane = None;
        let mut round = 0;
        loop {
            match self.queue.next(round) {
                Next::Job(mut job) => self.serve(&mut *job, &mut lane, link, state),
                Next::Round(begun) => {
                    round = begun;
                    lane = None;
                }
                Next::Closed => break,
            }
        }
    }

    /// Does one job: each class of failure has its one treatment here.
    fn serve(&self, job: &mut dyn Job, lane: &mut Option<Lane>, link: &Link, state: &Arc<State>) {
        if !job.is_wanted() {
            return;
        }
        let mut again = true;
        loop {
            let Err(error) = self.attempt(job, lane, link, state) else { return };
            let mended = match error.class {
                Class::Session => {
                    *lane = None;
                    true
                }
                Class::Login if again => self.log_in_again(lane, link),
                Class::Login => false,
                Class::Token | Class::Doubtful => {
                    if let Some(gone) = lane.take() {
                        self.is_lost(link, &gone.connected, &error);
                    }
                    false
                }
                Class::BadInput | Class::Pin | Class::Refused => false,
            };
            if !(mended && again) {
                return job.refuse(error.to_kek_error(&link.name));
            }
            again = false;
        }
    }

    /// Logs in again. If that fails the connection is given up: the supervisor knows how to treat a PIN.
    fn log_in_again(&self, lane: &mut Option<Lane>, link: &Link) -> bool {
        let Some(connected) = lane.as_ref().map(|lane| Arc::clone(&lane.connected)) else { return false };
        let login = connected.log_in_again();
        if let Err(error) = &login {
            *lane = None;
            self.is_lost(link, &connected, error);
        }
        login.is_ok()
    }

    fn attempt(
        &self,
        job: &mut dyn Job,
        lane: &mut Option<Lane>,
        link: &Link,
        state: &Arc<State>,
    ) -> Result<(), CallError> {
        let lane = match lane {
            Some(lane) => lane,
            None => lane.insert(self.open(link, state)?),
        };
        job.attempt(lane)
    }

    fn open(&self, link: &Link, state: &Arc<State>) -> Result<Lane, CallError> {
        let lost = || CallError::new(Class::Session, "the token was lost while the request waited");
        let connected = link.connected().ok_or_else(lost)?;
        Lane::open(Arc::clone(&connected), Arc::clone(state)).inspect_err(|error| {
            // Without a lane, nobody else can say that the connection is no good.
            if matches!(error.class, Class::Token | Class::Doubtful) {
                self.is_lost(link, &connected, error);
            }
        })
    }

    /// Makes every worker give its session up, unless somebody else has done so.
    fn is_lost(&self, link: &Link, connected: &Arc<Connected>, error: &CallError) {
        if link.is_lost(connected, error) {
            self.queue.begin_round();
        }
    }

    /// Serves what waits, then ends the workers.
    pub(super) fn close(&self) {
        self.queue.close();
    }

    pub(super) fn is_closed(&self) -> bool {
        self.queue.is_closed()
    }
}

/// A caller's place in the queue; dropped with the caller.
struct Place<'a> {
    queue: &'a Queue<Box<dyn Job>>,
    ticket: Ticket,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        drop(self.queue.withdraw(self.ticket));
    }
}
