//! The answers on one connection: each message's hash, and what the work on it brought.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Instant;

use super::Settings;
use super::handler::{Failure, Work, encode, too_long};
use crate::cli::escape::{Escaped, EscapedId, EscapedReason};
use crate::cli::terminal::{Kind, Terminal};
use crate::net::connection::{Connection, ReadTimeout, ReceiveError};
use crate::net::listener::{Peer, Serve};
use crate::net::os_error::reason;
use crate::protocol::{self, Ack, Code, Data, Id, Packet, Refusal};

/// Answers are sent together up to this size, in bytes.
const MAX_UNSENT: usize = 64 << 10;

/// What a thread needs to answer messages.
#[derive(Debug)]
pub struct Answerer {
    pub settings: Settings,
    pub work: Work,
    pub terminal: Terminal,
}

impl Answerer {
    /// Answers all packets that have come: in one write, unless there is work to do that may take long.
    fn answer_burst(
        &self,
        connection: &mut Connection,
        answers: &mut Vec<u8>,
    ) -> std::io::Result<bool> {
        let is_hash_only = self.work.is_hash_only();
        let received = if is_hash_only { None } else { Some(Instant::now()) };
        while let Some(packet) = connection.take_packet() {
            match Packet::parse(connection.bytes(packet)) {
                Ok(Packet::Data(data)) => self.answer(&data, received, answers),
                Ok(_) => {
                    let refusal = Refusal::new(
                        Id::ZERO,
                        Code::BadPacket,
                        "a server takes data packets (type 0) only",
                    );
                    self.refuse(refusal, answers);
                }
                Err(error) => {
                    let goes_on = error.is_json;
                    let id = error.id.unwrap_or(Id::ZERO);
                    self.refuse(Refusal::new(id, Code::BadPacket, error.reason), answers);
                    if !goes_on {
                        connection.send(answers)?;
                        return Ok(false);
                    }
                }
            }
            if answers.len() >= MAX_UNSENT || !is_hash_only {
                connection.send(answers)?;
                answers.clear();
            }
        }
        connection.send(answers)?;
        answers.clear();
        // One long result is no reason to keep its memory.
        answers.shrink_to(2 * MAX_UNSENT);
        Ok(true)
    }

    /// Answers one message, which was `received` at that time if there is work to do.
    fn answer(&self, data: &Data<'_>, received: Option<Instant>, answers: &mut Vec<u8>) {
        let client = EscapedId(&data.srcid);
        match &data.msgid {
            None => self.terminal.message(format_args!(
                "Received a message from client {client} payload: {}",
                Escaped(&data.payload)
            )),
            Some(msgid) => self.terminal.message(format_args!(
                "Received a message from client {client} msgid {} payload: {}",
                Escaped(msgid),
                Escaped(&data.payload)
            )),
        }
        if let Some(claimed) = data.wrong_size() {
            self.terminal.warn_limited(Kind::WrongSize, format_args!(
                "client {client} says payloadsize {claimed}, but its payload has {} bytes; the payload counts",
                data.payload.len()
            ));
        }
        let result = received.map_or(Ok(None), |received| self.work.carry_out(data, received));
        let written = result.and_then(|result| self.write_ack(data, result, answers));
        if let Err(Failure { code, reason }) = written {
            self.terminal.warn_message(format_args!(
                "refused the message of client {client} ({code}): {}",
                EscapedReason(&reason)
            ));
            Packet::Refusal(Refusal::new(data.srcid.clone(), code, reason)).write(answers);
        }
    }

    /// Adds a message's ack to the answers. Fails where the result makes it too long.
    fn write_ack(
        &self,
        data: &Data<'_>,
        result: Option<Vec<u8>>,
        answers: &mut Vec<u8>,
    ) -> Result<(), Failure> {
        let (begin, limit) = (answers.len(), self.settings.max_packet);
        if result.as_ref().is_some_and(|result| result.len() > limit) {
            return Err(too_long(limit));
        }
        let (client, hash) = (EscapedId(&data.srcid), protocol::hash(&data.payload));
        let (result, encoding) = result.map(encode).unzip();
        let encoding = encoding.flatten();
        let packet = Packet::Ack(Ack {
            result: result.as_deref().map(Cow::Borrowed),
            encoding: encoding.map(Cow::Borrowed),
            ..Ack::new(self.settings.id.clone(), data.srcid.clone(), hash.as_str())
        });
        packet.write(answers);
        if result.is_some() && answers.len() - begin > limit + "\n".len() {
            answers.truncate(begin);
            return Err(too_long(limit));
        }
        self.terminal
            .message(format_args!("Sending a response to the client {client} payload: {hash}"));
        match (&result, encoding) {
            (Some(text), None) => self
                .terminal
                .message(format_args!("Result for the client {client}: {}", Escaped(text))),
            // Three bytes are four characters.
            (Some(base64), Some(_)) => self.terminal.message(format_args!(
                "Result for the client {client}: ({} bytes)",
                base64.trim_end_matches('=').len() * 3 / 4
            )),
            (None, _) => {}
        }
        Ok(())
    }

    fn refuse(&self, refusal: Refusal<'_>, answers: &mut Vec<u8>) {
        let line = format_args!("refused a packet: {}", refusal.reason);
        self.terminal.warn_limited(Kind::RefusedPacket, line);
        Packet::Refusal(refusal).write(answers);
    }

    fn serve_packets(&self, connection: &mut Connection) -> std::io::Result<()> {
        let Settings { idle_timeout: idle, packet_timeout: packet, .. } = self.settings;
        let mut answers = Vec::new();
        loop {
            let (code, error) = match connection.wait(ReadTimeout::Paced { idle, packet }) {
                Ok(true) if self.answer_burst(connection, &mut answers)? => continue,
                Ok(true) => break,
                Ok(false) | Err(ReceiveError::Idle) => return Ok(()),
                Err(ReceiveError::Io(error)) => return Err(error),
                Err(error @ ReceiveError::TooLarge { .. }) => (Code::TooLarge, error),
                Err(error @ ReceiveError::Slow(_)) => (Code::Timeout, error),
                Err(error) => (Code::BadPacket, error),
            };
            self.refuse(Refusal::new(Id::ZERO, code, error.to_string()), &mut answers);
            connection.send(&answers)?;
            break;
        }
        connection.lingering_close();
        Ok(())
    }
}

impl Serve for Answerer {
    fn serve(self: &Arc<Self>, mut connection: Connection, peer: Peer) {
        if let Err(error) = self.serve_packets(&mut connection) {
            self.terminal.warn_limited(
                Kind::BrokenConnection,
                format_args!("{}: {}; closed", peer.address, reason(&error)),
            );
        }
    }

    fn warn(&self, message: &str) {
        self.terminal.warn(format_args!("{message}"));
    }

    fn max_packet(&self) -> usize {
        self.settings.max_packet
    }
}
