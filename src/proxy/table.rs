//! The message switching table: which servers serve which policy, and whose turn it is.
//!
//! One queue per policy: the first eligible server is taken and goes to the back. That is the
//! homework's round robin, and it stays exact however many threads select at once, because each
//! selection is one step under one mutex. A plain mutex is enough: a selection takes some hundred
//! nanoseconds and nothing waits while it is held. The table knows no sockets; it keeps a handle
//! of the caller's beside each server. Time is passed in, so that tests need not wait for it.

mod member;

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use member::Member;

pub use member::{Lease, Server};

/// Failures in a row, of the kinds that may be chance, after which a server is ejected.
pub const CONSECUTIVE_FAILURES: u32 = 3;

/// How large the table may grow.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Registrations in all.
    pub servers: usize,
    /// Policies.
    pub policies: usize,
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

/// What a registration did to the table.
#[derive(Debug)]
pub enum Registered<H> {
    /// A new server, at the back of its policy's rotation.
    Added,
    /// The server was there, at this address.
    Refreshed,
    /// The server took the place of this earlier registration of the same id and policy.
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

/// What a failure did to the server's place in the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Blamed {
    /// Nothing: the attempt began before the last failure that was counted, or the server has left.
    Already,
    /// It was counted.
    Counted,
    /// The server is ejected by it, and was not before.
    Ejected,
}

/// A server's place in the table, for those who look.
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
    queue: VecDeque<Box<Member<H>>>,
    /// Retries so far; they have a rotation of their own, so as not to disturb the turns.
    retries: usize,
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
    /// A registration without a lease ends with nothing that can be seen, so those of servers that
    /// are long gone would fill the table in time. In a full table one that is ejected gives way
    /// to a new server: the one that has been for longest. One that has not failed never does, even
    /// if no message ever came to it: an idle server looks just the same, and by whatever age or
    /// order such ones gave way, whoever registers often enough could push out honest servers. The
    /// first message to it shows whether it is there.
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
        let member = inner
            .policies
            .get_mut(policy)
            .and_then(|policy| policy.queue.iter_mut().find(|member| member.server.id == id));
        if let Some(member) = member {
            let same_address = member.server.address == address;
            if !same_address && !member.holders.is_empty() {
                return Err(RegisterError::InUse(member.server.address));
            }
            if same_address && member.server.leased >= lease.is_some() {
                match lease {
                    Some(lease) => member.hold(lease, now),
                    None if member.holders.is_empty() => member.mark_healthy(now),
                    None => {}
                }
                return Ok(Registered::Refreshed);
            }
            let old = std::mem::replace(member, Member::new(server(handle()), lease, now));
            return Ok(Registered::Replaced(old.server));
        }
        let lacks_policy =
            inner.policies.len() >= self.limits.policies && !inner.policies.contains_key(policy);
        let error = if inner.servers >= self.limits.servers {
            Some(RegisterError::TooManyServers)
        } else {
            lacks_policy.then_some(RegisterError::TooManyPolicies)
        };
        let old = error.map(|error| inner.make_room(lacks_policy).ok_or(error)).transpose()?;
        let new = Member::new(server(handle()), lease, now);
        inner.servers += 1;
        inner
            .policies
            .entry(policy.to_owned())
            .or_insert_with(|| Policy { queue: VecDeque::new(), retries: 0 })
            .queue
            .push_back(new);
        Ok(match old {
            Some(old) => Registered::Displaced(old),
            None => Registered::Added,
        })
    }

    /// Ends `holder`'s lease; the server that nobody holds any more leaves the table and is
    /// returned.
    pub fn release(&self, policy: &str, id: &str, holder: u64) -> Option<Arc<Server<H>>> {
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
        inner.remove(policy, at)
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
                inner.remove(&server.policy, at);
            }
        }
        (expired, next)
    }

    /// For each of these policies in turn the server whose turn it is; `None` where nothing is
    /// registered for it.
    pub fn select<P: AsRef<str>>(
        &self,
        policies: impl Iterator<Item = P>,
        now: Instant,
    ) -> Vec<Option<Arc<Server<H>>>> {
        let mut inner = self.lock();
        policies.map(|policy| inner.select(policy.as_ref(), now)).collect()
    }

    /// A server for a message's retry, other than those `excluded` by their registrations. Nobody's
    /// turn changes by it.
    pub fn select_for_retry(
        &self,
        policy: &str,
        excluded: &[u64],
        now: Instant,
    ) -> Option<Arc<Server<H>>> {
        let mut inner = self.lock();
        let policy = inner.policies.get_mut(policy)?;
        let is_left = |member: &Member<H>| !excluded.contains(&member.server.serial);
        policy
            .pick_for_retry(now, |member| is_left(member) && member.is_eligible(now))
            .or_else(|| policy.pick_for_retry(now, is_left))
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
        let mut policies: Vec<_> = inner
            .policies
            .iter()
            .map(|(name, policy)| {
                let entries = policy.queue.iter().map(|member| Entry {
                    server: Arc::clone(&member.server),
                    lease: member
                        .holders
                        .last()
                        .map(|(lease, since, at)| (lease.length, *since, *at)),
                    ejected_until: member.ejected_until,
                    state_since: member.state_since,
                });
                (name.clone(), entries.collect())
            })
            .collect();
        drop(inner);
        policies.sort_by(|(a, _): &(String, Vec<Entry<H>>), (b, _)| a.cmp(b));
        policies
    }
}

