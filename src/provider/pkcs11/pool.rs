//! The session pool: worker threads that own a session each, and the way from an async caller to them and back.
//!
//! A C call blocks and cannot be cancelled. So it runs on a thread of its own kind, its caller waits no longer than
//! its deadline, and a caller that goes away takes its place in the queue along. While the token is so quick that a
//! worker would take longer to wake, the thread that leads the runtime makes the calls, in a session of its own.

mod errands;

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use super::connection::Connected;
use super::error::{CallError, Class};
use super::job::{Call, Job};
use super::lane::Lane;
use super::link::Link;
use super::module;
use super::pace::{Kind, Pace};
use super::queue::{Next, Queue, Ticket};
use crate::config::Codes;
use crate::provider::{KekError, Times};
use crate::runtime::Leader;
use crate::state::State;

/// Places in the queue for each session: a request at the end waits as long as this many calls.
const QUEUE_PER_SESSION: usize = 64;

/// The queue of one token's workers, and what these need.
pub(super) struct Pool {
    queue: Queue<Box<dyn Job>>,
    link: Arc<Link>,
    state: Arc<State>,
    leader: Leader,
    /// The leader's own session; `None` while a call is made in it.
    leaders: Mutex<Option<Seat>>,
    pub(super) pace: Pace,
    /// Of requests' calls.
    pub(super) times: Arc<Times>,
    sessions: usize,
    /// Worker threads, those whose call does not return among them.
    workers: AtomicUsize,
    /// The token gave the last session that was asked for to nobody.
    is_starved: AtomicBool,
    /// The same, while nobody had one.
    is_barred: AtomicBool,
    codes: Codes,
}

/// The token has no session left for this worker.
struct NoSession;

/// A worker's session, and the round of the queue in which it was opened.
#[derive(Default)]
struct Seat {
    round: u64,
    lane: Option<Lane>,
    is_workers: bool,
}

impl Pool {
    pub(super) fn new(sessions: usize, link: Arc<Link>, state: Arc<State>, leader: Leader, codes: Codes) -> Self {
        Self {
            queue: Queue::new(sessions * QUEUE_PER_SESSION),
            link,
            state,
            leader,
            leaders: Mutex::new(Some(Seat::default())),
            pace: Pace::new(),
            times: Arc::default(),
            codes,
            sessions,
            workers: AtomicUsize::new(0),
            is_starved: AtomicBool::new(false),
            is_barred: AtomicBool::new(false),
        }
    }

