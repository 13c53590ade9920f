//! The keyring: every KEK that this configuration can reach. It is the only room that chooses a key.
//!
//! One KEK of each provider that seals is active and wraps new DEKs; all others only unwrap. Which one is active
//! follows from the KEKs themselves ([`activation`]); the active ones together are the key set, whose hash is the
//! `key_id`. What was refused before any token call, and why, is decided here and in [`crate::envelope`].

pub mod activation;
mod description;
mod errors;
mod flights;
mod member;

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::{join_all, select_all};
use jiff::Timestamp;
use tokio::sync::watch;

pub use self::description::{KekDescription, KekState};
pub use self::errors::KeyringError;
use self::flights::Flights;
use self::member::{ActiveKek, Member};
use crate::config::{KeyringConfig, SealUnder};
use crate::envelope::{self, Envelope, Recipient, WrapAlgorithm};
use crate::health::Health;
use crate::identity::{Identity, KeySet};
use crate::provider::{Kek, KekError, Provider};
use crate::secret::{Dek, Plaintext};
use crate::state::{Mark, State};

/// How often the providers are asked for new KEKs.
const LOOK_EVERY: Duration = Duration::from_secs(30);
/// How often while nothing can be encrypted; and how often at most an unknown identity makes the keyring look at once.
const LOOK_SOON: Duration = Duration::from_secs(5);
/// How long the first look waits for providers that are still being connected to.
const FIRST_CONNECTION: Duration = Duration::from_secs(5);
/// How long a look, and the round trip after it, may take.
const LOOK_TIMEOUT: Duration = Duration::from_secs(10);
/// Key sets tried before a `key_id` counts as unknown; hundreds of KEKs on several providers would make more.
const MOST_KEY_SETS: usize = 10_000;

/// Every KEK of the configuration. Shared by reference between tasks.
pub struct Keyring {
    cluster: String,
    seal_under: SealUnder,
    members: Vec<Member>,
    state: Arc<State>,
    health: Health,
    decrypts: Flights<Sealed, Result<Plaintext, KeyringError>>,
    /// Held while a look is under way, so that there is one at a time.
    looks: tokio::sync::Mutex<Looks>,
    /// Whether the first look has ended.
    has_looked: watch::Sender<bool>,
}

#[derive(Default)]
struct Looks {
    /// When the last one began that has ended.
    began: Option<Instant>,
    /// When the last one ended that an unknown identity had asked for.
    asked_for_ended: Option<Instant>,
}

/// The KEKs that wrap new DEKs at one moment.
pub struct ActiveSet {
    /// Its hash, whose text is the `key_id`.
    pub key_set: KeySet,
    keks: Vec<ActiveKek>,
}

/// What a Decrypt is asked for.
#[derive(PartialEq, Eq, Hash)]
struct Sealed {
    ciphertext: Vec<u8>,
    key_id: Option<String>,
}

impl Keyring {
    /// A keyring over these providers, each with whether it seals, in the order in which Decrypt takes them.
    #[must_use]
    pub fn new(config: &KeyringConfig, providers: Vec<(Box<dyn Provider>, bool)>, state: Arc<State>) -> Self {
        Self {
            cluster: config.cluster.clone(),
            seal_under: config.seal_under,
            members: providers.into_iter().map(|(provider, seals)| Member::new(provider, seals)).collect(),
            state,
            health: Health::default(),
            decrypts: Flights::new(),
            looks: tokio::sync::Mutex::default(),
            has_looked: watch::Sender::new(false),
        }
    }

    /// Looks at all providers again and again, at once when one of them has changed. Never returns.
    pub async fn keep_looking(&self) {
        let _settled_or_late = tokio::time::timeout(FIRST_CONNECTION, self.settled()).await;
        loop {
            self.look().await;
            self.has_looked.send_replace(true);
            let well = self.active(Timestamp::now()).is_ok_and(|set| self.health(&set).is_ok());
            let changed = select_all(self.members.iter().map(|member| member.provider.changed()));
            let _changed_or_due = tokio::time::timeout(if well { LOOK_EVERY } else { LOOK_SOON }, changed).await;
        }
    }

