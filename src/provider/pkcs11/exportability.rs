//! Whether a key can be made to leave its token: tried on throw-away keys that are made as KEKs are.
//!
//! Attributes prove nothing by themselves: NSS says CKA_EXTRACTABLE=false of a key, wraps it, and hands it out. So each
//! way is gone, on a key of its own, and what counts is whether bytes come out that are that key's. A real KEK is never
//! tried. What comes out is compared and wiped; nobody is shown it.

use std::cell::RefCell;
use std::collections::BTreeMap;

use cryptoki::mechanism::Mechanism;
use cryptoki::mechanism::aead::GcmParams;
use cryptoki::object::{Attribute, AttributeType, KeyType, ObjectClass, ObjectHandle};
use cryptoki::session::Session;
use serde::Serialize;
use zeroize::Zeroizing;

use super::admission::KekSpec;
use super::connection::Connected;
use super::error::{CallError, Class};
use super::{lane, mechanism};
use crate::config::{Codes, Mode};
use crate::identity::Identity;
use crate::secret::Dek;

/// CKA_LABEL of the throw-away keys. Their CKA_ID is no UUIDv7, so that no plugin takes one for a KEK.
const LABEL: &str = "trousseau-throw-away";
const ID_PREFIX: &[u8; 10] = b"throw-away";

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

/// A way that was tried.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Trial {
    /// The way.
    pub way: &'static str,
    /// How the throw-away key wraps.
    pub mode: &'static str,
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

/// Every way that was tried on a token.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Trials {
    /// On what; one token object is enough to be named.
    pub throw_away: Option<ThrowAway>,
    /// What came of each way.
    pub trials: Vec<Trial>,
}

type Told = (Outcome, String);
type Way = (&'static str, fn(&Stand, &Key) -> Result<Told, CallError>);

/// Each is gone on a key of its own.
const WAYS: [Way; 6] = [
    ("read CKA_VALUE", |stand, key| stand.read(key, key.handle)),
    ("copy it as EXTRACTABLE and not SENSITIVE", |stand, key| stand.copy(key)),
    ("wrap it under itself", |stand, key| stand.wrap_under(key, key.handle, key.handle, false)),
    ("wrap it under a fresh key", |stand, key| stand.wrap_under_fresh(key, key.handle)),
    ("set SENSITIVE=false", |stand, key| stand.loosen(key, Attribute::Sensitive(false))),
    ("set EXTRACTABLE=true", |stand, key| stand.loosen(key, Attribute::Extractable(true))),
];

impl Trials {
    /// The worst that came of any way; `NotTried` if nothing was tried at all.
    #[must_use]
    pub fn verdict(&self) -> Outcome {
        let tried = self.trials.iter().map(|trial| trial.outcome).filter(|outcome| *outcome != Outcome::NotTried);
        tried.max().unwrap_or(Outcome::NotTried)
    }
}

/// Goes every way, for keys of each of these modes. Without `may_write`, only session objects are made.
///
/// # Errors
/// The token is out of reach.
pub(super) fn try_every_way(connected: &Connected, modes: &[Mode], may_write: bool) -> Result<Trials, CallError> {
    let session = connected.open_session()?;
    let stand = Stand { session: &session, codes: &connected.codes, made: RefCell::default() };
    let mut done = Trials { throw_away: None, trials: Vec::new() };
    for mode in modes {
        for (way, how) in WAYS {
            let (outcome, what) = match stand.throw_away(*mode, may_write) {
                Ok((key, kind)) => {
                    done.throw_away = done.throw_away.max(Some(kind));
                    let told = how(&stand, &key);
                    stand.clear()?;
                    told?
                }
                Err(error) => (Outcome::NotTried, format!("no throw-away key can be made: {}", stand.refused(error)?)),
            };
            done.trials.push(Trial { way, mode: mode.as_str(), outcome, what });
        }
    }
    Ok(done)
}

/// The first way on which a key of this mode comes out, if there is one. Only session objects are made.
///
/// # Errors
/// The token is out of reach.
pub(super) fn way_out(connected: &Connected, mode: Mode) -> Result<Option<String>, CallError> {
    let Trials { trials, .. } = try_every_way(connected, &[mode], false)?;
    let out = trials.into_iter().find(|trial| trial.outcome == Outcome::CameOut);
    Ok(out.map(|trial| format!("{}: {}", trial.way, trial.what)))
}

/// Has a throw-away key of this mode wrap a value and unwrap it, since what a token's flags say proves nothing: why that
/// does not work, if it does not.
///
/// # Errors
/// The token is out of reach.
pub(super) fn try_mode(connected: &Connected, mode: Mode) -> Result<Option<String>, CallError> {
    let session = connected.open_session()?;
    let stand = Stand { session: &session, codes: &connected.codes, made: RefCell::default() };
    match stand.throw_away(mode, false) {
        Ok((key, _)) if stand.opens(&key, key.handle)? => Ok(None),
        Ok(_) => Ok(Some("the token does not unwrap what it has wrapped".into())),
        Err(error) => stand.refused(error).map(Some),
    }
}

/// A session, and the keys that were made in it: they go with it, however it ends.
struct Stand<'s> {
    session: &'s Session,
    codes: &'s Codes,
    made: RefCell<Vec<ObjectHandle>>,
}

