//! Several peers at the same time.

use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use super::{Case, Failure, Rank, Role, Verdict, check_field, check_hash, expect};
use crate::bench::{Bench, POLICY, START, answer_with_ack, message, wait_for};
use crate::fair;
use crate::peers::{Event, LOOK, ack_setup, setup};
use crate::program::lock;
use crate::sites::{ProxySite, ServerSite};
use crate::wire::Wire;

/// Peers at the same time.
const CROWD: usize = 8;

const SILENT: &str = "While one connection is read, nobody else is served: a peer that says nothing, or keeps its connection, stops the program. Look at what happens between one accept and the next.";

pub const CASES: &[Case] = &[
    Case {
        number: "3.1",
        title: "a server answers eight peers at once, each with its own hash",
        role: Role::Server,
        rank: Rank::Recommended,
        needs: &["1.6"],
        sent: "eight messages at the same time, each on a connection of its own",
        expected: "to each its own ack",
        script: |bench| {
            let site = ServerSite::start(bench)?;
            crowd(|payload| check_hash(&site.ask(&bench.message(payload))?, payload, &[]))
        },
        why: "What belongs to one connection must not be seen by another. Look at variables that all threads share, and at how many connections may wait (listen).",
    },
    Case {
        number: "3.2",
        title: "a silent connection keeps nobody waiting at a server",
        role: Role::Server,
        rank: Rank::Recommended,
        needs: &["1.3"],
        sent: "a connection on which nothing is sent; beside it a message on another",
        expected: "the message's ack, while the silent one is still there",
        script: |bench| {
            let site = ServerSite::start(bench)?;
            let _silent = site.connect()?;
            site.deliver("hello")
        },
        why: SILENT,
    },
    Case {
        number: "3.3",
        title: "eight clients run side by side",
        role: Role::Client,
        rank: Rank::Recommended,
        needs: &["1.10"],
        sent: "the client is started eight times at once",
        expected: "a message and an ack for each, and all end",
        script: side_by_side,
        why: "Look for something that only one of them can have, such as a local port or a file.",
    },
    Case {
        number: "3.4",
        title: "a proxy serves eight clients at once",
        role: Role::Proxy,
        rank: Rank::Required,
        needs: &["1.14"],
        sent: "eight messages at the same time, each on a connection of its own, for one server",
        expected: "to each client the ack for its own message",
        script: |bench| {
            let site = ProxySite::start(bench, &[("1", POLICY)])?;
            crowd(|payload| site.deliver(POLICY, payload))
        },
        why: "What belongs to one client must not be seen by another. Look at variables that all threads share, and at how many connections may wait (listen).",
    },
    Case {
        number: "3.5",
        title: "of eight messages at once, two servers get four each",
        role: Role::Proxy,
        rank: Rank::Recommended,
        needs: &["1.16", "3.4"],
        sent: "eight messages at the same time, with servers 1 and 2",
        expected: "four for each, in any order",
        script: |bench| {
            let site = ProxySite::start(bench, &[("1", POLICY), ("2", POLICY)])?;
            crowd(|payload| site.deliver(POLICY, payload))?;
            let order = site.order();
            let first = order.iter().filter(|id| **id == "1").count();
            expect((first, order.len()) == (4, 8), || format!("they went {}", order.join(" ")))
        },
        why: "Two threads that look at the same time see the same turn. Whose turn it is must be read and moved on in one step: look at what protects it.",
    },
    Case {
        number: "3.6",
        title: "a silent client keeps nobody waiting at a proxy",
        role: Role::Proxy,
        rank: Rank::Recommended,
        needs: &["1.14"],
        sent: "a connection on which nothing is sent; beside it a message on another",
        expected: "the message's ack, while the silent one is still there",
        script: |bench| {
            let site = ProxySite::start(bench, &[("1", POLICY)])?;
            let _silent = site.client()?;
            site.deliver(POLICY, "hello")
        },
        why: SILENT,
    },
    Case {
        number: "3.7",
        title: "a slow server keeps nobody waiting but its own client",
        role: Role::Proxy,
        rank: Rank::Recommended,
        needs: &["1.14"],
        sent: "a message for PP_1, whose server waits with its ack; then one for PP_2, whose server does not",
        expected: "the ack of the second while the first waits, and then that of the first",
        script: slow_and_quick,
        why: "While the proxy waits for one server, it should serve others. Look at what happens between one accept and the next, and at what is locked meanwhile.",
    },
    Case {
        number: "3.8",
        title: "a server that keeps its setup connection keeps nobody waiting",
        role: Role::Proxy,
        rank: Rank::Recommended,
        needs: &["1.14"],
        sent: "a server's setup packet on a connection that stays open; then a message",
        expected: "the message's ack",
        script: |bench| {
            let site = ProxySite::start(bench, &[])?;
            let port = site.play("1", answer_with_ack)?;
            let mut kept = Wire::connect(site.port, "a server", &bench.clock)?;
            kept.send(setup(&bench.dialect, "1", POLICY, port))?;
            // The homework has no answer to it that could be waited for.
            fair::sleep(Duration::from_millis(300));
            site.deliver(POLICY, "hello")
        },
        why: SILENT,
    },
];

