//! A program that stood still, suspended or on a machine without time for it, takes what came meanwhile,
//! though it looks at it only when the time for it is over.

use std::net::TcpListener;
use std::thread;
use std::time::Duration;

use revproc::protocol::hash;
use serde_json::json;

use crate::support::fake::{Fake, Manner};
use crate::support::leased::{Answer, Leased};
use crate::support::{Peer, Program, Signal, message, message_with, proxy, server};

/// The timeouts of the programs here.
const TIME: Duration = Duration::from_secs(1);
const SECOND: &str = "1";

/// How long a server works on a message: the proxy stands still before that is over.
const WORK: Duration = Duration::from_millis(500);

/// Has a program stand still for more than `time` after what is done meanwhile.
fn suspend(program: &Program, time: Duration, meanwhile: impl FnOnce()) {
    program.stand_still();
    meanwhile();
    thread::sleep(time + Duration::from_millis(300));
    program.signal(Signal::CONT);
}

/// Sends a message to this program, and another one each before and in the midst of which it stands still.
fn assert_takes_what_came(program: &Program, port: u16) {
    let packet = message("50", "PP_1", "x");
    let (begin, end) = packet.split_at(packet.len() / 2);
    let mut client = Peer::connect(port);
    client.send(&packet);
    assert_eq!(client.packet()["type"], 2);
    suspend(program, TIME, || client.send(packet.clone() + begin));
    assert_eq!(client.packet()["type"], 2);
    suspend(program, TIME, || client.send(end));
    assert_eq!(client.packet()["type"], 2);
    assert_eq!(program.complaints(), [""; 0]);
}

#[test]
fn a_proxy_takes_messages_that_came_while_it_stood_still() {
    let proxy = proxy(&["-quiet", "-idle-timeout", SECOND, "-packet-timeout", SECOND]);
    let _server = Leased::start("1", "PP_1", proxy.1, |_| Answer::Ack);
    assert_takes_what_came(&proxy.0, proxy.1);
}

#[test]
fn a_server_takes_messages_that_came_while_it_stood_still() {
    let proxy = proxy(&["-quiet"]);
    let more = ["-quiet", "-idle-timeout", SECOND, "-packet-timeout", SECOND];
    let (server, port) = server("1", "PP_1", proxy.1, &more);
    assert_takes_what_came(&server, port);
}

#[test]
fn acks_that_came_while_the_proxy_stood_still_reach_their_clients() {
    let proxy = proxy(&["-message-timeout", SECOND]);
    let with_lease = Leased::start("1", "leased", proxy.1, |_| Answer::Late(WORK));
    let without = Fake::unleased("2", "unleased", proxy.1, Manner::Late(WORK));
    // Many, since any of them may be quicker than what gives its message up.
    let policies = [&["leased"; 8][..], &["unleased"]].concat();
    let mut clients: Vec<_> = policies
        .iter()
        .map(|policy| {
            let mut client = Peer::connect(proxy.1);
            client.send(message_with("50", policy, "x", r#""once":true"#));
            client
        })
        .collect();
    with_lease.wait_for(8);
    proxy.0.line("Forwarding a data message to server id 2");
    suspend(&proxy.0, TIME, || without.wait_for_answers(1));
    for (client, policy) in clients.iter_mut().zip(policies) {
        let answer = client.packet();
        assert_eq!(answer["type"], 2, "{policy}: {answer}");
    }
}

#[test]
fn a_client_takes_an_answer_that_came_while_it_stood_still() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port().to_string();
    let options = ["-id", "50", "-revproc", &port, "-pp", "PP_1", "-text", "x", "-timeout", SECOND];
    let mut client = Program::start("client", &options);
    let mut proxy = Peer::new(listener.accept().unwrap().0);
    assert_eq!(proxy.packet()["type"], 0);
    let ack = json!({"type": 2, "srcid": 1, "destid": 50, "payload": hash("x")});
    // It waits 5 s longer than the message's time.
    suspend(&client, TIME + Duration::from_secs(5), || proxy.send(ack.to_string()));
    assert_eq!(client.end().code(), Some(0), "{}", client.report());
}
