//! The one thread that owns raft: a closed [`Event`], one loop.
//!
//! Each turn takes the events that are there, then looks at everything they may have made possible: proposing the next
//! batch, beginning a read round, carrying out what raft is ready for ([`ready`](crate::ready)), publishing the state. The
//! thread never waits for another one: writes go into a queue that the log thread empties whole, the apply thread
//! follows a watermark, transports drop. So the other threads may wait for it.
//!
//! Batching. While nothing of ours is on its way, whatever waits is proposed at once: one client alone has no delay. While
//! something is, a batch is proposed only if it is full, else it keeps filling until that has arrived: on this disk, or, with
//! other voters, on a quorum's. So small loads cost one sync per batch, large ones keep the disks busy. What is forwarded to a
//! leader goes by the same rule, and has arrived when the leader says so.
//!
//! A sole voter writes its log on this thread: nobody else's messages wait here, its reads need no round, and two changes of
//! threads for each sync are spared (decision 0003). Proposals fill the next batch meanwhile, as they would otherwise.

mod members;
mod propose;
mod snapshots;

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::Bytes;
use raft::eraftpb::{Entry, MessageType};
use raft::{RawNode, StateRole};
use tenure_storage::Fault;
use tokio::sync::oneshot;

use crate::apply::{self, ApplyHere, ApplySignal};
use crate::config::Config;
use crate::error::ChangeError;
use crate::events::EventReceiver;
use crate::forward::{Intakes, Sending};
use crate::log::{Conf, Log, LogWrite, Position, RaftStorage};
use crate::pending::Pending;
use crate::proposals::Waiter;
use crate::read_index::Role;
use crate::shared::{Leadership, Progress, Shared, read_message};
use crate::snapshot::{self, SnapshotOffer};
use crate::transport::{Message, PeerMessage, Transport};
use crate::writer::WriteQueue;

pub(crate) use self::snapshots::Snapshots;

/// One step of who is in the group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MembersChange {
    /// Joins, or a learner gets its vote.
    AddVoter(u64),
    AddLearner(u64),
    Remove(u64),
}

/// Who waits for a change of members: whether it was proposed, then what became of it.
pub(crate) type ChangeReply<R> = oneshot::Sender<Result<Pending<R>, ChangeError>>;

/// Everything that can make this member act. Adding work means adding a variant here.
pub(crate) enum Event<R> {
    /// A tick of raft's clock is due.
    Tick,
    /// Proposals wait in the lanes.
    Proposals,
    Message(Box<PeerMessage>),
    /// Readers wait for a round.
    Readers,
    /// The `Ready` of this number and all before are durable.
    Persisted(u64),
    /// The applied index in the status moved.
    Applied,
    /// The durable index in the status moved: the log can be truncated.
    Durable,
    /// The snapshot that was announced is the state now.
    Installed,
    /// A snapshot of the state as of this index was written, or could not be.
    SnapshotMade(Result<(u64, PathBuf, u64), Fault>),
    /// What a peer offered is here, or could not be had.
    Fetched {
        offer: SnapshotOffer,
        complete: bool,
    },
    Change {
        change: MembersChange,
        /// The change before it, that whoever decided on this one knew of.
        seen: u64,
        command: Bytes,
        reply: ChangeReply<R>,
    },
    /// Hand over to this member; 0: to whoever is furthest.
    Transfer(u64),
    /// Messages to this member do not get through.
    Unreachable(u64),
    /// The stopping flag is set.
    Stop,
}

impl<R> From<apply::Progress> for Event<R> {
    fn from(progress: apply::Progress) -> Self {
        match progress {
            apply::Progress::Applied => Event::Applied,
            apply::Progress::Durable => Event::Durable,
            apply::Progress::Installed => Event::Installed,
        }
    }
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
    /// For what this thread applies itself; see [`Node::let_apply`].
    pub(crate) applier: Option<Arc<dyn ApplyHere>>,
    pub(crate) transport: Box<dyn Transport>,
    /// What this turn has to send: goes together, so that what is for one member goes in one frame.
    pub(crate) outgoing: Vec<PeerMessage>,
    /// Of what the role followed that was published last.
    pub(crate) read_role: ReadRoleOf,
    pub(crate) events: EventReceiver<Event<R>>,
    pub(crate) next_tick: Instant,
    /// Indexes of our batches that a further one waits for, oldest first: see [`Node::forget_arrived`].
    pub(crate) underway: VecDeque<u64>,
    pub(crate) outbox: crate::ready::Outbox,
    /// What raft wants saved but needs no sync for: goes with the next write.
    pub(crate) unsaved: LogWrite,
    pub(crate) conf: Conf,
    /// The term in which we may read freely, and from which applied index on.
    pub(crate) read_floor: Option<Position>,
    /// A write was done on this thread: there may be more to do without any event's saying so.
    pub(crate) again: bool,
    /// What we forward to a leader, and what we take from members as one.
    pub(crate) sending: Sending,
    pub(crate) intakes: Intakes,
    /// The term that this member led when it last looked.
    pub(crate) leads_term: Option<u64>,
    /// What the other members were told is committed, if this one leads; see [`Node::tell_commit`].
    pub(crate) told_committed: u64,
    pub(crate) disk: DiskWatch,
    pub(crate) snapshots: Snapshots,
}

