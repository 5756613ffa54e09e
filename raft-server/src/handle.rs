//! What the layers above see of a member.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use tokio::sync::{oneshot, watch};

use crate::error::{ChangeError, ProposeError, ReadError};
use crate::log::Position;
use crate::metrics::Metrics;
use crate::node::{Event, MembersChange};
use crate::pending::Pending;
use crate::proposals::{Proposal, Waiter};
use crate::shared::{Leadership, Progress, Shared};
use crate::snapshot::{OutgoingSnapshot, SnapshotOffer};
use crate::transport::PeerMessage;

/// A member, seen from outside. Cheap to clone; outlives the member, and then refuses everything.
pub struct Handle<R> {
    shared: Arc<Shared<R>>,
    limits: Limits,
}

/// The part of the configuration that proposers meet.
#[derive(Clone, Copy)]
pub(crate) struct Limits {
    pub(crate) command_bytes_max: usize,
    pub(crate) cost_bytes: fn(&Bytes) -> usize,
    pub(crate) batch_bytes_max: usize,
    pub(crate) read_waiters_max: u64,
}

/// A member's state, each field right for some moment; see [`Handle::status`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Status {
    pub id: u64,
    pub term: u64,
    /// 0: nobody that this member knows of.
    pub leader_id: u64,
    pub is_leader: bool,
    /// Highest index known to be on a quorum of disks.
    pub commit_index: u64,
    /// Highest index whose effects are in this member's state.
    pub applied_index: u64,
    /// Highest index in the state that is known to survive power loss; the log has the rest.
    pub durable_index: u64,
    /// Highest index in this member's log, committed or not.
    pub last_index: u64,
    /// Commands waiting for a batch or for their reply.
    pub proposals_pending: u64,
    /// How many vote.
    pub voters: u64,
    /// Whether this member is in the group without a vote.
    pub is_learner: bool,
}

impl<R> Clone for Handle<R> {
    fn clone(&self) -> Self {
        Handle { shared: Arc::clone(&self.shared), limits: self.limits }
    }
}

