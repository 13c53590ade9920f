//! Why the keyring did not do what was asked.

use crate::legacy::Unreadable;
use crate::provider::KekError;

/// Each variant is one row of the contract: the service gives it its gRPC code. The text says first whether the data
/// or a service is at fault, and names it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeyringError {
    /// Nothing to encrypt, or more than the answer has room for.
    #[error("the plaintext has {length} bytes: send 1 to {limit}")]
    PlaintextLength {
        /// Bytes that were sent.
        length: usize,
        /// Bytes that fit.
        limit: usize,
    },
    /// Damaged, truncated, foreign, or bound to another key_id. One text for all: an attacker learns nothing.
    #[error("the ciphertext is damaged or is not one of this plugin's: restore the object, retrying does not help")]
    BadCiphertext,
    /// What an older plugin wrote, and nobody can read, or nobody said that it shall be read.
    #[error("the ciphertext cannot be read: {0}")]
    Old(Unreadable),
    /// No KEK of this keyring.
    #[error("{0} is unknown here: check that every control plane has the same providers and the same keyring.cluster")]
    UnknownKey(String),
    /// More requests than the providers serve.
    #[error("overloaded, the object is intact: {0}")]
    Busy(String),
    /// No answer in time.
    #[error("too slow, the object is intact: {0}")]
    Deadline(String),
    /// A token or Vault, or what leads to it.
    #[error("the provider is at fault, the object is intact: {0}")]
    Unavailable(String),
    /// A provider does not take our word for who we are.
    #[error("the plugin's login is at fault, the object is intact: {0}")]
    Unauthenticated(String),
    /// A provider does not let us.
    #[error("the plugin's rights are at fault, the object is intact: {0}")]
    Denied(String),
    /// The providers can be reached, and one has no KEK to wrap with.
    #[error("{0}")]
    NoKek(String),
    /// This process ends before there is an answer.
    #[error("the plugin stops, the object is intact: try again")]
    Stopping,
    /// Something of ours.
    #[error("the plugin failed, the object is intact: {0}")]
    Internal(String),
}

impl KeyringError {
    /// A bad ciphertext; the reason goes to the log alone.
    pub(super) fn bad_ciphertext(reason: &dyn std::error::Error) -> Self {
        tracing::debug!(%reason, "ciphertext refused");
        Self::BadCiphertext
    }

    /// As Status says it: whatever the reason, nothing can be encrypted.
    #[must_use]
    pub fn into_outage(self) -> Self {
        match self {
            Self::Unauthenticated(why) | Self::Denied(why) => Self::Unavailable(why),
            other => other,
        }
    }

    pub(super) fn internal(reason: impl std::fmt::Display) -> Self {
        Self::Internal(reason.to_string())
    }
}

impl From<KekError> for KeyringError {
    fn from(error: KekError) -> Self {
        let text = error.to_string();
        match error {
            KekError::BadInput => Self::BadCiphertext,
            KekError::Busy(_) => Self::Busy(text),
            KekError::Deadline(_) => Self::Deadline(text),
            KekError::Unavailable(_) | KekError::Refused(_) | KekError::OfOneValue(_) => Self::Unavailable(text),
            KekError::Unauthenticated(_) => Self::Unauthenticated(text),
            KekError::Denied(_) => Self::Denied(text),
        }
    }
}
