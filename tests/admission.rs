//! Who may do what: who is listened to, who may register and as what, and that nobody takes
//! everything.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::support::stopwatch::Stopwatch;
use crate::support::{
    BOUND, Peer, Program, message, message_with, proxy, registered, server, tcp_socket,
};

const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const ANYWHERE: [&str; 2] = ["-host", "0.0.0.0"];
const TOKEN: &str = "correct horse battery staple";

/// This machine's address in some network; nothing is sent to find it. A machine without one has
/// nobody beyond loopback to keep out, and its tests end early.
fn own_address() -> Option<IpAddr> {
    let socket = UdpSocket::bind("0.0.0.0:0").ok()?;
    socket.connect("192.0.2.1:9").ok()?;
    let own = socket.local_addr().ok()?.ip();
    (!own.is_loopback() && !own.is_unspecified()).then_some(own)
}

/// Connects from one of this machine's addresses to another.
fn connect(from: IpAddr, to: IpAddr, port: u16) -> Peer {
    let socket = tcp_socket();
    rustix::net::bind(&socket, &SocketAddr::new(from, 0)).unwrap();
    rustix::net::connect(&socket, &SocketAddr::new(to, port)).unwrap();
    Peer::new(TcpStream::from(socket))
}

fn setup(id: &str, policy: &str, port: u16, more: &str) -> String {
    format!(
        "{{\"type\":1,\"id\":\"{id}\",\"privPolyId\":\"{policy}\",\"listenport\":{port}{more}}}"
    )
}

fn token(token: &str) -> String {
    format!(",\"token\":\"{token}\"")
}

/// Sends a packet and returns the answer's code, or its payload where it is no refusal.
fn answer(peer: &mut Peer, packet: &str) -> String {
    peer.send(packet);
    let answer = peer.packet();
    let field = if answer["type"] == 3 { "code" } else { "payload" };
    answer[field].as_str().unwrap().to_owned()
}

/// A file in the folder that Cargo keeps for tests.
fn file(name: &str, content: &str) -> String {
    let path = format!("{}/{}_{name}", env!("CARGO_TARGET_TMPDIR"), std::process::id());
    std::fs::write(&path, content).unwrap();
    path
}

