//! A connection to a server on which many clients' messages travel together.
//!
//! A message of one client costs two wake-ups and four system calls between its server and the
//! proxy; those of many clients together cost hardly more. So the threads of the clients put their
//! messages into one of the server's lanes; whoever finds nobody sending sends what has gathered; and one
//! thread reads the acks, which come in the order of the messages. A lane is for servers that
//! answer quickly, since a message in it waits for those before it.

use std::collections::VecDeque;
use std::net::{Shutdown, TcpStream};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::replies::{ReplyQueue, ReplySlot};
use crate::net::connection;
use crate::protocol::Id;

/// Messages in a lane at once.
const MAX_IN_FLIGHT: usize = 256;

/// A lane whose oldest message has waited this long takes no further ones: something is slow.
const LIVELY: Duration = Duration::from_millis(10);

/// Bytes that gather while the server is busy, at most.
const MAX_GATHERED: usize = 64 << 10;

/// A message in a lane.
#[derive(Debug)]
pub struct Traveller {
    /// The id of the client it came from.
    pub srcid: Id<'static>,
    /// Where its reply belongs.
    pub replies: Arc<ReplyQueue>,
    /// Its place there.
    pub slot: ReplySlot,
    /// When it was taken in.
    pub arrived: Instant,
    /// When it was put into the lane.
    pub sent: Instant,
}

/// Messages that are sent together, in the order in which their acks come.
#[derive(Debug, Default)]
pub struct Batch {
    /// Shared with whoever is sending it.
    bytes: Arc<Vec<u8>>,
    /// The messages that have no ack yet, and where they stand in the bytes.
    travellers: VecDeque<(Traveller, Range<usize>)>,
}

impl Batch {
    fn push(&mut self, message: &[u8], traveller: Traveller) {
        // Nobody has a share before it is sent.
        let bytes = Arc::make_mut(&mut self.bytes);
        let begin = bytes.len();
        bytes.extend_from_slice(message);
        self.travellers.push_back((traveller, begin..bytes.len()));
        bytes.push(b'\n');
    }

    /// The messages that have no ack yet, with their packets.
    pub fn waiting(&self) -> impl ExactSizeIterator<Item = (&Traveller, &[u8])> {
        self.travellers.iter().map(|(traveller, place)| (traveller, &self.bytes[place.clone()]))
    }

    /// Takes so many of them out.
    pub fn take(&mut self, count: usize) -> impl Iterator<Item = Traveller> {
        self.travellers.drain(..count).map(|(traveller, _)| traveller)
    }

    fn oldest(&self) -> Option<Instant> {
        Some(self.travellers.front()?.0.sent)
    }

    /// An empty batch with this one's memory, as far as it is free, and not much.
    fn emptied(mut self) -> Self {
        self.travellers.clear();
        match Arc::get_mut(&mut self.bytes) {
            Some(bytes) if bytes.capacity() <= MAX_GATHERED => bytes.clear(),
            _ => self.bytes = Arc::default(),
        }
        self
    }
}

/// A connection that many clients' messages share.
#[derive(Debug)]
pub struct Lane {
    stream: Arc<TcpStream>,
    /// What the socket has.
    send_timeout: Duration,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Messages that are not yet sent.
    gathered: Batch,
    /// What was sent, until the thread that reads the acks takes it.
    sent: VecDeque<Batch>,
    /// Memory for the next batch.
    spare: Batch,
    /// Messages in the lane.
    count: usize,
    /// Those of them that were sent.
    on_the_way: usize,
    /// When the oldest message in the lane was put in.
    oldest: Option<Instant>,
    /// Somebody is sending, and will send what comes meanwhile.
    sending: bool,
    /// No more messages are taken.
    closed: bool,
}

impl Lane {
    /// A lane on a connection to a server, whose socket has this send timeout.
    pub fn new(stream: Arc<TcpStream>, send_timeout: Duration) -> Self {
        Lane { stream, send_timeout, state: Mutex::default() }
    }

