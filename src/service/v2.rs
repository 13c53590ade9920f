//! KMS v2 (KEP-3299): the API server asks for the status, and has a seed encrypted and decrypted.

use std::sync::Arc;
use std::time::Instant;

use tonic::{Request, Response, Status};
use zeroize::Zeroizing;

use super::MESSAGE_LIMIT;
use super::connection::Announced;
use super::counters::Call;
use super::ended::Ended;
use super::proto::v2::key_management_service_server::{KeyManagementService, KeyManagementServiceServer};
use super::proto::v2::{
    DecryptRequest, DecryptResponse, EncryptRequest, EncryptResponse, StatusRequest, StatusResponse,
};
use super::requests::{Requests, status_of};
use crate::keyring::{ActiveSet, Keyring, KeyringError};
use crate::secret::Plaintext;

/// The API server takes a ciphertext of 1 to 1,024 bytes.
const CIPHERTEXT_LIMIT: usize = 1024;

/// The name by which the API server knows this version of the service.
const VERSION: &str = "v2";

struct V2(Arc<Requests>);

pub(super) fn service(requests: Arc<Requests>) -> KeyManagementServiceServer<impl KeyManagementService> {
    KeyManagementServiceServer::new(V2(requests)).max_decoding_message_size(MESSAGE_LIMIT)
}

impl V2 {
    async fn status(&self, request: &Request<StatusRequest>) -> Result<Arc<ActiveSet>, KeyringError> {
        let announce = |keyring: Arc<Keyring>, deadline| async move {
            keyring.can_tell(deadline).await;
            Announced::announce(request, &keyring)
        };
        self.0.in_time(request, announce).await
    }

    async fn encrypt(&self, request: &Request<EncryptRequest>, plaintext: &[u8]) -> Result<Sealed, KeyringError> {
        let seal = |keyring: Arc<Keyring>, deadline| async move {
            keyring.can_tell(deadline).await;
            let set = Announced::or_active(request, &keyring)?;
            let ciphertext = keyring.encrypt(&set, plaintext, CIPHERTEXT_LIMIT, deadline).await?;
            Ok(Sealed { ciphertext, key_id: set.key_set.to_string() })
        };
        self.0.in_time(request, seal).await
    }

    async fn decrypt(&self, request: &Request<DecryptRequest>) -> Result<Plaintext, KeyringError> {
        let DecryptRequest { ciphertext, key_id, annotations, .. } = request.get_ref();
        if !annotations.is_empty() {
            return Err(KeyringError::BadCiphertext); // we never send any
        }
        let open =
            |keyring: Arc<Keyring>, deadline| async move { keyring.decrypt(ciphertext, Some(key_id), deadline).await };
        self.0.in_time(request, open).await
    }
}

struct Sealed {
    ciphertext: Vec<u8>,
    key_id: String,
}

#[tonic::async_trait]
impl KeyManagementService for V2 {
    async fn status(&self, request: Request<StatusRequest>) -> Result<Response<StatusResponse>, Status> {
        let began = Instant::now();
        let set = self.status(&request).await;
        let outcome = set.as_ref().map(|_| 0);
        let (call, peer) = (Call::Status, Announced::peer_of(&request));
        self.0.tell(Ended { call, uid: "", peer, began, received: 0, outcome, ciphertext: &[] }).await?;
        let set = set.map_err(|error| status_of(&error))?;
        Ok(Response::new(StatusResponse {
            version: VERSION.into(),
            healthz: "ok".into(),
            key_id: set.key_set.to_string(),
        }))
    }

    async fn encrypt(&self, mut request: Request<EncryptRequest>) -> Result<Response<EncryptResponse>, Status> {
        let began = Instant::now();
        let plaintext = Zeroizing::new(std::mem::take(&mut request.get_mut().plaintext));
        let answer = self.encrypt(&request, &plaintext).await;
        let ended = Ended {
            call: Call::Encrypt,
            uid: &request.get_ref().uid,
            peer: Announced::peer_of(&request),
            began,
            received: plaintext.len(),
            outcome: answer.as_ref().map(|sealed| sealed.ciphertext.len()),
            ciphertext: answer.as_ref().map_or(&[], |sealed| &sealed.ciphertext),
        };
        self.0.tell(ended).await?;
        let Sealed { ciphertext, key_id } = answer.map_err(|error| status_of(&error))?;
        Ok(Response::new(EncryptResponse { ciphertext, key_id, annotations: Default::default() }))
    }

    async fn decrypt(&self, request: Request<DecryptRequest>) -> Result<Response<DecryptResponse>, Status> {
        let began = Instant::now();
        let answer = self.decrypt(&request).await;
        let ended = Ended {
            call: Call::Decrypt,
            uid: &request.get_ref().uid,
            peer: Announced::peer_of(&request),
            began,
            received: request.get_ref().ciphertext.len(),
            outcome: answer.as_ref().map(|plaintext| plaintext.len()),
            ciphertext: &request.get_ref().ciphertext,
        };
        self.0.tell(ended).await?;
        let mut plaintext = answer.map_err(|error| status_of(&error))?;
        Ok(Response::new(DecryptResponse { plaintext: std::mem::take(&mut plaintext) }))
    }
}
