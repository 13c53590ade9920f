//! The golden vectors, and properties.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

use proptest::prelude::*;
use serde::{Deserialize, Deserializer};

use super::*;

#[derive(Deserialize)]
struct Vectors {
    good: Vec<Good>,
    bad: Vec<Bad>,
}

#[derive(Deserialize)]
struct Good {
    name: String,
    dek: Bytes,
    nonce: Bytes,
    key_set: Bytes,
    plaintext: Bytes,
    recipients: Vec<GoodRecipient>,
    envelope: Bytes,
}

#[derive(Deserialize)]
struct GoodRecipient {
    identity: Identity,
    algorithm: u8,
    wrapped: Bytes,
}

#[derive(Deserialize)]
struct Bad {
    name: String,
    refused: String,
    dek: Bytes,
    envelope: Bytes,
}

struct Bytes(Vec<u8>);

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        base16ct::lower::decode_vec(text).map(Bytes).map_err(serde::de::Error::custom)
    }
}

fn vectors() -> Vectors {
    serde_json::from_str(include_str!("../../tests/vectors/envelope-1.json")).unwrap()
}

#[test]
fn good_vectors_are_sealed_and_opened() {
    for vector in vectors().good {
        let dek = Dek::from_bytes(&vector.dek.0).unwrap();
        let key_set = KeySet::from_bytes(vector.key_set.0.try_into().unwrap());
        let recipients: Vec<_> = vector
            .recipients
            .into_iter()
            .map(|GoodRecipient { identity, algorithm, wrapped }| Recipient {
                identity,
                algorithm: WrapAlgorithm::read(algorithm, wrapped.0.len() as u16).unwrap(),
                wrapped: wrapped.0,
            })
            .collect();
        let nonce = vector.nonce.0.try_into().unwrap();
        let sealed = seal_with_nonce(key_set, recipients.clone(), &dek, nonce, &vector.plaintext.0).unwrap();
        assert_eq!(sealed, vector.envelope.0, "{}", vector.name);

        let envelope = Envelope::parse(&sealed).unwrap();
        assert_eq!(envelope.key_set, key_set, "{}", vector.name);
        let wrapped: Vec<_> = recipients.iter().map(|recipient| &recipient.wrapped[..]).collect();
        assert!(envelope.recipients.iter().map(|recipient| recipient.wrapped).eq(wrapped), "{}", vector.name);
        assert_eq!(*envelope.open(&dek).unwrap(), vector.plaintext.0, "{}", vector.name);
    }
}

#[test]
fn bad_vectors_are_refused_where_they_say() {
    for vector in vectors().bad {
        let parsed = Envelope::parse(&vector.envelope.0);
        match vector.refused.as_str() {
            "parse" => assert!(parsed.is_err(), "{} was parsed", vector.name),
            "open" => {
                let dek = Dek::from_bytes(&vector.dek.0).unwrap();
                let opened = parsed.unwrap_or_else(|error| panic!("{}: {error}", vector.name)).open(&dek);
                assert_eq!(opened.unwrap_err(), Damaged, "{}", vector.name);
            }
            other => panic!("{other}"),
        }
    }
}

fn sealed_sample() -> (Dek, Vec<u8>) {
    let good = vectors().good.swap_remove(2);
    (Dek::from_bytes(&good.dek.0).unwrap(), good.envelope.0)
}

#[test]
fn no_changed_bit_and_no_shorter_envelope_opens() {
    let (dek, whole) = sealed_sample();
    let opens = |bytes: &[u8]| Envelope::parse(bytes).is_ok_and(|envelope| envelope.open(&dek).is_ok());
    assert!(opens(&whole));
    for length in 0..whole.len() {
        assert!(!opens(&whole[..length]), "cut to {length} bytes");
    }
    for bit in 0..whole.len() * 8 {
        let mut flipped = whole.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        assert!(!opens(&flipped), "bit {bit} flipped");
    }
}

#[test]
fn what_could_not_be_parsed_is_not_sealed() {
    let recipient = |n: usize| Recipient {
        identity: Identity::from_bytes([n as u8; 16]),
        algorithm: WrapAlgorithm::AesKw,
        wrapped: vec![0; WrapAlgorithm::AesKw.wrapped_len()],
    };
    let dek = Dek::generate().unwrap();
    for ids in [vec![], vec![1, 1], vec![2, 1, 2], (0..9).collect()] {
        let recipients = ids.iter().copied().map(recipient).collect();
        let sealed = seal(KeySet::from_bytes([0; 16]), recipients, &dek, b"seed");
        assert_eq!(sealed, Err(SealError::Recipients), "{ids:?}");
    }
}

#[test]
fn an_algorithm_has_the_lengths_of_its_keys_and_no_other() {
    for (number, lengths) in [(1, vec![40]), (2, vec![40]), (3, vec![60]), (4, vec![512, 768]), (5, vec![60])] {
        for length in 0..=1024 {
            let read = WrapAlgorithm::read(number, length);
            assert_eq!(read.is_ok(), lengths.contains(&length), "algorithm {number}, {length} bytes: {read:?}");
        }
    }
    assert_eq!(WrapAlgorithm::read(0, 40), Err(Malformed::UnknownAlgorithm(0)));
}

fn any_recipients() -> impl Strategy<Value = Vec<Recipient<Vec<u8>>>> {
    let algorithm = prop::sample::select(WrapAlgorithm::ALL.to_vec());
    prop::collection::btree_map(any::<[u8; 16]>(), (algorithm, any::<u8>()), 1..=MAX_RECIPIENTS).prop_map(|map| {
        map.into_iter()
            .map(|(identity, (algorithm, fill))| Recipient {
                identity: Identity::from_bytes(identity),
                algorithm,
                wrapped: vec![fill; algorithm.wrapped_len()],
            })
            .rev() // sealing sorts
            .collect()
    })
}

proptest! {
    #[test]
    fn what_is_sealed_opens(
        recipients in any_recipients(),
        key_set: [u8; 16],
        plaintext in prop::collection::vec(any::<u8>(), 1..2000),
    ) {
        let dek = Dek::generate().unwrap();
        let algorithms: Vec<_> = recipients.iter().map(|recipient| recipient.algorithm).collect();
        let sealed = seal(KeySet::from_bytes(key_set), recipients.clone(), &dek, &plaintext).unwrap();
        prop_assert_eq!(sealed.len(), sealed_len(&algorithms, plaintext.len()));
        let envelope = Envelope::parse(&sealed).unwrap();
        prop_assert_eq!(envelope.recipients.len(), recipients.len());
        prop_assert_eq!(&*envelope.open(&dek).unwrap(), &plaintext);
        prop_assert!(envelope.open(&Dek::generate().unwrap()).is_err());
    }

    #[test]
    fn no_bytes_make_the_parser_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let _anything = Envelope::parse(&bytes);
    }
}
