//! Servers that are not ours.

use std::thread;
use std::time::{Duration, Instant};

use super::{Outcome, PAUSE, POLICY, Run};
use crate::support::fake::{Fake, Manner};
use crate::support::leased::{Answer, Leased, Taken};
use crate::support::load::{Account, Load};
use crate::support::{Peer, message, registered};

/// Each with the codes that are right where nobody else serves the policy; none where it is acked.
const MISBEHAVIOUR: [(Manner, &[&str]); 7] = [
    (Manner::Silent, &["timeout"]),
    (Manner::HalfAck, &["timeout"]),
    (Manner::HalfAckThenCloses, &["bad-ack"]),
    (Manner::Nonsense, &["bad-ack"]),
    (Manner::OtherClient, &["bad-ack"]),
    (Manner::ClosesAfterEach, &[]),
    (Manner::ClosesAtOnce, &["unreachable"]),
];

/// Clients at servers that let ten wait.
const CROWD: usize = 64;

/// Servers that misbehave: each alone, and each beside a good one.
pub fn misbehave(run: &Run) -> Outcome {
    let mut outcome = Outcome::default();
    let proxy = run.proxy(0);
    let cases: Vec<_> = MISBEHAVIOUR
        .into_iter()
        .flat_map(|(manner, codes)| [(manner, codes, true), (manner, codes, false)])
        // One that keeps its lease and does not answer has its messages until their time is up.
        .filter(|&(manner, _, leased)| {
            !leased || !matches!(manner, Manner::Silent | Manner::HalfAck)
        })
        .enumerate()
        .collect();
    let limit = run.reply_timeout + Duration::from_secs(1) + run.slack;
    let port = proxy.1;
    thread::scope(|scope| {
        let alone = |number, (manner, _, leased)| {
            scope.spawn(move || alone(port, &format!("alone {number}"), manner, leased))
        };
        let threads: Vec<_> = cases.iter().map(|&(number, case)| alone(number, case)).collect();
        for (thread, &(_, (manner, codes, leased))) in threads.into_iter().zip(&cases) {
            let (answer, took) = thread.join().unwrap();
            let is_right = codes.contains(&answer.as_str()) || codes.is_empty() && answer == "ack";
            let lease = if leased { "with" } else { "without" };
            outcome.expect(is_right && took <= limit, || {
                format!("{manner:?} {lease} a lease, alone: {answer} after {took:?}, not {codes:?}")
            });
            outcome.account.sent += 1;
            match answer.as_str() {
                "ack" => outcome.account.acked += 1,
                _ => *outcome.account.refused.entry(answer).or_default() += 1,
            }
        }
    });
    let pairs: Vec<_> = cases
        .iter()
        .map(|&(number, (manner, _, leased))| {
            let policy = format!("beside {number}");
            let bad = fake(&policy, port, manner, leased);
            let good = registered("2", &policy, &proxy, &["-quiet"]);
            let load = Load::start(port, &policy, run.clients.div_ceil(4), 5 * PAUSE);
            (format!("{manner:?}"), load, bad, good)
        })
        .collect();
    thread::sleep(run.length);
    for (name, load, ..) in pairs {
        let account: Account = load.finish();
        let complaints = account.complaints();
        outcome.broken.extend(complaints.iter().map(|said| format!("beside {name}: {said}")));
        let longest = account.longest;
        outcome.expect(longest <= limit, || format!("beside {name} a message waited {longest:?}"));
        outcome.account.add(account);
    }
    outcome.stop(proxy.0);
    outcome
}

fn fake(policy: &str, proxy: u16, manner: Manner, leased: bool) -> Fake {
    let start = if leased { Fake::leased } else { Fake::unleased };
    start("1", policy, proxy, manner)
}

/// What a message gets that only such a server could serve, and how soon.
fn alone(proxy: u16, policy: &str, manner: Manner, leased: bool) -> (String, Duration) {
    let _fake = fake(policy, proxy, manner, leased);
    let mut client = Peer::connect(proxy);
    let begun = Instant::now();
    client.send(message("50", policy, "x"));
    let answer = client.packet();
    let took = begun.elapsed();
    (answer["code"].as_str().unwrap_or("ack").to_owned(), took)
}

/// A server that acks one message in a hundred twice, beside a good one.
pub fn surplus(run: &Run) -> Outcome {
    let mut outcome = Outcome::default();
    let proxy = run.proxy(0);
    let script =
        |taken: Taken| if taken.number % 100 == 99 { Answer::AckTwice } else { Answer::Ack };
    let _fake = Leased::start("1", POLICY, proxy.1, script);
    let _good = registered("2", POLICY, &proxy, &["-quiet"]);
    let load = run.load(proxy.1);
    thread::sleep(run.length);
    outcome.expect_all_acked(load.finish(), Duration::from_secs(1) + run.slack);
    outcome.stop(proxy.0);
    outcome
}

/// Two servers as the homework has them, and more clients than either lets wait.
pub fn homework(run: &Run) -> Outcome {
    let mut outcome = Outcome::default();
    let proxy = run.proxy(0);
    let _servers =
        ["1", "2"].map(|id| Fake::unleased(id, POLICY, proxy.1, Manner::ClosesAfterEach));
    let load = Load::start(proxy.1, POLICY, CROWD, PAUSE);
    thread::sleep(run.length);
    // A connection too many is not refused, but left without an answer.
    let set_aside = proxy.0.err().into_iter().find(|line| line.contains("is set aside"));
    outcome.expect(set_aside.is_none(), || format!("a server was crowded: {set_aside:?}"));
    outcome.expect_all_acked(load.finish(), run.reply_timeout + run.slack);
    outcome.stop(proxy.0);
    outcome
}
