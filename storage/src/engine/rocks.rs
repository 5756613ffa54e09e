//! The production engine, and the only file that names rocksdb.
//!
//! No write-ahead log: the raft log is replayed instead. So a flush must move all families together (`atomic_flush`),
//! else a crash could leave half a batch. Old bytes are compressed with lz4 and, at the bottom, zstd.
//!
//! A snapshot of another member takes the place of the whole database: it is opened beside the old one, and a small file that
//! names the one in use is switched. Views that are open go on with the old one until they end.

use std::ffi::CStr;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use bytes::Bytes;
use rocksdb::checkpoint::Checkpoint;
use rocksdb::{
    BlockBasedOptions, BottommostLevelCompaction, Cache, ColumnFamily, ColumnFamilyDescriptor, CompactOptions, DB,
    DBCompressionType, DBRawIterator, Env, FlushOptions, Options, ReadOptions, ReadTier, Snapshot, WriteBatch,
    WriteOptions,
};
use self_cell::self_cell;

use super::removal::{REMOVED, Remover};
use super::{Batch, Cursor, Engine, Family, IsRight, Reader};
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
    current: ArcSwap<Database>,
    base: PathBuf,
    options: RocksOptions,
    no_wal: WriteOptions,
    /// Of reads without a view.
    latest: ReadOptions,
    /// Work that takes long ends.
    is_stopped: AtomicBool,
    _remover: Remover,
}

/// One database, open. Views hold on to it when another takes its place; its files go with the last of them.
struct Database {
    db: DB,
    // Behind it: files go when RocksDB has closed them.
    files: Files,
}

struct Files {
    /// Of the directory below the base; empty: the base itself.
    name: String,
    /// Set when another took its place: the base.
    superseded_in: OnceLock<PathBuf>,
}

impl Drop for Files {
    fn drop(&mut self) {
        if let Some(base) = self.superseded_in.get()
            && let Err(error) = remove_others(base, None, Some(&self.name))
        {
            tracing::warn!(%error, "remove the files of a replaced state; the next start does");
        }
    }
}

/// Names the directory of the database in use, as text. Without it that is the base directory itself: so it is until a copy
/// from elsewhere first replaces the data.
const ACTIVE: &str = "ACTIVE";
const ACTIVE_NEW: &str = "ACTIVE.new";

/// What the directories of databases that came from elsewhere are called, with a number behind it.
const NAME_PREFIX: &str = "db-";

/// RocksDB's words for what was ended with all its work in the background.
const STOPPED: &str = "Shutdown in progress";

/// RocksDB's name for the number of the oldest snapshot; 0: there is none.
const OLDEST_VIEW: &CStr = c"rocksdb.oldest-snapshot-sequence";

/// How long a cleared range's files wait for views from before that, and how often is looked.
const VIEWS_PATIENCE: Duration = Duration::from_secs(5);
const VIEWS_LOOK: Duration = Duration::from_millis(10);

impl RocksEngine {
    /// Opens or creates the database in `dir`.
    ///
    /// # Errors
    /// [`Fault::Engine`] in RocksDB's words, for instance when another process holds the directory.
    pub fn open(dir: &Path, options: &RocksOptions) -> Result<Self, Fault> {
        std::fs::create_dir_all(dir)?;
        let name = active_name(dir)?;
        remove_others(dir, Some(&name), None)?;
        let db = open_database(&dir.join(&name), options)?;
        let mut no_wal = WriteOptions::default();
        no_wal.disable_wal(true);
        let database = Database { db, files: Files { name, superseded_in: OnceLock::new() } };
        Ok(RocksEngine {
            current: ArcSwap::from_pointee(database),
            base: dir.to_path_buf(),
            options: options.clone(),
            no_wal,
            latest: ReadOptions::default(),
            is_stopped: AtomicBool::new(false),
            _remover: Remover::start(dir, NAME_PREFIX)?,
        })
    }

    fn current(&self) -> Arc<Database> {
        self.current.load_full()
    }

    fn rewrite(&self, range: Option<(&[u8], &[u8])>) -> Result<(), Fault> {
        self.flush_all(true)?;
        let mut whole = CompactOptions::default();
        whole.set_exclusive_manual_compaction(false);
        whole.set_bottommost_level_compaction(BottommostLevelCompaction::ForceOptimized);
        let current = self.current();
        let (lower, upper) = range.unzip();
        for family in Family::ALL {
            current.db.compact_range_cf_opt(current.handle(family), lower, upper, &whole);
        }
        Ok(())
    }

