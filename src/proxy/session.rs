//! One connection, from its first packet to its end: its packets in order, and their replies.
//!
//! Messages go to the [`Dispatcher`](super::dispatch::Dispatcher), setup packets to
//! [`registration`](super::registration); everything else is refused.
//!
//! An idle thread keeps the deepest stack that it ever used, and there may be thousands. So what the
//! waiting loop calls is `#[inline(never)]`: such frames share their room instead of adding up.

mod answers;

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Proxy;
use super::in_flight::{InFlight, Line};
use super::leases::Leases;
use super::replies::ReplyQueue;
use super::stop::QUIET;
use crate::net::affinity::{Follower, incoming_cpu};
use crate::net::budget::Reservation;
use crate::net::connection::{Connection, ReadTimeout, ReceiveError, largest_buffer};
use crate::net::listener::{Peer, Place, Serve};
use crate::protocol::{Data, Packet};

/// The most packets taken from a client before its replies are sent.
const MAX_BURST: usize = 64;

/// Stop reading from a client while its pending replies weigh this much (see `State::unsettled`).
const MAX_UNSETTLED: usize = 128;

/// How long a connection in the lobby may take to send its first packet.
const LOBBY_TIME: Duration = Duration::from_secs(5);

/// After draining has begun, packets that have already arrived are read for this long.
const LAST_PACKETS: Duration = Duration::from_secs(1);

/// A connection that is being served.
struct Session<'a> {
    proxy: &'a Arc<Proxy>,
    replies: Arc<ReplyQueue>,
    peer: SocketAddr,
    number: u64,
    place: Place,
    leases: Leases,
}

/// Why no more packets are read.
#[derive(Debug, PartialEq, Eq)]
enum End {
    /// The peer ended its side, was idle or does not read, or the proxy stops.
    Quiet,
    /// The rest of the stream cannot be read; a refusal said why, unless the connection broke.
    Unreadable,
    /// The client got no place, and its message was refused.
    NoPlace,
}

impl Serve for Proxy {
    fn serve(self: &Arc<Self>, mut connection: Connection, peer: Peer) {
        let mut session = Session::new(self, &connection, peer);
        if peer.over_limit {
            return session.refuse_connection(&connection);
        }
        connection.use_budget(Arc::clone(&self.memory));
        session.register_queue();
        let Err(end) = session.serve_packets(&mut connection);
        // If the proxy has stopped, it ended the connection itself.
        if !self.stop.is_over() {
            self.release_all(&mut session.leases);
        }
        session.replies.flush();
        // The connection keeps its place until its last reply is sent or given up.
        session.replies.wait_for_fewer_than(1);
        if self.stop.is_draining() {
            session.replies.end();
            let has_ended = connection.drain(QUIET, self.stop.last_replies_by());
            if !has_ended || session.replies.was_given_up() {
                self.stop.note_lost_replies();
            }
        } else if end != End::Quiet {
            connection.lingering_close();
        }
        session.unregister_queue();
    }

    fn warn(&self, message: &str) {
        self.dispatcher.events.terminal.warn(format_args!("{message}"));
    }

    fn max_packet(&self) -> usize {
        self.settings.max_packet
    }
}

impl<'a> Session<'a> {
    fn new(proxy: &'a Arc<Proxy>, connection: &Connection, peer: Peer) -> Self {
        let Peer { address, number, place, .. } = peer;
        let replies = ReplyQueue::new(
            Arc::clone(connection.stream()),
            address,
            Arc::clone(&proxy.dispatcher.events),
            Arc::clone(&proxy.dispatcher.background),
            Arc::clone(&proxy.memory),
        );
        Session { proxy, replies, peer: address, number, place, leases: Leases::new(number) }
    }

    /// Serves packets until the connection ends. Replies may still be pending.
    fn serve_packets(&mut self, connection: &mut Connection) -> Result<Infallible, End> {
        let mut follower = Follower::default();
        loop {
            self.wait_for_packets(connection)?;
            follower.follow(|| incoming_cpu(connection.stream()));
            self.serve_burst(connection)?;
        }
    }

    fn wait_for_packets(&mut self, connection: &mut Connection) -> Result<(), End> {
        let packet = self.proxy.settings.packet_timeout;
        let mut idle = self.proxy.settings.idle_timeout;
        if self.place == Place::Lobby {
            idle = idle.min(LOBBY_TIME);
        }
        loop {
            let is_ending = self.place != Place::Server && self.proxy.stop.is_draining();
            if is_ending {
                if self.proxy.stop.has_drained_for(LAST_PACKETS) {
                    return Err(End::Quiet);
                }
                connection.read_only_what_has_come();
            }
            self.replies.begin_wait();
            let waited = connection.wait(ReadTimeout::Paced { idle, packet });
            if !self.replies.end_wait() {
                return Err(End::Quiet);
            }
            match waited {
                Ok(true) => return Ok(()),
                Ok(false) => return Err(End::Quiet),
                Err(ReceiveError::Idle) => idle = self.idle_time_left().ok_or(End::Quiet)?,
                // Cut off by `read_only_what_has_come`.
                Err(ReceiveError::Truncated(_)) if is_ending => return Err(End::Quiet),
                Err(error) => {
                    self.refuse_stream(&error);
                    return Err(End::Unreadable);
                }
            }
        }
    }