/// Reads a path of a proxy's status page.
fn status(proxy: &Program, path: &str) -> String {
    let line = proxy.line("Serving the status page on http://");
    let address = line.rsplit("http://").next().unwrap().trim_end_matches('/');
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(BOUND)).unwrap();
    write!(stream, "GET {path} HTTP/1.0\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

/// The addresses in the switching table.
fn registered_addresses(proxy: &Program) -> Vec<String> {
    let answer = status(proxy, "/table.json");
    let table: Value = serde_json::from_str(answer.split("\r\n\r\n").nth(1).unwrap()).unwrap();
    let policies = table["policies"].as_array().unwrap();
    policies
        .iter()
        .flat_map(|policy| policy["servers"].as_array().unwrap())
        .map(|server| server["address"].as_str().unwrap().to_owned())
        .collect()
}

#[test]
fn by_default_nothing_beyond_127_0_0_1_is_listened_on() {
    let proxy = proxy(&["-status", "0"]);
    let status_port = proxy.0.line("Serving the status page").trim_end_matches('/').to_owned();
    let status_port = status_port.rsplit(':').next().unwrap().parse().unwrap();
    let (_server, server_port) = server("1", "P", proxy.1, &[]);
    let others = own_address().into_iter().chain(["127.0.0.2".parse().unwrap()]);
    for address in others {
        for port in [proxy.1, server_port, status_port] {
            assert!(TcpStream::connect((address, port)).is_err(), "{address}:{port}");
            assert!(TcpStream::connect((LOOPBACK, port)).is_ok(), "{port}");
        }
    }
}

#[test]
fn without_a_token_only_this_host_may_register_and_the_proxy_says_so() {
    let proxy = proxy(&ANYWHERE);
    proxy.0.warning("servers may register from this host only, unless -token-file is given");
    let _server = registered("1", "P", &proxy, &[]);
    let Some(own) = own_address() else { return };
    let mut stranger = connect(own, own, proxy.1);
    for more in ["", ",\"lease\":8", &token(TOKEN)] {
        assert_eq!(answer(&mut stranger, &setup("1", "P", 1, more)), "not-allowed");
        assert_eq!(answer(&mut stranger, &setup("2", "P", 1, more)), "not-allowed");
    }
    // Whoever may not register may still send messages, and they all go to the real server.
    for _ in 0..5 {
        assert_eq!(
            answer(&mut stranger, &message("7", "P", "hello")),
            "aaf4c61ddcc5e8a2dabede0f3b482cd9aea9434d"
        );
    }
}

#[test]
fn with_a_token_file_only_those_who_know_the_token_may_register() {
    let tokens = file("token", &format!("{TOKEN}\nnot this line\n"));
    let proxy = proxy(&["-token-file", &tokens]);
    let mut peer = Peer::connect(proxy.1);
    let almost = &TOKEN[..TOKEN.len() - 1];
    for wrong in ["", &token(""), &token(almost), &token(&format!("{TOKEN} ")), ",\"token\":null"] {
        let answer = answer(&mut peer, &setup("1", "P", 1, wrong));
        assert!(["not-allowed", "bad-packet"].contains(&&*answer), "{wrong}: {answer}");
    }
    assert_eq!(answer(&mut peer, &message("7", "P", "x")), "no-server");
    let _server = registered("1", "P", &proxy, &["-token-file", &tokens]);
    let _strings = registered("2", "P", &proxy, &["-strings", "-token-file", &tokens]);
    assert_eq!(answer(&mut peer, &message("7", "P", "")), revproc::protocol::hash(""));
    let (mut outsider, _) = server("3", "P", proxy.1, &[]);
    outsider.warning("(not-allowed): registering here takes a token (-token-file)");
    assert_eq!(outsider.end().code(), Some(1));
}

#[test]
fn a_token_is_shown_nowhere() {
    let tokens = file("secret", TOKEN);
    let other = file("other", "another secret");
    let proxy = proxy(&["-token-file", &tokens, "-status", "0"]);
    let server = registered("1", "P", &proxy, &["-token-file", &tokens]);
    let (mut wrong, _) = crate::support::server("2", "P", proxy.1, &["-token-file", &other]);
    wrong.warning("(not-allowed)");
    wrong.end();
    let mut peer = Peer::connect(proxy.1);
    let mut told = String::new();
    let secret = token(TOKEN);
    for packet in [
        setup("3", "P", 1, &secret.repeat(2)),
        setup("3", "P", 0, &secret),
        setup("1", "P", 1, &secret),
        format!("{{\"type\":0{secret}}}"),
        format!("{{\"type\":7{secret}}}"),
        format!("{{\"type\":1{secret},}}"),
    ] {
        peer.send(packet);
        told += &peer.line();
    }
    assert_eq!(told.matches("\"type\":3").count(), 6, "{told}");
    for path in ["/", "/table.json", "/metrics"] {
        told += &status(&proxy.0, path);
    }
    for program in [&proxy.0, &server, &wrong] {
        told += &String::from_utf8_lossy(&program.raw());
    }
    for program in [&proxy.0, &server] {
        for file in ["cmdline", "environ", "comm"] {
            let bytes = std::fs::read(format!("/proc/{}/{file}", program.pid())).unwrap();
            told += &String::from_utf8_lossy(&bytes);
        }
    }
    for name in ["revproc", "server"] {
        let mut help = Program::start(name, &["-token-file", &tokens, "-help"]);
        help.end();
        told += &String::from_utf8_lossy(&help.raw());
    }
    assert!(!told.contains(TOKEN) && !told.contains("another secret"), "{told}");
    // Nor is its hash, by which guesses could be tried elsewhere.
    assert!(!told.contains(&revproc::protocol::hash(TOKEN)));
}

#[test]
fn a_token_file_without_a_token_is_refused_rather_than_taken_for_none() {
    let empty = file("empty", "\nsecond line\n");
    let binary = file("binary", "x");
    std::fs::write(&binary, b"\xff\xfe").unwrap();
    let own = ["-port", "0", "-token-file"];
    let servers = ["-id", "1", "-pp", "P", "-listen", "0", "-revproc", "1", "-token-file"];
    for (name, arguments) in [("revproc", &own[..]), ("server", &servers)] {
        for path in [&*empty, &binary, "/nowhere/at/all"] {
            let mut program = Program::start(name, &[arguments, &[path]].concat());
            assert_eq!(program.end().code(), Some(2), "{}", program.report());
            program.warning("token file ");
            assert!(program.out().is_empty());
        }
    }
}

#[test]
fn a_registration_names_the_address_that_it_came_from_and_no_other() {
    let tokens = file("address_token", TOKEN);
    let arguments = [&ANYWHERE[..], &["-token-file", &tokens, "-status", "0"]].concat();
    let proxy = proxy(&arguments);
    let more = token(TOKEN)
        + ",\"address\":\"192.0.2.9\",\"host\":\"192.0.2.9\",\"ip\":\"192.0.2.9\",\"listenhost\":\"192.0.2.9:5\"";
    let froms = own_address().into_iter().chain([LOOPBACK, "127.0.0.3".parse().unwrap()]);
    for from in froms {
        let mut peer = connect(from, LOOPBACK, proxy.1);
        assert_eq!(answer(&mut peer, &setup("1", "P", 4321, &more)), "registered");
        assert_eq!(registered_addresses(&proxy.0), [format!("{from}:4321")]);
    }
}

#[test]
fn the_table_takes_as_many_servers_and_policies_as_its_limits_say() {
    let proxy = proxy(&["-max-servers", "3", "-max-policies", "2"]);
    let mut peer = Peer::connect(proxy.1);
    let mut leased = Peer::connect(proxy.1);
    assert_eq!(answer(&mut leased, &setup("1", "A", 1, ",\"lease\":60")), "registered");
    assert_eq!(answer(&mut peer, &setup("1", "B", 1, "")), "registered");
    peer.send(setup("1", "C", 1, ""));
    let refusal = peer.packet();
    assert_eq!(refusal["code"], "overloaded");
    assert_eq!(refusal["payload"], "2 policies are served, which is the limit");
    assert_eq!(answer(&mut peer, &setup("2", "A", 1, "")), "registered");
    for id in 3..200 {
        peer.send(setup(&id.to_string(), "A", 1, ""));
        let refusal = peer.packet();
        assert_eq!(refusal["code"], "overloaded");
        assert_eq!(refusal["payload"], "3 servers are registered, which is the limit");
    }
    // Those who are in can renew, and who leaves makes room.
    assert_eq!(answer(&mut leased, &setup("1", "A", 1, ",\"lease\":60")), "registered");
    assert_eq!(answer(&mut peer, &setup("2", "A", 1, "")), "registered");
    leased.half_close();
    assert_eq!(leased.line(), "");
    assert_eq!(answer(&mut peer, &setup("3", "A", 1, "")), "registered");
    let long = "x".repeat(257);
    assert_eq!(answer(&mut peer, &setup(&long, "A", 1, "")), "bad-packet");
    assert_eq!(answer(&mut peer, &setup("1", &long, 1, "")), "bad-packet");
}

#[test]
fn in_a_full_table_a_server_that_is_gone_makes_room_and_an_idle_one_does_not() {
    let proxy = proxy(&["-max-servers", "2"]);
    let mut peer = Peer::connect(proxy.1);
    assert_eq!(answer(&mut peer, &setup("gone", "P", 1, "")), "registered");
    assert_eq!(answer(&mut peer, &setup("idle", "Q", 1, "")), "registered");
    assert_eq!(answer(&mut peer, &setup("new", "P", 1, ",\"lease\":60")), "overloaded");
    assert_eq!(answer(&mut peer, &message("7", "P", "x")), "unreachable");
    assert_eq!(answer(&mut peer, &setup("new", "R", 1, ",\"lease\":60")), "registered");
    proxy.0.warning("server gone of privacy policy P (127.0.0.1:1) has left: it was set aside");
    assert_eq!(answer(&mut peer, &message("7", "P", "x")), "no-server");
    assert_eq!(answer(&mut peer, &setup("gone", "P", 1, "")), "overloaded");
}

#[test]
fn a_message_is_not_served_by_what_comes_after_it() {
    let proxy = proxy(&[]);
    let mut peer = Peer::connect(proxy.1);
    // In one segment, so that the proxy sees both at once.
    peer.send(message("1", "P", "x") + &setup("1", "P", 9, ",\"lease\":8"));
    assert_eq!(peer.packet()["code"], "no-server");
    assert_eq!(peer.packet()["payload"], "registered");
}

#[test]
fn a_live_lease_is_not_pushed_out() {
    let proxy = proxy(&[]);
    let server = registered("1", "P", &proxy, &[]);
    let port = server.line("Listening on port ").rsplit(' ').next().unwrap().parse().unwrap();
    let thief = TcpListener::bind("127.0.0.1:0").unwrap();
    let thiefs = thief.local_addr().unwrap().port();
    let mut peer = Peer::connect(proxy.1);
    for more in ["", ",\"lease\":1", ",\"lease\":60"] {
        assert_eq!(answer(&mut peer, &setup("1", "P", thiefs, more)), "id-in-use");
        let mut elsewhere = connect("127.0.0.2".parse().unwrap(), LOOPBACK, proxy.1);
        assert_eq!(answer(&mut elsewhere, &setup("1", "P", port, more)), "id-in-use");
    }
    // Its own address without a lease, as a stranger on the same host may say, takes nothing away.
    assert_eq!(answer(&mut peer, &setup("1", "P", port, "")), "registered");
    assert_eq!(answer(&mut peer, &setup("1", "P", thiefs, "")), "id-in-use");
    // Nor does another lease on the same address that ends.
    let mut short = Peer::connect(proxy.1);
    assert_eq!(answer(&mut short, &setup("1", "P", port, ",\"lease\":1")), "registered");
    short.half_close();
    assert_eq!(short.line(), "");
    for _ in 0..5 {
        assert_eq!(answer(&mut peer, &message("7", "P", "")), revproc::protocol::hash(""));
    }
}

#[test]
fn the_proxy_is_not_registered_with_itself_under_any_of_its_addresses() {
    let tokens = file("circle_token", TOKEN);
    let anywhere = [&ANYWHERE[..], &["-token-file", &tokens]].concat();
    for arguments in [&["-token-file", &tokens][..], &anywhere, &["-host", "::"]] {
        let proxy = proxy(arguments);
        let more = token(TOKEN);
        let own = own_address().filter(|_| arguments[1] == "0.0.0.0");
        let addresses: Vec<_> = own.into_iter().chain([LOOPBACK]).collect();
        for from in &addresses {
            for to in &addresses {
                let mut peer = connect(*from, *to, proxy.1);
                peer.send(setup("1", "P", proxy.1, &more));
                let refusal = peer.packet();
                assert_eq!(refusal["code"], "not-allowed", "from {from} to {to} {arguments:?}");
                let reason = refusal["payload"].as_str().unwrap();
                assert!(reason.contains("is the proxy itself"), "{reason}");
            }
        }
    }
}

#[test]
fn a_circle_through_a_second_proxy_does_no_harm() {
    let arguments = ["-max-connections", "100", "-quiet", "-message-timeout", "1"];
    let one = proxy(&arguments);
    let two = proxy(&arguments);
    let _server = registered("1", "good", &one, &[]);
    let mut leases = [Peer::connect(one.1), Peer::connect(two.1)];
    assert_eq!(answer(&mut leases[0], &setup("2", "P", two.1, ",\"lease\":60")), "registered");
    assert_eq!(answer(&mut leases[1], &setup("1", "P", one.1, ",\"lease\":60")), "registered");
    let mut peer = Peer::connect(one.1);
    assert_eq!(answer(&mut peer, &message("7", "good", "")), revproc::protocol::hash(""));
    let before = [&one.0, &two.0].map(Program::descriptors);
    let begun = Stopwatch::start();
    peer.send(message("7", "P", "round and round"));
    let refusal = peer.packet();
    assert_eq!(refusal["type"], 3, "{refusal}");
    // The message may still go round, since each proxy gives it a time of its own; but newcomers are
    // served, and it takes no more than a quarter of the connections.
    let mut new = Peer::connect(one.1);
    assert_eq!(answer(&mut new, &message("7", "good", "")), revproc::protocol::hash(""));
    for (proxy, before) in [&one.0, &two.0].into_iter().zip(before) {
        assert!(proxy.descriptors() <= before + 2 * 25 + 10, "{}", proxy.report());
    }
    for lease in &mut leases {
        lease.send(message("7", "Q", "x"));
        assert_eq!(lease.packet()["code"], "no-server");
    }
    begun.assert_within(Duration::from_secs(5));
}

#[test]
fn a_client_that_pipelines_without_end_does_not_hold_up_others() {
    let proxy = proxy(&["-quiet"]);
    let _server = registered("1", "P", &proxy, &["-quiet"]);
    let stop = AtomicBool::new(false);
    let mut sending = TcpStream::connect((LOOPBACK, proxy.1)).unwrap();
    let mut receiving = sending.try_clone().unwrap();
    thread::scope(|scope| {
        scope.spawn(|| {
            let many = message("1", "P", "x").repeat(1000);
            while !stop.load(Ordering::Relaxed) {
                sending.write_all(many.as_bytes()).unwrap();
            }
            sending.shutdown(std::net::Shutdown::Write).unwrap();
        });
        let answers = scope.spawn(move || {
            let mut answers = Vec::new();
            receiving.read_to_end(&mut answers).unwrap();
            answers.iter().filter(|byte| **byte == b'\n').count()
        });
        let watch = Stopwatch::start();
        let slowest = slowest_of(100, || {
            // Connecting is part of it: a new client must get in, too.
            let mut peer = Peer::connect(proxy.1);
            assert_eq!(answer(&mut peer, &message("2", "P", "")), revproc::protocol::hash(""));
        });
        stop.store(true, Ordering::Relaxed);
        watch.assert_took(slowest, Duration::from_secs(1), "the slowest of all");
        let answers = answers.join().unwrap();
        assert!(answers >= 1000 && answers % 1000 == 0, "{answers}");
    });
}

fn slowest_of(times: usize, mut run: impl FnMut()) -> Duration {
    let timed = (0..times).map(|_| {
        let begun = Instant::now();
        run();
        begun.elapsed()
    });
    timed.max().unwrap()
}

#[test]
fn when_all_places_are_taken_nobody_connected_is_disturbed_and_the_next_waits_its_turn() {
    let proxy = proxy(&["-max-connections", "12", "-idle-timeout", "3"]);
    let _server = registered("1", "P", &proxy, &[]);
    let mut leased = Peer::connect(proxy.1);
    let renewal = setup("2", "Q", 1, ",\"lease\":3");
    // From then on it has a server's place.
    assert_eq!(answer(&mut leased, &renewal), "registered");
    let mut good = Peer::connect(proxy.1);
    let idle: Vec<_> = (0..12).map(|_| Peer::connect(proxy.1)).collect();
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let newcomer = scope.spawn(|| {
            let mut peer = Peer::connect(proxy.1);
            let answer = answer(&mut peer, &message("3", "P", ""));
            stop.store(true, Ordering::Relaxed);
            answer
        });
        while !stop.load(Ordering::Relaxed) && !newcomer.is_finished() {
            let begun = Stopwatch::start();
            assert_eq!(answer(&mut good, &message("2", "P", "")), revproc::protocol::hash(""));
            assert_eq!(answer(&mut leased, &renewal), "registered");
            begun.assert_within(Duration::from_secs(1));
            thread::sleep(Duration::from_millis(20));
        }
        assert_eq!(newcomer.join().unwrap(), revproc::protocol::hash(""));
    });
    drop(idle);
    let said = proxy.0.err().iter().filter(|line| line.contains("taken, 12 in all")).count();
    assert_eq!(said, 1, "once a minute at most");
    assert!(!proxy.0.err().iter().any(|line| line.contains("has left")), "a lease ended");
}

