//! Accepting connections: a thread each, kept for the next connection.
//!
//! Starting a thread costs more than serving a message. So the threads that serve connections are
//! the same that wait in `accept`: one takes a connection, serves it to its end, and comes back
//! for the next. The kernel wakes exactly one of those that wait.
//!
//! How many there are: `MIN_WAITING` wait, as long as the limit on connections leaves room. A
//! thread that takes a connection and leaves fewer waiting starts another before it serves. A
//! thread whose connection has ended waits again, unless `MAX_WAITING` wait already. A thread that
//! has waited for `WAIT` ends, unless only `MIN_WAITING` wait. At the limit nobody waits, and new
//! connections stay in the kernel's backlog without disturbing anybody.
//!
//! A connection has a client's place, unless its role moves it to one of the servers' places, which the
//! limit does not count. Which it needs, its first packet says: so where the clients' places are taken
//! a few further connections, the lobby, are served without a place until that has come.
//!
//! Where the system gives no thread, each thread that takes a connection tries again. The last one
//! that waits keeps its connection unserved and tries until another thread waits, a new one or
//! one whose connection has ended. So while there is room for a connection, a thread waits for it or
//! tries to start one that will, even if no open connection ever ends.

mod socket;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::io;
use std::net::{IpAddr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use socket::WAIT;

use crate::net::connection::{Connection, SEND_TIMEOUT};
use crate::net::os_error::{reason, thread_failure};

pub use socket::{bind, default_max_connections, raise_file_limit};

/// The stack of a thread that serves connections. Only what is used of it takes memory; parsing is
/// not recursive, so that is little.
const STACK: usize = 512 << 10;

/// Enough for those that connect while a thread is started. Of 1, 2, 4 and 12, none served short
/// connections measurably faster than 4.
const MIN_WAITING: usize = 4;

/// Threads that come back from a crowd wait for the next one, but not thousands of them.
const MAX_WAITING: usize = 128;

/// Pauses after a failed `accept`, and after a thread could not be started while none waits.
const FIRST_BACK_OFF: Duration = Duration::from_millis(10);
const LAST_BACK_OFF: Duration = Duration::from_secs(1);

/// At most one warning in so much time: that something failed, and that all places are taken.
const FAILURE_INTERVAL: Duration = Duration::from_secs(1);
const FULL_INTERVAL: Duration = Duration::from_secs(60);

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

/// What a role does with its connections.
pub(crate) trait Serve: Send + Sync + 'static {
    /// Serves one connection to its end.
    fn serve(self: &Arc<Self>, connection: Connection, peer: Peer);
    /// Something went wrong that no peer is told of.
    fn warn(&self, message: &str);
    /// The longest packet to take, in bytes.
    fn max_packet(&self) -> usize;
}

/// The other end of an accepted connection.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Peer {
    /// Its address.
    pub address: SocketAddr,
    /// The connection's number, by which the listener knows it.
    pub number: u64,
    /// What place it begins with.
    pub place: Place,
    /// Whether its host has more connections here than one host may have.
    pub over_limit: bool,
}

/// What place a connection has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// One of [`Limits::connections`].
    Client,
    /// One of [`Limits::servers`].
    Server,
    /// None yet: it is in the lobby.
    Lobby,
}

/// The [`Limits::hint`] of a limit that the command line sets.
pub(crate) const OPTION_HINT: &str = " (-max-connections, or half of ulimit -n)";

/// Limits on the connections of one listener.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Connections at once that are no servers' setup connections.
    pub connections: usize,
    /// Servers' setup connections at once, besides.
    pub servers: usize,
    /// Connections that have no place yet, besides.
    pub lobby: usize,
    /// Where that limit comes from, as the line that says it is reached ends; may be empty.
    pub hint: &'static str,
    /// Connections at once from one address that is not loopback.
    pub per_address: usize,
}

impl Limits {
    /// Without places for servers, and without a limit for one address.
    pub const fn of_connections(connections: usize) -> Self {
        let (servers, lobby, hint) = (0, 0, "");
        Limits { connections, servers, lobby, hint, per_address: connections }
    }
}

