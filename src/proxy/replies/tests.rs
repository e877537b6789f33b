use std::io::Read;
use std::net::TcpListener;

use std::thread;

use super::*;
use crate::cli::terminal::Terminal;
use crate::proxy::stats::Stats;

fn pair() -> (Arc<ReplyQueue>, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (stream, peer) = listener.accept().unwrap();
    let events = Arc::new(Events::new(Terminal::new("test", true), Stats::new(false)));
    let memory = Budget::new(usize::MAX);
    (ReplyQueue::new(Arc::new(stream), peer, events, Background::start().unwrap(), memory), client)
}

#[test]
fn replies_leave_in_the_order_of_their_slots() {
    let (replies, mut client) = pair();
    let mut slots: Vec<_> = (0..5).map(|_| Some(replies.reserve())).collect();
    for place in [3, 1, 0, 4, 2] {
        slots[place].take().unwrap().fill(place.to_string().as_bytes());
        replies.flush();
    }
    assert!(replies.wait_for_fewer_than(1));
    let mut read = [0; 10];
    client.read_exact(&mut read).unwrap();
    assert_eq!(&read, b"0\n1\n2\n3\n4\n");
}

#[test]
fn a_client_that_does_not_read_keeps_nobody_waiting() {
    let (replies, mut client) = pair();
    let reply = vec![b'x'; 8 << 20];
    replies.reserve().fill(&reply);
    replies.flush();
    replies.reserve().fill(b"last");
    replies.flush();
    // Both are on their way, though nothing was read so far.
    let reader = thread::spawn(move || {
        let mut read = vec![0; reply.len() + 1 + 5];
        client.read_exact(&mut read).map(|()| read)
    });
    assert!(replies.wait_for_fewer_than(1));
    assert!(reader.join().unwrap().unwrap().ends_with(b"x\nlast\n"));
}

#[test]
fn a_client_that_has_gone_ends_the_wait() {
    let (replies, client) = pair();
    drop(client);
    // The first reply may still go out; the answer to it is a reset.
    while replies.wait_for_fewer_than(1) {
        replies.reserve().fill(b"a reply");
        replies.flush();
    }
    assert!(replies.is_settled());
}
