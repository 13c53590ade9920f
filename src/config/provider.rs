//! `[[provider]]`: a service that holds KEKs, of one of the types.

use std::collections::BTreeSet;

use super::file::{self, ProviderType};
use super::{Check, ConfigError, Credential, Exportable, Pkcs11Config, TransitConfig};
use crate::envelope::{self, MAX_RECIPIENTS, WrapAlgorithm};

/// Bytes in a seed of the API server's.
const SEED: usize = 32;
/// An answer of KMS v2 takes 1,024 bytes; some are left for what may come.
const MOST: usize = 1000;

/// One `[[provider]]`.
#[derive(Debug)]
pub enum ProviderConfig {
    /// Tokens behind a PKCS#11 module.
    Pkcs11(Pkcs11Config),
    /// A key of Vault's or OpenBao's Transit.
    Transit(TransitConfig),
}

impl ProviderConfig {
    /// For people; renaming is harmless.
    #[must_use]
    pub fn name(&self) -> &str {
        match self {
            Self::Pkcs11(config) => &config.name,
            Self::Transit(config) => &config.name,
        }
    }

    /// Whether its active KEK wraps new DEKs; otherwise its KEKs only unwrap.
    #[must_use]
    pub const fn seals(&self) -> bool {
        match self {
            Self::Pkcs11(config) => config.seal,
            Self::Transit(config) => config.seal,
        }
    }

    /// The secrets that it points to, by their keys in the configuration.
    #[must_use]
    pub fn secrets(&self) -> Vec<(&'static str, &Credential)> {
        match self {
            Self::Pkcs11(config) => vec![("pin-file", &config.pin)],
            Self::Transit(config) => config.auth.method.secrets(),
        }
    }

    /// The wrap algorithm of its KEKs that makes the longest recipient.
    #[must_use]
    pub fn longest_algorithm(&self) -> WrapAlgorithm {
        match self {
            Self::Pkcs11(config) => config.longest_algorithm(),
            Self::Transit(_) => WrapAlgorithm::Transit,
        }
    }
}

impl Check<'_> {
    pub(super) fn provider(
        &self,
        file: file::Provider,
        cluster: &str,
        exportable: Exportable,
    ) -> Result<ProviderConfig, ConfigError> {
        let of_pkcs11 = [
            ("profile", file.profile.is_some()),
            ("module", file.module.is_some()),
            ("tokens", file.tokens.is_some()),
            ("label", file.label.is_some()),
            ("pin-file", file.pin_file.is_some()),
            ("sessions", file.sessions.is_some()),
            ("kek", !file.kek.is_empty()),
        ];
        let of_transit = [
            ("address", file.address.is_some()),
            ("namespace", file.namespace.is_some()),
            ("mount", file.mount.is_some()),
            ("key", file.key.is_some()),
            ("activation-delay", file.activation_delay.is_some()),
            ("ca-file", file.ca_file.is_some()),
            ("auth", file.auth.is_some()),
        ];
        let (of_type, foreign) = match file.of_type {
            ProviderType::Pkcs11 => ("pkcs11", of_transit),
            ProviderType::Transit => ("transit", of_pkcs11),
        };
        if let Some((key, _)) = foreign.iter().find(|(_, is_there)| *is_there) {
            let what = format!("provider {}: {key}: a provider of type {of_type} has no such key", file.name);
            return Err(self.error(what, "remove it, or write the other type"));
        }
        match file.of_type {
            ProviderType::Pkcs11 => self.pkcs11(file, cluster, exportable).map(ProviderConfig::Pkcs11),
            ProviderType::Transit => self.transit(file, exportable).map(ProviderConfig::Transit),
        }
    }

    /// What holds for the providers as a whole.
    pub(super) fn providers_together(&self, providers: &[ProviderConfig]) -> Result<(), ConfigError> {
        let sealing = providers.iter().filter(|provider| provider.seals()).count();
        if sealing == 0 {
            return Err(self.error("no [[provider]] seals", "add one, or remove `seal = false`"));
        }
        if sealing > MAX_RECIPIENTS {
            let what = format!("{sealing} providers seal, and an envelope has at most {}", MAX_RECIPIENTS);
            return Err(self.error(what, "set `seal = false` for some"));
        }
        let longest: Vec<_> =
            providers.iter().filter(|config| config.seals()).map(ProviderConfig::longest_algorithm).collect();
        let size = envelope::sealed_len(&longest, SEED);
        if size > MOST {
            let what = format!("the ciphertext of a seed would have up to {size} bytes, and KMS v2 takes {MOST}");
            return Err(self.error(what, "set `seal = false` for some providers, or take modes out of their profiles"));
        }
        let mut names = BTreeSet::new();
        match providers.iter().find(|provider| !names.insert(provider.name())) {
            Some(twice) => Err(self.error(format!("two providers are named {}", twice.name()), "rename one")),
            None => Ok(()),
        }
    }
}