#[test]
#[cfg(target_os = "linux")]
fn a_proxy_that_gets_no_threads_serves_with_those_it_has_and_tries_again() {
    use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};

    let proxy = proxy(&[]);
    let _server = registered("1", "P", &proxy, &[]);
    let hash = revproc::protocol::hash("");
    assert_eq!(answer(&mut Peer::connect(proxy.1), &message("2", "P", "")), hash);
    let warnings = |err: &[String]| {
        err.iter().filter(|line| line.contains("could not start a thread for connections")).count()
    };
    let pid = Pid::from_raw(proxy.0.pid().try_into().unwrap());
    let usual = getrlimit(Resource::As);
    // Room for what else it needs, but not for another stack.
    let little = proxy.0.memory("VmSize") as u64 + (256 << 10);
    prlimit(pid, Resource::As, Rlimit { current: Some(little), ..usual }).unwrap();
    // More than there are threads: each is served when another one has ended, the first perhaps last.
    let many: Vec<_> = (0..16).map(|_| Peer::connect(proxy.1)).collect();
    thread::scope(|scope| {
        for mut peer in many {
            let hash = &hash;
            scope.spawn(move || assert_eq!(answer(&mut peer, &message("2", "P", "")), *hash));
        }
    });
    let warning = proxy.0.warning("could not start a thread for connections");
    assert!(warning.contains("the system gives no more threads"), "{warning}");
    // Now none of them ends, so that no thread comes back.
    let _idle: Vec<_> = (0..16).map(|_| Peer::connect(proxy.1)).collect();
    let before = warnings(&proxy.0.err());
    proxy.0.wait("two more lines", |_, err| (warnings(err) >= before + 2).then_some(()));
    prlimit(pid, Resource::As, usual).unwrap();
    let mut newcomer = Peer::connect(proxy.1);
    assert_eq!(answer(&mut newcomer, &message("2", "P", "")), hash);
}