/// A listening socket and the threads that serve what it accepts.
#[derive(Debug)]
pub(crate) struct Listener {
    socket: TcpListener,
    limits: Limits,
    state: Mutex<State>,
    /// No connection is open any more but servers'.
    drained: Condvar,
    /// A client's place is free, or nobody gets one any more.
    freed: Condvar,
}

#[derive(Debug)]
struct State {
    threads: Threads,
    /// Sockets being served by number, to end them from outside.
    /// A map that gives memory back when the connections of a busy hour are gone.
    open: BTreeMap<u64, Open>,
    places: Places,
    per_address: HashMap<IpAddr, usize>,
    accepted: u64,
    stopping: bool,
    back_off: Duration,
    /// When the latest warnings were given.
    failure_warning: Option<Instant>,
    full_warning: Option<Instant>,
}

/// A connection that is being served.
#[derive(Debug)]
struct Open {
    stream: Arc<TcpStream>,
    place: Place,
    /// It was ended for another's sake.
    is_ending: bool,
}

/// How many connections have which place.
#[derive(Debug, Default)]
struct Places {
    clients: usize,
    servers: usize,
    lobby: usize,
    /// Connections that wait for a client's place, first come first served.
    queue: VecDeque<u64>,
}

impl Places {
    fn count(&mut self, place: Place) -> &mut usize {
        match place {
            Place::Client => &mut self.clients,
            Place::Server => &mut self.servers,
            Place::Lobby => &mut self.lobby,
        }
    }
}

impl State {
    fn move_to(&mut self, number: u64, place: Place) {
        if let Some(open) = self.open.get_mut(&number) {
            *self.places.count(open.place) -= 1;
            open.place = place;
            *self.places.count(place) += 1;
            self.threads.servers = self.places.servers;
        }
    }
}

/// Returns whether a warning is due, and if so notes that it was given now.
fn is_due(last: &mut Option<Instant>, interval: Duration) -> bool {
    let now = Instant::now();
    let is_due = last.is_none_or(|last| now - last >= interval);
    if is_due {
        *last = Some(now);
    }
    is_due
}

/// How many threads serve a connection and how many wait for one: never more than the limit and one
/// for each server's place that is taken.
#[derive(Debug)]
struct Threads {
    limit: usize,
    servers: usize,
    serving: usize,
    /// Those that are being started count, and so do those that pause after a failed `accept`.
    waiting: usize,
    /// The connection whose thread does not serve it until another thread waits.
    held: Option<u64>,
}

impl Threads {
    fn new(limit: usize) -> Self {
        Threads { limit, servers: 0, serving: 0, waiting: 0, held: None }
    }

    /// How many more there may be.
    fn room(&self) -> usize {
        (self.limit + self.servers).saturating_sub(self.serving + self.waiting)
    }

    /// Returns how many threads are to be started. They count as waiting from now on.
    fn fill(&mut self) -> usize {
        let missing = MIN_WAITING.saturating_sub(self.waiting).min(self.room());
        self.waiting += missing;
        missing
    }

    /// A thread takes a connection. Returns how many threads are to be started.
    fn take(&mut self) -> usize {
        self.waiting -= 1;
        self.serving += 1;
        self.fill()
    }

    /// A thread with connection `number` could start no other: returns whether it is held.
    fn hold(&mut self, number: u64) -> bool {
        let nobody_waits = self.waiting == 0 && self.room() > 0;
        if nobody_waits {
            // In place of an earlier one: were all of them held, none would ever end.
            self.held = Some(number);
        }
        nobody_waits
    }

    /// A connection has ended: returns whether its thread accepts again.
    fn release(&mut self) -> bool {
        self.serving -= 1;
        let waits = self.waiting < MAX_WAITING && self.room() > 0;
        if waits {
            self.waiting += 1;
            self.held = None;
        }
        waits
    }

    /// A thread has waited for `WAIT`: returns whether it keeps waiting.
    fn keeps_waiting(&mut self) -> bool {
        let waits = self.waiting <= MIN_WAITING;
        if !waits {
            self.waiting -= 1;
        }
        waits
    }
}

