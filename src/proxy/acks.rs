//! What a server answers: whether it is the ack of the message that it should be for.

use super::dispatch::AttemptError;
use super::in_flight::InFlight;
use crate::cli::escape::EscapedReason;
use crate::protocol::{Code, Id, Packet};

/// Checks that a packet from a server is the ack of this message. Acks have no numbers: on a shared
/// connection only the hash tells them apart, so with a lease, where connections are shared, it is
/// checked, too.
///
/// # Errors
///
/// What it is instead.
pub fn check_ack(packet: &[u8], message: &InFlight, leased: bool) -> Result<(), AttemptError> {
    let wrong = |what: &str| Err(AttemptError::BadAck(what.to_owned()));
    match Packet::parse(packet) {
        Ok(Packet::Ack(ack)) if ack.destid != message.srcid => wrong("it is for another client"),
        Ok(Packet::Ack(ack)) if leased && !message.has_hash(&ack.payload) => {
            wrong("its hash is not that of the message")
        }
        Ok(Packet::Ack(_)) => Ok(()),
        Ok(Packet::Refusal(refusal)) => {
            // A server that could not read the packet does not know whose it was.
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
