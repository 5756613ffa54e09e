//! Ranges at a revision: limit, exact count, filters and order as the contract's 1.1 "Range" has them.
//!
//! `kv` answers what the values were, `head` how many keys there are. A plain range walks `kv` once, in key order, taking
//! of each key the newest version at or below the read revision and handing its stored bytes to the caller. Behind the
//! limit only `head` is read, whose rows are small. Everything that needs another order collects first.

use std::ops::ControlFlow;

use bytes::Bytes;

use crate::engine::{Cursor, Family, Reader};
use crate::error::Fault;
use crate::key::head::Head;
use crate::key::{head, version};
use crate::key_value::KeyValue;
use crate::limits::TXN_REPLY_KEY_BYTES;
use crate::types::{KeyRange, RangeReply, RangeRequest, Revision, SortOrder, SortTarget, TenantId};

/// Reads the newest state, whatever its revision.
pub(crate) const NEWEST: i64 = i64::MAX;

/// Versions of one key stepped over one by one before a seek pays off.
const STEPS_BEFORE_SEEK: usize = 6;

/// Takes one stored KeyValue; `Break` ends the read early.
pub type Sink<'a> = dyn FnMut(&[u8]) -> ControlFlow<()> + 'a;

/// What a range found beside the keys given to the sink.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Found {
    pub(crate) count: u64,
    pub(crate) more: bool,
    /// Where the range goes on, when a limit cut a range in key order: at the last key given with a zero byte behind, which
    /// is what etcd's clients ask for next.
    pub(crate) rest: Option<KeyRange>,
}

/// How the count of a range is to be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Count {
    /// By reading.
    Exact,
    /// The caller knows it: see [`counts`](crate::counts).
    Known(u64),
    /// Nobody asks; `Found::count` is then what was visited.
    Unwanted,
}

/// The newest version of a key, tombstones included.
pub(crate) fn newest<R: Reader>(reader: &R, tenant: TenantId, key: &[u8]) -> Result<Option<Head>, Fault> {
    reader.get(Family::Head, &head::encode_key(tenant, key))?.map(Head::decode).transpose()
}

/// The stored bytes of a version known to exist.
pub(crate) fn stored<R: Reader>(reader: &R, tenant: TenantId, key: &[u8], at: Revision) -> Result<Bytes, Fault> {
    let version_key = version::encode(tenant, key, at, false);
    reader.get(Family::Kv, &version_key)?.ok_or(Fault::Corrupt { what: "missing version", key: version_key })
}

/// The key as it was at `at`, or `None` if it did not exist then.
pub(crate) fn get<R: Reader>(reader: &R, tenant: TenantId, key: &[u8], at: i64) -> Result<Option<Bytes>, Fault> {
    let Some(newest) = newest(reader, tenant, key)? else { return Ok(None) };
    if newest.at.main <= at {
        return if newest.tombstone { Ok(None) } else { stored(reader, tenant, key, newest.at).map(Some) };
    }
    Ok(older(reader, tenant, key, at)?.map(|(_, bytes)| bytes))
}

/// The version of a key at `at` by searching its history, with its bytes; `None` if it did not exist.
fn older<R: Reader>(reader: &R, tenant: TenantId, key: &[u8], at: i64) -> Result<Option<(Revision, Bytes)>, Fault> {
    let mut from = version::user_prefix(tenant, key);
    let upper = version::after_user_prefix(&from);
    version::push_newest_at(&mut from, at);
    let cursor = reader.cursor(Family::Kv, &from, &upper)?;
    let Some((row, bytes)) = cursor.entry() else { return Ok(None) };
    let found = decode_version(row)?;
    assert!(found.at.main <= at, "seek lands at or below the revision");
    Ok((!found.tombstone).then(|| (found.at, Bytes::copy_from_slice(bytes))))
}

/// Which version a key had at `at`; `None` if it did not exist then.
pub(crate) fn newest_at<R: Reader>(
    reader: &R,
    tenant: TenantId,
    key: &[u8],
    at: i64,
) -> Result<Option<Revision>, Fault> {
    match newest(reader, tenant, key)? {
        Some(newest) if newest.at.main <= at => Ok((!newest.tombstone).then_some(newest.at)),
        Some(_) => Ok(older(reader, tenant, key, at)?.map(|(revision, _)| revision)),
        None => Ok(None),
    }
}

