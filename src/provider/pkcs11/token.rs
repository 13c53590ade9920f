//! One token: the supervisor thread that keeps it connected, and the worker threads that use it.
//!
//! When a worker finds the connection gone, all give it up, and the supervisor makes a new one. Whoever has a request
//! done hears at once what is wrong; `kek` decides whether it waits.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender, TryRecvError};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use super::address::{Address, NotConnected};
use super::admission::Rules;
use super::connection::Connected;
use super::error::CallError;
use super::lane::Lane;
use super::link::{Link, SILENCE};
use super::module::Module;
use super::pool::Pool;
use crate::config::{Pkcs11Config, TokenUri};
use crate::provider::{KekError, Vitals};
use crate::runtime::Leader;
use crate::state::State;
use crate::sync::lock;

/// When a token that is not usable is looked at again, where that may be for a moment only: another process may be
/// writing the token's file.
const GLANCE_AGAIN: Duration = Duration::from_millis(100);
/// How often at the start: a verb has no second chance.
const GLANCES_AT_THE_START: u32 = 1;
/// How often when a connection that was well is made anew: meanwhile requests wait, and nobody is told of an outage.
const GLANCES_TO_RENEW: u32 = 8;
/// How often a token that is not there is looked for, and the workers of one that is are counted.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// The longest pause after a failed login.
const LAST_PAUSE: Duration = Duration::from_secs(5);
/// An attempt to connect that takes longer will never return.
const CONNECT_PATIENCE: Duration = Duration::from_secs(60);
/// How long a lost connection's sessions may take to be closed.
const RELEASE_PATIENCE: Duration = Duration::from_secs(1);

/// A token of the configuration, whether it is there or not.
pub(super) struct Token {
    pub(super) rules: Rules,
    pub(super) link: Arc<Link>,
    address: Address,
    pool: Arc<Pool>,
    /// Each thread holds a sender; when all are gone, so are the sessions.
    threads: Mutex<Receiver<()>>,
    /// Objects after which the module is to be initialized anew.
    renew_after: Option<u64>,
    /// Since when an attempt to connect has been under way, or failed because a call does not return: one that holds the
    /// last connection open, or one that asks a slot for its token.
    waiting_since: Mutex<Option<Instant>>,
    /// Its module was lost, and must not be initialized again.
    is_spent: AtomicBool,
    /// The last PIN was refused, and is not tried again.
    is_latched: AtomicBool,
}

/// Why a connection has ended.
#[derive(PartialEq)]
enum Gone {
    /// It was lost, or the pool is closed.
    Lost,
    /// It was well.
    ToBeRenewed,
}

impl Token {
    /// Describes a token and starts its threads. They end after [`Token::close`].
    ///
    /// # Errors
    /// The operating system gives no thread.
    pub(super) fn start(
        uri: TokenUri,
        provider: &Pkcs11Config,
        state: &Arc<State>,
        leader: &Leader,
        changed: Arc<Notify>,
    ) -> std::io::Result<Arc<Self>> {
        let (link, woken) = Link::new(format!("token {uri} of provider {}", provider.name), changed);
        let link = Arc::new(link);
        let (running, threads) = mpsc::channel();
        let token = Arc::new(Self {
            rules: Rules {
                label: provider.label.clone(),
                profile: Arc::clone(&provider.profile),
                admitted: provider.admitted.clone(),
            },
            link: Arc::clone(&link),
            address: Address::new(uri, provider, state),
            pool: Arc::new(Pool::new(
                provider.sessions,
                link,
                Arc::clone(state),
                leader.clone(),
                provider.profile.errors.clone(),
            )),
            threads: Mutex::new(threads),
            renew_after: provider.profile.renew_after,
            waiting_since: Mutex::default(),
            is_spent: AtomicBool::new(false),
            is_latched: AtomicBool::new(false),
        });
        let theirs = running.clone();
        let workers = (0..provider.sessions).try_for_each(|_| token.start_worker(&running));
        let started =
            workers.and_then(|()| token.spawn("token", &running, move |token| token.supervise(&woken, &theirs)));
        // Those that were started would hold it for ever.
        started.inspect_err(|_| token.pool.close())?;
        Ok(token)
    }

    fn start_worker(self: &Arc<Self>, running: &Sender<()>) -> std::io::Result<()> {
        let started = self.spawn("session", running, |token| token.pool.work());
        if started.is_ok() {
            self.pool.worker_comes();
        }
        started
    }

    fn spawn(
        self: &Arc<Self>,
        name: &str,
        running: &Sender<()>,
        work: impl FnOnce(&Arc<Self>) + Send + 'static,
    ) -> std::io::Result<()> {
        let (token, running) = (Arc::clone(self), running.clone());
        thread::Builder::new().name(name.to_owned()).spawn(move || {
            work(&token);
            drop(running);
        })?;
        Ok(())
    }

    /// Has a session do `work`, and returns its answer before the deadline.
    pub(super) async fn run<T, W>(&self, deadline: Instant, work: W) -> Result<T, KekError>
    where
        T: Send + 'static,
        W: FnMut(&mut Lane) -> Result<T, CallError> + Send + 'static,
    {
        self.pool.run(deadline, false, work).await
    }