    /// Returns once the first look has ended: a request that comes while the tokens are being connected to, as after a
    /// restart, waits for that and is not refused.
    pub async fn has_looked(&self) {
        drop(self.has_looked.subscribe().wait_for(|has_looked| *has_looked).await);
    }

    /// Looks for KEKs, and has each active one wrap and unwrap a value.
    pub async fn look(&self) {
        self.look_alone(&mut *self.looks.lock().await).await;
    }

    /// Looks now, unless that was done a moment ago: whoever sends unknown identities must not keep the tokens busy.
    async fn look_at_once(&self) {
        let asked = Instant::now();
        let mut looks = self.looks.lock().await;
        let somebody_just_did = looks.began.is_some_and(|began| began >= asked);
        if !somebody_just_did && looks.asked_for_ended.is_none_or(|ended| ended.elapsed() >= LOOK_SOON) {
            self.look_alone(&mut looks).await;
            looks.asked_for_ended = Some(Instant::now());
        }
    }

    async fn look_alone(&self, looks: &mut Looks) {
        let began = Instant::now();
        let deadline = began + LOOK_TIMEOUT;
        self.find_keks_by(deadline).await;
        if let Ok(set) = self.active(Timestamp::now()) {
            let keks = set.keks.iter().filter_map(|active| active.kek.as_ref().ok());
            join_all(keks.map(|kek| self.round_trip(kek, deadline))).await;
        }
        looks.began = Some(began);
    }

    /// Returns when it is known of every provider whether it can be reached.
    pub async fn settled(&self) {
        join_all(self.members.iter().map(|member| member.provider.settled())).await;
    }

    /// Looks for KEKs, and no more: no KEK becomes active by it.
    pub async fn find_keks(&self) {
        self.find_keks_by(Instant::now() + LOOK_TIMEOUT).await;
    }

    async fn find_keks_by(&self, deadline: Instant) {
        join_all(self.members.iter().map(|member| self.look_at(member, deadline))).await;
    }

    async fn look_at(&self, member: &Member, deadline: Instant) {
        match member.provider.look(deadline).await {
            Ok(sighting) => member.shows(sighting),
            Err(error) => {
                member.is_out_of_reach(&error);
                member.seen().keks.iter().for_each(|kek| self.health.fault(kek.identity(), &error));
            }
        }
    }

    async fn round_trip(&self, kek: &Arc<dyn Kek>, deadline: Instant) {
        let Ok(dek) = Dek::generate() else { return };
        let both = async {
            let wrapped = kek.wrap_dek(Arc::new(dek), deadline).await?;
            kek.unwrap_dek(&wrapped, deadline).await
        };
        match both.await {
            Err(error @ KekError::Deadline(_)) => self.health.fault(kek.identity(), &error), // the deadline was ours
            outcome => self.health.note(kek.identity(), &outcome),
        }
    }

