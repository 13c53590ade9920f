//! One token: the supervisor thread that keeps it connected, and the worker threads that use it.
//!
//! When a worker finds the connection gone, all give it up, and the supervisor makes a new one. Callers never wait for
//! that: they hear at once what is wrong.

use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use super::admission::Rules;
use super::connection::Address;
use super::error::CallError;
use super::lane::Lane;
use super::link::Link;
use super::module::{self, Module};
use super::pool::Pool;
use crate::config::{ProviderConfig, TokenUri};
use crate::provider::KekError;
use crate::runtime::Leader;
use crate::state::State;
use crate::sync::lock;

const FIRST_RETRY: Duration = Duration::from_millis(250);
const LAST_RETRY: Duration = Duration::from_secs(5);
/// A token from which nothing comes back for so long counts as out of reach.
const SILENCE: Duration = Duration::from_secs(1);
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
}

impl Token {
    /// Describes a token and starts its threads. They end after [`Token::close`].
    ///
    /// # Errors
    /// The operating system gives no thread.
    pub(super) fn start(
        uri: TokenUri,
        provider: &ProviderConfig,
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
                modes: provider.profile.modes.clone(),
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
        });
        for n in 1..=provider.sessions {
            token.spawn(format!("session-{n}"), &running, |token| token.pool.work())?;
        }
        token.spawn("token".into(), &running, move |token| token.supervise(&woken))?;
        Ok(token)
    }

    fn spawn(
        self: &Arc<Self>,
        name: String,
        running: &Sender<()>,
        work: impl FnOnce(&Self) + Send + 'static,
    ) -> std::io::Result<()> {
        let (token, running) = (Arc::clone(self), running.clone());
        thread::Builder::new().name(name).spawn(move || {
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

    /// Whether it is to be passed over while another token serves: it is out of reach, or nothing comes back from it.
    pub(super) fn is_sick(&self) -> bool {
        self.link.check().is_err() || self.pool.pace.hung_for().is_some()
    }

    /// Whether it can be used, as far as is known without asking it.
    ///
    /// # Errors
    /// Why not.
    pub(super) fn check(&self) -> Result<(), KekError> {
        self.link.check()?;
        match self.pool.pace.hung_for() {
            Some(still) if still >= SILENCE => {
                let what = format!("{}: no call has come back for {} s", self.link.name, still.as_secs());
                Err(KekError::Unavailable(what))
            }
            _ => Ok(()),
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
        self.link.end();
        let threads = lock(&self.threads);
        matches!(threads.recv_timeout(patience), Err(RecvTimeoutError::Disconnected))
    }

    /// Keeps the token connected until the pool is closed.
    fn supervise(&self, woken: &Receiver<()>) {
        let mut retry = FIRST_RETRY;
        while !self.pool.is_closed() {
            let (release, released) = mpsc::channel();
            match self.address.connect(release) {
                Ok(connected) => {
                    let since = Instant::now();
                    self.link.is_up(connected);
                    let _lost_or_closed = woken.recv();
                    // Only when its last session is closed can the library be initialized anew.
                    let _released = released.recv_timeout(RELEASE_PATIENCE);
                    if !self.pool.is_closed() && Module::is_spent(&self.address.module) {
                        let what = "its module cannot be initialized again in one process";
                        module::leave(&format_args!("{}: {what}", self.link.name));
                    }
                    if since.elapsed() >= LAST_RETRY {
                        retry = FIRST_RETRY;
                    }
                }
                Err(reason) => self.link.is_down(&format!("is not usable: {reason}")),
            }
            if !self.pool.is_closed() {
                let _closed = woken.recv_timeout(retry);
                retry = (retry * 2).min(LAST_RETRY);
            }
        }
    }
}
