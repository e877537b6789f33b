//! The replies to one client, in the order of its packets.
//!
//! Acks come from several servers, read by several threads, in any order. Each packet reserves a slot
//! when it is taken in; a reply waits in its slot until all before it are there, and the thread that fills
//! the first slot sends all that are ready. Nothing is sent under the lock, and no other client's thread
//! waits for this client: the background thread sends what it does not take at once.

use std::collections::VecDeque;
use std::io;
use std::mem;
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use rustix::io::ioctl_fionread;

use super::events::Events;
use crate::net::background::{Background, Unsent, send_now};
use crate::net::budget::{Budget, Reservation};
use crate::net::connection::{BYTES_PER_SECOND, SEND_TIMEOUT};
use crate::net::lock::{lock, whole};
use crate::protocol::Packet;

/// Back-pressure: so many unsent bytes count as one due reply.
const UNSENT_UNIT: usize = 1 << 10;

/// Room for an ack with two short ids, in bytes.
const COMMON_REPLY: usize = 160;

/// Up to so much of a client's replies does not count against the budget, in bytes.
const UNCOUNTED: usize = 16 << 10;

/// The most buffers of single replies that are kept.
const MAX_SPARE: usize = 16;

/// A buffer larger than this is not kept for the next replies, in bytes.
const KEPT_BUFFER: usize = 4 << 10;

/// The replies to one client.
#[derive(Debug)]
pub struct ReplyQueue {
    stream: Arc<TcpStream>,
    peer: SocketAddr,
    events: Arc<Events>,
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
    /// The number of the first slot in the row.
    first: u64,
    /// Replies that are due, and those that wait for one before them.
    row: VecDeque<Option<Vec<u8>>>,
    /// Buffers for replies that have to wait.
    spare: Vec<Vec<u8>>,
    /// The bytes of those that wait.
    waiting_bytes: usize,
    /// Replies whose turn has come, and how many they are.
    ready: Vec<u8>,
    ready_count: usize,
    /// A thread is sending, and will send what becomes ready meanwhile.
    sending: bool,
    /// The bytes that it sends.
    sending_bytes: usize,
    /// The client has gone, or does not read.
    broken: bool,
    /// It did not read for too long, or what it left took too much memory.
    timed_out: bool,
    /// What is sent in the background takes this of the budget, and so do replies that wait.
    unread: Option<Reservation>,
    /// What is being sent was left unread.
    in_background: bool,
    /// The budget has too little left for that.
    lacks_memory: bool,
    /// The client's own thread waits until something changes here.
    awaited: bool,
    /// Since when the client's own thread waits for packets.
    reading_since: Option<Instant>,
    /// `first` at the last look of `end_if_idle`, if the connection was idle then.
    idle_at: Option<u64>,
    /// When a look last found it busy.
    busy_at: Option<Instant>,
    /// The sending side was ended: no more packets are taken.
    ended: bool,
    /// Some of the packets were messages.
    had_messages: bool,
}

impl State {
    fn fill(&mut self, number: u64, write: impl FnOnce(&mut Vec<u8>)) {
        if number > self.first {
            let mut reply = self.spare.pop().unwrap_or_else(|| Vec::with_capacity(COMMON_REPLY));
            write(&mut reply);
            // Slots are reserved in order and leave the row only when filled.
            let index = usize::try_from(number - self.first).ok();
            if let Some(slot) = index.and_then(|index| self.row.get_mut(index)) {
                if self.broken {
                    reply = Vec::new();
                }
                self.waiting_bytes += reply.len();
                *slot = Some(reply);
            }
            self.count_unread();
            return;
        }
        write(&mut self.ready);
        self.pass_front();
        while let Some(Some(next)) = self.row.front_mut() {
            let mut next = mem::take(next);
            self.waiting_bytes -= next.len();
            self.ready.append(&mut next);
            if self.spare.len() < MAX_SPARE && next.capacity() == COMMON_REPLY {
                self.spare.push(next);
            }
            self.pass_front();
        }
        if self.broken {
            self.ready = Vec::new();
        }
        self.count_unread();
    }

    /// Has what the client leaves unread count against the budget, and what waits for an earlier reply
    /// of its own. What is sent at once does not.
    fn count_unread(&mut self) {
        let unread =
            if self.in_background { self.ready.capacity() + self.sending_bytes } else { 0 };
        let bytes = unread + self.waiting_bytes;
        let bytes = if bytes > UNCOUNTED { bytes } else { 0 };
        if let Some(unread) = &mut self.unread {
            self.lacks_memory |= !unread.resize(bytes);
        }
    }

