//! What a token holds under the KEKs' label: which of it is a KEK, by what the token says and by its reference.

use std::collections::BTreeSet;
use std::time::Instant;

use cryptoki::object::{Attribute, ObjectHandle};
use jiff::Timestamp;

use super::admission::{self, Admitted, Decision, Rules, Said};
use super::error::{CallError, Class};
use super::lane::{Lane, hex};
use super::raw;
use crate::provider::{Attributes, Refused};

/// What a token holds under a label.
#[derive(Default)]
pub(super) struct Inventory {
    pub(super) keks: Vec<Candidate>,
    pub(super) refused: Vec<Refused>,
    /// The CKA_IDs of both.
    pub(super) ids: BTreeSet<Vec<u8>>,
}

/// A key that is a KEK by what the token says of it.
pub(super) struct Candidate {
    /// For people.
    key: String,
    pub(super) kek: Admitted,
    pub(super) attributes: Attributes,
}

impl Lane {
    /// Looks at every object with the label, and proves every KEK among them by its reference. `is_last`: with a new session
    /// and login; what still misses one then, misses it for this object alone, if for no other. Ends at the deadline: nobody
    /// waits for the rest, and a token that is slow has the next look to answer.
    pub(super) fn look(&mut self, rules: &Rules, deadline: Instant, is_last: bool) -> Result<Inventory, CallError> {
        let mut inventory = Inventory::default();
        let found = self.candidates(rules, deadline, &mut inventory)?;
        let Inventory { keks, refused, .. } = &mut inventory;
        let mut doubtful = None;
        for candidate in found {
            in_time(deadline)?;
            let spec = rules.spec_of(&candidate.kek);
            let proved = self.prove(&spec);
            let class = proved.as_ref().err().map(|error| self.class(error));
            let is_doubtful = match class {
                Some(Class::Session | Class::Login) => is_last,
                class => class == Some(Class::Doubtful),
            };
            match proved {
                Ok(()) => keks.push(candidate),
                Err(error) if is_doubtful || matches!(class, Some(Class::Refused | Class::BadInput)) => {
                    let reason = error.to_string();
                    refused.push(Refused {
                        key: candidate.key,
                        identity: Some(spec.identity),
                        reason,
                        is_ambiguous: false,
                    });
                    doubtful = doubtful.or(is_doubtful.then_some(error));
                }
                Err(error) => return Err(error),
            }
        }
        // Whether the token is well, another KEK tells: now, and not before.
        let mut tells = || keks.first().is_some_and(|known| self.prove(&rules.spec_of(&known.kek)).is_ok());
        match doubtful {
            Some(error) if !tells() => {
                self.connected.wants_its_library_anew();
                Err(error.settled(Class::Token))
            }
            _ => Ok(inventory),
        }
    }

    /// The keys with the label that are KEKs by what the token says of them, each with its name for people. The others,
    /// and the ids of all, go into the inventory.
    fn candidates(
        &self,
        rules: &Rules,
        deadline: Instant,
        Inventory { refused, ids, .. }: &mut Inventory,
    ) -> Result<Vec<Candidate>, CallError> {
        let named =
            |id: Option<&[u8]>| format!("key {} with label {}", id.map_or("without id".into(), hex), rules.label);
        let mut objects = Vec::new();
        for handle in self.find_labelled(rules)? {
            in_time(deadline)?;
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
            rules.decide(&objects, Timestamp::now()).into_iter().flatten()
        {
            identity.map(|identity| gone.remove(&identity));
            let key = named(id.as_deref());
            ids.extend(id);
            match verdict {
                Ok(kek) => candidates.push(Candidate { key, kek, attributes }),
                Err(reason) => refused.push(Refused { key, identity, reason, is_ambiguous }),
            }
        }
        match gone.first() {
            Some(kek) if refused.iter().all(|refused| refused.identity.is_some()) => Err(self.is_gone(*kek)),
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

fn in_time(deadline: Instant) -> Result<(), CallError> {
    let late = || CallError::new(Class::Refused, "nobody waits for the end of this look any more");
    if Instant::now() < deadline { Ok(()) } else { Err(late()) }
}
