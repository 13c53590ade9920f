//! The socket: who may connect, what it survives, and how it ends.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use bytes::Bytes;
use h2::SendStream;
use h2::client::{ResponseFuture, SendRequest};
use tonic::Code;
use trousseau::service::client::Client;

use crate::family::Family;
use crate::observe::OBSERVED;
use crate::plugin::{Host, Plugin};
use crate::sizes::resident_kib;
use crate::v1beta1;

#[test]
fn it_is_the_owners_alone_and_goes_when_the_plugin_goes() {
    let host = Host::new();
    host.generate("0s");
    let plugin = host.serve_healthy();
    let metadata = fs::metadata(&plugin.socket).unwrap();
    assert_eq!(metadata.mode() & 0o7777, 0o600);
    let socket = plugin.socket.clone();
    assert_eq!(plugin.stop().code(), Some(0));
    assert!(!socket.exists());
}

/// The sockets of a process, and those of them that are of the network.
fn sockets(plugin: &Plugin) -> (Vec<String>, Vec<String>) {
    let proc = Path::new("/proc").join(plugin.pid().to_string());
    let open = fs::read_dir(proc.join("fd")).unwrap();
    let links = open.filter_map(|file| Some(fs::read_link(file.ok()?.path()).ok()?.to_str()?.to_owned()));
    let inode = |link: String| Some(link.strip_prefix("socket:[")?.strip_suffix(']')?.to_owned());
    let all: Vec<String> = links.filter_map(inode).collect();
    let tables = ["tcp", "tcp6", "udp", "udp6"].map(|table| proc.join("net").join(table));
    let text: String = tables.iter().filter_map(|table| fs::read_to_string(table).ok()).collect();
    let listed: Vec<&str> = text.lines().filter_map(|line| line.split_whitespace().nth(9)).collect();
    let network = all.iter().filter(|inode| listed.contains(&inode.as_str())).cloned().collect();
    (all, network)
}

#[test]
fn nothing_is_said_over_the_network_unless_the_configuration_says_so() {
    if Family::chosen() != Family::SoftHsm {
        eprintln!("skipped: what its library speaks to is its own matter");
        return;
    }
    for (extra, expected) in [("", 0), (OBSERVED, 1)] {
        let mut host = Host::new();
        host.extra = extra.into();
        host.generate("0s");
        let plugin = host.serve_healthy();
        plugin.round_trip();
        let (all, network) = sockets(&plugin);
        assert_eq!(network.len(), expected, "{extra}: {network:?} of {all:?}");
        assert!(all.len() > expected, "{extra}: its own socket is there: {all:?}");
    }
}

#[test]
fn a_stale_one_is_taken_over_a_live_one_is_not_and_a_file_is_never_removed() {
    let host = Host::new();
    host.generate("0s");
    host.serve_healthy().kill();
    assert!(host.path("kms.sock").exists());
    let plugin = host.serve_healthy();

    let second = host.run(&["serve"]);
    assert_eq!(second.status.code(), Some(1));
    assert!(
        String::from_utf8_lossy(&second.stderr).contains(&format!("process {} serves it", plugin.pid())),
        "{second:?}"
    );
    plugin.round_trip();
    drop(plugin);

    fs::write(host.path("kms.sock"), "precious").unwrap();
    let third = host.run(&["serve"]);
    assert_eq!(third.status.code(), Some(1));
    assert_eq!(fs::read(host.path("kms.sock")).unwrap(), b"precious");
}

/// A user who is not allowed at first.
const STRANGER: u32 = 54_321;

#[test]
fn a_peer_that_is_not_allowed_is_closed_before_http2() {
    if crate::plugin::lacks_root() {
        return;
    }
    let host = Host::new();
    host.generate("0s");
    let mut plugin = host.serve_healthy();
    // Past the permission bits, which would stop it first.
    fs::set_permissions(&plugin.socket, fs::Permissions::from_mode(0o666)).unwrap();
    let socket = plugin.socket.clone();
    let program = host.program_for_strangers();
    let probe = |uid: u32| {
        let mut command = Command::new(&program);
        command.args(["probe", "--socket"]).arg(&socket).uid(uid).gid(uid).output().unwrap()
    };
    assert!(probe(0).status.success());
    let refused = probe(STRANGER);
    assert_eq!(refused.status.code(), Some(77), "{refused:?}");
    assert!(String::from_utf8_lossy(&refused.stderr).contains("listen.allow-uids"), "{refused:?}");
    assert!(plugin.log().contains(&format!("\"uid\":{STRANGER}")), "the log names the peer");
    plugin.round_trip();
    // Whoever comes again and again does not fill the log.
    for _ in 0..20 {
        assert_eq!(probe(STRANGER).status.code(), Some(77));
    }
    let counted = format!("\"what\":\"uid {STRANGER}: peer is not in listen.allow-uids");
    plugin.wait_until("it is counted", |plugin| plugin.log().contains(&counted));
    assert_eq!(plugin.log().matches("\"message\":\"peer is not in").count(), 1, "{}", plugin.log());
}

