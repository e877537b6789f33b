//! A server's registration lasts as long as its lease, and comes back by itself.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use rustix::net::sockopt;

use crate::support::fake::{Fake, Manner};
use crate::support::leased::{Answer, Leased};
use crate::support::peers::{SerialProxy, tutorial_client};
use crate::support::stopwatch::Stopwatch;
use crate::support::{
    BOUND, Peer, Program, Signal, client, fixed_port, message, proxy, proxy_on, registered, server,
    wait_until_nobody_listens,
};

/// What one message of policy `PP_1` is answered with.
fn answer(proxy: u16) -> serde_json::Value {
    let mut peer = Peer::connect(proxy);
    peer.send(message("50", "PP_1", "x"));
    peer.packet()
}

/// A proxy by hand, which sees setup packets and answers as it is told.
struct Homework {
    listener: TcpListener,
    port: u16,
}

impl Homework {
    fn new() -> Self {
        // Another test run may be quicker with a port that was free.
        let bind = |_| TcpListener::bind(("127.0.0.1", fixed_port())).ok();
        let listener = (0..100).find_map(bind).unwrap();
        let port = listener.local_addr().unwrap().port();
        // A test that waits for a server which never comes is to fail.
        sockopt::set_socket_timeout(&listener, sockopt::Timeout::Recv, Some(BOUND)).unwrap();
        Homework { listener, port }
    }

    /// Waits for a setup packet that asks for this lease, and gives its connection and when it came.
    fn setup(&self, lease: u64) -> (BufReader<TcpStream>, Instant) {
        let (stream, _) = self.listener.accept().unwrap();
        stream.set_read_timeout(Some(BOUND)).unwrap();
        let mut stream = BufReader::new(stream);
        let setup = packet(&mut stream);
        assert_eq!((&setup["type"], &setup["lease"]), (&1.into(), &lease.into()), "{setup}");
        assert_eq!((&setup["privPolyId"], &setup["privPoliId"]), (&"PP_1".into(), &"PP_1".into()));
        (stream, Instant::now())
    }

    /// Waits for a server's introduction, which it ends at once, and answers it as told.
    fn introduction(&self, answer: &str) {
        let (mut stream, _) = self.setup(0);
        assert_ended(&mut stream);
        stream.get_mut().write_all(answer.as_bytes()).unwrap();
    }
}

fn packet(stream: &mut BufReader<TcpStream>) -> serde_json::Value {
    let mut line = String::new();
    stream.read_line(&mut line).unwrap();
    serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line:?}"))
}

/// Waits until the peer has ended its sending side.
fn assert_ended(stream: &mut BufReader<TcpStream>) {
    assert_eq!(stream.read_line(&mut String::new()).unwrap(), 0, "it should end it");
}

/// The ack of a setup packet, with more fields.
fn ack(more: &str) -> String {
    format!(
        "{{\"type\":2,\"srcid\":0,\"destid\":1,\"payloadsize\":10,\"payload\":\"registered\"{more}}}\n"
    )
}

/// That of a proxy of ours.
fn granted(seconds: u64) -> String {
    ack(&format!(",\"lease\":{seconds}"))
}

fn assert_serves(server_port: u16) {
    let mut peer = Peer::connect(server_port);
    peer.send(message("50", "PP_1", "x"));
    assert_eq!(peer.packet()["payload"], "11f6ad8ec52a2984abaafd7c3b516503785c2072");
}

#[test]
fn a_killed_server_is_out_of_the_table_at_once() {
    let proxy = proxy(&[]);
    let mut server = registered("1", "PP_1", &proxy, &[]);
    assert_eq!(answer(proxy.1)["type"], 2);
    server.kill();
    proxy.0.warning("has left: its connection was closed");
    assert_eq!(answer(proxy.1)["code"], "no-server");
}

/// Asks for a lease, and gives the one that is granted, both in seconds.
fn ask_for_lease(setup: &mut Peer, seconds: u64) -> serde_json::Value {
    setup.send(format!(
        r#"{{"type":1,"id":1,"privPolyId":"PP_1","listenport":1,"lease":{seconds}}}"#
    ));
    setup.packet()["lease"].clone()
}

