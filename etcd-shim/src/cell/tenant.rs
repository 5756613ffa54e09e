//! One tenant of a cell: all that services and clients can reach.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rand::Rng;
use tenure_storage::{
    Command, Fault, LeaseId, Limit, Outcome, Profile, ReadError, Refusal, RocksEngine, TenantId, TenantReader,
};
use tokio::sync::SemaphorePermit;

use super::{Inner, TenantParts};
use crate::cell_error::CellError;
use crate::lessor::{Remaining, Renewed};
use crate::proto::cell::peer_call::Call;
use crate::proto::cell::{Lease, PeerAnswer};

/// Ids drawn for a lease until one is free. There are 2^63, so the first is.
const LEASE_ID_DRAWS_MAX: usize = 3;

/// A lease that was granted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Granted {
    /// The tenant's revision, which a grant does not change.
    pub revision: i64,
    pub id: LeaseId,
    /// The effective one.
    pub ttl_seconds: i64,
}

/// An id that the server picks is positive, so that clients may print and parse it as they like.
fn draw_lease_id() -> LeaseId {
    LeaseId(rand::rng().random_range(1..=i64::MAX))
}

/// Bound to one tenant; cheap to clone. Clones of one that [`Cell::tenant`](super::Cell::tenant) gave share a count of their own: a connection's requests
/// do not meet those of others there.
#[derive(Clone)]
pub struct Tenant(Arc<Bound>);

pub(super) struct Bound {
    parts: Arc<TenantParts>,
    // Behind what has files open: the last owner of the cell unlocks the data directory.
    cell: Arc<Inner>,
}

impl std::fmt::Debug for Tenant {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Tenant").field(&self.name()).finish()
    }
}

impl Tenant {
    pub(super) fn new(parts: Arc<TenantParts>, cell: Arc<Inner>) -> Self {
        Tenant(Arc::new(Bound { parts, cell }))
    }
}

impl Tenant {
    pub fn id(&self) -> TenantId {
        self.0.parts.reader.id()
    }

    pub fn name(&self) -> &str {
        &self.0.parts.name
    }

    /// What is said of the tenant: whether it may be used, its limits, whose credentials are refused.
    pub fn profile(&self) -> Arc<Profile> {
        self.0.parts.reader.profile()
    }

    /// A limit that is said of the tenant, or of the cell.
    pub fn limit(&self, limit: Limit) -> Option<u64> {
        self.0.parts.reader.limit(limit)
    }

    /// Whether it was deleted: another may have its name.
    pub fn is_deleted(&self) -> bool {
        self.0.parts.reader.is_deleted()
    }

    /// Time that reading threads were at work for it, since this member started.
    pub fn read_time(&self) -> Duration {
        Duration::from_nanos(self.0.parts.read_ns.load(Ordering::Relaxed))
    }

    /// What this tenant's clients see as their cluster.
    pub fn cluster_id(&self) -> u64 {
        self.0.parts.cluster_id
    }

    pub fn member_id(&self) -> u64 {
        self.0.cell.identity().member_id
    }

    pub fn raft_term(&self) -> u64 {
        self.0.cell.raft.status().term
    }

    /// The member that leads, as this one knows it; 0 = none.
    pub fn leader_id(&self) -> u64 {
        self.0.cell.leader_id()
    }

    /// Whether this member refuses writes for want of room; see [`crate::disk`].
    pub fn is_disk_full(&self) -> bool {
        self.0.cell.disk.is_full()
    }

    /// Ends when no leader has been known for three election timeouts: what etcd waits before it ends the streams of
    /// clients that insist on a leader.
    pub async fn leader_lost(&self) {
        let mut leadership = self.0.cell.leadership.clone();
        loop {
            if leadership.wait_for(|now| now.leader_id == 0).await.is_err() {
                // The cell has stopped; the connection ends with it.
                std::future::pending::<()>().await;
            }
            let back = leadership.wait_for(|now| now.leader_id != 0);
            if tokio::time::timeout(3 * self.0.cell.election_timeout, back).await.is_err() {
                return;
            }
        }
    }

