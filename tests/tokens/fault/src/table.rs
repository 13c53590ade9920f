//! The function list: which functions there are, and the forwarding of those that need nothing else.

use std::os::raw::c_void;

use cryptoki_sys::*;

use crate::dress::*;
use crate::faults::{Call, Output, Place, intercept};
use crate::special::*;

type Bytes = *mut CK_BYTE;
type Count = CK_ULONG;
type Counted = *mut CK_ULONG;
type Mechanism = *mut CK_MECHANISM;
type Object = CK_OBJECT_HANDLE;
type Template = *mut CK_ATTRIBUTE;

/// Calls a function of the real module.
macro_rules! forward {
    ($name:ident($($argument:expr),*)) => {
        // SAFETY: the arguments are the caller's own, for the very same function.
        match $crate::real::list().$name {
            Some(function) => unsafe { function($($argument),*) },
            None => CKR_FUNCTION_NOT_SUPPORTED,
        }
    };
}
pub(crate) use forward;

/// A function that is forwarded with its arguments.
macro_rules! forwarded {
    ($name:ident($($argument:ident: $type:ty),*) on $place:expr) => {
        unsafe extern "C" fn $name($($argument: $type),*) -> CK_RV {
            let call = Call { function: stringify!($name), place: $place, output: None };
            intercept(&call, |_| forward!($name($($argument),*)))
        }
    };
}

forwarded!(C_Initialize(arguments: *mut c_void) on Place::Module);
forwarded!(C_GetInfo(info: *mut CK_INFO) on Place::Module);
forwarded!(C_WaitForSlotEvent(flags: CK_FLAGS, slot: *mut CK_SLOT_ID, reserved: *mut c_void) on Place::Module);

/// The same, with a slot as the first argument.
macro_rules! of_slots {
    ($($name:ident($($argument:ident: $type:ty),*);)*) => {
        $(forwarded!($name(slot: CK_SLOT_ID $(, $argument: $type)*) on Place::Slot(slot));)*
    };
}

of_slots! {
    C_GetSlotInfo(info: *mut CK_SLOT_INFO);
    C_GetMechanismList(list: *mut CK_MECHANISM_TYPE, count: Counted);
    C_GetMechanismInfo(mechanism: CK_MECHANISM_TYPE, info: *mut CK_MECHANISM_INFO);
    C_InitToken(pin: Bytes, length: Count, label: Bytes);
}

/// The same, with a session as the first argument.
macro_rules! of_sessions {
    ($($name:ident($($argument:ident: $type:ty),*);)*) => {
        $(forwarded!($name(session: CK_SESSION_HANDLE $(, $argument: $type)*) on Place::Session(session));)*
    };
}

of_sessions! {
    C_SetPIN(old: Bytes, old_length: Count, new: Bytes, new_length: Count);
    C_GetSessionInfo(info: *mut CK_SESSION_INFO);
    C_GetOperationState(state: Bytes, length: Counted);
    C_SetOperationState(state: Bytes, length: Count, key: Object, other: Object);
    C_Logout();
    C_CreateObject(template: Template, count: Count, object: *mut Object);
    C_CopyObject(from: Object, template: Template, count: Count, to: *mut Object);
    C_DestroyObject(object: Object);
    C_GetObjectSize(object: Object, size: Counted);
    C_SetAttributeValue(object: Object, template: Template, count: Count);
    C_FindObjectsInit(template: Template, count: Count);
    C_FindObjects(objects: *mut Object, most: Count, count: Counted);
    C_FindObjectsFinal();
    C_DigestInit(mechanism: Mechanism);
    C_DigestUpdate(data: Bytes, length: Count);
    C_DigestKey(key: Object);
    C_SignInit(mechanism: Mechanism, key: Object);
    C_SignUpdate(data: Bytes, length: Count);
    C_SignRecoverInit(mechanism: Mechanism, key: Object);
    C_VerifyInit(mechanism: Mechanism, key: Object);
    C_Verify(data: Bytes, length: Count, signature: Bytes, its_length: Count);
    C_VerifyUpdate(data: Bytes, length: Count);
    C_VerifyFinal(signature: Bytes, length: Count);
    C_VerifyRecoverInit(mechanism: Mechanism, key: Object);
    C_UnwrapKey(mechanism: Mechanism, by: Object, wrapped: Bytes, length: Count, template: Template,
        count: Count, key: *mut Object);
    C_DeriveKey(mechanism: Mechanism, from: Object, template: Template, count: Count, key: *mut Object);
    C_SeedRandom(seed: Bytes, length: Count);
    C_GenerateRandom(out: Bytes, length: Count);
    C_GetFunctionStatus();
    C_CancelFunction();
}

