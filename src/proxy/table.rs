//! The message switching table: which servers serve which policy, and whose turn it is.
//!
//! One queue per policy: the first eligible server is taken and goes to the back. That is the
//! homework's round robin, and it stays exact however many threads select at once, because each
//! selection is one step under one mutex. A plain mutex is enough: a selection takes some hundred
//! nanoseconds and nothing waits while it is held. The table knows no sockets; it keeps a handle
//! of the caller's beside each server. Time is passed in, so that tests need not wait for it.

mod member;
mod policy;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use crate::net::lock::lock;
use member::Member;
use policy::Policy;

pub use member::{Lease, Server};
pub use policy::{Ready, Routed, Selected};

/// Failures in a row, of the kinds that may be chance, after which a server is ejected.
pub const CONSECUTIVE_FAILURES: u32 = 3;

/// How large the table may grow, and how long messages wait in it.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Registrations in all.
    pub servers: usize,
    /// Policies.
    pub policies: usize,
    /// How long a message waits for a server of a policy whose last one has just left.
    pub restart_grace: Duration,
}

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
    /// The table has as many servers as it may, and none that gives way.
    TooManyServers,
    /// The table has as many policies as it may, and none whose only server gives way.
    TooManyPolicies,
}

/// What went wrong with a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// It cannot be reached: ejected at once.
    Unreachable,
    /// Anything that may be chance: ejected after [`CONSECUTIVE_FAILURES`].
    MayBeChance,
}

/// What a failure did to the server in the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Blamed {
    /// Nothing: the attempt began before the last failure that was counted, or the server has left.
    Already,
    /// It was counted.
    Counted,
    /// The server is ejected by it, and was not before.
    Ejected,
}

/// A server in the table, as the status page shows it.
#[derive(Debug, Clone)]
pub struct Entry<H> {
    /// The server.
    pub server: Arc<Server<H>>,
    /// Its lease's length, its begin and its last renewal.
    pub lease: Option<(Duration, Instant, Instant)>,
    /// Until when it is ejected.
    pub ejected_until: Option<Instant>,
    /// Since when it is ejected, or else eligible.
    pub state_since: Instant,
    /// How many messages it takes at once, if it says so.
    pub capacity: Option<u64>,
    /// Messages that have its permit, if it has a capacity.
    pub in_use: u64,
}

impl<H> Entry<H> {
    /// Whether it is not ejected, or its time is over.
    pub fn is_eligible(&self, now: Instant) -> bool {
        self.ejected_until.is_none_or(|until| until <= now)
    }

    /// Whether it takes another message.
    pub fn has_room(&self) -> bool {
        self.capacity.is_none_or(|capacity| self.in_use < capacity)
    }
}

/// The switching table. It keeps the messages that wait for a server.
#[derive(Debug)]
pub struct Table<H, M> {
    limits: Limits,
    inner: Mutex<Inner<H, M>>,
}

#[derive(Debug)]
struct Inner<H, M> {
    policies: HashMap<String, Policy<H, M>>,
    servers: usize,
    next_serial: u64,
}

impl<H, M: Routed> Table<H, M> {
    /// An empty table.
    pub fn new(limits: Limits) -> Self {
        let inner = Inner { policies: HashMap::new(), servers: 0, next_serial: 0 };
        Table { limits, inner: Mutex::new(inner) }
    }

