//! A token that does not answer: the queue is bounded, deadlines hold, and what was accepted is answered.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, fcntl_lock};
use tonic::Code;

use crate::plugin::Host;
use crate::token::Family;

/// Places in the queue for each session.
const QUEUE: usize = 64;

/// SoftHSM waits for locks on its files; whoever holds them holds its calls up. Ends when this is dropped.
fn hold_up(host: &Host) -> Option<Vec<OwnedFd>> {
    if host.token.family != Family::SoftHsm {
        eprintln!("skipped: only SoftHSM can be held up, by the locks on its files");
        return None;
    }
    let mut held = Vec::new();
    let tokens = std::fs::read_dir(host.token.data()).unwrap();
    for file in tokens.flat_map(|token| std::fs::read_dir(token.unwrap().path()).unwrap()) {
        let file = File::options().read(true).write(true).open(file.unwrap().path()).unwrap();
        fcntl_lock(&file, FlockOperation::LockExclusive).unwrap();
        held.push(file.into());
    }
    Some(held)
}

fn host_with_one_session() -> Host {
    let mut host = Host::new();
    host.generate("0s");
    host.sessions = 1;
    host
}

#[test]
fn a_full_queue_answers_at_once_and_the_rest_when_its_time_is_up() {
    let host = host_with_one_session();
    let plugin = host.serve_healthy();
    plugin.round_trip();
    let Some(held) = hold_up(&host) else { return };
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
fn a_quick_token_that_stops_answering_holds_up_its_own_callers_alone() {
    let host = host_with_one_session();
    let plugin = host.serve_healthy();
    for _ in 0..100 {
        plugin.round_trip(); // by now the thread that serves the socket calls the token itself
    }
    let Some(held) = hold_up(&host) else { return };
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
    let host = host_with_one_session();
    let plugin = host.serve_healthy();
    plugin.round_trip();
    let Some(held) = hold_up(&host) else { return };
    // Each crowd would fill the queue by itself, if those before it had not left it.
    for _ in 0..3 {
        plugin.encrypt_and_leave(QUEUE - 4);
    }
    drop(held);
    plugin.round_trip();
}

#[test]
fn identical_decrypts_share_one_call_whoever_of_them_leaves() {
    let host = host_with_one_session();
    let plugin = host.serve_healthy_and_talkative();
    let (ciphertext, key_id) = plugin.round_trip();
    let Some(held) = hold_up(&host) else { return };
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
    let host = host_with_one_session();
    let plugin = host.serve_healthy();
    plugin.round_trip();
    let Some(held) = hold_up(&host) else { return };
    let socket = plugin.socket.clone();
    let (answers, status) = plugin.stop_while_encrypting(20, || drop(held));
    let answered = answers.iter().filter(|answer| answer.is_ok()).count();
    assert_eq!(answered, answers.len(), "{answers:?}");
    assert_eq!(status.code(), Some(0));
    assert!(!socket.exists());
}
