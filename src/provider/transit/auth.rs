//! Tokens of Vault: got by one of the auth methods, renewed well before they end, replaced when they are refused.
//!
//! Vault locks a role out after five refused logins within a quarter of an hour, whoever made them; a role id is no
//! secret, and several control planes have the same. So a login that was refused is not tried again for that long,
//! unless something else is to be shown, and every process of this host knows of it.

use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use http::Method as Verb;
use jiff::{SignedDuration, Timestamp};
use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tokio::sync::{Notify, watch};
use zeroize::Zeroizing;

use super::client::{Call, Client};
use super::fault::Fault;
use crate::config::{Auth, Credential, CredentialError, Method, TransitConfig};
use crate::state::{RefusedLogin, State};
use crate::sync::lock;

/// Vault's own measure: refused logins within so long count together.
const WINDOW: SignedDuration = SignedDuration::from_mins(15);
/// How many refused logins of this host may fall into it, whatever was shown.
const MOST_REFUSED: usize = 2;
/// Bytes in a credential, at most.
const LONGEST_SECRET: usize = 16 * 1024;
/// How long one call may take.
const PATIENCE: Duration = Duration::from_secs(5);
/// Between two attempts that reached nobody.
const AGAIN: Duration = Duration::from_secs(1);
/// Between two attempts with what was refused, where such do no harm.
const AGAIN_REFUSED: Duration = Duration::from_secs(30);
/// Files that somebody else may replace are looked at so often: while there is a token, and while there is none.
const GLANCE: Duration = Duration::from_secs(5);
const GLANCE_WITHOUT: Duration = Duration::from_secs(1);

/// A token that was got.
pub(super) struct Token {
    secret: SecretString,
    got: Instant,
    /// How long it lasts from then on. `None`: for ever.
    lasts: Option<Duration>,
    renewable: bool,
}

/// Why there is no token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum NoToken {
    /// What was shown is refused, or there is nothing to show.
    Refused(String),
    /// Vault could not be asked.
    Unreachable(Fault),
    /// Nobody has tried yet.
    NotYet,
}

/// A secret id, and the fingerprint of the token that it was wrapped in.
struct Unwrapped {
    from: String,
    secret_id: SecretString,
}

type Current = Result<Arc<Token>, NoToken>;

/// The login of one provider.
pub(super) struct Login {
    auth: Auth,
    /// The namespace of the login.
    namespace: Option<String>,
    /// The provider's, for people.
    name: String,
    /// What its files in the state directory are called.
    file: String,
    client: Arc<Client>,
    state: Arc<State>,
    current: watch::Sender<Current>,
    /// A token that Vault refused.
    refused: Mutex<Weak<Token>>,
    /// Wakes whoever keeps the token.
    due: Notify,
}

#[derive(Serialize)]
struct AppRole<'s> {
    role_id: &'s str,
    secret_id: &'s str,
}

#[derive(Serialize)]
struct Certificate<'s> {
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<&'s str>,
}

#[derive(Serialize)]
struct Jwt<'s> {
    role: &'s str,
    jwt: &'s str,
}

#[derive(Serialize)]
struct Wrapping<'s> {
    token: &'s str,
}

#[derive(Deserialize)]
struct LoginAnswer {
    auth: Option<Lease>,
}

#[derive(Deserialize)]
struct Lease {
    #[serde(default)]
    client_token: SecretText,
    #[serde(default)]
    lease_duration: u64,
    #[serde(default)]
    renewable: bool,
}

/// A token within an answer; wiped after it was copied.
#[derive(Default, Deserialize)]
struct SecretText(Zeroizing<String>);

#[derive(Deserialize)]
struct Data<T> {
    data: T,
}

#[derive(Deserialize)]
struct Lookup {
    #[serde(default)]
    ttl: u64,
    #[serde(default)]
    renewable: bool,
}

#[derive(Deserialize)]
struct WrappedSecretId {
    secret_id: SecretText,
}

#[derive(Deserialize)]
struct WrappingLookup {
    creation_path: String,
}

impl Login {
    pub(super) fn new(config: &TransitConfig, file: String, client: &Arc<Client>, state: &Arc<State>) -> Self {
        Self {
            auth: config.auth.clone(),
            namespace: config.auth.namespace.clone().or_else(|| config.namespace.clone()),
            name: config.name.clone(),
            file,
            client: Arc::clone(client),
            state: Arc::clone(state),
            current: watch::Sender::new(Err(NoToken::NotYet)),
            refused: Mutex::default(),
            due: Notify::new(),
        }
    }

