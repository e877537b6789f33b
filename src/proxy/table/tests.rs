//! The switching table: turns, ejections, leases and limits.

mod places;

use std::cell::Cell;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::thread;

use proptest::prelude::*;

use super::member::EJECTION_TIME;
use super::*;

/// A message that waits from `arrived` until `deadline`.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Message {
    policy: &'static str,
    excluded: Vec<u64>,
    arrived: Instant,
    deadline: Instant,
}

impl Routed for Message {
    fn policy(&self) -> &str {
        self.policy
    }

    fn arrived(&self) -> Instant {
        self.arrived
    }

    fn deadline(&self) -> Instant {
        self.deadline
    }

    fn may_go_to(&self, serial: u64) -> bool {
        ASKED.set(ASKED.get() + 1);
        !self.excluded.contains(&serial)
    }

    fn may_go_anywhere(&self) -> bool {
        self.excluded.is_empty()
    }
}

thread_local! {
    /// How often messages were asked whether they may go to a server.
    static ASKED: Cell<usize> = const { Cell::new(0) };
}

type Table = super::Table<u16, Message>;

const TIMEOUT: Duration = Duration::from_secs(10);

fn message(policy: &'static str, excluded: &[u64], arrived: Instant) -> Message {
    let deadline = arrived + TIMEOUT;
    Message { policy, excluded: excluded.to_vec(), arrived, deadline }
}

fn limits(servers: usize, policies: usize) -> Limits {
    Limits { servers, policies, restart_grace: Duration::ZERO }
}

fn server(selected: Selected<u16, Message>) -> Option<Arc<Server<u16>>> {
    match selected {
        Selected::Server(_, server) => Some(server),
        Selected::Waits(_) => panic!("it waits"),
        Selected::Nobody(_) => None,
    }
}

fn retry(
    table: &Table,
    policy: &'static str,
    excluded: &[u64],
    now: Instant,
) -> Option<Arc<Server<u16>>> {
    server(table.select_for_retry(message(policy, excluded, now), now, true))
}

/// A table whose handles are numbers, with room for ten servers and three policies.
fn empty() -> Table {
    Table::new(limits(10, 3))
}

/// A table in which servers of these ids serve policy `P`, without a lease.
fn table(ids: &[&str], now: Instant) -> Table {
    let table = empty();
    for id in ids {
        let registered = register(&table, id, 1, None, now);
        assert!(matches!(registered, Ok(Registered::Added)));
    }
    table
}

/// Notes a failure of an attempt that has just begun. Returns whether the server is ejected by it.
fn failed(table: &Table, server: &Server<u16>, failure: Failure, now: Instant) -> bool {
    table.record_failure(server, failure, now, now) == Blamed::Ejected
}

/// The server for one message.
fn select(table: &Table, policy: &'static str, now: Instant) -> Option<Arc<Server<u16>>> {
    server(table.select(vec![message(policy, &[], now)], now).remove(0))
}

/// Registers a server of policy `P` at a port, which becomes its handle.
fn register(
    table: &Table,
    id: &str,
    port: u16,
    holder: Option<u64>,
    now: Instant,
) -> Result<Registered<u16>, RegisterError> {
    register_for(table, "P", id, port, holder, now)
}

fn register_for(
    table: &Table,
    policy: &str,
    id: &str,
    port: u16,
    holder: Option<u64>,
    now: Instant,
) -> Result<Registered<u16>, RegisterError> {
    let lease = holder.map(|holder| Lease { holder, length: Duration::from_secs(8) });
    let address = address(port);
    table.register(Registration { policy, id, address, lease, capacity: None }, now, || port)
}

fn address(port: u16) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], port))
}

/// The ids of the next servers of policy `P`.
fn turns(table: &Table, count: usize, now: Instant) -> String {
    (0..count).map(|_| select(table, "P", now).unwrap().id.clone()).collect()
}

/// The next server of policy `P`, which must be this one.
fn next(table: &Table, id: &str, now: Instant) -> Arc<Server<u16>> {
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
    assert!(retry(&table(&["1"], now), "Q", &[], now).is_none());
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
                    let another = retry(&table, "P", &[failed.serial], now).unwrap();
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
                    prop_assert!(!table.record_success(&servers[one], now));
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
        let another = retry(&table, "P", &[failed.serial], now).unwrap();
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
    let second = retry(&table, "P", &[first.serial], now).unwrap();
    let third = retry(&table, "P", &[first.serial, second.serial], now).unwrap();
    let mut ids = [&first, &second, &third].map(|server| server.id.as_str());
    ids.sort_unstable();
    assert_eq!(ids, ["1", "2", "3"]);
    assert!(retry(&table, "P", &[first.serial, second.serial, third.serial], now).is_none());
}

