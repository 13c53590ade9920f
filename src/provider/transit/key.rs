//! A key of Transit as its server describes it: which of its versions are KEKs.

use std::collections::BTreeMap;

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Deserializer};

use crate::config::Exportable;
use crate::provider::{Attributes, Rank, Value};
use crate::state::SeenKey;

/// 256-bit AES-GCM: the only type whose wrapped DEKs have the length that an envelope expects.
const TYPE: &str = "aes256-gcm96";

/// `data` of `GET /v1/MOUNT/keys/NAME`.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct Key {
    #[serde(rename = "type")]
    of_type: String,
    /// Each version that may still decrypt, and the second of Unix time at which it was made.
    #[serde(deserialize_with = "creations")]
    keys: BTreeMap<u32, i64>,
    latest_version: u32,
    #[serde(default)]
    derived: bool,
    #[serde(default)]
    exportable: bool,
    #[serde(default)]
    allow_plaintext_backup: bool,
    #[serde(default)]
    imported_key: bool,
    #[serde(default)]
    deletion_allowed: bool,
    #[serde(default)]
    min_decryption_version: u32,
    #[serde(default)]
    min_encryption_version: u32,
}

/// Versions of other types say more than a second, and are no KEKs.
fn creations<'de, D: Deserializer<'de>>(deserializer: D) -> Result<BTreeMap<u32, i64>, D::Error> {
    let said: BTreeMap<u32, serde_json::Value> = BTreeMap::deserialize(deserializer)?;
    Ok(said.into_iter().filter_map(|(number, created)| Some((number, created.as_i64()?))).collect())
}

/// One version that is a KEK.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Version {
    pub(super) number: u32,
    pub(super) created: i64,
}

impl Version {
    /// Active from its creation and the delay on.
    pub(super) fn rank(self, delay: SignedDuration) -> Rank {
        let created = Timestamp::from_second(self.created).unwrap_or(Timestamp::MAX);
        let not_before = created.saturating_add(delay).unwrap_or(Timestamp::MAX);
        Rank { not_before, id: self.number.to_be_bytes().to_vec() }
    }
}

impl Key {
    /// Its versions, in order.
    pub(super) fn versions(&self) -> Vec<Version> {
        self.keys.iter().map(|(number, created)| Version { number: *number, created: *created }).collect()
    }

    /// Whether its server knows a version of this number, or did.
    pub(super) const fn reaches(&self, version: u32) -> bool {
        version <= self.latest_version
    }

    /// Why none of its versions can be a KEK, and what to do.
    pub(super) fn unfit(&self, policy: Exportable) -> Option<String> {
        if self.of_type != TYPE {
            return Some(format!("it is of type {}, not {TYPE}: name a key of that type", self.of_type.escape_debug()));
        }
        if self.derived {
            return Some("it derives another key for each context: name a key that was made without `derived`".into());
        }
        if self.keys.is_empty() {
            return Some("it has no version that may decrypt: lower its min_decryption_version".into());
        }
        self.way_out()
            .filter(|_| policy == Exportable::Refuse)
            .map(|way| format!("{way}: name a key that was made without it, or set `[policy] exportable = \"warn\"`"))
    }

