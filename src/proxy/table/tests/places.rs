//! Servers that take so many messages at once, and the messages that wait for one.

use super::*;

const GRACE: Duration = Duration::from_secs(2);

fn empty_with_grace() -> Table {
    Table::new(Limits { restart_grace: GRACE, ..limits(10, 3) })
}

/// Registers a server of policy `P` with a lease, whose holder is its id.
fn register_with(table: &Table, id: &str, capacity: Option<u64>, now: Instant) {
    let lease = Lease { holder: id.parse().unwrap(), length: Duration::from_secs(1000) };
    let (address, lease) = (address(1), Some(lease));
    let registration = Registration { policy: "P", id, address, lease, capacity };
    table.register(registration, now, || 1).unwrap();
}

fn leave(table: &Table, id: &str, now: Instant) {
    table.release("P", id, id.parse().unwrap(), now).unwrap();
}

/// The server that a new message goes to, unless it waits.
fn ask(table: &Table, message: Message, now: Instant) -> Option<Arc<Server<u16>>> {
    match table.select(vec![message], now).remove(0) {
        Selected::Server(_, server) => Some(server),
        Selected::Waits(policy) => {
            assert_eq!(policy, "P");
            None
        }
        Selected::Nobody(message) => panic!("{message:?} has no server"),
    }
}

fn at(now: Instant, milliseconds: u64) -> Instant {
    now + Duration::from_millis(milliseconds)
}

/// The servers of messages that need not wait any more, and when those came.
fn ready(table: &Table, now: Instant) -> Vec<(Instant, String)> {
    let ready = table.take_ready("P", now);
    let selected = ready.into_iter().flat_map(|ready| ready.selected);
    selected.map(|(message, server)| (message.arrived, server.id.clone())).collect()
}

#[test]
fn a_full_server_is_passed_over_and_the_others_take_turns() {
    let now = Instant::now();
    let table = empty();
    for (id, capacity) in [("1", Some(1)), ("2", None), ("3", Some(2))] {
        register_with(&table, id, capacity, now);
    }
    assert_eq!(turns(&table, 7, now), "1232322");
    let one = table.servers().into_iter().find(|server| server.id == "1").unwrap();
    assert!(!table.free_permit(&one));
    assert_eq!(turns(&table, 3, now), "122");
}

#[test]
fn messages_at_work_count_when_their_server_says_another_capacity() {
    let now = Instant::now();
    let table = empty();
    register_with(&table, "1", Some(2), now);
    let one = ask(&table, message("P", &[], now), now).unwrap();
    assert!(ask(&table, message("P", &[], now), now).is_some());
    register_with(&table, "1", Some(1), now);
    assert!(ask(&table, message("P", &[], now), now).is_none());
    assert!(table.free_permit(&one));
    assert!(ready(&table, now).is_empty(), "it still has one, and takes no other");
    register_with(&table, "1", Some(3), now);
    assert_eq!(ready(&table, now).len(), 1);
    let member = &table.snapshot()["P"][0];
    assert_eq!((member.in_use, member.capacity), (2, Some(3)));
}

#[test]
fn who_holds_no_lease_changes_nothing_for_who_does() {
    let now = Instant::now();
    let table = empty();
    register_with(&table, "1", Some(1), now);
    for capacity in [None, Some(5)] {
        let (policy, id, address) = ("P", "1", address(1));
        let registration = Registration { policy, id, address, lease: None, capacity };
        assert!(matches!(table.register(registration, now, || 1), Ok(Registered::Refreshed)));
    }
    assert_eq!(table.snapshot()["P"][0].capacity, Some(1));
    leave(&table, "1", now);
    assert!(table.servers().is_empty());
}

#[test]
fn a_free_place_goes_to_the_message_that_came_first() {
    let now = Instant::now();
    let table = empty();
    register_with(&table, "1", Some(1), now);
    let one = ask(&table, message("P", &[], now), now).unwrap();
    for milliseconds in [2, 1, 3] {
        let late = at(now, 10);
        assert!(ask(&table, message("P", &[], at(now, milliseconds)), late).is_none());
    }
    assert_eq!(table.waiting(), BTreeMap::from([("P".to_owned(), 3)]));
    assert!(ready(&table, now).is_empty());
    for milliseconds in [1, 2, 3] {
        assert!(table.free_permit(&one));
        assert_eq!(ready(&table, now), [(at(now, milliseconds), "1".to_owned())]);
    }
    assert!(!table.free_permit(&one));
    assert_eq!(turns(&table, 1, now), "1");
}

