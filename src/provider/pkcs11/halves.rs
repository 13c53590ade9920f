//! Which RSA keys of a token are KEKs of the mode `oaep`: two private keys, one that decrypts and one that signs, of
//! which the second has the first one's CKA_ID and a byte more ([`oaep::signer_id`]). Pure, as [`super::admission`] is.

use std::sync::Arc;

use cryptoki::mechanism::MechanismType;
use cryptoki::object::{Attribute, KeyType, ObjectClass};
use jiff::Timestamp;

use super::admission::{Admitted, Decision, Rules, Said, instant_of};
use super::attributes::omitted;
use super::oaep::{self, Pair};
use crate::config::Mode;
use crate::provider::Rank;

/// Whether it is a private key, and so perhaps a half of a KEK.
pub(super) fn is_half(said: &Said) -> bool {
    said.0.contains(&Attribute::Class(ObjectClass::PRIVATE_KEY))
}

/// Whether it is a public key: it belongs to a private one, which shows the same, and keeps nothing secret.
pub(super) fn is_public(said: &Said) -> bool {
    said.0.contains(&Attribute::Class(ObjectClass::PUBLIC_KEY))
}

/// Decides about one of all private keys under the label; `None`: it is the one that signs for another.
pub(super) fn decide(half: &Said, halves: &[&Said], rules: &Rules, now: Timestamp) -> Option<Decision> {
    let signs_for = |signer: &Said, half: &Said| half.id().is_some_and(|id| signer.id() == Some(&oaep::signer_id(id)));
    if halves.iter().any(|other| signs_for(half, other)) {
        return None;
    }
    let signers: Vec<&Said> = halves.iter().copied().filter(|other| signs_for(other, half)).collect();
    let verdict = match signers.as_slice() {
        [signer] => admit(half, signer, rules, now),
        [] => Err("no private key has its CKA_ID with the byte 01 after it, to sign: make a KEK with \
                   `trousseau key generate`"
            .into()),
        _ => Err("several keys have its CKA_ID with the byte 01 after it: remove those that are not meant".into()),
    };
    let identity = verdict.as_ref().ok().map(|kek| rules.spec_of(kek).identity);
    // Two that decrypt are found out where all keys are compared.
    Some(Decision { is_ambiguous: signers.len() > 1, ..Decision::new(half, identity, verdict) })
}

