//! What goes into the raft log: one [`Envelope`] is one client's write, addressed to one tenant.
//!
//! The bytes carry a version. A member reads every version it knows and refuses others by name, so an old member
//! stops instead of guessing. Decoding trusts nothing: a length is checked before it is believed, nesting is bounded.
//! Byte strings of a decoded command share the entry's buffer, nothing is copied.

use bytes::Bytes;

use crate::codec::{Reader, Writer};
use crate::error::Fault;
use crate::limits::TXN_DEPTH_MAX;
use crate::profile::{self, Labels, Limit, TenantLimits, TenantPhase};
use crate::types::{
    AlarmKind, Compare, CompareResult, CompareTarget, DeleteRangeRequest, KeyRange, LeaseId, PutRequest, RangeRequest,
    SortOrder, SortTarget, TenantId, TxnOp, TxnRequest,
};

/// First byte of every encoded envelope.
const COMMAND_VERSION: u8 = 1;

/// What a command counts for besides its length if it may read any number of rows, or writes a value that it does not carry.
const UNSEEN_WORK_BYTES: usize = 1 << 20;

/// The same of the revoke of a lease, which deletes a bounded number of keys, mostly few.
const REVOKE_WORK_BYTES: usize = 64 << 10;

/// What an encoded envelope counts for where commands are batched: its length, and an estimate of what it does beyond that. So few commands that
/// do much get into one entry, which is applied as a whole, and few are on their way at a time.
pub fn cost_bytes(encoded: &Bytes) -> usize {
    match Envelope::decode(encoded.clone()) {
        Ok(Envelope { command, .. }) => encoded.len() + command.unseen_bytes(),
        // Refused where it is applied.
        Err(_) => encoded.len(),
    }
}

/// A command with its addressee.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Envelope {
    pub tenant: TenantId,
    /// The member that proposed it: a quota it trips raises the alarm under this id, as in etcd.
    pub member_id: u64,
    pub command: Command,
}

/// Everything that can change replicated state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Makes, changes or ends a tenant.
    Tenant(TenantCommand),
    /// Sets what all tenants of the cell share. The envelope's tenant is ignored.
    Configure {
        quota_bytes: i64,
    },
    /// Changes the limits of tenants of which nothing else is said; `None` takes one back. The envelope's tenant is ignored.
    SetDefaults {
        limits: Vec<(Limit, Option<u64>)>,
    },
    /// Raises the rules that the cell decides by to this number, if they are lower: all these members know them. The envelope's tenant is
    /// ignored.
    RaiseRules {
        number: u32,
        /// Sorted.
        members: Vec<u64>,
    },
    /// Changes who is known as a member of the cell. The envelope's tenant is ignored.
    Members(MembersCommand),
    Put(PutRequest),
    DeleteRange(DeleteRangeRequest),
    Txn(TxnRequest),
    /// Moves the compact revision; what it frees goes in [`Command::Reclaim`] steps.
    Compact {
        revision: i64,
    },
    /// Drops what the compact revision made unreachable, visiting at most this many rows of history.
    Reclaim {
        rows_max: u32,
    },
    /// `ttl_seconds` is the effective one: the edge has raised it to the minimum.
    LeaseGrant {
        id: LeaseId,
        ttl_seconds: i64,
    },
    LeaseRevoke {
        id: LeaseId,
    },
    /// Sets (idempotent) or clears one alarm.
    Alarm {
        activate: bool,
        member_id: u64,
        kind: AlarmKind,
    },
}

impl Command {
    /// What [`cost_bytes`] adds to the length of an envelope with this command.
    pub fn unseen_bytes(&self) -> usize {
        match (self, self.has_unseen_work()) {
            (Command::LeaseRevoke { .. }, _) => REVOKE_WORK_BYTES,
            (_, true) => UNSEEN_WORK_BYTES,
            (_, false) => 0,
        }
    }

