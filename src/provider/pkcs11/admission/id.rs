//! CKA_IDs of ours: each is a UUIDv7 (RFC 9562 section 5.7), whose time is the KEK's activation instant.

use jiff::{SignedDuration, Timestamp};

/// No CKA_ID of ours is older: this plugin did not exist.
const EPOCH: Timestamp = Timestamp::constant(1_735_689_600, 0); // 2025-01-01
/// A KEK may be made this long before it becomes active.
pub const LONGEST_WAIT: SignedDuration = SignedDuration::from_hours(30 * 24);

/// The activation instant in a CKA_ID: it is a UUIDv7 (RFC 9562 section 5.7).
pub(in super::super) fn instant_of(id: &[u8], now: Timestamp) -> Result<Timestamp, String> {
    let [a, b, c, d, e, f, version, _, variant, ..] = *id else {
        return Err(foreign_id("is not a UUIDv7"));
    };
    if id.len() != 16 || version >> 4 != 7 || variant >> 6 != 2 {
        return Err(foreign_id("is not a UUIDv7"));
    }
    let milliseconds = i64::from_be_bytes([0, 0, a, b, c, d, e, f]);
    let instant = Timestamp::from_millisecond(milliseconds).map_err(|_| foreign_id("names no instant"))?;
    if instant < EPOCH || instant > now.saturating_add(LONGEST_WAIT).unwrap_or(Timestamp::MAX) {
        return Err(foreign_id(&format!("names the instant {instant}, not one from 2025 to 30 days ahead")));
    }
    Ok(instant)
}

fn foreign_id(what: &str) -> String {
    format!("its CKA_ID {what}: if you made this key elsewhere, admit it with [[provider.kek]] id and not-before")
}

/// A CKA_ID for a KEK that becomes active at `instant`: a UUIDv7 of that time.
///
/// # Errors
/// The operating system has no randomness to give.
pub(in super::super) fn new_id(instant: Timestamp) -> Result<[u8; 16], getrandom::Error> {
    let mut id = [0; 16];
    getrandom::fill(&mut id)?;
    let time = (instant.as_millisecond().max(0) as u64) << 16;
    for (to, from) in id.iter_mut().zip(time.to_be_bytes()).take(6) {
        *to = from;
    }
    let [.., version, _, variant, _, _, _, _, _, _, _] = &mut id;
    *version = *version & 0x0f | 0x70;
    *variant = *variant & 0x3f | 0x80;
    Ok(id)
}
