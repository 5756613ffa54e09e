//! The read side: what any thread may ask while `apply` goes on.
//!
//! Every call takes one point-in-time view of the engine and finds the tenant's revision and compact revision in that same
//! view, so an answer never mixes two states. What `apply` has published in memory ([`TenantReader::state`]) is a hint for
//! headers, quotas and metrics, at most one batch behind the engine.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU32, Ordering};

use arc_swap::ArcSwap;
use bytes::Bytes;
use parking_lot::{Mutex, RwLock};

use crate::apply::quota_bytes;
use crate::counts::Counts;
use crate::engine::{Cursor, Engine, Family, Reader};
use crate::error::{Fault, ReadError, Refusal};
use crate::key::head::Head;
use crate::key::lease::Grant;
use crate::key::meta::{CellRow, TenantRow};
use crate::key::{self, head, lease, meta, version};
use crate::limits::{EMPTY_TENANT_BYTES, WATCHERS_PER_TENANT_MAX};
use crate::mvcc::read::{Count, Found, Sink};
use crate::mvcc::{hash, read, txn, write};
use crate::profile::{Limit, Profile, TenantLimits};
use crate::rules::Rules;
use crate::types::{Alarm, KeyRange, LeaseId, Membership, RangeRequest, TenantId, TxnReply, TxnRequest, Usage};
use crate::watch::{Hub, WatchStream};

/// One tenant as all threads see it.
pub(crate) struct Tenant {
    pub(crate) id: TenantId,
    pub(crate) name: String,
    pub(crate) hub: Hub,
    published: Mutex<TenantState>,
    profile: ArcSwap<Profile>,
    /// Of `published`, for those who want no more.
    revision: AtomicI64,
    /// Set before its rows go.
    is_deleted: AtomicBool,
    /// The newest revision that a view has shown to somebody: it may not be published yet.
    shown: AtomicI64,
}

/// A tenant's counters after the last published batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TenantState {
    pub revision: i64,
    /// -1 = never compacted.
    pub compact_revision: i64,
    /// Up to which compact revision space has been given back.
    pub reclaimed_revision: i64,
    pub usage: Usage,
    /// Sorted by member, then kind.
    pub alarms: Vec<Alarm>,
}

impl TenantState {
    fn of(row: &TenantRow) -> Self {
        TenantState {
            revision: row.revision,
            compact_revision: row.compact_revision,
            reclaimed_revision: row.reclaimed_revision,
            usage: row.usage,
            alarms: row.alarms.clone(),
        }
    }

    /// What counts against the quota, in bytes: every version kept, with its overhead.
    pub fn db_size_bytes(&self) -> u64 {
        db_size_bytes(&self.usage)
    }

    /// Of these, what the newest versions of existing keys take.
    pub fn db_in_use_bytes(&self) -> u64 {
        EMPTY_TENANT_BYTES + self.usage.live_bytes
    }
}

pub(crate) fn db_size_bytes(usage: &Usage) -> u64 {
    EMPTY_TENANT_BYTES + usage.total_bytes
}

impl Tenant {
    pub(crate) fn new(id: TenantId, row: &TenantRow, profile: Arc<Profile>) -> Self {
        Tenant {
            id,
            name: row.name.clone(),
            hub: Hub::new(row.revision),
            published: Mutex::new(TenantState::of(row)),
            profile: ArcSwap::new(profile),
            revision: AtomicI64::new(row.revision),
            is_deleted: AtomicBool::new(false),
            shown: AtomicI64::new(0),
        }
    }

    pub(crate) fn show_profile(&self, profile: &Arc<Profile>) {
        self.profile.store(Arc::clone(profile));
    }

    /// Watchers that it may have, over all its streams.
    pub(crate) fn watchers_max(&self) -> usize {
        match self.profile.load().limit(Limit::Watchers) {
            None | Some(0) => WATCHERS_PER_TENANT_MAX,
            Some(own) => usize::try_from(own).map_or(WATCHERS_PER_TENANT_MAX, |own| own.min(WATCHERS_PER_TENANT_MAX)),
        }
    }

    /// Its rows are about to go. Who waits for its events looks for itself whether there will be any more.
    pub(crate) fn end(&self) {
        self.is_deleted.store(true, Ordering::Release);
        self.hub.wake_streams();
    }

