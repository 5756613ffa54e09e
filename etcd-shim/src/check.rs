//! Request checks, in etcd's order and with etcd's texts (contract 1.0, 1.1, 4).
//!
//! These are the checks that need only the request. What depends on the store (leases, revisions, keys that must exist,
//! alarms) is decided by `apply`, later and in its own order. A write is checked in this order: [`put_cost`] and its like
//! against the quota, then the request's own check, then [`size`].
//!
//! The duplicate rule of txns is etcd's own, odd corners included: a request that etcd accepts must not fail here. It is
//! kept cheap for the txns Kubernetes sends (one operation in a branch: nothing to compare, nothing allocated) and close to
//! linear for hostile ones: the budget on operations bounds a level, not the whole txn, so a request of 1.5 MiB may hold
//! 100,000 operations.

use std::collections::{BTreeMap, BTreeSet};

use prost::Message;
use prost::encoding::encoded_len_varint;
use tenure_storage::limits::TXN_DEPTH_MAX;

use crate::proto::etcdserverpb::range_request::{SortOrder, SortTarget};
use crate::proto::etcdserverpb::request_op::Request;
use crate::proto::etcdserverpb::{
    DeleteRangeRequest, LeaseGrantRequest, PutRequest, RangeRequest, RequestOp, TxnRequest,
};

/// Longest lease in seconds: etcd's own bound, about 285 years.
pub const LEASE_TTL_SECONDS_MAX: i64 = 9_000_000_000;

/// What etcd wraps around a request in its log, beside the request's own length field: a header with a 64-bit id (13
/// bytes) and one tag. A request whose wrapped form exceeds `--max-request-bytes` is refused.
const ENVELOPE_BYTES: usize = 14;

/// Why a request was refused without looking at the store. The texts are etcd's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CheckError {
    #[error("etcdserver: key is not provided")]
    EmptyKey,
    /// A txn operation without content.
    #[error("etcdserver: key not found")]
    KeyNotFound,
    #[error("etcdserver: value is provided")]
    ValueProvided,
    #[error("etcdserver: lease is provided")]
    LeaseProvided,
    #[error("etcdserver: too many operations in txn request")]
    TooManyOps,
    #[error("etcdserver: duplicate key given in txn request")]
    DuplicateKey,
    #[error("etcdserver: invalid sort option")]
    InvalidSortOption,
    #[error("etcdserver: request is too large")]
    RequestTooLarge,
    #[error("etcdserver: too large lease TTL")]
    LeaseTtlTooLarge,
    /// etcd panics on these; the text is ours.
    #[error("etcdserver: unknown alarm action")]
    UnknownAlarmAction,
    #[error("RangeStream does not support custom sort orders")]
    StreamSortOrder,
    #[error("RangeStream does not support revision filters")]
    StreamRevisionFilter,
}

fn key(key: &[u8]) -> Result<(), CheckError> {
    if key.is_empty() { Err(CheckError::EmptyKey) } else { Ok(()) }
}

/// Checks a range, top-level or in a txn.
pub fn range(request: &RangeRequest) -> Result<(), CheckError> {
    key(&request.key)?;
    if SortOrder::try_from(request.sort_order).is_err() || SortTarget::try_from(request.sort_target).is_err() {
        return Err(CheckError::InvalidSortOption);
    }
    Ok(())
}

/// Checks a range to be streamed: only key order can be.
pub fn range_stream(request: &RangeRequest) -> Result<(), CheckError> {
    range(request)?;
    let in_key_order = match request.sort_order() {
        SortOrder::None => true,
        SortOrder::Ascend => request.sort_target() == SortTarget::Key,
        SortOrder::Descend => false,
    };
    if !in_key_order {
        return Err(CheckError::StreamSortOrder);
    }
    let filters =
        [request.min_mod_revision, request.max_mod_revision, request.min_create_revision, request.max_create_revision];
    if filters.iter().any(|bound| *bound != 0) {
        return Err(CheckError::StreamRevisionFilter);
    }
    Ok(())
}

/// Checks a put, top-level or in a txn.
pub fn put(request: &PutRequest) -> Result<(), CheckError> {
    key(&request.key)?;
    if request.ignore_value && !request.value.is_empty() {
        return Err(CheckError::ValueProvided);
    }
    if request.ignore_lease && request.lease != 0 {
        return Err(CheckError::LeaseProvided);
    }
    Ok(())
}

