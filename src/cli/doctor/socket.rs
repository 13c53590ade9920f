//! The plugin that serves: its socket, and what it answers there.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use tokio::net::UnixStream;

use super::Findings;
use super::host::{arguments, plugin, user};
use crate::config::Listen;
use crate::disk;
use crate::service::client::{Client, ClientError};
use crate::service::listener::check_way;

const SOCKET: &str = "socket";

/// Whether a plugin serves by this configuration, which is in `file`, and answers as it should.
pub(super) async fn examine(file: &Path, listen: &Listen, findings: &mut Findings) {
    let socket = listen.socket.display();
    // That nobody listens, or that we may not connect, is told by the call at the end.
    let peer = UnixStream::connect(&listen.socket).await.and_then(|stream| stream.peer_cred()).ok();
    if let Ok(metadata) = fs::symlink_metadata(&listen.socket) {
        let mode = metadata.mode() & 0o7777;
        if !metadata.file_type().is_socket() {
            findings.failure(SOCKET, format!("{socket} is not a socket"), "move it away, and restart the plugin");
        } else if let Some(what) = complaint(mode, listen.mode, peer.is_some_and(|peer| is_systemd(peer.pid()))) {
            let remedy = "set SocketMode= in the socket unit, or restart the plugin";
            findings.warning(SOCKET, format!("the mode of {socket} is {mode:04o}, {what}"), remedy);
        }
        report_selinux(&listen.socket, findings);
    }
    let (path, file) = (listen.socket.clone(), file.to_owned());
    let look = move |findings: &mut Findings| examine_way(&path, &file, peer.map(|peer| peer.uid()), findings);
    findings.add_from(SOCKET, look).await;
    if let Some(peer) = peer {
        let path = listen.socket.clone();
        findings.add_from(SOCKET, move |findings| examine_listener(&path, peer.pid(), peer.uid(), findings)).await;
    }
    let status = async { Client::connect(&listen.socket, Duration::from_secs(5)).await?.status().await };
    match status.await {
        Ok(status) => findings.good(SOCKET, format!("{socket} answers: key_id {}", status.key_id)),
        Err(ClientError::Unreachable(_, error)) if error.kind() != ErrorKind::PermissionDenied => {
            let remedy = "is the plugin running? `systemctl status trousseau`; it may serve by another --config";
            findings.failure(SOCKET, format!("{socket}: {error}"), remedy);
        }
        Err(error) => findings.failed(SOCKET, &error.into()),
    }
}

/// Whether systemd made the socket. In a container the plugin itself may be the first process.
fn is_systemd(pid: Option<i32>) -> bool {
    pid == Some(1) && runs_us("/proc/1") != Some(true)
}

/// What is wrong with the socket's mode. That of systemd's is the unit's, whatever the configuration says.
fn complaint(mode: u32, configured: u32, is_systemds: bool) -> Option<String> {
    match is_systemds {
        true => (mode & 0o007 != 0).then(|| "which lets every user try it".to_owned()),
        false => (mode != configured).then(|| format!("not {configured:04o}")),
    }
}

/// Whether somebody could exchange the socket whom neither root is nor who serves.
fn examine_way(socket: &Path, file: &Path, listener: Option<u32>, findings: &mut Findings) {
    if !socket.parent().is_some_and(Path::exists) {
        return; // nobody serves there, which is told
    }
    let serves = plugin(file).as_ref().and_then(user);
    // While nobody serves it is not known who will.
    let is_unknown = listener.or(serves).is_none();
    let trusted = |uid: u32| is_unknown || [listener, serves].contains(&Some(uid));
    if let Err(why) = check_way(socket, trusted) {
        findings.failed(SOCKET, &why.into());
    }
}

/// Who listens: whoever does is handed what the API server encrypts.
fn examine_listener(socket: &Path, pid: Option<i32>, uid: u32, findings: &mut Findings) {
    let pid = pid.unwrap_or(0); // that of a process of another pid namespace
    let process = format!("/proc/{pid}");
    let units = if pid == 1 { listed_sockets() } else { String::new() };
    let (listener, who) = listener(&socket.display().to_string(), runs_us(&process), &arguments(&process), &units);
    let there = format!("listens at {} (pid {pid}, uid {uid})", socket.display());
    match listener {
        Listener::Plugin => findings.good(SOCKET, format!("{who} {there}")),
        Listener::Unit => findings.warning(
            SOCKET,
            format!("{who} {there}"),
            "if that unit does not run `trousseau serve`, it is handed what the API server encrypts: end it",
        ),
        Listener::Stranger => findings.failure(
            SOCKET,
            format!("{who} {there}, which is no trousseau plugin"),
            "it is handed what the API server encrypts: end it, find out who started it, and start the plugin",
        ),
    }
}

