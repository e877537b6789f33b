//! The reverse proxy's role: accept, route, answer.
//!
//! Clients and servers come to the same port; what a packet is decides what happens to it. A
//! thread serves one connection to its end: data packets go to [`crate::forward`], setup packets
//! into the switching table, and everything else is refused. Where connections come from is
//! [`crate::net::listener`]'s business, and who may register [`crate::admission`]'s.

mod registering;

use std::borrow::Cow;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::Receiver;
use std::thread;
use std::time::{Duration, Instant};

use registering::HeldLease;

use crate::admission::Admission;
use crate::cli::terminal::Terminal;
use crate::forward::{self, Forwarder, Message};
use crate::journal::Journal;
use crate::net::affinity::{Follower, incoming_cpu};
use crate::net::budget::Budget;
use crate::net::connection::{self, Connection, Patience, ReceiveError};
use crate::net::listener::{self, Listener, Peer, Serve};
use crate::protocol::{Ack, Code, Id, Packet, ParseError, Refusal};
use crate::replies::Replies;
use crate::stats::Stats;
use crate::table::{self, Entry, Table};
use crate::upstream::{self, Upstream};

/// Packets of one client that are taken in before their replies are looked after.
const MAX_BURST: usize = 64;

/// No more packets are read from a client while it has this many without a reply.
const MAX_UNSETTLED: usize = 128;

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
    /// From when a message is taken in to its ack or refusal.
    pub message_timeout: Duration,
    /// How servers are talked to.
    pub upstream: upstream::Settings,
    /// Servers that are tried for a message at most.
    pub tries: usize,
    /// Connections.
    pub connections: listener::Limits,
    /// The switching table.
    pub table: table::Limits,
    /// Who may register.
    pub admission: Admission,
    /// Whether somebody will look at the latest messages.
    pub is_looked_at: bool,
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
            upstream: upstream::Settings {
                connect_timeout: Duration::from_secs(1),
                reply_timeout: Duration::from_secs(5),
                max_packet: connection::DEFAULT_MAX_PACKET,
                at_once: 4,
                max_at_once: most_of(connections),
                lanes: thread::available_parallelism().map_or(1, |cores| cores.get()).min(8),
                max_idle: (connections / 4).clamp(1, 64),
            },
            tries: 3,
            connections: listener::Limits {
                connections,
                per_address: (connections / 4).max(1),
                hint: listener::OPTION_HINT,
            },
            table: table::Limits { servers: 1000, policies: 1000 },
            admission: Admission::Loopback,
            is_looked_at: false,
        }
    }
}

/// A reverse proxy that listens.
#[derive(Debug)]
pub struct Proxy {
    forwarder: Arc<Forwarder>,
    settings: Settings,
    listener: Arc<Listener>,
    address: SocketAddr,
    /// For what clients send.
    memory: Arc<Budget>,
    /// Numbers the connections.
    numbers: AtomicU64,
    stopping: AtomicBool,
}

