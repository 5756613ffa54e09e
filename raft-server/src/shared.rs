//! What a member's threads and its handles share: the waiting proposals, the published state, and the way to stop.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crossbeam_channel::Sender;
use parking_lot::{Mutex, RwLock};
use tokio::sync::watch;

use crate::error::ProposeError;
use crate::lanes::Lanes;
use crate::metrics::Metrics;
use crate::node::Event;
use crate::proposals::{Batch, Proposal, Waiting};

/// Who leads, as this member knows. Sent when any of it changes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Leadership {
    pub term: u64,
    /// 0: nobody that this member knows of.
    pub leader_id: u64,
    pub is_leader: bool,
}

/// Published by the threads, read by anybody. Each is right for some moment; together they need not be of the same.
#[derive(Default)]
pub(crate) struct StatusCells {
    pub(crate) term: AtomicU64,
    pub(crate) leader_id: AtomicU64,
    pub(crate) is_leader: AtomicBool,
    pub(crate) commit_index: AtomicU64,
    pub(crate) applied_index: AtomicU64,
    pub(crate) durable_index: AtomicU64,
    pub(crate) last_index: AtomicU64,
    pub(crate) voters: AtomicU64,
    /// This member is the only voter, leads, and has applied all that an earlier life may have acknowledged: what is
    /// applied is what is acknowledged, and a read needs no round.
    pub(crate) reads_freely: AtomicBool,
}

/// Proposals that wait for a batch.
pub(crate) struct ProposalQueue<R> {
    pub(crate) lanes: Lanes<Proposal<R>>,
    /// Raft's thread will look at the lanes without being told again: it was told, or waits for the disk first. So one
    /// notice serves many proposals.
    pub(crate) rung: bool,
}

pub(crate) struct Shared<R> {
    pub(crate) id: u64,
    pub(crate) queue: Mutex<ProposalQueue<R>>,
    pub(crate) waiting: Waiting<R>,
    pub(crate) read_waiters: AtomicU64,
    pub(crate) status: StatusCells,
    pub(crate) members: RwLock<Arc<[u64]>>,
    pub(crate) leadership: watch::Sender<Leadership>,
    pub(crate) metrics: Metrics,
    pub(crate) events: Sender<Event>,
    pub(crate) stopping: AtomicBool,
    pub(crate) faulted: AtomicBool,
    pub(crate) reply_runtime: Option<tokio::runtime::Handle>,
}

fn send_replies<R>(answered: Vec<(Batch<R>, Vec<R>)>) {
    for (batch, replies) in answered {
        for (sender, reply) in batch.replies.into_iter().zip(replies) {
            // A proposer that went away needs no answer.
            let _ = sender.send(Ok(reply));
        }
    }
}

impl<R: Send + 'static> Shared<R> {
    pub(crate) fn faulted(&self) -> bool {
        self.faulted.load(Ordering::Acquire)
    }

    pub(crate) fn stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    /// Asks raft's thread to end. Its loop looks at the flag after every event, so a full queue needs no notice.
    pub(crate) fn request_stop(&self) {
        self.stopping.store(true, Ordering::Release);
        let _ = self.events.try_send(Event::Stop);
    }

    /// Answers the proposals of applied entries. What waits on the runtime is a reply for each of those who wait, no more.
    pub(crate) fn complete(&self, answered: Vec<(Batch<R>, Vec<R>)>) {
        // Here, on the apply thread, where a broken invariant stops the member; in a task it would end that task.
        for (batch, replies) in &answered {
            assert_eq!(batch.replies.len(), replies.len(), "an entry carries the commands it was proposed with");
        }
        let replies: usize = answered.iter().map(|(_, replies)| replies.len()).sum();
        self.metrics.proposals_pending.fetch_sub(replies as u64, Ordering::Relaxed);
        match &self.reply_runtime {
            // Dropped with its runtime, it drops the senders, and who waits learns that.
            Some(runtime) if replies > 1 => drop(runtime.spawn(async move { send_replies(answered) })),
            Some(_) | None => send_replies(answered),
        }
    }

    /// Tells proposers whose entries may or may not survive.
    pub(crate) fn drop_batches(&self, batches: impl IntoIterator<Item = Batch<R>>) {
        for batch in batches {
            let count = batch.replies.len() as u64;
            self.metrics.proposals_pending.fetch_sub(count, Ordering::Relaxed);
            self.metrics.proposals_failed.fetch_add(count, Ordering::Relaxed);
            for sender in batch.replies {
                let _ = sender.send(Err(ProposeError::Dropped));
            }
        }
    }

    /// Refuses proposals that never became an entry.
    pub(crate) fn refuse(&self, proposals: Vec<Proposal<R>>, error: ProposeError) {
        let count = proposals.len() as u64;
        self.metrics.proposals_pending.fetch_sub(count, Ordering::Relaxed);
        self.metrics.proposals_failed.fetch_add(count, Ordering::Relaxed);
        for proposal in proposals {
            let _ = proposal.reply.send(Err(error));
        }
    }

    /// The end: refuses all that waits and all that comes.
    pub(crate) fn close(&self) {
        let queued = self.queue.lock().lanes.close();
        self.refuse(queued, ProposeError::Stopped);
        self.drop_batches(self.waiting.take_after(0));
        self.status.is_leader.store(false, Ordering::Release);
        self.status.reads_freely.store(false, Ordering::Release);
    }
}
