//! Random clients, which use all that HPACK and HTTP/2 allow, against an HPACK oracle.

use std::collections::VecDeque;

use http::uri::Authority;
use loona_hpack::Decoder;
use loona_hpack::encoder::encode_integer_into;
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use proptest::sample::{Index, select};

use super::super::huffman;
use super::*;

proptest! {
    #![proptest_config(ProptestConfig { max_shrink_iters: 2000, ..ProptestConfig::with_cases(12) })]

    #[test]
    fn both_dynamic_tables_stay_in_step(
        requests in vec(request(), 1..1500),
        cuts in vec(1..300_usize, 1..50),
    ) {
        let mut client = Client::default();
        let mut bytes = PREFACE.to_vec();
        for request in &requests {
            client.send(request, &mut bytes);
        }
        let output = mended(&bytes, &cuts);
        prop_assert!(output.len() <= bytes.len());

        let (before, after) = (blocks(&bytes), blocks(&output));
        prop_assert_eq!(before.len(), requests.len());
        prop_assert_eq!(after.len(), requests.len());
        let (mut sent, mut received) = (Decoder::new(), Decoder::new());
        for ((before, after), request) in before.iter().zip(&after).zip(&requests) {
            let fields = |value: fn(&Field) -> Vec<u8>| -> Vec<_> {
                request.fields.iter().map(|field| (field.name.into(), value(field))).collect()
            };
            prop_assert_eq!(sent.decode(before).unwrap(), fields(Field::sent));
            prop_assert_eq!(received.decode(after).unwrap(), fields(Field::expected));
        }
    }
}

proptest! {
    #[test]
    fn pieces_make_no_difference(
        requests in vec(request(), 1..8),
        damage in vec((any::<Index>(), any::<u8>()), 0..4),
        tail in vec(any::<u8>(), 0..60),
        cuts in vec(1..40_usize, 1..20),
    ) {
        let mut bytes = PREFACE.to_vec();
        let mut client = Client::default();
        for request in &requests {
            client.send(request, &mut bytes);
        }
        for (place, byte) in damage {
            let place = place.index(bytes.len());
            bytes[place] = byte;
        }
        bytes.extend(tail);
        let whole = mended(&bytes, &[bytes.len()]);
        prop_assert_eq!(&mended(&bytes, &cuts), &whole);
        prop_assert_eq!(&mended(&bytes, &[1]), &whole);
    }
}

/// A request, and how a client puts it into frames.
#[derive(Debug)]
struct Request {
    table_size: Option<usize>,
    fields: Vec<Field>,
    fragments: Vec<Index>,
    padding: Option<u8>,
    priority: bool,
    data: usize,
}

/// A header field, and how a client encodes it.
#[derive(Debug)]
struct Field {
    name: &'static str,
    value: String,
    by_index: bool,
    literal_name: bool,
    huffman_name: bool,
    huffman_value: bool,
    /// The first byte's flags, and how many bits they leave.
    form: (u8, u8),
}

impl Field {
    fn sent(&self) -> Vec<u8> {
        self.value.clone().into_bytes()
    }

    fn expected(&self) -> Vec<u8> {
        let accepted = Authority::try_from(self.value.as_str()).is_ok();
        let mut value = self.sent();
        if self.name == ":authority" && !accepted {
            for byte in &mut value {
                if !byte.is_ascii_alphanumeric() && *byte != b'.' {
                    *byte = b'-';
                }
            }
        }
        value
    }
}

fn request() -> impl Strategy<Value = Request> {
    (
        option::weighted(0.05, select(vec![0, 50, 200, 1000, 4096])),
        vec(field(), 1..6),
        vec(any::<Index>(), 0..3),
        option::weighted(0.2, 0..20_u8),
        any::<bool>(),
        0..30_usize,
    )
        .prop_map(|(table_size, fields, fragments, padding, priority, data)| Request {
            table_size,
            fields,
            fragments,
            padding,
            priority,
            data,
        })
}

