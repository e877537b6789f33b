//! The open connections of a listener, the limits on them, and the queue for a place.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::net::{IpAddr, Ipv6Addr, Shutdown, SocketAddr, TcpStream};
use std::sync::Arc;

/// What place a connection has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// One of [`Limits::connections`].
    Client,
    /// One of [`Limits::servers`].
    Server,
    /// None yet: it is in the lobby.
    Lobby,
}

/// The other end of an accepted connection.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Peer {
    /// Its address.
    pub address: SocketAddr,
    /// The connection's number, by which the listener knows it.
    pub number: u64,
    /// What place it begins with.
    pub place: Place,
    /// Whether its host has more connections here than one host may have.
    pub over_limit: bool,
}

/// The [`Limits::hint`] of a limit that the command line sets.
pub(crate) const OPTION_HINT: &str = " (-max-connections, or half of ulimit -n)";

/// Limits on the connections of one listener.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Connections at once that are no servers' setup connections.
    pub connections: usize,
    /// Servers' setup connections at once, besides.
    pub servers: usize,
    /// Connections that have no place yet, besides.
    pub lobby: usize,
    /// Ends the line that says that `connections` is reached: where that limit comes from; may be empty.
    pub hint: &'static str,
    /// Connections at once from one address that is not loopback.
    pub per_address: usize,
}

impl Limits {
    /// Without places for servers, and without a limit for one address.
    pub const fn of_connections(connections: usize) -> Self {
        let (servers, lobby, hint) = (0, 0, "");
        Limits { connections, servers, lobby, hint, per_address: connections }
    }
}

/// The connections that are open.
#[derive(Debug)]
pub(super) struct Connections {
    limits: Limits,
    /// By their numbers. A map that gives memory back when the connections of a busy hour are gone.
    open: BTreeMap<u64, Open>,
    /// How many have each [`Place`].
    counts: [usize; 3],
    /// Those that wait for a client's place, first come first served.
    queue: VecDeque<u64>,
    per_address: HashMap<IpAddr, usize>,
    accepted: u64,
}

/// A connection that is being served.
#[derive(Debug)]
pub(super) struct Open {
    /// To end it from outside.
    stream: Arc<TcpStream>,
    place: Place,
    /// What counts for the limit per address.
    origin: IpAddr,
    /// Shut down to make room.
    is_ending: bool,
}

impl Connections {
    pub(super) fn new(limits: Limits) -> Self {
        Connections {
            limits,
            open: BTreeMap::new(),
            counts: [0; 3],
            queue: VecDeque::new(),
            per_address: HashMap::new(),
            accepted: 0,
        }
    }

    /// How many are open.
    pub(super) fn len(&self) -> usize {
        self.open.len()
    }

    /// How many of them have no server's place.
    pub(super) fn without_servers(&self) -> usize {
        self.count(Place::Client) + self.count(Place::Lobby)
    }

    /// How many more may be accepted.
    pub(super) fn free(&self) -> usize {
        (self.limits.connections + self.limits.lobby).saturating_sub(self.without_servers())
    }

    /// How many have been accepted since the start.
    pub(super) fn accepted(&self) -> u64 {
        self.accepted
    }

    /// Whether a client's place has to be waited for.
    pub(super) fn is_full(&self) -> bool {
        self.count(Place::Client) >= self.limits.connections || self.has_queue()
    }

    /// Whether a connection waits for a client's place.
    pub(super) fn has_queue(&self) -> bool {
        !self.queue.is_empty()
    }

    /// Takes in a new one.
    pub(super) fn enter(&mut self, stream: &Arc<TcpStream>, address: SocketAddr) -> Peer {
        self.accepted += 1;
        let place = if self.is_full() { Place::Lobby } else { Place::Client };
        self.counts[place as usize] += 1;
        let origin = origin(address.ip());
        let open = Open { stream: Arc::clone(stream), place, origin, is_ending: false };
        self.open.insert(self.accepted, open);
        let mut over_limit = false;
        if !origin.is_loopback() {
            let count = self.per_address.entry(origin).or_default();
            *count += 1;
            over_limit = *count > self.limits.per_address;
        }
        Peer { address, number: self.accepted, place, over_limit }
    }

