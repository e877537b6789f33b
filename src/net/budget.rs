//! A limit on the memory that all large buffers take together. A reservation that does not fit
//! fails at once and never waits, so no deadlock is possible.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// The bytes that are not reserved.
#[derive(Debug)]
pub struct Budget(AtomicUsize);

impl Budget {
    /// Returns a budget of `bytes`.
    pub fn new(bytes: usize) -> Arc<Self> {
        Arc::new(Budget(AtomicUsize::new(bytes)))
    }

    /// Returns the bytes that are not reserved.
    pub fn left(&self) -> usize {
        self.0.load(Relaxed)
    }
}

/// One buffer's part of a budget, returned to it on drop.
#[derive(Debug)]
pub struct Reservation {
    budget: Arc<Budget>,
    bytes: usize,
}

impl Reservation {
    /// Returns an empty reservation.
    pub fn new(budget: Arc<Budget>) -> Self {
        Reservation { budget, bytes: 0 }
    }

    /// Changes the reservation to `bytes`. Returns `false`, and changes nothing, if the budget has
    /// too little left.
    pub fn resize(&mut self, bytes: usize) -> bool {
        let left = &self.budget.0;
        // Relaxed: the counter guards no other memory.
        let is_enough = match bytes.checked_sub(self.bytes) {
            Some(more) => {
                left.fetch_update(Relaxed, Relaxed, |left| left.checked_sub(more)).is_ok()
            }
            None => {
                left.fetch_add(self.bytes - bytes, Relaxed);
                true
            }
        };
        if is_enough {
            self.bytes = bytes;
        }
        is_enough
    }

    /// Returns an empty reservation of the same budget.
    pub fn another(&self) -> Self {
        Self::new(Arc::clone(&self.budget))
    }

    /// Moves this many of the reserved bytes into a new reservation, or all if there are fewer.
    pub fn split(&mut self, bytes: usize) -> Self {
        let bytes = bytes.min(self.bytes);
        self.bytes -= bytes;
        Reservation { budget: Arc::clone(&self.budget), bytes }
    }

    /// Moves all reserved bytes into a new reservation.
    pub fn take(&mut self) -> Self {
        Reservation { budget: Arc::clone(&self.budget), bytes: std::mem::take(&mut self.bytes) }
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.resize(0);
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn a_reservation_grows_while_bytes_are_left_and_returns_them_on_drop() {
        let budget = Budget::new(100);
        let [mut one, mut two] = [(); 2].map(|()| Reservation::new(Arc::clone(&budget)));
        assert!(one.resize(60) && two.resize(40));
        assert!(!two.resize(41), "there is nothing left");
        assert!(one.resize(20) && two.resize(80));
        assert!(!one.resize(usize::MAX));
        assert_eq!(budget.left(), 0);
        drop(one);
        assert_eq!(budget.left(), 20);
        drop(two);
        assert_eq!(budget.left(), 100);
    }

    #[test]
    fn threads_never_reserve_more_than_there_is_and_lose_none() {
        let budget = Budget::new(100);
        thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for round in 0..10_000 {
                        let mut reservation = Reservation::new(Arc::clone(&budget));
                        reservation.resize(round % 50);
                        reservation.resize(round % 90);
                        // Below zero it would wrap around.
                        assert!(budget.left() <= 100);
                    }
                });
            }
        });
        assert_eq!(budget.left(), 100);
    }
}
