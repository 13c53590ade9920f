//! What the figures mean: what is the limit, and how many sessions there should be.
//!
//! The rule. By Little's law n sessions do n ÷ (time of a call) a second; so much is measured of the token alone, for
//! several n. *Enough* sessions are the fewest that bring 95 % of the most that the token did with any number.
//! - The token alone: the sessions are the limit if twice as many still brought a tenth more at the end, else the token.
//! - A plugin that reached 90 % of what its sessions can do: the sessions are the limit if the token does a tenth more
//!   with enough of them, else the token.
//! - A plugin that reached less: the load was too small if it was less than two requests a session, else the service is
//!   the limit. As many sessions as do alone what it reached are enough then.
//! - A plugin that reached a fifth more than its sessions and one more can do: nothing can be said.
//!
//! While the sessions are the limit and throughput still rises at the last step, how many are enough is not known.

use serde::Serialize;

use super::Call;
use super::figures::time;

const ENOUGH: f64 = 0.95;
const REACHED: f64 = 0.9;
const MORE: f64 = 1.1;
const TOO_MUCH: f64 = 1.2;
/// With fewer requests in flight a session may wait for its next one.
const REQUESTS_PER_SESSION: usize = 2;

/// What the token alone did with so many sessions at a time.
#[derive(Clone, Copy, Debug)]
pub(super) struct Step {
    pub(super) sessions: usize,
    pub(super) per_second: f64,
    pub(super) call_micros: f64,
}

/// What a plugin did.
#[derive(Clone, Copy, Debug)]
pub(super) enum Reached {
    /// The most with any number of requests in flight, and the greatest such number.
    InFlight { per_second: f64, in_flight: usize },
    /// Requests came at this rate, whatever had been answered.
    Rate { per_second: f64, p99_micros: f64 },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Limit {
    Token,
    Sessions,
    Service,
    Load,
    /// What was measured contradicts itself.
    Unknown,
}

#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Verdict {
    call: Call,
    pub(super) limit: Limit,
    /// What `sessions` should be, where that can be said.
    pub(super) sessions: Option<usize>,
    pub(super) words: String,
}

/// So many sessions, in words.
pub(super) fn counted(sessions: usize) -> String {
    format!("{sessions} session{}", if sessions == 1 { "" } else { "s" })
}

/// Whether twice the sessions still brought a tenth more at the last of these steps, which ascend.
pub(super) fn still_rises(steps: &[Step]) -> bool {
    let Some(last) = steps.last() else { return true };
    let half = steps.iter().rfind(|step| step.sessions * 2 <= last.sessions);
    half.is_none_or(|half| last.per_second >= half.per_second * MORE)
}

/// The first of these steps that brings so many a second.
fn first_with(steps: &[Step], per_second: f64) -> Option<Step> {
    steps.iter().find(|step| step.per_second >= per_second).copied()
}

fn enough(steps: &[Step]) -> Option<Step> {
    let most = steps.iter().map(|step| step.per_second).fold(0.0, f64::max);
    first_with(steps, most * ENOUGH)
}

/// On a token alone. `None`: nothing was measured.
pub(super) fn on_token(call: Call, steps: &[Step]) -> Option<Verdict> {
    let (first, last, enough) = (steps.first()?, steps.last()?, enough(steps)?);
    let rises = still_rises(steps);
    let one = format!("{call:?}: one call takes {}; throughput", time(first.call_micros));
    let words = match rises {
        true => format!(
            "{one} still rises at {} ({:.0}/s), and more were not tried: the sessions are the limit",
            counted(last.sessions),
            last.per_second
        ),
        false => format!(
            "{one} rises up to {} ({:.0}/s) and not beyond: the token is the limit there",
            counted(enough.sessions),
            enough.per_second
        ),
    };
    let limit = if rises { Limit::Sessions } else { Limit::Token };
    Some(Verdict { call, limit, sessions: (!rises).then_some(enough.sessions), words })
}

