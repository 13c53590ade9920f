//! Which keys become KEKs, which one is active, and what happens when keys come, go and are exchanged.

use tonic::Code;

use crate::family::Family;
use crate::plugin::{Answer, Host, Plugin, admit, admit_by_id};
use crate::token::Key;

/// A UUIDv7 of November 2025.
const ID: [u8; 16] = [0x01, 0x9a, 0xaf, 0x2c, 0x4c, 0x00, 0x7a, 0x1b, 0x8c, 0x2d, 0x3e, 0x4f, 0x50, 0x61, 0x72, 0x83];

fn planted() -> Key {
    Key::generated(&ID, "trousseau-test")
}

#[test]
fn a_key_that_is_no_kek_never_wraps_and_is_named_with_the_reason() {
    if Family::chosen().lacks_aes() {
        return;
    }
    let cases: [(&str, Vec<Key>, &str); 7] = [
        ("extractable", vec![Key { extractable: true, ..planted() }], "EXTRACTABLE=false"),
        ("of known value", vec![Key { value: Some(vec![7; 32]), ..planted() }], "ALWAYS_SENSITIVE"),
        ("of another type", vec![Key { generic: true, ..planted() }], "not an AES key of 256 bits"),
        ("of another size", vec![Key { value: Some(vec![7; 16]), ..planted() }], "not an AES key of 256 bits"),
        ("with a name for an id", vec![Key { id: b"my-key".to_vec(), ..planted() }], "UUIDv7"),
        ("with an id of the year 2100", vec![Key { id: id_of_the_year_2100(), ..planted() }], "30 days ahead"),
        ("twice", vec![planted(), planted()], "another key has the same CKA_ID"),
    ];
    for (case, keys, reason) in cases {
        let host = Host::new();
        host.token.make_keys(&keys);
        let mut plugin = host.serve();
        plugin.wait_until("the keyring has looked", |plugin| {
            plugin.status().is_err_and(|answer| answer.message.contains("has no KEK"))
        });
        let Answer { code, message } = plugin.encrypt(b"seed").unwrap_err();
        assert_eq!(code, Code::Unavailable, "{case}: {message}");
        assert!(message.contains(reason) && message.contains("key generate"), "{case}: {message}");
        let listing = host.list();
        assert_eq!(listing["refused"].as_array().unwrap().len(), keys.len(), "{case}: {listing}");
        assert_eq!(plugin.stop().code(), Some(0), "{case}");

        // A real KEK beside it works, and the other is still not used.
        if keys.len() > 1 {
            continue; // none is made while nobody knows which one of the two is meant
        }
        host.generate("0s");
        host.serve_healthy().round_trip();
        assert_eq!(host.list()["keks"].as_array().unwrap().len(), 1, "{case}");
    }
}

fn id_of_the_year_2100() -> Vec<u8> {
    let mut id = ID.to_vec();
    id[..6].copy_from_slice(&[0x03, 0xbb, 0x2c, 0xc3, 0xd8, 0x00]);
    id
}

#[test]
fn a_key_made_elsewhere_is_a_kek_if_the_configuration_admits_it() {
    if Family::chosen().lacks_aes() {
        return;
    }
    let mut host = Host::new();
    host.token.make_keys(&[Key { id: b"ceremony".to_vec(), value: Some(vec![7; 32]), ..planted() }]);
    host.extra = admit(b"ceremony");
    host.serve_healthy().round_trip();

    // One that no token has is missed by name.
    host.extra.push_str(&admit(b"absent"));
    let listing = host.list();
    assert_eq!(listing["keks"].as_array().unwrap().len(), 1, "{listing}");
    let reason = &listing["refused"][0];
    let absent = base16ct::lower::encode_string(b"absent");
    assert!(reason["key"].to_string().contains(&absent) && reason["reason"].to_string().contains("no token has it"));

    // An extractable one is not, whatever the configuration says.
    host.token.make_keys(&[Key { id: b"open".to_vec(), extractable: true, ..planted() }]);
    host.extra = admit(b"open");
    let listing = host.list();
    assert!(listing["refused"].to_string().contains("EXTRACTABLE"), "{listing}");
    assert_eq!(listing["keks"].as_array().unwrap().len(), 0, "{listing}");
}