    fn has_unseen_work(&self) -> bool {
        match self {
            Command::Put(put) => put.ignore_value,
            Command::DeleteRange(delete) => is_many(&delete.range),
            Command::Txn(txn) => txn.has_unseen_work(),
            Command::Tenant(_)
            | Command::Configure { .. }
            | Command::SetDefaults { .. }
            | Command::RaiseRules { .. }
            | Command::Members(_)
            | Command::Compact { .. }
            | Command::Reclaim { .. }
            | Command::LeaseGrant { .. }
            | Command::LeaseRevoke { .. }
            | Command::Alarm { .. } => false,
        }
    }
}

impl TxnRequest {
    fn has_unseen_work(&self) -> bool {
        let of = |op: &TxnOp| match op {
            TxnOp::Put(put) => put.ignore_value,
            TxnOp::Range(range) => is_many(&range.range),
            TxnOp::DeleteRange(delete) => is_many(&delete.range),
            TxnOp::Txn(txn) => txn.has_unseen_work(),
        };
        self.compares.iter().any(|compare| is_many(&compare.range)) || self.success.iter().chain(&self.failure).any(of)
    }
}

fn is_many(range: &KeyRange) -> bool {
    !matches!(range, KeyRange::Single(_))
}

/// What happens to a tenant: the envelope's, if nothing else is said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TenantCommand {
    /// Makes the tenant exist; naming one that exists answers its id and changes nothing. The envelope's tenant is ignored.
    Create {
        name: String,
        limits: TenantLimits,
        labels: Labels,
        created_at_ms: i64,
    },
    /// Changes some limits and labels; `None` takes one away.
    Update {
        limits: Vec<(Limit, Option<u64>)>,
        labels: Vec<(String, Option<String>)>,
    },
    SetPhase(TenantPhase),
    /// Refuses one certificate until it ends by itself. `now_ms` is the proposer's clock: what ended before is forgotten.
    RevokeSerial {
        serial: Bytes,
        ends_at_ms: i64,
        now_ms: i64,
    },
    /// Refuses certificates that were valid before.
    RevokeBefore {
        valid_from_ms: i64,
    },
    /// Who signs the certificates of its clients from now on, as certificates in DER; none: whoever signs for the cell.
    SetTrustedCa {
        certificates: Vec<Bytes>,
    },
    /// Its data is gone and its name is free. The id is never used again.
    Delete,
    /// A deleted tenant's space has been given back: nothing is left to say of it.
    Forget,
}

impl TenantCommand {
    /// An empty tenant of which nothing is said but its name.
    pub fn create(name: impl Into<String>) -> Self {
        TenantCommand::Create {
            name: name.into(),
            limits: TenantLimits::default(),
            labels: Labels::default(),
            created_at_ms: 0,
        }
    }
}

/// What happens to the members of the cell. Whether they vote is raft's own state; these go with its changes of members, in
/// the same entries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MembersCommand {
    /// The members of a new cell, id and peer URLs. Without effect if there are some already: each of them proposes it.
    Bootstrap {
        members: Vec<(u64, Vec<String>)>,
    },
    Add {
        id: u64,
        peer_urls: Vec<String>,
        is_learner: bool,
    },
    /// A learner gets its vote.
    Promote {
        id: u64,
    },
    Remove {
        id: u64,
    },
    SetPeerUrls {
        id: u64,
        peer_urls: Vec<String>,
    },
    /// A member that has started says who it is.
    Publish {
        id: u64,
        name: String,
        client_urls: Vec<String>,
        tenant_urls: Vec<(String, String)>,
    },
}

impl Envelope {
    /// The bytes proposed to raft.
    pub fn encode(&self) -> Bytes {
        let mut w = Writer::with_capacity(64);
        w.u8(COMMAND_VERSION);
        w.varint(u64::from(self.tenant.0));
        w.varint(self.member_id);
        encode_command(&mut w, &self.command);
        w.finish()
    }

    /// Reads what [`Envelope::encode`] wrote, and nothing else.
    ///
    /// # Errors
    /// [`Fault::Corrupt`] on any other bytes: in a committed entry that means this member cannot go on.
    pub fn decode(bytes: Bytes) -> Result<Envelope, Fault> {
        let mut r = Reader::new(bytes, "command");
        match r.u8()? {
            COMMAND_VERSION => {}
            _ => return Err(r.corrupt("command version")),
        }
        let tenant = TenantId(r.varint_u32()?);
        let member_id = r.varint()?;
        let command = decode_command(&mut r)?;
        r.end()?;
        Ok(Envelope { tenant, member_id, command })
    }
}

