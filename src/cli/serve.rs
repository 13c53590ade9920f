//! `trousseau serve`: the daemon.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::output::Failure;
use super::{VERSION, assemble, audit};
use crate::audit::{Audit, Event};
use crate::config::{AuditConfig, Config, Listen};
use crate::keyring::{Keyring, Reminder};
use crate::provider::pkcs11;
use crate::provider::transit::Purpose;
use crate::runtime::{self, Leader};
use crate::service::listener::Listener;
use crate::service::requests::Requests;
use crate::state::State;
use crate::{observe, service, systemd, telemetry};

pub(super) const EXAMPLES: &str =
    "The socket is served before the token is reached: an HSM that is late does not hold \
up a boot.

SIGTERM answers what was accepted and ends. SIGHUP reads the configuration again: the old one stays until the new one \
works, and if it does not, the log says why.

Examples:
  trousseau serve
  trousseau serve --config ./trousseau.toml";

/// How long a new configuration's tokens may take before the old one is kept. Less than TimeoutStartSec= of the unit,
/// within which systemd wants a reload to end as well.
const RELOAD_PATIENCE: Duration = Duration::from_secs(8);
/// How often systemd is told how we are, if that has changed.
const STATUS_EVERY: Duration = Duration::from_secs(1);

/// Serves with the configuration in this file until SIGTERM or SIGINT.
pub(super) fn run(file: &Path) -> Result<(), Failure> {
    serve(file, Config::load(file)?, || Ok(()))
}

/// Serves, and calls `ready` once the socket is served.
pub(super) fn serve(
    file: &Path,
    config: Config,
    ready: impl FnOnce() -> Result<(), Failure> + Send + 'static,
) -> Result<(), Failure> {
    allow_many_connections();
    let file = file.to_owned();
    runtime::run(|leader| serve_with(leader, file, config, ready)).map_err(super::no_runtime)?
}

/// What nobody has run is said where it is used, and what nobody can see from here.
fn warn_of_profiles(config: &Config) {
    for provider in config.pkcs11() {
        for warning in provider.profile.warnings() {
            tracing::warn!(provider = provider.name, "{warning}");
        }
        if let Some(caveat) = provider.profile.caveat() {
            tracing::warn!(provider = provider.name, "{caveat}: try it before you rely on it");
        }
    }
}

async fn serve_with(
    leader: Leader,
    file: PathBuf,
    config: Config,
    ready: impl FnOnce() -> Result<(), Failure> + Send,
) -> Result<(), Failure> {
    telemetry::set_level(&config.log_level);
    warn_of_profiles(&config);
    let state = assemble::state(&config)?;
    let keyring = Arc::new(assemble::keyring(&config, Arc::clone(&state), &leader, Purpose::Serve)?);
    let audit = config.audit.as_ref().map(Audit::open).transpose().map_err(|error| audit::unusable(&error))?;
    // Whoever sees the socket may signal us.
    let (terminated, mut hangup) = (terminated()?, on(SignalKind::hangup())?);
    let listener = Listener::open(&config.listen)?;
    let socket = config.listen.socket.display();
    let cluster = &config.keyring.cluster;
    tracing::info!(version = VERSION, %socket, v1beta1 = config.listen.v1beta1, cluster, "serving");
    ready()?;
    let v1beta1 = config.listen.v1beta1;
    let requests = Arc::new(Requests::new(keyring, audit));
    let (audit, observe) = (config.audit, config.observe);
    let daemon = Daemon { file, listen: config.listen, audit, observe, listener, requests, state, leader };
    let mut lost = None;
    let shutdown = async {
        tokio::select! { () = terminated => (), reason = daemon.is_hopeless() => lost = Some(reason) }
        systemd::stopping();
    };
    systemd::ready();
    daemon.note("start").await;
    let ended = tokio::select! {
        ended = service::serve(&daemon.listener, &daemon.requests, v1beta1, shutdown) => {
            ended.map_err(|error| Failure::failed(format!("the service ended: {error}"), ""))
        }
        () = daemon.requests.keep_looking() => Ok(()),
        () = daemon.reload_at(&mut hangup) => Ok(()),
        () = daemon.keep_systemd_informed() => Ok(()),
        () = daemon.feed_watchdog() => Ok(()),
        () = observe::serve(daemon.observe, &daemon.requests) => Ok(()),
    };
    daemon.note("stop").await;
    match lost {
        Some(reason) => {
            drop(daemon.listener); // and its socket
            pkcs11::leave(&reason)
        }
        None => ended,
    }
}

struct Daemon {
    file: PathBuf,
    listen: Listen,
    audit: Option<AuditConfig>,
    observe: Option<SocketAddr>,
    listener: Listener,
    requests: Arc<Requests>,
    state: Arc<State>,
    leader: Leader,
}

impl Daemon {
    /// Writes into the audit log what became of this process; what cannot be written is told by the log's own thread.
    async fn note(&self, event: &'static str) {
        if let Some(audit) = self.requests.audit() {
            let detail = format!("version {VERSION}, pid {}", std::process::id());
            drop(audit.written(Event { detail, ..Event::now(event) }).await);
        }
    }

    /// Reads the configuration again at each signal. Never returns.
    async fn reload_at(&self, hangup: &mut Signal) {
        while hangup.recv().await.is_some() {
            systemd::reloading();
            match self.reload().await {
                Ok(()) => tracing::info!(file = %self.file.display(), "configuration read again"),
                Err(why) => tracing::error!("the new configuration is not used, the old one stays: {why}"),
            }
            systemd::ready();
        }
    }

