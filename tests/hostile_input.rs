//! Whatever comes in: it is refused or the connection closed, good traffic beside it is delivered,
//! nothing is kept of it, and terminals show it as harmless text.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::net::sockopt;
use serde_json::Value;

use crate::support::http::watched;
use crate::support::mutation::{Random, answers, mutated};
use crate::support::stopwatch::Stopwatch;
use crate::support::{
    BOUND, Peer, Program, Signal, last_port, message, message_with, proxy, registered, server,
};

const MIB: usize = 1 << 20;

/// What a process holds, as the system counts it.
#[derive(Debug)]
struct Held {
    bytes: usize,
    descriptors: usize,
}

impl Held {
    fn by(program: &Program) -> Self {
        Held { bytes: program.memory("VmRSS"), descriptors: program.descriptors() }
    }

    /// Waits until the program holds no more than this, but for some threads that wait, a few
    /// kept connections and what an allocator keeps.
    fn wait_until_back(&self, program: &Program) {
        let end = Instant::now() + BOUND;
        loop {
            let now = Held::by(program);
            if now.bytes <= self.bytes + 8 * MIB && now.descriptors <= self.descriptors + 8 {
                return;
            }
            assert!(Instant::now() < end, "{now:?} after {self:?}\n{}", program.report());
            thread::sleep(Duration::from_millis(10));
        }
    }
}

/// Sends bytes and nothing after them, and returns what is answered until the other side closes.
fn told(port: u16, bytes: &[u8]) -> Vec<Value> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    stream.set_read_timeout(Some(BOUND)).unwrap();
    stream.set_write_timeout(Some(BOUND)).unwrap();
    // The other side may have heard enough before the end.
    let _ = stream.write_all(bytes);
    let _ = stream.shutdown(Shutdown::Write);
    until_closed(&mut stream)
}

fn until_closed(stream: &mut TcpStream) -> Vec<Value> {
    let mut answer = Vec::new();
    match stream.read_to_end(&mut answer) {
        Ok(_) => {}
        // The system throws away what we have not yet read when more of ours comes after the close.
        Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
        Err(error) => panic!("not closed: {error}; {}", String::from_utf8_lossy(&answer)),
    }
    String::from_utf8(answer)
        .expect("answers are UTF-8")
        .lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}")))
        .collect()
}

/// Delivers messages through a proxy, one after another, until told to stop; every one must arrive.
fn good_traffic(port: u16, stop: &AtomicBool) -> usize {
    let mut peer = Peer::connect(port);
    let mut delivered = 0;
    while !stop.load(Ordering::Relaxed) || delivered == 0 {
        let payload = format!("good {delivered}");
        peer.send(message("7", "good", &payload));
        let ack = peer.packet();
        assert_eq!(ack["payload"], revproc::protocol::hash(&payload), "{ack}");
        delivered += 1;
        // It is there to be disturbed, not to disturb.
        thread::sleep(Duration::from_millis(1));
    }
    delivered
}

fn send_mutated(port: u16, seed: u64, count: usize) {
    let mut random = Random::new(seed);
    for number in 0..count {
        let bytes = mutated(&mut random);
        let got = told(port, &bytes);
        let shown = String::from_utf8_lossy(&bytes[..bytes.len().min(1000)]).into_owned();
        assert_eq!(got.len(), answers(&bytes), "{seed}/{number}: {shown:?} got {got:?}");
        for answer in &got {
            let kind = &answer["type"];
            assert!(*kind == 2 || *kind == 3 && answer["code"].is_string(), "{shown:?}: {answer}");
        }
    }
}

