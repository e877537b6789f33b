//! One connection to a server, and the messages on it.
//!
//! A thread of its own connects, reads the acks, and hands them out: they come in the order of the messages.
//! The thread that puts a message on an open connection sends it, without blocking. While acks are pending,
//! messages gather, and are sent together when the last of those acks has come (Nagle's algorithm). A
//! connection on which anything went wrong is not used again: a late reply must not reach another client.

mod settle;
mod state;
mod thread;

use std::collections::VecDeque;
use std::io;
use std::iter;
use std::mem;
use std::net::{Shutdown, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use super::dispatch::{AttemptError, Deliver, Dispatcher};
use super::in_flight::InFlight;
use super::table::Server;
use crate::net::background::{Unsent, send_now};
use crate::net::budget::Budget;
use crate::net::connection::is_quiet;
use crate::net::lock::lock;
use state::{Exchange, Phase, State};

pub use state::Terms;

/// Above this many gathered bytes, send without waiting for acks.
const MAX_GATHERED: usize = 64 << 10;

/// A connection without messages ends after this long; a server of ours closes its side much later.
const MAX_IDLE_TIME: Duration = Duration::from_secs(5);

/// If bytes are unread when messages are late, the connection's thread gets this long to read them.
const READ_TIME: Duration = Duration::from_millis(100);

/// No limit of its own for a send: the messages' deadlines close the connection first.
const LONGEST_SEND: Duration = Duration::from_secs(24 * 3600);

/// What a connection needs of the connection pool it belongs to.
pub trait Pool: Deliver {
    /// How a connection is made.
    fn connecting(&self) -> Connecting<'_>;

    /// Called when the proxy lacked local resources for a connection.
    fn record_lack(&self);

    /// Records how long the server took for a message, once it was at work on it.
    fn record_latency(&self, took: Duration);

    /// Called when the server refused a message of this length as too large. From then on, messages of this
    /// length do not share a connection, since the server may close it.
    fn record_too_large(&self, length: usize);

    /// Whether the server has left the table.
    fn is_closed(&self) -> bool;

    /// Puts the message that has waited longest, if any, on an idle connection (only for a server with a
    /// lease). Returns `false` if the connection should close.
    fn reuse(&self, upstream: &Upstream<Self>) -> bool;

    /// A connection has ended.
    fn remove(&self, ended: &Arc<Upstream<Self>>);

    /// If a message waits, opens a new connection for the one that has waited longest. The caller serves that
    /// connection.
    fn replace(&self, ended: &Arc<Upstream<Self>>) -> Option<Arc<Upstream<Self>>>;

    /// Whether connections wait for threads, of which the system gives no more.
    fn is_short_of_threads(&self) -> bool;

    /// Serves a connection on a thread of the pool, as soon as one is free.
    fn submit(&self, upstream: Arc<Upstream<Self>>, dispatcher: &Dispatcher<Self>);
}

/// How a connection is made.
#[derive(Debug)]
pub struct Connecting<'a> {
    /// How long that may take.
    pub timeout: Duration,
    /// The longest ack that is taken, in bytes.
    pub max_packet: usize,
    /// For long acks, of all servers and clients together.
    pub memory: &'a Arc<Budget>,
}

/// A connection to a server.
#[derive(Debug)]
pub struct Upstream<B> {
    /// The CPU of the client thread that opened it. Threads on this CPU prefer it.
    pub cpu: usize,
    server: Arc<Server<B>>,
    dispatcher: Arc<Dispatcher<B>>,
    state: Mutex<State>,
}

