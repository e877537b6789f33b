//! Whatever a server answers, every message gets exactly one reply, the replies come in the order of
//! the messages, and an ack carries the hash of its own message.

use std::collections::BTreeMap;
use std::thread;
use std::time::{Duration, Instant};

use revproc::protocol::hash;

use crate::support::leased::{Answer, Leased, Taken};
use crate::support::stopwatch::Stopwatch;
use crate::support::{Peer, message, message_with, proxy, registered};

/// What a server does about one message of three, and the codes with which a message may be refused
/// all the same where a good server stands beside it.
const MISBEHAVIOUR: [(Answer, &[&str]); 14] = [
    (Answer::Ack, &[]),
    (Answer::AckTwice, &[]),
    (Answer::SwapWithNext, &[]),
    (Answer::Skip, &["timeout"]),
    (Answer::WrongHash, &[]),
    (Answer::OtherClient, &[]),
    (Answer::Late(Duration::from_millis(20)), &[]),
    (Answer::Refuse("failed"), &["failed"]),
    (Answer::Refuse("overloaded"), &[]),
    (Answer::InPieces, &[]),
    (Answer::HalfThenClose, &[]),
    (Answer::Nonsense, &[]),
    (Answer::CloseAtOnce, &[]),
    (Answer::TooLong, &["too-large"]),
];

/// How messages come: clients, all with one id, and for each the messages of a burst and the bursts.
#[derive(Clone, Copy)]
struct Shape {
    clients: usize,
    burst: usize,
    bursts: usize,
}

/// What clients saw.
#[derive(Debug, Default)]
struct Seen {
    acked: usize,
    refused: BTreeMap<String, usize>,
    /// What no client may see.
    wrong: Vec<String>,
}

impl Seen {
    fn add(&mut self, other: Seen) {
        self.acked += other.acked;
        for (code, count) in other.refused {
            *self.refused.entry(code).or_default() += count;
        }
        self.wrong.extend(other.wrong);
    }

    /// Takes the replies to a burst of messages with these payloads.
    fn take(&mut self, client: &mut Peer, payloads: &[String]) {
        for payload in payloads {
            let reply = client.packet();
            if reply["destid"] != 50 {
                self.wrong.push(format!("for {payload}, to another client: {reply}"));
            } else if reply["type"] == 3 || reply["type"] == "3" {
                *self.refused.entry(reply["code"].as_str().unwrap().to_owned()).or_default() += 1;
            } else if reply["payload"] != hash(payload) {
                self.wrong.push(format!("not the hash of {payload}: {reply}"));
            } else {
                self.acked += 1;
            }
        }
    }
}

impl Shape {
    /// Sends all messages, and takes the replies.
    fn run(self, proxy: u16, policy: &str, more: &str) -> Seen {
        let mut seen = Seen::default();
        thread::scope(|scope| {
            let client = |number| scope.spawn(move || self.client(proxy, policy, more, number));
            let clients: Vec<_> = (0..self.clients).map(client).collect();
            clients.into_iter().for_each(|client| seen.add(client.join().unwrap()));
        });
        seen
    }

    fn client(self, proxy: u16, policy: &str, more: &str, number: usize) -> Seen {
        let mut seen = Seen::default();
        let mut client = Peer::connect(proxy);
        for burst in 0..self.bursts {
            let payloads: Vec<_> =
                (0..self.burst).map(|at| format!("{at} of {burst} of {number}")).collect();
            let messages = payloads.iter().map(|payload| match more {
                "" => message("50", policy, payload),
                more => message_with("50", policy, payload, more),
            });
            client.send(messages.collect::<String>());
            seen.take(&mut client, &payloads);
        }
        client.half_close();
        let rest = client.line();
        if !rest.is_empty() {
            seen.wrong.push(format!("one reply too many: {rest}"));
        }
        seen
    }
}

/// Every misbehaviour, alone and beside a good server, for clients of this shape.
fn exactly_one_reply_each(shape: Shape) {
    let proxy = &proxy(&["-quiet", "-max-packet", "64K"]);
    let run = |place: usize, answer: Answer, codes: &[&str], is_alone: bool| {
        let policy = format!("case {place}{}", if is_alone { " alone" } else { "" });
        let script = move |taken: Taken| if taken.number % 3 == 1 { answer } else { Answer::Ack };
        let fake = Leased::start("1", &policy, proxy.1, script);
        let _good = (!is_alone).then(|| registered("2", &policy, proxy, &["-quiet"]));
        // Each message that is skipped may take all of its time.
        let (shape, more) = match answer {
            Answer::Skip => (Shape { bursts: shape.bursts.min(6), ..shape }, r#""timeout": 1"#),
            _ => (shape, ""),
        };
        let since = Stopwatch::start();
        let Seen { acked, refused, mut wrong } = shape.run(proxy.1, &policy, more);
        // On a machine that is late, each message may use its second up.
        if acked == 0 && since.lateness() < Duration::from_secs(1) {
            wrong.push(format!("nothing was acked: {refused:?}"));
        }
        if !is_alone && !refused.keys().all(|code| codes.contains(&code.as_str())) {
            wrong.push(format!("refused beside a good server: {refused:?}"));
        }
        if fake.taken().len() < 2 {
            wrong.push(format!("it was never sent a message that it misbehaves at: {refused:?}"));
        }
        let case = format!("{answer:?}, {}", if is_alone { "alone" } else { "beside a good one" });
        wrong.into_iter().map(|wrong| format!("{case}: {wrong}")).collect::<Vec<_>>()
    };
    let wrong: Vec<_> = thread::scope(|scope| {
        let cases = MISBEHAVIOUR.iter().enumerate().flat_map(|(place, &(answer, codes))| {
            [true, false].map(|is_alone| (place, answer, codes, is_alone))
        });
        let threads: Vec<_> = cases
            .map(|(place, answer, codes, is_alone)| {
                scope.spawn(move || run(place, answer, codes, is_alone))
            })
            .collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    });
    assert!(wrong.is_empty(), "{} wrong:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn a_client_with_one_message_at_a_time_gets_one_reply_to_each() {
    exactly_one_reply_each(Shape { clients: 1, burst: 1, bursts: 24 });
}

#[test]
fn eight_clients_of_one_id_get_one_reply_to_each_message() {
    exactly_one_reply_each(Shape { clients: 8, burst: 8, bursts: 4 });
}

#[test]
fn a_client_that_pipelines_gets_one_reply_to_each_message_in_order() {
    exactly_one_reply_each(Shape { clients: 1, burst: 8, bursts: 4 });
}

#[test]
fn acks_too_many_shift_nobodys_hash() {
    let proxy = proxy(&["-quiet"]);
    let script =
        |taken: Taken| if taken.number % 50 == 49 { Answer::AckTwice } else { Answer::Ack };
    let _fakes = ["alone", "beside"].map(|policy| Leased::start("1", policy, proxy.1, script));
    let _good = registered("2", "beside", &proxy, &["-quiet"]);
    for policy in ["alone", "beside"] {
        let (mut seen, end) = (Seen::default(), Instant::now() + Duration::from_secs(1));
        while Instant::now() < end {
            seen.add(Shape { clients: 8, burst: 8, bursts: 8 }.run(proxy.1, policy, ""));
        }
        assert!(seen.acked >= 500 && seen.wrong.is_empty(), "{policy}: {seen:#?}");
        assert!(policy == "alone" || seen.refused.is_empty(), "{policy}: {seen:#?}");
    }
}
