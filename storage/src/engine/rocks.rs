//! The production engine, and the only file that names rocksdb.
//!
//! No write-ahead log: the raft log is replayed instead. So a flush must move all families together (`atomic_flush`),
//! else a crash could leave half a batch. Old bytes are compressed with lz4 and, at the bottom, zstd.

use std::path::Path;

use bytes::Bytes;
use rocksdb::{
    BlockBasedOptions, BottommostLevelCompaction, Cache, ColumnFamily, ColumnFamilyDescriptor, CompactOptions, DB,
    DBCompressionType, DBRawIterator, Env, FlushOptions, Options, ReadOptions, ReadTier, Snapshot, WriteBatch,
    WriteOptions,
};

use super::{Batch, Cursor, Engine, Family, Reader};
use crate::error::Fault;

/// Memory and threads of one engine.
#[derive(Clone, Debug)]
pub struct RocksOptions {
    /// Uncompressed blocks kept in memory, indexes and filters included. Default 128 MiB.
    pub block_cache_bytes: usize,
    /// Writes kept in memory, all families together, before they are flushed. Default 64 MiB.
    pub write_buffer_bytes: usize,
    /// Threads for flushes and engine compactions. Default 2.
    pub background_threads: i32,
}

impl Default for RocksOptions {
    fn default() -> Self {
        RocksOptions { block_cache_bytes: 128 << 20, write_buffer_bytes: 64 << 20, background_threads: 2 }
    }
}

/// See the module's essay.
pub struct RocksEngine {
    db: DB,
    no_wal: WriteOptions,
}

impl RocksEngine {
    /// Opens or creates the database in `dir`.
    ///
    /// # Errors
    /// [`Fault::Engine`] in RocksDB's words, for instance when another process holds the directory.
    pub fn open(dir: &Path, options: &RocksOptions) -> Result<Self, Fault> {
        let cache = Cache::new_lru_cache(options.block_cache_bytes);
        let families = Family::ALL.map(|family| {
            ColumnFamilyDescriptor::new(family.name(), family_options(family, &cache, options.write_buffer_bytes))
        });
        let mut env = Env::new().map_err(fault)?;
        // Requests go first: whoever waits for a flush or an engine compaction has time, and both are bounded in what they hold.
        env.lower_thread_pool_cpu_priority();
        env.lower_high_priority_thread_pool_cpu_priority();
        let mut database = database_options(options);
        database.set_env(&env);
        let db = DB::open_cf_descriptors(&database, dir, families).map_err(fault)?;
        let mut no_wal = WriteOptions::default();
        no_wal.disable_wal(true);
        Ok(RocksEngine { db, no_wal })
    }

    fn flush_all(&self, wait: bool) -> Result<(), Fault> {
        let mut options = FlushOptions::default();
        options.set_wait(wait);
        let handles = Family::ALL.map(|family| self.handle(family));
        self.db.flush_cfs_opt(&handles, &options).map_err(fault)
    }

    fn handle(&self, family: Family) -> &ColumnFamily {
        self.db.cf_handle(family.name()).expect("every family was created at open")
    }
}

fn database_options(options: &RocksOptions) -> Options {
    let mut db = Options::default();
    db.create_if_missing(true);
    db.create_missing_column_families(true);
    db.set_atomic_flush(true);
    db.set_db_write_buffer_size(options.write_buffer_bytes);
    db.set_max_background_jobs(options.background_threads);
    db.set_max_open_files(512);
    db.set_keep_log_file_num(2);
    db.set_max_total_wal_size(1 << 20);
    // Files reach the disk while they are written, not all at once when they are synced: the log's syncs wait behind that.
    db.set_bytes_per_sync(1 << 20);
    db
}

