//! What was sent or written in place of a packet, in words: other protocols, other encodings, and the
//! usual slips in JSON. The same for what comes from a socket and what stands in a file.

use std::fmt;

use serde_json::Value;

use super::framer::BYTE_ORDER_MARK;

const UTF_16: &str = "this is UTF-16; packets are written in UTF-8";
const COMMENT: &str = "this is a comment; JSON has no comments, so take them out";

/// A length that stands before a packet has at most this many bytes.
const MAX_PREFIX: usize = 8;

/// What begins otherwise than a packet does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Foreign {
    /// A request or an answer of HTTP.
    Http,
    /// Something else that is known, in words.
    Known(&'static str),
    /// Anything else.
    Other,
}

impl Foreign {
    /// What these bytes are, which stand where a packet should begin, and do not begin one. They need
    /// not be all that was sent.
    pub fn at(bytes: &[u8]) -> Self {
        Foreign::Known(match bytes {
            [0x16 | 0x15, 0x03, ..] => {
                "this is TLS, not a JSON packet; packets are sent without encryption"
            }
            _ if bytes.starts_with(b"SSH-") => "this is SSH, not a JSON packet",
            [0xff, 0xfe, ..] | [0xfe, 0xff, ..] | [0, b'{', 0, ..] => UTF_16,
            _ if bytes.starts_with(&BYTE_ORDER_MARK) => {
                "a byte order mark stands between packets; it may stand before the first one only"
            }
            [b'[', ..] => "this is a JSON array; packets stand one after another, not in an array",
            [b'"', rest @ ..] if rest.trim_ascii_start().starts_with(b"{") => {
                "this is a JSON string that holds JSON, so it was encoded twice; send the object itself"
            }
            [b'"', ..] => "this is a JSON string; a packet is an object and begins with \"{\"",
            [b'/', b'/' | b'*', ..] => COMMENT,
            [b'#', ..] if comes_to_a_packet(bytes) => COMMENT,
            _ if has_length_prefix(bytes) => {
                "a length stands before the packet, which needs none: it ends with its last brace"
            }
            _ if is_http(bytes) => return Foreign::Http,
            _ => return Foreign::Other,
        })
    }

    /// What to do where a reverse proxy was expected.
    pub fn hint(self) -> &'static str {
        if self == Foreign::Http { " (is that the port of its -status page?)" } else { "" }
    }
}

impl fmt::Display for Foreign {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Foreign::Http => "this is HTTP, not a JSON packet",
            Foreign::Known(words) => words,
            Foreign::Other => "not JSON: a packet is an object and begins with \"{\"",
        })
    }
}

/// Whether the first line is that of a request or an answer.
fn is_http(bytes: &[u8]) -> bool {
    let line = bytes.split(|byte| *byte == b'\n').next().unwrap_or(bytes);
    line.starts_with(b"HTTP/") || memchr::memmem::find(line, b" HTTP/").is_some()
}

/// Whether nothing but an object follows the lines that begin with `#`: a text in Markdown begins so, too.
fn comes_to_a_packet(bytes: &[u8]) -> bool {
    let mut lines = bytes.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii);
    let next = lines.find(|line| !line.is_empty() && !line.starts_with(b"#"));
    next.is_none_or(|line| line.starts_with(b"{"))
}

/// Whether a length stands before a brace: digits, or bytes that are no text, as Java's `writeUTF` and
/// Python's `struct.pack` make them.
fn has_length_prefix(bytes: &[u8]) -> bool {
    let Some(brace) = memchr::memchr(b'{', bytes) else { return false };
    let (prefix, packet) = bytes.split_at(brace);
    // A length whose last byte is that of a brace.
    let is_whole = packet
        .get(1)
        .is_none_or(|next| matches!(next, b'"' | b'{' | b'}') || next.is_ascii_whitespace());
    let (digits, separator) =
        prefix.split_at(prefix.iter().take_while(|byte| byte.is_ascii_digit()).count());
    let is_decimal = !digits.is_empty() && matches!(separator.trim_ascii(), b"" | b":" | b",");
    let is_binary = prefix.len() <= MAX_PREFIX
        && prefix
            .iter()
            .any(|byte| !byte.is_ascii() || byte.is_ascii_control() && !byte.is_ascii_whitespace());
    is_whole && (is_decimal || is_binary)
}

