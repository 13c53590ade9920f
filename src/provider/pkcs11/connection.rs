//! A connection to a token: found by its URI, one anchor session, logged in.
//!
//! A login holds for every session of the process and ends with the last one; the anchor is the session that stays.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::mpsc::Sender;
use std::sync::{Mutex, MutexGuard};

use cryptoki::context::Pkcs11;
use cryptoki::error::{Error, RvError};
use cryptoki::session::{Session, UserType};
use cryptoki::slot::{Slot, TokenInfo};
use secrecy::{ExposeSecret, SecretString};

use super::error::{CallError, Class};
use super::module::{InUse, Module};
use crate::config::{Codes, Credential, TokenUri};
use crate::identity::Identity;
use crate::sync::lock;

/// Where a token is, and what opens it.
pub(super) struct Address {
    pub(super) module: PathBuf,
    pub(super) uri: TokenUri,
    pub(super) pin: Credential,
    pub(super) codes: Codes,
    /// Whether the module may be initialized again.
    pub(super) reinitialize: bool,
}

/// A token that is present and logged in to. Its fields are dropped in their order: sessions before the library.
pub(super) struct Connected {
    anchor: Mutex<Anchor>,
    slot: Slot,
    pub(super) codes: Codes,
    proved: Mutex<BTreeSet<Identity>>,
    in_use: InUse,
    /// Takes a refused PIN to the supervisor, and its end that all of the above is gone.
    released: Sender<RefusedPin>,
}

/// The session that keeps the login, and the PIN to log in again with, until that is refused.
struct Anchor {
    session: Session,
    pin: Option<SecretString>,
}

/// Why there is no connection, and what to do.
pub(super) enum NotConnected {
    /// Worth another attempt.
    Yet(String),
    /// The token refused this PIN: another attempt would use up its tries.
    PinRefused(RefusedPin),
}

/// A PIN that is not tried again.
pub(super) struct RefusedPin {
    pin: SecretString,
    pub(super) reason: String,
    /// The token did not say that it was the PIN that was wrong.
    pub(super) may_be_right: bool,
}

impl RefusedPin {
    fn new(pin: SecretString, error: &CallError, codes: &Codes, file: &str) -> Self {
        let reason = format!("{error}: write the right PIN into {file}; this one is not tried again");
        Self { pin, reason, may_be_right: error.class(codes) == Class::Doubtful }
    }
}

impl From<String> for NotConnected {
    fn from(reason: String) -> Self {
        Self::Yet(reason)
    }
}

impl Address {
    /// Connects, but not with a PIN that was `refused`. `released` is dropped when the connection is.
    ///
    /// # Errors
    /// [`NotConnected`]
    pub(super) fn connect(
        &self,
        refused: Option<&RefusedPin>,
        released: Sender<RefusedPin>,
    ) -> Result<Connected, NotConnected> {
        let in_use = Module::acquire(&self.module, self.reinitialize)?;
        let (slot, info) = self.find_slot(in_use.library())?;
        let pin = self.pin.read().map_err(|error| format!("{error}: {}", error.remedy()))?;
        if let Some(refused) = refused.filter(|refused| refused.pin.expose_secret() == pin.expose_secret()) {
            return Err(NotConnected::Yet(refused.reason.clone()));
        }
        if info.user_pin_locked() {
            return Err(NotConnected::Yet("the user PIN is locked: unlock it with the vendor's tools".into()));
        }
        let opened = in_use.library().open_rw_session(slot).map_err(CallError::from);
        let anchor = opened.map_err(|error| format!("no session can be opened: {error}"))?;
        match log_in(&anchor, &pin) {
            Ok(()) => {
                let anchor = Mutex::new(Anchor { session: anchor, pin: Some(pin) });
                let codes = self.codes.clone();
                Ok(Connected { anchor, slot, codes, proved: Mutex::default(), in_use, released })
            }
            // Some tokens say of a wrong PIN what they say of any failure: better a login too few than one too many.
            Err(error) if matches!(error.class(&self.codes), Class::Pin | Class::Refused | Class::Doubtful) => {
                Err(NotConnected::PinRefused(RefusedPin::new(pin, &error, &self.codes, &self.pin.to_string())))
            }
            Err(error) => Err(NotConnected::Yet(format!("login failed: {error}"))),
        }
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

    /// What the token's flags say that they should not (CK_TOKEN_INFO, PKCS#11 v3.1 section 3.2), with what to do.
    pub(super) fn complaints(&self) -> Result<Vec<(&'static str, &'static str)>, CallError> {
        let info = self.in_use.library().get_token_info(self.slot)?;
        let few_tries = "log in once with the right PIN, so that the count begins anew";
        let said = [
            (!info.login_required(), "needs no login: anybody may use its keys", "initialize it with a user PIN"),
            (info.user_pin_count_low(), "has seen a wrong PIN since the last login", few_tries),
            (info.user_pin_final_try(), "will be locked by the next wrong PIN", few_tries),
            (info.user_pin_to_be_changed(), "wants its PIN to be changed", "change it with the vendor's tools"),
            (info.write_protected(), "is write-protected: no KEK can be made in it", "lift that to make a KEK"),
            (info.error_state(), "says that it failed its self-test", "restart it, and ask its vendor"),
        ];
        Ok(said.into_iter().filter(|(so, ..)| *so).map(|(_, what, remedy)| (what, remedy)).collect())
    }

    /// The KEKs that were used through this connection. One that is then not to be found means that the token is
    /// gone: some libraries show an empty one in its place, until they are initialized again.
    pub(super) fn proved(&self) -> MutexGuard<'_, BTreeSet<Identity>> {
        lock(&self.proved)
    }

    /// Logs in again after the token forgot the login; once only, if it then refuses the PIN.
    pub(super) fn log_in_again(&self) -> Result<(), CallError> {
        let mut anchor = lock(&self.anchor);
        let refused = || CallError::new(Class::Pin, "the token forgot the login, and refuses the PIN");
        let pin = anchor.pin.as_ref().ok_or_else(refused)?;
        let Err(error) = log_in(&anchor.session, pin) else { return Ok(()) };
        if let Some(pin) = anchor.pin.take() {
            let _supervisor_gone = self.released.send(RefusedPin::new(pin, &error, &self.codes, "the PIN's file"));
        }
        Err(error)
    }
}

/// A login belongs to the process: another session may have made it.
fn log_in(session: &Session, pin: &SecretString) -> Result<(), CallError> {
    match session.login(UserType::User, Some(pin)) {
        Ok(()) | Err(Error::Pkcs11(RvError::UserAlreadyLoggedIn, _)) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
