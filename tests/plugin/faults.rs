//! A token that fails: what a request sees of it, and that it is in use again once it is well.

use std::cell::RefCell;
use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use jiff::{SignedDuration, Timestamp};
use tonic::Code;

use crate::family::Family;
use crate::fault_module::{Faults, library};
use crate::plugin::{Answer, Host, Plugin, admit};
use crate::scenarios::Sees::{Error, Nothing};
use crate::scenarios::{SCENARIOS, Scenario};
use crate::token::Key;

/// A session that somebody else had is there again after so long, however busy the machine is.
const HEALED_WITHIN: Duration = Duration::from_secs(5);

/// A KEK waits for its instant so long: a busy machine has lost its token and found it again by then.
const WAITS: SignedDuration = SignedDuration::from_secs(20);

const SEED: &[u8] = b"thirty-two bytes of a fresh seed";

#[test]
fn faults_of_the_token_are_seen_for_what_they_are_and_pass_with_their_cause() {
    // A request that fails, and is made again, has its deadline all the same.
    if Family::chosen().ends_with_its_token() || Family::chosen().is_slower_than(100) {
        return;
    }
    let Some(library) = library() else { return };
    let mut failed = Vec::new();
    // Most of the time they wait.
    let modes = Family::chosen().modes();
    // The others are played in whatever mode the token has.
    let applies = |scenario: &&Scenario| scenario.mode != "wrapkey" || modes.contains(&"wrapkey");
    let scenarios: Vec<_> = SCENARIOS.iter().filter(applies).collect();
    for some in scenarios.chunks(4) {
        thread::scope(|scope| {
            let played: Vec<_> =
                some.iter().map(|scenario| (scenario.name, scope.spawn(|| play(scenario, &library)))).collect();
            failed.extend(played.into_iter().filter_map(|(name, thread)| thread.join().is_err().then_some(name)));
        });
    }
    assert!(failed.is_empty(), "{failed:?}");
}

fn play(scenario: &Scenario, library: &Path) {
    let host = Host::new().with_mode(scenario.mode);
    let faults = Faults { host: &host, library };
    host.generate("0s");
    let mut plugin = faults.serve_quiet();
    let (sealed, key_id) = plugin.round_trip();
    let acknowledged = RefCell::new(Vec::new());

    type Request<'a> = &'a dyn Fn(&Plugin) -> Result<(), Answer>;
    let encrypt: Request = &|plugin| plugin.encrypt(SEED).map(|sealed| acknowledged.borrow_mut().push(sealed));
    let decrypt: Request = &|plugin| plugin.decrypt(&sealed, &key_id).map(|opened| assert_eq!(opened, SEED));
    let calls = if scenario.mode == "wrapkey" { ["Wrap", "Unwrap"] } else { ["Encrypt", "Decrypt"] };
    for (call, request, sees) in [(calls[0], encrypt, scenario.encrypt), (calls[1], decrypt, scenario.decrypt)] {
        faults.wait_until_quiet(); // the rules count calls
        faults.set(&scenario.rules.replace("{}", call));
        let seen = request(&plugin);
        match (sees, &seen) {
            (Nothing, Ok(())) => (),
            (Error(code), Err(answer)) if answer.code == code => (),
            _ => panic!("{}: {call}: {seen:?}", scenario.name),
        }
        let asked = Instant::now();
        drop(plugin.status());
        assert!(asked.elapsed() < Duration::from_secs(2), "{}: Status waits for the token", scenario.name);
        faults.set("");
        let mended = Instant::now();
        plugin.wait_until(scenario.name, |plugin| plugin.status().is_ok() && decrypt(plugin).is_ok());
        let healed = mended.elapsed();
        eprintln!("{}: {call}: healed after {healed:?}, of {:?}", scenario.name, scenario.heals_within);
        assert!(healed < scenario.heals_within, "{}: {call}: healed after {healed:?}", scenario.name);
        plugin.round_trip();
    }
    for (sealed, key_id) in acknowledged.take() {
        assert_eq!(plugin.decrypt(&sealed, &key_id).as_deref(), Ok(SEED), "{}", scenario.name);
    }
}

