//! One connection, from its first packet to its end: its packets in order, and their replies.
//!
//! Messages go to the [`Dispatcher`](super::dispatch::Dispatcher), setup packets to
//! [`registration`](super::registration); everything else is refused.
//!
//! A thread keeps its deepest stack while its connection is idle, and there may be thousands: so what is
//! deeper than the loop that waits for packets is `#[inline(never)]`, and its frame is given back.

use std::borrow::Cow;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::in_flight::{InFlight, Line};
use super::registration::Leases;
use super::replies::ReplyQueue;
use super::{Proxy, QUIET};
use crate::net::affinity::{Follower, incoming_cpu};
use crate::net::budget::Reservation;
use crate::net::connection::{Connection, ReadTimeout, ReceiveError, largest_buffer};
use crate::net::listener::{Peer, Place, Serve};
use crate::protocol::diagnose::Foreign;
use crate::protocol::{Ack, Code, Data, Id, Packet, ParseError, Refusal};

/// The most packets taken from a client before its replies are sent.
const MAX_BURST: usize = 64;

/// No more packets are read from a client while it has this many without a reply.
const MAX_UNSETTLED: usize = 128;

/// How long a connection without a place may take for its first packet.
const LOBBY_TIME: Duration = Duration::from_secs(5);

/// How long a stopping proxy still reads packets that have arrived.
const LAST_PACKETS: Duration = Duration::from_secs(1);

/// What is known of a connection while it is served.
struct Session {
    peer: SocketAddr,
    number: u64,
    place: Place,
    /// It has sent something else than setup packets.
    is_client: bool,
    leases: Leases,
}

impl Serve for Proxy {
    fn serve(self: &Arc<Self>, mut connection: Connection, peer: Peer) {
        let Peer { address, number, place, over_limit } = peer;
        let leases = Leases::new(number);
        let mut session = Session { peer: address, number, place, is_client: false, leases };
        let replies = ReplyQueue::new(
            Arc::clone(connection.stream()),
            address,
            Arc::clone(&self.dispatcher.events),
            Arc::clone(&self.dispatcher.background),
            Arc::clone(&self.memory),
        );
        if over_limit {
            return self.refuse_connection(&connection, address, &replies);
        }
        connection.draw_on(Arc::clone(&self.memory));
        self.add_replies(number, &replies);
        let is_refused = !self.serve_packets(&mut connection, &mut session, &replies);
        // If the proxy has stopped, it ended the connection itself.
        if !self.has_stopped.load(Ordering::Relaxed) {
            self.release_all(&mut session.leases);
        }
        replies.flush();
        // The connection keeps its place until its last reply is sent or given up.
        replies.wait_for_fewer_than(1);
        if self.is_stopping() {
            replies.end();
            let has_ended = connection.drain(QUIET, self.stop_deadline());
            let is_cut = !has_ended || replies.has_timed_out();
            self.was_cut.fetch_or(is_cut, Ordering::Relaxed);
        } else if is_refused {
            connection.lingering_close();
        }
        self.remove_replies(number);
    }

    fn warn(&self, message: &str) {
        self.dispatcher.events.terminal().warn(format_args!("{message}"));
    }

    fn max_packet(&self) -> usize {
        self.settings.max_packet
    }
}

