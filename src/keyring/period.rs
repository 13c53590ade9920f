//! How long a KEK wraps: its period begins at its instant and ends `keyring.max-age` later. Nothing stops when it is
//! over; whoever can make a new KEK is told, and in good time.

use std::collections::HashMap;
use std::fmt;
use std::time::{Duration, Instant};

use jiff::{SignedDuration, Timestamp};

use super::Keyring;
use crate::identity::Identity;

/// How long before its end at most a period is called near it.
const NOTICE: SignedDuration = SignedDuration::from_hours(14 * 24);
/// How often somebody is reminded.
const REMIND_EVERY: Duration = Duration::from_secs(24 * 3600);

/// An active KEK whose period is over, or will be soon, and no other is to become active by then.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Aged {
    provider: String,
    kek: Identity,
    ends: Timestamp,
    is_over: bool,
}

impl fmt::Display for Aged {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { provider, kek, ends, is_over } = self;
        let verb = if *is_over { "ended" } else { "ends" };
        write!(f, "the period of KEK {kek} of provider {provider} {verb} at {ends} (keyring.max-age): ")?;
        f.write_str("make a new one with `trousseau key generate`")
    }
}

impl Keyring {
    /// When the period of a KEK ends that is active from this instant.
    pub(super) fn end_of_period(&self, not_before: Timestamp) -> Option<Timestamp> {
        not_before.saturating_add(self.max_age?).ok()
    }

    /// The active KEKs whose period is over or nearly so, as of the last look; no mark is moved.
    #[must_use]
    pub fn aged(&self, now: Timestamp) -> Vec<Aged> {
        let Some(max_age) = self.max_age else { return Vec::new() };
        let mut all = Vec::new();
        for member in self.members.iter().filter(|member| member.seals) {
            let Ok((active, _)) = self.active_of(member, now) else { continue };
            let Ok(kek) = active.kek else { continue };
            let next =
                member.seen().keks.iter().map(|kek| kek.rank().not_before).filter(|instant| *instant > now).min();
            if let Some((ends, is_over)) = aged(kek.rank().not_before, max_age, next, now) {
                let provider = member.provider.name().to_owned();
                all.push(Aged { provider, kek: active.identity, ends, is_over });
            }
        }
        all
    }
}

/// The end of a period, and whether it is past, unless that is far away or the `next` KEK comes first.
fn aged(
    begins: Timestamp,
    max_age: SignedDuration,
    next: Option<Timestamp>,
    now: Timestamp,
) -> Option<(Timestamp, bool)> {
    let ends = begins.saturating_add(max_age).ok()?;
    let notice = NOTICE.min(max_age / 8);
    let is_near = now >= ends.saturating_sub(notice).ok()?;
    let is_provided_for = next.is_some_and(|next| next <= ends);
    (is_near && !is_provided_for).then_some((ends, now >= ends))
}

/// Who was told what, so that a log is not filled with it.
#[derive(Default)]
pub struct Reminder(HashMap<(Identity, bool), Instant>);

impl Reminder {
    /// Those of whom something new is to be told, or of whom it was told a day ago.
    pub fn due<'a>(&mut self, aged: &'a [Aged], now: Instant) -> Vec<&'a Aged> {
        let Self(told) = self;
        told.retain(|_, at| now.duration_since(*at) < REMIND_EVERY);
        let mut is_new = |one: &&Aged| {
            let is_new = !told.contains_key(&(one.kek, one.is_over));
            told.entry((one.kek, one.is_over)).or_insert(now);
            is_new
        };
        aged.iter().filter(|one| is_new(one)).collect()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn day(day: i64) -> Timestamp {
        Timestamp::constant(1_800_000_000, 0) + SignedDuration::from_hours(24 * day)
    }

    #[test]
    fn the_end_of_a_period_is_told_in_good_time_and_not_when_it_is_provided_for() {
        // (max-age in days, the next KEK, days of age, what is told of the end)
        let cases: &[(i64, Option<i64>, i64, Option<bool>)] = &[
            (90, None, 0, None),
            (90, None, 78, None), // an eighth of 90 days is less than a fortnight
            (90, None, 79, Some(false)),
            (90, None, 89, Some(false)),
            (90, None, 90, Some(true)),
            (90, None, 400, Some(true)),
            (90, Some(85), 80, None),
            (90, Some(90), 80, None),
            (90, Some(95), 80, Some(false)), // it comes too late
            (90, Some(95), 91, Some(true)),
            (365, None, 350, None), // a fortnight is enough
            (365, None, 351, Some(false)),
        ];
        for (max_age, next, age, told) in cases {
            let max_age = SignedDuration::from_hours(24 * max_age);
            let found = aged(day(0), max_age, next.map(day), day(*age));
            assert_eq!(found.map(|(_, is_over)| is_over), *told, "{max_age:#}, {next:?}, day {age}");
        }
        assert_eq!(aged(day(5), SignedDuration::from_hours(24), None, day(0)), None, "a first KEK before its instant");
    }

    #[test]
    fn one_is_reminded_once_a_day_and_when_the_period_ends() {
        let of = |kek: u8, is_over| Aged {
            provider: "hsm".into(),
            kek: Identity::from_bytes([kek; 16]),
            ends: day(0),
            is_over,
        };
        let (mut reminder, start) = (Reminder::default(), Instant::now());
        // (hours since the start, what is the case, how much of it is told)
        for (hour, aged, told) in [
            (0, vec![], 0),
            (0, vec![of(1, false)], 1),
            (1, vec![of(1, false)], 0),
            (23, vec![of(1, false), of(2, true)], 1),
            (24, vec![of(1, false), of(2, true)], 1),
            (25, vec![of(1, true), of(2, true)], 1),
            (26, vec![of(1, true), of(2, true)], 0),
            (49, vec![of(1, true), of(2, true)], 2),
        ] {
            let now = start + Duration::from_secs(hour * 3600);
            assert_eq!(reminder.due(&aged, now).len(), told, "hour {hour}");
        }
    }
}
