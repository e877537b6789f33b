//! TCP as a stream of bytes, for a proxy.

use super::stream::{
    CUT, EMPTY, HALF_CLOSE, IN_PIECES, LONG, ONE_READ, PIECE, TOGETHER, VERY_LONG, text_of,
    two_together,
};
use super::{Case, Failure, Rank, Role, Verdict, check_hash};
use crate::bench::{Bench, POLICY};
use crate::sites::ProxySite;

pub const CASES: &[Case] = &[
    Case {
        number: "2.10",
        title: "a text of 5,000 bytes passes the proxy whole",
        role: Role::Proxy,
        rank: Rank::Recommended,
        needs: &["1.14"],
        sent: "a message with a payload of 5,000 bytes",
        expected: "all of it at the server, and its ack at the client",
        script: |bench| whole(bench, LONG),
        why: ONE_READ,
    },
    Case {
        number: "2.11",
        title: "a text of 70,000 bytes passes the proxy whole",
        role: Role::Proxy,
        rank: Rank::Recommended,
        needs: &["2.10"],
        sent: "a message with a payload of 70,000 bytes",
        expected: "all of it at the server, and its ack at the client",
        script: |bench| whole(bench, VERY_LONG),
        why: ONE_READ,
    },
    Case {
        number: "2.12",
        title: "a proxy reads a message in pieces",
        role: Role::Proxy,
        rank: Rank::Recommended,
        needs: &["1.15"],
        sent: "a message, 5 bytes at a time, 20 ms apart",
        expected: "its ack",
        script: |bench| {
            let site = ProxySite::start(bench, &[("1", POLICY)])?;
            let mut client = site.client()?;
            client.send_in_pieces(&bench.message(IN_PIECES), PIECE)?;
            check_hash(&client.packet()?, IN_PIECES, &[])
        },
        why: CUT,
    },
    Case {
        number: "2.13",
        title: "a proxy reads an ack in pieces",
        role: Role::Proxy,
        rank: Rank::Recommended,
        needs: &["1.14"],
        sent: "a message, to which the server sends its ack 20 bytes at a time, 20 ms apart",
        expected: "the whole ack at the client",
        script: |bench| {
            let site = ProxySite::with(bench, |wire, _, ack| wire.send_in_pieces(ack, 20))?;
            site.deliver(POLICY, "hello")
        },
        why: CUT,
    },
    Case {
        number: "2.14",
        title: "a proxy handles two messages that come together",
        role: Role::Proxy,
        rank: Rank::Recommended,
        needs: &["1.14"],
        sent: "two messages in one segment",
        expected: "two acks, in order",
        script: |bench| {
            let site = ProxySite::start(bench, &[("1", POLICY)])?;
            two_together(bench, &mut site.client()?)
        },
        why: TOGETHER,
    },
    Case {
        number: "2.15",
        title: "a proxy answers a client that has ended its sending side",
        role: Role::Proxy,
        rank: Rank::Recommended,
        needs: &["1.14"],
        sent: "a message, and the end of the sending side (shutdown)",
        expected: "its ack",
        script: |bench| {
            let site = ProxySite::start(bench, &[("1", POLICY)])?;
            let mut client = site.client()?;
            client.send(bench.message("hello"))?;
            client.half_close();
            check_hash(&client.packet()?, "hello", &[])
        },
        why: HALF_CLOSE,
    },
    Case {
        number: "2.16",
        title: "a connection without a message does a proxy no harm",
        role: Role::Proxy,
        rank: Rank::Recommended,
        needs: &["1.14"],
        sent: "a connection that is closed at once; then a message on another",
        expected: "the message's ack",
        script: |bench| {
            let site = ProxySite::start(bench, &[("1", POLICY)])?;
            site.disturb("")?;
            site.deliver(POLICY, "hello")
        },
        why: EMPTY,
    },
];

fn whole(bench: &Bench, size: usize) -> Verdict {
    let site = ProxySite::start(bench, &[("1", POLICY)])?;
    let payload = text_of(size);
    let answer = site.ask(&bench.message(&payload));
    let arrived = site.received().pop().map(|(_, message)| message);
    match (arrived, site.received_part()) {
        (None, part @ 1..) => {
            Err(Failure::came(format!("the first {part} bytes at the server, and the rest never")))
        }
        (Some(message), _) if message["payload"].as_str() != Some(&payload) => {
            let came = message["payload"].as_str().unwrap_or_default().len();
            Err(Failure::came(format!("another payload at the server, of {came} bytes")))
        }
        _ => check_hash(&answer?, &payload, &[]),
    }
}
