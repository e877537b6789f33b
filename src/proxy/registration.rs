//! The setup packets: servers are put into the table, and their leases renewed.

use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, SocketAddrV6, UdpSocket};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Proxy;
use super::backend::Backend;
use super::leases::Leases;
use super::table::{Lease, RegisterError, Registered, Registration};
use crate::cli::escape::EscapedId;
use crate::net::connection::Connection;
use crate::protocol::{Ack, Code, Id, Refusal, Setup};

/// The longest lease that is granted, in seconds; a server that asks for more gets this.
const MAX_LEASE: u64 = 60;

/// A successor waits up to this long for the old registration to end: the thread that holds its setup
/// connection may not have run yet.
const TAKEOVER_WAIT: Duration = Duration::from_millis(500);

impl Proxy {
    /// Puts a server into the table, or renews its lease.
    pub(super) fn register<'a>(
        &self,
        connection: &Connection,
        setup: &Setup<'a>,
        peer: SocketAddr,
        leases: &mut Leases,
    ) -> Result<Ack<'a>, Refusal<'a>> {
        let refuse = |reason: String| Err(Refusal::new(setup.id.clone(), Code::NotAllowed, reason));
        let (id, policy) = (setup.id.text(), setup.policy.text());
        if let Err(reason) = self.settings.admission.admits(setup, peer) {
            return refuse(reason.to_owned());
        }
        let ack = |lease| Ack { lease, ..Ack::new(Id::ZERO, setup.id.clone(), "registered") };
        // It asks only whether leases are granted here; the server comes back with a lease.
        if setup.lease == Some(0) {
            return Ok(ack(Some(MAX_LEASE)));
        }
        // Nobody can be registered at another address than the one that the packet came from.
        let address = at_port(peer, setup.listen_port);
        if self.is_own(address) {
            return refuse(format!("{address} is the proxy itself"));
        }
        let is_held = leases.holds(&policy, &id);
        let seconds = setup.lease.map(|seconds| seconds.clamp(1, MAX_LEASE));
        // A lease ends with its connection. A server that was not answered in time has ended this
        // one, and asks again on another.
        if seconds.is_some() && !is_held && connection.has_ended() {
            return Ok(ack(seconds));
        }
        let length = seconds.map(Duration::from_secs);
        let now = Instant::now();
        let lease = length.map(|length| Lease { holder: leases.holder, length });
        let capacity = setup.capacity;
        let registration = Registration { policy: &policy, id: &id, address, lease, capacity };
        let registered = self
            .put_into_table(registration, now)
            .map_err(|error| self.not_registered(setup, error))?;
        let events = &self.dispatcher.events;
        if is_held && matches!(registered, Registered::Refreshed) {
            events.renewed();
        } else {
            if let Registered::Displaced(old) = &registered {
                let why = "it was set aside, and the full table needed its place (see -max-servers and -max-policies)";
                events.left(old, why);
            }
            events.registered(setup);
        }
        if let Registered::Replaced(old) | Registered::Displaced(old) = registered {
            self.retire(&old);
            self.dispatcher.serve_waiting(&old.policy);
        }
        self.dispatcher.serve_waiting(&policy);
        if let Some(length) = length {
            if !is_held {
                leases.add(&policy, &id);
            }
            self.lease_timer.watch(now + length);
        }
        Ok(ack(seconds))
    }

    fn put_into_table(
        &self,
        registration: Registration<'_>,
        now: Instant,
    ) -> Result<Registered<Backend>, RegisterError> {
        let Registration { policy, id, .. } = registration;
        let table = &self.dispatcher.table;
        table.wait_until_free(&registration, TAKEOVER_WAIT);
        table.register(registration, now, || {
            let stats = self.dispatcher.events.stats.server(policy, id);
            let workers = Arc::clone(&self.workers);
            let memory = Arc::clone(&self.memory);
            Backend::new(stats, workers, memory)
        })
    }

    fn not_registered<'a>(&self, setup: &Setup<'a>, error: RegisterError) -> Refusal<'a> {
        let limits = &self.settings.table;
        let (code, reason) = match error {
            RegisterError::InUse(other) => (
                Code::IdInUse,
                format!(
                    "server {} of privacy policy {} is running at {other}; stop it first, or choose another id",
                    EscapedId(&setup.id),
                    EscapedId(&setup.policy)
                ),
            ),
            RegisterError::TooManyServers => (
                Code::Overloaded,
                format!("{} servers are registered, which is the limit", limits.servers),
            ),
            RegisterError::TooManyPolicies => (
                Code::Overloaded,
                format!("{} policies are served, which is the limit", limits.policies),
            ),
        };
        Refusal::new(setup.id.clone(), code, reason)
    }

    /// Whether a server at this address would be the proxy itself, which would forward to itself
    /// in a circle.
    fn is_own(&self, address: SocketAddr) -> bool {
        let own = self.address.ip().to_canonical();
        address.port() == self.address.port()
            && (own == address.ip() || own.is_unspecified() && is_this_hosts(address))
    }
}

/// Whether this is one of the addresses of this host: a socket can be bound to no other. A host
/// can have many, and a connection from one to another shows only two of them.
fn is_this_hosts(address: SocketAddr) -> bool {
    let bound = UdpSocket::bind(at_port(address, 0));
    !bound.is_err_and(|error| error.kind() == ErrorKind::AddrNotAvailable)
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
