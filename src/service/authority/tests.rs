//! Whole connections: against an HPACK oracle, against h2, and against what no client should send.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic)]

mod client;

use std::pin::pin;
use std::task::{Context, Waker};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

use super::*;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const CONTINUATION: u8 = 9;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;
const PADDED: u8 = 8;
const PRIORITY: u8 = 0x20;

/// What the DATA frames of [`reads_of_every_size_are_the_same`] are made of.
const DATA_BYTE: u8 = 0x77;

/// `:authority: /` as a literal, and what becomes of it.
const REFUSED: &[u8] = b"\x41\x01/";
const MENDED: &[u8] = b"\x41\x81\x5b";

#[tokio::test]
async fn h2_accepts_what_it_refused() {
    for (authority, stock, behind) in [
        ("localhost", HEADERS, HEADERS),
        ("%2Frun%2Fkms.sock", RST_STREAM, HEADERS),
        ("/run/kms.sock", RST_STREAM, HEADERS),
        ("", RST_STREAM, RST_STREAM),
    ] {
        let mut block = b"\x83\x86\x44\x06/a.b/c\x41".to_vec();
        block.push(authority.len() as u8);
        block.extend_from_slice(authority.as_bytes());
        // The second request names the first one's `:authority` by its index.
        let mut bytes = [PREFACE, &frame(SETTINGS, 0, 0, b"")].concat();
        bytes.extend(frame(HEADERS, END_STREAM | END_HEADERS, 1, &block));
        bytes.extend(frame(HEADERS, END_STREAM | END_HEADERS, 3, b"\x83\x86\x84\xbe"));
        let (client, server) = duplex(4096);
        assert_eq!(answers(client, &bytes, server).await, [stock; 2], "{authority} to h2");
        let (client, server) = duplex(4096);
        let server = MendAuthority::new(server);
        assert_eq!(answers(client, &bytes, server).await, [behind; 2], "{authority} mended");
    }
}

/// The kinds of the first frames with which h2 answers on streams 1 and 3.
async fn answers(
    mut client: impl AsyncRead + AsyncWrite + Unpin,
    request: &[u8],
    server: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
) -> [u8; 2] {
    let serving = tokio::spawn(async move {
        let mut connection = h2::server::handshake(server).await.unwrap();
        while let Some(Ok((_, mut respond))) = connection.accept().await {
            respond.send_response(http::Response::new(()), true).unwrap();
        }
    });
    client.write_all(request).await.unwrap();
    let mut answers = [None; 2];
    while answers.contains(&None) {
        let mut head = [0; 9];
        let reading = client.read_exact(&mut head);
        tokio::time::timeout(Duration::from_secs(10), reading).await.unwrap().unwrap();
        let mut payload = vec![0; length_of(&head)];
        client.read_exact(&mut payload).await.unwrap();
        let stream = usize::from(head[8]);
        if stream > 0 {
            answers[stream / 2].get_or_insert(head[3]);
        }
    }
    drop(client);
    serving.await.unwrap();
    answers.map(Option::unwrap)
}

#[tokio::test]
async fn reads_of_every_size_are_the_same() {
    let mut bytes = PREFACE.to_vec();
    for stream in [1, 3, 5] {
        bytes.extend(frame(HEADERS, 0, stream, b"\x83\x41"));
        bytes.extend(frame(CONTINUATION, END_HEADERS, stream, b"\x01/\x86"));
        bytes.extend(frame(DATA, END_STREAM, stream, &[DATA_BYTE; 50]));
    }
    // At the end of the stream, what is held goes on.
    bytes.extend(frame(HEADERS, 0, 7, REFUSED));
    let expected = mended(&bytes, &[bytes.len()]);
    assert_ne!(expected, bytes);

    for written in [1, 2, 10, 1000] {
        for read in [1, 2, 9, 1000] {
            let (mut client, server) = duplex(written);
            let bytes = bytes.clone();
            let writing = tokio::spawn(async move { client.write_all(&bytes).await.unwrap() });
            let mut server = MendAuthority::new(server);
            let mut all = Vec::new();
            let mut some = vec![0; read];
            loop {
                let length = server.read(&mut some).await.unwrap();
                if length == 0 {
                    break;
                }
                all.extend_from_slice(&some[..length]);
                // No payload of DATA has gone through the mender's own memory.
                assert!(!server.mender.ready().contains(&DATA_BYTE));
            }
            writing.await.unwrap();
            assert_eq!(all, expected, "{written} {read}");
        }
    }
}

