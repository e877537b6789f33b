//! What can be set, and what it is unless told otherwise.

use std::time::Duration;

use super::admission::Admission;
use super::table::Limits as TableLimits;
use crate::net::{connection, listener};

/// The most servers, unless told otherwise.
const MAX_SERVERS: usize = 1000;

/// Connections beyond the limit whose first packet is awaited.
const LOBBY: usize = 8;

/// One server can be stopped and started again in this time, and its messages wait for it.
const RESTART_GRACE: Duration = Duration::from_secs(2);

/// Everything about the proxy that can be set.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The longest packet that is taken, in bytes.
    pub max_packet: usize,
    /// What packets over 16 KiB may take, messages and acks of all peers together, in bytes; one of the
    /// longest is always taken.
    pub max_memory: usize,
    /// How long a client may be silent between packets.
    pub idle_timeout: Duration,
    /// A packet's time from first byte to last; each 64 KiB of it adds a second.
    pub packet_timeout: Duration,
    /// A message's time from arrival to reply, unless it sets `timeout`.
    pub message_timeout: Duration,
    /// The longest `timeout` that a message may set.
    pub max_timeout: Duration,
    /// How long a server without a lease may take for its ack.
    pub reply_timeout: Duration,
    /// How long a connection to a server may take to be made.
    pub connect_timeout: Duration,
    /// Connections at once to a server without a lease.
    pub per_server: usize,
    /// The most servers that are tried for a message.
    pub tries: usize,
    /// Connections.
    pub connections: listener::Limits,
    /// The switching table.
    pub table: TableLimits,
    /// Who may register.
    pub admission: Admission,
    /// Whether somebody will look at the latest messages.
    pub keep_recent: bool,
    /// How long it serves on after it is told to stop, with `/healthz` saying so: time for a load balancer
    /// to turn away.
    pub stop_delay: Duration,
    /// How long an orderly stop may take after that.
    pub stop_timeout: Duration,
}

impl Settings {
    /// The most connections at once to one server, with a lease or without.
    pub(super) fn max_upstreams(&self, leased: bool) -> usize {
        if leased { (self.connections.connections / 4).clamp(1, 256) } else { self.per_server }
    }
}

impl Default for Settings {
    fn default() -> Self {
        let connections = listener::default_max_connections();
        Settings {
            max_packet: connection::DEFAULT_MAX_PACKET,
            max_memory: 256 << 20,
            idle_timeout: Duration::from_secs(60),
            packet_timeout: Duration::from_secs(5),
            message_timeout: Duration::from_secs(10),
            max_timeout: Duration::from_secs(3600),
            reply_timeout: Duration::from_secs(5),
            connect_timeout: Duration::from_secs(1),
            per_server: 4,
            tries: 3,
            connections: listener::Limits {
                connections,
                servers: MAX_SERVERS.min(connections),
                lobby: LOBBY,
                per_address: (connections / 4).max(1),
                hint: listener::OPTION_HINT,
            },
            table: TableLimits {
                servers: MAX_SERVERS,
                policies: 1000,
                restart_grace: RESTART_GRACE,
            },
            admission: Admission::Loopback,
            keep_recent: false,
            stop_delay: Duration::ZERO,
            stop_timeout: Duration::from_secs(10),
        }
    }
}
