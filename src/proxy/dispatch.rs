//! Dispatch: select a server for each message, hand the message over, and handle failures.
//!
//! [`mod@rule`] decides for each failure whether it counts against the server and what happens to the
//! message; [`retry`] carries that out; [`refusals`] words the refusal. Nothing here blocks or knows sockets:
//! an implementation of [`Deliver`] delivers messages to one server and reports back through
//! [`Dispatcher::acked`] and [`Dispatcher::failed`].

#[cfg(test)]
mod model;
mod refusals;
mod retry;
mod rule;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::events::{Delivery, Events};
use super::in_flight::InFlight;
use super::settings::Settings;
use super::stats::ServerStats;
use super::table::{Ready, Selected, Server, Table};
use crate::net::background::Background;
use crate::protocol::Code;
use refusals::{no_server, refuse};

pub use rule::AttemptError;

/// A message's remaining time is split among at most this many servers without a lease.
const MAX_SHARES: u32 = 3;

/// Delivers messages to one server.
pub trait Deliver: AsRef<ServerStats> + Sized + Send + Sync + 'static {
    /// Delivers messages to `server`, whose backend this is. Never waits. Each of them comes back through
    /// [`Dispatcher::acked`] or [`Dispatcher::failed`].
    fn deliver(
        server: &Arc<Server<Self>>,
        messages: Vec<InFlight>,
        dispatcher: &Arc<Dispatcher<Self>>,
    );

    /// Called when the server has failed. Takes the messages that are queued for it, and resets its latency
    /// estimate.
    fn take_queued_on_failure(&self) -> Vec<InFlight>;
}

/// Brings each message to a server of the table, and makes sure that it is answered.
#[derive(Debug)]
pub struct Dispatcher<B> {
    /// The switching table.
    pub table: Table<B, InFlight>,
    /// Prints and counts what happens.
    pub events: Arc<Events>,
    /// Limits.
    pub settings: Arc<Settings>,
    /// Runs the timers.
    pub background: Arc<Background>,
    /// Set by [`stop`](Self::stop).
    pub has_stopped: AtomicBool,
}

impl<B: Deliver> Dispatcher<B> {
    /// Dispatches the messages of one burst: selects a server for each, and hands them over.
    pub fn dispatch(self: &Arc<Self>, messages: Vec<InFlight>) {
        let now = Instant::now();
        let mut groups: Vec<(Arc<Server<B>>, Vec<InFlight>)> = Vec::new();
        let mut waiting = Vec::new();
        for selected in self.table.select(messages, now) {
            match selected {
                Selected::Server(message, server) => {
                    match groups.iter_mut().find(|(other, _)| Arc::ptr_eq(other, &server)) {
                        Some((_, group)) => group.push(message),
                        None => groups.push((server, vec![message])),
                    }
                }
                Selected::Waits(policy) => waiting.push(policy),
                Selected::Nobody(mut message) => {
                    // The session sends it, with the others of its burst.
                    message.refuse(Code::NoServer, no_server(&message));
                }
            }
        }
        for (server, group) in groups {
            self.hand_over(&server, group, now);
        }
        waiting.dedup();
        waiting.iter().for_each(|policy| self.serve_waiting(policy));
    }

    /// Hands over the waiting messages of a policy for which a server is free now, and refuses late ones.
    /// Call it after every change that may free a server.
    pub fn serve_waiting(self: &Arc<Self>, policy: &str) {
        let now = Instant::now();
        let Some(ready) = self.table.take_ready(policy, now) else { return };
        let Ready { selected, late, is_served, look_at } = ready;
        for (message, server) in selected {
            if !message.history.attempts.is_empty() {
                self.events.retrying(&message.about(), &server);
            }
            self.hand_over(&server, vec![message], now);
        }
        late.into_iter().for_each(|message| self.refuse_late(message, is_served));
        if let Some(look_at) = look_at {
            let (dispatcher, policy) = (Arc::clone(self), policy.to_owned());
            self.background.at(look_at, move || dispatcher.serve_waiting(&policy));
        }
    }

    /// From now on refuses every message, but those that a server itself has refused.
    pub fn stop(&self) {
        self.has_stopped.store(true, Ordering::Relaxed);
        self.refuse_waiting();
    }

    /// Whether [`stop`](Self::stop) was called.
    pub fn has_stopped(&self) -> bool {
        self.has_stopped.load(Ordering::Relaxed)
    }

    /// Refuses all messages that wait for a server.
    pub fn refuse_waiting(&self) {
        for message in self.table.take_waiting() {
            refuse(message, Code::Overloaded, "the proxy has stopped".to_owned());
        }
    }

    /// Hands messages to a server: one that the table has just selected for them, or the one they came back
    /// from, whose permit they still hold.
    fn hand_over(
        self: &Arc<Self>,
        server: &Arc<Server<B>>,
        mut messages: Vec<InFlight>,
        now: Instant,
    ) {
        if self.has_stopped() {
            // Dropped, they are refused: a server that has just registered would still take them.
            return;
        }
        for message in &mut messages {
            message.is_sent = false;
            if server.has_capacity && message.permit.is_none() {
                let (dispatcher, server) = (Arc::clone(self), Arc::clone(server));
                message.permit = Some(Box::new(HeldPermit { dispatcher, server }));
            }
            message.server_limit = (!server.leased).then(|| self.server_limit(message, now));
        }
        B::deliver(server, messages, self);
    }

    /// The time that a server without a lease gets for this message: the time left, divided by the number of
    /// servers that may still get it (`MAX_SHARES` at most), and `reply_timeout` at most.
    fn server_limit(&self, message: &InFlight, now: Instant) -> Duration {
        let candidates = self.table.count_allowed(message, MAX_SHARES as usize);
        let shares = u32::try_from(candidates).unwrap_or(MAX_SHARES).max(1);
        let left = message.deadline.saturating_duration_since(now);
        (left / shares).min(self.settings.reply_timeout)
    }

    /// Records that a server acked these messages. The caller sends the acks on.
    pub fn acked<'a>(
        self: &Arc<Self>,
        server: &Server<B>,
        deliveries: impl Iterator<Item = Delivery<'a>>,
        now: Instant,
    ) {
        if self.events.acked(server, deliveries) > 0 {
            self.mark_healthy(server, now);
        }
    }

    /// Records a success, and ends the server's ejection.
    fn mark_healthy(self: &Arc<Self>, server: &Server<B>, now: Instant) {
        if self.table.record_success(server, now) {
            self.events.healthy_again(server);
            self.serve_waiting(&server.policy);
        }
    }
}

/// A [`Permit`](super::in_flight::Permit) that the table has counted at this server.
struct HeldPermit<B: Deliver> {
    dispatcher: Arc<Dispatcher<B>>,
    server: Arc<Server<B>>,
}

impl<B: Deliver> Drop for HeldPermit<B> {
    fn drop(&mut self) {
        if self.dispatcher.table.free_permit(&self.server) {
            // In the background: the thread that drops the permit may hold a lock.
            let (dispatcher, server) = (Arc::clone(&self.dispatcher), Arc::clone(&self.server));
            let serve = move || dispatcher.serve_waiting(&server.policy);
            self.dispatcher.background.at(Instant::now(), serve);
        }
    }
}
