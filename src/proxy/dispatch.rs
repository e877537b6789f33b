//! A message's way to a server: choose one, hand the message over, and decide what follows a failure.
//!
//! [`mod@rule`] says for each kind of failure who is blamed and what becomes of the message; [`retry`] does
//! that; [`refusals`] says what the client is told. Nothing here waits or knows sockets: what implements
//! [`Deliver`] takes messages to its server, and comes back here with what became of them.

#[cfg(test)]
mod model;
mod refusals;
mod retry;
mod rule;

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::events::{Delivery, Events};
use super::in_flight::{InFlight, Permit};
use super::stats::ServerStats;
use super::table::{Ready, Selected, Server, Table};
use crate::net::background::Background;
use crate::protocol::Code;
use refusals::{no_server, refuse};

pub use rule::AttemptError;

/// A message's remaining time is split among at most this many servers without a lease.
const MAX_SHARES: u32 = 3;

/// How long and how often a message is tried.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// A message's time from arrival to reply, unless it sets `timeout`.
    pub message_timeout: Duration,
    /// How long a server without a lease may take for its ack.
    pub reply_timeout: Duration,
    /// The most servers that are tried for a message.
    pub tries: usize,
}

/// Delivers messages to one server.
pub trait Deliver: AsRef<ServerStats> + Sized + Send + Sync + 'static {
    /// Delivers messages to `server`, whose backend this is. Never waits. Each of them comes back through
    /// [`Dispatcher::acked`] or [`Dispatcher::failed`].
    fn deliver(
        server: &Arc<Server<Self>>,
        messages: Vec<InFlight>,
        dispatcher: &Arc<Dispatcher<Self>>,
    );

    /// The server has failed. Returns the messages that are queued for it.
    fn note_failure(&self) -> Vec<InFlight>;
}

/// Takes messages to the servers of the table, and answers each of them.
#[derive(Debug)]
pub struct Dispatcher<B> {
    /// The switching table.
    pub table: Table<B, InFlight>,
    /// Prints and counts what happens.
    pub events: Arc<Events>,
    /// Limits.
    pub settings: Settings,
    /// Runs the timers.
    pub background: Arc<Background>,
}

impl<B: Deliver> Dispatcher<B> {
    /// Sends messages that came together on their way.
    pub fn dispatch(self: &Arc<Self>, messages: Vec<InFlight>) {
        let now = Instant::now();
        self.events.taken_in(messages.len());
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

    /// Serves the messages of a policy that wait for a server. To be called after any change that may let one
    /// of them go.
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

    /// Refuses all messages that wait for a server.
    pub fn refuse_waiting(&self) {
        for message in self.table.take_waiting() {
            refuse(message, Code::Overloaded, "the proxy has stopped".to_owned());
        }
    }

    /// The permit of a message that the table has counted at a server with a capacity.
    fn permit(self: &Arc<Self>, server: &Arc<Server<B>>) -> Permit {
        let (dispatcher, server) = (Arc::clone(self), Arc::clone(server));
        Permit::new(move || {
            if dispatcher.table.free_permit(&server) {
                // The thread that drops it may hold a lock.
                let (own, server) = (Arc::clone(&dispatcher), Arc::clone(&server));
                let serve = move || own.serve_waiting(&server.policy);
                dispatcher.background.at(Instant::now(), serve);
            }
        })
    }

    /// Hands messages to their server, which the table has selected for them, or which they have been at
    /// before: then they still have its permit.
    fn hand_over(
        self: &Arc<Self>,
        server: &Arc<Server<B>>,
        mut messages: Vec<InFlight>,
        now: Instant,
    ) {
        for message in &mut messages {
            message.is_sent = false;
            if server.has_capacity && message.permit.is_none() {
                message.permit = Some(self.permit(server));
            }
            message.server_limit = (!server.leased).then(|| self.server_limit(message, now));
        }
        B::deliver(server, messages, self);
    }

    /// A server's time for this message, without a lease: what is left, shared among at most `MAX_SHARES`
    /// that have not failed it.
    fn server_limit(&self, message: &InFlight, now: Instant) -> Duration {
        let candidates = self.table.count_candidates(message, MAX_SHARES as usize);
        let shares = u32::try_from(candidates).unwrap_or(MAX_SHARES).max(1);
        let left = message.deadline.saturating_duration_since(now);
        (left / shares).min(self.settings.reply_timeout)
    }

    /// A server acked these messages, whose acks then go to their clients.
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

    /// The server has answered.
    fn mark_healthy(self: &Arc<Self>, server: &Server<B>, now: Instant) {
        if self.table.record_success(server, now) {
            self.events.healthy_again(server);
            self.serve_waiting(&server.policy);
        }
    }
}
