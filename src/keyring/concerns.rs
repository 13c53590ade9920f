//! What is not wrong yet and somebody should see to: an active KEK that gets old, and a clock that cannot be right.
//!
//! A KEK's period begins at its instant and ends `keyring.max-age` later. Nothing stops when it is over; whoever can
//! make a new KEK is told, and in good time.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use jiff::{SignedDuration, Timestamp};

use super::{Keyring, activation};
use crate::state::Gap;

/// How long before its end at most a period is called near it.
const NOTICE: SignedDuration = SignedDuration::from_hours(14 * 24);
/// How often somebody is reminded.
const REMIND_EVERY: Duration = Duration::from_secs(24 * 3600);

impl Keyring {
    /// When the period of a KEK ends that is active from this instant.
    pub(super) fn end_of_period(&self, not_before: Timestamp) -> Option<Timestamp> {
        not_before.saturating_add(self.max_age?).ok()
    }

    /// What somebody should see to, as of the last look, each with what to do; no mark is moved.
    #[must_use]
    pub fn concerns(&self, now: Timestamp) -> Vec<String> {
        let mut concerns: Vec<String> = self.envelope_gaps(now).iter().map(Gap::concern).collect();
        let is_served = self.nothing_active(now).is_none();
        for member in self.members.iter().filter(|member| member.seals) {
            let Ok((active, _)) = self.active_of(member, now) else { continue };
            let kek = match active.kek {
                Ok(kek) => kek,
                Err(why) => {
                    concerns.extend((active.is_refused && is_served).then(|| why.to_string()));
                    continue;
                }
            };
            let (provider, identity, since) = (member.provider.name(), active.identity, kek.rank().not_before);
            let seen = member.seen();
            let next = seen.keks.iter().map(|kek| kek.rank().not_before).filter(|instant| *instant > now).min();
            if let Some(ends) = self.end_of_period(since)
                && is_due(since, ends, next, now)
            {
                let verb = if ends <= now { "ended" } else { "ends" };
                concerns.push(format!(
                    "the period of KEK {identity} of provider {provider} {verb} at {ends} (keyring.max-age): make a \
                     new one with `{}`",
                    member.provider.how_to_rotate()
                ));
            }
            let by_time = activation::choose(&seen.keks, |kek| kek.rank(), None, now);
            if since > now && by_time.is_some_and(|by_time| by_time.identity() != identity) {
                concerns.push(format!(
                    "KEK {identity} of provider {provider} became active on this host although its instant, {since}, \
                     has not come: the clock is wrong, or was; the KEK stays active. See `timedatectl`"
                ));
            }
        }
        concerns
    }
}

/// Whether a period has ended or is near its end, and the `next` KEK does not come before that.
fn is_due(begins: Timestamp, ends: Timestamp, next: Option<Timestamp>, now: Timestamp) -> bool {
    let notice = NOTICE.min(ends.duration_since(begins) / 8);
    let is_provided_for = next.is_some_and(|next| next <= ends);
    ends.duration_since(now) <= notice && !is_provided_for
}

/// Remembers what was told when, so that a log is not filled with it.
#[derive(Default)]
pub struct Reminder(HashMap<String, Instant>);

impl Reminder {
    /// Those that are new, or were told a day ago.
    pub fn due<'a>(&mut self, concerns: &'a [String], now: Instant) -> Vec<&'a str> {
        let Self(told) = self;
        told.retain(|_, at| now.duration_since(*at) < REMIND_EVERY);
        let mut due = Vec::new();
        for concern in concerns {
            told.entry(concern.clone()).or_insert_with(|| {
                due.push(concern.as_str());
                now
            });
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn day(day: i64) -> Timestamp {
        Timestamp::constant(1_800_000_000, 0) + SignedDuration::from_hours(24 * day)
    }

    #[test]
    fn the_end_of_a_period_is_told_in_good_time_and_not_when_it_is_provided_for() {
        // (max-age in days, the next KEK, days of age, whether the end is told)
        let cases: &[(i64, Option<i64>, i64, bool)] = &[
            (90, None, -1, false), // a first KEK serves before its instant
            (90, None, 0, false),
            (90, None, 78, false), // an eighth of 90 days is less than a fortnight
            (90, None, 79, true),
            (90, None, 90, true),
            (90, None, 400, true),
            (90, Some(85), 80, false),
            (90, Some(90), 80, false),
            (90, Some(95), 80, true), // it comes too late
            (90, Some(95), 91, true),
            (365, None, 350, false), // a fortnight is enough
            (365, None, 351, true),
        ];
        for (max_age, next, age, told) in cases {
            let is_due = is_due(day(0), day(*max_age), next.map(day), day(*age));
            assert_eq!(is_due, *told, "{max_age} days, {next:?}, day {age}");
        }
    }

    #[test]
    fn one_is_reminded_once_a_day() {
        let (mut reminder, start) = (Reminder::default(), Instant::now());
        // (hours since the start, what is the case, how much of it is told)
        let cases: &[(u64, &[&str], usize)] = &[
            (0, &[], 0),
            (0, &["it ends"], 1),
            (1, &["it ends"], 0),
            (23, &["it ends", "another"], 1),
            (24, &["it ends", "another"], 1),
            (25, &["it ended", "another"], 1),
            (26, &["it ended", "another"], 0),
            (49, &["it ended", "another"], 2),
        ];
        for (hour, concerns, told) in cases {
            let concerns: Vec<String> = concerns.iter().map(ToString::to_string).collect();
            let now = start + Duration::from_secs(hour * 3600);
            assert_eq!(reminder.due(&concerns, now).len(), *told, "hour {hour}");
        }
    }
}
