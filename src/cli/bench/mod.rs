//! `trousseau bench`: what a plugin does a second and what its token alone does, which of them is the limit, and how
//! many sessions there should be.

mod figures;
mod load;
mod progress;
mod token;
mod verdict;

use std::cmp::Ordering;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};
use serde::Serialize;

use self::figures::Figures;
use self::load::{Load, Measured, Plugin};
use self::progress::Progress;
use self::token::{Level, Levels, Token};
use self::verdict::{Limit, Reached, Verdict, counted, on_plugin, on_token};
use super::output::{Failure, Format, print, print_json, table};
use super::{OutputArgs, SocketArgs, some_duration};
use crate::config::Config;
use crate::service::client::Client;

pub(super) const EXAMPLES: &str = "It sends real requests over one connection, as an API server does. With --config it \
also has the token work without the plugin, in this process, on 1, 2, 4, … sessions at a time until more bring no more; \
then it says what is the limit and what `sessions` should be. With --token it does only that. Where only providers of type \
transit seal, there is no token, and the plugin alone is measured.

CPU is what the whole process that makes the calls used for each operation, its token's library included. With --rate \
the time of a request counts from the instant when it was due. Measure when nobody else needs the token, and compare \
figures of one run only: a shared machine changes its speed.

Examples:
  trousseau bench
  trousseau bench --config /etc/trousseau/trousseau.toml
  trousseau bench --token --config /etc/trousseau/trousseau.toml --max-sessions 64
  trousseau bench --call decrypt --rate 200 --time 30s --histogram
  trousseau bench --in-flight 1,16,64 --output json";

/// Vault and OpenBao are measured by what a plugin reaches with them.
const NO_TOKEN: &str = "no provider that seals has a token, for Transit has none";

#[derive(Args)]
pub(super) struct BenchArgs {
    #[command(flatten)]
    socket: SocketArgs,
    /// The plugin's configuration: its token is measured alone as well, and the limit is told.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Measure only the token of --config, without a plugin.
    #[arg(long, requires = "config", conflicts_with_all = ["socket", "pid", "in_flight", "rate"])]
    token: bool,
    /// The most sessions of the token alone that are tried at a time.
    #[arg(long, value_name = "N", default_value = "32", requires = "config", value_parser = clap::value_parser!(u16).range(1..=256))]
    max_sessions: u16,
    /// The plugin's process, where systemd made the socket; `systemctl show -P MainPID trousseau` tells it.
    #[arg(long)]
    pid: Option<u32>,
    /// Requests under way at a time.
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_value = "1,16,64", value_parser = clap::value_parser!(u16).range(1..=1000))]
    in_flight: Vec<u16>,
    /// Requests a second instead, at random instants (Poisson), whatever has been answered by then.
    #[arg(long, value_name = "N,…", value_delimiter = ',', conflicts_with = "in_flight", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    rate: Vec<u32>,
    /// Only this call [default: both].
    #[arg(long)]
    call: Option<Call>,
    /// How long each measurement takes.
    #[arg(long, value_name = "DURATION", default_value = "3s", value_parser = some_duration)]
    time: jiff::SignedDuration,
    /// Print how the times are distributed; json always has it.
    #[arg(long)]
    histogram: bool,
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
    /// What the plugin did.
    requests: Vec<Measured>,
    /// What the token did without it.
    token: Vec<Level>,
    /// Why no more of the token's sessions were tried, where it gave none or is none.
    token_refused: Option<String>,
    verdicts: Vec<Verdict>,
    /// What the configuration says.
    sessions: Option<usize>,
    /// What it should say: enough for each call, if that is known.
    sessions_advised: Option<usize>,
    /// The plugin's resident memory at the end, in KiB.
    resident_kib: Option<u64>,
}

pub(super) fn run(args: &BenchArgs) -> Result<(), Failure> {
    let report = super::runtime()?.block_on(measure(args))?;
    match args.output.output {
        Format::Json => print_json(&report),
        Format::Text => print(&text(&report, args.histogram)),
    }
}

