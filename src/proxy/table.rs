//! The message switching table: which servers serve which policy, and whose turn it is.
//!
//! One queue per policy: the first eligible server is taken and goes to the back. That is the homework's
//! round robin, and it stays exact however many threads select at once, because each selection is one step
//! under one mutex. A plain mutex is enough: a selection takes a few hundred nanoseconds, and no thread
//! blocks while it holds the mutex. The table knows no sockets: it stores the caller's handle with each
//! server. Callers pass in the time, so that tests need not sleep.
//!
//! `registrations` says who is in the table, `policy` whose turn it is and which messages wait, `member`
//! what is known of one server.

mod member;
mod policy;
mod registrations;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use crate::net::lock::lock;
use policy::Policy;

pub use member::{Lease, Member, Server};
pub use policy::{Ready, Routed, Selected};
pub use registrations::{RegisterError, Registered, Registration};

/// Consecutive failures (other than `Unreachable`) after which a server is ejected.
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

/// What went wrong with a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// It cannot be reached: ejected at once.
    Unreachable,
    /// Any other failure: ejected after [`CONSECUTIVE_FAILURES`] in a row.
    MayBeChance,
}

/// What a failure did to the server in the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Blamed {
    /// Nothing: the attempt began before the last failure that was counted, or the server has left.
    NotCounted,
    /// It was counted, and ejected nothing: too few in a row, or already ejected.
    Counted,
    /// It ejected the server.
    Ejected,
}

/// The switching table. It keeps the messages that wait for a server.
#[derive(Debug)]
pub struct Table<H, M> {
    limits: Limits,
    inner: Mutex<Inner<H, M>>,
    /// A lease has ended.
    lease_ended: Condvar,
}

#[derive(Debug)]
struct Inner<H, M> {
    policies: HashMap<String, Policy<H, M>>,
    next_serial: u64,
}

impl<H, M: Routed> Table<H, M> {
    /// An empty table.
    pub fn new(limits: Limits) -> Self {
        let inner = Inner { policies: HashMap::new(), next_serial: 0 };
        Table { limits, inner: Mutex::new(inner), lease_ended: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, Inner<H, M>> {
        lock(&self.inner)
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

    /// Selects a server for a retry, without changing whose turn it is. If all servers that it may go to are
    /// full and `may_wait` is set, the message waits, and takes a turn like a new one.
    pub fn select_for_retry(&self, message: M, now: Instant, may_wait: bool) -> Selected<H, M> {
        match self.lock().policies.get_mut(message.policy()) {
            Some(policy) => policy.select_for_retry(message, now, may_wait),
            None => Selected::Nobody(message),
        }
    }

    /// Lets a message wait for a server that restarts, or for another. Returns the message if `restart_grace`
    /// is zero or the policy is unknown.
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

    /// Takes the messages of a policy whose wait is over: a server is free, or they are late. Call it when a
    /// message begins to wait and after each change.
    pub fn take_ready(&self, policy: &str, now: Instant) -> Option<Ready<H, M>> {
        let mut inner = self.lock();
        let policy = inner.policies.get_mut(policy)?;
        (policy.waiting() > 0).then(|| policy.take_ready(now))
    }

    /// Frees one unit of a server's capacity. Returns whether messages of the policy wait.
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

    /// How many servers there are that a message may go to, counted up to `limit`.
    pub fn count_allowed(&self, message: &M, limit: usize) -> usize {
        let inner = self.lock();
        let queue = inner.policies.get(message.policy()).into_iter().flat_map(|it| &it.queue);
        queue.filter(|member| message.may_go_to(member.server.serial)).take(limit).count()
    }

    /// Records a success: resets the failures and ends the ejection. Returns whether the server was ejected.
    pub fn record_success(&self, server: &Server<H>, now: Instant) -> bool {
        if server.failures.load(Ordering::Relaxed) == 0 {
            return false;
        }
        let mut inner = self.lock();
        let Some(member) = inner.member(server) else { return false };
        let was_ejected = member.ejected_until.is_some();
        member.mark_healthy(now);
        was_ejected
    }

    /// Records a failed attempt that began at `since`. Attempts that began before the last counted failure do
    /// not count: messages that one stall delayed are one failure.
    pub fn record_failure(
        &self,
        server: &Server<H>,
        failure: Failure,
        since: Instant,
        now: Instant,
    ) -> Blamed {
        let mut inner = self.lock();
        let Some(member) = inner.member(server) else { return Blamed::NotCounted };
        if member.failed_at.is_some_and(|failed_at| since < failed_at) {
            return Blamed::NotCounted;
        }
        member.failed_at = Some(now);
        let failures = server.failures.fetch_add(1, Ordering::Relaxed) + 1;
        if failure == Failure::MayBeChance && failures < CONSECUTIVE_FAILURES {
            return Blamed::Counted;
        }
        if member.eject(now) { Blamed::Ejected } else { Blamed::Counted }
    }

    /// Whether the server registered a moment ago, without a lease, and may not listen yet.
    pub fn is_starting(&self, server: &Server<H>, now: Instant) -> bool {
        self.lock().member(server).is_some_and(|member| member.is_starting(now))
    }

    /// All servers.
    pub fn servers(&self) -> Vec<Arc<Server<H>>> {
        let inner = self.lock();
        let members = inner.policies.values().flat_map(|policy| &policy.queue);
        members.map(|member| Arc::clone(&member.server)).collect()
    }

    /// Every policy with its servers in the order of their turns.
    pub fn snapshot(&self) -> BTreeMap<String, Vec<Member<H>>> {
        let inner = self.lock();
        let served = inner.policies.iter().filter(|(_, policy)| !policy.queue.is_empty());
        served.map(|(name, policy)| (name.clone(), policy.members())).collect()
    }
}

impl<H, M: Routed> Inner<H, M> {
    fn member(&mut self, server: &Server<H>) -> Option<&mut Box<Member<H>>> {
        let queue = &mut self.policies.get_mut(&server.policy)?.queue;
        queue.iter_mut().find(|member| member.server.serial == server.serial)
    }
}
