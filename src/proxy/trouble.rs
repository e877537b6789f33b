//! What can go wrong between the proxy and a server, for one message.

use std::fmt;
use std::io::{self, ErrorKind};
use std::time::Duration;

use crate::cli::escape::Escaped;
use crate::net::connection::ReceiveError;
use crate::net::os_error::reason;
use crate::protocol::{Ack, Code, Id, Packet};

/// What went wrong with one try of a message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Trouble {
    /// No connection: refused, or not made in time. Nothing was sent.
    Unreachable(String),
    /// The connection ended before any of the ack came.
    Broken(String),
    /// No whole ack in time.
    Timeout(Duration),
    /// What came back was no ack for this message.
    BadAck(String),
    /// The server refused the message.
    Refused(String),
    /// The proxy itself lacks what a connection takes. Nothing was sent.
    Local(String),
    /// There was no place at the server, or others before it took its time. Nothing was sent, or
    /// nothing that it can be blamed for.
    Waited,
}

impl Trouble {
    /// The code of a refusal for this reason.
    pub fn code(&self) -> Code {
        match self {
            Trouble::Unreachable(_) | Trouble::Broken(_) => Code::Unreachable,
            Trouble::Timeout(_) => Code::Timeout,
            Trouble::BadAck(_) | Trouble::Refused(_) => Code::BadAck,
            Trouble::Local(_) | Trouble::Waited => Code::Overloaded,
        }
    }

    /// The server closed the connection.
    pub fn closed() -> Self {
        Trouble::Broken("closed the connection without an ack".to_owned())
    }

    /// What a failure to receive an ack means, which had `limit` to come.
    pub fn from_receiving(error: ReceiveError, limit: Duration) -> Self {
        match error {
            ReceiveError::Idle | ReceiveError::Slow(_) => Trouble::Timeout(limit),
            ReceiveError::Io(error) => broken(&error),
            error => Trouble::BadAck(error.to_string()),
        }
    }

    /// What a failure to send means.
    pub fn from_sending(error: &io::Error, limit: Duration) -> Self {
        match error.kind() {
            ErrorKind::WouldBlock | ErrorKind::TimedOut => Trouble::Timeout(limit),
            _ => broken(error),
        }
    }
}

/// Checks that what a server sent is the ack of a message from `client`.
///
/// # Errors
///
/// What it is instead.
pub fn check_ack<'a>(packet: &'a [u8], client: &Id<'_>) -> Result<Ack<'a>, Trouble> {
    match Packet::parse(packet) {
        Ok(Packet::Ack(ack)) if ack.destid == *client => Ok(ack),
        Ok(Packet::Ack(_)) => Err(Trouble::BadAck("it is for another client".to_owned())),
        Ok(Packet::Refusal(refusal)) => Err(Trouble::Refused(Escaped(&refusal.reason).to_string())),
        Ok(_) => Err(Trouble::BadAck("it is of another type".to_owned())),
        Err(error) => Err(Trouble::BadAck(error.reason)),
    }
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Trouble::Unreachable(what) | Trouble::Broken(what) => f.write_str(what),
            Trouble::Timeout(limit) => {
                write!(f, "no ack within {} s", (limit.as_secs_f64() * 1e3).round() / 1e3)
            }
            Trouble::BadAck(what) => write!(f, "answered with no ack for this message: {what}"),
            Trouble::Refused(what) => write!(f, "refused the message: {what}"),
            Trouble::Local(what) => write!(f, "the proxy could not open a connection: {what}"),
            Trouble::Waited => f.write_str("busy with other messages"),
        }
    }
}

fn broken(error: &io::Error) -> Trouble {
    Trouble::Broken(format!("the connection broke: {}", reason(error)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_that_an_ack_had_is_told_in_milliseconds_at_most() {
        for (time, told) in [(5.0, "5 s"), (0.25, "0.25 s"), (4.817_828_6, "4.818 s")] {
            let trouble = Trouble::Timeout(Duration::from_secs_f64(time));
            assert_eq!(trouble.to_string(), format!("no ack within {told}"));
        }
    }
}
