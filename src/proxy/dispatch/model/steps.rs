//! The steps that a test generates.

use proptest::prelude::*;

use super::super::AttemptError;
use super::REPLY_TIMEOUT;
use crate::protocol::Code;

/// The last one has no servers.
pub const POLICIES: [&str; 3] = ["P", "Q", "nobody's"];
pub const IDS: [&str; 4] = ["1", "2", "3", "4"];

/// What happens next. A `pick` chooses among what there is.
#[derive(Debug, Clone)]
pub enum Step {
    /// Messages come together, each with its policy and `once`.
    Dispatch(Vec<(usize, bool)>),
    /// A server acks so many messages.
    Ack { pick: usize, count: usize },
    /// A message fails at its server, of which something may have been `sent`, in an attempt that
    /// began after the server's last failure, or before its first.
    Fail { pick: usize, error: AttemptError, sent: bool, is_new: bool },
    /// A message's time is over.
    Late { pick: usize },
    /// A message is forgotten, of which something may have been `sent`.
    Drop { pick: usize, sent: bool },
    /// A server registers, at one of two ports.
    Register { policy: usize, id: usize, port: u16, leased: bool, is_starting: bool },
    /// A server with a lease leaves the table.
    Leave { pick: usize },
    /// The first of those that have left takes no more messages; it `lapsed`: it will ack none.
    Close { lapsed: bool },
    /// What was put off is due.
    Timers,
    /// Nothing is put off any more.
    Stop,
}

fn error() -> impl Strategy<Value = AttemptError> {
    let text = String::new;
    prop_oneof![
        2 => Just(AttemptError::Unreachable(text())),
        1 => Just(AttemptError::OutOfResources(text())),
        1 => Just(AttemptError::QueueTimeout),
        1 => Just(AttemptError::Removed),
        4 => any::<bool>().prop_map(AttemptError::closed),
        1 => Just(AttemptError::Behind),
        1 => prop_oneof![Just(REPLY_TIMEOUT), Just(REPLY_TIMEOUT / 2)].prop_map(AttemptError::Timeout),
        1 => Just(AttemptError::BadAck(text())),
        1 => Just(AttemptError::AckTooLarge(text())),
        1 => Just(AttemptError::NoMemory),
        2 => prop_oneof![Just(Some(Code::Overloaded)), Just(Some(Code::Failed)), Just(None)]
            .prop_map(|code| AttemptError::Refused { code, reason: String::new(), packet: Vec::new() }),
    ]
}

pub fn step() -> impl Strategy<Value = Step> {
    let (pick, flag) = (any::<usize>, any::<bool>);
    let message = (prop_oneof![8 => Just(0), 8 => Just(1), 1 => Just(2_usize)], flag());
    let register = (0..2_usize, 0..IDS.len(), 1..=2_u16, flag(), flag());
    prop_oneof![
        6 => prop::collection::vec(message, 1..5).prop_map(Step::Dispatch),
        4 => (pick(), 1..4_usize).prop_map(|(pick, count)| Step::Ack { pick, count }),
        16 => (pick(), error(), flag(), flag())
            .prop_map(|(pick, error, sent, is_new)| Step::Fail { pick, error, sent, is_new }),
        1 => pick().prop_map(|pick| Step::Late { pick }),
        1 => (pick(), flag()).prop_map(|(pick, sent)| Step::Drop { pick, sent }),
        4 => register.prop_map(|(policy, id, port, leased, is_starting)| {
            Step::Register { policy, id, port, leased, is_starting }
        }),
        2 => pick().prop_map(|pick| Step::Leave { pick }),
        3 => flag().prop_map(|lapsed| Step::Close { lapsed }),
        2 => Just(Step::Timers),
        1 => Just(Step::Stop),
    ]
}
