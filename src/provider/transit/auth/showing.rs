//! What is shown for a token, what comes back, and the logins that were refused.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use http::Method as Verb;
use jiff::Timestamp;
use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tokio::sync::Mutex;
use zeroize::Zeroizing;

use super::super::Purpose;
use super::super::client::{Answer, Call};
use super::super::fault::{Data, Fault};
use super::holding::{Held, held, is_remembered};
use super::{Current, Login, NoToken, Token, Unwrapped};
use crate::config::{Credential, CredentialError, Method};
use crate::state::RefusedLogin;

/// Bytes in a credential, at most.
const LONGEST_SECRET: usize = 16 * 1024;
/// How long one call may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// The secret ids that this process has unwrapped, by the fingerprint of the token in which each was wrapped. Such a token
/// opens once, and a configuration that is read again makes another [`Login`]. Held while one is opened: of two at once,
/// one would call the other a thief.
static UNWRAPPED: Mutex<BTreeMap<String, SecretString>> = Mutex::const_new(BTreeMap::new());

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
pub(super) struct Lease {
    #[serde(default)]
    client_token: SecretText,
    #[serde(default)]
    pub(super) lease_duration: u64,
    #[serde(default)]
    pub(super) renewable: bool,
}

/// A token within an answer; wiped after it was copied.
#[derive(Default, Deserialize)]
struct SecretText(Zeroizing<String>);

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
    /// Shows what the method has to show, unless that was refused lately.
    pub(super) async fn log_in(&self, unwrapped: &mut Option<Unwrapped>) -> Current {
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
                let (said, is_locked) = match fault {
                    Fault::Other(said) => (said, false),
                    _ if shown.is_some() => {
                        ("it was denied, as a role is that others' refused logins have locked".into(), true)
                    }
                    _ => ("it was denied".into(), false),
                };
                let held = shown.map_or("", |shown| self.keep_refusal(shown, is_locked));
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
            is_for_the_newest: false,
            body: Zeroizing::default(),
        };
        let answer = self.client.call(call, Instant::now() + PATIENCE).await.and_then(Answer::checked);
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
        if self.purpose == Purpose::Look {
            let what = "its wrapped secret id opens once, and is for the plugin that serves: `trousseau status` says how \
                        that fares";
            return Err(NoToken::Refused(what.into()));
        }
        let from = fingerprint(&[wrapping.expose_secret()]);
        if let Some(Unwrapped { from: was, secret_id }) = &*before {
            let shown = fingerprint(&[role_id.expose_secret(), secret_id.expose_secret()]);
            if *was == from || self.may_show(&shown).is_ok() {
                return Ok(secret_id.clone());
            }
        }
        let mut known = UNWRAPPED.lock().await;
        let secret_id = match known.get(&from) {
            Some(secret_id) => secret_id.clone(),
            None => self.unwrap(&wrapping).await?,
        };
        known.insert(from.clone(), secret_id.clone());
        let former = before.replace(Unwrapped { from: from.clone(), secret_id: secret_id.clone() });
        if let Some(former) = former.filter(|former| former.from != from) {
            known.remove(&former.from); // it was refused
        }
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
        let answer = self.client.call(look, deadline).await.and_then(Answer::checked).map_err(refused)?;
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
        let answer = self.client.call(unwrap, deadline).await.and_then(Answer::checked).map_err(refused)?;
        let Data { data: WrappedSecretId { secret_id: SecretText(secret_id) } } = answer.read().map_err(refused)?;
        Ok(SecretString::from(secret_id.as_str()))
    }

    fn post<'c>(&'c self, token: Option<&'c SecretString>) -> Call<'c> {
        Call {
            method: Verb::POST,
            path: "",
            namespace: self.namespace.as_deref(),
            token,
            is_for_the_newest: false,
            body: Zeroizing::new(b"{}".to_vec()),
        }
    }

    pub(super) async fn ask(
        &self,
        path: &str,
        token: Option<&SecretString>,
        body: Zeroizing<Vec<u8>>,
    ) -> Result<Lease, Fault> {
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
        let Some(Held { login, until, is_another_tried }) = held(&refused, shown, Timestamp::now()) else {
            return Ok(());
        };
        let another = if is_another_tried { "with another secret id, or " } else { "" };
        let file = self.state.refused_logins_file(&self.file);
        let what = format!(
            "a login at auth/{} was refused at {}, and more of them would lock the role: put the right secret id there; the \
             next try is at {until}, or sooner {another}without {}",
            self.auth.mount,
            login.at,
            file.display()
        );
        Err(NoToken::Refused(what))
    }

    fn keep_refusal(&self, shown: String, is_locked: bool) -> &'static str {
        let (mut refused, now) = (self.state.refused_logins(&self.file).unwrap_or_default(), Timestamp::now());
        refused.retain(|refused| is_remembered(refused, now));
        refused.push(RefusedLogin { at: now, shown, is_locked });
        self.state.keep_refused_logins(&self.file, &refused);
        match is_locked {
            true => ". It is not tried again for a quarter of an hour, unless another secret id is put there",
            false => ". It is not tried again for 65 minutes, unless another secret id is put there",
        }
    }

    fn forget_refusals(&self) {
        if self.state.refused_logins(&self.file).is_ok_and(|refused| !refused.is_empty()) {
            self.state.keep_refused_logins(&self.file, &[]);
        }
    }
}

impl Token {
    fn of(lease: Lease) -> Self {
        let SecretText(secret) = lease.client_token;
        Self {
            secret: SecretString::from(secret.as_str()),
            got: Instant::now(),
            lasts: lasting(lease.lease_duration),
            renewable: lease.renewable,
        }
    }
}

/// For ever, where it is zero. No token lasts longer than a century; what says so must not overflow.
pub(super) fn lasting(seconds: u64) -> Option<Duration> {
    (seconds > 0).then(|| Duration::from_secs(seconds.min(u32::MAX.into())))
}

fn read(credential: &Credential) -> Result<SecretString, NoToken> {
    credential.read().map_err(unreadable)
}

fn unreadable(error: CredentialError) -> NoToken {
    NoToken::Refused(format!("{error}: {}", error.remedy()))
}

pub(super) fn fingerprint(parts: &[&str]) -> String {
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