#[test]
fn ten_thousand_mutated_packets_are_answered_and_leave_nothing_behind() {
    let proxy = proxy(&[]);
    let server = registered("1", "good", &proxy, &[]);
    let server_port =
        server.line("Listening on port ").rsplit(' ').next().unwrap().parse().unwrap();
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let good = scope.spawn(|| good_traffic(proxy.1, &stop));
        // The first ones fill the table, and the allocator's and the terminal's stock.
        for port in [proxy.1, server_port] {
            send_mutated(port, 1, 1000);
        }
        let before = [Held::by(&proxy.0), Held::by(&server)];
        let senders: Vec<_> = [(proxy.1, 2), (proxy.1, 3), (server_port, 4), (server_port, 5)]
            .into_iter()
            .map(|(port, seed)| scope.spawn(move || send_mutated(port, seed, 2000)))
            .collect();
        let results: Vec<_> = senders.into_iter().map(|sender| sender.join()).collect();
        stop.store(true, Ordering::Relaxed);
        results.into_iter().for_each(|result| result.unwrap());
        assert!(good.join().unwrap() > 10);
        before[0].wait_until_back(&proxy.0);
        before[1].wait_until_back(&server);
    });
    for program in [&proxy.0, &server] {
        assert_harmless(program);
    }
}

/// Pairs of what is sent and the code of its refusal, which ends the connection or not.
fn refused_inputs() -> Vec<(Vec<u8>, &'static str, bool)> {
    let data = |payload: &str| {
        format!("{{\"type\":0,\"srcid\":1,\"privPoliId\":\"P\",\"payload\":{payload}}}")
            .into_bytes()
    };
    let nested = |open: &str, inner: &str, close: &str| {
        data(&(open.repeat(100_000) + inner + &close.repeat(100_000)))
    };
    let mut marked_twice = b"\xef\xbb\xbf\xef\xbb\xbf".to_vec();
    marked_twice.extend(data("\"x\""));
    let closes = true;
    vec![
        (b"\0\0\0\0".to_vec(), "bad-packet", closes),
        (marked_twice, "bad-packet", closes),
        (b"\"a string\"".to_vec(), "bad-packet", closes),
        (b"[{}]".to_vec(), "bad-packet", closes),
        (b"}".to_vec(), "bad-packet", closes),
        (b"{]}".to_vec(), "bad-packet", closes),
        (b"{\"type\":0,}".to_vec(), "bad-packet", closes),
        (b"{'type':0}".to_vec(), "bad-packet", closes),
        (b"{\"type\":00}".to_vec(), "bad-packet", closes),
        (b"{\"type\":\"\0\"}".to_vec(), "bad-packet", closes),
        (b"{\"type\":\"\n\"}".to_vec(), "bad-packet", closes),
        (b"{\"type\":\"\\x41\"}".to_vec(), "bad-packet", closes),
        (b"{\"a\":\"\xff\"}".to_vec(), "bad-packet", closes),
        (b"{\"a\":\"\xc0\x80\"}".to_vec(), "bad-packet", closes),
        (b"{\"a\":\"\xed\xa0\x80\"}".to_vec(), "bad-packet", closes),
        (b"{}".to_vec(), "bad-packet", !closes),
        (data("\"\\ud800\""), "bad-packet", !closes),
        (data("\"\\udc00\\ud800\""), "bad-packet", !closes),
        (data("null"), "bad-packet", !closes),
        (data("1e999"), "bad-packet", !closes),
        (nested("[", "", "]"), "bad-packet", !closes),
        (nested("{\"\":", "", "}"), "bad-packet", closes),
        (nested("[{\"\":", "0", "}]"), "bad-packet", !closes),
        (b"{\"type\":99999999999999999999999}".to_vec(), "bad-packet", !closes),
        (b"{\"type\":-1}".to_vec(), "bad-packet", !closes),
        (b"{\"type\":0.0}".to_vec(), "bad-packet", !closes),
        (b"{\"type\":4}".to_vec(), "bad-packet", !closes),
        (b"{\"type\":0,\"ty\\u0070e\":1}".to_vec(), "bad-packet", !closes),
        (b"{\"type\":2,\"srcid\":1,\"destid\":1,\"payload\":\"\"}".to_vec(), "bad-packet", !closes),
    ]
}

