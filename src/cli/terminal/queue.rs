//! Lines on their way to the two standard streams, in one row.
//!
//! A thread of its own writes them, each to its stream, in the order in which they came. While the
//! streams take what they are given, no line is lost; past [`MAX_UNWRITTEN`] bytes lines are dropped,
//! and the next one written to that stream says how many.

use std::collections::BTreeMap;
use std::fmt::{self, Write as _};
use std::fs::File;
use std::io::{self, Write as _};
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::{Files, Kind, Stream};
use crate::cli::escape::EscapeWriter;

/// Bytes of lines that may wait for the output: some hundred thousand lines.
pub const MAX_UNWRITTEN: usize = 64 << 20;

/// Lines are gathered for this long, so that a busy proxy makes few writes instead of many.
const GATHER: Duration = Duration::from_millis(2);

/// How long the end of the program waits for an output that takes nothing.
const LAST_WRITE: Duration = Duration::from_secs(2);

/// Lines that others can cause without end are counted for this long.
const INTERVAL: Duration = Duration::from_secs(1);

/// Kinds and subjects beyond these are looked through for those whose interval is over.
const MANY_LIMITED: usize = 1000;

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
    writing: bool,
    dropped: u64,
    /// How many of those each stream has not been told of.
    untold: [u64; 2],
    limited: BTreeMap<(Kind, u64), Limited>,
    /// When the next count is to be printed.
    count_due: Option<Instant>,
}

