//! Why a message has no reply.

use std::fmt::{self, Write as _};

use crate::cli::escape::{EscapeWriter, Escaped, EscapedReason};
use crate::protocol::Code;

/// Why a message has no reply. It displays as what happened, in words, without what could change a
/// terminal.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// No proxy could be connected to, for these reasons. Nothing was sent.
    Unreachable(String),
    /// The proxy ended the connection without a whole answer.
    Closed(String),
    /// No answer came in time.
    Timeout(String),
    /// What answered is no proxy, or its answer is no reply to a message.
    BadAnswer(String),
    /// The proxy or a server refused the message.
    Refused {
        /// The reason for programs; `None` if it is none of the protocol's.
        code: Option<Code>,
        /// The reason for people, as it came.
        reason: String,
    },
    /// A proxy that does not know the protocol's refusals refused the message in these words.
    ForeignRefusal(String),
    /// The ack carries another hash than the message's: it did not arrive as it was sent.
    Altered {
        /// The server that acked it.
        server: String,
    },
    /// The message arrived as it was sent, but the result in its ack cannot be read.
    BadResult {
        /// The server that acked it.
        server: String,
        /// What is wrong with the result.
        reason: String,
    },
}

impl Error {
    /// Returns whether the same message may be sent again a moment later, and may then succeed. For
    /// one that is to be carried out `once`, also whether certainly nobody has carried it out.
    pub fn may_repeat(&self, once: bool) -> bool {
        match self {
            Error::Unreachable(_) => true,
            Error::Refused { code: Some(code), .. } => match code {
                Code::NoServer | Code::Unreachable | Code::Overloaded => true,
                Code::Timeout => !once,
                _ => false,
            },
            Error::Closed(_) | Error::Timeout(_) | Error::ForeignRefusal(_) => !once,
            Error::Refused { code: None, .. }
            | Error::BadAnswer(_)
            | Error::Altered { .. }
            | Error::BadResult { .. } => false,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Unreachable(reason)
            | Error::Closed(reason)
            | Error::Timeout(reason)
            | Error::BadAnswer(reason) => EscapeWriter(f).write_str(reason),
            Error::Refused { reason, .. } | Error::ForeignRefusal(reason) => {
                write!(f, "{}", EscapedReason(reason))
            }
            Error::Altered { server } => {
                write!(f, "the ack of server {} has another hash", Escaped(server))
            }
            Error::BadResult { server, reason } => {
                write!(f, "the result of server {} cannot be read: {reason}", Escaped(server))
            }
        }
    }
}

impl std::error::Error for Error {}
