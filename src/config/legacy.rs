//! `[legacy]`: what older plugins wrote and is still to be read.

use std::collections::BTreeSet;

use super::{ProviderConfig, file};
use crate::legacy::Format;

/// `[legacy]`: ciphertexts of older plugins are read, and never written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Legacy {
    /// In which forms: at least one.
    pub formats: BTreeSet<Format>,
    /// The name of the provider whose Transit key made them.
    pub provider: String,
}

impl Legacy {
    /// Beside a socket that serves v1beta1 or not, and these providers. What is wrong comes with its remedy.
    pub(super) fn new(
        file: file::Legacy,
        v1beta1: bool,
        providers: &[ProviderConfig],
    ) -> Result<Self, (String, &'static str)> {
        let file::Legacy { formats, provider } = file;
        if formats.is_empty() {
            return Err(("legacy.formats is empty".into(), "name what is to be read, or remove [legacy]"));
        }
        let of_v1beta1 = formats.iter().find(|format| **format != Format::VaultKubernetesKms); // Trousseau never spoke v2
        if let Some(format) = of_v1beta1.filter(|_| !v1beta1) {
            let what = format!("legacy.formats names {}, which only KMS v1beta1 reads", format.as_str());
            return Err((what, "set `v1beta1 = true` in [listen], or remove it from the formats"));
        }
        let is_named = |config: &&ProviderConfig| config.name() == provider;
        if !matches!(providers.iter().find(is_named), Some(ProviderConfig::Transit(_))) {
            let what = format!("legacy.provider `{provider}` is not the name of a [[provider]] of type transit");
            return Err((what, "name the provider whose Transit key made the old ciphertexts"));
        }
        Ok(Self { formats, provider })
    }
}
