//! The lines that each role prints, and where they go. Nothing else prints.
//!
//! The proxy and the server go on without their terminal: a line is put into a `queue`, and a slow
//! terminal, a full disk or a closed pipe never makes a message wait. The client is a filter: it
//! writes each line itself, and waits for its reader.

mod limiter;
mod queue;
mod timestamp;

use std::fmt::{self, Write as _};
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex};
use std::time::SystemTime;

use super::escape::EscapeWriter;
use crate::net::lock::lock;
use crate::net::os_error::reason;
use queue::{Queue, write_whole};
use timestamp::Timestamp;

pub(crate) use limiter::Kind;

/// A role's output: its lines, and its warnings with the role's name in front.
#[derive(Debug, Clone)]
pub struct Terminal {
    role: &'static str,
    prefix: &'static str,
    quiet: bool,
    /// Where lines go that are no warnings.
    lines: Stream,
    output: Output,
}

#[derive(Debug, Clone)]
enum Output {
    Queued(Arc<Queue>),
    Direct(Arc<Mutex<Direct>>),
}

/// One of the two standard streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stream {
    Out,
    Err,
}

/// The files behind the two streams; `None` for one that is closed.
type Files = [Option<File>; 2];

fn standard_files() -> Files {
    let out = io::stdout().as_fd().try_clone_to_owned();
    let err = io::stderr().as_fd().try_clone_to_owned();
    [out.ok().map(File::from), err.ok().map(File::from)]
}

impl Terminal {
    /// Standard output for the lines, standard error for the warnings of `role`, which goes on
    /// without them. `quiet` leaves out the lines about messages, and whatever else peers can cause
    /// without end.
    pub fn new(role: &'static str, quiet: bool) -> Self {
        Self::with(role, quiet, Output::Queued(Queue::start(standard_files())))
    }

    /// As [`new`](Self::new), but `role` waits until each line is written.
    pub fn direct(role: &'static str, quiet: bool) -> Self {
        let files = standard_files();
        let direct = Direct { files, has_timestamps: false, lost: 0, failure: None };
        Self::with(role, quiet, Output::Direct(Arc::new(Mutex::new(direct))))
    }

    fn with(role: &'static str, quiet: bool, output: Output) -> Self {
        Terminal { role, prefix: "", quiet, lines: Stream::Out, output }
    }

    /// The same terminal, but all lines go to standard error: standard output is for
    /// [`bytes`](Self::bytes).
    pub fn lines_on_standard_error(self) -> Self {
        Terminal { lines: Stream::Err, ..self }
    }

    /// An output that nobody sees.
    #[cfg(test)]
    pub fn hidden(role: &'static str) -> Self {
        Self::with(role, true, Output::Queued(Queue::start([None, None])))
    }

    /// Another role's output in the same process: the same streams, `prefix` in front of each
    /// line that is no warning.
    pub fn beside(&self, role: &'static str, prefix: &'static str) -> Self {
        Terminal { role, prefix, ..self.clone() }
    }

    /// The same terminal, with the time in front of each line if it `has_timestamps`: in UTC, as RFC 3339
    /// has it.
    pub fn with_timestamps(self, has_timestamps: bool) -> Self {
        match &self.output {
            Output::Queued(queue) => queue.set_timestamps(has_timestamps),
            Output::Direct(direct) => lock(direct).has_timestamps = has_timestamps,
        }
        self
    }

    /// Prints a line about the role itself.
    pub fn line(&self, line: fmt::Arguments<'_>) {
        self.put(self.lines, None, format_args!("{}{line}", self.prefix));
    }

    /// Prints a line about a single message, unless the terminal is quiet.
    pub fn message(&self, line: fmt::Arguments<'_>) {
        if !self.quiet {
            self.line(line);
        }
    }

    /// Whether lines about single messages are left out.
    pub fn quiet(&self) -> bool {
        self.quiet
    }

    /// Prints a warning about a single message, unless the terminal is quiet.
    pub fn warn_message(&self, warning: fmt::Arguments<'_>) {
        if !self.quiet {
            self.warn(warning);
        }
    }

