//! By how much an answer comes too late, when the token does not answer in time: `cargo bench --bench overstay`.
//!
//! Every C_Encrypt takes longer than the service gives a request, 2.95 s, by the module that makes faults:
//! `TROUSSEAU_FAULT_LIB`, what `tests/tokens/build.sh fault` prints. What is measured is the time from a request to its
//! answer, less those 2.95 s: so the way to the plugin and back is in it. Beside it stands by how much this process's own
//! timers of 2.95 s came too late: that is the machine's part. On a busy machine that is all there
//! is to see, unless `chrt -f 5` stands before the command. `TROUSSEAU_BIN` names the binary; the default is the one that
//! `cargo bench` has built.
//!
//! November 2026, two cores, by `chrt`: p99.9 of the answer 3.8 ms, of a timer 2.1 ms.
#![allow(clippy::print_stdout)]

use std::error::Error;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use std::{env, fs, thread};

use futures_util::future::join_all;
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tokio::time::sleep;
use trousseau::service::client::Client;

/// Three seconds, less what the service gives a request up early by (`service::requests`).
const DEADLINE: Duration = Duration::from_millis(2_950);
/// Longer than a deadline, and not so long that a session counts as stuck.
const RULES: &str = "C_Encrypt delay 3500ms";
/// After the answer, until the session is free.
const REST: Duration = Duration::from_secs(1);
/// More than there are requests at a time.
const SESSIONS: u32 = 160;
const CALLERS: u32 = 128;
const ROUNDS: usize = 32;
const PATIENCE: Duration = Duration::from_secs(30);

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// A process of ours. It is asked to end, and waited for, when this is dropped.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ended = kill_process(Pid::from_child(&self.0), Signal::TERM);
        let _status = self.0.wait();
    }
}

fn start(command: &mut Command, log: &Path) -> Result<Process> {
    let log = fs::File::options().create(true).append(true).open(log)?;
    Ok(Process(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn()?))
}

/// Waits until the plugin is well.
async fn connect(socket: &Path, log: &Path) -> Result<Client> {
    let began = Instant::now();
    loop {
        if let Ok(mut client) = Client::connect(socket, PATIENCE).await
            && client.status().await.is_ok()
        {
            return Ok(client);
        }
        if began.elapsed() > PATIENCE {
            return Err(format!("nobody serves:\n{}", fs::read_to_string(log)?).into());
        }
        sleep(Duration::from_millis(5)).await;
    }
}

/// Requests one after another, and by how much each answer came too late; then the same of timers.
async fn overstays(mut client: Client, begin_after: Duration) -> Result<(Vec<Duration>, Vec<Duration>)> {
    let (mut answers, mut timers) = (Vec::new(), Vec::new());
    sleep(begin_after).await;
    for _ in 0..ROUNDS {
        let (asked, timer) = (Instant::now(), sleep(DEADLINE));
        let timed = async {
            timer.await;
            asked.elapsed()
        };
        let answered = async {
            let answer = client.encrypt(vec![7; 32]).await;
            (asked.elapsed(), answer)
        };
        let (timed, (took, answer)) = tokio::join!(timed, answered);
        match answer {
            Err(error) if error.to_string().contains("too slow") => answers.push(took.saturating_sub(DEADLINE)),
            Err(error) if error.to_string().contains("overloaded") => (), // two at one moment
            other => return Err(format!("after {took:?}, instead of a deadline: {other:?}").into()),
        }
        timers.push(timed.saturating_sub(DEADLINE));
        sleep(REST).await;
    }
    Ok((answers, timers))
}

fn main() -> Result<()> {
    let library =
        env::var("TROUSSEAU_FAULT_LIB").map_err(|_| "TROUSSEAU_FAULT_LIB: see tests/tokens/build.sh fault")?;
    let binary = env::var_os("TROUSSEAU_BIN").unwrap_or_else(|| env!("CARGO_BIN_EXE_trousseau").into());
    let directory = TempDir::new()?;
    let path = |name: &str| directory.path().join(name);
    let (socket, log, file) = (path("kms.sock"), path("log"), path("trousseau.toml"));
    let command = |arguments: &[&str]| {
        let mut command = Command::new(&binary);
        command.args(arguments).env_remove("STATE_DIRECTORY").env("SOFTHSM2_CONF", path("softhsm2.conf"));
        command
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let developed = start(command(&["dev", "--dir"]).arg(directory.path()), &log)?;
    drop(runtime.block_on(connect(&socket, &log))?);
    drop(developed);
    let configuration = fs::read_to_string(&file)?.replace(r#"cluster = "dev""#, r#"cluster = "bench""#);
    let pkcs11 = format!("type = \"pkcs11\"\nmodule = {library:?}\nsessions = {SESSIONS}");
    let configuration = configuration.replace(r#"type = "pkcs11""#, &pkcs11);
    fs::write(&file, configuration)?;
    let faulty = |arguments: &[&str]| {
        let mut command = command(arguments);
        command.arg("--config").arg(&file).env("TROUSSEAU_FAULT_RULES", path("rules"));
        command
    };
    let generate = ["key", "generate", "--mode", "gcm", "--activate-in", "0s", "--unsynchronized-clock-ok"];
    if !faulty(&generate).stdout(Stdio::null()).status()?.success() {
        return Err("no KEK was made".into());
    }
    let _serving = start(&mut faulty(&["serve"]), &log)?;
    let client = runtime.block_on(connect(&socket, &log))?;
    fs::write(path("rules"), RULES)?;
    thread::sleep(REST); // until a round trip that was under way has ended
    let between = (DEADLINE + REST) / CALLERS;
    let lanes = (0..CALLERS).map(|lane| overstays(client.clone(), between * lane));
    let (mut answers, mut timers) = (Vec::new(), Vec::new());
    for lane in runtime.block_on(join_all(lanes)) {
        let (answered, timed) = lane?;
        answers.extend(answered);
        timers.extend(timed);
    }
    println!("{} requests, none of which the token answers in time", answers.len());
    for (what, mut late) in [("the answer", answers), ("a timer here", timers)] {
        late.sort();
        let at = |share: f64| late.get((late.len() as f64 * share) as usize).copied().unwrap_or_default();
        let (half, p99, p999, most) = (at(0.5), at(0.99), at(0.999), late.last().copied().unwrap_or_default());
        println!("{what:<14} too late by {half:.1?} (half), {p99:.1?} (p99), {p999:.1?} (p99.9), {most:.1?} (most)");
    }
    println!("goal: p99.9 of the answer 20 ms");
    Ok(())
}
