//! The packet types.
//!
//! Parsing is liberal, because many small programs speak this protocol, each in its own dialect;
//! writing is strict. [`Packet::parse`] takes one JSON object and borrows from it where it can;
//! [`Packet::write`] appends one compact line. [`crate::protocol::framer`] finds where an object
//! ends in a stream.

use std::borrow::Cow;
use std::fmt;

use sha1::{Digest, Sha1};

use super::id::Id;

/// One packet of the protocol.
///
/// Types 0 to 2 are the homework's; type 3, the refusal, is an extension.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Packet<'a> {
    /// Type 0: a message from a client to any server of a policy.
    Data(Data<'a>),
    /// Type 1: a server registers with the proxy.
    Setup(Setup<'a>),
    /// Type 2: a server's answer to a message, or the proxy's to a setup packet.
    Ack(Ack<'a>),
    /// Type 3: the answer to a packet that was not served.
    Refusal(Refusal<'a>),
}

/// A message from a client to any server of a policy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Data<'a> {
    /// The client's id.
    pub srcid: Id<'a>,
    /// The privacy policy asked for.
    pub policy: Id<'a>,
    /// The text.
    pub payload: Cow<'a, str>,
    /// The payload's size as the sender states it. It never decides how much is read.
    pub payload_size: Option<u64>,
    /// Seconds until the message's deadline, at least 1; `None` for the proxy's default.
    pub timeout: Option<u64>,
    /// Whether the message must not run twice: it is retried only if nothing of it was sent.
    pub once: bool,
    /// The sender's id for the message.
    pub msgid: Option<Cow<'a, str>>,
}

impl<'a> Data<'a> {
    /// Returns a message with the required fields only.
    pub fn new(srcid: Id<'a>, policy: Id<'a>, payload: impl Into<Cow<'a, str>>) -> Self {
        Data {
            srcid,
            policy,
            payload: payload.into(),
            payload_size: None,
            timeout: None,
            once: false,
            msgid: None,
        }
    }

    /// Returns the stated size, if it is neither the payload's bytes nor its characters.
    pub fn wrong_size(&self) -> Option<u64> {
        let claimed = self.payload_size?;
        let agrees =
            claimed == self.payload.len() as u64 || claimed == self.payload.chars().count() as u64;
        (!agrees).then_some(claimed)
    }
}

/// A server's registration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Setup<'a> {
    /// The server's id.
    pub id: Id<'a>,
    /// The privacy policy it serves.
    pub policy: Id<'a>,
    /// The port on which it listens for messages.
    pub listen_port: u16,
    /// The lease it asks for, in seconds. `None`: the registration outlives its connection. 0:
    /// nothing is registered, the server only asks whether the proxy grants leases.
    pub lease: Option<u64>,
    /// The most messages it takes at once, at least 1; `None` for no limit.
    pub capacity: Option<u64>,
    /// The secret that a proxy may require for registration.
    pub token: Option<Cow<'a, str>>,
}

impl<'a> Setup<'a> {
    /// Returns a registration with the required fields only.
    pub fn new(id: Id<'a>, policy: Id<'a>, listen_port: u16) -> Self {
        Setup { id, policy, listen_port, lease: None, capacity: None, token: None }
    }
}

/// The answer to a data packet or to a setup packet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ack<'a> {
    /// The server's id; 0 in the answer to a setup packet.
    pub srcid: Id<'a>,
    /// The id of the packet's sender.
    pub destid: Id<'a>,
    /// The SHA-1 of the message's payload, or `registered`.
    pub payload: Cow<'a, str>,
    /// The lease that the proxy grants, in seconds.
    pub lease: Option<u64>,
    /// What the server computed for the message.
    pub result: Option<Cow<'a, str>>,
    /// The encoding of a `result` that is not text: `base64`.
    pub encoding: Option<Cow<'a, str>>,
}

