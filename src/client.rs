//! The client's role: send messages through a proxy, one after another, and check each ack.
//!
//! A [`Client`] prints nothing: [`Client::call`] is for other programs. [`CommandLine`] is the same
//! client with the lines, the patience and the advice of the program `client`.
//!
//! ```
//! use std::time::Duration;
//!
//! use revproc::cli::terminal::Terminal;
//! use revproc::client::{self, Client};
//! use revproc::net::{endpoint::Endpoint, listener};
//! use revproc::protocol::Id;
//! use revproc::proxy::{self, Proxy};
//! use revproc::server::{self, Server};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! // These two are other programs, as a rule.
//! let socket = listener::bind("127.0.0.1", 0)?;
//! let proxy = Proxy::start(socket, proxy::Settings::default(), Terminal::new("revproc", true))?;
//! let address: Endpoint = proxy.address().to_string().parse()?;
//! let settings =
//!     server::Settings::new(Id::from_text("1"), Id::from_text("PP_1"), vec![address.clone()]);
//! let socket = listener::bind("127.0.0.1", 0)?;
//! let _server = Server::start(socket, settings, Terminal::new("server", true))?;
//!
//! let mut client = Client::new(client::Settings::new(Id::from_text("50"), vec![address]));
//! let reply = loop {
//!     match client.call("PP_1", "hello") {
//!         // The server may not be registered yet.
//!         Err(error) if error.may_repeat(false) => std::thread::sleep(Duration::from_millis(10)),
//!         reply => break reply?,
//!     }
//! };
//! // The ack's hash was right, or this were an error.
//! assert_eq!(reply.server, "1");
//! // What the server computed; this one only hashes.
//! assert_eq!(reply.result, None);
//! # Ok(())
//! # }
//! ```

mod command_line;
mod error;
mod reply;

use std::time::{Duration, Instant};

use crate::net::connection::{Connection, DEFAULT_MAX_PACKET, ReadTimeout, ReceiveError};
use crate::net::endpoint::Endpoint;
use crate::net::os_error::reason;
use crate::protocol::diagnose::{Foreign, foreign_refusal};
use crate::protocol::{Code, Data, Id, Outgoing, Packet};

pub use command_line::CommandLine;
pub use error::Error;
pub use reply::Reply;

use reply::Answer;

/// How long connecting may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// The time that a proxy of ours gives a message that has none of its own.
const MESSAGE_TIMEOUT: Duration = Duration::from_secs(10);

/// A message may ask for more, but there is no instant that far ahead.
const LONGEST_TIMEOUT: Duration = Duration::from_secs(365 * 24 * 3600);

/// How much longer than the message's time its answer may take: for the way there and back, and so
/// that a refusal comes before the client gives up.
const MARGIN: Duration = Duration::from_secs(5);

/// Everything about the client that can be set.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Its id.
    pub id: Id<'static>,
    /// The proxies, of which the first that answers is taken, and kept to while it answers.
    pub proxies: Vec<Endpoint>,
    /// The time of a message in seconds, from its arrival at the proxy; `None` for the proxy's
    /// default. Its answer is waited for 5 s longer.
    pub timeout: Option<u64>,
    /// The longest answer that is taken, in bytes.
    pub max_packet: usize,
    /// Keep the connection for the next message, as proxies of ours allow. Others answer one message
    /// per connection, or send more than one answer.
    pub keep_connection: bool,
}

impl Settings {
    /// The defaults for a client of this id.
    pub fn new(id: Id<'static>, proxies: Vec<Endpoint>) -> Self {
        Settings {
            id,
            proxies,
            timeout: None,
            max_packet: DEFAULT_MAX_PACKET,
            keep_connection: true,
        }
    }
}

/// A client, with the connection that it keeps, if it does.
#[derive(Debug)]
pub struct Client {
    settings: Settings,
    /// The proxy that the next message tries first: the one that answered last, or the one behind
    /// that which did not.
    first: usize,
    /// A connection to it.
    kept: Option<Connection>,
}

impl Client {
    /// A client that is not connected yet.
    pub fn new(settings: Settings) -> Self {
        Client { settings, first: 0, kept: None }
    }

    /// Sends a message to any server of a policy, and waits for its reply. [`send`](Self::send) is for
    /// a message with more fields.
    ///
    /// # Errors
    ///
    /// As [`send`](Self::send).
    pub fn call(&mut self, policy: &str, payload: &str) -> Result<Reply, Error> {
        let message = Data::new(self.settings.id.clone(), Id::from_text(policy), payload);
        self.send(&Outgoing::new(&Data { timeout: self.settings.timeout, ..message }))
    }

    /// Sends a message as it is, and waits for its reply. Where a proxy ends the connection without an
    /// answer, the message goes to the next one, or on a fresh connection if that was kept from an
    /// earlier message; but only within the message's time, and not where it must not be carried out
    /// twice and may have been sent.
    ///
    /// # Errors
    ///
    /// If no proxy can be reached, no answer comes in time, the message is refused, or its reply does
    /// not belong to it or cannot be read. [`Error::may_repeat`] says whether to try again; the next
    /// call begins behind a proxy that did not answer.
    pub fn send(&mut self, message: &Outgoing) -> Result<Reply, Error> {
        self.attempt(message, |_, _| {})?.into_reply()
    }

