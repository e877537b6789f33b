//! The connections to one server, and which of them a message goes on.
//!
//! With a lease, a message takes an idle connection, else a new one, else it is pipelined on a busy one; for
//! a quick server it is pipelined first, which saves waking threads. Without a lease each connection carries
//! one message and is then closed; further messages wait in the queue. Each connection has a thread, which
//! makes it (`thread`) and handles its acks (`settle`). One timer gives up late messages, in the queue and
//! on the connections (`expire`).

mod assign;
mod expire;
mod latency;
mod settle;
mod thread;

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use super::dispatch::{AttemptError, Deliver, Dispatcher};
use super::in_flight::{InFlight, MAX_CHECKED};
use super::stats::ServerStats;
use super::table::Server;
use super::upstream;
use crate::net::affinity::current_cpu;
use crate::net::budget::Budget;
use crate::net::lock::lock;
use crate::net::workers::Workers;
use assign::Assigned;
use expire::start_timer;
use latency::LatencyEstimate;

/// The longest message, in bytes, that may share a connection. A longer one would delay the others. Only
/// hashes tell acks apart on a shared connection, so all of them must be checked: hence the assertion.
const MAX_SHARED_LEN: usize = 16 << 10;
const _: () = assert!(MAX_SHARED_LEN <= MAX_CHECKED);

/// After a connection failed for lack of local resources, open no further one (beyond the first) for this
/// long.
const NO_RESOURCES_PAUSE: Duration = Duration::from_secs(1);

/// A connection to the server.
type Upstream = upstream::Upstream<Backend>;

/// The connections to one server.
#[derive(Debug)]
pub struct Backend {
    stats: Arc<ServerStats>,
    /// The threads of the connections.
    workers: Arc<Workers>,
    /// For long acks, of all servers and clients together.
    memory: Arc<Budget>,
    /// Estimate of the server's time per message.
    latency: LatencyEstimate,
    /// The length of the shortest message that the server refused as too large, in bytes.
    too_large: AtomicUsize,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    upstreams: Vec<Arc<Upstream>>,
    waiting: VecDeque<Queued>,
    /// When the current timer fires, for the queue and the connections. Timers set for another time are stale
    /// and do nothing.
    timer_at: Option<Instant>,
    /// It takes no more messages: the server was removed from the table, or the proxy stops.
    closed: bool,
    /// Until then at most one connection is open (see `NO_RESOURCES_PAUSE`).
    single_connection_until: Option<Instant>,
}

/// A message that no connection can take now.
#[derive(Debug)]
struct Queued {
    /// When it goes elsewhere.
    give_up_at: Instant,
    message: InFlight,
}

impl Backend {
    /// No connections yet.
    pub fn new(stats: Arc<ServerStats>, workers: Arc<Workers>, memory: Arc<Budget>) -> Self {
        Backend {
            stats,
            workers,
            memory,
            latency: LatencyEstimate::default(),
            too_large: AtomicUsize::new(usize::MAX),
            state: Mutex::default(),
        }
    }

    /// Called when the server was removed from the table: messages on connections may still be acked, queued
    /// ones go to other servers.
    pub fn retire(&self, server: &Arc<Server<Backend>>, dispatcher: &Arc<Dispatcher<Backend>>) {
        self.close(server, dispatcher);
        self.end_idle();
    }

    /// Called when the proxy stops: refuses every message that the server has not acked.
    pub fn refuse_all(&self) {
        let mut state = self.lock();
        state.closed = true;
        let waiting = std::mem::take(&mut state.waiting);
        let upstreams = state.upstreams.clone();
        drop(state);
        // Dropped, they are refused.
        drop(waiting);
        upstreams.iter().for_each(|upstream| drop(upstream.end()));
    }

    /// Called when the server's lease has run out: every message that it has not acked goes to another
    /// server.
    pub fn abandon(&self, server: &Arc<Server<Backend>>, dispatcher: &Arc<Dispatcher<Backend>>) {
        self.close(server, dispatcher);
        self.upstreams().iter().for_each(|upstream| upstream.abandon());
    }

    fn close(&self, server: &Arc<Server<Backend>>, dispatcher: &Arc<Dispatcher<Backend>>) {
        let mut state = self.lock();
        state.closed = true;
        let waiting = std::mem::take(&mut state.waiting);
        drop(state);
        let now = Instant::now();
        for Queued { message, .. } in waiting {
            dispatcher.failed(server, message, AttemptError::Removed, now);
        }
    }

