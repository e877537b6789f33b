//! Peers that do something wrong, or are not there, for a server and a client.

use super::homework::{ends, without_digits};
use super::{Case, Failure, Rank, Role, Verdict, expect};
use crate::bench::{Bench, CLIENT, answer_with_ack};
use crate::sites::ServerSite;
use crate::support::fixed_port;
use crate::wire::Came;

pub const NOT_JSON: &str = "hello, this is no packet\n";

pub const OUTLIVES: &str = "An error in one packet should end its own connection at most. Look at which exceptions reach the loop that accepts, and which field is read without a look at whether it is there.";

const CLIENT_ENDS: &str = "A client that is told nothing it can use should say so and end. Look at what is done with an empty read, and with an answer that is no ack.";

pub const CASES: &[Case] = &[
    Case {
        number: "4.1",
        title: "a server outlives what is not JSON",
        role: Role::Server,
        rank: Rank::Recommended,
        needs: &["1.3"],
        sent: "a line of words, whose connection is then closed; then a message on another",
        expected: "the message's ack",
        script: |bench| outlives(bench, NOT_JSON),
        why: OUTLIVES,
    },
    Case {
        number: "4.2",
        title: "a server outlives a message without a payload",
        role: Role::Server,
        rank: Rank::Recommended,
        needs: &["1.3"],
        sent: "a message without payload, whose connection is then closed; then a whole one on another",
        expected: "the second one's ack",
        script: |bench| outlives(bench, &without(&bench.message("hello"), "payload")),
        why: OUTLIVES,
    },
    Case {
        number: "4.3",
        title: "a server outlives a number where text is expected",
        role: Role::Server,
        rank: Rank::Recommended,
        needs: &["1.3"],
        sent: "a message with the payload 5, a number; then one with text on another connection",
        expected: "the second one's ack",
        script: |bench| outlives(bench, &bench.message("hello").replace("\"hello\"", "5")),
        why: OUTLIVES,
    },
    Case {
        number: "4.4",
        title: "a server outlives a peer that goes before its ack",
        role: Role::Server,
        rank: Rank::Recommended,
        needs: &["1.6"],
        sent: "three messages, each on a connection that is closed at once; then one more",
        expected: "the last one's ack",
        script: |bench| {
            let site = ServerSite::start(bench)?;
            for _ in 0..3 {
                site.connect()?.send(bench.message("hello"))?;
            }
            site.deliver("hello")
        },
        why: "Who has asked may be gone when the answer is ready: writing then fails. Look at what that ends.",
    },
    Case {
        number: "4.5",
        title: "a client ends where no proxy is",
        role: Role::Client,
        rank: Rank::Recommended,
        needs: &["1.9"],
        sent: "the client is started with a port where nobody listens",
        expected: "it says something, and ends",
        script: |bench| {
            let program = bench.start_client(fixed_port(), &bench.message("hello"))?;
            bench.clock.renew();
            let status = program.wait(bench.clock.end());
            expect(status.is_some(), || "nothing: it does not end".to_owned())?;
            expect(!program.output().trim().is_empty(), || "not a word about it".to_owned())
        },
        why: "Its user waits for a word on what happened to the message. Look at how long it tries to connect, and at what is said when it cannot.",
    },
    Case {
        number: "4.6",
        title: "a client ends where the proxy closes without an answer",
        role: Role::Client,
        rank: Rank::Recommended,
        needs: &["1.10"],
        sent: "no answer; the proxy closes the client's connection",
        expected: "the client ends",
        script: |bench| ends(bench, |_, _, _| Err(Came::End)),
        why: CLIENT_ENDS,
    },
    Case {
        number: "4.7",
        title: "a client takes no refusal for an ack",
        role: Role::Client,
        rank: Rank::Recommended,
        needs: &["1.11"],
        sent: "a packet of type 3, with the proxy's reason as payload, instead of the ack",
        expected: "the client ends, and prints something other than for an ack with the right hash",
        script: |bench| {
            let right = bench.client(&bench.message("hello"), answer_with_ack)?;
            let refused = bench.client(&bench.message("hello"), |wire, _, _| {
                wire.send(format!(
                    r#"{{"type": 3, "srcid": 0, "destid": {CLIENT}, "payloadsize": 9, "payload": "no server", "code": "no-server"}}"#
                ))
            })?;
            expect(refused.status.is_some(), || "nothing: it does not end".to_owned())?;
            let differ = without_digits(&right.output) != without_digits(&refused.output);
            expect(differ, || "the same words as for a right hash".to_owned())
        },
        why: CLIENT_ENDS,
    },
    Case {
        number: "4.8",
        title: "a client ends after an answer that is not JSON",
        role: Role::Client,
        rank: Rank::Recommended,
        needs: &["1.10"],
        sent: "a line of words instead of the ack; then the end of the connection",
        expected: "the client ends",
        script: |bench| {
            ends(bench, |wire, _, _| {
                wire.send(NOT_JSON)?;
                Err(Came::End)
            })
        },
        why: CLIENT_ENDS,
    },
];

fn outlives(bench: &Bench, bytes: &str) -> Verdict {
    let site = ServerSite::start(bench)?;
    site.disturb(bytes)?;
    site.deliver("hello").map_err(|failure: Failure| failure.when("for the message after that"))
}

/// Returns a packet in which a field has another name.
pub fn without(packet: &str, field: &str) -> String {
    packet.replace(&format!("\"{field}\""), "\"other\"")
}
