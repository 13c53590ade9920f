//! Envelopes that were sealed under fewer KEKs than were active, because a provider could not wrap: until the API server
//! has written them anew, under another key_id, whoever loses the other KEKs loses them.

use std::sync::Mutex;

use jiff::Timestamp;

use super::Keyring;
use super::member::ActiveKek;
use crate::identity::KeySet;
use crate::state::Gap;
use crate::sync::lock;

/// What this process knows of the gaps of this host.
#[derive(Default)]
pub(super) struct Gaps(Mutex<Option<Vec<Gap>>>);

impl Keyring {
    /// Counts an envelope of this key set that lacks the recipients of these KEKs.
    pub(super) fn count_gaps(&self, key_set: KeySet, missed: &[&ActiveKek]) {
        let Gaps(gaps) = &self.gaps;
        let mut gaps = lock(gaps);
        let gaps = gaps.get_or_insert_with(|| self.gaps_of_before());
        let key_id = key_set.to_string();
        let active = self.foresee(Timestamp::now(), None).ok().map(|set| set.to_string());
        // A rotation has replaced the others; just after one, a set that was announced before it is still used.
        gaps.retain(|gap| gap.key_id == key_id || Some(&gap.key_id) == active.as_ref());
        let mut is_news = false;
        for ActiveKek { identity, provider, .. } in missed {
            let known = gaps.iter().position(|gap| gap.identity == *identity && gap.key_id == key_id);
            let at = known.unwrap_or_else(|| {
                let (provider, since) = (provider.clone(), Timestamp::now());
                gaps.push(Gap { key_id: key_id.clone(), provider, identity: *identity, since, envelopes: 0 });
                gaps.len() - 1
            });
            if let Some(gap) = gaps.get_mut(at) {
                gap.envelopes = gap.envelopes.saturating_add(1);
                is_news |= gap.envelopes.is_power_of_two(); // v1beta1 may make thousands
            }
        }
        if is_news {
            self.state.set_gaps(gaps.clone());
        }
    }

    /// The gaps under the key set that is active, each counted at least so far.
    #[must_use]
    pub fn envelope_gaps(&self, now: Timestamp) -> Vec<Gap> {
        let Ok(active) = self.foresee(now, None) else { return Vec::new() };
        let Gaps(gaps) = &self.gaps;
        let mut gaps = lock(gaps);
        let gaps = gaps.get_or_insert_with(|| self.gaps_of_before());
        gaps.iter().filter(|gap| gap.key_id == active.to_string()).cloned().collect()
    }

    fn gaps_of_before(&self) -> Vec<Gap> {
        self.state.gaps().unwrap_or_else(|error| {
            tracing::error!(%error, "which envelopes lack a recipient is forgotten");
            Vec::new()
        })
    }

    /// The KEKs that could not wrap.
    pub(super) fn missed<'a, T, E>(keks: &'a [ActiveKek], wrapped: &[Result<T, E>]) -> Vec<&'a ActiveKek> {
        keks.iter().zip(wrapped).filter(|(_, wrapped)| wrapped.is_err()).map(|(kek, _)| kek).collect()
    }
}

impl Gap {
    /// What it means, and what to do. The same text however many there are: who was told need not hear again.
    pub(super) fn concern(&self) -> String {
        let Self { provider, identity, since, .. } = self;
        format!(
            "ciphertexts that this host has made since {since} lack KEK {identity} of provider {provider}, which could not \
             wrap then: they open with the other providers alone. Rotate a KEK and have the API server rewrite its objects to \
             replace them"
        )
    }
}
