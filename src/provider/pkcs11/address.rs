//! Where a token is, and how one gets from there to a connection: its module, its slot, the login.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::Sender;

use cryptoki::slot::{Slot, TokenInfo};

use super::Complaint;
use super::connection::Connected;
use super::error::{CallError, Class};
use super::login::{Latch, Retry};
use super::module::{InUse, Module};
use crate::config::{Credential, Pkcs11Config, Profile, TokenUri};
use crate::state::State;

/// Where a token is, and what opens it.
pub(super) struct Address {
    pub(super) module: PathBuf,
    pub(super) uri: TokenUri,
    pin: Credential,
    profile: Arc<Profile>,
    /// Holds the latch.
    state: Arc<State>,
}

/// Why there is no connection, and what to do.
pub(super) enum NotConnected {
    /// The token is not there, or not ready.
    NotThere(String),
    /// It may be there, in a slot that does not answer.
    Hangs(String),
    /// The token is there and was not logged in to.
    LoginFailed {
        reason: String,
        /// The PIN is to blame, and is not tried again.
        is_latched: bool,
    },
}

impl From<String> for NotConnected {
    fn from(reason: String) -> Self {
        Self::NotThere(reason)
    }
}

impl NotConnected {
    pub(super) fn reason(&self) -> &str {
        match self {
            Self::NotThere(reason) | Self::Hangs(reason) | Self::LoginFailed { reason, .. } => reason,
        }
    }
}

impl Address {
    pub(super) fn new(uri: TokenUri, provider: &Pkcs11Config, state: &Arc<State>) -> Self {
        Self {
            module: provider.module.clone(),
            uri,
            pin: provider.pin.clone(),
            profile: Arc::clone(&provider.profile),
            state: Arc::clone(state),
        }
    }

    /// Connects. `released` is dropped when the connection is.
    ///
    /// # Errors
    /// [`NotConnected`]
    pub(super) fn connect(&self, released: Sender<()>) -> Result<Connected, NotConnected> {
        let in_use = Module::acquire(&self.module, self.profile.reinitialize)?;
        let (slot, info) = self.find_slot(&in_use)?;
        let pin = self.pin.read().map_err(|error| format!("{error}: {}", error.remedy()))?;
        let opened = in_use.library().open_rw_session(slot).map_err(CallError::from);
        let session = opened.map_err(|error| format!("no session can be opened: {error}"))?;
        let latch = self.latch(&info);
        let logged_in = latch.log_in(&in_use, slot, &session, &pin);
        let was_looked_at = logged_in.map_err(|error| NotConnected::LoginFailed {
            is_latched: error.class(&self.profile.errors) == Class::Pin,
            reason: format!("login failed: {error}"),
        })?;
        if !was_looked_at {
            latch.warn_of_another(&pin);
        }
        Ok(Connected::new(in_use, slot, session, pin, latch, Arc::clone(&self.profile), released))
    }

    /// `pin retry`: looks for the token, without a login, and allows one that the latch would refuse.
    ///
    /// # Errors
    /// The token is not there, or the state directory cannot be used.
    pub(super) fn allow_retry(&self, final_try_ok: bool) -> Result<Retry, String> {
        let in_use = Module::acquire(&self.module, self.profile.reinitialize)?;
        let (_, info) = self.find_slot(&in_use).map_err(|error| error.reason().to_owned())?;
        self.latch(&info).allow_retry(&info, final_try_ok).map_err(|error| error.to_string())
    }

    /// What is wrong with the PIN, with what to do, as far as it can be known without a login.
    ///
    /// # Errors
    /// The token is not there, or the state directory cannot be used.
    pub(super) fn pin_state(&self) -> Result<Vec<Complaint>, String> {
        let in_use = Module::acquire(&self.module, self.profile.reinitialize)?;
        let (_, info) = self.find_slot(&in_use).map_err(|error| error.reason().to_owned())?;
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
        Latch::new(&self.state, &self.module, info, self.pin.to_string(), self.profile.errors.clone())
    }

    /// The one slot whose token the URI means, among those that answer.
    fn find_slot(&self, in_use: &InUse) -> Result<(Slot, TokenInfo), NotConnected> {
        let mut tokens = Vec::new();
        let mut unread = String::new();
        let mut hangs = false;
        for (slot, said) in in_use.slots().ask(in_use)? {
            match said {
                Some(Ok(info)) if info.token_initialized() => tokens.push((slot, info)),
                Some(Ok(_)) => (),
                Some(Err(error)) => unread = format!("{unread}; slot {}: {error}", slot.id()),
                None => {
                    hangs = true;
                    unread = format!("{unread}; slot {} does not answer", slot.id());
                }
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
                let reason = format!(
                    "no token of {} matches it; there: {}{unread}: insert it, or correct `tokens`",
                    self.module.display(),
                    if there.is_empty() { "none" } else { &there }
                );
                Err(if hangs { NotConnected::Hangs(reason) } else { NotConnected::NotThere(reason) })
            }
            several => {
                let serials: Vec<&str> = several.iter().map(|(_, info)| info.serial_number()).collect();
                let (count, serials) = (serials.len(), serials.join(", "));
                Err(format!("{count} tokens match it, serial numbers {serials}: add `;serial=…` to the URI").into())
            }
        }
    }
}
