//! What the queue before the sessions costs, with a token of which a call takes five milliseconds: `cargo bench --bench pool`.
//!
//! The delay is added to the C_Decrypt that gives the data key, by the module that makes faults: `TROUSSEAU_FAULT_LIB`, what
//! `tests/tokens/build.sh fault` prints. With 1, 8 and 32 sessions it prints two figures, both of Decrypt:
//!
//! - throughput with twice as many requests under way as there are sessions, beside sessions ÷ call (Little's law);
//! - the 99th percentile at half that rate, the requests coming at random instants (Poisson), beside the call.
//!
//! The call's time is that of the token alone, without a plugin. Beside the percentile stands that of one request at a
//! time, which waits for nobody: what it is longer than the call is the machine's timers, and the way to the plugin.
//! `TROUSSEAU_BIN` names the binary; the default is the one that `cargo bench` has built.
//!
//! November 30, 2026, two cores: 99, 101 and 102 % of sessions ÷ call; the percentile with 8 sessions 1.37 × the call, with 32
//! 1.14 ×, of one request at a time 1.13 to 1.15 ×. With one session, half of its rate is a queue: 4.69 ×.
#![allow(clippy::print_stdout)]

mod host;

use std::process::Command;
use std::{env, fs};

use host::{Host, Result};
use serde_json::Value;

const RULES: &str = "C_Decrypt delay 5ms of results";
const SESSIONS: [u32; 3] = [1, 8, 32];
/// Of each measurement.
const TIME: &str = "20s";

/// What `bench` prints of the one measurement that these arguments ask for.
fn measure(command: &mut Command, kind: &str) -> Result<Value> {
    let done = command.args(["--time", TIME, "--output", "json"]).output()?;
    if !done.status.success() {
        return Err(String::from_utf8_lossy(&done.stderr).into());
    }
    let printed: Value = serde_json::from_slice(&done.stdout)?;
    let of_decrypt = |one: &&Value| one["call"] == "decrypt";
    let measured = printed.get(kind).and_then(Value::as_array).and_then(|all| all.iter().find(of_decrypt));
    Ok(measured.ok_or_else(|| format!("bench measured no Decrypt: {printed}"))?.clone())
}

fn figure(measured: &Value, name: &str) -> f64 {
    measured[name].as_f64().unwrap_or(f64::NAN)
}

fn main() -> Result<()> {
    let library =
        env::var("TROUSSEAU_FAULT_LIB").map_err(|_| "TROUSSEAU_FAULT_LIB: see tests/tokens/build.sh fault")?;
    let host = Host::new(|| Ok(env!("CARGO_BIN_EXE_trousseau").into()))?;
    host.change(r#"type = "pkcs11""#, &format!("type = \"pkcs11\"\nmodule = {library:?}\nsessions = 1"))?;
    fs::write(host.path("rules"), RULES)?;
    let alone = measure(&mut host.configured(&["bench", "--token", "--max-sessions", "1"]), "token")?;
    let call = figure(&alone, "mean-micros");
    println!("the call: {call:.0} µs, of the token alone");
    println!("sessions  throughput of what they can do (goal 95 %)  p99 of the call  alone");
    let mut before = "sessions = 1".to_owned();
    for sessions in SESSIONS {
        let now = format!("sessions = {sessions}");
        host.change(&before, &now)?;
        before = now;
        let _serving = host.serve()?;
        let socket = host.connect()?;
        let bench = |arguments: &[&str]| {
            let mut bench = host.command(&["bench", "--call", "decrypt", "--socket"]);
            bench.arg(&socket).args(arguments);
            measure(&mut bench, "requests")
        };
        let possible = f64::from(sessions) * 1e6 / call;
        let one = bench(&["--in-flight", "1"])?;
        let all = bench(&["--in-flight", &(2 * sessions).to_string()])?;
        let half = bench(&["--rate", &format!("{:.0}", possible / 2.0)])?;
        println!(
            "{sessions:>8}  {:>6.0}/s of {possible:>6.0}/s: {:>5.1} %                {:>11.2} ×  {:>5.2} ×",
            figure(&all, "per-second"),
            100.0 * figure(&all, "per-second") / possible,
            figure(&half, "p99-micros") / call,
            figure(&one, "p99-micros") / call,
        );
    }
    println!("goals of the p99: 1.5 × the call with 8 sessions, 1.2 × with 32");
    Ok(())
}
