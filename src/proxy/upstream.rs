//! Connections from the proxy to one server: open, reuse, check, discard.
//!
//! A server with a lease serves any number of messages on each connection, so connections to it
//! are kept for the next message. One without a lease may serve a single connection at a time, and
//! a single message on it: it gets a connection per message, only a few at once, and further
//! messages wait in a line for their turn. A connection on which anything went wrong is never used
//! again: a late reply must not reach another client. A message that waits for its ack in its client's
//! own thread holds one of the proxy's connections, so that even a server with a lease gets only so
//! many of these: one that hangs, or is a proxy which sends them back here in a circle, leaves others
//! some.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::net::{SocketAddr, TcpStream};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::lane::Lane;
use super::line::{Line, Place};
use super::stats::ServerStats;
use super::trouble::{Trouble, check_ack};
use crate::net::affinity::current_cpu;
use crate::net::connection::{Connection, ReadTimeout};
use crate::net::os_error::{is_local, reason};
use crate::protocol::Id;

/// An idle connection is closed when it was not used for this long; a server of ours closes its
/// side only much later.
const MAX_IDLE_TIME: Duration = Duration::from_secs(20);

/// How the proxy talks to servers.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// How long a connection may take to be made.
    pub connect_timeout: Duration,
    /// How long an ack may take, from when the message is sent.
    pub reply_timeout: Duration,
    /// The longest ack that is taken, in bytes.
    pub max_packet: usize,
    /// Connections at once to a server without a lease; others wait in a line.
    pub at_once: usize,
    /// Messages at once at a server with a lease that hold their clients' connections.
    pub max_at_once: usize,
    /// Lanes to a server with a lease. It serves each connection in a thread of its own, so one
    /// lane alone would keep no more than one of its cores busy.
    pub lanes: usize,
    /// Idle connections kept per server with a lease.
    pub max_idle: usize,
}

/// One server's connections.
#[derive(Debug)]
pub struct Upstream {
    address: SocketAddr,
    leased: bool,
    settings: Settings,
    stats: Arc<ServerStats>,
    pace: LatencyEstimate,
    pool: Mutex<Pool>,
    line: Line,
}

#[derive(Debug, Default)]
struct Pool {
    /// The one put back last is the last.
    idle: VecDeque<Idle>,
    /// The connections that messages share.
    lanes: Vec<Shared>,
    /// The server has left the table: nothing is kept any more.
    closed: bool,
}

/// A connection that is kept for the next message.
#[derive(Debug)]
struct Idle {
    connection: Connection,
    /// When it was put back.
    since: Instant,
    /// Where its last message was handled: the server's thread for it is likely to be there, too.
    cpu: usize,
}

/// A connection that messages share, if it is there.
#[derive(Debug, Default, Clone)]
enum Shared {
    #[default]
    Missing,
    /// Somebody is making it.
    Coming,
    Open(Arc<Lane>),
}

/// How long a server takes for a message at its best, lately, in nanoseconds. On a busy machine most
/// messages take far longer, which says nothing about the server.
#[derive(Debug)]
struct LatencyEstimate(AtomicU64);

impl LatencyEstimate {
    /// A message took so long by itself.
    fn note(&self, took: Duration) {
        let took = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        let best = self.0.load(Ordering::Relaxed);
        let now = if took < best { took } else { best + (took - best) / FORGET };
        // Of two threads here at once one may be overlooked, which does no harm.
        self.0.store(now, Ordering::Relaxed);
    }

    fn forget(&self) {
        self.0.store(u64::MAX, Ordering::Relaxed);
    }

    fn is_quick(&self) -> bool {
        self.0.load(Ordering::Relaxed) < QUICK
    }
}

/// One part in so many of what a slower message took too long goes into a server's pace: one that has
/// become slow is known as such after a few messages, and a slow one among quick ones does not matter.
const FORGET: u64 = 32;

/// Messages of a server that takes less than this for one, in nanoseconds, can wait for each other.
const QUICK: u64 = 150_000;

/// A connection to a server, for the exchange of messages.
#[derive(Debug)]
pub struct Link {
    connection: Connection,
    /// Whether it has served messages before.
    reused: bool,
    /// A place at the server, where it takes one.
    _place: Option<Place>,
}

impl AsRef<ServerStats> for Upstream {
    fn as_ref(&self) -> &ServerStats {
        &self.stats
    }
}

