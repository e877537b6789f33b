//! Threads for jobs that wait for others, such as a connection to a server.
//!
//! A thread is kept for the next job for a while. A few are held in reserve: if the system gives no further
//! thread, they do the jobs that wait. Else they do none, since a thread that stays keeps memory of its jobs.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

use crate::net::lock::{lock, whole};
use crate::net::os_error::thread_failure;

/// Threads that are held in reserve.
const RESERVE: usize = 2;

/// Another thread that has waited for a job this long ends.
const IDLE_TIME: Duration = Duration::from_secs(2);

/// The stack of a thread; parsing is not recursive, so that little is needed.
const STACK: usize = 256 << 10;

type Job = Box<dyn FnOnce() + Send>;

/// A pool of threads.
#[derive(Default)]
pub struct Workers {
    state: Mutex<State>,
    changed: Condvar,
    /// The reserve is needed.
    lacking: Condvar,
    /// A job waits since no thread could be started for it.
    short: AtomicBool,
}

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    /// Threads that wait for a job, without the reserve.
    idle: usize,
    stopped: bool,
}

impl Workers {
    /// A pool with its first threads.
    ///
    /// # Errors
    ///
    /// If the system gives none.
    pub fn start() -> io::Result<Arc<Self>> {
        let workers = Arc::new(Workers::default());
        (0..RESERVE).try_for_each(|_| workers.spawn(true))?;
        Ok(workers)
    }

    /// Has a thread do the job. Returns `false` if no further thread could be started, so that the job waits
    /// for one to become free.
    pub fn submit(self: &Arc<Self>, job: impl FnOnce() + Send + 'static) -> bool {
        let mut state = self.lock();
        if state.stopped {
            return true;
        }
        state.jobs.push_back(Box::new(job));
        let has_thread = state.idle >= state.jobs.len();
        drop(state);
        self.changed.notify_one();
        if has_thread || self.spawn(false).is_ok() {
            return true;
        }
        let state = self.lock();
        // A thread may have taken it meanwhile.
        let is_short = !state.jobs.is_empty();
        self.short.store(is_short, Ordering::Relaxed);
        drop(state);
        self.lacking.notify_all();
        !is_short
    }

    /// Whether a job waits that no thread could be started for. Idle jobs should then end.
    pub fn is_short(&self) -> bool {
        self.short.load(Ordering::Relaxed)
    }

    /// Ends the threads that wait for a job, and the others after theirs. Jobs that wait are dropped.
    pub fn stop(&self) {
        let mut state = self.lock();
        state.stopped = true;
        let jobs = std::mem::take(&mut state.jobs);
        drop(state);
        self.changed.notify_all();
        self.lacking.notify_all();
        // Dropping them runs code of others, which may come back here.
        drop(jobs);
    }

    /// Starts a thread, which is held in reserve or ends when it has had no job for a while.
    fn spawn(self: &Arc<Self>, is_reserve: bool) -> io::Result<()> {
        let workers = Arc::clone(self);
        let thread = thread::Builder::new().name("worker".to_owned()).stack_size(STACK);
        thread.spawn(move || workers.run(is_reserve)).map(drop).map_err(thread_failure)
    }

    fn run(&self, is_reserve: bool) {
        while let Some(job) = self.next_job(is_reserve) {
            // A job that panics takes no thread from the others.
            let _ = catch_unwind(AssertUnwindSafe(job));
        }
    }

    fn next_job(&self, is_reserve: bool) -> Option<Job> {
        let mut state = self.lock();
        if is_reserve {
            let is_unneeded =
                |state: &mut State| !state.stopped && (state.jobs.is_empty() || !self.is_short());
            state = whole(self.lacking.wait_while(state, is_unneeded));
        } else {
            state.idle += 1;
            let has_none = |state: &mut State| state.jobs.is_empty() && !state.stopped;
            state = whole(self.changed.wait_timeout_while(state, IDLE_TIME, has_none)).0;
            state.idle -= 1;
        }
        let job = state.jobs.pop_front();
        if state.jobs.is_empty() {
            self.short.store(false, Ordering::Relaxed);
        }
        job
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

impl fmt::Debug for Workers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Workers").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, channel};

    use super::*;

    const BOUND: Duration = Duration::from_secs(20);

    fn count(done: &Receiver<()>, expected: usize) {
        (0..expected).for_each(|_| done.recv_timeout(BOUND).unwrap());
    }

    #[test]
    fn jobs_run_side_by_side_however_many_they_are_and_outlive_a_panic() {
        let workers = Workers::start().unwrap();
        let (sender, done) = channel();
        let (releases, held): (Vec<_>, Vec<_>) = (0..4 * RESERVE).map(|_| channel::<()>()).unzip();
        for held in held {
            let sender = sender.clone();
            assert!(workers.submit(move || {
                sender.send(()).unwrap();
                held.recv_timeout(BOUND).unwrap();
                sender.send(()).unwrap();
                panic!("a job may panic");
            }));
        }
        count(&done, 4 * RESERVE);
        releases.iter().for_each(|release| release.send(()).unwrap());
        count(&done, 4 * RESERVE);
        let last = sender.clone();
        workers.submit(move || last.send(()).unwrap());
        count(&done, 1);
        assert!(!workers.is_short());
    }

    #[test]
    fn jobs_that_wait_when_it_stops_are_dropped() {
        let workers = Workers::start().unwrap();
        workers.stop();
        let (sender, done) = channel::<()>();
        workers.submit(move || sender.send(()).unwrap());
        assert!(done.recv_timeout(BOUND).is_err());
    }
}
