//! The C calls by which a KEK wraps and unwraps a DEK, a function for each way ([`Mode`]). The mechanism's code and its
//! habits come from the profile.
//!
//! The DEK's bytes go through memory of the cryptoki crate and of the module, which nothing here can wipe; ours is.

use cryptoki::mechanism::Mechanism;
use cryptoki::object::{Attribute, AttributeType, KeyType, ObjectClass, ObjectHandle};
use cryptoki::session::Session;
use zeroize::Zeroizing;

use super::admission::KekSpec;
use super::error::{CallError, Class};
use super::oaep;
use super::raw::{self, GcmParams, IV_LEN, IvPlace};
use crate::config::{GcmIv, Mode, Profile};
use crate::envelope::WrapAlgorithm;
use crate::identity::Identity;
use crate::secret::Dek;

/// The initial values of RFC 3394 and RFC 5649, for tokens that want to be given them.
const KW_IV: [u8; 8] = [0xa6; 8];
const KWP_IV: [u8; 4] = [0xa6, 0x59, 0x59, 0xa6];

/// The objects that a KEK consists of.
#[derive(Clone, Copy)]
pub(super) struct Handles {
    /// The key that wraps, or at least unwraps.
    pub(super) key: ObjectHandle,
    /// In the mode `oaep` the private key that signs; otherwise the same.
    pub(super) signing: ObjectHandle,
}

/// Wraps `dek` under the KEK.
pub(super) fn wrap(
    profile: &Profile,
    kek: &KekSpec,
    session: &Session,
    handles: Handles,
    dek: &Dek,
) -> Result<Vec<u8>, CallError> {
    let (mode, Handles { key, signing }) = (kek.mode, handles);
    let wrapped = match mode {
        Mode::Wrapkey | Mode::WrapkeyKwp => wrap_object(&key_wrap(profile, mode), session, key, dek)?,
        Mode::Encrypt | Mode::EncryptKwp => session.encrypt(&key_wrap(profile, mode), key, dek.expose())?,
        Mode::Gcm => encrypt_gcm(profile, session, key, kek.identity, dek)?,
        Mode::Oaep => oaep::wrap(session, signing, kek.pair()?, dek)?,
    };
    let expected = kek.algorithm().wrapped_len();
    if wrapped.len() != expected {
        let what = format!(
            "the token wrapped a DEK into {} bytes where {expected} were due: its profile's mechanism, or its gcm-iv, is \
             not what the token does",
            wrapped.len()
        );
        return Err(CallError::new(Class::Refused, what));
    }
    Ok(wrapped)
}

/// Unwraps what [`wrap`] made.
pub(super) fn unwrap(
    profile: &Profile,
    kek: &KekSpec,
    session: &Session,
    handles: Handles,
    wrapped: &[u8],
) -> Result<Dek, CallError> {
    let (mode, Handles { key, .. }) = (kek.mode, handles);
    let bytes = match mode {
        Mode::Wrapkey | Mode::WrapkeyKwp => unwrap_object(&key_wrap(profile, mode), session, key, wrapped)?,
        Mode::Encrypt | Mode::EncryptKwp => Zeroizing::new(session.decrypt(&key_wrap(profile, mode), key, wrapped)?),
        Mode::Gcm => decrypt_gcm(profile, session, key, kek.identity, wrapped)?,
        Mode::Oaep => oaep::unwrap(session, key, kek.pair()?, wrapped)?,
    };
    // Whoever made the input had the KEK, or the token lies now: only the reference tells.
    let length = || CallError::new(Class::Doubtful, format!("an unwrapped DEK has {} bytes", bytes.len()));
    Dek::from_bytes(&bytes).ok_or_else(length)
}

/// Whether what was wrapped unwraps to this DEK.
pub(super) fn opens(
    profile: &Profile,
    kek: &KekSpec,
    session: &Session,
    handles: Handles,
    wrapped: &[u8],
    dek: &Dek,
) -> Result<bool, CallError> {
    Ok(unwrap(profile, kek, session, handles, wrapped)?.expose() == dek.expose())
}

/// AES-KW or AES-KWP.
pub(super) fn key_wrap(profile: &Profile, mode: Mode) -> Mechanism<'static> {
    let code = profile.mechanism(mode);
    match mode.algorithm() {
        WrapAlgorithm::AesKwp => raw::mechanism(code, profile.explicit_iv.then_some(&KWP_IV)),
        _ => raw::mechanism(code, profile.explicit_iv.then_some(&KW_IV)),
    }
}