    pub(crate) fn publish(&self, row: &TenantRow) {
        *self.published.lock() = TenantState::of(row);
        self.revision.store(row.revision, Ordering::Release);
    }
}

/// What all threads share.
pub(crate) struct Shared {
    tenants: RwLock<Tenants>,
    pub(crate) quota_bytes: AtomicI64,
    /// The number of the rules in force.
    pub(crate) rules: AtomicU32,
    pub(crate) membership: RwLock<Arc<Membership>>,
    pub(crate) defaults: RwLock<Arc<TenantLimits>>,
    pub(crate) counts: Counts,
    /// Tenants whose space has not been given back yet, with the names they had.
    pub(crate) deleted: RwLock<BTreeMap<TenantId, String>>,
    /// Whether the whole state is being replaced: tenants may be gone that are known here.
    is_replacing: AtomicBool,
}

/// While it lives, tenants may be missing.
pub(crate) struct Replacing<'a>(&'a AtomicBool);

impl Drop for Replacing<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

#[derive(Default)]
struct Tenants {
    by_id: BTreeMap<TenantId, Arc<Tenant>>,
    by_name: HashMap<String, TenantId>,
}

impl Shared {
    pub(crate) fn new(cell: &CellRow) -> Self {
        Shared {
            tenants: RwLock::default(),
            quota_bytes: AtomicI64::new(cell.quota_bytes),
            rules: AtomicU32::new(cell.rules.number()),
            membership: RwLock::default(),
            defaults: RwLock::default(),
            counts: Counts::default(),
            deleted: RwLock::default(),
            is_replacing: AtomicBool::new(false),
        }
    }

    pub(crate) fn show_cell(&self, cell: &CellRow) {
        self.quota_bytes.store(cell.quota_bytes, Ordering::Relaxed);
        let rules = cell.rules.number();
        if self.rules.swap(rules, Ordering::AcqRel) != rules {
            tracing::info!(rules, "the cell decides by newer rules");
        }
    }

    pub(crate) fn replacing(&self) -> Replacing<'_> {
        self.is_replacing.store(true, Ordering::Release);
        Replacing(&self.is_replacing)
    }

    /// Drops the tenants that `kept` does not want. Who reads them gets [`Refusal::TenantNotFound`].
    pub(crate) fn retain(&self, kept: impl Fn(TenantId) -> bool) {
        let mut tenants = self.tenants.write();
        tenants.by_id.retain(|id, tenant| {
            kept(*id) || {
                tenant.end();
                false
            }
        });
        let Tenants { by_id, by_name } = &mut *tenants;
        by_name.retain(|_, id| by_id.contains_key(id));
    }

    pub(crate) fn remove(&self, id: TenantId) {
        let mut tenants = self.tenants.write();
        if let Some(tenant) = tenants.by_id.remove(&id)
            && tenants.by_name.get(&tenant.name) == Some(&id)
        {
            tenants.by_name.remove(&tenant.name);
        }
    }

    pub(crate) fn add(&self, tenant: Tenant) {
        let mut tenants = self.tenants.write();
        tenants.by_name.insert(tenant.name.clone(), tenant.id);
        tenants.by_id.insert(tenant.id, Arc::new(tenant));
    }

    pub(crate) fn tenant(&self, id: TenantId) -> Option<Arc<Tenant>> {
        self.tenants.read().by_id.get(&id).cloned()
    }
}

/// The state of all tenants, for reading. Cheap to clone.
pub struct Store<E> {
    pub(crate) engine: Arc<E>,
    pub(crate) shared: Arc<Shared>,
}

impl<E> Clone for Store<E> {
    fn clone(&self) -> Self {
        Store { engine: Arc::clone(&self.engine), shared: Arc::clone(&self.shared) }
    }
}

impl<E: Engine> Store<E> {
    /// The tenant of that name, if it exists.
    pub fn tenant_id(&self, name: &str) -> Option<TenantId> {
        self.shared.tenants.read().by_name.get(name).copied()
    }

    /// All tenants, in the order they were created.
    pub fn tenants(&self) -> Vec<(TenantId, String)> {
        self.shared.tenants.read().by_id.values().map(|tenant| (tenant.id, tenant.name.clone())).collect()
    }

    /// The rules that the cell decides by, after the last published batch.
    pub fn rules(&self) -> Rules {
        let number = self.shared.rules.load(Ordering::Acquire);
        Rules::of_number(number).expect("only rules that are known get here")
    }

