//! Counts of ranges that are asked for again.
//!
//! The `count` of an answer is how many keys the range has, whatever the limit: by reading it costs a row for each of them,
//! however few are wanted. kube-apiserver wants it again and again, in two ways, and each has its answer here.
//!
//! - *Pages.* A list goes on where the page before ended, at the revision of the first page. What is left there never changes:
//!   it is remembered when a page is produced, under the range that clients ask for next.
//! - *Live counters.* The same range at the newest revision: the first page of a list, and the number of objects of each
//!   resource, once a minute. A range that had to be counted twice gets a counter, which apply moves from then on.
//!
//! Life of a live counter. A read that is about to count a range for the second time *arms* one ([`Counts::arm`]) before it takes
//! its view of the engine; from then on the writer tells it of every key that comes or goes ([`Counts::announce`]), before the
//! change is in the engine. When the read has counted at some revision it *settles* the counter ([`Counts::settle`]): of what was
//! told, later revisions are added, earlier ones are in the count already. Later reads find the count at their own revision, which
//! is that of their view, in the counter's newest changes.
//!
//! What must hold: whatever a view shows was announced before, so a counter never lacks a change up to a view's revision; and
//! whatever was announced when a counter is armed is in every view taken afterwards, which is why none is armed in the middle of a
//! write ([`Live::writing`]). A range that is not found is counted by reading: nothing here is needed for a right answer.
//!
//! All of it is memory of this process: another member's counters may differ, its counts do not.

use std::collections::{HashMap, VecDeque};

use parking_lot::Mutex;

use crate::error::Fault;
use crate::key_value::KeyValue;
use crate::limits::{
    COUNTED_ROWS_MIN, COUNTER_CHANGES_MAX, COUNTER_MATCHES_MAX, COUNTERS_MAX, COUNTERS_PER_TENANT_MAX,
    COUNTING_RANGES_MAX, PAGE_COUNTS_MAX, REMEMBERED_RANGE_BYTES_MAX,
};
use crate::types::{KeyRange, TenantId};
use crate::watch::{Event, EventKind, RangeIndex};

/// See the module's essay.
#[derive(Default)]
pub(crate) struct Counts {
    pages: Mutex<Pages>,
    live: Mutex<Live>,
}

/// A counter that was armed; settle it with what was counted. Dropped before, it is taken back, and its range may be armed again.
pub(crate) struct Armed<'a> {
    counts: &'a Counts,
    place: Place,
}

/// Of a counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    slot: usize,
    id: u64,
}

impl Drop for Armed<'_> {
    fn drop(&mut self) {
        self.counts.live.lock().disarm(self.place);
    }
}

impl Counts {
    /// The count of a range at a revision, if it is known. `at` must be the revision of a view, or one before it.
    pub(crate) fn get(&self, tenant: TenantId, at: i64, range: &KeyRange) -> Option<u64> {
        if is_too_long(range) {
            return None;
        }
        let page = self.pages.lock().get(tenant, at, range);
        page.or_else(|| self.live.lock().get(tenant, at, range))
    }

    /// Keeps what is left behind a page.
    pub(crate) fn remember_page(&self, tenant: TenantId, at: i64, rest: &KeyRange, left: u64) {
        if is_too_long(rest) {
            return;
        }
        self.pages.lock().insert(PageKey { tenant, at, range: rest.detached() }, left);
    }

    /// Call it before a view is taken in which this range may have to be counted. Gives a counter if it was counted before and
    /// has none.
    pub(crate) fn arm(&self, tenant: TenantId, range: &KeyRange) -> Option<Armed<'_>> {
        if is_too_long(range) {
            return None;
        }
        self.live.lock().arm(tenant, range).map(|place| Armed { counts: self, place })
    }

    /// This range had to be counted, at a revision that was the newest of the view it was counted in.
    pub(crate) fn settle(&self, armed: Option<Armed<'_>>, tenant: TenantId, at: i64, range: &KeyRange, count: u64) {
        match armed {
            Some(armed) => self.live.lock().settle(armed.place, at, count),
            None if count >= COUNTED_ROWS_MIN && !is_too_long(range) => self.live.lock().note_counted(tenant, range),
            None => {}
        }
    }

    /// The writer is about to write these events of a tenant's revision. [`Counts::written`] ends what this begins.
    ///
    /// # Errors
    /// If an event cannot be read.
    pub(crate) fn announce<'a>(
        &self,
        revisions: impl Iterator<Item = (TenantId, i64, &'a [Event])>,
    ) -> Result<(), Fault> {
        let mut live = self.live.lock();
        live.writing = true;
        for (tenant, revision, events) in revisions {
            live.announce(tenant, revision, events)?;
        }
        Ok(())
    }

    /// All that was announced is in the engine.
    pub(crate) fn written(&self) {
        self.live.lock().writing = false;
    }

    /// The whole state is about to be replaced by a later one, of which no changes are known; [`Counts::written`] ends that.
    pub(crate) fn forget_live(&self) {
        let mut live = self.live.lock();
        *live = Live { writing: true, ids: live.ids, ..Live::default() };
    }
}