/// Visits the stored bytes of every key of `range` that existed at `at`, in key order.
pub(crate) fn visit<R: Reader>(
    reader: &R,
    tenant: TenantId,
    at: i64,
    range: &KeyRange,
    sink: &mut Sink<'_>,
) -> Result<(), Fault> {
    scan(reader, tenant, at, range, &mut |_, stored| Ok(sink(stored)))
}

fn decode_version(row: &[u8]) -> Result<version::VersionKey<'_>, Fault> {
    version::decode(row).ok_or_else(|| Fault::Corrupt { what: "version key", key: row.to_vec() })
}

/// Runs the range against the state at `at`.
pub(crate) fn range<R: Reader>(
    reader: &R,
    tenant: TenantId,
    at: i64,
    request: &RangeRequest,
    count: Count,
    sink: &mut Sink<'_>,
) -> Result<Found, Fault> {
    if request.range.is_empty() {
        return Ok(Found::default());
    }
    if request.count_only {
        let count = match count {
            Count::Known(count) => count,
            Count::Exact | Count::Unwanted => count_keys(reader, tenant, at, &request.range)?,
        };
        return Ok(Found { count, more: false, rest: None });
    }
    let strip = Strip::of(request);
    let mut deliver = |stored: &[u8]| match strip.apply(stored)? {
        Some(stripped) => Ok(sink(&stripped)),
        None => Ok(sink(stored)),
    };
    let in_key_order = request.target == SortTarget::Key && request.order != SortOrder::Descend;
    if in_key_order && !request.has_revision_filter() {
        return range_in_key_order(reader, tenant, at, request, count, &mut deliver);
    }
    range_sorted(reader, tenant, at, request, &mut deliver)
}

/// Collects a range: for txns, whose replies are whole anyway. What it takes goes off `bytes_left`; `None`: not enough left.
pub(crate) fn range_collected<R: Reader>(
    reader: &R,
    tenant: TenantId,
    at: i64,
    request: &RangeRequest,
    bytes_left: &mut usize,
) -> Result<Option<RangeReply>, Fault> {
    let mut kvs = Vec::new();
    let mut fits = true;
    let found = range(reader, tenant, at, request, Count::Exact, &mut |stored| {
        match bytes_left.checked_sub(stored.len() + TXN_REPLY_KEY_BYTES) {
            Some(left) => *bytes_left = left,
            None => {
                fits = false;
                return ControlFlow::Break(());
            }
        }
        kvs.push(Bytes::copy_from_slice(stored));
        ControlFlow::Continue(())
    })?;
    Ok(fits.then_some(RangeReply { kvs, more: found.more, count: found.count }))
}

type Deliver<'a> = dyn FnMut(&[u8]) -> Result<ControlFlow<()>, Fault> + 'a;

fn range_in_key_order<R: Reader>(
    reader: &R,
    tenant: TenantId,
    at: i64,
    request: &RangeRequest,
    count: Count,
    deliver: &mut Deliver<'_>,
) -> Result<Found, Fault> {
    if let KeyRange::Single(key) = &request.range {
        let Some(stored) = get(reader, tenant, key, at)? else { return Ok(Found::default()) };
        let _ = deliver(&stored)?;
        return Ok(Found { count: 1, more: false, rest: None });
    }
    let limit = if request.limit == 0 { u64::MAX } else { request.limit };
    let mut visited = 0u64;
    let mut last = Vec::new();
    let mut more = false;
    scan(reader, tenant, at, &request.range, &mut |key, stored| {
        if visited == limit {
            more = true;
            return Ok(ControlFlow::Break(()));
        }
        visited += 1;
        if visited == limit {
            last = key.user_key().ok_or(Fault::Corrupt { what: "escaped key", key: key.user_prefix.to_vec() })?;
        }
        deliver(stored)
    })?;
    if !more {
        return Ok(Found { count: visited, more: false, rest: None });
    }
    // Where clients go on: the first key that could follow the last one delivered.
    let mut next = last;
    next.push(0);
    let rest = match &request.range {
        KeyRange::Single(_) => unreachable!("answered above"),
        KeyRange::HalfOpen { end, .. } => KeyRange::HalfOpen { start: next.into(), end: end.clone() },
        KeyRange::From(_) => KeyRange::From(next.into()),
    };
    let count = match count {
        Count::Exact => visited + count_keys(reader, tenant, at, &rest)?,
        Count::Known(count) => count,
        Count::Unwanted => visited,
    };
    Ok(Found { count, more: true, rest: Some(rest) })
}

