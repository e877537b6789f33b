//! One server in its policy's rotation: who holds its lease, and whether it is ejected.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// A server that failed is not selected for this long (the homework does not say).
pub(super) const EJECTION_TIME: Duration = Duration::from_secs(10);

/// A server as the table knows it, with the caller's handle.
#[derive(Debug)]
pub struct Server<H> {
    /// Its id, as text.
    pub id: String,
    /// The policy it serves, as text.
    pub policy: String,
    /// Where it listens for messages.
    pub address: SocketAddr,
    /// Whether its registration lasts only as long as its lease.
    pub leased: bool,
    /// Whether it says how many messages it takes at once.
    pub has_capacity: bool,
    /// When this registration began.
    pub since: Instant,
    /// What the caller keeps for it.
    pub handle: H,
    /// Tells registrations apart.
    pub serial: u64,
    /// Failures since the last success; kept here too so that a success need not take the lock.
    pub(super) failures: AtomicU32,
}

/// A lease on a registration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lease {
    /// Its holder: the setup connection's number.
    pub holder: u64,
    /// How long it lasts without renewal.
    pub length: Duration,
}

/// A server in a queue.
#[derive(Debug)]
pub(super) struct Member<H> {
    pub(super) server: Arc<Server<H>>,
    /// Who holds the lease, since when, and when it was renewed. More than one for a moment, when a
    /// server registers again before the end of its earlier setup connection was seen.
    pub(super) holders: Vec<(Lease, Instant, Instant)>,
    pub(super) ejected_until: Option<Instant>,
    /// Since when it is ejected, or else eligible.
    pub(super) state_since: Instant,
    /// When it last failed, unless it has answered or registered since.
    pub(super) failed_at: Option<Instant>,
    /// How many messages it takes at once, if it says so.
    pub(super) capacity: Option<u64>,
    /// Messages that have its permit, counted if it has a capacity.
    pub(super) in_use: u64,
}

impl<H> Member<H> {
    pub(super) fn new(
        server: Arc<Server<H>>,
        lease: Option<Lease>,
        capacity: Option<u64>,
        now: Instant,
    ) -> Box<Self> {
        let holders = lease.map(|lease| (lease, now, now)).into_iter().collect();
        Box::new(Member {
            server,
            holders,
            ejected_until: None,
            state_since: now,
            failed_at: None,
            capacity,
            in_use: 0,
        })
    }

    pub(super) fn hold(&mut self, lease: Lease, now: Instant) {
        match self.holders.iter_mut().find(|(held, ..)| held.holder == lease.holder) {
            Some((held, _, renewed)) => (*held, *renewed) = (lease, now),
            None => {
                self.holders.push((lease, now, now));
                self.mark_healthy(now);
            }
        }
    }

    /// Ends leases that have run out. Returns whether nobody holds one any more.
    pub(super) fn expire(&mut self, now: Instant) -> bool {
        let was_held = !self.holders.is_empty();
        self.holders.retain(|(lease, _, renewed)| *renewed + lease.length > now);
        was_held && self.holders.is_empty()
    }

    /// When the next lease on it runs out.
    pub(super) fn next_expiry(&self) -> Option<Instant> {
        self.holders.iter().map(|(lease, _, renewed)| *renewed + lease.length).min()
    }

    pub(super) fn is_held_by(&self, holder: u64) -> bool {
        self.holders.iter().any(|(lease, ..)| lease.holder == holder)
    }

    /// It has just said that it is there.
    pub(super) fn mark_healthy(&mut self, now: Instant) {
        self.server.failures.store(0, Ordering::Relaxed);
        self.failed_at = None;
        if self.ejected_until.take().is_some() {
            self.state_since = now;
        }
    }

    /// It has failed. Returns whether it was not ejected before.
    pub(super) fn eject(&mut self, now: Instant) -> bool {
        let newly = self.ejected_until.replace(now + EJECTION_TIME).is_none();
        if newly {
            self.state_since = now;
        }
        newly
    }

    /// Since when it could give way to another server: nobody holds it, and it has not answered since
    /// it was ejected.
    pub(super) fn dispensable_since(&self) -> Option<Instant> {
        let is_dispensable = self.holders.is_empty() && self.ejected_until.is_some();
        is_dispensable.then_some(self.state_since)
    }

    /// Whether it is not ejected, or its time is over.
    pub(super) fn is_eligible(&self, now: Instant) -> bool {
        self.ejected_until.is_none_or(|until| until <= now)
    }

    /// Whether it takes another message.
    pub(super) fn has_room(&self) -> bool {
        self.capacity.is_none_or(|capacity| self.in_use < capacity)
    }

    /// A message has left it.
    pub(super) fn free_permit(&mut self) {
        self.in_use = self.in_use.saturating_sub(1);
    }

    /// Takes it for a message. Once the ejection is over it is half-open: this message is the trial,
    /// and no other comes until its outcome is known or another such time has passed.
    pub(super) fn take_turn(&mut self, now: Instant) -> Arc<Server<H>> {
        if self.ejected_until.is_some_and(|until| until <= now) {
            self.ejected_until = Some(now + EJECTION_TIME);
        }
        if self.capacity.is_some() {
            self.in_use += 1;
        }
        Arc::clone(&self.server)
    }
}
