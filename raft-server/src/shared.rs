//! What a member's threads and its handles share: the waiting proposals, the published state, and the way to stop.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::{Mutex, RwLock};
use raft::eraftpb::{Entry, MessageType};
use tokio::sync::watch;

use crate::behind::behind_ready_tasks;
use crate::config::Config;
use crate::error::{ProposeError, ReadError};
use crate::events::EventSender;
use crate::lanes::Lanes;
use crate::metrics::Metrics;
use crate::node::Event;
use crate::proposals::{Proposal, ReplySender, Waiter, Waiting};
use crate::read_index::{Asked, Next, QUESTION_MARK, Question, ReadRounds, ReadSender, is_question};
use crate::replies::Replies;
use crate::snapshot::Outgoing;
use crate::transport::{Message, PeerMessage, SendFromAnywhere};

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
    /// This member is alone in its group, leads, and has applied all that an earlier life, or a member that is gone, may have
    /// acknowledged: what is applied is what is acknowledged, and a read needs no round.
    pub(crate) reads_freely: AtomicBool,
}

/// Proposals that wait for a batch.
pub(crate) struct ProposalQueue<R> {
    pub(crate) lanes: Lanes<Proposal<R>>,
    /// Raft's thread will look at the lanes without being told again: it was told, or waits for the disk first. So one
    /// notice serves many proposals.
    pub(crate) rung: bool,
}

impl<R> ProposalQueue<R> {
    /// The next batch, if there is room for one, and either nothing is under way or it is full. If it gives none for want of either,
    /// raft's thread looks again without anybody's notice, when the disk, the state machine or the leader is done with what is before it.
    pub(crate) fn next_batch(
        &mut self,
        has_room: bool,
        is_underway: bool,
        config: &Config,
    ) -> Option<Vec<Proposal<R>>> {
        let (cost_bytes_max, items_max) = (config.batch_bytes_max, config.batch_commands_max);
        self.rung = is_underway || !has_room;
        let is_due = !is_underway || self.lanes.has_full_batch(cost_bytes_max, items_max);
        (has_room && is_due && self.lanes.items() > 0).then(|| self.lanes.take_batch(cost_bytes_max, items_max))
    }
}

pub(crate) struct Shared<R> {
    pub(crate) id: u64,
    /// Tells this life of the member from others; never 0.
    pub(crate) life: u64,
    pub(crate) outgoing: Arc<Outgoing>,
    pub(crate) queue: Mutex<ProposalQueue<R>>,
    pub(crate) waiting: Waiting<R>,
    pub(crate) reads: Mutex<ReadRounds>,
    /// For what need not go through raft's thread.
    pub(crate) sender: Option<Arc<dyn SendFromAnywhere>>,
    pub(crate) read_waiters: AtomicU64,
    pub(crate) status: StatusCells,
    pub(crate) members: RwLock<Arc<[u64]>>,
    /// Of a leader, every member's; of others, nobody's.
    pub(crate) progress: RwLock<Arc<[Progress]>>,
    /// Whether this member was in the group and no longer is.
    pub(crate) removed: watch::Sender<bool>,
    pub(crate) leadership: watch::Sender<Leadership>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) events: EventSender<Event<R>>,
    pub(crate) stopping: AtomicBool,
    pub(crate) faulted: AtomicBool,
    pub(crate) replies: Replies,
}

/// Replies and where they go.
pub(crate) type Answered<R> = Vec<(ReplySender<R>, Result<R, ProposeError>)>;

/// Gives how many of those who asked have gone away; they need no answer.
fn send_replies<R>(answered: Answered<R>) -> i64 {
    answered.into_iter().map(|(sender, reply)| i64::from(sender.send(reply).is_err())).sum()
}

fn send_reads(readers: Vec<ReadSender>, applied_index: u64) {
    for reader in readers {
        // A reader that went away needs no answer.
        let _ = reader.send(Ok(applied_index));
    }
}

/// Behind the tasks that are ready on this thread: readers that these bring share the round. A round for each is more work for all members.
async fn begin_round<R: Send + 'static>(shared: Arc<Shared<R>>) {
    behind_ready_tasks().await;
    shared.begin_here();
}

/// A question about reads or its answer: both carry the round's name.
pub(crate) fn read_message(kind: MessageType, from: u64, to: u64, name: Vec<u8>) -> Message {
    let entry = Entry { data: name.into(), ..Entry::default() };
    let mut message = Message { to, from, entries: vec![entry].into(), ..Message::default() };
    message.set_msg_type(kind);
    message
}

