//! `etcdserverpb.KV`: Range, Put, DeleteRange, Txn, Compact. RangeStream is in [`stream`], reading in [`read`].
//!
//! Reads: a linearizable one first waits for the read barrier, that is until this member has applied everything
//! acknowledged before the call; then it reads locally. Writes go through the log.

mod read;
mod stream;
#[cfg(test)]
mod tests;

use tenure_storage::limits::{RECLAIM_ROWS_MAX, TXN_REPLY_BYTES_MAX};
use tenure_storage::{Command, KeyRange, Reply, TxnOp};
use tonic::{Request, Response, Status};

use self::read::{Counting, read_range};
pub use self::stream::ChunkStream;
use crate::cell::Tenant;
use crate::check::{self, TxnPath};
use crate::convert::{from_proto, to_proto};
use crate::inflight::Reservation;
use crate::own_requests::this_is_short;
use crate::proto::etcdserverpb::kv_server::Kv;
use crate::proto::etcdserverpb::{
    CompactionRequest, CompactionResponse, DeleteRangeRequest, DeleteRangeResponse, PutRequest, PutResponse,
    RangeRequest, TxnRequest, TxnResponse,
};
use crate::service::{Context, answer, header, with_permit, write};
use crate::status::mismatched_reply;
use crate::wire::{RangeResponse, TakesRest};

/// The KV service.
#[derive(Clone)]
pub struct KvService {
    context: Context,
}

impl KvService {
    pub fn new(context: Context) -> Self {
        KvService { context }
    }

    /// A txn of ranges only: answered at one point in time, without the log.
    async fn txn_read_only(&self, tenant: &Tenant, request: TxnRequest) -> Result<Response<TxnResponse>, Status> {
        let request = from_proto::txn(request)?;
        let reservation = self.reserve_for_txn(tenant, &request).await?;
        let (revision, reply) = tenant.answered(tenant.read(move |reader| reader.txn_read_only(&request)).await?)?;
        Ok(answer(to_proto::txn(Some(header(tenant, revision)), reply), reservation)?)
    }

    /// The answer of a txn is made whole, in one go, so one that may be large waits for room before it is asked for.
    async fn reserve_for_txn(&self, tenant: &Tenant, txn: &tenure_storage::TxnRequest) -> Result<Reservation, Status> {
        let bytes = if may_answer_much(txn) { TXN_REPLY_BYTES_MAX } else { 0 };
        Ok(self.context.reserve(tenant, bytes).await?)
    }
}

/// Single keys whose values a txn may return without being counted as large.
const SMALL_TXN_KEYS: usize = 8;

/// Whether a txn's answer may hold more than a few single keys.
fn may_answer_much(txn: &tenure_storage::TxnRequest) -> bool {
    let branch = |ops: &[TxnOp]| {
        ops.len() > SMALL_TXN_KEYS
            || ops.iter().any(|op| match op {
                TxnOp::Range(range) => !range.count_only && !matches!(range.range, KeyRange::Single(_)),
                TxnOp::DeleteRange(delete) => delete.prev_kv && !matches!(delete.range, KeyRange::Single(_)),
                TxnOp::Put(_) => false,
                TxnOp::Txn(_) => true,
            })
    };
    branch(&txn.success) || branch(&txn.failure)
}

/// Whether a txn's answer holds a value at most.
fn answers_little(txn: &tenure_storage::TxnRequest) -> bool {
    let values = |ops: &[TxnOp]| {
        let values = ops.iter().map(|op| match op {
            TxnOp::Range(range) => usize::from(!range.count_only),
            TxnOp::Put(put) => usize::from(put.prev_kv),
            TxnOp::DeleteRange(delete) => usize::from(delete.prev_kv),
            TxnOp::Txn(_) => SMALL_TXN_KEYS,
        });
        values.sum::<usize>()
    };
    !may_answer_much(txn) && values(&txn.success).max(values(&txn.failure)) <= 1
}

#[tonic::async_trait]
impl Kv for KvService {
    async fn range(&self, request: Request<RangeRequest>) -> Result<Response<RangeResponse>, Status> {
        let tenant = match request.get_ref().serializable {
            true => self.context.tenant_of_any(&request)?,
            false => self.context.tenant_of(&request)?,
        };
        let takes_rest = request.extensions().get::<TakesRest>().is_some();
        let request = request.into_inner();
        check::range(&request)?;
        if request.range_end.is_empty() {
            this_is_short(request.key.len());
        }
        if !request.serializable {
            tenant.read_barrier().await?;
        }
        let request = from_proto::range(request)?;
        let read = read_range(&self.context.in_flight, &tenant, request, Counting::Exact).await?;
        let header = header(&tenant, read.summary.revision);
        let mut message = to_proto::range(Some(header), read.kvs, read.summary.more, read.summary.count);
        let rest = if takes_rest { message.take_large() } else { None };
        let mut response = with_permit(message, read.reservation);
        if let Some(rest) = rest {
            response.extensions_mut().insert(rest);
        }
        Ok(response)
    }

