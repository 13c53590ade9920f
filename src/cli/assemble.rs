//! Builds from a configuration what the verbs work with.

use std::sync::Arc;

use super::output::Failure;
use crate::config::{Config, Pkcs11Config, ProviderConfig, TransitConfig};
use crate::keyring::Keyring;
use crate::provider::Provider;
use crate::provider::pkcs11::Pkcs11;
use crate::provider::transit::{Purpose, Transit};
use crate::runtime::Leader;
use crate::state::State;

/// The state directory of this host.
pub(super) fn state(config: &Config) -> Result<Arc<State>, Failure> {
    Ok(Arc::new(State::open(&config.keyring.state)?))
}

/// The provider of this name, or the only one, if it has tokens; else what `without_tokens` says of it.
pub(super) fn choose_provider<'c>(
    config: &'c Config,
    name: Option<&str>,
    without_tokens: impl FnOnce(&TransitConfig) -> Failure,
) -> Result<&'c Pkcs11Config, Failure> {
    let names: Vec<&str> = config.providers.iter().map(ProviderConfig::name).collect();
    let there = format!("the configuration has: {}", names.join(", "));
    let chosen = match (name, config.providers.as_slice()) {
        (None, [only]) => only,
        (None, _) => {
            return Err(Failure::usage("several providers: which one is meant?", format!("--provider NAME; {there}")));
        }
        (Some(name), providers) => providers
            .iter()
            .find(|provider| provider.name() == name)
            .ok_or_else(|| Failure::usage(format!("no provider is named {name}"), there))?,
    };
    match chosen {
        ProviderConfig::Pkcs11(config) => Ok(config),
        ProviderConfig::Transit(config) => Err(without_tokens(config)),
    }
}

/// A provider of tokens, these being connected to.
pub(super) fn pkcs11(config: &Pkcs11Config, state: &Arc<State>, leader: &Leader) -> Result<Pkcs11, Failure> {
    let no_thread = |error| Failure::failed(format!("provider {}: {error}", config.name), "raise the limit on threads");
    Pkcs11::new(config, state, leader).map_err(no_thread)
}

/// Every provider of tokens, in the order of the configuration.
pub(super) fn every_pkcs11(config: &Config, state: &Arc<State>, leader: &Leader) -> Result<Vec<Pkcs11>, Failure> {
    config.pkcs11().map(|config| pkcs11(config, state, leader)).collect()
}

/// Every provider of type `transit`, in the order of the configuration. To be called within a runtime.
pub(super) fn every_transit(config: &Config, state: &Arc<State>, purpose: Purpose) -> Vec<Transit> {
    config.transit().map(|config| Transit::new(config, state, purpose)).collect()
}

/// The keyring over all providers, each of the same configuration, in its order.
pub(super) fn keyring_of(config: &Config, pkcs11: Vec<Pkcs11>, transit: Vec<Transit>, state: Arc<State>) -> Keyring {
    let (mut pkcs11, mut transit) = (pkcs11.into_iter(), transit.into_iter());
    let provider = |of: &ProviderConfig| -> Option<(Box<dyn Provider>, bool)> {
        let provider: Box<dyn Provider> = match of {
            ProviderConfig::Pkcs11(_) => Box::new(pkcs11.next()?),
            ProviderConfig::Transit(_) => Box::new(transit.next()?),
        };
        Some((provider, of.seals()))
    };
    let providers = config.providers.iter().filter_map(provider).collect();
    Keyring::new(&config.keyring, config.legacy.clone(), providers, state)
}

/// The keyring over all providers, which are being connected to. To be called within a runtime.
pub(super) fn keyring(
    config: &Config,
    state: Arc<State>,
    leader: &Leader,
    purpose: Purpose,
) -> Result<Keyring, Failure> {
    let (pkcs11, transit) = (every_pkcs11(config, &state, leader)?, every_transit(config, &state, purpose));
    Ok(keyring_of(config, pkcs11, transit, state))
}
