//! `trousseau audit …`: the audit log's own verbs.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, BufRead, BufReader, ErrorKind, Read};
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use serde::Serialize;

use super::OutputArgs;
use super::output::{Failure, Format, print, print_json};
use crate::audit::{Event, Head, LONGEST_LINE, Snapshot, Verifier, append_one, open_part, try_open};
use crate::config::{AuditConfig, OnFailure};
use crate::disk;
use crate::identity::Identity;

/// More would hide the first ones.
const MOST_FLAWS: usize = 100;

const VERIFY: &str =
    "It follows the chain of hashes through the files that were put aside, the oldest first, and the one \
that is written. The oldest line may follow any other: older files may have been archived. An end that was cut off, or \
written anew, while the plugin ran is a finding. While it did not run, that shows only against the heads that the \
journal was told: give all of them since the last verification with --head, not the newest alone, which may be of the \
chain that was written anew. Archive a file only after that. A process that ended without a `stop`, killed say, is told \
of and no flaw: what it had not written yet is not there.

Exit code 0: the chain is whole. 1: it is not, or has no line. 77: a file may not be read. 78: there is no log at that \
place.

Examples:
  trousseau audit verify
  trousseau audit verify --head 5e884898da28047151d0e56f8dc6292773603d0d6aabbdd62a11ef721d1542d8
  journalctl -u trousseau -o cat --since 2026-11-01 | grep 'head of the audit log' | jq -r .hash |
    trousseau audit verify --head -";

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
    /// A hash that the journal was told, 64 hex digits: it must be one of the chain's. Can be given several times; `-`
    /// reads them from standard input, one a line.
    #[arg(long, value_name = "HASH", value_parser = hash_or_stdin)]
    head: Vec<String>,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Report {
    files: Vec<PathBuf>,
    lines: u64,
    /// The number of the oldest line.
    first_seq: Option<u64>,
    flaws: Vec<FlawAt>,
    /// Starts after a process that wrote no stop.
    unclean_ends: Vec<Place>,
    /// The number of the newest line.
    seq: Option<u64>,
    /// Its hash.
    hash: Option<String>,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Place {
    file: PathBuf,
    line: u64,
}

#[derive(Serialize)]
struct FlawAt {
    #[serde(flatten)]
    place: Place,
    flaw: String,
}

/// Why an audit log cannot be used, and what to do about it.
pub(super) fn unusable(error: &io::Error) -> Failure {
    Failure::failed(format!("audit log {error}"), remedy(error))
}

/// What is no matter of the disk's, nor of the directory's, says itself what to do.
fn remedy(error: &io::Error) -> &'static str {
    disk::remedy(error).unwrap_or(match error.kind() {
        ErrorKind::Other => "",
        _ => "make its directory, and give it to the plugin's user",
    })
}

/// Whether something may be done that is to be logged: where what cannot be is refused, the log must be one that opens.
pub(super) fn can_be_logged(config: &AuditConfig) -> Result<(), Failure> {
    match config.on_failure {
        OnFailure::Count => Ok(()),
        OnFailure::Refuse => try_open(config).map_err(|error| unusable(&error)),
    }
}

/// Writes down that somebody made a KEK, or may have: then `done` says so, and its identity may not be known. It is done by
/// then.
///
/// # Errors
/// The log has no line of it.
pub(super) fn append(config: &AuditConfig, kek: Option<Identity>, done: &str, what: &str) -> Result<(), Failure> {
    let login = std::fs::read_to_string("/proc/self/loginuid").unwrap_or_default();
    // The kernel's word for nobody: a process that no login has started.
    let login = match login.trim() {
        "" | "4294967295" => String::new(),
        login => format!(", logged in as uid {login}"),
    };
    let detail = format!("{what}; by uid {}{login}", rustix::process::getuid().as_raw());
    let event = Event { keks: kek.into_iter().collect(), detail, ..Event::now("key-generated") };
    append_one(config, event).map_err(|error| {
        let what = format!("{done}, but the audit log has no line of it: {error}");
        let remedy = [remedy(&error), "write the KEK into the minutes"].join("; ");
        Failure::failed(what, remedy.trim_start_matches("; "))
    })
}

