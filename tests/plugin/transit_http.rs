//! What stands at OpenBao's address is not OpenBao, or not the one that is meant: nothing hangs, nobody else gets the
//! token, and the cause is named.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ServerConfig, ServerConnection, StreamOwned};
use tempfile::TempDir;
use tonic::Code;

use crate::certificates::{Authority, Certificate};
use crate::plugin::Plugin;
use crate::transit::{Site, quoted};

const TOKEN: &str = "s.ThisTokenIsInNobodysLog0";

/// What answers a request.
#[derive(Clone)]
pub enum Habit {
    /// These bytes, whatever was asked, and an end.
    Says(Vec<u8>),
    /// What this makes of the request's text, which has come whole; and counts.
    Answers(fn(&str) -> Vec<u8>, Arc<Tally>),
    /// Nothing: it takes HTTP/2 or 1.1, and tells which was agreed upon.
    Negotiates(Sender<Option<Vec<u8>>>),
    /// Nothing, and no end.
    Silent,
    /// No TLS.
    Plain,
}

/// What came so far.
#[derive(Default)]
pub struct Tally {
    pub connections: AtomicUsize,
    /// By their path.
    pub requests: Mutex<BTreeMap<String, usize>>,
}

/// Whoever listens on loopback, with a certificate of this authority, until the tests end.
pub fn listen(certificate: &Certificate, habit: Habit) -> SocketAddr {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let chain = CertificateDer::pem_file_iter(&certificate.certificate).unwrap().map(Result::unwrap).collect();
    let key = PrivateKeyDer::from_pem_file(&certificate.key).unwrap();
    let mut config = builder.with_no_client_auth().with_single_cert(chain, key).unwrap();
    if matches!(habit, Habit::Negotiates(_)) {
        config.alpn_protocols = ["h2", "http/1.1"].map(Into::into).to_vec();
    }
    let config = Arc::new(config);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let (config, habit) = (Arc::clone(&config), habit.clone());
            thread::spawn(move || answer(stream.unwrap(), config, &habit));
        }
    });
    address
}

/// Whoever is gone does not read what is said.
fn answer(mut stream: TcpStream, config: Arc<ServerConfig>, habit: &Habit) {
    match habit {
        Habit::Plain => drop(stream.write_all(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n")),
        Habit::Silent => drop(stream.read(&mut [0; 4096]).map(|_| thread::sleep(Duration::from_secs(60)))),
        Habit::Negotiates(heard) => {
            let mut connection = ServerConnection::new(config).unwrap();
            while connection.is_handshaking() && connection.complete_io(&mut stream).is_ok() {}
            drop(heard.send(connection.alpn_protocol().map(<[u8]>::to_vec)));
        }
        Habit::Answers(answer, tally) => {
            tally.connections.fetch_add(1, Ordering::Relaxed);
            let mut stream = StreamOwned::new(ServerConnection::new(config).unwrap(), stream);
            while let Some(request) = read_request(&mut stream) {
                let path = request.split(' ').nth(1).unwrap_or_default().to_owned();
                *tally.requests.lock().unwrap().entry(path).or_default() += 1;
                if stream.write_all(&answer(&request)).is_err() {
                    break;
                }
            }
        }
        Habit::Says(bytes) => {
            let mut stream = StreamOwned::new(ServerConnection::new(config).unwrap(), stream);
            while stream.read(&mut [0; 16 * 1024]).is_ok_and(|length| length > 0) {
                if stream.write_all(bytes).is_err() {
                    break;
                }
            }
        }
    }
}

/// One request, if another comes.
fn read_request(stream: &mut impl Read) -> Option<String> {
    let mut text = Vec::new();
    loop {
        let mut bytes = [0; 16 * 1024];
        match stream.read(&mut bytes) {
            Ok(length) if length > 0 => text.extend_from_slice(&bytes[..length]),
            _ => return None,
        }
        let so_far = String::from_utf8_lossy(&text);
        let Some((head, body)) = so_far.split_once("\r\n\r\n") else { continue };
        let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")).map_or("0", str::trim);
        if body.len() >= length.parse().unwrap() {
            return Some(so_far.into_owned());
        }
    }
}

pub fn message(head: &str, body: &[u8]) -> Vec<u8> {
    let mut bytes = format!("HTTP/1.1 {head}\r\ncontent-length: {}\r\n\r\n", body.len()).into_bytes();
    bytes.extend_from_slice(body);
    bytes
}

fn response(head: &str, body: &[u8]) -> Habit {
    Habit::Says(message(head, body))
}

/// Tells of each connection what was sent first.
fn bystander() -> (SocketAddr, Receiver<Vec<u8>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let (heard, hears) = channel();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut bytes = vec![0; 4096];
            let length = stream.unwrap().read(&mut bytes).unwrap_or_default();
            bytes.truncate(length);
            drop(heard.send(bytes));
        }
    });
    (address, hears)
}