    /// The token of now, or why there is none. Waits for the first login.
    pub(super) async fn token(&self, deadline: Instant) -> Current {
        self.wait_for(deadline, |current| !matches!(current, Err(NoToken::NotYet))).await
    }

    /// A token in the place of one that was refused. However many ask, one login follows.
    pub(super) async fn replace(&self, refused: &Arc<Token>, deadline: Instant) -> Current {
        if self.is(refused) {
            *lock(&self.refused) = Arc::downgrade(refused);
            self.due.notify_one();
        }
        self.wait_for(deadline, |current| current.as_ref().map_or(true, |token| !Arc::ptr_eq(token, refused))).await
    }

    /// Returns when there is a token, after there was none.
    pub(super) async fn succeeds(&self) {
        let mut current = self.current.subscribe();
        let was_there = current.borrow_and_update().is_ok();
        if was_there || current.wait_for(Current::is_ok).await.is_err() {
            std::future::pending().await
        }
    }

    async fn wait_for(&self, deadline: Instant, is_it: impl Fn(&Current) -> bool) -> Current {
        let mut current = self.current.subscribe();
        match tokio::time::timeout_at(deadline.into(), current.wait_for(is_it)).await {
            Ok(Ok(current)) => current.clone(),
            _ => Err(NoToken::NotYet),
        }
    }

    /// Gets a token, renews it, and gets another one before it ends. It alone logs in: a request that is given up must
    /// not take a login along. Never returns.
    pub(super) async fn keep(&self) {
        let mut unwrapped = None;
        loop {
            let current = self.current.borrow().clone();
            tokio::select! {
                () = self.wait(&current) => (),
                () = self.due.notified() => (),
            }
            match current {
                Ok(token) if self.was_refused(&token) => self.set(self.log_in(&mut unwrapped).await),
                Ok(token) if token.renew_in().is_zero() => self.renew(&token, &mut unwrapped).await,
                Ok(token) if self.is_kept_by_others() => self.take_over_another(&token, &mut unwrapped).await,
                Ok(_) => (),
                Err(_) => self.set(self.log_in(&mut unwrapped).await),
            }
        }
    }

    /// Returns when something is to be done about this.
    async fn wait(&self, current: &Current) {
        match current {
            Ok(token) if self.is_kept_by_others() => self.another_is_shown(token.renew_in(), GLANCE).await,
            Ok(token) => tokio::time::sleep(token.renew_in()).await,
            Err(NoToken::NotYet) => (),
            Err(NoToken::Unreachable(_)) => tokio::time::sleep(AGAIN).await,
            Err(NoToken::Refused(_)) => self.another_is_shown(AGAIN_REFUSED, GLANCE_WITHOUT).await,
        }
    }

    /// Returns when the files have other contents than now, or after so long.
    async fn another_is_shown(&self, at_most: Duration, glance: Duration) {
        let (began, shown) = (Instant::now(), self.files());
        while self.files() == shown {
            let left = at_most.saturating_sub(began.elapsed());
            if left.is_zero() {
                return;
            }
            tokio::time::sleep(left.min(glance)).await;
        }
    }

    /// The fingerprint of what would be shown now.
    fn files(&self) -> String {
        let secret = |file: &Credential| file.read_file().map(|read| fingerprint(&[read.expose_secret()]));
        let files = match &self.auth.method {
            Method::Token { token } => vec![secret(token)],
            Method::AppRole { role_id, secret_id, .. } => vec![secret(role_id), secret(secret_id)],
            Method::Cert { key, .. } => vec![secret(key)], // a new certificate comes with a new key
            Method::Jwt { jwt, .. } => vec![secret(jwt)],
        };
        files.into_iter().map(Result::unwrap_or_default).collect()
    }

    fn is_kept_by_others(&self) -> bool {
        matches!(self.auth.method, Method::Token { .. })
    }

    fn is(&self, token: &Arc<Token>) -> bool {
        self.current.borrow().as_ref().is_ok_and(|current| Arc::ptr_eq(current, token))
    }

    fn was_refused(&self, token: &Arc<Token>) -> bool {
        lock(&self.refused).upgrade().is_some_and(|refused| Arc::ptr_eq(&refused, token))
    }

