//! A wrong PIN costs one try of the token's few, whatever is started how often.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};

use crate::family::Family;
use crate::plugin::{Host, Plugin};
use crate::token::PIN;

/// As long as the right one.
pub const WRONG: &str = "wrong-00";

/// After how many wrong PINs a token says what.
struct Tries {
    /// It sets COUNT_LOW.
    low: usize,
    /// It sets FINAL_TRY.
    last: usize,
    /// The number of the one to which it says that it is locked.
    locked: usize,
}

/// `None`: it never locks a PIN.
fn tries() -> Option<Tries> {
    match Family::chosen() {
        Family::SoftHsm => None,
        Family::Kryoptic => Some(Tries { low: 7, last: 9, locked: 10 }),
        Family::OpenCryptoki => Some(Tries { low: 1, last: 2, locked: 4 }),
        Family::Tpm2 => Some(Tries { low: usize::MAX, last: usize::MAX, locked: 4 }),
    }
}

pub fn host_with_wrong_pin() -> Host {
    let host = Host::new();
    host.write_secret("pin", WRONG);
    host
}

/// How many wrong PINs it takes until the token's count is low.
pub fn until_low() -> usize {
    tries().map_or(1, |tries| tries.low)
}

/// Uses the token up to tell how many wrong PINs it had counted, and compares.
pub fn assert_counted(host: &Host, expected: std::ops::RangeInclusive<usize>) {
    let Some(Tries { locked, .. }) = tries() else {
        eprintln!("not counted: it never locks a PIN");
        return;
    };
    let counted = locked - host.token.try_wrong_pins(locked);
    assert!(expected.contains(&counted), "{counted} wrong PINs were counted, not {expected:?}");
}

fn record_file(host: &Host) -> PathBuf {
    let files = fs::read_dir(host.path("state")).unwrap().map(|file| file.unwrap().path());
    let is_record =
        |path: &PathBuf| path.extension().is_some_and(|it| it == "json") && path.to_str().unwrap().contains("/pin-");
    let records: Vec<PathBuf> = files.filter(is_record).collect();
    assert_eq!(records.len(), 1, "{records:?}");
    records[0].clone()
}

pub fn record(host: &Host) -> Value {
    serde_json::from_slice(&fs::read(record_file(host)).unwrap()).unwrap()
}

fn serve_command(host: &Host) -> Command {
    let file = host.write_configuration();
    host.command(&["serve", "--config", file.to_str().unwrap()])
}

pub fn wait_until_status_says(plugin: &mut Plugin, words: &str) {
    plugin.wait_until(words, |plugin| plugin.status().is_err_and(|answer| answer.message.contains(words)));
}

pub fn assert_fails(done: &Output, code: i32, words: &[&str]) {
    let said = String::from_utf8_lossy(&done.stdout).into_owned() + &String::from_utf8_lossy(&done.stderr);
    assert_eq!(done.status.code(), Some(code), "{said}");
    for words in words {
        assert!(said.contains(words), "`{words}` is missing in: {said}");
    }
}

fn retry(host: &Host, words: &str) {
    let done = host.run(&["pin", "retry"]);
    assert_fails(&done, 0, &[words]);
}

#[test]
fn ten_starts_and_every_verb_cost_one_try() {
    if Family::chosen().stands_no_kills() {
        return;
    }
    let host = host_with_wrong_pin();
    let mut first = None;
    for n in 0..10 {
        let mut plugin = host.start(serve_command(&host));
        if n % 3 == 0 {
            wait_until_status_says(&mut plugin, "not tried again");
            plugin.stop();
        } else {
            plugin.kill();
        }
        let refused = record(&host)["refused"].clone();
        assert_eq!(refused.as_array().unwrap().len(), 1);
        assert_eq!(first.get_or_insert_with(|| refused.clone()), &refused, "start {n}");
    }
    for (verb, code) in [(&["key", "list"][..], 69), (&["key", "generate"], 69), (&["doctor"], 1)] {
        assert_fails(&host.run(verb), code, &["CKR_PIN_INCORRECT", "trousseau pin retry"]);
    }
    assert_counted(&host, 1..=1);
}

#[test]
fn a_pin_that_systemd_hands_over_anew_at_each_start_is_the_same_one() {
    let host = host_with_wrong_pin();
    let configuration = host.configuration().replace(host.path("pin").to_str().unwrap(), "credential:pin");
    for n in 0..4 {
        host.write_secret("trousseau.toml", &configuration);
        let credentials = format!("credentials-{n}");
        fs::create_dir(host.path(&credentials)).unwrap();
        host.write_secret(&format!("{credentials}/pin"), WRONG);
        let mut command = host.command(&["serve", "--config", host.path("trousseau.toml").to_str().unwrap()]);
        command.env("CREDENTIALS_DIRECTORY", host.path(&credentials));
        wait_until_status_says(&mut host.start(command), "not tried again");
    }
    assert_counted(&host, 1..=1);
}

