//! What a server's ack says.

use base64::Engine;
use base64::alphabet::STANDARD;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};

use super::Error;
use crate::cli::escape::Escaped;
use crate::protocol::Ack;

/// Standard base64, with its padding or without.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// A server's reply to a message, which arrived there as it was sent.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Reply {
    /// The server's id.
    pub server: String,
    /// What the server computed, if it did more than hash the message.
    pub result: Option<Vec<u8>>,
}

/// An ack that was not judged yet.
#[derive(Debug)]
pub(super) struct Answer {
    /// The server's id.
    pub server: String,
    /// The hash that it returned.
    pub payload: String,
    /// Whether that is the message's.
    pub is_intact: bool,
    /// The result, or why it cannot be read.
    pub result: Result<Option<Vec<u8>>, String>,
}

impl Answer {
    pub fn new(ack: &Ack<'_>, hash: &str) -> Self {
        Answer {
            server: ack.srcid.to_string(),
            payload: ack.payload.to_string(),
            is_intact: ack.payload == hash,
            result: result(ack),
        }
    }

    pub fn into_reply(self) -> Result<Reply, Error> {
        let server = self.server;
        if !self.is_intact {
            return Err(Error::Altered { server });
        }
        match self.result {
            Ok(result) => Ok(Reply { server, result }),
            Err(reason) => Err(Error::BadResult { server, reason }),
        }
    }
}

/// Returns the bytes of an ack's result.
fn result(ack: &Ack<'_>) -> Result<Option<Vec<u8>>, String> {
    let Some(text) = &ack.result else { return Ok(None) };
    match ack.encoding.as_deref() {
        None => Ok(Some(text.as_bytes().to_vec())),
        Some("base64") => {
            // Many encoders break the lines.
            let digits: Vec<_> = text.bytes().filter(|byte| !byte.is_ascii_whitespace()).collect();
            let bytes = BASE64.decode(digits).map_err(|error| {
                let error = error.to_string().to_lowercase();
                format!("it is no base64: {}", error.trim_end_matches('.'))
            })?;
            Ok(Some(bytes))
        }
        Some(other) => Err(format!(
            "its encoding is \"{}\", which is not known here; base64 is",
            Escaped(other)
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::Id;

    fn of(result: &str, encoding: Option<&'static str>) -> Result<Option<Vec<u8>>, String> {
        let ack = Ack::new(Id::ZERO, Id::ZERO, "");
        super::result(&Ack {
            result: Some(result.into()),
            encoding: encoding.map(Into::into),
            ..ack
        })
    }

    #[test]
    fn a_result_is_text_or_base64_with_or_without_padding_and_line_breaks() {
        assert_eq!(super::result(&Ack::new(Id::ZERO, Id::ZERO, "")), Ok(None));
        assert_eq!(of("", None), Ok(Some(vec![])));
        assert_eq!(of("aGk=", None), Ok(Some(b"aGk=".to_vec())));
        for text in ["/wBoaQ==", "/wBoaQ", "/wB\r\noaQ==\n"] {
            assert_eq!(of(text, Some("base64")), Ok(Some(b"\xff\0hi".to_vec())), "{text:?}");
        }
        assert_eq!(of("", Some("base64")), Ok(Some(vec![])));
    }

    #[test]
    fn a_result_that_cannot_be_read_is_told_with_the_reason() {
        assert_eq!(
            of("a*b=", Some("base64")).unwrap_err(),
            "it is no base64: invalid symbol 42, offset 1"
        );
        assert!(of("a", Some("base64")).unwrap_err().starts_with("it is no base64: "));
        let unknown = "its encoding is \"gz\\n\", which is not known here; base64 is";
        assert_eq!(of("x", Some("gz\n")).unwrap_err(), unknown);
    }
}
