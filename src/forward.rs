//! Forwarding: every message that is taken in ends in an ack or in a refusal.
//!
//! A message for a server that answers quickly is put into the server's [lane](crate::lane), and
//! the thread that reads the lane passes the ack on. Any other message is delivered by the thread
//! that took it in, on a connection of its own. Whatever goes wrong, each message is retried by
//! itself: hashing is idempotent, so that one whose ack did not come whole can be sent to another
//! server without harm.

use std::fmt::Write as _;
use std::io::IoSlice;
use std::ops::Range;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use crate::journal::{Delivery, Journal};
use crate::lane::{Lane, Traveller};
use crate::packet::{Code, Data, Packet, Refusal};
use crate::replies::{Replies, Slot};
use crate::table::{self, Failure, Table};
use crate::terminal::Shown;
use crate::upstream::{Link, Trouble, Upstream, check_ack};
use crate::wire::{Connection, Patience, ReceiveError};

/// Longer messages do not share a lane: they would be copied, and keep others waiting. In bytes.
const MAX_IN_LANE: usize = 16 << 10;

/// Messages under way to a server from which on they share a lane.
const CROWD: u64 = 4;

/// How long replies may wait for others of the same burst, so that all go in one write.
const GATHER: Duration = Duration::from_millis(1);

/// The stack of a thread that reads a lane or retries a message.
const STACK: usize = 256 << 10;

/// The tutorial's servers register first and listen afterwards: so long after its registration, a
/// server without a lease that refuses is given time.
const YOUNG: Duration = Duration::from_secs(1);

/// Pause before the same server is tried again: it is about to listen, or we lack a descriptor.
const PAUSE: Duration = Duration::from_millis(20);

/// A server in the table, with its connections.
pub type Server = table::Server<Upstream>;

/// How long and how often a message is tried.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// From when a message is taken in to its ack or refusal.
    pub message_timeout: Duration,
    /// From when a message is sent to a server to the server's ack.
    pub reply_timeout: Duration,
    /// Servers that are tried at most.
    pub tries: usize,
}

/// A message on its way.
#[derive(Debug)]
pub struct Message<'a> {
    /// What it says.
    pub data: Data<'a>,
    /// The packet as it was received.
    pub bytes: &'a [u8],
    /// When it was taken in.
    pub arrived: Instant,
}

/// Forwards messages to the servers of the table.
#[derive(Debug)]
pub struct Forwarder {
    /// The switching table.
    pub table: Table<Upstream>,
    /// Where what happens is said and counted.
    pub journal: Arc<Journal>,
    /// Limits.
    pub settings: Settings,
}

/// A message that was answered.
struct Exchanged {
    link: Link,
    ack: Range<usize>,
    /// From its sending to its ack.
    took: Duration,
}

/// Clients for whom the thread that reads a lane has replies.
#[derive(Default)]
struct Outbox {
    /// Whose replies are being added.
    current: Option<Arc<Replies>>,
    /// Those who wait for replies from elsewhere, a moment at most.
    held: Vec<Arc<Replies>>,
}

impl Outbox {
    /// There is another reply for this client.
    fn add(&mut self, replies: Arc<Replies>) {
        if !self.current.as_ref().is_some_and(|current| Arc::ptr_eq(current, &replies)) {
            self.send();
            self.current = Some(replies);
        }
    }

    /// Sends what was added, or holds it for a moment.
    fn send(&mut self) {
        if let Some(replies) = self.current.take()
            && replies.flush_most()
        {
            self.held.push(replies);
        }
    }

    /// Sends what was held.
    fn send_held(&mut self) {
        self.held.drain(..).for_each(|replies| replies.flush());
    }
}

impl Drop for Outbox {
    fn drop(&mut self) {
        self.send();
        self.send_held();
    }
}

/// Lanes into which messages were put that arrived together.
#[derive(Debug, Default)]
pub struct Burst {
    lanes: Vec<Arc<Lane>>,
    /// More packets of the client are there already.
    pub goes_on: bool,
}

impl Burst {
    fn add(&mut self, lane: Arc<Lane>) {
        if !self.lanes.iter().any(|other| Arc::ptr_eq(other, &lane)) {
            self.lanes.push(lane);
        }
    }

    /// Sends what was put in.
    pub fn send(&mut self) {
        self.lanes.drain(..).for_each(|lane| lane.flush());
    }
}

