//! One message on its way: from the packet that was read to the reply that is written.

use std::any::Any;
use std::mem;
use std::ops::{Deref, DerefMut, Range};
use std::sync::Arc;
use std::time::{Duration, Instant};

use sha1::{Digest, Sha1};

use super::events::About;
use super::replies::{ReplyQueue, ReplySlot};
use super::table::Routed;
use crate::net::budget::Reservation;
use crate::protocol::{Code, Data, Id, Packet, Refusal};

/// The longest payload, in bytes, whose hash the proxy checks. The client checks all.
pub const MAX_CHECKED: usize = 64 << 10;

/// A packet with a newline behind it, in memory that it may share with others.
#[derive(Debug, Clone)]
pub struct Line {
    bytes: Arc<Vec<u8>>,
    range: Range<usize>,
}

impl Line {
    /// All of these bytes.
    pub fn new(bytes: Vec<u8>) -> Self {
        let range = 0..bytes.len();
        Line { bytes: Arc::new(bytes), range }
    }

    /// Those in this range.
    pub fn at(bytes: &Arc<Vec<u8>>, range: Range<usize>) -> Self {
        Line { bytes: Arc::clone(bytes), range }
    }

    /// The packet alone.
    pub fn packet(&self) -> &[u8] {
        self.strip_suffix(b"\n").unwrap_or(self)
    }
}

impl Deref for Line {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[self.range.clone()]
    }
}

/// A message in flight. It is answered exactly once, by an ack or a refusal. Dropping it unanswered refuses
/// it.
///
/// Boxed, so that a move takes no stack: a thread never gives back stack that it has used.
#[derive(Debug)]
pub struct InFlight(Box<Message>);

/// The fields of [`InFlight`].
#[derive(Debug)]
pub struct Message {
    /// Its packet with a newline behind it.
    pub line: Line,
    /// The id of the client, as the packet has it.
    pub srcid: Id<'static>,
    /// The policy that it asks for, as text.
    pub policy: Box<str>,
    /// SHA-1 of the payload, which the ack must carry. `None` if the payload is longer than [`MAX_CHECKED`].
    digest: Option<[u8; 20]>,
    /// When its packet was received.
    pub arrived: Instant,
    /// When it is refused if it has no ack by then.
    pub deadline: Instant,
    /// The `timeout` that its packet sets, in seconds.
    pub timeout: Option<u64>,
    /// It may be carried out at most once.
    pub once: bool,
    /// Some of it may have been sent to its current server. Set just before the send.
    pub is_sent: bool,
    /// It must not share a connection (no pipelining). Set by the backend.
    pub needs_own_connection: bool,
    /// The current server's time for it; `None` if the server has a lease.
    pub server_limit: Option<Duration>,
    /// Its permit at its server, if that has a capacity.
    pub permit: Option<Permit>,
    /// What has failed so far.
    pub history: History,
    reply: Option<ReplySlot>,
    /// The memory that its packet takes of the budget.
    memory: Option<Reservation>,
}

/// One unit of a server's capacity. Dropping it gives the unit back.
pub type Permit = Box<dyn Any + Send>;

/// What has failed on a message's way so far.
#[derive(Debug, Default)]
pub struct History {
    /// Failed attempts, each at another registration.
    pub attempts: Vec<Attempt>,
    /// Serials of registrations that could not take it just now. `retry` clears the list to try them again.
    pub postponed: Vec<u64>,
    /// The event `postponed` was reported for it; never reset.
    pub was_postponed: bool,
    /// Serial of the registration to which it was resent after a reused connection was closed.
    pub resent_to: Option<u64>,
}

impl History {
    /// Adds an attempt that failed. Drops attempts at earlier registrations of the same server that are not
    /// tries: a server that re-registers and fails in a loop would otherwise fill the memory.
    pub fn add(&mut self, attempt: Attempt) {
        self.attempts.retain(|past| past.is_try || past.id != attempt.id);
        self.attempts.push(attempt);
    }

    /// The servers that it is not to go to for now, by their registrations.
    pub fn excluded(&self) -> impl Iterator<Item = u64> {
        let failed = self.attempts.iter().map(|attempt| attempt.serial);
        failed.chain(self.postponed.iter().copied())
    }

    /// How many attempts count against `-tries`.
    pub fn tries(&self) -> usize {
        self.attempts.iter().filter(|attempt| attempt.is_try).count()
    }
}

