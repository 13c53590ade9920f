//! `trousseau serve`: the daemon.

use std::path::Path;
use std::sync::Arc;

use tokio::signal::unix::{SignalKind, signal};

use super::output::Failure;
use crate::config::Config;
use crate::keyring::Keyring;
use crate::provider::Provider;
use crate::provider::pkcs11::Pkcs11;
use crate::service;
use crate::service::listener::Listener;
use crate::state::State;

pub(super) const EXAMPLES: &str =
    "The socket is served before the token is reached: an HSM that is late does not hold \
up a boot.

Examples:
  trousseau serve
  trousseau serve --config ./trousseau.toml";

/// Serves with the configuration in this file until SIGTERM or SIGINT.
pub(super) fn run(config: &Path) -> Result<(), Failure> {
    let config = Config::load(config)?;
    super::runtime()?.block_on(serve(config))
}

async fn serve(config: Config) -> Result<(), Failure> {
    let no_signals = |error: std::io::Error| Failure::failed(format!("signals: {error}"), "");
    let mut terminate = signal(SignalKind::terminate()).map_err(no_signals)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(no_signals)?;
    let shutdown = async {
        tokio::select! { _ = terminate.recv() => (), _ = interrupt.recv() => () }
        tracing::info!("stopping: answering what was accepted");
    };

    let keyring = Arc::new(keyring(&config)?);
    let listener = Listener::bind(&config.listen)?;
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        socket = %config.listen.socket.display(),
        v1beta1 = config.listen.v1beta1,
        cluster = config.keyring.cluster,
        "serving"
    );
    tokio::select! {
        ended = service::serve(&listener, &keyring, config.listen.v1beta1, shutdown) => {
            ended.map_err(|error| Failure::failed(format!("the service ended: {error}"), ""))
        }
        () = keyring.keep_looking() => Ok(()),
    }
}

/// The keyring of a configuration, its tokens being connected to.
fn keyring(config: &Config) -> Result<Keyring, Failure> {
    let state = Arc::new(State::open(&config.keyring.state)?);
    let mut providers: Vec<(Box<dyn Provider>, bool)> = Vec::new();
    for provider in &config.providers {
        let pkcs11 = Pkcs11::new(provider, &state)
            .map_err(|error| Failure::failed(format!("provider {}: {error}", provider.name), "raise TasksMax="))?;
        providers.push((Box::new(pkcs11), provider.seal));
    }
    Ok(Keyring::new(&config.keyring, providers, state))
}