impl Forwarder {
    /// Forwards a message, whose reply will come in its place. What is put into a lane is sent with
    /// the rest of the burst.
    pub fn forward(
        self: &Arc<Self>,
        message: &Message<'_>,
        replies: &Arc<Replies>,
        burst: &mut Burst,
    ) {
        let slot = replies.reserve();
        let Some(server) = self.table.select(&message.data.policy.text(), message.arrived) else {
            self.refuse(message, Code::NoServer, no_server(message), 0, replies, slot);
            return;
        };
        // To hand a message over pays where many are under way; otherwise the thread that has it
        // does better to see it through, unless it has another one that would have to wait.
        let is_crowded = server.handle.stats().in_flight() >= CROWD;
        let alone = !is_crowded && !burst.goes_on && replies.is_only(slot);
        if !alone && let Some(lane) = self.put_into_lane(message, &server, replies, slot) {
            burst.add(lane);
            return;
        }
        // This may take long, and what came before is not to wait for it.
        burst.send();
        replies.flush();
        self.deliver(message, server, None, replies, slot);
    }

    /// Puts the message into the server's lane, if it has one for this message.
    fn put_into_lane(
        self: &Arc<Self>,
        message: &Message<'_>,
        server: &Arc<Server>,
        replies: &Arc<Replies>,
        slot: Slot,
    ) -> Option<Arc<Lane>> {
        if message.bytes.len() > MAX_IN_LANE {
            return None;
        }
        let lane = server.handle.lane(|link| self.start_lane(link, server))?;
        let traveller = Traveller {
            bytes: message.bytes.to_vec(),
            srcid: message.data.srcid.clone().into_owned(),
            replies: Arc::clone(replies),
            slot,
            arrived: message.arrived,
            sent: message.arrived,
        };
        lane.put(traveller, || self.journal.forwarding(server, &message.data.payload))
            .then_some(lane)
    }

    /// Makes a lane of a connection, with a thread that reads its acks.
    fn start_lane(self: &Arc<Self>, link: Link, server: &Arc<Server>) -> Option<Arc<Lane>> {
        let connection = link.into_connection();
        let lane = Arc::new(Lane::new(Arc::clone(connection.stream())));
        let (forwarder, server, its) = (Arc::clone(self), Arc::clone(server), Arc::clone(&lane));
        let thread = thread::Builder::new().name("lane".to_owned()).stack_size(STACK);
        // Without a thread there is no lane, and each message goes by itself.
        thread.spawn(move || forwarder.serve_lane(&server, &its, connection)).ok()?;
        Some(lane)
    }

    /// The life of a lane: passes its acks on, and has the messages that it loses tried again.
    fn serve_lane(self: &Arc<Self>, server: &Arc<Server>, lane: &Lane, mut connection: Connection) {
        let trouble = self.pass_acks(server, lane, &mut connection).err();
        let lost = lane.close();
        drop(connection);
        let Some(trouble) = trouble else { return };
        for (place, traveller) in lost.into_iter().enumerate() {
            self.journal.lost(server);
            let has_failed = match trouble {
                // Nothing was received since it was sent: the server had closed the connection,
                // or is gone, which the next try will show.
                Trouble::Broken(_) => false,
                // Those that were sent only now can only blame the lane.
                Trouble::Timeout(limit) => place == 0 || traveller.sent.elapsed() > limit / 2,
                _ => place == 0,
            };
            let known = has_failed.then(|| trouble.clone());
            if let Some(trouble) = &known {
                self.failed(server, trouble);
            }
            self.retry(traveller, Arc::clone(server), known);
        }
    }

    /// Passes acks on until the connection ends or is not to be used any more.
    fn pass_acks(
        self: &Arc<Self>,
        server: &Arc<Server>,
        lane: &Lane,
        connection: &mut Connection,
    ) -> Result<(), Trouble> {
        let limit = self.settings.reply_timeout;
        let mut last = Instant::now();
        let mut outbox = Outbox::default();
        loop {
            let deadline = lane.oldest().unwrap_or_else(Instant::now) + limit;
            let patience = if outbox.held.is_empty() { deadline } else { Instant::now() + GATHER };
            match connection.wait(Patience::Until(patience)) {
                Ok(true) => {}
                Ok(false) => return Err(Trouble::closed()),
                // Only the gathering is over, or a message put in since may still have time.
                Err(ReceiveError::Idle | ReceiveError::Slow(_))
                    if lane.oldest().is_none_or(|oldest| oldest.elapsed() < limit) =>
                {
                    outbox.send_held();
                    continue;
                }
                Err(error) => return Err(Trouble::from_receiving(error, limit)),
            }
            let now = Instant::now();
            outbox.send_held();
            let mut acks = 0;
            while let Some(packet) = connection.take_packet() {
                let bytes = connection.bytes(packet);
                let Some(traveller) = lane.next_acked() else {
                    return Err(Trouble::BadAck("nothing was asked".to_owned()));
                };
                if let Err(trouble) = check_ack(bytes, &traveller.srcid) {
                    self.fail_one(server, traveller, &trouble);
                    return Err(Trouble::closed());
                }
                if acks == 0 {
                    last = last.max(traveller.sent);
                }
                acks += 1;
                self.acked(&Delivery {
                    server,
                    srcid: &traveller.srcid,
                    message: &traveller.bytes,
                    ack: bytes,
                    arrived: traveller.arrived,
                    took: now - traveller.sent,
                    tries: 1,
                });
                traveller.replies.fill(traveller.slot, bytes);
                outbox.add(traveller.replies);
            }
            outbox.send();
            lane.flush();
            if acks > 0 {
                server.handle.note_pace((now - last) / acks);
            }
            last = now;
            if lane.is_over() {
                return Ok(());
            }
        }
    }

