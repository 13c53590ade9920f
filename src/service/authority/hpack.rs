//! HPACK (RFC 7541), as far as an `:authority` literal needs it: fields are stepped over, not decoded.

use std::borrow::Cow;

use http::uri::Authority;

use super::huffman;

/// The block with each refused `:authority` literal mended, if it holds one.
///
/// A mended value has as many bytes as the one it replaces, because the client's dynamic table accounts for that one.
/// A malformed block is left as it is, for h2 to answer. Out of reach are an indexed `:authority`, which is empty in
/// the static table and already mended in the dynamic one, and a literal that names it by a dynamic index, which no
/// encoder does while static index 1 exists.
pub(super) fn mend(block: &[u8]) -> Option<Vec<u8>> {
    let mut mended = Vec::new();
    let mut copied = 0;
    let mut rest = block;
    while let Some(&first) = rest.first() {
        let name_bits = match first {
            // An indexed field.
            0x80.. => {
                integer(&mut rest, 7)?;
                continue;
            }
            // A literal with incremental indexing.
            0x40.. => 6,
            // A dynamic table size update.
            0x20.. => {
                integer(&mut rest, 5)?;
                continue;
            }
            // A literal without indexing, or never indexed.
            _ => 4,
        };
        let is_authority = match integer(&mut rest, name_bits)? {
            0 => Text::read(&mut rest)?.is_authority_name(),
            index => index == AUTHORITY_INDEX,
        };
        let value_at = block.len() - rest.len();
        let value = Text::read(&mut rest)?;
        if is_authority && let Some(value) = mended_value(&value.decoded()?) {
            mended.extend_from_slice(block.get(copied..value_at)?);
            write_text(&mut mended, &value);
            copied = block.len() - rest.len();
        }
    }
    if copied == 0 {
        return None;
    }
    mended.extend_from_slice(block.get(copied..)?);
    Some(mended)
}

/// A value of the same length that h2 accepts, if it refuses this one and it is not empty.
fn mended_value(value: &[u8]) -> Option<Vec<u8>> {
    if value.is_empty() || Authority::try_from(value).is_ok() {
        return None;
    }
    let mend = |&byte: &u8| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'.' | b'_' => byte,
        _ => b'-',
    };
    Some(value.iter().map(mend).collect())
}

/// `:authority` in the static table.
const AUTHORITY_INDEX: usize = 1;

/// A string literal as it stands in a block.
struct Text<'a> {
    is_huffman: bool,
    raw: &'a [u8],
}

impl<'a> Text<'a> {
    fn read(rest: &mut &'a [u8]) -> Option<Self> {
        let is_huffman = rest.first()? & 0x80 != 0;
        let length = integer(rest, 7)?;
        let (raw, tail) = rest.split_at_checked(length)?;
        *rest = tail;
        Some(Self { is_huffman, raw })
    }

    fn is_authority_name(&self) -> bool {
        // A text has one Huffman code only, so that there is nothing to decode.
        self.raw
            == if self.is_huffman { b"\xb8\x3b\x53\x39\xec\x32\x7d\x7f".as_slice() } else { b":authority".as_slice() }
    }

    fn decoded(&self) -> Option<Cow<'a, [u8]>> {
        if self.is_huffman { huffman::decode(self.raw).map(Cow::Owned) } else { Some(Cow::Borrowed(self.raw)) }
    }
}

/// Writes a mended value, always in Huffman code. No byte that [`mended_value`] leaves has a code of more than 8 bits,
/// and none that it replaces has a code shorter than that of `-`: so the text is never longer than the one before.
fn write_text(out: &mut Vec<u8>, value: &[u8]) {
    let coded = huffman::encode(value);
    write_integer(out, 0x80, 7, coded.len());
    out.extend_from_slice(&coded);
}

/// Reads an integer whose first byte has `bits` bits to spare, of five bytes at most, as in h2.
fn integer(rest: &mut &[u8], bits: u32) -> Option<usize> {
    let (&first, mut tail) = rest.split_first()?;
    let full = (1 << bits) - 1;
    let mut value = usize::from(first) & full;
    if value == full {
        let mut shift = 0;
        loop {
            let (&byte, after) = tail.split_first()?;
            tail = after;
            value += usize::from(byte & 0x7f) << shift;
            shift += 7;
            if byte & 0x80 == 0 {
                break;
            }
            if shift == 28 {
                return None;
            }
        }
    }
    *rest = tail;
    Some(value)
}

