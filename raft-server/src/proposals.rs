//! Who waits for which entry.
//!
//! The raft thread registers an entry's proposals right after proposing it, before the entry can go anywhere; the apply
//! thread takes them out when it has applied that entry. An index alone does not name an entry (another leader may
//! have put its own there), index and term together do. When leadership is lost, everybody whose entry is not committed
//! is told that the outcome is unknown: the next leader may have the entry or not.
//!
//! Bound: `inflight_bytes_max` stops new batches, so what waits here is bounded by it plus one batch.

use std::collections::VecDeque;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::oneshot;

use crate::error::ProposeError;
use crate::lanes::COMMAND_OVERHEAD_BYTES;
use crate::log::Position;

/// Where a proposal's reply goes.
pub(crate) type ReplySender<R> = oneshot::Sender<Result<R, ProposeError>>;

/// A command on its way to a batch.
pub(crate) struct Proposal<R> {
    pub(crate) command: Bytes,
    pub(crate) reply: ReplySender<R>,
}

/// The proposals that travel in one entry, in the order of its commands.
pub(crate) struct Batch<R> {
    pub(crate) at: Position,
    pub(crate) bytes: u64,
    pub(crate) replies: Vec<ReplySender<R>>,
}

impl<R> Batch<R> {
    /// What the batch counts for against `inflight_bytes_max`.
    pub(crate) fn bytes_of(proposals: &[Proposal<R>]) -> u64 {
        proposals.iter().map(|proposal| (proposal.command.len() + COMMAND_OVERHEAD_BYTES) as u64).sum()
    }
}

/// Batches proposed here and not yet applied here, oldest first, by growing index.
pub(crate) struct Waiting<R> {
    batches: Mutex<Inner<R>>,
}

struct Inner<R> {
    queue: VecDeque<Batch<R>>,
    bytes: u64,
}

impl<R> Waiting<R> {
    pub(crate) fn new() -> Self {
        Waiting { batches: Mutex::new(Inner { queue: VecDeque::new(), bytes: 0 }) }
    }

    /// Bytes of commands that wait to be applied.
    pub(crate) fn bytes(&self) -> u64 {
        self.batches.lock().bytes
    }

    pub(crate) fn register(&self, batch: Batch<R>) {
        let mut inner = self.batches.lock();
        assert!(inner.queue.back().is_none_or(|last| last.at.index < batch.at.index), "indexes grow");
        inner.bytes += batch.bytes;
        inner.queue.push_back(batch);
    }

    /// Takes out what waits up to and including `last`, oldest first. The caller answers: with the reply if index and
    /// term are those of the entry it applied, else [`ProposeError::Dropped`].
    pub(crate) fn take_through(&self, last: u64) -> Vec<Batch<R>> {
        let mut inner = self.batches.lock();
        let count = inner.queue.partition_point(|batch| batch.at.index <= last);
        let taken: Vec<_> = inner.queue.drain(..count).collect();
        inner.bytes -= taken.iter().map(|batch| batch.bytes).sum::<u64>();
        taken
    }

    /// Takes out what waits for entries after `committed`: leadership is lost, nobody knows what becomes of them.
    pub(crate) fn take_after(&self, committed: u64) -> Vec<Batch<R>> {
        let mut inner = self.batches.lock();
        let count = inner.queue.partition_point(|batch| batch.at.index <= committed);
        let taken: Vec<_> = inner.queue.drain(count..).collect();
        inner.bytes -= taken.iter().map(|batch| batch.bytes).sum::<u64>();
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loss_of_leadership_spares_what_is_committed() {
        let waiting = Waiting::<()>::new();
        for index in 5..10 {
            waiting.register(Batch { at: Position { index, term: 2 }, bytes: 10, replies: Vec::new() });
        }
        let indexes = |batches: Vec<Batch<()>>| batches.iter().map(|batch| batch.at.index).collect::<Vec<_>>();
        assert_eq!(indexes(waiting.take_after(7)), [8, 9]);
        assert_eq!(waiting.bytes(), 30);
        assert_eq!(indexes(waiting.take_through(6)), [5, 6]);
        assert_eq!(indexes(waiting.take_through(100)), [7]);
        assert_eq!(waiting.bytes(), 0);
    }
}
