//! The time of messages: what is late is given up, in the queue and on the connections.

use std::collections::VecDeque;
use std::mem;
use std::net::Shutdown;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Backend, Queued, State, Upstream};
use crate::net::connection::is_quiet;
use crate::proxy::dispatch::{AttemptError, Dispatcher};
use crate::proxy::table::Server;
use crate::proxy::upstream::Phase;

/// The longest timer: until it fires it keeps a removed server in memory.
const LONGEST_TIMER: Duration = Duration::from_secs(10);

/// If bytes are unread when messages are late, the connection's thread gets this long to read them.
const READ_TIME: Duration = Duration::from_millis(100);

/// Sets the timer of a server, which [`State::set_timer`] has noted.
pub(super) fn start_timer(
    at: Instant,
    server: Arc<Server<Backend>>,
    dispatcher: Arc<Dispatcher<Backend>>,
) {
    let background = Arc::clone(&dispatcher.background);
    background.at(at, move || expire_all(at, server, dispatcher));
}

/// Gives up late messages, in the queue and on the connections, and sets the next timer. Does nothing if the
/// timer that was set for `at` is stale.
fn expire_all(at: Instant, server: Arc<Server<Backend>>, dispatcher: Arc<Dispatcher<Backend>>) {
    let now = Instant::now();
    let mut state = server.handle.lock();
    if state.timer_at != Some(at) {
        return;
    }
    state.timer_at = None;
    let (late, rest): (VecDeque<Queued>, VecDeque<Queued>) =
        mem::take(&mut state.waiting).into_iter().partition(|queued| queued.give_up_at <= now);
    let next_queued = rest.iter().map(|queued| queued.give_up_at).min();
    state.waiting = rest;
    let upstreams = state.upstreams.clone();
    drop(state);
    for Queued { message, .. } in late {
        dispatcher.failed(&server, message, AttemptError::QueueTimeout, now);
    }
    let next = upstreams.iter().filter_map(|upstream| upstream.expire_if_quiet());
    let next = next.chain(next_queued).min();
    let timer_at = server.handle.lock().set_timer(next, now);
    if let Some(at) = timer_at {
        start_timer(at, server, dispatcher);
    }
}

impl State {
    /// Returns when to start a timer, or `None` if one is set for that time or earlier.
    pub(super) fn set_timer(&mut self, until: Option<Instant>, now: Instant) -> Option<Instant> {
        let at = until?.min(now + LONGEST_TIMER);
        let is_earlier = self.timer_at.is_none_or(|timer_at| at < timer_at);
        is_earlier.then(|| *self.timer_at.insert(at))
    }
}

impl Upstream {
    /// As [`expire`](Self::expire), but if bytes are unread, leaves them to the connection's thread: after
    /// the process was suspended they may be acks that came in time.
    fn expire_if_quiet(&self) -> Option<Instant> {
        let is_unread = matches!(&self.lock().phase, Phase::Open(stream) if !is_quiet(stream));
        if is_unread { Some(Instant::now() + READ_TIME) } else { self.expire(false) }
    }

    /// Fails the late messages. Closes the connection if it has been idle for too long, or if all its
    /// messages were given up. Returns when the next message is late.
    pub(super) fn expire(&self, has_ack_begun: bool) -> Option<Instant> {
        let now = Instant::now();
        // First: whoever holds the backend's lock may take this one's.
        let has_lease = self.server.leased && !self.server.handle.lock().closed;
        let mut state = self.lock();
        let late = state.take_late(now);
        let stalled = state.take_stalled(now);
        let is_over = state.is_over(has_lease, has_ack_begun, now);
        let ended = if is_over { state.close() } else { None };
        let next = state.next_deadline();
        drop(state);
        for (message, since, limit) in late {
            self.fail(message, AttemptError::Timeout(limit), since);
        }
        for message in stalled {
            self.fail(message, AttemptError::QueueTimeout, now);
        }
        if let Some(stream) = ended {
            // After `fail`: its thread sees the end only once the failure is counted. The shutdown fails if
            // the server has closed first.
            let _ = stream.shutdown(Shutdown::Both);
        }
        next
    }
}