#[test]
fn every_kind_of_wrong_packet_gets_its_refusal_and_only_broken_streams_are_closed() {
    let proxy = proxy(&[]);
    let (_server, server_port) = server("1", "P", proxy.1, &[]);
    for port in [proxy.1, server_port] {
        for (bytes, code, closes) in refused_inputs() {
            let shown = String::from_utf8_lossy(&bytes[..bytes.len().min(200)]).into_owned();
            let mut peer = Peer::connect(port);
            peer.send(&bytes);
            assert_eq!(peer.packet()["code"], code, "{shown}");
            if closes {
                assert_eq!(peer.line(), "", "{shown}");
            } else {
                peer.send("{\"type\":7}");
                let next = peer.packet();
                assert!(next["payload"].as_str().unwrap().contains("type 7"), "{shown}: {next}");
            }
        }
    }
}

/// How soon whoever does not speak the protocol must be told, or cut off after its time is up.
const SOON: Duration = Duration::from_secs(3);

#[test]
fn a_refusal_says_what_it_was_and_where_the_page_is() {
    let with_page = watched(&[]);
    let without = proxy(&[]);
    let (_server, server_port) = server("1", "P", without.1, &[]);
    let http = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n";
    let page = format!("; the status page is at http://127.0.0.1:{}/", with_page.status);
    let no_page = "; for a status page, start revproc with -status PORT";
    for (port, input, said) in [
        (with_page.proxy.1, &http[..], format!("this is HTTP, not a JSON packet{page}")),
        (without.1, http, format!("this is HTTP, not a JSON packet{no_page}")),
        (server_port, http, "this is HTTP, not a JSON packet".to_owned()),
        (
            without.1,
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
            "this is TLS, not a JSON packet; packets are sent without encryption".to_owned(),
        ),
    ] {
        let got = told(port, input);
        assert_eq!(got[0]["payload"], said);
    }
}

#[test]
fn a_byte_order_mark_before_the_first_packet_is_white_space() {
    let proxy = proxy(&[]);
    let server = registered("1", "P", &proxy, &[]);
    let server_port = last_port(&server.line("Listening on port "));
    let mark = b"\xef\xbb\xbf";
    for port in [proxy.1, server_port] {
        for piece in [1, 3, 1000] {
            let mut peer = Peer::connect(port);
            let stream = [mark, message("7", "P", "x").as_bytes()].concat();
            for piece in stream.chunks(piece) {
                peer.send(piece);
            }
            assert_eq!(peer.packet()["type"], 2, "in pieces of {piece}");
            peer.send(message("7", "P", "x"));
            assert_eq!(peer.packet()["type"], 2, "in pieces of {piece}");
            peer.send(mark);
            let refusal = peer.packet();
            assert!(refusal["payload"].as_str().unwrap().contains("byte order mark"), "{refusal}");
        }
    }
}

#[test]
fn other_protocols_get_a_refusal_and_a_close_at_once() {
    let proxy = proxy(&[]);
    let (_server, server_port) = server("1", "P", proxy.1, &[]);
    let mut random = Random::new(1);
    let noise: Vec<u8> = (0..1000).map(|_| random.number() as u8).collect();
    let tls_hello = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 and so on";
    let http = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n";
    for port in [proxy.1, server_port] {
        for input in [&http[..], tls_hello, b"SSH-2.0-OpenSSH_9.6\r\n", &noise] {
            // These peers wait for an answer, and do not say that they have nothing more to say.
            let begun = Stopwatch::start();
            let mut stream = connect(port);
            stream.write_all(input).unwrap();
            let got = until_closed(&mut stream);
            assert_eq!(got.len(), 1, "{input:?}: {got:?}");
            assert_eq!(got[0]["code"], "bad-packet", "{input:?}");
            begun.assert_within(SOON);
        }
    }
}

