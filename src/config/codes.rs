//! What each PKCS#11 return code means, and what is done about it: one table, which a profile changes where its tokens
//! say one thing and mean another. Data; the code that acts on it is in `provider::pkcs11`.

use std::collections::BTreeMap;
use std::ffi::c_ulong;
use std::fmt;
use std::str::FromStr;

use serde::de::{DeserializeSeed, Error, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// How a failed call is treated. Each class has one treatment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Class {
    /// The ciphertext: an error to the caller, no retry, no effect on health.
    BadInput,
    /// Tokens say this of a damaged ciphertext and of a broken device alike. After an unwrap, the KEK's reference
    /// tells which; after any other call it is [`Class::Token`].
    Doubtful,
    /// This session, or a handle found through it: replaced, and tried once more.
    Session,
    /// The login is gone: logged in again, and tried once more.
    Login,
    /// The token, its slot or its module: its connection is given up and made anew.
    Token,
    /// The PIN: never tried again by itself.
    Pin,
    /// The token will not do this for us, however often it is asked. After an unwrap, the KEK's reference tells
    /// whether it was the input that it refused.
    Refused,
    /// The module cannot be used in this process any more: the process ends, and its supervisor starts it anew.
    Fatal,
}

impl Class {
    /// The word for it in a profile.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::BadInput => "bad-input",
            Self::Doubtful => "doubtful",
            Self::Session => "session",
            Self::Login => "login",
            Self::Token => "token",
            Self::Pin => "pin",
            Self::Refused => "refused",
            Self::Fatal => "fatal",
        }
    }
}

/// A return code, CK_RV.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Code(pub c_ulong);

/// The codes that mean something else to a profile's tokens than to the standard.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Codes(BTreeMap<Code, Class>);

impl Codes {
    /// The code's class: the profile's, else the standard's.
    #[must_use]
    pub fn class_of(&self, code: Code) -> Class {
        self.0.get(&code).copied().unwrap_or_else(|| code.class())
    }
}

impl Code {
    /// Every code that the standard names.
    pub fn named() -> impl Iterator<Item = Self> {
        STANDARD.iter().map(|(code, ..)| Self(*code))
    }

    /// Its class by the standard. A code that the standard does not name says no more than that something failed.
    fn class(self) -> Class {
        self.entry().map_or(Class::Doubtful, |(.., class)| *class)
    }

    fn entry(self) -> Option<&'static Entry> {
        STANDARD.iter().find(|(code, ..)| *code == self.0)
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.entry() {
            Some((_, name, _)) => f.write_str(name),
            None => write!(f, "the code {:#x}", self.0),
        }
    }
}

/// By its name, or as a number with `0x`, which is how vendors write their own.
impl FromStr for Code {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some((code, ..)) = STANDARD.iter().find(|(_, name, _)| *name == text) {
            return Ok(Self(*code));
        }
        let number = text.strip_prefix("0x").and_then(|digits| c_ulong::from_str_radix(digits, 16).ok());
        match number {
            Some(0) => Err("0x0 is CKR_OK, which is no error".into()),
            Some(code) => Ok(Self(code)),
            None => {
                let distance = |name: &str| strsim::damerau_levenshtein(text, name);
                let nearest = STANDARD.iter().map(|(_, name, _)| *name).min_by_key(|name| distance(name));
                // In the words of serde, from which the nearest known name is read for every key.
                Err(format!(
                    "unknown return code `{text}`, expected one of `{}` or its number",
                    nearest.unwrap_or("0x")
                ))
            }
        }
    }
}

impl<'de> Deserialize<'de> for Code {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

impl Serialize for Code {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.entry() {
            Some((_, name, _)) => serializer.serialize_str(name),
            None => serializer.collect_str(&format_args!("{:#x}", self.0)),
        }
    }
}

impl<'de> Deserialize<'de> for Codes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Table;

        impl<'de> Visitor<'de> for Table {
            type Value = Codes;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a table of return codes and their classes")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Codes, A::Error> {
                let mut codes = BTreeMap::new();
                while let Some(code) = map.next_key::<Code>()? {
                    let class = map.next_value_seed(ClassOf(code))?;
                    if codes.insert(code, class).is_some() {
                        return Err(A::Error::custom(format!("{code} is there twice, by its name and by its number")));
                    }
                }
                Ok(Codes(codes))
            }
        }

        deserializer.deserialize_map(Table)
    }
}

