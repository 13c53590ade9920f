//! One session and what was found through it: where a worker thread's calls are made.
//!
//! A KEK's handle is found once a session and kept. It is used only after the key behind it has unwrapped the KEK's
//! reference, so a token that comes back with another key under the same id is not used, whatever it calls that key.

use std::collections::HashMap;
use std::sync::Arc;

use cryptoki::object::{Attribute, KeyType, ObjectClass, ObjectHandle};
use cryptoki::session::Session;
use jiff::Timestamp;
use sha2::{Digest, Sha256};

use super::admission::{self, Admitted, KekSpec, Rules, Said};
use super::connection::Connected;
use super::error::{CallError, Class};
use super::mechanism;
use crate::identity::Identity;
use crate::provider::Refused;
use crate::secret::Dek;
use crate::state::{Reference, State, StateError};

/// A session of a worker. It is closed before the connection that it came from is let go.
pub(super) struct Lane {
    pub(super) session: Session,
    handles: HashMap<Identity, ObjectHandle>,
    pub(super) connected: Arc<Connected>,
    state: Arc<State>,
}

/// What a token holds under a label.
pub(super) struct Inventory {
    pub(super) keks: Vec<Admitted>,
    pub(super) refused: Vec<Refused>,
}

impl Lane {
    pub(super) fn open(connected: Arc<Connected>, state: Arc<State>) -> Result<Self, CallError> {
        let session = connected.open_session()?;
        connected.count_lanes(|lanes| lanes + 1);
        Ok(Self { session, handles: HashMap::new(), connected, state })
    }

    fn class(&self, error: &CallError) -> Class {
        error.class(&self.connected.codes)
    }

    /// Wraps a DEK under the KEK.
    pub(super) fn wrap(&mut self, kek: &KekSpec, dek: &Dek) -> Result<Vec<u8>, CallError> {
        let handle = self.handle(kek)?;
        self.count(kek);
        mechanism::wrap(kek.mode, &self.session, handle, kek.identity, dek).map_err(|error| self.of_our_own(error))
    }

    /// Unwraps a DEK that the KEK is said to have wrapped.
    ///
    /// Many tokens answer a damaged ciphertext and a broken device with one code; others call the input a parameter or
    /// a template that they do not take. So unless the answer is clear, the KEK unwraps its reference: if it cannot,
    /// the answer was no lie. If it can, the input is tried once more, and only then is it bad. Three calls at most;
    /// no stored value can make more of itself.
    pub(super) fn unwrap(&mut self, kek: &KekSpec, wrapped: &[u8]) -> Result<Dek, CallError> {
        let handle = self.handle(kek)?;
        self.count(kek);
        let unwrap = || mechanism::unwrap(kek.mode, &self.session, handle, kek.identity, wrapped);
        let is_clear = |error: &CallError| {
            matches!(self.class(error), Class::BadInput | Class::Session | Class::Login | Class::Pin)
        };
        match unwrap() {
            Err(first) if !is_clear(&first) => {
                self.still_works(kek, handle).map_err(|error| match self.class(&error) {
                    Class::Doubtful | Class::BadInput => error.settled(Class::Token),
                    _ => error,
                })?;
                unwrap().map_err(|again| if is_clear(&again) { again } else { again.settled(Class::BadInput) })
            }
            settled => settled,
        }
    }

    /// Some libraries do not free what an object took until they are finalized.
    fn count(&self, kek: &KekSpec) {
        if kek.mode.wraps_objects() {
            self.connected.count_object();
        }
    }

    /// The handle of the KEK, which has proved to be the key that it was.
    fn handle(&mut self, kek: &KekSpec) -> Result<ObjectHandle, CallError> {
        if let Some(handle) = self.handles.get(&kek.identity) {
            return Ok(*handle);
        }
        let handle = self.find_recognised(kek).map_err(|error| self.of_our_own(error))?;
        self.handles.insert(kek.identity, handle);
        self.connected.proved().insert(kek.identity);
        Ok(handle)
    }

    fn find_recognised(&self, kek: &KekSpec) -> Result<ObjectHandle, CallError> {
        let handle = self.find(kek)?;
        match self.reference(kek)? {
            Some(reference) => self.recognise(kek, handle, &reference)?,
            None => self.make_reference(kek, handle)?,
        }
        Ok(handle)
    }

