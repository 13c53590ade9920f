//! One token: its connection, kept alive by a supervisor thread, and the worker threads that use it.
//!
//! The supervisor finds the token by its URI, opens the anchor session and logs in through it; a login holds for every
//! session of the process, and lasts while the anchor is open. When a worker finds the token gone, the connection is
//! given up by all, and the supervisor makes a new one. Callers never wait for it: they hear at once what is wrong.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use cryptoki::context::Pkcs11;
use cryptoki::error::{Error, RvError};
use cryptoki::session::{Session, UserType};
use cryptoki::slot::{Slot, TokenInfo};
use secrecy::{ExposeSecret, SecretString};
use tokio::sync::{Notify, watch};

use super::error::{CallError, Class};
use super::lane::Rules;
use super::module::{InUse, Module};
use super::pool::Pool;
use crate::config::{Credential, TokenUri};
use crate::identity::Identity;
use crate::state::State;

const FIRST_RETRY: Duration = Duration::from_millis(250);
const LAST_RETRY: Duration = Duration::from_secs(5);
/// How long a lost connection's sessions may take to be closed.
const RELEASE_PATIENCE: Duration = Duration::from_secs(1);

/// A token of the configuration, whether it is there or not.
pub(super) struct Token {
    pub(super) name: String,
    pub(super) rules: Rules,
    pub(super) state: Arc<State>,
    pub(super) pool: Pool,
    pub(super) uri: TokenUri,
    module: PathBuf,
    pin: Credential,
    condition: watch::Sender<Condition>,
    /// Wakes the supervisor.
    wake: Sender<()>,
    /// Told of every new connection.
    changed: Arc<Notify>,
    /// Each thread holds a sender; when all are gone, so are the sessions.
    threads: Mutex<Receiver<()>>,
}

/// What the supervisor knows of the token.
#[derive(Clone)]
pub(super) enum Condition {
    /// The first attempt is under way.
    Connecting,
    /// It can be used.
    Up(Arc<Connected>),
    /// It cannot, for this reason.
    Down(Arc<str>),
}

/// A token that is present and logged in to. Its fields are dropped in their order: sessions before the library.
pub(super) struct Connected {
    /// Keeps the login; used to log in again.
    anchor: Mutex<Session>,
    pin: SecretString,
    slot: Slot,
    /// KEKs that were used through this connection. One that is then not to be found means that the token is gone:
    /// some libraries show an empty one in its place, until they are initialized again.
    proved: Mutex<BTreeSet<Identity>>,
    in_use: InUse,
    /// Tells the supervisor that all of the above is gone.
    _released: Sender<()>,
}

/// Why there is no connection.
enum NotConnected {
    /// Worth another attempt.
    Yet(String),
    /// The token refused this PIN: another attempt would use up its tries.
    PinRefused(RefusedPin),
}

struct RefusedPin {
    pin: SecretString,
    reason: String,
}

impl Token {
    /// Describes a token and starts its threads. They end after [`Token::close`].
    ///
    /// # Errors
    /// The operating system gives no thread.
    pub(super) fn start(
        uri: TokenUri,
        provider: &crate::config::Provider,
        state: Arc<State>,
        changed: Arc<Notify>,
    ) -> std::io::Result<Arc<Self>> {
        let (wake, woken) = mpsc::channel();
        let (running, threads) = mpsc::channel();
        let rules = Rules {
            label: provider.label.clone(),
            modes: provider.profile.modes.clone(),
            admitted: provider.admitted.clone(),
        };
        let token = Arc::new(Self {
            name: format!("token {uri} of provider {}", provider.name),
            rules,
            state,
            pool: Pool::new(provider.sessions),
            uri,
            module: provider.module.clone(),
            pin: provider.pin.clone(),
            condition: watch::Sender::new(Condition::Connecting),
            wake,
            changed,
            threads: Mutex::new(threads),
        });
        for n in 1..=provider.sessions {
            spawn(format!("session-{n}"), &token, &running, |token| token.pool.work(token))?;
        }
        spawn("token".into(), &token, &running, move |token| token.supervise(&woken))?;
        Ok(token)
    }

