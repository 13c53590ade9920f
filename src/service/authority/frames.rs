//! The state machine over the bytes that an HTTP/2 client sends.

use std::borrow::Cow;
use std::collections::VecDeque;
use std::mem;

use super::hpack;

/// Mends a client's bytes, without doing I/O.
///
/// What it makes of a stream does not depend on how the stream is cut into pieces.
#[derive(Debug, Default)]
pub struct Mender {
    place: Place,
    /// The beginning of a frame header or of a header block whose rest has not come yet.
    held: Vec<u8>,
    /// How many bytes of the header block that begins here are known to be whole frames.
    walked: usize,
    wanted: usize,
    ready: VecDeque<u8>,
}

impl Mender {
    /// Takes the next piece of the stream, and answers how many bytes at its start go on, mended in place.
    ///
    /// The rest of it is held until more has come, or is in [`ready`](Self::ready) behind what was held.
    pub fn push(&mut self, piece: &mut [u8]) -> usize {
        if self.held.is_empty() {
            let (done, taken) = self.walk(piece);
            self.held.extend(piece.iter().skip(taken));
            return done;
        }
        let mut held = mem::take(&mut self.held);
        held.extend_from_slice(piece);
        let (done, taken) = self.walk(&mut held);
        self.ready.extend(held.iter().take(done));
        held.drain(..taken);
        self.held = held;
        0
    }

    /// How many bytes must come before anything that is held can go on; none if nothing is held.
    ///
    /// A piece that is no longer than this has nothing in it that would have to be copied behind what is held.
    pub fn wanted(&self) -> usize {
        self.wanted
    }

    /// The bytes that go on and have no place in a piece. The caller takes them from the front.
    pub fn ready(&mut self) -> &mut VecDeque<u8> {
        &mut self.ready
    }

    /// The stream has ended: what is held goes on as it is.
    pub fn end(&mut self) {
        self.place = Place::Opaque;
        self.wanted = 0;
        self.ready.extend(self.held.drain(..));
    }

    /// Mends what is whole in `bytes`, in place. Answers how many bytes at the front go on, and how many were taken.
    fn walk(&mut self, bytes: &mut [u8]) -> (usize, usize) {
        self.wanted = 0;
        let mut done = 0;
        let mut at = 0;
        while let Some(rest) = bytes.get(at..).filter(|rest| !rest.is_empty()) {
            match self.step(rest) {
                Step::Pass(length) => {
                    // Only behind a block that has become shorter.
                    if done < at {
                        bytes.copy_within(at..at + length, done);
                    }
                    done += length;
                    at += length;
                }
                Step::Mend(length, frames) => {
                    if let Some(place) = bytes.get_mut(done..done + frames.len()) {
                        place.copy_from_slice(&frames);
                    }
                    done += frames.len();
                    at += length;
                }
                Step::Wait(missing) => {
                    self.wanted = missing;
                    break;
                }
            }
        }
        (done, at)
    }

    /// What is to be done with the first of `bytes`, which is not empty.
    fn step(&mut self, bytes: &[u8]) -> Step {
        match self.place {
            Place::Opaque => Step::Pass(bytes.len()),
            Place::Preface(expected) => {
                let length = expected.len().min(bytes.len());
                self.place = match expected.strip_prefix(bytes.get(..length).unwrap_or_default()) {
                    Some([]) => Place::Frame,
                    Some(left) => Place::Preface(left),
                    None => Place::Opaque,
                };
                Step::Pass(length)
            }
            Place::Payload(left) => {
                let length = left.min(bytes.len());
                self.place = Place::after(left - length);
                Step::Pass(length)
            }
            Place::Frame => match Head::read(bytes) {
                None => Step::Wait(Head::LENGTH - bytes.len()),
                Some((head, _)) if head.kind == HEADERS => self.block(head.stream, bytes),
                Some((head, _)) => {
                    self.place = Place::after(head.length);
                    Step::Pass(Head::LENGTH)
                }
            },
        }
    }

    /// A header block: a HEADERS frame and the CONTINUATION frames of its stream, up to the one with END_HEADERS.
    fn block(&mut self, stream: u32, bytes: &[u8]) -> Step {
        loop {
            let at = self.walked;
            let Some((head, _)) = bytes.get(at..).and_then(Head::read) else {
                return Step::Wait(at + Head::LENGTH - bytes.len());
            };
            if at > 0 && (head.kind != CONTINUATION || head.stream != stream) {
                self.walked = 0;
                return Step::Pass(at);
            }
            let end = at + Head::LENGTH + head.length;
            if end > MAX_BLOCK {
                self.walked = 0;
                self.place = Place::after(head.length);
                return Step::Pass(at + Head::LENGTH);
            }
            let Some(frames) = bytes.get(..end) else {
                return Step::Wait(end - bytes.len());
            };
            if head.flags & END_HEADERS != 0 {
                self.walked = 0;
                return match mend(frames) {
                    Some(mended) => Step::Mend(end, mended),
                    None => Step::Pass(end),
                };
            }
            self.walked = end;
        }
    }
}

