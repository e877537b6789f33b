//! What goes over the wire: the packets, how they are read and written, and where one ends in a
//! stream. No I/O.

pub(crate) mod diagnose;
pub mod framer;
mod id;
mod outgoing;
mod packet;
pub mod packet_file;
mod parse;
mod write;

pub use id::{Id, MAX_ID};
pub use outgoing::Outgoing;
pub use packet::{Ack, Code, Data, Packet, Refusal, Setup, hash};
pub use parse::ParseError;
