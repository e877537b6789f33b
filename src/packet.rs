//! The packets: what they hold, how they are read and how they are written. No I/O.
//!
//! Reading is liberal, because many small programs speak this protocol and each has a dialect of
//! its own; writing is strict. [`Packet::parse`] takes one JSON object and borrows from it
//! wherever it can; [`Packet::write`] appends one compact line. Where an object begins and ends in
//! a stream is [`crate::framer`]'s business.

mod fields;
mod id;

use std::borrow::Cow;
use std::fmt;

use serde::ser::{Serialize, SerializeMap, Serializer};
use sha1::{Digest, Sha1};

pub use fields::{Fields, ParseError};
pub use id::Id;

/// One packet of the protocol.
///
/// Types 0 to 2 are the homework's; type 3, the refusal, is ours.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Packet<'a> {
    /// Type 0: a message from a client to any server of a policy.
    Data(Data<'a>),
    /// Type 1: a server registers with the proxy.
    Setup(Setup<'a>),
    /// Type 2: a server's answer to a message, or the proxy's to a setup packet.
    Ack(Ack<'a>),
    /// Type 3: the packet that it answers could not be served.
    Refusal(Refusal<'a>),
}

/// A message from a client, to be served by any server of a policy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Data<'a> {
    /// The client's id.
    pub srcid: Id<'a>,
    /// The privacy policy asked for.
    pub policy: Id<'a>,
    /// The text.
    pub payload: Cow<'a, str>,
    /// What the sender says the payload's size is, if it says. Never decides how much is read.
    pub payload_size: Option<u64>,
}

impl Data<'_> {
    /// The size that the sender gave, if it is neither the payload's bytes nor its characters.
    pub fn wrong_size(&self) -> Option<u64> {
        let claimed = self.payload_size?;
        let agrees =
            claimed == self.payload.len() as u64 || claimed == self.payload.chars().count() as u64;
        (!agrees).then_some(claimed)
    }
}

/// A server's registration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Setup<'a> {
    /// The server's id.
    pub id: Id<'a>,
    /// The privacy policy it serves.
    pub policy: Id<'a>,
    /// The port on which it listens for messages.
    pub listen_port: u16,
    /// The lease it asks for, in seconds; without one the registration outlives its connection.
    pub lease: Option<u64>,
    /// The secret that lets it register where the proxy asks for one.
    pub token: Option<Cow<'a, str>>,
}

impl Setup<'_> {
    /// The packet as one line in the tutorial's dialect: every value a string.
    pub fn to_line_of_strings(&self) -> Vec<u8> {
        let mut fields = vec![
            ("type", "1".to_owned()),
            ("id", self.id.to_string()),
            ("privPolyId", self.policy.to_string()),
            ("listenport", self.listen_port.to_string()),
        ];
        fields.extend(self.lease.map(|seconds| ("lease", seconds.to_string())));
        fields.extend(self.token.as_ref().map(|token| ("token", token.to_string())));
        let mut line = Vec::new();
        write_json(&Strings(&fields), &mut line);
        line
    }
}

/// The answer to a data packet or to a setup packet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ack<'a> {
    /// The server's id; 0 where the proxy answers a setup packet.
    pub srcid: Id<'a>,
    /// The id that the packet came with.
    pub destid: Id<'a>,
    /// The SHA-1 of the message's payload, or `registered`.
    pub payload: Cow<'a, str>,
    /// The lease that the proxy grants, in seconds.
    pub lease: Option<u64>,
}

/// Says that a packet could not be served, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal<'a> {
    /// The id that the refused packet came with, 0 if unknown.
    pub destid: Id<'a>,
    /// The reason in words.
    pub reason: Cow<'a, str>,
    /// The reason for programs: a [`Code`]'s name, or whatever another proxy wrote.
    pub code: Cow<'a, str>,
}

impl<'a> Refusal<'a> {
    /// A refusal of a packet that came from `destid`.
    pub fn new(destid: Id<'a>, code: Code, reason: impl Into<Cow<'a, str>>) -> Self {
        Refusal { destid, reason: reason.into(), code: Cow::Borrowed(code.name()) }
    }
}

