//! The keyring: every KEK that this configuration can reach. It is the only room that chooses a key.
//!
//! One KEK of each provider that seals is active and wraps new DEKs; all others only unwrap. Which one is active
//! follows from the KEKs themselves ([`activation`]); the active ones together are the key set, whose hash is the
//! `key_id`. What was refused before any token call, and why, is decided here and in [`crate::envelope`].

pub mod activation;
mod concerns;
mod description;
mod errors;
mod flights;
mod gaps;
mod looks;
mod member;
mod old;
mod opening;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use futures_util::future::join_all;
use jiff::{SignedDuration, Timestamp};
use tokio::sync::watch;

pub use self::concerns::Reminder;
pub use self::description::{KekDescription, KekState};
pub use self::errors::KeyringError;
use self::flights::Flights;
use self::gaps::Gaps;
pub use self::looks::LOOK_SOON;
use self::looks::Looks;
use self::member::{ActiveKek, Member};
use self::opening::{Sealed, share};
use crate::config::{KeyringConfig, Legacy, SealUnder};
use crate::envelope::{self, Recipient, WrapAlgorithm};
use crate::health::{Health, Work};
use crate::identity::{Identity, KeySet};
use crate::provider::{KekError, Provider};
use crate::secret::{Dek, Plaintext};
use crate::state::{Mark, State};

/// Every KEK of the configuration. Shared by reference between tasks.
pub struct Keyring {
    cluster: String,
    seal_under: SealUnder,
    max_age: Option<SignedDuration>,
    members: Vec<Member>,
    legacy: Option<Legacy>,
    state: Arc<State>,
    /// Whether it moves this host's marks. One that is only tried must not: it may never serve.
    serves: AtomicBool,
    health: Health,
    gaps: Gaps,
    decrypts: Flights<Sealed, Result<Plaintext, KeyringError>>,
    /// Held while a look is under way, so that there is one at a time.
    looks: tokio::sync::Mutex<Looks>,
    /// Whether the first look has ended. Told anew when it has ended at one of the providers.
    has_looked: watch::Sender<bool>,
}

/// The KEKs that wrap new DEKs at one moment.
pub struct ActiveSet {
    /// Its hash, whose text is the `key_id`.
    pub key_set: KeySet,
    keks: Vec<ActiveKek>,
}

impl Keyring {
    /// A keyring over these providers, each with whether it seals, in the order in which Decrypt takes them; with what
    /// it reads of older plugins'.
    #[must_use]
    pub fn new(
        config: &KeyringConfig,
        legacy: Option<Legacy>,
        providers: Vec<(Box<dyn Provider>, bool)>,
        state: Arc<State>,
    ) -> Self {
        Self {
            cluster: config.cluster.clone(),
            seal_under: config.seal_under,
            max_age: config.max_age,
            members: providers.into_iter().map(|(provider, seals)| Member::new(provider, seals)).collect(),
            legacy,
            state,
            serves: AtomicBool::new(false),
            health: Health::default(),
            gaps: Gaps::default(),
            decrypts: Flights::new(),
            looks: tokio::sync::Mutex::default(),
            has_looked: watch::Sender::new(false),
        }
    }

    /// From now on it serves, and remembers for this host which KEKs became active.
    pub fn begin_to_serve(&self) {
        self.serves.store(true, Ordering::Relaxed);
    }

    /// The set that is active now. Once this keyring serves, this advances the host's mark when a KEK becomes active.
    ///
    /// # Errors
    /// A provider has no KEK, or has lost the one that this host made active.
    pub fn active(&self, now: Timestamp) -> Result<ActiveSet, KeyringError> {
        self.choose(now, |member, mark| match self.serves.load(Ordering::Relaxed) {
            true => self.advance(member, mark),
            false => Ok(()),
        })
    }

