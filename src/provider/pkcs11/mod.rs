//! The provider of type `pkcs11`: KEKs in one token, or in several that are replicas of each other.
//!
//! From top to bottom: this room knows tokens and their KEKs; [`token`] keeps one connected, by its supervisor thread;
//! [`pool`] has work done by its session threads; [`link`] is what these tell each other; [`lane`] is what one session
//! does, and [`inventory`] what it finds under the KEKs' label; [`mechanism`] is how a KEK wraps ([`oaep`] if it is
//! two RSA pairs), and [`raw`] what cryptoki cannot name of that; [`address`] finds a token by what [`slots`] say, and
//! [`login`] logs in to it unless its PIN was refused ([`tries`]); a [`connection`] comes of that; [`module`] loads a
//! library. [`pace`] knows how long calls take, [`timing`] measures them without the pool, [`admission`] decides which
//! keys are KEKs, [`generation`] makes one, [`attributes`] is what is said of them, [`survey`] is what a token says of
//! all that, [`exportability`] tries to get a key out of it, and [`error`] says what failed. They are the only rooms
//! that know the cryptoki crate.

mod address;
mod admission;
mod attributes;
mod connection;
mod error;
mod exportability;
mod generation;
mod halves;
mod inventory;
mod job;
mod kek;
mod lane;
mod link;
mod login;
mod mechanism;
mod module;
mod oaep;
mod pace;
mod pool;
mod queue;
mod raw;
pub mod setup;
mod slots;
mod survey;
mod timing;
mod token;
mod tries;
mod wraps;

use std::collections::{BTreeSet, HashMap};
use std::future::Future;
use std::mem;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, RwLock, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use futures_util::future::join_all;
use futures_util::stream::FuturesUnordered;
use tokio::sync::Notify;
use tokio::time::timeout;

use self::address::Address;
use self::admission::KekSpec;
pub use self::admission::LONGEST_WAIT;
pub use self::exportability::{Like, Outcome, ThrowAway, Trial, Trials, TriedOn};
pub use self::generation::{Generated, Left, NotGenerated, Plan};
use self::inventory::{Candidate, Inventory};
use self::kek::{Pkcs11Kek, Places};
use self::link::SILENCE;
pub use self::login::Retry;
pub use self::module::leave;
pub use self::survey::{KeyFacts, ModeFacts, ModuleFacts, Survey, TokenFacts};
pub use self::timing::Operation;
use self::token::Token;
use self::wraps::WrapCounter;
use super::{Answer, Kek, KekError, Provider, Rank, Refused, Sighting, Vitals};
use crate::config::{Exportable, Mode, Pkcs11Config, TokenUri};
use crate::envelope::WrapAlgorithm;
use crate::identity::Identity;
use crate::runtime::Leader;
use crate::state::State;
use crate::sync::{lock, read, write};

/// How long the end waits for calls into the module.
const PATIENCE: Duration = Duration::from_secs(3);
/// How long `pin retry` waits for a token: longer than another login of this host may take.
const RETRY_PATIENCE: Duration = Duration::from_secs(15);

/// KEKs that a look has found, and where.
type Found = HashMap<Identity, (KekSpec, Rank, Places)>;

/// Tokens that hold the same KEKs. Its threads end when it is dropped.
pub struct Pkcs11 {
    name: String,
    modes: Vec<Mode>,
    longest_algorithm: WrapAlgorithm,
    exportable: Exportable,
    tokens: Vec<Arc<Token>>,
    state: Arc<State>,
    changed: Arc<Notify>,
    /// Every KEK seen so far; it keeps its counter from one look to the next.
    keks: Mutex<HashMap<Identity, Arc<Pkcs11Kek>>>,
}

