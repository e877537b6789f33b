//! One connection to a server, and the messages on it.
//!
//! A thread of its own connects, reads the acks, and hands them out: they come in the order of the
//! messages. The thread that puts a message on an open connection sends it, without waiting; while acks of
//! others are awaited, messages gather, and go together once those have come (Nagle's algorithm). A
//! connection on which anything went wrong is not used again: a late reply must not reach another client.

mod settle;
mod state;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::io;
use std::net::{Shutdown, TcpStream};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use super::acks::HeldReplies;
use super::backend::{Backend, Settings};
use super::dispatch::{AttemptError, Dispatcher};
use super::in_flight::InFlight;
use super::table::Server;
use crate::net::affinity::Follower;
use crate::net::background::{Unsent, send_now};
use crate::net::connect::connect;
use crate::net::connection::{Connection, ReadTimeout, ReceiveError, is_quiet};
use crate::net::lock::lock;
use crate::net::os_error::{is_local, reason};
use state::{Phase, State};

pub use state::Terms;

/// So many gathered bytes are sent without waiting for acks.
const MAX_GATHERED: usize = 64 << 10;

/// A connection without messages ends after this long; a server of ours closes its side much later.
const MAX_IDLE_TIME: Duration = Duration::from_secs(5);

/// No limit of its own: the messages' deadlines end the connection first.
const LONGEST_SEND: Duration = Duration::from_secs(24 * 3600);

/// How often a connection's thread looks whether it is still needed.
const LOOK: Duration = Duration::from_secs(1);

/// How long replies may wait for others of their burst, so that all go in one call.
const GATHER: Duration = Duration::from_millis(1);

/// A connection to a server.
#[derive(Debug)]
pub struct Upstream {
    /// The CPU of the clients' threads that use it.
    pub cpu: usize,
    server: Arc<Server<Backend>>,
    dispatcher: Arc<Dispatcher<Backend>>,
    state: Mutex<State>,
}

impl Upstream {
    /// A connection to `server` for this message; [`run`](Self::run) makes it.
    #[inline(never)] // What is built here would take room on the stacks of all clients' threads.
    pub fn new(
        cpu: usize,
        server: &Arc<Server<Backend>>,
        dispatcher: &Arc<Dispatcher<Backend>>,
        message: InFlight,
    ) -> Arc<Self> {
        Arc::new(Upstream {
            cpu,
            server: Arc::clone(server),
            dispatcher: Arc::clone(dispatcher),
            state: Mutex::new(State::new(message)),
        })
    }

    /// Another connection, made for this message, to the same server.
    pub fn again(&self, message: InFlight) -> Arc<Self> {
        Self::new(self.cpu, &self.server, &self.dispatcher, message)
    }

    /// Takes the first of these messages, if it can, and with [`Terms::Shared`] also those behind it that
    /// may share a connection; [`flush`](Self::flush) then sends them. Returns whether it took any.
    pub fn put(&self, messages: &mut VecDeque<InFlight>, terms: Terms, now: Instant) -> bool {
        let mut state = self.lock();
        let mut has_taken = false;
        while let Some(first) = messages.front()
            && state.takes(terms, now)
            && (!has_taken || (terms == Terms::Shared && !first.goes_alone))
            && let Some(message) = messages.pop_front()
        {
            state.put(message);
            has_taken = true;
        }
        has_taken
    }

    /// If it is empty, takes the `next` message or, without one, is no longer exclusive.
    pub fn put_next(&self, next: impl FnOnce() -> Option<InFlight>) {
        let mut state = self.lock();
        if !state.is_empty() {
            return;
        }
        match next() {
            Some(message) => state.put(message),
            None => state.is_exclusive = false,
        }
    }

    /// Whether it is open as far as is known here, and has nothing to be read.
    pub fn is_quiet(&self) -> bool {
        matches!(&self.lock().phase, Phase::Open(stream) if is_quiet(stream))
    }

    /// Makes it exclusive: it takes no further message until it is empty.
    pub fn reserve(&self) {
        self.lock().is_exclusive = true;
    }

    /// Messages on it; `usize::MAX` if it is exclusive.
    pub fn load(&self) -> usize {
        let state = self.lock();
        if state.is_exclusive { usize::MAX } else { state.sent.len() + state.unsent.len() }
    }

