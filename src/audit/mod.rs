//! The audit log: who had what encrypted and decrypted, under which KEKs, and what became of the keys. Append-only, one
//! line an event, each with the hash of the line before it ([`chain`]).
//!
//! Events are handed to a thread, which writes many at once and syncs as the configuration says. Where the policy is to
//! refuse what cannot be logged, a request is answered only once its line is written; where it is to count, a line that
//! the disk does not take is counted, and the gap becomes a line of its own. Other processes of this host append to the
//! same file: each holds a lock on it while it does, and goes on from the line that it finds last.

mod chain;
mod file;
mod foresee;
mod parts;

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

pub use self::chain::{Event, Flaw, Head, Peer, Verifier};
use self::file::LogFile;
pub use self::foresee::foresee;
pub use self::parts::{LONGEST_LINE, Snapshot, open_part};
use crate::config::{AuditConfig, OnFailure, Sync};
use crate::sync::lock;

/// How long events wait for others, where nobody waits for them.
const GATHER: Duration = Duration::from_millis(100);
/// How long the thread sleeps at most.
const IDLE: Duration = Duration::from_secs(3600);
/// How long whoever waits for a line waits: as long as the API server does.
const PATIENCE: Duration = Duration::from_secs(3);
/// How often the same trouble is told.
const COMPLAIN_AGAIN: Duration = Duration::from_secs(10);
/// Events that may wait: past these, the disk is too slow, and they are lost and counted.
const MOST_WAITING: usize = 100_000;
/// What is said of a line that is waited for in vain.
const SILENT_DISK: &str = "its disk does not answer";

/// The audit log of this process. Shared between threads; what is left is written when it is dropped.
pub struct Audit {
    shared: Arc<Shared>,
    writer: Option<JoinHandle<()>>,
}

struct Shared {
    on_failure: OnFailure,
    waiting: Mutex<Waiting>,
    woken: Condvar,
    /// Events that are not in the log.
    lost: AtomicU64,
    /// How often its head was gone from it.
    rewritten: AtomicU64,
    trouble: Mutex<Trouble>,
}

/// What is wrong with the log, each until it has gone well again.
#[derive(Default)]
struct Trouble {
    /// Why events were not written.
    unwritten: Option<String>,
    /// Why what was written was not synced.
    unsynced: Option<String>,
}

#[derive(Default)]
struct Waiting {
    events: Vec<Event>,
    /// Who waits until these are written.
    callers: Vec<oneshot::Sender<Result<(), String>>>,
    lost: u64,
    ended: bool,
    /// Since when the thread has been at what it took last.
    at_work: Option<Instant>,
}

impl Audit {
    /// Opens the log and starts its thread. Where what cannot be logged is counted, a file that cannot be opened is told
    /// of and tried again with the next event: a host must boot.
    ///
    /// # Errors
    /// The file cannot be opened, or its last line is none of an audit log's; there is no thread.
    pub fn open(config: &AuditConfig) -> io::Result<Self> {
        let file = match LogFile::open(config) {
            Err(error) if config.on_failure == OnFailure::Count => {
                tracing::error!(%error, "the audit log cannot be opened: events are counted until it can");
                None
            }
            file => Some(file?),
        };
        let shared = Arc::new(Shared {
            on_failure: config.on_failure,
            waiting: Mutex::default(),
            woken: Condvar::new(),
            lost: AtomicU64::default(),
            rewritten: AtomicU64::default(),
            trouble: Mutex::default(),
        });
        let of = Writer {
            shared: Arc::clone(&shared),
            config: config.clone(),
            file,
            untold: None,
            unsynced: None,
            lost: 0,
            complained: None,
        };
        let writer = thread::Builder::new().name("audit".into()).spawn(move || of.run());
        let writer = Some(writer.map_err(|error| io::Error::new(error.kind(), format!("no thread: {error}")))?);
        Ok(Self { shared, writer })
    }

    /// Hands an event over. `Ok` at once, unless what cannot be logged is to be refused: then once it is written.
    ///
    /// # Errors
    /// It could not be written, or not in time, and is to be refused.
    pub async fn record(&self, event: Event) -> Result<(), String> {
        match self.shared.on_failure {
            OnFailure::Count => {
                self.shared.hand_over(event, None);
                Ok(())
            }
            OnFailure::Refuse => self.written(event).await,
        }
    }

    /// Hands an event over and waits until it, and all before it, are written.
    ///
    /// # Errors
    /// It could not be written, or not in time.
    pub async fn written(&self, event: Event) -> Result<(), String> {
        let (caller, answer) = oneshot::channel();
        self.shared.hand_over(event, Some(caller));
        match tokio::time::timeout(PATIENCE, answer).await {
            Ok(Ok(written)) => written,
            Ok(Err(_)) => Err("too many events wait, or its thread has ended".into()),
            Err(_) => Err(SILENT_DISK.into()),
        }
    }

