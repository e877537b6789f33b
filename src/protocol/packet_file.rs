//! Packet files: what a client sends, as people write it.
//!
//! A file holds one or more JSON objects. The client sets `srcid` and what its command line says,
//! fills in or corrects `payloadsize`, and leaves every other field as the file has it, so that a
//! file decides the dialect in which it is sent. The result is one compact line.

use std::borrow::Cow;
use std::fmt;

use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

use crate::protocol::diagnose::{Foreign, json_hint, json_reason, place};
use crate::protocol::{Id, Outgoing, Packet};

/// What the client sets in each packet, whatever the file says.
#[derive(Debug, Clone)]
pub struct ClientFields<'a> {
    /// Its id.
    pub srcid: Id<'a>,
    /// The messages' time in seconds; `None` for what the file says.
    pub timeout: Option<u64>,
    /// Whether the messages must not be carried out twice; `false` for what the file says.
    pub once: bool,
    /// The sender's own number for the message; `None` for what the file says.
    pub msgid: Option<Cow<'a, str>>,
}

impl<'a> ClientFields<'a> {
    /// Returns what the client `srcid` always sets.
    pub fn new(srcid: Id<'a>) -> Self {
        ClientFields { srcid, timeout: None, once: false, msgid: None }
    }
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

/// Reads the packets of a file's content, to be sent with these fields of the client's.
///
/// # Errors
///
/// If the content is not JSON in UTF-8, holds no packet, or an object in it is no data packet.
pub fn read(content: &[u8], fields: &ClientFields<'_>) -> Result<Vec<Outgoing>, FileError> {
    let text = std::str::from_utf8(content).map_err(|error| {
        let (line, column) = place(&content[..error.valid_up_to()]);
        match Foreign::at(content) {
            Foreign::Other => {
                FileError { line, column, reason: "not UTF-8, which JSON is written in".to_owned() }
            }
            foreign => FileError { line: 1, column: 1, reason: foreign.to_string() },
        }
    })?;
    // Some editors put a byte-order mark in front.
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut outgoing = Vec::new();
    let mut objects = serde_json::Deserializer::from_str(text).into_iter::<Object<'_>>();
    loop {
        let end = objects.byte_offset();
        let begin = end + text[end..].len() - text[end..].trim_start().len();
        let error = |reason| {
            let (line, column) = place(&text.as_bytes()[..begin]);
            FileError { line, column, reason }
        };
        if !text[begin..].is_empty() && !text[begin..].starts_with('{') {
            return Err(error(Foreign::at(&text.as_bytes()[begin..]).to_string()));
        }
        let Some(object) = objects.next() else { break };
        let object = object.map_err(|error| json_error(&error, text))?;
        outgoing.push(prepare(object, fields).map_err(error)?);
    }
    if outgoing.is_empty() {
        let reason = "there is no packet; write one such as {\"type\": 0, \"srcid\": 50, \
                      \"privPoliId\": \"PP_1\", \"payload\": \"hello\"}";
        return Err(FileError { line: 1, column: 1, reason: reason.to_owned() });
    }
    Ok(outgoing)
}

fn json_error(error: &serde_json::Error, text: &str) -> FileError {
    let mut reason = json_reason(error);
    if let Some(hint) = json_hint(error, text) {
        reason += "; ";
        reason += hint;
    }
    FileError { line: error.line(), column: error.column().max(1), reason }
}

/// Sets what the client sets, and checks that the result is a data packet.
fn prepare(object: Object<'_>, fields: &ClientFields<'_>) -> Result<Outgoing, String> {
    let is_string = |value: &RawValue| value.get().starts_with('"');
    let in_strings = object.get("type").is_some_and(is_string);
    let written = |value: String, is_string| if is_string { json(&value) } else { value };
    let payload: String = object
        .get("payload")
        .and_then(|value| serde_json::from_str(value.get()).ok())
        .unwrap_or_default();
    let has_size_as_string = object.get("payloadsize").map_or(in_strings, is_string);
    let set = [
        ("srcid", Some(json(&fields.srcid))),
        ("payloadsize", Some(written(payload.len().to_string(), has_size_as_string))),
        ("timeout", fields.timeout.map(|seconds| written(seconds.to_string(), in_strings))),
        ("once", fields.once.then(|| written("true".to_owned(), in_strings))),
        ("msgid", fields.msgid.as_ref().map(json)),
    ];
    let set: Vec<_> = set.into_iter().filter_map(|(key, value)| Some((key, value?))).collect();
    let own = object.0.iter().map(|(key, value)| {
        let ours = set.iter().find(|(name, _)| name == key);
        (&**key, ours.map_or_else(|| compact(value.get()), |(_, value)| value.clone()))
    });
    let added = set.iter().filter(|(key, _)| object.get(key).is_none()).cloned();
    let all: Vec<_> =
        own.chain(added).map(|(key, value)| format!("{}:{value}", json(&key))).collect();
    let line = format!("{{{}}}", all.join(","));
    let data = match Packet::parse(line.as_bytes()) {
        Ok(Packet::Data(data)) => data,
        Ok(_) => return Err("this is no data packet; a client sends \"type\": 0".to_owned()),
        Err(error) => return Err(error.reason),
    };
    let line = format!("{line}\n").into_bytes();
    Ok(Outgoing::with_line(&data, line))
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
    fn get(&self, name: &str) -> Option<&RawValue> {
        self.0.iter().find(|(key, _)| key == name).map(|(_, value)| *value)
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The packets of a file, for client 7.
    fn read_text(content: &str) -> Result<Vec<Outgoing>, FileError> {
        read(content.as_bytes(), &ClientFields::new(Id::Integer(7)))
    }

    /// The line that a file with one packet becomes.
    fn line(content: &str) -> String {
        let packets = read_text(content).unwrap_or_else(|error| panic!("{error}: {content}"));
        assert_eq!(packets.len(), 1);
        String::from_utf8(packets[0].line.clone()).unwrap()
    }

    /// Line, column and reason.
    fn error(content: &str) -> (usize, usize, String) {
        let error = read_text(content).unwrap_err();
        (error.line, error.column, error.reason)
    }

    #[test]
    fn a_packet_becomes_one_compact_line() {
        let file = "{\n\t\"type\": 0,\r\n\"srcid\": 7, \"privPoliId\": \"PP_1\",\n\"payloadsize\": 5,\
                    \"payload\": \"a b\\n\\\"c \" }";
        let expected =
            r#"{"type":0,"srcid":7,"privPoliId":"PP_1","payloadsize":7,"payload":"a b\n\"c "}"#;
        assert_eq!(line(file), format!("{expected}\n"));
    }

    #[test]
    fn the_client_sets_srcid_and_corrects_payloadsize() {
        let expected = r#"{"type":0,"srcid":7,"privPoliId":"P","payloadsize":3,"payload":"é!"}"#
            .to_owned()
            + "\n";
        for (srcid, size) in [("50", "2"), ("\"other\"", "999"), ("null", "[]"), ("7", "3")] {
            let file = format!(
                r#"{{"type":0,"srcid":{srcid},"privPoliId":"P","payloadsize":{size},"payload":"é!"}}"#
            );
            assert_eq!(line(&file), expected);
        }
    }

    #[test]
    fn what_the_file_leaves_out_is_added() {
        let file = r#"{"type": 0, "privPoliId": "P", "payload": "x"}"#;
        let expected = r#"{"type":0,"privPoliId":"P","payload":"x","srcid":7,"payloadsize":1}"#;
        assert_eq!(line(file), format!("{expected}\n"));
    }

    #[test]
    fn a_file_in_strings_is_sent_in_strings() {
        let given = r#"{"type":"0","srcid":"1","privPoliId":"P","payloadsize":"9","payload":"x"}"#;
        let sent = r#"{"type":"0","srcid":7,"privPoliId":"P","payloadsize":"1","payload":"x"}"#;
        assert_eq!(line(given), format!("{sent}\n"));
        let given = r#"{"type":"0","privPoliId":"P","payload":"x"}"#;
        let sent = r#"{"type":"0","privPoliId":"P","payload":"x","srcid":7,"payloadsize":"1"}"#;
        assert_eq!(line(given), format!("{sent}\n"));
    }

    #[test]
    fn what_the_command_line_says_replaces_what_the_file_says_in_its_dialect() {
        let fields = ClientFields {
            timeout: Some(20),
            once: true,
            msgid: Some("m \"1\"".into()),
            ..ClientFields::new(Id::Integer(7))
        };
        for (given, sent) in [
            (
                r#"{"type":0,"msgid":"old","once":false,"timeout":"5","privPoliId":"P","payload":"x"}"#,
                r#"{"type":0,"msgid":"m \"1\"","once":true,"timeout":20,"privPoliId":"P","payload":"x","srcid":7,"payloadsize":1}"#,
            ),
            (
                r#"{"type":"0","privPoliId":"P","payload":"x"}"#,
                r#"{"type":"0","privPoliId":"P","payload":"x","srcid":7,"payloadsize":"1","timeout":"20","once":"true","msgid":"m \"1\""}"#,
            ),
        ] {
            let packets = read(given.as_bytes(), &fields).unwrap();
            assert_eq!(String::from_utf8_lossy(&packets[0].line), format!("{sent}\n"));
            assert_eq!((packets[0].timeout, packets[0].once), (Some(20), true));
        }
        let packets =
            read_text(r#"{"type":0,"once":"true","timeout":"5","privPoliId":"P","payload":"x"}"#);
        let packet = packets.unwrap().remove(0);
        assert_eq!((packet.timeout, packet.once), (Some(5), true), "the file's own hold, too");
    }

    #[test]
    fn every_other_field_stays_as_it_is_written() {
        let packet = r#"{"note":{"b":[1.0e+2,-0,"\u0061 \/"],"a":null},"payload":"\u00e9","privPolyId":"P","type":0,"srcid":7,"payloadsize":2}"#;
        assert_eq!(line(packet), format!("{packet}\n"));
    }

    #[test]
    fn what_is_sent_comes_with_what_its_ack_must_say() {
        let file = r#"{"type":0,"privPoliId":111,"payload":"h\u0065llo"}"#;
        let Outgoing { policy, payload, hash, .. } = read_text(file).unwrap().remove(0);
        assert_eq!((policy.as_str(), payload.as_str()), ("111", "hello"));
        assert_eq!(hash, "aaf4c61ddcc5e8a2dabede0f3b482cd9aea9434d");
    }

    #[test]
    fn a_file_holds_any_number_of_packets() {
        let packet = |text: &str| format!(r#"{{"type":0,"privPoliId":"P","payload":"{text}"}}"#);
        for separator in ["", "\n", "\r\n\t ", "\n\n"] {
            let file = ["a", "b", "c"].map(packet).join(separator);
            let payloads: Vec<_> =
                read_text(&file).unwrap().into_iter().map(|packet| packet.payload).collect();
            assert_eq!(payloads, ["a", "b", "c"]);
        }
    }

    #[test]
    fn a_byte_order_mark_is_passed_over() {
        assert!(
            line("\u{feff}{\"type\":0,\"privPoliId\":\"P\",\"payload\":\"x\"}")
                .starts_with("{\"type\"")
        );
    }

    #[test]
    fn an_error_in_json_has_its_line_and_column() {
        assert_eq!(error("{\n  \"type\": 0,\n}"), (3, 1, "trailing comma".to_owned()));
        assert_eq!(error("{\"a\" 1}"), (1, 6, "expected `:`".to_owned()));
        assert_eq!(error("{\n\"a\": 1"), (2, 6, "EOF while parsing an object".to_owned()));
    }

    #[test]
    fn comments_are_told_from_other_errors_in_json() {
        let hint = "; JSON has no comments, so take them out";
        for file in [
            "{\"type\": 0, // data\n}",
            "{\"type\": 0 /* data */}",
            "{\"é\": 0, # data\n}",
            "// data\n{}",
        ] {
            let (_, _, reason) = error(file);
            assert!(reason.ends_with(hint), "{file}: {reason}");
        }
        for file in ["{'type': 0}", "{\"type\": 0,}", "{type: 0}"] {
            let (_, _, reason) = error(file);
            assert!(!reason.contains("comments"), "{file}: {reason}");
        }
    }

    #[test]
    fn an_error_in_a_packet_has_the_place_where_that_begins() {
        let good = "{\"type\":0,\"privPoliId\":\"P\",\"payload\":\"x\"}";
        let (line, column, reason) = error(&format!("{good}\n\n  {{\"type\":0}}{good}"));
        assert_eq!((line, column), (3, 3));
        assert_eq!(reason, "field \"privPoliId\" is missing");
    }

    #[test]
    fn bytes_that_are_no_text_are_told_with_their_place() {
        let error = read(b"{\n \"a\": \"\xff\"}", &ClientFields::new(Id::ZERO)).unwrap_err();
        assert_eq!((error.line, error.column), (2, 8));
        assert_eq!(error.reason, "not UTF-8, which JSON is written in");
    }

    #[test]
    fn a_packet_that_no_client_sends_is_refused() {
        for packet in [
            r#"{"type":1,"id":1,"privPolyId":"P","listenport":5}"#,
            r#"{"type":"2","srcid":1,"destid":2,"payload":""}"#,
        ] {
            let (_, _, reason) = error(packet);
            assert_eq!(reason, "this is no data packet; a client sends \"type\": 0");
        }
    }

    #[test]
    fn a_file_without_a_packet_is_told_how_to_write_one() {
        for file in ["", " \n\t", "\u{feff}"] {
            let (line, column, reason) = error(file);
            assert_eq!((line, column), (1, 1));
            let example = &reason[reason.find('{').unwrap()..];
            assert!(read_text(example).is_ok(), "the example is right: {example}");
        }
    }

    proptest! {
        #[test]
        fn any_payload_and_policy_arrive_as_they_are(payload: String, policy: String, id: String) {
            let file = serde_json::json!({"type": 0, "privPoliId": policy, "payload": payload});
            let id = Id::from_text(&id);
            let fields = ClientFields::new(id.clone());
            let packets = read(format!("{file:#}").as_bytes(), &fields).unwrap();
            let Ok(Packet::Data(data)) = Packet::parse(&packets[0].line) else {
                panic!("{packets:?}");
            };
            prop_assert_eq!(&data.payload, &payload);
            prop_assert_eq!(&data.policy.text(), &policy);
            prop_assert_eq!(&data.srcid, &id);
            prop_assert_eq!(data.payload_size, Some(payload.len() as u64));
            prop_assert_eq!(&packets[0].hash, &crate::protocol::hash(&payload));
        }
    }
}
