//! The audit log, by the daemon and the verbs that write it, and by the one that reads it.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::process::{Command, Output, Stdio};

use rustix::fs::{FlockOperation, flock};
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

/// What the journal was told first and last.
fn heads(host: &Host) -> [String; 2] {
    let log = fs::read_to_string(host.path("log")).unwrap();
    let told = log.lines().filter(|line| line.contains("head of the audit log"));
    let hashes: Vec<Value> = told.map(|line| serde_json::from_str::<Value>(line).unwrap()["hash"].clone()).collect();
    [hashes.first(), hashes.last()].map(|hash| hash.unwrap().as_str().unwrap().to_owned())
}

/// The exit code of `audit verify`, and what it says.
fn verify(host: &Host, more: &[&str]) -> (Option<i32>, String) {
    let log = host.path("audit.log");
    let done = host.command(&["audit", "verify", log.to_str().unwrap()]).args(more).output().unwrap();
    (done.status.code(), String::from_utf8(done.stdout).unwrap())
}

/// A verb that must end by itself: what planted files make of it is no matter of patience.
fn ends(host: &Host, arguments: &[&str]) -> Output {
    let mut command = host.token.command("timeout");
    command.arg("30").arg(env!("CARGO_BIN_EXE_trousseau")).args(arguments);
    let done = command.env_remove("STATE_DIRECTORY").output().unwrap();
    assert_ne!(done.status.code(), Some(124), "{arguments:?} does not end: {done:?}");
    done
}