    /// Why a request would be refused now because it could not be logged, from how the last events fared. It gets well by
    /// itself: the thread tries again while it has something to say.
    #[must_use]
    pub fn refuses(&self) -> Option<String> {
        match self.shared.on_failure {
            OnFailure::Count => None,
            OnFailure::Refuse if self.writer.as_ref().is_none_or(JoinHandle::is_finished) => {
                Some("its thread has ended".into())
            }
            OnFailure::Refuse => self.shared.trouble(),
        }
    }

    /// How many events are not in the log because it could not be written.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.shared.lost.load(Ordering::Relaxed)
    }

    /// How often the log was found cut off or written anew by somebody else.
    #[must_use]
    pub fn rewritten(&self) -> u64 {
        self.shared.rewritten.load(Ordering::Relaxed)
    }
}

/// Events that are written together, who waits for them, and how many were lost before them.
type Batch = (Vec<Event>, Vec<oneshot::Sender<Result<(), String>>>, u64);

impl Shared {
    fn hand_over(&self, event: Event, caller: Option<oneshot::Sender<Result<(), String>>>) {
        let mut waiting = lock(&self.waiting);
        if waiting.events.len() >= MOST_WAITING {
            waiting.lost += 1;
            self.lost.fetch_add(1, Ordering::Relaxed); // the thread may hang with its disk
            return;
        }
        waiting.events.push(event);
        waiting.callers.extend(caller);
        if waiting.events.len() == 1 {
            self.woken.notify_one();
        }
    }

    /// Why the next event would not be written, as far as is known.
    fn trouble(&self) -> Option<String> {
        let waiting = lock(&self.waiting);
        if waiting.at_work.is_some_and(|since| since.elapsed() >= PATIENCE) {
            return Some(SILENT_DISK.into());
        }
        if waiting.events.len() >= MOST_WAITING {
            return Some("too many events wait".into());
        }
        drop(waiting);
        let trouble = lock(&self.trouble);
        trouble.unwritten.as_ref().or(trouble.unsynced.as_ref()).cloned()
    }

    /// Waits for events, for so long. `None`: there will be no more.
    fn next(&self, patience: Duration) -> Option<Batch> {
        let mut waiting = lock(&self.waiting);
        waiting.at_work = None;
        if waiting.events.is_empty() && !waiting.ended {
            waiting = self.woken.wait_timeout(waiting, patience).unwrap_or_else(PoisonError::into_inner).0;
        }
        if waiting.callers.is_empty() && !waiting.events.is_empty() && !waiting.ended {
            drop(waiting);
            thread::sleep(GATHER);
            waiting = lock(&self.waiting);
        }
        if waiting.events.is_empty() && waiting.ended {
            return None;
        }
        waiting.at_work = Some(Instant::now());
        let Waiting { events, callers, lost, .. } = &mut *waiting;
        Some((std::mem::take(events), std::mem::take(callers), std::mem::take(lost)))
    }
}

impl Drop for Audit {
    fn drop(&mut self) {
        lock(&self.shared.waiting).ended = true;
        self.shared.woken.notify_one();
        if self.writer.take().is_some_and(|writer| writer.join().is_err()) {
            tracing::error!("the audit log's thread failed");
        }
    }
}

/// The thread.
struct Writer {
    shared: Arc<Shared>,
    config: AuditConfig,
    file: Option<LogFile>,
    /// Since when the journal knows the head, and the disk what was written; `None`: they know the newest.
    untold: Option<Instant>,
    unsynced: Option<Instant>,
    lost: u64,
    complained: Option<Instant>,
}

impl Writer {
    fn run(mut self) {
        self.tell_head();
        loop {
            let patience = self.patience();
            let Some((events, callers, dropped)) = self.shared.next(patience) else { break };
            self.lost += dropped;
            if !events.is_empty() || self.lost > 0 {
                let written = self.write(&events);
                callers.into_iter().for_each(|caller| drop(caller.send(written.clone())));
            }
            if self.untold.is_some_and(|since| since.elapsed() >= self.config.head_every) {
                self.tell_head();
            }
        }
        if self.lost > 0 {
            drop(self.write(&[])); // the last moment for their line
        }
        if let (Some(file), true) = (&self.file, self.config.sync != Sync::Never) {
            self.unsynced = self.unsynced.filter(|_| file.sync().is_err());
        }
        self.tell_head();
    }

    /// Also the line for those that were lost before.
    fn write(&mut self, events: &[Event]) -> Result<(), String> {
        let appended = self.append(events);
        lock(&self.shared.trouble).unwritten = appended.as_ref().err().cloned();
        if let Err(error) = appended {
            self.lose(events.len() as u64);
            self.complain(&format!("the audit log cannot be written: {error}"));
            return Err(error);
        }
        self.unsynced.get_or_insert_with(Instant::now);
        self.untold.get_or_insert_with(Instant::now);
        self.lost = 0;
        self.sync_if_due()
    }

