//! The homework's text, for a server, a client, and the three together.

use std::time::Duration;

use revproc::protocol::hash;
use serde_json::Value;

use super::{Case, Failure, Rank, Role, Verdict, check_hash, check_hash_of, expect, values};
use crate::bench::{Bench, CLIENT, POLICY, START, answer_with_ack, wait_for};
use crate::fair;
use crate::peers::Busy;
use crate::ports::{is_connecting_to, listens};
use crate::program::shorten;
use crate::sites::ServerSite;
use crate::support::peers::dumps;
use crate::wire::{Came, Wire};

/// A text that the terminals should show.
pub const SEEN: &str = "a text to be seen";

pub const CASES: &[Case] = &[
    Case {
        number: "1.1",
        title: "a server registers itself with type 1, its id, policy and port",
        role: Role::Server,
        rank: Rank::Required,
        needs: &[],
        sent: "the server is started with id 4711, policy PP_7, a port to listen on, and the proxy's port; beside it another, with 82 and PP_8",
        expected: "from each a packet at its proxy's port: type 1, and id, privPolyId and listenport as they were given",
        script: values::registers,
        why: "The proxy knows of a server only what its setup packet says. Compare it field by field with the homework's, and with the command line.",
    },
    Case {
        number: "1.2",
        title: "a server listens before it turns to the proxy",
        role: Role::Server,
        rank: Rank::Recommended,
        needs: &["1.1"],
        sent: "nothing: the proxy's port keeps the server waiting while it connects",
        expected: "meanwhile the server listens on its own port",
        script: listens_before_it_connects,
        why: "From its registration on a server gets messages, and one that comes before it listens is refused by the system. Look at the order of bind, listen, and the connection to the proxy.",
    },
    Case {
        number: "1.3",
        title: "a server answers a message with the SHA-1 of its text",
        role: Role::Server,
        rank: Rank::Required,
        needs: &[],
        sent: "a message with the payload \"hello\", on a connection to the server's port, which stays open",
        expected: "a JSON object with the payload aaf4c61ddcc5e8a2dabede0f3b482cd9aea9434d",
        script: |bench| {
            let site = ServerSite::start(bench)?;
            let packet = bench.message("hello");
            check_hash_of(&site.ask_why(&packet)?, "hello", &packet)
        },
        why: "The answer goes back on the connection on which the message came, as soon as the message is there: its sender does not close first. Look at what the server waits for, and at what it hashes.",
    },
    Case {
        number: "1.4",
        title: "the ack has type 2, the server's id as srcid, and its payload's size",
        role: Role::Server,
        rank: Rank::Required,
        needs: &["1.3"],
        sent: "a message to a server with id 4711, and one to a server with id 82",
        expected: "type 2, srcid 4711 and 82, payloadsize 40",
        script: values::acks_as_itself,
        why: "The ack is a packet of its own, not the message with another payload: srcid is now the server, and payloadsize the size of the hash.",
    },
    Case {
        number: "1.5",
        title: "the ack's destid is the client's id",
        role: Role::Server,
        rank: Rank::Required,
        needs: &["1.3"],
        sent: "a message with srcid 73, and one with srcid 5012",
        expected: "an ack with destid 73, and one with destid 5012",
        script: values::acks_to_the_client,
        why: "destid says for whom the ack is: it is the srcid of the message that it answers.",
    },
    Case {
        number: "1.6",
        title: "each message gets its own hash",
        role: Role::Server,
        rank: Rank::Required,
        needs: &["1.3"],
        sent: "three messages on three connections, and two more on one, if the server takes a second there",
        expected: "the SHA-1 of each message's text alone",
        script: each_message_has_its_own_hash,
        why: "The answer to a message must not depend on those before it. Look at what the server keeps from one message to the next.",
    },
    Case {
        number: "1.7",
        title: "text beyond ASCII is hashed in UTF-8",
        role: Role::Server,
        rank: Rank::Required,
        needs: &["1.6"],
        sent: "\"Gr\u{fc}\u{df}e\", and \"\u{4e16}\u{754c} \u{1f30d}\" as it is and with JSON's \\u escapes",
        expected: "each time the SHA-1 of the text's UTF-8",
        script: |bench| {
            let site = ServerSite::start(bench)?;
            for payload in ["Grüße", "世界 🌍"] {
                let escaped =
                    (bench.dialect.message)(CLIENT, POLICY, payload.len(), &dumps(payload));
                for packet in [bench.message(payload), escaped] {
                    let ack = site.ask(&packet).map_err(Failure::from);
                    ack.and_then(|ack| check_hash(&ack, payload, &[]))
                        .map_err(|failure| failure.when(&format!("for {payload:?}")))?;
                }
            }
            Ok(())
        },
        why: "A hash is made of bytes, so both sides must turn the text into the same ones: UTF-8, as JSON itself. Look at the encoding in which the text is read, and in which it is hashed.",
    },
    Case {
        number: "1.8",
        title: "the server's terminal shows what it does",
        role: Role::Server,
        rank: Rank::Hint,
        needs: &["1.3"],
        sent: "a message",
        expected: "lines like the homework's: its id, its policy, its port, the message, the response",
        script: |bench| {
            let site = ServerSite::start(bench)?;
            site.deliver(SEEN)?;
            terminal_shows(
                bench,
                Role::Server,
                &["100", POLICY, &site.given.to_string(), CLIENT, SEEN],
            )
        },
        why: "The homework only suggests the lines. A language that collects output may have more to say than was seen.",
    },
    Case {
        number: "1.9",
        title: "a client sends its file's packet: type 0, its id, the policy, the text",
        role: Role::Client,
        rank: Rank::Required,
        needs: &[],
        sent: "the client is started with id 73, the proxy's port, and a file with a packet for PP_7; then with 5012 and one for PP_8; the files have another srcid",
        expected: "a packet at the proxy's port: type 0, the client's id as srcid, and privPoliId and payload of the file",
        script: values::sends_its_file,
        why: "What the proxy gets should be the packet in the file. Look at how the file is read, in which encoding, and what is sent of it; its srcid is the id from the command line.",
    },
    Case {
        number: "1.10",
        title: "a client ends after its ack",
        role: Role::Client,
        rank: Rank::Required,
        needs: &["1.9"],
        sent: "the ack for the client's message; the connection stays open",
        expected: "the client ends by itself",
        script: |bench| ends(bench, answer_with_ack),
        why: "The ack is whole when its JSON object is. A client that reads until the connection ends, or a line does, waits for something that a proxy need not send.",
    },
    Case {
        number: "1.11",
        title: "a client says whether the hash is right",
        role: Role::Client,
        rank: Rank::Required,
        needs: &["1.10"],
        sent: "to one run the right ack, to another one with the SHA-1 of another text",
        expected: "the two runs differ in what they print, beyond the hash itself",
        script: |bench| {
            let right = bench.client(&bench.message("hello"), answer_with_ack)?;
            let wrong = bench.client(&bench.message("hello"), |wire, _, ack| {
                let other = hash("another text");
                wire.send(ack.replace(&hash("hello"), &other))
            })?;
            let differ = without_digits(&right.output) != without_digits(&wrong.output);
            let last = wrong.output.lines().rev().find(|line| !line.trim().is_empty());
            expect(differ, || {
                format!(
                    "both times the same words; the last line is {:?}",
                    shorten(last.unwrap_or(""))
                )
            })
        },
        why: "The hash is there so that the client can check whether its message arrived as it was sent. Look for where it computes the SHA-1 of its own text and compares.",
    },
    Case {
        number: "1.12",
        title: "the client's terminal shows what it does",
        role: Role::Client,
        rank: Rank::Hint,
        needs: &["1.10"],
        sent: "the ack for the client's message",
        expected: "lines like the homework's: the message, its policy, the response",
        script: |bench| {
            bench.client(&bench.message(SEEN), answer_with_ack)?;
            let hash = hash(SEEN);
            terminal_shows(bench, Role::Client, &[POLICY, SEEN, &hash])
        },
        why: "The homework only suggests the lines. A language that collects output may have more to say than was seen.",
    },
];