    /// As [`send`](Self::send), but calls `sending` before each time the message is sent, with the
    /// proxy and, where the message was sent before, with why it has no answer yet.
    fn attempt(
        &mut self,
        message: &Outgoing,
        mut sending: impl FnMut(&Endpoint, Option<&str>),
    ) -> Result<Answer, Error> {
        let time =
            message.timeout.map_or(MESSAGE_TIMEOUT, Duration::from_secs).min(LONGEST_TIMEOUT);
        let count = self.settings.proxies.len();
        let in_turn = (self.first..count).chain(0..self.first).map(|index| (index, None));
        let kept = self.kept.take().filter(Connection::is_reusable);
        let mut first_sent: Option<Instant> = None;
        let mut failures: Vec<String> = Vec::new();
        for (index, kept) in kept.map(|kept| (self.first, Some(kept))).into_iter().chain(in_turn) {
            // Another proxy would carry it out for nobody.
            if first_sent.is_some_and(|sent| sent.elapsed() >= time) {
                break;
            }
            let proxy = &self.settings.proxies[index];
            let mut connection = match kept.map_or_else(|| self.connect(proxy), Ok) {
                Ok(connection) => connection,
                Err(reason) => {
                    failures.push(reason);
                    continue;
                }
            };
            sending(proxy, first_sent.map(|_| failures.join("; ")).as_deref());
            let until = *first_sent.get_or_insert_with(Instant::now) + time + MARGIN;
            let outcome = exchange(message, &mut connection, proxy, until);
            let is_answer = matches!(outcome, Ok(_) | Err(Error::Refused { .. }));
            self.first = if is_answer { index } else { (index + 1) % count };
            match outcome {
                Err(Error::Closed(reason)) => {
                    failures.push(reason);
                    if message.once {
                        break;
                    }
                }
                Err(Error::Timeout(reason)) => {
                    failures.push(reason);
                    return Err(Error::Timeout(failures.join("; ")));
                }
                outcome => {
                    self.kept =
                        Some(connection).filter(|_| is_answer && self.settings.keep_connection);
                    return outcome;
                }
            }
        }
        let error = if first_sent.is_some() { Error::Closed } else { Error::Unreachable };
        Err(error(failures.join("; ")))
    }

    /// Connects to a proxy. Where that fails, says why.
    fn connect(&self, proxy: &Endpoint) -> Result<Connection, String> {
        proxy
            .connect(CONNECT_TIMEOUT)
            .and_then(|stream| Connection::from_connected(stream, self.settings.max_packet))
            .map_err(|error| proxy.not_reached(&error))
    }
}

/// Sends a message on a connection, and waits for the answer.
fn exchange(
    message: &Outgoing,
    connection: &mut Connection,
    proxy: &Endpoint,
    until: Instant,
) -> Result<Answer, Error> {
    // Bytes that the system took count as sent, so also after a failure to send.
    let unknown = if message.once { "; a server may have carried it out" } else { "" };
    let closed = |why: &str| Error::Closed(format!("the reverse proxy at {proxy} {why}{unknown}"));
    let left = until.saturating_duration_since(Instant::now());
    connection
        .send(&message.line)
        .map_err(|error| closed(&format!("broke the connection: {}", reason(&error))))?;
    let packet = match connection.receive(ReadTimeout::Until(until)) {
        Ok(Some(packet)) => packet,
        Ok(None) => return Err(closed("closed the connection without an answer")),
        Err(ReceiveError::Idle | ReceiveError::Slow(_)) => {
            return Err(Error::Timeout(format!(
                "the reverse proxy at {proxy} gave no answer within {:.0} s (-timeout){unknown}",
                left.as_secs_f64()
            )));
        }
        Err(ReceiveError::NotAnObject(what)) => return Err(no_proxy(proxy, what)),
        Err(error @ ReceiveError::TooLarge { .. }) => {
            return Err(Error::BadAnswer(format!(
                "the answer of the reverse proxy at {proxy} is not taken: {error} (-max-packet)"
            )));
        }
        Err(error) => return Err(closed(&format!("gave no answer: {error}"))),
    };
    let bad = |what| Error::BadAnswer(format!("the reverse proxy at {proxy} answered with {what}"));
    match Packet::parse(packet) {
        Ok(Packet::Ack(ack)) => Ok(Answer::new(&ack, &message.hash)),
        Ok(Packet::Refusal(refusal)) => Err(Error::Refused {
            code: Code::from_name(&refusal.code),
            reason: refusal.reason.into_owned(),
        }),
        Ok(_) => Err(bad("no ack".to_owned())),
        Err(error) => Err(match foreign_refusal(packet) {
            Some(words) => Error::ForeignRefusal(words),
            None => bad(format!("no packet: {error}")),
        }),
    }
}

/// That something else than a proxy answered.
fn no_proxy(proxy: &Endpoint, what: Foreign) -> Error {
    let hint = what.hint();
    Error::BadAnswer(format!("what listens at {proxy} is no reverse proxy: {what}{hint}"))
}
