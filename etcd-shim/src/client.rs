//! The store without a network: what an embedding program calls.
//!
//! A [`Client`] is bound to one tenant and speaks in plain Rust values; no message of the wire is made on the way. It goes
//! the same way as a request from the network does below the services: writes through the log, reads behind the read
//! barrier, watches through storage's hub. So a program and its network clients see one order of things.
//!
//! Requests are checked as on the wire, with one simplification: a txn may put a key only once in everything that its
//! success (or its failure) list can reach, and not put what it deletes there; etcd allows some of these.
//!
//! A [`Watcher`] that is not polled costs its queue, as a slow network client does: it falls behind and reads history
//! later. Everything may be cancelled by dropping the future; a write that was on its way may then still happen.

use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tenure_storage::limits::TXN_DEPTH_MAX;
use tenure_storage::{
    Command, CreateRefusal, DeleteRangeRequest, Event, EventKind, Fault, KeyRange, LeaseId, Outcome, PutRequest,
    RangeRequest, Refusal, Reply, RocksEngine, TxnOp, TxnOpReply, TxnRequest, WatchMessage, WatchSpec, WatchStream,
    key_value,
};
use tokio::sync::Notify;

use crate::cell::{Granted, Tenant};
use crate::cell_error::CellError;
use crate::check::{CheckError, LEASE_TTL_SECONDS_MAX};
use crate::lessor::Remaining;
use crate::service::watch::REPLAY_RETRY_AFTER;

/// Why a call failed.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ClientError {
    /// The request itself is wrong; nothing was asked of the store.
    #[error(transparent)]
    Invalid(#[from] CheckError),
    #[error(transparent)]
    Cell(#[from] CellError),
    /// The store answered another request's reply: a bug of ours.
    #[error("mismatched reply")]
    MismatchedReply,
}

impl From<Fault> for ClientError {
    fn from(fault: Fault) -> Self {
        CellError::from(fault).into()
    }
}

/// One version of a key. `key` and `value` share one buffer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyValue {
    pub key: Bytes,
    pub value: Bytes,
    /// Revision of the put that made the key exist.
    pub create_revision: i64,
    /// Revision of this version.
    pub mod_revision: i64,
    /// Puts since the key exists, this one included.
    pub version: i64,
    /// [`LeaseId::NONE`] if it has none.
    pub lease: LeaseId,
}

impl KeyValue {
    fn decode(stored: &Bytes) -> Result<Self, Fault> {
        let kv = key_value::KeyValue::decode(stored)?;
        // An empty field points nowhere.
        let part = |part: &[u8]| if part.is_empty() { Bytes::new() } else { stored.slice_ref(part) };
        Ok(KeyValue {
            key: part(kv.key),
            value: part(kv.value),
            create_revision: kv.create_revision,
            mod_revision: kv.mod_revision,
            version: kv.version,
            lease: LeaseId(kv.lease),
        })
    }
}

fn decode_all(stored: &[Bytes]) -> Result<Vec<KeyValue>, Fault> {
    stored.iter().map(KeyValue::decode).collect()
}

/// What a put did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PutResult {
    pub revision: i64,
    /// If asked for and there was one.
    pub prev_kv: Option<KeyValue>,
}

/// What a delete did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeleteResult {
    /// The tenant's revision after it; unchanged if nothing was deleted.
    pub revision: i64,
    pub deleted: u64,
    /// In key order, if asked for.
    pub prev_kvs: Vec<KeyValue>,
}

/// What a range holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RangeResult {
    /// The tenant's revision at the moment of the read; a watch from the next one misses nothing.
    pub revision: i64,
    pub kvs: Vec<KeyValue>,
    /// Whether the limit cut something off.
    pub more: bool,
    /// Keys in the range, whatever the limit says.
    pub count: u64,
}

/// What a txn did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TxnResult {
    pub revision: i64,
    /// Whether the compares held, so which list ran.
    pub succeeded: bool,
    /// One for each operation of that list.
    pub results: Vec<OpResult>,
}

/// What one operation of a txn did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OpResult {
    Range(RangeResult),
    Put(PutResult),
    Delete(DeleteResult),
    Txn { succeeded: bool, results: Vec<OpResult> },
}

