//! One policy: its servers in the order of their turns, and the messages that wait for one of them.
//!
//! A message waits if every server that it may go to is at its capacity, if others wait already, or if the
//! policy's last server left less than `REMEMBERED` ago.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::member::{Member, Server};

/// For this long after its last server left, a policy accepts messages; each waits up to `grace` for a
/// server.
const REMEMBERED: Duration = Duration::from_secs(10);

/// Pause between two searches for late messages, per waiting message. A search takes about a tenth of the
/// pause, under the table's lock.
const LATE_PAUSE: Duration = Duration::from_micros(1);

/// What the table knows of a message.
pub trait Routed {
    /// The policy that it asks for, as text.
    fn policy(&self) -> &str;
    /// When it came.
    fn arrived(&self) -> Instant;
    /// Until when it may wait.
    fn deadline(&self) -> Instant;
    /// Whether it may go to the server of this registration.
    fn may_go_to(&self, serial: u64) -> bool;
    /// Whether it may go to every server.
    fn may_go_anywhere(&self) -> bool;
}

/// What becomes of a message that asks for a server.
#[derive(Debug)]
pub enum Selected<H, M> {
    /// It goes to this server, and counts there if the server has a capacity.
    Server(M, Arc<Server<H>>),
    /// It waits in the table for a server of this policy.
    Waits(String),
    /// There is no server for it.
    Nobody(M),
}

/// The messages of a policy that need not wait any more.
#[derive(Debug)]
pub struct Ready<H, M> {
    /// Those for which a server is free, in the order of their arrival.
    pub selected: Vec<(M, Arc<Server<H>>)>,
    /// Those whose time is over.
    pub late: Vec<M>,
    /// The policy has a server.
    pub is_served: bool,
    /// When to call again; `None` if a timer for an earlier call is set, or nothing waits.
    pub look_at: Option<Instant>,
}

#[derive(Debug)]
pub(super) struct Policy<H, M> {
    /// In the order of their turns.
    pub(super) queue: VecDeque<Box<Member<H>>>,
    /// Counts retries: they have a rotation of their own, and leave the turns alone.
    retries: usize,
    /// In the order of their arrival.
    waiting: VecDeque<Waiting<M>>,
    /// How many of them may not go to every server.
    restricted: usize,
    /// How long a message waits if it has no server.
    grace: Duration,
    /// When a server was last removed.
    last_removed_at: Option<Instant>,
    /// When to search for late messages next; `None`: at the next call.
    late_from: Option<Instant>,
    /// When the caller looks again.
    timer_at: Option<Instant>,
}

/// A message that waits for a server.
#[derive(Debug)]
struct Waiting<M> {
    since: Instant,
    message: M,
}

impl<H, M> Policy<H, M> {
    /// One without servers.
    pub(super) fn new(grace: Duration) -> Self {
        Policy {
            queue: VecDeque::new(),
            retries: 0,
            waiting: VecDeque::new(),
            restricted: 0,
            grace,
            last_removed_at: None,
            late_from: None,
            timer_at: None,
        }
    }

    /// Its servers as they are now.
    pub(super) fn members(&self) -> Vec<Member<H>> {
        self.queue.iter().map(|member| Member::clone(member)).collect()
    }

    /// Removes the server of this registration, which is here.
    pub(super) fn remove(&mut self, serial: u64, now: Instant) {
        self.queue.retain(|member| member.server.serial != serial);
        self.last_removed_at = Some(now);
        self.late_from = None;
    }

    /// Whether it has no server, and no message that waits for one.
    pub(super) fn is_unused(&self) -> bool {
        self.queue.is_empty() && self.waiting.is_empty()
    }

    /// Whether nothing of it need be kept.
    pub(super) fn can_be_dropped(&self, now: Instant) -> bool {
        self.waiting.is_empty() && self.has_expired(now)
    }

    /// Whether it has no server, and its last one left so long ago that messages need not wait for
    /// another.
    fn has_expired(&self, now: Instant) -> bool {
        let is_long_ago = |last_removed_at| now >= last_removed_at + REMEMBERED;
        self.queue.is_empty() && self.last_removed_at.is_none_or(is_long_ago)
    }

