//! What systemd is told (sd_notify(3)), and the sockets that it hands over. Outside a unit, nothing is.

use std::sync::{LazyLock, Mutex, MutexGuard};
use std::time::Duration;

use listenfd::ListenFd;
use sd_notify::NotifyState;

use crate::sync::lock;

/// The sockets that systemd hands over, of several units perhaps. The environment tells of them once only, so whoever
/// looks for one takes it from here.
pub fn handed_over() -> MutexGuard<'static, ListenFd> {
    static SOCKETS: LazyLock<Mutex<ListenFd>> = LazyLock::new(|| Mutex::new(ListenFd::from_env()));
    lock(&SOCKETS)
}

/// The socket is served. systemd starts what waits for us, such as kubelet, whether a token is there or not.
pub fn ready() {
    notify(&[NotifyState::Ready]);
}

/// A line for people, which `systemctl status` shows.
pub fn status(text: &str) {
    notify(&[NotifyState::Status(&text.replace('\n', " "))]); // a line of its own would be another message
}

/// The configuration is being read again; [`ready`] ends it.
pub fn reloading() {
    notify(&[NotifyState::Reloading]);
}

/// The end has begun.
pub fn stopping() {
    notify(&[NotifyState::Stopping]);
}

/// We are alive.
pub fn feed_watchdog() {
    notify(&[NotifyState::Watchdog]);
}

/// How often the watchdog wants to hear of us; half of what it waits, as sd_watchdog_enabled(3) advises.
#[must_use]
pub fn watchdog_interval() -> Option<Duration> {
    sd_notify::watchdog_enabled().map(|timeout| timeout / 2)
}

fn notify(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::debug!(%error, "systemd could not be told");
    }
}