#[test]
fn silence_and_endless_white_space_are_closed_when_their_time_is_up() {
    let proxy = proxy(&["-idle-timeout", "300ms"]);
    let (_server, server_port) = server("1", "P", proxy.1, &["-idle-timeout", "300ms"]);
    for port in [proxy.1, server_port] {
        let begun = Stopwatch::start();
        assert_eq!(until_closed(&mut connect(port)), [] as [Value; 0]);
        begun.assert_between(Duration::from_millis(250)..SOON);
        let begun = Stopwatch::start();
        let mut stream = connect(port);
        trickle(&stream, b"", b" \n", begun.started() + SOON);
        assert_eq!(until_closed(&mut stream), [] as [Value; 0]);
        begun.assert_within(SOON);
    }
}

#[test]
fn a_byte_now_and_then_does_not_keep_a_packet_alive() {
    let proxy = proxy(&["-packet-timeout", "300ms"]);
    let (_server, server_port) = server("1", "P", proxy.1, &["-packet-timeout", "300ms"]);
    for port in [proxy.1, server_port] {
        let begun = Stopwatch::start();
        let mut stream = connect(port);
        trickle(&stream, b"{\"type\":0,\"payload\":\"", b"x", begun.started() + SOON);
        let got = until_closed(&mut stream);
        begun.assert_within(SOON);
        assert_eq!(got.len(), 1);
        assert_eq!(got[0]["code"], "timeout");
    }
}

#[test]
fn a_server_that_sends_a_byte_now_and_then_is_given_up_when_its_time_is_up() {
    let proxy = proxy(&["-message-timeout", "300ms"]);
    let begun = Stopwatch::start();
    let end = begun.started() + SOON;
    let _server = by_hand(&proxy, "1", "P", move |mut stream| {
        assert_ne!(stream.read(&mut [0; 1000]).unwrap(), 0);
        trickle(&stream, b"{\"type\":2,\"payload\":\"", b"x", end);
    });
    let mut peer = Peer::connect(proxy.1);
    peer.send(message("1", "P", "x"));
    assert_eq!(peer.packet()["code"], "timeout");
    begun.assert_within(SOON);
}

#[test]
fn a_server_that_reads_a_little_now_and_then_is_given_up_when_its_time_is_up() {
    let proxy = proxy(&["-max-packet", "32M"]);
    let reads = Arc::new(AtomicBool::new(false));
    let _server = by_hand(&proxy, "1", "P", {
        let reads = Arc::clone(&reads);
        move |mut stream| {
            // What the system takes in its place is not to be most of the message.
            sockopt::set_socket_recv_buffer_size(&stream, 64 << 10).unwrap();
            let mut little = [0; 32 << 10];
            while stream.read(&mut little).is_ok_and(|read| read > 0) {
                reads.store(true, Ordering::Relaxed);
                thread::sleep(Duration::from_millis(20));
            }
        }
    });
    let payload = "x".repeat(16 * MIB);
    // A debug build parses such a message for half a second, a busy machine for longer, and one whose time
    // is over by then is not sent.
    let is_given_up = (1..=4).any(|attempt| {
        let time = Duration::from_secs(1 << attempt);
        let mut peer = Peer::connect(proxy.1);
        let timeout = format!("\"timeout\":{}", time.as_secs());
        peer.send(message_with("1", "P", &payload, &timeout));
        proxy.0.wait("the message", |out, _| {
            let received = out.iter().filter(|line| line.starts_with("Received a data message"));
            (received.count() == attempt).then_some(())
        });
        let begun = Stopwatch::start();
        assert_eq!(peer.packet()["code"], "timeout");
        begun.assert_within(time + SOON);
        reads.load(Ordering::Relaxed)
    });
    assert!(is_given_up, "{}", proxy.0.report());
}

#[test]
fn a_client_gives_a_proxy_up_that_sends_a_byte_now_and_then() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let begun = Stopwatch::start();
    // The message's second, and the client's own 5 beyond it.
    let limit = Duration::from_secs(6) + SOON;
    let end = begun.started() + limit;
    let hostile = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        assert_ne!(stream.read(&mut [0; 1000]).unwrap(), 0);
        trickle(&stream, b"{\"payload\":\"", b"x", end);
    });
    let (status, out, _) =
        crate::support::client(port, &["packets/hello.json"], &["-timeout", "1"]);
    assert_eq!(status.code(), Some(1));
    begun.assert_within(limit);
    assert!(out.iter().any(|line| line.starts_with("Message not delivered: ")), "{out:?}");
    hostile.join().unwrap();
}

