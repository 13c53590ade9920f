//! A connection to a token: found by its URI, one anchor session, logged in.
//!
//! A login holds for every session of the process and ends with the last one; the anchor is the session that stays.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard};

use cryptoki::context::{Info, Pkcs11};
use cryptoki::session::Session;
use cryptoki::slot::{Slot, TokenInfo};
use secrecy::SecretString;

use super::Complaint;
use super::error::CallError;
use super::login::{Latch, Retry};
use super::module::{InUse, Module};
use crate::config::{Codes, Credential, ProviderConfig, TokenUri};
use crate::identity::Identity;
use crate::state::State;
use crate::sync::lock;

/// Where a token is, and what opens it.
pub(super) struct Address {
    pub(super) module: PathBuf,
    pub(super) uri: TokenUri,
    pin: Credential,
    codes: Codes,
    /// Whether the module may be initialized again.
    reinitialize: bool,
    /// Holds the latch.
    state: Arc<State>,
}

/// A token that is present and logged in to. Its fields are dropped in their order: sessions before the library.
pub(super) struct Connected {
    anchor: Mutex<Anchor>,
    slot: Slot,
    pub(super) codes: Codes,
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

/// Why there is no connection, and what to do.
pub(super) enum NotConnected {
    /// The token is not there, or not ready.
    NotThere(String),
    /// The token is there and was not logged in to.
    LoginFailed(String),
}

impl From<String> for NotConnected {
    fn from(reason: String) -> Self {
        Self::NotThere(reason)
    }
}

impl Address {
    pub(super) fn new(uri: TokenUri, provider: &ProviderConfig, state: &Arc<State>) -> Self {
        Self {
            module: provider.module.clone(),
            uri,
            pin: provider.pin.clone(),
            codes: provider.profile.errors.clone(),
            reinitialize: provider.profile.reinitialize,
            state: Arc::clone(state),
        }
    }

    /// Connects. `released` is dropped when the connection is.
    ///
    /// # Errors
    /// [`NotConnected`]
    pub(super) fn connect(&self, released: Sender<()>) -> Result<Connected, NotConnected> {
        let in_use = Module::acquire(&self.module, self.reinitialize)?;
        let (slot, info) = self.find_slot(in_use.library())?;
        let pin = self.pin.read().map_err(|error| format!("{error}: {}", error.remedy()))?;
        let opened = in_use.library().open_rw_session(slot).map_err(CallError::from);
        let session = opened.map_err(|error| format!("no session can be opened: {error}"))?;
        let latch = self.latch(&info);
        let logged_in = latch.log_in(in_use.library(), slot, &session, &pin);
        logged_in.map_err(|error| NotConnected::LoginFailed(format!("login failed: {error}")))?;
        let anchor = Mutex::new(Anchor { session, pin });
        let codes = self.codes.clone();
        Ok(Connected {
            anchor,
            slot,
            codes,
            latch,
            proved: Mutex::default(),
            lanes: AtomicUsize::new(0),
            objects: AtomicU64::new(0),
            in_use,
            _released: released,
        })
    }

    /// `pin retry`: looks for the token, without a login, and allows one that the latch would refuse.
    ///
    /// # Errors
    /// The token is not there, or the state directory cannot be used.
    pub(super) fn allow_retry(&self, final_try_ok: bool) -> Result<Retry, String> {
        let in_use = Module::acquire(&self.module, self.reinitialize)?;
        let (_, info) = self.find_slot(in_use.library())?;
        self.latch(&info).allow_retry(&info, final_try_ok).map_err(|error| error.to_string())
    }

    /// What is wrong with the PIN, with what to do, as far as it can be known without a login.
    ///
    /// # Errors
    /// The token is not there, or the state directory cannot be used.
    pub(super) fn pin_state(&self) -> Result<Vec<Complaint>, String> {
        let in_use = Module::acquire(&self.module, self.reinitialize)?;
        let (_, info) = self.find_slot(in_use.library())?;
        let once = "log in once with the right PIN, so that the count begins anew";
        let officer = "have the security officer set it, with the vendor's tools";
        let said = [
            (info.user_pin_locked(), "has locked its PIN", officer),
            (!info.user_pin_locked() && info.user_pin_final_try(), "will be locked by the next wrong PIN", once),
            (
                !info.user_pin_final_try() && info.user_pin_count_low(),
                "has seen a wrong PIN since the last login",
                once,
            ),
            (info.token_initialized() && !info.user_pin_initialized(), "says that it has no user PIN", officer),
        ];
        let said = said.into_iter().filter(|(so, ..)| *so).map(|(_, what, remedy)| (what.to_owned(), remedy));
        let held_back = self.latch(&info).held_back().map_err(|error| error.to_string())?;
        let latched = held_back.into_iter().map(|what| {
            (format!("had a PIN tried that is held back now: {what}"), "correct the PIN file, or `trousseau pin retry`")
        });
        Ok(said.chain(latched).collect())
    }

    fn latch(&self, info: &TokenInfo) -> Latch {
        Latch::new(&self.state, &self.module, info, self.pin.to_string(), self.codes.clone())
    }

    /// The one slot whose token the URI means.
    fn find_slot(&self, library: &Pkcs11) -> Result<(Slot, TokenInfo), String> {
        let slots = library.get_slots_with_token().map_err(|error| CallError::from(error).to_string())?;
        let mut tokens = Vec::new();
        let mut unread = String::new();
        for slot in slots {
            match library.get_token_info(slot) {
                Ok(info) if info.token_initialized() => tokens.push((slot, info)),
                Ok(_) => (),
                Err(error) => unread = format!("; slot {}: {}", slot.id(), CallError::from(error)),
            }
        }
        let meant = |info: &TokenInfo| {
            self.uri.matches(info.label(), info.serial_number(), info.manufacturer_id(), info.model())
        };
        let matching: Vec<_> = tokens.iter().filter(|(_, info)| meant(info)).collect();
        match matching.as_slice() {
            [(slot, info)] => Ok((*slot, info.clone())),
            [] => {
                let labels: BTreeSet<&str> = tokens.iter().map(|(_, info)| info.label()).collect();
                let there = labels.into_iter().collect::<Vec<_>>().join(", ");
                Err(format!(
                    "no token of {} matches it; there: {}{unread}: insert it, or correct `tokens`",
                    self.module.display(),
                    if there.is_empty() { "none" } else { &there }
                ))
            }
            several => {
                let serials: Vec<&str> = several.iter().map(|(_, info)| info.serial_number()).collect();
                let (count, serials) = (serials.len(), serials.join(", "));
                Err(format!("{count} tokens match it, serial numbers {serials}: add `;serial=…` to the URI"))
            }
        }
    }
}

impl Connected {
    pub(super) fn open_session(&self) -> Result<Session, CallError> {
        Ok(self.in_use.library().open_rw_session(self.slot)?)
    }

    pub(super) fn token_info(&self) -> Result<TokenInfo, CallError> {
        Ok(self.in_use.library().get_token_info(self.slot)?)
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

    /// The KEKs that were used through this connection. One that is then not to be found means that the token is
    /// gone: some libraries show an empty one in its place, until they are initialized again.
    pub(super) fn proved(&self) -> MutexGuard<'_, BTreeSet<Identity>> {
        lock(&self.proved)
    }

    /// Logs in again after the token forgot the login; a PIN that it then refuses is latched for all.
    pub(super) fn log_in_again(&self) -> Result<(), CallError> {
        let anchor = lock(&self.anchor);
        self.latch.log_in(self.in_use.library(), self.slot, &anchor.session, &anchor.pin)
    }
}
