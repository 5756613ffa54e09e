//! Copies of the state for members that are too far behind for the log.
//!
//! A snapshot is a directory that the state machine wrote ([`Snapshotter`]), and its place in the log. The leader makes one when
//! raft asks for it, on a thread of its own, and offers it: raft's message names the place only. The member that is behind
//! fetches the directory through its transport ([`Transport::fetch`](crate::Transport::fetch)), and raft hears of the snapshot
//! when all of it is there.
//!
//! Installing, in an order that a crash may cut anywhere: the log notes what is about to be installed; the state machine
//! switches to the fetched directory, durably; the log forgets its entries, begins after the snapshot, and drops the note. A
//! member that starts with a note looks at the state: if that has the snapshot, the log is reset now; if not, the note is
//! dropped and the leader offers again.
//!
//! Bounds: one outgoing snapshot and one incoming at a time. An outgoing one is removed when nobody was in need of it for
//! [`IDLE_TICKS`]; while it is offered, the log keeps the entries after it, up to [`KEPT_FOR_SNAPSHOT`] times what it keeps
//! anyway, or the snapshot's own bytes if those are more, up to [`KEPT_FOR_SNAPSHOT_MAX`] times that: a member that fetches for
//! longer gets another, with new files. Whoever cannot take it, for want of room say, must not cost its leader's disk more. What was fetched of one that
//! is not complete is kept until another is offered, or not needed.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use raft::eraftpb::{Message, Snapshot, SnapshotMetadata};
use tenure_storage::Fault;

use crate::log::{Conf, Position};

/// Ticks without a member in need after which an outgoing snapshot is removed.
pub(crate) const IDLE_TICKS: usize = 600;

/// Ticks after which a snapshot is offered again to a member that has not taken it: it may have restarted. One that is
/// fetching it ignores the repeated offer.
pub(crate) const OFFER_TICKS: usize = 20;

/// See the module's essay.
pub(crate) const KEPT_FOR_SNAPSHOT: u64 = 8;

/// And so many times that, if the snapshot is as large.
pub(crate) const KEPT_FOR_SNAPSHOT_MAX: u64 = 4;

/// Makes copies of the state while it goes on changing.
pub trait Snapshotter: Send + Sync {
    /// Writes the state, as of some applied index, to the directory `dir`, which does not exist yet and whose parent does.
    /// Durable on return. Gives that index.
    ///
    /// # Errors
    /// A [`Fault`]; what is in `dir` then is removed by the caller, and the member goes on.
    fn write_to(&self, dir: &Path) -> Result<u64, Fault>;
}

/// A snapshot that is offered. Its directory is removed when the last who holds it lets go.
#[derive(Debug)]
pub struct OutgoingSnapshot {
    pub at: Position,
    pub(crate) conf: Conf,
    pub path: PathBuf,
    /// Of all its files.
    pub(crate) bytes: u64,
}

/// Bytes of the files in a directory, as far as they can be seen.
pub(crate) fn bytes_in(dir: &Path) -> u64 {
    let files = std::fs::read_dir(dir).into_iter().flatten().flatten();
    files.filter_map(|file| file.metadata().ok()).map(|metadata| metadata.len()).sum()
}

impl Drop for OutgoingSnapshot {
    fn drop(&mut self) {
        remove(&self.path);
    }
}

/// Counts what was renamed to be removed.
static GONE: AtomicU64 = AtomicU64::new(0);

/// Removes a directory that is not needed any more; one that is left over is removed at the next start. Raft's thread does not
/// wait for that, which may take long; the name is free at once.
pub(crate) fn remove(path: &Path) {
    let gone = path.with_file_name(format!("gone-{}", GONE.fetch_add(1, Ordering::Relaxed)));
    match std::fs::rename(path, &gone) {
        Ok(()) => {}
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return,
        Err(error) => return tracing::warn!(path = %path.display(), %error, "remove a snapshot"),
    }
    let started = std::thread::Builder::new().name("raft-remove".to_owned()).spawn(move || {
        if let Err(error) = std::fs::remove_dir_all(&gone) {
            tracing::warn!(path = %gone.display(), %error, "remove a snapshot");
        }
    });
    if let Err(error) = started {
        tracing::warn!(%error, "start a thread to remove a snapshot");
    }
}

