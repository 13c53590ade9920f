//! The socket: bound for its owner alone, and closed to every peer that is not allowed, before HTTP/2 begins.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixStream as BlockingStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use futures_util::stream::{self, Stream};
use tokio::net::{UnixListener, UnixStream};

use super::connection::Connection;
use crate::config::{Listen, OVERFLOW_UID};

/// How long accepting pauses after the operating system refused it, for example for want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// A bound socket. Its file is removed when this is dropped.
pub struct Listener {
    socket: UnixListener,
    path: PathBuf,
    allowed: BTreeSet<u32>,
}

/// The socket cannot be bound.
#[derive(Debug, thiserror::Error)]
#[error("socket {path}: {what}", path = .path.display())]
pub struct BindError {
    path: PathBuf,
    what: String,
    remedy: String,
    /// The operating system refused this user.
    pub is_forbidden: bool,
}

impl BindError {
    /// What to do about it.
    #[must_use]
    pub fn remedy(&self) -> &str {
        &self.remedy
    }
}

impl Listener {
    /// Binds the socket. The process's umask must keep others out until the mode is set.
    ///
    /// # Errors
    /// Something else is at the path, another process listens there, or the directory is missing or not ours.
    pub fn bind(config: &Listen) -> Result<Self, BindError> {
        let path = config.socket.clone();
        let error = |what: String, remedy: &str| BindError {
            path: path.clone(),
            what,
            remedy: remedy.to_owned(),
            is_forbidden: false,
        };
        remove_stale(&path).map_err(|what| error(what, "stop the other process, or name another listen.socket"))?;
        let socket = UnixListener::bind(&path).map_err(|cause| BindError {
            is_forbidden: cause.kind() == io::ErrorKind::PermissionDenied,
            ..error(format!("cannot be bound: {cause}"), "make its directory, writable by this process's user alone")
        })?;
        let listener = Self { socket, path: path.clone(), allowed: allowed(config) };
        if let Some(group) = &config.group {
            let gid = gid_of(group).ok_or_else(|| {
                error(format!("group {group} does not exist"), "make the group, or remove listen.group")
            })?;
            std::os::unix::fs::chown(&path, None, Some(gid))
                .map_err(|cause| error(format!("cannot be given to group {group}: {cause}"), "join that group"))?;
        }
        fs::set_permissions(&path, fs::Permissions::from_mode(config.mode))
            .map_err(|cause| error(format!("its mode cannot be set: {cause}"), "check the file system"))?;
        Ok(listener)
    }

    /// Every connection of an allowed peer, for ever. An error of accept(2) is never the end.
    pub(super) fn connections(&self) -> impl Stream<Item = io::Result<Connection>> {
        stream::unfold(self, |listener| async move { Some((Ok(listener.accept().await), listener)) })
    }

    async fn accept(&self) -> Connection {
        loop {
            match self.socket.accept().await {
                Ok((stream, _)) if self.admits(&stream) => return Connection::new(stream),
                Ok(_) => (),
                Err(error) => {
                    tracing::error!(%error, "a connection could not be accepted");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    /// SO_PEERCRED: who connected, as the kernel saw it then.
    fn admits(&self, stream: &UnixStream) -> bool {
        match stream.peer_cred() {
            Ok(peer) if self.allowed.contains(&peer.uid()) => true,
            Ok(peer) => {
                tracing::warn!(uid = peer.uid(), pid = peer.pid(), "peer is not in listen.allow-uids: closed");
                false
            }
            Err(error) => {
                tracing::warn!(%error, "peer is unknown: closed");
                false
            }
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(socket = %self.path.display(), %error, "socket could not be removed");
        }
    }
}

fn allowed(config: &Listen) -> BTreeSet<u32> {
    let mut allowed = config.allow_uids.clone();
    allowed.insert(rustix::process::geteuid().as_raw());
    allowed.remove(&OVERFLOW_UID); // even if it is our own
    allowed
}

/// Removes a socket that nobody listens on any more. Nothing else is ever removed.
fn remove_stale(path: &Path) -> Result<(), String> {
    let Ok(metadata) = fs::symlink_metadata(path) else { return Ok(()) };
    if !metadata.file_type().is_socket() {
        return Err("something that is not a socket is there".into());
    }
    match BlockingStream::connect(path) {
        Ok(_) => Err("another process listens on it".into()),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(|error| format!("the stale one cannot be removed: {error}"))
        }
        Err(error) => Err(format!("the one that is there cannot be tried: {error}")),
    }
}

/// The group's number, from /etc/group (group(5)).
fn gid_of(name: &str) -> Option<u32> {
    let groups = fs::read_to_string("/etc/group").ok()?;
    groups.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next()? == name).then(|| fields.nth(1)?.parse().ok())?
    })
}
