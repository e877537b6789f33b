//! Lines on their way to the two standard streams, in one row.
//!
//! A thread of its own writes them, each to its stream, in the order in which they came. While the
//! streams take what they are given, no line is lost; past [`MAX_UNWRITTEN`] bytes lines are dropped,
//! and the next one written to that stream says how many.

use std::fmt;
use std::fs::File;
use std::io::{self, Write as _};
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use super::limiter::{INTERVAL, Kind, Limiter};
use super::{Files, Stream, write_line};
use crate::net::lock::{lock, whole};

/// Bytes of lines that may wait for the output: some hundred thousand lines.
const MAX_UNWRITTEN: usize = 64 << 20;

/// Lines are gathered for this long, so that a busy proxy makes few writes instead of many.
const GATHER: Duration = Duration::from_millis(2);

/// How long the end of the program waits for an output that takes nothing.
const LAST_WRITE: Duration = Duration::from_secs(2);

#[derive(Debug)]
pub(super) struct Queue {
    unwritten: Mutex<Unwritten>,
    /// There is something to write, or will be.
    filled: Condvar,
    /// There is nothing left to write.
    emptied: Condvar,
    /// Both streams lead to the same file.
    are_one: bool,
}

#[derive(Debug, Default)]
struct Unwritten {
    text: String,
    /// Where the lines of one stream end in the text, and those of the other begin.
    runs: Vec<(Stream, usize)>,
    has_timestamps: bool,
    writing: bool,
    dropped: u64,
    /// How many of those each stream's [`Sink`] does not know of yet.
    untold: [u64; 2],
    limiter: Limiter,
}

impl Queue {
    /// Starts to write to these files.
    pub(super) fn start(files: Files) -> Arc<Self> {
        let queue = Arc::new(Queue {
            unwritten: Mutex::default(),
            filled: Condvar::new(),
            emptied: Condvar::new(),
            are_one: are_one(&files),
        });
        let writer = Arc::clone(&queue);
        // Without the thread nothing is written, and the program goes on: lines stay here up to a limit, and
        // further ones are dropped and counted.
        let _ = thread::Builder::new().name("terminal".to_owned()).spawn(move || writer.run(files));
        queue
    }

    fn lock(&self) -> MutexGuard<'_, Unwritten> {
        lock(&self.unwritten)
    }

    /// One file for both streams is written to by one of them, with fewer calls.
    fn stream(&self, stream: Stream) -> Stream {
        if self.are_one { Stream::Out } else { stream }
    }

    pub(super) fn set_timestamps(&self, has_timestamps: bool) {
        self.lock().has_timestamps = has_timestamps;
    }

    /// Puts a line at the end, or counts it where the limit for its kind and subject is reached.
    pub(super) fn put(&self, stream: Stream, limit: Option<(Kind, u64)>, line: fmt::Arguments<'_>) {
        let mut unwritten = self.lock();
        let had_nothing_due =
            unwritten.text.is_empty() || limit.is_some() && unwritten.limiter.due().is_none();
        let stream = self.stream(stream);
        let limiter = &mut unwritten.limiter;
        if limit.is_none_or(|key| limiter.admits(stream, key, line, Instant::now())) {
            unwritten.push(stream, line);
        }
        drop(unwritten);
        if had_nothing_due {
            self.filled.notify_one();
        }
    }

    /// Puts the counts of what was held back at the end.
    pub(super) fn put_counts(&self) {
        self.lock().push_counts(Instant::now() + INTERVAL);
        self.filled.notify_one();
    }

    pub(super) fn dropped(&self) -> u64 {
        self.lock().dropped
    }

    /// Waits until all lines and counts are written, but not for an output that takes nothing.
    pub(super) fn flush(&self) {
        self.put_counts();
        let unwritten = self.lock();
        // Past the limit the program ends without its last lines: nobody takes them.
        drop(self.emptied.wait_timeout_while(unwritten, LAST_WRITE, |unwritten| {
            unwritten.writing || !unwritten.text.is_empty()
        }));
    }

    fn run(&self, files: Files) {
        let mut sinks = files.map(|file| Sink { file, untold: 0 });
        let (mut text, mut runs) = (String::new(), Vec::new());
        loop {
            self.wait_for_lines();
            thread::sleep(GATHER);
            let mut unwritten = self.lock();
            std::mem::swap(&mut unwritten.text, &mut text);
            std::mem::swap(&mut unwritten.runs, &mut runs);
            unwritten.writing = true;
            for (sink, untold) in sinks.iter_mut().zip(&mut unwritten.untold) {
                sink.untold += std::mem::take(untold);
            }
            let has_timestamps = unwritten.has_timestamps;
            drop(unwritten);
            let (mut lost, mut begin) = (0, 0);
            for (stream, end) in runs.drain(..) {
                let lines = &text.as_bytes()[begin..end];
                lost += sinks[stream as usize].write(lines, has_timestamps);
                begin = end;
            }
            text.clear();
            text.shrink_to(1 << 20);
            runs.shrink_to(1 << 10);
            let mut unwritten = self.lock();
            unwritten.writing = false;
            unwritten.dropped += lost;
            if unwritten.text.is_empty() {
                self.emptied.notify_all();
            }
        }
    }

    /// Waits until there are lines, and turns counts that are due into such.
    fn wait_for_lines(&self) {
        let mut unwritten = self.lock();
        loop {
            let now = Instant::now();
            unwritten.push_counts(now);
            if !unwritten.text.is_empty() {
                return;
            }
            unwritten = match unwritten.limiter.due() {
                None => whole(self.filled.wait(unwritten)),
                Some(due) => {
                    let wait = due.saturating_duration_since(now);
                    let waited = self.filled.wait_timeout(unwritten, wait);
                    whole(waited).0
                }
            };
        }
    }
}

