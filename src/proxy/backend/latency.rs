//! How long a server takes for a message.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// A server that takes less than this for a message is quick, in nanoseconds.
const QUICK: u64 = 150_000;

/// A faster sample replaces the estimate. A slower one moves it by 1/32 of the difference.
const SLOWER_WEIGHT: u64 = 32;

/// Recent minimum of a server's time per message, in nanoseconds. A minimum, because on a busy machine most
/// messages take longer for other reasons.
#[derive(Debug)]
pub struct LatencyEstimate(AtomicU64);

impl Default for LatencyEstimate {
    fn default() -> Self {
        LatencyEstimate(AtomicU64::new(u64::MAX))
    }
}

impl LatencyEstimate {
    /// Takes in a sample.
    pub fn record(&self, took: Duration) {
        let took = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        let best = self.0.load(Ordering::Relaxed);
        let now = if took < best { took } else { best + (took - best) / SLOWER_WEIGHT };
        // Of two samples at once one may be overlooked, which does no harm.
        self.0.store(now, Ordering::Relaxed);
    }

    /// Forgets the samples: the server has failed.
    pub(super) fn forget(&self) {
        self.0.store(u64::MAX, Ordering::Relaxed);
    }

    /// Whether waking a thread costs more than the server's work.
    pub(super) fn is_quick(&self) -> bool {
        self.0.load(Ordering::Relaxed) < QUICK
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn estimate_after(micros: impl IntoIterator<Item = u64>) -> LatencyEstimate {
        let estimate = LatencyEstimate::default();
        micros.into_iter().for_each(|micros| estimate.record(Duration::from_micros(micros)));
        estimate
    }

    #[test]
    fn a_server_is_as_quick_as_at_its_best_lately() {
        assert!(!estimate_after([]).is_quick());
        assert!(estimate_after([2000, 50, 900]).is_quick());
        assert!(!estimate_after([1000; 100]).is_quick());
        assert!(estimate_after([50, 1000, 50, 1000].repeat(100)).is_quick());
        assert!(!estimate_after([50].into_iter().chain([1000; 10])).is_quick());
        assert!(!estimate_after([50, u64::MAX]).is_quick());
    }
}
