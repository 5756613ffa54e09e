//! `etcdserverpb.Lease` (contract 1.3). Which leases exist is decided by `apply`, when they end by the
//! [`lessor`](crate::lessor).

use std::future::Future;
use std::pin::Pin;
use std::task::Poll;

use bytes::Bytes;
use futures::StreamExt;
use tenure_storage::LeaseId;
use tenure_storage::apply::LEASE_COST_BYTES;
use tokio_stream::Stream;
use tonic::{Request, Response, Status, Streaming};

use crate::cell::Tenant;
use crate::cell_error::CellError;
use crate::check;
use crate::inflight::Reservation;
use crate::lessor::Remaining;
use crate::own_requests::this_is_short;
use crate::proto::etcdserverpb::lease_server::Lease;
use crate::proto::etcdserverpb::{
    LeaseGrantRequest, LeaseGrantResponse, LeaseKeepAliveRequest, LeaseKeepAliveResponse, LeaseLeasesRequest,
    LeaseLeasesResponse, LeaseRevokeRequest, LeaseRevokeResponse, LeaseStatus, LeaseTimeToLiveRequest,
    LeaseTimeToLiveResponse,
};
use crate::service::{Context, answer, header, wants_leader};
use crate::status::in_etcds_words;

/// What a lease takes in a list of them, encoded and not.
const LISTED_LEASE_BYTES: usize = 32;

/// What a missing lease has left.
const TTL_OF_MISSING: i64 = -1;

/// The Lease service.
#[derive(Clone)]
pub struct LeaseService {
    context: Context,
}

impl LeaseService {
    pub fn new(context: Context) -> Self {
        LeaseService { context }
    }

    /// The keys of a lease, and room for them. They are read again if there was none, as ranges are.
    async fn attached_keys(&self, tenant: &Tenant, id: LeaseId) -> Result<(Vec<Bytes>, Reservation), Status> {
        let mut reservation = self.context.in_flight.of(tenant);
        loop {
            let keys = tenant.read(move |reader| reader.lease_keys(id)).await?;
            let keys = keys.map_err(|fault| tenant.report(fault))?;
            let bytes = keys.iter().map(|key| key.len() + size_of::<Bytes>()).sum();
            if reservation.try_reach(bytes) {
                return Ok((keys, reservation));
            }
            drop(keys);
            reservation.wait_for_room(bytes).await?;
        }
    }
}

/// Renews one lease. As in etcd the header is taken before that, and so may be older than the answer.
async fn keep_alive(tenant: &Tenant, request: LeaseKeepAliveRequest) -> Result<LeaseKeepAliveResponse, Status> {
    let header = header(tenant, tenant.reader().revision());
    let ttl = tenant.renew_lease(LeaseId(request.id)).await?;
    Ok(LeaseKeepAliveResponse { header: Some(header), id: request.id, ttl })
}

/// A time to live is the leader's to tell: without one, etcd says so instead of speaking of a timeout.
fn leader_is_missing(error: CellError) -> CellError {
    match error {
        CellError::TimeoutRead => CellError::NoLeader,
        CellError::Refused(_)
        | CellError::NoLeader
        | CellError::LeaderChanged
        | CellError::TimeoutWrite
        | CellError::TimeoutApply
        | CellError::TooManyRequests
        | CellError::TooLarge
        | CellError::Membership(_)
        | CellError::Stopped
        | CellError::Fault(_) => error,
    }
}

#[tonic::async_trait]
impl Lease for LeaseService {
    async fn lease_grant(&self, request: Request<LeaseGrantRequest>) -> Result<Response<LeaseGrantResponse>, Status> {
        let tenant = self.context.tenant_of(&request)?;
        let request = request.into_inner();
        self.context.check_quota(&tenant, LEASE_COST_BYTES).await?;
        check::lease_grant(&request)?;
        this_is_short(0);
        let granted = tenant.grant_lease(LeaseId(request.id), request.ttl).await?;
        Ok(Response::new(LeaseGrantResponse {
            header: Some(header(&tenant, granted.revision)),
            id: granted.id.0,
            ttl: granted.ttl_seconds,
            error: String::new(),
        }))
    }