#[tokio::test]
async fn a_read_is_ready_only_with_new_bytes() {
    let (mut client, server) = duplex(100);
    let mut server = MendAuthority::new(server);
    let mut cx = Context::from_waker(Waker::noop());
    client.write_all(PREFACE).await.unwrap();
    let mut read = [0; 100];
    // No room to read into: nothing is lost.
    assert_eq!(server.read(&mut []).await.unwrap(), 0);
    assert_eq!(server.read(&mut read).await.unwrap(), PREFACE.len());

    let bytes = frame(HEADERS, END_HEADERS, 1, REFUSED);
    let (last, held) = bytes.split_last().unwrap();
    for byte in held {
        client.write_all(&[*byte]).await.unwrap();
        assert!(pin!(server.read(&mut read)).poll(&mut cx).is_pending());
    }
    client.write_all(&[*last]).await.unwrap();
    let length = server.read(&mut read).await.unwrap();
    assert_eq!(read[..length], frame(HEADERS, END_HEADERS, 1, MENDED));
}

#[tokio::test]
async fn writes_are_forwarded() {
    let (mut client, server) = duplex(100);
    let is_write_vectored = server.is_write_vectored();
    let mut server = MendAuthority::new(server);
    assert_eq!(server.is_write_vectored(), is_write_vectored);
    let written = server.write_vectored(&[IoSlice::new(b"an"), IoSlice::new(b"swer")]).await;
    assert_eq!(written.unwrap(), 6);
    server.write_all(b"!").await.unwrap();
    server.flush().await.unwrap();
    server.shutdown().await.unwrap();
    let mut read = Vec::new();
    client.read_to_end(&mut read).await.unwrap();
    assert_eq!(read, b"answer!");
}

#[test]
fn flags_of_headers() {
    let refused = [b"\x83", REFUSED].concat();
    let mended_block = [b"\x83", MENDED].concat();
    let cases: [(u8, &[u8], &[u8]); 6] = [
        (0, b"", b""),
        (PADDED, b"\x03", b"\0\0\0"),
        (PADDED, b"\0", b""),
        (PRIORITY, b"\0\0\0\x03\x10", b""),
        (PRIORITY | PADDED, b"\x01\0\0\0\x03\x10", b"\0"),
        (END_STREAM, b"", b""),
    ];
    for (flags, before, after) in cases {
        let bytes = [before, &refused, after].concat();
        let bytes = [PREFACE, &frame(HEADERS, flags | END_HEADERS, 1, &bytes)].concat();
        let priority = if flags & PRIORITY != 0 { &b"\0\0\0\x03\x10"[..] } else { b"" };
        let expected = [priority, &mended_block].concat();
        let expected = frame(HEADERS, flags & !PADDED | END_HEADERS, 1, &expected);
        assert_eq!(mended(&bytes, &[1]), [PREFACE, &expected].concat(), "{flags:x}");
    }
}

