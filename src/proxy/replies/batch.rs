//! Batches the acks of one burst, so that a client gets all of them in one `send`.

use std::sync::Arc;

use super::{ReplyQueue, ReplySlot};

/// Reply queues with ready replies that are held back for others of the same burst.
#[derive(Debug, Default)]
pub struct HeldReplies(Vec<Arc<ReplyQueue>>);

impl HeldReplies {
    /// Whether no client waits.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Fills these slots with a server's acks.
    pub fn fill<'a>(&mut self, acks: impl Iterator<Item = (ReplySlot, &'a [u8])>) {
        let mut slots = acks.peekable();
        while let Some((first, _)) = slots.peek() {
            let queue = Arc::clone(&first.queue);
            let own =
                std::iter::from_fn(|| slots.next_if(|(slot, _)| Arc::ptr_eq(&slot.queue, &queue)));
            if queue.fill_batch(own) {
                self.0.push(queue);
            }
        }
    }

    /// Sends what waits.
    pub fn send(&mut self) {
        self.0.drain(..).for_each(|queue| queue.flush());
    }
}

impl Drop for HeldReplies {
    fn drop(&mut self) {
        self.send();
    }
}
