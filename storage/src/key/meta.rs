//! Family meta: one row per tenant with everything that is counted or named, and one row for the cell.

use bytes::Bytes;

use super::{Bounds, CELL, PREFIX_LEN, prefix};
use crate::codec::{Reader, Writer};
use crate::error::Fault;
use crate::profile::TenantLimits;
use crate::rules::Rules;
use crate::types::{Alarm, AlarmKind, Member, Revision, TenantId, Usage};

const TAG_TENANT: u8 = 1;
const TAG_CELL: u8 = 2;
const TAG_MEMBER: u8 = 3;
const TAG_REMOVED: u8 = 4;
const TAG_PROFILE: u8 = 5;
const TAG_DELETED: u8 = 6;
const TAG_FORMER: u8 = 7;
const TAG_DEFAULTS: u8 = 8;
const ROW_VERSION: u8 = 1;

/// A tenant's row: the registry entry and all its counters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TenantRow {
    pub(crate) name: String,
    /// etcd's current revision; an empty store is at 1.
    pub(crate) revision: i64,
    /// Reads below it are refused; -1 before the first compaction.
    pub(crate) compact_revision: i64,
    /// The compact revision up to which space has been given back; never above `compact_revision`.
    pub(crate) reclaimed_revision: i64,
    /// Where the next reclaim step starts.
    pub(crate) reclaim_cursor: Revision,
    pub(crate) usage: Usage,
    /// Sorted, without duplicates.
    pub(crate) alarms: Vec<Alarm>,
}

impl TenantRow {
    pub(crate) fn new(name: String) -> Self {
        TenantRow {
            name,
            revision: 1,
            compact_revision: -1,
            reclaimed_revision: -1,
            reclaim_cursor: Revision { main: 0, sub: 0 },
            usage: Usage::default(),
            alarms: Vec::new(),
        }
    }

    /// What must hold of every row, asserted before it is written and after it was read.
    pub(crate) fn is_sound(&self) -> bool {
        self.revision >= 1
            && -1 <= self.reclaimed_revision
            && self.reclaimed_revision <= self.compact_revision
            && self.compact_revision <= self.revision
            && self.usage.live_keys <= self.usage.versions
            && self.usage.live_bytes <= self.usage.total_bytes
            && self.alarms.is_sorted()
    }

    pub(crate) fn encode(&self) -> Bytes {
        assert!(self.is_sound(), "tenant row before writing: {self:?}");
        let mut w = Writer::with_capacity(64);
        w.u8(ROW_VERSION);
        w.bytes(self.name.as_bytes());
        w.i64(self.revision);
        w.i64(self.compact_revision);
        w.i64(self.reclaimed_revision);
        w.i64(self.reclaim_cursor.main);
        w.varint(u64::from(self.reclaim_cursor.sub));
        for counter in [
            self.usage.live_keys,
            self.usage.live_bytes,
            self.usage.total_bytes,
            self.usage.versions,
            self.usage.leases,
        ] {
            w.varint(counter);
        }
        w.varint(self.alarms.len() as u64);
        for alarm in &self.alarms {
            w.varint(alarm.member_id);
            w.i64(i64::from(alarm.kind.0));
        }
        w.finish()
    }

    pub(crate) fn decode(stored: Bytes) -> Result<TenantRow, Fault> {
        let mut r = Reader::new(stored, "tenant row");
        if r.u8()? != ROW_VERSION {
            return Err(r.corrupt("tenant row version"));
        }
        let row = TenantRow {
            name: r.string()?,
            revision: r.i64()?,
            compact_revision: r.i64()?,
            reclaimed_revision: r.i64()?,
            reclaim_cursor: Revision { main: r.i64()?, sub: r.varint_u32()? },
            usage: Usage {
                live_keys: r.varint()?,
                live_bytes: r.varint()?,
                total_bytes: r.varint()?,
                versions: r.varint()?,
                leases: r.varint()?,
            },
            alarms: r.list(|r| {
                let member_id = r.varint()?;
                let kind = r.i64()?.try_into().map_err(|_| r.corrupt("alarm kind"))?;
                Ok(Alarm { member_id, kind: AlarmKind(kind) })
            })?,
        };
        r.end()?;
        if row.is_sound() { Ok(row) } else { Err(r.corrupt("tenant row")) }
    }
}

pub(crate) fn tenant_key(tenant: TenantId) -> Vec<u8> {
    prefix(tenant, TAG_TENANT, 0)
}

/// All rows of the family; the caller keeps those for which [`decode_tenant_key`] answers.
pub(crate) fn all_bounds() -> Bounds {
    Bounds { lower: Vec::new(), upper: vec![0xff; PREFIX_LEN + 1] }
}

pub(crate) fn decode_tenant_key(key: &[u8]) -> Option<TenantId> {
    match key.split_at_checked(4)? {
        (tenant, [TAG_TENANT]) => Some(TenantId(u32::from_be_bytes(tenant.try_into().ok()?))),
        _ => None,
    }
}

/// The row of a tenant's [`Profile`](crate::profile::Profile), if there is something to say.
pub(crate) fn profile_key(tenant: TenantId) -> Vec<u8> {
    prefix(tenant, TAG_PROFILE, 0)
}

pub(crate) fn decode_profile_key(key: &[u8]) -> Option<TenantId> {
    match key.split_at_checked(4)? {
        (tenant, [TAG_PROFILE]) => Some(TenantId(u32::from_be_bytes(tenant.try_into().ok()?))),
        _ => None,
    }
}

