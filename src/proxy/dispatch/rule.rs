//! What each failed attempt means, in one table. `retry` adds two conditions: `-tries`, and the wait for a
//! restart.

use std::fmt;
use std::time::Duration;

use crate::cli::escape::Escaped;
use crate::protocol::Code;
use crate::proxy::stats::FailureKind;
use crate::proxy::table::Failure;

/// Why an attempt to deliver a message failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AttemptError {
    /// The connection was refused, or not made in time. Nothing was sent.
    Unreachable(String),
    /// The proxy lacks what a connection takes, such as a descriptor. Nothing was sent.
    OutOfResources(String),
    /// It was in the server's queue until its time there ended, or until the server failed. Nothing was sent.
    QueueTimeout,
    /// The server was removed from the table: its lease ran out, its setup connection closed, or another
    /// registration took its place.
    Removed,
    /// The connection ended before the whole ack came.
    ConnectionClosed {
        /// What happened.
        reason: String,
        /// The connection was reused: it had acked or refused earlier messages.
        was_reused: bool,
    },
    /// The connection was closed because of another message on it, or an unsolicited answer.
    Behind,
    /// No ack came in this time, or the message could not be sent in time.
    Timeout(Duration),
    /// The answer is not an ack for this message.
    BadAck(String),
    /// The ack is longer than the proxy takes.
    AckTooLarge(String),
    /// The ack is long, and the memory budget for long packets is used up.
    NoMemory,
    /// The server refused the message.
    Refused {
        /// Its code, if the protocol knows it.
        code: Option<Code>,
        /// The reason that it gave, escaped.
        reason: String,
        /// The refusal as it came.
        packet: Vec<u8>,
    },
}

/// The other inputs of the rule.
#[derive(Debug, Clone, Copy)]
pub(super) struct Situation {
    /// The server has no lease and registered a moment ago: it may not listen yet.
    pub is_starting: bool,
    /// The message was already resent to this server after a reused connection was closed.
    pub was_resent: bool,
    /// Some of the message may have been sent.
    pub sent: bool,
    /// It must be carried out at most once.
    pub once: bool,
    /// Its time is over.
    pub is_late: bool,
    /// The server has a lease and may still be at work: it has a capacity, or the client asked for less
    /// than the usual time.
    pub may_be_at_work: bool,
    /// A timeout counts against the server only if it lasted about this long (see `NEARLY_ALL`).
    pub reply_timeout: Duration,
}

/// What an attempt that failed means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Verdict {
    /// The failure that counts against the server, if any.
    pub blamed: Option<Failure>,
    /// It counts against `-tries`.
    pub is_try: bool,
    /// What becomes of the message.
    pub next: Next,
}

/// What becomes of a message after an attempt that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    /// It goes to a server that has not failed it, e.g. after a lost connection.
    Another,
    /// Like `Another`, but if there is none, to the same server after a pause, e.g. one that does not listen
    /// yet.
    AnotherOrLater,
    /// Like `Another`, but if there is none, to the same server at once, e.g. after a wait in its queue.
    AnotherOrSame,
    /// To any server that has not failed it, which may be the same one: the fault was not the server's.
    Any,
    /// To the same server: it had closed a reused connection.
    Same,
    /// Its client gets the server's own refusal.
    PassRefusal,
    /// Its client gets a refusal of ours.
    Refuse,
    /// Its client is told that it may have been carried out.
    RefuseUnknown,
}

impl Next {
    /// Whether the message never goes to this server again.
    pub fn leaves_server(self) -> bool {
        matches!(self, Next::Another | Next::PassRefusal | Next::Refuse | Next::RefuseUnknown)
    }
}

/// A timeout counts against the server from this fraction of `reply_timeout` on. It is below 1 because with
/// the defaults the first of two servers gets half of the time that is left of 10 s: a little less than 5 s.
const NEARLY_ALL: f64 = 0.9;

