//! A server's registration with one proxy: made, held and made again.
//!
//! A proxy of ours grants a lease: the setup connection stays open, the registration is renewed on
//! it, and when it breaks the server registers anew, with growing pauses, until it succeeds. A
//! proxy that answers with no lease is one of the homework's, which serve nobody else while the
//! setup connection is open: it is closed, and the registration stands.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::net::{Shutdown, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::cli::escape::{Escaped, EscapedReason};
use crate::cli::terminal::Terminal;
use crate::net::connection::{Connection, DEFAULT_MAX_PACKET, ReadTimeout, ReceiveError};
use crate::net::endpoint::Endpoint;
use crate::protocol::{Code, Packet, Refusal};

/// The lease that is asked for, in seconds.
pub const LEASE: u64 = 8;

/// Renewals per lease, so that one that is late does no harm: every 2.5 s of 8 s.
const RENEWALS: f64 = 3.2;

/// How long a proxy may take to answer a setup packet before it is taken for one of the homework's.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(1);

/// How long connecting may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);

/// A proxy that has granted a lease may be killed, or stand still, before it answers: so many times
/// in a row it is asked again before it is taken for one of the homework's.
const UNANSWERED: u32 = 10;

/// Pauses between attempts to reach a proxy.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LAST_PAUSE: Duration = Duration::from_secs(1);

/// An attempt that came to its end only after this long had got a lease: nothing else in it takes
/// that long.
const LONG: Duration = Duration::from_secs(3);

/// How long a proxy may take to see that the server leaves.
const LEAVE_LIMIT: Duration = Duration::from_secs(1);

/// A server's registration with one proxy.
#[derive(Debug)]
pub struct Registration {
    proxy: Endpoint,
    /// The setup packet, as one line.
    setup: Vec<u8>,
    terminal: Terminal,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// The setup connection while a lease is held through it.
    held: Option<Arc<TcpStream>>,
    stopping: bool,
    /// The thread that holds the registration has ended.
    ended: bool,
}

/// How one setup connection came to its end.
enum End {
    /// There was no proxy, or it went away: register again.
    Lost(String),
    /// The proxy knows no lease.
    NoLease,
    /// The proxy does not want this server.
    Refused(String),
    /// The server leaves.
    Stopped,
}

impl Registration {
    /// A registration with `proxy` by the packet `setup`, not yet made.
    pub fn new(proxy: Endpoint, setup: Vec<u8>, terminal: Terminal) -> Arc<Self> {
        let (state, changed) = Default::default();
        Arc::new(Registration { proxy, setup, terminal, state, changed })
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

    /// Gives up the lease, and waits a moment until the proxy has seen it.
    pub fn leave(&self) {
        let mut state = self.lock();
        state.stopping = true;
        self.changed.notify_all();
        if let Some(stream) = &state.held {
            // The proxy takes this server out of its table when it sees the end, and then closes
            // its own side.
            let _ = stream.shutdown(Shutdown::Write);
        }
        drop(self.changed.wait_timeout_while(state, LEAVE_LIMIT, |state| !state.ended));
    }

    /// Each of the fields is set in one step.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn register_again_and_again(&self) -> Result<(), String> {
        let mut pause = FIRST_PAUSE;
        let mut last_reason = String::new();
        let mut unanswered = UNANSWERED;
        loop {
            let begun = Instant::now();
            match self.register_once(&mut unanswered) {
                End::Stopped => return Ok(()),
                End::NoLease => {
                    self.terminal.warn(format_args!(
                        "the reverse proxy at {} grants no lease; registered without one",
                        self.proxy
                    ));
                    return Ok(());
                }
                End::Refused(reason) => return Err(reason),
                End::Lost(reason) => {
                    if begun.elapsed() > LONG {
                        pause = FIRST_PAUSE;
                        last_reason.clear();
                    }
                    if last_reason != reason {
                        self.terminal
                            .warn(format_args!("{reason}; trying again until it is there"));
                        last_reason = reason;
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
        let (state, _) = self
            .changed
            .wait_timeout_while(self.lock(), length, |state| !state.stopping)
            .unwrap_or_else(PoisonError::into_inner);
        state.stopping
    }

    fn register_once(&self, unanswered: &mut u32) -> End {
        let connected = self
            .proxy
            .connect(CONNECT_TIMEOUT)
            .and_then(|stream| Connection::from_connected(stream, DEFAULT_MAX_PACKET));
        let mut connection = match connected {
            Ok(connection) => connection,
            Err(error) => return End::Lost(self.proxy.not_reached("the reverse proxy", &error)),
        };
        {
            let mut state = self.lock();
            if state.stopping {
                return End::Stopped;
            }
            state.held = Some(Arc::clone(connection.stream()));
        }
        let end = self.renew_until_the_end(&mut connection, unanswered);
        let mut state = self.lock();
        state.held = None;
        if state.stopping { End::Stopped } else { end }
    }

    /// `unanswered` counts how often the proxy gave no answer since it granted a lease.
    fn renew_until_the_end(&self, connection: &mut Connection, unanswered: &mut u32) -> End {
        let mut granted: Option<Duration> = None;
        loop {
            if connection.send(&self.setup).is_err() {
                return self.lost();
            }
            let limit = granted.unwrap_or(ANSWER_TIMEOUT);
            let answer = connection.receive(ReadTimeout::Until(Instant::now() + limit));
            let parsed = answer.map(|packet| packet.map(Packet::parse));
            let seconds = match parsed {
                Ok(Some(Ok(Packet::Ack(ack)))) => ack.lease,
                Ok(Some(Ok(Packet::Refusal(refusal)))) => return self.refused(&refusal),
                // One of the homework's has read the packet before it closes.
                Err(ReceiveError::Io(_)) => return self.lost(),
                _ if *unanswered < UNANSWERED => {
                    *unanswered += 1;
                    return self.lost();
                }
                _ => None,
            };
            let Some(seconds) = seconds else { return End::NoLease };
            // Longer than was asked for would be longer than this server wants to be missed.
            let length = Duration::from_secs(seconds.clamp(1, LEASE));
            (granted, *unanswered) = (Some(length), 0);
            // Nothing is due on this connection before the next renewal but its end.
            match connection.wait(ReadTimeout::Until(Instant::now() + length.div_f64(RENEWALS))) {
                Err(ReceiveError::Idle) => {}
                _ => return self.lost(),
            }
        }
    }

    fn lost(&self) -> End {
        End::Lost(format!("lost the reverse proxy at {}", self.proxy))
    }

    fn refused(&self, refusal: &Refusal<'_>) -> End {
        let reason = format!(
            "the reverse proxy at {} refused the registration ({}): {}",
            self.proxy,
            Escaped(&refusal.code),
            EscapedReason(&refusal.reason)
        );
        // A full table may have room again.
        if refusal.code == Code::Overloaded.name() {
            End::Lost(reason)
        } else {
            End::Refused(reason)
        }
    }
}
