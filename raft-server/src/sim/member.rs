//! One simulated member: the life it has now. Its disk outlives it.
//!
//! A life ends at the first [`Fault`]: memory has none, so the power is gone.

use std::collections::{BTreeMap, VecDeque};
use std::path::Path;
use std::sync::Arc;

use parking_lot::Mutex;
use tenure_storage::{Fault, MemoryEngine, NoObserver, Outcome, StateMachine as Storage, Store, TenantId};

use super::disk::Disk;
use super::world::Bug;
use crate::log::Conf;
use crate::read_index::Role;
use crate::server::{Assembled, assemble};
use crate::snapshot::SnapshotOffer;
use crate::transport::{PeerMessage, SendFromAnywhere, Transport};
use crate::writer::{self, Queued, Written};
use crate::{CommittedEntry, Config, Handle, LogStore, Snapshotter, StateMachine};

/// What a member sends, until the world takes it.
#[derive(Default)]
pub(super) struct Sent {
    pub(super) messages: Vec<PeerMessage>,
    pub(super) offer: Option<SnapshotOffer>,
}

struct SimTransport(Arc<Mutex<Sent>>);

impl Transport for SimTransport {
    fn send(&mut self, messages: Vec<PeerMessage>) {
        self.0.lock().messages.extend(messages);
    }

    fn sender(&self) -> Option<Arc<dyn SendFromAnywhere>> {
        Some(Arc::new(SimTransport(Arc::clone(&self.0))))
    }

    fn fetch(&mut self, offer: SnapshotOffer) {
        self.0.lock().offer = Some(offer);
    }
}

impl SendFromAnywhere for SimTransport {
    fn send(&self, message: PeerMessage) {
        self.0.lock().messages.push(message);
    }
}

/// Storage, as raft-server drives it.
pub(super) struct SimMachine {
    storage: Storage<MemoryEngine>,
    tenant: TenantId,
    bug: Bug,
    rounds: u64,
    /// The tenant's revision as of an applied index.
    revisions: Revisions,
}

type Revisions = Arc<Mutex<BTreeMap<u64, i64>>>;

impl SimMachine {
    fn note_revision(&self) {
        let revision = self.storage.store().reader(self.tenant).map_or(1, |reader| reader.revision());
        self.revisions.lock().insert(self.storage.applied_index(), revision);
    }
}

impl StateMachine for SimMachine {
    type Reply = Outcome;

    fn applied_index(&self) -> u64 {
        self.storage.applied_index()
    }

    /// Every third round has room for the first half alone, and replies that nobody waits for are dropped, as a server does.
    fn apply(&mut self, mut entries: Vec<CommittedEntry>) -> Result<Vec<Vec<Option<Outcome>>>, Fault> {
        self.rounds += 1;
        if self.rounds.is_multiple_of(3) {
            entries.truncate(entries.len().div_ceil(2));
        }
        if self.bug == Bug::ApplyOutOfOrder {
            for entry in &mut entries {
                if (self.rounds + entry.index).is_multiple_of(7) {
                    entry.commands.reverse();
                }
            }
        }
        if self.bug == Bug::DroppedEvent && self.rounds.is_multiple_of(20) {
            self.storage.store().lose_next_revision(self.tenant);
        }
        let (entries, wanted): (Vec<_>, Vec<_>) =
            entries.into_iter().map(|entry| ((entry.index, entry.commands), entry.wanted)).unzip();
        let outcomes = self.storage.apply(entries)?;
        self.note_revision();
        let replies = outcomes.into_iter().zip(wanted).map(|(of_entry, wanted)| {
            of_entry.into_iter().zip(wanted).map(|(outcome, is_wanted)| is_wanted.then_some(outcome)).collect()
        });
        Ok(replies.collect())
    }

    fn durable_index(&self) -> Result<u64, Fault> {
        self.storage.durable_index()
    }