/// Of what a [`Role`] follows: as long as it is the same, so is the role.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct ReadRoleOf {
    term: u64,
    leader_id: u64,
    is_leader: bool,
    has_committed: bool,
    conf_index: u64,
}

/// For how many ticks the log's disk has taken nothing.
#[derive(Default)]
pub(crate) struct DiskWatch {
    persisted_index: u64,
    ticks: usize,
}

/// For so many election timeouts a leader's disk may take nothing before it hands over.
const DISK_PATIENCE_TIMEOUTS: usize = 5;

impl<R: Send + 'static> Node<R> {
    /// Runs until asked to stop.
    ///
    /// # Errors
    /// The log's faults; the member must stop.
    pub(crate) fn run(mut self) -> Result<(), Fault> {
        self.begin()?;
        while !self.shared.stopping() {
            let event = self.next_event();
            self.on_event(event)?;
            for _ in 1..EVENTS_PER_TURN {
                let Ok(event) = self.events.try_recv() else { break };
                self.on_event(event)?;
            }
            self.settle()?;
        }
        Ok(())
    }

    /// What comes before any event.
    ///
    /// # Errors
    /// As [`Node::run`].
    pub(crate) fn begin(&mut self) -> Result<(), Fault> {
        if self.is_sole_voter() {
            // There is nobody to ask, so there is nothing to wait for.
            self.raw.campaign().map_err(raft_fault)?;
        }
        self.settle()
    }

    /// The next event; a due tick goes before whatever waits in the queue.
    fn next_event(&mut self) -> Event<R> {
        let now = Instant::now();
        if now < self.next_tick {
            if std::mem::take(&mut self.again) {
                return self.events.try_recv().unwrap_or(Event::Proposals);
            }
            if let Some(event) = self.events.recv_until(self.next_tick) {
                return event;
            }
        }
        // After a stall, time goes on from now: a burst of ticks would start elections for nothing.
        let tick = Duration::from_millis(self.config.tick_ms);
        self.next_tick = (self.next_tick + tick).max(Instant::now());
        Event::Tick
    }

    pub(crate) fn on_event(&mut self, event: Event<R>) -> Result<(), Fault> {
        match event {
            Event::Tick => self.on_tick(),
            Event::Message(message) => match *message {
                PeerMessage::Raft(message) => self.on_message(message)?,
                PeerMessage::Forward(message) => self.on_forward(message),
                PeerMessage::Forwarded(message) => self.on_forwarded(&message),
            },
            Event::Persisted(number) => self.on_persisted(number),
            Event::Applied => self.on_applied(),
            Event::Durable => {
                self.on_applied();
                self.truncate()?;
            }
            Event::Installed => self.on_installed(),
            Event::SnapshotMade(made) => self.on_snapshot_made(made)?,
            Event::Fetched { offer, complete } => self.on_fetched(offer, complete),
            Event::Change { change, seen, command, reply } => self.on_change(change, seen, command, reply),
            Event::Transfer(to) => self.transfer(to),
            Event::Unreachable(id) => {
                self.raw.report_unreachable(id);
                let again = self.shared.reads.lock().on_unreachable(id, self.raw.raft.term);
                self.ask_again(again);
            }
            Event::Proposals | Event::Readers | Event::Stop => {}
        }
        Ok(())
    }

    fn on_tick(&mut self) {
        if self.lacks_entries() {
            // Its time goes on: it need not wait for an election anew.
            self.raw.raft.election_elapsed += 1;
        } else {
            self.raw.tick();
        }
        let (again, timed_out) = {
            let mut reads = self.shared.reads.lock();
            (reads.on_tick(self.raw.raft.term), reads.timed_out)
        };
        self.ask_again(again);
        if self.shared.metrics.reads_failed.swap(timed_out, Ordering::Relaxed) < timed_out {
            self.shared.metrics.read_rounds_repeated.fetch_add(1, Ordering::Relaxed);
        }
        if self.raw.raft.leader_id == 0 {
            // What nobody waits for any more must not take the room of what comes.
            self.shared.queue.lock().lanes.retain(|proposal| !proposal.is_abandoned());
        }
        if self.sending.on_tick() {
            self.send_again();
        }
        self.watch_disk();
        self.offer_snapshots();
        self.publish_progress();
    }

    /// Asks for a read round once more, whose name this is.
    fn ask_again(&mut self, name: Option<Vec<u8>>) {
        if let Some(name) = name {
            self.shared.metrics.read_rounds_repeated.fetch_add(1, Ordering::Relaxed);
            self.raw.read_index(name);
        }
    }

    /// A leader whose disk hangs goes on sending heartbeats, so nobody stands for election; but it may apply only what is on its disk, and
    /// what waits for its answer, or its lease, waits for ever. It hands over, and cannot come back: its vote waits for the disk too.
    fn watch_disk(&mut self) {
        let log = &self.raw.raft.raft_log;
        let persisted_index = log.persisted;
        if persisted_index == log.last_index() || persisted_index != self.disk.persisted_index {
            self.disk = DiskWatch { persisted_index, ticks: 0 };
            return;
        }
        self.disk.ticks += 1;
        let patience = DISK_PATIENCE_TIMEOUTS * self.config.election_timeout_ticks;
        if self.disk.ticks.is_multiple_of(patience) && self.is_leader() && !self.is_alone() {
            let stood_still_ms = self.disk.ticks as u64 * self.config.tick_ms;
            tracing::warn!(stood_still_ms, "the log's disk takes nothing: hand leadership over");
            self.transfer(0);
        }
    }

    /// # Errors
    /// [`Fault::Outdated`].
    fn on_message(&mut self, message: Box<Message>) -> Result<(), Fault> {
        let last_index = self.raw.raft.raft_log.last_index();
        if message.get_msg_type() == MessageType::MsgHeartbeat
            && message.term >= self.raw.raft.term
            && message.commit > last_index
        {
            // A leader says no more than what this member has acknowledged to it.
            return Err(Fault::Outdated { last_index, acknowledged_index: message.commit });
        }
        self.on_raft_message(message);
        Ok(())
    }

    fn on_raft_message(&mut self, mut message: Box<Message>) {
        match message.get_msg_type() {
            // Commands come as `Forward`.
            MessageType::MsgPropose => return,
            // Raft takes for granted that it has the round's name.
            MessageType::MsgReadIndex if message.entries.is_empty() => return,
            MessageType::MsgReadIndex if self.is_leader() => {
                let name = message.take_entries().iter_mut().next().map(Entry::take_data).unwrap_or_default().to_vec();
                // As things are now.
                self.publish_read_role();
                if self.shared.reads.lock().answers_in_term(message.from, &name).is_some() {
                    return self.answer_read_requests([(message.from, name)], self.raw.raft.raft_log.committed);
                }
                // A reader like any other: it joins our next round.
                return self.shared.reads.lock().join_member(message.from, name);
            }
            MessageType::MsgReadIndex => {}
            MessageType::MsgHeartbeatResponse if !message.context.is_empty() => {
                let (name, mut reads) = (&message.context, self.shared.reads.lock());
                if let Some(index) = reads.index_followed(message.from, name, message.term) {
                    let members = reads.confirm(name, index);
                    drop(reads);
                    self.answer_read_requests(members, index);
                }
            }
            MessageType::MsgSnapshot => return self.on_offer(message),
            MessageType::MsgAppend => {
                let full = self.writes.bytes() > self.config.append_queue_bytes_max
                    || (self.append_paused() && !message.entries.is_empty());
                // What follows a snapshot comes again when it is installed.
                if full || self.snapshots.installing.is_some() {
                    self.shared.metrics.messages_dropped.fetch_add(1, Ordering::Relaxed);
                    return;
                }
            }
            MessageType::MsgTimeoutNow if self.lacks_entries() => return,
            MessageType::MsgHup
            | MessageType::MsgBeat
            | MessageType::MsgAppendResponse
            | MessageType::MsgRequestVote
            | MessageType::MsgRequestVoteResponse
            | MessageType::MsgHeartbeat
            | MessageType::MsgHeartbeatResponse
            | MessageType::MsgUnreachable
            | MessageType::MsgSnapStatus
            | MessageType::MsgCheckQuorum
            | MessageType::MsgTransferLeader
            | MessageType::MsgTimeoutNow
            | MessageType::MsgReadIndexResp
            | MessageType::MsgRequestPreVote
            | MessageType::MsgRequestPreVoteResponse => {}
        }
        self.step(*message);
    }

    fn step(&mut self, message: Message) {
        if let Err(error) = self.raw.step(message) {
            tracing::debug!(%error, "step message");
        }
    }

    pub(crate) fn on_applied(&mut self) {
        let applied = self.shared.status.applied_index.load(Ordering::Acquire);
        // Of a snapshot raft first wants to hear that it is on disk.
        let applied = applied.min(self.raw.raft.raft_log.persisted);
        if applied > self.raw.raft.raft_log.applied {
            self.raw.advance_apply_to(applied);
            self.answer_reads(applied);
        }
    }

    fn answer_reads(&mut self, applied_index: u64) {
        let ready = self.shared.reads.lock().take_applied(applied_index);
        if !ready.is_empty() {
            self.shared.allow_reads(ready, applied_index);
        }
    }

    /// Takes what the state has durably out of the log, but for the newest entries, which members that are a little behind
    /// need, and those after a snapshot that is on its way.
    fn truncate(&mut self) -> Result<(), Fault> {
        if self.snapshots.making || self.snapshots.installing.is_some() {
            return Ok(());
        }
        // The apply thread may be ahead of what raft has heard.
        let durable = self.shared.status.durable_index.load(Ordering::Acquire);
        let mut through = durable.min(self.raw.raft.raft_log.applied);
        if !self.is_alone() {
            let catchup = self.config.log_catchup_bytes;
            let newest = self.raw.raft.raft_log.applied.saturating_sub(self.config.log_catchup_entries);
            through = through.min(newest.max(self.log.index_before_last(catchup)));
            if let Some((at, bytes)) = self.log.outgoing.at() {
                let least = catchup.max(self.config.log_bytes_flush) * snapshot::KEPT_FOR_SNAPSHOT;
                let kept = bytes.clamp(least, least * snapshot::KEPT_FOR_SNAPSHOT_MAX);
                through = through.min(at.index.max(self.log.index_before_last(kept)));
            }
        }
        if through > self.log.truncated().index {
            self.writes.push_truncate(self.log.hide_through(through)?);
        }
        Ok(())
    }

    /// Does all that the last events made possible.
    pub(crate) fn settle(&mut self) -> Result<(), Fault> {
        self.notice_new_term();
        self.propose_batches();
        self.tell_commit();
        self.begin_read_round();
        self.finish_joint_change();
        self.on_all_ready()?;
        // What was ready may have ended a round, and others wait for the next.
        while self.begin_read_round() {
            self.on_all_ready()?;
        }
        self.flush();
        self.make_snapshot();
        // A read round of a single voter is confirmed at once.
        self.answer_reads(self.shared.status.applied_index.load(Ordering::Acquire));
        self.publish();
        Ok(())
    }

    /// Sends what there is to send: before this thread waits for the disk, and when it has nothing more to do.
    pub(crate) fn flush(&mut self) {
        self.publish_read_role();
        if !self.outgoing.is_empty() {
            self.transport.send(std::mem::take(&mut self.outgoing));
        }
    }

    fn on_all_ready(&mut self) -> Result<(), Fault> {
        while self.snapshots.installing.is_none() && self.raw.has_ready() {
            self.on_ready()?;
        }
        Ok(())
    }

    /// What other members sent us to propose was for the term they sent it in. Leadership may end anywhere in a turn: at a message, or at
    /// the entry that removes this member.
    fn notice_new_term(&mut self) {
        let leads_term = self.is_leader().then_some(self.raw.raft.term);
        if self.leads_term.is_some() && self.leads_term != leads_term {
            self.underway.clear();
            self.shared.reads.lock().forget_members();
            let mut queue = self.shared.queue.lock();
            queue.lanes.retain(|proposal| matches!(proposal.waiter, Waiter::Local(_)));
        }
        self.leads_term = leads_term;
    }

    /// A sole voter's batch has arrived when it is on its disk, which is known first; anybody else's when it is committed.
    pub(crate) fn forget_arrived(&mut self) {
        let log = &self.raw.raft.raft_log;
        let arrived = if self.is_sole_voter() { log.persisted } else { log.committed };
        while self.underway.front().is_some_and(|index| *index <= arrived) {
            self.underway.pop_front();
        }
    }

    fn publish_progress(&mut self) {
        let mut progress = self.shared.progress.write();
        if !self.is_leader() {
            if !progress.is_empty() {
                *progress = Arc::from(Vec::new());
            }
            return;
        }
        let own = self.config.id;
        let conf = &self.conf.state;
        *progress = self
            .raw
            .raft
            .prs()
            .iter()
            .map(|(id, of)| Progress {
                id: *id,
                matched_index: of.matched,
                is_active: of.recent_active || *id == own,
                is_learner: conf.learners.contains(id),
            })
            .collect();
    }

    /// Says what others may do for readers, before anything leaves by which another member could know more: a vote in a later term, or that
    /// more is committed.
    fn publish_read_role(&mut self) {
        let raft = &self.raw.raft;
        self.shared.status.commit_index.fetch_max(raft.raft_log.committed, Ordering::AcqRel);
        let is_leader = raft.state == StateRole::Leader;
        let of = ReadRoleOf {
            term: raft.term,
            leader_id: raft.leader_id,
            is_leader,
            has_committed: is_leader && raft.commit_to_current_term(),
            conf_index: self.conf.index,
        };
        if of == self.read_role {
            return;
        }
        let (own, members, conf) = (self.config.id, raft.prs(), &self.conf.state);
        // A learner beside a sole voter is none.
        let is_voter = |id: &u64| conf.voters.contains(id) || conf.voters_outgoing.contains(id);
        let is_quorum = |id: &u64| *id != own && is_voter(id) && members.has_quorum(&[own, *id].into_iter().collect());
        let role = match of {
            ReadRoleOf { term, has_committed: true, .. } => {
                Role::Answers { term, members: members.iter().map(|(id, _)| *id).filter(is_quorum).collect() }
            }
            ReadRoleOf { term, leader_id: leader @ 1.., is_leader: false, .. } => Role::Asks { term, leader },
            ReadRoleOf { .. } => Role::None,
        };
        self.read_role = of;
        self.shared.reads.lock().set_role(role);
    }

    /// Answers members' requests with an index that was committed, and confirmed, after they were made.
    pub(crate) fn answer_read_requests(&mut self, members: impl IntoIterator<Item = (u64, Vec<u8>)>, index: u64) {
        if !self.is_leader() {
            return;
        }
        let answer = |(to, name): (u64, Vec<u8>)| {
            let answer = read_message(MessageType::MsgReadIndexResp, self.config.id, to, name);
            Message { index, term: self.raw.raft.term, ..answer }
        };
        let answers = members.into_iter().map(answer).collect();
        self.send(answers);
    }

    /// Begins the next round if somebody waits for it, none is under way, and there is somebody to ask. Gives whether raft was asked for it.
    fn begin_read_round(&mut self) -> bool {
        // Before it has committed in its own term a leader does not know what is committed; raft would ignore the round.
        let can_begin =
            if self.is_leader() { self.raw.raft.commit_to_current_term() } else { self.raw.raft.leader_id != 0 };
        if !self.shared.reads.lock().take(can_begin) {
            return false;
        }
        // As things are now.
        self.publish_read_role();
        let mut reads = self.shared.reads.lock();
        if reads.can_ask() {
            drop(reads);
            self.shared.begin_here();
            return false;
        }
        let begins = reads.wants_round();
        if begins {
            let name = reads.begin(self.raw.raft.term);
            self.raw.read_index(name);
        }
        begins
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
        // A learner may have applied more than the leader, and tells its clients.
        if !self.is_alone() || !self.is_leader() || !raft.commit_to_current_term() {
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

    /// Whether a snapshot is on its way into the state. Then raft believes that nothing is applied of what the snapshot stands for, and whoever
    /// stands for election looks for changes of members in what is not applied: in entries that are not there. So it must not.
    fn lacks_entries(&self) -> bool {
        self.raw.raft.raft_log.applied < self.log.truncated().index
    }

    fn append_paused(&self) -> bool {
        self.config.append_paused.load(Ordering::Relaxed)
    }

    pub(crate) fn is_leader(&self) -> bool {
        self.raw.raft.state == StateRole::Leader
    }

    pub(crate) fn is_sole_voter(&self) -> bool {
        self.conf.state.voters == [self.config.id] && self.conf.state.voters_outgoing.is_empty()
    }

    /// Whether nobody else is in the group.
    fn is_alone(&self) -> bool {
        self.is_sole_voter() && self.conf.state.learners.is_empty()
    }
}

pub(crate) fn raft_fault(error: raft::Error) -> Fault {
    Fault::Engine(format!("raft: {error}"))
}
