//! What the handlers of both versions of the service share: deadlines, codes, and the count of requests under way.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tonic::{Code, Request, Status};

use super::counters::Counters;
use crate::audit::Audit;
use crate::keyring::{Keyring, KeyringError};
use crate::telemetry::Repeats;

/// What a request without a deadline of its own gets: the API server's default.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(3);
/// No request is worked on for longer.
const LONGEST_TIMEOUT: Duration = Duration::from_secs(30);
/// So much before its deadline at most, or a twentieth of its time, a request is given up: a client that gives up first
/// hears no reason, and nobody counts it.
const EARLY: Duration = Duration::from_millis(50);
/// What the handlers of both versions have in common.
pub struct Requests {
    keyring: watch::Sender<Arc<Keyring>>,
    counters: Counters,
    audit: Option<Audit>,
    repeats: Repeats,
    under_way: AtomicUsize,
    /// Once the end has begun: until when there is an answer to everything.
    end: watch::Sender<Option<Instant>>,
}

impl Requests {
    /// Requests that this keyring serves, and that are written into this log.
    #[must_use]
    pub fn new(keyring: Arc<Keyring>, audit: Option<Audit>) -> Self {
        let counters = Counters::default();
        keyring.begin_to_serve();
        Self {
            keyring: watch::Sender::new(keyring),
            counters,
            audit,
            repeats: Repeats::default(),
            under_way: AtomicUsize::new(0),
            end: watch::Sender::new(None),
        }
    }

    /// How many there were.
    #[must_use]
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// What the log was told of them lately.
    #[must_use]
    pub fn repeats(&self) -> &Repeats {
        &self.repeats
    }

    /// Where they are written down.
    #[must_use]
    pub fn audit(&self) -> Option<&Audit> {
        self.audit.as_ref()
    }

    /// The keyring that serves now.
    #[must_use]
    pub fn keyring(&self) -> Arc<Keyring> {
        Arc::clone(&self.keyring.borrow())
    }

    /// Has another keyring serve from now on, and returns the old one; requests under way end with that.
    #[must_use]
    pub fn exchange(&self, keyring: Arc<Keyring>) -> Arc<Keyring> {
        keyring.begin_to_serve();
        self.keyring.send_replace(keyring)
    }

    /// Looks for KEKs again and again, for whichever keyring serves. Never returns.
    pub async fn keep_looking(&self) {
        let mut exchanged = self.keyring.subscribe();
        loop {
            let keyring = Arc::clone(&exchanged.borrow_and_update());
            tokio::select! {
                () = keyring.keep_looking() => (),
                _ = exchanged.changed() => (),
            }
        }
    }

    /// Has the keyring do a request's work until its deadline (`grpc-timeout`, gRPC over HTTP/2).
    pub(super) async fn in_time<T, R, W>(
        &self,
        request: &Request<R>,
        work: impl FnOnce(Arc<Keyring>, Instant) -> W,
    ) -> Result<T, KeyringError>
    where
        W: Future<Output = Result<T, KeyringError>>,
    {
        let _under_way = self.under_way();
        let sent = request.metadata().get("grpc-timeout").and_then(|value| value.to_str().ok()).and_then(parse_timeout);
        let allowed = sent.unwrap_or(DEFAULT_TIMEOUT).min(LONGEST_TIMEOUT);
        let deadline = Instant::now() + (allowed - (allowed / 20).min(EARLY));
        let late = KeyringError::Deadline("the request's own deadline has passed".into());
        let answer = work(self.keyring(), deadline);
        tokio::select! {
            biased; // who has an answer waits for nothing else
            answer = tokio::time::timeout_at(deadline.into(), answer) => answer.unwrap_or(Err(late)),
            () = self.must_end() => Err(KeyringError::Stopping),
        }
    }

    /// Has each request answered by then, whatever its own deadline.
    pub(super) fn end_by(&self, at: Instant) {
        self.end.send_replace(Some(at));
    }

    /// Returns once there must be an answer to everything.
    async fn must_end(&self) {
        let mut end = self.end.subscribe();
        let at = end.wait_for(Option::is_some).await.ok().and_then(|at| *at);
        match at {
            Some(at) => tokio::time::sleep_until(at.into()).await,
            None => std::future::pending().await, // the sender is ours
        }
    }

    /// Counts a request for as long as this is held.
    pub(super) fn under_way(&self) -> UnderWay<'_> {
        self.under_way.fetch_add(1, Ordering::AcqRel);
        UnderWay(self)
    }

    /// Returns once no request has been under way for as long as `quiet`.
    pub(super) async fn quiet_for(&self, quiet: Duration) {
        let mut quiet_since = None;
        loop {
            quiet_since = match self.under_way.load(Ordering::Acquire) {
                0 => quiet_since.or_else(|| Some(Instant::now())),
                _ => None,
            };
            if quiet_since.is_some_and(|since| since.elapsed() >= quiet) {
                return;
            }
            tokio::time::sleep(quiet / 10).await; // a request that begins and ends within this has been answered
        }
    }
}

/// Counts a request until it is answered, or its client has gone.
pub(super) struct UnderWay<'a>(&'a Requests);

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        self.0.under_way.fetch_sub(1, Ordering::AcqRel);
    }
}

/// At most eight digits and a unit.
fn parse_timeout(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let number: u64 = digits.parse().ok().filter(|_| digits.len() <= 8)?;
    Some(match unit {
        "H" => Duration::from_secs(number * 3600),
        "M" => Duration::from_secs(number * 60),
        "S" => Duration::from_secs(number),
        "m" => Duration::from_millis(number),
        "u" => Duration::from_micros(number),
        "n" => Duration::from_nanos(number),
        _ => return None,
    })
}

/// The contract of design and README: each situation has its code.
pub(super) fn status_of(error: &KeyringError) -> Status {
    let code = match error {
        KeyringError::PlaintextLength { .. } | KeyringError::BadCiphertext | KeyringError::Old(_) => {
            Code::InvalidArgument
        }
        KeyringError::UnknownKey(_) => Code::FailedPrecondition,
        KeyringError::Busy(_) => Code::ResourceExhausted,
        KeyringError::Deadline(_) => Code::DeadlineExceeded,
        KeyringError::Unavailable(_) | KeyringError::NoKek(_) | KeyringError::Stopping => Code::Unavailable,
        KeyringError::Unauthenticated(_) => Code::Unauthenticated,
        KeyringError::Denied(_) => Code::PermissionDenied,
        KeyringError::Internal(_) => Code::Internal,
    };
    Status::new(code, error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts_are_read_as_grpc_writes_them() {
        for (text, timeout) in [
            ("3S", Some(Duration::from_secs(3))),
            ("2999877u", Some(Duration::from_micros(2_999_877))),
            ("1H", Some(Duration::from_secs(3600))),
            ("00000005m", Some(Duration::from_millis(5))),
            ("123456789n", None),
            ("S", None),
            ("", None),
            ("3", None),
            ("3X", None),
            ("-3S", None),
            ("3é", None),
        ] {
            assert_eq!(parse_timeout(text), timeout, "{text}");
        }
    }
}
