//! A token that does not answer: the queue is bounded, deadlines hold, and what was accepted is answered.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, fcntl_lock};
use tonic::Code;

use crate::family::Family;
use crate::fault_module::{Faults, library};
use crate::hangs::{DEADLINE, STOPPED};
use crate::plugin::{Answer, Host};
use crate::v1beta1;

/// Places in the queue for each session.
const QUEUE: usize = 64;
/// Peers at one moment, fewer than are let in.
const CROWD: usize = 240;

/// SoftHSM waits for locks on its files; whoever holds them holds its calls up. Ends when this is dropped.
fn hold_up(host: &Host) -> Vec<OwnedFd> {
    let mut held = Vec::new();
    let tokens = std::fs::read_dir(host.token.data()).unwrap();
    for file in tokens.flat_map(|token| std::fs::read_dir(token.unwrap().path()).unwrap()) {
        let file = File::options().read(true).write(true).open(file.unwrap().path()).unwrap();
        fcntl_lock(&file, FlockOperation::LockExclusive).unwrap();
        held.push(file.into());
    }
    held
}

/// `None`: its token cannot be held up; this says so.
fn host_with_one_session() -> Option<Host> {
    if Family::chosen() != Family::SoftHsm {
        eprintln!("skipped: only SoftHSM can be held up, by the locks on its files");
        return None;
    }
    let mut host = Host::new();
    host.generate("0s");
    host.sessions = 1;
    Some(host)
}

#[test]
fn a_full_queue_answers_at_once_and_the_rest_when_its_time_is_up() {
    let Some(host) = host_with_one_session() else { return };
    let plugin = host.serve_healthy();
    plugin.round_trip();
    let held = hold_up(&host);
    let began = Instant::now();
    let answers = plugin.encrypt_at_once(QUEUE + 40);
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    let count = |code| answers.iter().filter(|answer| answer.as_ref().is_err_and(|answer| answer.code == code)).count();
    let (late, shed) = (count(Code::DeadlineExceeded), count(Code::ResourceExhausted));
    assert_eq!(late + shed, answers.len(), "{answers:?}");
    assert!((QUEUE..=QUEUE + 2).contains(&late), "{late} waited for the one session");
    drop(held);
    plugin.round_trip();
}

#[test]
fn of_more_than_a_slow_token_can_serve_in_time_those_accepted_are_served_and_the_others_refused() {
    // Half a second each, since one asks for the length: in the time that all have, four sessions serve some twenty.
    const CALLS: &str = "C_Encrypt delay 250ms";
    if Family::chosen().is_slower_than(1000) {
        return;
    }
    let Some(library) = library() else { return };
    let mut host = Host::new().with_mode("gcm");
    host.generate("0s");
    host.sessions = 4;
    let faults = Faults { host: &host, library: &library };
    let plugin = faults.serve_healthy();
    // It takes some forty calls until it is known how long one takes.
    for calls in ["C_Encrypt delay 50ms", CALLS] {
        faults.set(calls);
        for _ in 0..4 {
            plugin.encrypt_at_once(10);
        }
    }
    let answers = plugin.encrypt_at_once_timed(CROWD);
    let served = answers.iter().filter(|(answer, _)| answer.is_ok()).count();
    let is_refused =
        |answer: &Result<(), Answer>| answer.as_ref().is_err_and(|answer| answer.code == Code::ResourceExhausted);
    let refused: Vec<_> = answers.iter().filter(|(answer, _)| is_refused(answer)).map(|(_, took)| *took).collect();
    let slowest = answers.iter().map(|(_, took)| *took).max().unwrap();
    let last_refused = refused.iter().max().copied().unwrap_or_default();
    eprintln!("{served} served, {} refused by {last_refused:?}, the last after {slowest:?}", refused.len());
    let others: Vec<_> = answers.iter().filter(|(answer, _)| answer.is_err() && !is_refused(answer)).collect();
    assert!(others.is_empty(), "{others:?}");
    assert!(served > 10 && refused.len() > 100, "{served} served, {} refused", refused.len());
    // By then all had come.
    assert!(slowest < last_refused + DEADLINE, "an answer after {slowest:?}");
}

