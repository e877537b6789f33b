//! The status page's data: what is served to whom, and that the counts agree with what clients saw.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::support::http::{Http, Watched, watched};
use crate::support::peers::Reserved;
use crate::support::stopwatch::Stopwatch;
use crate::support::{
    BOUND, Peer, Program, Signal, client, installed, message, proxy, registered, server, skipped,
};

/// A server that the test plays: it has no lease, so each message comes on its own connection.
struct Fake(TcpListener);

impl Fake {
    fn register(proxy: u16, id: &str, policy: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        Self::register_at(listener.local_addr().unwrap().port(), proxy, id, policy);
        Fake(listener)
    }

    fn register_at(port: u16, proxy: u16, id: &str, policy: &str) {
        let setup = json!({"type": 1, "id": id, "privPolyId": policy, "listenport": port});
        let mut peer = Peer::connect(proxy);
        peer.send(setup.to_string());
        assert_eq!(peer.packet()["payload"], "registered");
    }

    /// The next message, and the connection on which its ack is awaited.
    fn message(&self) -> (Value, TcpStream) {
        self.0.set_nonblocking(true).unwrap();
        let end = Instant::now() + BOUND;
        let stream = loop {
            match self.0.accept() {
                Ok((stream, _)) => break stream,
                Err(_) if Instant::now() < end => thread::sleep(Duration::from_millis(1)),
                Err(error) => panic!("no message comes: {error}"),
            }
        };
        stream.set_nonblocking(false).unwrap();
        stream.set_read_timeout(Some(BOUND)).unwrap();
        (serde_json::from_str(&line(&stream)).unwrap(), stream)
    }

    /// Hangs up on every message, as long as the test runs.
    fn hang_up(self) {
        thread::spawn(move || self.0.incoming().for_each(|stream| drop(line(&stream.unwrap()))));
    }
}

fn line(stream: &TcpStream) -> String {
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).unwrap();
    line
}

fn ack(mut stream: &TcpStream, server: &str, message: &Value) {
    let hash = revproc::protocol::hash(message["payload"].as_str().unwrap());
    let ack = json!({"type": 2, "srcid": server, "destid": message["srcid"], "payload": hash});
    stream.write_all(ack.to_string().as_bytes()).unwrap();
}

/// A table's counts that are of one kind, summed.
fn sum(counts: &Value) -> u64 {
    counts.as_object().unwrap().values().map(|count| count.as_u64().unwrap()).sum()
}

fn assert_balance(table: &Value) {
    let totals = &table["totals"];
    let [messages, acks, in_flight] =
        ["messages", "acks", "in_flight"].map(|name| totals[name].as_u64().unwrap());
    assert_eq!(messages, acks + sum(&totals["refusals"]) + in_flight, "{totals}");
}

fn server_of<'a>(table: &'a Value, policy: &str, id: &str) -> Option<&'a Value> {
    let policies = table["policies"].as_array().unwrap();
    let policy = policies.iter().find(|known| known["policy"] == policy)?;
    policy["servers"].as_array().unwrap().iter().find(|server| server["id"] == id)
}

/// The addresses on which a process listens.
#[cfg(target_os = "linux")]
fn listening(pid: u32) -> BTreeSet<SocketAddr> {
    let links = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let own: BTreeSet<_> = links
        .filter_map(|link| std::fs::read_link(link.ok()?.path()).ok())
        .filter_map(|to| Some(to.to_str()?.strip_prefix("socket:[")?.trim_end_matches(']').into()))
        .collect::<BTreeSet<String>>();
    let sockets = std::fs::read_to_string("/proc/net/tcp").unwrap();
    let listening = sockets.lines().filter_map(|line| {
        let columns: Vec<_> = line.split_whitespace().collect();
        let (ip, port) = columns[1].split_once(':')?;
        let ip = u32::from_str_radix(ip, 16).ok()?.to_ne_bytes();
        let port = u16::from_str_radix(port, 16).ok()?;
        (columns[3] == "0A" && own.contains(columns[9])).then(|| SocketAddr::from((ip, port)))
    });
    listening.collect()
}