fn encode_command(w: &mut Writer, command: &Command) {
    match command {
        Command::Tenant(tenant) => {
            w.u8(12);
            encode_tenant(w, tenant);
        }
        Command::Configure { quota_bytes } => {
            w.u8(2);
            w.i64(*quota_bytes);
        }
        Command::SetDefaults { limits } => {
            w.u8(13);
            encode_limit_changes(w, limits);
        }
        Command::RaiseRules { number, members } => {
            w.u8(14);
            w.varint(u64::from(*number));
            w.varint(members.len() as u64);
            members.iter().for_each(|id| w.varint(*id));
        }
        Command::Put(put) => {
            w.u8(3);
            encode_put(w, put);
        }
        Command::DeleteRange(delete) => {
            w.u8(4);
            encode_delete(w, delete);
        }
        Command::Txn(txn) => {
            w.u8(5);
            encode_txn(w, txn);
        }
        Command::Compact { revision } => {
            w.u8(6);
            w.i64(*revision);
        }
        Command::Reclaim { rows_max } => {
            w.u8(7);
            w.varint(u64::from(*rows_max));
        }
        Command::LeaseGrant { id, ttl_seconds } => {
            w.u8(8);
            w.i64(id.0);
            w.i64(*ttl_seconds);
        }
        Command::LeaseRevoke { id } => {
            w.u8(9);
            w.i64(id.0);
        }
        Command::Members(members) => {
            w.u8(11);
            encode_members(w, members);
        }
        Command::Alarm { activate, member_id, kind } => {
            w.u8(10);
            w.u8(u8::from(*activate));
            w.varint(*member_id);
            w.i64(i64::from(kind.0));
        }
    }
}

fn decode_command(r: &mut Reader) -> Result<Command, Fault> {
    Ok(match r.u8()? {
        // As it was written before tenants had profiles.
        1 => Command::Tenant(TenantCommand::create(r.string()?)),
        2 => Command::Configure { quota_bytes: r.i64()? },
        3 => Command::Put(decode_put(r)?),
        4 => Command::DeleteRange(decode_delete(r)?),
        5 => Command::Txn(decode_txn(r, 0)?),
        6 => Command::Compact { revision: r.i64()? },
        7 => Command::Reclaim { rows_max: r.varint_u32()? },
        8 => Command::LeaseGrant { id: LeaseId(r.i64()?), ttl_seconds: r.i64()? },
        9 => Command::LeaseRevoke { id: LeaseId(r.i64()?) },
        10 => Command::Alarm {
            activate: r.bool()?,
            member_id: r.varint()?,
            kind: AlarmKind(r.i64()?.try_into().map_err(|_| r.corrupt("alarm kind"))?),
        },
        11 => Command::Members(decode_members(r)?),
        12 => Command::Tenant(decode_tenant(r)?),
        13 => Command::SetDefaults { limits: decode_limit_changes(r)? },
        14 => Command::RaiseRules { number: r.varint_u32()?, members: r.list(Reader::varint)? },
        _ => return Err(r.corrupt("command kind, or one of a later release")),
    })
}

fn encode_limit_changes(w: &mut Writer, limits: &[(Limit, Option<u64>)]) {
    w.varint(limits.len() as u64);
    for (limit, value) in limits {
        limit.encode(w);
        w.u8(u8::from(value.is_some()));
        w.varint(value.unwrap_or(0));
    }
}

fn decode_limit_changes(r: &mut Reader) -> Result<Vec<(Limit, Option<u64>)>, Fault> {
    r.list(|r| {
        let (limit, is_set, value) = (Limit::decode(r)?, r.bool()?, r.varint()?);
        Ok((limit, is_set.then_some(value)))
    })
}