    /// Has a worker do `work`, twice at most, and returns its answer before the deadline. `is_typical`: it is one call
    /// for a request.
    pub(super) async fn run<T, W>(self: &Arc<Self>, deadline: Instant, is_typical: bool, work: W) -> Result<T, KekError>
    where
        T: Send + 'static,
        W: FnMut(&mut Lane) -> Result<T, CallError> + Send + 'static,
    {
        self.link.check()?;
        let busy = || KekError::Busy(self.link.name.clone());
        let (job, answered) = Call::new(work, deadline, is_typical);
        let (ticket, before) = self.queue.push(job).map_err(|_| busy())?;
        let _place = Place { queue: &self.queue, ticket };
        if self.would_be_late(before, deadline) {
            return Err(busy());
        }
        if !(is_typical && self.pace.is_quick() && self.leader_will_come()) {
            self.queue.wake();
        }
        match tokio::time::timeout_at(deadline.into(), answered).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(_)) | Err(_) => Err(KekError::Deadline(self.link.name.clone())),
        }
    }

    /// Whether a job would be done too late, since others wait before it: each session has one under way, which may have
    /// just begun, then its share of those, then this one.
    fn would_be_late(&self, before: usize, deadline: Instant) -> bool {
        let calls = u32::try_from(before / self.sessions.max(1) + 2).unwrap_or(u32::MAX);
        before > 0 && Instant::now() + self.pace.average().saturating_mul(calls) > deadline
    }

    /// Requests in the queue.
    pub(super) fn waiting(&self) -> usize {
        self.queue.len()
    }

    /// Sessions by what they do; one more is the leader's.
    pub(super) fn sessions(&self) -> Vec<(&'static str, usize)> {
        let (busy, stuck) = (self.pace.under_way(), self.pace.stuck());
        let open = self.link.lanes().unwrap_or_default();
        vec![("busy", busy.saturating_sub(stuck)), ("stuck", stuck), ("idle", open.saturating_sub(busy))]
    }

    /// Worker threads at most, those whose call does not return among them.
    ///
    /// When all of them hang the process leaves: two lots of calls must have hung one after the other, each for its
    /// caller's deadline and a second more. That is eight seconds with deadlines of three, and twelve when one of the
    /// keyring's own calls is among them, which have ten. To leave after the first lot would take five, and would be wrong
    /// with every HSM that says nothing for a few seconds while another one takes over, and then answers. Callers gain
    /// nothing by it either: Status tells of the hang within two seconds.
    pub(super) fn most_workers(&self) -> usize {
        2 * self.sessions
    }

    /// Workers that are to be started, so that as many are at work as there should be.
    pub(super) fn missing_workers(&self) -> usize {
        if self.is_closed() {
            return 0;
        }
        let workers = self.workers.load(Ordering::Relaxed);
        let wanted = (self.sessions + self.pace.stuck()).min(self.most_workers());
        wanted.saturating_sub(workers)
    }

    /// Whether no worker is left whose call returns, and none may be added, or would be given a session.
    pub(super) fn is_hopeless(&self) -> bool {
        // A connection's sessions are those of its round; calls of an earlier one may hang for ever beside them.
        let nobody_calls = |lanes| lanes == 0 || self.pace.overdue(Some(self.queue.round())) >= lanes;
        let is_starved = self.pace.overdue(None) > 0
            && self.is_starved.load(Ordering::Relaxed)
            && self.link.lanes().is_none_or(nobody_calls);
        (is_starved || self.pace.stuck() >= self.most_workers()) && self.pace.is_silent()
    }

    /// A new connection has got a session: whether others get theirs is to be seen.
    pub(super) fn is_not_starved(&self) {
        self.is_starved.store(false, Ordering::Relaxed);
        self.is_barred.store(false, Ordering::Relaxed);
    }

    /// Whether nobody has a session, and the last one who asked was given none.
    pub(super) fn has_no_session(&self) -> bool {
        self.is_barred.load(Ordering::Relaxed) && self.link.lanes() == Some(0)
    }

    /// Gives up a connection that gives nobody a session: its library may keep those that were lost until C_Finalize. That
    /// is tried now and then, since others may have them.
    pub(super) fn gives_up_without_a_session(&self) {
        let Some(connected) = self.link.connected() else { return };
        if connected.wants_its_library_anew() {
            let error = CallError::new(Class::Session, "nobody has a session, and none is given");
            self.is_lost(&connected, &error, Class::Session);
        }
    }

    /// Answers what waits, when no worker will.
    pub(super) fn refuse_all(&self) {
        while let Some(Next::Job(_, mut job)) = self.queue.try_next(self.queue.round(), |_| true) {
            if let Err(error) = self.link.check() {
                job.refuse(error);
            }
            job.deliver();
        }
    }

    /// A worker thread was started.
    pub(super) fn worker_comes(&self) {
        self.workers.fetch_add(1, Ordering::Relaxed);
    }

    /// What a worker thread does until the pool is closed, or others do its work.
    pub(super) fn work(&self) {
        let mut seat = Seat { is_workers: true, ..Seat::default() };
        loop {
            match self.queue.next(seat.round) {
                Next::Job(ticket, job) => {
                    let Ok(job) = self.serve(ticket, job, &mut seat) else {
                        self.make_room(seat.round);
                        continue;
                    };
                    job.deliver();
                    if self.is_replaced() {
                        break;
                    }
                }
                Next::Round(round) => seat = Seat { round, lane: None, ..seat },
                Next::Closed => break,
            }
        }
    }

    /// Whether the worker that asks was stuck, and another one has taken its place; it then counts no more.
    fn is_replaced(&self) -> bool {
        let wanted = self.sessions + self.pace.stuck();
        let one_less = |workers: usize| (workers > wanted).then(|| workers - 1);
        self.workers.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_less).is_ok()
    }

    /// Does one job, unless nobody wants it any more.
    ///
    /// # Errors
    /// There is no session for this worker, while others have theirs: the job is left to them.
    fn serve(&self, ticket: Ticket, mut job: Box<dyn Job>, seat: &mut Seat) -> Result<Box<dyn Job>, NoSession> {
        if !job.is_wanted() {
            return Ok(job);
        }
        let kind = Kind { is_typical: job.is_typical(), is_workers: seat.is_workers, round: seat.round };
        let begun = self.pace.begin(job.deadline(), kind);
        let since = Instant::now();
        let seated = self.try_twice(&mut *job, &mut seat.lane);
        self.pace.end(begun, seated.is_ok());
        if kind.is_typical && seated.is_ok() {
            self.times.queue.record(since.saturating_duration_since(job.since()));
            self.times.call.record(since.elapsed());
        }
        match seated {
            Ok(()) => Ok(job),
            Err(no_session) => {
                self.queue.give_back(ticket, job);
                Err(no_session)
            }
        }
    }

    /// Each class of failure has its one treatment here. The session of a lost connection is closed only in the round that
    /// its loss has begun, when the job has its answer: the call for it may not return.
    fn try_twice(&self, job: &mut dyn Job, lane: &mut Option<Lane>) -> Result<(), NoSession> {
        let mut again = true;
        loop {
            let open = match lane.take() {
                Some(lane) => Ok(lane),
                None => self.open(),
            };
            let attempt = match open {
                Ok(open) => job.attempt(lane.insert(open)),
                Err(error) if error.class(&self.codes) == Class::Session && self.others_have_sessions() => {
                    tracing::debug!(token = self.link.name, %error, "fewer sessions than are configured");
                    return Err(NoSession);
                }
                Err(error) => Err(error),
            };
            let Err(error) = attempt else { return Ok(()) };
            let class = error.class(&self.codes);
            let mended = match class {
                Class::Session => {
                    *lane = None;
                    true
                }
                Class::Login if again => self.log_in_again(lane),
                Class::Login | Class::Token | Class::Doubtful => {
                    if let Some(gone) = lane {
                        self.gives_up(&gone.connected, &error, class);
                    }
                    false
                }
                Class::BadInput | Class::Pin | Class::Refused => false,
                Class::Fatal => module::leave(&format_args!("{}: {error}", self.link.name)),
            };
            if !(mended && again) {
                job.refuse(error.to_kek_error(class, &self.link.name));
                return Ok(());
            }
            again = false;
        }
    }

    /// Logs in again. If that fails the connection is given up: the supervisor knows how to treat a PIN.
    fn log_in_again(&self, lane: &Option<Lane>) -> bool {
        let Some(connected) = lane.as_ref().map(|lane| Arc::clone(&lane.connected)) else { return false };
        let login = connected.log_in_again();
        if let Err(error) = &login {
            self.is_lost(&connected, error, Class::Login);
        }
        login.is_ok()
    }

    fn others_have_sessions(&self) -> bool {
        self.link.lanes().is_some_and(|lanes| lanes > 0)
    }

    fn open(&self) -> Result<Lane, CallError> {
        let lost = || CallError::new(Class::Session, "the token was lost while the request waited");
        let connected = self.link.connected().ok_or_else(lost)?;
        let opened = Lane::open(Arc::clone(&connected), Arc::clone(&self.state));
        let class = opened.as_ref().err().map(|error| error.class(&self.codes));
        let is_starved = class == Some(Class::Session);
        self.is_starved.store(is_starved, Ordering::Relaxed);
        self.is_barred.store(is_starved && connected.lanes() == 0, Ordering::Relaxed);
        // Without a lane, nobody else can say that the connection is no good.
        if let (Err(error), Some(class @ (Class::Token | Class::Doubtful | Class::Login))) = (&opened, class) {
            self.gives_up(&connected, error, class);
        }
        opened
    }

    fn gives_up(&self, connected: &Arc<Connected>, error: &CallError, class: Class) {
        if class == Class::Login {
            // Some libraries keep a lost login, or say that it is there, until C_Finalize.
            connected.wants_its_library_anew();
        }
        self.is_lost(connected, error, class);
    }

    /// Makes every worker give its session up, unless somebody else has done so.
    fn is_lost(&self, connected: &Arc<Connected>, error: &CallError, class: Class) {
        if self.link.is_lost(connected, error, class) {
            self.give_up_sessions();
        }
    }

    /// Has every worker close its session before its next job.
    pub(super) fn give_up_sessions(&self) {
        self.queue.begin_round();
        self.empty_leaders_seat();
    }

    /// Serves what waits, then ends the workers.
    pub(super) fn close(&self) {
        self.queue.close();
        self.empty_leaders_seat();
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