    /// Counters of all tenants after the last published batch, in the order they were made. In memory.
    pub fn states(&self) -> Vec<(TenantId, TenantState)> {
        self.shared.tenants.read().by_id.values().map(|tenant| (tenant.id, tenant.published.lock().clone())).collect()
    }

    /// Whether a tenant was deleted and its space is still being given back.
    pub fn is_deleted(&self, tenant: TenantId) -> bool {
        self.shared.deleted.read().contains_key(&tenant)
    }

    /// Tenants that were deleted and whose space is still being given back, with the names they had.
    pub fn deleted_tenants(&self) -> BTreeMap<TenantId, String> {
        self.shared.deleted.read().clone()
    }

    /// Gives back the space of a deleted tenant on this member's disk. Long; blocks no reader or writer. Not for an async
    /// thread.
    ///
    /// # Errors
    /// Any [`Fault`] ends this member; [`Fault::Corrupt`]: there is such a tenant.
    pub fn compact_tenant(&self, tenant: TenantId) -> Result<(), Fault> {
        if tenant_row(&self.engine.view(), tenant)?.is_some() {
            return Err(Fault::Corrupt { what: "the row of a deleted tenant", key: tenant.0.to_be_bytes().to_vec() });
        }
        let bounds = key::tenant_bounds(tenant);
        self.engine.give_back(&bounds.lower, &bounds.upper)
    }

    /// The read side of one tenant; `None` if there is no such tenant.
    pub fn reader(&self, tenant: TenantId) -> Option<TenantReader<E>> {
        Some(TenantReader { store: self.clone(), tenant: self.shared.tenant(tenant)? })
    }

    /// Hands events that wait to at most so many watchers of a tenant. Answers whether more waits. Never blocks for long.
    pub fn deliver(&self, tenant: TenantId, watchers_max: usize) -> bool {
        self.shared.tenant(tenant).is_some_and(|known| known.hub.deliver(watchers_max))
    }

    /// A mistake made on purpose, which a simulation's checks must find: watchers that have everything are not sent the tenant's next
    /// revision.
    #[doc(hidden)]
    pub fn lose_next_revision(&self, tenant: TenantId) {
        if let Some(known) = self.shared.tenant(tenant) {
            known.hub.lose_next_revision();
        }
    }

    /// Bytes a tenant may hold of which nothing else is said; negative = no quota.
    pub fn quota_bytes(&self) -> i64 {
        self.shared.quota_bytes.load(Ordering::Relaxed)
    }

    /// The limits of tenants of which nothing else is said, after the last published batch. In memory.
    pub fn defaults(&self) -> Arc<TenantLimits> {
        Arc::clone(&self.shared.defaults.read())
    }

    /// The members of the cell, after the last published batch.
    pub fn membership(&self) -> Arc<Membership> {
        Arc::clone(&self.shared.membership.read())
    }

    /// Rewrites the files without what was deleted. Long; blocks no reader or writer. Not for an async thread.
    ///
    /// # Errors
    /// Any [`Fault`] ends this member.
    pub fn compact_engine(&self) -> Result<(), Fault> {
        self.engine.compact()
    }

    /// Ends what [`Store::compact_engine`] and [`Store::compact_tenant`] are doing, half done. For a state that is flushed and not written to
    /// any more.
    pub fn stop_compacting(&self) {
        self.engine.stop_compacting();
    }

    /// Bytes of the state's files on disk, all tenants together.
    pub fn engine_bytes(&self) -> u64 {
        self.engine.disk_bytes()
    }
}

/// What a range read says beside its keys.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RangeSummary {
    /// The tenant's revision at the moment of the read: what the header shows, also of a read in the past.
    pub revision: i64,
    /// The revision that was read: pin further pages to it.
    pub read_revision: i64,
    /// Keys in the range, whatever limit and filters say.
    pub count: u64,
    pub more: bool,
    /// Where a range in key order goes on when the limit cut it: directly behind the last key.
    pub rest: Option<KeyRange>,
}

/// Answer of [`TenantReader::hash_kv`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HashKv {
    pub hash: u32,
    pub compact_revision: i64,
    pub hash_revision: i64,
    /// The tenant's revision, for the header.
    pub revision: i64,
}

