//! Why no packet came.

use std::fmt;
use std::io;

use crate::net::os_error::reason;
use crate::protocol::diagnose::Foreign;

/// What came instead of a packet.
#[derive(Debug)]
pub enum ReceiveError {
    /// The packet is longer than the limit. Nothing after it can be read.
    TooLarge {
        /// The limit in bytes.
        limit: usize,
    },
    /// The packet is long, and the budget has no memory left for it. Nothing after it can be read.
    NoMemory,
    /// Bytes that cannot begin a packet. Nothing after them can be read.
    NotAnObject(Foreign),
    /// The stream ended inside a packet, after this many of its bytes.
    Truncated(usize),
    /// The packet that had begun was not complete by the deadline.
    Slow(usize),
    /// No packet began before the deadline.
    Idle,
    /// The connection broke.
    Io(io::Error),
}

impl fmt::Display for ReceiveError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ReceiveError::TooLarge { limit } => {
                write!(f, "the packet is longer than the limit of {limit} bytes")
            }
            ReceiveError::NoMemory => f.write_str(
                "other long packets have taken all the memory there is for them (-max-memory); send this one again later",
            ),
            ReceiveError::NotAnObject(what) => what.fmt(f),
            ReceiveError::Truncated(bytes) => {
                write!(f, "the connection was closed inside a packet, after {bytes} bytes of it")
            }
            ReceiveError::Slow(bytes) => {
                write!(f, "the packet was not complete in time, only {bytes} bytes of it came")
            }
            ReceiveError::Idle => f.write_str("nothing came in time"),
            ReceiveError::Io(error) => f.write_str(&reason(error)),
        }
    }
}