fn write_integer(out: &mut Vec<u8>, flags: u8, bits: u32, value: usize) {
    let full = (1 << bits) - 1;
    if value < full {
        out.push(flags | value as u8);
        return;
    }
    out.push(flags | full as u8);
    let mut left = value - full;
    while left >= 0x80 {
        out.push(left as u8 | 0x80);
        left >>= 7;
    }
    out.push(left as u8);
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_names_code_is_known() {
        for (is_huffman, raw) in [(false, b":authority".to_vec()), (true, huffman::encode(b":authority"))] {
            assert!(Text { is_huffman, raw: &raw }.is_authority_name());
            assert!(!Text { is_huffman: !is_huffman, raw: &raw }.is_authority_name());
        }
    }

    #[test]
    fn integers_of_rfc_7541_appendix_c() {
        let cases: [(u32, usize, &[u8]); 6] = [
            (5, 10, &[10]),
            (5, 1337, &[31, 154, 10]),
            (7, 126, &[126]),
            (7, 127, &[127, 0]),
            (7, 255, &[127, 128, 1]),
            // The largest of five bytes, as in h2.
            (7, 127 + (1 << 28) - 1, &[127, 255, 255, 255, 127]),
        ];
        for (bits, value, coded) in cases {
            let mut out = Vec::new();
            write_integer(&mut out, 0, bits, value);
            assert_eq!(out, coded);
            let mut rest = coded;
            assert_eq!(integer(&mut rest, bits), Some(value));
            assert!(rest.is_empty());
        }
        for bad in [&[][..], &[127], &[127, 128], &[127, 255, 255, 255, 255, 1]] {
            assert_eq!(integer(&mut &*bad, 7), None, "{bad:?}");
        }
    }

    #[test]
    fn what_is_mended() {
        let path = b"%2Frun%2Fkms.sock";
        let coded_path = [b"\x8d".as_slice(), &huffman::encode(path)].concat();
        let plain_path = [b"\x11".as_slice(), path].concat();
        let mended = [b"\x8d".as_slice(), &huffman::encode(b"-2Frun-2Fkms.sock")].concat();
        let name = b":authority";
        let plain_name = [b"\x0a".as_slice(), name].concat();
        let coded_name = [b"\x88".as_slice(), &huffman::encode(name)].concat();

        for value in [&coded_path, &plain_path] {
            for (first, name) in [
                (b"\x41", &[][..]),
                (b"\x01", &[]),
                (b"\x11", &[]),
                (b"\x40", &plain_name),
                (b"\x00", &plain_name),
                (b"\x10", &coded_name),
                (b"\x40", &coded_name),
            ] {
                // A size update and an indexed field before; an indexed and a literal field after.
                let block = |value: &[u8]| [b"\x3f\xe1\x1f\x83", &first[..], name, value, b"\x86\x44\x01/"].concat();
                assert_eq!(mend(&block(value)), Some(block(&mended)), "{first:?} {name:?}");

                // Cut anywhere, it is malformed or has nothing to mend; only the last fields may be missing.
                let whole = block(value);
                let end = whole.len() - 4;
                for cut in (0..end).chain([end + 2, end + 3]) {
                    assert_eq!(mend(whole.get(..cut).unwrap()), None, "{cut}");
                }
            }
        }
    }

    #[test]
    fn what_is_left() {
        let cases: [(&str, &[u8]); 8] = [
            ("an authority that h2 accepts", b"\x41\x09localhost"),
            ("an abstract socket's", b"\x41\x05@name"),
            ("an empty one", b"\x41\x00"),
            ("the static table's, which is empty", b"\x81"),
            ("another field", b"\x44\x0d/run/kms.sock"),
            ("another literal name", b"\x40\x0a:authoritx\x01/"),
            ("a value with bad padding", b"\x41\x81\xfe"),
            ("a mended value before a malformed field", b"\x41\x01/\x7f"),
        ];
        for (what, block) in cases {
            assert_eq!(mend(block), None, "{what}");
        }
    }

    proptest! {
        #[test]
        fn a_mended_value_is_accepted_and_never_longer(
            value in prop_oneof![vec(any::<u8>(), 1..80), "[a-z0-9%/@:\\[\\]~ .-]{1,40}".prop_map(String::into_bytes)],
        ) {
            let accepted = Authority::try_from(value.as_slice()).is_ok();
            let mended = mended_value(&value);
            prop_assert_eq!(mended.is_none(), accepted);
            if let Some(mended) = mended {
                prop_assert_eq!(mended.len(), value.len());
                prop_assert!(Authority::try_from(mended.as_slice()).is_ok());
                let coded = huffman::encode(&mended);
                prop_assert!(coded.len() <= value.len());
                prop_assert!(coded.len() <= huffman::encode(&value).len());
            }
        }
    }
}