impl<'a> Ack<'a> {
    /// Returns an ack with the required fields only.
    pub fn new(srcid: Id<'a>, destid: Id<'a>, payload: impl Into<Cow<'a, str>>) -> Self {
        let payload = payload.into();
        Ack { srcid, destid, payload, lease: None, result: None, encoding: None }
    }
}

/// The answer to a packet that was not served, with the reason.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal<'a> {
    /// The id of the refused packet's sender, 0 if unknown.
    pub destid: Id<'a>,
    /// The reason for people.
    pub reason: Cow<'a, str>,
    /// The reason for programs: a [`Code`]'s name, or what another proxy wrote.
    pub code: Cow<'a, str>,
}

impl<'a> Refusal<'a> {
    /// Returns a refusal of a packet from `destid`.
    pub fn new(destid: Id<'a>, code: Code, reason: impl Into<Cow<'a, str>>) -> Self {
        Refusal { destid, reason: reason.into(), code: Cow::Borrowed(code.name()) }
    }
}

/// Why a packet was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Code {
    /// Not a JSON object, a field missing or of the wrong kind, or a type not expected here.
    BadPacket,
    /// Longer than the receiver's limit.
    TooLarge,
    /// No server is registered for the policy.
    NoServer,
    /// No server could be connected to, or a connection broke before the ack.
    Unreachable,
    /// No ack came in time, or a packet was too slow.
    Timeout,
    /// The server's answer was not an ack for this message.
    BadAck,
    /// The proxy or the server lacks something just now, or stops: the same message may be sent again.
    Overloaded,
    /// Another server holds a lease on this id and policy.
    IdInUse,
    /// The sender may not do this.
    NotAllowed,
    /// The server could not do its work on the message.
    Failed,
    /// A `once` message was sent and got no answer: it may have run or not.
    OutcomeUnknown,
}

impl Code {
    /// All codes and their names, in the protocol's order.
    pub const ALL: [(Code, &'static str); 11] = [
        (Code::BadPacket, "bad-packet"),
        (Code::TooLarge, "too-large"),
        (Code::NoServer, "no-server"),
        (Code::Unreachable, "unreachable"),
        (Code::Timeout, "timeout"),
        (Code::BadAck, "bad-ack"),
        (Code::Overloaded, "overloaded"),
        (Code::IdInUse, "id-in-use"),
        (Code::NotAllowed, "not-allowed"),
        (Code::Failed, "failed"),
        (Code::OutcomeUnknown, "outcome-unknown"),
    ];

    /// Returns the code of this name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|(_, known)| *known == name).map(|(code, _)| code)
    }

    /// Returns the code as it is written in a packet.
    pub const fn name(self) -> &'static str {
        Self::ALL[self as usize].1
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Returns the SHA-1 of a payload's UTF-8 bytes in lower-case hexadecimal, as in an ack.
pub fn hash(payload: &str) -> String {
    hex::encode(Sha1::digest(payload.as_bytes()))
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;
    use serde_json::value::RawValue;
    use serde_json::{Value, json};

    use super::*;

    fn parse(text: &str) -> Packet<'_> {
        Packet::parse(text.as_bytes()).unwrap_or_else(|error| panic!("{error}: {text}"))
    }

    fn reason(text: &str) -> String {
        match Packet::parse(text.as_bytes()) {
            Ok(packet) => panic!("{packet:?}: {text}"),
            Err(error) => error.reason,
        }
    }

