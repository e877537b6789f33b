//! Permits to work on messages: a message that finds none free waits in line.

use std::collections::VecDeque;
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use crate::net::lock::lock;

/// So many permits.
#[derive(Debug)]
pub struct Semaphore {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    free: usize,
    /// Those that wait, by their numbers, the one that has waited longest first.
    waiting: VecDeque<(u64, SyncSender<()>)>,
    next_number: u64,
    is_closed: bool,
}

/// A permit. When it is dropped, it goes to the one that has waited longest.
#[derive(Debug)]
pub struct Permit(Arc<Semaphore>);

/// Why there is no permit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NoPermit {
    /// None was free until the deadline.
    Late,
    /// Nobody gets one any more.
    Closed,
}

impl Semaphore {
    /// `count` permits, all free.
    pub fn new(count: usize) -> Arc<Self> {
        let (waiting, next_number, is_closed) = Default::default();
        let state = Mutex::new(State { free: count, waiting, next_number, is_closed });
        Arc::new(Semaphore { state })
    }

    /// Takes a permit; where none is free, waits in line for one, until the deadline if there is one.
    ///
    /// # Errors
    ///
    /// Why there is none.
    pub fn take(self: &Arc<Self>, deadline: Option<Instant>) -> Result<Permit, NoPermit> {
        let (number, given) = {
            let mut state = self.lock();
            if state.is_closed {
                return Err(NoPermit::Closed);
            }
            if state.free > 0 {
                state.free -= 1;
                return Ok(Permit(Arc::clone(self)));
            }
            let (give, given) = sync_channel(1);
            let number = state.next_number;
            state.next_number += 1;
            state.waiting.push_back((number, give));
            (number, given)
        };
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let waited = match left {
            Some(left) => given.recv_timeout(left),
            None => given.recv().map_err(RecvTimeoutError::from),
        };
        let permit = |()| Permit(Arc::clone(self));
        match waited {
            Ok(()) => Ok(permit(())),
            Err(RecvTimeoutError::Disconnected) => Err(NoPermit::Closed),
            Err(RecvTimeoutError::Timeout) => {
                self.lock().waiting.retain(|(waiting, _)| *waiting != number);
                // One may have come just before.
                given.try_recv().map(permit).map_err(|_| NoPermit::Late)
            }
        }
    }

    /// Nobody gets a permit any more, nor do those that wait.
    pub fn close(&self) {
        let mut state = self.lock();
        state.is_closed = true;
        state.waiting.clear();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        match state.waiting.pop_front() {
            // Who is in line takes it, and there is room for the one word: this neither fails nor waits.
            Some((_, give)) => drop(give.send(())),
            None => state.free += 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::thread;
    use std::time::Duration;

    use super::*;

    const BOUND: Duration = Duration::from_secs(20);

    fn waiting(semaphore: &Semaphore) -> usize {
        semaphore.lock().waiting.len()
    }

    fn wait_for(semaphore: &Semaphore, count: usize) {
        let end = Instant::now() + BOUND;
        while waiting(semaphore) != count {
            assert!(Instant::now() < end, "{} wait, not {count}", waiting(semaphore));
            thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn permits_go_to_those_that_wait_in_their_order() {
        let semaphore = Semaphore::new(1);
        let first = semaphore.take(None).unwrap();
        let order = Mutex::new(Vec::new());
        thread::scope(|scope| {
            for number in 0..20 {
                let (semaphore, order) = (&semaphore, &order);
                scope.spawn(move || {
                    let _permit = semaphore.take(Some(Instant::now() + BOUND)).unwrap();
                    order.lock().unwrap().push(number);
                });
                wait_for(semaphore, number + 1);
            }
            drop(first);
        });
        assert!(order.into_inner().unwrap().into_iter().eq(0..20));
        assert_eq!(semaphore.lock().free, 1);
    }

    #[test]
    fn a_permit_that_comes_too_late_is_not_lost() {
        let semaphore = Semaphore::new(2);
        let highest = AtomicUsize::new(0);
        let now = AtomicUsize::new(0);
        thread::scope(|scope| {
            for number in 0..8 {
                let (semaphore, highest, now) = (&semaphore, &highest, &now);
                scope.spawn(move || {
                    for round in 0..2000 {
                        let patience = Duration::from_micros((number * 7 + round) % 60);
                        if let Ok(_permit) = semaphore.take(Some(Instant::now() + patience)) {
                            let count = now.fetch_add(1, Ordering::SeqCst) + 1;
                            highest.fetch_max(count, Ordering::SeqCst);
                            thread::yield_now();
                            now.fetch_sub(1, Ordering::SeqCst);
                        }
                    }
                });
            }
        });
        assert_eq!(highest.into_inner(), 2);
        assert_eq!(waiting(&semaphore), 0);
        assert_eq!(semaphore.lock().free, 2);
    }

    #[test]
    fn nobody_waits_for_a_permit_that_nobody_gets() {
        let semaphore = Semaphore::new(1);
        let _first = semaphore.take(None).unwrap();
        thread::scope(|scope| {
            let waits = scope.spawn(|| semaphore.take(None).map(drop));
            wait_for(&semaphore, 1);
            assert_eq!(semaphore.take(Some(Instant::now())).unwrap_err(), NoPermit::Late);
            semaphore.close();
            assert_eq!(waits.join().unwrap(), Err(NoPermit::Closed));
            assert_eq!(semaphore.take(None).unwrap_err(), NoPermit::Closed);
        });
    }
}
