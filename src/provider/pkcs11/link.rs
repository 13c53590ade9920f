//! What a token's threads and their callers tell each other of its connection.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;
use std::time::{Duration, Instant};

use tokio::sync::{Notify, watch};

use super::connection::Connected;
use super::error::{CallError, Class};
use crate::provider::{KekError, Losses};

/// A token from which nothing comes back for so long, or that is not there again, counts as out of reach.
pub(super) const SILENCE: Duration = Duration::from_secs(1);

/// How often one who blocks looks whether it is up.
const GLANCE: Duration = Duration::from_millis(5);

/// Whether a token can be used. Shared by its supervisor, its workers and their callers.
pub(super) struct Link {
    /// The token, as people know it.
    pub(super) name: String,
    condition: watch::Sender<Condition>,
    connections: AtomicU64,
    losses: Losses,
    supervisor: Sender<()>,
    changed: Arc<Notify>,
}

enum Condition {
    /// The first attempt, at the start or since it was last up, is under way.
    Connecting(Option<Lost>),
    Up(Arc<Connected>),
    /// It cannot be used, for this reason.
    Down(String),
}

/// When and why it was up no more.
struct Lost {
    at: Instant,
    reason: String,
}

impl Link {
    /// A link that is being connected. `changed` is told of every change; the receiver wakes the supervisor.
    pub(super) fn new(name: String, changed: Arc<Notify>) -> (Self, Receiver<()>) {
        let (supervisor, woken) = mpsc::channel();
        let condition = watch::Sender::new(Condition::Connecting(None));
        let (connections, losses) = (AtomicU64::default(), Losses::default());
        (Self { name, condition, connections, losses, supervisor, changed }, woken)
    }

    /// The connection, if there is one; for the token's own threads.
    pub(super) fn connected(&self) -> Option<Arc<Connected>> {
        match &*self.condition.borrow() {
            Condition::Up(connected) => Some(Arc::clone(connected)),
            Condition::Connecting(_) | Condition::Down(_) => None,
        }
    }

    /// Lanes of the connection that are open, if there is one. Holds none up.
    pub(super) fn lanes(&self) -> Option<usize> {
        match &*self.condition.borrow() {
            Condition::Up(connected) => Some(connected.lanes()),
            Condition::Connecting(_) | Condition::Down(_) => None,
        }
    }

    /// Whether there is a connection. Holds none up: the last holder of one closes it, which calls into the module.
    ///
    /// # Errors
    /// Why there is none.
    pub(super) fn check(&self) -> Result<(), KekError> {
        match &*self.condition.borrow() {
            Condition::Up(_) => Ok(()),
            Condition::Connecting(None) => Err(KekError::Unavailable(format!("{} is being connected to", self.name))),
            Condition::Connecting(Some(Lost { reason, .. })) | Condition::Down(reason) => {
                Err(KekError::Unavailable(reason.clone()))
            }
        }
    }

    /// How often it was connected to.
    pub(super) fn connections(&self) -> u64 {
        self.connections.load(Ordering::Relaxed)
    }

    /// How often it was lost, by the class of the failure.
    pub(super) fn losses(&self) -> Vec<(&'static str, u64)> {
        self.losses.counted()
    }

    /// Whether the first attempt to connect is under way.
    pub(super) fn is_connecting(&self) -> bool {
        matches!(&*self.condition.borrow(), Condition::Connecting(_))
    }

    /// Whether it was up a moment ago, and will be again in another.
    pub(super) fn is_coming_back(&self) -> bool {
        matches!(&*self.condition.borrow(), Condition::Connecting(Some(lost)) if lost.at.elapsed() < SILENCE)
    }

    /// Waits until the first attempt to connect has ended.
    pub(super) async fn first_attempt(&self) {
        let mut condition = self.condition.subscribe();
        drop(condition.wait_for(|condition| !matches!(condition, Condition::Connecting(_))).await);
    }

    /// Blocks until there is a connection.
    ///
    /// # Errors
    /// Why there is none after so long.
    pub(super) fn wait_until_up(&self, limit: Duration) -> Result<(), KekError> {
        let began = Instant::now();
        loop {
            match self.check() {
                Err(_) if began.elapsed() < limit => thread::sleep(GLANCE),
                answer => return answer,
            }
        }
    }

    /// The supervisor has connected.
    pub(super) fn is_up(&self, connected: Connected) {
        tracing::info!(token = self.name, "token connected");
        self.connections.fetch_add(1, Ordering::Relaxed);
        self.condition.send_replace(Condition::Up(Arc::new(connected)));
        self.changed.notify_one();
    }

    /// It cannot be used. Nobody is told the same reason twice.
    pub(super) fn is_down(&self, reason: &str) {
        let reason = format!("{} {reason}", self.name);
        let before = self.condition.send_replace(Condition::Down(reason.clone()));
        if !matches!(before, Condition::Down(known) if known == reason) {
            self.tell(&reason);
        }
    }

    /// A worker found `connected` to be gone. Returns whether it was the first to say so.
    pub(super) fn is_lost(&self, connected: &Arc<Connected>, error: &CallError, class: Class) -> bool {
        let reason = format!("{} was lost: {error}", self.name);
        let first = self.condition.send_if_modified(|condition| {
            let current = matches!(condition, Condition::Up(current) if Arc::ptr_eq(current, connected));
            if current {
                *condition = Condition::Connecting(Some(Lost { at: Instant::now(), reason: reason.clone() }));
            }
            current
        });
        if first {
            self.losses.count(class.as_str());
            self.tell(&reason);
            self.wake_supervisor();
        }
        first
    }

    /// The supervisor is about to make the connection anew, although it is well.
    pub(super) fn is_renewed(&self) {
        tracing::debug!(token = self.name, "the connection is made anew");
        let reason = format!("{} is being connected to anew", self.name);
        self.condition.send_replace(Condition::Connecting(Some(Lost { at: Instant::now(), reason })));
    }

    fn tell(&self, reason: &str) {
        tracing::error!("{reason}");
        self.changed.notify_one();
    }

    /// Has the supervisor see what has changed.
    pub(super) fn wake_supervisor(&self) {
        let _supervisor_gone = self.supervisor.send(());
    }

    /// The end: lets the connection go. By the supervisor, since the last holder of one calls into the module.
    pub(super) fn end(&self) {
        drop(self.condition.send_replace(Condition::Down(format!("{} is closed", self.name))));
    }
}
