//! The families of tokens on which the suite runs, and what each of them lacks: a test that does not apply to one asks
//! here, and is skipped.

use std::env;
use std::path::PathBuf;

/// Which token family the suite runs on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Family {
    SoftHsm,
    Kryoptic,
    OpenCryptoki,
    Tpm2,
}

impl Family {
    pub fn chosen() -> Self {
        match env::var("TROUSSEAU_TEST_TOKEN").as_deref() {
            Ok("kryoptic") => Self::Kryoptic,
            Ok("opencryptoki") => Self::OpenCryptoki,
            Ok("tpm2") => Self::Tpm2,
            Ok("softhsm") | Err(_) => Self::SoftHsm,
            Ok(other) => panic!("TROUSSEAU_TEST_TOKEN={other}: softhsm, kryoptic, opencryptoki or tpm2"),
        }
    }

    pub fn profile(self) -> &'static str {
        match self {
            Self::SoftHsm => "softhsm",
            Self::Kryoptic => "kryoptic",
            Self::OpenCryptoki => "opencryptoki",
            Self::Tpm2 => "tpm2",
        }
    }

    /// The modes of its profile.
    pub fn modes(self) -> &'static [&'static str] {
        match self {
            Self::SoftHsm => &["wrapkey", "wrapkey-kwp", "gcm"],
            Self::Kryoptic => &["encrypt", "encrypt-kwp", "wrapkey", "wrapkey-kwp", "gcm"],
            Self::OpenCryptoki | Self::Tpm2 => &["oaep"],
        }
    }

    /// Whether its KEKs are not AES keys. It says so: for tests that make such a key, or damage one, themselves.
    pub fn lacks_aes(self) -> bool {
        skips(self.modes() == ["oaep"], "its KEKs are not AES keys")
    }

    /// Whether the module shows only what it found when it was initialized. It says so.
    pub fn sees_no_new_keys(self) -> bool {
        skips(self == Self::Tpm2, "it sees what another process made only when it is initialized again")
    }

    /// Whether two of its tokens are too many for one process. It says so.
    pub fn stands_one_token_alone(self) -> bool {
        let why = match self {
            Self::SoftHsm | Self::Kryoptic => None,
            Self::OpenCryptoki => Some("with two tokens in one process, 3.8.1 crashes now and then"),
            Self::Tpm2 => Some("two tokens of one TPM are no replicas"),
        };
        skips(why.is_some(), why.unwrap_or_default())
    }

    /// Whether no process may be killed while it connects to it. It says so.
    pub fn stands_no_kills(self) -> bool {
        skips(self == Self::OpenCryptoki, "its daemon ends now and then when a process that connects to it is killed")
    }

    /// Whether it is too slow for a test that needs so many operations a second. It says so.
    pub fn is_slower_than(self, needed: u32) -> bool {
        let makes = match self {
            Self::SoftHsm | Self::Kryoptic => u32::MAX,
            Self::OpenCryptoki => 100,
            Self::Tpm2 => 20,
        };
        skips(makes < needed, &format!("it makes some {makes} operations a second, and this needs {needed}"))
    }

    /// Whether it does not tell that wrong PINs were tried. It says so.
    pub fn shows_no_wrong_pins(self) -> bool {
        skips(self == Self::Tpm2, "it does not tell that wrong PINs were tried")
    }

    /// Whether its library must not be initialized again, so that a token that was lost ends the process. It says so.
    pub fn ends_with_its_token(self) -> bool {
        skips(self == Self::OpenCryptoki, "it must not be initialized again: a token that was lost ends the process")
    }

    /// Who makes the IV of AES-GCM, in the words of a profile, where the module that makes faults dresses the token so.
    pub fn gcm_iv(self) -> Option<String> {
        env::var("TROUSSEAU_TEST_GCM_IV").ok()
    }

    /// Whether it is dressed so already. It says so: for tests that dress it themselves.
    pub fn is_dressed(self) -> bool {
        skips(self.gcm_iv().is_some(), "TROUSSEAU_TEST_GCM_IV dresses it already")
    }

    /// Whether one session is not enough for it. It says so.
    pub fn needs_two_sessions(self) -> bool {
        skips(self.gcm_iv().is_some(), "that the IVs which it makes differ is seen in a second session")
    }

    /// What the plugin loads.
    pub fn module(self) -> PathBuf {
        let dress =
            || env::var_os("TROUSSEAU_FAULT_LIB").expect("TROUSSEAU_TEST_GCM_IV needs TROUSSEAU_FAULT_LIB").into();
        self.gcm_iv().map_or_else(|| self.own_module(), |_| dress())
    }

    /// The token's own, without its dress.
    pub fn own_module(self) -> PathBuf {
        match self {
            Self::SoftHsm => "/usr/lib/softhsm/libsofthsm2.so".into(),
            Self::Kryoptic => env::var_os("TROUSSEAU_KRYOPTIC_MODULE")
                .expect("TROUSSEAU_KRYOPTIC_MODULE: what tests/tokens/build.sh kryoptic prints")
                .into(),
            Self::OpenCryptoki => "/usr/lib/x86_64-linux-gnu/pkcs11/libopencryptoki.so".into(),
            Self::Tpm2 => "/usr/lib/x86_64-linux-gnu/libtpm2_pkcs11.so.1".into(),
        }
    }
}

/// Whether a test does not apply; then it says why.
fn skips(is_so: bool, why: &str) -> bool {
    if is_so {
        eprintln!("skipped: {:?}: {why}", Family::chosen());
    }
    is_so
}
