//! Reading the fields of a packet, liberally.
//!
//! Fields may come in any order, `type` last, so they are first taken as they are and only then
//! read as the packet type wants them. What a type does not use may hold anything.

mod plain;

use std::borrow::Cow;
use std::fmt;

use serde::de::{Deserialize, Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::id::Id;
use super::packet::{Ack, Data, Packet, Refusal, Setup};

/// Fields that no packet type knows, per packet. They are allowed, and remembered only to tell
/// that one was given twice; the limit keeps that memory small.
const MAX_UNKNOWN_FIELDS: usize = 1000;

/// Characters of a reason; those of serde_json that name a field are far shorter.
const MAX_REASON: usize = 200;

/// Why a text is no packet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParseError {
    /// What is wrong, naming the field where there is one.
    pub reason: String,
    /// Line and column, from 1, where the text stops being JSON; `None` if it is JSON, but no
    /// packet. Where text is not JSON, its end cannot be trusted either.
    pub not_json_at: Option<(usize, usize)>,
    /// The id that the packet came with, as far as it could be read.
    pub id: Option<Id<'static>>,
}

impl fmt::Display for ParseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.reason)
    }
}

impl std::error::Error for ParseError {}

impl ParseError {
    fn field(reason: String) -> Self {
        ParseError { reason, not_json_at: None, id: None }
    }
}

impl ParseError {
    /// The error that stopped serde_json, and whether the text is JSON all the same: a payload with
    /// half a surrogate pair is well-formed, and so may be what follows a field given twice.
    fn from_json(error: &serde_json::Error, text: &str) -> Self {
        let full = error.to_string();
        let position = format!(" at line {} column {}", error.line(), error.column());
        let reason = full.strip_suffix(&position).unwrap_or(&full);
        match serde_json::from_str::<IgnoredAny>(text) {
            // Without this a person reads of an "unexpected end of hex escape".
            Ok(_) if reason.ends_with("hex escape") => ParseError::field(
                "a string is not valid Unicode: it has half of a surrogate pair".to_owned(),
            ),
            // Of what is no object it quotes all.
            Ok(_) => ParseError::field(reason.chars().take(MAX_REASON).collect()),
            Err(error) => ParseError {
                reason: format!("not JSON: {error}"),
                not_json_at: Some((error.line(), error.column())),
                id: None,
            },
        }
    }
}

/// The fields of a JSON object that might be a packet, taken as they are.
#[derive(Debug, Default)]
struct Fields<'a> {
    r#type: Option<Value<'a>>,
    srcid: Option<Value<'a>>,
    destid: Option<Value<'a>>,
    id: Option<Value<'a>>,
    policy_in_data: Option<Value<'a>>,
    policy_in_setup: Option<Value<'a>>,
    payload_size: Option<Value<'a>>,
    payload: Option<Value<'a>>,
    listen_port: Option<Value<'a>>,
    lease: Option<Value<'a>>,
    token: Option<Value<'a>>,
    code: Option<Value<'a>>,
}

/// A field's value, as far as any packet looks at it.
#[derive(Debug, Clone)]
enum Value<'a> {
    Integer(i128),
    Text(Cow<'a, str>),
    /// Anything else, by what a person calls it.
    Other(&'static str),
}

impl Value<'_> {
    fn kind(&self) -> &'static str {
        match self {
            Value::Integer(_) => "an integer",
            Value::Text(_) => "a string",
            Value::Other(kind) => kind,
        }
    }
}

impl<'a> Packet<'a> {
    /// Reads one packet from the text of one JSON object, borrowing from it.
    ///
    /// # Errors
    ///
    /// [`ParseError`] says which field is wrong and in what way, and whether the text was JSON at
    /// all.
    pub fn parse(text: &'a [u8]) -> Result<Self, ParseError> {
        parse(text)
    }
}