/// The plugin with a token, and this address.
pub fn host(address: SocketAddr, authority: &Authority) -> crate::plugin::Host {
    let mut host = crate::transit::host_without_token();
    let directory = host.directory.path().display().to_string();
    host.write_secret("vault-token", TOKEN);
    host.provider = Some(format!(
        r#"[[provider]]
name = "vault"
type = "transit"
address = "https://{address}"
key = "kek"
ca-file = "{}"
auth = {{ method = "token", token-file = "{directory}/vault-token" }}"#,
        authority.file().display()
    ));
    host
}

/// Encrypt fails in time with this code, Status says these words, and no token is in the log.
fn assert_told(plugin: &mut Plugin, case: &str, code: Code, words: &[&str]) {
    plugin.wait_until(case, |plugin| {
        plugin.status().is_err_and(|said| words.iter().all(|words| said.message.contains(words)))
    });
    let began = Instant::now();
    let said = plugin.encrypt(b"seed").unwrap_err();
    assert!(began.elapsed() < Duration::from_millis(3800), "{case}: {:?}", began.elapsed());
    assert_eq!(said.code, code, "{case}: {said:?}");
    assert!(!plugin.log().contains(TOKEN), "{case}");
    assert!(!plugin.log().contains("panicked"), "{case}");
}

