//! What an audit log of a million lines costs: `cargo bench --bench audit`. How long its lines take to be written, and
//! `trousseau audit verify` to follow them.
#![allow(clippy::print_stdout)]

use std::error::Error;
use std::fs;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use trousseau::audit::{Audit, Event, Peer};
use trousseau::config::{AuditConfig, OnFailure, Sync};
use trousseau::identity::Identity;

const LINES: usize = 1_000_000;
/// So many wait at a time: fewer than an [`Audit`] has room for.
const TOGETHER: usize = 50_000;

fn main() -> Result<(), Box<dyn Error>> {
    let directory = TempDir::new()?;
    let file = directory.path().join("audit.log");
    let config = AuditConfig {
        file: file.clone(),
        sync: Sync::Never,
        on_failure: OnFailure::Count,
        rotate_at: u64::MAX,
        head_every: Duration::from_secs(3600),
    };
    let audit = Audit::open(&config)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let began = Instant::now();
    runtime.block_on(async {
        for from in (0..LINES).step_by(TOGETHER) {
            for number in from + 1..from + TOGETHER {
                audit.record(like_a_request(number)).await?;
            }
            audit.written(like_a_request(from + TOGETHER)).await?; // and all before it
        }
        Ok::<(), String>(())
    })?;
    let written = began.elapsed();
    drop(audit);
    println!("{LINES} lines, {} MiB, written in {written:.1?}", fs::metadata(&file)?.len() >> 20);
    for _ in 0..3 {
        let began = Instant::now();
        let mut verify = Command::new(env!("CARGO_BIN_EXE_trousseau"));
        let done = verify.args(["audit", "verify"]).arg(&file).stdout(Stdio::null()).status()?;
        if !done.success() {
            return Err(format!("audit verify: {done}").into());
        }
        println!("verified in {:.2?}", began.elapsed());
    }
    Ok(())
}

/// As long as the line of an Encrypt under one KEK.
fn like_a_request(number: usize) -> Event {
    Event {
        uid: format!("00000000-0000-4000-8000-{number:012}"),
        peer: Some(Peer { pid: 1234, uid: 0 }),
        key_id: "0123456789abcdef".repeat(4),
        keks: vec![Identity::from_bytes([7; 16])],
        received: Some(32),
        outcome: Some("OK"),
        ..Event::now("encrypt")
    }
}
