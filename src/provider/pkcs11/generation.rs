//! How a KEK is made: first a plan, which can be shown, and then the key.

use std::time::Instant;

use jiff::Timestamp;

use super::admission::{self, Admitted, KekSpec};
use super::exportability::WayOut;
use super::lane::hex;
use super::token::Token;
use super::{Pkcs11, attributes, exportability};
use crate::config::{Exportable, Mode};
use crate::identity::Identity;
use crate::provider::{Attributes, KekError, Provider, Rank, Refused};

/// A KEK that is to be made.
#[derive(Clone, Debug)]
pub struct Plan {
    /// In the mode `oaep` its identity is known only when its keys are there.
    spec: KekSpec,
    /// When it becomes active.
    pub not_before: Timestamp,
    /// How it wraps.
    pub mode: Mode,
    /// The token in which it is made.
    pub made_in: String,
    /// The replicas, where only their vendor's tools can bring it.
    pub to_be_cloned_to: Vec<String>,
    /// What the token is asked for, for each object of the KEK. The end of the CKA_ID is random, and another one with
    /// each plan.
    pub templates: Vec<(&'static str, Attributes)>,
    /// The way by which a key like it comes out of its token, where the policy puts up with that.
    pub way_out: Option<String>,
    /// Why nobody knows whether such a key comes out, if that is so.
    pub untried: Option<String>,
}

/// A KEK that was made: what its maker wants to know.
#[derive(Clone, Debug)]
pub struct Generated {
    /// Its identity.
    pub identity: Identity,
    /// CKA_ID.
    pub id: Vec<u8>,
    /// The tokens that hold it.
    pub held_by: Vec<String>,
    /// The replicas that do not.
    pub lacked_by: Vec<String>,
}

/// Why there is no KEK of a plan that is known to work.
#[derive(Debug)]
pub struct NotGenerated {
    /// What failed.
    pub error: KekError,
    /// What may be in the token all the same, and become active.
    pub left: Option<Left>,
}

/// A KEK that may be there.
#[derive(Debug)]
pub struct Left {
    /// Its identity, if it is known.
    pub identity: Option<Identity>,
    /// CKA_ID.
    pub id: Vec<u8>,
}

impl From<KekError> for NotGenerated {
    fn from(error: KekError) -> Self {
        Self { error, left: None }
    }
}

impl NotGenerated {
    /// This KEK is there, or was a moment ago.
    fn after(kek: &KekSpec, error: KekError) -> Self {
        Self { error, left: Some(Left { identity: Some(kek.identity), id: kek.id.clone() }) }
    }

    /// The token was asked for the KEK of this plan: if that was the last that was heard of it, it may be there.
    fn asked(plan: &Plan, error: KekError) -> Self {
        if !matches!(error, KekError::Deadline(_) | KekError::Unavailable(_)) {
            return error.into();
        }
        let KekSpec { identity, id, .. } = &plan.spec;
        let what = format!("whether the KEK with id {} was made was not to be learned", hex(id));
        let identity = (plan.mode != Mode::Oaep).then_some(*identity);
        Self { error: tells_later(&what, &error), left: Some(Left { identity, id: id.clone() }) }
    }
}

fn tells_later(what: &str, error: &KekError) -> KekError {
    KekError::Unavailable(format!("{what}: {error}: `trousseau key list` tells later"))
}

impl Pkcs11 {
    /// Plans a KEK that becomes active at `not_before`, in the first token. `mode`: the profile's first, if `None`.
    ///
    /// Whether the token hands out such a key is tried, on throw-away keys that live in a session.
    ///
    /// # Errors
    /// The mode is not one of the profile's, the token is out of reach, or it hands out keys that it should not.
    pub async fn plan(&self, not_before: Timestamp, mode: Option<Mode>, deadline: Instant) -> Result<Plan, KekError> {
        let mode = mode.or(self.modes.first().copied()).filter(|mode| self.modes.contains(mode));
        let mode = mode.ok_or_else(|| {
            let known: Vec<_> = self.modes.iter().map(|mode| mode.as_str()).collect();
            self.refused(format!("its profile knows only {}", known.join(", ")))
        })?;
        let (first, replicas) = self.tokens.split_first().ok_or_else(|| self.refused("it has no token".into()))?;
        let id = admission::new_id(not_before).map_err(|error| self.refused(error.to_string()))?;
        let rank = Rank { not_before, id: id.to_vec() };
        let spec = first.rules.spec_of(&Admitted { rank, mode, pair: None, exception: None });
        let (way_out, untried) = match first.run(deadline, move |lane| exportability::way_out(lane, mode)).await? {
            WayOut::Closed => (None, None),
            WayOut::Open(way) => (Some(way), None),
            WayOut::Untried(why) => (None, Some(why)),
        };
        if let Some(way) = way_out.as_ref().filter(|_| self.exportable == Exportable::Refuse) {
            return Err(self.refused(format!(
                "a key that may not leave its token does: {way}: use another token; `[policy] exportable` has the last word"
            )));
        }
        let templates = attributes::templates(&first.rules.profile, &spec);
        let templates = templates.into_iter().map(|(of, template)| (of, attributes::readable(&template))).collect();
        let to_be_cloned_to = replicas.iter().map(|token| token.uri().to_string()).collect();
        let made_in = first.uri().to_string();
        Ok(Plan { spec, not_before, mode, made_in, to_be_cloned_to, templates, way_out, untried })
    }

