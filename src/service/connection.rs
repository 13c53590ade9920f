//! One accepted connection: its stream, and the key set that it was last told of.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::{Arc, Mutex, Weak};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::UnixStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Sleep, sleep};
use tonic::Request;
use tonic::transport::server::Connected;

use super::authority::MendAuthority;
use crate::audit::Peer;
use crate::keyring::{ActiveSet, Keyring, KeyringError};
use crate::sync::lock;

/// An Encrypt this soon after a Status uses the key set that the Status announced: the API server drops an answer
/// under another one, and asks for both in turn.
const ANNOUNCEMENT_HOLDS: Duration = Duration::from_secs(5);

/// A peer must have sent HTTP/2's connection preface (RFC 9113 section 3.4) within this time.
const PREFACE_TIMEOUT: Duration = Duration::from_secs(5);
const PREFACE_LEN: usize = 24;

/// Connections at a time that speak HTTP/2. An API server has one or two; a silent peer takes nobody's place.
const PLACES: usize = 256;

/// What connections share.
#[derive(Clone)]
pub(super) struct Places(Arc<Semaphore>);

impl Default for Places {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(PLACES)))
    }
}

/// What tonic serves.
pub(super) struct Connection {
    stream: MendAuthority<UnixStream>,
    preface: Option<Preface>,
    places: Places,
    /// Taken once the preface has come, for as long as the connection lasts.
    place: Option<OwnedSemaphorePermit>,
    announced: Announced,
}

/// A preface that has not come whole yet.
struct Preface {
    missing: usize,
    too_late: Pin<Box<Sleep>>,
}

/// What each request of a connection carries along: who is at its other end, and the key set of its last Status.
#[derive(Clone)]
pub(super) struct Announced {
    peer: Option<Peer>,
    announcement: Arc<Mutex<Option<Announcement>>>,
}

#[derive(Clone)]
struct Announcement {
    when: Instant,
    set: Arc<ActiveSet>,
    /// The keyring may have been exchanged since.
    keyring: Weak<Keyring>,
}

impl Connection {
    pub(super) fn new(stream: UnixStream, places: Places) -> Self {
        let peer = stream.peer_cred().ok().map(|peer| Peer { pid: peer.pid().unwrap_or_default(), uid: peer.uid() });
        let announced = Announced { peer, announcement: Arc::default() };
        let preface = Preface { missing: PREFACE_LEN, too_late: Box::pin(sleep(PREFACE_TIMEOUT)) };
        Self { stream: MendAuthority::new(stream), preface: Some(preface), places, place: None, announced }
    }

    /// The preface has come: takes a place, or ends the newest connection, so that those that serve go on.
    fn begin(&mut self) -> io::Result<()> {
        self.preface = None;
        self.place = Arc::clone(&self.places.0).try_acquire_owned().ok();
        if self.place.is_none() {
            let peer = self.announced.peer;
            let (uid, pid) = peer.map(|peer| (peer.uid, peer.pid)).unzip();
            tracing::warn!(
                uid,
                pid,
                "{PLACES} connections are open: the newest is closed; see which process keeps them"
            );
            return Err(io::ErrorKind::QuotaExceeded.into());
        }
        Ok(())
    }
}

impl Announced {
    fn of<T>(request: &Request<T>) -> Option<&Self> {
        request.extensions().get()
    }

    /// Who sent a request.
    pub(super) fn peer_of<T>(request: &Request<T>) -> Option<Peer> {
        Self::of(request)?.peer
    }

    /// The set that is active, announced to the request's connection.
    pub(super) fn announce<T>(request: &Request<T>, keyring: &Arc<Keyring>) -> Result<Arc<ActiveSet>, KeyringError> {
        let set = Arc::new(keyring.active(Timestamp::now()).map_err(KeyringError::into_outage)?);
        keyring.health(&set)?;
        if let Some(of) = Self::of(request) {
            *lock(&of.announcement) =
                Some(Announcement { when: Instant::now(), set: Arc::clone(&set), keyring: Arc::downgrade(keyring) });
        }
        Ok(set)
    }

    /// The set to encrypt under: the one that was just announced, else the one that is active.
    pub(super) fn or_active<T>(request: &Request<T>, keyring: &Arc<Keyring>) -> Result<Arc<ActiveSet>, KeyringError> {
        let announced = Self::of(request).and_then(|of| lock(&of.announcement).clone());
        let active = keyring.active(Timestamp::now());
        match announced {
            Some(Announcement { when, set, keyring: of })
                if when.elapsed() < ANNOUNCEMENT_HOLDS
                    && of.as_ptr() == Arc::as_ptr(keyring)
                    // The same set as it is now may have a KEK more within reach.
                    && active.as_ref().ok().is_none_or(|active| active.key_set != set.key_set) =>
            {
                Ok(set)
            }
            _ => active.map(Arc::new),
        }
    }
}

impl Connected for Connection {
    type ConnectInfo = Announced;

    fn connect_info(&self) -> Announced {
        self.announced.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(cx, buf);
        if let Some(preface) = &mut self.preface {
            preface.missing = preface.missing.saturating_sub(buf.filled().len() - before);
            if preface.missing == 0 {
                self.begin()?;
            } else if read.is_pending() && preface.too_late.as_mut().poll(cx).is_ready() {
                return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
            }
        }
        read
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}
