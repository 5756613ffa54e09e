//! Values that cross the crate's boundary. Nothing here does anything.

use std::fmt;

use bytes::Bytes;

/// Which virtual etcd a key, lease or watch belongs to. Handed out by [`crate::apply`] when a tenant is created and never
/// reused; above this crate only the code that resolves a connection to its tenant may make one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TenantId(pub u32);

/// A lease as clients name it: any int64 but 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LeaseId(pub i64);

impl LeaseId {
    /// "No lease" as `KeyValue.lease` spells it.
    pub const NONE: LeaseId = LeaseId(0);
}

impl fmt::Display for LeaseId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl fmt::Display for TenantId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "t{}", self.0)
    }
}

/// Where in a tenant's history a change stands: `main` is etcd's revision, `sub` counts the changes inside it from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Revision {
    pub main: i64,
    pub sub: u32,
}

/// Which user keys a request covers. The wire's `range_end` spellings (`""`, `"\0"`) are decoded at the edge; nothing
/// below knows them. Keys are non-empty except where a reader explicitly asks from the start of the key space.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum KeyRange {
    /// Exactly this key.
    Single(Bytes),
    /// `start <= key < end`; empty when `start >= end`.
    HalfOpen { start: Bytes, end: Bytes },
    /// Every key `>= start`.
    From(Bytes),
}

impl KeyRange {
    /// Whether `key` lies in the range.
    pub fn contains(&self, key: &[u8]) -> bool {
        match self {
            KeyRange::Single(only) => only == key,
            KeyRange::HalfOpen { start, end } => start <= key && key < end,
            KeyRange::From(start) => start <= key,
        }
    }

    /// Whether it names one key.
    pub fn is_single(&self) -> bool {
        matches!(self, KeyRange::Single(_))
    }

    /// The same range in memory of its own: the bytes of a request keep all of the request.
    pub(crate) fn detached(&self) -> KeyRange {
        let detached = |bytes: &Bytes| Bytes::copy_from_slice(bytes);
        match self {
            KeyRange::Single(key) => KeyRange::Single(detached(key)),
            KeyRange::HalfOpen { start, end } => KeyRange::HalfOpen { start: detached(start), end: detached(end) },
            KeyRange::From(start) => KeyRange::From(detached(start)),
        }
    }

    /// Whether no key can lie in the range.
    pub fn is_empty(&self) -> bool {
        matches!(self, KeyRange::HalfOpen { start, end } if start >= end)
    }

    /// The smallest key that can lie in the range.
    pub fn start(&self) -> &Bytes {
        match self {
            KeyRange::Single(start) | KeyRange::HalfOpen { start, .. } | KeyRange::From(start) => start,
        }
    }
}

/// Order of a range's results.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum SortOrder {
    #[default]
    None,
    Ascend,
    Descend,
}

/// What a range is sorted by. Ties stay in key order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum SortTarget {
    #[default]
    Key,
    Version,
    Create,
    Mod,
    Value,
}

/// One range read (contract 1.1 "Range"). Bounds of 0 are unset.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RangeRequest {
    pub range: KeyRange,
    /// `None` reads the newest state. Inside a txn `Some(r)` must satisfy compacted <= r <= the revision before the txn.
    pub revision: Option<i64>,
    /// Most keys returned; 0 = no limit.
    pub limit: u64,
    pub order: SortOrder,
    pub target: SortTarget,
    pub keys_only: bool,
    pub count_only: bool,
    pub min_mod_revision: i64,
    pub max_mod_revision: i64,
    pub min_create_revision: i64,
    pub max_create_revision: i64,
}

impl RangeRequest {
    /// A plain read of `range` in its newest state.
    pub fn new(range: KeyRange) -> Self {
        RangeRequest {
            range,
            revision: None,
            limit: 0,
            order: SortOrder::None,
            target: SortTarget::Key,
            keys_only: false,
            count_only: false,
            min_mod_revision: 0,
            max_mod_revision: 0,
            min_create_revision: 0,
            max_create_revision: 0,
        }
    }

