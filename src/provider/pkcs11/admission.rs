//! Which keys of a token are KEKs. Pure: from what the token says of a key to a decision with its reason.
//!
//! A key that anybody could have written under our label must not wrap a single DEK: so a key becomes a KEK by itself
//! only if the token vouches that it was born there and cannot leave.

use std::collections::BTreeMap;
use std::sync::Arc;

use cryptoki::mechanism::MechanismType;
use cryptoki::object::{Attribute, AttributeType, KeyType, ObjectClass};
use jiff::{SignedDuration, Timestamp};

use super::error::{CallError, Class};
use super::oaep::Pair;
use super::{halves, raw};
use crate::config::{Admission, Excusable, Mode, Omissible, Profile};
use crate::envelope::WrapAlgorithm;
use crate::identity::Identity;
use crate::provider::{Attributes, Rank};

/// What is asked of every object that has the KEKs' label, besides CKA_ALLOWED_MECHANISMS.
pub(super) const ASKED: [AttributeType; 17] = [
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

/// How a provider recognises and uses its KEKs.
#[derive(Debug)]
pub(super) struct Rules {
    pub(super) label: String,
    pub(super) profile: Arc<Profile>,
    /// KEKs made elsewhere, by CKA_ID.
    pub(super) admitted: BTreeMap<Vec<u8>, Admission>,
}

impl Rules {
    /// Decides about all objects that have the label.
    pub(super) fn decide(&self, objects: Vec<Said>, now: Timestamp) -> Vec<Decision> {
        let pairs = self.profile.modes.contains(&Mode::Oaep);
        let (halves, others): (Vec<_>, Vec<_>) = objects.into_iter().partition(|said| pairs && halves::is_half(said));
        let alone = |said: &Said| {
            let admission = said.id().and_then(|id| self.admitted.get(id));
            let identity = said.id().map(Identity::of_pkcs11);
            Decision::new(said, identity, admit(said, &self.profile, admission, now))
        };
        let others = others.iter().filter(|said| !(pairs && halves::is_public(said)));
        others.map(alone).chain(halves::decide(&halves, self, now)).collect()
    }

    pub(super) fn spec_of(&self, kek: &Admitted) -> KekSpec {
        let Admitted { rank: Rank { id, .. }, mode, pair, .. } = kek;
        let identity = pair.as_ref().map_or_else(|| Identity::of_pkcs11(id), |pair| pair.identity);
        KekSpec { identity, id: id.clone(), label: self.label.clone(), mode: *mode, pair: pair.clone() }
    }
}

/// What is to become of a key.
pub(super) struct Decision {
    /// CKA_ID.
    pub(super) id: Option<Vec<u8>>,
    /// The identity that it has, or would have, if that can be told.
    pub(super) identity: Option<Identity>,
    /// What the token says of it, for people.
    pub(super) attributes: Attributes,
    /// Or why it is not used, and what to do.
    pub(super) verdict: Result<Admitted, String>,
}

impl Decision {
    pub(super) fn new(said: &Said, identity: Option<Identity>, verdict: Result<Admitted, String>) -> Self {
        Self { id: said.id().map(<[u8]>::to_vec), identity, attributes: said.attributes(), verdict }
    }
}

/// What is needed to find and use a KEK.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct KekSpec {
    pub(super) identity: Identity,
    /// CKA_ID.
    pub(super) id: Vec<u8>,
    /// CKA_LABEL.
    pub(super) label: String,
    pub(super) mode: Mode,
    /// Its public keys, in the mode `oaep`.
    pub(super) pair: Option<Arc<Pair>>,
}

impl KekSpec {
    pub(super) fn algorithm(&self) -> WrapAlgorithm {
        self.pair.as_ref().map_or_else(|| self.mode.algorithm(), |pair| pair.algorithm)
    }

    /// # Errors
    /// It has none: then its mode is another one.
    pub(super) fn pair(&self) -> Result<&Pair, CallError> {
        self.pair.as_deref().ok_or_else(|| CallError::new(Class::Refused, "the KEK has no public keys"))
    }
}

/// What a token says of an object.
#[derive(Clone)]
pub(super) struct Said(pub(super) Vec<Attribute>);

/// A key that is a KEK.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Admitted {
    pub(super) rank: Rank,
    pub(super) mode: Mode,
    pub(super) pair: Option<Arc<Pair>>,
    /// What the token does not vouch for, and why that is excused.
    pub(super) exception: Option<String>,
}

