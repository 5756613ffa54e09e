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
use crate::proposals::{Proposal, ReplySender, Waiter, Waiting};
use crate::snapshot::Outgoing;

/// Who leads, as this member knows. Sent when any of it changes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Leadership {
    pub term: u64,
    /// 0: nobody that this member knows of.
    pub leader_id: u64,
    pub is_leader: bool,
}

/// How far a member has come, as the leader knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    pub id: u64,
    /// Highest index that it is known to have on disk.
    pub matched_index: u64,
    /// Whether it was heard of within the last election timeout.
    pub is_active: bool,
    pub is_learner: bool,
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
    /// Of the newest change of members.
    pub(crate) conf_index: AtomicU64,
    pub(crate) is_learner: AtomicBool,
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
    /// Tells this life of the member from others; never 0.
    pub(crate) life: u64,
    pub(crate) outgoing: Arc<Outgoing>,
    pub(crate) queue: Mutex<ProposalQueue<R>>,
    pub(crate) waiting: Waiting<R>,
    pub(crate) read_waiters: AtomicU64,
    pub(crate) status: StatusCells,
    pub(crate) members: RwLock<Arc<[u64]>>,
    /// Of a leader, every member's; of others, nobody's.
    pub(crate) progress: RwLock<Arc<[Progress]>>,
    /// Whether the members before the newest change count as well.
    pub(crate) joint: watch::Receiver<bool>,
    /// Whether this member was in the group and no longer is.
    pub(crate) removed: watch::Sender<bool>,
    pub(crate) leadership: watch::Sender<Leadership>,
    pub(crate) metrics: Metrics,
    pub(crate) events: Sender<Event<R>>,
    pub(crate) stopping: AtomicBool,
    pub(crate) faulted: AtomicBool,
    pub(crate) reply_runtime: Option<tokio::runtime::Handle>,
}

/// Replies and where they go.
pub(crate) type Answered<R> = Vec<(ReplySender<R>, R)>;

fn send_replies<R>(answered: Answered<R>) {
    for (sender, reply) in answered {
        // A proposer that went away needs no answer.
        let _ = sender.send(Ok(reply));
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

    /// Answers proposals that were applied. What waits on the runtime is a reply for each of those who wait, no more.
    pub(crate) fn complete(&self, answered: Answered<R>) {
        self.metrics.proposals_pending.fetch_sub(answered.len() as u64, Ordering::Relaxed);
        match &self.reply_runtime {
            // Dropped with its runtime, it drops the senders, and who waits learns that.
            Some(runtime) if answered.len() > 1 => drop(runtime.spawn(async move { send_replies(answered) })),
            Some(_) | None => send_replies(answered),
        }
    }

    /// Refuses proposals. Those of other members hear of it there.
    pub(crate) fn refuse(&self, proposals: impl IntoIterator<Item = Proposal<R>>, error: ProposeError) {
        for proposal in proposals {
            if let Waiter::Local(reply) = proposal.waiter {
                self.metrics.proposals_pending.fetch_sub(1, Ordering::Relaxed);
                self.metrics.proposals_failed.fetch_add(1, Ordering::Relaxed);
                let _ = reply.send(Err(error));
            }
        }
    }

    /// Puts proposals that are known not to have been applied back among those that wait for a batch. Those of other members
    /// are proposed again by these.
    pub(crate) fn requeue(&self, proposals: Vec<Proposal<R>>) {
        let mut refused = Vec::new();
        {
            let mut queue = self.queue.lock();
            for proposal in proposals.into_iter().filter(|proposal| matches!(proposal.waiter, Waiter::Local(_))) {
                if proposal.only_in.is_some() {
                    refused.push((proposal, ProposeError::OtherTerm));
                    continue;
                }
                let (lane, bytes) = (proposal.lane, proposal.command.len());
                if let Err((full, proposal)) = queue.lanes.push(lane, bytes, proposal) {
                    refused.push((proposal, ProposeError::from(full)));
                }
            }
        }
        for (proposal, error) in refused {
            self.refuse([proposal], error);
        }
        let _ = self.events.try_send(Event::Proposals);
    }

    /// The end: refuses all that waits and all that comes.
    pub(crate) fn close(&self) {
        let queued = self.queue.lock().lanes.close();
        self.refuse(queued, ProposeError::Stopped);
        self.refuse(self.waiting.take_all(), ProposeError::Dropped);
        self.status.is_leader.store(false, Ordering::Release);
        self.status.reads_freely.store(false, Ordering::Release);
    }
}
