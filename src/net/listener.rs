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
//! limit does not count. The first packet tells which. If the clients' places are taken, a few more
//! connections (the lobby) wait for theirs without a place, for a limited time.
//!
//! If the system gives no thread, each thread that takes a connection tries again. If none waits any
//! more, the last holds its connection unserved until one does: a new one, or one whose connection has
//! ended. So while there is room for a connection, a thread waits for it or tries to start one that
//! will, even if no open connection ever ends.

mod places;
mod socket;
mod threads;

use std::hint::black_box;
use std::io;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use places::Connections;
use socket::WAIT;
use threads::Threads;

use crate::net::connection::Connection;
use crate::net::lock::{lock, whole};
use crate::net::os_error::{reason, thread_failure};

pub use places::Limits;
pub(crate) use places::{OPTION_HINT, Peer, Place};
pub use socket::{bind, default_max_connections, raise_file_limit};

/// The stack of a thread that serves connections. Only what is used of it takes memory; parsing is
/// not recursive, so that is little.
const STACK: usize = 512 << 10;

/// What is freed to have the allocator look for free memory, in bytes: less than the 128 KiB from which on a
/// chunk is mapped by itself.
const TRIMMING_CHUNK: usize = 96 << 10;

/// Pauses after a failed `accept`, and after a thread could not be started while none waits.
const FIRST_BACK_OFF: Duration = Duration::from_millis(10);
const LAST_BACK_OFF: Duration = Duration::from_secs(1);

/// At most one warning in this time: that something failed, and that all places are taken.
const FAILURE_INTERVAL: Duration = Duration::from_secs(1);
const FULL_INTERVAL: Duration = Duration::from_secs(60);

/// What a role does with its connections.
pub(crate) trait Serve: Send + Sync + 'static {
    /// Serves one connection to its end.
    fn serve(self: &Arc<Self>, connection: Connection, peer: Peer);
    /// Something went wrong that no peer is told of.
    fn warn(&self, message: &str);
    /// The longest packet to take, in bytes.
    fn max_packet(&self) -> usize;
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
    connections: Connections,
    stopping: bool,
    back_off: Duration,
    /// When the latest warnings were given.
    failure_warning: Option<Instant>,
    full_warning: Option<Instant>,
}

impl State {
    /// Returns how many threads are to be started. They count as waiting from now on.
    fn fill(&mut self) -> usize {
        self.threads.fill(self.connections.free())
    }
}

