//! Txns: conditions first, then one branch (contract 1.1 "Txn").
//!
//! All conditions, nested ones too, are decided on the state before the txn, which gives a [`Plan`]: which branch runs at
//! each level. Along the plan everything that could refuse is checked before anything is changed. Two cases escape that: a
//! put that keeps the old value of a key which an earlier operation of the same txn deletes, and reads that turn out
//! too large ([`Bounds`]). They are found while running, and the overlay's journal takes the txn back.

use std::ops::ControlFlow;

use bytes::Bytes;

use super::overlay::Overlay;
use super::read;
use super::write::{Step, Writer, accept};
use crate::engine::Reader;
use crate::error::{Fault, Refusal};
use crate::key::head::Head;
use crate::key_value::KeyValue;
use crate::limits::{TXN_REPLY_BYTES_MAX, TXN_REPLY_KEY_BYTES, TXN_ROWS_MAX};
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

/// What one txn may still take. Both measures depend on the replicated state alone, so all members refuse alike.
struct Bounds {
    reply_bytes_left: usize,
    /// [`Overlay::visited_rows`] at which nothing more is started.
    rows_end: u64,
}

impl Bounds {
    fn new(rows_before: u64) -> Bounds {
        Bounds { reply_bytes_left: TXN_REPLY_BYTES_MAX, rows_end: rows_before.saturating_add(TXN_ROWS_MAX) }
    }

    fn is_used_up<R: Reader>(&self, overlay: &Overlay<R>) -> bool {
        overlay.visited_rows() > self.rows_end
    }

    /// Takes the bytes of key-values that were read anyway.
    fn take(&mut self, kvs: &[Bytes]) -> Result<(), Refusal> {
        let bytes = kvs.iter().map(|kv| kv.len() + TXN_REPLY_KEY_BYTES).sum();
        self.reply_bytes_left = self.reply_bytes_left.checked_sub(bytes).ok_or(Refusal::TxnTooLarge)?;
        Ok(())
    }
}

