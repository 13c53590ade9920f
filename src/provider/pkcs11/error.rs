//! What a PKCS#11 return code means for us. [`class_of`] is the only place that decides by return code.

use cryptoki::error::{Error, RvError};

use crate::provider::KekError;

/// How a failed call is treated. Each class has one treatment, given where it is named in `pool` and `token`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Class {
    /// The ciphertext: an error to the caller, no retry, no effect on health.
    BadInput,
    /// Tokens say this of a damaged ciphertext and of a broken device alike. After an unwrap, the KEK's reference
    /// tells which (`lane`); after any other call it is [`Class::Token`].
    Doubtful,
    /// This session, or a handle found through it: replaced, and tried once more.
    Session,
    /// The login is gone: logged in again, and tried once more.
    Login,
    /// The token, its slot or its module: its connection is given up and made anew.
    Token,
    /// The PIN: never tried again by itself.
    Pin,
    /// The token will not do this for us, however often it is asked.
    Refused,
}

/// A PKCS#11 call that failed, or did not do what the standard says.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{what}")]
pub(super) struct CallError {
    pub(super) class: Class,
    what: String,
}

impl CallError {
    /// Something that no return code told. `what` is a sentence.
    pub(super) fn new(class: Class, what: impl Into<String>) -> Self {
        Self { class, what: what.into() }
    }

    /// The same failure, its class settled by what else is known.
    pub(super) fn settled(self, class: Class) -> Self {
        Self { class, ..self }
    }

    /// What a caller of the token `token` is told.
    pub(super) fn to_kek_error(&self, token: &str) -> KekError {
        match self.class {
            Class::BadInput => KekError::BadInput,
            Class::Refused => KekError::Refused(format!("{token}: {self}")),
            _ => KekError::Unavailable(format!("{token}: {self}")),
        }
    }
}

impl From<Error> for CallError {
    fn from(error: Error) -> Self {
        match error {
            Error::Pkcs11(code, function) => {
                Self::new(class_of(&code), format!("C_{function:?} answered {}", name_of(&code)))
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

/// Every return code's class (PKCS#11 v3.1 section 5.1, and 2.40's).
fn class_of(code: &RvError) -> Class {
    use RvError as Rv;
    match code {
        Rv::EncryptedDataInvalid
        | Rv::EncryptedDataLenRange
        | Rv::WrappedKeyInvalid
        | Rv::WrappedKeyLenRange
        | Rv::SignatureInvalid
        | Rv::SignatureLenRange => Class::BadInput,

        Rv::GeneralError
        | Rv::FunctionFailed
        | Rv::DeviceError
        | Rv::DataInvalid
        | Rv::DataLenRange
        | Rv::KeySizeRange
        | Rv::ArgumentsBad
        | Rv::UnknownErrorCode(_)
        | Rv::VendorDefined(_) => Class::Doubtful,

        Rv::SessionClosed
        | Rv::SessionHandleInvalid
        | Rv::SessionCount
        | Rv::SessionReadOnly
        | Rv::SessionExists
        | Rv::SessionReadOnlyExists
        | Rv::SessionParallelNotSupported
        | Rv::OperationActive
        | Rv::OperationNotInitialized
        | Rv::KeyHandleInvalid
        | Rv::ObjectHandleInvalid
        | Rv::WrappingKeyHandleInvalid
        | Rv::UnwrappingKeyHandleInvalid
        | Rv::KeyChanged
        | Rv::FunctionCanceled
        | Rv::Cancel
        | Rv::SavedStateInvalid => Class::Session,

        Rv::UserNotLoggedIn => Class::Login,

        Rv::HostMemory
        | Rv::SlotIdInvalid
        | Rv::DeviceMemory
        | Rv::DeviceRemoved
        | Rv::TokenNotPresent
        | Rv::TokenNotRecognized
        | Rv::CryptokiNotInitialized
        | Rv::CryptokiAlreadyInitialized
        | Rv::MutexBad
        | Rv::MutexNotLocked
        | Rv::FipsSelfTestFailed
        | Rv::LibraryLoadFailed
        | Rv::RandomNoRng
        | Rv::NoEvent
        | Rv::UserPinNotInitialized => Class::Token,

        Rv::PinIncorrect | Rv::PinInvalid | Rv::PinLenRange | Rv::PinExpired | Rv::PinLocked | Rv::PinTooWeak => {
            Class::Pin
        }

        Rv::AttributeReadOnly
        | Rv::AttributeSensitive
        | Rv::AttributeTypeInvalid
        | Rv::AttributeValueInvalid
        | Rv::ActionProhibited
        | Rv::FunctionNotParallel
        | Rv::FunctionNotSupported
        | Rv::FunctionRejected
        | Rv::CurveNotSupported
        | Rv::KeyTypeInconsistent
        | Rv::KeyNotNeeded
        | Rv::KeyNeeded
        | Rv::KeyIndigestible
        | Rv::KeyFunctionNotPermitted
        | Rv::KeyNotWrappable
        | Rv::KeyUnextractable
        | Rv::MechanismInvalid
        | Rv::MechanismParamInvalid
        | Rv::TemplateIncomplete
        | Rv::TemplateInconsistent
        | Rv::TokenWriteProtected
        | Rv::UnwrappingKeySizeRange
        | Rv::UnwrappingKeyTypeInconsistent
        | Rv::UserAlreadyLoggedIn
        | Rv::UserTypeInvalid
        | Rv::UserAnotherAlreadyLoggedIn
        | Rv::UserTooManyTypes
        | Rv::WrappingKeySizeRange
        | Rv::WrappingKeyTypeInconsistent
        | Rv::RandomSeedNotSupported
        | Rv::DomainParamsInvalid
        | Rv::BufferTooSmall
        | Rv::InformationSensitive
        | Rv::StateUnsaveable
        | Rv::NeedToCreateThreads
        | Rv::CantLock
        | Rv::NewPinMode
        | Rv::NextOtp
        | Rv::ExceededMaxIterations
        | Rv::PublicKeyInvalid
        | Rv::SessionReadWriteSoExists => Class::Refused,
    }
}

/// The code as the standard writes it.
fn name_of(code: &RvError) -> String {
    match code {
        RvError::VendorDefined(value) | RvError::UnknownErrorCode(value) => format!("the code {value:#x}"),
        known => {
            let mut name = String::from("CKR");
            for letter in format!("{known:?}").chars() {
                if letter.is_ascii_uppercase() {
                    name.push('_');
                }
                name.push(letter.to_ascii_uppercase());
            }
            name
        }
    }
}