/// Ranges that must be sorted or filtered before they are cut.
///
/// QUIRK: without an explicit order the limit cuts key order first and the rest is sorted (contract 1.1, Sorting).
fn range_sorted<R: Reader>(
    reader: &R,
    tenant: TenantId,
    at: i64,
    request: &RangeRequest,
    deliver: &mut Deliver<'_>,
) -> Result<Found, Fault> {
    let limit = if request.limit == 0 { usize::MAX } else { usize::try_from(request.limit).unwrap_or(usize::MAX) };
    let cut_first = request.order == SortOrder::None && !request.has_revision_filter();
    let collect_max = if cut_first { limit.saturating_add(1) } else { usize::MAX };
    let mut kvs: Vec<Bytes> = Vec::new();
    let mut count = 0u64;
    scan(reader, tenant, at, &request.range, &mut |_, stored| {
        count += 1;
        if kvs.len() < collect_max && passes_filters(request, stored)? {
            kvs.push(Bytes::copy_from_slice(stored));
        }
        Ok(ControlFlow::Continue(()))
    })?;
    sort(request, &mut kvs)?;
    let more = kvs.len() > limit;
    for stored in kvs.iter().take(limit) {
        if deliver(stored)?.is_break() {
            break;
        }
    }
    Ok(Found { count, more, rest: None })
}

fn passes_filters(request: &RangeRequest, stored: &[u8]) -> Result<bool, Fault> {
    let kv = KeyValue::decode(stored)?;
    let within = |revision: i64, min: i64, max: i64| (min == 0 || revision >= min) && (max == 0 || revision <= max);
    Ok(within(kv.mod_revision, request.min_mod_revision, request.max_mod_revision)
        && within(kv.create_revision, request.min_create_revision, request.max_create_revision))
}

/// Stable, so equal targets stay in key order in both directions.
fn sort(request: &RangeRequest, kvs: &mut [Bytes]) -> Result<(), Fault> {
    for stored in kvs.iter() {
        KeyValue::decode(stored)?;
    }
    let field = |stored: &Bytes| {
        let kv = KeyValue::decode(stored).unwrap_or_default();
        match request.target {
            SortTarget::Key | SortTarget::Value => 0,
            SortTarget::Version => kv.version,
            SortTarget::Create => kv.create_revision,
            SortTarget::Mod => kv.mod_revision,
        }
    };
    let value = |stored: &Bytes| KeyValue::decode(stored).unwrap_or_default().value.to_vec();
    let descend = request.order == SortOrder::Descend;
    match request.target {
        SortTarget::Key if descend => kvs.reverse(),
        SortTarget::Key => {}
        SortTarget::Value if descend => kvs.sort_by_key(|kv| std::cmp::Reverse(value(kv))),
        SortTarget::Value => kvs.sort_by_key(value),
        SortTarget::Version | SortTarget::Create | SortTarget::Mod if descend => {
            kvs.sort_by_key(|kv| std::cmp::Reverse(field(kv)));
        }
        SortTarget::Version | SortTarget::Create | SortTarget::Mod => kvs.sort_by_key(field),
    }
    Ok(())
}

/// What `keys_only` takes away.
enum Strip {
    Nothing,
    Value,
    /// QUIRK of etcd 3.7: answered from its index, which knows no lease, unless values had to be read for sorting.
    ValueAndLease,
}

impl Strip {
    fn of(request: &RangeRequest) -> Strip {
        match (request.keys_only, request.target) {
            (false, _) => Strip::Nothing,
            (true, SortTarget::Value) => Strip::Value,
            (true, SortTarget::Key | SortTarget::Version | SortTarget::Create | SortTarget::Mod) => {
                Strip::ValueAndLease
            }
        }
    }

