//! The lines of an audit log, and the chain that holds them together. Pure: no I/O.
//!
//! A line is one JSON object. It begins with its number, `seq`, and with `prev`: the SHA-256, in hex, of the line before
//! it, without the line end. So a changed line does not fit the next one's `prev`, a line that is missing leaves a gap in
//! the numbers, and one that was moved is out of order. Whoever rewrites everything from some line on is found out by the
//! head, the hash of the last line, which the journal is told now and then.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::identity::Identity;

/// The hash of a line, in hex; of nothing, before the first one.
const NOTHING: &str = "0000000000000000000000000000000000000000000000000000000000000000";

/// How far a chain has come.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Head {
    /// The number of the last line; 0 before the first.
    pub seq: u64,
    /// Its hash, in hex.
    pub hash: String,
}

impl Default for Head {
    fn default() -> Self {
        Self { seq: 0, hash: NOTHING.into() }
    }
}

/// What happened. Fields that say nothing of an event are not in its line.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Event {
    /// When.
    pub time: Timestamp,
    /// What: a call, or a word such as `start`.
    pub event: &'static str,
    /// The request's uid, as the API server sent it, at most 128 letters of it.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub uid: String,
    /// Who asked: process and user.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub peer: Option<Peer>,
    /// The key_id of the ciphertext.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub key_id: String,
    /// The KEKs that the ciphertext's DEK is wrapped under, or the one that the event is about.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub keks: Vec<Identity>,
    /// Bytes that came in.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub received: Option<usize>,
    /// The gRPC code that was answered.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub outcome: Option<&'static str>,
    /// What else there is to say, or who did it.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub detail: String,
}

/// The process at the other end of the socket (SO_PEERCRED), as it was when it connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct Peer {
    /// Its process id.
    #[serde(rename = "peer-pid")]
    pub pid: i32,
    /// Its user.
    #[serde(rename = "peer-uid")]
    pub uid: u32,
}

impl Event {
    /// Something that happens now.
    #[must_use]
    pub fn now(event: &'static str) -> Self {
        Self {
            time: Timestamp::now(),
            event,
            uid: String::new(),
            peer: None,
            key_id: String::new(),
            keks: Vec::new(),
            received: None,
            outcome: None,
            detail: String::new(),
        }
    }
}

#[derive(Serialize)]
struct Line<'a> {
    seq: u64,
    prev: &'a str,
    #[serde(flatten)]
    event: &'a Event,
}

/// What every line has, and what happened: a word, which needs no escape.
#[derive(Deserialize)]
struct Links<'a> {
    seq: u64,
    prev: &'a str,
    #[serde(default)]
    event: &'a str,
}

impl Head {
    /// Adds the line of an event, with its end, to `lines`.
    pub(super) fn append(&mut self, event: &Event, lines: &mut Vec<u8>) {
        let seq = self.seq.saturating_add(1);
        let start = lines.len();
        if let Err(error) = serde_json::to_writer(&mut *lines, &Line { seq, prev: &self.hash, event }) {
            lines.truncate(start);
            tracing::error!(%error, "an event cannot be written as JSON"); // such plain fields always can
            return;
        }
        *self = Self { seq, hash: hash(lines.get(start..).unwrap_or_default()) };
        lines.push(b'\n');
    }

    /// The head of a chain that ends with this line, without its end.
    ///
    /// # Errors
    /// It is no line of an audit log.
    pub(super) fn at(line: &[u8]) -> Result<Self, Flaw> {
        let Links { seq, .. } = serde_json::from_slice(line).map_err(|_| Flaw::Unreadable)?;
        Ok(Self { seq, hash: hash(line) })
    }

    /// Whether this line follows it.
    pub(super) fn precedes(&self, line: &[u8]) -> bool {
        let links: Result<Links<'_>, _> = serde_json::from_slice(line);
        links.is_ok_and(|Links { seq, prev, .. }| seq.checked_sub(1) == Some(self.seq) && prev == self.hash)
    }
}

fn hash(line: &[u8]) -> String {
    base16ct::lower::encode_string(&Sha256::digest(line))
}

/// What is wrong with a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Flaw {
    /// Not JSON with a number and a hash.
    #[error("it is no line of an audit log: it was changed, or cut off")]
    Unreadable,
    /// The line before it is not the one that it follows.
    #[error("the line before it was changed, or is not the one that it follows")]
    Changed,
    /// Numbers are missing.
    #[error("{0} lines before it are missing")]
    Missing(u64),
    /// Its number is not higher than the one before.
    #[error("it is out of order, or a copy")]
    OutOfOrder,
    /// The line says so itself.
    #[error("the plugin found its log cut off or written anew: the detail of this line says how far it had come")]
    Rewritten,
}

/// The event of a log that no longer ended as the plugin had left it.
pub(super) const REWRITTEN: &str = "rewritten";

