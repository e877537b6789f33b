//! The message switching table: which servers serve which policy, and whose turn it is.
//!
//! One queue per policy: the first eligible server is taken and goes to the back. That is the
//! homework's round robin, and it stays exact however many threads select at once, because each
//! selection is one step under one mutex. A plain mutex is enough: a selection takes some hundred
//! nanoseconds and nothing waits while it is held. The table knows no sockets; it keeps a handle
//! of the caller's beside each server. Time is passed in, so that tests need not wait for it.

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// A server that failed is not selected for this long (ours).
pub const SET_ASIDE: Duration = Duration::from_secs(10);

/// Failures in a row, of the kinds that may be chance, after which a server is set aside.
pub const FAILURES_IN_A_ROW: u32 = 3;

/// How large the table may grow.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Registrations in all.
    pub servers: usize,
    /// Policies.
    pub policies: usize,
}

/// A server as the table knows it, with the caller's handle.
#[derive(Debug)]
pub struct Server<H> {
    /// Its id, as text.
    pub id: String,
    /// The policy it serves, as text.
    pub policy: String,
    /// Where it listens for messages.
    pub address: SocketAddr,
    /// Whether its registration lasts only as long as its lease.
    pub leased: bool,
    /// When this registration began.
    pub since: Instant,
    /// What the caller keeps for it.
    pub handle: H,
    /// Tells registrations apart.
    serial: u64,
    /// Failures since the last success; kept here too so that a success need not take the lock.
    failures: AtomicU32,
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
}

/// A lease on a registration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lease {
    /// Who holds it: a number for the setup connection.
    pub holder: u64,
    /// How long it lasts without renewal.
    pub length: Duration,
}

/// What a registration did to the table.
#[derive(Debug)]
pub enum Registered<H> {
    /// A new server, at the back of its policy's rotation.
    Added(Arc<Server<H>>),
    /// The server was there, at this address.
    Refreshed(Arc<Server<H>>),
    /// The server took the place of an earlier registration of the same id and policy.
    Replaced {
        /// The registration that holds now.
        new: Arc<Server<H>>,
        /// The one that it replaced.
        old: Arc<Server<H>>,
    },
}

/// Why a registration is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RegisterError {
    /// A server at this address holds a live lease on the id and policy.
    InUse(SocketAddr),
    /// The table has as many servers as it may.
    TooManyServers,
    /// The table has as many policies as it may.
    TooManyPolicies,
}

/// What went wrong with a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// It cannot be reached: set aside at once.
    Unreachable,
    /// Anything that may be chance: set aside after [`FAILURES_IN_A_ROW`].
    Other,
}

/// A server's place in the table, for those who look.
#[derive(Debug, Clone)]
pub struct Entry<H> {
    /// The server.
    pub server: Arc<Server<H>>,
    /// Its lease's length, its begin and its last renewal.
    pub lease: Option<(Duration, Instant, Instant)>,
    /// Until when it is set aside.
    pub aside_until: Option<Instant>,
    /// Since when it is set aside, or else eligible.
    pub state_since: Instant,
}

/// The switching table.
#[derive(Debug)]
pub struct Table<H> {
    limits: Limits,
    inner: Mutex<Inner<H>>,
}

#[derive(Debug)]
struct Inner<H> {
    policies: HashMap<String, Policy<H>>,
    servers: usize,
    next_serial: u64,
}

#[derive(Debug)]
struct Policy<H> {
    /// In the order of their turns.
    queue: VecDeque<Box<Slot<H>>>,
    /// Retries so far; they have a rotation of their own, so as not to disturb the turns.
    retries: usize,
}

#[derive(Debug)]
struct Slot<H> {
    server: Arc<Server<H>>,
    /// Who holds the lease. More than one for a moment, when a server registers again before the
    /// end of its earlier setup connection was seen.
    holders: Vec<(Lease, Instant, Instant)>,
    aside_until: Option<Instant>,
    state_since: Instant,
}

impl<H> Slot<H> {
    fn new(server: Arc<Server<H>>, lease: Option<Lease>, now: Instant) -> Box<Self> {
        let holders = lease.map(|lease| (lease, now, now)).into_iter().collect();
        Box::new(Slot { server, holders, aside_until: None, state_since: now })
    }