fn encode_tenant(w: &mut Writer, command: &TenantCommand) {
    match command {
        TenantCommand::Create { name, limits, labels, created_at_ms } => {
            w.u8(1);
            w.bytes(name.as_bytes());
            limits.encode(w);
            profile::encode_labels(w, labels);
            w.i64(*created_at_ms);
        }
        TenantCommand::Update { limits, labels } => {
            w.u8(2);
            encode_limit_changes(w, limits);
            w.varint(labels.len() as u64);
            for (name, value) in labels {
                w.bytes(name.as_bytes());
                w.u8(u8::from(value.is_some()));
                w.bytes(value.as_deref().unwrap_or_default().as_bytes());
            }
        }
        TenantCommand::SetPhase(phase) => {
            w.u8(3);
            phase.encode(w);
        }
        TenantCommand::RevokeSerial { serial, ends_at_ms, now_ms } => {
            w.u8(4);
            w.bytes(serial);
            w.i64(*ends_at_ms);
            w.i64(*now_ms);
        }
        TenantCommand::RevokeBefore { valid_from_ms } => {
            w.u8(5);
            w.i64(*valid_from_ms);
        }
        TenantCommand::Delete => w.u8(6),
        TenantCommand::Forget => w.u8(7),
        TenantCommand::SetTrustedCa { certificates } => {
            w.u8(8);
            profile::encode_certificates(w, certificates);
        }
    }
}

fn decode_tenant(r: &mut Reader) -> Result<TenantCommand, Fault> {
    Ok(match r.u8()? {
        1 => TenantCommand::Create {
            name: r.string()?,
            limits: TenantLimits::decode(r)?,
            labels: profile::decode_labels(r)?,
            created_at_ms: r.i64()?,
        },
        2 => TenantCommand::Update {
            limits: decode_limit_changes(r)?,
            labels: r.list(|r| {
                let (name, is_set, value) = (r.string()?, r.bool()?, r.string()?);
                Ok((name, is_set.then_some(value)))
            })?,
        },
        3 => TenantCommand::SetPhase(TenantPhase::decode(r)?),
        4 => TenantCommand::RevokeSerial { serial: r.bytes()?, ends_at_ms: r.i64()?, now_ms: r.i64()? },
        5 => TenantCommand::RevokeBefore { valid_from_ms: r.i64()? },
        6 => TenantCommand::Delete,
        7 => TenantCommand::Forget,
        8 => TenantCommand::SetTrustedCa { certificates: profile::decode_certificates(r)? },
        _ => return Err(r.corrupt("tenant command kind, or one of a later release")),
    })
}

fn encode_members(w: &mut Writer, command: &MembersCommand) {
    match command {
        MembersCommand::Bootstrap { members } => {
            w.u8(1);
            w.varint(members.len() as u64);
            for (id, peer_urls) in members {
                w.varint(*id);
                w.strings(peer_urls);
            }
        }
        MembersCommand::Add { id, peer_urls, is_learner } => {
            w.u8(2);
            w.varint(*id);
            w.strings(peer_urls);
            w.u8(u8::from(*is_learner));
        }
        MembersCommand::Promote { id } => {
            w.u8(3);
            w.varint(*id);
        }
        MembersCommand::Remove { id } => {
            w.u8(4);
            w.varint(*id);
        }
        MembersCommand::SetPeerUrls { id, peer_urls } => {
            w.u8(5);
            w.varint(*id);
            w.strings(peer_urls);
        }
        MembersCommand::Publish { id, name, client_urls, tenant_urls } => {
            w.u8(6);
            w.varint(*id);
            w.bytes(name.as_bytes());
            w.strings(client_urls);
            w.varint(tenant_urls.len() as u64);
            for (tenant, url) in tenant_urls {
                w.bytes(tenant.as_bytes());
                w.bytes(url.as_bytes());
            }
        }
    }
}