    fn set(&self, current: Current) {
        let was = self.current.send_replace(current.clone());
        match (&was, &current) {
            (Err(NoToken::Refused(was)), Err(NoToken::Refused(why))) if was == why => (),
            (_, Err(NoToken::Refused(why))) => tracing::error!(provider = self.name, why, "there is no token of Vault"),
            (Err(_), Ok(_)) => tracing::info!(provider = self.name, "logged in to Vault"),
            _ => (),
        }
    }

    /// A token file that has changed has another token in it. The old one stays in use if that one is no good.
    async fn take_over_another(&self, token: &Arc<Token>, unwrapped: &mut Option<Unwrapped>) {
        let Method::Token { token: file } = &self.auth.method else { return };
        let is_another = |read: SecretString| read.expose_secret() != token.secret.expose_secret();
        if file.read().is_ok_and(is_another) {
            match self.log_in(unwrapped).await {
                Ok(another) => {
                    tracing::info!(provider = self.name, "another token is in the token file: it is used from now on");
                    self.set(Ok(another));
                }
                Err(why) => {
                    tracing::warn!(provider = self.name, ?why, "another token is in the token file, and no good");
                }
            }
        }
    }

    /// The lease is made longer; where that is not possible, or brings nothing, another token is got meanwhile.
    async fn renew(&self, token: &Arc<Token>, unwrapped: &mut Option<Unwrapped>) {
        let renewed = if token.renewable {
            self.ask("auth/token/renew-self", Some(&token.secret), Zeroizing::new(b"{}".to_vec())).await
        } else {
            Err(Fault::Other("it cannot be renewed".into()))
        };
        match renewed {
            Ok(lease) if !token.is_capped_at(lease.lease_duration) => {
                let (secret, lasts) = (token.secret.clone(), lasting(lease.lease_duration));
                self.set(Ok(Arc::new(Token { secret, got: Instant::now(), lasts, renewable: lease.renewable })));
                return;
            }
            Err(Fault::Unreachable(_) | Fault::Late | Fault::Sealed | Fault::Broken(_)) if !token.has_ended() => {
                return tokio::time::sleep(AGAIN).await;
            }
            _ => (),
        }
        // The old one stays in use if another one cannot be had now.
        match self.log_in(unwrapped).await {
            Err(why) if !token.has_ended() => {
                tracing::warn!(provider = self.name, ?why, "the token ends soon, and another one cannot be had");
                tokio::time::sleep(AGAIN.max(token.lasts.unwrap_or_default() / 20)).await;
            }
            got => self.set(got),
        }
    }

    /// Shows what the method has to show, unless that was refused lately.
    async fn log_in(&self, unwrapped: &mut Option<Unwrapped>) -> Current {
        let (body, shown) = match &self.auth.method {
            Method::Token { token } => return self.look_up(read(token)?).await.map(Arc::new),
            Method::AppRole { role_id, secret_id: file, wrapped } => {
                let role_id = read(role_id)?;
                let secret_id = match wrapped {
                    true => self.unwrapped(&role_id, read(file)?, unwrapped).await?,
                    false => read(file)?,
                };
                let (role_id, secret_id) = (role_id.expose_secret(), secret_id.expose_secret());
                let shown = fingerprint(&[role_id, secret_id]);
                self.may_show(&shown)?;
                (json(&AppRole { role_id, secret_id }), Some(shown))
            }
            Method::Cert { role, .. } => {
                self.client.reconnect(); // with the certificate of now
                (json(&Certificate { name: role.as_deref() }), None)
            }
            Method::Jwt { role, jwt } => {
                let jwt = jwt.read_file().map_err(unreadable)?;
                (json(&Jwt { role, jwt: jwt.expose_secret().trim_ascii_end() }), None)
            }
        };
        match self.ask(&format!("auth/{}/login", self.auth.mount), None, body).await {
            Ok(lease) => {
                self.forget_refusals();
                Ok(Arc::new(Token::of(lease)))
            }
            Err(fault @ (Fault::Denied | Fault::TokenRefused | Fault::Other(_))) => {
                let said = match fault {
                    Fault::Other(said) => said,
                    _ if shown.is_some() => {
                        "it was denied, as a role is that others' refused logins have locked".into()
                    }
                    _ => "it was denied".into(),
                };
                let held = shown.map_or("", |shown| self.keep_refusal(shown));
                Err(NoToken::Refused(format!("the login at auth/{} was refused: {said}{held}", self.auth.mount)))
            }
            Err(fault) => Err(NoToken::Unreachable(fault)),
        }
    }

