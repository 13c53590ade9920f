//! Faults of every kind at random under load. Errors are allowed while they last; a wrong answer never is, and
//! afterwards nothing is lost and all is as it was.
//!
//! `TROUSSEAU_CHAOS_SECONDS` says for how long (10), `TROUSSEAU_CHAOS_SEED` which faults come when.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use std::{env, thread};

use rustix::fs::{CWD, Mode, mkfifoat};
use tonic::Code;
use trousseau::service::client::ClientError;

use crate::caller::{Caller, Ends};
use crate::fault_module::{Faults, library};
use crate::plugin::Host;
use crate::replicas;
use crate::sizes::{self, Growth, Size, WARM_AFTER};
use crate::supervisor::{End, Supervisor};

/// Not among them: lost sessions while calls are made in them, which SoftHSM does not survive; and a login that fails for
/// no reason given, after which the PIN is held back for a person to look at.
const RULES: &[&str] = &[
    // The first one begins each run. A process has begun well before it crashes: not while it logs in to another token.
    "C_Encrypt crash after 30 probability 0.05\nC_Decrypt crash after 30 probability 0.05",
    "* return CKR_TOKEN_NOT_PRESENT",
    "* return CKR_DEVICE_REMOVED token trousseau",
    "* return CKR_SESSION_HANDLE_INVALID probability 0.05",
    "C_Encrypt return CKR_GENERAL_ERROR",
    "C_Encrypt return CKR_DEVICE_MEMORY probability 0.5\nC_Decrypt return CKR_HOST_MEMORY probability 0.5",
    "C_EncryptInit return CKR_SESSION_CLOSED probability 0.5\nC_DecryptInit return CKR_SESSION_CLOSED probability 0.5",
    "C_EncryptInit return CKR_USER_NOT_LOGGED_IN probability 0.2\nC_Login delay 300ms",
    "C_EncryptInit return CKR_OPERATION_ACTIVE probability 0.3",
    "C_DecryptInit return CKR_KEY_HANDLE_INVALID probability 0.3",
    "C_EncryptInit return CKR_MECHANISM_INVALID probability 0.3",
    "C_FindObjectsInit return CKR_DEVICE_ERROR\nC_EncryptInit return CKR_SESSION_HANDLE_INVALID probability 0.1",
    "C_OpenSession return CKR_SESSION_COUNT\nC_EncryptInit return CKR_SESSION_HANDLE_INVALID probability 0.1",
    "C_OpenSession limit 2\nC_EncryptInit return CKR_SESSION_HANDLE_INVALID probability 0.1",
    "C_GetSlotList empty\nC_EncryptInit return CKR_DEVICE_REMOVED times 3",
    "C_Initialize return CKR_GENERAL_ERROR\nC_EncryptInit return CKR_DEVICE_REMOVED times 3",
    "C_Finalize return CKR_GENERAL_ERROR\nC_DecryptInit return CKR_DEVICE_REMOVED times 1",
    "C_Login delay 500ms..2s\nC_EncryptInit return CKR_DEVICE_REMOVED times 1",
    "C_Encrypt flip probability 0.3",
    "C_Encrypt flip",
    "C_Encrypt delay 1ms..50ms\nC_Decrypt delay 1ms..50ms",
    "* delay 1ms..200ms probability 0.2",
    "C_Encrypt delay 1s..4s probability 0.1",
    "C_Encrypt hang times 1",
    "C_Encrypt hang probability 0.1\nC_Decrypt hang probability 0.1",
    "C_Encrypt hang\nC_Decrypt hang",
    "* hang token trousseau",
    "C_OpenSession hang\nC_EncryptInit return CKR_SESSION_HANDLE_INVALID probability 0.1",
];