#[test]
fn a_lease_is_a_second_at_least_and_a_minute_at_most() {
    let proxy = proxy(&[]);
    let mut setup = Peer::connect(proxy.1);
    for (asked, granted) in [(1, 1), (3, 3), (60, 60), (61, 60), (u64::MAX, 60)] {
        assert_eq!(ask_for_lease(&mut setup, asked), granted, "{asked}");
    }
}

#[test]
fn an_introduction_is_answered_with_the_longest_lease_and_registers_nothing() {
    let proxy = proxy(&[]);
    let mut setup = Peer::connect(proxy.1);
    assert_eq!(ask_for_lease(&mut setup, 0), 60);
    assert_eq!(answer(proxy.1)["code"], "no-server");
    setup.half_close();
    assert_eq!(setup.line(), "");
    // It was said by now if it ever is: lines leave in the order in which things happen.
    proxy.0.warning("refused the message of client 50");
    let lines = [proxy.0.out(), proxy.0.err()].concat();
    let is_about_it = |line: &String| line.contains("server id") || line.contains("has left");
    assert!(!lines.iter().any(is_about_it), "{lines:?}");
}

#[test]
fn a_lease_that_is_not_renewed_runs_out_though_its_connection_stays_open() {
    let proxy = proxy(&[]);
    let mut setup = Peer::connect(proxy.1);
    let since = Instant::now();
    assert_eq!(ask_for_lease(&mut setup, 1), 1);
    proxy.0.warning("has left: its lease was not renewed");
    assert!(since.elapsed() >= Duration::from_secs(1), "{:?}", since.elapsed());
    assert_eq!(answer(proxy.1)["code"], "no-server");
}

#[test]
fn a_lease_ends_with_its_connection_however_early_that_is() {
    let proxy = proxy(&[]);
    for id in 1..=40 {
        let mut setup = Peer::connect(proxy.1);
        setup.send(format!(
            r#"{{"type":1,"id":{id},"privPolyId":"PP_1","listenport":1,"lease":8}}"#
        ));
        if id > 20 {
            // Its end comes when it is registered.
            setup.packet();
        }
    }
    // A message waits 2 s for a server that comes back, and the leases are for 8.
    let end = Instant::now() + Duration::from_secs(6);
    while answer(proxy.1)["code"] != "no-server" {
        assert!(Instant::now() < end, "somebody is still registered");
    }
}

/// Whatever else comes on its connection, a lease of 1 s ends when it is not renewed.
fn assert_runs_out(proxy: &(Program, u16), rest: impl AsRef<[u8]>) {
    let mut setup = Peer::connect(proxy.1);
    let since = Stopwatch::start();
    assert_eq!(ask_for_lease(&mut setup, 1), 1);
    setup.send(rest);
    proxy.0.warning("has left: its lease was not renewed");
    since.assert_between(Duration::from_millis(990)..Duration::from_millis(1700));
}

#[test]
fn a_lease_runs_out_though_its_connection_waits_for_replies() {
    let proxy = proxy(&["-quiet"]);
    let _silent = Fake::leased("1", "silent", proxy.1, Manner::Silent);
    // So many that no more are read.
    assert_runs_out(&proxy, message("50", "silent", "x").repeat(500));
}