impl Listener {
    /// Serves the connections of `socket`, which [`bind`] made.
    pub fn new(socket: TcpListener, limits: Limits) -> Arc<Self> {
        let state = Mutex::new(State {
            threads: Threads::new(limits.connections + limits.lobby),
            open: BTreeMap::new(),
            places: Places::default(),
            per_address: HashMap::new(),
            accepted: 0,
            stopping: false,
            back_off: Duration::ZERO,
            failure_warning: None,
            full_warning: None,
        });
        Arc::new(Listener { socket, limits, state, drained: Condvar::new(), freed: Condvar::new() })
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

    /// Starts the first threads, which start the others.
    ///
    /// # Errors
    ///
    /// Where the system does not give us the first threads.
    pub fn start(self: &Arc<Self>, role: &Arc<impl Serve>) -> io::Result<()> {
        let missing = self.lock().threads.fill();
        self.start_threads(missing, role)
    }

    /// Takes no more connections. Those that the kernel has accepted for us meanwhile are reset.
    pub fn stop(&self) {
        self.lock().stopping = true;
        self.freed.notify_all();
        // Wakes every thread in `accept`; it can only fail where that is already done.
        let _ = rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Both);
    }

    /// Ends the receiving side of all open connections: each serves what has arrived, and closes.
    pub fn end_connections(&self) {
        for open in self.lock().open.values() {
            // It fails where the peer has just closed; then there is nothing to end.
            let _ = open.stream.shutdown(Shutdown::Read);
        }
    }

    /// Ends the connection that has had a client's place for longest.
    pub fn end_oldest(&self) {
        let mut state = self.lock();
        let oldest =
            state.open.values_mut().find(|open| open.place == Place::Client && !open.is_ending);
        if let Some(open) = oldest {
            open.is_ending = true;
            // It fails where the peer has just closed.
            let _ = open.stream.shutdown(Shutdown::Both);
        }
    }

    /// Waits until no connection is open but servers' setup connections, `limit` at most. Returns how
    /// many still are.
    pub fn drain(&self, limit: Duration) -> usize {
        let others = |state: &State| state.open.len() - state.places.servers;
        let (state, _) = self
            .drained
            .wait_timeout_while(self.lock(), limit, |state| others(state) > 0)
            .unwrap_or_else(PoisonError::into_inner);
        others(&state)
    }

    /// Moves connection `number` to a server's place, if one is free. Returns whether it was.
    pub fn take_server_place(self: &Arc<Self>, number: u64, role: &Arc<impl Serve>) -> bool {
        let mut state = self.lock();
        let is_free = state.places.servers < self.limits.servers;
        if is_free {
            state.move_to(number, Place::Server);
            let missing = state.threads.fill();
            drop(state);
            self.freed.notify_all();
            self.start_missing(missing, number, role);
        }
        is_free
    }

    /// Moves connection `number` to a client's place, and waits for its turn until `deadline` where all
    /// are taken. Returns `false` where it gets none by then, or the listener stops.
    pub fn take_client_place(&self, number: u64, deadline: Instant) -> bool {
        let mut state = self.lock();
        if state.open.get(&number).is_none_or(|open| open.place == Place::Client) {
            return true;
        }
        state.move_to(number, Place::Lobby);
        state.places.queue.push_back(number);
        let is_its_turn = |state: &State| {
            let is_free = state.places.clients < self.limits.connections;
            is_free && state.places.queue.front() == Some(&number)
        };
        let left = deadline.saturating_duration_since(Instant::now());
        (state, _) = self
            .freed
            .wait_timeout_while(state, left, |state| !state.stopping && !is_its_turn(state))
            .unwrap_or_else(PoisonError::into_inner);
        let is_taken = !state.stopping && is_its_turn(&state);
        state.places.queue.retain(|waiting| *waiting != number);
        if is_taken {
            state.move_to(number, Place::Client);
        }
        drop(state);
        // The next one may have its turn, too.
        self.freed.notify_all();
        is_taken
    }

    /// The state is whole between any two statements, so a thread that panicked left it usable.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts threads that already count as waiting.
    fn start_threads(self: &Arc<Self>, count: usize, role: &Arc<impl Serve>) -> io::Result<()> {
        for started in 0..count {
            let (listener, its_role) = (Arc::clone(self), Arc::clone(role));
            let thread = thread::Builder::new()
                .name("connection".to_owned())
                .stack_size(STACK)
                .spawn(move || while listener.serve_next(&its_role) {});
            if let Err(error) = thread {
                self.lock().threads.waiting -= count - started;
                return Err(thread_failure(error));
            }
        }
        Ok(())
    }

