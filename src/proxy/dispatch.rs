//! A message's way to a server: choose one, hand the message over, and decide what follows a failure.
//!
//! [`mod@rule`] says for each kind of failure who is blamed, where the message goes, and what the client is
//! told. Nothing here waits or knows sockets: what implements [`Deliver`] takes messages to its server, and
//! comes back here with what became of them.

#[cfg(test)]
mod model;
mod refusals;
mod rule;

use std::mem;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::events::{Delivery, Events};
use super::in_flight::{InFlight, Permit};
use super::stats::ServerStats;
use super::table::{Blamed, Failure, Ready, Selected, Server, Table};
use crate::net::background::Background;
use crate::protocol::Code;
use refusals::{attempt, no_server, pass_refusal, refuse, refuse_unknown};
use rule::{Next, Situation, rule};

pub use rule::{AttemptError, Failed};

/// A server without a lease may refuse connections for this long after registering: the tutorial's
/// servers register before they listen.
const YOUNG: Duration = Duration::from_secs(1);

/// Pause before a server is retried that is not listening yet, or when the proxy lacks resources.
const PAUSE: Duration = Duration::from_millis(20);

/// A message's remaining time is split among at most so many servers without a lease.
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

/// Takes messages to one server.
pub trait Deliver: AsRef<ServerStats> + Sized + Send + Sync + 'static {
    /// Takes messages to `server`, whose backend this is. Never waits. Each of them comes back through
    /// [`Dispatcher::acked`] or [`Dispatcher::failed`].
    fn take(
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
                Selected::Nobody(message) => {
                    let reason = no_server(&message);
                    message.refuse(Code::NoServer, reason);
                }
            }
        }
        for (server, mut group) in groups {
            group.iter_mut().for_each(|message| self.give_permit(message, &server));
            self.hand_over(&server, group, now);
        }
        waiting.dedup();
        waiting.iter().for_each(|policy| self.serve_waiting(policy));
    }

    /// Serves the messages of a policy that wait for a server. Call it after any change that could free
    /// one.
    pub fn serve_waiting(self: &Arc<Self>, policy: &str) {
        let now = Instant::now();
        let Some(ready) = self.table.take_ready(policy, now) else { return };
        let Ready { selected, late, is_served, look_at } = ready;
        for (mut message, server) in selected {
            if !message.history.attempts.is_empty() {
                self.events.retrying(&message.about(), &server);
            }
            self.give_permit(&mut message, &server);
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

    /// Gives a message the permit that it has taken at a server with a capacity.
    fn give_permit(self: &Arc<Self>, message: &mut InFlight, server: &Arc<Server<B>>) {
        message.permit = server.has_capacity.then(|| {
            let (dispatcher, server) = (Arc::clone(self), Arc::clone(server));
            Permit::new(move || {
                if dispatcher.table.free_permit(&server) {
                    // The thread that drops it may hold a lock.
                    let (own, server) = (Arc::clone(&dispatcher), Arc::clone(&server));
                    let serve = move || own.serve_waiting(&server.policy);
                    dispatcher.background.at(Instant::now(), serve);
                }
            })
        });
    }

    fn hand_over(
        self: &Arc<Self>,
        server: &Arc<Server<B>>,
        mut messages: Vec<InFlight>,
        now: Instant,
    ) {
        for message in &mut messages {
            message.is_sent = false;
            message.server_limit =
                if server.leased { None } else { Some(self.server_limit(message, now)) };
        }
        B::take(server, messages, self);
    }

    /// How long a server without a lease may take for this message: the time left, divided by the servers
    /// that have not failed it.
    fn server_limit(&self, message: &InFlight, now: Instant) -> Duration {
        let untried = self.table.count_candidates(message);
        let shares = u32::try_from(untried).unwrap_or(MAX_SHARES).clamp(1, MAX_SHARES);
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
        if self.table.succeeded(server, now) {
            self.events.healthy_again(server);
            self.serve_waiting(&server.policy);
        }
    }

    /// An attempt at this server failed: does what the [`rule()`] says.
    pub fn failed(
        self: &Arc<Self>,
        server: &Arc<Server<B>>,
        mut message: InFlight,
        failed: Failed,
    ) {
        let now = Instant::now();
        let Failed { error, since } = failed;
        let verdict = rule(
            &error,
            Situation {
                is_young: !server.leased && now.saturating_duration_since(server.since) < YOUNG,
                had_second_chance: message.history.second_chance_at == Some(server.serial),
                sent: message.is_sent,
                once: message.once,
                reply_timeout: self.settings.reply_timeout,
            },
        );
        if let Some(failure) = verdict.blamed {
            self.blame(server, failure, &error, since, now);
        }
        let mut next = verdict.next;
        if now >= message.deadline && !matches!(next, Next::PassRefusal | Next::RefuseUnknown) {
            next = Next::Refuse;
        }
        match next {
            Next::PassRefusal => {
                self.mark_healthy(server, now);
                return pass_refusal(message, &error);
            }
            Next::Same => {
                message.history.second_chance_at = Some(server.serial);
                return self.hand_over(server, vec![message], now);
            }
            Next::AnotherOrLater | Next::AnotherOrSame => {
                message.history.postponed.push(server.serial)
            }
            Next::Any => {}
            Next::Another | Next::Refuse | Next::RefuseUnknown => {
                message.history.add(attempt(server, &error, verdict.is_try));
            }
        }
        match next {
            Next::Refuse => self.give_up(message, server, &error),
            Next::RefuseUnknown => refuse_unknown(message, server, &error),
            _ if message.history.tries() >= self.settings.tries => {
                self.give_up(message, server, &error)
            }
            next => self.retry(message, server, &error, next, now),
        }
    }

    /// Sends a message on that `server` did not take.
    fn retry(
        self: &Arc<Self>,
        mut message: InFlight,
        server: &Arc<Server<B>>,
        error: &AttemptError,
        next: Next,
        now: Instant,
    ) {
        let is_for_later = next == Next::AnotherOrLater;
        if is_for_later && !mem::replace(&mut message.history.was_postponed, true) {
            self.events.postponed(server, error);
        }
        let may_keep_its_permit = matches!(next, Next::AnotherOrSame | Next::AnotherOrLater);
        if !may_keep_its_permit {
            message.permit = None;
        }
        // Before it waits for others, those that could not take it just now are asked again.
        let has_postponed = !message.history.postponed.is_empty();
        let may_wait = !may_keep_its_permit && !has_postponed;
        let mut message = match self.table.select_for_retry(message, now, may_wait) {
            Selected::Server(mut message, other) => {
                if other.serial != server.serial && !is_for_later {
                    self.events.retrying(&message.about(), &other);
                }
                self.give_permit(&mut message, &other);
                return self.hand_over(&other, vec![message], now);
            }
            Selected::Waits(policy) => return self.serve_waiting(&policy),
            Selected::Nobody(message) => message,
        };
        message.history.postponed.clear();
        match next {
            Next::AnotherOrSame => {
                let left = message.deadline.saturating_duration_since(now);
                message.server_limit = (!server.leased).then_some(left);
                B::take(server, vec![message], self);
            }
            Next::AnotherOrLater => {
                let (dispatcher, server) = (Arc::clone(self), Arc::clone(server));
                let error = error.clone();
                self.background.at(now + PAUSE, move || {
                    let now = Instant::now();
                    if now < message.deadline {
                        dispatcher.hand_over(&server, vec![message], now);
                    } else {
                        dispatcher.give_up(message, &server, &error);
                    }
                });
            }
            _ if has_postponed => self.retry(message, server, error, next, now),
            _ if server.leased && error.may_be_restart() => {
                let policy = server.policy.as_str();
                match self.table.wait_for_restart(message, now) {
                    None => self.serve_waiting(policy),
                    Some(message) => self.give_up(message, server, error),
                }
            }
            _ => self.give_up(message, server, error),
        }
    }

    /// Blames a server for an attempt that began at `since`.
    pub fn blame(
        self: &Arc<Self>,
        server: &Arc<Server<B>>,
        failure: Failure,
        error: &AttemptError,
        since: Instant,
        now: Instant,
    ) {
        // First: queued messages must not go to a server known to have failed.
        let waiting = server.handle.note_failure();
        match self.table.failed(server, failure, since, now) {
            Blamed::Already => {}
            Blamed::Counted => self.events.failed(server, error.kind(), error),
            Blamed::Ejected => {
                self.events.failed(server, error.kind(), error);
                self.events.ejected(server, error);
                self.serve_waiting(&server.policy);
            }
        }
        for message in waiting {
            let failed = Failed { error: AttemptError::QueueTimeout, since: now };
            self.failed(server, message, failed);
        }
    }
}
