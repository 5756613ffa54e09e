//! [`Log`]: a store with its newest entries in memory, as raft and the apply thread read it.

use std::collections::VecDeque;
use std::sync::Arc;

use parking_lot::Mutex;
use raft::eraftpb::{Entry, HardState, Snapshot};
use raft::{GetEntriesContext, RaftState, StorageError};
use tenure_storage::Fault;

use super::{Conf, LogStore, Position, Recovered, entry_bytes};
use crate::snapshot::Outgoing;

/// Read by raft and by the apply thread, written by raft's thread; see the module's essay in `log/mod.rs`.
pub(crate) struct Log {
    store: Arc<dyn LogStore>,
    /// Held for copies of a few references, never over a read of the disk.
    tail: Mutex<Tail>,
    cache_bytes_max: usize,
    start: (HardState, Conf),
    /// What raft hands to members that are too far behind.
    pub(crate) outgoing: Arc<Outgoing>,
}

struct Tail {
    truncated: Position,
    /// Contiguous, up to `last_index`. May begin after `truncated.index + 1`: what lies between is on disk only.
    entries: VecDeque<Entry>,
    entries_bytes: usize,
    last_index: u64,
    /// Everything up to here is on disk in the form it has here, so it may leave `entries`.
    persisted_index: u64,
    growth: Growth,
}

/// How many bytes the log holds from an index on, counted in coarse steps so that it costs nothing.
#[derive(Default)]
struct Growth {
    total_bytes: u64,
    /// (last index of a step, total bytes at its end), oldest first.
    steps: VecDeque<(u64, u64)>,
    truncated_bytes: u64,
    step_bytes: u64,
}

impl Growth {
    fn add(&mut self, index: u64, bytes: u64) {
        self.total_bytes += bytes;
        let end = self.steps.back().map_or(self.truncated_bytes, |step| step.1);
        if self.total_bytes - end >= self.step_bytes {
            self.steps.push_back((index, self.total_bytes));
        }
    }

    /// Of what was appended, the bytes up to `index`, a step too few at most.
    fn bytes_through(&self, index: u64) -> u64 {
        let through = self.steps.iter().take_while(|(end, _)| *end <= index).last();
        through.map_or(self.truncated_bytes, |(_, bytes)| *bytes)
    }

    fn truncate(&mut self, through: u64) {
        while let Some(&(index, bytes)) = self.steps.front() {
            if index > through {
                break;
            }
            self.truncated_bytes = bytes;
            self.steps.pop_front();
        }
    }
}

impl Log {
    /// `recovered` is what the store holds, with the hard state that raft shall begin with; `step_bytes` how exactly
    /// [`Log::bytes_after`] counts.
    pub(crate) fn new(store: Arc<dyn LogStore>, recovered: Recovered, cache_bytes_max: usize, step_bytes: u64) -> Self {
        let Recovered { hard_state, conf, truncated, last_index, .. } = recovered;
        // What an earlier run left counts as much as its files, so that a log that is over its bound is truncated soon.
        let mut growth = Growth { step_bytes, ..Growth::default() };
        if last_index > truncated.index {
            growth.total_bytes = store.disk_bytes();
            growth.steps.push_back((last_index, growth.total_bytes));
        }
        let (entries, entries_bytes) = (VecDeque::new(), 0);
        let tail = Tail { truncated, entries, entries_bytes, last_index, persisted_index: last_index, growth };
        Log { store, tail: Mutex::new(tail), cache_bytes_max, start: (hard_state, conf), outgoing: Arc::default() }
    }

    pub(crate) fn store(&self) -> &dyn LogStore {
        &*self.store
    }

    pub(crate) fn last_index(&self) -> u64 {
        self.tail.lock().last_index
    }

    pub(crate) fn truncated(&self) -> Position {
        self.tail.lock().truncated
    }

