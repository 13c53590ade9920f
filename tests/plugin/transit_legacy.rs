//! What older plugins had OpenBao encrypt is decrypted where `[legacy]` says so, and nothing else is by that door.

use base64ct::{Base64, Encoding};
use serde_json::json;
use tonic::Code;
use trousseau::envelope::Envelope;

use crate::plugin::Plugin;
use crate::transit::{KEY, Site};
use crate::v1beta1;

const SEED: &[u8] = b"thirty-two bytes of a fresh seed";

/// What Transit answered an older plugin: it bound nothing else to it.
fn old(site: &Site) -> String {
    let plaintext = Base64::encode_string(SEED);
    let answer = site.bao.root.wants("POST", &format!("transit/encrypt/{KEY}"), json!({"plaintext": plaintext}));
    answer["data"]["ciphertext"].as_str().unwrap().to_owned()
}

/// The same as each of them wrote it, with the word for its format.
fn written(transit: &str) -> Vec<(&'static str, String)> {
    let encoded = Base64::encode_string(transit.as_bytes());
    vec![
        ("trousseau-v1", transit.to_owned()),
        ("vault-kubernetes-kms", transit.to_owned()),
        ("trousseau-v2", encoded.clone()),
        ("trousseau-v2-proxy", format!("vault:-:{encoded}\n")),
        ("trousseau-v2-proxy", format!("awskms:-:AQICAHgA\nvault:-:{encoded}\n")),
    ]
}

fn serve(site: &mut Site, formats: &[&str]) -> Plugin {
    site.host.extra = match formats {
        [] => String::new(),
        formats => format!("[legacy]\nprovider = \"vault\"\nformats = {formats:?}\n"),
    };
    site.host.serve_healthy()
}

#[test]
fn each_format_is_read_where_it_is_named_and_nowhere_else() {
    let Some(mut site) = Site::new() else { return };
    let transit = old(&site);
    let all = ["trousseau-v1", "trousseau-v2", "trousseau-v2-proxy", "vault-kubernetes-kms"];
    let plugin = serve(&mut site, &all);
    for (format, stored) in written(&transit) {
        assert_eq!(v1beta1::decrypt(&plugin, stored.as_bytes()).unwrap(), SEED, "{format}");
    }
    // Under v2 there was vault-kubernetes-kms alone, whose key_id is the number of a version.
    assert_eq!(plugin.decrypt(transit.as_bytes(), "1").unwrap(), SEED);
    for (ciphertext, key_id) in [(transit.as_str(), "tr1"), (transit.as_str(), ""), (&written(&transit)[2].1, "1")] {
        assert_eq!(plugin.decrypt(ciphertext.as_bytes(), key_id).unwrap_err().code, Code::InvalidArgument, "{key_id}");
    }
    // The API server asks for both before it uses the plugin at all.
    let new = v1beta1::encrypt(&plugin, SEED).unwrap();
    assert_eq!(Envelope::parse(&new).unwrap().recipients.len(), 1);
    assert_eq!(v1beta1::decrypt(&plugin, &new).unwrap(), SEED);
    drop(plugin);

    let plugin = serve(&mut site, &["trousseau-v2"]);
    for (format, stored) in written(&transit) {
        match (format, v1beta1::decrypt(&plugin, stored.as_bytes())) {
            ("trousseau-v2", answer) => assert_eq!(answer.unwrap(), SEED),
            (_, answer) => {
                let said = answer.unwrap_err();
                let is_told = said.message.contains("which legacy.formats of the configuration does not name");
                assert_eq!((said.code, is_told), (Code::InvalidArgument, true), "{format}: {said:?}");
            }
        }
    }
    drop(plugin);

    let plugin = serve(&mut site, &[]);
    for (format, stored) in written(&transit) {
        assert_eq!(v1beta1::decrypt(&plugin, stored.as_bytes()).unwrap_err().code, Code::InvalidArgument, "{format}");
    }
    assert_eq!(plugin.decrypt(transit.as_bytes(), "1").unwrap_err().code, Code::InvalidArgument);
    assert_eq!(v1beta1::decrypt(&plugin, &new).unwrap(), SEED);
}

#[test]
fn what_was_lost_is_told_and_what_is_ours_is_not_opened_by_the_old_door() {
    let Some(mut site) = Site::new() else { return };
    let plugin = serve(&mut site, &["trousseau-v1", "trousseau-v2-proxy", "vault-kubernetes-kms"]);
    for empty in ["", "vault:-:\n"] {
        let said = v1beta1::decrypt(&plugin, empty.as_bytes()).unwrap_err();
        let is_told = said.message.contains("The older Trousseau") && said.message.contains("restore it from a backup");
        assert_eq!((said.code, is_told), (Code::InvalidArgument, true), "{empty}: {said:?}");
    }
    // Whoever can write etcd takes the DEK out of an envelope, to have it handed out as if it were a seed.
    let (sealed, _) = plugin.round_trip();
    let envelope = Envelope::parse(&sealed).unwrap();
    let dek = format!("vault:v1:{}", Base64::encode_string(envelope.recipients[0].wrapped));
    let damaged = old(&site).replace("vault:v1:", "vault:v1:AAAA");
    for ciphertext in [dek, damaged] {
        let answers = [v1beta1::decrypt(&plugin, ciphertext.as_bytes()), plugin.decrypt(ciphertext.as_bytes(), "1")];
        for answer in answers {
            assert_eq!(answer.unwrap_err().code, Code::InvalidArgument, "{ciphertext}");
        }
    }
    plugin.round_trip();
}

#[test]
fn a_version_that_the_key_does_not_have_is_refused_and_harms_nobody_else() {
    let Some(mut site) = Site::new() else { return };
    let plugin = serve(&mut site, &["trousseau-v1"]);
    for version in ["2", "999", "4294967295"] {
        let planted = old(&site).replace("vault:v1:", &format!("vault:v{version}:"));
        for _ in 0..3 {
            let said = v1beta1::decrypt(&plugin, planted.as_bytes()).unwrap_err();
            assert_eq!(said.code, Code::InvalidArgument, "{version}: {said:?}");
            plugin.status().unwrap();
            plugin.round_trip();
        }
    }
    // The older plugin may still write elsewhere, under a version that this one has not looked at yet.
    site.bao.rotate(KEY);
    assert_eq!(v1beta1::decrypt(&plugin, old(&site).as_bytes()).unwrap(), SEED);
}

#[test]
fn an_old_ciphertext_fails_as_its_server_does() {
    let Some(mut site) = Site::new() else { return };
    let transit = old(&site);
    let mut plugin = serve(&mut site, &["trousseau-v1"]);
    site.bao.seal();
    let said = v1beta1::decrypt(&plugin, transit.as_bytes()).unwrap_err();
    assert_eq!((said.code, said.message.contains("is sealed")), (Code::Unavailable, true), "{said:?}");
    site.bao.unseal();
    plugin.wait_until("it is read again", |plugin| v1beta1::decrypt(plugin, transit.as_bytes()).is_ok());
}
