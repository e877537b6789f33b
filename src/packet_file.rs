//! Packet files: what a client sends, as people write it.
//!
//! A file holds one or more JSON objects. The client sets `srcid`, fills in or corrects
//! `payloadsize`, and leaves every other field as the file has it, so that a file decides the
//! dialect in which it is sent. The result is one compact line.

use std::borrow::Cow;
use std::fmt;

use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

use crate::packet::{Id, Packet, hash};

/// A message that is ready to be sent.
#[derive(Debug, Clone)]
pub struct Outgoing {
    /// The data packet, as one line.
    pub line: Vec<u8>,
    /// The policy that it names, as text.
    pub policy: String,
    /// Its payload.
    pub payload: String,
    /// The hash that its ack must carry.
    pub hash: String,
}

/// Why a file is no packet file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileError {
    /// The line, from 1.
    pub line: usize,
    /// The column in bytes, from 1.
    pub column: usize,
    /// What is wrong there, and what was expected.
    pub reason: String,
}

impl fmt::Display for FileError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}, column {}: {}", self.line, self.column, self.reason)
    }
}

impl std::error::Error for FileError {}

/// Reads the packets of a file's content, to be sent by the client `id`.
///
/// # Errors
///
/// Where the content is not JSON in UTF-8, holds no packet, or an object in it is no data packet.
pub fn read(content: &[u8], id: &Id<'_>) -> Result<Vec<Outgoing>, FileError> {
    let text = std::str::from_utf8(content).map_err(|error| {
        let (line, column) = place(&content[..error.valid_up_to()]);
        FileError { line, column, reason: "not UTF-8, which JSON is written in".to_owned() }
    })?;
    // Some editors put a byte-order mark in front.
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut outgoing = Vec::new();
    let mut objects = serde_json::Deserializer::from_str(text).into_iter::<Object<'_>>();
    loop {
        let end = objects.byte_offset();
        let begin = end + text[end..].len() - text[end..].trim_start().len();
        let Some(object) = objects.next() else { break };
        let object = object.map_err(|error| json_error(&error, text))?;
        outgoing.push(prepare(object, id).map_err(|reason| {
            let (line, column) = place(&text.as_bytes()[..begin]);
            FileError { line, column, reason }
        })?);
    }
    if outgoing.is_empty() {
        let reason = "there is no packet; write one such as {\"type\": 0, \"srcid\": 50, \
                      \"privPoliId\": \"PP_1\", \"payload\": \"hello\"}";
        return Err(FileError { line: 1, column: 1, reason: reason.to_owned() });
    }
    Ok(outgoing)
}

/// Line and column of what follows `before`.
fn place(before: &[u8]) -> (usize, usize) {
    let line = 1 + memchr::memchr_iter(b'\n', before).count();
    (line, 1 + before.len() - memchr::memrchr(b'\n', before).map_or(0, |at| at + 1))
}

fn json_error(error: &serde_json::Error, text: &str) -> FileError {
    let (line, column) = (error.line(), error.column());
    let full = error.to_string();
    let mut reason =
        full.strip_suffix(&format!(" at line {line} column {column}")).unwrap_or(&full).to_owned();
    let rest = text
        .lines()
        .nth(line.saturating_sub(1))
        .and_then(|line| line.get(column.saturating_sub(1)..));
    if rest.is_some_and(|rest| rest.starts_with('/') || rest.starts_with('#')) {
        reason += "; JSON has no comments, so take them out";
    }
    if rest.is_some_and(|rest| rest.starts_with('\'')) {
        reason += "; JSON has double quotes only";
    }
    FileError { line, column: column.max(1), reason }
}

/// Sets what the client sets, and checks that the result is a data packet.
fn prepare(object: Object<'_>, id: &Id<'_>) -> Result<Outgoing, String> {
    let is_string = |name: &str| {
        object.0.iter().any(|(key, value)| key == name && value.get().starts_with('"'))
    };
    let payload: Cow<'_, str> = object
        .0
        .iter()
        .find(|(key, _)| key == "payload")
        .and_then(|(_, value)| serde_json::from_str(value.get()).ok())
        .unwrap_or_default();
    let size = match payload.len() {
        size if is_string("payloadsize") => format!("\"{size}\""),
        size if is_string("type") && !object.has("payloadsize") => format!("\"{size}\""),
        size => size.to_string(),
    };
    let srcid = json(id);
    let mut line = String::from("{");
    for (key, value) in &object.0 {
        let value = match &**key {
            "srcid" => srcid.clone(),
            "payloadsize" => size.clone(),
            _ => compact(value.get()),
        };
        push_field(&mut line, key, &value);
    }
    for (key, value) in [("srcid", &srcid), ("payloadsize", &size)] {
        if !object.has(key) {
            push_field(&mut line, key, value);
        }
    }
    line.push('}');
    let data = match Packet::parse(line.as_bytes()) {
        Ok(Packet::Data(data)) => data,
        Ok(_) => return Err("this is no data packet; a client sends \"type\": 0".to_owned()),
        Err(error) => return Err(error.reason),
    };
    let (policy, payload) = (data.policy.text().into_owned(), data.payload.into_owned());
    line.push('\n');
    Ok(Outgoing { hash: hash(&payload), line: line.into_bytes(), policy, payload })
}

fn push_field(line: &mut String, key: &str, value: &str) {
    if line.len() > 1 {
        line.push(',');
    }
    *line += &json(&key);
    line.push(':');
    *line += value;
}

fn json(value: &impl serde::Serialize) -> String {
    serde_json::to_string(value).expect("strings and integers have a JSON form")
}

/// A JSON value without the white space between its tokens.
fn compact(value: &str) -> String {
    let (mut in_string, mut escaped) = (false, false);
    value
        .chars()
        .filter(|&character| {
            let keep = in_string || !matches!(character, ' ' | '\t' | '\r' | '\n');
            if escaped {
                escaped = false;
            } else if in_string && character == '\\' {
                escaped = true;
            } else if character == '"' {
                in_string = !in_string;
            }
            keep
        })
        .collect()
}

/// An object's fields in their order, each value as its text.
struct Object<'a>(Vec<(Cow<'a, str>, &'a RawValue)>);

impl Object<'_> {
    fn has(&self, name: &str) -> bool {
        self.0.iter().any(|(key, _)| key == name)
    }
}

impl<'de> Deserialize<'de> for Object<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ObjectVisitor;
        impl<'de> Visitor<'de> for ObjectVisitor {
            type Value = Object<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a packet, which is a JSON object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Object<'de>, A::Error> {
                let mut fields = Vec::new();
                while let Some(field) = map.next_entry()? {
                    fields.push(field);
                }
                Ok(Object(fields))
            }
        }
        deserializer.deserialize_map(ObjectVisitor)
    }
}
