//! How a keyring reads what older plugins wrote, where `[legacy]` says that it shall.

use std::collections::BTreeSet;
use std::time::Instant;

use super::{Keyring, KeyringError};
use crate::envelope;
use crate::legacy::{self, Format, Unreadable};
use crate::secret::Plaintext;

impl Keyring {
    /// Decrypts what is no envelope, with the Transit key of the older plugin. `None`: it is one, or nothing old is read
    /// here.
    pub(super) async fn decrypt_old(
        &self,
        ciphertext: &[u8],
        key_id: Option<&str>,
        deadline: Instant,
    ) -> Option<Result<Plaintext, KeyringError>> {
        let legacy = self.legacy.as_ref()?;
        if ciphertext.first() == Some(&envelope::FORMAT) {
            return None;
        }
        let formats = match key_id {
            None => legacy.formats.clone(),
            // The only old one that spoke v2; its key_id is the number of a version.
            Some(key_id) if !key_id.is_empty() && key_id.bytes().all(|digit| digit.is_ascii_digit()) => {
                &legacy.formats & &BTreeSet::from([Format::VaultKubernetesKms])
            }
            Some(_) => return None,
        };
        let provider = &self.members.iter().find(|member| member.provider.name() == legacy.provider)?.provider;
        let old = match legacy::parse(ciphertext, &formats) {
            Ok(old) => old,
            Err(reason @ (Unreadable::Foreign(_) | Unreadable::LinesOfVault)) => {
                return Some(Err(KeyringError::bad_ciphertext(&reason)));
            }
            Err(reason) => return Some(Err(KeyringError::Old(reason))),
        };
        Some(provider.decrypt_old(old, deadline).await.map_err(KeyringError::from))
    }
}
