//! The replies to one client, in the order of its packets.
//!
//! Acks come from several servers, read by several threads, in any order. Each packet gets a slot
//! when it is taken in; a reply waits in its slot until all before it are there, and whoever
//! completes the row sends it. Nothing is sent under the lock, and nobody who also serves other
//! clients ever waits for this one: what it does not take at once, a thread of its own sends.

use std::collections::VecDeque;
use std::io;
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use rustix::net::{SendFlags, send};

use super::events::Events;
use crate::net::connection;
use crate::protocol::Packet;

/// So many bytes that are not yet sent count as one more reply that is still to come.
const UNSENT_UNIT: usize = 1 << 10;

/// Room for an ack with two short ids, in bytes.
const COMMON_REPLY: usize = 160;

/// A buffer larger than this is not kept for the next replies, in bytes.
const KEPT_BUFFER: usize = 4 << 10;

/// Nor is one of a single reply that is larger than this.
const KEPT_REPLY: usize = 256;

/// So many buffers of single replies are kept at most.
const MAX_SPARE: usize = 16;

/// The replies to one client.
#[derive(Debug)]
pub struct ReplyQueue {
    stream: Arc<TcpStream>,
    peer: SocketAddr,
    events: Arc<Events>,
    state: Mutex<State>,
    changed: Condvar,
}

/// The place of a reply among the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReplySlot(u64);

impl ReplySlot {
    /// The one so many places behind it.
    pub fn nth(self, count: usize) -> Self {
        ReplySlot(self.0 + count as u64)
    }
}

#[derive(Debug, Default)]
struct State {
    /// The number of the row's first slot.
    first: u64,
    /// Replies that are still to come, or to wait for those before them.
    row: VecDeque<Option<Vec<u8>>>,
    /// Buffers for replies that have to wait.
    spare: Vec<Vec<u8>>,
    /// Replies whose turn has come, and how many they are.
    ready: Vec<u8>,
    ready_count: usize,
    /// Somebody is sending, and will send what becomes ready meanwhile.
    sending: bool,
    /// The client has gone, or does not read.
    broken: bool,
    /// The client's own thread waits until something changes here.
    awaited: bool,
}

impl State {
    fn fill(&mut self, slot: ReplySlot, write: impl FnOnce(&mut Vec<u8>)) {
        if slot.0 > self.first {
            let mut reply = self.spare.pop().unwrap_or_else(|| Vec::with_capacity(COMMON_REPLY));
            write(&mut reply);
            // Slots are reserved in order and leave the row only when filled.
            let place = usize::try_from(slot.0 - self.first).ok();
            if let Some(place) = place.and_then(|place| self.row.get_mut(place)) {
                *place = Some(reply);
            }
            return;
        }
        write(&mut self.ready);
        self.pass_front();
        while let Some(Some(next)) = self.row.front_mut() {
            let mut next = std::mem::take(next);
            self.ready.append(&mut next);
            if self.spare.len() < MAX_SPARE && next.capacity() <= KEPT_REPLY {
                self.spare.push(next);
            }
            self.pass_front();
        }
    }

    fn pass_front(&mut self) {
        self.row.pop_front();
        self.first += 1;
        self.ready_count += 1;
    }

    /// Replies that are still to come, and what is unsent of the others, so that a client that does
    /// not read is not read from for long either.
    fn unsettled(&self) -> usize {
        let is_unsent = !self.broken && (self.sending || !self.ready.is_empty());
        let unsent = if is_unsent { 1 + self.ready.len() / UNSENT_UNIT } else { 0 };
        self.row.len() + unsent
    }
}

impl ReplyQueue {
    /// Replies to be sent to the client at the other end of `stream`.
    pub fn new(stream: Arc<TcpStream>, peer: SocketAddr, events: Arc<Events>) -> Arc<Self> {
        let (state, changed) = Default::default();
        Arc::new(ReplyQueue { stream, peer, events, state, changed })
    }

    /// Places for the replies to the next packets: the first of them.
    pub fn reserve(&self, count: usize) -> ReplySlot {
        let mut state = self.lock();
        let before = state.row.len();
        state.row.resize(before + count, None);
        ReplySlot(state.first + before as u64)
    }

    /// Puts a reply, as it came from a server, in its place; [`flush`](Self::flush) sends it.
    pub fn fill(&self, slot: ReplySlot, packet: &[u8]) {
        self.fill_with(slot, |buffer| add_line(buffer, packet));
    }

    /// Puts a packet of our own in its place; [`flush`](Self::flush) sends it.
    pub fn write(&self, slot: ReplySlot, packet: &Packet<'_>) {
        self.fill_with(slot, |buffer| packet.write(buffer));
    }

    fn fill_with(&self, slot: ReplySlot, write: impl FnOnce(&mut Vec<u8>)) {
        let mut state = self.lock();
        state.fill(slot, write);
        self.tell(&state);
    }