/// Whether a range takes more memory than it is worth.
fn is_too_long(range: &KeyRange) -> bool {
    let bytes = match range {
        KeyRange::Single(key) | KeyRange::From(key) => key.len(),
        KeyRange::HalfOpen { start, end } => start.len() + end.len(),
    };
    bytes > REMEMBERED_RANGE_BYTES_MAX
}

/// A page of a chain: the same range read at the same revision has the same count, for ever.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct PageKey {
    tenant: TenantId,
    at: i64,
    range: KeyRange,
}

/// Counts of pages; oldest out first.
#[derive(Default)]
struct Pages {
    counts: HashMap<PageKey, u64>,
    age: VecDeque<PageKey>,
}

impl Pages {
    fn get(&self, tenant: TenantId, at: i64, range: &KeyRange) -> Option<u64> {
        if self.counts.is_empty() {
            return None;
        }
        self.counts.get(&PageKey { tenant, at, range: range.clone() }).copied()
    }

    fn insert(&mut self, page: PageKey, count: u64) {
        if self.counts.insert(page.clone(), count).is_none() {
            self.age.push_back(page);
        }
        if self.age.len() > PAGE_COUNTS_MAX
            && let Some(oldest) = self.age.pop_front()
        {
            self.counts.remove(&oldest);
        }
    }
}

#[derive(Default)]
struct Live {
    /// Whether something was announced that may not be in the engine yet.
    writing: bool,
    ids: u64,
    slots: Vec<Option<Counter>>,
    free: Vec<usize>,
    tenants: HashMap<TenantId, OfTenant>,
    /// Which slots to look at when one is needed: those that were used since the last look get another round.
    clock: VecDeque<(usize, u64)>,
    /// Ranges that were counted by reading, newest last.
    counted: VecDeque<(TenantId, KeyRange)>,
}

#[derive(Default)]
struct OfTenant {
    index: RangeIndex,
    slots: HashMap<KeyRange, usize>,
}

struct Counter {
    id: u64,
    tenant: TenantId,
    range: KeyRange,
    used: bool,
    /// The count behind each of the newest changes, and in front what they start from; empty until it is settled.
    counts: VecDeque<(i64, u64)>,
    /// What was announced before it was settled, oldest first.
    told: Vec<(i64, i64)>,
}

impl Live {
    fn get(&mut self, tenant: TenantId, at: i64, range: &KeyRange) -> Option<u64> {
        let slot = *self.tenants.get(&tenant)?.slots.get(range)?;
        let counter = self.slots[slot].as_mut().expect("a counter that is found is there");
        counter.used = true;
        counter.counts.iter().rev().find(|(revision, _)| *revision <= at).map(|(_, count)| *count)
    }

    fn note_counted(&mut self, tenant: TenantId, range: &KeyRange) {
        let has_counter = self.tenants.get(&tenant).is_some_and(|of| of.slots.contains_key(range));
        if has_counter || self.counted.iter().any(|(of, counted)| *of == tenant && counted == range) {
            return;
        }
        if self.counted.len() >= COUNTING_RANGES_MAX {
            self.counted.pop_front();
        }
        self.counted.push_back((tenant, range.detached()));
    }

