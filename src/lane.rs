//! A connection to a server on which many clients' messages travel together.
//!
//! A message of one client costs two wake-ups and four system calls between its server and the
//! proxy; those of many clients together cost hardly more. So the threads of the clients put their
//! messages into the server's lane; whoever finds nobody sending sends what has gathered; and one
//! thread reads the acks, which come in the order of the messages. A lane is for servers that
//! answer quickly, since a message in it waits for those before it.

use std::collections::VecDeque;
use std::net::{Shutdown, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::packet::Id;
use crate::replies::{Replies, Slot};
use crate::wire;

/// Messages in a lane at once.
const MAX_IN_FLIGHT: usize = 256;

/// A lane whose oldest message has waited this long takes no further ones: something is slow.
const LIVELY: Duration = Duration::from_millis(10);

/// Bytes that gather while the server is busy, at most.
const MAX_GATHERED: usize = 64 << 10;

/// A message in a lane.
#[derive(Debug)]
pub struct Traveller {
    /// The packet as it was received, for another try.
    pub bytes: Vec<u8>,
    /// The id of the client it came from.
    pub srcid: Id<'static>,
    /// Where its reply belongs.
    pub replies: Arc<Replies>,
    /// Its place there.
    pub slot: Slot,
    /// When it was taken in.
    pub arrived: Instant,
    /// When it was put into the lane.
    pub sent: Instant,
}

/// A connection that many clients' messages share.
#[derive(Debug)]
pub struct Lane {
    stream: Arc<TcpStream>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Messages without an ack, in the order in which they were sent.
    travellers: VecDeque<Traveller>,
    /// Bytes that are not yet sent.
    unsent: Vec<u8>,
    /// Messages that were sent and have no ack; the others are in `unsent`.
    on_the_way: usize,
    /// Somebody is sending, and will send what comes meanwhile.
    sending: bool,
    /// No more messages are taken.
    closed: bool,
}

impl Lane {
    /// A lane on a connection to a server.
    pub fn new(stream: Arc<TcpStream>) -> Self {
        Lane { stream, state: Mutex::default() }
    }

    /// Puts a message in, to be sent by [`flush`](Self::flush), and calls `journal` before anybody
    /// can send it. Does neither where the lane is full, slow or closed.
    pub fn put(&self, traveller: Traveller, journal: impl FnOnce()) -> bool {
        let mut state = self.lock();
        let is_slow =
            state.travellers.front().is_some_and(|oldest| traveller.sent > oldest.sent + LIVELY);
        if state.closed || is_slow || state.travellers.len() >= MAX_IN_FLIGHT {
            return false;
        }
        journal();
        state.unsent.extend_from_slice(&traveller.bytes);
        state.unsent.push(b'\n');
        state.travellers.push_back(traveller);
        true
    }

    /// Sends what was put in, unless the server has messages to answer: then it gathers until their
    /// acks come, as Nagle's algorithm has it, and many go at the price of one.
    pub fn flush(&self) {
        let state = self.lock();
        if state.on_the_way == 0 || state.unsent.len() > MAX_GATHERED {
            self.send(state);
        }
    }

    fn send<'a>(&'a self, mut state: MutexGuard<'a, State>) {
        if state.sending {
            return;
        }
        state.sending = true;
        while !state.unsent.is_empty() {
            let mut bytes = std::mem::take(&mut state.unsent);
            state.on_the_way = state.travellers.len();
            drop(state);
            let sent = wire::send_all(&self.stream, &bytes);
            state = self.lock();
            if sent.is_err() {
                // The thread that reads the acks sees the end and takes care of the messages.
                let _ = self.stream.shutdown(Shutdown::Both);
                break;
            }
            if state.unsent.is_empty() {
                bytes.clear();
                state.unsent = bytes;
            }
            if state.on_the_way > 0 {
                break;
            }
        }
        state.sending = false;
    }

    /// The message that the next ack is for.
    pub fn next_acked(&self) -> Option<Traveller> {
        let mut state = self.lock();
        // An ack that nobody asked for is not to be taken for that of a message still unsent.
        state.on_the_way = state.on_the_way.checked_sub(1)?;
        state.travellers.pop_front()
    }

    /// When the oldest message in the lane was put in.
    pub fn oldest(&self) -> Option<Instant> {
        Some(self.lock().travellers.front()?.sent)
    }

    /// Whether messages can still be put in.
    pub fn is_open(&self) -> bool {
        !self.lock().closed
    }

    /// Whether it takes no more messages, and all that were in it are acked.
    pub fn is_over(&self) -> bool {
        let state = self.lock();
        state.closed && state.travellers.is_empty()
    }

    /// Takes no more messages. Those that are in it are still acked; without any, the connection
    /// ends at once.
    pub fn retire(&self) {
        let mut state = self.lock();
        state.closed = true;
        let is_empty = state.travellers.is_empty();
        drop(state);
        if is_empty {
            // It fails where the connection has ended by itself.
            let _ = self.stream.shutdown(Shutdown::Both);
        }
    }

    /// Ends the connection and gives back the messages that were not acked.
    pub fn close(&self) -> VecDeque<Traveller> {
        let mut state = self.lock();
        state.closed = true;
        let travellers = std::mem::take(&mut state.travellers);
        drop(state);
        let _ = self.stream.shutdown(Shutdown::Both);
        travellers
    }

    /// Every change under the lock is whole.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
