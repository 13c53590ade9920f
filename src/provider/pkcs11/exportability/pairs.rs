//! What of a private RSA key is secret, and by what it is known to be that key's.

use cryptoki::object::{Attribute, AttributeType, KeyType, ObjectClass, ObjectHandle};
use cryptoki::session::Session;
use rsa::traits::PublicKeyParts;
use rsa::{BoxedUint, PrivateKey, PublicKey};
use zeroize::Zeroizing;

use super::super::admission::Said;
use super::super::error::{CallError, Class};
use super::super::oaep;

/// Each of them alone gives the key away.
pub(super) const PRIVATE_NUMBERS: [AttributeType; 6] = [
    AttributeType::PrivateExponent,
    AttributeType::Prime1,
    AttributeType::Prime2,
    AttributeType::Exponent1,
    AttributeType::Exponent2,
    AttributeType::Coefficient,
];

/// The bytes in an attribute that is a secret.
pub(super) fn secret_bytes(attribute: Attribute) -> Option<Zeroizing<Vec<u8>>> {
    match attribute {
        Attribute::Value(bytes)
        | Attribute::PrivateExponent(bytes)
        | Attribute::Prime1(bytes)
        | Attribute::Prime2(bytes)
        | Attribute::Exponent1(bytes)
        | Attribute::Exponent2(bytes)
        | Attribute::Coefficient(bytes) => Some(Zeroizing::new(bytes)),
        _ => None,
    }
}

/// A template for a private key that is to be read: it lives in the session.
pub(super) fn session_object() -> Vec<Attribute> {
    vec![
        Attribute::Class(ObjectClass::PRIVATE_KEY),
        Attribute::KeyType(KeyType::RSA),
        Attribute::Token(false),
        Attribute::Sensitive(false),
        Attribute::Extractable(true),
    ]
}

/// What a private key shows of its public one.
pub(super) fn said(session: &Session, private: ObjectHandle) -> Result<Said, CallError> {
    Ok(Said(session.get_attributes(private, &[AttributeType::Modulus, AttributeType::PublicExponent])?))
}

/// The public key that a private one shows.
pub(super) fn public_key(session: &Session, private: ObjectHandle) -> Result<PublicKey, CallError> {
    oaep::public_key(&said(session, private)?).map_err(|what| CallError::new(Class::Refused, what))
}

/// Whether these bytes are that private number of this public key; `None` if only the others could tell.
pub(super) fn is_of(public: &PublicKey, what: AttributeType, bytes: &[u8]) -> Option<bool> {
    let number = BoxedUint::from_be_slice_vartime(bytes);
    let modulus = public.n();
    let is_possible = number.bit_width_vartime() > 1 && number < **modulus;
    match what {
        // It finds the primes, and fails if there are none.
        AttributeType::PrivateExponent => Some(
            is_possible && {
                let (modulus, exponent) = (modulus.clone().get(), public.e().clone());
                PrivateKey::from_components(modulus, exponent, number, vec![]).is_ok()
            },
        ),
        AttributeType::Prime1 | AttributeType::Prime2 => {
            let prime = number.into_nz().into_option().filter(|_| is_possible);
            Some(prime.is_some_and(|prime| modulus.rem_vartime(&prime).is_zero().into()))
        }
        _ => None,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
mod tests {
    use rsa::traits::PrivateKeyParts;

    use super::*;

    #[test]
    fn a_number_is_known_by_the_public_key() {
        let vectors: serde_json::Value =
            serde_json::from_str(include_str!("../../../../tests/vectors/oaep-1.json")).unwrap();
        let number = |name: &str| {
            let digits = base16ct::lower::decode_vec(vectors[0][name].as_str().unwrap()).unwrap();
            BoxedUint::from_be_slice_vartime(&digits)
        };
        let (n, e) = (number("modulus"), BoxedUint::from(65_537_u32));
        let private = PrivateKey::from_components(n.clone(), e.clone(), number("private_exponent"), vec![]).unwrap();
        let public = PublicKey::new(n.clone(), e).unwrap();
        let bytes = |number: &BoxedUint| number.to_be_bytes().to_vec();
        let (exponent, prime) = (bytes(private.d()), bytes(&private.primes()[1]));
        let mut wrong = exponent.clone();
        wrong[100] ^= 1;
        for (what, bytes, is_of_it) in [
            (AttributeType::PrivateExponent, &exponent, Some(true)),
            (AttributeType::PrivateExponent, &wrong, Some(false)),
            (AttributeType::PrivateExponent, &vec![0; 256], Some(false)),
            (AttributeType::PrivateExponent, &vec![1], Some(false)),
            (AttributeType::PrivateExponent, &vec![2], Some(false)),
            (AttributeType::PrivateExponent, &vec![3], Some(false)),
            (AttributeType::PrivateExponent, &vec![0xff; 255], Some(false)),
            (AttributeType::PrivateExponent, &prime, Some(false)),
            (AttributeType::PrivateExponent, &bytes(&n), Some(false)),
            (AttributeType::PrivateExponent, &vec![0xff; 600], Some(false)),
            (AttributeType::Prime1, &prime, Some(true)),
            (AttributeType::Prime2, &prime, Some(true)),
            (AttributeType::Prime1, &exponent, Some(false)),
            (AttributeType::Prime1, &vec![0; 128], Some(false)),
            (AttributeType::Prime1, &vec![1], Some(false)),
            (AttributeType::Prime1, &bytes(&n), Some(false)),
            (AttributeType::Coefficient, &prime, None),
        ] {
            assert_eq!(is_of(&public, what, bytes), is_of_it, "{what}: {} bytes", bytes.len());
        }
    }
}