#[test]
fn a_reload_lets_users_in_and_puts_out_those_that_are_in() {
    if crate::plugin::lacks_root() {
        return;
    }
    let host = Host::new();
    host.generate("0s");
    let mut plugin = host.serve_healthy_and_talkative();
    fs::set_permissions(&plugin.socket, fs::Permissions::from_mode(0o666)).unwrap();
    let (program, socket) = (host.program_for_strangers(), plugin.socket.clone());
    let stranger = |arguments: &[&str]| {
        let mut command = Command::new(&program);
        command.args(arguments).arg("--socket").arg(&socket).uid(STRANGER).gid(STRANGER).stdout(Stdio::null());
        command
    };
    let count = |plugin: &Plugin, words: &str| plugin.log().matches(words).count();
    let admit = |plugin: &mut Plugin, uids: &str| {
        let listen = format!("[listen]\nallow-uids = [{uids}]\n");
        host.write_secret("trousseau.toml", &host.configuration().replace("[listen]\n", &listen));
        let before = count(plugin, "configuration read again");
        plugin.reload();
        plugin.wait_until("it is read", |plugin| count(plugin, "configuration read again") > before);
    };
    assert!(!stranger(&["probe"]).output().unwrap().status.success());
    admit(&mut plugin, "0, 54321");
    let probed = stranger(&["probe"]).output().unwrap();
    assert!(probed.status.success(), "{probed:?}");

    let mut bench = stranger(&["bench", "--call", "encrypt", "--rate", "20", "--time", "1m"]);
    let bench = bench.stderr(Stdio::piped()).spawn().unwrap();
    let done = count(&plugin, "\"message\":\"done\"");
    plugin.wait_until("it is served", |plugin| count(plugin, "\"message\":\"done\"") > done + 20);
    admit(&mut plugin, "0");
    let ended = bench.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&ended.stderr);
    assert!(!ended.status.success() && said.contains("the plugin closed the connection"), "{ended:?}");
    assert!(!stranger(&["probe"]).output().unwrap().status.success());
    plugin.round_trip();
}

#[test]
fn garbage_on_it_leaves_the_service_well() {
    const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    let host = Host::new();
    host.generate("0s");
    let plugin = host.serve_healthy();
    let frame = |kind: u8, flags: u8, length: u32, payload: &[u8]| {
        [PREFACE, &length.to_be_bytes()[1..], &[kind, flags, 0, 0, 0, 1], payload].concat()
    };
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("nothing", vec![]),
        ("HTTP/1.1", b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n".to_vec()),
        ("TLS", vec![0x16, 0x03, 0x01, 0x02, 0x00, 0x01]),
        ("zeros", vec![0; 100_000]),
        ("half a preface", PREFACE[..12].to_vec()),
        ("a preface alone", PREFACE.to_vec()),
        ("headers that are no HPACK", frame(1, 4, 4, &[0xff; 4])),
        ("headers cut short", frame(1, 4, 100, b"abc")),
        ("a frame of 16 MiB", frame(0, 0, 0x00ff_ffff, &[0; 64])),
        ("an unknown frame", frame(0xaa, 0xff, 3, b"abc")),
        ("a continuation of nothing", frame(9, 4, 3, b"abc")),
    ];
    for (case, bytes) in cases {
        let mut stream = UnixStream::connect(&plugin.socket).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let _closed_early = stream.write_all(&bytes);
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let _whatever = stream.read_to_end(&mut Vec::new());
        assert!(plugin.status().is_ok(), "{case}");
    }
    plugin.round_trip();
}

#[test]
fn a_flood_of_header_frames_leaves_the_service_well() {
    let host = Host::new();
    host.generate("0s");
    let plugin = host.serve_healthy();
    let mut stream = UnixStream::connect(&plugin.socket).unwrap();
    stream.set_write_timeout(Some(Duration::from_secs(5))).unwrap();
    let continuation = [&[0, 4, 0, 9, 0, 0, 0, 0, 1][..], &[0; 1024]].concat();
    stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").unwrap();
    stream.write_all(&[0, 0, 0, 4, 0, 0, 0, 0, 0]).unwrap(); // SETTINGS
    stream.write_all(&[0, 0, 0, 1, 0, 0, 0, 0, 1]).unwrap(); // HEADERS that do not end
    let sent = (0..100_000).take_while(|_| stream.write_all(&continuation).is_ok()).count();
    assert!(sent < 100_000, "nobody stopped it");
    plugin.round_trip();
}

