//! Clients that do not read their replies: what they can take of the proxy.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::LazyLock;
use std::thread;
use std::time::{Duration, Instant};

use rustix::net::{connect, sockopt};

use crate::support::leased::{Answer, Leased};
use crate::support::stopwatch::Stopwatch;
use crate::support::{BOUND, Peer, message, message_with, proxy, registered, tcp_socket};

/// The proxy's places in these tests.
const PLACES: usize = 16;
const LIMITS: [&str; 5] = ["-max-memory", "16M", "-max-connections", "16", "-quiet"];

/// A connection whose kernel takes few replies.
fn little_room(port: u16) -> TcpStream {
    with_room(port, 4 << 10)
}

fn with_room(port: u16, bytes: usize) -> TcpStream {
    let socket = tcp_socket();
    sockopt::set_socket_recv_buffer_size(&socket, bytes).unwrap();
    connect(&socket, &SocketAddr::from(([127, 0, 0, 1], port))).unwrap();
    TcpStream::from(socket)
}

/// Such a connection, with as many messages on it as the proxy takes until it
/// takes none for `pause`: each is refused with all the words that there are. Its sending side is ended,
/// and nothing is ever read.
fn unread(port: u16, pause: Duration) -> TcpStream {
    let mut stream = little_room(port);
    stream.set_write_timeout(Some(pause)).unwrap();
    let long = "\\u0001".repeat(256);
    let many = message(&format!("\"{long}\""), &long, "").repeat(4 << 10);
    // The proxy stops reading some time.
    let _ = stream.write_all(many.as_bytes());
    let _ = stream.shutdown(Shutdown::Write);
    stream
}

fn is_served(port: u16) -> Duration {
    let begun = Instant::now();
    let mut newcomer = Peer::connect(port);
    newcomer.send(message("1", "P", "x"));
    assert_eq!(newcomer.packet()["type"], 2);
    begun.elapsed()
}

#[test]
fn a_long_message_that_nobody_serves_is_refused_where_memory_is_scarce() {
    let (_proxy, port) = proxy(&["-quiet", "-max-memory", "4M"]);
    let mut client = Peer::connect(port);
    for length in [20_000, 300_000, 10] {
        client.send(message("1", "P", &"x".repeat(length)));
        assert_eq!(client.packet()["code"], "no-server");
    }
}

#[test]
fn those_that_do_not_read_take_no_more_than_their_places() {
    let proxy = proxy(&LIMITS);
    let _server = registered("1", "P", &proxy, &["-quiet"]);
    let mut kept = Peer::connect(proxy.1);
    kept.send(message("1", "P", "x"));
    assert_eq!(kept.packet()["type"], 2);
    let (threads, descriptors) = (proxy.0.threads(), proxy.0.descriptors());
    let (mut crowd, mut most) = (Vec::new(), [0; 3]);
    let begun = Instant::now();
    let is_crowded = |crowd: &Vec<_>| crowd.len() > 2 * PLACES || begun.elapsed() > 3 * BOUND;
    while begun.elapsed() < Duration::from_secs(10) || !is_crowded(&crowd) {
        if crowd.len() < 400 {
            crowd.push(unread(proxy.1, Duration::from_millis(20)));
        } else {
            thread::sleep(Duration::from_millis(20));
        }
        let now = [proxy.0.memory("VmRSS"), proxy.0.threads(), proxy.0.descriptors()];
        most = std::array::from_fn(|at| most[at].max(now[at]));
    }
    assert!(crowd.len() > 2 * PLACES, "{}", crowd.len());
    let [memory, most_threads, most_descriptors] = most;
    println!("{} MB, {most_threads} threads, {most_descriptors} descriptors", memory >> 20);
    assert!(memory < 100 << 20, "{} MB", memory >> 20);
    // Beside the clients' places there is the lobby.
    assert!(most_threads <= threads + PLACES + 10, "{most_threads} threads");
    assert!(most_descriptors <= descriptors + PLACES + 10, "{most_descriptors} descriptors");
    kept.send(message("1", "P", "x"));
    assert_eq!(kept.packet()["type"], 2);
}

#[test]
fn a_newcomer_is_served_when_the_first_that_do_not_read_are_cut() {
    let proxy = proxy(&["-max-connections", "3", "-quiet"]);
    let _server = registered("1", "P", &proxy, &["-quiet"]);
    // By then it has refused as many messages as it could, and waits for the client to read.
    let pause = Duration::from_secs(1);
    let _first = [(); 2].map(|()| unread(proxy.1, pause));
    let watch = Stopwatch::start();
    let took = (0..10).map(|_| is_served(proxy.1)).min().unwrap();
    watch.assert_took(took, Duration::from_millis(50), "a place is free");
    let _last = unread(proxy.1, pause);
    let watch = Stopwatch::start();
    // On a busy machine one of the first may have been cut by now, so that it may be soon.
    watch.assert_took(is_served(proxy.1), Duration::from_millis(10_500), "one is cut after 10 s");
}

