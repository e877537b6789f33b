//! Random malformed packets, the same ones on every run.

/// A pseudo-random number generator (xorshift64*).
pub struct Random(u64);

impl Random {
    /// Returns a generator; the same seed gives the same numbers.
    pub fn new(seed: u64) -> Self {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// Returns any number.
    pub fn number(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Returns a number below `end`, which must not be 0.
    pub fn below(&mut self, end: usize) -> usize {
        (self.number() % end as u64) as usize
    }

    /// Returns one of `from`.
    pub fn choose<'a, T: ?Sized>(&mut self, from: &[&'a T]) -> &'a T {
        from[self.below(from.len())]
    }
}

/// Valid packets of every type. Good traffic uses other policies.
pub const RIGHT: [&str; 6] = [
    r#"{"type": 0, "srcid": 50, "privPoliId": "PP_8", "payloadsize": 5, "payload": "hello"}"#,
    r#"{"type": 1, "id": 100, "privPolyId": "PP_9", "listenport": 124}"#,
    r#"{"type":"1","id":"100","privPolyId":"PP_9","listenport":"124","lease":"8"}"#,
    r#"{"type": 2, "srcid": 100, "destid": 50, "payloadsize": 2, "payload": "ab"}"#,
    r#"{"type":3,"srcid":0,"destid":50,"payloadsize":1,"payload":"\"\\\u00e9\ud83e\udd80","code":"x"}"#,
    "{\"payload\":\"Grüße, 世界 🌍\",\"privPoliId\":\"PP_8\",\"srcid\":\"a\",\"type\":0,\"x\":[{},[1.5e3,null,true]]}",
];

/// Bytes that often break parsers.
const NASTY: [&[u8]; 26] = [
    b"\"\\ud800\"",
    b"\\udc00\\ud800",
    b"\\u12",
    b"\\x41",
    b"\\",
    b"\"",
    b"\0",
    b"\x1b[2J",
    b"\n",
    b"\x7f",
    b"\xff",
    b"\xc0\x80",
    b"\xed\xa0\x80",
    b"\xf4\x90\x80\x80",
    b"\xef\xbb\xbf",
    b"99999999999999999999999999999999999999999999",
    b"-1",
    b"1e999",
    b"-0.0",
    b"18446744073709551616",
    b"65536",
    b"{",
    b"}",
    b"[",
    b"]",
    b"{\"type\":0,\"type\":1}",
];

/// Returns a packet with a few mutations; some are still valid.
pub fn mutated(random: &mut Random) -> Vec<u8> {
    let mut bytes = random.choose(&RIGHT).as_bytes().to_vec();
    for _ in 0..=random.below(3) {
        mutate(&mut bytes, random);
    }
    bytes
}

fn mutate(bytes: &mut Vec<u8>, random: &mut Random) {
    let place = random.below(bytes.len() + 1);
    let some = random.below(8.min(bytes.len() - place) + 1);
    match random.below(8) {
        0 if place < bytes.len() => bytes[place] ^= 1 << random.below(8),
        1 => {
            bytes.drain(place..place + some);
        }
        2 => {
            let doubled = bytes[place..place + some].to_vec();
            bytes.splice(place..place, doubled);
        }
        3 => bytes.truncate(place),
        4 => bytes.extend_from_slice(random.choose(&RIGHT).as_bytes()),
        5 => {
            bytes.splice(place..place + some, [random.number() as u8]);
        }
        6 if random.below(100) == 0 => {
            let (open, close) = random.choose(&[&("[", "]"), &("{\"a\":", "}")]);
            let nested = open.repeat(100_000) + "1" + &close.repeat(100_000);
            bytes.splice(place..place, nested.into_bytes());
        }
        _ => {
            bytes.splice(place..place + some, random.choose(&NASTY).iter().copied());
        }
    }
}

/// Returns how many answers a receiver owes to these bytes: one to each object, and one to the
/// first thing that is not an object, after which the receiver closes.
pub fn answers(stream: &[u8]) -> usize {
    let mut answers = 0;
    let mut rest = stream;
    loop {
        rest = &rest[rest.iter().take_while(|byte| b" \t\r\n".contains(byte)).count()..];
        if rest.is_empty() {
            return answers;
        }
        answers += 1;
        let mut objects =
            serde_json::Deserializer::from_slice(rest).into_iter::<serde::de::IgnoredAny>();
        let is_object = rest[0] == b'{' && matches!(objects.next(), Some(Ok(_)));
        let end = objects.byte_offset();
        if !is_object || std::str::from_utf8(&rest[..end]).is_err() {
            return answers;
        }
        rest = &rest[end..];
    }
}
