//! Tokens that are replicas of each other: while one is sick the other serves, and nobody sees it.

use std::fs;
use std::os::unix::net::UnixDatagram;
use std::sync::Mutex;
use std::sync::atomic::AtomicBool;
use std::thread;
use std::time::{Duration, Instant};

use crate::caller::{Load, Request};
use crate::family::Family;
use crate::fault_module::{Faults, library};
use crate::plugin::{Host, Plugin, admit};
use crate::token::Key;

/// What a replica's sickness may add to a request: the least patience is 50 ms, the rest is a busy machine's.
const FAILOVER: Duration = Duration::from_millis(500);
/// From the end of the fault, however busy the machine is: less than half a second on one that is not.
const USED_AGAIN: Duration = Duration::from_secs(5);

/// How many requests are served at least in the last half of the second in which a replica is sick. A token that takes
/// 200 ms for a call serves two or three by itself.
const SERVED: usize = 5;

/// Two tokens in one module, with one KEK.
///
/// `None`: the token's KEKs are not such that a test can put one into both; this says so.
pub fn host() -> Option<Host> {
    if Family::chosen().lacks_aes() {
        return None;
    }
    let mut host = Host::new().with_a_replica();
    let key = Key { value: Some(vec![7; 32]), wraps: false, ..Key::generated(b"shared", "trousseau-test") };
    for token in ["trousseau", "second"] {
        host.token.make_keys_in(token, std::slice::from_ref(&key));
    }
    host.extra = admit(b"shared");
    Some(host)
}

#[test]
fn while_one_token_is_sick_its_replica_serves() {
    let Some(library) = library() else { return };
    let Some(host) = host() else { return };
    let faults = Faults { host: &host, library: &library };
    let mut plugin = faults.serve_healthy();
    let (sealed, key_id) = plugin.round_trip();
    for sick in ["trousseau", "second", "trousseau"] {
        faults.set(&format!("* return CKR_DEVICE_ERROR token {sick}"));
        // The other one was sick a moment ago.
        plugin.wait_until("the other one is well", |plugin| plugin.decrypt(&sealed, &key_id).is_ok());
        for _ in 0..10 {
            plugin.round_trip();
        }
    }
}

/// A login that is lost again and again is the library's, which must not keep it for its other token's sake.
#[test]
fn one_token_that_only_c_finalize_brings_back_gets_it_while_its_replica_serves() {
    if Family::chosen().ends_with_its_token() {
        return;
    }
    let Some(library) = library() else { return };
    let Some(host) = host() else { return };
    let faults = Faults { host: &host, library: &library };
    let mut plugin = faults.start_healthy(faults.command_with_log("calls"));
    let (sealed, key_id) = plugin.round_trip();
    let is_finalized = || fs::read_to_string(host.path("calls")).unwrap().contains("C_Finalize ");
    assert!(!is_finalized());
    faults.set(
        "C_DecryptInit return CKR_USER_NOT_LOGGED_IN token trousseau
         C_UnwrapKey return CKR_USER_NOT_LOGGED_IN token trousseau",
    );
    plugin.wait_until("the library is finalized", |plugin| {
        plugin.decrypt(&sealed, &key_id).unwrap();
        is_finalized()
    });
    faults.set("");
    plugin.wait_until("it is used again", |plugin| {
        plugin.decrypt(&sealed, &key_id).unwrap();
        plugin.log().matches("token connected").count() > 3
    });
}

#[test]
fn under_load_a_token_that_fails_or_hangs_fails_no_request_and_is_used_again() {
    let Some(library) = library() else { return };
    for rules in [
        "* return CKR_DEVICE_ERROR token trousseau",
        "C_Encrypt hang token trousseau\nC_Decrypt hang token trousseau",
        "C_EncryptInit return CKR_SESSION_HANDLE_INVALID token trousseau",
        "* delay 200ms token trousseau",
    ] {
        let Some(host) = host() else { return };
        play(rules, &Faults { host: &host, library: &library });
    }
}