    /// Exchanges the keyring, once the new one is as well as the old one.
    async fn reload(&self) -> Result<(), Failure> {
        let config = Config::load(&self.file)?;
        warn_of_profiles(&config);
        // What its disk did not take would be forgotten with it.
        let is_same = config.keyring.state == self.state.directory();
        let state = if is_same { Arc::clone(&self.state) } else { assemble::state(&config)? };
        let keyring = Arc::new(assemble::keyring(&config, state, &self.leader, Purpose::Serve)?);
        let becomes_well = async {
            tokio::select! {
                () = keyring.keep_looking() => (),
                () = is_well(&keyring) => (),
            }
        };
        let in_time = tokio::time::timeout(RELOAD_PATIENCE, becomes_well).await.is_ok();
        if let (false, Err(why)) = (in_time, health(&keyring)) {
            drop_elsewhere(keyring);
            return Err(Failure::unavailable(why, ""));
        }
        self.listener.admit_only(&config.listen);
        telemetry::set_level(&config.log_level);
        drop_elsewhere(self.requests.exchange(keyring));
        if (&config.audit, config.observe) != (&self.audit, self.observe) {
            tracing::warn!("audit, observe: nothing of them changes without a restart");
        }
        let now_and_then = |listen: &Listen| (listen.socket.clone(), listen.mode, listen.group.clone(), listen.v1beta1);
        if now_and_then(&config.listen) != now_and_then(&self.listen) {
            tracing::warn!("listen: only allow-uids changes without a restart");
        }
        Ok(())
    }

    /// Returns the reason once nothing can be encrypted, and only a new process could change that.
    async fn is_hopeless(&self) -> String {
        loop {
            if let Some(reason) = self.hopeless() {
                return reason;
            }
            tokio::time::sleep(STATUS_EVERY).await;
        }
    }

    fn hopeless(&self) -> Option<String> {
        let keyring = self.requests.keyring();
        health(&keyring).err().and_then(|_| keyring.hopeless())
    }

    /// Proves to systemd that this loop goes round, and that the tokens' threads do. Never returns.
    async fn feed_watchdog(&self) {
        let Some(interval) = systemd::watchdog_interval() else { return std::future::pending().await };
        loop {
            if self.hopeless().is_none() {
                systemd::feed_watchdog();
            }
            tokio::time::sleep(interval).await;
        }
    }

    /// Tells systemd how we are, the log what somebody should see to, and auditors which KEKs are active. Never returns.
    async fn keep_systemd_informed(&self) {
        let (mut told, mut key_id) = (String::new(), String::new());
        let mut reminder = Reminder::default();
        loop {
            let keyring = self.requests.keyring();
            for repeats in [self.requests.repeats(), self.listener.repeats()] {
                for (what, count) in repeats.due(Instant::now()) {
                    tracing::warn!(count, what, "happened again");
                }
            }
            let concerns = keyring.concerns(Timestamp::now());
            for concern in reminder.due(&concerns, Instant::now()) {
                tracing::warn!("{concern}");
            }
            let now = health(&keyring).unwrap_or_default();
            if let Some(audit) = self.requests.audit().filter(|_| !now.is_empty() && now != key_id) {
                key_id.clone_from(&now);
                // What cannot be written is told by the log's own thread.
                drop(audit.record(Event { key_id: now, keks: keyring.active_keks(), ..Event::now("active") }).await);
            }
            let status = match self.requests.well(Timestamp::now()) {
                Ok(key_id) => [vec![format!("serving, key_id {key_id}")], keyring.gaps(), concerns].concat().join("; "),
                Err(why) => format!("UNAVAILABLE: {why}"),
            };
            if status != told {
                systemd::status(&status);
                told = status;
            }
            tokio::time::sleep(STATUS_EVERY).await;
        }
    }
}

/// Ends a keyring's threads where that may take its time: requests under way, too, must not be the last to hold it.
fn drop_elsewhere(keyring: Arc<Keyring>) {
    let wait_for_all = move || {
        while Arc::strong_count(&keyring) > 1 {
            thread::sleep(Duration::from_millis(100));
        }
    };
    // Without a thread, whoever is the last drops it.
    drop(thread::Builder::new().name("old-keyring".into()).spawn(wait_for_all));
}

/// The `key_id`, or why there is none to be had.
fn health(keyring: &Keyring) -> Result<String, String> {
    keyring.well(Timestamp::now()).map(|key_set| key_set.to_string()).map_err(|why| why.to_string())
}

async fn is_well(keyring: &Keyring) {
    keyring.has_looked().await;
    while health(keyring).is_err() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn terminated() -> Result<impl Future<Output = ()>, Failure> {
    let (mut terminate, mut interrupt) = (on(SignalKind::terminate())?, on(SignalKind::interrupt())?);
    Ok(async move {
        tokio::select! { _ = terminate.recv() => (), _ = interrupt.recv() => () }
        tracing::info!("stopping: answering what was accepted");
    })
}

fn on(kind: SignalKind) -> Result<Signal, Failure> {
    signal(kind).map_err(|error| Failure::failed(format!("signals: {error}"), ""))
}

/// The soft limit on open files is low for the sake of select(2), which nobody here uses.
fn allow_many_connections() {
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }) {
        tracing::debug!(%error, "the limit on open files stays");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reload_ends_before_systemd_calls_it_failed() {
        let unit = include_str!("../../packaging/systemd/trousseau.service");
        let limit =
            unit.lines().find_map(|line| line.strip_prefix("TimeoutStartSec=")?.strip_suffix('s')?.parse().ok());
        let limit = limit.map(Duration::from_secs);
        // What is done beside waiting for tokens takes its time, too.
        assert!(limit > Some(RELOAD_PATIENCE + Duration::from_secs(1)), "{limit:?}");
    }
}
