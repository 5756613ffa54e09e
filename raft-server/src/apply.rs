//! The apply thread: committed entries go to the state machine, replies to those who wait for them.
//!
//! Nothing is queued for it: raft's thread moves a watermark, the commit index, and the entries up to it are read from the
//! log, whose newest part is in memory. So a slow state machine costs no memory, however far it falls behind; its
//! proposers are held back by `inflight_bytes_max`.
//!
//! Each round takes all that is committed, up to `apply_bytes_max`, in one [`StateMachine::apply`]; publishes the applied
//! index; only then answers, so whoever has a reply finds its effect in the state.
//!
//! The state has no write-ahead log of its own, so from time to time what it holds is made durable and the log truncated
//! to it: when the log has grown to half of `log_bytes_flush` it is asked what is durable by now, at the whole it begins
//! to flush in the background. Only at twice that, when the disk cannot keep up, does the thread wait for it.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use parking_lot::{Condvar, Mutex};
use raft::eraftpb::{Entry, EntryType};
use tenure_storage::Fault;

use crate::frame;
use crate::log::{Log, Position};
use crate::shared::Shared;

/// One committed raft entry as the state machine sees it: its index and the commands batched in it, in order. Entries
/// of raft's own (the first of a term, a change of members) carry none; their index counts all the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CommittedEntry {
    pub index: u64,
    pub commands: Vec<Bytes>,
}

/// The replicated state, owned by the apply thread.
pub trait StateMachine: Send + 'static {
    /// What a command's proposer gets.
    type Reply: Send + 'static;

    /// Highest index whose effects are in the state, durable or not. 0: empty.
    fn applied_index(&self) -> u64;

    /// Applies the entries in order, atomically together with the new applied index, the last entry's. The indexes
    /// go on from [`StateMachine::applied_index`] without a gap. `replies[i][j]` answers `entries[i].commands[j]`.
    ///
    /// # Errors
    /// A [`Fault`] stops the member: it could not carry on without diverging from its peers.
    fn apply(&mut self, entries: Vec<CommittedEntry>) -> Result<Vec<Vec<Self::Reply>>, Fault>;

    /// Highest applied index that survives power loss now. Never ahead of [`StateMachine::applied_index`]; cheap.
    ///
    /// # Errors
    /// As [`StateMachine::apply`].
    fn durable_index(&self) -> Result<u64, Fault>;

    /// Makes everything applied so far durable; gives the index that then is.
    ///
    /// # Errors
    /// As [`StateMachine::apply`].
    fn flush(&mut self) -> Result<u64, Fault>;

    /// Starts making everything applied so far durable, and goes on; [`StateMachine::durable_index`] tells when it is. A state
    /// machine that cannot do that in the background does it now.
    ///
    /// # Errors
    /// As [`StateMachine::apply`].
    fn begin_flush(&mut self) -> Result<(), Fault> {
        self.flush().map(drop)
    }
}

/// How far the apply thread may go. A level, not a queue.
#[derive(Default)]
pub(crate) struct ApplySignal {
    state: Mutex<Level>,
    bell: Condvar,
}

#[derive(Default)]
struct Level {
    commit_index: u64,
    stopping: bool,
}

impl ApplySignal {
    /// Lets entries up to `commit_index` be applied. They are committed, and durable here.
    pub(crate) fn raise(&self, commit_index: u64) {
        let mut level = self.state.lock();
        assert!(commit_index >= level.commit_index, "what is committed stays so");
        level.commit_index = commit_index;
        self.bell.notify_one();
    }

    pub(crate) fn stop(&self) {
        self.state.lock().stopping = true;
        self.bell.notify_one();
    }

    /// Waits until there is something after `applied`. `None`: stopped.
    fn wait_beyond(&self, applied: u64) -> Option<u64> {
        let mut level = self.state.lock();
        loop {
            if level.stopping {
                return None;
            }
            if level.commit_index > applied {
                return Some(level.commit_index);
            }
            self.bell.wait(&mut level);
        }
    }
}

/// What the apply thread tells raft's thread. Both are levels kept in the status: a notice only says to look.
pub(crate) enum Progress {
    Applied,
    Durable,
}