/// Under these a good ciphertext may be called a bad one: the token says so, or opens it to something else, or fails
/// and works by turns as it would with a bad one and the KEK's reference.
const LIES: &[&str] = &[
    "* return CKR_DEVICE_ERROR probability 0.2",
    "* return CKR_DEVICE_REMOVED probability 0.05",
    "C_Encrypt return CKR_FUNCTION_FAILED probability 0.3\nC_Decrypt return CKR_FUNCTION_FAILED probability 0.3",
    "C_Decrypt return 0x80000201 probability 0.5\nC_Encrypt return 0x80000201 probability 0.5",
    "C_CloseSession return CKR_DEVICE_ERROR\nC_DecryptInit return CKR_DEVICE_REMOVED probability 0.1",
    "C_Decrypt return CKR_ENCRYPTED_DATA_INVALID probability 0.3",
    "C_Decrypt return CKR_DATA_INVALID",
    "C_Decrypt flip probability 0.3",
    "C_Decrypt flip",
];

/// How long rules stay.
const SHORTEST: Duration = Duration::from_millis(300);
const LONGEST: Duration = Duration::from_secs(5);
/// What a request may take that met a lie.
const ECHO: Duration = Duration::from_millis(500);
const CALLERS: usize = 4;
/// Between two requests of a caller: what ten minutes of it have stored is opened again in one.
const THINKS: Duration = Duration::from_millis(10);
/// From the end of the last fault, with what a new process takes.
const HEALED_WITHIN: Duration = Duration::from_secs(3);
/// Of one process, since it was warm.
const GROWTH_KIB: u64 = 6 * 1024;
/// No wait for a condition lasts longer.
const PATIENCE: Duration = Duration::from_secs(20);

#[test]
fn chaos_in_one_token() {
    let mut host = Host::new().with_mode("gcm");
    host.generate("0s");
    host.sessions = 3;
    play("one token", &host);
}

#[test]
fn chaos_in_replicas() {
    if let Some(host) = replicas::host() {
        play("replicas", &host);
    }
}

fn play(what: &'static str, host: &Host) {
    let Some(library) = library() else { return };
    let seconds = env::var("TROUSSEAU_CHAOS_SECONDS").map_or(10, |seconds| seconds.parse().unwrap());
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64;
    let seed = env::var("TROUSSEAU_CHAOS_SEED").map_or_else(|_| now(), |seed| seed.parse().unwrap());
    eprintln!("{what}: TROUSSEAU_CHAOS_SEED={seed} TROUSSEAU_CHAOS_SECONDS={seconds}");
    let faults = Faults { host, library: &library };
    let open = OpenSessions::count(&host.path("calls"));
    let supervisor = Supervisor::start(host, &faults.command_with_log("calls"));
    let threads = || wait_for("a process", || supervisor.pid().and_then(Size::of)).threads;
    let ends = AtomicBool::new(false);
    let lies = Mutex::new(None);
    thread::scope(|scope| {
        let (socket, ends, lies) = (&supervisor.socket, &ends, &lies);
        let until_then = Ends(ends);
        let callers: Vec<_> =
            (0..CALLERS).map(|n| scope.spawn(move || Peer::new(socket, lies, seed, n as u64).work(ends))).collect();
        let watched = scope.spawn(|| sizes::watch(&supervisor, ends));
        thread::sleep(WARM_AFTER);
        let warm = threads();
        trouble(&faults, &mut Dice(seed), lies, Duration::from_secs(seconds));
        let healed = healed_after(socket);
        assert!(healed < HEALED_WITHIN, "{what}: healed after {healed:?}");
        let most = open_at_most(host);
        renew(&faults, &open, most);
        wait_for("the threads too many end", || (threads() <= warm).then_some(()));
        drop(until_then);
        let grown = watched.join().unwrap();
        let peers: Vec<_> = callers.into_iter().map(|caller| caller.join().unwrap()).collect();
        let sealed: usize = peers.iter().map(|peer| peer.sealed.len()).sum();
        let opening = peers.into_iter().map(|peer| scope.spawn(|| peer.open_all()));
        let mut answers = BTreeMap::new();
        for peer in opening.collect::<Vec<_>>() {
            for (answer, count) in peer.join().unwrap() {
                *answers.entry(answer).or_insert(0) += count;
            }
        }
        let left = supervisor.ends();
        eprintln!("{what}: {sealed} sealed and opened; answers {answers:?}; healed after {healed:?}");
        eprintln!("{what}: {} of {most} sessions; {left:?}", open.now());
        eprintln!("{what}: its processes have grown so: {grown:?}");
        // By itself for want of a new process, or by the module's crash.
        let may_be = |end: &End| end.status.code() == Some(69) || end.status.signal() == Some(6);
        assert!(left.iter().all(may_be), "{left:?}");
        let too_large = |growth: &Growth| growth.last.rss_kib > growth.warm.rss_kib + GROWTH_KIB;
        assert!(!grown.iter().any(too_large), "{what}: {grown:?}");
    });
}

