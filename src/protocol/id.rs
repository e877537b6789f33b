//! Ids of clients, servers and policies: an integer or a string on the wire.

use std::borrow::Cow;
use std::fmt;

use serde::ser::{Serialize, Serializer};

/// The id of a client, a server or a privacy policy.
///
/// The homework writes ids as integers, the tutorial as strings. An id keeps the form it came in,
/// so that it can be sent back unchanged, and is compared by its text: `111` and `"111"` are one.
#[derive(Debug, Clone)]
pub enum Id<'a> {
    /// Written as a JSON integer.
    Integer(i128),
    /// Written as a JSON string.
    Text(Cow<'a, str>),
}

impl<'a> Id<'a> {
    /// The id of the proxy itself, and of a sender that is not known.
    pub const ZERO: Id<'static> = Id::Integer(0);

    /// An id as a person writes it: an integer where it is written as one (`100`, but not `0100`).
    pub fn from_text(text: &'a str) -> Self {
        match text.parse::<i64>() {
            Ok(number) if number.to_string() == text => Id::Integer(number.into()),
            _ => Id::Text(Cow::Borrowed(text)),
        }
    }

    /// The text by which ids are compared.
    pub fn text(&self) -> Cow<'_, str> {
        match self {
            Id::Integer(number) => Cow::Owned(number.to_string()),
            Id::Text(text) => Cow::Borrowed(text),
        }
    }

    /// The same id, holding on to nothing.
    pub fn into_owned(self) -> Id<'static> {
        match self {
            Id::Integer(number) => Id::Integer(number),
            Id::Text(text) => Id::Text(Cow::Owned(text.into_owned())),
        }
    }

    /// The same id as a string, as the tutorial's programs write it.
    pub fn as_string(&self) -> Id<'static> {
        Id::Text(Cow::Owned(self.text().into_owned()))
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
            Id::Text(text) => f.write_str(text),
        }
    }
}

impl Serialize for Id<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            // Every integer that a packet or a command line can bring fits one of the two.
            Id::Integer(number) => match (i64::try_from(*number), u64::try_from(*number)) {
                (Ok(small), _) => serializer.serialize_i64(small),
                (_, Ok(large)) => serializer.serialize_u64(large),
                _ => serializer.serialize_i128(*number),
            },
            Id::Text(text) => serializer.serialize_str(text),
        }
    }
}
