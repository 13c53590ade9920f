//! A provider within the keyring: what its last looks showed, and what this host remembers of it.

use std::sync::{Arc, RwLock, RwLockReadGuard, RwLockWriteGuard};

use jiff::Timestamp;

use super::{KeyringError, activation};
use crate::envelope::WrapAlgorithm;
use crate::identity::Identity;
use crate::provider::{Kek, KekError, Provider, Rank, Refused, Sighting};
use crate::state::Mark;
use crate::sync::{read, write};

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
    pub(super) outage: Option<KekError>,
    /// Tokens that are out of reach while others are not.
    pub(super) partly_out: Vec<String>,
    /// Which token lacks which KEK that another one holds.
    pub(super) incomplete: Vec<String>,
    /// KEKs for whose history a token does not vouch.
    pub(super) exceptions: Vec<String>,
}

/// The active KEK of one provider.
pub(super) struct ActiveKek {
    /// Its provider, for people.
    pub(super) provider: String,
    pub(super) identity: Identity,
    /// How it wraps. Of one that is out of reach: the way of its provider that makes the longest recipient.
    pub(super) algorithm: WrapAlgorithm,
    /// `Err`: this host knows it only by its mark, because the provider is out of reach, or its key is not used.
    pub(super) kek: Result<Arc<dyn Kek>, KekError>,
    /// Its key is there, and is not used: only another provider's KEK makes up for it.
    pub(super) is_refused: bool,
}

impl Member {
    pub(super) fn new(provider: Box<dyn Provider>, seals: bool) -> Self {
        let outage = Some(KekError::Unavailable(format!("provider {} is being connected to", provider.name())));
        let seen = RwLock::new(Seen {
            keks: Vec::new(),
            refused: Vec::new(),
            outage,
            partly_out: Vec::new(),
            incomplete: Vec::new(),
            exceptions: Vec::new(),
        });
        Self { provider, seals, seen }
    }

    pub(super) fn seen(&self) -> RwLockReadGuard<'_, Seen> {
        read(&self.seen)
    }

    fn seen_mut(&self) -> RwLockWriteGuard<'_, Seen> {
        write(&self.seen)
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
        for outage in sighting.out_of_reach.iter().filter(|outage| !seen.partly_out.contains(outage)) {
            tracing::warn!(provider, outage, "replica is out of reach");
        }
        let Sighting { keks, refused, out_of_reach, exceptions } = sighting;
        let gap = |token: String, kek: Identity| {
            format!("token {token} of provider {provider} lacks KEK {kek}: clone it there")
        };
        let gaps = |kek: &Arc<dyn Kek>| {
            let identity = kek.identity();
            kek.lacked_by().into_iter().map(move |token| gap(token, identity))
        };
        let mut incomplete: Vec<String> = keks.iter().flat_map(gaps).collect();
        incomplete.sort_unstable(); // who hears of them need not hear again
        for gap in incomplete.iter().filter(|gap| !seen.incomplete.contains(gap)) {
            tracing::warn!(provider, gap, "replicas are not alike");
        }
        for exception in exceptions.iter().filter(|exception| !seen.exceptions.contains(exception)) {
            tracing::warn!(provider, exception, "a KEK is admitted by way of exception");
        }
        *seen = Seen { keks, refused, outage: None, partly_out: out_of_reach, incomplete, exceptions };
    }

    /// Remembers that a look failed; what was seen before stays.
    pub(super) fn is_out_of_reach(&self, error: &KekError) {
        self.seen_mut().outage = Some(match error {
            KekError::Deadline(_) => KekError::Unavailable(error.to_string()), // the look's own, and no request's
            error => error.clone(),
        });
    }

    /// The active KEK now, and the mark that this host must keep if it is a new one. `marks` are this member's own.
    ///
    /// # Errors
    /// There is none, for this reason.
    pub(super) fn active(&self, marks: &[&Mark], now: Timestamp) -> Result<(ActiveKek, Option<Mark>), KeyringError> {
        let seen = self.seen();
        let mark = marks.iter().max_by_key(|mark| rank_of(mark)).copied();
        let marked = mark.map(rank_of);
        let Some(kek) = activation::choose(&seen.keks, |kek| kek.rank(), marked.as_ref(), now) else {
            let partly = || seen.partly_out.first().cloned().map(KekError::Unavailable);
            let outage = seen.outage.clone().or_else(partly);
            let nothing = || self.nothing_active(mark, &seen.refused);
            let is_refused = |mark: &Mark| seen.refused.iter().any(|key| key.identity == Some(mark.identity));
            return match (mark, outage) {
                (Some(mark), Some(outage)) => Ok((self.known_by(mark, outage, false), None)),
                (None, Some(outage)) => Err(outage.into()),
                (Some(mark), None) if is_refused(mark) => {
                    Ok((self.known_by(mark, KekError::Refused(nothing()), true), None))
                }
                (_, None) => Err(KeyringError::NoKek(nothing())),
            };
        };
        let new_mark = Mark {
            provider: self.provider.name().to_owned(),
            identity: kek.identity(),
            not_before: kek.rank().not_before,
            id: base16ct::lower::encode_string(&kek.rank().id),
        };
        let (provider, identity) = (new_mark.provider.clone(), new_mark.identity);
        let active =
            ActiveKek { provider, identity, algorithm: kek.algorithm(), kek: Ok(Arc::clone(kek)), is_refused: false };
        Ok((active, (mark != Some(&new_mark)).then_some(new_mark)))
    }

    /// The active KEK of which there is only this host's mark, and why.
    fn known_by(&self, mark: &Mark, why: KekError, is_refused: bool) -> ActiveKek {
        ActiveKek {
            provider: self.provider.name().to_owned(),
            identity: mark.identity,
            algorithm: self.provider.longest_algorithm(),
            kek: Err(why),
            is_refused,
        }
    }

    /// Keys that were refused may be the very ones that are missed.
    fn nothing_active(&self, mark: Option<&Mark>, refused: &[Refused]) -> String {
        let name = self.provider.name();
        let refused: String =
            refused.iter().map(|refused| format!("; {} is not used: {}", refused.key, refused.reason)).collect();
        let make = |before: &str| match self.provider.how_to_begin() {
            Some(command) => format!("{before} with `{command}`"),
            None => String::new(),
        };
        match mark {
            None => format!("provider {name} has no KEK{refused}{}", make(": make one")),
            Some(Mark { identity, id, .. }) => format!(
                "KEK {identity} (id {id}), which was active on this host, is not on provider {name}{refused}: bring it \
                 back{}",
                make(", or make a new KEK")
            ),
        }
    }

    /// Whether it shows the KEK of this mark.
    pub(super) fn shows_kek_of(&self, mark: &Mark) -> bool {
        self.shows_kek(mark.identity)
    }

    /// Whether it shows this KEK.
    pub(super) fn shows_kek(&self, identity: Identity) -> bool {
        self.seen().keks.iter().any(|kek| kek.identity() == identity)
    }
}

fn rank_of(mark: &Mark) -> Rank {
    let id = base16ct::lower::decode_vec(&mark.id).unwrap_or_default();
    Rank { not_before: mark.not_before, id }
}
