//! What the test knows of messages and servers, and what it expects of the dispatcher.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::super::AttemptError;
use super::super::rule::{Next, Situation, rule};
use super::fake::{Event, Fake};
use super::{Model, REPLY_TIMEOUT, TRIES};
use crate::net::lock::lock;
use crate::protocol::Code;
use crate::proxy::table::{CONSECUTIVE_FAILURES, Failure, Server};

/// How a message ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    Acked,
    /// By its server's own refusal.
    Passed,
    Refused(Code),
}

/// What is known of a message.
#[derive(Debug, Default)]
pub struct Message {
    pub policy: usize,
    pub once: bool,
    pub is_late: bool,
    /// The registrations that failed it.
    pub failed: Vec<u64>,
    /// Those that are asked again when nobody else is left.
    pub postponed: Vec<u64>,
    pub tries: usize,
    pub resent_to: Option<u64>,
    /// A server may have carried it out.
    pub is_unknown: bool,
    /// The server whose turn it was, and then the one that it was handed to last.
    pub server: Option<u64>,
    /// What may follow its last failure, and the code of a refusal for that.
    pub last: Option<(Next, Code)>,
    pub is_put_off: bool,
    pub end: Option<End>,
}

/// What is known of a server in the table.
#[derive(Debug, Default)]
pub struct Member {
    pub serial: u64,
    pub failures: u32,
    pub has_failed: bool,
    pub is_ejected: bool,
    /// It has no lease and registered a moment ago.
    pub is_starting: bool,
}

impl Member {
    /// It has answered as it should.
    pub fn mark_healthy(&mut self) {
        *self = Member { serial: self.serial, is_starting: self.is_starting, ..Member::default() };
    }
}

impl Model {
    /// The server whose turn it is: the first one that is not ejected, which goes to the back.
    pub fn take_turn(&mut self, policy: usize) -> Option<u64> {
        let queue = &mut self.queues[policy];
        let turn = queue.iter().position(|member| !member.is_ejected).unwrap_or(0);
        queue.get(turn)?;
        queue[turn..].rotate_left(1);
        queue.last().map(|member| member.serial)
    }

    pub fn expect_failure(
        &mut self,
        number: usize,
        server: &Server<Fake>,
        error: &AttemptError,
        sent: bool,
        is_new: bool,
    ) {
        use AttemptError::*;
        let is_starting = self.member(server).is_some_and(|member| member.is_starting);
        let message = &mut self.messages[number];
        let was_resent = message.resent_to == Some(server.serial);
        let is_resend = matches!(error, ConnectionClosed { was_reused: true, .. }) && !was_resent;
        let verdict = rule(
            error,
            Situation {
                is_starting,
                was_resent,
                sent,
                once: message.once,
                is_late: message.is_late,
                // Those with a lease count their messages here.
                may_be_at_work: server.leased,
                reply_timeout: REPLY_TIMEOUT,
            },
        );
        match error {
            QueueTimeout | OutOfResources(_) => message.postponed.push(server.serial),
            Unreachable(_) if is_starting => message.postponed.push(server.serial),
            Behind => {}
            Timeout(_) if !sent => {}
            _ if is_resend => message.resent_to = Some(server.serial),
            _ => message.failed.push(server.serial),
        }
        message.is_unknown |= sent && !matches!(error, Refused { .. } | AckTooLarge(_));
        message.tries += usize::from(verdict.is_try);
        message.last = Some((verdict.next, error.code()));
        if verdict.next == Next::PassRefusal
            && let Some(member) = self.member(server)
        {
            // A refusal that its client gets is an answer like any other.
            member.mark_healthy();
        }
        let Some(failure) = verdict.blamed else { return };
        let Some(member) = self.member(server) else { return };
        if is_new || !member.has_failed {
            member.has_failed = true;
            member.failures += 1;
            member.is_ejected |=
                failure == Failure::Unreachable || member.failures >= CONSECUTIVE_FAILURES;
        }
    }

    /// Compares what the dispatcher did with what it may do.
    pub fn follow(&mut self) {
        let events = std::mem::take(&mut *lock(&self.log));
        for event in events {
            match event {
                Event::Handed { message, serial, was_closed } => {
                    self.handed(message, serial);
                    if was_closed {
                        let server = self.server(serial);
                        self.expect_failure(message, &server, &AttemptError::Removed, false, true);
                    }
                }
                Event::Drained { message } => {
                    let server = self.server(self.messages[message].server.unwrap());
                    let error = AttemptError::QueueTimeout;
                    self.expect_failure(message, &server, &error, false, true);
                }
            }
        }
        let held: BTreeSet<_> = self.servers.iter().flat_map(|it| it.handle.numbers()).collect();
        for number in 0..self.messages.len() {
            let message = &self.messages[number];
            if message.end.is_none() && !message.is_put_off && !held.contains(&number) {
                self.not_handed_on(number);
            }
        }
    }

