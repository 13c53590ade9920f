//! What a token says of a key, and what of that decides: whether it vouches that the key was born there and cannot leave,
//! and for which mode the key may be used.

use cryptoki::mechanism::MechanismType;
use cryptoki::object::{Attribute, AttributeType};

use super::super::raw;
use crate::config::{Admission, Excusable, Mode, Profile};

/// What is asked of every object that has the KEKs' label, besides CKA_ALLOWED_MECHANISMS.
pub(in super::super) const ASKED: [AttributeType; 17] = [
    AttributeType::Class,
    AttributeType::KeyType,
    AttributeType::ValueLen,
    AttributeType::Id,
    AttributeType::Sensitive,
    AttributeType::AlwaysSensitive,
    AttributeType::Extractable,
    AttributeType::NeverExtractable,
    AttributeType::Local,
    AttributeType::Modifiable,
    AttributeType::Encrypt,
    AttributeType::Decrypt,
    AttributeType::Wrap,
    AttributeType::Unwrap,
    AttributeType::Sign,
    AttributeType::Modulus,
    AttributeType::PublicExponent,
];

/// What a token says of an object.
#[derive(Clone)]
pub(in super::super) struct Said(pub(in super::super) Vec<Attribute>);

impl Said {
    pub(in super::super) fn id(&self) -> Option<&[u8]> {
        self.0.iter().find_map(|attribute| match attribute {
            Attribute::Id(id) if !id.is_empty() => Some(id.as_slice()),
            _ => None,
        })
    }

    /// Whether a search for the one finds the other too.
    pub(super) fn is_found_like(&self, other: &Self) -> bool {
        let said = |said: &Self, wanted| said.0.iter().find(|said| said.attribute_type() == wanted).cloned();
        let alike = |wanted| said(self, wanted) == said(other, wanted);
        self.id().is_some() && [AttributeType::Id, AttributeType::Class, AttributeType::KeyType].map(alike) == [true; 3]
    }

    /// Whether the key cannot leave its token, and never could: what of that is excused, and why.
    ///
    /// # Errors
    /// It can, or nobody excuses what the token does not vouch for.
    pub(in super::super) fn secrecy(
        &self,
        profile: &Profile,
        admission: Option<&Admission>,
    ) -> Result<Option<String>, String> {
        self.requires("SENSITIVE", &Attribute::Sensitive(true))?;
        self.requires("EXTRACTABLE=false", &Attribute::Extractable(false))?;
        excuse(self, profile, admission)
    }

    fn requires(&self, name: &str, wanted: &Attribute) -> Result<(), String> {
        if self.0.contains(wanted) {
            return Ok(());
        }
        Err(if !self.is_silent_about(wanted) {
            format!("the token does not call it {name}: a key that could leave the token never wraps; make a new one")
        } else {
            format!("the token does not say whether it is {name}, and its profile does not excuse that")
        })
    }

    fn is_silent_about(&self, wanted: &Attribute) -> bool {
        self.0.iter().all(|attribute| attribute.attribute_type() != wanted.attribute_type())
    }

    /// The first of the profile's modes for which the key may be used.
    pub(super) fn mode_in(&self, profile: &Profile) -> Result<Option<Mode>, String> {
        let permitted: Vec<Mode> = profile.modes.iter().copied().filter(|mode| self.permits(profile, *mode)).collect();
        let pinned = self.pinned().is_some_and(|pinned| pinned.contains(&raw::UNNAMED));
        match permitted.as_slice() {
            [_, _, ..] if pinned => {
                Err("its CKA_ALLOWED_MECHANISMS cannot be read, and several modes of the profile fit it".into())
            }
            permitted => Ok(permitted.first().copied()),
        }
    }

    /// Whether the key's usage attributes, and the mechanisms that it is pinned to if any, let it work in this mode.
    fn permits(&self, profile: &Profile, mode: Mode) -> bool {
        let code = profile.mechanism(mode);
        if mode == Mode::Oaep {
            return false; // that is two keys: `halves`
        }
        let usage = match mode.wraps_objects() {
            true => [Attribute::Wrap(true), Attribute::Unwrap(true)],
            false => [Attribute::Encrypt(true), Attribute::Decrypt(true)],
        };
        usage.iter().all(|wanted| self.0.contains(wanted))
            && self.pinned().is_none_or(|pinned| {
                pinned.contains(&raw::mechanism_type(code)) || pinned.contains(&raw::UNNAMED) && raw::is_unnamed(code)
            })
    }

    /// CKA_ALLOWED_MECHANISMS. SoftHSM says an empty list of a key that may do everything.
    pub(in super::super) fn pinned(&self) -> Option<&[MechanismType]> {
        self.0.iter().find_map(|attribute| match attribute {
            Attribute::AllowedMechanisms(mechanisms) if !mechanisms.is_empty() => Some(mechanisms.as_slice()),
            _ => None,
        })
    }
}

/// By what a token vouches that a key was born in it and could never leave. Some lose it in a restore or a cloning, and
/// some never say it.
const HISTORY: [(&str, Attribute, Excusable); 3] = [
    ("ALWAYS_SENSITIVE", Attribute::AlwaysSensitive(true), Excusable::CkaAlwaysSensitive),
    ("NEVER_EXTRACTABLE", Attribute::NeverExtractable(true), Excusable::CkaNeverExtractable),
    ("LOCAL", Attribute::Local(true), Excusable::CkaLocal),
];

/// What the token does not vouch for, and who excuses it: the profile, or the administrator's word for this key.
fn excuse(said: &Said, profile: &Profile, admission: Option<&Admission>) -> Result<Option<String>, String> {
    let (mut silent, mut unvouched) = (Vec::new(), Vec::new());
    for (name, wanted, excusable) in HISTORY.iter().filter(|(_, wanted, _)| !said.0.contains(wanted)) {
        if profile.excuses.contains(excusable) && said.is_silent_about(wanted) {
            silent.push(*name);
            continue;
        }
        if admission.is_none() {
            said.requires(name, wanted)?;
        }
        unvouched.push(*name);
    }
    let mut excused = Vec::new();
    if !silent.is_empty() {
        let what = format!("the token does not say whether it is {}", silent.join(", "));
        excused.push(format!("{what}; profile {} excuses that", profile.name));
    }
    if !unvouched.is_empty() {
        let what = format!("the token does not vouch that it is {}", unvouched.join(", "));
        let why = admission.and_then(|admission| admission.exception.as_ref()).ok_or_else(|| {
            format!("{what}: if you know where it was, say so with `exception = \"…\"` in its [[provider.kek]]")
        })?;
        excused.push(format!("{what}; the configuration excuses that: {why}"));
    }
    Ok((!excused.is_empty()).then(|| excused.join("; ")))
}
