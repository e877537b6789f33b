//! How a stopping proxy ends a client's connection: once it is idle, so that no packet on its way is lost.

use std::mem;
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};

use rustix::io::ioctl_fionread;

use super::ReplyQueue;

/// When the client's own thread reads, and whether it may.
#[derive(Debug, Default)]
pub struct ReadState {
    /// Since when the thread waits for packets.
    since: Option<Instant>,
    /// The value of `since` when `end_if_idle` last found the connection idle.
    idle_since: Option<Instant>,
    /// When a look last found it busy.
    busy_at: Option<Instant>,
    /// The sending side was ended: no more packets are taken.
    has_ended: bool,
}

impl ReadState {
    /// Notes that a look found the connection busy or idle. Returns whether it was idle in the look before,
    /// too, with no packet read in between.
    fn is_idle_again(&mut self, is_busy: bool, now: Instant) -> bool {
        if is_busy {
            (self.idle_since, self.busy_at) = (None, Some(now));
            return false;
        }
        mem::replace(&mut self.idle_since, self.since) == self.since
    }

    fn is_quiet_for(&self, quiet: Duration, now: Instant) -> bool {
        let moved = self.since.max(self.busy_at);
        moved.is_some_and(|moved| now.saturating_duration_since(moved) >= quiet)
    }

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
        self.lock().read_state.since = Some(Instant::now());
    }

    /// The client's own thread has waited for packets. Returns whether they may still be taken.
    pub fn end_wait(&self) -> bool {
        let mut state = self.lock();
        state.read_state.since = None;
        !state.read_state.has_ended
    }

    /// Ends the connection's sending side. No packets are taken after that.
    pub fn end(&self) {
        self.lock().read_state.end(&self.stream);
    }

    /// Calls [`end`](Self::end) if two calls in a row find the connection idle: no reply pending, no byte
    /// unread, no packet read in between. After `quiet` without traffic, also shuts down the receiving side.
    pub fn end_if_idle(&self, now: Instant, quiet: Duration) {
        let mut state = self.lock();
        let has_unread = || ioctl_fionread(&*self.stream).is_ok_and(|unread| unread > 0);
        let is_busy = state.read_state.since.is_none() || state.unsettled() > 0 || has_unread();
        let read_state = &mut state.read_state;
        if read_state.is_idle_again(is_busy, now) {
            read_state.end(&self.stream);
            if read_state.is_quiet_for(quiet, now) {
                // It fails if the peer has just closed.
                let _ = self.stream.shutdown(Shutdown::Read);
            }
        }
    }
}