    /// Whether any revision bound is set.
    pub fn has_revision_filter(&self) -> bool {
        [self.min_mod_revision, self.max_mod_revision, self.min_create_revision, self.max_create_revision]
            .iter()
            .any(|bound| *bound != 0)
    }
}

/// What a range found. Every element of `kvs` is one KeyValue in stored (= wire) form, see [`crate::key_value`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RangeReply {
    pub kvs: Vec<Bytes>,
    /// Whether the limit cut something off.
    pub more: bool,
    /// Keys existing in the range at the read revision, whatever limit and filters say.
    pub count: u64,
}

/// One put (contract 1.1 "Put").
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PutRequest {
    pub key: Bytes,
    pub value: Bytes,
    pub lease: LeaseId,
    pub prev_kv: bool,
    pub ignore_value: bool,
    pub ignore_lease: bool,
}

/// One range delete.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeleteRangeRequest {
    pub range: KeyRange,
    pub prev_kv: bool,
}

/// How a compare relates the stored value to the given one: stored OP given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CompareResult {
    Equal,
    Greater,
    Less,
    NotEqual,
    /// A number no release defines: etcd lets such a compare pass (except on the value of a missing key).
    Unknown,
}

/// What a compare looks at, with the given operand.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CompareTarget {
    Version(i64),
    Create(i64),
    Mod(i64),
    Value(Bytes),
    Lease(i64),
    /// A target no release defines compares as equal.
    Unknown,
}

/// One condition of a txn.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Compare {
    pub range: KeyRange,
    pub result: CompareResult,
    pub target: CompareTarget,
}

/// One operation of a txn.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TxnOp {
    Range(RangeRequest),
    Put(PutRequest),
    DeleteRange(DeleteRangeRequest),
    Txn(TxnRequest),
}

/// A conjunction of compares and the two lists of which one runs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TxnRequest {
    pub compares: Vec<Compare>,
    pub success: Vec<TxnOp>,
    pub failure: Vec<TxnOp>,
}

/// Answer to one txn operation. `revision` is what that operation's own header shows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TxnOpReply {
    Range { revision: i64, reply: RangeReply },
    Put { revision: i64, prev_kv: Option<Bytes> },
    DeleteRange { revision: i64, deleted: u64, prev_kvs: Vec<Bytes> },
    Txn(TxnReply),
}

/// Answer to a txn.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TxnReply {
    pub succeeded: bool,
    pub responses: Vec<TxnOpReply>,
}

/// Alarms a tenant can have. The numbers are persisted and are etcd's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct AlarmKind(pub i32);

impl AlarmKind {
    pub const NONE: AlarmKind = AlarmKind(0);
    pub const NOSPACE: AlarmKind = AlarmKind(1);
    pub const CORRUPT: AlarmKind = AlarmKind(2);
}

/// One active alarm.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Alarm {
    pub member_id: u64,
    pub kind: AlarmKind,
}

/// A tenant's counters, equal on all members at equal applied index.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Keys that exist now.
    pub live_keys: u64,
    /// Bytes of the newest version of those keys, with the overhead of their rows.
    pub live_bytes: u64,
    /// Bytes of every version and tombstone kept, the live ones included.
    pub total_bytes: u64,
    /// Versions and tombstones kept.
    pub versions: u64,
    /// Leases granted and not yet revoked.
    pub leases: u64,
}

/// A member of the cell's group, as it is known to all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Member {
    pub id: u64,
    /// Empty until the member has started.
    pub name: String,
    /// Where other members reach it.
    pub peer_urls: Vec<String>,
    /// Where clients reach it whose tenant their certificate names, and those of the default tenant.
    pub client_urls: Vec<String>,
    /// The listeners of tenants' own: tenant and URL.
    pub tenant_urls: Vec<(String, String)>,
    pub is_learner: bool,
}

/// Who is in the cell, and who was.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Membership {
    /// By growing id.
    pub members: Vec<Member>,
    /// Ids of members that were removed, growing. They never come back.
    pub removed: Vec<u64>,
}

impl Membership {
    pub fn member(&self, id: u64) -> Option<&Member> {
        let place = self.members.binary_search_by_key(&id, |member| member.id).ok()?;
        self.members.get(place)
    }
}
