//! One server in its policy's rotation: who holds its lease, and whether it is ejected.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// How long a server is ejected. It gets no message in that time, unless all servers that a message may go to
/// are ejected.
pub(super) const EJECTION_TIME: Duration = Duration::from_secs(10);

/// A server without a lease may refuse connections for this long after each registration: the tutorial's
/// servers register before they listen.
const STARTUP_TIME: Duration = Duration::from_secs(1);

/// A server as the table knows it, with the caller's handle.
#[derive(Debug)]
pub struct Server<H> {
    /// Its id, as text.
    pub id: String,
    /// The policy it serves, as text.
    pub policy: String,
    /// Where it listens for messages.
    pub address: SocketAddr,
    /// Whether it registered with a lease, which it then has while it is in the table.
    pub leased: bool,
    /// Whether it says how many messages it takes at once.
    pub has_capacity: bool,
    /// What the caller keeps for it.
    pub handle: H,
    /// Tells registrations apart.
    pub serial: u64,
    /// Failures since the last success; atomic, so that a success need not take the lock.
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

/// A lease as it was granted.
#[derive(Debug, Clone, Copy)]
pub struct Grant {
    /// The lease.
    pub lease: Lease,
    /// When its holder got it.
    pub since: Instant,
    /// When it was renewed.
    pub renewed: Instant,
}

impl Grant {
    fn new(lease: Lease, now: Instant) -> Self {
        Grant { lease, since: now, renewed: now }
    }

    /// When it runs out, unless it is renewed.
    pub fn expires(&self) -> Instant {
        self.renewed + self.lease.length
    }
}

/// A server in its policy's queue.
#[derive(Debug)]
pub struct Member<H> {
    /// The server.
    pub server: Arc<Server<H>>,
    /// Its lease, if it is [leased](Server::leased).
    pub lease: Option<Grant>,
    /// When it last registered; renewals of a lease do not count.
    registered_at: Instant,
    /// Until when it is ejected.
    pub ejected_until: Option<Instant>,
    /// Since when it is ejected, or else eligible.
    pub state_since: Instant,
    /// When it last failed, unless it has answered or registered since.
    pub(super) failed_at: Option<Instant>,
    /// How many messages it takes at once, if it says so.
    pub capacity: Option<u64>,
    /// Permits in use. 0 without a capacity.
    pub in_use: u64,
}

impl<H> Clone for Member<H> {
    fn clone(&self) -> Self {
        Member { server: Arc::clone(&self.server), ..*self }
    }
}

impl<H> Member<H> {
    pub(super) fn new(
        server: Arc<Server<H>>,
        lease: Option<Lease>,
        capacity: Option<u64>,
        now: Instant,
    ) -> Box<Self> {
        Box::new(Member {
            server,
            lease: lease.map(|lease| Grant::new(lease, now)),
            registered_at: now,
            ejected_until: None,
            state_since: now,
            failed_at: None,
            capacity,
            in_use: 0,
        })
    }

    /// Handles another registration of the same server. The newest connection holds the lease; a setup packet
    /// on an older one, whose end was not seen yet, renews nothing.
    pub(super) fn renew(&mut self, lease: Option<Lease>, now: Instant) {
        match (&mut self.lease, lease) {
            (Some(held), Some(lease)) if lease.holder == held.lease.holder => {
                (held.lease, held.renewed) = (lease, now);
            }
            (Some(held), Some(lease)) if lease.holder < held.lease.holder => {}
            (held, lease) => {
                *held = lease.map(|lease| Grant::new(lease, now));
                self.registered_at = now;
                self.mark_healthy(now);
            }
        }
    }

    /// Whether it may not listen yet.
    pub(super) fn is_starting(&self, now: Instant) -> bool {
        self.lease.is_none() && now.saturating_duration_since(self.registered_at) < STARTUP_TIME
    }

    pub(super) fn is_held_by(&self, holder: u64) -> bool {
        self.lease.is_some_and(|held| held.lease.holder == holder)
    }

    /// Resets the failures and ends the ejection.
    pub(super) fn mark_healthy(&mut self, now: Instant) {
        self.server.failures.store(0, Ordering::Relaxed);
        self.failed_at = None;
        if self.ejected_until.take().is_some() {
            self.state_since = now;
        }
    }

    /// Ejects it for `EJECTION_TIME`. Returns `false` if it was ejected already.
    pub(super) fn eject(&mut self, now: Instant) -> bool {
        let newly = self.ejected_until.replace(now + EJECTION_TIME).is_none();
        if newly {
            self.state_since = now;
        }
        newly
    }

    /// Since when a new server may displace it in a full table: it has no lease and is ejected.
    pub(super) fn evictable_since(&self) -> Option<Instant> {
        let is_evictable = self.lease.is_none() && self.ejected_until.is_some();
        is_evictable.then_some(self.state_since)
    }

    /// Whether it is not ejected, or its ejection time is over.
    pub fn is_eligible(&self, now: Instant) -> bool {
        self.ejected_until.is_none_or(|until| until <= now)
    }

    /// Whether it takes another message.
    pub fn has_room(&self) -> bool {
        self.capacity.is_none_or(|capacity| self.in_use < capacity)
    }

    /// Frees one unit of its capacity.
    pub(super) fn free_permit(&mut self) {
        self.in_use = self.in_use.saturating_sub(1);
    }

    /// Selects it for a message, and counts the permit. After the ejection time it is half-open: this message
    /// is the trial, and the server stays ejected until the trial's outcome is known or `EJECTION_TIME` has
    /// passed again.
    pub(super) fn select(&mut self, now: Instant) -> Arc<Server<H>> {
        if self.ejected_until.is_some_and(|until| until <= now) {
            self.ejected_until = Some(now + EJECTION_TIME);
        }
        if self.capacity.is_some() {
            self.in_use += 1;
        }
        Arc::clone(&self.server)
    }
}
