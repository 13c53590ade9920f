//! The vectors, and properties.
#![allow(clippy::unwrap_used)]

use proptest::prelude::*;

use super::*;

#[derive(Deserialize)]
struct Vectors {
    good: Vec<Good>,
    bad: Vec<Bad>,
}

#[derive(Deserialize)]
struct Good {
    name: String,
    formats: BTreeSet<Format>,
    stored: String,
    version: u32,
    ciphertext: String,
}

#[derive(Deserialize)]
struct Bad {
    name: String,
    refused: String,
    stored: String,
}

const ALL: [Format; 4] =
    [Format::TrousseauV1, Format::TrousseauV2, Format::TrousseauV2Proxy, Format::VaultKubernetesKms];

fn vectors() -> Vectors {
    serde_json::from_str(include_str!("../../tests/vectors/legacy-1.json")).unwrap()
}

fn stored(hex: &str) -> Vec<u8> {
    base16ct::lower::decode_vec(hex).unwrap()
}

#[test]
fn what_older_plugins_wrote_is_read_where_its_format_is_allowed() {
    for Good { name, formats, stored: hex, version, ciphertext } in vectors().good {
        for format in ALL {
            let read = parse(&stored(&hex), &BTreeSet::from([format]));
            if formats.contains(&format) {
                let read = read.unwrap();
                assert_eq!((read.version(), read.to_string()), (version, ciphertext.clone()), "{name}, {format:?}");
            } else {
                assert!(matches!(read, Err(Unreadable::NotAllowed(_))), "{name}, {format:?}: {read:?}");
            }
        }
        assert!(matches!(parse(&stored(&hex), &BTreeSet::new()), Err(Unreadable::NotAllowed(_))), "{name}");
    }
}

#[test]
fn what_they_did_not_write_is_refused_with_the_reason() {
    for Bad { name, refused, stored: hex } in vectors().bad {
        let error = parse(&stored(&hex), &BTreeSet::from(ALL)).unwrap_err();
        assert!(error.to_string().contains(&refused), "{name}: {error}");
    }
}

#[test]
fn formats_are_named_in_one_way() {
    for format in ALL {
        let read: Format = serde_json::from_str(&format!("{:?}", format.as_str())).unwrap();
        assert_eq!(read, format);
    }
}

proptest! {
    #[test]
    fn whatever_transit_answered_is_found(
        version in 1_u32..,
        body in proptest::collection::vec(any::<u8>(), MIN_BODY..MAX_LEN / 2),
        other in "[a-z]{1,10}".prop_filter("no second line", |name| name != "vault"),
    ) {
        let answered = format!("vault:v{version}:{}", Base64::encode_string(&body));
        let encoded = Base64::encode_string(answered.as_bytes());
        for stored in [
            answered.clone(),
            encoded.clone(),
            format!("vault:-:{encoded}\n"),
            format!("{other}:-:{encoded}\nvault:-:{encoded}\n"),
        ] {
            prop_assert_eq!(parse(stored.as_bytes(), &ALL.into()).unwrap().to_string(), answered.clone());
        }
    }

    #[test]
    fn no_bytes_make_it_panic(
        beginning in "(vault:v|vault:-:|dmF1bHQ6|\\PC{0,4})",
        rest in proptest::collection::vec(any::<u8>(), 0..200),
    ) {
        let stored = [beginning.as_bytes(), &rest].concat();
        if let Ok(ciphertext) = parse(&stored, &ALL.into()) {
            let canonical = ciphertext.to_string();
            prop_assert_eq!(parse(canonical.as_bytes(), &ALL.into()), Ok(ciphertext));
        }
    }
}
