//! Logs: on a terminal for people, else JSON, one line an event, to standard error.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

/// The variable that sets how much is logged, such as `debug` or `trousseau=debug,h2=warn`.
pub const LOG_VARIABLE: &str = "TROUSSEAU_LOG";

/// Starts logging. `default` holds where [`LOG_VARIABLE`] says nothing.
pub fn init(default: &str) {
    let filter = EnvFilter::try_from_env(LOG_VARIABLE).unwrap_or_else(|_| EnvFilter::new(default));
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(false);
    if std::io::stderr().is_terminal() {
        builder.compact().init();
    } else {
        builder.json().flatten_event(true).with_current_span(false).with_span_list(false).init();
    }
}