fn family_options(family: Family, cache: &Cache, write_buffer_bytes: usize) -> Options {
    let mut table = BlockBasedOptions::default();
    table.set_block_cache(cache);
    table.set_cache_index_and_filter_blocks(true);
    table.set_pin_l0_filter_and_index_blocks_in_cache(true);
    table.set_format_version(6);
    table.set_block_size(16 << 10);
    // Point look-ups happen by full key in every family but kv, which is only scanned.
    if family != Family::Kv {
        table.set_bloom_filter(10.0, false);
        table.set_optimize_filters_for_memory(true);
    }
    let mut cf = Options::default();
    cf.set_block_based_table_factory(&table);
    cf.set_compression_type(DBCompressionType::Lz4);
    cf.set_bottommost_compression_type(DBCompressionType::Zstd);
    cf.set_write_buffer_size(write_buffer_bytes / 2);
    cf.set_level_compaction_dynamic_level_bytes(true);
    cf
}

fn fault(error: rocksdb::Error) -> Fault {
    Fault::Engine(error.into_string())
}

impl Engine for RocksEngine {
    type View<'a> = RocksView<'a>;

    fn view(&self) -> RocksView<'_> {
        RocksView { engine: self, snapshot: self.db.snapshot() }
    }

    fn write(&self, batch: &Batch) -> Result<(), Fault> {
        let mut writes = WriteBatch::default();
        for family in Family::ALL {
            let handle = self.handle(family);
            for (key, value) in batch.changes(family) {
                match value {
                    Some(value) => writes.put_cf(handle, key, value),
                    None => writes.delete_cf(handle, key),
                }
            }
        }
        self.db.write_opt(writes, &self.no_wal).map_err(fault)
    }

    fn flush(&self) -> Result<(), Fault> {
        self.flush_all(true)
    }

    fn begin_flush(&self) -> Result<(), Fault> {
        self.flush_all(false)
    }

    fn durable_get(&self, family: Family, key: &[u8]) -> Result<Option<Bytes>, Fault> {
        let mut persisted = ReadOptions::default();
        persisted.set_read_tier(ReadTier::Persisted);
        let value = self.db.get_pinned_cf_opt(self.handle(family), key, &persisted).map_err(fault)?;
        Ok(value.map(|value| Bytes::copy_from_slice(&value)))
    }

    fn compact(&self) -> Result<(), Fault> {
        self.flush()?;
        let mut whole = CompactOptions::default();
        whole.set_exclusive_manual_compaction(false);
        whole.set_bottommost_level_compaction(BottommostLevelCompaction::ForceOptimized);
        for family in Family::ALL {
            self.db.compact_range_cf_opt(self.handle(family), None::<&[u8]>, None::<&[u8]>, &whole);
        }
        Ok(())
    }

    fn disk_bytes(&self) -> u64 {
        let size =
            |family| self.db.property_int_value_cf(self.handle(family), rocksdb::properties::TOTAL_SST_FILES_SIZE);
        Family::ALL.into_iter().filter_map(|family| size(family).ok().flatten()).sum()
    }
}

/// A RocksDB snapshot with the engine it belongs to.
pub struct RocksView<'a> {
    engine: &'a RocksEngine,
    snapshot: Snapshot<'a>,
}

impl RocksView<'_> {
    fn read_options(&self) -> ReadOptions {
        let mut options = ReadOptions::default();
        options.set_snapshot(&self.snapshot);
        options
    }
}

impl Reader for RocksView<'_> {
    type Cursor<'c>
        = RocksCursor<'c>
    where
        Self: 'c;

    fn get(&self, family: Family, key: &[u8]) -> Result<Option<Bytes>, Fault> {
        let handle = self.engine.handle(family);
        let value = self.engine.db.get_pinned_cf_opt(handle, key, &self.read_options()).map_err(fault)?;
        Ok(value.map(|value| Bytes::copy_from_slice(&value)))
    }

    fn cursor(&self, family: Family, lower: &[u8], upper: &[u8]) -> Result<RocksCursor<'_>, Fault> {
        // RocksDB takes reversed bounds for a mistake of the caller's; here they are an empty range.
        let upper = upper.max(lower);
        let mut options = self.read_options();
        options.set_iterate_upper_bound(upper);
        let mut iterator = self.engine.db.raw_iterator_cf_opt(self.engine.handle(family), options);
        iterator.seek(lower);
        let mut cursor = RocksCursor { iterator, valid: false };
        cursor.settle()?;
        Ok(cursor)
    }
}

