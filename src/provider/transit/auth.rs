//! Tokens of Vault: got by one of the auth methods, renewed well before they end, replaced when they are refused.
//!
//! Vault locks a role out after five refused logins, none more than a quarter of an hour after the one before, whoever
//! made them; a role id is no secret, and several control planes have the same. So a login that was refused is not tried
//! again for over an hour, unless something else is to be shown, and every process of this host knows of it ([`holding`]).

mod holding;
mod showing;

use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use secrecy::{ExposeSecret, SecretString};
use tokio::sync::{Notify, watch};
use zeroize::Zeroizing;

use self::showing::{fingerprint, lasting};
use super::Purpose;
use super::client::Client;
use super::fault::Fault;
use crate::config::{Auth, Credential, Method, TransitConfig};
use crate::state::State;
use crate::sync::lock;

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
    purpose: Purpose,
    client: Arc<Client>,
    state: Arc<State>,
    current: watch::Sender<Current>,
    /// A token that Vault refused.
    refused: Mutex<Weak<Token>>,
    /// Wakes whoever keeps the token.
    due: Notify,
}

impl Login {
    pub(super) fn new(
        config: &TransitConfig,
        file: String,
        client: &Arc<Client>,
        state: &Arc<State>,
        purpose: Purpose,
    ) -> Self {
        Self {
            auth: config.auth.clone(),
            namespace: config.auth.namespace.clone().or_else(|| config.namespace.clone()),
            name: config.name.clone(),
            file,
            purpose,
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
        self.auth.method.secrets().into_iter().map(|(_, file)| secret(file).unwrap_or_default()).collect()
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
                // Long enough that a day's token is not asked for each second; a person may show another secret sooner.
                tokio::select! {
                    () = self.another_is_shown(AGAIN.max(token.lasts.unwrap_or_default() / 20), GLANCE) => (),
                    () = self.due.notified() => (),
                }
            }
            got => self.set(got),
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::collections::BTreeSet;
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::config::Config;

    fn token(lasts: Option<Duration>) -> Arc<Token> {
        Arc::new(Token { secret: SecretString::from("s.it"), got: Instant::now(), lasts, renewable: false })
    }

    /// A login at an address where nobody listens, by a token file.
    fn login(directory: &std::path::Path) -> Login {
        let at = directory.display();
        let text = format!(
            "version = \"v1\"\n[keyring]\ncluster = \"test\"\nstate = \"{at}\"\n[[provider]]\nname = \"vault\"\n\
             type = \"transit\"\naddress = \"https://127.0.0.1:1\"\nkey = \"kek\"\n\
             auth = {{ method = \"token\", token-file = \"{at}/token\" }}\n"
        );
        for (file, text) in [("token", "s.another"), ("trousseau.toml", &text)] {
            fs::write(directory.join(file), text).unwrap();
            fs::set_permissions(directory.join(file), fs::Permissions::from_mode(0o600)).unwrap();
        }
        let config = Config::load(&directory.join("trousseau.toml")).unwrap();
        let config = config.transit().next().unwrap();
        let state = Arc::new(State::open(directory).unwrap());
        Login::new(config, "it".into(), &Arc::new(Client::new(config)), &state, Purpose::Serve)
    }

    #[tokio::test]
    async fn who_waits_for_a_token_to_end_hears_that_it_was_refused() {
        let directory = tempfile::tempdir().unwrap();
        let login = login(directory.path());
        let token = token(lasting(768 * 3600));
        login.set(Ok(Arc::clone(&token)));
        let refused = async {
            let soon = Instant::now() + Duration::from_millis(100);
            drop(login.replace(&token, soon).await);
        };
        let mut unwrapped = None;
        let renewed = async { tokio::join!(login.renew(&token, &mut unwrapped), refused) };
        assert!(tokio::time::timeout(Duration::from_secs(20), renewed).await.is_ok(), "it sleeps for 38 hours");
    }

    #[test]
    fn tokens_of_one_moment_are_renewed_between_half_and_two_thirds_of_their_time_and_at_different_instants() {
        let lasts = Duration::from_secs(3600);
        let instants: Vec<Duration> = (0..100)
            .map(|host: u32| {
                let secret = SecretString::from(format!("s.{}", fingerprint(&[&host.to_string()])));
                Token { secret, got: Instant::now(), lasts: Some(lasts), renewable: true }.renew_in()
            })
            .collect();
        let since = Duration::from_secs(5); // that has passed by now
        assert!(instants.iter().all(|at| (lasts / 2 - since..=lasts * 2 / 3).contains(at)), "{instants:?}");
        let minutes: BTreeSet<u64> = instants.iter().map(|at| at.as_secs() / 60).collect();
        assert!(minutes.len() >= 8, "they fall into {minutes:?}, of ten minutes");
    }

    #[test]
    fn no_lease_is_too_long_to_reckon_with() {
        for (seconds, lasts) in [
            (0, None),
            (1, Some(1)),
            (768 * 3600, Some(768 * 3600)),
            (u64::from(u32::MAX) + 1, Some(u32::MAX.into())),
            (u64::MAX, Some(u32::MAX.into())),
        ] {
            let token = token(lasting(seconds));
            assert_eq!(token.lasts, lasts.map(Duration::from_secs), "{seconds}");
            assert!(token.renew_in() <= Duration::from_secs(u32::MAX.into()), "{seconds}");
            assert!(!token.has_ended() && !token.is_capped_at(u64::MAX), "{seconds}");
        }
    }
}
