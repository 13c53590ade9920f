//! How large a process is; of a supervised service, each one: once it is warm, and when it was last seen.

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::supervisor::Supervisor;

/// A process under load is warm after so long.
pub const WARM_AFTER: Duration = Duration::from_secs(2);
const EVERY: Duration = Duration::from_millis(50);

#[derive(Clone, Copy, Debug)]
pub struct Size {
    pub rss_kib: u64,
    pub threads: u64,
}

/// What a process has become since it was warm.
#[derive(Clone, Copy, Debug)]
pub struct Growth {
    pub warm: Size,
    pub last: Size,
}

impl Size {
    /// `None`: it has ended.
    pub fn of(pid: u32) -> Option<Self> {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let number = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name))?;
            line.split_whitespace().next()?.parse().ok()
        };
        Some(Self { rss_kib: number("VmRSS:")?, threads: number("Threads:")? })
    }
}

/// What a process that runs has in memory.
pub fn resident_kib(pid: u32) -> u64 {
    Size::of(pid).unwrap().rss_kib
}

/// Looks at the service's processes until this `ends`. One that does not become warm is left out.
pub fn watch(supervisor: &Supervisor, ends: &AtomicBool) -> Vec<Growth> {
    let mut grown: Vec<Growth> = Vec::new();
    let (mut watched, mut begun, mut is_warm) = (None, Instant::now(), false);
    while !ends.load(Ordering::Relaxed) {
        let pid = supervisor.pid();
        if pid != watched {
            (watched, begun, is_warm) = (pid, Instant::now(), false);
        }
        if let Some(size) = pid.and_then(Size::of).filter(|_| begun.elapsed() >= WARM_AFTER) {
            match grown.last_mut().filter(|_| is_warm) {
                Some(growth) => growth.last = size,
                None => grown.push(Growth { warm: size, last: size }),
            }
            is_warm = true;
        }
        thread::sleep(EVERY);
    }
    grown
}