/// Decides about a KEK.
///
/// # Errors
/// Why it is not used, and what to do.
fn admit(half: &Said, signer: &Said, rules: &Rules, now: Timestamp) -> Result<Admitted, String> {
    let id = half.id().ok_or("it has no CKA_ID: KEKs are made with `trousseau key generate`")?;
    let admission = rules.admitted.get(id);
    let mut exceptions = Vec::new();
    for key in [half, signer] {
        if !key.0.contains(&Attribute::KeyType(KeyType::RSA)) {
            return Err("it is not an RSA key: give it another label".into());
        }
        exceptions.extend(key.secrecy(&rules.profile, admission)?);
    }
    let (decrypts, signs) = (Attribute::Decrypt(true), Attribute::Sign(true));
    let omitted: Vec<_> = rules.profile.omit_attributes.iter().copied().map(omitted).collect();
    let only = |key: &Said, is: &Attribute, is_not: &Attribute, mechanism: MechanismType| {
        // What the token lets nobody set, it cannot deny either.
        let denied = omitted.contains(&is_not.attribute_type()) || !key.0.contains(is_not);
        key.0.contains(is) && denied && key.pinned().is_none_or(|pinned| pinned.contains(&mechanism))
    };
    if !only(half, &decrypts, &signs, oaep::DECRYPTING) || !only(signer, &signs, &decrypts, oaep::SIGNING) {
        return Err(
            "its keys are not such that one only decrypts with OAEP and the other only signs: KEKs are made with \
                    `trousseau key generate`"
                .into(),
        );
    }
    let not_before = admission.map_or_else(|| instant_of(id, now), |admission| Ok(admission.not_before))?;
    exceptions.dedup(); // both halves have one history
    let exception = (!exceptions.is_empty()).then(|| exceptions.join("; "));
    let pair = Some(Arc::new(Pair::new(id, half, signer)?));
    Ok(Admitted { rank: Rank { not_before, id: id.to_vec() }, mode: Mode::Oaep, pair, exception })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
mod tests {
    use std::collections::BTreeMap;

    use super::super::admission::new_id;
    use super::*;

    fn now() -> Timestamp {
        "2026-11-24T06:00:00Z".parse().unwrap()
    }

    fn rules(omitted: &str) -> Rules {
        let head = "title = \"a token\"\nstatus = \"tested\"\nmodule-paths = []\nmodes = [\"oaep\"]";
        let profile = toml::from_str(&format!("{head}\nomit-attributes = [{omitted}]")).unwrap();
        Rules { label: String::new(), profile: Arc::new(profile), admitted: BTreeMap::new() }
    }

    fn half(id: Vec<u8>, decrypts: bool) -> Vec<Attribute> {
        let mut modulus = vec![0xff; 256];
        modulus[1] = u8::from(decrypts);
        vec![
            Attribute::Class(ObjectClass::PRIVATE_KEY),
            Attribute::KeyType(KeyType::RSA),
            Attribute::Id(id),
            Attribute::Sensitive(true),
            Attribute::AlwaysSensitive(true),
            Attribute::Extractable(false),
            Attribute::NeverExtractable(true),
            Attribute::Local(true),
            Attribute::Decrypt(decrypts),
            Attribute::Sign(!decrypts),
            Attribute::Modulus(modulus),
            Attribute::PublicExponent(vec![1, 0, 1]),
        ]
    }

    /// A KEK of our own making: the half that decrypts, and the half that signs.
    fn kek() -> [Vec<Attribute>; 2] {
        let id = new_id(now()).unwrap();
        [half(id.to_vec(), true), half(oaep::signer_id(&id), false)]
    }

    fn decisions(halves: Vec<Vec<Attribute>>, rules: &Rules) -> Vec<Decision> {
        let halves: Vec<Said> = halves.into_iter().map(Said).collect();
        rules.decide(&halves, now()).into_iter().flatten().collect()
    }

    fn verdicts(halves: Vec<Vec<Attribute>>, rules: &Rules) -> Vec<Result<Admitted, String>> {
        decisions(halves, rules).into_iter().map(|decision| decision.verdict).collect()
    }

    #[test]
    fn two_pairs_of_our_own_making_are_one_kek() {
        let [key, signer] = kek();
        for halves in [vec![key.clone(), signer.clone()], vec![signer, key]] {
            let verdicts = verdicts(halves, &rules(""));
            assert_eq!(verdicts.len(), 1);
            let kek = verdicts[0].as_ref().unwrap();
            assert_eq!((kek.rank.not_before, kek.mode), (now(), Mode::Oaep));
        }
    }

    #[test]
    fn other_pairs_are_refused_with_the_reason() {
        let [key, signer] = kek();
        let with = |half: &[Attribute], changed: Attribute| {
            let mut half = half.to_vec();
            half.retain(|attribute| attribute.attribute_type() != changed.attribute_type());
            half.push(changed);
            half
        };
        for (halves, reason) in [
            (vec![key.clone()], "to sign"),
            (vec![signer.clone()], "to sign"),
            (vec![key.clone(), signer.clone(), signer.clone()], "several keys"),
            (vec![with(&key, Attribute::Sensitive(false)), signer.clone()], "SENSITIVE"),
            (vec![key.clone(), with(&signer, Attribute::Extractable(true))], "EXTRACTABLE"),
            (vec![key.clone(), with(&signer, Attribute::Local(false))], "LOCAL"),
            (vec![with(&key, Attribute::KeyType(KeyType::EC)), signer.clone()], "not an RSA key"),
            (vec![with(&key, Attribute::Sign(true)), signer.clone()], "only decrypts"),
            (vec![with(&key, Attribute::Decrypt(false)), signer.clone()], "only decrypts"),
            (vec![key.clone(), with(&signer, Attribute::Decrypt(true))], "only signs"),
            (
                vec![key.clone(), with(&signer, Attribute::AllowedMechanisms(vec![MechanismType::RSA_X_509]))],
                "only signs",
            ),
            (vec![key.clone(), with(&signer, Attribute::Modulus(vec![0xff; 128]))], "bits"),
            (vec![half(vec![1], true), half(vec![1, 1], false)], "UUIDv7"),
        ] {
            let verdicts = verdicts(halves, &rules(""));
            let error = verdicts[0].as_ref().unwrap_err();
            assert!(verdicts.len() == 1 && error.contains(reason), "{reason}: {error}");
        }
    }

    /// As after a restore that was done twice: nobody can tell which one is meant.
    #[test]
    fn a_kek_of_which_a_pair_is_there_twice_is_ambiguous() {
        let [key, signer] = kek();
        let (key, signer) = (|| key.clone(), || signer.clone());
        for (case, halves) in [
            ("the one that signs", vec![key(), signer(), signer()]),
            ("the one that decrypts", vec![key(), key(), signer()]),
            ("both", vec![key(), key(), signer(), signer()]),
        ] {
            let decisions = decisions(halves, &rules(""));
            let is_refused = |decision: &Decision| decision.is_ambiguous && decision.verdict.is_err();
            assert!(!decisions.is_empty() && decisions.iter().all(is_refused), "{case}");
        }
        assert!(decisions(vec![key(), signer()], &rules("")).iter().all(|decision| !decision.is_ambiguous));
    }

    #[test]
    fn a_use_that_the_token_lets_nobody_set_is_not_held_against_a_key() {
        let every_use = kek().map(|mut half| {
            half.retain(|attribute| !matches!(attribute, Attribute::Decrypt(_) | Attribute::Sign(_)));
            half.extend([Attribute::Decrypt(true), Attribute::Sign(true)]);
            half
        });
        let omitted = r#""CKA_SIGN", "CKA_DECRYPT""#;
        assert!(verdicts(every_use.to_vec(), &rules(omitted))[0].is_ok());
        assert!(verdicts(every_use.to_vec(), &rules(""))[0].is_err());
    }
}
