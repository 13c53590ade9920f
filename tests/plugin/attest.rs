//! `key attest`, the policy, and `doctor` on a token that hands keys out.

use std::path::Path;
use std::process::Output;

use serde_json::Value;

use crate::family::Family;
use crate::fault_module::{Faults, library};
use crate::plugin::{Host, admit, admit_by_id};
use crate::token::Key;

/// A key is made extractable, and is said not to be: NSS's softoken behaves so.
const WRAPS_OUT: &str = "C_GenerateKey say CKA_EXTRACTABLE=true
C_GetAttributeValue say CKA_EXTRACTABLE=false
C_GetAttributeValue say CKA_NEVER_EXTRACTABLE=true
";

/// The same, and its value can be read.
const SHOWS: &str = "C_GenerateKey say CKA_EXTRACTABLE=true
C_GenerateKey say CKA_SENSITIVE=false
C_GetAttributeValue say CKA_EXTRACTABLE=false
C_GetAttributeValue say CKA_NEVER_EXTRACTABLE=true
C_GetAttributeValue say CKA_SENSITIVE=true
C_GetAttributeValue say CKA_ALWAYS_SENSITIVE=true
";

/// A verb of a host's over the module that makes faults.
pub fn run(host: &Host, library: &Path, rules: &str, arguments: &[&str]) -> Output {
    let faults = Faults { host, library };
    faults.set(rules);
    drop(faults.command()); // it writes the configuration
    let mut command = host.command(arguments);
    command.arg("--config").arg(host.path("trousseau.toml"));
    command.env("TROUSSEAU_FAULT_MODULE", host.token.family.own_module());
    command.env("TROUSSEAU_FAULT_RULES", host.path("rules")).output().unwrap()
}

fn json(done: &Output) -> Value {
    serde_json::from_slice(&done.stdout).unwrap_or_else(|error| panic!("{error}: {done:?}"))
}

/// The ways with this outcome.
fn ways<'r>(report: &'r Value, outcome: &str) -> Vec<&'r str> {
    let trials = report["providers"][0]["tokens"][0]["exportability"]["trials"].as_array().unwrap();
    trials.iter().filter(|trial| trial["outcome"] == outcome).map(|trial| trial["way"].as_str().unwrap()).collect()
}

#[test]
fn the_report_names_all_that_an_auditor_asks_for() {
    if Family::chosen().lacks_aes() {
        return;
    }
    let host = Host::new();
    let kek = host.generate("0s");
    let report = json(&host.run(&["key", "attest", "--output", "json"]));
    assert_eq!(report["verdict"], "keys-stay", "{report:#}");
    for field in ["time", "host", "cluster", "configuration"] {
        assert!(report[field].is_string(), "{field}: {report:#}");
    }
    assert_eq!(report["software"]["sha256"].as_str().unwrap().len(), 64);
    assert_eq!(report["providers"][0]["policy"]["exportable"], "refuse");
    let survey = &report["providers"][0]["tokens"][0];
    assert_eq!(survey["token"]["label"], "trousseau");
    assert_eq!(survey["token"]["module"]["sha256"].as_str().unwrap().len(), 64);
    assert!(survey["token"]["flags"].to_string().contains("LOGIN_REQUIRED"));
    assert!(survey["modes"].as_array().unwrap().iter().all(|mode| mode["failure"].is_null()), "{survey:#}");
    assert_eq!(survey["exportability"]["throw-away"], "session-object");
    assert_eq!(survey["exportability"]["trials"].as_array().unwrap().len(), 6, "{survey:#}");
    let key = &survey["keys"][0];
    assert_eq!(key["identity"], kek["identity"]);
    for (attribute, value) in [
        ("SENSITIVE", true),
        ("ALWAYS_SENSITIVE", true),
        ("EXTRACTABLE", false),
        ("NEVER_EXTRACTABLE", true),
        ("LOCAL", true),
        ("MODIFIABLE", false),
    ] {
        assert_eq!(key["attributes"][attribute], value, "{attribute}: {key:#}");
    }
    let mechanism = if host.mode == Some("gcm") { "CKM_AES_GCM" } else { "CKM_AES_KEY_WRAP" };
    assert_eq!(key["attributes"]["ALLOWED_MECHANISMS"][0], mechanism, "{key:#}");

    let text = host.run(&["key", "attest"]);
    let text = String::from_utf8_lossy(&text.stdout).into_owned();
    for words in ["no way that was tried got key bytes out", "NEVER_EXTRACTABLE   true", "wrap it under itself"] {
        assert!(text.contains(words), "{words}: {text}");
    }
    // Nothing was left behind, and the KEK was not touched.
    assert_eq!(host.list()["keks"].as_array().unwrap().len(), 1);
    host.serve_healthy().round_trip();
}

