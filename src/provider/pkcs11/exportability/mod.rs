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
    /// The worst that came of any way; `NotTried` if nothing was tried at all.
    #[must_use]
    pub fn verdict(&self) -> Outcome {
        let tried = self.trials.iter().map(|trial| trial.outcome).filter(|outcome| *outcome != Outcome::NotTried);
        tried.max().unwrap_or(Outcome::NotTried)
    }
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
                Err(error) => (Outcome::NotTried, format!("no throw-away key can be made: {}", stand.refused(error)?)),
            };
            done.trials.push(Trial { way, like, outcome, what });
        }
        stand.clear(None)?;
    }
    Ok(done)
}

/// The first way on which a key of this mode comes out, if there is one. Only session objects are made.
///
/// # Errors
/// The token is out of reach.
pub(super) fn way_out(lane: &Lane, mode: Mode) -> Result<Option<String>, CallError> {
    let Trials { trials, .. } = try_every_way(lane, &[Kind::made_by_us(mode)], false)?;
    let out = trials.into_iter().find(|trial| trial.outcome == Outcome::CameOut);
    Ok(out.map(|trial| format!("{}: {}", trial.way, trial.what)))
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
