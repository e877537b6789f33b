//! A message's way to a server: choose one, hand the message over, and decide what follows a failure.
//!
//! [`rule`] says for each way in which an attempt can fail whether the server is blamed, whether another
//! may have the message, and what the client is told. Nothing here waits or knows sockets: a [`Backend`]
//! takes messages to its server, and comes back here with what became of them.

#[cfg(test)]
mod model;
mod rule;

use std::mem;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::events::{Delivery, Events};
use super::in_flight::{Attempt, InFlight};
use super::stats::ServerStats;
use super::table::{Blamed, Failure, Server, Table};
use crate::cli::escape::Escaped;
use crate::net::background::Background;
use crate::protocol::Code;
use rule::{Next, Situation, rule};

pub use rule::{AttemptError, Failed};

/// The tutorial's servers register first and listen afterwards: one without a lease that refuses
/// connections is given this long from its registration.
const YOUNG: Duration = Duration::from_secs(1);

/// Pause before the same server is tried again: it is about to listen, or the proxy lacks something.
const PAUSE: Duration = Duration::from_millis(20);

/// The time that a message has left is for as many servers without a lease as this, at the most.
const MAX_SHARES: u32 = 3;

/// How long and how often a message is tried.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// From a message's arrival to its ack or refusal, unless it says otherwise.
    pub message_timeout: Duration,
    /// How long a server without a lease may take for its ack.
    pub reply_timeout: Duration,
    /// Servers that are tried at most.
    pub tries: usize,
}

/// Takes messages to one server.
pub trait Backend: AsRef<ServerStats> + Sized + Send + Sync + 'static {
    /// Takes messages to `server`, whose backend this is. Never waits. Each of them comes back through
    /// [`Dispatcher::acked`] or [`Dispatcher::failed`].
    fn take(
        server: &Arc<Server<Self>>,
        messages: Vec<InFlight>,
        dispatcher: &Arc<Dispatcher<Self>>,
    );

    /// The server has failed. Returns the messages that wait for a place at it.
    fn note_failure(&self) -> Vec<InFlight>;
}

/// Takes messages to the servers of the table, and answers each of them.
#[derive(Debug)]
pub struct Dispatcher<B> {
    /// The switching table.
    pub table: Table<B>,
    /// Where what happens is said and counted.
    pub events: Arc<Events>,
    /// Limits.
    pub settings: Settings,
    /// Where a message waits for a certain time.
    pub background: Arc<Background>,
}

impl<B: Backend> Dispatcher<B> {
    /// Sends messages that came together on their way.
    pub fn dispatch(self: &Arc<Self>, messages: Vec<InFlight>) {
        let now = Instant::now();
        self.events.taken_in(messages.len());
        let policies = messages.iter().map(|message| &*message.policy);
        let servers = self.table.select(policies, now);
        let mut groups: Vec<(Arc<Server<B>>, Vec<InFlight>)> = Vec::new();
        for (message, server) in messages.into_iter().zip(servers) {
            let Some(server) = server else {
                let reason = no_server(&message);
                message.refuse(Code::NoServer, reason);
                continue;
            };
            match groups.iter_mut().find(|(other, _)| Arc::ptr_eq(other, &server)) {
                Some((_, group)) => group.push(message),
                None => groups.push((server, vec![message])),
            }
        }
        for (server, group) in groups {
            self.hand_over(&server, group, now);
        }
    }

    fn hand_over(
        self: &Arc<Self>,
        server: &Arc<Server<B>>,
        mut messages: Vec<InFlight>,
        now: Instant,
    ) {
        for message in &mut messages {
            message.is_sent = false;
            message.share = if server.leased { None } else { Some(self.share(message, now)) };
        }
        B::take(server, messages, self);
    }

    /// How long a server without a lease may take for this message: an equal share of the time that
    /// is left, for each server that has not failed it.
    fn share(&self, message: &InFlight, now: Instant) -> Duration {
        let excluded: Vec<_> = message.history().iter().flat_map(|past| past.excluded()).collect();
        let untried = self.table.count_untried(&message.policy, &excluded);
        let shares = u32::try_from(untried).unwrap_or(MAX_SHARES).clamp(1, MAX_SHARES);
        let left = message.deadline.saturating_duration_since(now);
        (left / shares).min(self.settings.reply_timeout)
    }