#[test]
fn a_token_that_hands_a_key_out_is_caught_and_one_that_lets_an_attribute_move_is_warned_of() {
    if Family::chosen().lacks_aes() {
        return;
    }
    let Some(library) = library() else { return };
    let wrap = "wrap it under a fresh key";
    let (set_sensitive, set_extractable) = ("set SENSITIVE=false", "set EXTRACTABLE=true");
    let all = ["read CKA_VALUE", "copy it as EXTRACTABLE and not SENSITIVE", "wrap it under itself", wrap];
    let all = [&all[..], &[set_sensitive, set_extractable]].concat();
    for (case, rules, code, verdict, outcome, by) in [
        ("an honest token", "", 0, "keys-stay", "refused", all.clone()),
        (
            "one that wraps what it must not",
            WRAPS_OUT,
            1,
            "key-bytes-came-out",
            "came-out",
            vec!["wrap it under itself", wrap],
        ),
        ("one that shows the value", SHOWS, 1, "key-bytes-came-out", "came-out", vec!["read CKA_VALUE", wrap]),
        (
            "one whose attributes move",
            "C_SetAttributeValue return CKR_OK",
            0,
            "keys-stay-with-warnings",
            "warning",
            vec![set_sensitive, set_extractable],
        ),
        ("one that makes no keys", "C_GenerateKey return CKR_FUNCTION_NOT_SUPPORTED", 1, "unproven", "not-tried", all),
    ] {
        let host = Host::new();
        let done = run(&host, &library, rules, &["key", "attest", "--output", "json"]);
        let report = json(&done);
        assert_eq!(report["verdict"], verdict, "{case}: {report:#}");
        assert_eq!(done.status.code(), Some(code), "{case}: {done:?}");
        for way in by {
            // The mode `encrypt` has a key that wraps no key, not even itself.
            let is_moot = way == "wrap it under itself" && host.token.family == Family::Kryoptic;
            assert!(is_moot || ways(&report, outcome).contains(&way), "{case}, {way}: {report:#}");
        }
        let doctor = json(&run(&host, &library, rules, &["doctor", "--output", "json"])).to_string();
        assert_eq!(doctor.contains("does not keep a KEK in"), verdict == "key-bytes-came-out", "{case}: {doctor}");
    }
}

/// Of two kinds of KEK one cannot be tried, or of one kind a single way.
#[test]
fn what_could_not_be_tried_is_not_called_closed() {
    if Family::chosen().lacks_aes() {
        return;
    }
    let Some(library) = library() else { return };
    let mut host = Host::new();
    host.generate("0s");
    let log = host.path("calls");
    let made = |host: &Host, rules: &str| {
        std::fs::write(&log, "").unwrap();
        let faults = Faults { host, library: &library };
        faults.set(rules);
        let mut command = faults.verb(&["key", "attest", "--output", "json"]);
        let done = command.env("TROUSSEAU_FAULT_LOG", &log).output().unwrap();
        let calls = std::fs::read_to_string(&log).unwrap();
        (done, calls.lines().filter(|line| line.starts_with("C_GenerateKey ")).count())
    };
    let (honest, of_one_kind) = made(&host, "");
    assert_eq!(json(&honest)["verdict"], "keys-stay");
    let refusal = "C_GenerateKey return CKR_TEMPLATE_INCONSISTENT";
    // The key that can be read, under which the fourth way wraps.
    let modes = json(&honest)["providers"][0]["tokens"][0]["modes"].as_array().unwrap().len();
    let (done, _) = made(&host, &format!("{refusal} times 1 after {}", modes + 4));
    assert_eq!((done.status.code(), &json(&done)["verdict"]), (Some(0), &"keys-stay-with-warnings".into()), "{done:?}");
    assert_eq!(ways(&json(&done), "not-tried"), ["wrap it under a fresh key"]);

    let wraps = host.token.kw_wraps_objects();
    host.token.make_keys(&[Key { value: Some(vec![7; 32]), wraps, ..Key::generated(b"loose", "trousseau-test") }]);
    host.extra = admit(b"loose");
    let (done, _) = made(&host, &format!("{refusal} after {of_one_kind}"));
    let report = json(&done);
    assert_eq!((done.status.code(), &report["verdict"]), (Some(1), &"unproven".into()), "{report:#}");
    assert!(!ways(&report, "refused").is_empty() && ways(&report, "not-tried").len() >= 6, "{report:#}");
}

