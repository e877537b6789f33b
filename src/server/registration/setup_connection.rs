//! One setup connection to a proxy: what is said on it, and what the answers mean.

use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::setup_answers::{Answer, Answers};
use super::{LEASE, LEAVE_LIMIT, Registration};
use crate::cli::escape::{Escaped, EscapedReason};
use crate::net::connection::{SEND_TIMEOUT, send_all};
use crate::net::endpoint::is_reached;
use crate::protocol::diagnose::Foreign;
use crate::protocol::{Code, Packet, Setup};

/// Renewals per lease: every second of 3 s, so that one that is late does no harm.
const RENEWALS: u32 = 3;

/// How long a proxy may take to answer a connection's first setup packet.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// How long connecting may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);

/// What is said of a proxy that is taken for one of the homework's.
const WITHOUT_LEASE: &str = "it is taken for one of the homework's, and this server serves on \
                             without a lease; if no message comes, try -strings";

/// How one setup connection came to its end.
pub(super) enum End {
    /// There was no proxy, or it went away: register again.
    Lost(Loss, String),
    /// The proxy grants leases: register with one.
    GrantsLeases,
    /// There is nothing more to do: registered without a lease, as far as can be known, with what is to be said
    /// of that; or the server leaves.
    Done(Option<String>),
    /// The proxy does not want this server.
    Refused(String),
}

/// In what way a proxy was lost. While it stays away each is said once: the system's reasons may
/// differ from one attempt to the next, as long as a network is down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Loss {
    /// The connection ended or broke.
    Ended,
    /// No connection was made.
    NotReached,
    /// The proxy has no room for this server.
    Refused,
    /// Something else listens there.
    NotAProxy,
}

/// What became of a lease on one setup connection.
#[derive(Debug, Default)]
pub(super) struct Tenure {
    /// It was said that the server is registered.
    pub(super) was_said: bool,
    /// It was renewed.
    pub(super) was_renewed: bool,
}

impl Registration {
    /// Makes one setup connection and registers on it: with a lease where the proxy is known to grant
    /// leases. Says in `tenure` what became of that.
    pub(super) fn register(&self, grants_leases: bool, tenure: &mut Tenure) -> End {
        if self.strings {
            self.connected(Shutdown::Both, |stream| self.register_only(stream))
        } else if grants_leases {
            self.connected(Shutdown::Write, |stream| self.hold_lease(stream, tenure))
        } else {
            self.connected(Shutdown::Both, |stream| self.introduce(stream))
        }
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
                let reason = self.proxy.not_reached(&error);
                return End::Lost(Loss::NotReached, reason);
            }
        };
        self.check_reachable(&stream);
        {
            let mut state = self.lock();
            if state.stopping {
                return End::Done(None);
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
        End::Done(None)
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

    fn register_only(&self, stream: &TcpStream) -> End {
        match send_all(stream, &self.setup.to_line_of_strings()) {
            Ok(()) => End::Done(Some(format!(
                "sent the setup packet to the reverse proxy at {}; with -strings no answer is waited for",
                self.proxy
            ))),
            Err(_) => self.lost(),
        }
    }

    fn introduce(&self, stream: &TcpStream) -> End {
        let sent = send_all(stream, &self.setup_with_lease(0));
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
            // It may be one of ours that is suspended, or has no place for us yet.
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
            Answer::End if was_silent => End::Done(None),
            Answer::End => End::Done(Some(format!(
                "the reverse proxy at {proxy} closed the connection without an answer; {WITHOUT_LEASE}"
            ))),
            answer => self.end_without_lease(&answer),
        }
    }

    /// Registers with a lease, and renews it until the connection's end.
    fn hold_lease(&self, stream: &TcpStream, tenure: &mut Tenure) -> End {
        let setup = self.setup_with_lease(LEASE);
        let mut answers = Answers::new(stream);
        let mut granted = None;
        loop {
            let sent = Instant::now();
            if send_all(stream, &setup).is_err() {
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
            tenure.was_renewed = granted.replace(lease).is_some();
            self.say_registered(lease, tenure);
            // Nothing is due before the next renewal but the connection's end.
            match answers.next(Some(sent + lease / RENEWALS)) {
                Answer::Nothing => {}
                _ => return self.lost(),
            }
        }
    }

    /// Says once that the server is registered: at once, or when the lease is renewed where the last
    /// one was not.
    fn say_registered(&self, lease: Duration, tenure: &mut Tenure) {
        let mut state = self.lock();
        let is_due = tenure.was_renewed || !state.flaps;
        state.flaps = !tenure.was_renewed;
        if tenure.was_said || !is_due {
            return;
        }
        tenure.was_said = true;
        let again = if std::mem::replace(&mut state.registered, true) { "again " } else { "" };
        drop(state);
        self.terminal.warn(format_args!(
            "registered {again}with the reverse proxy at {}, lease {} s",
            self.proxy,
            lease.as_secs()
        ));
    }

    /// The setup packet that asks for a lease of this many seconds.
    fn setup_with_lease(&self, seconds: u64) -> Vec<u8> {
        Packet::Setup(Setup { lease: Some(seconds), ..self.setup.clone() }).to_line()
    }

    /// What an answer means that grants no lease.
    fn end_without_lease(&self, answer: &Answer) -> End {
        let proxy = &self.proxy;
        match answer {
            Answer::Ack(_) => End::Done(Some(format!(
                "registered with the reverse proxy at {proxy}, which grants no lease"
            ))),
            Answer::OtherJson(text) => End::Done(Some(format!(
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
                let hint = Foreign::at(words.as_bytes()).hint();
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
