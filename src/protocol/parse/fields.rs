//! The fields of a JSON object, as serde_json reads them.

use std::borrow::Cow;
use std::collections::HashSet;
use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, Error as _, IgnoredAny, MapAccess, Visitor};
use serde_json::value::RawValue;

use crate::protocol::id::is_json_integer;

/// The most unknown fields in a packet. They are allowed; their names are kept only to find
/// duplicates, and the limit bounds that memory.
const MAX_UNKNOWN_FIELDS: usize = 1000;

/// The fields of a JSON object, before their types are checked.
#[derive(Debug, Default)]
pub(super) struct Fields<'a> {
    pub(super) r#type: Option<Value<'a>>,
    pub(super) srcid: Option<Value<'a>>,
    pub(super) destid: Option<Value<'a>>,
    pub(super) id: Option<Value<'a>>,
    pub(super) policy_in_data: Option<Value<'a>>,
    pub(super) policy_in_setup: Option<Value<'a>>,
    pub(super) payload_size: Option<Value<'a>>,
    pub(super) payload: Option<Value<'a>>,
    pub(super) listen_port: Option<Value<'a>>,
    pub(super) lease: Option<Value<'a>>,
    pub(super) capacity: Option<Value<'a>>,
    pub(super) token: Option<Value<'a>>,
    pub(super) timeout: Option<Value<'a>>,
    pub(super) once: Option<Value<'a>>,
    pub(super) msgid: Option<Value<'a>>,
    pub(super) result: Option<Value<'a>>,
    pub(super) encoding: Option<Value<'a>>,
    pub(super) code: Option<Value<'a>>,
}

impl<'a> Fields<'a> {
    /// Returns the place of the field of this name; `None` if no packet has one.
    pub(super) fn place(&mut self, name: &str) -> Option<&mut Option<Value<'a>>> {
        Some(match name {
            "type" => &mut self.r#type,
            "srcid" => &mut self.srcid,
            "destid" => &mut self.destid,
            "id" => &mut self.id,
            "privPoliId" => &mut self.policy_in_data,
            "privPolyId" => &mut self.policy_in_setup,
            "payloadsize" => &mut self.payload_size,
            "payload" => &mut self.payload,
            "listenport" => &mut self.listen_port,
            "lease" => &mut self.lease,
            "capacity" => &mut self.capacity,
            "token" => &mut self.token,
            "timeout" => &mut self.timeout,
            "once" => &mut self.once,
            "msgid" => &mut self.msgid,
            "result" => &mut self.result,
            "encoding" => &mut self.encoding,
            "code" => &mut self.code,
            _ => return None,
        })
    }
}

/// A field's value, as far as any packet needs it.
#[derive(Debug, Clone)]
pub(super) enum Value<'a> {
    /// An integer as it is written.
    Integer(&'a str),
    Boolean(bool),
    Text(Cow<'a, str>),
    /// Anything else, described for an error message.
    Other(&'static str),
}

impl<'a> Value<'a> {
    /// Returns the value that this JSON text stands for.
    fn from_json(json: &'a str) -> Self {
        match json.as_bytes().first() {
            Some(b'"') => serde_json::from_str(json).map_or(
                Value::Other("no valid Unicode: it has half of a surrogate pair"),
                |Text(text)| Value::Text(text),
            ),
            Some(b'-' | b'0'..=b'9') if is_json_integer(json) => Value::Integer(json),
            Some(b'-' | b'0'..=b'9') => Value::Other("a number with a fraction or an exponent"),
            Some(b't') => Value::Boolean(true),
            Some(b'f') => Value::Boolean(false),
            Some(b'[') => Value::Other("an array"),
            Some(b'{') => Value::Other("an object"),
            _ => Value::Other("null"),
        }
    }

    pub(super) fn kind(&self) -> &'static str {
        match self {
            Value::Integer(_) => "an integer",
            Value::Boolean(true) => "true",
            Value::Boolean(false) => "false",
            Value::Text(_) => "a string",
            Value::Other(kind) => kind,
        }
    }
}

impl<'de> Deserialize<'de> for Fields<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(FieldsVisitor)
    }
}

struct FieldsVisitor;

impl<'de> Visitor<'de> for FieldsVisitor {
    type Value = Fields<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a packet, which is a JSON object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Fields<'de>, A::Error> {
        let mut fields = Fields::default();
        let mut unknown: HashSet<Cow<'de, str>> = HashSet::new();
        while let Some(Text(key)) = map.next_key()? {
            let Some(place) = fields.place(&key) else {
                map.next_value::<IgnoredAny>()?;
                if unknown.len() == MAX_UNKNOWN_FIELDS {
                    return Err(A::Error::custom(format_args!(
                        "more than {MAX_UNKNOWN_FIELDS} fields that no packet has"
                    )));
                }
                if let Some(key) = unknown.replace(key) {
                    return Err(A::Error::custom(given_twice(&key)));
                }
                continue;
            };
            if place.is_some() {
                return Err(A::Error::custom(given_twice(&key)));
            }
            *place = Some(map.next_value()?);
        }
        Ok(fields)
    }
}

/// Duplicates are refused: of two parsers, one might use the first value and one the last.
fn given_twice(key: &str) -> String {
    format!("field \"{}\" is given twice", key.chars().take(64).collect::<String>())
}

/// A JSON string, borrowed from the text if it has no escapes.
#[derive(Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

impl<'de> Deserialize<'de> for Value<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        // serde_json's numbers hold neither integers above 64 bits nor `1e999`.
        <&RawValue>::deserialize(deserializer).map(|raw| Value::from_json(raw.get()))
    }
}