    async fn lease_revoke(
        &self,
        request: Request<LeaseRevokeRequest>,
    ) -> Result<Response<LeaseRevokeResponse>, Status> {
        let tenant = self.context.tenant_of(&request)?;
        let id = LeaseId(request.into_inner().id);
        this_is_short(0);
        let revision = tenant.revoke_lease(id).await?;
        Ok(Response::new(LeaseRevokeResponse { header: Some(header(&tenant, revision)) }))
    }

    type LeaseKeepAliveStream = Pin<Box<dyn Stream<Item = Result<LeaseKeepAliveResponse, Status>> + Send>>;

    /// Answers one request after the other, and reads the next when the client has taken the answer. So a request for an
    /// expired lease holds up those behind it, as in etcd, until the lease is revoked.
    async fn lease_keep_alive(
        &self,
        request: Request<Streaming<LeaseKeepAliveRequest>>,
    ) -> Result<Response<Self::LeaseKeepAliveStream>, Status> {
        let tenant = self.context.tenant_of(&request)?;
        let insists_on_leader = wants_leader(request.metadata());
        let of_renewals = tenant.clone();
        let answers = request.into_inner().then(move |request| {
            let tenant = of_renewals.clone();
            async move { keep_alive(&tenant, request.map_err(in_etcds_words)?).await }
        });
        if !insists_on_leader {
            return Ok(Response::new(Box::pin(answers)));
        }
        let mut answers = Box::pin(answers);
        let mut leader_lost = Box::pin(async move { tenant.leader_lost().await });
        Ok(Response::new(Box::pin(futures::stream::poll_fn(move |task| match leader_lost.as_mut().poll(task) {
            Poll::Ready(()) => Poll::Ready(Some(Err(CellError::NoLeader.into()))),
            Poll::Pending => answers.as_mut().poll_next(task),
        }))))
    }

    async fn lease_time_to_live(
        &self,
        request: Request<LeaseTimeToLiveRequest>,
    ) -> Result<Response<LeaseTimeToLiveResponse>, Status> {
        let tenant = self.context.tenant_of(&request)?;
        let LeaseTimeToLiveRequest { id, keys } = request.into_inner();
        tenant.read_barrier().await.map_err(leader_is_missing)?;
        let revision = tenant.reader().revision();
        let mut response = LeaseTimeToLiveResponse {
            header: Some(header(&tenant, revision)),
            id,
            ttl: TTL_OF_MISSING,
            granted_ttl: 0,
            keys: Vec::new(),
        };
        if let Some(Remaining { seconds, granted_seconds }) = tenant.lease_remaining(LeaseId(id)).await? {
            response.ttl = seconds;
            response.granted_ttl = granted_seconds;
            if keys {
                let (keys, reservation) = self.attached_keys(&tenant, LeaseId(id)).await?;
                response.keys = keys;
                return Ok(answer(response, reservation)?);
            }
        }
        Ok(Response::new(response))
    }

    async fn lease_leases(
        &self,
        request: Request<LeaseLeasesRequest>,
    ) -> Result<Response<LeaseLeasesResponse>, Status> {
        let tenant = self.context.tenant_of(&request)?;
        let header = header(&tenant, tenant.reader().revision());
        let count = usize::try_from(tenant.reader().state().usage.leases).unwrap_or(usize::MAX);
        let reservation = self.context.reserve(&tenant, count.saturating_mul(LISTED_LEASE_BYTES)).await?;
        let of_tenant = tenant.clone();
        // There may be a million, to be sorted.
        let leases = tenant.read(move |_| of_tenant.leases()).await?;
        let leases = leases.into_iter().map(|id| LeaseStatus { id: id.0 }).collect();
        Ok(answer(LeaseLeasesResponse { header: Some(header), leases }, reservation)?)
    }
}

#[cfg(test)]
mod tests;
