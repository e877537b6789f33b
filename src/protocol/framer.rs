//! Finds the end of each JSON object in a stream of bytes, however the stream is split into reads.
//!
//! The protocol has neither a length prefix nor a separator: a packet ends at the brace that closes
//! its first one. The framer keeps its state between calls and scans each byte once, so a packet in
//! a thousand pieces costs no more than in one. It does not check that the object is a packet, or
//! even JSON; [`Packet::parse`](super::Packet::parse) does. Where a JSON parser accepts the object,
//! it finds the same end.

/// The most bytes that [`plain_end`] scans.
const MAX_PLAIN: usize = 512;

/// The byte order mark in UTF-8. Several libraries begin a text stream with it.
pub const BYTE_ORDER_MARK: [u8; 3] = [0xef, 0xbb, 0xbf];

/// What the framer found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scan {
    /// The packet does not end in these bytes.
    Incomplete,
    /// The packet ends after this many of the bytes.
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
    /// Position in the byte order mark; at its end once a packet has begun.
    mark: usize,
    /// Bytes of the current packet so far; 0 between packets.
    length: usize,
    /// Open braces.
    depth: usize,
    in_string: bool,
    /// The last byte was a backslash that escapes the next one.
    escaped: bool,
}

impl Framer {
    /// Returns a framer for packets of at most `limit` bytes, both braces included.
    pub fn new(limit: usize) -> Self {
        Framer { limit, mark: 0, length: 0, depth: 0, in_string: false, escaped: false }
    }

    /// Returns the most bytes a packet may have.
    pub fn limit(&self) -> usize {
        self.limit
    }

    /// Returns whether a packet has begun and not ended.
    pub fn is_inside(&self) -> bool {
        self.length > 0
    }

    /// Returns the bytes of the current packet so far; 0 between packets.
    pub fn length(&self) -> usize {
        self.length
    }

    /// Returns how many bytes of white space `bytes` begins with. Only for bytes between packets.
    pub fn white_space(bytes: &[u8]) -> usize {
        bytes
            .iter()
            .position(|byte| !matches!(byte, b' ' | b'\t' | b'\r' | b'\n'))
            .unwrap_or(bytes.len())
    }

    /// Like [`white_space`](Self::white_space), but also skips a byte order mark before the first
    /// packet.
    pub fn skip(&mut self, bytes: &[u8]) -> usize {
        let mut end = if self.is_inside_mark() { 0 } else { Self::white_space(bytes) };
        while let Some(next) = BYTE_ORDER_MARK.get(self.mark)
            && bytes.get(end) == Some(next)
        {
            self.mark += 1;
            end += 1;
        }
        if self.is_inside_mark() { end } else { end + Self::white_space(&bytes[end..]) }
    }

    /// Scans `bytes`, which must follow those of the previous call; between packets they must start
    /// with one. After [`Scan::End`] the framer is ready for the next packet. After an error it
    /// cannot be used any more.
    pub fn scan(&mut self, bytes: &[u8]) -> Scan {
        if self.length == 0
            && bytes.first().is_some_and(|&byte| byte != b'{' || self.is_inside_mark())
        {
            return Scan::NotAnObject;
        }
        let room = self.limit - self.length;
        let in_reach = &bytes[..bytes.len().min(room)];
        let plain_end = if self.length == 0 { plain_end(in_reach) } else { None };
        let end = plain_end.or_else(|| self.find_end(in_reach));
        #[cfg(test)]
        SCANNED.set(SCANNED.get() + end.unwrap_or(in_reach.len()));
        match end {
            Some(end) => {
                *self = Framer { mark: BYTE_ORDER_MARK.len(), ..Framer::new(self.limit) };
                Scan::End(end)
            }
            None if bytes.len() > room => Scan::TooLarge,
            None => {
                self.length += bytes.len();
                if self.length > 0 {
                    self.mark = BYTE_ORDER_MARK.len();
                }
                Scan::Incomplete
            }
        }
    }

    fn is_inside_mark(&self) -> bool {
        (1..BYTE_ORDER_MARK.len()).contains(&self.mark)
    }