#[test]
fn a_kek_that_is_admitted_by_its_id_is_not_missed_whatever_it_consists_of() {
    let mut host = Host::new();
    let made = host.generate("0s");
    let id = base16ct::lower::decode_vec(made["id"].as_str().unwrap()).unwrap();
    host.extra = admit_by_id(&id);
    let listing = host.list();
    assert_eq!((&listing["keks"][0]["identity"], &listing["refused"]), (&made["identity"], &serde_json::json!([])));
    host.extra += &admit_by_id(b"absent");
    let refused = host.list()["refused"].clone();
    let absent = base16ct::lower::encode_string(b"absent");
    assert!(refused.as_array().unwrap().len() == 1 && refused[0]["key"].to_string().contains(&absent), "{refused}");
}

#[test]
fn every_mode_of_the_profile_works_and_the_keks_of_all_modes_unwrap_together() {
    let modes = Family::chosen().modes();
    let mut host = Host::new();
    let mut sealed = Vec::new();
    for mode in modes {
        host = host.with_mode(mode);
        assert_eq!(host.generate("0s")["mode"], *mode);
        let plugin = host.serve_healthy();
        sealed.push(plugin.round_trip());
        for (ciphertext, key_id) in &sealed {
            plugin.decrypt(ciphertext, key_id).unwrap();
        }
    }
    let length = |mode: &str| match (mode, Family::chosen()) {
        ("gcm", _) => 190,
        ("oaep", Family::Tpm2) => 642,
        ("oaep", _) => 898,
        _ => 170,
    };
    let lengths: Vec<_> = sealed.iter().map(|(ciphertext, _)| ciphertext.len()).collect();
    assert_eq!(lengths, modes.iter().map(|mode| length(mode)).collect::<Vec<_>>());
}

#[test]
fn a_mode_that_the_profile_does_not_know_is_refused_by_name() {
    let host = Host::new();
    let mode = if Family::chosen() == Family::Kryoptic { "no-such-mode" } else { "encrypt" };
    let done = host.run(&["key", "generate", "--mode", mode]);
    assert!(!done.status.success());
    let known = Family::chosen().modes().last().unwrap();
    assert!(String::from_utf8_lossy(&done.stderr).contains(known), "{done:?}");
}

#[test]
fn a_new_kek_unwraps_at_once_and_wraps_from_its_instant_on() {
    if Family::chosen().sees_no_new_keys() {
        return;
    }
    let host = Host::new();
    let first = host.generate("0s");
    let mut plugin = host.serve_healthy();
    let (_, old_key_id) = plugin.round_trip();
    // Pairs of RSA keys take a busy machine long, and so does each look at them.
    let second = host.generate(if Family::chosen().lacks_aes() { "75s" } else { "40s" });

    // Another host over the same token, which is new and so has seen both.
    let other = host.other_host();
    let twin = other.serve_healthy();
    assert_eq!(twin.status().unwrap().key_id, old_key_id, "the instant has not come");
    let state_of = |kek: &serde_json::Value| {
        let listing = host.list();
        let keks = listing["keks"].as_array().unwrap().clone();
        let found = keks.into_iter().find(|listed| listed["identity"] == kek["identity"]).unwrap();
        found["state"].as_str().unwrap().to_owned()
    };
    assert_eq!((state_of(&first), state_of(&second)), ("active".into(), "waiting".into()));

    let has_switched = |plugin: &Plugin| plugin.status().is_ok_and(|status| status.key_id != old_key_id);
    plugin.wait_until("the second KEK is active", has_switched);
    let now: jiff::Timestamp = second["not-before"].as_str().unwrap().parse().unwrap();
    assert!(jiff::Timestamp::now() >= now, "not before its instant");
    assert_eq!(plugin.status().unwrap(), twin.status().unwrap(), "both hosts switch to the same key_id");
    let (ciphertext, key_id) = plugin.round_trip();
    twin.decrypt(&ciphertext, &key_id).unwrap();
    assert_eq!((state_of(&first), state_of(&second)), ("unwrap-only".into(), "active".into()));
}

#[test]
fn an_identity_that_is_not_known_yet_is_looked_for_at_once() {
    if Family::chosen().sees_no_new_keys() {
        return;
    }
    let host = Host::new();
    host.generate("0s");
    let plugin = host.serve_healthy();
    let found = || plugin.log().matches("KEK found").count();
    // The regular look may come first, but not each time.
    let is_looked_for = (0..4).any(|_| {
        let known = found();
        host.generate("0s");
        let (ciphertext, key_id) = host.other_host().serve_healthy().round_trip();
        let is_not_known_yet = found() == known;
        plugin.decrypt(&ciphertext, &key_id).unwrap();
        assert!(found() > known);
        is_not_known_yet
    });
    assert!(is_looked_for);
}

