//! The mode `oaep`, for tokens that wrap no DEK under AES: two RSA pairs in the token make one KEK.
//!
//! Whoever has a public key can encrypt under it, so a DEK that is only encrypted could be anybody's. Hence the second
//! pair: it signs each ciphertext together with the KEK's identity, and what it has not signed is never decrypted. Both
//! public keys are part of the identity. Encrypting and verifying happen here; only signing and decrypting ask the
//! token. Some tokens do not stand a damaged ciphertext (libtpms 0.9 stops the whole TPM): none ever reaches one.

use cryptoki::mechanism::rsa::{PkcsMgfType, PkcsOaepParams, PkcsOaepSource};
use cryptoki::mechanism::{Mechanism, MechanismType};
use cryptoki::object::{Attribute, AttributeType, KeyType, ObjectClass, ObjectHandle};
use cryptoki::session::Session;
use getrandom::rand_core::UnwrapErr;
use rsa::pkcs8::EncodePublicKey;
use rsa::traits::PublicKeyParts;
use rsa::{BoxedUint, Oaep, Pkcs1v15Sign, PublicKey};
use sha2::{Digest, Sha256};
use zeroize::Zeroizing;

use super::admission::{KekSpec, Said};
use super::attributes;
use super::error::{CallError, Class};
use super::mechanism::Handles;
use crate::config::Profile;
use crate::envelope::WrapAlgorithm;
use crate::identity::Identity;
use crate::secret::Dek;

/// What the other key may do.
pub(super) const DECRYPTING: MechanismType = MechanismType::RSA_PKCS_OAEP;
/// What the signing key may do: sign whatever is given it, so that the hash is ours. Some tokens know no more.
pub(super) const SIGNING: MechanismType = MechanismType::RSA_PKCS;

/// What is signed begins with it.
const SIGNED: &[u8] = b"trousseau rsa-oaep v1\0";

/// Before a SHA-256 hash it makes a DigestInfo (RFC 8017 section 9.2, note 1): CKM_RSA_PKCS wants that done.
const DIGEST_INFO: [u8; 19] =
    [0x30, 0x31, 0x30, 0x0d, 0x06, 0x09, 0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x01, 0x05, 0x00, 0x04, 0x20];

/// The CKA_ID of the signing pair, from that of the KEK: some tokens give no two pairs one.
pub(super) fn signer_id(id: &[u8]) -> Vec<u8> {
    [id, &[1]].concat()
}

/// What the public keys of a KEK are, and so its identity.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Pair {
    pub(super) identity: Identity,
    pub(super) algorithm: WrapAlgorithm,
    encryption: PublicKey,
    verification: PublicKey,
}

impl Pair {
    /// From the CKA_ID of the KEK, and what the token says of both private keys.
    ///
    /// # Errors
    /// They are no RSA keys of a size that is used.
    pub(super) fn new(id: &[u8], decrypting: &Said, signing: &Said) -> Result<Self, String> {
        let (encryption, verification) = (public_key(decrypting)?, public_key(signing)?);
        let algorithm = match (encryption.n().bit_width(), verification.n().bit_width()) {
            (2048, 2048) => WrapAlgorithm::RsaOaep2048,
            (3072, 3072) => WrapAlgorithm::RsaOaep3072,
            (one, other) => {
                return Err(format!("its RSA keys have {one} and {other} bits: make a KEK of 2048 or 3072 bits"));
            }
        };
        if encryption == verification {
            return Err("both its RSA keys are the same: make a KEK with `trousseau key generate`".into());
        }
        let der = |key: &PublicKey| key.to_public_key_der().map_err(|error| error.to_string());
        let identity = Identity::of_pkcs11_pair(id, der(&encryption)?.as_bytes(), der(&verification)?.as_bytes());
        Ok(Self { identity, algorithm, encryption, verification })
    }

    fn encrypt(&self, dek: &Dek) -> Result<Vec<u8>, CallError> {
        // It panics if getrandom(2) fails, which it does not once it has worked: it has, for the DEK.
        let mut random = UnwrapErr(getrandom::SysRng);
        let encrypted = self.encryption.encrypt(&mut random, Oaep::<Sha256>::new(), dek.expose());
        encrypted.map_err(|error| CallError::new(Class::Refused, format!("a DEK cannot be encrypted: {error}")))
    }