    /// Makes the KEK of a plan.
    ///
    /// # Errors
    /// The token does not do it, and nothing is left behind; or it is lost before it has shown whether the KEK is there,
    /// and works.
    pub async fn generate(&self, plan: &Plan, deadline: Instant) -> Result<Generated, NotGenerated> {
        let first = self.tokens.first().ok_or_else(|| self.refused("it has no token".into()))?;
        first.link.check()?;
        let to_make = plan.spec.clone();
        let kek = first.run(deadline, move |lane| lane.generate(&to_make)).await;
        let kek = kek.map_err(|error| NotGenerated::asked(plan, error))?;
        let unknown = |what: &str, error: &KekError| {
            let what = format!("KEK {} (id {}) was made{what} was not to be learned", kek.identity, hex(&kek.id));
            NotGenerated::after(&kek, tells_later(&what, error))
        };
        let to_try = kek.clone();
        match first.run(deadline, move |lane| lane.proves_itself(&to_try)).await {
            Err(KekError::Refused(reason)) => return Err(self.removed(first, &kek, &reason, deadline).await),
            Err(error) => return Err(unknown(", and whether it works", &error)),
            Ok(()) => (),
        }
        let sighting = self.look(deadline).await;
        let sighting = sighting.map_err(|error| unknown(" and works, and which tokens hold it", &error))?;
        let made = sighting.keks.iter().find(|made| made.identity() == kek.identity);
        if let Some(made) = made.filter(|made| made.mode() == plan.mode.as_str()) {
            let held_by = made.held_by().into_iter().map(|holder| holder.name).collect();
            return Ok(Generated { identity: kek.identity, id: kek.id.clone(), held_by, lacked_by: made.lacked_by() });
        }
        let is_it = |refused: &Refused| refused.identity == Some(kek.identity);
        let reason = match sighting.refused.iter().find(|refused| is_it(refused)) {
            Some(refused) => refused.reason.clone(),
            None if made.is_some() => format!(
                "the token does not keep CKA_ALLOWED_MECHANISMS, so nothing tells that it is for mode {}: have a profile \
                 with that mode alone",
                plan.mode.as_str()
            ),
            None => "it is not to be found".into(),
        };
        Err(self.removed(first, &kek, &reason, deadline).await)
    }

    /// Removes a KEK that was just made and does not work, and says so.
    async fn removed(&self, from: &Token, kek: &KekSpec, reason: &str, deadline: Instant) -> NotGenerated {
        let what = format!("KEK {} was made and does not work: {reason}", kek.identity);
        let to_remove = kek.clone();
        match from.run(deadline, move |lane| lane.remove(&to_remove)).await {
            Ok(()) => self.refused(format!("{what}; it was removed again")).into(),
            Err(error) => {
                NotGenerated::after(kek, self.refused(format!("{what}; it could not be removed again: {error}")))
            }
        }
    }

    fn refused(&self, what: String) -> KekError {
        KekError::Refused(format!("provider {}: {what}", self.name))
    }
}
