//! The way to Vault: whether it is open, calls with a token, and what is done again when a call did not succeed.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use http::Method;
use tokio::sync::{Notify, Semaphore};
use zeroize::Zeroizing;

use super::auth::{Login, NoToken};
use super::client::{Answer, Call, Client};
use super::fault::Fault;
use crate::config::TransitConfig;
use crate::provider::{KekError, Losses, Times, Vitals};
use crate::sync::lock;

/// Requests under way at a time: more would wait at Vault, and longer than anybody wants.
const MOST_CALLS: usize = 256;
/// How often one call is made at most, and what lies between two.
const ATTEMPTS: u32 = 5;
const BREATH: Duration = Duration::from_millis(40);
/// A call that was given so long and had no answer opens the breaker.
const HANGS: Duration = Duration::from_millis(900);
/// A token is refused for a moment where a standby has not heard of it yet: one so young is shown so often again.
const FRESH: Duration = Duration::from_secs(2);
const ATTEMPTS_FRESH: u32 = 4;

/// A ciphertext that the key did not make puts the key itself in doubt, but no more often than this.
const DOUBTS: Duration = Duration::from_secs(5);

/// The way to one Vault. Shared between tasks.
pub(super) struct Link {
    /// The provider, as people know it.
    name: String,
    address: String,
    mount: String,
    key: String,
    namespace: Option<String>,
    client: Arc<Client>,
    pub(super) login: Login,
    calls: Semaphore,
    times: Arc<Times>,
    /// How often it was there, or there again.
    returns: AtomicU64,
    /// How often it was lost, by the class of what was wrong.
    losses: Losses,
    /// Why nothing is asked of Vault at the moment.
    outage: Mutex<Option<KekError>>,
    /// Wakes whoever tries whether it has come back.
    pub(super) opened: Notify,
    /// When the key was doubted last.
    doubted: Mutex<Option<Instant>>,
    /// Wakes whoever looks at the key.
    pub(super) changed: Notify,
}

/// What is asked of the key.
#[derive(Clone, Copy)]
pub(super) enum Ask {
    Read,
    Encrypt,
    Decrypt,
    /// Of the server.
    Health,
    /// Of the token, on the paths in the body.
    Capabilities,
}

impl Ask {
    /// What a policy must allow for it.
    pub(super) const fn capability(self) -> &'static str {
        match self {
            Self::Read | Self::Health => "read",
            Self::Encrypt | Self::Decrypt | Self::Capabilities => "update",
        }
    }
}

impl Link {
    pub(super) fn new(config: &TransitConfig, client: Arc<Client>, login: Login) -> Self {
        Self {
            name: config.name.clone(),
            address: config.address.to_string().trim_end_matches('/').to_owned(),
            mount: config.mount.clone(),
            key: config.key.clone(),
            namespace: config.namespace.clone(),
            client,
            login,
            calls: Semaphore::new(MOST_CALLS),
            times: Arc::default(),
            returns: AtomicU64::new(1),
            losses: Losses::default(),
            outage: Mutex::default(),
            opened: Notify::new(),
            doubted: Mutex::default(),
            changed: Notify::new(),
        }
    }

    /// The key, as people find it.
    pub(super) fn place(&self) -> String {
        let namespace = self.namespace.as_ref().map(|namespace| format!("{namespace}/")).unwrap_or_default();
        format!("{}/v1/{namespace}{}/keys/{}", self.address, self.mount, self.key)
    }

    /// The path of what is asked of the key.
    pub(super) fn path(&self, ask: Ask) -> String {
        let verb = match ask {
            Ask::Encrypt => "encrypt",
            Ask::Decrypt => "decrypt",
            _ => "keys",
        };
        format!("{}/{verb}/{}", self.mount, self.key)
    }

    /// Whether anything is asked of Vault at the moment.
    ///
    /// # Errors
    /// Why not: the breaker is open.
    pub(super) fn check(&self) -> Result<(), KekError> {
        lock(&self.outage).clone().map_or(Ok(()), Err)
    }

