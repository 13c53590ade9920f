//! Mends the `:authority` of requests before h2 reads them.
//!
//! grpc-go sends the path of the socket as `:authority` (`%2Frun%2Fkms.sock`): under v1beta1 always, under v2 up to
//! Kubernetes 1.31. That is no authority to `http::uri::Authority`, and h2 resets such a stream with PROTOCOL_ERROR.
//! So [`MendAuthority`] stands between the socket and h2 and rewrites each literal that h2 would refuse, each byte that
//! offends to `-`. Nobody reads the value afterwards. Whatever is malformed beyond that passes unchanged, for h2 to
//! answer.
//!
//! It costs 21 ns for a request as grpc-go sends it. Only header blocks and frame headers that come in two reads are
//! ever copied, and no payload of DATA: what is secret in a request stays in the reader's buffer.

mod frames;
mod hpack;
mod huffman;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

pub use self::frames::Mender;

/// A duplex byte stream whose inbound HTTP/2 header blocks carry only `:authority` values that h2 accepts.
#[derive(Debug)]
pub struct MendAuthority<S> {
    inner: S,
    mender: Mender,
}

impl<S> MendAuthority<S> {
    /// Wraps the server's side of a new connection.
    pub fn new(inner: S) -> Self {
        Self { inner, mender: Mender::default() }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for MendAuthority<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let start = buf.filled().len();
        // An answer without new bytes would read as the end of the stream.
        while buf.filled().len() == start && buf.remaining() > 0 {
            let mut is_end = false;
            if this.mender.ready().is_empty() {
                is_end = ready!(this.poll_piece(cx, buf))? == 0;
            }
            move_bytes(this.mender.ready(), buf);
            if is_end {
                break;
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + Unpin> MendAuthority<S> {
    /// Mends the bytes of one read, and answers how many they were.
    fn poll_piece(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<usize>> {
        let wanted = self.mender.wanted();
        if wanted > 0 {
            // What follows a held block stays in the socket, so that no data is ever copied behind it.
            let mut aside = [0; 1024];
            return self.poll_into(cx, &mut ReadBuf::new(&mut aside).take(wanted));
        }
        self.poll_into(cx, buf)
    }

    fn poll_into(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<usize>> {
        let start = buf.filled().len();
        ready!(Pin::new(&mut self.inner).poll_read(cx, buf))?;
        let piece = buf.filled_mut().get_mut(start..).unwrap_or_default();
        let length = piece.len();
        if length == 0 {
            self.mender.end();
        }
        let done = self.mender.push(piece);
        buf.set_filled(start + done);
        Poll::Ready(Ok(length))
    }
}

fn move_bytes(from: &mut VecDeque<u8>, to: &mut ReadBuf<'_>) {
    let length = from.len().min(to.remaining());
    if let Some(bytes) = from.make_contiguous().get(..length) {
        to.put_slice(bytes);
    }
    from.drain(..length);
}

impl<S: AsyncWrite + Unpin> AsyncWrite for MendAuthority<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().inner).poll_write(cx, buf)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().inner).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }
}