fn play(rules: &str, faults: &Faults) {
    const CALLS: &str = "calls";
    let mut plugin = faults.start_healthy(faults.command_with_log(CALLS));
    let calls = || fs::read_to_string(faults.host.path(CALLS)).unwrap();
    let used_after = |place: usize| calls()[place..].contains("C_Encrypt trousseau CKR_OK");
    let socket = plugin.socket.clone();
    let requests = (Mutex::default(), AtomicBool::new(false));
    let slowest = |requests: &[Request]| requests.iter().map(|request| request.took).max().unwrap();
    thread::scope(|scope| {
        let load = Load::begin(scope, &requests, &socket, 8);
        plugin.wait_until("the first token is used", |_| used_after(0));
        load.goes_on(800);
        let sick = Instant::now();
        faults.set(rules);
        thread::sleep(Duration::from_secs(1)); // of load
        let place = calls().len();
        let mended = Instant::now();
        faults.set("");
        plugin.wait_until("it is used again", |_| used_after(place));
        let used_again = mended.elapsed();
        load.goes_on(100);
        let (before, after): (Vec<_>, Vec<_>) = load.end().into_iter().partition(|request| request.at < sick);
        let (usual, slow) = (slowest(&before), slowest(&after));
        let half = mended - Duration::from_millis(500)..mended;
        let served = after.iter().filter(|request| half.contains(&(request.at + request.took))).count();
        let adds = slow.saturating_sub(usual);
        eprintln!(
            "{rules:?}: slowest {usual:?}; the failover adds {adds:?}, {served} served; again after {used_again:?}"
        );
        let failed: Vec<_> = before.iter().chain(&after).filter(|request| request.outcome.is_err()).collect();
        assert!(failed.is_empty(), "{rules}: {failed:?}");
        assert!(adds < FAILOVER, "{rules}: {slow:?} instead of {usual:?}");
        assert!(served > SERVED, "{rules}: {served} served");
        assert!(used_again < USED_AGAIN, "{rules}: used again after {used_again:?}");
    });
}

#[test]
fn a_replica_that_lacks_the_kek_is_named_before_it_is_needed() {
    if Family::chosen().stands_one_token_alone() {
        return;
    }
    let host = Host::new().with_a_replica();
    host.generate("0s"); // in the first one only
    let heard = UnixDatagram::bind(host.path("notify.sock")).unwrap();
    heard.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let mut command = host.command(&["serve", "--config"]);
    command.arg(host.write_configuration()).env("NOTIFY_SOCKET", host.path("notify.sock"));
    let mut plugin = host.start(command);
    plugin.wait_until("the log names it", |plugin| {
        plugin.log().lines().any(|line| line.contains("replicas are not alike") && line.contains("token=second"))
    });
    let mut message = [0; 4096];
    loop {
        let length = heard.recv(&mut message).expect("systemd hears of it");
        let said = String::from_utf8_lossy(&message[..length]);
        if said.contains("STATUS=serving") && said.contains("pkcs11:token=second of provider hsm lacks KEK") {
            break;
        }
    }
    plugin.round_trip();
}

#[test]
fn a_token_with_few_sessions_is_used_again_although_a_call_of_before_never_returns() {
    let Some(library) = library() else { return };
    let Some(host) = host() else { return };
    let faults = Faults { host: &host, library: &library };
    const FEW: &str = "C_OpenSession limit 3 token trousseau";
    const FOR_EVER: &str = "C_Encrypt hang token trousseau times 1";
    faults.set(FEW);
    let mut plugin = faults.serve_healthy();
    let socket = plugin.socket.clone();
    let requests = (Mutex::default(), AtomicBool::new(false));
    // One after another: then it is known to be quick, and its silence is noticed soon.
    for _ in 0..100 {
        plugin.round_trip();
    }
    thread::scope(|scope| {
        let load = Load::begin(scope, &requests, &socket, 8);
        faults.set(&format!("{FEW}\n{FOR_EVER}\nC_Encrypt hang token trousseau\nC_Decrypt hang token trousseau"));
        plugin.wait_until("it is given up", |plugin| plugin.log().contains("no call into the module returns"));
        let connections = |plugin: &Plugin| plugin.log().matches("token connected").count();
        let before = connections(&plugin);
        faults.set(FOR_EVER);
        plugin.wait_until("it is connected to again", |plugin| connections(plugin) > before);
        faults.set("");
        load.end();
    });
    plugin.round_trip();
}

#[test]
fn a_replica_that_comes_back_with_another_key_is_named_and_the_other_serves() {
    if Family::chosen().ends_with_its_token() {
        return;
    }
    let Some(library) = library() else { return };
    let Some(host) = host() else { return };
    let faults = Faults { host: &host, library: &library };
    let mut plugin = faults.serve_healthy();
    let (sealed, key_id) = plugin.round_trip();
    faults.set("* return CKR_DEVICE_REMOVED token trousseau");
    plugin.wait_until("it is away", |plugin| {
        plugin.round_trip();
        plugin.log().contains("was lost")
    });
    host.token.remove_key(b"shared");
    let other = Key { value: Some(vec![8; 32]), wraps: false, ..Key::generated(b"shared", "trousseau-test") };
    host.token.make_keys_in("trousseau", &[other]);
    faults.set("");
    let is_named =
        |line: &str| line.contains("token=trousseau of provider hsm") && line.contains("this is another key");
    plugin.wait_until("the log names it", |plugin| {
        plugin.round_trip();
        plugin.log().lines().any(is_named)
    });
    plugin.status().unwrap();
    plugin.decrypt(&sealed, &key_id).unwrap();
}
