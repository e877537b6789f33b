//! The refusals that the proxy itself sends, and the refusal of a server passed on.

use std::time::{Duration, Instant};

use super::{AttemptError, Deliver, Dispatcher};
use crate::cli::escape::Escaped;
use crate::protocol::Code;
use crate::proxy::in_flight::{Attempt, InFlight};
use crate::proxy::table::Server;

/// A refusal lists at most this many attempts, the latest ones, so that it fits into a packet.
const MAX_TOLD: usize = 8;

impl<B: Deliver> Dispatcher<B> {
    /// Refuses a message whose last attempt failed with `error` at `server`. The reason lists the attempts.
    pub(super) fn give_up(&self, server: &Server<B>, mut message: InFlight, error: &AttemptError) {
        if message.history.attempts.last().is_none_or(|last| last.serial != server.serial) {
            message.history.add(attempt(server, error, false));
        }
        self.refuse_after_attempts(message);
    }

    /// Refuses a message that has waited too long for a server.
    pub(super) fn refuse_late(&self, message: InFlight, is_served: bool) {
        if !message.history.attempts.is_empty() {
            return self.refuse_after_attempts(message);
        }
        let (code, reason) = if is_served {
            let policy = Escaped(&message.policy);
            let busy = format!("all servers of privacy policy \"{policy}\" are busy");
            (Code::Overloaded, busy + &time_is_up(&message))
        } else {
            (Code::NoServer, no_server(&message))
        };
        refuse(message, code, reason);
    }

    fn refuse_after_attempts(&self, message: InFlight) {
        let attempts = &message.history.attempts;
        let code = attempts.last().map_or(Code::Unreachable, |attempt| attempt.code);
        let untold = attempts.len().saturating_sub(MAX_TOLD);
        let earlier = (untold > 0).then(|| format!("earlier attempts that failed: {untold}"));
        let told = attempts[untold..].iter().map(|attempt| &*attempt.account);
        let accounts: Vec<_> = earlier.as_deref().into_iter().chain(told).collect();
        let accounts = accounts.join("; ");
        let policy = Escaped(&message.policy);
        let mut reason = format!("no server of privacy policy \"{policy}\" answered: {accounts}");
        if Instant::now() >= message.deadline {
            reason += &time_is_up(&message);
        }
        refuse(message, code, reason);
    }
}

/// Says that the message's time is over, and what set that time.
fn time_is_up(message: &InFlight) -> String {
    let time = message.deadline.saturating_duration_since(message.arrived);
    let source = match message.timeout {
        None => "-message-timeout of revproc",
        Some(seconds) if Duration::from_secs(seconds) > time => "-max-timeout of revproc",
        Some(_) => "its own timeout",
    };
    format!("; the {} s of the message are over ({source})", time.as_secs_f64())
}

/// Refuses a message, and sends the refusal.
pub(super) fn refuse(mut message: InFlight, code: Code, reason: String) {
    if let Some(queue) = message.refuse(code, reason) {
        queue.flush();
    }
}

/// Refuses a `once` message that `server` may have carried out.
pub(super) fn refuse_unknown<B>(message: InFlight, server: &Server<B>, error: &AttemptError) {
    let reason = format!("it may have been carried out: {}", account(server, error));
    refuse(message, Code::OutcomeUnknown, reason);
}

/// Passes on the server's own refusal.
pub(super) fn pass_refusal(mut message: InFlight, error: &AttemptError) {
    if let AttemptError::Refused { reason, packet, .. } = error
        && let Some(queue) = message.pass_refusal(error.code(), reason, packet)
    {
        queue.flush();
    }
}

fn account<B>(server: &Server<B>, error: &AttemptError) -> String {
    format!("server {} ({}) {error}", Escaped(&server.id), server.address)
}

pub(super) fn no_server(message: &InFlight) -> String {
    format!("no server serves privacy policy \"{}\"", Escaped(&message.policy))
}

pub(super) fn attempt<B>(server: &Server<B>, error: &AttemptError, is_try: bool) -> Attempt {
    let account = account(server, error);
    Attempt { serial: server.serial, id: server.id.clone(), account, code: error.code(), is_try }
}