#[test]
fn whoever_answers_instead_gets_no_token_and_is_named() {
    let directory = TempDir::new().unwrap();
    let authority = Authority::new(directory.path().join("authority"));
    let other = Authority::new(directory.path().join("other"));
    let [own, expired] = [authority.issue("own"), authority.issue_until("expired", "20260101000000Z")];
    let elsewhere = other.issue("elsewhere");
    let (to, redirected) = bystander();
    let big = [b"{\"data\":\"".as_slice(), &vec![b'x'; 10 << 20], b"\"}"].concat();
    let location = format!("307 Temporary Redirect\r\nlocation: https://{to}/v1/auth/token/lookup-self");
    let html = b"<html><body>Bad Gateway</body></html>";
    let cases: Vec<(&str, &Certificate, Habit, &[&str])> = vec![
        (
            "another CA",
            &elsewhere,
            response("200 OK", b"{}"),
            &["cannot be reached", "invalid peer certificate", "UnknownIssuer"],
        ),
        ("expired", &expired, response("200 OK", b"{}"), &["cannot be reached", "invalid peer certificate", "expired"]),
        ("plain HTTP", &own, Habit::Plain, &["cannot be reached", "does not speak TLS"]),
        ("redirect", &own, response(&location, b""), &["sends us to https://127.0.0.1:", "no token goes there"]),
        ("10 MB", &own, response("200 OK", &big), &["longer than any of Vault's"]),
        ("truncated", &own, response("200 OK", b"{\"data\":{\"ttl\":0,"), &["its answer is not Vault's"]),
        ("a proxy", &own, response("502 Bad Gateway", html), &["502 Bad Gateway", "is a proxy in between?"]),
        ("HTML and 200", &own, response("200 OK", html), &["its answer is not Vault's"]),
        ("an end", &own, Habit::Says(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{".to_vec()), &["vault"]),
        ("silent", &own, Habit::Silent, &["did not answer in time"]),
    ];
    // All at the same time: each waits.
    thread::scope(|scope| {
        for (case, certificate, habit, words) in cases {
            let host = host(listen(certificate, habit), &authority);
            scope.spawn(move || assert_told(&mut host.serve(), case, Code::Unavailable, words));
        }
    });
    assert!(redirected.try_recv().is_err(), "it went where it was sent");
}

#[test]
fn http_2_is_agreed_upon_with_whoever_speaks_it() {
    let directory = TempDir::new().unwrap();
    let authority = Authority::new(directory.path().join("authority"));
    let (heard, hears) = channel();
    let host = host(listen(&authority.issue("own"), Habit::Negotiates(heard)), &authority);
    let _plugin = host.serve();
    assert_eq!(hears.recv_timeout(Duration::from_secs(30)).unwrap().as_deref(), Some(b"h2".as_slice()));
}

/// One who knows nobody: a port where nobody listens, and a name that does not resolve.
#[test]
fn where_nobody_is_that_is_said() {
    let directory = TempDir::new().unwrap();
    let authority = Authority::new(directory.path().join("authority"));
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let mut host = host(nobody, &authority);
    assert_told(&mut host.serve(), "a closed port", Code::Unavailable, &["cannot be reached", "refused"]);
    let provider = host.provider.take().unwrap();
    host.provider = Some(provider.replace("https://127.0.0.1:", "https://nowhere.invalid:"));
    assert_told(&mut host.serve(), "no such name", Code::Unavailable, &["cannot be reached", "nowhere.invalid"]);
}

/// Whoever can change the CA's certificate says who is Vault, and is sent the token.
#[test]
fn a_ca_or_a_client_certificate_that_others_can_change_is_refused() {
    let directory = TempDir::new().unwrap();
    let authority = Authority::new(directory.path().join("authority"));
    let client = authority.issue("client");
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let mut host = host(nobody, &authority);
    let of_token = host.provider.take().unwrap();
    let (kept, _) = of_token.split_once("auth = ").unwrap();
    let (cert, key) = (client.certificate.display(), client.key.display());
    host.provider = Some(format!(r#"{kept}auth = {{ method = "cert", cert-file = "{cert}", key-file = "{key}" }}"#));
    assert!(host.run(&["check"]).status.success());

    for (field, file) in [("ca-file", authority.file()), ("auth.cert-file", client.certificate.clone())] {
        let refused = |case: &str, words: &str| {
            let done = host.run(&["check"]);
            let said = String::from_utf8_lossy(&done.stderr);
            let is_told = said.contains(&format!("{field}: {}: {words}", file.display()));
            assert!(done.status.code() == Some(78) && is_told, "{case}: {said}");
        };
        // What serves by now reads it anew for its next connection.
        let mut plugin = host.serve();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o664)).unwrap();
        refused("mode", "can be changed by others: its mode is 0664");
        assert_told(&mut plugin, field, Code::Unavailable, &["can be changed by others", "chmod go-w"]);
        fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
        if !crate::plugin::lacks_root() {
            std::os::unix::fs::chown(&file, Some(54_321), None).unwrap();
            refused("owner", "belongs to uid 54321, who could change it");
            std::os::unix::fs::chown(&file, Some(0), None).unwrap();
        }
    }
}

/// OpenBao's certificate, and then the CA that the plugin trusts.
#[test]
fn certificates_that_are_exchanged_are_taken_while_the_plugin_runs() {
    let Some(mut site) = Site::new() else { return };
    let old = site.bao.authority.issue_until("old", "20260101000000Z");
    site.bao.present(&old);
    let mut plugin = site.host.serve();
    assert_told(&mut plugin, "expired", Code::Unavailable, &["invalid peer certificate", "expired"]);
    let new = site.bao.authority.issue("new");
    site.bao.present(&new);
    plugin.wait_until("it is healthy", |plugin| plugin.status().is_ok());
    plugin.round_trip();

    drop(plugin);
    let stranger = Authority::new(site.host.path("stranger"));
    let ca_file = site.host.path("ca.pem");
    fs::copy(stranger.file(), &ca_file).unwrap();
    site.set("ca-file", quoted(&ca_file.display().to_string()));
    let mut plugin = site.host.serve();
    assert_told(&mut plugin, "another CA", Code::Unavailable, &["UnknownIssuer", "see ca-file"]);
    fs::copy(site.bao.authority.file(), &ca_file).unwrap();
    plugin.wait_until("it is healthy", |plugin| plugin.status().is_ok());
    plugin.round_trip();
}
