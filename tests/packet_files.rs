//! Every packet file in `packets` is delivered, and every one in `packets/invalid` refused with its
//! own reason.

use std::collections::BTreeSet;
use std::fs;

use revproc::protocol::Id;
use revproc::protocol::packet_file::{self, ClientFields};

use crate::support::{Peer, client, proxy, registered};

/// The files of a folder, which are none of them folders.
fn files(folder: &str) -> BTreeSet<String> {
    fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap())
        .filter(|entry| entry.file_type().unwrap().is_file())
        .map(|entry| entry.file_name().into_string().unwrap())
        .collect()
}

#[test]
fn every_sample_is_delivered_and_verified() {
    let names = files("packets");
    assert!(names.len() >= 7, "{names:?}");
    let packets: Vec<_> = names
        .iter()
        .flat_map(|name| {
            let content = fs::read(format!("packets/{name}")).unwrap();
            packet_file::read(&content, &ClientFields::new(Id::ZERO))
                .unwrap_or_else(|error| panic!("{name}: {error}"))
        })
        .collect();
    let policies: BTreeSet<_> = packets.iter().map(|packet| packet.policy.as_str()).collect();
    let proxy = proxy(&[]);
    let servers: Vec<_> =
        policies.iter().map(|policy| registered("1", policy, &proxy, &[])).collect();
    let paths: Vec<_> = names.iter().map(|name| format!("packets/{name}")).collect();
    let (status, out, err) =
        client(proxy.1, &paths.iter().map(String::as_str).collect::<Vec<_>>(), &[]);
    assert_eq!(status.code(), Some(0), "{out:#?}{err:#?}");
    let verified = out.iter().filter(|line| *line == "Hash of payload is correct").count();
    assert_eq!(verified, packets.len(), "{out:#?}");
    assert!(packets.len() > names.len(), "some samples hold several packets");
    // The client corrected what the files say, so nobody complains of a wrong payloadsize.
    for program in servers.iter().chain([&proxy.0]) {
        assert!(program.complaints().is_empty(), "{}", program.report());
    }
}

