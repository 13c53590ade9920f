//! Whether a key can be made to leave its token: tried on throw-away keys that are made as KEKs are.
//!
//! Attributes prove nothing by themselves: NSS says CKA_EXTRACTABLE=false of a key, wraps it, and hands it out. So each
//! way is gone, on a key of its own, and what counts is whether bytes come out that are that key's. A real KEK is never
//! tried. What comes out is compared and wiped; nobody is shown it.

mod pairs;
mod stand;

use std::sync::Arc;

use serde::Serialize;

use self::stand::{Stand, ways};
use super::admission::KekSpec;
use super::error::CallError;
use super::lane::Lane;
use crate::config::Mode;

/// A kind of KEK.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Kind {
    pub(super) mode: Mode,
    pub(super) modifiable: bool,
    pub(super) copyable: bool,
}

impl Kind {
    pub(super) const fn made_by_us(mode: Mode) -> Self {
        Self { mode, modifiable: false, copyable: false }
    }
}

/// What came of one way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// The token did not let it happen.
    Refused,
    /// It could not be tried.
    NotTried,
    /// Something changed that should not, and the key stayed inside.
    Warning,
    /// The key's bytes came out.
    CameOut,
}

impl std::fmt::Display for Like {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "mode {}", self.mode)?;
        let loose = [(self.modifiable, ", MODIFIABLE"), (self.copyable, ", COPYABLE")];
        loose.iter().filter(|(is_so, _)| *is_so).try_for_each(|(_, text)| f.write_str(text))
    }
}

impl Outcome {
    /// In a word or two.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Refused => "refused",
            Self::NotTried => "not tried",
            Self::Warning => "WARNING",
            Self::CameOut => "CAME OUT",
        }
    }
}

/// What throw-away keys have in common with a KEK, beside what all KEKs have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Like {
    /// How it wraps.
    pub mode: &'static str,
    /// Those that are made elsewhere may be.
    pub modifiable: bool,
    /// The same.
    pub copyable: bool,
}

/// A way that was tried.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Trial {
    /// The way.
    pub way: &'static str,
    /// On a key like this.
    pub like: Like,
    /// What came of it.
    pub outcome: Outcome,
    /// The same, in words.
    pub what: String,
}

/// What a token was tried on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ThrowAway {
    /// A key that lives in a session.
    SessionObject,
    /// A key in the token, which was destroyed afterwards.
    TokenObject,
}

impl ThrowAway {
    /// In words.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::SessionObject => "throw-away session objects",
            Self::TokenObject => "throw-away token objects, destroyed afterwards,",
        }
    }
}

/// On what a mode was tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum TriedOn {
    /// A key that was made for it, and destroyed.
    ThrowAwayKey,
    /// A KEK: pairs of RSA keys are slow to make.
    Kek,
}

impl TriedOn {
    /// In words.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::ThrowAwayKey => "a throw-away key",
            Self::Kek => "a KEK",
        }
    }
}

/// Every way that was tried on a token.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Trials {
    /// On what; one token object is enough to be named.
    pub throw_away: Option<ThrowAway>,
    /// What came of each way.
    pub trials: Vec<Trial>,
}

impl Trials {
    /// The worst that came of any kind of KEK; `NotTried` if of one nothing could be tried, and no other came out.
    #[must_use]
    pub fn verdict(&self) -> Outcome {
        let gravity = |outcome: &Outcome| match outcome {
            Outcome::Refused => 0,
            Outcome::Warning => 1,
            Outcome::NotTried => 2,
            Outcome::CameOut => 3,
        };
        let kinds = self.trials.chunk_by(|one, other| one.like == other.like).map(of_kind);
        kinds.max_by_key(gravity).unwrap_or(Outcome::NotTried)
    }
}

/// The worst that came of the ways for one kind of KEK; a way that could not be tried, while others could, is no better
/// than a warning: nobody knows whether it is open.
fn of_kind(trials: &[Trial]) -> Outcome {
    let (untried, tried): (Vec<_>, Vec<_>) =
        trials.iter().map(|trial| trial.outcome).partition(|outcome| *outcome == Outcome::NotTried);
    match tried.into_iter().max() {
        Some(Outcome::Refused) if !untried.is_empty() => Outcome::Warning,
        worst => worst.unwrap_or(Outcome::NotTried),
    }
}

/// Whether a key like a KEK leaves its token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum WayOut {
    /// Not by the ways that there are.
    Closed,
    /// By this one.
    Open(String),
    /// Nobody knows of every way, for this reason.
    Untried(String),
}