/// Calls `deliver` with eight texts at the same time.
fn crowd(deliver: impl Fn(&str) -> Verdict + Sync) -> Verdict {
    let deliver = &deliver;
    let failures: Vec<_> = thread::scope(|scope| {
        let start = |nth| scope.spawn(move || deliver(&format!("message {nth} of {CROWD}")));
        let threads: Vec<_> = (1..=CROWD).map(start).collect();
        let join = |thread: thread::ScopedJoinHandle<'_, Verdict>| {
            thread.join().unwrap_or_else(|_| Err(Failure::ours("a client's script failed"))).err()
        };
        threads.into_iter().filter_map(join).collect()
    });
    let count = failures.len();
    match failures.into_iter().next() {
        None => Ok(()),
        Some(failure) => Err(failure.when(&format!("for {count} of {CROWD}, the first of them"))),
    }
}

fn side_by_side(bench: &Bench) -> Verdict {
    let proxy = bench.play_proxy(ack_setup, answer_with_ack)?;
    let texts: Vec<_> = (1..=CROWD).map(|nth| format!("message {nth} of {CROWD}")).collect();
    let start = |text: &String| bench.start_client(proxy.port, &bench.message(text));
    let programs = texts.iter().map(start).collect::<Result<Vec<_>, _>>()?;
    let came = Mutex::new(Vec::new());
    let all_came = || {
        lock(&came).extend(lock(&proxy.events).try_iter().filter_map(Event::packet));
        lock(&came).len() >= CROWD
    };
    let all_ended = || programs.iter().all(|program| program.ended().is_some());
    wait_for(bench.clock.start_end(START), || all_came() || all_ended());
    bench.clock.renew();
    // What they sent last may still be on its way.
    wait_for(fair::now() + Duration::from_millis(300), all_came);
    let came = lock(&came);
    for text in &texts {
        let is_its = |packet: &&serde_json::Value| check_field(packet, "payload", text).is_ok();
        expect(came.iter().any(|packet| is_its(&packet)), || format!("no packet with {text:?}"))?;
    }
    let running = programs.iter().filter(|program| program.wait(bench.clock.end()).is_none());
    match running.count() {
        0 => Ok(()),
        running => Err(Failure::came(format!("{running} of them do not end"))),
    }
}

fn slow_and_quick(bench: &Bench) -> Verdict {
    let site = ProxySite::start(bench, &[("2", "PP_2")])?;
    let (open, gate) = channel::<()>();
    let gate = Arc::new(Mutex::new(gate));
    let limit = bench.clock.limit();
    site.add_with("1", POLICY, move |wire, _, ack| {
        // Opened by the quick one's ack; the end of the case opens it, too.
        let end = fair::now() + 2 * limit;
        let gate = lock(&gate);
        while gate.recv_timeout(LOOK) == Err(RecvTimeoutError::Timeout) && fair::now() < end {}
        wire.send(ack)
    })?;
    let mut slow = site.client()?;
    slow.send(message(&bench.dialect, POLICY, "slow"))?;
    let came = wait_for(bench.clock.end(), || !site.received().is_empty());
    expect(came, || "nothing: the first message does not reach its server".to_owned())?;
    let quick = site.deliver("PP_2", "quick");
    drop(open);
    quick.map_err(|failure| failure.when("for the quick one, while the slow one waits"))?;
    check_hash(&slow.packet()?, "slow", &[]).map_err(|failure| failure.when("for the slow one"))
}