    fn hold(&mut self, lease: Lease, now: Instant) {
        match self.holders.iter_mut().find(|(held, ..)| held.holder == lease.holder) {
            Some((held, _, renewed)) => (*held, *renewed) = (lease, now),
            None => {
                self.holders.push((lease, now, now));
                self.forgive(now);
            }
        }
    }

    /// It has just said that it is there.
    fn forgive(&mut self, now: Instant) {
        self.server.failures.store(0, Ordering::Relaxed);
        if self.aside_until.take().is_some() {
            self.state_since = now;
        }
    }

    fn is_eligible(&self, now: Instant) -> bool {
        self.aside_until.is_none_or(|until| until <= now)
    }

    /// One message is tried when the time is over, and no other until its outcome is known or
    /// another such time has passed.
    fn take_turn(&mut self, now: Instant) -> Arc<Server<H>> {
        if self.aside_until.is_some_and(|until| until <= now) {
            self.aside_until = Some(now + SET_ASIDE);
        }
        Arc::clone(&self.server)
    }
}

impl<H> Table<H> {
    /// An empty table.
    pub fn new(limits: Limits) -> Self {
        let inner = Inner { policies: HashMap::new(), servers: 0, next_serial: 0 };
        Table { limits, inner: Mutex::new(inner) }
    }

