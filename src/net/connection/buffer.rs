//! A connection's receive buffer.
//!
//! An idle [`Buffer`] has no memory. It starts small, and doubles as a long packet arrives; memory
//! beyond [`LARGE_BUFFER`] counts against a budget, if there is one. [`super::Connection`] finds
//! the packets in it and sets the timeouts.

use std::mem::MaybeUninit;
use std::net::TcpStream;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::buffer::spare_capacity;
use rustix::io::{self, Errno};
use rustix::net::{RecvFlags, recv};

use crate::net::budget::{Budget, Reservation};

/// The most bytes of a read into an empty buffer, which goes through the stack.
const FIRST_READ: usize = 1 << 10;

/// The first size is twice the first read, so that another such packet fits: at least `LEAST_BUFFER`
/// and at most `SMALL_BUFFER`, since connections are many.
const LEAST_BUFFER: usize = 256;
const SMALL_BUFFER: usize = 2 * FIRST_READ;

/// The buffer's second size. From there it doubles, so that a long packet takes few reads; what is
/// larger counts against the budget.
pub(super) const LARGE_BUFFER: usize = 16 << 10;

/// A large buffer shrinks after this long without a byte, or with small packets only.
const KEEP_LARGE_BUFFER: Duration = Duration::from_secs(1);

/// Returns the size of the largest buffer for packets of at most `max_packet` bytes. It has room
/// for one more read after the longest packet.
pub const fn largest_buffer(max_packet: usize) -> usize {
    max_packet.saturating_add(2 * LARGE_BUFFER)
}

/// The received bytes of one connection.
#[derive(Debug)]
pub struct Buffer {
    bytes: Vec<u8>,
    /// Bytes before this are consumed. They stay until the next `make_room`.
    consumed: usize,
    /// The size it may grow to.
    largest: usize,
    reservation: Option<Reservation>,
    /// If it is above [`LARGE_BUFFER`]: when it last needed to be.
    filled: Option<Instant>,
}

impl Buffer {
    /// Returns an empty buffer for packets of at most `max_packet` bytes. The caller must consume
    /// what is complete before the next read.
    pub fn new(max_packet: usize) -> Self {
        let largest = largest_buffer(max_packet);
        Buffer { bytes: Vec::new(), consumed: 0, largest, reservation: None, filled: None }
    }

    /// Makes memory beyond [`LARGE_BUFFER`] count against `budget`.
    pub fn use_budget(&mut self, budget: Arc<Budget>) {
        self.reservation = Some(Reservation::new(budget));
    }

    /// Returns the bytes that are not consumed.
    pub fn unconsumed(&self) -> &[u8] {
        &self.bytes[self.consumed..]
    }

    /// Consumes `length` bytes. Returns their range, valid until the next
    /// [`make_room`](Self::make_room).
    pub fn consume(&mut self, length: usize) -> Range<usize> {
        let begin = self.consumed;
        self.consumed += length;
        begin..self.consumed
    }

    /// Returns the bytes in a range that [`consume`](Self::consume) returned.
    pub fn bytes(&self, range: Range<usize>) -> &[u8] {
        &self.bytes[range]
    }

    /// Copies the bytes in a range that [`consume`](Self::consume) returned, with a reservation of their
    /// own. Returns `None` if they take most of the buffer, or the budget has too little left: then
    /// they are rather to be [taken out](Self::take_out).
    pub fn copy_out(&self, range: Range<usize>) -> Option<(Vec<u8>, Option<Reservation>)> {
        // A newline follows.
        let length = range.len() + 1;
        if length > self.bytes.capacity() / 2 {
            return None;
        }
        let mut memory = self.reservation.as_ref().map(Reservation::another);
        if memory.as_mut().is_some_and(|memory| !memory.resize(length)) {
            return None;
        }
        let mut bytes = Vec::with_capacity(length);
        bytes.extend_from_slice(&self.bytes[range]);
        Some((bytes, memory))
    }

    /// Moves out the bytes in a range that [`consume`](Self::consume) returned, without copying
    /// them, together with their reservation. All bytes before them are discarded. The buffer gets
    /// as much memory again, if the budget allows: another long packet may follow. Else it gets what the
    /// bytes that follow take, out of that reservation.
    pub fn take_out(&mut self, range: Range<usize>) -> (Vec<u8>, Option<Reservation>) {
        let capacity = self.bytes.capacity();
        let mut rest = Vec::new();
        let mut memory = self.reservation.as_mut().map(Reservation::take);
        let has_room =
            self.reservation.as_mut().is_none_or(|reservation| reservation.resize(capacity));
        if has_room {
            rest.reserve_exact(capacity);
        } else {
            let length = self.bytes.len() - range.end;
            let counted = if length > LARGE_BUFFER { length } else { 0 };
            self.reservation = memory.as_mut().map(|memory| memory.split(counted));
        }
        rest.extend_from_slice(&self.bytes[range.end..]);
        let mut bytes = std::mem::replace(&mut self.bytes, rest);
        bytes.truncate(range.end);
        bytes.drain(..range.start);
        if !has_room {
            // A newline follows.
            bytes.shrink_to(bytes.len() + 1);
        }
        self.consumed -= range.end;
        (bytes, memory)
    }

