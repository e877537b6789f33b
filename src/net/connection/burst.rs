//! Packets handed out together, with their memory.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use super::Connection;
use super::buffer::LARGE_BUFFER;
use crate::net::budget::Reservation;

/// Packets that were handed out together, with their memory.
#[derive(Debug)]
pub(crate) struct Burst {
    /// The packets, each followed by a newline.
    pub bytes: Arc<Vec<u8>>,
    /// Where each is, its newline included.
    pub ranges: Vec<Range<usize>>,
    /// When the last of them was complete.
    pub received: Instant,
    /// What a long packet takes of the budget.
    pub memory: Option<Reservation>,
}

impl Connection {
    /// Hands out packets with their memory, `limit` at most. A long one is handed out alone, in the
    /// memory that it was received in, unless it fills less than half of that.
    pub(crate) fn take_burst(&mut self, limit: usize) -> Burst {
        let received = self.received;
        let is_long = |packet: &Range<usize>| packet.len() > LARGE_BUFFER;
        if self.packets.front().is_some_and(is_long)
            && let Some(packet) = self.packets.pop_front()
        {
            let (mut bytes, memory) = self.buffer.copy_out(packet.clone()).unwrap_or_else(|| {
                for later in &mut self.packets {
                    *later = later.start - packet.end..later.end - packet.end;
                }
                self.buffer.take_out(packet)
            });
            bytes.reserve_exact(1);
            bytes.push(b'\n');
            let ranges = std::iter::once(0..bytes.len()).collect();
            return Burst { bytes: Arc::new(bytes), ranges, received, memory };
        }
        let count = self.packets.iter().take(limit).take_while(|packet| !is_long(packet)).count();
        let length = self.packets.iter().take(count).map(|packet| packet.len() + 1).sum();
        let mut bytes = Vec::with_capacity(length);
        let mut ranges = Vec::with_capacity(count);
        for packet in self.packets.drain(..count) {
            let begin = bytes.len();
            bytes.extend_from_slice(self.buffer.bytes(packet));
            bytes.push(b'\n');
            ranges.push(begin..bytes.len());
        }
        Burst { bytes: Arc::new(bytes), ranges, received, memory: None }
    }
}