    fn apply(&self, stored: &[u8]) -> Result<Option<Bytes>, Fault> {
        let kv = match self {
            Strip::Nothing => return Ok(None),
            Strip::Value => KeyValue { value: b"", ..KeyValue::decode(stored)? },
            Strip::ValueAndLease => KeyValue { value: b"", lease: 0, ..KeyValue::decode(stored)? },
        };
        Ok(Some(kv.encode()))
    }
}

type Visit<'a> = dyn FnMut(version::VersionKey<'_>, &[u8]) -> Result<ControlFlow<()>, Fault> + 'a;

/// Visits every key of `range` that existed at `at`, in key order, with its stored bytes.
fn scan<R: Reader>(
    reader: &R,
    tenant: TenantId,
    at: i64,
    range: &KeyRange,
    visit: &mut Visit<'_>,
) -> Result<(), Fault> {
    let bounds = version::bounds(tenant, range);
    let mut cursor = reader.cursor(Family::Kv, &bounds.lower, &bounds.upper)?;
    let mut user_prefix = Vec::new();
    while let Some((row, stored)) = cursor.entry() {
        let found = decode_version(row)?;
        user_prefix.clear();
        user_prefix.extend_from_slice(found.user_prefix);
        if found.at.main > at {
            skip_while(
                &mut cursor,
                &user_prefix,
                |older| older.main > at,
                |prefix| {
                    let mut to = prefix.to_vec();
                    version::push_newest_at(&mut to, at);
                    to
                },
            )?;
            continue;
        }
        if !found.tombstone && visit(found, stored)?.is_break() {
            return Ok(());
        }
        skip_while(&mut cursor, &user_prefix, |_| true, version::after_user_prefix)?;
    }
    Ok(())
}

/// Leaves the current row and all following ones of the same key for which `skip` holds: a few steps, then one seek.
fn skip_while<C: Cursor>(
    cursor: &mut C,
    user_prefix: &[u8],
    skip: impl Fn(Revision) -> bool,
    seek_to: impl Fn(&[u8]) -> Vec<u8>,
) -> Result<(), Fault> {
    for _ in 0..STEPS_BEFORE_SEEK {
        cursor.advance()?;
        let Some((row, _)) = cursor.entry() else { return Ok(()) };
        let found = decode_version(row)?;
        if found.user_prefix != user_prefix || !skip(found.at) {
            return Ok(());
        }
    }
    cursor.seek(&seek_to(user_prefix))
}

/// How many keys of `range` existed at `at`.
pub(crate) fn count_keys<R: Reader>(reader: &R, tenant: TenantId, at: i64, range: &KeyRange) -> Result<u64, Fault> {
    let bounds = head::bounds(tenant, range);
    let mut cursor = reader.cursor(Family::Head, &bounds.lower, &bounds.upper)?;
    let mut count = 0;
    while let Some((row, stored)) = cursor.entry() {
        let newest = Head::decode(Bytes::copy_from_slice(stored))?;
        let exists = if newest.at.main <= at {
            !newest.tombstone
        } else if !newest.tombstone && newest.create_revision <= at {
            // The generation that lives now lived then.
            true
        } else {
            older(reader, tenant, head::user_key(row), at)?.is_some()
        };
        count += u64::from(exists);
        cursor.advance()?;
    }
    Ok(count)
}

type VisitHead<'a> = dyn FnMut(&[u8], Head) -> Result<ControlFlow<()>, Fault> + 'a;

/// Every key of `range` that exists now, with its newest version, in key order.
pub(crate) fn live_heads<R: Reader>(
    reader: &R,
    tenant: TenantId,
    range: &KeyRange,
    visit: &mut VisitHead<'_>,
) -> Result<(), Fault> {
    if let KeyRange::Single(key) = range {
        if let Some(newest) = newest(reader, tenant, key)?.filter(|newest| !newest.tombstone) {
            let _ = visit(key, newest)?;
        }
        return Ok(());
    }
    let bounds = head::bounds(tenant, range);
    let mut cursor = reader.cursor(Family::Head, &bounds.lower, &bounds.upper)?;
    while let Some((row, stored)) = cursor.entry() {
        let newest = Head::decode(Bytes::copy_from_slice(stored))?;
        if !newest.tombstone && visit(head::user_key(row), newest)?.is_break() {
            return Ok(());
        }
        cursor.advance()?;
    }
    Ok(())
}
