//! Two engines that must agree on everything: every read is answered by both and compared.

use std::path::Path;

use bytes::Bytes;

use super::{Batch, Cursor, Engine, Family, IsRight, Reader};
use crate::error::Fault;

/// Writes to both engines and panics as soon as a read differs.
pub struct Mirror<A, B>(pub A, pub B);

impl<A: Engine, B: Engine> Engine for Mirror<A, B> {
    type View<'a> = MirrorView<A::View<'a>, B::View<'a>>;

    fn view(&self) -> Self::View<'_> {
        MirrorView(self.0.view(), self.1.view())
    }

    fn latest(&self, family: Family, key: &[u8]) -> Result<Option<Bytes>, Fault> {
        let (a, b) = (self.0.latest(family, key)?, self.1.latest(family, key)?);
        assert_eq!(a, b, "engines differ at {family:?} {key:02x?}");
        Ok(a)
    }

    fn write(&self, batch: &Batch) -> Result<(), Fault> {
        self.0.write(batch)?;
        self.1.write(batch)
    }

    fn flush(&self) -> Result<(), Fault> {
        self.0.flush()?;
        self.1.flush()
    }

    fn begin_flush(&self) -> Result<(), Fault> {
        self.0.begin_flush()?;
        self.1.begin_flush()
    }

    fn durable_get(&self, family: Family, key: &[u8]) -> Result<Option<Bytes>, Fault> {
        // An engine may flush on its own, so durability is a lower bound and not compared.
        self.0.durable_get(family, key)
    }

    fn compact(&self) -> Result<(), Fault> {
        self.0.compact()?;
        self.1.compact()
    }

    fn give_back(&self, lower: &[u8], upper: &[u8]) -> Result<(), Fault> {
        self.0.give_back(lower, upper)?;
        self.1.give_back(lower, upper)
    }

    fn stop_compacting(&self) {
        self.0.stop_compacting();
        self.1.stop_compacting();
    }

    fn disk_bytes(&self) -> u64 {
        self.0.disk_bytes()
    }

    fn checkpoint(&self, dir: &Path, family: Family, key: &[u8]) -> Result<Option<Bytes>, Fault> {
        std::fs::create_dir(dir)?;
        let (a, b) = (self.0.checkpoint(&dir.join("a"), family, key)?, self.1.checkpoint(&dir.join("b"), family, key)?);
        assert_eq!(a, b, "nothing is written meanwhile");
        Ok(a)
    }

    fn replace(&self, dir: &Path, is_right: &IsRight<'_>) -> Result<(), Fault> {
        self.0.replace(&dir.join("a"), is_right)?;
        self.1.replace(&dir.join("b"), is_right)
    }
}

pub struct MirrorView<A, B>(A, B);

impl<A: Reader, B: Reader> Reader for MirrorView<A, B> {
    type Cursor<'c>
        = MirrorCursor<A::Cursor<'c>, B::Cursor<'c>>
    where
        Self: 'c;

    fn get(&self, family: Family, key: &[u8]) -> Result<Option<Bytes>, Fault> {
        let (a, b) = (self.0.get(family, key)?, self.1.get(family, key)?);
        assert_eq!(a, b, "get {family:?} {key:02x?}");
        Ok(a)
    }

    fn cursor(&self, family: Family, lower: &[u8], upper: &[u8]) -> Result<Self::Cursor<'_>, Fault> {
        let cursor = MirrorCursor(self.0.cursor(family, lower, upper)?, self.1.cursor(family, lower, upper)?);
        cursor.compare();
        Ok(cursor)
    }
}

pub struct MirrorCursor<A, B>(A, B);

impl<A: Cursor, B: Cursor> MirrorCursor<A, B> {
    fn compare(&self) {
        assert_eq!(self.0.entry(), self.1.entry(), "cursor position");
    }
}

impl<A: Cursor, B: Cursor> Cursor for MirrorCursor<A, B> {
    fn entry(&self) -> Option<(&[u8], &[u8])> {
        self.0.entry()
    }

    fn advance(&mut self) -> Result<(), Fault> {
        self.0.advance()?;
        self.1.advance()?;
        self.compare();
        Ok(())
    }

    fn seek(&mut self, key: &[u8]) -> Result<(), Fault> {
        self.0.seek(key)?;
        self.1.seek(key)?;
        self.compare();
        Ok(())
    }
}
