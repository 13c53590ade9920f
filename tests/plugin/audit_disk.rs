//! The audit log on a disk that gets full and has room again.

use std::fs;
use std::path::Path;

use serde_json::Value;
use tonic::Code;

use crate::disk::{inside, lacks_mounts, remount, serve_over};
use crate::observe::{OBSERVED, ask, wait_for_samples};
use crate::plugin::{Host, Plugin};

/// Some twenty lines.
const SMALL: &str = "size=8k";
const LARGE: &str = "size=1m";
/// Requests that come while the disk is full, after the one that found it so.
const MORE: usize = 3;

/// Those that are whole: one may be under way.
fn lines(log: &Path) -> Vec<Value> {
    let text = fs::read_to_string(log).unwrap();
    let whole = text.split_inclusive('\n').filter(|line| line.ends_with('\n'));
    whole.map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"))).collect()
}

/// The number of the last line that the journal was told of.
fn told(plugin: &Plugin) -> Option<Value> {
    let log = plugin.log();
    let line = log.lines().rfind(|line| line.contains("head of the audit log"))?;
    Some(serde_json::from_str::<Value>(line).unwrap()["seq"].clone())
}

/// Status, and who may be asked in its place, say whether requests are answered.
fn tells_whether_it_answers(plugin: &mut Plugin, is_answered: bool, policy: &str) {
    wait_for_samples(plugin, &[("trousseau_ready", f64::from(u8::from(is_answered)))]);
    let (status, readiness) = (plugin.status(), ask(plugin, "GET /readyz"));
    assert_eq!(readiness.contains("200 OK"), is_answered, "{policy}: {readiness}");
    match status {
        Ok(_) => assert!(is_answered, "{policy}: Status says that all is well"),
        Err(said) => {
            assert!(!is_answered && said.code == Code::Unavailable, "{policy}: {said:?}");
            for text in [said.message, readiness] {
                assert!(text.contains("the audit log cannot be written"), "{policy}: {text}");
            }
        }
    }
}

#[test]
fn a_full_disk_has_no_half_line_and_the_policy_says_what_becomes_of_requests() {
    if lacks_mounts() {
        return;
    }
    for (policy, is_answered) in [("count", true), ("refuse", false)] {
        let mut host = Host::new();
        let directory = host.path("audit");
        fs::create_dir(&directory).unwrap();
        let file = directory.join("audit.log");
        let audit = format!("file = \"{}\"\non-failure = \"{policy}\"", file.display());
        host.extra = format!("{OBSERVED}[audit]\n{audit}\nsync = \"0s\"\nhead-every = \"1s\"");
        host.generate("0s");
        let made = lines(&file);
        let who = format!("; by uid {}", rustix::process::getuid().as_raw());
        assert_eq!((made.len(), &made[0]["event"]), (1, &"key-generated".into()), "{made:?}");
        assert!(made[0]["detail"].as_str().unwrap().contains(&who), "{made:?}");

        host.write_configuration();
        let mut plugin = host.start(serve_over(&host, &directory, SMALL));
        let log = inside(&plugin, &file);
        plugin.wait_until("it is told", |_| lines(&log).iter().any(|line| line["event"] == "active"));
        plugin.wait_until("the journal has the head", |plugin| told(plugin).is_some_and(|seq| seq == 2));
        let encrypts = |_: &Plugin| lines(&log).iter().filter(|line| line["event"] == "encrypt").count();
        let is_full = |plugin: &Plugin| plugin.log().contains("the audit log cannot be written");
        let (sealed, key_id) = plugin.encrypt(b"seed").unwrap();
        let mut written = 1;
        let found = loop {
            plugin.wait_until("its line is written", |plugin| encrypts(plugin) == written || is_full(plugin));
            if is_full(&plugin) {
                break plugin.encrypt(b"seed").map(drop);
            }
            match plugin.encrypt(b"seed") {
                Ok(_) => written += 1,
                Err(error) => break Err(error),
            }
            assert!(written < 100, "{policy}: the disk does not get full");
        };
        assert_eq!(found.is_ok(), is_answered, "{policy}: {found:?}");
        let whole = lines(&log).len();
        let before = fs::read(&log).unwrap();
        assert!(before.ends_with(b"\n"), "{policy}: it ends within a line: {}", String::from_utf8_lossy(&before));
        for _ in 0..MORE {
            match plugin.decrypt(&sealed, &key_id) {
                Ok(_) => assert!(is_answered, "{policy}"),
                Err(error) => {
                    assert!(!is_answered, "{policy}: {error:?}");
                    assert_eq!(error.code, Code::Unavailable);
                    assert!(error.message.contains("the audit log cannot be written"), "{}", error.message);
                }
            }
        }
        let lost = MORE + if is_answered { 2 } else { 1 };
        wait_for_samples(&mut plugin, &[("trousseau_audit_lost_total", lost as f64)]);
        assert_eq!(fs::read(&log).unwrap(), before, "{policy}: a full disk takes nothing");
        tells_whether_it_answers(&mut plugin, is_answered, policy);

        remount(&plugin, &directory, LARGE);
        // The API server may ask for nothing but this until it is well.
        plugin.wait_until("it is well by itself", |plugin| plugin.status().is_ok());
        tells_whether_it_answers(&mut plugin, true, policy);
        plugin.encrypt(b"seed").unwrap();
        plugin.wait_until("it is written", |_| lines(&log).len() >= whole + 2);
        let gap = &lines(&log)[whole];
        let says = Value::from(format!("{lost} events could not be written"));
        assert_eq!((&gap["event"], &gap["detail"]), (&"gap".into(), &says), "{policy}");
        let last = lines(&log).last().unwrap()["seq"].clone();
        plugin.wait_until("the journal has the new head", |plugin| told(plugin).as_ref() == Some(&last));
        fs::copy(&log, host.path("copy.log")).unwrap();
        assert_eq!(plugin.stop().code(), Some(0));
        let copy = host.path("copy.log").display().to_string();
        let done = host.command(&["audit", "verify", &copy]).output().unwrap();
        assert!(done.status.success(), "{policy}: {done:?}");
    }
}
