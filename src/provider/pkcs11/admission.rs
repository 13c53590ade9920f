//! Which keys of a token are KEKs. Pure: from what the token says of a key to a decision with its reason.
//!
//! A key that anybody could have written under our label must not wrap a single DEK: so a key becomes a KEK by itself
//! only if the token vouches that it was born there and cannot leave.

mod id;
mod said;

use std::collections::BTreeMap;
use std::sync::Arc;

use cryptoki::object::{Attribute, KeyType, ObjectClass};
use jiff::Timestamp;

pub use self::id::LONGEST_WAIT;
pub(super) use self::id::{instant_of, new_id};
pub(super) use self::said::{ASKED, Said};
use super::error::{CallError, Class};
use super::halves;
use super::oaep::Pair;
use crate::config::{Admission, Mode, Profile};
use crate::envelope::WrapAlgorithm;
use crate::identity::Identity;
use crate::provider::{Attributes, Rank};

/// How a provider recognises and uses its KEKs.
#[derive(Debug)]
pub(super) struct Rules {
    pub(super) label: String,
    pub(super) profile: Arc<Profile>,
    /// KEKs made elsewhere, by CKA_ID.
    pub(super) admitted: BTreeMap<Vec<u8>, Admission>,
}

impl Rules {
    /// Decides about all objects that have the label, in their order. `None`: it belongs to a pair, and what is decided
    /// about that stands with the private key that decrypts.
    pub(super) fn decide(&self, objects: &[Said], now: Timestamp) -> Vec<Option<Decision>> {
        let pairs = self.profile.modes.contains(&Mode::Oaep);
        let halves: Vec<&Said> = objects.iter().filter(|said| pairs && halves::is_half(said)).collect();
        let decide = |said: &Said| match said {
            half if pairs && halves::is_half(half) => halves::decide(half, &halves, self, now),
            public if pairs && halves::is_public(public) => None,
            said => {
                let admission = said.id().and_then(|id| self.admitted.get(id));
                let identity = said.id().map(Identity::of_pkcs11);
                Some(Decision::new(said, identity, admit(said, &self.profile, admission, now)))
            }
        };
        let mut decisions: Vec<_> = objects.iter().map(decide).collect();
        for (said, decision) in objects.iter().zip(&mut decisions) {
            let is_twin = objects.iter().filter(|other| said.is_found_like(other)).count() > 1;
            if let Some(decision) = decision.as_mut().filter(|decision| is_twin && decision.verdict.is_ok()) {
                decision.is_ambiguous = true;
                decision.verdict = Err("another key has the same CKA_ID: remove the one that is not meant".into());
            }
        }
        decisions
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
    /// Whether it would be a KEK, were it not for another key with the same CKA_ID.
    pub(super) is_ambiguous: bool,
}

impl Decision {
    pub(super) fn new(said: &Said, identity: Option<Identity>, verdict: Result<Admitted, String>) -> Self {
        Self {
            id: said.id().map(<[u8]>::to_vec),
            identity,
            attributes: said.attributes(),
            verdict,
            is_ambiguous: false,
        }
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

/// A key that is a KEK.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Admitted {
    pub(super) rank: Rank,
    pub(super) mode: Mode,
    pub(super) pair: Option<Arc<Pair>>,
    /// What the token does not vouch for, and why that is excused.
    pub(super) exception: Option<String>,
}

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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use cryptoki::mechanism::MechanismType;
    use cryptoki::object::AttributeType;
    use jiff::SignedDuration;

    use super::super::raw;
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
    fn each_of_two_keys_with_one_id_has_a_reason_of_its_own() {
        let rules = Rules { label: String::new(), profile: Arc::new(plain()), admitted: BTreeMap::new() };
        let with = |id: &[u8], changed: Attribute| {
            let kept = kek(id).into_iter().filter(|said| said.attribute_type() != changed.attribute_type());
            Said(kept.chain([changed.clone()]).collect())
        };
        let (id, good) = (new_id(now()).unwrap(), Attribute::Local(true));
        let open = Attribute::Extractable(true);
        let generic = Attribute::KeyType(KeyType::GENERIC_SECRET);
        for (one, other, reasons) in [
            (with(&id, good.clone()), with(&id, good.clone()), ["another key", "another key"]),
            (with(&id, good.clone()), with(&id, open.clone()), ["another key", "EXTRACTABLE"]),
            (with(&id, open.clone()), with(&id, good.clone()), ["EXTRACTABLE", "another key"]),
            (with(&[], open), with(&[], generic.clone()), ["no CKA_ID", "not an AES key"]),
            // A search for a KEK finds no key of another type.
            (with(&id, good), with(&id, generic), ["", "not an AES key"]),
        ] {
            let decided = rules.decide(&[one, other], now()).into_iter().flatten();
            let said: Vec<_> = decided.map(|decision| decision.verdict.err().unwrap_or_default()).collect();
            assert!(said.len() == 2 && said.iter().zip(reasons).all(|(said, why)| said.contains(why)), "{said:?}");
            assert_eq!(said.first().unwrap().is_empty(), reasons == ["", "not an AES key"]);
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
