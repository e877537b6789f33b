//! What a proxy answers to a setup packet: one of ours, one of the homework's, or none at all.

use std::io::{ErrorKind, Read};
use std::net::TcpStream;
use std::time::Instant;

use serde::de::IgnoredAny;

use crate::protocol::Packet;

/// The longest answer to a setup packet, in bytes: far more than any proxy's.
const MAX_ANSWER: usize = 64 << 10;

/// What came from a proxy after a setup packet.
#[derive(Debug, PartialEq, Eq)]
pub enum Answer {
    /// An ack, with the seconds of the lease that it grants.
    Ack(Option<u64>),
    /// A refusal.
    Refusal { code: String, reason: String },
    /// JSON that is neither.
    OtherJson(String),
    /// No JSON, by its first words.
    NotJson(String),
    /// The end of the connection.
    End,
    /// Nothing whole in time.
    Nothing,
    /// The connection broke, or ended inside an answer.
    Broken,
}

/// The answers on a setup connection. A proxy that is not ours may send anything, so these are not
/// taken as packets before they are known to be some.
pub struct Answers<'a> {
    stream: &'a TcpStream,
    received: Vec<u8>,
}

impl<'a> Answers<'a> {
    /// None yet.
    pub fn new(stream: &'a TcpStream) -> Self {
        Answers { stream, received: Vec::new() }
    }

    /// Waits for the next answer until the deadline, or for as long as it takes.
    pub fn next(&mut self, deadline: Option<Instant>) -> Answer {
        loop {
            if let Some((answer, length)) = take_answer(&self.received) {
                self.received.drain(..length);
                return answer;
            }
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return Answer::Nothing;
            }
            let mut bytes = [0; 1 << 10];
            let read =
                self.stream.set_read_timeout(left).and_then(|()| self.stream.read(&mut bytes));
            match read {
                Ok(0) if self.received.trim_ascii().is_empty() => return Answer::End,
                Ok(0) => return Answer::Broken,
                Ok(read) => self.received.extend_from_slice(&bytes[..read]),
                Err(error) => match error.kind() {
                    ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted => {}
                    _ => return Answer::Broken,
                },
            }
        }
    }

    /// Reads on until the proxy ends the connection, but not much longer than `until`.
    pub fn wait_for_end(mut self, until: Instant) {
        let is_end = |answer| matches!(answer, Answer::End | Answer::Nothing | Answer::Broken);
        while !is_end(self.next(Some(until))) {}
    }
}

/// The first answer among these bytes and its length, if it is whole or cannot become one.
fn take_answer(bytes: &[u8]) -> Option<(Answer, usize)> {
    let text = bytes.strip_prefix("\u{feff}".as_bytes()).unwrap_or(bytes);
    let mut values = serde_json::Deserializer::from_slice(text).into_iter::<IgnoredAny>();
    let value = match values.next() {
        Some(Ok(_)) => {
            let (value, rest) = text.split_at(values.byte_offset());
            let value = value.trim_ascii();
            // The number that a mail server's greeting begins with is JSON, too.
            (value.starts_with(b"{") || rest.trim_ascii().is_empty()).then_some((value, rest))
        }
        Some(Err(error)) if !error.is_eof() => None,
        _ if text.len() <= MAX_ANSWER => return None,
        _ => None,
    };
    let not_json = || {
        let line = text.trim_ascii().split(|byte| *byte == b'\n').next().unwrap_or_default();
        let line = String::from_utf8_lossy(line.trim_ascii_end()).into_owned();
        (Answer::NotJson(line), bytes.len())
    };
    let Some((value, rest)) = value else { return Some(not_json()) };
    let answer = match Packet::parse(value) {
        Ok(Packet::Ack(ack)) => Answer::Ack(ack.lease),
        Ok(Packet::Refusal(refusal)) => {
            Answer::Refusal { code: refusal.code.into_owned(), reason: refusal.reason.into_owned() }
        }
        Err(error) if !error.is_json => return Some(not_json()),
        _ => Answer::OtherJson(String::from_utf8_lossy(value).into_owned()),
    };
    Some((answer, bytes.len() - rest.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn only(bytes: &[u8]) -> Answer {
        let (answer, length) = take_answer(bytes).unwrap_or_else(|| panic!("not whole"));
        assert_eq!(length, bytes.len());
        answer
    }

    #[test]
    fn an_ack_says_what_lease_it_grants() {
        for (lease, expected) in
            [("", None), (",\"lease\":60", Some(60)), (",\"lease\":0", Some(0))]
        {
            let ack = format!(r#"{{"type":2,"srcid":0,"destid":1,"payload":"registered"{lease}}}"#);
            for before in ["", " \n", "\u{feff}"] {
                assert_eq!(only(format!("{before}{ack}").as_bytes()), Answer::Ack(expected));
            }
            assert_eq!(take_answer(&ack.as_bytes()[..ack.len() - 1]), None);
            let two = ack.clone() + &ack;
            assert_eq!(take_answer(two.as_bytes()), Some((Answer::Ack(expected), ack.len())));
        }
    }

    #[test]
    fn json_that_is_no_packet_is_an_answer_too() {
        for text in [r#"{"Error": "no"}"#, r#"{"type": 0}"#, "[]", "\"ok\"", "null", "true", "1"] {
            assert_eq!(only(text.as_bytes()), Answer::OtherJson(text.to_owned()));
        }
        let refusal = br#"{"type":3,"destid":1,"payload":"why","code":"id-in-use"}"#;
        let (code, reason) = ("id-in-use".to_owned(), "why".to_owned());
        assert_eq!(only(refusal), Answer::Refusal { code, reason });
    }

    #[test]
    fn what_is_no_json_is_told_by_its_first_line() {
        for (bytes, words) in [
            (&b"HTTP/1.1 400 Bad Request\r\nServer: x\r\n\r\n"[..], "HTTP/1.1 400 Bad Request"),
            (b"SSH-2.0-OpenSSH_9.6\r\n", "SSH-2.0-OpenSSH_9.6"),
            (b"220 mail.example.net ESMTP\r\n", "220 mail.example.net ESMTP"),
            (b"\n nobody \n", "nobody"),
            (b"\x15\x03\x01\x00\x02\x02\x16", "\u{15}\u{3}\u{1}\u{0}\u{2}\u{2}\u{16}"),
            (b"\xff", "\u{fffd}"),
            (b"{\"a\":\"\xff\"}", "{\"a\":\"\u{fffd}\"}"),
        ] {
            assert_eq!(only(bytes), Answer::NotJson(words.to_owned()));
        }
        let endless = [b"[".as_slice(), &[b' '; MAX_ANSWER]].concat();
        assert_eq!(only(&endless), Answer::NotJson("[".to_owned()));
        assert_eq!(take_answer(&endless[1..]), None);
    }
}
