//! A module that leaks with each object: it is initialized anew now and then, which nobody sees.

use std::fs;
use std::sync::Mutex;
use std::sync::atomic::AtomicBool;
use std::thread;

use crate::caller::Load;
use crate::plugin::{Host, admit};
use crate::token::{Family, Key};

/// Two objects each, of which SoftHSM leaks some 250 bytes: without a renewal, 12 MiB after it is warm.
const ROUND_TRIPS: usize = 30_000;
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
        let warm = rss_kib(plugin.pid());
        load.reaches(ROUND_TRIPS);
        let last = rss_kib(plugin.pid());
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

/// What the process has in memory.
pub fn rss_kib(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}
