//! CK_TOKEN_INFO, read without the cryptoki crate: that refuses all of it if the token's clock shows no time that it can
//! read, and openCryptoki's shows `12:34:21`. Nothing here wants the time.

use std::path::Path;
use std::ptr;

use cryptoki::context::Function;
use cryptoki::error::{Error, Rv};
use cryptoki::slot::{Slot, TokenInfo};
use cryptoki_sys::{CK_TOKEN_INFO, CKF_CLOCK_ON_TOKEN};

/// A library that cryptoki has loaded, once more: it is the same one, and only counted.
pub(in super::super) struct TokenInfos(cryptoki_sys::Pkcs11);

impl TokenInfos {
    pub(in super::super) fn load(path: &Path) -> Result<Self, Error> {
        // SAFETY: what the file's initializers do, they have done when cryptoki loaded it.
        Ok(Self(unsafe { cryptoki_sys::Pkcs11::new(path) }?))
    }

    /// What the token in the slot says of itself, its clock aside.
    ///
    /// # Errors
    /// What the module answered.
    pub(in super::super) fn of(&self, slot: Slot) -> Result<TokenInfo, Error> {
        let mut functions = ptr::null_mut();
        // SAFETY: the library is loaded; it writes the pointer, which is ours.
        let answer = unsafe { self.0.C_GetFunctionList(&mut functions) };
        Rv::from(answer).into_result(Function::GetFunctionList)?;
        // SAFETY: the standard says that the list stays where it is as long as the library is loaded.
        let functions = unsafe { functions.as_ref() }.ok_or(Error::NullFunctionPointer)?;
        let get = functions.C_GetTokenInfo.ok_or(Error::NullFunctionPointer)?;
        let mut info = CK_TOKEN_INFO::default();
        // SAFETY: the module writes the structure, which is ours, before the call returns.
        let answer = unsafe { get(slot.into(), &mut info) };
        Rv::from(answer).into_result(Function::GetTokenInfo)?;
        info.flags &= !CKF_CLOCK_ON_TOKEN;
        TokenInfo::try_from(info)
    }
}
