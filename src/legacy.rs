//! What older plugins left in etcd, all of it made by Vault's Transit:
//!
//! ```text
//! trousseau-v1           vault:v63:DUYn…                        Trousseau 1.0.0 to 1.1.3
//! trousseau-v2           base64 of the above                    Trousseau 2.0.0-alpha, the socket of its provider vault
//! trousseau-v2-proxy     vault:-:base64 of the above            Trousseau 2.0.0-alpha, the proxy's socket: a line for
//!                        awskms:-:base64 of something else      each provider, in no order, each ended by a line feed
//! vault-kubernetes-kms   vault:v63:DUYn…                        vault-kubernetes-kms, v1beta1 and v2 alike
//! ```
//!
//! Here "Trousseau" is the plugin of ondat/trousseau, in Go. Each of these encoded in base64 what the API server gave it,
//! once, as Transit's interface wants it. So what Transit decrypts, decoded once, is the API server's DEK (v1beta1) or
//! seed (v2) itself. None of them bound anything else to it: no key_id, no associated data. The key_id that
//! vault-kubernetes-kms gave under v2 is the number of the key's latest version, read after the encryption: not always the
//! version in the ciphertext.
//!
//! Each was checked against the plugins' sources: `internal/server/grpc.go` and `internal/encrypt/vault.go` of v1.1.3,
//! `providers/vault/pkg/vault/vault.go` and `trousseau/pkg/server/grpc.go` of v2.0.0-alpha.1 to .3, `pkg/vault/transit.go`
//! and `pkg/plugin/` of vault-kubernetes-kms 1.4.0.
//!
//! All of these are text, so none begins with the byte 1 of an [`envelope`](crate::envelope). Transit authenticates
//! them; this room only finds what to send there, and sends nothing that Transit did not make. It is pure, as
//! [`envelope`](crate::envelope) is. The vectors in `tests/vectors/` come from an implementation that shares no code with
//! this one.

use std::collections::BTreeSet;
use std::fmt;

use base64ct::{Base64, Encoding};
use serde::Deserialize;

/// How an older plugin wrote what Transit answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Format {
    /// As it is.
    TrousseauV1,
    /// In base64.
    TrousseauV2,
    /// In base64, in a line for the provider.
    TrousseauV2Proxy,
    /// As it is.
    VaultKubernetesKms,
}

impl Format {
    /// The word for it in the configuration.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::TrousseauV1 => "trousseau-v1",
            Self::TrousseauV2 => "trousseau-v2",
            Self::TrousseauV2Proxy => "trousseau-v2-proxy",
            Self::VaultKubernetesKms => "vault-kubernetes-kms",
        }
    }
}

/// A Transit ciphertext in its canonical form: `vault:v`, the version of the key, `:`, and base64. What equals another
/// decrypts to the same.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Ciphertext {
    version: u32,
    body: String,
}

impl Ciphertext {
    /// The version of the Transit key that made it, 1 or higher.
    #[must_use]
    pub const fn version(&self) -> u32 {
        self.version
    }
}

/// As Transit takes it.
impl fmt::Display for Ciphertext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "vault:v{}:{}", self.version, self.body)
    }
}