fn op_result(reply: TxnOpReply) -> Result<OpResult, Fault> {
    Ok(match reply {
        TxnOpReply::Range { revision, reply } => {
            let kvs = decode_all(&reply.kvs)?;
            OpResult::Range(RangeResult { revision, kvs, more: reply.more, count: reply.count })
        }
        TxnOpReply::Put { revision, prev_kv } => {
            OpResult::Put(PutResult { revision, prev_kv: prev_kv.as_ref().map(KeyValue::decode).transpose()? })
        }
        TxnOpReply::DeleteRange { revision, deleted, prev_kvs } => {
            OpResult::Delete(DeleteResult { revision, deleted, prev_kvs: decode_all(&prev_kvs)? })
        }
        TxnOpReply::Txn(reply) => OpResult::Txn {
            succeeded: reply.succeeded,
            results: reply.responses.into_iter().map(op_result).collect::<Result<_, _>>()?,
        },
    })
}

/// One tenant's store, in-process. Cheap to clone.
#[derive(Clone)]
pub struct Client {
    tenant: Tenant,
}

impl Client {
    pub(crate) fn new(tenant: Tenant) -> Self {
        Client { tenant }
    }

    pub fn tenant_name(&self) -> &str {
        self.tenant.name()
    }

    /// Writes one key, without a lease. Durable on return.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn put(&self, key: impl Into<Bytes>, value: impl Into<Bytes>) -> Result<PutResult, ClientError> {
        self.put_with(PutRequest {
            key: key.into(),
            value: value.into(),
            lease: LeaseId::NONE,
            prev_kv: false,
            ignore_value: false,
            ignore_lease: false,
        })
        .await
    }

    /// Writes one key, with every option.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn put_with(&self, request: PutRequest) -> Result<PutResult, ClientError> {
        check_put(&request)?;
        let Outcome { revision, result } = self.tenant.propose(Command::Put(request)).await?;
        let Reply::Put { prev_kv } = result.map_err(CellError::from)? else {
            return Err(ClientError::MismatchedReply);
        };
        Ok(PutResult { revision, prev_kv: prev_kv.as_ref().map(KeyValue::decode).transpose()? })
    }

    /// The newest version of a key.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn get(&self, key: impl Into<Bytes>) -> Result<Option<KeyValue>, ClientError> {
        let found = self.range(RangeRequest::new(KeyRange::Single(key.into()))).await?;
        Ok(found.kvs.into_iter().next())
    }

    /// Reads a range in a state that holds every write acknowledged before the call. The result is in memory whole: set
    /// a limit, and go on behind the last key at the revision of the first page.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn range(&self, request: RangeRequest) -> Result<RangeResult, ClientError> {
        self.tenant.read_barrier().await?;
        self.range_local(request).await
    }

    /// Reads a range in the state that this member has, which may lag behind other members'.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn range_local(&self, request: RangeRequest) -> Result<RangeResult, ClientError> {
        check_key(request.range.start())?;
        let read = move |reader: &tenure_storage::TenantReader<RocksEngine>| {
            let mut stored = Vec::new();
            let summary = reader.range(&request, &mut |kv: &[u8]| {
                stored.push(Bytes::copy_from_slice(kv));
                ControlFlow::Continue(())
            })?;
            Ok::<_, tenure_storage::ReadError>((summary, stored))
        };
        let (summary, stored) = self.tenant.answered(self.tenant.read(read).await?)?;
        let kvs = decode_all(&stored)?;
        Ok(RangeResult { revision: summary.revision, kvs, more: summary.more, count: summary.count })
    }

    /// Deletes what exists in a range.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn delete(&self, request: DeleteRangeRequest) -> Result<DeleteResult, ClientError> {
        check_key(request.range.start())?;
        let Outcome { revision, result } = self.tenant.propose(Command::DeleteRange(request)).await?;
        let Reply::DeleteRange { deleted, prev_kvs } = result.map_err(CellError::from)? else {
            return Err(ClientError::MismatchedReply);
        };
        Ok(DeleteResult { revision, deleted, prev_kvs: decode_all(&prev_kvs)? })
    }

    /// Evaluates the compares and runs one of the two lists, all in one revision.
    ///
    /// # Errors
    /// [`ClientError`]; nothing was changed then.
    pub async fn txn(&self, request: TxnRequest) -> Result<TxnResult, ClientError> {
        check_txn(&request)?;
        let Outcome { revision, result } = self.tenant.propose(Command::Txn(request)).await?;
        let Reply::Txn(reply) = result.map_err(CellError::from)? else {
            return Err(ClientError::MismatchedReply);
        };
        let results = reply.responses.into_iter().map(op_result).collect::<Result<_, _>>()?;
        Ok(TxnResult { revision, succeeded: reply.succeeded, results })
    }

    /// Drops history below `revision`. Space is given back in the background.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn compact(&self, revision: i64) -> Result<(), ClientError> {
        let outcome = self.tenant.propose(Command::Compact { revision }).await?;
        outcome.result.map(|_| ()).map_err(|refusal| CellError::from(refusal).into())
    }

    /// Grants a lease. A TTL below the shortest is raised to it: look at the answer.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn grant_lease(&self, ttl: Duration) -> Result<Granted, ClientError> {
        let ttl_seconds = i64::try_from(ttl.as_secs()).unwrap_or(i64::MAX);
        if ttl_seconds > LEASE_TTL_SECONDS_MAX {
            return Err(CheckError::LeaseTtlTooLarge.into());
        }
        Ok(self.tenant.grant_lease(LeaseId::NONE, ttl_seconds).await?)
    }

    /// Gives a lease its full TTL again. `false`: there is no such lease any more.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn keep_alive(&self, id: LeaseId) -> Result<bool, ClientError> {
        Ok(self.tenant.renew_lease(id).await? > 0)
    }

    /// Ends a lease and deletes its keys, in one revision.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn revoke_lease(&self, id: LeaseId) -> Result<(), ClientError> {
        Ok(self.tenant.revoke_lease(id).await.map(drop)?)
    }

    /// What is left of a lease; `None` if there is no such lease.
    pub async fn lease(&self, id: LeaseId) -> Result<Option<Remaining>, CellError> {
        self.tenant.lease_remaining(id).await
    }

    /// Watches a range. With a `start_revision` of 0 it tells what happens after this returns.
    ///
    /// # Errors
    /// [`WatchError::Refused`].
    pub fn watch(&self, options: WatchOptions) -> Result<Watcher, WatchError> {
        let signal = Arc::new(Notify::new());
        let wake = Arc::clone(&signal);
        let stream = Arc::new(self.tenant.reader().watch_stream(Arc::new(move || wake.notify_one())));
        stream.create(WatchSpec {
            range: options.range,
            start_revision: options.start_revision,
            prev_kv: options.prev_kv,
            no_put: options.no_put,
            no_delete: options.no_delete,
            progress_notify: false,
            fragment: false,
            watch_id: 0,
        });
        match stream.pop() {
            Some(WatchMessage::Refused { reason, .. }) => Err(WatchError::Refused(reason)),
            // A create is answered at once, before anything else.
            Some(_) | None => Ok(Watcher { tenant: self.tenant.clone(), stream, signal }),
        }
    }
}

