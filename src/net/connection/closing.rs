//! The end of a connection: who has ended it, and how to end it without losing the last reply.

use std::io::{ErrorKind, Read};
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};

use super::Connection;

/// How long a refused peer may take to see that its connection has ended.
const LAST_READ: Duration = Duration::from_secs(1);

/// Whether a socket is open as far as is known here, and has nothing to be read.
pub(crate) fn is_quiet(stream: &TcpStream) -> bool {
    peek(stream) == Err(Errno::AGAIN)
}

/// Returns how many bytes there are to be read, 1 at most, without waiting; 0 at the stream's end.
fn peek(stream: &TcpStream) -> Result<usize, Errno> {
    let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
    recv(stream, &mut [0_u8; 1], flags).map(|(_, read)| read)
}

impl Connection {
    /// Ends a connection whose last reply says why: closing with bytes unread would reset it, and
    /// the peer might never see the reply. So it reads until the peer stops, 1 s at most.
    pub fn lingering_close(&self) {
        // A failure is as good as the end: the peer has gone.
        let _ = self.stream.shutdown(Shutdown::Write);
        self.drain(LAST_READ, Instant::now() + LAST_READ);
    }

    /// Reads on, whatever comes, until the peer has ended its side or sent nothing for `quiet`. Returns
    /// `false` if it has done neither by `deadline`.
    #[inline(never)] // What it reads into would lie on the stack of every thread that serves.
    pub(crate) fn drain(&self, quiet: Duration, deadline: Instant) -> bool {
        let mut unwanted = [0; 4 << 10];
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            // If it fails, so does the read.
            let _ = self.stream.set_read_timeout(Some(left.min(quiet)));
            match (&*self.stream).read(&mut unwanted) {
                Ok(1..) => {}
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock && left < quiet => {}
                // What nobody sends any more is no loss.
                _ => return true,
            }
        }
    }

    /// As [`lingering_close`](Self::lingering_close), but without waiting: it reads only what has already
    /// arrived.
    #[inline(never)] // As above.
    pub fn close_without_waiting(&self) {
        // A failure is as good as the end: the peer has gone.
        let _ = self.stream.shutdown(Shutdown::Write);
        let mut unwanted = [0_u8; 4 << 10];
        for _ in 0..64 {
            if !matches!(recv(&*self.stream, &mut unwanted, RecvFlags::DONTWAIT), Ok((1.., _))) {
                return;
            }
        }
    }

    /// Whether the peer has ended the connection and nothing it sent is left.
    pub fn has_ended(&self) -> bool {
        self.packets.is_empty() && peek(&self.stream) == Ok(0)
    }

    /// Whether the connection is still as it should be between packets: open, and nothing received
    /// that nobody asked for.
    pub fn is_reusable(&self) -> bool {
        let nothing_left = self.packets.is_empty()
            && self.buffer.unconsumed().is_empty()
            && self.broken.is_none()
            && !self.ended;
        nothing_left && is_quiet(&self.stream)
    }
}
