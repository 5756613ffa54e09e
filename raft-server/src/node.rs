//! The one thread that owns raft: a closed [`Event`], one loop.
//!
//! Each turn takes the events that are there, then looks at everything they may have made possible: proposing the next
//! batch, beginning a read round, carrying out what raft is ready for ([`ready`](crate::ready)), publishing the state. The
//! thread never waits for another one: writes go into a queue that the log thread empties whole, the apply thread
//! follows a watermark, transports drop. So the other threads may wait for it.
//!
//! Batching. While nothing of ours is on its way to the disk, whatever waits is proposed at once: one client alone has
//! no delay. While something is, a batch is proposed only if it is full, else it keeps filling until that sync is done. So
//! small loads cost one sync per batch, large ones keep the disk busy.
//!
//! A sole voter writes its log on this thread: nobody else's messages wait here, its reads need no round, and two changes of
//! threads for each sync are spared (decision 0003). Proposals fill the next batch meanwhile, as they would otherwise.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError};
use raft::eraftpb::MessageType;
use raft::{RawNode, StateRole};
use tenure_storage::Fault;

use crate::apply::ApplySignal;
use crate::config::Config;
use crate::error::{ProposeError, ReadError};
use crate::frame;
use crate::log::{Conf, Log, LogWrite, Position, RaftStorage};
use crate::proposals::{Batch, Proposal};
use crate::read_index::{ReadRounds, ReadSender};
use crate::shared::{Leadership, Shared};
use crate::transport::{Message, Transport};
use crate::writer::WriteQueue;

/// Everything that can make this member act. Adding work means adding a variant here.
pub(crate) enum Event {
    /// A tick of raft's clock is due.
    Tick,
    /// Proposals wait in the lanes.
    Proposals,
    Message(Box<Message>),
    Read(ReadSender),
    /// The `Ready` of this number and all before are durable.
    Persisted(u64),
    /// The applied index in the status moved.
    Applied,
    /// The durable index in the status moved: the log can be truncated.
    Durable,
    /// The stopping flag is set.
    Stop,
}

/// Events taken before the loop looks at what they made possible, so that neither starves the other.
const EVENTS_PER_TURN: usize = 256;

/// See the module's essay.
pub(crate) struct Node<R> {
    pub(crate) raw: RawNode<RaftStorage>,
    pub(crate) config: Config,
    pub(crate) shared: Arc<Shared<R>>,
    pub(crate) log: Arc<Log>,
    pub(crate) writes: Arc<WriteQueue>,
    pub(crate) apply: Arc<ApplySignal>,
    pub(crate) transport: Box<dyn Transport>,
    pub(crate) reads: ReadRounds,
    pub(crate) events: Receiver<Event>,
    pub(crate) next_tick: Instant,
    /// Indexes of our batches that are not on this disk yet, oldest first.
    pub(crate) unpersisted: VecDeque<u64>,
    pub(crate) outbox: crate::ready::Outbox,
    /// What raft wants saved but needs no sync for: goes with the next write.
    pub(crate) unsaved: LogWrite,
    pub(crate) conf: Conf,
    /// The term in which we may read freely, and from which applied index on.
    pub(crate) read_floor: Option<Position>,
    /// A write was done on this thread: there may be more to do without any event's saying so.
    pub(crate) again: bool,
}

