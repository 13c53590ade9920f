//! The login, and the latch before it: a wrong PIN costs one try of the token's few, however often we are started.
//!
//! That a PIN is about to be tried is on the disk before C_Login, and goes from there when the PIN has worked; so a
//! crash in between counts as a refusal, except the first one of a PIN that has worked on this host while the token
//! counts no wrong one. What stays there is not tried again: until the PIN's file says something else, or a person says
//! `trousseau pin retry`.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use cryptoki::context::Pkcs11;
use cryptoki::error::{Error, RvError};
use cryptoki::session::{Session, UserType};
use cryptoki::slot::{Slot, TokenInfo};
use jiff::{SignedDuration, Timestamp};
use secrecy::{ExposeSecret, SecretString};
use sha2::{Digest, Sha256};

use super::error::{CallError, Class};
use crate::config::Codes;
use crate::state::{PinRecord, RefusedPin, State, StateError};
use crate::sync;

/// PBKDF2-HMAC-SHA256: some 15 ms on a processor with SHA instructions, 50 ms on another. PINs are short, and who has
/// this file can try them all; what guards it is its mode, 0600.
const ROUNDS: u32 = 100_000;
/// How long a PIN that has worked on this host is not tried after a second login in a row that was interrupted.
const INTERRUPTION: SignedDuration = SignedDuration::from_secs(60);
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

    /// Logs in, unless that would use up one of the token's tries for nothing.
    ///
    /// If the disk does not take the latch, only a PIN is tried that has worked on this host, and only while the token
    /// counts no wrong one: a full disk must not keep a host from booting, nor a crash loop lock the token.
    ///
    /// # Errors
    /// What the token answered, or why it was not asked; and what to do.
    pub(super) fn log_in(
        &self,
        library: &Pkcs11,
        slot: Slot,
        session: &Session,
        pin: &SecretString,
    ) -> Result<(), CallError> {
        // Held while the token is asked: a latch is then nobody else's login under way.
        let lock = self.state.lock_login(&self.name, PATIENCE);
        if lock.as_ref().is_err_and(|error| error.kind() == ErrorKind::WouldBlock) {
            return Err(CallError::new(Class::Token, "another process of this host does not end its login to it"));
        }
        let record = self.record()?;
        let info = library.get_token_info(slot)?;
        // The slow hash must not hold up the start of a host that is well: there, whatever the PIN is, it may be tried.
        let any_may_be_tried = record.worked.is_some() && record.refused.is_empty() && !counts_wrong_pins(&info);
        let hash = (!any_may_be_tried).then(|| hash_of(&record, pin));
        self.refuse(&record, hash.as_deref(), &info)?;
        // Whoever restarts us while a token that is out of reach lets C_Login hang does not hold back a good PIN.
        let again = is_new(&record, hash.as_deref()) && (hash.is_none() || record.worked == hash);
        let tried = RefusedPin { hash, at: now(), answer: None, again };
        let latched = lock.and_then(|lock| {
            self.state.write_pin_record(&self.name, &with(&record, tried.clone()))?;
            Ok(Some(lock))
        });
        let lock = latched.or_else(|error| self.refuse_unlatched(&record, pin, &info, &error).map(|()| None))?;
        let answer = session.login(UserType::User, Some(pin));
        if answer.is_ok() && tried.hash.is_none() {
            self.settle_later(record, pin.clone(), lock);
            return Ok(());
        }
        // Another session of this process has logged in: the token did not look at the PIN.
        if matches!(answer, Err(Error::Pkcs11(RvError::UserAlreadyLoggedIn, _))) {
            self.state.keep_pin_record(&self.name, &record);
            return Ok(());
        }
        let hash = tried.hash.clone().unwrap_or_else(|| hash_of(&record, pin));
        let counts_none = library.get_token_info(slot).is_ok_and(|info| !counts_wrong_pins(&info));
        let (record, outcome) = self.outcome(record, tried, hash, answer, counts_none);
        self.state.keep_pin_record(&self.name, &record);
        outcome
    }

    /// Opens the latch while the token is in use already.
    fn settle_later(&self, record: PinRecord, pin: SecretString, lock: Option<File>) {
        let record = PinRecord { retry: false, ..record };
        let (state, name, before) = (Arc::clone(&self.state), self.name.clone(), record.clone());
        let settle = move || {
            state.keep_pin_record(&name, &record); // at once, since until then a crash counts against the PIN
            let hash = hash_of(&record, &pin);
            if record.worked.as_ref() != Some(&hash) {
                state.keep_pin_record(&name, &with_worked(record, hash));
            }
            drop(lock);
        };
        match thread::Builder::new().name("pin".into()).spawn(settle) {
            Ok(settling) => *sync::lock(&self.settling) = Some(settling),
            Err(_) => self.state.keep_pin_record(&self.name, &before),
        }
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
        let reason = self.reason(&tried, tried.again);
        (with(&before, tried), Err(CallError::new(Class::Pin, reason)))
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
        let mut salt = [0; 16];
        getrandom::fill(&mut salt)?;
        Ok(PinRecord {
            token: self.token.clone(),
            salt: base16ct::lower::encode_string(&salt),
            rounds: ROUNDS,
            worked: None,
            refused: Vec::new(),
            retry: false,
        })
    }

    /// Refuses a PIN that is not to be tried.
    fn refuse(&self, record: &PinRecord, hash: Option<&str>, info: &TokenInfo) -> Result<(), CallError> {
        let refused = |what: String| Err(CallError::new(Class::Pin, what));
        if info.user_pin_locked() {
            return refused("the user PIN is locked: unlock it with the vendor's tools".into());
        }
        let has_worked = record.worked.as_deref() == hash;
        if let Some(known) = record.refused.iter().find(|known| known.may_be(hash)) {
            // A token that lets C_Login hang until we are restarted, and counts no wrong PIN, says nothing of this one.
            let was_interrupted = known.answer.is_none() && has_worked && !counts_wrong_pins(info);
            let is_over = now().duration_since(known.at) >= INTERRUPTION;
            match (was_interrupted, known.again) {
                (true, false) if !is_over => {
                    return refused(format!("{}: it is tried again a minute after that", told(known)));
                }
                (false, again) if !again || known.answer.is_none() => return refused(self.reason(known, false)),
                _ => (),
            }
        }
        // A count that our own refused PIN explains does not speak against the next one, until the last try.
        let explained = record.refused.iter().any(|known| known.answer.is_some()) && !info.user_pin_final_try();
        let may_be_wrong = !has_worked && !record.retry && !explained;
        if counts_wrong_pins(info) && may_be_wrong {
            return refused(format!(
                "the token has seen a wrong PIN since its last login, and the PIN in {} has never worked on this host: \
                 it is not tried, unless you say `trousseau pin retry`",
                self.pin_file
            ));
        }
        Ok(())
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

    /// Why a PIN is not tried again. The same words from the refusal on, so that the log has them once.
    fn reason(&self, refused: &RefusedPin, again: bool) -> String {
        let (told, file) = (told(refused), &self.pin_file);
        if again {
            return format!("{told}: it is tried once more");
        }
        format!(
            "{told}: write the right PIN into {file}; this one is not tried again, unless you say `trousseau pin retry`"
        )
    }
}