    /// Prints a warning or a failure, on standard error.
    pub fn warn(&self, warning: fmt::Arguments<'_>) {
        self.put(Stream::Err, None, format_args!("{}: {warning}", self.role));
    }

    /// Prints a warning that others can cause without end, as often as its [`Kind`] may be printed.
    pub(crate) fn warn_limited(&self, kind: Kind, warning: fmt::Arguments<'_>) {
        self.warn_about(kind, 0, warning);
    }

    /// As [`warn_limited`](Self::warn_limited), with a count for each `subject` of its own.
    pub(crate) fn warn_about(&self, kind: Kind, subject: u64, warning: fmt::Arguments<'_>) {
        let limit = Some((kind, subject));
        self.put(Stream::Err, limit, format_args!("{}: {warning}", self.role));
    }

    /// Prints a line that others can cause without end, as often as its [`Kind`] may be printed.
    pub(crate) fn line_limited(&self, kind: Kind, line: fmt::Arguments<'_>) {
        self.put(self.lines, Some((kind, 0)), format_args!("{}{line}", self.prefix));
    }

    /// Writes bytes to standard output exactly as they are. Only for a role that waits for its reader.
    pub fn bytes(&self, bytes: &[u8]) {
        if let Output::Direct(direct) = &self.output {
            lock(direct).write_bytes(Stream::Out, bytes);
        }
    }

    /// Prints a line on standard error as it is.
    pub fn error_line(&self, line: &str) {
        self.put(Stream::Err, None, format_args!("{line}"));
    }

    /// Prints a line, with a `limit` only as often as this kind and subject may be printed.
    fn put(&self, stream: Stream, limit: Option<(Kind, u64)>, line: fmt::Arguments<'_>) {
        if self.quiet && limit.is_some_and(|(kind, _)| kind.is_by_anybody()) {
            return;
        }
        match &self.output {
            Output::Queued(queue) => queue.put(stream, limit, line),
            Output::Direct(direct) => lock(direct).write(stream, line),
        }
    }

    /// Prints the counts of what was held back so far, ahead of the lines that follow.
    pub(crate) fn print_counts(&self) {
        if let Output::Queued(queue) = &self.output {
            queue.put_counts();
        }
    }

    /// Lines that could not be written so far.
    pub(crate) fn dropped(&self) -> u64 {
        match &self.output {
            Output::Queued(queue) => queue.dropped(),
            Output::Direct(direct) => lock(direct).lost,
        }
    }

    /// Waits until all lines are written, but not for an output that takes nothing.
    pub fn flush(&self) {
        if let Output::Queued(queue) = &self.output {
            queue.flush();
        }
    }

    /// Why standard output is not whole, where the role waits for each line and its reader did not
    /// just have enough.
    pub fn failure(&self) -> Option<String> {
        match &self.output {
            Output::Queued(_) => None,
            Output::Direct(direct) => lock(direct).failure.clone(),
        }
    }
}

/// The two streams of a role that waits until each line is written.
#[derive(Debug)]
struct Direct {
    files: Files,
    has_timestamps: bool,
    lost: u64,
    failure: Option<String>,
}

impl Direct {
    fn write(&mut self, stream: Stream, line: fmt::Arguments<'_>) {
        let mut text = String::new();
        write_line(&mut text, self.has_timestamps, line);
        self.write_bytes(stream, text.as_bytes());
    }

    fn write_bytes(&mut self, stream: Stream, bytes: &[u8]) {
        let Some(file) = &mut self.files[stream as usize] else {
            self.lost += 1;
            return;
        };
        if let Err((_, error)) = write_whole(file, bytes) {
            self.lost += 1;
            if stream == Stream::Out && error.kind() != io::ErrorKind::BrokenPipe {
                self.failure.get_or_insert_with(|| reason(&error));
            }
        }
    }
}

/// Writes a line and its end, with the time in front if it is to be there.
fn write_line(text: &mut String, has_timestamp: bool, line: fmt::Arguments<'_>) {
    // Writing to a string cannot fail.
    if has_timestamp {
        let _ = write!(text, "{} ", Timestamp(SystemTime::now()));
    }
    let _ = write!(EscapeWriter(text), "{line}");
    text.push('\n');
}