/// An attempt that failed.
#[derive(Debug)]
pub struct Attempt {
    /// The server's registration.
    pub serial: u64,
    /// The server's id, as text.
    pub id: String,
    /// What went wrong at which server, as a phrase for the refusal.
    pub account: String,
    /// The code of a refusal for it.
    pub code: Code,
    /// It counts against `-tries` (see `Verdict::is_try`).
    pub is_try: bool,
}

impl InFlight {
    /// The message of `data`, which is the packet of `line`; its reply goes to `reply`.
    pub fn new(
        data: &Data<'_>,
        line: Line,
        arrived: Instant,
        deadline: Instant,
        reply: ReplySlot,
        memory: Option<Reservation>,
    ) -> Self {
        let is_checked = data.payload.len() <= MAX_CHECKED;
        InFlight(Box::new(Message {
            line,
            srcid: data.srcid.clone().into_owned(),
            policy: data.policy.text().into(),
            digest: is_checked.then(|| Sha1::digest(data.payload.as_bytes()).into()),
            arrived,
            deadline,
            timeout: data.timeout,
            once: data.once,
            is_sent: false,
            needs_own_connection: false,
            server_limit: None,
            permit: None,
            history: History::default(),
            reply: Some(reply),
            memory,
        }))
    }

    /// Whether its packet takes memory of the budget.
    pub fn holds_memory(&self) -> bool {
        self.memory.is_some()
    }

    /// Whether an ack with this payload may be for this message. Always true for a payload that is not
    /// checked.
    pub fn has_hash(&self, payload: &str) -> bool {
        let Some(digest) = self.digest else { return true };
        let mut hash = [0; 40];
        hex::encode_to_slice(digest, &mut hash).is_ok() && hash == payload.as_bytes()
    }

    /// When the time of a server that gets it `now` is over: in that server's queue, or for the ack.
    pub fn give_up_at(&self, now: Instant) -> Instant {
        let left = self.deadline.saturating_duration_since(now);
        now + self.server_limit.map_or(left, |limit| limit.min(left))
    }

    /// Takes the slot of its reply: the caller answers.
    pub fn into_reply(mut self) -> Option<ReplySlot> {
        self.reply.take()
    }

    /// Refuses it. Returns the queue of its reply, to be flushed.
    pub fn refuse(&mut self, code: Code, reason: String) -> Option<Arc<ReplyQueue>> {
        let slot = self.refused(code, &reason)?;
        let destid = mem::replace(&mut self.srcid, Id::ZERO);
        let refusal = Packet::Refusal(Refusal::new(destid, code, reason));
        Some(slot.fill(refusal.to_line().trim_ascii_end()))
    }

    /// Passes on the server's own refusal, which counts under `code`. Returns the queue, to be flushed.
    pub fn pass_refusal(
        &mut self,
        code: Code,
        reason: &str,
        packet: &[u8],
    ) -> Option<Arc<ReplyQueue>> {
        Some(self.refused(code, reason)?.fill(packet))
    }

    /// It is refused: takes the slot of its reply.
    fn refused(&mut self, code: Code, reason: &str) -> Option<ReplySlot> {
        let slot = self.reply.take()?;
        slot.queue.events.refused(&self.about(), code, reason);
        Some(slot)
    }

    /// What events print and record about it.
    pub fn about(&self) -> About<'_> {
        About {
            srcid: &self.srcid,
            policy: &self.policy,
            packet: self.line.packet(),
            arrived: self.arrived,
            tries: self.history.tries(),
        }
    }
}

impl Routed for InFlight {
    fn policy(&self) -> &str {
        &self.policy
    }

    fn arrived(&self) -> Instant {
        self.arrived
    }

    fn deadline(&self) -> Instant {
        self.deadline
    }

    fn may_go_to(&self, serial: u64) -> bool {
        self.history.excluded().all(|other| other != serial)
    }

    fn may_go_anywhere(&self) -> bool {
        self.history.excluded().next().is_none()
    }
}

impl Deref for InFlight {
    type Target = Message;

    fn deref(&self) -> &Message {
        &self.0
    }
}

impl DerefMut for InFlight {
    fn deref_mut(&mut self) -> &mut Message {
        &mut self.0
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        if self.reply.is_none() {
            return;
        }
        let (code, reason) = if self.once && self.is_sent {
            (
                Code::OutcomeUnknown,
                "the proxy stopped working on this message, which may have been carried out",
            )
        } else {
            (Code::Overloaded, "the proxy stopped working on this message; send it again")
        };
        if let Some(queue) = self.refuse(code, reason.to_owned()) {
            queue.flush();
        }
    }
}
