//! Which keys of a token are KEKs. Pure: from what the token says of a key to a decision with its reason.
//!
//! A key that anybody could have written under our label must not wrap a single DEK: so a key becomes a KEK by itself
//! only if the token vouches that it was born there and cannot leave.

use std::collections::BTreeMap;

use cryptoki::mechanism::MechanismType;
use cryptoki::object::{Attribute, AttributeType, KeyType, ObjectClass};
use jiff::{SignedDuration, Timestamp};

use crate::config::{Admission, Mode};
use crate::identity::Identity;
use crate::provider::Rank;

/// What is asked of every object that has the KEKs' label.
pub(super) const ASKED: [AttributeType; 14] = [
    AttributeType::Class,
    AttributeType::KeyType,
    AttributeType::ValueLen,
    AttributeType::Id,
    AttributeType::Sensitive,
    AttributeType::AlwaysSensitive,
    AttributeType::Extractable,
    AttributeType::NeverExtractable,
    AttributeType::Local,
    AttributeType::Encrypt,
    AttributeType::Decrypt,
    AttributeType::Wrap,
    AttributeType::Unwrap,
    AttributeType::AllowedMechanisms,
];

/// How a provider recognises and uses its KEKs.
#[derive(Debug)]
pub(super) struct Rules {
    pub(super) label: String,
    pub(super) modes: Vec<Mode>,
    /// KEKs made elsewhere, by CKA_ID.
    pub(super) admitted: BTreeMap<Vec<u8>, Admission>,
}

impl Rules {
    pub(super) fn admit(&self, said: &Said, now: Timestamp) -> Result<Admitted, String> {
        let admission = said.id().and_then(|id| self.admitted.get(id));
        admit(said, &self.modes, admission, now)
    }

    pub(super) fn spec_of(&self, kek: &Admitted) -> KekSpec {
        let identity = Identity::of_pkcs11(&kek.rank.id);
        KekSpec { identity, id: kek.rank.id.clone(), label: self.label.clone(), mode: kek.mode }
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
}

/// What a token says of an object.
pub(super) struct Said(pub(super) Vec<Attribute>);

/// A key that is a KEK.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Admitted {
    pub(super) rank: Rank,
    pub(super) mode: Mode,
    /// What the token does not vouch for, and why that is excused.
    pub(super) exception: Option<String>,
}

/// No CKA_ID of ours is older: this plugin did not exist.
const EPOCH: Timestamp = Timestamp::constant(1_735_689_600, 0); // 2025-01-01
/// A KEK may be made this long before it becomes active.
pub const LONGEST_WAIT: SignedDuration = SignedDuration::from_hours(30 * 24);

/// Decides about one key.
///
/// `modes` are the profile's, in order. `admission` is what the configuration says of this key, if it admits it by id. That
/// excuses a foreign id; that the token does not vouch for the key's history only a stated exception excuses, and
/// nothing what the key is now.
///
/// # Errors
/// Why the key is not used, and what to do.
fn admit(said: &Said, modes: &[Mode], admission: Option<&Admission>, now: Timestamp) -> Result<Admitted, String> {
    let Said(attributes) = said;
    if !attributes.contains(&Attribute::Class(ObjectClass::SECRET_KEY)) {
        return Err("it is not a secret key: give it another label".into());
    }
    let aes_256 = [Attribute::KeyType(KeyType::AES), Attribute::ValueLen(32.into())];
    if !aes_256.iter().all(|wanted| attributes.contains(wanted)) {
        return Err("it is not an AES key of 256 bits: give it another label".into());
    }
    let id = said.id().ok_or("it has no CKA_ID: KEKs are made with `trousseau key generate`")?;
    said.requires("SENSITIVE", &Attribute::Sensitive(true))?;
    said.requires("EXTRACTABLE=false", &Attribute::Extractable(false))?;
    let (not_before, exception) = match admission {
        Some(admission) => (admission.not_before, excuse(said, admission)?),
        None => {
            HISTORY.iter().try_for_each(|(name, wanted)| said.requires(name, wanted))?;
            (instant_of(id, now)?, None)
        }
    };
    let mode = modes
        .iter()
        .find(|mode| said.permits(**mode))
        .ok_or("its usage attributes fit no mode of the profile: KEKs are made with `trousseau key generate`")?;
    Ok(Admitted { rank: Rank { not_before, id: id.to_vec() }, mode: *mode, exception })
}

/// By what a token vouches that a key was born in it and could never leave. Some lose it in a restore or a cloning.
const HISTORY: [(&str, Attribute); 3] = [
    ("ALWAYS_SENSITIVE", Attribute::AlwaysSensitive(true)),
    ("NEVER_EXTRACTABLE", Attribute::NeverExtractable(true)),
    ("LOCAL", Attribute::Local(true)),
];

