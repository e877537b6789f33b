//! A connection that receives and sends packets: framing, the size limit and the deadlines.
//!
//! A [`Connection`] owns its socket and its receive buffer for life. It receives into the buffer,
//! cuts whole packets out of it and hands them out as slices, so that nothing is copied on the
//! way; what they mean is for [`crate::protocol`], and where they go for the roles.
//!
//! Deadlines are absolute. A socket's own read timeout is per read, and a peer that sends a byte
//! now and then never trips it; so the socket's timeout only wakes the thread, and the clock
//! decides. Where its process was suspended, what came meanwhile came in time: a receive whose time is
//! over still takes what has arrived.

mod buffer;
mod burst;
mod closing;
mod receive_error;

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Write};
use std::net::TcpStream;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::io::{Errno, ioctl_fionread};
use rustix::net::RecvFlags;

use buffer::Buffer;

use super::budget::Budget;
use crate::protocol::diagnose::Foreign;
use crate::protocol::framer::{Framer, Scan};

pub(crate) use buffer::largest_buffer;
pub(crate) use closing::is_quiet;
pub use receive_error::ReceiveError;

/// The longest packet that is taken unless told otherwise, in bytes.
pub const DEFAULT_MAX_PACKET: usize = 4 << 20;

/// How long a peer may take to read what it is sent: as long as a message may take. (Ours: the homework does
/// not say.)
pub const SEND_TIMEOUT: Duration = Duration::from_secs(10);

/// A read may end this much late (at most twice the wait): this saves a system call per packet.
const TIMEOUT_SLACK: Duration = Duration::from_millis(200);

/// How long to wait for a packet.
#[derive(Debug, Clone, Copy)]
pub enum ReadTimeout {
    /// The packet must be complete by then.
    Until(Instant),
    /// A packet must begin within `idle`, and be complete within `packet` from its first byte and
    /// a second more for each 64 KiB received (as Apache's mod_reqtimeout).
    Paced {
        /// From now to a packet's first byte.
        idle: Duration,
        /// From its first byte to its last.
        packet: Duration,
    },
}

/// How much longer a slow packet may take to come, or a peer to read, for this many bytes: a second for each
/// 64 KiB.
pub fn time_for(bytes: usize) -> Duration {
    Duration::from_secs(bytes as u64) / (64 << 10)
}

/// A connection on which packets come and go.
#[derive(Debug)]
pub struct Connection {
    stream: Arc<TcpStream>,
    buffer: Buffer,
    framer: Framer,
    /// Whole packets in the buffer that were not yet handed out.
    packets: VecDeque<Range<usize>>,
    /// What stands in the way of another packet after those.
    broken: Option<ReceiveError>,
    ended: bool,
    /// Bytes that may still be read; `None` for no limit (see `read_only_what_has_come`).
    read_limit: Option<usize>,
    /// When bytes last came.
    received: Instant,
    /// The read timeout that the socket has.
    timeout: Option<Duration>,
}

impl Connection {
    /// Takes over a socket that has the read timeout `timeout`, the send timeout
    /// [`SEND_TIMEOUT`] and no delay.
    pub fn new(stream: Arc<TcpStream>, timeout: Option<Duration>, max_packet: usize) -> Self {
        Connection {
            stream,
            buffer: Buffer::new(max_packet),
            framer: Framer::new(max_packet),
            packets: VecDeque::new(),
            broken: None,
            ended: false,
            read_limit: None,
            received: Instant::now(),
            timeout,
        }
    }

