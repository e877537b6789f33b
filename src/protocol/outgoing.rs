//! A message that is ready to be sent, with what its ack is judged by.

use super::{Data, Packet, hash};

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
    /// Its time in seconds, if it has one of its own.
    pub timeout: Option<u64>,
    /// Whether it must not be carried out twice.
    pub once: bool,
}

impl Outgoing {
    /// Returns the message of this packet, as we write it.
    pub fn new(data: &Data<'_>) -> Self {
        let line = Packet::Data(data.clone()).to_line();
        Self::with_line(data, line)
    }

    /// Returns the message of this packet, which is written as `line`.
    pub(super) fn with_line(data: &Data<'_>, line: Vec<u8>) -> Self {
        Outgoing {
            line,
            policy: data.policy.text().into_owned(),
            payload: data.payload.to_string(),
            hash: hash(&data.payload),
            timeout: data.timeout,
            once: data.once,
        }
    }
}
