//! A server's registration with one proxy: made, held and made again.
//!
//! The server first introduces itself: it sends a setup packet that asks whether the proxy grants
//! leases, and ends its sending side, as the homework's servers do; a proxy that serves one
//! connection at a time is not held up. A proxy of ours answers, and then the server opens the
//! connection that holds its lease, renews it there, and registers again when it breaks. Any other
//! proxy has read a setup packet that it understands, and the registration stands.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::answers::{Answer, Answers};

use crate::cli::escape::{Escaped, EscapedReason};
use crate::cli::terminal::Terminal;
use crate::net::connection::{SEND_TIMEOUT, send_all};
use crate::net::endpoint::Endpoint;
use crate::protocol::diagnose::Foreign;
use crate::protocol::{Code, Packet, Setup};

/// The lease that is asked for, in seconds.
const LEASE: u64 = 3;

/// Renewals per lease: every second of 3 s, so that one that is late does no harm.
const RENEWALS: u32 = 3;

/// How long a proxy may take to answer a connection's first setup packet.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// How long connecting may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);

/// Pauses between attempts to reach a proxy.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LAST_PAUSE: Duration = Duration::from_secs(1);

/// How long a proxy may take to end the connection of a server that leaves. By then the lease has
/// run out.
pub const LEAVE_LIMIT: Duration = Duration::from_secs(LEASE);

/// What is said of a proxy that is taken for one of the homework's.
const WITHOUT_LEASE: &str = "it is taken for one of the homework's, and this server serves on \
                             without a lease; if no message comes, try -strings";

/// A server's registration with one proxy.
#[derive(Debug)]
pub struct Registration {
    proxy: Endpoint,
    manner: Manner,
    /// Where the server listens.
    listens: SocketAddr,
    terminal: Terminal,
    state: Mutex<State>,
    changed: Condvar,
}

/// How a server registers: its setup packets, each as one line.
#[derive(Debug)]
enum Manner {
    /// As the tutorial's server does: this packet is sent, and the connection closed.
    Tutorials(Vec<u8>),
    /// By an introduction, and then with a lease where the proxy grants one.
    Ours { introduction: Vec<u8>, with_lease: Vec<u8> },
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
    /// It has been registered with a lease before.
    registered: bool,
}

/// How one setup connection came to its end.
enum End {
    /// There was no proxy, or it went away: register again.
    Lost(Loss, String),
    /// The proxy grants leases: register with one.
    GrantsLeases,
    /// Registered without a lease, as far as can be known, which this tells.
    Registered(Option<String>),
    /// The proxy does not want this server.
    Refused(String),
    /// The server leaves.
    Stopped,
}

/// In what way a proxy was lost. While it stays away each is said once: the system's reasons may
/// differ from one attempt to the next, as long as a network is down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Loss {
    /// The connection ended or broke.
    Ended,
    /// No connection was made.
    NotReached,
    /// The proxy has no room for this server.
    Refused,
    /// Something else listens there.
    NotAProxy,
}