impl<R: Send + 'static> Handle<R> {
    pub(crate) fn new(shared: Arc<Shared<R>>, limits: Limits) -> Self {
        Handle { shared, limits }
    }

    #[cfg(test)]
    pub(crate) fn shared(&self) -> &Arc<Shared<R>> {
        &self.shared
    }

    /// This member's id.
    pub fn id(&self) -> u64 {
        self.shared.id
    }

    /// Resolves once the command is committed (durable on a quorum) and applied here, with the state machine's reply; any
    /// member will do, one that does not lead forwards it. Commands of one lane that are proposed one after the other
    /// are applied in that order, each once.
    ///
    /// Without a leader it waits for one: give it a time limit. Dropping the future takes the command back only if it is not on
    /// its way yet.
    ///
    /// # Errors
    /// Each variant says whether the command may still take effect and what to do.
    pub async fn propose(&self, lane: u32, command: Bytes) -> Result<R, ProposeError> {
        self.enqueue(lane, command, None)?.await
    }

    /// As [`Handle::propose`], for who knows what [`Config::cost_bytes`](crate::Config::cost_bytes) says of the command.
    ///
    /// # Errors
    /// As [`Handle::propose`].
    pub async fn propose_counted(&self, lane: u32, command: Bytes, cost_bytes: usize) -> Result<R, ProposeError> {
        self.enqueue_counted(lane, command, cost_bytes, None)?.await
    }

    /// As [`Handle::propose`], for what only the leader of one term may decide: the command is proposed by this member in that term,
    /// or never.
    ///
    /// # Errors
    /// As [`Handle::propose`]; [`ProposeError::OtherTerm`].
    pub async fn propose_in_term(&self, term: u64, lane: u32, command: Bytes) -> Result<R, ProposeError> {
        self.enqueue(lane, command, Some(term))?.await
    }

    /// As [`Handle::propose`], for threads without an async runtime: it holds its thread.
    ///
    /// # Errors
    /// As [`Handle::propose`].
    pub fn propose_blocking(&self, lane: u32, command: Bytes) -> Result<R, ProposeError> {
        self.enqueue(lane, command, None)?.blocking_recv()
    }

    pub(crate) fn enqueue(&self, lane: u32, command: Bytes, only_in: Option<u64>) -> Result<Pending<R>, ProposeError> {
        let cost_bytes = (self.limits.cost_bytes)(&command);
        self.enqueue_counted(lane, command, cost_bytes, only_in)
    }

    fn enqueue_counted(
        &self,
        lane: u32,
        command: Bytes,
        cost_bytes: usize,
        only_in: Option<u64>,
    ) -> Result<Pending<R>, ProposeError> {
        let refused = |error| {
            self.shared.metrics.proposals_failed.fetch_add(1, Ordering::Relaxed);
            Err(error)
        };
        if command.len() > self.limits.command_bytes_max {
            return refused(ProposeError::TooLarge);
        }
        if self.shared.stopping() {
            return refused(ProposeError::Stopped);
        }
        let (reply, receiver) = oneshot::channel();
        let bytes = command.len();
        let ring = {
            let mut queue = self.shared.queue.lock();
            let before = queue.lanes.cost_bytes();
            let proposal = Proposal { lane, command, cost_bytes, waiter: Waiter::Local(reply), only_in };
            if let Err((error, _)) = queue.lanes.push(lane, bytes, cost_bytes, proposal) {
                drop(queue);
                return refused(error.into());
            }
            self.shared.metrics.proposals_pending.fetch_add(1, Ordering::Relaxed);
            let batch_full = (before..queue.lanes.cost_bytes()).contains(&self.limits.batch_bytes_max);
            !std::mem::replace(&mut queue.rung, true) || batch_full
        };
        if ring {
            // If the queue is full, raft's thread is awake and looks at the lanes after every event.
            let _ = self.shared.events.try_send(Event::Proposals);
        }
        Ok(Pending::new(receiver, Arc::clone(&self.shared.metrics)))
    }

    /// A point from which a local read is linearizable: when this resolves, every write acknowledged anywhere before the
    /// call is applied here. Gives an applied index at or after that point.
    ///
    /// One ReadIndex round serves all who wait. A member that is alone needs none: it answers from memory.
    ///
    /// # Errors
    /// See [`ReadError`]; nothing was changed, so a retry is always safe.
    pub async fn read_barrier(&self) -> Result<u64, ReadError> {
        match self.read_point_now() {
            Some(applied_index) => Ok(applied_index),
            None => self.wait_for_round().await,
        }
    }

    /// The read point, if this member needs no round to know it; see [`Handle::read_barrier`].
    pub fn read_point_now(&self) -> Option<u64> {
        let status = &self.shared.status;
        // In this order: the index may only be read once it is known to be enough.
        status.reads_freely.load(Ordering::Acquire).then(|| status.applied_index.load(Ordering::Acquire))
    }

    async fn wait_for_round(&self) -> Result<u64, ReadError> {
        if self.shared.stopping() {
            return Err(ReadError::Stopped);
        }
        let waiters = &self.shared.read_waiters;
        let _seat = Seat(waiters);
        if waiters.fetch_add(1, Ordering::Relaxed) >= self.limits.read_waiters_max {
            return Err(ReadError::QueueFull);
        }
        let (sender, receiver) = oneshot::channel();
        self.shared.join_readers(sender)?;
        receiver.await.unwrap_or(Err(ReadError::Stopped))
    }

    /// From atomics: never blocks, never waits for raft's thread.
    pub fn status(&self) -> Status {
        let cells = &self.shared.status;
        Status {
            id: self.shared.id,
            term: cells.term.load(Ordering::Acquire),
            leader_id: cells.leader_id.load(Ordering::Acquire),
            is_leader: cells.is_leader.load(Ordering::Acquire),
            commit_index: cells.commit_index.load(Ordering::Acquire),
            applied_index: cells.applied_index.load(Ordering::Acquire),
            durable_index: cells.durable_index.load(Ordering::Acquire),
            last_index: cells.last_index.load(Ordering::Acquire),
            proposals_pending: self.shared.metrics.proposals_pending(),
            voters: cells.voters.load(Ordering::Acquire),
            is_learner: cells.is_learner.load(Ordering::Acquire),
        }
    }

    /// Ids of the voters, ascending.
    pub fn voters(&self) -> Arc<[u64]> {
        Arc::clone(&self.shared.members.read())
    }

    /// Follows who leads, for instance to run a leader's timers. Sees the newest state, not every one in between.
    pub fn leadership(&self) -> watch::Receiver<Leadership> {
        self.shared.leadership.subscribe()
    }

    pub fn metrics(&self) -> &Metrics {
        &self.shared.metrics
    }

    /// How far each member has come, as this one knows while it leads; else nobody. As of the last tick.
    pub fn progress(&self) -> Arc<[Progress]> {
        Arc::clone(&self.shared.progress.read())
    }

    /// Hands over a message from a peer. Drops it at the bound of the event queue; it is repeated.
    pub fn deliver(&self, message: PeerMessage) {
        self.deliver_all(vec![message]);
    }

    /// Hands over messages that came together, so that they are looked at together: of a member's answer to a read round and its own
    /// question beside it, the question is to be there when the next round begins. What is about reads is mostly done here, on the calling thread.
    pub fn deliver_all(&self, messages: Vec<PeerMessage>) {
        let messages = messages.into_iter().filter_map(|message| self.shared.take_read_message(message));
        let messages = messages.map(|message| Event::Message(Box::new(message)));
        let dropped = self.shared.events.try_send_all(messages);
        self.shared.metrics.messages_dropped.fetch_add(dropped, Ordering::Relaxed);
    }

    /// The peer could not be reached: raft sends it less until it answers.
    pub fn report_unreachable(&self, id: u64) {
        let _ = self.shared.events.try_send(Event::Unreachable(id));
    }

    /// A snapshot that this member offers, for its transport to send. The files stay for as long as it is held.
    pub fn outgoing_snapshot(&self, at: Position) -> Option<Arc<OutgoingSnapshot>> {
        self.shared.outgoing.named(at)
    }

    /// The transport's answer to [`Transport::fetch`](crate::Transport::fetch): the directory is complete and durable, or it
    /// could not be fetched. Not for an async thread: it waits for room in the event queue.
    pub fn snapshot_fetched(&self, offer: SnapshotOffer, complete: bool) {
        let _ = self.shared.events.send(Event::Fetched { offer, complete });
    }

    /// Index of the newest change of members that is in force: once it is applied here, the state machine knows of it. 0: none yet.
    pub fn conf_index(&self) -> u64 {
        self.shared.status.conf_index.load(Ordering::Acquire)
    }

    /// Changes who is in the group, on the leader, together with the command that records it, if the newest change in force is
    /// still the one at index `seen` ([`Handle::conf_index`]): that whoever decides on this one has looked at. Resolves as
    /// [`Handle::propose`] does; the change is in force here before that.
    ///
    /// # Errors
    /// See [`ChangeError`].
    pub async fn change_members(&self, change: MembersChange, seen: u64, command: Bytes) -> Result<R, ChangeError> {
        let (reply, receiver) = oneshot::channel();
        let event = Event::Change { change, seen, command, reply };
        self.shared.events.try_send(event).map_err(|_| ChangeError::Propose(ProposeError::QueueFull))?;
        let proposed = receiver.await.unwrap_or(Err(ChangeError::Propose(ProposeError::Stopped)))?;
        Ok(proposed.await?)
    }

    /// Asks the leader, if this is it, to hand over: to that member, or to the one that is furthest if it is 0. Whether it came
    /// to that, [`Handle::leadership`] tells; raft gives up after an election timeout.
    pub fn transfer_leadership(&self, to: u64) {
        let _ = self.shared.events.try_send(Event::Transfer(to));
    }

    /// Becomes true when this member finds that it was removed from the group.
    pub fn removed(&self) -> watch::Receiver<bool> {
        self.shared.removed.subscribe()
    }

    /// This member heard from a peer that it was removed from the group.
    pub fn report_removed(&self) {
        self.shared.removed.send_replace(true);
    }

    /// Asks the member to stop; its [`JoinGuard`](crate::JoinGuard) waits for it. Commands on their way are answered
    /// with `Dropped`, waiting ones with `Stopped`.
    pub fn request_stop(&self) {
        self.shared.request_stop();
    }
}

/// A reader's place among `read_waiters_max`, taken before and given back when its future ends or is dropped.
struct Seat<'a>(&'a std::sync::atomic::AtomicU64);

impl Drop for Seat<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
