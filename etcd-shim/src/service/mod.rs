//! The gRPC services. Each method does the same five things: find the tenant, check, convert, call, convert.
//!
//! A service holds a [`Context`] and no other state. It reaches storage only through the [`Tenant`] its connection belongs
//! to, so nothing here can name another tenant's data.
//!
//! Order within a write (contract 1.0): quota, the request's own check, its size; the rest is decided by `apply`.

pub mod auth;
pub mod cluster;
pub mod health;
pub mod kv;
pub mod lease;
pub mod maintenance;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
pub mod watch;

use tenure_storage::apply::exceeds_quota;
use tenure_storage::{AlarmKind, Command, Limit, Outcome, Refusal, Reply, TenantPhase};
use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status};

use crate::cell::{Cell, DEFAULT_TENANT, Tenant};
use crate::cell_error::{CellError, MembershipError};
use crate::inflight::{InFlight, Reservation};
use crate::proto::etcdserverpb::ResponseHeader;
use crate::tenant::ConnectionIdentity;
use crate::throttle::in_force;

/// The etcd release whose behaviour is followed, as `Status` and `/version` name it.
pub const ETCD_VERSION: &str = "3.7.1";

/// The storage version that goes with it.
pub const STORAGE_VERSION: &str = "3.7.0";

/// Largest write in bytes, unless `--max-request-bytes` says otherwise: etcd's default.
pub const MAX_REQUEST_BYTES: usize = 3 << 19;

/// What that may be set to. A command of the log has up to 16 MiB, with what goes with it.
pub const REQUEST_BYTES_BOUND: usize = 15 << 20;

/// Most operations of a txn, per level, unless `--max-txn-ops` says otherwise: etcd's default.
pub const MAX_TXN_OPS: usize = 128;

/// `--max-request-bytes` and `--max-txn-ops`.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub max_request_bytes: usize,
    pub max_txn_ops: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Limits { max_request_bytes: MAX_REQUEST_BYTES, max_txn_ops: MAX_TXN_OPS }
    }
}

/// What every service needs. Cheap to clone.
#[derive(Clone)]
pub struct Context {
    pub cell: Cell,
    pub limits: Limits,
    pub in_flight: InFlight,
}

impl Context {
    /// As [`Context::tenant_of`], for what a member without a vote may answer too (contract 2: "rpc not supported for learner").
    ///
    /// # Errors
    /// As [`Context::tenant_of`].
    pub fn tenant_of_any<T>(&self, request: &Request<T>) -> Result<Tenant, Status> {
        let tenant = request
            .extensions()
            .get::<ConnectionIdentity>()
            .and_then(|identity| identity.tenant_in(&self.cell))
            .ok_or_else(|| Status::permission_denied("etcdserver: permission denied"))?;
        if wants_leader(request.metadata()) && tenant.leader_id() == 0 {
            return Err(CellError::NoLeader.into());
        }
        Ok(tenant)
    }

    /// The tenant whose connection this request came in on. Also the place where a request that wants a leader is turned
    /// away while there is none (contract 3.1), and where a learner refuses, because every method that is built passes here first.
    ///
    /// # Errors
    /// `PermissionDenied` if the connection belongs to no tenant, or to one that does not exist; [`CellError::NoLeader`].
    pub fn tenant_of<T>(&self, request: &Request<T>) -> Result<Tenant, Status> {
        let tenant = self.tenant_of_any(request)?;
        self.check_voter()?;
        Ok(tenant)
    }

    /// Room for an answer that is made whole and may have so many bytes; waits for it.
    ///
    /// # Errors
    /// [`CellError::TimeoutRead`], if there was none for too long.
    async fn reserve(&self, tenant: &Tenant, bytes: usize) -> Result<Reservation, CellError> {
        let mut reservation = self.in_flight.of(tenant);
        if !reservation.try_reach(bytes) {
            reservation.wait_for_room(bytes / 2).await?;
        }
        Ok(reservation)
    }

    /// # Errors
    /// [`MembershipError::Learner`], if this member has no vote.
    pub fn check_voter(&self) -> Result<(), Status> {
        match self.cell.raft_status().is_learner {
            true => Err(CellError::from(MembershipError::Learner).into()),
            false => Ok(()),
        }
    }