/// One tenant's read side. Every method may touch the disk, unless it says otherwise.
pub struct TenantReader<E> {
    store: Store<E>,
    tenant: Arc<Tenant>,
}

impl<E> Clone for TenantReader<E> {
    fn clone(&self) -> Self {
        TenantReader { store: self.store.clone(), tenant: Arc::clone(&self.tenant) }
    }
}

impl<E: Engine> TenantReader<E> {
    pub fn id(&self) -> TenantId {
        self.tenant.id
    }

    pub fn name(&self) -> &str {
        &self.tenant.name
    }

    /// What is said of the tenant, after the last published batch. In memory.
    pub fn profile(&self) -> Arc<Profile> {
        self.tenant.profile.load_full()
    }

    /// A limit that is said of the tenant, or of the cell. In memory, and cheaper than [`TenantReader::profile`].
    pub fn limit(&self, limit: Limit) -> Option<u64> {
        self.tenant.profile.load().limit(limit)
    }

    /// Whether the tenant has been deleted: its reads answer [`Refusal::TenantNotFound`]. In memory.
    pub fn is_deleted(&self) -> bool {
        self.tenant.is_deleted.load(Ordering::Acquire)
    }

    /// Bytes it may hold before writes are refused; negative = no quota. In memory.
    pub fn quota_bytes(&self) -> i64 {
        quota_bytes(self.limit(Limit::StoredBytes), self.store.quota_bytes())
    }

    /// The tenant's row in this view.
    fn row(&self, view: &E::View<'_>) -> Result<TenantRow, ReadError> {
        if let Some(row) = tenant_row(view, self.tenant.id)? {
            self.tenant.shown.fetch_max(row.revision, Ordering::AcqRel);
            return Ok(row);
        }
        // In this order: a replacement that is over has marked those that it deleted.
        let is_replacing = self.store.shared.is_replacing.load(Ordering::Acquire);
        if is_replacing || self.is_deleted() {
            return Err(Refusal::TenantNotFound.into());
        }
        Err(missing_row(self.tenant.id).into())
    }

    /// Counters after the last published batch. In memory.
    pub fn state(&self) -> TenantState {
        self.tenant.published.lock().clone()
    }

    /// The revision after the last published batch. In memory; cheaper than [`TenantReader::state`].
    pub fn revision(&self) -> i64 {
        self.tenant.revision.load(Ordering::Acquire)
    }

    /// Bytes counted against the quota after the last published batch. In memory.
    pub fn db_size_bytes(&self) -> u64 {
        self.tenant.published.lock().db_size_bytes()
    }

    /// Open watch streams and watchers. In memory.
    pub fn watch_counts(&self) -> (usize, usize) {
        self.tenant.hub.counts()
    }

    /// Reads a range, handing every key's stored bytes to `sink` in result order (stripped, if `keys_only`).
    ///
    /// # Errors
    /// [`Refusal::FutureRevision`] and [`Refusal::Compacted`] before anything was handed out.
    pub fn range(&self, request: &RangeRequest, sink: &mut dyn Sink) -> Result<RangeSummary, ReadError> {
        self.range_with(request, true, sink)
    }

    /// As [`TenantReader::range`] for callers who do not need `count`; it then is the number of keys handed out.
    ///
    /// # Errors
    /// As [`TenantReader::range`].
    pub fn range_uncounted(&self, request: &RangeRequest, sink: &mut dyn Sink) -> Result<RangeSummary, ReadError> {
        self.range_with(request, false, sink)
    }

    /// One key as it is now, which is what is asked for most, by two look-ups without a view, with the revision that this is at. `None`: it
    /// takes a view to tell.
    ///
    /// Why it is right: the published revision is read first, so all that it covers is in the engine. The newest version of the key is read after
    /// that; if it is not above the revision, the key has not changed between, and it is the newest at the revision too. A version never
    /// changes while it is there. Where there is none, where it is newer, or gone when it is looked for, a view decides; and where a view has
    /// shown a revision that is not published yet, so that nobody is told of an earlier one afterwards.
    fn newest_of(&self, request: &RangeRequest) -> Result<Option<(i64, Bytes)>, Fault> {
        let KeyRange::Single(key) = &request.range else { return Ok(None) };
        if request.revision.is_some() || request.count_only || request.has_revision_filter() {
            return Ok(None);
        }
        let (engine, tenant) = (&self.store.engine, self.tenant.id);
        let revision = self.revision();
        let Some(head) = engine.latest(Family::Head, &head::encode_key(tenant, key))? else { return Ok(None) };
        let head = Head::decode(head)?;
        let is_newer = head.at.main > revision || self.tenant.shown.load(Ordering::Acquire) > revision;
        if head.tombstone || is_newer {
            return Ok(None);
        }
        let stored = engine.latest(Family::Kv, &version::encode(tenant, key, head.at, false))?;
        Ok(stored.map(|stored| (revision, stored)))
    }

