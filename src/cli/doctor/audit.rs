//! The audit log: whether the plugin can write it.

use std::path::Path;

use super::{Findings, host};
use crate::audit::foresee;
use crate::cli::audit::unusable;
use crate::config::AuditConfig;

pub(super) const AUDIT: &str = "audit log";

/// As the user of the process that serves by this configuration sees it, if there is one.
pub(super) fn examine(config: &Path, log: &AuditConfig, findings: &mut Findings) {
    let user = host::plugin(config).and_then(|plugin| host::user(&plugin));
    match foresee(log, user) {
        Ok(()) => findings.good(AUDIT, format!("nothing is seen that keeps {} from being written", log.file.display())),
        Err(error) => findings.failed(AUDIT, &unusable(&error)),
    }
}
