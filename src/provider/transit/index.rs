//! How far a node has come, as it tells with its answers: the header for read-after-write consistency of Vault Enterprise
//! and of OpenBao from 2.7 on. Each node tells its own, so that a standby that lags must not make us forget what another
//! node has told.

use base64ct::{Base64, Encoding};
use http::HeaderValue;
use serde::Deserialize;

/// A longer one is none.
const LONGEST: usize = 1024;

/// What a node told.
#[derive(Clone, Debug)]
pub(super) struct Index {
    told: HeaderValue,
    cluster: String,
    /// `None`: it is no number.
    value: Option<u64>,
}

/// As OpenBao writes it.
#[derive(Deserialize)]
struct OpenBao {
    cluster: String,
    value: String,
}

impl Index {
    /// `None`: it is of another form than the two servers'.
    pub(super) fn of(told: &HeaderValue) -> Option<Self> {
        let text = told.to_str().ok().filter(|text| text.len() <= LONGEST)?;
        let bytes = Base64::decode_vec(text).ok()?;
        if let Ok(OpenBao { cluster, value }) = serde_json::from_slice(&bytes) {
            return Some(Self { told: told.clone(), cluster, value: value.parse().ok() });
        }
        // Vault's: its version, the cluster, the local index, that of replication, and a MAC over these.
        let text = String::from_utf8(bytes).ok()?;
        let mut parts = text.split(':');
        let (Some("v1"), Some(cluster), Some(local)) = (parts.next(), parts.next(), parts.next()) else { return None };
        Some(Self { told: told.clone(), cluster: cluster.to_owned(), value: local.parse().ok() })
    }

    /// The later one of two; of another cluster, or where that cannot be told, the one that was told last.
    pub(super) fn or_later(self, told_last: Self) -> Self {
        let is_earlier = matches!((told_last.value, self.value), (Some(last), Some(before)) if last < before);
        if told_last.cluster == self.cluster && is_earlier { self } else { told_last }
    }

    /// As it was told.
    pub(super) fn header(&self) -> &HeaderValue {
        &self.told
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn index(text: &str) -> Option<Index> {
        Index::of(&HeaderValue::from_str(&Base64::encode_string(text.as_bytes())).unwrap())
    }

    #[test]
    fn the_newest_is_kept_and_nothing_else_is_taken_for_one() {
        let bao = |cluster: &str, value: &str| format!(r#"{{"cluster":"{cluster}","value":"{value}"}}"#);
        let vault = |cluster: &str, local: &str| format!("v1:{cluster}:{local}:0:aabbcc");
        let cases = [
            (bao("a", "39"), bao("a", "41"), true),
            (bao("a", "41"), bao("a", "39"), false),
            (bao("a", "9"), bao("a", "10"), true), // numbers, and no words
            (bao("a", "41"), bao("b", "2"), true),
            (bao("a", "41"), bao("a", "0/16B3748"), true),
            (vault("a", "9"), vault("a", "10"), true),
            (vault("a", "10"), vault("a", "9"), false),
            (vault("a", "10"), vault("b", "9"), true),
        ];
        for (before, last, is_taken) in cases {
            let kept = index(&before).unwrap().or_later(index(&last).unwrap());
            assert_eq!(
                kept.header(),
                index(if is_taken { &last } else { &before }).unwrap().header(),
                "{before}, then {last}"
            );
        }
        for strange in ["", "v2:a:1:0:aa", "v1", "v1:a", "{}", &bao(&"a".repeat(1000), "1")] {
            assert!(index(strange).is_none(), "{strange}");
        }
        assert!(Index::of(&HeaderValue::from_static("*no base64*")).is_none());
    }
}
