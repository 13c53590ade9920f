//! A connection to a token: one anchor session, logged in.
//!
//! A login holds for every session of the process and ends with the last one; the anchor is the session that stays.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard};

use cryptoki::context::Info;
use cryptoki::session::Session;
use cryptoki::slot::{Slot, TokenInfo};
use secrecy::SecretString;

use super::error::CallError;
use super::login::Latch;
use super::module::InUse;
use crate::config::Profile;
use crate::identity::Identity;
use crate::sync::lock;

/// A token that is present and logged in to. Its fields are dropped in their order: sessions before the library.
pub(super) struct Connected {
    anchor: Mutex<Anchor>,
    slot: Slot,
    pub(super) profile: Arc<Profile>,
    latch: Latch,
    proved: Mutex<BTreeSet<Identity>>,
    /// Sessions beside the anchor.
    lanes: AtomicUsize,
    /// Objects that were made through it.
    objects: AtomicU64,
    in_use: InUse,
    /// Its end tells the supervisor that all of the above is gone.
    _released: Sender<()>,
}

/// The session that keeps the login, and the PIN to log in again with.
struct Anchor {
    session: Session,
    pin: SecretString,
}

impl Connected {
    /// What is true of it from now on; `session` is logged in with `pin`.
    pub(super) fn new(
        in_use: InUse,
        slot: Slot,
        session: Session,
        pin: SecretString,
        latch: Latch,
        profile: Arc<Profile>,
        released: Sender<()>,
    ) -> Self {
        Self {
            anchor: Mutex::new(Anchor { session, pin }),
            slot,
            profile,
            latch,
            proved: Mutex::default(),
            lanes: AtomicUsize::new(0),
            objects: AtomicU64::new(0),
            in_use,
            _released: released,
        }
    }

    pub(super) fn open_session(&self) -> Result<Session, CallError> {
        Ok(self.in_use.library().open_rw_session(self.slot)?)
    }

    pub(super) fn token_info(&self) -> Result<TokenInfo, CallError> {
        self.in_use.token_info(self.slot)
    }

    pub(super) fn library_info(&self) -> Result<Info, CallError> {
        Ok(self.in_use.library().get_library_info()?)
    }

    /// The file of the library.
    pub(super) fn module_path(&self) -> &Path {
        self.in_use.path()
    }

    /// What the token's flags say that they should not (CK_TOKEN_INFO, PKCS#11 v3.1 section 3.2), with what to do.
    pub(super) fn complaints(&self) -> Result<Vec<(&'static str, &'static str)>, CallError> {
        let info = self.token_info()?;
        let said = [
            (!info.login_required(), "needs no login: anybody may use its keys", "initialize it with a user PIN"),
            (info.user_pin_to_be_changed(), "wants its PIN to be changed", "change it with the vendor's tools"),
            (info.write_protected(), "is write-protected: no KEK can be made in it", "lift that to make a KEK"),
            (info.error_state(), "says that it failed its self-test", "restart it, and ask its vendor"),
        ];
        Ok(said.into_iter().filter(|(so, ..)| *so).map(|(_, what, remedy)| (what, remedy)).collect())
    }

    /// A lane was opened, or is about to be closed.
    pub(super) fn count_lanes(&self, change: impl Fn(usize) -> usize) {
        let _always_changes =
            self.lanes.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |lanes| Some(change(lanes)));
    }

    /// Lanes that are open.
    pub(super) fn lanes(&self) -> usize {
        self.lanes.load(Ordering::Relaxed)
    }

    /// Counts an object that was made through it.
    pub(super) fn count_object(&self) {
        self.objects.fetch_add(1, Ordering::Relaxed);
    }

    /// Whether it is to be given up for a moment: because so many objects were made through it, or because somebody
    /// else who uses the library says so.
    pub(super) fn is_to_be_renewed(&self, limit: Option<u64>) -> bool {
        if limit.is_some_and(|limit| self.objects.load(Ordering::Relaxed) >= limit) {
            self.in_use.renew();
        }
        self.in_use.is_renewed()
    }

    /// Nothing less makes its token usable again than that its library is finalized, whoever else uses it. Returns whether
    /// that may be now: it was not wanted a moment ago.
    pub(super) fn wants_its_library_anew(&self) -> bool {
        self.in_use.renew_for_one()
    }

    /// The KEKs that were used through this connection. One that is then not to be found means that the token is
    /// gone: some libraries show an empty one in its place, until they are initialized again.
    pub(super) fn proved(&self) -> MutexGuard<'_, BTreeSet<Identity>> {
        lock(&self.proved)
    }

    /// Logs in again after the token forgot the login; a PIN that it then refuses is latched for all.
    pub(super) fn log_in_again(&self) -> Result<(), CallError> {
        let anchor = lock(&self.anchor);
        self.latch.log_in(&self.in_use, self.slot, &anchor.session, &anchor.pin).map(|_| ())
    }
}