/// What the token does not vouch for, with the administrator's word for it.
fn excuse(said: &Said, admission: &Admission) -> Result<Option<String>, String> {
    let unsaid: Vec<&str> =
        HISTORY.iter().filter(|(_, wanted)| !said.0.contains(wanted)).map(|(name, _)| *name).collect();
    let what = format!("the token does not vouch that it is {}", unsaid.join(", "));
    match &admission.exception {
        _ if unsaid.is_empty() => Ok(None),
        Some(why) => Ok(Some(format!("{what}; the configuration excuses that: {why}"))),
        None => {
            Err(format!("{what}: if you know where it was, say so with `exception = \"…\"` in its [[provider.kek]]"))
        }
    }
}

/// The activation instant in a CKA_ID: it is a UUIDv7 (RFC 9562 section 5.7).
fn instant_of(id: &[u8], now: Timestamp) -> Result<Timestamp, String> {
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

impl Said {
    pub(super) fn id(&self) -> Option<&[u8]> {
        self.0.iter().find_map(|attribute| match attribute {
            Attribute::Id(id) if !id.is_empty() => Some(id.as_slice()),
            _ => None,
        })
    }

    fn requires(&self, name: &str, wanted: &Attribute) -> Result<(), String> {
        if self.0.contains(wanted) {
            return Ok(());
        }
        let asked = wanted.attribute_type();
        Err(if self.0.iter().any(|attribute| attribute.attribute_type() == asked) {
            format!("the token does not call it {name}: a key that could leave the token never wraps; make a new one")
        } else {
            format!("the token does not say whether it is {name}, and its profile does not excuse that")
        })
    }

    /// Whether the key's usage attributes, and the mechanisms that it is pinned to if any, let it work in this mode.
    fn permits(&self, mode: Mode) -> bool {
        let usage = match mode.wraps_objects() {
            true => [Attribute::Wrap(true), Attribute::Unwrap(true)],
            false => [Attribute::Encrypt(true), Attribute::Decrypt(true)],
        };
        usage.iter().all(|wanted| self.0.contains(wanted))
            && self.pinned().is_none_or(|pinned| pinned.contains(&mode.mechanism()))
    }

    /// CKA_ALLOWED_MECHANISMS. SoftHSM says an empty list of a key that may do everything.
    fn pinned(&self) -> Option<&[MechanismType]> {
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

    const MODES: [Mode; 2] = [Mode::Wrapkey, Mode::Gcm];

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
        let admitted = admit(&Said(kek(&id)), &MODES, None, now()).unwrap();
        let rank = Rank { not_before: now(), id: id.to_vec() };
        assert_eq!(admitted, Admitted { rank, mode: Mode::Wrapkey, exception: None });
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
            let error = admit(&with(changed.clone()), &MODES, None, now()).unwrap_err();
            assert!(error.contains(reason), "{changed:?}: {error}");
        }
    }

    #[test]
    fn what_a_token_does_not_say_is_not_assumed() {
        let mut said = kek(&new_id(now()).unwrap());
        said.retain(|attribute| attribute.attribute_type() != AttributeType::Local);
        let error = admit(&Said(said), &MODES, None, now()).unwrap_err();
        assert!(error.contains("does not say"), "{error}");
    }

    #[test]
    fn a_key_that_the_configuration_admits_needs_no_id_of_ours_and_a_word_for_a_history_that_it_lacks() {
        let not_before = "2026-01-01T00:00:00Z".parse().unwrap();
        let plain = Admission { not_before, exception: None };
        let excused = Admission { not_before, exception: Some("restored in May".into()) };
        for admission in [&plain, &excused] {
            let admitted = admit(&with(Attribute::Id(vec![1])), &MODES, Some(admission), now()).unwrap();
            assert_eq!((admitted.rank.not_before, admitted.exception), (not_before, None));
        }
        for (changed, name) in [
            (Attribute::Local(false), "LOCAL"),
            (Attribute::NeverExtractable(false), "NEVER_EXTRACTABLE"),
            (Attribute::AlwaysSensitive(false), "ALWAYS_SENSITIVE"),
        ] {
            let said = with(changed);
            let error = admit(&said, &MODES, Some(&plain), now()).unwrap_err();
            assert!(error.contains(name) && error.contains("exception ="), "{error}");
            let exception = admit(&said, &MODES, Some(&excused), now()).unwrap().exception.unwrap();
            assert!(exception.contains(name) && exception.contains("restored in May"), "{exception}");
        }
        for changed in [Attribute::Sensitive(false), Attribute::Extractable(true), Attribute::ValueLen(16.into())] {
            admit(&with(changed), &MODES, Some(&excused), now()).unwrap_err();
        }
    }

    #[test]
    fn usage_and_pinned_mechanism_choose_the_mode() {
        let mut said = with(Attribute::Wrap(false)).0;
        said.retain(|attribute| !matches!(attribute, Attribute::Encrypt(_) | Attribute::Decrypt(_)));
        said.extend([Attribute::Encrypt(true), Attribute::Decrypt(true)]);
        let both = [Mode::Encrypt, Mode::Gcm];
        assert_eq!(admit(&Said(said.clone()), &both, None, now()).unwrap().mode, Mode::Encrypt);
        said.push(Attribute::AllowedMechanisms(vec![MechanismType::AES_GCM]));
        assert_eq!(admit(&Said(said), &both, None, now()).unwrap().mode, Mode::Gcm);
    }
}