/// Why nothing of this can be decrypted. Transit was not asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unreadable {
    /// A known bug, and the data are gone: nobody shall look for them in our corner.
    #[error(
        "it is empty. The older Trousseau, with a static token, answered a failed Encrypt with success and an empty \
         ciphertext, so what this object held was lost when it was written: delete it, or restore it from a backup"
    )]
    Empty,
    /// It may be readable, but nobody said that such are to be read.
    #[error("it is in the format of {0}, which legacy.formats of the configuration does not name")]
    NotAllowed(&'static str),
    /// A proxy's, written while its provider `vault` was not among those enabled.
    #[error("of the older Trousseau's lines, none is of its provider vault, and no other's can be read")]
    NoLineOfVault,
    /// The proxy writes one.
    #[error("of the older Trousseau's lines, more than one is of its provider vault")]
    LinesOfVault,
    /// Neither text that an older plugin wrote, nor an envelope.
    #[error("it is nothing that an older plugin wrote: {0}")]
    Foreign(&'static str),
}

/// Nothing that Transit makes of 32 bytes is longer: under an RSA key of 4096 bits it takes 693.
const MAX_LEN: usize = 1024;

/// Transit's ciphertexts are a nonce of 12 bytes, at least one byte, and a tag of 16; under an RSA key longer.
const MIN_BODY: usize = 12 + 1 + 16;

/// Between a provider's name and its ciphertext, in a line of the proxy's.
const SEPARATOR: &[u8] = b":-:";

/// Finds the Transit ciphertext in what an older plugin wrote, if its format is allowed.
///
/// # Errors
/// [`Unreadable`]: nothing here is for Transit.
pub fn parse(bytes: &[u8], allowed: &BTreeSet<Format>) -> Result<Ciphertext, Unreadable> {
    let allow = |formats: &[Format], name| match formats.iter().any(|format| allowed.contains(format)) {
        true => Ok(()),
        false => Err(Unreadable::NotAllowed(name)),
    };
    if bytes.is_empty() {
        return Err(Unreadable::Empty);
    }
    if bytes.starts_with(b"vault:v") {
        let ciphertext = bare(bytes)?;
        allow(&[Format::TrousseauV1, Format::VaultKubernetesKms], "trousseau-v1 and vault-kubernetes-kms")?;
        return Ok(ciphertext);
    }
    let (format, encoded) = match bytes.windows(SEPARATOR.len()).any(|window| window == SEPARATOR) {
        true => (Format::TrousseauV2Proxy, line_of_vault(bytes)?),
        false => (Format::TrousseauV2, bytes),
    };
    if encoded.is_empty() {
        return Err(Unreadable::Empty);
    }
    let ciphertext =
        bare(&decode(encoded).ok_or(Unreadable::Foreign("not base64, nor does it begin with `vault:v`"))?)?;
    allow(&[format], format.as_str())?;
    Ok(ciphertext)
}

/// The ciphertext of the provider `vault` in what the proxy wrote.
fn line_of_vault(bytes: &[u8]) -> Result<&[u8], Unreadable> {
    let lines =
        bytes.strip_suffix(b"\n").ok_or(Unreadable::Foreign("its last line has no end"))?.split(|byte| *byte == b'\n');
    let mut found = None;
    for line in lines {
        let at = line.windows(SEPARATOR.len()).position(|window| window == SEPARATOR);
        let (name, rest) =
            at.and_then(|at| line.split_at_checked(at)).ok_or(Unreadable::Foreign("a line without `:-:`"))?;
        if name == b"vault" && found.replace(rest.get(SEPARATOR.len()..).unwrap_or_default()).is_some() {
            return Err(Unreadable::LinesOfVault);
        }
    }
    found.ok_or(Unreadable::NoLineOfVault)
}

/// Base64 with padding, as only its encoder writes it.
fn decode(text: &[u8]) -> Option<Vec<u8>> {
    Base64::decode_vec(str::from_utf8(text).ok()?).ok()
}

/// What Transit answered, in its canonical form.
fn bare(bytes: &[u8]) -> Result<Ciphertext, Unreadable> {
    let no_transit = Unreadable::Foreign;
    if bytes.len() > MAX_LEN {
        return Err(no_transit("longer than any DEK that Transit encrypted"));
    }
    let text = str::from_utf8(bytes).ok().and_then(|text| text.strip_prefix("vault:v"));
    let text = text.ok_or(no_transit("what Transit answers begins with `vault:v`"))?;
    let (number, body) = text.split_once(':').ok_or(no_transit("nothing follows the version of the Transit key"))?;
    let decimal = number.bytes().all(|byte| byte.is_ascii_digit()) && (number == "0" || !number.starts_with('0'));
    let version = number.parse().ok().filter(|_| decimal);
    // Transit's first keys were numbered from 0, and it still takes 0 for 1.
    let version: u32 = version.ok_or(no_transit("the version of the Transit key is not a number"))?;
    let decoded =
        decode(body.as_bytes()).ok_or(no_transit("what follows the version of the Transit key is not base64"))?;
    if decoded.len() < MIN_BODY {
        return Err(no_transit("shorter than anything that Transit encrypted"));
    }
    Ok(Ciphertext { version: version.max(1), body: body.to_owned() })
}

#[cfg(test)]
mod tests;
