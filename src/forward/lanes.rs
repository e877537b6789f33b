//! Messages that share a connection to their server: put into its lane, acked, and retried.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use super::{Forwarder, Message, Server};
use crate::journal::Delivery;
use crate::lane::{Lane, Traveller};
use crate::packet::{Code, Packet};
use crate::replies::{Replies, Slot};
use crate::trouble::{Trouble, check_ack};
use crate::upstream::Link;
use crate::wire::{Connection, Patience, ReceiveError};

/// Longer messages do not share a lane: they would be copied, and keep others waiting. In bytes.
const MAX_IN_LANE: usize = 16 << 10;

/// How long replies may wait for others of the same burst, so that all go in one write.
const GATHER: Duration = Duration::from_millis(1);

/// The stack of a thread that reads a lane or retries a message.
const STACK: usize = 256 << 10;

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

impl Traveller {
    /// Ends the journey otherwise: hands out the message and its reply's place, and sends the reply.
    fn with_message(&self, end: impl FnOnce(&Message<'_>, &Arc<Replies>, Slot)) {
        // It was read when it was taken in, so it can be read again.
        if let Ok(Packet::Data(data)) = Packet::parse(&self.bytes) {
            end(
                &Message { data, bytes: &self.bytes, arrived: self.arrived },
                &self.replies,
                self.slot,
            );
            self.replies.flush();
        }
    }
}

impl Forwarder {
    /// Puts the message into the server's lane, if it has one for this message.
    pub(super) fn put_into_lane(
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
        let limit = self.settings.reply_timeout.min(self.settings.message_timeout);
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
        let traveller = Arc::new(traveller);
        let (forwarder, its) = (Arc::clone(self), Arc::clone(&traveller));
        let thread = thread::Builder::new().name("retry".to_owned()).stack_size(STACK);
        let started = thread.spawn(move || {
            its.with_message(|message, replies, slot| {
                forwarder.deliver(message, server, known, replies, slot);
            });
        });
        if let Err(error) = started {
            let reason = format!("the proxy could not try another server: {error}");
            traveller.with_message(|message, replies, slot| {
                self.refuse(message, Code::Overloaded, reason, 1, replies, slot);
            });
        }
    }
}
