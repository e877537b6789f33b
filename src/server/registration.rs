//! A server's registration with one proxy: made, held and made again.
//!
//! The server first introduces itself: it sends a setup packet that asks whether the proxy grants
//! leases, and ends its sending side, as the homework's servers do; a proxy that serves one
//! connection at a time is not held up. A proxy of ours answers, and then the server opens the
//! connection that holds its lease, renews it there, and registers again when it breaks. Any other
//! proxy has read a setup packet that it understands, and the registration stands.

mod setup_connection;

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use setup_connection::{End, Loss, Tenure};

use crate::cli::terminal::Terminal;
use crate::net::endpoint::Endpoint;
use crate::net::lock::{lock, whole};
use crate::protocol::Setup;

/// The lease that is asked for, in seconds.
const LEASE: u64 = 3;

/// Pauses between attempts to reach a proxy.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LAST_PAUSE: Duration = Duration::from_secs(1);

/// How long a proxy may take to end the connection of a server that leaves. By then the lease has
/// run out.
pub const LEAVE_LIMIT: Duration = Duration::from_secs(LEASE);

/// A server's registration with one proxy.
#[derive(Debug)]
pub struct Registration {
    proxy: Endpoint,
    setup: Setup<'static>,
    /// Register as the tutorial's server does.
    strings: bool,
    /// Where the server listens.
    listens: SocketAddr,
    terminal: Terminal,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// The setup connection, and which of its sides is to be ended when the server leaves.
    open: Option<(Arc<TcpStream>, Shutdown)>,
    stopping: bool,
    /// The thread that holds the registration has ended.
    ended: bool,
    /// It was said that the proxy cannot reach this server.
    unreachable: bool,
    /// It was said before that it is registered.
    registered: bool,
    /// Its last lease ended before it was renewed.
    flaps: bool,
}

impl Registration {
    /// A registration with `proxy` by the packet `setup`, not yet made, of a server that `listens`
    /// there; with `strings`, as the tutorial's server registers.
    pub fn new(
        proxy: Endpoint,
        setup: Setup<'static>,
        listens: SocketAddr,
        strings: bool,
        terminal: Terminal,
    ) -> Arc<Self> {
        let (state, changed) = Default::default();
        Arc::new(Registration { proxy, setup, strings, listens, terminal, state, changed })
    }

    /// Registers, and holds the registration until [`leave`](Self::leave).
    ///
    /// # Errors
    ///
    /// The proxy's reason if it refuses the server.
    pub fn hold(&self) -> Result<(), String> {
        let result = self.register_again_and_again();
        self.lock().ended = true;
        self.changed.notify_all();
        result
    }

    /// Gives up the lease. The proxy takes this server out of its table when it sees the end of the
    /// setup connection's one side, and then ends the other.
    pub fn leave(&self) {
        let mut state = self.lock();
        state.stopping = true;
        self.changed.notify_all();
        if let Some((stream, side)) = &state.open {
            // It fails if the proxy has just gone, and with it the lease.
            let _ = stream.shutdown(*side);
        }
    }

    /// Waits until the proxy has seen that the server leaves, but not longer than `until`.
    pub fn wait_until_left(&self, until: Instant) {
        let left = until.saturating_duration_since(Instant::now());
        drop(self.changed.wait_timeout_while(self.lock(), left, |state| !state.ended));
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    fn register_again_and_again(&self) -> Result<(), String> {
        let mut pause = FIRST_PAUSE;
        let mut reported: Vec<Loss> = Vec::new();
        // Once a proxy has granted a lease, no silence makes it one of the homework's.
        let mut grants_leases = false;
        loop {
            let mut tenure = Tenure::default();
            match self.register(grants_leases, &mut tenure) {
                End::Done(how) => {
                    how.iter().for_each(|how| self.terminal.warn(format_args!("{how}")));
                    return Ok(());
                }
                End::Refused(reason) => return Err(reason),
                End::GrantsLeases => {
                    grants_leases = true;
                    continue;
                }
                End::Lost(loss, reason) => {
                    // A proxy that grants a lease and ends the connection at once is asked, and
                    // spoken of, no more often than one that is away.
                    if tenure.was_renewed {
                        pause = FIRST_PAUSE;
                    }
                    if tenure.was_said {
                        reported.clear();
                    }
                    if !reported.contains(&loss) {
                        self.terminal
                            .warn(format_args!("{reason}; trying again until it is there"));
                        reported.push(loss);
                    }
                }
            }
            if self.pause(pause) {
                return Ok(());
            }
            pause = (2 * pause).min(LAST_PAUSE);
        }
    }

    /// Waits for about `length`, or until the server leaves. Servers that lost the same proxy at
    /// the same moment are not to come back at the same moment.
    fn pause(&self, length: Duration) -> bool {
        let chance = RandomState::new().build_hasher().finish() as f64 / u64::MAX as f64;
        let length = length.mul_f64(0.5 + chance / 2.0);
        let waited = self.changed.wait_timeout_while(self.lock(), length, |state| !state.stopping);
        let (state, _) = whole(waited);
        state.stopping
    }
}
