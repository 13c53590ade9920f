//! The module in another token's dress: who makes the IV of AES-GCM, and what can be set and read of a key.

use std::collections::HashMap;
use std::ptr;
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};

use cryptoki_sys::*;

use crate::faults::{Call, Context, Output, Place, intercept};
use crate::rules::{Action, Habit};
use crate::table::forward;

const IV_LEN: usize = 12;
type Iv = [CK_BYTE; IV_LEN];
const NO_IV: Iv = [0; IV_LEN];

/// An operation of AES-GCM that was begun, and is not the real module's way.
enum Begun {
    /// The IV that the real module uses, and whether it goes before the ciphertext; otherwise it goes after the tag.
    Encrypt(Iv, bool),
    /// The IV comes with the ciphertext: so the real module was not yet told.
    Decrypt(CK_OBJECT_HANDLE, Vec<u8>),
}

static BEGUN: LazyLock<Mutex<HashMap<CK_SESSION_HANDLE, Begun>>> = LazyLock::new(Mutex::default);

fn begun() -> MutexGuard<'static, HashMap<CK_SESSION_HANDLE, Begun>> {
    BEGUN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How often this session has been here.
fn count(session: CK_SESSION_HANDLE) -> u64 {
    static COUNTS: LazyLock<Mutex<HashMap<CK_SESSION_HANDLE, u64>>> = LazyLock::new(Mutex::default);
    let mut counts = COUNTS.lock().unwrap_or_else(PoisonError::into_inner);
    let count = counts.entry(session).or_default();
    *count += 1;
    *count
}

/// The habit that a rule gives this mechanism, and the parameters.
fn dressed(context: &Context, mechanism: *const CK_MECHANISM) -> Option<(Habit, CK_GCM_PARAMS)> {
    // SAFETY: the caller's promise.
    let mechanism = unsafe { mechanism.as_ref() }?;
    let habit = context.rules.0.iter().find_map(|rule| match rule.action {
        Action::Gcm(habit, code)
            if code == mechanism.mechanism && rule.is_about("C_EncryptInit", context.token.as_deref()) =>
        {
            Some(habit)
        }
        _ => None,
    })?;
    let right_size = mechanism.ulParameterLen as usize == size_of::<CK_GCM_PARAMS>();
    // SAFETY: the caller's promise, for a mechanism of AES-GCM.
    right_size.then(|| (habit, unsafe { *mechanism.pParameter.cast::<CK_GCM_PARAMS>() }))
}

/// The real module's AES-GCM.
fn real(parameters: &mut CK_GCM_PARAMS) -> CK_MECHANISM {
    CK_MECHANISM {
        mechanism: CKM_AES_GCM,
        pParameter: ptr::from_mut(parameters).cast(),
        ulParameterLen: size_of::<CK_GCM_PARAMS>() as CK_ULONG,
    }
}

fn use_iv(parameters: &mut CK_GCM_PARAMS, iv: &mut Iv) {
    (parameters.pIv, parameters.ulIvLen, parameters.ulIvBits) = (iv.as_mut_ptr(), 12, 96);
}

pub unsafe extern "C" fn C_EncryptInit(
    session: CK_SESSION_HANDLE,
    mechanism: *mut CK_MECHANISM,
    key: CK_OBJECT_HANDLE,
) -> CK_RV {
    let call = Call { function: "C_EncryptInit", place: Place::Session(session), output: None };
    intercept(&call, |context| {
        begun().remove(&session);
        let Some((habit, mut parameters)) = dressed(context, mechanism) else {
            return forward!(C_EncryptInit(session, mechanism, key));
        };
        let no_place = parameters.pIv.is_null() && parameters.ulIvLen == 0;
        let fits = match habit {
            // SAFETY: the caller's promise: there are so many bytes.
            Habit::Written => {
                parameters.ulIvLen == 12
                    && !parameters.pIv.is_null()
                    && unsafe { *parameters.pIv.cast::<Iv>() } == NO_IV
            }
            Habit::Prepended | Habit::Constant | Habit::Counted => no_place,
            Habit::Appended => no_place && parameters.ulIvBits == 96,
        };
        if !fits {
            return CKR_MECHANISM_PARAM_INVALID;
        }
        let given = parameters.pIv;
        let mut iv = [7; IV_LEN];
        match habit {
            Habit::Constant => (),
            Habit::Counted => iv[4..].copy_from_slice(&count(session).to_be_bytes()),
            _ => drop(forward!(C_GenerateRandom(session, iv.as_mut_ptr(), 12))),
        }
        use_iv(&mut parameters, &mut iv);
        let code = forward!(C_EncryptInit(session, &mut real(&mut parameters), key));
        match habit {
            // SAFETY: as above.
            Habit::Written => unsafe { *given.cast::<Iv>() = iv },
            _ => drop(begun().insert(session, Begun::Encrypt(iv, habit != Habit::Appended))),
        }
        code
    })
}

