//! The Huffman code of HPACK (RFC 7541, appendix B).

pub(super) fn decode(coded: &[u8]) -> Option<Vec<u8>> {
    let mut value = Vec::with_capacity(coded.len() * 8 / 5);
    let mut coded = coded.iter();
    // The lowest `held` bits are read and not yet decoded.
    let mut bits: u64 = 0;
    let mut held = 0;
    loop {
        while held < 32
            && let Some(&byte) = coded.next()
        {
            bits = bits << 8 | u64::from(byte);
            held += 8;
        }
        let left = bits & ((1 << held) - 1);
        if held < 8 && left == (1 << held) - 1 {
            return Some(value);
        }
        let (length, byte) = rows().find_map(|(length, first, bytes)| {
            let code = left >> u32::checked_sub(held, length)?;
            let place = usize::try_from(code.checked_sub(first)?).ok()?;
            Some((length, *bytes.get(place)?))
        })?;
        value.push(byte);
        held -= length;
    }
}

pub(super) fn encode(value: &[u8]) -> Vec<u8> {
    let mut coded = Vec::with_capacity(value.len());
    // The lowest `held` bits are not yet written: fewer than 8 between bytes.
    let mut bits: u64 = 0;
    let mut held = 0;
    for byte in value {
        let code = rows().find_map(|(length, first, bytes)| {
            let place = bytes.iter().position(|of_row| of_row == byte)?;
            Some((length, first + place as u64))
        });
        // Every byte is in one row.
        let (length, code) = code.unwrap_or_default();
        bits = bits << length | code;
        held += length;
        while held >= 8 {
            held -= 8;
            coded.push((bits >> held) as u8);
        }
    }
    if held > 0 {
        coded.push((bits << (8 - held)) as u8 | 0xff >> held);
    }
    coded
}

/// The rows of [`CODE`], each with its first code.
fn rows() -> impl Iterator<Item = (u32, u64, &'static [u8])> {
    let mut next = 0;
    let mut length = 0;
    CODE.into_iter().map(move |(bits, bytes)| {
        let first = next << (bits - length);
        next = first + bytes.len() as u64;
        length = bits;
        (bits, first, bytes)
    })
}

/// The Huffman code of RFC 7541, appendix B. It is canonical: the codes of one length are consecutive numbers in the
/// order of their bytes, and those of the next length go on from there. The last code, thirty ones, is no byte's.
const CODE: [(u32, &[u8]); 21] = [
    (5, b"012aceiost"),
    (6, b" %-./3456789=A_bdfghlmnpru"),
    (7, b":BCDEFGHIJKLMNOPQRSTUVWYjkqvwxyz"),
    (8, b"&*,;XZ"),
    (10, b"!\"()?"),
    (11, b"'+|"),
    (12, b"#>"),
    (13, b"\0$@[]~"),
    (14, b"^}"),
    (15, b"<`{"),
    (19, b"\\\xc3\xd0"),
    (20, b"\x80\x82\x83\xa2\xb8\xc2\xe0\xe2"),
    (21, b"\x99\xa1\xa7\xac\xb0\xb1\xb3\xd1\xd8\xd9\xe3\xe5\xe6"),
    (
        22,
        b"\x81\x84\x85\x86\x88\x92\x9a\x9c\xa0\xa3\xa4\xa9\xaa\xad\xb2\xb5\xb9\xba\xbb\xbd\xbe\
          \xc4\xc6\xe4\xe8\xe9",
    ),
    (
        23,
        b"\x01\x87\x89\x8a\x8b\x8c\x8d\x8f\x93\x95\x96\x97\x98\x9b\x9d\x9e\xa5\xa6\xa8\xae\xaf\
          \xb4\xb6\xb7\xbc\xbf\xc5\xe7\xef",
    ),
    (24, b"\x09\x8e\x90\x91\x94\x9f\xab\xce\xd7\xe1\xec\xed"),
    (25, b"\xc7\xcf\xea\xeb"),
    (26, b"\xc0\xc1\xc8\xc9\xca\xcd\xd2\xd5\xda\xdb\xee\xf0\xf2\xf3\xff"),
    (27, b"\xcb\xcc\xd3\xd4\xd6\xdd\xde\xdf\xf1\xf4\xf5\xf6\xf7\xf8\xfa\xfb\xfc\xfd\xfe"),
    (
        28,
        b"\x02\x03\x04\x05\x06\x07\x08\x0b\x0c\x0e\x0f\x10\x11\x12\x13\x14\x15\x17\x18\x19\x1a\
          \x1b\x1c\x1d\x1e\x1f\x7f\xdc\xf9",
    ),
    (30, b"\x0a\x0d\x16"),
];

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use loona_hpack::huffman::HuffmanDecoder;
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn huffman_code_of_rfc_7541_appendix_c() {
        let cases: [(&str, &[u8]); 12] = [
            ("302", b"\x64\x02"),
            ("307", b"\x64\x0e\xff"),
            ("gzip", b"\x9b\xd9\xab"),
            ("private", b"\xae\xc3\x77\x1a\x4b"),
            ("no-cache", b"\xa8\xeb\x10\x64\x9c\xbf"),
            ("custom-key", b"\x25\xa8\x49\xe9\x5b\xa9\x7d\x7f"),
            ("custom-value", b"\x25\xa8\x49\xe9\x5b\xb8\xe8\xb4\xbf"),
            ("www.example.com", b"\xf1\xe3\xc2\xe5\xf2\x3a\x6b\xa0\xab\x90\xf4\xff"),
            ("https://www.example.com", b"\x9d\x29\xad\x17\x18\x63\xc7\x8f\x0b\x97\xc8\xe9\xae\x82\xae\x43\xd3"),
            (
                "Mon, 21 Oct 2013 20:13:21 GMT",
                b"\xd0\x7a\xbe\x94\x10\x54\xd4\x44\xa8\x20\x05\x95\x04\x0b\x81\x66\xe0\x82\xa6\x2d\x1b\xff",
            ),
            (
                "foo=ASDJKHQKBZXOQWEOPIUAXQWEOIU; max-age=3600; version=1",
                b"\x94\xe7\x82\x1d\xd7\xf2\xe6\xc7\xb3\x35\xdf\xdf\xcd\x5b\x39\x60\xd5\xaf\x27\x08\x7f\x36\
                  \x72\xc1\xab\x27\x0f\xb5\x29\x1f\x95\x87\x31\x60\x65\xc0\x03\xed\x4e\xe5\xb1\x06\x3d\x50\x07",
            ),
            ("", b""),
        ];
        for (text, coded) in cases {
            assert_eq!(encode(text.as_bytes()), coded, "{text}");
            assert_eq!(decode(coded).unwrap(), text.as_bytes(), "{text}");
        }
    }

    #[test]
    fn huffman_code_of_every_byte_is_the_oracles() {
        for byte in 0..=u8::MAX {
            // Twice, so that one stands across a byte's border.
            let coded = encode(&[byte, byte]);
            assert_eq!(HuffmanDecoder::new().decode(&coded).unwrap(), [byte, byte]);
        }
    }

    proptest! {
        #[test]
        fn huffman_codes_agree_with_the_oracle(bytes in vec(any::<u8>(), 0..80)) {
            let coded = encode(&bytes);
            prop_assert_eq!(decode(&coded), Some(bytes.clone()));
            prop_assert_eq!(HuffmanDecoder::new().decode(&coded).ok(), Some(bytes.clone()));
            // And as a code, most of which are bad.
            prop_assert_eq!(decode(&bytes), HuffmanDecoder::new().decode(&bytes).ok());
        }
    }
}
