//! The seam to the disk: ordered bytes in a few families, point-in-time reads, atomic batches.
//!
//! An engine knows nothing of tenants, revisions or keys. Two exist: [`RocksEngine`] for production and
//! [`MemoryEngine`], its model in tests and the disk of simulations. They must answer every call alike; tests run
//! them side by side as a [`Mirror`](crate::engine::mirror).
//!
//! Durability. [`Engine::write`] is atomic but not durable: the raft log is this state's write-ahead log. [`Engine::flush`]
//! makes everything written before it durable. After a crash the engine holds the effect of some prefix of the batches,
//! at least all those before the last flush, and never part of one.

mod memory;
pub mod mirror;
#[cfg(feature = "rocksdb")]
mod removal;
#[cfg(feature = "rocksdb")]
mod rocks;

use std::collections::BTreeMap;
use std::path::Path;

use bytes::Bytes;

pub use self::memory::MemoryEngine;
#[cfg(feature = "rocksdb")]
pub use self::rocks::{RocksEngine, RocksLog, RocksOptions};
use crate::error::Fault;

/// A column family. The names are persisted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Family {
    Kv,
    Head,
    Rev,
    Lease,
    Meta,
}

impl Family {
    pub const ALL: [Family; 5] = [Family::Kv, Family::Head, Family::Rev, Family::Lease, Family::Meta];

    /// The name on disk.
    pub fn name(self) -> &'static str {
        match self {
            Family::Kv => "kv",
            Family::Head => "head",
            Family::Rev => "rev",
            Family::Lease => "lease",
            Family::Meta => "meta",
        }
    }

    fn index(self) -> usize {
        self as usize
    }
}

/// Ordered bytes at one point in time.
pub trait Reader {
    type Cursor<'a>: Cursor
    where
        Self: 'a;

    /// The value at `key`, if any.
    ///
    /// # Errors
    /// Any [`Fault`] means the data on this member cannot be trusted or reached.
    fn get(&self, family: Family, key: &[u8]) -> Result<Option<Bytes>, Fault>;

    /// A cursor over `[lower, upper)`, standing on the first entry. Empty when `lower >= upper`.
    ///
    /// # Errors
    /// As [`Reader::get`].
    fn cursor(&self, family: Family, lower: &[u8], upper: &[u8]) -> Result<Self::Cursor<'_>, Fault>;
}

/// A position in an ordered range. Moves forward only.
pub trait Cursor {
    /// The entry it stands on; `None` behind the last one, where it stays.
    fn entry(&self) -> Option<(&[u8], &[u8])>;

    /// Moves to the following entry.
    ///
    /// # Errors
    /// As [`Reader::get`]; the cursor must not be used after one.
    fn advance(&mut self) -> Result<(), Fault>;

    /// Moves to the first entry `>= key` inside the bounds. `key` must not lie before the current entry.
    ///
    /// # Errors
    /// As [`Cursor::advance`].
    fn seek(&mut self, key: &[u8]) -> Result<(), Fault>;
}

