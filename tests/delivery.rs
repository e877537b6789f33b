//! Messages from clients reach servers, in turn, and their acks come back.

use std::collections::HashMap;
use std::io::Write;
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::Duration;

use revproc::protocol::hash;

use crate::support::peers::{Actor, Reserved, serve};
use crate::support::stopwatch::Stopwatch;
use crate::support::{
    BOUND, Peer, Program, client, client_with_input, fixed_port, message, proxy, registered, server,
};

/// The ids of the servers that answered a client, in order.
fn servers(out: &[String]) -> Vec<&str> {
    out.iter()
        .filter_map(|line| line.strip_prefix("Receiving a response from the server "))
        .filter_map(|line| line.split(' ').next())
        .collect()
}

/// How many messages a client found to have arrived intact.
fn verified(out: &[String]) -> usize {
    out.iter().filter(|line| *line == "Hash of payload is correct").count()
}

/// A data packet of exactly `length` bytes, and its payload.
fn packet_of(length: usize) -> (String, String) {
    let frame = r#"{"type":0,"srcid":7,"privPoliId":"PP_1","payload":""}"#;
    let payload = "x".repeat(length - frame.len());
    let packet = frame.replace(r#""""#, &format!("\"{payload}\""));
    assert_eq!(packet.len(), length);
    (packet, payload)
}

#[test]
fn five_messages_and_two_servers_go_1_2_1_2_1() {
    let proxy = proxy(&[]);
    let _one = registered("1", "PP_1", &proxy, &[]);
    let _two = registered("2", "PP_1", &proxy, &[]);
    let file = "packets/hello.json";
    let (status, out, _) = client(proxy.1, &[file; 5], &[]);
    assert!(status.success());
    assert_eq!(servers(&out), ["1", "2", "1", "2", "1"]);
    assert_eq!(verified(&out), 5);
}

#[test]
fn five_clients_and_two_servers_go_1_2_1_2_1() {
    let proxy = proxy(&[]);
    let _one = registered("1", "PP_1", &proxy, &[]);
    let _two = registered("2", "PP_1", &proxy, &[]);
    let turns: Vec<_> = (0..5)
        .map(|_| {
            let (_, out, _) = client(proxy.1, &["packets/hello.json"], &[]);
            servers(&out).join(" ")
        })
        .collect();
    assert_eq!(turns, ["1", "2", "1", "2", "1"]);
}

#[test]
fn three_servers_share_3000_messages_of_16_clients_equally() {
    const CLIENTS: usize = 16;
    const MESSAGES: usize = 3000;
    let proxy = proxy(&["-quiet"]);
    let _servers = ["1", "2", "3"].map(|id| registered(id, "PP_1", &proxy, &["-quiet"]));
    let port = proxy.1;
    let threads: Vec<_> = (0..CLIENTS)
        .map(|client| {
            thread::spawn(move || {
                let mut peer = Peer::connect(port);
                let mut counts = HashMap::new();
                for number in (client..MESSAGES).step_by(CLIENTS) {
                    let payload = format!("message {number} of client {client}");
                    peer.send(message(&client.to_string(), "PP_1", &payload));
                    let ack = peer.packet();
                    assert_eq!(ack["payload"], hash(&payload), "{ack}");
                    assert_eq!(ack["destid"], client, "{ack}");
                    *counts.entry(ack["srcid"].to_string()).or_insert(0) += 1;
                }
                counts
            })
        })
        .collect();
    let mut total = HashMap::<String, usize>::new();
    for (server, count) in threads.into_iter().flat_map(|thread| thread.join().unwrap()) {
        *total.entry(server).or_default() += count;
    }
    let share = MESSAGES / 3;
    assert_eq!(total, ["1", "2", "3"].map(|id| (id.to_owned(), share)).into());
}

#[test]
fn policies_have_rotations_of_their_own() {
    let proxy = proxy(&[]);
    let _servers = [("1", "A"), ("2", "A"), ("3", "B")]
        .map(|(id, policy)| registered(id, policy, &proxy, &[]));
    let mut peer = Peer::connect(proxy.1);
    let turns = ["A", "B", "A", "B", "A"].map(|policy| {
        peer.send(message("7", policy, "x"));
        peer.packet()["srcid"].clone()
    });
    assert_eq!(turns, [1, 3, 2, 3, 1]);
}

#[test]
fn a_peer_that_half_closes_after_its_message_is_answered() {
    let proxy = proxy(&[]);
    let _server = registered("1", "PP_1", &proxy, &[]);
    let mut peer = Peer::connect(proxy.1);
    peer.send(message("7", "PP_1", "x"));
    peer.half_close();
    let ack = peer.packet();
    assert_eq!((&ack["type"], &ack["destid"]), (&2.into(), &7.into()));
    assert_eq!(ack["payload"], "11f6ad8ec52a2984abaafd7c3b516503785c2072");
    assert_eq!(peer.line(), "");
}

#[test]
fn a_message_as_long_as_the_limit_is_delivered() {
    let proxy = proxy(&[]);
    let _server = registered("1", "PP_1", &proxy, &[]);
    let (packet, payload) = packet_of(4 << 20);
    let mut peer = Peer::connect(proxy.1);
    peer.send(packet);
    assert_eq!(peer.packet()["payload"], hash(&payload));
}

#[test]
fn a_message_longer_than_the_limit_is_refused_before_its_end_and_ends_the_connection() {
    let proxy = proxy(&[]);
    let _server = registered("1", "PP_1", &proxy, &[]);
    let (packet, _) = packet_of((4 << 20) + 2);
    let mut peer = Peer::connect(proxy.1);
    // One byte more than the limit, and still no end in sight.
    peer.send(&packet[..packet.len() - 1]);
    let refusal = peer.packet();
    assert_eq!((&refusal["type"], &refusal["code"]), (&3.into(), &"too-large".into()), "{refusal}");
    assert_eq!(peer.line(), "");
}

#[test]
fn a_message_that_comes_a_byte_at_a_time_is_delivered() {
    let proxy = proxy(&[]);
    let _server = registered("1", "PP_1", &proxy, &[]);
    let (packet, payload) = packet_of(64 << 10);
    let mut peer = Peer::connect(proxy.1);
    for byte in packet.bytes() {
        peer.send([byte]);
    }
    assert_eq!(peer.packet()["payload"], hash(&payload));
}

#[test]
fn packets_in_one_segment_are_answered_in_their_order() {
    let proxy = proxy(&[]);
    let _servers = ["1", "2", "3"].map(|id| registered(id, "PP_1", &proxy, &[]));
    let mut peer = Peer::connect(proxy.1);
    let clients: Vec<_> = (0..200).map(|client| client.to_string()).collect();
    // Every fifth is for a policy that nobody serves, and its refusal has its place among the acks.
    let policy = |at: usize| if at % 5 == 4 { "nobody's" } else { "PP_1" };
    let packets: Vec<_> = clients
        .iter()
        .enumerate()
        .map(|(at, client)| message(client, policy(at), &format!("from {client}")))
        .collect();
    peer.send(packets.concat());
    for (at, client) in clients.iter().enumerate() {
        let reply = peer.packet();
        assert_eq!(reply["destid"].to_string(), *client);
        if policy(at) == "PP_1" {
            assert_eq!(reply["payload"], hash(&format!("from {client}")));
        } else {
            assert_eq!(reply["code"], "no-server");
        }
    }
}

#[test]
fn whatever_payloadsize_says_the_payload_is_delivered() {
    let proxy = proxy(&[]);
    let _server = registered("1", "PP_1", &proxy, &[]);
    let mut peer = Peer::connect(proxy.1);
    let sizes = [
        "",
        r#""payloadsize":0,"#,
        r#""payloadsize":18446744073709551615,"#,
        r#""payloadsize":"999","#,
    ];
    for size in sizes {
        peer.send(format!(r#"{{"type":0,"srcid":7,{size}"privPoliId":"PP_1","payload":"text"}}"#));
        assert_eq!(peer.packet()["payload"], hash("text"), "{size}");
    }
    let warning = proxy.0.warning("says payloadsize 999, but its payload has 4 bytes");
    assert!(warning.starts_with("revproc: client 7 "), "{warning}");
}

#[test]
fn an_unknown_policy_is_refused_at_once_and_the_connection_goes_on() {
    let proxy = proxy(&[]);
    let _server = registered("1", "PP_1", &proxy, &[]);
    let mut peer = Peer::connect(proxy.1);
    let sent = Stopwatch::start();
    peer.send(message("7", "PP_9", "x"));
    let refusal = peer.packet();
    sent.assert_within(Duration::from_secs(1));
    let reason = "no server serves privacy policy \"PP_9\"";
    assert_eq!((&refusal["code"], &refusal["payload"]), (&"no-server".into(), &reason.into()));
    assert_eq!((&refusal["srcid"], &refusal["destid"]), (&0.into(), &7.into()));
    peer.send(message("7", "PP_1", "x"));
    assert_eq!(peer.packet()["payload"], hash("x"));
}

/// Registers a server that nobody can connect to, as long as the returned value lives.
fn register_dead(id: &str, proxy: &(Program, u16)) -> (Reserved, Peer) {
    let reserved = Reserved::any();
    // With a lease it is not taken for one that does not listen yet, and is not tried again.
    let setup = register(id, reserved.port, r#","lease":60"#, proxy);
    (reserved, setup)
}

#[test]
fn a_server_that_refuses_the_connection_is_passed_over() {
    let proxy = proxy(&[]);
    let _dead = register_dead("1", &proxy);
    let _two = registered("2", "PP_1", &proxy, &[]);
    let (status, out, _) = client(proxy.1, &["packets/hello.json"; 4], &[]);
    assert!(status.success(), "{out:#?}");
    assert_eq!(servers(&out), ["2"; 4]);
}

#[test]
fn where_no_server_can_be_reached_the_refusal_names_each() {
    let proxy = proxy(&[]);
    let dead = ["1", "2"].map(|id| (id, register_dead(id, &proxy)));
    let (status, out, _) = client(proxy.1, &["packets/hello.json"], &[]);
    assert_eq!(status.code(), Some(1));
    let line = out.last().unwrap();
    assert!(
        line.starts_with("Message not delivered: no server of privacy policy \"PP_1\" answered: ")
    );
    for (id, (reserved, _)) in &dead {
        let named = format!("server {id} (127.0.0.1:{}) connection refused", reserved.port);
        assert!(line.contains(&named), "{named}: {line}");
    }
    let mut peer = Peer::connect(proxy.1);
    peer.send(message("7", "PP_1", "x"));
    assert_eq!(peer.packet()["code"], "unreachable");
}

#[test]
fn a_well_formed_object_that_is_no_packet_is_refused_and_the_connection_goes_on() {
    let proxy = proxy(&[]);
    let _server = registered("1", "PP_1", &proxy, &[]);
    let mut peer = Peer::connect(proxy.1);
    let wrong = [
        ("{}", 0, "\"type\" is missing"),
        (r#"{"type":9,"srcid":7}"#, 7, "no packet has type 9"),
        (r#"{"type":0,"srcid":7,"payload":"x"}"#, 7, "\"privPoliId\" is missing"),
        (
            r#"{"type":0,"srcid":7,"privPoliId":"PP_1","payload":1}"#,
            7,
            "\"payload\" must be a string",
        ),
        (r#"{"type":0,"srcid":7,"privPoliId":"PP_1","payload":"\ud800"}"#, 7, "surrogate pair"),
        (r#"{"type":0,"srcid":7,"srcid":8}"#, 0, "\"srcid\" is given twice"),
        (r#"{"type":2,"srcid":7,"destid":8,"payload":""}"#, 7, "an ack only from a server"),
        (r#"{"type":1,"id":7,"privPolyId":"PP_1","listenport":70000}"#, 7, "65535"),
    ];
    for (packet, destid, reason) in wrong {
        peer.send(packet);
        let refusal = peer.packet();
        assert_eq!((&refusal["type"], &refusal["code"]), (&3.into(), &"bad-packet".into()));
        assert_eq!(refusal["destid"], destid, "{packet}: {refusal}");
        assert!(refusal["payload"].as_str().unwrap().contains(reason), "{packet}: {refusal}");
    }
    peer.send(message("7", "PP_1", "x"));
    assert_eq!(peer.packet()["payload"], hash("x"));
}

#[test]
fn a_server_whose_last_answer_fills_what_it_sends_at_once_goes_on() {
    let (_server, port) = server("1", "PP_1", fixed_port(), &[]);
    let mut peer = Peer::connect(port);
    peer.send("{}");
    let refusal = peer.line().len();
    // So many refusals in one burst that the last of them makes 64 KiB.
    let count = (64_usize << 10).div_ceil(refusal);
    peer.send("{}".repeat(count));
    for _ in 0..count {
        assert_eq!(peer.packet()["code"], "bad-packet");
    }
    peer.send(message("7", "PP_1", "x"));
    assert_eq!(peer.packet()["payload"], hash("x"));
}

#[test]
fn what_is_not_json_is_refused_and_ends_the_connection() {
    let proxy = proxy(&[]);
    let _server = registered("1", "PP_1", &proxy, &[]);
    for (junk, said) in [
        ("GET / HTTP/1.1\r\n\r\n", "this is HTTP"),
        ("[1]", "this is a JSON array"),
        ("hello", "not JSON"),
        ("{'type': 0}", "not JSON"),
        ("{\"type\": 0 // data\n}", "not JSON"),
        ("\u{feff}{}", "a byte order mark"),
    ] {
        let mut peer = Peer::connect(proxy.1);
        peer.send(message("7", "PP_1", "x") + junk);
        assert_eq!(peer.packet()["payload"], hash("x"), "what came whole before is answered");
        let refusal = peer.packet();
        assert_eq!((&refusal["type"], &refusal["code"]), (&3.into(), &"bad-packet".into()));
        assert!(refusal["payload"].as_str().unwrap().starts_with(said), "{refusal}");
        assert_eq!(peer.line(), "", "{junk:?} ends the connection");
    }
}

#[test]
fn a_packet_cut_off_by_the_end_of_the_stream_is_refused() {
    let proxy = proxy(&[]);
    let mut peer = Peer::connect(proxy.1);
    peer.send(r#"{"type":0,"#);
    peer.half_close();
    let refusal = peer.packet();
    assert_eq!(refusal["code"], "bad-packet");
    assert!(refusal["payload"].as_str().unwrap().contains("after 10 bytes"), "{refusal}");
    assert_eq!(peer.line(), "");
}

#[test]
fn a_client_that_does_not_reach_its_proxy_says_so_and_exits_with_1() {
    let nobody = Reserved::any();
    let (status, out, _) = client(nobody.port, &["packets/hello.json"], &[]);
    assert_eq!(status.code(), Some(1));
    assert_eq!(
        out,
        [format!(
            "Message not delivered: could not connect to the reverse proxy at 127.0.0.1:{}: \
             connection refused (is revproc running there?)",
            nobody.port
        )]
    );
}

#[test]
fn a_client_goes_on_after_a_message_that_was_refused() {
    let proxy = proxy(&[]);
    let _server = registered("1", "PP_1", &proxy, &[]);
    let packets = ["PP_1", "PP_9", "PP_1"].map(|policy| message("1", policy, "x"));
    let (status, out, _) = client_with_input(proxy.1, &packets.concat());
    assert_eq!(status.code(), Some(1));
    assert_eq!(verified(&out), 2);
    let refused = "Message not delivered: no server serves privacy policy \"PP_9\"";
    assert_eq!(out.iter().filter(|line| *line == refused).count(), 1);
}

#[test]
fn a_client_takes_its_packets_from_standard_input() {
    let proxy = proxy(&[]);
    let _server = registered("1", "PP_1", &proxy, &[]);
    let (status, out, _) = client_with_input(proxy.1, &message("1", "PP_1", "from a pipe"));
    assert_eq!(status.code(), Some(0), "{out:#?}");
    assert_eq!(verified(&out), 1);
    assert!(out[0].starts_with("Sending message from a pipe to privacy policy PP_1 "), "{out:#?}");
}

/// Registers a server that the test plays, with `more` fields in the setup packet; the connection
/// is to be kept as long as the registration, if that has a lease.
fn register(id: &str, port: u16, more: &str, proxy: &(Program, u16)) -> Peer {
    let mut setup = Peer::connect(proxy.1);
    setup.send(format!(r#"{{"type":1,"id":{id},"privPolyId":"PP_1","listenport":{port}{more}}}"#));
    assert_eq!(setup.packet()["payload"], "registered");
    setup
}

/// A server that tells the bytes that it gets, and answers each packet with `answer`.
fn recorder(answer: &'static str) -> (Actor, u16, Receiver<Vec<u8>>) {
    let listener = Reserved::any().listen();
    let port = listener.local_addr().unwrap().port();
    let (sender, bytes) = channel();
    let actor = serve(listener, move |stage, stream| {
        while let Some(packet) = stage.recv_bytes(stream, 64 << 10) {
            // Before the answer, which may be the end of the test.
            sender.send(packet).unwrap();
            (&*stream).write_all(answer.as_bytes()).unwrap();
        }
    });
    (actor, port, bytes)
}

#[test]
fn messages_and_acks_are_forwarded_byte_for_byte() {
    // Odd white space, an odd order, odd numbers and escapes, and fields that nobody knows.
    const MESSAGE: &str = "{\n\t\"payload\" : \"\\u00e9\\/ \\ud83e\\udd80\",\"note\":{\"b\":[1.0e+2,null],\"a\":{}},\r\n \
                           \"type\":\"0\",  \"privPolyId\":\"PP_1\",\"payloadsize\":\"007\" , \"srcid\":\"9\" }";
    const ACK: &str = "{ \"payload\":\"\\u00323cfc91e5efb52c39eb1fc5ba3be79af0bbcf55c\", \"x\" : -0.50,\t\"destid\" :9,\"srcid\":\"5\",\"type\": 2}";
    let proxy = proxy(&[]);
    for lease in ["", r#","lease":8"#] {
        let (_server, port, received) = recorder(ACK);
        let setup = register("5", port, lease, &proxy);
        for _ in 0..2 {
            let mut peer = Peer::connect(proxy.1);
            peer.send(format!(" \r\n{MESSAGE}\n\n"));
            assert_eq!(peer.line(), format!("{ACK}\n"));
            let received = received.recv_timeout(BOUND).unwrap();
            assert_eq!(String::from_utf8(received).unwrap(), format!("{MESSAGE}\n"));
        }
        drop(setup);
        if !lease.is_empty() {
            proxy.0.warning("server 5 of privacy policy PP_1 ");
        }
    }
}

#[test]
fn an_ack_with_another_hash_is_told_and_the_client_exits_with_1() {
    let proxy = proxy(&[]);
    let (_server, port, _received) = recorder(
        r#"{"type":2,"srcid":5,"destid":50,"payload":"0000000000000000000000000000000000000000"}"#,
    );
    register("5", port, "", &proxy);
    let (status, out, _) = client(proxy.1, &["packets/hello.json"], &[]);
    assert_eq!(status.code(), Some(1));
    assert_eq!(out.last().unwrap(), "Hash of payload is not correct");
}

#[test]
fn an_ack_whose_size_is_no_number_is_none() {
    let proxy = proxy(&[]);
    let mut peer = Peer::connect(proxy.1);
    for (size, code) in
        [("\"0\"", None), ("99", None), ("\"abc\"", Some("bad-ack")), ("-1", Some("bad-ack"))]
    {
        let ack = format!(
            r#"{{"type":2,"srcid":5,"destid":50,"payload":"{}","payloadsize":{size}}}"#,
            hash("x")
        );
        let (_server, port, _received) = recorder(Box::leak(ack.into_boxed_str()));
        register("5", port, "", &proxy);
        peer.send(message("50", "PP_1", "x"));
        let reply = peer.packet();
        assert_eq!(reply["code"].as_str(), code, "{size}: {reply}");
        let says = "field \"payloadsize\" must be a whole number, 0 or more, but is";
        assert_eq!(reply["payload"].as_str().unwrap().contains(says), code.is_some(), "{reply}");
    }
}

#[test]
fn an_ack_for_another_client_never_reaches_this_one() {
    let proxy = proxy(&[]);
    let (_server, port, _received) =
        recorder(r#"{"type":2,"srcid":5,"destid":51,"payload":"secret"}"#);
    register("5", port, "", &proxy);
    let mut peer = Peer::connect(proxy.1);
    peer.send(message("50", "PP_1", "x"));
    let refusal = peer.packet();
    assert_eq!(refusal["code"], "bad-ack", "{refusal}");
    assert!(!refusal.to_string().contains("secret"), "{refusal}");
    let _right = registered("6", "PP_1", &proxy, &[]);
    for _ in 0..2 {
        peer.send(message("50", "PP_1", "x"));
        assert_eq!((&peer.packet()["srcid"]), 6, "the next server takes it");
    }
}
