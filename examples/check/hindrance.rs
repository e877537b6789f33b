//! What keeps the checker itself from its work, such as a full disk or too few file descriptors. It
//! must not look like a mistake of the program that is checked: a case that fails while the checker
//! was hindered is not judged.

use std::fmt;
use std::io;
use std::sync::Mutex;
use std::time::Instant;

use rustix::io::Errno;

use crate::program::{lock, shorten};

/// What came last, and when.
static LAST: Mutex<Option<(Instant, String)>> = Mutex::new(None);

/// Notes what hinders the checker.
pub fn note(what: impl fmt::Display) {
    let why = format!("the checker could not do its work: {}", shorten(&what.to_string()));
    *lock(&LAST) = Some((Instant::now(), why));
}

/// Notes an error of a connection, if it is the checker's own system that lacks something.
pub fn note_if_scarce(error: &io::Error) {
    let scarce = [Errno::MFILE, Errno::NFILE, Errno::NOMEM, Errno::NOBUFS, Errno::ADDRNOTAVAIL];
    if Errno::from_io_error(error).is_some_and(|error| scarce.contains(&error)) {
        note(error);
    }
}

/// Notes each panic, in place of what is printed otherwise: the peers that the checker plays panic
/// where the system says no.
pub fn watch_panics() {
    std::panic::set_hook(Box::new(|panic| match panic.payload().downcast_ref::<String>() {
        // What the system said, without the place.
        Some(text) => note(text),
        None => note(panic),
    }));
}

/// Returns what hindered the checker since then.
pub fn since(begun: Instant) -> Option<String> {
    lock(&LAST).as_ref().filter(|(when, _)| *when >= begun).map(|(_, why)| why.clone())
}
