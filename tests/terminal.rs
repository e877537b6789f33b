//! What the programs say and how often, in what order, and what becomes of it where nobody reads.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

use crate::support::peers::{HomeworkServer, INTEGERS, Reserved, TUTORIAL};
use crate::support::{
    BOUND, Peer, Program, Signal, binary, client, last_port, message, proxy, registered, server,
};

/// How many events a line stands for.
fn events(line: &str) -> usize {
    let more = line.split_once(" (and ").and_then(|(_, rest)| rest.strip_suffix(" more like it)"));
    1 + more.map_or(0, |more| more.parse().unwrap())
}

/// Sends these packets on one connection, whose answers are read meanwhile.
fn send_all(port: u16, packets: impl Iterator<Item = String>) {
    let mut peer = Peer::connect(port);
    let packets: Vec<_> = packets.collect();
    for some in packets.chunks(100) {
        peer.send(some.concat());
        some.iter().for_each(|_| assert_ne!(peer.line(), ""));
    }
}

/// Stops a program, and returns the lines of standard error.
fn stop(program: &mut Program) -> Vec<String> {
    program.signal(Signal::TERM);
    assert_eq!(program.end().code(), Some(0), "{}", program.report());
    program.err()
}

/// Lines that say `what` are few, and stand for this many events together.
fn assert_limited(lines: &[String], what: &str, count: usize, begun: Instant, a_second: usize) {
    let lines: Vec<_> = lines.iter().filter(|line| line.contains(what)).collect();
    let limit = a_second * (2 + usize::try_from(begun.elapsed().as_secs()).unwrap());
    assert!(lines.len() <= limit, "{} lines, not {limit}: {lines:#?}", lines.len());
    assert_eq!(lines.iter().map(|line| events(line)).sum::<usize>(), count, "{lines:#?}");
}

fn token_file() -> String {
    let path = std::env::temp_dir().join(format!("token-of-terminal-test-{}", std::process::id()));
    std::fs::write(&path, "secret").unwrap();
    path.to_str().unwrap().to_owned()
}

const FLOOD: usize = 3000;

/// A stranger's packets that are no messages: setup packets without the token, and plain nonsense.
fn strangers_packets() -> impl Iterator<Item = String> {
    let setup = r#"{"type": 1, "id": 1, "privPolyId": "P", "listenport": 1}"#;
    (0..FLOOD).map(move |number| if number % 2 == 0 { setup } else { "{}" }.to_owned())
}

#[test]
fn a_flood_of_refused_packets_is_a_line_a_second_and_none_if_quiet() {
    let token = token_file();
    let begun = Instant::now();
    let (mut loud, port) = proxy(&["-token-file", &token]);
    send_all(port, strangers_packets());
    let err = stop(&mut loud);
    assert_limited(&err, "refused a packet from ", FLOOD, begun, 1);
    let (mut quiet, port) = proxy(&["-token-file", &token, "-quiet"]);
    send_all(port, strangers_packets());
    assert_eq!(stop(&mut quiet), ["revproc: stopped after 0 messages: 0 acked, 0 refused"]);
    assert_eq!(quiet.out().len(), 1, "{}", quiet.report());
    std::fs::remove_file(token).unwrap();
}

#[test]
fn a_flood_at_a_server_is_a_line_a_second_and_none_if_quiet() {
    let proxy = proxy(&[]);
    let packets = || (0..FLOOD).map(|_| "{}".to_owned());
    let begun = Instant::now();
    let (mut loud, port) = server("1", "P", proxy.1, &[]);
    send_all(port, packets());
    assert_limited(&stop(&mut loud), "refused a packet: ", FLOOD, begun, 1);
    let (mut quiet, port) = server("2", "P", proxy.1, &["-quiet"]);
    send_all(port, packets());
    let err = stop(&mut quiet);
    assert!(!err.iter().any(|line| line.contains("refused")), "{err:?}");
}

