//! Requests without end, each checked, on connections that live as long as the service lets them: the API server's way.

use std::error::Error;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use http::uri::PathAndQuery;
use hyper_util::rt::TokioIo;
use prost::Message;
use tokio::net::UnixStream;
use tonic::client::Grpc;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Response, Status};
use tonic_prost::ProstCodec;

/// How many requests are under way at any time, each on a connection of its own.
pub const WORKERS: usize = 4;
/// The API server gives up after so long.
pub const TIMEOUT: Duration = Duration::from_secs(3);
/// No wait for answers lasts longer.
const PATIENCE: Duration = Duration::from_secs(60);
/// What is encrypted.
pub const SEED: &[u8] = b"thirty-two bytes of a fresh seed";

#[derive(Clone, PartialEq, Message)]
struct EncryptRequest {
    #[prost(bytes = "vec", tag = "1")]
    plaintext: Vec<u8>,
    #[prost(string, tag = "2")]
    uid: String,
}

#[derive(Clone, PartialEq, Message)]
struct EncryptResponse {
    #[prost(bytes = "vec", tag = "1")]
    ciphertext: Vec<u8>,
    #[prost(string, tag = "2")]
    key_id: String,
}

#[derive(Clone, PartialEq, Message)]
struct DecryptRequest {
    #[prost(bytes = "vec", tag = "1")]
    ciphertext: Vec<u8>,
    #[prost(string, tag = "2")]
    uid: String,
    #[prost(string, tag = "3")]
    key_id: String,
}

#[derive(Clone, PartialEq, Message)]
struct DecryptResponse {
    #[prost(bytes = "vec", tag = "1")]
    plaintext: Vec<u8>,
}

/// How a request failed, and in what words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Failure {
    /// The service said so.
    Answered(Code, String),
    /// Its connection broke, or nobody answered in time.
    Lost(String),
    /// Nobody listened.
    Refused(String),
}

impl Failure {
    fn of(status: &Status) -> Self {
        let nobody = |error: &io::Error| [ErrorKind::ConnectionRefused, ErrorKind::NotFound].contains(&error.kind());
        let said = status.to_string();
        if causes(status).any(|cause| cause.downcast_ref().is_some_and(nobody)) {
            Self::Refused(said)
        } else if status.source().is_some() {
            Self::Lost(said)
        } else {
            Self::Answered(status.code(), said)
        }
    }

    pub fn is_lost(&self) -> bool {
        matches!(self, Self::Lost(_))
    }

    /// Whether the service has answered something else than that it cannot just now.
    pub fn is_wrong(&self) -> bool {
        matches!(self, Self::Answered(code, _) if *code != Code::Unavailable)
    }
}

/// How many requests may be lost while nobody answers for so long: each time that a worker's patience ends, and what is
/// under way when it is over.
pub fn lost_in(while_away: Duration) -> usize {
    WORKERS * (1 + (while_away.as_millis() / TIMEOUT.as_millis()) as usize)
}

pub struct Load {
    answered: Arc<AtomicUsize>,
    ends: Arc<AtomicBool>,
    thread: JoinHandle<Vec<Failure>>,
}

impl Load {
    /// Begins, and waits for the first answers.
    pub fn begin(socket: PathBuf) -> Self {
        Self::across(vec![socket])
    }

    /// The same with several services: each in turn encrypts, and all decrypt that at once.
    pub fn across(sockets: Vec<PathBuf>) -> Self {
        let (answered, ends) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
        let thread = {
            let (answered, ends) = (Arc::clone(&answered), Arc::clone(&ends));
            thread::spawn(move || {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                let workers = (0..WORKERS).map(|_| work(&sockets, &answered, &ends));
                runtime.block_on(async { futures_util::future::join_all(workers).await.concat() })
            })
        };
        let load = Self { answered, ends, thread };
        load.goes_on();
        load
    }

