//! How the proxy stops: it serves on for `delay`, then accepts no more messages and waits up to `timeout` for
//! those in flight, then refuses the rest.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Receiver;
use std::sync::{OnceLock, Weak};
use std::thread;
use std::time::{Duration, Instant};

use super::Proxy;
use super::settings::Settings;
use crate::net::lock::lock;

/// Before closing, a connection is read until nothing has come for this long: closing with unread bytes
/// resets it, and the peer loses replies.
pub(super) const QUIET: Duration = Duration::from_secs(5);

/// How often it looks for connections that are idle and can end.
const TICK: Duration = Duration::from_millis(10);

/// When the time is over, the refusals of what was in flight have this long to get away.
const LAST_REPLIES: Duration = Duration::from_millis(200);

/// How far the stop has come.
#[derive(Debug)]
pub(super) struct Stop {
    delay: Duration,
    timeout: Duration,
    begun: OnceLock<Instant>,
    is_over: AtomicBool,
    lost_replies: AtomicBool,
}

impl Stop {
    /// One that has not begun.
    pub(super) fn new(settings: &Settings) -> Self {
        Stop {
            delay: settings.stop_delay,
            timeout: settings.stop_timeout,
            begun: OnceLock::new(),
            is_over: AtomicBool::new(false),
            lost_replies: AtomicBool::new(false),
        }
    }

    /// Whether the proxy was told to stop: nobody should send it more. It may still take what comes.
    pub(super) fn has_begun(&self) -> bool {
        self.begun.get().is_some()
    }

    /// Whether the proxy takes no more.
    pub(super) fn is_draining(&self) -> bool {
        self.has_drained_for(Duration::ZERO)
    }

    /// Whether it has taken no more for at least this long.
    pub(super) fn has_drained_for(&self, time: Duration) -> bool {
        let time = self.delay.saturating_add(time);
        self.begun.get().is_some_and(|begun| begun.elapsed() >= time)
    }

    /// When what is still in flight is refused.
    fn deadline(&self) -> Instant {
        let begun = self.begun.get().copied().unwrap_or_else(Instant::now);
        begun + self.delay + self.timeout
    }

    /// When all replies must have arrived.
    pub(super) fn last_replies_by(&self) -> Instant {
        self.deadline() + LAST_REPLIES
    }

    /// Notes that not all replies were seen to arrive.
    pub(super) fn note_lost_replies(&self) {
        self.lost_replies.store(true, Ordering::Relaxed);
    }

    /// Whether the stop is complete. A connection that ends now does not release its leases.
    pub(super) fn is_over(&self) -> bool {
        self.is_over.load(Ordering::Relaxed)
    }
}

impl Proxy {
    /// Serves until `stop` gets a message (or its sender is gone), and on for
    /// [`stop_delay`](Settings::stop_delay). Then it takes no more connections and messages, finishes what
    /// is in flight, ends its side of each client's connection, and reads until the client ends its own.
    /// Servers stay registered until then. What is still in flight when the time is over is refused.
    /// Returns whether every client's connection ended in time, with all of its replies.
    pub fn run_until(&self, stop: &Receiver<()>) -> bool {
        let _ = stop.recv();
        self.stop.begun.get_or_init(Instant::now);
        thread::sleep(self.stop.delay);
        self.listener.stop();
        let open = self.drain_until(self.stop.deadline());
        // First: capacity that is freed below must not go to a waiting message.
        self.dispatcher.stop();
        // A server that leaves meanwhile is in one of the two, or `retire` refuses its messages.
        let mut servers = self.dispatcher.table.servers();
        servers.extend(lock(&self.retired).iter().filter_map(Weak::upgrade));
        servers.iter().for_each(|server| server.handle.refuse_all());
        let end = Instant::now() + LAST_REPLIES;
        loop {
            // A message that has just come, or failed just before the stop, may have begun to wait.
            self.dispatcher.refuse_waiting();
            let now = Instant::now();
            if open == 0 || now >= end || self.drain_until(now) == 0 {
                break;
            }
        }
        self.stop.is_over.store(true, Ordering::Relaxed);
        self.listener.end_connections();
        self.workers.stop();
        self.dispatcher.background.stop();
        self.say_how_it_ended(open);
        open == 0 && !self.stop.lost_replies.load(Ordering::Relaxed)
    }

    /// Ends the clients' connections to which nothing is owed, until none is open or the time is up. Returns
    /// how many are still open.
    fn drain_until(&self, deadline: Instant) -> usize {
        loop {
            let now = Instant::now();
            let queues: Vec<_> = self.reply_queues().values().filter_map(Weak::upgrade).collect();
            queues.iter().for_each(|replies| replies.end_if_idle(now, QUIET));
            let open = self.listener.drain(TICK);
            if open == 0 || now >= deadline {
                return open;
            }
        }
    }

    fn say_how_it_ended(&self, open: usize) {
        let events = &self.dispatcher.events;
        events.terminal.print_counts();
        if open > 0 {
            events.terminal.warn(format_args!(
                "stopped with {open} connections still busy after {} s (-stop-timeout)",
                self.stop.timeout.as_secs_f64()
            ));
        }
        let totals = events.stats.totals();
        events.terminal.warn(format_args!(
            "stopped after {} messages: {} acked, {} refused",
            totals.messages,
            totals.acks,
            totals.refusals.iter().sum::<u64>()
        ));
    }
}
