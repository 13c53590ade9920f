//! What systemd does with the service, while requests come in.

use std::thread;
use std::time::{Duration, Instant};

use crate::load::{Load, WORKERS};
use crate::machine::{Machine, configuration, image};

#[test]
fn a_connection_starts_the_service_and_restarts_fail_no_request() {
    let Some(image) = image() else { return };
    let machine = Machine::boot_with_token(&image);
    machine.run("systemctl stop trousseau.service");
    assert_eq!(machine.show("ActiveState"), "inactive");
    let load = Load::begin(machine.socket());
    assert_eq!(machine.show("ActiveState"), "active");
    for _ in 0..3 {
        let pid = machine.show("MainPID");
        machine.run("systemctl restart trousseau.service");
        assert_ne!(machine.show("MainPID"), pid);
        load.goes_on();
    }
    assert_eq!(load.end(), Vec::<String>::new());
    assert_eq!(machine.show("NRestarts"), "0");
}

#[test]
fn a_killed_service_comes_back_and_only_requests_under_way_fail() {
    let Some(image) = image() else { return };
    let machine = Machine::boot_with_token(&image);
    let load = Load::begin(machine.socket());
    machine.run(&format!("kill -9 {}", machine.show("MainPID")));
    load.goes_on();
    let failures = load.end();
    assert!(failures.len() <= WORKERS, "{failures:?}");
    assert_eq!(machine.show("NRestarts"), "1");
}

#[test]
fn a_service_that_stands_still_is_replaced() {
    let Some(image) = image() else { return };
    let machine = Machine::boot_with_token(&image);
    machine.run(&format!("kill -STOP {}", machine.show("MainPID")));
    machine.wait_until("the service is back", |machine| {
        machine.show("NRestarts") == "1" && machine.show("ActiveState") == "active"
    });
    machine.wait_until("the plugin is well", |machine| machine.status().is_ok());
    assert!(machine.journal().contains("Watchdog timeout"));
}

/// A host that was suspended, or a token that was away, is of use again after so long.
const HEALED_WITHIN: Duration = Duration::from_secs(2);

#[test]
fn a_host_that_stood_still_goes_on() {
    let Some(image) = image() else { return };
    let machine = Machine::boot_with_token(&image);
    // Shorter than a request's deadline, longer than that, and longer than the watchdog's.
    for (still, late) in [(1, 0), (4, 1), (12, 4)] {
        let load = Load::begin(machine.socket());
        machine.freeze();
        thread::sleep(Duration::from_secs(still));
        machine.thaw();
        heals(&machine, &format!("after {still} s of standing still"));
        load.goes_on();
        let failures = load.end();
        eprintln!("{} failed", failures.len());
        assert!(failures.len() <= late * WORKERS, "{still} s: {failures:?}");
    }
}

#[test]
fn a_token_that_was_away_is_used_again() {
    let Some(image) = image() else { return };
    let machine = Machine::boot_with_token(&image);
    let load = Load::begin(machine.socket());
    for _ in 0..3 {
        machine.move_tokens(true);
        machine.wait_until("it is missed", |machine| machine.status().is_err());
        machine.move_tokens(false);
        heals(&machine, "after the token was away");
        load.goes_on();
    }
    eprintln!("{} failed", load.end().len());
    assert_eq!(machine.show("NRestarts"), "0");
}

fn heals(machine: &Machine, what: &str) {
    let began = Instant::now();
    machine.wait_until("the plugin is well", |machine| machine.status().is_ok());
    eprintln!("{what}: well after {:?}", began.elapsed());
    assert!(began.elapsed() < HEALED_WITHIN, "{what}: well after {:?}", began.elapsed());
}

#[test]
fn a_service_that_cannot_start_holds_up_no_kubelet_and_is_tried_for_ever() {
    let Some(image) = image() else { return };
    let machine = Machine::boot_with_token(&image);
    machine.write("trousseau.toml", "nonsense");
    machine.run("systemctl stop kubelet.service trousseau.service");
    machine.try_run("systemctl start kubelet.service trousseau.service").expect_err("the configuration is faulty");
    assert_eq!(machine.run("systemctl is-active kubelet.service"), "active");
    // systemd's own limit is five starts in ten seconds.
    machine.wait_until("it was tried often", |machine| machine.show("NRestarts").parse::<u32>().unwrap() > 6);
    machine.write("trousseau.toml", &configuration("test"));
    machine.wait_until("the plugin is well", |machine| machine.status().is_ok());
    assert_eq!(machine.run("systemctl is-active trousseau.socket"), "active");
}
