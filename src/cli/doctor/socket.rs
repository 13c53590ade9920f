//! The plugin that serves: its socket, and what it answers there.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::time::Duration;

use super::Findings;
use crate::config::Listen;
use crate::service::client::Client;

const SOCKET: &str = "socket";

/// Whether a plugin serves, and answers as it should.
pub(super) async fn examine(listen: &Listen, findings: &mut Findings) {
    let socket = listen.socket.display();
    if let Ok(metadata) = fs::symlink_metadata(&listen.socket) {
        let mode = metadata.mode() & 0o7777;
        if !metadata.file_type().is_socket() {
            findings.failure(SOCKET, format!("{socket} is not a socket"), "move it away, and restart the plugin");
        } else if mode != listen.mode {
            let what = format!("the mode of {socket} is {mode:04o}, not {:04o}", listen.mode);
            findings.warning(SOCKET, what, "set SocketMode= in the socket unit, or restart the plugin");
        }
        report_selinux(&listen.socket, findings);
    }
    let status = async { Client::connect(&listen.socket, Duration::from_secs(5)).await?.status().await };
    match status.await {
        Ok(status) => findings.good(SOCKET, format!("{socket} answers: key_id {}", status.key_id)),
        Err(error) => findings.failed(SOCKET, &error.into()),
    }
}

/// Where SELinux refuses something, the socket's context is the first thing that is asked for.
fn report_selinux(socket: &Path, findings: &mut Findings) {
    let Ok(enforcing) = fs::read_to_string("/sys/fs/selinux/enforce") else { return };
    let mut context = [0; 256];
    let length = rustix::fs::lgetxattr(socket, "security.selinux", &mut context).unwrap_or(0);
    let context = String::from_utf8_lossy(context.get(..length).unwrap_or_default());
    let context = context.trim_end_matches('\0');
    let mode = if enforcing.trim() == "1" { "enforcing" } else { "permissive" };
    let what =
        format!("SELinux is {mode}; the socket's context is {}", if context.is_empty() { "unknown" } else { context });
    if mode == "enforcing" && (context.is_empty() || ["unlabeled_t", "default_t"].iter().any(|t| context.contains(t))) {
        let remedy = "`restorecon -Rv` on its directory; `ausearch -m avc -ts recent` shows what was refused";
        findings.warning(SOCKET, what, remedy);
    } else {
        findings.good(SOCKET, what);
    }
}
