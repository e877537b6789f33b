//! The setup packets: leases are granted, renewed and ended.

use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, SocketAddrV6, UdpSocket};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use super::Proxy;
use super::backend::Backend;
use super::table::{Lease, RegisterError, Registered, Registration};
use crate::cli::escape::Escaped;
use crate::net::connection::Connection;
use crate::protocol::{Ack, Code, Id, Refusal, Setup};

/// The longest lease that is granted, in seconds; who asks for more gets this.
const MAX_LEASE: u64 = 60;

/// A server that ended just now may still be in the table, until the thread that holds its setup
/// connection has run: so long, and in such steps, its successor waits before it is refused.
const LAST_SEEN: Duration = Duration::from_millis(500);
const PAUSE: Duration = Duration::from_millis(5);

/// A lease held through a connection.
struct HeldLease {
    policy: String,
    id: String,
    expires: Instant,
}

/// The leases held through one connection.
pub(super) struct Leases {
    /// The connection's number, by which the table knows it.
    holder: u64,
    held: Vec<HeldLease>,
}

impl Leases {
    /// None yet, for the connection of this number.
    pub(super) fn new(holder: u64) -> Self {
        Leases { holder, held: Vec::new() }
    }

    /// Whether none is held.
    pub(super) fn is_empty(&self) -> bool {
        self.held.is_empty()
    }

    /// When the first of them runs out; `None` if none is held.
    pub(super) fn first_to_expire(&self) -> Option<Instant> {
        self.held.iter().map(|held| held.expires).min()
    }
}

