//! What no log, metric or message may show: the PINs, tokens and plaintexts that these tests have used so far, and the data
//! keys of a stand-in for Transit, in every form in which a program would write them. Whoever gets hold of a text of the
//! plugin's has it looked through. The containers' tests look for PINs and seed in the journal, those of Go for the PIN.

use std::collections::BTreeSet;
use std::sync::Mutex;

use base64ct::{Base64, Encoding};

static USED: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());

/// Shorter ones are in any text by chance.
const LENGTHS: std::ops::RangeInclusive<usize> = 8..=4096;
/// Of all forms. The suite uses a few hundred secrets; each text is looked through for all of them.
const MOST: usize = 5_000;

/// Remembers a secret. Panics rather than forget one.
pub fn used(secret: &[u8]) {
    if !LENGTHS.contains(&secret.len()) || secret.iter().all(|byte| *byte == secret[0]) {
        return;
    }
    let mut used = USED.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    assert!(used.len() < MOST, "{MOST} secrets are remembered: use fewer different ones, or raise MOST");
    used.extend(std::str::from_utf8(secret).ok().map(|text| text.trim_end().to_owned()));
    used.insert(base16ct::lower::encode_string(secret));
    used.insert(Base64::encode_string(secret));
    used.insert(format!("{secret:?}").trim_matches(['[', ']']).to_owned()); // as Debug shows bytes
}

/// Panics if it shows one.
pub fn assert_shows_none(text: &str) {
    let used = USED.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if let Some(secret) = used.iter().find(|secret| text.contains(secret.as_str())) {
        panic!("the secret {secret} is shown in:\n{text}");
    }
}

#[test]
fn a_secret_is_found_in_every_form() {
    let secret = b"\x01not-a-real-secret\xff";
    used(secret);
    for form in [format!("{secret:?}"), Base64::encode_string(secret), base16ct::lower::encode_string(secret)] {
        assert!(std::panic::catch_unwind(|| assert_shows_none(&format!("INFO {form} done"))).is_err(), "{form}");
    }
    assert_shows_none("INFO done");
}
