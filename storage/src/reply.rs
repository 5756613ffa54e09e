//! What `apply` answers. A reply lives on the member that proposed the command; it is never stored or sent to peers.

use bytes::Bytes;

use crate::error::Refusal;
use crate::types::{Alarm, LeaseId, TenantId, TxnReply};

/// Result of one command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// The tenant's revision after the command: what the response header shows. 0 if there is no such tenant.
    pub revision: i64,
    pub result: Result<Reply, Refusal>,
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
