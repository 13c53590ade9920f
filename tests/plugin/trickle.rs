//! Long messages whose every byte is a write(2) of its own: HTTP/2 by hand, since no client would do that.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use loona_hpack::{Decoder, Encoder};
use tonic::Code;

use crate::plugin::Host;
use crate::sizes::resident_kib;

// RFC 9113 section 6.
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const SETTINGS: u8 = 4;
const WINDOW_UPDATE: u8 = 8;
const ACK: u8 = 1;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;
const INITIAL_WINDOW_SIZE: u16 = 4;
const DEFAULT_WINDOW: usize = 65_535;

/// A trickle ends after this time, or when the plugin has given no window for three seconds.
const LONGEST: Duration = Duration::from_secs(15);
const NO_WINDOW: Duration = Duration::from_secs(3);
const API_SERVER_TIMEOUT: Duration = Duration::from_secs(3);

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

fn read_frame(mut from: &UnixStream) -> std::io::Result<(u8, u8, u32, Vec<u8>)> {
    let mut head = [0; 9];
    from.read_exact(&mut head)?;
    let [a, b, c, kind, flags, stream @ ..] = head;
    let mut payload = vec![0; u32::from_be_bytes([0, a, b, c]) as usize];
    from.read_exact(&mut payload)?;
    Ok((kind, flags, u32::from_be_bytes(stream), payload))
}

/// What the plugin has said.
struct Heard {
    connection_window: usize,
    stream_window: usize,
    answer: Option<(Code, String)>,
}

/// A connection on which an Encrypt has begun.
pub struct Peer {
    stream: UnixStream,
    heard: Mutex<Heard>,
    news: Condvar,
}

impl Peer {
    /// A connection with settings exchanged, and the headers of an Encrypt sent on stream 1.
    pub fn connect(socket: &Path) -> Self {
        let mut stream = UnixStream::connect(socket).unwrap();
        stream.set_write_timeout(Some(LONGEST)).unwrap();
        stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").unwrap();
        stream.write_all(&frame(SETTINGS, 0, 0, &[])).unwrap();
        let (kind, _, _, settings) = read_frame(&stream).unwrap();
        assert_eq!(kind, SETTINGS);
        let window = settings.chunks(6).find(|setting| setting[..2] == INITIAL_WINDOW_SIZE.to_be_bytes());
        let stream_window =
            window.map_or(DEFAULT_WINDOW, |setting| u32::from_be_bytes(setting[2..].try_into().unwrap()) as usize);
        stream.write_all(&frame(SETTINGS, ACK, 0, &[])).unwrap();
        let headers = [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", "/v2.KeyManagementService/Encrypt"),
            (":authority", "localhost"),
            ("content-type", "application/grpc"),
            ("te", "trailers"),
        ];
        let block = Encoder::new().encode(headers.iter().map(|(name, value)| (name.as_bytes(), value.as_bytes())));
        stream.write_all(&frame(HEADERS, END_HEADERS, 1, &block)).unwrap();
        let heard = Heard { connection_window: DEFAULT_WINDOW, stream_window, answer: None };
        Self { stream, heard: Mutex::new(heard), news: Condvar::new() }
    }

    /// Hears until the connection ends.
    fn listen(&self) {
        let mut hpack = Decoder::new();
        while let Ok((kind, _, stream, payload)) = read_frame(&self.stream) {
            let mut heard = self.heard.lock().unwrap();
            match kind {
                WINDOW_UPDATE => {
                    let more = u32::from_be_bytes(payload[..4].try_into().unwrap()) as usize;
                    let window = if stream == 0 { &mut heard.connection_window } else { &mut heard.stream_window };
                    *window += more;
                }
                HEADERS => {
                    let headers = hpack.decode(&payload).unwrap();
                    let text = |wanted: &str| {
                        let found = headers.iter().find(|(name, _)| name == wanted.as_bytes());
                        found.map(|(_, value)| String::from_utf8(value.clone()).unwrap())
                    };
                    let code = text("grpc-status").map(|code| Code::from_bytes(code.as_bytes()));
                    heard.answer = code.map(|code| (code, text("grpc-message").unwrap_or_default()));
                }
                _ => (),
            }
            self.news.notify_all();
        }
    }