/// What to watch.
#[derive(Clone, Debug)]
pub struct WatchOptions {
    pub range: KeyRange,
    /// First revision wanted, inclusive; 0 = from now on.
    pub start_revision: i64,
    /// Events carry what they replaced.
    pub prev_kv: bool,
    pub no_put: bool,
    pub no_delete: bool,
}

impl WatchOptions {
    /// Everything in `range` from now on.
    pub fn new(range: KeyRange) -> Self {
        WatchOptions { range, start_revision: 0, prev_kv: false, no_put: false, no_delete: false }
    }
}

/// Why a watch ended, or did not begin.
#[derive(Clone, Debug, thiserror::Error)]
pub enum WatchError {
    #[error("the watch was refused: {0:?}")]
    Refused(CreateRefusal),
    /// History was compacted before the watcher had seen it: list again, and watch from there.
    #[error("required revision has been compacted; the oldest is {compact_revision}")]
    Compacted { compact_revision: i64 },
    #[error(transparent)]
    Cell(#[from] CellError),
}

/// One change of one key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WatchEvent {
    pub kind: EventKind,
    /// Of a delete only the key and the revision are set.
    pub kv: KeyValue,
    /// If asked for, unless the key did not exist before.
    pub prev_kv: Option<KeyValue>,
}

impl WatchEvent {
    fn decode(event: &Event) -> Result<Self, Fault> {
        let prev_kv = event.prev_kv.as_ref().map(KeyValue::decode).transpose()?;
        Ok(WatchEvent { kind: event.kind, kv: KeyValue::decode(&event.kv)?, prev_kv })
    }
}

