//! One version of a Transit key: it wraps and unwraps DEKs on the server.

use std::sync::Arc;
use std::time::Instant;

use base64ct::{Base64, Encoding};
use serde::Deserialize;
use zeroize::Zeroizing;

use super::fault::Data;
use super::key::Version;
use super::link::{Ask, Link};
use crate::envelope::WrapAlgorithm;
use crate::identity::Identity;
use crate::legacy::Ciphertext;
use crate::provider::{Answer, Attributes, Holder, Kek, KekError, Rank};
use crate::secret::{Dek, Plaintext};

/// A version that is a KEK.
pub(super) struct TransitKek {
    pub(super) identity: Identity,
    pub(super) rank: Rank,
    pub(super) version: Version,
    pub(super) attributes: Attributes,
    pub(super) link: Arc<Link>,
}

#[derive(Deserialize)]
struct Encrypted<'a> {
    ciphertext: &'a str,
}

#[derive(Deserialize)]
struct Decrypted<'a> {
    plaintext: &'a str,
}

impl TransitKek {
    /// What its ciphertexts begin with.
    fn prefix(&self) -> String {
        format!("vault:v{}:", self.version.number)
    }

    async fn wrap(&self, dek: &Dek, deadline: Instant) -> Result<Vec<u8>, KekError> {
        let mut text = Zeroizing::new([0; 44]);
        let plaintext = encode(dek.expose(), &mut *text)?;
        // Base64 and digits need no escape.
        let body = pieces(&[
            r#"{"plaintext":""#,
            plaintext,
            r#"","associated_data":""#,
            &Base64::encode_string(self.identity.as_bytes()),
            r#"","key_version":"#,
            &self.version.number.to_string(),
            "}",
        ]);
        let answer = self.link.ask(Ask::Encrypt, body, deadline).await?;
        let Data { data: Encrypted { ciphertext } } = answer.read().map_err(|_| self.link.strange())?;
        // Another version's number would be another KEK's.
        let wrapped = ciphertext.strip_prefix(&self.prefix()).ok_or_else(|| self.link.strange())?;
        let wrapped = Base64::decode_vec(wrapped).map_err(|_| self.link.strange())?;
        if wrapped.len() == WrapAlgorithm::Transit.wrapped_len() { Ok(wrapped) } else { Err(self.link.strange()) }
    }

    async fn unwrap(&self, wrapped: &[u8], deadline: Instant) -> Result<Dek, KekError> {
        let body = pieces(&[
            r#"{"ciphertext":""#,
            &self.prefix(),
            &Base64::encode_string(wrapped),
            r#"","associated_data":""#,
            &Base64::encode_string(self.identity.as_bytes()),
            r#""}"#,
        ]);
        let answer = self.link.ask(Ask::Decrypt, body, deadline).await?;
        let Data { data: Decrypted { plaintext } } = answer.read().map_err(|_| self.link.strange())?;
        let mut bytes = Zeroizing::new([0; Dek::LEN]);
        let dek = Base64::decode(plaintext, &mut *bytes).map_err(|_| self.link.strange())?;
        Dek::from_bytes(dek).ok_or_else(|| self.link.strange())
    }
}

/// What an older plugin had encrypted: nothing else is bound to it.
pub(super) async fn decrypt_old(link: &Link, old: &Ciphertext, deadline: Instant) -> Result<Plaintext, KekError> {
    let body = pieces(&[r#"{"ciphertext":""#, &old.to_string(), r#""}"#]);
    let answer = link.ask(Ask::Decrypt, body, deadline).await?;
    let Data { data: Decrypted { plaintext } } = answer.read().map_err(|_| link.strange())?;
    let mut bytes = Zeroizing::new(vec![0; plaintext.len()]);
    let length = Base64::decode(plaintext, &mut bytes).map_err(|_| link.strange())?.len();
    bytes.truncate(length);
    Ok(bytes)
}

fn encode<'b>(bytes: &[u8], into: &'b mut [u8]) -> Result<&'b str, KekError> {
    Base64::encode(bytes, into).map_err(|error| KekError::Refused(error.to_string()))
}

/// One text, of which no growth leaves a copy behind.
fn pieces(pieces: &[&str]) -> Zeroizing<Vec<u8>> {
    let mut whole = Zeroizing::new(Vec::with_capacity(pieces.iter().map(|piece| piece.len()).sum()));
    pieces.iter().for_each(|piece| whole.extend_from_slice(piece.as_bytes()));
    whole
}

impl Kek for TransitKek {
    fn identity(&self) -> Identity {
        self.identity
    }

    fn rank(&self) -> &Rank {
        &self.rank
    }

    fn algorithm(&self) -> WrapAlgorithm {
        WrapAlgorithm::Transit
    }

    fn mode(&self) -> &'static str {
        "transit"
    }

    fn held_by(&self) -> Vec<Holder> {
        vec![Holder { name: self.link.place(), attributes: self.attributes.clone() }]
    }

    fn lacked_by(&self) -> Vec<String> {
        Vec::new()
    }

    fn check(&self) -> Result<(), KekError> {
        self.link.check()
    }

    fn wrap_dek(&self, dek: Arc<Dek>, deadline: Instant) -> Answer<'_, Vec<u8>> {
        Box::pin(async move { self.wrap(&dek, deadline).await })
    }

    fn unwrap_dek(&self, wrapped: &[u8], deadline: Instant) -> Answer<'_, Dek> {
        let wrapped = wrapped.to_vec();
        Box::pin(async move { self.unwrap(&wrapped, deadline).await })
    }
}