    /// Says again, durably, that a range was cleared, and removes the files that have keys of it alone, without reading them: a rewrite reads all
    /// there was. Not while somebody reads what was there, for longer than `patience`.
    ///
    /// What says that a range was cleared may itself be in such a file, and what it was said of in one that stays, because others have keys
    /// there or because the engine is about to rewrite it. So it is said before, where no file goes (the newest files stay), and once more
    /// after. What a crash in between brings back is cleared by the next attempt; nobody sees it, since the rows of [`Family::Meta`] that say
    /// that there is a tenant do not go this way.
    fn drop_files(&self, lower: &[u8], upper: &[u8], patience: Duration) -> Result<(), Fault> {
        let current = self.current();
        let mut cleared = Batch::default();
        cleared.clear_range(lower.to_vec(), upper.to_vec());
        self.write(&cleared)?;
        self.flush_all(true)?;
        let cleared_at = current.db.latest_sequence_number();
        let deadline = Instant::now() + patience;
        while current.oldest_view()?.is_some_and(|oldest| oldest < cleared_at) {
            if Instant::now() >= deadline {
                tracing::info!("files of a cleared range are rewritten, not removed: somebody has read them for long");
                return Ok(());
            }
            if self.is_stopped.load(Ordering::Acquire) {
                return Ok(());
            }
            std::thread::sleep(VIEWS_LOOK);
        }
        if self.is_stopped.load(Ordering::Acquire) {
            return Ok(());
        }
        for family in Family::ALL.into_iter().filter(|family| *family != Family::Meta) {
            current.db.delete_file_in_range_cf(current.handle(family), lower, upper).map_err(fault)?;
        }
        self.write(&cleared)
    }

    fn flush_all(&self, wait: bool) -> Result<(), Fault> {
        let mut options = FlushOptions::default();
        options.set_wait(wait);
        let current = self.current();
        let handles = Family::ALL.map(|family| current.handle(family));
        current.db.flush_cfs_opt(&handles, &options).map_err(fault)
    }
}

impl Database {
    fn get(&self, family: Family, key: &[u8], options: &ReadOptions) -> Result<Option<Bytes>, Fault> {
        let value = self.db.get_pinned_cf_opt(self.handle(family), key, options).map_err(fault)?;
        Ok(value.map(|value| Bytes::copy_from_slice(&value)))
    }

    /// The sequence number of the oldest view there is.
    fn oldest_view(&self) -> Result<Option<u64>, Fault> {
        let oldest = self.db.property_int_value(OLDEST_VIEW).map_err(fault)?;
        Ok(oldest.filter(|oldest| *oldest > 0))
    }

    fn handle(&self, family: Family) -> &ColumnFamily {
        handle_in(&self.db, family)
    }
}

fn handle_in(db: &DB, family: Family) -> &ColumnFamily {
    db.cf_handle(family.name()).expect("every family was created at open")
}

fn open_database(dir: &Path, options: &RocksOptions) -> Result<DB, Fault> {
    let cache = Cache::new_lru_cache(options.block_cache_bytes);
    let mut env = Env::new().map_err(fault)?;
    // Requests go first: whoever waits for a flush or an engine compaction has time, and both are bounded in what they hold.
    env.lower_thread_pool_cpu_priority();
    env.lower_high_priority_thread_pool_cpu_priority();
    let mut database = database_options(options);
    database.set_env(&env);
    DB::open_cf_descriptors(&database, dir, families(&cache, options)).map_err(fault)
}

fn families(cache: &Cache, options: &RocksOptions) -> [ColumnFamilyDescriptor; Family::ALL.len()] {
    Family::ALL.map(|family| {
        ColumnFamilyDescriptor::new(family.name(), family_options(family, cache, options.write_buffer_bytes))
    })
}

/// The directory of the database in use, below the base.
fn active_name(base: &Path) -> Result<String, Fault> {
    let path = base.join(ACTIVE);
    let text = match std::fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(String::new()),
        Err(error) => return Err(error.into()),
    };
    let damaged = || Fault::Corrupt { what: "name of the active database", key: text.clone().into_bytes() };
    let name = text.strip_suffix('\n').ok_or_else(damaged)?;
    let number = name.strip_prefix(NAME_PREFIX).and_then(|number| number.parse::<u64>().ok());
    number.map(|_| name.to_string()).ok_or_else(damaged)
}