    /// Lets what waits be served, then ends the threads and the connection. Returns whether all of them have ended
    /// within `patience`; a call that hangs in the module keeps its thread.
    pub(super) fn close(&self, patience: Duration) -> bool {
        self.pool.close();
        let _supervisor_gone = self.wake.send(());
        let threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        matches!(threads.recv_timeout(patience), Err(RecvTimeoutError::Disconnected))
    }

    /// Whether it can be used, and through what.
    pub(super) fn condition(&self) -> Condition {
        self.condition.borrow().clone()
    }

    /// Waits until the first attempt to connect has ended, and returns why it failed, if it did.
    pub(super) async fn first_attempt(&self) -> Result<(), Arc<str>> {
        let mut condition = self.condition.subscribe();
        let ended = condition.wait_for(|condition| !matches!(condition, Condition::Connecting)).await;
        match ended.as_deref() {
            Ok(Condition::Down(reason)) => Err(Arc::clone(reason)),
            _ => Ok(()),
        }
    }

    /// Gives `connected` up, unless it is already another one that is in use.
    pub(super) fn lost(&self, connected: &Arc<Connected>, error: &CallError) {
        let lost = self.condition.send_if_modified(|condition| match condition {
            Condition::Up(current) if Arc::ptr_eq(current, connected) => {
                *condition = Condition::Down(self.told(&format!("was lost: {error}")));
                true
            }
            _ => false,
        });
        if lost {
            tracing::error!(token = %self.name, %error, "token lost; reconnecting");
            self.changed.notify_one();
            self.pool.begin_round();
            let _supervisor_gone = self.wake.send(());
        }
    }

    fn told(&self, what: &str) -> Arc<str> {
        format!("{} {what}", self.name).into()
    }

    fn supervise(&self, woken: &Receiver<()>) {
        let mut retry = FIRST_RETRY;
        let mut refused_pin = None;
        while !self.pool.is_closed() {
            let (release, released) = mpsc::channel();
            match self.connect(refused_pin.take(), release) {
                Ok(connected) => {
                    retry = FIRST_RETRY;
                    tracing::info!(token = %self.name, "token connected");
                    self.condition.send_replace(Condition::Up(Arc::new(connected)));
                    self.changed.notify_one();
                    self.wait(woken, None);
                    self.let_go();
                    // Only when its last session is closed can the library be initialized anew.
                    let _hangs = released.recv_timeout(RELEASE_PATIENCE);
                }
                Err(error) => {
                    match error {
                        NotConnected::Yet(reason) => self.report_down(&reason),
                        NotConnected::PinRefused(refused) => {
                            self.report_down(&refused.reason);
                            refused_pin = Some(refused);
                        }
                    }
                    self.wait(woken, Some(retry));
                    retry = (retry * 2).min(LAST_RETRY);
                }
            }
        }
    }

    /// Gives the connection up at the end; one that was lost is given up already.
    fn let_go(&self) {
        self.condition.send_if_modified(|condition| {
            let up = matches!(condition, Condition::Up(_));
            if up {
                *condition = Condition::Down(self.told("is closed"));
            }
            up
        });
    }

    /// Waits until the connection is lost or the end has come, or for `timeout` if there is no connection.
    fn wait(&self, woken: &Receiver<()>, timeout: Option<Duration>) {
        match timeout {
            None => drop(woken.recv()),
            Some(timeout) => match woken.recv_timeout(timeout) {
                Ok(()) | Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => (),
            },
        }
    }

    /// Says why the token cannot be used; in the log only when the reason is a new one.
    fn report_down(&self, reason: &str) {
        let reason = self.told(&format!("is not usable: {reason}"));
        let before = self.condition.send_replace(Condition::Down(Arc::clone(&reason)));
        if !matches!(before, Condition::Down(same) if same == reason) {
            tracing::error!("{reason}");
            self.changed.notify_one();
        }
    }