    /// A server acked these messages, whose acks then go to their clients.
    pub fn acked<'a>(
        &self,
        server: &Server<B>,
        deliveries: impl Iterator<Item = Delivery<'a>>,
        now: Instant,
    ) {
        if self.events.acked(server, deliveries) > 0 && self.table.succeeded(server, now) {
            self.events.healthy_again(server);
        }
    }

    /// An attempt at this server failed: does what the [`rule`] says.
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
                had_second_chance: message.had_second_chance(),
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
            Next::PassRefusal => return pass_refusal(message, &error),
            Next::Same => {
                message.history_mut().had_second_chance = true;
                return self.hand_over(server, vec![message], now);
            }
            Next::AnotherOrLater | Next::AnotherOrSame => {
                message.history_mut().postponed.push(server.serial)
            }
            Next::Any => {}
            Next::Another | Next::Refuse | Next::RefuseUnknown => {
                message.history_mut().attempts.push(attempt(server, &error, verdict.is_try));
            }
        }
        match next {
            Next::Refuse => self.give_up(message, server, &error),
            Next::RefuseUnknown => refuse(
                message,
                Code::OutcomeUnknown,
                format!(
                    "{} may have carried out the message, which asks to be carried out once: {error}",
                    named(server),
                ),
            ),
            _ if message.tries() >= self.settings.tries => self.give_up(message, server, &error),
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
        if is_for_later && !mem::replace(&mut message.history_mut().was_postponed, true) {
            self.events.postponed(server, error);
        }
        let excluded: Vec<_> = message.history().iter().flat_map(|past| past.excluded()).collect();
        if let Some(other) = self.table.select_for_retry(&message.policy, &excluded, now) {
            if other.serial != server.serial {
                message.history_mut().had_second_chance = false;
                if !is_for_later {
                    self.events.retrying(&message.about(), &other);
                }
            }
            return self.hand_over(&other, vec![message], now);
        }
        // Each server that may take it later was asked: now they are asked again.
        let are_others_postponed = !mem::take(&mut message.history_mut().postponed).is_empty();
        match next {
            Next::AnotherOrSame => {
                let left = message.deadline.saturating_duration_since(now);
                message.share = (!server.leased).then_some(left);
                B::take(server, vec![message], self);
            }
            Next::AnotherOrLater => {
                let (dispatcher, server) = (Arc::clone(self), Arc::clone(server));
                self.background.at(now + PAUSE, move || {
                    dispatcher.hand_over(&server, vec![message], Instant::now());
                });
            }
            _ if are_others_postponed => self.retry(message, server, error, next, now),
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
        // First, so that no message that waits goes to the server once its failure is known.
        let waiting = server.handle.note_failure();
        match self.table.failed(server, failure, since, now) {
            Blamed::Already => {}
            Blamed::Counted => self.events.failed(server, error.kind(), error),
            Blamed::Ejected => {
                self.events.failed(server, error.kind(), error);
                self.events.ejected(server, error);
            }
        }
        for message in waiting {
            let failed = Failed { error: AttemptError::QueueTimeout, since: now };
            self.failed(server, message, failed);
        }
    }

    /// Refuses a message with all that was tried, `error` at `server` the last.
    fn give_up(&self, mut message: InFlight, server: &Server<B>, error: &AttemptError) {
        let past = message.history_mut();
        if past.attempts.last().is_none_or(|last| last.serial != server.serial) {
            past.attempts.push(attempt(server, error, false));
        }
        let code = past.attempts.last().map_or(Code::Unreachable, |attempt| attempt.code);
        let accounts: Vec<_> = past.attempts.iter().map(|attempt| &*attempt.account).collect();
        let accounts = accounts.join("; ");
        let policy = Escaped(&message.policy);
        let mut reason = format!("no server of privacy policy \"{policy}\" answered: {accounts}");
        if Instant::now() >= message.deadline {
            reason += &self.time_is_up(&message);
        }
        refuse(message, code, reason);
    }

    /// That a message's time is up, and which option says how long it is.
    fn time_is_up(&self, message: &InFlight) -> String {
        let time = message.deadline.saturating_duration_since(message.arrived);
        let source = if time == self.settings.message_timeout {
            "-message-timeout of revproc"
        } else {
            "its own timeout"
        };
        format!("; the {} s of the message are over ({source})", time.as_secs_f64())
    }
}

/// Refuses a message, and sends the refusal.
fn refuse(message: InFlight, code: Code, reason: String) {
    let queue = message.queue().cloned();
    message.refuse(code, reason);
    if let Some(queue) = queue {
        queue.flush();
    }
}

fn pass_refusal(message: InFlight, error: &AttemptError) {
    let AttemptError::Refused { reason, packet, .. } = error else { return };
    let queue = message.queue().cloned();
    message.pass_refusal(error.code(), reason, packet);
    if let Some(queue) = queue {
        queue.flush();
    }
}

fn attempt<B>(server: &Server<B>, error: &AttemptError, is_try: bool) -> Attempt {
    let account = format!("{} {error}", named(server));
    Attempt { serial: server.serial, account, code: error.code(), is_try }
}

fn named<B>(server: &Server<B>) -> String {
    format!("server {} ({})", Escaped(&server.id), server.address)
}

fn no_server(message: &InFlight) -> String {
    format!("no server serves privacy policy \"{}\"", Escaped(&message.policy))
}