fn decode_members(r: &mut Reader) -> Result<MembersCommand, Fault> {
    Ok(match r.u8()? {
        1 => MembersCommand::Bootstrap { members: r.list(|r| Ok((r.varint()?, r.list(Reader::string)?)))? },
        2 => MembersCommand::Add { id: r.varint()?, peer_urls: r.list(Reader::string)?, is_learner: r.bool()? },
        3 => MembersCommand::Promote { id: r.varint()? },
        4 => MembersCommand::Remove { id: r.varint()? },
        5 => MembersCommand::SetPeerUrls { id: r.varint()?, peer_urls: r.list(Reader::string)? },
        6 => MembersCommand::Publish {
            id: r.varint()?,
            name: r.string()?,
            client_urls: r.list(Reader::string)?,
            tenant_urls: r.list(|r| Ok((r.string()?, r.string()?)))?,
        },
        _ => return Err(r.corrupt("members command kind, or one of a later release")),
    })
}

fn encode_put(w: &mut Writer, put: &PutRequest) {
    w.u8(u8::from(put.prev_kv) | u8::from(put.ignore_value) << 1 | u8::from(put.ignore_lease) << 2);
    w.i64(put.lease.0);
    w.bytes(&put.key);
    w.bytes(&put.value);
}

fn decode_put(r: &mut Reader) -> Result<PutRequest, Fault> {
    let flags = r.u8()?;
    if flags > 7 {
        return Err(r.corrupt("put flags"));
    }
    Ok(PutRequest {
        prev_kv: flags & 1 != 0,
        ignore_value: flags & 2 != 0,
        ignore_lease: flags & 4 != 0,
        lease: LeaseId(r.i64()?),
        key: r.bytes()?,
        value: r.bytes()?,
    })
}

fn encode_delete(w: &mut Writer, delete: &DeleteRangeRequest) {
    w.u8(u8::from(delete.prev_kv));
    encode_range(w, &delete.range);
}

fn decode_delete(r: &mut Reader) -> Result<DeleteRangeRequest, Fault> {
    Ok(DeleteRangeRequest { prev_kv: r.bool()?, range: decode_range(r)? })
}

fn encode_range(w: &mut Writer, range: &KeyRange) {
    match range {
        KeyRange::Single(key) => {
            w.u8(0);
            w.bytes(key);
        }
        KeyRange::HalfOpen { start, end } => {
            w.u8(1);
            w.bytes(start);
            w.bytes(end);
        }
        KeyRange::From(start) => {
            w.u8(2);
            w.bytes(start);
        }
    }
}

fn decode_range(r: &mut Reader) -> Result<KeyRange, Fault> {
    Ok(match r.u8()? {
        0 => KeyRange::Single(r.bytes()?),
        1 => KeyRange::HalfOpen { start: r.bytes()?, end: r.bytes()? },
        2 => KeyRange::From(r.bytes()?),
        _ => return Err(r.corrupt("key range kind")),
    })
}

fn encode_txn(w: &mut Writer, txn: &TxnRequest) {
    w.varint(txn.compares.len() as u64);
    for compare in &txn.compares {
        encode_compare(w, compare);
    }
    for ops in [&txn.success, &txn.failure] {
        w.varint(ops.len() as u64);
        for op in ops {
            encode_op(w, op);
        }
    }
}

fn decode_txn(r: &mut Reader, depth: usize) -> Result<TxnRequest, Fault> {
    if depth > TXN_DEPTH_MAX {
        return Err(r.corrupt("txn depth"));
    }
    let compares = r.list(decode_compare)?;
    let success = r.list(|r| decode_op(r, depth))?;
    let failure = r.list(|r| decode_op(r, depth))?;
    Ok(TxnRequest { compares, success, failure })
}

fn encode_op(w: &mut Writer, op: &TxnOp) {
    match op {
        TxnOp::Range(range) => {
            w.u8(0);
            encode_range_request(w, range);
        }
        TxnOp::Put(put) => {
            w.u8(1);
            encode_put(w, put);
        }
        TxnOp::DeleteRange(delete) => {
            w.u8(2);
            encode_delete(w, delete);
        }
        TxnOp::Txn(txn) => {
            w.u8(3);
            encode_txn(w, txn);
        }
    }
}

