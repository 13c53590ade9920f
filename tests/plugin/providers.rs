//! Replicas of one token, and several providers.

use tonic::Code;
use trousseau::envelope::Envelope;

use crate::plugin::{Host, admit};
use crate::token::{Family, Key};

const ID: &[u8] = b"shared";

/// A host with two tokens, `trousseau` and `second`.
///
/// `None`: two providers of such a token do not fit into an envelope; this says so.
fn host_with_two_tokens() -> Option<Host> {
    if Family::chosen().modes() == ["oaep"] {
        eprintln!("skipped: recipients of two RSA KEKs are too long for a v2 answer");
        return None;
    }
    let host = Host::new();
    host.token.initialize(&["second"]);
    Some(host)
}

fn key(id: &[u8], fill: u8) -> Key {
    Key { value: Some(vec![fill; 32]), ..Key::generated(id, "trousseau-test") }
}

#[test]
fn a_replica_serves_while_the_first_token_is_away() {
    let Some(mut host) = host_with_two_tokens() else { return };
    for token in ["trousseau", "second"] {
        host.token.make_keys_in(token, &[key(ID, 7)]);
    }
    host.extra = admit(ID);
    host.tokens = r#""pkcs11:token=trousseau", "pkcs11:token=second""#.into();
    let (sealed, key_id) = host.serve_healthy().round_trip();
    assert_eq!(host.list()["keks"][0]["held-by"].as_array().unwrap().len(), 2);

    host.tokens = r#""pkcs11:token=absent", "pkcs11:token=second""#.into();
    let plugin = host.serve_healthy();
    plugin.round_trip();
    plugin.decrypt(&sealed, &key_id).unwrap();

    let listed = host.run(&["key", "list"]);
    assert_eq!(listed.status.code(), Some(69), "{listed:?}");
    assert!(String::from_utf8_lossy(&listed.stderr).contains("token=absent"), "{listed:?}");
    let refused = host.run(&["key", "generate"]);
    assert_eq!(refused.status.code(), Some(69), "{refused:?}");
    assert!(String::from_utf8_lossy(&refused.stderr).contains("token=absent"), "{refused:?}");
}

/// A second `[[provider]]`, whose KEKs are in the token of this name.
fn second_provider(host: &Host, token: &str, more: &str) -> String {
    let configuration = host.configuration();
    let (_, provider) = configuration.split_once("[[provider]]").unwrap();
    let provider = provider.replace("\"hsm\"", "\"other\"").replace("token=trousseau", &format!("token={token}"));
    format!("[[provider]]{provider}{more}\n")
}

#[test]
fn every_provider_that_seals_is_a_recipient_and_any_of_them_opens() {
    let Some(mut host) = host_with_two_tokens() else { return };
    host.generate("0s");
    let with_other = second_provider(&host, "second", "");
    host.extra.clone_from(&with_other);
    host.generate_on("other", "0s");
    let plugin = host.serve_healthy();
    let (sealed, key_id) = plugin.round_trip();
    assert_eq!(Envelope::parse(&sealed).unwrap().recipients.len(), 2);
    drop(plugin);

    // The other one away: reads and writes go on, under the same key_id.
    host.extra = with_other.replace("token=second", "token=absent");
    let plugin = host.serve_healthy();
    plugin.decrypt(&sealed, &key_id).unwrap();
    let (alone, same_key_id) = plugin.round_trip();
    assert_eq!(Envelope::parse(&alone).unwrap().recipients.len(), 1);
    assert_eq!(same_key_id, key_id);
    drop(plugin);

    // The same under `all`: no writes, but reads.
    let configuration = host.configuration().replace("[keyring]", "[keyring]\nseal-under = \"all\"");
    let mut plugin = host.serve_with(&configuration);
    plugin.wait_until("it reads", |plugin| plugin.decrypt(&sealed, &key_id).is_ok());
    for code in [plugin.encrypt(b"seed").unwrap_err().code, plugin.status().unwrap_err().code] {
        assert_eq!(code, Code::Unavailable);
    }
    drop(plugin);

    // The other one no longer seals, and still unwraps: alone, it opens what both sealed.
    host.extra = with_other.replace("sessions = 2", "sessions = 2\nseal = false");
    let plugin = host.serve_healthy();
    let (sealed_by_first, _) = plugin.round_trip();
    assert_eq!(Envelope::parse(&sealed_by_first).unwrap().recipients.len(), 1);
    drop(plugin);
    host.tokens = r#""pkcs11:token=absent""#.into();
    let mut plugin = host.serve();
    plugin.wait_until("it reads", |plugin| plugin.decrypt(&sealed, &key_id).is_ok());
}

#[test]
fn renaming_providers_is_harmless_even_when_they_exchange_names() {
    let Some(mut host) = host_with_two_tokens() else { return };
    host.generate("0s");
    host.extra = second_provider(&host, "second", "");
    host.generate_on("other", "0s");
    let (sealed, key_id) = host.serve_healthy().round_trip();
    let configuration = host.configuration();
    let exchanged =
        configuration.replace("\"hsm\"", "\"x\"").replace("\"other\"", "\"hsm\"").replace("\"x\"", "\"other\"");
    assert_ne!(exchanged, configuration);
    let mut plugin = host.serve_with(&exchanged);
    plugin.wait_until("it is healthy", |plugin| plugin.status().is_ok_and(|status| status.key_id == key_id));
    plugin.decrypt(&sealed, &key_id).unwrap();
}

#[test]
fn one_kek_on_two_providers_is_refused_by_name() {
    let Some(mut host) = host_with_two_tokens() else { return };
    for token in ["trousseau", "second"] {
        host.token.make_keys_in(token, &[key(ID, 7)]);
    }
    let other = second_provider(&host, "second", &admit(ID));
    host.extra = [admit(ID), other].concat();
    let mut plugin = host.serve();
    plugin.wait_until("Status says so", |plugin| {
        plugin.status().is_err_and(|answer| {
            answer.code == Code::Unavailable && answer.message.contains("replicas are `tokens` of one provider")
        })
    });
    assert_eq!(plugin.encrypt(b"seed").unwrap_err().code, Code::Unavailable);
}