    /// The set that is active now; `note` hears of each KEK that this host has not made active yet.
    fn choose(
        &self,
        now: Timestamp,
        note: impl Fn(&Member, Mark) -> Result<(), KeyringError>,
    ) -> Result<ActiveSet, KeyringError> {
        let mut keks: Vec<ActiveKek> = Vec::new();
        for member in self.members.iter().filter(|member| member.seals) {
            let (kek, new_mark) = self.active_of(member, now)?;
            if keks.iter().any(|other| other.identity == kek.identity) {
                return Err(KeyringError::NoKek(format!(
                    "KEK {} is on provider {} and on another one: replicas are `tokens` of one provider",
                    kek.identity,
                    member.provider.name()
                )));
            }
            if let Some(mark) = new_mark {
                note(member, mark)?;
            }
            keks.push(kek);
        }
        let others_make_up = self.seal_under == SealUnder::Any && keks.iter().any(|active| active.kek.is_ok());
        if let Some(Err(why)) = keks.iter().find(|active| active.is_refused).map(|active| &active.kek)
            && !others_make_up
        {
            return Err(KeyringError::NoKek(why.to_string()));
        }
        let identities: Vec<Identity> = keks.iter().map(|active| active.identity).collect();
        Ok(ActiveSet { key_set: KeySet::of(&self.cluster, &identities), keks })
    }

    /// Why nothing could be encrypted although the providers are within reach, and what to do, as of the last look; no
    /// mark is moved.
    #[must_use]
    pub fn nothing_active(&self, now: Timestamp) -> Option<String> {
        match self.choose(now, |_, _| Ok(())) {
            Err(KeyringError::NoKek(why)) => Some(why),
            _ => None,
        }
    }

    /// What will be active at this instant, as far as can be told now: with this KEK in its provider's place, if one is
    /// named. No mark is moved.
    ///
    /// # Errors
    /// See [`Keyring::active`].
    pub fn foresee(&self, at: Timestamp, kek: Option<Identity>) -> Result<KeySet, KeyringError> {
        let mut identities = Vec::new();
        for member in self.members.iter().filter(|member| member.seals) {
            let has_it = |kek: &Identity| member.seen().keks.iter().any(|seen| seen.identity() == *kek);
            identities.push(match kek.filter(has_it) {
                Some(kek) => kek,
                None => self.active_of(member, at)?.0.identity,
            });
        }
        Ok(KeySet::of(&self.cluster, &identities))
    }

    /// This key set, and of its KEKs one alone: for a trial of that KEK.
    #[must_use]
    pub fn alone(&self, key_set: KeySet, kek: Identity) -> Option<ActiveSet> {
        let find = |member: &Member| member.seen().keks.iter().find(|seen| seen.identity() == kek).map(Arc::clone);
        let found = self.members.iter().find_map(find)?;
        Some(ActiveSet {
            key_set,
            keks: vec![ActiveKek {
                provider: String::new(),
                identity: kek,
                algorithm: found.algorithm(),
                kek: Ok(found),
                is_refused: false,
            }],
        })
    }

    fn active_of(&self, member: &Member, now: Timestamp) -> Result<(ActiveKek, Option<Mark>), KeyringError> {
        let marks = self.state.marks().map_err(|error| KeyringError::NoKek(format!("{error}: {}", error.remedy())))?;
        let own: Vec<&Mark> = marks.iter().filter(|mark| self.belongs_to(mark, member)).collect();
        member.active(&own, now)
    }

    /// A mark belongs to whoever shows its KEK, since providers may be renamed; if nobody does, the name decides.
    fn belongs_to(&self, mark: &Mark, member: &Member) -> bool {
        let shown = self.members.iter().any(|member| member.shows_kek_of(mark));
        if shown { member.shows_kek_of(mark) } else { mark.provider == member.provider.name() }
    }

    /// Puts a new mark in the place of the member's.
    fn advance(&self, member: &Member, mark: Mark) -> Result<(), KeyringError> {
        tracing::info!(provider = mark.provider, kek = %mark.identity, "KEK is active");
        self.health.begins_anew(mark.identity);
        let mut marks = self.state.marks().map_err(KeyringError::internal)?;
        marks.retain(|mark| !self.belongs_to(mark, member));
        marks.push(mark);
        self.state.set_marks(marks);
        Ok(())
    }

