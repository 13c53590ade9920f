//! How long things took, counted by bounds. Atomic, so that counting holds nobody up.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Upper bounds in microseconds; what took longer is counted with all.
pub const BOUNDS_MICROS: [u64; 15] = [
    100, 250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000, 1_000_000, 2_500_000,
    5_000_000,
];

/// Of one thing.
#[derive(Debug, Default)]
pub struct Histogram {
    /// How many took at most so long, and longer than the bound before.
    buckets: [AtomicU64; BOUNDS_MICROS.len()],
    count: AtomicU64,
    micros: AtomicU64,
}

impl Histogram {
    /// Counts one.
    pub fn record(&self, took: Duration) {
        let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        if let Some(bucket) = self.buckets.get(BOUNDS_MICROS.partition_point(|bound| *bound < micros)) {
            bucket.fetch_add(1, Ordering::Relaxed);
        }
        self.count.fetch_add(1, Ordering::Relaxed);
        self.micros.fetch_add(micros, Ordering::Relaxed);
    }

    /// How many took at most as long as each bound.
    pub fn at_most(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        BOUNDS_MICROS.iter().zip(&self.buckets).scan(0, |sum, (bound, bucket)| {
            *sum += bucket.load(Ordering::Relaxed);
            Some((*bound, *sum))
        })
    }

    /// How many there were.
    pub fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }

    /// How long all of them took together, in microseconds.
    pub fn micros(&self) -> u64 {
        self.micros.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
#[allow(clippy::indexing_slicing)]
mod tests {
    use super::*;

    #[test]
    fn each_is_counted_once_wherever_it_falls() {
        let histogram = Histogram::default();
        for micros in [0, 100, 101, 4_000_000, 5_000_001, 60_000_000] {
            histogram.record(Duration::from_micros(micros));
        }
        let at_most: Vec<_> = histogram.at_most().collect();
        let expected = [(100, 2), (250, 3), (2_500_000, 3), (5_000_000, 4)];
        assert_eq!([at_most[0], at_most[1], at_most[13], at_most[14]], expected);
        assert_eq!((histogram.count(), histogram.micros()), (6, 69_000_202));
    }
}