    /// The set that is active now. Advances this host's mark when a KEK becomes active.
    ///
    /// # Errors
    /// A provider has no KEK, or has lost the one that this host made active.
    pub fn active(&self, now: Timestamp) -> Result<ActiveSet, KeyringError> {
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
                self.advance(member, mark)?;
            }
            keks.push(kek);
        }
        let identities: Vec<Identity> = keks.iter().map(|active| active.identity).collect();
        Ok(ActiveSet { key_set: KeySet::of(&self.cluster, &identities), keks })
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
            Err(outage) => Some(outage.clone()),
        };
        let faults: Vec<String> = set.keks.iter().filter_map(fault).collect();
        let enough = match self.seal_under {
            SealUnder::Any => faults.len() < set.keks.len(),
            SealUnder::All => faults.is_empty(),
        };
        if enough { Ok(()) } else { Err(KeyringError::Unavailable(faults.join("; "))) }
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
        let limit = envelope::plaintext_limit(limit, &self.algorithms(set));
        if plaintext.is_empty() || plaintext.len() > limit {
            return Err(KeyringError::PlaintextLength { length: plaintext.len(), limit });
        }
        let dek = Arc::new(Dek::generate().map_err(KeyringError::internal)?);
        let wrapped = join_all(set.keks.iter().map(|active| self.wrap(active, &dek, deadline))).await;
        let mut recipients = Vec::with_capacity(wrapped.len());
        let mut missed = None;
        for outcome in wrapped {
            match outcome {
                Ok(recipient) => recipients.push(recipient),
                Err(error) if self.seal_under == SealUnder::All => return Err(error.into()),
                Err(error) => missed = Some(error),
            }
        }
        match missed {
            Some(error) if recipients.is_empty() => return Err(error.into()),
            Some(error) => tracing::warn!(%error, "sealed under fewer KEKs than are active"),
            None => (),
        }
        envelope::seal(set.key_set, recipients, &dek, plaintext).map_err(KeyringError::internal)
    }

    /// The algorithms of a full envelope. A KEK that is out of reach counts as the longest, so that what fits does not
    /// depend on an outage.
    fn algorithms(&self, set: &ActiveSet) -> Vec<WrapAlgorithm> {
        let algorithm = |active: &ActiveKek| active.kek.as_ref().map_or(WrapAlgorithm::LONGEST, |kek| kek.algorithm());
        set.keks.iter().map(algorithm).collect()
    }

    async fn wrap(
        &self,
        active: &ActiveKek,
        dek: &Arc<Dek>,
        deadline: Instant,
    ) -> Result<Recipient<Vec<u8>>, KekError> {
        let kek = active.kek.as_ref().map_err(|outage| KekError::Unavailable(outage.clone()))?;
        let wrapped = kek.wrap_dek(Arc::clone(dek), deadline).await;
        self.health.note(active.identity, &wrapped);
        Ok(Recipient { identity: active.identity, algorithm: kek.algorithm(), wrapped: wrapped? })
    }

    /// Opens an envelope, with one token call for all who ask for the same at a time. `key_id` is what the request
    /// says of it; KMS v1beta1 says nothing.
    ///
    /// # Errors
    /// See [`KeyringError`]. What can be refused without a token is refused before one is asked.
    pub async fn decrypt(
        self: &Arc<Self>,
        ciphertext: &[u8],
        key_id: Option<&str>,
        deadline: Instant,
    ) -> Result<Plaintext, KeyringError> {
        let keyring = Arc::clone(self);
        let sealed = Sealed { ciphertext: ciphertext.to_vec(), key_id: key_id.map(str::to_owned) };
        let is_late = |answer: &_| matches!(answer, Err(KeyringError::Deadline(_)));
        let open = move |sealed: Arc<Sealed>, deadline| {
            let keyring = Arc::clone(&keyring);
            async move { keyring.open(&sealed.ciphertext, sealed.key_id.as_deref(), deadline).await }
        };
        self.decrypts.join(sealed, deadline, is_late, open).await
    }

    async fn open(
        &self,
        ciphertext: &[u8],
        key_id: Option<&str>,
        deadline: Instant,
    ) -> Result<Plaintext, KeyringError> {
        let envelope = Envelope::parse(ciphertext).map_err(|error| KeyringError::bad_ciphertext(&error))?;
        if let Some(key_id) = key_id {
            self.check_key_id(key_id, &envelope)?;
        }
        let mut failure = KeyringError::BadCiphertext;
        for (kek, recipient) in self.keks_of(&envelope).await? {
            if kek.algorithm() != recipient.algorithm {
                tracing::debug!(kek = %recipient.identity, "recipient refused: not the algorithm of its KEK");
                continue;
            }
            let unwrapped = kek.unwrap_dek(recipient.wrapped, deadline).await;
            self.health.note(recipient.identity, &unwrapped);
            match unwrapped {
                Ok(dek) => return envelope.open(&dek).map_err(|error| KeyringError::bad_ciphertext(&error)),
                Err(KekError::BadInput) => (),
                // The others may be damaged and this one whole, when its KEK is back.
                Err(error) => failure = error.into(),
            }
        }
        Err(failure)
    }

    /// A ciphertext under another key_id than its own was bound anew by somebody; a key_id that these KEKs cannot
    /// have made is not ours at all.
    fn check_key_id(&self, key_id: &str, envelope: &Envelope<'_>) -> Result<(), KeyringError> {
        match key_id.parse::<KeySet>() {
            Ok(key_set) if key_set == envelope.key_set => Ok(()),
            Ok(key_set) if self.could_have_made(key_set) => {
                tracing::debug!(key_id, sealed_under = %envelope.key_set, "ciphertext refused: bound to another key_id");
                Err(KeyringError::BadCiphertext)
            }
            _ => Err(KeyringError::UnknownKey("its key_id".into())),
        }
    }

    /// Whether the key set is one of a KEK of each provider that seals.
    fn could_have_made(&self, key_set: KeySet) -> bool {
        let mut sets: Vec<Vec<Identity>> = vec![vec![]];
        for member in self.members.iter().filter(|member| member.seals) {
            let identities: Vec<Identity> = member.seen().keks.iter().map(|kek| kek.identity()).collect();
            let extended = sets.iter().flat_map(|set| identities.iter().map(|kek| [set.as_slice(), &[*kek]].concat()));
            sets = extended.take(MOST_KEY_SETS).collect();
        }
        sets.iter().any(|set| KeySet::of(&self.cluster, set) == key_set)
    }

    /// The KEKs that can unwrap the envelope's DEK, in the order of the configuration: at least one.
    async fn keks_of<'e>(&self, envelope: &'e Envelope<'_>) -> Result<Vec<Named<'e>>, KeyringError> {
        let mut known = self.known_keks_of(envelope);
        if known.is_empty() {
            self.look_at_once().await;
            known = self.known_keks_of(envelope);
        }
        if known.is_empty() { Err(self.why_unknown(envelope)) } else { Ok(known) }
    }

    /// An identity that nobody shows is unknown, unless a key that has it is not used, or a token cannot be asked.
    fn why_unknown(&self, envelope: &Envelope<'_>) -> KeyringError {
        let named = |identity: Identity| envelope.recipients.iter().any(|recipient| recipient.identity == identity);
        for member in &self.members {
            if let Some(refused) = member.seen().refused.iter().find(|refused| refused.identity.is_some_and(named)) {
                return KeyringError::Unavailable(format!("{} is not used: {}", refused.key, refused.reason));
            }
        }
        if let Some(outage) = self.outages().into_iter().next() {
            return KeyringError::Unavailable(outage);
        }
        let identities: Vec<String> =
            envelope.recipients.iter().map(|recipient| recipient.identity.to_string()).collect();
        KeyringError::UnknownKey(format!("KEK {}", identities.join(", ")))
    }

    fn known_keks_of<'e>(&self, envelope: &'e Envelope<'_>) -> Vec<Named<'e>> {
        let mut known = Vec::new();
        for member in &self.members {
            for kek in &member.seen().keks {
                let named = envelope.recipients.iter().find(|recipient| recipient.identity == kek.identity());
                known.extend(named.map(|recipient| (Arc::clone(kek), recipient)));
            }
        }
        known
    }

    /// Why providers, or some of their tokens, could not be looked at.
    #[must_use]
    pub fn outages(&self) -> Vec<String> {
        let of = |member: &Member| {
            let seen = member.seen();
            seen.outage.iter().chain(&seen.partly_out).cloned().collect::<Vec<_>>()
        };
        self.members.iter().flat_map(of).collect()
    }
}

/// A KEK that an envelope names, and what it wrapped there.
type Named<'e> = (Arc<dyn Kek>, &'e Recipient<&'e [u8]>);