    /// Takes messages as long as it is neither full nor slow nor closed, and sends them, unless the
    /// server has others to answer: then they gather until the acks of those come, as Nagle's
    /// algorithm has it, and many go at the price of one. Nobody else can send a message before
    /// `messages` has handed it out.
    pub fn put<'a>(&self, now: Instant, mut messages: impl Iterator<Item = (&'a [u8], Traveller)>) {
        let mut state = self.lock();
        let is_slow = state.oldest.is_some_and(|oldest| now > oldest + LIVELY);
        if state.closed || is_slow {
            return;
        }
        while state.count < MAX_IN_FLIGHT
            && let Some((message, traveller)) = messages.next()
        {
            state.oldest.get_or_insert(traveller.sent);
            state.gathered.push(message, traveller);
            state.count += 1;
        }
        drop(messages);
        if state.on_the_way == 0 || state.gathered.bytes.len() > MAX_GATHERED {
            self.send(state);
        }
    }

    fn send<'a>(&'a self, mut state: MutexGuard<'a, State>) {
        if state.sending {
            return;
        }
        state.sending = true;
        while !state.gathered.travellers.is_empty() {
            let empty = std::mem::take(&mut state.spare);
            let batch = std::mem::replace(&mut state.gathered, empty);
            let bytes = Arc::clone(&batch.bytes);
            state.on_the_way = state.count;
            state.sent.push_back(batch);
            drop(state);
            let sent = connection::send_all(&self.stream, &bytes, self.send_timeout);
            drop(bytes);
            state = self.lock();
            if sent.is_err() {
                // The thread that reads the acks sees the end and takes care of the messages.
                let _ = self.stream.shutdown(Shutdown::Both);
                break;
            }
            if state.on_the_way > 0 {
                break;
            }
        }
        state.sending = false;
    }

    /// The batch that the next acks are for. `None` where nothing was sent: an ack that nobody asked
    /// for is not to be taken for that of a message still unsent.
    pub fn next_batch(&self) -> Option<Batch> {
        self.lock().sent.pop_front()
    }

    /// So many messages are acked, and this is what remains of their batch: sends what has gathered
    /// if all are. Says when the oldest message in the lane was put in.
    pub fn settle(&self, acked: usize, batch: &mut Batch) -> Option<Instant> {
        let mut state = self.lock();
        state.count -= acked;
        state.on_the_way -= acked;
        let batches = [&*batch].into_iter().chain(&state.sent).chain([&state.gathered]);
        let oldest = batches.filter_map(Batch::oldest).next();
        state.oldest = oldest;
        if batch.travellers.is_empty() {
            state.spare = std::mem::take(batch).emptied();
        }
        if state.on_the_way == 0 {
            self.send(state);
        }
        oldest
    }

    /// When the oldest message in the lane was put in.
    pub fn oldest(&self) -> Option<Instant> {
        self.lock().oldest
    }

    /// Whether messages can still be put in.
    pub fn is_open(&self) -> bool {
        !self.lock().closed
    }

    /// Whether it takes no more messages, and all that were in it are acked.
    pub fn is_over(&self) -> bool {
        let state = self.lock();
        state.closed && state.count == 0
    }

    /// Takes no more messages. Those that are in it are still acked; without any, the connection
    /// ends at once.
    pub fn retire(&self) {
        let mut state = self.lock();
        state.closed = true;
        let is_empty = state.count == 0;
        drop(state);
        if is_empty {
            // It fails where the connection has ended by itself.
            let _ = self.stream.shutdown(Shutdown::Both);
        }
    }

    /// Ends the connection and gives back the batches of which no ack was read.
    pub fn close(&self) -> VecDeque<Batch> {
        let mut state = self.lock();
        state.closed = true;
        let mut batches = std::mem::take(&mut state.sent);
        batches.push_back(std::mem::take(&mut state.gathered));
        drop(state);
        let _ = self.stream.shutdown(Shutdown::Both);
        batches
    }

    /// Every change under the lock is whole.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
