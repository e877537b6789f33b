//! A server that hangs costs nobody a message: its lease runs out, and others take over. A message's
//! time is its own, and is never longer for those that wait with it.

use std::net::{TcpListener, TcpStream};
use std::ops::Range;
use std::sync::Mutex;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::support::leased::{Answer, Leased};
use crate::support::load::Load;
use crate::support::stopwatch::Stopwatch;
use crate::support::{BOUND, Peer, Program, Signal, message, message_with, proxy, registered};

const IDS: [&str; 6] = ["1", "2", "3", "4", "5", "6"];

/// Stops all but one of so many servers under load, and goes on until their leases have run out.
fn nothing_is_refused_while_one_lives(servers: usize) {
    let proxy = proxy(&["-quiet"]);
    let start = |id: &&'static str| registered(id, "PP_1", &proxy, &["-quiet"]);
    let servers: Vec<_> = IDS[..servers].iter().map(start).collect();
    let watch = Stopwatch::start();
    let load = Load::start(proxy.1, "PP_1", 16, Duration::from_millis(1));
    load.wait("every server's acks", |account| account.by_server.len() == servers.len());
    let hung = &servers[1..];
    hung.iter().for_each(|server| server.signal(Signal::STOP));
    proxy.0.wait("the leases to run out", |_, err| {
        let out = err.iter().filter(|line| line.contains("has left: its lease was not renewed"));
        (out.count() == hung.len()).then_some(())
    });
    let before = load.account().acked;
    load.wait("acks of the one that lives", |account| account.acked > before + 100);
    let account = load.finish();
    hung.iter().for_each(|server| server.signal(Signal::CONT));
    assert!(account.complaints().is_empty(), "{account:#?}");
    watch.assert_took(account.longest, Duration::from_secs(4), account);
}

#[test]
fn nothing_is_refused_while_five_of_six_servers_hang() {
    nothing_is_refused_while_one_lives(6);
}

#[test]
fn nothing_is_refused_while_one_of_two_servers_hangs() {
    nothing_is_refused_while_one_lives(2);
}

/// A server that keeps its lease and says nothing.
fn silent(policy: &str, proxy: u16) -> Leased {
    Leased::start("1", policy, proxy, |_| Answer::Skip)
}

fn x(policy: &str) -> String {
    message("50", policy, "x")
}

/// Sends messages together, and returns the replies. Each must come this long after that.
fn replies(proxy: u16, messages: &[String], after: Range<Duration>) -> Vec<Value> {
    let mut client = Peer::connect(proxy);
    let since = Stopwatch::start();
    client.send(messages.concat());
    let replies = messages.iter().map(|_| {
        let reply = client.packet();
        since.assert_between(after.clone());
        reply
    });
    replies.collect()
}

#[test]
fn messages_that_come_together_have_their_time_together() {
    let proxy = proxy(&["-message-timeout", "2"]);
    let _silent = silent("PP_1", proxy.1);
    let after = Duration::from_millis(1900)..Duration::from_millis(2500);
    for refusal in replies(proxy.1, &vec![x("PP_1"); 5], after) {
        assert_eq!(refusal["code"], "timeout", "{refusal}");
    }
}

#[test]
fn a_message_behind_a_hung_server_is_not_sent_later_for_it() {
    let proxy = proxy(&["-message-timeout", "2"]);
    let _silent = silent("PP_1", proxy.1);
    let other = Leased::start("2", "PP_2", proxy.1, |_| Answer::Ack);
    let mut client = Peer::connect(proxy.1);
    let since = Stopwatch::start();
    client.send(x("PP_1") + &x("PP_1") + "{}\n" + &x("PP_2"));
    other.wait_for(1);
    since.assert_within(Duration::from_secs(1));
    for code in ["timeout", "timeout", "bad-packet"] {
        assert_eq!(client.packet()["code"], code);
    }
    assert_eq!(client.packet()["srcid"], 2);
    since.assert_within(Duration::from_millis(2500));
}

/// Whether the proxy knows an option.
fn has_option(name: &str) -> bool {
    let mut help = Program::start("revproc", &["--help"]);
    help.end();
    help.out().iter().any(|line| line.contains(name))
}

