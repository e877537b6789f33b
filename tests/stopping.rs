//! A proxy that is told to stop takes no more, and sees what it has answered arrive.

use std::io::{BufRead, BufReader, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::mpsc::{Receiver, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::support::http::{Http, watched};
use crate::support::leased::{Answer, Leased};
use crate::support::stopwatch::Stopwatch;
use crate::support::{
    BOUND, Peer, Program, Signal, message, message_with, proxy, registered,
    wait_until_nobody_listens,
};

/// A client that sends many messages without waiting for their replies.
struct Pipeliner {
    stream: TcpStream,
    writer: JoinHandle<()>,
}

impl Pipeliner {
    /// Sends up to so many messages, and then ends its side if it `half_closes`.
    fn start(port: u16, count: usize, half_closes: bool) -> Self {
        let stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
        stream.set_read_timeout(Some(BOUND)).unwrap();
        let mut sending = stream.try_clone().unwrap();
        let writer = thread::spawn(move || {
            let many = message("50", "PP_1", "x").repeat(100);
            // It fails when the connection has ended.
            let is_whole = (0..count / 100).all(|_| sending.write_all(many.as_bytes()).is_ok());
            if half_closes && is_whole {
                sending.shutdown(Shutdown::Write).unwrap();
            }
        });
        Pipeliner { stream, writer }
    }

    /// Reads to the end, and closes. Returns how many acks and refusals came.
    fn read(self) -> [u64; 2] {
        let mut counts = [0; 2];
        for line in BufReader::new(&self.stream).lines() {
            let line = line.expect("the stream has a clean end");
            let reply: serde_json::Value = serde_json::from_str(&line).unwrap();
            counts[usize::from(reply["type"] == 3)] += 1;
        }
        // The proxy may have closed it by now.
        let _ = self.stream.shutdown(Shutdown::Both);
        self.writer.join().unwrap();
        counts
    }
}

/// The messages, acks and refusals that the proxy has counted.
fn counted(proxy: &Program) -> [u64; 3] {
    let said = proxy.warning("stopped after ");
    let numbers = said.split([' ', ':']).filter_map(|word| word.parse().ok());
    numbers.collect::<Vec<_>>().try_into().unwrap()
}

#[test]
fn all_replies_that_are_counted_arrive_however_late_they_are_read() {
    let mut proxy = proxy(&["-quiet", "-stop-timeout", "60"]);
    let _servers = ["1", "2"].map(|id| registered(id, "PP_1", &proxy, &["-quiet"]));
    let (read_late, late): (Vec<_>, Vec<Receiver<()>>) = (0..2).map(|_| channel()).unzip();
    let port = proxy.1;
    let read_at_once = thread::spawn(move || Pipeliner::start(port, usize::MAX, false).read());
    let half_closed = Pipeliner::start(port, 1000, true);
    let others = [Pipeliner::start(port, 100_000, false), half_closed];
    let others: Vec<_> = others
        .into_iter()
        .zip(late)
        .map(|(client, late)| {
            thread::spawn(move || {
                late.recv().unwrap();
                client.read()
            })
        })
        .collect();
    thread::sleep(Duration::from_millis(700));
    proxy.0.signal(Signal::TERM);
    let since = Stopwatch::start();
    thread::sleep(Duration::from_secs(1));
    read_late.iter().for_each(|read| read.send(()).unwrap());
    let all = others.into_iter().chain([read_at_once]).map(|client| client.join().unwrap());
    let all: Vec<_> = all.collect();
    let status = proxy.0.end();
    since.assert_within(Duration::from_secs(9));
    let [acks, refusals] = [0, 1].map(|kind| all.iter().map(|counts| counts[kind]).sum::<u64>());
    assert_eq!(counted(&proxy.0), [acks + refusals, acks, refusals], "{all:?}");
    assert!(all.iter().all(|[acks, refusals]| *acks > 0 && *refusals == 0), "{all:?}");
    assert_eq!(status.code(), Some(0));
}

#[test]
fn a_sender_that_never_stops_keeps_no_proxy_from_stopping() {
    let mut proxy = proxy(&["-quiet", "-stop-timeout", "2"]);
    let _server = registered("1", "PP_1", &proxy, &["-quiet"]);
    let client = Pipeliner::start(proxy.1, usize::MAX, false);
    let reading = client.stream.try_clone().unwrap();
    let mut reader = BufReader::new(&reading);
    let mut line = String::new();
    assert!(reader.read_line(&mut line).unwrap() > 0);
    let since = Stopwatch::start();
    proxy.0.signal(Signal::TERM);
    // It is not impressed by the end, and reset when the proxy's time is up.
    while reader.read_line(&mut line).is_ok_and(|read| read > 0) {}
    assert_eq!(proxy.0.end().code(), Some(1));
    since.assert_between(Duration::from_millis(1900)..Duration::from_secs(3));
    client.writer.join().unwrap();
}

#[test]
fn who_never_reads_is_cut_when_the_time_is_up_and_the_exit_code_says_so() {
    let mut proxy = proxy(&["-quiet", "-stop-timeout", "1"]);
    let _server = registered("1", "PP_1", &proxy, &["-quiet"]);
    let client = Pipeliner::start(proxy.1, 200_000, false);
    // It gets on with its messages until the proxy takes no more.
    let mut busy = Peer::connect(proxy.1);
    for _ in 0..100 {
        busy.send(message("51", "PP_1", "x"));
        assert_eq!(busy.packet()["type"], 2);
        thread::sleep(Duration::from_millis(5));
    }
    drop(busy);
    proxy.0.signal(Signal::TERM);
    let since = Stopwatch::start();
    assert_eq!(proxy.0.end().code(), Some(1));
    since.assert_within(Duration::from_secs(2));
    client.writer.join().unwrap();
}

#[test]
fn an_idle_client_that_does_not_close_is_left_after_five_seconds() {
    let mut proxy = proxy(&["-quiet"]);
    let _server = registered("1", "PP_1", &proxy, &["-quiet"]);
    let mut client = Peer::connect(proxy.1);
    client.send(message("50", "PP_1", "x"));
    assert_eq!(client.packet()["type"], 2);
    let since = Stopwatch::start();
    proxy.0.signal(Signal::TERM);
    assert_eq!(client.line(), "", "it sees the end at once");
    since.assert_within(Duration::from_secs(1));
    assert_eq!(proxy.0.end().code(), Some(0));
    since.assert_between(Duration::from_secs(3)..Duration::from_secs(7));
}

#[test]
fn servers_stay_until_the_last_message_has_ended() {
    let mut proxy = proxy(&["-quiet"]);
    let _server = registered("1", "PP_1", &proxy, &["-quiet"]);
    let hung = registered("2", "PP_1", &proxy, &["-quiet"]);
    hung.signal(Signal::STOP);
    let mut client = Peer::connect(proxy.1);
    client.send(message("50", "PP_1", "x").repeat(4));
    client.half_close();
    // Two are at the server that hangs, and go to the other when the lease of that one ends.
    assert_eq!(client.packet()["type"], 2);
    proxy.0.signal(Signal::TERM);
    for _ in 0..3 {
        assert_eq!(client.packet()["type"], 2);
    }
    assert_eq!(client.line(), "");
    assert_eq!(proxy.0.end().code(), Some(0));
    hung.signal(Signal::CONT);
}

#[test]
fn a_balancer_that_looks_at_its_health_sends_no_more_before_it_takes_no_more() {
    let mut watched = watched(&["-quiet", "-stop-delay", "2"]);
    let _server = registered("1", "PP_1", &watched.proxy, &["-quiet"]);
    let health = |port| Http::connect(port).get("/healthz");
    assert_eq!(health(watched.status).status, 200);
    let since = Stopwatch::start();
    watched.proxy.0.signal(Signal::TERM);
    while health(watched.status).status == 200 {
        assert!(since.elapsed() < BOUND, "it does not say that it stops");
    }
    // Who comes all the same is served as ever, and one after another.
    let mut late = Peer::connect(watched.proxy.1);
    for _ in 0..2 {
        late.send(message("50", "PP_1", "x"));
        assert_eq!(late.packet()["type"], 2);
    }
    since.assert_within(Duration::from_secs(2));
    wait_until_nobody_listens(watched.proxy.1);
    assert!(since.elapsed() >= Duration::from_secs(2), "{:?}", since.elapsed());
    assert_eq!(late.line(), "");
    drop(late);
    assert_eq!(watched.proxy.0.end().code(), Some(0));
}

#[test]
fn what_is_at_a_server_or_waits_for_a_place_is_refused_and_counted_when_the_time_is_up() {
    let mut proxy = proxy(&["-quiet", "-stop-timeout", "1"]);
    let [mut first, mut once, mut waiting, mut left] = [(); 4].map(|()| Peer::connect(proxy.1));
    let leaving = registered("2", "PP_2", &proxy, &["--", "sleep", "30"]);
    left.send(message("53", "PP_2", "x"));
    leaving.line("Received a message from client 53");
    leaving.signal(Signal::TERM);
    proxy.0.warning("server 2 of privacy policy PP_2");
    let server = Leased::with_capacity("1", "PP_1", proxy.1, 2, |_| Answer::Skip);
    // The refusal of the second stands behind that of the first.
    first.send(message("50", "PP_1", "x") + &message("50", "PP_9", "x"));
    server.wait_for(1);
    once.send(message_with("51", "PP_1", "x", "\"once\":true"));
    server.wait_for(2);
    waiting.send(message("52", "PP_1", "x"));
    proxy.0.signal(Signal::TERM);
    for (mut client, codes) in [
        (first, &["overloaded", "no-server"][..]),
        (once, &["outcome-unknown"]),
        (waiting, &["overloaded"]),
        (left, &["overloaded"]),
    ] {
        for code in codes {
            let refusal = client.packet();
            assert_eq!(refusal["code"], *code, "{refusal}");
        }
        assert_eq!(client.line(), "");
        // Those that close at once have lost their messages all the same.
        drop(client);
    }
    assert_eq!(proxy.0.end().code(), Some(1));
    assert_eq!(counted(&proxy.0), [5, 0, 5]);
}
