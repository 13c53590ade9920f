//! What a token holds under the KEKs' label: which of it is a KEK, by what the token says and by its reference.

use cryptoki::object::{Attribute, ObjectHandle};
use jiff::Timestamp;

use super::admission::{self, Admitted, Decision, Rules, Said};
use super::error::{CallError, Class};
use super::lane::{Lane, hex, is_gone};
use super::raw;
use crate::provider::{Attributes, Refused};

/// What a token holds under a label.
pub(super) struct Inventory {
    pub(super) keks: Vec<Candidate>,
    pub(super) refused: Vec<Refused>,
}

/// A key that is a KEK by what the token says of it.
pub(super) struct Candidate {
    /// For people.
    key: String,
    pub(super) kek: Admitted,
    pub(super) attributes: Attributes,
}

impl Lane {
    /// Looks at every object with the label, and proves every KEK among them by its reference.
    pub(super) fn look(&mut self, rules: &Rules, now: Timestamp) -> Result<Inventory, CallError> {
        let mut refused = Vec::new();
        let found = self.candidates(rules, now, &mut refused)?;
        let mut keks = Vec::new();
        let mut doubtful = None;
        for candidate in found {
            let spec = rules.spec_of(&candidate.kek);
            match self.prove(&spec) {
                Ok(()) => keks.push(candidate),
                Err(error) if matches!(self.class(&error), Class::Refused | Class::BadInput | Class::Doubtful) => {
                    let reason = error.to_string();
                    refused.push(Refused {
                        key: candidate.key,
                        identity: Some(spec.identity),
                        reason,
                        is_ambiguous: false,
                    });
                    doubtful = doubtful.or((self.class(&error) == Class::Doubtful).then_some(error));
                }
                Err(error) => return Err(error),
            }
        }
        match doubtful {
            // No other KEK says that the token is well.
            Some(error) if keks.is_empty() => Err(error.settled(Class::Token)),
            _ => Ok(Inventory { keks, refused }),
        }
    }

    /// The keys with the label that are KEKs by what the token says of them, each with its name for people.
    fn candidates(
        &self,
        rules: &Rules,
        now: Timestamp,
        refused: &mut Vec<Refused>,
    ) -> Result<Vec<Candidate>, CallError> {
        let named =
            |id: Option<&[u8]>| format!("key {} with label {}", id.map_or("without id".into(), hex), rules.label);
        let mut objects = Vec::new();
        for handle in self.find_labelled(rules)? {
            match self.ask(handle) {
                Ok(said) => objects.push(said),
                Err(error) if self.class(&error) == Class::Refused => {
                    let reason = format!("what the token says of it cannot be read: {error}");
                    refused.push(Refused { key: named(None), identity: None, reason, is_ambiguous: false });
                }
                Err(error) => return Err(error),
            }
        }
        let mut candidates = Vec::new();
        let mut gone = self.connected.proved().clone();
        for Decision { id, identity, attributes, verdict, is_ambiguous } in
            rules.decide(&objects, now).into_iter().flatten()
        {
            identity.map(|identity| gone.remove(&identity));
            let key = named(id.as_deref());
            match verdict {
                Ok(kek) => candidates.push(Candidate { key, kek, attributes }),
                Err(reason) => refused.push(Refused { key, identity, reason, is_ambiguous }),
            }
        }
        match gone.first() {
            Some(kek) if refused.iter().all(|refused| refused.identity.is_some()) => Err(is_gone(*kek)),
            _ => Ok(candidates),
        }
    }

    /// Every object with the KEKs' label.
    pub(super) fn find_labelled(&self, rules: &Rules) -> Result<Vec<ObjectHandle>, CallError> {
        let label = Attribute::Label(rules.label.clone().into_bytes());
        Ok(self.session.find_objects(&[Attribute::Token(true), label])?)
    }

    /// What decides whether an object is a KEK.
    pub(super) fn ask(&self, object: ObjectHandle) -> Result<Said, CallError> {
        let mut attributes = self.session.get_attributes(object, &admission::ASKED)?;
        attributes.extend(raw::allowed_mechanisms(&self.session, object)?);
        Ok(Said(attributes))
    }
}
