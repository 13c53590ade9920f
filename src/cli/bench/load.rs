//! Load on a serving plugin, over one connection: a closed loop with so many requests in flight, or an open loop in
//! which requests come at their own instants, whatever has been answered by then.

use std::cell::RefCell;
use std::fmt;
use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use futures_util::future::try_join_all;
use futures_util::stream::FuturesUnordered;
use serde::Serialize;
use tokio::sync::mpsc::{self, UnboundedReceiver};

use super::Call;
use super::figures::Figures;
use crate::cli::output::Failure;
use crate::service::client::{Client, ClientError};

/// Plaintexts of an open loop: identical Decrypts in flight would share a call.
const SEALED: usize = 256;
/// They are made so many at a time, which no pool refuses.
const SEALED_AT_A_TIME: usize = 16;

#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Load {
    InFlight(u16),
    /// Requests a second.
    Rate(u32),
}

impl fmt::Display for Load {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::InFlight(in_flight) => write!(f, "{in_flight} in flight"),
            Self::Rate(rate) => write!(f, "{rate} a second"),
        }
    }
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Measured {
    pub(super) call: Call,
    #[serde(flatten)]
    pub(super) load: Load,
    pub(super) failed: usize,
    #[serde(flatten)]
    pub(super) figures: Figures,
}

/// A serving plugin, and what it has sealed.
pub(super) struct Plugin {
    client: Client,
    pid: Option<u32>,
    sealed: Vec<(Vec<u8>, String)>,
}

/// How requests fared.
#[derive(Default)]
struct Tally {
    took: Vec<Duration>,
    failed: usize,
    why: Option<ClientError>,
}

impl Plugin {
    /// `pid`: its process, where the socket does not tell. `loads`: what it will have to bear.
    pub(super) async fn new(client: Client, pid: Option<u32>, loads: &[Load]) -> Result<Self, Failure> {
        let pid = pid.or_else(|| client.server_pid());
        let needed = |load: &Load| match load {
            Load::InFlight(in_flight) => usize::from(*in_flight),
            Load::Rate(_) => SEALED,
        };
        let most = loads.iter().map(needed).max().unwrap_or_default();
        let mut sealed = Vec::new();
        while sealed.len() < most {
            let some = (0..SEALED_AT_A_TIME).map(|_| {
                let mut client = client.clone();
                async move { client.encrypt(vec![7; 32]).await }
            });
            sealed.extend(try_join_all(some).await?);
        }
        Ok(Self { client, pid, sealed })
    }

    pub(super) async fn measure(&self, call: Call, load: Load, time: Duration) -> Result<Measured, Failure> {
        let tally = RefCell::default();
        let (began, cpu_before) = (Instant::now(), self.pid.and_then(cpu_time));
        match load {
            Load::InFlight(in_flight) => self.keep_in_flight(call, in_flight, began + time, &tally).await?,
            Load::Rate(rate) => self.send_at(call, schedule(rate, time)?, &tally).await?,
        }
        let (elapsed, cpu_after) = (began.elapsed(), self.pid.and_then(cpu_time));
        let Tally { took, failed, why } = tally.into_inner();
        if let (true, Some(why)) = (took.is_empty(), why) {
            return Err(why.into());
        }
        let cpu = cpu_before.zip(cpu_after).map(|(before, after)| after.saturating_sub(before));
        let per_second = took.len() as f64 / elapsed.as_secs_f64();
        Ok(Measured { call, load, failed, figures: Figures::new(took, per_second, cpu) })
    }

    async fn keep_in_flight(
        &self,
        call: Call,
        in_flight: u16,
        end: Instant,
        tally: &RefCell<Tally>,
    ) -> Result<(), ClientError> {
        let lanes = (0..usize::from(in_flight)).map(async |lane| {
            while Instant::now() < end {
                self.request(call, lane, Instant::now(), tally).await?;
            }
            Ok(())
        });
        try_join_all(lanes).await.map(drop)
    }