/// A question to a follower or its answer, see [`is_question`].
fn heartbeat(kind: MessageType, from: u64, to: u64, term: u64, name: &[u8]) -> Message {
    let context = name.to_vec().into();
    let mut message = Message { to, from, term, index: QUESTION_MARK, context, ..Message::default() };
    message.set_msg_type(kind);
    message
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

    /// Takes a reader for the next round.
    ///
    /// # Errors
    /// [`ReadError::Stopped`].
    pub(crate) fn join_readers(self: &Arc<Self>, sender: ReadSender) -> Result<(), ReadError> {
        let next = self.reads.lock().join(sender).ok_or(ReadError::Stopped)?;
        if next == Next::Begin && self.replies.runtime().is_none() {
            self.begin_here();
        } else {
            self.carry_on(next);
        }
        Ok(())
    }

    fn carry_on(self: &Arc<Self>, next: Next) {
        match next {
            Next::Wait => {}
            Next::Begin => match self.replies.runtime() {
                Some(runtime) => drop(runtime.spawn(begin_round(Arc::clone(self)))),
                None => {
                    // Not here: an answer that a transport delivers on this thread brings the next one.
                    self.reads.lock().leave_to_raft();
                    let _ = self.events.try_send(Event::Readers);
                }
            },
            // If the queue is full, raft's thread is awake and looks at the readers after its events.
            Next::Ring => drop(self.events.try_send(Event::Readers)),
            Next::Ask(Question { name, asked: Asked::Leader(leader) }) => {
                self.send(read_message(MessageType::MsgReadIndex, self.id, leader, name));
            }
            Next::Ask(Question { name, asked: Asked::Follower { term, id } }) => {
                self.send(heartbeat(MessageType::MsgHeartbeat, self.id, id, term, &name));
            }
        }
    }

    /// Begins a round that does not go through raft, if somebody waits for one.
    pub(crate) fn begin_here(self: &Arc<Self>) {
        let next = {
            let mut reads = self.reads.lock();
            reads.begin_here(self.status.commit_index.load(Ordering::Acquire))
        };
        // Not locked while it is sent: a transport may deliver the answer on this thread.
        self.carry_on(next);
    }

    fn send(&self, message: Message) {
        let sender = self.sender.as_ref().expect("only who can send asks and answers here");
        sender.send(PeerMessage::Raft(Box::new(message)));
    }

    /// Does what a message about reads asks for, if raft's thread need not see it; else gives it back.
    pub(crate) fn take_read_message(self: &Arc<Self>, message: PeerMessage) -> Option<PeerMessage> {
        let PeerMessage::Raft(raft) = &message else { return Some(message) };
        let kind = raft.get_msg_type();
        let name = raft.entries.first().map_or(&[][..], |entry| &entry.data);
        if self.sender.is_none() {
            return Some(message);
        }
        if kind == MessageType::MsgReadIndex {
            let answer = {
                let reads = self.reads.lock();
                // In this order: what was acknowledged before the request was made is in the index then.
                let term = reads.answers_in_term(raft.from, name);
                term.map(|term| (term, self.status.commit_index.load(Ordering::Acquire)))
            };
            let Some((term, index)) = answer else { return Some(message) };
            let answer = read_message(MessageType::MsgReadIndexResp, self.id, raft.from, name.to_vec());
            self.send(Message { index, term, ..answer });
            return None;
        }
        if kind == MessageType::MsgHeartbeat && is_question(raft) {
            if !self.reads.lock().follows(raft.from, raft.term) {
                return Some(message);
            }
            self.send(heartbeat(MessageType::MsgHeartbeatResponse, self.id, raft.from, raft.term, &raft.context));
            return None;
        }
        if kind == MessageType::MsgHeartbeatResponse && is_question(raft) {
            let applied_index = self.status.applied_index.load(Ordering::Acquire);
            let answered = {
                let mut reads = self.reads.lock();
                let Some(index) = reads.index_followed(raft.from, &raft.context, raft.term) else {
                    // Whoever answers last finds no round any more.
                    return reads.is_underway(&raft.context).then_some(message);
                };
                reads.answered(&raft.context, index, applied_index)
            };
            let Some((ready, next)) = answered else { return Some(message) };
            self.carry_on(next);
            send_reads(ready, applied_index);
            return None;
        }
        if kind == MessageType::MsgReadIndexResp {
            let applied_index = self.status.applied_index.load(Ordering::Acquire);
            let answered = self.reads.lock().answered(name, raft.index, applied_index);
            let Some((ready, next)) = answered else { return Some(message) };
            self.carry_on(next);
            send_reads(ready, applied_index);
            return None;
        }
        Some(message)
    }

    /// Answers proposals that were applied. What waits on the runtime is a reply for each of those who wait, no more.
    pub(crate) fn complete(&self, answered: Answered<R>) {
        // Before they hear of it; those who went away have counted themselves.
        self.metrics.proposals_pending.fetch_sub(answered.len().cast_signed() as i64, Ordering::Relaxed);
        let metrics = Arc::clone(&self.metrics);
        self.replies.give(answered.len(), move || {
            let gone = send_replies(answered);
            metrics.proposals_pending.fetch_add(gone, Ordering::Relaxed);
        });
    }

    /// Answers readers, who may read what is applied up to here. What waits on the runtime is bounded as they are, by `read_waiters_max`.
    pub(crate) fn allow_reads(&self, readers: Vec<ReadSender>, applied_index: u64) {
        self.replies.give(readers.len(), move || send_reads(readers, applied_index));
    }

    /// Refuses proposals. Those of other members hear of it there.
    pub(crate) fn refuse(&self, proposals: impl IntoIterator<Item = Proposal<R>>, error: ProposeError) {
        for proposal in proposals {
            if let Waiter::Local(reply) = proposal.waiter {
                // Before anybody hears of it; who went away has counted itself.
                self.metrics.proposals_pending.fetch_sub(1, Ordering::Relaxed);
                match reply.send(Err(error)) {
                    Ok(()) => drop(self.metrics.proposals_failed.fetch_add(1, Ordering::Relaxed)),
                    Err(_) => drop(self.metrics.proposals_pending.fetch_add(1, Ordering::Relaxed)),
                }
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
                let (lane, bytes, cost_bytes) = (proposal.lane, proposal.command.len(), proposal.cost_bytes);
                if let Err((full, proposal)) = queue.lanes.push(lane, bytes, cost_bytes, proposal) {
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
        self.reads.lock().close();
        self.status.is_leader.store(false, Ordering::Release);
        self.status.reads_freely.store(false, Ordering::Release);
    }
}
