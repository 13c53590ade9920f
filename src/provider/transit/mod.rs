//! The provider of type `transit`: KEKs are the versions of one key of Vault's or OpenBao's Transit secrets engine.
//!
//! From top to bottom: this room knows the key and its versions ([`key`]); each is a [`kek`]; [`link`] makes calls with
//! a token, again where that helps, and knows whether anybody answers; [`auth`] gets that token and keeps it fresh;
//! [`fault`] is what an answer means; [`client`] is HTTP, and [`index`] how far a node has come.

mod auth;
mod client;
mod fault;
mod index;
mod kek;
mod key;
mod link;
mod survey;

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use jiff::{SignedDuration, Timestamp};
use sha2::{Digest, Sha256};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use zeroize::Zeroizing;

use self::auth::Login;
use self::client::Client;
use self::fault::Data;
use self::kek::TransitKek;
use self::key::{Key, Version};
use self::link::{Ask, Link};
pub use self::survey::Survey;
use super::{Answer, Kek, KekError, Pace, Provider, Refused, Sighting, Vitals};
use crate::config::{Exportable, TransitConfig};
use crate::envelope::WrapAlgorithm;
use crate::identity::Identity;
use crate::legacy::Ciphertext;
use crate::secret::Plaintext;
use crate::state::{SeenKey, State};
use crate::sync::lock;

/// While Vault is out of reach, it is tried after so long, then after twice as long, and so on.
const FIRST_TRY: Duration = Duration::from_millis(250);
const LAST_TRY: Duration = Duration::from_secs(2);
/// How long such a try may take.
const PATIENCE: Duration = Duration::from_secs(3);
/// A look that cost a request each 60 s and a round trip each 5 min costs less than 2,100 requests a day.
const LOOK: Duration = Duration::from_secs(60);
const UNWELL: Duration = Duration::from_secs(2);
const PROBE: Duration = Duration::from_secs(300);
/// Who wants a shorter delay has a new version looked for so often within it, since all hosts must know it in time.
const LOOKS_IN_DELAY: u32 = 3;
const SHORTEST_LOOK: Duration = Duration::from_secs(1);

/// Who logs in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// The plugin that serves, which alone may open a wrapped secret id: that can be done once.
    Serve,
    /// A command.
    Look,
}

/// A key of Transit. Its task ends when it is dropped.
pub struct Transit {
    core: Arc<Core>,
    task: JoinHandle<()>,
}

struct Core {
    name: String,
    key: String,
    rotation: String,
    delay: SignedDuration,
    exportable: Exportable,
    /// What its files in the state directory are called.
    file: String,
    state: Arc<State>,
    link: Arc<Link>,
    /// What the key's server said last.
    last: Mutex<Option<Key>>,
    tried: watch::Sender<bool>,
}

impl Transit {
    /// Begins to log in; this returns before anybody has answered. To be called within a runtime.
    #[must_use]
    pub fn new(config: &TransitConfig, state: &Arc<State>, purpose: Purpose) -> Self {
        let hash = Sha256::digest([config.name.as_bytes(), b"\0", config.key.as_bytes()].concat());
        let file = base16ct::lower::encode_string(hash.get(..8).unwrap_or_default());
        let client = Arc::new(Client::new(config));
        let login = Login::new(config, file.clone(), &client, state, purpose);
        let core = Arc::new(Core {
            name: config.name.clone(),
            key: config.key.clone(),
            rotation: config.rotation(),
            delay: config.activation_delay,
            exportable: config.exportable,
            file,
            state: Arc::clone(state),
            link: Arc::new(Link::new(config, client, login)),
            last: Mutex::default(),
            tried: watch::Sender::new(false),
        });
        let task = tokio::spawn({
            let core = Arc::clone(&core);
            async move {
                tokio::join!(core.link.login.keep(), core.keep_trying(), core.try_once());
            }
        });
        Self { core, task }
    }
}

impl Transit {
    /// The key, as people find it.
    #[must_use]
    pub fn place(&self) -> String {
        self.core.link.place()
    }

    /// What its server says of itself, and lets us do.
    ///
    /// # Errors
    /// It cannot be asked.
    pub async fn survey(&self, deadline: Instant) -> Result<Survey, KekError> {
        survey::survey(&self.core.link, deadline).await
    }
}

impl Drop for Transit {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Core {
    /// The first look shows whether Vault is there.
    async fn try_once(&self) {
        drop(self.read(Instant::now() + PATIENCE).await);
        self.tried.send_replace(true);
    }

    /// Each time Vault is lost, tries until it is back. Never returns.
    async fn keep_trying(&self) {
        loop {
            self.link.opened.notified().await;
            let mut wait = FIRST_TRY;
            while self.link.check().is_err() {
                tokio::select! {
                    () = tokio::time::sleep(wait) => (),
                    () = self.link.login.succeeds() => (),
                }
                wait = (wait * 2).min(LAST_TRY);
                drop(self.read(Instant::now() + PATIENCE).await);
            }
            self.link.changed.notify_one();
        }
    }

    /// What the key's server says of it.
    async fn read(&self, deadline: Instant) -> Result<Key, KekError> {
        let answer = self.link.try_ask(Ask::Read, Zeroizing::default(), deadline).await?;
        let Data { data: key } = answer.read::<Data<Key>>().map_err(|fault| {
            KekError::Unavailable(format!("provider {}: {}: {fault:?}", self.name, self.link.place()))
        })?;
        Ok(key)
    }

