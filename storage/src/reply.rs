//! What `apply` answers. A reply lives on the member that proposed the command; it is never stored or sent to peers.

use bytes::Bytes;

use crate::error::Refusal;
use crate::types::{Alarm, LeaseId, TenantId, TxnOpReply, TxnReply};

/// Result of one command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// The tenant's revision after the command: what the response header shows. 0 if there is no such tenant.
    pub revision: i64,
    pub result: Result<Reply, Refusal>,
}

impl Outcome {
    /// Bytes of keys and values in it, about.
    pub fn data_bytes(&self) -> usize {
        match &self.result {
            Ok(Reply::Put { prev_kv }) => bytes_of(prev_kv),
            Ok(Reply::DeleteRange { prev_kvs, .. }) => bytes_of(prev_kvs),
            Ok(Reply::Txn(reply)) => txn_bytes(reply),
            Ok(
                Reply::Tenant { .. }
                | Reply::Configure
                | Reply::Members
                | Reply::Compact
                | Reply::Reclaim { .. }
                | Reply::LeaseGrant { .. }
                | Reply::LeaseRevoke
                | Reply::Alarm { .. },
            )
            | Err(_) => 0,
        }
    }
}

fn bytes_of<'a>(stored: impl IntoIterator<Item = &'a Bytes>) -> usize {
    stored.into_iter().map(Bytes::len).sum()
}

fn txn_bytes(reply: &TxnReply) -> usize {
    let of = |response: &TxnOpReply| match response {
        TxnOpReply::Range { reply, .. } => bytes_of(&reply.kvs),
        TxnOpReply::Put { prev_kv, .. } => bytes_of(prev_kv),
        TxnOpReply::DeleteRange { prev_kvs, .. } => bytes_of(prev_kvs),
        TxnOpReply::Txn(reply) => txn_bytes(reply),
    };
    reply.responses.iter().map(of).sum()
}

/// What a command that was not refused answers; one variant per [`crate::command::Command`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// `created` is false for a tenant that was there already, and for every other change.
    Tenant {
        id: TenantId,
        created: bool,
    },
    Configure,
    Members,
    /// `prev_kv` in stored form, if asked for and present.
    Put {
        prev_kv: Option<Bytes>,
    },
    /// `prev_kvs` in key order, in stored form, if asked for.
    DeleteRange {
        deleted: u64,
        prev_kvs: Vec<Bytes>,
    },
    Txn(TxnReply),
    Compact,
    /// Whether rows up to the compact revision are left for another step.
    Reclaim {
        more: bool,
    },
    LeaseGrant {
        id: LeaseId,
        ttl_seconds: i64,
    },
    LeaseRevoke,
    /// The alarms the command affected.
    Alarm {
        alarms: Vec<Alarm>,
    },
}
