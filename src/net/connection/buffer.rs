//! What a connection has received and not yet used up, and the memory for it.
//!
//! A [`Buffer`] has no memory where nothing comes, little for common packets, and for a long one
//! as much as has come of it, and room for as much again, out of a budget if there is one. What
//! the bytes mean, and how long to wait for them, is for [`super::Connection`].

use std::mem::MaybeUninit;
use std::net::TcpStream;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::buffer::spare_capacity;
use rustix::io::{self, Errno};
use rustix::net::{RecvFlags, recv};

use crate::net::budget::{Budget, Reservation};

/// What the buffer of a quiet connection may hold on to: enough for common packets, and little
/// enough for ten thousand idle connections.
const SMALL_BUFFER: usize = 2 << 10;

/// What is read at first, before there is a buffer.
const FIRST_READ: usize = 1 << 10;

/// The first size beyond that; from there the buffer doubles, so that a long packet is read in few
/// calls. What is larger is taken from the budget, if there is one.
pub(super) const LARGE_BUFFER: usize = 16 << 10;

/// After this long without a byte, or with small packets only, a connection lets a large buffer go.
const KEEP_LARGE_BUFFER: Duration = Duration::from_secs(1);

/// The largest buffer for packets of at most `max_packet` bytes, in bytes: what the longest leaves
/// is for one read beyond it.
pub const fn largest_buffer(max_packet: usize) -> usize {
    max_packet.saturating_add(2 * LARGE_BUFFER)
}

/// The received bytes of one connection.
#[derive(Debug)]
pub struct Buffer {
    bytes: Vec<u8>,
    /// Bytes before this are used up. They stay until room is made for others.
    used: usize,
    /// The size it may grow to.
    largest: usize,
    /// What it has taken of a budget.
    reservation: Option<Reservation>,
    /// When it last held more than a small one can, if it is larger.
    filled: Option<Instant>,
}

impl Buffer {
    /// A buffer for packets of at most `max_packet` bytes: no more than that, and one read, may be
    /// in it without being used up.
    pub fn new(max_packet: usize) -> Self {
        let largest = largest_buffer(max_packet);
        Buffer { bytes: Vec::new(), used: 0, largest, reservation: None, filled: None }
    }

    /// Has it take what is beyond [`LARGE_BUFFER`] from `budget`.
    pub fn draw_on(&mut self, budget: Arc<Budget>) {
        self.reservation = Some(Reservation::new(budget));
    }

    /// The bytes that are not used up.
    pub fn unused(&self) -> &[u8] {
        &self.bytes[self.used..]
    }

    /// Uses up so many bytes. Their place holds until the next [`make_room`](Self::make_room).
    pub fn use_up(&mut self, length: usize) -> Range<usize> {
        let begin = self.used;
        self.used += length;
        begin..self.used
    }

    /// The bytes at a place that [`use_up`](Self::use_up) gave.
    pub fn bytes(&self, place: Range<usize>) -> &[u8] {
        &self.bytes[place]
    }

    /// Hands out the bytes at a place that [`use_up`](Self::use_up) gave, in the memory that they were
    /// received in, with what that takes of the budget. What stands before them is gone. As much memory
    /// is taken anew, where the budget has it: another long packet may follow.
    pub fn take_out(&mut self, place: Range<usize>) -> (Vec<u8>, Option<Reservation>) {
        let capacity = self.bytes.capacity();
        let mut rest = Vec::new();
        let memory = self.reservation.as_mut().map(Reservation::take);
        if self.reservation.as_mut().is_none_or(|reservation| reservation.resize(capacity)) {
            rest.reserve_exact(capacity);
        }
        rest.extend_from_slice(&self.bytes[place.end..]);
        let mut bytes = std::mem::replace(&mut self.bytes, rest);
        bytes.truncate(place.end);
        bytes.drain(..place.start);
        self.used -= place.end;
        (bytes, memory)
    }

    /// Forgets what is used up, and makes room for a read. Where the budget has too little left for
    /// that, it forgets everything, and `false` is returned.
    pub fn make_room(&mut self, now: Instant) -> bool {
        if self.bytes.capacity() > LARGE_BUFFER {
            self.shrink_unfilled(now);
        }
        self.bytes.drain(..self.used);
        self.used = 0;
        self.bytes.is_empty() || self.bytes.len() < self.bytes.capacity() || self.grow()
    }

    /// How long a read may wait before it should end, so that memory is let go.
    pub fn keeps_for(&self) -> Duration {
        if self.bytes.capacity() > SMALL_BUFFER && self.unused().is_empty() {
            KEEP_LARGE_BUFFER
        } else {
            Duration::MAX
        }
    }

    /// Reads once, into the room that [`make_room`](Self::make_room) made. Where nothing came in
    /// time, memory that holds nothing is let go.
    pub fn read(&mut self, stream: &TcpStream) -> io::Result<usize> {
        if self.bytes.capacity() == 0 {
            return self.read_first(stream);
        }
        let read =
            recv(stream, spare_capacity(&mut self.bytes), RecvFlags::empty()).map(|(_, read)| read);
        let (length, capacity) = (self.bytes.len(), self.bytes.capacity());
        if length == capacity && capacity < LARGE_BUFFER {
            // Be it many packets: there is more than this one takes in a call.
            self.bytes.reserve_exact(LARGE_BUFFER - length);
        }
        if read == Err(Errno::AGAIN) && self.unused().is_empty() {
            self.forget();
        }
        read
    }

