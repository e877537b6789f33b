//! The server's role: listen, register, answer each message with its hash.
//!
//! The tutorial's server registers first and listens afterwards, and a message can come in between;
//! this one is handed a socket that listens already.

mod answers;
mod registration;

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use registration::{LEAVE_LIMIT, Registration};

use crate::cli::escape::Escaped;
use crate::cli::terminal::{Kind, Terminal};
use crate::net::connection::{Connection, DEFAULT_MAX_PACKET, ReadTimeout, ReceiveError};
use crate::net::endpoint::Endpoint;
use crate::net::listener::{self, Listener, Peer, Serve};
use crate::net::os_error::{reason, thread_failure};
use crate::protocol::{self, Ack, Code, Data, Id, Packet, Refusal, Setup};

/// How long messages in flight may take when the server is told to stop.
const STOP_LIMIT: Duration = Duration::from_secs(10);

/// After the leases are given up, a proxy that had already chosen this server for a message may
/// connect for this long. Later it finds nobody listening, has sent nothing, and chooses another.
const LINGER: Duration = Duration::from_millis(100);

/// Proxies end their connections at once when a server leaves. It is said of those that do not.
const SAY_OPEN: Duration = Duration::from_secs(1);

/// Answers are sent together up to this size, in bytes.
const MAX_UNSENT: usize = 64 << 10;

/// Everything about the server that can be set.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Its id.
    pub id: Id<'static>,
    /// The policy that it serves.
    pub policy: Id<'static>,
    /// The proxies that it registers with.
    pub proxies: Vec<Endpoint>,
    /// Register as the tutorial's server does: all values as strings, and without a lease.
    pub strings: bool,
    /// The secret that the proxies ask for.
    pub token: Option<String>,
    /// The longest packet that is taken, in bytes.
    pub max_packet: usize,
    /// How long a connection may be silent between packets.
    pub idle_timeout: Duration,
    /// How long a packet may take from its first byte to its last, besides what its length gives.
    pub packet_timeout: Duration,
    /// Connections.
    pub connections: listener::Limits,
}

impl Settings {
    /// The defaults for a server of this id and policy.
    pub fn new(id: Id<'static>, policy: Id<'static>, proxies: Vec<Endpoint>) -> Self {
        let connections = listener::default_max_connections();
        Settings {
            id,
            policy,
            proxies,
            strings: false,
            token: None,
            max_packet: DEFAULT_MAX_PACKET,
            idle_timeout: Duration::from_secs(60),
            packet_timeout: Duration::from_secs(5),
            connections: listener::Limits {
                hint: listener::OPTION_HINT,
                ..listener::Limits::of_connections(connections)
            },
        }
    }
}

/// What makes a server stop.
#[derive(Debug)]
pub enum Stop {
    /// It was told to.
    Told,
    /// A proxy refused it, for this reason.
    Refused(String),
}

/// A server that listens and is registered, or about to be.
#[derive(Debug)]
pub struct Server {
    listener: Arc<Listener>,
    address: SocketAddr,
    registrations: Vec<Arc<Registration>>,
    terminal: Terminal,
    stop: Sender<Stop>,
    stopped: Receiver<Stop>,
}

/// What a thread needs to answer messages.
#[derive(Debug)]
struct Answerer {
    id: Id<'static>,
    settings: Settings,
    terminal: Terminal,
}

