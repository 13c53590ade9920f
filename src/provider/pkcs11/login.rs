//! The login, and the latch before it: a wrong PIN costs one try of the token's few, however often we are started.
//!
//! That a PIN is about to be tried is written down before C_Login, and goes when the PIN has worked; so a crash in
//! between counts as a refusal, except the first one of a PIN that has worked on this host while the token counts no
//! wrong one. It is synced to the disk unless a PIN has worked, none was refused since, and the token counts none. What stays there is not tried again: until the PIN's file says something else, or a person says
//! `trousseau pin retry`.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use cryptoki::error::{Error, RvError};
use cryptoki::session::{Session, UserType};
use cryptoki::slot::{Slot, TokenInfo};
use secrecy::SecretString;
use sha2::{Digest, Sha256};

use super::error::{CallError, Class};
use super::module::InUse;
use super::tries::{
    counts_wrong_pins, hash_of, is_new, may_be_tried, new_record, now, reason, told, with, with_worked,
};
use crate::config::Codes;
use crate::state::{PinRecord, RefusedPin, State, StateError};
use crate::sync;

/// The slow hash takes a core for some 10 ms, which a host that starts has better use for.
const SETTLE_AFTER: Duration = Duration::from_millis(100);
/// How long another login of this host may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// The latch of one token.
pub(super) struct Latch {
    state: Arc<State>,
    /// Its files' name.
    name: String,
    /// The token, for people.
    token: String,
    /// Where its PIN comes from, for people.
    pin_file: String,
    codes: Codes,
    /// Opens the latch after a login.
    settling: Mutex<Option<JoinHandle<()>>>,
}

/// What `pin retry` did.
#[derive(Debug)]
pub enum Retry {
    /// No PIN is held back.
    NothingHeldBack,
    /// One more login will be tried. What had happened to the PINs that were held back:
    Allowed(Vec<String>),
    /// Nothing: a wrong PIN would lock the token.
    FinalTry,
}

impl Latch {
    /// The latch is named after the module and the token as it calls itself: whoever renames a provider, or writes its
    /// URI differently, means the same token, and tokens of two modules may have one name.
    pub(super) fn new(state: &Arc<State>, module: &Path, info: &TokenInfo, pin_file: String, codes: Codes) -> Self {
        let token = format!("{} {} {}", info.label(), info.manufacturer_id(), info.serial_number());
        let mut hash = Sha256::new_with_prefix("trousseau pin latch v1");
        let parts = [info.label(), info.manufacturer_id(), info.model(), info.serial_number()];
        for part in [module.as_os_str().as_encoded_bytes()].into_iter().chain(parts.map(str::as_bytes)) {
            hash.update([0]);
            hash.update(part);
        }
        let name = format!("pin-{}", base16ct::lower::encode_string(hash.finalize().split_at(16).0));
        Self { state: Arc::clone(state), name, token, pin_file, codes, settling: Mutex::default() }
    }

    /// Logs in, unless that would use up one of the token's tries for nothing. Returns whether the token looked at the PIN;
    /// it does not while another session of this process is logged in.
    ///
    /// If the disk does not take the latch, only a PIN is tried that has worked on this host, and only while the token
    /// counts no wrong one: a full disk must not keep a host from booting, nor a crash loop lock the token.
    ///
    /// # Errors
    /// What the token answered, or why it was not asked; and what to do.
    pub(super) fn log_in(
        &self,
        in_use: &InUse,
        slot: Slot,
        session: &Session,
        pin: &SecretString,
    ) -> Result<bool, CallError> {
        // Held while the token is asked: a latch is then nobody else's login under way.
        let lock = self.state.lock_login(&self.name, PATIENCE);
        if lock.as_ref().is_err_and(|error| error.kind() == ErrorKind::ResourceBusy) {
            return Err(CallError::new(Class::Token, "another process of this host does not end its login to it"));
        }
        let record = self.record()?;
        let info = in_use.token_info(slot)?;
        // The slow hash must not hold up the start of a host that is well: there, whatever the PIN is, it may be tried.
        let is_well = record.worked.is_some() && record.refused.is_empty() && !record.retry;
        let any_may_be_tried = is_well && !counts_wrong_pins(&info);
        let hash = (!any_may_be_tried).then(|| hash_of(&record, pin));
        may_be_tried(&record, hash.as_deref(), &info, &self.pin_file).map_err(|why| CallError::new(Class::Pin, why))?;
        // Whoever restarts us while a token that is out of reach lets C_Login hang does not hold back a good PIN.
        let again = is_new(&record, hash.as_deref()) && (hash.is_none() || record.worked == hash);
        let tried = RefusedPin { hash, at: now(), answer: None, again };
        let latched = lock.and_then(|lock| {
            match tried.hash {
                // Neither must the disk. A loss of power meanwhile costs one try of a token that counts none so far.
                None => self.state.note_login(&self.name)?,
                Some(_) => self.state.write_pin_record(&self.name, &with(&record, tried.clone()))?,
            }
            Ok(Some(lock))
        });
        let lock = latched.or_else(|error| self.refuse_unlatched(&record, pin, &info, &error).map(|()| None))?;
        let answer = session.login(UserType::User, Some(pin));
        if answer.is_ok() && tried.hash.is_none() {
            self.settle_later(record, pin.clone(), lock);
            return Ok(true);
        }
        if matches!(answer, Err(Error::Pkcs11(RvError::UserAlreadyLoggedIn, _))) {
            self.state.keep_pin_record(&self.name, &record);
            return Ok(false);
        }
        let hash = tried.hash.clone().unwrap_or_else(|| hash_of(&record, pin));
        let counts_none = in_use.token_info(slot).is_ok_and(|info| !counts_wrong_pins(&info));
        let (record, outcome) = self.outcome(record, tried, hash, answer, counts_none);
        self.state.keep_pin_record(&self.name, &record);
        outcome.map(|()| true)
    }

