//! The server's role: listen, register, answer each message with its hash.
//!
//! The tutorial's server registers first and listens afterwards, and a message can come in between;
//! this one is handed a socket that listens already.
//!
//! # Work besides hashing
//!
//! A server takes a [`Handler`], whose result goes to the client in the ack's `result`; [`Command`] is
//! the one that the program `server` has, and runs a program for each message.
//!
//! ```
//! use std::io::{BufRead, BufReader, Write};
//! use std::net::TcpStream;
//!
//! use revproc::cli::terminal::Terminal;
//! use revproc::net::endpoint::LOOPBACK;
//! use revproc::net::listener;
//! use revproc::protocol::Id;
//! use revproc::server::{Message, Server, Settings};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! // With proxies to register with, it serves whatever they send it.
//! let settings = Settings::new(Id::from_text("1"), Id::from_text("double"), vec![]);
//! let double = |message: &Message<'_>| {
//!     let number: u64 = message.payload.parse()?;
//!     Ok(Some((2 * number).to_string().into_bytes()))
//! };
//! let socket = listener::bind(LOOPBACK, 0)?;
//! let server = Server::start_with(double, socket, settings, Terminal::new("server", true))?;
//!
//! let mut client = TcpStream::connect(server.address())?;
//! for payload in ["21", "many"] {
//!     let message = format!(r#"{{"type":0,"srcid":50,"privPoliId":"double","payload":"{payload}"}}"#);
//!     client.write_all(message.as_bytes())?;
//! }
//! let mut replies = BufReader::new(client).lines();
//! assert!(replies.next().unwrap()?.ends_with(r#""result":"42"}"#));
//! let refusal = replies.next().unwrap()?;
//! assert!(refusal.contains(r#""payload":"invalid digit found in string","code":"failed""#));
//! # Ok(())
//! # }
//! ```

mod answerer;
mod command;
mod handler;
mod registration;
mod semaphore;

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use answerer::Answerer;
use handler::Work;
use registration::{LEAVE_LIMIT, Registration};

use crate::cli::escape::EscapedId;
use crate::cli::terminal::Terminal;
use crate::net::connection::DEFAULT_MAX_PACKET;
use crate::net::endpoint::Endpoint;
use crate::net::listener::{self, Listener};
use crate::net::os_error::thread_failure;
use crate::protocol::{Id, Setup};

pub use command::{Command, Settings as CommandSettings};
pub use handler::{Failure, Handler, Message};

/// After the leases are given up, a proxy that had already chosen this server for a message may
/// connect for this long. Later it finds nobody listening, has sent nothing, and chooses another.
const LINGER: Duration = Duration::from_millis(100);

/// How long to wait before saying that connections are still open: a proxy ends its own at once when a server
/// leaves.
const SAY_OPEN: Duration = Duration::from_secs(1);

/// When the time to stop is over, work is ended, and what is to be said of it may take this long.
const END_LIMIT: Duration = Duration::from_secs(3);

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
    /// Messages that are worked on at once; further ones wait, first come first served. The proxies
    /// are told, as the `capacity`. At least 1; `None` for no limit.
    pub at_once: Option<usize>,
    /// How long messages in flight may take when the server is told to stop.
    pub stop_timeout: Duration,
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
            at_once: None,
            stop_timeout: Duration::from_secs(10),
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
    answerer: Arc<Answerer>,
    stop: Sender<Stop>,
    stopped: Receiver<Stop>,
}

impl Server {
    /// Starts to serve the connections that `socket` accepts, and to register with the proxies. Each
    /// message is answered with its hash.
    ///
    /// # Errors
    ///
    /// If the system gives no thread, or does not say where the socket listens.
    pub fn start(
        socket: TcpListener,
        settings: Settings,
        terminal: Terminal,
    ) -> std::io::Result<Self> {
        Self::start_work(None, socket, settings, terminal)
    }

    /// As [`start`](Self::start), but has `handler` do the work on each message, besides the hash.
    ///
    /// # Errors
    ///
    /// As [`start`](Self::start).
    pub fn start_with(
        handler: impl Handler,
        socket: TcpListener,
        settings: Settings,
        terminal: Terminal,
    ) -> std::io::Result<Self> {
        Self::start_work(Some(Box::new(handler)), socket, settings, terminal)
    }