/// Allows one more try of the PIN for each token of a provider, if it is held back: the token as people know it, and
/// what was done, or why nothing could be. No token is logged in to.
pub fn allow_pin_retry(
    provider: &Pkcs11Config,
    state: &Arc<State>,
    final_try_ok: bool,
) -> Vec<(String, Result<Retry, String>)> {
    let allow = |uri: &TokenUri| {
        let address = Address::new(uri.clone(), provider, state);
        let done = in_time(RETRY_PATIENCE, move || address.allow_retry(final_try_ok));
        (format!("token {uri} of provider {}", provider.name), done.and_then(|done| done))
    };
    provider.tokens.iter().map(allow).collect()
}

/// Does what calls into a module, and does not wait longer than so long: a call that hangs keeps its thread.
fn in_time<T: Send + 'static>(limit: Duration, work: impl FnOnce() -> T + Send + 'static) -> Result<T, String> {
    let (done, answer) = mpsc::channel();
    let work = move || drop(done.send(work()));
    thread::Builder::new().name("token".into()).spawn(work).map_err(|error| format!("no thread: {error}"))?;
    answer.recv_timeout(limit).map_err(|_| {
        let what = "its module has not answered for";
        format!("{what} {} s: see that the HSM and what leads to it are well, then try again", limit.as_secs())
    })
}

