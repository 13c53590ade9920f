//! What is told of many operations: how many there were, how long they took, what they cost.

use std::time::Duration;

use serde::Serialize;

/// How long the longest bar is.
const BAR: usize = 40;

#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Figures {
    pub(super) operations: usize,
    pub(super) per_second: f64,
    pub(super) mean_micros: f64,
    pub(super) p50_micros: u64,
    pub(super) p99_micros: u64,
    pub(super) p999_micros: u64,
    /// CPU of the process that makes the calls, for each operation.
    pub(super) cpu_micros: Option<f64>,
    histogram: Vec<Bucket>,
}

/// Operations that took longer than the bucket before says, and not longer than this one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Bucket {
    up_to_micros: u64,
    operations: usize,
}

impl Figures {
    pub(super) const HEADER: [&str; 5] = ["PER SECOND", "P50 µs", "P99 µs", "P99.9 µs", "CPU µs"];

    pub(super) fn new(mut took: Vec<Duration>, per_second: f64, cpu: Option<Duration>) -> Self {
        took.sort_unstable();
        let operations = took.len();
        // The nearest rank: the least that so many in a thousand do not exceed.
        let percentile = |of: usize| took.get((operations * of).div_ceil(1000).saturating_sub(1));
        let micros = |of: usize| percentile(of).map(micros).unwrap_or_default();
        let each = |time: Duration| time.as_secs_f64() * 1e6 / operations.max(1) as f64;
        Self {
            operations,
            per_second,
            mean_micros: each(took.iter().sum()),
            p50_micros: micros(500),
            p99_micros: micros(990),
            p999_micros: micros(999),
            cpu_micros: cpu.map(each),
            histogram: histogram(&took),
        }
    }

    /// What stands below [`Figures::HEADER`].
    pub(super) fn row(&self) -> [String; 5] {
        [
            format!("{:.0}", self.per_second),
            self.p50_micros.to_string(),
            self.p99_micros.to_string(),
            self.p999_micros.to_string(),
            self.cpu_micros.map_or("?".into(), |cpu| format!("{cpu:.1}")),
        ]
    }

    /// A line with a bar for each bucket.
    pub(super) fn bars(&self) -> String {
        let most = self.histogram.iter().map(|bucket| bucket.operations).max().unwrap_or(1);
        let bar = |Bucket { up_to_micros, operations }: &Bucket| {
            // What is there is seen, however little it is.
            let bar = "█".repeat((operations * BAR).div_ceil(most));
            format!("\n  {:>6} {bar:<BAR$} {operations}", time(*up_to_micros as f64))
        };
        self.histogram.iter().map(bar).collect()
    }
}

fn micros(time: &Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// The bounds of the histogram, 1-2-5, from 1 µs to 50 s.
fn bounds() -> impl Iterator<Item = u64> {
    (0..8).flat_map(|decade| [1, 2, 5].map(|step| step * 10_u64.pow(decade)))
}

/// Of times in ascending order: the buckets from the first to the last that has any.
fn histogram(took: &[Duration]) -> Vec<Bucket> {
    let mut buckets = Vec::new();
    let mut below = 0;
    for bound in bounds() {
        let up_to = took.partition_point(|time| *time <= Duration::from_micros(bound));
        if up_to > 0 && below < took.len() {
            buckets.push(Bucket { up_to_micros: bound, operations: up_to - below });
        }
        below = up_to;
    }
    buckets
}

/// A time in the unit that fits it.
pub(super) fn time(micros: f64) -> String {
    let (value, unit) = match micros {
        ..1e3 => (micros, "µs"),
        ..1e6 => (micros / 1e3, "ms"),
        _ => (micros / 1e6, "s"),
    };
    // Two digits are enough to decide by.
    if value < 9.95 && value.fract() != 0.0 { format!("{value:.1} {unit}") } else { format!("{value:.0} {unit}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_histogram_begins_and_ends_with_what_is_there() {
        let buckets = |micros: &[u64]| -> Vec<(u64, usize)> {
            let took: Vec<_> = micros.iter().copied().map(Duration::from_micros).collect();
            histogram(&took).into_iter().map(|bucket| (bucket.up_to_micros, bucket.operations)).collect()
        };
        for (took, expected) in [
            (&[][..], &[][..]),
            (&[0, 1], &[(1, 2)]),
            (&[3, 5, 6, 40], &[(5, 2), (10, 1), (20, 0), (50, 1)]),
            (&[30_000_000], &[(50_000_000, 1)]),
        ] {
            assert_eq!(buckets(took), expected, "{took:?}");
        }
    }

    #[test]
    fn percentiles_are_times_that_were_measured() {
        for (operations, p50, p99, p999) in [(0, 0, 0, 0), (1, 1, 1, 1), (100, 50, 99, 100), (2000, 1000, 1980, 1998)] {
            let took = (1..=operations).rev().map(Duration::from_micros).collect();
            let figures = Figures::new(took, 0.0, None);
            assert_eq!([figures.p50_micros, figures.p99_micros, figures.p999_micros], [p50, p99, p999]);
        }
    }

    #[test]
    fn times_are_read_at_a_glance() {
        for (micros, expected) in
            [(1.0, "1 µs"), (5.26, "5.3 µs"), (999.0, "999 µs"), (5126.0, "5.1 ms"), (2e4, "20 ms"), (5e7, "50 s")]
        {
            assert_eq!(time(micros), expected);
        }
    }
}