#[derive(Debug)]
enum Place {
    /// In the connection preface, of which this is left.
    Preface(&'static [u8]),
    /// Where a frame begins.
    Frame,
    /// In the payload of a frame that passes, with so many bytes to come.
    Payload(usize),
    /// In something that is not HTTP/2: all of it passes.
    Opaque,
}

impl Place {
    fn after(left: usize) -> Self {
        match left {
            0 => Self::Frame,
            left => Self::Payload(left),
        }
    }
}

impl Default for Place {
    fn default() -> Self {
        Self::Preface(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
    }
}

enum Step {
    /// So many bytes go on as they are.
    Pass(usize),
    /// So many bytes are replaced by these, which are no more than they.
    Mend(usize, Vec<u8>),
    /// So many bytes must come first.
    Wait(usize),
}

/// The most that is held for one header block, frame headers counted, so that empty CONTINUATION frames have an end.
///
/// A longer block passes unmended: HTTP/2 has answers to a block that is too long, which h2 knows to give, and an
/// error from the read would take them away.
const MAX_BLOCK: usize = 64 * 1024;

/// The frames of a whole header block, mended if there is something to mend.
///
/// They keep their number and order, and each is as full as it was while the block lasts. Padding does not survive.
fn mend(frames: &[u8]) -> Option<Vec<u8>> {
    let (first, mut rest) = Frame::read(frames)?;
    let mut block = Cow::Borrowed(first.fragment);
    while !rest.is_empty() {
        let (frame, after) = Frame::read(rest)?;
        block.to_mut().extend_from_slice(frame.fragment);
        rest = after;
    }
    let block = hpack::mend(&block)?;

    let mut mended = Vec::with_capacity(frames.len());
    let mut left = block.as_slice();
    let mut rest = frames;
    while !rest.is_empty() {
        let (frame, after) = Frame::read(rest)?;
        let (fragment, tail) = left.split_at_checked(frame.fragment.len()).unwrap_or((left, &[]));
        Frame { fragment, ..frame }.write(&mut mended);
        left = tail;
        rest = after;
    }
    Some(mended)
}

/// A HEADERS or CONTINUATION frame without its padding.
struct Frame<'a> {
    head: Head,
    priority: &'a [u8],
    fragment: &'a [u8],
}

impl<'a> Frame<'a> {
    fn read(bytes: &'a [u8]) -> Option<(Self, &'a [u8])> {
        let (head, rest) = Head::read(bytes)?;
        let (mut payload, rest) = rest.split_at_checked(head.length)?;
        // On CONTINUATION these flags mean nothing.
        let has = |flag| head.kind == HEADERS && head.flags & flag != 0;
        let mut padding = 0;
        if has(PADDED) {
            let (&length, after) = payload.split_first()?;
            padding = usize::from(length);
            payload = after;
        }
        let (priority, payload) = payload.split_at_checked(if has(PRIORITY) { 5 } else { 0 })?;
        let fragment = payload.get(..payload.len().checked_sub(padding)?)?;
        Some((Self { head, priority, fragment }, rest))
    }

    fn write(&self, out: &mut Vec<u8>) {
        let head =
            Head { length: self.priority.len() + self.fragment.len(), flags: self.head.flags & !PADDED, ..self.head };
        head.write(out);
        out.extend_from_slice(self.priority);
        out.extend_from_slice(self.fragment);
    }
}

struct Head {
    length: usize,
    kind: u8,
    flags: u8,
    stream: u32,
}

impl Head {
    const LENGTH: usize = 9;

    fn read(bytes: &[u8]) -> Option<(Self, &[u8])> {
        let (&[l0, l1, l2, kind, flags, s0, s1, s2, s3], rest) = bytes.split_first_chunk()?;
        let head = Self {
            length: u32::from_be_bytes([0, l0, l1, l2]) as usize,
            kind,
            flags,
            stream: u32::from_be_bytes([s0 & 0x7f, s1, s2, s3]),
        };
        Some((head, rest))
    }

    fn write(&self, out: &mut Vec<u8>) {
        let [_, l0, l1, l2] = (self.length as u32).to_be_bytes();
        out.extend_from_slice(&[l0, l1, l2, self.kind, self.flags]);
        out.extend_from_slice(&self.stream.to_be_bytes());
    }
}

const HEADERS: u8 = 1;
const CONTINUATION: u8 = 9;

const END_HEADERS: u8 = 0x04;
const PADDED: u8 = 0x08;
const PRIORITY: u8 = 0x20;
