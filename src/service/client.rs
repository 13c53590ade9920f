//! The API server's side of the socket, for the command line: what it would be answered.

use std::error::Error;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status, TimeoutExpired};

use super::proto::v2::key_management_service_client::KeyManagementServiceClient;
use super::proto::v2::{DecryptRequest, EncryptRequest, StatusRequest};

/// A connection to a serving plugin, over KMS v2. Clones share it.
#[derive(Clone)]
pub struct Client {
    path: PathBuf,
    server_pid: Option<u32>,
    timeout: Duration,
    grpc: KeyManagementServiceClient<Channel>,
}

/// What Status answered.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct PluginStatus {
    /// The version of the service: `v2`.
    pub version: String,
    /// `ok`, or what is wrong.
    pub healthz: String,
    /// The key set that is active.
    pub key_id: String,
}

/// Why the plugin did not answer as wished.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens at the socket.
    #[error("socket {path}: {cause}", path = .0.display(), cause = .1)]
    Unreachable(PathBuf, io::Error),
    /// The plugin closed the connection before it answered anything.
    #[error("socket {path}: the plugin closed the connection", path = .0.display())]
    Closed(PathBuf),
    /// The plugin did not answer in time.
    #[error("{call}: no answer in {} s", .timeout.as_secs_f64())]
    Late {
        /// Which call.
        call: &'static str,
        /// How long was waited.
        timeout: Duration,
    },
    /// The plugin answered with an error.
    #[error("{call}: {code:?}: {message}", code = .status.code(), message = .status.message())]
    Answer {
        /// Which call.
        call: &'static str,
        /// The answer.
        status: Box<Status>,
    },
}

impl ClientError {
    /// The code that the plugin answered with, if it did.
    #[must_use]
    pub fn code(&self) -> Option<Code> {
        match self {
            Self::Answer { status, .. } => Some(status.code()),
            Self::Unreachable(..) | Self::Closed(_) | Self::Late { .. } => None,
        }
    }

    /// Whether the plugin, or its token, is out of reach, as against a request that it refuses.
    #[must_use]
    pub fn is_outage(&self) -> bool {
        match self {
            Self::Unreachable(..) | Self::Late { .. } => true,
            Self::Closed(_) => false,
            Self::Answer { status, .. } => {
                matches!(status.code(), Code::Unavailable | Code::DeadlineExceeded | Code::ResourceExhausted)
            }
        }
    }
}

impl Client {
    /// Connects to the socket; every call then has `timeout`.
    ///
    /// # Errors
    /// Nobody listens there, or we may not connect.
    pub async fn connect(path: &Path, timeout: Duration) -> Result<Self, ClientError> {
        let stream = UnixStream::connect(path).await;
        let stream = stream.map_err(|error| ClientError::Unreachable(path.to_owned(), error))?;
        let server_pid = stream.peer_cred().ok().and_then(|peer| peer.pid()).and_then(|pid| u32::try_from(pid).ok());
        // The one connection is handed over: tonic's own attempts tell no cause.
        let mut once = Some(TokioIo::new(stream));
        let connector = tower::service_fn(move |_| {
            let stream = once.take().ok_or_else(|| io::Error::from(io::ErrorKind::NotConnected));
            async move { stream }
        });
        let channel = Endpoint::from_static("http://localhost").timeout(timeout).connect_with_connector_lazy(connector);
        Ok(Self { path: path.to_owned(), server_pid, timeout, grpc: KeyManagementServiceClient::new(channel) })
    }

    /// The process that made the socket (SO_PEERCRED): the plugin, unless systemd handed the socket over.
    #[must_use]
    pub fn server_pid(&self) -> Option<u32> {
        self.server_pid
    }

    /// What a call's error means.
    fn failed(&self, call: &'static str, status: Status) -> ClientError {
        // What the plugin answers has no cause; tonic's own errors have one: our timeout, or else a broken transport.
        let mut cause = status.source();
        let has_cause = cause.is_some();
        let mut timed_out = false;
        while let Some(error) = cause {
            timed_out |= error.is::<TimeoutExpired>();
            cause = error.source();
        }
        match (has_cause, timed_out) {
            (_, true) => ClientError::Late { call, timeout: self.timeout },
            (true, false) => ClientError::Closed(self.path.clone()),
            (false, false) => ClientError::Answer { call, status: Box::new(status) },
        }
    }

    /// Status.
    ///
    /// # Errors
    /// What the plugin answered instead.
    pub async fn status(&mut self) -> Result<PluginStatus, ClientError> {
        let answer =
            self.grpc.status(StatusRequest {}).await.map_err(|status| self.failed("Status", status))?.into_inner();
        Ok(PluginStatus { version: answer.version, healthz: answer.healthz, key_id: answer.key_id })
    }

    /// Encrypt: the ciphertext, and the key_id under which it is to be stored.
    ///
    /// # Errors
    /// What the plugin answered instead.
    pub async fn encrypt(&mut self, plaintext: Vec<u8>) -> Result<(Vec<u8>, String), ClientError> {
        let request = EncryptRequest { plaintext, uid: "trousseau-probe".into() };
        let answer = self.grpc.encrypt(request).await.map_err(|status| self.failed("Encrypt", status))?.into_inner();
        Ok((answer.ciphertext, answer.key_id))
    }

    /// Decrypt.
    ///
    /// # Errors
    /// What the plugin answered instead.
    pub async fn decrypt(&mut self, ciphertext: Vec<u8>, key_id: String) -> Result<Vec<u8>, ClientError> {
        let uid = "trousseau-probe".into();
        let request = DecryptRequest { ciphertext, uid, key_id, annotations: Default::default() };
        let answer = self.grpc.decrypt(request).await.map_err(|status| self.failed("Decrypt", status))?;
        Ok(std::mem::take(&mut answer.into_inner().plaintext))
    }
}
