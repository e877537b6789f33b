//! Bounds in time that hold on a busy machine, too.

use std::fmt;
use std::fs;
use std::hint::black_box;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use revproc::protocol::hash;

/// How long the thread that measures the machine sleeps each time.
const NAP: Duration = Duration::from_millis(50);

/// What it hashes in between: some milliseconds of work, longer than the system lets a thread run while
/// others wait. A thread that only sleeps is woken in time on the busiest machine.
const WORK: usize = 256 << 10;

/// How many threads are woken one after another for a message and its reply, each of which may be late:
/// the session's, the server's, the one that reads its acks, and the test's.
const WOKEN: u32 = 4;

#[derive(Default)]
struct Measured {
    worst: Duration,
    /// How often it was measured.
    count: usize,
    has_ended: bool,
}

/// Measures how long something takes, and by how much this machine is late meanwhile: a bound in time is
/// what was asked for and that.
pub struct Stopwatch {
    since: Instant,
    measured: Arc<(Mutex<Measured>, Condvar)>,
}

impl Stopwatch {
    /// Starts now.
    pub fn start() -> Self {
        let measured = Arc::<(Mutex<Measured>, Condvar)>::default();
        let thread = Arc::clone(&measured);
        thread::spawn(move || measure(&thread.0, &thread.1));
        Stopwatch { since: Instant::now(), measured }
    }

    /// Returns when it was started.
    pub fn started(&self) -> Instant {
        self.since
    }

    /// Returns the time since the start.
    pub fn elapsed(&self) -> Duration {
        self.since.elapsed()
    }

    /// Returns by how much a message and its reply may have been late for the machine's sake so far.
    pub fn lateness(&self) -> Duration {
        let (measured, changed) = &*self.measured;
        let measured = measured.lock().unwrap();
        // What is being measured now may be the worst of all.
        let enough = measured.count + 1;
        let measured = changed.wait_while(measured, |measured| measured.count < enough).unwrap();
        WOKEN * measured.worst
    }

    /// Fails where `took`, which was measured while this ran, is over the limit.
    #[track_caller]
    pub fn assert_took(&self, took: Duration, limit: Duration, what: impl fmt::Debug) {
        if took >= limit {
            let late = self.lateness();
            assert!(took < limit + late, "{took:?} is over {limit:?} and {late:?}: {what:#?}");
        }
    }

    /// Fails where more time than this has gone by since the start.
    #[track_caller]
    pub fn assert_within(&self, limit: Duration) {
        self.assert_took(self.elapsed(), limit, "since the start");
    }

    /// As [`assert_within`](Self::assert_within), and where less has gone by than the first of the two. What
    /// is timed must not have begun before the start.
    #[track_caller]
    pub fn assert_between(&self, limits: Range<Duration>) {
        let took = self.elapsed();
        assert!(took >= limits.start, "{took:?} is less than {:?}", limits.start);
        self.assert_took(took, limits.end, "since the start");
    }
}

impl Drop for Stopwatch {
    fn drop(&mut self) {
        if let Ok(mut measured) = self.measured.0.lock() {
            measured.has_ended = true;
        }
    }
}

fn measure(measured: &Mutex<Measured>, changed: &Condvar) {
    let text = "x".repeat(WORK);
    let (mut begun, mut worked) = (Instant::now(), cpu_time());
    loop {
        black_box(hash(black_box(&text)));
        thread::sleep(NAP);
        let (now, cpu) = (Instant::now(), cpu_time());
        let late = (now - begun).saturating_sub(NAP + (cpu - worked));
        (begun, worked) = (now, cpu);
        let mut measured = measured.lock().unwrap();
        if measured.has_ended {
            return;
        }
        measured.worst = measured.worst.max(late);
        measured.count += 1;
        changed.notify_all();
    }
}

/// Returns for how long this thread has had a CPU; none where the system does not say.
fn cpu_time() -> Duration {
    let text = fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    let nanoseconds = text.split(' ').next().and_then(|number| number.parse().ok());
    Duration::from_nanos(nanoseconds.unwrap_or(0))
}