    /// Takes a connection and serves it to its end. Returns whether this thread accepts again.
    fn serve_next(self: &Arc<Self>, role: &Arc<impl Serve>) -> bool {
        let (stream, address) = match self.socket.accept() {
            Ok((stream, address)) => (Arc::new(stream), address),
            Err(error) => return self.accepts_again_after(&error, &**role),
        };
        let origin = origin(address.ip());
        let (number, place, over_limit) = self.enter(&stream, origin, role);
        let peer = Peer { address, number, place, over_limit };
        // A panic, which was a bug and is already on standard error, costs no place.
        let _ = catch_unwind(AssertUnwindSafe(|| match self.prepare(stream, role.max_packet()) {
            Ok(connection) => role.serve(connection, peer),
            Err(error) => role.warn(&format!("{address}: {error}; closed")),
        }));
        self.leave(number, origin)
    }

    /// `accept` failed: returns whether this thread accepts again.
    #[inline(never)]
    fn accepts_again_after(&self, error: &io::Error, role: &impl Serve) -> bool {
        let mut state = self.lock();
        if state.stopping {
            state.threads.waiting -= 1;
            return false;
        }
        if error.kind() == io::ErrorKind::WouldBlock {
            return state.threads.keeps_waiting();
        }
        state.back_off = (2 * state.back_off).clamp(FIRST_BACK_OFF, LAST_BACK_OFF);
        let pause = state.back_off;
        drop(state);
        self.warn_of_failure("could not accept a connection", error, role);
        thread::sleep(pause);
        true
    }