    fn range_with(
        &self,
        request: &RangeRequest,
        count_wanted: bool,
        sink: &mut dyn Sink,
    ) -> Result<RangeSummary, ReadError> {
        if let Some((revision, stored)) = self.newest_of(request)? {
            read::deliver(request, &stored, sink)?;
            return Ok(RangeSummary { revision, read_revision: revision, count: 1, more: false, rest: None });
        }
        let (counts, tenant) = (&self.store.shared.counts, self.tenant.id);
        // Only then there may be keys that are counted and not handed out.
        let count_wanted = count_wanted && (request.limit > 0 || request.count_only);
        // If it is not settled below it is taken back.
        let armed = (count_wanted && request.revision.is_none()).then(|| counts.arm(tenant, &request.range)).flatten();
        let view = self.store.engine.view();
        let row = self.row(&view)?;
        let at = request.revision.unwrap_or(row.revision);
        check_readable(at, &row)?;
        let count = match count_wanted {
            false => Count::Unwanted,
            true => counts.get(tenant, at, &request.range).map_or(Count::Exact, Count::Known),
        };
        let found = read::range(&view, tenant, at, request, count, sink)?;
        let was_counted = count == Count::Exact && (found.more || request.count_only) && !request.range.is_single();
        if was_counted && at == row.revision {
            counts.settle(armed, tenant, at, &request.range, found.count);
        }
        // kube-apiserver pages with a limit and wants the exact count of the rest on every page: counting once per chain of
        // pages, instead of once per page, keeps paging linear.
        if count_wanted && let Some(rest) = &found.rest {
            counts.remember_page(tenant, at, rest, found.count - request.limit);
        }
        let Found { count, more, rest } = found;
        Ok(RangeSummary { revision: row.revision, read_revision: at, count, more, rest })
    }

    /// Runs a txn that [`is_read_only`](crate::is_read_only) at one point in time. Answers the revision for the header.
    ///
    /// # Errors
    /// As [`TenantReader::range`], for the ranges of the branch that runs.
    ///
    /// # Panics
    /// If the txn holds anything but ranges.
    pub fn txn_read_only(&self, request: &TxnRequest) -> Result<(i64, TxnReply), ReadError> {
        let view = self.store.engine.view();
        let row = self.row(&view)?;
        let reply = txn::read_only(&view, self.tenant.id, request, row.revision, row.compact_revision)??;
        Ok((row.revision, reply))
    }

    /// Hashes history up to `revision` (0 = now; negative = nothing) so that members can be compared. Reads everything.
    ///
    /// # Errors
    /// [`Refusal::FutureRevision`], [`Refusal::Compacted`].
    pub fn hash_kv(&self, revision: i64) -> Result<HashKv, ReadError> {
        let view = self.store.engine.view();
        let row = self.row(&view)?;
        let hash_revision = if revision == 0 { row.revision } else { revision };
        if hash_revision > row.revision {
            return Err(Refusal::FutureRevision.into());
        }
        if revision > 0 && revision < row.compact_revision {
            return Err(Refusal::Compacted { compact_revision: row.compact_revision }.into());
        }
        let hash = hash::hash(&view, self.tenant.id, hash_revision, row.compact_revision)?;
        Ok(HashKv { hash, compact_revision: row.compact_revision, hash_revision, revision: row.revision })
    }

    /// All leases with their granted TTL in seconds.
    ///
    /// # Errors
    /// Any [`Fault`] ends this member.
    pub fn leases(&self) -> Result<Vec<(LeaseId, i64)>, Fault> {
        let view = self.store.engine.view();
        let bounds = lease::grant_bounds(self.tenant.id);
        let mut cursor = view.cursor(Family::Lease, &bounds.lower, &bounds.upper)?;
        let mut leases = Vec::new();
        while let Some((key, value)) = cursor.entry() {
            leases.push((lease::decode_grant_key(key)?, Grant::decode(Bytes::copy_from_slice(value))?.ttl_seconds));
            cursor.advance()?;
        }
        Ok(leases)
    }