    /// A token of which only the token itself is known.
    async fn look_up(&self, secret: SecretString) -> Result<Token, NoToken> {
        let call = Call {
            method: Verb::GET,
            path: "auth/token/lookup-self",
            namespace: self.namespace.as_deref(),
            token: Some(&secret),
            body: Zeroizing::default(),
        };
        let answer = self.client.call(call, Instant::now() + PATIENCE).await.and_then(super::client::Answer::checked);
        let found = answer.and_then(|answer| answer.read::<Data<Lookup>>());
        let (lasts, renewable) = match found {
            Ok(Data { data }) => (lasting(data.ttl), data.renewable),
            // Without the policy `default` it may not look at itself, and works.
            Err(Fault::Denied) => (None, false),
            Err(Fault::TokenRefused) => {
                let what = "Vault does not know the token in the token file, or it has expired: put a new one there";
                return Err(NoToken::Refused(what.into()));
            }
            Err(fault) => return Err(NoToken::Unreachable(fault)),
        };
        Ok(Token { secret, got: Instant::now(), lasts, renewable })
    }

    /// The secret id that was unwrapped before, unless it was refused and another one has been wrapped since.
    async fn unwrapped(
        &self,
        role_id: &SecretString,
        wrapping: SecretString,
        before: &mut Option<Unwrapped>,
    ) -> Result<SecretString, NoToken> {
        let from = fingerprint(&[wrapping.expose_secret()]);
        if let Some(Unwrapped { from: was, secret_id }) = &*before {
            let shown = fingerprint(&[role_id.expose_secret(), secret_id.expose_secret()]);
            if *was == from || self.may_show(&shown).is_ok() {
                return Ok(secret_id.clone());
            }
        }
        let secret_id = self.unwrap(&wrapping).await?;
        *before = Some(Unwrapped { from, secret_id: secret_id.clone() });
        Ok(secret_id)
    }

    /// The secret id that was wrapped for us alone. Whoever unwraps it first is the only one who can.
    async fn unwrap(&self, wrapping: &SecretString) -> Result<SecretString, NoToken> {
        const TAKEN: &str = "the wrapped secret id was unwrapped already, or its time is over: unless that was this plugin \
                             before a restart, somebody else may have it. Destroy it, and wrap a new one";
        let refused = |fault| match fault {
            Fault::Other(_) | Fault::TokenRefused | Fault::Denied => NoToken::Refused(TAKEN.into()),
            fault => NoToken::Unreachable(fault),
        };
        let deadline = Instant::now() + PATIENCE;
        let body = json(&Wrapping { token: wrapping.expose_secret() });
        let look = Call { path: "sys/wrapping/lookup", body, ..self.post(None) };
        let answer =
            self.client.call(look, deadline).await.and_then(super::client::Answer::checked).map_err(refused)?;
        let Data { data: WrappingLookup { creation_path } } = answer.read().map_err(refused)?;
        let expected = format!("auth/{}/role/", self.auth.mount);
        if !(creation_path.starts_with(&expected) && creation_path.ends_with("/secret-id")) {
            let what = format!(
                "the wrapping token was made at {}, not for a secret id of auth/{}: somebody may have put it there in \
                 place of yours",
                creation_path.escape_debug(),
                self.auth.mount
            );
            return Err(NoToken::Refused(what));
        }
        let unwrap = Call { path: "sys/wrapping/unwrap", ..self.post(Some(wrapping)) };
        let answer =
            self.client.call(unwrap, deadline).await.and_then(super::client::Answer::checked).map_err(refused)?;
        let Data { data: WrappedSecretId { secret_id: SecretText(secret_id) } } = answer.read().map_err(refused)?;
        Ok(SecretString::from(secret_id.as_str()))
    }

    fn post<'c>(&'c self, token: Option<&'c SecretString>) -> Call<'c> {
        Call {
            method: Verb::POST,
            path: "",
            namespace: self.namespace.as_deref(),
            token,
            body: Zeroizing::new(b"{}".to_vec()),
        }
    }

    async fn ask(&self, path: &str, token: Option<&SecretString>, body: Zeroizing<Vec<u8>>) -> Result<Lease, Fault> {
        let call = Call { path, body, ..self.post(token) };
        let answer = self.client.call(call, Instant::now() + PATIENCE).await?.checked()?;
        let answer: LoginAnswer = answer.read()?;
        answer.auth.ok_or_else(|| Fault::Broken("its answer to a login has no token".into()))
    }

