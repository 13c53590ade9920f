//! A PKCS#11 call that failed. What its return code means is in one table, [`Codes`]; each class has one treatment,
//! most of them in [`super::pool`].

use cryptoki::error::{Error, Rv, RvError};

pub(super) use crate::config::Class;
use crate::config::{Code, Codes};
use crate::provider::KekError;

/// A PKCS#11 call that failed, or did not do what the standard says.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{what}")]
pub(super) struct CallError {
    cause: Cause,
    what: String,
}

#[derive(Clone, Copy, Debug)]
enum Cause {
    /// The module answered so. What that means depends on the token.
    Code(Code),
    Known(Class),
    /// Refused, as is whatever a token says of one value while the KEK opens another.
    OfOneValue,
}

impl CallError {
    /// Something that no return code told. `what` is a sentence.
    pub(super) fn new(class: Class, what: impl Into<String>) -> Self {
        Self { cause: Cause::Known(class), what: what.into() }
    }

    /// The same failure, its class settled by what else is known.
    pub(super) fn settled(self, class: Class) -> Self {
        Self { cause: Cause::Known(class), ..self }
    }

    /// The same failure, which tells of one value alone: the KEK has just proved itself.
    pub(super) fn of_one_value(self) -> Self {
        Self { cause: Cause::OfOneValue, ..self }
    }

    /// How it is treated, on tokens with these codes.
    pub(super) fn class(&self, codes: &Codes) -> Class {
        match self.cause {
            Cause::Code(code) => codes.class_of(code),
            Cause::Known(class) => class,
            Cause::OfOneValue => Class::Refused,
        }
    }

    /// What a caller of the token `token` is told.
    pub(super) fn to_kek_error(&self, class: Class, token: &str) -> KekError {
        match class {
            Class::BadInput => KekError::BadInput,
            Class::Refused if matches!(self.cause, Cause::OfOneValue) => {
                KekError::OfOneValue(format!("{token}: {self}"))
            }
            Class::Refused => KekError::Refused(format!("{token}: {self}")),
            _ => KekError::Unavailable(format!("{token}: {self}")),
        }
    }
}

impl From<Error> for CallError {
    fn from(error: Error) -> Self {
        match error {
            Error::Pkcs11(answer, function) => {
                let code = code_of(answer);
                Self { cause: Cause::Code(code), what: format!("C_{function:?} answered {code}") }
            }
            // A function that the module lacks, or an answer that is not what the standard says.
            other => Self::new(Class::Refused, format!("the module cannot be used: {other}")),
        }
    }
}

impl From<getrandom::Error> for CallError {
    fn from(error: getrandom::Error) -> Self {
        Self::new(Class::Refused, format!("getrandom(2) failed: {error}"))
    }
}

/// The number behind cryptoki's name for it.
fn code_of(answer: RvError) -> Code {
    match answer {
        RvError::VendorDefined(code) | RvError::UnknownErrorCode(code) => Code(code),
        named => {
            Code::named().find(|code| Rv::from(code.0) == Rv::Error(named)).unwrap_or(Code(std::ffi::c_ulong::MAX))
        } // none: the tests below go through all of them
    }
}

#[cfg(test)]
#[allow(clippy::panic)]
mod tests {
    use super::*;

    #[test]
    fn every_code_of_the_standard_and_of_vendors_comes_through_cryptoki_unchanged() {
        for code in (1..=0x300).chain(0x7fff_fff0..=0x8000_0300).chain([0xd955_4204]) {
            let Rv::Error(answer) = Rv::from(code) else { panic!("{code:#x} is no error") };
            assert_eq!(code_of(answer), Code(code), "{answer:?}");
        }
    }

    #[test]
    fn every_code_that_cryptoki_names_is_in_the_table_under_that_name() {
        for code in 1..=0x300 {
            let Rv::Error(answer) = Rv::from(code) else { panic!("{code:#x} is no error") };
            if !matches!(answer, RvError::UnknownErrorCode(_)) {
                let letters = |text: &str| text.replace('_', "").to_lowercase();
                assert_eq!(letters(&Code(code).to_string()), letters(&format!("CKR_{answer:?}")));
            }
        }
    }

    #[test]
    fn what_is_known_otherwise_does_not_depend_on_the_codes() {
        let codes: Codes = toml::from_str("CKR_DEVICE_ERROR = \"refused\"").unwrap_or_default();
        let error = CallError::from(Error::Pkcs11(RvError::DeviceError, cryptoki::context::Function::WrapKey));
        assert_eq!(error.to_string(), "C_WrapKey answered CKR_DEVICE_ERROR");
        assert_eq!([error.class(&codes), error.class(&Codes::default())], [Class::Refused, Class::Doubtful]);
        assert_eq!(error.settled(Class::Token).class(&codes), Class::Token);
    }
}