#[test]
fn a_hundred_megabytes_without_an_end_are_refused_at_the_limit_and_never_held() {
    let proxy = proxy(&["-max-packet", "1M"]);
    let server = registered("1", "good", &proxy, &["-max-packet", "1M"]);
    let server_port =
        server.line("Listening on port ").rsplit(' ').next().unwrap().parse().unwrap();
    for (program, port) in [(&proxy.0, proxy.1), (&server, server_port)] {
        let before = Held::by(program);
        for (begin, piece) in [
            (&b"{\"type\":0,\"payloadsize\":99999999999,\"payload\":\""[..], b'x'),
            (b"{\"a\":", b'['),
            (b"{", b' '),
        ] {
            let begun = Stopwatch::start();
            let mut stream = connect(port);
            let mut highest = 0;
            let mut sent = stream.write(begin).unwrap();
            let chunk = vec![piece; 64 << 10];
            while sent < 100 * MIB {
                match stream.write(&chunk) {
                    Ok(written) => sent += written,
                    Err(_) => break,
                }
                highest = highest.max(Held::by(program).bytes);
            }
            until_closed(&mut stream);
            begun.assert_within(SOON);
            assert!(highest < before.bytes + 4 * MIB, "{highest} after {before:?}");
        }
        let mut stream = connect(port);
        stream.write_all(b"{\"payload\":\"").unwrap();
        stream.write_all(&vec![b'x'; MIB]).unwrap();
        let got = until_closed(&mut stream);
        assert_eq!(got.len(), 1, "{got:?}");
        assert_eq!(got[0]["code"], "too-large");
        before.wait_until_back(program);
    }
    // White space between packets has no end of its own, and takes no memory.
    let before = Held::by(&proxy.0);
    let mut peer = Peer::connect(proxy.1);
    for _ in 0..100 {
        peer.send(vec![b' '; MIB]);
    }
    assert!(Held::by(&proxy.0).bytes < before.bytes + 4 * MIB);
    peer.send(message("1", "good", "x"));
    assert_eq!(peer.packet()["type"], 2);
}

#[test]
fn long_packets_share_a_budget_of_memory_and_short_ones_need_none() {
    const COUNT: usize = 40;
    let limits = ["-max-packet", "1M", "-max-memory", "4M", "-packet-timeout", "60"];
    let proxy = proxy(&limits);
    let _server = registered("1", "good", &proxy, &[]);
    let short = message("1", "good", "x");
    let long = message("1", "good", &"x".repeat(600 << 10));
    let mut peer = Peer::connect(proxy.1);
    let before = Held::by(&proxy.0);
    let mut streams: Vec<_> = (0..COUNT).map(|_| connect(proxy.1)).collect();
    for stream in &mut streams {
        // It may have been refused before the last byte.
        let _ = stream.write_all(&long.as_bytes()[..long.len() - 1]);
    }
    // Each takes 1 MiB: the buffer doubles.
    let end = Instant::now() + BOUND;
    while streams.iter().filter(|stream| is_answered(stream)).count() < COUNT - 4 {
        assert!(Instant::now() < end, "{}", proxy.0.report());
        peer.send(&short);
        assert_eq!(peer.packet()["type"], 2);
    }
    assert!(Held::by(&proxy.0).bytes < before.bytes + 12 * MIB);
    let (refused, waiting): (Vec<_>, Vec<_>) = streams.into_iter().partition(is_answered);
    for mut stream in refused {
        let got = until_closed(&mut stream);
        assert_eq!(got.len(), 1, "{got:?}");
        assert_eq!(got[0]["code"], "overloaded");
        assert!(got[0]["payload"].as_str().unwrap().contains("send this one again later"));
    }
    assert_eq!(told(proxy.1, short.as_bytes())[0]["type"], 2);
    // Four find room, or fewer: two that grow at once can both be in the other's way.
    let mut served = 0;
    for mut stream in waiting {
        let _ = stream.write_all(b"}").and_then(|()| stream.shutdown(Shutdown::Write));
        let answer = &until_closed(&mut stream)[0];
        served += usize::from(answer["type"] == 2);
        assert!(answer["type"] == 2 || answer["code"] == "overloaded", "{answer}");
    }
    assert!((1..=4).contains(&served), "{served}");
    let end = Instant::now() + BOUND;
    while told(proxy.1, long.as_bytes())[0]["type"] != 2 {
        assert!(Instant::now() < end, "memory was not given back");
    }
}

