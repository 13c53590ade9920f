//! What is known of a token's PINs, and what follows from it: which one may be tried, and what is noted of the try.
//! Nothing here touches the token or the disk.

use cryptoki::slot::TokenInfo;
use jiff::{SignedDuration, Timestamp};
use secrecy::{ExposeSecret, SecretString};
use sha2::Sha256;

use crate::state::{PinRecord, RefusedPin};

/// PBKDF2-HMAC-SHA256: some 15 ms on a processor with SHA instructions, 50 ms on another. PINs are short, and who has
/// this file can try them all; what guards it is its mode, 0600. Without optimization so many took half a second of each
/// start, of which tests have hundreds.
const ROUNDS: u32 = if cfg!(debug_assertions) { 1_000 } else { 100_000 };
/// How long a PIN that has worked on this host is not tried after a second login in a row that was interrupted.
const INTERRUPTION: SignedDuration = SignedDuration::from_secs(60);

/// The record of a token that has none.
///
/// # Errors
/// The operating system gives no random bytes.
pub(super) fn new_record(token: String) -> Result<PinRecord, getrandom::Error> {
    let mut salt = [0; 16];
    getrandom::fill(&mut salt)?;
    let salt = base16ct::lower::encode_string(&salt);
    Ok(PinRecord { token, salt, rounds: ROUNDS, worked: None, refused: Vec::new(), retry: false })
}

/// Whether a PIN may be tried.
///
/// # Errors
/// Why not, and what to do.
pub(super) fn may_be_tried(
    record: &PinRecord,
    hash: Option<&str>,
    info: &TokenInfo,
    pin_file: &str,
) -> Result<(), String> {
    if info.user_pin_locked() {
        return Err("the user PIN is locked: unlock it with the vendor's tools".into());
    }
    let has_worked = record.worked.as_deref() == hash;
    if let Some(known) = record.refused.iter().find(|known| known.may_be(hash)) {
        // A token that lets C_Login hang until we are restarted, and counts no wrong PIN, says nothing of this one.
        let was_interrupted = known.answer.is_none() && has_worked && !counts_wrong_pins(info);
        let is_over = now().duration_since(known.at) >= INTERRUPTION;
        match (was_interrupted, known.again) {
            (true, false) if !is_over => {
                return Err(format!("{}: it is tried again a minute after that", told(known)));
            }
            (false, again) if !again || known.answer.is_none() => return Err(reason(known, false, pin_file)),
            _ => (),
        }
    }
    // A count that our own refused PIN explains does not speak against the next one, until the last try.
    let explained = record.refused.iter().any(|known| known.answer.is_some()) && !info.user_pin_final_try();
    let may_be_wrong = !has_worked && !record.retry && !explained;
    if counts_wrong_pins(info) && may_be_wrong {
        return Err(format!(
            "the token has seen a wrong PIN since its last login, and the PIN in {pin_file} has never worked on this \
             host: it is not tried, unless you say `trousseau pin retry`"
        ));
    }
    Ok(())
}

/// Why a PIN is not tried again. The same words from the refusal on, so that the log has them once.
pub(super) fn reason(refused: &RefusedPin, again: bool, pin_file: &str) -> String {
    let told = told(refused);
    if again {
        return format!("{told}: it is tried once more");
    }
    let answered = |code: &str| refused.answer.as_ref().is_some_and(|answer| answer.ends_with(code));
    let remedy = if answered("CKR_PIN_LOCKED") {
        "unlock it with the vendor's tools".to_owned()
    } else if answered("CKR_PIN_EXPIRED") {
        format!("set a new PIN with the vendor's tools and write it into {pin_file}")
    } else {
        format!("write the right PIN into {pin_file}")
    };
    format!("{told}: {remedy}; this one is not tried again, unless you say `trousseau pin retry`")
}

/// Whether the token has seen a wrong PIN since its last login, as far as it tells.
pub(super) fn counts_wrong_pins(info: &TokenInfo) -> bool {
    info.user_pin_count_low() || info.user_pin_final_try() || info.user_pin_locked()
}

/// What happened to it, for people.
pub(super) fn told(refused: &RefusedPin) -> String {
    let at = refused.at;
    match &refused.answer {
        Some(answer) => format!("{answer} at {at}"),
        None => format!("the process that tried the PIN at {at} ended before it knew whether it is the right one"),
    }
}

/// Whether a PIN has not been tried since one worked.
pub(super) fn is_new(record: &PinRecord, hash: Option<&str>) -> bool {
    !record.refused.iter().any(|known| known.may_be(hash))
}

/// The record while a PIN is being tried, and when it was refused.
pub(super) fn with(record: &PinRecord, refused: RefusedPin) -> PinRecord {
    let mut record = PinRecord { retry: false, ..record.clone() };
    record.refused.retain(|known| !known.may_be(refused.hash.as_deref()));
    record.refused.push(refused);
    record
}

pub(super) fn with_worked(record: PinRecord, hash: String) -> PinRecord {
    PinRecord { worked: Some(hash), refused: Vec::new(), retry: false, ..record }
}

pub(super) fn hash_of(record: &PinRecord, pin: &SecretString) -> String {
    let mut hash = [0; 32];
    pbkdf2::pbkdf2_hmac::<Sha256>(pin.expose_secret().as_bytes(), record.salt.as_bytes(), record.rounds, &mut hash);
    base16ct::lower::encode_string(&hash)
}

pub(super) fn now() -> Timestamp {
    let now = Timestamp::now();
    Timestamp::from_second(now.as_second()).unwrap_or(now)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
mod tests {
    use super::*;

    #[test]
    fn a_hash_is_of_this_pin_in_this_file() {
        let hashes = [("1234", "00"), ("1235", "00"), ("1234", "01")].map(|(pin, salt)| {
            hash_of(
                &PinRecord { salt: salt.into(), rounds: 1, ..new_record("t".into()).unwrap() },
                &SecretString::from(pin),
            )
        });
        assert!(hashes.iter().all(|hash| hash.len() == 64) && hashes[0] != hashes[1] && hashes[0] != hashes[2]);
    }
}