    fn append(&mut self, events: &[Event]) -> Result<(), String> {
        let file = match &mut self.file {
            Some(file) => file,
            none => none.insert(LogFile::open(&self.config).map_err(|error| error.to_string())?),
        };
        let rewritten = file.append(self.lost, events).map_err(|error| error.to_string())?;
        self.shared.rewritten.fetch_add(rewritten.into(), Ordering::Relaxed);
        Ok(())
    }

    fn lose(&mut self, events: u64) {
        self.lost += events;
        self.shared.lost.fetch_add(events, Ordering::Relaxed);
    }

    /// A disk that is full stays so for a while.
    fn complain(&mut self, what: &str) {
        if self.complained.is_none_or(|at| at.elapsed() >= COMPLAIN_AGAIN) {
            self.complained = Some(Instant::now());
            tracing::error!(lost = self.lost, "{what}");
        }
    }

    fn sync_if_due(&mut self) -> Result<(), String> {
        let (Sync::Every(interval), Some(since), Some(file)) = (self.config.sync, self.unsynced, &self.file) else {
            return Ok(());
        };
        if since.elapsed() < interval {
            return Ok(());
        }
        let synced = file.sync().map_err(|error| error.to_string());
        self.unsynced = synced.is_err().then(Instant::now);
        lock(&self.shared.trouble).unsynced = synced.as_ref().err().cloned();
        if let Err(error) = &synced {
            self.complain(&format!("the audit log cannot be synced: {error}"));
        }
        synced
    }

    /// How long the next event may be waited for: by then something else is due.
    fn patience(&mut self) -> Duration {
        drop(self.sync_if_due()); // which complains itself
        let sync = match (self.config.sync, self.unsynced) {
            (Sync::Every(interval), Some(since)) => interval.saturating_sub(since.elapsed()),
            _ => IDLE,
        };
        let head = self.untold.map_or(IDLE, |since| self.config.head_every.saturating_sub(since.elapsed()));
        let gap = if self.lost > 0 { COMPLAIN_AGAIN } else { IDLE };
        sync.min(head).min(gap).clamp(GATHER, IDLE)
    }

    /// Whoever cuts the log's end off cannot change what the journal was told.
    fn tell_head(&mut self) {
        if let Some(file) = &self.file {
            let Head { seq, hash } = file.head();
            tracing::info!(seq, hash, file = %file.path().display(), "head of the audit log");
        }
        self.untold = None;
    }
}

/// Appends one event, durably when this returns. For commands; `serve` has an [`Audit`].
///
/// # Errors
/// The log cannot be written.
pub fn append_one(config: &AuditConfig, event: Event) -> io::Result<()> {
    let mut file = LogFile::open(config)?;
    file.append(0, &[event])?;
    file.sync()
}

/// Opens the log as for an event, and leaves it.
///
/// # Errors
/// It cannot be opened.
pub fn try_open(config: &AuditConfig) -> io::Result<()> {
    LogFile::open(config).map(drop)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// The thread hangs from the first event on: nothing takes them away.
    #[test]
    fn what_no_longer_fits_is_counted_at_once() {
        let shared = Shared {
            on_failure: OnFailure::Count,
            waiting: Mutex::default(),
            woken: Condvar::new(),
            lost: AtomicU64::default(),
            rewritten: AtomicU64::default(),
            trouble: Mutex::default(),
        };
        for _ in 0..MOST_WAITING + 3 {
            shared.hand_over(Event::now("encrypt"), None);
        }
        assert_eq!(shared.lost.load(Ordering::Relaxed), 3);
        assert_eq!(shared.trouble().as_deref(), Some("too many events wait"));
        assert_eq!(shared.next(Duration::ZERO).unwrap().2, 3, "and a gap for them");
        assert_eq!(shared.trouble(), None);
        lock(&shared.waiting).at_work = Instant::now().checked_sub(PATIENCE);
        assert_eq!(shared.trouble().as_deref(), Some(SILENT_DISK), "the thread has not come back");
    }

    #[tokio::test]
    async fn what_was_lost_has_its_line_as_soon_as_the_disk_takes_one_or_at_the_end() {
        let directory = tempfile::tempdir().unwrap();
        let config = AuditConfig::of_test(directory.path(), 1 << 20);
        let file = config.file.clone();
        let audit = Audit::open(&config).unwrap();
        audit.written(Event::now("start")).await.unwrap();
        let aside = directory.path().join("aside");
        std::fs::rename(&file, &aside).unwrap();
        std::fs::create_dir(&file).unwrap(); // what cannot be opened for writing, by root either
        audit.written(Event::now("stop")).await.unwrap_err();
        std::fs::remove_dir(&file).unwrap();
        std::fs::rename(&aside, &file).unwrap();
        drop(audit);
        let text = std::fs::read_to_string(&file).unwrap();
        let last = text.lines().last().unwrap();
        assert!(last.contains("\"gap\"") && last.contains("1 events could not be written"), "{text}");
    }
}
