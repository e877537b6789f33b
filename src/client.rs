//! The client's role: send messages through a proxy, one after another, and check each ack.

use std::io;
use std::thread;
use std::time::{Duration, Instant};

use crate::cli::escape::{Escaped, EscapedReason};
use crate::cli::terminal::Terminal;
use crate::net::connection::{Connection, ReadTimeout};
use crate::net::endpoint::Endpoint;
use crate::net::os_error::reason;
use crate::protocol::packet_file::Outgoing;
use crate::protocol::{Code, Packet};

/// How long connecting may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// Pause before another attempt, where the client was told to keep trying.
const PAUSE: Duration = Duration::from_millis(100);

/// Everything about the client that can be set.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The proxies, of which the first that answers is taken.
    pub proxies: Vec<Endpoint>,
    /// For how long each message is tried again while no proxy can be reached, a connection breaks
    /// or no server is there.
    pub wait: Duration,
    /// How long an answer may take; a proxy of ours always answers within its own 10 s.
    pub reply_timeout: Duration,
    /// The longest answer that is taken, in bytes.
    pub max_packet: usize,
}

/// A client with its connection, kept from one message to the next.
#[derive(Debug)]
pub struct Client {
    settings: Settings,
    terminal: Terminal,
    connected: Option<(Connection, Endpoint)>,
}

/// How a message ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// It arrived intact at this server.
    Verified(String),
    /// This server's ack carries another hash.
    Altered(String),
    /// There is no ack, for the reason that was said.
    NotDelivered,
}

/// How one attempt to deliver a message ended without an ack.
struct Miss {
    reason: String,
    /// Whether the same attempt may succeed a moment later.
    may_pass: bool,
    /// The connection had been kept from an earlier message and was closed meanwhile.
    stale: bool,
}

impl Client {
    /// A client that is not connected yet.
    pub fn new(settings: Settings, terminal: Terminal) -> Self {
        Client { settings, terminal, connected: None }
    }

    /// Sends a message and says on the terminal how it ended.
    pub fn deliver(&mut self, message: &Outgoing) -> Outcome {
        let until = Instant::now() + self.settings.wait;
        let mut warned = false;
        loop {
            let miss = match self.attempt(message) {
                Ok(outcome) => return outcome,
                Err(miss) => miss,
            };
            if miss.stale {
                continue;
            }
            if !miss.may_pass || Instant::now() >= until {
                self.terminal.line(format_args!("Message not delivered: {}", miss.reason));
                return Outcome::NotDelivered;
            }
            if !warned {
                self.terminal.warn(format_args!("{}; trying again", miss.reason));
                warned = true;
            }
            thread::sleep(PAUSE.min(until.saturating_duration_since(Instant::now())));
        }
    }

    fn attempt(&mut self, message: &Outgoing) -> Result<Outcome, Miss> {
        let was_kept = self.connected.is_some();
        let (mut connection, proxy) = match self.connected.take() {
            Some(connected) => connected,
            None => self.connect()?,
        };
        self.terminal.message(format_args!(
            "Sending message {} to privacy policy {} through reverse proxy running on port {}",
            Escaped(&message.payload),
            Escaped(&message.policy),
            proxy.port,
        ));
        let broke = |why: String, stale| Miss {
            reason: format!("the reverse proxy at {proxy} {why}"),
            may_pass: true,
            stale,
        };
        connection.send(&message.line).map_err(|error| {
            broke(format!("broke the connection: {}", reason(&error)), was_kept)
        })?;
        let deadline = Instant::now() + self.settings.reply_timeout;
        let packet = match connection.receive(ReadTimeout::Until(deadline)) {
            Ok(Some(packet)) => packet,
            Ok(None) => {
                return Err(broke("closed the connection without an answer".to_owned(), was_kept));
            }
            Err(error) => return Err(broke(format!("gave no answer: {error}"), false)),
        };
        let ack = match Packet::parse(packet) {
            Ok(Packet::Ack(ack)) => ack,
            Ok(Packet::Refusal(refusal)) => {
                let passing = [Code::NoServer, Code::Unreachable, Code::Timeout, Code::Overloaded];
                let miss = Miss {
                    may_pass: passing.iter().any(|code| code.name() == refusal.code),
                    reason: EscapedReason(&refusal.reason).to_string(),
                    stale: false,
                };
                self.connected = Some((connection, proxy));
                return Err(miss);
            }
            Ok(_) => {
                return Err(Miss {
                    reason: format!("the reverse proxy at {proxy} answered with no ack"),
                    may_pass: false,
                    stale: false,
                });
            }
            Err(error) => {
                return Err(Miss {
                    reason: format!(
                        "the reverse proxy at {proxy} answered with no packet: {error}"
                    ),
                    may_pass: false,
                    stale: false,
                });
            }
        };
        self.terminal.message(format_args!(
            "Receiving a response from the server {} payload: {}",
            Escaped(&ack.srcid.text()),
            Escaped(&ack.payload),
        ));
        let server = ack.srcid.to_string();
        let outcome = if ack.payload == message.hash {
            self.terminal.message(format_args!("Hash of payload is correct"));
            Outcome::Verified(server)
        } else {
            self.terminal.message(format_args!("Hash of payload is not correct"));
            Outcome::Altered(server)
        };
        self.connected = Some((connection, proxy));
        Ok(outcome)
    }

    fn connect(&self) -> Result<(Connection, Endpoint), Miss> {
        let mut reasons = Vec::new();
        for proxy in &self.settings.proxies {
            let connected: io::Result<_> = proxy
                .connect(CONNECT_TIMEOUT)
                .and_then(|stream| Connection::from_connected(stream, self.settings.max_packet));
            match connected {
                Ok(connection) => return Ok((connection, proxy.clone())),
                Err(error) => reasons.push(proxy.not_reached("the reverse proxy", &error)),
            }
        }
        Err(Miss { reason: reasons.join("; "), may_pass: true, stale: false })
    }
}