fn listens_before_it_connects(bench: &Bench) -> Verdict {
    let proxy = Busy::start();
    let (program, port) = bench.start_server(proxy.port)?;
    let is_there = || is_connecting_to(proxy.port) || program.ended().is_some();
    wait_for(bench.clock.start_end(START), is_there);
    expect(program.ended().is_none(), || "it ended before it connected".to_owned())?;
    // Another of its threads may be about to.
    wait_for(fair::now() + Duration::from_millis(100), || listens(port));
    expect(listens(port), || {
        format!("it connects to the proxy, but nobody listens on port {port} yet")
    })
}

fn each_message_has_its_own_hash(bench: &Bench) -> Verdict {
    let site = ServerSite::start(bench)?;
    // The SHA-1 of the third begins with a zero, which some ways to write it lose.
    let texts = ["the first", "the second", "message 22"];
    for (nth, payload) in texts.iter().enumerate() {
        check_hash(&site.ask(&bench.message(payload))?, payload, &texts[..nth])
            .map_err(|failure| failure.when(&format!("for message {}", nth + 1)))?;
    }
    let mut wire = site.connect()?;
    for (nth, payload) in texts[..2].iter().enumerate() {
        let sent = wire.send(bench.message(payload));
        let within =
            if nth == 0 { bench.clock.end() } else { fair::now() + Duration::from_secs(1) };
        match sent.and_then(|()| wire.packet_until(within)) {
            Ok(ack) => check_hash(&ack, payload, &texts[..nth])
                .map_err(|failure| failure.when("for the second message of a connection"))?,
            // It may take one message per connection.
            Err(_) if nth > 0 => break,
            Err(came) => return Err(came.into()),
        }
    }
    Ok(())
}

/// Runs a client whose message is answered like this; it must end.
pub fn ends(
    bench: &Bench,
    answer: impl Fn(&mut Wire, &Value, &str) -> Result<(), Came> + Send + Sync + 'static,
) -> Verdict {
    let run = bench.client(&bench.message("hello"), answer)?;
    expect(run.status.is_some(), || {
        format!("it still runs after {} s", bench.clock.limit().as_secs_f64())
    })
}

/// Fails with what a role's standard output does not contain, once it had time to be written.
pub fn terminal_shows(bench: &Bench, role: Role, parts: &[&str]) -> Verdict {
    let missing = || {
        let out = bench.out(role);
        parts.iter().filter(|part| !out.contains(**part)).copied().collect::<Vec<_>>()
    };
    wait_for(fair::now() + Duration::from_millis(500), || missing().is_empty());
    let missing = missing();
    expect(missing.is_empty(), || format!("standard output never shows {}", missing.join(", ")))
}

/// Returns what a program printed without what differs from run to run.
pub fn without_digits(output: &str) -> String {
    let is_hash = |word: &str| word.len() == 40 && word.chars().all(|c| c.is_ascii_hexdigit());
    let words = output.split(|c: char| !c.is_alphanumeric()).filter(|word| !is_hash(word));
    words.flat_map(str::chars).filter(|c| !c.is_ascii_digit()).collect()
}
