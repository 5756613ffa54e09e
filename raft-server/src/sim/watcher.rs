//! A client that watches everything: on one member at a time, going on at another where it stopped.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use tenure_storage::{KeyRange, MemoryEngine, Store, TenantId, WatchMessage, WatchSpec, WatchStream};

use super::check::Violation;

/// What one revision did: the stored form of each key that it changed.
pub(super) type Changes = BTreeMap<i64, Vec<Bytes>>;

/// See the module's essay.
pub(super) struct Watcher {
    at: Option<(u64, WatchStream<MemoryEngine>)>,
    /// The first revision that it has not been sent yet.
    next: i64,
    seen: Changes,
    /// Revisions that were compacted before it could be sent them.
    missed: Vec<std::ops::Range<i64>>,
    /// The highest revision of which it was told that all up to there was sent.
    progress: i64,
    events: usize,
}

impl Watcher {
    pub(super) fn new() -> Self {
        let (seen, missed) = (Changes::new(), Vec::new());
        Watcher { at: None, next: 2, seen, missed, progress: 0, events: 0 }
    }

    /// The member that it is connected to.
    pub(super) fn member(&self) -> Option<u64> {
        self.at.as_ref().map(|(member, _)| *member)
    }

    pub(super) fn leave(&mut self) {
        self.at = None;
    }

    /// Connects and asks for what it has not seen.
    pub(super) fn connect(&mut self, member: u64, store: &Store<MemoryEngine>, tenant: TenantId) {
        let Some(reader) = store.reader(tenant) else { return };
        let stream = reader.watch_stream(Arc::new(|| {}));
        stream.create(WatchSpec {
            range: KeyRange::From(Bytes::from_static(&[0])),
            start_revision: self.next,
            prev_kv: false,
            no_put: false,
            no_delete: false,
            progress_notify: false,
            fragment: false,
            watch_id: 1,
        });
        self.at = Some((member, stream));
    }

    /// Takes some messages, and lets the stream replay.
    pub(super) fn listen(&mut self, messages_max: usize) -> Result<(), Violation> {
        let Some((member, stream)) = &self.at else { return Ok(()) };
        let member = *member;
        if stream.needs_replay() {
            stream.replay_step().expect("memory has no faults");
        }
        stream.request_progress();
        for _ in 0..messages_max {
            let Some((_, stream)) = &self.at else { break };
            let Some(message) = stream.pop() else { break };
            match message {
                WatchMessage::Events { batch, .. } => {
                    let mut by_revision = Changes::new();
                    for event in &batch.events {
                        self.events += 1;
                        by_revision.entry(mod_revision(&event.kv)).or_default().push(event.kv.clone());
                    }
                    for (revision, changes) in by_revision {
                        if revision < self.next {
                            return Err(Violation::WatchedTwice { member, revision, next: self.next });
                        }
                        self.next = revision + 1;
                        self.seen.insert(revision, changes);
                    }
                }
                WatchMessage::Progress { revision, .. } => {
                    self.progress = self.progress.max(revision);
                    self.next = self.next.max(revision + 1);
                }
                WatchMessage::Compacted { compact_revision, .. } => {
                    self.missed.push(self.next..compact_revision);
                    self.next = self.next.max(compact_revision);
                    self.leave();
                }
                WatchMessage::Created { .. } | WatchMessage::Refused { .. } | WatchMessage::Canceled { .. } => {}
            }
        }
        Ok(())
    }

    /// Listens until there is no more. Everything is applied.
    pub(super) fn drain(&mut self) -> Result<(), Violation> {
        loop {
            let before = (self.next, self.events);
            self.listen(usize::MAX)?;
            let waits = self.at.as_ref().is_some_and(|(_, stream)| stream.needs_replay());
            if (self.next, self.events) == before && !waits {
                return Ok(());
            }
        }
    }

    /// Holds what it saw against what there is: nothing else, nothing twice, no gap.
    pub(super) fn check(&self, history: &Changes, first: i64, last: i64) -> Result<(), Violation> {
        if self.next <= last {
            return Err(Violation::WatchStuck { next: self.next, last });
        }
        for revision in 2..=last {
            let missed = self.missed.iter().any(|gone| gone.contains(&revision));
            match (self.seen.get(&revision), history.get(&revision)) {
                (Some(seen), Some(real)) if seen == real => {}
                (None, None) => {}
                (Some(_), None) if revision < first => {}
                (None, Some(_)) if missed => {}
                (Some(_) | None, Some(_) | None) => return Err(Violation::WatchDiffers { revision }),
            }
        }
        Ok(())
    }
}

fn mod_revision(stored: &[u8]) -> i64 {
    tenure_storage::key_value::KeyValue::decode(stored).expect("events decode").mod_revision
}

/// All that a member's history holds, by replay from its first readable revision on.
pub(super) fn history(store: &Store<MemoryEngine>, tenant: TenantId) -> Changes {
    let first = store.reader(tenant).map_or(2, |reader| reader.state().compact_revision.max(2));
    let mut all = Watcher { next: first, ..Watcher::new() };
    all.connect(0, store, tenant);
    all.drain().expect("a replay is in order");
    all.seen
}
