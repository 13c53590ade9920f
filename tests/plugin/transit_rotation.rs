//! New versions of a Transit key: each becomes active at its instant, on every host, and nothing fails meanwhile.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::Value;
use trousseau::envelope::Envelope;

use crate::bao::Bao;
use crate::caller::{Caller, Ends};
use crate::plugin::Plugin;
use crate::transit::{KEY, Site, assert_all_succeeded, quoted, under_load};

/// The key_ids that Status announces until this is ended, each with the time when it was first seen.
fn watch(plugin: &Plugin, ends: &AtomicBool) -> Vec<(Duration, String)> {
    let mut caller = Caller::new(&plugin.socket);
    let mut seen: Vec<(Duration, String)> = Vec::new();
    while !ends.load(Ordering::Relaxed) {
        let key_id = caller.status().unwrap().key_id;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        if seen.last().is_none_or(|(_, last)| *last != key_id) {
            seen.push((now, key_id));
        }
        thread::sleep(Duration::from_millis(10));
    }
    seen
}

/// When the version was made.
fn creation(bao: &Bao, version: u64) -> Duration {
    let key = bao.root.wants("GET", &format!("transit/keys/{KEY}"), Value::Null);
    Duration::from_secs(key["data"]["keys"][version.to_string()].as_u64().unwrap())
}

#[test]
fn all_hosts_switch_once_at_the_instant() {
    const DELAY: Duration = Duration::from_secs(3);
    let Some(mut site) = Site::new() else { return };
    site.set("activation-delay", quoted("3s"));
    let plugin = site.host.serve_healthy();
    let other_host = site.another_host();
    let other = other_host.serve_healthy();
    let (old, old_key_id) = plugin.round_trip();
    let ends = AtomicBool::new(false);
    let (requests, (created, watched)) = under_load(&plugin, |_| {
        thread::scope(|scope| {
            let guard = Ends(&ends);
            let watching = [&plugin, &other].map(|plugin| scope.spawn(|| watch(plugin, &ends)));
            let version = site.bao.rotate(KEY);
            thread::sleep(DELAY + Duration::from_millis(1500));
            drop(guard);
            (creation(&site.bao, version), watching.map(|watching| watching.join().unwrap()))
        })
    });
    assert_all_succeeded(&requests, "the key was rotated");
    let (new, new_key_id) = plugin.round_trip();
    for seen in watched {
        let key_ids: Vec<&String> = seen.iter().map(|(_, key_id)| key_id).collect();
        assert_eq!(key_ids, [&old_key_id, &new_key_id]);
        let late = seen[1].0.checked_sub(created + DELAY).expect("it did not wait for the instant");
        assert!(late < Duration::from_millis(500), "{late:?} late");
    }
    for (ciphertext, key_id) in [(&old, &old_key_id), (&new, &new_key_id)] {
        other.decrypt(ciphertext, key_id).unwrap();
    }
    let recipients = [&old, &new].map(|sealed| Envelope::parse(sealed).unwrap().recipients[0].identity);
    assert_ne!(recipients[0], recipients[1]);
}

/// Whoever is told that a KEK gets old is told what makes one there.
#[test]
fn the_end_of_a_period_comes_with_the_command_that_rotates_the_key() {
    let Some(site) = Site::new() else { return };
    let aged = site.host.configuration().replace("[keyring]", "[keyring]\nmax-age = \"1s\"");
    site.host.write_secret("trousseau.toml", &aged);
    thread::sleep(Duration::from_secs(1));
    let file = site.host.path("trousseau.toml");
    let listed = site.host.command(&["key", "list", "--config", file.to_str().unwrap()]).output().unwrap();
    let said = String::from_utf8_lossy(&listed.stdout).into_owned();
    assert!(said.contains("(keyring.max-age): make a new one with `vault write -f transit/keys/kek/rotate`"), "{said}");
}

/// It has no token that could be measured beside it.
#[test]
fn bench_measures_a_plugin_whose_keks_are_in_vault() {
    let Some(site) = Site::new() else { return };
    let _plugin = site.host.serve_healthy();
    let bench = ["bench", "--time", "50ms", "--in-flight", "1"];
    let done = site.host.run(&bench);
    let said = String::from_utf8_lossy(&done.stdout).into_owned();
    assert!(done.status.success() && said.contains("Encrypt"), "{done:?}");
    assert!(said.contains("the token alone was not measured: no provider that seals has a token"), "{said}");
    let done = site.host.run(&[&bench[..], &["--output", "json"]].concat());
    let report: Value = serde_json::from_slice(&done.stdout).unwrap();
    let counts = ["requests", "token", "verdicts"].map(|of| report[of].as_array().unwrap().len());
    assert_eq!((counts, &report["sessions"]), ([2, 0, 0], &Value::Null), "{report:#}");
}

/// What one host's plugin made active, another's learns by the first envelope that names it.
#[test]
fn a_version_that_is_not_known_yet_is_looked_for() {
    let Some(site) = Site::new() else { return };
    let plugin = site.host.serve_healthy();
    plugin.round_trip();
    site.bao.rotate(KEY);
    let other_host = site.another_host();
    let (sealed, key_id) = other_host.serve_healthy().round_trip();
    plugin.decrypt(&sealed, &key_id).unwrap();
    assert_eq!(plugin.status().unwrap().key_id, key_id);
}

#[test]
fn a_standby_that_lags_fails_no_request_and_takes_nobody_back() {
    let Some(bao) = Bao::start_two() else { return };
    let mut site = Site::on(bao);
    let standby = quoted(&site.bao.nodes[1].address);
    site.set("address", standby);
    site.set("activation-delay", quoted("1s"));
    let plugin = site.host.serve_healthy();
    let ends = AtomicBool::new(false);
    let (requests, watched) = under_load(&plugin, |_| {
        thread::scope(|scope| {
            let guard = Ends(&ends);
            let watching = scope.spawn(|| watch(&plugin, &ends));
            for _ in 0..3 {
                site.bao.rotate(KEY);
                thread::sleep(Duration::from_millis(2500));
            }
            drop(guard);
            watching.join().unwrap()
        })
    });
    assert_all_succeeded(&requests, "the key was rotated on the active node");
    assert_eq!(watched.len(), 4, "each version once, in order: {watched:?}");
}
