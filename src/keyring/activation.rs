//! Which KEK of a provider is active: a pure function of what every host sees alike, so that all hosts agree without
//! talking to each other.

use jiff::Timestamp;

use crate::provider::Rank;

/// Chooses among the KEKs that were seen, given the one that this host last made active.
///
/// Active is the highest whose instant has come; if none has, the lowest. A host never goes back below its mark: not
/// when its clock steps back, and not when a token returns from an older copy. `None`: there is no KEK, or only lower
/// ones than the mark, which is not to be seen.
#[must_use]
pub fn choose<'a, K>(seen: &'a [K], rank: impl Fn(&K) -> &Rank, mark: Option<&Rank>, now: Timestamp) -> Option<&'a K> {
    let due = seen.iter().filter(|kek| rank(kek).not_before <= now).max_by_key(|kek| rank(kek));
    let by_time = due.or_else(|| seen.iter().min_by_key(|kek| rank(kek)));
    let Some(mark) = mark else { return by_time };
    // By its id: a configuration may have given the marked KEK another instant since.
    match seen.iter().find(|kek| rank(kek).id == mark.id) {
        Some(marked) => by_time.filter(|kek| rank(kek) > rank(marked)).or(Some(marked)),
        None => by_time.filter(|kek| rank(kek) >= mark),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::constant(1_800_000_000 + second, 0)
    }

    fn rank((second, id): (i64, u8)) -> Rank {
        Rank { not_before: at(second), id: vec![id] }
    }

    /// One host: what it remembers, and what it would answer.
    #[derive(Default)]
    struct Host {
        mark: Option<Rank>,
    }

    impl Host {
        /// The id of the active KEK; `None` if Encrypt is unavailable.
        fn active(&mut self, seen: &[(i64, u8)], second: i64) -> Option<u8> {
            let seen: Vec<Rank> = seen.iter().copied().map(rank).collect();
            let active = choose(&seen, |rank| rank, self.mark.as_ref(), at(second))?;
            self.mark = Some(active.clone());
            active.id.first().copied()
        }
    }

    /// A second of one host's life: which KEKs it sees, the clock, and the KEK that must be active.
    type Step<'a> = (&'a [(i64, u8)], i64, Option<u8>);

    #[test]
    fn the_rule_holds_through_a_hosts_life() {
        const FIRST: (i64, u8) = (100, 1);
        const SECOND: (i64, u8) = (200, 2);
        const TWIN: (i64, u8) = (100, 9);
        let lives: &[(&str, &[Step<'_>])] = &[
            ("no KEK yet", &[(&[], 0, None), (&[FIRST], 100, Some(1))]),
            ("a first KEK serves before its instant", &[(&[FIRST], 0, Some(1)), (&[FIRST], 150, Some(1))]),
            (
                "a second KEK before the first's delay is over",
                &[
                    (&[FIRST], 0, Some(1)),
                    (&[FIRST, SECOND], 50, Some(1)),
                    (&[FIRST, SECOND], 150, Some(1)),
                    (&[FIRST, SECOND], 200, Some(2)),
                ],
            ),
            (
                "two hosts each make the first KEK at one moment: the higher id wins on both",
                &[(&[FIRST], 100, Some(1)), (&[FIRST, TWIN], 101, Some(9)), (&[TWIN, FIRST], 102, Some(9))],
            ),
            (
                "the clock steps back and forth",
                &[
                    (&[FIRST, SECOND], 250, Some(2)),
                    (&[FIRST, SECOND], 150, Some(2)),
                    (&[FIRST, SECOND], 0, Some(2)),
                    (&[FIRST, SECOND], 300, Some(2)),
                ],
            ),
            (
                "the clock is an hour ahead and then set right: the switch is early, and there is only one",
                &[
                    (&[FIRST, SECOND], 3_650, Some(2)),
                    (&[FIRST, SECOND], 60, Some(2)),
                    (&[FIRST, SECOND], 3_660, Some(2)),
                    (&[FIRST, SECOND], 200, Some(2)),
                ],
            ),
            (
                "the clock is an hour behind and then set right: the switch is late, and there is only one",
                &[
                    (&[FIRST, (4_000, 2)], 400, Some(1)),
                    (&[FIRST, (4_000, 2)], 4_000, Some(2)),
                    (&[FIRST, (4_000, 2)], 410, Some(2)),
                ],
            ),
            (
                "the token is restored from an older copy, then from the right one",
                &[(&[FIRST, SECOND], 250, Some(2)), (&[FIRST], 260, None), (&[FIRST, SECOND], 270, Some(2))],
            ),
            (
                "the configuration gives the active KEK an earlier instant: it stays until that puts another above it",
                &[
                    (&[FIRST, SECOND], 250, Some(2)),
                    (&[FIRST, (150, 2)], 260, Some(2)),
                    (&[FIRST, (50, 2)], 270, Some(1)),
                ],
            ),
            (
                "an older copy, and then a new KEK",
                &[(&[FIRST, SECOND], 250, Some(2)), (&[FIRST], 260, None), (&[FIRST, (300, 3)], 300, Some(3))],
            ),
            ("an empty token is not a new beginning", &[(&[FIRST], 100, Some(1)), (&[], 110, None)]),
            (
                "a KEK that appears with an earlier instant does not take over",
                &[(&[SECOND], 250, Some(2)), (&[FIRST, SECOND], 260, Some(2))],
            ),
        ];
        for (life, steps) in lives {
            let mut host = Host::default();
            for (n, (seen, second, expected)) in steps.iter().enumerate() {
                // A restart between any two steps changes nothing: the mark is all that a host remembers.
                assert_eq!(host.active(seen, *second), *expected, "{life}, step {n}");
            }
        }
    }

    proptest! {
        #[test]
        fn a_clock_that_is_an_hour_off_now_and_then_makes_each_kek_active_once_at_most(
            keks in prop::collection::btree_map(any::<u8>(), 0i64..7200, 1..6),
            off in prop::collection::vec((-1i64..=1, 1i64..600), 1..60),
        ) {
            let keks: Vec<(i64, u8)> = keks.into_iter().map(|(id, second)| (second, id)).collect();
            let (mut host, mut second, mut was_active) = (Host::default(), 0, Vec::new());
            for (hours, step) in off {
                second += step;
                let active = host.active(&keks, second + hours * 3600);
                if was_active.last() != Some(&active) {
                    prop_assert!(!was_active.contains(&active), "{active:?} again after {was_active:?}");
                    was_active.push(active);
                }
            }
        }

        #[test]
        fn a_host_never_goes_back_and_all_hosts_agree_in_the_end(
            keks in prop::collection::btree_map(any::<u8>(), 0i64..1000, 1..6),
            clock in prop::collection::vec(0i64..1000, 1..20),
        ) {
            let keks: Vec<(i64, u8)> = keks.into_iter().map(|(id, second)| (second, id)).collect();
            let (mut wandering, mut fresh) = (Host::default(), Host::default());
            let mut last = None;
            for second in clock {
                wandering.active(&keks, second);
                prop_assert!(wandering.mark >= last);
                last = wandering.mark.clone();
            }
            prop_assert_eq!(wandering.active(&keks, 1000), fresh.active(&keks, 1000));
        }
    }
}