    /// Closes idle connections, to free their threads.
    fn end_idle(&self) {
        for upstream in self.upstreams() {
            upstream.end_if_idle();
        }
    }

    fn upstreams(&self) -> Vec<Arc<Upstream>> {
        self.lock().upstreams.clone()
    }

    /// Puts the message that has waited longest, if any, on an idle connection (only for a server with a
    /// lease). Returns `false` if the connection should close.
    fn reuse(&self, upstream: &Upstream) -> bool {
        let mut state = self.lock();
        if state.closed {
            return false;
        }
        let stays = if state.waiting.is_empty() {
            !self.workers.is_short()
        } else {
            // A connection that the server has closed, or sent unsolicited bytes on, would cost a message an
            // attempt.
            upstream.is_quiet()
        };
        if !stays {
            return false;
        }
        // Under this lock, so that no other message gets in between.
        upstream.put_if_empty(|| state.waiting.pop_front().map(|queued| queued.message));
        true
    }

    /// A connection has ended.
    fn remove(&self, ended: &Arc<Upstream>) {
        self.lock().upstreams.retain(|other| !Arc::ptr_eq(other, ended));
    }

    /// If a message waits, opens a new connection for the one that has waited longest. The caller serves that
    /// connection.
    fn replace(&self, ended: &Arc<Upstream>) -> Option<Arc<Upstream>> {
        let mut state = self.lock();
        if state.upstreams.len() >= ended.dispatcher.settings.max_upstreams(ended.server.leased) {
            // Another connection was opened meanwhile. Its thread will call this when it ends.
            return None;
        }
        let Queued { message, .. } = state.waiting.pop_front()?;
        let upstream = ended.new_like(message);
        state.upstreams.push(Arc::clone(&upstream));
        Some(upstream)
    }

    /// Serves a connection on a worker thread, as soon as one is free.
    fn submit(&self, upstream: Arc<Upstream>, dispatcher: &Dispatcher<Backend>) {
        if !self.workers.submit(move || upstream.run()) {
            // No thread is left: idle connections of all servers give theirs up.
            dispatcher.table.servers().iter().for_each(|server| server.handle.end_idle());
        }
    }

    /// Called when the proxy lacked local resources for a connection.
    fn record_no_resources(&self) {
        self.lock().single_connection_until = Some(Instant::now() + NO_RESOURCES_PAUSE);
    }