    fn flush(&mut self) -> Result<u64, Fault> {
        self.storage.flush()
    }

    /// The world flushes when it likes: see [`Disk::flush_state`].
    fn begin_flush(&mut self) -> Result<(), Fault> {
        Ok(())
    }

    fn snapshotter(&self) -> Arc<dyn Snapshotter> {
        struct Copy(tenure_storage::Copier<MemoryEngine>);
        impl Snapshotter for Copy {
            fn write_to(&self, dir: &Path) -> Result<u64, Fault> {
                self.0.write_to(dir)
            }
        }
        Arc::new(Copy(self.storage.copier()))
    }

    fn install(&mut self, dir: &Path, index: u64) -> Result<(), Fault> {
        self.storage.install(dir, index)?;
        self.note_revision();
        Ok(())
    }
}

/// See [`Bug::LateRole`].
const LATE_TURNS: usize = 20;

/// A member that runs.
pub(super) struct Life {
    assembled: Assembled<SimMachine>,
    sent: Arc<Mutex<Sent>>,
    /// What the log thread has in hand.
    writing: Option<Queued>,
    /// Whether the log thread does not come back from the disk.
    pub(super) disk_hangs: bool,
    pub(super) store: Store<MemoryEngine>,
    revisions: Revisions,
    bug: Bug,
    /// See [`Bug::LateRole`].
    late_roles: VecDeque<Role>,
}

impl Life {
    /// Starts on what is on the disk.
    pub(super) fn begin(disk: &Disk, config: Config, tenant: TenantId, bug: Bug) -> Self {
        let sent = Arc::new(Mutex::new(Sent::default()));
        let storage = Storage::open(Arc::clone(&disk.engine), Arc::new(NoObserver)).expect("memory opens");
        let store = storage.store();
        let revisions = Revisions::default();
        let machine = SimMachine { storage, tenant, bug, rounds: 0, revisions: Arc::clone(&revisions) };
        machine.note_revision();
        let transport = SimTransport(Arc::clone(&sent));
        let log = Arc::clone(&disk.log) as Arc<dyn LogStore>;
        let config = Config { snapshot_dir: disk.snapshots.clone(), snapshots_on_raft_thread: true, ..config };
        let mut assembled = assemble(config, machine, log, transport).expect("a member starts on its own disk");
        assembled.node.begin().expect("the power is back");
        Life { assembled, sent, writing: None, disk_hangs: false, store, revisions, bug, late_roles: VecDeque::new() }
    }

    pub(super) fn handle(&self) -> &Handle<Outcome> {
        &self.assembled.handle
    }

    /// The tenant's revision when this much was applied.
    pub(super) fn revision_at(&self, applied_index: u64) -> i64 {
        self.revisions.lock().range(..=applied_index).next_back().map_or(1, |(_, revision)| *revision)
    }

    /// Who is in the group, as this member knows.
    pub(super) fn conf(&self) -> &Conf {
        &self.assembled.node.conf
    }

    /// Whether a snapshot is on its way into the state.
    pub(super) fn is_installing(&self) -> bool {
        self.assembled.node.snapshots.installing.is_some()
    }

    pub(super) fn take_sent(&self) -> Sent {
        std::mem::take(&mut self.sent.lock())
    }

    pub(super) fn tick(&mut self) -> Result<(), Fault> {
        self.assembled.node.on_event(crate::node::Event::Tick)?;
        self.settle()
    }

    fn settle(&mut self) -> Result<(), Fault> {
        let shared = Arc::clone(&self.assembled.node.shared);
        if let Some(newest) = self.late_roles.back() {
            shared.reads.lock().set_role(newest.clone());
        }
        self.assembled.node.settle()?;
        if self.bug == Bug::LateRole {
            let mut reads = shared.reads.lock();
            self.late_roles.push_back(reads.role());
            if self.late_roles.len() > LATE_TURNS {
                self.late_roles.pop_front();
            }
            reads.set_role(self.late_roles[0].clone());
        }
        Ok(())
    }

