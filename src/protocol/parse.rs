//! Parses packets, liberally.
//!
//! `type` may be the last field, so all fields are collected first and then converted as their
//! packet type requires. A field that the type does not have may hold any value.

mod fields;
mod plain;

use std::borrow::Cow;
use std::fmt;

use serde::de::IgnoredAny;

use fields::{Fields, Value};

use super::diagnose::{json_hint, json_reason, place};
use super::id::{Id, MAX_ID};
use super::packet::{Ack, Data, Packet, Refusal, Setup};

/// The most characters of serde_json's text in a reason; one that names a field is far shorter.
const MAX_REASON: usize = 200;

/// Why a text is not a packet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParseError {
    /// What is wrong, with the field's name if one is wrong.
    pub reason: String,
    /// Whether the text is JSON. If it is not, the end that the framer found cannot be trusted either.
    pub is_json: bool,
    /// The sender's id, if it could be read.
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
        ParseError { reason, is_json: true, id: None }
    }

    fn not_json(reason: String) -> Self {
        ParseError { reason, is_json: false, id: None }
    }

    /// Converts serde_json's error. The text may be JSON all the same: after a duplicate field, or
    /// with half of a surrogate pair in a field's name.
    fn from_json(error: &serde_json::Error, text: &str) -> Self {
        let reason = json_reason(error);
        match serde_json::from_str::<IgnoredAny>(text) {
            // Clearer than serde_json's "unexpected end of hex escape".
            Ok(_) if reason.ends_with("hex escape") => ParseError::field(
                "a field's name is not valid Unicode: it has half of a surrogate pair".to_owned(),
            ),
            // It quotes a value that is not an object in full.
            Ok(_) => ParseError::field(reason.chars().take(MAX_REASON).collect()),
            Err(error) => ParseError::not_json(match json_hint(&error, text) {
                Some(hint) => format!("not JSON: {error}; {hint}"),
                None => format!("not JSON: {error}"),
            }),
        }
    }
}

impl<'a> Packet<'a> {
    /// Parses one JSON object as a packet that borrows from it.
    ///
    /// # Errors
    ///
    /// If the text is not JSON in UTF-8 or not an object, a field is duplicate, missing or of the
    /// wrong kind, or the type is unknown.
    pub fn parse(text: &'a [u8]) -> Result<Self, ParseError> {
        // serde_json checks the UTF-8 of strings that it returns, but not of those it skips.
        let text = simdutf8::compat::from_utf8(text)
            .map_err(|error| not_utf8(&text[..error.valid_up_to()]))?;
        let mut fields = Fields::default();
        if plain::read(text, &mut fields).is_none() {
            read_any(text, &mut fields)?;
        }
        // Whatever the type: a refusal needs the sender's id.
        let sender = fields.srcid.as_ref().or(fields.id.as_ref()).cloned();
        fields.convert().map_err(|error| with_sender(error, sender))
    }
}

#[cold]
fn with_sender(error: ParseError, sender: Option<Value<'_>>) -> ParseError {
    let sender = id("srcid", sender).ok();
    ParseError { id: sender.map(Id::into_owned), ..error }
}

/// Says where the UTF-8 ends, after these bytes.
#[cold]
fn not_utf8(before: &[u8]) -> ParseError {
    let (line, column) = place(before);
    ParseError::not_json(format!("not UTF-8 at line {line} column {column}"))
}

/// Reads any JSON object. Not inlined: a thread keeps what it once used of its stack, and this needs
/// far more of it than a plain packet.
#[inline(never)]
fn read_any<'a>(text: &'a str, fields: &mut Fields<'a>) -> Result<(), ParseError> {
    *fields = serde_json::from_str(text).map_err(|error| ParseError::from_json(&error, text))?;
    Ok(())
}

impl<'a> Fields<'a> {
    /// Converts the fields into a packet of the type that they name.
    #[inline(never)] // As `read_any`.
    fn convert(&mut self) -> Result<Packet<'a>, ParseError> {
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
                timeout: positive("timeout", self.timeout.take())?,
                once: boolean("once", self.once.take())?,
                msgid: optional_text("msgid", self.msgid.take())?
                    .map(|msgid| limited("msgid", msgid))
                    .transpose()?,
            })),
            Some(1) => self.setup().map(Packet::Setup),
            Some(2) => self.ack().map(Packet::Ack),
            Some(3) => self.refusal().map(Packet::Refusal),
            Some(other) => Err(unknown_type(other)),
            None => Err(missing("type")),
        }
    }

    #[inline(never)] // As `read_any`.
    fn setup(&mut self) -> Result<Setup<'a>, ParseError> {
        Ok(Setup {
            id: id("id", self.id.take())?,
            policy: policy("privPolyId", self.policy_in_setup.take(), self.policy_in_data.take())?,
            listen_port: port("listenport", self.listen_port.take())?,
            lease: unsigned("lease", self.lease.take())?,
            capacity: positive("capacity", self.capacity.take())?,
            token: optional_text("token", self.token.take())?,
        })
    }

    #[inline(never)] // As `read_any`.
    fn ack(&mut self) -> Result<Ack<'a>, ParseError> {
        unsigned("payloadsize", self.payload_size.take())?;
        Ok(Ack {
            srcid: id("srcid", self.srcid.take())?,
            destid: id("destid", self.destid.take())?,
            payload: text("payload", self.payload.take())?,
            lease: unsigned("lease", self.lease.take())?,
            result: optional_text("result", self.result.take())?,
            encoding: optional_text("encoding", self.encoding.take())?,
        })
    }

    #[inline(never)] // As `read_any`.
    fn refusal(&mut self) -> Result<Refusal<'a>, ParseError> {
        unsigned("payloadsize", self.payload_size.take())?;
        Ok(Refusal {
            destid: id("destid", self.destid.take())?,
            reason: text("payload", self.payload.take())?,
            code: text("code", self.code.take())?,
        })
    }
}

