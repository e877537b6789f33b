//! The replies to one client, in the order of its packets.
//!
//! Acks come from several servers, read by several threads, in any order. Each packet reserves a slot when it
//! is read. A reply waits in its slot until all earlier ones are there; the thread that fills the first slot
//! sends all that are ready.

mod batch;
mod ending;
mod sending;

use std::collections::VecDeque;
use std::net::{SocketAddr, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use super::events::Events;
use crate::net::background::Background;
use crate::net::budget::{Budget, Reservation};
use crate::net::lock::{lock, whole};
use ending::ReadState;
use sending::Sending;

pub use batch::HeldReplies;

/// For back-pressure, this many unsent bytes weigh as much as one pending reply.
const UNSENT_UNIT: usize = 1 << 10;

/// The replies to one client.
#[derive(Debug)]
pub struct ReplyQueue {
    stream: Arc<TcpStream>,
    peer: SocketAddr,
    /// What is said and counted about its messages.
    pub events: Arc<Events>,
    background: Arc<Background>,
    state: Mutex<State>,
    changed: Condvar,
}

/// The slot of one reply among the others.
#[derive(Debug)]
pub struct ReplySlot {
    /// The queue that it belongs to.
    pub queue: Arc<ReplyQueue>,
    number: u64,
}

#[derive(Debug, Default)]
struct State {
    /// The number of the first of `slots`.
    first: u64,
    /// One entry for each reserved slot that was not passed: `None` while its reply is pending, `Some` while
    /// the reply waits for an earlier one.
    slots: VecDeque<Option<Vec<u8>>>,
    /// The bytes of those that wait.
    waiting_bytes: usize,
    /// Replies that can be sent, one after another, and their number.
    ready: Vec<u8>,
    ready_count: usize,
    /// What is on its way to the client.
    sending: Sending,
    /// When the queue last became empty; `None` before the first reply.
    settled_at: Option<Instant>,
    /// The client has gone, or does not read.
    broken: bool,
    /// Its replies were dropped: it did not read them in time, or they took too much memory.
    was_given_up: bool,
    /// The share of the memory budget for bytes that the client has not read, and for replies that wait for
    /// an earlier one.
    reservation: Option<Reservation>,
    /// The budget is used up.
    lacks_memory: bool,
    /// The client's own thread waits until something changes here.
    awaited: bool,
    /// When the client's thread reads, and whether it may.
    read_state: ReadState,
    /// The peer is a client: some of its packets were messages.
    is_client: bool,
}

impl State {
    fn fill(&mut self, number: u64, packet: &[u8]) {
        if number > self.first {
            self.fill_later(number, packet);
        } else {
            self.fill_first(packet);
        }
        if self.broken {
            self.forget();
        }
        self.update_reservation();
    }

    fn fill_later(&mut self, number: u64, packet: &[u8]) {
        let reply = [packet, b"\n"].concat();
        // Slots are reserved in order and removed only when filled.
        let index = usize::try_from(number - self.first).ok();
        if let Some(slot) = index.and_then(|index| self.slots.get_mut(index)) {
            self.waiting_bytes += reply.len();
            *slot = Some(reply);
        }
    }

    /// Fills the first slot: its reply is ready, and so are those that wait right behind it.
    fn fill_first(&mut self, packet: &[u8]) {
        // At once: the newline's own growth would double what a long packet takes.
        self.ready.reserve(packet.len() + 1);
        self.ready.extend_from_slice(packet);
        self.ready.push(b'\n');
        self.pass_front();
        while let Some(Some(next)) = self.slots.front() {
            self.waiting_bytes -= next.len();
            self.ready.extend_from_slice(next);
            self.pass_front();
        }
    }

    /// Drops all replies: they cannot be sent any more.
    fn forget(&mut self) {
        self.ready = Vec::new();
        self.slots.iter_mut().flatten().for_each(|reply| *reply = Vec::new());
        self.waiting_bytes = 0;
    }

    fn pass_front(&mut self) {
        self.slots.pop_front();
        self.first += 1;
        self.ready_count += 1;
    }

    /// Weight of what is owed to the client: one per slot, one if any bytes are unsent, and one per
    /// `UNSENT_UNIT` of them. While it is `MAX_UNSETTLED` or more, the session does not read. For a broken
    /// connection only the slots count.
    fn unsettled(&self) -> usize {
        let is_unsent = self.sending != Sending::Nothing || !self.ready.is_empty();
        let bytes = self.ready.len() + self.sending.bytes() + self.waiting_bytes;
        let unsent = usize::from(is_unsent) + bytes / UNSENT_UNIT;
        self.slots.len() + if self.broken { 0 } else { unsent }
    }
}

impl ReplyQueue {
    /// The replies that go to `peer` on `stream`. Not inlined: its caller's stack would keep the room for
    /// what is built here.
    #[inline(never)]
    pub fn new(
        stream: Arc<TcpStream>,
        peer: SocketAddr,
        events: Arc<Events>,
        background: Arc<Background>,
        memory: Arc<Budget>,
    ) -> Arc<Self> {
        let state = State { reservation: Some(Reservation::new(memory)), ..State::default() };
        let (state, changed) = (Mutex::new(state), Condvar::new());
        Arc::new(ReplyQueue { stream, peer, events, background, state, changed })
    }

    /// Reserves the slot of the reply to the next packet, which is a message.
    pub fn reserve_for_message(self: &Arc<Self>) -> ReplySlot {
        let mut state = self.lock();
        state.is_client = true;
        self.reserve_in(state)
    }

    /// Reserves the slot of the reply to the next packet.
    pub fn reserve(self: &Arc<Self>) -> ReplySlot {
        self.reserve_in(self.lock())
    }

    fn reserve_in(self: &Arc<Self>, mut state: MutexGuard<'_, State>) -> ReplySlot {
        let number = state.first + state.slots.len() as u64;
        state.slots.push_back(None);
        drop(state);
        ReplySlot { queue: Arc::clone(self), number }
    }

    /// Fills slots of this queue with a server's acks. Sends the ready replies, unless more are pending than
    /// ready: then leaves them, so that a later call sends all at once. Returns `true` if it left some; the
    /// caller must [`flush`](Self::flush) soon.
    pub fn fill_batch<'a>(
        self: &Arc<Self>,
        replies: impl Iterator<Item = (ReplySlot, &'a [u8])>,
    ) -> bool {
        let mut state = self.lock();
        for (slot, packet) in replies {
            state.fill(slot.number, packet);
        }
        self.notify(&state);
        let is_left = state.ready_count > 0 && state.ready_count < state.slots.len();
        if !is_left {
            self.send(state);
        }
        is_left
    }

    fn notify(&self, state: &State) {
        if state.awaited {
            self.changed.notify_all();
        }
    }

    /// Whether the peer is a client.
    pub fn is_client(&self) -> bool {
        self.lock().is_client
    }

    /// How long no reply has been pending; `MAX` if none ever was; `None` while one is pending or unsent.
    pub fn settled_for(&self) -> Option<Duration> {
        let state = self.lock();
        let settled_for = state.settled_at.map_or(Duration::MAX, |at| at.elapsed());
        (state.unsettled() == 0).then_some(settled_for)
    }

    /// Whether replies were given up because the client did not read them.
    pub fn was_given_up(&self) -> bool {
        self.lock().was_given_up
    }

    /// Blocks until [`unsettled`](State::unsettled) is below `limit`. That ends, since every reply comes
    /// within its message's time. Returns `false` if the connection is broken.
    pub fn wait_for_fewer_than(&self, limit: usize) -> bool {
        let mut state = self.lock();
        while state.unsettled() >= limit {
            state.awaited = true;
            state = whole(self.changed.wait(state));
        }
        state.awaited = false;
        !state.broken
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

impl ReplySlot {
    /// Puts the reply, a packet without a newline, in its slot. Returns the queue, which is to be
    /// [flushed](ReplyQueue::flush).
    pub fn fill(self, packet: &[u8]) -> Arc<ReplyQueue> {
        let mut state = self.queue.lock();
        state.fill(self.number, packet);
        self.queue.notify(&state);
        drop(state);
        self.queue
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::net::TcpListener;

    use std::thread;

    use super::*;
    use crate::cli::terminal::Terminal;
    use crate::proxy::stats::Stats;

    fn pair() -> (Arc<ReplyQueue>, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (stream, peer) = listener.accept().unwrap();
        let events = Arc::new(Events::new(Terminal::new("test", true), Stats::new(false)));
        let memory = Budget::new(usize::MAX);
        (
            ReplyQueue::new(Arc::new(stream), peer, events, Background::start().unwrap(), memory),
            client,
        )
    }

    #[test]
    fn replies_leave_in_the_order_of_their_slots() {
        let (replies, mut client) = pair();
        let mut slots: Vec<_> = (0..5).map(|_| Some(replies.reserve_for_message())).collect();
        for place in [3, 1, 0, 4, 2] {
            slots[place].take().unwrap().fill(place.to_string().as_bytes());
            replies.flush();
        }
        assert!(replies.wait_for_fewer_than(1));
        let mut read = [0; 10];
        client.read_exact(&mut read).unwrap();
        assert_eq!(&read, b"0\n1\n2\n3\n4\n");
    }

    #[test]
    fn a_client_that_does_not_read_keeps_nobody_waiting() {
        let (replies, mut client) = pair();
        let reply = vec![b'x'; 8 << 20];
        replies.reserve_for_message().fill(&reply);
        replies.flush();
        replies.reserve_for_message().fill(b"last");
        replies.flush();
        // Both are on their way, though nothing was read so far.
        let reader = thread::spawn(move || {
            let mut read = vec![0; reply.len() + 1 + 5];
            client.read_exact(&mut read).map(|()| read)
        });
        assert!(replies.wait_for_fewer_than(1));
        assert!(reader.join().unwrap().unwrap().ends_with(b"x\nlast\n"));
    }

    #[test]
    fn a_client_that_has_gone_ends_the_wait() {
        let (replies, client) = pair();
        drop(client);
        // The first reply may still go out; the answer to it is a reset.
        while replies.wait_for_fewer_than(1) {
            replies.reserve_for_message().fill(b"a reply");
            replies.flush();
        }
        assert!(replies.settled_for().is_some());
    }

    #[test]
    fn a_client_that_is_given_up_for_memory_ends_the_wait() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let _client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (stream, peer) = listener.accept().unwrap();
        let events = Arc::new(Events::new(Terminal::new("test", true), Stats::new(false)));
        let background = Background::start().unwrap();
        let replies = ReplyQueue::new(Arc::new(stream), peer, events, background, Budget::new(0));
        let (first, second) = (replies.reserve(), replies.reserve());
        let own = Arc::clone(&replies);
        let (sender, done) = std::sync::mpsc::channel();
        thread::spawn(move || sender.send(own.wait_for_fewer_than(1)));
        while !replies.lock().awaited {
            thread::yield_now();
        }
        // Two threads fill, and flush once the one that waits has looked.
        second.fill(&vec![b'x'; 1 << 20]);
        first.fill(b"{}");
        let mut state = replies.lock();
        state.awaited = false;
        replies.changed.notify_all();
        drop(state);
        while !replies.lock().awaited {
            thread::yield_now();
        }
        replies.flush();
        replies.flush();
        assert_eq!(replies.lock().unsettled(), 0, "nothing is owed");
        assert_eq!(done.recv_timeout(Duration::from_secs(5)), Ok(false));
    }
}