    /// Whether Encrypt and Decrypt under this set would work, from what was last seen of its KEKs.
    ///
    /// # Errors
    /// Why they would not.
    pub fn health(&self, set: &ActiveSet) -> Result<(), KeyringError> {
        let fault = |active: &ActiveKek| match &active.kek {
            Ok(kek) => {
                kek.check().err().map(|outage| outage.to_string()).or_else(|| self.health.fault_of(active.identity))
            }
            Err(outage) => Some(outage.to_string()),
        };
        let faults: Vec<String> = set.keks.iter().filter_map(fault).collect();
        let enough = match self.seal_under {
            SealUnder::Any => faults.len() < set.keks.len(),
            SealUnder::All => faults.is_empty(),
        };
        if enough { Ok(()) } else { Err(KeyringError::Unavailable(faults.join("; "))) }
    }

    /// The key set that is active, if Encrypt and Decrypt under it would work.
    ///
    /// # Errors
    /// Why there is none, or they would not.
    pub fn well(&self, now: Timestamp) -> Result<KeySet, KeyringError> {
        let set = self.active(now)?;
        self.health(&set).map(|()| set.key_set)
    }

    /// Seals `plaintext` into an envelope of at most `limit` bytes: a DEK of its own, wrapped under every KEK of `set`.
    ///
    /// # Errors
    /// Nothing is sealed: see [`KeyringError`].
    pub async fn encrypt(
        &self,
        set: &ActiveSet,
        plaintext: &[u8],
        limit: usize,
        deadline: Instant,
    ) -> Result<Vec<u8>, KeyringError> {
        // So what fits does not depend on an outage.
        let algorithms: Vec<WrapAlgorithm> = set.keks.iter().map(|active| active.algorithm).collect();
        let limit = envelope::plaintext_limit(limit, &algorithms);
        if plaintext.is_empty() || plaintext.len() > limit {
            return Err(KeyringError::PlaintextLength { length: plaintext.len(), limit });
        }
        let dek = Arc::new(Dek::generate().map_err(KeyringError::internal)?);
        // How many of several are well, if one is enough.
        let is_usable = |active: &&ActiveKek| active.kek.as_ref().is_ok_and(|kek| kek.check().is_ok());
        let usable = match self.seal_under {
            SealUnder::Any if set.keks.len() > 1 => set.keks.iter().filter(is_usable).count(),
            _ => 0,
        };
        // One that hangs must leave time to answer without it.
        let deadline = if usable > 1 { share(deadline, 2) } else { deadline };
        // Nor is one asked that is known to be out of reach, while another is not.
        let only_usable = usable > 0;
        let wrapped = join_all(set.keks.iter().map(|active| self.wrap(active, &dek, deadline, only_usable))).await;
        let missed = Self::missed(&set.keks, &wrapped);
        let mut recipients = Vec::with_capacity(wrapped.len());
        let mut fault = None;
        for outcome in wrapped {
            match outcome {
                Ok(recipient) => recipients.push(recipient),
                Err(error) if self.seal_under == SealUnder::All => return Err(error.into()),
                Err(error) => fault = Some(error),
            }
        }
        match fault {
            Some(error) if recipients.is_empty() => return Err(error.into()),
            Some(error) => {
                tracing::debug!(%error, "sealed under fewer KEKs than are active"); // concerns tell of it
                self.count_gaps(set.key_set, &missed);
            }
            None => (),
        }
        envelope::seal(set.key_set, recipients, &dek, plaintext).map_err(KeyringError::internal)
    }

    async fn wrap(
        &self,
        active: &ActiveKek,
        dek: &Arc<Dek>,
        deadline: Instant,
        only_usable: bool,
    ) -> Result<Recipient<Vec<u8>>, KekError> {
        let kek = active.kek.as_ref().map_err(KekError::clone)?;
        if only_usable {
            kek.check()?;
        }
        let wrapped = kek.wrap_dek(Arc::clone(dek), deadline).await;
        self.health.note(active.identity, Work::Wrap, &wrapped);
        Ok(Recipient { identity: active.identity, algorithm: kek.algorithm(), wrapped: wrapped? })
    }

    /// Why providers, or some of their tokens, could not be looked at.
    #[must_use]
    pub fn outages(&self) -> Vec<String> {
        let of = |member: &Member| {
            let seen = member.seen();
            seen.outage.iter().map(KekError::to_string).chain(seen.partly_out.iter().cloned()).collect::<Vec<_>>()
        };
        self.members.iter().flat_map(of).collect()
    }
}
