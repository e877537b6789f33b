//! The thread of a connection: connects, reads acks, and handles them.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Upstream;
use crate::net::affinity::Follower;
use crate::net::connect::connect;
use crate::net::connection::{Connection, ReadTimeout, ReceiveError};
use crate::net::os_error::{is_local, reason};
use crate::proxy::dispatch::AttemptError;
use crate::proxy::replies::HeldReplies;
use crate::proxy::upstream::Phase;

/// How often a connection's thread checks for late messages and for its own idle timeout.
const LOOK: Duration = Duration::from_secs(1);

/// How long replies may wait for others of their burst, so that all go in one call.
const GATHER: Duration = Duration::from_millis(1);

impl Upstream {
    /// Serves the connection until it closes, then the ones that replace it.
    pub(super) fn run(self: Arc<Self>) {
        let mut next = Some(self);
        while let Some(upstream) = next {
            let since = Instant::now();
            // A bug that ends this connection in a panic ends no other, and keeps no client waiting.
            let served = catch_unwind(AssertUnwindSafe(|| upstream.serve()));
            let backend = &upstream.server.handle;
            // Remove it first: a message that fails below may need its place for a new connection.
            backend.remove(&upstream);
            match served {
                // It had no messages left.
                Ok(Ok(())) => {}
                Ok(Err(error)) => upstream.fail_all(error, since),
                // Dropped, they are refused.
                Err(_) => drop(upstream.end()),
            }
            // Replace it last: `fail_all` first takes the queued messages away from a server that failed.
            next = backend.replace(&upstream);
            if backend.workers.is_short()
                && let Some(next) = next.take()
            {
                // Other servers have waited longer for this thread.
                backend.submit(next, &upstream.dispatcher);
            }
        }
    }

    fn serve(self: &Arc<Self>) -> Result<(), AttemptError> {
        // The time of its messages may have run out before it had a thread, or while it was made.
        if self.end_if_idle() {
            return Ok(());
        }
        let mut connection = self.connect()?;
        let mut state = self.lock();
        if state.is_empty() {
            state.end();
            return Ok(());
        }
        state.phase = Phase::Open(Arc::clone(connection.stream()));
        drop(state);
        self.flush();
        self.read_acks(&mut connection)
    }

    fn connect(&self) -> Result<Connection, AttemptError> {
        let backend = &self.server.handle;
        let settings = &self.dispatcher.settings;
        let whole = settings.connect_timeout;
        let deadline = self.lock().next_deadline();
        let left = deadline.map_or(whole, |at| at.saturating_duration_since(Instant::now()));
        let connected = connect(self.server.address, whole.min(left))
            .and_then(|stream| Connection::from_connected(stream, settings.max_packet));
        match connected {
            Ok(mut connection) => {
                connection.use_budget(Arc::clone(&backend.memory));
                Ok(connection)
            }
            Err(error) if is_local(&error) => {
                backend.record_no_resources();
                Err(AttemptError::OutOfResources(reason(&error)))
            }
            Err(error) if error.kind() == io::ErrorKind::TimedOut && left < whole => {
                Err(AttemptError::Timeout(left))
            }
            Err(error) => Err(AttemptError::Unreachable(reason(&error))),
        }
    }

    /// Reads and handles acks until the connection closes or has been idle for too long.
    fn read_acks(self: &Arc<Self>, connection: &mut Connection) -> Result<(), AttemptError> {
        let mut held = HeldReplies::default();
        let mut follower = Follower::default();
        // When acks last came, and when this thread last had something to do.
        let mut last_acks = Instant::now();
        let mut woken = last_acks;
        loop {
            let until = woken + if held.is_empty() { LOOK } else { GATHER };
            match connection.wait(ReadTimeout::Until(until)) {
                Ok(true) => follower.follow(|| Some(self.cpu)),
                Ok(false) => return Err(AttemptError::closed(self.lock().was_used)),
                Err(waited @ (ReceiveError::Idle | ReceiveError::Slow(_))) => {
                    woken = Instant::now();
                    if held.is_empty() {
                        self.expire(matches!(waited, ReceiveError::Slow(_)));
                    }
                    held.send();
                    continue;
                }
                Err(error) => return Err(self.attempt_error(error)),
            }
            held.send();
            let acks = connection.take_packets();
            let now = Instant::now();
            self.settle(&acks, connection, &mut held, last_acks, now)?;
            (last_acks, woken) = (now, now);
            if !self.send_next_or_close() {
                return Ok(());
            }
        }
    }

    fn attempt_error(&self, error: ReceiveError) -> AttemptError {
        match error {
            ReceiveError::Io(error) => AttemptError::ConnectionClosed {
                reason: format!("the connection broke: {}", reason(&error)),
                was_reused: self.lock().was_used,
            },
            ReceiveError::TooLarge { .. } => AttemptError::AckTooLarge(error.to_string()),
            ReceiveError::NoMemory => AttemptError::NoMemory,
            error => AttemptError::BadAck(error.to_string()),
        }
    }

    /// Sends the messages that gathered, or takes the next one from the queue. Returns `false` if the
    /// connection was closed because it has no more messages.
    fn send_next_or_close(self: &Arc<Self>) -> bool {
        let state = self.lock();
        if !state.is_empty() {
            self.flush_locked(state);
            return true;
        }
        drop(state);
        let stays = self.server.leased && self.server.handle.reuse(self);
        if !stays && self.end_if_idle() {
            return false;
        }
        // It has a message from the queue, or a new one, or stays open idle.
        self.flush();
        true
    }
}