    /// How the server fares.
    pub(super) fn vitals(&self) -> Vitals {
        let outage = lock(&self.outage).clone();
        Vitals {
            name: self.address.clone(),
            is_up: outage.is_none(),
            is_latched: matches!(outage, Some(KekError::Unauthenticated(_))),
            connections: self.returns.load(Ordering::Relaxed),
            losses: self.losses.counted(),
            sessions: vec![("busy", MOST_CALLS - self.calls.available_permits())],
            waiting: 0,
            times: Arc::clone(&self.times),
        }
    }

    /// Asks, unless the breaker is open.
    ///
    /// # Errors
    /// See [`KekError`].
    pub(super) async fn ask(&self, ask: Ask, body: Zeroizing<Vec<u8>>, deadline: Instant) -> Result<Answer, KekError> {
        self.check()?;
        self.try_ask(ask, body, deadline).await
    }

    /// Asks even while the breaker is open, and closes it if there is an answer.
    ///
    /// # Errors
    /// See [`KekError`].
    pub(super) async fn try_ask(
        &self,
        ask: Ask,
        body: Zeroizing<Vec<u8>>,
        deadline: Instant,
    ) -> Result<Answer, KekError> {
        let began = Instant::now();
        let Ok(_place) = self.calls.try_acquire() else {
            return Err(KekError::Busy(format!("provider {}", self.name)));
        };
        let answer = self.attempts(ask, &body, deadline).await;
        if matches!(ask, Ask::Encrypt | Ask::Decrypt) {
            self.times.call.record(began.elapsed());
        }
        // That it lags behind one ciphertext says nothing of the others, and whoever writes etcd can plant such a one.
        let is_behind = matches!(answer, Err(Trouble::Fault(Fault::Behind)));
        let class = answer.as_ref().err().map_or("", Trouble::class);
        let answer = answer.map_err(|trouble| self.explain(trouble, ask));
        match &answer {
            _ if is_behind => (),
            Err(error @ (KekError::Unavailable(_) | KekError::Unauthenticated(_))) => self.open(class, error.clone()),
            Err(error @ KekError::Deadline(_)) if began.elapsed() >= HANGS => {
                self.open(class, KekError::Unavailable(error.to_string()));
            }
            Err(KekError::Deadline(_) | KekError::Busy(_)) => (),
            Ok(_) | Err(_) => self.close(),
        }
        if matches!(answer, Err(KekError::BadInput)) {
            self.doubt();
        }
        answer
    }

    /// The ciphertext is damaged, or another key has the name now: a look shows which.
    fn doubt(&self) {
        let mut doubted = lock(&self.doubted);
        if doubted.is_none_or(|at| at.elapsed() >= DOUBTS) {
            *doubted = Some(Instant::now());
            self.changed.notify_one();
        }
    }

    async fn attempts(&self, ask: Ask, body: &Zeroizing<Vec<u8>>, deadline: Instant) -> Result<Answer, Trouble> {
        let method = if matches!(ask, Ask::Read | Ask::Health) { Method::GET } else { Method::POST };
        let path = match ask {
            Ask::Health => "sys/health?standbyok=true&perfstandbyok=true".into(),
            Ask::Capabilities => "sys/capabilities-self".into(),
            Ask::Read | Ask::Encrypt | Ask::Decrypt => self.path(ask),
        };
        let mut token = self.login.token(deadline).await?;
        let (mut attempt, mut is_new, mut is_behind) = (1, false, false);
        loop {
            let call = Call {
                method: method.clone(),
                path: &path,
                // The health is of no namespace.
                namespace: self.namespace.as_deref().filter(|_| !matches!(ask, Ask::Health)),
                token: Some(token.secret()),
                is_for_the_newest: is_behind,
                body: body.clone(),
            };
            let fault = match self.client.call(call, deadline).await.and_then(Answer::checked) {
                Ok(answer) => return Ok(answer),
                Err(fault) => fault,
            };
            match &fault {
                // Once: who refuses a new one too will not take the next.
                Fault::TokenRefused if !is_new && (token.age() > FRESH || attempt >= ATTEMPTS_FRESH) => {
                    token = self.login.replace(&token, deadline).await?;
                    (is_new, attempt) = (true, 0);
                }
                // A connection that broke, a standby that lags, a quota: soon it may be well.
                Fault::Unreachable(_) if attempt < 2 => (),
                Fault::Behind | Fault::RateLimited | Fault::TokenRefused if attempt < ATTEMPTS => {
                    is_behind |= !matches!(fault, Fault::RateLimited);
                    tokio::time::sleep(BREATH * attempt).await;
                }
                _ => return Err(Trouble::Fault(fault)),
            }
            attempt += 1;
        }
    }