    /// A message whose ack was none: it alone has failed; those after it only lose their lane.
    fn fail_one(self: &Arc<Self>, server: &Arc<Server>, traveller: Traveller, trouble: &Trouble) {
        self.journal.lost(server);
        self.failed(server, trouble);
        self.retry(traveller, Arc::clone(server), Some(trouble.clone()));
    }

    /// Tries a message again that a lane has lost, in a thread of its own: it may take long.
    fn retry(self: &Arc<Self>, traveller: Traveller, server: Arc<Server>, known: Option<Trouble>) {
        let forwarder = Arc::clone(self);
        let (replies, slot) = (Arc::clone(&traveller.replies), traveller.slot);
        let srcid = traveller.srcid.clone();
        let thread = thread::Builder::new().name("retry".to_owned()).stack_size(STACK);
        let started = thread.spawn(move || {
            let Traveller { bytes, replies, slot, arrived, .. } = &traveller;
            if let Ok(Packet::Data(data)) = Packet::parse(bytes) {
                let message = Message { data, bytes, arrived: *arrived };
                forwarder.deliver(&message, server, known, replies, *slot);
                replies.flush();
            }
        });
        if let Err(error) = started {
            let reason = format!("the proxy could not try another server: {error}");
            replies.write(slot, &Packet::Refusal(Refusal::new(srcid, Code::Overloaded, reason)));
            replies.flush();
        }
    }

    /// Tries servers until one answers, beginning with `server`, which may have failed already.
    fn deliver(
        &self,
        message: &Message<'_>,
        mut server: Arc<Server>,
        mut known: Option<Trouble>,
        replies: &Arc<Replies>,
        slot: Slot,
    ) {
        let deadline = message.arrived + self.settings.message_timeout;
        let policy = message.data.policy.text();
        let mut failed: Vec<(Arc<Server>, Trouble)> = Vec::new();
        // Servers that were sent nothing, and can be asked again.
        let mut postponed: Vec<(Arc<Server>, Trouble)> = Vec::new();
        let mut wait_until =
            deadline - self.settings.reply_timeout.min(self.settings.message_timeout);
        loop {
            let trouble = match known.take() {
                Some(trouble) => trouble,
                None => match self.attempt(&server, message, wait_until) {
                    Ok(Exchanged { link, ack, took }) => {
                        let ack = link.bytes(ack);
                        self.acked(&Delivery {
                            server: &server,
                            srcid: &message.data.srcid,
                            message: message.bytes,
                            ack,
                            arrived: message.arrived,
                            took,
                            tries: failed.len() + 1,
                        });
                        server.handle.note_pace(took);
                        replies.fill(slot, ack);
                        server.handle.put_back(link);
                        return;
                    }
                    Err(trouble) => {
                        if !may_ask_again(&server, &trouble) {
                            self.failed(&server, &trouble);
                        }
                        trouble
                    }
                },
            };
            let list = if may_ask_again(&server, &trouble) { &mut postponed } else { &mut failed };
            list.push((server, trouble));
            let now = Instant::now();
            if now >= deadline || failed.len() >= self.settings.tries {
                break;
            }
            let tried: Vec<_> = failed.iter().chain(&postponed).map(|(server, _)| server).collect();
            server = match self.table.select_another(&policy, &tried, now) {
                Some(other) => other,
                None => {
                    let Some((same, _)) = postponed.pop() else { break };
                    postponed.clear();
                    wait_until = deadline;
                    thread::sleep(PAUSE);
                    same
                }
            };
            self.journal.retrying(message, &server);
        }
        failed.append(&mut postponed);
        self.give_up(message, &failed, replies, slot);
    }