pub unsafe extern "C" fn C_DecryptInit(
    session: CK_SESSION_HANDLE,
    mechanism: *mut CK_MECHANISM,
    key: CK_OBJECT_HANDLE,
) -> CK_RV {
    let call = Call { function: "C_DecryptInit", place: Place::Session(session), output: None };
    intercept(&call, |context| {
        begun().remove(&session);
        match dressed(context, mechanism) {
            None => forward!(C_DecryptInit(session, mechanism, key)),
            Some((Habit::Prepended | Habit::Constant | Habit::Counted, parameters)) if parameters.pIv.is_null() => {
                // SAFETY: the caller's promise: there are so many bytes.
                let aad = unsafe { std::slice::from_raw_parts(parameters.pAAD, parameters.ulAADLen as usize) };
                begun().insert(session, Begun::Decrypt(key, aad.to_vec()));
                CKR_OK
            }
            Some((Habit::Written | Habit::Appended, mut parameters)) if !parameters.pIv.is_null() => {
                forward!(C_DecryptInit(session, &mut real(&mut parameters), key))
            }
            Some(_) => CKR_MECHANISM_PARAM_INVALID,
        }
    })
}

type Data = (*mut CK_BYTE, CK_ULONG);
type Room = (*mut CK_BYTE, *mut CK_ULONG);

fn encrypt(session: CK_SESSION_HANDLE, (data, data_len): Data, (bytes, length): Room) -> CK_RV {
    let Some(Begun::Encrypt(iv, before)) = begun().remove(&session) else {
        return forward!(C_Encrypt(session, data, data_len, bytes, length));
    };
    if bytes.is_null() {
        begun().insert(session, Begun::Encrypt(iv, before));
        let code = forward!(C_Encrypt(session, data, data_len, bytes, length));
        // SAFETY: the real module has just written there.
        unsafe { *length += IV_LEN as CK_ULONG };
        return code;
    }
    let mut sealed = vec![0; data_len as usize + 16];
    let mut sealed_len = sealed.len() as CK_ULONG;
    let code = forward!(C_Encrypt(session, data, data_len, sealed.as_mut_ptr(), &mut sealed_len));
    let whole = if before { [&iv, &sealed[..]].concat() } else { [&sealed[..], &iv].concat() };
    if code == CKR_OK { give(&whole, (bytes, length)) } else { code }
}

fn decrypt(session: CK_SESSION_HANDLE, (data, data_len): Data, (bytes, length): Room) -> CK_RV {
    let Some(Begun::Decrypt(key, mut aad)) = begun().remove(&session) else {
        return forward!(C_Decrypt(session, data, data_len, bytes, length));
    };
    if (data_len as usize) < IV_LEN {
        return CKR_ENCRYPTED_DATA_LEN_RANGE;
    }
    if bytes.is_null() {
        begun().insert(session, Begun::Decrypt(key, aad));
        // SAFETY: the caller's promise.
        unsafe { *length = data_len };
        return CKR_OK;
    }
    // SAFETY: the caller's promise: there are so many bytes.
    let (mut iv, sealed) = unsafe { (*data.cast::<Iv>(), data.add(IV_LEN)) };
    let mut parameters =
        CK_GCM_PARAMS { pAAD: aad.as_mut_ptr(), ulAADLen: aad.len() as CK_ULONG, ulTagBits: 128, ..Default::default() };
    use_iv(&mut parameters, &mut iv);
    match forward!(C_DecryptInit(session, &mut real(&mut parameters), key)) {
        CKR_OK => forward!(C_Decrypt(session, sealed, data_len - IV_LEN as CK_ULONG, bytes, length)),
        code => code,
    }
}

/// Writes an output to where the caller wants it.
pub fn give(output: &[u8], (bytes, length): Room) -> CK_RV {
    // SAFETY: the caller's promise: there is room for so many bytes.
    unsafe {
        let room = *length as usize;
        *length = output.len() as CK_ULONG;
        if room < output.len() {
            return CKR_BUFFER_TOO_SMALL;
        }
        ptr::copy_nonoverlapping(output.as_ptr(), bytes, output.len());
    }
    CKR_OK
}

macro_rules! with_output {
    ($name:ident by $done:ident) => {
        pub unsafe extern "C" fn $name(
            session: CK_SESSION_HANDLE,
            data: *mut CK_BYTE,
            data_len: CK_ULONG,
            bytes: *mut CK_BYTE,
            length: *mut CK_ULONG,
        ) -> CK_RV {
            let elsewhere = |bytes, length| $done(session, (data, data_len), (bytes, length));
            let output = Output { bytes, length, elsewhere: &elsewhere };
            let call = Call { function: stringify!($name), place: Place::Session(session), output: Some(output) };
            intercept(&call, |_| $done(session, (data, data_len), (bytes, length)))
        }
    };
}

