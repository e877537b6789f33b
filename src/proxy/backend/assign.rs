//! Which connection a message goes on.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use super::{Backend, Queued, State, Upstream};
use crate::proxy::dispatch::Dispatcher;
use crate::proxy::in_flight::InFlight;
use crate::proxy::table::Server;
use crate::proxy::upstream::Terms;

/// What a message was assigned to.
pub enum Assigned {
    /// This connection, which is to send it.
    Open(Arc<Upstream>),
    /// This new one, which is to be served.
    New(Arc<Upstream>),
    /// The queue.
    Queue,
}

impl State {
    /// Assigns the first of `messages`: to an idle connection, else a new one, else a busy one, else the
    /// queue. For a quick server a busy connection comes first, and takes following messages too. A resent
    /// message starts with a new connection.
    pub fn assign(
        &mut self,
        messages: &mut VecDeque<InFlight>,
        server: &Arc<Server<Backend>>,
        dispatcher: &Arc<Dispatcher<Backend>>,
        cpu: usize,
        now: Instant,
    ) -> Option<Assigned> {
        let backend = &server.handle;
        let first = messages.front()?;
        let needs_own_connection = first.needs_own_connection;
        // Not for a resent message: the server may have closed its other idle connections, too.
        let may_reuse = server.leased && first.history.resent_to != Some(server.serial);
        let mut offer = |upstream: &&Arc<Upstream>, terms| upstream.put(messages, terms, now);
        let here = self.upstreams.iter().filter(|upstream| upstream.cpu == cpu);
        if may_reuse {
            // With a capacity, a message must not queue behind another on its connection.
            if !needs_own_connection
                && !server.has_capacity
                && backend.latency.is_quick()
                && let Some(upstream) = here.clone().find(|upstream| offer(upstream, Terms::Shared))
            {
                return Some(Assigned::Open(Arc::clone(upstream)));
            }
            let mut all = here.chain(&self.upstreams);
            if let Some(upstream) = all.find(|upstream| offer(upstream, Terms::Idle)) {
                return Some(Assigned::Open(Arc::clone(upstream)));
            }
        }
        let is_limited = self.single_connection_until.is_some_and(|until| now < until);
        let max = if is_limited { 1 } else { dispatcher.settings.max_upstreams(server.leased) };
        if self.upstreams.len() < max {
            let upstream = Upstream::new(cpu, server, dispatcher, messages.pop_front()?);
            self.upstreams.push(Arc::clone(&upstream));
            return Some(Assigned::New(upstream));
        }
        if server.leased && !needs_own_connection {
            let mut by_load: Vec<_> = self.upstreams.iter().collect();
            by_load.sort_by_cached_key(|upstream| upstream.load());
            if let Some(upstream) = by_load.into_iter().find(|upstream| offer(upstream, Terms::Any))
            {
                return Some(Assigned::Open(Arc::clone(upstream)));
            }
        }
        if needs_own_connection
            && let Some(next) = self.upstreams.iter().min_by_key(|other| other.load())
        {
            // Else new messages could keep all of them busy forever.
            next.make_exclusive();
        }
        let message = messages.pop_front()?;
        self.waiting.push_back(Queued { give_up_at: message.give_up_at(now), message });
        Some(Assigned::Queue)
    }
}
