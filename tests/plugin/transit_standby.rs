//! A standby that lags for good, and asks the active node where it is told to.

use base64ct::{Base64, Encoding};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::certificates::Authority;
use crate::transit_http::{Habit, host, listen, message};

/// How far a node has come.
fn index(value: u64) -> String {
    Base64::encode_string(json!({"cluster": "a", "value": value.to_string()}).to_string().as_bytes())
}

/// The active node, and the standby.
const ACTIVE: u64 = 10;
const STANDBY: u64 = 9;

/// Transit, whose key wraps nothing at all. The active node is asked which versions it has, and a standby for the rest: it
/// decrypts for who would have it ask the active one, as far as that has come.
fn lags(request: &str) -> Vec<u8> {
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
            // As long as a nonce, a DEK and a tag.
            let wrapped = [Base64::decode_vec(&asked("plaintext")).unwrap(), vec![0; 28]].concat();
            json!({"ciphertext": format!("vault:v1:{}", Base64::encode_string(&wrapped))})
        }
        "/v1/transit/decrypt/kek" if is_forwarded => {
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
    let host = host(listen(&authority.issue("standby"), Habit::Answers(lags)), &authority);
    let plugin = host.serve_healthy();
    plugin.round_trip();
}