    /// Whether raft's thread would have something to do.
    fn has_events(&self) -> bool {
        !self.assembled.node.events.is_empty() || self.assembled.node.again
    }

    /// A turn of raft's thread, of at most `events_max` events.
    pub(super) fn turn(&mut self, events_max: usize) -> Result<(), Fault> {
        self.half_turn(events_max)?;
        self.settle()
    }

    /// The part of a turn that looks at events; meanwhile others read what the last turn has published.
    pub(super) fn half_turn(&mut self, events_max: usize) -> Result<(), Fault> {
        let node = &mut self.assembled.node;
        node.again = false;
        for _ in 0..events_max {
            let Ok(event) = node.events.try_recv() else { break };
            node.on_event(event)?;
        }
        Ok(())
    }

    fn has_writes(&self) -> bool {
        self.writing.is_some() || !self.assembled.node.writes.is_idle()
    }

    /// Whether the log thread has something in hand.
    pub(super) fn is_writing(&self) -> bool {
        self.writing.is_some()
    }

    /// The log thread takes what is queued; raft's thread may queue more while that is on its way to the disk.
    pub(super) fn begin_write(&mut self) {
        let writes = &self.assembled.node.writes;
        if self.writing.is_none() && !writes.is_idle() {
            self.writing = writes.take();
        }
    }

    /// What the log thread has in hand is written.
    pub(super) fn finish_write(&mut self) -> Result<(), Fault> {
        if self.disk_hangs {
            return Ok(());
        }
        let Some(work) = self.writing.take() else { return Ok(()) };
        let node = &self.assembled.node;
        let (events, apply) = (&node.shared.events, &node.apply);
        let mut tell = |written| match written {
            Written::Ready(number) => events.try_send(crate::node::Event::Persisted(number)).expect("there is room"),
            Written::Install(install) => apply.install(install),
        };
        writer::carry_out(work, &node.log, &node.shared.metrics, &mut tell)
    }

    fn has_entries(&self) -> bool {
        !self.assembled.node.apply.is_idle(self.handle().status().applied_index)
    }

    /// A turn of the apply thread.
    pub(super) fn apply(&mut self) -> Result<(), Fault> {
        if !self.has_entries() {
            return Ok(());
        }
        let events = self.assembled.node.shared.events.clone();
        let mut notify = |progress: crate::apply::Progress| {
            events.try_send(progress.into()).expect("there is room");
        };
        self.assembled.applier.step(&mut notify)
    }

    /// All threads work until nothing is left to do before a clock ticks or a message comes.
    pub(super) fn work_off(&mut self) -> Result<(), Fault> {
        while self.has_events() || (self.has_writes() && !self.disk_hangs) || self.has_entries() {
            self.turn(usize::MAX)?;
            self.begin_write();
            self.finish_write()?;
            self.apply()?;
        }
        Ok(())
    }

    /// What an engineer wants to see of a member that is stuck.
    pub(super) fn describe(&self) -> String {
        let node = &self.assembled.node;
        let progress: Vec<_> =
            node.raw.raft.prs().iter().map(|(id, of)| (*id, of.state, of.matched, of.next_idx)).collect();
        let snapshots = &node.snapshots;
        format!(
            "{:?} conf at {} truncated {} progress {progress:?} offers {:?} making {} fetching {} fetched {} installing {} sending {:?} lanes {} underway {:?} waiting {}",
            self.handle().status(),
            node.conf.index,
            node.log.truncated().index,
            node.log.outgoing.at(),
            snapshots.making,
            snapshots.fetching.is_some(),
            snapshots.fetched.is_some(),
            snapshots.installing.is_some(),
            node.sending,
            node.shared.queue.lock().lanes.items(),
            node.underway,
            node.shared.waiting.bytes(),
        )
    }
}
