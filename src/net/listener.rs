//! Accepting connections: a thread each, kept for the next connection.
//!
//! Starting a thread costs more than serving a message. So the threads that serve connections are
//! the same that wait in `accept`: one takes a connection, serves it to its end, and comes back
//! for the next; the kernel wakes exactly one of those that wait. How many there are is the business
//! of `threads`. At the limit nobody is left to wait, and new connections stay in the kernel's
//! backlog without disturbing anybody.

mod socket;
mod threads;

use std::collections::{BTreeMap, HashMap};
use std::hint;
use std::io;
use std::net::{IpAddr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::num::NonZero;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use socket::WAIT;
use threads::{LOOK, Taken, Threads};

use crate::net::connection::{Connection, SEND_TIMEOUT};
use crate::net::os_error::reason;

pub use socket::{bind, default_max_connections, raise_file_limit};

/// The stack of a thread that serves connections. Only what is used of it takes memory; parsing is
/// not recursive, so that is little.
const STACK: usize = 512 << 10;

/// Pauses after a failed `accept`.
const FIRST_BACK_OFF: Duration = Duration::from_millis(10);
const LAST_BACK_OFF: Duration = Duration::from_secs(1);

/// Pause before a thread is started where one could not be.
const RETRY: Duration = Duration::from_millis(100);

/// Pauses between two lines about trouble, and between two that say that all places are taken.
const SAY_TROUBLE: Duration = Duration::from_secs(1);
const SAY_FULL: Duration = Duration::from_secs(60);

/// Whether sockets from `accept` have the options that were set on the listener.
const ACCEPTED_INHERIT: bool = cfg!(target_os = "linux");

/// What counts as one address for the limit per address: an IPv6 host has the 2^64 addresses of a
/// network for itself, and an IPv4 one may come as IPv6.
fn origin(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) if !v6.is_loopback() => {
            IpAddr::V6(Ipv6Addr::from_bits(v6.to_bits() >> 64 << 64))
        }
        other => other,
    }
}

/// Of the memory that threads leave behind, glibc gives some back to the system only when a block of
/// this size becomes free (64 KiB or more, and below 128 KiB), and these threads hold none.
const LARGE_BLOCK: usize = 96 << 10;

/// Without this the threads of ten thousand connections leave twice as much with the process.
fn let_memory_go() {
    drop(hint::black_box(Vec::<u8>::with_capacity(LARGE_BLOCK)));
}

/// What a role does with its connections.
pub trait Serve: Send + Sync + 'static {
    /// Serves one connection to its end.
    fn serve(&self, connection: Connection, peer: Peer);
    /// Something went wrong that no peer is told of.
    fn warn(&self, message: &str);
    /// The longest packet to take, in bytes.
    fn max_packet(&self) -> usize;
}

/// The other end of an accepted connection.
#[derive(Debug, Clone, Copy)]
pub struct Peer {
    /// Its address.
    pub address: SocketAddr,
    /// Whether its host has more connections here than one host may have.
    pub over_limit: bool,
}

/// The [`Limits::hint`] of a limit that the command line sets.
pub const OPTION_HINT: &str = " (-max-connections, or half of ulimit -n)";

/// Limits on the connections of one listener.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Connections at once, in all.
    pub connections: usize,
    /// Where that limit comes from, as the line that says it is reached ends; may be empty.
    pub hint: &'static str,
    /// Connections at once from one address that is not loopback.
    pub per_address: usize,
}

/// A listening socket and the threads that serve what it accepts.
#[derive(Debug)]
pub struct Listener {
    socket: TcpListener,
    limits: Limits,
    state: Mutex<State>,
    /// No connection is open any more.
    drained: Condvar,
    /// Connections come and go quickly, a thread could not be started, or the listener stops.
    wakes_keeper: Condvar,
}

#[derive(Debug)]
struct State {
    threads: Threads,
    /// Sockets being served, to end them from outside.
    /// A map that gives memory back when the connections of a busy hour are gone.
    open: BTreeMap<u64, (Arc<TcpStream>, IpAddr)>,
    per_address: HashMap<IpAddr, usize>,
    stopping: bool,
    /// A thread could not be started.
    lacks_thread: bool,
    back_off: Duration,
    /// When it was last said that something went wrong, and that all places are taken.
    said_trouble: Option<Instant>,
    said_full: Option<Instant>,
}

/// Whether it is long enough ago that something was last said; then it is said now.
fn may_say(said: &mut Option<Instant>, pause: Duration) -> bool {
    let now = Instant::now();
    let may_say = said.is_none_or(|said| now - said >= pause);
    if may_say {
        *said = Some(now);
    }
    may_say
}