    /// Waits for more answers than those that were under way.
    pub fn goes_on(&self) {
        let (began, goal) = (Instant::now(), self.answered.load(Ordering::Relaxed) + 10 * WORKERS);
        while self.answered.load(Ordering::Relaxed) < goal {
            assert!(began.elapsed() < PATIENCE, "no more answers come");
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// What failed.
    pub fn end(self) -> Vec<Failure> {
        self.ends.store(true, Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}

async fn work(sockets: &[PathBuf], answered: &AtomicUsize, ends: &AtomicBool) -> Vec<Failure> {
    let mut peers: Vec<Peer> = sockets.iter().map(|socket| Peer::new(socket)).collect();
    let mut failures = Vec::new();
    while !ends.load(Ordering::Relaxed) {
        match round_trip(&mut peers).await {
            Ok(()) => {
                answered.fetch_add(1 + peers.len(), Ordering::Relaxed);
            }
            Err(status) => failures.push(Failure::of(&status)),
        }
        peers.rotate_left(1);
    }
    failures
}

/// The first one encrypts, and all decrypt.
async fn round_trip(peers: &mut [Peer]) -> Result<(), Status> {
    let (ciphertext, key_id) = peers[0].encrypt().await?;
    for peer in peers {
        assert_eq!(peer.decrypt(&ciphertext, &key_id).await?, SEED);
    }
    Ok(())
}

struct Peer(Grpc<Channel>);

impl Peer {
    /// Connects when it is needed, and again after the service has closed a connection.
    fn new(socket: &Path) -> Self {
        let socket = socket.to_owned();
        let connector = tower::service_fn(move |_| {
            let socket = socket.clone();
            async move { UnixStream::connect(socket).await.map(TokioIo::new) }
        });
        let endpoint = Endpoint::from_static("http://localhost").timeout(TIMEOUT);
        Self(Grpc::new(endpoint.connect_with_connector_lazy(connector)))
    }

    async fn encrypt(&mut self) -> Result<(Vec<u8>, String), Status> {
        let encrypt = EncryptRequest { plaintext: SEED.to_vec(), uid: "test".into() };
        let EncryptResponse { ciphertext, key_id } = self.call("/v2.KeyManagementService/Encrypt", encrypt).await?;
        Ok((ciphertext, key_id))
    }

    async fn decrypt(&mut self, ciphertext: &[u8], key_id: &str) -> Result<Vec<u8>, Status> {
        let decrypt = DecryptRequest { ciphertext: ciphertext.to_vec(), uid: "test".into(), key_id: key_id.into() };
        let opened: DecryptResponse = self.call("/v2.KeyManagementService/Decrypt", decrypt).await?;
        Ok(opened.plaintext)
    }

    async fn call<Q, A>(&mut self, method: &'static str, request: Q) -> Result<A, Status>
    where
        Q: Message + Clone + 'static,
        A: Message + Default + 'static,
    {
        let mut is_first = true;
        loop {
            let called = async {
                self.0.ready().await.map_err(|error| Status::from_error(error.into()))?;
                let codec = ProstCodec::<Q, A>::default();
                self.0.unary(Request::new(request.clone()), PathAndQuery::from_static(method), codec).await
            };
            match called.await {
                Err(status) if is_first && is_untouched(&status) => is_first = false,
                answer => return answer.map(Response::into_inner),
            }
        }
    }
}

/// Whether the service has not begun with the request for certain: every gRPC client sends such a one again by itself.
fn is_untouched(status: &Status) -> bool {
    let was_never_sent = status.code() == Code::Cancelled && status.source().is_some(); // hyper's word for it
    // After a GOAWAY, streams that the service has accepted go on; only the others end with this error.
    let goes_away = |error: &h2::Error| error.is_go_away() && error.is_remote();
    was_never_sent || causes(status).any(|cause| cause.downcast_ref().is_some_and(goes_away))
}

fn causes(status: &Status) -> impl Iterator<Item = &(dyn Error + 'static)> {
    std::iter::successors(status.source(), |&cause| cause.source())
}