pub(super) fn run(verb: AuditVerb) -> Result<(), Failure> {
    let AuditVerb::Verify(args) = verb;
    let report = verify(&args.file, heads(&args.head)?)?;
    match args.output.output {
        Format::Json => print_json(&report)?,
        Format::Text => print(&text(&report))?,
    }
    if report.flaws.is_empty() { Ok(()) } else { Err(Failure::failed("the audit log is not whole", "")) }
}

/// The heads that must be in the chain.
fn heads(named: &[String]) -> Result<BTreeSet<String>, Failure> {
    let mut heads: BTreeSet<String> = named.iter().filter(|head| *head != "-").cloned().collect();
    if named.iter().any(|head| head == "-") {
        let lines: io::Result<Vec<String>> = io::stdin().lines().collect();
        let lines = lines.map_err(|error| Failure::failed(format!("standard input: {error}"), ""))?;
        if lines.is_empty() {
            let remedy = "was the journal told no head in that time? it is on every start, and at `head-every`";
            return Err(Failure::usage("there is no hash in standard input", remedy));
        }
        for (line, number) in lines.iter().zip(1..) {
            let wrong = |why| Failure::usage(format!("line {number} of standard input: {why}"), "");
            heads.insert(hash(line).map_err(wrong)?);
        }
    }
    Ok(heads)
}

fn verify(file: &Path, heads: BTreeSet<String>) -> Result<Report, Failure> {
    let Snapshot { parts, newest, written } = Snapshot::take(file).map_err(|error| unreadable(file, &error))?;
    let mut reading = Reading { unseen: heads, ..Reading::default() };
    let mut newest = Some(newest);
    for part in &parts {
        // The newest may have another name by now.
        let read = match newest.take_if(|_| part == file) {
            Some(newest) => reading.read(part, newest, written),
            None => open_part(part).and_then(|opened| reading.read(part, opened, u64::MAX)),
        };
        read.map_err(|error| unreadable(part, &error))?;
    }
    Ok(reading.end(file, parts))
}

/// What is found on the way through a log.
#[derive(Default)]
struct Reading {
    verifier: Verifier,
    lines: u64,
    first_seq: Option<u64>,
    flaws: Vec<FlawAt>,
    unclean_ends: Vec<Place>,
    /// Heads that were told, and of which no line has the hash so far.
    unseen: BTreeSet<String>,
}

impl Reading {
    /// The next file, up to this length.
    fn read(&mut self, path: &Path, file: File, length: u64) -> io::Result<()> {
        let mut reader = BufReader::with_capacity(1 << 20, file.take(length));
        let mut line = Vec::new();
        for number in 1.. {
            line.clear();
            // A longer line is none of ours, and may have no end: the file is not read on.
            let count = Read::by_ref(&mut reader).take(LONGEST_LINE + 1).read_until(b'\n', &mut line)?;
            if count > 0 {
                self.next(line.strip_suffix(b"\n").unwrap_or(&line), || Place { file: path.to_owned(), line: number });
            }
            if count == 0 || count as u64 > LONGEST_LINE {
                break;
            }
        }
        Ok(())
    }

    fn next(&mut self, line: &[u8], place: impl Fn() -> Place) {
        self.lines += 1;
        if let (Err(flaw), true) = (self.verifier.next(line), self.flaws.len() < MOST_FLAWS) {
            self.flaws.push(FlawAt { place: place(), flaw: flaw.to_string() });
        }
        if self.verifier.follows_unclean_end() && self.unclean_ends.len() < MOST_FLAWS {
            self.unclean_ends.push(place());
        }
        let Some(head) = self.verifier.head() else { return };
        self.unseen.remove(&head.hash);
        if self.first_seq.is_none() {
            self.first_seq = Some(head.seq);
            if head.seq == 1 {
                self.unseen.remove(&Head::default().hash); // what the journal is told before there is a line
            }
        }
    }

