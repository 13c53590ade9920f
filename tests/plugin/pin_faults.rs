//! What a PIN costs when the token or the process fails while it is tried, counted by the module that makes faults.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::process::Stdio;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::family::Family;
use crate::fault_module::{Faults, library};
use crate::pin::{WRONG, assert_counted, assert_fails, host_with_wrong_pin, record, wait_until_status_says};
use crate::plugin::Host;

/// Where the module that makes faults writes down each call.
const CALLS: &str = "calls";

/// What C_Login was answered, each time that it came back.
fn logins(host: &Host) -> Vec<String> {
    let calls = fs::read_to_string(host.path(CALLS)).unwrap_or_default();
    calls.lines().filter(|line| line.starts_with("C_Login ")).map(str::to_owned).collect()
}

#[test]
fn ten_starts_that_are_killed_with_a_credential_of_their_own_cost_exactly_one_try() {
    if Family::chosen().stands_no_kills() {
        return;
    }
    let Some(library) = library() else { return };
    let host = host_with_wrong_pin();
    let faults = Faults { host: &host, library: &library };
    let with_credential = faults.configuration().replace(host.path("pin").to_str().unwrap(), "credential:pin");
    // A token that shows nobody that it counts: the host alone remembers.
    faults.set("C_Login lock-after 100");
    for n in 0..10 {
        let credentials = host.path(&format!("credentials-{n}"));
        fs::create_dir(&credentials).unwrap();
        host.write_secret(&format!("credentials-{n}/pin"), WRONG);
        let mut command = faults.command_with_log(CALLS);
        host.write_secret("trousseau.toml", &with_credential);
        command.env("TROUSSEAU_FAULT_PIN_COUNT", credentials.join("counted-anew"));
        command.env("CREDENTIALS_DIRECTORY", credentials);
        let mut plugin = host.start(command);
        match n {
            0 => plugin.wait_until("the PIN is tried", |_| !logins(&host).is_empty()),
            // Later ones are killed once they have made up their mind, or before they have looked at the token.
            _ if n % 3 > 0 => wait_until_status_says(&mut plugin, "trousseau pin retry"),
            _ => (),
        }
        plugin.kill();
        assert_eq!(logins(&host), ["C_Login trousseau CKR_PIN_INCORRECT"], "start {n}");
    }
    assert_counted(&host, 1..=1);
}

#[test]
fn a_crash_in_the_middle_of_a_login_is_one_try_and_is_not_repeated() {
    if Family::chosen().stands_no_kills() {
        return;
    }
    let Some(library) = library() else { return };
    // Of a PIN that has worked here one crash is forgiven.
    for (has_worked, tries, then) in [(false, 1, "trousseau pin retry"), (true, 2, "it is tried again a minute after")]
    {
        let host = Host::new();
        let faults = Faults { host: &host, library: &library };
        if has_worked {
            wait_until_status_says(&mut host.start(faults.command()), "has no KEK");
        }
        faults.set("C_Login crash");
        for crash in 0..tries {
            let ended = faults.command_with_log(CALLS).stderr(Stdio::null()).status().unwrap();
            assert_eq!(ended.signal(), Some(6), "crash {crash} of {tries}: {ended}");
            let refused = record(&host)["refused"].clone();
            assert_eq!(refused.as_array().unwrap().len(), usize::from(!has_worked || crash > 0), "{refused}");
        }
        // The rule is still there: whoever tries it would crash.
        for _ in 0..3 {
            let mut plugin = host.start(faults.command_with_log(CALLS));
            wait_until_status_says(&mut plugin, "ended before it knew");
            wait_until_status_says(&mut plugin, then);
            plugin.kill();
        }
        assert_eq!(record(&host)["refused"][0]["answer"], Value::Null);
        faults.set("");
        assert_fails(&faults.verb(&["pin", "retry"]).output().unwrap(), 0, &["is tried once more"]);
        let mut plugin = host.start(faults.command_with_log(CALLS));
        plugin.wait_until("it logs in", |_| logins(&host) == ["C_Login trousseau CKR_OK"]);
    }
}

#[test]
fn a_locked_or_expired_pin_is_not_tried_again_and_its_remedy_is_told() {
    let Some(library) = library() else { return };
    for (code, remedy) in [
        ("CKR_PIN_LOCKED", "unlock it with the vendor's tools"),
        ("CKR_PIN_EXPIRED", "set a new PIN with the vendor's tools and write it into"),
        ("CKR_PIN_INVALID", "write the right PIN into"),
    ] {
        let host = Host::new();
        let faults = Faults { host: &host, library: &library };
        faults.set(&format!("C_Login return {code} times 1"));
        for _ in 0..2 {
            // The rule holds for each process once, and a second login would go through.
            let mut plugin = host.start(faults.command_with_log(CALLS));
            wait_until_status_says(&mut plugin, &format!("C_Login answered {code}"));
            wait_until_status_says(&mut plugin, remedy);
            wait_until_status_says(&mut plugin, "not tried again, unless you say `trousseau pin retry`");
            assert!(plugin.stop().success());
        }
        assert_eq!(logins(&host), [format!("C_Login trousseau {code}")]);
    }
}

#[test]
fn a_login_that_fails_for_something_that_passes_is_tried_again_after_longer_and_longer_pauses() {
    let Some(library) = library() else { return };
    let host = Host::new();
    let faults = Faults { host: &host, library: &library };
    faults.set("C_Login return CKR_TOKEN_NOT_PRESENT times 4");
    let began = Instant::now();
    wait_until_status_says(&mut host.start(faults.command_with_log(CALLS)), "has no KEK");
    let took = began.elapsed();
    eprintln!("four logins that failed, and one that did not: {took:?}");
    let failed = ["C_Login trousseau CKR_TOKEN_NOT_PRESENT"; 4];
    assert_eq!(logins(&host), [&failed[..], &["C_Login trousseau CKR_OK"]].concat());
    // A glance, then pauses of 250, 500 and 1000 ms, each less a quarter at most.
    assert!(took > Duration::from_millis(1300), "{took:?}");
    assert_eq!(record(&host)["refused"], json!([]), "it says nothing of the PIN");
}

#[test]
fn three_hosts_that_start_again_and_again_do_not_lock_a_token_of_three_tries() {
    let Some(library) = library() else { return };
    let first = host_with_wrong_pin();
    let counted = first.path("counted");
    for host in [&first, &first.other_host(), &first.other_host()] {
        host.write_secret("pin", WRONG);
        let faults = Faults { host, library: &library };
        faults.set("C_Login lock-after 3");
        for _ in 0..3 {
            let mut command = faults.command();
            command.env("TROUSSEAU_FAULT_PIN_COUNT", &counted);
            let mut plugin = host.start(command);
            wait_until_status_says(&mut plugin, "trousseau pin retry");
            plugin.kill();
        }
    }
    let counted = fs::read_to_string(counted).unwrap();
    assert!(counted.starts_with("1 "), "{counted}");
}
