//! Txns: conditions first, then one branch (contract 1.1 "Txn").
//!
//! All conditions, nested ones too, are decided on the state before the txn, which gives a [`Plan`]: which branch runs at
//! each level. Along the plan everything that could refuse is checked before anything is changed. One case escapes that:
//! a put that keeps the old value of a key which an earlier operation of the same txn deletes. It is found while
//! running, and the overlay's journal takes the txn back.

use std::ops::ControlFlow;

use super::read;
use super::write::{Step, Writer, accept};
use crate::engine::Reader;
use crate::error::{Fault, Refusal};
use crate::key::head::Head;
use crate::key_value::KeyValue;
use crate::types::{
    Compare, CompareResult, CompareTarget, RangeRequest, TenantId, TxnOp, TxnOpReply, TxnReply, TxnRequest,
};

/// The branch a txn takes, and the plans of the txns nested in that branch, in op order.
struct Plan {
    succeeded: bool,
    nested: Vec<Plan>,
}

fn branch(txn: &TxnRequest, succeeded: bool) -> &[TxnOp] {
    if succeeded { &txn.success } else { &txn.failure }
}

fn plan<R: Reader>(reader: &R, tenant: TenantId, txn: &TxnRequest) -> Result<Plan, Fault> {
    let mut succeeded = true;
    for compare in &txn.compares {
        succeeded = succeeded && holds(reader, tenant, compare)?;
    }
    let mut nested = Vec::new();
    for op in branch(txn, succeeded) {
        if let TxnOp::Txn(inner) = op {
            nested.push(plan(reader, tenant, inner)?);
        }
    }
    Ok(Plan { succeeded, nested })
}

/// The fields a compare may look at; all zero stands for a missing key.
#[derive(Clone, Copy, Default)]
struct Fields {
    version: i64,
    create_revision: i64,
    mod_revision: i64,
    lease: i64,
}

impl From<Head> for Fields {
    fn from(head: Head) -> Fields {
        Fields {
            version: head.version,
            create_revision: head.create_revision,
            mod_revision: head.at.main,
            lease: head.lease.0,
        }
    }
}

/// Whether every key of the compare's range satisfies it; an empty range compares as a missing key.
fn holds<R: Reader>(reader: &R, tenant: TenantId, compare: &Compare) -> Result<bool, Fault> {
    let mut found = false;
    let mut all = true;
    read::live_heads(reader, tenant, &compare.range, &mut |key, newest| {
        found = true;
        all = match &compare.target {
            CompareTarget::Value(given) => {
                let stored = read::stored(reader, tenant, key, newest.at)?;
                relates(compare.result, KeyValue::decode(&stored)?.value.cmp(given))
            }
            CompareTarget::Version(_)
            | CompareTarget::Create(_)
            | CompareTarget::Mod(_)
            | CompareTarget::Lease(_)
            | CompareTarget::Unknown => holds_of(compare, newest.into()),
        };
        Ok(if all { ControlFlow::Continue(()) } else { ControlFlow::Break(()) })
    })?;
    Ok(if found { all } else { holds_of(compare, Fields::default()) })
}

fn holds_of(compare: &Compare, fields: Fields) -> bool {
    let (stored, given) = match &compare.target {
        // A missing key has no value that could relate to anything.
        CompareTarget::Value(_) => return false,
        CompareTarget::Version(given) => (fields.version, *given),
        CompareTarget::Create(given) => (fields.create_revision, *given),
        CompareTarget::Mod(given) => (fields.mod_revision, *given),
        CompareTarget::Lease(given) => (fields.lease, *given),
        CompareTarget::Unknown => (0, 0),
    };
    relates(compare.result, stored.cmp(&given))
}

fn relates(result: CompareResult, ordering: std::cmp::Ordering) -> bool {
    match result {
        CompareResult::Equal => ordering.is_eq(),
        CompareResult::Greater => ordering.is_gt(),
        CompareResult::Less => ordering.is_lt(),
        CompareResult::NotEqual => ordering.is_ne(),
        CompareResult::Unknown => true,
    }
}

/// Whether a range of a txn may read at its revision, given the tenant's before the txn.
fn check_range(request: &RangeRequest, revision: i64, compact_revision: i64) -> Result<(), Refusal> {
    match request.revision {
        Some(at) if at > revision => Err(Refusal::FutureRevision),
        Some(at) if at < compact_revision => Err(Refusal::Compacted { compact_revision }),
        Some(_) | None => Ok(()),
    }
}

/// The revision a range of a txn reads at. -1 passes the check on a store never compacted and then means now.
fn read_at(request: &RangeRequest) -> i64 {
    request.revision.filter(|at| *at > 0).unwrap_or(read::NEWEST)
}

fn check<R: Reader>(writer: &Writer<'_, R>, txn: &TxnRequest, plan: &Plan) -> Step<()> {
    let mut nested = plan.nested.iter();
    for op in branch(txn, plan.succeeded) {
        match op {
            TxnOp::Range(request) => {
                if let Err(refusal) = check_range(request, writer.row.revision, writer.row.compact_revision) {
                    return Ok(Err(refusal));
                }
            }
            TxnOp::Put(put) => accept!(writer.check_put(put)),
            TxnOp::DeleteRange(_) => {}
            TxnOp::Txn(inner) => {
                let plan = nested.next().expect("the plan has one entry per nested txn of the branch");
                accept!(check(writer, inner, plan));
            }
        }
    }
    Ok(Ok(()))
}

