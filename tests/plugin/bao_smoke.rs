//! What the tests of the transit provider stand on: the answers of a real server that they count on, without a plugin.

use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::bao::{Bao, Client};

/// `plain` in base64.
const PLAINTEXT: &str = "cGxhaW4=";

/// With a key, and a policy for it, named `kek`.
fn bao() -> Option<Bao> {
    let bao = Bao::start()?;
    bao.create_key("kek");
    bao.key_policy("kek");
    Some(bao)
}

fn encrypt(client: &Client) -> (u16, Value) {
    client.post("transit/encrypt/kek", json!({"plaintext": PLAINTEXT}))
}

fn decrypt(client: &Client, ciphertext: &Value) -> (u16, Value) {
    client.post("transit/decrypt/kek", json!({"ciphertext": ciphertext}))
}

/// Both ways, and nothing that the policy does not allow.
fn serves(client: &Client) {
    let (status, answer) = encrypt(client);
    assert_eq!(status, 200, "{answer}");
    let (_, opened) = decrypt(client, &answer["data"]["ciphertext"]);
    assert_eq!(opened["data"]["plaintext"], PLAINTEXT);
    assert_eq!(client.get("transit/keys/kek").0, 200);
    let (status, said) = client.refusal("transit/keys/kek/rotate", json!({}));
    assert_eq!((status, said.starts_with("1 error occurred")), (403, true), "{said}");
}

fn log_in(client: &Client, method: &str, credentials: Value) -> (u16, Value) {
    client.without_token().post(&format!("auth/{method}/login"), credentials)
}

/// Logs in, and returns somebody with the token.
fn logged_in(client: &Client, method: &str, credentials: Value) -> Client {
    let (status, answer) = log_in(client, method, credentials);
    assert_eq!(status, 200, "{answer}");
    client.with_token(answer["auth"]["client_token"].as_str().unwrap())
}

#[test]
fn keys_have_versions_and_old_ciphertexts_stay_readable() {
    let Some(bao) = bao() else { return };
    let (_, first) = encrypt(&bao.root);
    assert_eq!(first["data"]["key_version"], 1);
    assert_eq!(bao.rotate("kek"), 2);
    let (_, second) = encrypt(&bao.root);
    assert!(second["data"]["ciphertext"].as_str().unwrap().starts_with("vault:v2:"), "{second}");
    assert_eq!(decrypt(&bao.root, &first["data"]["ciphertext"]).1["data"]["plaintext"], PLAINTEXT);
    let (status, _) = bao.root.post("transit/keys/kek/config", json!({"deletion_allowed": true}));
    assert_eq!((status, bao.root.delete("transit/keys/kek").0), (200, 204));
    assert_eq!(bao.root.get("transit/keys/kek").0, 404);
}

#[test]
fn sealed_stopped_and_started_it_keeps_its_keys() {
    let Some(mut bao) = bao() else { return };
    let (_, sealed) = encrypt(&bao.root);
    bao.seal();
    assert_eq!(bao.root.refusal("transit/encrypt/kek", json!({})), (503, "Vault is sealed".into()));
    bao.unseal();
    serves(&bao.root.with_token(&bao.token("kek", "1m")));
    bao.stop();
    assert!(bao.root.complaint().contains("connect"), "{}", bao.root.complaint());
    bao.start_again();
    bao.unseal();
    assert_eq!(decrypt(&bao.root, &sealed["data"]["ciphertext"]).1["data"]["plaintext"], PLAINTEXT);
    bao.pause();
    let impatient = bao.root.with_timeout(1);
    assert!(impatient.complaint().contains("timed out"), "{}", impatient.complaint());
    bao.resume();
    serves(&bao.root.with_token(&bao.token("kek", "1m")));
}

#[test]
fn tokens_end_and_are_revoked() {
    let Some(bao) = bao() else { return };
    let client = bao.root.with_token(&bao.token("kek", "2s"));
    serves(&client);
    let began = Instant::now();
    while encrypt(&client).0 == 200 {
        assert!(began.elapsed() < Duration::from_secs(10), "it does not end");
        thread::sleep(Duration::from_millis(100));
    }
    let revoked = bao.token("kek", "1m");
    bao.revoke(&revoked);
    for ended in [client, bao.root.with_token(&revoked), bao.root.without_token()] {
        let (status, said) = ended.refusal("transit/encrypt/kek", json!({"plaintext": PLAINTEXT}));
        assert_eq!((status, &*said), (403, "permission denied"));
    }
}