#[test]
fn one_of_the_longest_packets_finds_room_however_little_memory_there_is() {
    let proxy = proxy(&["-max-packet", "1500000", "-max-memory", "0"]);
    let _server = registered("1", "good", &proxy, &[]);
    let envelope = message("1", "good", &"x".repeat(1_000_000)).len() - 1_000_000;
    let mut peer = Peer::connect(proxy.1);
    peer.send(message("1", "good", &"x".repeat(1_500_000 - envelope)));
    assert_eq!(peer.packet()["type"], 2);
}

/// Whether there is something to read.
fn is_answered(stream: &TcpStream) -> bool {
    let flags = rustix::net::RecvFlags::PEEK | rustix::net::RecvFlags::DONTWAIT;
    rustix::net::recv(stream, &mut [0_u8; 1], flags).is_ok()
}

fn connect(port: u16) -> TcpStream {
    let stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    stream.set_nodelay(true).unwrap();
    stream.set_read_timeout(Some(BOUND)).unwrap();
    stream.set_write_timeout(Some(BOUND)).unwrap();
    stream
}

/// Sends `begin`, and then a little again and again, until the other side closes or it is `end`.
fn trickle(mut stream: &TcpStream, begin: &[u8], little: &[u8], end: Instant) {
    let mut sent = stream.write(begin);
    while sent.is_ok() && Instant::now() < end {
        thread::sleep(Duration::from_millis(20));
        let closed = rustix::net::recv(
            stream,
            &mut [0_u8; 1],
            rustix::net::RecvFlags::PEEK | rustix::net::RecvFlags::DONTWAIT,
        );
        if closed.is_ok() {
            return;
        }
        sent = stream.write(little);
    }
}

/// A server that is registered, with a lease, and serves each connection as `serve` does.
fn by_hand(
    proxy: &(Program, u16),
    id: &str,
    policy: &str,
    serve: impl Fn(TcpStream) + Send + Clone + 'static,
) -> Peer {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    // The thread ends with the test.
    thread::spawn(move || {
        for stream in listener.incoming() {
            let serve = serve.clone();
            thread::spawn(move || serve(stream.unwrap()));
        }
    });
    let mut setup = Peer::connect(proxy.1);
    let (id, policy) = (Value::from(id), Value::from(policy));
    setup.send(format!(
        "{{\"type\":1,\"id\":{id},\"privPolyId\":{policy},\"listenport\":{port},\"lease\":60}}"
    ));
    assert_eq!(setup.packet()["payload"], "registered");
    setup
}

#[test]
fn a_message_that_the_server_refuses_does_not_take_its_neighbours_along() {
    let proxy = proxy(&[]);
    let _server = registered("1", "P", &proxy, &["-max-packet", "1K"]);
    let mut peer = Peer::connect(proxy.1);
    let long = "long".repeat(1000);
    let texts = ["one", "two", &long, "three", &long, "four"];
    peer.send(texts.map(|text| message("7", "P", text)).concat());
    for text in texts {
        let answer = peer.packet();
        if text == long {
            assert_eq!(answer["type"], 3, "{answer}");
        } else {
            assert_eq!(answer["payload"], revproc::protocol::hash(text), "{answer}");
        }
    }
}

