//! Faults of a token, and what a request sees of each: the table that `faults` plays.

use std::time::Duration;

use tonic::Code;

/// It is looked for four times a second. On a machine whose cores were wanted six times over, 0.9 s were the most.
const SOON: Duration = Duration::from_secs(2);
/// A login that failed several times is tried again after a second.
const AFTER_A_LOGIN: Duration = Duration::from_secs(3);

/// What a request sees while the rules are on.
#[derive(Clone, Copy)]
pub enum Sees {
    Nothing,
    Error(Code),
}
use Sees::{Error, Nothing};

pub struct Scenario {
    pub name: &'static str,
    pub mode: &'static str,
    /// `{}` is what the request does with the token: `Encrypt` or `Decrypt`, `Wrap` or `Unwrap`.
    pub rules: &'static str,
    pub encrypt: Sees,
    pub decrypt: Sees,
    /// From the end of the rules to the next request that succeeds, on a busy machine.
    pub heals_within: Duration,
}

pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "a session is lost",
        mode: "gcm",
        rules: "C_{}Init return CKR_SESSION_HANDLE_INVALID times 1",
        encrypt: Nothing,
        decrypt: Nothing,
        heals_within: SOON,
    },
    Scenario {
        name: "all sessions are lost, and the login with them",
        mode: "gcm",
        rules: "C_{}Init lose-sessions times 1",
        encrypt: Nothing,
        decrypt: Nothing,
        heals_within: SOON,
    },
    Scenario {
        name: "the login is lost",
        mode: "gcm",
        rules: "C_{}Init return CKR_USER_NOT_LOGGED_IN times 1",
        encrypt: Nothing,
        decrypt: Nothing,
        heals_within: SOON,
    },
    Scenario {
        name: "a login takes its time",
        mode: "gcm",
        rules: "C_Login delay 800ms
                C_{}Init return CKR_USER_NOT_LOGGED_IN times 1",
        encrypt: Nothing,
        decrypt: Nothing,
        heals_within: SOON,
    },
    Scenario {
        name: "the login fails for something that passes",
        mode: "gcm",
        rules: "C_Login return CKR_TOKEN_NOT_PRESENT times 3
                C_{}Init return CKR_DEVICE_REMOVED times 1",
        encrypt: Error(Code::Unavailable),
        decrypt: Nothing, // the call is made again after the KEK has proved well
        heals_within: AFTER_A_LOGIN,
    },
    Scenario {
        name: "the token is removed",
        mode: "gcm",
        rules: "C_{} return CKR_DEVICE_REMOVED",
        encrypt: Error(Code::Unavailable),
        decrypt: Error(Code::Unavailable),
        heals_within: SOON,
    },
    Scenario {
        name: "the token is removed, wrapkey",
        mode: "wrapkey",
        rules: "C_{}Key return CKR_DEVICE_REMOVED",
        encrypt: Error(Code::Unavailable),
        decrypt: Error(Code::Unavailable),
        heals_within: SOON,
    },
    Scenario {
        name: "the device fails",
        mode: "gcm",
        rules: "* return CKR_DEVICE_ERROR",
        encrypt: Error(Code::Unavailable),
        decrypt: Error(Code::Unavailable),
        heals_within: SOON,
    },
    Scenario {
        name: "everything is a general error",
        mode: "gcm",
        rules: "* return CKR_GENERAL_ERROR",
        encrypt: Error(Code::Unavailable),
        decrypt: Error(Code::Unavailable),
        heals_within: SOON,
    },
    Scenario {
        name: "a code of the vendor's, once",
        mode: "gcm",
        rules: "C_{} return 0x80000201 times 1",
        encrypt: Nothing,
        decrypt: Nothing,
        heals_within: SOON,
    },
    Scenario {
        name: "what the token cannot do, it says once",
        mode: "gcm",
        rules: "C_{}Init return CKR_MECHANISM_INVALID times 1",
        encrypt: Error(Code::Unavailable),
        decrypt: Nothing,
        heals_within: SOON,
    },
    Scenario {
        name: "the KEK does not answer well while it is found again",
        mode: "gcm",
        rules: "C_{}Init return CKR_SESSION_HANDLE_INVALID times 1
                C_Decrypt return CKR_DEVICE_ERROR times 1",
        encrypt: Nothing,
        decrypt: Nothing,
        heals_within: SOON,
    },
    Scenario {
        name: "the token calls the KEK's own values damaged",
        mode: "gcm",
        rules: "C_{}Init return CKR_SESSION_HANDLE_INVALID times 1
                C_Decrypt return CKR_ENCRYPTED_DATA_INVALID times 3",
        encrypt: Nothing,
        decrypt: Nothing,
        heals_within: SOON,
    },
    Scenario {
        name: "the token has one session for us and one for the login",
        mode: "gcm",
        rules: "C_{}Init return CKR_SESSION_CLOSED times 1
                C_OpenSession limit 2",
        encrypt: Nothing,
        decrypt: Nothing,
        heals_within: SOON,
    },
    Scenario {
        name: "the library takes its time to come back",
        mode: "gcm",
        rules: "C_{}Init return CKR_DEVICE_REMOVED times 1
                C_Initialize return CKR_GENERAL_ERROR times 1",
        encrypt: Error(Code::Unavailable),
        decrypt: Nothing, // the call is made again after the KEK has proved well
        heals_within: SOON,
    },
    Scenario {
        name: "the token is removed by turns",
        mode: "gcm",
        // In the middle of a Decrypt the KEK opens its reference: two calls, the first for the length.
        rules: "C_Decrypt return CKR_DEVICE_REMOVED times 1
                C_Decrypt return CKR_DEVICE_REMOVED after 2 times 1",
        // What is wrapped is opened too: once, and once more after the token came back.
        encrypt: Error(Code::Unavailable),
        decrypt: Error(Code::Unavailable),
        heals_within: SOON,
    },
    Scenario {
        name: "answers are longer than they should be",
        mode: "gcm",
        rules: "C_{} pad 12",
        encrypt: Error(Code::Unavailable),
        decrypt: Error(Code::Unavailable),
        heals_within: SOON,
    },
    Scenario {
        name: "answers are cut, wrapkey",
        mode: "wrapkey",
        rules: "C_WrapKey truncate 8",
        encrypt: Error(Code::Unavailable),
        decrypt: Nothing,
        heals_within: SOON,
    },
    Scenario {
        name: "calls hang",
        mode: "gcm",
        rules: "C_{} hang",
        encrypt: Error(Code::DeadlineExceeded),
        decrypt: Error(Code::DeadlineExceeded),
        heals_within: SOON,
    },
    Scenario {
        name: "no slot is left",
        mode: "gcm",
        rules: "C_GetSlotList empty
                C_{}Init return CKR_TOKEN_NOT_PRESENT",
        encrypt: Error(Code::Unavailable),
        decrypt: Error(Code::Unavailable),
        heals_within: SOON,
    },
    Scenario {
        name: "a bit of an unwrapped DEK flips",
        mode: "gcm",
        rules: "C_Decrypt flip times 1",
        encrypt: Nothing,
        decrypt: Nothing,
        heals_within: SOON,
    },
    Scenario {
        name: "a bit of a wrapped DEK flips",
        mode: "gcm",
        rules: "C_Encrypt flip times 1",
        encrypt: Nothing,
        decrypt: Nothing,
        heals_within: SOON,
    },
    Scenario {
        name: "a bit of a wrapped DEK flips, wrapkey",
        mode: "wrapkey",
        rules: "C_WrapKey flip times 1",
        encrypt: Nothing,
        decrypt: Nothing,
        heals_within: SOON,
    },
    Scenario {
        name: "every wrapped DEK is damaged",
        mode: "gcm",
        rules: "C_Encrypt flip",
        encrypt: Error(Code::Unavailable),
        decrypt: Nothing,
        heals_within: SOON,
    },
];
