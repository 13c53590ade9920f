//! Which RSA keys of a token are KEKs of the mode `oaep`: two private keys, one that decrypts and one that signs, of
//! which the second has the first one's CKA_ID and a byte more ([`oaep::signer_id`]). Pure, as [`super::admission`] is.

use std::sync::Arc;

use cryptoki::mechanism::MechanismType;
use cryptoki::object::{Attribute, KeyType, ObjectClass};
use jiff::Timestamp;

use super::admission::{Admitted, Decision, Rules, Said, instant_of};
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

/// Decides about all private keys under the label.
pub(super) fn decide(halves: &[Said], rules: &Rules, now: Timestamp) -> Vec<Decision> {
    let signs_for = |signer: &Said, half: &Said| half.id().is_some_and(|id| signer.id() == Some(&oaep::signer_id(id)));
    let decide = |half: &Said| {
        let signers: Vec<&Said> = halves.iter().filter(|other| signs_for(other, half)).collect();
        let verdict = match signers.as_slice() {
            [signer] => admit(half, signer, rules, now),
            [] => Err("no private key has its CKA_ID with the byte 01 after it, to sign: make a KEK with \
                       `trousseau key generate`"
                .into()),
            _ => Err("several keys have its CKA_ID with the byte 01 after it: remove those that are not meant".into()),
        };
        let identity = verdict.as_ref().ok().map(|kek| rules.spec_of(kek).identity);
        Decision { id: half.id().map(<[u8]>::to_vec), identity, verdict }
    };
    halves.iter().filter(|key| !halves.iter().any(|half| signs_for(key, half))).map(decide).collect()
}

/// Decides about a KEK.
///
/// # Errors
/// Why it is not used, and what to do.
fn admit(half: &Said, signer: &Said, rules: &Rules, now: Timestamp) -> Result<Admitted, String> {
    let id = half.id().ok_or("it has no CKA_ID: KEKs are made with `trousseau key generate`")?;
    let not_before = rules.admitted.get(id).copied();
    for key in [half, signer] {
        if !key.0.contains(&Attribute::KeyType(KeyType::RSA)) {
            return Err("it is not an RSA key: give it another label".into());
        }
        key.requires_secrecy(not_before.is_none())?;
    }
    let (decrypts, signs) = (Attribute::Decrypt(true), Attribute::Sign(true));
    let only = |key: &Said, is: &Attribute, is_not: &Attribute, mechanism: MechanismType| {
        // What the token lets nobody set, it cannot deny either.
        let denied = rules.omitted.contains(&is_not.attribute_type()) || !key.0.contains(is_not);
        key.0.contains(is) && denied && key.pinned().is_none_or(|pinned| pinned.contains(&mechanism))
    };
    if !only(half, &decrypts, &signs, Mode::Oaep.mechanism()) || !only(signer, &signs, &decrypts, oaep::SIGNING) {
        return Err(
            "its keys are not such that one only decrypts with OAEP and the other only signs: KEKs are made with \
                    `trousseau key generate`"
                .into(),
        );
    }
    let not_before = not_before.map_or_else(|| instant_of(id, now), Ok)?;
    let pair = Some(Arc::new(Pair::new(id, half, signer)?));
    Ok(Admitted { rank: Rank { not_before, id: id.to_vec() }, mode: Mode::Oaep, pair })
}