    fn needs_own_connection(&self, message: &InFlight) -> bool {
        let length = message.line.len();
        message.once || length > MAX_SHARED_LEN || length >= self.too_large.load(Ordering::Relaxed)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

impl Deliver for Backend {
    fn deliver(
        server: &Arc<Server<Self>>,
        messages: Vec<InFlight>,
        dispatcher: &Arc<Dispatcher<Self>>,
    ) {
        let backend = &server.handle;
        let now = Instant::now();
        let cpu = current_cpu();
        let mut messages = VecDeque::from(messages);
        for message in &mut messages {
            message.needs_own_connection = backend.needs_own_connection(message);
        }
        let (mut to_flush, mut new) = (Vec::<Arc<Upstream>>::new(), Vec::new());
        let until = messages.iter().map(|message| message.give_up_at(now)).min();
        let mut state = backend.lock();
        if state.closed {
            drop(state);
            for message in messages {
                dispatcher.failed(server, message, AttemptError::Removed, now);
            }
            return;
        }
        while let Some(assigned) = state.assign(&mut messages, server, dispatcher, cpu, now) {
            match assigned {
                Assigned::Open(upstream) => {
                    if !to_flush.last().is_some_and(|last| Arc::ptr_eq(last, &upstream)) {
                        to_flush.push(upstream);
                    }
                }
                Assigned::New(upstream) => new.push(upstream),
                Assigned::Queue => {}
            }
        }
        let timer_at = state.set_timer(until, now);
        drop(state);
        if let Some(at) = timer_at {
            start_timer(at, Arc::clone(server), Arc::clone(dispatcher));
        }
        to_flush.iter().for_each(|upstream| upstream.flush());
        new.into_iter().for_each(|upstream| backend.submit(upstream, dispatcher));
    }

    fn take_queued_on_failure(&self) -> Vec<InFlight> {
        self.latency.forget();
        self.lock().waiting.drain(..).map(|queued| queued.message).collect()
    }
}

impl AsRef<ServerStats> for Backend {
    fn as_ref(&self) -> &ServerStats {
        &self.stats
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::net::{SocketAddr, TcpListener, TcpStream};

    use std::sync::atomic::AtomicBool;

    use super::*;
    use crate::cli::terminal::Terminal;
    use crate::net::background::Background;
    use crate::net::listener;
    use crate::protocol::{Data, Id, Packet};
    use crate::proxy::events::Events;
    use crate::proxy::in_flight::Line;
    use crate::proxy::replies::ReplyQueue;
    use crate::proxy::settings::Settings;
    use crate::proxy::stats::Stats;
    use crate::proxy::table::{Lease, Limits, Registration, Table};

    const BOUND: Duration = Duration::from_secs(20);

    /// A server that says nothing, what talks to it, and a client.
    struct Silent {
        _listener: TcpListener,
        server: Arc<Server<Backend>>,
        dispatcher: Arc<Dispatcher<Backend>>,
        replies: Arc<ReplyQueue>,
        client: TcpStream,
    }

    fn pair() -> (TcpListener, SocketAddr, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        (listener, address, TcpStream::connect(address).unwrap())
    }

    impl Silent {
        fn new(leased: bool, reply_timeout: Duration) -> Self {
            let events = Arc::new(Events::new(Terminal::hidden("test"), Stats::new(false)));
            let background = Background::start().unwrap();
            let defaults = Settings::default();
            // One connection to each server.
            let settings = Settings {
                message_timeout: BOUND,
                reply_timeout,
                connect_timeout: BOUND,
                per_server: 1,
                connections: listener::Limits { connections: 4, ..defaults.connections },
                ..defaults
            };
            let dispatcher = Arc::new(Dispatcher {
                table: Table::new(Limits {
                    servers: 1,
                    policies: 1,
                    restart_grace: Duration::ZERO,
                }),
                events: Arc::clone(&events),
                settings: Arc::new(settings),
                background: Arc::clone(&background),
                has_stopped: AtomicBool::new(false),
            });
            let (listener, address, _) = pair();
            let lease = leased.then_some(Lease { holder: 1, length: BOUND });
            let registration =
                Registration { policy: "P", id: "1", address, lease, capacity: None };
            let stats = events.stats.server("P", "1");
            let backend = || Backend::new(stats, Workers::start().unwrap(), Budget::new(0));
            dispatcher.table.register(registration, Instant::now(), backend).unwrap();
            let server = dispatcher.table.servers().remove(0);
            let (clients, _, client) = pair();
            client.set_read_timeout(Some(BOUND)).unwrap();
            let (stream, peer) = clients.accept().unwrap();
            let replies =
                ReplyQueue::new(Arc::new(stream), peer, events, background, Budget::new(0));
            Silent { _listener: listener, server, dispatcher, replies, client }
        }

        /// Has it take messages, each with the time that it may take for them.
        fn take(&self, limits: &[Duration]) {
            let data = Data::new(Id::Integer(50), Id::from_text("P"), "hello");
            let mut line = Vec::new();
            Packet::Data(data.clone()).write(&mut line);
            let now = Instant::now();
            let message = |limit: &Duration| {
                let (line, slot) = (Line::new(line.clone()), self.replies.reserve_for_message());
                let mut message = InFlight::new(&data, line, now, now + BOUND, slot, None);
                message.server_limit = Some(*limit);
                message
            };
            Backend::deliver(&self.server, limits.iter().map(message).collect(), &self.dispatcher);
        }
    }

    #[test]
    fn however_many_messages_wait_one_timer_looks_after_them() {
        let silent = Silent::new(false, BOUND);
        (0..2).for_each(|_| silent.take(&[BOUND]));
        // Each timer holds the server.
        let before = Arc::strong_count(&silent.server);
        (0..100).for_each(|_| silent.take(&[BOUND]));
        assert_eq!(silent.server.handle.lock().waiting.len(), 101);
        assert_eq!(Arc::strong_count(&silent.server), before);
    }

    #[test]
    fn a_panic_leaves_no_client_without_a_reply() {
        // Past the end of time: to add it to a time panics.
        let mut silent = Silent::new(true, Duration::MAX);
        silent.take(&[BOUND, Duration::MAX]);
        let mut answers = String::new();
        while answers.lines().count() < 2 || !answers.ends_with('\n') {
            let mut some = [0; 1 << 10];
            let read = silent.client.read(&mut some).unwrap();
            assert_ne!(read, 0, "{answers}");
            answers.push_str(std::str::from_utf8(&some[..read]).unwrap());
        }
        for answer in answers.lines() {
            assert!(answer.contains("the proxy stopped working on this message"), "{answers}");
        }
        silent.dispatcher.background.stop();
    }
}