    type RangeStreamStream = ChunkStream;

    async fn range_stream(&self, request: Request<RangeRequest>) -> Result<Response<ChunkStream>, Status> {
        let tenant = self.context.tenant_of(&request)?;
        let request = request.into_inner();
        check::range_stream(&request)?;
        if !request.serializable {
            tenant.read_barrier().await?;
        }
        Ok(Response::new(ChunkStream::open(self.context.clone(), tenant, request).await?))
    }

    async fn put(&self, request: Request<PutRequest>) -> Result<Response<PutResponse>, Status> {
        let tenant = self.context.tenant_of(&request)?;
        let request = request.into_inner();
        self.context.check_quota(&tenant, check::put_cost(&request)).await?;
        check::put(&request)?;
        let bytes = check::size(&request, self.context.request_bytes_max(&tenant))?;
        if !request.prev_kv {
            this_is_short(bytes);
        }
        let (header, reply) = write(&tenant, Command::Put(from_proto::put(request))).await?;
        let Reply::Put { prev_kv } = reply else { return Err(mismatched_reply("Put")) };
        if prev_kv.is_none() {
            return Ok(Response::new(to_proto::put(Some(header), prev_kv)));
        }
        Ok(answer(to_proto::put(Some(header), prev_kv), self.context.in_flight.of(&tenant))?)
    }

    async fn delete_range(
        &self,
        request: Request<DeleteRangeRequest>,
    ) -> Result<Response<DeleteRangeResponse>, Status> {
        let tenant = self.context.tenant_of(&request)?;
        let request = request.into_inner();
        check::delete_range(&request)?;
        check::size(&request, self.context.request_bytes_max(&tenant))?;
        // As a txn's: what was deleted is told whole.
        let tells_much = request.prev_kv && !request.range_end.is_empty();
        let reservation = self.context.reserve(&tenant, if tells_much { TXN_REPLY_BYTES_MAX } else { 0 }).await?;
        let (header, reply) = write(&tenant, Command::DeleteRange(from_proto::delete_range(request))).await?;
        let Reply::DeleteRange { deleted, prev_kvs } = reply else { return Err(mismatched_reply("DeleteRange")) };
        Ok(answer(to_proto::delete_range(Some(header), deleted, prev_kvs), reservation)?)
    }

    async fn txn(&self, request: Request<TxnRequest>) -> Result<Response<TxnResponse>, Status> {
        let tenant = self.context.tenant_of(&request)?;
        let request = request.into_inner();
        self.context.check_quota(&tenant, check::txn_cost(&request)).await?;
        check::txn(&request, self.context.limits.max_txn_ops)?;
        match check::txn_path(&request) {
            TxnPath::ReadSerializable => return self.txn_read_only(&tenant, request).await,
            TxnPath::ReadLinearizable => {
                tenant.read_barrier().await?;
                return self.txn_read_only(&tenant, request).await;
            }
            TxnPath::Write => {}
        }
        let bytes = check::size(&request, self.context.request_bytes_max(&tenant))?;
        let request = from_proto::txn(request)?;
        if answers_little(&request) {
            this_is_short(bytes);
        }
        let reservation = self.reserve_for_txn(&tenant, &request).await?;
        let (header, reply) = write(&tenant, Command::Txn(request)).await?;
        let Reply::Txn(reply) = reply else { return Err(mismatched_reply("Txn")) };
        Ok(answer(to_proto::txn(Some(header), reply), reservation)?)
    }

    /// A physical compaction proposes the reclaim steps itself instead of waiting for those of the background: each step
    /// is bounded, other writes go in between, and the answer comes when nothing is left.
    async fn compact(&self, request: Request<CompactionRequest>) -> Result<Response<CompactionResponse>, Status> {
        let tenant = self.context.tenant_of(&request)?;
        let CompactionRequest { revision, physical } = request.into_inner();
        let (header, _) = write(&tenant, Command::Compact { revision }).await?;
        while physical && tenant.reader().state().reclaimed_revision < revision {
            let (_, reply) = write(&tenant, Command::Reclaim { rows_max: RECLAIM_ROWS_MAX }).await?;
            let Reply::Reclaim { more } = reply else { return Err(mismatched_reply("Compact")) };
            if !more {
                break;
            }
        }
        Ok(Response::new(CompactionResponse { header: Some(header) }))
    }
}
