//! The proxy's counters. The data path adds to them; the status documents read them. No I/O, no
//! text formats.

mod histogram;
mod latest;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::cli::escape::Escaped;
use crate::net::lock::lock;
use crate::protocol::Code;

pub use histogram::Histogram;
pub use latest::{Latest, LatestMessages, unix_ms};

/// The most servers with their own counts, including servers that have left.
const MAX_SERVERS: usize = 2000;

/// The most policies with their own refusal counts.
const MAX_POLICIES: usize = 1000;

/// A count that only grows. Release and acquire: a thread that sees a message's outcome counted
/// also sees the message counted.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `more`.
    pub fn add(&self, more: usize) {
        self.0.fetch_add(more as u64, Ordering::Release);
    }

    /// Returns the count.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Acquire)
    }
}

/// A kind of a server's failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FailureKind {
    /// It could not be connected to.
    Unreachable,
    /// The connection ended before an ack.
    Broken,
    /// It sent no ack in time.
    Timeout,
    /// Its answer was not an ack for the message.
    BadAck,
}

/// The names of [`FailureKind`]s, in order.
pub const FAILURE_KINDS: [&str; 4] = ["unreachable", "broken", "timeout", "bad-ack"];

/// The counts of one server, over all its registrations.
#[derive(Debug, Default)]
pub struct ServerStats {
    /// Messages sent to it, retries included.
    pub sent: Counter,
    /// Messages that it acked.
    pub acked: Counter,
    /// Messages sent to it that ended without its ack.
    pub lost: Counter,
    /// Times from sending a message to its ack.
    pub ack_times: Histogram,
    failures: [Counter; FAILURE_KINDS.len()],
    last_error: Mutex<Option<(String, Instant)>>,
}

impl ServerStats {
    /// Returns how many messages sent to it have no outcome yet.
    pub fn in_flight(&self) -> u64 {
        // Outcomes first: read later, they could exceed the messages sent.
        let ended = self.acked.get() + self.lost.get();
        self.sent.get().saturating_sub(ended)
    }

    /// Counts a failure and keeps its text.
    pub fn add_failure(&self, kind: FailureKind, error: &str) {
        self.failures[kind as usize].add(1);
        *lock(&self.last_error) = Some((Escaped(error).to_string(), Instant::now()));
    }

    /// Returns the failures by kind.
    pub fn failures(&self) -> impl Iterator<Item = (&'static str, u64)> {
        FAILURE_KINDS.into_iter().zip(self.failures.iter().map(Counter::get))
    }

    /// Returns the last failure's text, and how long ago it was.
    pub fn last_error(&self) -> Option<(String, Duration)> {
        lock(&self.last_error).as_ref().map(|(text, at)| (text.clone(), at.elapsed()))
    }
}

/// The messages' counts at one moment, which balance: `messages` is the sum of the others.
#[derive(Debug, Clone, Copy)]
pub struct Totals {
    /// Messages accepted.
    pub messages: u64,
    /// Messages acked.
    pub acks: u64,
    /// Messages refused, by code.
    pub refusals: [u64; Code::ALL.len()],
    /// Messages without an outcome yet.
    pub in_flight: u64,
}

/// The proxy's counts.
#[derive(Debug, Default)]
pub struct Stats {
    /// Messages accepted.
    pub messages: Counter,
    /// Messages acked.
    pub acks: Counter,
    /// Messages sent to another server after a failure.
    pub retries: Counter,
    /// Ejections of servers.
    pub ejections: Counter,
    /// Replies that could not be sent to their client.
    pub replies_lost: Counter,
    /// Registrations, without renewals.
    pub registrations: Counter,
    /// Renewals of registrations.
    pub renewals: Counter,
    /// Messages refused, by code.
    pub refusals: [Counter; Code::ALL.len()],
    /// Other packets refused, by code.
    pub packet_refusals: [Counter; Code::ALL.len()],
    servers: Mutex<BTreeMap<(String, String), Arc<ServerStats>>>,
    /// Acks of servers whose own counts were dropped.
    forgotten_acks: AtomicU64,
    policy_refusals: Mutex<BTreeMap<(String, &'static str), u64>>,
    /// The latest messages, if somebody will look at them.
    pub latest: Option<LatestMessages>,
}

impl Stats {
    /// Returns counts of zero. Keeps the latest messages only with `keep_latest`.
    pub fn new(keep_latest: bool) -> Self {
        let latest = keep_latest.then(LatestMessages::new);
        Stats { latest, ..Stats::default() }
    }