/// Checks a delete, top-level or in a txn.
pub fn delete_range(request: &DeleteRangeRequest) -> Result<(), CheckError> {
    key(&request.key)
}

/// Checks a lease grant. TTLs that are too small are not errors.
pub fn lease_grant(request: &LeaseGrantRequest) -> Result<(), CheckError> {
    if request.ttl > LEASE_TTL_SECONDS_MAX { Err(CheckError::LeaseTtlTooLarge) } else { Ok(()) }
}

/// Checks the size of a write whose protobuf form is `request`, against `--max-request-bytes`. Gives its length.
pub fn size(request: &impl Message, max_request_bytes: usize) -> Result<usize, CheckError> {
    let request_bytes = request.encoded_len();
    let in_log = ENVELOPE_BYTES.saturating_add(encoded_len_varint(request_bytes as u64)).saturating_add(request_bytes);
    if in_log > max_request_bytes { Err(CheckError::RequestTooLarge) } else { Ok(request_bytes) }
}

/// Checks a txn: operations and their number first, level by level, duplicates last.
pub fn txn(request: &TxnRequest, max_txn_ops: usize) -> Result<(), CheckError> {
    ops(request, max_txn_ops, 0)?;
    duplicates(&request.success)?;
    duplicates(&request.failure)
}

/// A nested txn may use what its parent's longest list leaves of the budget. `depth` is bounded because storage encodes no
/// deeper nesting; the decoder's own bound is tighter.
fn ops(request: &TxnRequest, budget: usize, depth: usize) -> Result<(), CheckError> {
    let longest = request.compare.len().max(request.success.len()).max(request.failure.len());
    if longest > budget || depth > TXN_DEPTH_MAX {
        return Err(CheckError::TooManyOps);
    }
    for compare in &request.compare {
        key(&compare.key)?;
    }
    for op in request.success.iter().chain(&request.failure) {
        match &op.request {
            Some(Request::RequestRange(request)) => range(request)?,
            Some(Request::RequestPut(request)) => put(request)?,
            Some(Request::RequestDeleteRange(request)) => delete_range(request)?,
            Some(Request::RequestTxn(request)) => ops(request, budget - longest, depth + 1)?,
            None => return Err(CheckError::KeyNotFound),
        }
    }
    Ok(())
}

/// Whether the txn may be answered without the log, and if so how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TxnPath {
    /// Goes through the log. A nested txn always makes it so, even one that only reads.
    Write,
    /// Ranges only, at least one of them linearizable.
    ReadLinearizable,
    /// Ranges only, all of them serializable, or none at all.
    ReadSerializable,
}

/// Which way a txn goes.
pub fn txn_path(request: &TxnRequest) -> TxnPath {
    let mut path = TxnPath::ReadSerializable;
    for op in request.success.iter().chain(&request.failure) {
        match &op.request {
            Some(Request::RequestRange(range)) if range.serializable => {}
            Some(Request::RequestRange(_)) => path = TxnPath::ReadLinearizable,
            Some(Request::RequestPut(_) | Request::RequestDeleteRange(_) | Request::RequestTxn(_)) | None => {
                return TxnPath::Write;
            }
        }
    }
    path
}

/// What etcd estimates a put to add to the store, in bytes.
pub fn put_cost(request: &PutRequest) -> u64 {
    tenure_storage::put_cost(request.key.len(), request.value.len())
}

/// What etcd (3.7 and later) estimates a txn to add: the dearer branch, whichever runs, nested txns included. 0 passes any
/// quota.
///
/// Runs before the checks, so nesting is bounded by the decoder alone.
pub fn txn_cost(request: &TxnRequest) -> u64 {
    let branch = |ops: &[RequestOp]| {
        ops.iter().fold(0u64, |sum, op| {
            sum.saturating_add(match &op.request {
                Some(Request::RequestPut(put)) => put_cost(put),
                Some(Request::RequestTxn(nested)) => txn_cost(nested),
                Some(Request::RequestRange(_) | Request::RequestDeleteRange(_)) | None => 0,
            })
        })
    };
    branch(&request.success).max(branch(&request.failure))
}

/// The duplicate rule for one branch of the outermost txn.
fn duplicates(branch: &[RequestOp]) -> Result<(), CheckError> {
    match branch {
        [] => Ok(()),
        // One plain operation has nothing to conflict with.
        [only] if !matches!(only.request, Some(Request::RequestTxn(_))) => Ok(()),
        _ => touched(branch).map(|_| ()),
    }
}

