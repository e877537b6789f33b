//! Messages from clients reach servers, in turn, and their acks come back.

mod support;

use support::{Peer, client, message, proxy, registered};

#[test]
fn five_messages_and_two_servers_go_1_2_1_2_1() {
    let proxy = proxy(&[]);
    let _one = registered("1", "PP_1", &proxy, &[]);
    let _two = registered("2", "PP_1", &proxy, &[]);
    let file = "packets/hello.json";
    let (status, out, _) = client(proxy.1, &[file; 5], &[]);
    assert!(status.success());
    let servers: Vec<_> = out
        .iter()
        .filter_map(|line| line.strip_prefix("Receiving a response from the server "))
        .filter_map(|line| line.split(' ').next())
        .collect();
    assert_eq!(servers, ["1", "2", "1", "2", "1"]);
    assert_eq!(out.iter().filter(|line| *line == "Hash of payload is correct").count(), 5);
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
