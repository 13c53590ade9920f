//! The audit log, by the daemon and the verbs that write it, and by the one that reads it.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use serde_json::Value;
use tonic::Code;

use crate::plugin::{Host, Plugin};

/// A host that keeps one, with more keys of `[audit]`.
fn host(more: &str) -> Host {
    let mut host = Host::new();
    host.extra = format!("[audit]\nfile = \"{}\"\n{more}", host.path("audit.log").display());
    host
}

fn lines(host: &Host) -> Vec<Value> {
    let text = fs::read_to_string(host.path("audit.log")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// The exit code of `audit verify`, and what it says.
fn verify(host: &Host, more: &[&str]) -> (Option<i32>, String) {
    let log = host.path("audit.log");
    let done = host.command(&["audit", "verify", log.to_str().unwrap()]).args(more).output().unwrap();
    (done.status.code(), String::from_utf8(done.stdout).unwrap())
}

fn end(plugin: Plugin) {
    assert!(plugin.stop().success());
}

#[test]
fn what_was_done_is_written_down_and_the_chain_holds_over_processes() {
    let host = host("");
    let made = host.generate("0s");
    let mut plugin = host.serve_healthy();
    let (sealed, key_id) = plugin.encrypt(b"seed").unwrap();
    plugin.decrypt(&sealed, &key_id).unwrap();
    assert_eq!(plugin.decrypt(b"no envelope", &key_id).unwrap_err().code, Code::InvalidArgument);
    plugin.wait_until("the active KEK is told", |_| lines(&host).iter().any(|line| line["event"] == "active"));
    end(plugin);
    end(host.serve_healthy());

    let lines = lines(&host);
    let said: Vec<_> = lines.iter().map(|line| (line["event"].as_str().unwrap(), line["outcome"].as_str())).collect();
    let requests: Vec<_> = said.iter().filter(|(_, outcome)| outcome.is_some()).collect();
    let expected = [("encrypt", Some("OK")), ("decrypt", Some("OK")), ("decrypt", Some("INVALID_ARGUMENT"))];
    assert_eq!(requests, expected.iter().collect::<Vec<_>>());
    for event in ["key-generated", "start", "active", "stop"] {
        assert!(said.iter().any(|(what, _)| *what == event), "{event} in {said:?}");
    }
    let encrypted = lines.iter().find(|line| line["event"] == "encrypt").unwrap();
    assert_eq!((&encrypted["keks"][0], &encrypted["key-id"]), (&made["identity"], &Value::from(key_id)));
    assert_eq!(encrypted["peer-pid"], std::process::id());
    assert_eq!(fs::metadata(host.path("audit.log")).unwrap().permissions().mode() & 0o777, 0o600);

    let (code, text) = verify(&host, &[]);
    assert_eq!(code, Some(0), "{text}");
    let head = lines.last().unwrap()["seq"].as_u64().unwrap();
    assert!(text.contains(&format!("{} lines", lines.len())) && text.contains(&format!("head  {head} ")), "{text}");
}

#[test]
fn what_was_done_to_the_log_is_found_and_said_where() {
    let host = host("");
    host.generate("0s");
    let plugin = host.serve_healthy();
    for _ in 0..4 {
        plugin.encrypt(b"seed").unwrap();
    }
    end(plugin);
    let whole = fs::read_to_string(host.path("audit.log")).unwrap();
    let lines: Vec<&str> = whole.lines().collect();
    let of_journal = fs::read_to_string(host.path("log")).unwrap();
    let told: Value = of_journal
        .lines()
        .filter(|line| line.contains("head of the audit log"))
        .map(|line| serde_json::from_str(line).unwrap())
        .next_back()
        .unwrap();
    let head = told["hash"].as_str().unwrap();
    assert_eq!(verify(&host, &["--head", head]).0, Some(0), "the journal knows the last line");

    let without = |gone: usize| {
        let kept = lines.iter().enumerate().filter(|(n, _)| *n != gone).map(|(_, line)| *line);
        kept.collect::<Vec<_>>().join("\n") + "\n"
    };
    let cut = lines[..lines.len() - 1].join("\n") + "\n";
    let cases = [
        ("changed", whole.replacen("\"received\":4", "\"received\":5", 1), None, "changed"),
        ("dropped", without(2), None, "line 3: 1 lines before it are missing"),
        ("no JSON", whole.replacen('{', "", 1), None, "line 1: it is no line of an audit log"),
        ("cut, and nobody asks", cut.clone(), None, "the chain is whole"),
        ("cut", cut, Some(head), "no line has the hash of --head"),
    ];
    for (case, text, head, says) in cases {
        fs::write(host.path("audit.log"), text).unwrap();
        let more: Vec<&str> = head.iter().flat_map(|head| ["--head", head]).collect();
        let (code, said) = verify(&host, &more);
        assert!(said.contains(says), "{case}: {said}");
        assert_eq!(code == Some(0), says == "the chain is whole", "{case}");
    }
}

#[test]
fn a_log_that_was_put_aside_or_moved_away_goes_on() {
    let host = host("");
    host.generate("0s");
    let mut plugin = host.serve_healthy();
    plugin.encrypt(b"seed").unwrap();
    plugin.wait_until("it is written", |_| lines(&host).iter().any(|line| line["event"] == "encrypt"));
    fs::rename(host.path("audit.log"), host.path("audit.log.000000000009")).unwrap();
    plugin.encrypt(b"seed").unwrap();
    end(plugin);
    let (code, text) = verify(&host, &[]);
    assert_eq!(code, Some(0), "{text}");
    assert!(text.contains("in 2 files"), "{text}");
}

#[test]
fn a_disk_that_takes_nothing_is_treated_as_the_policy_says() {
    for (policy, answered) in [("count", true), ("refuse", false)] {
        let host = host(&format!("on-failure = \"{policy}\"\n"));
        host.generate("0s");
        let mut plugin = host.serve_healthy();
        plugin.encrypt(b"seed").unwrap();
        plugin.wait_until("it is written", |_| lines(&host).iter().any(|line| line["event"] == "encrypt"));
        let (log, aside) = (host.path("audit.log"), host.path("aside"));
        fs::rename(&log, &aside).unwrap();
        fs::create_dir(&log).unwrap(); // what cannot be opened for writing, by root either
        let answer = plugin.encrypt(b"seed");
        match &answer {
            Ok(_) => assert!(answered, "{policy}"),
            Err(error) => {
                assert!(!answered, "{policy}: {error:?}");
                assert_eq!(error.code, Code::Unavailable);
                assert!(error.message.contains("the audit log cannot be written"), "{}", error.message);
            }
        }
        plugin.wait_until("it is told", |plugin| plugin.log().contains("the audit log cannot be written"));
        fs::remove_dir(&log).unwrap();
        fs::rename(&aside, &log).unwrap();
        plugin.encrypt(b"seed").unwrap();
        end(plugin);
        let gap = lines(&host).into_iter().find(|line| line["event"] == "gap").unwrap();
        assert_eq!(gap["detail"], "1 events could not be written", "{policy}");
        assert_eq!(verify(&host, &[]).0, Some(0), "{policy}");
    }
}
