//! A provider within the keyring: what its last looks showed, and what this host remembers of it.

use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use jiff::Timestamp;

use super::activation::{self, Choice};
use crate::identity::Identity;
use crate::provider::{Kek, KekError, Provider, Rank, Refused, Sighting};
use crate::state::Mark;

pub(super) struct Member {
    pub(super) provider: Box<dyn Provider>,
    pub(super) seals: bool,
    seen: RwLock<Seen>,
}

/// What the last looks at a provider showed.
pub(super) struct Seen {
    pub(super) keks: Vec<Arc<dyn Kek>>,
    pub(super) refused: Vec<Refused>,
    /// Why the newest look failed, or that there was none yet; the KEKs are then those of the look before.
    pub(super) outage: Option<String>,
}

/// The active KEK of one provider.
pub(super) struct ActiveKek {
    pub(super) identity: Identity,
    /// `Err`: this host knows it only by its mark, because the provider is out of reach.
    pub(super) kek: Result<Arc<dyn Kek>, String>,
}

impl Member {
    pub(super) fn new(provider: Box<dyn Provider>, seals: bool) -> Self {
        let outage = Some(format!("provider {} is being connected to", provider.name()));
        let seen = RwLock::new(Seen { keks: Vec::new(), refused: Vec::new(), outage });
        Self { provider, seals, seen }
    }

    pub(super) fn seen(&self) -> RwLockReadGuard<'_, Seen> {
        self.seen.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn seen_mut(&self) -> RwLockWriteGuard<'_, Seen> {
        self.seen.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes over what a look found, and logs what is new in it.
    pub(super) fn shows(&self, sighting: Sighting) {
        let mut seen = self.seen_mut();
        let provider = self.provider.name();
        for kek in &sighting.keks {
            if !seen.keks.iter().any(|known| known.identity() == kek.identity()) {
                tracing::info!(provider, kek = %kek.identity(), not_before = %kek.rank().not_before, "KEK found");
            }
        }
        for refused in sighting.refused.iter().filter(|refused| !seen.refused.contains(refused)) {
            tracing::warn!(provider, key = refused.key, reason = refused.reason, "key is not used");
        }
        *seen = Seen { keks: sighting.keks, refused: sighting.refused, outage: None };
    }

    /// Remembers that a look failed; what was seen before stays.
    pub(super) fn is_out_of_reach(&self, error: &KekError) {
        self.seen_mut().outage = Some(error.to_string());
    }

    /// The active KEK now, and the mark that this host must keep if it is a new one.
    ///
    /// # Errors
    /// There is none, for this reason.
    pub(super) fn active(&self, marks: &[Mark], now: Timestamp) -> Result<(ActiveKek, Option<Mark>), String> {
        let seen = self.seen();
        let mark = self.mark_among(marks, &seen.keks);
        let marked = mark.map(rank_of);
        let name = self.provider.name();
        let rank = match choose(&seen.keks, marked.as_ref(), now) {
            Choice::Active(rank) => rank.clone(),
            Choice::Missing(_) | Choice::None => {
                return match (mark, &seen.outage) {
                    (Some(mark), Some(outage)) => {
                        Ok((ActiveKek { identity: mark.identity, kek: Err(outage.clone()) }, None))
                    }
                    (None, Some(outage)) => Err(outage.clone()),
                    (Some(mark), None) => Err(format!(
                        "KEK {} (id {}), which was active on this host, is not on provider {name}{}: bring it back, \
                         or make a new KEK with `trousseau key generate`",
                        mark.identity,
                        mark.id,
                        because(&seen.refused)
                    )),
                    (None, None) => Err(format!(
                        "provider {name} has no KEK{}: make one with `trousseau key generate`",
                        because(&seen.refused)
                    )),
                };
            }
        };
        let kek = seen.keks.iter().find(|kek| *kek.rank() == rank).cloned().ok_or("the KEK is gone")?;
        let is_new = marked.is_none_or(|marked| marked < rank) || mark.is_some_and(|mark| mark.provider != name);
        let new_mark = is_new.then(|| Mark {
            provider: name.to_owned(),
            identity: kek.identity(),
            not_before: rank.not_before,
            id: base16ct::lower::encode_string(&rank.name),
        });
        Ok((ActiveKek { identity: kek.identity(), kek: Ok(kek) }, new_mark))
    }

    /// This member's marks: those made under its name, and those of KEKs that it has, should it have been renamed.
    fn owns(&self, mark: &Mark, keks: &[Arc<dyn Kek>]) -> bool {
        mark.provider == self.provider.name() || keks.iter().any(|kek| kek.identity() == mark.identity)
    }

    fn mark_among<'m>(&self, marks: &'m [Mark], keks: &[Arc<dyn Kek>]) -> Option<&'m Mark> {
        marks.iter().filter(|mark| self.owns(mark, keks)).max_by_key(|mark| rank_of(mark))
    }

    /// The marks with `new` in place of this member's.
    pub(super) fn advance(&self, mut marks: Vec<Mark>, new: Mark) -> Vec<Mark> {
        let keks = &self.seen().keks;
        marks.retain(|mark| !self.owns(mark, keks));
        marks.push(new);
        marks
    }
}

fn choose<'a>(keks: &'a [Arc<dyn Kek>], mark: Option<&'a Rank>, now: Timestamp) -> Choice<'a> {
    let ranks: Vec<&Rank> = keks.iter().map(|kek| kek.rank()).collect();
    activation::choose(&ranks, mark, now)
}

fn rank_of(mark: &Mark) -> Rank {
    let name = base16ct::lower::decode_vec(&mark.id).unwrap_or_default();
    Rank { not_before: mark.not_before, name }
}

/// Keys that were refused may be the very ones that are missed.
fn because(refused: &[Refused]) -> String {
    refused.iter().map(|refused| format!("; {} is not used: {}", refused.key, refused.reason)).collect()
}