/// What is known of a connection while it is served.
struct Session {
    peer: SocketAddr,
    /// The connection's number, by which it holds leases.
    number: u64,
    leases: Vec<HeldLease>,
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
        let forwarder = Arc::new(Forwarder {
            table: Table::new(settings.table),
            journal: Arc::new(Journal::new(terminal, Stats::new(settings.is_looked_at))),
            settings: forward::Settings {
                message_timeout: settings.message_timeout,
                reply_timeout: settings.upstream.reply_timeout,
                tries: settings.tries,
            },
        });
        let memory = settings.max_memory.max(connection::largest_buffer(settings.max_packet));
        let proxy = Arc::new(Proxy {
            forwarder,
            memory: Budget::new(memory),
            settings,
            listener: Arc::clone(&listener),
            address,
            numbers: AtomicU64::new(0),
            stopping: AtomicBool::new(false),
        });
        listener.start(&proxy)?;
        Ok(proxy)
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Whether it was told to stop.
    pub fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Relaxed)
    }

    /// Connections that are open, and those accepted since the start.
    pub fn connections(&self) -> (usize, u64) {
        self.listener.connections()
    }

    /// The switching table as it is now: each policy with its servers in the order of their turns.
    pub fn switching_table(&self) -> Vec<(String, Vec<Entry<Upstream>>)> {
        self.forwarder.table.snapshot()
    }

    /// What it says and counts.
    pub fn journal(&self) -> &Journal {
        &self.forwarder.journal
    }

    /// Serves until `stop` gets a message (or its sender is gone), then stops accepting, and
    /// finishes what is in flight, in 10 s at the most.
    pub fn run_until(&self, stop: &Receiver<()>) {
        let _ = stop.recv();
        self.stopping.store(true, Ordering::Relaxed);
        self.listener.stop();
        self.listener.end_connections();
        let open = self.listener.wait_until_quiet(STOP_LIMIT);
        for (_, entries) in self.switching_table() {
            entries.iter().for_each(|entry| entry.server.handle.close());
        }
        let journal = &self.forwarder.journal;
        if open > 0 {
            journal.terminal().warn(format_args!(
                "stopped with {open} connections still busy after {} s",
                STOP_LIMIT.as_secs()
            ));
        }
        let totals = journal.stats().totals();
        journal.terminal().warn(format_args!(
            "stopped after {} messages: {} acked, {} refused",
            totals.messages,
            totals.acks,
            totals.refusals.iter().sum::<u64>()
        ));
    }

    /// Serves packets until no more can be read; replies may still be on their way then. Says
    /// whether the peer ended it, and not we because of what it sent.
    fn serve_packets(
        &self,
        connection: &mut Connection,
        session: &mut Session,
        replies: &Arc<Replies>,
    ) -> bool {
        let mut follower = Follower::default();
        loop {
            match connection.wait(self.patience(session)) {
                Ok(true) => follower.follow(|| incoming_cpu(connection.stream())),
                Ok(false) => return true,
                Err(ReceiveError::Idle) if self.has_reason_to_stay(session, replies) => continue,
                Err(ReceiveError::Idle) => return true,
                Err(error) => {
                    self.refuse_stream(&error, session.peer, replies);
                    return false;
                }
            }
            let goes_on = self.serve_burst(connection, session, replies);
            replies.flush();
            if !goes_on {
                return false;
            }
            if !replies.wait_for_fewer_than(MAX_UNSETTLED) {
                return true;
            }
        }
    }

    /// Nothing came in time. That ends leases; but who waits for a reply, or holds a lease still, is
    /// not idle.
    fn has_reason_to_stay(&self, session: &mut Session, replies: &Replies) -> bool {
        let had_leases = !session.leases.is_empty();
        self.expire_leases(session);
        if had_leases { !session.leases.is_empty() } else { !replies.are_settled() }
    }

    fn patience(&self, session: &Session) -> Patience {
        let idle = match session.leases.iter().map(|held| held.expires).min() {
            Some(expires) => expires.saturating_duration_since(Instant::now()),
            None => self.settings.idle_timeout,
        };
        Patience::Paced { idle, packet: self.settings.packet_timeout }
    }

    /// Serves packets that have come together; says whether what follows them can be read. Not
    /// inlined: what it needs of the stack is then not held by every thread that waits for a packet.
    #[inline(never)]
    fn serve_burst(
        &self,
        connection: &mut Connection,
        session: &mut Session,
        replies: &Arc<Replies>,
    ) -> bool {
        let packets = connection.take_packets(MAX_BURST);
        let mut arrived = Instant::now();
        let mut messages = Vec::with_capacity(packets.len());
        for packet in packets {
            let bytes = connection.bytes(packet);
            let packet = match Packet::parse(bytes) {
                Ok(Packet::Data(data)) => {
                    messages.push(Message { data, bytes, arrived });
                    continue;
                }
                packet => packet,
            };
            // What came before it neither waits for it nor sees what it changes.
            self.forwarder.forward(&mut messages, replies);
            messages.clear();
            let mut goes_on = true;
            let answer = match packet {
                Ok(Packet::Setup(setup)) => self.register(connection, &setup, session),
                Ok(packet) => Err(not_for_a_proxy(packet)),
                Err(error) => {
                    goes_on = error.not_json_at.is_none();
                    Err(bad_packet(error))
                }
            };
            self.answer(answer, session.peer, replies);
            if !goes_on {
                return false;
            }
            // What comes after it had to wait for what came before.
            arrived = Instant::now();
        }
        self.forwarder.forward(&mut messages, replies);
        true
    }

    fn answer(
        &self,
        answer: Result<Ack<'_>, (Code, Refusal<'_>)>,
        peer: SocketAddr,
        replies: &Replies,
    ) {
        let packet = match answer {
            Ok(ack) => Packet::Ack(ack),
            Err((code, refusal)) => {
                self.forwarder.journal.refused_packet(peer, code, &refusal);
                Packet::Refusal(refusal)
            }
        };
        let slot = replies.reserve(1);
        replies.write(slot, &packet);
    }

    /// Says why nothing more can be read, to the peer if it can still be told.
    fn refuse_stream(&self, error: &ReceiveError, peer: SocketAddr, replies: &Replies) {
        let code = match error {
            ReceiveError::TooLarge { .. } => Code::TooLarge,
            ReceiveError::NoMemory => Code::Overloaded,
            ReceiveError::NotAnObject | ReceiveError::Truncated(_) => Code::BadPacket,
            ReceiveError::Slow(_) | ReceiveError::Idle => Code::Timeout,
            ReceiveError::Io(_) => {
                let terminal = self.forwarder.journal.terminal();
                terminal.warn_message(format_args!("{peer}: {error}; closed"));
                return;
            }
        };
        self.answer(Err(refuse(Id::ZERO, code, error.to_string())), peer, replies);
    }
}