    /// Puts replies, as they came from a server, in their places, and sends what is ready; but not
    /// yet if most replies of a burst are still to come: they are likely on their way from another
    /// server, and whoever completes them sends all in one. Says whether something was left unsent;
    /// the caller is to see that it is not for long.
    pub fn fill_most<'a>(
        self: &Arc<Self>,
        replies: impl Iterator<Item = (ReplySlot, &'a [u8])>,
    ) -> bool {
        let mut state = self.lock();
        for (slot, packet) in replies {
            state.fill(slot, |buffer| add_line(buffer, packet));
        }
        self.tell(&state);
        let waits = state.ready_count > 0 && state.ready_count < state.row.len();
        if !waits {
            self.send(state);
        }
        waits
    }

    /// Something has changed.
    fn tell(&self, state: &State) {
        if state.awaited {
            self.changed.notify_all();
        }
    }

    /// Sends what is ready, without waiting for the client.
    pub fn flush(self: &Arc<Self>) {
        self.send(self.lock());
    }

    fn send<'a>(self: &'a Arc<Self>, mut state: MutexGuard<'a, State>) {
        if state.sending || state.ready.is_empty() {
            return;
        }
        state.sending = true;
        while !state.ready.is_empty() && !state.broken {
            let mut bytes = std::mem::take(&mut state.ready);
            state.ready_count = 0;
            drop(state);
            match send(&*self.stream, &bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(sent) if sent == bytes.len() => {}
                Ok(sent) => return self.send_patiently(bytes.split_off(sent)),
                Err(rustix::io::Errno::AGAIN) => return self.send_patiently(bytes),
                Err(error) => self.give_up(&error.into()),
            }
            state = self.lock();
            if state.ready.is_empty() && bytes.capacity() <= KEPT_BUFFER {
                bytes.clear();
                state.ready = bytes;
            }
        }
        if state.broken {
            state.ready = Vec::new();
        }
        self.stop_sending(state);
    }

    /// The client takes no more for now: a thread of its own waits for it, as long as a client may
    /// take to read.
    fn send_patiently(self: &Arc<Self>, bytes: Vec<u8>) {
        let queue = Arc::clone(self);
        let thread = thread::Builder::new().name("slow client".to_owned()).spawn(move || {
            match connection::send_all(&queue.stream, &bytes, connection::SEND_TIMEOUT) {
                Ok(()) => {}
                Err(error) => queue.give_up(&error),
            }
            queue.stop_sending(queue.lock());
            queue.flush();
        });
        if let Err(error) = thread {
            self.give_up(&error);
            self.stop_sending(self.lock());
        }
    }

    fn give_up(&self, error: &io::Error) {
        self.lock().broken = true;
        self.events.reply_lost(self.peer, error);
        // Ends the client's own thread, too; it fails where the connection is gone already.
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    fn stop_sending(&self, mut state: MutexGuard<'_, State>) {
        state.sending = false;
        self.tell(&state);
    }

    /// Whether all replies have come and are sent.
    pub fn are_settled(&self) -> bool {
        self.lock().unsettled() == 0
    }

    /// Waits until all replies have come. The last ones may still be on their way to the client,
    /// which needs no waiting for: whoever sends them keeps the connection open.
    pub fn wait_until_all_have_come(&self) {
        drop(self.wait_while(|state| !state.row.is_empty()));
    }

    /// Waits until fewer than `limit` replies are still to come or to be sent. Each of them comes
    /// within the time that a message may take. Says whether the client still takes them.
    pub fn wait_for_fewer_than(&self, limit: usize) -> bool {
        !self.wait_while(|state| state.unsettled() >= limit).broken
    }

    fn wait_while(&self, condition: impl Fn(&State) -> bool) -> MutexGuard<'_, State> {
        let mut state = self.lock();
        while condition(&state) {
            state.awaited = true;
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.awaited = false;
        state
    }

    /// Every change under the lock is whole.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn add_line(buffer: &mut Vec<u8>, packet: &[u8]) {
    buffer.extend_from_slice(packet);
    buffer.push(b'\n');
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::net::TcpListener;

    use super::*;
    use crate::cli::terminal::Terminal;
    use crate::proxy::stats::Stats;

    fn pair() -> (Arc<ReplyQueue>, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (stream, peer) = listener.accept().unwrap();
        let events = Events::new(Terminal::new("test", true), Stats::new(false));
        (ReplyQueue::new(Arc::new(stream), peer, Arc::new(events)), client)
    }

    #[test]
    fn replies_leave_in_the_order_of_their_slots() {
        let (replies, mut client) = pair();
        let first = replies.reserve(5);
        for place in [3, 1, 0, 4, 2] {
            replies.fill(first.nth(place), place.to_string().as_bytes());
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
        let slot = replies.reserve(1);
        replies.fill(slot, &reply);
        replies.flush();
        let slot = replies.reserve(1);
        replies.fill(slot, b"last");
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
            replies.fill(replies.reserve(1), b"a reply");
            replies.flush();
        }
        assert!(replies.are_settled());
    }
}
