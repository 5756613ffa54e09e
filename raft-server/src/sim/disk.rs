//! A simulated member's disk, and what is on it when the power goes.
//!
//! The log. A batch of raft-engine is on the disk whole, or recovery cuts it off: so a crash comes between two batches, or after one
//! that nobody heard of. What the log thread was given at once is up to three batches (entries with hard state, truncation, the note
//! of a snapshot), and what was queued behind it none; raft's thread and the apply thread have batches of their own in the middle of a
//! turn. The power goes at any of these: the first batch that it does not reach fails, and with it whatever the member would have said
//! or done next.
//!
//! The state. The engine has no write-ahead log and flushes all of it together, when it is told to or by itself: a crash leaves it as it
//! was after some batch, not before the last flush. Each batch is whole.
//!
//! Not simulated: a batch whose beginning did not reach the disk while its end did. raft-engine's recovery does not look at entries, so
//! that one is found, as a fault, when its entries are read.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;
use raft::eraftpb::Entry;
use tenure_storage::{Engine as _, Fault, MemoryEngine};

use super::world::Bug;
use crate::MemoryLog;
use crate::log::{Appended, Conf, LogStore, LogWrite, Position, Recovered};

/// What a member survives a crash with.
pub(super) struct Disk {
    pub(super) log: Arc<SimLog>,
    pub(super) engine: Arc<MemoryEngine>,
    pub(super) snapshots: PathBuf,
}

impl Disk {
    pub(super) fn new(dir: &Path, id: u64, bug: Bug) -> Self {
        let log = SimLog { log: MemoryLog::default(), state: Mutex::default(), records_late: bug == Bug::LateRecord };
        Disk { log: Arc::new(log), engine: Arc::new(MemoryEngine::new()), snapshots: dir.join(format!("m{id}")) }
    }

    /// The engine makes room in memory, unasked.
    pub(super) fn flush_state(&self) {
        self.engine.flush().expect("memory has no faults");
    }

    /// What was not on the disk is not there any more; the power is back.
    pub(super) fn recover(&self) {
        self.engine.crash();
        *self.log.state.lock() = State::default();
    }
}

/// A log that the power may leave.
pub(super) struct SimLog {
    log: MemoryLog,
    state: Mutex<State>,
    /// See [`Bug::LateRecord`].
    records_late: bool,
}

#[derive(Default)]
struct State {
    cut: Option<Cut>,
    late: Option<Conf>,
}

/// When the power goes.
#[derive(Clone, Copy, Debug, Hash)]
pub(super) struct Cut {
    /// Batches until then.
    pub(super) batches: u32,
    /// Whether the one that fails is on the disk all the same.
    pub(super) last_is_whole: bool,
}

impl SimLog {
    pub(super) fn cut_power(&self, cut: Cut) {
        self.state.lock().cut = Some(cut);
    }

    /// Whether the power is gone, or is about to go.
    pub(super) fn is_cut(&self) -> bool {
        self.state.lock().cut.is_some()
    }

    fn batch<T>(&self, write: impl FnOnce(&MemoryLog) -> Result<T, Fault>) -> Result<T, Fault> {
        match &mut self.state.lock().cut {
            None => return write(&self.log),
            Some(cut) if cut.batches > 0 => {
                cut.batches -= 1;
                return write(&self.log);
            }
            Some(cut) => {
                if std::mem::take(&mut cut.last_is_whole) {
                    write(&self.log)?;
                }
            }
        }
        Err(std::io::Error::other("the power is gone").into())
    }
}

impl LogStore for SimLog {
    fn recover(&self) -> Result<Recovered, Fault> {
        self.log.recover()
    }

    fn bootstrap(&self, member_id: u64, at: Position, conf: &Conf) -> Result<(), Fault> {
        self.batch(|log| log.bootstrap(member_id, at, conf))
    }

    fn append(&self, write: &LogWrite) -> Result<Appended, Fault> {
        if self.records_late {
            let is_record = write.entries.is_empty() && write.hard_state.is_none();
            let mut state = self.state.lock();
            state.late = write.conf.clone().or(state.late.take());
            if is_record {
                return Ok(Appended::default());
            }
            let write = LogWrite { conf: state.late.take(), ..write.clone() };
            drop(state);
            return self.batch(|log| log.append(&write));
        }
        self.batch(|log| log.append(write))
    }

    fn entries(&self, low: u64, high: u64, bytes_max: u64) -> Result<Vec<Entry>, Fault> {
        self.log.entries(low, high, bytes_max)
    }

    fn truncate(&self, through: Position) -> Result<(), Fault> {
        self.batch(|log| log.truncate(through))
    }

    fn begin_install(&self, at: Position, conf: &Conf) -> Result<(), Fault> {
        self.batch(|log| log.begin_install(at, conf))
    }

    fn cancel_install(&self) -> Result<(), Fault> {
        self.batch(LogStore::cancel_install)
    }

    fn finish_install(&self, at: Position, conf: &Conf) -> Result<(), Fault> {
        self.batch(|log| log.finish_install(at, conf))
    }

    fn disk_bytes(&self) -> u64 {
        self.log.disk_bytes()
    }
}
