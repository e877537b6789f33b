//! A fast path for plain objects.
//!
//! Nearly all packets are plain: one line, no escapes, only strings and integers. This parser reads
//! those faster than serde_json and with the same result. Everything else, errors included, is left
//! to serde_json.

use std::borrow::Cow;

use super::fields::{Fields, Value};
use crate::protocol::id::is_json_integer;

/// The words of eight bytes that are searched for a string's end before `memchr` is called.
const SHORT_STRING_WORDS: usize = 8;

/// The bytes that are checked together, so that the compiler vectorizes the loop.
const CHUNK: usize = 256;

/// Reads the fields of a plain object. Returns `None` if it is not plain; some fields may be set
/// then. Not inlined: what it needs of the stack is free again when the fields are converted.
#[inline(never)]
pub(super) fn read<'a>(text: &'a str, fields: &mut Fields<'a>) -> Option<()> {
    if text.as_bytes().chunks(CHUNK).any(has_controls) {
        return None;
    }
    let mut reader = Reader { text, at: 0 };
    reader.take(b'{')?;
    loop {
        let key = reader.string()?;
        reader.take(b':')?;
        let place = fields.place(key)?;
        if place.is_some() {
            return None;
        }
        *place = Some(reader.value()?);
        if reader.take(b',').is_none() {
            break;
        }
    }
    reader.take(b'}')?;
    (reader.at == text.len()).then_some(())
}

struct Reader<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> Reader<'a> {
    fn rest(&self) -> &'a [u8] {
        &self.text.as_bytes()[self.at..]
    }

    /// Skips spaces and returns the next byte, without taking it.
    fn peek(&mut self) -> Option<u8> {
        loop {
            match self.text.as_bytes().get(self.at)? {
                b' ' => self.at += 1,
                byte => return Some(*byte),
            }
        }
    }

    /// Takes this byte, if it is the next one after any spaces.
    fn take(&mut self, wanted: u8) -> Option<()> {
        (self.peek()? == wanted).then(|| self.at += 1)
    }

    fn string(&mut self) -> Option<&'a str> {
        self.take(b'"')?;
        let begin = self.at;
        let end = begin + find_quote(self.rest())?;
        self.at = end + 1;
        self.text.get(begin..end)
    }

    fn value(&mut self) -> Option<Value<'a>> {
        if self.peek()? == b'"' {
            return self.string().map(|text| Value::Text(Cow::Borrowed(text)));
        }
        let length = self.rest().iter().position(|byte| matches!(byte, b',' | b'}' | b' '))?;
        let number = self.text.get(self.at..self.at + length)?;
        self.at += length;
        is_json_integer(number).then_some(Value::Integer(number))
    }
}

fn has_controls(chunk: &[u8]) -> bool {
    chunk.iter().fold(u8::MAX, |least, byte| least.min(*byte)) < b' '
}

/// Returns where the next quotation mark is, unless a backslash comes before it. Most strings are
/// short, and for those a few words are searched faster than `memchr` is called.
fn find_quote(bytes: &[u8]) -> Option<usize> {
    let words = bytes.as_chunks().0.iter().take(SHORT_STRING_WORDS);
    let mut at = 0;
    for word in words {
        let word = u64::from_le_bytes(*word);
        let found = matching_bytes(word, b'"') | matching_bytes(word, b'\\');
        if found != 0 {
            at += found.trailing_zeros() as usize / 8;
            return (bytes[at] == b'"').then_some(at);
        }
        at += size_of::<u64>();
    }
    let at = at + memchr::memchr2(b'"', b'\\', &bytes[at..])?;
    (bytes[at] == b'"').then_some(at)
}