    /// Nothing under the lock can panic halfway through a change.
    fn lock(&self) -> MutexGuard<'_, Inner<H>> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Registers a server, or renews its registration. `handle` makes the caller's handle where the
    /// server is new to the table or has moved.
    ///
    /// # Errors
    ///
    /// Where another server holds a live lease on the same id and policy, or the table is full.
    pub fn register(
        &self,
        registration: Registration<'_>,
        now: Instant,
        handle: impl FnOnce() -> H,
    ) -> Result<Registered<H>, RegisterError> {
        let Registration { policy, id, address, lease } = registration;
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
                since: now,
                handle,
                serial,
                failures: AtomicU32::new(0),
            })
        };
        let slot = inner
            .policies
            .get_mut(policy)
            .and_then(|policy| policy.queue.iter_mut().find(|slot| slot.server.id == id));
        if let Some(slot) = slot {
            let same_address = slot.server.address == address;
            if !same_address && !slot.holders.is_empty() {
                return Err(RegisterError::InUse(slot.server.address));
            }
            if same_address && slot.server.leased >= lease.is_some() {
                match lease {
                    Some(lease) => slot.hold(lease, now),
                    None if slot.holders.is_empty() => slot.forgive(now),
                    None => {}
                }
                return Ok(Registered::Refreshed(Arc::clone(&slot.server)));
            }
            let new = server(handle());
            let old = std::mem::replace(slot, Slot::new(Arc::clone(&new), lease, now));
            return Ok(Registered::Replaced { new, old: old.server });
        }
        if inner.servers >= self.limits.servers {
            return Err(RegisterError::TooManyServers);
        }
        if inner.policies.len() >= self.limits.policies && !inner.policies.contains_key(policy) {
            return Err(RegisterError::TooManyPolicies);
        }
        let new = server(handle());
        inner.servers += 1;
        inner
            .policies
            .entry(policy.to_owned())
            .or_insert_with(|| Policy { queue: VecDeque::new(), retries: 0 })
            .queue
            .push_back(Slot::new(Arc::clone(&new), lease, now));
        Ok(Registered::Added(new))
    }

    /// Ends `holder`'s lease; the server that nobody holds any more leaves the table and is
    /// returned.
    pub fn release(&self, policy: &str, id: &str, holder: u64) -> Option<Arc<Server<H>>> {
        let mut inner = self.lock();
        let inner = &mut *inner;
        let queue = &mut inner.policies.get_mut(policy)?.queue;
        let at = queue.iter().position(|slot| slot.server.id == id)?;
        let holders = &mut queue[at].holders;
        let before = holders.len();
        holders.retain(|(lease, ..)| lease.holder != holder);
        if holders.len() == before || !holders.is_empty() {
            return None;
        }
        let slot = queue.remove(at)?;
        if queue.is_empty() {
            inner.policies.remove(policy);
        }
        inner.servers -= 1;
        Some(slot.server)
    }

    /// The server whose turn it is. `None` where nothing is registered for the policy.
    pub fn select(&self, policy: &str, now: Instant) -> Option<Arc<Server<H>>> {
        let mut inner = self.lock();
        let queue = &mut inner.policies.get_mut(policy)?.queue;
        // Where all are set aside, they are tried all the same.
        let at = queue.iter().position(|slot| slot.is_eligible(now)).unwrap_or(0);
        let mut slot = queue.remove(at)?;
        let server = slot.take_turn(now);
        queue.push_back(slot);
        Some(server)
    }

    /// Another server for a message that those in `tried` failed; nobody's turn changes by it.
    pub fn select_another(
        &self,
        policy: &str,
        tried: &[&Arc<Server<H>>],
        now: Instant,
    ) -> Option<Arc<Server<H>>> {
        let mut inner = self.lock();
        let Policy { queue, retries } = inner.policies.get_mut(policy)?;
        let untried = |slot: &&mut Box<Slot<H>>| {
            !tried.iter().any(|server| server.serial == slot.server.serial)
        };
        let eligible =
            queue.iter_mut().filter(untried).filter(|slot| slot.is_eligible(now)).count();
        let any = queue.iter_mut().filter(untried).count();
        let turn = *retries;
        *retries = retries.wrapping_add(1);
        let slot = if eligible > 0 {
            queue
                .iter_mut()
                .filter(untried)
                .filter(|slot| slot.is_eligible(now))
                .nth(turn % eligible)
        } else {
            queue.iter_mut().filter(untried).nth(turn % any.max(1))
        };
        slot.map(|slot| slot.take_turn(now))
    }

    /// The server answered as it should. Says whether it had been set aside until now.
    pub fn succeeded(&self, server: &Server<H>, now: Instant) -> bool {
        if server.failures.load(Ordering::Relaxed) == 0 {
            return false;
        }
        let mut inner = self.lock();
        let Some(slot) = inner.slot(server) else { return false };
        let was_aside = slot.aside_until.is_some();
        slot.forgive(now);
        was_aside
    }

    /// The server failed. Says whether it is set aside by this, and was not before.
    pub fn failed(&self, server: &Server<H>, failure: Failure, now: Instant) -> bool {
        let mut inner = self.lock();
        let Some(slot) = inner.slot(server) else { return false };
        let failures = server.failures.fetch_add(1, Ordering::Relaxed) + 1;
        if failure == Failure::Other && failures < FAILURES_IN_A_ROW {
            return false;
        }
        let newly = slot.aside_until.replace(now + SET_ASIDE).is_none();
        if newly {
            slot.state_since = now;
        }
        newly
    }

    /// Whether the server's registration is still the one that was selected.
    pub fn holds(&self, server: &Server<H>) -> bool {
        self.lock().slot(server).is_some()
    }

    /// Every policy with its servers in the order of their turns.
    pub fn snapshot(&self) -> Vec<(String, Vec<Entry<H>>)> {
        let inner = self.lock();
        let mut policies: Vec<_> = inner
            .policies
            .iter()
            .map(|(name, policy)| {
                let entries = policy.queue.iter().map(|slot| Entry {
                    server: Arc::clone(&slot.server),
                    lease: slot
                        .holders
                        .last()
                        .map(|(lease, since, at)| (lease.length, *since, *at)),
                    aside_until: slot.aside_until,
                    state_since: slot.state_since,
                });
                (name.clone(), entries.collect())
            })
            .collect();
        drop(inner);
        policies.sort_by(|(a, _): &(String, Vec<Entry<H>>), (b, _)| a.cmp(b));
        policies
    }
}

impl<H> Inner<H> {
    fn slot(&mut self, server: &Server<H>) -> Option<&mut Box<Slot<H>>> {
        let queue = &mut self.policies.get_mut(&server.policy)?.queue;
        queue.iter_mut().find(|slot| slot.server.serial == server.serial)
    }
}