#[test]
fn starts_that_are_killed_at_any_moment_cost_one_try_together() {
    if Family::chosen().stands_no_kills() {
        return;
    }
    let host = host_with_wrong_pin();
    for n in 0..10 {
        let mut child = serve_command(&host).stderr(Stdio::null()).spawn().unwrap();
        thread::sleep(Duration::from_millis(40 * n));
        child.kill().unwrap();
        child.wait().unwrap();
    }
    wait_until_status_says(&mut host.serve(), "trousseau pin retry");
    assert_counted(&host, 0..=1);
}

#[test]
fn a_crash_while_the_token_is_asked_counts_as_a_refusal() {
    let host = host_with_wrong_pin();
    wait_until_status_says(&mut host.serve(), "not tried again");
    let mut left_behind = record(&host);
    left_behind["refused"][0]["answer"] = Value::Null;
    fs::write(record_file(&host), left_behind.to_string()).unwrap();
    let mut plugin = host.serve();
    wait_until_status_says(&mut plugin, "ended before it knew whether it is the right one");
    wait_until_status_says(&mut plugin, "trousseau pin retry");
    assert_counted(&host, 1..=1);
}

#[test]
fn of_a_pin_that_has_worked_here_a_crash_is_forgiven_and_after_a_while_the_next() {
    if Family::chosen().shows_no_wrong_pins() {
        return;
    }
    let host = Host::new();
    host.generate("0s");
    let (long_ago, now) = ("2026-01-01T00:00:00Z".to_owned(), jiff::Timestamp::now().to_string());
    let crash = |hash: &Value, again: bool, at: &str| {
        let mut left_behind = record(&host);
        left_behind["refused"] = json!([{ "hash": hash, "at": at, "answer": null, "again": again }]);
        fs::write(record_file(&host), left_behind.to_string()).unwrap();
    };
    // A process that ended before it knew the hash may have tried any PIN.
    let (own, any) = (record(&host)["worked"].clone(), Value::Null);
    for (hash, again, at) in
        [(&own, true, &now), (&any, true, &now), (&own, false, &long_ago), (&any, false, &long_ago)]
    {
        crash(hash, again, at);
        host.serve_healthy().round_trip();
        assert_eq!(record(&host)["refused"], json!([]));
    }
    for (hash, again, pin) in [(&own, false, PIN), (&any, false, PIN), (&any, true, WRONG)] {
        crash(hash, again, &now);
        host.write_secret("pin", pin);
        wait_until_status_says(&mut host.serve(), "ended before it knew");
    }
    crash(&any, true, &long_ago);
    host.write_secret("pin", PIN);
    host.token.try_wrong_pins(until_low());
    wait_until_status_says(&mut host.serve(), "ended before it knew");
    assert_counted(&host, until_low()..=until_low());
}

#[test]
fn three_hosts_with_one_wrong_pin_do_not_lock_the_token() {
    let first = host_with_wrong_pin();
    wait_until_status_says(&mut first.serve(), "not tried again");
    let shows_one = until_low() == 1;
    for host in [first.other_host(), first.other_host()] {
        host.write_secret("pin", WRONG);
        let words = if shows_one { "has never worked on this host" } else { "not tried again" };
        wait_until_status_says(&mut host.serve(), words);
    }
    let tried = if shows_one { 1 } else { 3 };
    assert_counted(&first, tried..=tried);
}

#[test]
fn a_pin_that_never_worked_here_is_not_tried_while_the_token_counts_wrong_ones() {
    if Family::chosen().shows_no_wrong_pins() {
        return;
    }
    let host = Host::new();
    host.token.try_wrong_pins(until_low());
    assert_fails(&host.run(&["key", "list"]), 69, &["has never worked on this host", "trousseau pin retry"]);
    retry(&host, "is tried once more");
    assert_fails(&host.run(&["key", "list"]), 0, &[]);
    retry(&host, "no PIN is held back");
    // By now it has worked here.
    host.token.try_wrong_pins(until_low());
    assert_fails(&host.run(&["key", "list"]), 0, &[]);
    let Some(Tries { last, .. }) = tries() else {
        eprintln!("no last try: it never locks a PIN");
        return;
    };
    host.token.try_wrong_pins(last);
    let other = host.other_host();
    assert_fails(&other.run(&["pin", "retry"]), 1, &["the next wrong PIN locks it", "--final-try-ok"]);
    assert_fails(&other.run(&["key", "list"]), 69, &["has never worked on this host"]);
    assert_fails(&other.run(&["pin", "retry", "--final-try-ok"]), 0, &["is tried once more"]);
    assert_fails(&other.run(&["key", "list"]), 0, &[]);
}

#[test]
fn a_right_pin_is_taken_without_a_restart_even_after_a_typing_error_on_a_new_host() {
    if Family::chosen().sees_no_new_keys() {
        return;
    }
    let host = host_with_wrong_pin();
    let mut plugin = host.serve();
    wait_until_status_says(&mut plugin, "not tried again");
    host.write_secret("pin", PIN);
    wait_until_status_says(&mut plugin, "has no KEK");
    host.generate("0s");
    plugin.wait_until("it is healthy", |plugin| plugin.status().is_ok());
}