    fn lock(&self) -> MutexGuard<'_, Inner<H, M>> {
        lock(&self.inner)
    }

    /// Registers a server, or renews its registration. `handle` makes the caller's handle if the
    /// server is new to the table or has moved.
    ///
    /// Nothing shows that a server without a lease has gone, so in a full table the one ejected longest
    /// gives way to a new server. One that has not failed never does, even if it never got a message:
    /// else, by registering often, anyone could displace honest servers that are idle.
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
                since: now,
                handle,
                serial,
                failures: AtomicU32::new(0),
            })
        };
        let member = inner
            .policies
            .get_mut(policy)
            .and_then(|policy| policy.queue.iter_mut().find(|member| member.server.id == id));
        if let Some(member) = member {
            let same_address = member.server.address == address;
            if !same_address && !member.holders.is_empty() {
                return Err(RegisterError::InUse(member.server.address));
            }
            if lease.is_none() && !member.holders.is_empty() {
                // Who holds no lease changes nothing for who does.
                return Ok(Registered::Refreshed);
            }
            let is_as_before = member.server.leased >= lease.is_some()
                && member.server.has_capacity == capacity.is_some();
            if same_address && is_as_before {
                // Messages at work keep their places, so that another number is kept from now on.
                member.capacity = capacity;
                match lease {
                    Some(lease) => member.hold(lease, now),
                    None => member.mark_healthy(now),
                }
                return Ok(Registered::Refreshed);
            }
            let new = Member::new(server(handle()), lease, capacity, now);
            let old = std::mem::replace(member, new);
            return Ok(Registered::Replaced(old.server));
        }
        inner.policies.retain(|_, policy| !policy.is_forgotten(now));
        let is_full = |inner: &Inner<H, M>| inner.policies.len() >= self.limits.policies;
        if is_full(inner) {
            inner.policies.retain(|name, other| !other.is_unused() || name == policy);
        }
        let lacks_policy = is_full(inner) && !inner.policies.contains_key(policy);
        let error = if inner.servers >= self.limits.servers {
            Some(RegisterError::TooManyServers)
        } else {
            lacks_policy.then_some(RegisterError::TooManyPolicies)
        };
        let old = error.map(|error| inner.make_room(lacks_policy, now).ok_or(error)).transpose()?;
        let new = Member::new(server(handle()), lease, capacity, now);
        inner.servers += 1;
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

    /// Ends `holder`'s lease; the server that nobody holds any more leaves the table and is
    /// returned.
    pub fn release(
        &self,
        policy: &str,
        id: &str,
        holder: u64,
        now: Instant,
    ) -> Option<Arc<Server<H>>> {
        let mut inner = self.lock();
        let inner = &mut *inner;
        let queue = &mut inner.policies.get_mut(policy)?.queue;
        let at = queue.iter().position(|member| member.server.id == id)?;
        let holders = &mut queue[at].holders;
        let before = holders.len();
        holders.retain(|(lease, ..)| lease.holder != holder);
        if holders.len() == before || !holders.is_empty() {
            return None;
        }
        inner.remove(policy, at, now)
    }

    /// Whether `holder` holds a lease on the id and policy.
    pub fn is_held(&self, policy: &str, id: &str, holder: u64) -> bool {
        let inner = self.lock();
        let mut queue = inner.policies.get(policy).into_iter().flat_map(|policy| &policy.queue);
        queue.any(|member| member.server.id == id && member.is_held_by(holder))
    }

    /// Ends the leases that have run out. Returns the servers that left the table with them, and when
    /// the next one runs out.
    pub fn expire(&self, now: Instant) -> (Vec<Arc<Server<H>>>, Option<Instant>) {
        let mut inner = self.lock();
        let (mut expired, mut next) = (Vec::new(), None);
        for member in inner.policies.values_mut().flat_map(|policy| &mut policy.queue) {
            if member.expire(now) {
                expired.push(Arc::clone(&member.server));
            }
            next = member.next_expiry().into_iter().chain(next).min();
        }
        for server in &expired {
            let queue = inner.policies.get(&server.policy).map(|policy| &policy.queue);
            let mut members = queue.into_iter().flatten();
            if let Some(at) = members.position(|member| member.server.serial == server.serial) {
                inner.remove(&server.policy, at, now);
            }
        }
        (expired, next)
    }

    /// Selects a server for each of these messages, in turn.
    pub fn select(&self, messages: Vec<M>, now: Instant) -> Vec<Selected<H, M>> {
        let mut inner = self.lock();
        let select = |message: M| match inner.policies.get_mut(message.policy()) {
            Some(policy) => policy.select(message, now),
            None => Selected::Nobody(message),
        };
        messages.into_iter().map(select).collect()
    }

    /// Selects a server for a message's retry, which waits if it may and all that are left for it have
    /// as many messages as they take. Nobody's turn changes by it.
    pub fn select_for_retry(&self, message: M, now: Instant, may_wait: bool) -> Selected<H, M> {
        match self.lock().policies.get_mut(message.policy()) {
            Some(policy) => policy.select_for_retry(message, now, may_wait),
            None => Selected::Nobody(message),
        }
    }

    /// Has a message wait for a server that comes back, or for another. Returns it if none is awaited.
    pub fn wait_for_restart(&self, message: M, now: Instant) -> Option<M> {
        let mut inner = self.lock();
        let policy = inner.policies.get_mut(message.policy());
        match policy.filter(|_| !self.limits.restart_grace.is_zero()) {
            Some(policy) => {
                policy.wait(message, now);
                None
            }
            None => Some(message),
        }
    }

    /// Takes the messages of a policy that need not wait any more. To be called when one begins to
    /// wait, and when anything has changed for those that do.
    pub fn take_ready(&self, policy: &str, now: Instant) -> Option<Ready<H, M>> {
        let mut inner = self.lock();
        let policy = inner.policies.get_mut(policy)?;
        (policy.waiting() > 0).then(|| policy.take_ready(now))
    }

    /// A message has given back its permit. Returns whether others wait for one.
    pub fn free_permit(&self, server: &Server<H>) -> bool {
        let mut inner = self.lock();
        if let Some(member) = inner.member(server) {
            member.free_permit();
        }
        inner.policies.get(&server.policy).is_some_and(|policy| policy.waiting() > 0)
    }

    /// How many messages of each policy wait for a server.
    pub fn waiting(&self) -> BTreeMap<String, usize> {
        let inner = self.lock();
        inner.policies.iter().map(|(name, policy)| (name.clone(), policy.waiting())).collect()
    }

    /// Takes all messages that wait: no server comes any more.
    pub fn take_waiting(&self) -> Vec<M> {
        self.lock().policies.values_mut().flat_map(Policy::take_waiting).collect()
    }

    /// How many servers of the policy there are, other than those `excluded`.
    pub fn count_untried(&self, policy: &str, excluded: &[u64]) -> usize {
        let inner = self.lock();
        let queue = inner.policies.get(policy).map(|policy| policy.queue.iter());
        let untried = queue.into_iter().flatten();
        untried.filter(|member| !excluded.contains(&member.server.serial)).count()
    }

    /// The server answered as it should. Says whether it had been ejected until now.
    pub fn succeeded(&self, server: &Server<H>, now: Instant) -> bool {
        if server.failures.load(Ordering::Relaxed) == 0 {
            return false;
        }
        let mut inner = self.lock();
        let Some(member) = inner.member(server) else { return false };
        let was_ejected = member.ejected_until.is_some();
        member.mark_healthy(now);
        was_ejected
    }

    /// An attempt at the server failed that began at `since`. However many messages one stall held, it
    /// is one failure: attempts that began before the last one was counted are not counted again.
    pub fn failed(
        &self,
        server: &Server<H>,
        failure: Failure,
        since: Instant,
        now: Instant,
    ) -> Blamed {
        let mut inner = self.lock();
        let Some(member) = inner.member(server) else { return Blamed::Already };
        if member.failed_at.is_some_and(|failed_at| since < failed_at) {
            return Blamed::Already;
        }
        member.failed_at = Some(now);
        let failures = server.failures.fetch_add(1, Ordering::Relaxed) + 1;
        if failure == Failure::MayBeChance && failures < CONSECUTIVE_FAILURES {
            return Blamed::Counted;
        }
        if member.eject(now) { Blamed::Ejected } else { Blamed::Counted }
    }

    /// All servers.
    pub fn servers(&self) -> Vec<Arc<Server<H>>> {
        let inner = self.lock();
        let members = inner.policies.values().flat_map(|policy| &policy.queue);
        members.map(|member| Arc::clone(&member.server)).collect()
    }

    /// Every policy with its servers in the order of their turns.
    pub fn snapshot(&self) -> Vec<(String, Vec<Entry<H>>)> {
        let inner = self.lock();
        let served = inner.policies.iter().filter(|(_, policy)| !policy.queue.is_empty());
        let mut policies: Vec<_> = served
            .map(|(name, policy)| {
                let entries = policy.queue.iter().map(|member| Entry {
                    server: Arc::clone(&member.server),
                    lease: member
                        .holders
                        .last()
                        .map(|(lease, since, at)| (lease.length, *since, *at)),
                    ejected_until: member.ejected_until,
                    state_since: member.state_since,
                    capacity: member.capacity,
                    in_use: member.in_use,
                });
                (name.clone(), entries.collect())
            })
            .collect();
        drop(inner);
        policies.sort_by(|(a, _): &(String, Vec<Entry<H>>), (b, _)| a.cmp(b));
        policies
    }
}