/// Texts that would change a terminal, look like a line of their own, or hide.
const HARMFUL: [&str; 13] = [
    "a\nServer running with id 666",
    "a\r\nrevproc: stopped",
    "\u{1b}[2J\u{1b}[31mred\u{7}",
    "\u{1b}]0;title\u{1b}\\",
    "\u{9b}31m\u{90}\u{85}",
    "\0\u{8}\u{8}\u{7f}",
    "\u{202e}txt.exe\u{202c}",
    "\u{2066}\u{2067}\u{2068}\u{2069}",
    "\u{200e}\u{200f}\u{61c}\u{feff}\u{200b}\u{ad}",
    "\u{2028}\u{2029}\u{b}\u{c}",
    "\u{e0001}\u{e0041}\u{fff9}\u{2061}",
    "\u{115f}\u{3164}\u{1d173}\u{e0100}\u{34f}",
    "\t\u{1}\u{1f}",
];

/// A harmful text that also is too long to be shown whole.
fn long(text: &str) -> String {
    text.to_owned() + &"long".repeat(3000)
}

#[test]
fn ids_policies_and_payloads_are_harmless_on_the_proxys_and_the_servers_terminals() {
    let proxy = proxy(&[]);
    let (server, server_port) = server("1", "P", proxy.1, &[]);
    proxy.0.line("server id 1 ");
    for text in HARMFUL.iter().flat_map(|&text| [text.to_owned(), long(text)]) {
        let text = Value::from(text);
        for policy in [&Value::from("P"), &text] {
            let data = format!(
                "{{\"type\":0,\"srcid\":{text},\"privPoliId\":{policy},\"payloadsize\":3,\"payload\":{text}}}"
            );
            for port in [proxy.1, server_port] {
                assert_eq!(told(port, data.as_bytes()).len(), 1);
            }
        }
        for field in ["srcid", "privPoliId", "payload", "type", "listenport", "lease", "token"] {
            let twice = format!("{{\"type\":1,{text}:1,{text}:2,\"{field}\":{text}}}");
            for port in [proxy.1, server_port] {
                assert_eq!(told(port, twice.as_bytes()).len(), 1);
            }
        }
        for kind in [2, 3] {
            let unasked = format!(
                "{{\"type\":{kind},\"srcid\":{text},\"destid\":{text},\"payload\":{text},\"code\":{text}}}"
            );
            for port in [proxy.1, server_port] {
                assert_eq!(told(port, unasked.as_bytes()).len(), 1);
            }
        }
    }
    assert_harmless(&proxy.0);
    assert_harmless(&server);
}

#[test]
fn a_hostile_servers_words_are_harmless_on_the_proxys_and_the_clients_terminals() {
    let proxy = proxy(&["-tries", "1"]);
    for (number, text) in HARMFUL.iter().enumerate() {
        // It is registered twice: what it calls itself, and what a client can ask for.
        let name = &text[..text.len().min(200)];
        drop(by_hand(&proxy, name, name, drop));
        for answer in [
            r#"{"type":2,"srcid":T,"destid":50,"payload":T}"#,
            r#"{"type":3,"srcid":0,"destid":50,"payload":T,"code":T}"#,
            r#"{"type":2,"srcid":1,"destid":T,"payload":T}"#,
            r#"{"type":2,T:1,T:2}"#,
        ] {
            let answer = answer.replace('T', &Value::from(long(text)).to_string());
            let policy = format!("{number}{}", answer.len());
            let _setup = by_hand(&proxy, text, &policy, move |mut stream| {
                assert_ne!(stream.read(&mut [0; 1000]).unwrap(), 0);
                stream.write_all(answer.as_bytes()).unwrap();
                // The answer alone decides, not how the connection ends.
                let _ = stream.read(&mut [0; 1]);
            });
            let file = packet_file(&message("0", &policy, "x"));
            assert_client_is_harmless(proxy.1, &file);
        }
    }
    assert_harmless(&proxy.0);
}

