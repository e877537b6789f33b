//! Handles a failed attempt as the rule says: counts it against the server, and retries or refuses the
//! message.

use std::mem;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::refusals::{attempt, pass_refusal, refuse_unknown};
use super::rule::{Next, Situation, rule};
use super::{AttemptError, Deliver, Dispatcher};
use crate::proxy::in_flight::InFlight;
use crate::proxy::table::{Blamed, Failure, Selected, Server};

/// Pause before a server is retried that is not listening yet, or when the proxy lacks resources.
const PAUSE: Duration = Duration::from_millis(20);

impl<B: Deliver> Dispatcher<B> {
    /// Handles an attempt at `server` that began at `since` and failed: carries out the verdict of
    /// [`rule()`].
    pub fn failed(
        self: &Arc<Self>,
        server: &Arc<Server<B>>,
        mut message: InFlight,
        error: AttemptError,
        since: Instant,
    ) {
        if self.has_stopped() && !matches!(error, AttemptError::Refused { .. }) {
            // Dropped, it is refused: all servers are closed, and it would go from one to the next.
            return;
        }
        let now = Instant::now();
        let verdict = rule(
            &error,
            Situation {
                is_starting: matches!(error, AttemptError::Unreachable(_))
                    && self.table.is_starting(server, now),
                was_resent: message.history.resent_to == Some(server.serial),
                sent: message.is_sent,
                once: message.once,
                is_late: now >= message.deadline,
                may_be_at_work: server.leased
                    && (server.has_capacity
                        || message.deadline - message.arrived < self.settings.message_timeout),
                reply_timeout: self.settings.reply_timeout,
            },
        );
        if let Some(failure) = verdict.blamed {
            self.blame(server, failure, &error, since, now);
        }
        if verdict.next.leaves_server() {
            message.history.add(attempt(server, &error, verdict.is_try));
        }
        match verdict.next {
            Next::Same => {
                message.history.resent_to = Some(server.serial);
                self.hand_over(server, vec![message], now);
            }
            Next::AnotherOrSame => self.try_another_or_same(server, message, error, false, now),
            Next::AnotherOrLater => self.try_another_or_same(server, message, error, true, now),
            Next::Another if message.history.tries() >= self.settings.tries => {
                self.give_up(server, message, &error);
            }
            Next::Another | Next::Any => self.try_another(server, message, &error, now),
            Next::PassRefusal => {
                self.mark_healthy(server, now);
                pass_refusal(message, &error);
            }
            Next::Refuse => self.give_up(server, message, &error),
            Next::RefuseUnknown => refuse_unknown(message, server, &error),
        }
    }

    /// Retries a message at another server, lets it wait for one, or refuses it.
    fn try_another(
        self: &Arc<Self>,
        server: &Arc<Server<B>>,
        mut message: InFlight,
        error: &AttemptError,
        now: Instant,
    ) {
        message.permit = None;
        if !message.history.postponed.is_empty() {
            let Some(unplaced) = self.hand_on(server, message, true, now) else { return };
            message = unplaced;
            // No other server took it: try those again that could not take it before.
            message.history.postponed.clear();
        }
        let Some(message) = self.hand_on(server, message, true, now) else { return };
        let rest = if server.leased && error.may_be_restart() {
            self.table.wait_for_restart(message, now)
        } else {
            Some(message)
        };
        match rest {
            Some(message) => self.give_up(server, message, error),
            None => self.serve_waiting(&server.policy),
        }
    }

    /// Retries a message that `server` could not take: at another server if one has room, else at the same
    /// one, at once or (`pauses`) after `PAUSE`.
    fn try_another_or_same(
        self: &Arc<Self>,
        server: &Arc<Server<B>>,
        mut message: InFlight,
        error: AttemptError,
        pauses: bool,
        now: Instant,
    ) {
        message.history.postponed.push(server.serial);
        if pauses && !mem::replace(&mut message.history.was_postponed, true) {
            self.events.postponed(server, &error);
        }
        let Some(mut message) = self.hand_on(server, message, !pauses, now) else { return };
        message.history.postponed.clear();
        if !pauses {
            // It may wait there for all the time that is left.
            let left = message.deadline.saturating_duration_since(now);
            message.server_limit = (!server.leased).then_some(left);
            return B::deliver(server, vec![message], self);
        }
        let (dispatcher, server) = (Arc::clone(self), Arc::clone(server));
        self.background.at(now + PAUSE, move || {
            let now = Instant::now();
            if now < message.deadline {
                dispatcher.hand_over(&server, vec![message], now);
            } else {
                dispatcher.give_up(&server, message, &error);
            }
        });
    }

    /// Hands the message to another server that has neither failed nor postponed it, and reports a retry if
    /// `reports`. If all of those are full, the message waits, but not if any server has postponed it.
    /// Returns the message if it was not placed.
    fn hand_on(
        self: &Arc<Self>,
        server: &Server<B>,
        message: InFlight,
        reports: bool,
        now: Instant,
    ) -> Option<InFlight> {
        let may_wait = message.history.postponed.is_empty();
        match self.table.select_for_retry(message, now, may_wait) {
            Selected::Server(mut message, other) => {
                if reports && other.serial != server.serial {
                    self.events.retrying(&message.about(), &other);
                }
                message.permit = None;
                self.hand_over(&other, vec![message], now);
                None
            }
            Selected::Waits(policy) => {
                self.serve_waiting(&policy);
                None
            }
            Selected::Nobody(message) => Some(message),
        }
    }

    /// Counts a failure against a server, for an attempt that began at `since`, and dispatches the messages
    /// in the server's queue anew.
    pub fn blame(
        self: &Arc<Self>,
        server: &Arc<Server<B>>,
        failure: Failure,
        error: &AttemptError,
        since: Instant,
        now: Instant,
    ) {
        // First: queued messages must not go to a server known to have failed.
        let waiting = server.handle.take_queued_on_failure();
        match self.table.record_failure(server, failure, since, now) {
            Blamed::NotCounted => {}
            Blamed::Counted => self.events.blamed(server, error.kind(), error),
            Blamed::Ejected => {
                self.events.blamed(server, error.kind(), error);
                self.events.ejected(server, error);
                self.serve_waiting(&server.policy);
            }
        }
        for message in waiting {
            self.failed(server, message, AttemptError::QueueTimeout, now);
        }
    }
}
