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
//! 4. The backend puts it on an `upstream`, a connection to the server with a thread of its own, which
//!    reads the acks. The thread that puts it there sends it; `net::background` sends what the server does
//!    not take at once.
//! 5. The upstream's thread checks each ack (`acks`) and fills the reply's slot; the client gets it as
//!    soon as the replies before it are there.
//! 6. If anything goes wrong, the message goes back to `dispatch` with an `AttemptError`; the table in
//!    `dispatch::rule` says whether the server is blamed and what becomes of the message, and
//!    `dispatch::retry` does that.
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
mod settings;
mod stats;
pub mod status;
mod table;
mod upstream;

use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpListener};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, Weak};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use backend::Backend;
use dispatch::Dispatcher;
use events::Events;
use registration::LeaseTimer;
use replies::ReplyQueue;
use stats::Stats;
use table::{Server, Table};

use crate::cli::terminal::Terminal;
use crate::net::background::Background;
use crate::net::budget::Budget;
use crate::net::connection;
use crate::net::listener::Listener;
use crate::net::lock::lock;
use crate::net::workers::Workers;

pub use admission::Admission;
pub use backend::Settings as UpstreamSettings;
pub use settings::Settings;
pub use table::Limits as TableLimits;

/// Before closing, a connection is read until nothing has come for this long: closing with unread bytes
/// resets it, and the peer loses replies.
const QUIET: Duration = Duration::from_secs(5);

/// When the proxy stops, how often it looks for connections that are idle and can end.
const TICK: Duration = Duration::from_millis(10);

/// When the time of a stop is over, the refusals of what was in flight have this long to get away.
const LAST_REPLIES: Duration = Duration::from_millis(200);

/// A reverse proxy that listens.
#[derive(Debug)]
pub struct Proxy {
    dispatcher: Arc<Dispatcher<Backend>>,
    workers: Arc<Workers>,
    settings: Settings,
    listener: Arc<Listener>,
    address: SocketAddr,
    started: SystemTime,
    /// For what clients send.
    memory: Arc<Budget>,
    lease_timer: Arc<LeaseTimer>,
    /// Servers that have left in order, and may still have messages.
    retired: Mutex<Vec<Weak<Server<Backend>>>>,
    /// Reply queues by connection number, without servers' setup connections.
    reply_queues: Mutex<BTreeMap<u64, Weak<ReplyQueue>>>,
    /// When it was told to stop.
    told_to_stop: OnceLock<Instant>,
    /// It has stopped: connections that still end now leave no trace.
    has_stopped: AtomicBool,
    /// Stopping, it could not see all replies arrive.
    was_cut: AtomicBool,
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
            lease_timer: LeaseTimer::new(&dispatcher),
            retired: Mutex::default(),
            dispatcher,
            workers: Workers::start()?,
            memory: Budget::new(memory),
            settings,
            listener: Arc::clone(&listener),
            address,
            started: SystemTime::now(),
            reply_queues: Mutex::default(),
            told_to_stop: OnceLock::new(),
            has_stopped: AtomicBool::new(false),
            was_cut: AtomicBool::new(false),
            page: OnceLock::new(),
        });
        listener.start(&proxy)?;
        Ok(proxy)
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Whether it was told to stop: nobody should send it more. It may still take what comes.
    fn is_leaving(&self) -> bool {
        self.told_to_stop.get().is_some()
    }

    /// Whether it takes no more.
    fn is_stopping(&self) -> bool {
        self.is_stopping_for(Duration::ZERO)
    }

    /// Whether it began to stop so long ago.
    fn is_stopping_for(&self, time: Duration) -> bool {
        let told = self.told_to_stop.get();
        let time = self.settings.stop_delay.saturating_add(time);
        told.is_some_and(|told| told.elapsed() >= time)
    }

    /// When everything must have ended, if the proxy is stopping.
    fn stop_deadline(&self) -> Instant {
        let told = *self.told_to_stop.get_or_init(Instant::now);
        told + self.settings.stop_delay + self.settings.stop_timeout
    }

    /// How many servers are registered.
    pub fn servers(&self) -> usize {
        self.dispatcher.table.servers().len()
    }

    /// Serves until `stop` gets a message (or its sender is gone), and on for
    /// [`stop_delay`](Settings::stop_delay). Then it takes no more connections and messages, finishes what
    /// is in flight, ends its side of each client's connection, and reads until the client ends its own.
    /// Servers stay registered until then. What is still in flight when the time is over is refused.
    /// Returns whether nothing was.
    pub fn run_until(&self, stop: &Receiver<()>) -> bool {
        let _ = stop.recv();
        self.told_to_stop.get_or_init(Instant::now);
        thread::sleep(self.settings.stop_delay);
        self.listener.stop();
        let open = self.drain_until(self.stop_deadline());
        let retired: Vec<_> = lock(&self.retired).iter().filter_map(Weak::upgrade).collect();
        for server in self.dispatcher.table.servers().iter().chain(&retired) {
            server.handle.refuse_all();
        }
        self.dispatcher.refuse_waiting();
        if open > 0 {
            self.drain_until(Instant::now() + LAST_REPLIES);
        }
        self.has_stopped.store(true, Ordering::Relaxed);
        self.listener.end_connections();
        self.workers.stop();
        self.dispatcher.background.stop();
        let events = &self.dispatcher.events;
        events.terminal.print_counts();
        if open > 0 {
            events.terminal.warn(format_args!(
                "stopped with {open} connections still busy after {} s (-stop-timeout)",
                self.settings.stop_timeout.as_secs_f64()
            ));
        }
        let totals = events.stats.totals();
        events.terminal.warn(format_args!(
            "stopped after {} messages: {} acked, {} refused",
            totals.messages,
            totals.acks,
            totals.refusals.iter().sum::<u64>()
        ));
        open == 0 && !self.was_cut.load(Ordering::Relaxed)
    }

    /// Ends the clients' connections to which nothing is owed, until none is open or the time is up. Returns
    /// how many are still open.
    fn drain_until(&self, deadline: Instant) -> usize {
        loop {
            let now = Instant::now();
            let queues: Vec<_> = self.reply_queues().values().filter_map(Weak::upgrade).collect();
            queues.iter().for_each(|replies| replies.end_if_idle(now, QUIET));
            let open = self.listener.drain(TICK);
            if open == 0 || now >= deadline {
                return open;
            }
        }
    }

    fn reply_queues(&self) -> MutexGuard<'_, BTreeMap<u64, Weak<ReplyQueue>>> {
        lock(&self.reply_queues)
    }
}