    /// Returns the messages' counts at this moment.
    pub fn totals(&self) -> Totals {
        // Outcomes first: read later, they could exceed the messages accepted.
        let acks = self.acks.get();
        let refusals = self.refusals.each_ref().map(Counter::get);
        let messages = self.messages.get();
        let ended = acks + refusals.iter().sum::<u64>();
        Totals { messages, acks, refusals, in_flight: messages.saturating_sub(ended) }
    }

    /// Returns the counts of a server; the same ones when it registers again.
    pub fn server(&self, policy: &str, id: &str) -> Arc<ServerStats> {
        let mut servers = lock(&self.servers);
        if servers.len() >= MAX_SERVERS {
            // A server in the table or with messages in flight holds a reference to its counts.
            let idle = servers.iter().find(|(_, stats)| Arc::strong_count(stats) == 1);
            if let Some(key) = idle.map(|(key, _)| key.clone())
                && let Some(stats) = servers.remove(&key)
            {
                self.forgotten_acks.fetch_add(stats.acked.get(), Ordering::Relaxed);
            }
        }
        Arc::clone(servers.entry((policy.to_owned(), id.to_owned())).or_default())
    }

    /// Returns all servers' counts, by policy and id.
    pub fn servers(&self) -> Vec<((String, String), Arc<ServerStats>)> {
        lock(&self.servers).iter().map(|(key, stats)| (key.clone(), Arc::clone(stats))).collect()
    }

    /// Returns the acks of servers whose own counts were dropped.
    pub fn forgotten_acks(&self) -> u64 {
        self.forgotten_acks.load(Ordering::Relaxed)
    }

    /// Counts a message's refusal. A policy without servers gets no count of its own, because
    /// clients could name any number of those.
    pub fn refuse(&self, policy: &str, code: Code) {
        self.refusals[code as usize].add(1);
        let policy = if code == Code::NoServer { "" } else { policy };
        let mut refusals = lock(&self.policy_refusals);
        let is_full = refusals.len() >= MAX_POLICIES * Code::ALL.len();
        let policy = if is_full { String::new() } else { policy.to_owned() };
        *refusals.entry((policy, code.name())).or_default() += 1;
    }

    /// Returns the refusals of messages by policy and code.
    pub fn policy_refusals(&self) -> Vec<((String, &'static str), u64)> {
        lock(&self.policy_refusals).iter().map(|(key, count)| (key.clone(), *count)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn totals_balance_while_they_grow() {
        let stats = Stats::new(false);
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| {
                for _ in 0..200_000 {
                    stats.messages.add(1);
                    stats.acks.add(1);
                    stats.messages.add(1);
                    stats.refuse("P", Code::Timeout);
                }
            });
            while !writer.is_finished() {
                let Totals { messages, acks, refusals, in_flight } = stats.totals();
                assert_eq!(messages, acks + refusals.iter().sum::<u64>() + in_flight);
            }
        });
        assert_eq!(stats.totals().in_flight, 0);
    }

    #[test]
    fn counts_of_servers_that_left_make_room_and_their_acks_are_not_lost() {
        let stats = Stats::new(false);
        let held = stats.server("P", "held");
        for id in 0..MAX_SERVERS + 10 {
            stats.server("P", &id.to_string()).acked.add(1);
        }
        held.acked.add(1);
        let kept: u64 = stats.servers().iter().map(|(_, server)| server.acked.get()).sum();
        assert_eq!(stats.servers().len(), MAX_SERVERS);
        assert_eq!(kept + stats.forgotten_acks(), MAX_SERVERS as u64 + 11);
        assert!(stats.servers().iter().any(|((_, id), _)| id == "held"));
    }
}
