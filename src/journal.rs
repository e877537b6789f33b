//! What the proxy says and counts. Each event is told here once, so that the terminal's lines and
//! the counts agree.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::forward::{Message, Server};
use crate::packet::{Code, Packet, Refusal, Setup};
use crate::terminal::{Shown, Terminal};
use crate::upstream::Trouble;
use crate::wire;

/// The proxy's terminal and its counts.
#[derive(Debug)]
pub struct Journal {
    terminal: Terminal,
    messages: AtomicU64,
    acks: AtomicU64,
    refusals: [AtomicU64; Code::ALL.len()],
}

/// Counts since the proxy's start.
#[derive(Debug, Clone)]
pub struct Totals {
    /// Messages taken in.
    pub messages: u64,
    /// Messages that were acked.
    pub acks: u64,
    /// Messages that were refused.
    pub refusals: u64,
}

impl fmt::Display for Totals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} messages: {} acked, {} refused", self.messages, self.acks, self.refusals)
    }
}

impl Journal {
    /// A journal that prints on `terminal`.
    pub fn new(terminal: Terminal) -> Self {
        Journal {
            terminal,
            messages: AtomicU64::new(0),
            acks: AtomicU64::new(0),
            refusals: [const { AtomicU64::new(0) }; Code::ALL.len()],
        }
    }

    /// The proxy's terminal, for what is said but not counted.
    pub fn terminal(&self) -> &Terminal {
        &self.terminal
    }

    /// The counts. Taken while messages are in flight, they need not add up.
    pub fn totals(&self) -> Totals {
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Totals {
            acks: count(&self.acks),
            refusals: self.refusals.iter().map(count).sum(),
            messages: count(&self.messages),
        }
    }

    /// A message was taken in.
    pub fn received(&self, message: &Message<'_>) {
        self.messages.fetch_add(1, Ordering::Relaxed);
        let data = &message.data;
        self.terminal.message(format_args!(
            "Received a data message from client {} privacy policy {} payload: {}",
            Shown(&data.srcid.text()),
            Shown(&data.policy.text()),
            Shown(&data.payload),
        ));
        if let Some(claimed) = data.wrong_size() {
            self.terminal.warn_message(format_args!(
                "client {} says payloadsize {claimed}, but its payload has {} bytes; the payload counts",
                Shown(&data.srcid.text()),
                data.payload.len(),
            ));
        }
    }

    /// A message is sent to a server.
    pub fn forwarding(&self, server: &Server, message: &Message<'_>) {
        self.terminal.message(format_args!(
            "Forwarding a data message to server id {} payload: {}",
            Shown(&server.id),
            Shown(&message.data.payload),
        ));
    }

    /// A server acked a message at the given try; the ack goes to the client.
    pub fn acked(&self, server: &Server, message: &Message<'_>, ack: &[u8], _tries: usize) {
        self.acks.fetch_add(1, Ordering::Relaxed);
        if self.terminal.is_quiet() {
            return;
        }
        let Ok(Packet::Ack(ack)) = Packet::parse(ack) else { return };
        self.terminal.message(format_args!(
            "Received a data message from server id {} payload: {}",
            Shown(&server.id),
            Shown(&ack.payload),
        ));
        self.terminal.message(format_args!(
            "Forwarding a data message to client id {} payload: {}",
            Shown(&message.data.srcid.text()),
            Shown(&ack.payload),
        ));
    }

    /// A try failed by a server's fault.
    pub fn failed(&self, server: &Server, trouble: &Trouble) {
        self.terminal.warn_message(format_args!("{} {trouble}", Named(server)));
    }

    /// A message that one server failed goes to another.
    pub fn retrying(&self, message: &Message<'_>, server: &Server) {
        self.terminal.warn_message(format_args!(
            "trying the message of client {} at {}",
            Shown(&message.data.srcid.text()),
            Named(server),
        ));
    }

    /// A message was refused after all.
    pub fn refused(&self, message: &Message<'_>, code: Code, reason: &str) {
        self.refusals[code as usize].fetch_add(1, Ordering::Relaxed);
        self.terminal.warn_message(format_args!(
            "refused the message of client {} ({code}): {reason}",
            Shown(&message.data.srcid.text()),
        ));
    }

    /// A server is left out of the rotation for a while.
    pub fn set_aside(&self, server: &Server, trouble: &Trouble) {
        self.terminal
            .warn(format_args!("{} is set aside for a while: it {trouble}", Named(server)));
    }

    /// A server that was set aside answers again.
    pub fn back(&self, server: &Server) {
        self.terminal.warn(format_args!("{} answers again", Named(server)));
    }

    /// A server registered.
    pub fn registered(&self, setup: &Setup<'_>) {
        self.terminal.line(format_args!(
            "Receiving setup message from server id {} privacy policy {} port {}",
            Shown(&setup.id.text()),
            Shown(&setup.policy.text()),
            setup.listen_port,
        ));
    }

    /// A server left the table.
    pub fn left(&self, server: &Server, why: &str) {
        self.terminal.warn(format_args!("{} has left: {why}", Named(server)));
    }

    /// A packet that is no message was refused.
    pub fn refused_packet(&self, peer: SocketAddr, refusal: &Refusal<'_>) {
        self.terminal.warn(format_args!(
            "refused a packet from {peer} ({}): {}",
            refusal.code, refusal.reason,
        ));
    }

    /// A client cannot be told how its messages ended.
    pub fn reply_lost(&self, peer: SocketAddr, error: &io::Error) {
        self.terminal.warn_message(format_args!(
            "could not send replies to the client at {peer}: {}; closed",
            wire::reason(error)
        ));
    }
}

/// A server with its policy and address.
struct Named<'a>(&'a Server);

impl fmt::Display for Named<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Server { id, policy, address, .. } = self.0;
        write!(f, "server {} of privacy policy {} ({address})", Shown(id), Shown(policy))
    }
}