    /// What went wrong, on what, and what to do.
    fn explain(&self, trouble: Trouble, ask: Ask) -> KekError {
        let Self { name, address, .. } = self;
        let place = self.place();
        let fault = match trouble {
            Trouble::NoToken(NoToken::Refused(why)) => {
                return KekError::Unauthenticated(format!("provider {name}: {address}: {why}"));
            }
            Trouble::NoToken(NoToken::NotYet) => {
                return KekError::Deadline(format!("provider {name}: the login at {address}"));
            }
            Trouble::NoToken(NoToken::Unreachable(fault)) | Trouble::Fault(fault) => fault,
        };
        let unavailable = |what: &str| KekError::Unavailable(format!("provider {name}: {address} {what}"));
        let refused = |what: &str| KekError::Refused(format!("provider {name}: {place}: {what}"));
        match fault {
            Fault::Late => KekError::Deadline(format!("provider {name} ({address})")),
            Fault::Unreachable(why) => unavailable(&format!("cannot be reached: {why}")),
            Fault::Sealed => unavailable("is sealed: unseal it"),
            Fault::Broken(what) => unavailable(&format!("is not well: {what}")),
            Fault::Redirect(to) => {
                unavailable(&format!("sends us to {}: no token goes there; set address", to.escape_debug()))
            }
            Fault::RateLimited => {
                KekError::Busy(format!("provider {name}: {address}: its rate limit quota is exceeded"))
            }
            Fault::Behind => unavailable("does not know the newest version of the key yet, as a standby that lags"),
            Fault::TokenRefused => KekError::Unauthenticated(format!(
                "provider {name}: {address} refuses the token, a new one too: see that namespace and auth are those of the key"
            )),
            Fault::Denied => {
                let (verb, path) = (ask.capability(), self.path(ask));
                KekError::Denied(format!(
                    "provider {name}: {address} denies {verb} on {path}: allow it in the policy of the token"
                ))
            }
            Fault::NoKey => {
                refused("there is no such key, or it was deleted: bring it back, or make it, of type aes256-gcm96")
            }
            Fault::NoMount(what) => refused(&format!("{what}: see mount and namespace")),
            Fault::TooOld => refused(
                "the version is below the key's min_decryption_version or min_encryption_version: lower that until \
                 nothing is stored under the version any more",
            ),
            Fault::BadCiphertext => KekError::BadInput,
            Fault::Other(what) => refused(&what),
        }
    }

    /// An answer of another form than Transit's.
    pub(super) fn strange(&self) -> KekError {
        let (name, place) = (&self.name, self.place());
        KekError::Unavailable(format!(
            "provider {name}: {place} answered something that is not Transit's: is a proxy in between?"
        ))
    }

    fn open(&self, class: &'static str, why: KekError) {
        let mut outage = lock(&self.outage);
        if outage.is_none() {
            self.losses.count(class);
            tracing::warn!(provider = self.name, %why, "Vault is out of reach");
            self.opened.notify_one();
        }
        *outage = Some(why);
    }

    fn close(&self) {
        if lock(&self.outage).take().is_some() {
            self.returns.fetch_add(1, Ordering::Relaxed);
            tracing::info!(provider = self.name, "Vault is back");
        }
    }
}

/// Why there is no answer.
enum Trouble {
    NoToken(NoToken),
    Fault(Fault),
}

impl Trouble {
    fn class(&self) -> &'static str {
        match self {
            Self::NoToken(NoToken::Refused(_)) => Fault::TokenRefused.class(),
            Self::NoToken(NoToken::NotYet) => Fault::Late.class(),
            Self::NoToken(NoToken::Unreachable(fault)) | Self::Fault(fault) => fault.class(),
        }
    }
}

impl From<NoToken> for Trouble {
    fn from(why: NoToken) -> Self {
        Self::NoToken(why)
    }
}
