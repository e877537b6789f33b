//! A message from a client, as the proxy took it in.

use std::time::Instant;

use crate::protocol::Data;

/// A message on its way.
#[derive(Debug)]
pub struct Message<'a> {
    /// What it says.
    pub data: Data<'a>,
    /// The packet as it was received.
    pub bytes: &'a [u8],
    /// When it was taken in, or came to its turn after others that came with it.
    pub arrived: Instant,
}