    /// Sends the message to the server and waits for the ack; once more on a fresh connection
    /// where a kept one turns out to be closed.
    fn attempt(
        &self,
        server: &Arc<Server>,
        message: &Message<'_>,
        wait_until: Instant,
    ) -> Result<Exchanged, Trouble> {
        let mut link = server.handle.open(wait_until)?;
        self.journal.forwarding(server, &message.data.payload);
        let mut exchanged = self.exchange(&mut link, message);
        if let Err(trouble) = &exchanged
            && link.was_stale(trouble)
        {
            exchanged = server.handle.open_fresh().and_then(|fresh| {
                link = fresh;
                self.exchange(&mut link, message)
            });
        }
        match exchanged {
            Ok((ack, took)) => Ok(Exchanged { link, ack, took }),
            Err(trouble) => {
                self.journal.lost(server);
                Err(trouble)
            }
        }
    }

    fn exchange(
        &self,
        link: &mut Link,
        message: &Message<'_>,
    ) -> Result<(Range<usize>, Duration), Trouble> {
        let limit = self.settings.reply_timeout;
        let sent = Instant::now();
        let deadline = (sent + limit).min(message.arrived + self.settings.message_timeout);
        let mut parts = [IoSlice::new(message.bytes), IoSlice::new(b"\n")];
        link.connection()
            .send_parts(&mut parts)
            .map_err(|error| Link::send_trouble(&error, limit))?;
        let limit = deadline.saturating_duration_since(sent);
        let ack = link.receive_ack(&message.data.srcid, deadline, limit)?;
        Ok((ack, sent.elapsed()))
    }

    fn acked(&self, delivery: &Delivery<'_>) {
        self.journal.acked(delivery);
        if self.table.succeeded(delivery.server, Instant::now()) {
            self.journal.back(delivery.server);
        }
    }

    fn failed(&self, server: &Arc<Server>, trouble: &Trouble) {
        let whole_time = self.settings.reply_timeout.min(self.settings.message_timeout);
        let failure = match trouble {
            Trouble::Unreachable(_) => Failure::Unreachable,
            // The servers before it had used up the message's time.
            Trouble::Timeout(given) if *given < whole_time => return,
            Trouble::Broken(_) | Trouble::Timeout(_) | Trouble::BadAck(_) => Failure::Other,
            // That is between this message and the server's rules.
            Trouble::Refused(_) => return,
            // Not the server's doing.
            Trouble::Local(_) | Trouble::Waited => return,
        };
        self.journal.failed(server, trouble);
        server.handle.disperse();
        if self.table.failed(server, failure, Instant::now()) {
            self.journal.set_aside(server, trouble);
        }
    }

    fn give_up(
        &self,
        message: &Message<'_>,
        troubles: &[(Arc<Server>, Trouble)],
        replies: &Replies,
        slot: Slot,
    ) {
        let mut reason = format!(
            "no server of privacy policy \"{}\" answered",
            Shown(&message.data.policy.text())
        );
        for (place, (server, trouble)) in troubles.iter().enumerate() {
            let mark = if place == 0 { ": " } else { "; " };
            let _ =
                write!(reason, "{mark}server {} ({}) {trouble}", Shown(&server.id), server.address);
        }
        let code = troubles.last().map_or(Code::Unreachable, |(_, trouble)| trouble.code());
        self.refuse(message, code, reason, troubles.len(), replies, slot);
    }

    fn refuse(
        &self,
        message: &Message<'_>,
        code: Code,
        reason: String,
        tries: usize,
        replies: &Replies,
        slot: Slot,
    ) {
        self.journal.refused(message, code, &reason, tries);
        replies
            .write(slot, &Packet::Refusal(Refusal::new(message.data.srcid.clone(), code, reason)));
    }
}

/// Whether the server was sent nothing and may yet take the message: its line is long, we lack
/// something ourselves, or it has only just registered and is about to listen.
fn may_ask_again(server: &Server, trouble: &Trouble) -> bool {
    match trouble {
        Trouble::Local(_) | Trouble::Waited => true,
        Trouble::Unreachable(_) => !server.leased && server.since.elapsed() < YOUNG,
        _ => false,
    }
}

fn no_server(message: &Message<'_>) -> String {
    format!("no server serves privacy policy \"{}\"", Shown(&message.data.policy.text()))
}