async fn measure(args: &BenchArgs) -> Result<Report, Failure> {
    let calls = args.call.map_or(vec![Call::Encrypt, Call::Decrypt], |call| vec![call]);
    let loads: Vec<Load> = match (args.token, args.rate.is_empty()) {
        (true, _) => Vec::new(),
        (false, true) => args.in_flight.iter().copied().map(Load::InFlight).collect(),
        (false, false) => args.rate.iter().copied().map(Load::Rate).collect(),
    };
    let (time, max) = (args.time.unsigned_abs(), usize::from(args.max_sessions));
    let config = args.config.as_deref().map(Config::load).transpose()?;
    let token = match &config {
        Some(config) => Token::open(config).await?,
        None => None,
    };
    if args.token && token.is_none() {
        return Err(Failure::usage(NO_TOKEN, "without --token the plugin is measured"));
    }
    let steps = token.as_ref().map_or(0, |token| token.steps(max).len());
    let measurements = u32::try_from(calls.len() * (loads.len() + steps)).unwrap_or(u32::MAX);
    let progress = Progress::start(time.saturating_mul(measurements));

    let (mut requests, mut resident_kib) = (Vec::new(), None);
    if !args.token {
        progress.says("connecting");
        let client = Client::connect(args.socket.of(config.as_ref()), Duration::from_secs(10)).await?;
        let plugin = Plugin::new(client, args.pid, &loads).await?;
        for call in &calls {
            for load in &loads {
                progress.says(format!("{call:?}, {load}"));
                requests.push(plugin.measure(*call, *load, time).await?);
            }
        }
        resident_kib = plugin.resident_kib();
    }
    let levels = match &token {
        Some(token) => token.measure(&calls, max, time, &progress)?,
        None => Levels { refused: config.as_ref().map(|_| NO_TOKEN.to_owned()), ..Levels::default() },
    };
    let sessions = token.map(|token| token.sessions);
    let verdicts = match sessions {
        Some(sessions) => calls.iter().flat_map(|call| judge(*call, &requests, sessions, &levels)).collect(),
        None => Vec::new(),
    };
    let is_open = |verdict: &Verdict| verdict.limit == Limit::Sessions && verdict.sessions.is_none();
    let advised = verdicts.iter().filter_map(|verdict| verdict.sessions).max();
    let sessions_advised = advised.filter(|_| !verdicts.iter().any(is_open));
    let Levels { levels, refused } = levels;
    Ok(Report { requests, token: levels, token_refused: refused, verdicts, sessions, sessions_advised, resident_kib })
}

/// One verdict on the most that was reached, or on each rate.
fn judge(call: Call, requests: &[Measured], sessions: usize, levels: &Levels) -> Vec<Verdict> {
    let steps = levels.steps_of(call);
    let of_call = requests.iter().filter(|measured| measured.call == call);
    let mut reached = Vec::new();
    let mut most: Option<(f64, usize)> = None;
    for Measured { load, figures, .. } in of_call {
        match load {
            Load::Rate(_) => {
                reached.push(Reached::Rate { per_second: figures.per_second, p99_micros: figures.p99_micros as f64 })
            }
            Load::InFlight(in_flight) => {
                let (per_second, most_in_flight) = most.unwrap_or_default();
                most = Some((per_second.max(figures.per_second), most_in_flight.max(usize::from(*in_flight))));
            }
        }
    }
    reached.extend(most.map(|(per_second, in_flight)| Reached::InFlight { per_second, in_flight }));
    if requests.is_empty() {
        return on_token(call, &steps).into_iter().collect();
    }
    reached.into_iter().filter_map(|reached| on_plugin(call, reached, sessions, &steps)).collect()
}

fn text(report: &Report, histogram: bool) -> String {
    let row = |call: Call, at: String, figures: &Figures| {
        [format!("{call:?}"), at].into_iter().chain(figures.row()).collect::<Vec<_>>()
    };
    let header = |at| [&["CALL", at][..], &Figures::HEADER].concat();
    let mut parts = Vec::new();
    if let Some(first) = report.requests.first() {
        let at = |measured: &Measured| match measured.load {
            Load::InFlight(in_flight) => in_flight.to_string(),
            Load::Rate(rate) => rate.to_string(),
        };
        let rows = report.requests.iter().map(|measured| row(measured.call, at(measured), &measured.figures));
        let unit = if matches!(first.load, Load::Rate(_)) { "RATE" } else { "IN FLIGHT" };
        parts.push(table(&header(unit), rows.collect()));
        for Measured { call, load, failed, .. } in report.requests.iter().filter(|measured| measured.failed > 0) {
            parts.push(format!("{failed} requests failed: {call:?}, {load}"));
        }
    }
    if !report.token.is_empty() {
        let rows = report.token.iter().map(|level| row(level.call, level.sessions.to_string(), &level.figures));
        parts.push(format!("The token alone:\n{}", table(&header("SESSIONS"), rows.collect())));
        parts.extend(report.token_refused.iter().map(|why| format!("The token gave no more: {why}")));
    }
    if histogram {
        let of_plugin = report.requests.iter().map(|of| (format!("{:?}, {}", of.call, of.load), &of.figures));
        let of_token = report
            .token
            .iter()
            .map(|of| (format!("{:?} of the token alone, {} at a time", of.call, counted(of.sessions)), &of.figures));
        parts.extend(of_plugin.chain(of_token).map(|(what, figures)| format!("{what}, up to{}", figures.bars())));
    }
    let mut last: Vec<String> = report.verdicts.iter().map(|verdict| verdict.words.clone()).collect();
    last.extend(report.sessions.zip(report.sessions_advised).map(|(is, advised)| match is.cmp(&advised) {
        Ordering::Less => format!("sessions = {advised} brings the most; it is {is}"),
        Ordering::Equal => format!("sessions = {is} is right"),
        Ordering::Greater => format!("sessions = {advised} is enough; it is {is}"),
    }));
    if report.sessions.is_none() {
        last.push(match &report.token_refused {
            Some(why) => format!("the token alone was not measured: {why}; so what the limit is cannot be told"),
            None => "with --config it is also told what the limit is".into(),
        });
    } else if report.verdicts.is_empty() {
        last.push("what the limit is cannot be told: --max-sessions is less than `sessions`".into());
    }
    last.extend(report.resident_kib.map(|kib| format!("the plugin's memory: {:.1} MiB", kib as f64 / 1024.0)));
    parts.push(last.join("\n"));
    parts.join("\n\n")
}