/// Reads one packet from the text of one JSON object, borrowing from it.
///
/// # Errors
///
/// Where the text is not JSON in UTF-8 or not an object, a field is given twice, missing or of the
/// wrong kind, or the type is none of the protocol's.
fn parse(text: &[u8]) -> Result<Packet<'_>, ParseError> {
    // serde_json checks the strings that it hands out, but not those it skips.
    let text = simdutf8::compat::from_utf8(text).map_err(|error| {
        let before = &text[..error.valid_up_to()];
        let line = 1 + memchr::memchr_iter(b'\n', before).count();
        let column = 1 + before.len() - memchr::memrchr(b'\n', before).map_or(0, |at| at + 1);
        ParseError {
            reason: format!("not UTF-8 at line {line} column {column}"),
            not_json_at: Some((line, column)),
            id: None,
        }
    })?;
    let mut fields = Fields::default();
    if plain::read(text, &mut fields).is_none() {
        fields = serde_json::from_str(text).map_err(|error| ParseError::from_json(&error, text))?;
    }
    // The id that the packet came with, whatever its type.
    let sender = fields.srcid.as_ref().or(fields.id.as_ref()).cloned();
    fields.read().map_err(|error| {
        let sender = id("srcid", sender).ok();
        ParseError { id: sender.map(Id::into_owned), ..error }
    })
}

impl<'a> Fields<'a> {
    /// Where a field of this name belongs; `None` where no packet has it.
    fn place(&mut self, name: &str) -> Option<&mut Option<Value<'a>>> {
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
            "token" => &mut self.token,
            "code" => &mut self.code,
            _ => return None,
        })
    }

    /// Takes the fields as those of the packet that `type` says they are.
    fn read(&mut self) -> Result<Packet<'a>, ParseError> {
        match unsigned("type", self.r#type.take())? {
            Some(0) => Ok(Packet::Data(Data {
                srcid: id("srcid", self.srcid.take())?,
                policy: policy(
                    "privPoliId",
                    self.policy_in_data.take(),
                    self.policy_in_setup.take(),
                )?,
                payload: text("payload", self.payload.take())?,
                payload_size: unsigned("payloadsize", self.payload_size.take())?,
            })),
            Some(1) => Ok(Packet::Setup(Setup {
                id: id("id", self.id.take())?,
                policy: policy(
                    "privPolyId",
                    self.policy_in_setup.take(),
                    self.policy_in_data.take(),
                )?,
                listen_port: port("listenport", self.listen_port.take())?,
                lease: unsigned("lease", self.lease.take())?,
                token: self.token.take().map(|token| text("token", Some(token))).transpose()?,
            })),
            Some(2) => Ok(Packet::Ack(Ack {
                srcid: id("srcid", self.srcid.take())?,
                destid: id("destid", self.destid.take())?,
                payload: text("payload", self.payload.take())?,
                lease: unsigned("lease", self.lease.take())?,
            })),
            Some(3) => Ok(Packet::Refusal(Refusal {
                destid: id("destid", self.destid.take())?,
                reason: text("payload", self.payload.take())?,
                code: text("code", self.code.take())?,
            })),
            Some(other) => Err(ParseError::field(format!(
                "no packet has type {other}: 0 is data, 1 setup, 2 ack, 3 refusal"
            ))),
            None => Err(missing("type")),
        }
    }
}

fn missing(field: &str) -> ParseError {
    ParseError::field(format!("field \"{field}\" is missing"))
}

fn wrong_kind(field: &str, wanted: &str, value: &Value<'_>) -> ParseError {
    ParseError::field(format!("field \"{field}\" must be {wanted}, but is {}", value.kind()))
}

fn id<'a>(field: &str, value: Option<Value<'a>>) -> Result<Id<'a>, ParseError> {
    match value.ok_or_else(|| missing(field))? {
        Value::Integer(number) => Ok(Id::Integer(number)),
        Value::Text(text) => Ok(Id::Text(text)),
        other => Err(wrong_kind(field, "an integer or a string", &other)),
    }
}

/// The policy under the spelling of this packet's type, or under the other one's.
fn policy<'a>(
    field: &str,
    usual: Option<Value<'a>>,
    other: Option<Value<'a>>,
) -> Result<Id<'a>, ParseError> {
    match (usual, other) {
        (Some(usual), Some(other)) => {
            let (usual, other) = (id(field, Some(usual))?, id(field, Some(other))?);
            if usual == other {
                Ok(usual)
            } else {
                Err(ParseError::field("fields \"privPoliId\" and \"privPolyId\" differ".to_owned()))
            }
        }
        (usual, other) => id(field, usual.or(other)),
    }
}

fn text<'a>(field: &str, value: Option<Value<'a>>) -> Result<Cow<'a, str>, ParseError> {
    match value.ok_or_else(|| missing(field))? {
        Value::Text(text) => Ok(text),
        other => Err(wrong_kind(field, "a string", &other)),
    }
}