impl Drop for Latch {
    fn drop(&mut self) {
        // The process must not end before that is done: it would look like a crash.
        if let Some(settling) = sync::lock(&self.settling).take() {
            let _panicked = settling.join();
        }
    }
}

/// Whether the token has seen a wrong PIN since its last login, as far as it tells.
fn counts_wrong_pins(info: &TokenInfo) -> bool {
    info.user_pin_count_low() || info.user_pin_final_try() || info.user_pin_locked()
}

fn not_written(error: &io::Error) -> CallError {
    let what = format!(
        "the state directory does not take a note ({error}), and without one no PIN is tried that may be wrong: make \
         room on the disk, or make it writable"
    );
    CallError::new(Class::Token, what)
}

fn told(refused: &RefusedPin) -> String {
    let at = refused.at;
    match &refused.answer {
        Some(answer) => format!("{answer} at {at}"),
        None => format!("the process that tried the PIN at {at} ended before it knew whether it is the right one"),
    }
}

/// Whether a PIN has not been tried since one worked.
fn is_new(record: &PinRecord, hash: Option<&str>) -> bool {
    !record.refused.iter().any(|known| known.may_be(hash))
}

/// The record while a PIN is being tried, and when it was refused.
fn with(record: &PinRecord, refused: RefusedPin) -> PinRecord {
    let mut record = PinRecord { retry: false, ..record.clone() };
    record.refused.retain(|known| !known.may_be(refused.hash.as_deref()));
    record.refused.push(refused);
    record
}

fn with_worked(record: PinRecord, hash: String) -> PinRecord {
    PinRecord { worked: Some(hash), refused: Vec::new(), retry: false, ..record }
}

fn hash_of(record: &PinRecord, pin: &SecretString) -> String {
    let mut hash = [0; 32];
    pbkdf2::pbkdf2_hmac::<Sha256>(pin.expose_secret().as_bytes(), record.salt.as_bytes(), record.rounds, &mut hash);
    base16ct::lower::encode_string(&hash)
}

fn now() -> Timestamp {
    let now = Timestamp::now();
    Timestamp::from_second(now.as_second()).unwrap_or(now)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
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

    #[test]
    fn a_hash_is_of_this_pin_in_this_file() {
        let hashes = [("1234", "00"), ("1235", "00"), ("1234", "01")]
            .map(|(pin, salt)| hash_of(&PinRecord { salt: salt.into(), ..record(&[]) }, &SecretString::from(pin)));
        assert!(hashes.iter().all(|hash| hash.len() == 64) && hashes[0] != hashes[1] && hashes[0] != hashes[2]);
    }
}
