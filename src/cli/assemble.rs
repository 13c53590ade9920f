//! Builds from a configuration what the verbs work with.

use std::sync::Arc;

use super::output::Failure;
use crate::config::{Config, ProviderConfig};
use crate::keyring::Keyring;
use crate::provider::Provider;
use crate::provider::pkcs11::Pkcs11;
use crate::runtime::Leader;
use crate::state::State;

/// The state directory of this host.
pub(super) fn state(config: &Config) -> Result<Arc<State>, Failure> {
    Ok(Arc::new(State::open(&config.keyring.state)?))
}

/// The provider of this name, or the only one.
pub(super) fn choose_provider<'c>(config: &'c Config, name: Option<&str>) -> Result<&'c ProviderConfig, Failure> {
    let names: Vec<&str> = config.providers.iter().map(|provider| provider.name.as_str()).collect();
    let there = format!("the configuration has: {}", names.join(", "));
    match (name, config.providers.as_slice()) {
        (None, [only]) => Ok(only),
        (None, _) => {
            Err(Failure::failed("several providers: which one is meant?", format!("--provider NAME; {there}")))
        }
        (Some(name), providers) => providers
            .iter()
            .find(|provider| provider.name == name)
            .ok_or_else(|| Failure::failed(format!("no provider is named {name}"), there)),
    }
}

/// A provider, its tokens being connected to.
pub(super) fn provider(config: &ProviderConfig, state: &Arc<State>, leader: &Leader) -> Result<Pkcs11, Failure> {
    let no_thread = |error| Failure::failed(format!("provider {}: {error}", config.name), "raise the limit on threads");
    Pkcs11::new(config, state, leader).map_err(no_thread)
}

/// Every provider, in the order of the configuration.
pub(super) fn providers(config: &Config, state: &Arc<State>, leader: &Leader) -> Result<Vec<Pkcs11>, Failure> {
    config.providers.iter().map(|config| provider(config, state, leader)).collect()
}

/// The keyring over the [`providers`] of the same configuration.
pub(super) fn keyring_of(config: &Config, providers: Vec<Pkcs11>, state: Arc<State>) -> Keyring {
    let boxed = |provider| Box::new(provider) as Box<dyn Provider>;
    let seals = config.providers.iter().map(|config| config.seal);
    Keyring::new(&config.keyring, providers.into_iter().map(boxed).zip(seals).collect(), state)
}

/// The keyring over all providers, their tokens being connected to.
pub(super) fn keyring(config: &Config, state: Arc<State>, leader: &Leader) -> Result<Keyring, Failure> {
    Ok(keyring_of(config, providers(config, &state, leader)?, state))
}