#[test]
fn a_wrong_payloadsize_is_said_once_a_second_by_proxy_and_server() {
    let mut proxy = proxy(&[]);
    let mut server = registered("1", "P", &proxy, &[]);
    let begun = Instant::now();
    let wrong = message("5", "P", "hello").replace("size\": 5", "size\": 99");
    send_all(proxy.1, (0..300).map(|_| wrong.clone()));
    for program in [&mut server, &mut proxy.0] {
        let err = stop(program);
        let what = "client 5 says payloadsize 99, but its payload has 5 bytes";
        assert_limited(&err, what, 300, begun, 1);
        let is_own =
            |line: &&String| line.starts_with("Received a ") && line.contains(" client 5 ");
        assert_eq!(program.out().iter().filter(is_own).count(), 300, "each has its own lines");
    }
}

#[test]
fn registrations_without_end_are_counted() {
    let begun = Instant::now();
    let (mut proxy, port) = proxy(&["-quiet"]);
    let setup = |id| format!(r#"{{"type": 1, "id": {id}, "privPolyId": "P", "listenport": 1}}"#);
    send_all(port, (0..FLOOD).map(|number| setup(number % 7)));
    stop(&mut proxy);
    assert_limited(&proxy.out(), "Receiving setup message from ", FLOOD, begun, 100);
}

/// Closes a connection with a reset.
fn reset(stream: &TcpStream) {
    rustix::net::sockopt::set_socket_linger(stream, Some(Duration::ZERO)).unwrap();
}

#[test]
fn clients_that_break_off_are_a_line_a_second_and_none_if_quiet() {
    for arguments in [&[] as &[_], &["-quiet"]] {
        let begun = Instant::now();
        let (mut proxy, port) = proxy(arguments);
        for _ in 0..200 {
            let mut peer = Peer::connect(port);
            peer.send(message("5", "P", "hello"));
            assert_ne!(peer.line(), "");
            reset(peer.stream());
        }
        let mut err = stop(&mut proxy);
        assert!(err.pop().unwrap().contains("stopped after 200 messages: 0 acked, 200 refused"));
        err.retain(|line| !line.contains("refused the message of client 5 (no-server): "));
        let limit = 2 * (2 + begun.elapsed().as_secs());
        assert!(err.len() as u64 <= limit, "{err:#?}");
        assert!(
            err.iter().all(|line| line.contains("connection reset by peer; closed")),
            "{err:#?}"
        );
        assert_eq!(err.is_empty(), arguments == ["-quiet"]);
    }
}

#[test]
fn a_server_that_registers_and_closes_without_reading_the_ack_is_no_warning() {
    let (mut proxy, port) = proxy(&[]);
    for number in 0..50 {
        let mut peer = Peer::connect(port);
        let setup = (INTEGERS.setup)(&number.to_string(), "P", 1);
        // The second ack goes to a connection that is closed.
        peer.send([setup.as_str(), &setup].concat());
        if number % 2 == 0 {
            reset(peer.stream());
        }
    }
    proxy.line("Receiving setup message from server id 49 ");
    assert_eq!(stop(&mut proxy), ["revproc: stopped after 0 messages: 0 acked, 0 refused"]);
}

#[test]
fn servers_that_register_before_they_listen_are_said_once_each() {
    let (proxy, port) = proxy(&[]);
    let mut listeners = Vec::new();
    let servers = ["7", "8"].map(|id| {
        let (sender, may_listen) = channel::<()>();
        listeners.push(sender);
        HomeworkServer::start_with(id, "P", port, TUTORIAL, move |reserved| {
            may_listen.recv_timeout(BOUND).unwrap();
            reserved.listen()
        })
    });
    servers.iter().for_each(|server| drop(proxy.line(&format!(" port {}", server.port))));
    let clients = ["4", "5", "6"].map(|id| {
        let mut peer = Peer::connect(port);
        peer.send(message(id, "P", "hello"));
        peer
    });
    proxy.wait("both servers refuse", |_, err| (err.len() == 2).then_some(()));
    // Each message is tried every 20 ms.
    thread::sleep(Duration::from_millis(300));
    drop(listeners.into_iter().map(|sender| sender.send(()).unwrap()).collect::<Vec<_>>());
    for mut client in clients {
        assert_eq!(client.packet()["type"].to_string().trim_matches('"'), "2");
    }
    let mut err = proxy.err();
    err.sort();
    let says = |id, port| {
        format!(
            "revproc: server {id} of privacy policy P (127.0.0.1:{port}) connection refused; trying again"
        )
    };
    assert_eq!(err, [says("7", servers[0].port), says("8", servers[1].port)]);
}

#[test]
fn a_server_cut_off_says_once_that_the_proxy_is_not_reached_whatever_the_system_says() {
    let reserved = Reserved::any();
    let port = reserved.port;
    let (server, _) = server("1", "P", port, &[]);
    let first = server.warning("connection refused (is revproc running there?)");
    // With the queue full, requests to connect are lost.
    let listener = reserved.listen();
    rustix::net::listen(&listener, 0).unwrap();
    let address = listener.local_addr().unwrap();
    let brief = Duration::from_millis(50);
    let filling: Vec<_> =
        std::iter::from_fn(|| TcpStream::connect_timeout(&address, brief).ok()).collect();
    // A pause and an attempt take 2 s at the most.
    thread::sleep(Duration::from_millis(2500));
    drop(filling);
    // Then one gets through.
    loop {
        let (stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(BOUND)).unwrap();
        let mut line = String::new();
        if BufReader::new(&stream).read_line(&mut line).is_ok_and(|read| read > 0) {
            assert!(line.contains(r#""lease":0"#), "{line}");
            break;
        }
    }
    let last = server.warning("closed the connection without an answer");
    assert_eq!(server.err(), [first, last]);
}

/// One of our programs with standard error where standard output is.
fn with_one_stream(name: &str, arguments: &[&str]) -> Program {
    let mut command = Command::new("sh");
    command.args(["-c", "exec \"$0\" \"$@\" 2>&1"]).arg(binary(name)).args(arguments);
    Program::run(command)
}

#[test]
fn lines_leave_in_the_order_in_which_things_happen_where_both_streams_are_one() {
    const MESSAGES: usize = 500;
    let proxy = with_one_stream("revproc", &["-port", "0"]);
    let port = last_port(&proxy.line("Running the reverse proxy on port "));
    let mut peer = Peer::connect(port);
    for number in 0..MESSAGES {
        peer.send(message(&number.to_string(), "P", "hello"));
        assert_ne!(peer.line(), "");
    }
    let lines = proxy
        .wait("all lines", |out, _| (out.len() == 1 + 2 * MESSAGES).then(|| out[1..].to_vec()));
    for (number, pair) in lines.chunks(2).enumerate() {
        assert!(
            pair[0].starts_with(&format!("Received a data message from client {number} ")),
            "{pair:?}"
        );
        let refused = format!("revproc: refused the message of client {number} (no-server): ");
        assert!(pair[1].starts_with(&refused), "{pair:?}");
    }
}

/// A client with this many messages on its standard input, whose standard output is this.
fn client_with(port: u16, count: usize, out: Stdio) -> Child {
    let packets = (0..count).fold(String::new(), |mut packets, number| {
        let _ = writeln!(packets, "{}", message("50", "P", &format!("message {number}")));
        packets
    });
    let mut command = Command::new(binary("client"));
    command.args(["-id", "50", "-pkt", "-", "-revproc", &port.to_string()]);
    let mut child =
        command.stdin(Stdio::piped()).stdout(out).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(packets.as_bytes()).unwrap();
    child
}

#[test]
fn a_client_waits_for_its_reader_and_loses_no_line() {
    // More lines than a pipe has room for.
    const MESSAGES: usize = 1500;
    let proxy = proxy(&["-quiet"]);
    let _server = registered("1", "P", &proxy, &["-quiet"]);
    let mut client = client_with(proxy.1, MESSAGES, Stdio::piped());
    // As long as a program that drops its lines would wait at its end.
    thread::sleep(Duration::from_secs(3));
    assert_eq!(client.try_wait().unwrap(), None);
    let out = BufReader::new(client.stdout.take().unwrap());
    let lines: Vec<_> = out.lines().map(Result::unwrap).collect();
    assert_eq!(lines.len(), 3 * MESSAGES);
    assert!(lines.iter().skip(2).step_by(3).all(|line| line == "Hash of payload is correct"));
    assert!(client.wait().unwrap().success());
}

#[test]
fn a_client_whose_reader_has_enough_delivers_the_rest() {
    let mut proxy = proxy(&["-quiet"]);
    let _server = registered("1", "P", &proxy, &["-quiet"]);
    let mut client = client_with(proxy.1, 300, Stdio::piped());
    drop(client.stdout.take());
    let output = client.wait_with_output().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert_eq!(output.stderr, b"");
    assert!(stop(&mut proxy.0).iter().any(|line| line.contains("300 messages: 300 acked")));
}

#[test]
fn a_client_whose_output_is_full_says_so_and_exits_with_1() {
    let Ok(full) = File::options().write(true).open("/dev/full") else { return };
    let proxy = proxy(&["-quiet"]);
    let _server = registered("1", "P", &proxy, &["-quiet"]);
    let output = client_with(proxy.1, 2, full.into()).wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let said = "client: could not write to standard output: no space left on device\n";
    assert_eq!(String::from_utf8_lossy(&output.stderr), said);
}

#[test]
fn a_proxy_and_a_server_go_on_without_their_readers() {
    let start = |name: &str, arguments: &[&str]| {
        let mut command = Command::new(binary(name));
        command.args(arguments).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn().unwrap();
        let mut out = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        while !line.contains(" port ") {
            line.clear();
            assert_ne!(out.read_line(&mut line).unwrap(), 0);
        }
        (child, last_port(line.trim_end()))
    };
    let (mut proxy, port) = start("revproc", &["-port", "0"]);
    let to = port.to_string();
    let (mut server, _) =
        start("server", &["-id", "1", "-pp", "PP_1", "-listen", "0", "-revproc", &to]);
    for _ in 0..3 {
        let (status, ..) = client(port, &["packets/hello.json"], &["-wait", "10"]);
        assert!(status.success());
    }
    for child in [&mut server, &mut proxy] {
        child.kill().unwrap();
        child.wait().unwrap();
    }
}

#[test]
fn a_hangup_ends_a_program_in_order_and_an_ignored_one_does_not() {
    let (mut orderly, _) = proxy(&[]);
    orderly.signal(Signal::HUP);
    assert_eq!(orderly.end().code(), Some(0), "{}", orderly.report());
    orderly.warning("stopped after 0 messages");

    let mut command = Command::new("nohup");
    command.arg(binary("revproc")).args(["-port", "0"]);
    let mut proxy = Program::run(command);
    let port = last_port(&proxy.line("Running the reverse proxy on port "));
    let mut command = Command::new("nohup");
    let to = port.to_string();
    let arguments = ["-id", "1", "-pp", "PP_1", "-listen", "0", "-revproc", &to];
    command.arg(binary("server")).args(arguments);
    let mut server = Program::run(command);
    proxy.line("Receiving setup message");
    for program in [&server, &proxy] {
        program.signal(Signal::HUP);
    }
    // They would stop within 10 s, and take no more connections at once.
    thread::sleep(Duration::from_millis(300));
    let (status, out, _) = client(port, &["packets/hello.json"], &[]);
    assert!(status.success(), "{out:#?}");
    for program in [&mut server, &mut proxy] {
        program.signal(Signal::TERM);
        assert_eq!(program.end().code(), Some(0), "{}", program.report());
    }
}