    fn arm(&mut self, tenant: TenantId, range: &KeyRange) -> Option<Place> {
        if self.writing {
            return None;
        }
        let place = self.counted.iter().position(|(of, counted)| *of == tenant && counted == range)?;
        self.counted.remove(place);
        if self.tenants.get(&tenant).is_some_and(|of| of.slots.len() >= COUNTERS_PER_TENANT_MAX) {
            self.evict_of(tenant);
        }
        if self.slots.len() - self.free.len() >= COUNTERS_MAX {
            self.evict();
        }
        self.ids += 1;
        let id = self.ids;
        let (counts, told, range) = (VecDeque::new(), Vec::new(), range.detached());
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            self.slots.len() - 1
        });
        let of = self.tenants.entry(tenant).or_default();
        of.index.insert(&range, slot);
        let before = of.slots.insert(range.clone(), slot);
        assert!(before.is_none(), "a range has one counter");
        self.slots[slot] = Some(Counter { id, tenant, range, used: false, counts, told });
        self.clock.push_back((slot, id));
        if self.clock.len() > 2 * COUNTERS_MAX {
            let slots = &self.slots;
            self.clock.retain(|(slot, id)| slots[*slot].as_ref().is_some_and(|counter| counter.id == *id));
        }
        Some(Place { slot, id })
    }

    /// The counter that was armed there, if it has not been dropped meanwhile.
    fn at(&mut self, place: Place) -> Option<&mut Counter> {
        let counter = self.slots.get_mut(place.slot).and_then(Option::as_mut);
        counter.filter(|counter| counter.id == place.id)
    }

    /// Takes a counter back that nobody has settled; its range was counted, and may be counted again.
    fn disarm(&mut self, place: Place) {
        let Some(counter) = self.at(place).filter(|counter| counter.counts.is_empty()) else { return };
        let (tenant, range) = (counter.tenant, counter.range.clone());
        self.remove(place.slot, place.id);
        self.note_counted(tenant, &range);
    }

    fn settle(&mut self, armed: Place, at: i64, count: u64) {
        let Some(counter) = self.at(armed) else { return };
        counter.counts.push_back((at, count));
        for (revision, change) in std::mem::take(&mut counter.told) {
            if revision > at {
                counter.change(revision, change);
            }
        }
    }

    fn announce(&mut self, tenant: TenantId, revision: i64, events: &[Event]) -> Result<(), Fault> {
        let Some(of) = self.tenants.get(&tenant) else { return Ok(()) };
        let mut lost = Vec::new();
        let mut matches = 0;
        for event in events {
            if matches > COUNTER_MATCHES_MAX {
                self.forget(tenant);
                return Ok(());
            }
            let change = match event.kind {
                EventKind::Delete => -1,
                EventKind::Put => {
                    let kv = KeyValue::decode(&event.kv)?;
                    if kv.create_revision != kv.mod_revision || kv.version != 1 {
                        continue;
                    }
                    1
                }
            };
            of.index.covering(&event.key, |slot| {
                let counter = self.slots[slot].as_mut().expect("a counter in the index is there");
                counter.change(revision, change);
                matches += 1;
                // Whoever armed it has not come back.
                if counter.told.len() > COUNTER_CHANGES_MAX {
                    lost.push((slot, counter.id));
                }
            });
        }
        for (slot, id) in lost {
            self.remove(slot, id);
        }
        Ok(())
    }

    /// Drops all counters of a tenant.
    fn forget(&mut self, tenant: TenantId) {
        let slots: Vec<usize> =
            self.tenants.get(&tenant).map(|of| of.slots.values().copied().collect()).unwrap_or_default();
        for slot in slots {
            let id = self.slots[slot].as_ref().expect("a counter in the index is there").id;
            self.remove(slot, id);
        }
    }

    /// Makes room for a further counter of a tenant that has as many as it may.
    fn evict_of(&mut self, tenant: TenantId) {
        let Some(of) = self.tenants.get(&tenant) else { return };
        let slots = &mut self.slots;
        let mut unused = |slot: usize| slots[slot].as_mut().is_some_and(|counter| !std::mem::take(&mut counter.used));
        let victim = of.slots.values().copied().find(|slot| unused(*slot)).or(of.slots.values().copied().next());
        let victim = victim.and_then(|slot| Some((slot, self.slots[slot].as_ref()?.id)));
        if let Some((slot, id)) = victim {
            self.remove(slot, id);
        }
    }

    /// Makes room for a further counter of anybody's.
    fn evict(&mut self) {
        // Each is looked at twice at most: the first look takes its mark away.
        for _ in 0..2 * self.clock.len() {
            let Some((slot, id)) = self.clock.pop_front() else { return };
            let Some(counter) = self.slots[slot].as_mut().filter(|counter| counter.id == id) else { continue };
            if std::mem::take(&mut counter.used) {
                self.clock.push_back((slot, id));
                continue;
            }
            return self.remove(slot, id);
        }
    }

    fn remove(&mut self, slot: usize, id: u64) {
        let Some(counter) = self.slots[slot].take_if(|counter| counter.id == id) else { return };
        self.free.push(slot);
        let of = self.tenants.get_mut(&counter.tenant).expect("a counter's tenant is there");
        of.index.remove(&counter.range, slot);
        of.slots.remove(&counter.range);
        if of.slots.is_empty() {
            self.tenants.remove(&counter.tenant);
        }
    }
}