/// Line and column, from 1, of what follows `before`.
pub fn place(before: &[u8]) -> (usize, usize) {
    let line = 1 + memchr::memchr_iter(b'\n', before).count();
    (line, 1 + before.len() - memchr::memrchr(b'\n', before).map_or(0, |at| at + 1))
}

/// What a parser says of text, without the place.
pub fn json_reason(error: &serde_json::Error) -> String {
    let full = error.to_string();
    let place = format!(" at line {} column {}", error.line(), error.column());
    full.strip_suffix(&place).unwrap_or(&full).to_owned()
}

/// What to do about text that is not JSON, of which a parser says this.
pub fn json_hint(error: &serde_json::Error, text: &str) -> Option<&'static str> {
    let line = text.split('\n').nth(error.line().saturating_sub(1)).unwrap_or_default();
    let rest = line.get(error.column().saturating_sub(1)..).unwrap_or_default();
    hint(&error.to_string(), rest)
}

/// As [`json_hint`], for text that stops being JSON before `rest`.
fn hint(error: &str, rest: &str) -> Option<&'static str> {
    if error.starts_with("invalid escape") {
        return Some("in JSON a backslash is written twice: \\\\");
    }
    let begins_with = |word: &str| rest.starts_with(word);
    match rest.chars().next()? {
        '/' | '#' => Some("JSON has no comments, so take them out"),
        '\'' => Some("JSON has double quotes only (in Python, json.dumps writes them)"),
        '“' | '”' | '„' | '‘' | '’' | '‚' | '«' | '»' => Some(
            "these are typographic quotes, as PDFs and word processors make them; JSON has \" only",
        ),
        '\0' => Some(UTF_16),
        _ if ["True", "False", "None"].into_iter().any(begins_with) => {
            Some("JSON has true, false and null (in Python, json.dumps writes them)")
        }
        first
            if error.starts_with("key must be a string")
                && (first.is_alphabetic() || first == '_') =>
        {
            Some("the names of fields stand in double quotes")
        }
        _ => None,
    }
}

