//! The log thread: writes and syncs what raft wants durable, while raft's thread fills the next batch.
//!
//! Everything that queued up during one sync goes into the next as a single write, so there are never more syncs than the
//! disk can do. The queue never blocks raft's thread. Bound: proposals stop at `inflight_batches_max`, and entries from
//! peers are dropped on arrival while [`WriteQueue::bytes`] is over `append_queue_bytes_max`.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use parking_lot::{Condvar, Mutex};
use tenure_storage::Fault;

use crate::apply::Install;
use crate::log::{Log, LogWrite, Position, entry_bytes};
use crate::metrics::Metrics;

/// What raft's thread asks of the log thread.
#[derive(Default)]
pub(crate) struct WriteQueue {
    state: Mutex<Queued>,
    bell: Condvar,
}

/// What waits, as one piece of work.
#[derive(Default)]
pub(crate) struct Queued {
    write: LogWrite,
    write_bytes: usize,
    /// The newest `Ready` contained in `write`; 0: none.
    ready_number: u64,
    truncate: Option<Position>,
    /// Written last: the note of a snapshot that is to be installed.
    install: Option<Install>,
    stopping: bool,
}

impl WriteQueue {
    /// Queues what the `Ready` of this number wants durable.
    pub(crate) fn push(&self, ready_number: u64, write: LogWrite) {
        let mut queued = self.state.lock();
        queued.write_bytes += write.entries.iter().map(entry_bytes).sum::<usize>();
        queued.write.merge(write);
        queued.ready_number = ready_number;
        self.bell.notify_one();
    }

    /// Queues forgetting the entries up to `through`, after the writes queued before it; a later call replaces it.
    pub(crate) fn push_truncate(&self, through: Position) {
        self.state.lock().truncate = Some(through);
        self.bell.notify_one();
    }

    /// Queues the note of a snapshot that is about to be installed, after the writes queued before it. Nothing may be queued
    /// after it until that is done.
    pub(crate) fn push_install(&self, install: Install) {
        self.state.lock().install = Some(install);
        self.bell.notify_one();
    }

    /// Bytes of entries that wait.
    pub(crate) fn bytes(&self) -> usize {
        self.state.lock().write_bytes
    }

    /// Whether nothing is queued; for a driver that steps the threads' work itself.
    #[cfg(test)]
    pub(crate) fn is_idle(&self) -> bool {
        let queued = self.state.lock();
        queued.ready_number == 0 && queued.truncate.is_none() && queued.install.is_none()
    }

    /// Lets the log thread end once the queue is empty.
    pub(crate) fn stop(&self) {
        self.state.lock().stopping = true;
        self.bell.notify_one();
    }

    /// Waits for work and takes all of it. `None`: stopped and nothing left.
    pub(crate) fn take(&self) -> Option<Queued> {
        let mut queued = self.state.lock();
        loop {
            if queued.ready_number != 0 || queued.truncate.is_some() || queued.install.is_some() {
                let stopping = queued.stopping;
                return Some(std::mem::replace(&mut *queued, Queued { stopping, ..Queued::default() }));
            }
            if queued.stopping {
                return None;
            }
            self.bell.wait(&mut queued);
        }
    }
}

/// Writes and syncs. Raft's thread calls it too, when nothing waits for it meanwhile: see [`node`](crate::node).
///
/// # Errors
/// The log's; the member must stop.
pub(crate) fn write(log: &Log, metrics: &Metrics, write: &LogWrite) -> Result<(), Fault> {
    let done = log.store().append(write)?;
    metrics.wal_fsync_duration.observe(done.sync);
    metrics.wal_write_duration.observe(done.write);
    metrics.wal_write_bytes.fetch_add(done.bytes, Ordering::Relaxed);
    if let Some(last) = write.entries.last() {
        log.mark_persisted(Position { index: last.index, term: last.term });
    }
    Ok(())
}

/// What the log thread tells the others.
pub(crate) enum Written {
    /// The `Ready` of this number and all before are durable.
    Ready(u64),
    /// The log notes that a snapshot is being installed.
    Install(Install),
}

/// Runs until the queue is stopped. `tell` is told what is durable.
///
/// # Errors
/// The log's; the member must stop.
pub(crate) fn run(
    queue: &WriteQueue,
    log: &Arc<Log>,
    metrics: &Metrics,
    mut tell: impl FnMut(Written),
) -> Result<(), Fault> {
    while let Some(work) = queue.take() {
        carry_out(work, log, metrics, &mut tell)?;
    }
    Ok(())
}

/// Does what was taken from the queue.
///
/// # Errors
/// As [`run`].
pub(crate) fn carry_out(
    work: Queued,
    log: &Log,
    metrics: &Metrics,
    tell: &mut impl FnMut(Written),
) -> Result<(), Fault> {
    if work.ready_number != 0 {
        write(log, metrics, &work.write)?;
        tell(Written::Ready(work.ready_number));
    }
    if let Some(through) = work.truncate {
        log.store().truncate(through)?;
    }
    if let Some(install) = work.install {
        log.store().begin_install(install.at, &install.conf)?;
        tell(Written::Install(install));
    }
    Ok(())
}