/// Names the database in use, durably: written beside its place, synced, renamed.
fn set_active(base: &Path, name: &str) -> Result<(), Fault> {
    let new = base.join(ACTIVE_NEW);
    let mut file = std::fs::File::create(&new)?;
    file.write_all(format!("{name}\n").as_bytes())?;
    file.sync_all()?;
    std::fs::rename(&new, base.join(ACTIVE))?;
    Ok(std::fs::File::open(base)?.sync_all()?)
}

/// Removes databases below `base`: all but `kept`, or `gone` alone. The one in the base itself is everything there but the
/// directories of others, the name of the active one and the files that are being given back.
fn remove_others(base: &Path, kept: Option<&str>, gone: Option<&str>) -> Result<(), Fault> {
    for entry in std::fs::read_dir(base)? {
        let entry = entry?;
        let file_name = entry.file_name();
        let file_name = file_name.to_string_lossy();
        let name = if file_name.starts_with(NAME_PREFIX) { &file_name } else { "" };
        if file_name.starts_with(ACTIVE)
            || file_name == REMOVED
            || kept == Some(name)
            || gone.is_some_and(|gone| gone != name)
        {
            continue;
        }
        if entry.file_type()?.is_dir() {
            std::fs::remove_dir_all(entry.path())?;
        } else {
            std::fs::remove_file(entry.path())?;
        }
    }
    Ok(())
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
    cf.set_target_file_size_base(write_buffer_bytes as u64);
    cf.set_level_compaction_dynamic_level_bytes(true);
    cf
}

fn fault(error: rocksdb::Error) -> Fault {
    Fault::Engine(error.into_string())
}

impl Engine for RocksEngine {
    type View<'a> = RocksView;

    fn view(&self) -> RocksView {
        let snapshot = OwnedSnapshot::new(self.current(), |database| database.db.snapshot());
        let mut options = ReadOptions::default();
        options.set_snapshot(snapshot.borrow_dependent());
        RocksView { options, snapshot }
    }

    fn latest(&self, family: Family, key: &[u8]) -> Result<Option<Bytes>, Fault> {
        self.current.load().get(family, key, &self.latest)
    }

    fn write(&self, batch: &Batch) -> Result<(), Fault> {
        let current = self.current();
        let mut writes = WriteBatch::default();
        for family in Family::ALL {
            let handle = current.handle(family);
            for (lower, upper) in batch.cleared() {
                writes.delete_range_cf(handle, lower, upper);
            }
            for (key, value) in batch.changes(family) {
                match value {
                    Some(value) => writes.put_cf(handle, key, value),
                    None => writes.delete_cf(handle, key),
                }
            }
        }
        current.db.write_opt(writes, &self.no_wal).map_err(fault)
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
        self.current().get(family, key, &persisted)
    }

    fn compact(&self) -> Result<(), Fault> {
        self.rewrite(None)
    }

    fn give_back(&self, lower: &[u8], upper: &[u8]) -> Result<(), Fault> {
        let dropped = self.drop_files(lower, upper, VIEWS_PATIENCE);
        match dropped.and_then(|()| self.rewrite(Some((lower, upper)))) {
            // Ended by `stop_compacting`.
            Err(Fault::Engine(error)) if error.starts_with(STOPPED) => Ok(()),
            given_back => given_back,
        }
    }

    fn stop_compacting(&self) {
        self.is_stopped.store(true, Ordering::Release);
        self.current().db.cancel_all_background_work(false);
    }

    fn disk_bytes(&self) -> u64 {
        let current = self.current();
        let size = |family| {
            current.db.property_int_value_cf(current.handle(family), rocksdb::properties::TOTAL_SST_FILES_SIZE)
        };
        Family::ALL.into_iter().filter_map(|family| size(family).ok().flatten()).sum()
    }

    /// Files of the copy are hard links: it takes no space until the originals go.
    fn checkpoint(&self, dir: &Path, family: Family, key: &[u8]) -> Result<Option<Bytes>, Fault> {
        let current = self.current();
        Checkpoint::new(&current.db).and_then(|checkpoint| checkpoint.create_checkpoint(dir)).map_err(fault)?;
        let cache = Cache::new_lru_cache(1 << 20);
        let options = database_options(&self.options);
        let copy = DB::open_cf_descriptors_read_only(&options, dir, families(&cache, &self.options), false);
        let copy = copy.map_err(fault)?;
        let value = copy.get_pinned_cf(handle_in(&copy, family), key).map_err(fault)?;
        Ok(value.map(|value| Bytes::copy_from_slice(&value)))
    }

