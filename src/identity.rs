//! Names that live as long as the data: the identity of a KEK, the key set of an envelope, and the `key_id` that the
//! API server sees.
//!
//! All three are hashes of what travels with the key, never of a label, slot, host or place, so that every control
//! plane computes the same ones. A `key_id` is public: the API server logs it and stores it in etcd.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// Names one KEK for ever: 16 bytes of a SHA-256 over the provider's type and the key's own name there.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Identity([u8; Self::LEN]);

impl Identity {
    /// Bytes in an identity.
    pub const LEN: usize = 16;

    /// The identity of the key that a PKCS#11 token calls `cka_id` (the value of its `CKA_ID`).
    #[must_use]
    pub fn of_pkcs11(cka_id: &[u8]) -> Self {
        Self(hash(&[b"trousseau kek v1", b"pkcs11", cka_id]))
    }

    /// The identity of the RSA KEK that a PKCS#11 token calls `cka_id`. Its name is CKA_ID ‖ SHA-256 of the public key
    /// that DEKs are encrypted under ‖ SHA-256 of the public key that verifies its signatures, both in DER as
    /// SubjectPublicKeyInfo (RFC 5280): nobody can put another public key in the place of either.
    #[must_use]
    pub fn of_pkcs11_pair(cka_id: &[u8], encryption: &[u8], verification: &[u8]) -> Self {
        Self::of_pkcs11(&[cka_id, &Sha256::digest(encryption), &Sha256::digest(verification)].concat())
    }

    /// The identity of one version of a Transit key, which was created at this second of Unix time. Its name is key name
    /// ‖ version ‖ creation time, the numbers as decimal digits, each part after its length in two bytes, big-endian.
    ///
    /// These travel with the key to another cluster, which namespace, mount and address do not. The creation time of
    /// version 1 would travel as well, but cannot be asked for any more once `min_decryption_version` is above it.
    #[must_use]
    pub fn of_transit(key: &str, version: u32, created: i64) -> Self {
        let part = |part: &str| {
            let length = u16::try_from(part.len()).unwrap_or(u16::MAX);
            [&length.to_be_bytes(), part.as_bytes()].concat()
        };
        let name = [part(key), part(&version.to_string()), part(&created.to_string())].concat();
        Self(hash(&[b"trousseau kek v1", b"transit", &name]))
    }

    /// An identity as it stands in an envelope.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; Self::LEN]) -> Self {
        Self(bytes)
    }

    /// The identity as it stands in an envelope.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; Self::LEN] {
        &self.0
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex(&self.0))
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl From<Identity> for String {
    fn from(identity: Identity) -> Self {
        identity.to_string()
    }
}

impl TryFrom<String> for Identity {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        unhex(&text).map(Self).ok_or("an identity has 32 hex digits")
    }
}

/// Names one set of active KEKs within one cluster. Its text form is the `key_id`.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct KeySet([u8; Self::LEN]);

impl KeySet {
    /// Bytes in a key set's hash.
    pub const LEN: usize = 16;

    const PREFIX: &str = "tr1-";

    /// The key set of these active KEKs in this cluster, in whatever order they come.
    #[must_use]
    pub fn of(cluster: &str, active: &[Identity]) -> Self {
        let mut ascending = active.to_vec();
        ascending.sort_unstable();
        let identities: Vec<u8> = ascending.iter().flat_map(|identity| identity.0).collect();
        Self(hash(&[b"trousseau key set v1", cluster.as_bytes(), &identities]))
    }

    /// A key set as it stands in an envelope.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; Self::LEN]) -> Self {
        Self(bytes)
    }

    /// The key set as it stands in an envelope.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; Self::LEN] {
        &self.0
    }
}

/// The `key_id` of KMS v2 (KEP-3299): `tr1-` and 32 lower-case hex digits.
impl fmt::Display for KeySet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", Self::PREFIX, hex(&self.0))
    }
}

impl fmt::Debug for KeySet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for KeySet {
    type Err = ();

    /// Reads a `key_id` that this plugin could have made.
    fn from_str(key_id: &str) -> Result<Self, ()> {
        let digits = key_id.strip_prefix(Self::PREFIX).ok_or(())?;
        unhex(digits).map(Self).ok_or(())
    }
}

/// The first 16 bytes of SHA-256 over the parts, a zero byte between each two.
fn hash(parts: &[&[u8]]) -> [u8; 16] {
    let mut hasher = Sha256::new();
    for (n, part) in parts.iter().enumerate() {
        if n > 0 {
            hasher.update([0]);
        }
        hasher.update(part);
    }
    let mut first = [0; 16];
    first.iter_mut().zip(hasher.finalize()).for_each(|(to, from)| *to = from);
    first
}

/// Lower-case digits, as identities and key_ids are written.
fn hex(bytes: &[u8; 16]) -> String {
    base16ct::lower::encode_string(bytes)
}

/// Reads exactly what [`hex`] writes.
fn unhex(text: &str) -> Option<[u8; 16]> {
    let mut bytes = [0; 16];
    (text.len() == 32).then_some(())?;
    base16ct::lower::decode(text, &mut bytes).ok()?;
    Some(bytes)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[derive(Deserialize)]
    struct Vectors {
        identities: Vec<IdentityVector>,
        key_sets: Vec<KeySetVector>,
    }

    #[derive(Deserialize)]
    #[serde(tag = "provider", rename_all = "lowercase")]
    enum IdentityVector {
        Pkcs11 { name: String, identity: Identity },
        Transit { key: String, version: u32, created: i64, identity: Identity },
    }

    #[derive(Deserialize)]
    struct KeySetVector {
        cluster: String,
        identities: Vec<Identity>,
        key_id: String,
    }

    #[test]
    fn golden_vectors() {
        let vectors: Vectors = serde_json::from_str(include_str!("../tests/vectors/identity-1.json")).unwrap();
        for vector in vectors.identities {
            match vector {
                IdentityVector::Pkcs11 { name, identity } => {
                    let id = base16ct::lower::decode_vec(&name).unwrap();
                    assert_eq!(Identity::of_pkcs11(&id), identity, "{name}");
                }
                IdentityVector::Transit { key, version, created, identity } => {
                    assert_eq!(Identity::of_transit(&key, version, created), identity, "{key} {version}");
                }
            }
        }
        for vector in vectors.key_sets {
            let set = KeySet::of(&vector.cluster, &vector.identities);
            assert_eq!(set.to_string(), vector.key_id);
            assert_eq!(vector.key_id.parse(), Ok(set));
        }
    }

    #[test]
    fn only_our_key_ids_are_read() {
        let upper = format!("tr1-{}", "A".repeat(32));
        for foreign in ["", "tr1-", "1", "tr2-00112233445566778899aabbccddeeff", "tr1-0011", &upper] {
            assert_eq!(foreign.parse::<KeySet>(), Err(()), "{foreign}");
        }
    }
}
