//! How a stopping proxy ends a client's connection: once it is idle, so that no packet on its way is lost.

use std::mem;
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};

use rustix::io::ioctl_fionread;

use super::ReplyQueue;

/// When the client's own thread reads, and whether it may.
#[derive(Debug, Default)]
pub struct Reading {
    /// Since when the thread waits for packets.
    since: Option<Instant>,
    /// The value of `since` when `end_if_idle` last found the connection idle.
    idle_since: Option<Instant>,
    /// When a look last found it busy.
    busy_at: Option<Instant>,
    /// The sending side was ended: no more packets are taken.
    has_ended: bool,
}

impl Reading {
    fn end(&mut self, stream: &TcpStream) {
        if !mem::replace(&mut self.has_ended, true) {
            // It fails if the peer has gone.
            let _ = stream.shutdown(Shutdown::Write);
        }
    }
}

impl ReplyQueue {
    /// The client's own thread waits for packets from now on.
    pub fn begin_wait(&self) {
        self.lock().reading.since = Some(Instant::now());
    }

    /// The client's own thread has waited for packets. Returns whether they may still be taken.
    pub fn end_wait(&self) -> bool {
        let mut state = self.lock();
        state.reading.since = None;
        !state.reading.has_ended
    }

    /// Ends the connection's sending side. No packets are taken after that.
    pub fn end(&self) {
        self.lock().reading.end(&self.stream);
    }

    /// Calls [`end`](Self::end) if two calls in a row find the connection idle: no reply pending, no byte
    /// unread, no packet read in between. After `quiet` without traffic, also shuts down the receiving side.
    pub fn end_if_idle(&self, now: Instant, quiet: Duration) {
        let mut state = self.lock();
        let is_unsettled = state.unsettled() > 0;
        let reading = &mut state.reading;
        let has_unread = || ioctl_fionread(&*self.stream).is_ok_and(|unread| unread > 0);
        if reading.since.is_none() || is_unsettled || has_unread() {
            reading.idle_since = None;
            reading.busy_at = Some(now);
        } else if reading.idle_since != reading.since {
            // Its thread may have taken a packet between the looks.
            reading.idle_since = reading.since;
        } else {
            reading.end(&self.stream);
            let moved = reading.since.max(reading.busy_at);
            if moved.is_some_and(|moved| now.saturating_duration_since(moved) >= quiet) {
                // It fails if the peer has just closed.
                let _ = self.stream.shutdown(Shutdown::Read);
            }
        }
    }
}
