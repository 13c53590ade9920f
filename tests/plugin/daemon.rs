//! The daemon among others: idle and silent peers, too few file descriptors, an inherited socket, a new configuration,
//! and what systemd hears of it.

use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, chown, lchown, symlink};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::process::Stdio;
use std::time::{Duration, Instant};
use std::{fs, io::Read};

use crate::family::Family;
use crate::plugin::{Host, Plugin, lacks_root};
use crate::supervisor::inheriting;
use crate::trickle::Peer;

/// A user who is not allowed.
const STRANGER: u32 = 54_321;

fn host() -> Host {
    let host = Host::new();
    host.generate("0s");
    host
}

/// Starts `serve` with this socket, as systemd does.
fn serve_inherited(host: &Host, listener: &UnixListener) -> Plugin {
    let mut command = inheriting(host.command(&["serve", "--config"]).arg(host.write_configuration()));
    command.stdin(Stdio::from(OwnedFd::from(listener.try_clone().unwrap())));
    host.start(command)
}

#[test]
fn five_hundred_idle_connections_leave_the_service_well_and_are_closed() {
    let host = host();
    let plugin = host.serve_healthy();
    let began = Instant::now();
    let mut idle: Vec<UnixStream> = (0..500).map(|_| UnixStream::connect(&plugin.socket).unwrap()).collect();
    plugin.round_trip();
    // None of them sent HTTP/2's preface: each is closed, and not by us.
    for stream in &mut idle {
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        assert_eq!(stream.read(&mut [0; 64]).map(|length| length > 64).ok(), Some(false));
        while stream.read(&mut [0; 64]).unwrap() > 0 {}
    }
    assert!(began.elapsed() >= Duration::from_secs(4), "they had time to begin");
    plugin.round_trip();
}

#[test]
fn a_request_that_comes_while_the_token_is_being_connected_to_waits_for_it() {
    let host = host();
    for _ in 0..3 {
        host.serve().round_trip();
    }
}

#[test]
fn an_end_is_not_held_up_by_idle_peers() {
    let host = host();
    let plugin = host.serve_healthy();
    let connect = |_| UnixStream::connect(&plugin.socket).unwrap();
    let _silent: Vec<UnixStream> = (0..50).map(connect).collect();
    let mut idle: Vec<UnixStream> = (0..50).map(connect).collect();
    for stream in &mut idle {
        stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").unwrap();
        stream.read_exact(&mut [0; 9]).unwrap(); // its settings: it speaks HTTP/2
    }
    // Requests of which nothing follows the headers.
    let _unfinished: Vec<Peer> = (0..5).map(|_| Peer::connect(&plugin.socket)).collect();
    let began = Instant::now();
    assert_eq!(plugin.stop().code(), Some(0));
    assert!(began.elapsed() < Duration::from_secs(4), "{:?}", began.elapsed());
}

#[test]
fn too_few_file_descriptors_are_survived() {
    let host = host();
    let configuration = host.write_configuration();
    // Both limits, since the plugin raises its soft one; the shell is replaced by the plugin.
    let limited =
        format!("ulimit -n 40; exec {} serve --config {}", env!("CARGO_BIN_EXE_trousseau"), configuration.display());
    let mut plugin = host.start(host.shell(&limited));
    plugin.wait_until("it is healthy", |plugin| plugin.status().is_ok());
    let crowd: Vec<UnixStream> = (0..60).map(|_| UnixStream::connect(&plugin.socket).unwrap()).collect();
    plugin.wait_until("it runs out of descriptors", |plugin| plugin.log().contains("Too many open files"));
    drop(crowd);
    plugin.wait_until("it is healthy again", |plugin| plugin.status().is_ok());
    plugin.round_trip();
    // It tried twenty times a second.
    plugin.wait_until("it is counted", |plugin| plugin.log().contains("happened again"));
    assert_eq!(
        plugin.log().matches("\"message\":\"a connection could not be accepted\"").count(),
        1,
        "{}",
        plugin.log()
    );
}

