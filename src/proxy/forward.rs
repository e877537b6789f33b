//! Forwarding: every message that is taken in ends in an ack or in a refusal.
//!
//! A message that is not alone under way and is for a server that answers quickly is put into one of
//! the server's [lanes](crate::proxy::lane), and the thread that reads the lane passes the ack on. Any other
//! message is delivered by the thread that took it in, on a connection of its own. Whatever goes
//! wrong, each message is retried by itself: hashing is idempotent, so that one whose ack did not
//! come whole can be sent to another server without harm.

mod lanes;

use std::fmt::Write as _;
use std::io::IoSlice;
use std::iter;
use std::ops::Range;
use std::slice;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use super::events::{Delivery, Events};
use super::message::Message;
use super::replies::{ReplyQueue, ReplySlot};
use super::table::{self, Failure, Table};
use super::trouble::Trouble;
use super::upstream::{Link, Upstream};
use crate::cli::escape::Escaped;
use crate::protocol::{Code, Packet, Refusal};

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

/// Forwards messages to the servers of the table.
#[derive(Debug)]
pub struct Forwarder {
    /// The switching table.
    pub table: Table<Upstream>,
    /// Where what happens is said and counted.
    pub events: Arc<Events>,
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

/// Where a message goes.
#[derive(Debug)]
enum Route {
    /// To this server, whose turn it was.
    Server(Arc<Server>),
    /// There, with others in a lane.
    InLane,
    /// Nobody serves its policy.
    Nobody,
}

impl Forwarder {
    /// Forwards messages that came together, whose replies will come in their places.
    pub fn forward(self: &Arc<Self>, messages: &mut [Message<'_>], replies: &Arc<ReplyQueue>) {
        let Some(arrived) = messages.first().map(|message| message.arrived) else { return };
        self.events.received(messages);
        let first = replies.reserve(messages.len());
        let mut routes = self.select(messages, arrived);
        // To hand it over costs a message that is alone under way a wake-up, and saves others one.
        if self.events.stats().totals().in_flight > 1 {
            self.put_into_lanes(messages, &mut routes, replies, first);
        }
        for place in 0..messages.len() {
            // The others had to wait: their servers may have failed meanwhile, or have lanes now.
            if place > 0 && !matches!(routes[place], Route::InLane) {
                messages[place].arrived = Instant::now();
                self.reselect(&mut routes[place], &messages[place], arrived);
                // Those after it may have to wait again, and are looked at when it is their turn.
                let its_route = &mut routes[place..=place];
                let slot = first.nth(place);
                self.put_into_lanes(&messages[place..=place], its_route, replies, slot);
            }
            let (message, slot) = (&messages[place], first.nth(place));
            match std::mem::replace(&mut routes[place], Route::InLane) {
                // This may take long, and what came before is not to wait for it.
                Route::Server(server) => {
                    replies.flush();
                    self.deliver(message, server, None, false, replies, slot);
                }
                Route::InLane => {}
                Route::Nobody => {
                    self.refuse(message, Code::NoServer, no_server(message), 0, replies, slot);
                }
            }
        }
    }

    fn select(&self, messages: &[Message<'_>], now: Instant) -> Vec<Route> {
        let policies = messages.iter().map(|message| message.data.policy.text());
        let to_route = |server| match server {
            Some(server) => Route::Server(server),
            None => Route::Nobody,
        };
        self.table.select(policies, now).into_iter().map(to_route).collect()
    }

    /// Gives the message to another server if that of its turn has failed since `then` and a better one
    /// is there: those of one burst would else wait for it one after another.
    fn reselect(&self, route: &mut Route, message: &Message<'_>, then: Instant) {
        let server = match route {
            Route::Server(server) => self.table.reselect(server, then, message.arrived),
            Route::InLane | Route::Nobody => None,
        };
        *route = match server {
            Some(server) => Route::Server(server),
            None => self.select(slice::from_ref(message), message.arrived).swap_remove(0),
        };
    }

    /// Tries servers until one answers, beginning with `server`, which may have failed already. A
    /// retry is of a message that a lane has lost; any other holds its client's connection.
    fn deliver(
        &self,
        message: &Message<'_>,
        mut server: Arc<Server>,
        mut known: Option<Trouble>,
        is_retry: bool,
        replies: &Arc<ReplyQueue>,
        slot: ReplySlot,
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
                None => match self.attempt(&server, message, wait_until, is_retry) {
                    Ok(Exchanged { link, ack, took }) => {
                        let ack = link.bytes(ack);
                        let delivery = Delivery {
                            srcid: &message.data.srcid,
                            message: message.bytes,
                            ack,
                            arrived: message.arrived,
                            took,
                            tries: failed.len() + 1,
                        };
                        self.acked(&server, iter::once(delivery));
                        server.handle.record_latency(took);
                        replies.fill(slot, ack);
                        server.handle.put_back(link);
                        return;
                    }
                    Err(trouble) => trouble,
                },
            };
            let is_open = may_ask_again(&server, &trouble, is_retry);
            let list = if is_open { &mut postponed } else { &mut failed };
            list.push((server, trouble));
            let now = Instant::now();
            if now >= deadline || failed.len() >= self.settings.tries {
                break;
            }
            let tried: Vec<_> = failed.iter().chain(&postponed).map(|(server, _)| server).collect();
            server = match self.table.select_for_retry(&policy, &tried, now) {
                Some(other) => other,
                None => {
                    let Some((same, _)) = postponed.pop() else { break };
                    postponed.clear();
                    wait_until = deadline;
                    thread::sleep(PAUSE);
                    same
                }
            };
            self.events.retrying(message, &server);
        }
        failed.append(&mut postponed);
        self.give_up(message, &failed, replies, slot);
    }

