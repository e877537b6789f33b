//! Messages that share a connection to their server: put into its lane, acked, and retried.

use std::iter;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use super::{Forwarder, Message, Route, Server};
use crate::net::affinity::{Follower, current_cpu};
use crate::net::connection::{Connection, ReadTimeout, ReceiveError};
use crate::protocol::{Code, Packet};
use crate::proxy::events::Delivery;
use crate::proxy::lane::{Batch, Lane, Traveller};
use crate::proxy::replies::{ReplyQueue, ReplySlot};
use crate::proxy::trouble::{Trouble, check_ack};
use crate::proxy::upstream::Link;

/// Longer messages do not share a lane: they would be copied, and keep others waiting. In bytes.
const MAX_IN_LANE: usize = 16 << 10;

/// How long replies may wait for others of the same burst, so that all go in one write; the system
/// may make a few milliseconds of it.
const GATHER: Duration = Duration::from_millis(1);

/// The stack of a thread that reads a lane or retries a message.
const STACK: usize = 256 << 10;

/// Clients whose replies wait for others from elsewhere, a moment at most.
#[derive(Default)]
struct HeldReplies(Vec<Arc<ReplyQueue>>);

impl HeldReplies {
    /// Hands out acks to the clients of these messages.
    fn fill<'a>(
        &mut self,
        travellers: impl Iterator<Item = Traveller>,
        mut acks: impl Iterator<Item = &'a [u8]>,
    ) {
        let mut travellers = travellers.peekable();
        while let Some(first) = travellers.peek() {
            let replies = Arc::clone(&first.replies);
            let slots = iter::from_fn(|| {
                let next = travellers.next_if(|next| Arc::ptr_eq(&next.replies, &replies))?;
                Some(next.slot)
            });
            if replies.fill_most(slots.zip(&mut acks)) {
                self.0.push(replies);
            }
        }
    }

    /// Sends what was held.
    fn send(&mut self) {
        self.0.drain(..).for_each(|replies| replies.flush());
    }
}

impl Drop for HeldReplies {
    fn drop(&mut self) {
        self.send();
    }
}