/// What the proxy says to the same bytes on the wire.
enum Wire {
    /// It refuses the packet for the reason that the client gives, and the connection goes on.
    Agrees,
    /// It refuses the packet, for a reason with these words, and the connection goes on.
    Refuses(&'static str),
    /// It refuses what is no JSON object, for a reason with these words, and closes.
    Closes(&'static str),
    /// There it is something else: a packet of another kind, or no packet at all.
    Elsewise,
}

use Wire::{Agrees, Closes, Elsewise, Refuses};

/// Each file with what the client says of it, and the proxy.
const EXPECTED: &[(&str, &str, Wire)] = &[
    (
        "ack-packet.json",
        r#"line 1, column 1: this is no data packet; a client sends "type": 0"#,
        Refuses("an ack only from a server"),
    ),
    (
        "array.json",
        r#"line 1, column 1: this is a JSON array; packets stand one after another, not in an array"#,
        Closes(r#"this is a JSON array; packets stand one after another, not in an array"#),
    ),
    (
        "bare-names.json",
        r#"line 2, column 3: key must be a string; the names of fields stand in double quotes"#,
        Closes(
            r#"not JSON: key must be a string at line 2 column 3; the names of fields stand in double quotes"#,
        ),
    ),
    (
        "comment-at-the-end.json",
        r#"line 8, column 1: this is a comment; JSON has no comments, so take them out"#,
        Elsewise,
    ),
    (
        "comment-in-c.json",
        r#"line 3, column 3: key must be a string; JSON has no comments, so take them out"#,
        Closes(
            r#"not JSON: key must be a string at line 3 column 3; JSON has no comments, so take them out"#,
        ),
    ),
    (
        "comment-with-hash.json",
        r#"line 1, column 1: this is a comment; JSON has no comments, so take them out"#,
        Closes(r#"this is a comment; JSON has no comments, so take them out"#),
    ),
    (
        "comments.json",
        r#"line 2, column 14: key must be a string; JSON has no comments, so take them out"#,
        Closes(
            r#"not JSON: key must be a string at line 2 column 14; JSON has no comments, so take them out"#,
        ),
    ),
    (
        "empty.json",
        r#"line 1, column 1: there is no packet; write one such as {"type": 0, "srcid": 50, "privPoliId": "PP_1", "payload": "hello"}"#,
        Elsewise,
    ),
    ("leading-zero.json", "line 3, column 13: invalid number", Closes("not JSON: invalid number")),
    (
        "line-break-in-payload.json",
        r#"line 6, column 17: control character (\u0000-\u001F) found while parsing a string"#,
        Closes("not JSON: control character"),
    ),
    ("missing-colon.json", "line 3, column 11: expected `:`", Closes("not JSON: expected `:`")),
    (
        "missing-comma.json",
        "line 4, column 3: expected `,` or `}`",
        Closes("not JSON: expected `,` or `}`"),
    ),
    ("no-payload.json", r#"line 1, column 1: field "payload" is missing"#, Agrees),
    ("no-policy.json", r#"line 1, column 1: field "privPoliId" is missing"#, Agrees),
    ("no-type.json", r#"line 1, column 1: field "type" is missing"#, Agrees),
    (
        "not-utf-8.json",
        "line 6, column 17: not UTF-8, which JSON is written in",
        Closes("not UTF-8 at line 6 column 17"),
    ),
    (
        "payload-half-a-surrogate-pair.json",
        r#"line 1, column 1: field "payload" must be a string, but is no valid Unicode: it has half of a surrogate pair"#,
        Agrees,
    ),
    (
        "payload-null.json",
        r#"line 1, column 1: field "payload" must be a string, but is null"#,
        Agrees,
    ),
    (
        "payload-number.json",
        r#"line 1, column 1: field "payload" must be a string, but is an integer"#,
        Agrees,
    ),
    (
        "payload-object.json",
        r#"line 1, column 1: field "payload" must be a string, but is an object"#,
        Agrees,
    ),
    (
        "policies-differ.json",
        r#"line 1, column 1: fields "privPoliId" and "privPolyId" differ"#,
        Agrees,
    ),
    (
        "policy-array.json",
        r#"line 1, column 1: field "privPoliId" must be an integer or a string, but is an array"#,
        Agrees,
    ),
    (
        "policy-fraction.json",
        r#"line 1, column 1: field "privPoliId" must be an integer or a string, but is a number with a fraction or an exponent"#,
        Agrees,
    ),
    ("policy-twice.json", r#"line 1, column 1: field "privPoliId" is given twice"#, Agrees),
    (
        "second-packet-wrong.json",
        r#"line 8, column 1: field "payload" must be a string, but is true"#,
        Elsewise,
    ),
    (
        "setup-packet.json",
        r#"line 1, column 1: this is no data packet; a client sends "type": 0"#,
        Elsewise,
    ),
    (
        "single-quotes.json",
        r#"line 2, column 3: key must be a string; JSON has double quotes only (in Python, json.dumps writes them)"#,
        Closes(
            r#"not JSON: key must be a string at line 2 column 3; JSON has double quotes only (in Python, json.dumps writes them)"#,
        ),
    ),
    (
        "string.json",
        r#"line 1, column 1: this is a JSON string; a packet is an object and begins with "{""#,
        Closes(r#"this is a JSON string; a packet is an object and begins with "{""#),
    ),
    (
        "text.json",
        r#"line 1, column 1: not JSON: a packet is an object and begins with "{""#,
        Closes(r#"not JSON: a packet is an object and begins with "{""#),
    ),
    (
        "trailing-comma.json",
        "line 7, column 1: trailing comma",
        Closes("not JSON: key must be a string at line 7"),
    ),
    (
        "type-negative.json",
        r#"line 1, column 1: field "type" must be a whole number, 0 or more, but is -1"#,
        Agrees,
    ),
    (
        "type-unknown.json",
        "line 1, column 1: no packet has type 7: 0 is data, 1 setup, 2 ack, 3 refusal",
        Agrees,
    ),
    (
        "type-word.json",
        r#"line 1, column 1: field "type" must be a whole number, 0 or more, but is a string"#,
        Agrees,
    ),
    (
        "typographic-quotes.json",
        r#"line 2, column 3: key must be a string; these are typographic quotes, as PDFs and word processors make them; JSON has " only"#,
        Closes(
            r#"not JSON: key must be a string at line 2 column 3; these are typographic quotes, as PDFs and word processors make them; JSON has " only"#,
        ),
    ),
    (
        "unknown-escape.json",
        r#"line 6, column 18: invalid escape; in JSON a backslash is written twice: \\"#,
        Closes(
            r#"not JSON: invalid escape at line 6 column 18; in JSON a backslash is written twice: \\"#,
        ),
    ),
    ("unknown-field-twice.json", r#"line 1, column 1: field "note" is given twice"#, Agrees),
    (
        "unterminated-object.json",
        "line 7, column 1: EOF while parsing an object",
        Closes("closed inside a packet"),
    ),
    (
        "unterminated-string.json",
        "line 6, column 19: EOF while parsing a string",
        Closes("closed inside a packet"),
    ),
    (
        "utf-16.json",
        r#"line 1, column 1: this is UTF-16; packets are written in UTF-8"#,
        Closes(r#"this is UTF-16; packets are written in UTF-8"#),
    ),
    (
        "white-space.json",
        r#"line 1, column 1: there is no packet; write one such as {"type": 0, "srcid": 50, "privPoliId": "PP_1", "payload": "hello"}"#,
        Elsewise,
    ),
    (
        "words-after-the-packet.json",
        r#"line 8, column 1: not JSON: a packet is an object and begins with "{""#,
        Elsewise,
    ),
    (
        "backslash.json",
        r#"line 5, column 18: invalid escape; in JSON a backslash is written twice: \\"#,
        Closes(
            r#"not JSON: invalid escape at line 5 column 18; in JSON a backslash is written twice: \\"#,
        ),
    ),
    (
        "python-literals.json",
        r#"line 6, column 11: expected value; JSON has true, false and null (in Python, json.dumps writes them)"#,
        Closes(
            r#"not JSON: expected value at line 6 column 11; JSON has true, false and null (in Python, json.dumps writes them)"#,
        ),
    ),
    (
        "markdown.json",
        r#"line 1, column 1: not JSON: a packet is an object and begins with "{""#,
        Closes(r#"not JSON: a packet is an object and begins with "{""#),
    ),
    (
        "encoded-twice.json",
        r#"line 1, column 1: this is a JSON string that holds JSON, so it was encoded twice; send the object itself"#,
        Closes(
            r#"this is a JSON string that holds JSON, so it was encoded twice; send the object itself"#,
        ),
    ),
    (
        "length-in-digits.json",
        r#"line 1, column 1: a length stands before the packet, which needs none: it ends with its last brace"#,
        Closes(
            r#"a length stands before the packet, which needs none: it ends with its last brace"#,
        ),
    ),
    (
        "length-in-binary.json",
        r#"line 1, column 1: a length stands before the packet, which needs none: it ends with its last brace"#,
        Closes(
            r#"a length stands before the packet, which needs none: it ends with its last brace"#,
        ),
    ),
    (
        "http-request.json",
        r#"line 1, column 1: this is HTTP, not a JSON packet"#,
        Closes(r#"this is HTTP, not a JSON packet"#),
    ),
];

#[test]
fn every_wrong_file_has_an_expectation() {
    let expected: BTreeSet<_> = EXPECTED.iter().map(|(name, ..)| (*name).to_owned()).collect();
    assert!(!expected.is_empty());
    assert_eq!(files("packets/invalid"), expected);
    assert_eq!(EXPECTED.len(), expected.len(), "no file is expected twice");
}

#[test]
fn the_client_refuses_each_wrong_file_with_its_own_reason_and_sends_nothing() {
    let (mut proxy, port) = proxy(&[]);
    for (name, reason, _) in EXPECTED {
        let path = format!("packets/invalid/{name}");
        // The packet before it in the same command is not sent either.
        let (status, out, err) = client(port, &["packets/hello.json", &path], &[]);
        assert_eq!(err, [format!("client: {path}: {reason}")]);
        assert_eq!(status.code(), Some(2), "{name}");
        assert!(out.is_empty(), "{name}: {out:#?}");
    }
    proxy.signal(crate::support::Signal::TERM);
    assert!(proxy.end().success());
    proxy.warning("stopped after 0 messages");
}

#[test]
fn the_proxy_refuses_the_same_packets_on_the_wire() {
    let proxy = proxy(&[]);
    let _server = registered("1", "PP_1", &proxy, &[]);
    for (name, told, wire) in EXPECTED {
        let (reason, goes_on) = match wire {
            Agrees => (told.trim_start_matches("line 1, column 1: "), true),
            Refuses(reason) => (*reason, true),
            Closes(reason) => (*reason, false),
            Elsewise => continue,
        };
        let mut peer = Peer::connect(proxy.1);
        peer.send(fs::read(format!("packets/invalid/{name}")).unwrap());
        if name.starts_with("unterminated") {
            peer.half_close();
        }
        let refusal = peer.packet();
        assert_eq!(refusal["code"], "bad-packet", "{name}: {refusal}");
        assert!(refusal["payload"].as_str().unwrap().contains(reason), "{name}: {refusal}");
        if goes_on {
            peer.send(crate::support::message("7", "PP_1", "x"));
            assert_eq!(peer.packet()["type"], 2, "{name}");
        } else {
            assert_eq!(peer.line(), "", "{name}");
        }
    }
}
