//! The functions that need more than forwarding.

use std::os::raw::c_void;
use std::sync::Arc;

use cryptoki_sys::*;

use crate::faults::{Call, Context, Place, intercept};
use crate::rules::Action;
use crate::table::forward;
use crate::{pins, real, sessions, table};

/// The only symbol of a PKCS#11 2.40 module that anybody looks up.
///
/// # Safety
/// `list` is null or can be written to.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn C_GetFunctionList(list: *mut *mut CK_FUNCTION_LIST) -> CK_RV {
    if list.is_null() {
        return CKR_ARGUMENTS_BAD;
    }
    if let Err(error) = real::load() {
        eprintln!("{error}");
        return CKR_GENERAL_ERROR;
    }
    // SAFETY: the caller's promise. Nobody writes to a function list.
    unsafe { *list = (&raw const table::LIST).cast_mut() };
    CKR_OK
}

pub unsafe extern "C" fn C_Finalize(reserved: *mut c_void) -> CK_RV {
    let call = Call { function: "C_Finalize", place: Place::Module, output: None };
    intercept(&call, |_| {
        let code = forward!(C_Finalize(reserved));
        if code == CKR_OK {
            sessions::forget_all(None);
        }
        code
    })
}

pub unsafe extern "C" fn C_GetSlotList(present: CK_BBOOL, slots: *mut CK_SLOT_ID, count: *mut CK_ULONG) -> CK_RV {
    let call = Call { function: "C_GetSlotList", place: Place::Module, output: None };
    intercept(&call, |context| {
        let empty = context.about().any(|rule| rule.action == Action::Empty && rule.fires().is_some());
        if empty && !count.is_null() {
            // SAFETY: the caller's promise.
            unsafe { *count = 0 };
            return CKR_OK;
        }
        forward!(C_GetSlotList(present, slots, count))
    })
}

pub unsafe extern "C" fn C_OpenSession(
    slot: CK_SLOT_ID,
    flags: CK_FLAGS,
    application: *mut c_void,
    notify: CK_NOTIFY,
    session: *mut CK_SESSION_HANDLE,
) -> CK_RV {
    let call = Call { function: "C_OpenSession", place: Place::Slot(slot), output: None };
    intercept(&call, |context| {
        let code = forward!(C_OpenSession(slot, flags, application, notify, session));
        if code != CKR_OK {
            return code;
        }
        let limits = context.about().filter_map(|rule| match rule.action {
            Action::Limit(limit) => Some((limit, rule.token.as_deref())),
            _ => None,
        });
        // SAFETY: the real module has just written there.
        let opened = unsafe { *session };
        // Rules may come while the session is open: its token is always asked for.
        if sessions::remember(opened, slot, real::label(slot).map(Arc::from), limits) {
            return CKR_OK;
        }
        forward!(C_CloseSession(opened));
        CKR_SESSION_COUNT
    })
}

pub unsafe extern "C" fn C_CloseSession(session: CK_SESSION_HANDLE) -> CK_RV {
    let call = Call { function: "C_CloseSession", place: Place::Session(session), output: None };
    intercept(&call, |_| {
        let code = forward!(C_CloseSession(session));
        if code == CKR_OK {
            sessions::forget(session);
        }
        code
    })
}

pub unsafe extern "C" fn C_CloseAllSessions(slot: CK_SLOT_ID) -> CK_RV {
    let call = Call { function: "C_CloseAllSessions", place: Place::Slot(slot), output: None };
    intercept(&call, |_| {
        let code = forward!(C_CloseAllSessions(slot));
        if code == CKR_OK {
            sessions::forget_all(Some(slot));
        }
        code
    })
}

/// The token of a call, and the number of wrong PINs after which it is locked, if a rule says so.
fn locks(context: &Context) -> Option<(Arc<str>, u64)> {
    let token = context.token.clone()?;
    context.rules.0.iter().find_map(|rule| match rule.action {
        Action::LockAfter(most) if rule.is_about("C_Login", Some(&token)) => Some((Arc::clone(&token), most)),
        _ => None,
    })
}

pub unsafe extern "C" fn C_Login(
    session: CK_SESSION_HANDLE,
    user: CK_USER_TYPE,
    pin: *mut CK_UTF8CHAR,
    length: CK_ULONG,
) -> CK_RV {
    let call = Call { function: "C_Login", place: Place::Session(session), output: None };
    intercept(&call, |context| {
        let locks = locks(context).filter(|_| user == CKU_USER);
        if let Some((token, most)) = &locks
            && pins::count(token) >= *most
        {
            return CKR_PIN_LOCKED;
        }
        let code = forward!(C_Login(session, user, pin, length));
        if let Some((token, _)) = &locks {
            pins::change(token, |count| match code {
                CKR_PIN_INCORRECT => count + 1,
                CKR_OK => 0,
                _ => count,
            });
        }
        code
    })
}

/// The security officer's new PIN for the user unlocks the token.
pub unsafe extern "C" fn C_InitPIN(session: CK_SESSION_HANDLE, pin: *mut CK_UTF8CHAR, length: CK_ULONG) -> CK_RV {
    let call = Call { function: "C_InitPIN", place: Place::Session(session), output: None };
    intercept(&call, |context| {
        let code = forward!(C_InitPIN(session, pin, length));
        if let Some((token, _)) = locks(context)
            && code == CKR_OK
        {
            pins::change(&token, |_| 0);
        }
        code
    })
}

pub unsafe extern "C" fn C_GetTokenInfo(slot: CK_SLOT_ID, info: *mut CK_TOKEN_INFO) -> CK_RV {
    let call = Call { function: "C_GetTokenInfo", place: Place::Slot(slot), output: None };
    intercept(&call, |context| {
        let code = forward!(C_GetTokenInfo(slot, info));
        if let Some((token, most)) = locks(context)
            && code == CKR_OK
        {
            let count = pins::count(&token);
            // SAFETY: the real module has just written there.
            let flags = unsafe { &mut (*info).flags };
            for (flag, is_set) in [
                (CKF_USER_PIN_COUNT_LOW, count > 0),
                (CKF_USER_PIN_FINAL_TRY, count + 1 == most),
                (CKF_USER_PIN_LOCKED, count >= most),
            ] {
                *flags = if is_set { *flags | flag } else { *flags & !flag };
            }
        }
        let said = context.about().filter_map(|rule| match rule.action {
            Action::Flag(flag, is_set) if code == CKR_OK => rule.fires().map(|_| (flag, is_set)),
            _ => None,
        });
        for (flag, is_set) in said {
            // SAFETY: the real module has just written there.
            let flags = unsafe { &mut (*info).flags };
            *flags = if is_set { *flags | flag } else { *flags & !flag };
        }
        code
    })
}
