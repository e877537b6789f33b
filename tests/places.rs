//! Servers that take so many messages at once, and what waits for them; and a policy's only server
//! that is started again.

use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::support::http::watched;
use crate::support::leased::{Answer, Leased};
use crate::support::load::Load;
use crate::support::stopwatch::Stopwatch;
use crate::support::{
    BOUND, Peer, Program, Signal, fixed_port, message, message_with, proxy, registered,
};

/// Sends messages together, whose payloads have 1, 2, 3 and so on bytes. Returns the replies.
fn burst(proxy: u16, count: usize) -> Vec<Value> {
    let mut client = Peer::connect(proxy);
    let messages = (1..=count).map(|length| message("50", "PP_1", &"x".repeat(length)));
    client.send(messages.collect::<String>());
    (0..count).map(|_| client.packet()).collect()
}

fn are_acks(replies: &[Value]) {
    for reply in replies {
        assert_eq!(reply["type"], 2, "{reply}");
    }
}

#[test]
fn a_slow_worker_keeps_no_jobs_that_a_quick_one_could_do() {
    let proxy = proxy(&["-quiet"]);
    let time = |time| move |_| Answer::Late(Duration::from_millis(time));
    let slow = Leased::with_capacity("1", "PP_1", proxy.1, 1, time(3000));
    let quick = Leased::with_capacity("2", "PP_1", proxy.1, 1, time(50));
    are_acks(&burst(proxy.1, 12));
    assert_eq!((slow.taken().len(), quick.taken().len()), (1, 11));
}

