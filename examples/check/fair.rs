//! Time as it passes for a program: while the machine is late, it stands still. So a slow program fails a
//! case, and a quick one on a busy machine does not.

use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use crate::program::lock;
use crate::support::stopwatch::{NAP, lateness};

/// What a thread that measures the machine has found.
static MEASURED: Mutex<Option<Measured>> = Mutex::new(None);

#[derive(Clone, Copy)]
struct Measured {
    /// By how much the machine has been late so far.
    late: Duration,
    /// When the latest measurement began. Until its end nobody knows more than that it takes [`NAP`].
    begun: Instant,
    /// From here on time is what it is everywhere.
    last: Instant,
}

/// Starts to measure the machine, until `last`.
pub fn start(last: Instant) {
    let measure = move || {
        let mut late = Duration::ZERO;
        while Instant::now() < last {
            *lock(&MEASURED) = Some(Measured { late, begun: Instant::now(), last });
            late += lateness();
        }
    };
    // Without the thread, time is what it is everywhere.
    drop(thread::Builder::new().spawn(measure));
}

/// Returns the time.
pub fn now() -> Instant {
    let now = Instant::now();
    match *lock(&MEASURED) {
        Some(measured) if now < measured.last => {
            now.min(measured.begun + NAP).checked_sub(measured.late).unwrap_or(now)
        }
        _ => now,
    }
}

/// Sleeps for this long, by this time.
pub fn sleep(time: Duration) {
    let end = now() + time;
    loop {
        let left = end.saturating_duration_since(now());
        if left.is_zero() {
            return;
        }
        thread::sleep(left);
    }
}
