//! Who is in the table: registrations, leases, and room for them.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::time::{Duration, Instant};

use super::member::{Lease, Member, Server};
use super::policy::Policy;
use super::{Inner, Limits, Routed, Table};

/// A registration, as a setup packet asks for it.
#[derive(Debug, Clone, Copy)]
pub struct Registration<'a> {
    /// The policy, as text.
    pub policy: &'a str,
    /// The server's id, as text.
    pub id: &'a str,
    /// Where it listens for messages.
    pub address: SocketAddr,
    /// The lease it holds, if it asks for one.
    pub lease: Option<Lease>,
    /// How many messages it takes at once, if it says so.
    pub capacity: Option<u64>,
}

/// What a registration did to the table.
#[derive(Debug)]
pub enum Registered<H> {
    /// A new server, at the back of its policy's rotation.
    Added,
    /// The server was there, at this address.
    Refreshed,
    /// The server replaced this earlier registration of the same id and policy.
    Replaced(Arc<Server<H>>),
    /// A new server, at the back of its policy's rotation, for which this one left the full table.
    Displaced(Arc<Server<H>>),
}

/// Why a registration is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RegisterError {
    /// A server at this address holds a live lease on the id and policy.
    InUse(SocketAddr),
    /// The table is full of servers, and none can be displaced.
    TooManyServers,
    /// The table is full of policies, and no policy can be displaced with its only server.
    TooManyPolicies,
}

impl<H, M: Routed> Table<H, M> {
    /// Waits until no server at another address holds a lease on the id and policy, `limit` at most.
    pub fn wait_until_free(&self, registration: &Registration<'_>, limit: Duration) {
        let is_in_use = |inner: &mut Inner<H, M>| inner.in_use_at(registration).is_some();
        drop(self.lease_ended.wait_timeout_while(self.lock(), limit, is_in_use));
    }

    /// Registers a server, or renews its registration. `handle` makes the caller's handle if the
    /// server is new to the table or has moved.
    ///
    /// Nothing shows that a server without a lease has gone. So in a full table a new server displaces the
    /// one without a lease that has been ejected longest. A server that is not ejected is never displaced:
    /// otherwise anyone could displace idle servers by registering often.
    ///
    /// # Errors
    ///
    /// If another server holds a live lease on the same id and policy, or the table is full.
    pub fn register(
        &self,
        registration: Registration<'_>,
        now: Instant,
        handle: impl FnOnce() -> H,
    ) -> Result<Registered<H>, RegisterError> {
        let Registration { policy, id, address, lease, capacity } = registration;
        let mut inner = self.lock();
        let inner = &mut *inner;
        let serial = inner.next_serial;
        inner.next_serial += 1;
        let server = |handle| {
            Arc::new(Server {
                id: id.to_owned(),
                policy: policy.to_owned(),
                address,
                leased: lease.is_some(),
                has_capacity: capacity.is_some(),
                handle,
                serial,
                failures: AtomicU32::new(0),
            })
        };
        if let Some(at) = inner.in_use_at(&registration) {
            return Err(RegisterError::InUse(at));
        }
        if let Some(member) = inner.find(policy, id) {
            let Server { address: old_address, leased, has_capacity, .. } = *member.server;
            if leased && lease.is_none() {
                // A registration without a lease does not touch one with a lease.
                return Ok(Registered::Refreshed);
            }
            if (old_address, leased, has_capacity) == (address, lease.is_some(), capacity.is_some())
            {
                // Messages at work keep their permits; the new capacity holds from now on.
                member.capacity = capacity;
                member.renew(lease, now);
                return Ok(Registered::Refreshed);
            }
            let new = Member::new(server(handle()), lease, capacity, now);
            let old = std::mem::replace(member, new);
            return Ok(Registered::Replaced(old.server));
        }
        let old = inner.make_room(policy, self.limits, now)?;
        let new = Member::new(server(handle()), lease, capacity, now);
        inner
            .policies
            .entry(policy.to_owned())
            .or_insert_with(|| Policy::new(self.limits.restart_grace))
            .queue
            .push_back(new);
        Ok(match old {
            Some(old) => Registered::Displaced(old),
            None => Registered::Added,
        })
    }

