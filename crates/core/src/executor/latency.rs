//! How long something takes, counted by powers of two of a nanosecond.

use crate::sync::{AtomicU64, Ordering};

/// How many counts a histogram has: the last is for all above two to the power of it, some minutes.
pub const BUCKET_COUNT: usize = 40;

/// Counts of durations: bucket `n` has those from `2^(n-1)` to below `2^n` nanoseconds, bucket 0 what
/// is too short to be seen. Any thread may call any method at any time.
pub struct Histogram {
    /// Read by reports only, so `Relaxed` suffices.
    counts: [AtomicU64; BUCKET_COUNT],
}

impl Default for Histogram {
    fn default() -> Self {
        Histogram {
            counts: std::array::from_fn(|_| AtomicU64::new(0)),
        }
    }
}

impl Histogram {
    /// Count one.
    #[inline]
    pub fn add(&self, nanoseconds: u64) {
        let bucket = (u64::BITS - nanoseconds.leading_zeros()) as usize;
        self.counts[bucket.min(BUCKET_COUNT - 1)].fetch_add(1, Ordering::Relaxed);
    }

    /// The counts, taken one by one.
    pub fn counts(&self) -> [u64; BUCKET_COUNT] {
        std::array::from_fn(|bucket| self.counts[bucket].load(Ordering::Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_duration_is_in_the_bucket_of_its_power_of_two() {
        let histogram = Histogram::default();
        for nanoseconds in [0, 1, 2, 3, 4, 1023, 1024, u64::MAX] {
            histogram.add(nanoseconds);
        }
        let mut expected = [0; BUCKET_COUNT];
        for bucket in [0, 1, 2, 2, 3, 10, 11, BUCKET_COUNT - 1] {
            expected[bucket] += 1;
        }
        assert_eq!(histogram.counts(), expected);
    }
}