/// Goes every way, for keys of each of these kinds. Without `may_write`, only session objects are made.
///
/// # Errors
/// The token is out of reach.
pub(super) fn try_every_way(lane: &Lane, kinds: &[Kind], may_write: bool) -> Result<Trials, CallError> {
    // One of its own: what a session has done must not change what is found out of a KEK in it.
    let session = lane.connected.open_session()?;
    let stand = Stand::new(&session, &lane.connected.profile);
    let mut done = Trials { throw_away: None, trials: Vec::new() };
    for kind in kinds {
        let Kind { mode, modifiable, copyable } = *kind;
        let like = Like { mode: mode.as_str(), modifiable, copyable };
        let mut kept = None;
        for (way, how) in ways(mode) {
            let made = match kept.take() {
                Some(key) => Ok(key),
                None => stand.throw_away(*kind, may_write).map(|(key, object)| {
                    done.throw_away = done.throw_away.max(Some(object));
                    key
                }),
            };
            let (outcome, what) = match made {
                Ok(key) => {
                    let told = how(&stand, &key);
                    // A pair takes a TPM seconds. It does for more than one way, as long as nothing about it has moved.
                    let is_whole = told.as_ref().is_ok_and(|(outcome, _)| *outcome <= Outcome::NotTried);
                    kept = (mode == Mode::Oaep && is_whole).then_some(key);
                    stand.clear(kept.as_ref())?;
                    told?
                }
                Err(error) => {
                    let what = if stand.has_made_one() {
                        "a throw-away key does not work"
                    } else {
                        "no throw-away key can be made"
                    };
                    let told = format!("{what}: {}", stand.refused(error)?);
                    stand.clear(None)?;
                    (Outcome::NotTried, told)
                }
            };
            done.trials.push(Trial { way, like, outcome, what });
        }
        stand.clear(None)?;
    }
    Ok(done)
}

/// Whether a key of this mode comes out, by the first way that there is. Only session objects are made.
///
/// # Errors
/// The token is out of reach.
pub(super) fn way_out(lane: &Lane, mode: Mode) -> Result<WayOut, CallError> {
    let done = try_every_way(lane, &[Kind::made_by_us(mode)], false)?;
    let first = |outcome| done.trials.iter().find(|trial| trial.outcome == outcome);
    let told = |trial: &Trial| format!("{}: {}", trial.way, trial.what);
    Ok(match (first(Outcome::CameOut), first(Outcome::NotTried)) {
        (Some(trial), _) => WayOut::Open(told(trial)),
        (None, Some(trial)) if done.verdict() == Outcome::NotTried => WayOut::Untried(trial.what.clone()),
        (None, Some(trial)) => WayOut::Untried(told(trial)),
        (None, None) => WayOut::Closed,
    })
}

/// On what a mode was tried, if it was, and why it does not work, if it does not.
pub(super) struct Tried {
    pub(super) on: Option<TriedOn>,
    pub(super) failure: Option<String>,
}

/// Has a key of this mode wrap a value and unwrap it, since what a token's flags say proves nothing: a throw-away key, or
/// one of these KEKs if such a key is slow to make and nothing may be written.
///
/// # Errors
/// The token is out of reach.
pub(super) fn try_mode(lane: &mut Lane, mode: Mode, keks: &[KekSpec], may_write: bool) -> Result<Tried, CallError> {
    let connected = Arc::clone(&lane.connected);
    // One of its own: what a session has done must not change what is found out of a KEK in it.
    let session = connected.open_session()?;
    let stand = Stand::new(&session, &connected.profile);
    let kind = Kind::made_by_us(mode);
    let (on, works) = match keks.iter().find(|kek| kek.mode == mode) {
        // To make two pairs takes some tokens longer than doctor waits.
        Some(kek) if mode == Mode::Oaep && !may_write => (Some(TriedOn::Kek), lane.try_out(kek).map(|()| true)),
        _ => match stand.throw_away(kind, may_write) {
            Ok((key, object)) => (Some(TriedOn::ThrowAwayKey), stand.opens_its_own(kind, &key, object)),
            Err(error) => (stand.has_made_one().then_some(TriedOn::ThrowAwayKey), Err(error)),
        },
    };
    let failure = match works {
        Ok(true) => None,
        Ok(false) => Some("the token does not unwrap what it has wrapped".into()),
        Err(error) => Some(stand.refused(error)?),
    };
    stand.clear(None)?;
    Ok(Tried { on, failure })
}

#[cfg(test)]
mod tests {
    use super::Outcome::{CameOut, NotTried, Refused, Warning};
    use super::*;

    #[test]
    fn what_could_not_be_tried_of_one_kind_is_not_made_good_by_another() {
        for (kinds, verdict) in [
            (&[][..], NotTried),
            (&[&[Refused, Refused][..]], Refused),
            (&[&[Refused, Warning]], Warning),
            (&[&[Refused, NotTried]], Warning),
            (&[&[NotTried, NotTried]], NotTried),
            (&[&[Refused, Refused], &[Refused, Refused]], Refused),
            (&[&[Refused, Refused], &[NotTried, NotTried]], NotTried),
            (&[&[NotTried, NotTried], &[Warning, Refused]], NotTried),
            (&[&[NotTried, NotTried], &[Refused, CameOut]], CameOut),
        ] {
            let of_kind = |(outcomes, modifiable): (&&[Outcome], bool)| {
                let like = Like { mode: "gcm", modifiable, copyable: false };
                let trial = |outcome: &Outcome| Trial { way: "a way", like, outcome: *outcome, what: String::new() };
                outcomes.iter().map(trial).collect::<Vec<_>>()
            };
            let trials = kinds.iter().zip([false, true]).flat_map(of_kind).collect();
            assert_eq!(Trials { throw_away: None, trials }.verdict(), verdict, "{kinds:?}");
        }
    }
}
