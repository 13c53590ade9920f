//! One accepted connection: its stream, and the key set that it was last told of.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::{Arc, Mutex, Weak};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::UnixStream;
use tokio::time::{Sleep, sleep};
use tonic::Request;
use tonic::transport::server::Connected;

use super::authority::MendAuthority;
use super::door::{Door, Place};
use crate::audit::Peer;
use crate::keyring::{ActiveSet, Keyring, KeyringError};
use crate::sync::lock;

/// An Encrypt this soon after a Status uses the key set that the Status announced: the API server drops an answer
/// under another one, and asks for both in turn.
const ANNOUNCEMENT_HOLDS: Duration = Duration::from_secs(5);

/// A peer must have sent HTTP/2's connection preface (RFC 9113 section 3.4) within this time.
const PREFACE_TIMEOUT: Duration = Duration::from_secs(5);
const PREFACE_LEN: usize = 24;

/// What tonic serves.
pub(super) struct Connection {
    stream: MendAuthority<UnixStream>,
    preface: Option<Preface>,
    door: Arc<Door>,
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
    place: Arc<Place>,
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
    pub(super) fn new(stream: UnixStream, peer: Peer, door: Arc<Door>) -> Self {
        let announced = Announced { place: Arc::new(Place::new(peer)), announcement: Arc::default() };
        let preface = Preface { missing: PREFACE_LEN, too_late: Box::pin(sleep(PREFACE_TIMEOUT)) };
        Self { stream: MendAuthority::new(stream), preface: Some(preface), door, announced }
    }

    /// Whether it may go on: a reload may have taken its peer out, and another connection its place.
    fn may_stay(&self, cx: &Context<'_>) -> io::Result<()> {
        let place = &self.announced.place;
        if place.poll_lost(cx).is_ready() {
            return Err(io::ErrorKind::QuotaExceeded.into());
        }
        if self.door.admits(place.peer) { Ok(()) } else { Err(io::ErrorKind::PermissionDenied.into()) }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.door.leave(&self.announced.place);
    }
}

impl Announced {
    fn of<T>(request: &Request<T>) -> Option<&Self> {
        request.extensions().get()
    }

    /// Who sent a request.
    pub(super) fn peer_of<T>(request: &Request<T>) -> Option<Peer> {
        Some(Self::of(request)?.place.peer)
    }

    /// A request has come on the connection.
    pub(super) fn note<T>(request: &http::Request<T>) {
        if let Some(of) = request.extensions().get::<Self>() {
            of.place.note_request();
        }
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
        self.may_stay(cx)?;
        let before = buf.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(cx, buf);
        if let Some(preface) = &mut self.preface {
            preface.missing = preface.missing.saturating_sub(buf.filled().len() - before);
            if preface.missing == 0 {
                self.preface = None;
                self.door.take(&self.announced.place)?;
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