fn run<R: Reader>(writer: &mut Writer<'_, R>, txn: &TxnRequest, plan: &Plan) -> Step<TxnReply> {
    let mut nested = plan.nested.iter();
    let ops = branch(txn, plan.succeeded);
    let mut responses = Vec::with_capacity(ops.len());
    for op in ops {
        responses.push(match op {
            TxnOp::Range(request) => TxnOpReply::Range {
                revision: writer.revision_so_far(),
                reply: read::range_collected(writer.overlay, writer.tenant, read_at(request), request)?,
            },
            TxnOp::Put(put) => {
                let prev_kv = accept!(writer.put(put));
                TxnOpReply::Put { revision: writer.revision_so_far(), prev_kv }
            }
            TxnOp::DeleteRange(delete) => {
                let (deleted, prev_kvs) = writer.delete_range(delete)?;
                TxnOpReply::DeleteRange { revision: writer.revision_so_far(), deleted, prev_kvs }
            }
            TxnOp::Txn(inner) => {
                let plan = nested.next().expect("the plan has one entry per nested txn of the branch");
                TxnOpReply::Txn(accept!(run(writer, inner, plan)))
            }
        });
    }
    Ok(Ok(TxnReply { succeeded: plan.succeeded, responses }))
}

/// Runs a txn. On a refusal nothing has changed.
pub(crate) fn txn<R: Reader>(writer: &mut Writer<'_, R>, txn: &TxnRequest) -> Step<TxnReply> {
    let plan = plan(writer.overlay, writer.tenant, txn)?;
    accept!(check(writer, txn, &plan));
    if !may_refuse_while_running(txn) {
        let reply = run(writer, txn, &plan)?;
        assert!(reply.is_ok(), "whatever can refuse was checked");
        return Ok(reply);
    }
    let usage = writer.row.usage;
    writer.overlay.begin();
    let reply = run(writer, txn, &plan)?;
    match &reply {
        Ok(_) => writer.overlay.keep(),
        Err(_) => {
            writer.overlay.roll_back();
            writer.row.usage = usage;
            writer.forget();
        }
    }
    Ok(reply)
}

/// Whether the txn holds both a delete and a put that needs its key to exist.
fn may_refuse_while_running(txn: &TxnRequest) -> bool {
    any_op(txn, &|op| matches!(op, TxnOp::DeleteRange(_)))
        && any_op(txn, &|op| matches!(op, TxnOp::Put(put) if put.ignore_value || put.ignore_lease))
}

fn any_op(txn: &TxnRequest, matches: &dyn Fn(&TxnOp) -> bool) -> bool {
    txn.success.iter().chain(&txn.failure).any(|op| match op {
        TxnOp::Txn(inner) => any_op(inner, matches),
        TxnOp::Range(_) | TxnOp::Put(_) | TxnOp::DeleteRange(_) => matches(op),
    })
}

/// Runs a txn of ranges only, at one point in time, outside `apply`.
///
/// `revision` and `compact_revision` are those of the same point in time.
pub(crate) fn read_only<R: Reader>(
    reader: &R,
    tenant: TenantId,
    txn: &TxnRequest,
    revision: i64,
    compact_revision: i64,
) -> Step<TxnReply> {
    let plan = plan(reader, tenant, txn)?;
    let mut responses = Vec::new();
    for op in branch(txn, plan.succeeded) {
        let TxnOp::Range(request) = op else { unreachable!("the caller checked that there are only ranges") };
        if let Err(refusal) = check_range(request, revision, compact_revision) {
            return Ok(Err(refusal));
        }
        let at = read_at(request).min(revision);
        let reply = read::range_collected(reader, tenant, at, request)?;
        responses.push(TxnOpReply::Range { revision, reply });
    }
    Ok(Ok(TxnReply { succeeded: plan.succeeded, responses }))
}

/// Whether a txn consists of plain ranges only, in both branches.
pub fn is_read_only(txn: &TxnRequest) -> bool {
    txn.success.iter().chain(&txn.failure).all(|op| matches!(op, TxnOp::Range(_)))
}

/// What a put, or the dearer branch of a txn, may add to the tenant's size (contract 4, NOSPACE).
pub fn quota_cost(txn: &TxnRequest) -> u64 {
    let cost = |ops: &[TxnOp]| {
        ops.iter().fold(0u64, |sum, op| {
            sum.saturating_add(match op {
                TxnOp::Put(put) => put_cost(put.key.len(), put.value.len()),
                TxnOp::Txn(inner) => quota_cost(inner),
                TxnOp::Range(_) | TxnOp::DeleteRange(_) => 0,
            })
        })
    };
    cost(&txn.success).max(cost(&txn.failure))
}

/// etcd's estimate of a put in bytes.
pub fn put_cost(key_len: usize, value_len: usize) -> u64 {
    256 + (key_len + value_len) as u64
}