    /// Ends `holder`'s lease. Returns the server that leaves the table with it.
    pub fn release(
        &self,
        policy: &str,
        id: &str,
        holder: u64,
        now: Instant,
    ) -> Option<Arc<Server<H>>> {
        let mut inner = self.lock();
        let member = inner.find(policy, id).filter(|member| member.is_held_by(holder))?;
        let server = Arc::clone(&member.server);
        inner.remove(&server, now);
        self.lease_ended.notify_all();
        Some(server)
    }

    /// Whether `holder` holds a lease on the id and policy.
    pub fn is_held(&self, policy: &str, id: &str, holder: u64) -> bool {
        self.lock().find(policy, id).is_some_and(|member| member.is_held_by(holder))
    }

    /// Ends the leases that have run out. Returns the servers that left the table with them, and when
    /// the next one runs out.
    pub fn expire(&self, now: Instant) -> (Vec<Arc<Server<H>>>, Option<Instant>) {
        let mut inner = self.lock();
        let members = inner.policies.values().flat_map(|policy| &policy.queue);
        let leases = members.filter_map(|it| Some((it.lease?.expires(), Arc::clone(&it.server))));
        let next = leases.clone().map(|(at, _)| at).filter(|at| *at > now).min();
        let expired: Vec<_> = leases.filter(|(at, _)| *at <= now).map(|(_, it)| it).collect();
        expired.iter().for_each(|server| inner.remove(server, now));
        self.lease_ended.notify_all();
        (expired, next)
    }
}

impl<H, M: Routed> Inner<H, M> {
    fn find(&mut self, policy: &str, id: &str) -> Option<&mut Box<Member<H>>> {
        let queue = &mut self.policies.get_mut(policy)?.queue;
        queue.iter_mut().find(|member| member.server.id == id)
    }

    /// The other address at which a server holds a lease on the id and policy, if any.
    fn in_use_at(&mut self, registration: &Registration<'_>) -> Option<SocketAddr> {
        let Registration { policy, id, address, .. } = *registration;
        let server = &self.find(policy, id)?.server;
        (server.leased && server.address != address).then_some(server.address)
    }

    /// Makes room for a new server of this policy. Returns the server that gives way to it in a full table:
    /// the one that was ejected longest ago, and for a new policy its own goes, too.
    fn make_room(
        &mut self,
        policy: &str,
        limits: Limits,
        now: Instant,
    ) -> Result<Option<Arc<Server<H>>>, RegisterError> {
        self.policies.retain(|_, other| !other.can_be_dropped(now));
        if self.policies.len() >= limits.policies {
            self.policies.retain(|name, other| !other.is_unused() || name == policy);
        }
        let lacks_policy =
            self.policies.len() >= limits.policies && !self.policies.contains_key(policy);
        let servers: usize = self.policies.values().map(|other| other.queue.len()).sum();
        let error = if servers >= limits.servers {
            RegisterError::TooManyServers
        } else if lacks_policy {
            RegisterError::TooManyPolicies
        } else {
            return Ok(None);
        };
        let may_go = |other: &&Policy<H, M>| other.queue.len() == 1 && other.waiting() == 0;
        let others = self.policies.values().filter(|other| !lacks_policy || may_go(other));
        let (_, oldest) = others
            .flat_map(|other| &other.queue)
            .filter_map(|member| Some((member.evictable_since()?, &member.server)))
            .min_by_key(|(since, server)| (*since, server.serial))
            .ok_or(error)?;
        let oldest = Arc::clone(oldest);
        self.remove(&oldest, now);
        if lacks_policy {
            self.policies.remove(&oldest.policy);
        }
        Ok(Some(oldest))
    }

    /// Removes a server that is in the table.
    fn remove(&mut self, server: &Server<H>, now: Instant) {
        if let Some(policy) = self.policies.get_mut(&server.policy) {
            policy.remove(server.serial, now);
        }
    }
}
