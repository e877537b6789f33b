//! How messages share a server's connections, and when they do not.

use std::time::{Duration, Instant};

use revproc::protocol::hash;

use crate::support::leased::{Answer, Leased, Taken};
use crate::support::stopwatch::Stopwatch;
use crate::support::{BOUND, Peer, message, message_with, proxy};

/// Sends messages with these payloads together, and takes their acks.
fn exchange(client: &mut Peer, payloads: &[String]) {
    let messages = payloads.iter().map(|payload| message("50", "PP_1", payload));
    client.send(messages.collect::<String>());
    for payload in payloads {
        assert_eq!(client.packet()["payload"], hash(payload));
    }
}

#[test]
fn slow_servers_get_the_messages_of_one_client_side_by_side() {
    let proxy = proxy(&["-quiet"]);
    let delay = Duration::from_millis(20);
    let servers = ["1", "2", "3", "4"]
        .map(|id| Leased::start(id, "PP_1", proxy.1, move |_| Answer::Late(delay)));
    let mut client = Peer::connect(proxy.1);
    // One after another they would take 320 ms at four servers, 1280 ms at one; a busy machine is slow
    // at times.
    let limit = Duration::from_millis(250);
    for round in 1..=20 {
        let payloads: Vec<_> = (0..64).map(|number| format!("{number} of {round}")).collect();
        let since = Stopwatch::start();
        exchange(&mut client, &payloads);
        let is_quick = since.is_within(limit);
        let shares = servers.each_ref().map(|server| server.taken().len());
        assert_eq!(shares, [16 * round; 4]);
        if round > 1 && is_quick {
            return;
        }
    }
    panic!("they never took less than {limit:?}");
}

/// From here on a message's hash is not checked by the proxy.
const LARGE: usize = 64 << 10;

#[test]
fn a_large_message_is_alone_on_its_connection() {
    let proxy = proxy(&["-quiet"]);
    // Quick, so that messages share its connections, but for those whose company is of interest.
    let server = Leased::start("1", "PP_1", proxy.1, |taken| {
        if taken.length > LARGE || taken.number % 16 == 0 {
            Answer::Late(Duration::from_millis(2))
        } else {
            Answer::Ack
        }
    });
    let mut client = Peer::connect(proxy.1);
    let end = Instant::now() + BOUND;
    // On a busy machine the server may take a while to be known as quick.
    let is_shared = || server.taken().iter().any(|taken| taken.has_follower);
    let bursts = (0..).take_while(|burst| *burst < 30 || (!is_shared() && Instant::now() < end));
    for burst in bursts {
        let payload = |at| match at % 8 {
            4 => format!("{at} of {burst} {}", "x".repeat(LARGE)),
            _ => format!("{at} of {burst}"),
        };
        exchange(&mut client, &(0..32).map(payload).collect::<Vec<_>>());
    }
    let mut taken = server.taken();
    assert_eq!(taken.len() % 32, 0);
    assert!(taken.iter().any(|taken| taken.has_follower), "nothing shares a connection");
    taken.sort_by_key(|taken| taken.connection);
    let shared = taken.windows(2).filter(|pair| {
        let [one, next] = pair else { return false };
        let is_large = |taken: &Taken| taken.length > LARGE;
        let is_either_large = is_large(one) || is_large(next);
        one.connection == next.connection && one.has_follower && is_either_large
    });
    assert_eq!(shared.count(), 0);
}

#[test]
fn what_comes_behind_an_ack_keeps_no_message_waiting() {
    // One connection to each server. A message that finds an unread line end on it is queued.
    let proxy = proxy(&["-quiet", "-max-connections", "7"]);
    let _server = Leased::start("1", "PP_1", proxy.1, |taken| {
        Answer::EndsLineAfter(Duration::from_micros(20 * (taken.number as u64 % 50)))
    });
    let mut client = Peer::connect(proxy.1);
    let since = Stopwatch::start();
    while since.elapsed() < Duration::from_secs(3) {
        for more in [r#""once":false"#, r#""once":true"#] {
            let begun = Instant::now();
            client.send(message_with("50", "PP_1", "x", more));
            assert_eq!(client.packet()["type"], 2);
            since.assert_took(begun.elapsed(), Duration::from_secs(3), "a message");
        }
    }
}

#[test]
fn what_gathers_behind_a_message_that_hangs_goes_elsewhere() {
    let proxy = proxy(&["-quiet"]);
    let hangs = "x".repeat(100);
    let server = Leased::start("1", "PP_1", proxy.1, |taken| match taken.length {
        100 => Answer::Late(Duration::from_secs(6)),
        _ => Answer::Ack,
    });
    let mut client = Peer::connect(proxy.1);
    // Once it is known as quick, messages share its connections.
    let is_shared = || server.taken().iter().any(|taken| taken.has_follower);
    let end = Instant::now() + 2 * BOUND;
    let quick: Vec<_> = (0..32).map(|number| number.to_string()).collect();
    while !is_shared() {
        assert!(Instant::now() < end, "nothing shares a connection");
        exchange(&mut client, &quick);
    }
    for _ in 0..5 {
        exchange(&mut client, &quick);
        let (before, since) = (server.taken().len(), Stopwatch::start());
        client.send(message_with("50", "PP_1", &hangs, r#""timeout":1"#));
        while server.taken().len() == before {
            since.assert_within(BOUND);
        }
        // A message at a time: they gather while the first one is awaited.
        quick.iter().for_each(|payload| client.send(message("50", "PP_1", payload)));
        assert_eq!(client.packet()["code"], "timeout");
        for payload in &quick {
            assert_eq!(client.packet()["payload"], hash(payload));
        }
        since.assert_within(Duration::from_secs(4));
    }
}