    /// Nothing foreign went in: what the token calls damaged is its own doing.
    fn of_our_own(&self, error: CallError) -> CallError {
        match self.class(&error) {
            Class::BadInput => error.settled(Class::Doubtful),
            _ => error,
        }
    }

    fn find(&self, kek: &KekSpec) -> Result<ObjectHandle, CallError> {
        let found = self.session.find_objects(&[
            Attribute::Class(ObjectClass::SECRET_KEY),
            Attribute::KeyType(KeyType::AES),
            Attribute::Token(true),
            Attribute::Label(kek.label.clone().into_bytes()),
            Attribute::Id(kek.id.clone()),
        ])?;
        match *found.as_slice() {
            [handle] => Ok(handle),
            [] if self.connected.proved().contains(&kek.identity) => Err(is_gone(kek.identity)),
            [] => Err(CallError::new(Class::Refused, format!("the token has no key {}", hex(&kek.id)))),
            _ => Err(CallError::new(Class::Refused, format!("the token has several keys {}", hex(&kek.id)))),
        }
    }

    /// The KEK wraps a random value and unwraps it again: its mode works here, and from now on it can be recognised.
    fn make_reference(&self, kek: &KekSpec, handle: ObjectHandle) -> Result<(), CallError> {
        let reference = self.round_trip(kek, handle)?;
        let kept = self.state.keep_reference(kek.identity, reference.clone()).map_err(damaged_state)?;
        if kept != reference {
            self.recognise(kek, handle, &kept)?; // another process was first
        }
        Ok(())
    }

    /// The key unwraps the KEK's reference. A key that does not, twice, and yet works, is another one.
    fn recognise(&self, kek: &KekSpec, handle: ObjectHandle, reference: &Reference) -> Result<(), CallError> {
        match self.check_reference(kek, handle, reference) {
            Err(error) if matches!(self.class(&error), Class::Doubtful | Class::BadInput) => {
                self.round_trip(kek, handle)?;
                self.check_reference(kek, handle, reference).map_err(|again| match self.class(&again) {
                    Class::Doubtful | Class::BadInput => another_key(),
                    _ => again,
                })
            }
            settled => settled,
        }
    }

    /// After a doubtful answer: whether the KEK, which has been recognised, still unwraps its reference.
    fn still_works(&self, kek: &KekSpec, handle: ObjectHandle) -> Result<(), CallError> {
        let reference = self.reference(kek)?.ok_or_else(another_key)?;
        self.check_reference(kek, handle, &reference)
    }

    fn reference(&self, kek: &KekSpec) -> Result<Option<Reference>, CallError> {
        self.state.reference(kek.identity).map_err(damaged_state)
    }

    fn round_trip(&self, kek: &KekSpec, handle: ObjectHandle) -> Result<Reference, CallError> {
        let value = Dek::generate()?;
        let wrapped = mechanism::wrap(kek.mode, &self.session, handle, kek.identity, &value)?;
        let unwrapped = mechanism::unwrap(kek.mode, &self.session, handle, kek.identity, &wrapped)?;
        if sha256(&unwrapped) != sha256(&value) {
            return Err(CallError::new(Class::Refused, "the token unwrapped another value than it had wrapped"));
        }
        Ok(Reference { wrapped: hex(&wrapped), sha256: sha256(&value) })
    }

    fn check_reference(&self, kek: &KekSpec, handle: ObjectHandle, reference: &Reference) -> Result<(), CallError> {
        let wrapped = base16ct::lower::decode_vec(&reference.wrapped).map_err(|_| another_key())?;
        let value = mechanism::unwrap(kek.mode, &self.session, handle, kek.identity, &wrapped)?;
        if sha256(&value) == reference.sha256 { Ok(()) } else { Err(another_key()) }
    }