impl<H, M: Routed> Inner<H, M> {
    fn member(&mut self, server: &Server<H>) -> Option<&mut Box<Member<H>>> {
        let queue = &mut self.policies.get_mut(&server.policy)?.queue;
        queue.iter_mut().find(|member| member.server.serial == server.serial)
    }

    /// Removes the server that was ejected longest ago, if any may give way, and if `for_policy` its policy
    /// with it.
    fn make_room(&mut self, for_policy: bool, now: Instant) -> Option<Arc<Server<H>>> {
        let (_, at, policy) = self
            .policies
            .iter()
            .filter(|(_, policy)| !for_policy || policy.queue.len() == 1 && policy.waiting() == 0)
            .flat_map(|(name, policy)| policy.queue.iter().enumerate().map(move |at| (name, at)))
            .filter_map(|(name, (at, member))| Some((member.dispensable_since()?, at, name)))
            .min()?;
        let policy = policy.clone();
        let server = self.remove(&policy, at, now);
        if for_policy {
            self.policies.remove(&policy);
        }
        server
    }

    fn remove(&mut self, policy: &str, at: usize, now: Instant) -> Option<Arc<Server<H>>> {
        let server = self.policies.get_mut(policy)?.remove(at, now)?;
        self.servers -= 1;
        Some(server)
    }
}
