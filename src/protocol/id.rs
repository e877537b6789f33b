//! Ids of clients, servers and policies: an integer or a string on the wire.

use std::borrow::Cow;
use std::fmt;

use serde::ser::{Error as _, Serialize, Serializer};
use serde_json::value::RawValue;

/// The most bytes that an id, a policy or a `msgid` may have.
pub const MAX_ID: usize = 256;

/// The id of a client, a server or a privacy policy.
///
/// The homework writes ids as integers, the tutorial as strings. An id keeps its form, so that it
/// can be sent back unchanged. Ids are compared by their text: `111` equals `"111"`.
#[derive(Debug, Clone)]
pub enum Id<'a> {
    /// A JSON integer. `-0` is read as 0.
    Integer(i128),
    /// A JSON integer that does not fit 128 bits, as it is written; anything else cannot be written again.
    LongInteger(Cow<'a, str>),
    /// A JSON string.
    Text(Cow<'a, str>),
}

impl<'a> Id<'a> {
    /// The id of the proxy, and of an unknown sender.
    pub const ZERO: Id<'static> = Id::Integer(0);

    /// Returns the id that a person wrote: an integer if it is written as one (`100`, not `0100`).
    pub fn from_text(text: &'a str) -> Self {
        if is_json_integer(text) && text != "-0" {
            Id::from_json_integer(text)
        } else {
            Id::Text(Cow::Borrowed(text))
        }
    }

    /// Returns the id that a JSON integer stands for.
    pub(super) fn from_json_integer(text: &'a str) -> Self {
        text.parse().map_or_else(|_| Id::LongInteger(Cow::Borrowed(text)), Id::Integer)
    }

    /// Returns the text by which ids are compared; of an integer, its decimal digits, with the `-` of a negative
    /// one.
    pub fn text(&self) -> Cow<'_, str> {
        match self {
            Id::Integer(number) => Cow::Owned(number.to_string()),
            Id::LongInteger(text) | Id::Text(text) => Cow::Borrowed(text),
        }
    }

    /// Returns the same id, which borrows nothing.
    pub fn into_owned(self) -> Id<'static> {
        let own = |text: Cow<'_, str>| Cow::Owned(text.into_owned());
        match self {
            Id::Integer(number) => Id::Integer(number),
            Id::LongInteger(text) => Id::LongInteger(own(text)),
            Id::Text(text) => Id::Text(own(text)),
        }
    }
}

/// Whether this is an integer as JSON has it.
pub(super) fn is_json_integer(text: &str) -> bool {
    match text.strip_prefix('-').unwrap_or(text).as_bytes() {
        [b'0'] => true,
        [b'1'..=b'9', rest @ ..] => rest.iter().all(u8::is_ascii_digit),
        _ => false,
    }
}

impl PartialEq for Id<'_> {
    fn eq(&self, other: &Id<'_>) -> bool {
        match (self, other) {
            (Id::Integer(a), Id::Integer(b)) => a == b,
            _ => self.text() == other.text(),
        }
    }
}

impl Eq for Id<'_> {}

impl fmt::Display for Id<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Id::Integer(number) => write!(f, "{number}"),
            Id::LongInteger(text) | Id::Text(text) => f.write_str(text),
        }
    }
}

impl Serialize for Id<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            // 64-bit integers are written faster, and nearly all ids fit.
            Id::Integer(number) => match (i64::try_from(*number), u64::try_from(*number)) {
                (Ok(small), _) => serializer.serialize_i64(small),
                (_, Ok(large)) => serializer.serialize_u64(large),
                _ => serializer.serialize_i128(*number),
            },
            Id::LongInteger(text) => RawValue::from_string(text.to_string())
                .map_err(S::Error::custom)?
                .serialize(serializer),
            Id::Text(text) => serializer.serialize_str(text),
        }
    }
}
