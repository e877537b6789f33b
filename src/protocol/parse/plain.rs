//! Reading the plainest objects, fast.
//!
//! Nearly all packets are written by programs, on one line, without escapes and with nothing but
//! strings and integers in them. Those are read here, at the speed at which memory is read. Whatever
//! is not as plain as that, or wrong in any way, is left to serde_json, which has the last word on
//! what JSON is: what is read here it would read as the same.

use std::borrow::Cow;

use super::{Fields, Value};

/// Words of eight bytes in which the end of a string is looked for first.
const FEW: usize = 8;

/// Bytes that are looked at together, which takes a processor far less than a look at each.
const CHUNK: usize = 256;

/// Decimal digits that fit 64 bits, whatever they are.
const MAX_DIGITS: usize = 18;

/// Takes the fields of an object, if it is plain; `None` where it is not, with some of them taken.
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

    /// What comes after any white space, of which there are only spaces on a line.
    fn next(&mut self) -> Option<u8> {
        loop {
            match self.text.as_bytes().get(self.at)? {
                b' ' => self.at += 1,
                byte => return Some(*byte),
            }
        }
    }

    /// Takes this byte, if it comes next.
    fn take(&mut self, wanted: u8) -> Option<()> {
        (self.next()? == wanted).then(|| self.at += 1)
    }

    fn string(&mut self) -> Option<&'a str> {
        self.take(b'"')?;
        let begin = self.at;
        let end = begin + find_quote(self.rest())?;
        self.at = end + 1;
        self.text.get(begin..end)
    }

    fn value(&mut self) -> Option<Value<'a>> {
        if self.next()? == b'"' {
            return self.string().map(|text| Value::Text(Cow::Borrowed(text)));
        }
        let rest = self.rest();
        let digits = rest.iter().position(|byte| !byte.is_ascii_digit())?;
        let is_plain = match rest[0] {
            b'0' => digits == 1,
            _ => (1..=MAX_DIGITS).contains(&digits),
        };
        // A fraction or an exponent might follow.
        if !is_plain || !(matches!(rest[digits], b',' | b'}' | b' ')) {
            return None;
        }
        let number = rest[..digits]
            .iter()
            .fold(0, |number: u64, digit| 10 * number + u64::from(digit - b'0'));
        self.at += digits;
        Some(Value::Integer(number.into()))
    }
}

fn has_controls(chunk: &[u8]) -> bool {
    chunk.iter().fold(u8::MAX, |least, byte| least.min(*byte)) < b' '
}

/// Where the next quotation mark is, if no escape is before it. Most strings are short: for them, a
/// look at a few words beats the call that wins on long ones.
fn find_quote(bytes: &[u8]) -> Option<usize> {
    let words = bytes.as_chunks().0.iter().take(FEW);
    let mut at = 0;
    for word in words {
        let word = u64::from_le_bytes(*word);
        let found = marks(word, b'"') | marks(word, b'\\');
        if found != 0 {
            at += found.trailing_zeros() as usize / 8;
            return (bytes[at] == b'"').then_some(at);
        }
        at += size_of::<u64>();
    }
    let at = at + memchr::memchr2(b'"', b'\\', &bytes[at..])?;
    (bytes[at] == b'"').then_some(at)
}

/// The highest bit of each byte that is the wanted one, and maybe of some behind such a byte: the
/// subtraction borrows from them.
fn marks(word: u64, wanted: u8) -> u64 {
    const ONES: u64 = u64::from_ne_bytes([1; 8]);
    const HIGHEST_BITS: u64 = ONES << 7;
    let zero_there = word ^ (ONES * u64::from(wanted));
    zero_there.wrapping_sub(ONES) & !zero_there & HIGHEST_BITS
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Whether the object is read here, which it must be just as serde_json reads it.
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
            r#"{"lease":999999999999999999,"token":"0"}"#,
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
            r#"{"type":-1}"#,
            r#"{"type":1.0}"#,
            r#"{"type":1e2}"#,
            r#"{"type":}"#,
            r#"{"type":0,}"#,
            r#"{"type":0 "id":1}"#,
            r#"{"type":null}"#,
            r#"{"type":0,"type":0}"#,
            r#"{"id":1000000000000000000}"#,
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

        /// Out of what objects are made of, in any order, so that many are nearly plain.
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