#[cold]
fn unknown_type(other: u64) -> ParseError {
    ParseError::field(format!("no packet has type {other}: 0 is data, 1 setup, 2 ack, 3 refusal"))
}

#[cold]
fn missing(field: &str) -> ParseError {
    ParseError::field(format!("field \"{field}\" is missing"))
}

#[cold]
fn wrong_kind(field: &str, wanted: &str, value: &Value<'_>) -> ParseError {
    ParseError::field(format!("field \"{field}\" must be {wanted}, but is {}", value.kind()))
}

/// Returns the text, unless it is longer than [`MAX_ID`].
fn limited<'a>(field: &str, text: Cow<'a, str>) -> Result<Cow<'a, str>, ParseError> {
    if text.len() > MAX_ID {
        return Err(ParseError::field(format!(
            "field \"{field}\" may have {MAX_ID} bytes, but has {}",
            text.len()
        )));
    }
    Ok(text)
}

fn id<'a>(field: &str, value: Option<Value<'a>>) -> Result<Id<'a>, ParseError> {
    match value.ok_or_else(|| missing(field))? {
        Value::Integer(number) => {
            limited(field, Cow::Borrowed(number))?;
            Ok(Id::from_json_integer(number))
        }
        Value::Text(text) => limited(field, text).map(Id::Text),
        other => Err(wrong_kind(field, "an integer or a string", &other)),
    }
}

/// Returns the policy, under the usual spelling for this packet's type or under the other one.
fn policy<'a>(
    field: &str,
    usual: Option<Value<'a>>,
    other: Option<Value<'a>>,
) -> Result<Id<'a>, ParseError> {
    match (usual, other) {
        (Some(usual), Some(other)) => one_policy(field, usual, other),
        (usual, other) => id(field, usual.or(other)),
    }
}

#[inline(never)] // As `read_any`.
fn one_policy<'a>(field: &str, usual: Value<'a>, other: Value<'a>) -> Result<Id<'a>, ParseError> {
    let (usual, other) = (id(field, Some(usual))?, id(field, Some(other))?);
    if usual == other {
        Ok(usual)
    } else {
        Err(ParseError::field("fields \"privPoliId\" and \"privPolyId\" differ".to_owned()))
    }
}

fn text<'a>(field: &str, value: Option<Value<'a>>) -> Result<Cow<'a, str>, ParseError> {
    match value.ok_or_else(|| missing(field))? {
        Value::Text(text) => Ok(text),
        other => Err(wrong_kind(field, "a string", &other)),
    }
}

fn optional_text<'a>(
    field: &str,
    value: Option<Value<'a>>,
) -> Result<Option<Cow<'a, str>>, ParseError> {
    value.map(|value| text(field, Some(value))).transpose()
}

/// Returns a non-negative integer, or one in a decimal string. A number above 64 bits becomes
/// `u64::MAX`, which is above every limit too.
fn unsigned(field: &str, value: Option<Value<'_>>) -> Result<Option<u64>, ParseError> {
    // `parse` alone would accept a leading plus sign.
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    match value {
        None => Ok(None),
        Some(Value::Integer("-0")) => Ok(Some(0)),
        Some(Value::Integer(text)) if is_number(text) => Ok(Some(text.parse().unwrap_or(u64::MAX))),
        Some(Value::Text(text)) if is_number(&text) => Ok(Some(text.parse().unwrap_or(u64::MAX))),
        Some(Value::Integer(number)) => Err(must_not_be_negative(field, number)),
        Some(other) => Err(wrong_kind(field, "a whole number, 0 or more", &other)),
    }
}

#[cold]
fn must_not_be_negative(field: &str, number: &str) -> ParseError {
    let shown = number.get(..24).map_or_else(|| number.to_owned(), |start| format!("{start}…"));
    ParseError::field(format!(
        "field \"{field}\" must be a whole number, 0 or more, but is {shown}"
    ))
}

/// Like [`unsigned`], but refuses 0.
fn positive(field: &str, value: Option<Value<'_>>) -> Result<Option<u64>, ParseError> {
    match unsigned(field, value)? {
        Some(0) => Err(ParseError::field(format!("field \"{field}\" must be 1 or more, but is 0"))),
        number => Ok(number),
    }
}

/// Returns a boolean, or one in a string; `false` if the field is missing.
fn boolean(field: &str, value: Option<Value<'_>>) -> Result<bool, ParseError> {
    match value {
        None => Ok(false),
        Some(Value::Boolean(value)) => Ok(value),
        Some(Value::Text(text)) if text == "true" => Ok(true),
        Some(Value::Text(text)) if text == "false" => Ok(false),
        Some(other) => Err(wrong_kind(field, "true or false", &other)),
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
