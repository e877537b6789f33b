//! A server's registration lasts as long as its lease, and comes back by itself.

mod support;

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use rustix::net::sockopt;

use support::{
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

    /// Waits for a setup packet, and gives its connection with when it came.
    fn setup(&self) -> (BufReader<TcpStream>, Instant) {
        let (stream, _) = self.listener.accept().unwrap();
        stream.set_read_timeout(Some(BOUND)).unwrap();
        let (mut stream, mut line) = (BufReader::new(stream), String::new());
        stream.read_line(&mut line).unwrap();
        assert!(line.contains(r#""type":1"#), "{line:?}");
        (stream, Instant::now())
    }
}

fn ack(stream: &mut BufReader<TcpStream>, more: &str) {
    let ack = format!(
        "{{\"type\":2,\"srcid\":0,\"destid\":1,\"payloadsize\":10,\"payload\":\"registered\"{more}}}\n"
    );
    stream.get_mut().write_all(ack.as_bytes()).unwrap();
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
    for (asked, granted) in [(0, 1), (1, 1), (8, 8), (60, 60), (61, 60), (u64::MAX, 60)] {
        assert_eq!(ask_for_lease(&mut setup, asked), granted, "{asked}");
    }
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
        proxy.0.signal(Signal::STOP);
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
    one.signal(Signal::TERM);
    assert_eq!(one.end().code(), Some(0));
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
    let since = Instant::now();
    for id in ["1", "2", "3"] {
        second.0.line(&format!("Receiving setup message from server id {id} "));
    }
    assert!(since.elapsed() < Duration::from_secs(2), "{:?}", since.elapsed());
    assert_eq!(answer(port)["type"], 2);
}

#[test]
fn pauses_between_attempts_grow_to_a_second_and_differ_between_servers() {
    // A proxy that grants a lease once is one of ours, whatever happens to it afterwards.
    let pauses = |id| {
        let proxy = Homework::new();
        let (server, _) = server(id, "PP_1", proxy.port, &[]);
        let (mut held, _) = proxy.setup();
        ack(&mut held, r#","lease":8"#);
        drop(held);
        let times: Vec<_> = (0..7).map(|_| proxy.setup().1).collect();
        server.warning("lost the reverse proxy");
        assert_eq!(server.err().len(), 1, "it is told once: {:?}", server.err());
        times.windows(2).map(|pair| pair[1] - pair[0]).collect::<Vec<_>>()
    };
    let (one, other) = std::thread::scope(|scope| {
        let other = scope.spawn(|| pauses("2"));
        (pauses("1"), other.join().unwrap())
    });
    for pauses in [&one, &other] {
        // Between half of it and the whole, and later still on a busy machine.
        assert!(pauses[0] < pauses[5] && pauses[5] > Duration::from_millis(500), "{pauses:?}");
        assert!(pauses.iter().all(|pause| *pause < Duration::from_secs(3)), "{pauses:?}");
    }
    let differ = one.iter().zip(&other).any(|(a, b)| a.abs_diff(*b) > Duration::from_millis(10));
    assert!(differ, "{one:?} {other:?}");
}

#[test]
fn a_server_lets_go_of_a_proxy_that_knows_no_lease_and_serves_on() {
    for answers in [true, false] {
        let proxy = Homework::new();
        let (_server, port) = server("1", "PP_1", proxy.port, &[]);
        let (mut setup, since) = proxy.setup();
        if answers {
            ack(&mut setup, "");
        }
        assert_eq!(setup.read_line(&mut String::new()).unwrap(), 0, "it should close");
        let limit = Duration::from_millis(if answers { 900 } else { 1500 });
        assert!(since.elapsed() < limit, "{:?}", since.elapsed());
        let mut peer = Peer::connect(port);
        peer.send(message("50", "PP_1", "x"));
        assert_eq!(peer.packet()["payload"], "11f6ad8ec52a2984abaafd7c3b516503785c2072");
    }
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
    proxy.setup();
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
    let since = Instant::now();
    let (status, out, _) = client(fixed_port(), &["packets/hello.json"], &["-wait", "0.5"]);
    assert_eq!(status.code(), Some(1));
    let waited = since.elapsed();
    assert!(waited >= Duration::from_millis(500) && waited < BOUND / 4, "{waited:?}");
    assert!(out.iter().any(|line| line.starts_with("Message not delivered: ")), "{out:?}");
}

#[test]
fn a_proxy_told_to_stop_serves_all_that_has_arrived() {
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
    for number in 0..300 {
        assert_eq!(client.packet()["type"], 2, "message {number}");
    }
    assert_eq!(client.line(), "");
    assert!(proxy.0.end().success());
}