    /// Whether so many bytes of DATA may be sent, now or soon.
    fn take_window(&self, length: usize) -> bool {
        let narrow = |heard: &mut Heard| heard.connection_window.min(heard.stream_window) < length;
        let heard = self.heard.lock().unwrap();
        let (mut heard, waited) = self.news.wait_timeout_while(heard, NO_WINDOW, narrow).unwrap();
        heard.connection_window -= if waited.timed_out() { 0 } else { length };
        heard.stream_window -= if waited.timed_out() { 0 } else { length };
        !waited.timed_out()
    }

    /// Sends a message for as long as the plugin takes it, whatever it has answered; returns how much it took.
    fn trickle(&self, message: &[u8], frame_length: usize) -> usize {
        let began = Instant::now();
        let mut taken = 0;
        for part in message.chunks(frame_length) {
            if !self.take_window(part.len()) {
                break;
            }
            let flags = if taken + part.len() == message.len() { END_STREAM } else { 0 };
            for byte in frame(DATA, flags, 1, part) {
                if began.elapsed() > LONGEST || (&self.stream).write_all(&[byte]).is_err() {
                    return taken;
                }
            }
            taken += part.len();
        }
        let heard = self.heard.lock().unwrap();
        drop(self.news.wait_timeout_while(heard, LONGEST, |heard| heard.answer.is_none()).unwrap());
        taken
    }
}

/// An EncryptRequest with a plaintext of this length, as gRPC sends it.
fn encrypt_message(plaintext: usize) -> Vec<u8> {
    let mut request = Vec::new();
    prost::encoding::bytes::encode(1, &vec![7_u8; plaintext], &mut request);
    let length = u32::try_from(request.len()).unwrap().to_be_bytes();
    [&[0][..], &length, &request].concat()
}

#[test]
fn a_long_message_a_byte_at_a_time_is_answered_and_holds_up_nobody() {
    let host = Host::new();
    host.generate("0s");
    let plugin = host.serve_healthy();
    plugin.round_trip();
    let before = resident_kib(plugin.pid());
    for (length, frame_length, code, words) in [
        (4 << 20, 16_384, Code::OutOfRange, "the limit is: 131072 bytes"),
        (4 << 20, 1, Code::OutOfRange, "the limit is: 131072 bytes"),
        (1 << 20, 16_384, Code::OutOfRange, "the limit is: 131072 bytes"),
        (30_000, 16_384, Code::InvalidArgument, "send 1 to"),
    ] {
        let case = format!("{length} bytes in frames of {frame_length}");
        let peer = Peer::connect(&plugin.socket);
        let (mut slowest, mut most) = (Duration::ZERO, 0);
        let taken = thread::scope(|scope| {
            scope.spawn(|| peer.listen());
            let message = encrypt_message(length);
            let trickle = scope.spawn({
                let peer = &peer;
                move || peer.trickle(&message, frame_length)
            });
            while !trickle.is_finished() {
                let began = Instant::now();
                plugin.status().unwrap();
                slowest = slowest.max(began.elapsed());
                most = most.max(resident_kib(plugin.pid()));
            }
            peer.stream.shutdown(std::net::Shutdown::Both).unwrap();
            trickle.join().unwrap()
        });
        let answer = peer.heard.into_inner().unwrap().answer;
        let (answered, text) = answer.unwrap_or_else(|| panic!("{case}: no answer, {taken} bytes taken"));
        let text = text.replace("%20", " ");
        assert!(answered == code && text.contains(words), "{case}: {answered:?}: {text}");
        eprintln!("{case}: {taken} taken, others waited {slowest:?} at most, {} KiB more", most.saturating_sub(before));
        assert!(slowest < API_SERVER_TIMEOUT, "{case}: another connection waited {slowest:?}");
        assert!(most < before + 4096, "{case}: memory went from {before} to {most} KiB");
    }
    plugin.round_trip();
}
