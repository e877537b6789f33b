//! Accepting connections: a thread each, kept for the next connection.
//!
//! Starting a thread costs more than serving a message. So the threads that serve connections are
//! the same that wait in `accept`: one takes a connection, serves it to its end, and comes back
//! for the next; the kernel wakes exactly one of those that wait. A few always wait, and another is
//! started whenever they become fewer. At the limit nobody is left to wait, and new connections
//! stay in the kernel's backlog without disturbing anybody.

use std::collections::{BTreeMap, HashMap};
use std::hint;
use std::io;
use std::net::{IpAddr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketType, ipproto, sockopt};

use crate::wire::{Connection, SEND_TIMEOUT};

/// Threads that wait for a connection are at least as many as these, up to the limit.
const MIN_WAITING: usize = 4;

/// A thread that finds this many waiting when its connection ends is not needed and ends too.
const MAX_WAITING: usize = 128;

/// A thread beyond [`MIN_WAITING`] that waited this long for a connection ends. Accepted sockets
/// inherit it as their read timeout on Linux, which saves a system call on each.
const WAIT: Duration = Duration::from_secs(5);

/// What the kernel may hold for us while all threads are busy (it takes the lower one of this and
/// `net.core.somaxconn`).
const BACKLOG: i32 = 4096;

/// The stack of a thread that serves connections. Only what is used of it takes memory; parsing is
/// not recursive, so that is little.
const STACK: usize = 512 << 10;

/// Pauses after a failed `accept`.
const FIRST_BACK_OFF: Duration = Duration::from_millis(10);
const LAST_BACK_OFF: Duration = Duration::from_secs(1);

/// Whether sockets from `accept` have the options that were set on the listener.
const ACCEPTED_INHERIT: bool = cfg!(target_os = "linux");

/// Listens on `host`:`port`; port 0 takes any free one.
///
/// # Errors
///
/// Where the host has no address, or the system does not let us listen there.
pub fn bind(host: &str, port: u16) -> io::Result<TcpListener> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the host has no address");
    for address in (host, port).to_socket_addrs()? {
        match bind_address(address) {
            Ok(listener) => return Ok(listener),
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// As [`TcpListener::bind`], whose backlog of 128 is too short here.
fn bind_address(address: SocketAddr) -> io::Result<TcpListener> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let socket = rustix::net::socket(family, SocketType::STREAM, Some(ipproto::TCP))?;
    rustix::io::fcntl_setfd(&socket, rustix::io::FdFlags::CLOEXEC)?;
    sockopt::set_socket_reuseaddr(&socket, true)?;
    sockopt::set_tcp_nodelay(&socket, true)?;
    sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, Some(WAIT))?;
    sockopt::set_socket_timeout(&socket, sockopt::Timeout::Send, Some(SEND_TIMEOUT))?;
    rustix::net::bind(&socket, &address)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket.into())
}

/// Allows this process as many open files as the system lets it have: each connection takes one.
pub fn raise_file_limit() {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let raised = rustix::process::Rlimit { current: limit.maximum, ..limit };
    // Where that is not allowed, the limit stays as it is, and the connections are fewer.
    let _ = rustix::process::setrlimit(rustix::process::Resource::Nofile, raised);
}

/// The default limit on connections: half of the files that this process may open, since each
/// connection may need one more to a server, less what else is open.
pub fn default_max_connections() -> usize {
    let files = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    let files = files.and_then(|files| usize::try_from(files).ok()).unwrap_or(usize::MAX);
    (files.saturating_sub(16) / 2).clamp(1, 16_384)
}

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

/// Limits on the connections of one listener.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Connections at once, in all.
    pub connections: usize,
    /// Connections at once from one address that is not loopback.
    pub per_address: usize,
}

/// A listening socket and the threads that serve what it accepts.
#[derive(Debug)]
pub struct Listener {
    socket: TcpListener,
    limits: Limits,
    state: Mutex<State>,
    /// A connection ended.
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Threads in `accept`, or on their way there.
    waiting: usize,
    /// Sockets being served, to end them from outside.
    /// A map that gives memory back when the connections of a busy hour are gone.
    open: BTreeMap<u64, (Arc<TcpStream>, IpAddr)>,
    accepted: u64,
    per_address: HashMap<IpAddr, usize>,
    stopping: bool,
    back_off: Duration,
    said: Option<Instant>,
}

impl Listener {
    /// Serves the connections of `socket`, which [`bind`] made.
    pub fn new(socket: TcpListener, limits: Limits) -> Arc<Self> {
        Arc::new(Listener { socket, limits, state: Mutex::default(), changed: Condvar::new() })
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
        (state.open.len(), state.accepted)
    }

