//! The session pool: worker threads that own a session each, and the way from an async caller to them and back.
//!
//! A C call blocks and cannot be cancelled. So it runs on a thread of its own kind, its caller waits no longer than
//! its deadline, and a caller that goes away takes its place in the queue along.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use tokio::sync::oneshot;

use super::error::{CallError, Class};
use super::lane::Lane;
use super::queue::{Next, Queue, Ticket};
use super::token::{Condition, Token};
use crate::provider::KekError;

/// Places in the queue for each session: a request at the end waits as long as this many calls.
const QUEUE_PER_SESSION: usize = 64;

/// The queue of one token's workers.
pub(super) struct Pool {
    queue: Queue<Box<dyn Job>>,
    closed: AtomicBool,
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
        Self { queue: Queue::new(sessions * QUEUE_PER_SESSION), closed: AtomicBool::new(false) }
    }

    /// Has a worker of `token` do `work`, twice at most, and returns its answer before the deadline.
    pub(super) async fn run<T, W>(&self, token: &Token, deadline: Instant, work: W) -> Result<T, KekError>
    where
        T: Send + 'static,
        W: FnMut(&mut Lane) -> Result<T, CallError> + Send + 'static,
    {
        match token.condition() {
            Condition::Up(_) => (),
            Condition::Connecting => {
                return Err(KekError::Unavailable(format!("{} is being connected to", token.name)));
            }
            Condition::Down(reason) => return Err(KekError::Unavailable(reason.to_string())),
        }
        let (answer, answered) = oneshot::channel();
        let job = Box::new(Call { work, deadline, answer: Some(answer) });
        let ticket = self.queue.push(job).map_err(|_| KekError::Busy(token.name.clone()))?;
        let _place = Place { queue: &self.queue, ticket };
        match tokio::time::timeout_at(deadline.into(), answered).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(_)) | Err(_) => Err(KekError::Deadline(token.name.clone())),
        }
    }

    /// What a worker thread does until the pool is closed.
    pub(super) fn work(&self, token: &Token) {
        let mut lane = None;
        let mut round = 0;
        loop {
            match self.queue.next(round) {
                Next::Job(mut job) => serve(&mut *job, &mut lane, token),
                Next::Round(begun) => {
                    round = begun;
                    lane = None;
                }
                Next::Closed => break,
            }
        }
    }

    /// Makes every worker give its session up.
    pub(super) fn begin_round(&self) {
        self.queue.begin_round();
    }

    /// Serves what waits, then ends the workers.
    pub(super) fn close(&self) {
        self.closed.store(true, Ordering::Release);
        self.queue.close();
    }

    pub(super) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
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

/// Does one job: each class of failure has its one treatment here.
fn serve(job: &mut dyn Job, lane: &mut Option<Lane>, token: &Token) {
    if !job.is_wanted() {
        return;
    }
    let mut again = true;
    loop {
        let Err(error) = attempt(job, lane, token) else { return };
        let treated = match error.class {
            Class::Session => {
                *lane = None;
                true
            }
            Class::Login => {
                let login = lane.as_ref().map(|lane| lane.connected.log_in_again());
                matches!(login, Some(Ok(())))
            }
            Class::Token | Class::Doubtful => {
                if let Some(gone) = lane.take() {
                    token.lost(&gone.connected, &error);
                }
                false
            }
            Class::BadInput | Class::Pin | Class::Refused => false,
        };
        if !(treated && again) {
            return job.refuse(error.to_kek_error(&token.name));
        }
        again = false;
    }
}

fn attempt(job: &mut dyn Job, lane: &mut Option<Lane>, token: &Token) -> Result<(), CallError> {
    let lane = match lane {
        Some(lane) => lane,
        None => lane.insert(open(token)?),
    };
    job.attempt(lane)
}

fn open(token: &Token) -> Result<Lane, CallError> {
    let Condition::Up(connected) = token.condition() else {
        return Err(CallError::new(Class::Refused, "the pool", "the token was lost"));
    };
    Lane::open(Arc::clone(&connected), Arc::clone(&token.state)).inspect_err(|error| {
        // Without a lane, nobody else can say that the connection is no good.
        if matches!(error.class, Class::Token | Class::Doubtful) {
            token.lost(&connected, error);
        }
    })
}
