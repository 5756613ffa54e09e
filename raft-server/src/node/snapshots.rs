//! Snapshots as raft's thread sees them: offered, fetched, made; see the essay of [`snapshot`](crate::snapshot).

use std::panic::AssertUnwindSafe;
use std::path::PathBuf;
use std::sync::Arc;

use raft::SnapshotStatus;
use tenure_storage::Fault;

use super::{Event, Node};
use crate::log::Position;
use crate::snapshot::{self, OutgoingSnapshot, SnapshotOffer, Snapshotter};
use crate::transport::Message;

/// Snapshots that come and go.
pub(crate) struct Snapshots {
    pub(crate) snapshotter: Arc<dyn Snapshotter>,
    /// Whether a thread is writing one.
    pub(crate) making: bool,
    pub(crate) made: u64,
    /// Since a member was last in need of the outgoing one.
    pub(crate) idle_ticks: usize,
    pub(crate) offer_ticks: usize,
    /// What is being fetched, and raft's message that offered it.
    pub(crate) fetching: Option<(SnapshotOffer, Box<Message>)>,
    /// Index and directory of one that could not be fetched whole.
    pub(crate) part: Option<(u64, PathBuf)>,
    /// What raft is about to hear of.
    pub(crate) fetched: Option<SnapshotOffer>,
    /// The `Ready` that waits for the snapshot to be installed.
    pub(crate) installing: Option<crate::ready::Installing>,
}

impl<R: Send + 'static> Node<R> {
    pub(super) fn on_offer(&mut self, message: Box<Message>) {
        let metadata = message.get_snapshot().get_metadata();
        let at = Position { index: metadata.index, term: metadata.term };
        if self.snapshots.installing.is_some() || self.snapshots.fetched.is_some() || self.append_paused() {
            return;
        }
        if at.index <= self.raw.raft.raft_log.committed {
            // Nothing to fetch: raft says so to its sender.
            return self.step(*message);
        }
        let path = self.config.snapshot_dir.join(snapshot::incoming_name(&message));
        let offer = SnapshotOffer { from: message.from, at, path };
        if let Some((before, first)) = &mut self.snapshots.fetching {
            if *before == offer {
                *first = message;
                return;
            }
            snapshot::remove(&before.path);
        }
        if let Some(part) = self.snapshots.part.take_if(|(_, part)| *part != offer.path) {
            snapshot::remove(&part.1);
        }
        tracing::info!(from = offer.from, index = at.index, "fetch a snapshot");
        self.snapshots.fetching = Some((offer.clone(), message));
        self.transport.fetch(offer);
    }

    pub(super) fn on_fetched(&mut self, offer: SnapshotOffer, complete: bool) {
        let Some((_, message)) = self.snapshots.fetching.take_if(|(fetching, _)| *fetching == offer) else {
            return snapshot::remove(&offer.path);
        };
        if !complete {
            tracing::warn!(from = offer.from, index = offer.at.index, "a snapshot could not be fetched");
            // It may be offered again, and its bytes be what is missing on the disk.
            self.snapshots.part = Some((offer.at.index, offer.path));
            return;
        }
        self.snapshots.part = None;
        self.snapshots.fetched = Some(offer);
        self.step(*message);
        if self.raw.raft.raft_log.unstable_snapshot().is_none()
            && let Some(offer) = self.snapshots.fetched.take()
        {
            // A newer term, or entries that came meanwhile.
            snapshot::remove(&offer.path);
        }
    }

    /// Offers what is ready again to members that have not answered, and forgets it when nobody needs it.
    pub(super) fn offer_snapshots(&mut self) {
        let committed = self.raw.raft.raft_log.committed;
        if let Some((_, part)) = self.snapshots.part.take_if(|(index, _)| *index <= committed) {
            // It caught up without.
            snapshot::remove(&part);
        }
        let needy: Vec<u64> = match self.is_leader() {
            true => {
                let progress = self.raw.raft.prs().iter();
                progress.filter(|(_, of)| of.state == raft::ProgressState::Snapshot).map(|(id, _)| *id).collect()
            }
            false => Vec::new(),
        };
        if needy.is_empty() {
            (self.snapshots.offer_ticks, self.snapshots.idle_ticks) = (0, self.snapshots.idle_ticks + 1);
            if self.snapshots.idle_ticks == snapshot::IDLE_TICKS {
                self.log.outgoing.set(None);
            }
            return;
        }
        self.snapshots.idle_ticks = 0;
        self.snapshots.offer_ticks += 1;
        if self.snapshots.offer_ticks >= snapshot::OFFER_TICKS {
            self.snapshots.offer_ticks = 0;
            for id in needy {
                self.raw.report_snapshot(id, SnapshotStatus::Failure);
            }
        }
    }

    /// Has a snapshot written if raft wants one.
    pub(super) fn make_snapshot(&mut self) {
        if self.snapshots.making || !self.log.outgoing.take_wanted() || !self.is_leader() {
            return;
        }
        self.snapshots.making = true;
        self.snapshots.made += 1;
        let path = self.config.snapshot_dir.join(format!("out-{:x}-{}", self.shared.life, self.snapshots.made));
        let (snapshotter, events) = (Arc::clone(&self.snapshots.snapshotter), self.shared.events.clone());
        let write = move || {
            // Whatever happens to it, raft's thread must hear that it is over.
            let written = std::panic::catch_unwind(AssertUnwindSafe(|| snapshotter.write_to(&path)));
            let written = written.unwrap_or_else(|_| Err(Fault::Engine("writing a snapshot panicked".to_owned())));
            let written = written.map(|index| (index, path.clone(), snapshot::bytes_in(&path)));
            if written.is_err() {
                snapshot::remove(&path);
            }
            let _ = events.send(Event::SnapshotMade(written));
        };
        if self.config.snapshots_on_raft_thread {
            return write();
        }
        if let Err(error) = std::thread::Builder::new().name("raft-snapshot".to_owned()).spawn(write) {
            tracing::warn!(%error, "start a thread for a snapshot");
            self.snapshots.making = false;
        }
    }

    pub(super) fn on_snapshot_made(&mut self, made: Result<(u64, PathBuf, u64), Fault>) -> Result<(), Fault> {
        self.snapshots.making = false;
        let (index, path, bytes) = match made {
            Ok(made) => made,
            Err(fault) => {
                // Raft asks again.
                tracing::warn!(%fault, "write a snapshot");
                return Ok(());
            }
        };
        // A state that raft's thread has not heard of yet: it is applied, so it is committed.
        let term = self.log.term_at(index)?;
        match term {
            Some(term) if self.conf.index <= index => {
                let at = Position { index, term };
                self.snapshots.idle_ticks = 0;
                self.log.outgoing.set(Some(OutgoingSnapshot { at, conf: self.conf.clone(), path, bytes }));
            }
            // Members changed meanwhile, or the log was replaced; raft asks again.
            Some(_) | None => snapshot::remove(&path),
        }
        Ok(())
    }
}