/// The words of a refusal by a program that does not know ours, such as `{"Error": "no server"}`; `None`
/// where the text is none.
pub fn foreign_refusal(text: &[u8]) -> Option<String> {
    let fields: serde_json::Map<String, Value> = serde_json::from_slice(text).ok()?;
    let words = ["error", "message", "reason"].iter().find_map(|name| {
        let (_, value) = fields.iter().find(|(key, _)| key.eq_ignore_ascii_case(name))?;
        value.as_str().filter(|words| !words.trim().is_empty())
    });
    match words {
        Some(words) => Some(words.to_owned()),
        // All of the protocol's packets have a type.
        None if !fields.contains_key("type") => Some(String::from_utf8_lossy(text).into_owned()),
        None => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_begins_otherwise_is_known_by_its_beginning() {
        let packet = "{\"type\":0}";
        let utf_16 = |order: fn(u16) -> [u8; 2]| -> Vec<u8> {
            packet.encode_utf16().flat_map(order).collect()
        };
        let cases: [(Vec<u8>, &str); 33] = [
            (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(), "this is HTTP"),
            (b"POST /x HTTP/1.1\r\n\r\n{\"type\":0}".to_vec(), "this is HTTP"),
            (b"PRI * HTTP/2.0\r\n".to_vec(), "this is HTTP"),
            (b"HTTP/1.1 400 Bad Request\r\n".to_vec(), "this is HTTP"),
            (b"GETTING".to_vec(), "not JSON: a packet"),
            (b"\x16\x03\x01\x02\x00\x01\x00".to_vec(), "this is TLS"),
            (b"\x15\x03\x01\x00\x02\x02\x16".to_vec(), "this is TLS"),
            (b"SSH-2.0-OpenSSH_9.6\r\n".to_vec(), "this is SSH"),
            (b"[{\"type\":0}]".to_vec(), "one after another, not in an array"),
            (b"\"{\\\"type\\\":0}\"".to_vec(), "encoded twice"),
            (b"\"\\n {".to_vec(), "this is a JSON string; a packet"),
            (b"\"hello\"".to_vec(), "this is a JSON string; a packet"),
            (b"10{\"type\":0}".to_vec(), "a length stands"),
            (b"10\n{\"type\":0}".to_vec(), "a length stands"),
            (b"10:{\"type\":0},".to_vec(), "a length stands"),
            (b"\x00\x0a{\"type\":0}".to_vec(), "a length stands"),
            (b"\x00\x00\x00\x0a{\"type\":0}".to_vec(), "a length stands"),
            (b"\x0a\x00\x00\x00{\"type\":0}".to_vec(), "a length stands"),
            (b"\x00\x00\x00\x00\x00\x00\x00\x0a{\"type\":0}".to_vec(), "a length stands"),
            (b"\x00{{\"type\":0}".to_vec(), "a length stands"),
            (b"\x01\x7f{".to_vec(), "a length stands"),
            (b"\x00\x00\x00\x00".to_vec(), "not JSON: a packet"),
            (b"10".to_vec(), "not JSON: a packet"),
            (b"10 apples {\"type\":0}".to_vec(), "not JSON: a packet"),
            ([&[0xff, 0xfe][..], &utf_16(u16::to_le_bytes)].concat(), "this is UTF-16"),
            ([&[0xfe, 0xff][..], &utf_16(u16::to_be_bytes)].concat(), "this is UTF-16"),
            (utf_16(u16::to_be_bytes), "this is UTF-16"),
            ("\u{feff}{\"type\":0}".as_bytes().to_vec(), "a byte order mark"),
            (b"# data\n\n# more\n {\"type\":0}".to_vec(), "this is a comment"),
            (b"// data\n{\"type\":0}".to_vec(), "this is a comment"),
            (b"# revproc\n\nA proxy: {\"type\":0}".to_vec(), "not JSON: a packet"),
            (b"hello".to_vec(), "not JSON: a packet"),
            (b"".to_vec(), "not JSON: a packet"),
        ];
        for (bytes, expected) in cases {
            let words = Foreign::at(&bytes).to_string();
            assert!(words.contains(expected), "{}: {words}", bytes.escape_ascii());
        }
    }

    #[test]
    fn a_foreign_refusal_has_its_own_words() {
        for (text, words) in [
            (r#"{"Error": "no server"}"#, Some("no server")),
            (r#"{"type": 3, "error": "no server"}"#, Some("no server")),
            (r#"{"status": "failed", "message": "no server"}"#, Some("no server")),
            (r#"{"status": "failed"}"#, Some(r#"{"status": "failed"}"#)),
            (r#"{"Error": ""}"#, Some(r#"{"Error": ""}"#)),
            (r#"{"type": 2, "srcid": 1}"#, None),
            ("[]", None),
            ("{", None),
        ] {
            assert_eq!(foreign_refusal(text.as_bytes()).as_deref(), words, "{text}");
        }
    }

    #[test]
    fn the_usual_slips_get_a_hint() {
        let key = "key must be a string";
        for (error, rest, expected) in [
            ("invalid escape", "U", "\\\\"),
            (key, "// x", "no comments"),
            ("expected value", "# x", "no comments"),
            (key, "'type'", "double quotes"),
            (key, "“type”", "typographic"),
            (key, "„type“", "typographic"),
            (key, "\0\"\0", "UTF-16"),
            ("expected value", "True", "true, false and null"),
            (key, "type: 0", "names of fields"),
        ] {
            let hint = hint(error, rest).unwrap_or_default();
            assert!(hint.contains(expected), "{rest}: {hint}");
        }
        for (error, rest) in
            [("expected value", "}"), ("expected value", "hello"), (key, "5"), (key, "")]
        {
            assert_eq!(hint(error, rest), None, "{rest}");
        }
    }
}
