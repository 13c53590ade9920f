//! Making a KEK, and knowing before its instant that every host is ready for it.

use std::fs;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{Output, Stdio};
use std::time::Duration;

use serde_json::Value;

use crate::family::Family;
use crate::fault_module::{Faults, library};
use crate::observe::{OBSERVED, wait_for_samples};
use crate::plugin::{Host, Plugin, admit};
use crate::token::Key;

const OLD: &[u8] = b"made elsewhere";

fn imported(id: &[u8], fill: u8) -> Key {
    Key { value: Some(vec![fill; 32]), ..Key::generated(id, "trousseau-test") }
}

fn json(done: &Output) -> Value {
    assert!(done.status.success(), "{done:?}");
    serde_json::from_slice(&done.stdout).unwrap()
}

fn stdout(done: &Output) -> String {
    String::from_utf8_lossy(&done.stdout).into_owned()
}

fn stderr(done: &Output) -> String {
    String::from_utf8_lossy(&done.stderr).into_owned()
}

#[test]
fn a_kek_is_listed_with_what_its_token_says_and_with_the_replica_that_lacks_it() {
    if Family::chosen().stands_one_token_alone() {
        return;
    }
    let host = Host::new().with_a_replica();
    let made = host.generate("0s");
    assert_eq!(made["held-by"], serde_json::json!(["pkcs11:token=trousseau"]));
    assert_eq!(made["lacked-by"], serde_json::json!(["pkcs11:token=second"]));

    let kek = &host.list()["keks"][0];
    for field in ["identity", "id", "not-before", "lacked-by", "held-by"] {
        assert_eq!(kek[field], made[field], "{field}: {kek:#}");
    }
    assert_eq!(kek["state"], "active");
    let said = &kek["attributes"]["pkcs11:token=trousseau"];
    for (attribute, value) in [
        ("SENSITIVE", true),
        ("ALWAYS_SENSITIVE", true),
        ("EXTRACTABLE", false),
        ("NEVER_EXTRACTABLE", true),
        ("LOCAL", true),
        ("MODIFIABLE", false),
    ] {
        assert_eq!(said[attribute], value, "{attribute}: {said:#}");
    }
    let use_of_it = if host.token.family.modes() == ["oaep"] { "DECRYPT" } else { "WRAP" };
    assert_eq!(said[use_of_it], use_of_it == "DECRYPT" || host.mode != Some("gcm") && host.token.kw_wraps_objects());

    let plugin = host.serve_healthy();
    let id = made["id"].as_str().unwrap();
    let ready = json(&expect(&host, id, plugin.socket.to_str().unwrap()));
    assert_eq!(ready["lacked-by"], made["lacked-by"]);
    drop(plugin);
    let text = stdout(&host.run(&["key", "list", "--attributes"]));
    for words in [id, "token pkcs11:token=second lacks KEK", " -EXTRACTABLE "] {
        assert!(text.contains(words), "{words}: {text}");
    }
    let text = stdout(&host.run(&["key", "generate", "--activate-in", "1h", "--unsynchronized-clock-ok"]));
    for words in [
        "held by     1 of 2 tokens: if all that hold it are lost",
        "lacked by   pkcs11:token=second: clone",
        "--expect",
    ] {
        assert!(text.contains(words), "{words}: {text}");
    }
}

#[test]
fn a_dry_run_shows_what_would_be_asked_for_and_makes_no_key() {
    if Family::chosen().stands_one_token_alone() {
        return;
    }
    let host = Host::new().with_a_replica();
    let dry = ["key", "generate", "--dry-run", "--activate-in", "1h", "--unsynchronized-clock-ok"];
    let planned = json(&host.run(&[&dry[..], &["--output", "json"]].concat()));
    assert_eq!(planned["made-in"], "pkcs11:token=trousseau");
    assert_eq!(planned["to-be-cloned-to"], serde_json::json!(["pkcs11:token=second"]));
    let templates = planned["templates"].as_array().unwrap();
    assert_eq!(templates.len(), if host.token.family.modes() == ["oaep"] { 4 } else { 1 }, "{templates:#?}");
    let is_private = |template: &&Value| !template["object"].as_str().unwrap().starts_with("public");
    let template = &templates.iter().find(is_private).unwrap()["attributes"];
    for (attribute, value) in [("SENSITIVE", true), ("EXTRACTABLE", false), ("MODIFIABLE", false), ("DERIVE", false)] {
        assert_eq!(template[attribute], value, "{attribute}: {template:#}");
    }
    assert_eq!(template["LABEL"], "trousseau-test");
    let text = stdout(&host.run(&dry));
    for words in ["no KEK is made", "CKA_EXTRACTABLE        false", "active from ", "1 of 2 tokens"] {
        assert!(text.contains(words), "{words}: {text}");
    }
    assert_eq!(host.list()["keks"].as_array().unwrap().len(), 0);
}

