//! How a keyring opens an envelope: which KEKs are asked, and what is refused before any is.

use std::sync::Arc;
use std::time::Instant;

use super::{Keyring, KeyringError};
use crate::envelope::{Envelope, Recipient};
use crate::health::Work;
use crate::identity::{Identity, KeySet};
use crate::provider::{Kek, KekError};
use crate::secret::Plaintext;

/// Key sets tried before a `key_id` counts as unknown; hundreds of KEKs on several providers would make more.
const MOST_KEY_SETS: usize = 10_000;

/// What a Decrypt is asked for.
#[derive(PartialEq, Eq, Hash)]
pub(super) struct Sealed {
    ciphertext: Vec<u8>,
    key_id: Option<String>,
}

/// A KEK that an envelope names, and what it wrapped there.
type Named<'e> = (Arc<dyn Kek>, &'e Recipient<&'e [u8]>);

impl Keyring {
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
        let is_late = |answer: &_| matches!(answer, Err(KeyringError::Deadline(_) | KeyringError::Busy(_)));
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
        if let Some(answer) = self.decrypt_old(ciphertext, key_id, deadline).await {
            return answer;
        }
        let envelope = Envelope::parse(ciphertext).map_err(|error| KeyringError::bad_ciphertext(&error))?;
        self.has_looked_unless(|| !self.known_keks_of(&envelope).is_empty()).await;
        if let Some(key_id) = key_id {
            self.check_key_id(key_id, &envelope)?;
        }
        let mut failure = KeyringError::BadCiphertext;
        let keks = self.keks_of(&envelope).await?;
        let mut left = keks.iter().filter(|(kek, _)| kek.check().is_ok()).count();
        for (kek, recipient) in keks {
            let deadline = share(deadline, left);
            left = left.saturating_sub(1);
            if kek.algorithm() != recipient.algorithm {
                tracing::debug!(kek = %recipient.identity, "recipient refused: not the algorithm of its KEK");
                continue;
            }
            // What a token hands out may be wrong once.
            for attempt in 0..2 {
                let unwrapped = kek.unwrap_dek(recipient.wrapped, deadline).await;
                self.health.note(recipient.identity, Work::Unwrap, &unwrapped);
                match unwrapped.map(|dek| envelope.open(&dek)) {
                    Ok(Err(_)) if attempt == 0 => continue,
                    Ok(Ok(plaintext)) => return Ok(plaintext),
                    // This provider may be wrong, or this recipient damaged: another one may open it all the same.
                    Ok(Err(reason)) => {
                        tracing::debug!(%reason, kek = %recipient.identity, "its data key opens nothing")
                    }
                    Err(KekError::BadInput) => (),
                    // The others may be damaged and this one whole, when its KEK is back.
                    Err(error) => failure = error.into(),
                }
                break;
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
        // Those whose provider is known to be out of reach come last.
        known.sort_by_key(|(kek, _)| kek.check().is_err());
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
}

/// By when the first of so many that can do the same must have answered: what is left is for the others.
pub(super) fn share(deadline: Instant, of: usize) -> Instant {
    let now = Instant::now();
    let shares = u32::try_from(of).unwrap_or(u32::MAX).max(1);
    now + deadline.saturating_duration_since(now) / shares
}
