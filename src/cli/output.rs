//! What people and programs read: results on standard output, failures on standard error with their exit code.

use std::fmt;
use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;
use std::time::Duration;

use comfy_table::{ColumnConstraint, ContentArrangement, Table, presets};
use serde::Serialize;

use crate::config::{ConfigError, CredentialError};
use crate::provider::KekError;
use crate::service::client::ClientError;
use crate::service::listener::BindError;
use crate::state::StateError;

/// Longer than that nobody waits without wondering.
const MOMENT: Duration = Duration::from_secs(1);

/// A column of so many letters can be read.
const SENTENCE: usize = 40;

/// How a result is printed: for people, or for programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Format {
    Text,
    Json,
}

/// What failed, what to do, and the exit code (sysexits.h).
#[derive(Debug)]
pub(super) struct Failure {
    code: u8,
    what: String,
    remedy: String,
}

impl Failure {
    /// A finding, or a failure that has no code of its own.
    pub(super) fn failed(what: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { code: 1, what: what.into(), remedy: remedy.into() }
    }

    /// Wrong arguments, which only the configuration shows to be wrong.
    pub(super) fn usage(what: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { code: 2, what: what.into(), remedy: remedy.into() }
    }

    /// The plugin or its token is out of reach.
    pub(super) fn unavailable(what: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { code: 69, what: what.into(), remedy: remedy.into() }
    }

    /// What failed.
    pub(super) fn what(&self) -> &str {
        &self.what
    }

    /// What to do about it.
    pub(super) fn remedy(&self) -> &str {
        &self.remedy
    }

    /// The operating system, or the plugin, refuses this user.
    pub(super) fn not_permitted(what: String, remedy: String) -> Self {
        Self { code: 77, what, remedy }
    }

    /// A configuration cannot be used.
    pub(super) fn configuration(what: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { code: 78, what: what.into(), remedy: remedy.into() }
    }

    /// Prints it, and returns its exit code.
    pub(super) fn report(&self) -> ExitCode {
        let mut stderr = io::stderr();
        let _nobody_reads = writeln!(stderr, "trousseau: error: {}", self.what);
        if !self.remedy.is_empty() {
            let _nobody_reads = writeln!(stderr, "trousseau: hint: {}", self.remedy);
        }
        self.code.into()
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.what)?;
        if self.remedy.is_empty() { Ok(()) } else { write!(f, ": {}", self.remedy) }
    }
}

impl From<ConfigError> for Failure {
    fn from(error: ConfigError) -> Self {
        let make = if error.is_forbidden { Self::not_permitted } else { Self::configuration };
        make(error.to_string(), error.remedy().to_owned())
    }
}

impl From<CredentialError> for Failure {
    fn from(error: CredentialError) -> Self {
        let make = if error.is_forbidden { Self::not_permitted } else { Self::configuration };
        make(error.to_string(), error.remedy().to_owned())
    }
}

impl From<StateError> for Failure {
    fn from(error: StateError) -> Self {
        let make = if error.is_forbidden { Self::not_permitted } else { Self::configuration };
        make(error.to_string(), error.remedy().to_owned())
    }
}

impl From<BindError> for Failure {
    fn from(error: BindError) -> Self {
        let make = if error.is_forbidden { Self::not_permitted } else { Self::failed };
        make(error.to_string(), error.remedy().to_owned())
    }
}

/// These texts end with what to do.
impl From<KekError> for Failure {
    fn from(error: KekError) -> Self {
        match error {
            KekError::Refused(what) | KekError::OfOneValue(what) => Self::failed(what, ""),
            outage => Self::unavailable(outage.to_string(), ""),
        }
    }
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        let what = error.to_string();
        match &error {
            ClientError::Unreachable(_, cause) if cause.kind() == io::ErrorKind::PermissionDenied => {
                Self::not_permitted(what, "run it as root, or as a user that may open the socket".into())
            }
            ClientError::Closed(_) => {
                Self::not_permitted(what, "add your uid to listen.allow-uids, or run it as root".into())
            }
            ClientError::Unreachable(..) => {
                Self::unavailable(what, "is the plugin running? `systemctl status trousseau`, or name it with --socket")
            }
            ClientError::Late { .. } => Self::unavailable(
                what,
                "it hangs, or its token does: see `journalctl -u trousseau`, and `trousseau doctor`",
            ),
            ClientError::Answer { .. } if error.is_outage() => {
                Self::unavailable(what, "the plugin's own log says more: `journalctl -u trousseau`")
            }
            ClientError::Answer { .. } => Self::failed(what, ""),
        }
    }
}

/// Prints text for people.
pub(super) fn print(text: &str) -> Result<(), Failure> {
    let mut stdout = io::stdout().lock();
    match writeln!(stdout, "{text}").and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(Failure::failed(format!("standard output: {error}"), ""))
        }
        _ => Ok(()),
    }
}

/// The work; if it takes longer than a moment, somebody at a terminal is told what is waited for.
pub(super) async fn patiently<T>(what: &str, work: impl Future<Output = T>) -> T {
    let mut work = std::pin::pin!(work);
    if let Ok(done) = tokio::time::timeout(MOMENT, &mut work).await {
        return done;
    }
    let mut stderr = io::stderr();
    if stderr.is_terminal() {
        let _nobody_reads = writeln!(stderr, "trousseau: {what} …");
    }
    work.await
}

/// Prints a value for programs.
pub(super) fn print_json(value: &impl Serialize) -> Result<(), Failure> {
    let text = serde_json::to_string_pretty(value).map_err(|error| Failure::failed(error.to_string(), ""))?;
    print(&text)
}

/// Whether a table's last column has room for sentences, with all others whole: nobody can copy an id of two lines.
fn has_room(rows: &[Vec<String>], width: usize) -> bool {
    let mut widths: Vec<usize> = Vec::new();
    for row in rows {
        widths.resize(widths.len().max(row.len()), 0);
        for (widest, cell) in widths.iter_mut().zip(row) {
            *widest = cell.lines().map(|line| line.chars().count()).fold(*widest, usize::max);
        }
    }
    let others: usize = widths.iter().rev().skip(1).map(|width| width + 3).sum();
    others + SENTENCE <= width
}

/// A table: with lines on a terminal, plain columns elsewhere. What is too wide for a terminal is broken in the last
/// column.
pub(super) fn table(header: &[&str], rows: Vec<Vec<String>>) -> String {
    let mut table = Table::new();
    let terminal = rustix::termios::tcgetwinsize(io::stdout()).ok().map(|size| size.ws_col);
    table.load_style(if io::stdout().is_terminal() { presets::UTF8_FULL_CONDENSED } else { presets::NOTHING });
    match terminal.filter(|width| has_room(&rows, usize::from(*width))) {
        Some(width) => table.set_content_arrangement(ContentArrangement::Dynamic).set_width(width),
        None => table.set_content_arrangement(ContentArrangement::Disabled),
    };
    table.set_header(header.to_vec());
    table.add_rows(rows);
    let last = table.column_count().saturating_sub(1);
    for column in table.column_iter_mut().take(last) {
        column.set_constraint(ColumnConstraint::ContentWidth);
    }
    let lines: Vec<String> = table.lines().map(|line| line.trim().to_owned()).collect();
    lines.join("\n")
}
