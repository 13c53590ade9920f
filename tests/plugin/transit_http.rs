//! What stands at OpenBao's address is not OpenBao, or not the one that is meant: nothing hangs, nobody else gets the
//! token, and the cause is named.

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
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
enum Habit {
    /// These bytes, whatever was asked, and an end.
    Says(Vec<u8>),
    /// Nothing, and no end.
    Silent,
    /// No TLS.
    Plain,
}

/// Whoever listens on loopback, with a certificate of this authority, until the tests end.
fn listen(certificate: &Certificate, habit: Habit) -> SocketAddr {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let chain = CertificateDer::pem_file_iter(&certificate.certificate).unwrap().map(Result::unwrap).collect();
    let key = PrivateKeyDer::from_pem_file(&certificate.key).unwrap();
    let config = Arc::new(builder.with_no_client_auth().with_single_cert(chain, key).unwrap());
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

fn response(head: &str, body: &[u8]) -> Habit {
    let mut bytes = format!("HTTP/1.1 {head}\r\ncontent-length: {}\r\n\r\n", body.len()).into_bytes();
    bytes.extend_from_slice(body);
    Habit::Says(bytes)
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
fn host(address: SocketAddr, authority: &Authority) -> crate::plugin::Host {
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
