//! The engine of tests and simulations: sorted maps, copied only when a view still looks at them.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use parking_lot::RwLock;

use super::{Batch, Cursor, Engine, Family, IsRight, Reader};
use crate::codec::{self, Writer};
use crate::error::Fault;

/// The file that a checkpoint is.
const CHECKPOINT: &str = "rows";

type Maps = [BTreeMap<Vec<u8>, Bytes>; Family::ALL.len()];

/// Ordered bytes in memory, with the crash behaviour of a disk: [`MemoryEngine::crash`] forgets what was not flushed.
#[derive(Debug, Default)]
pub struct MemoryEngine {
    state: RwLock<State>,
}

#[derive(Debug, Default)]
struct State {
    current: Arc<Maps>,
    durable: Arc<Maps>,
}

impl MemoryEngine {
    pub fn new() -> Self {
        Self::default()
    }

    /// What power loss leaves: exactly what was flushed.
    pub fn crash(&self) {
        let mut state = self.state.write();
        state.current = Arc::clone(&state.durable);
    }
}

impl Engine for MemoryEngine {
    type View<'a> = MemoryView;

    fn view(&self) -> MemoryView {
        MemoryView(Arc::clone(&self.state.read().current))
    }

    fn latest(&self, family: Family, key: &[u8]) -> Result<Option<Bytes>, Fault> {
        Ok(self.state.read().current[family.index()].get(key).cloned())
    }

    fn write(&self, batch: &Batch) -> Result<(), Fault> {
        let mut state = self.state.write();
        let maps = Arc::make_mut(&mut state.current);
        for family in Family::ALL {
            let map = &mut maps[family.index()];
            for (lower, upper) in batch.cleared() {
                let mut inside = map.split_off(lower);
                map.append(&mut inside.split_off(upper));
            }
            for (key, value) in batch.changes(family) {
                match value {
                    Some(value) => map.insert(key.clone(), value.clone()),
                    None => map.remove(key),
                };
            }
        }
        Ok(())
    }

    fn flush(&self) -> Result<(), Fault> {
        let mut state = self.state.write();
        state.durable = Arc::clone(&state.current);
        Ok(())
    }

    fn begin_flush(&self) -> Result<(), Fault> {
        self.flush()
    }

    fn durable_get(&self, family: Family, key: &[u8]) -> Result<Option<Bytes>, Fault> {
        Ok(self.state.read().durable[family.index()].get(key).cloned())
    }

    fn compact(&self) -> Result<(), Fault> {
        Ok(())
    }

    fn stop_compacting(&self) {}

    fn give_back(&self, lower: &[u8], upper: &[u8]) -> Result<(), Fault> {
        let mut cleared = Batch::default();
        cleared.clear_range(lower.to_vec(), upper.to_vec());
        self.write(&cleared)
    }

    fn disk_bytes(&self) -> u64 {
        0
    }

    /// One file, with every family's rows one after the other.
    fn checkpoint(&self, dir: &Path, family: Family, key: &[u8]) -> Result<Option<Bytes>, Fault> {
        let maps = Arc::clone(&self.state.read().current);
        let mut w = Writer::with_capacity(1 << 16);
        for map in &*maps {
            w.varint(map.len() as u64);
            for (key, value) in map {
                w.bytes(key);
                w.bytes(value);
            }
        }
        std::fs::create_dir(dir)?;
        std::fs::write(dir.join(CHECKPOINT), w.finish())?;
        Ok(maps[family.index()].get(key).cloned())
    }

    fn replace(&self, dir: &Path, is_right: &IsRight<'_>) -> Result<(), Fault> {
        let mut r = codec::Reader::new(std::fs::read(dir.join(CHECKPOINT))?.into(), "checkpoint");
        let mut maps = Maps::default();
        for map in &mut maps {
            map.extend(r.list(|r| Ok((r.bytes()?.to_vec(), r.bytes()?)))?);
        }
        r.end()?;
        is_right(&|family, key| Ok(maps[family.index()].get(key).cloned()))?;
        let maps = Arc::new(maps);
        *self.state.write() = State { current: Arc::clone(&maps), durable: maps };
        Ok(std::fs::remove_dir_all(dir)?)
    }
}

/// A frozen copy of all families.
pub struct MemoryView(Arc<Maps>);

impl Reader for MemoryView {
    type Cursor<'a> = MemoryCursor<'a>;

    fn get(&self, family: Family, key: &[u8]) -> Result<Option<Bytes>, Fault> {
        Ok(self.0[family.index()].get(key).cloned())
    }

    fn cursor(&self, family: Family, lower: &[u8], upper: &[u8]) -> Result<MemoryCursor<'_>, Fault> {
        let mut cursor = MemoryCursor { map: &self.0[family.index()], upper: upper.to_vec(), entry: None };
        cursor.stand_on(Bound::Included(lower));
        Ok(cursor)
    }
}

pub struct MemoryCursor<'a> {
    map: &'a BTreeMap<Vec<u8>, Bytes>,
    upper: Vec<u8>,
    entry: Option<(&'a [u8], &'a [u8])>,
}

impl MemoryCursor<'_> {
    fn stand_on(&mut self, from: Bound<&[u8]>) {
        let mut rest = self.map.range::<[u8], _>((from, Bound::Unbounded));
        self.entry = rest.next().filter(|(key, _)| **key < self.upper).map(|(key, value)| (&key[..], &value[..]));
    }
}

impl Cursor for MemoryCursor<'_> {
    fn entry(&self) -> Option<(&[u8], &[u8])> {
        self.entry
    }

    fn advance(&mut self) -> Result<(), Fault> {
        if let Some((key, _)) = self.entry {
            self.stand_on(Bound::Excluded(key));
        }
        Ok(())
    }

    fn seek(&mut self, key: &[u8]) -> Result<(), Fault> {
        if let Some((current, _)) = self.entry {
            assert!(current <= key, "a cursor moves forward only");
            self.stand_on(Bound::Included(key));
        }
        Ok(())
    }
}
