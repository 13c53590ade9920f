//! `[audit]`: the audit log.

use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;

use super::{Check, ConfigError, file, period};

/// `[audit]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AuditConfig {
    /// An absolute path.
    pub file: PathBuf,
    /// When what was written is synced to the disk.
    pub sync: Sync,
    /// What becomes of a request that cannot be logged.
    pub on_failure: OnFailure,
    /// Bytes from which on the file is put aside and a new one begun.
    pub rotate_at: u64,
    /// How often the journal is told the head of the chain.
    pub head_every: Duration,
}

#[cfg(test)]
impl AuditConfig {
    /// `audit.log` in this directory, for tests: never synced, and what is missing is counted.
    pub(crate) fn of_test(directory: &std::path::Path, rotate_at: u64) -> Self {
        let (file, sync, on_failure) = (directory.join("audit.log"), Sync::Never, OnFailure::Count);
        Self { file, sync, on_failure, rotate_at, head_every: Duration::ZERO }
    }
}

/// When the audit log is synced to the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sync {
    /// When the kernel likes.
    Never,
    /// With the next line after so long; zero: with every line.
    Every(Duration),
}

/// What becomes of a request that cannot be logged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnFailure {
    /// It is answered; what is missing is counted, and the count is logged as soon as that is possible.
    #[default]
    Count,
    /// It fails, and every request waits until its line is written.
    Refuse,
}

impl Check<'_> {
    pub(super) fn audit(&self, file: file::Audit) -> Result<AuditConfig, ConfigError> {
        if !file.file.is_absolute() {
            return Err(self.error(format!("audit.file `{}` is relative", file.file.display()), "write the whole path"));
        }
        let length = |field: &str, text: &str| {
            period(text).map(|length| length.unsigned_abs()).ok_or_else(|| {
                let what = format!("audit.{field} `{text}` is not a length of time");
                self.error(what, "write for example \"1s\"")
            })
        };
        let sync = match file.sync.as_str() {
            "never" => Sync::Never,
            text => Sync::Every(length("sync", text)?),
        };
        let head_every = length("head-every", &file.head_every)?;
        let rotate_at = file.rotate_at_mib.checked_mul(1024 * 1024).filter(|bytes| *bytes > 0).ok_or_else(|| {
            self.error(format!("audit.rotate-at-mib is {}", file.rotate_at_mib), "write a number of MiB, such as 256")
        })?;
        Ok(AuditConfig { file: file.file, sync, on_failure: file.on_failure, rotate_at, head_every })
    }
}