#[test]
fn a_message_waits_for_no_server_that_has_failed_it() {
    let now = Instant::now();
    let table = empty();
    register_with(&table, "1", Some(1), now);
    register_with(&table, "2", Some(1), now);
    let [one, two] = [(); 2].map(|()| ask(&table, message("P", &[], now), now).unwrap());
    let failed = message("P", &[one.serial], now);
    let waits = table.select_for_retry(failed.clone(), now, true);
    assert!(matches!(waits, Selected::Waits(_)));
    assert!(ask(&table, message("P", &[], at(now, 1)), now).is_none());
    assert!(table.free_permit(&one));
    assert_eq!(ready(&table, now), [(at(now, 1), "1".to_owned())]);
    assert!(table.free_permit(&two));
    assert_eq!(ready(&table, now), [(now, "2".to_owned())]);
    let nobody = table.select_for_retry(message("P", &[one.serial, two.serial], now), now, true);
    assert!(matches!(nobody, Selected::Nobody(_)));
    let may_not = table.select_for_retry(failed, now, false);
    assert!(matches!(may_not, Selected::Nobody(_)));
}

#[test]
fn a_message_waits_until_its_deadline() {
    let now = Instant::now();
    let table = empty();
    register_with(&table, "1", Some(1), now);
    ask(&table, message("P", &[], now), now).unwrap();
    ask(&table, message("P", &[], at(now, 5)), now);
    ask(&table, message("P", &[], now), now);
    let first = table.take_ready("P", now).unwrap();
    assert_eq!(first.look_at, Some(now + TIMEOUT));
    assert!(table.take_ready("P", now).unwrap().look_at.is_none(), "the caller knows");
    let then = table.take_ready("P", now + TIMEOUT).unwrap();
    assert_eq!((then.late, then.is_served), (vec![message("P", &[], now)], true));
    assert_eq!(then.look_at, Some(at(now, 5) + TIMEOUT));
}

#[test]
fn messages_wait_a_moment_for_a_server_that_comes_back() {
    let now = Instant::now();
    let table = empty_with_grace();
    register_with(&table, "1", Some(1), now);
    ask(&table, message("P", &[], now), now).unwrap();
    assert!(ask(&table, message("P", &[], now), now).is_none());
    leave(&table, "1", at(now, 100));
    assert!(table.snapshot().is_empty());
    assert!(ask(&table, message("P", &[], at(now, 200)), at(now, 200)).is_none());
    let waits = table.take_ready("P", at(now, 200)).unwrap();
    assert_eq!(waits.look_at, Some(at(now, 100) + GRACE));
    let late = table.take_ready("P", at(now, 100) + GRACE).unwrap();
    assert_eq!((late.late, late.is_served), (vec![message("P", &[], now)], false));
    register_with(&table, "2", None, now);
    assert_eq!(ready(&table, at(now, 100) + GRACE), [(at(now, 200), "2".to_owned())]);
}

#[test]
fn a_policy_that_has_expired_has_no_server() {
    let now = Instant::now();
    let table = empty_with_grace();
    register_with(&table, "1", None, now);
    leave(&table, "1", now);
    assert!(ask(&table, message("P", &[], now), at(now, 9_999)).is_none());
    assert_eq!(table.take_waiting().len(), 1);
    assert!(select(&table, "P", at(now, 10_000)).is_none());
}

#[test]
fn policies_that_were_left_make_room_for_others() {
    let now = Instant::now();
    let table = Table::new(Limits { restart_grace: GRACE, ..limits(10, 1) });
    register_with(&table, "1", None, now);
    leave(&table, "1", now);
    register_for(&table, "Q", "1", 1, None, now).unwrap();
    assert!(select(&table, "P", now).is_none());
}

#[test]
fn a_message_that_waits_is_the_trial_of_a_server_whose_ejection_is_over() {
    let now = Instant::now();
    let table = empty();
    register_with(&table, "1", Some(1), now);
    register_with(&table, "2", Some(1), now);
    let [one, two] = [(); 2].map(|()| ask(&table, message("P", &[], now), now).unwrap());
    failed(&table, &two, Failure::Unreachable, now);
    assert!(!table.free_permit(&two));
    let patient = Message { deadline: now + 10 * TIMEOUT, ..message("P", &[], now) };
    assert!(ask(&table, patient, now).is_none());
    let look_at = table.take_ready("P", now).unwrap().look_at;
    assert_eq!(look_at, Some(now + EJECTION_TIME), "nothing else tells the caller");
    assert_eq!(ready(&table, now + EJECTION_TIME), [(now, "2".to_owned())]);
    assert!(!table.free_permit(&one));
}

