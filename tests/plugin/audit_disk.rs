//! The audit log on a disk that gets full and has room again.

use std::fs;
use std::path::Path;

use serde_json::Value;
use tonic::Code;

use crate::disk::{inside, lacks_mounts, remount, serve_over};
use crate::observe::{OBSERVED, address, ask_at, sample, wait_for_samples};
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

/// How many events the gaps' lines account for.
fn accounted_for(lines: &[Value]) -> u64 {
    let gaps = lines.iter().filter(|line| line["event"] == "gap");
    let counts = gaps.map(|gap| gap["detail"].as_str().unwrap().strip_suffix(" events could not be written").unwrap());
    counts.map(|count| count.parse::<u64>().unwrap()).sum()
}

/// Whether Status, and who may be asked in its place, say that requests are answered, or that they are not.
fn tells(plugin: &Plugin, address: &str, is_answered: bool) -> bool {
    let [readiness, metrics] = ["GET /readyz", "GET /metrics"].map(|request| ask_at(address, request));
    let ready = sample(&metrics, "trousseau_ready");
    let has_why = |text: &str| text.contains("the audit log cannot be written");
    match plugin.status() {
        Ok(_) => is_answered && ready == Some(1.0) && readiness.contains("200 OK"),
        Err(said) => {
            assert!(said.code == Code::Unavailable && has_why(&said.message), "{said:?}");
            !is_answered && ready == Some(0.0) && readiness.contains("503") && has_why(&readiness)
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
        assert!(fs::read(&log).unwrap().starts_with(&before), "{policy}: what was written has changed");
        // Where a request's line does not fit, the shorter one of a gap may. It then looks well until the next request.
        let more = lines(&log).split_off(whole);
        assert!(more.iter().all(|line| line["event"] == "gap"), "{policy}: a full disk takes more than gaps: {more:?}");
        let address = address(&mut plugin);
        plugin.wait_until("it is told whether requests are answered", |plugin| {
            assert_eq!(plugin.encrypt(b"seed").is_ok(), is_answered, "{policy}");
            tells(plugin, &address, is_answered)
        });

        remount(&plugin, &directory, LARGE);
        // The API server may ask for nothing but this until it is well.
        plugin.wait_until("it is well by itself", |plugin| tells(plugin, &address, true));
        let (_, newest) = plugin.encrypt(b"seed").unwrap();
        plugin.wait_until("all is accounted for", |_| {
            let lost = sample(&ask_at(&address, "GET /metrics"), "trousseau_audit_lost_total").unwrap();
            let more = lines(&log).split_off(whole);
            accounted_for(&more) as f64 == lost && more.last().is_some_and(|line| line["key-id"] == newest)
        });
        let last = lines(&log).last().unwrap()["seq"].clone();
        plugin.wait_until("the journal has the new head", |plugin| told(plugin).as_ref() == Some(&last));
        fs::copy(&log, host.path("copy.log")).unwrap();
        assert_eq!(plugin.stop().code(), Some(0));
        let copy = host.path("copy.log").display().to_string();
        let done = host.command(&["audit", "verify", &copy]).output().unwrap();
        assert!(done.status.success(), "{policy}: {done:?}");
    }
}
