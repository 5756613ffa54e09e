//! Carrying out one `Ready`, in the order raft demands.
//!
//! Raft hands out what it wants done and goes on at once; what depends on the disk comes back as `Persisted`. Three things
//! must wait for it: committing by our own vote (raft sees to it, told by `on_persist_ready`), applying (raft hands out
//! only entries that are durable here), and a non-leader's messages, which are promises about what it has on disk
//! ([`Outbox`]). A leader's messages need not wait (Raft thesis, 10.2.1).

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use protobuf::Message as _;
use raft::eraftpb::{ConfChange, ConfChangeV2, Entry, EntryType, MessageType};
use tenure_storage::Fault;

use crate::apply::Install;
use crate::log::{Conf, LogWrite, Position};
use crate::node::{Node, raft_fault};
use crate::snapshot::SnapshotOffer;
use crate::transport::{Message, PeerMessage};
use crate::writer;

/// A `Ready` whose snapshot is being installed. Nothing further is taken from raft meanwhile.
pub(crate) struct Installing {
    offer: SnapshotOffer,
    ready_number: u64,
    write: LogWrite,
    promises: Vec<Message>,
}

/// Messages that wait for the disk. Bound: raft's own windows, since peers stop sending when they get no answer.
#[derive(Default)]
pub(crate) struct Outbox {
    /// The newest `Ready` given to the log thread, and the newest that it reported.
    written: u64,
    persisted: u64,
    held: VecDeque<Held>,
}

struct Held {
    /// The write that must be durable first; may be of an earlier `Ready` than the messages.
    after: u64,
    ready_number: u64,
    messages: Vec<Message>,
}

impl Outbox {
    /// Whether all that was to be written is.
    fn is_empty(&self) -> bool {
        self.written == self.persisted
    }
}

/// Most bytes of entries that raft's thread applies itself: a few writes of usual size. What is more takes longer than the change of
/// threads that it spares, and meanwhile the next batch could be on its way to the disk.
const APPLY_HERE_BYTES_MAX: usize = 1_500;

/// Whether a message that raft holds until the disk has been written says nothing of the disk. Who answers a heartbeat, or asks
/// for a read, says that it had not voted in a later term by then, and votes wait for the disk.
fn is_no_promise(message: &Message) -> bool {
    matches!(message.get_msg_type(), MessageType::MsgHeartbeatResponse | MessageType::MsgReadIndex)
}

