//! How often a line is printed that others can cause without end.

use std::collections::BTreeMap;
use std::fmt::{self, Write as _};
use std::time::{Duration, Instant};

use super::Stream;

/// Lines are counted for this long before their number is printed.
pub(super) const INTERVAL: Duration = Duration::from_secs(1);

/// From this many kinds and subjects on, those whose interval is over are removed before another is added.
const MANY: usize = 1000;

/// Lines of these kinds can be caused without end by others. Of each kind, and of each subject that
/// [`Terminal::warn_about`](super::Terminal::warn_about) tells apart, one is printed at once; those
/// that follow within a second are counted, and the last one is printed with their number when the
/// second is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// A packet that is no message was refused.
    RefusedPacket,
    /// A connection broke.
    BrokenConnection,
    /// Replies could not be sent.
    LostReply,
    /// A packet's `payloadsize` is wrong.
    WrongSize,
    /// An attempt at a server failed.
    FailedAttempt,
    /// A server could not take messages just now. What follows within a second is not counted.
    Postponed,
    /// A server's command wrote a line to its standard error.
    CommandOutput,
    /// A server registered.
    Registration,
    /// A server left the table, is ejected, or answers again.
    ServerState,
}

impl Kind {
    /// Lines in a second before they are counted. Only those that may register cause the last kinds,
    /// and a script may start many servers; and what a command says is what somebody wrote it to say.
    fn burst(self) -> u32 {
        match self {
            Kind::CommandOutput | Kind::Registration | Kind::ServerState => 100,
            _ => 1,
        }
    }

    /// Whether it matters how many there were.
    fn is_counted(self) -> bool {
        self != Kind::Postponed
    }

    /// Whether anybody can cause it. It is left out together with the lines about single messages.
    pub(super) fn is_by_anybody(self) -> bool {
        !matches!(self, Kind::Registration | Kind::ServerState)
    }
}

/// What was printed and held back, of each kind and subject.
#[derive(Debug, Default)]
pub(super) struct Limiter {
    all: BTreeMap<(Kind, u64), Limited>,
    due: Option<Instant>,
}

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

impl Limiter {
    /// When the next count is to be printed.
    pub(super) fn due(&self) -> Option<Instant> {
        self.due
    }

    /// Returns whether this line is to be printed now; otherwise it is counted.
    pub(super) fn admits(
        &mut self,
        stream: Stream,
        key: (Kind, u64),
        line: fmt::Arguments<'_>,
        now: Instant,
    ) -> bool {
        if self.all.len() >= MANY && !self.all.contains_key(&key) {
            self.all.retain(|_, limited| !limited.is_over(now));
        }
        let limited = self.all.entry(key).or_insert_with(|| Limited {
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
            return true;
        }
        if key.0.is_counted() {
            limited.held_back += 1;
            limited.last.clear();
            // Writing to a string cannot fail.
            let _ = write!(limited.last, "{line}");
            let due = limited.since + INTERVAL;
            self.due = Some(self.due.map_or(due, |other| other.min(due)));
        }
        false
    }

    /// Returns the lines, with their counts, that are due by `now`.
    pub(super) fn take_due(&mut self, now: Instant) -> Vec<(Stream, String)> {
        let mut lines = Vec::new();
        if self.due.is_none_or(|due| now < due) {
            return lines;
        }
        for limited in self.all.values_mut() {
            if limited.held_back > 0 && limited.since + INTERVAL <= now {
                let mut line = std::mem::take(&mut limited.last);
                if limited.held_back > 1 {
                    line += &format!(" (and {} more like it)", limited.held_back - 1);
                }
                lines.push((limited.stream, line));
                (limited.since, limited.printed, limited.held_back) = (now, 1, 0);
            }
        }
        self.all.retain(|_, limited| !limited.is_over(now));
        let held_back = self.all.values().filter(|limited| limited.held_back > 0);
        self.due = held_back.map(|limited| limited.since + INTERVAL).min();
        lines
    }
}

impl Limited {
    /// Whether the next line is printed at once again.
    fn is_over(&self, now: Instant) -> bool {
        self.held_back == 0 && now.saturating_duration_since(self.since) >= INTERVAL
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEVERAL: (Kind, u64) = (Kind::RefusedPacket, 0);

    #[derive(Default)]
    struct Printed(Limiter, String);

    impl Printed {
        fn say(&mut self, key: (Kind, u64), line: &str, now: Instant) {
            if self.0.admits(Stream::Err, key, format_args!("{line}"), now) {
                self.1 += &format!("{line}\n");
            }
        }

        fn take(&mut self, now: Instant) -> String {
            let due = self.0.take_due(now);
            due.into_iter().for_each(|(_, line)| self.1 += &(line + "\n"));
            std::mem::take(&mut self.1)
        }
    }

    #[test]
    fn of_a_kind_a_line_a_second_is_printed_and_the_others_are_counted() {
        let (mut printed, begin) = (Printed::default(), Instant::now());
        let at = |millis| begin + Duration::from_millis(millis);
        for number in 0..5 {
            printed.say(SEVERAL, &format!("line\t{number}"), at(number));
        }
        printed.say((Kind::RefusedPacket, 1), "another subject", at(5));
        printed.say((Kind::LostReply, 0), "another kind", at(5));
        assert_eq!(printed.take(at(999)), "line\t0\nanother subject\nanother kind\n");
        assert_eq!(printed.take(at(1000)), "line\t4 (and 3 more like it)\n");
        printed.say(SEVERAL, "alone", at(1500));
        assert_eq!(printed.take(at(1999)), "");
        assert_eq!(printed.take(at(2000)), "alone\n");
        assert_eq!(printed.0.due(), None);
        printed.say(SEVERAL, "after a pause", at(3000));
        assert_eq!(printed.take(at(3000)), "after a pause\n");
    }

    #[test]
    fn what_is_held_back_at_the_end_is_printed_then() {
        let (mut printed, now) = (Printed::default(), Instant::now());
        (0..3).for_each(|_| printed.say(SEVERAL, "line", now));
        assert_eq!(printed.take(now + INTERVAL), "line\nline (and 1 more like it)\n");
    }

    #[test]
    fn a_server_that_cannot_take_messages_yet_is_said_once_a_second_without_a_count() {
        let (mut printed, now) = (Printed::default(), Instant::now());
        (0..50).for_each(|_| printed.say((Kind::Postponed, 7), "line", now));
        assert_eq!(printed.take(now + INTERVAL), "line\n");
        printed.say((Kind::Postponed, 7), "line", now + INTERVAL);
        assert_eq!(printed.take(now), "line\n");
    }

    #[test]
    fn subjects_without_end_take_no_memory_for_long() {
        let (mut printed, begin) = (Printed::default(), Instant::now());
        for subject in 0..10 * MANY as u64 {
            let now = begin + Duration::from_millis(10 * subject);
            printed.say((Kind::FailedAttempt, subject), "line", now);
            assert!(printed.0.all.len() <= MANY);
        }
    }
}