/// C_WrapKey (PKCS#11 v3.1 section 5.18.3): the DEK becomes a session object that may leave the token, and does so under the KEK.
fn wrap_object(mechanism: &Mechanism, session: &Session, kek: ObjectHandle, dek: &Dek) -> Result<Vec<u8>, CallError> {
    let mut template = session_object();
    template.push(Attribute::Value(dek.expose().to_vec()));
    let created = session.create_object(&template);
    wipe(&mut template);
    let object = created?;
    let wrapped = session.wrap_key(mechanism, kek, object);
    let destroyed = session.destroy_object(object);
    let wrapped = wrapped?;
    destroyed?;
    Ok(wrapped)
}

/// C_UnwrapKey (PKCS#11 v3.1 section 5.18.4), and the value read back.
fn unwrap_object(
    mechanism: &Mechanism,
    session: &Session,
    kek: ObjectHandle,
    wrapped: &[u8],
) -> Result<Zeroizing<Vec<u8>>, CallError> {
    let object = session.unwrap_key(mechanism, kek, wrapped, &session_object())?;
    let read = session.get_attributes(object, &[AttributeType::Value]);
    let destroyed = session.destroy_object(object);
    let value = read?.into_iter().find_map(|attribute| match attribute {
        Attribute::Value(value) => Some(Zeroizing::new(value)),
        _ => None,
    });
    destroyed?;
    value.ok_or_else(|| CallError::new(Class::Refused, "the token does not show the CKA_VALUE of a session object"))
}

/// A template for a DEK, or for what is to be read: it lives in the session, and its value can be read. CKA_VALUE_LEN is not said: SoftHSM
/// answers CKR_ATTRIBUTE_READ_ONLY to it in C_UnwrapKey.
pub(super) fn session_object() -> Vec<Attribute> {
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

/// IV ‖ ciphertext ‖ tag. The KEK's identity is the AAD: what one KEK wrapped is never taken for another's.
///
/// Where the token makes the IV, none is given. Some tokens take that and then use the same one for ever, so a lane
/// compares several before it uses a KEK.
fn encrypt_gcm(
    profile: &Profile,
    session: &Session,
    kek: ObjectHandle,
    identity: Identity,
    dek: &Dek,
) -> Result<Vec<u8>, CallError> {
    const NONE: [u8; IV_LEN] = [0; IV_LEN];
    let refused = |what| Err(CallError::new(Class::Refused, what));
    let mut iv = NONE;
    if profile.gcm_iv == GcmIv::Ours {
        getrandom::fill(&mut iv)?;
    }
    let given = iv;
    let place = match profile.gcm_iv {
        GcmIv::Ours | GcmIv::Written => IvPlace::Buffer(&mut iv),
        GcmIv::Prepended => IvPlace::Null,
        GcmIv::Appended => IvPlace::NullSized,
    };
    let made = {
        let parameters = GcmParams::new(place, identity.as_bytes());
        session.encrypt(&parameters.mechanism(profile.mechanism(Mode::Gcm)), kek, dek.expose())?
    };
    if profile.gcm_iv == GcmIv::Ours && iv != given {
        return refused("the token put an IV of its own in place of ours");
    }
    let wrapped = match profile.gcm_iv {
        GcmIv::Ours | GcmIv::Written => [&iv, made.as_slice()].concat(),
        GcmIv::Prepended => made,
        GcmIv::Appended => made.split_last_chunk::<IV_LEN>().map_or(vec![], |(sealed, iv)| [iv, sealed].concat()),
    };
    if wrapped.starts_with(&NONE) {
        return refused("the token made no IV, as its profile's gcm-iv says that it does");
    }
    Ok(wrapped)
}

fn decrypt_gcm(
    profile: &Profile,
    session: &Session,
    kek: ObjectHandle,
    identity: Identity,
    wrapped: &[u8],
) -> Result<Zeroizing<Vec<u8>>, CallError> {
    let (iv, after_iv) = wrapped
        .split_first_chunk::<IV_LEN>()
        .ok_or_else(|| CallError::new(Class::BadInput, "a wrapped DEK has no room for an IV"))?;
    let mut iv = *iv;
    let (place, sealed) = match profile.gcm_iv {
        GcmIv::Prepended => (IvPlace::Null, wrapped),
        GcmIv::Ours | GcmIv::Written | GcmIv::Appended => (IvPlace::Buffer(&mut iv), after_iv),
    };
    let parameters = GcmParams::new(place, identity.as_bytes());
    let mechanism = parameters.mechanism(profile.mechanism(Mode::Gcm));
    Ok(Zeroizing::new(session.decrypt(&mechanism, kek, sealed)?))
}

/// The IV of a DEK that was wrapped in gcm mode.
pub(super) fn iv_of(wrapped: &[u8]) -> Option<[u8; IV_LEN]> {
    wrapped.first_chunk().copied()
}