    /// Sends what has gathered, if nothing is on its way, without waiting.
    pub fn flush(self: &Arc<Self>) {
        self.flush_locked(self.lock());
    }

    fn flush_locked<'a>(self: &'a Arc<Self>, mut state: MutexGuard<'a, State>) {
        while !state.is_sending
            && !state.unsent.is_empty()
            && (state.sent.is_empty() || state.gathered > MAX_GATHERED)
            && let Phase::Open(stream) = &state.phase
        {
            let stream = Arc::clone(stream);
            state.is_sending = true;
            let bytes = state.take_unsent(&self.server, &self.dispatcher);
            drop(state);
            match send_now(&stream, &bytes) {
                Ok(sent) if sent == bytes.len() => {}
                Ok(sent) => return self.send_in_background(stream, bytes[sent..].to_vec()),
                Err(_) => {
                    // Its thread sees the end, and takes care of the messages.
                    let _ = stream.shutdown(Shutdown::Both);
                    return;
                }
            }
            state = self.lock();
            state.is_sending = false;
        }
    }

    /// The server takes no more bytes for now.
    #[inline(never)] // As `new`.
    fn send_in_background(self: &Arc<Self>, stream: Arc<TcpStream>, bytes: Vec<u8>) {
        let (upstream, socket) = (Arc::clone(self), Arc::clone(&stream));
        let then = Box::new(move |result: io::Result<()>| match result {
            Ok(()) => {
                upstream.lock().is_sending = false;
                upstream.flush();
            }
            Err(_) => drop(socket.shutdown(Shutdown::Both)),
        });
        // When the time of its messages is over, the connection ends.
        let deadline = Instant::now() + LONGEST_SEND;
        let stall_limit = LONGEST_SEND;
        self.dispatcher.background.send(Unsent { stream, bytes, deadline, stall_limit, then });
    }

    /// Ends the connection, if no message is on it. Returns whether it has.
    pub fn end_if_idle(&self) -> bool {
        let mut state = self.lock();
        let is_idle = state.is_empty();
        if is_idle {
            state.end();
        }
        is_idle
    }

    /// Ends the connection: the server has left the table, and what it has not acked goes elsewhere at
    /// once, even if the connection is still being made or waits for a thread. [`run`](Self::run) reports
    /// a second time and finds nothing left.
    pub fn abandon(&self) {
        self.lock().is_abandoned = true;
        self.report(None, Instant::now());
    }

    /// Serves the connection to its end, and then those that replace it.
    pub fn run(self: Arc<Self>) {
        let mut next = Some(self);
        while let Some(upstream) = next {
            let since = Instant::now();
            // A bug that ends this connection in a panic ends no other, and keeps no client waiting.
            let end = catch_unwind(AssertUnwindSafe(|| upstream.serve()));
            let backend = &upstream.server.handle;
            next = backend.replace(&upstream);
            match end {
                Ok(end) => upstream.report(end.err(), since),
                Err(_) => upstream.drop_messages(),
            }
            if backend.is_short_of_threads()
                && let Some(next) = next.take()
            {
                // Other servers have waited longer for this thread.
                backend.submit(next, &upstream.dispatcher);
            }
        }
    }

    fn serve(self: &Arc<Self>) -> Result<(), AttemptError> {
        // The time of its messages may have run out before it had a thread.
        if self.end_if_idle() {
            return Ok(());
        }
        let mut connection = self.connect(&self.server.handle)?;
        let mut state = self.lock();
        if matches!(state.phase, Phase::Ended) {
            return Ok(());
        }
        state.phase = Phase::Open(Arc::clone(connection.stream()));
        drop(state);
        self.flush();
        self.read_acks(&mut connection)
    }

    fn connect(&self, backend: &Backend) -> Result<Connection, AttemptError> {
        let Settings { connect_timeout: whole, max_packet, .. } = backend.settings;
        let deadline = self.lock().next_deadline();
        let left = deadline.map_or(whole, |at| at.saturating_duration_since(Instant::now()));
        let connected = connect(backend.address, whole.min(left))
            .and_then(|stream| Connection::from_connected(stream, max_packet));
        let with_memory = |mut connection: Connection| {
            connection.draw_on(Arc::clone(&backend.memory));
            connection
        };
        connected.map(with_memory).map_err(|error| {
            if is_local(&error) {
                backend.record_lack();
                AttemptError::OutOfResources(reason(&error))
            } else if error.kind() == io::ErrorKind::TimedOut && left < whole {
                AttemptError::Timeout(left)
            } else {
                AttemptError::Unreachable(reason(&error))
            }
        })
    }

    /// Hands out acks until the connection ends or is not needed any more.
    fn read_acks(self: &Arc<Self>, connection: &mut Connection) -> Result<(), AttemptError> {
        let mut held = HeldReplies::default();
        let mut follower = Follower::default();
        let mut last = Instant::now();
        let mut woken = last;
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
                Err(ReceiveError::Io(error)) => {
                    let reason = format!("the connection broke: {}", reason(&error));
                    let was_kept = self.lock().was_used;
                    return Err(AttemptError::ConnectionClosed { reason, was_kept });
                }
                Err(error @ ReceiveError::TooLarge { .. }) => {
                    return Err(AttemptError::AckTooLarge(error.to_string()));
                }
                Err(ReceiveError::NoMemory) => return Err(AttemptError::NoMemory),
                Err(error) => return Err(AttemptError::BadAck(error.to_string())),
            }
            held.send();
            let acks = connection.take_packets();
            let now = Instant::now();
            self.settle(&acks, connection, &mut held, (last, now))?;
            (last, woken) = (now, now);
            if !self.go_on() {
                return Ok(());
            }
        }
    }

    /// Sends what has gathered while acks were awaited. Returns `false` if the connection was idle and has
    /// ended.
    fn go_on(self: &Arc<Self>) -> bool {
        let state = self.lock();
        if !state.is_empty() {
            self.flush_locked(state);
            return true;
        }
        drop(state);
        if !self.server.handle.put_next(self) && self.end_if_idle() {
            return false;
        }
        // It has the next message, or one that came in between, or stays open without any.
        self.flush();
        true
    }

    /// Gives up messages whose time is over, and ends the connection if it has served its time. Returns when
    /// the next message is late.
    pub fn expire(&self, has_ack_begun: bool) -> Option<Instant> {
        let now = Instant::now();
        let mut state = self.lock();
        let late = state.take_late(now);
        let is_idle =
            state.is_empty() && now.saturating_duration_since(state.idle_since) >= MAX_IDLE_TIME;
        // All its messages were given up. A server with a lease may still work on them: they keep their
        // permits until the lease ends. Once its ack has begun it is at work no more.
        let is_done = has_ack_begun && state.sent.len() == 1;
        let is_at_work = self.server.leased && state.holds_permit() && !is_done;
        let is_forsaken = !state.sent.is_empty() && !state.has_live() && !is_at_work;
        if is_idle || is_forsaken {
            // Its thread sees the end.
            state.end();
        }
        let next = state.next_deadline();
        drop(state);
        for (message, since, limit) in late {
            self.fail(message, AttemptError::Timeout(limit), since);
        }
        next
    }

    fn fail(&self, message: InFlight, error: AttemptError, since: Instant) {
        if message.is_sent {
            self.dispatcher.events.lost(&self.server);
        }
        self.dispatcher.failed(&self.server, message, error, since);
    }

    /// Says what became of the messages that are left when the connection has ended.
    fn report(&self, error: Option<AttemptError>, since: Instant) {
        let mut state = self.lock();
        let was_made = !matches!(state.phase, Phase::Connecting);
        state.end();
        let (sent, unsent) = (std::mem::take(&mut state.sent), std::mem::take(&mut state.unsent));
        let error = if state.is_abandoned { Some(AttemptError::Left) } else { error };
        let is_for_all = state.is_abandoned || !was_made;
        drop(state);
        for (index, exchange) in sent.into_iter().enumerate() {
            let sent_at = exchange.sent_at;
            let Some(message) = exchange.into_message() else { continue };
            let own = error.clone().filter(|_| is_for_all || index == 0);
            let own = own.unwrap_or(AttemptError::Behind);
            self.fail(message, own, sent_at);
        }
        for message in unsent {
            let own = error.clone().filter(|_| is_for_all).unwrap_or(AttemptError::Behind);
            self.fail(message, own, since);
        }
    }

    /// Has the clients of its messages told that the proxy has given them up.
    fn drop_messages(&self) {
        let mut state = self.lock();
        state.end();
        let messages = (std::mem::take(&mut state.sent), std::mem::take(&mut state.unsent));
        drop(state);
        drop(messages);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}
