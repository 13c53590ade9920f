//! `trousseau serve`: the daemon.

use std::path::Path;
use std::sync::Arc;

use tokio::signal::unix::{SignalKind, signal};

use super::assemble;
use super::output::Failure;
use crate::config::Config;
use crate::service;
use crate::service::listener::Listener;

pub(super) const EXAMPLES: &str =
    "The socket is served before the token is reached: an HSM that is late does not hold \
up a boot.

Examples:
  trousseau serve
  trousseau serve --config ./trousseau.toml";

/// Serves with the configuration in this file until SIGTERM or SIGINT.
pub(super) fn run(config: &Path) -> Result<(), Failure> {
    serve(Config::load(config)?, || Ok(()))
}

/// Serves, and calls `ready` once the socket is bound.
pub(super) fn serve(config: Config, ready: impl FnOnce() -> Result<(), Failure>) -> Result<(), Failure> {
    super::runtime()?.block_on(until_terminated(config, ready))
}

async fn until_terminated(config: Config, ready: impl FnOnce() -> Result<(), Failure>) -> Result<(), Failure> {
    let no_signals = |error: std::io::Error| Failure::failed(format!("signals: {error}"), "");
    let mut terminate = signal(SignalKind::terminate()).map_err(no_signals)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(no_signals)?;
    let shutdown = async {
        tokio::select! { _ = terminate.recv() => (), _ = interrupt.recv() => () }
        tracing::info!("stopping: answering what was accepted");
    };

    let keyring = Arc::new(assemble::keyring(&config)?);
    let listener = Listener::bind(&config.listen)?;
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        socket = %config.listen.socket.display(),
        v1beta1 = config.listen.v1beta1,
        cluster = config.keyring.cluster,
        "serving"
    );
    ready()?;
    tokio::select! {
        ended = service::serve(&listener, &keyring, config.listen.v1beta1, shutdown) => {
            ended.map_err(|error| Failure::failed(format!("the service ended: {error}"), ""))
        }
        () = keyring.keep_looking() => Ok(()),
    }
}