    /// Bytes this tenant may hold; negative = no limit.
    pub fn quota_bytes(&self) -> i64 {
        self.0.parts.reader.quota_bytes()
    }

    /// The shortest lease that is granted, in seconds: one and a half election timeouts, so that no change of leaders
    /// takes longer than a lease.
    pub fn lease_ttl_seconds_min(&self) -> i64 {
        let timeout = self.0.cell.election_timeout;
        i64::try_from((timeout + timeout / 2).as_millis().div_ceil(1_000)).unwrap_or(i64::MAX)
    }

    /// Writes a command of this tenant and waits until it is applied. When this is cancelled or times out the command may
    /// be applied all the same.
    ///
    /// # Errors
    /// Only for commands of which it is not known that they were applied; a refusal is an [`Outcome`].
    pub async fn propose(&self, command: Command) -> Result<Outcome, CellError> {
        self.0.cell.propose(self.id(), command).await
    }

    /// Waits until this member has applied every write that was acknowledged anywhere before the call.
    ///
    /// # Errors
    /// [`CellError::TimeoutRead`] without a leader.
    pub async fn read_barrier(&self) -> Result<(), CellError> {
        self.0.cell.read_barrier().await
    }

    /// For reads that take no longer than a handful of keys does.
    pub fn reader(&self) -> &TenantReader<RocksEngine> {
        &self.0.parts.reader
    }