    /// As [`Context::tenant_of`], for what concerns the whole cell: only the tenant `default` may, which is whoever the operator lets
    /// in without a name.
    ///
    /// # Errors
    /// As [`Context::tenant_of`]; `PermissionDenied` for every other tenant.
    pub fn operator_of<T>(&self, request: &Request<T>) -> Result<Tenant, Status> {
        let tenant = self.tenant_of(request)?;
        if tenant.name() != DEFAULT_TENANT {
            return Err(Status::permission_denied("etcdserver: permission denied"));
        }
        Ok(tenant)
    }

    /// The largest write of this tenant: its own limit, or the member's.
    pub fn request_bytes_max(&self, tenant: &Tenant) -> usize {
        let own = in_force(Limit::RequestBytes, tenant.limit(Limit::RequestBytes))
            .and_then(|bytes| usize::try_from(bytes).ok());
        own.map_or(self.limits.max_request_bytes, |own| own.min(self.limits.max_request_bytes))
    }

    /// Refuses a write whose estimated cost does not fit the tenant's quota, and raises the alarm that stops such writes
    /// until an operator clears it. `apply` looks again: here is only the sum of the last batch. A tenant that may not write at all
    /// hears so from `apply`, not that it has no room.
    ///
    /// # Errors
    /// [`Refusal::NoSpace`].
    pub async fn check_quota(&self, tenant: &Tenant, cost_bytes: u64) -> Result<(), CellError> {
        if !exceeds_quota(tenant.quota_bytes(), tenant.reader().db_size_bytes(), cost_bytes) {
            return Ok(());
        }
        if tenant.profile().phase != TenantPhase::Active {
            return Ok(());
        }
        let member_id = tenant.member_id();
        let raised = tenant
            .reader()
            .state()
            .alarms
            .iter()
            .any(|alarm| alarm.member_id == member_id && alarm.kind == AlarmKind::NOSPACE);
        if !raised {
            let alarm = Command::Alarm { activate: true, member_id, kind: AlarmKind::NOSPACE };
            // The write is refused whether or not the alarm could be raised; the next one raises it again.
            if let Err(error) = tenant.propose(alarm).await {
                tracing::warn!(tenant = %tenant.id(), %error, "raise the NOSPACE alarm");
            }
        }
        Err(Refusal::NoSpace.into())
    }
}

/// Whether a request asks to be refused, and a stream to be ended, while nobody leads.
pub fn wants_leader(metadata: &MetadataMap) -> bool {
    metadata.get("hasleader").is_some_and(|value| value.as_encoded_bytes() == b"true")
}

/// A complete header.
pub fn header(tenant: &Tenant, revision: i64) -> ResponseHeader {
    ResponseHeader {
        cluster_id: tenant.cluster_id(),
        member_id: tenant.member_id(),
        revision,
        raft_term: tenant.raft_term(),
    }
}

/// Proposes a command and waits until it is applied; answers its reply and the header for it.
///
/// # Errors
/// Whatever kept it from being applied, and what `apply` refused.
pub async fn write(tenant: &Tenant, command: Command) -> Result<(ResponseHeader, Reply), CellError> {
    let Outcome { revision, result } = tenant.propose(command).await?;
    Ok((header(tenant, revision), result?))
}

/// Hands over an answer that was made whole, with what it was reserved for, and counted with what it takes.
///
/// # Errors
/// [`CellError::TimeoutApply`]: nothing was reserved for an answer that is larger than most of its kind, and the tenant's others that nobody has
/// read take all the room there is.
fn answer<T: prost::Message>(message: T, mut reservation: Reservation) -> Result<Response<T>, CellError> {
    let bytes = message.encoded_len();
    if reservation.is_empty() && !reservation.try_reach(bytes) {
        return Err(CellError::TimeoutApply);
    }
    reservation.settle(bytes);
    reservation.charge(bytes);
    Ok(with_permit(message, reservation))
}

/// Hands the reservation over to whoever sends the response's body.
fn with_permit<T>(message: T, reservation: Reservation) -> Response<T> {
    let mut response = Response::new(message);
    if let Some(permit) = reservation.into_permit() {
        response.extensions_mut().insert(permit);
    }
    response
}