#[test]
fn those_that_stay_are_served_beside_many_that_come_and_go() {
    let proxy = proxy(&[]);
    let _server = registered("1", "P", &proxy, &[]);
    let hash = revproc::protocol::hash("");
    let is_answered = |peer: &mut Peer| answer(peer, &message("2", "P", "")) == hash;
    let (stop, end) = (AtomicBool::new(false), Instant::now() + BOUND);
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) && Instant::now() < end {
                    assert!(is_answered(&mut Peer::connect(proxy.1)));
                }
            });
        }
        let watch = Stopwatch::start();
        let mut staying: Vec<_> = (0..200)
            .map(|_| {
                let mut peer = Peer::connect(proxy.1);
                let took = slowest_of(1, || assert!(is_answered(&mut peer)));
                watch.assert_took(took, Duration::from_secs(1), "one that stays");
                peer
            })
            .collect();
        stop.store(true, Ordering::Relaxed);
        assert!(staying.iter_mut().all(is_answered));
    });
}

#[test]
fn an_address_has_its_share_of_the_places_and_loopback_is_not_counted() {
    let Some(own) = own_address() else { return };
    let more = ["-max-per-address", "3", "-max-connections", "12", "-idle-timeout", "3"];
    let proxy = proxy(&[&ANYWHERE[..], &more].concat());
    let _server = registered("1", "P", &proxy, &[]);
    let right = revproc::protocol::hash("");
    let mut held: Vec<_> = (0..3).map(|_| connect(own, own, proxy.1)).collect();
    for peer in &mut held {
        assert_eq!(answer(peer, &message("1", "P", "")), right);
    }
    // Those beyond are refused at once, and do not take the places of others meanwhile.
    let mut beyond: Vec<_> = (0..40).map(|_| connect(own, own, proxy.1)).collect();
    let begun = Stopwatch::start();
    let mut near = Peer::connect(proxy.1);
    assert_eq!(answer(&mut near, &message("1", "P", "")), right);
    begun.assert_within(Duration::from_millis(800));
    for peer in &mut beyond {
        let refusal = peer.packet();
        assert_eq!(refusal["code"], "overloaded");
        assert_eq!(refusal["payload"], "too many connections from your address");
        assert_eq!(peer.line(), "");
    }
    let _more: Vec<_> = (0..5).map(|_| connect(LOOPBACK, LOOPBACK, proxy.1)).collect();
    assert_eq!(answer(&mut near, &message("1", "P", "")), right);
    // A place that is given up can be had again.
    held.clear();
    let end = Instant::now() + BOUND;
    while answer(&mut connect(own, own, proxy.1), &message("1", "P", "")) != right {
        assert!(Instant::now() < end);
    }
}