impl Unwritten {
    fn push(&mut self, stream: Stream, line: fmt::Arguments<'_>) {
        if self.text.len() >= MAX_UNWRITTEN {
            self.dropped += 1;
            self.untold[stream as usize] += 1;
            return;
        }
        // Under the lock, so that the times are in order, too.
        write_line(&mut self.text, self.has_timestamps, line);
        let end = self.text.len();
        match self.runs.last_mut() {
            Some((last, its_end)) if *last == stream => *its_end = end,
            _ => self.runs.push((stream, end)),
        }
    }

    /// Puts the counts at the end that are due by `now`.
    fn push_counts(&mut self, now: Instant) {
        for (stream, line) in self.limiter.take_due(now) {
            self.push(stream, format_args!("{line}"));
        }
    }
}

/// Whether both streams lead to one file. Opened twice (`> log 2> log`), each has its own offset: written to
/// through both, they would overwrite each other.
fn are_one(files: &Files) -> bool {
    let [Some(out), Some(err)] = files else { return false };
    let (Ok(out), Ok(err)) = (out.metadata(), err.metadata()) else { return false };
    (out.dev(), out.ino()) == (err.dev(), err.ino())
}

/// Where the lines of one stream go.
struct Sink {
    file: Option<File>,
    /// How many lines were lost that it was not told of.
    untold: u64,
}

impl Sink {
    /// Writes these lines, after one about those that were lost before. Returns how many are lost now.
    fn write(&mut self, lines: &[u8], has_timestamps: bool) -> u64 {
        let written = self.try_write(lines, has_timestamps);
        let lost = memchr::memchr_iter(b'\n', &lines[written..]).count() as u64;
        self.untold += lost;
        lost
    }

    /// Returns how many bytes of the lines were written.
    fn try_write(&mut self, lines: &[u8], has_timestamps: bool) -> usize {
        let Some(file) = &mut self.file else { return 0 };
        if self.untold > 0 {
            let mut text = String::new();
            let line = format_args!("({} lines could not be written here)", self.untold);
            write_line(&mut text, has_timestamps, line);
            if write_whole(file, text.as_bytes()).is_err() {
                return 0;
            }
            self.untold = 0;
        }
        write_whole(file, lines).map_or_else(|(written, _)| written, |()| lines.len())
    }
}

/// Writes all of these bytes, however long that takes. Fails with how many were written, and why no
/// more.
pub(super) fn write_whole(file: &mut File, bytes: &[u8]) -> Result<(), (usize, io::Error)> {
    let mut written = 0;
    while written < bytes.len() {
        match file.write(&bytes[written..]) {
            Ok(0) => return Err((written, io::ErrorKind::WriteZero.into())),
            Ok(some) => written += some,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // A terminal that some other program set not to wait.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => thread::sleep(10 * GATHER),
            Err(error) => return Err((written, error)),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::fd::OwnedFd;

    use super::*;

    #[test]
    fn lines_of_both_streams_keep_their_order_and_what_is_too_much_is_counted() {
        let mut queue = Unwritten::default();
        for (stream, line) in [(Stream::Out, "a"), (Stream::Out, "b"), (Stream::Err, "c")] {
            queue.push(stream, format_args!("{line}"));
        }
        queue.push(Stream::Out, format_args!("d"));
        assert_eq!(queue.text, "a\nb\nc\nd\n");
        assert_eq!(queue.runs, [(Stream::Out, 4), (Stream::Err, 6), (Stream::Out, 8)]);
        queue.text = "x".repeat(MAX_UNWRITTEN);
        queue.push(Stream::Err, format_args!("too much"));
        assert_eq!((queue.dropped, queue.untold), (1, [0, 1]));
    }

    #[test]
    fn a_stream_is_told_how_many_lines_it_has_lost() {
        let full = File::options().write(true).open("/dev/full").unwrap();
        let mut sink = Sink { file: Some(full), untold: 1 };
        assert_eq!(sink.write(b"a\nb\n", false), 2);
        let (mut reader, writer) = io::pipe().unwrap();
        sink.file = Some(OwnedFd::from(writer).into());
        assert_eq!(sink.write(b"c\n", false), 0);
        assert_eq!(sink.write(b"d\n", false), 0);
        drop(sink);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "(3 lines could not be written here)\nc\nd\n");
    }
}