/// What has no tokens is not passed over in silence: its KEKs open every DEK as well.
#[test]
fn a_provider_of_type_transit_is_named_and_not_examined() {
    let mut host = Host::new();
    let vault = crate::transit::out_of_reach("");
    host.extra.clone_from(&vault);
    let report = json(&host.run(&["key", "attest", "--output", "json"]));
    assert_eq!(report["verdict"], "keys-stay-with-warnings", "{report:#}");
    assert_eq!(report["not-examined"], serde_json::json!([{"provider": "vault", "type": "transit"}]));
    let text = String::from_utf8(host.run(&["key", "attest"]).stdout).unwrap();
    assert!(text.contains("provider vault\n  NOT EXAMINED: ") && text.contains("there are warnings"), "{text}");

    (host.provider, host.extra) = (Some(vault), String::new());
    let done = host.run(&["key", "attest"]);
    assert_eq!((done.status.code(), done.stdout.len()), (Some(2), 0), "{done:?}");
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    assert!(said.contains("no provider has tokens: there is nothing to attest"), "{said}");
}

/// A host whose KEKs are pairs of RSA keys.
pub fn host_of_pairs() -> Host {
    let host = Host::new();
    if !host.token.family.modes().contains(&"oaep") {
        std::fs::create_dir_all(host.path("hsm-profiles")).unwrap();
        let profile =
            "title = \"pairs\"\nstatus = \"tested\"\nmodule-paths = []\nmodes = [\"oaep\"]\nrsa-bits = 2048\n";
        host.write_secret(&format!("hsm-profiles/{}.toml", host.token.family.profile()), profile);
    }
    host
}

#[test]
fn pairs_are_tried_as_keys_are() {
    let Some(library) = library() else { return };
    let say = |what: &str| format!("C_GenerateKeyPair say {what}\n");
    let hide = "C_GetAttributeValue say CKA_EXTRACTABLE=false\nC_GetAttributeValue say CKA_SENSITIVE=true\n";
    let wraps_out = say("CKA_EXTRACTABLE=true") + hide;
    let shows = say("CKA_EXTRACTABLE=true") + &say("CKA_SENSITIVE=false") + hide;
    let read = "read CKA_PRIVATE_EXPONENT, CKA_PRIME_1 …";
    let copy = "copy it as EXTRACTABLE and not SENSITIVE";
    let (wrap, set_sensitive, set_extractable) =
        ("wrap it under a fresh key", "set SENSITIVE=false", "set EXTRACTABLE=true");
    // tpm2-pkcs11 lets both attributes move, and its TPM knows nothing of them.
    let is_tpm = Family::chosen() == Family::Tpm2;
    let honest = match is_tpm {
        true => ("honest", "", 0, "keys-stay-with-warnings", "warning", vec![set_sensitive, set_extractable]),
        false => ("honest", "", 0, "keys-stay", "refused", vec![read, copy, set_sensitive, set_extractable]),
    };
    for (case, rules, code, verdict, outcome, by) in [
        honest,
        ("wraps what it must not", &wraps_out, 1, "key-bytes-came-out", "came-out", vec![wrap]),
        ("shows the private numbers", &shows, 1, "key-bytes-came-out", "came-out", vec![read]),
        (
            "attributes move",
            "C_SetAttributeValue return CKR_OK",
            0,
            "keys-stay-with-warnings",
            "warning",
            vec![set_sensitive, set_extractable],
        ),
        (
            "makes no pairs",
            "C_GenerateKeyPair return CKR_FUNCTION_NOT_SUPPORTED",
            1,
            "unproven",
            "not-tried",
            vec![read, copy, wrap, set_sensitive, set_extractable],
        ),
    ] {
        if is_tpm && outcome == "came-out" {
            eprintln!("skipped: what a TPM does not let out, no rule can");
            continue;
        }
        let host = host_of_pairs();
        let done = run(&host, &library, rules, &["key", "attest", "--output", "json"]);
        let report = json(&done);
        assert_eq!(report["verdict"], verdict, "{case}: {report:#}");
        assert_eq!(done.status.code(), Some(code), "{case}: {done:?}");
        for way in by {
            assert!(ways(&report, outcome).contains(&way), "{case}, {way}: {report:#}");
        }
        let exportability = &report["providers"][0]["tokens"][0]["exportability"];
        let on = if is_tpm { "token-object" } else { "session-object" };
        assert!(exportability["throw-away"] == on || outcome == "not-tried", "{report:#}");
        let trials = exportability["trials"].as_array().unwrap();
        assert!(trials.len() == 5 && trials.iter().all(|trial| trial["like"]["mode"] == "oaep"), "{report:#}");
    }
}

