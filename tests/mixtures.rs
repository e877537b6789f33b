//! Our programs work with other people's: the tutorial's, and those of the homework's readers.

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::channel;
use std::thread;
use std::time::Instant;

use revproc::client::{self, Client};
use revproc::protocol::{Id, hash};

use crate::support::peers::{
    HOMEWORK, Habits, HomeworkServer, INTEGERS, ProxyHabits, Reserved, SerialProxy, TUTORIAL,
    serve, text, tutorial_client, tutorial_proxy,
};
use crate::support::{BOUND, Peer, Program, message, proxy, server};

/// Text that other programs write in escapes.
const PAYLOAD: &str = "Grüße, 世界 🦀 \"quoted\" back\\slash";

/// A proxy, and what tells that the next server is registered with it.
enum Proxy {
    Tutorials(SerialProxy),
    Ours(Program, u16),
}

impl Proxy {
    fn start(is_ours: bool) -> Self {
        if is_ours {
            let (program, port) = proxy(&[]);
            Proxy::Ours(program, port)
        } else {
            Proxy::Tutorials(tutorial_proxy())
        }
    }

    fn port(&self) -> u16 {
        match self {
            Proxy::Tutorials(proxy) => proxy.port,
            Proxy::Ours(_, port) => *port,
        }
    }

    fn wait_for(&self, id: &str) {
        match self {
            Proxy::Tutorials(proxy) => assert_eq!(proxy.next_registered(), id),
            Proxy::Ours(program, _) => {
                program.line(&format!("Receiving setup message from server id {id} "));
            }
        }
    }
}

