//! The latest messages, for the status page.

use std::collections::VecDeque;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Instant, SystemTime};

use serde::Serialize;

use crate::net::lock::lock;

/// How many of the latest messages are kept.
const MAX_LATEST: usize = 50;

/// Keeping a message costs a tenth of forwarding it, so on average at most one is kept per
/// interval, in microseconds. Under load most messages change nothing and take no lock.
const INTERVAL: u64 = 1000;

/// A message that has ended, for the status page.
#[derive(Debug, Clone, Serialize)]
pub struct Latest {
    /// Its number, in the order in which messages ended.
    pub number: u64,
    /// When it ended, in milliseconds since 1970.
    pub unix_ms: u64,
    /// The client's id, shortened and escaped.
    pub client: String,
    /// The policy, shortened and escaped.
    pub policy: String,
    /// The server that acked it.
    pub server: Option<String>,
    /// `ack`, or the refusal's code.
    pub outcome: &'static str,
    /// The time from its arrival to its end, in milliseconds.
    pub ms: f64,
    /// How many servers it was tried at.
    pub tries: usize,
    /// The payload, shortened and escaped.
    pub payload: String,
}

/// The latest of the messages that have ended.
#[derive(Debug)]
pub struct LatestMessages {
    started: Instant,
    /// Messages ended.
    ended: AtomicU64,
    messages: Mutex<VecDeque<Latest>>,
    /// The theoretical arrival time of the rate limit (the generic cell rate algorithm), in
    /// microseconds since the start.
    next_kept: AtomicU64,
}

impl LatestMessages {
    /// Returns none yet.
    pub fn new() -> Self {
        LatestMessages {
            started: Instant::now(),
            ended: AtomicU64::new(0),
            messages: Mutex::default(),
            next_kept: AtomicU64::new(0),
        }
    }

    /// Counts a message that has ended and that arrived at `arrived`. Returns its number if it is to be kept,
    /// which is as often as the rate limit allows.
    pub fn admits(&self, arrived: Instant) -> Option<u64> {
        let number = self.ended.fetch_add(1, Ordering::Relaxed) + 1;
        let at = arrived.saturating_duration_since(self.started).as_micros() as u64;
        let admitted = self.next_kept.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |next| {
            (next <= at + INTERVAL * MAX_LATEST as u64).then(|| next.max(at) + INTERVAL)
        });
        admitted.is_ok().then_some(number)
    }

    /// Keeps one that was admitted.
    pub fn keep(&self, message: Latest) {
        let mut messages = lock(&self.messages);
        messages.truncate(MAX_LATEST - 1);
        messages.push_front(message);
    }

    /// Returns them, the newest first.
    pub fn all(&self) -> Vec<Latest> {
        lock(&self.messages).iter().cloned().collect()
    }
}

/// Returns the milliseconds since 1970; 0 for earlier times.
pub fn unix_ms(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_millis() as u64
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// Counts a message, and keeps it if it is to be. Returns whether it was.
    fn remember(latest: &LatestMessages, arrived: Instant) -> bool {
        let number = latest.admits(arrived);
        let kept = number.map(|number| Latest {
            number,
            unix_ms: 0,
            client: String::new(),
            policy: String::new(),
            payload: String::new(),
            server: None,
            outcome: "ack",
            ms: 0.0,
            tries: 1,
        });
        kept.map(|message| latest.keep(message)).is_some()
    }

    #[test]
    fn a_burst_is_kept_whole_and_a_flood_in_part() {
        let latest = LatestMessages::new();
        let now = Instant::now();
        let kept_of =
            |messages: usize, at: Instant| (0..messages).filter(|_| remember(&latest, at)).count();
        assert_eq!(kept_of(MAX_LATEST, now), MAX_LATEST);
        assert_eq!(kept_of(1000, now), 1);
        assert_eq!(kept_of(1000, now + Duration::from_millis(10)), 10);
        assert_eq!(kept_of(MAX_LATEST, now + Duration::from_secs(1)), MAX_LATEST);
        assert_eq!(latest.all()[0].number, 2 * MAX_LATEST as u64 + 2000);
    }

    #[test]
    fn messages_that_end_at_once_have_numbers_of_their_own() {
        let latest = LatestMessages::new();
        let now = Instant::now();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..2000 {
                        remember(&latest, now);
                    }
                });
            }
        });
        let mut numbers: Vec<_> = latest.all().iter().map(|message| message.number).collect();
        numbers.sort_unstable();
        numbers.dedup();
        assert_eq!(numbers.len(), MAX_LATEST);
    }
}
