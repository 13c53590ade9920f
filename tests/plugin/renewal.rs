//! A module that leaks with each object: it is initialized anew now and then, which nobody sees.

use std::fs;
use std::sync::Mutex;
use std::sync::atomic::AtomicBool;
use std::thread;

use crate::caller::Load;
use crate::family::Family;
use crate::fault_module::{Faults, library};
use crate::plugin::{Host, admit};
use crate::sizes::resident_kib;
use crate::token::Key;

/// Three objects each, of which SoftHSM leaks some 250 bytes: without a renewal, 11 MiB after it is warm.
const ROUND_TRIPS: usize = 20_000;
const WARM_UP: usize = 5_000;
const GROWTH_KIB: u64 = 6 * 1024;

#[test]
fn a_module_that_leaks_is_renewed_and_nobody_sees_it() {
    is_renewed(false);
}

#[test]
fn a_module_of_two_tokens_is_renewed_when_both_give_it_up() {
    is_renewed(true);
}

fn is_renewed(replicas: bool) {
    let mut host = Host::new().with_mode("wrapkey");
    if host.token.family != Family::SoftHsm {
        eprintln!("skipped: only SoftHSM leaks so");
        return;
    }
    host.sessions = 4;
    host.write_profile("renew-after = 5000");
    if replicas {
        host.token.initialize(&["second"]);
        let key = Key { value: Some(vec![7; 32]), ..Key::generated(b"shared", "trousseau-test") };
        for token in ["trousseau", "second"] {
            host.token.make_keys_in(token, std::slice::from_ref(&key));
        }
        host.extra = admit(b"shared");
        host.tokens = r#""pkcs11:token=trousseau", "pkcs11:token=second""#.into();
    } else {
        host.generate("0s");
    }
    let plugin = host.serve_healthy_and_talkative();
    let socket = plugin.socket.clone();
    let requests = (Mutex::default(), AtomicBool::new(false));
    thread::scope(|scope| {
        let load = Load::begin(scope, &requests, &socket, 8);
        load.reaches(WARM_UP);
        let warm = resident_kib(plugin.pid());
        load.reaches(ROUND_TRIPS);
        let last = resident_kib(plugin.pid());
        let done = load.end();
        let failed: Vec<_> = done.iter().filter(|request| request.outcome.is_err()).collect();
        assert!(failed.is_empty(), "{} of {}: {:?}", failed.len(), done.len(), failed[0]);
        let renewals = plugin.log().matches("the connection is made anew").count();
        let slowest = done.iter().map(|request| request.took).max().unwrap();
        eprintln!("{renewals} renewals, slowest round trip {slowest:?}, RSS {warm} KiB, then {last} KiB");
        assert!(renewals > 3, "{renewals}");
        assert!(last < warm + GROWTH_KIB, "{warm} KiB, then {last} KiB");
    });
}

/// A host whose token is renewed after so many objects. `None`: its token is none that is; this says so.
fn renewed_after(objects: u32) -> Option<Host> {
    let host = Host::new().with_mode("wrapkey");
    if host.token.family != Family::SoftHsm {
        eprintln!("skipped: only SoftHSM is renewed");
        return None;
    }
    host.write_profile(&format!("renew-after = {objects}"));
    host.generate("0s");
    Some(host)
}

/// As while another host writes the token's file.
#[test]
fn a_token_that_is_not_to_be_seen_for_a_moment_while_it_is_renewed_is_no_outage() {
    let Some(library) = library() else { return };
    let Some(host) = renewed_after(40) else { return };
    let faults = Faults { host: &host, library: &library };
    let plugin = faults.serve_healthy();
    let connections = || plugin.log().matches("token connected").count();
    for _ in 0..5 {
        faults.set("C_GetSlotList empty times 3");
        let before = connections();
        while connections() == before {
            plugin.status().unwrap();
            plugin.round_trip();
        }
    }
}

#[test]
fn a_login_that_fails_while_the_token_is_renewed_is_not_repeated_at_once_again_and_again() {
    let Some(library) = library() else { return };
    let Some(host) = renewed_after(40) else { return };
    let faults = Faults { host: &host, library: &library };
    let mut plugin = faults.start_healthy(faults.command_with_log("calls"));
    faults.set("C_Login return CKR_TOKEN_NOT_PRESENT");
    plugin.wait_until("it is told", |plugin| {
        let _until_it_is_renewed = plugin.encrypt(b"a");
        plugin.log().contains("login failed")
    });
    let failed = fs::read_to_string(host.path("calls")).unwrap().matches("C_Login trousseau CKR_TOKEN").count();
    assert!(failed < 5, "{failed} logins"); // two, and what a busy machine leaves time for
    faults.set("");
    plugin.wait_until("it is well", |plugin| plugin.status().is_ok());
    plugin.round_trip();
}

/// It is away for a moment then, which is no limit on its sessions.
#[test]
fn a_token_is_measured_although_it_is_renewed_meanwhile() {
    let Some(host) = renewed_after(100) else { return };
    let done = host.run(&["bench", "--token", "--time", "500ms", "--max-sessions", "4", "--output", "json"]);
    let report: serde_json::Value = serde_json::from_slice(&done.stdout).unwrap_or_else(|_| panic!("{done:?}"));
    assert!(report["token-refused"].is_null(), "{report:#}");
    let mut sessions: Vec<_> = report["token"].as_array().unwrap().iter().map(|of| of["sessions"].as_u64()).collect();
    sessions.dedup();
    assert!(sessions.starts_with(&[Some(1), Some(2)]), "{sessions:?}");
}