/// Whether a process runs this program: our own file, or one of its name. `None`: that is not ours to see.
fn runs_us(process: &str) -> Option<bool> {
    let exe = Path::new(process).join("exe");
    let program = fs::read_link(&exe).ok()?;
    let file = |path: &Path| fs::metadata(path).ok().map(|metadata| disk::identity(&metadata));
    let is_ours = file(&exe).is_some_and(|theirs| file(Path::new("/proc/self/exe")) == Some(theirs));
    // It may have been replaced since: proc_pid_exe(5).
    let name = program.file_name().unwrap_or_default().to_string_lossy();
    Some(is_ours || is_named(name.strip_suffix(" (deleted)").unwrap_or(&name)))
}

fn is_named(program: &str) -> bool {
    Path::new(program).file_name().is_some_and(|name| name == "trousseau")
}

/// Every socket that systemd holds, with the unit of each and the one that it is handed to.
fn listed_sockets() -> String {
    let listed = Command::new("systemctl").args(["list-sockets", "--all", "--plain", "--no-legend", "--full"]).output();
    listed.map(|listed| String::from_utf8_lossy(&listed.stdout).into_owned()).unwrap_or_default()
}

/// What listens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Listener {
    Plugin,
    /// systemd, for a unit of another name than ours.
    Unit,
    Stranger,
}

/// Who listens: by the program and the arguments of the process that made the socket, and by what systemd says of its
/// own.
fn listener(socket: &str, runs_us: Option<bool>, arguments: &[String], units: &str) -> (Listener, String) {
    let held = units.lines().find_map(|line| match line.split_whitespace().collect::<Vec<_>>().as_slice() {
        [listens, unit, activates] if *listens == socket => {
            Some((format!("systemd, by {unit}, for {activates},"), *activates))
        }
        _ => None,
    });
    if let Some((who, activates)) = held {
        let is_ours = activates == "trousseau.service";
        return (if is_ours { Listener::Plugin } else { Listener::Unit }, who);
    }
    let is_plugin = match arguments {
        [program, verb, ..] => runs_us.unwrap_or_else(|| is_named(program)) && ["serve", "dev"].contains(&&**verb),
        _ => false,
    };
    // It has none if it is of another user, or not of this pid namespace.
    let words: Vec<&str> = arguments.iter().map(String::as_str).filter(|word| !word.is_empty()).collect();
    let who =
        if words.is_empty() { "a process that is not seen from here".into() } else { format!("`{}`", words.join(" ")) };
    (if is_plugin { Listener::Plugin } else { Listener::Stranger }, who)
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
    fn the_mode_is_the_configurations_unless_systemd_made_the_socket() {
        for (mode, configured, is_systemds, what) in [
            (0o600, 0o600, false, None),
            (0o660, 0o600, false, Some("not 0600")),
            (0o666, 0o600, false, Some("not 0600")),
            (0o600, 0o660, false, Some("not 0660")),
            (0o660, 0o600, true, None),
            (0o600, 0o660, true, None),
            (0o666, 0o660, true, Some("which lets every user try it")),
        ] {
            let found = complaint(mode, configured, is_systemds);
            assert_eq!(found.as_deref(), what, "{mode:04o} {configured:04o} {is_systemds}");
        }
        assert!(!is_systemd(None) && !is_systemd(Some(7)));
    }

    #[test]
    fn a_plugin_is_known_by_its_program_and_verb_and_systemds_by_its_unit() {
        let units = "/run/dbus/system_bus_socket dbus.socket dbus.service\n/k.sock trousseau.socket trousseau.service\n\
                     /o.sock other.socket other.service\n";
        use Listener::{Plugin, Stranger, Unit};
        for (socket, runs_us, arguments, units, is, words) in [
            ("/k.sock", Some(true), "/usr/bin/trousseau serve", "", Plugin, "`/usr/bin/trousseau serve`"),
            ("/k.sock", Some(true), "kms-plugin serve", "", Plugin, "`kms-plugin serve`"),
            ("/k.sock", Some(true), "./trousseau dev --dir /d", "", Plugin, "dev --dir"),
            ("/k.sock", None, "trousseau serve --config /a.toml", "", Plugin, "serve --config"),
            ("/k.sock", Some(false), "trousseau serve", "", Stranger, "`trousseau serve`"),
            ("/k.sock", Some(true), "trousseau doctor", "", Stranger, "`trousseau doctor`"),
            ("/k.sock", Some(false), "nc -lU /k.sock", "", Stranger, "`nc -lU /k.sock`"),
            ("/k.sock", None, "nc serve", "", Stranger, "`nc serve`"),
            ("/k.sock", None, "", "", Stranger, "not seen from here"),
            ("/k.sock", Some(false), "/sbin/init", units, Plugin, "by trousseau.socket, for trousseau.service"),
            ("/o.sock", Some(false), "/sbin/init", units, Unit, "by other.socket"),
            ("/n.sock", Some(false), "/sbin/init", units, Stranger, "`/sbin/init`"),
        ] {
            let arguments: Vec<String> = arguments.split(' ').map(str::to_owned).collect();
            let (listener, who) = listener(socket, runs_us, &arguments, units);
            assert_eq!(listener, is, "{arguments:?}: {who}");
            assert!(who.contains(words), "{arguments:?}: {who}");
        }
        assert_eq!(runs_us("/proc/self"), Some(true));
        assert_eq!(runs_us("/proc/no"), None);
    }
}