/// The rule, line by line.
#[rustfmt::skip]
pub(super) fn rule(error: &AttemptError, situation: Situation) -> Verdict {
    use AttemptError::*;
    let Situation {
        is_starting, was_resent, sent, once, is_late, may_be_at_work, reply_timeout,
    } = situation;
    let unreachable = Some(Failure::Unreachable);
    let may_be_chance = Some(Failure::MayBeChance);
    let (blamed, is_try, next) = match error {
        // what happened                                                blamed         a try  what becomes of it
        Unreachable(_) if is_starting                               => (None,          false, Next::AnotherOrLater),
        Unreachable(_)                                              => (unreachable,   false, Next::Another),
        OutOfResources(_)                                           => (None,          false, Next::AnotherOrLater),
        QueueTimeout                                                => (None,          false, Next::AnotherOrSame),
        Removed                                                     => (None,          false, Next::Another),
        Behind                                                      => (None,          false, Next::Any),
        ConnectionClosed { was_reused, .. } if *was_reused && !was_resent
                                                                    => (None,          false, Next::Same),
        ConnectionClosed { .. }                                     => (may_be_chance, true,  Next::Another),
        Timeout(_) if !sent                                         => (None,          false, Next::Any),
        Timeout(waited) if *waited >= reply_timeout.mul_f64(NEARLY_ALL) && !may_be_at_work
                                                                    => (may_be_chance, true,  Next::Another),
        Timeout(_)                                                  => (None,          true,  Next::Another),
        BadAck(_)                                                   => (may_be_chance, true,  Next::Another),
        AckTooLarge(_)                                              => (None,          true,  Next::Refuse),
        NoMemory                                                    => (None,          true,  Next::Refuse),
        Refused { code: Some(Code::Overloaded), .. }                => (None,          true,  Next::Another),
        Refused { .. }                                              => (None,          true,  Next::PassRefusal),
    };
    // After a server's refusal the message was not carried out. After an ack that is too large it was, and a
    // client does not repeat on `too-large`. After any other failure it may have been.
    let is_unknown = once && sent && !matches!(error, Refused { .. } | AckTooLarge(_));
    let next = match next {
        _ if is_unknown => Next::RefuseUnknown,
        Next::PassRefusal => next,
        _ if is_late => Next::Refuse,
        _ => next,
    };
    Verdict { blamed, is_try, next }
}

impl AttemptError {
    /// The server closed the connection.
    pub fn closed(was_reused: bool) -> Self {
        let reason = "closed the connection without an ack".to_owned();
        AttemptError::ConnectionClosed { reason, was_reused }
    }

    /// Whether a server with a lease may just be restarting.
    pub fn may_be_restart(&self) -> bool {
        use AttemptError::*;
        matches!(self, Unreachable(_) | Removed | Behind | ConnectionClosed { .. })
    }

    /// The code of a refusal for this reason.
    pub fn code(&self) -> Code {
        match self {
            AttemptError::Unreachable(_)
            | AttemptError::ConnectionClosed { .. }
            | AttemptError::Behind
            | AttemptError::Removed => Code::Unreachable,
            AttemptError::Timeout(_) => Code::Timeout,
            AttemptError::BadAck(_) => Code::BadAck,
            AttemptError::AckTooLarge(_) => Code::TooLarge,
            AttemptError::OutOfResources(_)
            | AttemptError::NoMemory
            | AttemptError::QueueTimeout => Code::Overloaded,
            AttemptError::Refused { code, .. } => code.unwrap_or(Code::Failed),
        }
    }

    /// The kind under which this failure is counted.
    pub fn kind(&self) -> FailureKind {
        match self {
            AttemptError::Unreachable(_) => FailureKind::Unreachable,
            AttemptError::Timeout(_) => FailureKind::Timeout,
            AttemptError::BadAck(_) => FailureKind::BadAck,
            _ => FailureKind::Broken,
        }
    }
}