    /// The ciphertext in a wrapped DEK, if the KEK has signed it.
    ///
    /// # Errors
    /// It has not: the input is bad.
    pub(super) fn verified<'a>(&self, wrapped: &'a [u8]) -> Result<&'a [u8], CallError> {
        let forged = || CallError::new(Class::BadInput, "its signature is not the KEK's");
        let (ciphertext, signature) = wrapped.split_at_checked(self.encryption.size()).ok_or_else(forged)?;
        let scheme = Pkcs1v15Sign::new::<Sha256>();
        self.verification.verify(scheme, &self.hash(ciphertext), signature).map_err(|_| forged())?;
        Ok(ciphertext)
    }

    /// What is signed, hashed.
    fn hash(&self, ciphertext: &[u8]) -> [u8; 32] {
        let identity = self.identity.as_bytes();
        Sha256::new().chain_update(SIGNED).chain_update(identity).chain_update(ciphertext).finalize().into()
    }
}

pub(super) fn public_key(said: &Said) -> Result<PublicKey, String> {
    let number = |wanted: AttributeType| {
        let bytes = said.0.iter().find_map(|attribute| match attribute {
            Attribute::Modulus(bytes) | Attribute::PublicExponent(bytes) if attribute.attribute_type() == wanted => {
                Some(BoxedUint::from_be_slice_vartime(bytes))
            }
            _ => None,
        });
        bytes.ok_or("the token does not show its public key: KEKs are made with `trousseau key generate`")
    };
    PublicKey::new(number(AttributeType::Modulus)?, number(AttributeType::PublicExponent)?)
        .map_err(|error| format!("its public key is none: {error}"))
}

/// Encrypts here, and has the token sign.
pub(super) fn wrap(session: &Session, signing: ObjectHandle, pair: &Pair, dek: &Dek) -> Result<Vec<u8>, CallError> {
    let ciphertext = pair.encrypt(dek)?;
    let to_sign = [&DIGEST_INFO[..], &pair.hash(&ciphertext)].concat();
    let signature = session.sign(&Mechanism::RsaPkcs, signing, &to_sign)?;
    let wrapped = [ciphertext, signature].concat();
    // A wrong signature would lie in etcd, and nobody could read what is under it. The handle is found again.
    let signed = pair.verified(&wrapped).map(drop);
    signed.map_err(|_| CallError::new(Class::Session, "the token signed with another key than the KEK's"))?;
    Ok(wrapped)
}

/// Verifies here, and has the token decrypt. A damaged reference goes this way too.
pub(super) fn unwrap(
    session: &Session,
    decrypting: ObjectHandle,
    pair: &Pair,
    wrapped: &[u8],
) -> Result<Zeroizing<Vec<u8>>, CallError> {
    let ciphertext = pair.verified(wrapped)?;
    let parameters = PkcsOaepParams::new(MechanismType::SHA256, PkcsMgfType::MGF1_SHA256, PkcsOaepSource::empty());
    Ok(Zeroizing::new(session.decrypt(&Mechanism::RsaPkcsOaep(parameters), decrypting, ciphertext)?))
}

/// Makes both pairs, and nothing if one of them cannot be made. Returns the private keys.
pub(super) fn make(session: &Session, profile: &Profile, kek: &KekSpec) -> Result<Handles, CallError> {
    let key = make_pair(session, profile, kek, true)?;
    match make_pair(session, profile, kek, false) {
        Ok(signing) => Ok(Handles { key, signing }),
        Err(error) => {
            remove(session, &kek.label, &kek.id)?;
            Err(error)
        }
    }
}

fn make_pair(session: &Session, profile: &Profile, kek: &KekSpec, decrypts: bool) -> Result<ObjectHandle, CallError> {
    let [public, private] = templates(profile, kek, decrypts);
    Ok(session.generate_key_pair(&Mechanism::RsaPkcsKeyPairGen, &public, &private)?.1)
}

/// What is asked of the token for the pair that encrypts and decrypts, or for the one that signs and verifies: for its
/// public key and for its private one.
pub(super) fn templates(profile: &Profile, kek: &KekSpec, decrypts: bool) -> [Vec<Attribute>; 2] {
    let id = if decrypts { kek.id.clone() } else { signer_id(&kek.id) };
    let named = [Attribute::Token(true), Attribute::Label(kek.label.clone().into_bytes()), Attribute::Id(id)];
    let public = [
        Attribute::ModulusBits(u64::from(profile.rsa_bits).into()),
        Attribute::PublicExponent(vec![1, 0, 1]),
        Attribute::Encrypt(decrypts),
        Attribute::Verify(!decrypts),
    ];
    let private = [
        Attribute::Class(ObjectClass::PRIVATE_KEY),
        Attribute::KeyType(KeyType::RSA),
        Attribute::Private(true),
        Attribute::Sensitive(true),
        Attribute::Extractable(false),
        Attribute::Modifiable(false),
        Attribute::Copyable(false),
        Attribute::Decrypt(decrypts),
        Attribute::Sign(!decrypts),
        Attribute::SignRecover(false),
        Attribute::Unwrap(false),
        Attribute::Derive(false),
        // The token itself then refuses every other use of the key.
        Attribute::AllowedMechanisms(vec![if decrypts { DECRYPTING } else { SIGNING }]),
    ];
    [public.to_vec(), private.to_vec()].map(|more| {
        let mut template = [named.to_vec(), more].concat();
        attributes::omit(profile, &mut template);
        template
    })
}