#[test]
fn a_token_that_makes_no_session_keys_is_tried_on_a_token_object_that_does_not_stay() {
    if Family::chosen().lacks_aes() {
        return;
    }
    let Some(library) = library() else { return };
    let host = Host::new();
    let objects = || {
        let found = |directory: &Path| std::fs::read_dir(directory).unwrap().count();
        let tokens = host.token.directory.join("tokens");
        std::fs::read_dir(tokens).unwrap().map(|token| found(&token.unwrap().path())).sum::<usize>()
    };
    let is_softhsm = host.token.family == Family::SoftHsm;
    let before = if is_softhsm { objects() } else { 0 };
    // The first calls try the profile's modes.
    let honest = json(&run(&host, &library, "", &["key", "attest", "--output", "json"]));
    let modes = honest["providers"][0]["tokens"][0]["modes"].as_array().unwrap().len();
    let rules = format!("C_GenerateKey return CKR_TEMPLATE_INCONSISTENT times 1 after {modes}");
    let done = run(&host, &library, &rules, &["key", "attest", "--output", "json"]);
    let report = json(&done);
    assert_eq!(report["providers"][0]["tokens"][0]["exportability"]["throw-away"], "token-object", "{report:#}");
    assert_eq!(report["verdict"], "keys-stay", "{report:#}");
    // And when the token goes in the middle of it.
    for seed in 1..=4 {
        let rules = format!(
            "seed {seed}\nC_GenerateKey return CKR_TEMPLATE_INCONSISTENT probability 0.6\n\
             C_CopyObject return CKR_DEVICE_REMOVED"
        );
        let done = run(&host, &library, &rules, &["key", "attest", "--output", "json"]);
        if done.status.code() == Some(69) {
            assert_eq!(json(&done)["verdict"], "unproven", "{done:?}");
        }
        assert!(!is_softhsm || objects() == before, "a key stayed in the token: {done:?}");
    }
}

#[test]
fn no_kek_is_made_in_a_token_that_hands_keys_out_unless_the_policy_puts_up_with_it() {
    if Family::chosen().lacks_aes() {
        return;
    }
    let Some(library) = library() else { return };
    let mut host = Host::new();
    let generate = ["key", "generate", "--activate-in", "0s"];
    for args in [&generate[..], &["key", "generate", "--dry-run"]] {
        let refused = run(&host, &library, WRAPS_OUT, args);
        assert_eq!(refused.status.code(), Some(1), "{refused:?}");
        let stderr = String::from_utf8_lossy(&refused.stderr);
        assert!(stderr.contains("may not leave its token does") && stderr.contains("[policy] exportable"), "{stderr}");
    }
    assert_eq!(host.list()["keks"].as_array().unwrap().len(), 0);

    host.extra = "[policy]\nexportable = \"warn\"".into();
    let done = run(&host, &library, WRAPS_OUT, &generate);
    assert!(done.status.success(), "{done:?}");
    assert!(String::from_utf8_lossy(&done.stdout).contains("WARNING     such a key leaves its token"), "{done:?}");
}

