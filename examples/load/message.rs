//! Messages ready to be sent, and what is read for them.

use revproc::protocol::framer::{Framer, Scan};
use revproc::protocol::{Code, Data, Id, Packet, hash};

use super::Options;

/// Different messages per connection, sent in turn: an ack for another one is noticed.
pub const MESSAGES: usize = 4;

/// Room for acks that came together.
pub const BUFFER: usize = 32 << 10;

/// Acks that were found right are remembered per message: as many as there may be servers.
const MAX_KNOWN: usize = 8;

/// Refusals that may not come again a moment later, as for the client.
const PASSING: [Code; 4] = [Code::NoServer, Code::Unreachable, Code::Timeout, Code::Overloaded];

/// A message ready to be sent, and what its ack must be.
pub struct Message {
    pub line: Vec<u8>,
    client: usize,
    hash: String,
    /// Acks that were found right. One that equals them needs no second look.
    known: Vec<Vec<u8>>,
}

impl Message {
    fn new(client: usize, number: usize, options: &Options) -> Self {
        let start = format!("client {client} message {number} ");
        let payload: String = start.chars().chain(('a'..='z').cycle()).take(options.size).collect();
        let hash = hash(&payload);
        let data = Data::new(id(client), Id::from_text(&options.policy), payload);
        Message { line: Packet::Data(data).to_line(), client, hash, known: Vec::new() }
    }

    /// The length of this message's ack, which must come first in `received`; `None` if not all of
    /// it has come.
    pub fn find_ack(&mut self, received: &[u8]) -> Result<Option<usize>, Failure> {
        let space = Framer::white_space(received);
        let received = &received[space..];
        if let Some(known) = self.known.iter().find(|known| received.starts_with(known)) {
            return Ok(Some(space + known.len()));
        }
        let end = match Framer::new(BUFFER).scan(received) {
            Scan::End(end) => end,
            Scan::Incomplete if received.len() < BUFFER - space => return Ok(None),
            _ => return Err(Failure::lasting("no ack", received)),
        };
        let (ack, client) = (&received[..end], id(self.client));
        match Packet::parse(ack) {
            Ok(Packet::Ack(it)) if it.destid == client && it.payload == self.hash => {
                if self.known.len() < MAX_KNOWN {
                    self.known.push(ack.to_vec());
                }
                Ok(Some(space + end))
            }
            Ok(Packet::Refusal(it)) if PASSING.iter().any(|code| code.name() == it.code) => {
                Err(Failure::passing(format!("refused: {}", it.reason)))
            }
            _ => Err(Failure::lasting("not the ack of this message", ack)),
        }
    }
}

/// The messages of a client, which it sends in turn.
pub fn messages_of(client: usize, options: &Options) -> Vec<Message> {
    (0..MESSAGES).map(|number| Message::new(client, number, options)).collect()
}

/// Why a connection served no more messages.
pub struct Failure {
    pub reason: String,
    /// Whether the messages without an ack may get one on another connection.
    pub may_pass: bool,
}

impl Failure {
    pub fn passing(reason: impl Into<String>) -> Self {
        Failure { reason: reason.into(), may_pass: true }
    }

    pub fn lasting(what: &str, received: &[u8]) -> Self {
        let reason = format!("{what}: {}", String::from_utf8_lossy(received));
        Failure { reason, may_pass: false }
    }
}

fn id(client: usize) -> Id<'static> {
    Id::Integer(client as i128)
}