/// Where what is offered by this message is put: a name for this copy of this member's, since another copy of the same place has
/// other files. The name that the member gave it may be anything.
pub(crate) fn incoming_name(message: &Message) -> String {
    let snapshot = message.get_snapshot();
    let metadata = snapshot.get_metadata();
    let copy = crc32fast::hash(snapshot.get_data());
    format!("in-{:x}-{}-{}-{copy:08x}", message.from, metadata.term, metadata.index)
}

/// What a member is offered, as its transport needs to know it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotOffer {
    /// The member that has it.
    pub from: u64,
    /// Names it there.
    pub at: Position,
    /// Where to put it. May exist: an earlier attempt's part, which need not be fetched again.
    pub path: PathBuf,
}

/// The outgoing snapshot, as raft's storage hands it out.
#[derive(Debug, Default)]
pub(crate) struct Outgoing {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    wanted: bool,
    ready: Option<Arc<OutgoingSnapshot>>,
}

impl Outgoing {
    /// The snapshot, if there is one at or after `index_min` that knows of the member `to`, who could not use it otherwise; if
    /// not, notes that it is wanted.
    pub(crate) fn get(&self, index_min: u64, to: u64) -> Option<Snapshot> {
        let mut state = self.state.lock();
        let suits = |ready: &&Arc<OutgoingSnapshot>| {
            let conf = &ready.conf.state;
            ready.at.index >= index_min && (conf.voters.contains(&to) || conf.learners.contains(&to))
        };
        let ready = state.ready.as_ref().filter(suits).cloned();
        state.wanted |= ready.is_none();
        let ready = ready?;
        let metadata = SnapshotMetadata {
            index: ready.at.index,
            term: ready.at.term,
            conf_state: Some(ready.conf.state.clone()).into(),
            ..SnapshotMetadata::default()
        };
        let copy = ready.path.file_name().map_or_else(Vec::new, |name| name.as_encoded_bytes().to_vec());
        Some(Snapshot { metadata: Some(metadata).into(), data: copy.into(), ..Snapshot::default() })
    }

    /// Whether one is wanted; asked once for each.
    pub(crate) fn take_wanted(&self) -> bool {
        std::mem::take(&mut self.state.lock().wanted)
    }

    /// Offers this one from now on, or none. What was wanted while it was made is forgotten: raft asks again, and wants another only if
    /// this one does not suit. (Else one that takes longer to make than raft takes to ask would be replaced at once by a second, under the
    /// hands of whoever fetches it.)
    pub(crate) fn set(&self, snapshot: Option<OutgoingSnapshot>) {
        let before = {
            let mut state = self.state.lock();
            state.wanted = false;
            std::mem::replace(&mut state.ready, snapshot.map(Arc::new))
        };
        // Removing files takes time: not under the lock.
        drop(before);
    }

    /// Where the snapshot is in the log, and its bytes.
    pub(crate) fn at(&self) -> Option<(Position, u64)> {
        self.state.lock().ready.as_ref().map(|ready| (ready.at, ready.bytes))
    }

    /// The one of that name.
    pub(crate) fn named(&self, at: Position) -> Option<Arc<OutgoingSnapshot>> {
        self.state.lock().ready.as_ref().filter(|ready| ready.at == at).cloned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outgoing(index: u64, dir: &Path) -> OutgoingSnapshot {
        let mut conf = Conf { index, ..Conf::default() };
        conf.state.learners.push(9);
        OutgoingSnapshot { at: Position { index, term: 1 }, conf, path: dir.join(format!("out-{index}")), bytes: 0 }
    }

    // Raft asks at each heartbeat, and a copy of a large state takes longer than that.
    #[test]
    fn one_that_is_asked_for_while_it_is_made_is_made_once() {
        let dir = tempfile::tempdir().unwrap();
        let snapshots = Outgoing::default();
        assert!(snapshots.get(5, 9).is_none() && snapshots.take_wanted(), "it is being made");
        assert!(snapshots.get(5, 9).is_none());
        snapshots.set(Some(outgoing(7, dir.path())));
        assert!(!snapshots.take_wanted(), "there is one");
        assert_eq!(snapshots.get(5, 9).unwrap().get_metadata().index, 7);
        assert!(snapshots.get(8, 9).is_none() && snapshots.take_wanted(), "that one is too old");
        assert!(snapshots.get(5, 8).is_none() && snapshots.take_wanted(), "and knows nothing of this member");
    }
}
