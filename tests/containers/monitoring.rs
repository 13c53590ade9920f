//! The alert rules and the dashboard, as Prometheus' own checker judges them, and by the metrics that there are.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

fn place() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("packaging/monitoring")
}

/// Whether promtool is there; it says so if not.
fn has_promtool() -> bool {
    let has = Command::new("promtool").arg("--version").output().is_ok();
    if !has {
        assert!(std::env::var_os("TROUSSEAU_TEST_REQUIRE").is_none(), "install promtool");
        eprintln!("skipped: promtool is lacking, which is in Debian's package prometheus");
    }
    has
}

fn promtool(arguments: &[&str], file: &Path) {
    let done = Command::new("promtool").args(arguments).arg(file).output().unwrap();
    let said = [done.stdout, done.stderr].concat();
    assert!(done.status.success(), "promtool {arguments:?}: {}", String::from_utf8_lossy(&said));
}

/// Every name of a metric of ours in this text, without what its samples add to it.
fn metrics_in(text: &str) -> BTreeSet<String> {
    let is_part = |c: char| c.is_ascii_lowercase() || c == '_';
    let names = text.split(|c| !is_part(c)).filter(|word| word.starts_with("trousseau_"));
    let family = |name: &str| {
        let of = |suffix: &&str| name.strip_suffix(suffix);
        ["_total", "_bucket"].iter().find_map(of).unwrap_or(name).to_owned()
    };
    names.map(family).collect()
}

/// The dashboard's queries.
fn queries() -> Vec<String> {
    let text = fs::read_to_string(place().join("dashboard.json")).unwrap();
    let dashboard: serde_json::Value = serde_json::from_str(&text).unwrap();
    let targets = dashboard["panels"].as_array().unwrap().iter().flat_map(|panel| panel["targets"].as_array().unwrap());
    targets.map(|target| target["expr"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn each_alert_fires_on_what_it_is_for_and_on_nothing_else() {
    if has_promtool() {
        promtool(&["check", "rules", "--lint-fatal"], &place().join("alerts.yml"));
        promtool(&["test", "rules"], &place().join("alerts-test.yml"));
    }
}

#[test]
fn prometheus_understands_the_dashboard() {
    if !has_promtool() {
        return;
    }
    let directory = TempDir::new().unwrap();
    let rules: Vec<serde_json::Value> = queries()
        .iter()
        .enumerate()
        .map(|(n, query)| serde_json::json!({"record": format!("panel:{n}"), "expr": query.replace("$job", "trousseau")}))
        .collect();
    let file = directory.path().join("queries.yml");
    // JSON is YAML.
    fs::write(&file, serde_json::json!({"groups": [{"name": "panels", "rules": rules}]}).to_string()).unwrap();
    promtool(&["check", "rules", "--lint-fatal"], &file);
}

#[test]
fn every_metric_is_shown_and_none_is_named_that_there_is_not() {
    let served = metrics_in(include_str!("../../src/observe/metrics.rs"));
    assert!(served.contains("trousseau_ready"), "{served:?}");
    assert_eq!(metrics_in(&queries().join("\n")), served);
    let alerts = metrics_in(&fs::read_to_string(place().join("alerts.yml")).unwrap());
    assert!(alerts.is_subset(&served), "{alerts:?}");
}
