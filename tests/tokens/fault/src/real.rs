//! The real module.

use std::ffi::OsString;
use std::ptr;
use std::sync::OnceLock;

use cryptoki_sys::*;

use crate::table::forward;

struct Real(*const CK_FUNCTION_LIST);
// SAFETY: a function list never changes.
unsafe impl Send for Real {}
unsafe impl Sync for Real {}

static REAL: OnceLock<Real> = OnceLock::new();

/// Loads the real module, once.
pub fn load() -> Result<(), String> {
    if REAL.get().is_none() {
        let path = std::env::var_os("TROUSSEAU_FAULT_MODULE")
            .unwrap_or_else(|| OsString::from("/usr/lib/softhsm/libsofthsm2.so"));
        let failed = |error: String| format!("TROUSSEAU_FAULT_MODULE {}: {error}", path.display());
        let list = open(&path).map_err(failed)?;
        let _another_thread_was_first = REAL.set(Real(list));
    }
    Ok(())
}

fn open(path: &OsString) -> Result<*const CK_FUNCTION_LIST, String> {
    // SAFETY: it is a PKCS#11 module; whoever set the variable says so. It is never unloaded.
    unsafe {
        let library = libloading::Library::new(path).map_err(|error| error.to_string())?;
        let library: &'static libloading::Library = Box::leak(Box::new(library));
        let get: libloading::Symbol<unsafe extern "C" fn(*mut *mut CK_FUNCTION_LIST) -> CK_RV> =
            library.get(b"C_GetFunctionList").map_err(|error| error.to_string())?;
        let mut list = ptr::null_mut();
        match get(&mut list) {
            CKR_OK if !list.is_null() => Ok(list),
            code => Err(format!("C_GetFunctionList answered {code:#x}")),
        }
    }
}

/// Its functions. Whoever has our list has had it loaded.
pub fn list() -> &'static CK_FUNCTION_LIST {
    let real = REAL.get().expect("nobody has our functions but through C_GetFunctionList");
    // SAFETY: the library is never unloaded.
    unsafe { &*real.0 }
}

/// The label of the token in a slot, if it has one.
pub fn label(slot: CK_SLOT_ID) -> Option<String> {
    let mut info = CK_TOKEN_INFO::default();
    let code = forward!(C_GetTokenInfo(slot, &mut info));
    let label = String::from_utf8_lossy(&info.label).trim_end_matches([' ', '\0']).to_owned();
    (code == CKR_OK && !label.is_empty()).then_some(label)
}

/// The slots with a token.
pub fn slots() -> Vec<CK_SLOT_ID> {
    let mut slots = [0; 64];
    let mut count = slots.len() as CK_ULONG;
    match forward!(C_GetSlotList(CK_TRUE, slots.as_mut_ptr(), &mut count)) {
        CKR_OK => slots.into_iter().take(count as usize).collect(),
        _ => Vec::new(),
    }
}