    async fn look(&self, deadline: Instant) -> Result<Sighting, KekError> {
        self.link.check()?;
        let key = self.read(deadline).await?;
        let key = key.with_newer_of(lock(&self.last).as_ref());
        let seen = self.state.seen_key(&self.file).map_err(|error| {
            KekError::Refused(format!("{error}: {}", error.remedy())) // who cannot remember cannot recognise
        })?;
        let mut sighting = Sighting::default();
        if let Some(reason) = self.why_not(&key, seen.as_ref()) {
            sighting.refused = self.all_refused(&key, seen.as_ref(), &reason);
            return Ok(sighting);
        }
        let now = key.seen(&self.key, seen.as_ref());
        if seen.as_ref() != Some(&now) {
            self.state.keep_seen_key(&self.file, now.clone());
        }
        sighting.keks = key.versions().into_iter().map(|version| self.kek(&key, version)).collect();
        sighting.refused = key.disallowed(&now).map(|version| self.disallowed(version)).collect();
        sighting.exceptions = key.way_out().map(|way| format!("{}: {way}", self.link.place())).into_iter().collect();
        *lock(&self.last) = Some(key);
        Ok(sighting)
    }

    /// Whoever writes etcd chooses the version of an old ciphertext: one that the key does not have is not waited for.
    async fn decrypt_old(&self, old: &Ciphertext, deadline: Instant) -> Result<Plaintext, KekError> {
        let has_it = |key: &Key| key.reaches(old.version());
        if !lock(&self.last).as_ref().is_some_and(has_it) {
            self.link.check()?;
            if !has_it(&self.read(deadline).await?) {
                return Err(KekError::BadInput);
            }
        }
        kek::decrypt_old(&self.link, old, deadline).await
    }

    fn kek(&self, key: &Key, version: Version) -> Arc<dyn Kek> {
        Arc::new(TransitKek {
            identity: self.identity(version),
            rank: version.rank(self.delay),
            version,
            attributes: key.attributes(),
            link: Arc::clone(&self.link),
        })
    }

    fn identity(&self, version: Version) -> Identity {
        Identity::of_transit(&self.key, version.number, version.created)
    }

    /// Why the whole key is not used.
    fn why_not(&self, key: &Key, seen: Option<&SeenKey>) -> Option<String> {
        let Some((number, then, now)) = seen.and_then(|seen| key.contradicts(seen)) else {
            return key.unfit(self.exportable);
        };
        let instant = |second| Timestamp::from_second(second).map(|at| at.to_string()).unwrap_or_default();
        Some(format!(
            "it was deleted and made anew under the same name, or restored from another one: version {number} was made at \
             {}, and the one that is there now at {}. What was wrapped under the old one cannot be read with this. Bring \
             the old one back (`vault write transit/restore/…`); if nothing is stored under it, remove {}",
            instant(then),
            instant(now),
            self.state.seen_key_file(&self.file).display()
        ))
    }

    /// Each version that is there or was, so that who decrypts hears the reason too.
    fn all_refused(&self, key: &Key, seen: Option<&SeenKey>, reason: &str) -> Vec<Refused> {
        let mut versions: BTreeMap<u32, i64> =
            key.versions().iter().map(|version| (version.number, version.created)).collect();
        versions.extend(seen.iter().flat_map(|seen| &seen.versions));
        let refused = |identity, key| Refused { key, identity, reason: reason.to_owned(), is_ambiguous: false };
        if versions.is_empty() {
            return vec![refused(None, format!("key {}", self.link.place()))];
        }
        let of = |(number, created)| {
            let identity = self.identity(Version { number, created });
            refused(Some(identity), format!("version {number} of key {}", self.link.place()))
        };
        versions.into_iter().map(of).collect()
    }

    fn disallowed(&self, version: Version) -> Refused {
        Refused {
            key: format!("version {} of key {}", version.number, self.link.place()),
            identity: Some(self.identity(version)),
            reason: "it is below the key's min_decryption_version: lower that, if something is stored under it".into(),
            is_ambiguous: false,
        }
    }
}

impl Provider for Transit {
    fn name(&self) -> &str {
        &self.core.name
    }

    fn longest_algorithm(&self) -> WrapAlgorithm {
        WrapAlgorithm::Transit
    }

    fn how_to_rotate(&self) -> String {
        self.core.rotation.clone()
    }

    /// Its KEKs are versions of one key, which is refused as a whole.
    fn how_to_begin(&self) -> Option<String> {
        None
    }

    fn pace(&self) -> Pace {
        let within = self.core.delay.unsigned_abs() / LOOKS_IN_DELAY;
        // With no delay at all, nobody counts on an instant.
        let look = if within.is_zero() { LOOK } else { within.clamp(SHORTEST_LOOK, LOOK) };
        Pace { look, unwell: UNWELL, probe: PROBE }
    }

    fn settled(&self) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        Box::pin(async {
            // The sender lives as long as this.
            drop(self.core.tried.subscribe().wait_for(|tried| *tried).await);
        })
    }

    fn look(&self, deadline: Instant) -> Answer<'_, Sighting> {
        Box::pin(self.core.look(deadline))
    }

    fn vitals(&self) -> Vec<Vitals> {
        vec![self.core.link.vitals()]
    }

    fn decrypt_old(&self, old: Ciphertext, deadline: Instant) -> Answer<'_, Plaintext> {
        Box::pin(async move { self.core.decrypt_old(&old, deadline).await })
    }

    fn hopeless(&self) -> Option<String> {
        None
    }

    fn changed(&self) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        Box::pin(self.core.link.changed.notified())
    }
}