#[test]
fn no_kek_is_made_nor_planned_while_keys_are_ambiguous_or_the_clock_is_in_doubt() {
    if Family::chosen().lacks_aes() {
        return;
    }
    let mut host = Host::new();
    // Nobody vouches for the clock but this.
    let vouch = |answer: &str| {
        fs::write(host.path("timedatectl"), format!("#!/bin/sh\necho {answer}\n")).unwrap();
        host.set_mode("timedatectl", 0o755);
    };
    let path = format!("{}:{}", host.directory.path().display(), std::env::var("PATH").unwrap());
    let generate = |host: &Host, arguments: &[&str]| {
        let file = host.write_configuration();
        let mut command = host.command(&["key", "generate", "--activate-in", "0s"]);
        command.args(arguments).arg("--config").arg(file).env("PATH", &path).output().unwrap()
    };
    vouch("no");
    assert!(generate(&host, &[]).status.success(), "the first KEK's instant is compared with nothing");
    for arguments in [&[][..], &["--dry-run"]] {
        let refused = generate(&host, arguments);
        assert_eq!(refused.status.code(), Some(1), "{refused:?}");
        assert!(stderr(&refused).contains("clock is not synchronized"), "{refused:?}");
    }
    vouch("yes");
    assert!(generate(&host, &[]).status.success());
    vouch("nobody to ask >&2; exit 1");
    let refused = generate(&host, &[]);
    let said = stderr(&refused);
    assert!(said.contains("cannot be seen here") && said.contains("see `timedatectl` on the host"), "{said}");
    assert_eq!(refused.status.code(), Some(1), "{said}");

    host.token.make_keys(&[imported(OLD, 1), imported(OLD, 2)]);
    host.extra = admit(OLD);
    for arguments in [&[][..], &["--dry-run"], &["--unsynchronized-clock-ok"]] {
        let refused = generate(&host, arguments);
        assert_eq!(refused.status.code(), Some(1), "{refused:?}");
        let said = stderr(&refused);
        assert!(said.contains("another key has the same CKA_ID") && said.contains("remove the one"), "{said}");
    }
    assert_eq!(host.list()["keks"].as_array().unwrap().len(), 2);
}

/// How often a verb has the token do something. The module's log is written over.
fn calls(faults: &Faults, verb: &[&str], function: &str) -> usize {
    faults.set("");
    let log = faults.host.path("calls");
    fs::write(&log, "").unwrap();
    let done = faults.verb(verb).env("TROUSSEAU_FAULT_LOG", &log).output().unwrap();
    assert!(done.status.success(), "{done:?}");
    let calls = fs::read_to_string(&log).unwrap();
    calls.lines().filter(|line| line.starts_with(&format!("{function} ")) && line.ends_with(" CKR_OK")).count()
}

#[test]
fn a_token_that_is_lost_while_it_makes_a_kek_leaves_none_that_nobody_is_told_of() {
    let Some(library) = library() else { return };
    let is_pair = Family::chosen().modes() == ["oaep"];
    let makes = if is_pair { "C_GenerateKeyPair" } else { "C_GenerateKey" };
    let (finds, of_proof) = ("C_FindObjectsInit", if is_pair { 2 } else { 1 });
    for (function, action, more, words) in [
        (makes, "half-way CKR_DEVICE_REMOVED", 0, "was made was not to be learned"),
        (finds, "return CKR_DEVICE_REMOVED", 0, "was made, and whether it works was not to be learned"),
        (finds, "return CKR_DEVICE_REMOVED", of_proof, "was made and works, and which tokens hold it"),
    ] {
        let mut host = Host::new();
        let log = host.path("audit.log");
        host.extra = format!("[audit]\nfile = \"{}\"", log.display());
        let faults = Faults { host: &host, library: &library };
        let generate = ["key", "generate", "--unsynchronized-clock-ok", "--activate-in", "0s"];
        let before = calls(&faults, &[&generate[..], &["--dry-run"]].concat(), function);
        faults.set(&format!("{function} {action} after {}", before + more));
        let done = faults.verb(&generate).output().unwrap();
        assert_eq!(done.status.code(), Some(69), "{words}: {done:?}");
        assert!(stderr(&done).contains(words), "{words}: {done:?}");
        let text = fs::read_to_string(&log).unwrap();
        let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let [line] = lines.as_slice() else { panic!("{words}: {text}") };
        let detail = line["detail"].as_str().unwrap();
        assert!(line["event"] == "key-generated" && detail.starts_with("perhaps: "), "{words}: {line}");
        if is_pair && function == makes {
            continue; // one pair is no KEK
        }
        let kek = &host.list()["keks"][0];
        let id = kek["id"].as_str().unwrap();
        assert!(detail.contains(id) && stderr(&done).contains(id), "{words}: {line}: {done:?}");
        assert_eq!(line["keks"][0], kek["identity"], "{words}");
    }
}