#[test]
fn every_login_gives_a_token_that_serves() {
    let Some(bao) = bao() else { return };
    let approle = bao.approle("kek", &json!({"token_ttl": "1m"}));
    let credentials = json!({"role_id": approle.role_id, "secret_id": approle.secret_id});
    let by_role = logged_in(&bao.root, "approle", credentials);
    serves(&by_role);
    bao.revoke_logins("approle");
    assert_eq!(encrypt(&by_role).0, 403, "its logins are revoked");

    let issuer = bao.jwt("kek");
    let credentials = |seconds| json!({"role": "plugin", "jwt": issuer.token(seconds)});
    serves(&logged_in(&bao.root, "jwt", credentials(600)));
    let (status, answer) = log_in(&bao.root, "jwt", credentials(-600));
    assert_eq!(status, 400);
    assert!(answer.to_string().contains("token is expired"), "{answer}");

    let issuer = bao.kubernetes("kek");
    let credentials = json!({"role": "plugin", "jwt": issuer.token(600)});
    serves(&logged_in(&bao.root, "kubernetes", credentials));

    let certificate = bao.client_certificate("kek");
    serves(&logged_in(&bao.root.with_certificate(&certificate), "cert", json!({"name": "plugin"})));
    assert_eq!(log_in(&bao.root, "cert", json!({"name": "plugin"})).0, 400, "without one");
}

#[test]
fn a_wrapped_secret_id_is_exchanged_once() {
    let Some(bao) = bao() else { return };
    let approle = bao.approle("kek", &json!({}));
    let wrapped = bao.root.with_token(&bao.wrapped_secret_id("60s"));
    let (_, looked) = bao.root.without_token().post("sys/wrapping/lookup", json!({"token": wrapped.token}));
    assert_eq!(looked["data"]["creation_path"], "auth/approle/role/plugin/secret-id");
    let (status, exchanged) = wrapped.post("sys/wrapping/unwrap", json!({}));
    assert_eq!(status, 200, "{exchanged}");
    let secret_id = &exchanged["data"]["secret_id"];
    serves(&logged_in(&bao.root, "approle", json!({"role_id": approle.role_id, "secret_id": secret_id})));
    let (status, said) = wrapped.refusal("sys/wrapping/unwrap", json!({}));
    assert_eq!((status, said.contains("not valid or does not exist")), (400, true), "{said}");
}

#[test]
fn five_wrong_secret_ids_lock_the_role_out() {
    let Some(bao) = bao() else { return };
    let approle = bao.approle("kek", &json!({}));
    let with = |secret_id: &str| json!({"role_id": approle.role_id, "secret_id": secret_id});
    for _ in 0..5 {
        assert_eq!(log_in(&bao.root, "approle", with("wrong")).0, 400);
    }
    assert_eq!(log_in(&bao.root, "approle", with(&approle.secret_id)).0, 403);
}

#[test]
fn namespaces_are_apart_and_requests_are_limited() {
    let Some(bao) = bao() else { return };
    bao.create_namespace("team1");
    let team = bao.root.in_namespace("team1");
    assert_eq!(encrypt(&team).0, 404, "it has no mount of its own");
    team.wants("POST", "sys/mounts/transit", json!({"type": "transit"}));
    team.wants("POST", "transit/keys/kek", json!({}));
    let (_, there) = encrypt(&team);
    assert_eq!(decrypt(&bao.root, &there["data"]["ciphertext"]).0, 400, "another key");
    assert_eq!(encrypt(&bao.root.in_namespace("nope")).1["errors"][0], "namespace not found");
    bao.limit(1);
    let began = Instant::now();
    while encrypt(&bao.root).0 != 429 {
        assert!(began.elapsed() < Duration::from_secs(20), "nothing is limited");
    }
}

#[test]
fn its_certificate_is_of_its_own_authority_and_can_be_an_old_one() {
    let Some(bao) = bao() else { return };
    let elsewhere = bao.root.trusting(&bao.authority.issue("elsewhere").certificate);
    assert!(elsewhere.complaint().contains("unable to get"), "{}", elsewhere.complaint());
    let old = bao.authority.issue_until("old", "20260101000000Z");
    bao.present(&old);
    assert!(bao.root.complaint().contains("expired"), "{}", bao.root.complaint());
}

#[test]
fn a_standby_serves_too() {
    let Some(bao) = Bao::start_two() else { return };
    bao.create_key("kek");
    let standby = bao.root_at(1);
    assert_eq!(standby.get("sys/health").0, 429);
    let began = Instant::now();
    let (mut status, mut answer) = encrypt(&standby);
    // What the active node wrote reaches it a little later.
    while status != 200 {
        assert!(began.elapsed() < Duration::from_secs(10), "{status} {answer}");
        (status, answer) = encrypt(&standby);
    }
    assert_eq!(decrypt(&bao.root, &answer["data"]["ciphertext"]).0, 200);
}