/// The keys a branch puts and deletes, nested txns included.
#[derive(Default)]
struct Touched<'a> {
    puts: BTreeSet<&'a [u8]>,
    deletes: Deletes<'a>,
}

/// Collects what a branch touches, in etcd's order, which decides what conflicts: the deletes of this level; then, one
/// nested txn after the other, its puts against this level's deletes and against the puts *and deletes of the nested txns
/// before it*, but its deletes against no earlier put; last the puts of this level against everything.
fn touched(branch: &[RequestOp]) -> Result<Touched<'_>, CheckError> {
    let mut all = Touched::default();
    for op in branch {
        if let Some(Request::RequestDeleteRange(delete)) = &op.request {
            all.deletes.add(&delete.key, &delete.range_end);
        }
    }
    for op in branch {
        if let Some(Request::RequestTxn(nested)) = &op.request {
            let success = touched(&nested.success)?;
            let failure = touched(&nested.failure)?;
            // Only one of the two runs, so they may touch the same keys.
            let puts = union(success.puts, failure.puts);
            if intersects(&all.puts, &puts) || all.deletes.conflict(&puts) {
                return Err(CheckError::DuplicateKey);
            }
            all.puts = union(all.puts, puts);
            all.deletes = all.deletes.union(success.deletes).union(failure.deletes);
        }
    }
    for op in branch {
        if let Some(Request::RequestPut(put)) = &op.request
            && (all.deletes.covers(&put.key) || !all.puts.insert(&put.key))
        {
            return Err(CheckError::DuplicateKey);
        }
    }
    Ok(all)
}

/// The smaller set moves into the larger, so that a key that rises through many levels is moved a few times only.
fn union<'a>(a: BTreeSet<&'a [u8]>, b: BTreeSet<&'a [u8]>) -> BTreeSet<&'a [u8]> {
    let (mut larger, smaller) = if a.len() < b.len() { (b, a) } else { (a, b) };
    larger.extend(smaller);
    larger
}

fn intersects(a: &BTreeSet<&[u8]>, b: &BTreeSet<&[u8]>) -> bool {
    let (larger, smaller) = if a.len() < b.len() { (b, a) } else { (a, b) };
    smaller.iter().any(|key| larger.contains(key))
}

/// Which keys are deleted. QUIRK: a range end of `\0` ("every key from here") is taken as it stands, as an end that lies
/// before the start, so such a delete covers nothing here; a reversed range does not either.
#[derive(Default)]
struct Deletes<'a> {
    single: BTreeSet<&'a [u8]>,
    /// Start to end, half-open; disjoint.
    spans: BTreeMap<&'a [u8], &'a [u8]>,
}

impl<'a> Deletes<'a> {
    fn add(&mut self, key: &'a [u8], range_end: &'a [u8]) {
        if range_end.is_empty() {
            self.single.insert(key);
        } else {
            self.add_span(key, range_end);
        }
    }

    fn add_span(&mut self, mut start: &'a [u8], mut end: &'a [u8]) {
        if start >= end {
            return;
        }
        // Spans that overlap or touch become one. Each is removed once, after having been added once.
        while let Some((&other_start, &other_end)) = self.spans.range(..=end).next_back() {
            if other_end < start {
                break;
            }
            self.spans.remove(other_start);
            start = start.min(other_start);
            end = end.max(other_end);
        }
        self.spans.insert(start, end);
    }

    fn covers(&self, key: &[u8]) -> bool {
        self.single.contains(key) || self.spans.range(..=key).next_back().is_some_and(|(_, end)| key < *end)
    }

    /// Whether any of `puts` is covered; takes time by the smaller side.
    fn conflict(&self, puts: &BTreeSet<&[u8]>) -> bool {
        if puts.len() <= self.single.len() + self.spans.len() {
            return puts.iter().any(|key| self.covers(key));
        }
        self.single.iter().any(|key| puts.contains(key))
            || self.spans.iter().any(|(start, end)| puts.range(*start..*end).next().is_some())
    }

    fn union(self, other: Deletes<'a>) -> Deletes<'a> {
        let (larger, smaller) =
            if self.spans.len() < other.spans.len() { (other.spans, self.spans) } else { (self.spans, other.spans) };
        let mut all = Deletes { single: union(self.single, other.single), spans: larger };
        for (start, end) in smaller {
            all.add_span(start, end);
        }
        all
    }
}

#[cfg(test)]
mod tests;
