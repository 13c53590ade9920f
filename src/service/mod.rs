//! The gRPC service: one unix socket, KMS v2 on it, and v1beta1 when it is switched on.
//!
//! [`listener`] accepts peers, [`door`] says who may come in and stay, [`authority`] mends what grpc-go sends, [`v2`]
//! and [`v1beta1`] translate between the wire and the keyring. [`client`] is the other side, for the command line. These
//! are the only rooms that know tonic.

pub mod authority;
pub mod client;
mod codec;
mod connection;
pub mod counters;
mod directory;
mod dispatch;
mod door;
pub(crate) mod ended;
pub mod listener;
pub mod requests;
mod v1beta1;
mod v2;
mod wiped;

use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tonic::transport::Server;

use self::dispatch::Dispatch;
use self::listener::Listener;
use self::requests::Requests;

/// The messages and service traits of `proto/`. Those that carry plaintext wipe it when they are dropped ([`wiped`]).
mod proto {
    #![allow(missing_docs, unreachable_pub, unused_qualifications, clippy::all, clippy::pedantic)]

    pub mod v2 {
        tonic::include_proto!("v2");
    }

    pub mod v1beta1 {
        tonic::include_proto!("v1beta1");
    }
}

/// The longest message of either version. v1beta1's longest cipher (65,535 bytes) fits, and so do a key_id, a uid and all
/// the annotations that an API server takes (32 KiB). Of a longer one only the length is read: it is refused
/// (OUT_OF_RANGE) before any memory is set aside for it.
const MESSAGE_LIMIT: usize = 128 * 1024;
/// Requests under way on one connection: more than the queues of most tokens hold, so that too much load is refused by
/// them. The next ones wait in the client, as HTTP/2 has it (RFC 9113 section 5.1.2).
const STREAMS: u32 = 1024;
/// What has no answer by then has not come whole: it is longer than the longest deadline and a line in the audit log.
const WHOLE_BY: Duration = Duration::from_secs(35);
/// How long the end waits for the answers to what was accepted.
const DRAIN: Duration = Duration::from_secs(5);
/// What has no answer by then is told that the plugin stops; the rest of the time is for sending that.
const ANSWERED_BY: Duration = Duration::from_millis(4500);
/// How long no request may be under way before all that was accepted counts as answered.
const QUIET: Duration = Duration::from_millis(100);

/// Serves until `shutdown`, then answers what was accepted.
///
/// # Errors
/// The transport failed as a whole; single connections may fail as they like.
pub async fn serve(
    listener: &Listener,
    requests: &Arc<Requests>,
    with_v1beta1: bool,
    shutdown: impl Future<Output = ()>,
) -> Result<(), tonic::transport::Error> {
    let (drain, draining) = tokio::sync::oneshot::channel::<()>();
    let services = Dispatch {
        v2: v2::service(Arc::clone(requests)),
        v1beta1: with_v1beta1.then(|| v1beta1::service(Arc::clone(requests))),
    };
    let server = Server::builder().max_concurrent_streams(STREAMS).timeout(WHOLE_BY);
    let server = server.serve_with_incoming_shutdown(services, listener.connections(), async {
        let _told = draining.await;
    });
    tokio::pin!(server);
    tokio::select! {
        ended = &mut server => return ended,
        () = shutdown => drop(drain),
    }
    requests.end_by(Instant::now() + ANSWERED_BY);
    // The server itself would wait for every peer to hang up, and an idle one need not.
    tokio::select! {
        ended = server => ended,
        () = requests.quiet_for(QUIET) => Ok(()),
        () = tokio::time::sleep(DRAIN) => Ok(()),
    }
}
