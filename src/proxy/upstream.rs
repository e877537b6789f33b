//! One connection to a server, and the messages on it.
//!
//! A thread of its own ([`run`](Upstream::run)) connects, reads the acks, and hands them out: they come in
//! the order of the messages. The thread that puts a message on an open connection sends it, without
//! blocking. While acks are pending, messages gather, and are sent together when the last of those acks has
//! come (Nagle's algorithm). If no ack comes for `STALL_TIME`, they go elsewhere. A connection on which
//! anything went wrong is not used again: a late reply must not reach another client.

mod state;

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
use crate::net::connection::is_quiet;
use crate::net::lock::lock;

pub use state::{Phase, SentMessage, State, Terms};

/// Above this many gathered bytes, send without waiting for acks.
const MAX_GATHERED: usize = 64 << 10;

/// No limit of its own for a send: the messages' deadlines close the connection first.
const LONGEST_SEND: Duration = Duration::from_secs(24 * 3600);

/// A connection to a server.
#[derive(Debug)]
pub struct Upstream<B> {
    /// The CPU of the client thread that opened it. Threads on this CPU prefer it.
    pub cpu: usize,
    /// The server.
    pub server: Arc<Server<B>>,
    /// Where its messages come from, and go when it fails.
    pub dispatcher: Arc<Dispatcher<B>>,
    state: Mutex<State>,
}

impl<B: Deliver> Upstream<B> {
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
    pub fn new_like(&self, message: InFlight) -> Arc<Self> {
        Self::new(self.cpu, &self.server, &self.dispatcher, message)
    }

    /// Takes the first of these messages, if it can, and with [`Terms::Shared`] also those behind it that
    /// may share a connection; [`flush`](Self::flush) then sends them. Returns whether it took any.
    pub fn put(&self, messages: &mut VecDeque<InFlight>, terms: Terms, now: Instant) -> bool {
        let mut state = self.lock();
        let mut has_taken = false;
        while let Some(first) = messages.front()
            && state.takes(terms, now)
            && (!has_taken || (terms == Terms::Shared && !first.needs_own_connection))
            && let Some(message) = messages.pop_front()
        {
            state.put(message);
            has_taken = true;
        }
        if terms == Terms::Any && !has_taken && state.is_empty() && !state.is_exclusive {
            // The server has closed it, or has sent something unasked. Left open, its thread would take the
            // message that is queued now only after serving another. Ended, the thread takes it at once.
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
    pub fn make_exclusive(&self) {
        let mut state = self.lock();
        if state.is_empty() && !state.is_exclusive {
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

    /// As [`flush`](Self::flush), for a caller that has locked the state.
    pub fn flush_locked<'a>(self: &'a Arc<Self>, mut state: MutexGuard<'a, State>) {
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
        self.fail_all(AttemptError::Removed, Instant::now());
    }

    /// Hands back a message whose attempt, begun at `since`, failed.
    pub fn fail(&self, message: InFlight, error: AttemptError, since: Instant) {
        if message.is_sent {
            self.dispatcher.events.lost(&self.server);
        }
        self.dispatcher.failed(&self.server, message, error, since);
    }

    /// Closes the connection and fails its messages: the one whose ack was next with `error`, the others with
    /// `Behind`. All with `error` if the connection was never open or the server was removed.
    pub fn fail_all(&self, error: AttemptError, since: Instant) {
        let (was_made, sent, unsent) = self.end();
        let is_for_all = !was_made || error == AttemptError::Removed;
        let behind = if is_for_all { error.clone() } else { AttemptError::Behind };
        let errors = iter::once(error).chain(iter::repeat(behind.clone()));
        for (SentMessage { message, sent_at, .. }, error) in sent.into_iter().zip(errors) {
            if let Some(message) = message {
                self.fail(message, error, sent_at);
            }
        }
        for message in unsent {
            self.fail(message, behind.clone(), since);
        }
    }

    /// Ends the connection. Returns whether it was made, and the messages that are left.
    pub fn end(&self) -> (bool, VecDeque<SentMessage>, VecDeque<InFlight>) {
        let mut state = self.lock();
        let was_made = !matches!(state.phase, Phase::Connecting);
        state.end();
        (was_made, mem::take(&mut state.sent), mem::take(&mut state.unsent))
    }

    /// Locks what is on it. Whoever holds this lock must not take the one of its server's connections.
    pub fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}