    fn end(&mut self, stream: &TcpStream) {
        if !mem::replace(&mut self.ended, true) {
            // It fails if the peer has gone.
            let _ = stream.shutdown(Shutdown::Write);
        }
    }

    fn pass_front(&mut self) {
        self.row.pop_front();
        self.first += 1;
        self.ready_count += 1;
    }

    /// A weight, not a count: one per due reply, one for unsent ones, and one per `UNSENT_UNIT` of them. The
    /// client's packets are not read while it is large.
    fn unsettled(&self) -> usize {
        let is_unsent = !self.broken && (self.sending || !self.ready.is_empty());
        let bytes = self.ready.len() + self.sending_bytes + self.waiting_bytes;
        self.row.len() + usize::from(is_unsent) + bytes / UNSENT_UNIT
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
        let state = State { unread: Some(Reservation::new(memory)), ..State::default() };
        let (state, changed) = (Mutex::new(state), Condvar::new());
        Arc::new(ReplyQueue { stream, peer, events, background, state, changed })
    }

    /// What is said and counted about its messages.
    pub fn events(&self) -> &Arc<Events> {
        &self.events
    }

    /// Reserves the slot of the reply to the next packet, which is a message.
    pub fn reserve_for_message(self: &Arc<Self>) -> ReplySlot {
        let mut state = self.lock();
        state.had_messages = true;
        self.reserve_in(state)
    }

    /// Reserves the slot of the reply to the next packet.
    pub fn reserve(self: &Arc<Self>) -> ReplySlot {
        self.reserve_in(self.lock())
    }

    fn reserve_in(self: &Arc<Self>, mut state: MutexGuard<'_, State>) -> ReplySlot {
        let number = state.first + state.row.len() as u64;
        state.row.push_back(None);
        drop(state);
        ReplySlot { queue: Arc::clone(self), number }
    }

    /// Fills slots of this queue with replies as they came from a server, and sends what is ready, unless
    /// more are due than ready: the thread that fills the last ones sends all in one call. Returns whether
    /// something was left; the caller must [`flush`](Self::flush) soon.
    pub fn fill_most<'a>(
        self: &Arc<Self>,
        replies: impl Iterator<Item = (ReplySlot, &'a [u8])>,
    ) -> bool {
        let mut state = self.lock();
        for (slot, packet) in replies {
            state.fill(slot.number, |buffer| push_line(buffer, packet));
        }
        self.notify(&state);
        let is_left = state.ready_count > 0 && state.ready_count < state.row.len();
        if !is_left {
            self.send(state);
        }
        is_left
    }

    /// Sends what is ready, without waiting for the client.
    pub fn flush(self: &Arc<Self>) {
        self.send(self.lock());
    }

