//! Bytes from a client, in pieces of any sizes: no panic, and the pieces make no difference.
#![no_main]

use libfuzzer_sys::fuzz_target;
use trousseau::service::authority::Mender;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

fuzz_target!(|data: &[u8]| {
    // The input begins with the number of pieces, and their sizes.
    let Some((count, rest)) = data.split_first() else {
        return;
    };
    let Some((sizes, bytes)) = rest.split_at_checked(usize::from(count % 16)) else {
        return;
    };
    for preface in [b"", PREFACE] {
        let bytes = [preface, bytes].concat();
        let whole = mended(&bytes, &[]);
        assert_eq!(mended(&bytes, sizes), whole);
        assert!(whole.len() <= bytes.len());
        if !bytes.starts_with(PREFACE) {
            assert_eq!(whole, bytes);
        }
    }
});

/// What becomes of `bytes`, cut into pieces of these sizes and a last one of what is left.
fn mended(bytes: &[u8], sizes: &[u8]) -> Vec<u8> {
    let mut mender = Mender::default();
    let mut output = Vec::new();
    let mut rest = bytes;
    let sizes = sizes.iter().map(|size| usize::from(*size));
    for size in sizes.chain([usize::MAX]) {
        let (piece, tail) = rest.split_at(size.min(rest.len()));
        let mut piece = piece.to_vec();
        let done = mender.push(&mut piece);
        output.extend_from_slice(&piece[..done]);
        output.extend(mender.ready().drain(..));
        rest = tail;
    }
    mender.end();
    output.extend(mender.ready().drain(..));
    output
}
