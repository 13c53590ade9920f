//! How many requests there were, how they ended, and how long they took. Atomic, so that counting holds nobody up.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tonic::Code;

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

/// Upper bounds of the histogram, in microseconds; more are counted with all.
pub const BOUNDS_MICROS: [u64; 15] = [
    100, 250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000, 1_000_000, 2_500_000,
    5_000_000,
];

/// Every gRPC code from OK (0) to UNAUTHENTICATED (16).
const CODES: usize = 17;

/// The counters of one process.
#[derive(Debug, Default)]
pub struct Counters([Counter; Call::ALL.len()]);

/// Of one call.
#[derive(Debug, Default)]
pub struct Counter {
    codes: [AtomicU64; CODES],
    /// How many took at most so long, and no less than the bound before.
    buckets: [AtomicU64; BOUNDS_MICROS.len()],
    micros: AtomicU64,
}

impl Counters {
    pub(super) fn count(&self, call: Call, code: Code, took: Duration) {
        let Some(counter) = self.of(call) else { return };
        let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        if let Some(count) = counter.codes.get(code as usize) {
            count.fetch_add(1, Ordering::Relaxed);
        }
        if let Some(bucket) = counter.buckets.get(BOUNDS_MICROS.partition_point(|bound| *bound < micros)) {
            bucket.fetch_add(1, Ordering::Relaxed);
        }
        counter.micros.fetch_add(micros, Ordering::Relaxed);
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

    /// How many took at most as long as each bound: not fewer than at the bound before.
    pub fn at_most(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        BOUNDS_MICROS.iter().zip(&self.buckets).scan(0, |sum, (bound, bucket)| {
            *sum += bucket.load(Ordering::Relaxed);
            Some((*bound, *sum))
        })
    }

    /// How long all of them took together, in microseconds.
    pub fn micros(&self) -> u64 {
        self.micros.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
mod tests {
    use super::*;

    #[test]
    fn each_request_is_counted_once_wherever_it_falls() {
        let counters = Counters::default();
        for micros in [0, 100, 101, 4_000_000, 5_000_001, 60_000_000] {
            counters.count(Call::Decrypt, Code::Ok, Duration::from_micros(micros));
        }
        counters.count(Call::Decrypt, Code::Unauthenticated, Duration::ZERO);
        let counter = counters.of(Call::Decrypt).unwrap();
        assert_eq!(counter.codes().collect::<Vec<_>>(), [(Code::Ok, 6), (Code::Unauthenticated, 1)]);
        let at_most: Vec<_> = counter.at_most().collect();
        assert_eq!(
            (at_most[0], at_most[1], at_most[13], at_most[14]),
            ((100, 3), (250, 4), (2_500_000, 4), (5_000_000, 5))
        );
        assert_eq!(counter.micros(), 69_000_202);
        assert_eq!(counters.of(Call::Encrypt).unwrap().codes().collect::<Vec<_>>(), [(Code::Ok, 0)]);
    }
}
