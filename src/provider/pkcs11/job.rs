//! What waits in a token's queue: work to be done with a session, and the caller that waits for its answer.

use std::time::Instant;

use tokio::sync::oneshot;

use super::error::CallError;
use super::lane::Lane;
use crate::provider::KekError;
use crate::runtime::Deliver;

/// Something to be done with a session.
pub(super) trait Job: Deliver {
    /// When nobody will want the answer any more.
    fn deadline(&self) -> Instant;

    /// Since when it waits.
    fn since(&self) -> Instant;

    /// Whether somebody still wants the answer.
    fn is_wanted(&self) -> bool;

    /// Whether it is what most jobs are, one call for a request.
    fn is_typical(&self) -> bool;

    /// Does it. On success the answer is kept; after a failure it can be tried again, or refused.
    fn attempt(&mut self, lane: &mut Lane) -> Result<(), CallError>;

    /// Keeps a failure as the answer.
    fn refuse(&mut self, error: KekError);
}

/// A caller's work, and where its answer goes.
pub(super) struct Call<T, W> {
    work: W,
    since: Instant,
    deadline: Instant,
    is_typical: bool,
    answer: Option<Result<T, KekError>>,
    caller: oneshot::Sender<Result<T, KekError>>,
}

impl<T, W> Call<T, W> {
    /// The second is the caller's, to wait for the answer.
    pub(super) fn new(
        work: W,
        deadline: Instant,
        is_typical: bool,
    ) -> (Box<Self>, oneshot::Receiver<Result<T, KekError>>) {
        let (caller, answered) = oneshot::channel();
        let since = Instant::now();
        (Box::new(Self { work, since, deadline, is_typical, answer: None, caller }), answered)
    }
}

impl<T: Send, W: FnMut(&mut Lane) -> Result<T, CallError> + Send> Job for Call<T, W> {
    fn deadline(&self) -> Instant {
        self.deadline
    }

    fn since(&self) -> Instant {
        self.since
    }

    fn is_wanted(&self) -> bool {
        Instant::now() < self.deadline && !self.caller.is_closed()
    }

    fn is_typical(&self) -> bool {
        self.is_typical
    }

    fn attempt(&mut self, lane: &mut Lane) -> Result<(), CallError> {
        self.answer = Some(Ok((self.work)(lane)?));
        Ok(())
    }

    fn refuse(&mut self, error: KekError) {
        self.answer = Some(Err(error));
    }
}

impl<T: Send, W: Send> Deliver for Call<T, W> {
    fn deliver(self: Box<Self>) {
        if let Some(answer) = self.answer {
            let _caller_gone = self.caller.send(answer);
        }
    }
}