    /// Removes one, and with it its place.
    pub(super) fn leave(&mut self, number: u64) -> Option<Open> {
        let open = self.open.remove(&number)?;
        self.counts[open.place as usize] -= 1;
        if let Some(count) = self.per_address.get_mut(&open.origin) {
            *count -= 1;
            if *count == 0 {
                self.per_address.remove(&open.origin);
            }
        }
        Some(open)
    }

    /// Moves one to a server's place, if one is free. Returns whether it was.
    pub(super) fn move_to_server(&mut self, number: u64) -> bool {
        let is_free = self.count(Place::Server) < self.limits.servers;
        if is_free {
            self.move_to(number, Place::Server);
        }
        is_free
    }

    /// Has one wait for a client's place, in the lobby. Returns `false` if it has one.
    pub(super) fn wait_for_client_place(&mut self, number: u64) -> bool {
        let waits = self.open.get(&number).is_some_and(|open| open.place != Place::Client);
        if waits {
            self.move_to(number, Place::Lobby);
            self.queue.push_back(number);
        }
        waits
    }

    /// Whether there is a client's place for the one that waits under this number.
    pub(super) fn is_turn_of(&self, number: u64) -> bool {
        self.count(Place::Client) < self.limits.connections && self.queue.front() == Some(&number)
    }

    /// Ends its wait, with a client's place or without.
    pub(super) fn end_wait(&mut self, number: u64, with_place: bool) {
        self.queue.retain(|waiting| *waiting != number);
        if with_place {
            self.move_to(number, Place::Client);
        }
    }

    /// Ends the receiving side of all.
    pub(super) fn end_all(&self) {
        for open in self.open.values() {
            // It fails if the peer has just closed; then there is nothing to end.
            let _ = open.stream.shutdown(Shutdown::Read);
        }
    }

    /// Ends the one that has had a client's place for longest.
    pub(super) fn end_oldest(&mut self) {
        let mut clients = self.open.values_mut().filter(|open| open.place == Place::Client);
        if let Some(open) = clients.find(|open| !open.is_ending) {
            open.is_ending = true;
            // It fails if the peer has just closed.
            let _ = open.stream.shutdown(Shutdown::Both);
        }
    }

    fn move_to(&mut self, number: u64, place: Place) {
        if let Some(open) = self.open.get_mut(&number) {
            let before = std::mem::replace(&mut open.place, place);
            self.counts[before as usize] -= 1;
            self.counts[place as usize] += 1;
        }
    }

    fn count(&self, place: Place) -> usize {
        self.counts[place as usize]
    }
}

/// What counts as one address for the limit per address: an IPv6 host has the 2^64 addresses of a
/// network for itself, and an IPv4 one may come as IPv6.
fn origin(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) if !v6.is_loopback() => {
            IpAddr::V6(Ipv6Addr::from_bits(v6.to_bits() >> 64 << 64))
        }
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn origin_of(address: &str) -> IpAddr {
        origin(address.parse().unwrap())
    }

    #[test]
    fn a_host_is_one_origin_from_whichever_of_its_addresses_it_comes() {
        for (one, other) in [
            ("2001:db8:1:2::", "2001:db8:1:2:ffff:ffff:ffff:ffff"),
            ("192.0.2.7", "::ffff:192.0.2.7"),
        ] {
            assert_eq!(origin_of(one), origin_of(other), "{one} {other}");
        }
        for (one, other) in [
            ("2001:db8:1:2::", "2001:db8:1:3::"),
            ("192.0.2.7", "192.0.2.8"),
            ("::ffff:192.0.2.7", "::ffff:192.0.2.8"),
        ] {
            assert_ne!(origin_of(one), origin_of(other), "{one} {other}");
        }
    }

    #[test]
    fn loopback_which_is_not_limited_is_known_in_all_its_forms() {
        for address in ["127.0.0.1", "127.0.0.2", "::1", "::ffff:127.0.0.1"] {
            assert!(origin_of(address).is_loopback(), "{address}");
        }
    }
}
