//! How a program is told to stop.

use std::ffi::c_int;
use std::thread;

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use super::{FAILED, Problem};
use crate::net::os_error::{reason, thread_failure};

/// Calls `stop` at the first SIGINT, SIGTERM or SIGHUP; a second one ends the process at once. A
/// SIGHUP that is ignored, as `nohup` has it, stays ignored.
///
/// # Errors
///
/// If the system does not let us.
pub fn on_signal(stop: impl Fn() + Send + 'static) -> Result<(), Problem> {
    watch_signals()?.call(stop, || {})
}

/// Signals that no longer end the process, and are kept until [`call`](Self::call).
#[derive(Debug)]
pub struct WatchedSignals(Signals);

/// Keeps the signals of [`on_signal`] from ending the process; [`WatchedSignals::call`] says what they do.
///
/// # Errors
///
/// As [`on_signal`].
pub fn watch_signals() -> Result<WatchedSignals, Problem> {
    let mut signals = vec![SIGINT, SIGTERM];
    if !is_ignored(SIGHUP) {
        signals.push(SIGHUP);
    }
    Signals::new(signals).map(WatchedSignals).map_err(not_watched)
}

impl WatchedSignals {
    /// Calls `stop` at the first signal, which may have come before, and `clear_up` at the second one, which
    /// then ends the process.
    ///
    /// # Errors
    ///
    /// If the system gives no thread.
    pub fn call(
        mut self,
        stop: impl Fn() + Send + 'static,
        clear_up: impl Fn() + Send + 'static,
    ) -> Result<(), Problem> {
        let watch = move || {
            let mut arriving = self.0.forever();
            if arriving.next().is_some() {
                stop();
            }
            if arriving.next().is_some() {
                clear_up();
                std::process::exit(FAILED.into());
            }
        };
        let thread = thread::Builder::new().name("signals".to_owned());
        thread.spawn(watch).map(drop).map_err(not_watched)
    }
}

fn not_watched(error: std::io::Error) -> Problem {
    Problem::failed(format!("could not watch for signals: {}", reason(&thread_failure(error))))
}

/// Whether the program was started with this signal ignored, as far as the system says.
fn is_ignored(signal: c_int) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.is_some_and(|mask| mask >> (signal - 1) & 1 == 1)
}