/// On a plugin with so many sessions. `None`: the token was not measured with so many.
pub(super) fn on_plugin(call: Call, reached: Reached, sessions: usize, steps: &[Step]) -> Option<Verdict> {
    let own = steps.iter().find(|step| step.sessions == sessions)?;
    let enough = enough(steps)?;
    let percent = |per_second: f64| 100.0 * per_second / own.per_second;
    let can = format!(
        "of what its {} can do ({:.0}/s at {} a call)",
        counted(sessions),
        own.per_second,
        time(own.call_micros)
    );
    let (per_second, in_flight) = match reached {
        Reached::InFlight { per_second, in_flight } => (per_second, in_flight),
        Reached::Rate { per_second, p99_micros } => {
            let times = p99_micros / own.call_micros;
            let words =
                format!("{call:?}: {per_second:.0}/s is {:.0} % {can}; P99 is {times:.2} calls", percent(per_second));
            return Some(Verdict { call, limit: Limit::Load, sessions: None, words });
        }
    };
    let least = sessions * REQUESTS_PER_SESSION;
    // The plugin itself calls in one session more, for a quick token.
    if per_second > own.per_second * TOO_MUCH * (sessions + 1) as f64 / sessions as f64 {
        let why = "no token does so: it was measured too unevenly; measure again, for longer with --time";
        let words = format!("{call:?}: the plugin reached {:.0} % {can}: {why}", percent(per_second));
        return Some(Verdict { call, limit: Limit::Unknown, sessions: None, words });
    }
    let fewest = first_with(steps, per_second).map_or(sessions, |step| step.sessions).min(sessions);
    let (limit, sessions, why) = if per_second >= own.per_second * REACHED {
        if enough.per_second >= own.per_second * MORE {
            let why =
                format!("the sessions are the limit, and {} would do {:.0}/s", enough.sessions, enough.per_second);
            (Limit::Sessions, (!still_rises(steps)).then_some(enough.sessions), why)
        } else {
            (Limit::Token, Some(enough.sessions), "the token is the limit, and more sessions bring no more".into())
        }
    } else if in_flight < least {
        let why = format!("the load was the limit, and --in-flight {least} keeps the sessions busy");
        (Limit::Load, None, why)
    } else {
        let why = "the service is the limit, which needs CPU, and more sessions bring no more".to_owned();
        (Limit::Service, Some(fewest), why)
    };
    let words = format!("{call:?}: the plugin reached {:.0} % {can}: {why}", percent(per_second));
    Some(Verdict { call, limit, sessions, words })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// Steps of a token that does so many a second with so many sessions.
    fn steps(of: &[(usize, f64)]) -> Vec<Step> {
        let step =
            |&(sessions, per_second)| Step { sessions, per_second, call_micros: sessions as f64 * 1e6 / per_second };
        of.iter().map(step).collect()
    }

    /// 5 ms a call; eight at a time and no more.
    const EIGHT: [(usize, f64); 5] = [(1, 200.0), (2, 400.0), (4, 799.0), (8, 1560.0), (16, 1590.0)];
    /// 5 ms a call, as many at a time as one likes.
    const ANY: [(usize, f64); 4] = [(1, 200.0), (2, 400.0), (4, 800.0), (8, 1600.0)];
    /// One call at a time; more sessions are in each other's way.
    const ONE: [(usize, f64); 3] = [(1, 90_000.0), (2, 60_000.0), (4, 55_000.0)];

    #[test]
    fn the_token_alone() {
        for (of, limit, sessions, words) in [
            (
                &EIGHT[..],
                Limit::Token,
                Some(8),
                "one call takes 5 ms; throughput rises up to 8 sessions (1560/s) and not beyond",
            ),
            (
                &ANY[..],
                Limit::Sessions,
                None,
                "still rises at 8 sessions (1600/s), and more were not tried: the sessions are the limit",
            ),
            (&ONE[..], Limit::Token, Some(1), "rises up to 1 session ("),
            (&ONE[..1], Limit::Sessions, None, "still rises at 1 session ("),
            // 33 are not twice 32.
            (&[(16, 3200.0), (32, 6300.0), (33, 6400.0)][..], Limit::Sessions, None, "still rises at 33"),
        ] {
            let verdict = on_token(Call::Decrypt, &steps(of)).unwrap();
            assert_eq!((verdict.limit, verdict.sessions), (limit, sessions), "{of:?}");
            assert!(verdict.words.contains(words), "{}", verdict.words);
        }
        assert!(on_token(Call::Decrypt, &[]).is_none());
    }

    #[test]
    fn a_plugin() {
        let in_flight = |per_second, in_flight| Reached::InFlight { per_second, in_flight };
        let rate = |per_second, p99_micros| Reached::Rate { per_second, p99_micros };
        for (reached, sessions, of, limit, advised, words) in [
            (
                in_flight(775.0, 16),
                4,
                &EIGHT[..],
                Limit::Sessions,
                Some(8),
                "97 % of what its 4 sessions can do (799/s at 5.0 ms a call): the sessions are the limit, and 8 would do 1560/s",
            ),
            (in_flight(1500.0, 16), 8, &EIGHT[..], Limit::Token, Some(8), "96 %"),
            (in_flight(1500.0, 64), 16, &EIGHT[..], Limit::Token, Some(8), "the token is the limit"),
            (in_flight(20_000.0, 64), 4, &ONE[..], Limit::Service, Some(1), "36 %"),
            (in_flight(700.0, 64), 8, &ANY[..], Limit::Service, Some(4), "the service is the limit"),
            (in_flight(790.0, 4), 8, &EIGHT[..], Limit::Load, None, "--in-flight 16 keeps"),
            // Few requests, and yet enough.
            (in_flight(198.0, 1), 1, &ANY[..], Limit::Sessions, None, "and 8 would do 1600/s"),
            // The service of a quick token calls in a session of its own, too.
            (in_flight(210.0, 64), 1, &[(1, 200.0)][..], Limit::Token, Some(1), "105 %"),
            (
                in_flight(6000.0, 64),
                4,
                &ANY[..],
                Limit::Unknown,
                None,
                "750 % of what its 4 sessions can do (800/s at 5 ms a call): no",
            ),
            (
                rate(390.0, 6_000.0),
                4,
                &ANY[..],
                Limit::Load,
                None,
                "390/s is 49 % of what its 4 sessions can do (800/s at 5 ms a call); P99 is 1.20 calls",
            ),
        ] {
            let verdict = on_plugin(Call::Decrypt, reached, sessions, &steps(of)).unwrap();
            assert_eq!((verdict.limit, verdict.sessions), (limit, advised), "{reached:?}: {}", verdict.words);
            assert!(verdict.words.contains(words), "{}", verdict.words);
        }
        assert!(on_plugin(Call::Decrypt, in_flight(1.0, 1), 3, &steps(&EIGHT)).is_none());
    }
}
