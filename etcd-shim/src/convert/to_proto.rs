//! Storage's answers to messages. Stored bytes go in as they are.

use bytes::Bytes;
use tenure_storage::{Alarm, TxnOpReply, TxnReply};

use crate::proto::etcdserverpb as pb;
use crate::proto::etcdserverpb::response_op::Response;
use crate::wire::{KvRope, RangeResponse, StoredKeyValue};

/// A header as the parts of a txn's answer have it: nothing but the revision.
fn revision_only(revision: i64) -> Option<pb::ResponseHeader> {
    Some(pb::ResponseHeader { revision, ..Default::default() })
}

/// A count for a signed field.
pub fn count(count: u64) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

pub fn range(header: Option<pb::ResponseHeader>, kvs: KvRope, more: bool, found: u64) -> RangeResponse {
    RangeResponse { header, kvs, more, count: count(found) }
}

pub fn put(header: Option<pb::ResponseHeader>, prev_kv: Option<Bytes>) -> pb::PutResponse {
    pb::PutResponse { header, prev_kv: prev_kv.map(StoredKeyValue) }
}

pub fn delete_range(header: Option<pb::ResponseHeader>, deleted: u64, prev_kvs: Vec<Bytes>) -> pb::DeleteRangeResponse {
    pb::DeleteRangeResponse {
        header,
        deleted: count(deleted),
        prev_kvs: prev_kvs.into_iter().map(StoredKeyValue).collect(),
    }
}

pub fn txn(header: Option<pb::ResponseHeader>, reply: TxnReply) -> pb::TxnResponse {
    pb::TxnResponse {
        header,
        succeeded: reply.succeeded,
        responses: reply.responses.into_iter().map(|reply| pb::ResponseOp { response: Some(op(reply)) }).collect(),
    }
}

fn op(reply: TxnOpReply) -> Response {
    match reply {
        TxnOpReply::Range { revision, reply } => Response::ResponseRange(range(
            revision_only(revision),
            // By value: each KeyValue is given back as soon as the rope has it.
            reply.kvs.into_iter().collect(),
            reply.more,
            reply.count,
        )),
        TxnOpReply::Put { revision, prev_kv } => Response::ResponsePut(put(revision_only(revision), prev_kv)),
        TxnOpReply::DeleteRange { revision, deleted, prev_kvs } => {
            Response::ResponseDeleteRange(delete_range(revision_only(revision), deleted, prev_kvs))
        }
        // A nested txn's header is there and empty.
        TxnOpReply::Txn(reply) => Response::ResponseTxn(txn(Some(pb::ResponseHeader::default()), reply)),
    }
}

pub fn alarm(alarm: &Alarm) -> pb::AlarmMember {
    pb::AlarmMember { member_id: alarm.member_id, alarm: alarm.kind.0 }
}
