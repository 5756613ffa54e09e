//! The raft log: what this member promised, on disk, and its newest part in memory.
//!
//! A [`LogStore`] keeps entries and a few small records durably; two exist, [`EngineLog`] (the `raft-engine` crate; why it:
//! `docs/decisions/0002-raft-log.md`) and [`MemoryLog`], its model in tests. [`Log`] puts the *tail* in front of it: the
//! newest entries in memory, where raft, the apply thread and peers that keep up find them.
//!
//! Life of an entry: raft hands it out in a `Ready`; [`Log::append`] puts it in the tail, so it can be read at once;
//! the log thread writes and syncs it and says so with [`Log::mark_persisted`]; from then on it may leave the tail, oldest
//! first, when the tail is over its bound. Once the state has it durably, [`Log::hide_through`] takes it out of
//! everybody's sight and [`LogStore::truncate`] off the disk.
//!
//! What must hold:
//! - The entries are contiguous: `first_index..=last_index`, where `first_index` is one after the truncated position.
//! - The term of the truncated position is kept: raft compares it with the first entry a peer lacks.
//! - Entries and hard state given to one [`LogStore::append`] reach the disk together or not at all.
//! - After a crash the log is some prefix of what was appended, at least all that `append` returned for.
//! - Index 1 ([`BOOTSTRAP_INDEX`]) is never an entry: every log begins after it. So a member that joins later with nothing
//!   is behind every leader's log and gets a snapshot, with the membership in it, rather than entries alone.

mod engine;
mod mark;
mod memory;
mod tail;
#[cfg(test)]
mod tests;

use raft::eraftpb::{ConfState, Entry, HardState};
use tenure_storage::Fault;

pub use self::engine::EngineLog;
pub use self::memory::MemoryLog;
pub(crate) use self::tail::{Log, RaftStorage};

/// The position every log begins after. See the module's essay.
pub const BOOTSTRAP_INDEX: u64 = 1;

/// A place in the log and the term it was written in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Position {
    pub index: u64,
    pub term: u64,
}

/// What a log holds when it is opened.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Recovered {
    /// Who wrote this log. `None`: nobody yet; the rest is empty then.
    pub member_id: Option<u64>,
    pub hard_state: HardState,
    pub conf: Conf,
    /// Everything up to here is gone; the state has it.
    pub truncated: Position,
    /// Index of the newest entry, or of `truncated` if there is none.
    pub last_index: u64,
    /// The snapshot that was being installed, if that was not completed.
    pub installing: Option<(Position, Conf)>,
}

/// Who is in the group, as of an entry.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Conf {
    /// The entry that made it so. Changes up to here must not be made again when entries are replayed.
    pub index: u64,
    pub state: ConfState,
}

/// One atomic write.
#[derive(Clone, Debug, Default)]
pub struct LogWrite {
    /// Contiguous. Whatever the log holds at or after the first one's index is replaced.
    pub entries: Vec<Entry>,
    pub hard_state: Option<HardState>,
    pub conf: Option<Conf>,
}

impl LogWrite {
    /// One entry that carries `commands`, as a leader appends it.
    pub fn of_commands(at: Position, commands: &[bytes::Bytes]) -> Self {
        let data = crate::frame::encode(commands.iter().map(|command| (command, None))).into();
        let entry = Entry { index: at.index, term: at.term, data, ..Entry::default() };
        let hard_state = HardState { term: at.term, commit: at.index - 1, ..HardState::default() };
        LogWrite { entries: vec![entry], hard_state: Some(hard_state), conf: None }
    }

    /// Adds a later write, so that both reach the disk in one.
    pub(crate) fn merge(&mut self, later: LogWrite) {
        if let (Some(own), Some(first)) = (self.entries.first(), later.entries.first()) {
            let kept = usize::try_from(first.index.saturating_sub(own.index)).unwrap_or(usize::MAX);
            self.entries.truncate(kept);
        }
        self.entries.extend(later.entries);
        self.hard_state = later.hard_state.or(self.hard_state.take());
        self.conf = later.conf.or(self.conf.take());
    }
}

/// How long a write took, for the histograms, and what it wrote.
#[derive(Clone, Copy, Debug, Default)]
pub struct Appended {
    pub bytes: u64,
    pub write: std::time::Duration,
    pub sync: std::time::Duration,
}

/// Entries and a few records, durably. One thread writes, but for records of who is in the group, which raft's thread writes
/// beside it; any thread reads.
pub trait LogStore: Send + Sync + 'static {
    /// What is there. Called once, before anything else.
    ///
    /// # Errors
    /// A [`Fault`] if the log cannot be read or contradicts itself. A write that a crash cut off is not a fault.
    fn recover(&self) -> Result<Recovered, Fault>;

    /// Makes this the log of a new member: truncated at `at`, with the members of `conf`. Durable on return.
    ///
    /// # Errors
    /// As [`LogStore::append`].
    fn bootstrap(&self, member_id: u64, at: Position, conf: &Conf) -> Result<(), Fault>;

    /// Appends atomically. Durable on return: it survives power loss.
    ///
    /// # Errors
    /// After any [`Fault`] the caller must stop: it cannot know what was written. May panic instead, to the same end.
    fn append(&self, write: &LogWrite) -> Result<Appended, Fault>;

    /// The entries in `[low, high)`, all of which must be there; cut after the one that reaches `bytes_max`, so at least one.
    ///
    /// # Errors
    /// A [`Fault`] if one cannot be read.
    fn entries(&self, low: u64, high: u64, bytes_max: u64) -> Result<Vec<Entry>, Fault>;

    /// Forgets the entries up to and including `through`, whose term is kept. Durable on return; disk space follows.
    ///
    /// # Errors
    /// As [`LogStore::append`].
    fn truncate(&self, through: Position) -> Result<(), Fault>;

    /// Notes that the state is about to be replaced by a snapshot of this place. Durable on return.
    ///
    /// # Errors
    /// As [`LogStore::append`].
    fn begin_install(&self, at: Position, conf: &Conf) -> Result<(), Fault>;

    /// Drops the note: the state was not replaced. Durable on return.
    ///
    /// # Errors
    /// As [`LogStore::append`].
    fn cancel_install(&self) -> Result<(), Fault>;

    /// Forgets every entry, begins after the snapshot, and drops the note, in one write. Durable on return.
    ///
    /// # Errors
    /// As [`LogStore::append`].
    fn finish_install(&self, at: Position, conf: &Conf) -> Result<(), Fault>;

    /// Bytes of all files on disk, roughly. Slow: for restarts and status only.
    fn disk_bytes(&self) -> u64;
}

/// The hard state of a log that begins after a snapshot: no vote is forgotten, and nothing of the snapshot is uncommitted.
pub(crate) fn hard_state_after(before: &HardState, at: Position) -> HardState {
    let vote = if before.term >= at.term { before.vote } else { 0 };
    HardState { term: before.term.max(at.term), vote, commit: at.index, ..HardState::default() }
}

/// What an entry counts for, in bytes: its data and what goes around it.
pub(crate) fn entry_bytes(entry: &Entry) -> usize {
    const AROUND_BYTES: usize = 48;
    entry.data.len() + entry.context.len() + AROUND_BYTES
}
