//! What an answer means. Vault says it by status and text, and the texts differ between versions: what counts is the
//! status and a few words.

use http::StatusCode;
use serde::Deserialize;

use super::client::Answer;

/// Why a call did not do what it was to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// No connection, or one that broke.
    Unreachable(String),
    /// No answer by the deadline.
    Late,
    /// 503: it is there, and has no key until somebody unseals it.
    Sealed,
    /// Another status of the 500s, or an answer that is not Vault's.
    Broken(String),
    /// 3xx, and where to.
    Redirect(String),
    /// 429: a quota.
    RateLimited,
    /// The node does not know yet what another one does: a standby lags.
    Behind,
    /// 403 that blames the token: unknown, expired or revoked.
    TokenRefused,
    /// 403 that blames the policy.
    Denied,
    /// No such key.
    NoKey,
    /// No such mount, or namespace.
    NoMount(String),
    /// The version is below `min_decryption_version` or `min_encryption_version`.
    TooOld,
    /// Not a ciphertext of this key.
    BadCiphertext,
    /// All else: the status and the text.
    Other(String),
}

impl Fault {
    /// In a word, for whoever counts what happened.
    pub(super) const fn class(&self) -> &'static str {
        match self {
            Self::Unreachable(_) => "unreachable",
            Self::Late => "late",
            Self::Sealed => "sealed",
            Self::Broken(_) => "broken",
            Self::Redirect(_) => "redirect",
            Self::RateLimited => "rate-limited",
            Self::Behind => "behind",
            Self::TokenRefused => "login",
            Self::BadCiphertext => "bad-input",
            Self::Denied | Self::NoKey | Self::NoMount(_) | Self::TooOld | Self::Other(_) => "refused",
        }
    }
}

/// How a successful answer is wrapped up.
#[derive(Deserialize)]
pub(super) struct Data<T> {
    pub(super) data: T,
}

#[derive(Deserialize)]
struct Errors {
    #[serde(default)]
    errors: Vec<String>,
}

impl Answer {
    /// The body of an answer that says that all is well.
    ///
    /// # Errors
    /// What it says instead.
    pub(super) fn checked(self) -> Result<Self, Fault> {
        if self.status.is_success() { Ok(self) } else { Err(fault(self.status, &self.body)) }
    }

    /// Its `data`, or the like.
    ///
    /// # Errors
    /// It is not JSON of that form.
    pub(super) fn read<'b, T: Deserialize<'b>>(&'b self) -> Result<T, Fault> {
        serde_json::from_slice(&self.body).map_err(|error| Fault::Broken(format!("its answer is not Vault's: {error}")))
    }
}

fn fault(status: StatusCode, body: &[u8]) -> Fault {
    let Ok(Errors { errors }) = serde_json::from_slice(body) else {
        return Fault::Broken(format!(
            "it answered {status} and something that is not Vault's: is a proxy in between?"
        ));
    };
    let text = errors.join("; ").to_lowercase();
    let says = |words: &str| text.contains(words);
    match status.as_u16() {
        503 if says("sealed") => Fault::Sealed,
        429 if errors.is_empty() => Fault::Behind,
        412 => Fault::Behind, // Vault Enterprise
        429 => Fault::RateLimited,
        // "1 error occurred: permission denied" is the policy's; the bare words are the token's.
        403 if says("1 error occurred") && !says("invalid token") => Fault::Denied,
        403 => Fault::TokenRefused,
        400 if says("version is too new") || says("higher than the latest") => Fault::Behind,
        400 if says("too old") || says("less than the minimum") || says("no such key version") => Fault::TooOld,
        400 if says("encryption key not found") => Fault::NoKey,
        400 if says("message authentication failed") || says("invalid ciphertext") => Fault::BadCiphertext,
        404 if errors.is_empty() => Fault::NoKey,
        404 => Fault::NoMount(shown(&errors)),
        500.. => Fault::Broken(format!("it answered {status}: {}", shown(&errors))),
        _ => Fault::Other(format!("it answered {status}: {}", shown(&errors))),
    }
}

/// A server's text as a log may show it.
fn shown(errors: &[String]) -> String {
    let text = errors.join("; ");
    text.chars().map(|letter| if letter.is_control() { ' ' } else { letter }).take(300).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_answer_has_its_meaning() {
        let other = |status: &str, text: &str| Fault::Other(format!("it answered {status}: {text}"));
        let cases: &[(u16, &str, Fault)] = &[
            (503, r#"{"errors":["Vault is sealed"]}"#, Fault::Sealed),
            (403, r#"{"errors":["permission denied"]}"#, Fault::TokenRefused),
            (
                403,
                r#"{"errors":["2 errors occurred:\n\t* permission denied\n\t* invalid token\n\n"]}"#,
                Fault::TokenRefused,
            ),
            (403, r#"{"errors":["1 error occurred:\n\t* permission denied\n\n"]}"#, Fault::Denied),
            (400, r#"{"errors":["encryption key not found"]}"#, Fault::NoKey),
            (404, r#"{"errors":[]}"#, Fault::NoKey),
            (400, r#"{"errors":["cipher: message authentication failed"]}"#, Fault::BadCiphertext),
            (400, r#"{"errors":["invalid ciphertext: no prefix"]}"#, Fault::BadCiphertext),
            (400, r#"{"errors":["invalid ciphertext: version is too new"]}"#, Fault::Behind),
            (
                400,
                r#"{"errors":["requested version for encryption is higher than the latest key version"]}"#,
                Fault::Behind,
            ),
            (400, r#"{"errors":["ciphertext or signature version is disallowed by policy (too old)"]}"#, Fault::TooOld),
            (
                400,
                r#"{"errors":["requested version for encryption is less than the minimum encryption key version"]}"#,
                Fault::TooOld,
            ),
            (
                429,
                r#"{"errors":["request path \"transit/encrypt/k\": rate limit quota exceeded"]}"#,
                Fault::RateLimited,
            ),
            (429, r#"{"errors":[]}"#, Fault::Behind),
            (412, r#"{"errors":["required index state not present"]}"#, Fault::Behind),
            (404, r#"{"errors":["namespace not found"]}"#, Fault::NoMount("namespace not found".into())),
            (
                500,
                r#"{"errors":["1 error occurred:\n\t* context canceled"]}"#,
                Fault::Broken("it answered 500 Internal Server Error: 1 error occurred:  * context canceled".into()),
            ),
            (400, r#"{"errors":["missing plaintext"]}"#, other("400 Bad Request", "missing plaintext")),
            (
                502,
                "<html>Bad Gateway</html>",
                Fault::Broken(
                    "it answered 502 Bad Gateway and something that is not Vault's: is a proxy in between?".into(),
                ),
            ),
        ];
        for (status, body, meaning) in cases {
            let status = StatusCode::from_u16(*status).unwrap_or_default();
            assert_eq!(fault(status, body.as_bytes()), *meaning, "{status} {body}");
        }
    }
}
