//! Why a hash is not the right one.

use revproc::protocol::hash;
use serde_json::Value;
use sha1::{Digest, Sha1};

use super::{Failure, Verdict, shown};
use crate::support::peers::dumps;

/// Checks the hash that an ack carries; `earlier` are the payloads of the messages before it.
pub fn check_hash(ack: &Value, payload: &str, earlier: &[&str]) -> Verdict {
    let Some(came) = ack.get("payload") else {
        return Err(Failure::came(format!("an answer without payload: {}", shown(ack))));
    };
    let right = hash(payload);
    if came.as_str() == Some(&right) {
        return Ok(());
    }
    let shown = format!("the payload {came}, where the SHA-1 is {right}");
    Err(match came.as_str().and_then(|came| explain(came, payload, earlier)) {
        Some(why) => Failure::because(shown, why),
        None => Failure::came(shown),
    })
}

fn explain(came: &str, payload: &str, earlier: &[&str]) -> Option<String> {
    let of = |bytes: &[u8]| hex::encode(Sha1::digest(bytes));
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
            came == hash(&dumps(payload)) || came == hash(&Value::from(payload).to_string()),
            "It is the SHA-1 of the text as JSON, with its quotation marks or escapes. Look at what is hashed: the text itself, after the packet is parsed.",
        ),
        (
            came == hash(&format!("{payload}\n")),
            "It is the SHA-1 of the text with a line break behind it. Look for one that is added or not taken off.",
        ),
        (
            came == hash(""),
            "It is the SHA-1 of nothing. Look at whether the text is given to the hash before it is asked for the digest.",
        ),
        (
            came.eq_ignore_ascii_case(&hash(payload)),
            "The digits are right, but in capitals: a client that compares texts sees a difference.",
        ),
        (came == payload, "It is the text itself, not its hash."),
        (digits && came.len() == 32, "32 digits are MD5's length; SHA-1 has 40."),
        (digits && came.len() == 64, "64 digits are SHA-256's length; SHA-1 has 40."),
    ];
    guesses.into_iter().find(|(fits, _)| *fits).map(|(_, why)| why.to_owned())
}