impl<R: Send + 'static> Node<R> {
    /// # Errors
    /// If a committed change of members cannot be read.
    pub(crate) fn on_ready(&mut self) -> Result<(), Fault> {
        let mut ready = self.raw.ready();
        let number = ready.number();
        self.send(ready.take_messages());
        for state in ready.take_read_states() {
            let members = self.shared.reads.lock().confirm(&state.request_ctx, state.index);
            self.answer_read_requests(members, state.index);
        }
        if !ready.snapshot().is_empty() {
            return self.begin_install(ready);
        }
        // Readable first: raft looks its entries up in the log from here on.
        let entries = ready.take_entries();
        self.log.append(&entries);
        let hard_state = ready.hs().cloned();
        let committed = ready.take_committed_entries();
        let (answers, promises) = ready.take_persisted_messages().into_iter().partition(is_no_promise);
        self.send(answers);
        let must_write = ready.must_sync();
        self.raw.advance_append_async(ready);

        self.apply_conf_changes(&committed)?;
        self.unsaved.merge(LogWrite { entries, hard_state, conf: None });
        let mut written_here = false;
        if must_write {
            let write = std::mem::take(&mut self.unsaved);
            // Whatever the log thread was given before must be on the disk before this.
            written_here = self.is_sole_voter() && self.outbox.is_empty();
            self.outbox.written = number;
            if written_here {
                self.flush();
                writer::write(&self.log, &self.shared.metrics, &write)?;
            } else {
                self.writes.push(number, write);
            }
        }
        self.hold(number, promises);
        if written_here {
            self.on_persisted(number);
            self.again = true;
        }
        if let Some(last) = committed.last() {
            // Before anybody can see it applied.
            self.shared.status.last_index.fetch_max(last.index, Ordering::Release);
            self.shared.status.commit_index.fetch_max(last.index, Ordering::Release);
            let bytes = committed.iter().map(|entry| entry.data.len() + entry.context.len()).sum();
            self.let_apply(last.index, bytes)?;
        }
        Ok(())
    }

    /// Has entries applied that are committed, and durable here: by the apply thread, or on this one if there is little of it and
    /// this member is the only voter. Then nobody's messages wait for this thread, and whoever waits for the reply is spared a change of threads
    /// (decision 0003).
    fn let_apply(&mut self, commit_index: u64, bytes: usize) -> Result<(), Fault> {
        if let Some(applier) = &self.applier
            && bytes <= APPLY_HERE_BYTES_MAX
            && self.is_sole_voter()
            // Not what an earlier life left: meanwhile there would be no leader to be seen.
            && self.shared.status.reads_freely.load(Ordering::Relaxed)
            && let Some(progress) = applier.try_apply(commit_index)?
        {
            self.again = true;
            return self.on_event(progress.into());
        }
        self.apply.raise(commit_index);
        Ok(())
    }

    /// The log in memory begins after the snapshot at once, since raft looks there; the disk and the state follow on their
    /// threads, and then everything else that this `Ready` wants.
    fn begin_install(&mut self, mut ready: raft::Ready) -> Result<(), Fault> {
        let metadata = ready.snapshot().get_metadata().clone();
        let at = Position { index: metadata.index, term: metadata.term };
        let offer = self.snapshots.fetched.take().expect("raft hears only of snapshots that are here");
        assert_eq!(offer.at, at, "and of these one at a time");
        let conf = Conf { index: at.index, state: metadata.conf_state.unwrap_or_default() };
        self.apply.announce_install();
        self.log.reset(at);
        self.log.outgoing.set(None);
        self.underway.clear();
        let entries = ready.take_entries();
        self.log.append(&entries);
        assert!(ready.committed_entries().is_empty(), "nothing after a snapshot is committed before it is there");
        let hard_state = Some(self.raw.raft.hard_state());
        let path = offer.path.clone();
        let installing = Installing {
            offer,
            ready_number: ready.number(),
            write: LogWrite { entries, hard_state, conf: None },
            promises: ready.take_persisted_messages(),
        };
        self.raw.advance_append_async(ready);
        self.set_conf(conf.clone());
        // The note and the reset carry them.
        self.unsaved = LogWrite::default();
        self.snapshots.installing = Some(installing);
        self.shared.metrics.snapshots_installing.store(1, Ordering::Relaxed);
        self.writes.push_install(Install { at, conf, path });
        Ok(())
    }

    pub(crate) fn on_installed(&mut self) {
        let installing = self.snapshots.installing.take().expect("it was announced");
        self.shared.metrics.snapshots_installing.store(0, Ordering::Relaxed);
        let Installing { ready_number, write, promises, offer, .. } = installing;
        // The state machine has taken the directory over; what it did not take goes.
        crate::snapshot::remove(&offer.path);
        let applied = self.shared.status.applied_index.load(Ordering::Acquire);
        self.shared.status.last_index.fetch_max(applied, Ordering::Release);
        self.outbox.written = ready_number;
        self.writes.push(ready_number, write);
        self.hold(ready_number, promises);
    }

    /// Sends what is a promise about the disk once the disk has kept it.
    fn hold(&mut self, ready_number: u64, messages: Vec<Message>) {
        let after = self.outbox.written;
        if after <= self.outbox.persisted {
            self.send(messages);
            self.raw.on_persist_ready(ready_number);
        } else if !messages.is_empty() {
            self.outbox.held.push_back(Held { after, ready_number, messages });
        }
    }

    pub(crate) fn on_persisted(&mut self, number: u64) {
        self.outbox.persisted = number;
        self.raw.on_persist_ready(number);
        while self.outbox.held.front().is_some_and(|held| held.after <= number) {
            let held = self.outbox.held.pop_front().expect("the front was there");
            self.send(held.messages);
            self.raw.on_persist_ready(held.ready_number);
        }
        self.forget_arrived();
        self.on_applied();
    }

    pub(crate) fn send(&mut self, messages: Vec<Message>) {
        self.outgoing.extend(messages.into_iter().map(|message| PeerMessage::Raft(Box::new(message))));
    }

    /// Makes the changes of members among the entries, and writes down what came of it, here and now: an entry that the state has
    /// durably is not looked at again after a crash, so the record must be on disk before the entry is applied.
    fn apply_conf_changes(&mut self, committed: &[Entry]) -> Result<(), Fault> {
        let mut changed = false;
        for entry in committed {
            // The record may be newer than the state: then entries are replayed whose changes it contains.
            if entry.entry_type == EntryType::EntryNormal || entry.index <= self.conf.index {
                continue;
            }
            let corrupt =
                |_| Fault::Corrupt { what: "change of members in raft entry", key: entry.index.to_be_bytes().to_vec() };
            let state = if entry.entry_type == EntryType::EntryConfChange {
                self.raw.apply_conf_change(&ConfChange::parse_from_bytes(&entry.data).map_err(corrupt)?)
            } else {
                let change = ConfChangeV2::parse_from_bytes(&entry.data).map_err(corrupt)?;
                // Raft leaves a joint configuration by itself, and a new leader to be safe: the second time there is none. All
                // members see that alike.
                if change.leave_joint() && self.conf.state.voters_outgoing.is_empty() {
                    continue;
                }
                self.raw.apply_conf_change(&change)
            };
            let state = state.map_err(raft_fault)?;
            self.set_conf(Conf { index: entry.index, state });
            changed = true;
        }
        if changed {
            self.flush();
            self.log.store().append(&LogWrite { conf: Some(self.conf.clone()), ..LogWrite::default() })?;
        }
        Ok(())
    }

    pub(crate) fn set_conf(&mut self, conf: Conf) {
        let mut voters = conf.state.voters.clone();
        voters.sort_unstable();
        let own = &self.config.id;
        let is_learner = conf.state.learners.contains(own) || conf.state.learners_next.contains(own);
        self.shared.status.is_learner.store(is_learner, Ordering::Release);
        let is_member = is_learner || voters.contains(own) || conf.state.voters_outgoing.contains(own);
        // A member that joins knows of nobody until it gets the leader's snapshot, with itself in it.
        if !is_member && !voters.is_empty() {
            self.shared.removed.send_replace(true);
            if self.is_leader() {
                // Raft would lead on, without a place of its own among those that it counts.
                let term = self.raw.raft.term;
                self.raw.raft.become_follower(term, raft::INVALID_ID);
            }
        }
        self.shared.status.voters.store(voters.len() as u64, Ordering::Release);
        self.shared.status.conf_index.store(conf.index, Ordering::Release);
        // Another member may acknowledge writes from now on.
        self.shared.status.reads_freely.store(false, Ordering::Release);
        *self.shared.members.write() = Arc::from(voters);
        self.conf = conf;
    }
}