impl Proxy {
    /// Serves packets until no more can be read; replies may still be due then. Returns `false` if a
    /// packet was refused and nothing after it can be read.
    fn serve_packets(
        self: &Arc<Self>,
        connection: &mut Connection,
        session: &mut Session,
        replies: &Arc<ReplyQueue>,
    ) -> bool {
        let mut follower = Follower::default();
        loop {
            let is_ending = session.place != Place::Server && self.is_stopping();
            if is_ending {
                if self.is_stopping_for(LAST_PACKETS) {
                    return true;
                }
                connection.read_only_what_has_come();
            }
            replies.start_reading();
            let waited = connection.wait(self.read_timeout(session));
            if !replies.stop_reading() {
                return true;
            }
            match waited {
                Ok(true) => follower.follow(|| incoming_cpu(connection.stream())),
                Ok(false) => return true,
                Err(ReceiveError::Idle) if session.place == Place::Lobby => {
                    // Other connections need its room in the lobby.
                    if self.becomes_client(session, replies, Instant::now()) {
                        continue;
                    }
                    return true;
                }
                Err(ReceiveError::Idle) if self.has_reason_to_stay(session, replies) => continue,
                Err(ReceiveError::Idle) => return true,
                // Cut off by `read_only_what_has_come`.
                Err(ReceiveError::Truncated(_)) if is_ending => return true,
                Err(error) => {
                    self.refuse_stream(&error, session.peer, replies);
                    return false;
                }
            }
            let mut messages = Vec::new();
            let goes_on = self.take_in(connection, session, replies, &mut messages);
            let is_long = messages.iter().any(InFlight::holds_memory);
            self.dispatch(&mut messages);
            if is_long && self.memory.left() < largest_buffer(self.settings.max_packet) {
                // Back-pressure: its next long packet might find no memory beside this one.
                replies.wait_for_fewer_than(1);
            }
            replies.flush();
            if !goes_on {
                return false;
            }
            if session.place == Place::Lobby {
                let deadline = Instant::now() + self.settings.message_timeout;
                if !self.becomes_client(session, replies, deadline) {
                    return true;
                }
            }
            if !replies.wait_for_fewer_than(MAX_UNSETTLED) {
                return true;
            }
        }
    }

    #[inline(never)]
    fn add_replies(&self, number: u64, replies: &Arc<ReplyQueue>) {
        self.reply_queues().insert(number, Arc::downgrade(replies));
    }

    #[inline(never)]
    fn remove_replies(&self, number: u64) {
        self.reply_queues().remove(&number);
    }

    #[inline(never)]
    fn refuse_connection(
        &self,
        connection: &Connection,
        peer: SocketAddr,
        replies: &Arc<ReplyQueue>,
    ) {
        let reason = "too many connections from your address";
        self.answer(Err(refuse(Id::ZERO, Code::Overloaded, reason)), peer, replies);
        replies.flush();
        // Waiting would take a connection of others.
        connection.close_without_waiting();
    }

    /// Nothing came in time; but a peer that waits for a reply, or holds a lease, is not idle.
    fn has_reason_to_stay(&self, session: &mut Session, replies: &ReplyQueue) -> bool {
        !replies.is_settled() || self.holds_lease(&mut session.leases)
    }

    /// Gives the connection a client's place. Returns `false` if none is free until `deadline`.
    #[inline(never)]
    fn becomes_client(
        &self,
        session: &mut Session,
        replies: &Arc<ReplyQueue>,
        deadline: Instant,
    ) -> bool {
        if session.place != Place::Client {
            self.add_replies(session.number, replies);
            if !self.listener.take_client_place(session.number, deadline) {
                return false;
            }
            session.place = Place::Client;
        }
        true
    }

    /// Gives the connection a server's place, if it is no client's and one is free.
    fn becomes_server(self: &Arc<Self>, session: &mut Session) {
        if !session.is_client
            && session.place != Place::Server
            && self.listener.take_server_place(session.number, self)
        {
            session.place = Place::Server;
            self.remove_replies(session.number);
        }
    }

    fn read_timeout(&self, session: &Session) -> ReadTimeout {
        let idle = match session.place {
            Place::Lobby => LOBBY_TIME.min(self.settings.idle_timeout),
            Place::Client | Place::Server => self.settings.idle_timeout,
        };
        ReadTimeout::Paced { idle, packet: self.settings.packet_timeout }
    }

    /// Takes in packets that have come together: answers what is no message, and adds the messages that
    /// are still to be dispatched; its caller does that, with a stack less deep. Returns whether what
    /// follows them can be read.
    #[inline(never)]
    fn take_in(
        self: &Arc<Self>,
        connection: &mut Connection,
        session: &mut Session,
        replies: &Arc<ReplyQueue>,
        messages: &mut Vec<InFlight>,
    ) -> bool {
        let mut burst = connection.take_burst(MAX_BURST);
        messages.reserve(burst.ranges.len());
        for range in burst.ranges {
            let line = Line::at(&burst.bytes, range);
            let packet = Packet::parse(line.packet());
            let Ok(Packet::Data(data)) = &packet else {
                // Dispatch earlier messages first: they must not see this packet's effect.
                self.dispatch(messages);
                if !self.answer_packet(packet, connection, session, replies) {
                    return false;
                }
                continue;
            };
            session.is_client = true;
            let timeout = self.timeout(data);
            let waits_for = timeout.min(self.settings.message_timeout);
            if !self.becomes_client(session, replies, burst.received + waits_for) {
                self.refuse_client(&data.srcid, session.peer, replies);
                return false;
            }
            let memory = burst.memory.take();
            let times = (burst.received, burst.received + timeout);
            messages.push(self.message(data, line.clone(), times, replies, memory));
        }
        true
    }