    fn end(self, file: &Path, files: Vec<PathBuf>) -> Report {
        const GONE: &str = "the end was cut off, all was written anew, or an older file is not here";
        let Self { verifier, lines, first_seq, mut flaws, unclean_ends, unseen } = self;
        let at_end = |flaw: String| FlawAt { place: Place { file: file.to_owned(), line: lines }, flaw };
        if lines == 0 {
            flaws.push(at_end("there is no line: all was removed, or nothing was ever logged".into()));
        } else {
            let gone = unseen.iter().map(|head| at_end(format!("no line has the hash of --head {head}: {GONE}")));
            flaws.extend(gone.take(MOST_FLAWS));
        }
        let (seq, hash) = verifier.head().map(|head| (head.seq, head.hash.clone())).unzip();
        Report { files, lines, first_seq, flaws, unclean_ends, seq, hash }
    }
}

fn unreadable(file: &Path, error: &io::Error) -> Failure {
    let what = format!("{}: {error}", file.display());
    match error.kind() {
        ErrorKind::PermissionDenied => Failure::not_permitted(what, "run this as its owner or root".into()),
        ErrorKind::NotFound => {
            Failure::configuration(what, "name the file of [audit]; if it is that one, it was removed")
        }
        _ => Failure::failed(what, disk::remedy(error).unwrap_or_default()),
    }
}

/// A hash as lines have it.
fn hash(text: &str) -> Result<String, String> {
    if text.len() == 64 && text.bytes().all(|digit| digit.is_ascii_hexdigit()) {
        return Ok(text.to_ascii_lowercase());
    }
    Err("a hash is 64 hex digits, as the journal has it".into())
}

fn hash_or_stdin(text: &str) -> Result<String, String> {
    if text == "-" { Ok(text.into()) } else { hash(text) }
}

fn text(report: &Report) -> String {
    const UNCLEAN: &str = "the process before this start wrote no stop: its last events may be missing";
    let shown = |Place { file, line }: &Place, what: &str| format!("{}, line {line}: {what}", file.display());
    let mut text: Vec<String> = report.flaws.iter().map(|flaw| shown(&flaw.place, &flaw.flaw)).collect();
    text.extend(report.unclean_ends.iter().map(|start| shown(start, UNCLEAN)));
    if report.flaws.len().max(report.unclean_ends.len()) >= MOST_FLAWS {
        text.push("and more".into());
    }
    let numbers = match (report.first_seq, report.seq) {
        (Some(1), Some(last)) => format!(" (1 to {last})"),
        (Some(first), Some(last)) => format!(" ({first} to {last}; older ones are not here)"),
        _ => String::new(),
    };
    let verdict = if report.flaws.is_empty() { "whole" } else { "NOT WHOLE" };
    text.push(format!("{} lines{numbers} in {} files: the chain is {verdict}", report.lines, report.files.len()));
    text.extend(report.seq.zip(report.hash.as_ref()).map(|(seq, hash)| format!("head  {seq} {hash}")));
    text.join("\n")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    #[test]
    fn a_log_is_whole_also_while_files_of_it_are_put_aside() {
        let directory = tempfile::tempdir().unwrap();
        let config = AuditConfig::of_test(directory.path(), 1);
        let file = config.file.clone();
        append_one(&config, Event::now("start")).unwrap();
        let ended = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let write = || {
                while !ended.load(Ordering::Relaxed) {
                    append_one(&config, Event::now("encrypt")).unwrap();
                }
            };
            scope.spawn(write);
            scope.spawn(write);
            let (mut files, mut reports) = (0, Vec::new());
            while files < 100 {
                let report = verify(&file, BTreeSet::new()).map(|report| (report.files.len(), text(&report)));
                files = report.as_ref().map_or(100, |(files, _)| *files);
                reports.push(report);
            }
            ended.store(true, Ordering::Relaxed);
            for report in reports {
                assert!(report.as_ref().is_ok_and(|(_, text)| text.contains("the chain is whole")), "{report:?}");
            }
        });
    }
}
