//! How long things took.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// A histogram of durations, from a microsecond to over a minute, with four classes per power of
/// two.
#[derive(Debug)]
pub struct Histogram {
    classes: [AtomicU64; Histogram::CLASSES],
    sum_micros: AtomicU64,
}

impl Default for Histogram {
    fn default() -> Self {
        let classes = [const { AtomicU64::new(0) }; Self::CLASSES];
        Histogram { classes, sum_micros: AtomicU64::new(0) }
    }
}

impl Histogram {
    const CLASSES: usize = 108;

    /// Counts one duration.
    pub fn record(&self, duration: Duration) {
        let micros = u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
        self.classes[Self::class(micros)].fetch_add(1, Ordering::Relaxed);
        self.sum_micros.fetch_add(micros, Ordering::Relaxed);
    }

    /// Returns a duration's class, from its power of two and the next two bits.
    fn class(micros: u64) -> usize {
        let Some(power) = micros.checked_ilog2().filter(|&power| power >= 2) else {
            return usize::try_from(micros).unwrap_or(0);
        };
        let quarter = (micros >> (power - 2)) & 3;
        let class = 4 * (u64::from(power) - 1) + quarter;
        usize::try_from(class).unwrap_or(usize::MAX).min(Self::CLASSES - 1)
    }

    /// Returns the first duration above the class, in microseconds.
    fn end(class: usize) -> u64 {
        match class as u64 {
            class @ 0..4 => class + 1,
            class => (class % 4 + 5) << (class / 4 - 1),
        }
    }

    /// Returns how many durations were counted, and their sum.
    pub fn total(&self) -> (u64, Duration) {
        let count = self.classes.iter().map(|class| class.load(Ordering::Relaxed)).sum();
        (count, Duration::from_micros(self.sum_micros.load(Ordering::Relaxed)))
    }

    /// Returns a quantile, at most a quarter too high; `None` if nothing was counted.
    pub fn quantile(&self, share: f64) -> Option<Duration> {
        let wanted = (self.total().0 as f64 * share).ceil();
        let mut seen = 0;
        let class = self.classes.iter().position(|class| {
            seen += class.load(Ordering::Relaxed);
            seen > 0 && seen as f64 >= wanted
        })?;
        Some(Duration::from_micros(Self::end(class)))
    }

    /// Returns cumulative buckets: bounds that double, each with the count of shorter durations.
    pub fn cumulative(&self) -> Vec<(Duration, u64)> {
        let mut seen = 0;
        let mut buckets = Vec::new();
        for (index, class) in self.classes.iter().enumerate() {
            seen += class.load(Ordering::Relaxed);
            if index >= 19 && index % 4 == 3 {
                buckets.push((Duration::from_micros(Self::end(index)), seen));
            }
        }
        buckets
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_duration_is_below_its_class_end_and_not_below_the_one_before() {
        for micros in (0..5000).chain((5000..60_000_000).step_by(99_991)) {
            let class = Histogram::class(micros);
            assert!(micros < Histogram::end(class), "{micros} in {class}");
            assert!(class == 0 || micros >= Histogram::end(class - 1), "{micros} in {class}");
        }
    }

    #[test]
    fn a_quantile_is_right_within_a_quarter() {
        let histogram = Histogram::default();
        assert_eq!(histogram.quantile(0.99), None);
        (1..=1000).for_each(|micros| histogram.record(Duration::from_micros(micros)));
        for (share, exact) in [(0.5, 500.0), (0.99, 990.0), (1.0, 1000.0)] {
            let shown = histogram.quantile(share).unwrap().as_micros() as f64;
            assert!((exact..=exact * 1.26).contains(&shown), "{share}: {shown}");
        }
        let (count, sum) = histogram.total();
        assert_eq!((count, sum), (1000, Duration::from_micros(500_500)));
        assert_eq!(histogram.cumulative().last().unwrap().1, 1000);
    }
}
