//! The lines that each role prints, and where they go. Nothing else prints.
//!
//! A line is put into a buffer and written by a thread of its own, so that a slow terminal, a full
//! disk or a closed pipe never makes a message wait. While the output takes what it is given, no
//! line is lost; past [`MAX_UNWRITTEN`] bytes lines are dropped, and the next line written says how
//! many.

use std::fmt::{self, Write as _};
use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::AsFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use super::escape::EscapeWriter;

/// Bytes of lines that may wait for the output: some hundred thousand lines.
pub const MAX_UNWRITTEN: usize = 64 << 20;

/// Lines are gathered for this long, so that a busy proxy makes few writes instead of many.
const GATHER: Duration = Duration::from_millis(2);

/// How long the end of the program waits for an output that takes nothing.
const LAST_WRITE: Duration = Duration::from_secs(2);

/// A role's output: its lines, and its warnings with the role's name in front.
#[derive(Debug, Clone)]
pub struct Terminal {
    role: &'static str,
    prefix: &'static str,
    quiet: bool,
    out: Arc<Sink>,
    err: Arc<Sink>,
}

impl Terminal {
    /// Standard output for the lines, standard error for the warnings of `role`. `quiet` leaves
    /// out the lines about single messages.
    pub fn new(role: &'static str, quiet: bool) -> Self {
        let out = io::stdout().as_fd().try_clone_to_owned();
        let err = io::stderr().as_fd().try_clone_to_owned();
        Terminal {
            role,
            prefix: "",
            quiet,
            out: Sink::start(out.ok().map(File::from)),
            err: Sink::start(err.ok().map(File::from)),
        }
    }

    /// Another role's output in the same process: the same sinks, `prefix` in front of each line.
    pub fn beside(&self, role: &'static str, prefix: &'static str) -> Self {
        Terminal { role, prefix, ..self.clone() }
    }

    /// Prints a line about the role itself.
    pub fn line(&self, line: fmt::Arguments<'_>) {
        self.out.put(format_args!("{}{line}", self.prefix));
    }

    /// Prints a line about a single message, unless that was left out.
    pub fn message(&self, line: fmt::Arguments<'_>) {
        if !self.quiet {
            self.line(line);
        }
    }

    /// Whether lines about single messages are left out.
    pub fn quiet(&self) -> bool {
        self.quiet
    }

    /// Prints a warning about a single message, unless that was left out.
    pub fn warn_message(&self, warning: fmt::Arguments<'_>) {
        if !self.quiet {
            self.warn(warning);
        }
    }

    /// Prints a warning or a failure, on standard error.
    pub fn warn(&self, warning: fmt::Arguments<'_>) {
        self.err.put(format_args!("{}: {warning}", self.role));
    }

    /// Prints a line on standard error as it is.
    pub fn error_line(&self, line: &str) {
        self.err.put(format_args!("{line}"));
    }

    /// Lines that could not be written so far.
    pub fn dropped(&self) -> u64 {
        self.out.lock().dropped + self.err.lock().dropped
    }

    /// Waits until all lines are written, but not for an output that takes nothing.
    pub fn flush(&self) {
        self.out.flush();
        self.err.flush();
    }
}

/// Lines on their way to one output.
#[derive(Debug)]
struct Sink {
    unwritten: Mutex<Unwritten>,
    /// There is something to write.
    filled: Condvar,
    /// There is nothing left to write.
    emptied: Condvar,
}

#[derive(Debug, Default)]
struct Unwritten {
    text: String,
    writing: bool,
    dropped: u64,
    /// How many of those the output has not been told of.
    untold: u64,
}

impl Sink {
    fn start(output: Option<File>) -> Arc<Self> {
        let sink = Arc::new(Sink {
            unwritten: Mutex::default(),
            filled: Condvar::new(),
            emptied: Condvar::new(),
        });
        let writer = Arc::clone(&sink);
        if let Some(output) = output {
            // Without the thread the lines are dropped and counted, and the program goes on.
            let _ = thread::Builder::new()
                .name("terminal".to_owned())
                .spawn(move || writer.run(output));
        }
        sink
    }

    /// Only whole lines are put in under the lock, so a panic elsewhere leaves it usable.
    fn lock(&self) -> MutexGuard<'_, Unwritten> {
        self.unwritten.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn put(&self, line: fmt::Arguments<'_>) {
        let mut unwritten = self.lock();
        if unwritten.text.len() >= MAX_UNWRITTEN {
            unwritten.dropped += 1;
            unwritten.untold += 1;
            return;
        }
        let was_empty = unwritten.text.is_empty();
        // Writing to a string cannot fail.
        let _ = write!(EscapeWriter(&mut unwritten.text), "{line}");
        unwritten.text.push('\n');
        drop(unwritten);
        if was_empty {
            self.filled.notify_one();
        }
    }

    fn run(&self, mut output: File) {
        let mut text = String::new();
        loop {
            let unwritten = self.lock();
            let unwritten =
                self.filled.wait_while(unwritten, |unwritten| unwritten.text.is_empty());
            drop(unwritten);
            thread::sleep(GATHER);
            let mut unwritten = self.lock();
            std::mem::swap(&mut unwritten.text, &mut text);
            unwritten.writing = true;
            let untold = std::mem::take(&mut unwritten.untold);
            drop(unwritten);
            let lost = match write_whole(&mut output, untold, &text) {
                Ok(()) => 0,
                Err(written) => lines(&text.as_bytes()[written..]) + untold,
            };
            text.clear();
            text.shrink_to(1 << 20);
            let mut unwritten = self.lock();
            unwritten.writing = false;
            unwritten.dropped += lost.saturating_sub(untold);
            unwritten.untold += lost;
            if unwritten.text.is_empty() {
                self.emptied.notify_all();
            }
        }
    }

    fn flush(&self) {
        // Past the limit the program ends without its last lines: nobody takes them.
        drop(self.emptied.wait_timeout_while(self.lock(), LAST_WRITE, |unwritten| {
            unwritten.writing || !unwritten.text.is_empty()
        }));
    }
}

fn lines(text: &[u8]) -> u64 {
    memchr::memchr_iter(b'\n', text).count() as u64
}

/// Writes the text, after a line about the `untold` ones lost before. Fails with how much of the
/// text was written.
fn write_whole(output: &mut File, untold: u64, text: &str) -> Result<(), usize> {
    if untold > 0 {
        let lost = format!("({untold} lines could not be written here)\n");
        output.write_all(lost.as_bytes()).map_err(|_| 0_usize)?;
    }
    let mut written = 0;
    while written < text.len() {
        match output.write(&text.as_bytes()[written..]) {
            Ok(0) => return Err(written),
            Ok(some) => written += some,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // A terminal that some other program set not to wait.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => thread::sleep(10 * GATHER),
            Err(_) => return Err(written),
        }
    }
    Ok(())
}