/// An integer that is not negative, or the same as a decimal string; `None` where there is none.
fn unsigned(field: &str, value: Option<Value<'_>>) -> Result<Option<u64>, ParseError> {
    let Some(value) = value else { return Ok(None) };
    let number = match &value {
        Value::Integer(number) => u64::try_from(*number).ok(),
        // `parse` would take a leading plus sign.
        Value::Text(text) if text.bytes().all(|byte| byte.is_ascii_digit()) => text.parse().ok(),
        _ => None,
    };
    match number {
        Some(number) => Ok(Some(number)),
        None => Err(wrong_kind(field, "a whole number, 0 or more", &value)),
    }
}

fn port(field: &str, value: Option<Value<'_>>) -> Result<u16, ParseError> {
    let number = unsigned(field, value)?.ok_or_else(|| missing(field))?;
    match u16::try_from(number) {
        Ok(port) if port != 0 => Ok(port),
        _ => Err(ParseError::field(format!(
            "field \"{field}\" must be a port from 1 to 65535, but is {number}"
        ))),
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
        let mut unknown: Vec<Cow<'de, str>> = Vec::new();
        while let Some(Key(key)) = map.next_key()? {
            let Some(place) = fields.place(&key) else {
                map.next_value::<IgnoredAny>()?;
                if unknown.len() == MAX_UNKNOWN_FIELDS {
                    return Err(A::Error::custom(format_args!(
                        "more than {MAX_UNKNOWN_FIELDS} fields that no packet has"
                    )));
                }
                unknown.push(key);
                continue;
            };
            if place.is_some() {
                return Err(A::Error::custom(given_twice(&key)));
            }
            *place = Some(map.next_value()?);
        }
        unknown.sort_unstable();
        match unknown.windows(2).find(|pair| pair[0] == pair[1]) {
            Some(pair) => Err(A::Error::custom(given_twice(&pair[0]))),
            None => Ok(fields),
        }
    }
}

/// Two parsers could each take another one of the two, and then disagree on what the packet says.
fn given_twice(key: &str) -> String {
    format!("field \"{}\" is given twice", key.chars().take(64).collect::<String>())
}

/// A key, borrowed from the text where it has no escapes (`Cow` alone would always copy).
struct Key<'a>(Cow<'a, str>);

impl<'de> Deserialize<'de> for Key<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct KeyVisitor;
        impl<'de> Visitor<'de> for KeyVisitor {
            type Value = Key<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a field name")
            }
            fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Key<'de>, E> {
                Ok(Key(Cow::Borrowed(text)))
            }
            fn visit_str<E>(self, text: &str) -> Result<Key<'de>, E> {
                Ok(Key(Cow::Owned(text.to_owned())))
            }
        }
        deserializer.deserialize_str(KeyVisitor)
    }
}

impl<'de> Deserialize<'de> for Value<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ValueVisitor)
    }
}

struct ValueVisitor;

impl<'de> Visitor<'de> for ValueVisitor {
    type Value = Value<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any JSON value")
    }
    fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Value<'de>, E> {
        Ok(Value::Text(Cow::Borrowed(text)))
    }
    fn visit_str<E>(self, text: &str) -> Result<Value<'de>, E> {
        Ok(Value::Text(Cow::Owned(text.to_owned())))
    }
    fn visit_u64<E>(self, number: u64) -> Result<Value<'de>, E> {
        Ok(Value::Integer(number.into()))
    }
    fn visit_i64<E>(self, number: i64) -> Result<Value<'de>, E> {
        Ok(Value::Integer(number.into()))
    }
    fn visit_f64<E>(self, _: f64) -> Result<Value<'de>, E> {
        Ok(Value::Other("a number with a fraction, an exponent or more than 64 bits"))
    }
    fn visit_bool<E>(self, value: bool) -> Result<Value<'de>, E> {
        Ok(Value::Other(if value { "true" } else { "false" }))
    }
    fn visit_unit<E>(self) -> Result<Value<'de>, E> {
        Ok(Value::Other("null"))
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value<'de>, A::Error> {
        while seq.next_element::<IgnoredAny>()?.is_some() {}
        Ok(Value::Other("an array"))
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value<'de>, A::Error> {
        while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok(Value::Other("an object"))
    }
}
