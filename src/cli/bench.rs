//! `trousseau bench`: what a request costs, at several numbers in flight, beside what the token itself costs.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use futures_util::future::try_join_all;
use serde::Serialize;

use super::output::{Failure, Format, print, print_json, table};
use super::{OutputArgs, SocketArgs, assemble, duration};
use crate::config::Config;
use crate::runtime::Leader;
use crate::service::client::{Client, ClientError};

pub(super) const EXAMPLES: &str = "It sends real requests over one connection, as an API server does. CPU is what the \
plugin's whole process used for each operation, its token's library included; with --config, the token's own cost is \
measured beside it, in this process. Compare figures of one run only: a shared machine changes its speed.

Examples:
  trousseau bench
  trousseau bench --in-flight 1,16,64 --time 5s --config /etc/trousseau/trousseau.toml
  trousseau bench --output json";

#[derive(Args)]
pub(super) struct BenchArgs {
    #[command(flatten)]
    socket: SocketArgs,
    /// A configuration with the same token: what the token itself costs is measured as well.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The plugin's process, where systemd made the socket; `systemctl show -P MainPID trousseau` tells it.
    #[arg(long)]
    pid: Option<u32>,
    /// Requests under way at a time.
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_value = "1,16,64", value_parser = clap::value_parser!(u16).range(1..=1000))]
    in_flight: Vec<u16>,
    /// How long each number in flight is measured.
    #[arg(long, value_name = "DURATION", default_value = "3s", value_parser = duration)]
    time: jiff::SignedDuration,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
enum Call {
    Encrypt,
    Decrypt,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Report {
    requests: Vec<Measured>,
    /// CPU of the token's library for one operation, in microseconds.
    token: Vec<TokenCost>,
    /// The plugin's resident memory at the end, in KiB.
    resident_kib: Option<u64>,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Measured {
    call: Call,
    in_flight: u16,
    operations: usize,
    per_second: f64,
    p50_micros: u64,
    p99_micros: u64,
    cpu_micros: Option<f64>,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct TokenCost {
    call: Call,
    sessions: usize,
    cpu_micros: f64,
}

pub(super) fn run(args: &BenchArgs) -> Result<(), Failure> {
    let report = super::runtime()?.block_on(measure(args))?;
    match args.output.output {
        Format::Json => print_json(&report),
        Format::Text => print(&text(&report)),
    }
}

async fn measure(args: &BenchArgs) -> Result<Report, Failure> {
    let mut client = Client::connect(&args.socket.socket, Duration::from_secs(10)).await?;
    let server = args.pid.or_else(|| client.server_pid());
    let (ciphertext, key_id) = client.encrypt(vec![7; 32]).await?;
    let mut requests = Vec::new();
    for call in [Call::Encrypt, Call::Decrypt] {
        for in_flight in &args.in_flight {
            let time = args.time.unsigned_abs();
            requests.push(measure_call(&client, server, call, *in_flight, time, (&ciphertext, &key_id)).await?);
        }
    }
    let token = match &args.config {
        Some(file) => measure_token(file).await?,
        None => Vec::new(),
    };
    Ok(Report { requests, token, resident_kib: server.and_then(resident_kib) })
}

async fn measure_call(
    client: &Client,
    server: Option<u32>,
    call: Call,
    in_flight: u16,
    time: Duration,
    sealed: (&[u8], &str),
) -> Result<Measured, Failure> {
    let (began, cpu_before) = (Instant::now(), server.and_then(cpu_time));
    let lanes = (0..in_flight).map(|_| repeat(client.clone(), call, began + time, sealed));
    let mut latencies: Vec<u64> = try_join_all(lanes).await?.concat();
    let (elapsed, cpu_after) = (began.elapsed(), server.and_then(cpu_time));
    latencies.sort_unstable();
    let operations = latencies.len();
    let percentile = |of: usize| latencies.get(operations * of / 100).copied().unwrap_or_default();
    let cpu = cpu_before.zip(cpu_after).map(|(before, after)| after.saturating_sub(before));
    Ok(Measured {
        call,
        in_flight,
        operations,
        per_second: operations as f64 / elapsed.as_secs_f64(),
        p50_micros: percentile(50),
        p99_micros: percentile(99),
        cpu_micros: cpu.map(|cpu| cpu.as_secs_f64() * 1e6 / operations.max(1) as f64),
    })
}

/// One request after the other until the end; the time of each in microseconds.
async fn repeat(
    mut client: Client,
    call: Call,
    end: Instant,
    (ciphertext, key_id): (&[u8], &str),
) -> Result<Vec<u64>, ClientError> {
    let mut latencies = Vec::new();
    while Instant::now() < end {
        let began = Instant::now();
        match call {
            Call::Encrypt => drop(client.encrypt(vec![7; 32]).await?),
            Call::Decrypt => drop(client.decrypt(ciphertext.to_vec(), key_id.to_owned()).await?),
        }
        latencies.push(u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX));
    }
    Ok(latencies)
}

/// Wraps and unwraps without queue and service: on one session, and on as many at a time as are configured.
async fn measure_token(file: &Path) -> Result<Vec<TokenCost>, Failure> {
    let config = Config::load(file)?;
    let state = assemble::state(&config)?;
    let Some(provider) = config.providers.iter().find(|provider| provider.seal) else { return Ok(Vec::new()) };
    let pkcs11 = assemble::provider(provider, &state, &Leader::default())?;
    pkcs11.reach_every_token().await?;
    let mut costs = Vec::new();
    for sessions in BTreeSet::from([1, provider.sessions]) {
        let cost = pkcs11.cost(sessions, Instant::now() + Duration::from_secs(30)).await?;
        for (call, cpu) in [(Call::Encrypt, cost.wrap), (Call::Decrypt, cost.unwrap)] {
            costs.push(TokenCost { call, sessions, cpu_micros: cpu.as_secs_f64() * 1e6 });
        }
    }
    Ok(costs)
}

/// User and system time of a process (proc_pid_stat(5), fields 14 and 15, in hundredths of a second).
fn cpu_time(pid: u32) -> Option<Duration> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, fields) = stat.rsplit_once(") ")?;
    let ticks: Vec<u64> = fields.split(' ').skip(11).take(2).filter_map(|field| field.parse().ok()).collect();
    Some(Duration::from_millis(10 * ticks.iter().sum::<u64>()))
}

fn resident_kib(pid: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB")?.parse().ok())
}

fn text(report: &Report) -> String {
    let row = |measured: &Measured| {
        vec![
            format!("{:?}", measured.call),
            measured.in_flight.to_string(),
            format!("{:.0}", measured.per_second),
            measured.p50_micros.to_string(),
            measured.p99_micros.to_string(),
            measured.cpu_micros.map_or("?".into(), |cpu| format!("{cpu:.1}")),
        ]
    };
    let header = ["CALL", "IN FLIGHT", "PER SECOND", "P50 µs", "P99 µs", "CPU µs"];
    let mut text = table(&header, report.requests.iter().map(row).collect());
    for cost in &report.token {
        let TokenCost { call, sessions, cpu_micros } = cost;
        text.push_str(&format!("\nthe token alone, {sessions} sessions at a time: {call:?} {cpu_micros:.1} µs CPU"));
    }
    if let Some(resident) = report.resident_kib {
        text.push_str(&format!("\nthe plugin's memory: {:.1} MiB", resident as f64 / 1024.0));
    }
    text
}
