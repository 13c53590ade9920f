//! Logs: on a terminal for people, else JSON, one line an event, to standard error.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

/// The variable that sets how much is logged, such as `debug` or `trousseau=debug,h2=warn`.
const LOG_VARIABLE: &str = "TROUSSEAU_LOG";

/// Starts logging. `default` holds where the variable `TROUSSEAU_LOG` says nothing.
pub fn init(default: &str) {
    let wish = std::env::var(LOG_VARIABLE).unwrap_or_default();
    let (filter, misspelt) = match wish.parse() {
        Ok(filter) if !wish.is_empty() => (filter, false),
        parsed => (EnvFilter::new(default), parsed.is_err()),
    };
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(false);
    if std::io::stderr().is_terminal() {
        builder.compact().init();
    } else {
        builder.json().flatten_event(true).with_current_span(false).with_span_list(false).init();
    }
    if misspelt {
        tracing::warn!(TROUSSEAU_LOG = wish, "this is no log filter and is ignored: write for example debug");
    }
}
