//! The API servers of this host: their users, their EncryptionConfiguration, and whether they see our socket.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use yaml_rust2::{Yaml, YamlLoader};

use super::Findings;
use super::encryption_config;
use super::host::{Process, arguments, processes, user};
use crate::config::Listen;
use crate::disk;

/// Names of processes, as comm(5) cuts them.
const API_SERVERS: [&str; 4] = ["kube-apiserver", "k3s-server", "k3s", "rke2"];

/// A distribution whose process has the API server in it, or starts it, and hides its own arguments.
struct Distribution {
    processes: &'static [&'static str],
    /// Its configuration; in a directory of that name with `.d` after it there may be more.
    configured_by: &'static str,
    /// The EncryptionConfiguration that it writes itself.
    writes: &'static str,
}

const DISTRIBUTIONS: [Distribution; 2] = [
    Distribution {
        processes: &["k3s-server", "k3s"],
        configured_by: "/etc/rancher/k3s/config.yaml",
        writes: "/var/lib/rancher/k3s/server/cred/encryption-config.json",
    },
    Distribution {
        processes: &["rke2"],
        configured_by: "/etc/rancher/rke2/config.yaml",
        writes: "/var/lib/rancher/rke2/server/cred/encryption-config.json",
    },
];

const FLAG: &str = "--encryption-provider-config";
/// A larger file is none.
const LARGEST: u64 = 1 << 20;

const API_SERVER: &str = "API server";

pub(super) fn examine(listen: &Listen, named: Option<PathBuf>, findings: &mut Findings) {
    let servers: Vec<Process> = API_SERVERS.iter().flat_map(|name| processes(name)).collect();
    examine_servers(&servers, listen, named, findings);
}

fn examine_servers(servers: &[Process], listen: &Listen, named: Option<PathBuf>, findings: &mut Findings) {
    examine_peers(servers, listen, findings);
    let file = named.or_else(|| find_configuration(servers));
    match &file {
        Some(file) => match read(file) {
            Ok(text) => {
                encryption_config::examine(&file.display().to_string(), &text, listen, findings);
                examine_mode(file, findings);
            }
            Err(error) => {
                let what = format!("the EncryptionConfiguration {} cannot be read: {error}", file.display());
                findings.failure(API_SERVER, what, "run it as root, or name the file with --encryption-config");
            }
        },
        None => report_none(servers, findings),
    }
    servers.iter().for_each(|server| examine_mount(server, &listen.socket, findings));
}

/// Without an EncryptionConfiguration, or with one that cannot be seen.
fn report_none(servers: &[Process], findings: &mut Findings) {
    let how = "`trousseau encryption-config` prints the file and how to name it";
    let are_hidden = servers.iter().all(|server| distribution(server).is_some());
    match servers {
        [] => (), // none runs here, and none is asked about
        [Process { name, pid, .. }, ..] if are_hidden => findings.warning(
            API_SERVER,
            format!(
                "which EncryptionConfiguration the API server of {name} (pid {pid}) has cannot be seen: its configuration \
                 names none"
            ),
            format!("if it has one, name it: trousseau doctor --encryption-config FILE; else {how}"),
        ),
        _ => findings.failure(
            API_SERVER,
            format!("the API server here was started without {FLAG}=FILE: it encrypts nothing"),
            how,
        ),
    }
}

/// Beside ours it may have providers with their keys written out.
fn examine_mode(file: &Path, findings: &mut Findings) {
    let mode = fs::metadata(file).map_or(0, |metadata| metadata.mode());
    if mode & 0o077 != 0 {
        let what = format!("{} is not its owner's alone: its mode is {:04o}", file.display(), mode & 0o7777);
        findings.warning(API_SERVER, what, format!("chmod 0600 {}", file.display()));
    }
}

/// The users as which they run must be allowed to connect.
fn examine_peers(servers: &[Process], listen: &Listen, findings: &mut Findings) {
    let uids: BTreeSet<u32> = servers.iter().filter_map(user).collect();
    for uid in uids {
        if listen.allow_uids.contains(&uid) {
            findings.good("peers", format!("the API server here runs as uid {uid}, which may connect"));
        } else {
            let what = format!("the API server here runs as uid {uid}, which may not connect");
            findings.failure("peers", what, format!("add {uid} to listen.allow-uids"));
        }
    }
}

/// What an API server was started with, as it sees it; where only a distribution's process is seen, what that is
/// configured with, or else what it has written.
fn find_configuration(servers: &[Process]) -> Option<PathBuf> {
    let (hidden, plain): (Vec<_>, Vec<_>) =
        servers.iter().partition::<Vec<&Process>, _>(|server| distribution(server).is_some());
    if !plain.is_empty() {
        return plain.iter().find_map(|server| {
            let file = started_with(&arguments(&server.path))?;
            Some(seen_by(server, Path::new(&file)))
        });
    }
    hidden.iter().find_map(|server| {
        let Distribution { configured_by, writes, .. } = distribution(server)?;
        let configured = configured_with(&seen_by(server, Path::new(configured_by)));
        let written = || Some(seen_by(server, Path::new(writes))).filter(|path| path.exists());
        configured.map(|file| seen_by(server, Path::new(&file))).or_else(written)
    })
}