impl Proxy {
    /// Puts a server into the table, or renews its lease.
    pub(super) fn register<'a>(
        &self,
        connection: &Connection,
        setup: &Setup<'a>,
        peer: SocketAddr,
        leases: &mut Leases,
    ) -> Result<Ack<'a>, (Code, Refusal<'a>)> {
        let refuse =
            |code, reason: String| Err((code, Refusal::new(setup.id.clone(), code, reason)));
        let (id, policy) = (setup.id.text(), setup.policy.text());
        if let Err(reason) = self.settings.admission.admits(setup, peer) {
            return refuse(Code::NotAllowed, reason.to_owned());
        }
        let ack = |lease| Ack { lease, ..Ack::new(Id::ZERO, setup.id.clone(), "registered") };
        // It asks only whether leases are granted here; the server comes back with a lease.
        if setup.lease == Some(0) {
            return Ok(ack(Some(MAX_LEASE)));
        }
        // Nobody can be registered at another address than the one that the packet came from.
        let address = at_port(peer, setup.listen_port);
        if self.is_own(address) {
            return refuse(Code::NotAllowed, format!("{address} is the proxy itself"));
        }
        let held = leases.held.iter().position(|held| held.policy == policy && held.id == id);
        let seconds = setup.lease.map(|seconds| seconds.clamp(1, MAX_LEASE));
        // A lease ends with its connection. A server that was not answered in time has ended this
        // one, and asks again on another.
        if seconds.is_some() && held.is_none() && connection.has_ended() {
            return Ok(ack(seconds));
        }
        let length = seconds.map(Duration::from_secs);
        let now = Instant::now();
        let registration = Registration {
            policy: &policy,
            id: &id,
            address,
            lease: length.map(|length| Lease { holder: leases.holder, length }),
        };
        let made = loop {
            let made = self.dispatcher.table.register(registration, now, || {
                let stats = self.dispatcher.events.stats().server(&policy, &id);
                let workers = Arc::clone(&self.workers);
                Backend::new(address, seconds.is_some(), self.settings.upstream, stats, workers)
            });
            match made {
                Err(RegisterError::InUse(_)) if now.elapsed() < LAST_SEEN => thread::sleep(PAUSE),
                made => break made,
            }
        };
        match made {
            Ok(Registered::Refreshed) if held.is_some() => self.dispatcher.events.renewed(),
            Ok(Registered::Added | Registered::Refreshed) => {
                self.dispatcher.events.registered(setup)
            }
            Ok(Registered::Replaced(old)) => {
                self.dispatcher.events.registered(setup);
                old.handle.retire(&old, &self.dispatcher);
            }
            Ok(Registered::Displaced(old)) => {
                old.handle.retire(&old, &self.dispatcher);
                let why = "it was set aside, and the full table needed its place (see -max-servers and -max-policies)";
                self.dispatcher.events.left(&old, why);
                self.dispatcher.events.registered(setup);
            }
            Err(RegisterError::InUse(other)) => {
                return refuse(
                    Code::IdInUse,
                    format!(
                        "server {} of privacy policy {} is running at {other}; stop it first, or choose another id",
                        Escaped(&id),
                        Escaped(&policy)
                    ),
                );
            }
            Err(RegisterError::TooManyServers) => {
                let limit = self.settings.table.servers;
                return refuse(
                    Code::Overloaded,
                    format!("{limit} servers are registered, which is the limit"),
                );
            }
            Err(RegisterError::TooManyPolicies) => {
                let limit = self.settings.table.policies;
                return refuse(
                    Code::Overloaded,
                    format!("{limit} policies are served, which is the limit"),
                );
            }
        }
        if let Some(length) = length {
            let lease = HeldLease {
                policy: policy.into_owned(),
                id: id.into_owned(),
                expires: now + length,
            };
            match held {
                Some(held) => leases.held[held] = lease,
                None => leases.held.push(lease),
            }
        }
        Ok(ack(seconds))
    }

    /// Whether a server at this address would be the proxy itself, which would forward to itself
    /// in a circle.
    fn is_own(&self, address: SocketAddr) -> bool {
        let own = self.address.ip().to_canonical();
        address.port() == self.address.port()
            && (own == address.ip() || own.is_unspecified() && is_this_hosts(address))
    }

    /// Ends the leases that ran out: what their servers have not acked goes elsewhere.
    pub(super) fn expire_leases(&self, leases: &mut Leases) {
        let now = Instant::now();
        let (expired, live) = std::mem::take(&mut leases.held)
            .into_iter()
            .partition::<Vec<_>, _>(|held| held.expires <= now);
        leases.held = live;
        for held in expired {
            if let Some(server) =
                self.dispatcher.table.release(&held.policy, &held.id, leases.holder)
            {
                self.dispatcher.events.left(&server, "its lease was not renewed");
                server.handle.abandon(&server, &self.dispatcher);
            }
        }
    }

    /// Ends all of a connection's leases: what is on its way to their servers is finished.
    pub(super) fn release_all(&self, leases: &mut Leases) {
        for held in leases.held.drain(..) {
            if let Some(server) =
                self.dispatcher.table.release(&held.policy, &held.id, leases.holder)
            {
                self.dispatcher.events.left(&server, "its connection was closed");
                server.handle.retire(&server, &self.dispatcher);
            }
        }
    }
}

/// Whether this is one of the addresses of this host: a socket can be bound to no other. A host
/// can have many, and a connection from one to another shows only two of them.
fn is_this_hosts(address: SocketAddr) -> bool {
    match UdpSocket::bind(at_port(address, 0)) {
        Ok(_) => true,
        Err(error) => error.kind() != ErrorKind::AddrNotAvailable,
    }
}

/// The same host at another port. An IPv6 link-local address means nothing without its scope.
fn at_port(peer: SocketAddr, port: u16) -> SocketAddr {
    match (peer.ip().to_canonical(), peer) {
        (IpAddr::V6(ip), SocketAddr::V6(peer)) => {
            SocketAddrV6::new(ip, port, 0, peer.scope_id()).into()
        }
        (ip, _) => SocketAddr::new(ip, port),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_local_server_keeps_its_scope() {
        let server = |peer: &str| at_port(peer.parse().unwrap(), 7).to_string();
        assert_eq!(server("[fe80::1%3]:5000"), "[fe80::1%3]:7");
        assert_eq!(server("[2001:db8::1]:5000"), "[2001:db8::1]:7");
        assert_eq!(server("[::ffff:192.0.2.1]:5000"), "192.0.2.1:7");
        assert_eq!(server("192.0.2.1:5000"), "192.0.2.1:7");
    }
}