/// Why a packet was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Code {
    /// Not JSON, not an object, a field missing or of the wrong kind, or a type nobody sends here.
    BadPacket,
    /// Longer than the receiver's limit.
    TooLarge,
    /// No server is registered for the policy.
    NoServer,
    /// No server that was tried could be talked to.
    Unreachable,
    /// No ack came in time.
    Timeout,
    /// What came back was no ack for this message.
    BadAck,
    /// The proxy has as much to do as it takes on.
    Overloaded,
    /// Another server holds a lease on this id and policy.
    IdInUse,
    /// The sender may not do this.
    NotAllowed,
}

impl Code {
    /// Every code, in the order of the protocol's list.
    pub const ALL: [Code; 9] = [
        Code::BadPacket,
        Code::TooLarge,
        Code::NoServer,
        Code::Unreachable,
        Code::Timeout,
        Code::BadAck,
        Code::Overloaded,
        Code::IdInUse,
        Code::NotAllowed,
    ];

    /// The code as it stands in a packet.
    pub const fn name(self) -> &'static str {
        match self {
            Code::BadPacket => "bad-packet",
            Code::TooLarge => "too-large",
            Code::NoServer => "no-server",
            Code::Unreachable => "unreachable",
            Code::Timeout => "timeout",
            Code::BadAck => "bad-ack",
            Code::Overloaded => "overloaded",
            Code::IdInUse => "id-in-use",
            Code::NotAllowed => "not-allowed",
        }
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The SHA-1 of a payload's UTF-8 bytes in lower-case hexadecimal, as an ack carries it.
pub fn hash(payload: &str) -> String {
    hex::encode(Sha1::digest(payload.as_bytes()))
}

impl<'a> Packet<'a> {
    /// Reads one packet from the text of one JSON object, borrowing from it.
    ///
    /// # Errors
    ///
    /// [`ParseError`] says which field is wrong and in what way, and whether the text was JSON at
    /// all.
    pub fn parse(text: &'a [u8]) -> Result<Self, ParseError> {
        Fields::parse(text)?.into_packet()
    }

    /// Appends the packet to `out` as one line of compact JSON, ended by a newline.
    pub fn write(&self, out: &mut Vec<u8>) {
        write_json(self, out);
    }

    /// The packet as one line, for a sender that has no buffer of its own.
    pub fn to_line(&self) -> Vec<u8> {
        let mut line = Vec::with_capacity(160);
        self.write(&mut line);
        line
    }
}

fn write_json(value: &impl Serialize, out: &mut Vec<u8>) {
    serde_json::to_writer(&mut *out, value)
        .expect("a Vec takes every byte, and every key is a string");
    out.push(b'\n');
}

/// Fields in their order, all values strings.
struct Strings<'a>(&'a [(&'a str, String)]);

impl Serialize for Strings<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(key, value)| (key, value)))
    }
}

impl Serialize for Packet<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        match self {
            Packet::Data(data) => {
                map.serialize_entry("type", &0)?;
                map.serialize_entry("srcid", &data.srcid)?;
                map.serialize_entry("privPoliId", &data.policy)?;
                map.serialize_entry("payloadsize", &data.payload.len())?;
                map.serialize_entry("payload", &data.payload)?;
            }
            Packet::Setup(setup) => {
                map.serialize_entry("type", &1)?;
                map.serialize_entry("id", &setup.id)?;
                map.serialize_entry("privPolyId", &setup.policy)?;
                map.serialize_entry("listenport", &setup.listen_port)?;
                if let Some(seconds) = setup.lease {
                    map.serialize_entry("lease", &seconds)?;
                }
                if let Some(token) = &setup.token {
                    map.serialize_entry("token", token)?;
                }
            }
            Packet::Ack(ack) => {
                map.serialize_entry("type", &2)?;
                map.serialize_entry("srcid", &ack.srcid)?;
                map.serialize_entry("destid", &ack.destid)?;
                map.serialize_entry("payloadsize", &ack.payload.len())?;
                map.serialize_entry("payload", &ack.payload)?;
                if let Some(seconds) = ack.lease {
                    map.serialize_entry("lease", &seconds)?;
                }
            }
            Packet::Refusal(refusal) => {
                map.serialize_entry("type", &3)?;
                map.serialize_entry("srcid", &0)?;
                map.serialize_entry("destid", &refusal.destid)?;
                map.serialize_entry("payloadsize", &refusal.reason.len())?;
                map.serialize_entry("payload", &refusal.reason)?;
                map.serialize_entry("code", &refusal.code)?;
            }
        }
        map.end()
    }
}
