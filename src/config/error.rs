//! What is wrong with a configuration, where, and what to do.

use std::path::{Path, PathBuf};
use std::{fmt, io};

use super::CredentialError;

/// A configuration that cannot be used. Exit code 78, or 77 where it may not be read.
#[derive(Debug)]
pub struct ConfigError {
    file: PathBuf,
    line: Option<usize>,
    what: String,
    remedy: String,
    /// It may not be read.
    pub(crate) is_forbidden: bool,
}

impl ConfigError {
    pub(super) fn new(file: &Path, what: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { file: file.to_owned(), line: None, what: what.into(), remedy: remedy.into(), is_forbidden: false }
    }

    /// The file cannot be read.
    pub(super) fn from_io(file: &Path, error: &io::Error) -> Self {
        let is_forbidden = error.kind() == io::ErrorKind::PermissionDenied;
        let remedy = if is_forbidden { "run it as root" } else { "name another file with --config FILE" };
        Self { is_forbidden, ..Self::new(file, format!("cannot be read: {error}"), remedy) }
    }

    /// A secret that the file points to cannot be read.
    pub(super) fn from_credential(file: &Path, what: String, error: &CredentialError) -> Self {
        Self { is_forbidden: error.is_forbidden, ..Self::new(file, what, error.remedy()) }
    }

    /// From what the TOML reader found: its line, its message, and the nearest known key where one is unknown, else the
    /// `reference` where all of them are.
    pub(super) fn from_toml(file: &Path, text: &str, error: &toml::de::Error, reference: &str) -> Self {
        let line = error.span().map(|span| 1 + text.bytes().take(span.start).filter(|byte| *byte == b'\n').count());
        let message = error.message().lines().next().unwrap_or_default();
        let remedy = match nearest(message) {
            Some(known) => format!("did you mean `{known}`?"),
            None => reference.to_owned(),
        };
        Self { file: file.to_owned(), line, what: message.to_owned(), remedy, is_forbidden: false }
    }

    /// What to do about it.
    #[must_use]
    pub fn remedy(&self) -> &str {
        &self.remedy
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.file.display())?;
        if let Some(line) = self.line {
            write!(f, ", line {line}")?;
        }
        write!(f, ": {}", self.what)
    }
}

impl std::error::Error for ConfigError {}

/// The known name that is closest to the unknown one, from serde's message "unknown field `x`, expected one of `a`, …".
fn nearest(message: &str) -> Option<&str> {
    let (unknown, known) = message.strip_prefix("unknown ")?.split_once(", expected ")?;
    let unknown = quoted(unknown).next()?;
    quoted(known)
        .map(|known| (strsim::damerau_levenshtein(unknown, known), known))
        .filter(|(distance, known)| *distance <= known.len().max(3) / 2)
        .min()
        .map(|(_, known)| known)
}

fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}
