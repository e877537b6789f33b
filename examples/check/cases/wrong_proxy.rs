//! Peers that do something wrong, or are not there, for a proxy.

use std::thread;
use std::time::Duration;

use super::wrong::{NOT_JSON, OUTLIVES, without};
use super::{Case, Failure, Rank, Role, Verdict, expect};
use crate::bench::{Bench, POLICY, answer_with_ack, message};
use crate::peers::{register, setup};
use crate::sites::ProxySite;
use crate::wire::Came;

pub const CASES: &[Case] = &[
    Case {
        number: "4.9",
        title: "a message for a policy that nobody serves is answered",
        role: Role::Proxy,
        rank: Rank::Recommended,
        needs: &["1.14"],
        sent: "a message for PP_9, for which no server has registered",
        expected: "any answer, or at least the end of the connection",
        script: |bench| {
            let site = ProxySite::start(bench, &[("1", POLICY)])?;
            told(site.ask(&message(&bench.dialect, "PP_9", "hello")))
        },
        why: "Its client waits for ever. Look at what happens where the policy is not in the table: the client should be told so.",
    },
    Case {
        number: "4.10",
        title: "a proxy outlives a message for a policy that nobody serves",
        role: Role::Proxy,
        rank: Rank::Recommended,
        needs: &["1.14"],
        sent: "a message for PP_9, for which no server has registered; then one for PP_1",
        expected: "the second one's ack",
        script: |bench| {
            let unknown = message(&bench.dialect, "PP_9", "hello");
            outlives(bench, &[unknown])
        },
        why: "A policy that is not in the table is a client's mistake. Look at what the look-up does then, and what that ends.",
    },
    Case {
        number: "4.11",
        title: "a message whose only server has died is answered",
        role: Role::Proxy,
        rank: Rank::Recommended,
        needs: &["1.14"],
        sent: "a message for PP_1, whose server no longer listens",
        expected: "any answer, or at least the end of the connection",
        script: |bench| {
            let site = ProxySite::start(bench, &[("1", POLICY)])?;
            site.kill("1");
            told(site.ask(&bench.message("hello")))
        },
        why: "Its client waits for ever. Look at what happens where a server cannot be connected to.",
    },
    Case {
        number: "4.12",
        title: "a proxy outlives a server",
        role: Role::Proxy,
        rank: Rank::Recommended,
        needs: &["1.14"],
        sent: "a message for PP_1, whose server no longer listens; then one for PP_2, whose server does",
        expected: "the second one's ack",
        script: |bench| {
            let site = ProxySite::start(bench, &[("1", POLICY), ("2", "PP_2")])?;
            site.kill("1");
            site.disturb(bench.message("hello"))?;
            site.deliver("PP_2", "hello").map_err(after)
        },
        why: "Servers come and go; a connection that is refused is an error of this message only. Look at what it ends.",
    },
    Case {
        number: "4.13",
        title: "messages go to the other server where one has died",
        role: Role::Proxy,
        rank: Rank::Recommended,
        needs: &["1.14", "4.12"],
        sent: "four messages for PP_1, of whose two servers the first no longer listens",
        expected: "four acks from the second",
        script: |bench| {
            let site = ProxySite::start(bench, &[("1", POLICY), ("2", POLICY)])?;
            site.kill("1");
            for nth in 1..=4 {
                site.deliver(POLICY, "hello")
                    .map_err(|failure| failure.when(&format!("for message {nth}")))?;
            }
            Ok(())
        },
        why: "A connection that was refused has sent nothing, so that the message can still go elsewhere. Look at what is tried after the first server.",
    },
    Case {
        number: "4.14",
        title: "a server that comes back on another port gets its messages there",
        role: Role::Proxy,
        rank: Rank::Recommended,
        needs: &["1.14", "4.12"],
        sent: "server 1 registers, ends, and registers again with another port; then three messages",
        expected: "three acks from the new port",
        script: |bench| {
            let site = ProxySite::start(bench, &[("1", POLICY)])?;
            site.deliver(POLICY, "hello")?;
            site.kill("1");
            site.add("1", POLICY)?;
            for nth in 1..=3 {
                site.deliver(POLICY, "hello").map_err(|failure| {
                    failure.when(&format!("for message {nth} after its return"))
                })?;
            }
            Ok(())
        },
        why: "The id says which server it is, so that its new port takes the place of the old one. Look at what a second registration of the same id does to the table.",
    },
    Case {
        number: "4.15",
        title: "a server that registers twice gets no second turn",
        role: Role::Proxy,
        rank: Rank::Recommended,
        needs: &["1.16"],
        sent: "servers 1 and 2 register, and server 1 once more, with the same port; then four messages",
        expected: "two for each",
        script: |bench| {
            let site = ProxySite::start(bench, &[("1", POLICY), ("2", POLICY)])?;
            register(bench, site.port, &setup(&bench.dialect, "1", POLICY, site.port_of("1")))?;
            for _ in 0..4 {
                site.deliver(POLICY, "hello")?;
            }
            let order = site.order();
            let first = order.iter().filter(|id| **id == "1").count();
            expect((first, order.len()) == (2, 4), || format!("they went {}", order.join(" ")))
        },
        why: "A server may register again, to be sure. Look at whether the table has a place for each server, or one for each setup packet.",
    },
    Case {
        number: "4.16",
        title: "a message whose server closes without an ack is answered",
        role: Role::Proxy,
        rank: Rank::Recommended,
        needs: &["1.14"],
        sent: "a message whose server reads it, and closes the connection",
        expected: "any answer, or at least the end of the connection",
        script: |bench| {
            let site = ProxySite::with(bench, |_, _, _| Err(Came::End))?;
            told(site.ask(&bench.message("hello")))
        },
        why: "Its client waits for ever. Look at what is done with an empty read from the server.",
    },
    Case {
        number: "4.17",
        title: "a proxy outlives what is not JSON",
        role: Role::Proxy,
        rank: Rank::Recommended,
        needs: &["1.14"],
        sent: "a line of words, whose connection is then closed; then a message on another",
        expected: "the message's ack",
        script: |bench| outlives(bench, &[NOT_JSON.to_owned()]),
        why: OUTLIVES,
    },
    Case {
        number: "4.18",
        title: "a proxy outlives packets without a field",
        role: Role::Proxy,
        rank: Rank::Recommended,
        needs: &["1.14"],
        sent: "messages without type, policy and payload, and a setup packet without listenport, each on a connection of its own; then a whole message",
        expected: "the last one's ack",
        script: |bench| {
            let whole = bench.message("hello");
            let of = |field| without(&whole, field);
            let server = setup(&bench.dialect, "9", "PP_9", 1);
            outlives(
                bench,
                &[of("type"), of("privPoliId"), of("payload"), without(&server, "listenport")],
            )
        },
        why: OUTLIVES,
    },
    Case {
        number: "4.19",
        title: "a proxy outlives a number where text is expected, and text where a number is",
        role: Role::Proxy,
        rank: Rank::Recommended,
        needs: &["1.14"],
        sent: "a message with the payload 5, and a setup packet with the listenport \"soon\"; then a whole message",
        expected: "the last one's ack",
        script: |bench| {
            let number = bench.message("hello").replace("\"hello\"", "5");
            let server = setup(&bench.dialect, "9", "PP_9", 12345);
            let server = server.replace("\"12345\"", "12345").replace("12345", "\"soon\"");
            outlives(bench, &[number, server])
        },
        why: OUTLIVES,
    },
    Case {
        number: "4.20",
        title: "a proxy outlives a client that goes before its ack",
        role: Role::Proxy,
        rank: Rank::Recommended,
        needs: &["1.14"],
        sent: "three messages to a server that takes 50 ms, each on a connection that is closed at once; then one more",
        expected: "the last one's ack",
        script: |bench| {
            let site = ProxySite::with(bench, |wire, _, ack| {
                thread::sleep(Duration::from_millis(50));
                wire.send(ack)
            })?;
            for _ in 0..3 {
                site.client()?.send(bench.message("hello"))?;
            }
            site.deliver(POLICY, "hello").map_err(after)
        },
        why: "Who has asked may be gone when the answer is there: writing then fails. Look at what that ends.",
    },
];

/// Whether a client was told something, so that it does not wait for ever.
fn told(answer: Result<serde_json::Value, Came>) -> Verdict {
    match answer {
        Ok(_) | Err(Came::End | Came::EndInside(_) | Came::NotJson(_)) => Ok(()),
        Err(came) => Err(came.into()),
    }
}

fn outlives(bench: &Bench, packets: &[String]) -> Verdict {
    let site = ProxySite::start(bench, &[])?;
    site.add_with("1", POLICY, answer_with_ack)?;
    packets.iter().try_for_each(|packet| site.disturb(packet))?;
    site.deliver(POLICY, "hello").map_err(after)
}

fn after(failure: Failure) -> Failure {
    failure.when("for the message after that")
}
