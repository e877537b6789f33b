//! TCP as a stream of bytes, for a server and a client.

use serde_json::Value;

use super::homework::without_digits;
use super::{Case, Failure, Rank, Role, Verdict, check_field, check_hash, expect};
use crate::bench::{Bench, answer_with_ack};
use crate::sites::ServerSite;
use crate::wire::{Came, Wire};

/// The sizes of texts: above what one read of 2,048 or 4,096 bytes returns, and above 65,536.
pub const LONG: usize = 5_000;
/// See [`LONG`].
pub const VERY_LONG: usize = 70_000;

/// The size of a piece, in bytes. It cuts through characters.
pub const PIECE: usize = 5;

/// A text that is cut in pieces.
pub const IN_PIECES: &str = "in pieces: Grüße, 世界";

pub const ONE_READ: &str = "One read was taken for the whole packet: recv returns what there is, up to the size that it is given. Read on until the JSON object is complete; a larger size only moves the limit.";

pub const CUT: &str = "TCP keeps no boundaries: what one side sends at once, the other may get in pieces, even in the middle of a character. Collect bytes until the JSON object is complete, and decode them then.";

pub const TOGETHER: &str = "TCP keeps no boundaries: what one side sends as two may come in one read. Find where the first JSON object ends, and keep what follows for the next.";

pub const HALF_CLOSE: &str = "The end of what the other side sends is not the end of the connection: it still reads. Answer what has come, and close then.";

pub const EMPTY: &str = "A read that returns nothing is the end of the connection, not an error, and not a packet. Look at what is done with an empty result, and what an exception ends.";

pub const CASES: &[Case] = &[
    Case {
        number: "2.1",
        title: "a server reads a text of 5,000 bytes whole",
        role: Role::Server,
        rank: Rank::Recommended,
        needs: &["1.3"],
        sent: "a message with a payload of 5,000 bytes",
        expected: "the SHA-1 of all of it",
        script: |bench| whole(bench, LONG),
        why: ONE_READ,
    },
    Case {
        number: "2.2",
        title: "a server reads a text of 70,000 bytes whole",
        role: Role::Server,
        rank: Rank::Recommended,
        needs: &["2.1"],
        sent: "a message with a payload of 70,000 bytes",
        expected: "the SHA-1 of all of it",
        script: |bench| whole(bench, VERY_LONG),
        why: ONE_READ,
    },
    Case {
        number: "2.3",
        title: "a server reads a message in pieces",
        role: Role::Server,
        rank: Rank::Recommended,
        needs: &["1.7"],
        sent: "a message, 5 bytes at a time, 20 ms apart",
        expected: "its ack",
        script: |bench| {
            let mut wire = ServerSite::start(bench)?.connect()?;
            wire.send_in_pieces(&bench.message(IN_PIECES), PIECE)?;
            check_hash(&wire.packet()?, IN_PIECES, &[])
        },
        why: CUT,
    },
    Case {
        number: "2.4",
        title: "a server answers two messages that come together",
        role: Role::Server,
        rank: Rank::Recommended,
        needs: &["1.6"],
        sent: "two messages in one segment",
        expected: "two acks, in order",
        script: |bench| {
            let mut wire = ServerSite::start(bench)?.connect()?;
            two_together(bench, &mut wire)
        },
        why: TOGETHER,
    },
    Case {
        number: "2.5",
        title: "a server answers a peer that has ended its sending side",
        role: Role::Server,
        rank: Rank::Recommended,
        needs: &["1.3"],
        sent: "a message, and the end of the sending side (shutdown)",
        expected: "its ack",
        script: |bench| {
            let mut wire = ServerSite::start(bench)?.connect()?;
            wire.send(bench.message("hello"))?;
            wire.half_close();
            check_hash(&wire.packet()?, "hello", &[])
        },
        why: HALF_CLOSE,
    },
    Case {
        number: "2.6",
        title: "a connection without a message does a server no harm",
        role: Role::Server,
        rank: Rank::Recommended,
        needs: &["1.3"],
        sent: "a connection that is closed at once; then a message on another",
        expected: "the message's ack",
        script: |bench| {
            let site = ServerSite::start(bench)?;
            site.disturb("")?;
            site.deliver("hello")
        },
        why: EMPTY,
    },
    Case {
        number: "2.7",
        title: "a client sends a text of 5,000 bytes whole",
        role: Role::Client,
        rank: Rank::Recommended,
        needs: &["1.9"],
        sent: "a packet file with a payload of 5,000 bytes",
        expected: "the packet with all of it",
        script: |bench| sends_whole(bench, LONG),
        why: "Look at how much of the file is read, and at whether all of it is sent: send may take a part only.",
    },
    Case {
        number: "2.8",
        title: "a client sends a text of 70,000 bytes whole",
        role: Role::Client,
        rank: Rank::Recommended,
        needs: &["2.7"],
        sent: "a packet file with a payload of 70,000 bytes",
        expected: "the packet with all of it",
        script: |bench| sends_whole(bench, VERY_LONG),
        why: "Look at how much of the file is read, and at whether all of it is sent: send may take a part only.",
    },
    Case {
        number: "2.9",
        title: "a client reads an ack in pieces",
        role: Role::Client,
        rank: Rank::Recommended,
        needs: &["1.10"],
        sent: "the ack, 20 bytes at a time, 20 ms apart",
        expected: "the client prints what it prints where the ack comes in one piece, and ends",
        script: |bench| as_with_an_ack(bench, |wire, _, ack| wire.send_in_pieces(ack, 20)),
        why: CUT,
    },
];

fn whole(bench: &Bench, size: usize) -> Verdict {
    let site = ServerSite::start(bench)?;
    let payload = text_of(size);
    check_hash(&site.ask(&bench.message(&payload))?, &payload, &[])
}

/// Sends two messages at once, which must both be acked.
pub fn two_together(bench: &Bench, wire: &mut Wire) -> Verdict {
    let texts = ["the first", "the second"];
    wire.send(texts.map(|text| bench.message(text)).concat())?;
    for (nth, payload) in texts.iter().enumerate() {
        let ack = wire.packet().map_err(|came| {
            Failure::from(came).when(if nth == 0 {
                "as the first ack"
            } else {
                "as the second ack"
            })
        })?;
        check_hash(&ack, payload, &texts[..nth])?;
    }
    Ok(())
}

fn sends_whole(bench: &Bench, size: usize) -> Verdict {
    let payload = text_of(size);
    let run = bench.client(&bench.message(&payload), answer_with_ack)?;
    let came = run.packet["payload"].as_str().unwrap_or_default();
    if came.len() == size {
        return check_field(&run.packet, "payload", &payload);
    }
    Err(Failure::came(format!("a payload of {} bytes", came.len())))
}

/// Runs a client with an answer that means the same as the ack; it must do the same as with that.
pub fn as_with_an_ack(
    bench: &Bench,
    answer: impl Fn(&mut Wire, &Value, &str) -> Result<(), Came> + Send + Sync + 'static,
) -> Verdict {
    let usual = bench.client(&bench.message("hello"), answer_with_ack)?;
    let run = bench.client(&bench.message("hello"), answer)?;
    expect(run.status.is_some(), || "nothing: the client does not end".to_owned())?;
    let is_same = without_digits(&usual.output) == without_digits(&run.output);
    let last = run.output.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("nothing");
    expect(is_same, || format!("other words than usual; the last line is {last:?}"))
}

/// Returns a text of a size in which no part is like another.
pub fn text_of(size: usize) -> String {
    let mut text: String = (0..size / 5).map(|number| format!("{number:04} ")).collect();
    text.truncate(size);
    text
}