impl Server {
    /// Starts to serve the connections that `socket` accepts, and to register with the proxies.
    ///
    /// # Errors
    ///
    /// Where the system gives no thread, or does not say where the socket listens.
    pub fn start(
        socket: TcpListener,
        settings: Settings,
        terminal: Terminal,
    ) -> std::io::Result<Self> {
        let listener = Listener::new(socket, settings.connections);
        let address = listener.local_addr()?;
        let setup = Setup {
            token: settings.token.clone().map(Into::into),
            ..Setup::new(settings.id.clone(), settings.policy.clone(), address.port())
        };
        terminal.line(format_args!("Server running with id {}", Escaped(&settings.id.text())));
        terminal.line(format_args!(
            "Server serving privacy policy {}",
            Escaped(&settings.policy.text())
        ));
        terminal.line(format_args!("Listening on port {}", address.port()));
        let (proxies, strings) = (settings.proxies.clone(), settings.strings);
        let answerer =
            Arc::new(Answerer { id: settings.id.clone(), settings, terminal: terminal.clone() });
        listener.start(&answerer)?;
        let (stop, stopped) = channel();
        let mut registrations = Vec::new();
        for proxy in proxies {
            terminal.line(format_args!("Connecting to the reverse proxy on port {}", proxy.port));
            let registration = Registration::new(proxy, &setup, address, strings, terminal.clone());
            registrations.push(Arc::clone(&registration));
            let stop = stop.clone();
            let thread = thread::Builder::new().name("registration".to_owned());
            let started = thread.spawn(move || {
                if let Err(reason) = registration.hold() {
                    // Nobody listens once the server stops anyway.
                    let _ = stop.send(Stop::Refused(reason));
                }
            });
            started.map_err(thread_failure)?;
        }
        Ok(Server { listener, address, registrations, terminal, stop, stopped })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Whoever is to end the server sends [`Stop::Told`] to it.
    pub fn stopper(&self) -> Sender<Stop> {
        self.stop.clone()
    }

    /// Serves until it is told to stop or a proxy refuses it. Then it gives up its leases, stops
    /// accepting, and answers what comes until the proxies have ended their connections, for 10 s at
    /// the most: a message may be on its way on each that is open.
    ///
    /// # Errors
    ///
    /// The reason of the proxy that refused the server.
    pub fn run(self) -> Result<(), String> {
        let why = self.stopped.recv();
        let begun = Instant::now();
        self.registrations.iter().for_each(|registration| registration.leave());
        for registration in &self.registrations {
            registration.wait_until_left(begun + LEAVE_LIMIT);
        }
        thread::sleep(LINGER);
        self.listener.stop();
        let open = self.listener.drain(SAY_OPEN);
        if open > 0 {
            self.terminal.warn(format_args!(
                "connections still open: {open}; stopping when the other sides end them, or after {} s",
                STOP_LIMIT.as_secs()
            ));
            self.listener.drain(STOP_LIMIT.saturating_sub(begun.elapsed()));
        }
        match why {
            Ok(Stop::Refused(reason)) => Err(reason),
            _ => {
                self.terminal.warn(format_args!("stopped"));
                Ok(())
            }
        }
    }
}

impl Answerer {
    /// Answers all packets that have come, in one write.
    fn answer_burst(
        &self,
        connection: &mut Connection,
        answers: &mut Vec<u8>,
    ) -> std::io::Result<bool> {
        while let Some(packet) = connection.take_packet() {
            match Packet::parse(connection.bytes(packet)) {
                Ok(Packet::Data(data)) => self.answer(data, answers),
                Ok(_) => {
                    let refusal = Refusal::new(
                        Id::ZERO,
                        Code::BadPacket,
                        "a server takes data packets (type 0) only",
                    );
                    self.refuse(refusal, answers);
                }
                Err(error) => {
                    let goes_on = error.not_json_at.is_none();
                    let id = error.id.unwrap_or(Id::ZERO);
                    self.refuse(Refusal::new(id, Code::BadPacket, error.reason), answers);
                    if !goes_on {
                        connection.send(answers)?;
                        return Ok(false);
                    }
                }
            }
            if answers.len() >= MAX_UNSENT {
                connection.send(answers)?;
                answers.clear();
            }
        }
        connection.send(answers)?;
        answers.clear();
        Ok(true)
    }

    fn answer(&self, data: Data<'_>, answers: &mut Vec<u8>) {
        let client = data.srcid.text();
        self.terminal.message(format_args!(
            "Received a message from client {} payload: {}",
            Escaped(&client),
            Escaped(&data.payload)
        ));
        if let Some(claimed) = data.wrong_size() {
            self.terminal.warn_limited(Kind::WrongSize, format_args!(
                "client {} says payloadsize {claimed}, but its payload has {} bytes; the payload counts",
                Escaped(&client),
                data.payload.len()
            ));
        }
        let hash = protocol::hash(&data.payload);
        self.terminal.message(format_args!(
            "Sending a response to the client {} payload: {hash}",
            Escaped(&client)
        ));
        drop(client);
        Packet::Ack(Ack::new(self.id.clone(), data.srcid, hash)).write(answers);
    }

    fn refuse(&self, refusal: Refusal<'_>, answers: &mut Vec<u8>) {
        let line = format_args!("refused a packet: {}", refusal.reason);
        self.terminal.warn_limited(Kind::RefusedPacket, line);
        Packet::Refusal(refusal).write(answers);
    }

    fn serve_packets(&self, connection: &mut Connection) -> std::io::Result<()> {
        let Settings { idle_timeout: idle, packet_timeout: packet, .. } = self.settings;
        let mut answers = Vec::new();
        loop {
            let code = match connection.wait(ReadTimeout::Paced { idle, packet }) {
                Ok(true) => {
                    if self.answer_burst(connection, &mut answers)? {
                        continue;
                    }
                    break;
                }
                Ok(false) | Err(ReceiveError::Idle) => return Ok(()),
                Err(ReceiveError::Io(error)) => return Err(error),
                Err(error @ ReceiveError::TooLarge { .. }) => (Code::TooLarge, error),
                Err(error @ ReceiveError::Slow(_)) => (Code::Timeout, error),
                Err(error) => (Code::BadPacket, error),
            };
            let (code, error) = code;
            self.refuse(Refusal::new(Id::ZERO, code, error.to_string()), &mut answers);
            connection.send(&answers)?;
            break;
        }
        connection.lingering_close();
        Ok(())
    }
}

impl Serve for Answerer {
    fn serve(self: &Arc<Self>, mut connection: Connection, peer: Peer) {
        if let Err(error) = self.serve_packets(&mut connection) {
            self.terminal.warn_limited(
                Kind::BrokenConnection,
                format_args!("{}: {}; closed", peer.address, reason(&error)),
            );
        }
    }

    fn warn(&self, message: &str) {
        self.terminal.warn(format_args!("{message}"));
    }

    fn max_packet(&self) -> usize {
        self.settings.max_packet
    }
}