    fn warn_of_failure(&self, what: &str, error: &io::Error, role: &impl Serve) {
        if is_due(&mut self.lock().failure_warning, FAILURE_INTERVAL) {
            role.warn(&format!("{what}: {}; trying again", reason(error)));
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

    /// Gives a connection its place, and starts a thread for the next one where needed. Returns the
    /// connection's number and place, and whether its host has too many.
    #[inline(never)]
    fn enter(
        self: &Arc<Self>,
        stream: &Arc<TcpStream>,
        origin: IpAddr,
        role: &Arc<impl Serve>,
    ) -> (u64, Place, bool) {
        let mut state = self.lock();
        state.back_off = Duration::ZERO;
        state.accepted += 1;
        let number = state.accepted;
        let is_full =
            |places: &Places| places.clients >= self.limits.connections || !places.queue.is_empty();
        let place = if is_full(&state.places) { Place::Lobby } else { Place::Client };
        *state.places.count(place) += 1;
        state.open.insert(number, Open { stream: Arc::clone(stream), place, is_ending: false });
        let missing = state.threads.take();
        let mut over_limit = false;
        if !origin.is_loopback() {
            let count = state.per_address.entry(origin).or_default();
            *count += 1;
            over_limit = *count > self.limits.per_address;
        }
        if state.stopping {
            let _ = stream.shutdown(Shutdown::Read);
        }
        let warns_full = is_full(&state.places) && is_due(&mut state.full_warning, FULL_INTERVAL);
        drop(state);
        if warns_full {
            role.warn(&format!(
                "all places for connections are taken, {} in all{}; further ones have to wait",
                self.limits.connections, self.limits.hint
            ));
        }
        self.start_missing(missing, number, role);
        (number, place, over_limit)
    }

    /// Starts the threads that are missing. While none can be started and none waits, connection
    /// `number`, for which this thread is there, is held.
    fn start_missing(self: &Arc<Self>, mut missing: usize, number: u64, role: &Arc<impl Serve>) {
        let mut back_off = FIRST_BACK_OFF;
        while let Err(error) = self.start_threads(missing, role) {
            self.warn_of_failure("could not start a thread for connections", &error, &**role);
            if !self.lock().threads.hold(number) {
                return;
            }
            thread::sleep(back_off);
            back_off = (2 * back_off).min(LAST_BACK_OFF);
            let mut state = self.lock();
            if state.stopping || state.threads.held != Some(number) {
                return;
            }
            state.threads.held = None;
            missing = state.threads.fill();
        }
    }

    /// Releases a connection's place, which is its own until `serve` returns. Returns whether its
    /// thread accepts again.
    #[inline(never)]
    fn leave(&self, number: u64, origin: IpAddr) -> bool {
        let mut state = self.lock();
        let open = state.open.remove(&number);
        if let Some(Open { place, .. }) = open {
            *state.places.count(place) -= 1;
        }
        let was_freed = !state.places.queue.is_empty();
        if let Some(count) = state.per_address.get_mut(&origin) {
            *count -= 1;
            if *count == 0 {
                state.per_address.remove(&origin);
            }
        }
        if state.open.len() == state.places.servers {
            self.drained.notify_all();
        }
        // A server's place goes with its connection.
        state.threads.servers = state.places.servers;
        let waits = state.threads.release();
        drop(state);
        if was_freed {
            self.freed.notify_all();
        }
        // Closes the socket, which is not for under the lock.
        drop(open);
        waits
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use proptest::prelude::*;

    use super::*;

    const BOUND: Duration = Duration::from_secs(20);

    /// Sends back what it receives, but panics at a zero.
    struct Echo;

    impl Serve for Echo {
        fn serve(self: &Arc<Self>, connection: Connection, _: Peer) {
            let mut stream = &**connection.stream();
            let mut byte = [0];
            loop {
                match stream.read(&mut byte) {
                    Ok(1) => {
                        assert_ne!(byte, [0]);
                        stream.write_all(&byte).unwrap();
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    _ => return,
                }
            }
        }

        fn warn(&self, _: &str) {}

        fn max_packet(&self) -> usize {
            1 << 10
        }
    }

    struct Echoes {
        listener: Arc<Listener>,
        role: Arc<Echo>,
    }

    impl Echoes {
        fn new(limit: usize, wait: Duration) -> Self {
            Self::with(Limits::of_connections(limit), wait)
        }

        fn with(limits: Limits, wait: Duration) -> Self {
            let socket = bind("127.0.0.1", 0).unwrap();
            let receive = rustix::net::sockopt::Timeout::Recv;
            rustix::net::sockopt::set_socket_timeout(&socket, receive, Some(wait)).unwrap();
            let (listener, role) = (Listener::new(socket, limits), Arc::new(Echo));
            listener.start(&role).unwrap();
            Echoes { listener, role }
        }

        /// Each thread has the role, and so have we.
        fn threads(&self) -> usize {
            Arc::strong_count(&self.role) - 1
        }

        fn wait_for_threads(&self, count: usize) {
            let end = Instant::now() + BOUND;
            while self.threads() != count {
                assert!(Instant::now() < end, "{} threads, not {count}", self.threads());
                thread::sleep(Duration::from_millis(1));
            }
        }

        fn connect(&self) -> TcpStream {
            let stream = TcpStream::connect(self.listener.local_addr().unwrap()).unwrap();
            stream.set_read_timeout(Some(BOUND)).unwrap();
            stream
        }
    }

    fn expect_echo(mut stream: &TcpStream) {
        stream.write_all(b"x").unwrap();
        let mut byte = [0];
        stream.read_exact(&mut byte).expect("it is served");
        assert_eq!(&byte, b"x");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn whoever_connects_while_there_is_room_is_served_and_threads_are_never_lost(
            limit in 1..12_usize,
            steps in prop::collection::vec(prop::option::of(0..20_usize), 0..40),
        ) {
            let echoes = Echoes::new(limit, WAIT);
            let mut clients = Vec::new();
            for step in steps {
                match step {
                    Some(index) if index < clients.len() => drop(clients.remove(index)),
                    _ => clients.push(echoes.connect()),
                }
                clients.iter().take(limit).for_each(expect_echo);
                prop_assert!(echoes.threads() <= limit);
            }
            clients.clear();
            expect_echo(&echoes.connect());
            prop_assert_eq!(echoes.listener.drain(BOUND), 0);
            echoes.listener.stop();
            echoes.wait_for_threads(0);
        }
    }

    #[test]
    fn at_the_limit_nobody_waits() {
        let echoes = Echoes::new(2, WAIT);
        let served = [(); 2].map(|()| echoes.connect());
        served.iter().for_each(expect_echo);
        let mut next = echoes.connect();
        next.write_all(b"x").unwrap();
        assert_eq!(echoes.threads(), 2);
        assert_eq!(echoes.listener.connections(), (2, 2));
        next.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        assert!(next.peek(&mut [0]).is_err());
        next.set_read_timeout(Some(BOUND)).unwrap();
        drop(served);
        next.read_exact(&mut [0]).unwrap();
    }

    #[test]
    fn after_a_crowd_only_a_few_threads_wait_for_long() {
        let echoes = Echoes::new(1000, Duration::from_millis(100));
        let crowd: Vec<_> = (0..MAX_WAITING + 50).map(|_| echoes.connect()).collect();
        crowd.iter().for_each(expect_echo);
        echoes.wait_for_threads(crowd.len() + MIN_WAITING);
        drop(crowd);
        echoes.wait_for_threads(MIN_WAITING);
        expect_echo(&echoes.connect());
    }

    #[test]
    fn a_panic_costs_no_place() {
        let echoes = Echoes::new(2, WAIT);
        for _ in 0..10 {
            let mut client = echoes.connect();
            client.write_all(&[0]).unwrap();
            assert_eq!(client.read(&mut [0]).unwrap(), 0);
        }
        expect_echo(&echoes.connect());
    }

    /// Threads as they are told to be, some of which the system does not give.
    #[derive(Default)]
    struct Model {
        open: Vec<u64>,
        waiting: usize,
        accepted: u64,
    }

    impl Model {
        /// Tries to start threads for the one that has this connection, which may then be held.
        fn start(&mut self, threads: &mut Threads, missing: usize, number: u64, given: usize) {
            self.waiting += missing.min(given);
            if given < missing {
                threads.waiting -= missing - given;
                threads.hold(number);
            }
        }

        fn connect(&mut self, threads: &mut Threads, given: usize) {
            if self.waiting > 0 {
                self.waiting -= 1;
                self.accepted += 1;
                self.open.push(self.accepted);
                let missing = threads.take();
                self.start(threads, missing, self.accepted, given);
            }
        }

        /// The held connection's thread tries again.
        fn retry(&mut self, threads: &mut Threads, given: usize) {
            if let Some(number) = threads.held.take() {
                let missing = threads.fill();
                self.start(threads, missing, number, given);
            }
        }

        /// A connection ends that is not held.
        fn end(&mut self, threads: &mut Threads, index: usize) {
            let held = self.open.get(index).is_some_and(|number| threads.held == Some(*number));
            if index < self.open.len() && !held {
                self.open.remove(index);
                self.waiting += usize::from(threads.release());
            }
        }
    }

    proptest! {
        #[test]
        fn whoever_connects_is_served_once_the_system_gives_threads_though_no_connection_ends(
            limit in 1..20_usize,
            steps in prop::collection::vec((0..4_usize, 0..20_usize, 0..6_usize), 0..200),
        ) {
            let mut threads = Threads::new(limit);
            let mut model = Model { waiting: threads.fill(), ..Model::default() };
            for (step, index, given) in steps {
                match step {
                    0 => model.connect(&mut threads, given),
                    1 => model.end(&mut threads, index),
                    2 => model.retry(&mut threads, given),
                    _ if model.waiting > 0 => {
                        model.waiting -= usize::from(!threads.keeps_waiting());
                    }
                    _ => {}
                }
                prop_assert_eq!((threads.serving, threads.waiting), (model.open.len(), model.waiting));
                prop_assert!(threads.serving + threads.waiting <= limit);
                prop_assert!(model.waiting > 0 || threads.held.is_some() || model.open.len() == limit);
                prop_assert!(threads.held.is_none() || model.waiting == 0);
            }
            while model.open.len() < limit {
                let before = model.open.len();
                model.retry(&mut threads, MIN_WAITING);
                model.connect(&mut threads, MIN_WAITING);
                prop_assert_eq!(model.open.len(), before + 1);
            }
            prop_assert!(threads.held.is_none());
        }
    }

    #[test]
    fn of_a_crowd_that_has_gone_not_all_wait() {
        let mut threads = Threads::new(1000);
        let mut model = Model { waiting: threads.fill(), ..Model::default() };
        (0..500).for_each(|_| model.connect(&mut threads, MIN_WAITING));
        assert_eq!(model.open.len(), 500);
        (0..500).for_each(|_| model.end(&mut threads, 0));
        assert_eq!(threads.waiting, MAX_WAITING);
    }

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
