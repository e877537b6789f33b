//! One connection to a server, and the messages on it.
//!
//! A thread of its own connects, reads the acks, and hands them out: they come in the order of the
//! messages. Whoever puts a message on an open connection sends it, without waiting; while others are on
//! their way, messages gather and go together when the acks of those have come, as Nagle's algorithm has
//! it. A connection on which anything went wrong is not used again: a late reply must not reach another
//! client.

mod state;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::io;
use std::net::{Shutdown, TcpStream};
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::acks::{HeldReplies, check_ack};
use super::backend::{Backend, Settings};
use super::dispatch::{AttemptError, Dispatcher, Failed};
use super::events::Delivery;
use super::in_flight::InFlight;
use super::table::{Failure, Server};
use crate::net::affinity::Follower;
use crate::net::background::{Unsent, send_now};
use crate::net::connect::connect;
use crate::net::connection::{Connection, ReadTimeout, ReceiveError, is_quiet};
use crate::net::os_error::{is_local, reason};
use crate::protocol::Code;
use state::{Exchange, Phase, State};

pub use state::Place;

/// Bytes that gather before they are sent though others are on their way.
const MAX_GATHERED: usize = 64 << 10;

/// A connection without messages ends after this long; a server of ours closes its side much later.
const MAX_IDLE_TIME: Duration = Duration::from_secs(5);

