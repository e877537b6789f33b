//! What a server says no to, and whom that concerns: nobody but the message.

use std::thread;
use std::time::{Duration, Instant};

use revproc::protocol::hash;
use serde_json::Value;

use crate::support::http::{Watched, watched};
use crate::support::leased::{Answer, Leased, Taken, refusal};
use crate::support::load::Load;
use crate::support::peers::Reserved;
use crate::support::stopwatch::Stopwatch;
use crate::support::{BOUND, Peer, message, message_with, proxy, registered};

/// One message of policy `PP_1` after another on one connection, and the replies as they came.
fn replies(proxy: u16, count: usize, more: &str) -> Vec<String> {
    let mut client = Peer::connect(proxy);
    let packet = match more {
        "" => message("50", "PP_1", "x"),
        more => message_with("50", "PP_1", "x", more),
    };
    let exchange = |_| {
        client.send(&packet);
        client.line()
    };
    (0..count).map(exchange).collect()
}

fn json(line: &str) -> Value {
    serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"))
}

/// No server counts as failing, and none was set aside.
fn assert_nobody_is_blamed(watched: &Watched) {
    let table = watched.table();
    for server in table["policies"].as_array().unwrap().iter().flat_map(servers) {
        let mut failures = server["failures"].as_object().unwrap().values();
        assert!(failures.all(|count| count == 0), "{server:#}");
        assert_eq!(server["state"], "up", "{server:#}");
    }
    let err = watched.proxy.0.err();
    assert!(!err.iter().any(|line| line.contains("set aside")), "{err:#?}");
}

fn servers(policy: &Value) -> Vec<&Value> {
    policy["servers"].as_array().unwrap().iter().collect()
}

#[test]
fn an_overloaded_server_is_passed_over_and_not_blamed() {
    let watched = watched(&["-quiet"]);
    let full = Leased::start("1", "PP_1", watched.proxy.1, |_| Answer::Refuse("overloaded"));
    for reply in replies(watched.proxy.1, 8, "") {
        assert_eq!(json(&reply)["code"], "overloaded", "{reply}");
    }
    let _good = registered("2", "PP_1", &watched.proxy, &["-quiet"]);
    let before = full.taken().len();
    for reply in replies(watched.proxy.1, 20, "") {
        assert_eq!(json(&reply)["srcid"], 2, "{reply}");
    }
    assert!(full.taken().len() >= before + 10, "it has its turns");
    assert_nobody_is_blamed(&watched);
}

#[test]
fn what_else_a_server_refuses_reaches_the_client_as_it_is() {
    let watched = watched(&["-quiet"]);
    let codes = ["failed", "too-large", "on-holiday"];
    let script = move |taken: Taken| Answer::Refuse(codes[taken.number % 3]);
    let _refusing = Leased::start("1", "PP_1", watched.proxy.1, script);
    // One at a time, all together, and beside a server that would have served it.
    let lines: Vec<_> = codes.iter().map(|code| refusal(code, "50")).collect();
    let mut expected = [&lines[..]; 4].concat();
    assert_eq!(replies(watched.proxy.1, 12, ""), expected);
    let mut client = Peer::connect(watched.proxy.1);
    client.send(message("50", "PP_1", "x").repeat(12));
    let mut together: Vec<_> = (0..12).map(|_| client.line()).collect();
    together.sort_unstable();
    expected.sort_unstable();
    assert_eq!(together, expected);
    let good = Leased::start("2", "PP_1", watched.proxy.1, |_| Answer::Ack);
    let refused = replies(watched.proxy.1, 12, "").into_iter().filter(|line| lines.contains(line));
    assert_eq!(refused.count(), 6);
    assert_eq!(good.taken().len(), 6);
    assert_nobody_is_blamed(&watched);
    for latest in watched.table()["latest"].as_array().unwrap() {
        assert_eq!(latest["tries"], 1, "{latest}");
    }
}

#[test]
fn an_ack_longer_than_the_proxy_takes_refuses_its_message_and_blames_nobody() {
    let watched = watched(&["-quiet"]);
    let long = Leased::start("1", "PP_1", watched.proxy.1, |_| Answer::TooLong);
    let good = Leased::start("2", "PP_1", watched.proxy.1, |_| Answer::Ack);
    let replies = replies(watched.proxy.1, 8, "");
    let refused: Vec<_> = replies.iter().map(|reply| json(reply)["code"].clone()).collect();
    assert_eq!(refused.iter().filter(|code| **code == "too-large").count(), 4, "{replies:#?}");
    assert_eq!([long.taken().len(), good.taken().len()], [4; 2]);
    assert_nobody_is_blamed(&watched);
}