#[test]
fn a_quick_token_that_stops_answering_holds_up_its_own_callers_alone() {
    let Some(host) = host_with_one_session() else { return };
    let plugin = host.serve_healthy();
    for _ in 0..100 {
        plugin.round_trip(); // by now the thread that serves the socket calls the token itself
    }
    let held = hold_up(&host);
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| plugin.encrypt_at_once(5));
        let (mut slowest, mut last) = (Duration::ZERO, Ok(()));
        while !waiting.is_finished() {
            let began = Instant::now();
            last = plugin.status().map(|_| ());
            slowest = slowest.max(began.elapsed());
        }
        assert!(slowest < Duration::from_secs(1), "a Status took {slowest:?}");
        let last = last.unwrap_err();
        assert_eq!(last.code, Code::Unavailable);
        assert!(last.message.contains("no call has come back"), "{}", last.message);
        let answers = waiting.join().unwrap();
        assert!(
            answers.iter().all(|answer| answer.as_ref().is_err_and(|answer| answer.code == Code::DeadlineExceeded))
        );
    });
    drop(held);
    plugin.round_trip();
}

#[test]
fn a_peer_that_goes_away_in_the_middle_of_its_call_frees_its_place() {
    let Some(host) = host_with_one_session() else { return };
    let plugin = host.serve_healthy();
    plugin.round_trip();
    let held = hold_up(&host);
    // Each crowd would fill the queue by itself, if those before it had not left it.
    for _ in 0..3 {
        plugin.encrypt_and_leave(QUEUE - 4);
    }
    drop(held);
    plugin.round_trip();
}

#[test]
fn identical_decrypts_share_one_call_whoever_of_them_leaves() {
    let Some(host) = host_with_one_session() else { return };
    let plugin = host.serve_healthy_and_talkative();
    let (ciphertext, key_id) = plugin.round_trip();
    let held = hold_up(&host);
    // More than the queue has room for, if each of them took a place.
    let answers = plugin.decrypt_together(QUEUE + 40, &ciphertext, &key_id, || drop(held));
    assert_eq!(answers.len(), (QUEUE + 40) / 2);
    for answer in answers {
        assert_eq!(answer.unwrap(), b"thirty-two bytes of a fresh seed");
    }
    assert_eq!(plugin.log().matches("its answer is shared").count(), QUEUE + 39, "one call and no second");
    plugin.round_trip();
}

#[test]
fn sigterm_answers_what_was_accepted() {
    let Some(host) = host_with_one_session() else { return };
    let plugin = host.serve_healthy();
    plugin.round_trip();
    let held = hold_up(&host);
    let socket = plugin.socket.clone();
    let (answers, status) = plugin.stop_while_encrypting(20, || drop(held));
    let answered = answers.iter().filter(|answer| answer.is_ok()).count();
    assert_eq!(answered, answers.len(), "{answers:?}");
    assert_eq!(status.code(), Some(0));
    assert!(!socket.exists());
}

#[test]
fn sigterm_answers_also_those_that_would_wait_longer_than_the_end() {
    let Some(host) = host_with_one_session() else { return };
    let mut plugin = host.serve_healthy();
    plugin.round_trip();
    let _held = hold_up(&host);
    let socket = plugin.socket.clone();
    std::thread::scope(|scope| {
        let encrypt = || v1beta1::encrypt_within(&socket, b"a", Duration::from_secs(20));
        let waiting: Vec<_> = (0..5).map(|_| scope.spawn(encrypt)).collect();
        plugin.wait_until("they wait for the token", |plugin| plugin.status().is_err());
        let began = Instant::now();
        assert_eq!(plugin.stop().code(), Some(0));
        let took = began.elapsed();
        for waiting in waiting {
            let answer = waiting.join().unwrap().unwrap_err();
            assert!(answer.code == Code::Unavailable && answer.message.contains("the plugin stops"), "{answer:?}");
        }
        assert!(took < STOPPED, "{took:?}");
    });
}