fn encrypt_request() -> http::Request<()> {
    let uri = "http://localhost/v2.KeyManagementService/Encrypt";
    let request = http::Request::post(uri).header("content-type", "application/grpc").header("te", "trailers");
    request.body(()).unwrap()
}

const STREAMS: usize = 10_000;

/// Streams with half of a message each; those that the service does not take yet wait in the client.
async fn halves_of_messages(mut client: SendRequest<Bytes>) -> Vec<(ResponseFuture, SendStream<Bytes>)> {
    const HALF: usize = 60_000;
    let head = [&[0][..], &(2 * HALF as u32).to_be_bytes()].concat();
    let half = Bytes::from([head, vec![0; HALF]].concat());
    let crowd = async {
        let mut open = Vec::new();
        for _ in 0..STREAMS {
            client = client.clone().ready().await?;
            let (response, mut message) = client.send_request(encrypt_request(), false)?;
            message.send_data(half.clone(), false)?;
            open.push((response, message));
        }
        Ok::<_, h2::Error>(open)
    };
    let open = tokio::time::timeout(PATIENCE, crowd).await.expect("they are not even begun").unwrap();
    tokio::time::sleep(Duration::from_secs(2)).await; // they are on their way
    open
}

/// One who waits for the answer of a request that never comes whole.
const PATIENCE: Duration = Duration::from_secs(45);
/// Per connection: 1,024 messages of at most 128 KiB.
const MEMORY_KIB: u64 = 128 << 10;

#[test]
fn streams_without_end_leave_the_service_well_and_are_ended() {
    let host = Host::new();
    host.generate("0s");
    let plugin = host.serve_healthy();
    let before = resident_kib(plugin.pid());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let stream = tokio::net::UnixStream::connect(&plugin.socket).await.unwrap();
        // As many as the server's settings let it, once they have come.
        let (client, connection) =
            h2::client::Builder::new().initial_max_send_streams(STREAMS).handshake(stream).await.unwrap();
        let connection = tokio::spawn(connection);
        tokio::time::sleep(Duration::from_millis(300)).await;
        let mut streams = halves_of_messages(client).await;
        assert_eq!(streams.len(), STREAMS);
        let more = resident_kib(plugin.pid()).saturating_sub(before);
        eprintln!("{} streams, {more} KiB", streams.len());
        assert!(more < MEMORY_KIB, "{more} KiB for {} streams", streams.len());
        let mut other = Client::connect(&plugin.socket, Duration::from_secs(5)).await.unwrap();
        other.status().await.unwrap();
        let (response, _half) = streams.swap_remove(0);
        let answer = tokio::time::timeout(PATIENCE, response).await.expect("it is never ended").unwrap();
        let code = answer.headers().get("grpc-status").map(|code| Code::from_bytes(code.as_bytes()));
        assert!(matches!(code, Some(Code::Cancelled | Code::DeadlineExceeded)), "{answer:?}");
        connection.abort();
    });
    plugin.round_trip();
}

#[test]
fn connections_without_end_take_nobodys_place_and_give_up_their_own() {
    const PLACES: usize = 256;
    let host = Host::new();
    host.generate("0s");
    let mut plugin = host.serve_healthy();
    let socket = plugin.socket.clone();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let mut first = runtime.block_on(Client::connect(&socket, Duration::from_secs(5))).unwrap();
    let begun = |_| {
        let mut stream = UnixStream::connect(&socket).unwrap();
        let _closed_early = stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0");
        runtime.block_on(first.status()).unwrap();
        stream
    };
    let crowd: Vec<_> = (0..PLACES + 20).map(begun).collect();
    plugin.wait_until("some are closed", |plugin| plugin.log().contains("256 connections are open"));
    // Whoever has only just begun may be about to ask: that takes no place from them yet.
    let serves = async || Client::connect(&socket, Duration::from_secs(5)).await?.status().await;
    plugin.wait_until("others are served beside the crowd", |_| runtime.block_on(serves()).is_ok());
    assert!(plugin.log().contains("one that asks nothing is closed"), "{}", plugin.log());
    runtime.block_on(first.status()).unwrap();
    plugin.round_trip();
    drop(crowd);
    plugin.round_trip();
}

/// The code that v1beta1's Version is answered with.
fn version_v1beta1(host: &Host) -> Code {
    let plugin = host.serve_healthy();
    match v1beta1::call::<(), ()>(&plugin.socket, "Version", ()) {
        Ok(()) => Code::Ok,
        Err(answer) => answer.code,
    }
}

#[test]
fn v1beta1_is_there_only_when_it_is_switched_on() {
    let host = Host::new();
    host.generate("0s");
    assert_eq!(version_v1beta1(&host), Code::Ok);
    assert_eq!(version_v1beta1(&host.without_v1beta1()), Code::Unimplemented);
}