fn plan<R: Reader>(overlay: &Overlay<R>, tenant: TenantId, txn: &TxnRequest, bounds: &Bounds) -> Step<Plan> {
    let mut succeeded = true;
    for compare in &txn.compares {
        if bounds.is_used_up(overlay) {
            return Ok(Err(Refusal::TxnTooLarge));
        }
        succeeded = succeeded && holds(overlay, tenant, compare)?;
    }
    let mut nested = Vec::new();
    for op in branch(txn, succeeded) {
        if let TxnOp::Txn(inner) = op {
            nested.push(accept!(plan(overlay, tenant, inner, bounds)));
        }
    }
    Ok(Ok(Plan { succeeded, nested }))
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

fn run<R: Reader>(writer: &mut Writer<'_, R>, txn: &TxnRequest, plan: &Plan, bounds: &mut Bounds) -> Step<TxnReply> {
    let mut nested = plan.nested.iter();
    let ops = branch(txn, plan.succeeded);
    let mut responses = Vec::with_capacity(ops.len());
    for op in ops {
        if bounds.is_used_up(writer.overlay) {
            return Ok(Err(Refusal::TxnTooLarge));
        }
        responses.push(match op {
            TxnOp::Range(request) => {
                let left = &mut bounds.reply_bytes_left;
                let at = read_at(request);
                let Some(reply) = read::range_collected(writer.overlay, writer.tenant, at, request, left)? else {
                    return Ok(Err(Refusal::TxnTooLarge));
                };
                TxnOpReply::Range { revision: writer.revision_so_far(), reply }
            }
            TxnOp::Put(put) => {
                let prev_kv = accept!(writer.put(put));
                if writer.stored_bytes > writer.rules.txn_stored_bytes_max() {
                    return Ok(Err(Refusal::TxnTooLarge));
                }
                accept!(Ok::<_, Fault>(bounds.take(prev_kv.as_slice())));
                TxnOpReply::Put { revision: writer.revision_so_far(), prev_kv }
            }
            TxnOp::DeleteRange(delete) => {
                let (deleted, prev_kvs) = accept!(writer.delete_range(delete));
                accept!(Ok::<_, Fault>(bounds.take(&prev_kvs)));
                TxnOpReply::DeleteRange { revision: writer.revision_so_far(), deleted, prev_kvs }
            }
            TxnOp::Txn(inner) => {
                let plan = nested.next().expect("the plan has one entry per nested txn of the branch");
                TxnOpReply::Txn(accept!(run(writer, inner, plan, bounds)))
            }
        });
    }
    Ok(Ok(TxnReply { succeeded: plan.succeeded, responses }))
}

/// Runs a txn. On a refusal nothing has changed.
pub(crate) fn txn<R: Reader>(writer: &mut Writer<'_, R>, txn: &TxnRequest) -> Step<TxnReply> {
    let bounds = Bounds::new(writer.overlay.visited_rows());
    txn_within(writer, txn, bounds)
}

fn txn_within<R: Reader>(writer: &mut Writer<'_, R>, txn: &TxnRequest, mut bounds: Bounds) -> Step<TxnReply> {
    let plan = accept!(plan(writer.overlay, writer.tenant, txn, &bounds));
    accept!(check(writer, txn, &plan));
    let usage = writer.row.usage;
    writer.overlay.begin();
    let reply = run(writer, txn, &plan, &mut bounds)?;
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
    let mut succeeded = true;
    for compare in &txn.compares {
        succeeded = succeeded && holds(reader, tenant, compare)?;
    }
    let mut bytes_left = TXN_REPLY_BYTES_MAX;
    let mut responses = Vec::new();
    for op in branch(txn, succeeded) {
        let TxnOp::Range(request) = op else { unreachable!("the caller checked that there are only ranges") };
        if let Err(refusal) = check_range(request, revision, compact_revision) {
            return Ok(Err(refusal));
        }
        let at = read_at(request).min(revision);
        let Some(reply) = read::range_collected(reader, tenant, at, request, &mut bytes_left)? else {
            return Ok(Err(Refusal::TxnTooLarge));
        };
        responses.push(TxnOpReply::Range { revision, reply });
    }
    Ok(Ok(TxnReply { succeeded, responses }))
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::{Engine, MemoryEngine};
    use crate::key::meta::TenantRow;
    use crate::rules::Rules;
    use crate::types::{DeleteRangeRequest, KeyRange, LeaseId, PutRequest};

    const TENANT: TenantId = TenantId(1);

    fn put(key: String) -> TxnOp {
        TxnOp::Put(PutRequest {
            key: key.into(),
            value: Bytes::from_static(b"v"),
            lease: LeaseId::NONE,
            prev_kv: false,
            ignore_value: false,
            ignore_lease: false,
        })
    }

    fn everything() -> KeyRange {
        KeyRange::From(Bytes::from_static(b"k"))
    }

    /// A store of a hundred keys, not yet written to its engine.
    fn filled<R: Reader>(overlay: &mut Overlay<R>, row: &mut TenantRow, capture_prev: bool) {
        let mut writer = Writer::new(overlay, TENANT, row, Rules::NEWEST, capture_prev);
        let success = (0..100).map(|n| put(format!("k{n:03}"))).collect();
        txn(&mut writer, &TxnRequest { success, ..TxnRequest::default() }).unwrap().unwrap();
        writer.finish();
    }

    /// A bound on work is a replicated decision, so work must not depend on who watches on this member.
    #[test]
    fn work_is_equal_whoever_watches() {
        let visited = [false, true].map(|capture_prev| {
            let engine = MemoryEngine::new();
            let (mut overlay, mut row) = (Overlay::new(engine.view()), TenantRow::new("t".to_string()));
            filled(&mut overlay, &mut row, capture_prev);
            let mut writer = Writer::new(&mut overlay, TENANT, &mut row, Rules::NEWEST, capture_prev);
            let delete = DeleteRangeRequest { range: KeyRange::Single(Bytes::from_static(b"k001")), prev_kv: false };
            let success = vec![
                put("k000".to_string()),
                TxnOp::DeleteRange(delete),
                put("k001".to_string()),
                TxnOp::DeleteRange(DeleteRangeRequest { range: everything(), prev_kv: false }),
                TxnOp::Range(RangeRequest::new(everything())),
            ];
            txn(&mut writer, &TxnRequest { success, ..TxnRequest::default() }).unwrap().unwrap();
            overlay.visited_rows()
        });
        assert_eq!(visited[0], visited[1]);
    }

    /// The last condition may use up the bound, so that it is the first put that is refused.
    #[test]
    fn what_the_conditions_used_up_refuses_even_a_plain_put() {
        let engine = MemoryEngine::new();
        let (mut overlay, mut row) = (Overlay::new(engine.view()), TenantRow::new("t".to_string()));
        filled(&mut overlay, &mut row, false);
        let before = row.clone();
        let rows_end = overlay.visited_rows() + 10;
        let mut writer = Writer::new(&mut overlay, TENANT, &mut row, Rules::NEWEST, false);
        let compares =
            vec![Compare { range: everything(), result: CompareResult::Greater, target: CompareTarget::Version(0) }];
        let request = TxnRequest { compares, success: vec![put("new".to_string())], failure: Vec::new() };
        let bounds = Bounds { reply_bytes_left: TXN_REPLY_BYTES_MAX, rows_end };
        assert_eq!(txn_within(&mut writer, &request, bounds).unwrap(), Err(Refusal::TxnTooLarge));
        assert!(writer.finish().events.is_empty());
        assert_eq!(row, before);
    }
}
