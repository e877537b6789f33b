use std::net::{TcpListener, TcpStream};

use super::*;
use crate::cli::terminal::Terminal;
use crate::net::background::Background;
use crate::protocol::Packet;
use crate::proxy::dispatch;
use crate::proxy::events::Events;
use crate::proxy::in_flight::Line;
use crate::proxy::replies::ReplyQueue;
use crate::proxy::stats::Stats;
use crate::proxy::table::{Limits, Registration, Table};

const TIME: Duration = Duration::from_secs(10);

/// A server without a lease that says nothing, and what talks to it.
struct Silent {
    _listener: TcpListener,
    server: Arc<Server<Backend>>,
    dispatcher: Arc<Dispatcher<Backend>>,
    client: Arc<ReplyQueue>,
}

impl Silent {
    fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let events = Arc::new(Events::new(Terminal::new("test", true), Stats::new(false)));
        let background = Background::start().unwrap();
        let dispatcher = Arc::new(Dispatcher {
            table: Table::new(Limits { servers: 1, policies: 1, restart_grace: Duration::ZERO }),
            events: Arc::clone(&events),
            settings: dispatch::Settings { message_timeout: TIME, reply_timeout: TIME, tries: 1 },
            background: Arc::clone(&background),
        });
        let registration =
            Registration { policy: "P", id: "1", address, lease: None, capacity: None };
        let settings = Settings {
            connect_timeout: TIME,
            max_packet: 1 << 20,
            per_server: 1,
            per_leased_server: 1,
        };
        let stats = events.stats.server("P", "1");
        let workers = Workers::start().unwrap();
        dispatcher
            .table
            .register(registration, Instant::now(), || {
                Backend::new(settings, stats, workers, Budget::new(0))
            })
            .unwrap();
        let server = dispatcher.table.servers().remove(0);
        let stream = Arc::new(TcpStream::connect(address).unwrap());
        let client = ReplyQueue::new(stream, address, events, background, Budget::new(0));
        Silent { _listener: listener, server, dispatcher, client }
    }

    fn message(&self) -> InFlight {
        let packet = br#"{"type":0,"srcid":50,"privPoliId":"P","payload":"x"}"#;
        let Ok(Packet::Data(data)) = Packet::parse(packet) else { panic!("a data packet") };
        let now = Instant::now();
        let (line, slot) = (Line::new(packet.to_vec()), self.client.reserve());
        InFlight::new(&data, line, (now, now + TIME), slot, None)
    }

    fn take(&self) {
        Backend::take(&self.server, vec![self.message()], &self.dispatcher);
    }
}

#[test]
fn however_many_messages_wait_one_timer_looks_after_them() {
    let silent = Silent::new();
    (0..2).for_each(|_| silent.take());
    // Each timer holds the server.
    let before = Arc::strong_count(&silent.server);
    (0..100).for_each(|_| silent.take());
    assert_eq!(silent.server.handle.lock().waiting.len(), 101);
    assert_eq!(Arc::strong_count(&silent.server), before);
}