/// The class that a profile gives a code, which it may have. An error here is told with its line.
struct ClassOf(Code);

impl<'de> DeserializeSeed<'de> for ClassOf {
    type Value = Class;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Class, D::Error> {
        let class = Class::deserialize(deserializer)?;
        // Any other class has the PIN tried again and again, until the token locks it.
        if self.0.class() == Class::Pin && class != Class::Pin {
            let (code, class) = (self.0, class.as_str());
            let what = format!("{code} blames the PIN, which must not be tried again: it cannot be of class `{class}`");
            return Err(D::Error::custom(what));
        }
        Ok(class)
    }
}

type Entry = (c_ulong, &'static str, Class);

/// Every return code of PKCS#11 2.40, 3.0, 3.1 and 3.2 (section 5.1 of each, and `pkcs11t.h`), with its class.
///
/// What can only be the answer to a function that is never called, such as C_SetOperationState, makes no sense as an
/// answer to ours, and is doubtful. So are all codes that are not here, the vendors' (0x80000000 and up) among them.
///
/// No profile changes those of the class `pin`. Three answers are settled where they are met, before any class is asked
/// for: CKR_CRYPTOKI_ALREADY_INITIALIZED to C_Initialize and CKR_CRYPTOKI_NOT_INITIALIZED to C_Finalize
/// (`provider::pkcs11::module`), and CKR_USER_ALREADY_LOGGED_IN to C_Login (`provider::pkcs11::login`).
#[rustfmt::skip]
const STANDARD: [Entry; 103] = [
    (0x001, "CKR_CANCEL", Class::Doubtful), // only from callbacks, of which there are none
    // Memory: closing a session frees its objects. To connect anew would free no more, and take the token from all.
    (0x002, "CKR_HOST_MEMORY", Class::Session),
    (0x003, "CKR_SLOT_ID_INVALID", Class::Token),
    (0x005, "CKR_GENERAL_ERROR", Class::Doubtful),
    (0x006, "CKR_FUNCTION_FAILED", Class::Doubtful),
    (0x007, "CKR_ARGUMENTS_BAD", Class::Doubtful),
    (0x008, "CKR_NO_EVENT", Class::Doubtful), // only C_WaitForSlotEvent
    (0x009, "CKR_NEED_TO_CREATE_THREADS", Class::Refused),
    (0x00A, "CKR_CANT_LOCK", Class::Refused),
    (0x010, "CKR_ATTRIBUTE_READ_ONLY", Class::Refused),
    (0x011, "CKR_ATTRIBUTE_SENSITIVE", Class::Refused),
    (0x012, "CKR_ATTRIBUTE_TYPE_INVALID", Class::Refused),
    (0x013, "CKR_ATTRIBUTE_VALUE_INVALID", Class::Refused),
    (0x01B, "CKR_ACTION_PROHIBITED", Class::Refused),
    (0x020, "CKR_DATA_INVALID", Class::Doubtful),
    (0x021, "CKR_DATA_LEN_RANGE", Class::Doubtful),
    (0x030, "CKR_DEVICE_ERROR", Class::Doubtful),
    (0x031, "CKR_DEVICE_MEMORY", Class::Session), // as CKR_HOST_MEMORY
    (0x032, "CKR_DEVICE_REMOVED", Class::Token),
    (0x040, "CKR_ENCRYPTED_DATA_INVALID", Class::BadInput),
    (0x041, "CKR_ENCRYPTED_DATA_LEN_RANGE", Class::BadInput),
    (0x042, "CKR_AEAD_DECRYPT_FAILED", Class::BadInput), // since 3.0
    (0x050, "CKR_FUNCTION_CANCELED", Class::Session),
    (0x051, "CKR_FUNCTION_NOT_PARALLEL", Class::Doubtful), // only C_GetFunctionStatus, C_CancelFunction
    (0x054, "CKR_FUNCTION_NOT_SUPPORTED", Class::Refused),
    (0x060, "CKR_KEY_HANDLE_INVALID", Class::Session),
    (0x062, "CKR_KEY_SIZE_RANGE", Class::Refused),
    (0x063, "CKR_KEY_TYPE_INCONSISTENT", Class::Refused),
    (0x064, "CKR_KEY_NOT_NEEDED", Class::Doubtful), // only C_SetOperationState
    (0x065, "CKR_KEY_CHANGED", Class::Doubtful),    // only C_SetOperationState
    (0x066, "CKR_KEY_NEEDED", Class::Doubtful),     // only C_SetOperationState
    (0x067, "CKR_KEY_INDIGESTIBLE", Class::Doubtful), // only C_DigestKey
    (0x068, "CKR_KEY_FUNCTION_NOT_PERMITTED", Class::Refused),
    (0x069, "CKR_KEY_NOT_WRAPPABLE", Class::Refused),
    (0x06A, "CKR_KEY_UNEXTRACTABLE", Class::Refused),
    (0x070, "CKR_MECHANISM_INVALID", Class::Refused),
    (0x071, "CKR_MECHANISM_PARAM_INVALID", Class::Refused),
    (0x082, "CKR_OBJECT_HANDLE_INVALID", Class::Session),
    (0x090, "CKR_OPERATION_ACTIVE", Class::Session),
    (0x091, "CKR_OPERATION_NOT_INITIALIZED", Class::Session),
    (0x0A0, "CKR_PIN_INCORRECT", Class::Pin),
    (0x0A1, "CKR_PIN_INVALID", Class::Pin),
    (0x0A2, "CKR_PIN_LEN_RANGE", Class::Pin),
    (0x0A3, "CKR_PIN_EXPIRED", Class::Pin),
    (0x0A4, "CKR_PIN_LOCKED", Class::Pin),
    (0x0B0, "CKR_SESSION_CLOSED", Class::Session),
    (0x0B1, "CKR_SESSION_COUNT", Class::Session),
    (0x0B3, "CKR_SESSION_HANDLE_INVALID", Class::Session),
    (0x0B4, "CKR_SESSION_PARALLEL_NOT_SUPPORTED", Class::Doubtful), // only to a deprecated C_OpenSession
    (0x0B5, "CKR_SESSION_READ_ONLY", Class::Session), // then it is not the one that was opened
    (0x0B6, "CKR_SESSION_EXISTS", Class::Refused),
    (0x0B7, "CKR_SESSION_READ_ONLY_EXISTS", Class::Refused),
    (0x0B8, "CKR_SESSION_READ_WRITE_SO_EXISTS", Class::Refused),
    (0x0C0, "CKR_SIGNATURE_INVALID", Class::BadInput),
    (0x0C1, "CKR_SIGNATURE_LEN_RANGE", Class::BadInput),
    (0x0D0, "CKR_TEMPLATE_INCOMPLETE", Class::Refused),
    (0x0D1, "CKR_TEMPLATE_INCONSISTENT", Class::Refused),
    (0x0E0, "CKR_TOKEN_NOT_PRESENT", Class::Token),
    (0x0E1, "CKR_TOKEN_NOT_RECOGNIZED", Class::Token),
    (0x0E2, "CKR_TOKEN_WRITE_PROTECTED", Class::Refused),
    (0x0F0, "CKR_UNWRAPPING_KEY_HANDLE_INVALID", Class::Session),
    (0x0F1, "CKR_UNWRAPPING_KEY_SIZE_RANGE", Class::Refused),
    (0x0F2, "CKR_UNWRAPPING_KEY_TYPE_INCONSISTENT", Class::Refused),
    (0x100, "CKR_USER_ALREADY_LOGGED_IN", Class::Refused), // to C_Login it is a success, which never comes here
    (0x101, "CKR_USER_NOT_LOGGED_IN", Class::Login),
    (0x102, "CKR_USER_PIN_NOT_INITIALIZED", Class::Token),
    (0x103, "CKR_USER_TYPE_INVALID", Class::Refused),
    // Somebody else is logged in, which passes. It says nothing of the PIN and uses up none of its tries.
    (0x104, "CKR_USER_ANOTHER_ALREADY_LOGGED_IN", Class::Token),
    (0x105, "CKR_USER_TOO_MANY_TYPES", Class::Token),
    (0x110, "CKR_WRAPPED_KEY_INVALID", Class::BadInput),
    (0x112, "CKR_WRAPPED_KEY_LEN_RANGE", Class::BadInput),
    (0x113, "CKR_WRAPPING_KEY_HANDLE_INVALID", Class::Session),
    (0x114, "CKR_WRAPPING_KEY_SIZE_RANGE", Class::Refused),
    (0x115, "CKR_WRAPPING_KEY_TYPE_INCONSISTENT", Class::Refused),
    (0x120, "CKR_RANDOM_SEED_NOT_SUPPORTED", Class::Doubtful), // only C_SeedRandom
    (0x121, "CKR_RANDOM_NO_RNG", Class::Refused),
    (0x130, "CKR_DOMAIN_PARAMS_INVALID", Class::Refused),
    (0x140, "CKR_CURVE_NOT_SUPPORTED", Class::Refused),
    (0x150, "CKR_BUFFER_TOO_SMALL", Class::Session), // the operation stays active (section 5.2)
    (0x160, "CKR_SAVED_STATE_INVALID", Class::Doubtful), // only C_SetOperationState
    (0x170, "CKR_INFORMATION_SENSITIVE", Class::Refused),
    (0x180, "CKR_STATE_UNSAVEABLE", Class::Doubtful), // only C_GetOperationState
    (0x190, "CKR_CRYPTOKI_NOT_INITIALIZED", Class::Token),
    (0x191, "CKR_CRYPTOKI_ALREADY_INITIALIZED", Class::Token),
    // Its locks are its own, since we give it none: they are broken, and C_Finalize could hang in them.
    (0x1A0, "CKR_MUTEX_BAD", Class::Fatal),
    (0x1A1, "CKR_MUTEX_NOT_LOCKED", Class::Fatal),
    (0x1B0, "CKR_NEW_PIN_MODE", Class::Pin),
    (0x1B1, "CKR_NEXT_OTP", Class::Pin),
    (0x1B5, "CKR_EXCEEDED_MAX_ITERATIONS", Class::Doubtful), // only where primes are sought
    (0x1B6, "CKR_FIPS_SELF_TEST_FAILED", Class::Token), // C_Initialize repeats it
    (0x1B7, "CKR_LIBRARY_LOAD_FAILED", Class::Token),
    (0x1B8, "CKR_PIN_TOO_WEAK", Class::Pin),
    (0x1B9, "CKR_PUBLIC_KEY_INVALID", Class::Refused),
    (0x200, "CKR_FUNCTION_REJECTED", Class::Refused),
    // Since 3.0.
    (0x201, "CKR_TOKEN_RESOURCE_EXCEEDED", Class::Session), // as CKR_HOST_MEMORY
    (0x202, "CKR_OPERATION_CANCEL_FAILED", Class::Session),
    (0x203, "CKR_KEY_EXHAUSTED", Class::Refused),
    // Since 3.2.
    (0x204, "CKR_PENDING", Class::Session), // an answer is still to come in this session
    (0x205, "CKR_SESSION_ASYNC_NOT_SUPPORTED", Class::Doubtful), // only to a session that is opened so
    (0x206, "CKR_SEED_RANDOM_REQUIRED", Class::Refused),
    (0x207, "CKR_OPERATION_NOT_VALIDATED", Class::Refused),
    (0x208, "CKR_TOKEN_NOT_INITIALIZED", Class::Token),
    (0x209, "CKR_PARAMETER_SET_NOT_SUPPORTED", Class::Refused),
];

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_in_order_and_every_code_is_read_back_from_its_name_and_number() {
        assert!(STANDARD.is_sorted_by(|one, next| one.0 < next.0));
        for (code, name, _) in STANDARD {
            let code = Code(code);
            assert_eq!(name.parse(), Ok(code));
            assert_eq!(format!("{:#x}", code.0).parse(), Ok(code));
            assert_eq!(code.to_string(), name);
        }
    }

    #[test]
    fn a_code_that_is_not_in_the_table_is_doubtful_and_shown_as_its_number() {
        for code in [0x4, 0x300, 0x8000_0000, 0x8000_0170, c_ulong::MAX] {
            assert_eq!(Codes::default().class_of(Code(code)), Class::Doubtful, "{code:#x}");
            assert_eq!(Code(code).to_string(), format!("the code {code:#x}"));
        }
    }

    #[test]
    fn a_profile_changes_the_codes_that_it_names_and_no_other() {
        let codes: Codes = toml::from_str("CKR_DEVICE_ERROR = \"token\"\n0x8000000A = \"login\"").unwrap();
        assert_eq!(codes.class_of(Code(0x30)), Class::Token);
        assert_eq!(codes.class_of(Code(0x8000_000A)), Class::Login);
        assert_eq!(codes.class_of(Code(0x31)), Class::Session);
        assert_eq!(codes.class_of(Code(0x8000_000B)), Class::Doubtful);
    }
}