#[test]
fn malformed_frames_pass() {
    let block = frame(HEADERS, 0, 1, REFUSED);
    let cases = [
        ("another stream's CONTINUATION", [&*block, &frame(CONTINUATION, END_HEADERS, 3, b"")].concat()),
        ("DATA inside a block", [&*block, &frame(DATA, END_HEADERS, 1, b"")].concat()),
        ("HEADERS inside a block", [&*block, &frame(HEADERS, END_HEADERS, 1, b"")].concat()),
        ("CONTINUATION without HEADERS", frame(CONTINUATION, END_HEADERS, 1, REFUSED)),
        (
            "more padding than payload",
            [frame(HEADERS, PADDED, 1, b"\x02\x83"), frame(CONTINUATION, END_HEADERS, 1, REFUSED)].concat(),
        ),
        ("more padding than payload, alone", frame(HEADERS, END_HEADERS | PADDED, 1, b"\x04\x41\x01/")),
        ("no padding length", frame(HEADERS, END_HEADERS | PADDED, 1, b"")),
        ("half a priority", frame(HEADERS, END_HEADERS | PRIORITY, 1, b"\0\0\0")),
        ("a PUSH_PROMISE", frame(5, END_HEADERS, 1, REFUSED)),
        ("a block that ends too early", frame(HEADERS, END_HEADERS, 1, b"\x41\x02/")),
    ];
    // Whatever it was, the next block is mended.
    let next = frame(HEADERS, END_HEADERS, 5, REFUSED);
    let next_mended = frame(HEADERS, END_HEADERS, 5, MENDED);
    for (what, bytes) in cases {
        let output = mended(&[PREFACE, &bytes, &next].concat(), &[1]);
        assert_eq!(output, [PREFACE, &bytes, &next_mended].concat(), "{what}");
    }
}

#[test]
fn a_wrong_preface_passes_for_good() {
    for cut in 0..PREFACE.len() {
        let mut bytes = [PREFACE, &frame(HEADERS, END_HEADERS, 1, REFUSED)].concat();
        bytes[cut] ^= 1;
        assert_eq!(mended(&bytes, &[7]), bytes, "{cut}");
    }
}

#[test]
fn nothing_is_held_after_the_end() {
    let mut mender = Mender::default();
    let headers = frame(HEADERS, 0, 1, REFUSED);
    assert_eq!(mender.push(&mut [PREFACE, &headers].concat()), PREFACE.len());
    assert_eq!(mender.wanted(), 9);
    mender.end();
    assert_eq!(mender.wanted(), 0);
    assert_eq!(mender.ready().drain(..).collect::<Vec<_>>(), headers);
    assert_eq!(mender.push(&mut headers.clone()), headers.len());
}

#[test]
fn a_block_is_held_up_to_a_bound() {
    let floods = [
        ("empty", frame(CONTINUATION, 0, 1, b"")),
        ("full", frame(CONTINUATION, 0, 1, &[0x83; 16_384])),
        ("huge", frame(CONTINUATION, 0, 1, &vec![0x83; 0xff_ffff])),
    ];
    for (what, flood) in floods {
        let mut mender = Mender::default();
        let mut bytes = [PREFACE, &frame(HEADERS, 0, 1, REFUSED)].concat();
        while bytes.len() < 300_000 {
            bytes.extend_from_slice(&flood);
        }
        let mut output = Vec::new();
        for (number, piece) in bytes.chunks(100).enumerate() {
            push(&mut mender, piece, &mut output);
            let held = number * 100 + piece.len() - output.len();
            assert!(held <= 64 * 1024 + 100, "{what}: {held}");
        }
        let next = frame(HEADERS, END_HEADERS, 3, REFUSED);
        push(&mut mender, &next, &mut output);
        bytes.extend(frame(HEADERS, END_HEADERS, 3, MENDED));
        assert!(output == bytes, "{what}");
    }
}

#[test]
fn frames_of_a_block_keep_their_places() {
    // Four times `^`, with a code of 14 bits: `-` has one of 6, and the block becomes four bytes shorter.
    let refused = b"\x41\x87\xff\xf3\xff\xcf\xff\x3f\xfc";
    let first = [b"\x03", &refused[..2], b"\0\0\0"].concat();
    let mut sent = [
        frame(HEADERS, PADDED | END_STREAM, 1, &first),
        frame(CONTINUATION, 0, 1, &refused[2..]),
        frame(CONTINUATION, 0, 1, b""),
        frame(CONTINUATION, PRIORITY | PADDED | END_HEADERS, 1, b"\x83\x86"),
    ];
    // The reserved bit before a stream's number means nothing.
    sent[2][5] |= 0x80;
    let expected = [
        frame(HEADERS, END_STREAM, 1, b"\x41\x83"),
        frame(CONTINUATION, 0, 1, b"\x59\x65\x96\x83\x86"),
        frame(CONTINUATION, 0, 1, b""),
        frame(CONTINUATION, PRIORITY | END_HEADERS, 1, b""),
    ];
    for size in [1, 10, 1000] {
        // In one piece, the frames behind move forward in their buffer.
        let next = [frame(DATA, 0, 1, b"data"), frame(HEADERS, END_HEADERS, 3, REFUSED)].concat();
        let next_expected = [frame(DATA, 0, 1, b"data"), frame(HEADERS, END_HEADERS, 3, MENDED)];
        let output = mended(&[PREFACE, &sent.concat(), &next].concat(), &[size]);
        let expected = [PREFACE, &expected.concat(), &next_expected.concat()].concat();
        assert_eq!(output, expected, "{size}");
    }
}

