//! The messages on one connection: unsent ones, and sent ones whose acks are pending.

use std::collections::VecDeque;
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::net::connection::is_quiet;
use crate::proxy::dispatch::{Deliver, Dispatcher};
use crate::proxy::in_flight::{InFlight, Line, Permit};
use crate::proxy::table::Server;

/// The most messages that share a connection.
const MAX_PIPELINED: usize = 256;

/// A connection whose oldest sent message has waited longer for its ack takes no further ones as
/// `Terms::Shared`.
const LIVELY: Duration = Duration::from_millis(10);

/// After an ack has been awaited for this long, the unsent messages behind it go elsewhere.
const STALL_TIME: Duration = Duration::from_secs(1);

/// When a message may share a connection with others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Terms {
    /// Only if no other message is on it.
    Idle,
    /// Pipelined behind others, if the oldest was sent less than `LIVELY` ago.
    Shared,
    /// Pipelined behind others, in any case.
    Any,
}

/// A connection without messages ends after this long; a server of ours closes its side much later.
const MAX_IDLE_TIME: Duration = Duration::from_secs(5);

/// What is on a connection, and what it waits for.
#[derive(Debug)]
pub struct State {
    pub phase: Phase,
    /// Messages that are not sent yet.
    pub unsent: VecDeque<InFlight>,
    /// Their bytes.
    pub gathered: usize,
    /// Messages that were sent, in the order in which their acks come.
    pub sent: VecDeque<SentMessage>,
    /// A thread is sending, and goes on with what gathers meanwhile.
    pub is_sending: bool,
    /// Accepts no further message until it is empty and its thread has asked the backend for the next one.
    pub is_exclusive: bool,
    /// It has received acks or refusals.
    pub was_used: bool,
    /// When it was made, or acks last came.
    pub idle_since: Instant,
}

/// How far a connection has come.
#[derive(Debug)]
pub enum Phase {
    /// It is being made.
    Connecting,
    /// It is there.
    Open(Arc<TcpStream>),
    /// It takes no more messages.
    Ended,
}

/// A message that was sent.
#[derive(Debug)]
pub struct SentMessage {
    /// `None` once it was given up; its ack is still awaited.
    pub message: Option<InFlight>,
    /// The permit of one that was given up: the server may still work on it.
    permit: Option<Permit>,
    /// When it was sent.
    pub sent_at: Instant,
    /// When it is given up.
    pub give_up_at: Instant,
}

impl State {
    /// The state of a new connection for this message.
    pub fn new(message: InFlight) -> Self {
        let mut state = State {
            phase: Phase::Connecting,
            unsent: VecDeque::new(),
            gathered: 0,
            sent: VecDeque::new(),
            is_sending: false,
            is_exclusive: false,
            was_used: false,
            idle_since: Instant::now(),
        };
        state.put(message);
        state
    }

    /// How many messages are on it, those that were given up included.
    pub fn len(&self) -> usize {
        self.sent.len() + self.unsent.len()
    }

    /// Whether no message is on it.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether it should close: it has been idle for too long, or all its messages were given up. Exception:
    /// a server that `has_lease` may still be at work on a message that holds a permit, until the ack of the
    /// only message left begins to arrive.
    pub fn is_over(&self, has_lease: bool, has_ack_begun: bool, now: Instant) -> bool {
        if self.is_empty() {
            return now.saturating_duration_since(self.idle_since) >= MAX_IDLE_TIME;
        }
        let is_last_done = has_ack_begun && self.sent.len() == 1;
        let holds_permit = self.sent.iter().any(|sent| sent.permit.is_some());
        let is_at_work = has_lease && holds_permit && !is_last_done;
        let is_live = |sent: &SentMessage| sent.message.is_some();
        self.unsent.is_empty() && !self.sent.iter().any(is_live) && !is_at_work
    }

    /// When the first of its messages is given up.
    pub fn next_deadline(&self) -> Option<Instant> {
        let sent = self.sent.iter().filter(|sent| sent.message.is_some());
        let unsent = self.unsent.iter().map(|message| message.deadline);
        sent.map(|sent| sent.give_up_at).chain(unsent).min()
    }