/// A server that ends with this value.
enum Server {
    Tutorials(#[expect(dead_code, reason = "held")] HomeworkServer),
    Ours(#[expect(dead_code, reason = "held")] Program),
}

/// Starts a server that listens and is registered.
fn start_server(is_ours: bool, id: &str, proxy: &Proxy) -> Server {
    if is_ours {
        let (program, _) = server(id, "PP_1", proxy.port(), &["-strings"]);
        proxy.wait_for(id);
        return Server::Ours(program);
    }
    // The tutorial's proxy fails a message that comes before the server listens.
    let (registered, may_listen) = channel();
    let (sender, listens) = channel();
    let server = HomeworkServer::start_with(id, "PP_1", proxy.port(), TUTORIAL, move |reserved| {
        may_listen.recv_timeout(BOUND).unwrap();
        let listener = reserved.listen();
        sender.send(()).unwrap();
        listener
    });
    proxy.wait_for(id);
    registered.send(()).unwrap();
    listens.recv_timeout(BOUND).unwrap();
    Server::Tutorials(server)
}

/// Two messages from a client, of which two servers get one each.
fn deliver(is_ours: bool, proxy: u16) {
    if !is_ours {
        for id in ["1", "2"] {
            assert_eq!(text(&tutorial_client(proxy, "PP_1", PAYLOAD)["srcid"]), id);
        }
        return;
    }
    let (status, out, err) = crate::support::client(proxy, &["packets/tutorial.json"; 2], &[]);
    assert!(status.success(), "{out:#?}{err:#?}");
    for id in ["1", "2"] {
        let response = format!("Receiving a response from the server {id} payload: ");
        assert!(out.iter().any(|line| line.starts_with(&response)), "{out:#?}");
    }
    assert_eq!(out.iter().filter(|line| *line == "Hash of payload is correct").count(), 2);
}

fn mix(our_proxy: bool, our_server: bool, our_client: bool) {
    let proxy = Proxy::start(our_proxy);
    let _one = start_server(our_server, "1", &proxy);
    let _two = start_server(our_server, "2", &proxy);
    deliver(our_client, proxy.port());
}

#[test]
fn the_tutorials_proxy_server_and_client() {
    mix(false, false, false);
}

#[test]
fn our_client_with_the_tutorials_proxy_and_server() {
    mix(false, false, true);
}

#[test]
fn our_server_with_the_tutorials_proxy_and_client() {
    mix(false, true, false);
}

#[test]
fn our_server_and_client_with_the_tutorials_proxy() {
    mix(false, true, true);
}

#[test]
fn our_proxy_with_the_tutorials_server_and_client() {
    mix(true, false, false);
}

#[test]
fn our_proxy_and_client_with_the_tutorials_server() {
    mix(true, false, true);
}

#[test]
fn our_proxy_and_server_with_the_tutorials_client() {
    mix(true, true, false);
}

#[test]
fn our_proxy_server_and_client() {
    mix(true, true, true);
}

/// Our proxy serves both our client and the tutorial's from a server of these habits.
fn our_proxy_understands(habits: Habits) {
    let (proxy, port) = proxy(&[]);
    let server = HomeworkServer::start("7", "PP_1", port, habits);
    proxy.line(&format!(
        "Receiving setup message from server id 7 privacy policy PP_1 port {}",
        server.port
    ));
    for file in ["packets/hello.json", "packets/tutorial.json"] {
        let (status, out, err) = crate::support::client(port, &[file; 3], &[]);
        assert!(status.success(), "{out:#?}{err:#?}");
        let answered = "Receiving a response from the server 7 payload: ";
        assert_eq!(out.iter().filter(|line| line.starts_with(answered)).count(), 3);
        assert_eq!(out.iter().filter(|line| *line == "Hash of payload is correct").count(), 3);
    }
    tutorial_client(port, "PP_1", PAYLOAD);
    let warnings = proxy.err();
    assert!(!warnings.iter().any(|line| line.contains("no ack")), "{warnings:#?}");
}

#[test]
fn a_server_that_writes_integers() {
    our_proxy_understands(INTEGERS);
}

#[test]
fn a_setup_packet_with_the_data_packets_spelling_of_the_policy() {
    our_proxy_understands(Habits {
        setup: |id, policy, port| {
            format!(r#"{{"type": 1, "id": {id}, "privPoliId": "{policy}", "listenport": {port}}}"#)
        },
        ..INTEGERS
    });
}

#[test]
fn a_server_that_waits_for_any_answer_before_it_listens() {
    our_proxy_understands(Habits { waits_for_an_answer: true, ..INTEGERS });
}

#[test]
fn a_server_that_takes_one_message_per_connection() {
    our_proxy_understands(Habits { closes_after_a_message: true, ..INTEGERS });
}

#[test]
fn a_server_that_answers_an_integer_id_as_a_string() {
    our_proxy_understands(Habits {
        ack: |id, client, hash| {
            let client = client.to_string().replace('"', "");
            format!(
                r#"{{"type": 2, "srcid": "{id}", "destid": "{client}", "payloadsize": 40, "payload": "{hash}"}}"#
            )
        },
        ..INTEGERS
    });
}

#[test]
fn a_server_that_is_started_again_is_tried_until_it_listens_as_at_its_first_start() {
    let (proxy, port) = proxy(&["-reply-timeout", "1"]);
    let (sender, may_listen) = channel::<()>();
    let server = HomeworkServer::start_with("7", "P", port, TUTORIAL, move |reserved| {
        may_listen.recv_timeout(BOUND).unwrap();
        reserved.listen()
    });
    let send = || {
        let mut client = Peer::connect(port);
        client.send(message("50", "P", "hello"));
        client
    };
    proxy.line("Receiving setup message from server id 7 ");
    // Until it should listen.
    let end = Instant::now() + BOUND;
    while send().packet()["code"] != "unreachable" {
        assert!(Instant::now() < end);
    }
    proxy.warning("set aside");
    let mut setup = Peer::connect(port);
    setup.send((TUTORIAL.setup)("7", "P", server.port));
    assert_eq!(setup.packet()["payload"], "registered");
    let before = proxy.err().len();
    let mut client = send();
    proxy.wait("it is tried again", |_, err| {
        err[before..].iter().any(|line| line.ends_with("trying again")).then_some(())
    });
    sender.send(()).unwrap();
    assert_eq!(text(&client.packet()["type"]), "2");
}

/// Our client gets each message verified through a proxy of these habits, by our server and by one of
/// the homework's.
fn our_client_and_server_understand(habits: ProxyHabits) {
    let proxy = SerialProxy::of(habits);
    let (_server, _) = server("1", "PP_1", proxy.port, &[]);
    assert_eq!(proxy.next_registered(), "1");
    let files = ["packets/hello.json", "packets/scripts.json", "packets/hello.json"];
    let verified = |servers: &[&str]| {
        let (status, out, err) = crate::support::client(proxy.port, &files, &[]);
        assert!(status.success(), "{out:#?}{err:#?}");
        let correct = out.iter().filter(|line| *line == "Hash of payload is correct");
        assert_eq!(correct.count(), files.len(), "{out:#?}");
        for server in servers {
            let answered = format!("Receiving a response from the server {server} payload: ");
            assert!(out.iter().any(|line| line.starts_with(&answered)), "{out:#?}");
        }
    };
    verified(&["1"]);
    if habits.spelling == HOMEWORK.spelling {
        let _other = HomeworkServer::start("2", "PP_1", proxy.port, INTEGERS);
        assert_eq!(proxy.next_registered(), "2");
        verified(&["1", "2"]);
    }
}

#[test]
fn a_proxy_that_acks_twice() {
    our_client_and_server_understand(ProxyHabits { acks: 2, ..HOMEWORK });
}

#[test]
fn a_proxy_that_answers_one_message_per_connection_and_holds_it_open() {
    our_client_and_server_understand(ProxyHabits { answers_one: true, ..HOMEWORK });
}

#[test]
fn a_proxy_that_reads_the_data_packets_spelling_of_the_policy_only() {
    our_client_and_server_understand(ProxyHabits { spelling: "privPoliId", ..HOMEWORK });
}

#[test]
fn a_client_that_keeps_its_connection_checks_it_before_it_uses_it_again() {
    for (acks, connections) in [(1, 1), (2, 3)] {
        let listener = Reserved::any().listen();
        let port = listener.local_addr().unwrap().port();
        let accepted = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&accepted);
        let _proxy = serve(listener, move |stage, stream| {
            count.fetch_add(1, Ordering::SeqCst);
            while let Some(message) = stage.recv(stream) {
                let hash = hash(message["payload"].as_str().unwrap());
                let ack = (INTEGERS.ack)("1", &message["srcid"], &hash);
                (&*stream).write_all(ack.repeat(acks).as_bytes()).unwrap();
            }
        });
        let proxy = port.to_string().parse().unwrap();
        let mut client = Client::new(client::Settings::new(Id::from_text("50"), vec![proxy]));
        for payload in ["one", "two", "three"] {
            assert_eq!(client.call("PP_1", payload).unwrap().server, "1");
        }
        assert_eq!(accepted.load(Ordering::SeqCst), connections, "{acks} acks");
    }
}

#[test]
fn a_foreign_refusal_is_shown_in_its_own_words_and_a_client_that_waits_goes_on() {
    let proxy = SerialProxy::start("");
    let (status, out, _) = crate::support::client(proxy.port, &["packets/hello.json"], &[]);
    assert_eq!(status.code(), Some(1));
    let words = "No server currently serving this privacy policy";
    assert_eq!(out.last().unwrap(), &format!("Message not delivered: {words}"));
    let port = proxy.port.to_string();
    let options = ["-id", "50", "-revproc", &port, "-pkt", "packets/hello.json", "-wait", "20"];
    let mut waiting = Program::start("client", &options);
    waiting.warning(&format!("client: {words}; trying again"));
    let (_server, _) = server("1", "PP_1", proxy.port, &[]);
    assert_eq!(proxy.next_registered(), "1");
    assert!(waiting.end().success(), "{}", waiting.report());
}

#[test]
fn clients_at_once_share_a_server_that_serves_one_connection_at_a_time() {
    let (proxy, port) = proxy(&[]);
    let _server = HomeworkServer::start("7", "PP_1", port, TUTORIAL);
    proxy.line("Receiving setup message from server id 7 ");
    let clients: Vec<_> = (0..16)
        .map(|client| {
            thread::spawn(move || {
                for message in 0..4 {
                    let payload = format!("message {message} of client {client}");
                    tutorial_client(port, "PP_1", &payload);
                }
            })
        })
        .collect();
    clients.into_iter().for_each(|client| client.join().unwrap());
}

#[test]
fn a_message_between_a_servers_registration_and_its_listening_is_delivered() {
    let (proxy, port) = proxy(&[]);
    let (sender, may_listen) = channel::<()>();
    let _server = HomeworkServer::start_with("7", "PP_1", port, TUTORIAL, move |reserved| {
        may_listen.recv_timeout(BOUND).unwrap();
        reserved.listen()
    });
    proxy.line("Receiving setup message from server id 7 ");
    let client = thread::spawn(move || tutorial_client(port, "PP_1", PAYLOAD));
    // The server was tried, and refused, before it listens.
    proxy.warning("connection refused; trying again");
    sender.send(()).unwrap();
    client.join().unwrap();
}