#[test]
fn data_is_neither_changed_nor_held() {
    let mut mender = Mender::default();
    assert_eq!(mender.push(&mut PREFACE.to_vec()), PREFACE.len());
    for block in [b"\x83\x86\x41\x81\x1f", b"\x83\x86\x41\x81\x63"] {
        let headers = frame(HEADERS, END_HEADERS, 1, block);
        for length in [0, 1, 8, 9, 10, 255, 16_383, 16_384, 100_000] {
            let data = frame(DATA, 0, 1, &vec![1; length]);
            for size in [headers.len() + 9, headers.len() + 10, 200_000] {
                let mut bytes = [&*headers, &data].concat();
                let size = size.min(bytes.len());
                let (first, second) = bytes.split_at_mut(size);
                assert_eq!(mender.push(first), first.len(), "{length} {size}");
                assert_eq!(mender.push(second), second.len(), "{length} {size}");
                assert!(mender.ready().is_empty());
                assert!(bytes.ends_with(&data));
            }
        }
    }
}

/// What becomes of `bytes`, cut into pieces of these sizes, over and over.
fn mended(bytes: &[u8], sizes: &[usize]) -> Vec<u8> {
    let mut mender = Mender::default();
    let mut output = Vec::new();
    let mut rest = bytes;
    for size in sizes.iter().cycle() {
        let (piece, tail) = rest.split_at(rest.len().min(*size));
        push(&mut mender, piece, &mut output);
        rest = tail;
        if rest.is_empty() {
            break;
        }
    }
    mender.end();
    output.extend(mender.ready().drain(..));
    output
}

fn push(mender: &mut Mender, piece: &[u8], output: &mut Vec<u8>) {
    let mut piece = piece.to_vec();
    let done = mender.push(&mut piece);
    output.extend_from_slice(&piece[..done]);
    output.extend(mender.ready().drain(..));
}

fn frame(kind: u8, flags: u8, stream: u8, payload: &[u8]) -> Vec<u8> {
    let [_, l0, l1, l2] = (payload.len() as u32).to_be_bytes();
    [&[l0, l1, l2, kind, flags, 0, 0, 0, stream], payload].concat()
}

fn length_of(head: &[u8]) -> usize {
    usize::from(head[0]) << 16 | usize::from(head[1]) << 8 | usize::from(head[2])
}

/// The frames after the preface, each as its header and its payload.
fn frames(bytes: &[u8]) -> impl Iterator<Item = (&[u8], &[u8])> {
    let mut rest = bytes.strip_prefix(PREFACE).unwrap();
    std::iter::from_fn(move || {
        let (head, after) = rest.split_at_checked(9)?;
        let (payload, after) = after.split_at(length_of(head));
        rest = after;
        Some((head, payload))
    })
}

/// The header blocks of a stream that is whole and correct.
fn blocks(bytes: &[u8]) -> Vec<Vec<u8>> {
    let mut blocks: Vec<Vec<u8>> = Vec::new();
    for (head, mut payload) in frames(bytes) {
        if head[3] == HEADERS {
            if head[4] & PADDED != 0 {
                payload = &payload[1..payload.len() - usize::from(payload[0])];
            }
            if head[4] & PRIORITY != 0 {
                payload = &payload[5..];
            }
            blocks.push(payload.to_vec());
        } else if head[3] == CONTINUATION {
            blocks.last_mut().unwrap().extend_from_slice(payload);
        }
    }
    blocks
}