#[test]
fn a_lease_runs_out_in_the_midst_of_a_packet() {
    let proxy = proxy(&[]);
    assert_runs_out(&proxy, r#"{"type":1,"#);
}

#[test]
fn a_proxy_that_stood_still_loses_no_servers_that_renewed_their_leases_meanwhile() {
    let proxy = proxy(&["-quiet"]);
    // Many, since any of them may be quicker than what ends its lease.
    let ids = ["1", "2", "3", "4", "5", "6", "7", "8", "9", "10", "11", "12"];
    let _servers = ids.map(|id| Leased::start(id, "PP_1", proxy.1, |_| Answer::Ack));
    proxy.0.stand_still();
    // Longer than the lease. A renewal comes meanwhile.
    std::thread::sleep(Duration::from_secs(5));
    proxy.0.signal(Signal::CONT);
    let end = Instant::now() + Duration::from_secs(1);
    while Instant::now() < end {
        assert_eq!(answer(proxy.1)["type"], 2);
    }
    assert!(!proxy.0.err().iter().any(|line| line.contains("has left")), "{:?}", proxy.0.err());
}

#[test]
fn a_lease_whose_connection_has_ended_before_it_is_granted_registers_nothing() {
    let proxy = proxy(&[]);
    let mut setup = Peer::connect(proxy.1);
    proxy.0.stand_still();
    setup.send(r#"{"type":1,"id":1,"privPolyId":"PP_1","listenport":1,"lease":60}"#);
    setup.half_close();
    proxy.0.signal(Signal::CONT);
    while !setup.line().is_empty() {}
    assert_eq!(answer(proxy.1)["code"], "no-server");
    proxy.0.warning("refused the message of client 50");
    assert!(!proxy.0.out().iter().any(|line| line.contains("setup")), "{:?}", proxy.0.out());
}

#[test]
fn a_second_server_of_the_same_id_is_refused_until_the_first_is_gone() {
    let proxy = proxy(&[]);
    let mut first = registered("1", "PP_1", &proxy, &[]);
    let (mut second, _) = server("1", "PP_1", proxy.1, &[]);
    assert_eq!(second.end().code(), Some(1));
    let warnings = second.err().join("\n");
    assert!(warnings.contains("id-in-use") && warnings.contains("is running at"), "{warnings}");
    assert_eq!(answer(proxy.1)["type"], 2);

    first.kill();
    let _second = registered("1", "PP_1", &proxy, &[]);
    assert_eq!(answer(proxy.1)["type"], 2);
}

#[test]
fn the_successor_of_a_killed_server_is_not_refused_though_it_comes_at_once() {
    let proxy = proxy(&[]);
    let mut one = registered("1", "PP_1", &proxy, &[]);
    for _ in 0..5 {
        // The proxy sees the end of the one and the beginning of the other at the same moment.
        proxy.0.stand_still();
        one.kill();
        let (next, port) = server("1", "PP_1", proxy.1, &[]);
        proxy.0.signal(Signal::CONT);
        proxy.0.line(&format!(
            "Receiving setup message from server id 1 privacy policy PP_1 port {port}"
        ));
        one = next;
    }
}

#[test]
fn a_server_told_to_stop_leaves_the_table_before_it_stops() {
    let proxy = proxy(&[]);
    let mut one = registered("1", "PP_1", &proxy, &[]);
    // The proxy keeps a connection to it.
    assert_eq!(answer(proxy.1)["type"], 2);
    one.signal(Signal::TERM);
    assert_eq!(one.end().code(), Some(0));
    assert!(one.complaints().is_empty(), "it had to wait for the proxy: {:?}", one.err());
    // It waited for the proxy to see it leave, so nobody is sent there any more.
    assert_eq!(answer(proxy.1)["code"], "no-server");
}

#[test]
fn servers_are_back_within_two_seconds_of_the_proxys_return() {
    let port = fixed_port();
    let mut first = proxy_on(port, &[]);
    let servers = ["1", "2", "3"].map(|id| registered(id, "PP_1", &first, &[]));
    first.0.kill();
    // It is away for long enough for the pauses to have grown.
    servers.iter().for_each(|server| drop(server.warning("could not connect")));
    std::thread::sleep(Duration::from_secs(2));
    let second = proxy_on(port, &[]);
    let since = Stopwatch::start();
    for id in ["1", "2", "3"] {
        second.0.line(&format!("Receiving setup message from server id {id} "));
    }
    since.assert_within(Duration::from_secs(2));
    assert_eq!(answer(port)["type"], 2);
    let back =
        format!("server: registered again with the reverse proxy at 127.0.0.1:{port}, lease 3 s");
    for server in &servers {
        server.warning(&back);
        let err = server.err();
        assert_eq!(err.last(), Some(&back));
        assert!(err.len() <= 4, "each thing is told once: {err:?}");
    }
}

#[test]
fn a_server_says_when_it_is_registered_and_when_it_is_back_and_that_it_has_stopped() {
    let port = fixed_port();
    let (mut server, _) = server("1", "PP_1", port, &[]);
    server.warning("could not connect");
    for again in ["", "again "] {
        let mut proxy = proxy_on(port, &[]);
        let expected = format!(
            "server: registered {again}with the reverse proxy at 127.0.0.1:{port}, lease 3 s"
        );
        assert_eq!(server.warning(&format!("registered {again}with")), expected);
        let said = server.err().len();
        proxy.0.kill();
        server.wait("that it has no proxy", |_, err| {
            err[said..].iter().any(|line| line.contains("could not connect")).then_some(())
        });
        let without = server.err().split_off(said);
        assert!(!without.iter().any(|line| line.contains("registered")), "{without:#?}");
    }
    server.signal(Signal::TERM);
    assert!(server.end().success());
    assert_eq!(server.err().last().unwrap(), "server: stopped");
}

#[test]
fn pauses_between_attempts_grow_to_a_second_and_differ_between_servers() {
    // A proxy that grants a lease once is one of ours, whatever happens to it afterwards.
    let pauses = |id| {
        let proxy = Homework::new();
        let (server, _) = server(id, "PP_1", proxy.port, &[]);
        proxy.introduction(&granted(60));
        let (mut held, _) = proxy.setup(3);
        held.get_mut().write_all(granted(3).as_bytes()).unwrap();
        drop(held);
        let times: Vec<_> = (0..7).map(|_| proxy.setup(3).1).collect();
        server.warning("lost the reverse proxy");
        assert_eq!(server.complaints().len(), 1, "it is told once: {:?}", server.err());
        times.windows(2).map(|pair| pair[1] - pair[0]).collect::<Vec<_>>()
    };
    let watch = Stopwatch::start();
    let (one, other) = std::thread::scope(|scope| {
        let other = scope.spawn(|| pauses("2"));
        (pauses("1"), other.join().unwrap())
    });
    for pauses in [&one, &other] {
        // Between half of it and the whole, and later still on a busy machine.
        assert!(pauses[0] < pauses[5] && pauses[5] > Duration::from_millis(500), "{pauses:?}");
        watch.assert_took(*pauses.iter().max().unwrap(), Duration::from_secs(3), pauses);
    }
    let differ = one.iter().zip(&other).any(|(a, b)| a.abs_diff(*b) > Duration::from_millis(10));
    assert!(differ, "{one:?} {other:?}");
}

#[test]
fn a_proxy_that_ends_each_lease_at_once_is_asked_and_spoken_of_like_one_that_is_away() {
    let proxy = Homework::new();
    let (server, _) = server("1", "PP_1", proxy.port, &[]);
    proxy.introduction(&granted(60));
    let grant = || {
        let (mut held, at) = proxy.setup(3);
        held.get_mut().write_all(granted(3).as_bytes()).unwrap();
        (held, at)
    };
    let times: Vec<_> = (0..8).map(|_| grant().1).collect();
    let pauses: Vec<_> = times.windows(2).map(|pair| pair[1] - pair[0]).collect();
    assert!(pauses[6] > Duration::from_millis(500), "they grow: {pauses:?}");
    // One that lasts is said when it is renewed, and its loss again, at which pauses begin anew.
    let (mut held, _) = grant();
    packet(&mut held);
    let at = format!("with the reverse proxy at 127.0.0.1:{}", proxy.port);
    let [first, again] =
        ["", "again "].map(|again| format!("server: registered {again}{at}, lease 3 s"));
    let lost = server.warning("lost the reverse proxy");
    assert_eq!(server.err(), [&*first, &lost]);
    held.get_mut().write_all(granted(3).as_bytes()).unwrap();
    server.warning(&again);
    drop(held);
    let since = Stopwatch::start();
    grant();
    since.assert_within(Duration::from_millis(500));
    drop(proxy);
    server.warning("could not connect");
    assert_eq!(server.err()[..5], [&*first, &lost, &again, &lost, &again], "{:#?}", server.err());
}

#[test]
fn a_lease_is_renewed_each_second_and_held_on_one_connection() {
    let proxy = Homework::new();
    let (_server, _) = server("1", "PP_1", proxy.port, &[]);
    let since = Stopwatch::start();
    proxy.introduction(&granted(60));
    let (mut held, mut before) = proxy.setup(3);
    for renewals in 1..=3 {
        held.get_mut().write_all(granted(3).as_bytes()).unwrap();
        assert_eq!(packet(&mut held)["lease"], 3);
        // Since the first setup packet: each may be read late.
        let soonest = renewals * Duration::from_millis(900);
        assert!(since.elapsed() > soonest, "{renewals} renewals after {:?}", since.elapsed());
        let now = Instant::now();
        since.assert_took(now - before, Duration::from_secs(3), "a pause");
        before = now;
    }
}

#[test]
fn a_serial_proxy_that_answers_nothing_has_the_registration_and_is_not_held_up() {
    let proxy = SerialProxy::start("");
    let since = Stopwatch::start();
    let servers = ["1", "2"].map(|id| {
        let (server, _) = server(id, "PP_1", proxy.port, &[]);
        assert_eq!(proxy.next_registered(), id);
        server
    });
    for id in [1, 2] {
        assert_eq!(tutorial_client(proxy.port, "PP_1", "x")["srcid"], id);
    }
    // Far less than the time for which the servers would wait for an answer.
    since.assert_within(Duration::from_secs(3));
    for server in servers {
        let said = server.warning("closed the connection without an answer");
        assert!(said.contains("without a lease") && said.contains("-strings"), "{said}");
    }
}

#[test]
fn a_proxy_that_answers_anything_but_a_lease_is_let_go_of() {
    let said = [
        (ack(""), "registered with the reverse proxy at 127.0.0.1:"),
        (ack(",\"lease\":0"), ", which grants no lease"),
        ("{\"Error\": \"\u{9b}2Jkey\"}".to_owned(), "but with {\"Error\": \"\\u{9b}2Jkey\"}"),
        ("[]".to_owned(), "but with []"),
    ];
    for (answer, said) in said {
        let proxy = Homework::new();
        let (mut server, port) = server("1", "PP_1", proxy.port, &[]);
        proxy.introduction(&answer);
        server.warning(said);
        assert_serves(port);
        server.signal(Signal::TERM);
        assert!(server.end().success());
        assert_eq!(server.err().len(), 2, "that, and that it stopped: {:?}", server.err());
    }
}

#[test]
fn a_proxy_that_is_silent_is_let_go_of_until_it_answers() {
    let proxy = Homework::new();
    let since = Instant::now();
    let (server, port) = server("1", "PP_1", proxy.port, &[]);
    let (mut introduction, _) = proxy.setup(0);
    assert_ended(&mut introduction);
    let said = server.warning("did not answer within 5 s");
    assert!(said.contains("without a lease") && said.contains("-strings"), "{said}");
    assert!(since.elapsed() > Duration::from_secs(5), "{:?}", since.elapsed());
    assert_serves(port);
    introduction.get_mut().write_all(granted(60).as_bytes()).unwrap();
    server.warning("has answered: it grants leases");
    proxy.setup(3);
}

#[test]
fn what_speaks_no_json_is_told_and_tried_again() {
    let proxy = Homework::new();
    let (server, _) = server("1", "PP_1", proxy.port, &[]);
    for _ in 0..3 {
        proxy.introduction("HTTP/1.1 400 Bad\u{9b}Request\r\nServer: x\r\n\r\n");
    }
    server.warning(
        "is no reverse proxy: it says \"HTTP/1.1 400 Bad\\u{9b}Request\" (is that the port of its \
         -status page?); trying again",
    );
    proxy.introduction(&granted(60));
    let _held = proxy.setup(3);
    assert_eq!(server.complaints().len(), 1, "it is told once: {:?}", server.err());
}

#[test]
fn a_proxy_that_stands_still_while_its_server_starts_grants_it_a_lease_later() {
    let proxy = proxy(&[]);
    proxy.0.signal(Signal::STOP);
    let (mut server, port) = server("1", "PP_1", proxy.1, &[]);
    server.warning("did not answer within 5 s");
    proxy.0.signal(Signal::CONT);
    proxy.0.line(&format!("server id 1 privacy policy PP_1 port {port}"));
    assert_eq!(answer(proxy.1)["type"], 2);
    server.kill();
    proxy.0.warning("has left: its connection was closed");
}

#[test]
fn a_proxy_that_granted_a_lease_and_stands_still_is_asked_for_one_again_and_again() {
    let proxy = Homework::new();
    let (server, _) = server("1", "PP_1", proxy.port, &[]);
    proxy.introduction(&granted(60));
    let (mut held, _) = proxy.setup(3);
    let since = Stopwatch::start();
    held.get_mut().write_all(granted(3).as_bytes()).unwrap();
    packet(&mut held);
    // It is renewed after 1 s, and lapses 3 s later.
    let (silent, _) = proxy.setup(3);
    since.assert_between(Duration::from_millis(3900)..Duration::from_secs(7));
    // The next one is given 5 s.
    let (mut third, _) = proxy.setup(3);
    assert!(since.elapsed() > Duration::from_millis(8900), "{:?}", since.elapsed());
    third.get_mut().write_all(granted(3).as_bytes()).unwrap();
    assert_eq!(packet(&mut third)["lease"], 3);
    drop((held, silent));
    assert!(server.complaints().iter().all(|line| line.contains("lost the reverse proxy")));
}

#[test]
fn with_strings_a_server_registers_as_the_tutorials_does() {
    let proxy = Homework::new();
    let (mut server, port) = server("1", "PP_1", proxy.port, &["-strings"]);
    let (stream, _) = proxy.listener.accept().unwrap();
    let mut stream = BufReader::new(stream);
    let setup = packet(&mut stream);
    let expected = serde_json::json!({
        "type": "1", "id": "1", "privPolyId": "PP_1", "privPoliId": "PP_1",
        "listenport": port.to_string(),
    });
    assert_eq!(setup, expected);
    assert_ended(&mut stream);
    assert_serves(port);
    server.signal(Signal::TERM);
    assert!(server.end().success());
    let sent = format!(
        "server: sent the setup packet to the reverse proxy at 127.0.0.1:{}; with -strings no answer is \
         waited for",
        proxy.port
    );
    assert_eq!(server.err(), [sent.as_str(), "server: stopped"]);
}

#[test]
fn a_server_told_to_stop_answers_until_its_proxy_has_ended_its_connections() {
    let proxy = Homework::new();
    let (mut server, port) = server("1", "PP_1", proxy.port, &[]);
    proxy.introduction(&granted(60));
    let (mut held, _) = proxy.setup(3);
    held.get_mut().write_all(granted(60).as_bytes()).unwrap();
    let mut kept = Peer::connect(port);
    kept.send(message("50", "PP_1", "x"));
    assert_eq!(kept.packet()["type"], 2);

    server.signal(Signal::TERM);
    // A renewal may have been on its way.
    while held.read_line(&mut String::new()).unwrap() > 0 {}
    assert_serves(port);
    drop(held);
    wait_until_nobody_listens(port);
    // The proxy had chosen this server before it saw it leave.
    kept.send(message("50", "PP_1", "x"));
    assert_eq!(kept.packet()["type"], 2);
    server.warning("connections still open: 1;");
    kept.send(message("50", "PP_1", "y"));
    assert_eq!(kept.packet()["type"], 2);
    drop(kept);
    let since = Stopwatch::start();
    assert!(server.end().success());
    since.assert_within(Duration::from_secs(4));
}

#[test]
fn a_proxy_that_breaks_the_connection_before_its_answer_is_tried_again() {
    let proxy = Homework::new();
    let (_server, _) = server("1", "PP_1", proxy.port, &[]);
    // With the packet unread, the end of the connection is a reset, as it is when a proxy dies.
    let (stream, _) = proxy.listener.accept().unwrap();
    let unread = stream.peek(&mut [0]).unwrap();
    assert_eq!(unread, 1);
    drop(stream);
    proxy.setup(0);
}

#[test]
fn a_server_keeps_the_leases_of_several_proxies_apart() {
    let (mut a, b) = (proxy(&[]), proxy(&[]));
    let other = b.1.to_string();
    let _server = registered("1", "PP_1", &a, &["-revproc", &other]);
    b.0.line("Receiving setup message from server id 1 ");
    assert_eq!((&answer(a.1)["type"], &answer(b.1)["type"]), (&2.into(), &2.into()));
    a.0.kill();
    assert_eq!(answer(b.1)["type"], 2);
}

#[test]
fn a_client_takes_the_first_proxy_that_answers() {
    let (a, b) = (fixed_port(), proxy(&[]));
    let _server = registered("1", "PP_1", &b, &[]);
    let other = b.1.to_string();
    let (status, out, _) = client(a, &["packets/hello.json"], &["-revproc", &other]);
    assert!(status.success(), "{out:?}");
    b.0.line("Received a data message from client 50 ");
}

#[test]
fn a_waiting_client_delivers_when_the_proxy_and_its_server_have_come() {
    let port = fixed_port();
    let arguments = ["-id", "50", "-revproc", &port.to_string(), "-wait", "15", "-pkt"];
    let mut client = Program::start("client", &[&arguments[..], &["packets/hello.json"]].concat());
    client.warning("trying again");
    let proxy = proxy_on(port, &[]);
    proxy.0.line("Received a data message from client 50 ");
    let _server = registered("1", "PP_1", &proxy, &[]);
    assert!(client.end().success());
    assert!(client.out().contains(&"Hash of payload is correct".to_owned()));
}

#[test]
fn a_client_stops_waiting_when_its_time_is_up() {
    let since = Stopwatch::start();
    let (status, out, _) = client(fixed_port(), &["packets/hello.json"], &["-wait", "0.5"]);
    assert_eq!(status.code(), Some(1));
    since.assert_between(Duration::from_millis(500)..BOUND / 4);
    assert!(out.iter().any(|line| line.starts_with("Message not delivered: ")), "{out:?}");
}

/// Stops a proxy to which more has arrived than it reads ahead. Returns how many of 300 messages it serves.
fn served_while_stopping() -> usize {
    let mut proxy = proxy(&["-quiet"]);
    let server = registered("1", "PP_1", &proxy, &["-quiet"]);
    let mut client = Peer::connect(proxy.1);
    client.send(message("50", "PP_1", "first"));
    assert_eq!(client.packet()["type"], 2);
    server.signal(Signal::STOP);
    client.send(message("50", "PP_1", "x").repeat(300));
    proxy.0.signal(Signal::TERM);
    wait_until_nobody_listens(proxy.1);
    server.signal(Signal::CONT);
    let replies: Vec<_> =
        std::iter::from_fn(|| Some(client.line()).filter(|line| !line.is_empty())).collect();
    assert!(replies.iter().all(|reply| reply.contains(r#""type":2"#)), "{replies:?}");
    drop(client);
    assert!(proxy.0.end().success() || replies.len() < 300);
    replies.len()
}

#[test]
fn a_proxy_told_to_stop_serves_all_that_has_arrived() {
    // It reads on for 1 s, which a busy machine may take before the server goes on.
    let served: Vec<_> =
        (0..5).map(|_| served_while_stopping()).take_while(|served| *served < 300).collect();
    assert!(served.len() < 5, "of 300 messages: {served:?}");
}
