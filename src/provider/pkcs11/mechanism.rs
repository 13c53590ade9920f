//! The C calls by which a KEK wraps and unwraps a DEK, a function for each way ([`Mode`]).
//!
//! The DEK's bytes go through memory of the cryptoki crate and of the module, which nothing here can wipe; ours is.

use cryptoki::mechanism::aead::GcmParams;
use cryptoki::mechanism::{Mechanism, MechanismType};
use cryptoki::object::{Attribute, AttributeType, KeyType, ObjectClass, ObjectHandle};
use cryptoki::session::Session;
use zeroize::Zeroizing;

use super::error::{CallError, Class};
use crate::config::Mode;
use crate::identity::Identity;
use crate::secret::Dek;

const IV_LEN: usize = 12;
const TAG_BITS: u64 = 128;

impl Mode {
    /// The mechanism that CKA_ALLOWED_MECHANISMS pins for it.
    pub(super) const fn mechanism(self) -> MechanismType {
        match self {
            Self::Wrapkey | Self::Encrypt => MechanismType::AES_KEY_WRAP,
            Self::Gcm => MechanismType::AES_GCM,
        }
    }

    /// Whether the KEK needs CKA_WRAP and CKA_UNWRAP; otherwise it needs CKA_ENCRYPT and CKA_DECRYPT.
    pub(super) const fn wraps_objects(self) -> bool {
        matches!(self, Self::Wrapkey)
    }
}

/// Wraps `dek` under the KEK `kek`, which has this identity.
pub(super) fn wrap(
    mode: Mode,
    session: &Session,
    kek: ObjectHandle,
    identity: Identity,
    dek: &Dek,
) -> Result<Vec<u8>, CallError> {
    let wrapped = match mode {
        Mode::Wrapkey => wrap_object(session, kek, dek)?,
        Mode::Encrypt => session.encrypt(&Mechanism::AesKeyWrap, kek, dek.expose())?,
        Mode::Gcm => encrypt_gcm(session, kek, identity, dek)?,
    };
    let expected = mode.algorithm().wrapped_len();
    if wrapped.len() != expected {
        let what = format!("the token wrapped a DEK into {} bytes where {expected} were due", wrapped.len());
        return Err(CallError::new(Class::Refused, what));
    }
    Ok(wrapped)
}

/// Unwraps what [`wrap`] made.
pub(super) fn unwrap(
    mode: Mode,
    session: &Session,
    kek: ObjectHandle,
    identity: Identity,
    wrapped: &[u8],
) -> Result<Dek, CallError> {
    let bytes = match mode {
        Mode::Wrapkey => unwrap_object(session, kek, wrapped)?,
        Mode::Encrypt => Zeroizing::new(session.decrypt(&Mechanism::AesKeyWrap, kek, wrapped)?),
        Mode::Gcm => decrypt_gcm(session, kek, identity, wrapped)?,
    };
    let length = || CallError::new(Class::BadInput, format!("an unwrapped DEK has {} bytes", bytes.len()));
    Dek::from_bytes(&bytes).ok_or_else(length)
}

/// C_WrapKey (PKCS#11 v3.1 section 5.18.3): the DEK becomes a session object that may leave the token, and does so under the KEK.
fn wrap_object(session: &Session, kek: ObjectHandle, dek: &Dek) -> Result<Vec<u8>, CallError> {
    let mut template = session_object();
    template.push(Attribute::Value(dek.expose().to_vec()));
    let created = session.create_object(&template);
    wipe(&mut template);
    let object = created?;
    let wrapped = session.wrap_key(&Mechanism::AesKeyWrap, kek, object);
    let destroyed = session.destroy_object(object);
    let wrapped = wrapped?;
    destroyed?;
    Ok(wrapped)
}

/// C_UnwrapKey (PKCS#11 v3.1 section 5.18.4), and the value read back.
fn unwrap_object(session: &Session, kek: ObjectHandle, wrapped: &[u8]) -> Result<Zeroizing<Vec<u8>>, CallError> {
    let object = session.unwrap_key(&Mechanism::AesKeyWrap, kek, wrapped, &session_object())?;
    let read = session.get_attributes(object, &[AttributeType::Value]);
    let destroyed = session.destroy_object(object);
    let value = read?.into_iter().find_map(|attribute| match attribute {
        Attribute::Value(value) => Some(Zeroizing::new(value)),
        _ => None,
    });
    destroyed?;
    value.ok_or_else(|| CallError::new(Class::Refused, "the token does not show the CKA_VALUE of a session object"))
}

/// A template for a DEK: it lives in the session, and its value can be read. CKA_VALUE_LEN is not said: SoftHSM
/// answers CKR_ATTRIBUTE_READ_ONLY to it in C_UnwrapKey.
fn session_object() -> Vec<Attribute> {
    vec![
        Attribute::Class(ObjectClass::SECRET_KEY),
        Attribute::KeyType(KeyType::AES),
        Attribute::Token(false),
        Attribute::Sensitive(false),
        Attribute::Extractable(true),
    ]
}

pub(super) fn wipe(template: &mut [Attribute]) {
    for attribute in template {
        if let Attribute::Value(value) = attribute {
            zeroize::Zeroize::zeroize(value);
        }
    }
}

/// IV ‖ ciphertext ‖ tag. The IV is ours: some tokens take an absent one and then use the same one for ever.
fn encrypt_gcm(session: &Session, kek: ObjectHandle, identity: Identity, dek: &Dek) -> Result<Vec<u8>, CallError> {
    let mut iv = [0; IV_LEN];
    getrandom::fill(&mut iv)?;
    let ours = iv;
    let sealed = session.encrypt(&gcm(&mut iv, &identity)?, kek, dek.expose())?;
    if iv != ours {
        return Err(CallError::new(Class::Refused, "the token put an IV of its own in place of ours"));
    }
    Ok([&ours, sealed.as_slice()].concat())
}

fn decrypt_gcm(
    session: &Session,
    kek: ObjectHandle,
    identity: Identity,
    wrapped: &[u8],
) -> Result<Zeroizing<Vec<u8>>, CallError> {
    let (iv, sealed) = wrapped
        .split_first_chunk::<IV_LEN>()
        .ok_or_else(|| CallError::new(Class::BadInput, "a wrapped DEK has no room for an IV"))?;
    let mut iv = *iv;
    Ok(Zeroizing::new(session.decrypt(&gcm(&mut iv, &identity)?, kek, sealed)?))
}

/// The KEK's identity is the AAD: what one KEK wrapped is never taken for another's.
fn gcm<'a>(iv: &'a mut [u8; IV_LEN], identity: &'a Identity) -> Result<Mechanism<'a>, CallError> {
    Ok(Mechanism::AesGcm(GcmParams::new(iv, identity.as_bytes(), TAG_BITS.into())?))
}
