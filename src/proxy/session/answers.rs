//! Replies to everything that is not a message.

use super::Session;
use crate::net::connection::{Connection, ReceiveError};
use crate::protocol::diagnose::Foreign;
use crate::protocol::{Ack, Code, Id, Packet, ParseError, Refusal};

impl Session<'_> {
    /// Replies to a packet that is not a message, or to an object that is not a packet. Returns `false` if
    /// the bytes after it cannot be read.
    #[inline(never)]
    pub(super) fn answer_packet(
        &mut self,
        packet: Result<Packet<'_>, ParseError>,
        connection: &Connection,
    ) -> bool {
        let mut goes_on = true;
        let answer = match packet {
            Ok(Packet::Setup(setup)) => {
                // It may wait for the end of another registration, and what was answered so far must not.
                self.replies.flush();
                let answer = self.proxy.register(connection, &setup, self.peer, &mut self.leases);
                if answer.is_ok() {
                    self.take_server_place();
                }
                answer
            }
            Ok(packet) => Err(not_for_a_proxy(packet)),
            Err(error) => {
                goes_on = error.is_json;
                let sender = error.id.unwrap_or(Id::ZERO);
                Err(Refusal::new(sender, Code::BadPacket, error.reason))
            }
        };
        self.answer(answer);
        goes_on
    }

    /// Refuses the rest of a stream that cannot be read. After an I/O error it only logs.
    #[inline(never)]
    pub(super) fn refuse_stream(&self, error: &ReceiveError) {
        let code = match error {
            ReceiveError::TooLarge { .. } => Code::TooLarge,
            ReceiveError::NoMemory => Code::Overloaded,
            ReceiveError::NotAnObject(_) | ReceiveError::Truncated(_) => Code::BadPacket,
            ReceiveError::Slow(_) | ReceiveError::Idle => Code::Timeout,
            ReceiveError::Io(_) => {
                // The homework's servers close their setup connections without reading the ack.
                if self.replies.is_client() {
                    self.proxy.dispatcher.events.broke(self.peer, error);
                }
                return;
            }
        };
        let mut reason = error.to_string();
        if matches!(error, ReceiveError::NotAnObject(Foreign::Http)) {
            reason += &match self.proxy.page.get() {
                Some(address) => format!("; the status page is at http://{address}/"),
                None => "; for a status page, start revproc with -status PORT".to_owned(),
            };
        }
        self.answer(Err(Refusal::new(Id::ZERO, code, reason)));
    }

    /// Refuses the message of a client that got no place. A stopping proxy sends nothing: the message was not
    /// accepted.
    #[inline(never)]
    pub(super) fn refuse_client(&self, client: &Id<'_>) {
        if !self.proxy.stop.is_draining() {
            let reason = "all places for connections are taken (-max-connections)";
            self.answer(Err(Refusal::new(client.clone(), Code::Overloaded, reason)));
        }
    }

    /// Refuses a connection from an address that has too many.
    #[inline(never)]
    pub(super) fn refuse_connection(&self, connection: &Connection) {
        let reason = "too many connections from your address";
        self.answer(Err(Refusal::new(Id::ZERO, Code::Overloaded, reason)));
        self.replies.flush();
        // Waiting would keep a thread and a place that others need.
        connection.close_without_waiting();
    }

    fn answer(&self, answer: Result<Ack<'_>, Refusal<'_>>) {
        let packet = match answer {
            Ok(ack) => Packet::Ack(ack),
            Err(refusal) => {
                self.proxy.dispatcher.events.refused_packet(self.peer, &refusal);
                Packet::Refusal(refusal)
            }
        };
        self.replies.reserve().fill(packet.to_line().trim_ascii_end());
    }
}

fn not_for_a_proxy(packet: Packet<'_>) -> Refusal<'_> {
    let (sender, name) = match packet {
        Packet::Ack(ack) => (ack.srcid, "an ack"),
        _ => (Id::ZERO, "a refusal"),
    };
    Refusal::new(
        sender,
        Code::BadPacket,
        format!("a proxy takes {name} only from a server, as its answer to a message"),
    )
}
