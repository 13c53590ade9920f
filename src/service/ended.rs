//! What is told of a request that has ended, before it is answered: to the log, the counters and the audit log.

use std::fmt::{self, Write};
use std::time::Instant;

use jiff::Timestamp;
use tonic::{Code, Status};

use super::counters::Call;
use super::requests::{Requests, status_of};
use crate::audit::{Audit, Event, Peer};
use crate::envelope::Envelope;
use crate::identity::KeySet;
use crate::keyring::KeyringError;
use crate::telemetry::Repeats;

/// Letters of a uid that are kept.
const UID: usize = 128;

/// A request that has ended.
pub(super) struct Ended<'r> {
    pub(super) call: Call,
    pub(super) uid: &'r str,
    pub(super) peer: Option<Peer>,
    pub(super) began: Instant,
    /// Bytes that came in.
    pub(super) received: usize,
    /// Bytes that go out.
    pub(super) outcome: Result<usize, &'r KeyringError>,
    /// What was made of the plaintext, or came in.
    pub(super) ciphertext: &'r [u8],
}

impl Requests {
    /// Tells of it.
    ///
    /// # Errors
    /// What the client is answered instead: that the request has failed, or that it cannot be logged.
    pub(super) async fn tell(&self, ended: Ended<'_>) -> Result<(), Status> {
        let _under_way = self.under_way(); // an end waits for it
        let mut answer = ended.outcome.map(drop).map_err(status_of);
        let logged = match (self.audit(), ended.call) {
            (None, _) => Ok(()),
            // It is not logged, and says how the others would fare.
            (Some(audit), Call::Status) => audit.refuses().map_or(Ok(()), Err),
            (Some(audit), _) => audit.record(ended.event(code_of(&answer))).await,
        };
        if let Err(why) = logged {
            answer = Err(Status::unavailable(unlogged(&why)));
        }
        ended.log(&answer, self.repeats());
        self.counters().count(ended.call, code_of(&answer), ended.began.elapsed());
        answer
    }

    /// The key set that is active, if Encrypt and Decrypt under it would be answered: the keyring is well, and the audit
    /// log takes what must not go unlogged.
    ///
    /// # Errors
    /// Why they would not.
    pub fn well(&self, now: Timestamp) -> Result<KeySet, String> {
        let key_set = self.keyring().well(now).map_err(|why| why.to_string())?;
        self.audit().and_then(Audit::refuses).map_or(Ok(key_set), |why| Err(unlogged(&why)))
    }
}

fn unlogged(why: &str) -> String {
    format!("the audit log cannot be written, the object is intact: {why}")
}

fn code_of(answer: &Result<(), Status>) -> Code {
    answer.as_ref().err().map_or(Code::Ok, Status::code)
}

impl Ended<'_> {
    /// One line: its uid, sizes, time and outcome, and nothing else of it. That many fail alike is told once.
    fn log(&self, answer: &Result<(), Status>, repeats: &Repeats) {
        let Self { call, uid, received, began, outcome, .. } = self;
        let (version, call, uid) = (call.version(), call.method(), Plain(uid));
        let micros = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
        match answer {
            Ok(()) => {
                let sent = outcome.as_ref().ok();
                tracing::debug!(version, call, %uid, received, sent, micros, "done");
            }
            Err(status) => {
                let error = status.message();
                if repeats.is_news(&format!("{version} {call}: {error}"), Instant::now()) {
                    tracing::warn!(version, call, %uid, received, micros, error, "failed");
                } else {
                    tracing::debug!(version, call, %uid, received, micros, error, "failed");
                }
            }
        }
    }

    fn event(&self, code: Code) -> Event {
        let event = match (self.call.method(), self.call.version()) {
            ("encrypt", "v2") => "encrypt",
            ("decrypt", "v2") => "decrypt",
            ("encrypt", _) => "encrypt-v1beta1",
            _ => "decrypt-v1beta1",
        };
        // What the client says of its ciphertext is not copied: it may be anything.
        let envelope = Envelope::parse(self.ciphertext).ok();
        let keks = envelope.iter().flat_map(|envelope| envelope.recipients.iter().map(|recipient| recipient.identity));
        Event {
            uid: Plain(self.uid).to_string(),
            peer: self.peer,
            keks: keks.collect(),
            key_id: envelope.as_ref().map(|envelope| envelope.key_set.to_string()).unwrap_or_default(),
            received: Some(self.received),
            outcome: Some(name_of(code)),
            ..Event::now(event)
        }
    }
}

/// As the gRPC specification writes them.
pub(crate) const fn name_of(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

/// A client's text as a log may show it: nothing but visible letters, and not too many. Made only if it is logged.
struct Plain<'a>(&'a str);

impl fmt::Display for Plain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.chars().filter(|letter| letter.is_ascii_graphic()).take(UID).try_for_each(|letter| f.write_char(letter))
    }
}
