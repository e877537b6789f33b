//! One setup connection to a proxy: what is said on it, and what the answers mean.

use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::de::IgnoredAny;

use super::{LEASE, LEAVE_LIMIT, Registration};
use crate::cli::escape::{Escaped, EscapedReason};
use crate::net::connection::{Connection, ReadTimeout, ReceiveError};
use crate::net::endpoint::is_reached;
use crate::protocol::diagnose::Foreign;
use crate::protocol::{Code, Packet, Setup};

/// Renewals per lease: every second of 3 s, so that one that is late does no harm.
const RENEWALS: u32 = 3;

/// How long a proxy may take to answer a connection's first setup packet.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// The longest answer to a setup packet, in bytes: far more than any proxy's.
const MAX_ANSWER: usize = 64 << 10;

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
    /// There is nothing more to do: registered without a lease, as far as can be known, with what is to be
    /// said of that; or the server leaves.
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

/// What came from a proxy after a setup packet. A proxy that is not ours may send anything.
#[derive(Debug, PartialEq, Eq)]
enum Answer {
    /// An ack, with the seconds of the lease that it grants.
    Ack(Option<u64>),
    /// A refusal.
    Refusal { code: String, reason: String },
    /// JSON that is neither.
    OtherJson(String),
    /// No JSON, by its first line.
    NotJson(String),
    /// The end of the connection.
    End,
    /// Nothing whole in time.
    Nothing,
    /// The connection broke, or ended inside an answer, or there is no end to it.
    Broken,
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
            self.connected(Shutdown::Both, |connection| self.register_only(connection))
        } else if grants_leases {
            self.connected(Shutdown::Write, |connection| self.hold_lease(connection, tenure))
        } else {
            self.connected(Shutdown::Both, |connection| self.introduce(connection))
        }
    }

    /// Connects to the proxy, and has `register` do its part on the connection. A server that leaves
    /// meanwhile ends this side of it.
    fn connected(&self, side: Shutdown, register: impl FnOnce(&mut Connection) -> End) -> End {
        let connected = self.proxy.connect(CONNECT_TIMEOUT);
        let mut connection =
            match connected.and_then(|stream| Connection::from_connected(stream, MAX_ANSWER)) {
                Ok(connection) => connection,
                Err(error) => return End::Lost(Loss::NotReached, self.proxy.not_reached(&error)),
            };
        self.check_reachable(connection.stream());
        {
            let mut state = self.lock();
            if state.stopping {
                return End::Done(None);
            }
            state.open = Some((Arc::clone(connection.stream()), side));
        }
        let end = register(&mut connection);
        {
            let mut state = self.lock();
            if !state.stopping {
                state.open = None;
                return end;
            }
        }
        connection.drain(LEAVE_LIMIT, Instant::now() + LEAVE_LIMIT);
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

    fn register_only(&self, connection: &Connection) -> End {
        match connection.send(&self.setup.to_line_of_strings()) {
            Ok(()) => End::Done(Some(format!(
                "sent the setup packet to the reverse proxy at {}; with -strings no answer is waited for",
                self.proxy
            ))),
            Err(_) => self.lost(),
        }
    }

    fn introduce(&self, connection: &mut Connection) -> End {
        let sent = connection.send(&self.setup_with_lease(0));
        if sent.and_then(|()| connection.stream().shutdown(Shutdown::Write)).is_err() {
            return self.lost();
        }
        let proxy = &self.proxy;
        let mut answer = next_answer(connection, Instant::now() + ANSWER_TIMEOUT);
        let was_silent = answer == Answer::Nothing;
        if was_silent {
            self.terminal.warn(format_args!(
                "the reverse proxy at {proxy} did not answer within {} s; {WITHOUT_LEASE}",
                ANSWER_TIMEOUT.as_secs()
            ));
            // It may be one of ours that is suspended, or has no place for us yet.
            while answer == Answer::Nothing {
                answer = next_answer(connection, Instant::now() + ANSWER_TIMEOUT);
            }
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
    fn hold_lease(&self, connection: &mut Connection, tenure: &mut Tenure) -> End {
        let setup = self.setup_with_lease(LEASE);
        let mut granted = None;
        loop {
            let sent = Instant::now();
            if connection.send(&setup).is_err() {
                return self.lost();
            }
            let lease = match next_answer(connection, sent + granted.unwrap_or(ANSWER_TIMEOUT)) {
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
            match next_answer(connection, sent + lease / RENEWALS) {
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

/// Waits until then for the next answer.
fn next_answer(connection: &mut Connection, until: Instant) -> Answer {
    let lossy = |text: &[u8]| String::from_utf8_lossy(text.trim_ascii()).into_owned();
    let first_line = |text: &[u8]| lossy(text.split(|byte| *byte == b'\n').next().unwrap_or(text));
    loop {
        return match connection.receive(ReadTimeout::Until(until)) {
            Ok(Some(packet)) => match Packet::parse(packet) {
                Ok(Packet::Ack(ack)) => Answer::Ack(ack.lease),
                Ok(Packet::Refusal(refusal)) => Answer::Refusal {
                    code: refusal.code.into_owned(),
                    reason: refusal.reason.into_owned(),
                },
                Err(error) if !error.is_json => Answer::NotJson(first_line(packet)),
                _ => Answer::OtherJson(lossy(packet)),
            },
            Ok(None) => Answer::End,
            Err(ReceiveError::Idle | ReceiveError::Slow(_)) => Answer::Nothing,
            Err(ReceiveError::NotAnObject(_)) => {
                let text = connection.unconsumed();
                match serde_json::from_slice::<IgnoredAny>(text) {
                    Ok(_) => Answer::OtherJson(lossy(text)),
                    // The rest of it may come yet.
                    Err(error) if error.is_eof() && text.len() < MAX_ANSWER => continue,
                    Err(_) => Answer::NotJson(first_line(text)),
                }
            }
            Err(_) => Answer::Broken,
        };
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::net::TcpListener;

    use super::*;

    /// What a proxy that sends these bytes and goes is taken to have answered.
    fn answers(bytes: &[u8]) -> [Answer; 2] {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let mut connection = Connection::from_connected(stream, MAX_ANSWER).unwrap();
        listener.accept().unwrap().0.write_all(bytes).unwrap();
        [(); 2].map(|()| next_answer(&mut connection, Instant::now() + Duration::from_secs(20)))
    }

    fn only(bytes: &[u8]) -> Answer {
        let [answer, end] = answers(bytes);
        assert_eq!(end, Answer::End, "after {answer:?}");
        answer
    }

    #[test]
    fn an_ack_says_what_lease_it_grants() {
        for (lease, expected) in
            [("", None), (",\"lease\":60", Some(60)), (",\"lease\":0", Some(0))]
        {
            let ack = format!(r#"{{"type":2,"srcid":0,"destid":1,"payload":"registered"{lease}}}"#);
            for before in ["", " \n", "\u{feff}"] {
                assert_eq!(only(format!("{before}{ack}").as_bytes()), Answer::Ack(expected));
            }
            assert_eq!(answers(&ack.as_bytes()[..ack.len() - 1])[0], Answer::Broken);
            let two = ack.clone() + &ack;
            assert_eq!(answers(two.as_bytes()), [(); 2].map(|()| Answer::Ack(expected)));
        }
    }

    #[test]
    fn json_that_is_no_packet_is_an_answer_too() {
        for text in [r#"{"Error": "no"}"#, r#"{"type": 0}"#, "[]", "\"ok\"", "null", "true", "1"] {
            assert_eq!(answers(text.as_bytes())[0], Answer::OtherJson(text.to_owned()));
        }
        let refusal = br#"{"type":3,"destid":1,"payload":"why","code":"id-in-use"}"#;
        let (code, reason) = ("id-in-use".to_owned(), "why".to_owned());
        assert_eq!(only(refusal), Answer::Refusal { code, reason });
    }

    #[test]
    fn what_is_no_json_is_told_by_its_first_line() {
        for (bytes, words) in [
            (&b"HTTP/1.1 400 Bad Request\r\nServer: x\r\n\r\n"[..], "HTTP/1.1 400 Bad Request"),
            (b"SSH-2.0-OpenSSH_9.6\r\n", "SSH-2.0-OpenSSH_9.6"),
            (b"220 mail.example.net ESMTP\r\n", "220 mail.example.net ESMTP"),
            (b"\n nobody \n", "nobody"),
            (b"\x15\x03\x01\x00\x02\x02\x16", "\u{15}\u{3}\u{1}\u{0}\u{2}\u{2}\u{16}"),
            (b"\xff", "\u{fffd}"),
            (b"{\"a\":\"\xff\"}", "{\"a\":\"\u{fffd}\"}"),
            (b"{no JSON,\n either}", "{no JSON,"),
        ] {
            assert_eq!(answers(bytes)[0], Answer::NotJson(words.to_owned()));
        }
        let endless = [b"{\"a\":\"".as_slice(), &[b'x'; MAX_ANSWER]].concat();
        assert_eq!(answers(&endless)[0], Answer::Broken);
    }

    #[test]
    fn json_that_comes_in_pieces_is_waited_for() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let mut connection = Connection::from_connected(stream, MAX_ANSWER).unwrap();
        let mut peer = listener.accept().unwrap().0;
        peer.write_all(b"[1").unwrap();
        let soon = Instant::now() + Duration::from_millis(50);
        assert_eq!(next_answer(&mut connection, soon), Answer::Nothing);
        peer.write_all(b"]").unwrap();
        let later = Instant::now() + Duration::from_secs(20);
        assert_eq!(next_answer(&mut connection, later), Answer::OtherJson("[1]".to_owned()));
    }
}