    fn connect(&self, refused: Option<RefusedPin>, release: Sender<()>) -> Result<Connected, NotConnected> {
        let in_use = Module::acquire(&self.module).map_err(NotConnected::Yet)?;
        let (slot, info) = self.find_slot(in_use.library()).map_err(NotConnected::Yet)?;
        let pin = self.pin.read().map_err(|error| NotConnected::Yet(format!("{error}: {}", error.remedy())))?;
        if let Some(refused) = refused.filter(|refused| refused.pin.expose_secret() == pin.expose_secret()) {
            return Err(NotConnected::PinRefused(refused));
        }
        if info.user_pin_locked() {
            return Err(NotConnected::Yet("its user PIN is locked: unlock it with the vendor's tools".into()));
        }
        let anchor = in_use
            .library()
            .open_rw_session(slot)
            .map_err(|error| NotConnected::Yet(format!("no session can be opened: {}", CallError::from(error))))?;
        match log_in(&anchor, &pin) {
            Ok(()) => Ok(Connected {
                anchor: Mutex::new(anchor),
                pin,
                slot,
                proved: Mutex::default(),
                in_use,
                _released: release,
            }),
            Err(error) if error.class == Class::Pin => {
                let reason = format!("{error}: write the right PIN into {}; this one is not tried again", self.pin);
                Err(NotConnected::PinRefused(RefusedPin { pin, reason }))
            }
            Err(error) => Err(NotConnected::Yet(format!("login failed: {error}"))),
        }
    }

    /// The one slot whose token the URI means.
    fn find_slot(&self, library: &Pkcs11) -> Result<(Slot, TokenInfo), String> {
        let slots = library.get_slots_with_token().map_err(|error| CallError::from(error).to_string())?;
        let tokens: Vec<_> =
            slots.into_iter().filter_map(|slot| Some((slot, library.get_token_info(slot).ok()?))).collect();
        let meant = |info: &TokenInfo| {
            self.uri.matches(info.label(), info.serial_number(), info.manufacturer_id(), info.model())
        };
        let mut matching = tokens.iter().filter(|(_, info)| info.token_initialized() && meant(info));
        match (matching.next(), matching.next()) {
            (Some((slot, info)), None) => Ok((*slot, info.clone())),
            (Some((_, one)), Some((_, other))) => Err(format!(
                "two tokens match it, serial numbers {} and {}: add `;serial=…` to the URI",
                one.serial_number(),
                other.serial_number()
            )),
            (None, _) => {
                let there: BTreeSet<&str> = tokens.iter().map(|(_, info)| info.label()).collect();
                let there: Vec<&str> = there.into_iter().filter(|label| !label.is_empty()).collect();
                Err(format!(
                    "no token of {} matches it; there: {}: insert it, or correct `tokens`",
                    self.module.display(),
                    if there.is_empty() { "none".into() } else { there.join(", ") }
                ))
            }
        }
    }
}

impl Connected {
    pub(super) fn open_session(&self) -> Result<Session, CallError> {
        Ok(self.in_use.library().open_rw_session(self.slot)?)
    }

    /// The KEKs that were used through this connection.
    pub(super) fn proved(&self) -> MutexGuard<'_, BTreeSet<Identity>> {
        self.proved.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Logs in again after the token forgot the login.
    pub(super) fn log_in_again(&self) -> Result<(), CallError> {
        log_in(&self.anchor.lock().unwrap_or_else(PoisonError::into_inner), &self.pin)
    }
}

fn spawn(
    name: String,
    token: &Arc<Token>,
    running: &Sender<()>,
    work: impl FnOnce(&Token) + Send + 'static,
) -> std::io::Result<()> {
    let (token, running) = (Arc::clone(token), running.clone());
    thread::Builder::new().name(name).spawn(move || {
        work(&token);
        drop(running);
    })?;
    Ok(())
}

/// A login belongs to the process: another session may have made it.
fn log_in(session: &Session, pin: &SecretString) -> Result<(), CallError> {
    match session.login(UserType::User, Some(pin)) {
        Ok(()) | Err(Error::Pkcs11(RvError::UserAlreadyLoggedIn, _)) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