fn distribution(server: &Process) -> Option<&'static Distribution> {
    DISTRIBUTIONS.iter().find(|distribution| distribution.processes.contains(&server.name.as_str()))
}

/// The file that these arguments name, in one word or in two. The last one counts.
fn started_with(arguments: &[String]) -> Option<String> {
    let named = arguments.iter().enumerate().rev().find_map(|(at, argument)| match argument.strip_prefix(FLAG)? {
        "" => arguments.get(at + 1).map(String::as_str),
        joined => joined.strip_prefix('='),
    });
    named.map(str::to_owned)
}

/// The file that a distribution's configuration has the API server started with. Of several files with one key the last
/// one counts, unless the key ends with a plus.
fn configured_with(configuration: &Path) -> Option<String> {
    let more = fs::read_dir(configuration.with_extension("yaml.d")).into_iter().flatten().flatten();
    let mut more: Vec<PathBuf> = more.map(|entry| entry.path()).collect();
    more.retain(|file| file.extension().is_some_and(|extension| extension == "yaml" || extension == "yml"));
    more.sort();
    let mut arguments = Vec::new();
    for file in [configuration.to_owned()].iter().chain(&more) {
        let Some(document) = read(file).ok().and_then(|text| YamlLoader::load_from_str(&text).ok()?.pop()) else {
            continue;
        };
        let (instead, besides) = (&document["kube-apiserver-arg"], &document["kube-apiserver-arg+"]);
        if !instead.is_badvalue() {
            arguments.clear();
        }
        arguments.extend([instead, besides].into_iter().flat_map(words));
    }
    let arguments: Vec<String> =
        arguments.iter().map(|argument| format!("--{}", argument.trim_start_matches('-'))).collect();
    started_with(&arguments)
}