#[test]
fn a_token_with_one_session_for_us_serves_whoever_had_it_before() {
    if Family::chosen().needs_two_sessions()
        || Family::chosen().ends_with_its_token()
        || Family::chosen().is_slower_than(1000)
    {
        return;
    }
    let Some(library) = library() else { return };
    let host = Host::new().with_mode("gcm");
    let faults = Faults { host: &host, library: &library };
    host.generate("0s");
    let mut plugin = faults.serve_healthy();
    let (sealed, key_id) = plugin.round_trip();
    let decrypt = |plugin: &Plugin| plugin.decrypt(&sealed, &key_id).is_ok();
    for round in 0..5 {
        faults.set("");
        plugin.wait_until("it is healthy", |plugin| plugin.encrypt(SEED).is_ok());
        // Until the token is called quick: then the thread that leads makes the calls.
        assert!((0..600).all(|_| decrypt(&plugin)), "{round}");
        faults.set("C_OpenSession limit 2\nC_Encrypt return CKR_DEVICE_REMOVED times 1");
        // Whoever comes first when the token is there again has the session: the leader, or a worker with a look.
        let lost = Instant::now();
        let seen = thread::scope(|scope| {
            let loses = scope.spawn(|| plugin.encrypt(SEED));
            let until = lost + Duration::from_millis(300);
            let (decrypt, plugin) = (&decrypt, &plugin);
            for _ in 0..4 {
                scope.spawn(move || {
                    while Instant::now() < until {
                        let _lost_for_a_moment = decrypt(plugin);
                    }
                });
            }
            loses.join()
        });
        plugin.wait_until("it serves", decrypt);
        assert!(lost.elapsed() < HEALED_WITHIN, "{round}: {seen:?} after {:?}", lost.elapsed());
        assert!((0..100).all(|_| decrypt(&plugin)), "{round}");
        plugin.round_trip();
    }
    assert!(plugin.status().is_ok());
}

#[test]
fn what_a_token_says_of_one_value_alone_does_not_change_what_status_says() {
    if Family::chosen().lacks_aes() {
        return;
    }
    let Some(library) = library() else { return };
    let host = Host::new().with_mode("wrapkey");
    let faults = Faults { host: &host, library: &library };
    host.generate("0s");
    let plugin = faults.serve_quiet();
    let (sealed, key_id) = plugin.round_trip();
    // Between the two the KEK opens its reference.
    for (n, code) in ["CKR_DEVICE_REMOVED", "CKR_TOKEN_NOT_PRESENT", "CKR_MUTEX_BAD"].iter().enumerate() {
        // The counts belong to a line's text.
        faults.set(&format!(
            "C_UnwrapKey return {code} times 1
             C_UnwrapKey return {code} after 1 times 1"
        ));
        assert_eq!(plugin.decrypt(&sealed, &key_id).unwrap_err().code, Code::Unavailable, "{n} {code}");
        plugin.status().unwrap();
    }
    plugin.decrypt(&sealed, &key_id).unwrap();
}

#[test]
fn a_module_that_failed_to_initialize_half_way_is_initialized_anew() {
    if Family::chosen().ends_with_its_token() {
        return;
    }
    let Some(library) = library() else { return };
    let host = Host::new();
    host.generate("0s");
    let faults = Faults { host: &host, library: &library };
    faults.set("C_Initialize half-way CKR_USER_PIN_NOT_INITIALIZED times 1");
    faults.serve_healthy().round_trip();
}

#[test]
fn a_module_that_was_finalized_although_it_says_otherwise_is_initialized_anew() {
    if Family::chosen().ends_with_its_token() {
        return;
    }
    let Some(library) = library() else { return };
    let host = Host::new();
    host.generate("0s");
    let faults = Faults { host: &host, library: &library };
    let mut plugin = faults.serve_quiet();
    let (sealed, key_id) = plugin.round_trip();
    // Whichever its mode calls.
    faults.set(
        "C_UnwrapKey return CKR_CRYPTOKI_NOT_INITIALIZED times 2
         C_Decrypt return CKR_CRYPTOKI_NOT_INITIALIZED times 2
         C_Finalize half-way CKR_DEVICE_REMOVED times 1",
    );
    let _while_it_is_away = plugin.decrypt(&sealed, &key_id);
    plugin.wait_until("it was away", |plugin| plugin.log().contains("was lost"));
    plugin.wait_until("it is back", |plugin| plugin.decrypt(&sealed, &key_id).is_ok());
}