/// No CKA_ID of ours is older: this plugin did not exist.
const EPOCH: Timestamp = Timestamp::constant(1_735_689_600, 0); // 2025-01-01
/// A KEK may be made this long before it becomes active.
pub const LONGEST_WAIT: SignedDuration = SignedDuration::from_hours(30 * 24);

/// Decides about one key.
///
/// `admission` is what the configuration says of this key, if it admits it by id. That excuses a foreign id. That the
/// token says nothing of a key's history its profile excuses; that it denies one, only a stated exception; and nothing
/// excuses what the key is now.
///
/// # Errors
/// Why the key is not used, and what to do.
fn admit(said: &Said, profile: &Profile, admission: Option<&Admission>, now: Timestamp) -> Result<Admitted, String> {
    let Said(attributes) = said;
    if !attributes.contains(&Attribute::Class(ObjectClass::SECRET_KEY)) {
        return Err("it is not a secret key: give it another label".into());
    }
    let aes_256 = [Attribute::KeyType(KeyType::AES), Attribute::ValueLen(32.into())];
    if !aes_256.iter().all(|wanted| attributes.contains(wanted)) {
        return Err("it is not an AES key of 256 bits: give it another label".into());
    }
    let id = said.id().ok_or("it has no CKA_ID: KEKs are made with `trousseau key generate`")?;
    let exception = said.secrecy(profile, admission)?;
    let not_before = admission.map_or_else(|| instant_of(id, now), |admission| Ok(admission.not_before))?;
    let mode = said
        .mode_in(profile)?
        .ok_or("its usage attributes fit no mode of the profile: KEKs are made with `trousseau key generate`")?;
    Ok(Admitted { rank: Rank { not_before, id: id.to_vec() }, mode, pair: None, exception })
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

/// The activation instant in a CKA_ID: it is a UUIDv7 (RFC 9562 section 5.7).
pub(super) fn instant_of(id: &[u8], now: Timestamp) -> Result<Timestamp, String> {
    let [a, b, c, d, e, f, version, _, variant, ..] = *id else {
        return Err(foreign_id("is not a UUIDv7"));
    };
    if id.len() != 16 || version >> 4 != 7 || variant >> 6 != 2 {
        return Err(foreign_id("is not a UUIDv7"));
    }
    let milliseconds = i64::from_be_bytes([0, 0, a, b, c, d, e, f]);
    let instant = Timestamp::from_millisecond(milliseconds).map_err(|_| foreign_id("names no instant"))?;
    if instant < EPOCH || instant > now.saturating_add(LONGEST_WAIT).unwrap_or(Timestamp::MAX) {
        return Err(foreign_id(&format!("names the instant {instant}, not one from 2025 to 30 days ahead")));
    }
    Ok(instant)
}

fn foreign_id(what: &str) -> String {
    format!("its CKA_ID {what}: if you made this key elsewhere, admit it with [[provider.kek]] id and not-before")
}

/// A CKA_ID for a KEK that becomes active at `instant`: a UUIDv7 of that time.
///
/// # Errors
/// The operating system has no randomness to give.
pub(super) fn new_id(instant: Timestamp) -> Result<[u8; 16], getrandom::Error> {
    let mut id = [0; 16];
    getrandom::fill(&mut id)?;
    let time = (instant.as_millisecond().max(0) as u64) << 16;
    for (to, from) in id.iter_mut().zip(time.to_be_bytes()).take(6) {
        *to = from;
    }
    let [.., version, _, variant, _, _, _, _, _, _, _] = &mut id;
    *version = *version & 0x0f | 0x70;
    *variant = *variant & 0x3f | 0x80;
    Ok(id)
}

/// The attribute that is left out of the template for a KEK.
pub(super) const fn omitted(omissible: Omissible) -> AttributeType {
    match omissible {
        Omissible::CkaPrivate => AttributeType::Private,
        Omissible::CkaSensitive => AttributeType::Sensitive,
        Omissible::CkaModifiable => AttributeType::Modifiable,
        Omissible::CkaCopyable => AttributeType::Copyable,
        Omissible::CkaEncrypt => AttributeType::Encrypt,
        Omissible::CkaDecrypt => AttributeType::Decrypt,
        Omissible::CkaWrap => AttributeType::Wrap,
        Omissible::CkaUnwrap => AttributeType::Unwrap,
        Omissible::CkaSign => AttributeType::Sign,
        Omissible::CkaVerify => AttributeType::Verify,
        Omissible::CkaDerive => AttributeType::Derive,
        Omissible::CkaAllowedMechanisms => AttributeType::AllowedMechanisms,
    }
}

impl Said {
    pub(super) fn id(&self) -> Option<&[u8]> {
        self.0.iter().find_map(|attribute| match attribute {
            Attribute::Id(id) if !id.is_empty() => Some(id.as_slice()),
            _ => None,
        })
    }

    /// That it is secret; with `ever`, that it always was, unless the profile excuses what the token cannot say.
    /// Whether the key cannot leave its token, and never could: what of that is excused, and why.
    ///
    /// # Errors
    /// It can, or nobody excuses what the token does not vouch for.
    pub(super) fn secrecy(&self, profile: &Profile, admission: Option<&Admission>) -> Result<Option<String>, String> {
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
    fn mode_in(&self, profile: &Profile) -> Result<Option<Mode>, String> {
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
    pub(super) fn pinned(&self) -> Option<&[MechanismType]> {
        self.0.iter().find_map(|attribute| match attribute {
            Attribute::AllowedMechanisms(mechanisms) if !mechanisms.is_empty() => Some(mechanisms.as_slice()),
            _ => None,
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn profile(modes: &str, quirks: &str) -> Profile {
        let head = "title = \"a token\"\nstatus = \"tested\"\nmodule-paths = []";
        toml::from_str(&format!("{head}\nmodes = {modes}\n{quirks}")).unwrap()
    }

    fn plain() -> Profile {
        profile(r#"["wrapkey", "gcm"]"#, "")
    }

    fn now() -> Timestamp {
        "2026-11-24T06:00:00Z".parse().unwrap()
    }

    fn kek(id: &[u8]) -> Vec<Attribute> {
        vec![
            Attribute::Class(ObjectClass::SECRET_KEY),
            Attribute::KeyType(KeyType::AES),
            Attribute::ValueLen(32.into()),
            Attribute::Id(id.to_vec()),
            Attribute::Sensitive(true),
            Attribute::AlwaysSensitive(true),
            Attribute::Extractable(false),
            Attribute::NeverExtractable(true),
            Attribute::Local(true),
            Attribute::Encrypt(false),
            Attribute::Decrypt(false),
            Attribute::Wrap(true),
            Attribute::Unwrap(true),
        ]
    }

    fn with(changed: Attribute) -> Said {
        let mut attributes = kek(&new_id(now()).unwrap());
        attributes.retain(|attribute| attribute.attribute_type() != changed.attribute_type());
        attributes.push(changed);
        Said(attributes)
    }

    fn id_with(byte: usize, value: u8) -> Attribute {
        let mut id = new_id(now()).unwrap().to_vec();
        *id.get_mut(byte).unwrap() = value;
        Attribute::Id(id)
    }

    #[test]
    fn a_key_of_our_own_making_is_a_kek() {
        let id = new_id(now()).unwrap();
        let admitted = admit(&Said(kek(&id)), &plain(), None, now()).unwrap();
        let rank = Rank { not_before: now(), id: id.to_vec() };
        assert_eq!(admitted, Admitted { rank, mode: Mode::Wrapkey, pair: None, exception: None });
    }

    #[test]
    fn other_keys_under_our_label_are_refused_with_the_reason() {
        let far = Attribute::Id(new_id(now() + SignedDuration::from_hours(31 * 24)).unwrap().to_vec());
        let old = Attribute::Id(new_id("2024-12-31T23:59:59Z".parse().unwrap()).unwrap().to_vec());
        for (changed, reason) in [
            (Attribute::Class(ObjectClass::PRIVATE_KEY), "not a secret key"),
            (Attribute::KeyType(KeyType::GENERIC_SECRET), "not an AES key"),
            (Attribute::ValueLen(16.into()), "not an AES key of 256 bits"),
            (Attribute::Id(vec![]), "no CKA_ID"),
            (Attribute::Sensitive(false), "SENSITIVE"),
            (Attribute::AlwaysSensitive(false), "ALWAYS_SENSITIVE"),
            (Attribute::Extractable(true), "EXTRACTABLE=false"),
            (Attribute::NeverExtractable(false), "NEVER_EXTRACTABLE"),
            (Attribute::Local(false), "LOCAL"), // a key of known value, planted by C_CreateObject
            (Attribute::Id(vec![1]), "UUIDv7"),
            (Attribute::Id(vec![0; 16]), "UUIDv7"),
            (Attribute::Id(b"kek-made-by-hand".to_vec()), "UUIDv7"),
            (id_with(6, 0x40), "UUIDv7"),
            (id_with(8, 0x00), "UUIDv7"),
            (id_with(0, 0xff), "instant"),
            (far, "instant"),
            (old, "instant"),
            (Attribute::Wrap(false), "fit no mode"),
            (Attribute::AllowedMechanisms(vec![MechanismType::AES_CBC]), "fit no mode"),
        ] {
            let error = admit(&with(changed.clone()), &plain(), None, now()).unwrap_err();
            assert!(error.contains(reason), "{changed:?}: {error}");
        }
    }

    #[test]
    fn what_a_token_does_not_say_is_not_assumed() {
        let mut said = kek(&new_id(now()).unwrap());
        said.retain(|attribute| attribute.attribute_type() != AttributeType::Local);
        let error = admit(&Said(said.clone()), &plain(), None, now()).unwrap_err();
        assert!(error.contains("does not say"), "{error}");

        // Unless the profile excuses just that; a token that denies it is not excused.
        let excused = profile(r#"["wrapkey"]"#, r#"excuses = ["CKA_LOCAL"]"#);
        let exception = admit(&Said(said), &excused, None, now()).unwrap().exception.unwrap();
        assert!(exception.contains("LOCAL") && exception.contains("profile"), "{exception}");
        for denied in [Attribute::Local(false), Attribute::AlwaysSensitive(false)] {
            admit(&with(denied), &excused, None, now()).unwrap_err();
        }
    }

    #[test]
    fn a_key_that_the_configuration_admits_needs_no_id_of_ours_and_a_word_for_a_history_that_it_lacks() {
        let not_before = "2026-01-01T00:00:00Z".parse().unwrap();
        let bare = Admission { not_before, exception: None };
        let excused = Admission { not_before, exception: Some("restored in May".into()) };
        for admission in [&bare, &excused] {
            let admitted = admit(&with(Attribute::Id(vec![1])), &plain(), Some(admission), now()).unwrap();
            assert_eq!((admitted.rank.not_before, admitted.exception), (not_before, None));
        }
        for (changed, name) in [
            (Attribute::Local(false), "LOCAL"),
            (Attribute::NeverExtractable(false), "NEVER_EXTRACTABLE"),
            (Attribute::AlwaysSensitive(false), "ALWAYS_SENSITIVE"),
        ] {
            let said = with(changed);
            let error = admit(&said, &plain(), Some(&bare), now()).unwrap_err();
            assert!(error.contains(name) && error.contains("exception ="), "{error}");
            let exception = admit(&said, &plain(), Some(&excused), now()).unwrap().exception.unwrap();
            assert!(exception.contains(name) && exception.contains("restored in May"), "{exception}");
        }
        for changed in [Attribute::Sensitive(false), Attribute::Extractable(true), Attribute::ValueLen(16.into())] {
            admit(&with(changed), &plain(), Some(&excused), now()).unwrap_err();
        }
    }

    #[test]
    fn usage_and_pinned_mechanism_choose_the_mode() {
        let mut said = with(Attribute::Wrap(false)).0;
        said.retain(|attribute| !matches!(attribute, Attribute::Encrypt(_) | Attribute::Decrypt(_)));
        said.extend([Attribute::Encrypt(true), Attribute::Decrypt(true)]);
        let three = r#"["encrypt", "encrypt-kwp", "gcm"]"#;
        let vendors = "mechanisms = { encrypt = 0x80000170 }";
        for (pinned, quirks, mode) in [
            (vec![], "", Ok(Mode::Encrypt)),
            (vec![MechanismType::AES_GCM], "", Ok(Mode::Gcm)),
            (vec![raw::UNNAMED], "", Ok(Mode::EncryptKwp)),
            (vec![raw::UNNAMED], vendors, Err("cannot be read")),
            (vec![MechanismType::AES_KEY_WRAP], vendors, Err("fit no mode")),
            (vec![MechanismType::AES_GCM], vendors, Ok(Mode::Gcm)),
        ] {
            let said = Said([said.clone(), vec![Attribute::AllowedMechanisms(pinned.clone())]].concat());
            let admitted = admit(&said, &profile(three, quirks), None, now()).map(|kek| kek.mode);
            match (&admitted, mode) {
                (Err(error), Err(reason)) => assert!(error.contains(reason), "{pinned:?}: {error}"),
                _ => assert_eq!(admitted, mode.map_err(str::to_owned), "{pinned:?} {quirks}"),
            }
        }
    }
}