    /// The time of each request is counted from its own instant on, also where it was sent late.
    async fn send_at(&self, call: Call, schedule: Vec<Duration>, tally: &RefCell<Tally>) -> Result<(), Failure> {
        let mut arrivals = arrivals(schedule)?;
        let mut under_way = FuturesUnordered::new();
        for n in 0.. {
            let at = loop {
                tokio::select! {
                    Some(at) = arrivals.recv() => break at,
                    Some(answer) = under_way.next() => answer?,
                    else => return Ok(()),
                }
            };
            under_way.push(self.request(call, n, at, tally));
        }
        Ok(())
    }

    /// One request. What the plugin refuses is counted; without a plugin there is nothing more to measure.
    async fn request(&self, call: Call, n: usize, since: Instant, tally: &RefCell<Tally>) -> Result<(), ClientError> {
        let mut client = self.client.clone();
        let answer = match (call, self.sealed.get(n % self.sealed.len().max(1))) {
            (Call::Decrypt, Some((ciphertext, key_id))) => {
                client.decrypt(ciphertext.clone(), key_id.clone()).await.map(drop)
            }
            _ => client.encrypt(vec![7; 32]).await.map(drop),
        };
        let took = since.elapsed();
        let mut tally = tally.borrow_mut();
        match answer {
            Ok(()) => tally.took.push(took),
            Err(why @ (ClientError::Answer { .. } | ClientError::Late { .. })) => {
                tally.failed += 1;
                tally.why = Some(why);
            }
            Err(gone) => return Err(gone),
        }
        Ok(())
    }

    /// Its resident memory, in KiB.
    pub(super) fn resident_kib(&self) -> Option<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid?)).ok()?;
        status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB")?.parse().ok())
    }
}

/// Poisson arrivals: the times between them are exponentially distributed.
fn schedule(rate: u32, time: Duration) -> Result<Vec<Duration>, Failure> {
    let mut schedule = Vec::new();
    let mut at = Duration::ZERO;
    loop {
        let random = getrandom::u64().map_err(|error| Failure::failed(format!("getrandom(2): {error}"), ""))?;
        at += Duration::from_secs_f64(exponential(random) / f64::from(rate));
        if at >= time {
            return Ok(schedule);
        }
        schedule.push(at);
    }
}

/// An exponentially distributed number, 1 on average, of an evenly distributed one.
fn exponential(random: u64) -> f64 {
    // 53 bits, as many as an f64 has: in (0, 1].
    let even = ((random >> 11) + 1) as f64 / (1_u64 << 53) as f64;
    -even.ln()
}

/// Tells of each instant when it has come. The runtime's own timers are too coarse, at a millisecond.
fn arrivals(schedule: Vec<Duration>) -> Result<UnboundedReceiver<Instant>, Failure> {
    let (sender, receiver) = mpsc::unbounded_channel();
    let began = Instant::now();
    let send = move || {
        for at in schedule {
            thread::sleep((began + at).saturating_duration_since(Instant::now()));
            if sender.send(began + at).is_err() {
                break;
            }
        }
    };
    let no_thread = |error| Failure::failed(format!("no thread: {error}"), "raise the limit on threads");
    thread::Builder::new().name("arrivals".into()).spawn(send).map_err(no_thread)?;
    Ok(receiver)
}

/// User and system time of a process (proc_pid_stat(5), fields 14 and 15, in hundredths of a second).
fn cpu_time(pid: u32) -> Option<Duration> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, fields) = stat.rsplit_once(") ")?;
    let ticks: Vec<u64> = fields.split(' ').skip(11).take(2).filter_map(|field| field.parse().ok()).collect();
    Some(Duration::from_millis(10 * ticks.iter().sum::<u64>()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arrivals_are_as_many_as_the_rate_says_and_as_uneven_as_chance() {
        assert_eq!(exponential(u64::MAX), 0.0);
        assert!(exponential(0) < 40.0, "it is finite");
        let even = |n: u64| exponential(n << 48);
        let mean = (0..1 << 16).map(even).sum::<f64>() / f64::from(1 << 16);
        let variance = (0..1 << 16).map(|n| (even(n) - mean).powi(2)).sum::<f64>() / f64::from(1 << 16);
        assert!((mean - 1.0).abs() < 0.01 && (variance - 1.0).abs() < 0.02, "{mean} {variance}");
    }
}