#[test]
fn a_retry_prefers_a_server_that_is_not_ejected() {
    let now = Instant::now();
    let table = table(&["1", "2", "3"], now);
    let one = next(&table, "1", now);
    let two = next(&table, "2", now);
    failed(&table, &two, Failure::Unreachable, now);
    for _ in 0..4 {
        assert_eq!(retry(&table, "P", &[one.serial], now).unwrap().id, "3");
    }
    let three = next(&table, "3", now);
    assert_eq!(retry(&table, "P", &[one.serial, three.serial], now).unwrap().id, "2");
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
        table.record_success(&one, now),
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
    assert!(table.record_success(&one, later), "it is back, which is worth a line");
    assert!(!table.record_success(&one, later));
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
    assert_eq!(retry(&table, "P", &[one.serial], now).unwrap().id, "2");
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
fn a_successor_waits_no_longer_than_until_the_lease_ends() {
    let now = Instant::now();
    let table = empty();
    register(&table, "1", 1, Some(7), now).unwrap();
    let (address, limit) = (address(2), Duration::from_secs(20));
    let (policy, id) = ("P", "1");
    let successor = Registration { policy, id, address, lease: None, capacity: None };
    thread::scope(|scope| {
        let wait = scope.spawn(|| table.wait_until_free(&successor, limit));
        while !wait.is_finished() && now.elapsed() < limit / 200 {
            thread::yield_now();
        }
        assert!(!wait.is_finished());
        table.release(policy, id, 7, now).unwrap();
        wait.join().unwrap();
    });
    assert!(now.elapsed() < limit);
    register(&table, "1", 2, Some(8), now).unwrap();
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
fn a_server_leaves_with_the_newest_holder_of_its_lease() {
    let now = Instant::now();
    let table = empty();
    register(&table, "1", 1, Some(7), now).unwrap();
    register(&table, "2", 1, Some(8), now).unwrap();
    // It registered again before the end of its first connection was seen.
    for holder in [9, 7] {
        let again = register(&table, "1", 1, Some(holder), now);
        assert!(matches!(again, Ok(Registered::Refreshed)));
        assert!(table.is_held("P", "1", 9), "an old renewal was still to be read");
    }
    assert!(table.release("P", "1", 7, now).is_none());
    assert_eq!(turns(&table, 2, now), "12");
    assert!(table.release("P", "1", 8, now).is_none(), "that is another's lease");
    assert_eq!(table.release("P", "1", 9, now).unwrap().id, "1");
    assert!(table.release("P", "1", 9, now).is_none());
    assert_eq!(turns(&table, 2, now), "22");
}

#[test]
fn a_renewal_keeps_the_holder_and_moves_the_time() {
    let now = Instant::now();
    let table = empty();
    register(&table, "1", 1, Some(7), now).unwrap();
    let later = now + Duration::from_secs(2);
    register(&table, "1", 1, Some(7), later).unwrap();
    let held = table.snapshot()["P"][0].lease.unwrap();
    assert_eq!((held.lease.length, held.since, held.renewed), (Duration::from_secs(8), now, later));
    assert!(table.release("P", "1", 7, now).is_some(), "one holder, however often renewed");
}

#[test]
fn a_release_by_one_who_was_replaced_does_nothing() {
    let now = Instant::now();
    let table = empty();
    register(&table, "1", 1, Some(7), now).unwrap();
    table.release("P", "1", 7, now).unwrap();
    register(&table, "1", 2, Some(8), now).unwrap();
    assert!(table.release("P", "1", 7, now).is_none());
    assert_eq!(next(&table, "1", now).address, address(2));
}

#[test]
fn the_last_server_takes_its_policy_with_it() {
    let now = Instant::now();
    let table = empty();
    register(&table, "1", 1, Some(7), now).unwrap();
    table.release("P", "1", 7, now);
    assert!(select(&table, "P", now).is_none());
    assert!(table.snapshot().is_empty());
}

#[test]
fn a_full_table_takes_no_server_but_renews_and_replaces() {
    let now = Instant::now();
    let table = Table::new(limits(2, 2));
    register(&table, "1", 1, None, now).unwrap();
    register(&table, "2", 1, Some(7), now).unwrap();
    assert_eq!(register(&table, "3", 1, None, now).unwrap_err(), RegisterError::TooManyServers);
    register(&table, "1", 1, None, now).unwrap();
    register(&table, "1", 5, None, now).unwrap();
    table.release("P", "2", 7, now).unwrap();
    register(&table, "3", 1, None, now).unwrap();
}

#[test]
fn policies_are_limited_too() {
    let now = Instant::now();
    let table = Table::new(limits(10, 2));
    register_for(&table, "P", "1", 1, Some(7), now).unwrap();
    register_for(&table, "Q", "1", 1, None, now).unwrap();
    let refused = register_for(&table, "R", "1", 1, None, now).unwrap_err();
    assert_eq!(refused, RegisterError::TooManyPolicies);
    register_for(&table, "P", "2", 1, Some(8), now).unwrap();
    table.release("P", "1", 7, now).unwrap();
    table.release("P", "2", 8, now).unwrap();
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
    let table = Table::new(limits(3, 1));
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
    let table = Table::new(limits(5, 9));
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
    assert!(table.record_success(&back, now));
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
    let table = Table::new(limits(9, 2));
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
    assert_eq!(table.servers().len(), 4);
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
                .map(|member| (member.server.id.clone(), member.ejected_until))
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
