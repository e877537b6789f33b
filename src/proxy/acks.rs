//! What a server answers: whether it is the ack of the message that it should be for, and its way to
//! the client.

use std::sync::Arc;

use super::dispatch::AttemptError;
use super::in_flight::InFlight;
use super::replies::ReplyQueue;
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
        Ok(Packet::Ack(ack)) if leased && !message.is_hash(&ack.payload) => {
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

/// Clients whose replies wait a moment for others of their burst.
#[derive(Debug, Default)]
pub struct HeldReplies(Vec<Arc<ReplyQueue>>);

impl HeldReplies {
    /// Whether no client waits.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Answers these messages with their acks.
    pub fn fill<'a>(&mut self, acked: impl Iterator<Item = (InFlight, &'a [u8])>) {
        let mut slots = acked
            .filter_map(|(message, ack)| message.into_reply().map(|slot| (slot, ack)))
            .peekable();
        while let Some((first, _)) = slots.peek() {
            let queue = Arc::clone(&first.queue);
            let own =
                std::iter::from_fn(|| slots.next_if(|(slot, _)| Arc::ptr_eq(&slot.queue, &queue)));
            if queue.fill_most(own) {
                self.0.push(queue);
            }
        }
    }

    /// Sends what waits.
    pub fn send(&mut self) {
        self.0.drain(..).for_each(|queue| queue.flush());
    }
}

impl Drop for HeldReplies {
    fn drop(&mut self) {
        self.send();
    }
}
