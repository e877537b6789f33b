//! Bounds in time that hold on a busy machine, too.

use std::fmt;
use std::hint::black_box;
use std::ops::Range;
use std::sync::{Condvar, LazyLock, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use revproc::protocol::hash;
use rustix::time::{ClockId, clock_gettime};

/// How long a thread that measures the machine sleeps each time.
pub const NAP: Duration = Duration::from_millis(50);

/// How long it works in between: longer than the system lets a thread run while others wait. A thread that
/// only sleeps is woken in time on the busiest machine.
const WORK: Duration = Duration::from_millis(5);

/// How many threads are woken one after another for a message and its reply, each of which may be late:
/// the session's, the server's, the one that reads its acks, and the test's.
const WOKEN: u32 = 4;

/// What the process has measured, in one thread, while there was a stopwatch.
static MEASURED: Mutex<Measured> = Mutex::new(Measured { late: Vec::new(), stopwatches: 0 });
static CHANGED: Condvar = Condvar::new();

struct Measured {
    /// By how much the thread was late each time.
    late: Vec<Duration>,
    /// How many there are.
    stopwatches: usize,
}

/// Measures how long something takes, and by how much this machine is late meanwhile: a bound in time is
/// what was asked for and that.
pub struct Stopwatch {
    since: Instant,
    /// What had been measured by then.
    first: usize,
}

impl Stopwatch {
    /// Starts now.
    pub fn start() -> Self {
        static THREAD: LazyLock<()> = LazyLock::new(|| drop(thread::spawn(measure)));
        LazyLock::force(&THREAD);
        let mut measured = MEASURED.lock().unwrap();
        measured.stopwatches += 1;
        CHANGED.notify_all();
        Stopwatch { since: Instant::now(), first: measured.late.len() }
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
        let measured = MEASURED.lock().unwrap();
        // What is being measured now may be the worst of all.
        let enough = measured.late.len() + 1;
        let measured =
            CHANGED.wait_while(measured, |measured| measured.late.len() < enough).unwrap();
        WOKEN * measured.late[self.first..].iter().max().copied().unwrap_or_default()
    }

    /// Returns whether no more time than this has gone by since the start.
    pub fn is_within(&self, limit: Duration) -> bool {
        let took = self.elapsed();
        took < limit || took < limit + self.lateness()
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
        MEASURED.lock().unwrap().stopwatches -= 1;
    }
}

fn measure() {
    loop {
        let measured = MEASURED.lock().unwrap();
        drop(CHANGED.wait_while(measured, |measured| measured.stopwatches == 0).unwrap());
        let late = lateness();
        MEASURED.lock().unwrap().late.push(late);
        CHANGED.notify_all();
    }
}

/// Works and sleeps once, and returns by how much that was late.
pub fn lateness() -> Duration {
    let text = "x".repeat(4 << 10);
    let (begun, before) = (Instant::now(), cpu_time());
    while cpu_time() - before < WORK {
        black_box(hash(black_box(&text)));
    }
    thread::sleep(NAP);
    begun.elapsed().saturating_sub(NAP + (cpu_time() - before))
}

/// Returns for how long this thread has had a CPU.
fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    time.try_into().expect("it began at 0")
}
