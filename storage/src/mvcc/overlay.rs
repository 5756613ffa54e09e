//! Changes not yet written, read together with what is.
//!
//! One overlay lives as long as one apply batch: many commands of many tenants. It keeps changes sorted, which is also the
//! order in which the engine takes them fastest.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::ops::Bound;

use bytes::Bytes;

use crate::engine::{Batch, Cursor, Family, Reader};
use crate::error::Fault;
use crate::limits::ROW_WORK_BYTES;

/// A reader and the changes on top of it.
pub(crate) struct Overlay<R> {
    base: R,
    batch: Batch,
    /// What each changed key held before, while a txn that may have to be taken back runs.
    journal: Option<Vec<Undo>>,
    /// Rows asked for so far, and large ones more than once ([`ROW_WORK_BYTES`]): a measure of work that is equal on all members,
    /// as time is not. Reads that only some members make go through [`Overlay::uncounted`].
    visited: Cell<u64>,
    /// Of keys and values put, also of those that were put again or taken back.
    written_bytes: usize,
}

struct Undo {
    family: Family,
    key: Vec<u8>,
    /// `None`: the batch did not mention the key.
    before: Option<Option<Bytes>>,
}

impl<R: Reader> Overlay<R> {
    pub(crate) fn new(base: R) -> Self {
        Overlay { base, batch: Batch::default(), journal: None, visited: Cell::new(0), written_bytes: 0 }
    }

    pub(crate) fn put(&mut self, family: Family, key: Vec<u8>, value: Bytes) {
        self.remember(family, &key);
        self.written_bytes += key.len() + value.len();
        self.batch.put(family, key, value);
    }

    pub(crate) fn delete(&mut self, family: Family, key: Vec<u8>) {
        self.remember(family, &key);
        self.batch.delete(family, key);
    }

    /// Deletes every row in `[lower, upper)`, in every family. Must not be asked for what lies there afterwards.
    pub(crate) fn clear_range(&mut self, lower: Vec<u8>, upper: Vec<u8>) {
        assert!(self.journal.is_none(), "no txn deletes ranges of rows");
        self.batch.clear_range(lower, upper);
    }

    fn remember(&mut self, family: Family, key: &[u8]) {
        if let Some(journal) = &mut self.journal {
            let before = self.batch.changes(family).get(key).cloned();
            journal.push(Undo { family, key: key.to_vec(), before });
        }
    }

    /// From here on, changes can be taken back by [`Overlay::roll_back`].
    pub(crate) fn begin(&mut self) {
        assert!(self.journal.is_none(), "one undo journal at a time");
        self.journal = Some(Vec::new());
    }

    /// Keeps the changes since [`Overlay::begin`].
    pub(crate) fn keep(&mut self) {
        self.journal = None;
    }

    /// Takes back the changes since [`Overlay::begin`].
    pub(crate) fn roll_back(&mut self) {
        for undo in self.journal.take().into_iter().flatten().rev() {
            self.batch.restore(undo.family, undo.key, undo.before);
        }
    }

    /// Rows that reads through this overlay have visited; what is large counts as several.
    pub(crate) fn visited_rows(&self) -> u64 {
        self.visited.get()
    }

    /// Bytes put so far.
    pub(crate) fn written_bytes(&self) -> usize {
        self.written_bytes
    }

    /// Reads without counting: for what a member reads because of its own watchers.
    pub(crate) fn uncounted<T>(&self, read: impl FnOnce(&Self) -> T) -> T {
        let visited = self.visited.get();
        let found = read(self);
        self.visited.set(visited);
        found
    }

    pub(crate) fn into_batch(self) -> Batch {
        self.batch
    }
}

impl<R: Reader> Reader for Overlay<R> {
    type Cursor<'a>
        = OverlayCursor<'a, R::Cursor<'a>>
    where
        Self: 'a;

    fn get(&self, family: Family, key: &[u8]) -> Result<Option<Bytes>, Fault> {
        let found = match self.batch.changes(family).get(key) {
            Some(change) => change.clone(),
            None => self.base.get(family, key)?,
        };
        visit(&self.visited, found.as_deref());
        Ok(found)
    }

    fn cursor(&self, family: Family, lower: &[u8], upper: &[u8]) -> Result<Self::Cursor<'_>, Fault> {
        let mut cursor = OverlayCursor {
            base: self.base.cursor(family, lower, upper)?,
            changes: self.batch.changes(family),
            change: None,
            upper: upper.to_vec(),
            visited: &self.visited,
        };
        cursor.stand_on_change(Bound::Included(lower));
        cursor.skip_hidden()?;
        visit(&self.visited, cursor.entry().map(|(_, value)| value));
        Ok(cursor)
    }
}

/// Counts a row, if there is one, or the look for it.
fn visit(visited: &Cell<u64>, value: Option<&[u8]>) {
    let bytes = value.map_or(0, <[u8]>::len) as u64;
    visited.update(|rows| rows + 1 + bytes / ROW_WORK_BYTES);
}

/// The smaller of two positions, where a change hides the entry below it.
pub(crate) struct OverlayCursor<'a, C> {
    base: C,
    changes: &'a BTreeMap<Vec<u8>, Option<Bytes>>,
    change: Option<(&'a [u8], Option<&'a [u8]>)>,
    upper: Vec<u8>,
    visited: &'a Cell<u64>,
}

