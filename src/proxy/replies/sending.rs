//! How replies are sent. Nothing is sent under the lock. Sends do not block: the background thread sends what
//! the client does not take at once.

use std::io;
use std::mem;
use std::net::Shutdown;
use std::sync::{Arc, MutexGuard};
use std::time::Instant;

use super::{ReplyQueue, State};
use crate::net::background::{Unsent, send_now};
use crate::net::connection::{SEND_TIMEOUT, time_for};

/// Bytes of a client's replies that are free of charge in the memory budget.
const UNCOUNTED: usize = 16 << 10;

/// What is on its way to a client.
#[derive(Debug, Default, PartialEq, Eq)]
pub enum Sending {
    /// Nothing.
    #[default]
    Nothing,
    /// A thread sends this many bytes, and then what becomes ready meanwhile.
    Now(usize),
    /// The client did not take this many bytes at once.
    InBackground(usize),
}

impl Sending {
    /// How many bytes that is.
    pub fn bytes(&self) -> usize {
        match self {
            Sending::Nothing => 0,
            Sending::Now(bytes) | Sending::InBackground(bytes) => *bytes,
        }
    }
}

impl State {
    /// Updates the reservation in the memory budget: bytes that are sent in the background, and replies that
    /// wait for an earlier one.
    pub(super) fn update_reservation(&mut self) {
        let unread = match self.sending {
            Sending::InBackground(bytes) => self.ready.capacity() + bytes,
            Sending::Nothing | Sending::Now(_) => 0,
        };
        let bytes = unread + self.waiting_bytes;
        let bytes = if bytes > UNCOUNTED { bytes } else { 0 };
        if let Some(reservation) = &mut self.reservation {
            self.lacks_memory |= !reservation.resize(bytes);
        }
    }
}

impl ReplyQueue {
    /// Sends what is ready, without waiting for the client.
    pub fn flush(self: &Arc<Self>) {
        self.send(self.lock());
    }

    pub(super) fn send<'a>(self: &'a Arc<Self>, mut state: MutexGuard<'a, State>) {
        if state.lacks_memory && !state.broken {
            drop(state);
            return self.drop_client(&no_memory());
        }
        if state.sending != Sending::Nothing || state.ready.is_empty() {
            return;
        }
        while !state.ready.is_empty() && !state.broken {
            let mut bytes = mem::take(&mut state.ready);
            state.ready_count = 0;
            state.sending = Sending::Now(bytes.len());
            drop(state);
            match send_now(&self.stream, &bytes) {
                Ok(sent) if sent == bytes.len() => {}
                Ok(sent) => {
                    let unread = bytes.split_off(sent);
                    return self.send_in_background(unread);
                }
                Err(error) => self.drop_client(&error),
            }
            state = self.lock();
        }
        self.finish_sending(state);
    }

    /// Sends the rest in the background, with a deadline: the client takes no more bytes for now.
    fn send_in_background(self: &Arc<Self>, bytes: Vec<u8>) {
        let queue = Arc::clone(self);
        let then = Box::new(move |result: io::Result<()>| {
            if let Err(error) = result {
                queue.drop_client(&error);
            }
            queue.finish_sending(queue.lock());
            queue.flush();
        });
        let mut state = self.lock();
        state.sending = Sending::InBackground(bytes.len());
        state.update_reservation();
        let lacks_memory = state.lacks_memory;
        drop(state);
        if lacks_memory {
            return then(Err(no_memory()));
        }
        let deadline = Instant::now() + SEND_TIMEOUT + time_for(bytes.len());
        let stream = Arc::clone(&self.stream);
        self.background.send(Unsent { stream, bytes, deadline, stall_limit: SEND_TIMEOUT, then });
    }

    fn drop_client(&self, error: &io::Error) {
        let mut state = self.lock();
        if mem::replace(&mut state.broken, true) {
            return;
        }
        state.was_given_up =
            matches!(error.kind(), io::ErrorKind::TimedOut | io::ErrorKind::OutOfMemory);
        state.forget();
        state.reservation = None;
        self.notify(&state);
        let is_client = state.is_client;
        drop(state);
        // The homework's servers close their setup connections without reading the ack.
        if is_client {
            self.events.reply_lost(self.peer, error);
        }
        // Ends the client's own thread, too; it fails if the connection is gone already.
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    fn finish_sending(&self, mut state: MutexGuard<'_, State>) {
        state.sending = Sending::Nothing;
        state.lacks_memory = false;
        state.update_reservation();
        if state.unsettled() == 0 {
            state.settled_at = Some(Instant::now());
        }
        self.notify(&state);
    }
}

/// Why a client that does not read is given up.
fn no_memory() -> io::Error {
    io::Error::new(
        io::ErrorKind::OutOfMemory,
        "it does not read them, and there is no more memory for what it leaves (-max-memory)",
    )
}