/// As in the image of the static pod, which has nothing to ask.
#[test]
fn a_clock_that_cannot_be_seen_is_called_so_and_is_no_finding() {
    let host = Host::new();
    let id = host.generate("0s")["id"].as_str().unwrap().to_owned();
    let _plugin = host.serve_healthy();
    let file = host.write_configuration();
    let run = |arguments: &[&str]| {
        let mut command = host.command(arguments);
        command.arg("--config").arg(&file).env("PATH", "/no/such/directory").output().unwrap()
    };
    const WORDS: &str = "cannot be seen here";
    let doctor = run(&["doctor", "--output", "json"]);
    let findings: Value = serde_json::from_slice(&doctor.stdout).unwrap();
    let of_clock = |finding: &&Value| finding["what"].to_string().contains("the clock is synchronized");
    let told = findings.as_array().unwrap().iter().find(of_clock).unwrap_or_else(|| panic!("{findings:#}"));
    assert!(told["severity"] == "good" && told["what"].to_string().contains(WORDS), "{told}");
    let ready = json(&run(&["key", "list", "--expect", &id, "--output", "json"]));
    assert_eq!(ready.get("clock-synchronized"), Some(&Value::Null), "{ready}");
    assert!(stdout(&run(&["key", "list", "--expect", &id])).contains(WORDS));
    let refused = run(&["key", "generate"]);
    assert!(stderr(&refused).contains(WORDS) && stderr(&refused).contains("--unsynchronized-clock-ok"), "{refused:?}");
    assert!(run(&["key", "generate", "--unsynchronized-clock-ok"]).status.success());
}

/// `key list --expect`, which asks the plugin of `socket`.
fn expect(host: &Host, kek: &str, socket: &str) -> Output {
    host.run(&["key", "list", "--expect", kek, "--socket", socket, "--output", "json"])
}

#[test]
fn a_plugin_that_is_ready_for_a_kek_proves_it_before_the_instant() {
    if Family::chosen().sees_no_new_keys() {
        return;
    }
    let host = Host::new();
    host.generate("0s");
    let mut plugin = host.serve_healthy();
    let (_, old_key_id) = plugin.round_trip();
    // Pairs of RSA keys take a busy machine long, and so does each look at them.
    let kek = host.generate(if Family::chosen().lacks_aes() { "75s" } else { "30s" });
    let (id, identity) = (kek["id"].as_str().unwrap(), kek["identity"].as_str().unwrap());
    let marks = fs::read(host.path("state/active.json")).unwrap();
    let socket = host.path("kms.sock");
    let foreseen = json(&expect(&host, id, socket.to_str().unwrap()))["key-id"].clone();
    // On the configuration's own socket.
    for name in [identity, &identity[..8], &identity.to_uppercase()] {
        let done = host.run(&["key", "list", "--expect", name]);
        assert!(done.status.success() && stdout(&done).lines().count() == 1, "{name}: {done:?}");
        assert!(stdout(&done).contains(foreseen.as_str().unwrap()), "{name}: {done:?}");
    }
    for no_name in ["", "kek-2", "0xab"] {
        let done = host.run(&["key", "list", "--expect", no_name]);
        assert_eq!(done.status.code(), Some(2), "{no_name}: {done:?}");
    }
    assert_eq!(fs::read(host.path("state/active.json")).unwrap(), marks, "it makes no KEK active");
    assert_eq!(plugin.status().unwrap().key_id, old_key_id, "the instant has not come");

    plugin.wait_until("it has switched", |plugin| plugin.status().is_ok_and(|status| status.key_id != old_key_id));
    assert_eq!(plugin.status().unwrap().key_id, foreseen);
    let done = json(&expect(&host, id, socket.to_str().unwrap()));
    assert_eq!((&done["state"], &done["key-id"]), (&"active".into(), &foreseen));
}

