//! The line before a server that is to serve so many connections at once.

use std::collections::VecDeque;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// First come, first served.
#[derive(Debug)]
pub struct Line(Arc<Mutex<Queue>>);

#[derive(Debug)]
struct Queue {
    free: usize,
    waiting: VecDeque<Sender<()>>,
}

/// A place at the server; leaving it lets the next one in.
#[derive(Debug)]
pub struct Place(Arc<Mutex<Queue>>);

impl Line {
    /// A line for so many at once.
    pub fn new(places: usize) -> Self {
        Line(Arc::new(Mutex::new(Queue { free: places, waiting: VecDeque::new() })))
    }

    /// Waits for a place until `until`; `None` where none was had, or the line was dispersed.
    pub fn enter(&self, until: Instant) -> Option<Place> {
        let turn = {
            let mut queue = lock(&self.0);
            if queue.free > 0 {
                queue.free -= 1;
                return Some(Place(Arc::clone(&self.0)));
            }
            let (sender, turn) = channel();
            queue.waiting.push_back(sender);
            turn
        };
        let let_in = match turn.recv_timeout(until.saturating_duration_since(Instant::now())) {
            Ok(()) => true,
            Err(RecvTimeoutError::Disconnected) => false,
            Err(RecvTimeoutError::Timeout) => {
                // Under the lock nobody is let in: either we already are, or we leave for good.
                let _queue = lock(&self.0);
                let let_in = turn.try_recv().is_ok();
                drop(turn);
                let_in
            }
        };
        let_in.then(|| Place(Arc::clone(&self.0)))
    }

    /// Sends those who wait away.
    pub fn disperse(&self) {
        lock(&self.0).waiting.clear();
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut queue = lock(&self.0);
        let let_in = loop {
            match queue.waiting.pop_front() {
                Some(next) if next.send(()).is_ok() => break true,
                Some(_) => {}
                None => break false,
            }
        };
        if !let_in {
            queue.free += 1;
        }
    }
}

fn lock(queue: &Mutex<Queue>) -> MutexGuard<'_, Queue> {
    queue.lock().unwrap_or_else(PoisonError::into_inner)
}
