//! What systemd does with the service, while requests come in.

use std::thread;
use std::time::{Duration, Instant};

use crate::load::{Failure, Load, TIMEOUT, WORKERS, lost_in};
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
    assert_eq!(load.end(), []);
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
    let load = Load::begin(machine.socket());
    let began = Instant::now();
    machine.run(&format!("kill -STOP {}", machine.show("MainPID")));
    machine.wait_until("the service is back", |machine| {
        machine.show("NRestarts") == "1" && machine.show("ActiveState") == "active"
    });
    machine.wait_until("the plugin is well", |machine| machine.status().is_ok());
    let away = began.elapsed();
    assert!(machine.journal().contains("Watchdog timeout"));
    load.goes_on();
    bears(&load.end(), away);
}

#[test]
fn the_services_user_cannot_exchange_the_socket() {
    let Some(image) = image() else { return };
    let machine = Machine::boot_with_token(&image);
    assert_eq!(machine.run("stat -c '%U %a' /run/trousseau"), "root 755");
    let link = "ln -sfn /etc/shadow /run/trousseau/kms.sock";
    let exchanged = machine.try_run(&format!("setpriv --reuid=trousseau --clear-groups {link}"));
    assert!(exchanged.as_ref().is_err_and(|why| why.contains("Permission denied")), "{exchanged:?}");
    machine.run("systemctl stop trousseau.service && systemctl restart trousseau.socket");
    assert_eq!(machine.run("stat -c %U /etc/shadow /run/trousseau"), "root\nroot");
    machine.wait_until("the plugin is well", |machine| machine.status().is_ok());
}

/// A host that was suspended, or a token that was away, is of use again after so long.
const HEALED_WITHIN: Duration = Duration::from_secs(4);

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
    bears(&load.end(), Duration::ZERO);
    assert_eq!(machine.show("NRestarts"), "0");
}

#[test]
fn a_host_whose_power_failed_comes_back_by_itself() {
    let Some(image) = image() else { return };
    let machine = Machine::boot_with_token(&image);
    let key_id = machine.status().unwrap().key_id;
    let (ciphertext, sealed_under) = machine.encrypt(b"seed");
    for token_is_late in [false, true] {
        let load = Load::begin(machine.socket());
        let began = Instant::now();
        machine.cut_power();
        if token_is_late {
            machine.move_tokens(true);
        }
        machine.boot_again();
        if token_is_late {
            machine.wait_until("it is missed", |machine| machine.status().is_err_and(|why| why.is_outage()));
            machine.move_tokens(false);
        }
        heals(&machine, "after the power failed");
        let away = began.elapsed();
        load.goes_on();
        // systemd, which has the socket, dies after the service: what has connected in between is lost as well.
        bears(&load.end(), away + TIMEOUT);
        assert_eq!(machine.status().unwrap().key_id, key_id);
        assert_eq!(machine.decrypt(&ciphertext, &sealed_under), b"seed");
        assert_eq!(machine.show("NRestarts"), "0");
    }
}

/// That a load lost no more than it had to while nobody answered, and was told nothing else than that.
fn bears(failures: &[Failure], away: Duration) {
    let (lost, most) = (failures.iter().filter(|failure| failure.is_lost()).count(), lost_in(away));
    eprintln!("away for {away:?}: {} failed, {lost} of them lost, of at most {most}", failures.len());
    assert!(lost <= most, "{most}: {failures:?}");
    assert!(!failures.iter().any(Failure::is_wrong), "{failures:?}");
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