impl<C: Cursor> OverlayCursor<'_, C> {
    fn stand_on_change(&mut self, from: Bound<&[u8]>) {
        let mut rest = self.changes.range::<[u8], _>((from, Bound::Unbounded));
        let next = rest.next().filter(|(key, _)| **key < self.upper);
        self.change = next.map(|(key, value)| (&key[..], value.as_deref()));
    }

    /// Moves on until the current entry is visible: not a delete, and no base entry hidden below a change.
    fn skip_hidden(&mut self) -> Result<(), Fault> {
        while let Some((key, value)) = self.change {
            match self.base.entry() {
                Some((below, _)) if below < key => return Ok(()),
                Some((below, _)) if below == key => self.base.advance()?,
                Some(_) | None if value.is_some() => return Ok(()),
                Some(_) | None => self.stand_on_change(Bound::Excluded(key)),
            }
        }
        Ok(())
    }

    fn stands_on_change(&self) -> bool {
        match (self.change, self.base.entry()) {
            (Some((key, _)), Some((below, _))) => key < below,
            (Some(_), None) => true,
            (None, _) => false,
        }
    }
}

impl<C: Cursor> Cursor for OverlayCursor<'_, C> {
    fn entry(&self) -> Option<(&[u8], &[u8])> {
        if self.stands_on_change() {
            self.change.and_then(|(key, value)| Some((key, value?)))
        } else {
            self.base.entry()
        }
    }

    fn advance(&mut self) -> Result<(), Fault> {
        if let Some((key, _)) = self.change.filter(|_| self.stands_on_change()) {
            self.stand_on_change(Bound::Excluded(key));
        } else {
            self.base.advance()?;
        }
        self.skip_hidden()?;
        visit(self.visited, self.entry().map(|(_, value)| value));
        Ok(())
    }

    fn seek(&mut self, to: &[u8]) -> Result<(), Fault> {
        if self.base.entry().is_some_and(|(key, _)| key < to) {
            self.base.seek(to)?;
        }
        if self.change.is_some_and(|(key, _)| key < to) {
            self.stand_on_change(Bound::Included(to));
        }
        self.skip_hidden()?;
        visit(self.visited, self.entry().map(|(_, value)| value));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::engine::{Engine, MemoryEngine};

    proptest! {
        /// The overlay over an engine reads as the engine with the changes written.
        #[test]
        fn reads_as_if_written(
            base in prop::collection::btree_map(0u8..20, any::<u8>(), 0..12),
            changes in prop::collection::vec((0u8..20, prop::option::of(any::<u8>())), 0..12),
            bounds in (0u8..21, 0u8..21), seeks in prop::collection::vec(any::<bool>(), 0..8),
        ) {
            let (layered, flat) = (MemoryEngine::new(), MemoryEngine::new());
            let mut batch = Batch::default();
            for (key, value) in &base {
                batch.put(Family::Kv, vec![*key], Bytes::copy_from_slice(&[*value]));
            }
            layered.write(&batch).unwrap();
            flat.write(&batch).unwrap();
            let mut overlay = Overlay::new(layered.view());
            let mut batch = Batch::default();
            for (key, value) in &changes {
                match value {
                    Some(value) => {
                        overlay.put(Family::Kv, vec![*key], Bytes::copy_from_slice(&[*value]));
                        batch.put(Family::Kv, vec![*key], Bytes::copy_from_slice(&[*value]));
                    }
                    None => {
                        overlay.delete(Family::Kv, vec![*key]);
                        batch.delete(Family::Kv, vec![*key]);
                    }
                }
            }
            flat.write(&batch).unwrap();
            let view = flat.view();
            let mut a = overlay.cursor(Family::Kv, &[bounds.0], &[bounds.1]).unwrap();
            let mut b = view.cursor(Family::Kv, &[bounds.0], &[bounds.1]).unwrap();
            prop_assert_eq!(a.entry(), b.entry());
            for seek in seeks.into_iter().chain(std::iter::repeat_n(false, 20)) {
                match b.entry().map(|(key, _)| key[0]) {
                    Some(key) if seek => {
                        a.seek(&[key + 2]).unwrap();
                        b.seek(&[key + 2]).unwrap();
                    }
                    _ => {
                        a.advance().unwrap();
                        b.advance().unwrap();
                    }
                }
                prop_assert_eq!(a.entry(), b.entry());
            }
        }

        #[test]
        fn roll_back_restores_the_batch(
            before in prop::collection::vec((0u8..6, prop::option::of(any::<u8>())), 0..8),
            after in prop::collection::vec((0u8..6, prop::option::of(any::<u8>())), 0..8),
        ) {
            let engine = MemoryEngine::new();
            let mut overlay = Overlay::new(engine.view());
            let run = |overlay: &mut Overlay<_>, changes: &[(u8, Option<u8>)]| {
                for (key, value) in changes {
                    match value {
                        Some(value) => overlay.put(Family::Rev, vec![*key], Bytes::copy_from_slice(&[*value])),
                        None => overlay.delete(Family::Rev, vec![*key]),
                    }
                }
            };
            run(&mut overlay, &before);
            let expected = overlay.batch.changes(Family::Rev).clone();
            overlay.begin();
            run(&mut overlay, &after);
            overlay.roll_back();
            prop_assert_eq!(overlay.batch.changes(Family::Rev), &expected);
        }
    }
}