#[test]
fn servers_take_no_places_from_clients_and_find_their_own_beside_a_full_house() {
    let proxy = proxy(&["-max-connections", "3"]);
    let _early = ["1", "2", "3"].map(|id| registered(id, "P", &proxy, &["-quiet"]));
    let hash = revproc::protocol::hash("");
    let mut clients = [(); 3].map(|()| Peer::connect(proxy.1));
    for client in &mut clients {
        assert_eq!(answer(client, &message("7", "P", "")), hash);
    }
    let begun = Stopwatch::start();
    let _late = registered("4", "P", &proxy, &["-quiet"]);
    begun.assert_within(Duration::from_secs(1));
    // A client past the limit waits until one before it has ended.
    let mut next = Peer::connect(proxy.1);
    next.send(message("7", "P", ""));
    for client in &mut clients {
        assert_eq!(answer(client, &message("7", "P", "")), hash);
    }
    next.stream().set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    assert!(next.stream().peek(&mut [0]).is_err(), "it is served though all places are taken");
    next.stream().set_read_timeout(Some(BOUND)).unwrap();
    let [first, ..] = clients;
    drop(first);
    assert_eq!(next.packet()["payload"], hash.as_str());
}

#[test]
fn a_setup_connection_that_sends_messages_takes_a_clients_place() {
    let proxy = proxy(&["-max-connections", "2", "-idle-timeout", "60"]);
    let _server = registered("1", "P", &proxy, &["-quiet"]);
    let hash = revproc::protocol::hash("");
    let mut both = [(); 3].map(|()| Peer::connect(proxy.1));
    for (id, peer) in both.iter_mut().enumerate() {
        assert_eq!(answer(peer, &setup(&id.to_string(), "Q", 1, ",\"lease\":60")), "registered");
    }
    let [first, second, third] = &mut both;
    for peer in [first, second] {
        assert_eq!(answer(peer, &message("7", "P", "")), hash);
    }
    third.send(message("7", "P", ""));
    third.stream().set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    assert!(third.stream().peek(&mut [0]).is_err(), "it is served though all places are taken");
    third.stream().set_read_timeout(Some(BOUND)).unwrap();
    let [first, _second, mut third] = both;
    drop(first);
    assert_eq!(third.packet()["payload"], hash.as_str());
}

