//! The API server's side of the socket, for the command line: what it would be answered.

use std::path::{Path, PathBuf};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

use super::proto::v2::key_management_service_client::KeyManagementServiceClient;
use super::proto::v2::{DecryptRequest, EncryptRequest, StatusRequest};

/// A connection to a serving plugin, over KMS v2.
pub struct Client(KeyManagementServiceClient<Channel>);

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
    Unreachable(PathBuf, std::io::Error),
    /// The plugin answered with an error, or closed the connection.
    #[error("{call}: {code:?}: {message}", code = .status.code(), message = .status.message())]
    Answer {
        /// Which call.
        call: &'static str,
        /// The answer.
        status: Box<Status>,
    },
}

impl ClientError {
    fn of(call: &'static str) -> impl Fn(Status) -> Self {
        move |status| Self::Answer { call, status: Box::new(status) }
    }

    /// Whether the plugin, or its token, is out of reach, as against a request that it refuses.
    #[must_use]
    pub fn is_outage(&self) -> bool {
        match self {
            Self::Unreachable(..) => true,
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
        // tonic connects lazily and tells no cause: this attempt does.
        UnixStream::connect(path).await.map_err(|error| ClientError::Unreachable(path.to_owned(), error))?;
        let socket = path.to_owned();
        let connector = tower::service_fn(move |_| {
            let socket = socket.clone();
            async move { UnixStream::connect(socket).await.map(TokioIo::new) }
        });
        let channel = Endpoint::from_static("http://localhost").timeout(timeout).connect_with_connector_lazy(connector);
        Ok(Self(KeyManagementServiceClient::new(channel)))
    }

    /// Status.
    ///
    /// # Errors
    /// What the plugin answered instead.
    pub async fn status(&mut self) -> Result<PluginStatus, ClientError> {
        let answer = self.0.status(StatusRequest {}).await.map_err(ClientError::of("Status"))?.into_inner();
        Ok(PluginStatus { version: answer.version, healthz: answer.healthz, key_id: answer.key_id })
    }

    /// Encrypt: the ciphertext, and the key_id under which it is to be stored.
    ///
    /// # Errors
    /// What the plugin answered instead.
    pub async fn encrypt(&mut self, plaintext: Vec<u8>) -> Result<(Vec<u8>, String), ClientError> {
        let request = EncryptRequest { plaintext, uid: "trousseau-probe".into() };
        let answer = self.0.encrypt(request).await.map_err(ClientError::of("Encrypt"))?.into_inner();
        Ok((answer.ciphertext, answer.key_id))
    }

    /// Decrypt.
    ///
    /// # Errors
    /// What the plugin answered instead.
    pub async fn decrypt(&mut self, ciphertext: Vec<u8>, key_id: String) -> Result<Vec<u8>, ClientError> {
        let uid = "trousseau-probe".into();
        let request = DecryptRequest { ciphertext, uid, key_id, annotations: Default::default() };
        Ok(self.0.decrypt(request).await.map_err(ClientError::of("Decrypt"))?.into_inner().plaintext)
    }
}
