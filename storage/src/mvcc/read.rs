//! Ranges at a revision: limit, exact count, filters and order as the contract's 1.1 "Range" has them.
//!
//! `kv` answers what the values were, `head` how many keys there are. A plain range walks `kv` once, in key order, taking
//! of each key the newest version at or below the read revision and handing its stored bytes to the caller. Behind the
//! limit only `head` is read, whose rows are small. What needs another order is collected first, no more of it than may be
//! answered, and the caller is asked before that grows.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
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

/// Where a read puts what it finds. A closure that takes one stored KeyValue is one that lets a read collect as it likes.
pub trait Sink {
    /// Takes one stored KeyValue; `Break` ends the read early.
    fn take(&mut self, stored: &[u8]) -> ControlFlow<()>;

    /// Hears how many bytes a read that has to sort has collected so far, before it hands out any; `Break` ends it early.
    fn collected(&mut self, bytes: usize) -> ControlFlow<()> {
        let _ = bytes;
        ControlFlow::Continue(())
    }
}

impl<F: FnMut(&[u8]) -> ControlFlow<()>> Sink for F {
    fn take(&mut self, stored: &[u8]) -> ControlFlow<()> {
        self(stored)
    }
}

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
    sink: &mut dyn Sink,
) -> Result<(), Fault> {
    scan(reader, tenant, at, range, &mut |_, stored| Ok(sink.take(stored)))
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
    sink: &mut dyn Sink,
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
    let mut delivery = Delivery { strip: Strip::of(request), sink };
    let in_key_order = request.target == SortTarget::Key && request.order != SortOrder::Descend;
    match (in_key_order, request.has_revision_filter()) {
        (true, false) => range_in_key_order(reader, tenant, at, request, count, &mut delivery),
        (true, true) => range_filtered(reader, tenant, at, request, &mut delivery),
        (false, _) => range_sorted(reader, tenant, at, request, &mut delivery),
    }
}

/// Hands out one key that was found, as [`range`] would.
pub(crate) fn deliver(request: &RangeRequest, stored: &[u8], sink: &mut dyn Sink) -> Result<(), Fault> {
    Delivery { strip: Strip::of(request), sink }.deliver(stored).map(|_| ())
}

/// Collects a range: for txns, whose replies are whole anyway. What it takes goes off `bytes_left`; `None`: not enough left.
pub(crate) fn range_collected<R: Reader>(
    reader: &R,
    tenant: TenantId,
    at: i64,
    request: &RangeRequest,
    bytes_left: &mut usize,
) -> Result<Option<RangeReply>, Fault> {
    let mut collector = Collector { kvs: Vec::new(), bytes_left, fits: true };
    let found = range(reader, tenant, at, request, Count::Exact, &mut collector)?;
    let Collector { kvs, fits, .. } = collector;
    Ok(fits.then_some(RangeReply { kvs, more: found.more, count: found.count }))
}

struct Collector<'a> {
    kvs: Vec<Bytes>,
    bytes_left: &'a mut usize,
    fits: bool,
}

impl Sink for Collector<'_> {
    fn take(&mut self, stored: &[u8]) -> ControlFlow<()> {
        match self.bytes_left.checked_sub(stored.len() + TXN_REPLY_KEY_BYTES) {
            Some(left) => *self.bytes_left = left,
            None => self.fits = false,
        }
        if !self.fits {
            return ControlFlow::Break(());
        }
        self.kvs.push(Bytes::copy_from_slice(stored));
        ControlFlow::Continue(())
    }

    fn collected(&mut self, bytes: usize) -> ControlFlow<()> {
        self.fits &= bytes <= *self.bytes_left;
        if self.fits { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    }
}

/// The way from the engine to the caller.
struct Delivery<'a> {
    strip: Strip,
    sink: &'a mut dyn Sink,
}

impl Delivery<'_> {
    fn deliver(&mut self, stored: &[u8]) -> Result<ControlFlow<()>, Fault> {
        match self.strip.apply(stored)? {
            Some(stripped) => Ok(self.sink.take(&stripped)),
            None => Ok(self.sink.take(stored)),
        }
    }
}