#[test]
fn status_fails_as_long_as_encrypt_does_though_decrypt_works() {
    if Family::chosen().lacks_aes() {
        return;
    }
    let Some(library) = library() else { return };
    for (rules, says) in [
        ("C_WrapKey return CKR_KEY_FUNCTION_NOT_PERMITTED", "NOT_PERMITTED"),
        // Longer than the API server waits.
        ("C_WrapKey delay 3400ms", "did not answer in time"),
    ] {
        let host = Host::new().with_mode("wrapkey");
        let faults = Faults { host: &host, library: &library };
        host.generate("0s");
        let plugin = faults.serve_healthy();
        let (sealed, key_id) = plugin.round_trip();
        drop(plugin);
        faults.set(rules);
        let mut plugin = host.start(faults.command());
        let is_told = |plugin: &Plugin| plugin.status().is_err_and(|answer| answer.message.contains(says));
        plugin.wait_until("Status says so", |plugin| plugin.decrypt(&sealed, &key_id).is_ok() && is_told(plugin));
        for _ in 0..20 {
            let _as_ever = plugin.decrypt(&sealed, &key_id);
            assert!(plugin.status().is_err(), "{rules}");
        }
        faults.set("");
        plugin.wait_until("it is well", |plugin| plugin.status().is_ok());
    }
}

#[test]
fn a_login_that_is_lost_again_ends_the_connection() {
    if Family::chosen().ends_with_its_token() || Family::chosen().lacks_aes() {
        return;
    }
    let Some(library) = library() else { return };
    let host = Host::new().with_mode("gcm");
    let faults = Faults { host: &host, library: &library };
    host.generate("0s");
    let plugin = faults.serve_quiet();
    // The library keeps it until C_Finalize; so does this, twice.
    faults.set("C_Encrypt return CKR_USER_NOT_LOGGED_IN times 2");
    plugin.encrypt(SEED).unwrap();
    assert!(plugin.log().contains("was lost: C_Encrypt answered CKR_USER_NOT_LOGGED_IN"), "{}", plugin.log());
}

#[test]
fn a_kek_without_a_good_handle_keeps_no_other_away() {
    if Family::chosen().ends_with_its_token() || Family::chosen().lacks_aes() {
        return;
    }
    let Some(library) = library() else { return };
    let host = Host::new().with_mode("gcm");
    host.generate("0s");
    let plugin = Faults { host: &host, library: &library }.serve_healthy();
    let (sealed, key_id) = plugin.round_trip();
    drop(plugin);
    let host = host.with_mode("wrapkey");
    host.generate("0s");
    let faults = Faults { host: &host, library: &library };
    faults.set("C_DecryptInit return CKR_KEY_HANDLE_INVALID");
    let mut plugin = faults.serve_healthy();
    plugin.round_trip();
    assert_eq!(plugin.decrypt(&sealed, &key_id).unwrap_err().code, Code::Unavailable);
    faults.set("");
    plugin.wait_until("the other one is back", |plugin| plugin.decrypt(&sealed, &key_id).is_ok());
}

/// Every session is lost, and C_OpenSession answers so.
pub fn without_sessions(code: &str) -> String {
    format!(
        "C_DecryptInit return CKR_SESSION_CLOSED
         C_UnwrapKey return CKR_SESSION_CLOSED
         C_OpenSession return {code}"
    )
}

/// As one does that keeps what it knew of an HSM that was started anew.
#[test]
fn a_library_that_gives_nobody_a_session_any_more_is_initialized_anew() {
    if Family::chosen().ends_with_its_token() {
        return;
    }
    let Some(library) = library() else { return };
    for code in ["CKR_SESSION_COUNT", "CKR_HOST_MEMORY", "CKR_USER_NOT_LOGGED_IN"] {
        let host = Host::new();
        host.generate("0s");
        let faults = Faults { host: &host, library: &library };
        let mut plugin = faults.start_healthy(faults.command_with_log("calls"));
        let (sealed, key_id) = plugin.round_trip();
        faults.set(&without_sessions(code));
        plugin.wait_until(code, |plugin| {
            let _while_it_gives_none = plugin.decrypt(&sealed, &key_id);
            fs::read_to_string(host.path("calls")).unwrap().contains("C_Finalize ")
        });
        faults.set("");
        plugin.wait_until("it is back", |plugin| plugin.decrypt(&sealed, &key_id).is_ok());
    }
}

#[test]
fn a_library_that_gives_nobody_a_session_and_must_not_be_initialized_again_ends_the_process() {
    if Family::chosen().ends_with_its_token() {
        return; // its profile says so too
    }
    let Some(library) = library() else { return };
    let host = Host::new();
    host.generate("0s");
    host.write_profile("reinitialize = false");
    let faults = Faults { host: &host, library: &library };
    let plugin = faults.serve_healthy();
    let (sealed, key_id) = plugin.round_trip();
    faults.set(&without_sessions("CKR_SESSION_COUNT"));
    let (status, log) = plugin.ends_by(&sealed, &key_id);
    assert_eq!(status.code(), Some(69), "{log}");
}