    /// How many messages wait.
    pub(super) fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Takes all that wait.
    pub(super) fn take_waiting(&mut self) -> impl Iterator<Item = M> {
        self.restricted = 0;
        self.waiting.drain(..).map(|waiting| waiting.message)
    }

    /// The server whose turn it is, the first [candidate](candidates). It goes to the back.
    fn take_turn(
        queue: &mut VecDeque<Box<Member<H>>>,
        now: Instant,
        is_allowed: impl Fn(&Member<H>) -> bool,
    ) -> Option<Arc<Server<H>>> {
        let at = candidates(queue, now, is_allowed).next()?;
        let mut member = queue.remove(at)?;
        let server = member.select(now);
        queue.push_back(member);
        Some(server)
    }

    /// The next of the candidates, in a rotation of its own for retries.
    fn pick_for_retry(
        &mut self,
        now: Instant,
        is_allowed: impl Fn(&Member<H>) -> bool,
    ) -> Option<Arc<Server<H>>> {
        let candidates: Vec<_> = candidates(&self.queue, now, is_allowed).collect();
        let turn = self.retries.checked_rem(candidates.len())?;
        self.retries = self.retries.wrapping_add(1);
        let member = self.queue.get_mut(*candidates.get(turn)?)?;
        Some(member.select(now))
    }
}

/// Positions in `queue` of the servers that can get a message now: allowed, and below capacity. Ejected
/// servers only if every allowed server is ejected (Envoy: panic mode).
fn candidates<H>(
    queue: &VecDeque<Box<Member<H>>>,
    now: Instant,
    is_allowed: impl Fn(&Member<H>) -> bool,
) -> impl Iterator<Item = usize> {
    let is_one_eligible = queue.iter().any(|it| it.is_eligible(now) && is_allowed(it));
    let is_candidate = move |member: &Member<H>| {
        member.has_room() && (member.is_eligible(now) || !is_one_eligible) && is_allowed(member)
    };
    let members = queue.iter().enumerate();
    members.filter(move |(_, member)| is_candidate(member)).map(|(at, _)| at)
}

impl<H, M: Routed> Policy<H, M> {
    /// Selects a server for a new message, or lets it wait behind those that wait already.
    pub(super) fn select(&mut self, message: M, now: Instant) -> Selected<H, M> {
        if self.waiting.is_empty()
            && let Some(server) = Self::take_turn(&mut self.queue, now, |_| true)
        {
            return Selected::Server(message, server);
        }
        if self.has_expired(now) || (self.queue.is_empty() && self.grace.is_zero()) {
            return Selected::Nobody(message);
        }
        let policy = message.policy().to_owned();
        self.wait(message, now);
        Selected::Waits(policy)
    }

    /// Selects a server for a retry, without changing whose turn it is. With `may_wait` it does not overtake
    /// waiting messages, and waits with them if no server has room.
    pub(super) fn select_for_retry(
        &mut self,
        message: M,
        now: Instant,
        may_wait: bool,
    ) -> Selected<H, M> {
        let picked = if may_wait && !self.waiting.is_empty() {
            None
        } else {
            self.pick_for_retry(now, |member| message.may_go_to(member.server.serial))
        };
        match picked {
            Some(server) => Selected::Server(message, server),
            None if may_wait && self.has_allowed_server(&message) => {
                let policy = message.policy().to_owned();
                self.wait(message, now);
                Selected::Waits(policy)
            }
            None => Selected::Nobody(message),
        }
    }

    /// Has a message wait from now on.
    pub(super) fn wait(&mut self, message: M, now: Instant) {
        let until = self.waits_until(&message, now);
        self.late_from = if self.waiting.is_empty() {
            Some(until)
        } else {
            self.late_from.map(|at| at.min(until))
        };
        self.restricted += usize::from(!message.may_go_anywhere());
        let at = self.waiting.partition_point(|it| it.message.arrived() <= message.arrived());
        self.waiting.insert(at, Waiting { since: now, message });
    }