/// With so few clients it has one connection to each server.
const LITTLE_MEMORY: [&str; 6] =
    ["-max-memory", "1M", "-max-packet", "512K", "-max-connections", "4"];

/// A quarter of that memory, less some.
const QUARTER: usize = 250_000;

/// An ack's further field that is so long.
static RESULT: LazyLock<String> =
    LazyLock::new(|| format!("\"result\":\"{}\"", "x".repeat(QUARTER)));

#[test]
fn what_a_client_leaves_unread_counts_against_the_memory_and_the_client_is_cut_where_none_is_left()
{
    let proxy = proxy(&LITTLE_MEMORY);
    let _server = Leased::start("1", "P", proxy.1, |_| Answer::AckWith(&RESULT));
    let mut reader = Peer::connect(proxy.1);
    reader.send(message("1", "P", "x"));
    assert_eq!(reader.packet()["result"].as_str().map(str::len), Some(QUARTER));
    let mut client = little_room(proxy.1);
    let since = Stopwatch::start();
    let long = message_with("2", "P", "x", r#""timeout":60"#);
    client.write_all(long.repeat(40).as_bytes()).unwrap();
    let warning = proxy.0.warning("could not send replies");
    // On a machine that is late, the ten seconds for reading may be over before the memory is full.
    let is_cut_in_time = since.lateness() > Duration::from_secs(1) && warning.contains("timed out");
    assert!(warning.contains("-max-memory") || is_cut_in_time, "{warning}");
    let memory = proxy.0.memory("VmHWM");
    println!("{} MB", memory >> 20);
    assert!(memory < 32 << 20, "{} MB", memory >> 20);
    reader.send(message("1", "P", "x"));
    assert_eq!(reader.packet()["type"], 2, "the others are served");
}

#[test]
fn replies_that_wait_for_an_earlier_one_of_their_client_count_against_the_memory() {
    let proxy = proxy(&LITTLE_MEMORY);
    let _silent = Leased::start("1", "S", proxy.1, |_| Answer::Skip);
    let _server = Leased::start("2", "P", proxy.1, |_| Answer::AckWith(&RESULT));
    let mut client = Peer::connect(proxy.1);
    let silent = message_with("1", "S", "x", r#""timeout":60"#);
    client.send(silent + &message("1", "P", "x").repeat(30));
    let warning = proxy.0.warning("could not send replies");
    assert!(warning.contains("-max-memory"), "{warning}");
    let memory = proxy.0.memory("VmHWM");
    assert!(memory < 32 << 20, "{} MB", memory >> 20);
}

#[test]
fn a_client_that_reads_slowly_but_steadily_gets_its_reply() {
    let proxy = proxy(&["-quiet", "-max-packet", "32M"]);
    let fields = format!("\"result\":\"{}\"", "x".repeat(16 << 20));
    let _server = Leased::start("1", "P", proxy.1, move |_| Answer::AckWith(fields.clone().leak()));
    let mut client = with_room(proxy.1, 128 << 10);
    client.write_all(message("1", "P", "x").as_bytes()).unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    // More than 10 s in all, which is as long as one may not read at all.
    let mut received = 0;
    loop {
        thread::sleep(Duration::from_millis(75));
        let read = (&client).take(64 << 10).read_to_end(&mut Vec::new()).unwrap();
        if read == 0 {
            break;
        }
        received += read;
    }
    assert!(received > 16 << 20, "{received} bytes");
}

#[test]
fn long_acks_count_against_the_memory_and_what_finds_none_is_refused() {
    let proxy = proxy(&["-max-memory", "8M", "-max-packet", "2M", "-quiet"]);
    let _server = Leased::start("1", "P", proxy.1, |_| {
        // Slow enough for the messages to be side by side on connections of their own.
        thread::sleep(Duration::from_millis(50));
        Answer::LongResult
    });
    let mut clients: Vec<_> = (0..64).map(|_| Peer::connect(proxy.1)).collect();
    clients.iter_mut().for_each(|client| client.send(message("1", "P", "x")));
    let mut acked = 0;
    for client in &mut clients {
        let reply = client.packet();
        match reply["type"].as_u64() {
            Some(2) => acked += 1,
            _ => assert_eq!(reply["code"], "overloaded", "{reply}"),
        }
    }
    let memory = proxy.0.memory("VmHWM");
    println!("{acked} acked, {} MB", memory >> 20);
    assert!((1..64).contains(&acked), "{acked}");
    assert!(memory < 48 << 20, "{} MB", memory >> 20);
    clients[0].send(message("1", "P", "x"));
    assert_eq!(clients[0].packet()["type"], 2, "the memory is free again, and nobody is blamed");
}