impl<B: Pool> Upstream<B> {
    /// A connection to `server` for this message; [`run`](Self::run) makes it.
    #[inline(never)] // What is built here would take room on the stacks of all clients' threads.
    pub fn new(
        cpu: usize,
        server: &Arc<Server<B>>,
        dispatcher: &Arc<Dispatcher<B>>,
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

    /// Whether its server has a lease.
    pub fn is_leased(&self) -> bool {
        self.server.leased
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
        if terms == Terms::Any && !has_taken && state.is_empty() && !state.is_exclusive {
            // Closed, or sent to unasked: open, it would ask for the message that is queued now only once
            // it has served another. Ended, its thread asks.
            state.end();
        }
        has_taken
    }

    /// If no message is on it, puts the `next` one on it; if there is none, ends its exclusive use.
    pub fn put_if_empty(&self, next: impl FnOnce() -> Option<InFlight>) {
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

    /// Accepts no further message until it is empty.
    pub fn reserve(&self) {
        let mut state = self.lock();
        if state.is_empty() {
            // As in `put`.
            state.end();
        }
        state.is_exclusive = true;
    }

    /// Messages on it; `usize::MAX` if it is exclusive.
    pub fn load(&self) -> usize {
        let state = self.lock();
        if state.is_exclusive { usize::MAX } else { state.len() }
    }

    /// Sends what has gathered, once no ack is awaited or more than `MAX_GATHERED` bytes have gathered. Never
    /// waits.
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
                    // Its thread sees the end and fails the messages.
                    let _ = stream.shutdown(Shutdown::Both);
                    return;
                }
            }
            state = self.lock();
            state.is_sending = false;
        }
    }

    /// Sends the rest in the background: the server takes no more bytes for now.
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

    /// Closes the connection of a removed server. Its unacked messages go to other servers at once, even if
    /// the connection is not open yet.
    pub fn abandon(&self) {
        self.fail_all(AttemptError::Left, Instant::now());
    }

    /// As [`expire`](Self::expire), but if bytes are unread, leaves them to the connection's thread: after
    /// the process was suspended they may be acks that came in time.
    pub fn expire_if_quiet(&self) -> Option<Instant> {
        let is_left = matches!(&self.lock().phase, Phase::Open(stream) if !is_quiet(stream));
        if is_left { Some(Instant::now() + READ_TIME) } else { self.expire(false) }
    }

    /// Fails the late messages. Closes the connection if it has been idle for too long, or if all its
    /// messages were given up. Returns when the next message is late.
    pub fn expire(&self, has_ack_begun: bool) -> Option<Instant> {
        let now = Instant::now();
        // First: whoever holds the backend's lock may take this one's.
        let has_lease = self.server.leased && !self.server.handle.is_closed();
        let mut state = self.lock();
        let late = state.take_late(now);
        let stalled = state.take_stalled(now);
        let is_idle =
            state.is_empty() && now.saturating_duration_since(state.idle_since) >= MAX_IDLE_TIME;
        // Close a connection on which every message was given up. Exception: a server with a lease may still
        // be at work on a message that holds a permit, until the ack of the only message left begins to
        // arrive.
        let is_done = has_ack_begun && state.sent.len() == 1;
        let is_at_work = has_lease && state.holds_permit() && !is_done;
        let is_abandoned = !state.sent.is_empty() && !state.has_live() && !is_at_work;
        let ended = if is_idle || is_abandoned { state.close() } else { None };
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

    fn fail(&self, message: InFlight, error: AttemptError, since: Instant) {
        if message.is_sent {
            self.dispatcher.events.lost(&self.server);
        }
        self.dispatcher.failed(&self.server, message, error, since);
    }

    /// Closes the connection and fails its messages: the one whose ack was next with `error`, the others with
    /// `Behind`. All with `error` if the connection was never open or the server was removed.
    fn fail_all(&self, error: AttemptError, since: Instant) {
        let (was_made, sent, unsent) = self.end();
        let is_for_all = !was_made || error == AttemptError::Left;
        let behind = if is_for_all { error.clone() } else { AttemptError::Behind };
        let errors = iter::once(error).chain(iter::repeat(behind.clone()));
        for (exchange, error) in sent.into_iter().zip(errors) {
            if let Some(message) = exchange.message {
                self.fail(message, error, exchange.sent_at);
            }
        }
        for message in unsent {
            self.fail(message, behind.clone(), since);
        }
    }

    /// Ends the connection. Returns whether it was made, and the messages that are left.
    pub fn end(&self) -> (bool, VecDeque<Exchange>, VecDeque<InFlight>) {
        let mut state = self.lock();
        let was_made = !matches!(state.phase, Phase::Connecting);
        state.end();
        (was_made, mem::take(&mut state.sent), mem::take(&mut state.unsent))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}