    /// Makes the entries readable, replacing what is at and after the first one. They are not durable yet.
    ///
    /// # Panics
    /// If there would be a gap, or something truncated would be replaced.
    pub(crate) fn append(&self, entries: &[Entry]) {
        let (Some(first), Some(last)) = (entries.first(), entries.last()) else { return };
        let mut tail = self.tail.lock();
        assert!(first.index > tail.truncated.index, "truncated entries are committed");
        assert!(first.index <= tail.last_index + 1, "entries are contiguous");
        while tail.entries.back().is_some_and(|entry| entry.index >= first.index) {
            let replaced = tail.entries.pop_back().expect("the back was there");
            tail.entries_bytes -= entry_bytes(&replaced);
        }
        tail.persisted_index = tail.persisted_index.min(first.index - 1);
        let bytes: usize = entries.iter().map(entry_bytes).sum();
        tail.entries.extend(entries.iter().cloned());
        tail.entries_bytes += bytes;
        tail.last_index = last.index;
        tail.growth.add(last.index, bytes as u64);
        tail.evict(self.cache_bytes_max);
    }

    /// The store has everything up to `last`. Without effect if that was replaced meanwhile.
    pub(crate) fn mark_persisted(&self, last: Position) {
        let mut tail = self.tail.lock();
        if tail.cached(last.index).is_some_and(|entry| entry.term == last.term) {
            tail.persisted_index = tail.persisted_index.max(last.index);
            tail.evict(self.cache_bytes_max);
        }
    }

    /// The entries in `[low, high)`, cut after the one that reaches `bytes_max`: at least one.
    ///
    /// # Errors
    /// `Ok(None)` if `low` is truncated; a [`Fault`] if the disk cannot be read.
    pub(crate) fn entries_between(&self, low: u64, high: u64, bytes_max: u64) -> Result<Option<Vec<Entry>>, Fault> {
        let from_disk_until = {
            let tail = self.tail.lock();
            if low <= tail.truncated.index {
                return Ok(None);
            }
            assert!(low < high && high <= tail.last_index + 1, "entries {low}..{high} of ..={}", tail.last_index);
            let cached_from = tail.entries.front().map_or(tail.last_index + 1, |entry| entry.index);
            if low >= cached_from {
                return Ok(Some(tail.copy(low, high, bytes_max)));
            }
            high.min(cached_from)
        };
        // Cut short at the tail's beginning: the caller asks again for the rest, as it must for `bytes_max`.
        self.store.entries(low, from_disk_until, bytes_max).map(Some)
    }

    /// Takes the entries up to `through` out of sight. The caller has [`LogStore::truncate`] called afterwards.
    ///
    /// # Errors
    /// A [`Fault`] if the disk cannot be read.
    pub(crate) fn hide_through(&self, through: u64) -> Result<Position, Fault> {
        let position = Position { index: through, term: self.term_at(through)?.expect("not truncated yet") };
        let mut tail = self.tail.lock();
        assert!(through <= tail.persisted_index, "only what is on disk is truncated");
        while tail.entries.front().is_some_and(|entry| entry.index <= through) {
            let gone = tail.entries.pop_front().expect("the front was there");
            tail.entries_bytes -= entry_bytes(&gone);
        }
        tail.truncated = position;
        tail.growth.truncate(through);
        Ok(position)
    }

    /// Forgets everything and begins after `at`: a snapshot takes the place of the entries. The disk follows, see
    /// [`LogStore::finish_install`].
    pub(crate) fn reset(&self, at: Position) {
        let mut tail = self.tail.lock();
        assert!(at.index > tail.truncated.index, "a snapshot is newer than what was truncated");
        let step_bytes = tail.growth.step_bytes;
        *tail = Tail {
            truncated: at,
            entries: VecDeque::new(),
            entries_bytes: 0,
            last_index: at.index,
            persisted_index: at.index,
            growth: Growth { step_bytes, ..Growth::default() },
        };
    }

    /// Bytes of the entries after `index`, at most a step too many.
    pub(crate) fn bytes_after(&self, index: u64) -> u64 {
        let tail = self.tail.lock();
        tail.growth.total_bytes - tail.growth.bytes_through(index)
    }

    /// The lowest index such that the entries after it have at most `bytes`.
    pub(crate) fn index_before_last(&self, bytes: u64) -> u64 {
        let tail = self.tail.lock();
        let Some(excess) = (tail.growth.total_bytes - tail.growth.truncated_bytes).checked_sub(bytes) else {
            return tail.truncated.index;
        };
        let target = tail.growth.truncated_bytes + excess;
        let within = tail.growth.steps.iter().take_while(|(_, end)| *end <= target).last();
        within.map_or(tail.truncated.index, |(index, _)| *index)
    }

