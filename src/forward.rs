//! Forwarding: every message that is taken in ends in an ack or in a refusal.
//!
//! Messages that arrived together are selected for in their order, sent to their servers side by
//! side, and answered in their order. Each is retried by itself: hashing is idempotent, so that a
//! message whose ack did not come whole can be sent to another server without harm.

use std::fmt::Write as _;
use std::io::IoSlice;
use std::net::SocketAddr;
use std::ops::Range;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use crate::journal::Journal;
use crate::packet::{Code, Data, Packet, Refusal};
use crate::table::{self, Failure, Table};
use crate::terminal::Shown;
use crate::upstream::{Link, Trouble, Upstream};
use crate::wire::Connection;

/// Replies that wait to be sent with others, in bytes.
const MAX_UNSENT: usize = 64 << 10;

/// How long a reply may wait for the next one, so that both go in one write.
const GATHER: Duration = Duration::from_millis(1);

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
    pub journal: Journal,
    /// Limits.
    pub settings: Settings,
}

/// Messages of one burst that go to one server.
struct Group {
    server: Arc<Server>,
    state: GroupState,
    /// When its messages were sent.
    sent: Instant,
}

/// A message that was answered.
struct Exchanged {
    link: Link,
    ack: Range<usize>,
    /// From its sending to its ack.
    took: Duration,
}

enum GroupState {
    /// Its messages are sent, and acks come.
    Open(Link),
    /// It has gone wrong; messages without an ack are to be tried elsewhere.
    Failed(Trouble),
    /// Nothing was sent to the server: its messages are still to be tried there, one by one.
    Unsent,
}

/// The replies to one client, in the order of its packets.
pub struct Replies<'a> {
    client: &'a Connection,
    peer: SocketAddr,
    journal: &'a Journal,
    unsent: Vec<u8>,
    /// The client has gone, or does not read.
    lost: bool,
}

impl<'a> Replies<'a> {
    /// Replies to be sent on the connection to `peer`.
    pub fn new(client: &'a Connection, peer: SocketAddr, journal: &'a Journal) -> Self {
        Replies { client, peer, journal, unsent: Vec::new(), lost: false }
    }

    /// Adds a packet as it came from a server.
    pub fn push(&mut self, packet: &[u8]) {
        self.unsent.extend_from_slice(packet);
        self.unsent.push(b'\n');
        if self.unsent.len() >= MAX_UNSENT {
            self.send();
        }
    }

    /// Adds a packet of our own.
    pub fn write(&mut self, packet: &Packet<'_>) {
        packet.write(&mut self.unsent);
    }

    /// Sends what was added. Says whether the client still takes it.
    pub fn send(&mut self) -> bool {
        if !self.lost
            && !self.unsent.is_empty()
            && let Err(error) = self.client.send(&self.unsent)
        {
            self.lost = true;
            self.journal.reply_lost(self.peer, &error);
        }
        self.unsent.clear();
        !self.lost
    }

    fn is_empty(&self) -> bool {
        self.unsent.is_empty()
    }
}

