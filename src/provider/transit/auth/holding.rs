//! How long a login that was refused is not tried again. Pure: from what is remembered to an instant.
//!
//! Vault and OpenBao count the refused logins of a role. The count begins anew when a quarter of an hour has passed since
//! the last one, and the fifth locks the role, for every host that has it. So five of them that lock it lie within an hour:
//! if each host shows the same once in more than that, four hosts at most show it four times. What is shown anew is
//! tried at once, but only as the second of a host's within that quarter of an hour.

use jiff::{SignedDuration, Timestamp};

use crate::state::RefusedLogin;

/// By how much a refused login must be later than the one before to be the first of a new count; the role is locked for
/// as long.
const WINDOW: SignedDuration = SignedDuration::from_mins(15);
/// How long the same is not shown again: more than the four windows that lie between five refused logins.
const HOLD: SignedDuration = SignedDuration::from_mins(65);
/// How many refused logins of this host may fall into one window, whatever was shown.
const MOST_REFUSED: usize = 2;

/// What keeps a login back.
#[derive(Debug)]
pub(super) struct Held<'r> {
    pub(super) login: &'r RefusedLogin,
    pub(super) until: Timestamp,
    /// Whether something else would be shown before.
    pub(super) is_another_tried: bool,
}

/// Whether this is not to be shown now, since these logins were refused.
pub(super) fn held<'r>(refused: &'r [RefusedLogin], shown: &str, now: Timestamp) -> Option<Held<'r>> {
    let recent: Vec<&RefusedLogin> = refused.iter().filter(|login| after(login, WINDOW) > now).collect();
    let is_another_tried = recent.len() < MOST_REFUSED;
    let of_same = refused.iter().filter(|login| login.shown == shown).map(|login| (login, end_of_hold(login)));
    let same = of_same.filter(|(_, until)| *until > now).max_by_key(|(_, until)| *until);
    let any = || recent.first().filter(|_| !is_another_tried).map(|login| (*login, after(login, WINDOW)));
    same.or_else(any).map(|(login, until)| Held { login, until, is_another_tried })
}

/// Whether this may keep a login back now.
pub(super) fn is_remembered(login: &RefusedLogin, now: Timestamp) -> bool {
    end_of_hold(login).max(after(login, WINDOW)) > now
}

fn end_of_hold(login: &RefusedLogin) -> Timestamp {
    after(login, if login.is_locked { WINDOW } else { HOLD })
}

fn after(login: &RefusedLogin, time: SignedDuration) -> Timestamp {
    login.at.saturating_add(time).unwrap_or(Timestamp::MAX)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn minute(minute: i64) -> Timestamp {
        Timestamp::constant(1_800_000_000, 0) + SignedDuration::from_mins(minute)
    }

    fn refused(at: i64, shown: &str, is_locked: bool) -> RefusedLogin {
        RefusedLogin { at: minute(at), shown: shown.into(), is_locked }
    }

    #[test]
    fn each_login_is_held_back_as_long_as_it_must() {
        // (what was refused, what is to be shown, when, until when that is held, whether another would be shown)
        type Case<'c> = (&'c [RefusedLogin], &'c str, i64, Option<(i64, bool)>);
        let cases: &[Case<'_>] = &[
            (&[], "a", 0, None),
            (&[refused(0, "a", false)], "a", 1, Some((65, true))),
            (&[refused(0, "a", false)], "a", 64, Some((65, true))),
            (&[refused(0, "a", false)], "a", 65, None),
            (&[refused(0, "a", false)], "b", 1, None),
            (&[refused(0, "a", false), refused(1, "b", false)], "c", 2, Some((15, false))),
            (&[refused(0, "a", false), refused(1, "b", false)], "c", 15, None),
            (&[refused(0, "a", false), refused(1, "b", false)], "b", 15, Some((66, true))),
            (&[refused(0, "a", true)], "a", 14, Some((15, true))),
            (&[refused(0, "a", true)], "a", 15, None),
        ];
        for (refused, shown, at, expected) in cases {
            let found = held(refused, shown, minute(*at));
            let found = found.map(|held| (held.until, held.is_another_tried));
            let expected = expected.map(|(until, another)| (minute(until), another));
            assert_eq!(found, expected, "{refused:?}, {shown} at {at}");
            let is_kept = refused.iter().any(|login| is_remembered(login, minute(*at)));
            assert!(expected.is_none() || is_kept, "{refused:?} at {at} is forgotten");
        }
    }

    /// As Vault does it (`failedUserLoginProcess`).
    #[derive(Default)]
    struct Role {
        count: u32,
        last: Option<Timestamp>,
    }

    impl Role {
        fn refuses(&mut self, at: Timestamp) -> bool {
            let is_new_count = self.last.is_none_or(|last| at > last + WINDOW);
            self.count = if is_new_count { 1 } else { self.count + 1 };
            self.last = Some(at);
            self.count >= 5
        }
    }

    #[test]
    fn no_number_of_hosts_up_to_four_locks_the_role_whenever_they_were_started() {
        let starts: &[&[i64]] = &[
            &[0],
            &[0, 0],
            &[0, 8],
            &[0, 0, 0],
            &[0, 15, 30],
            &[0, 14, 28],
            &[0, 21, 43],
            &[0, 1, 2, 3],
            &[0, 15, 30, 45],
            &[0, 16, 32, 48],
            &[0, 14, 28, 42],
        ];
        for starts in starts {
            let (mut role, mut hosts) = (Role::default(), vec![Vec::new(); starts.len()]);
            for now in 0..24 * 60 {
                let due = hosts.iter_mut().zip(*starts).filter(|(_, start)| **start <= now);
                for (host, _) in due {
                    if held(host, "wrong", minute(now)).is_none() {
                        host.push(refused(now, "wrong", false));
                        assert!(!role.refuses(minute(now)), "{starts:?}: locked in minute {now}");
                    }
                }
            }
        }
    }
}
