//! Handles acks: checks and counts each, and answers its client.

use std::collections::VecDeque;
use std::ops::Range;
use std::time::Instant;

use super::state::{Exchange, Phase};
use super::{Pool, Upstream};
use crate::net::connection::Connection;
use crate::protocol::Code;
use crate::proxy::acks::check_ack;
use crate::proxy::dispatch::AttemptError;
use crate::proxy::events::Delivery;
use crate::proxy::replies::HeldReplies;
use crate::proxy::table::Failure;

impl<B: Pool> Upstream<B> {
    /// Handles the acks of one read, at `now`; the read before was at `last`. At the first bad ack, puts its
    /// message and the following ones back for [`fail_all`](Self::fail_all), and returns the error.
    pub(super) fn settle(
        &self,
        acks: &[Range<usize>],
        connection: &Connection,
        held: &mut HeldReplies,
        last: Instant,
        now: Instant,
    ) -> Result<(), AttemptError> {
        let mut state = self.lock();
        let count = acks.len().min(state.sent.len());
        let mut batch: VecDeque<Exchange> = state.sent.drain(..count).collect();
        state.was_used |= count > 0;
        state.idle_since = now;
        // Of one that was ended meanwhile, the messages were taken away.
        let is_surplus = acks.len() > count && !matches!(state.phase, Phase::Ended);
        if is_surplus {
            state.end();
        }
        drop(state);
        let begun = batch.front().map_or(now, |exchange| exchange.sent_at.max(last));
        let (mut acked, mut refused) = (Vec::with_capacity(batch.len()), Vec::new());
        let mut wrong = None;
        for ack in acks {
            let Some(mut exchange) = batch.pop_front() else { break };
            // Drop the ack of a message that was given up.
            let Some(mut message) = exchange.message.take() else { continue };
            let (ack, sent_at) = (connection.bytes(ack.clone()), exchange.sent_at);
            match check_ack(ack, &message, self.server.leased) {
                Ok(()) => {
                    message.permit = None;
                    acked.push((message, ack, sent_at));
                }
                Err(error @ AttemptError::Refused { .. }) => {
                    message.permit = None;
                    refused.push((message, error, sent_at));
                }
                Err(error) => {
                    exchange.message = Some(message);
                    batch.push_front(exchange);
                    let mut state = self.lock();
                    state.end();
                    batch.append(&mut state.sent);
                    state.sent = batch;
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
        held.fill(
            acked.into_iter().filter_map(|(message, ack, _)| Some((message.into_reply()?, ack))),
        );
        for (message, error, sent_at) in refused {
            if error.code() == Code::TooLarge {
                self.server.handle.record_too_large(message.line.len());
            }
            self.fail(message, error, sent_at);
        }
        if is_surplus && wrong.is_none() {
            let error = AttemptError::BadAck("nothing was asked".to_owned());
            self.dispatcher.blame(&self.server, Failure::MayBeChance, &error, now, now);
            wrong = Some(AttemptError::Behind);
        }
        wrong.map_or(Ok(()), Err)
    }
}
