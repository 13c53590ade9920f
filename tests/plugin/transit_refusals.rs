//! What OpenBao will not do for the plugin, or the plugin not with OpenBao's key, and what people are told of it.

use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tonic::Code;

use crate::plugin::{Answer, Plugin};
use crate::transit::{KEY, Site, quoted};

/// A key that is made so, the rights to it, and the words of the refusal.
struct Case {
    /// The key, and the policy by which the plugin has rights.
    name: &'static str,
    /// How it is made. Null: it is not.
    key: Value,
    /// What the policy says, of `encrypt`, `decrypt` and `keys`.
    rights: [&'static str; 3],
    encrypt: Code,
    words: &'static str,
}

const ALL: [&str; 3] = ["update", "update", "read"];

fn cases() -> Vec<Case> {
    let unfit = |name, key, words| Case { name, key, rights: ALL, encrypt: Code::Unavailable, words };
    let denied = |name, rights, words| Case { name, key: json!({}), rights, encrypt: Code::PermissionDenied, words };
    vec![
        unfit("missing", Value::Null, "there is no such key, or it was deleted"),
        unfit("rsa", json!({"type": "rsa-2048"}), "it is of type rsa-2048, not aes256-gcm96"),
        unfit("chacha", json!({"type": "chacha20-poly1305"}), "it is of type chacha20-poly1305, not aes256-gcm96"),
        unfit("derived", json!({"derived": true}), "it derives another key for each context"),
        unfit("exportable", json!({"exportable": true}), "set `[policy] exportable = \"warn\"`"),
        unfit("backup", json!({"allow_plaintext_backup": true}), "may read transit/backup gets the key itself"),
        denied("unreadable", ["update", "update", "deny"], "denies read on transit/keys/unreadable: allow it"),
        denied("unsealing", ["deny", "update", "read"], "denies update on transit/encrypt/unsealing: allow it"),
    ]
}

#[test]
fn a_key_that_is_unfit_or_out_of_bounds_is_refused_with_the_reason() {
    let Some(mut site) = Site::new() else { return };
    for Case { name, key, rights, encrypt, words } in cases() {
        if !key.is_null() {
            site.bao.root.wants("POST", &format!("transit/keys/{name}"), key);
        }
        site.bao.key_policy_of(name, rights);
        site.on_another_host();
        site.set("key", quoted(name));
        site.log_in_by_token(name);
        let mut plugin = site.host.serve();
        let said = wait_for_refusal(&mut plugin, words);
        assert_eq!(said.code, Code::Unavailable, "{name}: {said:?}");
        let said = plugin.encrypt(b"seed").unwrap_err();
        assert_eq!((said.code, said.message.contains(words)), (encrypt, true), "{name}: {said:?}");
        assert!(!said.message.contains("key generate"), "that makes no key of Vault's: {said:?}");
        assert_list_says(&site, name, if name == "unsealing" { "active" } else { words });
    }
}

fn wait_for_refusal(plugin: &mut Plugin, words: &str) -> Answer {
    plugin.wait_until(words, |plugin| plugin.status().is_err_and(|answer| answer.message.contains(words)));
    plugin.status().unwrap_err()
}

fn assert_list_says(site: &Site, case: &str, words: &str) {
    let done = site.host.run(&["key", "list"]);
    let said = String::from_utf8([done.stdout, done.stderr].concat()).unwrap();
    assert!(said.contains(words), "{case}: {said}");
}

/// A policy is changed while the plugin runs: what still works does not hide what does not.
#[test]
fn half_of_the_rights_are_not_enough_for_status() {
    let Some(site) = Site::new() else { return };
    let mut plugin = site.host.serve_healthy();
    let (sealed, key_id) = plugin.round_trip();
    let encrypts = |plugin: &Plugin| plugin.encrypt(b"seed").map(drop);
    let decrypts = |plugin: &Plugin| plugin.decrypt(&sealed, &key_id).map(drop);
    for denied in ["encrypt", "decrypt"] {
        let right = |of| if of == denied { "deny" } else { "update" };
        site.bao.key_policy_of(KEY, [right("encrypt"), right("decrypt"), "read"]);
        let both = [("encrypt", encrypts(&plugin)), ("decrypt", decrypts(&plugin))];
        let words = format!("denies update on transit/{denied}/kek: allow it");
        for (asked, answer) in both {
            match asked == denied {
                false => answer.unwrap(),
                true => {
                    let said = answer.unwrap_err();
                    assert_eq!((said.code, said.message.contains(&words)), (Code::PermissionDenied, true), "{said:?}");
                }
            }
        }
        encrypts(&plugin).or_else(|_| decrypts(&plugin)).unwrap(); // the last word is of success
        let said = plugin.status().unwrap_err();
        assert_eq!((said.code, said.message.contains(&words)), (Code::Unavailable, true), "{said:?}");
        site.bao.key_policy(KEY);
        plugin.wait_until("it is healthy", |plugin| plugin.status().is_ok());
        plugin.round_trip();
    }
}

#[test]
fn an_exportable_key_is_admitted_by_the_policy_and_shown() {
    let Some(mut site) = Site::new() else { return };
    site.bao.root.wants("POST", "transit/keys/exportable", json!({"exportable": true}));
    site.bao.key_policy("exportable");
    site.set("key", quoted("exportable"));
    site.log_in_by_token("exportable");
    site.host.extra = "[policy]\nexportable = \"warn\"\n".into();
    site.host.serve_healthy().round_trip();
    assert_list_says(&site, "exception", "exception: https://");
    assert_list_says(&site, "exception", "may read transit/export gets the key itself");
}

#[test]
fn what_cannot_be_found_is_named() {
    let Some(mut site) = Site::new() else { return };
    // Whoever has fewer rights is told that they are denied.
    site.host.write_secret("vault-token", site.bao.root.token.as_ref().unwrap());
    for (line, words) in [("mount", "see mount and namespace"), ("namespace", "namespace not found")] {
        let mount = quoted(if line == "mount" { "nowhere" } else { "transit" });
        site.set("mount", mount);
        if line == "namespace" {
            site.set("namespace", quoted("nowhere"));
        }
        let mut plugin = site.host.serve();
        assert_eq!(wait_for_refusal(&mut plugin, words).code, Code::Unavailable);
        assert_eq!(plugin.encrypt(b"seed").unwrap_err().code, Code::Unavailable);
        assert_list_says(&site, line, words);
    }
}

#[test]
fn a_quota_sheds_requests_and_the_rest_are_served() {
    let Some(site) = Site::new() else { return };
    let mut plugin = site.host.serve_healthy();
    site.bao.limit(2);
    let began = Instant::now();
    let said = loop {
        match plugin.encrypt(b"seed") {
            Ok(_) => assert!(began.elapsed() < Duration::from_secs(20), "nothing is limited"),
            Err(said) => break said,
        }
    };
    assert_eq!((said.code, said.message.contains("rate limit quota")), (Code::ResourceExhausted, true), "{said:?}");
    plugin.status().unwrap(); // it is well, and busy
    plugin.wait_until("another is served", |plugin| plugin.encrypt(b"seed").is_ok());
}

#[test]
fn a_key_that_was_made_anew_is_told_from_the_old_one() {
    let Some(site) = Site::new() else { return };
    let mut plugin = site.host.serve_healthy();
    let (sealed, key_id) = plugin.round_trip();
    site.bao.root.wants("POST", "transit/keys/kek/config", json!({"deletion_allowed": true}));
    site.bao.root.delete("transit/keys/kek");
    let gone = plugin.decrypt(&sealed, &key_id).unwrap_err();
    assert_eq!(
        (gone.code, gone.message.contains("it was deleted: bring it back")),
        (Code::Unavailable, true),
        "{gone:?}"
    );
    thread::sleep(Duration::from_millis(1100)); // Transit counts seconds
    site.bao.create_key("kek");
    // The serving plugin notices by what it cannot decrypt any more, a new one at once.
    plugin.decrypt(&sealed, &key_id).unwrap_err();
    assert_made_anew(&mut plugin, &sealed, &key_id);
    drop(plugin);
    assert_made_anew(&mut site.host.serve(), &sealed, &key_id);
    assert_list_says(&site, "anew", "it was deleted and made anew under the same name");
}

fn assert_made_anew(plugin: &mut Plugin, sealed: &[u8], key_id: &str) {
    let said = wait_for_refusal(plugin, "it was deleted and made anew under the same name");
    let tells_when =
        ["was made at 2", "the one that is there now at 2"].iter().all(|words| said.message.contains(words));
    assert!(tells_when, "{said:?}");
    assert_eq!(plugin.encrypt(b"seed").unwrap_err().code, Code::Unavailable);
    let said = plugin.decrypt(sealed, key_id).unwrap_err();
    assert_eq!(said.code, Code::Unavailable, "{said:?}");
}

#[test]
fn versions_that_may_not_be_used_any_more_are_named() {
    let Some(mut site) = Site::new() else { return };
    let plugin = site.host.serve_healthy();
    let (old, old_key_id) = plugin.round_trip();
    drop(plugin);
    site.bao.rotate("kek");
    let plugin = site.host.serve_healthy();
    let (new, key_id) = plugin.round_trip();
    assert_ne!(key_id, old_key_id);
    site.bao.root.wants("POST", "transit/keys/kek/config", json!({"min_decryption_version": 2}));
    let is_told = |plugin: &Plugin| {
        let said = plugin.decrypt(&old, &old_key_id).unwrap_err();
        assert_eq!((said.code, said.message.contains("min_decryption_version")), (Code::Unavailable, true), "{said:?}");
        assert_eq!(plugin.decrypt(&new, &key_id).unwrap().len(), 32);
    };
    is_told(&plugin);
    drop(plugin);
    is_told(&site.host.serve_healthy());
    assert_list_says(&site, "too old", "version 1 of key https://");
    site.bao.root.wants("POST", "transit/keys/kek/config", json!({"min_decryption_version": 1}));
    site.host.serve_healthy().decrypt(&old, &old_key_id).unwrap();

    // A version that Transit encrypts under no more, while the next one's instant has not come.
    site.set("activation-delay", quoted("10m"));
    site.bao.rotate("kek");
    site.bao.root.wants("POST", "transit/keys/kek/config", json!({"min_encryption_version": 3}));
    let mut plugin = site.host.serve();
    wait_for_refusal(&mut plugin, "min_encryption_version");
    plugin.decrypt(&new, &key_id).unwrap();
}
