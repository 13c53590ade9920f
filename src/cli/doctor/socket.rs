//! The plugin that serves: its socket, and what it answers there.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use rustix::net::sockopt::socket_peercred;

use super::Findings;
use super::host::arguments;
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
    let path = listen.socket.clone();
    findings.add_from(SOCKET, move |findings| examine_listener(&path, findings)).await;
    let status = async { Client::connect(&listen.socket, Duration::from_secs(5)).await?.status().await };
    match status.await {
        Ok(status) => findings.good(SOCKET, format!("{socket} answers: key_id {}", status.key_id)),
        Err(error) => findings.failed(SOCKET, &error.into()),
    }
}

/// Who listens: whoever does is handed what the API server encrypts.
fn examine_listener(socket: &Path, findings: &mut Findings) {
    // That nobody listens, or that we may not connect, is told by the call that follows.
    let Ok(peer) = UnixStream::connect(socket).and_then(|stream| Ok(socket_peercred(&stream)?)) else { return };
    let (pid, uid) = (peer.pid.as_raw_nonzero().get(), peer.uid.as_raw());
    let arguments = arguments(&format!("/proc/{pid}"));
    let units = if pid == 1 { listed_sockets() } else { String::new() };
    match listener(&socket.display().to_string(), &arguments, &units) {
        Ok(who) => findings.good(SOCKET, format!("{who} listens there (pid {pid}, uid {uid})")),
        Err(who) => findings.failure(
            SOCKET,
            format!("{who} listens at {} (pid {pid}, uid {uid}), which is no trousseau plugin", socket.display()),
            "it is handed what the API server encrypts: end it, find out who started it, and start the plugin",
        ),
    }
}

/// Every socket that systemd holds, with the unit of each and the one that it is handed to.
fn listed_sockets() -> String {
    let listed = Command::new("systemctl").args(["list-sockets", "--all", "--plain", "--no-legend", "--full"]).output();
    listed.map(|listed| String::from_utf8_lossy(&listed.stdout).into_owned()).unwrap_or_default()
}

/// Who listens, by the arguments of the process that made the socket, and by what systemd says of its own.
///
/// # Errors
/// It is no plugin.
fn listener(socket: &str, arguments: &[String], units: &str) -> Result<String, String> {
    let held = units.lines().find_map(|line| match line.split_whitespace().collect::<Vec<_>>().as_slice() {
        [listens, unit, activates] if *listens == socket => {
            Some((format!("systemd, by {unit}, for {activates},"), *activates))
        }
        _ => None,
    });
    if let Some((who, activates)) = held {
        return if activates == "trousseau.service" { Ok(who) } else { Err(who) };
    }
    let is_plugin = match arguments {
        [program, verb, ..] => {
            Path::new(program).file_name().is_some_and(|name| name == "trousseau") && verb == "serve"
        }
        _ => false,
    };
    // It has none if it is of another user, or not of this pid namespace.
    let words: Vec<&str> = arguments.iter().map(String::as_str).filter(|word| !word.is_empty()).collect();
    let who =
        if words.is_empty() { "a process that is not seen from here".into() } else { format!("`{}`", words.join(" ")) };
    if is_plugin { Ok(who) } else { Err(who) }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plugin_is_known_by_its_verb_and_systemds_by_its_unit() {
        let units = "/run/dbus/system_bus_socket dbus.socket dbus.service\n/k.sock trousseau.socket trousseau.service\n\
                     /o.sock other.socket other.service\n";
        for (socket, arguments, units, is_plugin, words) in [
            ("/k.sock", "/usr/bin/trousseau serve", "", true, "`/usr/bin/trousseau serve`"),
            ("/k.sock", "trousseau serve --config /a.toml", "", true, "serve --config"),
            ("/k.sock", "trousseau doctor", "", false, "`trousseau doctor`"),
            ("/k.sock", "nc -lU /k.sock", "", false, "`nc -lU /k.sock`"),
            ("/k.sock", "", "", false, "not seen from here"),
            ("/k.sock", "/sbin/init", units, true, "by trousseau.socket, for trousseau.service"),
            ("/o.sock", "/sbin/init", units, false, "by other.socket"),
            ("/n.sock", "/sbin/init", units, false, "`/sbin/init`"),
        ] {
            let arguments: Vec<String> = arguments.split(' ').map(str::to_owned).collect();
            let told = listener(socket, &arguments, units);
            assert_eq!(told.is_ok(), is_plugin, "{arguments:?}: {told:?}");
            assert!(told.as_ref().unwrap_or_else(|told| told).contains(words), "{arguments:?}: {told:?}");
        }
    }
}