fn said(done: &Output) -> String {
    String::from_utf8_lossy(&[&done.stdout[..], &done.stderr].concat()).into_owned()
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
    let [_, head] = heads(&host);
    let head = head.as_str();
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
fn a_head_is_one_of_the_chains_or_no_hash_at_all() {
    let host = host("");
    end(host.serve());
    let [first, last] = heads(&host);
    assert_eq!(first, "0".repeat(64), "before the first line");
    let strange = "ab".repeat(32);
    for (head, code) in [
        (first.as_str(), 0),
        (&last, 0),
        (&last.to_uppercase(), 0),
        (&strange, 1),
        (&last[..8], 2),
        (&format!("{}…", &last[..8]), 2),
        (&last.replace(|_: char| true, "z"), 2),
        ("", 2),
    ] {
        let (exited, said) = verify(&host, &["--head", head]);
        assert_eq!(exited, Some(code), "{head}: {said}");
    }
    // All that the journal was told, at once.
    for (more, heads, code, says) in [
        (&["--head", &first, "--head", &last][..], String::new(), 0, "is whole"),
        (&["--head", &strange, "--head", &last], String::new(), 1, &*format!("has the hash of --head {strange}")),
        (&["--head", "-"], format!("{first}\n{last}\n"), 0, "is whole"),
        (&["--head", "-"], format!("{strange}\n{last}\n"), 1, &format!("has the hash of --head {strange}")),
        (&["--head", "-"], format!("{first}\n{}\n", &last[..8]), 2, "line 2 of standard input"),
        (&["--head", "-"], String::new(), 2, "no hash in standard input"),
    ] {
        let log = host.path("audit.log");
        let mut command = host.command(&["audit", "verify", log.to_str().unwrap()]);
        command.args(more).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        child.stdin.take().unwrap().write_all(heads.as_bytes()).unwrap();
        let done = child.wait_with_output().unwrap();
        assert!(done.status.code() == Some(code) && said(&done).contains(says), "{more:?} {heads}: {done:?}");
    }
    // Its oldest lines are somewhere else: then nothing says what was before them.
    let text = fs::read_to_string(host.path("audit.log")).unwrap();
    fs::write(host.path("audit.log"), text.split_once('\n').unwrap().1).unwrap();
    let (code, said) = verify(&host, &[]);
    assert!(code == Some(0) && said.contains("(2 to 2; older ones are not here)"), "{said}");
    assert_eq!(verify(&host, &["--head", &first]).0, Some(1));

    fs::write(host.path("audit.log"), "").unwrap();
    let (code, said) = verify(&host, &[]);
    assert!(code == Some(1) && said.contains("there is no line") && said.contains("NOT WHOLE"), "{said}");
    fs::remove_file(host.path("audit.log")).unwrap();
    assert_eq!(verify(&host, &[]).0, Some(78));
}

#[test]
fn what_is_done_to_the_log_under_a_daemon_is_told_and_the_chain_goes_on_from_its_own_head() {
    type Change = fn(&str) -> String;
    let cases: [(&str, Change, &str); 4] = [
        ("cut off", |whole| whole.split_inclusive('\n').take(2).collect(), "lines before it are missing"),
        ("emptied", |_| String::new(), "line 1: the plugin found its log cut off or written anew"),
        ("longer", |whole| whole.replace("\"received\":4", "\"received\":44"), "changed"),
        ("of the same length", |whole| whole.replace("\"received\":4", "\"received\":5"), "changed"),
    ];
    for (case, change, found) in cases {
        let host = host("");
        host.generate("0s");
        let mut plugin = host.serve_healthy();
        plugin.wait_until("it is told", |_| lines(&host).iter().any(|line| line["event"] == "active"));
        for count in 1..4 {
            plugin.encrypt(b"seed").unwrap();
            let encrypts = || lines(&host).iter().filter(|line| line["event"] == "encrypt").count();
            plugin.wait_until("it is written", |_| encrypts() == count);
        }
        let whole = fs::read_to_string(host.path("audit.log")).unwrap();
        fs::write(host.path("audit.log"), change(&whole)).unwrap();
        plugin.decrypt(b"no envelope", "x").unwrap_err();
        plugin.wait_until("the log goes on", |_| lines(&host).iter().any(|line| line["event"] == "decrypt"));
        let log = plugin.log();
        end(plugin);
        let (code, text) = verify(&host, &[]);
        assert!(code == Some(1) && text.contains(found), "{case}: {text}");
        if case == "of the same length" {
            continue; // nothing is compared as long as nobody seems to have written: the chain shows it
        }
        let told = log.lines().find(|line| line.contains("head of the audit log is no longer in it")).unwrap();
        let told: Value = serde_json::from_str(told).unwrap();
        let rewritten = lines(&host).into_iter().find(|line| line["event"] == "rewritten").unwrap();
        let head = told["hash"].as_str().unwrap();
        assert!(rewritten["detail"].as_str().unwrap().contains(head), "{case}: {rewritten}");
        assert_eq!(rewritten["prev"], head, "{case}");
        let (_, text) = verify(&host, &["--head", head]);
        assert!(text.contains("no line has the hash of --head"), "{case}: {text}");
    }
}

#[test]
fn what_the_directorys_owner_plants_or_locks_holds_nobody_up() {
    let fifo = |host: &Host, name: &str| {
        assert!(Command::new("mkfifo").arg(host.path(name)).status().unwrap().success());
    };
    type Plant<'a> = &'a dyn Fn(&Host) -> Option<File>;
    let part = "audit.log.000000000001";
    let locked = |name: &'static str| {
        move |host: &Host| {
            let file = File::options().append(true).create(true).open(host.path(name)).unwrap();
            flock(&file, FlockOperation::LockExclusive).unwrap();
            Some(file)
        }
    };
    let cases: &[(&str, Plant<'_>, &str)] = &[
        (
            "a FIFO among the parts",
            &|host| {
                fifo(host, part);
                None
            },
            "audit.log.000000000001: it is not a plain file",
        ),
        (
            "a FIFO as the log",
            &|host| {
                fifo(host, "audit.log");
                None
            },
            "audit.log: it is not a plain file",
        ),
        ("a lock", &locked("audit.log"), "audit.log: another process has held its lock for"),
        (
            "no end",
            &|host| {
                symlink("/dev/zero", host.path(part)).unwrap();
                None
            },
            "it is not a plain file",
        ),
    ];
    for (case, plant, words) in cases {
        let host = host("");
        let _held = plant(&host);
        let config = host.write_configuration().display().to_string();
        let generate = ["key", "generate", "--output", "json", "--unsynchronized-clock-ok", "--config", &config];
        let done = ends(&host, &generate);
        assert_eq!(done.status.code(), Some(1), "{case}: {done:?}");
        let made: Value =
            serde_json::from_slice(&done.stdout).unwrap_or_else(|error| panic!("{case}, {error}: {done:?}"));
        assert_eq!(host.list()["keks"][0]["identity"], made["identity"], "{case}");
        assert!(said(&done).contains(words), "{case}: {done:?}");
        let log = host.path("audit.log");
        if !log.exists() {
            File::create(&log).unwrap();
        }
        let done = ends(&host, &["audit", "verify", log.to_str().unwrap()]);
        assert!(done.status.code() == Some(1) && said(&done).contains(words), "{case}: {done:?}");
    }
    // Nor does a file without a line end fill the memory.
    let host = host("");
    File::create(host.path("audit.log")).unwrap().set_len(1 << 40).unwrap();
    let done = ends(&host, &["audit", "verify", host.path("audit.log").to_str().unwrap()]);
    assert!(done.status.code() == Some(1) && said(&done).contains("it is no line of an audit log"), "{done:?}");
    // Nor does a lock in the state directory, which is the plugin's user's as well.
    fs::create_dir_all(host.path("state")).unwrap();
    let _held = locked("state/lock")(&host);
    fs::remove_file(host.path("audit.log")).unwrap();
    let config = host.write_configuration().display().to_string();
    ends(&host, &["key", "list", "--config", &config]);
}

#[test]
fn a_kek_that_the_log_has_no_line_of_is_told_of_and_none_is_made_where_that_is_refused() {
    for (policy, made) in [("count", true), ("refuse", false)] {
        let mut host = Host::new();
        let log = host.path("nowhere/audit.log");
        host.extra = format!("[audit]\nfile = \"{}\"\non-failure = \"{policy}\"", log.display());
        let done = host.run(&["key", "generate", "--output", "json", "--unsynchronized-clock-ok"]);
        assert_eq!(done.status.code(), Some(1), "{policy}: {done:?}");
        let words = if made { "was made, but the audit log has no line of it: " } else { "no KEK is made: audit log " };
        for words in [words, &log.display().to_string(), "hint: make its directory"] {
            assert!(said(&done).contains(words), "{policy}: {done:?}");
        }
        let keks = host.list()["keks"].as_array().unwrap().len();
        assert_eq!((keks, !done.stdout.is_empty()), (usize::from(made), made), "{policy}: {done:?}");
    }
}

#[test]
fn what_json_cannot_say_of_a_log_is_null() {
    let host = host("");
    File::create(host.path("audit.log")).unwrap();
    let (code, text) = verify(&host, &["--output", "json"]);
    let report: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(code, Some(1));
    for field in ["first-seq", "seq", "hash"] {
        assert_eq!(report.get(field), Some(&Value::Null), "{field}: {report}");
    }
}

#[test]
fn an_end_without_a_stop_is_told_and_is_no_flaw() {
    let host = host("");
    host.generate("0s");
    let mut plugin = host.serve_healthy();
    plugin.wait_until("it is written", |_| lines(&host).iter().any(|line| line["event"] == "active"));
    plugin.kill();
    end(host.serve_healthy());
    let (code, text) = verify(&host, &[]);
    assert!(code == Some(0) && text.contains("wrote no stop") && text.contains("the chain is whole"), "{text}");
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