/// What was printed of one kind.
#[derive(Debug)]
struct Limited {
    since: Instant,
    /// Lines that were printed since then.
    printed: u32,
    /// Lines that were not, the last of them, and its stream.
    held_back: u64,
    last: String,
    stream: Stream,
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
        // Without the thread the lines are dropped and counted, and the program goes on.
        let _ = thread::Builder::new().name("terminal".to_owned()).spawn(move || writer.run(files));
        queue
    }

    /// Only whole lines are put in under the lock, so a panic elsewhere leaves it usable.
    fn lock(&self) -> MutexGuard<'_, Unwritten> {
        self.unwritten.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One file for both streams is written to by one of them, with fewer calls.
    fn stream(&self, stream: Stream) -> Stream {
        if self.are_one { Stream::Out } else { stream }
    }

    /// Puts a line at the end.
    pub(super) fn put(&self, stream: Stream, line: fmt::Arguments<'_>) {
        let mut unwritten = self.lock();
        let was_empty = unwritten.text.is_empty();
        unwritten.push(self.stream(stream), line);
        drop(unwritten);
        if was_empty {
            self.filled.notify_one();
        }
    }

    /// Puts a line of this kind and subject at the end, or counts it.
    pub(super) fn put_limited(&self, stream: Stream, key: (Kind, u64), line: fmt::Arguments<'_>) {
        let mut unwritten = self.lock();
        let had_nothing_due = unwritten.text.is_empty() || unwritten.count_due.is_none();
        unwritten.push_limited(self.stream(stream), key, line, Instant::now());
        drop(unwritten);
        if had_nothing_due {
            self.filled.notify_one();
        }
    }

    /// Puts the counts of what was held back at the end.
    pub(super) fn put_counts(&self) {
        self.lock().push_counts(None);
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

    fn run(&self, mut files: Files) {
        let (mut text, mut runs) = (String::new(), Vec::new());
        loop {
            self.wait_for_lines();
            thread::sleep(GATHER);
            let mut unwritten = self.lock();
            std::mem::swap(&mut unwritten.text, &mut text);
            std::mem::swap(&mut unwritten.runs, &mut runs);
            unwritten.writing = true;
            let mut untold = std::mem::take(&mut unwritten.untold);
            drop(unwritten);
            let mut lost = 0;
            let mut begin = 0;
            for (stream, end) in runs.drain(..) {
                let untold = &mut untold[stream as usize];
                let lines = &text.as_bytes()[begin..end];
                begin = end;
                let unwritten_lines = write_lines(&mut files[stream as usize], untold, lines);
                *untold += unwritten_lines;
                lost += unwritten_lines;
            }
            text.clear();
            text.shrink_to(1 << 20);
            runs.shrink_to(1 << 10);
            let mut unwritten = self.lock();
            unwritten.writing = false;
            unwritten.dropped += lost;
            for (all, more) in unwritten.untold.iter_mut().zip(untold) {
                *all += more;
            }
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
            unwritten.push_counts(Some(now));
            if !unwritten.text.is_empty() {
                return;
            }
            unwritten = match unwritten.count_due {
                None => self.filled.wait(unwritten).unwrap_or_else(PoisonError::into_inner),
                Some(due) => {
                    let wait = due.saturating_duration_since(now);
                    let waited = self.filled.wait_timeout(unwritten, wait);
                    waited.unwrap_or_else(PoisonError::into_inner).0
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
        // Writing to a string cannot fail.
        let _ = write!(EscapeWriter(&mut self.text), "{line}");
        self.text.push('\n');
        let end = self.text.len();
        match self.runs.last_mut() {
            Some((last, its_end)) if *last == stream => *its_end = end,
            _ => self.runs.push((stream, end)),
        }
    }

    fn push_limited(
        &mut self,
        stream: Stream,
        key: (Kind, u64),
        line: fmt::Arguments<'_>,
        now: Instant,
    ) {
        if self.limited.len() >= MANY_LIMITED && !self.limited.contains_key(&key) {
            self.limited.retain(|_, limited| !limited.is_over(now));
        }
        let limited = self.limited.entry(key).or_insert_with(|| Limited {
            since: now,
            printed: 0,
            held_back: 0,
            last: String::new(),
            stream,
        });
        if limited.is_over(now) {
            (limited.since, limited.printed) = (now, 0);
        }
        if limited.held_back == 0 && limited.printed < key.0.burst() {
            limited.printed += 1;
            return self.push(stream, line);
        }
        if !key.0.is_counted() {
            return;
        }
        limited.held_back += 1;
        limited.last.clear();
        // Writing to a string cannot fail.
        let _ = write!(EscapeWriter(&mut limited.last), "{line}");
        let due = limited.since + INTERVAL;
        self.count_due = Some(self.count_due.map_or(due, |other| other.min(due)));
    }

    /// Puts what was held back at the end: what is due by `now`, or all of it.
    fn push_counts(&mut self, now: Option<Instant>) {
        if self.count_due.is_none_or(|due| now.is_some_and(|now| now < due)) {
            return;
        }
        let mut all = std::mem::take(&mut self.limited);
        let now = now.unwrap_or_else(|| Instant::now() + INTERVAL);
        for limited in all.values_mut() {
            if limited.held_back > 0 && limited.since + INTERVAL <= now {
                match limited.held_back {
                    1 => self.push(limited.stream, format_args!("{}", limited.last)),
                    count => self.push(
                        limited.stream,
                        format_args!("{} (and {} more like it)", limited.last, count - 1),
                    ),
                }
                (limited.since, limited.printed, limited.held_back) = (now, 1, 0);
            }
        }
        all.retain(|_, limited| !limited.is_over(now));
        let held_back = all.values().filter(|limited| limited.held_back > 0);
        self.count_due = held_back.map(|limited| limited.since + INTERVAL).min();
        self.limited = all;
    }
}

impl Limited {
    /// Whether the next line is printed at once again.
    fn is_over(&self, now: Instant) -> bool {
        self.held_back == 0 && now.saturating_duration_since(self.since) >= INTERVAL
    }
}

/// Whether both streams lead to the same file, as with `2>&1`.
fn are_one(files: &Files) -> bool {
    let [Some(out), Some(err)] = files else { return false };
    let (Ok(out), Ok(err)) = (out.metadata(), err.metadata()) else { return false };
    (out.dev(), out.ino()) == (err.dev(), err.ino())
}

/// Writes these lines after one about the `untold` ones that were lost before, which are none then.
/// Returns how many could not be written.
fn write_lines(file: &mut Option<File>, untold: &mut u64, lines: &[u8]) -> u64 {
    let Some(file) = file else { return count(lines) };
    if *untold > 0 {
        let lost = format!("({untold} lines could not be written here)\n");
        if write_whole(file, lost.as_bytes()).is_err() {
            return count(lines);
        }
        *untold = 0;
    }
    write_whole(file, lines).map_or_else(|(written, _)| count(&lines[written..]), |()| 0)
}

fn count(lines: &[u8]) -> u64 {
    memchr::memchr_iter(b'\n', lines).count() as u64
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
    use super::*;

    const SEVERAL: (Kind, u64) = (Kind::RefusedPacket, 0);

    impl Unwritten {
        fn say(&mut self, key: (Kind, u64), line: &str, now: Instant) {
            self.push_limited(Stream::Err, key, format_args!("{line}"), now);
        }

        fn take(&mut self, now: Instant) -> String {
            self.push_counts(Some(now));
            self.runs.clear();
            std::mem::take(&mut self.text)
        }
    }

    #[test]
    fn of_a_kind_a_line_a_second_is_printed_and_the_others_are_counted() {
        let (mut queue, begin) = (Unwritten::default(), Instant::now());
        let at = |millis| begin + Duration::from_millis(millis);
        for number in 0..5 {
            queue.say(SEVERAL, &format!("line {number}\n"), at(number));
        }
        queue.say((Kind::RefusedPacket, 1), "another subject", at(5));
        queue.say((Kind::LostReply, 0), "another kind", at(5));
        assert_eq!(queue.take(at(999)), "line 0\\n\nanother subject\nanother kind\n");
        assert_eq!(queue.take(at(1000)), "line 4\\n (and 3 more like it)\n");
        queue.say(SEVERAL, "alone", at(1500));
        assert_eq!(queue.take(at(1999)), "");
        assert_eq!(queue.take(at(2000)), "alone\n");
        assert_eq!(queue.count_due, None);
        queue.say(SEVERAL, "after a pause", at(3000));
        assert_eq!(queue.take(at(3000)), "after a pause\n");
    }

    #[test]
    fn what_is_held_back_at_the_end_is_printed_then() {
        let (mut queue, now) = (Unwritten::default(), Instant::now());
        (0..3).for_each(|_| queue.say(SEVERAL, "line", now));
        queue.push_counts(None);
        assert_eq!(queue.take(now), "line\nline (and 1 more like it)\n");
    }

    #[test]
    fn a_server_that_cannot_take_messages_yet_is_said_once_a_second_without_a_count() {
        let (mut queue, now) = (Unwritten::default(), Instant::now());
        (0..50).for_each(|_| queue.say((Kind::Postponed, 7), "line", now));
        queue.push_counts(None);
        assert_eq!(queue.take(now), "line\n");
        queue.say((Kind::Postponed, 7), "line", now + INTERVAL);
        assert_eq!(queue.take(now), "line\n");
    }

    #[test]
    fn subjects_without_end_take_no_memory_for_long() {
        let (mut queue, begin) = (Unwritten::default(), Instant::now());
        for subject in 0..10 * MANY_LIMITED as u64 {
            let now = begin + Duration::from_millis(10 * subject);
            queue.say((Kind::FailedAttempt, subject), "line", now);
            assert!(queue.limited.len() <= MANY_LIMITED);
        }
    }

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
}
