//! Two kinds of failure that must never be mixed.
//!
//! A [`Refusal`] is an answer: the command and the replicated state decide it alone, so every member refuses alike and
//! the command counts as applied. A [`Fault`] is this member's own trouble (disk, corruption): a member that carried on
//! after one would diverge from its peers, so whoever drives `apply` stops the process.

use crate::rules::Rules;
use crate::types::LeaseId;

/// Why a command was refused, or a read could not be answered. Nothing was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The revision lies below the compacted one; a client lists again at a newer revision.
    #[error("required revision has been compacted")]
    Compacted { compact_revision: i64 },
    /// The revision has not happened yet.
    #[error("required revision is a future revision")]
    FutureRevision,
    /// A put, keep-alive or revoke named a lease that does not exist (any more).
    #[error("requested lease {0} not found")]
    LeaseNotFound(LeaseId),
    /// A grant asked for an id that is taken.
    #[error("lease {0} already exists")]
    LeaseExists(LeaseId),
    /// `ignore_value` or `ignore_lease` on a key that does not exist.
    #[error("key not found")]
    KeyNotFound,
    /// The tenant's quota is used up, or its NOSPACE alarm is active. Deletes, compaction and revokes still work.
    #[error("database space exceeded")]
    NoSpace,
    /// The tenant's CORRUPT alarm is active: no writes until an operator has looked.
    #[error("corrupt cluster")]
    Corrupt,
    /// A txn, or a delete that tells what it deleted, would answer more than [`crate::limits::TXN_REPLY_BYTES_MAX`], a txn has visited
    /// more than [`crate::limits::TXN_ROWS_MAX`] rows or kept values of more than [`crate::limits::TXN_STORED_BYTES_MAX`], or more than
    /// [`crate::limits::DELETED_KEYS_MAX`] keys would go. Smaller ones do the same in pieces.
    #[error("txn reads or changes too much")]
    TxnTooLarge,
    /// The tenant has [`crate::limits::ALARMS_MAX`] alarms.
    #[error("too many alarms")]
    TooManyAlarms,
    /// No tenant has this id or name.
    #[error("tenant not found")]
    TenantNotFound,
    /// The cell holds as many tenants as it may.
    #[error("too many tenants")]
    TooManyTenants,
    /// The tenant takes no writes that make it grow.
    #[error("the tenant is read-only")]
    ReadOnly,
    /// The tenant takes no commands.
    #[error("the tenant is suspended")]
    Suspended,
    /// The tenant has as many leases as it may.
    #[error("too many leases")]
    TooManyLeases,
    /// A tenant has at most [`crate::limits::LABELS_MAX`] labels.
    #[error("too many labels")]
    TooManyLabels,
    /// At most [`crate::limits::REVOKED_SERIALS_MAX`] certificates of a tenant are refused one by one.
    #[error("too many revoked certificates")]
    TooManyRevoked,
    /// No member of the cell has this id (any more).
    #[error("member not found")]
    MemberNotFound,
    /// A member of this id exists or existed.
    #[error("member id already exists")]
    MemberExists,
    /// Another member has one of these peer URLs.
    #[error("peer URLs already exist")]
    PeerUrlExists,
    /// The lease has [`crate::limits::LEASE_KEYS_MAX`] keys.
    #[error("too many keys of the lease")]
    TooManyLeaseKeys,
    /// The members of the cell are not those that were asked which rules they know.
    #[error("the members have changed")]
    MembersChanged,
    /// What is to be promoted is no learner.
    #[error("the member is not a learner")]
    MemberNotLearner,
}

/// What only this member suffers. Never a command's result; the member stops.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// The operating system refused a read or write.
    #[error("input/output: {0}")]
    Io(#[from] std::io::Error),
    /// The storage engine failed; its own words.
    #[error("storage engine: {0}")]
    Engine(String),
    /// The cell decides by rules of a later release; see [`Rules`](crate::Rules).
    #[error(
        "the cell decides by rules {number}, this release knows {} to {}: start the release that the other members run",
        Rules::FIRST.number(), Rules::NEWEST.number()
    )]
    Rules { number: u32 },
    /// The data is older than what this member has told others that it has: some of that may be lost if it votes.
    #[error(
        "the log ends at {last_index}, and others were told that it has entries up to {acknowledged_index}: the data is an older copy; \
         remove this member from the cell, and add it anew with an empty data directory"
    )]
    Outdated { last_index: u64, acknowledged_index: u64 },
    /// Bytes read back are not what was written.
    #[error("corrupt {what} at {key:02x?}")]
    Corrupt { what: &'static str, key: Vec<u8> },
}

/// A read either answers, refuses (client's doing) or faults (ours).
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    #[error(transparent)]
    Refused(#[from] Refusal),
    #[error(transparent)]
    Fault(#[from] Fault),
}
