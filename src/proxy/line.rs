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

    /// A place, if need be after waiting `until` then; `None` where none was had, or the line was
    /// dispersed.
    pub fn enter(&self, until: Option<Instant>) -> Option<Place> {
        let (turn, until) = {
            let mut queue = lock(&self.0);
            if queue.free > 0 {
                queue.free -= 1;
                return Some(Place(Arc::clone(&self.0)));
            }
            let until = until?;
            let (sender, turn) = channel();
            queue.waiting.push_back(sender);
            (turn, until)
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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn who_does_not_wait_leaves_nothing_behind() {
        let line = Line::new(1);
        let place = line.enter(None).unwrap();
        assert!(line.enter(None).is_none());
        assert!(line.enter(Some(Instant::now() + Duration::from_millis(1))).is_none());
        drop(place);
        assert!(line.enter(None).is_some());
        let place = line.enter(None).unwrap();
        for _ in 0..10 {
            assert!(line.enter(None).is_none());
        }
        assert!(lock(&line.0).waiting.is_empty());
        drop(place);
    }
}