    fn find_end(&mut self, bytes: &[u8]) -> Option<usize> {
        let mut at = 0;
        loop {
            if self.in_string {
                at = self.end_of_string(bytes, at)?;
            }
            match bytes.get(at)? {
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

    /// Returns where the current string ends, from `begin` on.
    fn end_of_string(&mut self, bytes: &[u8], begin: usize) -> Option<usize> {
        let starts_escaped = std::mem::take(&mut self.escaped);
        let quotes = memchr::memchr_iter(b'"', &bytes[begin..]);
        for quote in quotes {
            if !escapes_next(&bytes[begin..begin + quote], starts_escaped) {
                self.in_string = false;
                return Some(begin + quote + 1);
            }
        }
        self.escaped = escapes_next(&bytes[begin..], starts_escaped);
        None
    }
}

/// Returns whether this part of a string escapes the byte after it: it ends in an odd number of
/// backslashes, not counting a first byte that is itself escaped.
fn escapes_next(part: &[u8], starts_escaped: bool) -> bool {
    let backslashes = part.iter().rev().take_while(|byte| **byte == b'\\').count();
    let is_first_escaped = starts_escaped && backslashes == part.len();
    (backslashes % 2 == 1) != is_first_escaped
}

/// Returns the end of a short object with no braces and no escapes inside, as nearly all packets
/// are: its first closing brace, unless that is in a string. A few vectorized passes take far less
/// time than a loop over the bytes.
fn plain_end(bytes: &[u8]) -> Option<usize> {
    let short = &bytes[..bytes.len().min(MAX_PLAIN)];
    let end = memchr::memchr(b'}', short)?;
    let inside = short.get(1..end)?;
    let is_plain = memchr::memchr2(b'{', b'\\', inside).is_none()
        && memchr::memchr_iter(b'"', inside).count().is_multiple_of(2);
    is_plain.then_some(end + 1)
}

#[cfg(test)]
thread_local! {
    /// Bytes that this thread's framers have scanned.
    pub(crate) static SCANNED: std::cell::Cell<usize> = const { std::cell::Cell::new(0) };
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde::de::IgnoredAny;
    use serde_json::Value;

    use super::*;

    /// Cuts the stream that these pieces make up into packets.
    fn cut<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> Vec<Vec<u8>> {
        let mut framer = Framer::new(usize::MAX);
        let (mut packets, mut packet) = (Vec::new(), Vec::new());
        for mut piece in pieces {
            loop {
                if !framer.is_inside() {
                    piece = &piece[framer.skip(piece)..];
                }
                if piece.is_empty() {
                    break;
                }
                match framer.scan(piece) {
                    Scan::Incomplete => {
                        packet.extend_from_slice(piece);
                        break;
                    }
                    Scan::End(end) => {
                        packet.extend_from_slice(&piece[..end]);
                        packets.push(std::mem::take(&mut packet));
                        piece = &piece[end..];
                    }
                    other => panic!("{other:?} at {:?}", String::from_utf8_lossy(piece)),
                }
            }
        }
        assert!(packet.is_empty(), "the stream ends between packets");
        packets
    }

    /// Splits a stream at these places, taken modulo its length.
    fn split<'a>(stream: &'a [u8], places: &[usize]) -> Vec<&'a [u8]> {
        let mut places: Vec<_> = places.iter().map(|place| place % (stream.len() + 1)).collect();
        places.extend([0, stream.len()]);
        places.sort_unstable();
        places.windows(2).map(|pair| &stream[pair[0]..pair[1]]).collect()
    }

    /// Any JSON value, with braces, quotes and backslashes in its strings.
    fn value() -> impl Strategy<Value = Value> {
        let text = || "[a{}\"\\\\\n é🦀:,]{0,8}";
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            text().prop_map(Value::from),
        ];
        leaf.prop_recursive(3, 16, 4, move |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::btree_map(text(), inner, 0..4)
                    .prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        })
    }

    /// The text of any JSON object, compact or pretty.
    fn object() -> impl Strategy<Value = Vec<u8>> {
        (prop::collection::btree_map("[a{}\"\\\\]{0,4}", value(), 0..4), any::<bool>()).prop_map(
            |(map, is_pretty)| {
                let object = Value::Object(map.into_iter().collect());
                let text = if is_pretty { format!("{object:#}") } else { object.to_string() };
                text.into_bytes()
            },
        )
    }

    proptest! {
        #[test]
        fn any_packets_cut_anywhere_are_the_same_packets(
            packets in prop::collection::vec((object(), "[ \t\r\n]{0,3}"), 0..6),
            places in prop::collection::vec(any::<usize>(), 0..20),
        ) {
            let stream: Vec<u8> = packets
                .iter()
                .flat_map(|(packet, space)| [packet, space.as_bytes()].concat())
                .collect();
            let packets: Vec<_> = packets.into_iter().map(|(packet, _)| packet).collect();
            prop_assert_eq!(&cut(split(&stream, &places)), &packets);
            prop_assert_eq!(&cut(stream.chunks(1)), &packets);
        }

        /// Bytes inserted somewhere and anything appended: if a JSON parser still finds an object,
        /// the framer finds the same one.
        #[test]
        fn an_object_ends_where_a_json_parser_says(
            mut text in object(),
            place in any::<prop::sample::Index>(),
            change in "[{}\"\\\\ a]{0,2}",
            rest in "[{}\"\\\\ a]{0,8}",
        ) {
            let place = place.index(text.len()) + 1;
            text.splice(place..place, change.bytes());
            text.extend_from_slice(rest.as_bytes());
            let mut parser = serde_json::Deserializer::from_slice(&text).into_iter::<IgnoredAny>();
            if let Some(Ok(_)) = parser.next() {
                let end = Framer::new(text.len()).scan(&text);
                prop_assert_eq!(end, Scan::End(parser.byte_offset()));
            }
        }

        #[test]
        fn no_bytes_make_it_panic(
            bytes in prop::collection::vec(prop_oneof![any::<u8>(), Just(b'{'), Just(b'}')], 0..64),
            limit in 0_usize..64,
        ) {
            let mut framer = Framer::new(limit);
            let mut scanned = 0;
            for byte in &bytes {
                match framer.scan(&[*byte]) {
                    Scan::Incomplete => scanned += 1,
                    Scan::End(end) => {
                        prop_assert_eq!(end, 1);
                        scanned = 0;
                    }
                    Scan::NotAnObject | Scan::TooLarge => break,
                }
                prop_assert!(scanned <= limit);
            }
        }
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
                assert_eq!(cut(stream.chunks(piece)), packets, "{piece}, {separator:?}");
            }
        }
    }

    #[test]
    fn an_object_of_any_length_ends_where_it_ends() {
        for length in 0..2 * MAX_PLAIN {
            for rest in ["", "\n{\"b\":1}", "\""] {
                let object = format!("{{\"a\":\"{}\"}}", "x".repeat(length));
                let scan = Framer::new(usize::MAX).scan((object.clone() + rest).as_bytes());
                assert_eq!(scan, Scan::End(object.len()));
            }
        }
    }

    #[test]
    fn what_cannot_begin_a_packet_is_reported_at_once() {
        for byte in (0..=255).filter(|&byte| byte != b'{') {
            assert_eq!(Framer::new(10).scan(&[byte, b'{']), Scan::NotAnObject);
        }
    }

    #[test]
    fn a_byte_order_mark_is_white_space_before_the_first_packet_only() {
        let packets: [&[u8]; 2] = [b"{}", b"{}"];
        for stream in ["\u{feff}{}{}", " \u{feff}\n{}\n{}", "{}{}"] {
            assert_eq!(cut([stream.as_bytes()]), packets);
            assert_eq!(cut(stream.as_bytes().chunks(1)), packets);
        }
        let mark = BYTE_ORDER_MARK;
        let mut framer = Framer::new(10);
        for byte in mark {
            assert_eq!(framer.skip(&[byte]), 1);
            assert!(!framer.is_inside());
        }
        assert_eq!(framer.skip(&mark), 0, "there is one");
        assert_eq!(framer.scan(&mark), Scan::NotAnObject);
        let mut framer = Framer::new(10);
        assert_eq!(framer.scan(b"{}"), Scan::End(2));
        assert_eq!(framer.skip(&mark), 0);
        for broken in [&b"\xef{}"[..], b"\xef\xbb {}", b"\xef\xef\xbb\xbf{}"] {
            for piece in [1, broken.len()] {
                let mut framer = Framer::new(10);
                let found = broken.chunks(piece).find_map(|piece| {
                    let skipped = framer.skip(piece);
                    Some(framer.scan(&piece[skipped..])).filter(|scan| *scan != Scan::Incomplete)
                });
                assert_eq!(found, Some(Scan::NotAnObject), "{}", broken.escape_ascii());
            }
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

    #[test]
    fn the_limit_counts_anew_for_each_packet() {
        let mut framer = Framer::new(2);
        for _ in 0..3 {
            assert_eq!(framer.scan(b"{}{}"), Scan::End(2));
        }
    }

    #[test]
    fn a_packet_in_single_bytes_is_scanned_once() {
        let packet = format!(r#"{{"payload":"{}"}}"#, r#"x\"}"#.repeat(1 << 20));
        let before = SCANNED.get();
        assert_eq!(cut(packet.as_bytes().chunks(1)), [packet.as_bytes()]);
        assert_eq!(SCANNED.get() - before, packet.len());
    }
}