impl fmt::Display for AttemptError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            AttemptError::Unreachable(what)
            | AttemptError::ConnectionClosed { reason: what, .. } => f.write_str(what),
            AttemptError::OutOfResources(what) => {
                write!(f, "the proxy could not open a connection: {what}")
            }
            AttemptError::QueueTimeout => f.write_str("busy with other messages"),
            AttemptError::Removed => f.write_str("left before it had answered"),
            AttemptError::Behind => {
                f.write_str("the connection was closed because of another message on it")
            }
            AttemptError::Timeout(time) => {
                write!(f, "no ack within {} s", (time.as_secs_f64() * 1e3).round() / 1e3)
            }
            AttemptError::BadAck(what) => {
                write!(f, "answered with no ack for this message: {what}")
            }
            AttemptError::AckTooLarge(what) => write!(f, "its ack is too long: {what}"),
            AttemptError::NoMemory => f.write_str(
                "acked, but too little is left of the memory for long packets (-max-memory)",
            ),
            AttemptError::Refused { reason, .. } => {
                write!(f, "refused the message: {}", Escaped(reason))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::AttemptError::*;
    use super::*;

    const REPLY_TIMEOUT: Duration = Duration::from_secs(5);

    /// Nothing special, and something was sent.
    const USUAL: Situation = Situation {
        is_starting: false,
        was_resent: false,
        sent: true,
        once: false,
        is_late: false,
        may_be_at_work: false,
        reply_timeout: REPLY_TIMEOUT,
    };
    const UNSENT: Situation = Situation { sent: false, ..USUAL };
    const STARTING: Situation = Situation { is_starting: true, ..UNSENT };
    const RESENT: Situation = Situation { was_resent: true, ..USUAL };
    const ONCE: Situation = Situation { once: true, ..USUAL };
    const AT_WORK: Situation = Situation { may_be_at_work: true, ..USUAL };
    const LATE: Situation = Situation { is_late: true, ..USUAL };
    const LATE_UNSENT: Situation = Situation { is_late: true, ..UNSENT };
    const LATE_STARTING: Situation = Situation { is_late: true, ..STARTING };
    const LATE_ONCE: Situation = Situation { is_late: true, ..ONCE };
    const ONCE_UNSENT: Situation = Situation { once: true, ..UNSENT };
    const ONCE_STARTING: Situation = Situation { once: true, ..STARTING };

    fn unreachable() -> AttemptError {
        Unreachable("refused".to_owned())
    }

    fn no_resources() -> AttemptError {
        OutOfResources("no descriptor".to_owned())
    }

    fn bad_ack() -> AttemptError {
        BadAck("of another type".to_owned())
    }

    fn ack_too_large() -> AttemptError {
        AckTooLarge("2 MiB".to_owned())
    }

    fn refused(code: Option<Code>) -> AttemptError {
        Refused { code, reason: "its reason".to_owned(), packet: Vec::new() }
    }

    #[test]
    #[rustfmt::skip]
    fn each_failure_has_its_consequences() {
        const UNREACHABLE: Option<Failure> = Some(Failure::Unreachable);
        const CHANCE: Option<Failure> = Some(Failure::MayBeChance);
        const LONG: AttemptError = Timeout(REPLY_TIMEOUT);
        const NEARLY_LONG: AttemptError = Timeout(Duration::from_millis(4990));
        const SHORT: AttemptError = Timeout(Duration::from_secs(4));
        let overloaded = || refused(Some(Code::Overloaded));
        let closed = AttemptError::closed;
        let table = [
            (unreachable(),               UNSENT,      UNREACHABLE, false, Next::Another),
            (unreachable(),               STARTING,    None,        false, Next::AnotherOrLater),
            (unreachable(),               ONCE_UNSENT, UNREACHABLE, false, Next::Another),
            (unreachable(),               ONCE_STARTING, None,        false, Next::AnotherOrLater),
            (no_resources(),              UNSENT,      None,        false, Next::AnotherOrLater),
            (no_resources(),              STARTING,    None,        false, Next::AnotherOrLater),
            (no_resources(),              ONCE_UNSENT, None,        false, Next::AnotherOrLater),
            (QueueTimeout,                UNSENT,      None,        false, Next::AnotherOrSame),
            (QueueTimeout,                ONCE_UNSENT, None,        false, Next::AnotherOrSame),
            (Removed,                     UNSENT,      None,        false, Next::Another),
            (Removed,                     USUAL,       None,        false, Next::Another),
            (Removed,                     ONCE_UNSENT, None,        false, Next::Another),
            (Removed,                     ONCE,        None,        false, Next::RefuseUnknown),
            (Behind,                      UNSENT,      None,        false, Next::Any),
            (Behind,                      USUAL,       None,        false, Next::Any),
            (Behind,                      ONCE_UNSENT, None,        false, Next::Any),
            (Behind,                      ONCE,        None,        false, Next::RefuseUnknown),
            (closed(true),                USUAL,       None,        false, Next::Same),
            (closed(true),                RESENT,      CHANCE,      true,  Next::Another),
            (closed(true),                ONCE_UNSENT, None,        false, Next::Same),
            (closed(true),                ONCE,        None,        false, Next::RefuseUnknown),
            (closed(false),               USUAL,       CHANCE,      true,  Next::Another),
            (closed(false),               RESENT,      CHANCE,      true,  Next::Another),
            (closed(false),               ONCE,        CHANCE,      true,  Next::RefuseUnknown),
            (LONG,                        USUAL,       CHANCE,      true,  Next::Another),
            (NEARLY_LONG,                 USUAL,       CHANCE,      true,  Next::Another),
            (LONG,                        AT_WORK,     None,        true,  Next::Another),
            (LONG,                        ONCE,        CHANCE,      true,  Next::RefuseUnknown),
            (LONG,                        UNSENT,      None,        false, Next::Any),
            (SHORT,                       USUAL,       None,        true,  Next::Another),
            (SHORT,                       ONCE,        None,        true,  Next::RefuseUnknown),
            (SHORT,                       UNSENT,      None,        false, Next::Any),
            (SHORT,                       ONCE_UNSENT, None,        false, Next::Any),
            (bad_ack(),                   USUAL,       CHANCE,      true,  Next::Another),
            (bad_ack(),                   ONCE,        CHANCE,      true,  Next::RefuseUnknown),
            (ack_too_large(),             USUAL,       None,        true,  Next::Refuse),
            (ack_too_large(),             ONCE,        None,        true,  Next::Refuse),
            (NoMemory,                    USUAL,       None,        true,  Next::Refuse),
            (NoMemory,                    ONCE,        None,        true,  Next::RefuseUnknown),
            (overloaded(),                USUAL,       None,        true,  Next::Another),
            (overloaded(),                ONCE,        None,        true,  Next::Another),
            (refused(Some(Code::Failed)), USUAL,       None,        true,  Next::PassRefusal),
            (refused(Some(Code::Failed)), ONCE,        None,        true,  Next::PassRefusal),
            (refused(None),               USUAL,       None,        true,  Next::PassRefusal),
            (unreachable(),               LATE_UNSENT, UNREACHABLE, false, Next::Refuse),
            (unreachable(),               LATE_STARTING, None,       false, Next::Refuse),
            (QueueTimeout,                LATE_UNSENT, None,        false, Next::Refuse),
            (Behind,                      LATE,        None,        false, Next::Refuse),
            (closed(true),                LATE,        None,        false, Next::Refuse),
            (LONG,                        LATE,        CHANCE,      true,  Next::Refuse),
            (LONG,                        LATE_ONCE,   CHANCE,      true,  Next::RefuseUnknown),
            (overloaded(),                LATE,        None,        true,  Next::Refuse),
            (refused(None),               LATE,        None,        true,  Next::PassRefusal),
        ];
        for (error, situation, blamed, is_try, next) in table {
            let verdict = rule(&error, situation);
            assert_eq!(verdict, Verdict { blamed, is_try, next }, "{error:?}, {situation:?}");
        }
    }

    #[test]
    fn a_refusal_has_the_code_of_its_last_failure() {
        let table = [
            (unreachable(), Code::Unreachable),
            (AttemptError::closed(false), Code::Unreachable),
            (Behind, Code::Unreachable),
            (Removed, Code::Unreachable),
            (Timeout(REPLY_TIMEOUT), Code::Timeout),
            (bad_ack(), Code::BadAck),
            (ack_too_large(), Code::TooLarge),
            (NoMemory, Code::Overloaded),
            (no_resources(), Code::Overloaded),
            (QueueTimeout, Code::Overloaded),
            (refused(Some(Code::NotAllowed)), Code::NotAllowed),
            (refused(None), Code::Failed),
        ];
        for (error, code) in table {
            assert_eq!(error.code(), code, "{error:?}");
        }
    }
}