#[test]
fn a_message_that_a_server_finds_too_large_does_not_disturb_others() {
    let watched = watched(&["-quiet"]);
    let _server = registered("1", "PP_1", &watched.proxy, &["-quiet", "-max-packet", "4K"]);
    let proxy = watched.proxy.1;
    thread::scope(|scope| {
        let small = |client: usize| {
            let mut peer = Peer::connect(proxy);
            for burst in 0..40 {
                let payloads: Vec<_> =
                    (0..8).map(|at| format!("{at} of {burst} of {client}")).collect();
                let messages = payloads.iter().map(|payload| message("50", "PP_1", payload));
                peer.send(messages.collect::<String>());
                for payload in &payloads {
                    let reply = peer.line();
                    assert_eq!(json(&reply)["payload"], hash(payload), "{payload}: {reply}");
                }
            }
        };
        let small: Vec<_> = (0..4).map(|client| scope.spawn(move || small(client))).collect();
        let mut large = Peer::connect(proxy);
        let packet = message("51", "PP_1", &"x".repeat(8 << 10));
        let mut refused = 0;
        while refused < 10 || small.iter().any(|client| !client.is_finished()) {
            large.send(&packet);
            let reply = large.line();
            assert_eq!(json(&reply)["code"], "too-large", "{reply}");
            refused += 1;
            // They are to have messages on their way each time.
            thread::sleep(Duration::from_millis(5));
        }
    });
    assert_nobody_is_blamed(&watched);
}

const ONCE: &str = r#""once": true"#;

#[test]
fn a_once_message_that_a_server_took_goes_to_no_other() {
    let proxy = proxy(&["-quiet"]);
    let closing = Leased::start("1", "PP_1", proxy.1, |_| Answer::CloseAtOnce);
    let other = Leased::start("2", "PP_1", proxy.1, |_| Answer::Ack);
    let replies: Vec<_> = replies(proxy.1, 2, ONCE).iter().map(|line| json(line)).collect();
    let (refused, acked): (Vec<_>, Vec<_>) = replies.iter().partition(|reply| reply["type"] == 3);
    assert_eq!((refused.len(), acked.len()), (1, 1), "{replies:#?}");
    assert_eq!(refused[0]["code"], "outcome-unknown", "{replies:#?}");
    let reason = refused[0]["payload"].as_str().unwrap();
    assert!(reason.contains(&format!("server 1 (127.0.0.1:{})", closing.port)), "{reason}");
    assert_eq!([closing.taken().len(), other.taken().len()], [1; 2]);
}

#[test]
fn a_once_message_of_which_nothing_was_sent_goes_to_another() {
    let proxy = proxy(&["-quiet"]);
    let nobody = Reserved::any();
    let mut setup = Peer::connect(proxy.1);
    setup.send(format!(
        r#"{{"type":1,"id":1,"privPolyId":"PP_1","listenport":{},"lease":60}}"#,
        nobody.port
    ));
    assert_eq!(setup.packet()["payload"], "registered");
    let other = Leased::start("2", "PP_1", proxy.1, |_| Answer::Ack);
    for reply in replies(proxy.1, 2, ONCE) {
        assert_eq!(json(&reply)["srcid"], 2, "{reply}");
    }
    assert_eq!(other.taken().len(), 2);
}

#[test]
fn a_once_message_is_acked_over_kept_connections_that_the_server_has_closed() {
    let proxy = proxy(&["-quiet"]);
    let server = registered("1", "PP_1", &proxy, &["-quiet", "-idle-timeout", "100ms"]);
    let without = server.descriptors();
    for _ in 0..3 {
        for reply in replies(proxy.1, 1, ONCE) {
            assert_eq!(json(&reply)["srcid"], 1, "{reply}");
        }
        let end = Instant::now() + BOUND;
        while server.descriptors() > without {
            assert!(Instant::now() < end, "the server does not close it");
            thread::sleep(Duration::from_millis(10));
        }
    }
}

#[test]
fn a_once_message_is_not_passed_over_by_others_where_all_connections_are_busy() {
    // Three connections to a server.
    let proxy = proxy(&["-max-connections", "14", "-quiet"]);
    let _slow = Leased::start("1", "PP_1", proxy.1, |_| Answer::Late(Duration::from_millis(10)));
    let load = Load::start(proxy.1, "PP_1", 10, Duration::ZERO);
    load.wait("acks", |account| account.acked > 50);
    let since = Stopwatch::start();
    let mut client = Peer::connect(proxy.1);
    for _ in 0..5 {
        client.send(message_with("50", "PP_1", "x", r#""once": true"#));
        assert_eq!(client.packet()["srcid"], 1);
    }
    since.assert_within(Duration::from_secs(2));
    let account = load.finish();
    assert!(account.complaints().is_empty(), "{account:#?}");
}