    fn send<'a>(self: &'a Arc<Self>, mut state: MutexGuard<'a, State>) {
        if state.lacks_memory && !state.broken {
            drop(state);
            return self.give_up(&no_memory());
        }
        if state.sending || state.ready.is_empty() {
            return;
        }
        state.sending = true;
        while !state.ready.is_empty() && !state.broken {
            let mut bytes = mem::take(&mut state.ready);
            state.ready_count = 0;
            state.sending_bytes = bytes.len();
            drop(state);
            match send_now(&self.stream, &bytes) {
                Ok(sent) if sent == bytes.len() => {}
                Ok(sent) => {
                    let unread = bytes.split_off(sent);
                    return self.send_in_background(unread);
                }
                Err(error) => self.give_up(&error),
            }
            state = self.lock();
            if state.ready.is_empty() && bytes.capacity() <= KEPT_BUFFER {
                bytes.clear();
                state.ready = bytes;
            }
        }
        self.stop_sending(state);
    }

    /// The client takes no more for now, and has some time to.
    fn send_in_background(self: &Arc<Self>, bytes: Vec<u8>) {
        let queue = Arc::clone(self);
        let then = Box::new(move |result: io::Result<()>| {
            if let Err(error) = result {
                queue.give_up(&error);
            }
            queue.stop_sending(queue.lock());
            queue.flush();
        });
        let mut state = self.lock();
        state.sending_bytes = bytes.len();
        state.in_background = true;
        state.count_unread();
        let lacks_memory = state.lacks_memory;
        drop(state);
        if lacks_memory {
            return then(Err(no_memory()));
        }
        let whole = SEND_TIMEOUT + Duration::from_secs(bytes.len() as u64) / BYTES_PER_SECOND;
        let deadline = Instant::now() + whole;
        let stream = Arc::clone(&self.stream);
        self.background.send(Unsent { stream, bytes, deadline, stall_limit: SEND_TIMEOUT, then });
    }

    fn give_up(&self, error: &io::Error) {
        let mut state = self.lock();
        if mem::replace(&mut state.broken, true) {
            return;
        }
        state.timed_out =
            matches!(error.kind(), io::ErrorKind::TimedOut | io::ErrorKind::OutOfMemory);
        state.ready = Vec::new();
        state.row.iter_mut().flatten().for_each(|reply| *reply = Vec::new());
        state.waiting_bytes = 0;
        state.unread = None;
        state.sending_bytes = 0;
        let had_messages = state.had_messages;
        drop(state);
        // The homework's servers close their setup connections without reading the ack.
        if had_messages {
            self.events.reply_lost(self.peer, error);
        }
        // Ends the client's own thread, too; it fails if the connection is gone already.
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    fn stop_sending(&self, mut state: MutexGuard<'_, State>) {
        state.sending = false;
        state.sending_bytes = 0;
        state.in_background = false;
        state.lacks_memory = false;
        state.count_unread();
        self.notify(&state);
    }

    fn notify(&self, state: &State) {
        if state.awaited {
            self.changed.notify_all();
        }
    }

    /// Whether the peer is a client.
    pub fn had_messages(&self) -> bool {
        self.lock().had_messages
    }

    /// Whether all replies have come and are sent.
    pub fn is_settled(&self) -> bool {
        self.lock().unsettled() == 0
    }

    /// Whether replies were given up because the client did not read them.
    pub fn has_timed_out(&self) -> bool {
        self.lock().timed_out
    }

    /// Waits until [`unsettled`](State::unsettled) is below `limit`. Each reply comes within its message's
    /// time. Returns whether the client still takes them.
    pub fn wait_for_fewer_than(&self, limit: usize) -> bool {
        let mut state = self.lock();
        while state.unsettled() >= limit {
            state.awaited = true;
            state = whole(self.changed.wait(state));
        }
        state.awaited = false;
        !state.broken
    }

    /// The client's own thread waits for packets from now on.
    pub fn start_reading(&self) {
        self.lock().reading_since = Some(Instant::now());
    }

    /// The client's own thread has waited for packets. Returns whether they may still be taken.
    pub fn stop_reading(&self) -> bool {
        let mut state = self.lock();
        state.reading_since = None;
        !state.ended
    }

    /// Ends the connection's sending side. No packets are taken after that.
    pub fn end(&self) {
        self.lock().end(&self.stream);
    }

    /// Calls [`end`](Self::end) if the connection is idle: two looks in a row found no reply due, nothing
    /// unread and no packet taken in between. After `quiet` without traffic also ends the receiving side.
    pub fn end_if_idle(&self, now: Instant, quiet: Duration) {
        let mut state = self.lock();
        let has_unread = || ioctl_fionread(&*self.stream).is_ok_and(|unread| unread > 0);
        if state.reading_since.is_none() || state.unsettled() > 0 || has_unread() {
            state.idle_at = None;
            state.busy_at = Some(now);
            return;
        }
        let first = state.first;
        if state.idle_at.replace(first) != Some(first) {
            // Its thread may have taken a packet between the looks.
            return;
        }
        state.end(&self.stream);
        let moved = state.reading_since.max(state.busy_at);
        if moved.is_some_and(|moved| now.saturating_duration_since(moved) >= quiet) {
            // It fails if the peer has just closed.
            let _ = self.stream.shutdown(Shutdown::Read);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

impl ReplySlot {
    /// Puts a reply, as it came from a server, in its slot; [`ReplyQueue::flush`] sends it.
    pub fn fill(self, packet: &[u8]) {
        self.fill_with(|buffer| push_line(buffer, packet));
    }

    /// Puts a packet of our own in its slot; [`ReplyQueue::flush`] sends it.
    pub fn write(self, packet: &Packet<'_>) {
        self.fill_with(|buffer| packet.write(buffer));
    }

    fn fill_with(self, write: impl FnOnce(&mut Vec<u8>)) {
        let mut state = self.queue.lock();
        state.fill(self.number, write);
        self.queue.notify(&state);
    }
}

/// Why a client that does not read is given up.
fn no_memory() -> io::Error {
    io::Error::new(
        io::ErrorKind::OutOfMemory,
        "it does not read them, and there is no more memory for what it leaves (-max-memory)",
    )
}

fn push_line(buffer: &mut Vec<u8>, packet: &[u8]) {
    buffer.extend_from_slice(packet);
    buffer.push(b'\n');
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
        let mut slots: Vec<_> = (0..5).map(|_| Some(replies.reserve())).collect();
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
        replies.reserve().fill(&reply);
        replies.flush();
        replies.reserve().fill(b"last");
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
            replies.reserve().fill(b"a reply");
            replies.flush();
        }
        assert!(replies.is_settled());
    }
}