    /// Looks at every object with the label, and proves every KEK among them by its reference.
    pub(super) fn look(&mut self, rules: &Rules, now: Timestamp) -> Result<Inventory, CallError> {
        let mut refused = Vec::new();
        let found = self.candidates(rules, now, &mut refused)?;
        let mut keks = Vec::new();
        let mut doubtful = None;
        for (n, (key, kek)) in found.iter().enumerate() {
            let key = key.clone();
            let spec = rules.spec_of(kek);
            let identity = Some(spec.identity);
            if found.iter().enumerate().any(|(m, (_, other))| m != n && other.rank.id == kek.rank.id) {
                let reason = "another key has the same CKA_ID: remove the one that is not meant".into();
                refused.push(Refused { key, identity, reason });
                continue;
            }
            match self.prove(&spec) {
                Ok(()) => keks.push(kek.clone()),
                Err(error) if matches!(self.class(&error), Class::Refused | Class::BadInput | Class::Doubtful) => {
                    refused.push(Refused { key, identity, reason: error.to_string() });
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
    ) -> Result<Vec<(String, Admitted)>, CallError> {
        let mut candidates = Vec::new();
        let mut gone = self.connected.proved().clone();
        for handle in self.find_labelled(rules)? {
            let named =
                |id: Option<&[u8]>| format!("key {} with label {}", id.map_or("without id".into(), hex), rules.label);
            let said = match self.said(handle) {
                Ok(said) => said,
                Err(error) if self.class(&error) == Class::Refused => {
                    let reason = format!("what the token says of it cannot be read: {error}");
                    refused.push(Refused { key: named(None), identity: None, reason });
                    continue;
                }
                Err(error) => return Err(error),
            };
            let identity = said.id().map(Identity::of_pkcs11);
            identity.map(|identity| gone.remove(&identity));
            match rules.admit(&said, now) {
                Ok(kek) => candidates.push((named(said.id()), kek)),
                Err(reason) => refused.push(Refused { key: named(said.id()), identity, reason }),
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
    pub(super) fn said(&self, handle: ObjectHandle) -> Result<Said, CallError> {
        Ok(Said(self.session.get_attributes(handle, &admission::ASKED)?))
    }

    /// Finds the KEK anew, since a handle may have outlived its key, and has it unwrap its reference.
    fn prove(&mut self, kek: &KekSpec) -> Result<(), CallError> {
        self.handles.remove(&kek.identity);
        self.handle(kek).map(|_| ())
    }

    /// Removes the KEK that was just made and does not work.
    pub(super) fn remove(&self, kek: &KekSpec) -> Result<(), CallError> {
        let handle = self.find(kek)?;
        Ok(self.session.destroy_object(handle)?)
    }

    /// Makes a KEK in the token.
    pub(super) fn generate(&self, kek: &KekSpec) -> Result<(), CallError> {
        self.session.generate_key(&cryptoki::mechanism::Mechanism::AesKeyGen, &template(kek))?;
        Ok(())
    }
}

/// How a KEK is made: 256-bit AES that never leaves the token, and whose attributes nobody changes.
pub(super) fn template(kek: &KekSpec) -> Vec<Attribute> {
    let wraps_objects = kek.mode.wraps_objects();
    vec![
        Attribute::Class(ObjectClass::SECRET_KEY),
        Attribute::KeyType(KeyType::AES),
        Attribute::ValueLen(32.into()),
        Attribute::Label(kek.label.clone().into_bytes()),
        Attribute::Id(kek.id.clone()),
        Attribute::Token(true),
        Attribute::Private(true),
        Attribute::Sensitive(true),
        Attribute::Extractable(false),
        Attribute::Modifiable(false),
        Attribute::Copyable(false),
        Attribute::Wrap(wraps_objects),
        Attribute::Unwrap(wraps_objects),
        Attribute::Encrypt(!wraps_objects),
        Attribute::Decrypt(!wraps_objects),
        Attribute::Sign(false),
        Attribute::Verify(false),
        Attribute::Derive(false),
        // The token itself then refuses every other use of the key, such as CBC or ECB.
        Attribute::AllowedMechanisms(vec![kek.mode.mechanism()]),
    ]
}

impl Drop for Lane {
    fn drop(&mut self) {
        self.connected.count_lanes(|lanes| lanes.saturating_sub(1));
    }
}

/// A KEK that was used a moment ago is not there.
fn is_gone(kek: Identity) -> CallError {
    CallError::new(Class::Token, format!("KEK {kek} was there, and now is not"))
}

fn damaged_state(error: StateError) -> CallError {
    CallError::new(Class::Refused, format!("{error}: {}", error.remedy()))
}

fn another_key() -> CallError {
    let what = "this is another key than the one that this host first saw under its id: restore the right one, or, \
                if this is the right one, remove its reference-….json from the state directory";
    CallError::new(Class::Refused, what)
}

fn hex(bytes: &[u8]) -> String {
    base16ct::lower::encode_string(bytes)
}

fn sha256(value: &Dek) -> String {
    hex(&Sha256::digest(value.expose()))
}
