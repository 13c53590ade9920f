//! Builds from a configuration what the verbs work with.

use std::sync::Arc;

use super::output::Failure;
use crate::config::{Config, ProviderConfig};
use crate::keyring::Keyring;
use crate::provider::Provider;
use crate::provider::pkcs11::Pkcs11;
use crate::state::State;

/// The state directory of this host.
pub(super) fn state(config: &Config) -> Result<Arc<State>, Failure> {
    Ok(Arc::new(State::open(&config.keyring.state)?))
}

/// A provider, its tokens being connected to.
pub(super) fn provider(config: &ProviderConfig, state: &Arc<State>) -> Result<Pkcs11, Failure> {
    let no_thread = |error| Failure::failed(format!("provider {}: {error}", config.name), "raise the limit on threads");
    Pkcs11::new(config, state).map_err(no_thread)
}

/// The keyring over all providers, their tokens being connected to.
pub(super) fn keyring(config: &Config) -> Result<Keyring, Failure> {
    let state = state(config)?;
    let mut providers: Vec<(Box<dyn Provider>, bool)> = Vec::new();
    for config in &config.providers {
        providers.push((Box::new(provider(config, &state)?), config.seal));
    }
    Ok(Keyring::new(&config.keyring, providers, state))
}
