//! From power-on: nothing waits for a token, and the door is open from the first moment.

use crate::machine::{Machine, STARTERS, image};

#[test]
fn a_missing_token_holds_up_nobody_and_needs_no_restart() {
    let Some(image) = image() else { return };
    let machine = Machine::boot(&image);
    let since_boot = |text: String| text.parse::<u64>().unwrap();
    let ready = since_boot(machine.show("ActiveEnterTimestampMonotonic"));
    let took = ready - since_boot(machine.show("InactiveExitTimestampMonotonic"));
    assert!(took < 5_000_000, "they waited {took} µs");
    for unit in STARTERS {
        let show = |property: &str| machine.run(&format!("systemctl show -P {property} {unit}"));
        assert_eq!(show("ActiveState"), "active", "{unit}");
        let began = since_boot(show("InactiveExitTimestampMonotonic"));
        assert!(ready <= began, "{unit} did not wait for the socket");
    }

    let why = machine.status().unwrap_err();
    assert!(why.is_outage() && why.to_string().contains("trousseau"), "{why}");
    machine.wait_until("systemd is told", |machine| machine.show("StatusText").starts_with("UNAVAILABLE: "));

    let pid = machine.show("MainPID");
    machine.make_token();
    machine.wait_until("the plugin is well", |machine| machine.status().is_ok());
    assert_eq!(machine.show("MainPID"), pid);
    assert_eq!(machine.show("NRestarts"), "0");
    machine.wait_until("systemd is told", |machine| machine.show("StatusText").contains("key_id tr1-"));
}

#[test]
fn two_hosts_over_one_token_agree() {
    let Some(image) = image() else { return };
    let one = Machine::boot_with_token(&image);
    let two = one.boot_beside(&image);
    two.wait_until("the second host is well", |two| two.status().is_ok());
    assert_eq!(one.status().unwrap(), two.status().unwrap());
    for (writer, reader) in [(&one, &two), (&two, &one)] {
        let (ciphertext, key_id) = writer.encrypt(b"seed");
        assert_eq!(reader.decrypt(&ciphertext, &key_id), b"seed");
    }
}