/// Makes faults for so long, and leaves none.
fn trouble(faults: &Faults, dice: &mut Dice, lies: &Mutex<Option<Instant>>, time: Duration) {
    let began = Instant::now();
    let mut place = 0;
    while began.elapsed() < time {
        let rules = RULES.get(place).unwrap_or_else(|| &LIES[place - RULES.len()]);
        let stay = dice.between(SHORTEST, LONGEST);
        if place >= RULES.len() {
            *lies.lock().unwrap() = Some(Instant::now() + stay + ECHO);
        }
        faults.set(&format!("seed {}\n{rules}", dice.next()));
        thread::sleep(stay);
        if dice.below(3) == 0 {
            faults.set("");
            thread::sleep(dice.between(SHORTEST, LONGEST));
        }
        place = dice.below((RULES.len() + LIES.len()) as u64) as usize;
    }
    faults.set("");
}

/// How soon Status and a round trip are well again.
fn healed_after(socket: &Path) -> Duration {
    let (mended, mut caller) = (Instant::now(), Caller::new(socket));
    wait_for("it is well", || {
        caller.status().ok()?;
        let (ciphertext, key_id) = caller.encrypt(b"a").ok()?;
        caller.decrypt(&ciphertext, &key_id).ok()
    });
    mended.elapsed()
}

/// A session for each worker and for the thread that leads, and one that keeps the login; for each token.
fn open_at_most(host: &Host) -> i64 {
    let tokens = host.tokens.split(',').count();
    i64::try_from(tokens * (host.sessions + 2)).unwrap()
}

/// A module that is initialized anew has no session of before, so that they can be counted: first sessions are lost,
/// then all is well.
fn renew(faults: &Faults, open: &OpenSessions, most: i64) {
    let renewals = open.renewals();
    faults.set("C_GetSlotList empty\nC_EncryptInit return CKR_DEVICE_REMOVED");
    wait_for("the module is finalized", || (open.renewals() > renewals).then_some(()));
    faults.set("C_EncryptInit return CKR_SESSION_HANDLE_INVALID probability 0.2");
    thread::sleep(Duration::from_secs(1)); // of load
    faults.set("");
    wait_for("no session is open that should not", || (open.now() <= most).then_some(()));
    assert!(open.now() > 0, "it counts");
}

fn wait_for<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(met) = condition() {
            return met;
        }
        assert!(began.elapsed() < PATIENCE, "waited in vain until {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// Counts the sessions that are open in the module, by what it writes into this pipe.
struct OpenSessions(Arc<Counts>);

#[derive(Default)]
struct Counts {
    open: AtomicI64,
    renewals: AtomicI64,
}

impl OpenSessions {
    fn count(pipe: &Path) -> Self {
        mkfifoat(CWD, pipe, Mode::RUSR | Mode::WUSR).unwrap();
        // For both, so that it stays open from one process to the next.
        let pipe = File::options().read(true).write(true).open(pipe).unwrap();
        let counts = Arc::new(Counts::default());
        let theirs = Arc::clone(&counts);
        // It ends with the test's process.
        thread::spawn(move || BufReader::new(pipe).lines().for_each(|line| theirs.note(&line.unwrap())));
        Self(counts)
    }

    fn now(&self) -> i64 {
        self.0.open.load(Ordering::Relaxed)
    }

    fn renewals(&self) -> i64 {
        self.0.renewals.load(Ordering::Relaxed)
    }
}

impl Counts {
    fn note(&self, line: &str) {
        let words: Vec<&str> = line.split(' ').collect();
        match words.as_slice() {
            ["C_OpenSession", _, "CKR_OK"] => drop(self.open.fetch_add(1, Ordering::Relaxed)),
            ["C_CloseSession", _, "CKR_OK"] => drop(self.open.fetch_sub(1, Ordering::Relaxed)),
            ["C_Initialize" | "C_Finalize", _, "CKR_OK"] => {
                self.open.store(0, Ordering::Relaxed);
                self.renewals.fetch_add(1, Ordering::Relaxed);
            }
            _ => (),
        }
    }
}

/// A caller that remembers all that it was given.
struct Peer<'a> {
    caller: Caller,
    /// Until when the token's lies are heard.
    lies: &'a Mutex<Option<Instant>>,
    dice: Dice,
    number: u64,
    asked: u64,
    /// Its plaintexts follow from the number.
    sealed: Vec<(u64, Vec<u8>, String)>,
    answers: BTreeMap<String, usize>,
}