    /// Takes the messages that need not wait any more.
    pub(super) fn take_ready(&mut self, now: Instant) -> Ready<H, M> {
        let mut late = Vec::new();
        if self.late_from.is_none_or(|at| at <= now) {
            late = self.take_late(now);
        }
        let selected = self.take_selected(now, &mut late);
        let look_at = self.late_from.into_iter().chain(self.next_trial(now)).min();
        let look_at = look_at.filter(|look_at| {
            !self.waiting.is_empty()
                && self.timer_at.is_none_or(|timer_at| timer_at <= now || *look_at < timer_at)
        });
        self.timer_at = look_at.or(self.timer_at);
        Ready { selected, late, is_served: !self.queue.is_empty(), look_at }
    }

    /// Takes the waiting messages for which a server is free, in order of arrival. Late ones it comes across
    /// go to `late`.
    fn take_selected(&mut self, now: Instant, late: &mut Vec<M>) -> Vec<(M, Arc<Server<H>>)> {
        let mut selected = Vec::new();
        let mut at = 0;
        // Thousands may wait: once an unrestricted message finds no server, skip the other unrestricted ones.
        let (mut is_full, mut restricted_ahead) = (false, self.restricted);
        while let Some(Waiting { message, .. }) = self.waiting.get(at)
            && (!is_full || restricted_ahead > 0)
            && self.queue.iter().any(|member| member.has_room())
        {
            let may_go_anywhere = message.may_go_anywhere();
            restricted_ahead -= usize::from(!may_go_anywhere);
            let is_late = message.deadline() <= now;
            let is_allowed = |member: &Member<H>| message.may_go_to(member.server.serial);
            let server = if is_late || (may_go_anywhere && is_full) {
                None
            } else {
                Self::take_turn(&mut self.queue, now, is_allowed)
            };
            if server.is_none() && !is_late {
                is_full |= may_go_anywhere;
                at += 1;
                continue;
            }
            self.restricted -= usize::from(!may_go_anywhere);
            let Some(Waiting { message, .. }) = self.waiting.remove(at) else { break };
            match server {
                Some(server) => selected.push((message, server)),
                None => late.push(message),
            }
        }
        selected
    }

    /// Takes those whose time is over.
    fn take_late(&mut self, now: Instant) -> Vec<M> {
        let all = std::mem::take(&mut self.waiting).into_iter();
        let until = |it: &Waiting<M>| self.waits_until(&it.message, it.since);
        let (late, waiting) = all.partition::<VecDeque<_>, _>(|waiting| until(waiting) <= now);
        let next = waiting.iter().map(until).min();
        let length = u32::try_from(waiting.len()).unwrap_or(u32::MAX);
        self.late_from = next.map(|next| next.max(now + length * LATE_PAUSE));
        self.waiting = waiting;
        let late: Vec<_> = late.into_iter().map(|waiting| waiting.message).collect();
        self.restricted -= late.iter().filter(|message| !message.may_go_anywhere()).count();
        late
    }

    /// When the next ejection of a server with room ends. No event announces that, so a timer must.
    fn next_trial(&self, now: Instant) -> Option<Instant> {
        let free = self.queue.iter().filter(|member| member.has_room());
        free.filter_map(|member| member.ejected_until).filter(|until| *until > now).min()
    }

    /// Until when a message that waits since `since` may wait: its deadline, or `grace` if no server may take
    /// it.
    fn waits_until(&self, message: &M, since: Instant) -> Instant {
        if self.has_allowed_server(message) {
            return message.deadline();
        }
        let since =
            self.last_removed_at.map_or(since, |last_removed_at| last_removed_at.max(since));
        (since + self.grace).min(message.deadline())
    }

    /// Whether there is a server that the message may go to, busy or not.
    fn has_allowed_server(&self, message: &M) -> bool {
        self.queue.iter().any(|member| message.may_go_to(member.server.serial))
    }
}
