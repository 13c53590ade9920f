//! What the cryptoki crate cannot name: mechanisms below 0x80000000 that it does not know, AES-GCM without an IV, and
//! parameters of AES-KW; and what it cannot read ([`token_info`]). The only room with unsafe code, and with pointers that
//! we make.
#![allow(unsafe_code)]

pub(super) mod token_info;

use std::cell::UnsafeCell;
use std::ffi::c_ulong;
use std::marker::PhantomData;
use std::ptr;

use cryptoki::error::Error;
use cryptoki::mechanism::vendor_defined::VendorDefinedMechanism;
use cryptoki::mechanism::{Mechanism, MechanismType};
use cryptoki::object::{Attribute, AttributeType, ObjectHandle};
use cryptoki::session::Session;
use cryptoki_sys::{CK_GCM_PARAMS, CK_MECHANISM_TYPE};

use super::error::CallError;

/// Bytes in the IV of AES-GCM.
pub(super) const IV_LEN: usize = 12;
const IV_BITS: c_ulong = 96;
const TAG_BITS: c_ulong = 128;

/// Stands in CKA_ALLOWED_MECHANISMS for a list that has a mechanism which cryptoki does not know.
pub(super) const UNNAMED: MechanismType = mechanism_type(c_ulong::MAX);

/// CKM_AES_KEY_WRAP_KWP, which cryptoki does not know.
pub(super) const AES_KWP: MechanismType = mechanism_type(0x210b);

/// A mechanism by its code, whatever it is.
pub(super) const fn mechanism_type(code: c_ulong) -> MechanismType {
    // SAFETY: MechanismType is `#[repr(transparent)]` over a CK_MECHANISM_TYPE of any value (cryptoki 0.12 makes one of
    // each vendor's code, and says that vectors of both have one layout). Were that to change, transmute would not
    // compile, or the test below would fail.
    unsafe { std::mem::transmute::<CK_MECHANISM_TYPE, MechanismType>(code) }
}

/// Whether cryptoki does not know the code: then it cannot read it in CKA_ALLOWED_MECHANISMS.
pub(super) fn is_unnamed(code: c_ulong) -> bool {
    MechanismType::try_from(code).is_err()
}

/// A mechanism with a parameter of fixed bytes, or without one.
pub(super) fn mechanism<const N: usize>(code: c_ulong, parameter: Option<&'static [u8; N]>) -> Mechanism<'static> {
    Mechanism::VendorDefined(VendorDefinedMechanism::new(mechanism_type(code), parameter))
}

/// CKA_ALLOWED_MECHANISMS of an object, if it has that.
pub(super) fn allowed_mechanisms(session: &Session, object: ObjectHandle) -> Result<Option<Attribute>, CallError> {
    match session.get_attributes(object, &[AttributeType::AllowedMechanisms]) {
        // The token has answered, and cryptoki does not know a code in the answer.
        Err(Error::NotSupported) => Ok(Some(Attribute::AllowedMechanisms(vec![UNNAMED]))),
        answer => Ok(answer?.pop()),
    }
}

/// Parameters of AES-GCM, which hold what they point to.
pub(super) struct GcmParams<'a> {
    /// It is handed over by a shared reference, and a module may write to it.
    inner: UnsafeCell<CK_GCM_PARAMS>,
    _buffers: PhantomData<(&'a mut [u8], &'a [u8])>,
}

/// What stands in the place of the IV.
pub(super) enum IvPlace<'a> {
    /// An IV, or zeros for one that the token will write there.
    Buffer(&'a mut [u8; IV_LEN]),
    /// NULL, and a length of 0 bits.
    Null,
    /// NULL, and how many bits the token's own IV is to have.
    NullSized,
}

impl<'a> GcmParams<'a> {
    pub(super) fn new(iv: IvPlace<'a>, aad: &'a [u8]) -> Self {
        let (iv, iv_len, iv_bits) = match iv {
            IvPlace::Buffer(iv) => (iv.as_mut_ptr(), IV_LEN, IV_BITS),
            IvPlace::Null => (ptr::null_mut(), 0, 0),
            IvPlace::NullSized => (ptr::null_mut(), 0, IV_BITS),
        };
        let inner = CK_GCM_PARAMS {
            pIv: iv,
            ulIvLen: iv_len as c_ulong,
            ulIvBits: iv_bits,
            pAAD: aad.as_ptr().cast_mut(), // no module writes there
            ulAADLen: aad.len() as c_ulong,
            ulTagBits: TAG_BITS,
        };
        Self { inner: UnsafeCell::new(inner), _buffers: PhantomData }
    }

    pub(super) fn mechanism(&self, code: c_ulong) -> Mechanism<'_> {
        Mechanism::VendorDefined(VendorDefinedMechanism::new(mechanism_type(code), Some(&self.inner)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_comes_through() {
        for code in [0, 0x2109, 0x210b, 0x8000_0170, c_ulong::MAX] {
            assert_eq!(CK_MECHANISM_TYPE::from(mechanism_type(code)), code);
        }
        assert_eq!(mechanism_type(0x1087), MechanismType::AES_GCM);
        assert_eq!(mechanism::<0>(0x210b, None).mechanism_type(), mechanism_type(0x210b));
    }

    #[test]
    fn a_code_is_unnamed_as_long_as_cryptoki_does_not_know_it() {
        assert_eq!([0x2109, 0x1087, 0x210b, 0x8000_1087].map(is_unnamed), [false, false, true, true]);
    }
}
