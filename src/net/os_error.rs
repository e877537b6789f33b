//! The system's errors: in words, and whether they are this host's own.

use std::io::{self, ErrorKind};

use rustix::io::Errno;

/// An error of the system in words, without its number.
pub fn reason(error: &io::Error) -> String {
    let full = error.to_string();
    let short = full.split(" (os error").next().unwrap_or_default();
    match error.kind() {
        ErrorKind::WouldBlock => "timed out".to_owned(),
        _ => short.chars().next().map_or_else(String::new, |first| {
            first.to_lowercase().chain(short.chars().skip(1)).collect()
        }),
    }
}

/// The error of a thread that could not be started, which is `EAGAIN`: elsewhere that is a timeout.
pub(crate) fn thread_failure(error: io::Error) -> io::Error {
    match error.kind() {
        ErrorKind::WouldBlock => io::Error::other(
            "the system gives no more threads (ulimit -u, the container's limit, or memory)",
        ),
        _ => error,
    }
}

/// Whether a connection failed for want of something on our side: descriptors, ports, memory.
pub(crate) fn is_local(error: &io::Error) -> bool {
    const OURS: [Errno; 5] =
        [Errno::MFILE, Errno::NFILE, Errno::NOBUFS, Errno::NOMEM, Errno::ADDRNOTAVAIL];
    error.raw_os_error().is_some_and(|code| OURS.iter().any(|ours| ours.raw_os_error() == code))
}