    /// The same for what most requests come to: one call, whose time tells what the next one will take.
    pub(super) async fn call<T, W>(&self, deadline: Instant, work: W) -> Result<T, KekError>
    where
        T: Send + 'static,
        W: FnMut(&mut Lane) -> Result<T, CallError> + Send + 'static,
    {
        self.pool.run(deadline, true, work).await
    }

    /// How long to wait for an answer before another token is asked.
    pub(super) fn patience(&self) -> Duration {
        self.pool.pace.patience()
    }

    /// How long a call takes on average.
    pub(super) fn average(&self) -> Duration {
        self.pool.pace.average()
    }

    /// Whether it was much slower a moment ago than a token whose calls take `quickest`.
    pub(super) fn lags(&self, quickest: Duration) -> bool {
        self.pool.pace.lags(quickest)
    }

    /// Whether it is to be passed over while another token serves: it is out of reach, or nothing comes back from it.
    pub(super) fn is_sick(&self) -> bool {
        self.link.check().is_err() || self.pool.pace.hung_for().is_some()
    }

    /// Whether it can be used, as far as is known without asking it.
    ///
    /// # Errors
    /// Why not.
    pub(super) fn check(&self) -> Result<(), KekError> {
        if !self.link.is_coming_back() {
            self.link.check()?;
        }
        match self.pool.pace.hung_for() {
            Some(still) if still >= SILENCE => {
                let what = format!("{}: no call has come back for {} s", self.link.name, still.as_secs());
                Err(KekError::Unavailable(what))
            }
            _ => Ok(()),
        }
    }

    /// How it fares.
    pub(super) fn vitals(&self) -> Vitals {
        Vitals {
            name: self.uri().to_string(),
            is_up: self.check().is_ok(),
            is_latched: self.is_latched.load(Ordering::Relaxed),
            connections: self.link.connections(),
            losses: self.link.losses(),
            sessions: self.pool.sessions(),
            waiting: self.pool.waiting(),
            times: Arc::clone(&self.pool.times),
        }
    }

    /// Its URI, by which people know it.
    pub(super) fn uri(&self) -> &TokenUri {
        &self.address.uri
    }

    /// Lets what waits be served, then ends the threads and the connection. Returns whether all of them have ended
    /// within `patience`; a call that hangs in the module keeps its thread.
    pub(super) fn close(&self, patience: Duration) -> bool {
        self.pool.close();
        self.link.wake_supervisor();
        let threads = lock(&self.threads);
        matches!(threads.recv_timeout(patience), Err(RecvTimeoutError::Disconnected))
    }

    /// Why only a new process could use it again, if that is so.
    pub(super) fn hopeless(&self) -> Option<String> {
        let name = &self.link.name;
        if self.pool.is_hopeless() {
            let stuck = self.pool.pace.overdue(None).min(self.pool.most_workers());
            return Some(format!("{name}: {stuck} calls do not return"));
        }
        if self.is_spent.load(Ordering::Relaxed) {
            return Some(format!("{name}: its module cannot be initialized again in one process"));
        }
        let waiting = lock(&self.waiting_since).map(|since| since.elapsed());
        let endless = waiting.filter(|since| *since > CONNECT_PATIENCE)?;
        Some(format!("{name}: a call that stands between it and us has not returned for {} s", endless.as_secs()))
    }

    /// Keeps the token connected until the pool is closed.
    fn supervise(self: &Arc<Self>, woken: &Receiver<()>, running: &Sender<()>) {
        let (mut failed_logins, mut glances) = (0, GLANCES_AT_THE_START);
        // The last connection, while a call holds it open that does not return.
        let mut before: Option<Receiver<()>> = None;
        while !self.pool.is_closed() {
            let began = Instant::now();
            lock(&self.waiting_since).get_or_insert(began);
            let (connected, released) = self.connect(woken, std::mem::take(&mut glances));
            let unreleased = before.as_ref().is_some_and(|before| before.try_recv() == Err(TryRecvError::Empty));
            let waits = unreleased || matches!(connected, Err(NotConnected::Hangs(_)));
            if connected.is_ok() || !waits {
                if before.take().is_some() {
                    self.is_spent.store(Module::is_spent(&self.address.module), Ordering::Relaxed);
                }
                *lock(&self.waiting_since) = None;
            }
            let next = match connected {
                Ok(connected) => {
                    failed_logins = 0;
                    self.is_latched.store(false, Ordering::Relaxed);
                    self.is_spent.store(false, Ordering::Relaxed);
                    self.pool.is_not_starved();
                    self.link.is_up(connected);
                    if self.watch(woken, running) == Gone::ToBeRenewed {
                        glances = GLANCES_TO_RENEW;
                    }
                    if self.pool.is_closed() {
                        self.link.end();
                    }
                    // Only when its last session is closed can the library be initialized anew.
                    if released.recv_timeout(RELEASE_PATIENCE) == Err(RecvTimeoutError::Timeout) {
                        before = Some(released);
                    }
                    self.is_spent.store(Module::is_spent(&self.address.module), Ordering::Relaxed);
                    began + LOOK_EVERY
                }
                Err(error) => {
                    self.link.is_down(&format!("is not usable: {}", error.reason()));
                    let is_logins = matches!(error, NotConnected::LoginFailed { .. });
                    if let NotConnected::LoginFailed { is_latched, .. } = error {
                        self.is_latched.store(is_latched, Ordering::Relaxed);
                    }
                    failed_logins += u32::from(is_logins);
                    Instant::now() + if is_logins { pause_after(failed_logins) } else { LOOK_EVERY }
                }
            };
            if !self.pool.is_closed() {
                let _closed = woken.recv_timeout(next.saturating_duration_since(Instant::now()));
            }
        }
    }