impl Upstream {
    /// Connections to the server at `address`, which has a lease or not.
    pub fn new(
        address: SocketAddr,
        leased: bool,
        settings: Settings,
        stats: Arc<ServerStats>,
    ) -> Self {
        let line = Line::new(if leased { settings.max_at_once } else { settings.at_once });
        Upstream {
            address,
            leased,
            settings,
            stats,
            pace: LatencyEstimate(AtomicU64::new(u64::MAX)),
            pool: Mutex::default(),
            line,
        }
    }

    /// The server's counts.
    pub fn stats(&self) -> &Arc<ServerStats> {
        &self.stats
    }

    /// Notes how long the server took for a message, once it was its turn.
    pub fn record_latency(&self, took: Duration) {
        self.pace.note(took);
    }

    /// The lane to a server that answers quickly for messages from threads on this CPU. Where it is
    /// missing, `make` makes it, while other threads go on without.
    ///
    /// # Errors
    ///
    /// [`Trouble::Unreachable`].
    pub fn lane(
        &self,
        cpu: usize,
        make: impl FnOnce(Link) -> Option<Arc<Lane>>,
    ) -> Result<Option<Arc<Lane>>, Trouble> {
        if !self.leased || !self.pace.is_quick() {
            return Ok(None);
        }
        let its = cpu % self.settings.lanes.max(1);
        let mut pool = self.pool();
        if pool.lanes.len() <= its {
            pool.lanes.resize(its + 1, Shared::Missing);
        }
        match &pool.lanes[its] {
            Shared::Open(lane) if lane.is_open() => return Ok(Some(Arc::clone(lane))),
            Shared::Coming => return Ok(None),
            _ if pool.closed => return Ok(None),
            _ => pool.lanes[its] = Shared::Coming,
        }
        drop(pool);
        let opened = self.open_fresh(self.settings.connect_timeout);
        let (lane, trouble) = match opened {
            Ok(link) => (make(link), None),
            // A message can do with a kept connection.
            Err(Trouble::Local(_)) => (None, None),
            Err(trouble) => (None, Some(trouble)),
        };
        let mut pool = self.pool();
        if pool.closed {
            lane.iter().for_each(|lane| lane.retire());
        } else if let Some(shared) = pool.lanes.get_mut(its) {
            *shared = lane.clone().map_or(Shared::Missing, Shared::Open);
        }
        trouble.map_or(Ok(lane), Err)
    }

    /// A connection for a message: a kept one that is still good, or a new one. At a server without
    /// a lease it waits for its turn, until `wait_until` at the most. At one with a lease there is a
    /// place at once or none, and a retry of what a lane has lost, which holds no client's
    /// connection, needs none. The message's time is over at the `deadline`.
    ///
    /// # Errors
    ///
    /// As [`open_fresh`](Self::open_fresh), or [`Trouble::Waited`]; nothing was sent.
    pub fn open(
        &self,
        wait_until: Instant,
        deadline: Instant,
        is_retry: bool,
    ) -> Result<Link, Trouble> {
        let wait_until = (!self.leased).then_some(wait_until);
        let _place = if self.leased && is_retry {
            None
        } else {
            Some(self.line.enter(wait_until).ok_or(Trouble::Waited)?)
        };
        while let Some(connection) = self.take_idle() {
            if connection.is_reusable() {
                return Ok(Link { connection, reused: true, _place });
            }
        }
        Ok(Link { _place, ..self.open_before(deadline)? })
    }

    /// Puts a new connection in the place of one that turned out to be closed.
    ///
    /// # Errors
    ///
    /// As [`open_fresh`](Self::open_fresh).
    pub fn renew(&self, link: &mut Link, deadline: Instant) -> Result<(), Trouble> {
        link.connection = self.open_before(deadline)?.connection;
        link.reused = false;
        Ok(())
    }

    fn open_before(&self, deadline: Instant) -> Result<Link, Trouble> {
        self.open_fresh(deadline.saturating_duration_since(Instant::now()))
    }

    /// A new connection, which may take `limit` to be made, but no longer than the settings say.
    ///
    /// # Errors
    ///
    /// [`Trouble::Unreachable`] or [`Trouble::Local`]; [`Trouble::Timeout`] where the limit left it
    /// less time than it should have had.
    pub fn open_fresh(&self, limit: Duration) -> Result<Link, Trouble> {
        let whole = self.settings.connect_timeout;
        let connected = self
            .connect(whole.min(limit))
            .and_then(|stream| Connection::from_connected(stream, self.settings.max_packet))
            .and_then(|mut connection| {
                connection.limit_send(self.settings.reply_timeout)?;
                Ok(connection)
            });
        match connected {
            Ok(connection) => Ok(Link { connection, reused: false, _place: None }),
            Err(error) if is_local(&error) => Err(Trouble::Local(reason(&error))),
            Err(error) if error.kind() == io::ErrorKind::TimedOut && limit < whole => {
                Err(Trouble::Timeout(limit))
            }
            Err(error) => Err(Trouble::Unreachable(reason(&error))),
        }
    }