/// The row that says that a tenant was deleted and its space is being given back; its value is the name it had.
pub(crate) fn deleted_key(tenant: TenantId) -> Vec<u8> {
    with_id(TAG_DELETED, u64::from(tenant.0))
}

/// The row that says that a tenant of this name was deleted once; its value is empty.
pub(crate) fn former_key(name: &str) -> Vec<u8> {
    let mut key = prefix(CELL, TAG_FORMER, name.len());
    key.extend_from_slice(name.as_bytes());
    key
}

/// The limits of tenants of which nothing else is said. No row: none was set.
pub(crate) fn defaults_key() -> Vec<u8> {
    prefix(CELL, TAG_DEFAULTS, 0)
}

pub(crate) fn encode_defaults(limits: &TenantLimits) -> Bytes {
    let mut w = Writer::with_capacity(32);
    w.u8(ROW_VERSION);
    limits.encode(&mut w);
    w.finish()
}

pub(crate) fn decode_defaults(stored: Bytes) -> Result<TenantLimits, Fault> {
    let mut r = Reader::new(stored, "default limits");
    if r.u8()? != ROW_VERSION {
        return Err(r.corrupt("default limits version"));
    }
    let limits = TenantLimits::decode(&mut r)?;
    r.end()?;
    Ok(limits)
}

/// The row of a member of the cell.
pub(crate) fn member_key(id: u64) -> Vec<u8> {
    with_id(TAG_MEMBER, id)
}

/// The row that says that a member was removed; its value is empty.
pub(crate) fn removed_key(id: u64) -> Vec<u8> {
    with_id(TAG_REMOVED, id)
}

fn with_id(tag: u8, id: u64) -> Vec<u8> {
    let mut key = prefix(CELL, tag, 8);
    key.extend_from_slice(&id.to_be_bytes());
    key
}

/// What a row of the cell is about.
pub(crate) enum CellKey {
    Member(u64),
    Removed(u64),
    Deleted(TenantId),
}

/// `None` for every other row.
pub(crate) fn decode_cell_key(key: &[u8]) -> Option<CellKey> {
    let (tenant, rest) = key.split_at_checked(4)?;
    let (tag, id) = rest.split_first()?;
    let id = u64::from_be_bytes(id.try_into().ok()?);
    match (tenant == CELL.0.to_be_bytes(), *tag) {
        (true, TAG_MEMBER) => Some(CellKey::Member(id)),
        (true, TAG_REMOVED) => Some(CellKey::Removed(id)),
        (true, TAG_DELETED) => Some(CellKey::Deleted(TenantId(u32::try_from(id).ok()?))),
        (true | false, _) => None,
    }
}

pub(crate) fn encode_member(member: &Member) -> Bytes {
    let mut w = Writer::with_capacity(128);
    w.u8(ROW_VERSION);
    w.bytes(member.name.as_bytes());
    w.strings(&member.peer_urls);
    w.strings(&member.client_urls);
    w.varint(member.tenant_urls.len() as u64);
    for (tenant, url) in &member.tenant_urls {
        w.bytes(tenant.as_bytes());
        w.bytes(url.as_bytes());
    }
    w.u8(u8::from(member.is_learner));
    w.finish()
}

pub(crate) fn decode_member(id: u64, stored: Bytes) -> Result<Member, Fault> {
    let mut r = Reader::new(stored, "member row");
    if r.u8()? != ROW_VERSION {
        return Err(r.corrupt("member row version"));
    }
    let member = Member {
        id,
        name: r.string()?,
        peer_urls: r.list(Reader::string)?,
        client_urls: r.list(Reader::string)?,
        tenant_urls: r.list(|r| Ok((r.string()?, r.string()?)))?,
        is_learner: r.bool()?,
    };
    r.end()?;
    Ok(member)
}

/// The cell's own row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CellRow {
    /// Every command up to this raft index is in the state, none behind it.
    pub(crate) applied_index: u64,
    pub(crate) next_tenant: u32,
    /// Bytes a tenant may hold; negative = no quota.
    pub(crate) quota_bytes: i64,
    /// By which the next command is decided.
    pub(crate) rules: Rules,
}

/// Of the cell's row: without rules, which are the first then, and with them. As long as the first are in force a release that knows no
/// others can read what is written.
const CELL_VERSIONS: [u8; 2] = [1, 2];

pub(crate) fn cell_key() -> Vec<u8> {
    prefix(CELL, TAG_CELL, 0)
}

impl CellRow {
    pub(crate) fn encode(&self) -> Bytes {
        let has_rules = self.rules != Rules::FIRST;
        let mut w = Writer::with_capacity(28);
        w.u8(CELL_VERSIONS[usize::from(has_rules)]);
        w.varint(self.applied_index);
        w.varint(u64::from(self.next_tenant));
        w.i64(self.quota_bytes);
        if has_rules {
            w.varint(u64::from(self.rules.number()));
        }
        w.finish()
    }

    /// # Errors
    /// [`Fault::Rules`] of a state that this release may not go on with.
    pub(crate) fn decode(stored: Bytes) -> Result<CellRow, Fault> {
        let mut r = Reader::new(stored, "cell row");
        let version = r.u8()?;
        if !CELL_VERSIONS.contains(&version) {
            return Err(r.corrupt("cell row version"));
        }
        let (applied_index, next_tenant, quota_bytes) = (r.varint()?, r.varint_u32()?, r.i64()?);
        let number = if version == CELL_VERSIONS[1] { r.varint_u32()? } else { Rules::FIRST.number() };
        let rules = Rules::of_number(number).ok_or(Fault::Rules { number })?;
        r.end()?;
        Ok(CellRow { applied_index, next_tenant, quota_bytes, rules })
    }
}
