//! Why a hash is not the right one.

use base64::Engine;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use revproc::protocol::hash;
use serde_json::Value;
use sha1::{Digest, Sha1};

use super::{Failure, Verdict, shown};
use crate::support::peers::dumps;

/// Checks the hash that an ack carries; `earlier` are the payloads of the messages before it.
pub fn check_hash(ack: &Value, payload: &str, earlier: &[&str]) -> Verdict {
    check(ack, payload, earlier, None)
}

/// As [`check_hash`], for the first message, which came as this packet.
pub fn check_hash_of(ack: &Value, payload: &str, packet: &str) -> Verdict {
    check(ack, payload, &[], Some(packet))
}

fn check(ack: &Value, payload: &str, earlier: &[&str], packet: Option<&str>) -> Verdict {
    let Some(came) = ack.get("payload") else {
        return Err(Failure::came(format!("an answer without payload: {}", shown(ack))));
    };
    let right = hash(payload);
    if came.as_str() == Some(&right) {
        return Ok(());
    }
    let shown = format!("the payload {came}, where the SHA-1 is {right}");
    Err(match came.as_str().and_then(|came| explain(came, payload, earlier, packet)) {
        Some(why) => Failure::because(shown, why),
        None => Failure::came(shown),
    })
}

fn explain(came: &str, payload: &str, earlier: &[&str], packet: Option<&str>) -> Option<String> {
    let of = |bytes: &[u8]| hex::encode(Sha1::digest(bytes));
    let right = hash(payload);
    let digest = Sha1::digest(payload.as_bytes());
    let quoted = [dumps(payload), Value::from(payload).to_string(), format!("'{payload}'")];
    let breaks = ["\n", "\r\n", " ", "\0"];
    let latin: Vec<u8> = payload.chars().map(|c| u8::try_from(c).unwrap_or(b'?')).collect();
    let utf_16: Vec<u8> = payload.encode_utf16().flat_map(u16::to_le_bytes).collect();
    let whole = earlier.concat() + payload;
    let digits = came.chars().all(|c| c.is_ascii_hexdigit());
    let guesses = [
        (
            came == of(&latin),
            "It is the SHA-1 of the text in Latin-1. Both sides must turn the text into the same bytes: look at the encoding in which it is hashed; the homework's JSON is UTF-8.",
        ),
        (
            came == of(&utf_16),
            "It is the SHA-1 of the text in UTF-16. Look at the encoding in which it is hashed: JSON is UTF-8.",
        ),
        (
            !earlier.is_empty() && came == hash(&whole),
            "It is the SHA-1 of this text and those before it together: a hash object collects all that it is given. Look at where it is made, and how many messages it lives for.",
        ),
        (
            quoted.iter().any(|quoted| came == hash(quoted)),
            "It is the SHA-1 of the text as JSON, with its quotation marks or escapes. Look at what is hashed: the text itself, after the packet is parsed.",
        ),
        (
            breaks.iter().any(|end| came == hash(&format!("{payload}{end}"))),
            "It is the SHA-1 of the text with a line break, a space or a zero byte behind it. Look for one that is added or not taken off.",
        ),
        (
            packet.is_some_and(|packet| is_of_packet(came, packet)),
            "It is the SHA-1 of the whole packet. Look at what is hashed: the text in its payload alone, after the packet is parsed.",
        ),
        (
            came == hash(&right) || came == of(&digest),
            "It is the SHA-1 of the right SHA-1: the hash is hashed once more.",
        ),
        (
            came.trim_end_matches('=') == STANDARD_NO_PAD.encode(digest),
            "It is the right SHA-1, but in base64: the homework's hash is written in hexadecimal digits. Look at how the digest becomes text.",
        ),
        (
            came != right && came == right.trim_start_matches('0'),
            "The zeros in front are missing: a hash has always 40 digits. Look at how the digest becomes text; as one number, it loses them.",
        ),
        (
            came.len() > 40 && came.to_lowercase().contains(&right),
            "The hash is right, but there is more than its 40 digits in the payload.",
        ),
        (
            digits_of(came) == right && came.len() != 40,
            "The digits are right, but with something between or around them: the homework's hash is its 40 digits alone.",
        ),
        (
            came == hash(""),
            "It is the SHA-1 of nothing. Look at whether the text is given to the hash before it is asked for the digest.",
        ),
        (
            came.eq_ignore_ascii_case(&right),
            "The digits are right, but in capitals: a client that compares texts sees a difference.",
        ),
        (came == payload, "It is the text itself, not its hash."),
        (
            ["b'", "b\"", "\\x"].iter().any(|start| came.starts_with(start)),
            "It is how Python prints bytes. Look at how the digest becomes text: in 40 hexadecimal digits.",
        ),
        (digits && came.len() == 32, "32 digits are MD5's length; SHA-1 has 40."),
        (digits && came.len() == 64, "64 digits are SHA-256's length; SHA-1 has 40."),
    ];
    guesses.into_iter().find(|(fits, _)| *fits).map(|(_, why)| why.to_owned())
}

/// Returns whether it is the hash of a packet: as it was sent, or written anew by JavaScript or Python;
/// with a line break or without.
fn is_of_packet(came: &str, packet: &str) -> bool {
    let compact = packet.replace("\": ", "\":").replace(", \"", ",\"");
    let forms = [packet.to_owned(), compact, packet.replace('"', "'")];
    forms.iter().any(|form| came == hash(form) || came == hash(&format!("{form}\n")))
}

fn digits_of(text: &str) -> String {
    text.to_lowercase().trim_start_matches("0x").chars().filter(char::is_ascii_hexdigit).collect()
}