fn field() -> impl Strategy<Value = Field> {
    let authorities = vec!["localhost", "%2Frun%2Fkms.sock", "/run/kms.sock", "@kms", "a:b:1", "[::1]:80", "", "~ü"];
    let field = prop_oneof![
        select(authorities).prop_map(|value| (":authority", value.to_owned())),
        "[%/a-f]{1,12}".prop_map(|value| (":authority", value)),
        (select(vec![":path", "content-type", "date", "grpc-timeout", "te"]), "[a-z/0-9]{0,40}"),
    ];
    (field, any::<[bool; 4]>(), select(vec![(0x40, 6), (0, 4), (0x10, 4)])).prop_map(
        |((name, value), [by_index, literal_name, huffman_name, huffman_value], form)| Field {
            name,
            value,
            by_index,
            literal_name,
            huffman_name,
            huffman_value,
            form,
        },
    )
}

/// The client's half of HPACK.
struct Client {
    table: VecDeque<(&'static str, String)>,
    table_size: usize,
}

impl Default for Client {
    fn default() -> Self {
        Self { table: VecDeque::new(), table_size: 4096 }
    }
}

impl Client {
    fn send(&mut self, request: &Request, out: &mut Vec<u8>) {
        let block = self.encode(request);
        let mut cuts: Vec<_> = request.fragments.iter().map(|cut| cut.index(block.len() + 1)).collect();
        cuts.sort_unstable();
        cuts.push(block.len());
        let (mut kind, mut from) = (HEADERS, 0);
        for (number, to) in cuts.iter().enumerate() {
            let mut flags = if number + 1 == cuts.len() { END_HEADERS } else { 0 };
            let mut payload = Vec::new();
            if kind == HEADERS {
                if let Some(padding) = request.padding {
                    flags |= PADDED;
                    payload.push(padding);
                }
                if request.priority {
                    flags |= PRIORITY;
                    payload.extend([0, 0, 0, 9, 1]);
                }
            }
            payload.extend_from_slice(&block[from..*to]);
            if kind == HEADERS {
                payload.extend(vec![0; request.padding.unwrap_or_default().into()]);
            }
            out.extend(frame(kind, flags, 1, &payload));
            (kind, from) = (CONTINUATION, *to);
        }
        out.extend(frame(DATA, END_STREAM, 1, &vec![1; request.data]));
    }

    fn encode(&mut self, request: &Request) -> Vec<u8> {
        let mut out = Vec::new();
        if let Some(size) = request.table_size {
            encode_integer_into(size, 5, 0x20, &mut out).unwrap();
            self.table_size = size;
            self.evict();
        }
        for field in &request.fields {
            self.encode_field(field, &mut out);
        }
        out
    }

    fn encode_field(&mut self, field: &Field, out: &mut Vec<u8>) {
        let is_field = |entry: &(&str, String)| entry.0 == field.name && entry.1 == field.value;
        if let Some(place) = self.table.iter().position(is_field).filter(|_| field.by_index) {
            encode_integer_into(62 + place, 7, 0x80, out).unwrap();
            return;
        }
        let name = match field.name {
            ":authority" => Some(1),
            ":path" => Some(4),
            "content-type" => Some(31),
            "date" => Some(33),
            name => self.table.iter().position(|entry| entry.0 == name).map(|place| 62 + place),
        };
        let name = name.filter(|_| !field.literal_name);
        let (flags, bits) = field.form;
        encode_integer_into(name.unwrap_or(0), bits, flags, out).unwrap();
        if name.is_none() {
            encode_text(field.name, field.huffman_name, out);
        }
        encode_text(&field.value, field.huffman_value, out);
        if flags == 0x40 {
            self.table.push_front((field.name, field.value.clone()));
            self.evict();
        }
    }

    fn evict(&mut self) {
        let size_of = |entry: &(&str, String)| 32 + entry.0.len() + entry.1.len();
        while self.table.iter().map(size_of).sum::<usize>() > self.table_size {
            self.table.pop_back();
        }
    }
}

fn encode_text(text: &str, huffman: bool, out: &mut Vec<u8>) {
    let (flag, raw) = if huffman { (0x80, huffman::encode(text.as_bytes())) } else { (0, text.as_bytes().to_vec()) };
    encode_integer_into(raw.len(), 7, flag, out).unwrap();
    out.extend(raw);
}
