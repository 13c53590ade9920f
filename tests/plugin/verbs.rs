//! Verbs that speak to a plugin, and what all verbs print for programs.

use crate::family::Family;
use crate::plugin::Host;
use crate::transit::{host_without_token, out_of_reach};

#[test]
fn bench_measures_a_plugin_and_its_token_and_says_what_sessions_should_be() {
    if Family::chosen().is_slower_than(200) {
        return;
    }
    let host = Host::new();
    host.generate("0s");
    let plugin = host.serve_healthy();
    let (socket, file) = (host.path("kms.sock"), host.write_configuration());
    let (socket, file) = (["--socket", socket.to_str().unwrap()], ["--config", file.to_str().unwrap()]);
    let bench = |more: &[&[&str]]| -> serde_json::Value {
        let short = ["bench", "--time", "50ms", "--max-sessions", "4", "--output", "json"];
        let done = host.command(&[&short[..], &more.concat()].concat()).output().unwrap();
        assert!(done.status.success(), "{more:?}: {}", String::from_utf8_lossy(&done.stderr));
        assert!(done.stderr.is_empty(), "progress is for terminals: {done:?}");
        serde_json::from_slice(&done.stdout).unwrap()
    };
    let lines = |of: &serde_json::Value| of.as_array().unwrap().len();

    let both = bench(&[&socket, &file, &["--in-flight", "1,8"]]);
    assert_eq!((lines(&both["requests"]), lines(&both["verdicts"]), both["sessions"].as_u64()), (4, 2, Some(2)));
    let first = &both["requests"][0];
    let buckets = first["histogram"].as_array().unwrap();
    let sum: u64 = buckets.iter().map(|bucket| bucket["operations"].as_u64().unwrap()).sum();
    assert_eq!((Some(sum), first["failed"].as_u64()), (first["operations"].as_u64(), Some(0)));
    let advised = &both["sessions-advised"];
    // Not while throughput seems to rise still.
    assert!((advised.is_u64() || advised.is_null()) && both["resident-kib"].is_u64(), "{both:#}");
    let mut measured: Vec<_> = both["token"].as_array().unwrap().iter().map(|of| of["sessions"].as_u64()).collect();
    measured.dedup();
    assert!(measured.starts_with(&[Some(1), Some(2)]), "as many as are configured are always measured: {measured:?}");

    let rate = bench(&[&socket, &file, &["--rate", "200", "--call", "decrypt"]]);
    let (request, verdict) = (&rate["requests"][0], &rate["verdicts"][0]);
    assert_eq!((request["rate"].as_u64(), verdict["limit"].as_str()), (Some(200), Some("load")), "{rate:#}");

    drop(plugin);
    let alone = bench(&[&file, &["--token", "--call", "encrypt"]]);
    assert_eq!((lines(&alone["requests"]), lines(&alone["verdicts"])), (0, 1), "{alone:#}");
}

#[test]
fn verbs_of_tokens_say_what_to_do_where_vault_has_the_key() {
    let mut host = host_without_token();
    let rotate = "vault write -namespace=team -f kms/keys/kek/rotate";
    host.provider = Some(out_of_reach("namespace = \"team\"\nmount = \"kms\""));
    for (arguments, code, what, hint) in [
        (&["key", "generate"][..], 1, "has its keys made by Vault or OpenBao", rotate),
        (&["pin", "retry"], 2, "provider vault has no PIN", "`trousseau doctor` says how its login fares"),
        (&["bench", "--token"], 2, "no provider that seals has a token", "without --token"),
    ] {
        let done = host.run(arguments);
        let said = String::from_utf8_lossy(&done.stderr).into_owned();
        assert_eq!(done.status.code(), Some(code), "{arguments:?}: {said}");
        assert!(said.contains(what) && said.contains(hint), "{arguments:?}: {said}");
        assert_eq!(said.contains(rotate), hint == rotate, "{arguments:?}: {said}");
    }
}

#[test]
fn a_plugin_that_is_not_there_is_out_of_reach() {
    let host = Host::new();
    let absent = host.path("absent.sock");
    for verb in ["status", "probe", "bench"] {
        let done = host.command(&[verb, "--socket", absent.to_str().unwrap()]).output().unwrap();
        assert_eq!(done.status.code(), Some(69), "{verb}");
        assert!(String::from_utf8_lossy(&done.stderr).contains("is the plugin running?"), "{done:?}");
    }
}

#[test]
fn who_speaks_to_a_plugin_finds_its_socket_in_the_configuration() {
    let host = Host::new();
    host.generate("0s");
    let _plugin = host.serve_healthy();
    for arguments in
        [&["status"][..], &["probe"], &["bench", "--time", "20ms", "--in-flight", "1", "--max-sessions", "1"]]
    {
        let done = host.run(arguments);
        assert!(done.status.success(), "{arguments:?}: {done:?}");
    }
}

#[test]
fn a_plugin_that_does_not_answer_is_out_of_reach() {
    let host = Host::new();
    let _nobody_accepts = std::os::unix::net::UnixListener::bind(host.path("kms.sock")).unwrap();
    let done = host.run(&["probe", "--timeout", "50ms"]);
    assert_eq!(done.status.code(), Some(69), "{done:?}");
    for words in ["Status: no answer in 0.05 s", "hint: "] {
        assert!(String::from_utf8_lossy(&done.stderr).contains(words), "{words}: {done:?}");
    }
}

/// Every key of a JSON value, but those of the tokens' attributes.
fn keys_of(value: &serde_json::Value, keys: &mut Vec<String>) {
    use serde_json::Value;
    match value {
        Value::Object(fields) => fields.iter().for_each(|(key, value)| {
            keys.push(key.clone());
            if key != "attributes" {
                keys_of(value, keys);
            }
        }),
        Value::Array(elements) => elements.iter().for_each(|element| keys_of(element, keys)),
        _ => (),
    }
}

#[test]
fn every_field_of_json_is_written_down() {
    let page = include_str!("../../packaging/json.md");
    let mut host = Host::new();
    let log = host.path("audit.log").display().to_string();
    host.extra = format!("[audit]\nfile = \"{log}\"");
    let id = host.generate("0s")["id"].as_str().unwrap().to_owned();
    let mut plugin = host.serve_healthy();
    plugin.wait_until("it is logged", |_| std::fs::read_to_string(&log).unwrap().contains("\"active\""));
    plugin.kill();
    let _plugin = host.serve_healthy(); // after an unclean end
    for arguments in [
        &["check"][..],
        &["doctor"],
        &["key", "list"],
        &["key", "list", "--expect", &id],
        &["key", "generate", "--dry-run", "--unsynchronized-clock-ok"],
        &["key", "generate", "--unsynchronized-clock-ok"],
        &["key", "attest"],
        &["status"],
        &["probe"],
        &["bench", "--time", "20ms", "--in-flight", "1", "--max-sessions", "2"],
        &["audit", "verify", &log],
    ] {
        let arguments = [arguments, &["--output", "json"]].concat();
        // All but the audit log's verb have a configuration.
        let done = match arguments[0] {
            "audit" => host.command(&arguments).output().unwrap(),
            _ => host.run(&arguments),
        };
        let printed: serde_json::Value =
            serde_json::from_slice(&done.stdout).unwrap_or_else(|error| panic!("{arguments:?}, {error}: {done:?}"));
        let mut keys = Vec::new();
        keys_of(&printed, &mut keys);
        assert!(!keys.is_empty(), "{arguments:?}");
        for key in keys {
            assert!(page.contains(&format!("`{key}`")), "packaging/json.md lacks {key} of {arguments:?}");
        }
    }
}