#[test]
fn a_server_never_has_more_messages_than_it_takes_and_has_them_in_order() {
    let proxy = proxy(&["-quiet"]);
    let (at_work, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let server = Leased::with_capacity("1", "PP_1", proxy.1, 2, {
        let (at_work, most) = (Arc::clone(&at_work), Arc::clone(&most));
        move |_| {
            most.fetch_max(at_work.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            thread::sleep(Duration::from_micros(500));
            at_work.fetch_sub(1, Ordering::SeqCst);
            Answer::Ack
        }
    });
    are_acks(&burst(proxy.1, 1000));
    assert_eq!(most.load(Ordering::SeqCst), 2);
    let taken = server.taken();
    assert_eq!(taken.len(), 1000);
    // Two connections are at work at once; on each the messages are in order.
    let mut last = [0; 2];
    for taken in taken {
        let last = &mut last[taken.connection];
        assert!(taken.length > *last, "{taken:?} came after message {last}");
        *last = taken.length;
    }
}

#[test]
fn servers_with_and_without_a_capacity_take_turns_while_they_have_places() {
    let proxy = proxy(&["-quiet"]);
    let limited = Leased::with_capacity("1", "PP_1", proxy.1, 2, |_| Answer::Ack);
    let unlimited = Leased::start("2", "PP_1", proxy.1, |_| Answer::Ack);
    for _ in 0..10 {
        are_acks(&burst(proxy.1, 1));
    }
    assert_eq!((limited.taken().len(), unlimited.taken().len()), (5, 5));
}

#[test]
fn a_retry_that_waits_for_a_place_is_said_when_it_has_one() {
    let proxy = proxy(&[]);
    let busy = |_| Answer::Late(Duration::from_millis(300));
    let busy = Leased::with_capacity("2", "PP_1", proxy.1, 1, busy);
    let other = Leased::with_capacity("1", "PP_1", proxy.1, 1, |_| Answer::Refuse("overloaded"));
    are_acks(&burst(proxy.1, 2));
    assert_eq!((busy.taken().len(), other.taken().len()), (2, 1));
    proxy.0.warning("trying the message of client 50 at server 2");
}

#[test]
fn what_waits_is_shown_and_refused_when_its_time_is_over() {
    let watched = watched(&[]);
    let proxy = &watched.proxy;
    let _server = Leased::with_capacity("1", "PP_1", proxy.1, 1, |_| Answer::Skip);
    let mut client = Peer::connect(proxy.1);
    client.send(message_with("50", "PP_1", "x", "\"timeout\": 60").repeat(2));
    client.send(message_with("51", "PP_1", "x", "\"timeout\": 2").repeat(2));
    let is_waiting = |count| move |table: &Value| table["policies"][0]["waiting"] == count;
    let table = watched.table_when("three messages wait", is_waiting(3));
    let server = &table["policies"][0]["servers"][0];
    assert_eq!((&server["in_use"], &server["capacity"]), (&1.into(), &1.into()), "{table}");
    let gauge = [("{policy=\"PP_1\"}".to_owned(), 3.0)];
    assert_eq!(watched.metric("revproc_waiting_messages"), gauge);
    proxy.0.warning(
        "refused the message of client 51 (overloaded): all servers of privacy policy \"PP_1\" are \
         busy; the 2 s of the message are over (its own timeout)",
    );
    watched.table_when("one message waits", is_waiting(1));
}

#[test]
fn a_server_that_may_still_be_at_work_is_not_blamed_for_a_message_whose_time_is_over() {
    let times = ["-message-timeout", "2", "-reply-timeout", "200ms"];
    let watched = watched(&times);
    let proxy = watched.proxy.1;
    let _counting = Leased::with_capacity("1", "PP_1", proxy, 3, |_| Answer::Skip);
    let _not_counting = Leased::start("2", "PP_2", proxy, |_| Answer::Skip);
    let mut client = Peer::connect(proxy);
    for (policy, more) in [("PP_1", "\"x\": 0"), ("PP_2", "\"timeout\": 1")] {
        for _ in 0..3 {
            client.send(message_with("50", policy, "x", more));
            assert_eq!(client.packet()["code"], "timeout", "{policy}");
        }
    }
    let is_up = |policy: &Value| policy["servers"][0]["state"] == "up";
    let table = watched.table();
    assert!(table["policies"].as_array().unwrap().iter().all(is_up), "{table}");
    // It had all the time that any server has.
    for _ in 0..3 {
        client.send(message("50", "PP_2", "x"));
        assert_eq!(client.packet()["code"], "timeout");
    }
    let table = watched.table();
    assert!(is_up(&table["policies"][0]) && !is_up(&table["policies"][1]), "{table}");
}

#[test]
fn a_connection_to_a_server_that_has_left_ends_with_its_last_messages_time() {
    let proxy = proxy(&["-quiet"]);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut server = Peer::connect(proxy.1);
    server.send(format!(
        r#"{{"type":1,"id":"1","privPolyId":"PP_1","listenport":{port},"lease":60,"capacity":1}}"#
    ));
    assert_eq!(server.packet()["lease"], 60);
    let mut client = Peer::connect(proxy.1);
    client.send(message_with("50", "PP_1", "x", "\"timeout\": 1"));
    let mut messages = Peer::new(listener.accept().unwrap().0);
    assert_eq!(messages.packet()["payload"], "x");
    drop(server);
    assert_eq!(client.packet()["code"], "timeout");
    assert_eq!(messages.line(), "", "nobody waits for its ack");
}

#[test]
fn messages_at_work_count_whatever_capacity_their_server_says_next() {
    let watched = watched(&[]);
    let proxy = watched.proxy.1;
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let setup = |more: &str| {
        format!(r#"{{"type":1,"id":"1","privPolyId":"PP_1","listenport":{port}{more}}}"#)
    };
    let mut server = Peer::connect(proxy);
    server.send(setup(r#","lease":60,"capacity":2"#));
    assert_eq!(server.packet()["lease"], 60);
    let mut client = Peer::connect(proxy);
    client.send(message_with("50", "PP_1", "x", "\"timeout\": 60").repeat(5));
    let in_use = |count| move |table: &Value| table["policies"][0]["servers"][0]["in_use"] == count;
    watched.table_when("two messages are at work", in_use(2));
    for capacity in [1, 2, 1, 2] {
        server.send(setup(&format!(r#","lease":60,"capacity":{capacity}"#)));
        assert_eq!(server.packet()["lease"], 60);
        assert!(in_use(2)(&watched.table()), "{}", watched.table());
    }
    // Somebody else on its host cannot take its lease away.
    let mut other = Peer::connect(proxy);
    other.send(setup(r#","capacity":9"#));
    assert_eq!(other.packet()["payload"], "registered");
    drop(server);
    watched.proxy.0.warning("has left: its connection was closed");
}

#[test]
fn a_message_holds_its_place_past_its_own_time() {
    let proxy = proxy(&["-quiet"]);
    let server = Leased::with_capacity("1", "PP_1", proxy.1, 1, |taken| match taken.number {
        0 => Answer::Late(Duration::from_secs(2)),
        _ => Answer::Ack,
    });
    let since = Instant::now();
    let mut client = Peer::connect(proxy.1);
    client.send(message_with("50", "PP_1", "x", "\"timeout\": 1"));
    server.wait_for(1);
    let mut other = Peer::connect(proxy.1);
    other.send(message("51", "PP_1", "y"));
    assert_eq!(client.packet()["code"], "timeout");
    assert_eq!(server.taken().len(), 1, "its server may still be at work on it");
    assert_eq!(other.packet()["type"], 2);
    assert!(since.elapsed() >= Duration::from_secs(2));
}

#[test]
fn a_place_is_free_again_when_an_ack_that_had_begun_does_not_end() {
    let proxy = proxy(&["-quiet"]);
    let server = Leased::with_capacity("1", "PP_1", proxy.1, 1, |taken| match taken.number {
        0 => Answer::Half,
        _ => Answer::Ack,
    });
    let mut client = Peer::connect(proxy.1);
    client.send(message_with("50", "PP_1", "x", "\"timeout\": 1"));
    server.wait_for(1);
    client.send(message("50", "PP_1", "x"));
    assert_eq!(client.packet()["code"], "timeout");
    assert_eq!(client.packet()["type"], 2);
}

#[test]
fn places_of_a_server_that_hangs_are_not_waited_for() {
    let proxy = proxy(&["-quiet"]);
    let hung = Leased::with_capacity("1", "PP_1", proxy.1, 1, |_| Answer::Skip);
    let since = Stopwatch::start();
    let mut client = Peer::connect(proxy.1);
    client.send(message("50", "PP_1", "x").repeat(2));
    hung.wait_for(1);
    hung.stop_renewing();
    let server = registered("2", "PP_1", &proxy, &["-quiet"]);
    are_acks(&[client.packet(), client.packet()]);
    since.assert_within(Duration::from_secs(8));
    drop(server);
}

/// Ends a policy's only server under load and starts it again, on another port if it likes.
fn one_server_can_be_started_again(end: impl Fn(&mut Program)) {
    let proxy = proxy(&["-quiet"]);
    let mut server = registered("1", "PP_1", &proxy, &["-quiet"]);
    let load = Load::start(proxy.1, "PP_1", 8, Duration::from_millis(1));
    for _ in 0..3 {
        let before = load.account().acked;
        load.wait("acks", |account| account.acked > before + 100);
        end(&mut server);
        server = registered("1", "PP_1", &proxy, &["-quiet"]);
    }
    let before = load.account().acked;
    load.wait("acks", |account| account.acked > before + 100);
    let account = load.finish();
    assert!(account.complaints().is_empty(), "{account:#?}");
}

#[test]
fn a_policys_only_server_can_be_stopped_and_started_under_load() {
    one_server_can_be_started_again(|server| {
        server.signal(Signal::TERM);
        server.end();
    });
}

#[test]
fn a_policys_only_server_can_be_killed_and_started_under_load() {
    one_server_can_be_started_again(Program::kill);
}

#[test]
fn a_refusal_stays_short_however_many_servers_failed() {
    let watched = watched(&["-quiet"]);
    let proxy = watched.proxy.1;
    // Where nobody listens.
    let port = fixed_port();
    let register = |id: usize, policy: &str| {
        let mut server = Peer::connect(proxy);
        server.send(format!(
            r#"{{"type":1,"id":{id},"privPolyId":"{policy}","listenport":{port},"lease":60}}"#
        ));
        assert_eq!(server.packet()["payload"], "registered");
        server
    };
    let servers: Vec<_> = (1..=20).map(|id| register(id, "PP_1")).collect();
    let mut client = Peer::connect(proxy);
    client.send(message("50", "PP_1", "x"));
    let reason = client.packet()["payload"].as_str().unwrap().to_owned();
    assert!(reason.contains("earlier attempts that failed: 12; "), "{reason}");
    assert_eq!(reason.matches("connection refused").count(), 8, "{reason}");
    drop(servers);

    // One that comes again and again is told of once.
    let mut server = register(1, "PP_2");
    client.send(message_with("50", "PP_2", "x", "\"timeout\": 60"));
    let is_shown = |table: &Value, is_it: &dyn Fn(&Value) -> bool| {
        let policies = table["policies"].as_array().unwrap().iter();
        policies.filter(|it| it["policy"] == "PP_2").any(|it| is_it(&it["servers"][0]))
    };
    for failures in 1..=5 {
        watched.table_when("the message has found nobody", |table| {
            is_shown(table, &|server| server["failures"]["unreachable"] == failures)
        });
        drop(server);
        watched.table_when("the server has left", |table| {
            !is_shown(table, &|server| !server["lease"].is_null())
        });
        server = register(1, "PP_2");
    }
    drop(server);
    let reason = client.packet()["payload"].as_str().unwrap().to_owned();
    assert_eq!(reason.matches("connection refused").count(), 1, "{reason}");
}

#[test]
fn without_a_server_for_two_seconds_a_message_is_refused() {
    let proxy = proxy(&["-quiet"]);
    let ask = |after| {
        let since = Stopwatch::start();
        let mut client = Peer::connect(proxy.1);
        client.send(message("50", "PP_1", "x"));
        let reply = client.packet();
        assert_eq!(reply["code"], "no-server", "{reply}");
        since.assert_between(after);
    };
    // Nobody has ever served it.
    ask(Duration::ZERO..Duration::from_secs(1));
    let server = Leased::start("1", "PP_1", proxy.1, |_| Answer::Ack);
    drop(server);
    proxy.0.warning("has left: its connection was closed");
    ask(Duration::from_millis(1900)..BOUND);
}