    /// Asks a second time where no answer comes: a listener that is just closing may lose the first
    /// request, and the kernel repeats it only after a second.
    fn connect(&self, whole: Duration) -> io::Result<TcpStream> {
        // Zero is not taken for a timeout.
        let whole = whole.max(Duration::from_millis(1));
        let first = whole / 4;
        TcpStream::connect_timeout(&self.address, first).or_else(|error| match error.kind() {
            io::ErrorKind::TimedOut => TcpStream::connect_timeout(&self.address, whole - first),
            _ => Err(error),
        })
    }

    /// Takes a connection back after whole exchanges, for the next message.
    pub fn put_back(&self, mut link: Link) {
        if !self.leased || link.connection.waiting() > 0 {
            return;
        }
        link.reused = true;
        let now = Instant::now();
        let mut pool = self.pool();
        let idle = Idle { connection: link.connection, since: now, cpu: current_cpu() };
        let old = if pool.closed || pool.idle.len() >= self.settings.max_idle {
            Some(idle)
        } else {
            pool.idle.push_back(idle);
            let is_old = pool.idle.front().is_some_and(|idle| now - idle.since > MAX_IDLE_TIME);
            if is_old { pool.idle.pop_front() } else { None }
        };
        drop(pool);
        // Closes it, which is not for under the lock.
        drop(old);
    }

    /// Closes the connections that have not been used for long.
    pub fn close_unused(&self) {
        let now = Instant::now();
        let mut pool = self.pool();
        let used = pool.idle.iter().position(|idle| now - idle.since <= MAX_IDLE_TIME);
        let unused = used.unwrap_or(pool.idle.len());
        let old: Vec<_> = pool.idle.drain(..unused).collect();
        drop(pool);
        drop(old);
    }

    /// Closes the idle connections, and those in use when they are put back: the server has left.
    pub fn close(&self) {
        let mut pool = self.pool();
        pool.closed = true;
        let old = std::mem::take(&mut pool.idle);
        let lanes = std::mem::take(&mut pool.lanes);
        drop(pool);
        drop(old);
        for shared in lanes {
            if let Shared::Open(lane) = shared {
                lane.retire();
            }
        }
        self.line.disperse();
    }

    /// This server has failed: those who wait for their turn go elsewhere, and whether it is quick is
    /// to be seen anew.
    pub fn note_failure(&self) {
        self.pace.forget();
        self.line.disperse();
    }

    /// The connection that was used last on this CPU, or else anywhere.
    fn take_idle(&self) -> Option<Connection> {
        let cpu = current_cpu();
        let idle = &mut self.pool().idle;
        let here = idle.iter().rposition(|idle| idle.cpu == cpu);
        let at = here.or(idle.len().checked_sub(1))?;
        Some(idle.remove(at)?.connection)
    }

