//! How many threads serve connections, and how many wait for one.

/// Enough for those that connect while a thread is started. Of 1, 2, 4 and 12, none served short
/// connections measurably faster than 4.
pub(super) const MIN_WAITING: usize = 4;

/// Threads that come back from a crowd wait for the next one, but not thousands of them.
pub(super) const MAX_WAITING: usize = 128;

/// The threads beside those that serve a connection. No more of them wait than are `free`, which is how
/// many more connections there may be.
#[derive(Debug, Default)]
pub(super) struct Threads {
    /// How many wait for a connection. Those that are being started count, and so do those that pause
    /// after a failed `accept`.
    pub(super) waiting: usize,
    /// The connection whose thread does not serve it until another thread waits.
    pub(super) held: Option<u64>,
}

impl Threads {
    /// Returns how many threads are to be started. They count as waiting from now on.
    pub(super) fn fill(&mut self, free: usize) -> usize {
        let missing = MIN_WAITING.min(free).saturating_sub(self.waiting);
        self.waiting += missing;
        missing
    }

    /// A thread with connection `number` could start no other: returns whether it is held.
    pub(super) fn hold(&mut self, number: u64, free: usize) -> bool {
        let nobody_waits = self.waiting == 0 && free > 0;
        if nobody_waits {
            // In place of an earlier one: were all of them held, none would ever end.
            self.held = Some(number);
        }
        nobody_waits
    }

    /// A connection has ended: returns whether its thread accepts again.
    pub(super) fn release(&mut self, free: usize) -> bool {
        let waits = self.waiting < MAX_WAITING.min(free);
        if waits {
            self.waiting += 1;
            self.held = None;
        }
        waits
    }

    /// A thread has waited for `WAIT`: returns whether it keeps waiting.
    pub(super) fn keeps_waiting(&mut self) -> bool {
        let waits = self.waiting <= MIN_WAITING;
        if !waits {
            self.waiting -= 1;
        }
        waits
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Threads as they are told to be, some of which the system does not give.
    #[derive(Default)]
    struct Model {
        limit: usize,
        open: Vec<u64>,
        waiting: usize,
        accepted: u64,
    }

    impl Model {
        fn new(limit: usize, threads: &mut Threads) -> Self {
            Model { limit, waiting: threads.fill(limit), ..Model::default() }
        }

        fn free(&self) -> usize {
            self.limit - self.open.len()
        }

        /// Tries to start threads for the one that has this connection, which may then be held.
        fn start(&mut self, threads: &mut Threads, missing: usize, number: u64, given: usize) {
            self.waiting += missing.min(given);
            if given < missing {
                threads.waiting -= missing - given;
                threads.hold(number, self.free());
            }
        }

        fn connect(&mut self, threads: &mut Threads, given: usize) {
            if self.waiting > 0 {
                self.waiting -= 1;
                self.accepted += 1;
                self.open.push(self.accepted);
                threads.waiting -= 1;
                let missing = threads.fill(self.free());
                self.start(threads, missing, self.accepted, given);
            }
        }

        /// The held connection's thread tries again.
        fn retry(&mut self, threads: &mut Threads, given: usize) {
            if let Some(number) = threads.held.take() {
                let missing = threads.fill(self.free());
                self.start(threads, missing, number, given);
            }
        }

        /// A connection ends that is not held.
        fn end(&mut self, threads: &mut Threads, index: usize) {
            let held = self.open.get(index).is_some_and(|number| threads.held == Some(*number));
            if index < self.open.len() && !held {
                self.open.remove(index);
                self.waiting += usize::from(threads.release(self.free()));
            }
        }
    }

    proptest! {
        #[test]
        fn whoever_connects_is_served_once_the_system_gives_threads_though_no_connection_ends(
            limit in 1..20_usize,
            steps in prop::collection::vec((0..4_usize, 0..20_usize, 0..6_usize), 0..200),
        ) {
            let mut threads = Threads::default();
            let mut model = Model::new(limit, &mut threads);
            for (step, index, given) in steps {
                match step {
                    0 => model.connect(&mut threads, given),
                    1 => model.end(&mut threads, index),
                    2 => model.retry(&mut threads, given),
                    _ if model.waiting > 0 => {
                        model.waiting -= usize::from(!threads.keeps_waiting());
                    }
                    _ => {}
                }
                prop_assert_eq!(threads.waiting, model.waiting);
                prop_assert!(model.open.len() + threads.waiting <= limit);
                prop_assert!(model.waiting > 0 || threads.held.is_some() || model.open.len() == limit);
                prop_assert!(threads.held.is_none() || model.waiting == 0);
            }
            while model.open.len() < limit {
                let before = model.open.len();
                model.retry(&mut threads, MIN_WAITING);
                model.connect(&mut threads, MIN_WAITING);
                prop_assert_eq!(model.open.len(), before + 1);
            }
            prop_assert!(threads.held.is_none());
        }
    }

    #[test]
    fn of_a_crowd_that_has_gone_not_all_wait() {
        let mut threads = Threads::default();
        let mut model = Model::new(1000, &mut threads);
        (0..500).for_each(|_| model.connect(&mut threads, MIN_WAITING));
        assert_eq!(model.open.len(), 500);
        (0..500).for_each(|_| model.end(&mut threads, 0));
        assert_eq!(threads.waiting, MAX_WAITING);
    }
}