impl Forwarder {
    /// Puts messages into the lanes of their servers, as far as these take them.
    pub(super) fn put_into_lanes(
        self: &Arc<Self>,
        messages: &[Message<'_>],
        routes: &mut [Route],
        replies: &Arc<ReplyQueue>,
        first: ReplySlot,
    ) {
        let mut servers: Vec<Arc<Server>> = Vec::new();
        for (message, turn) in messages.iter().zip(&*routes) {
            if let Route::Server(server) = turn
                && message.bytes.len() <= MAX_IN_LANE
                && !servers.iter().any(|other| Arc::ptr_eq(other, server))
            {
                servers.push(Arc::clone(server));
            }
        }
        let cpu = current_cpu();
        for server in &servers {
            let lane = server.handle.lane(cpu, |link| self.start_lane(link, server, cpu));
            let lane = match lane {
                Ok(Some(lane)) => lane,
                Ok(None) => continue,
                Err(trouble) => {
                    self.failed(server, &trouble);
                    for (message, turn) in messages.iter().zip(&mut *routes) {
                        if matches!(turn, Route::Server(other) if Arc::ptr_eq(other, server)) {
                            self.reselect(turn, message, message.arrived);
                        }
                    }
                    continue;
                }
            };
            let sent = Instant::now();
            let travellers = messages.iter().zip(&mut *routes).enumerate().filter_map(
                |(place, (message, turn))| {
                    let is_its = matches!(turn, Route::Server(other) if Arc::ptr_eq(other, server));
                    if !is_its || message.bytes.len() > MAX_IN_LANE {
                        return None;
                    }
                    *turn = Route::InLane;
                    self.events.forwarding(server, &message.data.payload);
                    let traveller = Traveller {
                        srcid: message.data.srcid.clone().into_owned(),
                        replies: Arc::clone(replies),
                        slot: first.nth(place),
                        arrived: message.arrived,
                        sent,
                    };
                    Some((message.bytes, traveller))
                },
            );
            lane.put(sent, travellers);
        }
    }

    /// Makes a lane of a connection, with a thread that reads its acks on this CPU.
    fn start_lane(
        self: &Arc<Self>,
        link: Link,
        server: &Arc<Server>,
        cpu: usize,
    ) -> Option<Arc<Lane>> {
        let connection = link.into_connection();
        let lane =
            Arc::new(Lane::new(Arc::clone(connection.stream()), self.settings.reply_timeout));
        let (forwarder, server, its) = (Arc::clone(self), Arc::clone(server), Arc::clone(&lane));
        let thread = thread::Builder::new().name("lane".to_owned()).stack_size(STACK);
        // Without a thread there is no lane, and each message goes by itself.
        thread.spawn(move || forwarder.serve_lane(&server, &its, connection, cpu)).ok()?;
        Some(lane)
    }

    /// The life of a lane: passes its acks on, and has the messages that it loses tried again.
    fn serve_lane(
        self: &Arc<Self>,
        server: &Arc<Server>,
        lane: &Lane,
        mut connection: Connection,
        cpu: usize,
    ) {
        let mut batch = Batch::default();
        let trouble = self.pass_acks(server, lane, &mut connection, cpu, &mut batch).err();
        let rest = lane.close();
        drop(connection);
        let Some(trouble) = trouble else { return };
        let mut is_first = true;
        for batch in [batch].iter().chain(&rest) {
            for (traveller, message) in batch.waiting() {
                self.events.lost(server);
                let known = match &trouble {
                    // Nothing was received since it was sent: the server had closed the connection,
                    // or is gone, which the next try will show.
                    Trouble::Broken(_) => None,
                    // However many waited, a server that stands still has failed once.
                    trouble if is_first => {
                        self.failed(server, trouble);
                        Some(trouble.clone())
                    }
                    Trouble::Timeout(limit) if traveller.sent.elapsed() > *limit / 2 => {
                        Some(Trouble::Waited)
                    }
                    // It was sent only now, and can only blame the lane.
                    _ => None,
                };
                is_first = false;
                self.retry(traveller, message, server, known);
            }
        }
    }

    /// Passes acks on until the connection ends or is not to be used any more. `batch` is the one
    /// that the next acks are for.
    fn pass_acks(
        self: &Arc<Self>,
        server: &Arc<Server>,
        lane: &Lane,
        connection: &mut Connection,
        cpu: usize,
        batch: &mut Batch,
    ) -> Result<(), Trouble> {
        let limit = self.settings.reply_timeout.min(self.settings.message_timeout);
        let mut oldest = None;
        let mut last = Instant::now();
        let mut held = HeldReplies::default();
        let mut follower = Follower::default();
        loop {
            let deadline = oldest.unwrap_or_else(Instant::now) + limit;
            let until = if held.0.is_empty() { deadline } else { Instant::now() + GATHER };
            match connection.wait(ReadTimeout::Until(until)) {
                // Its clients' threads run there.
                Ok(true) => follower.follow(|| Some(cpu)),
                Ok(false) => return Err(Trouble::closed()),
                Err(error @ (ReceiveError::Idle | ReceiveError::Slow(_))) => {
                    held.send();
                    oldest = lane.oldest();
                    // Only the gathering is over, or a message put in since may still have time.
                    if oldest.is_none_or(|oldest| oldest.elapsed() < limit) {
                        continue;
                    }
                    return Err(Trouble::from_receiving(error, limit));
                }
                Err(error) => return Err(Trouble::from_receiving(error, limit)),
            }
            let now = Instant::now();
            held.send();
            let acks = connection.take_packets(usize::MAX);
            let mut rest = acks.iter().map(|ack| connection.bytes(ack.clone()));
            let mut settled = 0;
            while rest.len() > 0 {
                if batch.waiting().len() == 0 {
                    let Some(next) = lane.next_batch() else {
                        self.failed(server, &Trouble::BadAck("nothing was asked".to_owned()));
                        return Err(Trouble::closed());
                    };
                    *batch = next;
                }
                if settled == 0
                    && let Some((traveller, _)) = batch.waiting().next()
                {
                    last = last.max(traveller.sent);
                }
                let (good, trouble) = self.check_acks(server, batch, rest.clone(), now);
                held.fill(batch.take(good), &mut rest);
                settled += good;
                if let Some(trouble) = trouble {
                    // This message alone has failed; those after it only lose their lane.
                    if let Some((traveller, message)) = batch.waiting().next() {
                        self.events.lost(server);
                        self.failed(server, &trouble);
                        self.retry(traveller, message, server, Some(trouble));
                    }
                    batch.take(1).for_each(drop);
                    return Err(Trouble::closed());
                }
            }
            oldest = lane.settle(settled, batch);
            if let Ok(settled) = u32::try_from(settled)
                && settled > 0
            {
                server.handle.record_latency((now - last) / settled);
            }
            last = now;
            if lane.is_over() {
                return Ok(());
            }
        }
    }

    /// Notes how many of a batch's next messages these are the acks of, and what is wrong with the
    /// one after those.
    fn check_acks<'a>(
        &self,
        server: &Server,
        batch: &Batch,
        acks: impl Iterator<Item = &'a [u8]>,
        now: Instant,
    ) -> (usize, Option<Trouble>) {
        let mut trouble = None;
        let pairs = batch.waiting().zip(acks);
        let deliveries = pairs.map_while(|((traveller, message), ack)| {
            trouble = check_ack(ack, &traveller.srcid).err();
            trouble.is_none().then(|| Delivery {
                srcid: &traveller.srcid,
                message,
                ack,
                arrived: traveller.arrived,
                took: now - traveller.sent,
                tries: 1,
            })
        });
        (self.acked(server, deliveries), trouble)
    }

    /// Tries a message again that a lane has lost, in a thread of its own: it may take long.
    fn retry(
        self: &Arc<Self>,
        traveller: &Traveller,
        bytes: &[u8],
        server: &Arc<Server>,
        known: Option<Trouble>,
    ) {
        let (replies, slot, arrived) =
            (Arc::clone(&traveller.replies), traveller.slot, traveller.arrived);
        let (forwarder, its_server) = (Arc::clone(self), Arc::clone(server));
        let (its_bytes, its_replies) = (bytes.to_vec(), Arc::clone(&replies));
        let thread = thread::Builder::new().name("retry".to_owned()).stack_size(STACK);
        let started = thread.spawn(move || {
            // It was read when it was taken in, so it can be read again.
            if let Ok(Packet::Data(data)) = Packet::parse(&its_bytes) {
                let message = Message { data, bytes: &its_bytes, arrived };
                forwarder.deliver(&message, its_server, known, true, &its_replies, slot);
                its_replies.flush();
            }
        });
        if let Err(error) = started
            && let Ok(Packet::Data(data)) = Packet::parse(bytes)
        {
            let reason = format!("the proxy could not try another server: {error}");
            let message = Message { data, bytes, arrived };
            self.refuse(&message, Code::Overloaded, reason, 1, &replies, slot);
            replies.flush();
        }
    }
}
