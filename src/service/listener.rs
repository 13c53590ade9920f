//! The socket: bound for its owner alone, or handed over by systemd, and closed to every peer that is not allowed,
//! before HTTP/2 begins.
//!
//! Whoever may write into its directory could take the socket's place and be handed seeds: so the directory is checked
//! first. A lock file beside the socket keeps two of us apart from the first moment to the last; it is what makes it
//! safe to remove a socket that a crash has left behind.

use std::collections::BTreeSet;
use std::fs::{self, File, Metadata, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{UnixListener as BlockingListener, UnixStream as BlockingStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::stream::{self, Stream};
use rustix::fs::{FlockOperation, OFlags, flock};
use rustix::net::sockopt::socket_peercred;
use tokio::net::{UnixListener, UnixStream};

use super::connection::Connection;
use super::directory::check_directory;
pub use super::directory::check_way;
use super::door::Door;
use crate::audit::Peer;
use crate::config::{Listen, OVERFLOW_UID};
use crate::disk;
use crate::systemd;
use crate::telemetry::Repeats;

/// How long accepting pauses after the operating system refused it, for example for want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// A listening socket. If we bound it, its file is removed when this is dropped.
pub struct Listener {
    socket: UnixListener,
    door: Arc<Door>,
    _own: Option<OwnSocket>,
}

/// A socket that we bound, and the lock that makes it ours.
struct OwnSocket {
    path: PathBuf,
    /// Device and inode: the name may be somebody else's by the time we leave.
    identity: (u64, u64),
    _lock: File,
}

/// The socket cannot be had.
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
    pub(super) fn new(path: &Path, what: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { path: path.to_owned(), what: what.into(), remedy: remedy.into(), is_forbidden: false }
    }

    pub(super) fn io(path: &Path, what: &str, cause: &io::Error, remedy: &str) -> Self {
        let is_forbidden = cause.kind() == io::ErrorKind::PermissionDenied;
        let remedy = disk::remedy(cause).unwrap_or(remedy);
        Self { is_forbidden, ..Self::new(path, format!("{what}: {cause}"), remedy) }
    }

    /// What to do about it.
    #[must_use]
    pub fn remedy(&self) -> &str {
        &self.remedy
    }
}

impl Listener {
    /// Takes the socket that systemd hands over, if it has this path (sd_listen_fds(3)); binds it otherwise. The
    /// process's umask must keep others out until the mode is set.
    ///
    /// # Errors
    /// Something else is at the path, another process listens there, or the directory is missing or open to others.
    pub fn open(config: &Listen) -> Result<Self, BindError> {
        let (socket, own) = match inherited(&config.socket) {
            Some(socket) => (socket, None),
            None => {
                let (socket, own) = bind(config)?;
                (socket, Some(own))
            }
        };
        // What systemd's socket lies in, and what lies above. It is served all the same: a boot waits for it.
        if let Err(why) = check_way(&config.socket, is_ours) {
            tracing::error!("{why}: {}", why.remedy());
        }
        let socket = socket.set_nonblocking(true).and_then(|()| UnixListener::from_std(socket));
        let socket = socket.map_err(|cause| {
            BindError::io(&config.socket, "cannot be listened on", &cause, "check that it is a listening stream socket")
        })?;
        Ok(Self { socket, door: Arc::new(Door::new(allowed(config))), _own: own })
    }

    /// Admits the uids of this configuration from now on, and serves no other one any more.
    pub fn admit_only(&self, config: &Listen) {
        self.door.admit_only(allowed(config));
    }

    /// What the log was told of peers lately.
    #[must_use]
    pub fn repeats(&self) -> &Repeats {
        self.door.repeats()
    }

    /// Every connection of an allowed peer, for ever. An error of accept(2) is never the end.
    pub(super) fn connections(&self) -> impl Stream<Item = io::Result<Connection>> {
        stream::unfold(self, |listener| async move { Some((Ok(listener.accept().await), listener)) })
    }

    async fn accept(&self) -> Connection {
        loop {
            match self.socket.accept().await {
                Ok((stream, _)) => {
                    if let Some(peer) = self.admitted(&stream) {
                        return Connection::new(stream, peer, Arc::clone(&self.door));
                    }
                }
                Err(error) => {
                    let what = "a connection could not be accepted";
                    if self.repeats().is_news(&format!("{what}: {error}"), Instant::now()) {
                        tracing::error!(%error, "{what}");
                    }
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    /// SO_PEERCRED: who connected, as the kernel saw it then; nobody who is not allowed.
    fn admitted(&self, stream: &UnixStream) -> Option<Peer> {
        match stream.peer_cred() {
            Ok(peer) => {
                let peer = Peer { pid: peer.pid().unwrap_or_default(), uid: peer.uid() };
                self.door.admits(peer).then_some(peer)
            }
            Err(error) => {
                if self.repeats().is_news(&format!("peer is unknown: {error}"), Instant::now()) {
                    tracing::warn!(%error, "peer is unknown: closed");
                }
                None
            }
        }
    }
}

fn is_ours(uid: u32) -> bool {
    uid == rustix::process::geteuid().as_raw()
}

fn allowed(config: &Listen) -> BTreeSet<u32> {
    let mut allowed = config.allow_uids.clone();
    allowed.insert(rustix::process::geteuid().as_raw());
    allowed.remove(&OVERFLOW_UID); // even if it is our own
    allowed
}

/// The inherited socket of this path. Its mode and owner are the socket unit's; the file stays when we go.
fn inherited(path: &Path) -> Option<BlockingListener> {
    let mut handed_over = systemd::handed_over();
    let sockets = (0..handed_over.len()).filter_map(|n| handed_over.take_unix_listener(n).ok().flatten());
    let is_own = |socket: &BlockingListener| socket.local_addr().is_ok_and(|at| at.as_pathname() == Some(path));
    let (own, others): (Vec<_>, Vec<_>) = sockets.partition(is_own);
    if own.is_empty() && !others.is_empty() {
        // Where the unit's sandbox closes the directory, that fails, and for a reason that tells nobody why.
        tracing::warn!(
            "systemd hands over a socket, and not {}: that is made anew: let ListenStream= of the socket unit name it",
            path.display()
        );
    }
    own.into_iter().next()
}

fn bind(config: &Listen) -> Result<(BlockingListener, OwnSocket), BindError> {
    let path = &config.socket;
    check_directory(path, is_ours)?;
    let lock = take_lock(path)?;
    remove_stale(path)?;
    let remedy = "let its directory be writable by the user of this process";
    let socket =
        BlockingListener::bind(path).map_err(|cause| BindError::io(path, "cannot be bound", &cause, remedy))?;
    let failed = |what| move |cause| BindError::io(path, what, &cause, "check the directory and its file system");
    let metadata = fs::symlink_metadata(path).map_err(failed("is gone again"))?;
    let own = OwnSocket { path: path.clone(), identity: disk::identity(&metadata), _lock: lock };
    if let Some(group) = &config.group {
        let gid = gid_of(path, group)?;
        std::os::unix::fs::chown(path, None, Some(gid)).map_err(failed("cannot be given to its group"))?;
    }
    fs::set_permissions(path, fs::Permissions::from_mode(config.mode)).map_err(failed("its mode cannot be set"))?;
    Ok((socket, own))
}

impl Drop for OwnSocket {
    fn drop(&mut self) {
        let is_ours = |metadata: &Metadata| disk::identity(metadata) == self.identity;
        match fs::symlink_metadata(&self.path) {
            Ok(metadata) if is_ours(&metadata) => {
                if let Err(error) = fs::remove_file(&self.path) {
                    tracing::warn!(socket = %self.path.display(), %error, "socket could not be removed");
                }
            }
            _ => tracing::warn!(socket = %self.path.display(), "socket is no longer ours: left alone"),
        }
    }
}

/// What anybody can see beforehand of why the socket could not be made. A directory that is not there may be made by
/// then, by systemd for one, and whoever serves may be another user than this one.
///
/// # Errors
/// As when it is made.
pub fn foresee(config: &Listen) -> Result<(), BindError> {
    let path = &config.socket;
    if path.parent().is_some_and(Path::exists) {
        check_way(path, |_| true)?;
    }
    config.group.as_ref().map_or(Ok(()), |group| gid_of(path, group).map(drop))
}

/// The lock file stays behind: to remove it would let two processes hold a lock on two files of one name.
fn take_lock(path: &Path) -> Result<File, BindError> {
    let name = PathBuf::from(format!("{}.lock", path.display()));
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(false).mode(0o600).custom_flags(OFlags::NOFOLLOW.bits() as i32);
    let remedy = "let its directory be writable by the user of this process";
    let file = options.open(&name).map_err(|cause| BindError::io(&name, "cannot be opened", &cause, remedy))?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(_) => Err(in_use(path)),
    }
}

fn in_use(path: &Path) -> BindError {
    let pid = BlockingStream::connect(path).ok().and_then(|stream| socket_peercred(&stream).ok());
    let owner = pid.map_or("another process".into(), |peer| format!("process {}", peer.pid));
    BindError::new(path, format!("{owner} serves it"), "stop that process, or name another listen.socket")
}

/// Removes a socket that nobody listens on any more. Nothing else is ever removed.
fn remove_stale(path: &Path) -> Result<(), BindError> {
    let Ok(metadata) = fs::symlink_metadata(path) else { return Ok(()) };
    if !metadata.file_type().is_socket() {
        let remedy = "move it away, or name another listen.socket";
        return Err(BindError::new(path, "something that is not a socket is there", remedy));
    }
    match BlockingStream::connect(path) {
        Ok(_) => Err(in_use(path)),
        Err(cause) if cause.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path).map_err(|cause| {
            BindError::io(path, "the stale one cannot be removed", &cause, "remove it, or give us its directory")
        }),
        Err(cause) => Err(BindError::io(path, "the one that is there cannot be tried", &cause, "look what it is")),
    }
}

/// The group's number, from /etc/group (group(5)).
fn gid_of(path: &Path, name: &str) -> Result<u32, BindError> {
    let groups = fs::read_to_string("/etc/group").unwrap_or_default();
    let mut groups = groups.lines().map(|line| line.split(':'));
    let gid = groups.find_map(|mut fields| (fields.next()? == name).then(|| fields.nth(1)?.parse().ok())?);
    gid.ok_or_else(|| {
        BindError::new(path, format!("group {name} does not exist"), "make the group, or remove listen.group")
    })
}