    /// Says of a PIN that the token did not look at whether it is another one than worked: it may be wrong, and is tried
    /// when the token is connected to next.
    pub(super) fn warn_of_another(&self, pin: &SecretString) {
        let Ok(record) = self.record() else { return };
        if record.worked.is_some() && record.worked != Some(hash_of(&record, pin)) {
            tracing::warn!(
                token = self.token,
                "the PIN in {} is not the one that has last worked on this host, and was not tried, since this process \
                 is logged in already: it will be tried when the token is connected to next. Write the right one there",
                self.pin_file
            );
        }
    }

    /// Opens the latch; which PIN has worked is found out while the token is in use already.
    fn settle_later(&self, record: PinRecord, pin: SecretString, lock: Option<File>) {
        self.state.forget_noted_login(&self.name);
        let (state, name) = (Arc::clone(&self.state), self.name.clone());
        let settle = move || {
            thread::park_timeout(SETTLE_AFTER);
            let hash = hash_of(&record, &pin);
            if record.worked.as_ref() != Some(&hash) {
                state.keep_pin_record(&name, &with_worked(record, hash));
            }
            drop(lock);
        };
        // Without a thread, that another PIN works now is not known until a login that is not as simple.
        *sync::lock(&self.settling) = thread::Builder::new().name("pin".into()).spawn(settle).ok();
    }

    /// What the record says after the token's answer, and what the caller hears.
    fn outcome(
        &self,
        before: PinRecord,
        mut tried: RefusedPin,
        hash: String,
        answer: Result<(), Error>,
        counts_none: bool,
    ) -> (PinRecord, Result<(), CallError>) {
        let error = match answer {
            Ok(()) => return (with_worked(before, hash), Ok(())),
            Err(error) => CallError::from(error),
        };
        let class = error.class(&self.codes);
        let is_doubtful = class == Class::Doubtful;
        // The token went away, or blamed something else than a PIN that has worked: that says nothing of the PIN.
        let is_known_good = before.worked.as_ref() == Some(&hash) && counts_none;
        if matches!(class, Class::Token | Class::Session) || (is_doubtful && is_known_good) {
            return (before, Err(error));
        }
        // One more try, where the token blamed something else: SoftHSM fails so while another program of this host
        // logs in. Some say it of a wrong PIN as well: better a login too few than one too many.
        tried.again = is_doubtful && is_new(&before, Some(&hash));
        tried.hash = Some(hash);
        tried.answer = Some(error.to_string());
        let why = reason(&tried, tried.again, &self.pin_file);
        (with(&before, tried), Err(CallError::new(Class::Pin, why)))
    }

    /// Allows one more try.
    ///
    /// # Errors
    /// The record cannot be read or written.
    pub(super) fn allow_retry(&self, info: &TokenInfo, final_try_ok: bool) -> Result<Retry, CallError> {
        let lock = self.state.lock_login(&self.name, PATIENCE);
        let _lock = lock.map_err(|error| not_written(&error))?;
        let record = self.record()?;
        if record.refused.is_empty() && !counts_wrong_pins(info) {
            return Ok(Retry::NothingHeldBack);
        }
        if info.user_pin_final_try() && !final_try_ok {
            return Ok(Retry::FinalTry);
        }
        let refused = record.refused.iter().map(told).collect();
        let allowed = PinRecord { refused: Vec::new(), retry: true, ..record };
        self.state.write_pin_record(&self.name, &allowed).map_err(|error| not_written(&error))?;
        Ok(Retry::Allowed(refused))
    }

    /// What had happened to the PINs that are held back.
    pub(super) fn held_back(&self) -> Result<Vec<String>, CallError> {
        Ok(self.record()?.refused.iter().map(told).collect())
    }

