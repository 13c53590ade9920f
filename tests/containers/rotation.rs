//! Three control planes over one token rotate together, and nobody coordinates them.

use std::thread;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use serde_json::Value;

use crate::load::{Load, SEED};
use crate::machine::{Machine, image};

/// How far apart the hosts may switch: the Status of each is asked for one after the other.
const SWITCH: SignedDuration = SignedDuration::from_secs(1);
/// How long it is watched that nobody switches back, or late.
const AFTERWARDS: SignedDuration = SignedDuration::from_secs(3);
/// Between two samples.
const PAUSE: Duration = Duration::from_millis(100);

/// How each new KEK is made known: by the looks that every plugin takes each 30 s, or by asking each whether it is
/// ready, upon which it looks at once.
const ROTATIONS: [(&str, bool); 3] = [("45s", false), ("30s", true), ("30s", true)];

#[test]
fn three_hosts_switch_in_one_second_three_times_and_no_request_fails() {
    let Some(image) = image() else { return };
    let one = Machine::boot_with_token(&image);
    let machines = [one.boot_beside(&image), one.boot_beside(&image), one];
    for machine in &machines {
        machine.wait_until("the plugin is well", |machine| machine.status().is_ok());
    }
    let load = Load::across(machines.iter().map(Machine::socket).collect());
    let mut watch = Watch::begin(&machines);
    for (activate_in, is_asked) in ROTATIONS {
        let made = machines[0].run_as_service(&format!(
            "trousseau key generate --activate-in {activate_in} --unsynchronized-clock-ok --output json"
        ));
        let made: Value = serde_json::from_str(&made).unwrap();
        let (id, instant) = (made["id"].as_str().unwrap(), made["not-before"].as_str().unwrap());
        let instant: Timestamp = instant.parse().unwrap();
        if is_asked {
            thread::scope(|scope| {
                for machine in &machines {
                    let ask = format!("trousseau key list --expect {id}");
                    scope.spawn(move || assert!(machine.run_as_service(&ask).starts_with("ready: ")));
                }
            });
        }
        assert!(Timestamp::now() < instant, "it took too long to make and ask for it: this machine is too busy");
        while Timestamp::now() < instant + AFTERWARDS {
            watch.sample(instant);
            thread::sleep(PAUSE);
        }
        watch.has_switched_once();
    }
    load.goes_on();
    assert_eq!(load.end(), []);
    watch.all_read_everything();
}

/// What the hosts were seen to answer.
struct Watch<'m> {
    machines: &'m [Machine; 3],
    /// Each host's key_ids, in the order in which it took them up.
    key_ids: [Vec<String>; 3],
    rotations: usize,
    samples: usize,
    sealed: Vec<(Vec<u8>, String)>,
}

impl<'m> Watch<'m> {
    fn begin(machines: &'m [Machine; 3]) -> Self {
        let key_ids = [vec![], vec![], vec![]];
        let mut watch = Self { machines, key_ids, rotations: 0, samples: 0, sealed: vec![] };
        watch.sample(Timestamp::MIN);
        watch
    }

    /// Asks each host for its key_id; they are the same unless the instant is now.
    fn sample(&mut self, instant: Timestamp) {
        let began = Timestamp::now();
        let key_ids = self.machines.each_ref().map(|machine| machine.status().unwrap().key_id);
        let is_the_instant = began < instant.saturating_add(SWITCH).unwrap() && Timestamp::now() >= instant;
        assert!(is_the_instant || key_ids.iter().all(|key_id| *key_id == key_ids[0]), "{began}: {key_ids:?}");
        for (all, key_id) in self.key_ids.iter_mut().zip(key_ids) {
            if all.last() != Some(&key_id) {
                all.push(key_id);
            }
        }
        self.sealed.push(self.machines[self.samples % 3].encrypt(SEED));
        self.samples += 1;
    }

    fn has_switched_once(&mut self) {
        self.rotations += 1;
        for key_ids in &self.key_ids {
            assert_eq!(key_ids.len(), 1 + self.rotations, "{:?}", self.key_ids);
            assert_eq!(*key_ids, self.key_ids[0]);
        }
    }

    fn all_read_everything(&self) {
        eprintln!("{} samples, {:?}", self.samples, self.key_ids[0]);
        for machine in self.machines {
            for (ciphertext, key_id) in &self.sealed {
                assert_eq!(machine.decrypt(ciphertext, key_id), SEED);
            }
        }
    }
}
