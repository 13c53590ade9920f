//! How a KEK wraps a DEK inside a token, and in what its tokens may deviate.

use std::ffi::c_ulong;

use serde::{Deserialize, Serialize};

use crate::envelope::WrapAlgorithm;

/// How a KEK wraps a DEK inside a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// C_WrapKey with AES-KW, on a session object that holds the DEK.
    Wrapkey,
    /// C_WrapKey with AES-KWP, on a session object that holds the DEK.
    WrapkeyKwp,
    /// C_Encrypt with AES-KW over the DEK's bytes.
    Encrypt,
    /// C_Encrypt with AES-KWP over the DEK's bytes.
    EncryptKwp,
    /// C_Encrypt with AES-GCM over the DEK's bytes.
    Gcm,
    /// RSA-OAEP with the public key, and a signature by a second RSA key of the token; C_Decrypt with RSA-OAEP.
    Oaep,
}

impl Mode {
    /// What the mode makes: for `oaep` that of the larger keys.
    #[must_use]
    pub const fn algorithm(self) -> WrapAlgorithm {
        match self {
            Self::Wrapkey | Self::Encrypt => WrapAlgorithm::AesKw,
            Self::WrapkeyKwp | Self::EncryptKwp => WrapAlgorithm::AesKwp,
            Self::Gcm => WrapAlgorithm::AesGcm,
            Self::Oaep => WrapAlgorithm::RsaOaep3072,
        }
    }

    /// Whether the KEK needs CKA_WRAP and CKA_UNWRAP; otherwise it needs CKA_ENCRYPT and CKA_DECRYPT.
    #[must_use]
    pub const fn wraps_objects(self) -> bool {
        matches!(self, Self::Wrapkey | Self::WrapkeyKwp)
    }

    /// The code of its mechanism in the standard: CKM_AES_KEY_WRAP, CKM_AES_KEY_WRAP_KWP (both PKCS#11 v3.1 section
    /// 6.14), CKM_AES_GCM (section 6.13), CKM_RSA_PKCS_OAEP (section 6.1).
    pub(super) const fn standard_mechanism(self) -> c_ulong {
        match self {
            Self::Wrapkey | Self::Encrypt => 0x2109,
            Self::WrapkeyKwp | Self::EncryptKwp => 0x210b,
            Self::Gcm => 0x1087,
            Self::Oaep => 0x0009,
        }
    }

    /// The word for it in profiles and tables.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Wrapkey => "wrapkey",
            Self::WrapkeyKwp => "wrapkey-kwp",
            Self::Encrypt => "encrypt",
            Self::EncryptKwp => "encrypt-kwp",
            Self::Gcm => "gcm",
            Self::Oaep => "oaep",
        }
    }
}

/// Who makes the IV of AES-GCM, and where it is. The IV has 12 bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum GcmIv {
    /// We do.
    #[default]
    Ours,
    /// The token does, and writes it over the zeros that we give in its place.
    Written,
    /// The token does, and puts it before the ciphertext, where it looks for it when it decrypts.
    Prepended,
    /// The token does, and puts it after ciphertext and tag. It wants to be given it when it decrypts.
    Appended,
}

/// An attribute that some tokens do not let anybody set on a key that they make.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize, Serialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
#[expect(missing_docs, reason = "the standard's names")]
pub enum Omissible {
    CkaPrivate,
    CkaSensitive,
    CkaModifiable,
    CkaCopyable,
    CkaEncrypt,
    CkaDecrypt,
    CkaWrap,
    CkaUnwrap,
    CkaSign,
    CkaVerify,
    CkaDerive,
    CkaAllowedMechanisms,
}

/// What some tokens cannot say of a key's history.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize, Serialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
#[expect(missing_docs, reason = "the standard's names")]
pub enum Excusable {
    CkaAlwaysSensitive,
    CkaNeverExtractable,
    CkaLocal,
}
