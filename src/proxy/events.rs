//! What the proxy says and counts. Each event is printed and counted here, so that the terminal's lines and
//! the counts agree.
//!
//! A message has lines of its own, one each. Whatever else others can cause without end has a [`Kind`], of
//! which only so many lines a second are printed, and the rest are counted.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::time::{Duration, Instant, SystemTime};

use super::stats::{FailureKind, Latest, ServerStats, Stats, unix_ms};
use super::table::Server;
use crate::cli::escape::{Escaped, EscapedId};
use crate::cli::terminal::{Kind, Terminal};
use crate::net::os_error;
use crate::protocol::{Code, Data, Id, Packet, Refusal, Setup};

/// The proxy's terminal and its counts.
#[derive(Debug)]
pub struct Events {
    /// The proxy's terminal.
    pub terminal: Terminal,
    /// The counts.
    pub stats: Stats,
}

impl Events {
    /// Events that are printed on `terminal` and counted in `stats`.
    pub fn new(terminal: Terminal, stats: Stats) -> Self {
        Events { terminal, stats }
    }

    /// Counts and prints a message that was taken in. It is in flight until it is acked or refused.
    pub fn received(&self, data: &Data<'_>) {
        self.stats.messages.add(1);
        if self.terminal.quiet() {
            return;
        }
        self.terminal.message(format_args!(
            "Received a data message from client {} privacy policy {} payload: {}",
            EscapedId(&data.srcid),
            EscapedId(&data.policy),
            Escaped(&data.payload),
        ));
        if let Some(claimed) = data.wrong_size() {
            self.terminal.warn_limited(Kind::WrongSize, format_args!(
                "client {} says payloadsize {claimed}, but its payload has {} bytes; the payload counts",
                EscapedId(&data.srcid),
                data.payload.len(),
            ));
        }
    }

    /// A message is sent to a server.
    pub fn forwarding(&self, server: &Server<impl AsRef<ServerStats>>, message: &About<'_>) {
        server.handle.as_ref().sent.add(1);
        if self.terminal.quiet() {
            return;
        }
        // Parsed again only if lines are printed.
        let Ok(Packet::Data(data)) = Packet::parse(message.packet) else { return };
        self.terminal.message(format_args!(
            "Forwarding a data message to server id {} payload: {}",
            Escaped(&server.id),
            Escaped(&data.payload),
        ));
    }

    /// A message was sent to a server that failed it.
    pub fn lost(&self, server: &Server<impl AsRef<ServerStats>>) {
        server.handle.as_ref().lost.add(1);
    }