impl Serve for Proxy {
    fn serve(&self, mut connection: Connection, peer: Peer) {
        let number = self.numbers.fetch_add(1, Ordering::Relaxed);
        let mut session = Session { peer: peer.address, number, leases: Vec::new() };
        let journal = Arc::clone(&self.forwarder.journal);
        let replies = Replies::new(Arc::clone(connection.stream()), peer.address, journal);
        if peer.over_limit {
            let reason = "too many connections from your address";
            self.answer(Err(refuse(Id::ZERO, Code::Overloaded, reason)), peer.address, &replies);
            replies.flush();
            // To wait would be to give it one of the others' places.
            connection.close_at_once();
            return;
        }
        connection.draw_on(Arc::clone(&self.memory));
        let is_refused = !self.serve_packets(&mut connection, &mut session, &replies);
        // Told to stop, we have ended it ourselves, and what has arrived still needs the servers.
        if !self.is_stopping() {
            self.release(&session.leases, number, "its connection was closed");
        }
        replies.flush();
        if is_refused {
            replies.wait_for_fewer_than(1);
            connection.close_gently();
        } else if self.is_stopping() {
            // The process may end when this connection has.
            replies.wait_for_fewer_than(1);
        } else {
            replies.wait_until_all_have_come();
        }
    }

    fn warn(&self, message: &str) {
        self.forwarder.journal.terminal().warn(format_args!("{message}"));
    }

    fn max_packet(&self) -> usize {
        self.settings.max_packet
    }
}

/// So many of these connections may wait for one server: an eighth is left for whoever else comes.
pub fn most_of(connections: usize) -> usize {
    connections - connections.div_ceil(8).min(connections / 2)
}

/// A refusal, with its code for those who count.
fn refuse<'a>(destid: Id<'a>, code: Code, reason: impl Into<Cow<'a, str>>) -> (Code, Refusal<'a>) {
    (code, Refusal::new(destid, code, reason))
}

fn not_for_a_proxy(packet: Packet<'_>) -> (Code, Refusal<'_>) {
    let (sender, name) = match packet {
        Packet::Ack(ack) => (ack.srcid, "ack"),
        _ => (Id::ZERO, "refusal"),
    };
    refuse(sender, Code::BadPacket, format!("nobody sends a proxy an unasked {name}"))
}

fn bad_packet(error: ParseError) -> (Code, Refusal<'static>) {
    refuse(error.id.unwrap_or(Id::ZERO), Code::BadPacket, error.reason)
}