#[test]
fn those_that_wait_for_a_place_keep_no_server_out_for_long() {
    let proxy = proxy(&["-max-connections", "2", "-message-timeout", "2"]);
    let _server = registered("1", "P", &proxy, &["-quiet"]);
    let hash = revproc::protocol::hash("");
    let mut clients = [(); 2].map(|()| Peer::connect(proxy.1));
    for client in &mut clients {
        assert_eq!(answer(client, &message("7", "P", "")), hash);
    }
    // Eight may say what they are, and these have.
    let mut waiting = [(); 8].map(|()| Peer::connect(proxy.1));
    let begun = Stopwatch::start();
    for client in &mut waiting {
        client.send(message_with("8", "P", "", "\"timeout\":60"));
    }
    assert_eq!(answer(&mut Peer::connect(proxy.1), &setup("2", "Q", 1, "")), "registered");
    begun.assert_within(Duration::from_secs(4));
    for client in &mut waiting {
        let refusal = client.packet();
        assert_eq!(refusal["code"], "overloaded", "{refusal}");
        assert_eq!(client.line(), "");
    }
    // These never do.
    let mut silent = [(); 8].map(|()| Peer::connect(proxy.1));
    let begun = Stopwatch::start();
    assert_eq!(answer(&mut Peer::connect(proxy.1), &setup("3", "Q", 1, "")), "registered");
    begun.assert_within(Duration::from_secs(8));
    assert!(silent.iter_mut().all(|client| client.line().is_empty()));
    for client in &mut clients {
        assert_eq!(answer(client, &message("7", "P", "")), hash);
    }
}

#[test]
fn a_server_that_a_full_proxy_answers_late_has_its_lease_then() {
    let proxy = proxy(&["-max-connections", "4"]);
    // The others have no place, and eight at a time may say what they are, for 5 s.
    let crowd: Vec<_> = (0..4 + 2 * 8).map(|_| Peer::connect(proxy.1)).collect();
    let (mut server, port) = server("1", "PP_1", proxy.1, &[]);
    server.warning("did not answer within 5 s");
    drop(crowd);
    proxy
        .0
        .line(&format!("Receiving setup message from server id 1 privacy policy PP_1 port {port}"));
    let mut client = Peer::connect(proxy.1);
    client.send(message("50", "PP_1", "x"));
    assert_eq!(client.packet()["type"], 2);
    server.kill();
    proxy.0.warning("has left: its connection was closed");
}