/// The same, with an output and its length as the last arguments: a rule can flip a bit there.
macro_rules! with_output {
    ($($name:ident($($argument:ident: $type:ty),*);)*) => {
        $(
            unsafe extern "C" fn $name(
                session: CK_SESSION_HANDLE $(, $argument: $type)*, bytes: Bytes, length_of_bytes: Counted
            ) -> CK_RV {
                let elsewhere =
                    |bytes: Bytes, length: Counted| forward!($name(session $(, $argument)*, bytes, length));
                let output = Output { bytes, length: length_of_bytes, elsewhere: &elsewhere };
                let call = Call { function: stringify!($name), place: Place::Session(session), output: Some(output) };
                intercept(&call, |_| forward!($name(session $(, $argument)*, bytes, length_of_bytes)))
            }
        )*
        pub const WITH_OUTPUT: &[&str] = &["C_Encrypt", "C_Decrypt", $(stringify!($name)),*];
    };
}

with_output! {
    C_EncryptUpdate(data: Bytes, length: Count);
    C_EncryptFinal();
    C_DecryptUpdate(data: Bytes, length: Count);
    C_DecryptFinal();
    C_Digest(data: Bytes, length: Count);
    C_DigestFinal();
    C_Sign(data: Bytes, length: Count);
    C_SignFinal();
    C_SignRecover(data: Bytes, length: Count);
    C_VerifyRecover(data: Bytes, length: Count);
    C_DigestEncryptUpdate(data: Bytes, length: Count);
    C_DecryptDigestUpdate(data: Bytes, length: Count);
    C_SignEncryptUpdate(data: Bytes, length: Count);
    C_DecryptVerifyUpdate(data: Bytes, length: Count);
    C_WrapKey(mechanism: Mechanism, by: Object, key: Object);
}

macro_rules! list {
    ($($name:ident)*) => {
        pub const NAMES: [&str; 68] = [$(stringify!($name)),*];
        pub static LIST: CK_FUNCTION_LIST =
            CK_FUNCTION_LIST { version: CK_VERSION { major: 2, minor: 40 }, $($name: Some($name)),* };
    };
}

list! {
    C_Initialize C_Finalize C_GetInfo C_GetFunctionList C_GetSlotList C_GetSlotInfo C_GetTokenInfo
    C_GetMechanismList C_GetMechanismInfo C_InitToken C_InitPIN C_SetPIN C_OpenSession C_CloseSession
    C_CloseAllSessions C_GetSessionInfo C_GetOperationState C_SetOperationState C_Login C_Logout C_CreateObject
    C_CopyObject C_DestroyObject C_GetObjectSize C_GetAttributeValue C_SetAttributeValue C_FindObjectsInit
    C_FindObjects C_FindObjectsFinal C_EncryptInit C_Encrypt C_EncryptUpdate C_EncryptFinal C_DecryptInit C_Decrypt
    C_DecryptUpdate C_DecryptFinal C_DigestInit C_Digest C_DigestUpdate C_DigestKey C_DigestFinal C_SignInit C_Sign
    C_SignUpdate C_SignFinal C_SignRecoverInit C_SignRecover C_VerifyInit C_Verify C_VerifyUpdate C_VerifyFinal
    C_VerifyRecoverInit C_VerifyRecover C_DigestEncryptUpdate C_DecryptDigestUpdate C_SignEncryptUpdate
    C_DecryptVerifyUpdate C_GenerateKey C_GenerateKeyPair C_WrapKey C_UnwrapKey C_DeriveKey C_SeedRandom
    C_GenerateRandom C_GetFunctionStatus C_CancelFunction C_WaitForSlotEvent
}