    /// The pool is whole between any two statements.
    fn pool(&self) -> MutexGuard<'_, Pool> {
        self.pool.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Link {
    /// The connection, for the thread that reads a lane.
    pub fn into_connection(self) -> Connection {
        self.connection
    }

    /// Sends a message's parts, which may take until the deadline, but no longer than the reply timeout.
    ///
    /// # Errors
    ///
    /// As [`Connection::send`].
    pub fn send_before(&mut self, deadline: Instant, parts: &mut [IoSlice<'_>]) -> io::Result<()> {
        self.connection.send_parts_before(deadline, parts)
    }

    /// Whether this trouble says no more than that the server had closed a connection that was
    /// kept from earlier messages.
    pub fn was_stale(&self, trouble: &Trouble) -> bool {
        self.reused && matches!(trouble, Trouble::Broken(_))
    }

    /// Waits for the ack of a message from `client`, which [`bytes`](Self::bytes) then gives.
    ///
    /// # Errors
    ///
    /// The trouble that ends this connection's use.
    pub fn receive_ack(
        &mut self,
        client: &Id<'_>,
        deadline: Instant,
        limit: Duration,
    ) -> Result<Range<usize>, Trouble> {
        match self.connection.wait(ReadTimeout::Until(deadline)) {
            Ok(true) => {}
            Ok(false) => return Err(Trouble::closed()),
            Err(error) => return Err(Trouble::from_receiving(error, limit)),
        }
        let packet = self.connection.take_packet().unwrap_or_default();
        check_ack(self.connection.bytes(packet.clone()), client)?;
        Ok(packet)
    }

    /// The bytes of an ack just received.
    pub fn bytes(&self, ack: Range<usize>) -> &[u8] {
        self.connection.bytes(ack)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pace_after(micros: impl IntoIterator<Item = u64>) -> LatencyEstimate {
        let pace = LatencyEstimate(AtomicU64::new(u64::MAX));
        micros.into_iter().for_each(|micros| pace.note(Duration::from_micros(micros)));
        pace
    }

    #[test]
    fn a_server_is_as_quick_as_at_its_best_lately() {
        assert!(!pace_after([]).is_quick());
        assert!(pace_after([2000, 50, 900]).is_quick());
        assert!(!pace_after([1000; 100]).is_quick());
        assert!(pace_after([50, 1000, 50, 1000].repeat(100)).is_quick());
        assert!(!pace_after([50].into_iter().chain([1000; 10])).is_quick());
        assert!(!pace_after([50, u64::MAX]).is_quick());
    }

    /// A server whose host drops requests to connect, as with its queue full the kernel does; and what
    /// fills the queue.
    #[cfg(target_os = "linux")]
    fn unreachable() -> (std::net::TcpListener, Vec<TcpStream>, Upstream) {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        rustix::net::listen(&listener, 0).unwrap();
        let brief = Duration::from_millis(50);
        let filling =
            std::iter::from_fn(|| TcpStream::connect_timeout(&address, brief).ok()).collect();
        let settings = Settings {
            connect_timeout: Duration::from_millis(900),
            reply_timeout: Duration::from_secs(1),
            max_packet: 1 << 10,
            at_once: 1,
            max_at_once: 1,
            lanes: 1,
            max_idle: 1,
        };
        (listener, filling, Upstream::new(address, true, settings, Arc::default()))
    }

    /// Requests to connect that found a queue full, as the kernel counts them for all of this host.
    #[cfg(target_os = "linux")]
    fn lost_requests() -> String {
        let counts = std::fs::read_to_string("/proc/net/netstat").unwrap();
        let mut lines = counts.lines().filter(|line| line.starts_with("TcpExt:"));
        let (names, values) = (lines.next().unwrap(), lines.next().unwrap());
        let place = names.split(' ').position(|name| name == "ListenOverflows").unwrap();
        values.split(' ').nth(place).unwrap().to_owned()
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn a_request_to_connect_that_is_lost_is_repeated_before_the_kernel_does() {
        // The one that was counted may be another test's, and ours came when there was room.
        let was_lost = (0..100).any(|_| {
            let (listener, filling, upstream) = unreachable();
            let (before, begun) = (lost_requests(), Instant::now());
            std::thread::scope(|scope| {
                let opened = scope.spawn(|| upstream.open_fresh(Duration::MAX));
                while lost_requests() == before && !opened.is_finished() {
                    std::thread::sleep(Duration::from_millis(1));
                }
                for _ in &filling {
                    listener.accept().unwrap();
                }
                opened.join().unwrap().unwrap();
            });
            begun.elapsed() >= upstream.settings.connect_timeout / 4
        });
        assert!(was_lost);
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn connecting_ends_with_the_messages_time_which_is_no_fault_of_the_servers() {
        let (_listener, _filling, upstream) = unreachable();
        let begun = Instant::now();
        let deadline = begun + Duration::from_millis(100);
        let opened = upstream.open(deadline, deadline, false);
        assert!(matches!(opened, Err(Trouble::Timeout(_))), "{opened:?}");
        assert!(begun.elapsed() < Duration::from_millis(800), "{:?}", begun.elapsed());
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn a_server_that_gets_no_lane_has_failed_and_is_not_asked_for_another() {
        let (_listener, _filling, upstream) = unreachable();
        upstream.record_latency(Duration::from_micros(50));
        let lane = upstream.lane(0, |_| panic!("there is no connection"));
        assert!(matches!(lane, Err(Trouble::Unreachable(_))), "{lane:?}");
        upstream.note_failure();
        let lane = upstream.lane(0, |_| panic!("there is no connection"));
        assert!(matches!(lane, Ok(None)), "{lane:?}");
    }
}