pub struct RocksCursor<'a> {
    iterator: DBRawIterator<'a>,
    valid: bool,
}

impl RocksCursor<'_> {
    fn settle(&mut self) -> Result<(), Fault> {
        self.valid = self.iterator.valid();
        if self.valid { Ok(()) } else { self.iterator.status().map_err(fault) }
    }
}

impl Cursor for RocksCursor<'_> {
    fn entry(&self) -> Option<(&[u8], &[u8])> {
        if self.valid { self.iterator.item() } else { None }
    }

    fn advance(&mut self) -> Result<(), Fault> {
        if self.valid {
            self.iterator.next();
            self.settle()?;
        }
        Ok(())
    }

    fn seek(&mut self, key: &[u8]) -> Result<(), Fault> {
        if self.valid {
            assert!(self.iterator.key().is_some_and(|current| current <= key), "a cursor moves forward only");
            self.iterator.seek(key);
            self.settle()?;
        }
        Ok(())
    }
}

/// A raft log in RocksDB, so that decision 0002 can be measured again. Only the bench uses it.
#[doc(hidden)]
pub struct RocksLog {
    db: DB,
    synced: WriteOptions,
}

impl RocksLog {
    /// # Errors
    /// As [`RocksEngine::open`].
    pub fn open(dir: &Path) -> Result<Self, Fault> {
        let mut options = Options::default();
        options.create_if_missing(true);
        options.set_write_buffer_size(64 << 20);
        options.set_recycle_log_file_num(2);
        options.set_compression_type(DBCompressionType::None);
        let mut synced = WriteOptions::default();
        synced.set_sync(true);
        Ok(RocksLog { db: DB::open(&options, dir).map_err(fault)?, synced })
    }

    /// Entry and hard state in one synced batch.
    ///
    /// # Errors
    /// As [`Engine::write`].
    pub fn append(&self, index: u64, entry: &[u8], hard_state: &[u8]) -> Result<(), Fault> {
        let mut batch = WriteBatch::default();
        batch.put([&b"e"[..], &index.to_be_bytes()].concat(), entry);
        batch.put(b"hs", hard_state);
        self.db.write_opt(batch, &self.synced).map_err(fault)
    }

    /// # Errors
    /// As [`Engine::write`].
    pub fn truncate(&self, through: u64) -> Result<(), Fault> {
        let mut batch = WriteBatch::default();
        batch.delete_range(
            [&b"e"[..], &0u64.to_be_bytes()].concat(),
            [&b"e"[..], &(through + 1).to_be_bytes()].concat(),
        );
        self.db.write_opt(batch, &self.synced).map_err(fault)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::MemoryEngine;

    /// Apply goes on writing while the state is made durable; were the flush to take only a part of the families, a crash would
    /// leave half a batch. So what is seen of it must be whole.
    #[test]
    fn a_flush_in_the_background_becomes_durable_whole() {
        fn check(engine: &impl Engine) {
            let mut batch = Batch::default();
            for family in Family::ALL {
                batch.put(family, b"k".to_vec(), Bytes::from_static(b"first"));
            }
            engine.write(&batch).unwrap();
            engine.begin_flush().unwrap();
            let durable = |family| engine.durable_get(family, b"k").unwrap();
            while durable(Family::Meta).is_none() {
                std::thread::yield_now();
            }
            assert!(Family::ALL.into_iter().all(|family| durable(family).is_some()));
            engine.begin_flush().unwrap();
        }
        let dir = tempfile::tempdir().unwrap();
        check(&RocksEngine::open(dir.path(), &RocksOptions::default()).unwrap());
        check(&MemoryEngine::default());
    }
}