    /// Serves one burst of packets that have come, and waits until the next may be read.
    #[inline(never)]
    fn serve_burst(&mut self, connection: &mut Connection) -> Result<(), End> {
        let mut messages = Vec::new();
        let taken = self.take_in(connection, &mut messages);
        let is_long = messages.iter().any(InFlight::holds_memory);
        self.dispatch(&mut messages);
        // First: what was refused at once is sent by nobody else, and would be waited for.
        self.replies.flush();
        if is_long && self.proxy.memory.left() < largest_buffer(self.proxy.settings.max_packet) {
            // Back-pressure: read on only after the replies, since another long packet might not fit into
            // the memory budget.
            self.replies.wait_for_fewer_than(1);
        }
        taken?;
        // If no message came yet, wait for a client's place before reading more.
        let time = self.proxy.settings.message_timeout;
        let has_place =
            self.place != Place::Lobby || self.wait_for_client_place(Instant::now() + time);
        let goes_on = has_place && self.replies.wait_for_fewer_than(MAX_UNSETTLED);
        goes_on.then_some(()).ok_or(End::Quiet)
    }

    /// Adds the reply queue to `Proxy::reply_queues`, so that an orderly stop can end this connection.
    #[inline(never)]
    fn register_queue(&self) {
        self.proxy.reply_queues().insert(self.number, Arc::downgrade(&self.replies));
    }

    #[inline(never)]
    fn unregister_queue(&self) {
        self.proxy.reply_queues().remove(&self.number);
    }

    /// Called when the idle timeout has passed. Returns how much longer to wait; `None` to close.
    fn idle_time_left(&mut self) -> Option<Duration> {
        let idle = self.proxy.settings.idle_timeout;
        if self.place == Place::Lobby {
            // Other connections need its room in the lobby.
            return self.wait_for_client_place(Instant::now()).then_some(idle);
        }
        // A peer that waits for a reply, or holds a lease, is not idle.
        match self.replies.settled_for() {
            Some(settled_for) if !self.proxy.holds_lease(&mut self.leases) => {
                idle.checked_sub(settled_for).filter(|left| !left.is_zero())
            }
            _ => Some(idle),
        }
    }

    /// Waits until `deadline` for a client's place, unless the connection has one. Returns `false` if it got
    /// none.
    #[inline(never)]
    fn wait_for_client_place(&mut self, deadline: Instant) -> bool {
        if self.place != Place::Client {
            // `take_server_place` unregistered the reply queue; register it again.
            self.register_queue();
            // What was answered so far must not wait for the place.
            self.replies.flush();
            if !self.proxy.listener.take_client_place(self.number, deadline) {
                return false;
            }
            self.place = Place::Client;
        }
        true
    }

    /// Moves the connection to a server's place, if it has sent no messages and a place is free.
    fn take_server_place(&mut self) {
        if !self.replies.is_client()
            && self.place != Place::Server
            && self.proxy.listener.take_server_place(self.number, self.proxy)
        {
            self.place = Place::Server;
            self.unregister_queue();
        }
    }

    /// Parses one burst of packets. Appends the messages to `messages`; the caller dispatches them, from a
    /// shallower stack. Answers all other packets.
    #[inline(never)]
    fn take_in(
        &mut self,
        connection: &mut Connection,
        messages: &mut Vec<InFlight>,
    ) -> Result<(), End> {
        let mut burst = connection.take_burst(MAX_BURST);
        messages.reserve(burst.ranges.len());
        for range in burst.ranges {
            let line = Line::at(&burst.bytes, range);
            let packet = Packet::parse(line.packet());
            let Ok(Packet::Data(data)) = &packet else {
                // Dispatch earlier messages first: they must not see this packet's effect.
                self.dispatch(messages);
                if !self.answer_packet(packet, connection) {
                    return Err(End::Unreadable);
                }
                continue;
            };
            let timeout = self.timeout(data);
            let waits_for = timeout.min(self.proxy.settings.message_timeout);
            if !self.wait_for_client_place(burst.received + waits_for) {
                self.refuse_client(&data.srcid);
                return Err(End::NoPlace);
            }
            let memory = burst.memory.take();
            messages.push(self.message(data, line.clone(), burst.received, timeout, memory));
        }
        Ok(())
    }

    #[inline(never)]
    fn message(
        &self,
        data: &Data<'_>,
        line: Line,
        arrived: Instant,
        timeout: Duration,
        memory: Option<Reservation>,
    ) -> InFlight {
        self.proxy.dispatcher.events.received(data);
        let reply = self.replies.reserve_for_message();
        InFlight::new(data, line, arrived, arrived + timeout, reply, memory)
    }

    /// A message's time from arrival to reply.
    fn timeout(&self, data: &Data<'_>) -> Duration {
        let settings = &self.proxy.settings;
        data.timeout.map_or(settings.message_timeout, |seconds| {
            Duration::from_secs(seconds).min(settings.max_timeout)
        })
    }

    #[inline(never)]
    fn dispatch(&self, messages: &mut Vec<InFlight>) {
        if !messages.is_empty() {
            self.proxy.dispatcher.dispatch(std::mem::take(messages));
        }
    }
}
