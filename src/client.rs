//! The client's role: send messages through a proxy, one after another, and check each ack.

use std::borrow::Cow;
use std::collections::HashSet;
use std::io;
use std::thread;
use std::time::{Duration, Instant};

use crate::cli::escape::{Escaped, EscapedReason};
use crate::cli::terminal::Terminal;
use crate::net::connection::{Connection, ReadTimeout, ReceiveError};
use crate::net::endpoint::{Endpoint, LOOPBACK};
use crate::net::os_error::reason;
use crate::protocol::diagnose::{Foreign, foreign_refusal};
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
    /// Keep the connection for the next message, as proxies of ours allow. Others answer one message
    /// per connection, or send more than one answer.
    pub keep_connection: bool,
}

/// A client, with the connection that it keeps, if it does.
#[derive(Debug)]
pub struct Client {
    settings: Settings,
    terminal: Terminal,
    connected: Option<(Connection, Endpoint)>,
    /// The policies of which it was said how to start a server.
    advised: HashSet<String>,
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
    /// The proxy that has no server for the message.
    no_server_at: Option<Endpoint>,
}

impl Miss {
    /// The same attempt would end in the same way.
    fn lasting(reason: String) -> Self {
        Miss { reason, may_pass: false, stale: false, no_server_at: None }
    }

    /// The same attempt may succeed a moment later.
    fn passing(reason: String) -> Self {
        Miss { may_pass: true, ..Self::lasting(reason) }
    }
}

impl Client {
    /// A client that is not connected yet.
    pub fn new(settings: Settings, terminal: Terminal) -> Self {
        Client { settings, terminal, connected: None, advised: HashSet::new() }
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
                self.advise(&message.policy, miss.no_server_at.as_ref());
                return Outcome::NotDelivered;
            }
            if !warned {
                self.terminal.warn(format_args!("{}; trying again", miss.reason));
                self.advise(&message.policy, miss.no_server_at.as_ref());
                warned = true;
            }
            thread::sleep(PAUSE.min(until.saturating_duration_since(Instant::now())));
        }
    }

    /// Says how to start a server of this policy, once.
    fn advise(&mut self, policy: &str, no_server_at: Option<&Endpoint>) {
        let Some(proxy) = no_server_at.filter(|_| self.advised.insert(policy.to_owned())) else {
            return;
        };
        let at = match proxy.host.as_str() {
            LOOPBACK => proxy.port.to_string(),
            _ => proxy.to_string(),
        };
        self.terminal.warn(format_args!(
            "start one: server -id 1 -pp {} -listen 0 -revproc {at}",
            shell_word(policy)
        ));
    }

    fn attempt(&mut self, message: &Outgoing) -> Result<Outcome, Miss> {
        let kept = self.connected.take().filter(|(connection, _)| connection.is_reusable());
        let was_kept = kept.is_some();
        let (mut connection, proxy) = match kept {
            Some(connected) => connected,
            None => self.connect()?,
        };
        self.terminal.message(format_args!(
            "Sending message {} to privacy policy {} through reverse proxy running on port {}",
            Escaped(&message.payload),
            Escaped(&message.policy),
            proxy.port,
        ));
        let broke = |why: String| Miss {
            stale: was_kept,
            ..Miss::passing(format!("the reverse proxy at {proxy} {why}"))
        };
        connection
            .send(&message.line)
            .map_err(|error| broke(format!("broke the connection: {}", reason(&error))))?;
        let deadline = Instant::now() + self.settings.reply_timeout;
        let packet = match connection.receive(ReadTimeout::Until(deadline)) {
            Ok(Some(packet)) => packet,
            Ok(None) => return Err(broke("closed the connection without an answer".to_owned())),
            Err(error) => return Err(no_answer(&proxy, &error, self.settings.reply_timeout)),
        };
        let ack = match Packet::parse(packet) {
            Ok(Packet::Ack(ack)) => ack,
            Ok(Packet::Refusal(refusal)) => {
                let passing = [Code::NoServer, Code::Unreachable, Code::Timeout, Code::Overloaded];
                let is_no_server = refusal.code == Code::NoServer.name();
                let miss = Miss {
                    may_pass: passing.iter().any(|code| code.name() == refusal.code),
                    no_server_at: is_no_server.then(|| proxy.clone()),
                    ..Miss::lasting(EscapedReason(&refusal.reason).to_string())
                };
                self.keep(connection, proxy);
                return Err(miss);
            }
            Ok(_) => {
                return Err(Miss::lasting(format!(
                    "the reverse proxy at {proxy} answered with no ack"
                )));
            }
            Err(error) => {
                return Err(match foreign_refusal(packet) {
                    Some(words) => Miss::passing(EscapedReason(&words).to_string()),
                    None => Miss::lasting(format!(
                        "the reverse proxy at {proxy} answered with no packet: {error}"
                    )),
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
        self.keep(connection, proxy);
        Ok(outcome)
    }

    fn keep(&mut self, connection: Connection, proxy: Endpoint) {
        self.connected = self.settings.keep_connection.then_some((connection, proxy));
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
        Err(Miss::passing(reasons.join("; ")))
    }
}

/// That no packet came from a proxy.
fn no_answer(proxy: &Endpoint, error: &ReceiveError, timeout: Duration) -> Miss {
    match error {
        ReceiveError::NotAnObject(what) => {
            let hint = match what {
                Foreign::Http => " (is that the port of its -status page?)",
                _ => "",
            };
            Miss::lasting(format!("what listens at {proxy} is no reverse proxy: {what}{hint}"))
        }
        ReceiveError::Idle => Miss::passing(format!(
            "the reverse proxy at {proxy} gave no answer within {} s (-reply-timeout)",
            timeout.as_secs_f64()
        )),
        error => Miss::passing(format!("the reverse proxy at {proxy} gave no answer: {error}")),
    }
}

/// Text as one word of a shell's command line.
fn shell_word(text: &str) -> Cow<'_, str> {
    let is_plain =
        |character: char| character.is_alphanumeric() || "_-.,:/@%+=".contains(character);
    if !text.is_empty() && text.chars().all(is_plain) {
        Cow::Borrowed(text)
    } else {
        Cow::Owned(format!("'{}'", text.replace('\'', r"'\''")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_policy_is_quoted_for_the_shell_where_it_must_be() {
        for (text, word) in [
            ("PP_1", "PP_1"),
            ("999", "999"),
            ("", "''"),
            ("a b", "'a b'"),
            ("it's", r"'it'\''s'"),
            ("$(rm)", "'$(rm)'"),
        ] {
            assert_eq!(shell_word(text), word);
        }
    }
}
