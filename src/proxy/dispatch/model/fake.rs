//! A server's connections, played by a test.

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use super::super::{AttemptError, Deliver, Dispatcher};
use crate::net::lock::lock;
use crate::proxy::in_flight::InFlight;
use crate::proxy::stats::ServerStats;
use crate::proxy::table::Server;

/// Messages that a server takes at once.
const PLACES: usize = 2;

/// What the dispatcher did.
#[derive(Debug, Clone, Copy)]
pub enum Event {
    /// It handed this message to this server, which failed it at once if it was closed.
    Handed { message: usize, serial: u64, was_closed: bool },
    /// It learned that this message waits at a server that has failed.
    Drained { message: usize },
}

/// A server that keeps its messages until the test says what becomes of them.
#[derive(Debug)]
pub struct Fake {
    stats: ServerStats,
    log: Arc<Mutex<Vec<Event>>>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
pub struct State {
    /// Messages on connections.
    pub at_work: Vec<InFlight>,
    /// Messages that wait for a place.
    pub waiting: Vec<InFlight>,
    pub closed: bool,
}

impl State {
    /// Takes a message out.
    pub fn take(&mut self, number: usize) -> Option<InFlight> {
        let is_it = |message: &InFlight| self::number(message) == number;
        let taken = match self.at_work.iter().position(is_it) {
            Some(at) => Some(self.at_work.remove(at)),
            None => self.waiting.iter().position(is_it).map(|at| self.waiting.remove(at)),
        };
        self.fill_places();
        taken
    }

    fn fill_places(&mut self) {
        let free = PLACES.saturating_sub(self.at_work.len()).min(self.waiting.len());
        self.at_work.extend(self.waiting.drain(..free));
    }
}

impl Fake {
    pub fn new(log: &Arc<Mutex<Vec<Event>>>) -> Self {
        Fake { stats: ServerStats::default(), log: Arc::clone(log), state: Mutex::default() }
    }

    pub fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// The messages that it has.
    pub fn numbers(&self) -> Vec<usize> {
        let state = self.lock();
        state.at_work.iter().chain(&state.waiting).map(number).collect()
    }

    fn log(&self, event: Event) {
        lock(&self.log).push(event);
    }
}

/// The number that a message has in the test, which is its client's id.
pub fn number(message: &InFlight) -> usize {
    message.srcid.text().parse().unwrap()
}

impl Deliver for Fake {
    fn deliver(
        server: &Arc<Server<Self>>,
        messages: Vec<InFlight>,
        dispatcher: &Arc<Dispatcher<Self>>,
    ) {
        let fake = &server.handle;
        for message in messages {
            assert_eq!(
                message.server_limit.is_none(),
                server.leased,
                "its lease alone limits a server"
            );
            let was_closed = fake.lock().closed;
            fake.log(Event::Handed {
                message: number(&message),
                serial: server.serial,
                was_closed,
            });
            if was_closed {
                let since = Instant::now();
                dispatcher.failed(server, message, AttemptError::Removed, since);
            } else {
                let mut state = fake.lock();
                state.waiting.push(message);
                state.fill_places();
            }
        }
    }

    fn take_queued_on_failure(&self) -> Vec<InFlight> {
        let waiting = std::mem::take(&mut self.lock().waiting);
        for message in &waiting {
            self.log(Event::Drained { message: number(message) });
        }
        waiting
    }
}

impl AsRef<ServerStats> for Fake {
    fn as_ref(&self) -> &ServerStats {
        &self.stats
    }
}