    fn record(&self) -> Result<PinRecord, CallError> {
        let damaged = |error: StateError| CallError::new(Class::Token, format!("{error}: {}", error.remedy()));
        if let Some(record) = self.state.pin_record(&self.name).map_err(damaged)? {
            return Ok(record);
        }
        Ok(new_record(self.token.clone())?)
    }

    /// Refuses a PIN whose try the disk would not remember.
    fn refuse_unlatched(
        &self,
        record: &PinRecord,
        pin: &SecretString,
        info: &TokenInfo,
        error: &io::Error,
    ) -> Result<(), CallError> {
        if !counts_wrong_pins(info) && record.worked.as_ref() == Some(&hash_of(record, pin)) {
            tracing::warn!(token = self.token, %error, "the login is not noted on disk; the PIN has worked before");
            return Ok(());
        }
        Err(not_written(error))
    }
}

impl Drop for Latch {
    fn drop(&mut self) {
        // The process must not end before that is done: it would look like a crash.
        if let Some(settling) = sync::lock(&self.settling).take() {
            settling.thread().unpark();
            let _panicked = settling.join();
        }
    }
}

fn not_written(error: &io::Error) -> CallError {
    let what = format!(
        "the state directory does not take a note ({error}), and without one no PIN is tried that may be wrong: make \
         room on the disk, or make it writable"
    );
    CallError::new(Class::Token, what)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use cryptoki::context::Function;

    use super::*;

    fn record(refused: &[RefusedPin]) -> PinRecord {
        PinRecord {
            token: "t".into(),
            salt: "00".into(),
            rounds: 1,
            worked: None,
            refused: refused.to_vec(),
            retry: true,
        }
    }

    fn latch(directory: &tempfile::TempDir) -> Latch {
        Latch {
            state: Arc::new(State::open(directory.path()).unwrap()),
            name: "pin-0".into(),
            token: "t".into(),
            pin_file: "/pin".into(),
            codes: Codes::default(),
            settling: Mutex::default(),
        }
    }

    #[test]
    fn every_answer_leaves_the_record_that_it_should() {
        let directory = tempfile::tempdir().unwrap();
        let latch = latch(&directory);
        let other = RefusedPin { hash: Some("bb".into()), at: now(), answer: Some("no".into()), again: false };
        let tried = RefusedPin { hash: Some("aa".into()), answer: None, again: true, ..other.clone() };
        let settle = |known: &[RefusedPin], answer: Result<(), RvError>| {
            let answer = answer.map_err(|code| Error::Pkcs11(code, Function::Login));
            latch.outcome(record(known), tried.clone(), "aa".into(), answer, false)
        };
        let (after, outcome) = settle(&[other.clone(), tried.clone()], Ok(()));
        assert!(outcome.is_ok() && after.refused.is_empty() && !after.retry && after.worked.as_deref() == Some("aa"));
        for code in [RvError::DeviceRemoved, RvError::TokenNotPresent] {
            let known = [other.clone()];
            assert_eq!(settle(&known, Err(code)).0, record(&known), "it says nothing of the PIN");
        }
        for (code, known, again) in [
            (RvError::PinIncorrect, vec![], false),
            (RvError::PinLocked, vec![other.clone()], false),
            (RvError::FunctionNotSupported, vec![], false),
            (RvError::GeneralError, vec![other.clone()], true),
            (RvError::GeneralError, vec![tried.clone()], false),
        ] {
            let (after, outcome) = settle(&known, Err(code));
            let last = after.refused.last().unwrap();
            assert_eq!((last.hash.as_deref(), last.again, after.retry), (Some("aa"), again, false), "{code:?}");
            assert_eq!(after.refused.len(), 1 + known.iter().filter(|known| **known == other).count());
            let reason = outcome.unwrap_err().to_string();
            assert_eq!(reason.contains("tried once more"), again, "{reason}");
            assert_eq!(reason.contains("trousseau pin retry"), !again, "{reason}");
        }
    }

    #[test]
    fn a_token_that_blames_something_else_than_a_pin_that_has_worked_and_counts_none_says_nothing_of_it() {
        let directory = tempfile::tempdir().unwrap();
        let latch = latch(&directory);
        let tried = RefusedPin { hash: Some("aa".into()), at: now(), answer: None, again: true };
        for (worked, counts_none, code, is_kept) in [
            (true, true, RvError::DeviceError, false),
            (true, false, RvError::DeviceError, true),
            (false, true, RvError::DeviceError, true),
            (true, true, RvError::PinIncorrect, true),
        ] {
            let before = PinRecord { worked: worked.then(|| "aa".into()), ..record(&[]) };
            let answer = Err(Error::Pkcs11(code, Function::Login));
            let (after, _) = latch.outcome(before, tried.clone(), "aa".into(), answer, counts_none);
            assert_eq!(after.refused.is_empty(), !is_kept, "{worked} {counts_none} {code:?}");
        }
    }
}
