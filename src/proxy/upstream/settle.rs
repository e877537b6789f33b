//! What acks settle: each is checked and counted, and its client answered.

use std::collections::VecDeque;
use std::ops::Range;
use std::time::Instant;

use super::Upstream;
use super::state::Exchange;
use crate::net::connection::Connection;
use crate::protocol::Code;
use crate::proxy::acks::{HeldReplies, check_ack};
use crate::proxy::dispatch::AttemptError;
use crate::proxy::events::Delivery;
use crate::proxy::table::Failure;

impl Upstream {
    /// Hands out acks that came together, since the `last` ones. After a wrong one, what was not settled is
    /// put back, for `report`.
    pub(super) fn settle(
        &self,
        acks: &[Range<usize>],
        connection: &Connection,
        held: &mut HeldReplies,
        (last, now): (Instant, Instant),
    ) -> Result<(), AttemptError> {
        let mut batch: VecDeque<Exchange> = {
            let mut state = self.lock();
            let count = acks.len().min(state.sent.len());
            state.was_used |= count > 0;
            state.idle_since = now;
            if acks.len() > count {
                state.end();
            }
            state.sent.drain(..count).collect()
        };
        let is_surplus = acks.len() > batch.len();
        let begun = batch.front().map_or(now, |exchange| exchange.sent_at.max(last));
        let (mut acked, mut refused) = (Vec::with_capacity(batch.len()), Vec::new());
        let mut wrong = None;
        for ack in acks.iter().take(batch.len()) {
            let Some(exchange) = batch.pop_front() else { break };
            // The ack of a message that was given up goes to nobody.
            let Some(message) = &exchange.message else { continue };
            let ack = connection.bytes(ack.clone());
            let (checked, sent_at) =
                (check_ack(ack, message, self.server.leased), exchange.sent_at);
            match checked {
                // Its permit is free from now on.
                Ok(()) => acked.extend(exchange.message.map(|message| (message, ack, sent_at))),
                Err(error @ AttemptError::Refused { .. }) => {
                    refused.extend(exchange.message.map(|message| (message, sent_at, error)));
                }
                Err(error) => {
                    self.lock().end();
                    batch.push_front(exchange);
                    wrong = Some(error);
                    break;
                }
            }
        }
        if let Ok(settled) = u32::try_from(acked.len())
            && settled > 0
        {
            self.server.handle.record_latency((now - begun) / settled);
        }
        let deliveries = acked.iter().map(|(message, ack, sent_at)| Delivery {
            message: message.about(),
            ack,
            took: now.saturating_duration_since(*sent_at),
        });
        self.dispatcher.acked(&self.server, deliveries, now);
        held.fill(acked.into_iter().map(|(message, ack, _)| (message, ack)));
        for (message, sent_at, error) in refused {
            if error.code() == Code::TooLarge {
                self.server.handle.record_too_large(message.line().len());
            }
            self.fail(message, error, sent_at);
        }
        match wrong {
            Some(error) => {
                let mut state = self.lock();
                batch.append(&mut state.sent);
                state.sent = batch;
                Err(error)
            }
            None if is_surplus => {
                let error = AttemptError::BadAck("nothing was asked".to_owned());
                self.dispatcher.blame(&self.server, Failure::MayBeChance, &error, now, now);
                Err(AttemptError::Behind)
            }
            None => Ok(()),
        }
    }
}