/// Returns a word with the highest bit set in each byte that matches. A byte above a match may have
/// it set wrongly, because the subtraction borrows from it; the lowest one is always right.
fn matching_bytes(word: u64, wanted: u8) -> u64 {
    const ONES: u64 = u64::from_ne_bytes([1; 8]);
    const HIGHEST_BITS: u64 = ONES << 7;
    let zero_if_match = word ^ (ONES * u64::from(wanted));
    zero_if_match.wrapping_sub(ONES) & !zero_if_match & HIGHEST_BITS
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Returns whether the object is plain; if so, checks that serde_json reads the same.
    fn is_plain(text: &str) -> bool {
        let mut plain = Fields::default();
        if read(text, &mut plain).is_none() {
            return false;
        }
        match serde_json::from_str::<Fields<'_>>(text) {
            Ok(json) => assert_eq!(format!("{plain:?}"), format!("{json:?}"), "{text}"),
            Err(error) => panic!("{error}: {text}"),
        }
        true
    }

    #[test]
    fn what_programs_write_is_plain() {
        let long = "é ".repeat(1000);
        for text in [
            r#"{"type":0,"srcid":50,"privPoliId":"PP_1","payloadsize":5,"payload":"hello"}"#,
            r#"{"type": "1", "id": "111", "privPolyId": "PP_1", "listenport": "124"}"#,
            "{  \"type\" : 2 , \"payload\":\"\" }",
            &format!(r#"{{"type":0,"payload":"{long}"}}"#),
            r#"{"lease":99999999999999999999999999999999999999999999,"token":"0"}"#,
        ] {
            assert!(is_plain(text), "{text}");
        }
    }

    #[test]
    fn what_is_not_plain_is_left_to_serde_json() {
        let control = format!(r#"{{"payload":"{}{}"}}"#, "x".repeat(100), '\u{1}');
        let escape = format!(r#"{{"payload":"{}\n"}}"#, "x".repeat(100));
        for text in [
            "",
            "{}",
            "[1]",
            r#"{"type":0"#,
            r#"{"type":0}}"#,
            r#"{"type":0} "#,
            r#"{"type":01}"#,
            r#"{"type":1.0}"#,
            r#"{"type":1e2}"#,
            r#"{"type":}"#,
            r#"{"type":0,}"#,
            r#"{"type":0 "id":1}"#,
            r#"{"type":null}"#,
            r#"{"type":0,"type":0}"#,
            r#"{"id":"a\"b"}"#,
            "{\"id\":\"a\nb\"}",
            "{\n\"id\":1}",
            r#"{"unknown":1}"#,
            &control,
            &escape,
        ] {
            assert!(!is_plain(text), "{text}");
        }
    }

    proptest! {
        #[test]
        fn a_string_ends_at_the_first_quotation_mark_and_is_not_plain_with_an_escape_before_it(
            bytes in prop::collection::vec(
                prop_oneof![0x21..=0x23_u8, 0x5b..=0x5d_u8, any::<u8>(), Just(b'x'), Just(b'x')],
                0..100,
            ),
            filling in 0..200_usize,
        ) {
            let bytes = [vec![b'x'; filling], bytes].concat();
            let naive = bytes.iter().position(|byte| matches!(byte, b'"' | b'\\'));
            prop_assert_eq!(find_quote(&bytes), naive.filter(|at| bytes[*at] == b'"'));
        }

        /// Parts of objects in any order, so that many are nearly plain.
        #[test]
        fn what_is_read_here_serde_json_reads_as_the_same(
            pieces in prop::collection::vec(
                prop_oneof![
                    Just("\"id\":"), Just("\"type\":"), Just("\"payload\": "), Just("\"x\":"),
                    Just("\""), Just("\\"), Just("\"a\""), Just("\"é🦀 b\""), Just("\u{7f}"),
                    Just("0"), Just("12"), Just("1234567890"), Just("-"), Just("."), Just("e"),
                    Just(","), Just("}"), Just("{"), Just(" "), Just("\n"), Just("\u{c}"),
                    Just("0123456789abcdefghijklmnopqrstuvwxyz"),
                ],
                0..8,
            ),
        ) {
            is_plain(&format!("{{{}}}", pieces.concat()));
            is_plain(&format!("{{\"srcid\":1,{}}}", pieces.concat()));
            is_plain(&format!("{{\"code\":\"{}\"}}", pieces.concat()));
        }
    }
}
