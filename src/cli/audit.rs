//! `trousseau audit …`: the audit log's own verbs.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use rustix::fs::{FlockOperation, flock};
use serde::Serialize;

use super::OutputArgs;
use super::output::{Failure, Format, print, print_json};
use crate::audit::{Event, Head, Verifier, append_one, parts};
use crate::config::AuditConfig;
use crate::identity::Identity;

/// More would hide the first ones.
const MOST_FLAWS: usize = 100;

const VERIFY: &str =
    "It follows the chain of hashes through the files that were put aside, the oldest first, and the one \
that is written. The oldest line may follow any other: older files may have been archived. What was cut off at the end \
shows only against a head that the journal was told: give that with --head.

Exit code 0: the chain is whole. 1: it is not.

Examples:
  trousseau audit verify
  trousseau audit verify /var/log/trousseau/audit.log --head 5e884898…
  journalctl -u trousseau -o cat | grep 'head of the audit log' | tail -1";

#[derive(Subcommand)]
pub(super) enum AuditVerb {
    /// Find lines of an audit log that were changed, dropped or moved.
    #[command(after_help = VERIFY)]
    Verify(VerifyArgs),
}

#[derive(Args)]
pub(super) struct VerifyArgs {
    /// The file that is written.
    #[arg(value_name = "FILE", default_value = "/var/log/trousseau/audit.log")]
    file: PathBuf,
    /// A hash that the journal was told: it must be one of the chain's.
    #[arg(long, value_name = "HASH")]
    head: Option<String>,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Report {
    files: Vec<PathBuf>,
    lines: u64,
    flaws: Vec<FlawAt>,
    #[serde(flatten)]
    head: Option<Head>,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct FlawAt {
    file: PathBuf,
    line: u64,
    flaw: String,
}

/// Writes down what somebody did with a KEK. It is done by then: what cannot be written is only told.
pub(super) fn append(config: &AuditConfig, event: &'static str, kek: Identity, what: &str) {
    let login = std::fs::read_to_string("/proc/self/loginuid").unwrap_or_default();
    // The kernel's word for nobody: a process that no login has started.
    let login = match login.trim() {
        "" | "4294967295" => String::new(),
        login => format!(", logged in as uid {login}"),
    };
    let detail = format!("{what}; by uid {}{login}", rustix::process::getuid().as_raw());
    if let Err(error) = append_one(config, Event { keks: vec![kek], detail, ..Event::now(event) }) {
        tracing::error!(error, event, "the audit log cannot be written");
    }
}

pub(super) fn run(verb: AuditVerb) -> Result<(), Failure> {
    let AuditVerb::Verify(args) = verb;
    let report = verify(&args)?;
    match args.output.output {
        Format::Json => print_json(&report)?,
        Format::Text => print(&text(&report))?,
    }
    if report.flaws.is_empty() { Ok(()) } else { Err(Failure::failed("the audit log is not whole", "")) }
}

fn verify(args: &VerifyArgs) -> Result<Report, Failure> {
    let (files, written) = files(&args.file).map_err(|error| unreadable(&args.file, &error))?;
    let (mut verifier, mut lines, mut flaws) = (Verifier::default(), 0, Vec::new());
    let mut head_is_found = args.head.is_none();
    for file in &files {
        let length = if *file == args.file { written } else { u64::MAX };
        let opened = File::open(file).map_err(|error| unreadable(file, &error))?;
        let mut reader = BufReader::with_capacity(1 << 20, opened.take(length));
        let mut line = Vec::new();
        for number in 1.. {
            line.clear();
            if reader.read_until(b'\n', &mut line).map_err(|error| unreadable(file, &error))? == 0 {
                break;
            }
            lines += 1;
            let found = verifier.next(line.strip_suffix(b"\n").unwrap_or(&line));
            if let (Err(flaw), true) = (found, flaws.len() < MOST_FLAWS) {
                flaws.push(FlawAt { file: file.clone(), line: number, flaw: flaw.to_string() });
            }
            head_is_found = head_is_found || verifier.head().is_some_and(|head| Some(&head.hash) == args.head.as_ref());
        }
    }
    if !head_is_found {
        let flaw = "no line has the hash of --head: the end was cut off, or everything was written anew".into();
        flaws.push(FlawAt { file: args.file.clone(), line: lines, flaw });
    }
    Ok(Report { files, lines, flaws, head: verifier.head().cloned() })
}

/// The parts, and how much of the newest is written by now: nobody is in the middle of a line, or of a rotation.
fn files(path: &Path) -> std::io::Result<(Vec<PathBuf>, u64)> {
    let written = File::open(path)?;
    flock(&written, FlockOperation::LockShared)?;
    Ok((parts(path)?, written.metadata()?.len()))
}

fn unreadable(file: &Path, error: &std::io::Error) -> Failure {
    Failure::failed(format!("{}: {error}", file.display()), "name the audit log, and run this as its owner or root")
}

fn text(report: &Report) -> String {
    let shown = |flaw: &FlawAt| format!("{}, line {}: {}", flaw.file.display(), flaw.line, flaw.flaw);
    let mut text: Vec<String> = report.flaws.iter().map(shown).collect();
    if text.len() == MOST_FLAWS {
        text.push("and more".into());
    }
    let verdict = if report.flaws.is_empty() { "whole" } else { "NOT WHOLE" };
    text.push(format!("{} lines in {} files: the chain is {verdict}", report.lines, report.files.len()));
    text.extend(report.head.as_ref().map(|head| format!("head  {} {}", head.seq, head.hash)));
    text.join("\n")
}