#[test]
fn an_inherited_socket_is_served_and_left_behind() {
    let host = host();
    let socket = host.path("kms.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let inode = fs::metadata(&socket).unwrap().ino();
    let mut plugin = serve_inherited(&host, &listener);
    plugin.wait_until("it is healthy", |plugin| plugin.status().is_ok());
    plugin.round_trip();
    assert_eq!(plugin.stop().code(), Some(0));
    assert_eq!(fs::metadata(&socket).unwrap().ino(), inode, "the door stays, and waits for the next one");
    UnixStream::connect(&socket).unwrap();
}

#[test]
fn an_inherited_socket_of_another_path_is_told_of() {
    let host = host();
    let listener = UnixListener::bind(host.path("other.sock")).unwrap();
    let plugin = serve_inherited(&host, &listener);
    assert!(plugin.log().contains("let ListenStream= of the socket unit name it"), "{}", plugin.log());
}

#[test]
fn of_several_inherited_sockets_its_own_is_served() {
    let host = host();
    let configuration = host.write_configuration();
    let (own, other) = (host.path("kms.sock"), host.path("other.sock"));
    let (first, second) = (UnixListener::bind(&other).unwrap(), UnixListener::bind(&own).unwrap());
    // As systemd does: descriptors from 3 on, and the number of the process that they are meant for.
    let inherit = format!(
        "export LISTEN_FDS=2 LISTEN_PID=$$; exec 3<&0 4<&1 0</dev/null 1>/dev/null; exec {} serve --config {}",
        env!("CARGO_BIN_EXE_trousseau"),
        configuration.display()
    );
    let mut command = host.shell(&inherit);
    command.stdin(Stdio::from(OwnedFd::from(first))).stdout(Stdio::from(OwnedFd::from(second)));
    let mut plugin = host.start(command);
    plugin.wait_until("it is healthy", |plugin| plugin.status().is_ok());
    plugin.round_trip();
}

#[test]
fn a_log_that_takes_nothing_stops_nothing() {
    let host = host();
    for sink in ["/dev/full", "&-"] {
        let serve = format!(
            "exec {} serve --config {} 2>{sink}",
            env!("CARGO_BIN_EXE_trousseau"),
            host.write_configuration().display()
        );
        let mut plugin = host.start(host.shell(&serve));
        plugin.wait_until("it is healthy", |plugin| plugin.status().is_ok());
        plugin.round_trip();
    }
}

#[test]
fn a_place_that_takes_no_socket_is_named() {
    let host = host();
    let _lives = UnixListener::bind(host.path("other.sock")).unwrap();
    symlink(host.path("nowhere"), host.path("link.sock")).unwrap();
    symlink(host.path("other.sock"), host.path("live.sock")).unwrap();
    for (place, words) in [
        ("/no/such/directory/kms.sock", "make the directory"),
        (host.path("link.sock").to_str().unwrap(), "not a socket"),
        (host.path("live.sock").to_str().unwrap(), "not a socket"),
    ] {
        let configuration = host.configuration().replace(host.path("kms.sock").to_str().unwrap(), place);
        host.write_secret("trousseau.toml", &configuration);
        let file = host.path("trousseau.toml");
        let done = host.command(&["serve", "--config", file.to_str().unwrap()]).output().unwrap();
        let said = String::from_utf8_lossy(&done.stderr);
        assert!(!done.status.success() && said.contains(words), "{place}: {said}");
    }
    for link in ["link.sock", "live.sock"] {
        assert!(fs::symlink_metadata(host.path(link)).unwrap().is_symlink(), "{link} is left alone");
    }
}

#[test]
fn a_directory_that_others_can_change_is_no_place_for_the_socket_and_told_of_where_systemd_made_it() {
    type Open = fn(&Host);
    let cases: [(Open, &str); 2] = [
        (|host| host.set_mode("", 0o777), "others could exchange it: the mode of"),
        (
            |host| chown(host.directory.path(), Some(STRANGER), None).unwrap(),
            "belongs to uid 54321, who could exchange the socket",
        ),
    ];
    // Nobody else can give a directory away.
    let count = if lacks_root() { 1 } else { cases.len() };
    for (open, words) in &cases[..count] {
        let host = host();
        let listener = UnixListener::bind(host.path("kms.sock")).unwrap();
        open(&host);
        let done = host.run(&["serve"]);
        assert_eq!(done.status.code(), Some(1), "{done:?}");
        assert!(String::from_utf8_lossy(&done.stderr).contains(words), "{done:?}");

        let mut plugin = serve_inherited(&host, &listener);
        plugin.wait_until("it is healthy", |plugin| plugin.status().is_ok());
        plugin.round_trip();
        let log = plugin.log();
        assert!(log.lines().any(|line| line.contains("\"ERROR\"") && line.contains(words)), "{log}");
        let done = host.run(&["doctor"]);
        let found = String::from_utf8_lossy(&done.stdout);
        let is_failure = |line: &str| line.contains("FAILURE") && line.contains(words);
        assert!(done.status.code() == Some(1) && found.lines().any(is_failure), "{words}: {found}");
    }
}

#[test]
fn whoever_could_turn_the_way_to_the_socket_is_told_of() {
    type Lay = fn(&Host);
    let turnable = "uid 54321, who could exchange the socket";
    let cases: [(&str, Lay, Option<&str>); 5] = [
        ("our own link", |host| symlink(host.path("real"), host.path("way")).unwrap(), None),
        (
            "another user's link",
            |host| {
                symlink("real", host.path("way")).unwrap();
                lchown(host.path("way"), Some(STRANGER), None).unwrap();
            },
            Some(turnable),
        ),
        (
            "another user's link behind ours",
            |host| {
                symlink("theirs", host.path("way")).unwrap();
                symlink("real", host.path("theirs")).unwrap();
                lchown(host.path("theirs"), Some(STRANGER), None).unwrap();
            },
            Some(turnable),
        ),
        (
            "a directory above in which everybody may rename",
            |host| {
                fs::rename(host.path("real"), host.path("way")).unwrap();
                host.set_mode("", 0o777);
            },
            Some("others could exchange it"),
        ),
        (
            "one above like /tmp",
            |host| {
                fs::rename(host.path("real"), host.path("way")).unwrap();
                host.set_mode("", 0o1777);
            },
            None,
        ),
    ];
    if lacks_root() {
        return; // nobody else can give a link away
    }
    for (case, lay, told) in cases {
        let host = host();
        fs::create_dir(host.path("real")).unwrap();
        host.set_mode("real", 0o700);
        lay(&host);
        symlink("way/kms.sock", host.path("kms.sock")).unwrap(); // where the test connects
        let mut plugin = host.serve_with(&host.configuration().replace("/kms.sock", "/way/kms.sock"));
        plugin.wait_until("it is healthy", |plugin| plugin.status().is_ok());
        let log = plugin.log();
        assert_eq!(log.contains("could exchange"), told.is_some(), "{case}: {log}");
        assert!(told.is_none_or(|words| log.contains(words)), "{case}: {log}");
    }
}

#[test]
fn a_socket_that_is_no_longer_ours_is_left_alone() {
    let host = host();
    let plugin = host.serve_healthy();
    let socket = plugin.socket.clone();
    fs::remove_file(&socket).unwrap();
    let _other = UnixListener::bind(&socket).unwrap();
    assert_eq!(plugin.stop().code(), Some(0));
    assert!(socket.exists(), "it belongs to somebody else");
}

#[test]
fn sighup_takes_a_good_configuration_and_keeps_the_old_one_otherwise() {
    let mut host = host();
    let mut plugin = host.serve_healthy();
    let (sealed, key_id) = plugin.round_trip();
    let good = host.configuration();
    let debug = "[log]\nlevel = \"debug\"\n";
    // A line for each request is for who asks for more.
    let requests_told = |plugin: &Plugin| plugin.log().matches("\"message\":\"done\"").count();
    for (case, configuration) in [
        ("it cannot be read", good.replace("sessions", "sesions")),
        ("its token is not there", good.replace("token=trousseau", "token=absent")),
    ] {
        host.write_secret("trousseau.toml", &format!("{configuration}{debug}"));
        let before = plugin.log().len();
        plugin.reload();
        plugin.wait_until(case, |plugin| plugin.log()[before..].contains("the old one stays"));
        plugin.decrypt(&sealed, &key_id).unwrap();
        plugin.round_trip();
    }
    assert_eq!(requests_told(&plugin), 0, "{}", plugin.log());
    // What needs a restart is said, and the rest is taken.
    host.write_secret("trousseau.toml", &good.replace("kms.sock", "elsewhere.sock"));
    plugin.reload();
    plugin.wait_until("it says so", |plugin| plugin.log().contains("only allow-uids changes without a restart"));
    plugin.round_trip();
    // A new cluster name makes a new key_id: it shows which configuration serves.
    host.cluster = "renamed".into();
    host.extra = debug.into();
    host.write_configuration();
    plugin.reload();
    plugin.wait_until("the new one serves", |plugin| plugin.status().is_ok_and(|status| status.key_id != key_id));
    plugin.round_trip();
    plugin.decrypt(&sealed, &key_id).unwrap();
    plugin.wait_until("more is logged", |plugin| requests_told(plugin) >= 3);
    // And less again, once the log says that this one was read, too.
    host.extra = debug.replace("debug", "info");
    host.write_configuration();
    let reloads = |plugin: &Plugin| plugin.log().matches("configuration read again").count();
    let before = reloads(&plugin);
    plugin.reload();
    plugin.wait_until("it is read", |plugin| reloads(plugin) > before);
    let told = requests_told(&plugin);
    plugin.round_trip();
    assert_eq!(requests_told(&plugin), told, "{}", plugin.log());
    assert_eq!(plugin.stop().code(), Some(0));
}

#[test]
fn systemd_hears_when_it_is_ready_how_it_is_and_that_it_lives() {
    if Family::chosen().sees_no_new_keys() {
        return;
    }
    let host = Host::new();
    let configuration = host.write_configuration();
    let heard = UnixDatagram::bind(host.path("notify.sock")).unwrap();
    heard.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let mut command = host.command(&["serve", "--config", configuration.to_str().unwrap()]);
    command.env("NOTIFY_SOCKET", host.path("notify.sock")).env("WATCHDOG_USEC", "200000");
    let plugin = host.start(command);
    let hears = |wanted: &str| {
        let mut message = [0; 4096];
        for _ in 0..1000 {
            let length = heard.recv(&mut message).unwrap_or_else(|error| panic!("{wanted}: {error}"));
            if String::from_utf8_lossy(&message[..length]).contains(wanted) {
                return;
            }
        }
        panic!("{wanted} was not said");
    };
    hears("READY=1"); // although there is no KEK: a boot does not wait for one
    hears("STATUS=UNAVAILABLE: provider hsm has no KEK");
    host.generate("0s");
    hears("STATUS=serving, key_id tr1-");
    (0..3).for_each(|_| hears("WATCHDOG=1"));
    assert_eq!(plugin.stop().code(), Some(0));
    hears("STOPPING=1");
}
