//! One simulated member: its disk, which outlives it, and the life it has now.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;
use tenure_storage::{Fault, MemoryEngine, NoObserver, Outcome, StateMachine as Storage, Store};

use super::world::Bug;
use crate::server::{Assembled, assemble};
use crate::snapshot::SnapshotOffer;
use crate::transport::{PeerMessage, Transport};
use crate::writer::{self, Written};
use crate::{CommittedEntry, Config, Handle, LogStore, MemoryLog, Snapshotter, StateMachine};

/// What a member survives a crash with.
pub(super) struct Disk {
    pub(super) log: Arc<MemoryLog>,
    pub(super) engine: Arc<MemoryEngine>,
    pub(super) snapshots: PathBuf,
}

impl Disk {
    pub(super) fn new(dir: &Path, id: u64) -> Self {
        let (log, engine) = (Arc::new(MemoryLog::default()), Arc::new(MemoryEngine::new()));
        Disk { log, engine, snapshots: dir.join(format!("m{id}")) }
    }
}

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

    fn fetch(&mut self, offer: SnapshotOffer) {
        self.0.lock().offer = Some(offer);
    }
}

/// Storage, as raft-server drives it.
pub(super) struct SimMachine {
    storage: Storage<MemoryEngine>,
    engine: Arc<MemoryEngine>,
    bug: Bug,
    applied: u64,
}

impl StateMachine for SimMachine {
    type Reply = Outcome;

    fn applied_index(&self) -> u64 {
        self.storage.applied_index()
    }

    fn apply(&mut self, entries: Vec<CommittedEntry>) -> Result<Vec<Vec<Outcome>>, Fault> {
        let mut entries: Vec<(u64, Vec<Bytes>)> =
            entries.into_iter().map(|entry| (entry.index, entry.commands)).collect();
        if self.bug == Bug::ApplyOutOfOrder {
            for (_, commands) in &mut entries {
                self.applied += 1;
                if self.applied.is_multiple_of(7) {
                    commands.reverse();
                }
            }
        }
        self.storage.apply(entries)
    }

    fn durable_index(&self) -> Result<u64, Fault> {
        self.storage.durable_index()
    }

    fn flush(&mut self) -> Result<u64, Fault> {
        self.storage.flush()
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
        self.storage.install(dir, index)
    }
}

impl Drop for SimMachine {
    /// The end of a life is a crash.
    fn drop(&mut self) {
        self.engine.crash();
    }
}

/// A member that runs.
pub(super) struct Life {
    assembled: Assembled<SimMachine>,
    sent: Arc<Mutex<Sent>>,
    pub(super) store: Store<MemoryEngine>,
}

impl Life {
    /// Starts on what is on the disk.
    pub(super) fn begin(disk: &Disk, config: Config, bug: Bug) -> Self {
        let sent = Arc::new(Mutex::new(Sent::default()));
        let storage = Storage::open(Arc::clone(&disk.engine), Arc::new(NoObserver)).expect("memory opens");
        let store = storage.store();
        let machine = SimMachine { storage, engine: Arc::clone(&disk.engine), bug, applied: 0 };
        let transport = SimTransport(Arc::clone(&sent));
        let log = Arc::clone(&disk.log) as Arc<dyn LogStore>;
        let config = Config { snapshot_dir: disk.snapshots.clone(), snapshots_on_raft_thread: true, ..config };
        let mut assembled = assemble(config, machine, log, transport).expect("a member starts on its own disk");
        assembled.node.settle().expect("memory has no faults");
        Life { assembled, sent, store }
    }

    pub(super) fn handle(&self) -> &Handle<Outcome> {
        &self.assembled.handle
    }

    pub(super) fn take_sent(&self) -> Sent {
        std::mem::take(&mut self.sent.lock())
    }

    pub(super) fn tick(&mut self) {
        let node = &mut self.assembled.node;
        node.on_event(crate::node::Event::Tick).expect("memory has no faults");
        node.settle().expect("memory has no faults");
    }

    /// Whether raft's thread would have something to do.
    pub(super) fn has_events(&self) -> bool {
        !self.assembled.node.events.is_empty()
    }

    /// A turn of raft's thread, of at most `events_max` events.
    pub(super) fn turn(&mut self, events_max: usize) {
        let node = &mut self.assembled.node;
        for _ in 0..events_max {
            let Ok(event) = node.events.try_recv() else { break };
            node.on_event(event).expect("memory has no faults");
        }
        node.settle().expect("memory has no faults");
    }

    pub(super) fn has_writes(&self) -> bool {
        !self.assembled.node.writes.is_idle()
    }

    /// A turn of the log thread. Without `heard` raft never learns of it: the crash came first.
    pub(super) fn write(&mut self, heard: bool) {
        let node = &self.assembled.node;
        let (events, apply) = (node.shared.events.clone(), Arc::clone(&node.apply));
        let mut tell = |written| match written {
            _ if !heard => {}
            Written::Ready(number) => events.try_send(crate::node::Event::Persisted(number)).expect("there is room"),
            Written::Install(install) => apply.install(install),
        };
        writer::step(&node.writes, &node.log, &node.shared.metrics, &mut tell).expect("memory has no faults");
    }

    pub(super) fn has_entries(&self) -> bool {
        !self.assembled.node.apply.is_idle(self.handle().status().applied_index)
    }

    /// A turn of the apply thread.
    pub(super) fn apply(&mut self) {
        let events = self.assembled.node.shared.events.clone();
        let mut notify = |progress: crate::apply::Progress| {
            events.try_send(progress.into()).expect("there is room");
        };
        self.assembled.applier.step(&mut notify).expect("memory has no faults");
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

    /// Whether nothing is left to do before a clock ticks or a message comes.
    pub(super) fn is_idle(&self) -> bool {
        !self.has_events() && !self.has_writes() && !self.has_entries() && self.sent.lock().messages.is_empty()
    }
}