impl<R: Send + 'static> Node<R> {
    /// Runs until asked to stop.
    ///
    /// # Errors
    /// The log's faults; the member must stop.
    pub(crate) fn run(mut self) -> Result<(), Fault> {
        if self.is_sole_voter() {
            // There is nobody to ask, so there is nothing to wait for.
            self.raw.campaign().map_err(raft_fault)?;
        }
        self.settle()?;
        while !self.shared.stopping() {
            let event = self.next_event();
            self.on_event(event)?;
            for _ in 1..EVENTS_PER_TURN {
                let Ok(event) = self.events.try_recv() else { break };
                self.on_event(event)?;
            }
            self.settle()?;
        }
        self.reads.fail_all(ReadError::Stopped);
        Ok(())
    }

    /// The next event; a due tick goes before whatever waits in the queue.
    fn next_event(&mut self) -> Event {
        if Instant::now() < self.next_tick {
            if std::mem::take(&mut self.again) {
                return self.events.try_recv().unwrap_or(Event::Proposals);
            }
            match self.events.recv_deadline(self.next_tick) {
                Ok(event) => return event,
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Event::Stop,
            }
        }
        // After a stall, time goes on from now: a burst of ticks would start elections for nothing.
        let tick = Duration::from_millis(self.config.tick_ms);
        self.next_tick = (self.next_tick + tick).max(Instant::now());
        Event::Tick
    }

    fn on_event(&mut self, event: Event) -> Result<(), Fault> {
        match event {
            Event::Tick => {
                self.raw.tick();
                if let Some(name) = self.reads.on_tick() {
                    self.raw.read_index(name);
                }
            }
            Event::Message(message) => self.on_message(*message),
            Event::Read(sender) => self.reads.join(sender),
            Event::Persisted(number) => self.on_persisted(number),
            Event::Applied => self.on_applied(),
            Event::Durable => {
                self.on_applied();
                self.truncate()?;
            }
            Event::Proposals | Event::Stop => {}
        }
        Ok(())
    }

    fn on_message(&mut self, message: Message) {
        let kind = message.get_msg_type();
        if matches!(kind, MessageType::MsgPropose | MessageType::MsgSnapshot) {
            // Peers propose through their own leader; snapshots are not built yet.
            return;
        }
        if kind == MessageType::MsgAppend && self.writes.bytes() > self.config.append_queue_bytes_max {
            self.shared.metrics.messages_dropped.fetch_add(1, Ordering::Relaxed);
            return;
        }
        if let Err(error) = self.raw.step(message) {
            tracing::debug!(%error, "step message");
        }
    }

    fn on_applied(&mut self) {
        let applied = self.shared.status.applied_index.load(Ordering::Acquire);
        if applied > self.raw.raft.raft_log.applied {
            self.raw.advance_apply_to(applied);
            self.reads.on_applied(applied);
        }
    }

    fn truncate(&mut self) -> Result<(), Fault> {
        let durable = self.shared.status.durable_index.load(Ordering::Acquire);
        assert!(durable <= self.raw.raft.raft_log.applied, "durable is not ahead of applied");
        if durable > self.log.truncated().index {
            self.writes.push_truncate(self.log.hide_through(durable)?);
        }
        Ok(())
    }

    /// Does all that the last events made possible.
    fn settle(&mut self) -> Result<(), Fault> {
        self.notice_lost_leadership();
        self.propose_batches();
        self.begin_read_round();
        while self.raw.has_ready() {
            self.on_ready()?;
        }
        // A read round of a single voter is confirmed at once.
        self.reads.on_applied(self.shared.status.applied_index.load(Ordering::Acquire));
        self.publish();
        Ok(())
    }

    fn notice_lost_leadership(&mut self) {
        let term = self.shared.status.term.load(Ordering::Relaxed);
        let led = self.shared.status.is_leader.load(Ordering::Relaxed);
        if led && (!self.is_leader() || self.raw.raft.term != term) {
            self.unpersisted.clear();
            let unknown = self.shared.waiting.take_after(self.raw.raft.raft_log.committed);
            self.shared.drop_batches(unknown);
        }
    }

    fn propose_batches(&mut self) {
        while let Some(batch) = self.next_batch() {
            if self.is_leader() {
                self.propose(batch);
            } else {
                self.shared.refuse(batch, self.not_leader());
            }
        }
    }

    /// What to propose, or to refuse, now; see the module's essay.
    fn next_batch(&mut self) -> Option<Vec<Proposal<R>>> {
        let leader = self.is_leader();
        let applying_bytes = self.shared.waiting.bytes();
        let mut queue = self.shared.queue.lock();
        if !leader {
            queue.rung = false;
            let all = queue.lanes.drain();
            return (!all.is_empty()).then_some(all);
        }
        let (bytes_max, items_max) = (self.config.batch_bytes_max, self.config.batch_commands_max);
        let full = queue.lanes.bytes() >= bytes_max || queue.lanes.items() >= items_max;
        let writing = self.unpersisted.len();
        let room = writing < self.config.inflight_batches_max && applying_bytes < self.config.inflight_bytes_max as u64;
        // When the disk or the state machine is done, this is called again without anybody's notice.
        queue.rung = writing > 0 || !room;
        if !room || queue.lanes.items() == 0 || (writing > 0 && !full) {
            return None;
        }
        Some(queue.lanes.take_batch(bytes_max, items_max))
    }

    fn propose(&mut self, proposals: Vec<Proposal<R>>) {
        let frame = frame::encode(proposals.iter().map(|proposal| &proposal.command));
        if let Err(error) = self.raw.propose(Vec::new(), frame) {
            // The leader is handing over: nothing was appended.
            tracing::debug!(%error, "propose batch");
            self.shared.refuse(proposals, ProposeError::NotLeader { leader: None });
            return;
        }
        let at = Position { index: self.raw.raft.raft_log.last_index(), term: self.raw.raft.term };
        let bytes = Batch::bytes_of(&proposals);
        let replies = proposals.into_iter().map(|proposal| proposal.reply).collect();
        self.shared.waiting.register(Batch { at, bytes, replies });
        self.unpersisted.push_back(at.index);
    }

    fn begin_read_round(&mut self) {
        // Before it has committed in its own term a leader does not know what is committed; raft would ignore the round.
        let can_ask =
            if self.is_leader() { self.raw.raft.commit_to_current_term() } else { self.raw.raft.leader_id != 0 };
        if can_ask && self.reads.wants_round() {
            let name = self.reads.begin();
            self.raw.read_index(name);
        }
    }

    fn publish(&mut self) {
        let raft = &self.raw.raft;
        let is_leader = raft.state == StateRole::Leader;
        let now = Leadership { term: raft.term, leader_id: raft.leader_id, is_leader };
        let reads_freely = self.may_read_freely();
        let status = &self.shared.status;
        status.term.store(now.term, Ordering::Release);
        status.leader_id.store(now.leader_id, Ordering::Release);
        status.is_leader.store(is_leader, Ordering::Release);
        status.commit_index.store(self.raw.raft.raft_log.committed, Ordering::Release);
        status.last_index.store(self.raw.raft.raft_log.last_index(), Ordering::Release);
        status.reads_freely.store(reads_freely, Ordering::Release);
        self.shared.leadership.send_if_modified(|before| {
            if now.leader_id != 0 && now.leader_id != before.leader_id {
                self.shared.metrics.leader_changes.fetch_add(1, Ordering::Relaxed);
            }
            std::mem::replace(before, now) != now
        });
    }

    /// Whether what is applied here is all that anybody was ever told is written; see `StatusCells::reads_freely`.
    fn may_read_freely(&mut self) -> bool {
        let raft = &self.raw.raft;
        if !self.is_sole_voter() || !self.is_leader() || !raft.commit_to_current_term() {
            self.read_floor = None;
            return false;
        }
        let (term, committed) = (raft.term, raft.raft_log.committed);
        let floor = match self.read_floor {
            Some(floor) if floor.term == term => floor,
            _ => *self.read_floor.insert(Position { index: committed, term }),
        };
        self.shared.status.applied_index.load(Ordering::Acquire) >= floor.index
    }

    pub(crate) fn is_leader(&self) -> bool {
        self.raw.raft.state == StateRole::Leader
    }

    pub(crate) fn is_sole_voter(&self) -> bool {
        self.conf.state.voters == [self.config.id] && self.conf.state.voters_outgoing.is_empty()
    }

    fn not_leader(&self) -> ProposeError {
        let leader = self.raw.raft.leader_id;
        ProposeError::NotLeader { leader: (leader != 0 && leader != self.config.id).then_some(leader) }
    }
}

pub(crate) fn raft_fault(error: raft::Error) -> Fault {
    Fault::Engine(format!("raft: {error}"))
}