#[test]
fn a_message_may_have_a_time_of_its_own_up_to_the_proxys_maximum() {
    let is_refused = |options: &[&str], seconds: &str, after: Range<u64>| {
        let proxy = proxy(options);
        let _silent = silent("PP_1", proxy.1);
        let more = format!(r#""timeout": {seconds}"#);
        let after = Duration::from_millis(after.start)..Duration::from_millis(after.end);
        let refusal = replies(proxy.1, &[message_with("50", "PP_1", "x", &more)], after);
        assert_eq!(refusal[0]["code"], "timeout", "{refusal:?}");
    };
    for one in ["1", "\"1\""] {
        is_refused(&["-message-timeout", "10"], one, 950..1500);
    }
    if !has_option("max-timeout") {
        return;
    }
    let options = ["-message-timeout", "1", "-max-timeout", "2"];
    for long in ["60", "18446744073709551615"] {
        is_refused(&options, long, 1950..2500);
    }
}

#[test]
fn what_a_lapsed_server_has_not_acked_goes_to_others_at_once_and_that_is_no_try() {
    let proxy = proxy(&["-tries", "1", "-quiet"]);
    let silent = silent("PP_1", proxy.1);
    let _good = registered("2", "PP_1", &proxy, &["-quiet"]);
    silent.stop_renewing();
    let since = Instant::now();
    for reply in replies(proxy.1, &vec![x("PP_1"); 8], Duration::ZERO..Duration::from_secs(4)) {
        assert_eq!(reply["srcid"], 2, "{reply}");
    }
    assert!(!silent.taken().is_empty(), "every other turn was its own");
    proxy.0.warning("has left: its lease was not renewed");
    assert!(since.elapsed() > Duration::from_secs(1), "{:?}", since.elapsed());
}

/// A server whose host answers no request to connect, as with its queue full the kernel does, and what
/// fills the queue.
fn unreachable() -> (TcpListener, Vec<TcpStream>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    rustix::net::listen(&listener, 0).unwrap();
    let brief = Duration::from_millis(50);
    let filling = std::iter::from_fn(|| TcpStream::connect_timeout(&address, brief).ok()).collect();
    (listener, filling)
}

#[test]
fn a_message_whose_connection_is_still_being_made_when_the_lease_runs_out_goes_on_at_once() {
    let proxy = proxy(&["-connect-timeout", "8"]);
    let (listener, _filling) = unreachable();
    let mut setup = Peer::connect(proxy.1);
    let port = listener.local_addr().unwrap().port();
    setup.send(format!(r#"{{"type":1,"id":1,"privPolyId":"PP_1","listenport":{port},"lease":1}}"#));
    setup.packet();
    let _good = registered("2", "PP_1", &proxy, &["-quiet"]);
    let reply = replies(proxy.1, &[x("PP_1")], Duration::ZERO..Duration::from_secs(3));
    assert_eq!(reply[0]["srcid"], 2, "{reply:?}");
    proxy.0.line("Forwarding a data message to server id 2");
    proxy.0.warning("trying the message of client 50 at server 2");
}

#[test]
fn a_server_with_a_lease_has_all_of_a_messages_time_though_it_waited_there() {
    // Two connections to a server, and one second for those without a lease.
    let proxy = proxy(&["-max-connections", "8", "-reply-timeout", "1"]);
    let (sender, fails) = channel::<()>();
    let fails = Mutex::new(fails);
    let server = Leased::start("1", "PP_1", proxy.1, move |taken| {
        if taken.number > 0 {
            return Answer::Late(Duration::from_millis(1500));
        }
        fails.lock().unwrap().recv_timeout(BOUND).unwrap();
        Answer::WrongHash
    });
    let once = |payload: &str| message_with("50", "PP_1", payload, r#""once": true"#);
    let mut clients = ["a", "b", "c", "d"].map(|payload| {
        let mut client = Peer::connect(proxy.1);
        client.send(once(payload));
        proxy.0.line(&format!(
            "Received a data message from client 50 privacy policy PP_1 payload: {payload}"
        ));
        if payload < "c" {
            proxy.0.line(&format!("Forwarding a data message to server id 1 payload: {payload}"));
            // So that the first is the one that fails.
            server.wait_for(if payload == "a" { 1 } else { 2 });
        }
        client
    });
    // One of those that wait takes its place, the other is asked to go elsewhere.
    sender.send(()).unwrap();
    assert_eq!(clients[0].packet()["code"], "outcome-unknown");
    for client in &mut clients[1..] {
        assert_eq!(client.packet()["srcid"], 1);
    }
}

#[test]
fn a_once_message_at_a_server_whose_lease_runs_out_is_refused_as_outcome_unknown() {
    let proxy = proxy(&[]);
    let silent = silent("PP_1", proxy.1);
    silent.stop_renewing();
    let once = message_with("50", "PP_1", "x", r#""once": true"#);
    let after = Duration::ZERO..Duration::from_secs(4);
    let refusal = replies(proxy.1, &[once], after).swap_remove(0);
    assert_eq!(refusal["code"], "outcome-unknown", "{refusal}");
    assert!(refusal["payload"].as_str().unwrap().contains("server 1"), "{refusal}");
    assert_eq!(silent.taken().len(), 1);
}