    /// Runs a read of any length on the reading threads.
    ///
    /// # Errors
    /// [`CellError::TooManyRequests`] if too many reads of this tenant, or of all, are waiting.
    pub async fn read<T: Send + 'static>(
        &self,
        read: impl FnOnce(&TenantReader<RocksEngine>) -> T + Send + 'static,
    ) -> Result<T, CellError> {
        let parts = Arc::clone(&self.0.parts);
        let timed = move || {
            let began = Instant::now();
            let answer = read(&parts.reader);
            let spent_ns = u64::try_from(began.elapsed().as_nanos()).unwrap_or(u64::MAX);
            parts.read_ns.fetch_add(spent_ns, Ordering::Relaxed);
            answer
        };
        self.0.cell.read_pool.run(self.id(), timed).await
    }

    /// Waits until a replay of this tenant may ask for a reading thread. They come in the order in which they asked.
    pub(crate) async fn replay_turn(&self) -> Option<SemaphorePermit<'_>> {
        // Nobody closes it.
        self.0.parts.replays.acquire().await.ok()
    }

    /// Rewrites the engine's files without what was deleted. It is one engine for all tenants, so calls that come while
    /// one waits share that one's work.
    ///
    /// # Errors
    /// [`CellError::Fault`] ends this member.
    pub async fn defragment(&self) -> Result<(), CellError> {
        self.0.cell.defragment().await
    }

    /// This member cannot read its own state: [`Cell::failed`] answers.
    pub fn report(&self, fault: Fault) -> CellError {
        self.0.cell.report(fault)
    }

    /// What a read of this member's state answers: a fault is reported, as by [`Tenant::report`].
    pub fn answered<T>(&self, read: Result<T, ReadError>) -> Result<T, CellError> {
        read.map_err(|error| match error {
            ReadError::Refused(refusal) => refusal.into(),
            ReadError::Fault(fault) => self.report(fault),
        })
    }

    /// Ends a lease and deletes its keys, in one revision. Gives the tenant's revision then.
    ///
    /// # Errors
    /// [`Refusal::LeaseNotFound`].
    pub async fn revoke_lease(&self, id: LeaseId) -> Result<i64, CellError> {
        let Outcome { revision, result } = self.propose(Command::LeaseRevoke { id }).await?;
        result.map(|_| revision).map_err(CellError::from)
    }

    /// Grants a lease; with [`LeaseId::NONE`] the server picks an id. The TTL is raised to
    /// [`Tenant::lease_ttl_seconds_min`].
    ///
    /// # Errors
    /// [`Refusal::LeaseExists`] for an id that is taken.
    pub async fn grant_lease(&self, id: LeaseId, ttl_seconds: i64) -> Result<Granted, CellError> {
        let ttl_seconds = ttl_seconds.max(self.lease_ttl_seconds_min());
        let drawn = id == LeaseId::NONE;
        let mut draws_left = LEASE_ID_DRAWS_MAX;
        loop {
            let id = if drawn { draw_lease_id() } else { id };
            let Outcome { revision, result } = self.propose(Command::LeaseGrant { id, ttl_seconds }).await?;
            draws_left -= 1;
            match result {
                Ok(_) => return Ok(Granted { revision, id, ttl_seconds }),
                Err(Refusal::LeaseExists(_)) if drawn && draws_left > 0 => {}
                Err(refusal) => return Err(refusal.into()),
            }
        }
    }

    /// Renews a lease of this tenant, wherever the leader is. Answers its TTL in seconds, 0 if there is no such lease.
    ///
    /// # Errors
    /// [`CellError::NoLeader`] if that cannot be decided in time.
    pub async fn renew_lease(&self, id: LeaseId) -> Result<i64, CellError> {
        let decided = async {
            loop {
                if let Some(ttl_seconds) = self.0.cell.renew_lease_as_leader(self.id(), id).await? {
                    return Ok(ttl_seconds);
                }
                let call = Call::LeaseRenew(self.lease_of(id));
                if let Some(answer) = self.0.cell.ask_leader(call).await {
                    return Ok(if answer.missing { 0 } else { answer.ttl_seconds });
                }
            }
        };
        tokio::time::timeout(self.0.cell.request_timeout, decided).await.unwrap_or(Err(CellError::NoLeader))
    }

    /// What is left of a lease, as the leader knows; `None` if there is no such lease. Call it behind a read barrier.
    ///
    /// # Errors
    /// [`CellError::NoLeader`] if nobody can say in time.
    pub async fn lease_remaining(&self, id: LeaseId) -> Result<Option<Remaining>, CellError> {
        let told = async {
            loop {
                if self.0.cell.lessor.leads() {
                    return self.0.cell.lessor.remaining(self.id(), id);
                }
                if let Some(answer) = self.0.cell.ask_leader(Call::LeaseRemaining(self.lease_of(id))).await {
                    let PeerAnswer { ttl_seconds: seconds, granted_seconds, missing, .. } = answer;
                    return (!missing).then_some(Remaining { seconds, granted_seconds });
                }
            }
        };
        tokio::time::timeout(self.0.cell.request_timeout, told).await.map_err(|_| CellError::NoLeader)
    }

    fn lease_of(&self, id: LeaseId) -> Lease {
        Lease { tenant: self.id().0, id: id.0 }
    }

    /// Whether this member is in the cell without a vote.
    pub fn is_learner(&self) -> bool {
        self.0.cell.raft.status().is_learner
    }

    /// The leases of this tenant, those that end first in front.
    pub fn leases(&self) -> Vec<LeaseId> {
        self.0.cell.lessor.list(self.id())
    }
}

impl Inner {
    /// Renews a lease; `None` if this member does not decide about leases. Answers its TTL in seconds, 0 if there is no such lease.
    pub(super) async fn renew_lease_as_leader(&self, tenant: TenantId, id: LeaseId) -> Result<Option<i64>, CellError> {
        loop {
            let Some(term) = self.lessor.led_term() else { return Ok(None) };
            match self.lessor.renew(tenant, id).await {
                Renewed::For { .. } => {
                    // Before the client may rely on it.
                    if !self.leads_still(term).await? {
                        return Ok(None);
                    }
                    // That may have taken longer than the lease had left, and it may be gone since.
                    match self.lessor.renew(tenant, id).await {
                        Renewed::For { ttl_seconds } if self.lessor.led_term() == Some(term) => {
                            return Ok(Some(ttl_seconds));
                        }
                        Renewed::For { .. } | Renewed::Missing => {}
                        Renewed::NotLeader => return Ok(None),
                    }
                }
                Renewed::NotLeader => return Ok(None),
                // It may have been granted by an earlier leader and not be applied here yet.
                Renewed::Missing => {
                    self.read_barrier().await?;
                    if self.lessor.remaining(tenant, id).is_none() {
                        return Ok(Some(0));
                    }
                }
            }
        }
    }
}
