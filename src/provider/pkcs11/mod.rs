//! The provider of type `pkcs11`: KEKs in one token, or in several that are replicas of each other.
//!
//! From top to bottom: this room knows tokens and their KEKs; [`token`] keeps one connected, by its supervisor
//! thread; [`pool`] has work done by its session threads; [`link`] is what these tell each other; [`lane`] is what one
//! session does; [`mechanism`] is how a KEK wraps; [`connection`] finds a token, and [`login`] logs in to it unless its
//! PIN was refused; [`module`] loads a library. [`pace`] knows how long calls take, [`timing`] measures them without the
//! pool, [`admission`] decides which keys are KEKs, [`survey`] is what a token says of all
//! that, [`exportability`] tries to get a key out of it, and [`error`] says what failed. They are the only rooms that know
//! the cryptoki crate.

mod admission;
mod connection;
mod error;
mod exportability;
mod kek;
mod lane;
mod link;
mod login;
mod mechanism;
mod module;
mod pace;
mod pool;
mod queue;
pub mod setup;
mod survey;
mod timing;
mod token;
mod wraps;

use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, RwLock};
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use futures_util::future::join_all;
use futures_util::stream::FuturesUnordered;
use jiff::Timestamp;
use tokio::sync::Notify;
use tokio::time::timeout;

pub use self::admission::LONGEST_WAIT;
use self::admission::{Admitted, KekSpec};
use self::connection::Address;
pub use self::exportability::{Like, Outcome, ThrowAway, Trial, Trials};
use self::kek::Pkcs11Kek;
use self::lane::Inventory;
use self::link::SILENCE;
pub use self::login::Retry;
pub use self::module::leave;
pub use self::survey::{KeyFacts, ModeFacts, ModuleFacts, Survey, TokenFacts, Value};
pub use self::timing::Operation;
use self::token::Token;
use self::wraps::WrapCounter;
use super::{Answer, Kek, KekError, Provider, Rank, Refused, Sighting};
use crate::config::{Exportable, Mode, ProviderConfig, TokenUri};
use crate::identity::Identity;
use crate::runtime::Leader;
use crate::state::State;
use crate::sync::{lock, write};

/// How long the end waits for calls into the module.
const PATIENCE: Duration = Duration::from_secs(3);

/// Tokens that hold the same KEKs. Its threads end when it is dropped.
pub struct Pkcs11 {
    name: String,
    modes: Vec<Mode>,
    exportable: Exportable,
    tokens: Vec<Arc<Token>>,
    state: Arc<State>,
    changed: Arc<Notify>,
    /// Every KEK seen so far; it keeps its counter from one look to the next.
    keks: Mutex<HashMap<Identity, Arc<Pkcs11Kek>>>,
}

/// A KEK that was made: what its maker wants to know.
#[derive(Clone, Debug)]
pub struct Generated {
    /// Its identity.
    pub identity: Identity,
    /// CKA_ID.
    pub id: Vec<u8>,
    /// When it becomes active.
    pub not_before: Timestamp,
    /// How it wraps.
    pub mode: Mode,
    /// The tokens that hold it.
    pub held_by: Vec<String>,
    /// The way by which a key like it comes out of its token, where the policy puts up with that.
    pub way_out: Option<String>,
}

/// Allows one more try of the PIN for each token of a provider, if it is held back: the token as people know it, and
/// what was done, or why nothing could be. No token is logged in to.
pub fn allow_pin_retry(
    provider: &ProviderConfig,
    state: &Arc<State>,
    final_try_ok: bool,
) -> Vec<(String, Result<Retry, String>)> {
    let allow = |uri: &TokenUri| {
        let done = Address::new(uri.clone(), provider, state).allow_retry(final_try_ok);
        (format!("token {uri} of provider {}", provider.name), done)
    };
    provider.tokens.iter().map(allow).collect()
}

