//! The setup packets: leases are granted, renewed and ended.

use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, SocketAddrV6, UdpSocket};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use super::Proxy;
use super::backend::Backend;
use super::dispatch::Dispatcher;
use super::table::{Lease, RegisterError, Registered, Registration, Server};
use crate::cli::escape::EscapedId;
use crate::net::connection::Connection;
use crate::net::lock::lock;
use crate::protocol::{Ack, Code, Id, Refusal, Setup};

/// The longest lease that is granted, in seconds; a server that asks for more gets this.
const MAX_LEASE: u64 = 60;

/// A successor waits up to this long, in such steps, for the old registration to end: the thread that holds
/// its setup connection may not have run yet.
const LAST_SEEN: Duration = Duration::from_millis(500);
const PAUSE: Duration = Duration::from_millis(5);

/// A lease ends this much late: a renewal may be unread if the proxy was suspended.
const GRACE: Duration = Duration::from_millis(100);

/// The leases held through one connection.
pub(super) struct Leases {
    /// The connection's number, by which the table knows it.
    holder: u64,
    /// Policies and ids. The table knows whether a lease has run out.
    held: Vec<(String, String)>,
}

/// Ends leases that have run out, whatever their connections do.
#[derive(Debug)]
pub(super) struct LeaseTimer {
    dispatcher: Arc<Dispatcher<Backend>>,
    /// When it looks next.
    next: Mutex<Option<Instant>>,
}

impl LeaseTimer {
    /// Watches the leases in this table.
    pub(super) fn new(dispatcher: &Arc<Dispatcher<Backend>>) -> Arc<Self> {
        Arc::new(LeaseTimer { dispatcher: Arc::clone(dispatcher), next: Mutex::default() })
    }

    /// A lease runs out then, unless it is renewed.
    fn watch(self: &Arc<Self>, expires: Instant) {
        let mut next = lock(&self.next);
        if next.is_some_and(|next| next <= expires) {
            return;
        }
        *next = Some(expires);
        drop(next);
        let timer = Arc::clone(self);
        self.dispatcher.background.at(expires, move || {
            let own = Arc::clone(&timer);
            // From now, which may be much later.
            timer.dispatcher.background.at(Instant::now() + GRACE, move || own.look(expires));
        });
    }

    /// Ends what has run out: what those servers have not acked goes elsewhere.
    fn look(self: &Arc<Self>, at: Instant) {
        if lock(&self.next).take_if(|next| *next == at).is_none() {
            return;
        }
        let (expired, next) = self.dispatcher.table.expire(Instant::now());
        for server in expired {
            self.dispatcher.events.left(&server, "its lease was not renewed");
            server.handle.abandon(&server, &self.dispatcher);
            self.dispatcher.serve_waiting(&server.policy);
        }
        if let Some(next) = next {
            self.watch(next);
        }
    }
}

impl Leases {
    /// None yet, for the connection of this number.
    pub(super) fn new(holder: u64) -> Self {
        Leases { holder, held: Vec::new() }
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
        let is_held = leases.held.iter().any(|held| held.0 == policy && held.1 == id);
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
                leases.held.push((policy.into_owned(), id.into_owned()));
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
        loop {
            let registered = self.dispatcher.table.register(registration, now, || {
                let stats = self.dispatcher.events.stats.server(policy, id);
                let workers = Arc::clone(&self.workers);
                let memory = Arc::clone(&self.memory);
                let settings = self.settings.upstream;
                Backend::new(settings, stats, workers, memory)
            });
            match registered {
                Err(RegisterError::InUse(_)) if now.elapsed() < LAST_SEEN => thread::sleep(PAUSE),
                registered => return registered,
            }
        }
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

    /// Whether a lease is held, and has not run out.
    pub(super) fn holds_lease(&self, leases: &mut Leases) -> bool {
        let table = &self.dispatcher.table;
        leases.held.retain(|(policy, id)| table.is_held(policy, id, leases.holder));
        !leases.held.is_empty()
    }

    /// A server has left the table in order: what is on its way to it is finished.
    fn retire(&self, server: &Arc<Server<Backend>>) {
        let mut retired = lock(&self.retired);
        retired.retain(|past| past.strong_count() > 0);
        retired.push(Arc::downgrade(server));
        drop(retired);
        server.handle.retire(server, &self.dispatcher);
    }

    /// Ends all of a connection's leases: what is on its way to their servers is finished.
    #[inline(never)] // It would take room on the stack of each client's thread.
    pub(super) fn release_all(&self, leases: &mut Leases) {
        for (policy, id) in leases.held.drain(..) {
            let released =
                self.dispatcher.table.release(&policy, &id, leases.holder, Instant::now());
            if let Some(server) = released {
                self.dispatcher.events.left(&server, "its connection was closed");
                self.retire(&server);
                self.dispatcher.serve_waiting(&policy);
            }
        }
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