/// Sending ends with the connection, when the time of its messages is over; this is far longer.
const LONGEST_SEND: Duration = Duration::from_secs(24 * 3600);

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
    /// A connection to `server` that is to be made for this message, which [`run`](Self::run) does.
    #[inline(never)] // What is built here would take room on the stacks of all clients' threads.
    pub fn new(
        cpu: usize,
        server: &Arc<Server<Backend>>,
        dispatcher: &Arc<Dispatcher<Backend>>,
        message: InFlight,
        is_exclusive: bool,
    ) -> Arc<Self> {
        Arc::new(Upstream {
            cpu,
            server: Arc::clone(server),
            dispatcher: Arc::clone(dispatcher),
            state: Mutex::new(State::new(message, is_exclusive)),
        })
    }

    /// Another connection, made for this message, to the same server.
    pub fn again(&self, message: InFlight, is_exclusive: bool) -> Arc<Self> {
        Self::new(self.cpu, &self.server, &self.dispatcher, message, is_exclusive)
    }

    /// Takes the first of these messages, if it can, and in [`Place::Shared`] those behind it that may
    /// share a connection, too; [`flush`](Self::flush) then sends them. Returns whether it took any.
    pub fn put(
        &self,
        messages: &mut VecDeque<InFlight>,
        place: Place,
        may_share: impl Fn(&InFlight) -> bool,
        now: Instant,
    ) -> bool {
        let mut state = self.lock();
        let mut has_taken = false;
        while let Some(first) = messages.front()
            && state.takes(place, now)
            && (!has_taken || (place == Place::Shared && may_share(first)))
            && let Some(message) = messages.pop_front()
        {
            state.put(message, place);
            has_taken = true;
        }
        has_taken
    }

    /// Takes the next message, if there is one, or else is open to any; unless others have come already.
    pub fn put_next(&self, next: impl FnOnce() -> Option<(InFlight, Place)>) {
        let mut state = self.lock();
        if !state.is_empty() {
            return;
        }
        match next() {
            Some((message, place)) => state.put(message, place),
            None => state.is_exclusive = false,
        }
    }

    /// Whether it is open as far as is known here, and has nothing to be read.
    pub fn is_quiet(&self) -> bool {
        matches!(&self.lock().phase, Phase::Open(stream) if is_quiet(stream))
    }

    /// Has it take no further message until none is on it.
    pub fn reserve(&self) {
        self.lock().is_exclusive = true;
    }

    /// Messages on it; the most there can be where it takes no other.
    pub fn load(&self) -> usize {
        let state = self.lock();
        if state.is_exclusive { usize::MAX } else { state.sent.len() + state.unsent.len() }
    }

    /// Sends what has gathered, if nothing is on its way, without waiting.
    pub fn flush(self: &Arc<Self>) {
        self.flush_locked(self.lock());
    }

    fn flush_locked<'a>(self: &'a Arc<Self>, mut state: MutexGuard<'a, State>) {
        if std::mem::take(&mut state.wants_timer)
            && let Some(at) = state.timer_at
        {
            drop(state);
            self.start_timer(at);
            state = self.lock();
        }
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
    /// once, though the connection is still being made, or waits for a thread.
    pub fn abandon(&self) {
        self.lock().is_abandoned = true;
        self.report(None, Instant::now());
    }

    /// No thread serves it yet: a timer gives up its messages when their time is over.
    pub fn wait_for_thread(self: &Arc<Self>) {
        let mut state = self.lock();
        let at = state.wakes_at;
        state.timer_at = Some(at);
        drop(state);
        self.start_timer(at);
    }

    /// Serves the connection to its end, and then those that take its place.
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
        let left = self.lock().wakes_at.saturating_duration_since(Instant::now());
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
        let mut wakes_at = self.lock().wakes_at;
        loop {
            let until = if held.is_empty() { wakes_at } else { last + GATHER };
            match connection.wait(ReadTimeout::Until(until)) {
                Ok(true) => follower.follow(|| Some(self.cpu)),
                Ok(false) => return Err(AttemptError::closed(self.lock().was_used)),
                Err(waited @ (ReceiveError::Idle | ReceiveError::Slow(_))) => {
                    held.send();
                    let has_ack_begun = matches!(waited, ReceiveError::Slow(_));
                    if Instant::now() >= wakes_at && self.expire(has_ack_begun) {
                        return Ok(());
                    }
                    wakes_at = self.lock().wakes_at;
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
            let acks = connection.take_packets(usize::MAX);
            let now = Instant::now();
            self.settle(&acks, connection, &mut held, (last, now))?;
            last = now;
            match self.go_on(now) {
                Some(at) => wakes_at = at,
                None => return Ok(()),
            }
        }
    }

    /// Sends what has gathered while acks were awaited, and returns when to look at the deadlines. Without
    /// messages the connection is idle; `None` where it has ended for that.
    fn go_on(self: &Arc<Self>, now: Instant) -> Option<Instant> {
        let mut state = self.lock();
        let wakes_at = state.wakes_at;
        if !state.is_empty() {
            self.flush_locked(state);
            return Some(wakes_at);
        }
        state.idle_since = now;
        drop(state);
        if !self.server.handle.put_next(self) && self.end_if_idle() {
            return None;
        }
        self.flush();
        Some(wakes_at)
    }

    #[inline(never)] // As `new`.
    fn start_timer(self: &Arc<Self>, at: Instant) {
        let upstream = Arc::clone(self);
        self.dispatcher.background.at(at, move || {
            let is_latest = upstream.lock().timer_at == Some(at);
            if !is_latest {
                return;
            }
            upstream.expire(false);
            let mut state = upstream.lock();
            state.timer_at = state.next_deadline();
            let next = state.timer_at;
            drop(state);
            if let Some(next) = next {
                upstream.start_timer(next);
            }
        });
    }

    /// Gives up messages whose time is over. Returns whether the connection has ended with them.
    fn expire(&self, has_ack_begun: bool) -> bool {
        let now = Instant::now();
        let mut late = Vec::new();
        let mut state = self.lock();
        for exchange in state.sent.iter_mut().filter(|exchange| exchange.leave_by <= now) {
            let (sent_at, limit) = (exchange.sent_at, exchange.leave_by - exchange.sent_at);
            late.extend(exchange.message.take().map(|message| (message, sent_at, limit)));
        }
        let (unsent, rest) =
            state.unsent.drain(..).partition::<Vec<_>, _>(|message| message.deadline <= now);
        state.unsent.extend(rest);
        state.gathered = state.unsent.iter().map(|message| message.line().len()).sum();
        state.is_exclusive &= !state.is_empty();
        late.extend(unsent.into_iter().map(|message| {
            let (arrived, limit) = (message.arrived, message.deadline - message.arrived);
            (message, arrived, limit)
        }));
        let idle_check = MAX_IDLE_TIME.min(self.dispatcher.settings.message_timeout);
        state.wakes_at = state.next_deadline().unwrap_or(now + idle_check);
        let is_idle =
            state.is_empty() && now.saturating_duration_since(state.idle_since) >= MAX_IDLE_TIME;
        // Nobody waits for what the server still has. It may be at work on it, though, and the end of its
        // lease would tell that it is not. Once its ack has begun it is at work no more.
        let is_done = has_ack_begun && state.sent.len() == 1;
        let is_at_work = self.server.leased && state.holds_place() && !is_done;
        let is_forsaken = !state.sent.is_empty() && !state.has_live() && !is_at_work;
        if is_idle || is_forsaken {
            state.end();
        }
        drop(state);
        for (message, since, limit) in late {
            self.fail(message, AttemptError::Timeout(limit), since);
        }
        is_idle || is_forsaken
    }

    fn fail(&self, message: InFlight, error: AttemptError, since: Instant) {
        if message.is_sent {
            self.dispatcher.events.lost(&self.server);
        }
        self.dispatcher.failed(&self.server, message, Failed { error, since });
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
        for (place, exchange) in sent.into_iter().enumerate() {
            let sent_at = exchange.sent_at;
            let Some(message) = exchange.into_message() else { continue };
            let own = error.clone().filter(|_| is_for_all || place == 0);
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

    /// Every change under the lock is whole.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hands out acks that came together, since the `last` ones.
    fn settle(
        &self,
        acks: &[Range<usize>],
        connection: &Connection,
        held: &mut HeldReplies,
        (last, now): (Instant, Instant),
    ) -> Result<(), AttemptError> {
        let mut batch: VecDeque<Exchange> = {
            let mut state = self.lock();
            let count = acks.len().min(state.sent.len());
            state.was_used |= count > 0;
            if acks.len() > count {
                state.end();
            }
            state.sent.drain(..count).collect()
        };
        let is_surplus = acks.len() > batch.len();
        let begun = batch.front().map_or(now, |exchange| exchange.sent_at.max(last));
        let (mut acked, mut refused) = (Vec::with_capacity(batch.len()), Vec::new());
        let mut wrong = None;
        for ack in acks.iter().take(batch.len()) {
            let Some(exchange) = batch.pop_front() else { break };
            // The ack of a message that was given up is nobody's.
            let Some(message) = &exchange.message else { continue };
            let ack = connection.bytes(ack.clone());
            let (checked, sent_at) =
                (check_ack(ack, message, self.server.leased), exchange.sent_at);
            match checked {
                // Its place at the server is free from now on.
                Ok(()) => acked.extend(exchange.message.map(|message| (message, ack, sent_at))),
                Err(error @ AttemptError::Refused { .. }) => {
                    refused.extend(exchange.message.map(|message| (message, sent_at, error)));
                }
                Err(error) => {
                    self.lock().end();
                    batch.push_front(exchange);
                    wrong = Some(error);
                    break;
                }
            }
        }
        if let Ok(settled) = u32::try_from(acked.len())
            && settled > 0
        {
            self.server.handle.record_latency((now - begun) / settled);
        }
        let deliveries = acked.iter().map(|(message, ack, sent_at)| Delivery {
            message: message.about(),
            ack,
            took: now.saturating_duration_since(*sent_at),
        });
        self.dispatcher.acked(&self.server, deliveries, now);
        held.fill(acked.into_iter().map(|(message, ack, _)| (message, ack)));
        for (message, sent_at, error) in refused {
            if error.code() == Code::TooLarge {
                self.server.handle.record_too_large(message.line().len());
            }
            self.fail(message, error, sent_at);
        }
        match wrong {
            Some(error) => {
                let mut state = self.lock();
                batch.append(&mut state.sent);
                state.sent = batch;
                Err(error)
            }
            None if is_surplus => {
                let error = AttemptError::BadAck("nothing was asked".to_owned());
                self.dispatcher.blame(&self.server, Failure::MayBeChance, &error, now, now);
                Err(AttemptError::Behind)
            }
            None => Ok(()),
        }
    }
}
