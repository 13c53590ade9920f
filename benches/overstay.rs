//! By how much an answer comes too late, when the token does not answer in time: `cargo bench --bench overstay`.
//!
//! Every C_Encrypt takes longer than the service gives a request, 2.95 s, by the module that makes faults:
//! `TROUSSEAU_FAULT_LIB`, what `tests/tokens/build.sh fault` prints. What is measured is the time from a request to its
//! answer, less those 2.95 s: so the way to the plugin and back is in it. Beside it stands by how much this process's own
//! timers of 2.95 s came too late: that is the machine's part. On a busy machine that is all there
//! is to see, unless `chrt -f 5` stands before the command. `TROUSSEAU_BIN` names the binary; the default is the one that
//! `cargo bench` has built.
//!
//! November 30, 2026, two cores, by `chrt`: p99.9 of the answer 2.8 ms, of a timer 2.0 ms.
#![allow(clippy::print_stdout)]

mod host;

use std::time::{Duration, Instant};
use std::{env, fs, thread};

use futures_util::future::join_all;
use host::{Host, PATIENCE, Result};
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

/// Waits until the plugin is well.
async fn connect(host: &Host) -> Result<Client> {
    let began = Instant::now();
    loop {
        if let Ok(mut client) = Client::connect(&host.path("kms.sock"), PATIENCE).await
            && client.status().await.is_ok()
        {
            return Ok(client);
        }
        if began.elapsed() > PATIENCE {
            return Err(host.nobody_serves());
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
    let host = Host::new(|| Ok(env!("CARGO_BIN_EXE_trousseau").into()))?;
    let pkcs11 = format!("type = \"pkcs11\"\nmodule = {library:?}\nsessions = {SESSIONS}");
    host.change(r#"type = "pkcs11""#, &pkcs11)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let _serving = host.serve()?;
    let client = runtime.block_on(connect(&host))?;
    fs::write(host.path("rules"), RULES)?;
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
