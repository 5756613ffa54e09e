//! Requests to storage's values. Byte fields go on sharing the buffer the request came in.

use bytes::Bytes;
use tenure_storage::{
    Compare, CompareResult, CompareTarget, DeleteRangeRequest, KeyRange, LeaseId, PutRequest, RangeRequest, SortOrder,
    SortTarget, TxnOp, TxnRequest,
};

use crate::check::CheckError;
use crate::proto::etcdserverpb as pb;
use crate::proto::etcdserverpb::compare::TargetUnion;
use crate::proto::etcdserverpb::request_op::Request;

/// `key` and `range_end` as every request spells them (contract 0): no end is a single key, an end of one zero byte is no
/// upper bound.
pub fn key_range(key: Bytes, range_end: Bytes) -> KeyRange {
    match &range_end[..] {
        [] => KeyRange::Single(key),
        [0] => KeyRange::From(key),
        _ => KeyRange::HalfOpen { start: key, end: range_end },
    }
}

/// A range on its own: a revision of 0 or below reads the newest state.
///
/// # Errors
/// [`CheckError::InvalidSortOption`], which [`crate::check::range`] has found before.
pub fn range(request: pb::RangeRequest) -> Result<RangeRequest, CheckError> {
    let revision = Some(request.revision).filter(|revision| *revision > 0);
    range_at(request, revision)
}

/// A range in a txn: only 0 reads the newest state, and what is below 0 is storage's to refuse.
fn range_in_txn(request: pb::RangeRequest) -> Result<RangeRequest, CheckError> {
    let revision = Some(request.revision).filter(|revision| *revision != 0);
    range_at(request, revision)
}

fn range_at(request: pb::RangeRequest, revision: Option<i64>) -> Result<RangeRequest, CheckError> {
    Ok(RangeRequest {
        revision,
        limit: limit(request.limit),
        order: sort_order(request.sort_order)?,
        target: sort_target(request.sort_target)?,
        keys_only: request.keys_only,
        count_only: request.count_only,
        min_mod_revision: request.min_mod_revision,
        max_mod_revision: request.max_mod_revision,
        min_create_revision: request.min_create_revision,
        max_create_revision: request.max_create_revision,
        range: key_range(request.key, request.range_end),
    })
}

/// A limit below 0 is no limit.
fn limit(limit: i64) -> u64 {
    u64::try_from(limit).unwrap_or(0)
}

fn sort_order(number: i32) -> Result<SortOrder, CheckError> {
    use pb::range_request::SortOrder as Wire;
    match Wire::try_from(number).map_err(|_| CheckError::InvalidSortOption)? {
        Wire::None => Ok(SortOrder::None),
        Wire::Ascend => Ok(SortOrder::Ascend),
        Wire::Descend => Ok(SortOrder::Descend),
    }
}

fn sort_target(number: i32) -> Result<SortTarget, CheckError> {
    use pb::range_request::SortTarget as Wire;
    match Wire::try_from(number).map_err(|_| CheckError::InvalidSortOption)? {
        Wire::Key => Ok(SortTarget::Key),
        Wire::Version => Ok(SortTarget::Version),
        Wire::Create => Ok(SortTarget::Create),
        Wire::Mod => Ok(SortTarget::Mod),
        Wire::Value => Ok(SortTarget::Value),
    }
}

pub fn put(request: pb::PutRequest) -> PutRequest {
    PutRequest {
        key: request.key,
        value: request.value,
        lease: LeaseId(request.lease),
        prev_kv: request.prev_kv,
        ignore_value: request.ignore_value,
        ignore_lease: request.ignore_lease,
    }
}

pub fn delete_range(request: pb::DeleteRangeRequest) -> DeleteRangeRequest {
    DeleteRangeRequest { range: key_range(request.key, request.range_end), prev_kv: request.prev_kv }
}

/// A txn with everything nested in it; [`crate::check::txn`] has bounded the depth.
///
/// # Errors
/// [`CheckError::KeyNotFound`] and [`CheckError::InvalidSortOption`], which [`crate::check::txn`] has found before.
pub fn txn(request: pb::TxnRequest) -> Result<TxnRequest, CheckError> {
    Ok(TxnRequest {
        compares: request.compare.into_iter().map(compare).collect(),
        success: request.success.into_iter().map(op).collect::<Result<_, _>>()?,
        failure: request.failure.into_iter().map(op).collect::<Result<_, _>>()?,
    })
}

