//! Calls that do not return, and a module that crashes: nobody waits past a deadline, and what cannot be mended in the
//! process is mended by a new one.

use std::fs;
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use serde_json::Value;
use tonic::Code;
use trousseau::service::client::ClientError;

use crate::caller::{Caller, Ends, Load};
use crate::family::Family;
use crate::fault_module::{Faults, library};
use crate::faults::without_sessions;
use crate::plugin::{Host, Plugin};
use crate::replicas;
use crate::supervisor::Supervisor;

const HANG: &str = "C_Encrypt hang\nC_Decrypt hang";
/// The service's own deadline, with what a busy machine adds.
pub const DEADLINE: Duration = Duration::from_millis(3_300);
/// A Status beside calls that hang, and how soon it says so.
const STATUS: Duration = Duration::from_secs(1);
const NOTICED: Duration = Duration::from_secs(2);
/// What a message to systemd may take.
const ON_ITS_WAY: Duration = Duration::from_millis(20);
/// From the end of a process to the first answer of the next, the supervisor's half second included.
const BACK: Duration = Duration::from_secs(2);
/// From the start to the first answer while another token's slot hangs: a second for the slot, and a busy machine's.
const CONNECTED: Duration = Duration::from_secs(10);
/// What `pin retry` waits for a module, with what a busy machine adds.
const PIN_RETRY: Duration = Duration::from_secs(18);
/// From SIGTERM to the end: at most five seconds for what was accepted, and three for the calls, on a busy machine.
pub const STOPPED: Duration = Duration::from_secs(10);

fn host(sessions: usize) -> Host {
    let mut host = Host::new().with_mode("gcm");
    host.sessions = sessions;
    host.generate("0s");
    host
}

