//! Memory that many buffers share. Nobody waits for it, and so nobody can wait for each other: a
//! buffer that would take more than is left is refused, and what it had serves the others.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// How many bytes are left to be taken.
#[derive(Debug)]
pub struct Budget(AtomicUsize);

impl Budget {
    /// A budget of so many bytes.
    pub fn new(bytes: usize) -> Arc<Self> {
        Arc::new(Budget(AtomicUsize::new(bytes)))
    }

    /// How many bytes nobody has taken.
    pub fn left(&self) -> usize {
        self.0.load(Relaxed)
    }
}

/// What one buffer has taken of a budget; dropped, it gives that back.
#[derive(Debug)]
pub struct Reservation {
    budget: Arc<Budget>,
    bytes: usize,
}

impl Reservation {
    /// A reservation that has nothing yet.
    pub fn new(budget: Arc<Budget>) -> Self {
        Reservation { budget, bytes: 0 }
    }

    /// Takes or gives back what makes it a reservation of `bytes`. Where not enough is left it stays
    /// as it is, and `false` is returned.
    pub fn resize(&mut self, bytes: usize) -> bool {
        let left = &self.budget.0;
        // Relaxed: the number stands for no other memory that a thread could see too early.
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
}

impl Reservation {
    /// Takes over what it has, and leaves nothing.
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
    fn a_reservation_grows_as_long_as_there_is_something_left_and_gives_back_what_it_had() {
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
    fn threads_never_take_more_than_there_is_and_lose_nothing_of_it() {
        let budget = Budget::new(100);
        thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for round in 0..10_000 {
                        let mut reservation = Reservation::new(Arc::clone(&budget));
                        reservation.resize(round % 50);
                        reservation.resize(round % 90);
                        // Below zero it would be far above.
                        assert!(budget.left() <= 100);
                    }
                });
            }
        });
        assert_eq!(budget.left(), 100);
    }
}