    /// The granted TTL of a lease in seconds; `None` if it does not exist.
    ///
    /// # Errors
    /// As [`TenantReader::leases`].
    pub fn lease(&self, id: LeaseId) -> Result<Option<i64>, Fault> {
        let stored = self.store.engine.view().get(Family::Lease, &lease::grant_key(self.tenant.id, id))?;
        Ok(stored.map(Grant::decode).transpose()?.map(|grant| grant.ttl_seconds))
    }

    /// The keys attached to a lease, ascending.
    ///
    /// # Errors
    /// As [`TenantReader::leases`].
    pub fn lease_keys(&self, id: LeaseId) -> Result<Vec<Bytes>, Fault> {
        write::attached_keys(&self.store.engine.view(), self.tenant.id, id)
    }

    /// Opens one client's watch stream. `waker` is called, from any thread, when [`WatchStream::pop`] may have something or
    /// a replay step is due; it must only signal.
    pub fn watch_stream(&self, waker: Arc<dyn Fn() + Send + Sync>) -> WatchStream<E> {
        WatchStream::open(Arc::clone(&self.store.engine), Arc::clone(&self.tenant), waker)
    }
}

/// Whether a top-level read may look at `at`: the future is checked first, as in etcd.
fn check_readable(at: i64, row: &TenantRow) -> Result<(), Refusal> {
    if at > row.revision {
        return Err(Refusal::FutureRevision);
    }
    if at < row.compact_revision {
        return Err(Refusal::Compacted { compact_revision: row.compact_revision });
    }
    Ok(())
}

/// The tenant's row in this view, if it has one.
pub(crate) fn tenant_row<R: Reader>(reader: &R, tenant: TenantId) -> Result<Option<TenantRow>, Fault> {
    reader.get(Family::Meta, &meta::tenant_key(tenant))?.map(TenantRow::decode).transpose()
}

/// Of a tenant that was not deleted.
pub(crate) fn missing_row(tenant: TenantId) -> Fault {
    Fault::Corrupt { what: "missing tenant row", key: meta::tenant_key(tenant) }
}

#[cfg(test)]
mod tests {
    use std::ops::ControlFlow;

    use super::*;
    use crate::apply::{NoObserver, StateMachine};
    use crate::command::{Command, Envelope, TenantCommand};
    use crate::engine::MemoryEngine;
    use crate::types::PutRequest;

    /// Clients ask for the page behind the last key they got. If that is not where the count is remembered, every page
    /// counts all that is behind it, and paging takes time in the square of the keys.
    #[test]
    fn the_count_is_remembered_where_clients_go_on() {
        let mut state = StateMachine::open(Arc::new(MemoryEngine::default()), Arc::new(NoObserver)).unwrap();
        let put = |key: String| {
            Command::Put(PutRequest {
                key: key.into(),
                value: Bytes::new(),
                lease: LeaseId::NONE,
                prev_kv: false,
                ignore_value: false,
                ignore_lease: false,
            })
        };
        let tenant = TenantId(1);
        let create = Command::Tenant(TenantCommand::create("acme"));
        let commands = [create].into_iter().chain((0..5).map(|number| put(format!("key{number}"))));
        let commands = commands.map(|command| Envelope { tenant, member_id: 1, command }.encode()).collect();
        state.apply(vec![(1, commands)]).unwrap();
        let store = state.store();
        let reader = store.reader(tenant).unwrap();
        let end = Bytes::from_static(b"l");
        let range = KeyRange::HalfOpen { start: Bytes::from_static(b"key"), end: end.clone() };
        let page = RangeRequest { limit: 2, ..RangeRequest::new(range) };
        let summary = reader.range(&page, &mut |_: &[u8]| ControlFlow::Continue(())).unwrap();
        assert_eq!((summary.count, summary.more), (5, true));
        let next = KeyRange::HalfOpen { start: Bytes::from_static(b"key1\0"), end };
        assert_eq!(summary.rest, Some(next.clone()));
        assert_eq!(store.shared.counts.get(tenant, summary.read_revision, &next), Some(3));
    }
}