    fn replace(&self, dir: &Path, is_right: &IsRight<'_>) -> Result<(), Fault> {
        let before = self.current();
        let number =
            before.files.name.strip_prefix(NAME_PREFIX).and_then(|number| number.parse::<u64>().ok()).unwrap_or(0);
        let name = format!("{NAME_PREFIX}{}", number + 1);
        std::fs::rename(dir, self.base.join(&name))?;
        // Before it counts: what cannot be opened must not take the place of what is.
        let db = open_database(&self.base.join(&name), &self.options)?;
        is_right(&|family, key| {
            let value = db.get_pinned_cf(handle_in(&db, family), key).map_err(fault)?;
            Ok(value.map(|value| Bytes::copy_from_slice(&value)))
        })?;
        set_active(&self.base, &name)?;
        let new = Database { db, files: Files { name, superseded_in: OnceLock::new() } };
        self.current.store(Arc::new(new));
        // Fails only if it was set before, to the same.
        let _ = before.files.superseded_in.set(self.base.clone());
        Ok(())
    }
}

type BorrowedSnapshot<'a> = Snapshot<'a>;

self_cell!(
    /// A snapshot together with the database that it is of.
    struct OwnedSnapshot {
        owner: Arc<Database>,
        #[covariant]
        dependent: BorrowedSnapshot,
    }
);

/// A RocksDB snapshot.
pub struct RocksView {
    /// They name the snapshot, and so go before it.
    options: ReadOptions,
    snapshot: OwnedSnapshot,
}

impl Reader for RocksView {
    type Cursor<'c> = RocksCursor<'c>;

    fn get(&self, family: Family, key: &[u8]) -> Result<Option<Bytes>, Fault> {
        self.snapshot.borrow_owner().get(family, key, &self.options)
    }

    fn cursor(&self, family: Family, lower: &[u8], upper: &[u8]) -> Result<RocksCursor<'_>, Fault> {
        // RocksDB takes reversed bounds for a mistake of the caller's; here they are an empty range.
        let upper = upper.max(lower);
        let mut options = ReadOptions::default();
        options.set_snapshot(self.snapshot.borrow_dependent());
        options.set_iterate_upper_bound(upper);
        let database = self.snapshot.borrow_owner();
        let mut iterator = database.db.raw_iterator_cf_opt(database.handle(family), options);
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

    /// Files of a range that was cleared go without being read. What is beside the range must stay, a view must see what it saw, and
    /// nothing may come back, whatever was left of an attempt that a crash ended.
    #[test]
    fn a_cleared_range_gives_its_files_back() {
        let dir = tempfile::tempdir().unwrap();
        let options = RocksOptions { write_buffer_bytes: 64 << 10, ..RocksOptions::default() };
        let engine = RocksEngine::open(dir.path(), &options).unwrap();
        // A file that is being rewritten does not go; here none is.
        let current = engine.current();
        for family in Family::ALL {
            let alone = [("disable_auto_compactions", "true")];
            current.db.set_options_cf(current.handle(family), &alone).unwrap();
        }
        drop(current);
        let key = |tenant: u8, number: u32| [&[tenant][..], &number.to_be_bytes()].concat();
        // Not to be compressed.
        let value = |number: u32| {
            let next = |state: &mut u32| {
                *state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                Some(state.to_be_bytes())
            };
            Bytes::from_iter(std::iter::repeat_n((), 128).scan(number, |state, ()| next(state)).flatten())
        };
        let fill = |engine: &RocksEngine, tenant: u8| {
            for number in 0..1_000 {
                let mut batch = Batch::default();
                batch.put(Family::Kv, key(tenant, number), value(number));
                batch.put(Family::Head, key(tenant, number), Bytes::from_static(b"head"));
                engine.write(&batch).unwrap();
            }
            engine.flush().unwrap();
        };
        let count = |engine: &RocksEngine, tenant: u8| {
            let view = engine.view();
            let mut cursor = view.cursor(Family::Kv, &[tenant], &[tenant + 1]).unwrap();
            let mut count = 0;
            while let Some((at, found)) = cursor.entry() {
                assert_eq!((at, found), (&key(tenant, count)[..], &value(count)[..]));
                count += 1;
                cursor.advance().unwrap();
            }
            count
        };
        let clear = |tenant: u8| {
            let mut batch = Batch::default();
            batch.clear_range(vec![tenant], vec![tenant + 1]);
            engine.write(&batch).unwrap();
        };
        let live_bytes = || engine.current().db.live_files().unwrap().iter().map(|file| file.size).sum::<usize>();
        // Old files, some of which have keys of two tenants, and newer ones.
        (1..=3).for_each(|tenant| fill(&engine, tenant));
        engine.compact().unwrap();
        fill(&engine, 2);
        clear(2);
        let held = live_bytes();
        engine.drop_files(&[2], &[3], Duration::ZERO).unwrap();
        assert!(live_bytes() < held - 3 * options.write_buffer_bytes, "{} of {held}", live_bytes());
        assert_eq!([1, 2, 3].map(|tenant| count(&engine, tenant)), [1_000, 0, 1_000]);

        let before = engine.view();
        clear(3);
        engine.flush().unwrap();
        let held = live_bytes();
        engine.drop_files(&[3], &[4], Duration::ZERO).unwrap();
        assert!(live_bytes() >= held, "somebody reads it");
        assert_eq!(before.get(Family::Kv, &key(3, 7)).unwrap(), Some(value(7)));
        drop(before);

        // As if what said that the range was cleared had gone with a file.
        fill(&engine, 2);
        engine.give_back(&[2], &[3]).unwrap();
        drop(engine);
        let engine = RocksEngine::open(dir.path(), &options).unwrap();
        assert_eq!([1, 2, 3].map(|tenant| count(&engine, tenant)), [1_000, 0, 0]);
    }

