//! Each way to log in to OpenBao, and what is said and done when a login is refused.

use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tonic::Code;

use crate::bao::Bao;
use crate::bao_logins::AppRole;
use crate::disk::{lacks_mounts, over_read_only_state};
use crate::plugin::Plugin;
use crate::providers_transit::wait_for_recipients;
use crate::transit::{KEY, Site, quoted};

/// A plugin that has a token, and does not show it.
fn serves(site: &Site, case: &str) {
    for start in ["at first", "again"] {
        let mut plugin = site.host.serve();
        plugin.wait_until(&format!("{case} is healthy {start}"), |plugin| plugin.status().is_ok());
        plugin.round_trip();
        assert_silent(&plugin, case);
    }
}

/// No token of OpenBao's is in the log.
pub fn assert_silent(plugin: &Plugin, case: &str) {
    let log = plugin.log();
    let mut words = log.split(|c: char| !(c.is_ascii_alphanumeric() || c == '.'));
    let is_token = |word: &&str| word.len() >= 24 && ["s.", "b."].iter().any(|prefix| word.starts_with(prefix));
    assert_eq!(words.find(is_token), None, "{case}");
}

#[test]
fn each_method_logs_in_and_after_a_restart_too() {
    let Some(mut site) = Site::new() else { return };
    serves(&site, "token");

    let approle = site.bao.approle(KEY, &json!({"token_ttl": "1m"}));
    let certificate = site.bao.client_certificate(KEY);
    let (jwt, kubernetes) = (site.bao.jwt(KEY), site.bao.kubernetes(KEY));
    let certified = format!(
        r#"{{ method = "cert", cert-file = "{}", key-file = "{}" }}"#,
        certificate.certificate.display(),
        certificate.key.display()
    );
    let cases: &[(&str, String, &str)] = &[
        (
            "approle",
            r#"{ method = "approle", role-id-file = "%/role-id", secret-id-file = "%/secret" }"#.into(),
            &approle.secret_id,
        ),
        ("cert", certified.clone(), ""),
        ("cert with a role", certified.replace(" }", r#", role = "plugin" }"#), ""),
        ("jwt", r#"{ method = "jwt", role = "plugin", jwt-file = "%/secret" }"#.into(), &jwt.token(600)),
        (
            "kubernetes",
            r#"{ method = "kubernetes", role = "plugin", jwt-file = "%/secret" }"#.into(),
            &kubernetes.token(600),
        ),
    ];
    for (case, auth, secret) in cases {
        site.on_another_host();
        site.host.write_secret("role-id", &approle.role_id);
        site.host.write_secret("secret", secret);
        let auth = site.with_files(auth);
        site.set("auth", auth);
        serves(&site, case);
    }
}

/// HTTP's own rooms say more than ours.
#[test]
fn no_secret_is_in_the_most_talkative_log() {
    let Some(mut site) = Site::new() else { return };
    let approle = site.bao.approle(KEY, &json!({}));
    site.host.write_secret("role-id", &approle.role_id);
    site.host.write_secret("secret-id", &approle.secret_id);
    let by_role = r#"{ method = "approle", role-id-file = "%/role-id", secret-id-file = "%/secret-id" }"#;
    let token = std::fs::read_to_string(site.host.path("vault-token")).unwrap();
    for auth in [None, Some(site.with_files(by_role))] {
        auth.into_iter().for_each(|auth| site.set("auth", auth));
        let mut command = site.host.command(&["serve", "--config"]);
        command.arg(site.host.write_configuration()).env("TROUSSEAU_LOG", "trace");
        let mut plugin = site.host.start(command);
        plugin.wait_until("it is healthy", |plugin| plugin.status().is_ok());
        plugin.round_trip();
        assert_silent(&plugin, "trace");
        let log = plugin.log();
        assert!(log.contains("\"TRACE\""), "it is not talkative");
        for secret in [&token, &approle.secret_id, "plaintext\":"] {
            assert!(!log.contains(secret), "{secret}");
        }
    }
}

/// A key in a namespace, and a login there or in the one above it.
#[test]
fn a_namespace_has_the_key_and_the_login_or_only_the_key() {
    let Some(bao) = Bao::start() else { return };
    let mut site = Site::without_key(bao);
    let root = site.bao.root.clone();
    site.bao.create_namespace("team1");
    site.bao.root = root.in_namespace("team1");
    site.bao.create_namespace("keys");
    // Where the login is, where the key is, and what the policy of the login calls that.
    let cases = [
        ("team1", "team1", "transit"),
        ("team1", "team1/keys", "keys/transit"),
        ("root", "team1/more", "team1/more/transit"), // so the namespace above all is called
    ];
    site.bao.create_namespace("more");
    let in_team = site.bao.approle(KEY, &json!({}));
    site.bao.root = root.clone();
    let in_root = site.bao.approle(KEY, &json!({}));
    for (login, namespace, mount) in cases {
        let approle = if login == "root" { &in_root } else { &in_team };
        site.bao.root = root.in_namespace(namespace);
        site.bao.root.wants("POST", "sys/mounts/transit", json!({"type": "transit"}));
        site.bao.create_key(KEY);
        let rule = |path: &str, can: &str| format!("path \"{mount}/{path}/{KEY}\" {{ capabilities = [\"{can}\"] }}\n");
        let rules = [rule("encrypt", "update"), rule("decrypt", "update"), rule("keys", "read")].concat();
        let at_login = root.in_namespace(login);
        at_login.wants("POST", &format!("sys/policies/acl/{KEY}"), json!({"policy": rules}));
        site.on_another_host();
        site.host.write_secret("role-id", &approle.role_id);
        site.host.write_secret("secret-id", &approle.secret_id);
        let elsewhere = if login == namespace { String::new() } else { format!(", namespace = \"{login}\"") };
        let auth = r#"{ method = "approle", role-id-file = "%/role-id", secret-id-file = "%/secret-id""#;
        let auth = site.with_files(auth) + &elsewhere + " }";
        site.set("auth", auth);
        site.set("namespace", quoted(namespace));
        serves(&site, namespace);
    }
}

const WRAPPED: &str =
    r#"{ method = "approle", role-id-file = "%/role-id", secret-id-file = "%/wrapped", wrapped = true }"#;

fn site_with_wrapping() -> Option<Site> {
    Site::new().map(with_wrapping)
}

fn with_wrapping(mut site: Site) -> Site {
    let approle = site.bao.approle(KEY, &json!({}));
    site.host.write_secret("role-id", &approle.role_id);
    let auth = site.with_files(WRAPPED);
    site.set("auth", auth);
    site
}

fn wait_for_words(plugin: &mut Plugin, words: &[&str]) {
    plugin.wait_until(&words.join(", "), |plugin| {
        plugin.status().is_err_and(|answer| words.iter().all(|words| answer.message.contains(words)))
    });
    let said = plugin.status().unwrap_err();
    assert_eq!(said.code, Code::Unavailable, "{said:?}");
}

#[test]
fn a_wrapped_secret_id_is_for_the_plugin_alone() {
    let Some(site) = site_with_wrapping() else { return };
    let wrapped = site.bao.wrapped_secret_id("60s");
    site.host.write_secret("wrapped", &wrapped);
    site.host.serve_healthy().round_trip();

    // It was unwrapped: by the plugin before, but that cannot be told from a thief.
    let mut plugin = site.host.serve();
    wait_for_words(&mut plugin, &["was unwrapped already", "somebody else may have it"]);
    site.host.write_secret("wrapped", &site.bao.wrapped_secret_id("60s"));
    plugin.wait_until("the new one is taken", |plugin| plugin.status().is_ok());
    plugin.round_trip();
    assert!(!plugin.log().contains(&wrapped));
}

/// Each reload makes another login, with a token that opens once; so does each command.
#[test]
fn a_wrapped_secret_id_outlives_a_reload_and_is_opened_by_no_command() {
    let Some(mut site) = site_with_wrapping() else { return };
    site.host.write_secret("wrapped", &site.bao.wrapped_secret_id("10m"));
    for verb in [&["doctor"][..], &["key", "list"]] {
        let done = site.host.run(verb);
        let said = String::from_utf8([done.stdout, done.stderr].concat()).unwrap();
        assert!(said.contains("wrapped secret id opens once"), "{verb:?}: {said}");
    }
    let mut plugin = site.host.serve_healthy();
    let (sealed, key_id) = plugin.round_trip();
    for (number, name) in ["vault", "renamed"].into_iter().enumerate() {
        site.set("name", quoted(name));
        site.host.write_configuration();
        plugin.reload();
        plugin.wait_until("it is read again", |plugin| reloads(plugin) == number + 1);
        plugin.round_trip();
        plugin.decrypt(&sealed, &key_id).unwrap();
    }

    // Beside a token, whose health is enough for the new configuration to be taken.
    let Some(site) = Site::beside_token().map(with_wrapping) else { return };
    site.host.write_secret("wrapped", &site.bao.wrapped_secret_id("10m"));
    let mut plugin = site.host.serve_healthy();
    wait_for_recipients(&plugin, 2);
    plugin.reload();
    plugin.wait_until("it is read again", |plugin| reloads(plugin) == 1);
    wait_for_recipients(&plugin, 2);
}

/// How many configurations it has taken since its start.
fn reloads(plugin: &Plugin) -> usize {
    let log = plugin.log();
    assert!(!log.contains("the old one stays"), "{log}");
    log.matches("configuration read again").count()
}

#[test]
fn a_token_that_wraps_something_else_is_refused() {
    let Some(site) = site_with_wrapping() else { return };
    let wrapping = site.bao.root.with_header("X-Vault-Wrap-TTL", "60s");
    let other = wrapping.wants("POST", "sys/wrapping/wrap", json!({"secret_id": "planted"}));
    site.host.write_secret("wrapped", other["wrap_info"]["token"].as_str().unwrap());
    let mut plugin = site.host.serve();
    wait_for_words(&mut plugin, &["was made at sys/wrapping/wrap", "in place of yours"]);
    // It was not even unwrapped.
    let planted = site.bao.root.with_token(other["wrap_info"]["token"].as_str().unwrap());
    assert_eq!(planted.post("sys/wrapping/unwrap", Value::Null).0, 200);
}

#[test]
fn a_token_file_that_is_replaced_is_taken_over() {
    let Some(site) = Site::new() else { return };
    let mut plugin = site.host.serve_healthy();
    let old = std::fs::read_to_string(site.host.path("vault-token")).unwrap();
    let new = site.bao.token(KEY, "10m");
    site.host.write_secret("vault-token", &new);
    // Nothing forces it to look: the old one still serves.
    let began = Instant::now();
    plugin.wait_until("the new one is used", |plugin| plugin.log().contains("another token is in the token file"));
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    site.bao.revoke(&old);
    plugin.round_trip();
    // This one is revoked before there is another: told, and healed by the file.
    site.bao.revoke(&new);
    assert_eq!(plugin.encrypt(b"seed").unwrap_err().code, Code::Unauthenticated);
    wait_for_words(&mut plugin, &["put a new one there"]);
    let began = Instant::now();
    site.host.write_secret("vault-token", &site.bao.token(KEY, "10m"));
    plugin.wait_until("it is healthy", |plugin| plugin.status().is_ok());
    assert!(began.elapsed() < Duration::from_secs(8), "{:?}", began.elapsed());
    plugin.round_trip();
}

/// One that was unwrapped is used up when it is refused: the next one is then in the file.
#[test]
fn a_wrapped_secret_id_that_is_used_up_is_followed_by_another() {
    let Some(mut site) = Site::new() else { return };
    let limits = json!({"secret_id_num_uses": 1, "token_ttl": "2s", "token_max_ttl": "2s"});
    let approle = site.bao.approle(KEY, &limits);
    site.host.write_secret("role-id", &approle.role_id);
    site.host.write_secret("wrapped", &site.bao.wrapped_secret_id("60s"));
    let auth = site.with_files(WRAPPED);
    site.set("auth", auth);
    let mut plugin = site.host.serve_healthy();
    plugin.wait_until("its token has ended", |plugin| plugin.encrypt(b"seed").is_err());
    wait_for_words(&mut plugin, &["was refused"]);
    site.host.write_secret("wrapped", &site.bao.wrapped_secret_id("60s"));
    plugin.wait_until("the new one is taken", |plugin| plugin.status().is_ok());
    plugin.round_trip();
}

#[test]
fn a_wrong_secret_id_is_tried_once_whatever_happens() {
    wrong_secret_id(Duration::from_secs(3));
}

#[test]
#[ignore = "a soak: it waits for a minute"]
fn soak_a_wrong_secret_id_is_not_tried_again_within_a_minute() {
    wrong_secret_id(Duration::from_secs(60));
}

/// A state directory that takes nothing is no reason to show it again, which would lock the role for every host.
#[test]
#[ignore = "a soak: it waits for a minute"]
fn soak_a_wrong_secret_id_is_tried_once_where_nothing_can_be_written_down() {
    let Some((site, approle)) = site_with_wrong_secret_id() else { return };
    if lacks_mounts() {
        return;
    }
    std::fs::create_dir_all(site.host.path("state")).unwrap();
    site.host.write_configuration();
    let mut plugin = site.host.start(over_read_only_state(&site.host, "serve"));
    wait_for_words(&mut plugin, &["was refused", "another secret id"]);
    thread::sleep(Duration::from_secs(70));
    right_after_three_more_wrong_ones(&site, &approle, &mut plugin);
}

fn site_with_wrong_secret_id() -> Option<(Site, AppRole)> {
    let mut site = Site::new()?;
    let approle = site.bao.approle(KEY, &json!({}));
    site.host.write_secret("role-id", &approle.role_id);
    site.host.write_secret("secret-id", "wrong");
    let auth = site.with_files(r#"{ method = "approle", role-id-file = "%/role-id", secret-id-file = "%/secret-id" }"#);
    site.set("auth", auth);
    Some((site, approle))
}

fn wrong_secret_id(wait: Duration) {
    let Some((site, approle)) = site_with_wrong_secret_id() else { return };
    for _ in 0..4 {
        let mut plugin = site.host.serve();
        wait_for_words(&mut plugin, &["was refused", "another secret id"]);
        plugin.kill();
    }
    let mut plugin = site.host.serve();
    let began = Instant::now();
    while began.elapsed() < wait {
        assert_eq!(plugin.encrypt(b"seed").unwrap_err().code, Code::Unauthenticated);
        plugin.status().unwrap_err();
        thread::sleep(Duration::from_millis(100));
    }
    right_after_three_more_wrong_ones(&site, &approle, &mut plugin);
}

/// The fifth refused login within a quarter of an hour locks the role. Ours was one, so it stands three more.
fn right_after_three_more_wrong_ones(site: &Site, approle: &AppRole, plugin: &mut Plugin) {
    let wrong = json!({"role_id": approle.role_id, "secret_id": "wrong"});
    for _ in 0..3 {
        assert_eq!(site.bao.root.without_token().post("auth/approle/login", wrong.clone()).0, 400);
    }
    let began = Instant::now();
    site.host.write_secret("secret-id", &approle.secret_id);
    plugin.wait_until("the right one logs in", |plugin| plugin.status().is_ok());
    assert!(began.elapsed() < Duration::from_secs(8), "{:?}", began.elapsed());
    plugin.round_trip();
}