    fn data(srcid: Id<'static>, policy: &'static str, payload: &'static str) -> Data<'static> {
        Data::new(srcid, Id::Text(policy.into()), payload)
    }

    /// One valid packet of each type, with every field of that type.
    fn samples() -> [Value; 4] {
        [
            json!({"type": 0, "srcid": 50, "privPoliId": "PP_1", "payloadsize": 5, "payload": "hello",
                "timeout": 30, "once": true, "msgid": "m-1"}),
            json!({"type": 1, "id": 100, "privPolyId": "PP_1", "listenport": 124, "lease": 3,
                "capacity": 2, "token": "secret"}),
            json!({"type": 2, "srcid": 100, "destid": 50, "payloadsize": 3, "payload": "abc",
                "lease": 3, "result": "text", "encoding": "base64"}),
            json!({"type": 3, "srcid": 0, "destid": 50, "payloadsize": 3, "payload": "why",
                "code": "no-server"}),
        ]
    }

    /// Returns the sample with one field changed.
    fn with(sample: &Value, field: &str, value: Value) -> String {
        let mut sample = sample.clone();
        sample[field] = value;
        sample.to_string()
    }

    #[test]
    fn the_protocols_examples_are_read_and_written_as_they_stand() {
        let examples = [
            r#"{"type":0,"srcid":50,"privPoliId":"PP_1","payloadsize":5,"payload":"hello"}"#,
            r#"{"type":1,"id":100,"privPolyId":"PP_1","privPoliId":"PP_1","listenport":124}"#,
            r#"{"type":2,"srcid":100,"destid":50,"payloadsize":40,"payload":"aaf4c61ddcc5e8a2dabede0f3b482cd9aea9434d"}"#,
            r#"{"type":3,"srcid":0,"destid":50,"payloadsize":38,"payload":"no server serves privacy policy \"PP_9\"","code":"no-server"}"#,
        ];
        for example in examples {
            assert_eq!(parse(example).to_line(), format!("{example}\n").into_bytes());
        }
        assert_eq!(hash("hello"), "aaf4c61ddcc5e8a2dabede0f3b482cd9aea9434d");
    }

    #[test]
    fn the_tutorials_dialect_is_read_as_the_same_packets() {
        for sample in samples() {
            let strings: serde_json::Map<_, _> = sample
                .as_object()
                .unwrap()
                .iter()
                .map(|(field, value)| {
                    let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
                    (field.clone(), Value::from(text))
                })
                .collect();
            let (sample, strings) = (sample.to_string(), Value::from(strings).to_string());
            assert_eq!(parse(&strings), parse(&sample), "{strings}");
        }
    }

    #[test]
    fn the_setup_packet_in_strings_is_the_same_packet() {
        let setup = Setup {
            id: Id::Integer(7),
            policy: Id::Text("\"quoted\"".into()),
            listen_port: 65535,
            lease: Some(0),
            capacity: Some(1),
            token: Some("secret".into()),
        };
        let line = setup.to_line_of_strings();
        let fields: Value = serde_json::from_slice(&line).unwrap();
        assert!(fields.as_object().unwrap().values().all(Value::is_string), "{fields}");
        assert_eq!(fields["privPolyId"], fields["privPoliId"]);
        assert_eq!(Packet::parse(&line).unwrap(), Packet::Setup(setup));
        assert_eq!(line.last(), Some(&b'\n'));
    }

    #[test]
    fn fields_come_in_any_order_and_with_any_white_space() {
        let packet =
            "\t{ \"payload\"\r\n:\"x\",\"privPoliId\":\"P\" , \"srcid\":7,\n\"type\" : 0 } ";
        assert_eq!(parse(packet), Packet::Data(data(Id::Integer(7), "P", "x")));
    }

    #[test]
    fn fields_that_nobody_knows_may_hold_anything() {
        let deep = "[".repeat(500) + &"]".repeat(500);
        for value in ["1e999", "null", "{\"srcid\":1,\"srcid\":2}", &deep, "\"\\ud800\""] {
            let packet = format!(
                r#"{{"x":{value},"type":0,"srcid":7,"privPoliId":"P","payload":"x","lease":[{value}]}}"#
            );
            assert_eq!(parse(&packet), Packet::Data(data(Id::Integer(7), "P", "x")));
        }
    }

    #[test]
    fn either_spelling_of_the_policy_is_taken_in_either_packet() {
        for spelling in ["privPoliId", "privPolyId"] {
            let text = format!(r#"{{"type":0,"srcid":7,"{spelling}":"P","payload":"x"}}"#);
            assert_eq!(parse(&text), Packet::Data(data(Id::Integer(7), "P", "x")));
            let text = format!(r#"{{"type":1,"id":7,"{spelling}":"P","listenport":1}}"#);
            let Packet::Setup(setup) = parse(&text) else { panic!("{text}") };
            assert_eq!(setup.policy.text(), "P");
        }
    }

    #[test]
    fn both_spellings_must_agree_by_their_text() {
        let both = |first: &str, second: &str| {
            format!(
                r#"{{"type":0,"srcid":7,"payload":"x","privPoliId":{first},"privPolyId":{second}}}"#
            )
        };
        let agreeing = both("111", "\"111\"");
        assert_eq!(parse(&agreeing), Packet::Data(data(Id::Integer(7), "111", "x")));
        assert_eq!(reason(&both("111", "112")), "fields \"privPoliId\" and \"privPolyId\" differ");
        assert!(reason(&both("111", "null")).contains("must be an integer or a string"));
    }

    #[test]
    fn each_missing_field_is_named() {
        let needed: [&[&str]; 4] = [
            &["type", "srcid", "privPoliId", "payload"],
            &["type", "id", "privPolyId", "listenport"],
            &["type", "srcid", "destid", "payload"],
            &["type", "destid", "payload", "code"],
        ];
        for (sample, needed) in samples().iter().zip(needed) {
            for field in sample.as_object().unwrap().keys() {
                let mut rest = sample.clone();
                rest.as_object_mut().unwrap().remove(field);
                let rest = rest.to_string();
                if needed.contains(&field.as_str()) {
                    assert_eq!(reason(&rest), format!("field \"{field}\" is missing"));
                } else {
                    parse(&rest);
                }
            }
        }
    }

    #[test]
    fn each_field_of_the_wrong_kind_is_named_with_what_it_must_be() {
        let number = "a whole number, 0 or more";
        let id = "an integer or a string";
        let text = "a string";
        let boolean = "true or false";
        let kinds: [&[(&str, &str)]; 4] = [
            &[
                ("type", number),
                ("srcid", id),
                ("privPoliId", id),
                ("payloadsize", number),
                ("payload", text),
                ("timeout", number),
                ("once", boolean),
                ("msgid", text),
            ],
            &[
                ("type", number),
                ("id", id),
                ("privPolyId", id),
                ("listenport", number),
                ("lease", number),
                ("capacity", number),
                ("token", text),
            ],
            &[
                ("srcid", id),
                ("destid", id),
                ("payloadsize", number),
                ("payload", text),
                ("lease", number),
                ("result", text),
                ("encoding", text),
            ],
            &[("destid", id), ("payloadsize", number), ("payload", text), ("code", text)],
        ];
        let wrong = [
            ("null", "null"),
            ("true", "true"),
            ("1.5", "a number with a fraction or an exponent"),
            ("1e999", "a number with a fraction or an exponent"),
            ("-0.0", "a number with a fraction or an exponent"),
            ("[1]", "an array"),
            ("{\"a\": 1}", "an object"),
            (r#""\ud800""#, "no valid Unicode: it has half of a surrogate pair"),
        ];
        for (sample, fields) in samples().iter().zip(kinds) {
            for (field, wanted) in fields {
                for (value, kind) in &wrong {
                    if *wanted == boolean && *value == "true" {
                        continue;
                    }
                    let expected = format!("field \"{field}\" must be {wanted}, but is {kind}");
                    let text = with(sample, field, json!("VALUE")).replace("\"VALUE\"", value);
                    assert_eq!(reason(&text), expected);
                }
                if *wanted == boolean {
                    for value in [json!(1), json!("True"), json!("")] {
                        let reason = reason(&with(sample, field, value));
                        assert!(
                            reason.starts_with(&format!("field \"{field}\" must be {boolean}"))
                        );
                    }
                }
                if *wanted == number {
                    for value in
                        [json!(-1), json!("-1"), json!("+1"), json!("x"), json!(""), json!(" 1")]
                    {
                        let reason = reason(&with(sample, field, value));
                        assert!(reason.starts_with(&format!("field \"{field}\" must be {number}")));
                    }
                }
                if *wanted == text {
                    assert!(reason(&with(sample, field, json!(5))).ends_with("but is an integer"));
                }
            }
        }
    }

    #[test]
    fn a_port_is_from_1_to_65535() {
        let [_, setup, ..] = samples();
        for port in [json!(1), json!("65535")] {
            parse(&with(&setup, "listenport", port));
        }
        for (port, shown) in [(json!(0), "0"), (json!(65536), "65536"), (json!("70000"), "70000")] {
            assert_eq!(
                reason(&with(&setup, "listenport", port)),
                format!("field \"listenport\" must be a port from 1 to 65535, but is {shown}")
            );
        }
    }

    #[test]
    fn a_type_that_no_packet_has_is_told() {
        for wrong in [json!(4), json!("7"), json!(u64::MAX)] {
            let reason = reason(&with(&samples()[0], "type", wrong));
            assert!(reason.starts_with("no packet has type "), "{reason}");
        }
    }

    #[test]
    fn a_field_given_twice_is_refused_whether_known_or_not() {
        for (field, first, second) in [
            ("srcid", "7", "7"),
            ("payload", "\"a\"", "\"b\""),
            ("type", "0", "\"0\""),
            ("note", "1", "2"),
            ("", "1", "2"),
        ] {
            let text = format!(r#"{{"{field}":{first},"x":0,"{field}":{second}}}"#);
            assert_eq!(reason(&text), format!("field \"{field}\" is given twice"));
        }
        // The two are one name to a parser.
        assert_eq!(reason(r#"{"srcid":1,"src\u0069d":2}"#), "field \"srcid\" is given twice");
        assert_eq!(reason(r#"{"\u0061":1,"a":2}"#), "field \"a\" is given twice");
    }

    #[test]
    fn escapes_mean_what_they_stand_for() {
        let text = r#"{"\u0074ype":"\u0030","srcid":"\u0037","privPoliId":"\"\\\/","payload":"\n\u00e9\ud83e\udd80"}"#;
        assert_eq!(parse(text), Packet::Data(data(Id::Integer(7), "\"\\/", "\né🦀")));
    }

    #[test]
    fn half_of_a_surrogate_pair_is_json_but_no_payload() {
        for half in [r"\ud83e", r"\udd80", r"\ud83e\ud83e", r"\ud83ex", r"\ud83e\n"] {
            let text = format!(r#"{{"type":0,"srcid":7,"privPoliId":"P","payload":"{half}"}}"#);
            let error = Packet::parse(text.as_bytes()).unwrap_err();
            assert!(error.reason.contains("surrogate"), "{half}: {error}");
            assert!(error.is_json, "the packet's end can be trusted");
        }
    }

    #[test]
    fn what_is_not_json_is_told_with_its_place() {
        for (text, line, column) in [
            ("{\"type\": 0,\n \"srcid\" 5}", 2, 10),
            ("{\n\n'type': 0}", 3, 1),
            ("{\"a\": 1} {}", 1, 10),
            ("", 1, 0),
        ] {
            let error = Packet::parse(text.as_bytes()).unwrap_err();
            assert!(!error.is_json, "{text}");
            assert!(error.reason.starts_with("not JSON: "), "{error}");
            assert!(error.reason.contains(&format!(" at line {line} column {column}")), "{error}");
        }
        let error = Packet::parse(b"{\"x\":\n\"a\xff\"}").unwrap_err();
        assert!(!error.is_json);
        assert_eq!(error.reason, "not UTF-8 at line 2 column 3");
    }

    #[test]
    fn an_error_carries_the_id_that_the_packet_came_with() {
        for (text, id) in [
            (r#"{"srcid":7}"#, Some(Id::Integer(7))),
            (r#"{"type":0,"srcid":"seven"}"#, Some(Id::Text("seven".into()))),
            (r#"{"type":1,"id":7,"listenport":1}"#, Some(Id::Integer(7))),
            (r#"{"type":0,"srcid":[7]}"#, None),
            ("{}", None),
        ] {
            assert_eq!(Packet::parse(text.as_bytes()).unwrap_err().id, id, "{text}");
        }
    }

    #[test]
    fn fields_that_nobody_knows_are_limited() {
        let packet = |count: usize| {
            let fields: String = (0..count).map(|number| format!("\"x{number}\":0,")).collect();
            format!("{{{fields}\"type\":0,\"srcid\":7,\"privPoliId\":\"P\",\"payload\":\"x\"}}")
        };
        parse(&packet(1000));
        assert!(reason(&packet(1001)).starts_with("more than 1000 fields"));
    }

    #[test]
    fn payloads_and_names_without_escapes_are_not_copied() {
        let packet = parse(r#"{"type":0,"srcid":"a","privPoliId":"b","payload":"c"}"#);
        let Packet::Data(data) = packet else { panic!("{packet:?}") };
        assert!(matches!(data.payload, Cow::Borrowed("c")));
        assert!(matches!(data.policy, Id::Text(Cow::Borrowed("b"))));
    }

    #[test]
    fn a_size_is_wrong_if_it_is_neither_the_bytes_nor_the_characters() {
        let size = |payload_size| Data { payload_size, ..data(Id::ZERO, "P", "é🦀") };
        for right in [None, Some(6), Some(2)] {
            assert_eq!(size(right).wrong_size(), None);
        }
        for wrong in [0, 3, 7, u64::MAX] {
            assert_eq!(size(Some(wrong)).wrong_size(), Some(wrong));
        }
    }

    #[test]
    fn a_boolean_and_times_may_be_strings_and_a_time_is_one_at_least() {
        let [data, setup, ..] = samples();
        for (once, expected) in [("true", true), ("false", false)] {
            let text = with(&data, "once", json!(once));
            let Packet::Data(data) = parse(&text) else { panic!("{text}") };
            assert_eq!(data.once, expected);
        }
        for (sample, field) in [(&data, "timeout"), (&setup, "capacity")] {
            for zero in [json!(0), json!("0"), json!("00")] {
                let expected = format!("field \"{field}\" must be 1 or more, but is 0");
                assert_eq!(reason(&with(sample, field, zero)), expected);
            }
        }
    }

    #[test]
    fn a_number_above_64_bits_is_above_every_limit() {
        let [data, setup, ..] = samples();
        for large in ["18446744073709551616", &"9".repeat(39), &"9".repeat(300)] {
            for large in [large.to_owned(), format!("\"{large}\"")] {
                let number = |sample, field| {
                    with(sample, field, json!("VALUE")).replace("\"VALUE\"", &large)
                };
                let text = number(&data, "timeout");
                let Packet::Data(data) = parse(&text) else { panic!("{text}") };
                assert_eq!(data.timeout, Some(u64::MAX));
                assert!(reason(&number(&setup, "listenport")).contains("must be a port"));
            }
            let negative = with(&data, "timeout", json!("VALUE"));
            let reason = reason(&negative.replace("\"VALUE\"", &format!("-{large}")));
            assert!(reason.contains("must be a whole number"), "{reason}");
        }
    }

    #[test]
    fn an_id_a_policy_and_a_msgid_have_256_bytes_at_most() {
        let fields: [&[&str]; 4] = [
            &["srcid", "privPoliId", "msgid"],
            &["id", "privPolyId"],
            &["srcid", "destid"],
            &["destid"],
        ];
        for (sample, fields) in samples().iter().zip(fields) {
            for field in fields {
                for longest in ["x".repeat(256), "é".repeat(128)] {
                    parse(&with(sample, field, json!(longest)));
                    let text = with(sample, field, json!(longest + "x"));
                    let error = Packet::parse(text.as_bytes()).unwrap_err();
                    assert_eq!(
                        error.reason,
                        format!("field \"{field}\" may have 256 bytes, but has 257")
                    );
                    let is_own = ["srcid", "id"].contains(field);
                    assert_eq!(error.id.is_none(), is_own, "{text}");
                }
            }
        }
        let digits = |count: usize| {
            with(&samples()[0], "srcid", json!("VALUE")).replace("\"VALUE\"", &"7".repeat(count))
        };
        parse(&digits(256));
        assert_eq!(reason(&digits(257)), "field \"srcid\" may have 256 bytes, but has 257");
    }

    #[test]
    fn an_integer_of_any_length_is_an_id_and_written_back_as_it_came() {
        let longest_negative = format!("-{}", "8".repeat(255));
        for digits in [
            "170141183460469231731687303715884105727",
            "170141183460469231731687303715884105728",
            "340282366920938463463374607431768211455",
            "-170141183460469231731687303715884105729",
            &longest_negative,
        ] {
            let text = format!(
                "{{\"type\":2,\"srcid\":{digits},\"destid\":\"{digits}\",\"payload\":\"\"}}"
            );
            let Packet::Ack(ack) = parse(&text) else { panic!("{text}") };
            assert_eq!(ack.srcid, ack.destid);
            assert_eq!((ack.srcid.text(), ack.srcid.to_string()), (digits.into(), digits.into()));
            assert_ne!(ack.srcid, Id::Integer(7));
            let written = Packet::Ack(ack).to_line();
            let written = String::from_utf8(written).unwrap();
            assert!(written.contains(&format!("\"srcid\":{digits},\"destid\":\"{digits}\",")));
        }
    }

    #[test]
    fn minus_zero_is_zero() {
        let text = r#"{"type":0,"srcid":-0,"privPoliId":"P","payload":"x","payloadsize":-0}"#;
        let expected = Data { payload_size: Some(0), ..data(Id::ZERO, "P", "x") };
        assert_eq!(parse(text), Packet::Data(expected));
    }

    #[test]
    fn ids_are_compared_by_their_text() {
        let text = |text: &'static str| Id::Text(text.into());
        assert_eq!(Id::Integer(111), text("111"));
        assert_eq!(Id::Integer(-5), text("-5"));
        assert_ne!(Id::Integer(111), text("0111"));
        assert_ne!(Id::Integer(111), text("111 "));
        assert_ne!(text("A"), text("a"));
    }

    #[test]
    fn an_id_from_the_command_line_is_an_integer_where_it_is_written_as_one() {
        for (text, json) in [
            ("100", "100"),
            ("0", "0"),
            ("-1", "-1"),
            ("0100", "\"0100\""),
            ("+1", "\"+1\""),
            ("-0", "\"-0\""),
            ("1.0", "\"1.0\""),
            ("PP_1", "\"PP_1\""),
            ("", "\"\""),
            ("99999999999999999999", "99999999999999999999"),
            ("340282366920938463463374607431768211455", "340282366920938463463374607431768211455"),
            ("-", "\"-\""),
        ] {
            assert_eq!(serde_json::to_string(&Id::from_text(text)).unwrap(), json);
        }
    }

    #[test]
    fn a_large_id_is_written_as_it_came() {
        for id in ["18446744073709551615", "-9223372036854775808"] {
            let text = format!(
                "{{\"type\":2,\"srcid\":{id},\"destid\":{id},\"payloadsize\":0,\"payload\":\"\"}}\n"
            );
            assert_eq!(parse(&text).to_line(), text.as_bytes());
        }
    }

    #[test]
    fn codes_are_named_as_the_protocol_lists_them() {
        let names = Code::ALL.map(|(code, _)| code.name());
        let listed = [
            "bad-packet",
            "too-large",
            "no-server",
            "unreachable",
            "timeout",
            "bad-ack",
            "overloaded",
            "id-in-use",
            "not-allowed",
            "failed",
            "outcome-unknown",
        ];
        assert_eq!(names, listed);
        assert!(Code::ALL.iter().all(|(code, name)| Code::from_name(name) == Some(*code)));
        assert_eq!(Code::from_name("Failed"), None);
        // The names, and the refusals in the stats, are found by the code's place.
        assert!(Code::ALL.iter().enumerate().all(|(place, (code, _))| *code as usize == place));
    }

    fn any_id() -> impl Strategy<Value = Id<'static>> {
        prop_oneof![
            any::<i64>().prop_map(|number| Id::Integer(number.into())),
            any::<i128>().prop_map(Id::Integer),
            "-?[1-9][0-9]{40,254}".prop_map(|digits| Id::from_text(&digits).into_owned()),
            any::<String>().prop_map(|text| Id::Text(text.into())),
        ]
    }

    fn any_packet() -> impl Strategy<Value = Packet<'static>> {
        let text = || any::<String>().prop_map(Cow::<'static, str>::Owned);
        let maybe = move || prop::option::of(text());
        let from_one = || prop::option::of(1..=u64::MAX);
        prop_oneof![
            (any_id(), any_id(), text(), from_one(), any::<bool>(), maybe()).prop_map(
                |(srcid, policy, payload, timeout, once, msgid)| {
                    let payload_size = Some(payload.len() as u64);
                    let data = Data::new(srcid, policy, payload);
                    Packet::Data(Data { payload_size, timeout, once, msgid, ..data })
                }
            ),
            (any_id(), any_id(), 1..=u16::MAX, any::<Option<u64>>(), from_one(), maybe()).prop_map(
                |(id, policy, port, lease, capacity, token)| {
                    let setup = Setup::new(id, policy, port);
                    Packet::Setup(Setup { lease, capacity, token, ..setup })
                }
            ),
            (any_id(), any_id(), text(), any::<Option<u64>>(), maybe(), maybe()).prop_map(
                |(srcid, destid, payload, lease, result, encoding)| {
                    Packet::Ack(Ack { lease, result, encoding, ..Ack::new(srcid, destid, payload) })
                }
            ),
            (any_id(), text(), text()).prop_map(|(destid, reason, code)| {
                Packet::Refusal(Refusal { destid, reason, code })
            }),
        ]
    }

    /// Patterns of the field names and values from which a test builds packets and near-packets.
    const FIELD: &str = "type|srcid|id|privPoliId|payload|listenport|timeout|once|msgid|x";
    const VALUE: &str = r#"0|1|2|3|-1|-0|"1"|null|true|\[\]|1e999|[1-9][0-9]{39}|"\\ud800""#;

    proptest! {
        #[test]
        fn what_the_writer_writes_the_reader_reads(packet in any_packet()) {
            let line = packet.to_line();
            prop_assert_eq!(&Packet::parse(&line).unwrap(), &packet);
            let end = line.len() - 1;
            prop_assert_eq!(memchr::memchr(b'\n', &line), Some(end), "one line");
            // Compact: white space only in strings.
            let fields: HashMap<String, &RawValue> = serde_json::from_slice(&line).unwrap();
            prop_assert_eq!(serde_json::to_string(&fields).unwrap().len(), end);
        }

        #[test]
        fn a_setup_packet_in_strings_is_read_as_it_was(packet in any_packet()) {
            if let Packet::Setup(setup) = packet {
                let line = setup.to_line_of_strings();
                prop_assert_eq!(Packet::parse(&line).unwrap(), Packet::Setup(setup));
            }
        }

        #[test]
        fn whatever_is_read_can_be_written_and_read_again(
            fields in prop::collection::vec((FIELD, VALUE), 0..8)
        ) {
            let fields: Vec<_> =
                fields.iter().map(|(field, value)| format!("\"{field}\":{value}")).collect();
            let text = format!("{{{}}}", fields.join(","));
            if let Ok(packet) = Packet::parse(text.as_bytes()) {
                let line = packet.to_line();
                prop_assert_eq!(&Packet::parse(&line).unwrap().to_line(), &line);
            }
        }
    }
}
