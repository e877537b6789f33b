//! The reverse proxy's role: accept, route, answer.
//!
//! # A message's way
//!
//! 1. A thread of the [listener](crate::net::listener::Listener) accepts a connection and serves it to its end:
//!    `session` takes its packets in order. A setup packet goes to `registration`, which puts the server
//!    into the `table`.
//! 2. A data packet becomes a message, `InFlight`: its bytes, its deadline, and the place of its reply in
//!    the client's `replies`. It is answered once; dropped unanswered, it refuses itself.
//! 3. `dispatch` asks the table whose turn it is and hands the message to that server's `backend`. It
//!    never waits, so the client's thread goes back to its client.
//! 4. The backend puts it on an `upstream`, a connection to the server with a thread of its own, which
//!    reads the acks. Whoever puts the message there sends it; what the server does not take at once is
//!    sent by `net::background`.
//! 5. The upstream's thread checks each ack (`acks`) and fills the reply's place; the client gets it as
//!    soon as the replies before it are there.
//! 6. Where anything goes wrong, the message goes back to `dispatch` with an `AttemptError`; the table in
//!    `dispatch::rule` says whether the server is blamed and what becomes of the message.
//!
//! `events` says and counts what happens, and [`status`] shows it; no count decides anything.

mod acks;
mod admission;
mod backend;
mod dispatch;
mod events;
mod in_flight;
mod registration;
mod replies;
mod session;
mod stats;
pub mod status;
mod table;
mod upstream;

use std::net::{SocketAddr, TcpListener};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::Receiver;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use backend::Backend;
use dispatch::Dispatcher;
use events::Events;
use stats::Stats;
use table::{Entry, Table};

use crate::cli::terminal::Terminal;
use crate::net::background::Background;
use crate::net::budget::Budget;
use crate::net::connection;
use crate::net::listener::{self, Listener};
use crate::net::workers::Workers;

pub use admission::Admission;
pub use backend::Settings as UpstreamSettings;
pub use table::Limits as TableLimits;

/// How long messages in flight may take when the proxy is told to stop.
const STOP_LIMIT: Duration = Duration::from_secs(10);

/// Everything about the proxy that can be set.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The longest packet that is taken, in bytes.
    pub max_packet: usize,
    /// What the packets over 16 KiB of all clients together may take, in bytes; one of the longest is
    /// always taken. Acks are not counted, so that no message fails on its way because others send
    /// long ones: they are short, and come from servers that were let in.
    pub max_memory: usize,
    /// How long a client may be silent between packets.
    pub idle_timeout: Duration,
    /// How long a packet may take from its first byte to its last, besides what its length gives.
    pub packet_timeout: Duration,
    /// From a message's arrival to its ack or refusal, where it does not say itself.
    pub message_timeout: Duration,
    /// The longest time that a message may say.
    pub max_timeout: Duration,
    /// How long a server without a lease may take for its ack.
    pub reply_timeout: Duration,
    /// How servers are talked to.
    pub upstream: UpstreamSettings,
    /// Servers that are tried for a message at most.
    pub tries: usize,
    /// Connections.
    pub connections: listener::Limits,
    /// The switching table.
    pub table: TableLimits,
    /// Who may register.
    pub admission: Admission,
    /// Whether somebody will look at the latest messages.
    pub keep_recent: bool,
}

impl Default for Settings {
    fn default() -> Self {
        let connections = listener::default_max_connections();
        Settings {
            max_packet: connection::DEFAULT_MAX_PACKET,
            max_memory: 256 << 20,
            idle_timeout: Duration::from_secs(60),
            packet_timeout: Duration::from_secs(5),
            message_timeout: Duration::from_secs(10),
            max_timeout: Duration::from_secs(3600),
            reply_timeout: Duration::from_secs(5),
            upstream: UpstreamSettings {
                connect_timeout: Duration::from_secs(1),
                max_packet: connection::DEFAULT_MAX_PACKET,
                per_server: 4,
                per_leased_server: UpstreamSettings::per_leased_server(connections),
            },
            tries: 3,
            connections: listener::Limits {
                connections,
                per_address: (connections / 4).max(1),
                hint: listener::OPTION_HINT,
            },
            table: TableLimits { servers: 1000, policies: 1000 },
            admission: Admission::Loopback,
            keep_recent: false,
        }
    }
}

