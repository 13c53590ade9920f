//! The throw-away keys, and the ways that are gone on them.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::Arc;

use cryptoki::mechanism::Mechanism;
use cryptoki::mechanism::aead::GcmParams;
use cryptoki::object::{Attribute, AttributeType, ObjectHandle};
use cryptoki::session::Session;
use rsa::PublicKey;
use zeroize::Zeroizing;

use super::super::admission::KekSpec;
use super::super::error::{CallError, Class};
use super::super::mechanism::Handles;
use super::super::oaep::Pair;
use super::super::{attributes, mechanism, oaep, raw};
use super::{Kind, Outcome, ThrowAway, pairs};
use crate::config::{Mode, Profile};
use crate::identity::Identity;
use crate::secret::Dek;

/// CKA_LABEL of the throw-away keys. Their CKA_ID is no UUIDv7, so that no plugin takes one for a KEK.
const LABEL: &str = "trousseau-throw-away";
const ID_PREFIX: &[u8; 10] = b"throw-away";

pub(super) type Told = (Outcome, String);
pub(super) type Way = (&'static str, fn(&Stand, &Key) -> Result<Told, CallError>);

const COPY: Way = ("copy it as EXTRACTABLE and not SENSITIVE", |stand, key| stand.copy(key));
const WRAP: Way = ("wrap it under a fresh key", |stand, key| stand.wrap_under_fresh(key, key.handle));
const SHOW: Way = ("set SENSITIVE=false", |stand, key| stand.loosen(key, Attribute::Sensitive(false)));
const FREE: Way = ("set EXTRACTABLE=true", |stand, key| stand.loosen(key, Attribute::Extractable(true)));
const READ: Way = ("read CKA_VALUE", |stand, key| stand.read(key, key.handle));
const READ_NUMBERS: Way = ("read CKA_PRIVATE_EXPONENT, CKA_PRIME_1 …", |stand, key| stand.read(key, key.handle));
const WRAP_ITSELF: Way = ("wrap it under itself", |stand, key| stand.wrap_under(key, key.handle, key.handle, false));

/// The ways for a kind of key.
pub(super) const fn ways(mode: Mode) -> &'static [Way] {
    match mode {
        Mode::Oaep => &[READ_NUMBERS, COPY, WRAP, SHOW, FREE],
        _ => &[READ, COPY, WRAP_ITSELF, WRAP, SHOW, FREE],
    }
}

/// A session, and the keys that were made in it. They are destroyed with the stand, and go with the session in any case.
pub(super) struct Stand<'s> {
    session: &'s Session,
    profile: &'s Profile,
    made: RefCell<Vec<ObjectHandle>>,
}

/// A throw-away key, and by what its bytes are known. Of a pair it is the private key that decrypts.
pub(super) struct Key {
    handle: ObjectHandle,
    /// It, and its public key if it has one.
    objects: Vec<ObjectHandle>,
    spec: KekSpec,
    known_by: KnownBy,
}

/// By what bytes are known to be a key's.
enum KnownBy {
    /// What it has wrapped.
    Wrapped { value: Dek, wrapped: Vec<u8> },
    /// Its public key.
    Public(PublicKey),
}

/// A key that consists of one object.
const fn of_one(key: ObjectHandle) -> Handles {
    Handles { key, signing: key }
}

impl<'s> Stand<'s> {
    pub(super) fn new(session: &'s Session, profile: &'s Profile) -> Self {
        Self { session, profile, made: RefCell::default() }
    }
}