impl Counter {
    fn change(&mut self, revision: i64, change: i64) {
        match self.counts.back_mut() {
            None => match self.told.last_mut() {
                Some((newest, told)) if *newest == revision => *told += change,
                Some(_) | None => self.told.push((revision, change)),
            },
            Some((newest, count)) => {
                let next = count.checked_add_signed(change).expect("no more keys go than there are");
                if *newest == revision {
                    *count = next;
                    return;
                }
                if self.counts.len() > COUNTER_CHANGES_MAX {
                    self.counts.pop_front();
                }
                self.counts.push_back((revision, next));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    const TENANT: TenantId = TenantId(7);

    fn range(number: usize) -> KeyRange {
        KeyRange::HalfOpen { start: Bytes::from(format!("{number:05}/")), end: Bytes::from(format!("{number:05}0")) }
    }

    /// Counts a range twice, as a reader does that finds no count.
    fn count_twice(counts: &Counts, tenant: TenantId, range: &KeyRange, at: i64, count: u64) {
        for _ in 0..2 {
            let armed = counts.arm(tenant, range);
            counts.settle(armed, tenant, at, range, count);
        }
    }

    fn created(key: &'static str, revision: i64) -> Event {
        let key = Bytes::from(key);
        let kv = KeyValue {
            key: &key,
            create_revision: revision,
            mod_revision: revision,
            version: 1,
            ..KeyValue::default()
        };
        Event { kind: EventKind::Put, kv: kv.encode(), key, prev_kv: None }
    }

    fn write(counts: &Counts, revision: i64) {
        let events = [created("00001/a", revision)];
        counts.announce([(TENANT, revision, &events[..])].into_iter()).unwrap();
        counts.written();
    }

    /// A read that is cut short, for lack of room for its answer, tries again: it must not have spoilt the counter for good.
    #[test]
    fn a_counter_that_nobody_settled_can_be_armed_again() {
        let (counts, range) = (Counts::default(), range(1));
        counts.settle(None, TENANT, 10, &range, COUNTED_ROWS_MIN);
        for _ in 0..3 {
            assert!(counts.arm(TENANT, &range).is_some());
        }
        let armed = counts.arm(TENANT, &range);
        counts.settle(armed, TENANT, 10, &range, 50);
        assert_eq!(counts.get(TENANT, 10, &range), Some(50));
        assert_eq!(counts.live.lock().slots.len(), 1);
    }

    /// The ends of a range are a client's bytes, megabytes if it likes.
    #[test]
    fn ranges_with_very_long_ends_are_not_remembered() {
        let counts = Counts::default();
        let end = Bytes::from(vec![b'z'; REMEMBERED_RANGE_BYTES_MAX + 1]);
        let range = KeyRange::HalfOpen { start: Bytes::from_static(b"a"), end };
        count_twice(&counts, TENANT, &range, 1, 50);
        counts.remember_page(TENANT, 1, &range, 50);
        assert_eq!(counts.get(TENANT, 1, &range), None);
        assert!(counts.live.lock().counted.is_empty() && counts.pages.lock().age.is_empty());
    }

    /// A tenant may have hundreds of counters of ranges that hold all its keys, and delete all these in one revision.
    #[test]
    fn very_many_changes_drop_counters_instead_of_moving_them() {
        let counts = Counts::default();
        let ranges: Vec<_> = (0..100)
            .map(|n| KeyRange::HalfOpen { start: Bytes::from_static(b"0"), end: Bytes::from(format!("1{n}")) })
            .collect();
        ranges.iter().for_each(|range| count_twice(&counts, TENANT, range, 1, 50));
        let events = vec![created("00001/a", 2); COUNTER_MATCHES_MAX / ranges.len() + 2];
        counts.announce([(TENANT, 2, &events[..])].into_iter()).unwrap();
        counts.written();
        assert!(ranges.iter().all(|range| counts.get(TENANT, 2, range).is_none()));
        assert!(counts.live.lock().tenants.is_empty());
    }

    #[test]
    fn a_range_has_a_counter_when_it_was_counted_twice() {
        let (counts, range) = (Counts::default(), range(1));
        assert!(counts.arm(TENANT, &range).is_none(), "never counted");
        counts.settle(None, TENANT, 10, &range, COUNTED_ROWS_MIN);
        let armed = counts.arm(TENANT, &range);
        assert!(armed.is_some() && counts.arm(TENANT, &range).is_none(), "one counter a range");
        assert_eq!(counts.get(TENANT, 10, &range), None, "not settled");
        // What the count has in it, and what it has not.
        write(&counts, 11);
        write(&counts, 12);
        counts.settle(armed, TENANT, 11, &range, 50);
        let at = |revision| counts.get(TENANT, revision, &range);
        assert_eq!([at(10), at(11), at(12), at(99)], [None, Some(50), Some(51), Some(51)]);
        assert_eq!(counts.get(TenantId(8), 12, &range), None, "another tenant's");
    }

    #[test]
    fn none_is_armed_in_the_middle_of_a_write_nor_kept_over_a_new_state() {
        let (counts, range) = (Counts::default(), range(1));
        counts.settle(None, TENANT, 10, &range, COUNTED_ROWS_MIN);
        counts.announce([].into_iter()).unwrap();
        assert!(counts.arm(TENANT, &range).is_none());
        counts.written();
        let armed = counts.arm(TENANT, &range);
        assert!(armed.is_some());
        counts.forget_live();
        counts.written();
        counts.settle(armed, TENANT, 10, &range, 50);
        assert_eq!(counts.get(TENANT, 10, &range), None);
    }

    #[test]
    fn what_a_counter_keeps_is_bounded() {
        let (counts, range) = (Counts::default(), range(1));
        count_twice(&counts, TENANT, &range, 0, 50);
        let writes = 10 * i64::try_from(COUNTER_CHANGES_MAX).unwrap();
        (1..=writes).for_each(|revision| write(&counts, revision));
        assert_eq!(counts.get(TENANT, writes, &range), Some(50 + writes.cast_unsigned()));
        assert_eq!(counts.get(TENANT, 1, &range), None, "too long ago");
        // One that is armed and never settled goes.
        let lost = KeyRange::From(Bytes::from_static(b"0"));
        counts.settle(None, TENANT, writes, &lost, COUNTED_ROWS_MIN);
        let armed = counts.arm(TENANT, &lost);
        (writes + 1..=2 * writes).for_each(|revision| write(&counts, revision));
        counts.settle(armed, TENANT, 2 * writes, &lost, 1);
        assert_eq!(counts.get(TENANT, 2 * writes, &lost), None);
    }

    #[test]
    fn at_the_bounds_what_is_used_stays() {
        let counts = Counts::default();
        let kept = range(0);
        count_twice(&counts, TENANT, &kept, 1, 50);
        for number in 1..3 * COUNTERS_PER_TENANT_MAX {
            assert_eq!(counts.get(TENANT, 1, &kept), Some(50));
            count_twice(&counts, TENANT, &range(number), 1, 40);
        }
        assert_eq!(counts.live.lock().tenants[&TENANT].slots.len(), COUNTERS_PER_TENANT_MAX);
        for tenant in 100..140 {
            for number in 0..COUNTERS_PER_TENANT_MAX {
                count_twice(&counts, TenantId(tenant), &range(number), 1, 40);
            }
            assert_eq!(counts.get(TENANT, 1, &kept), Some(50));
        }
        let live = counts.live.lock();
        assert_eq!(live.slots.len() - live.free.len(), COUNTERS_MAX);
        assert!(live.clock.len() <= 2 * COUNTERS_MAX);
    }
}