#[test]
fn status_asks_the_token_nothing() {
    let Some(library) = library() else { return };
    let host = Host::new();
    host.generate("0s");
    let plugin = Faults { host: &host, library: &library }.serve_quiet();
    let calls = || fs::read_to_string(host.path("calls")).unwrap().lines().count();
    let before = calls();
    for _ in 0..100 {
        plugin.status().unwrap();
    }
    assert_eq!(calls(), before);
}

fn of_value(id: &[u8], value: u8) -> Key {
    Key { value: Some(vec![value; 32]), ..Key::generated(id, "trousseau-test") }
}

#[test]
fn what_failed_with_a_kek_while_it_waited_is_not_said_of_it_when_it_is_active() {
    if Family::chosen().ends_with_its_token() || Family::chosen().lacks_aes() {
        return;
    }
    let Some(library) = library() else { return };
    let mut host = Host::new();
    host.token.make_keys(&[of_value(b"first", 1), of_value(b"second", 2)]);
    // To another host it is active already.
    let mut other = host.other_host();
    other.extra = admit(b"first") + &admit(b"second");
    let (sealed, key_id) = other.serve_healthy().round_trip();
    let instant = Timestamp::now() + WAITS;
    host.extra = admit(b"first") + &admit(b"second").replace("2026-01-01T00:00:00Z", &instant.to_string());

    let faults = Faults { host: &host, library: &library };
    let mut plugin = faults.serve_healthy();
    let first = plugin.status().unwrap().key_id;
    faults.set("* return CKR_DEVICE_REMOVED");
    assert_eq!(plugin.decrypt(&sealed, &key_id).unwrap_err().code, Code::Unavailable);
    faults.set("");
    plugin.wait_until("it is well", |plugin| plugin.status().is_ok() && plugin.encrypt(SEED).is_ok());
    assert!(Timestamp::now() < instant, "it waits");
    // Whenever it is asked.
    while plugin.status().unwrap().key_id == first {
        thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(plugin.decrypt(&sealed, &key_id).as_deref(), Ok(SEED));
}

#[test]
fn a_token_that_comes_back_with_another_key_under_the_id_is_refused() {
    if Family::chosen().ends_with_its_token() || Family::chosen().lacks_aes() {
        return;
    }
    let Some(library) = library() else { return };
    let mut host = Host::new();
    host.extra = admit(b"kek");
    host.token.make_keys(&[of_value(b"kek", 1)]);
    let faults = Faults { host: &host, library: &library };
    let mut plugin = faults.serve_healthy();
    let (sealed, key_id) = plugin.round_trip();
    let exchanges = |plugin: &mut Plugin, value: u8| {
        faults.set("* return CKR_DEVICE_REMOVED");
        plugin.wait_until("it is away", |plugin| plugin.encrypt(SEED).is_err());
        host.token.remove_key(b"kek");
        host.token.make_keys(&[of_value(b"kek", value)]);
        faults.set("");
    };
    exchanges(&mut plugin, 2);
    plugin.wait_until("Status says so", |plugin| {
        plugin
            .status()
            .is_err_and(|answer| answer.message.contains("another key than the one that this host first saw"))
    });
    assert_eq!(plugin.encrypt(SEED).unwrap_err().code, Code::Unavailable);
    assert_eq!(plugin.decrypt(&sealed, &key_id).unwrap_err().code, Code::Unavailable);
    exchanges(&mut plugin, 1);
    plugin.wait_until("the right one is used", |plugin| plugin.status().is_ok());
    assert_eq!(plugin.decrypt(&sealed, &key_id).as_deref(), Ok(SEED));
}

#[test]
fn a_kek_is_known_although_a_bit_of_its_reference_flips_once() {
    let Some(library) = library() else { return };
    let host = Host::new().with_mode("gcm");
    host.generate("0s");
    host.serve_healthy().round_trip(); // from now on it has a reference
    let faults = Faults { host: &host, library: &library };
    faults.set("C_Decrypt flip times 1");
    let plugin = faults.serve_healthy();
    plugin.round_trip();
    assert!(!plugin.log().contains("another key"), "{}", plugin.log());
}
