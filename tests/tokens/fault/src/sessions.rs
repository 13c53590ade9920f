//! The open sessions, and whose they are.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock, PoisonError, RwLock, RwLockWriteGuard};

use cryptoki_sys::{CK_SESSION_HANDLE, CK_SLOT_ID};

struct Open {
    slot: CK_SLOT_ID,
    token: Option<Arc<str>>,
}

static OPEN: LazyLock<RwLock<HashMap<CK_SESSION_HANDLE, Open>>> = LazyLock::new(RwLock::default);

/// Remembers a session, unless there would be more than one of `limits` allows: of a token, or of all.
pub fn remember<'a>(
    session: CK_SESSION_HANDLE,
    slot: CK_SLOT_ID,
    token: Option<Arc<str>>,
    limits: impl IntoIterator<Item = (usize, Option<&'a str>)>,
) -> bool {
    let mut open = write();
    let count = |of: Option<&str>| open.values().filter(|open| of.is_none() || open.token.as_deref() == of).count();
    let fits = limits.into_iter().all(|(limit, of)| count(of) < limit);
    if fits {
        open.insert(session, Open { slot, token });
    }
    fits
}

/// The label of the token that a session is of.
pub fn token(session: CK_SESSION_HANDLE) -> Option<Arc<str>> {
    OPEN.read().unwrap_or_else(PoisonError::into_inner).get(&session)?.token.clone()
}

pub fn forget(session: CK_SESSION_HANDLE) {
    write().remove(&session);
}

/// Forgets the sessions of a slot, or of all.
pub fn forget_all(slot: Option<CK_SLOT_ID>) {
    write().retain(|_, open| slot.is_some_and(|slot| open.slot != slot));
}

fn write() -> RwLockWriteGuard<'static, HashMap<CK_SESSION_HANDLE, Open>> {
    OPEN.write().unwrap_or_else(PoisonError::into_inner)
}