impl Listener {
    /// Serves the connections of `socket`, which [`bind`] made.
    pub fn new(socket: TcpListener, limits: Limits) -> Arc<Self> {
        let cores = thread::available_parallelism().map_or(1, NonZero::get);
        let state = Mutex::new(State {
            threads: Threads::new(limits.connections, cores),
            open: BTreeMap::new(),
            per_address: HashMap::new(),
            stopping: false,
            lacks_thread: false,
            back_off: Duration::ZERO,
            said_trouble: None,
            said_full: None,
        });
        let (drained, wakes_keeper) = Default::default();
        Arc::new(Listener { socket, limits, state, drained, wakes_keeper })
    }

    /// The address it listens on.
    ///
    /// # Errors
    ///
    /// Where the system does not say.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    /// Connections being served, and those accepted since the start.
    pub fn connections(&self) -> (usize, u64) {
        let state = self.lock();
        (state.open.len(), state.threads.accepted())
    }

    /// Starts the keeper and the first threads, which start the others.
    ///
    /// # Errors
    ///
    /// Where the system does not give us the first threads.
    pub fn start(self: &Arc<Self>, role: &Arc<impl Serve>) -> io::Result<()> {
        let (listener, its_role) = (Arc::clone(self), Arc::clone(role));
        let keeper = thread::Builder::new().name("keeper".to_owned()).stack_size(STACK);
        keeper.spawn(move || listener.keep(&its_role))?;
        let wanted = self.lock().threads.refill();
        (0..wanted).try_for_each(|_| self.spawn(role))
    }