impl<'a> Peer<'a> {
    fn new(socket: &Path, lies: &'a Mutex<Option<Instant>>, seed: u64, number: u64) -> Self {
        let (caller, dice) = (Caller::new(socket), Dice(seed.wrapping_add(number + 1)));
        Self { caller, lies, dice, number, asked: 0, sealed: Vec::new(), answers: BTreeMap::new() }
    }

    fn work(mut self, ends: &AtomicBool) -> Self {
        while !ends.load(Ordering::Relaxed) {
            self.seal();
            if !self.sealed.is_empty() {
                let place = self.dice.below(self.sealed.len() as u64) as usize;
                self.open(place);
            }
            thread::sleep(THINKS);
        }
        self
    }

    /// 32 bytes, no two alike.
    fn plaintext(&self, asked: u64) -> Vec<u8> {
        format!("{:08}{asked:024}", self.number).into_bytes()
    }

    fn seal(&mut self) {
        self.asked += 1;
        let answer = self.caller.encrypt(&self.plaintext(self.asked));
        self.note("Encrypt", answer.as_ref().err());
        if let Ok((ciphertext, key_id)) = answer {
            self.sealed.push((self.asked, ciphertext, key_id));
        }
    }

    /// Whether it could be opened; to anything else than what it was never.
    fn open(&mut self, place: usize) -> bool {
        let (asked, ciphertext, key_id) = &self.sealed[place];
        let answer = self.caller.decrypt(ciphertext, key_id);
        if let Ok(opened) = &answer {
            assert_eq!(*opened, self.plaintext(*asked), "a wrong plaintext");
        }
        self.note("Decrypt", answer.as_ref().err());
        answer.is_ok()
    }

    /// Everything is there; returns how often it was answered what.
    fn open_all(mut self) -> BTreeMap<String, usize> {
        for place in 0..self.sealed.len() {
            assert!(self.open(place), "{} of {} is lost: {:?}", self.sealed[place].0, self.number, self.answers);
        }
        self.answers
    }

    /// Counts an answer. What an object is said to be it may only be called by a token that lies.
    fn note(&mut self, call: &str, error: Option<&ClientError>) {
        let answer = match error {
            None => "ok".into(),
            Some(ClientError::Answer { status, .. }) => {
                let lied = || self.lies.lock().unwrap().is_some_and(|until| Instant::now() < until);
                match status.code() {
                    Code::Unavailable | Code::DeadlineExceeded | Code::ResourceExhausted => (),
                    Code::InvalidArgument if call == "Decrypt" && lied() => (),
                    _ => panic!("{call}: {status:?}"),
                }
                format!("{:?}", status.code())
            }
            Some(_) => "closed".into(),
        };
        *self.answers.entry(format!("{call} {answer}")).or_insert(0) += 1;
    }
}

/// SplitMix64.
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    fn between(&mut self, from: Duration, to: Duration) -> Duration {
        from + Duration::from_millis(self.below((to - from).as_millis() as u64))
    }
}