/// See the module's essay.
pub trait Engine: Send + Sync + 'static {
    type View<'a>: Reader
    where
        Self: 'a;

    /// Everything written so far, unmoved by later writes for as long as it lives.
    fn view(&self) -> Self::View<'_>;

    /// The value at `key` now, if any: cheaper than a view for who needs no two values of one moment.
    ///
    /// # Errors
    /// As [`Reader::get`].
    fn latest(&self, family: Family, key: &[u8]) -> Result<Option<Bytes>, Fault>;

    /// Applies the batch atomically. Visible on return, not durable.
    ///
    /// # Errors
    /// After any [`Fault`] the caller must stop using the engine: it cannot know what was written.
    fn write(&self, batch: &Batch) -> Result<(), Fault>;

    /// Makes all earlier writes durable.
    ///
    /// # Errors
    /// As [`Engine::write`].
    fn flush(&self) -> Result<(), Fault>;

    /// Starts making all earlier writes durable. Nobody waits for it; [`Engine::durable_get`] sees when it is done.
    ///
    /// # Errors
    /// As [`Engine::write`].
    fn begin_flush(&self) -> Result<(), Fault>;

    /// The value a crash right now would leave at `key`. Slow path: asked once per log truncation.
    ///
    /// # Errors
    /// As [`Reader::get`].
    fn durable_get(&self, family: Family, key: &[u8]) -> Result<Option<Bytes>, Fault>;

    /// Rewrites the data without what was deleted. Reads and writes go on meanwhile.
    ///
    /// # Errors
    /// As [`Engine::write`].
    fn compact(&self) -> Result<(), Fault>;

    /// Gives back the space of `[lower, upper)` of every family, in which nothing is left; what there should be is cleared. Views that were
    /// opened before see what they saw.
    ///
    /// # Errors
    /// As [`Engine::write`].
    fn give_back(&self, lower: &[u8], upper: &[u8]) -> Result<(), Fault>;

    /// Ends what [`Engine::compact`] and [`Engine::give_back`] are doing: they return soon, with their work half done, which is as good as
    /// not begun. For an engine that is flushed and not written to any more.
    fn stop_compacting(&self);

    /// Bytes of all files on disk; 0 for an engine without any.
    fn disk_bytes(&self) -> u64;

    /// Writes a copy of the data, at some point in time, to the new directory `dir` on the same file system. Durable on return.
    /// Reads and writes go on meanwhile. Gives what the copy has at `key`: how the caller learns which moment it is of.
    ///
    /// # Errors
    /// Any [`Fault`] means that there is no copy; the engine goes on.
    fn checkpoint(&self, dir: &Path, family: Family, key: &[u8]) -> Result<Option<Bytes>, Fault>;

    /// Replaces the data by a copy that [`Engine::checkpoint`] wrote, and takes its directory over, if `is_right` says of the copy
    /// that it is the expected one. Views made before go on seeing the old data. Durable on return; after a crash, or an error, the
    /// engine has the old data or the new.
    ///
    /// # Errors
    /// As [`Engine::write`], and what `is_right` says.
    fn replace(&self, dir: &Path, is_right: &IsRight<'_>) -> Result<(), Fault>;
}

/// Looks at a copy before it takes the place of the data: gets its row of one key, of any family.
pub type IsRight<'a> = dyn Fn(&GetRow<'_>) -> Result<(), Fault> + 'a;

/// The row of a key.
pub type GetRow<'a> = dyn Fn(Family, &[u8]) -> Result<Option<Bytes>, Fault> + 'a;

/// Changes that reach the engine together or not at all. The last change of a key wins.
#[derive(Debug, Default)]
pub struct Batch {
    families: [BTreeMap<Vec<u8>, Option<Bytes>>; Family::ALL.len()],
    cleared: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Batch {
    pub fn put(&mut self, family: Family, key: Vec<u8>, value: Bytes) {
        self.families[family.index()].insert(key, Some(value));
    }

    pub fn delete(&mut self, family: Family, key: Vec<u8>) {
        self.families[family.index()].insert(key, None);
    }

    /// Puts a key back to what [`Batch::changes`] once said of it; `None`: it was not mentioned.
    pub(crate) fn restore(&mut self, family: Family, key: Vec<u8>, before: Option<Option<Bytes>>) {
        match before {
            Some(change) => self.families[family.index()].insert(key, change),
            None => self.families[family.index()].remove(&key),
        };
    }

    /// Deletes every key in `[lower, upper)` of every family, those that this batch has put so far among them.
    pub fn clear_range(&mut self, lower: Vec<u8>, upper: Vec<u8>) {
        for changes in &mut self.families {
            let mut inside = changes.split_off(&lower);
            changes.append(&mut inside.split_off(&upper));
        }
        self.cleared.push((lower, upper));
    }

    /// The ranges that are deleted, in every family, before the changes of single keys.
    pub fn cleared(&self) -> &[(Vec<u8>, Vec<u8>)] {
        &self.cleared
    }

    pub fn is_empty(&self) -> bool {
        self.families.iter().all(BTreeMap::is_empty) && self.cleared.is_empty()
    }

    pub fn clear(&mut self) {
        self.families.iter_mut().for_each(BTreeMap::clear);
        self.cleared.clear();
    }

    /// The changes of one family in key order; `None` is a delete.
    pub fn changes(&self, family: Family) -> &BTreeMap<Vec<u8>, Option<Bytes>> {
        &self.families[family.index()]
    }
}