    /// Discards consumed bytes and makes room for a read. If the budget has too little left,
    /// discards everything and returns `false`.
    pub fn make_room(&mut self, now: Instant) -> bool {
        if self.bytes.capacity() > LARGE_BUFFER {
            self.shrink_unfilled(now);
        }
        self.bytes.drain(..self.consumed);
        self.consumed = 0;
        self.bytes.is_empty() || self.bytes.len() < self.bytes.capacity() || self.grow()
    }

    /// Returns how long a read may block before it should time out, so that the buffer can shrink.
    pub fn shrink_timeout(&self) -> Duration {
        if self.bytes.capacity() > SMALL_BUFFER && self.unconsumed().is_empty() {
            KEEP_LARGE_BUFFER
        } else {
            Duration::MAX
        }
    }

    /// Reads once, into the room that [`make_room`](Self::make_room) made. If the read times out,
    /// an empty buffer frees its memory.
    pub fn read(&mut self, stream: &TcpStream, flags: RecvFlags) -> io::Result<usize> {
        if self.bytes.capacity() == 0 {
            return self.read_first(stream, flags);
        }
        let read = recv(stream, spare_capacity(&mut self.bytes), flags).map(|(_, read)| read);
        let (length, capacity) = (self.bytes.len(), self.bytes.capacity());
        if length == capacity && capacity < LARGE_BUFFER {
            // A full buffer: more is waiting, of one packet or of several.
            self.bytes.reserve_exact(LARGE_BUFFER - length);
        }
        if read == Err(Errno::AGAIN) && self.unconsumed().is_empty() {
            self.discard_all();
        }
        read
    }

    /// Reads onto the stack, and allocates only if bytes came, so that idle connections take no
    /// memory.
    fn read_first(&mut self, stream: &TcpStream, flags: RecvFlags) -> io::Result<usize> {
        let mut first = [MaybeUninit::<u8>::uninit(); FIRST_READ];
        let ((bytes, _), read) = recv(stream, &mut first, flags)?;
        if read > 0 {
            self.bytes.reserve_exact((2 * read).max(LEAST_BUFFER));
            self.bytes.extend_from_slice(bytes);
        }
        Ok(read)
    }

    /// Enlarges a full buffer for the packet in it. Returns `false`, with all bytes discarded, if
    /// the budget has too little left.
    fn grow(&mut self) -> bool {
        let wanted = (2 * self.bytes.capacity()).clamp(LARGE_BUFFER, self.largest);
        if wanted > LARGE_BUFFER
            && let Some(reservation) = &mut self.reservation
            && !reservation.resize(wanted)
        {
            self.discard_all();
            return false;
        }
        self.bytes.reserve_exact(wanted - self.bytes.len());
        true
    }

    /// Shrinks a large buffer that has held only small packets for a while.
    fn shrink_unfilled(&mut self, now: Instant) {
        let filled = *self.filled.get_or_insert(now);
        if self.bytes.len() > LARGE_BUFFER {
            self.filled = Some(now);
        } else if now - filled > KEEP_LARGE_BUFFER {
            self.shrink(LARGE_BUFFER);
        }
    }

    /// Discards all bytes and frees the memory.
    fn discard_all(&mut self) {
        self.bytes.clear();
        self.consumed = 0;
        self.shrink(0);
    }