impl Stand<'_> {
    /// A key of this kind; in the session if the token makes it there, else in the token if that is allowed.
    pub(super) fn throw_away(&self, kind: Kind, may_write: bool) -> Result<(Key, ThrowAway), CallError> {
        let mut id = [0; 16];
        getrandom::fill(&mut id)?;
        id.iter_mut().zip(ID_PREFIX).for_each(|(byte, letter)| *byte = *letter);
        let identity = Identity::of_pkcs11(&id);
        let spec = KekSpec { identity, id: id.to_vec(), label: LABEL.into(), mode: kind.mode, pair: None };
        let (objects, object) = match self.generate(&spec, kind, false) {
            Err(error) if may_write => {
                self.refused(error)?;
                (self.generate(&spec, kind, true)?, ThrowAway::TokenObject)
            }
            made => (made?, ThrowAway::SessionObject),
        };
        let [handle, ..] = objects;
        let mut objects = objects.to_vec();
        objects.dedup();
        let known_by = match kind.mode {
            Mode::Oaep => KnownBy::Public(pairs::public_key(self.session, handle)?),
            _ => {
                let value = Dek::generate()?;
                let wrapped = mechanism::wrap(self.profile, &spec, self.session, of_one(handle), &value)?;
                KnownBy::Wrapped { value, wrapped }
            }
        };
        Ok((Key { handle, objects, spec, known_by }, object))
    }

    /// As a KEK is made, but for what is said otherwise. The key that is to stay inside is the first.
    fn generate(&self, spec: &KekSpec, kind: Kind, in_token: bool) -> Result<[ObjectHandle; 2], CallError> {
        if spec.mode == Mode::Oaep {
            return self.generate_pair(spec, kind, in_token, true);
        }
        let template = loosened(attributes::template(self.profile, spec), kind, in_token);
        let key = self.session.generate_key(&Mechanism::AesKeyGen, &template)?;
        self.made.borrow_mut().push(key);
        Ok([key, key])
    }

    /// The pair that decrypts, or the one that signs.
    fn generate_pair(
        &self,
        spec: &KekSpec,
        kind: Kind,
        in_token: bool,
        decrypts: bool,
    ) -> Result<[ObjectHandle; 2], CallError> {
        let templates = oaep::templates(self.profile, spec, decrypts);
        let [public, private] = templates.map(|template| loosened(template, kind, in_token));
        let made = self.session.generate_key_pair(&Mechanism::RsaPkcsKeyPairGen, &public, &private)?;
        self.made.borrow_mut().extend([made.1, made.0]);
        Ok([made.1, made.0])
    }

    /// The answer of a token that is well and will not do this; any other error goes on.
    pub(super) fn refused(&self, error: CallError) -> Result<String, CallError> {
        match error.class(&self.profile.errors) {
            // kryoptic calls a key that may not wrap an invalid handle.
            Class::Session if self.session.get_session_info().is_ok() => Ok(error.to_string()),
            Class::Session | Class::Login | Class::Token | Class::Pin | Class::Fatal => Err(error),
            Class::BadInput | Class::Doubtful | Class::Refused => Ok(error.to_string()),
        }
    }

    /// Destroys what was made, but for a key that is still needed.
    pub(super) fn clear(&self, needed: Option<&Key>) -> Result<(), CallError> {
        let needed = needed.map_or(&[][..], |key| &key.objects);
        let made = self.made.replace(needed.to_vec());
        let destroyed: Vec<_> = made
            .into_iter()
            .filter(|object| !needed.contains(object))
            .map(|key| self.session.destroy_object(key))
            .collect();
        Ok(destroyed.into_iter().collect::<Result<(), _>>()?)
    }

    pub(super) fn has_made_one(&self) -> bool {
        !self.made.borrow().is_empty()
    }

    /// Whether a throw-away key unwraps what it has wrapped. A pair is given another one for that, which signs.
    pub(super) fn opens_its_own(&self, kind: Kind, key: &Key, object: ThrowAway) -> Result<bool, CallError> {
        if let KnownBy::Wrapped { value, wrapped } = &key.known_by {
            return self.opens(key, key.handle, value, wrapped);
        }
        let [signing, _] = self.generate_pair(&key.spec, kind, object == ThrowAway::TokenObject, false)?;
        let [encryption, verification] = [key.handle, signing].map(|key| pairs::said(self.session, key));
        let pair = Pair::new(&key.spec.id, &encryption?, &verification?);
        let pair = Arc::new(pair.map_err(|what| CallError::new(Class::Refused, what))?);
        let spec = KekSpec { identity: pair.identity, pair: Some(pair), ..key.spec.clone() };
        let value = Dek::generate()?;
        let handles = Handles { key: key.handle, signing };
        let wrapped = mechanism::wrap(self.profile, &spec, self.session, handles, &value)?;
        mechanism::opens(self.profile, &spec, self.session, handles, &wrapped, &value)
    }

    /// Whether the key behind a handle unwraps what the throw-away key has wrapped, and so is the same.
    fn opens(&self, key: &Key, handle: ObjectHandle, value: &Dek, wrapped: &[u8]) -> Result<bool, CallError> {
        let opens = mechanism::opens(self.profile, &key.spec, self.session, of_one(handle), wrapped, value);
        opens.or_else(|error| self.refused(error).map(|_| false))
    }

    /// Whether these bytes are the key's; `None` if that cannot be told.
    fn are_the_keys(&self, key: &Key, what: AttributeType, bytes: &[u8]) -> Result<Option<bool>, CallError> {
        let (value, wrapped) = match &key.known_by {
            KnownBy::Wrapped { value, wrapped } => (value, wrapped),
            KnownBy::Public(public) => return Ok(pairs::is_of(public, what, bytes)),
        };
        let mut template = mechanism::session_object();
        template.push(Attribute::Value(bytes.to_vec()));
        template.extend(match key.spec.mode.wraps_objects() {
            true => [Attribute::Wrap(true), Attribute::Unwrap(true)],
            false => [Attribute::Encrypt(true), Attribute::Decrypt(true)],
        });
        let created = self.session.create_object(&template).map_err(CallError::from);
        mechanism::wipe(&mut template);
        match created {
            Ok(handle) => {
                self.made.borrow_mut().push(handle);
                self.opens(key, handle, value, wrapped).map(Some)
            }
            Err(error) => self.refused(error).map(|_| None),
        }
    }

    fn judge(&self, key: &Key, what: AttributeType, bytes: &[u8]) -> Result<Told, CallError> {
        let came_out = |what: &str| (Outcome::CameOut, what.to_owned());
        Ok(match self.are_the_keys(key, what, bytes)? {
            Some(true) => came_out("the key's bytes came out"),
            None => came_out("bytes came out, and nothing tells whether they are the key's"),
            Some(false) => {
                let what = format!("{} bytes came out, which are not the key's", bytes.len());
                (Outcome::Warning, what)
            }
        })
    }

    /// The worst of what the token shows.
    fn read(&self, key: &Key, handle: ObjectHandle) -> Result<Told, CallError> {
        let asked = match key.known_by {
            KnownBy::Wrapped { .. } => &[AttributeType::Value][..],
            KnownBy::Public(_) => &pairs::PRIVATE_NUMBERS,
        };
        let shown = match self.session.get_attributes(handle, asked) {
            Ok(attributes) => attributes,
            Err(error) => return Ok((Outcome::Refused, self.refused(error.into())?)),
        };
        let shown = shown.into_iter().filter_map(|attribute| {
            let what = attribute.attribute_type();
            let bytes = pairs::secret_bytes(attribute).filter(|bytes| !bytes.is_empty())?;
            Some((what, bytes))
        });
        let mut worst = (Outcome::Refused, "the token does not show it".to_owned());
        for (what, bytes) in shown {
            let told = self.judge(key, what, &bytes)?;
            if told.0 > worst.0 {
                worst = told;
            }
        }
        Ok(worst)
    }

    /// The fresh key is one that whoever makes it can read.
    fn wrap_under_fresh(&self, key: &Key, handle: ObjectHandle) -> Result<Told, CallError> {
        let usage =
            [Attribute::Wrap(true), Attribute::Unwrap(true), Attribute::Encrypt(true), Attribute::Decrypt(true)];
        let mut template = mechanism::session_object();
        template.push(Attribute::ValueLen(32.into()));
        template.extend(usage);
        match self.session.generate_key(&Mechanism::AesKeyGen, &template) {
            Ok(fresh) => {
                self.made.borrow_mut().push(fresh);
                self.wrap_under(key, handle, fresh, true)
            }
            Err(error) => {
                Ok((Outcome::NotTried, format!("no wrapping key can be made: {}", self.refused(error.into())?)))
            }
        }
    }

    /// Wraps by every mechanism that there is; a `by` that is open first shows, on itself, whether there is one.
    fn wrap_under(&self, key: &Key, handle: ObjectHandle, by: ObjectHandle, is_open: bool) -> Result<Told, CallError> {
        let mut iv = [7; 12];
        let mut refusals: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for mechanism in &wrappings(self.profile, &mut iv)? {
            let name = attributes::mechanism_name(mechanism.mechanism_type());
            if is_open && let Err(error) = self.session.wrap_key(mechanism, by, by) {
                self.refused(error.into())?;
                continue;
            }
            match self.session.wrap_key(mechanism, by, handle).map(Zeroizing::new) {
                Ok(wrapped) if !wrapped.is_empty() => {
                    let (outcome, what) = self.open(key, mechanism, by, &wrapped, is_open)?;
                    return Ok((outcome, format!("by {name}: {what}")));
                }
                Ok(_) => refusals.entry("nothing came".into()).or_default().push(name),
                Err(error) => refusals.entry(self.refused(error.into())?).or_default().push(name),
            }
        }
        if refusals.is_empty() {
            return Ok((Outcome::Refused, "the token wraps no key by AES, not even one that may leave it".into()));
        }
        let told = refusals.into_iter().map(|(answer, names)| format!("{answer} ({})", names.join(", ")));
        Ok((Outcome::Refused, told.collect::<Vec<_>>().join("; ")))
    }

    /// Whether what was wrapped can be made readable.
    fn open(
        &self,
        key: &Key,
        mechanism: &Mechanism,
        by: ObjectHandle,
        wrapped: &[u8],
        is_open: bool,
    ) -> Result<Told, CallError> {
        // Some tokens ask for more room than they then use.
        let template = match key.known_by {
            KnownBy::Wrapped { .. } => mechanism::session_object(),
            KnownBy::Public(_) => pairs::session_object(),
        };
        let lengths = [wrapped.len(), wrapped.len().saturating_sub(8)];
        for wrapped in lengths.iter().filter_map(|length| wrapped.get(..*length)) {
            match self.session.unwrap_key(mechanism, by, wrapped, &template) {
                Ok(copy) => {
                    self.made.borrow_mut().push(copy);
                    let told = self.read(key, copy)?;
                    if told.0 != Outcome::Refused {
                        return Ok(told);
                    }
                }
                Err(error) => drop(self.refused(error.into())?),
            }
        }
        Ok(match is_open {
            true => (Outcome::CameOut, "the key came out, wrapped under a key that can be read".into()),
            false => (Outcome::Warning, "it is wrapped, and the token does not unwrap it as a readable key".into()),
        })
    }

    fn copy(&self, key: &Key) -> Result<Told, CallError> {
        let changes = [Attribute::Token(false), Attribute::Sensitive(false), Attribute::Extractable(true)];
        match self.session.copy_object(key.handle, &changes) {
            Err(error) => Ok((Outcome::Refused, self.refused(error.into())?)),
            Ok(copy) => {
                self.made.borrow_mut().push(copy);
                self.take_out(key, copy, "the copy was made")
            }
        }
    }

    fn loosen(&self, key: &Key, change: Attribute) -> Result<Told, CallError> {
        match self.session.update_attributes(key.handle, &[change]) {
            Err(error) => Ok((Outcome::Refused, self.refused(error.into())?)),
            Ok(()) => self.take_out(key, key.handle, "the token took the change"),
        }
    }

    /// After a change that the token should not have taken.
    fn take_out(&self, key: &Key, handle: ObjectHandle, changed: &str) -> Result<Told, CallError> {
        for (outcome, what) in [self.read(key, handle)?, self.wrap_under_fresh(key, handle)?] {
            if outcome > Outcome::NotTried {
                return Ok((outcome, format!("{changed}, and then {what}")));
            }
        }
        Ok((Outcome::Warning, format!("{changed}; the key stayed inside")))
    }
}

