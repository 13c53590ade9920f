//! How many requests there were, how they ended, and how long they took. Atomic, so that counting holds nobody up.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tonic::Code;

use crate::histogram::Histogram;

/// What was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// KMS v2.
    Status,
    /// KMS v2.
    Encrypt,
    /// KMS v2.
    Decrypt,
    /// KMS v1beta1.
    OldEncrypt,
    /// KMS v1beta1.
    OldDecrypt,
}

impl Call {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Status, Self::Encrypt, Self::Decrypt, Self::OldEncrypt, Self::OldDecrypt];

    /// The method's name in lower case.
    #[must_use]
    pub const fn method(self) -> &'static str {
        match self {
            Self::Status => "status",
            Self::Encrypt | Self::OldEncrypt => "encrypt",
            Self::Decrypt | Self::OldDecrypt => "decrypt",
        }
    }

    /// The version of the service.
    #[must_use]
    pub const fn version(self) -> &'static str {
        match self {
            Self::Status | Self::Encrypt | Self::Decrypt => "v2",
            Self::OldEncrypt | Self::OldDecrypt => "v1beta1",
        }
    }
}

/// Every gRPC code from OK (0) to UNAUTHENTICATED (16).
const CODES: usize = 17;

/// The counters of one process.
#[derive(Debug, Default)]
pub struct Counters([Counter; Call::ALL.len()]);

/// Of one call.
#[derive(Debug, Default)]
pub struct Counter {
    codes: [AtomicU64; CODES],
    /// How long they took.
    pub times: Histogram,
}

impl Counters {
    pub(super) fn count(&self, call: Call, code: Code, took: Duration) {
        let Some(counter) = self.of(call) else { return };
        if let Some(count) = counter.codes.get(code as usize) {
            count.fetch_add(1, Ordering::Relaxed);
        }
        counter.times.record(took);
    }

    /// What was counted of a call.
    #[must_use]
    pub fn of(&self, call: Call) -> Option<&Counter> {
        let Self(counters) = self;
        counters.get(call as usize)
    }
}

impl Counter {
    /// How many ended with each code that any ended with, OK among them.
    pub fn codes(&self) -> impl Iterator<Item = (Code, u64)> + '_ {
        let counts =
            self.codes.iter().zip(0..).map(|(count, code)| (Code::from_i32(code), count.load(Ordering::Relaxed)));
        counts.filter(|(code, count)| *count > 0 || *code == Code::Ok)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn each_request_is_counted_under_its_call_and_code() {
        let counters = Counters::default();
        for code in [Code::Ok, Code::Ok, Code::Unauthenticated] {
            counters.count(Call::Decrypt, code, Duration::ZERO);
        }
        let codes = |call| counters.of(call).unwrap().codes().collect::<Vec<_>>();
        assert_eq!(codes(Call::Decrypt), [(Code::Ok, 2), (Code::Unauthenticated, 1)]);
        assert_eq!(codes(Call::Encrypt), [(Code::Ok, 0)]);
    }
}