    /// Starts the first threads; they start the others.
    ///
    /// # Errors
    ///
    /// Where the system gives us no thread at all.
    pub fn start(self: &Arc<Self>, role: &Arc<impl Serve>) -> io::Result<()> {
        self.lock().waiting += 1;
        self.spawn(role)
    }

    /// Takes no more connections. Those that the kernel has accepted for us meanwhile are reset.
    pub fn stop(&self) {
        self.lock().stopping = true;
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
    pub fn wait_until_quiet(&self, limit: Duration) -> usize {
        let (state, _) = self
            .changed
            .wait_timeout_while(self.lock(), limit, |state| !state.open.is_empty())
            .unwrap_or_else(PoisonError::into_inner);
        state.open.len()
    }

    /// The state is whole between any two statements, so a thread that panicked left it usable.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts a thread that was already counted as waiting.
    fn spawn(self: &Arc<Self>, role: &Arc<impl Serve>) -> io::Result<()> {
        let (listener, its_role) = (Arc::clone(self), Arc::clone(role));
        let thread = thread::Builder::new()
            .name("connection".to_owned())
            .stack_size(STACK)
            .spawn(move || listener.work(&its_role));
        if let Err(error) = thread {
            self.lock().waiting -= 1;
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
                    let (number, over_limit, wanted) = self.enter(&stream, origin);
                    if wanted && let Err(error) = self.spawn(role) {
                        role.warn(&format!("could not start a thread for connections: {error}"));
                    }
                    match self.prepare(stream, role.max_packet()) {
                        Ok(connection) => role.serve(connection, Peer { address, over_limit }),
                        Err(error) => role.warn(&format!("{address}: {error}; closed")),
                    }
                    self.leave(number, origin)
                }
                Err(error) => self.carry_on(&error, &**role),
            };
            if !stays {
                return let_memory_go();
            }
        }
    }

    fn prepare(&self, stream: Arc<TcpStream>, max_packet: usize) -> io::Result<Connection> {
        if !ACCEPTED_INHERIT {
            stream.set_nodelay(true)?;
            stream.set_write_timeout(Some(SEND_TIMEOUT))?;
            stream.set_read_timeout(Some(WAIT))?;
        }
        Ok(Connection::new(stream, Some(WAIT), max_packet))
    }

    /// This thread has a connection: is another one needed to wait?
    fn enter(&self, stream: &Arc<TcpStream>, address: IpAddr) -> (u64, bool, bool) {
        let mut state = self.lock();
        state.back_off = Duration::ZERO;
        state.waiting -= 1;
        state.accepted += 1;
        let number = state.accepted;
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
        let threads = state.open.len() + state.waiting;
        let wanted = state.waiting < MIN_WAITING && threads < self.limits.connections;
        state.waiting += usize::from(wanted);
        (number, over_limit, wanted)
    }

    /// This thread's connection is over: is it needed to wait for another?
    fn leave(&self, number: u64, address: IpAddr) -> bool {
        let mut state = self.lock();
        let socket = state.open.remove(&number);
        if let Some(count) = state.per_address.get_mut(&address) {
            *count -= 1;
            if *count == 0 {
                state.per_address.remove(&address);
            }
        }
        if state.open.is_empty() {
            self.changed.notify_all();
        }
        let stays = !state.stopping && state.waiting < MAX_WAITING;
        state.waiting += usize::from(stays);
        drop(state);
        // Closes the socket, which is not for under the lock.
        drop(socket);
        stays
    }

    /// `accept` failed: is this thread to try again?
    fn carry_on(&self, error: &io::Error, role: &impl Serve) -> bool {
        let mut state = self.lock();
        if state.stopping {
            state.waiting -= 1;
            return false;
        }
        match error.kind() {
            io::ErrorKind::WouldBlock => {
                let stays = state.waiting <= MIN_WAITING;
                state.waiting -= usize::from(!stays);
                return stays;
            }
            // The peer was gone before we came to it.
            io::ErrorKind::ConnectionAborted | io::ErrorKind::Interrupted => return true,
            _ => {}
        }
        state.back_off = (2 * state.back_off).clamp(FIRST_BACK_OFF, LAST_BACK_OFF);
        let pause = state.back_off;
        let now = Instant::now();
        let says = state.said.is_none_or(|said| now - said >= Duration::from_secs(1));
        if says {
            state.said = Some(now);
        }
        drop(state);
        if says {
            role.warn(&format!(
                "could not accept a connection: {}; trying again",
                crate::wire::reason(error)
            ));
        }
        thread::sleep(pause);
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
