//! Logs: on a terminal for people, else JSON, one line an event, to standard error. What happens again and again is
//! counted, and not repeated ([`Repeats`]).

use std::collections::HashMap;
use std::io::IsTerminal;
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{fmt, registry, reload};

use crate::sync::lock;

/// The variable that sets how much is logged, such as `debug` or `trousseau=debug,h2=warn`. It goes before the
/// configuration.
const LOG_VARIABLE: &str = "TROUSSEAU_LOG";

/// Replaces the filter of the running process.
type Exchange = Box<dyn Fn(Targets) -> bool + Send + Sync>;

static EXCHANGE: OnceLock<Exchange> = OnceLock::new();

/// Starts logging. `default` holds where the variable `TROUSSEAU_LOG` says nothing.
pub fn init(default: &str) {
    let wish = wish();
    let is_heeded = is_level(&wish);
    let filter = if is_heeded { &wish } else { default }.parse();
    let (filter, handle) = reload::Layer::new(filter.unwrap_or(Targets::new().with_default(LevelFilter::INFO)));
    // Of a log that cannot be written it would tell the same log, and end the process when that fails too.
    let lines = fmt::layer().with_writer(std::io::stderr).with_target(false).log_internal_errors(false);
    let lines = if std::io::stderr().is_terminal() {
        lines.compact().boxed()
    } else {
        lines.json().flatten_event(true).with_current_span(false).with_span_list(false).boxed()
    };
    registry().with(filter).with(lines).init();
    drop(EXCHANGE.set(Box::new(move |filter| handle.reload(filter).is_ok()))); // it was set before only if logging was
    if !wish.is_empty() && !is_heeded {
        tracing::warn!(TROUSSEAU_LOG = wish, "this is no log filter and is ignored: write for example debug");
    }
}

/// Logs so much from now on, unless `TROUSSEAU_LOG` says how much.
pub fn set_level(level: &str) {
    if let (Some(exchange), true, Ok(filter)) = (EXCHANGE.get(), !is_level(&wish()), level.parse())
        && !exchange(filter)
    {
        tracing::warn!(level, "how much is logged cannot be changed");
    }
}

/// Whether this is a filter, such as `debug` or `trousseau=debug,h2=warn`. A word that is no level would be taken for the
/// name of a part of the program, and everything else would be silent.
#[must_use]
pub fn is_level(level: &str) -> bool {
    let is_word = |part: &str| !part.is_empty() && (part.contains('=') || part.parse::<LevelFilter>().is_ok());
    level.split(',').all(|part| is_word(part.trim())) && level.parse::<Targets>().is_ok()
}

fn wish() -> String {
    std::env::var(LOG_VARIABLE).unwrap_or_default()
}

/// How long what was told once is only counted.
const QUIET: Duration = Duration::from_secs(10);
/// Different things that are counted at a time. More are told each time.
const MOST: usize = 256;

/// What was told lately, and how often it has happened since.
#[derive(Default)]
pub struct Repeats(Mutex<HashMap<String, (Instant, u64)>>);

impl Repeats {
    /// Whether to tell of something now; if not, it is counted.
    pub fn is_news(&self, what: &str, now: Instant) -> bool {
        let Self(told) = self;
        let mut told = lock(told);
        if let Some((_, count)) = told.get_mut(what) {
            *count += 1;
            return false;
        }
        if told.len() < MOST {
            told.insert(what.to_owned(), (now, 0));
        }
        true
    }

    /// What has happened again and is to be told now, and how often. Each is news again once it has not happened for a
    /// while.
    pub fn due(&self, now: Instant) -> Vec<(String, u64)> {
        let Self(told) = self;
        let mut told = lock(told);
        told.retain(|_, (since, count)| *count > 0 || now.duration_since(*since) < QUIET);
        let is_due = |(since, _): &(Instant, u64)| now.duration_since(*since) >= QUIET;
        let due = told.iter_mut().filter(|(_, entry)| is_due(entry));
        due.map(|(what, entry)| {
            let (_, count) = std::mem::replace(entry, (now, 0));
            (what.clone(), count)
        })
        .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_happens_again_is_counted_and_told_now_and_then() {
        let (repeats, start) = (Repeats::default(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        assert!(repeats.is_news("lost", at(0)));
        assert!(!repeats.is_news("lost", at(1)) && !repeats.is_news("lost", at(9)));
        assert!(repeats.is_news("late", at(1)), "another thing");
        assert_eq!(repeats.due(at(9)), []);
        assert_eq!(repeats.due(at(10)), [("lost".to_owned(), 2)]);
        assert!(!repeats.is_news("lost", at(11)));
        assert_eq!(repeats.due(at(20)), [("lost".to_owned(), 1)], "what was told once is forgotten");
        assert_eq!(repeats.due(at(30)), []);
        assert!(repeats.is_news("lost", at(31)) && repeats.is_news("late", at(31)));
    }

    #[test]
    fn a_filter_is_told_from_a_misspelt_one() {
        for (level, good) in [
            ("debug", true),
            ("trousseau=debug,h2=warn", true),
            ("info,h2=warn", true),
            ("off", true),
            ("", false),
            ("trousseau=loud", false),
            ("warning", false),
            ("info;debug", false),
            ("warn,trousseau", false),
        ] {
            assert_eq!(is_level(level), good, "{level}");
        }
    }
}