impl Drop for Stand<'_> {
    fn drop(&mut self) {
        let _the_first_error_is_told = self.clear(None);
    }
}

/// The template of a KEK, for a throw-away key of this kind.
fn loosened(mut template: Vec<Attribute>, kind: Kind, in_token: bool) -> Vec<Attribute> {
    for attribute in &mut template {
        match attribute {
            Attribute::Token(token) => *token = in_token,
            Attribute::Modifiable(modifiable) => *modifiable = kind.modifiable,
            Attribute::Copyable(copyable) => *copyable = kind.copyable,
            _ => (),
        }
    }
    template
}

/// Every mechanism that wraps a key by AES: the profile's own, and of the standard's those that these are not.
fn wrappings<'a>(profile: &Profile, iv: &'a mut [u8; 12]) -> Result<Vec<Mechanism<'a>>, CallError> {
    let modes = profile.modes.iter().filter(|mode| !matches!(mode, Mode::Gcm | Mode::Oaep));
    let own = modes.map(|mode| mechanism::key_wrap(profile, *mode));
    let standard = [
        Mechanism::AesKeyWrap,
        raw::mechanism(*raw::AES_KWP, None::<&[u8; 0]>),
        Mechanism::AesKeyWrapPad,
        Mechanism::AesCbcPad([7; 16]),
        Mechanism::AesCbc([7; 16]),
        Mechanism::AesEcb,
        Mechanism::AesGcm(GcmParams::new(iv, &[], 128.into())?),
    ];
    let mut all: Vec<Mechanism> = Vec::new();
    for mechanism in own.chain(standard) {
        if all.iter().all(|known| known.mechanism_type() != mechanism.mechanism_type()) {
            all.push(mechanism);
        }
    }
    Ok(all)
}
