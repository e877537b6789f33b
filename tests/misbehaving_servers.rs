//! What the proxy does about servers that fail, answer wrongly, late or not at all.

use std::collections::HashSet;
use std::net::TcpListener;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use revproc::protocol::hash;

use crate::support::dialect::INTEGERS;
use crate::support::fake::{Fake, Manner};
use crate::support::leased::{Answer, Leased};
use crate::support::stopwatch::Stopwatch;
use crate::support::{
    BOUND, Peer, Program, Signal, message, message_with, proxy, registered,
    wait_until_nobody_listens,
};

/// The SHA-1 of "x".
const HASH_OF_X: &str = "11f6ad8ec52a2984abaafd7c3b516503785c2072";

/// Sends a message of policy `PP_1` on a connection of its own.
fn answer(proxy: u16, client: &str, payload: &str) -> serde_json::Value {
    let mut peer = Peer::connect(proxy);
    peer.send(message(client, "PP_1", payload));
    peer.packet()
}

fn set_asides(proxy: &Program) -> usize {
    proxy.err().iter().filter(|line| line.contains("is set aside for a while")).count()
}

#[test]
fn a_refusal_says_which_servers_were_tried_and_what_happened_to_each() {
    let proxy = proxy(&["-reply-timeout", "300ms"]);
    let silent = Fake::unleased("1", "PP_1", proxy.1, Manner::Silent);
    let closing = Fake::leased("2", "PP_1", proxy.1, Manner::ClosesAtOnce);
    let refusal = answer(proxy.1, "50", "x");
    assert_eq!((&refusal["type"], &refusal["destid"]), (&3.into(), &50.into()));
    let reason = refusal["payload"].as_str().unwrap();
    let first = format!("server 1 (127.0.0.1:{}) no ack within 0.3 s", silent.port);
    let second = format!("server 2 (127.0.0.1:{}) ", closing.port);
    assert!(reason.contains(&first) && reason.contains(&second), "{reason}");
    let lines = proxy.0.warning("refused the message of client 50 (");
    assert!(lines.contains(&first), "{lines}");
}

#[test]
fn a_message_is_tried_at_three_servers_and_no_more() {
    let proxy = proxy(&[]);
    let _bad = ["1", "2", "3", "4"].map(|id| Fake::leased(id, "PP_1", proxy.1, Manner::Nonsense));
    let refusal = answer(proxy.1, "50", "x");
    assert_eq!(refusal["code"], "bad-ack");
    assert_eq!(refusal["payload"].as_str().unwrap().matches("(127.0.0.1:").count(), 3);
}

#[test]
fn a_server_that_fails_three_times_in_a_row_is_left_out() {
    let proxy = proxy(&["-quiet"]);
    let fake = Fake::leased("1", "PP_1", proxy.1, Manner::Nonsense);
    let _good = registered("2", "PP_1", &proxy, &[]);
    // Every other message is its turn.
    for _ in 0..5 {
        assert_eq!(set_asides(&proxy.0), 0);
        assert_eq!(answer(proxy.1, "50", "x")["srcid"], 2);
    }
    proxy.0.warning("is set aside for a while");
    fake.behave(Manner::Good);
    for _ in 0..6 {
        assert_eq!(answer(proxy.1, "50", "x")["srcid"], 2);
    }
}

#[test]
fn where_all_servers_are_set_aside_they_are_tried_all_the_same() {
    let proxy = proxy(&[]);
    let fake = Fake::leased("1", "PP_1", proxy.1, Manner::ClosesAtOnce);
    for _ in 0..3 {
        assert_eq!(answer(proxy.1, "50", "x")["code"], "unreachable");
    }
    proxy.0.warning("is set aside for a while");
    fake.behave(Manner::Good);
    let since = Stopwatch::start();
    assert_eq!(answer(proxy.1, "50", "x")["payload"], HASH_OF_X);
    since.assert_within(Duration::from_secs(1));
}