#[test]
fn a_message_whose_time_is_over_gets_no_place() {
    let now = Instant::now();
    let table = empty();
    register_with(&table, "1", Some(1), now);
    let one = ask(&table, message("P", &[], now), now).unwrap();
    ask(&table, message("P", &[], now), now);
    assert!(table.take_ready("P", now).unwrap().late.is_empty());
    assert!(table.free_permit(&one));
    let then = table.take_ready("P", now + TIMEOUT).unwrap();
    assert!(then.selected.is_empty());
    assert_eq!(then.late, [message("P", &[], now)]);
}

#[test]
fn a_policy_that_is_asked_for_again_and_again_can_be_dropped_all_the_same() {
    let now = Instant::now();
    let table = empty_with_grace();
    register_with(&table, "1", None, now);
    leave(&table, "1", now);
    assert!(ask(&table, message("P", &[], now), at(now, 9_999)).is_none());
    assert!(select(&table, "P", at(now, 10_000)).is_none());
    assert_eq!(table.waiting(), BTreeMap::from([("P".to_owned(), 1)]));
}

#[test]
fn a_message_that_waits_outlives_the_restart_of_the_only_server_that_has_not_failed_it() {
    let now = Instant::now();
    let table = empty_with_grace();
    register_with(&table, "1", Some(1), now);
    register_with(&table, "2", None, now);
    let [_, two] = [(); 2].map(|()| ask(&table, message("P", &[], now), now).unwrap());
    table.select_for_retry(message("P", &[two.serial], now), now, true);
    let then = at(now, 5_000);
    leave(&table, "1", then);
    let waits = table.take_ready("P", then).unwrap();
    assert_eq!((waits.late, waits.look_at), (vec![], Some(then + GRACE)));
    register_with(&table, "1", Some(1), then);
    assert_eq!(ready(&table, then), [(now, "1".to_owned())]);
}

#[test]
fn a_retry_does_not_overtake_those_that_wait() {
    let now = Instant::now();
    let table = empty();
    register_with(&table, "1", Some(1), now);
    let one = ask(&table, message("P", &[], now), now).unwrap();
    assert!(ask(&table, message("P", &[], at(now, 1)), now).is_none());
    assert!(table.free_permit(&one));
    let retry = table.select_for_retry(message("P", &[], at(now, 2)), now, true);
    assert!(matches!(retry, Selected::Waits(_)));
    assert_eq!(ready(&table, now), [(at(now, 1), "1".to_owned())]);
}

#[test]
fn a_long_line_costs_no_more_than_a_short_one() {
    let now = Instant::now();
    let table = empty();
    let ids = ["1", "2", "3"];
    ids.iter().for_each(|id| register_with(&table, id, Some(1), now));
    let [one, two, three] = ids.map(|_| ask(&table, message("P", &[], now), now).unwrap());
    // It has a place, and goes to nobody while another is eligible.
    failed(&table, &three, Failure::Unreachable, now);
    table.free_permit(&three);
    table.select_for_retry(message("P", &[three.serial], now), now, true);
    for milliseconds in 0..1000 {
        ask(&table, message("P", &[], at(now, milliseconds)), now);
    }
    for count in 0..500 {
        ASKED.set(0);
        table.free_permit(if count % 2 == 0 { &one } else { &two });
        assert_eq!(ready(&table, now).len(), 1);
        assert!(ASKED.get() < 20, "{} for message {count}", ASKED.get());
    }
}

#[test]
fn those_that_are_late_are_looked_for_now_and_then_only() {
    let now = Instant::now();
    let table = empty();
    register_with(&table, "1", Some(1), now);
    let one = ask(&table, message("P", &[], now), now).unwrap();
    let came = |count: u32| now + count * Duration::from_nanos(100);
    for count in 0..1000 {
        ask(&table, message("P", &[], came(count)), now);
    }
    let (mut clock, mut late, mut looks) = (now + TIMEOUT, 0, 0);
    while clock < came(1000) + TIMEOUT {
        let ready = table.take_ready("P", clock).unwrap();
        assert!(ready.selected.is_empty());
        late += ready.late.len();
        looks += usize::from(!ready.late.is_empty());
        clock += Duration::from_nanos(100);
    }
    assert!(looks > 0 && looks < 10 && late < 1000, "{late} in {looks} looks");
    // Those that are late and still wait are not sent.
    table.free_permit(&one);
    let rest = table.take_ready("P", clock).unwrap();
    assert_eq!((rest.selected.len(), rest.late.len()), (0, 1000 - late));
}

#[derive(Debug, Clone)]
enum Step {
    /// A message comes, which may not go to one of the servers.
    Ask {
        excluded: usize,
        is_retry: bool,
    },
    /// A message gives back its permit.
    Free(usize),
    Register(usize, Option<u64>),
    Leave(usize),
    Fail(usize),
}

