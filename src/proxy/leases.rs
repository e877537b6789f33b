//! Leases: those that one connection holds, their end, and what it means for a server.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::Proxy;
use super::backend::Backend;
use super::dispatch::Dispatcher;
use super::table::Server;
use crate::net::lock::lock;

/// Grace after a lease's end: if the proxy was suspended, a renewal may still be unread.
const GRACE: Duration = Duration::from_millis(100);

/// The leases held through one connection.
pub(super) struct Leases {
    /// The connection's number, by which the table knows it.
    pub(super) holder: u64,
    /// Policies and ids. The table knows whether a lease has run out.
    held: Vec<(String, String)>,
}

/// Ends leases that have run out, whatever their connections do.
#[derive(Debug)]
pub(super) struct LeaseTimer {
    dispatcher: Arc<Dispatcher<Backend>>,
    /// When it looks next.
    next: Mutex<Option<Instant>>,
}

impl LeaseTimer {
    /// Watches the leases in this table.
    pub(super) fn new(dispatcher: &Arc<Dispatcher<Backend>>) -> Arc<Self> {
        Arc::new(LeaseTimer { dispatcher: Arc::clone(dispatcher), next: Mutex::default() })
    }

    /// Sets the timer for a lease that ends at `expires`, unless an earlier one is set.
    pub(super) fn watch(self: &Arc<Self>, expires: Instant) {
        let mut next = lock(&self.next);
        if next.is_some_and(|next| next <= expires) {
            return;
        }
        *next = Some(expires);
        drop(next);
        let timer = Arc::clone(self);
        self.dispatcher.background.at(expires, move || {
            let own = Arc::clone(&timer);
            // Counted from when this runs, which is late if the proxy was suspended.
            timer.dispatcher.background.at(Instant::now() + GRACE, move || own.look(expires));
        });
    }

    /// Ends what has run out: what those servers have not acked goes elsewhere.
    fn look(self: &Arc<Self>, at: Instant) {
        if lock(&self.next).take_if(|next| *next == at).is_none() {
            return;
        }
        let (expired, next) = self.dispatcher.table.expire(Instant::now());
        for server in expired {
            self.dispatcher.events.left(&server, "its lease was not renewed");
            server.handle.abandon(&server, &self.dispatcher);
            self.dispatcher.serve_waiting(&server.policy);
        }
        if let Some(next) = next {
            self.watch(next);
        }
    }
}

impl Leases {
    /// None yet, for the connection of this number.
    pub(super) fn new(holder: u64) -> Self {
        Leases { holder, held: Vec::new() }
    }

    /// Whether the one of this server was granted to the connection.
    pub(super) fn holds(&self, policy: &str, id: &str) -> bool {
        self.held.iter().any(|held| held.0 == policy && held.1 == id)
    }

    /// Adds that of a server.
    pub(super) fn add(&mut self, policy: &str, id: &str) {
        self.held.push((policy.to_owned(), id.to_owned()));
    }
}

impl Proxy {
    /// Whether a lease is held, and has not run out.
    pub(super) fn holds_lease(&self, leases: &mut Leases) -> bool {
        let table = &self.dispatcher.table;
        leases.held.retain(|(policy, id)| table.is_held(policy, id, leases.holder));
        !leases.held.is_empty()
    }

    /// Ends all leases of a connection. The servers may still ack what is on their connections; queued
    /// messages go to others.
    #[inline(never)] // It would take room on the stack of each client's thread.
    pub(super) fn release_all(&self, leases: &mut Leases) {
        for (policy, id) in leases.held.drain(..) {
            let released =
                self.dispatcher.table.release(&policy, &id, leases.holder, Instant::now());
            if let Some(server) = released {
                self.dispatcher.events.left(&server, "its connection was closed");
                self.retire(&server);
                self.dispatcher.serve_waiting(&policy);
            }
        }
    }

    /// Called when a server was removed: it may still ack what is on its connections; queued messages go to
    /// others.
    pub(super) fn retire(&self, server: &Arc<Server<Backend>>) {
        let mut retired = lock(&self.retired);
        retired.retain(|past| past.strong_count() > 0);
        retired.push(Arc::downgrade(server));
        drop(retired);
        server.handle.retire(server, &self.dispatcher);
        if self.dispatcher.has_stopped() {
            // The stop may have looked between this server's removal from the table and the push above.
            server.handle.refuse_all();
        }
    }
}