/// A reverse proxy that listens.
#[derive(Debug)]
pub struct Proxy {
    dispatcher: Arc<Dispatcher<Backend>>,
    workers: Arc<Workers>,
    settings: Settings,
    listener: Arc<Listener>,
    address: SocketAddr,
    /// For what clients send.
    memory: Arc<Budget>,
    /// Numbers the connections.
    numbers: AtomicU64,
    stopping: AtomicBool,
    /// Where the status page is, if there is one.
    page: OnceLock<SocketAddr>,
}

impl Proxy {
    /// Starts to serve the connections that `socket` accepts.
    ///
    /// # Errors
    ///
    /// Where the system gives no thread, or does not say where the socket listens.
    pub fn start(
        socket: TcpListener,
        settings: Settings,
        terminal: Terminal,
    ) -> std::io::Result<Arc<Self>> {
        let listener = Listener::new(socket, settings.connections);
        let address = listener.local_addr()?;
        let dispatcher = Arc::new(Dispatcher {
            table: Table::new(settings.table),
            events: Arc::new(Events::new(terminal, Stats::new(settings.keep_recent))),
            settings: dispatch::Settings {
                message_timeout: settings.message_timeout,
                reply_timeout: settings.reply_timeout,
                tries: settings.tries,
            },
            background: Background::start()?,
        });
        let memory = settings.max_memory.max(connection::largest_buffer(settings.max_packet));
        let proxy = Arc::new(Proxy {
            dispatcher,
            workers: Workers::start()?,
            memory: Budget::new(memory),
            settings,
            listener: Arc::clone(&listener),
            address,
            numbers: AtomicU64::new(0),
            stopping: AtomicBool::new(false),
            page: OnceLock::new(),
        });
        listener.start(&proxy)?;
        Ok(proxy)
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Whether it was told to stop.
    fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Relaxed)
    }

    /// Connections that are open, and those accepted since the start.
    fn connections(&self) -> (usize, u64) {
        self.listener.connections()
    }

    /// How many servers are registered.
    pub fn servers(&self) -> usize {
        self.switching_table().iter().map(|(_, servers)| servers.len()).sum()
    }

    /// The switching table as it is now: each policy with its servers in the order of their turns.
    fn switching_table(&self) -> Vec<(String, Vec<Entry<Backend>>)> {
        self.dispatcher.table.snapshot()
    }

    /// What it says and counts.
    fn events(&self) -> &Events {
        &self.dispatcher.events
    }

    /// Serves until `stop` gets a message (or its sender is gone), then stops accepting, and
    /// finishes what is in flight, in 10 s at the most.
    pub fn run_until(&self, stop: &Receiver<()>) {
        let _ = stop.recv();
        self.stopping.store(true, Ordering::Relaxed);
        self.listener.stop();
        self.listener.end_connections();
        let open = self.listener.drain(STOP_LIMIT);
        self.workers.stop();
        self.dispatcher.background.stop();
        for server in self.dispatcher.table.servers() {
            server.handle.retire(&server, &self.dispatcher);
        }
        let events = &self.dispatcher.events;
        if open > 0 {
            events.terminal().warn(format_args!(
                "stopped with {open} connections still busy after {} s",
                STOP_LIMIT.as_secs()
            ));
        }
        let totals = events.stats().totals();
        events.terminal().warn(format_args!(
            "stopped after {} messages: {} acked, {} refused",
            totals.messages,
            totals.acks,
            totals.refusals.iter().sum::<u64>()
        ));
    }
}
