//! Which watch groups cover a key.
//!
//! Single keys are a hash look-up. Ranges stand sorted by start and group in an array with, for every subtree of its implicit binary
//! tree, the greatest end: a stabbing query visits O(log n + answers) of them. The array is rebuilt when enough ranges
//! have been added since, so that neither one event nor one create pays for all watchers of the tenant.

use std::collections::HashMap;

use bytes::Bytes;

use crate::types::KeyRange;

pub(crate) type GroupId = usize;

/// So few entries are worth no rebuild.
const RECENT_MIN: usize = 32;

/// A tree keeps memory for so many times its entries, if it had them once.
const SPARE_FACTOR_MAX: usize = 4;

#[derive(Default)]
pub(crate) struct RangeIndex {
    single: HashMap<Bytes, Vec<GroupId>>,
    tree: Vec<Node>,
    /// Added since the tree was built; searched one by one.
    recent: Vec<Interval>,
    /// Entries of the tree whose group is gone.
    dead: usize,
}

struct Interval {
    start: Bytes,
    /// Exclusive; `None` = to the end of the key space.
    end: Option<Bytes>,
    group: GroupId,
    removed: bool,
}

struct Node {
    interval: Interval,
    /// Greatest end in the subtree rooted here.
    end_max: Option<Bytes>,
}

impl Node {
    fn placeholder() -> Self {
        let interval = Interval { start: Bytes::new(), end: None, group: 0, removed: false };
        Node { interval, end_max: None }
    }
}

impl Interval {
    fn contains(&self, key: &[u8]) -> bool {
        self.start <= key && ends_after(&self.end, key)
    }

    fn order(&self) -> (&[u8], GroupId) {
        (&self.start, self.group)
    }
}

fn ends_after(end: &Option<Bytes>, key: &[u8]) -> bool {
    end.as_ref().is_none_or(|end| key < end)
}

impl RangeIndex {
    pub(crate) fn insert(&mut self, range: &KeyRange, group: GroupId) {
        match range {
            KeyRange::Single(key) => self.single.entry(key.clone()).or_default().push(group),
            KeyRange::HalfOpen { start, end } => self.insert_interval(start, Some(end.clone()), group),
            KeyRange::From(start) => self.insert_interval(start, None, group),
        }
    }

    fn insert_interval(&mut self, start: &Bytes, end: Option<Bytes>, group: GroupId) {
        self.recent.push(Interval { start: start.clone(), end, group, removed: false });
        if self.recent.len() > RECENT_MIN + self.tree.len().isqrt() {
            self.rebuild();
        }
    }

    pub(crate) fn remove(&mut self, range: &KeyRange, group: GroupId) {
        if let KeyRange::Single(key) = range {
            if let Some(groups) = self.single.get_mut(key) {
                groups.retain(|other| *other != group);
                if groups.is_empty() {
                    self.single.remove(key);
                }
            }
            return;
        }
        if let Some(position) = self.recent.iter().position(|interval| interval.group == group) {
            self.recent.swap_remove(position);
            return;
        }
        let at = self.tree.partition_point(|node| node.interval.order() < (range.start(), group));
        if let Some(node) = self.tree.get_mut(at).filter(|node| node.interval.order() == (range.start(), group)) {
            node.interval.removed = true;
            self.dead += 1;
        }
        if self.dead > RECENT_MIN + self.tree.len() / 2 {
            self.rebuild();
        }
    }

    fn rebuild(&mut self) {
        self.tree.retain(|node| !node.interval.removed);
        self.dead = 0;
        self.merge_recent();
        if self.tree.capacity() > SPARE_FACTOR_MAX * self.tree.len() + RECENT_MIN {
            self.tree.shrink_to(2 * self.tree.len());
        }
        set_end_max(&mut self.tree);
    }

    /// Puts the recent ones where they belong in the tree, from the greatest on: in its own memory, because a tree is rebuilt very often
    /// while it grows.
    fn merge_recent(&mut self) {
        self.recent.sort_unstable_by(|a, b| a.order().cmp(&b.order()));
        let mut old = self.tree.len();
        let mut free = old + self.recent.len();
        self.tree.resize_with(free, Node::placeholder);
        while let Some(interval) = self.recent.pop() {
            while old > 0 && self.tree[old - 1].interval.order() > interval.order() {
                self.tree.swap(old - 1, free - 1);
                (old, free) = (old - 1, free - 1);
            }
            free -= 1;
            self.tree[free].interval = interval;
        }
        assert_eq!(old, free, "each has its place");
    }

    /// Calls `visit` with every group that covers `key`, in no particular order.
    pub(crate) fn covering(&self, key: &[u8], mut visit: impl FnMut(GroupId)) {
        if let Some(groups) = self.single.get(key) {
            groups.iter().copied().for_each(&mut visit);
        }
        for interval in &self.recent {
            if interval.contains(key) {
                visit(interval.group);
            }
        }
        stab(&self.tree, key, &mut visit);
    }
}

/// Fills `end_max` of the subtree that is this slice, rooted at its middle.
fn set_end_max(nodes: &mut [Node]) -> Option<Option<Bytes>> {
    let middle = nodes.len() / 2;
    let (left, rest) = nodes.split_at_mut(middle);
    let (root, right) = rest.split_first_mut()?;
    let mut end_max = root.interval.end.clone();
    for child in [set_end_max(left), set_end_max(right)].into_iter().flatten() {
        end_max = match (end_max, child) {
            (Some(a), Some(b)) => Some(a.max(b)),
            (None, _) | (_, None) => None,
        };
    }
    root.end_max = end_max.clone();
    Some(end_max)
}

fn stab(nodes: &[Node], key: &[u8], visit: &mut impl FnMut(GroupId)) {
    let (left, rest) = nodes.split_at(nodes.len() / 2);
    let Some((root, right)) = rest.split_first() else { return };
    if !ends_after(&root.end_max, key) {
        return;
    }
    stab(left, key, visit);
    if root.interval.start <= key {
        if !root.interval.removed && root.interval.contains(key) {
            visit(root.interval.group);
        }
        stab(right, key, visit);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn range() -> impl Strategy<Value = KeyRange> {
        (0u8..12, 0u8..12, 0u8..3).prop_map(|(start, end, kind)| {
            let (start, end) = (Bytes::copy_from_slice(&[start]), Bytes::copy_from_slice(&[end]));
            match kind {
                0 => KeyRange::Single(start),
                1 => KeyRange::HalfOpen { start, end },
                _ => KeyRange::From(start),
            }
        })
    }

    proptest! {
        #[test]
        fn covering_finds_what_a_search_of_all_finds(
            steps in prop::collection::vec((range(), any::<prop::sample::Index>(), any::<bool>()), 0..300),
        ) {
            let mut index = RangeIndex::default();
            let mut all: Vec<(KeyRange, GroupId)> = Vec::new();
            for (group, (range, victim, remove)) in steps.into_iter().enumerate() {
                if remove && !all.is_empty() {
                    let (range, group) = all.swap_remove(victim.index(all.len()));
                    index.remove(&range, group);
                } else {
                    index.insert(&range, group);
                    all.push((range, group));
                }
            }
            for key in 0u8..13 {
                let mut found = Vec::new();
                index.covering(&[key], |group| found.push(group));
                found.sort_unstable();
                let mut expected: Vec<_> = all.iter().filter(|(range, _)| range.contains(&[key])).map(|(_, group)| *group).collect();
                expected.sort_unstable();
                prop_assert_eq!(found, expected);
            }
        }
    }
}