    /// The term of the entry; `None` if it is truncated.
    pub(crate) fn term_at(&self, index: u64) -> Result<Option<u64>, Fault> {
        {
            let tail = self.tail.lock();
            if index == tail.truncated.index {
                return Ok(Some(tail.truncated.term));
            }
            if index < tail.truncated.index {
                return Ok(None);
            }
            if let Some(entry) = tail.cached(index) {
                return Ok(Some(entry.term));
            }
        }
        let entries = self.store.entries(index, index + 1, 0)?;
        Ok(entries.first().map(|entry| entry.term))
    }
}

impl Tail {
    fn cached(&self, index: u64) -> Option<&Entry> {
        let offset = index.checked_sub(self.entries.front()?.index)?;
        self.entries.get(usize::try_from(offset).ok()?)
    }

    fn copy(&self, low: u64, high: u64, bytes_max: u64) -> Vec<Entry> {
        let mut bytes = 0;
        let mut entries = Vec::new();
        for index in low..high {
            let entry = self.cached(index).expect("the tail is contiguous");
            bytes += entry_bytes(entry) as u64;
            entries.push(entry.clone());
            if bytes >= bytes_max {
                break;
            }
        }
        entries
    }

    fn evict(&mut self, bytes_max: usize) {
        while self.entries_bytes > bytes_max
            && self.entries.front().is_some_and(|entry| entry.index <= self.persisted_index)
        {
            let gone = self.entries.pop_front().expect("the front was there");
            self.entries_bytes -= entry_bytes(&gone);
        }
    }
}

/// How raft itself reads the log.
pub(crate) struct RaftStorage(pub(crate) Arc<Log>);

impl raft::Storage for RaftStorage {
    fn initial_state(&self) -> raft::Result<RaftState> {
        let (hard_state, conf) = &self.0.start;
        Ok(RaftState::new(hard_state.clone(), conf.state.clone()))
    }

    fn entries(
        &self,
        low: u64,
        high: u64,
        max_size: impl Into<Option<u64>>,
        _: GetEntriesContext,
    ) -> raft::Result<Vec<Entry>> {
        let bytes_max = max_size.into().unwrap_or(u64::MAX);
        let mut entries = Vec::new();
        let mut bytes = 0u64;
        let mut next = low;
        // raft takes a short answer for the end of what fits, so the seam between disk and memory must not show.
        while next < high && (entries.is_empty() || bytes < bytes_max) {
            let part = self.0.entries_between(next, high, bytes_max - bytes).map_err(give_up)?;
            let part = part.ok_or(raft::Error::Store(StorageError::Compacted))?;
            bytes += part.iter().map(entry_bytes).sum::<usize>() as u64;
            next += part.len() as u64;
            entries.extend(part);
        }
        Ok(entries)
    }

    fn term(&self, index: u64) -> raft::Result<u64> {
        if index > self.0.last_index() {
            return Err(raft::Error::Store(StorageError::Unavailable));
        }
        self.0.term_at(index).map_err(give_up)?.ok_or(raft::Error::Store(StorageError::Compacted))
    }

    fn first_index(&self) -> raft::Result<u64> {
        Ok(self.0.truncated().index + 1)
    }

    fn last_index(&self) -> raft::Result<u64> {
        Ok(self.0.last_index())
    }

    /// A snapshot whose following entries the log still has. If there is none, one is made.
    fn snapshot(&self, request_index: u64, to: u64) -> raft::Result<Snapshot> {
        let index_min = request_index.max(self.0.truncated().index);
        self.0.outgoing.get(index_min, to).ok_or(raft::Error::Store(StorageError::SnapshotTemporarilyUnavailable))
    }
}

/// Raft cannot go on from it, and would panic with words of its own. The member's supervisor hears the fault's, and nothing is said
/// but what that says.
fn give_up(fault: Fault) -> raft::Error {
    std::panic::resume_unwind(Box::new(fault.to_string()))
}
