//! Checks a server's answer against the message that it answers.

use super::dispatch::AttemptError;
use super::in_flight::InFlight;
use crate::cli::escape::EscapedReason;
use crate::protocol::{Code, Id, Packet};

/// Checks that a server's packet acks this message: the client's id must match and, for a server with a
/// lease, the hash (if `MAX_CHECKED` allows). Acks carry no message number, so on a shared connection only
/// the hash tells them apart.
///
/// # Errors
///
/// If it is a refusal, or not an answer to this message.
pub fn check_ack(packet: &[u8], message: &InFlight, leased: bool) -> Result<(), AttemptError> {
    let wrong = |what: &str| Err(AttemptError::BadAck(what.to_owned()));
    match Packet::parse(packet) {
        Ok(Packet::Ack(ack)) if ack.destid != message.srcid => wrong("it is for another client"),
        Ok(Packet::Ack(ack)) if leased && !message.has_hash(&ack.payload) => {
            wrong("its hash is not that of the message")
        }
        Ok(Packet::Ack(_)) => Ok(()),
        Ok(Packet::Refusal(refusal)) => {
            // A server that could not parse the packet refuses with id 0.
            if refusal.destid != message.srcid && refusal.destid != Id::ZERO {
                return wrong("it is a refusal for another client");
            }
            Err(AttemptError::Refused {
                code: Code::from_name(&refusal.code),
                reason: EscapedReason(&refusal.reason).to_string(),
                packet: packet.to_vec(),
            })
        }
        Ok(_) => wrong("it is of another type"),
        Err(error) => Err(AttemptError::BadAck(error.reason)),
    }
}