with_output!(C_Encrypt by encrypt);
with_output!(C_Decrypt by decrypt);

/// The attributes of a template, which can be written to.
fn attributes<'a>(template: *mut CK_ATTRIBUTE, count: CK_ULONG) -> &'a mut [CK_ATTRIBUTE] {
    // SAFETY: the caller's promise: there are so many, and nobody else has them now.
    unsafe { std::slice::from_raw_parts_mut(template, count as usize) }
}

/// What the rules say of keys, instead of what was asked for or is so.
fn said(context: &Context) -> Vec<(CK_ATTRIBUTE_TYPE, CK_BBOOL)> {
    let said = context.about().filter_map(|rule| match rule.action {
        Action::Say(attribute, value) => rule.fires().map(|_| (attribute, if value { CK_TRUE } else { CK_FALSE })),
        _ => None,
    });
    said.collect()
}

pub unsafe extern "C" fn C_GenerateKey(
    session: CK_SESSION_HANDLE,
    mechanism: *mut CK_MECHANISM,
    template: *mut CK_ATTRIBUTE,
    count: CK_ULONG,
    key: *mut CK_OBJECT_HANDLE,
) -> CK_RV {
    let call = Call { function: "C_GenerateKey", place: Place::Session(session), output: None };
    intercept(&call, |context| {
        let mut wanted = attributes(template, count).to_vec();
        for rule in context.about() {
            match rule.action {
                Action::Forbid(kind) if wanted.iter().any(|attribute| attribute.type_ == kind) => {
                    return CKR_ATTRIBUTE_VALUE_INVALID;
                }
                Action::Drop(kind) => wanted.retain(|attribute| attribute.type_ != kind),
                _ => (),
            }
        }
        let mut said = said(context);
        say(&mut wanted, &mut said);
        forward!(C_GenerateKey(session, mechanism, wanted.as_mut_ptr(), wanted.len() as CK_ULONG, key))
    })
}

/// Puts into a template what the rules say.
fn say(template: &mut Vec<CK_ATTRIBUTE>, said: &mut [(CK_ATTRIBUTE_TYPE, CK_BBOOL)]) {
    template.retain(|attribute| said.iter().all(|(of, _)| *of != attribute.type_));
    template.extend(said.iter_mut().map(|(of, value)| CK_ATTRIBUTE {
        type_: *of,
        pValue: (&raw mut *value).cast(),
        ulValueLen: size_of::<CK_BBOOL>() as CK_ULONG,
    }));
}

pub unsafe extern "C" fn C_GenerateKeyPair(
    session: CK_SESSION_HANDLE,
    mechanism: *mut CK_MECHANISM,
    public: *mut CK_ATTRIBUTE,
    public_count: CK_ULONG,
    private: *mut CK_ATTRIBUTE,
    count: CK_ULONG,
    public_key: *mut CK_OBJECT_HANDLE,
    key: *mut CK_OBJECT_HANDLE,
) -> CK_RV {
    let call = Call { function: "C_GenerateKeyPair", place: Place::Session(session), output: None };
    intercept(&call, |context| {
        let mut wanted = attributes(private, count).to_vec();
        let mut said = said(context);
        say(&mut wanted, &mut said);
        let (private, count) = (wanted.as_mut_ptr(), wanted.len() as CK_ULONG);
        forward!(C_GenerateKeyPair(session, mechanism, public, public_count, private, count, public_key, key))
    })
}

pub unsafe extern "C" fn C_GetAttributeValue(
    session: CK_SESSION_HANDLE,
    object: CK_OBJECT_HANDLE,
    template: *mut CK_ATTRIBUTE,
    count: CK_ULONG,
) -> CK_RV {
    let call = Call { function: "C_GetAttributeValue", place: Place::Session(session), output: None };
    intercept(&call, |context| {
        let mut code = forward!(C_GetAttributeValue(session, object, template, count));
        for rule in context.about() {
            let Action::Hide(hidden) = rule.action else { continue };
            for attribute in attributes(template, count).iter_mut().filter(|attribute| attribute.type_ == hidden) {
                attribute.ulValueLen = CK_UNAVAILABLE_INFORMATION;
                code = CKR_ATTRIBUTE_TYPE_INVALID;
            }
        }
        for (of, value) in said(context) {
            let answered = attributes(template, count).iter_mut();
            let has_room = |it: &&mut CK_ATTRIBUTE| {
                it.type_ == of && !it.pValue.is_null() && it.ulValueLen == size_of::<CK_BBOOL>() as CK_ULONG
            };
            for attribute in answered.filter(has_room) {
                // SAFETY: there is room for one, says the real module.
                unsafe { *attribute.pValue.cast() = value };
            }
        }
        code
    })
}