    /// Connects, and looks again so often while it may be otherwise in a moment. What is received with it ends with the
    /// connection.
    fn connect(&self, woken: &Receiver<()>, mut glances: u32) -> (Result<Connected, NotConnected>, Receiver<()>) {
        let mut may_log_in_again = true; // once: further logins are spaced out
        loop {
            let (release, released) = mpsc::channel();
            let connected = self.address.connect(release);
            let may_pass = match &connected {
                Err(NotConnected::NotThere(_)) => true,
                Err(NotConnected::LoginFailed { is_latched: false, .. }) => std::mem::take(&mut may_log_in_again),
                Ok(_) | Err(NotConnected::Hangs(_) | NotConnected::LoginFailed { is_latched: true, .. }) => false,
            };
            if !may_pass || glances == 0 || self.pool.is_closed() {
                return (connected, released);
            }
            glances -= 1;
            let _closed = woken.recv_timeout(GLANCE_AGAIN);
        }
    }

    /// Sees to it that enough workers work and that the module does not grow without end; until the connection is lost
    /// or given up, or the pool is closed.
    fn watch(self: &Arc<Self>, woken: &Receiver<()>, running: &Sender<()>) -> Gone {
        let mut looks_without_a_session = 0;
        // The end may have been told before: once, to whoever then connected.
        while !self.pool.is_closed() && woken.recv_timeout(LOOK_EVERY) == Err(RecvTimeoutError::Timeout) {
            let mut hung = self.pool.pace.overdue(None); // before the verdict: none may return unseen
            if self.pool.is_hopeless() {
                self.link.is_down("does not answer: no call into the module returns");
                self.pool.give_up_sessions();
                self.pool.refuse_all();
                // A call that returns after all ends the wait: the token may give the session of that one to others.
                while self.pool.is_hopeless() && !self.pool.is_closed() {
                    let hangs = self.pool.pace.overdue(None);
                    if hangs < hung {
                        break;
                    }
                    hung = hangs;
                    let _closed = woken.recv_timeout(LOOK_EVERY);
                    self.pool.refuse_all();
                }
                return Gone::Lost;
            }
            for _ in 0..self.pool.missing_workers() {
                tracing::warn!(token = self.link.name, "a call does not return: another session takes its place");
                let _no_thread = self.start_worker(running);
            }
            looks_without_a_session = if self.pool.has_no_session() { looks_without_a_session + 1 } else { 0 };
            // Twice: somebody's may just be on its way to another.
            if looks_without_a_session > 1 {
                self.pool.gives_up_without_a_session();
            }
            if self.link.connected().is_some_and(|connected| connected.is_to_be_renewed(self.renew_after)) {
                self.link.is_renewed();
                self.pool.give_up_sessions();
                return Gone::ToBeRenewed;
            }
        }
        Gone::Lost
    }
}

/// Doubles from one failed login to the next, less a random part: many hosts must not ask a token at one moment.
fn pause_after(failed_logins: u32) -> Duration {
    let pause = LAST_PAUSE.min(LOOK_EVERY * 2_u32.saturating_pow(failed_logins.saturating_sub(1)));
    let mut random = [0];
    let _no_jitter = getrandom::fill(&mut random);
    pause - pause * u32::from(random[0]) / 1024
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pause_after_a_failed_login_doubles_up_to_its_bound_less_a_random_part() {
        for (failed_logins, most) in
            [(0, 250), (1, 250), (2, 500), (3, 1000), (4, 2000), (5, 4000), (6, 5000), (33, 5000), (u32::MAX, 5000)]
        {
            let most = Duration::from_millis(most);
            let pauses: Vec<Duration> = (0..64).map(|_| pause_after(failed_logins)).collect();
            // A quarter at most: less than what it doubles by.
            let is_good = |pause: &Duration| (most * 3 / 4..=most).contains(pause);
            assert!(pauses.iter().all(is_good), "{failed_logins}: {pauses:?}");
            let is_another = |pair: &[Duration]| pair.first() != pair.last();
            assert!(
                pauses.windows(2).any(is_another),
                "{failed_logins}: many hosts would ask at one moment: {pauses:?}"
            );
        }
    }
}
