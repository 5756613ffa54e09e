//! What raft-server drives, and what hears of it: the state machine with its replies, and the observer of what was applied.

use std::path::Path;
use std::sync::Arc;

use tenure_raft_server as raft;
use tenure_raft_server::transport::peers::Peers;
use tenure_storage::{
    Copier, Fault, LeaseId, Membership, Observer, Outcome, RocksEngine, StateMachine, Store, TenantChange, TenantId,
};

use super::{Background, Failure, load_leases, tenants};
use crate::inflight::{InFlight, Reservation};
use crate::lessor::Lessor;

/// What raft-server drives.
pub(super) struct Applier {
    pub(super) state_machine: StateMachine<RocksEngine>,
    pub(super) undelivered: InFlight,
}

/// An outcome on its way to who waits for it.
pub(super) struct Answer {
    pub(super) outcome: Outcome,
    /// Counts it until it is fetched.
    _held: Reservation,
}

/// What storage tells while it applies.
pub(super) struct CellObserver {
    pub(super) lessor: Arc<Lessor>,
    pub(super) background: Arc<Background>,
    pub(super) peers: Peers,
    pub(super) changes: Arc<tenants::Changes>,
    /// Set when the state is open: what comes before that is read from it then.
    pub(super) store: std::sync::OnceLock<Store<RocksEngine>>,
    pub(super) failure: Failure,
}

impl Observer for CellObserver {
    fn lease_granted(&self, tenant: TenantId, id: LeaseId, ttl_seconds: i64) {
        self.lessor.granted(tenant, id, ttl_seconds);
    }

    fn lease_revoked(&self, tenant: TenantId, id: LeaseId) {
        self.lessor.revoked(tenant, id);
    }

    fn reclaim_pending(&self, tenant: TenantId) {
        self.background.reclaimer.add(tenant);
    }

    fn reclaimed(&self, tenant: TenantId) {
        self.background.reclaimer.remove(tenant);
    }

    fn delivery_pending(&self, tenant: TenantId) {
        self.background.deliveries.add(tenant);
    }

    fn tenant_changed(&self, tenant: TenantId, change: TenantChange) {
        match change {
            TenantChange::Created => return self.changes.count_made(),
            TenantChange::Forgotten => {}
            TenantChange::Profile => self.follow_phase(tenant),
            TenantChange::Deleted => {
                self.lessor.forget(tenant);
                self.changes.deleted(tenant);
            }
        }
        self.changes.count();
    }

    fn members_changed(&self, membership: &Membership) {
        // An empty state knows nobody yet.
        if !membership.members.is_empty() {
            let members = membership.members.iter().map(|member| (member.id, member.peer_urls.clone()));
            self.peers.set_members(&members.collect::<Vec<_>>());
        }
    }

    fn state_replaced(&self) {
        let Some(store) = self.store.get() else { return };
        if let Err(fault) = load_leases(store, &self.lessor) {
            self.failure.report(&fault.to_string());
        }
        self.changes.count();
        self.changes.count_made();
    }
}

impl raft::StateMachine for Applier {
    type Reply = Answer;

    fn applied_index(&self) -> u64 {
        self.state_machine.applied_index()
    }

    /// Of outcomes that are not fetched as fast as they are made, so many are kept as others have room for in their budget of answers: a few
    /// bytes of a txn can answer megabytes.
    fn apply(&mut self, entries: Vec<raft::CommittedEntry>) -> Result<Vec<Vec<Option<Answer>>>, Fault> {
        let mut answers: Vec<Vec<Option<Answer>>> =
            entries.iter().map(|entry| Vec::with_capacity(entry.commands.len())).collect();
        let (wanted, entries): (Vec<_>, Vec<_>) =
            entries.into_iter().map(|entry| (entry.wanted, (entry.index, entry.commands))).unzip();
        let applied = self.state_machine.apply_round(&entries, |entry, place, tenant, outcome| {
            let is_wanted = wanted[entry].get(place).copied().unwrap_or(false);
            let held = if is_wanted { self.undelivered.hold(tenant, outcome.data_bytes()) } else { None };
            answers[entry].push(held.map(|held| Answer { outcome, _held: held }));
        })?;
        answers.truncate(applied);
        Ok(answers)
    }

    fn durable_index(&self) -> Result<u64, Fault> {
        self.state_machine.durable_index()
    }

    fn flush(&mut self) -> Result<u64, Fault> {
        self.state_machine.flush()
    }

    fn begin_flush(&mut self) -> Result<(), Fault> {
        self.state_machine.begin_flush()
    }

    fn snapshotter(&self) -> Arc<dyn raft::Snapshotter> {
        Arc::new(StateCopier(self.state_machine.copier()))
    }

    fn install(&mut self, dir: &Path, index: u64) -> Result<(), Fault> {
        self.state_machine.install(dir, index)
    }
}

struct StateCopier(Copier<RocksEngine>);

impl raft::Snapshotter for StateCopier {
    fn write_to(&self, dir: &Path) -> Result<u64, Fault> {
        self.0.write_to(dir)
    }
}