    /// Shrinks to `capacity`, which must not be above [`LARGE_BUFFER`].
    fn shrink(&mut self, capacity: usize) {
        self.bytes.shrink_to(capacity);
        self.filled = None;
        if let Some(reservation) = &mut self.reservation {
            reservation.resize(0);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::net::TcpListener;

    use proptest::prelude::*;

    use super::*;

    /// A buffer, the socket it reads, and that socket's other end.
    struct Receiver {
        buffer: Buffer,
        stream: TcpStream,
        peer: TcpStream,
    }

    impl Receiver {
        fn new(max_packet: usize, budget: &Arc<Budget>) -> Self {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let peer = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            peer.set_nodelay(true).unwrap();
            let (stream, _) = listener.accept().unwrap();
            let mut buffer = Buffer::new(max_packet);
            buffer.use_budget(Arc::clone(budget));
            Receiver { buffer, stream, peer }
        }

        /// Sends these bytes and reads them. Returns `false` if there is no memory for them.
        fn receive(&mut self, bytes: &[u8]) -> bool {
            // Pieces that a socket buffer takes without blocking.
            bytes.chunks(8 << 10).all(|piece| {
                self.peer.write_all(piece).unwrap();
                let end = self.buffer.unconsumed().len() + piece.len();
                while self.buffer.unconsumed().len() < end {
                    if !self.buffer.make_room(Instant::now()) {
                        return false;
                    }
                    assert_ne!(
                        self.buffer.read(&self.stream, RecvFlags::empty()),
                        Ok(0),
                        "there is room"
                    );
                }
                true
            })
        }

        fn capacity(&self) -> usize {
            self.buffer.bytes.capacity()
        }
    }

    proptest! {
        // Each case opens a connection.
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn whatever_is_consumed_the_rest_is_unchanged(
            steps in prop::collection::vec((0_usize..20_000, any::<prop::sample::Index>()), 0..8),
        ) {
            let mut receiver = Receiver::new(1 << 20, &Budget::new(2 << 20));
            let mut numbers = (0..=u8::MAX).cycle();
            let mut expected = Vec::new();
            for (length, place) in steps {
                let piece: Vec<_> = numbers.by_ref().take(length).collect();
                prop_assert!(receiver.receive(&piece));
                expected.extend(piece);
                prop_assert_eq!(receiver.buffer.unconsumed(), &expected);
                let consumed: Vec<_> = expected.drain(..place.index(expected.len() + 1)).collect();
                let range = receiver.buffer.consume(consumed.len());
                prop_assert_eq!(receiver.buffer.bytes(range), &consumed);
                prop_assert_eq!(receiver.buffer.unconsumed(), &expected);
            }
        }
    }

    #[test]
    fn memory_is_taken_for_received_bytes_only_and_freed_once_they_are_consumed() {
        let mut receiver = Receiver::new(1 << 30, &Budget::new(0));
        receiver.stream.set_read_timeout(Some(Duration::from_millis(5))).unwrap();
        assert_eq!(receiver.capacity(), 0);
        assert!(receiver.receive(b"{\"payloadsize\":1000000000,\"payload\":\"x"));
        let read = |receiver: &mut Receiver| {
            assert!(receiver.buffer.make_room(Instant::now()));
            receiver.buffer.read(&receiver.stream, RecvFlags::empty())
        };
        assert_eq!(read(&mut receiver), Err(Errno::AGAIN));
        assert!((1..=SMALL_BUFFER).contains(&receiver.capacity()));
        receiver.buffer.consume(receiver.buffer.unconsumed().len());
        assert_eq!(read(&mut receiver), Err(Errno::AGAIN));
        assert_eq!(receiver.capacity(), 0);
    }

    #[test]
    fn the_longest_packet_finds_room_and_what_finds_none_holds_none() {
        const LONGEST: usize = 1_500_000;
        let whole = largest_buffer(LONGEST);
        let budget = Budget::new(whole);
        let [mut first, mut second] = [(); 2].map(|()| Receiver::new(LONGEST, &budget));
        assert!(first.receive(&[b'x'; LONGEST / 2]));
        let left = budget.left();
        assert!(!second.receive(&[b'x'; LONGEST]));
        assert_eq!((second.capacity(), budget.left()), (0, left));
        assert!(first.receive(&[b'x'; LONGEST - LONGEST / 2]));
        assert_eq!((first.capacity(), budget.left()), (whole, 0));
        drop(first);
        assert_eq!(budget.left(), whole);
    }

    #[test]
    fn what_follows_a_packet_that_is_taken_out_stays_within_the_budget() {
        const PACKET: usize = 600_000;
        let whole = largest_buffer(1 << 20);
        let budget = Budget::new(whole);
        let mut receiver = Receiver::new(1 << 20, &budget);
        assert!(receiver.receive(&[b'x'; PACKET]));
        let capacity = receiver.capacity();
        assert!(receiver.receive(&vec![b'y'; capacity - PACKET]));
        let packet = receiver.buffer.consume(PACKET);
        let (bytes, memory) = receiver.buffer.take_out(packet);
        assert!(
            bytes.capacity() + receiver.capacity() <= capacity + 1,
            "they share what there was"
        );
        assert_eq!(budget.left(), whole - capacity);
        assert!(receiver.buffer.unconsumed().iter().all(|byte| *byte == b'y'));
        drop(memory);
        assert_eq!(budget.left(), whole - receiver.capacity());
    }

    #[test]
    fn a_large_buffer_shrinks_though_small_packets_follow() {
        let budget = Budget::new(2 << 20);
        let mut receiver = Receiver::new(1 << 20, &budget);
        assert!(receiver.receive(&[b'x'; 512 << 10]));
        receiver.buffer.consume(512 << 10);
        assert_eq!(receiver.buffer.shrink_timeout(), KEEP_LARGE_BUFFER);
        let now = Instant::now();
        assert!(receiver.buffer.make_room(now));
        assert!(receiver.receive(b"{}"));
        assert!(receiver.buffer.make_room(now + KEEP_LARGE_BUFFER));
        assert!(receiver.capacity() >= 512 << 10, "another long one may come soon");
        assert!(receiver.buffer.make_room(now + 2 * KEEP_LARGE_BUFFER));
        assert!(receiver.capacity() <= LARGE_BUFFER);
        assert_eq!(budget.left(), 2 << 20);
        assert_eq!(receiver.buffer.unconsumed(), b"{}");
    }
}