/// Removes every object of a KEK.
pub(super) fn remove(session: &Session, label: &str, id: &[u8]) -> Result<(), CallError> {
    for id in [id.to_vec(), signer_id(id)] {
        let wanted = [Attribute::Token(true), Attribute::Label(label.into()), Attribute::Id(id)];
        for object in session.find_objects(&wanted)? {
            session.destroy_object(object)?;
        }
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
mod tests {
    use rsa::PrivateKey;
    use serde::Deserialize;

    use super::*;
    use crate::config::Codes;

    #[derive(Deserialize)]
    struct Vector {
        bits: u32,
        cka_id: String,
        modulus: String,
        signing_modulus: String,
        identity: Identity,
        dek: String,
        good: String,
        private_exponent: String,
        bad: Vec<Bad>,
    }

    #[derive(Deserialize)]
    struct Bad {
        name: String,
        wrapped: String,
    }

    fn bytes(hex: &str) -> Vec<u8> {
        base16ct::lower::decode_vec(hex).unwrap()
    }

    fn vectors() -> Vec<(Vector, Pair)> {
        let vectors: Vec<Vector> = serde_json::from_str(include_str!("../../../tests/vectors/oaep-1.json")).unwrap();
        vectors
            .into_iter()
            .map(|vector| {
                let pair = Pair::new(&bytes(&vector.cka_id), &key(&vector.modulus), &key(&vector.signing_modulus));
                (vector, pair.unwrap())
            })
            .collect()
    }

    fn key(modulus: &str) -> Said {
        Said(vec![Attribute::Modulus(bytes(modulus)), Attribute::PublicExponent(vec![1, 0, 1])])
    }

    #[test]
    fn golden_keks_have_their_identity_and_only_what_they_signed_goes_to_the_token() {
        for (vector, pair) in vectors() {
            assert_eq!(pair.identity, vector.identity);
            let good = bytes(&vector.good);
            assert_eq!(good.len(), pair.algorithm.wrapped_len());
            assert_eq!(pair.verified(&good).unwrap(), &good[..good.len() / 2]);
            for Bad { name, wrapped } in vector.bad {
                let error = pair.verified(&bytes(&wrapped)).unwrap_err();
                assert_eq!(error.class(&Codes::default()), Class::BadInput, "{} bits, {name}: {error}", vector.bits);
            }
        }
    }

    #[test]
    fn what_is_encrypted_here_and_there_is_decrypted_alike() {
        for (vector, pair) in vectors() {
            let private = BoxedUint::from_be_slice_vartime(&bytes(&vector.private_exponent));
            let (n, e) = (pair.encryption.n().clone().get(), pair.encryption.e().clone());
            let private = PrivateKey::from_components(n, e, private, vec![]).unwrap();
            let decrypt = |ciphertext: &[u8]| private.decrypt(Oaep::<Sha256>::new(), ciphertext).unwrap();
            assert_eq!(decrypt(pair.verified(&bytes(&vector.good)).unwrap()), bytes(&vector.dek));
            let dek = Dek::generate().unwrap();
            assert_eq!(decrypt(&pair.encrypt(&dek).unwrap()), dek.expose());
        }
    }

    #[test]
    fn keys_of_another_size_or_twice_the_same_are_no_kek() {
        let all = vectors();
        let (small, large) = (&all.first().unwrap().0, &all.last().unwrap().0);
        let halves = |one: &str, other: &str| Pair::new(&[1], &key(one), &key(other)).unwrap_err();
        assert!(halves(&small.modulus, &large.signing_modulus).contains("2048 and 3072 bits"));
        assert!(halves(&small.modulus, &small.modulus).contains("the same"));
        assert!(halves(&small.modulus[..256], &small.modulus[..256]).contains("bits"));
        assert!(halves("", &small.modulus).contains("public key"));
    }
}
