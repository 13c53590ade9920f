//! Which token is meant: an RFC 7512 `pkcs11:` URI.

use std::fmt;
use std::str::FromStr;

/// What a token must say of itself (PKCS#11 section 3.2, `CK_TOKEN_INFO`) to be the one that is meant.
///
/// Only attributes that travel with the token are taken: a slot's number may be another one after a reboot.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TokenUri {
    token: Option<String>,
    serial: Option<String>,
    manufacturer: Option<String>,
    model: Option<String>,
}

impl TokenUri {
    /// Whether a token with this label, serial number, manufacturer and model (padding removed) is meant.
    #[must_use]
    pub fn matches(&self, label: &str, serial: &str, manufacturer: &str, model: &str) -> bool {
        let fits = |wanted: &Option<String>, is: &str| wanted.as_deref().is_none_or(|wanted| wanted == is);
        fits(&self.token, label)
            && fits(&self.serial, serial)
            && fits(&self.manufacturer, manufacturer)
            && fits(&self.model, model)
    }
}

impl FromStr for TokenUri {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let path = text.strip_prefix("pkcs11:").ok_or("it does not begin with `pkcs11:`")?;
        if path.contains('?') {
            return Err("it has a query part: a PIN comes from pin-file, a module from module".into());
        }
        let mut uri = Self::default();
        for part in path.split(';') {
            let (name, value) = part.split_once('=').ok_or_else(|| format!("`{part}` is not name=value"))?;
            let place = match name {
                "token" => &mut uri.token,
                "serial" => &mut uri.serial,
                "manufacturer" => &mut uri.manufacturer,
                "model" => &mut uri.model,
                _ => return Err(format!("`{name}` does not name a token; token, serial, manufacturer and model do")),
            };
            let value = percent_decode(value).ok_or_else(|| format!("`{part}` is not well percent-encoded UTF-8"))?;
            if place.replace(value).is_some() {
                return Err(format!("`{name}` stands twice"));
            }
        }
        Ok(uri)
    }
}

impl fmt::Display for TokenUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts = [
            ("token", &self.token),
            ("serial", &self.serial),
            ("manufacturer", &self.manufacturer),
            ("model", &self.model),
        ];
        let said: Vec<String> = parts
            .iter()
            .filter_map(|(name, value)| Some(format!("{name}={}", percent_encode(value.as_deref()?))))
            .collect();
        write!(f, "pkcs11:{}", said.join(";"))
    }
}

fn percent_decode(text: &str) -> Option<String> {
    let mut bytes = text.bytes();
    let mut decoded = Vec::new();
    while let Some(byte) = bytes.next() {
        decoded.push(match byte {
            b'%' => {
                let digits = [bytes.next()?, bytes.next()?];
                let [byte] = base16ct::mixed::decode_vec(digits).ok()?.try_into().ok()?;
                byte
            }
            _ => byte,
        });
    }
    String::from_utf8(decoded).ok()
}

/// RFC 7512 section 2.3: what is neither unreserved nor allowed in a path attribute is encoded.
fn percent_encode(text: &str) -> String {
    text.bytes()
        .map(|byte| match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b':' | b'+' => {
                char::from(byte).to_string()
            }
            _ => format!("%{byte:02X}"),
        })
        .collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn uris_are_read_and_written() {
        for text in ["pkcs11:token=trousseau", "pkcs11:token=a%20b;serial=0a1b", "pkcs11:manufacturer=X;model=Y%3BZ"] {
            assert_eq!(text.parse::<TokenUri>().unwrap().to_string(), text);
        }
        let spaced: TokenUri = "pkcs11:token=a%20b;serial=0a1b".parse().unwrap();
        assert!(spaced.matches("a b", "0a1b", "any", "any"));
        assert!(!spaced.matches("a b", "0a1c", "any", "any"));
    }

    proptest! {
        #[test]
        fn whatever_a_token_is_called_its_uri_is_read_as_it_was_written(
            label in "\\PC{0,32}",
            serial in proptest::option::of("\\PC{0,16}"),
        ) {
            let uri = TokenUri { token: Some(label.clone()), serial: serial.clone(), ..TokenUri::default() };
            prop_assert_eq!(&uri.to_string().parse::<TokenUri>().unwrap(), &uri);
            prop_assert!(uri.matches(&label, serial.as_deref().unwrap_or("any"), "any", "any"));
            prop_assert!(!uri.matches(&(label + "x"), serial.as_deref().unwrap_or("any"), "any", "any"));
        }

        #[test]
        fn no_text_makes_the_reader_panic(text in "(pkcs11:)?\\PC{0,64}") {
            let _anything = text.parse::<TokenUri>();
        }
    }

    #[test]
    fn other_uris_are_refused_with_the_reason() {
        for (text, reason) in [
            ("token=x", "pkcs11:"),
            ("pkcs11:", "not name=value"),
            ("pkcs11:token", "not name=value"),
            ("pkcs11:token=a;token=b", "twice"),
            ("pkcs11:slot-id=3", "slot-id"),
            ("pkcs11:object=kek", "object"),
            ("pkcs11:token=x?pin-value=1234", "pin-file"),
            ("pkcs11:token=%4", "percent-encoded"),
            ("pkcs11:token=%ff", "percent-encoded"),
        ] {
            let error = text.parse::<TokenUri>().unwrap_err();
            assert!(error.contains(reason), "{text}: {error}");
        }
    }
}
