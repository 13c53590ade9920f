//! Replicas of one token, and several providers.

use serde_json::{Value, json};
use tonic::Code;
use trousseau::envelope::Envelope;

use crate::family::Family;
use crate::fault_module::{Faults, library};
use crate::plugin::{Host, Plugin, admit};
use crate::token::Key;

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

/// `doctor` and `key list` say why nothing would be sealed.
fn assert_told_before_a_start(host: &Host, why: &str) {
    let doctor = host.run(&["doctor"]);
    assert_eq!(doctor.status.code(), Some(1), "{doctor:?}");
    let told = String::from_utf8_lossy(&doctor.stdout).into_owned();
    let is_failure = |line: &str| line.contains("FAILURE") && line.contains(why);
    assert!(told.lines().any(is_failure), "{why}: {told}");
    assert!(host.list()["warnings"].to_string().contains(why), "{why}: {}", host.list());
}

#[test]
fn every_provider_that_seals_is_a_recipient_and_any_of_them_opens() {
    let Some(mut host) = host_with_two_tokens() else { return };
    host.generate("0s");
    let with_other = second_provider(&host, "second", "");
    host.extra.clone_from(&with_other);
    assert_told_before_a_start(&host, "provider other has no KEK");
    host.generate_on("other", "0s");
    assert_eq!(host.list()["warnings"], json!([]));
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
fn a_provider_that_hands_out_wrong_data_keys_keeps_no_other_from_opening() {
    let (Some(mut host), Some(library)) = (host_with_two_tokens(), library()) else { return };
    host = host.with_mode("gcm");
    host.generate("0s");
    host.extra = second_provider(&host, "second", "");
    host.generate_on("other", "0s");
    let faults = Faults { host: &host, library: &library };
    let plugin = faults.serve_healthy();
    let (mut sealed, key_id) = plugin.round_trip();
    faults.set("C_Decrypt flip token trousseau");
    plugin.decrypt(&sealed, &key_id).unwrap();
    // What neither opens is damaged.
    *sealed.last_mut().unwrap() ^= 1;
    assert_eq!(plugin.decrypt(&sealed, &key_id).unwrap_err().code, Code::InvalidArgument);
}

#[test]
fn a_configuration_that_is_not_taken_makes_no_kek_active() {
    let Some(mut host) = host_with_two_tokens() else { return };
    host.generate("0s");
    let mut plugin = host.serve_healthy();
    let (_, key_id) = plugin.round_trip();
    let good = host.configuration();
    host.tokens = r#""pkcs11:token=second""#.into();
    host.generate("1s"); // it comes after the one that is active
    host.tokens = r#""pkcs11:token=trousseau""#.into();
    let absent = second_provider(&host, "absent", "");
    host.tokens = r#""pkcs11:token=second""#.into();
    host.write_secret("trousseau.toml", &(host.configuration() + &absent));
    plugin.reload();
    plugin.wait_until("it is not taken", |plugin| plugin.log().contains("the old one stays"));
    assert_eq!(plugin.status().unwrap().key_id, key_id);
    plugin.round_trip();
    assert!(plugin.stop().success());
    // Nor does the next process know of it.
    let mut plugin = host.serve_with(&good);
    plugin.wait_until("it is healthy", |plugin| plugin.status().is_ok_and(|status| status.key_id == key_id));
    // Once it is taken, it does.
    host.write_configuration();
    plugin.reload();
    plugin.wait_until("it serves", |plugin| plugin.status().is_ok_and(|status| status.key_id != key_id));
    assert!(plugin.stop().success());
    let mut plugin = host.serve_with(&good);
    let names_it =
        |plugin: &Plugin| plugin.status().is_err_and(|answer| answer.message.contains("was active on this host"));
    plugin.wait_until("it misses the newer KEK", names_it);
}

#[test]
fn status_with_the_configuration_says_who_can_open_what() {
    let Some(mut host) = host_with_two_tokens() else { return };
    let first = host.generate("0s")["identity"].clone();
    let with_other = second_provider(&host, "second", "");
    host.extra.clone_from(&with_other);
    let other = host.generate_on("other", "0s")["identity"].clone();
    let openers = |openers: &[(&str, &Value)]| {
        let opener = |(provider, kek): &(&str, &Value)| json!({"provider": provider, "kek": kek});
        Value::from(openers.iter().map(opener).collect::<Vec<_>>())
    };
    let both = openers(&[("hsm", &first), ("other", &other)]);
    // (what is the case, the other provider, who opens, whose recipient is missing)
    let cases = [
        ("both are there", with_other.clone(), &both, None),
        ("the other one is away", with_other.replace("token=second", "token=absent"), &both, Some(&other)),
        ("it is back, and the ciphertexts are what they were", with_other.clone(), &both, Some(&other)),
        (
            "it only unwraps",
            with_other.replace("sessions = 2", "sessions = 2\nseal = false"),
            &openers(&[("hsm", &first)]),
            None,
        ),
    ];
    for (case, provider, opened_by, lacked) in cases {
        host.extra = provider;
        let plugin = host.serve_healthy();
        plugin.round_trip();
        let socket = plugin.socket.display().to_string();
        let asked = |format| host.run(&["status", "--socket", &socket, "--output", format]);
        let said: Value = serde_json::from_slice(&asked("json").stdout).unwrap();
        assert_eq!(&said["opened-by"], opened_by, "{case}: {said}");
        let gaps: Vec<&Value> = said["gaps"].as_array().unwrap().iter().map(|gap| &gap["identity"]).collect();
        assert_eq!(gaps, Vec::from_iter(lacked), "{case}: {said}");
        let text = String::from_utf8(asked("text").stdout).unwrap();
        let names: Vec<String> = opened_by.as_array().unwrap().iter().map(opener_in_words).collect();
        assert!(text.contains(&format!("opens    with {}\n", names.join(", or "))), "{case}: {text}");
        assert_eq!(text.contains("do not open with provider other"), lacked.is_some(), "{case}: {text}");
    }

    // What another configuration would open is not said of this plugin.
    let plugin = host.serve_healthy();
    host.extra = with_other;
    let refused = host.run(&["status", "--socket", &plugin.socket.display().to_string()]);
    assert_eq!(refused.status.code(), Some(1), "{refused:?}");
    assert!(String::from_utf8_lossy(&refused.stderr).contains("is not the configuration of the plugin"), "{refused:?}");
}

fn opener_in_words(opener: &Value) -> String {
    format!("KEK {} of provider {}", opener["kek"].as_str().unwrap(), opener["provider"].as_str().unwrap())
}

/// No token is touched: the profile says how long a recipient may be.
#[test]
fn providers_whose_envelope_is_too_long_for_v2_are_refused() {
    let mut host = Host::new();
    let (of_token, own) = (host.provider_of_token(), format!("profile = \"{}\"", host.token.family.profile()));
    let provider = |of_type: &str, number: usize| match of_type {
        "transit" => format!(
            "[[provider]]\nname = \"{number}\"\ntype = \"transit\"\naddress = \"https://127.0.0.1:1\"\nkey = \"kek\"\n\
             auth = {{ method = \"token\", token-file = \"/token\" }}\n"
        ),
        profile => {
            let name = format!("name = \"{number}\"");
            let of_profile = of_token.replace(&own, &format!("profile = \"{profile}\""));
            of_profile.replace("name = \"hsm\"", &name) + "\n"
        }
    };
    // (the providers, how many of the last ones only unwrap, the envelope's size, whether it is taken)
    let cases = [
        (vec!["softhsm"], 0, 190, true),
        (vec!["softhsm", "transit"], 0, 269, true),
        (vec!["transit"; 8], 0, 743, true),
        (vec!["nethsm"], 0, 898, true),
        (vec!["nethsm", "transit"], 0, 977, true),
        (vec!["nethsm", "transit", "transit"], 0, 1056, false),
        (vec!["nethsm", "transit", "transit"], 1, 977, true),
        (vec!["nethsm", "nethsm"], 0, 1685, false),
        (vec!["nethsm", "nethsm"], 1, 898, true),
    ];
    for (types, unwrapping, size, is_taken) in cases {
        let case = format!("{types:?}, {unwrapping} only unwrap");
        let sealing = types.len() - unwrapping;
        let providers = types.iter().enumerate().map(|(number, of_type)| {
            let seal = if number < sealing { "" } else { "seal = false\n" };
            provider(of_type, number) + seal
        });
        host.provider = Some(providers.collect());
        let done = host.run(&["check", "--output", "json"]);
        if is_taken {
            let said: Value = serde_json::from_slice(&done.stdout).unwrap_or_else(|_| panic!("{case}: {done:?}"));
            assert_eq!(said["envelope-size"], size, "{case}");
        } else {
            let said = String::from_utf8_lossy(&done.stderr);
            assert_eq!(done.status.code(), Some(78), "{case}: {said}");
            for words in
                [&format!("up to {size} bytes, and KMS v2 takes 1000"), "set `seal = false` for some providers"]
            {
                assert!(said.contains(words), "{case}: {said}");
            }
        }
    }
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
    assert_told_before_a_start(&host, "replicas are `tokens` of one provider");
}