/// A running watch. Dropping it ends it.
pub struct Watcher {
    stream: Arc<WatchStream<RocksEngine>>,
    signal: Arc<Notify>,
    // Behind the stream, which has files open: the last owner of the cell unlocks the data directory.
    tenant: Tenant,
}

impl Watcher {
    /// Waits for the next events: of one revision or, while catching up, of several; never a part of one. May be
    /// cancelled without losing any.
    ///
    /// # Errors
    /// [`WatchError`]; the watch has ended then. So it does when its tenant is deleted.
    pub async fn next(&mut self) -> Result<Vec<WatchEvent>, WatchError> {
        loop {
            match self.stream.pop() {
                Some(WatchMessage::Events { batch, .. }) => {
                    let events = batch.events.iter().map(WatchEvent::decode).collect::<Result<_, _>>();
                    return events.map_err(|fault| self.tenant.report(fault).into());
                }
                Some(WatchMessage::Compacted { compact_revision, .. }) => {
                    return Err(WatchError::Compacted { compact_revision });
                }
                Some(WatchMessage::Refused { reason, .. }) => return Err(WatchError::Refused(reason)),
                Some(WatchMessage::Created { .. } | WatchMessage::Canceled { .. } | WatchMessage::Progress { .. }) => {}
                None if self.tenant.reader().is_deleted() => {
                    return Err(CellError::from(Refusal::TenantNotFound).into());
                }
                None if self.stream.needs_replay() => {
                    let stream = Arc::clone(&self.stream);
                    match self.tenant.read(move |_| stream.replay_step()).await {
                        Ok(replayed) => replayed.map_err(|fault| self.tenant.report(fault))?,
                        // Others of the tenant read very much at the moment.
                        Err(CellError::TooManyRequests) => tokio::time::sleep(REPLAY_RETRY_AFTER).await,
                        Err(error) => return Err(error.into()),
                    }
                }
                None => self.signal.notified().await,
            }
        }
    }
}

fn check_key(key: &[u8]) -> Result<(), CheckError> {
    if key.is_empty() { Err(CheckError::EmptyKey) } else { Ok(()) }
}

fn check_put(request: &PutRequest) -> Result<(), CheckError> {
    check_key(&request.key)?;
    if request.ignore_value && !request.value.is_empty() {
        return Err(CheckError::ValueProvided);
    }
    if request.ignore_lease && request.lease != LeaseId::NONE {
        return Err(CheckError::LeaseProvided);
    }
    Ok(())
}

fn check_txn(request: &TxnRequest) -> Result<(), CheckError> {
    check_ops(request, 0)?;
    for branch in [&request.success, &request.failure] {
        let mut puts = BTreeSet::new();
        let mut deletes = Vec::new();
        collect(branch, &mut puts, &mut deletes)?;
        if deletes.iter().any(|range| puts.iter().any(|key| range.contains(key))) {
            return Err(CheckError::DuplicateKey);
        }
    }
    Ok(())
}

fn check_ops(request: &TxnRequest, depth: usize) -> Result<(), CheckError> {
    if depth > TXN_DEPTH_MAX {
        return Err(CheckError::TooManyOps);
    }
    for compare in &request.compares {
        check_key(compare.range.start())?;
    }
    for op in request.success.iter().chain(&request.failure) {
        match op {
            TxnOp::Range(range) => check_key(range.range.start())?,
            TxnOp::Put(put) => check_put(put)?,
            TxnOp::DeleteRange(delete) => check_key(delete.range.start())?,
            TxnOp::Txn(nested) => check_ops(nested, depth + 1)?,
        }
    }
    Ok(())
}

/// What a list can touch, nested txns with both their lists included.
fn collect<'a>(
    ops: &'a [TxnOp],
    puts: &mut BTreeSet<&'a [u8]>,
    deletes: &mut Vec<&'a KeyRange>,
) -> Result<(), CheckError> {
    for op in ops {
        match op {
            TxnOp::Range(_) => {}
            TxnOp::Put(put) => {
                if !puts.insert(&put.key) {
                    return Err(CheckError::DuplicateKey);
                }
            }
            TxnOp::DeleteRange(delete) => deletes.push(&delete.range),
            TxnOp::Txn(nested) => {
                collect(&nested.success, puts, deletes)?;
                collect(&nested.failure, puts, deletes)?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