#[test]
fn a_late_ack_never_reaches_another_message() {
    let proxy = proxy(&[]);
    let fake = Fake::leased("1", "PP_1", proxy.1, Manner::Late(Duration::from_millis(1500)));
    let mut client = Peer::connect(proxy.1);
    client.send(message_with("50", "PP_1", "late", r#""timeout": 1"#));
    assert_eq!(client.packet()["code"], "timeout");
    // The same client, so that the late ack would pass for an ack of these messages.
    fake.behave(Manner::Good);
    for answered in 0..20 {
        if answered == 10 {
            // The late one is among them.
            fake.wait_for_answers(answered + 1);
        }
        client.send(message("50", "PP_1", "x"));
        assert_eq!(client.packet()["payload"], HASH_OF_X);
    }
}

#[test]
fn a_burst_waits_for_a_silent_server_once() {
    let proxy = proxy(&["-reply-timeout", "1"]);
    let _silent = Fake::unleased("1", "PP_1", proxy.1, Manner::Silent);
    let _good = registered("2", "PP_1", &proxy, &["-quiet"]);
    let mut client = Peer::connect(proxy.1);
    let since = Stopwatch::start();
    client.send([message("50", "PP_1", "x").as_str(); 8].concat());
    for _ in 0..8 {
        assert_eq!(client.packet()["payload"], HASH_OF_X);
    }
    since.assert_within(Duration::from_secs(2));
    // Its acks were there in time, however late they were read.
    let is_blamed = |line: &String| line.contains("server 2 of") && line.contains("no ack");
    assert!(!proxy.0.err().iter().any(is_blamed), "{}", proxy.0.report());
}

#[test]
fn a_server_without_a_lease_has_its_share_of_the_time_and_is_blamed_only_for_all_of_it() {
    let proxy = proxy(&["-message-timeout", "3", "-reply-timeout", "1500ms"]);
    let _silent = Fake::unleased("1", "PP_1", proxy.1, Manner::Silent);
    let _good = ["2", "3"].map(|id| registered(id, "PP_1", &proxy, &["-quiet"]));
    for _ in 0..3 {
        let since = Stopwatch::start();
        for _ in 0..3 {
            assert_eq!(answer(proxy.1, "50", "x")["type"], 2);
        }
        // A third of three seconds, since there are three servers.
        since.assert_between(Duration::from_millis(900)..Duration::from_millis(1450));
    }
    assert_eq!(set_asides(&proxy.0), 0, "{}", proxy.0.report());
}

#[test]
fn of_two_servers_one_that_is_silent_for_half_of_the_messages_time_is_set_aside() {
    // As by default, where half of the time is all of -reply-timeout.
    let proxy = proxy(&["-message-timeout", "4", "-reply-timeout", "2"]);
    let _silent = Fake::unleased("1", "PP_1", proxy.1, Manner::Silent);
    let _good = registered("2", "PP_1", &proxy, &["-quiet"]);
    for _ in 0..6 {
        assert_eq!(answer(proxy.1, "50", "x")["srcid"], 2);
    }
    proxy.0.warning("is set aside for a while");
}

/// The four messages at a server without a lease fail when `fail` ends, and four more wait there.
fn those_that_wait_go_to_another(reply_timeout: &str, fail: impl FnOnce(&TcpListener)) {
    let proxy = proxy(&["-reply-timeout", reply_timeout, "-message-timeout", "60"]);
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = silent.local_addr().unwrap().port();
    let mut setup = Peer::connect(proxy.1);
    setup.send((INTEGERS.setup)("1", "PP_1", port));
    assert_eq!(setup.packet()["payload"], "registered");
    // Four at once are the most at a server without a lease.
    let mut clients: Vec<_> = (1..=8)
        .map(|number| {
            let mut client = Peer::connect(proxy.1);
            client.send(message("50", "PP_1", &format!("message {number}")));
            let line = if number <= 4 { "Forwarding a data message to server id 1" } else { "" };
            proxy.0.line(&format!("{line} payload: message {number}"));
            client
        })
        .collect();
    let _good = registered("2", "PP_1", &proxy, &["-quiet"]);
    fail(&silent);
    for client in &mut clients {
        assert_eq!(client.packet()["srcid"], 2);
    }
    let lines = proxy.0.out();
    let silent = lines.iter().filter(|line| line.contains("to server id 1 "));
    assert_eq!(silent.count(), 4);
}

#[test]
fn who_waits_for_a_server_that_breaks_its_connections_goes_to_another() {
    // Longer than the other server takes to start.
    let reply_timeout = "60";
    those_that_wait_go_to_another(reply_timeout, |silent| {
        (0..4).for_each(|_| drop(silent.accept().unwrap()));
    });
}

#[test]
fn who_waits_for_a_server_that_is_silent_goes_to_another() {
    those_that_wait_go_to_another("5", |_| {});
}

#[test]
fn a_kept_connection_that_the_server_closed_costs_nothing_but_a_fresh_one() {
    let proxy = proxy(&[]);
    let server = registered("1", "PP_1", &proxy, &["-idle-timeout", "100ms"]);
    // What watches for signals has descriptors of its own.
    let end = Instant::now() + BOUND;
    while !server.catches(Signal::TERM) {
        assert!(Instant::now() < end, "{}", server.report());
    }
    let without = server.descriptors();
    for _ in 0..4 {
        assert_eq!(answer(proxy.1, "50", "x")["payload"], HASH_OF_X);
        let end = Instant::now() + BOUND;
        while server.descriptors() > without {
            assert!(Instant::now() < end, "the server does not close it");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
    assert_eq!(proxy.0.err(), [""; 0]);
}

#[test]
fn a_kept_connection_that_the_server_closes_at_the_next_message_costs_only_a_fresh_one() {
    let proxy = proxy(&[]);
    let _fake = Fake::leased("1", "PP_1", proxy.1, Manner::ClosesAtSecond);
    for _ in 0..4 {
        assert_eq!(answer(proxy.1, "50", "x")["payload"], HASH_OF_X);
    }
    assert_eq!(proxy.0.err(), [""; 0]);
}

#[test]
fn where_all_kept_connections_are_closed_a_message_has_a_fresh_one() {
    const KEPT: usize = 4;
    let proxy = proxy(&[]);
    let used = Mutex::new(HashSet::new());
    let server = Leased::start("1", "PP_1", proxy.1, move |taken| {
        let is_fresh = used.lock().unwrap().insert(taken.connection);
        // Each has a connection of its own while the others take their time.
        if is_fresh { Answer::Late(Duration::from_millis(100)) } else { Answer::CloseAtOnce }
    });
    let mut client = Peer::connect(proxy.1);
    client.send(message("50", "PP_1", "x").repeat(KEPT));
    (0..KEPT).for_each(|_| assert_eq!(client.packet()["payload"], HASH_OF_X));
    let connections: HashSet<_> = server.taken().iter().map(|taken| taken.connection).collect();
    assert_eq!(connections.len(), KEPT);
    assert_eq!(answer(proxy.1, "50", "x")["payload"], HASH_OF_X);
    assert_eq!(proxy.0.err(), [""; 0]);
}

#[test]
fn a_kept_connection_on_which_more_came_than_was_asked_for_is_not_used_again() {
    let proxy = proxy(&[]);
    let manner = Manner::AcksTwice(Duration::from_millis(20));
    let fake = Fake::leased("1", "PP_1", proxy.1, manner);
    for (sent, payload) in ["y", "x", "y", "x"].into_iter().enumerate() {
        // A message that is on its way when the second ack is read has that for its own.
        fake.wait_for_ends(sent);
        assert_eq!(answer(proxy.1, "50", payload)["payload"], hash(payload));
    }
}

#[test]
fn a_proxy_told_to_stop_finishes_what_is_in_flight() {
    let mut proxy = proxy(&[]);
    let _fake = Fake::leased("1", "PP_1", proxy.1, Manner::Late(Duration::from_millis(500)));
    let mut client = Peer::connect(proxy.1);
    client.send(message("50", "PP_1", "x"));
    proxy.0.line("Forwarding a data message to server id 1");
    proxy.0.signal(Signal::TERM);
    assert_eq!(client.packet()["payload"], HASH_OF_X);
    assert_eq!(proxy.0.end().code(), Some(0));
    proxy.0.warning("stopped after 1 messages: 1 acked, 0 refused");
}

#[test]
fn a_second_signal_ends_a_proxy_at_once() {
    let mut proxy = proxy(&[]);
    let _fake = Fake::leased("1", "PP_1", proxy.1, Manner::Silent);
    let mut client = Peer::connect(proxy.1);
    client.send(message("50", "PP_1", "x"));
    proxy.0.line("Forwarding a data message to server id 1");
    let since = Stopwatch::start();
    proxy.0.signal(Signal::INT);
    wait_until_nobody_listens(proxy.1);
    proxy.0.signal(Signal::INT);
    assert_eq!(proxy.0.end().code(), Some(1));
    since.assert_within(Duration::from_secs(4));
}