#[test]
#[cfg(target_os = "linux")]
fn nothing_is_served_unless_asked_for_and_then_on_the_loopback_address() {
    let loopback = |ports: &[u16]| {
        ports.iter().map(|port| SocketAddr::from(([127, 0, 0, 1], *port))).collect::<BTreeSet<_>>()
    };
    let (unwatched, port) = proxy(&[]);
    assert_eq!(listening(unwatched.pid()), loopback(&[port]));
    assert!(!unwatched.out().iter().any(|line| line.contains("status")));
    let watched = watched(&[]);
    let ports = [watched.proxy.1, watched.status];
    assert_eq!(listening(watched.proxy.0.pid()), loopback(&ports));
}

#[test]
fn a_status_port_that_is_taken_ends_the_proxy_before_it_is_announced() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let mut program = Program::start("revproc", &["-port", "0", "-status", &port]);
    assert_eq!(program.end().code(), Some(1));
    assert_eq!(program.out(), Vec::<String>::new());
    program.warning("-status");
}

#[test]
fn the_documents_are_served_one_after_another_on_one_connection() {
    let watched = watched(&[]);
    let mut http = Http::connect(watched.status);
    let documents = [
        ("/", "text/html; charset=utf-8", "<!doctype html>"),
        ("/?from=a+bookmark", "text/html; charset=utf-8", "<!doctype html>"),
        ("/table.json", "application/json", r#"{"latest":["#),
        ("/metrics", "text/plain; version=0.0.4; charset=utf-8", "# HELP revproc_"),
        ("/healthz", "text/plain; charset=utf-8", "serving"),
    ];
    for (path, media_type, begin) in documents {
        let answer = http.get(path);
        assert_eq!((answer.status, answer.header("content-type")), (200, media_type), "{path}");
        assert!(answer.body.starts_with(begin), "{path}: {}", answer.body);
        assert_eq!(answer.header("cache-control"), "no-store", "{path}");
        assert_eq!(answer.header("x-content-type-options"), "nosniff", "{path}");
        assert!(answer.header("content-security-policy").starts_with("default-src 'none'"));
    }
    // The body that a HEAD leaves out would be taken for the beginning of the next answer.
    let length = http.get("/").body.len().to_string();
    let head = http.request("HEAD", "/", "", "");
    assert_eq!((head.status, head.header("content-length")), (200, &*length));
    assert_eq!(http.request("HEAD", "/nothing", "", "").status, 404);
    let answer = http.get("/table.json/");
    assert_eq!(answer.status, 404);
    assert!(answer.body.contains("/table.json"), "{}", answer.body);
}

#[test]
fn requests_that_come_together_are_answered_in_their_order() {
    let watched = watched(&[]);
    let mut http = Http::connect(watched.status);
    http.send("GET /healthz HTTP/1.1\r\n\r\nGET /no HTTP/1.1\r\n\r\nHEAD / HTTP/1.1\r\n\r\n");
    let found = [http.answer(true), http.answer(true), http.answer(false)];
    assert_eq!(found.map(|answer| answer.status), [200, 404, 200]);
}

#[test]
fn a_connection_is_closed_where_its_request_asks_for_that() {
    let watched = watched(&[]);
    for request in
        ["GET /healthz HTTP/1.1\r\nConnection: Close\r\n\r\n", "GET /healthz HTTP/1.0\r\n\r\n"]
    {
        let mut http = Http::connect(watched.status);
        http.send(request);
        let answer = http.answer(true);
        assert_eq!((answer.status, answer.header("connection")), (200, "close"), "{request}");
        assert_eq!(http.rest(), "", "{request}");
    }
}

#[test]
fn whoever_wants_to_change_something_is_told_that_one_can_only_look() {
    let watched = watched(&[]);
    for method in ["POST", "PUT", "DELETE", "OPTIONS"] {
        // More than fits into the head's buffer: closing with it unread would lose the answer.
        for body in ["", &"x".repeat(100_000)] {
            let mut http = Http::connect(watched.status);
            let answer = http.request(method, "/table.json", "", body);
            assert_eq!((answer.status, answer.header("allow")), (405, "GET, HEAD"), "{method}");
            if !body.is_empty() {
                assert_eq!(http.rest(), "", "{method}");
            }
        }
    }
}

#[test]
fn a_page_under_a_name_that_is_not_ours_reads_nothing() {
    let watched = watched(&[]);
    let mut http = Http::connect(watched.status);
    let mut ask = |host: &str| http.request("GET", "/table.json", &format!("Host: {host}\r\n"), "");
    for foreign in ["evil.example", "evil.example:80", "localhost.evil.example", "127.0.0.1.nip.io"]
    {
        let answer = ask(foreign);
        assert_eq!(answer.status, 421, "{foreign}");
        assert!(!answer.body.contains("policies"), "{foreign}: {}", answer.body);
    }
    for own in ["127.0.0.1", "127.0.0.1:80", "localhost:8080", "LocalHost", "[::1]:80", "10.0.0.7"]
    {
        assert_eq!(ask(own).status, 200, "{own}");
    }
}

#[test]
fn a_target_may_be_a_whole_url_whose_name_counts() {
    let watched = watched(&[]);
    let mut http = Http::connect(watched.status);
    for (target, header, status) in [
        ("http://127.0.0.1:80/healthz", "127.0.0.1", 200),
        ("HTTP://LOCALHOST/healthz?policy=", "evil.example", 503),
        ("http://localhost", "localhost", 200),
        ("http://evil.example/healthz", "127.0.0.1", 421),
        ("http://localhost@evil.example/", "127.0.0.1", 421),
        ("http://evil.example?@localhost", "127.0.0.1", 421),
        ("https://localhost/", "localhost", 404),
    ] {
        let answer = http.request("GET", target, &format!("Host: {header}\r\n"), "");
        assert_eq!(answer.status, status, "{target}");
    }
}

#[test]
fn a_name_that_is_no_text_is_not_ours_either() {
    let watched = watched(&[]);
    let mut http = Http::connect(watched.status);
    http.send(b"GET /table.json HTTP/1.1\r\nHost: evil\xff.example\r\n\r\n");
    assert_eq!(http.answer(true).status, 421);
}

#[test]
fn what_is_no_request_is_answered_as_such_or_closed() {
    let watched = watched(&["-quiet"]);
    let too_long = format!("GET / HTTP/1.1\r\nA: {}\r\n\r\n", "a".repeat(20_000));
    for garbage in
        ["\0\u{1}\u{16}\u{3}garbage\r\n\r\n", "{\"type\": 0}\n\n", "GET\r\n\r\n", &too_long]
    {
        let mut http = Http::connect(watched.status);
        http.send(garbage);
        assert_eq!(http.answer(true).status, 400, "{garbage:.40}");
        assert_eq!(http.rest(), "", "{garbage:.40}");
    }
    let mut half = Http::connect(watched.status);
    half.send("GET / HTTP/1.1\r\nHost: 127.0");
    half.half_close();
    assert_eq!(half.rest(), "");
    assert_eq!(watched.get("/healthz"), "serving\n");
}

#[test]
fn half_a_request_is_closed_in_time_and_holds_nobody_up() {
    let watched = watched(&[]);
    let mut slow: Vec<_> = (0..20).map(|_| Http::connect(watched.status)).collect();
    let begun = Stopwatch::start();
    for http in &mut slow {
        http.send("GET / HTT");
    }
    assert_eq!(watched.get("/healthz"), "serving\n");
    begun.assert_within(Duration::from_secs(2));
    for mut http in slow {
        assert_eq!(http.rest(), "");
    }
    begun.assert_within(BOUND / 2);
}

#[test]
fn slow_requests_keep_no_health_check_waiting_however_many_they_are() {
    let watched = watched(&[]);
    let slow: Vec<_> = (0..80)
        .map(|_| {
            let mut stream = TcpStream::connect(("127.0.0.1", watched.status)).unwrap();
            stream.write_all(b"GET /healthz HTTP/1.1\r\n").unwrap();
            stream
        })
        .collect();
    for _ in 0..3 {
        let begun = Stopwatch::start();
        assert_eq!(watched.get("/healthz"), "serving\n");
        begun.assert_within(Duration::from_secs(1));
    }
    drop(slow);
}

#[test]
fn a_request_that_comes_a_byte_at_a_time_is_closed_in_time_too() {
    let watched = watched(&[]);
    let mut slow = TcpStream::connect(("127.0.0.1", watched.status)).unwrap();
    slow.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    slow.write_all(b"GET / HTTP/1.1\r\nA: ").unwrap();
    let begun = Stopwatch::start();
    while slow.peek(&mut [0]).is_err_and(|error| error.kind() == ErrorKind::WouldBlock) {
        begun.assert_within(BOUND / 2);
        // It fails where the connection has just been closed.
        let _ = slow.write(b"a");
    }
}

#[test]
fn health_is_good_while_serving_and_bad_while_stopping() {
    let mut watched = watched(&[]);
    let slow = Fake::register(watched.proxy.1, "slow", "P");
    let mut client = Peer::connect(watched.proxy.1);
    client.send(message("7", "P", "x"));
    let (in_flight, stream) = slow.message();
    assert_eq!(Http::connect(watched.status).get("/healthz").status, 200);
    assert_eq!(watched.table()["state"], "serving");
    watched.proxy.0.signal(Signal::TERM);
    watched.table_when("the stop", |table| table["state"] == "stopping");
    let answer = Http::connect(watched.status).get("/healthz");
    assert_eq!((answer.status, &*answer.body), (503, "stopping\n"));
    ack(&stream, "slow", &in_flight);
    assert_eq!(client.packet()["type"], 2);
    assert!(watched.proxy.0.end().success());
}

#[test]
fn a_policys_health_is_good_while_a_server_of_it_is_up() {
    const NAME: &str = "a b/+&=%é";
    let watched = watched(&[]);
    let health = |query: &str| {
        let answer = Http::connect(watched.status).get(&format!("/healthz{query}"));
        (answer.status, answer.body)
    };
    let serving = (200, "serving\n".to_owned());
    let nobody = |policy: &str| (503, format!("no server of privacy policy \"{policy}\" is up\n"));
    assert_eq!(health("?policy=P"), nobody("P"));
    let mut leased = registered("1", "P", &watched.proxy, &[]);
    let _named = registered("2", NAME, &watched.proxy, &[]);
    let encoded = "?policy=a%20b/+%26%3d%25%C3%A9";
    for query in ["", "?", "?policy=P", "?x&policy=P", encoded, &format!("{encoded}&policy=P")] {
        assert_eq!(health(query), serving, "{query}");
    }
    assert_eq!(health("?policy=p"), nobody("p"));
    assert_eq!(health("?policy=P&policy=Q%1b"), nobody("Q\\u{1b}"));
    assert_eq!(health("?policy="), nobody(""));
    for wrong in ["%", "%4", "%zz", "%+4", "%ff", "%é"] {
        assert_eq!(health(&format!("?policy={wrong}")).0, 400, "{wrong}");
    }
    leased.kill();
    watched.table_when("the end of the lease", |table| server_of(table, "P", "1").is_none());
    assert_eq!(health("?policy=P"), nobody("P"));

    // It has no lease and stays in the table, but nobody listens on its port.
    let reserved = Reserved::any();
    Fake::register_at(reserved.port, watched.proxy.1, "3", "R");
    assert_eq!(health("?policy=R"), serving);
    let mut client = Peer::connect(watched.proxy.1);
    client.send(message("7", "R", "x"));
    assert_eq!(client.packet()["code"], "unreachable");
    let table = watched.table();
    assert_eq!(server_of(&table, "R", "3").unwrap()["state"], "set-aside");
    assert_eq!(health("?policy=R"), nobody("R"));
}

#[test]
fn the_table_says_whose_turn_it_is() {
    let watched = watched(&[]);
    let _servers = ["1", "2", "3"].map(|id| registered(id, "P", &watched.proxy, &[]));
    let mut client = Peer::connect(watched.proxy.1);
    for _ in 0..7 {
        let table = watched.table();
        let servers = table["policies"][0]["servers"].as_array().unwrap();
        let next: Vec<_> = servers.iter().filter(|server| server["next"] == true).collect();
        client.send(message("7", "P", "x"));
        assert_eq!(next.len(), 1);
        // An id is compared by its text.
        assert_eq!(client.packet()["srcid"].to_string(), next[0]["id"].as_str().unwrap());
    }
}

#[test]
fn a_server_that_left_with_a_message_in_flight_is_draining_until_it_ends() {
    let watched = watched(&[]);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut lease = Peer::connect(watched.proxy.1);
    lease.send(
        json!({"type": 1, "id": "s", "privPolyId": "P", "listenport": port, "lease": 8})
            .to_string(),
    );
    assert_eq!(lease.packet()["lease"], 8);
    let mut client = Peer::connect(watched.proxy.1);
    client.send(message("7", "P", "x"));
    let (in_flight, stream) = Fake(listener).message();
    drop(lease);
    let is_draining = |table: &Value| server_of(table, "P", "s").unwrap()["state"] == "draining";
    let table = watched.table_when("the server to leave", is_draining);
    let server = server_of(&table, "P", "s").unwrap();
    assert_eq!((&server["in_flight"], &server["address"]), (&json!(1), &Value::Null));
    assert_eq!(watched.metric("revproc_registered_servers")[0].1, 0.0);
    ack(&stream, "s", &in_flight);
    assert_eq!(client.packet()["type"], 2);
    watched.table_when("the last server to go", |table| table["policies"] == json!([]));
}

/// What one client of the mixed run was answered.
#[derive(Default)]
struct Seen {
    messages: u64,
    /// Refused packets that are no messages.
    packets: u64,
    acks: BTreeMap<String, u64>,
    refusals: BTreeMap<String, u64>,
}

/// Sends messages to be acked, retried and refused, in bursts of many sizes, and one packet that is
/// no message in each burst.
fn mixed_client(proxy: u16, number: usize) -> Seen {
    let mut seen = Seen::default();
    let mut peer = Peer::connect(proxy);
    for burst in 0..25 {
        let size = 1 + (number + burst) % 7;
        let mut sent = String::new();
        for place in 0..size {
            let stranger = format!("nobody-{number}-{burst}-{place}");
            let policy = ["A", "B", "A", "C", &stranger][(burst + place) % 5];
            sent += &message(&number.to_string(), policy, &format!("{number} {burst} {place}"));
        }
        peer.send(sent + r#"{"type": 9}"#);
        for _ in 0..=size {
            let reply = peer.packet();
            let count = match reply["code"].as_str() {
                None => seen.acks.entry(reply["srcid"].as_str().unwrap().to_owned()).or_default(),
                Some("bad-packet") => &mut seen.packets,
                Some(code) => seen.refusals.entry(code.to_owned()).or_default(),
            };
            *count += 1;
        }
        seen.messages += size as u64;
    }
    seen
}

#[test]
fn the_counts_balance_and_agree_with_what_clients_saw_to_the_last_message() {
    let watched = watched(&["-reply-timeout", "2"]);
    let proxy = watched.proxy.1;
    let mut dying = registered("a1", "A", &watched.proxy, &[]);
    let _a2 = registered("a2", "A", &watched.proxy, &[]);
    let _b1 = registered("b1", "B", &watched.proxy, &[]);
    // It fails its messages, and b1 gets them; and it is the only server of C.
    Fake::register(proxy, "b2", "B").hang_up();
    Fake::register(proxy, "c1", "C").hang_up();

    let over = AtomicBool::new(false);
    let seen: Vec<Seen> = thread::scope(|scope| {
        let looker = scope.spawn(|| {
            let end = Instant::now() + 2 * BOUND;
            while Instant::now() < end && !over.load(Ordering::Relaxed) {
                assert_balance(&watched.table());
                watched.get("/metrics");
            }
        });
        let clients: Vec<_> =
            (0..8).map(|number| scope.spawn(move || mixed_client(proxy, number))).collect();
        watched.table_when("some acks of a1", |table| {
            server_of(table, "A", "a1").is_some_and(|server| server["acks"].as_u64() > Some(10))
        });
        dying.kill();
        let _again = registered("a3", "A", &watched.proxy, &[]);
        let seen = clients.into_iter().map(|client| client.join().unwrap()).collect();
        over.store(true, Ordering::Relaxed);
        looker.join().unwrap();
        seen
    });

    let mut acks = BTreeMap::<String, u64>::new();
    let mut refusals = BTreeMap::<String, u64>::new();
    for client in &seen {
        for (all, some) in [(&mut acks, &client.acks), (&mut refusals, &client.refusals)] {
            for (key, count) in some {
                *all.entry(key.clone()).or_default() += count;
            }
        }
    }
    let messages: u64 = seen.iter().map(|client| client.messages).sum();
    let acked: u64 = acks.values().sum();

    let table = watched.table();
    let totals = &table["totals"];
    assert_eq!(totals["messages"], messages);
    assert_eq!(totals["acks"], acked);
    assert_eq!(totals["refusals"], json!(refusals));
    assert_eq!(totals["in_flight"], 0);
    assert_balance(&table);
    assert!(totals["retries"].as_u64() > Some(0), "{totals}");
    assert!(totals["set_asides"].as_u64() > Some(0), "{totals}");
    assert!(sum(&server_of(&table, "B", "b2").unwrap()["failures"]) >= 3);

    let by_label = |name: &str, label: &str| -> BTreeMap<String, u64> {
        let mut counts = BTreeMap::new();
        for (labels, value) in watched.metric(name) {
            let at = labels.find(&format!("{label}=\"")).unwrap() + label.len() + 2;
            let value_of_label = labels[at..].split('"').next().unwrap().to_owned();
            *counts.entry(value_of_label).or_default() += value as u64;
        }
        counts.retain(|_, count| *count > 0);
        counts
    };
    let mut by_server = by_label("revproc_messages_total", "server");
    assert_eq!(by_server.remove(""), Some(messages - acked), "refusals have no server");
    assert_eq!(by_server, acks);
    let mut by_outcome = by_label("revproc_messages_total", "outcome");
    assert_eq!(by_outcome.remove("ack"), Some(acked));
    assert_eq!(by_outcome, refusals);
    assert_eq!(by_label("revproc_refusals_total", "code"), refusals);
    let packets = seen.iter().map(|client| client.packets).sum();
    assert_eq!(
        by_label("revproc_packet_refusals_total", "code"),
        BTreeMap::from([("bad-packet".to_owned(), packets)])
    );
    assert_eq!(by_label("revproc_ack_seconds_count", "server"), acks);
    assert!(watched.metric("revproc_server_in_flight_messages").iter().all(|(_, n)| *n == 0.0));
    assert_eq!(watched.metric("revproc_received_messages_total")[0].1, messages as f64);
    assert_eq!(watched.metric("revproc_in_flight_messages")[0].1, 0.0);
}

#[test]
fn messages_without_an_outcome_are_counted_as_in_flight() {
    let watched = watched(&[]);
    let slow = Fake::register(watched.proxy.1, "slow", "P");
    let mut clients: Vec<_> = (0..3).map(|_| Peer::connect(watched.proxy.1)).collect();
    let held: Vec<_> = clients
        .iter_mut()
        .map(|client| {
            client.send(message("7", "P", "x"));
            slow.message()
        })
        .collect();
    let table = watched.table();
    assert_eq!(table["totals"]["in_flight"], 3);
    assert_eq!(server_of(&table, "P", "slow").unwrap()["in_flight"], 3);
    assert_balance(&table);
    for (message, stream) in &held {
        ack(stream, "slow", message);
    }
    for client in &mut clients {
        assert_eq!(client.packet()["type"], 2);
    }
    let table = watched.table();
    assert_eq!(table["totals"]["in_flight"], 0);
    assert_eq!(server_of(&table, "P", "slow").unwrap()["in_flight"], 0);
    assert_balance(&table);
}

fn series(metrics: &str) -> Vec<&str> {
    metrics.lines().filter(|line| !line.starts_with('#')).collect()
}

#[test]
fn what_strangers_ask_for_makes_no_new_series() {
    let watched = watched(&["-quiet"]);
    let _server = registered("1", "P", &watched.proxy, &[]);
    let mut client = Peer::connect(watched.proxy.1);
    let mut ask = |number: usize| {
        client.send(message(&number.to_string(), &format!("stranger-{number}"), "x"));
        assert_eq!(client.packet()["code"], "no-server");
        series(&watched.get("/metrics")).len()
    };
    let before = ask(0);
    for number in 1..=500 {
        assert_eq!(ask(number), before, "after {number} strangers");
    }
    assert!(!watched.get("/metrics").contains("stranger"));
    assert_eq!(watched.metric("revproc_refusals_total{code=\"no-server\"}")[0].1, 501.0);
}

const HOSTILE: &str =
    "\"} 1\nrevproc_hacked 1\n#\\\u{1}\r\u{7f}\u{9b}\u{2028}\u{202e}</script><script>alert(1)//";

/// A proxy that has seen acks, refusals, failures and hostile names.
fn abused() -> (Watched, Fake) {
    let watched = watched(&["-quiet"]);
    let server = Fake::register(watched.proxy.1, HOSTILE, HOSTILE);
    let mut client = Peer::connect(watched.proxy.1);
    let packet =
        json!({"type": 0, "srcid": HOSTILE, "privPoliId": HOSTILE, "payload": HOSTILE}).to_string();
    client.send(&packet);
    let (message, stream) = server.message();
    ack(&stream, HOSTILE, &message);
    assert_eq!(client.packet()["type"], 2);
    client.send(&packet);
    drop(server.message());
    assert_eq!(client.packet()["code"], "unreachable");
    client.send(message_to_nobody());
    assert_eq!(client.packet()["code"], "no-server");
    (watched, server)
}

fn message_to_nobody() -> String {
    json!({"type": 0, "srcid": 1, "privPoliId": "nobody\n", "payload": "x"}).to_string()
}

#[test]
fn hostile_names_and_payloads_stay_what_they_are_and_harm_no_terminal() {
    let (watched, _server) = abused();
    let is_harmful = |text: &str| {
        text.contains(|c: char| c.is_control() && c != '\n' || "\u{2028}\u{202e}".contains(c))
    };
    let text = watched.get("/table.json");
    assert!(!is_harmful(&text) && !text.contains('\n'), "{text:?}");
    let table: Value = serde_json::from_str(&text).unwrap();
    let server = server_of(&table, HOSTILE, HOSTILE).expect("both names as they are");
    assert_eq!((&server["messages"], &server["acks"]), (&json!(2), &json!(1)));
    let payload = table["latest"][2]["payload"].as_str().unwrap();
    assert!(payload.starts_with("\"} 1\\nrevproc_hacked 1\\n#\\\\u{1}\\r"), "{payload}");

    let metrics = watched.get("/metrics");
    let all = series(&metrics);
    assert!(!all.iter().any(|line| line.starts_with("revproc_hacked")), "{metrics}");
    for line in &all {
        let (_, value) = line.rsplit_once(' ').expect("a value");
        assert!(value.parse::<f64>().is_ok(), "{line:?}");
    }
    assert!(!is_harmful(&metrics), "{metrics:?}");
    let escaped = r#"\"} 1\\nrevproc_hacked 1\\n#\\\\\\u{1}\\r\\u{7f}\\u{9b}\\u{2028}\\u{202e}</script><script>alert(1)//"#;
    let acks = format!(
        r#"revproc_messages_total{{policy="{escaped}",server="{escaped}",outcome="ack"}} 1"#
    );
    assert!(metrics.contains(&acks), "{metrics}");
    let names: BTreeSet<_> = all.iter().map(|line| line.rsplit_once(' ').unwrap().0).collect();
    assert_eq!(names.len(), all.len(), "a series is there twice");
}

#[test]
fn prometheus_own_check_has_no_complaint() {
    let Some(promtool) = installed("promtool") else { return skipped("no promtool here") };
    let (watched, _server) = abused();
    let metrics = watched.get("/metrics");
    let mut check = Command::new(promtool)
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    check.stdin.take().unwrap().write_all(metrics.as_bytes()).unwrap();
    let end = Instant::now() + BOUND;
    let status = loop {
        match check.try_wait().unwrap() {
            Some(status) => break status,
            None if Instant::now() > end => {
                check.kill().unwrap();
                panic!("promtool does not end");
            }
            None => thread::sleep(Duration::from_millis(5)),
        }
    };
    let mut said = String::new();
    check.stdout.take().unwrap().read_to_string(&mut said).unwrap();
    check.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    assert!(status.success() && said.is_empty(), "{status}: {said}\n{metrics}");
}

#[test]
fn what_our_client_was_told_is_among_the_latest_messages() {
    let watched = watched(&[]);
    let (_server, _) = server("1", "PP_1", watched.proxy.1, &[]);
    watched.table_when("the server", |table| server_of(table, "PP_1", "1").is_some());
    let (status, ..) = client(watched.proxy.1, &["packets/hello.json"], &[]);
    assert!(status.success());
    let table = watched.table();
    let latest = &table["latest"][0];
    let fields = ["client", "policy", "server", "outcome", "payload"].map(|name| &latest[name]);
    assert_eq!(fields, ["50", "PP_1", "1", "ack", "hello"]);
    assert_eq!((&latest["number"], &latest["tries"]), (&json!(1), &json!(1)));
}