    /// How the key itself can leave Transit, by what its server says of it.
    pub(super) fn way_out(&self) -> Option<&'static str> {
        if self.exportable {
            Some("whoever may read transit/export gets the key itself (exportable)")
        } else if self.allow_plaintext_backup {
            Some("whoever may read transit/backup gets the key itself (allow_plaintext_backup)")
        } else if self.imported_key {
            Some("the key was imported, and somebody may have kept it")
        } else {
            None
        }
    }

    /// What its server says of it.
    pub(super) fn attributes(&self) -> Attributes {
        vec![
            ("type", Value::Text(self.of_type.clone())),
            ("exportable", Value::Flag(self.exportable)),
            ("allow_plaintext_backup", Value::Flag(self.allow_plaintext_backup)),
            ("imported_key", Value::Flag(self.imported_key)),
            ("deletion_allowed", Value::Flag(self.deletion_allowed)),
            ("min_decryption_version", Value::Text(self.min_decryption_version.to_string())),
            ("min_encryption_version", Value::Text(self.min_encryption_version.to_string())),
        ]
    }

    /// A standby that lags does not know the newest versions yet: what was seen before stays.
    pub(super) fn with_newer_of(mut self, before: Option<&Self>) -> Self {
        if let Some(before) = before.filter(|before| before.latest_version > self.latest_version) {
            let newer = before.keys.range(self.latest_version + 1..);
            self.keys.extend(newer.map(|(number, created)| (*number, *created)));
            self.latest_version = before.latest_version;
        }
        self
    }

    /// The version of which `seen` has another creation time: the key is not the one that was seen.
    pub(super) fn contradicts(&self, seen: &SeenKey) -> Option<(u32, i64, i64)> {
        let mut both = self.keys.iter().filter_map(|(number, now)| Some((*number, *seen.versions.get(number)?, *now)));
        both.find(|(_, then, now)| then != now)
    }

    /// Versions that were seen, and may not decrypt any more.
    pub(super) fn disallowed<'s>(&'s self, seen: &'s SeenKey) -> impl Iterator<Item = Version> + 's {
        let gone = seen.versions.range(..self.min_decryption_version);
        gone.map(|(number, created)| Version { number: *number, created: *created })
    }

    /// What is to be remembered of it.
    pub(super) fn seen(&self, name: &str, before: Option<&SeenKey>) -> SeenKey {
        let mut versions = before.map(|before| before.versions.clone()).unwrap_or_default();
        versions.extend(self.keys.iter().map(|(number, created)| (*number, *created)));
        SeenKey { key: name.to_owned(), versions }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn key(versions: &[(u32, i64)], latest_version: u32) -> Key {
        let keys: serde_json::Map<_, _> =
            versions.iter().map(|(number, created)| (number.to_string(), (*created).into())).collect();
        let said = serde_json::json!({"type": TYPE, "keys": keys, "latest_version": latest_version});
        serde_json::from_value(said).unwrap()
    }

    /// What was known of a key, what is said of it now, and what is known then: versions, each with its creation.
    type Case<'c> = (&'c str, Option<(&'c [(u32, i64)], u32)>, (&'c [(u32, i64)], u32), (&'c [(u32, i64)], u32));

    #[test]
    fn a_standby_that_lags_takes_no_version_away() {
        let cases: &[Case<'_>] = &[
            ("the first time", None, (&[(1, 10)], 1), (&[(1, 10)], 1)),
            ("the same", Some((&[(1, 10)], 1)), (&[(1, 10)], 1), (&[(1, 10)], 1)),
            ("rotated", Some((&[(1, 10)], 1)), (&[(1, 10), (2, 20)], 2), (&[(1, 10), (2, 20)], 2)),
            ("one behind", Some((&[(1, 10), (2, 20)], 2)), (&[(1, 10)], 1), (&[(1, 10), (2, 20)], 2)),
            ("two behind", Some((&[(1, 10), (2, 20), (3, 30)], 3)), (&[(1, 10)], 1), (&[(1, 10), (2, 20), (3, 30)], 3)),
            // min_decryption_version was raised, and then a standby lags: what it does say counts.
            ("behind and raised", Some((&[(1, 10), (2, 20), (3, 30)], 3)), (&[(2, 20)], 2), (&[(2, 20), (3, 30)], 3)),
            ("raised, not behind", Some((&[(1, 10), (2, 20)], 2)), (&[(2, 20)], 2), (&[(2, 20)], 2)),
            // Another key of that name is recognised by what is said now.
            ("behind and made anew", Some((&[(1, 10), (2, 20)], 2)), (&[(1, 99)], 1), (&[(1, 99), (2, 20)], 2)),
        ];
        for (case, before, (said, latest), (known, newest)) in cases {
            let before = before.map(|(versions, latest)| key(versions, latest));
            let now = key(said, *latest).with_newer_of(before.as_ref());
            let versions: Vec<_> = now.versions().iter().map(|version| (version.number, version.created)).collect();
            assert_eq!((versions.as_slice(), now.latest_version), (*known, *newest), "{case}");
            assert!(now.reaches(*newest) && !now.reaches(newest + 1), "{case}");
        }
    }
}
