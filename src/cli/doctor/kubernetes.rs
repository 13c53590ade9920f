//! The API servers of this host: their users, their EncryptionConfiguration, and whether they see our socket.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::Findings;
use super::encryption_config;
use super::host::{Process, arguments, processes};
use crate::config::Listen;

/// Names of processes, as comm(5) cuts them.
const API_SERVERS: [&str; 4] = ["kube-apiserver", "k3s-server", "k3s", "rke2"];

/// Where distributions write the configuration themselves.
const WRITTEN_BY_DISTRIBUTIONS: [&str; 2] = [
    "/var/lib/rancher/k3s/server/cred/encryption-config.json",
    "/var/lib/rancher/rke2/server/cred/encryption-config.json",
];

const FLAG: &str = "--encryption-provider-config=";
/// A larger file is none.
const LARGEST: u64 = 1 << 20;

const API_SERVER: &str = "API server";

pub(super) fn examine(listen: &Listen, named: Option<PathBuf>, findings: &mut Findings) {
    let servers: Vec<Process> = API_SERVERS.iter().flat_map(|name| processes(name)).collect();
    examine_peers(&servers, listen, findings);
    let file = named.or_else(|| find_configuration(&servers));
    match &file {
        Some(file) => match read(file) {
            Ok(text) => encryption_config::examine(&file.display().to_string(), &text, listen, findings),
            Err(error) => {
                let what = format!("the EncryptionConfiguration {} cannot be read: {error}", file.display());
                findings.failure(API_SERVER, what, "run it as root, or name the file with --encryption-config");
            }
        },
        None if servers.is_empty() => (), // none runs here, and none is asked about
        None => findings.failure(
            API_SERVER,
            format!("the API server here was started without {FLAG}FILE: it encrypts nothing"),
            "`trousseau encryption-config` prints the file and how to name it",
        ),
    }
    servers.iter().for_each(|server| examine_mount(server, &listen.socket, findings));
}

/// The users as which they run must be allowed to connect.
fn examine_peers(servers: &[Process], listen: &Listen, findings: &mut Findings) {
    let uids: BTreeSet<u32> =
        servers.iter().filter_map(|server| Some(fs::metadata(&server.path).ok()?.uid())).collect();
    for uid in uids {
        if listen.allow_uids.contains(&uid) {
            findings.good("peers", format!("the API server here runs as uid {uid}, which may connect"));
        } else {
            let what = format!("the API server here runs as uid {uid}, which may not connect");
            findings.failure("peers", what, format!("add {uid} to listen.allow-uids"));
        }
    }
}

/// What an API server was started with, as it sees it; else what a distribution has written.
fn find_configuration(servers: &[Process]) -> Option<PathBuf> {
    let started_with = servers.iter().find_map(|server| {
        let arguments = arguments(&server.path);
        let file = arguments.iter().find_map(|argument| argument.strip_prefix(FLAG))?;
        Some(seen_by(server, Path::new(file)))
    });
    started_with.or_else(|| WRITTEN_BY_DISTRIBUTIONS.iter().map(PathBuf::from).find(|path| path.exists()))
}

/// A path in the mounts of a process.
fn seen_by(process: &Process, path: &Path) -> PathBuf {
    Path::new(&process.path).join("root").join(path.strip_prefix("/").unwrap_or(path))
}

fn read(file: &Path) -> std::io::Result<String> {
    let metadata = fs::metadata(file)?;
    if !metadata.is_file() || metadata.len() > LARGEST {
        return Err(std::io::Error::other("it is no file of at most 1 MiB"));
    }
    fs::read_to_string(file)
}

/// A bind mount of the socket itself, or of a directory that was made anew, shows for ever what was there before.
fn examine_mount(server: &Process, socket: &Path, findings: &mut Findings) {
    let (Ok(ours), Process { pid, .. }) = (fs::metadata(socket), server) else { return };
    let shown = socket.display();
    match fs::metadata(seen_by(server, socket)) {
        Ok(theirs) if (theirs.dev(), theirs.ino()) == (ours.dev(), ours.ino()) => {
            findings.good(API_SERVER, format!("the API server (pid {pid}) sees the socket that is served, at {shown}"));
        }
        Ok(_) => findings.failure(
            API_SERVER,
            format!("the API server (pid {pid}) has another socket at {shown} than the one that is served"),
            "mount the directory and not the socket, and restart the API server",
        ),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => findings.warning(
            API_SERVER,
            format!("the API server (pid {pid}) sees nothing at {shown}"),
            "mount the socket's directory there, unless its EncryptionConfiguration names another place",
        ),
        Err(error) => findings.warning(
            API_SERVER,
            format!("what the API server (pid {pid}) sees at {shown} cannot be told: {error}"),
            "run it as root",
        ),
    }
}