/// What is wrong with a token, and what to do.
pub type Complaint = (String, &'static str);

/// What is known of the PIN of each token of a provider without a login: the token as people know it, and what is wrong,
/// each with what to do, or why nothing is known.
pub fn pin_states(provider: &Pkcs11Config, state: &Arc<State>) -> Vec<(String, Result<Vec<Complaint>, String>)> {
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
    pub fn new(config: &Pkcs11Config, state: &Arc<State>, leader: &Leader) -> std::io::Result<Self> {
        let changed = Arc::new(Notify::new());
        let (name, modes) = (config.name.clone(), config.profile.modes.clone());
        let (longest_algorithm, exportable) = (config.longest_algorithm(), config.exportable);
        let (tokens, keks) = (Vec::with_capacity(config.tokens.len()), Mutex::default());
        let (state, started) = (Arc::clone(state), Arc::clone(&changed));
        let mut provider = Self { name, modes, longest_algorithm, exportable, tokens, state, changed, keks };
        // When one cannot be started, those before it are closed with the provider.
        for uri in &config.tokens {
            let token = Token::start(uri.clone(), config, &provider.state, leader, Arc::clone(&started))?;
            provider.tokens.push(token);
        }
        Ok(provider)
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

    /// What one token holds.
    async fn look_at(&self, token: &Arc<Token>, deadline: Instant) -> Result<Inventory, KekError> {
        let of = Arc::clone(token);
        let _not_again_yet = timeout(SILENCE, token.link.first_attempt()).await;
        // Its replica's look must not wait for one from which nothing comes back.
        let deadline = if token.is_sick() { deadline.min(Instant::now() + SILENCE) } else { deadline };
        let mut is_last = false;
        token.run(deadline, move |lane| lane.look(&of.rules, deadline, mem::replace(&mut is_last, true))).await
    }

    async fn look_at_every_token(&self, deadline: Instant) -> Result<Sighting, KekError> {
        let (mut found, mut ids) = (Found::new(), BTreeSet::new());
        let (mut refused, mut exceptions) = (Vec::new(), Vec::new());
        let (mut looked_at, mut out_of_reach, mut unheard) = (Vec::new(), Vec::new(), Vec::new());
        let looks = join_all(self.tokens.iter().map(|token| self.look_at(token, deadline))).await;
        for (token, look) in self.tokens.iter().zip(looks) {
            let inventory = match look {
                Ok(inventory) => inventory,
                Err(error) => {
                    if matches!(error, KekError::Busy(_) | KekError::Deadline(_)) {
                        unheard.push(token);
                    }
                    out_of_reach.push(error);
                    continue;
                }
            };
            looked_at.push(token);
            let place =
                |refusal: Refused| Refused { key: format!("{} on {}", refusal.key, token.link.name), ..refusal };
            refused.extend(inventory.refused.into_iter().map(place));
            ids.extend(inventory.ids);
            for Candidate { kek, attributes, .. } in inventory.keks {
                let name = token.rules.spec_of(&kek);
                exceptions
                    .extend(kek.exception.map(|why| format!("KEK {} on {}: {why}", name.identity, token.link.name)));
                let (_, _, places) = found.entry(name.identity).or_insert_with(|| (name, kek.rank, Places::default()));
                places.holders.push((Arc::clone(token), attributes));
            }
        }
        if out_of_reach.len() == self.tokens.len()
            && let Some(error) = out_of_reach.pop()
        {
            return Err(error);
        }
        let out_of_reach: Vec<String> = out_of_reach.iter().map(ToString::to_string).collect();
        if out_of_reach.is_empty() {
            refused.extend(self.nowhere(&ids));
        }
        self.keep_what_is_known_of(&unheard, &mut found);
        for (_, _, places) in found.values_mut() {
            let lacks = |token: &Arc<Token>| !places.holders.iter().any(|(holder, _)| Arc::ptr_eq(holder, token));
            places.lacking = looked_at.iter().filter(|token| lacks(token)).map(|token| Arc::clone(token)).collect();
        }
        let keks = found.into_values().map(|(name, rank, places)| self.known(name, rank, places)).collect();
        Ok(Sighting { keks, refused, out_of_reach, exceptions })
    }

    /// Leaves the KEKs of tokens that were only too busy or too slow for this look where they were.
    fn keep_what_is_known_of(&self, unheard: &[&Arc<Token>], found: &mut Found) {
        let place = |token: &Arc<Token>| self.tokens.iter().position(|own| Arc::ptr_eq(own, token));
        for kek in self.keks().values() {
            let mut kept = read(&kek.places).holders.clone();
            kept.retain(|(holder, _)| unheard.iter().any(|token| Arc::ptr_eq(holder, token)));
            if !kept.is_empty() {
                let anew = || (KekSpec::clone(&kek.spec), kek.rank.clone(), Places::default());
                let (_, _, places) = found.entry(kek.spec.identity).or_insert_with(anew);
                places.holders.extend(kept);
                places.holders.sort_by_key(|(holder, _)| place(holder));
            }
        }
    }

    /// The keys that the configuration admits, and that no token shows. By CKA_ID, which is all that the configuration
    /// says of one: the identity of a pair hangs on its public keys as well.
    fn nowhere(&self, shown: &BTreeSet<Vec<u8>>) -> Vec<Refused> {
        let admitted = self.tokens.iter().take(1).flat_map(|token| token.rules.admitted.keys());
        let absent = admitted.filter(|id| !shown.contains(*id));
        let reason = "no token has it: bring it back, or remove its [[provider.kek]]";
        absent
            .map(|id| Refused {
                key: format!("key {} of provider {}", base16ct::lower::encode_string(id), self.name),
                identity: Some(Identity::of_pkcs11(id)),
                reason: reason.into(),
                is_ambiguous: false,
            })
            .collect()
    }

    /// The KEK of this name, with the places where it is now.
    fn known(&self, spec: KekSpec, rank: Rank, places: Places) -> Arc<dyn Kek> {
        let mut keks = self.keks();
        let kek = keks.entry(spec.identity).or_insert_with(|| {
            let wraps = Arc::new(WrapCounter::new(&spec, Arc::clone(&self.state)));
            Arc::new(Pkcs11Kek { spec: Arc::new(spec), rank, wraps, places: RwLock::default() })
        });
        *write(&kek.places) = places;
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

    fn longest_algorithm(&self) -> WrapAlgorithm {
        self.longest_algorithm
    }

    fn how_to_rotate(&self) -> String {
        format!("trousseau key generate --provider {}", self.name)
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

    fn vitals(&self) -> Vec<Vitals> {
        self.tokens.iter().map(|token| token.vitals()).collect()
    }

    fn hopeless(&self) -> Option<String> {
        let somebody_serves = self.tokens.iter().any(|token| token.check().is_ok());
        if somebody_serves { None } else { self.tokens.iter().find_map(|token| token.hopeless()) }
    }

    fn changed(&self) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        Box::pin(self.changed.notified())
    }
}
