//! One session and what was found through it: where a worker thread's calls are made.
//!
//! A KEK's handle is found once a session and kept. It is used only after the key behind it has unwrapped the KEK's
//! reference, so a token that comes back with another key under the same id is not used, whatever it calls that key.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use cryptoki::mechanism::Mechanism;
use cryptoki::object::{Attribute, KeyType, ObjectClass};
use cryptoki::session::Session;
use sha2::{Digest, Sha256};

use super::admission::KekSpec;
use super::attributes;
use super::connection::Connected;
use super::error::{CallError, Class};
use super::mechanism::{self, Handles};
use super::oaep::{self, Pair};
use crate::config::{Codes, GcmIv, Mode};
use crate::identity::Identity;
use crate::secret::Dek;
use crate::state::{Reference, State, StateError};

/// A session of a worker. It is closed before the connection that it came from is let go.
pub(super) struct Lane {
    pub(super) session: Session,
    handles: HashMap<Identity, Handles>,
    pub(super) connected: Arc<Connected>,
    state: Arc<State>,
}

impl Lane {
    pub(super) fn open(connected: Arc<Connected>, state: Arc<State>) -> Result<Self, CallError> {
        let session = connected.open_session()?;
        connected.count_lanes(|lanes| lanes + 1);
        Ok(Self { session, handles: HashMap::new(), connected, state })
    }

    pub(super) fn class(&self, error: &CallError) -> Class {
        error.class(&self.connected.profile.errors)
    }

    /// Wraps a DEK under the KEK, and has the token unwrap it again: a bit that flips in what is stored would be noticed
    /// by nobody until all that hangs on this DEK is to be read. Then the session is replaced, and it is tried once more.
    pub(super) fn wrap(&mut self, kek: &KekSpec, dek: &Dek) -> Result<Vec<u8>, CallError> {
        let handles = self.handles(kek)?;
        self.count(kek);
        let wrapped = self.wrap_with(kek, handles, dek).map_err(|error| self.of_our_own(error))?;
        self.count(kek);
        self.opens(kek, handles, &wrapped, dek).map_err(|error| match self.class(&error) {
            Class::BadInput | Class::Doubtful | Class::Refused => {
                CallError::new(Class::Session, format!("what the token wrapped does not open again: {error}"))
            }
            _ => error,
        })?;
        Ok(wrapped)
    }

