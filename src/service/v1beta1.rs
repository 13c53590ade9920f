//! KMS v1beta1, for clusters that move to v2: the API server has a DEK of its own encrypted for each object.

use std::sync::Arc;
use std::time::Instant;

use jiff::Timestamp;
use tonic::{Request, Response, Status};
use zeroize::Zeroizing;

use super::MESSAGE_LIMIT;
use super::connection::Announced;
use super::counters::Call;
use super::ended::Ended;
use super::proto::v1beta1::key_management_service_server::{KeyManagementService, KeyManagementServiceServer};
use super::proto::v1beta1::{
    DecryptRequest, DecryptResponse, EncryptRequest, EncryptResponse, VersionRequest, VersionResponse,
};
use super::requests::{Requests, status_of};
use crate::keyring::{Keyring, KeyringError};
use crate::secret::Plaintext;

/// The API server stores a wrapped DEK behind a length of two bytes.
const CIPHER_LIMIT: usize = 65_535;

/// The only version string that the API server takes.
const VERSION: &str = "v1beta1";

struct V1Beta1(Arc<Requests>);

pub(super) fn service(requests: Arc<Requests>) -> KeyManagementServiceServer<impl KeyManagementService> {
    KeyManagementServiceServer::new(V1Beta1(requests)).max_decoding_message_size(MESSAGE_LIMIT)
}

impl V1Beta1 {
    async fn encrypt(&self, request: &Request<EncryptRequest>, plaintext: &[u8]) -> Result<Vec<u8>, KeyringError> {
        let seal = |keyring: Arc<Keyring>, deadline| async move {
            keyring.can_tell(deadline).await;
            let set = keyring.active(Timestamp::now())?;
            keyring.encrypt(&set, plaintext, CIPHER_LIMIT, deadline).await
        };
        self.0.in_time(request, seal).await
    }

    async fn decrypt(&self, request: &Request<DecryptRequest>) -> Result<Plaintext, KeyringError> {
        let cipher = &request.get_ref().cipher;
        let open = |keyring: Arc<Keyring>, deadline| async move { keyring.decrypt(cipher, None, deadline).await };
        self.0.in_time(request, open).await
    }
}

#[tonic::async_trait]
impl KeyManagementService for V1Beta1 {
    async fn version(&self, _request: Request<VersionRequest>) -> Result<Response<VersionResponse>, Status> {
        Ok(Response::new(VersionResponse {
            version: VERSION.into(),
            runtime_name: env!("CARGO_PKG_NAME").into(),
            runtime_version: env!("CARGO_PKG_VERSION").into(),
        }))
    }

    async fn encrypt(&self, mut request: Request<EncryptRequest>) -> Result<Response<EncryptResponse>, Status> {
        let began = Instant::now();
        let plaintext = Zeroizing::new(std::mem::take(&mut request.get_mut().plain));
        let answer = self.encrypt(&request, &plaintext).await;
        let ended = Ended {
            call: Call::OldEncrypt,
            uid: "",
            peer: Announced::peer_of(&request),
            began,
            received: plaintext.len(),
            outcome: answer.as_ref().map(Vec::len),
            ciphertext: answer.as_deref().unwrap_or_default(),
        };
        self.0.tell(ended).await?;
        let cipher = answer.map_err(|error| status_of(&error))?;
        Ok(Response::new(EncryptResponse { cipher }))
    }

    async fn decrypt(&self, request: Request<DecryptRequest>) -> Result<Response<DecryptResponse>, Status> {
        let began = Instant::now();
        let answer = self.decrypt(&request).await;
        let ended = Ended {
            call: Call::OldDecrypt,
            uid: "",
            peer: Announced::peer_of(&request),
            began,
            received: request.get_ref().cipher.len(),
            outcome: answer.as_ref().map(|plaintext| plaintext.len()),
            ciphertext: &request.get_ref().cipher,
        };
        self.0.tell(ended).await?;
        let mut plain = answer.map_err(|error| status_of(&error))?;
        Ok(Response::new(DecryptResponse { plain: std::mem::take(&mut plain) }))
    }
}