#[test]
fn a_host_that_lost_its_active_kek_stops_writing_names_it_and_still_reads() {
    if Family::chosen().sees_no_new_keys() {
        return;
    }
    let host = Host::new();
    host.generate("0s");
    let (old, old_key_id) = host.serve_healthy().round_trip();
    let lost = host.generate("0s");
    host.serve_healthy().round_trip();
    // As after a restore of the token from an older copy.
    host.token.remove_key(&base16ct::lower::decode_vec(lost["id"].as_str().unwrap()).unwrap());

    let mut plugin = host.serve();
    let identity = lost["identity"].as_str().unwrap();
    plugin.wait_until("Status names the KEK", |plugin| {
        plugin.status().is_err_and(|answer| answer.code == Code::Unavailable && answer.message.contains(identity))
    });
    assert_eq!(plugin.encrypt(b"seed").unwrap_err().code, Code::Unavailable);
    plugin.decrypt(&old, &old_key_id).unwrap();

    // The way forward is a new KEK.
    host.generate("0s");
    plugin.wait_until("the new KEK is active", |plugin| plugin.status().is_ok());
    plugin.round_trip();
}

#[test]
fn another_key_under_the_id_of_a_known_kek_is_refused() {
    if Family::chosen().lacks_aes() {
        return;
    }
    let mut host = Host::new();
    host.extra = admit(&ID);
    host.token.make_keys(&[Key { value: Some(vec![1; 32]), ..planted() }]);
    host.serve_healthy().round_trip();
    host.token.remove_key(&ID);
    host.token.make_keys(&[Key { value: Some(vec![2; 32]), ..planted() }]);

    let mut plugin = host.serve();
    plugin.wait_until("Status says so", |plugin| {
        plugin
            .status()
            .is_err_and(|answer| answer.message.contains("another key than the one that this host first saw"))
    });
    assert_eq!(plugin.encrypt(b"seed").unwrap_err().code, Code::Unavailable);
}

#[test]
fn what_a_profile_says_of_new_keys_and_of_one_host_is_told_before_it_is_too_late() {
    let host = Host::new();
    let words = ["sees a new key only when it is initialized", "lives in this one host"];
    for (more, is_told) in [("", false), ("sees-new-keys = false\none-host = true", true)] {
        host.write_profile(more);
        let made = host.generate("0s");
        assert_eq!(made["warnings"].as_array().unwrap().len(), if is_told { 2 } else { 0 }, "{made}");
        let planned = host.run(&["key", "generate", "--dry-run", "--unsynchronized-clock-ok"]);
        let doctor: serde_json::Value =
            serde_json::from_slice(&host.run(&["doctor", "--output", "json"]).stdout).unwrap();
        let warned = doctor.as_array().unwrap().iter().filter(|finding| finding["severity"] == "warning");
        let warned: String = warned.map(|finding| finding["what"].to_string()).collect();
        let log = host.serve_healthy().log();
        for said in [String::from_utf8(planned.stdout).unwrap(), warned, made["warnings"].to_string(), log] {
            assert!(words.iter().all(|words| said.contains(words) == is_told), "{more}: {said}");
        }
        std::fs::remove_file(host.path("log")).unwrap();
    }
}

#[test]
fn a_key_that_could_never_become_active_is_not_made() {
    let host = Host::new();
    let unknown = if host.token.family.modes().contains(&"oaep") { "gcm" } else { "oaep" };
    host.generate("1h");
    for (arguments, reason) in [
        (&["key", "generate", "--activate-in", "10m"][..], "never active"),
        (&["key", "generate", "--activate-in=-1s"], "--activate-in"),
        (&["key", "generate", "--activate-in", "721h"], "out of range"),
        (&["key", "generate", "--activate-in", "31d"], "out of range"),
        (&["key", "generate", "--activate-in", "soon"], "--activate-in"),
        (&["key", "generate", "--provider", "nope"], "the configuration has: hsm"),
        (&["key", "generate", "--mode", unknown], "hint: it has "),
    ] {
        let done = host.run(arguments);
        let said = String::from_utf8_lossy(&done.stderr);
        let code = if reason == "never active" { 1 } else { 2 };
        assert_eq!(done.status.code(), Some(code), "{arguments:?}: {said}");
        assert!(said.contains(reason), "{arguments:?}: {said}");
    }
    assert_eq!(host.list()["keks"].as_array().unwrap().len(), 1);
}