    /// Takes over a socket as `connect` returns it.
    ///
    /// # Errors
    ///
    /// If the system does not take an option.
    pub fn from_connected(stream: TcpStream, max_packet: usize) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        stream.set_write_timeout(Some(SEND_TIMEOUT))?;
        Ok(Self::new(Arc::new(stream), None, max_packet))
    }

    /// Has long packets take their memory from `budget`, and no packet where too little is left.
    pub(crate) fn use_budget(&mut self, budget: Arc<Budget>) {
        self.buffer.use_budget(budget);
    }

    /// The socket, to end it from another thread.
    pub fn stream(&self) -> &Arc<TcpStream> {
        &self.stream
    }

    /// Waits until at least one packet is there; `false` at the stream's clean end. The packets
    /// are then handed out by [`take_packet`](Self::take_packet), and those handed out before are gone.
    ///
    /// # Errors
    ///
    /// If no further packet can be had: too long, malformed, late, without memory for it, or the
    /// connection broke. Packets that came whole before that are handed out first. One that has arrived is
    /// not late, whatever the time.
    pub fn wait(&mut self, timeout: ReadTimeout) -> Result<bool, ReceiveError> {
        if !self.packets.is_empty() {
            return Ok(true);
        }
        let entered = Instant::now();
        let (mut begun, mut now) = (entered, entered);
        let mut overtime = None;
        loop {
            if let Some(error) = self.broken.take() {
                return Err(error);
            }
            if self.ended {
                return match self.framer.length() {
                    0 => Ok(false),
                    length => Err(ReceiveError::Truncated(length)),
                };
            }
            let was_inside = self.framer.is_inside();
            let deadline = match timeout {
                ReadTimeout::Until(deadline) => deadline,
                ReadTimeout::Paced { idle, .. } if !was_inside => entered + idle,
                ReadTimeout::Paced { packet, .. } => {
                    begun + packet + time_for(self.framer.length())
                }
            };
            self.read_before(deadline, now, &mut overtime)?;
            self.scan();
            if !self.packets.is_empty() {
                return Ok(true);
            }
            now = Instant::now();
            if !was_inside && self.framer.is_inside() {
                begun = now;
            }
        }
    }

    /// The next packet that has come whole, without waiting. Its range in the buffer is valid until the
    /// next [`wait`](Self::wait).
    pub fn take_packet(&mut self) -> Option<Range<usize>> {
        self.packets.pop_front()
    }

    /// As [`take_packet`](Self::take_packet), but all of them.
    pub fn take_packets(&mut self) -> Vec<Range<usize>> {
        self.packets.drain(..).collect()
    }

    /// The bytes of a packet that [`take_packet`](Self::take_packet) handed out.
    pub fn bytes(&self, packet: Range<usize>) -> &[u8] {
        self.buffer.bytes(packet)
    }

    /// Waits for one packet and hands it out; `None` at the stream's clean end.
    ///
    /// # Errors
    ///
    /// As [`wait`](Self::wait).
    pub fn receive(&mut self, timeout: ReadTimeout) -> Result<Option<&[u8]>, ReceiveError> {
        if !self.wait(timeout)? {
            return Ok(None);
        }
        let packet = self.packets.pop_front().unwrap_or_default();
        Ok(Some(self.buffer.bytes(packet)))
    }

    /// What has come after the packets that came whole.
    pub(crate) fn unconsumed(&self) -> &[u8] {
        self.buffer.unconsumed()
    }

    /// Sends all of `bytes`.
    ///
    /// # Errors
    ///
    /// If the connection broke, or the peer has not taken them within [`SEND_TIMEOUT`].
    pub fn send(&self, bytes: &[u8]) -> io::Result<()> {
        let begun = Instant::now();
        let mut rest = bytes;
        while !rest.is_empty() {
            match (&*self.stream).write(rest) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(written) => rest = &rest[written..],
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
            // The socket's timeout starts anew at each call; a peer that takes a little now and then
            // would never trip it.
            if !rest.is_empty() && begun.elapsed() >= SEND_TIMEOUT {
                return Err(ErrorKind::TimedOut.into());
            }
        }
        Ok(())
    }

    /// Reads no more than what has come by now: after that the stream has its end.
    pub(crate) fn read_only_what_has_come(&mut self) {
        if self.read_limit.is_none() {
            self.read_limit = Some(self.unread());
        }
    }

    /// Returns how many bytes have arrived and were not read.
    fn unread(&self) -> usize {
        let unread = ioctl_fionread(&*self.stream).unwrap_or(0);
        usize::try_from(unread).unwrap_or(usize::MAX)
    }

    /// Reads once, whatever there is. Past the deadline it does not wait, and fails once what had arrived
    /// when that was first seen is read. Of those bytes and the end behind them `overtime` counts what is
    /// left: a peer that sends without a pause gains nothing.
    fn read_before(
        &mut self,
        deadline: Instant,
        mut now: Instant,
        overtime: &mut Option<usize>,
    ) -> Result<(), ReceiveError> {
        if self.read_limit == Some(0) {
            self.ended = true;
            return Ok(());
        }
        if !self.buffer.make_room(now) {
            // What follows cannot be told from the rest of the packet.
            self.framer = Framer::new(self.framer.limit());
            self.ended = true;
            return Err(ReceiveError::NoMemory);
        }
        loop {
            let remaining = deadline.saturating_duration_since(now);
            let is_over = remaining.is_zero();
            let flags = if is_over {
                if *overtime.get_or_insert_with(|| self.unread().saturating_add(1)) == 0 {
                    return Err(self.timed_out());
                }
                RecvFlags::DONTWAIT
            } else {
                *overtime = None;
                let wanted = remaining.min(self.buffer.shrink_timeout());
                self.limit_read(wanted).map_err(ReceiveError::Io)?;
                RecvFlags::empty()
            };
            match self.buffer.read(&self.stream, flags) {
                Ok(read) => {
                    self.ended = read == 0;
                    *overtime = overtime.map(|left| left.saturating_sub(read));
                    self.read_limit = self.read_limit.map(|limit| limit.saturating_sub(read));
                    self.received = Instant::now();
                    return Ok(());
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) if is_over => return Err(self.timed_out()),
                // The next read may have to wait longer.
                Err(Errno::AGAIN) => self.timeout = None,
                Err(error) => return Err(ReceiveError::Io(error.into())),
            }
            now = Instant::now();
        }
    }

    fn timed_out(&self) -> ReceiveError {
        match self.framer.length() {
            0 => ReceiveError::Idle,
            length => ReceiveError::Slow(length),
        }
    }

    /// Sets the socket's timeout so that a read ends soon after `wanted`, see [`TIMEOUT_SLACK`].
    fn limit_read(&mut self, wanted: Duration) -> io::Result<()> {
        if self.timeout.is_none_or(|timeout| timeout > wanted + TIMEOUT_SLACK.min(wanted)) {
            self.stream.set_read_timeout(Some(wanted))?;
            self.timeout = Some(wanted);
        }
        Ok(())
    }

    /// Shows the new bytes to the framer and notes the packets that are complete.
    fn scan(&mut self) {
        loop {
            if !self.framer.is_inside() {
                self.buffer.consume(self.framer.skip(self.buffer.unconsumed()));
            }
            let shown = self.framer.length();
            match self.framer.scan(&self.buffer.unconsumed()[shown..]) {
                Scan::Incomplete => return,
                Scan::End(end) => self.packets.push_back(self.buffer.consume(shown + end)),
                Scan::NotAnObject => {
                    let what = Foreign::at(self.buffer.unconsumed());
                    return self.broken = Some(ReceiveError::NotAnObject(what));
                }
                Scan::TooLarge => {
                    let limit = self.framer.limit();
                    return self.broken = Some(ReceiveError::TooLarge { limit });
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::net::{Shutdown, TcpListener};
    use std::thread;

    use proptest::prelude::*;

    use super::*;
    use crate::net::os_error::reason;
    use crate::protocol::framer::SCANNED;

    /// The bound on every wait that ends by itself.
    const BOUND: Duration = Duration::from_secs(20);

    /// Both ends of a connection; the peer's is a plain socket.
    fn connected(max_packet: usize) -> (Connection, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let peer = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        peer.set_nodelay(true).unwrap();
        peer.set_read_timeout(Some(BOUND)).unwrap();
        let (stream, _) = listener.accept().unwrap();
        (Connection::from_connected(stream, max_packet).unwrap(), peer)
    }

    fn bounded() -> ReadTimeout {
        ReadTimeout::Until(Instant::now() + BOUND)
    }

    /// Soon enough for a test, and long enough for what has been sent on loopback to arrive.
    fn shortly() -> ReadTimeout {
        ReadTimeout::Until(Instant::now() + Duration::from_millis(50))
    }

    /// The next packet as text.
    fn receive(connection: &mut Connection) -> Option<String> {
        let packet = connection.receive(bounded()).unwrap()?;
        Some(String::from_utf8(packet.to_vec()).unwrap())
    }

    /// All packets up to the clean end of the stream.
    fn receive_all(connection: &mut Connection) -> Vec<String> {
        std::iter::from_fn(|| receive(connection)).collect()
    }

    /// Small packets, as a pattern.
    const PACKET: &str = r#"\{("[a-z{}é]{0,9}":[0-9])?\}"#;

    proptest! {
        // Each case takes a connection.
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn any_packets_sent_in_any_pieces_are_received_as_they_were(
            packets in prop::collection::vec((PACKET, "[ \r\n\t]{0,3}"), 0..8),
            pieces in prop::collection::vec(1_usize..20, 1..8),
        ) {
            let (mut connection, mut peer) = connected(1 << 20);
            let stream: String =
                packets.iter().flat_map(|(packet, space)| [packet.as_str(), space]).collect();
            let sender = thread::spawn(move || {
                let mut rest = stream.as_bytes();
                for length in pieces.into_iter().cycle() {
                    let (piece, after) = rest.split_at(length.min(rest.len()));
                    peer.write_all(piece).unwrap();
                    rest = after;
                    if rest.is_empty() {
                        return;
                    }
                }
            });
            let sent: Vec<_> = packets.into_iter().map(|(packet, _)| packet).collect();
            prop_assert_eq!(receive_all(&mut connection), sent);
            sender.join().unwrap();
        }
    }

    #[test]
    fn a_packet_in_many_pieces_is_looked_at_once() {
        let (mut connection, mut peer) = connected(1 << 20);
        let packet = format!(r#"{{"payload":"{}"}}"#, "x".repeat(64 << 10));
        let sent = packet.clone();
        let sender =
            thread::spawn(move || sent.bytes().for_each(|byte| peer.write_all(&[byte]).unwrap()));
        let before = SCANNED.get();
        assert_eq!(receive(&mut connection), Some(packet.clone()));
        assert_eq!(SCANNED.get() - before, packet.len());
        sender.join().unwrap();
    }

    #[test]
    fn many_packets_in_one_piece_are_looked_at_once() {
        let (mut connection, mut peer) = connected(1 << 20);
        let stream = r#"{"a":"b"}"#.repeat(5000);
        let length = stream.len();
        let sender = thread::spawn(move || peer.write_all(stream.as_bytes()).unwrap());
        let before = SCANNED.get();
        assert_eq!(receive_all(&mut connection).len(), 5000);
        assert_eq!(SCANNED.get() - before, length);
        sender.join().unwrap();
    }

    #[test]
    fn the_end_of_the_stream_is_clean_between_packets_only() {
        let (mut connection, mut peer) = connected(1 << 20);
        peer.write_all(b"{} \n").unwrap();
        drop(peer);
        assert_eq!(receive_all(&mut connection), ["{}"]);

        let (mut connection, mut peer) = connected(1 << 20);
        peer.write_all(b"{}{\"a\"").unwrap();
        drop(peer);
        assert_eq!(receive(&mut connection).as_deref(), Some("{}"));
        assert!(matches!(connection.receive(bounded()), Err(ReceiveError::Truncated(4))));
    }

    #[test]
    fn what_came_whole_is_handed_out_before_the_error_behind_it() {
        let (mut connection, mut peer) = connected(1 << 20);
        peer.write_all(b"{\"a\":1}{\"a\":2} x {}").unwrap();
        assert_eq!(receive(&mut connection).as_deref(), Some("{\"a\":1}"));
        assert_eq!(receive(&mut connection).as_deref(), Some("{\"a\":2}"));
        assert!(matches!(connection.receive(bounded()), Err(ReceiveError::NotAnObject(_))));
    }

    #[test]
    fn a_packet_beyond_the_limit_is_told_before_its_end() {
        let (mut connection, mut peer) = connected(64);
        peer.write_all(&[b"{\"a\":\"", [b'x'; 58].as_slice()].concat()).unwrap();
        assert!(matches!(connection.receive(shortly()), Err(ReceiveError::Slow(64))));
        peer.write_all(b"x").unwrap();
        assert!(matches!(connection.receive(bounded()), Err(ReceiveError::TooLarge { limit: 64 })));
    }

    /// A packet of this many bytes.
    fn packet_of(length: usize) -> String {
        format!("{{\"a\":\"{}\"}}", "x".repeat(length - 8))
    }

    /// Sends in a thread of its own, since it may be more than the system takes at once.
    fn send(peer: &TcpStream, bytes: String) -> thread::JoinHandle<()> {
        let mut peer = peer.try_clone().unwrap();
        thread::spawn(move || peer.write_all(bytes.as_bytes()).unwrap())
    }

    #[test]
    fn the_memory_of_a_connection_that_has_become_quiet_is_given_back() {
        let (mut connection, mut peer) = connected(1 << 20);
        let budget = Budget::new(2 << 20);
        connection.use_budget(Arc::clone(&budget));
        let sender = send(&peer, packet_of(512 << 10));
        receive(&mut connection).unwrap();
        sender.join().unwrap();
        assert!(budget.left() <= (2 << 20) - (512 << 10));
        let waits = thread::spawn(move || receive(&mut connection));
        let end = Instant::now() + BOUND / 2;
        while budget.left() < 2 << 20 {
            assert!(Instant::now() < end);
            thread::sleep(Duration::from_millis(2));
        }
        peer.write_all(b"{}").unwrap();
        assert_eq!(waits.join().unwrap().as_deref(), Some("{}"), "it is as good as before");
    }

    #[test]
    fn small_packets_take_nothing_of_the_budget() {
        let (mut connection, peer) = connected(1 << 20);
        connection.use_budget(Budget::new(0));
        let spaced = format!("{}{}", " ".repeat(10 << 10), packet_of(10 << 10));
        let stream = packet_of(16 << 10) + &"{}".repeat(20_000) + &spaced.repeat(100);
        let sender = send(&peer, stream);
        for _ in 0..20_101 {
            receive(&mut connection).unwrap();
        }
        sender.join().unwrap();
    }

    #[test]
    fn a_packet_that_is_far_shorter_than_the_one_before_it_is_handed_out_in_memory_of_its_own_size()
    {
        let (mut connection, peer) = connected(1 << 20);
        let budget = Budget::new(4 << 20);
        connection.use_budget(Arc::clone(&budget));
        let mut lengths = [1 << 20, 17 << 10, 17 << 10, 100].into_iter();
        let (longest, mut others) = (lengths.next().unwrap(), Vec::new());
        let sender = send(&peer, packet_of(longest));
        assert!(connection.wait(bounded()).unwrap());
        let first = connection.take_burst(64);
        sender.join().unwrap();
        let left = budget.left();
        let sent: Vec<_> = lengths.map(packet_of).collect();
        let sender = send(&peer, sent.concat());
        while others.len() < sent.len() {
            assert!(connection.wait(bounded()).unwrap());
            others.push(connection.take_burst(64));
        }
        sender.join().unwrap();
        assert_eq!(first.bytes.len(), longest + 1);
        for (burst, packet) in others.iter().zip(&sent) {
            assert_eq!(burst.bytes[burst.ranges[0].clone()], [packet.as_bytes(), b"\n"].concat());
            assert!(burst.bytes.capacity() < 2 * packet.len(), "{}", burst.bytes.capacity());
        }
        assert_eq!(
            left - budget.left(),
            2 * ((17 << 10) + 1),
            "they count, and no more than they are"
        );
    }

    #[test]
    fn a_long_packet_for_which_no_memory_is_left_is_refused_and_holds_none() {
        const LONGEST: usize = 1_500_000;
        let budget = Budget::new(largest_buffer(LONGEST));
        let [(mut first, first_peer), (mut second, second_peer)] = [(); 2].map(|()| {
            let (mut connection, peer) = connected(LONGEST);
            connection.use_budget(Arc::clone(&budget));
            (connection, peer)
        });
        let long = packet_of(LONGEST);
        let (begin, rest) = long.split_at(LONGEST / 2);
        let sender = send(&first_peer, begin.to_owned());
        let end = Instant::now() + BOUND;
        while !matches!(first.receive(shortly()), Err(ReceiveError::Slow(got)) if got == begin.len())
        {
            assert!(Instant::now() < end);
        }
        sender.join().unwrap();
        let left = budget.left();
        let its_sender = send(&second_peer, packet_of(LONGEST));
        assert!(matches!(second.receive(bounded()), Err(ReceiveError::NoMemory)));
        assert_eq!(budget.left(), left);
        assert!(matches!(second.receive(bounded()), Ok(None)), "what follows is not read");
        second.lingering_close();
        its_sender.join().unwrap();
        let its_sender = send(&first_peer, rest.to_owned());
        assert_eq!(receive(&mut first), Some(long), "the longest packet finds room");
        its_sender.join().unwrap();
        assert_eq!(budget.left(), 0);
        drop(first);
        assert_eq!(budget.left(), largest_buffer(LONGEST));
    }

    /// Sends `begin`, and then `byte` every now and then until the peer has had enough.
    fn trickle(mut peer: TcpStream, begin: &[u8], byte: u8) -> thread::JoinHandle<()> {
        peer.write_all(begin).unwrap();
        thread::spawn(move || {
            let end = Instant::now() + BOUND;
            while Instant::now() < end && peer.write_all(&[byte]).is_ok() {
                thread::sleep(Duration::from_millis(2));
            }
        })
    }

    /// Waits for a packet that does not end, or not begin, and gives the error and its time.
    fn wait_in_vain(timeout: ReadTimeout, begin: &[u8], byte: u8) -> (ReceiveError, Duration) {
        let (mut connection, peer) = connected(1 << 20);
        let sender = trickle(peer, begin, byte);
        let entered = Instant::now();
        let error = connection.receive(timeout).unwrap_err();
        let time = entered.elapsed();
        drop(connection);
        sender.join().unwrap();
        (error, time)
    }

    #[test]
    fn bytes_now_and_then_do_not_put_a_deadline_off() {
        let short = Duration::from_millis(100);
        let paced = ReadTimeout::Paced { idle: BOUND, packet: short };
        for timeout in [ReadTimeout::Until(Instant::now() + short), paced] {
            let (error, time) = wait_in_vain(timeout, b"{\"a\":\"", b'x');
            assert!(matches!(error, ReceiveError::Slow(_)), "{error}");
            assert!(time < BOUND / 10, "{time:?}");
        }
    }

    #[test]
    fn white_space_now_and_then_is_idleness_all_the_same() {
        let short = Duration::from_millis(100);
        let paced = ReadTimeout::Paced { idle: short, packet: BOUND };
        for timeout in [ReadTimeout::Until(Instant::now() + short), paced] {
            let (error, time) = wait_in_vain(timeout, b"", b' ');
            assert!(matches!(error, ReceiveError::Idle), "{error}");
            assert!(time < BOUND / 10, "{time:?}");
        }
    }

    #[test]
    fn a_long_packet_has_more_time() {
        let (mut connection, mut peer) = connected(1 << 20);
        // These give it ten seconds.
        let begin = format!("{{\"a\":\"{}", "x".repeat(640 << 10));
        let sender = thread::spawn(move || {
            peer.write_all(begin.as_bytes()).unwrap();
            // Far longer than `packet` below.
            thread::sleep(Duration::from_millis(300));
            peer.write_all(b"\"}").unwrap();
        });
        let packet = Duration::from_millis(100);
        let received = connection.receive(ReadTimeout::Paced { idle: BOUND, packet });
        assert_eq!(received.unwrap().map(<[u8]>::len), Some((640 << 10) + 8));
        sender.join().unwrap();
    }

    #[test]
    fn a_deadline_without_a_packet_is_idleness_and_harms_nothing() {
        let (mut connection, mut peer) = connected(1 << 20);
        for timeout in [
            shortly(),
            ReadTimeout::Paced { idle: Duration::from_millis(20), packet: BOUND },
            ReadTimeout::Until(Instant::now()),
        ] {
            // White space is no packet.
            peer.write_all(b" \n").unwrap();
            assert!(matches!(connection.receive(timeout), Err(ReceiveError::Idle)));
        }
        peer.write_all(b"{}").unwrap();
        assert_eq!(receive(&mut connection).as_deref(), Some("{}"));
    }

    #[test]
    fn a_receive_whose_time_is_over_takes_what_has_come_and_no_more() {
        let (mut connection, mut peer) = connected(1 << 20);
        let is_over = ReadTimeout::Until(Instant::now());
        let send = |connection: &Connection, mut peer: &TcpStream, bytes: &str| {
            peer.write_all(bytes.as_bytes()).unwrap();
            while connection.unread() < bytes.len() {
                thread::yield_now();
            }
        };
        let long = packet_of(40 << 10);
        send(&connection, &peer, &format!("{{}}{long}{{"));
        assert_eq!(connection.receive(is_over).unwrap().unwrap(), b"{}");
        assert_eq!(connection.receive(is_over).unwrap().unwrap(), long.as_bytes());
        assert!(matches!(connection.receive(is_over), Err(ReceiveError::Slow(1))));
        send(&connection, &peer, "}");
        assert_eq!(connection.receive(is_over).unwrap().unwrap(), b"{}");
        let without_a_pause = peer.try_clone().unwrap();
        let sender = thread::spawn(move || while peer.write_all(&[b' '; 1 << 10]).is_ok() {});
        for _ in 0..10 {
            assert!(matches!(connection.receive(is_over), Err(ReceiveError::Idle)));
        }
        without_a_pause.shutdown(Shutdown::Both).unwrap();
        sender.join().unwrap();
    }

    #[test]
    fn a_connection_with_a_packet_begun_is_not_quiet() {
        let (mut connection, mut peer) = connected(1 << 20);
        peer.write_all(b"{}{\"a\"").unwrap();
        receive(&mut connection);
        assert!(!connection.is_reusable());
    }

    #[test]
    fn nothing_can_be_sent() {
        let (connection, mut peer) = connected(1 << 20);
        connection.send(b"").unwrap();
        connection.send(b"a").unwrap();
        drop(connection);
        let mut received = String::new();
        peer.read_to_string(&mut received).unwrap();
        assert_eq!(received, "a");
    }

    #[test]
    fn a_peer_that_sent_more_than_is_read_sees_the_last_reply_and_a_clean_end() {
        let (mut connection, mut peer) = connected(64);
        let sender = thread::spawn(move || {
            peer.write_all(&[b'{'; 100 << 10]).unwrap();
            peer.shutdown(Shutdown::Write).unwrap();
            let mut reply = String::new();
            peer.read_to_string(&mut reply).map(|_| reply)
        });
        assert!(matches!(connection.receive(bounded()), Err(ReceiveError::TooLarge { .. })));
        connection.send(b"too large\n").unwrap();
        connection.lingering_close();
        drop(connection);
        assert_eq!(sender.join().unwrap().unwrap(), "too large\n");
    }

    #[test]
    fn errors_of_the_system_are_told_without_their_number() {
        let error = io::Error::from_raw_os_error(rustix::io::Errno::CONNREFUSED.raw_os_error());
        assert_eq!(reason(&error), "connection refused");
        assert_eq!(reason(&ErrorKind::WouldBlock.into()), "timed out");
    }
}
