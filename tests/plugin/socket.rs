//! The socket: who may connect, what it survives, and how it ends.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::time::{Duration, Instant};

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

#[test]
fn a_peer_that_is_not_allowed_is_closed_before_http2() {
    const STRANGER: u32 = 54_321;
    if crate::plugin::lacks_root() {
        return;
    }
    let host = Host::new();
    host.generate("0s");
    let plugin = host.serve_healthy();
    // Past the permission bits, which would stop it first.
    fs::set_permissions(&plugin.socket, fs::Permissions::from_mode(0o666)).unwrap();
    let socket = plugin.socket.to_str().unwrap();
    let program = host.program_for_strangers();
    let probe = |uid: u32| {
        let mut command = std::process::Command::new(&program);
        command.args(["probe", "--socket", socket]).uid(uid).gid(uid).output().unwrap()
    };
    assert!(probe(0).status.success());
    let refused = probe(STRANGER);
    assert_eq!(refused.status.code(), Some(77), "{refused:?}");
    assert!(String::from_utf8_lossy(&refused.stderr).contains("listen.allow-uids"), "{refused:?}");
    assert!(plugin.log().contains(&format!("\"uid\":{STRANGER}")), "the log names the peer");
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
fn connections_without_end_are_closed_and_take_nobodys_place() {
    const PLACES: usize = 256;
    let host = Host::new();
    host.generate("0s");
    let mut plugin = host.serve_healthy();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let mut first = runtime.block_on(Client::connect(&plugin.socket, Duration::from_secs(5))).unwrap();
    runtime.block_on(first.status()).unwrap();
    let begun = |_| {
        let mut stream = UnixStream::connect(&plugin.socket).unwrap();
        let _closed_early = stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0");
        stream
    };
    let crowd: Vec<_> = (0..PLACES + 20).map(begun).collect();
    plugin.wait_until("some are closed", |plugin| plugin.log().matches("the newest is closed").count() > 20);
    runtime.block_on(first.status()).unwrap();
    drop(crowd);
    let began = Instant::now();
    let serves = async || Client::connect(&plugin.socket, Duration::from_secs(5)).await?.status().await;
    while let Err(error) = runtime.block_on(serves()) {
        assert!(began.elapsed() < Duration::from_secs(5), "{error}");
    }
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