    /// Sends the message to the server and waits for the ack; once more on a fresh connection
    /// where a kept one turns out to be closed. Notes a failure that is the server's.
    fn attempt(
        &self,
        server: &Arc<Server>,
        message: &Message<'_>,
        wait_until: Instant,
        is_retry: bool,
    ) -> Result<Exchanged, Trouble> {
        let blame = |trouble: &Trouble| {
            if !may_ask_again(server, trouble, is_retry) {
                self.failed(server, trouble);
            }
        };
        let deadline = message.arrived + self.settings.message_timeout;
        let upstream = &server.handle;
        let mut link = upstream.open(wait_until, deadline, is_retry).inspect_err(blame)?;
        self.events.forwarding(server, &message.data.payload);
        let mut exchanged = self.exchange(&mut link, message);
        if let Err(trouble) = &exchanged
            && link.was_stale(trouble)
        {
            exchanged = upstream
                .renew(&mut link, deadline)
                .and_then(|()| self.exchange(&mut link, message));
        }
        match exchanged {
            Ok((ack, took)) => Ok(Exchanged { link, ack, took }),
            Err(trouble) => {
                self.events.lost(server);
                // While the link still has its place: who waits for it goes to another server.
                blame(&trouble);
                Err(trouble)
            }
        }
    }

    fn exchange(
        &self,
        link: &mut Link,
        message: &Message<'_>,
    ) -> Result<(Range<usize>, Duration), Trouble> {
        let sent = Instant::now();
        let whole = sent + self.settings.reply_timeout;
        let deadline = whole.min(message.arrived + self.settings.message_timeout);
        let limit = deadline.saturating_duration_since(sent);
        let mut parts = [IoSlice::new(message.bytes), IoSlice::new(b"\n")];
        link.send_before(deadline, &mut parts)
            .map_err(|error| Trouble::from_sending(&error, limit))?;
        let ack = link.receive_ack(&message.data.srcid, deadline, limit)?;
        Ok((ack, sent.elapsed()))
    }

    /// Says how many were acked.
    fn acked<'a>(&self, server: &Server, deliveries: impl Iterator<Item = Delivery<'a>>) -> usize {
        let acked = self.events.acked(server, deliveries);
        if acked > 0 && self.table.succeeded(server, Instant::now()) {
            self.events.back(server);
        }
        acked
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
        self.events.failed(server, trouble);
        server.handle.note_failure();
        if self.table.failed(server, failure, Instant::now()) {
            self.events.ejected(server, trouble);
        }
    }

    fn give_up(
        &self,
        message: &Message<'_>,
        troubles: &[(Arc<Server>, Trouble)],
        replies: &ReplyQueue,
        slot: ReplySlot,
    ) {
        let mut reason = format!(
            "no server of privacy policy \"{}\" answered",
            Escaped(&message.data.policy.text())
        );
        for (place, (server, trouble)) in troubles.iter().enumerate() {
            let mark = if place == 0 { ": " } else { "; " };
            let _ = write!(
                reason,
                "{mark}server {} ({}) {trouble}",
                Escaped(&server.id),
                server.address
            );
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
        replies: &ReplyQueue,
        slot: ReplySlot,
    ) {
        self.events.refused(message, code, &reason, tries);
        replies
            .write(slot, &Packet::Refusal(Refusal::new(message.data.srcid.clone(), code, reason)));
    }
}

/// Whether the server was sent nothing and may yet take the message: its line is long, we lack
/// something ourselves, or it has only just registered and is about to listen. At one with a lease a
/// message that holds its client's connection may not wait for a place: those that have one may be
/// waiting for it.
fn may_ask_again(server: &Server, trouble: &Trouble, is_retry: bool) -> bool {
    match trouble {
        Trouble::Local(_) => true,
        Trouble::Waited => is_retry || !server.leased,
        Trouble::Unreachable(_) => !server.leased && server.since.elapsed() < YOUNG,
        _ => false,
    }
}

fn no_server(message: &Message<'_>) -> String {
    format!("no server serves privacy policy \"{}\"", Escaped(&message.data.policy.text()))
}