fn outage(answer: Result<(), ClientError>) -> Code {
    match answer {
        Err(ClientError::Answer { status, .. }) => status.code(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn when_no_call_returns_a_new_process_comes() {
    a_new_process_comes(HANG, "4 calls do not return");
}

#[test]
fn when_no_call_returns_and_the_token_has_no_session_left_a_new_process_comes() {
    // One holds the login: to two workers or, at first, the leader it gives one each.
    a_new_process_comes(&format!("C_OpenSession limit 3\n{HANG}"), "2 calls do not return");
}

fn a_new_process_comes(rules: &str, says: &str) {
    if Family::chosen().is_slower_than(100) {
        return;
    }
    let Some(library) = library() else { return };
    let host = host(2);
    let faults = Faults { host: &host, library: &library };
    let supervisor = Supervisor::start(&host, &faults.command());
    let mut caller = Caller::new(&supervisor.socket);
    let (sealed, key_id) = caller.encrypt(b"a").unwrap();
    caller.status().unwrap(); // which waits for the first look
    faults.set(rules);
    let (began, ended) = (Instant::now(), AtomicBool::new(false));
    let until_the_end = |ask: &dyn Fn(&mut Caller)| {
        let mut caller = Caller::new(&supervisor.socket);
        while !ended.load(Ordering::Relaxed) {
            ask(&mut caller);
        }
    };
    let noticed = Mutex::new(None);
    let end = thread::scope(|scope| {
        let _ends = Ends(&ended);
        for _ in 0..6 {
            scope.spawn(|| {
                until_the_end(&|caller| {
                    let asked = Instant::now();
                    let answer = caller.encrypt(b"b").map(drop);
                    // The last one may have been answered by the next process.
                    if supervisor.ends().is_empty() {
                        assert!(asked.elapsed() < DEADLINE, "an answer after {:?}: {answer:?}", asked.elapsed());
                        let code = outage(answer);
                        assert!(matches!(code, Code::DeadlineExceeded | Code::Unavailable), "{code:?}");
                    }
                    thread::sleep(Duration::from_millis(20)); // a peer, and no flood
                });
            });
        }
        scope.spawn(|| {
            until_the_end(&|caller| {
                let asked = Instant::now();
                let status = caller.status();
                if supervisor.ends().is_empty() {
                    assert!(asked.elapsed() < STATUS, "a Status after {:?}", asked.elapsed());
                    match status {
                        Ok(_) => assert!(asked - began < NOTICED, "well after {:?}", asked - began),
                        Err(_) => drop(noticed.lock().unwrap().get_or_insert(asked - began)),
                    }
                }
                thread::sleep(Duration::from_millis(20));
            });
        });
        let end = supervisor.end_after(0);
        faults.set("");
        end
    });
    assert_eq!(end.status.code(), Some(69));
    assert!(supervisor.log().contains(says), "the log says why: {}", supervisor.log());
    eprintln!("hang: noticed {:?}, left after {:?}", noticed.lock().unwrap(), end.at - began);
    is_back("hang", &supervisor, end.at, &sealed, &key_id);
}

#[test]
fn the_watchdog_is_not_fed_from_when_systemd_hears_that_no_call_returns() {
    if Family::chosen().is_slower_than(100) {
        return;
    }
    let Some(library) = library() else { return };
    let host = host(2);
    let heard = UnixDatagram::bind(host.path("notify.sock")).unwrap();
    heard.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    let faults = Faults { host: &host, library: &library };
    let mut command = faults.command();
    command.env("NOTIFY_SOCKET", host.path("notify.sock")).env("WATCHDOG_USEC", "4000");
    let (fed, ended) = (Mutex::new(Vec::new()), AtomicBool::new(false));
    let (hangs_since, log) = thread::scope(|scope| {
        let _ends = Ends(&ended);
        // All the time: the kernel keeps a few messages, and whoever sends more waits.
        scope.spawn(|| {
            let mut message = [0; 4096];
            loop {
                match heard.recv(&mut message) {
                    Ok(_) if !message.starts_with(b"WATCHDOG=1") => (),
                    Ok(_) => fed.lock().unwrap().push(Timestamp::now()),
                    Err(_) if ended.load(Ordering::Relaxed) => break,
                    Err(_) => (),
                }
            }
        });
        let plugin = faults.start_healthy(command);
        let (sealed, key_id) = plugin.round_trip();
        faults.set(HANG);
        let hangs_since = Timestamp::now();
        for _ in 0..6 {
            scope.spawn(|| {
                let mut caller = Caller::new(&host.path("kms.sock"));
                while !ended.load(Ordering::Relaxed) {
                    drop(caller.encrypt(b"b"));
                    thread::sleep(Duration::from_millis(20));
                }
            });
        }
        let (status, log) = plugin.ends_by(&sealed, &key_id);
        assert_eq!(status.code(), Some(69));
        (hangs_since, log)
    });
    let is_why = |line: &&str| line.contains("no call into the module returns") || line.contains("calls do not return");
    let why = log.lines().find(is_why).unwrap_or_else(|| panic!("the log does not say why: {log}"));
    let told: Timestamp = serde_json::from_str::<Value>(why).unwrap()["timestamp"].as_str().unwrap().parse().unwrap();
    let fed = fed.into_inner().unwrap();
    let count = |from, to| fed.iter().filter(|at| (from..to).contains(*at)).count();
    let (before, after) = (count(hangs_since, told), count(told + ON_ITS_WAY, Timestamp::MAX));
    eprintln!("while calls hang the watchdog is fed {before} times, and {after} times after {why}");
    assert!(before > 100, "it is fed for as long as a call may return: {before}");
    assert_eq!(after, 0, "after {why}");
}

#[test]
fn when_the_module_crashes_a_new_process_comes() {
    if Family::chosen().is_slower_than(100) {
        return;
    }
    let Some(library) = library() else { return };
    let host = host(2);
    let faults = Faults { host: &host, library: &library };
    let supervisor = Supervisor::start(&host, &faults.command());
    let mut caller = Caller::new(&supervisor.socket);
    let (sealed, key_id) = caller.encrypt(b"a").unwrap();
    for crash in 0..3 {
        faults.set("C_Encrypt crash");
        thread::scope(|scope| {
            // It sees an error, or is answered by the next process.
            scope.spawn(|| drop(Caller::new(&supervisor.socket).encrypt(b"b")));
            let end = supervisor.end_after(crash);
            faults.set("");
            assert_eq!(end.status.signal(), Some(6), "{end:?}");
            is_back("crash", &supervisor, end.at, &sealed, &key_id);
        });
    }
}

/// The next process is well, and opens what the one before has sealed.
fn is_back(what: &str, supervisor: &Supervisor, ended: Instant, sealed: &[u8], key_id: &str) {
    let mut caller = Caller::new(&supervisor.socket);
    while let Err(error) = caller.encrypt(b"c") {
        assert!(ended.elapsed() < BACK, "{what}: {error}");
    }
    eprintln!("{what}: back {:?} after the end", ended.elapsed());
    assert!(ended.elapsed() < BACK, "{what}: back after {:?}", ended.elapsed());
    assert_eq!(caller.decrypt(sealed, key_id).unwrap(), b"a");
}

#[test]
fn a_session_whose_call_hangs_is_replaced_until_it_returns() {
    if Family::chosen().is_slower_than(100) {
        return;
    }
    let Some(library) = library() else { return };
    let host = host(4);
    let faults = Faults { host: &host, library: &library };
    let mut plugin = faults.serve_healthy();
    let socket = plugin.socket.clone();
    let requests = (Mutex::default(), AtomicBool::new(false));
    thread::scope(|scope| {
        let load = Load::begin(scope, &requests, &socket, 4);
        load.goes_on(400);
        let before = threads(plugin.pid());
        // One hangs where the plugin calls a quick token itself, the other in a session thread.
        faults.set("C_Encrypt hang times 2");
        plugin.wait_until("it is replaced", |plugin| {
            plugin.log().contains("a call does not return: another session takes its place")
        });
        load.goes_on(400);
        plugin.status().unwrap();
        faults.set("");
        plugin.wait_until("the one too many ends", |plugin| threads(plugin.pid()) <= before);
        let failed: Vec<_> = load.end().into_iter().filter(|request| request.outcome.is_err()).collect();
        assert_eq!(failed.len(), 2, "{failed:?}");
        assert!(failed.iter().all(|request| request.took < DEADLINE), "{failed:?}");
    });
}

#[test]
fn a_call_that_others_have_overtaken_does_not_make_the_token_hung() {
    if Family::chosen().is_slower_than(100) {
        return;
    }
    let Some(library) = library() else { return };
    let host = host(4);
    let faults = Faults { host: &host, library: &library };
    let mut plugin = faults.serve_healthy();
    faults.set("C_Encrypt hang times 1");
    plugin.encrypt(b"b").unwrap_err();
    plugin.wait_until("another session serves", |plugin| plugin.encrypt(b"b").is_ok());
    // Longer than a token may be silent, and nobody asks it anything meanwhile.
    let began = Instant::now();
    while began.elapsed() < NOTICED {
        plugin.status().unwrap();
        thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn a_slot_that_hangs_keeps_no_other_token_away() {
    let Some(library) = library() else { return };
    let Some(host) = replicas::host() else { return };
    let faults = Faults { host: &host, library: &library };
    let hang = "C_GetTokenInfo hang token second";
    faults.set(hang);
    let began = Instant::now();
    let mut plugin = faults.serve_healthy();
    eprintln!("connected beside a slot that hangs: {:?}", began.elapsed());
    assert!(began.elapsed() < CONNECTED, "{:?}", began.elapsed());
    plugin.round_trip();
    let before = threads(plugin.pid());
    for lost in 0..3 {
        faults.set(&format!("{hang}\nC_EncryptInit return CKR_DEVICE_REMOVED token trousseau after {lost} times 1"));
        drop(plugin.encrypt(b"a"));
        let mended = Instant::now();
        plugin.wait_until("it is connected to again", |plugin| plugin.encrypt(b"a").is_ok());
        assert!(mended.elapsed() < CONNECTED, "{:?}", mended.elapsed());
    }
    plugin.wait_until("one thread waits for the slot", |plugin| threads(plugin.pid()) <= before);
    assert!(plugin.log().contains("does not answer"), "the log says which slot hangs");
    faults.set("* return CKR_DEVICE_ERROR token trousseau");
    plugin.wait_until("the other one serves", |plugin| plugin.encrypt(b"a").is_ok());
}

#[test]
fn a_slot_that_takes_longer_than_others_wait_for_it_is_connected_to_all_the_same() {
    let Some(library) = library() else { return };
    let host = host(2);
    let faults = Faults { host: &host, library: &library };
    faults.set("C_GetTokenInfo delay 1300ms");
    faults.serve_healthy().round_trip();
}

#[test]
fn pin_retry_does_not_wait_for_ever() {
    let Some(library) = library() else { return };
    let host = Host::new();
    let faults = Faults { host: &host, library: &library };
    faults.set("C_GetSlotList hang");
    let began = Instant::now();
    let done = faults.verb(&["pin", "retry"]).output().unwrap();
    let said = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.code() == Some(69) && said.contains("its module has not answered for 15 s"), "{said}");
    assert!(began.elapsed() < PIN_RETRY, "{:?}", began.elapsed());
}

fn threads(pid: u32) -> usize {
    fs::read_dir(Path::new("/proc").join(pid.to_string()).join("task")).unwrap().count()
}

#[test]
fn sigterm_ends_a_process_whose_calls_hang() {
    let Some(library) = library() else { return };
    let host = host(2);
    let faults = Faults { host: &host, library: &library };
    let mut plugin = faults.serve_healthy();
    faults.set(&format!("{HANG}\nC_CloseSession hang"));
    thread::scope(|scope| {
        for _ in 0..3 {
            let mut caller = Caller::new(&plugin.socket);
            scope.spawn(move || assert_eq!(outage(caller.encrypt(b"b").map(drop)), Code::DeadlineExceeded));
        }
        plugin.wait_until("they hang", |plugin| plugin.status().is_err());
        let began = Instant::now();
        assert_eq!(plugin.stop().code(), Some(0));
        eprintln!("SIGTERM while calls hang: {:?}", began.elapsed());
        assert!(began.elapsed() < STOPPED, "{:?}", began.elapsed());
    });
}

#[test]
fn sigterm_ends_a_process_whose_library_does_not_come_to_its_end() {
    if Family::chosen().ends_with_its_token() {
        return;
    }
    let Some(library) = library() else { return };
    let host = host(2);
    let faults = Faults { host: &host, library: &library };
    let mut plugin = faults.start_healthy(faults.command_with_log("calls"));
    let (sealed, key_id) = plugin.round_trip();
    let decrypt = |plugin: &Plugin| plugin.decrypt(&sealed, &key_id).map(drop);
    // The second time within a minute the library is not given up for it, and nobody has a session at the end.
    let lost = without_sessions("CKR_SESSION_COUNT");
    faults.set(&lost);
    plugin.wait_until("it is finalized", |plugin| {
        let _while_it_gives_none = decrypt(plugin);
        fs::read_to_string(host.path("calls")).unwrap().contains("C_Finalize ")
    });
    faults.set("");
    plugin.wait_until("it is back", |plugin| decrypt(plugin).is_ok());
    faults.set(&format!("{lost}\nC_Finalize hang"));
    plugin.wait_until("nobody has a session", |plugin| {
        decrypt(plugin).is_err_and(|answer| answer.message.contains("C_OpenSession answered"))
    });
    thread::scope(|scope| {
        let (ended, end) = mpsc::channel();
        scope.spawn(move || {
            let _in_time = end.recv_timeout(2 * STOPPED);
            faults.set("");
        });
        let began = Instant::now();
        assert_eq!(plugin.stop().code(), Some(0));
        eprintln!("SIGTERM while C_Finalize hangs: {:?}", began.elapsed());
        assert!(began.elapsed() < STOPPED, "{:?}", began.elapsed());
        ended.send(()).unwrap();
    });
}