#[test]
fn an_emergency_rotation_is_over_on_a_host_as_soon_as_it_is_asked() {
    if Family::chosen().sees_no_new_keys() {
        return;
    }
    let host = Host::new();
    let old = host.generate("0s");
    let plugin = host.serve_healthy();
    let socket = plugin.socket.to_str().unwrap();
    let new = host.generate("0s");
    assert_ne!(new["identity"], old["identity"]);
    let ready = json(&expect(&host, new["id"].as_str().unwrap(), socket));
    assert_eq!(ready["state"], "active");
    assert_eq!(ready["key-id"], plugin.status().unwrap().key_id);
    assert_eq!(plugin.log().matches("KEK is active").count(), 2);
    let ready = json(&expect(&host, old["id"].as_str().unwrap(), socket));
    assert_eq!(ready["state"], "unwrap-only");
    assert_eq!(ready["key-id"], plugin.status().unwrap().key_id);
}

#[test]
fn a_plugin_that_is_not_ready_for_a_kek_is_told_with_the_reason() {
    if Family::chosen().lacks_aes() {
        return;
    }
    // Two hosts whose tokens have a KEK in common, and of another one only the id.
    let (common, other) = (b"common".as_slice(), b"a sibling".as_slice());
    let mut host = Host::new();
    host.token.initialize(&["second"]);
    host.token.make_keys(&[imported(common, 7), imported(other, 1)]);
    host.token.make_keys_in("second", &[imported(common, 7), imported(other, 2)]);
    host.extra = [admit(common), admit(other)].concat();
    let waiting = host.generate("1h");
    let waiting = waiting["id"].as_str().unwrap();

    let mut theirs = host.other_host();
    theirs.tokens = r#""pkcs11:token=second""#.into();
    let plugin = theirs.serve_healthy();
    let socket = plugin.socket.to_str().unwrap().to_owned();
    let id = base16ct::lower::encode_string;
    for (case, kek, code, words) in [
        ("in common", id(common), 0, ""),
        ("not in their token", waiting.to_owned(), 1, "does not see KEK"),
        ("another key in their token", id(other), 1, "does not unwrap with KEK"),
        ("in no token", "00".repeat(4), 1, "this host's token has no KEK 00000000"),
        ("in no token, and short", "00".to_owned(), 2, "00 is no KEK's id, and too short to be the beginning of one"),
        ("too short a beginning", waiting[..7].to_owned(), 2, "give 8 of its digits or more"),
    ] {
        let done = expect(&host, &kek, &socket);
        assert_eq!(done.status.code(), Some(code), "{case}: {done:?}");
        assert!(stderr(&done).contains(words), "{case}: {done:?}");
    }
    drop(plugin);
    let done = expect(&host, &id(common), &socket);
    assert_eq!(done.status.code(), Some(69), "{done:?}");
    theirs.cluster = "another".into();
    let of_another_cluster = theirs.serve_healthy();
    let done = expect(&host, &id(common), of_another_cluster.socket.to_str().unwrap());
    assert!(stderr(&done).contains("keyring.cluster"), "{done:?}");
    assert_eq!(done.status.code(), Some(1), "{done:?}");
}

#[test]
fn a_host_whose_clock_was_an_hour_ahead_keeps_what_it_made_active_and_says_so() {
    let host = Host::new();
    host.generate("0s");
    let (_, old_key_id) = host.serve_healthy().round_trip();
    let kek = host.generate("1h");
    // As if the hour had passed by this host's clock.
    let mark = serde_json::json!([{
        "provider": "hsm", "identity": kek["identity"], "not-before": kek["not-before"], "id": kek["id"],
    }]);
    fs::write(host.path("state/active.json"), mark.to_string()).unwrap();
    let mut plugin = host.serve_healthy();
    let (sealed, new_key_id) = plugin.round_trip();
    assert_ne!(new_key_id, old_key_id);
    const WORDS: &str = "has not come: the clock is wrong, or was";
    plugin.wait_until("the log says so", |plugin| plugin.log().contains(WORDS));
    for said in [stdout(&host.run(&["doctor"])), host.list()["warnings"].to_string()] {
        assert!(said.contains(WORDS), "{said}");
    }
    // Another host, whose clock is right, reads what was written too early, and has nothing to say.
    let other = host.other_host();
    let others = other.serve_healthy();
    assert_eq!(others.status().unwrap().key_id, old_key_id);
    others.decrypt(&sealed, &new_key_id).unwrap();
    assert_eq!(other.list()["warnings"], serde_json::json!([]));
}

