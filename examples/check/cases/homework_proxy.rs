//! The homework's text, for a proxy.

use std::thread;
use std::time::Duration;

use revproc::protocol::hash;

use super::homework::{SEEN, terminal_shows};
use super::rotation::check_order;
use super::values::{CLIENTS, SERVERS};
use super::{Case, Failure, Rank, Role, check_field, check_hash, shown};
use crate::bench::{CLIENT, POLICY, message_from};
use crate::sites::ProxySite;

/// A server, its policy and a client that a program can hardly have built in.
const ID: &str = SERVERS[0].0;
const PP: &str = SERVERS[0].1;
const FROM: &str = CLIENTS[0];

pub const CASES: &[Case] = &[
    Case {
        number: "1.13",
        title: "a message reaches the server that is registered for its policy",
        role: Role::Proxy,
        rank: Rank::Required,
        needs: &[],
        sent: "the setup packet of server 4711 for PP_7, and a message of client 73 for PP_7",
        expected: "the message at the server's port: type 0, srcid 73, privPoliId \"PP_7\", and its payload",
        script: |bench| {
            let site = ProxySite::start(bench, &[(ID, PP)])?;
            let answer = site.ask_why(&message_from(&bench.dialect, FROM, PP, "hello"));
            let message = match (site.received().pop(), answer) {
                (_, Err(failure)) if failure.why.is_some() => return Err(failure),
                (Some((_, message)), _) => message,
                (None, Ok(answer)) => {
                    let client = shown(&answer);
                    return Err(Failure::came(format!(
                        "nothing at the server, and {client} at the client"
                    )));
                }
                (None, Err(failure)) => {
                    return Err(Failure::came(format!(
                        "nothing at the server; at the client {}",
                        failure.came
                    )));
                }
            };
            check_field(&message, "type", "0")?;
            check_field(&message, "srcid", FROM)?;
            check_field(&message, "privPoliId", PP)?;
            check_field(&message, "payload", "hello")
        },
        why: "The proxy keeps each server's policy and port from its setup packet, and connects to that port for a message. Look at what the table holds after a registration, and under which name the policy is looked up. A proxy for the tutorial's packets, in which even type is a string, is checked with -strings.",
    },
    Case {
        number: "1.14",
        title: "the server's ack comes back to the client",
        role: Role::Proxy,
        rank: Rank::Required,
        needs: &["1.13"],
        sent: "a message of client 73 for PP_7, to which server 4711 answers with its ack",
        expected: "the ack on the client's connection: type 2, srcid 4711, destid 73, and the hash",
        script: |bench| {
            let site = ProxySite::start(bench, &[(ID, PP)])?;
            let ack = site.ask_why(&message_from(&bench.dialect, FROM, PP, "hello"))?;
            check_field(&ack, "type", "2")?;
            check_field(&ack, "srcid", ID)?;
            check_field(&ack, "destid", FROM)?;
            check_hash(&ack, "hello", &[])
        },
        why: "The client waits on the connection on which it sent its message. Look at whether the proxy reads the server's answer, and to whom it writes it.",
    },
    Case {
        number: "1.15",
        title: "text beyond ASCII arrives as it was sent",
        role: Role::Proxy,
        rank: Rank::Required,
        needs: &["1.14"],
        sent: "a message with the payload \"Gr\u{fc}\u{df}e, \u{4e16}\u{754c} \u{1f30d}\" in UTF-8",
        expected: "the same text at the server, and its hash at the client",
        script: |bench| {
            let site = ProxySite::start(bench, &[("1", POLICY)])?;
            let answer = site.ask(&bench.message("Grüße, 世界 🌍"));
            if let Some((_, message)) = site.received().pop() {
                check_field(&message, "payload", "Grüße, 世界 🌍")?;
            }
            check_hash(&answer?, "Grüße, 世界 🌍", &[])
        },
        why: "The bytes of a message need not be changed on their way. Look at the encodings in which they are read and written again: JSON is UTF-8.",
    },
    Case {
        number: "1.16",
        title: "five messages to two servers go 1 2 1 2 1",
        role: Role::Proxy,
        rank: Rank::Required,
        needs: &["1.14"],
        sent: "servers 1 and 2 register for PP_1, in that order; then five messages, one after another",
        expected: "message 1 goes to server 1, message 2 to server 2, and so on in turn",
        script: |bench| {
            let site = ProxySite::start(bench, &[("1", POLICY), ("2", POLICY)])?;
            for _ in 0..5 {
                site.deliver(POLICY, "hello")?;
            }
            check_order(&site, "1 2 1 2 1", None)
        },
        why: "Round robin: each message goes to the next server, and after the last one it is the first one's turn. Look at what remembers whose turn it is, and when that changes.",
    },
    Case {
        number: "1.17",
        title: "the rotation goes on while another server registers",
        role: Role::Proxy,
        rank: Rank::Required,
        needs: &["1.16"],
        sent: "one message for PP_1 with servers 1 and 2; then server 3 registers for PP_2; then four more messages for PP_1",
        expected: "1 2 1 2 1, as without the registration",
        script: |bench| {
            let site = ProxySite::start(bench, &[("1", POLICY), ("2", POLICY)])?;
            site.deliver(POLICY, "hello")?;
            site.add("3", "PP_2")?;
            for _ in 0..4 {
                site.deliver(POLICY, "hello")?;
            }
            check_order(
                &site,
                "1 2 1 2 1",
                Some((
                    "1 1 2 1 2",
                    "The rotation begins anew each time a server registers. Look at what is made at a registration, and whether whose turn it is outlives that.",
                )),
            )
        },
        why: "A registration for another policy changes nothing for this one. Look at what a registration touches besides its own policy's servers.",
    },
    Case {
        number: "1.18",
        title: "each policy has its own servers, and its own rotation",
        role: Role::Proxy,
        rank: Rank::Required,
        needs: &["1.16"],
        sent: "servers 1 and 2 for PP_1, servers 3 and 4 for PP_2; messages for PP_1 and PP_2 in turn, six in all",
        expected: "1 3 2 4 1 3",
        script: |bench| {
            let servers = [("1", POLICY), ("2", POLICY), ("3", "PP_2"), ("4", "PP_2")];
            let site = ProxySite::start(bench, &servers)?;
            for policy in [POLICY, "PP_2"].into_iter().cycle().take(6) {
                site.deliver(policy, "hello")?;
            }
            check_order(
                &site,
                "1 3 2 4 1 3",
                Some((
                    "1 4 1 4 1 4",
                    "One count serves all policies: a message of the one takes a turn of the other. Look at where whose turn it is is kept.",
                )),
            )
        },
        why: "A message goes to a server of the policy that it names, and each policy takes turns by itself. Look at how servers are told apart, and where whose turn it is is kept.",
    },
    Case {
        number: "1.19",
        title: "the proxy's terminal shows what it does",
        role: Role::Proxy,
        rank: Rank::Hint,
        needs: &["1.14"],
        sent: "a registration and a message",
        expected: "lines like the homework's: its port, the server's id, policy and port, the message, the ack",
        script: |bench| {
            let site = ProxySite::start(bench, &[("1", POLICY)])?;
            site.deliver(POLICY, SEEN)?;
            // An ack may be shown after it is sent.
            thread::sleep(Duration::from_millis(10));
            let [port, server] = [site.port, site.port_of("1")].map(|port| port.to_string());
            let hash = hash(SEEN);
            terminal_shows(bench, Role::Proxy, &[&port, POLICY, &server, CLIENT, SEEN, &hash])
        },
        why: "The homework only suggests the lines. A language that collects output may have more to say than was seen.",
    },
];