    /// A server acked messages, and the acks go to their clients. Returns how many they were.
    pub fn acked<'a>(
        &self,
        server: &Server<impl AsRef<ServerStats>>,
        deliveries: impl Iterator<Item = Delivery<'a>>,
    ) -> usize {
        let counts: &ServerStats = server.handle.as_ref();
        let acked = deliveries
            .map(|delivery| {
                counts.ack_times.record(delivery.took);
                self.remember(&delivery.message, Some(&server.id), "ack", 1);
                if !self.terminal.quiet() {
                    self.print_ack(server, &delivery);
                }
            })
            .count();
        counts.acked.add(acked);
        self.stats.acks.add(acked);
        acked
    }

    /// Keeps how a message ended, for the status page; `tries` are those beside the ones that failed.
    fn remember(
        &self,
        message: &About<'_>,
        server: Option<&str>,
        outcome: &'static str,
        tries: usize,
    ) {
        let Some(latest) = &self.stats.latest else { return };
        let Some(number) = latest.admits(message.arrived) else { return };
        let Ok(Packet::Data(data)) = Packet::parse(message.packet) else { return };
        let escaped = |text: &str| Escaped(text).to_string();
        latest.keep(Latest {
            number,
            unix_ms: unix_ms(SystemTime::now()),
            client: escaped(&data.srcid.text()),
            policy: escaped(&data.policy.text()),
            payload: escaped(&data.payload),
            server: server.map(escaped),
            outcome,
            ms: message.arrived.elapsed().as_secs_f64() * 1e3,
            tries: message.tries + tries,
        });
    }

    fn print_ack<H>(&self, server: &Server<H>, delivery: &Delivery<'_>) {
        let Ok(Packet::Ack(ack)) = Packet::parse(delivery.ack) else { return };
        self.terminal.message(format_args!(
            "Received a data message from server id {} payload: {}",
            Escaped(&server.id),
            Escaped(&ack.payload),
        ));
        self.terminal.message(format_args!(
            "Forwarding a data message to client id {} payload: {}",
            EscapedId(delivery.message.srcid),
            Escaped(&ack.payload),
        ));
    }

    /// An attempt failed by a server's fault.
    pub fn blamed(
        &self,
        server: &Server<impl AsRef<ServerStats>>,
        kind: FailureKind,
        error: &impl fmt::Display,
    ) {
        server.handle.as_ref().add_failure(kind, &error.to_string());
        let line = format_args!("{} {error}", Named(server));
        self.terminal.warn_about(Kind::FailedAttempt, server.serial, line);
    }

    /// A message that one server failed or could not take goes to another.
    pub fn retrying<H>(&self, message: &About<'_>, server: &Server<H>) {
        self.stats.retries.add(1);
        self.terminal.warn_message(format_args!(
            "trying the message of client {} at {}",
            EscapedId(message.srcid),
            Named(server),
        ));
    }

    /// This server could not take a message, which is tried again: there, or at another.
    pub fn postponed<H>(&self, server: &Server<H>, error: &impl fmt::Display) {
        self.stats.retries.add(1);
        let line = format_args!("{} {error}; trying again", Named(server));
        self.terminal.warn_about(Kind::Postponed, server.serial, line);
    }

    /// A message was refused after all.
    pub fn refused(&self, message: &About<'_>, code: Code, reason: &str) {
        self.stats.refuse(message.policy, code);
        self.remember(message, None, code.name(), 0);
        self.terminal.warn_message(format_args!(
            "refused the message of client {} ({code}): {reason}",
            EscapedId(message.srcid),
        ));
    }

    /// A server is left out of the rotation for a while.
    pub fn ejected<H>(&self, server: &Server<H>, error: &impl fmt::Display) {
        self.stats.ejections.add(1);
        let line = format_args!("{} is set aside for a while: {error}", Named(server));
        self.terminal.warn_limited(Kind::ServerState, line);
    }

    /// A server that was set aside answers again.
    pub fn healthy_again<H>(&self, server: &Server<H>) {
        let line = format_args!("{} answers again", Named(server));
        self.terminal.warn_limited(Kind::ServerState, line);
    }

    /// A server renewed its lease.
    pub fn renewed(&self) {
        self.stats.renewals.add(1);
    }

    /// A server registered.
    pub fn registered(&self, setup: &Setup<'_>) {
        self.stats.registrations.add(1);
        self.terminal.line_limited(
            Kind::Registration,
            format_args!(
                "Receiving setup message from server id {} privacy policy {} port {}",
                EscapedId(&setup.id),
                EscapedId(&setup.policy),
                setup.listen_port,
            ),
        );
    }

    /// A server left the table.
    pub fn left<H>(&self, server: &Server<H>, why: &str) {
        let line = format_args!("{} has left: {why}", Named(server));
        self.terminal.warn_limited(Kind::ServerState, line);
    }

    /// A packet that is no message was refused.
    pub fn refused_packet(&self, peer: SocketAddr, refusal: &Refusal<'_>) {
        if let Some(code) = Code::from_name(&refusal.code) {
            self.stats.packet_refusals[code as usize].add(1);
        }
        let line =
            format_args!("refused a packet from {peer} ({}): {}", refusal.code, refusal.reason);
        self.terminal.warn_limited(Kind::RefusedPacket, line);
    }

    /// A connection that carried messages broke.
    pub fn broke(&self, peer: SocketAddr, error: &impl fmt::Display) {
        self.terminal.warn_limited(Kind::BrokenConnection, format_args!("{peer}: {error}; closed"));
    }

    /// A client cannot be told how its messages ended.
    pub fn reply_lost(&self, peer: SocketAddr, error: &io::Error) {
        self.stats.replies_lost.add(1);
        self.terminal.warn_limited(
            Kind::LostReply,
            format_args!(
                "could not send replies to the client at {peer}: {}; closed",
                os_error::reason(error)
            ),
        );
    }
}

/// What is said of a message.
#[derive(Debug, Clone, Copy)]
pub struct About<'a> {
    /// The client that it came from.
    pub srcid: &'a Id<'a>,
    /// The policy that it asks for.
    pub policy: &'a str,
    /// The packet as it was received.
    pub packet: &'a [u8],
    /// When it was received.
    pub arrived: Instant,
    /// Servers that were sent it, in vain.
    pub tries: usize,
}

/// A message that was acked.
#[derive(Debug)]
pub struct Delivery<'a> {
    /// The message.
    pub message: About<'a>,
    /// The ack as it was received.
    pub ack: &'a [u8],
    /// From its being sent to the server to the ack.
    pub took: Duration,
}

/// A server with its policy and address.
struct Named<'a, H>(&'a Server<H>);

impl<H> fmt::Display for Named<'_, H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Server { id, policy, address, .. } = self.0;
        write!(f, "server {} of privacy policy {} ({address})", Escaped(id), Escaped(policy))
    }
}