    /// Reads where there is no memory yet, and takes some only for what came: of many idle
    /// connections, each would hold it for nothing.
    fn read_first(&mut self, stream: &TcpStream) -> io::Result<usize> {
        let mut first = [MaybeUninit::<u8>::uninit(); FIRST_READ];
        let ((bytes, _), read) = recv(stream, &mut first, RecvFlags::empty())?;
        if read > 0 {
            self.bytes.reserve_exact(SMALL_BUFFER);
            self.bytes.extend_from_slice(bytes);
        }
        Ok(read)
    }

    /// Makes a full buffer larger for the packet in it.
    fn grow(&mut self) -> bool {
        let wanted = (2 * self.bytes.capacity()).clamp(LARGE_BUFFER, self.largest);
        if wanted > LARGE_BUFFER
            && let Some(reservation) = &mut self.reservation
            && !reservation.resize(wanted)
        {
            self.forget();
            return false;
        }
        self.bytes.reserve_exact(wanted - self.bytes.len());
        true
    }

    /// Lets a large buffer go that small packets do not fill: others may need the memory.
    fn shrink_unfilled(&mut self, now: Instant) {
        let filled = *self.filled.get_or_insert(now);
        if self.bytes.len() > LARGE_BUFFER {
            self.filled = Some(now);
        } else if now - filled > KEEP_LARGE_BUFFER {
            self.shrink(LARGE_BUFFER);
        }
    }

    /// Forgets all bytes, and has no memory any more.
    fn forget(&mut self) {
        self.bytes.clear();
        self.used = 0;
        self.shrink(0);
    }

    /// Gives back what it has beyond `capacity`, which takes nothing of the budget.
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
            buffer.draw_on(Arc::clone(budget));
            Receiver { buffer, stream, peer }
        }

        /// Has the peer send these bytes, and reads them; `false` where there is no memory for them.
        fn receive(&mut self, bytes: &[u8]) -> bool {
            // The system takes so much at once.
            bytes.chunks(8 << 10).all(|piece| {
                self.peer.write_all(piece).unwrap();
                let end = self.buffer.unused().len() + piece.len();
                while self.buffer.unused().len() < end {
                    if !self.buffer.make_room(Instant::now()) {
                        return false;
                    }
                    assert_ne!(self.buffer.read(&self.stream), Ok(0), "there is room");
                }
                true
            })
        }

        fn capacity(&self) -> usize {
            self.buffer.bytes.capacity()
        }
    }

    proptest! {
        // Each case takes a connection.
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn whatever_is_used_up_the_rest_is_as_it_came(
            steps in prop::collection::vec((0_usize..20_000, any::<prop::sample::Index>()), 0..8),
        ) {
            let mut receiver = Receiver::new(1 << 20, &Budget::new(2 << 20));
            let mut numbers = (0..=u8::MAX).cycle();
            let mut expected = Vec::new();
            for (length, place) in steps {
                let piece: Vec<_> = numbers.by_ref().take(length).collect();
                prop_assert!(receiver.receive(&piece));
                expected.extend(piece);
                prop_assert_eq!(receiver.buffer.unused(), &expected);
                let used: Vec<_> = expected.drain(..place.index(expected.len() + 1)).collect();
                let place = receiver.buffer.use_up(used.len());
                prop_assert_eq!(receiver.buffer.bytes(place), &used);
                prop_assert_eq!(receiver.buffer.unused(), &expected);
            }
        }
    }

    #[test]
    fn memory_is_for_what_came_and_let_go_when_nothing_is_left_of_it() {
        let mut receiver = Receiver::new(1 << 30, &Budget::new(0));
        receiver.stream.set_read_timeout(Some(Duration::from_millis(5))).unwrap();
        assert_eq!(receiver.capacity(), 0);
        assert!(receiver.receive(b"{\"payloadsize\":1000000000,\"payload\":\"x"));
        let read = |receiver: &mut Receiver| {
            assert!(receiver.buffer.make_room(Instant::now()));
            receiver.buffer.read(&receiver.stream)
        };
        assert_eq!(read(&mut receiver), Err(Errno::AGAIN));
        assert!((1..=SMALL_BUFFER).contains(&receiver.capacity()));
        receiver.buffer.use_up(receiver.buffer.unused().len());
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
    fn a_large_buffer_is_let_go_though_small_packets_follow() {
        let budget = Budget::new(2 << 20);
        let mut receiver = Receiver::new(1 << 20, &budget);
        assert!(receiver.receive(&[b'x'; 512 << 10]));
        receiver.buffer.use_up(512 << 10);
        assert_eq!(receiver.buffer.keeps_for(), KEEP_LARGE_BUFFER);
        let now = Instant::now();
        assert!(receiver.buffer.make_room(now));
        assert!(receiver.receive(b"{}"));
        assert!(receiver.buffer.make_room(now + KEEP_LARGE_BUFFER));
        assert!(receiver.capacity() >= 512 << 10, "another long one may come soon");
        assert!(receiver.buffer.make_room(now + 2 * KEEP_LARGE_BUFFER));
        assert!(receiver.capacity() <= LARGE_BUFFER);
        assert_eq!(budget.left(), 2 << 20);
        assert_eq!(receiver.buffer.unused(), b"{}");
    }
}
