//! What a reply costs on this machine before anybody computes anything: `cargo bench --bench wake`.
//!
//! A thread that answers requests of an Encrypt's size over a unix socket, one at a time, after it has been busy for
//! some microseconds. What it takes beyond those is the kernel's work of waking it and its caller. On a virtual
//! machine whose cores are idle that is most of what `trousseau bench` shows at 1 in flight, and it jumps when the
//! caller's core has had the time to halt.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::io::{Read, Result, Write};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

const ROUNDS: u32 = 20_000;
/// Bytes of an Encrypt of KMS v2 on an HTTP/2 connection in use, and of its answer.
const REQUEST: usize = 115;
const ANSWER: usize = 267;
/// How long a caller takes between an answer and its next request.
const PAUSE: Duration = Duration::from_micros(10);

fn main() -> Result<()> {
    println!("BUSY µs  CPU µs beyond that  ROUND TRIP µs");
    for busy in [0, 5, 10, 20, 30, 40, 50, 70] {
        let (mut caller, server) = UnixStream::pair()?;
        let server = thread::spawn(move || serve(server, Duration::from_micros(busy)));
        let began = Instant::now();
        for _ in 0..ROUNDS {
            caller.write_all(&[0; REQUEST])?;
            caller.read_exact(&mut [0; ANSWER])?;
            spin(PAUSE);
        }
        let round_trip = began.elapsed() / ROUNDS;
        drop(caller);
        let cpu = server.join().unwrap()? / ROUNDS;
        println!("{busy:<7}  {:<19.1}  {:.1}", micros(cpu) - busy as f64, micros(round_trip));
    }
    Ok(())
}

/// Answers until its peer hangs up. Returns the processor time that it took.
fn serve(mut stream: UnixStream, busy: Duration) -> Result<Duration> {
    while stream.read_exact(&mut [0; REQUEST]).is_ok() {
        spin(busy);
        stream.write_all(&[0; ANSWER])?;
    }
    Ok(clock_gettime(ClockId::ThreadCPUTime).try_into().unwrap())
}

fn spin(time: Duration) {
    let began = Instant::now();
    while began.elapsed() < time {
        std::hint::spin_loop();
    }
}

fn micros(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}
