//! The reverse proxy's role: accept, route, answer.
//!
//! # A message's way
//!
//! 1. A thread of [`net::listener`](crate::net::listener) accepts a connection and calls `Proxy::serve` in
//!    `session`, which takes its packets in order. A setup packet goes to `registration`, which puts the
//!    server into the `table`.
//! 2. A data packet becomes a message, `InFlight`: its bytes, its deadline, and the slot of its reply in
//!    the client's `replies`. It is answered exactly once; dropping it unanswered sends a refusal.
//! 3. `dispatch` asks the table whose turn it is and hands the message to that server's `backend`. It
//!    never waits, so the client's thread goes back to its client.
//! 4. The backend puts it on an `upstream`, a connection to the server with a thread of its own, which reads
//!    the acks. The thread that puts it on an open connection sends it; on a new one, or while acks are
//!    pending, the upstream's thread does. `net::background` sends what the server does not take at once.
//! 5. The upstream's thread checks each ack (`acks`) and fills the reply's slot; the client gets it once the
//!    replies before it are there, at most 1 ms later (`GATHER`).
//! 6. If anything goes wrong, the message goes back to `dispatch` with an `AttemptError`; the table in
//!    `dispatch::rule` says whether the server is blamed and what becomes of the message, and
//!    `dispatch::retry` does that.
//! 7. When a server's lease runs out, `leases` removes the server from the table, and its unacked messages go
//!    back to `dispatch` with the error `Removed`.
//!
//! Locks: a backend's may be held while one of its upstreams' is taken, and the table's while that of the
//! servers' counts is; never the other way round. Each other lock is the last one that is taken. None is held
//! over a call that may wait.
//!
//! `events` prints and counts what happens, and [`status`] shows it. No counter influences a decision.

mod acks;
mod admission;
mod backend;
mod dispatch;
mod events;
mod in_flight;
mod leases;
mod registration;
mod replies;
mod session;
mod settings;
mod stats;
pub mod status;
mod stop;
mod table;
mod upstream;

use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpListener};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, Weak};
use std::time::SystemTime;

use backend::Backend;
use dispatch::Dispatcher;
use events::Events;
use leases::LeaseTimer;
use replies::ReplyQueue;
use stats::Stats;
use stop::Stop;
use table::{Server, Table};

use crate::cli::terminal::Terminal;
use crate::net::background::Background;
use crate::net::budget::Budget;
use crate::net::connection;
use crate::net::listener::Listener;
use crate::net::lock::lock;
use crate::net::workers::Workers;

pub use admission::Admission;
pub use settings::Settings;
pub use table::Limits as TableLimits;

/// A reverse proxy that listens.
#[derive(Debug)]
pub struct Proxy {
    dispatcher: Arc<Dispatcher<Backend>>,
    workers: Arc<Workers>,
    settings: Arc<Settings>,
    listener: Arc<Listener>,
    address: SocketAddr,
    started: SystemTime,
    /// `-max-memory`: long packets and unread replies, of all peers together.
    memory: Arc<Budget>,
    lease_timer: Arc<LeaseTimer>,
    /// Servers that were removed from the table but may still ack messages on their connections.
    retired: Mutex<Vec<Weak<Server<Backend>>>>,
    /// The reply queue of each connection, by connection number, for an orderly stop. Setup connections of
    /// servers are not in it.
    reply_queues: Mutex<BTreeMap<u64, Weak<ReplyQueue>>>,
    stop: Stop,
    /// Where the status page is, if there is one.
    page: OnceLock<SocketAddr>,
}

impl Proxy {
    /// Starts to serve the connections that `socket` accepts.
    ///
    /// # Errors
    ///
    /// If the system gives no thread, or does not say where the socket listens.
    pub fn start(
        socket: TcpListener,
        settings: Settings,
        terminal: Terminal,
    ) -> std::io::Result<Arc<Self>> {
        let settings = Arc::new(settings);
        let listener = Listener::new(socket, settings.connections);
        let address = listener.local_addr()?;
        let dispatcher = Arc::new(Dispatcher {
            table: Table::new(settings.table),
            events: Arc::new(Events::new(terminal, Stats::new(settings.keep_recent))),
            settings: Arc::clone(&settings),
            background: Background::start()?,
            has_stopped: AtomicBool::new(false),
        });
        let memory = settings.max_memory.max(connection::largest_buffer(settings.max_packet));
        let proxy = Arc::new(Proxy {
            lease_timer: LeaseTimer::new(&dispatcher),
            retired: Mutex::default(),
            dispatcher,
            workers: Workers::start()?,
            memory: Budget::new(memory),
            stop: Stop::new(&settings),
            settings,
            listener: Arc::clone(&listener),
            address,
            started: SystemTime::now(),
            reply_queues: Mutex::default(),
            page: OnceLock::new(),
        });
        listener.start(&proxy)?;
        Ok(proxy)
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// How many servers are registered.
    pub fn servers(&self) -> usize {
        self.dispatcher.table.servers().len()
    }

    fn reply_queues(&self) -> MutexGuard<'_, BTreeMap<u64, Weak<ReplyQueue>>> {
        lock(&self.reply_queues)
    }
}