    /// A member that gets a snapshot switches to it while clients read: what they see is the old state or the new one, and after a
    /// restart the new one is there alone.
    #[test]
    fn a_copy_takes_the_place_of_the_data() {
        fn put(engine: &impl Engine, value: &'static [u8]) {
            let mut batch = Batch::default();
            batch.put(Family::Meta, b"k".to_vec(), Bytes::from_static(value));
            engine.write(&batch).unwrap();
        }
        fn check(source: &impl Engine, engine: &impl Engine, dir: &Path) {
            put(source, b"new");
            put(engine, b"old");
            let copied = source.checkpoint(&dir.join("copy"), Family::Meta, b"k").unwrap();
            assert_eq!(copied.as_deref(), Some(&b"new"[..]));
            put(source, b"newer");
            let before = engine.view();
            engine.replace(&dir.join("copy"), &|_| Ok(())).unwrap();
            assert_eq!(before.get(Family::Meta, b"k").unwrap().as_deref(), Some(&b"old"[..]));
            assert_eq!(engine.view().get(Family::Meta, b"k").unwrap().as_deref(), Some(&b"new"[..]));
            assert_eq!(engine.durable_get(Family::Meta, b"k").unwrap().as_deref(), Some(&b"new"[..]));
            put(engine, b"newest");
            engine.flush().unwrap();
        }
        let dir = tempfile::tempdir().unwrap();
        let (source, own) = (dir.path().join("source"), dir.path().join("own"));
        let options = RocksOptions::default();
        let source = RocksEngine::open(&source, &options).unwrap();
        for _ in 0..2 {
            let engine = RocksEngine::open(&own, &options).unwrap();
            check(&source, &engine, dir.path());
            drop(engine);
            let names = std::fs::read_dir(&own).unwrap().map(|entry| entry.unwrap().file_name());
            let names = names.filter(|name| name != REMOVED).collect::<Vec<_>>();
            assert_eq!(names.len(), 2, "the old one is gone: {names:?}");
            let engine = RocksEngine::open(&own, &options).unwrap();
            assert_eq!(engine.view().get(Family::Meta, b"k").unwrap().as_deref(), Some(&b"newest"[..]));
        }
        check(&MemoryEngine::default(), &MemoryEngine::default(), dir.path());
    }

    /// A crash in the middle of a replacement leaves a directory that nobody named.
    #[test]
    fn what_is_not_named_is_removed_at_open() {
        let dir = tempfile::tempdir().unwrap();
        let options = RocksOptions::default();
        drop(RocksEngine::open(dir.path(), &options).unwrap());
        std::fs::create_dir(dir.path().join("db-1")).unwrap();
        drop(RocksEngine::open(dir.path(), &options).unwrap());
        assert!(!dir.path().join("db-1").exists() && dir.path().join("CURRENT").exists());
        std::fs::write(dir.path().join("ACTIVE"), "db-").unwrap();
        assert!(matches!(RocksEngine::open(dir.path(), &options), Err(Fault::Corrupt { .. })));
    }

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