/// A text, or a list of them.
fn words(yaml: &Yaml) -> Vec<String> {
    let one = yaml.as_str().map(str::to_owned);
    one.into_iter()
        .chain(yaml.as_vec().into_iter().flatten().filter_map(|word| word.as_str().map(str::to_owned)))
        .collect()
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
        Ok(theirs) if disk::identity(&theirs) == disk::identity(&ours) => {
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

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixListener;

    use super::super::Severity::{self, Failure, Good, Warning};
    use super::*;

    const K3S: &str = "/etc/rancher/k3s/config.yaml";
    const RKE2: &str = "/etc/rancher/rke2/config.yaml";
    const K3S_WRITES: &str = "/var/lib/rancher/k3s/server/cred/encryption-config.json";
    const GUIDE: &str = "kube-apiserver-arg:\n  - v=2\n  - \"encryption-provider-config=/etc/enc.yaml\"\n";
    /// What k3s writes of its own.
    const OTHER: &str = r#"{"kind": "EncryptionConfiguration", "resources": [{"resources": ["secrets"], "providers": [{"aescbc": {}}]}]}"#;

    /// An API server as /proc shows it, with a root of its own.
    struct Server {
        directory: tempfile::TempDir,
        listen: Listen,
        name: &'static str,
    }

    impl Server {
        fn new() -> Self {
            let directory = tempfile::tempdir().unwrap();
            let socket = directory.path().join("kms.sock");
            drop(UnixListener::bind(&socket).unwrap());
            let uid = fs::metadata(&socket).unwrap().uid();
            let allow_uids = BTreeSet::from([uid]);
            let listen = Listen { socket, mode: 0o600, group: None, allow_uids, v1beta1: false };
            let server = Self { listen, directory, name: "kube-apiserver" };
            server.write("proc/cmdline", "kube-apiserver\0--v=2\0--encryption-provider-config=/etc/enc.yaml\0");
            server.write("proc/status", &format!("Name:\tkube-apiserver\nUid:\t1\t{uid}\t2\t3\n"));
            let endpoint = server.listen.socket.display();
            server.write(
                "proc/root/etc/enc.yaml",
                &format!(
                    "kind: EncryptionConfiguration\nresources: [{{resources: [secrets], providers: [{{kms: {{apiVersion: v2, \
                     name: k, endpoint: 'unix://{endpoint}'}}}}]}}]"
                ),
            );
            let theirs = server.their_socket();
            fs::create_dir_all(theirs.parent().unwrap()).unwrap();
            fs::hard_link(&server.listen.socket, theirs).unwrap();
            server
        }

        fn write(&self, name: &str, text: &str) {
            let path = self.directory.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, text).unwrap();
            fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap();
        }

        fn process(&self) -> Process {
            let path = self.directory.path().join("proc").display().to_string();
            Process { name: self.name.into(), pid: "7".into(), path }
        }

        /// It hides its arguments, and has these files in its root.
        fn is_of(&mut self, name: &'static str, files: &[(&str, &str)]) {
            self.name = name;
            self.write("proc/cmdline", "/usr/local/bin/k3s server\0\0\0");
            files.iter().for_each(|(file, text)| self.write(&format!("proc/root{file}"), text));
        }

        fn their_socket(&self) -> PathBuf {
            seen_by(&self.process(), &self.listen.socket)
        }
    }

    #[test]
    fn an_api_server_that_cannot_reach_the_plugin_is_found() {
        type Change = fn(&mut Server);
        type Expected = &'static [(Severity, &'static str)];
        let cases: [(&str, Change, Expected); 13] = [
            (
                "all is well",
                |_| (),
                &[(Good, "may connect"), (Good, "it is right"), (Good, "sees the socket that is served")],
            ),
            (
                "another user",
                |server| server.listen.allow_uids = BTreeSet::from([4_000_000]),
                &[(Failure, "may not connect"), (Good, "it is right"), (Good, "sees the socket")],
            ),
            (
                "an old inode",
                |server| {
                    fs::remove_file(server.their_socket()).unwrap();
                    drop(UnixListener::bind(server.their_socket()).unwrap());
                },
                &[(Good, "may connect"), (Good, "it is right"), (Failure, "has another socket")],
            ),
            (
                "no mount",
                |server| fs::remove_file(server.their_socket()).unwrap(),
                &[(Good, "may connect"), (Good, "it is right"), (Warning, "sees nothing at")],
            ),
            (
                "no encryption",
                |server| server.write("proc/cmdline", "kube-apiserver\0--v=2\0"),
                &[(Good, "may connect"), (Failure, "it encrypts nothing"), (Good, "sees the socket")],
            ),
            (
                "named in two words",
                |server| server.write("proc/cmdline", "kube-apiserver\0--encryption-provider-config\0/etc/enc.yaml\0"),
                &[(Good, "may connect"), (Good, "it is right"), (Good, "sees the socket")],
            ),
            (
                "k3s, as the guide has it",
                |server| server.is_of("k3s-server", &[(K3S, GUIDE), (K3S_WRITES, OTHER)]),
                &[(Good, "may connect"), (Good, "it is right"), (Good, "sees the socket")],
            ),
            (
                "RKE2 before its API server runs, with a single argument in another file",
                |server| {
                    let more = "kube-apiserver-arg+: encryption-provider-config=/etc/enc.yaml";
                    let none = "kube-apiserver-arg: [v=2]\ntoken: secret";
                    server.is_of("rke2", &[(RKE2, none), ("/etc/rancher/rke2/config.yaml.d/90-more.yaml", more)]);
                },
                &[(Good, "may connect"), (Good, "it is right"), (Good, "sees the socket")],
            ),
            (
                "k3s whose argument another file takes away",
                |server| {
                    let none = "kube-apiserver-arg: [v=2]";
                    server.is_of("k3s-server", &[(K3S, GUIDE), ("/etc/rancher/k3s/config.yaml.d/90-less.yaml", none)]);
                },
                &[(Good, "may connect"), (Warning, "cannot be seen"), (Good, "sees the socket")],
            ),
            (
                "k3s with its own encryption",
                |server| server.is_of("k3s-server", &[(K3S_WRITES, OTHER)]),
                &[(Good, "may connect"), (Failure, "has no kms provider"), (Good, "sees the socket")],
            ),
            (
                "k3s of which nothing is seen",
                |server| server.is_of("k3s-server", &[]),
                &[(Good, "may connect"), (Warning, "API server of k3s-server (pid 7)"), (Good, "sees the socket")],
            ),
            (
                "another flag that begins so",
                |server| {
                    server.write("proc/cmdline", "kube-apiserver\0--encryption-provider-config-automatic-reload=true\0")
                },
                &[(Good, "may connect"), (Failure, "it encrypts nothing"), (Good, "sees the socket")],
            ),
            (
                "a file that is not there",
                |server| fs::remove_file(server.directory.path().join("proc/root/etc/enc.yaml")).unwrap(),
                &[(Good, "may connect"), (Failure, "cannot be read"), (Good, "sees the socket")],
            ),
        ];
        for (case, change, expected) in cases {
            let mut server = Server::new();
            change(&mut server);
            let mut findings = Findings::default();
            examine_servers(&[server.process()], &server.listen, None, &mut findings);
            let found: Vec<_> = findings.0.iter().map(|finding| (finding.severity, finding.what.as_str())).collect();
            assert_eq!(found.len(), expected.len(), "{case}: {found:?}");
            for ((severity, what), (wanted, words)) in found.iter().zip(expected) {
                assert!(severity == wanted && what.contains(words), "{case}: {words}: {found:?}");
            }
        }
        let (server, mut findings) = (Server::new(), Findings::default());
        examine_servers(&[], &server.listen, None, &mut findings);
        assert!(findings.0.is_empty(), "none runs here, and none is asked about: {:?}", findings.0);
    }
}