/// Gives free memory back to the system. glibc looks for such only where a chunk of 64 KiB or more is freed,
/// and a connection's are small: of 5,000 that have gone, 15 MB would stay instead of 4 to 8.
fn trim_heap() {
    drop(black_box(Vec::<u8>::with_capacity(TRIMMING_CHUNK)));
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

impl Listener {
    /// Serves the connections of `socket`, which [`bind`] made.
    pub fn new(socket: TcpListener, limits: Limits) -> Arc<Self> {
        let state = Mutex::new(State {
            threads: Threads::default(),
            connections: Connections::new(limits),
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
    /// If the system does not say.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    /// Connections being served, and those accepted since the start.
    pub fn connections(&self) -> (usize, u64) {
        let state = self.lock();
        (state.connections.len(), state.connections.accepted())
    }

    /// Starts the first threads, which start the others.
    ///
    /// # Errors
    ///
    /// If the system does not give us the first threads.
    pub fn start(self: &Arc<Self>, role: &Arc<impl Serve>) -> io::Result<()> {
        let missing = self.lock().fill();
        self.start_threads(missing, role)
    }

    /// Takes no more connections. Those that the kernel has accepted for us meanwhile are reset.
    pub fn stop(&self) {
        self.lock().stopping = true;
        self.freed.notify_all();
        // Wakes every thread in `accept`; it can only fail if that is already done.
        let _ = rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Both);
    }

    /// Ends the receiving side of all open connections: each serves what has arrived, and closes.
    pub fn end_connections(&self) {
        self.lock().connections.end_all();
    }

    /// Waits until no connection is open but servers' setup connections, `limit` at most. Returns how
    /// many still are.
    pub fn drain(&self, limit: Duration) -> usize {
        let are_open = |state: &mut State| state.connections.without_servers() > 0;
        let waited = self.drained.wait_timeout_while(self.lock(), limit, are_open);
        whole(waited).0.connections.without_servers()
    }

    /// Moves connection `number` to a server's place, if one is free. Returns whether it was.
    pub fn take_server_place(self: &Arc<Self>, number: u64, role: &Arc<impl Serve>) -> bool {
        let mut state = self.lock();
        let is_free = state.connections.move_to_server(number);
        if is_free {
            let missing = state.fill();
            drop(state);
            self.freed.notify_all();
            self.start_missing(missing, number, role);
        }
        is_free
    }

    /// Moves connection `number` to a client's place, and waits for its turn until `deadline` if all are
    /// taken. Returns `false` if it gets none by then, or the listener stops.
    pub fn take_client_place(&self, number: u64, deadline: Instant) -> bool {
        self.take_place(number, deadline, |_| {})
    }

    /// As [`take_client_place`](Self::take_client_place), and if all places are taken ends the connection
    /// that has had one for longest.
    pub fn take_oldest_place(&self, number: u64, deadline: Instant) -> bool {
        self.take_place(number, deadline, Connections::end_oldest)
    }

    /// `make_room` runs once this connection waits: what becomes free before, a newcomer could take.
    fn take_place(
        &self,
        number: u64,
        deadline: Instant,
        make_room: impl FnOnce(&mut Connections),
    ) -> bool {
        let mut state = self.lock();
        if !state.connections.wait_for_client_place(number) {
            return true;
        }
        make_room(&mut state.connections);
        let left = deadline.saturating_duration_since(Instant::now());
        let has_to_wait =
            |state: &mut State| !state.stopping && !state.connections.is_turn_of(number);
        let waited = self.freed.wait_timeout_while(state, left, has_to_wait);
        (state, _) = whole(waited);
        let is_taken = !state.stopping && state.connections.is_turn_of(number);
        state.connections.end_wait(number, is_taken);
        drop(state);
        // The next one may have its turn, too.
        self.freed.notify_all();
        is_taken
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// Starts threads that already count as waiting.
    fn start_threads(self: &Arc<Self>, count: usize, role: &Arc<impl Serve>) -> io::Result<()> {
        for started in 0..count {
            let (listener, its_role) = (Arc::clone(self), Arc::clone(role));
            let thread = thread::Builder::new()
                .name("connection".to_owned())
                .stack_size(STACK)
                .spawn(move || {
                    while listener.serve_next(&its_role) {}
                    trim_heap();
                });
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
        let peer = self.enter(&stream, address, role);
        // A panic, which was a bug and is already on standard error, costs no place.
        let _ = catch_unwind(AssertUnwindSafe(|| {
            // Its socket has the listener's options.
            role.serve(Connection::new(stream, Some(WAIT), role.max_packet()), peer);
        }));
        self.leave(peer.number)
    }

    /// `accept` failed: returns whether this thread accepts again.
    #[inline(never)] // A thread keeps what it once used of its stack, as long as its connection is open.
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

    /// Gives a connection its place, and starts a thread for the next one where needed.
    #[inline(never)] // As above.
    fn enter(
        self: &Arc<Self>,
        stream: &Arc<TcpStream>,
        address: SocketAddr,
        role: &Arc<impl Serve>,
    ) -> Peer {
        let mut state = self.lock();
        state.back_off = Duration::ZERO;
        let peer = state.connections.enter(stream, address);
        state.threads.waiting -= 1;
        let missing = state.fill();
        if state.stopping {
            let _ = stream.shutdown(Shutdown::Read);
        }
        let warns_full =
            state.connections.is_full() && is_due(&mut state.full_warning, FULL_INTERVAL);
        drop(state);
        if warns_full {
            role.warn(&format!(
                "all places for connections are taken, {} in all{}; further ones have to wait",
                self.limits.connections, self.limits.hint
            ));
        }
        self.start_missing(missing, peer.number, role);
        peer
    }

    /// Starts the threads that are missing. While none can be started and none waits, connection
    /// `number`, for which this thread is there, is held.
    fn start_missing(self: &Arc<Self>, mut missing: usize, number: u64, role: &Arc<impl Serve>) {
        let mut back_off = FIRST_BACK_OFF;
        while let Err(error) = self.start_threads(missing, role) {
            self.warn_of_failure("could not start a thread for connections", &error, &**role);
            let mut state = self.lock();
            let free = state.connections.free();
            if !state.threads.hold(number, free) {
                return;
            }
            drop(state);
            thread::sleep(back_off);
            back_off = (2 * back_off).min(LAST_BACK_OFF);
            let mut state = self.lock();
            if state.stopping || state.threads.held != Some(number) {
                return;
            }
            state.threads.held = None;
            missing = state.fill();
        }
    }

    /// Releases a connection's place, which is its own until `serve` returns. Returns whether its
    /// thread accepts again.
    #[inline(never)] // As above.
    fn leave(&self, number: u64) -> bool {
        let mut state = self.lock();
        let open = state.connections.leave(number);
        let was_freed = state.connections.has_queue();
        if state.connections.without_servers() == 0 {
            self.drained.notify_all();
        }
        let free = state.connections.free();
        let waits = state.threads.release(free);
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

    use super::threads::{MAX_WAITING, MIN_WAITING};
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
}