/// The apply thread's own state.
pub(crate) struct Applier<S: StateMachine> {
    pub(crate) state_machine: S,
    pub(crate) log: Arc<Log>,
    pub(crate) shared: Arc<Shared<S::Reply>>,
    pub(crate) signal: Arc<ApplySignal>,
    pub(crate) apply_bytes_max: u64,
    pub(crate) log_bytes_flush: u64,
    pub(crate) flush_on_stop: bool,
}

impl<S: StateMachine> Applier<S> {
    /// Runs until the signal is stopped.
    ///
    /// # Errors
    /// The state machine's or the log's; the member must stop.
    pub(crate) fn run(mut self, mut notify: impl FnMut(Progress)) -> Result<(), Fault> {
        let mut applied = self.shared.status.applied_index.load(Ordering::Relaxed);
        let mut probed_bytes = 0;
        while let Some(commit_index) = self.signal.wait_beyond(applied) {
            let entries = self.log.entries_between(applied + 1, commit_index + 1, self.apply_bytes_max)?;
            let entries = entries.expect("only what the state has durably is truncated");
            applied = self.apply(entries)?;
            notify(Progress::Applied);
            if self.maybe_flush(&mut probed_bytes)? {
                notify(Progress::Durable);
            }
        }
        if self.flush_on_stop && !self.shared.faulted() {
            let durable = self.state_machine.flush()?;
            self.shared.status.durable_index.store(durable, Ordering::Release);
        }
        Ok(())
    }

    /// Applies, publishes, answers. Gives the index of the last entry.
    fn apply(&mut self, entries: Vec<Entry>) -> Result<u64, Fault> {
        let last = entries.last().expect("entries_between gives one at least").index;
        let terms: Vec<Position> = entries.iter().map(|e| Position { index: e.index, term: e.term }).collect();
        let committed = entries.into_iter().map(decode).collect::<Result<Vec<_>, _>>()?;
        let counts: Vec<usize> = committed.iter().map(|entry| entry.commands.len()).collect();
        let replies = self.state_machine.apply(committed)?;
        assert!(replies.iter().map(Vec::len).eq(counts), "one reply for each command");
        assert_eq!(self.state_machine.applied_index(), last, "the applied index follows the log");
        self.shared.status.applied_index.store(last, Ordering::Release);
        self.answer(&terms, replies);
        Ok(last)
    }

    fn answer(&self, applied: &[Position], replies: Vec<Vec<S::Reply>>) {
        let last = applied.last().expect("something was applied").index;
        let mut batches = self.shared.waiting.take_through(last).into_iter().peekable();
        let mut answered = Vec::new();
        for (at, replies) in applied.iter().zip(replies) {
            while let Some(batch) = batches.next_if(|batch| batch.at.index <= at.index) {
                if batch.at == *at {
                    answered.push((batch, replies));
                    break;
                }
                // Another leader's entry took its place, and the raft thread has not come to say so yet.
                self.shared.drop_batches([batch]);
            }
        }
        if !answered.is_empty() {
            self.shared.complete(answered);
        }
    }

    /// Whether there is a newer durable index than before, so that the log can be truncated.
    fn maybe_flush(&mut self, probed_bytes: &mut u64) -> Result<bool, Fault> {
        let retained = self.log.retained_bytes();
        *probed_bytes = (*probed_bytes).min(retained);
        // Truncation follows on other threads; until they are through, asking again would flush again.
        if retained < self.log_bytes_flush / 2 || retained < *probed_bytes + self.log_bytes_flush / 8 {
            return Ok(false);
        }
        let durable = if retained >= 2 * self.log_bytes_flush {
            self.state_machine.flush()?
        } else {
            if retained >= self.log_bytes_flush {
                self.state_machine.begin_flush()?;
            }
            self.state_machine.durable_index()?
        };
        *probed_bytes = retained;
        let before = self.shared.status.durable_index.swap(durable, Ordering::AcqRel);
        assert!(durable >= before, "what is durable stays so");
        Ok(durable > before)
    }
}

fn decode(entry: Entry) -> Result<CommittedEntry, Fault> {
    let index = entry.index;
    let commands = match entry.entry_type {
        EntryType::EntryNormal => frame::decode(entry.data).map_err(|error| {
            tracing::error!(index, %error, "decode raft entry");
            Fault::Corrupt { what: "raft entry", key: index.to_be_bytes().to_vec() }
        })?,
        EntryType::EntryConfChange | EntryType::EntryConfChangeV2 => Vec::new(),
    };
    Ok(CommittedEntry { index, commands })
}