    fn start_work(
        handler: Option<Box<dyn Handler>>,
        socket: TcpListener,
        settings: Settings,
        terminal: Terminal,
    ) -> std::io::Result<Self> {
        let at_once = settings.at_once.map(|messages| messages.max(1));
        let listener = Listener::new(socket, settings.connections);
        let address = listener.local_addr()?;
        let answerer = Arc::new(Answerer { settings, work: Work::new(handler, at_once), terminal });
        let Answerer { settings, terminal, .. } = &*answerer;
        terminal.line(format_args!("Server running with id {}", EscapedId(&settings.id)));
        terminal
            .line(format_args!("Server serving privacy policy {}", EscapedId(&settings.policy)));
        terminal.line(format_args!("Listening on port {}", address.port()));
        listener.start(&answerer)?;
        let setup = Setup {
            capacity: at_once.and_then(|messages| messages.try_into().ok()),
            token: settings.token.clone().map(Into::into),
            ..Setup::new(settings.id.clone(), settings.policy.clone(), address.port())
        };
        let (stop, stopped) = channel();
        let mut registrations: Vec<Arc<Registration>> = Vec::new();
        for proxy in &settings.proxies {
            terminal.line(format_args!("Connecting to the reverse proxy on port {}", proxy.port));
            let (proxy, setup) = (proxy.clone(), setup.clone());
            let registration =
                Registration::new(proxy, setup, address, settings.strings, terminal.clone());
            registrations.push(Arc::clone(&registration));
            let stop = stop.clone();
            let thread = thread::Builder::new().name("registration".to_owned());
            let started = thread.spawn(move || {
                if let Err(reason) = registration.hold() {
                    // Nobody listens once the server stops anyway.
                    let _ = stop.send(Stop::Refused(reason));
                }
            });
            if let Err(error) = started {
                registrations.iter().for_each(|registration| registration.leave());
                listener.stop();
                return Err(thread_failure(error));
            }
        }
        Ok(Server { listener, address, registrations, answerer, stop, stopped })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// To end the server, send [`Stop::Told`] to this.
    pub fn stopper(&self) -> Sender<Stop> {
        self.stop.clone()
    }

    /// Serves until it is told to stop or a proxy refuses it. Then it gives up its leases, stops
    /// accepting, and answers what comes until the proxies have ended their connections, for
    /// [`Settings::stop_timeout`] at the most: a message may be on its way on each that is open. A
    /// [`Handler`] that implements [`end`](Handler::end) ends what still runs then, and those messages are
    /// refused. Giving up the leases may take 3 s besides, where a proxy hangs.
    ///
    /// # Errors
    ///
    /// The reason of the proxy that refused the server, or that work had to be ended.
    pub fn run(self) -> Result<(), String> {
        let Answerer { settings: Settings { stop_timeout: limit, .. }, work, terminal } =
            &*self.answerer;
        let why = self.stopped.recv();
        let begun = Instant::now();
        self.registrations.iter().for_each(|registration| registration.leave());
        for registration in &self.registrations {
            registration.wait_until_left(begun + LEAVE_LIMIT);
        }
        thread::sleep(LINGER);
        self.listener.stop();
        let open = self.listener.drain(SAY_OPEN.min(*limit));
        let mut ended = 0;
        if open > 0 {
            terminal.warn(format_args!(
                "connections still open: {open}; stopping when the other sides end them, or after {} s",
                limit.as_secs_f64()
            ));
            if self.listener.drain(limit.saturating_sub(begun.elapsed())) > 0 {
                ended = work.end();
                self.listener.end_connections();
                // Of work that cannot be ended nobody gets an answer.
                ended = ended.max(self.listener.drain(END_LIMIT));
            }
        }
        terminal.print_counts();
        if let Ok(Stop::Refused(reason)) = why {
            return Err(reason);
        }
        if ended > 0 {
            return Err(format!(
                "stopped; messages still at work after {} s, which were refused or cut: {ended}",
                limit.as_secs_f64()
            ));
        }
        terminal.warn(format_args!("stopped"));
        Ok(())
    }
}
