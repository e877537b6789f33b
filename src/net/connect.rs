//! Connecting to a server.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

/// Connects within `limit`. Asks a second time where no answer comes: a listener that is just closing
/// may lose the first request, and the kernel repeats it only after a second.
///
/// # Errors
///
/// If the connection is refused, or not made in time.
pub fn connect(address: SocketAddr, limit: Duration) -> io::Result<TcpStream> {
    // Zero is not taken for a timeout.
    let limit = limit.max(Duration::from_millis(1));
    let first = limit / 4;
    TcpStream::connect_timeout(&address, first).or_else(|error| match error.kind() {
        io::ErrorKind::TimedOut => TcpStream::connect_timeout(&address, limit - first),
        _ => Err(error),
    })
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::time::Instant;

    use super::*;

    const LIMIT: Duration = Duration::from_millis(900);

    /// A server whose host drops requests to connect, as with its queue full the kernel does; and what
    /// fills the queue.
    fn unreachable() -> (TcpListener, Vec<TcpStream>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        rustix::net::listen(&listener, 0).unwrap();
        let brief = Duration::from_millis(50);
        let filling =
            std::iter::from_fn(|| TcpStream::connect_timeout(&address, brief).ok()).collect();
        (listener, filling)
    }

    /// Requests to connect that found a queue full, as the kernel counts them for all of this host.
    fn lost_requests() -> String {
        let counts = std::fs::read_to_string("/proc/net/netstat").unwrap();
        let mut lines = counts.lines().filter(|line| line.starts_with("TcpExt:"));
        let (names, values) = (lines.next().unwrap(), lines.next().unwrap());
        let place = names.split(' ').position(|name| name == "ListenOverflows").unwrap();
        values.split(' ').nth(place).unwrap().to_owned()
    }

    #[test]
    fn a_request_to_connect_that_is_lost_is_repeated_before_the_kernel_does() {
        // The one that was counted may be another test's, and ours came when there was room.
        let was_lost = (0..100).any(|_| {
            let (listener, filling) = unreachable();
            let address = listener.local_addr().unwrap();
            let (before, begun) = (lost_requests(), Instant::now());
            std::thread::scope(|scope| {
                let opened = scope.spawn(|| connect(address, LIMIT));
                while lost_requests() == before && !opened.is_finished() {
                    std::thread::sleep(Duration::from_millis(1));
                }
                for _ in &filling {
                    listener.accept().unwrap();
                }
                opened.join().unwrap().unwrap();
            });
            begun.elapsed() >= LIMIT / 4
        });
        assert!(was_lost);
    }
}
