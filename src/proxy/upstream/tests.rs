use std::io::Read;
use std::net::{SocketAddr, TcpListener};

use super::*;
use crate::cli::terminal::Terminal;
use crate::net::background::Background;
use crate::net::budget::Budget;
use crate::net::workers::Workers;
use crate::protocol::{Data, Id, Packet};
use crate::proxy::backend::Settings;
use crate::proxy::dispatch::{self, Deliver};
use crate::proxy::events::Events;
use crate::proxy::in_flight::Line;
use crate::proxy::replies::ReplyQueue;
use crate::proxy::stats::Stats;
use crate::proxy::table::{Lease, Limits, Registration, Table};

const BOUND: Duration = Duration::from_secs(20);

fn pair() -> (Arc<TcpStream>, SocketAddr, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    client.set_read_timeout(Some(BOUND)).unwrap();
    let (stream, peer) = listener.accept().unwrap();
    (Arc::new(stream), peer, client)
}

fn dispatcher() -> Arc<Dispatcher<Backend>> {
    Arc::new(Dispatcher {
        table: Table::new(Limits { servers: 1, policies: 1, restart_grace: Duration::ZERO }),
        events: Arc::new(Events::new(Terminal::hidden("test"), Stats::new(false))),
        settings: dispatch::Settings {
            message_timeout: BOUND,
            // Past the end of time: to add it to a time panics.
            reply_timeout: Duration::MAX,
            tries: 3,
        },
        background: Background::start().unwrap(),
    })
}

fn server(dispatcher: &Dispatcher<Backend>, address: SocketAddr) -> Arc<Server<Backend>> {
    let settings = Settings {
        connect_timeout: BOUND,
        max_packet: 1 << 10,
        per_server: 1,
        per_leased_server: 1,
    };
    let backend = || {
        let stats = dispatcher.events.stats.server("P", "1");
        Backend::new(settings, stats, Workers::start().unwrap(), Budget::new(0))
    };
    let lease = Lease { holder: 1, length: BOUND };
    let registration =
        Registration { policy: "P", id: "1", address, lease: Some(lease), capacity: None };
    dispatcher.table.register(registration, Instant::now(), backend).unwrap();
    dispatcher.table.servers().remove(0)
}

fn message(replies: &Arc<ReplyQueue>, limit: Duration) -> InFlight {
    let data = Data::new(Id::Integer(50), Id::from_text("P"), "hello");
    let mut line = Vec::new();
    Packet::Data(data.clone()).write(&mut line);
    let now = Instant::now();
    let mut message =
        InFlight::new(&data, Line::new(line), (now, now + BOUND), replies.reserve(), None);
    message.server_limit = Some(limit);
    message
}

#[test]
fn a_panic_leaves_no_client_without_a_reply() {
    let (stream, peer, mut client) = pair();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let dispatcher = dispatcher();
    let server = server(&dispatcher, listener.local_addr().unwrap());
    let events = Arc::clone(&dispatcher.events);
    let (background, memory) = (Arc::clone(&dispatcher.background), Budget::new(0));
    let replies = ReplyQueue::new(stream, peer, events, background, memory);
    let messages = [BOUND, Duration::MAX].map(|limit| message(&replies, limit)).into();
    Backend::take(&server, messages, &dispatcher);
    let mut answers = String::new();
    while answers.lines().count() < 2 || !answers.ends_with('\n') {
        let mut some = [0; 1 << 10];
        let read = client.read(&mut some).unwrap();
        assert_ne!(read, 0, "{answers}");
        answers.push_str(std::str::from_utf8(&some[..read]).unwrap());
    }
    for answer in answers.lines() {
        assert!(answer.contains("the proxy stopped working on this message"), "{answers}");
    }
    dispatcher.background.stop();
}