fn op(op: pb::RequestOp) -> Result<TxnOp, CheckError> {
    Ok(match op.request {
        Some(Request::RequestRange(request)) => TxnOp::Range(range_in_txn(request)?),
        Some(Request::RequestPut(request)) => TxnOp::Put(put(request)),
        Some(Request::RequestDeleteRange(request)) => TxnOp::DeleteRange(delete_range(request)),
        Some(Request::RequestTxn(request)) => TxnOp::Txn(txn(request)?),
        None => return Err(CheckError::KeyNotFound),
    })
}

fn compare(compare: pb::Compare) -> Compare {
    Compare {
        result: compare_result(compare.result),
        target: compare_target(compare.target, compare.target_union),
        range: key_range(compare.key, compare.range_end),
    }
}

fn compare_result(number: i32) -> CompareResult {
    use pb::compare::CompareResult as Wire;
    match Wire::try_from(number) {
        Ok(Wire::Equal) => CompareResult::Equal,
        Ok(Wire::Greater) => CompareResult::Greater,
        Ok(Wire::Less) => CompareResult::Less,
        Ok(Wire::NotEqual) => CompareResult::NotEqual,
        Err(_) => CompareResult::Unknown,
    }
}

/// The operand is the union's member if it belongs to the target, else 0 or empty.
fn compare_target(number: i32, union: Option<TargetUnion>) -> CompareTarget {
    use pb::compare::CompareTarget as Wire;
    match Wire::try_from(number) {
        Ok(Wire::Version) => {
            CompareTarget::Version(if let Some(TargetUnion::Version(given)) = union { given } else { 0 })
        }
        Ok(Wire::Create) => {
            CompareTarget::Create(if let Some(TargetUnion::CreateRevision(given)) = union { given } else { 0 })
        }
        Ok(Wire::Mod) => CompareTarget::Mod(if let Some(TargetUnion::ModRevision(given)) = union { given } else { 0 }),
        Ok(Wire::Value) => {
            CompareTarget::Value(if let Some(TargetUnion::Value(given)) = union { given } else { Bytes::new() })
        }
        Ok(Wire::Lease) => CompareTarget::Lease(if let Some(TargetUnion::Lease(given)) = union { given } else { 0 }),
        Err(_) => CompareTarget::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn range_end_spells_three_kinds_of_range() {
        let range = |end: &'static [u8]| key_range(Bytes::from_static(b"k"), Bytes::from_static(end));
        assert_eq!(range(b""), KeyRange::Single("k".into()));
        assert_eq!(range(b"\0"), KeyRange::From("k".into()));
        assert_eq!(range(b"\0\0"), KeyRange::HalfOpen { start: "k".into(), end: Bytes::from_static(b"\0\0") });
        assert_eq!(range(b"l"), KeyRange::HalfOpen { start: "k".into(), end: "l".into() });
    }

    #[test]
    fn a_negative_revision_means_now_on_its_own_and_itself_in_a_txn() {
        let request = pb::RangeRequest { key: "k".into(), revision: -1, limit: -3, ..Default::default() };
        let alone = range(request.clone()).unwrap();
        assert_eq!((alone.revision, alone.limit), (None, 0));
        assert_eq!(range_in_txn(request.clone()).unwrap().revision, Some(-1));
        assert_eq!(range_in_txn(pb::RangeRequest { revision: 0, ..request }).unwrap().revision, None);
    }

    #[test]
    fn an_operand_counts_only_for_its_own_target() {
        use pb::compare::CompareTarget as Wire;
        let member = Some(TargetUnion::ModRevision(9));
        assert_eq!(compare_target(Wire::Mod.into(), member.clone()), CompareTarget::Mod(9));
        assert_eq!(compare_target(Wire::Version.into(), member.clone()), CompareTarget::Version(0));
        assert_eq!(compare_target(Wire::Value.into(), member), CompareTarget::Value(Bytes::new()));
        assert_eq!(compare_target(Wire::Lease.into(), None), CompareTarget::Lease(0));
        assert_eq!(compare_target(9, None), CompareTarget::Unknown);
        assert_eq!(compare_result(-1), CompareResult::Unknown);
    }
}