impl<H> Policy<H> {
    /// One of those that are wanted, which take turns in this.
    fn pick_for_retry(
        &mut self,
        now: Instant,
        is_wanted: impl Fn(&Member<H>) -> bool,
    ) -> Option<Arc<Server<H>>> {
        let wanted = || self.queue.iter().filter(|member| is_wanted(member)).count();
        let turn = self.retries.checked_rem(wanted())?;
        self.retries = self.retries.wrapping_add(1);
        let mut wanted = self.queue.iter_mut().filter(|member| is_wanted(member));
        wanted.nth(turn).map(|member| member.take_turn(now))
    }
}

impl<H> Inner<H> {
    fn select(&mut self, policy: &str, now: Instant) -> Option<Arc<Server<H>>> {
        let queue = &mut self.policies.get_mut(policy)?.queue;
        // Where all are ejected, they are tried all the same.
        let at = queue.iter().position(|member| member.is_eligible(now)).unwrap_or(0);
        let mut member = queue.remove(at)?;
        let server = member.take_turn(now);
        queue.push_back(member);
        Some(server)
    }

    fn member(&mut self, server: &Server<H>) -> Option<&mut Box<Member<H>>> {
        let queue = &mut self.policies.get_mut(&server.policy)?.queue;
        queue.iter_mut().find(|member| member.server.serial == server.serial)
    }

    /// Removes the server that can be spared best, if any can, and with it its policy where that is
    /// what is needed.
    fn make_room(&mut self, for_policy: bool) -> Option<Arc<Server<H>>> {
        let (_, at, policy) = self
            .policies
            .iter()
            .filter(|(_, policy)| !for_policy || policy.queue.len() == 1)
            .flat_map(|(name, policy)| policy.queue.iter().enumerate().map(move |at| (name, at)))
            .filter_map(|(name, (at, member))| Some((member.dispensable_since()?, at, name)))
            .min()?;
        let policy = policy.clone();
        self.remove(&policy, at)
    }