impl Forwarder {
    /// Forwards messages that arrived together and adds a reply for each, in their order.
    pub fn forward(&self, messages: &[Message<'_>], replies: &mut Replies<'_>) {
        let now = Instant::now();
        let servers: Vec<_> = messages
            .iter()
            .map(|message| self.table.select(&message.data.policy.text(), now))
            .collect();
        let mut groups = if let [_] = messages {
            Vec::new()
        } else {
            self.send_side_by_side(messages, &servers)
        };
        for (message, server) in messages.iter().zip(servers) {
            let Some(server) = server else {
                self.refuse(message, Code::NoServer, no_server(message), 0, replies);
                continue;
            };
            let group = groups.iter_mut().find(|group| Arc::ptr_eq(&group.server, &server));
            let trouble = match group {
                Some(group) => match self.collect(message, group, replies) {
                    Ok(()) => continue,
                    Err(trouble) => {
                        self.journal.lost(&server);
                        trouble
                    }
                },
                None => None,
            };
            self.deliver(message, server, trouble, replies);
        }
        for group in groups {
            if let GroupState::Open(link) = group.state {
                group.server.handle.put_back(link);
            }
        }
    }

    /// Sends each server its share of the messages in one write, before any ack is waited for.
    fn send_side_by_side(
        &self,
        messages: &[Message<'_>],
        servers: &[Option<Arc<Server>>],
    ) -> Vec<Group> {
        let mut groups: Vec<Group> = Vec::new();
        for server in servers.iter().flatten().filter(|server| server.leased) {
            if groups.iter().any(|group| Arc::ptr_eq(&group.server, server)) {
                continue;
            }
            let share = messages
                .iter()
                .zip(servers)
                .filter(|(_, its)| its.as_ref().is_some_and(|its| Arc::ptr_eq(its, server)));
            let mut parts = Vec::with_capacity(2 * messages.len());
            for (message, _) in share {
                self.journal.forwarding(server, message);
                parts.extend([IoSlice::new(message.bytes), IoSlice::new(b"\n")]);
            }
            let state = match server.handle.open(Instant::now()) {
                Ok(link) => match link.connection().send_parts(&mut parts) {
                    Ok(()) => GroupState::Open(link),
                    Err(error) => self.group_trouble(
                        server,
                        &link,
                        Link::send_trouble(&error, self.settings.reply_timeout),
                    ),
                },
                // Nothing was sent, and each message finds that out, or better luck, by itself.
                Err(_) => GroupState::Unsent,
            };
            groups.push(Group { server: Arc::clone(server), state, sent: Instant::now() });
        }
        groups
    }

    fn group_trouble(&self, server: &Arc<Server>, link: &Link, trouble: Trouble) -> GroupState {
        if link.was_stale(&trouble) {
            return GroupState::Unsent;
        }
        self.failed(server, &trouble);
        GroupState::Failed(trouble)
    }

    /// Waits for the ack of a message that was sent with its group, or says what went wrong, if
    /// anything was tried at all.
    fn collect(
        &self,
        message: &Message<'_>,
        group: &mut Group,
        replies: &mut Replies<'_>,
    ) -> Result<(), Option<Trouble>> {
        let link = match &mut group.state {
            GroupState::Open(link) => link,
            GroupState::Failed(trouble) => return Err(Some(trouble.clone())),
            GroupState::Unsent => return Err(None),
        };
        if !replies.is_empty() && !link.connection().is_ready_within(GATHER) {
            replies.send();
        }
        let limit = self.settings.reply_timeout;
        match link.receive_ack(&message.data.srcid, group.sent + limit, limit) {
            Ok(ack) => {
                let ack = link.bytes(ack);
                self.succeeded(&group.server, message, ack, group.sent.elapsed(), 1);
                replies.push(ack);
                Ok(())
            }
            Err(trouble) => {
                group.state = self.group_trouble(&group.server, link, trouble);
                match &group.state {
                    GroupState::Failed(trouble) => Err(Some(trouble.clone())),
                    _ => Err(None),
                }
            }
        }
    }

    /// Tries servers until one answers, beginning with `server`, which may have failed already.
    fn deliver(
        &self,
        message: &Message<'_>,
        mut server: Arc<Server>,
        mut known: Option<Trouble>,
        replies: &mut Replies<'_>,
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
                        let bytes = link.bytes(ack);
                        self.succeeded(&server, message, bytes, took, failed.len() + 1);
                        replies.push(bytes);
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
            // Whatever comes next may take long, and earlier replies are not to wait for it.
            replies.send();
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
        self.give_up(message, &failed, replies);
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
        self.journal.forwarding(server, message);
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

    fn succeeded(
        &self,
        server: &Arc<Server>,
        message: &Message<'_>,
        ack: &[u8],
        took: Duration,
        tries: usize,
    ) {
        self.journal.acked(server, message, ack, took, tries);
        if self.table.succeeded(server, Instant::now()) {
            self.journal.back(server);
        }
    }

    fn failed(&self, server: &Arc<Server>, trouble: &Trouble) {
        let failure = match trouble {
            Trouble::Unreachable(_) => Failure::Unreachable,
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
        replies: &mut Replies<'_>,
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
        self.refuse(message, code, reason, troubles.len(), replies);
    }

    fn refuse(
        &self,
        message: &Message<'_>,
        code: Code,
        reason: String,
        tries: usize,
        replies: &mut Replies<'_>,
    ) {
        self.journal.refused(message, code, &reason, tries);
        replies.write(&Packet::Refusal(Refusal::new(message.data.srcid.clone(), code, reason)));
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
