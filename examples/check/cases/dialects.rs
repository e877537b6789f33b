//! What differs from program to program, and means the same.

use serde_json::Value;

use super::stream::as_with_an_ack;
use super::values::check_follows;
use super::{Case, Rank, Role, Verdict, check_ack, check_field, check_hash};
use crate::bench::{Bench, CLIENT, POLICY, answer_with_ack, message};
use crate::peers::{register, setup};
use crate::sites::{ProxySite, ServerSite};
use crate::support::dialect::with;
use crate::support::peers::text;

const OTHER: &str = "The homework writes numbers as numbers, the tutorial as strings: 1 and \"1\" mean the same. Look at where a value is compared without regard to its kind.";

const REARRANGED: &str = "JSON's fields may come in any order, with white space and further fields. Look for a place that takes the packet for text, or counts its fields.";

pub const CASES: &[Case] = &[
    Case {
        number: "5.1",
        title: "a server answers a message in the other dialect",
        role: Role::Server,
        rank: Rank::Recommended,
        needs: &["1.3"],
        sent: "a message with strings for numbers, or with -strings with numbers",
        expected: "its ack",
        script: |bench| {
            let site = ServerSite::start(bench)?;
            check_hash(&site.ask(&message(&bench.other, POLICY, "hello"))?, "hello", &[])
        },
        why: OTHER,
    },
    Case {
        number: "5.2",
        title: "a server answers a message with fields in another order, and more of them",
        role: Role::Server,
        rank: Rank::Recommended,
        needs: &["1.3"],
        sent: "a message over several lines, with its fields in another order and an unknown one",
        expected: "its ack",
        script: |bench| {
            let site = ServerSite::start(bench)?;
            check_hash(&site.ask(&rearranged(&bench.message("hello")))?, "hello", &[])
        },
        why: REARRANGED,
    },
    Case {
        number: "5.3",
        title: "an id may be a word",
        role: Role::Server,
        rank: Rank::Recommended,
        needs: &["1.5"],
        sent: "a message with the srcid \"fifty\"",
        expected: "an ack with the destid \"fifty\"",
        script: |bench| {
            let site = ServerSite::start(bench)?;
            let quoted = bench.message("hello").replace(&format!("\"{CLIENT}\""), CLIENT);
            let ack = site.ask(&quoted.replace(&format!(" {CLIENT},"), " \"fifty\","))?;
            // Who turns it into a number may have a number for each word.
            let other = site.ask(&bench.message_from("73")).ok();
            let packets = [Some(&ack), other.as_ref()];
            check_follows("destid", ["fifty", "73"], packets, "from the message")
        },
        why: "An id is a name; destid is the message's srcid just as it came. Look for where it is turned into a number.",
    },
    Case {
        number: "5.4",
        title: "a server needs no answer to its setup packet",
        role: Role::Server,
        rank: Rank::Recommended,
        needs: &["1.3"],
        sent: "no answer to the setup packet; then a message",
        expected: "its ack",
        script: |bench| {
            let site = ServerSite::with(bench, |_, _, _| ())?;
            check_hash(&site.ask(&bench.message("hello"))?, "hello", &[])
        },
        why: "The homework's proxy does not answer a setup packet. Look at what the server waits for before it serves.",
    },
    Case {
        number: "5.5",
        title: "a client takes an ack in the other dialect",
        role: Role::Client,
        rank: Rank::Recommended,
        needs: &["1.10"],
        sent: "the ack with strings for numbers, or with -strings with numbers",
        expected: "the client prints what it prints for the usual one, and ends",
        script: |bench| {
            let other = bench.other;
            as_with_an_ack(bench, move |wire, message, ack| {
                let hash = serde_json::from_str(ack)
                    .map_or(String::new(), |ack: Value| text(&ack["payload"]));
                wire.send((other.ack)("1", &message["srcid"], &hash))
            })
        },
        why: OTHER,
    },
    Case {
        number: "5.6",
        title: "a client takes an ack with more fields, and a line break behind it",
        role: Role::Client,
        rank: Rank::Recommended,
        needs: &["1.10"],
        sent: "the ack with an unknown field, and a line break",
        expected: "the client prints what it prints for the usual one, and ends",
        script: |bench| {
            as_with_an_ack(bench, |wire, _, ack| wire.send(with(ack, r#""note": "}""#) + "\n"))
        },
        why: REARRANGED,
    },
    Case {
        number: "5.7",
        title: "a packet file may have several lines",
        role: Role::Client,
        rank: Rank::Recommended,
        needs: &["1.9"],
        sent: "a packet file over several lines, as in the homework, with its fields in another order",
        expected: "the packet",
        script: |bench| {
            let run = bench.client(&rearranged(&bench.message("hello")), answer_with_ack)?;
            check_field(&run.packet, "type", "0")?;
            check_field(&run.packet, "payload", "hello")
        },
        why: "The file is one JSON object, however it is laid out. Look at how much of it is read.",
    },
    Case {
        number: "5.8",
        title: "a proxy understands the other dialect",
        role: Role::Proxy,
        rank: Rank::Recommended,
        needs: &["1.14"],
        sent: "a setup packet and a message with strings for numbers, or with -strings with numbers",
        expected: "the message's ack",
        script: |bench| {
            let site = ProxySite::start(bench, &[])?;
            let port = site.play("1", answer_with_ack)?;
            register(bench, site.port, &setup(&bench.other, "1", POLICY, port))?;
            site.deliver_in(&bench.other, POLICY, "hello")
        },
        why: OTHER,
    },
    Case {
        number: "5.9",
        title: "the policies 999 and \"999\" are one",
        role: Role::Proxy,
        rank: Rank::Recommended,
        needs: &["1.14"],
        sent: "the setup packet of a server for the policy \"999\"; messages for 999, the number, and \"999\"",
        expected: "two acks",
        script: |bench| {
            let site = ProxySite::start(bench, &[("1", "999")])?;
            site.deliver("999", "hello").map_err(|failure| failure.when("for \"999\""))?;
            let number = message(&bench.dialect, "999", "hello").replace("\"999\"", "999");
            check_ack(&site.ask(&number)?, "hello").map_err(|failure| failure.when("for 999"))
        },
        why: "A server's policy comes from its command line, as text, and a client's from its file, where the homework's own has a number. Look at how they are compared.",
    },
    Case {
        number: "5.10",
        title: "a setup packet may have the policy as privPolyId only",
        role: Role::Proxy,
        rank: Rank::Recommended,
        needs: &["1.14"],
        sent: "a setup packet in the homework's own spelling, without privPoliId; then a message",
        expected: "the message's ack",
        script: |bench| spelled(bench, "privPolyId"),
        why: "The homework spells the policy privPoliId in a message and privPolyId in a setup packet. (Elsewhere the checker sends both.) Look at which one the table is made from.",
    },
    Case {
        number: "5.11",
        title: "a setup packet may have the policy as privPoliId only",
        role: Role::Proxy,
        rank: Rank::Recommended,
        needs: &["1.14"],
        sent: "a setup packet in the other spelling, without privPolyId; then a message",
        expected: "the message's ack",
        script: |bench| spelled(bench, "privPoliId"),
        why: "Many servers spell the policy as in a message: privPoliId. Look at which one the table is made from.",
    },
    Case {
        number: "5.12",
        title: "a proxy takes packets with fields in another order, and more of them",
        role: Role::Proxy,
        rank: Rank::Recommended,
        needs: &["1.14"],
        sent: "a setup packet and a message over several lines, with their fields in another order and an unknown one",
        expected: "the message's ack",
        script: |bench| {
            let site = ProxySite::start(bench, &[])?;
            let port = site.play("1", answer_with_ack)?;
            register(bench, site.port, &rearranged(&setup(&bench.dialect, "1", POLICY, port)))?;
            check_ack(&site.ask(&rearranged(&bench.message("hello")))?, "hello")
        },
        why: REARRANGED,
    },
];

/// Registers a server with the policy under one name only.
fn spelled(bench: &Bench, name: &str) -> Verdict {
    let site = ProxySite::start(bench, &[])?;
    let port = site.play("1", answer_with_ack)?;
    let packet = (bench.dialect.setup)("1", POLICY, port).replace("privPolyId", name);
    register(bench, site.port, &packet)?;
    site.deliver(POLICY, "hello")
}

/// Returns a packet with an unknown field, in another order, and with white space.
fn rearranged(packet: &str) -> String {
    let packet = with(packet, r#""note": {"of": ["no", {"meaning": "}"}]}"#);
    let fields: serde_json::Map<_, _> = serde_json::from_str(&packet).unwrap_or_default();
    let field = |(name, value)| format!("  {} :\t{value}", Value::from(name));
    let mut fields: Vec<String> = fields.into_iter().map(field).collect();
    fields.sort();
    fields.reverse();
    format!("{{\r\n{}\n}}\n", fields.join(" ,\n"))
}