    #[inline(never)]
    fn message(
        &self,
        data: &Data<'_>,
        line: Line,
        times: (Instant, Instant),
        replies: &Arc<ReplyQueue>,
        memory: Option<Reservation>,
    ) -> InFlight {
        self.dispatcher.events.received(data);
        let reply = replies.reserve_for_message();
        InFlight::new(data, line, times, reply, memory)
    }

    /// A message's time from arrival to reply.
    fn timeout(&self, data: &Data<'_>) -> Duration {
        data.timeout.map_or(self.settings.message_timeout, |seconds| {
            Duration::from_secs(seconds).min(self.settings.max_timeout)
        })
    }

    /// Refuses the message of a client that has got no place.
    #[inline(never)]
    fn refuse_client(&self, client: &Id<'_>, peer: SocketAddr, replies: &Arc<ReplyQueue>) {
        if !self.is_stopping() {
            let reason = "all places for connections are taken (-max-connections)";
            self.answer(Err(refuse(client.clone(), Code::Overloaded, reason)), peer, replies);
        }
    }

    /// Answers a packet that is no message, or none at all. Returns whether what follows it can be read.
    #[inline(never)]
    fn answer_packet(
        self: &Arc<Self>,
        packet: Result<Packet<'_>, ParseError>,
        connection: &Connection,
        session: &mut Session,
        replies: &Arc<ReplyQueue>,
    ) -> bool {
        let mut goes_on = true;
        let answer = match packet {
            Ok(Packet::Setup(setup)) => {
                let answer = self.register(connection, &setup, session.peer, &mut session.leases);
                if answer.is_ok() {
                    self.becomes_server(session);
                }
                answer
            }
            Ok(packet) => Err(not_for_a_proxy(packet)),
            Err(error) => {
                goes_on = error.not_json_at.is_none();
                Err(bad_packet(error))
            }
        };
        self.answer(answer, session.peer, replies);
        goes_on
    }

    #[inline(never)]
    fn dispatch(&self, messages: &mut Vec<InFlight>) {
        if !messages.is_empty() {
            self.dispatcher.dispatch(std::mem::take(messages));
        }
    }

    fn answer(
        &self,
        answer: Result<Ack<'_>, (Code, Refusal<'_>)>,
        peer: SocketAddr,
        replies: &Arc<ReplyQueue>,
    ) {
        let packet = match answer {
            Ok(ack) => Packet::Ack(ack),
            Err((code, refusal)) => {
                self.dispatcher.events.refused_packet(peer, code, &refusal);
                Packet::Refusal(refusal)
            }
        };
        replies.reserve().write(&packet);
    }

    /// Says why nothing more can be read, to the peer if it can still be told.
    #[inline(never)]
    fn refuse_stream(&self, error: &ReceiveError, peer: SocketAddr, replies: &Arc<ReplyQueue>) {
        let code = match error {
            ReceiveError::TooLarge { .. } => Code::TooLarge,
            ReceiveError::NoMemory => Code::Overloaded,
            ReceiveError::NotAnObject(_) | ReceiveError::Truncated(_) => Code::BadPacket,
            ReceiveError::Slow(_) | ReceiveError::Idle => Code::Timeout,
            ReceiveError::Io(_) => {
                // The homework's servers close their setup connections without reading the ack.
                if replies.had_messages() {
                    self.dispatcher.events.broke(peer, error);
                }
                return;
            }
        };
        let mut reason = error.to_string();
        if matches!(error, ReceiveError::NotAnObject(Foreign::Http)) {
            reason += "; ";
            reason += &self.where_the_page_is();
        }
        self.answer(Err(refuse(Id::ZERO, code, reason)), peer, replies);
    }

    fn where_the_page_is(&self) -> String {
        self.page.get().map_or_else(
            || "for a status page, start revproc with -status PORT".to_owned(),
            |address| format!("the status page is at http://{address}/"),
        )
    }
}

/// A refusal, with its code for the counters.
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