    /// Takes no more connections. Those that the kernel has accepted for us meanwhile are reset.
    pub fn stop(&self) {
        self.lock().stopping = true;
        self.wakes_keeper.notify_one();
        // Wakes every thread in `accept`; it can only fail where that is already done.
        let _ = rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Both);
    }

    /// Ends the receiving side of all open connections: each serves what has arrived, and closes.
    pub fn end_connections(&self) {
        for (stream, _) in self.lock().open.values() {
            // It fails where the peer has just closed; then there is nothing to end.
            let _ = stream.shutdown(Shutdown::Read);
        }
    }

    /// Waits until no connection is open, `limit` at most, and says how many still are.
    pub fn drain(&self, limit: Duration) -> usize {
        let (state, _) = self
            .drained
            .wait_timeout_while(self.lock(), limit, |state| !state.open.is_empty())
            .unwrap_or_else(PoisonError::into_inner);
        state.open.len()
    }

    /// The state is whole between any two statements, so a thread that panicked left it usable.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts a thread that is already counted.
    fn spawn(self: &Arc<Self>, role: &Arc<impl Serve>) -> io::Result<()> {
        let (listener, its_role) = (Arc::clone(self), Arc::clone(role));
        let thread = thread::Builder::new()
            .name("connection".to_owned())
            .stack_size(STACK)
            .spawn(move || listener.work(&its_role));
        if let Err(error) = thread {
            self.lock().threads.end();
            return Err(error);
        }
        Ok(())
    }

    /// The life of a thread: accept, serve, again.
    fn work(self: &Arc<Self>, role: &Arc<impl Serve>) {
        loop {
            let stays = match self.socket.accept() {
                Ok((stream, address)) => {
                    let stream = Arc::new(stream);
                    let origin = origin(address.ip());
                    let (number, taken, over_limit) = self.enter(&stream, origin, role);
                    match self.prepare(stream, role.max_packet()) {
                        Ok(connection) => role.serve(connection, Peer { address, over_limit }),
                        Err(error) => role.warn(&format!("{address}: {error}; closed")),
                    }
                    self.leave(number, taken, origin)
                }
                Err(error) => self.carry_on(&error, &**role),
            };
            if !stays {
                return let_memory_go();
            }
        }
    }

    /// As [`spawn`](Self::spawn), but if it fails says so, and has the keeper try again: it may be that
    /// no other thread waits.
    fn add(self: &Arc<Self>, role: &Arc<impl Serve>) {
        let Err(error) = self.spawn(role) else { return };
        let mut state = self.lock();
        state.lacks_thread = true;
        let says = may_say(&mut state.said_trouble, SAY_TROUBLE);
        drop(state);
        self.wakes_keeper.notify_one();
        if says {
            role.warn(&format!("could not start a thread for connections: {}", reason(&error)));
        }
    }

    /// The life of the keeper, which looks after the number of threads while connections come and go
    /// quickly, and whenever it is too low because one could not be started.
    fn keep(self: &Arc<Self>, role: &Arc<impl Serve>) {
        let mut state = self.lock();
        loop {
            let sleeps = |state: &mut State| {
                !(state.threads.is_busy() || state.lacks_thread || state.stopping)
            };
            state =
                self.wakes_keeper.wait_while(state, sleeps).unwrap_or_else(PoisonError::into_inner);
            if state.stopping {
                return;
            }
            let pause = if std::mem::take(&mut state.lacks_thread) { RETRY } else { LOOK };
            drop(state);
            thread::sleep(pause);
            let is_backlogged = self.is_backlogged();
            state = self.lock();
            let threads = &mut state.threads;
            let wanted =
                if threads.is_busy() { threads.look(is_backlogged) } else { threads.refill() };
            drop(state);
            (0..wanted).for_each(|_| self.add(role));
            state = self.lock();
        }
    }

    /// Whether a connection waits in the backlog.
    fn is_backlogged(&self) -> bool {
        let mut listening = [PollFd::new(&self.socket, PollFlags::IN)];
        // Where the system cannot say, the next look may.
        matches!(poll(&mut listening, Some(&Timespec::default())), Ok(1..))
    }

    fn prepare(&self, stream: Arc<TcpStream>, max_packet: usize) -> io::Result<Connection> {
        if !ACCEPTED_INHERIT {
            stream.set_nodelay(true)?;
            stream.set_write_timeout(Some(SEND_TIMEOUT))?;
            stream.set_read_timeout(Some(WAIT))?;
        }
        Ok(Connection::new(stream, Some(WAIT), max_packet))
    }

    /// This thread has a connection, so another one may have to wait for the next.
    fn enter(
        self: &Arc<Self>,
        stream: &Arc<TcpStream>,
        address: IpAddr,
        role: &Arc<impl Serve>,
    ) -> (u64, Taken, bool) {
        let mut state = self.lock();
        state.back_off = Duration::ZERO;
        let (taken, is_another_wanted) = state.threads.take();
        let number = state.threads.accepted();
        state.open.insert(number, (Arc::clone(stream), address));
        let mut over_limit = false;
        if !address.is_loopback() {
            let count = state.per_address.entry(address).or_default();
            *count += 1;
            over_limit = *count > self.limits.per_address;
        }
        if state.stopping {
            let _ = stream.shutdown(Shutdown::Read);
        }
        let is_full = state.open.len() >= self.limits.connections;
        let says_full = is_full && may_say(&mut state.said_full, SAY_FULL);
        drop(state);
        if is_another_wanted {
            self.add(role);
        }
        if says_full {
            role.warn(&format!(
                "all places for connections are taken, {} in all{}; further ones have to wait",
                self.limits.connections, self.limits.hint
            ));
        }
        (number, taken, over_limit)
    }

    /// This thread's connection is over: is it to wait for another?
    fn leave(&self, number: u64, taken: Taken, address: IpAddr) -> bool {
        let mut state = self.lock();
        let socket = state.open.remove(&number);
        if let Some(count) = state.per_address.get_mut(&address) {
            *count -= 1;
            if *count == 0 {
                state.per_address.remove(&address);
            }
        }
        if state.open.is_empty() {
            self.drained.notify_all();
        }
        let was_busy = state.threads.is_busy();
        let stays = state.threads.release(taken, Instant::now);
        if !was_busy && state.threads.is_busy() {
            self.wakes_keeper.notify_one();
        }
        drop(state);
        // Closes the socket, which is not for under the lock.
        drop(socket);
        stays
    }

    /// `accept` failed: is this thread to try again?
    fn carry_on(&self, error: &io::Error, role: &impl Serve) -> bool {
        let mut state = self.lock();
        if state.stopping {
            state.threads.end();
            return false;
        }
        match error.kind() {
            io::ErrorKind::WouldBlock => {
                let stays = state.threads.is_needed();
                if !stays {
                    state.threads.end();
                }
                return stays;
            }
            // The peer was gone before we came to it.
            io::ErrorKind::ConnectionAborted | io::ErrorKind::Interrupted => return true,
            _ => {}
        }
        state.back_off = (2 * state.back_off).clamp(FIRST_BACK_OFF, LAST_BACK_OFF);
        let pause = state.back_off;
        let says = may_say(&mut state.said_trouble, SAY_TROUBLE);
        state.threads.pause();
        drop(state);
        if says {
            role.warn(&format!("could not accept a connection: {}; trying again", reason(error)));
        }
        thread::sleep(pause);
        self.lock().threads.resume();
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn origin_of(address: &str) -> IpAddr {
        origin(address.parse().unwrap())
    }

    #[test]
    fn a_host_is_one_origin_from_whichever_of_its_addresses_it_comes() {
        for (one, other) in [
            ("2001:db8:1:2::", "2001:db8:1:2:ffff:ffff:ffff:ffff"),
            ("192.0.2.7", "::ffff:192.0.2.7"),
        ] {
            assert_eq!(origin_of(one), origin_of(other), "{one} {other}");
        }
        for (one, other) in [
            ("2001:db8:1:2::", "2001:db8:1:3::"),
            ("192.0.2.7", "192.0.2.8"),
            ("::ffff:192.0.2.7", "::ffff:192.0.2.8"),
        ] {
            assert_ne!(origin_of(one), origin_of(other), "{one} {other}");
        }
    }

    #[test]
    fn loopback_which_is_not_limited_is_known_in_all_its_forms() {
        for address in ["127.0.0.1", "127.0.0.2", "::1", "::ffff:127.0.0.1"] {
            assert!(origin_of(address).is_loopback(), "{address}");
        }
    }
}