fn range_in_key_order<R: Reader>(
    reader: &R,
    tenant: TenantId,
    at: i64,
    request: &RangeRequest,
    count: Count,
    delivery: &mut Delivery<'_>,
) -> Result<Found, Fault> {
    if let KeyRange::Single(key) = &request.range {
        let Some(stored) = get(reader, tenant, key, at)? else { return Ok(Found::default()) };
        let _ = delivery.deliver(&stored)?;
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
        delivery.deliver(stored)
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

fn limit_of(request: &RangeRequest) -> usize {
    if request.limit == 0 { usize::MAX } else { usize::try_from(request.limit).unwrap_or(usize::MAX) }
}

/// Ranges in key order of which only some keys are wanted. The count is that of all (contract 1.1, Filters).
fn range_filtered<R: Reader>(
    reader: &R,
    tenant: TenantId,
    at: i64,
    request: &RangeRequest,
    delivery: &mut Delivery<'_>,
) -> Result<Found, Fault> {
    let limit = limit_of(request);
    let (mut count, mut passed) = (0u64, 0usize);
    scan(reader, tenant, at, &request.range, &mut |_, stored| {
        count += 1;
        if passed <= limit && passes_filters(request, stored)? {
            passed += 1;
            if passed <= limit {
                return delivery.deliver(stored);
            }
        }
        Ok(ControlFlow::Continue(()))
    })?;
    Ok(Found { count, more: passed > limit, rest: None })
}

/// Ranges that must be sorted before they are cut.
///
/// QUIRK: without an explicit order the limit cuts key order first, one key late, and what is left is sorted and cut again (contract 1.1,
/// Sorting).
fn range_sorted<R: Reader>(
    reader: &R,
    tenant: TenantId,
    at: i64,
    request: &RangeRequest,
    delivery: &mut Delivery<'_>,
) -> Result<Found, Fault> {
    let limit = limit_of(request);
    let cut_first = request.order == SortOrder::None && !request.has_revision_filter();
    let kept = if cut_first { limit.saturating_add(1) } else { limit };
    let mut first = First { kept, cut_first, candidates: BinaryHeap::new(), bytes: 0 };
    let (mut count, mut passed) = (0u64, 0usize);
    let mut ended = false;
    scan(reader, tenant, at, &request.range, &mut |_, stored| {
        count += 1;
        if !passes_filters(request, stored)? {
            return Ok(ControlFlow::Continue(()));
        }
        passed += 1;
        let grew = first.add(request, count, stored)?;
        let next = if grew { delivery.sink.collected(first.bytes) } else { ControlFlow::Continue(()) };
        ended = next.is_break();
        Ok(next)
    })?;
    if ended {
        return Ok(Found::default());
    }
    for candidate in first.candidates.into_sorted_vec().into_iter().take(limit) {
        if delivery.deliver(&candidate.stored)?.is_break() {
            break;
        }
    }
    Ok(Found { count, more: passed > limit, rest: None })
}

/// What of a range comes first in its order, at most `kept` of it.
struct First {
    kept: usize,
    /// Keep those that came first in key order instead.
    cut_first: bool,
    /// The last of the order on top.
    candidates: BinaryHeap<Candidate>,
    /// Of the candidates.
    bytes: usize,
}

/// Ordered by what is sorted by, and behind that by key in both directions: the sort is stable.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Candidate {
    by: SortedBy,
    position: u64,
    stored: Bytes,
}

/// All candidates of a read are of one variant.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
enum SortedBy {
    /// Negative in descending order.
    Number(i64),
    Value(Bytes),
    ValueDescending(Reverse<Bytes>),
}

impl First {
    /// Takes one more, the `position`-th key of the range, if it comes before the last of as many as are wanted. `true`: there are more
    /// bytes than before.
    fn add(&mut self, request: &RangeRequest, position: u64, stored: &[u8]) -> Result<bool, Fault> {
        let is_full = self.candidates.len() >= self.kept;
        if is_full && self.cut_first {
            return Ok(false);
        }
        let kv = KeyValue::decode(stored)?;
        let descend = request.order == SortOrder::Descend;
        let number = match request.target {
            SortTarget::Key => Some(position.cast_signed()),
            SortTarget::Version => Some(kv.version),
            SortTarget::Create => Some(kv.create_revision),
            SortTarget::Mod => Some(kv.mod_revision),
            SortTarget::Value => None,
        }
        .map(|number| if descend { -number } else { number });
        let is_before = |last: &Candidate| match (&last.by, number) {
            (SortedBy::Number(of_last), Some(number)) => number < *of_last,
            (SortedBy::Value(of_last), _) => kv.value < &of_last[..],
            (SortedBy::ValueDescending(Reverse(of_last)), _) => kv.value > &of_last[..],
            (SortedBy::Number(_), None) => unreachable!("candidates of a read are of one variant"),
        };
        if is_full && !self.candidates.peek().is_some_and(is_before) {
            return Ok(false);
        }
        let bytes_before = self.bytes;
        if is_full && let Some(last) = self.candidates.pop() {
            self.bytes -= last.bytes();
        }
        let stored = Bytes::copy_from_slice(stored);
        let by = match number {
            Some(number) => SortedBy::Number(number),
            None => {
                let value = stored.slice_ref(KeyValue::decode(&stored)?.value);
                if descend { SortedBy::ValueDescending(Reverse(value)) } else { SortedBy::Value(value) }
            }
        };
        let candidate = Candidate { by, position, stored };
        self.bytes += candidate.bytes();
        self.candidates.push(candidate);
        Ok(self.bytes > bytes_before)
    }
}

impl Candidate {
    fn bytes(&self) -> usize {
        self.stored.len() + CANDIDATE_BYTES
    }
}

/// What a candidate takes beside what it holds; not asked of the compiler, for what is collected decides on all members alike.
const CANDIDATE_BYTES: usize = 80;

const _: () = assert!(size_of::<Candidate>() <= CANDIDATE_BYTES);

fn passes_filters(request: &RangeRequest, stored: &[u8]) -> Result<bool, Fault> {
    let kv = KeyValue::decode(stored)?;
    let within = |revision: i64, min: i64, max: i64| (min == 0 || revision >= min) && (max == 0 || revision <= max);
    Ok(within(kv.mod_revision, request.min_mod_revision, request.max_mod_revision)
        && within(kv.create_revision, request.min_create_revision, request.max_create_revision))
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