fn step() -> impl Strategy<Value = Step> {
    let id = || 0_usize..3;
    prop_oneof![
        8 => (0_usize..9, any::<bool>())
            .prop_map(|(excluded, is_retry)| Step::Ask { excluded, is_retry }),
        6 => any::<usize>().prop_map(Step::Free),
        2 => (id(), prop::option::of(1_u64..3)).prop_map(|(id, capacity)| Step::Register(id, capacity)),
        1 => id().prop_map(Step::Leave),
        1 => id().prop_map(Step::Fail),
    ]
}

proptest! {
    /// No server has more messages than it takes; no message waits that could have a server; and the
    /// one that came first is served first.
    #[test]
    fn places_are_never_exceeded_and_never_wasted(steps in prop::collection::vec(step(), 0..60)) {
        const IDS: [&str; 3] = ["0", "1", "2"];
        let now = Instant::now();
        let table = empty_with_grace();
        let mut held: Vec<(Message, Arc<Server<u16>>)> = Vec::new();
        let mut waiting: Vec<Message> = Vec::new();
        register_with(&table, "0", Some(1), now);
        for (number, step) in steps.into_iter().enumerate() {
            let servers = table.servers();
            let by_id = |id: usize| servers.iter().find(|server| server.id == IDS[id]);
            let arrived = at(now, number as u64);
            let count = |held: &[(Message, Arc<Server<u16>>)], serial| {
                held.iter().filter(|(_, server)| server.serial == serial).count() as u64
            };
            let before: HashMap<_, _> =
                servers.iter().map(|it| (it.serial, count(&held, it.serial))).collect();
            match step {
                Step::Ask { excluded, is_retry } => {
                    let excluded: Vec<_> =
                        servers.get(excluded).filter(|_| is_retry).map(|it| it.serial).into_iter().collect();
                    let message = message("P", &excluded, arrived);
                    let selected = if is_retry {
                        table.select_for_retry(message, now, true)
                    } else {
                        table.select(vec![message], now).remove(0)
                    };
                    match selected {
                        Selected::Server(message, server) => held.push((message, server)),
                        Selected::Waits(_) => waiting.push(self::message("P", &excluded, arrived)),
                        Selected::Nobody(message) => {
                            prop_assert!(servers.iter().all(|it| message.excluded.contains(&it.serial)));
                        }
                    }
                }
                Step::Free(pick) => {
                    if let Some(at) = pick.checked_rem(held.len()) {
                        table.free_permit(&held.remove(at).1);
                    }
                }
                Step::Register(id, capacity) => register_with(&table, IDS[id], capacity, now),
                Step::Leave(id) => {
                    if by_id(id).is_some() {
                        leave(&table, IDS[id], now);
                    }
                }
                Step::Fail(id) => {
                    if let Some(server) = by_id(id) {
                        failed(&table, server, Failure::Unreachable, now);
                    }
                }
            }
            for (message, server) in table.take_ready("P", now).into_iter().flat_map(|it| it.selected) {
                let earlier = waiting.iter().take_while(|other| **other != message);
                // One that may go to another server does not go to an ejected one.
                let is_ejected = server.failures.load(Ordering::Relaxed) > 0;
                for other in earlier {
                    let is_excluded = other.excluded.contains(&server.serial);
                    prop_assert!(is_excluded || is_ejected, "{:?} came first", other);
                }
                waiting.retain(|other| *other != message);
                held.push((message, server));
            }
            let members: Vec<_> = table.snapshot().into_values().flatten().collect();
            for member in &members {
                let serial = member.server.serial;
                let own = count(&held, serial);
                if let Some(capacity) = member.capacity {
                    prop_assert_eq!(member.in_use, own);
                    // It may have had more when it said that it takes fewer.
                    prop_assert!(own <= capacity.max(before.get(&serial).copied().unwrap_or(0)));
                }
            }
            for message in &waiting {
                let mut candidates = members.iter().filter(|it| message.may_go_to(it.server.serial));
                let is_eligible = |member: &&Member<u16>| member.ejected_until.is_none();
                let is_one_eligible = candidates.clone().any(|member| is_eligible(&member));
                let is_free = |member: &Member<u16>| member.has_room();
                let could = candidates
                    .any(|member| is_free(member) && (is_eligible(&member) || !is_one_eligible));
                prop_assert!(!could, "{:?} waits in vain", message);
            }
            prop_assert_eq!(table.waiting().values().sum::<usize>(), waiting.len());
        }
    }
}