    /// Whether a login with this would not bring the lock-out nearer.
    fn may_show(&self, shown: &str) -> Result<(), NoToken> {
        let refused = self.state.refused_logins(&self.file).map_err(|error| {
            NoToken::Refused(format!("{error}: {}", error.remedy())) // who cannot remember must not try
        })?;
        let since = Timestamp::now().saturating_sub(WINDOW).unwrap_or(Timestamp::MIN);
        let recent: Vec<&RefusedLogin> = refused.iter().filter(|refused| refused.at > since).collect();
        let same = recent.iter().find(|refused| refused.shown == shown);
        let Some(held) = same.or_else(|| recent.first().filter(|_| recent.len() >= MOST_REFUSED)) else {
            return Ok(());
        };
        let again = held.at.saturating_add(WINDOW).unwrap_or(Timestamp::MAX);
        let file = self.state.refused_logins_file(&self.file);
        let what = format!(
            "a login at auth/{} was refused at {}, and more of them would lock the role: put the right secret id there; the \
             next try is at {again}, or sooner with another secret id, or without {}",
            self.auth.mount,
            held.at,
            file.display()
        );
        Err(NoToken::Refused(what))
    }

    fn keep_refusal(&self, shown: String) -> &'static str {
        let mut refused = self.state.refused_logins(&self.file).unwrap_or_default();
        let since = Timestamp::now().saturating_sub(WINDOW).unwrap_or(Timestamp::MIN);
        refused.retain(|refused| refused.at > since);
        refused.push(RefusedLogin { at: Timestamp::now(), shown });
        self.state.keep_refused_logins(&self.file, &refused);
        ". It is not tried again for a quarter of an hour, unless another secret id is put there"
    }

    fn forget_refusals(&self) {
        if self.state.refused_logins(&self.file).is_ok_and(|refused| !refused.is_empty()) {
            self.state.keep_refused_logins(&self.file, &[]);
        }
    }
}

impl Token {
    pub(super) const fn secret(&self) -> &SecretString {
        &self.secret
    }

    pub(super) fn age(&self) -> Duration {
        self.got.elapsed()
    }

    fn of(lease: Lease) -> Self {
        let SecretText(secret) = lease.client_token;
        Self {
            secret: SecretString::from(secret.as_str()),
            got: Instant::now(),
            lasts: lasting(lease.lease_duration),
            renewable: lease.renewable,
        }
    }

    /// Between half and two thirds of its time after it was got, differently for each token, so that hosts that
    /// started together do not renew together.
    fn renew_in(&self) -> Duration {
        let Some(lasts) = self.lasts else { return Duration::from_secs(u64::from(u32::MAX)) };
        let spread = self
            .secret
            .expose_secret()
            .bytes()
            .fold(0u32, |sum, byte| sum.wrapping_mul(31).wrapping_add(u32::from(byte)));
        let at = lasts / 2 + lasts / 6 * (spread % 1000) / 1000;
        at.saturating_sub(self.got.elapsed())
    }

    fn has_ended(&self) -> bool {
        self.lasts.is_some_and(|lasts| self.got.elapsed() >= lasts)
    }

    /// Whether a renewed lease of so many seconds shows that its greatest age is near.
    fn is_capped_at(&self, seconds: u64) -> bool {
        self.lasts.is_some_and(|lasts| Duration::from_secs(seconds) < lasts * 9 / 10)
    }
}

fn lasting(seconds: u64) -> Option<Duration> {
    (seconds > 0).then(|| Duration::from_secs(seconds))
}

fn read(credential: &Credential) -> Result<SecretString, NoToken> {
    credential.read().map_err(unreadable)
}

fn unreadable(error: CredentialError) -> NoToken {
    NoToken::Refused(format!("{error}: {}", error.remedy()))
}

fn fingerprint(parts: &[&str]) -> String {
    let mut hasher = Sha256::new();
    for part in parts {
        hasher.update(Sha256::digest(part));
    }
    base16ct::lower::encode_string(&hasher.finalize())
}

/// What is sent. No growth leaves a copy of a secret behind.
fn json(body: &impl Serialize) -> Zeroizing<Vec<u8>> {
    let mut bytes = Zeroizing::new(Vec::with_capacity(2 * LONGEST_SECRET));
    if let Err(error) = serde_json::to_writer(&mut *bytes, body) {
        tracing::error!(%error, "a login cannot be written as JSON"); // strings always can
    }
    bytes
}
