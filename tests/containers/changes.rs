//! What changes while the service runs: its configuration, and the token's PIN.

use tonic::Code;

use crate::load::{Failure, Load};
use crate::machine::{Machine, NEW_PIN, PIN, configuration, image};

#[test]
fn a_reload_takes_what_is_good_and_keeps_the_old_otherwise() {
    let Some(image) = image() else { return };
    let machine = Machine::boot_with_token(&image);
    let (pid, old) = (machine.show("MainPID"), machine.status().unwrap());
    let load = Load::begin(machine.socket());

    machine.write("trousseau.toml", &configuration("other"));
    machine.run("systemctl reload trousseau.service");
    machine.wait_until("the new cluster is served", |machine| machine.status().unwrap().key_id != old.key_id);
    let new = machine.status().unwrap();

    machine.write("trousseau.toml", &format!("{}secret-sauce = 1\n", configuration("third")));
    machine.run("systemctl reload trousseau.service");
    machine.wait_until("the reason is logged", |machine| machine.journal().contains("secret-sauce"));
    assert_eq!(machine.status().unwrap(), new);
    assert_eq!(machine.show("ActiveState"), "active");
    assert_eq!(machine.show("MainPID"), pid);
    load.goes_on();
    assert_eq!(load.end(), []);
}

#[test]
fn an_exchanged_pin_is_used_from_the_next_start_on() {
    let Some(image) = image() else { return };
    let machine = Machine::boot_with_token(&image);
    let load = Load::begin(machine.socket());
    machine.run(&format!(
        "pkcs11-tool --module /usr/lib/softhsm/libsofthsm2.so --token-label trousseau --login --pin {PIN} \
         --change-pin --new-pin {NEW_PIN}"
    ));
    load.goes_on();
    assert_eq!(load.end(), [], "who is logged in stays so");

    let load = Load::begin(machine.socket());
    machine.run("systemctl restart trousseau.service");
    machine.wait_until("the old PIN is refused", |machine| {
        machine.status().is_err_and(|why| why.is_outage() && why.to_string().contains("PIN"))
    });
    machine.write("pin", NEW_PIN);
    machine.run("systemctl restart trousseau.service");
    machine.wait_until("the new PIN works", |machine| machine.status().is_ok());
    load.goes_on();
    let mut failures = load.end();
    eprintln!("{} failed", failures.len());
    // Until the provider is found to be at fault, it is being connected to.
    let is_told = |said: &str| said.contains("PIN") || said.contains("is being connected to");
    failures.retain(|failure| !matches!(failure, Failure::Answered(Code::Unavailable, said) if is_told(said)));
    assert_eq!(failures, [], "while the PIN is wrong that is what everybody is told");
}

#[test]
fn a_pin_may_be_encrypted_for_this_host() {
    let Some(image) = image() else { return };
    let machine = Machine::boot_with_token(&image);
    machine.run(
        "systemd-creds encrypt --with-key=host --name=pin /etc/trousseau/pin /etc/trousseau/pin.cred
         rm /etc/trousseau/pin
         printf '[Service]\nLoadCredential=\nLoadCredentialEncrypted=pin:/etc/trousseau/pin.cred\n' \
             >/etc/systemd/system/trousseau.service.d/encrypted.conf
         systemctl daemon-reload
         systemctl restart trousseau.service",
    );
    machine.wait_until("the plugin is well", |machine| machine.status().is_ok());
}