/// `serve` on a host whose clock is so far off, of another configuration directory over the same token. `None`: it lacks
/// what makes a clock wrong; this says so.
fn serve_at(host: &Host, off: &str) -> Option<Plugin> {
    let library = Path::new("/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1");
    if !library.exists() {
        assert!(std::env::var_os("TROUSSEAU_TEST_REQUIRE").is_none(), "{}: install libfaketime", library.display());
        eprintln!("skipped: it lacks {}", library.display());
        return None;
    }
    let mut command = host.command(&["serve", "--config"]);
    command.arg(host.write_configuration()).stdin(Stdio::null());
    command.env("LD_PRELOAD", library).env("FAKETIME", off).env("DONT_FAKE_MONOTONIC", "1");
    let mut plugin = host.start(command);
    plugin.wait_until("it is healthy", |plugin| plugin.status().is_ok());
    Some(plugin)
}

#[test]
fn hosts_whose_clocks_are_an_hour_off_switch_once_and_read_each_other() {
    if Family::chosen().sees_no_new_keys() {
        return;
    }
    let host = Host::new();
    host.generate("0s");
    let kek = host.generate("30m");
    let (ahead, behind) = (host.other_host(), host.other_host());
    let Some(plugin) = serve_at(&ahead, "+1h") else { return };
    let right = host.serve_healthy();
    let (early, new_key_id) = plugin.round_trip();
    let (old, old_key_id) = right.round_trip();
    assert_ne!(new_key_id, old_key_id, "the instant has come for that host alone");
    let late = serve_at(&behind, "-1h").unwrap();
    assert_eq!(late.status().unwrap().key_id, old_key_id);
    for plugin in [&plugin, &right, &late] {
        plugin.decrypt(&early, &new_key_id).unwrap();
        plugin.decrypt(&old, &old_key_id).unwrap();
    }
    // Its clock is set right: what it has made active it does not leave, and it is told that the clock was wrong.
    plugin.stop();
    let plugin = ahead.serve_healthy();
    assert_eq!(plugin.round_trip().1, new_key_id);
    let told = stdout(&ahead.run(&["doctor"]));
    let identity = kek["identity"].as_str().unwrap();
    assert!(told.contains("has not come: the clock is wrong, or was") && told.contains(identity), "{told}");
    assert_eq!(late.status().unwrap().key_id, old_key_id);
}

#[test]
fn a_kek_past_its_period_is_told_of_everywhere_but_to_the_api_server() {
    if Family::chosen().lacks_aes() {
        return;
    }
    const WORDS: &str = "ended at 2026-04-01T00:00:00Z (keyring.max-age): make a new one";
    let mut host = Host::new();
    host.token.make_keys(&[imported(OLD, 7)]);
    host.extra = admit(OLD) + OBSERVED; // from the first of January on
    let heard = UnixDatagram::bind(host.path("notify.sock")).unwrap();
    heard.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let mut command = host.command(&["serve", "--config"]);
    command.arg(host.write_configuration()).env("NOTIFY_SOCKET", host.path("notify.sock"));
    let mut plugin = host.start(command);
    plugin.wait_until("the log says so", |plugin| plugin.log().contains(WORDS));
    let mut message = [0; 4096];
    while !String::from_utf8_lossy(&message).contains(WORDS) {
        message = [0; 4096];
        heard.recv(&mut message).expect("systemd hears of it");
    }
    assert_eq!(plugin.status().unwrap().healthz, "ok");
    let doctor = host.run(&["doctor", "--output", "json"]);
    assert_eq!(doctor.status.code(), Some(0), "{doctor:?}");
    for said in [stdout(&doctor), stdout(&host.run(&["key", "list"])), host.list()["warnings"].to_string()] {
        assert!(said.contains(WORDS), "{said}");
    }
    let kek = &host.list()["keks"][0];
    assert_eq!(kek["period-ends"], "2026-04-01T00:00:00Z");
    let labels = format!("{{provider=\"hsm\",kek={}}}", kek["identity"]);
    let ends = ("trousseau_kek_period_end_timestamp_seconds".to_owned() + &labels, 1_775_001_600.0);
    wait_for_samples(&mut plugin, &[ends, ("trousseau_concerns".into(), 1.0)]);
    assert_eq!(plugin.log().matches(WORDS).count(), 1, "once a day");

    // No age is too great, and nothing is told of a young one.
    let eternal = host.configuration().replace("[keyring]", "[keyring]\nmax-age = \"0d\"");
    host.write_secret("trousseau.toml", &eternal);
    let file = host.path("trousseau.toml");
    let listed = host.command(&["key", "list", "--config", file.to_str().unwrap()]).output().unwrap();
    assert!(!stdout(&listed).contains("max-age"), "{listed:?}");
    host.generate("0s");
    assert_eq!(host.list()["warnings"], serde_json::json!([]));
    plugin.wait_until("the successor is active", |plugin| plugin.log().matches("KEK is active").count() == 2);
}