#[test]
fn pin_retry_allows_one_try_and_the_serving_plugin_makes_it() {
    let host = Host::new();
    host.generate("0s");
    retry(&host, "no PIN is held back");
    host.write_secret("pin", WRONG);
    let mut plugin = host.serve();
    wait_until_status_says(&mut plugin, "not tried again");
    // The second of the first try is over when the next one is told apart by its own.
    let first = record(&host)["refused"][0]["at"].clone();
    plugin.wait_until("a second later", |_| {
        first.as_str().unwrap().parse::<jiff::Timestamp>().unwrap().as_second() + 1 < jiff::Timestamp::now().as_second()
    });
    retry(&host, "before: C_Login answered CKR_PIN_INCORRECT");
    plugin.wait_until("it has tried again", |_| {
        record(&host)["refused"].get(0).is_some_and(|refused| refused["at"] != first && !refused["answer"].is_null())
    });
    assert_eq!(record(&host)["retry"], false);
    let kept = [plugin.log(), record(&host).to_string()].concat();
    assert!(!kept.contains(WRONG) && !kept.contains(PIN), "{kept}");
    host.write_secret("pin", PIN);
    plugin.wait_until("it is healthy", |plugin| plugin.status().is_ok());
    plugin.round_trip();
    drop(plugin);
    // A TPM forgets them in time, and not at a login.
    let left = if Family::chosen() == Family::Tpm2 { 2 } else { 0 };
    assert_counted(&host, left..=left);
}

#[test]
fn verbs_that_log_in_at_one_moment_do_not_take_each_other_for_a_crash() {
    let host = Host::new();
    let file = host.write_configuration();
    let children: Vec<_> = (0..3)
        .map(|_| {
            let mut list = host.command(&["key", "list", "--config", file.to_str().unwrap()]);
            list.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
        })
        .collect();
    for child in children {
        let done = child.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&done.stderr);
        // SoftHSM writes a token's file while another process reads it.
        assert!(done.status.success() || said.contains("answered CKR_GENERAL_ERROR"), "{said}");
    }
}

#[test]
fn without_a_note_on_disk_only_a_pin_is_tried_that_has_worked_here() {
    if Family::chosen().shows_no_wrong_pins() {
        return;
    }
    let host = Host::new();
    host.generate("0s");
    // The names under which notes are first written: a full disk for these files alone, even for root.
    let obstacles = ["json.new", "login"].map(|name| record_file(&host).with_extension(name));
    obstacles.iter().for_each(|obstacle| fs::create_dir(obstacle).unwrap());
    host.serve_healthy().round_trip();

    host.write_secret("pin", WRONG);
    let mut plugin = host.serve();
    wait_until_status_says(&mut plugin, "the state directory does not take a note");
    drop(plugin);
    assert_eq!(record(&host)["refused"], json!([]), "it was not tried");

    host.write_secret("pin", PIN);
    host.token.try_wrong_pins(until_low());
    let mut plugin = host.serve();
    wait_until_status_says(&mut plugin, "the state directory does not take a note");
    obstacles.iter().for_each(|obstacle| fs::remove_dir(obstacle).unwrap());
    plugin.wait_until("it is healthy", |plugin| plugin.status().is_ok());
}

#[test]
fn a_disk_that_takes_the_note_of_a_login_and_not_its_outcome_costs_one_try() {
    let host = Host::new();
    host.generate("0s");
    host.serve_healthy().round_trip();
    fs::create_dir(record_file(&host).with_extension("json.new")).unwrap();
    host.write_secret("pin", WRONG);
    for _ in 0..3 {
        let mut plugin = host.serve();
        plugin.wait_until("the PIN is held back", |plugin| plugin.log().contains("not tried again"));
        plugin.kill();
    }
    assert_counted(&host, 1..=1);
}

#[test]
fn a_damaged_record_is_not_taken_for_a_missing_one() {
    let host = host_with_wrong_pin();
    wait_until_status_says(&mut host.serve(), "not tried again");
    fs::write(record_file(&host), "{").unwrap();
    for verb in [&["key", "list"][..], &["pin", "retry"]] {
        assert_fails(&host.run(verb), 69, &["pin-", "cannot be read", "remove it"]);
    }
    assert_counted(&host, 1..=1);
}

#[test]
fn a_reload_does_not_pass_over_another_pin_than_the_one_that_is_logged_in() {
    let host = Host::new();
    host.generate("0s");
    let mut plugin = host.serve_healthy();
    let warned = |plugin: &Plugin| plugin.log().matches("is not the one that has last worked").count();
    let taken = |plugin: &Plugin| plugin.log().matches("configuration read again").count();
    plugin.reload();
    plugin.wait_until("it is taken", |plugin| taken(plugin) == 1);
    assert_eq!(warned(&plugin), 0);
    host.write_secret("pin", WRONG);
    plugin.reload();
    plugin.wait_until("it is taken", |plugin| taken(plugin) == 2);
    assert_eq!(warned(&plugin), 1);
    plugin.round_trip();
    assert!(plugin.stop().success());
    host.write_secret("pin", PIN);
    assert_counted(&host, 0..=0);
}
