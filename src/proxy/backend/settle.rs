//! Handles acks: checks and counts each, and answers its client.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::time::Instant;

use super::Upstream;
use crate::net::connection::Connection;
use crate::protocol::Code;
use crate::proxy::acks::check_ack;
use crate::proxy::dispatch::AttemptError;
use crate::proxy::events::Delivery;
use crate::proxy::in_flight::InFlight;
use crate::proxy::replies::HeldReplies;
use crate::proxy::table::Failure;
use crate::proxy::upstream::{Phase, SentMessage};

/// What the answers of one read are.
#[derive(Default)]
struct Checked<'a> {
    /// Messages that were acked, with their acks, and when they were sent.
    acked: Vec<(InFlight, &'a [u8], Instant)>,
    /// Messages that the server refused, with its refusals, and when they were sent.
    refused: Vec<(InFlight, AttemptError, Instant)>,
    /// The first answer that is neither.
    wrong: Option<AttemptError>,
}

impl Upstream {
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
        let (batch, is_surplus) = self.take_batch(acks.len(), now);
        let begun = batch.front().map_or(now, |sent| sent.sent_at.max(last));
        let acks = acks.iter().map(|ack| connection.bytes(ack.clone()));
        let Checked { acked, refused, wrong } = self.check_batch(batch, acks);
        let backend = &self.server.handle;
        if let Ok(count) = u32::try_from(acked.len())
            && count > 0
        {
            backend.latency.record((now - begun) / count);
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
                backend.too_large.fetch_min(message.line.len(), Ordering::Relaxed);
            }
            self.fail(message, error, sent_at);
        }
        match wrong {
            Some(error) => Err(error),
            None if is_surplus => {
                let error = AttemptError::BadAck("nothing was asked".to_owned());
                self.dispatcher.blame(&self.server, Failure::MayBeChance, &error, now, now);
                Err(AttemptError::Behind)
            }
            None => Ok(()),
        }
    }

    /// Takes the messages that these acks are for, and returns whether there are more acks than messages. If
    /// so, ends the connection.
    fn take_batch(&self, acks: usize, now: Instant) -> (VecDeque<SentMessage>, bool) {
        let mut state = self.lock();
        let count = acks.min(state.sent.len());
        let batch: VecDeque<SentMessage> = state.sent.drain(..count).collect();
        state.was_used |= count > 0;
        state.idle_since = now;
        // If the connection was ended meanwhile, its messages may be gone: more acks than messages then prove
        // nothing.
        let is_surplus = acks > count && !matches!(state.phase, Phase::Ended);
        if is_surplus {
            state.end();
        }
        (batch, is_surplus)
    }

    /// Checks each ack against its message, up to the first bad ack. Drops the ack of a message that was
    /// given up.
    fn check_batch<'a>(
        &self,
        mut batch: VecDeque<SentMessage>,
        acks: impl Iterator<Item = &'a [u8]>,
    ) -> Checked<'a> {
        let mut checked = Checked { acked: Vec::with_capacity(batch.len()), ..Checked::default() };
        for ack in acks {
            let Some(mut sent) = batch.pop_front() else { break };
            let Some(mut message) = sent.message.take() else { continue };
            let sent_at = sent.sent_at;
            match check_ack(ack, &message, self.server.leased) {
                Ok(()) => {
                    message.permit = None;
                    checked.acked.push((message, ack, sent_at));
                }
                Err(error @ AttemptError::Refused { .. }) => {
                    message.permit = None;
                    checked.refused.push((message, error, sent_at));
                }
                Err(error) => {
                    sent.message = Some(message);
                    batch.push_front(sent);
                    self.put_back(batch);
                    checked.wrong = Some(error);
                    break;
                }
            }
        }
        checked
    }

    /// Ends the connection, and puts messages back in front of the others.
    fn put_back(&self, mut batch: VecDeque<SentMessage>) {
        let mut state = self.lock();
        state.end();
        batch.append(&mut state.sent);
        state.sent = batch;
    }
}
