//! A standby that lags for good, and asks the active node where it is told to; and how many calls and connections it costs
//! to ask one that does not.

use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use base64ct::{Base64, Encoding};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::certificates::Authority;
use crate::secrets;
use crate::transit_http::{Habit, Tally, host, listen, message};

/// How far a node has come.
fn index(value: u64) -> String {
    Base64::encode_string(json!({"cluster": "a", "value": value.to_string()}).to_string().as_bytes())
}

/// The active node, and the standby.
const ACTIVE: u64 = 10;
const STANDBY: u64 = 9;

fn lags(request: &str) -> Vec<u8> {
    answer(request, false)
}

fn keeps_up(request: &str) -> Vec<u8> {
    answer(request, true)
}

/// Transit, whose key wraps nothing at all. The active node is asked which versions it has, and a standby for the rest: one
/// that lags decrypts for who would have it ask the active one, as far as that has come.
fn answer(request: &str, keeps_up: bool) -> Vec<u8> {
    let (head, body) = request.split_once("\r\n\r\n").unwrap();
    let has = |header: &str| head.lines().any(|line| line.eq_ignore_ascii_case(header));
    let asked = |field: &str| {
        let body: Value = serde_json::from_str(body).unwrap();
        body[field].as_str().unwrap().to_owned()
    };
    let path = head.split(' ').nth(1).unwrap();
    let is_forwarded =
        has("x-vault-inconsistent: forward-active-node") && has(&format!("x-vault-index: {}", index(ACTIVE)));
    let data = match path {
        "/v1/auth/token/lookup-self" => json!({"ttl": 0, "renewable": false}),
        "/v1/transit/keys/kek" => {
            json!({"type": "aes256-gcm96", "keys": {"1": 1_700_000_000}, "latest_version": 1})
        }
        "/v1/transit/encrypt/kek" => {
            let dek = Base64::decode_vec(&asked("plaintext")).unwrap();
            secrets::used(&dek);
            // As long as a nonce, a DEK and a tag.
            let wrapped = [dek, vec![0; 28]].concat();
            json!({"ciphertext": format!("vault:v1:{}", Base64::encode_string(&wrapped))})
        }
        "/v1/transit/decrypt/kek" if keeps_up || is_forwarded => {
            let wrapped = Base64::decode_vec(asked("ciphertext").strip_prefix("vault:v1:").unwrap()).unwrap();
            json!({"plaintext": Base64::encode_string(&wrapped[..32])})
        }
        "/v1/transit/decrypt/kek" => {
            return message("400 Bad Request", br#"{"errors":["invalid ciphertext: version is too new"]}"#);
        }
        _ => return message("404 Not Found", br#"{"errors":["no handler for route"]}"#),
    };
    let index = index(if path.contains("/keys/") { ACTIVE } else { STANDBY });
    message(&format!("200 OK\r\nx-vault-index: {index}"), json!({ "data": data }).to_string().as_bytes())
}

#[test]
fn a_standby_that_does_not_know_a_version_yet_is_told_to_ask_the_active_node() {
    let directory = TempDir::new().unwrap();
    let authority = Authority::new(directory.path().join("authority"));
    let host = host(listen(&authority.issue("standby"), Habit::Answers(lags, Arc::default())), &authority);
    // The data keys are known here: none is in the most talkative log, which is looked through at the end.
    let mut command = host.command(&["serve", "--config"]);
    command.arg(host.write_configuration()).env("TROUSSEAU_LOG", "trace").stdin(Stdio::null());
    let mut plugin = host.start(command);
    plugin.wait_until("it is healthy", |plugin| plugin.status().is_ok());
    plugin.round_trip();
    assert!(plugin.log().contains("\"TRACE\""), "it is not talkative");
}

#[test]
fn a_request_costs_one_call_on_a_connection_that_is_kept() {
    const REQUESTS: usize = 50;
    let directory = TempDir::new().unwrap();
    let authority = Authority::new(directory.path().join("authority"));
    let tally = Arc::new(Tally::default());
    let of_active = listen(&authority.issue("active"), Habit::Answers(keeps_up, Arc::clone(&tally)));
    let host = host(of_active, &authority);
    let plugin = host.serve_healthy();
    let connections = || tally.connections.load(Ordering::Relaxed);
    let calls = |of: &str| tally.requests.lock().unwrap().get(&format!("/v1/transit/{of}/kek")).copied().unwrap_or(0);
    let before = (connections(), ["encrypt", "decrypt"].map(calls));
    for _ in 0..REQUESTS {
        plugin.round_trip();
    }
    assert_eq!(connections(), before.0, "a connection was not kept");
    for (of, before) in ["encrypt", "decrypt"].into_iter().zip(before.1) {
        let made = calls(of) - before;
        // The keyring's own first round trip may be among them.
        assert!((REQUESTS..=REQUESTS + 1).contains(&made), "{made} calls of {of} for {REQUESTS} requests");
    }
}