    fn remove(&mut self, policy: &str, at: usize) -> Option<Arc<Server<H>>> {
        let queue = &mut self.policies.get_mut(policy)?.queue;
        let member = queue.remove(at)?;
        if queue.is_empty() {
            self.policies.remove(policy);
        }
        self.servers -= 1;
        Some(member.server)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::thread;

    use proptest::prelude::*;

    use super::member::EJECTION_TIME;
    use super::*;

    /// A table whose handles are numbers, with room for ten servers and three policies.
    fn empty() -> Table<u16> {
        Table::new(Limits { servers: 10, policies: 3 })
    }

    /// A table in which servers of these ids serve policy `P`, without a lease.
    fn table(ids: &[&str], now: Instant) -> Table<u16> {
        let table = empty();
        for id in ids {
            let registered = register(&table, id, 1, None, now);
            assert!(matches!(registered, Ok(Registered::Added)));
        }
        table
    }

    /// Notes a failure of an attempt that has just begun. Returns whether the server is ejected by it.
    fn failed(table: &Table<u16>, server: &Server<u16>, failure: Failure, now: Instant) -> bool {
        table.failed(server, failure, now, now) == Blamed::Ejected
    }

    /// The server for one message.
    fn select(table: &Table<u16>, policy: &str, now: Instant) -> Option<Arc<Server<u16>>> {
        table.select([policy].into_iter(), now).pop().flatten()
    }

    /// Registers a server of policy `P` at a port, which becomes its handle.
    fn register(
        table: &Table<u16>,
        id: &str,
        port: u16,
        holder: Option<u64>,
        now: Instant,
    ) -> Result<Registered<u16>, RegisterError> {
        register_for(table, "P", id, port, holder, now)
    }

    fn register_for(
        table: &Table<u16>,
        policy: &str,
        id: &str,
        port: u16,
        holder: Option<u64>,
        now: Instant,
    ) -> Result<Registered<u16>, RegisterError> {
        let lease = holder.map(|holder| Lease { holder, length: Duration::from_secs(8) });
        let address = address(port);
        table.register(Registration { policy, id, address, lease }, now, || port)
    }

    fn address(port: u16) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], port))
    }

    /// The ids of the next servers of policy `P`.
    fn turns(table: &Table<u16>, count: usize, now: Instant) -> String {
        (0..count).map(|_| select(table, "P", now).unwrap().id.clone()).collect()
    }

    /// The next server of policy `P`, which must be this one.
    fn next(table: &Table<u16>, id: &str, now: Instant) -> Arc<Server<u16>> {
        let server = select(table, "P", now).unwrap();
        assert_eq!(server.id, id);
        server
    }

    #[test]
    fn servers_take_turns_in_the_order_of_their_registration() {
        let now = Instant::now();
        assert_eq!(turns(&table(&["1", "2"], now), 5, now), "12121");
        assert_eq!(turns(&table(&["3", "1", "2"], now), 7, now), "3123123");
        assert_eq!(turns(&table(&["1"], now), 3, now), "111");
    }

    #[test]
    fn a_policy_that_nobody_serves_has_no_server() {
        let now = Instant::now();
        assert!(select(&table(&["1"], now), "Q", now).is_none());
        assert!(table(&["1"], now).select_for_retry("Q", &[], now).is_none());
    }

    #[test]
    fn threads_share_the_servers_equally() {
        let now = Instant::now();
        let table = table(&["1", "2", "3"], now);
        let mut counts = BTreeMap::new();
        thread::scope(|scope| {
            let threads: Vec<_> = (0..8).map(|_| scope.spawn(|| turns(&table, 300, now))).collect();
            for thread in threads {
                for id in thread.join().unwrap().chars() {
                    *counts.entry(id).or_insert(0) += 1;
                }
            }
        });
        assert_eq!(counts, BTreeMap::from([('1', 800), ('2', 800), ('3', 800)]));
        assert_eq!(turns(&table, 3, now), "123", "2400 turns later it is the first one's again");
    }

    /// What can happen to a table between two turns of policy `P` without changing them.
    #[derive(Debug, Clone)]
    enum Event {
        Turn,
        OtherPolicysTurn,
        Retry(usize),
        Refresh(usize),
        Failure(usize),
        Success(usize),
    }

    fn event() -> impl Strategy<Value = Event> {
        prop_oneof![
            Just(Event::Turn),
            Just(Event::OtherPolicysTurn),
            (0_usize..3).prop_map(Event::Retry),
            (0_usize..3).prop_map(Event::Refresh),
            (0_usize..3).prop_map(Event::Failure),
            (0_usize..3).prop_map(Event::Success),
        ]
    }

    proptest! {
        #[test]
        fn nothing_that_happens_meanwhile_changes_the_turns(
            events in prop::collection::vec(event(), 0..80)
        ) {
            const IDS: [&str; 3] = ["0", "1", "2"];
            let now = Instant::now();
            let table = table(&IDS, now);
            register_for(&table, "Q", "other", 1, None, now).unwrap();
            let servers = IDS.map(|id| next(&table, id, now));
            let (mut turn, mut failures) = (0, [0; 3]);
            for event in events {
                match event {
                    Event::Turn => {
                        next(&table, IDS[turn % 3], now);
                        turn += 1;
                    }
                    Event::OtherPolicysTurn => {
                        prop_assert_eq!(&select(&table, "Q", now).unwrap().id, "other");
                    }
                    Event::Retry(failed) => {
                        let failed = &servers[failed];
                        let another = table.select_for_retry("P", &[failed.serial], now).unwrap();
                        prop_assert_ne!(&another.id, &failed.id);
                    }
                    Event::Refresh(one) => {
                        let refreshed = register(&table, IDS[one], 1, None, now);
                        prop_assert!(matches!(refreshed, Ok(Registered::Refreshed)));
                        failures[one] = 0;
                    }
                    // One more and it would be ejected.
                    Event::Failure(one) if failures[one] < 2 => {
                        prop_assert!(!failed(&table, &servers[one], Failure::MayBeChance, now));
                        failures[one] += 1;
                    }
                    Event::Failure(_) => {}
                    Event::Success(one) => {
                        prop_assert!(!table.succeeded(&servers[one], now));
                        failures[one] = 0;
                    }
                }
            }
        }

        /// Whichever of the servers are out, the others take exact turns.
        #[test]
        fn those_that_are_left_share_evenly(
            count in 2_usize..8,
            out in any::<u8>(),
            skip in 0_usize..8,
        ) {
            let now = Instant::now();
            let ids: Vec<_> = (0..count).map(|id| id.to_string()).collect();
            let table = table(&ids.iter().map(String::as_str).collect::<Vec<_>>(), now);
            turns(&table, skip, now);
            let (mut left, mut messages) = (count, 0);
            for server in (0..count).filter_map(|_| select(&table, "P", now)) {
                if left > 1 && server.id.parse::<u32>().is_ok_and(|id| out >> id & 1 == 1) {
                    prop_assert!(failed(&table, &server, Failure::Unreachable, now));
                    left -= 1;
                }
            }
            let mut counts = BTreeMap::new();
            while messages < 3 * left {
                *counts.entry(turns(&table, 1, now)).or_insert(0) += 1;
                messages += 1;
            }
            prop_assert_eq!(counts.len(), left);
            prop_assert!(counts.values().all(|count| *count == 3), "{:?}", counts);
        }
    }

    #[test]
    fn retries_go_to_the_others_evenly() {
        let now = Instant::now();
        let table = table(&["1", "2", "3"], now);
        let mut counts = BTreeMap::new();
        for _ in 0..10 {
            let failed = next(&table, "1", now);
            let another = table.select_for_retry("P", &[failed.serial], now).unwrap();
            *counts.entry(another.id.clone()).or_insert(0) += 1;
            turns(&table, 2, now);
        }
        assert_eq!(counts, BTreeMap::from([("2".to_owned(), 5), ("3".to_owned(), 5)]));
    }

    #[test]
    fn each_server_is_tried_once_for_a_message() {
        let now = Instant::now();
        let table = table(&["1", "2", "3"], now);
        let first = select(&table, "P", now).unwrap();
        let second = table.select_for_retry("P", &[first.serial], now).unwrap();
        let third = table.select_for_retry("P", &[first.serial, second.serial], now).unwrap();
        let mut ids = [&first, &second, &third].map(|server| server.id.as_str());
        ids.sort_unstable();
        assert_eq!(ids, ["1", "2", "3"]);
        assert!(
            table
                .select_for_retry("P", &[first.serial, second.serial, third.serial], now)
                .is_none()
        );
    }

    #[test]
    fn a_retry_prefers_a_server_that_is_not_ejected() {
        let now = Instant::now();
        let table = table(&["1", "2", "3"], now);
        let one = next(&table, "1", now);
        let two = next(&table, "2", now);
        failed(&table, &two, Failure::Unreachable, now);
        for _ in 0..4 {
            assert_eq!(table.select_for_retry("P", &[one.serial], now).unwrap().id, "3");
        }
        let three = next(&table, "3", now);
        assert_eq!(table.select_for_retry("P", &[one.serial, three.serial], now).unwrap().id, "2");
    }

    #[test]
    fn a_server_that_is_unreachable_once_is_ejected() {
        let now = Instant::now();
        let table = table(&["1", "2", "3"], now);
        let one = next(&table, "1", now);
        assert!(failed(&table, &one, Failure::Unreachable, now));
        assert!(!failed(&table, &one, Failure::Unreachable, now), "it already was");
        assert_eq!(turns(&table, 4, now), "2323");
    }

    #[test]
    fn a_server_that_fails_otherwise_is_ejected_the_third_time_in_a_row() {
        let now = Instant::now();
        let table = table(&["1", "2"], now);
        let one = next(&table, "1", now);
        let outcomes = [
            failed(&table, &one, Failure::MayBeChance, now),
            failed(&table, &one, Failure::MayBeChance, now),
            // Which ends the row.
            table.succeeded(&one, now),
            failed(&table, &one, Failure::MayBeChance, now),
            failed(&table, &one, Failure::MayBeChance, now),
            failed(&table, &one, Failure::MayBeChance, now),
        ];
        assert_eq!(outcomes, [false, false, false, false, false, true]);
        assert_eq!(turns(&table, 3, now), "222");
    }

    #[test]
    fn one_message_is_tried_at_a_server_that_was_ejected_for_long_enough() {
        let now = Instant::now();
        let table = table(&["1", "2"], now);
        let one = next(&table, "1", now);
        failed(&table, &one, Failure::Unreachable, now);
        let almost = now + EJECTION_TIME - Duration::from_millis(1);
        assert_eq!(turns(&table, 3, almost), "222");
        let then = now + EJECTION_TIME;
        assert_eq!(turns(&table, 4, then), "1222", "no second one while the first is on its way");
        failed(&table, &one, Failure::Unreachable, then);
        assert_eq!(turns(&table, 3, then), "222");
        let later = then + EJECTION_TIME;
        assert_eq!(turns(&table, 2, later), "12");
        assert!(table.succeeded(&one, later), "it is back, which is worth a line");
        assert!(!table.succeeded(&one, later));
        assert_eq!(turns(&table, 4, later), "1212");
    }

    #[test]
    fn a_trial_whose_outcome_nobody_tells_is_repeated() {
        let now = Instant::now();
        let table = table(&["1", "2"], now);
        failed(&table, &next(&table, "1", now), Failure::Unreachable, now);
        assert_eq!(turns(&table, 3, now), "222");
        let then = now + EJECTION_TIME;
        assert_eq!(turns(&table, 3, then), "122");
        assert_eq!(turns(&table, 2, then + EJECTION_TIME), "12");
    }

    #[test]
    fn where_all_are_ejected_they_are_tried_all_the_same() {
        let now = Instant::now();
        let table = table(&["1", "2"], now);
        for server in ["1", "2"].map(|id| next(&table, id, now)) {
            failed(&table, &server, Failure::Unreachable, now);
        }
        assert_eq!(turns(&table, 4, now), "1212");
        let one = next(&table, "1", now);
        assert_eq!(table.select_for_retry("P", &[one.serial], now).unwrap().id, "2");
    }

    #[test]
    fn a_server_that_registers_again_is_no_longer_ejected() {
        let now = Instant::now();
        let table = table(&["1", "2"], now);
        failed(&table, &next(&table, "1", now), Failure::Unreachable, now);
        register(&table, "1", 1, None, now).unwrap();
        assert_eq!(turns(&table, 4, now), "2121");
    }

    #[test]
    fn the_same_registration_again_adds_no_second_turn() {
        let now = Instant::now();
        let table = table(&["1", "2"], now);
        for _ in 0..3 {
            let registered = register(&table, "1", 1, None, now);
            assert!(matches!(registered, Ok(Registered::Refreshed)));
        }
        assert_eq!(turns(&table, 4, now), "1212");
    }

    #[test]
    fn a_server_that_moved_is_replaced_in_its_place() {
        let now = Instant::now();
        let table = table(&["1", "2", "3"], now);
        turns(&table, 1, now);
        let Ok(Registered::Replaced(old)) = register(&table, "2", 9, None, now) else {
            panic!("replaced")
        };
        assert_eq!(old.handle, 1);
        let two = next(&table, "2", now);
        assert_eq!((two.address, two.handle), (address(9), 9));
        assert_eq!(turns(&table, 3, now), "312");
    }

    #[test]
    fn what_becomes_of_a_replaced_server_is_nothing_to_the_new_one() {
        let now = Instant::now();
        let table = table(&["1", "2"], now);
        let old = next(&table, "1", now);
        register(&table, "1", 9, None, now).unwrap();
        assert!(!failed(&table, &old, Failure::Unreachable, now));
        assert_eq!(turns(&table, 4, now), "2121");
    }

    #[test]
    fn a_live_lease_keeps_others_out() {
        let now = Instant::now();
        let table = empty();
        register(&table, "1", 1, Some(7), now).unwrap();
        for holder in [None, Some(8)] {
            let refused = register(&table, "1", 2, holder, now).unwrap_err();
            assert_eq!(refused, RegisterError::InUse(address(1)));
        }
        // Another policy is another matter.
        register_for(&table, "Q", "1", 2, None, now).unwrap();
    }

    #[test]
    fn a_server_without_a_lease_can_be_replaced_by_one_with_and_gains_it_in_place() {
        let now = Instant::now();
        let table = table(&["1", "2"], now);
        let registered = register(&table, "1", 1, Some(7), now);
        assert!(matches!(registered, Ok(Registered::Replaced(_))), "it is talked to differently");
        assert_eq!(turns(&table, 2, now), "12");
        assert!(next(&table, "1", now).leased);
    }

    #[test]
    fn a_server_leaves_with_the_last_holder_of_its_lease() {
        let now = Instant::now();
        let table = empty();
        register(&table, "1", 1, Some(7), now).unwrap();
        register(&table, "2", 1, Some(8), now).unwrap();
        // It registered again before the end of its first connection was seen.
        let again = register(&table, "1", 1, Some(9), now);
        assert!(matches!(again, Ok(Registered::Refreshed)));
        assert!(table.release("P", "1", 7).is_none());
        assert_eq!(turns(&table, 2, now), "12");
        assert!(table.release("P", "1", 8).is_none(), "that is another's lease");
        assert_eq!(table.release("P", "1", 9).unwrap().id, "1");
        assert!(table.release("P", "1", 9).is_none());
        assert_eq!(turns(&table, 2, now), "22");
    }

    #[test]
    fn a_renewal_keeps_the_holder_and_moves_the_time() {
        let now = Instant::now();
        let table = empty();
        register(&table, "1", 1, Some(7), now).unwrap();
        let later = now + Duration::from_secs(2);
        register(&table, "1", 1, Some(7), later).unwrap();
        let snapshot = table.snapshot();
        assert_eq!(snapshot[0].1[0].lease, Some((Duration::from_secs(8), now, later)));
        assert!(table.release("P", "1", 7).is_some(), "one holder, however often renewed");
    }

    #[test]
    fn a_release_by_one_who_was_replaced_does_nothing() {
        let now = Instant::now();
        let table = empty();
        register(&table, "1", 1, Some(7), now).unwrap();
        table.release("P", "1", 7).unwrap();
        register(&table, "1", 2, Some(8), now).unwrap();
        assert!(table.release("P", "1", 7).is_none());
        assert_eq!(next(&table, "1", now).address, address(2));
    }

    #[test]
    fn the_last_server_takes_its_policy_with_it() {
        let now = Instant::now();
        let table = empty();
        register(&table, "1", 1, Some(7), now).unwrap();
        table.release("P", "1", 7);
        assert!(select(&table, "P", now).is_none());
        assert!(table.snapshot().is_empty());
    }

    #[test]
    fn a_full_table_takes_no_server_but_renews_and_replaces() {
        let now = Instant::now();
        let table = Table::new(Limits { servers: 2, policies: 2 });
        register(&table, "1", 1, None, now).unwrap();
        register(&table, "2", 1, Some(7), now).unwrap();
        assert_eq!(register(&table, "3", 1, None, now).unwrap_err(), RegisterError::TooManyServers);
        register(&table, "1", 1, None, now).unwrap();
        register(&table, "1", 5, None, now).unwrap();
        table.release("P", "2", 7).unwrap();
        register(&table, "3", 1, None, now).unwrap();
    }

    #[test]
    fn policies_are_limited_too() {
        let now = Instant::now();
        let table = Table::new(Limits { servers: 10, policies: 2 });
        register_for(&table, "P", "1", 1, Some(7), now).unwrap();
        register_for(&table, "Q", "1", 1, None, now).unwrap();
        let refused = register_for(&table, "R", "1", 1, None, now).unwrap_err();
        assert_eq!(refused, RegisterError::TooManyPolicies);
        register_for(&table, "P", "2", 1, Some(8), now).unwrap();
        table.release("P", "1", 7).unwrap();
        table.release("P", "2", 8).unwrap();
        register_for(&table, "R", "1", 1, None, now).unwrap();
    }

    fn displaced(registered: Result<Registered<u16>, RegisterError>) -> String {
        match registered {
            Ok(Registered::Displaced(old)) => old.id.clone(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn in_a_full_table_the_server_that_was_ejected_first_gives_way() {
        let now = Instant::now();
        let table = Table::new(Limits { servers: 3, policies: 1 });
        for id in ["1", "2", "3"] {
            register(&table, id, 1, None, now).unwrap();
        }
        let servers = ["1", "2", "3"].map(|id| next(&table, id, now));
        failed(&table, &servers[1], Failure::Unreachable, now);
        // Its time is over then, but it has not answered since.
        let later = now + 2 * EJECTION_TIME;
        failed(&table, &servers[0], Failure::Unreachable, later);
        assert_eq!(displaced(register(&table, "4", 1, None, later)), "2");
        assert_eq!(displaced(register(&table, "5", 1, Some(7), later)), "1");
        assert_eq!(turns(&table, 4, later), "3453");
        let refused = register(&table, "6", 1, None, later).unwrap_err();
        assert_eq!(refused, RegisterError::TooManyServers);
    }

    #[test]
    fn nobody_gives_way_who_is_held_or_has_answered_or_was_never_asked() {
        let now = Instant::now();
        let table = Table::new(Limits { servers: 5, policies: 9 });
        register(&table, "held", 1, Some(7), now).unwrap();
        for id in ["failing", "back", "again"] {
            register(&table, id, 1, None, now).unwrap();
        }
        register_for(&table, "Q", "idle", 1, None, now).unwrap();
        let [held, failing, back, again] =
            ["held", "failing", "back", "again"].map(|id| next(&table, id, now));
        for server in [&held, &back, &again] {
            assert!(failed(&table, server, Failure::Unreachable, now));
        }
        assert!(!failed(&table, &failing, Failure::MayBeChance, now));
        assert!(table.succeeded(&back, now));
        register(&table, "again", 1, None, now).unwrap();
        let much_later = now + 1000 * EJECTION_TIME;
        for policy in ["P", "R"] {
            let refused = register_for(&table, policy, "new", 1, Some(8), much_later).unwrap_err();
            assert_eq!(refused, RegisterError::TooManyServers);
        }
    }

    #[test]
    fn for_a_policy_only_a_policys_last_server_gives_way() {
        let now = Instant::now();
        let table = Table::new(Limits { servers: 9, policies: 2 });
        register(&table, "1", 1, None, now).unwrap();
        register(&table, "2", 1, None, now).unwrap();
        register_for(&table, "Q", "3", 1, None, now).unwrap();
        failed(&table, &next(&table, "1", now), Failure::Unreachable, now);
        let refused = register_for(&table, "R", "4", 1, None, now).unwrap_err();
        assert_eq!(refused, RegisterError::TooManyPolicies);
        failed(&table, &select(&table, "Q", now).unwrap(), Failure::Unreachable, now);
        assert_eq!(displaced(register_for(&table, "R", "4", 1, None, now)), "3");
        assert!(select(&table, "Q", now).is_none());
        assert_eq!(turns(&table, 2, now), "22", "where there is room nobody gives way");
        register(&table, "5", 1, None, now).unwrap();
        assert_eq!(table.snapshot().iter().map(|(_, servers)| servers.len()).sum::<usize>(), 4);
    }

    #[test]
    fn a_snapshot_shows_policies_by_name_and_servers_by_their_turns() {
        let now = Instant::now();
        let table = table(&["1", "2", "3"], now);
        register_for(&table, "A", "9", 1, None, now).unwrap();
        let one = next(&table, "1", now);
        failed(&table, &one, Failure::Unreachable, now);
        let shown: Vec<_> = table
            .snapshot()
            .into_iter()
            .map(|(policy, servers)| {
                let servers: Vec<_> = servers
                    .iter()
                    .map(|entry| (entry.server.id.clone(), entry.ejected_until))
                    .collect();
                (policy, servers)
            })
            .collect();
        let entry = |id: &str, ejected| (id.to_owned(), ejected);
        let ejected = Some(now + EJECTION_TIME);
        assert_eq!(
            shown,
            [
                ("A".to_owned(), vec![entry("9", None)]),
                ("P".to_owned(), vec![entry("2", None), entry("3", None), entry("1", ejected)]),
            ]
        );
    }
}