#[test]
fn that_nothing_could_be_tried_is_said_when_a_kek_is_made() {
    let Some(library) = library() else { return };
    let host = Host::new();
    // A TPM makes pairs in the token alone. Of the others the trial's keys are asked for first.
    let rules = match host.token.family {
        Family::Tpm2 => "",
        Family::OpenCryptoki => "C_GenerateKeyPair return CKR_TEMPLATE_INCONSISTENT times 5",
        Family::SoftHsm | Family::Kryoptic => "C_GenerateKey return CKR_TEMPLATE_INCONSISTENT times 6",
    };
    let generate = ["key", "generate", "--unsynchronized-clock-ok", "--activate-in", "0s", "--output", "json"];
    for arguments in [&[&generate[..], &["--dry-run"]].concat()[..], &generate] {
        let done = run(&host, &library, rules, arguments);
        let untried = json(&done)["untried"].to_string();
        assert!(untried.contains("no throw-away key can be made"), "{done:?}");
    }
    let text = run(&host, &library, rules, &["key", "generate", "--dry-run", "--unsynchronized-clock-ok"]);
    assert!(String::from_utf8_lossy(&text.stdout).contains("not tried   whether such a key leaves"), "{text:?}");
    let tried = host.run(&["key", "generate", "--dry-run", "--unsynchronized-clock-ok", "--output", "json"]);
    assert!(json(&tried)["untried"].is_null() || host.token.family == Family::Tpm2, "{tried:?}");
}

#[test]
fn each_of_two_keys_with_one_id_is_reported_with_its_own_reason() {
    if Family::chosen().lacks_aes() {
        return;
    }
    let mut host = Host::new();
    let key = Key::generated(b"twice", "trousseau-test");
    host.token.make_keys(&[key.clone(), Key { extractable: true, ..key }]);
    host.extra = admit(b"twice");
    let reasons = ["another key has the same CKA_ID", "EXTRACTABLE=false"];
    let report = json(&host.run(&["key", "attest", "--output", "json"]));
    let keys = report["providers"][0]["tokens"][0]["keys"].as_array().unwrap();
    for reason in reasons {
        let with = keys.iter().filter(|key| key["refused"].to_string().contains(reason));
        assert_eq!(with.count(), 1, "{reason}: {keys:#?}");
    }
    let extractable = keys.iter().find(|key| key["attributes"]["EXTRACTABLE"] == true).unwrap();
    assert!(extractable["refused"].to_string().contains(reasons[1]), "{keys:#?}");
    for verb in [&["key", "list"][..], &["key", "attest"], &["doctor"]] {
        let said = String::from_utf8_lossy(&host.run(verb).stdout).into_owned();
        assert!(reasons.iter().all(|reason| said.contains(reason)), "{verb:?}: {said}");
    }
    // No KEK is made beside them.
    let done = host.run(&["key", "generate", "--unsynchronized-clock-ok"]);
    assert!(String::from_utf8_lossy(&done.stderr).contains(reasons[0]), "{done:?}");
}

#[test]
fn a_key_without_a_history_is_a_kek_only_by_a_reported_exception() {
    if Family::chosen().lacks_aes() {
        return;
    }
    let mut host = Host::new();
    let planted = Key::generated(b"restored", "trousseau-test");
    host.token.make_keys(&[Key { value: Some(vec![7; 32]), ..planted }]);
    host.extra = admit_by_id(b"restored");
    let listing = host.list();
    assert_eq!(listing["keks"].as_array().unwrap().len(), 0, "{listing}");
    assert!(listing["refused"].to_string().contains("exception ="), "{listing}");

    host.extra = admit(b"restored");
    let said = |text: &str| {
        assert!(text.contains("does not vouch that it is") && text.contains("LOCAL"), "{text}");
        assert!(text.contains("restored from a backup"), "{text}");
    };
    let plugin = host.serve_healthy();
    plugin.round_trip();
    said(&plugin.log());
    said(&host.list()["exceptions"].to_string());
    let report = json(&host.run(&["key", "attest", "--output", "json"]));
    let survey = &report["providers"][0]["tokens"][0];
    said(&survey["keys"][0]["exception"].to_string());
    // It was tried on keys that are as loose as this one.
    let trials = survey["exportability"]["trials"].as_array().unwrap();
    let modifiable = &survey["keys"][0]["attributes"]["MODIFIABLE"];
    assert!(trials.iter().all(|trial| trial["like"]["modifiable"] == *modifiable), "{survey:#}");
    said(&json(&host.run(&["doctor", "--output", "json"])).to_string());
    for verb in [&["key", "list"][..], &["key", "attest"]] {
        said(&String::from_utf8_lossy(&host.run(verb).stdout));
    }
}