    fn handed(&mut self, number: usize, serial: u64) {
        let (others, rest) = (self.untried(number), self.not_failed(number));
        let message = &mut self.messages[number];
        let previous = message.server.replace(serial);
        assert!(message.end.is_none(), "{message:?} has ended");
        let Some((next, _)) = message.last.take() else {
            assert_eq!(previous, Some(serial), "whose turn was it? {message:?}");
            return;
        };
        assert!(!message.failed.contains(&serial), "{message:?} comes to {serial} again");
        assert!(message.tries < TRIES && !message.is_late, "{message:?} is over");
        assert!(!(message.once && message.is_unknown), "{message:?} is sent twice");
        let is_same = previous == Some(serial);
        let may_be_same = matches!(next, Next::AnotherOrSame | Next::AnotherOrLater);
        match next {
            Next::Same => assert!(is_same, "{message:?} is resent"),
            _ if !others.is_empty() => {
                assert!(others.contains(&serial), "{others:?} are left for {message:?}");
            }
            _ => {
                let is_right = if may_be_same { is_same } else { rest.contains(&serial) };
                assert!(is_right, "{message:?} comes to {serial}");
                message.postponed.clear();
            }
        }
    }

    /// It was refused, or it is put off.
    fn not_handed_on(&mut self, number: usize) {
        let is_last = self.untried(number).is_empty();
        let nobody_is_left = self.not_failed(number).is_empty();
        let message = &mut self.messages[number];
        let Some((next, code)) = message.last else { panic!("{message:?} is lost") };
        let is_over = message.tries >= TRIES;
        message.end = match next {
            Next::PassRefusal => Some(End::Passed),
            Next::RefuseUnknown => Some(End::Refused(Code::OutcomeUnknown)),
            Next::AnotherOrLater if is_last && !is_over && !self.is_stopped => {
                // It will come to the same one, whoever is there then.
                message.last = Some((Next::Same, code));
                message.postponed.clear();
                message.is_put_off = true;
                None
            }
            Next::AnotherOrLater if is_last && !is_over => Some(End::Refused(Code::Overloaded)),
            Next::Another | Next::Any => {
                assert!(
                    nobody_is_left || is_over,
                    "{message:?} is refused though a server is left"
                );
                Some(End::Refused(code))
            }
            Next::Refuse => Some(End::Refused(code)),
            _ => {
                assert!(is_over, "{message:?} is lost");
                Some(End::Refused(code))
            }
        };
    }

    /// The servers that a message may go to first.
    fn untried(&self, number: usize) -> Vec<u64> {
        let Message { failed, postponed, .. } = &self.messages[number];
        self.preferred(number, |serial| !failed.contains(serial) && !postponed.contains(serial))
    }

    /// Those that it may go to then.
    fn not_failed(&self, number: usize) -> Vec<u64> {
        self.preferred(number, |serial| !self.messages[number].failed.contains(serial))
    }

    /// Those of the servers that are not ejected, if there are any.
    fn preferred(&self, number: usize, is_left: impl Fn(&u64) -> bool) -> Vec<u64> {
        let queue = self.queues[self.messages[number].policy].iter();
        let (ejected, eligible): (Vec<_>, Vec<_>) =
            queue.filter(|it| is_left(&it.serial)).partition(|member| member.is_ejected);
        let wanted = if eligible.is_empty() { ejected } else { eligible };
        wanted.iter().map(|member| member.serial).collect()
    }

    pub fn member(&mut self, server: &Server<Fake>) -> Option<&mut Member> {
        self.queues.iter_mut().flatten().find(|member| member.serial == server.serial)
    }

    fn server(&self, serial: u64) -> Arc<Server<Fake>> {
        Arc::clone(self.servers.iter().find(|server| server.serial == serial).unwrap())
    }

    /// What must hold after each step.
    pub fn check(&self) {
        let shown = self.dispatcher.table.snapshot();
        let shown: Vec<_> = shown.values().flatten().collect();
        for entry in shown.iter().filter(|it| it.capacity.is_some()) {
            let serial = Some(entry.server.serial);
            let put_off = self.messages.iter().filter(|it| it.is_put_off && it.server == serial);
            let held = entry.server.handle.numbers().len() + put_off.count();
            assert_eq!(entry.in_use, held as u64, "places at server {serial:?}");
        }
        let shown = shown.iter().map(|it| (it.server.serial, it.ejected_until.is_some()));
        let known = self.queues.iter().flatten().map(|it| (it.serial, it.is_ejected));
        assert!(shown.eq(known.clone()), "the turns are not {:?}", known.collect::<Vec<_>>());

        let count = |is_it: fn(&Option<End>) -> bool| {
            self.messages.iter().filter(|message| is_it(&message.end)).count() as u64
        };
        let totals = self.dispatcher.events.stats.totals();
        assert_eq!(totals.messages, self.messages.len() as u64);
        assert_eq!(totals.acks, count(|end| *end == Some(End::Acked)));
        assert_eq!(totals.in_flight, count(Option::is_none));
        assert_eq!(
            totals.refusals.iter().sum::<u64>() + totals.acks + totals.in_flight,
            totals.messages
        );
    }
}