    /// Removes the late messages, each with the start and the length of its time. Sent ones keep their
    /// places: their acks are still expected.
    pub fn take_late(&mut self, now: Instant) -> Vec<(InFlight, Instant, Duration)> {
        let mut late = Vec::new();
        for sent in self.sent.iter_mut().filter(|sent| sent.give_up_at <= now) {
            let Some(mut message) = sent.message.take() else { continue };
            sent.permit = message.permit.take();
            late.push((message, sent.sent_at, sent.give_up_at - sent.sent_at));
        }
        for message in std::mem::take(&mut self.unsent) {
            if message.deadline > now {
                self.unsent.push_back(message);
                continue;
            }
            self.gathered -= message.line.len();
            let (arrived, limit) = (message.arrived, message.deadline - message.arrived);
            late.push((message, arrived, limit));
        }
        self.is_exclusive &= !self.is_empty();
        late
    }

    /// Removes the unsent messages if no ack has come for `STALL_TIME`.
    pub fn take_stalled(&mut self, now: Instant) -> VecDeque<InFlight> {
        let since = self.sent.front().map(|sent| sent.sent_at.max(self.idle_since));
        if since.is_none_or(|since| now.saturating_duration_since(since) < STALL_TIME) {
            return VecDeque::new();
        }
        self.gathered = 0;
        std::mem::take(&mut self.unsent)
    }

    /// Takes a message.
    pub fn put(&mut self, message: InFlight) {
        self.is_exclusive = message.needs_own_connection;
        self.gathered += message.line.len();
        self.unsent.push_back(message);
    }

    /// Accepts no more messages. Returns the stream if it is open; the caller shuts it down to end the thread
    /// that reads the acks.
    pub fn close(&mut self) -> Option<Arc<TcpStream>> {
        match std::mem::replace(&mut self.phase, Phase::Ended) {
            Phase::Open(stream) => Some(stream),
            Phase::Connecting | Phase::Ended => None,
        }
    }

    /// Accepts no more messages, and shuts the stream down, which ends the thread that reads the acks.
    pub fn end(&mut self) {
        if let Some(stream) = self.close() {
            // It fails if the server has closed it already.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// Moves the unsent messages to `sent`, sets their timeouts, and returns their bytes.
    pub fn take_unsent<B: Deliver>(
        &mut self,
        server: &Server<B>,
        dispatcher: &Dispatcher<B>,
    ) -> Line {
        let now = Instant::now();
        let reply_timeout = dispatcher.settings.reply_timeout;
        let line = match self.unsent.make_contiguous() {
            // A single message is not copied.
            [only] => only.line.clone(),
            all => {
                let mut bytes = Vec::with_capacity(self.gathered);
                all.iter().for_each(|message| bytes.extend_from_slice(&message.line));
                Line::new(bytes)
            }
        };
        self.gathered = 0;
        for mut message in self.unsent.drain(..) {
            message.is_sent = true;
            dispatcher.events.forwarding(server, &message.about());
            let mut give_up_at = message.give_up_at(now);
            if message.server_limit.is_some() {
                give_up_at = give_up_at.min(now + reply_timeout);
            }
            let message = Some(message);
            self.sent.push_back(SentMessage { message, permit: None, sent_at: now, give_up_at });
        }
        line
    }

    fn is_lively(&self, now: Instant) -> bool {
        let oldest = self.sent.front().map(|sent| sent.sent_at);
        oldest.is_none_or(|oldest| now.saturating_duration_since(oldest) < LIVELY)
    }

    /// Whether it accepts a message.
    pub fn takes(&self, terms: Terms, now: Instant) -> bool {
        match (&self.phase, terms) {
            _ if self.is_exclusive => false,
            (Phase::Ended, _) => false,
            // What the server has closed, or sent unasked, would cost the message an attempt.
            (Phase::Open(stream), _) if self.is_empty() => is_quiet(stream),
            (_, Terms::Idle) => false,
            (_, Terms::Shared) => self.len() < MAX_PIPELINED && self.is_lively(now),
            (_, Terms::Any) => true,
        }
    }
}
