//! The gRPC service: one unix socket, KMS v2 on it, and v1beta1 when it is switched on.
//!
//! [`listener`] accepts and checks peers, [`authority`] mends what grpc-go sends, [`v2`] and [`v1beta1`] translate
//! between the wire and the keyring. [`client`] is the other side, for the command line. These are the only rooms
//! that know tonic.

pub mod authority;
pub mod client;
mod connection;
pub mod listener;
mod v1beta1;
mod v2;

use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tonic::transport::Server;
use tonic::{Code, Request, Status};

use self::listener::Listener;
use crate::keyring::{Keyring, KeyringError};

/// The messages and service traits of `proto/`.
mod proto {
    #![allow(missing_docs, unreachable_pub, unused_qualifications, clippy::all, clippy::pedantic)]

    pub mod v2 {
        tonic::include_proto!("v2");
    }

    pub mod v1beta1 {
        tonic::include_proto!("v1beta1");
    }
}

/// What a request without a deadline of its own gets: the API server's default.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(3);
/// No request is worked on for longer.
const LONGEST_TIMEOUT: Duration = Duration::from_secs(30);
/// How long the end waits for what was accepted.
const DRAIN: Duration = Duration::from_secs(5);

/// Serves until `shutdown`, then answers what was accepted.
///
/// # Errors
/// The transport failed as a whole; single connections may fail as they like.
pub async fn serve(
    listener: &Listener,
    keyring: &Arc<Keyring>,
    with_v1beta1: bool,
    shutdown: impl Future<Output = ()>,
) -> Result<(), tonic::transport::Error> {
    let (drain, draining) = tokio::sync::oneshot::channel::<()>();
    let old = with_v1beta1.then(|| v1beta1::service(Arc::clone(keyring)));
    let server = Server::builder()
        .add_service(v2::service(Arc::clone(keyring)))
        .add_optional_service(old)
        .serve_with_incoming_shutdown(listener.connections(), async {
            let _told = draining.await;
        });
    tokio::pin!(server);
    tokio::select! {
        ended = &mut server => return ended,
        () = shutdown => drop(drain),
    }
    // A connection that never sent anything would keep the server for ever.
    tokio::time::timeout(DRAIN, server).await.unwrap_or(Ok(()))
}

/// Runs a request's work until its deadline (`grpc-timeout`, gRPC over HTTP/2).
async fn in_time<T, R, W>(request: &Request<R>, work: impl FnOnce(Instant) -> W) -> Result<T, KeyringError>
where
    W: Future<Output = Result<T, KeyringError>>,
{
    let sent = request.metadata().get("grpc-timeout").and_then(|value| value.to_str().ok()).and_then(parse_timeout);
    let deadline = Instant::now() + sent.unwrap_or(DEFAULT_TIMEOUT).min(LONGEST_TIMEOUT);
    let late = |_| KeyringError::Deadline("the request's own deadline has passed".into());
    tokio::time::timeout_at(deadline.into(), work(deadline)).await.unwrap_or_else(|elapsed| Err(late(elapsed)))
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
fn status_of(error: &KeyringError) -> Status {
    let code = match error {
        KeyringError::PlaintextLength { .. } | KeyringError::BadCiphertext => Code::InvalidArgument,
        KeyringError::UnknownKey(_) => Code::FailedPrecondition,
        KeyringError::Busy(_) => Code::ResourceExhausted,
        KeyringError::Deadline(_) => Code::DeadlineExceeded,
        KeyringError::Unavailable(_) => Code::Unavailable,
        KeyringError::Internal(_) => Code::Internal,
    };
    Status::new(code, error.to_string())
}

/// One line a request: its uid, sizes, time and outcome, and nothing else of it.
fn log(call: &'static str, uid: &str, received: usize, began: Instant, outcome: Result<usize, &KeyringError>) {
    let uid: String = uid.chars().filter(|letter| letter.is_ascii_graphic()).take(64).collect();
    let micros = began.elapsed().as_micros();
    match outcome {
        Ok(sent) => tracing::debug!(call, uid, received, sent, micros, "done"),
        Err(error) => tracing::warn!(call, uid, received, micros, %error, "failed"),
    }
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