/// A throw-away key, and what it has wrapped.
struct Key {
    handle: ObjectHandle,
    spec: KekSpec,
    value: Dek,
    wrapped: Vec<u8>,
}

impl Stand<'_> {
    fn throw_away(&self, mode: Mode, may_write: bool) -> Result<(Key, ThrowAway), CallError> {
        let mut id = [0; 16];
        getrandom::fill(&mut id)?;
        id.iter_mut().zip(ID_PREFIX).for_each(|(byte, letter)| *byte = *letter);
        let identity = Identity::of_pkcs11(&id);
        let spec = KekSpec { identity, id: id.to_vec(), label: LABEL.into(), mode };
        let (handle, kind) = match self.generate(&spec, false) {
            Err(error) if may_write => {
                self.refused(error)?;
                (self.generate(&spec, true)?, ThrowAway::TokenObject)
            }
            made => (made?, ThrowAway::SessionObject),
        };
        self.made.borrow_mut().push(handle);
        let value = Dek::generate()?;
        let wrapped = mechanism::wrap(mode, self.session, handle, identity, &value)?;
        Ok((Key { handle, spec, value, wrapped }, kind))
    }

    /// As a KEK is made.
    fn generate(&self, spec: &KekSpec, in_token: bool) -> Result<ObjectHandle, CallError> {
        let mut template = lane::template(spec);
        template.retain(|attribute| attribute.attribute_type() != AttributeType::Token);
        template.push(Attribute::Token(in_token));
        Ok(self.session.generate_key(&Mechanism::AesKeyGen, &template)?)
    }

    /// The answer of a token that is well and will not do this; any other error goes on.
    fn refused(&self, error: CallError) -> Result<String, CallError> {
        match error.class(self.codes) {
            // kryoptic calls a key that may not wrap an invalid handle.
            Class::Session if self.session.get_session_info().is_ok() => Ok(error.to_string()),
            Class::Session | Class::Login | Class::Token | Class::Pin | Class::Fatal => Err(error),
            Class::BadInput | Class::Doubtful | Class::Refused => Ok(error.to_string()),
        }
    }

    /// Destroys what was made.
    fn clear(&self) -> Result<(), CallError> {
        let made = self.made.take();
        let destroyed: Vec<_> = made.into_iter().map(|key| self.session.destroy_object(key)).collect();
        Ok(destroyed.into_iter().collect::<Result<(), _>>()?)
    }

    /// Whether the key behind a handle unwraps what the throw-away key has wrapped, and so is the same.
    fn opens(&self, key: &Key, handle: ObjectHandle) -> Result<bool, CallError> {
        match mechanism::unwrap(key.spec.mode, self.session, handle, key.spec.identity, &key.wrapped) {
            Ok(value) => Ok(value.expose() == key.value.expose()),
            Err(error) => self.refused(error).map(|_| false),
        }
    }

    /// Whether these bytes are the key's; `None` if the token takes no key from outside to tell it by.
    fn are_the_keys(&self, key: &Key, bytes: &[u8]) -> Result<Option<bool>, CallError> {
        let mut template = readable();
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
                self.opens(key, handle).map(Some)
            }
            Err(error) => self.refused(error).map(|_| None),
        }
    }

    fn judge(&self, key: &Key, bytes: &[u8]) -> Result<Told, CallError> {
        let came_out = |what: &str| (Outcome::CameOut, what.to_owned());
        Ok(match self.are_the_keys(key, bytes)? {
            Some(true) => came_out("the key's bytes came out"),
            None => came_out("bytes came out, and the token takes no key by which to tell whether they are the key's"),
            Some(false) => {
                let what = format!("{} bytes came out, which are not the key's", bytes.len());
                (Outcome::Warning, what)
            }
        })
    }

    fn read(&self, key: &Key, handle: ObjectHandle) -> Result<Told, CallError> {
        let attributes = match self.session.get_attributes(handle, &[AttributeType::Value]) {
            Ok(attributes) => attributes,
            Err(error) => return Ok((Outcome::Refused, self.refused(error.into())?)),
        };
        let value = attributes.into_iter().find_map(|attribute| match attribute {
            Attribute::Value(value) if !value.is_empty() => Some(Zeroizing::new(value)),
            _ => None,
        });
        match value {
            Some(value) => self.judge(key, &value),
            None => Ok((Outcome::Refused, "the token does not show it".into())),
        }
    }

    /// The fresh key is one that whoever makes it can read.
    fn wrap_under_fresh(&self, key: &Key, handle: ObjectHandle) -> Result<Told, CallError> {
        let usage =
            [Attribute::Wrap(true), Attribute::Unwrap(true), Attribute::Encrypt(true), Attribute::Decrypt(true)];
        let mut template = readable();
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
        let mut refusals: BTreeMap<String, Vec<&str>> = BTreeMap::new();
        for (name, mechanism) in &wrappings(&mut iv)? {
            if is_open && let Err(error) = self.session.wrap_key(mechanism, by, by) {
                self.refused(error.into())?;
                continue;
            }
            match self.session.wrap_key(mechanism, by, handle) {
                Ok(wrapped) if !wrapped.is_empty() => {
                    let (outcome, what) = self.open(key, mechanism, by, &wrapped, is_open)?;
                    return Ok((outcome, format!("by {name}: {what}")));
                }
                Ok(_) => refusals.entry("nothing came".into()).or_default().push(name),
                Err(error) => refusals.entry(self.refused(error.into())?).or_default().push(name),
            }
        }
        if refusals.is_empty() {
            return Ok((Outcome::NotTried, "the token wraps no key by AES, not even one that may leave it".into()));
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
        let lengths = [wrapped.len(), wrapped.len().saturating_sub(8)];
        for wrapped in lengths.iter().filter_map(|length| wrapped.get(..*length)) {
            match self.session.unwrap_key(mechanism, by, wrapped, &readable()) {
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
        let _the_first_error_is_told = self.clear();
    }
}

/// A session object whose value anybody in this session can read.
fn readable() -> Vec<Attribute> {
    vec![
        Attribute::Class(ObjectClass::SECRET_KEY),
        Attribute::KeyType(KeyType::AES),
        Attribute::Token(false),
        Attribute::Sensitive(false),
        Attribute::Extractable(true),
    ]
}

fn wrappings(iv: &mut [u8; 12]) -> Result<[(&'static str, Mechanism<'_>); 6], CallError> {
    Ok([
        ("CKM_AES_KEY_WRAP", Mechanism::AesKeyWrap),
        ("CKM_AES_KEY_WRAP_PAD", Mechanism::AesKeyWrapPad),
        ("CKM_AES_CBC_PAD", Mechanism::AesCbcPad([7; 16])),
        ("CKM_AES_CBC", Mechanism::AesCbc([7; 16])),
        ("CKM_AES_ECB", Mechanism::AesEcb),
        ("CKM_AES_GCM", Mechanism::AesGcm(GcmParams::new(iv, &[], 128.into())?)),
    ])
}