    /// Unwraps a DEK that the KEK is said to have wrapped.
    ///
    /// Many tokens answer a damaged ciphertext and a broken device with one code; others call the input a parameter or
    /// a template that they do not take. So unless the answer is clear, the KEK unwraps its reference: if it cannot,
    /// the answer was no lie. If it can, the input is tried once more, and only then is it bad. Three calls at most;
    /// no stored value can make more of itself.
    pub(super) fn unwrap(&mut self, kek: &KekSpec, wrapped: &[u8]) -> Result<Dek, CallError> {
        if let Some(pair) = &kek.pair {
            pair.verified(wrapped)?; // before the token is asked anything
        }
        let handles = self.handles(kek)?;
        self.count(kek);
        let signed = kek.pair.is_some();
        let unwrap = || {
            let unwrapped = self.unwrap_with(kek, handles, wrapped);
            unwrapped.map_err(|error| if signed { self.of_our_own(error) } else { error })
        };
        let is_clear = |error: &CallError| {
            matches!(self.class(error), Class::BadInput | Class::Session | Class::Login | Class::Pin)
        };
        match unwrap() {
            Err(first) if !is_clear(&first) => {
                self.still_works(kek, handles).map_err(|error| match self.class(&error) {
                    Class::Doubtful | Class::BadInput => error.settled(Class::Token),
                    _ => error,
                })?;
                unwrap().map_err(|again| {
                    if is_clear(&again) { again } else { in_spite_of_proof(again, &self.connected.profile.errors) }
                })
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

    /// The handles of the KEK, which has proved to be the key that it was.
    fn handles(&mut self, kek: &KekSpec) -> Result<Handles, CallError> {
        if let Some(handles) = self.handles.get(&kek.identity) {
            return Ok(*handles);
        }
        let handles = self.find_recognised(kek).map_err(|error| self.of_our_own(error))?;
        self.handles.insert(kek.identity, handles);
        self.connected.proved().insert(kek.identity);
        Ok(handles)
    }

    fn find_recognised(&self, kek: &KekSpec) -> Result<Handles, CallError> {
        let handles = self.find(kek)?;
        let reference = match self.reference(kek)? {
            Some(reference) => {
                self.recognise(kek, handles, &reference)?;
                reference
            }
            None => self.make_reference(kek, handles)?,
        };
        let is_proved = self.connected.proved().contains(&kek.identity);
        if !is_proved {
            self.check_ivs(kek, handles, &reference)?;
        }
        Ok(handles)
    }

    /// Where the token makes the IV: it does so each time anew, and in two new sessions too, since some count from the
    /// same number in each.
    fn check_ivs(&self, kek: &KekSpec, handles: Handles, reference: &Reference) -> Result<(), CallError> {
        if kek.mode != Mode::Gcm || self.connected.profile.gcm_iv == GcmIv::Ours {
            return Ok(());
        }
        let value = Dek::generate()?;
        // This session may have wrapped before, so that its count is ahead of a new one's.
        let wrapped_anew = || {
            let other = Self::open(Arc::clone(&self.connected), Arc::clone(&self.state))?;
            other.wrap_with(kek, other.find(kek)?, &value)
        };
        let wrapped = [
            unhex(&reference.wrapped)?,
            self.wrap_with(kek, handles, &value)?,
            self.wrap_with(kek, handles, &value)?,
            wrapped_anew()?,
            wrapped_anew()?,
        ];
        let ivs: BTreeSet<_> = wrapped.iter().map(|wrapped| mechanism::iv_of(wrapped)).collect();
        if ivs.len() < wrapped.len() {
            return Err(CallError::new(Class::Refused, "the token used one IV twice, which would give the KEK away"));
        }
        Ok(())
    }

    fn wrap_with(&self, kek: &KekSpec, handles: Handles, dek: &Dek) -> Result<Vec<u8>, CallError> {
        mechanism::wrap(&self.connected.profile, kek, &self.session, handles, dek)
    }

    fn unwrap_with(&self, kek: &KekSpec, handles: Handles, wrapped: &[u8]) -> Result<Dek, CallError> {
        mechanism::unwrap(&self.connected.profile, kek, &self.session, handles, wrapped)
    }

    /// Nothing foreign went in: what the token calls damaged is its own doing.
    fn of_our_own(&self, error: CallError) -> CallError {
        match self.class(&error) {
            Class::BadInput => error.settled(Class::Doubtful),
            _ => error,
        }
    }

    fn find(&self, kek: &KekSpec) -> Result<Handles, CallError> {
        let find = |class: ObjectClass, key_type: KeyType, id: Vec<u8>| {
            let wanted = [
                Attribute::Class(class),
                Attribute::KeyType(key_type),
                Attribute::Token(true),
                Attribute::Label(kek.label.clone().into_bytes()),
                Attribute::Id(id.clone()),
            ];
            match *self.session.find_objects(&wanted)?.as_slice() {
                [handle] => Ok(handle),
                [] if self.connected.proved().contains(&kek.identity) => Err(self.is_gone(kek.identity)),
                [] => Err(CallError::new(Class::Refused, format!("the token has no key {}", hex(&id)))),
                _ => Err(CallError::new(Class::Refused, format!("the token has several keys {}", hex(&id)))),
            }
        };
        if kek.mode == Mode::Oaep {
            let find = |id| find(ObjectClass::PRIVATE_KEY, KeyType::RSA, id);
            return Ok(Handles { key: find(kek.id.clone())?, signing: find(oaep::signer_id(&kek.id))? });
        }
        let key = find(ObjectClass::SECRET_KEY, KeyType::AES, kek.id.clone())?;
        Ok(Handles { key, signing: key })
    }

    /// A KEK that was used a moment ago is not there.
    pub(super) fn is_gone(&self, kek: Identity) -> CallError {
        self.connected.wants_its_library_anew();
        CallError::new(Class::Token, format!("KEK {kek} was there, and now is not"))
    }

    /// The KEK wraps a random value and unwraps it again: its mode works here, and from now on it can be recognised.
    fn make_reference(&self, kek: &KekSpec, handles: Handles) -> Result<Reference, CallError> {
        let reference = self.round_trip(kek, handles)?;
        let kept = self.state.keep_reference(kek.identity, reference.clone()).map_err(damaged_state)?;
        if kept != reference {
            self.recognise(kek, handles, &kept)?; // another process was first
        }
        Ok(kept)
    }

    /// The key unwraps the KEK's reference. A key that does not, twice, and yet works, is another one.
    fn recognise(&self, kek: &KekSpec, handles: Handles, reference: &Reference) -> Result<(), CallError> {
        match self.check_reference(kek, handles, reference) {
            Err(error) if matches!(self.class(&error), Class::Doubtful | Class::BadInput) => {
                self.round_trip(kek, handles)?;
                self.check_reference(kek, handles, reference).map_err(|again| match self.class(&again) {
                    Class::Doubtful | Class::BadInput => another_key(),
                    _ => again,
                })
            }
            settled => settled,
        }
    }

    /// After a doubtful answer: whether the KEK, which has been recognised, still unwraps its reference.
    fn still_works(&self, kek: &KekSpec, handles: Handles) -> Result<(), CallError> {
        let reference = self.reference(kek)?.ok_or_else(another_key)?;
        self.check_reference(kek, handles, &reference)
    }

    fn reference(&self, kek: &KekSpec) -> Result<Option<Reference>, CallError> {
        self.state.reference(kek.identity).map_err(damaged_state)
    }

    fn round_trip(&self, kek: &KekSpec, handles: Handles) -> Result<Reference, CallError> {
        let value = Dek::generate()?;
        let wrapped = self.wrap_with(kek, handles, &value)?;
        self.opens(kek, handles, &wrapped, &value)?;
        Ok(Reference { wrapped: hex(&wrapped), sha256: sha256(&value) })
    }

    /// Has the KEK wrap a random value and unwrap it, whatever it has done before.
    pub(super) fn try_out(&mut self, kek: &KekSpec) -> Result<(), CallError> {
        let handles = self.handles(kek)?;
        self.round_trip(kek, handles).map(drop)
    }

    /// Whether a KEK that was just made works, and is remembered nowhere yet. If the answer leaves a doubt it does not.
    pub(super) fn proves_itself(&self, kek: &KekSpec) -> Result<(), CallError> {
        let tried = self.find(kek).and_then(|handles| self.round_trip(kek, handles));
        tried.map(drop).map_err(|error| match self.class(&error) {
            Class::Doubtful | Class::BadInput => error.settled(Class::Refused),
            _ => error,
        })
    }

    /// What was wrapped just now unwraps to what it was.
    fn opens(&self, kek: &KekSpec, handles: Handles, wrapped: &[u8], dek: &Dek) -> Result<(), CallError> {
        if mechanism::opens(&self.connected.profile, kek, &self.session, handles, wrapped, dek)? {
            return Ok(());
        }
        Err(CallError::new(Class::Refused, "the token unwrapped another value than it had wrapped"))
    }

    fn check_reference(&self, kek: &KekSpec, handles: Handles, reference: &Reference) -> Result<(), CallError> {
        let wrapped = unhex(&reference.wrapped)?;
        let value = self.unwrap_with(kek, handles, &wrapped)?;
        if sha256(&value) == reference.sha256 {
            return Ok(());
        }
        // Another key opens nothing: a bit has flipped on the way, or the token lies.
        Err(CallError::new(Class::Doubtful, "the KEK's reference unwraps to another value"))
    }

    /// Finds the KEK anew, since a handle may have outlived its key, and has it unwrap its reference.
    pub(super) fn prove(&mut self, kek: &KekSpec) -> Result<(), CallError> {
        self.handles.remove(&kek.identity);
        self.handles(kek).map(|_| ())
    }

    /// Removes the KEK that was just made and does not work.
    pub(super) fn remove(&self, kek: &KekSpec) -> Result<(), CallError> {
        if kek.mode == Mode::Oaep {
            return oaep::remove(&self.session, &kek.label, &kek.id);
        }
        Ok(self.session.destroy_object(self.find(kek)?.key)?)
    }

    /// Makes a KEK in the token, and returns it with its identity.
    pub(super) fn generate(&self, kek: &KekSpec) -> Result<KekSpec, CallError> {
        let profile = &self.connected.profile;
        if kek.mode != Mode::Oaep {
            self.session.generate_key(&Mechanism::AesKeyGen, &attributes::template(profile, kek))?;
            return Ok(kek.clone());
        }
        let Handles { key, signing } = oaep::make(&self.session, profile, kek)?;
        let pair = || {
            let (key, signing) = (self.ask(key)?, self.ask(signing)?);
            Pair::new(&kek.id, &key, &signing).map_err(|what| CallError::new(Class::Refused, what))
        };
        match pair() {
            Ok(pair) => Ok(KekSpec { identity: pair.identity, pair: Some(Arc::new(pair)), ..kek.clone() }),
            Err(error) => {
                oaep::remove(&self.session, &kek.label, &kek.id)?;
                Err(error)
            }
        }
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        self.connected.count_lanes(|lanes| lanes.saturating_sub(1));
    }
}

/// What an unclear answer means that came again, after the KEK had opened its reference.
///
/// The input is bad, if a token may say so of one. None says of damaged input that its device is removed or that its
/// module is broken: then a token comes and goes, and a good value must not be called damaged. Yet the connection is
/// not given up, nor does the process end, since the KEK has just proved itself through it: where a token says such
/// a thing of a value that it does not like, whoever stores that value could have it done again and again. So the
/// caller hears of the token, a replica is asked, and if it really is gone the next call finds that out.
fn in_spite_of_proof(again: CallError, codes: &Codes) -> CallError {
    match again.class(codes) {
        Class::Token | Class::Fatal => again.of_one_value(),
        _ => again.settled(Class::BadInput),
    }
}

fn damaged_state(error: StateError) -> CallError {
    CallError::new(Class::Refused, format!("{error}: {}", error.remedy()))
}

fn another_key() -> CallError {
    let what = "this is another key than the one that this host first saw under its id: restore the right one, or, \
                if this is the right one, remove its reference-….json from the state directory";
    CallError::new(Class::Refused, what)
}

fn unhex(text: &str) -> Result<Vec<u8>, CallError> {
    base16ct::lower::decode_vec(text).map_err(|_| another_key())
}

pub(super) fn hex(bytes: &[u8]) -> String {
    base16ct::lower::encode_string(bytes)
}

fn sha256(value: &Dek) -> String {
    hex(&Sha256::digest(value.expose()))
}

#[cfg(test)]
mod tests {
    use cryptoki::context::Function;
    use cryptoki::error::{Error, RvError};

    use super::*;

    #[test]
    fn only_what_a_token_may_say_of_an_input_makes_it_a_bad_one() {
        let codes = Codes::default();
        for (code, class) in [
            (RvError::DeviceError, Class::BadInput),  // kryoptic, of damaged KW
            (RvError::GeneralError, Class::BadInput), // SoftHSM
            (RvError::VendorDefined(0x8000_0201), Class::BadInput),
            (RvError::MechanismParamInvalid, Class::BadInput),
            (RvError::DeviceRemoved, Class::Refused),
            (RvError::TokenNotPresent, Class::Refused),
            (RvError::MutexBad, Class::Refused),
        ] {
            let again = in_spite_of_proof(CallError::from(Error::Pkcs11(code, Function::Decrypt)), &codes);
            assert_eq!(again.class(&codes), class, "{code:?}");
        }
    }
}