#[test]
fn a_hostile_proxys_words_are_harmless_on_the_clients_and_the_servers_terminals() {
    let file = packet_file(&message("0", "P", "x"));
    for text in HARMFUL {
        let text = Value::from(long(text)).to_string();
        for answer in [
            r#"{"type":2,"srcid":T,"destid":T,"payload":T,"lease":1}"#,
            r#"{"type":3,"srcid":0,"destid":1,"payload":T,"code":T}"#,
            r#"{"type":3,"srcid":0,"destid":1,"payload":T,"code":"id-in-use"}"#,
            r#"{"type":3,T:1,T:2}"#,
        ] {
            let is_refusal = answer.contains("code");
            let answer = answer.replace('T', &text);
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let port = listener.local_addr().unwrap().port();
            let hostile = thread::spawn(move || {
                for _ in 0..2 {
                    let (mut stream, _) = listener.accept().unwrap();
                    assert_ne!(stream.read(&mut [0; 1000]).unwrap(), 0);
                    // They may have gone after the first part.
                    let _ = stream.write_all(answer.as_bytes());
                    let _ = stream.shutdown(Shutdown::Write);
                    let _ = stream.read_to_end(&mut Vec::new());
                }
            });
            assert_client_is_harmless(port, &file);
            let (mut server, _) = server("1", "P", port, &[]);
            hostile.join().unwrap();
            if !is_refusal {
                server.signal(Signal::TERM);
            }
            server.end();
            assert_harmless(&server);
        }
    }
}

/// A file for a client, in the folder that Cargo keeps for tests.
fn packet_file(packet: &str) -> String {
    static FILES: AtomicUsize = AtomicUsize::new(0);
    let number = FILES.fetch_add(1, Ordering::Relaxed);
    let name =
        format!("{}/hostile_{}_{number}.json", env!("CARGO_TARGET_TMPDIR"), std::process::id());
    std::fs::write(&name, packet).unwrap();
    name
}

fn assert_client_is_harmless(proxy: u16, file: &str) {
    let port = proxy.to_string();
    let mut client = Program::start("client", &["-id", "50", "-revproc", &port, "-pkt", file]);
    client.end();
    assert_harmless(&client);
}

/// Fails where a program has written anything but visible text and line ends, or a line that does
/// not begin as its lines do.
fn assert_harmless(program: &Program) {
    let raw = program.raw();
    let text = std::str::from_utf8(&raw).expect("terminals take UTF-8");
    for line in text.split_terminator('\n') {
        let bad = line.chars().find(|&character| {
            character.is_control()
                || matches!(character, '\u{ad}' | '\u{34f}' | '\u{61c}' | '\u{115f}' | '\u{1160}'
                    | '\u{200b}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}'
                    | '\u{2060}'..='\u{206f}' | '\u{3164}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}'
                    | '\u{1d173}'..='\u{1d17a}' | '\u{e0000}'..='\u{e0fff}')
        });
        assert!(bad.is_none(), "{bad:?} in {line:?}");
        let begins = LINES.iter().any(|begin| line.starts_with(begin));
        assert!(begins, "not one of its lines: {line:?}");
        assert!(line.len() < 4000, "{} bytes: {line}", line.len());
    }
}

/// How lines begin.
const LINES: [&str; 20] = [
    "Running the reverse proxy on port ",
    "Receiving setup message from server id ",
    "Received a data message from ",
    "Forwarding a data message to ",
    "Server running with id ",
    "Server serving privacy policy ",
    "Listening on port ",
    "Connecting to the reverse proxy on port ",
    "Received a message from client ",
    "Sending a response to the client ",
    "Sending message ",
    "Receiving a response from the server ",
    "Hash of payload is ",
    "Message not delivered: ",
    "revproc: refused a packet from 127.0.0.1:",
    "revproc: refused the message of client ",
    "revproc: server ",
    "revproc: client ",
    "server: ",
    "client: ",
];