impl Registration {
    /// A registration with `proxy` by the packet `setup`, not yet made, of a server that `listens`
    /// there; with `strings`, as the tutorial's server registers.
    pub fn new(
        proxy: Endpoint,
        setup: &Setup<'_>,
        listens: SocketAddr,
        strings: bool,
        terminal: Terminal,
    ) -> Arc<Self> {
        let with_lease =
            |seconds| Packet::Setup(Setup { lease: Some(seconds), ..setup.clone() }).to_line();
        let manner = if strings {
            Manner::Tutorials(setup.to_line_of_strings())
        } else {
            Manner::Ours { introduction: with_lease(0), with_lease: with_lease(LEASE) }
        };
        let (state, changed) = Default::default();
        Arc::new(Registration { proxy, manner, listens, terminal, state, changed })
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
            // It fails where the proxy has just gone, and with it the lease.
            let _ = stream.shutdown(*side);
        }
    }

    /// Waits until the proxy has seen that the server leaves, but not longer than `until`.
    pub fn wait_until_left(&self, until: Instant) {
        let left = until.saturating_duration_since(Instant::now());
        drop(self.changed.wait_timeout_while(self.lock(), left, |state| !state.ended));
    }

    /// Each of the fields is set in one step.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn register_again_and_again(&self) -> Result<(), String> {
        let mut pause = FIRST_PAUSE;
        let mut said: Vec<Loss> = Vec::new();
        // Once a proxy has granted a lease, no silence makes it one of the homework's.
        let mut grants_leases = false;
        loop {
            let mut granted = None;
            let end = match &self.manner {
                Manner::Tutorials(setup) => {
                    self.connected(Shutdown::Both, |stream| self.register_only(stream, setup))
                }
                Manner::Ours { with_lease, .. } if grants_leases => self
                    .connected(Shutdown::Write, |stream| {
                        self.hold_lease(stream, with_lease, &mut granted)
                    }),
                Manner::Ours { introduction, .. } => {
                    self.connected(Shutdown::Both, |stream| self.introduce(stream, introduction))
                }
            };
            match end {
                End::Stopped | End::Registered(None) => return Ok(()),
                End::Registered(Some(how)) => {
                    self.terminal.warn(format_args!("{how}"));
                    return Ok(());
                }
                End::Refused(reason) => return Err(reason),
                End::GrantsLeases => {
                    grants_leases = true;
                    continue;
                }
                End::Lost(loss, reason) => {
                    if granted.is_some() {
                        pause = FIRST_PAUSE;
                        said.clear();
                    }
                    if !said.contains(&loss) {
                        self.terminal
                            .warn(format_args!("{reason}; trying again until it is there"));
                        said.push(loss);
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

    /// Connects to the proxy, and has `register` do its part on the connection. A server that leaves
    /// meanwhile ends this side of it.
    fn connected(&self, side: Shutdown, register: impl FnOnce(&TcpStream) -> End) -> End {
        let connected = self.proxy.connect(CONNECT_TIMEOUT).and_then(|stream| {
            stream.set_nodelay(true)?;
            stream.set_write_timeout(Some(SEND_TIMEOUT))?;
            Ok(Arc::new(stream))
        });
        let stream = match connected {
            Ok(stream) => stream,
            Err(error) => {
                let reason = self.proxy.not_reached("the reverse proxy", &error);
                return End::Lost(Loss::NotReached, reason);
            }
        };
        self.check_reachable(&stream);
        {
            let mut state = self.lock();
            if state.stopping {
                return End::Stopped;
            }
            state.open = Some((Arc::clone(&stream), side));
        }
        let end = register(&stream);
        {
            let mut state = self.lock();
            if !state.stopping {
                state.open = None;
                return end;
            }
        }
        Answers::new(&stream).wait_for_end(Instant::now() + LEAVE_LIMIT);
        End::Stopped
    }

    /// Says once that the proxy will not reach this server: it connects to the address that the
    /// setup packet comes from.
    fn check_reachable(&self, stream: &TcpStream) {
        let Ok(source) = stream.local_addr().map(|source| source.ip().to_canonical()) else {
            return;
        };
        let listens = self.listens;
        if !is_reached(listens.ip(), source)
            && !std::mem::replace(&mut self.lock().unreachable, true)
        {
            let every = if source.is_ipv4() { "0.0.0.0" } else { "::" };
            self.terminal.warn(format_args!(
                "the reverse proxy at {} will not reach this server: it connects to {source}, and the \
                 server listens on {} only; start it with -host {source}, or -host {every} for all \
                 addresses",
                self.proxy,
                listens.ip()
            ));
        }
    }

    fn register_only(&self, stream: &TcpStream, setup: &[u8]) -> End {
        match send_all(stream, setup, SEND_TIMEOUT) {
            Ok(()) => End::Registered(Some(format!(
                "sent the setup packet to the reverse proxy at {}; with -strings no answer is waited for",
                self.proxy
            ))),
            Err(_) => self.lost(),
        }
    }

    fn introduce(&self, stream: &TcpStream, setup: &[u8]) -> End {
        let sent = send_all(stream, setup, SEND_TIMEOUT);
        if sent.and_then(|()| stream.shutdown(Shutdown::Write)).is_err() {
            return self.lost();
        }
        let proxy = &self.proxy;
        let mut answers = Answers::new(stream);
        let mut answer = answers.next(Some(Instant::now() + ANSWER_TIMEOUT));
        let was_silent = matches!(answer, Answer::Nothing);
        if was_silent {
            self.terminal.warn(format_args!(
                "the reverse proxy at {proxy} did not answer within {} s; {WITHOUT_LEASE}",
                ANSWER_TIMEOUT.as_secs()
            ));
            // It may be one of ours that stands still, or has no place for us yet.
            answer = answers.next(None);
        }
        match answer {
            Answer::Ack(Some(1..)) => {
                if was_silent {
                    self.terminal.warn(format_args!(
                        "the reverse proxy at {proxy} has answered: it grants leases"
                    ));
                }
                End::GrantsLeases
            }
            Answer::End if was_silent => End::Registered(None),
            Answer::End => End::Registered(Some(format!(
                "the reverse proxy at {proxy} closed the connection without an answer; {WITHOUT_LEASE}"
            ))),
            answer => self.end_without_lease(&answer),
        }
    }

    /// Registers with a lease, says in `granted` how long it is, and renews it until the
    /// connection's end.
    fn hold_lease(&self, stream: &TcpStream, setup: &[u8], granted: &mut Option<Duration>) -> End {
        let mut answers = Answers::new(stream);
        loop {
            let sent = Instant::now();
            if send_all(stream, setup, SEND_TIMEOUT).is_err() {
                return self.lost();
            }
            let lease = match answers.next(Some(sent + granted.unwrap_or(ANSWER_TIMEOUT))) {
                // Longer than was asked for would be longer than this server wants to be missed.
                Answer::Ack(Some(seconds @ 1..)) => Duration::from_secs(seconds.min(LEASE)),
                answer if granted.is_none() || matches!(answer, Answer::Refusal { .. }) => {
                    return self.end_without_lease(&answer);
                }
                _ => return self.lost(),
            };
            if granted.replace(lease).is_none() {
                let again = std::mem::replace(&mut self.lock().registered, true);
                self.terminal.warn(format_args!(
                    "registered {}with the reverse proxy at {}, lease {} s",
                    if again { "again " } else { "" },
                    self.proxy,
                    lease.as_secs()
                ));
            }
            // Nothing is due before the next renewal but the connection's end.
            match answers.next(Some(sent + lease / RENEWALS)) {
                Answer::Nothing => {}
                _ => return self.lost(),
            }
        }
    }

    /// What an answer means that grants no lease.
    fn end_without_lease(&self, answer: &Answer) -> End {
        let proxy = &self.proxy;
        match answer {
            Answer::Ack(_) => End::Registered(Some(format!(
                "registered with the reverse proxy at {proxy}, which grants no lease"
            ))),
            Answer::OtherJson(text) => End::Registered(Some(format!(
                "the reverse proxy at {proxy} did not answer with an ack, but with {}; {WITHOUT_LEASE}",
                Escaped(text)
            ))),
            Answer::Refusal { code, reason } => {
                let reason = format!(
                    "the reverse proxy at {proxy} refused the registration ({}): {}",
                    Escaped(code),
                    EscapedReason(reason)
                );
                // A full table may have room again.
                if code == Code::Overloaded.name() {
                    End::Lost(Loss::Refused, reason)
                } else {
                    End::Refused(reason)
                }
            }
            Answer::NotJson(words) => {
                let hint = match Foreign::at(words.as_bytes()) {
                    Foreign::Http => " (is that the port of its -status page?)",
                    _ => "",
                };
                let reason = format!(
                    "what listens at {proxy} is no reverse proxy: it says \"{}\"{hint}",
                    Escaped(words)
                );
                End::Lost(Loss::NotAProxy, reason)
            }
            Answer::End | Answer::Nothing | Answer::Broken => self.lost(),
        }
    }

    fn lost(&self) -> End {
        End::Lost(Loss::Ended, format!("lost the reverse proxy at {}", self.proxy))
    }
}

/// Whether a connection to `address` reaches a socket that `listens` there.
fn is_reached(listens: IpAddr, address: IpAddr) -> bool {
    match listens.to_canonical() {
        // On Linux one socket takes both families, unless told otherwise.
        IpAddr::V6(every) if every.is_unspecified() => true,
        IpAddr::V4(every) if every.is_unspecified() => address.is_ipv4(),
        one => one == address,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_is_reached_where_it_listens() {
        let reached = |listens: &str, address: &str| {
            is_reached(listens.parse().unwrap(), address.parse().unwrap())
        };
        for (listens, address) in [
            ("127.0.0.1", "127.0.0.1"),
            ("0.0.0.0", "192.0.2.1"),
            ("::", "192.0.2.1"),
            ("::", "fe80::1"),
            ("::ffff:192.0.2.1", "192.0.2.1"),
        ] {
            assert!(reached(listens, address), "{listens} {address}");
        }
        for (listens, address) in [
            ("127.0.0.1", "192.0.2.1"),
            ("127.0.0.1", "::1"),
            ("0.0.0.0", "::1"),
            ("::1", "127.0.0.1"),
            ("192.0.2.1", "192.0.2.2"),
        ] {
            assert!(!reached(listens, address), "{listens} {address}");
        }
    }
}
