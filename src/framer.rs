//! Finding where a JSON object ends in a stream of bytes, however the stream was cut.
//!
//! The protocol has neither a length prefix nor a separator, so the end of a packet is the brace
//! that closes its first one. The framer keeps its place between calls and is never shown a byte
//! twice, so that a packet in a thousand pieces costs what it costs in one. Whether the object is
//! a packet, or even JSON, is for [`crate::packet`] to say: for every object that a JSON parser
//! accepts, the end is the same.

/// What the framer found in the bytes it was shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scan {
    /// All bytes belong to a packet that is not yet complete.
    Incomplete,
    /// The packet is complete with this many of the bytes; the rest is what follows it.
    End(usize),
    /// The first byte cannot begin a packet.
    NotAnObject,
    /// The packet is longer than the limit.
    TooLarge,
}

/// Finds the ends of packets in a stream.
#[derive(Debug)]
pub struct Framer {
    limit: usize,
    /// Bytes of the present packet so far; 0 between packets.
    length: usize,
    /// Braces open.
    depth: usize,
    in_string: bool,
    /// The last byte was a backslash that escapes the next one.
    escaped: bool,
}

impl Framer {
    /// A framer for packets of at most `limit` bytes, from brace to brace.
    pub fn new(limit: usize) -> Self {
        Framer { limit, length: 0, depth: 0, in_string: false, escaped: false }
    }

    /// The longest packet that is taken, in bytes.
    pub fn limit(&self) -> usize {
        self.limit
    }

    /// Whether a packet has begun and not ended.
    pub fn is_inside(&self) -> bool {
        self.length > 0
    }

    /// Bytes of the packet that has begun.
    pub fn length(&self) -> usize {
        self.length
    }

    /// How many of `bytes`, which stand between packets, are white space.
    pub fn white_space(bytes: &[u8]) -> usize {
        bytes
            .iter()
            .position(|byte| !matches!(byte, b' ' | b'\t' | b'\r' | b'\n'))
            .unwrap_or(bytes.len())
    }

    /// Looks at `bytes`, which must follow those of the call before and begin a packet where none
    /// has begun. After [`Scan::End`] the framer is ready for the next packet; after an error it
    /// has lost its place for good.
    pub fn scan(&mut self, bytes: &[u8]) -> Scan {
        if self.length == 0 && bytes.first().is_some_and(|&byte| byte != b'{') {
            return Scan::NotAnObject;
        }
        let room = self.limit - self.length;
        let end = self.find_end(&bytes[..bytes.len().min(room)]);
        match end {
            Some(end) => {
                *self = Framer::new(self.limit);
                Scan::End(end)
            }
            None if bytes.len() > room => Scan::TooLarge,
            None => {
                self.length += bytes.len();
                Scan::Incomplete
            }
        }
    }

    fn find_end(&mut self, bytes: &[u8]) -> Option<usize> {
        let mut at = 0;
        while at < bytes.len() {
            if self.escaped {
                self.escaped = false;
                at += 1;
            } else if self.in_string {
                let Some(skip) = memchr::memchr2(b'"', b'\\', &bytes[at..]) else { break };
                at += skip;
                self.escaped = bytes[at] == b'\\';
                self.in_string = self.escaped;
                at += 1;
            } else {
                match bytes[at] {
                    b'"' => self.in_string = true,
                    b'{' => self.depth += 1,
                    b'}' => {
                        self.depth -= 1;
                        if self.depth == 0 {
                            return Some(at + 1);
                        }
                    }
                    _ => {}
                }
                at += 1;
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Cuts `stream` into packets, shown to the framer `piece` bytes at a time, and counts how
    /// many bytes it was shown.
    fn cut(stream: &[u8], piece: usize) -> (Vec<&[u8]>, usize) {
        let mut framer = Framer::new(usize::MAX);
        let (mut packets, mut shown, mut start, mut at) = (Vec::new(), 0, 0, 0);
        while at < stream.len() {
            if !framer.is_inside() {
                let skip = Framer::white_space(&stream[at..]);
                shown += skip;
                at += skip;
                start = at;
            }
            let bytes = &stream[at..stream.len().min(at + piece)];
            match framer.scan(bytes) {
                Scan::Incomplete => at += bytes.len(),
                Scan::End(end) => {
                    at += end;
                    packets.push(&stream[start..at]);
                }
                other => panic!("{other:?} at byte {at}"),
            }
            shown += at.saturating_sub(start).min(bytes.len()).min(piece);
        }
        (packets, shown)
    }

    #[test]
    fn every_way_of_cutting_gives_the_same_packets() {
        let packets: [&[u8]; 5] = [
            br#"{}"#,
            br#"{"a":"}{\"\\","b":{"c":[{}]}}"#,
            br#"{"a":"\\"}"#,
            "{\"текст\":\"🦀 \\u007d\"}".as_bytes(),
            br#"{ "x" : 1 }"#,
        ];
        for separator in ["", "\n", " \r\n\t "] {
            let stream = packets.join(separator.as_bytes());
            for piece in 1..=stream.len() {
                assert_eq!(
                    cut(&stream, piece).0,
                    packets,
                    "pieces of {piece}, between {separator:?}"
                );
            }
        }
    }

    #[test]
    fn what_cannot_begin_a_packet_is_told_at_once() {
        for byte in (0..=255).filter(|&byte| byte != b'{') {
            assert_eq!(Framer::new(10).scan(&[byte, b'{']), Scan::NotAnObject);
        }
    }

    #[test]
    fn the_limit_counts_from_brace_to_brace() {
        let packet = br#"{"a":"12345"}"#;
        assert_eq!(Framer::new(packet.len()).scan(packet), Scan::End(packet.len()));
        assert_eq!(Framer::new(packet.len() - 1).scan(packet), Scan::TooLarge);
        let mut framer = Framer::new(packet.len() - 1);
        for byte in &packet[..packet.len() - 1] {
            assert_eq!(framer.scan(&[*byte]), Scan::Incomplete);
        }
        assert_eq!(framer.scan(b"}"), Scan::TooLarge);
    }
}