fn decode_op(r: &mut Reader, depth: usize) -> Result<TxnOp, Fault> {
    Ok(match r.u8()? {
        0 => TxnOp::Range(decode_range_request(r)?),
        1 => TxnOp::Put(decode_put(r)?),
        2 => TxnOp::DeleteRange(decode_delete(r)?),
        3 => TxnOp::Txn(decode_txn(r, depth + 1)?),
        _ => return Err(r.corrupt("txn op kind")),
    })
}

fn encode_range_request(w: &mut Writer, range: &RangeRequest) {
    encode_range(w, &range.range);
    w.u8(u8::from(range.keys_only) | u8::from(range.count_only) << 1 | u8::from(range.revision.is_some()) << 2);
    w.i64(range.revision.unwrap_or(0));
    w.varint(range.limit);
    w.u8(match range.order {
        SortOrder::None => 0,
        SortOrder::Ascend => 1,
        SortOrder::Descend => 2,
    });
    w.u8(match range.target {
        SortTarget::Key => 0,
        SortTarget::Version => 1,
        SortTarget::Create => 2,
        SortTarget::Mod => 3,
        SortTarget::Value => 4,
    });
    w.i64(range.min_mod_revision);
    w.i64(range.max_mod_revision);
    w.i64(range.min_create_revision);
    w.i64(range.max_create_revision);
}

fn decode_range_request(r: &mut Reader) -> Result<RangeRequest, Fault> {
    let range = decode_range(r)?;
    let flags = r.u8()?;
    if flags > 7 {
        return Err(r.corrupt("range flags"));
    }
    let revision = r.i64()?;
    Ok(RangeRequest {
        range,
        keys_only: flags & 1 != 0,
        count_only: flags & 2 != 0,
        revision: (flags & 4 != 0).then_some(revision),
        limit: r.varint()?,
        order: match r.u8()? {
            0 => SortOrder::None,
            1 => SortOrder::Ascend,
            2 => SortOrder::Descend,
            _ => return Err(r.corrupt("sort order")),
        },
        target: match r.u8()? {
            0 => SortTarget::Key,
            1 => SortTarget::Version,
            2 => SortTarget::Create,
            3 => SortTarget::Mod,
            4 => SortTarget::Value,
            _ => return Err(r.corrupt("sort target")),
        },
        min_mod_revision: r.i64()?,
        max_mod_revision: r.i64()?,
        min_create_revision: r.i64()?,
        max_create_revision: r.i64()?,
    })
}

fn encode_compare(w: &mut Writer, compare: &Compare) {
    encode_range(w, &compare.range);
    w.u8(match compare.result {
        CompareResult::Equal => 0,
        CompareResult::Greater => 1,
        CompareResult::Less => 2,
        CompareResult::NotEqual => 3,
        CompareResult::Unknown => 4,
    });
    match &compare.target {
        CompareTarget::Version(given) => encode_operand(w, 0, *given),
        CompareTarget::Create(given) => encode_operand(w, 1, *given),
        CompareTarget::Mod(given) => encode_operand(w, 2, *given),
        CompareTarget::Value(given) => {
            w.u8(3);
            w.bytes(given);
        }
        CompareTarget::Lease(given) => encode_operand(w, 4, *given),
        CompareTarget::Unknown => w.u8(5),
    }
}

fn encode_operand(w: &mut Writer, kind: u8, given: i64) {
    w.u8(kind);
    w.i64(given);
}

fn decode_compare(r: &mut Reader) -> Result<Compare, Fault> {
    Ok(Compare {
        range: decode_range(r)?,
        result: match r.u8()? {
            0 => CompareResult::Equal,
            1 => CompareResult::Greater,
            2 => CompareResult::Less,
            3 => CompareResult::NotEqual,
            4 => CompareResult::Unknown,
            _ => return Err(r.corrupt("compare result")),
        },
        target: match r.u8()? {
            0 => CompareTarget::Version(r.i64()?),
            1 => CompareTarget::Create(r.i64()?),
            2 => CompareTarget::Mod(r.i64()?),
            3 => CompareTarget::Value(r.bytes()?),
            4 => CompareTarget::Lease(r.i64()?),
            5 => CompareTarget::Unknown,
            _ => return Err(r.corrupt("compare target")),
        },
    })
}