/// What is wrong with a token, and what to do.
pub type Complaint = (String, &'static str);

/// What is known of the PIN of each token of a provider without a login: the token as people know it, and what is wrong,
/// each with what to do, or why nothing is known.
pub fn pin_states(provider: &ProviderConfig, state: &Arc<State>) -> Vec<(String, Result<Vec<Complaint>, String>)> {
    let look = |uri: &TokenUri| {
        (format!("token {uri} of provider {}", provider.name), Address::new(uri.clone(), provider, state).pin_state())
    };
    provider.tokens.iter().map(look).collect()
}

impl Pkcs11 {
    /// Begins to connect to the tokens; this returns before any of them has answered.
    ///
    /// # Errors
    /// The operating system gives no thread.
    pub fn new(config: &ProviderConfig, state: &Arc<State>, leader: &Leader) -> std::io::Result<Self> {
        let changed = Arc::new(Notify::new());
        let start = |uri: &TokenUri| Token::start(uri.clone(), config, state, leader, Arc::clone(&changed));
        let tokens = config.tokens.iter().map(start).collect::<Result<_, _>>()?;
        let (name, modes) = (config.name.clone(), config.profile.modes.clone());
        let exportable = config.exportable;
        Ok(Self { name, modes, exportable, tokens, state: Arc::clone(state), changed, keks: Mutex::default() })
    }

    /// Waits until every token was tried once.
    ///
    /// # Errors
    /// Why the first one that is out of reach is.
    pub async fn reach_every_token(&self) -> Result<(), KekError> {
        self.every_first_attempt().await;
        self.tokens.iter().try_for_each(|token| token.link.check())
    }

    async fn every_first_attempt(&self) {
        join_all(self.tokens.iter().map(|token| token.link.first_attempt())).await;
    }

    /// The activation instant of the newest KEK, if there is one.
    ///
    /// # Errors
    /// No token is within reach.
    pub async fn newest(&self, deadline: Instant) -> Result<Option<Timestamp>, KekError> {
        let sighting = self.look(deadline).await?;
        Ok(sighting.keks.iter().map(|kek| kek.rank().not_before).max())
    }

    /// Makes a KEK that becomes active at `not_before`, in the first token. `mode`: the profile's first, if `None`.
    ///
    /// # Errors
    /// The mode is not one of the profile's, or the token does not do it; nothing is left behind then.
    pub async fn generate(
        &self,
        not_before: Timestamp,
        mode: Option<Mode>,
        deadline: Instant,
    ) -> Result<Generated, KekError> {
        let refused = |what: String| KekError::Refused(format!("provider {}: {what}", self.name));
        let mode = mode.or(self.modes.first().copied()).filter(|mode| self.modes.contains(mode));
        let mode = mode.ok_or_else(|| {
            refused(format!(
                "its profile knows only {}",
                self.modes.iter().map(|mode| mode.as_str()).collect::<Vec<_>>().join(", ")
            ))
        })?;
        let first = self.tokens.first().ok_or_else(|| refused("it has no token".into()))?;
        let id = admission::new_id(not_before).map_err(|error| refused(error.to_string()))?;
        let rank = Rank { not_before, id: id.to_vec() };
        let kek = first.rules.spec_of(&Admitted { rank, mode, exception: None });
        let template = kek.clone();
        let way_out = first.run(deadline, move |lane| exportability::way_out(lane, mode)).await?;
        if let Some(way) = way_out.as_ref().filter(|_| self.exportable == Exportable::Refuse) {
            return Err(refused(format!(
                "a key that may not leave its token does: {way}: use another token; `[policy] exportable` has the last word"
            )));
        }
        first.run(deadline, move |lane| lane.generate(&template)).await?;
        let sighting = self.look(deadline).await?;
        let made = sighting.keks.iter().find(|made| made.identity() == kek.identity);
        let Some(held_by) = made.map(|made| made.held_by()) else {
            let named = sighting.refused.into_iter().find(|refused| refused.identity == Some(kek.identity));
            let reason = named.map_or("it is not to be found".into(), |refused| refused.reason);
            let (spec, id) = (kek.clone(), kek.identity);
            let left = match first.run(deadline, move |lane| lane.remove(&spec)).await {
                Ok(()) => "it was removed again".to_owned(),
                Err(error) => format!("it could not be removed again: {error}"),
            };
            return Err(refused(format!("KEK {id} was made and does not work: {reason}; {left}")));
        };
        Ok(Generated { identity: kek.identity, id: kek.id, not_before, mode, held_by, way_out })
    }

    /// What one token holds.
    async fn look_at(&self, token: &Arc<Token>, deadline: Instant) -> Result<Inventory, KekError> {
        let of = Arc::clone(token);
        let _not_again_yet = timeout(SILENCE, token.link.first_attempt()).await;
        // Its replica's look must not wait for one from which nothing comes back.
        let deadline = if token.is_sick() { deadline.min(Instant::now() + SILENCE) } else { deadline };
        token.run(deadline, move |lane| lane.look(&of.rules, Timestamp::now())).await
    }

    async fn look_at_every_token(&self, deadline: Instant) -> Result<Sighting, KekError> {
        let mut found: HashMap<Identity, (KekSpec, Rank, Vec<Arc<Token>>)> = HashMap::new();
        let (mut refused, mut exceptions) = (Vec::new(), Vec::new());
        let mut out_of_reach = Vec::new();
        let looks = join_all(self.tokens.iter().map(|token| self.look_at(token, deadline))).await;
        for (token, look) in self.tokens.iter().zip(looks) {
            let inventory = match look {
                Ok(inventory) => inventory,
                Err(error) => {
                    out_of_reach.push(error);
                    continue;
                }
            };
            let place =
                |refusal: Refused| Refused { key: format!("{} on {}", refusal.key, token.link.name), ..refusal };
            refused.extend(inventory.refused.into_iter().map(place));
            for kek in inventory.keks {
                let name = token.rules.spec_of(&kek);
                exceptions
                    .extend(kek.exception.map(|why| format!("KEK {} on {}: {why}", name.identity, token.link.name)));
                let place = found.entry(name.identity).or_insert_with(|| (name, kek.rank, Vec::new()));
                place.2.push(Arc::clone(token));
            }
        }
        if out_of_reach.len() == self.tokens.len()
            && let Some(error) = out_of_reach.pop()
        {
            return Err(error);
        }
        let out_of_reach = out_of_reach.iter().map(ToString::to_string).collect();
        let mut incomplete = Vec::new();
        for (kek, _, holders) in found.values() {
            let lacks = |token: &&Arc<Token>| {
                token.link.check().is_ok() && !holders.iter().any(|holder| Arc::ptr_eq(holder, token))
            };
            let gap = |token: &Arc<Token>| format!("{} lacks KEK {}: clone it there", token.link.name, kek.identity);
            incomplete.extend(self.tokens.iter().filter(lacks).map(gap));
        }
        let keks = found.into_values().map(|(name, rank, holders)| self.known(name, rank, holders)).collect();
        Ok(Sighting { keks, refused, out_of_reach, incomplete, exceptions })
    }

    /// The KEK of this name, with the tokens that now hold it.
    fn known(&self, spec: KekSpec, rank: Rank, holders: Vec<Arc<Token>>) -> Arc<dyn Kek> {
        let mut keks = self.keks();
        let kek = keks.entry(spec.identity).or_insert_with(|| {
            let wraps = Arc::new(WrapCounter::new(&spec, Arc::clone(&self.state)));
            Arc::new(Pkcs11Kek { spec: Arc::new(spec), rank, wraps, holders: RwLock::default() })
        });
        *write(&kek.holders) = holders;
        Arc::clone(kek) as Arc<dyn Kek>
    }

    fn keks(&self) -> MutexGuard<'_, HashMap<Identity, Arc<Pkcs11Kek>>> {
        lock(&self.keks)
    }
}

impl Drop for Pkcs11 {
    fn drop(&mut self) {
        // A library must not be unloaded, as at the end of the process, under a thread that is inside it.
        for token in &self.tokens {
            if !token.close(PATIENCE) {
                tracing::warn!(token = %token.link.name, "a call into the module does not return");
            }
        }
    }
}

impl Provider for Pkcs11 {
    fn name(&self) -> &str {
        &self.name
    }

    fn settled(&self) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        Box::pin(async {
            let tried = |token: &Arc<Token>| {
                let token = Arc::clone(token);
                async move {
                    token.link.first_attempt().await;
                    token.link.check().is_ok()
                }
            };
            let mut tried: FuturesUnordered<_> = self.tokens.iter().map(tried).collect();
            while tried.next().await == Some(false) {}
        })
    }

    fn look(&self, deadline: Instant) -> Answer<'_, Sighting> {
        Box::pin(self.look_at_every_token(deadline))
    }

    fn hopeless(&self) -> Option<String> {
        let somebody_serves = self.tokens.iter().any(|token| token.check().is_ok());
        if somebody_serves { None } else { self.tokens.iter().find_map(|token| token.hopeless()) }
    }

    fn changed(&self) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        Box::pin(self.changed.notified())
    }
}