/// Follows a chain, line by line.
#[derive(Debug, Default)]
pub struct Verifier {
    head: Option<Head>,
    /// There was a `start`, and no `stop` since.
    is_running: bool,
    is_unclean: bool,
}

impl Verifier {
    /// The next line, without its end. After a flaw it goes on from that line.
    ///
    /// # Errors
    /// What is wrong.
    pub fn next(&mut self, line: &[u8]) -> Result<(), Flaw> {
        let links: Result<Links<'_>, _> = serde_json::from_slice(line);
        self.is_unclean = false;
        let Ok(Links { seq, prev, event }) = links else { return Err(Flaw::Unreadable) };
        self.is_unclean = self.is_running && event == "start";
        self.is_running = event == "start" || self.is_running && event != "stop";
        let before = self.head.replace(Head { seq, hash: hash(line) });
        let said = if event == REWRITTEN { Err(Flaw::Rewritten) } else { Ok(()) };
        let Some(before) = before else { return said }; // an older file may have been put aside
        match seq.checked_sub(before.seq) {
            None | Some(0) => Err(Flaw::OutOfOrder),
            Some(1) if prev == before.hash => said,
            Some(1) => Err(Flaw::Changed),
            Some(more) => Err(Flaw::Missing(more - 1)),
        }
    }

    /// Whether the last line is a `start` after a process that wrote no `stop`: it was killed, or its disk took nothing.
    #[must_use]
    pub const fn follows_unclean_end(&self) -> bool {
        self.is_unclean
    }

    /// Where it is.
    #[must_use]
    pub fn head(&self) -> Option<&Head> {
        self.head.as_ref()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
mod tests {
    use super::*;

    fn lines(count: usize) -> Vec<Vec<u8>> {
        let (mut head, mut bytes) = (Head::default(), Vec::new());
        for n in 0..count {
            head.append(&Event { uid: format!("u\"{n}\n"), ..Event::now("encrypt") }, &mut bytes);
        }
        bytes.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()).map(<[u8]>::to_vec).collect()
    }

    fn flaws(lines: &[Vec<u8>]) -> Vec<(usize, Flaw)> {
        let mut verifier = Verifier::default();
        lines.iter().enumerate().filter_map(|(n, line)| Some((n, verifier.next(line).err()?))).collect()
    }

    #[test]
    fn what_was_done_to_a_chain_is_found_where_it_was_done() {
        let whole = lines(9);
        let changed = |at: usize| {
            let mut lines = whole.clone();
            let text = String::from_utf8(lines[at].clone()).unwrap();
            lines[at] = text.replace("encrypt", "decrypt").into_bytes();
            lines
        };
        let without = |gone: std::ops::Range<usize>| {
            let mut lines = whole.clone();
            lines.drain(gone);
            lines
        };
        let mut swapped = whole.clone();
        swapped.swap(3, 4);
        let mut twice = whole.clone();
        twice.insert(4, whole[3].clone());
        let mut cut = whole.clone();
        cut[5].truncate(20);
        type Case<'a> = (&'a str, Vec<Vec<u8>>, &'a [(usize, Flaw)]);
        let cases: &[Case<'_>] = &[
            ("nothing", whole.clone(), &[]),
            ("the oldest put aside", without(0..4), &[]),
            ("one changed", changed(3), &[(4, Flaw::Changed)]),
            ("one dropped", without(3..4), &[(3, Flaw::Missing(1))]),
            ("three dropped", without(3..6), &[(3, Flaw::Missing(3))]),
            ("two swapped", swapped, &[(3, Flaw::Missing(1)), (4, Flaw::OutOfOrder), (5, Flaw::Missing(1))]),
            ("one repeated", twice, &[(4, Flaw::OutOfOrder)]),
            ("one cut off", cut, &[(5, Flaw::Unreadable), (6, Flaw::Missing(1))]),
        ];
        for (case, lines, expected) in cases {
            assert_eq!(flaws(lines), *expected, "{case}");
        }
    }

    #[test]
    fn a_start_after_a_process_that_did_not_stop_is_told() {
        // Between two processes a command may write a line.
        let events =
            ["key-generated", "start", "encrypt", "stop", "key-generated", "start", "active", "start", "start"];
        let (mut head, mut verifier) = (Head::default(), Verifier::default());
        let unclean = events.iter().enumerate().filter(|(_, event)| {
            let mut line = Vec::new();
            head.append(&Event::now(event), &mut line);
            verifier.next(line.strip_suffix(b"\n").unwrap()).unwrap();
            verifier.follows_unclean_end()
        });
        assert_eq!(unclean.map(|(at, _)| at).collect::<Vec<_>>(), [7, 8]);
    }

    #[test]
    fn every_changed_byte_but_the_last_lines_is_found() {
        let whole = lines(3);
        for at in 0..whole[1].len() {
            let mut lines = whole.clone();
            lines[1][at] ^= 1;
            assert!(!flaws(&lines).is_empty(), "byte {at}");
        }
    }
}
