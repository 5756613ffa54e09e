//! The log on disk: one group in a `raft-engine`.
//!
//! raft-engine appends checksummed batches to files of a fixed size, keeps the place of every entry in memory, and gives a
//! file back once no entry in it is wanted; emptied files are used again, so that a sync need not wait for the file system
//! to allocate. Sync failures panic inside it, which ends the member like any fault.
//!
//! Recovery. A batch that a crash cut off ends the newest file, and recovery cuts it away; a broken batch anywhere
//! else is a [`Fault`]. raft-engine cannot tell a torn tail from bit rot in the newest file; what a synced write has noted beside
//! the log ([`mark`](super::mark)) can, and less than that is a [`Fault`] too. The file is copied before it is cut, and the copy kept if
//! it comes to that.
//!
//! Records, beside the entries (names and layouts are persisted):
//!
//! | key | value |
//! |---|---|
//! | `id` | layout version u8, member id u64 le |
//! | `hs` | raft's HardState (protobuf) |
//! | `cf` | index u64 le, then raft's ConfState (protobuf) |
//! | `tr` | index u64 le, term u64 le: everything up to here is gone |
//! | `in` | index u64 le, term u64 le, then as `cf`: the snapshot that is being installed; absent otherwise |

use std::path::{Path, PathBuf};
use std::time::Instant;

use parking_lot::Mutex;
use protobuf::Message as _;
use raft::eraftpb::{ConfState, Entry, HardState};
use raft_engine::{Command, Config, Engine, LogBatch, MessageExt, ReadableSize, RecoveryMode};
use tenure_storage::Fault;

use super::mark::{Mark, MarkFile};
use super::{Appended, Conf, LogStore, LogWrite, Position, Recovered, hard_state_after};

/// The only group in the engine.
const GROUP: u64 = 1;
const LAYOUT_VERSION: u8 = 1;

const IDENTITY_KEY: &[u8] = b"id";
const HARD_STATE_KEY: &[u8] = b"hs";
const CONF_KEY: &[u8] = b"cf";
const TRUNCATED_KEY: &[u8] = b"tr";
const INSTALL_KEY: &[u8] = b"in";

/// Files are given back whole, so several make up what the log keeps before it is truncated.
const FILES_PER_FLUSH: u64 = 4;
const FILE_BYTES_MIN: u64 = 64 << 10;
const FILE_BYTES_MAX: u64 = 64 << 20;

/// See the module's essay.
pub struct EngineLog {
    engine: Engine,
    /// Kept between writes for its buffer.
    batch: Mutex<LogBatch>,
    /// What the log holds at least.
    mark: Mutex<MarkFile>,
    /// The newest file as it was before its end was cut off.
    kept: Option<PathBuf>,
}

struct EntryIndex;

impl MessageExt for EntryIndex {
    type Entry = Entry;

    fn index(entry: &Entry) -> u64 {
        entry.index
    }
}

impl EngineLog {
    /// Opens or creates the log in `dir`, and cuts off a torn tail. `flush_bytes` is how much the log holds before it is
    /// truncated; files are a fraction of it.
    ///
    /// # Errors
    /// [`Fault::Corrupt`] for a broken batch before the tail; [`Fault::Engine`], for instance, if another process
    /// holds the directory.
    pub fn open(dir: &Path, flush_bytes: u64) -> Result<Self, Fault> {
        let Some(dir) = dir.to_str() else {
            return Err(Fault::Engine(format!("the log's path is not UTF-8: {}", dir.display())));
        };
        let config = Config {
            dir: dir.to_owned(),
            recovery_mode: RecoveryMode::TolerateTailCorruption,
            // Measured: compression costs more CPU than the bytes it saves (decision 0002).
            batch_compression_threshold: ReadableSize(0),
            target_file_size: ReadableSize((flush_bytes / FILES_PER_FLUSH).clamp(FILE_BYTES_MIN, FILE_BYTES_MAX)),
            purge_threshold: ReadableSize(flush_bytes.max(FILE_BYTES_MIN)),
            recovery_threads: 2,
            enable_log_recycle: true,
            ..Config::default()
        };
        let strict = Config { recovery_mode: RecoveryMode::AbsoluteConsistency, ..config.clone() };
        let (engine, kept) = match Engine::open(strict) {
            Ok(engine) => (engine, None),
            // A tail, most likely, which the next attempt cuts off: if it should be more, it must not be gone.
            Err(raft_engine::Error::Corruption(_)) => {
                let kept = keep_newest_file(Path::new(dir))?;
                (Engine::open(config).map_err(fault)?, kept)
            }
            Err(error) => return Err(fault(error)),
        };
        let mark = Mutex::new(MarkFile::open(Path::new(dir))?);
        Ok(EngineLog { engine, batch: Mutex::new(LogBatch::default()), mark, kept })
    }

    fn record(&self, key: &[u8]) -> Option<Vec<u8>> {
        self.engine.get(GROUP, key)
    }

    /// The log ends here, and reached further.
    fn lost(&self, last_index: u64) -> Fault {
        if let Some(kept) = &self.kept {
            tracing::error!(file = %kept.display(), "the newest file of the raft log, as it was found, is kept");
        }
        let what = "raft log: what was on the disk is lost after entry";
        Fault::Corrupt { what, key: last_index.to_be_bytes().to_vec() }
    }

    /// Notes what a write has brought that is on the disk now.
    fn say(&self, last_index: Option<u64>, hard_state: Option<&HardState>) -> Result<(), Fault> {
        let mut mark = self.mark.lock();
        let now = mark.said().after(last_index, hard_state);
        Ok(mark.say(now)?)
    }

    #[cfg(test)]
    pub(super) fn put_layout_version_for_test(&self, version: u8) {
        let mut batch = LogBatch::default();
        let identity = [&[version][..], &1u64.to_le_bytes()].concat();
        batch.put(GROUP, IDENTITY_KEY.to_vec(), identity).expect("not a reserved key");
        self.write(&mut batch).expect("write");
    }

    fn write(&self, batch: &mut LogBatch) -> Result<Appended, Fault> {
        let _ = raft_engine::take_perf_context();
        let start = Instant::now();
        let bytes = self.engine.write(batch, true).map_err(fault)? as u64;
        let whole = start.elapsed();
        let context = raft_engine::take_perf_context();
        let sync = context.log_sync_duration;
        Ok(Appended { bytes, write: whole.saturating_sub(sync), sync })
    }
}

impl LogStore for EngineLog {
    fn recover(&self) -> Result<Recovered, Fault> {
        let marked = self.mark.lock().said();
        let Some(identity) = self.record(IDENTITY_KEY) else {
            return if marked == Mark::default() { Ok(Recovered::default()) } else { Err(self.lost(0)) };
        };
        let (version, id) = identity.split_first().ok_or_else(|| corrupt(IDENTITY_KEY))?;
        if *version != LAYOUT_VERSION {
            return Err(Fault::Engine(format!("log layout version {version} is not known to this release")));
        }
        let member_id = Some(take_u64(id, IDENTITY_KEY)?.0);
        let hard_state = match self.record(HARD_STATE_KEY) {
            Some(bytes) => HardState::parse_from_bytes(&bytes).map_err(|_| corrupt(HARD_STATE_KEY))?,
            None => return Err(corrupt(HARD_STATE_KEY)),
        };
        let conf = decode_conf(&self.record(CONF_KEY).ok_or_else(|| corrupt(CONF_KEY))?, CONF_KEY)?;
        let truncated = self.record(TRUNCATED_KEY).ok_or_else(|| corrupt(TRUNCATED_KEY))?;
        let (truncated, _) = take_position(&truncated, TRUNCATED_KEY)?;
        let installing = match self.record(INSTALL_KEY) {
            Some(bytes) => {
                let (at, conf) = take_position(&bytes, INSTALL_KEY)?;
                Some((at, decode_conf(conf, INSTALL_KEY)?))
            }
            None => None,
        };
        let last_index = match (self.engine.first_index(GROUP), self.engine.last_index(GROUP)) {
            (Some(first), Some(last)) if first <= truncated.index + 1 => last.max(truncated.index),
            (None, None) => truncated.index,
            _ => return Err(corrupt(b"first index")),
        };
        if !marked.is_met_by(last_index, &hard_state) {
            return Err(self.lost(last_index));
        }
        if let Some(kept) = &self.kept {
            let _ = std::fs::remove_file(kept);
        }
        Ok(Recovered { member_id, hard_state, conf, truncated, last_index, installing })
    }

    fn bootstrap(&self, member_id: u64, at: Position, conf: &Conf) -> Result<(), Fault> {
        let mut identity = vec![LAYOUT_VERSION];
        identity.extend_from_slice(&member_id.to_le_bytes());
        let mut batch = LogBatch::default();
        batch.put(GROUP, IDENTITY_KEY.to_vec(), identity).map_err(fault)?;
        put_truncated(&mut batch, at)?;
        put_conf(&mut batch, conf)?;
        let hard_state = HardState { term: at.term, commit: at.index, ..HardState::default() };
        put_hard_state(&mut batch, &hard_state)?;
        self.write(&mut batch)?;
        self.say(Some(at.index), Some(&hard_state))
    }

    fn append(&self, write: &LogWrite) -> Result<Appended, Fault> {
        let mut batch = self.batch.lock();
        batch.add_entries::<EntryIndex>(GROUP, &write.entries).map_err(fault)?;
        if let Some(hard_state) = &write.hard_state {
            put_hard_state(&mut batch, hard_state)?;
        }
        if let Some(conf) = &write.conf {
            put_conf(&mut batch, conf)?;
        }
        if let Some(first) = write.entries.first() {
            self.mark.lock().lower(first.index - 1)?;
        }
        let appended = self.write(&mut batch)?;
        self.say(write.entries.last().map(|last| last.index), write.hard_state.as_ref())?;
        Ok(appended)
    }

    fn entries(&self, low: u64, high: u64, bytes_max: u64) -> Result<Vec<Entry>, Fault> {
        let mut entries = Vec::new();
        let bytes_max = usize::try_from(bytes_max).unwrap_or(usize::MAX);
        self.engine.fetch_entries_to::<EntryIndex>(GROUP, low, high, Some(bytes_max), &mut entries).map_err(fault)?;
        if entries.is_empty() {
            return Err(Fault::Corrupt { what: "raft log entry", key: low.to_be_bytes().to_vec() });
        }
        Ok(entries)
    }

    fn truncate(&self, through: Position) -> Result<(), Fault> {
        let mut batch = LogBatch::default();
        put_truncated(&mut batch, through)?;
        batch.add_command(GROUP, Command::Compact { index: through.index + 1 });
        // Synced: files are deleted next, and a log that had forgotten why they are gone would look corrupt.
        self.write(&mut batch)?;
        self.engine.purge_expired_files().map_err(fault)?;
        Ok(())
    }

    fn begin_install(&self, at: Position, conf: &Conf) -> Result<(), Fault> {
        let mut value = encode_position(at);
        value.extend(encode_conf(conf)?);
        let mut batch = LogBatch::default();
        batch.put(GROUP, INSTALL_KEY.to_vec(), value).map_err(fault)?;
        self.write(&mut batch).map(|_| ())
    }

    fn cancel_install(&self) -> Result<(), Fault> {
        let mut batch = LogBatch::default();
        batch.delete(GROUP, INSTALL_KEY.to_vec());
        self.write(&mut batch).map(|_| ())
    }

    fn finish_install(&self, at: Position, conf: &Conf) -> Result<(), Fault> {
        let identity = self.record(IDENTITY_KEY).ok_or_else(|| corrupt(IDENTITY_KEY))?;
        let before = self.record(HARD_STATE_KEY).ok_or_else(|| corrupt(HARD_STATE_KEY))?;
        let before = HardState::parse_from_bytes(&before).map_err(|_| corrupt(HARD_STATE_KEY))?;
        let mut batch = LogBatch::default();
        // Takes entries and records, the note too; what follows in the same write stays.
        batch.add_command(GROUP, Command::Clean);
        batch.put(GROUP, IDENTITY_KEY.to_vec(), identity).map_err(fault)?;
        put_truncated(&mut batch, at)?;
        put_conf(&mut batch, conf)?;
        let hard_state = hard_state_after(&before, at);
        put_hard_state(&mut batch, &hard_state)?;
        self.mark.lock().lower(at.index)?;
        self.write(&mut batch)?;
        self.say(Some(at.index), Some(&hard_state))?;
        self.engine.purge_expired_files().map_err(fault)?;
        Ok(())
    }

    fn disk_bytes(&self) -> u64 {
        self.engine.get_used_size() as u64
    }
}

fn put_hard_state(batch: &mut LogBatch, hard_state: &HardState) -> Result<(), Fault> {
    batch.put_message(GROUP, HARD_STATE_KEY.to_vec(), hard_state).map_err(fault)
}

fn put_conf(batch: &mut LogBatch, conf: &Conf) -> Result<(), Fault> {
    batch.put(GROUP, CONF_KEY.to_vec(), encode_conf(conf)?).map_err(fault)
}

fn encode_conf(conf: &Conf) -> Result<Vec<u8>, Fault> {
    let mut value = conf.index.to_le_bytes().to_vec();
    conf.state.write_to_vec(&mut value).map_err(|error| Fault::Engine(error.to_string()))?;
    Ok(value)
}

fn decode_conf(bytes: &[u8], key: &[u8]) -> Result<Conf, Fault> {
    let (index, state) = take_u64(bytes, key)?;
    let state = ConfState::parse_from_bytes(state).map_err(|_| corrupt(key))?;
    Ok(Conf { index, state })
}

fn put_truncated(batch: &mut LogBatch, at: Position) -> Result<(), Fault> {
    batch.put(GROUP, TRUNCATED_KEY.to_vec(), encode_position(at)).map_err(fault)
}

fn encode_position(at: Position) -> Vec<u8> {
    [at.index.to_le_bytes(), at.term.to_le_bytes()].concat()
}

fn take_position<'a>(bytes: &'a [u8], key: &[u8]) -> Result<(Position, &'a [u8]), Fault> {
    let (index, rest) = take_u64(bytes, key)?;
    let (term, rest) = take_u64(rest, key)?;
    Ok((Position { index, term }, rest))
}

fn take_u64<'a>(bytes: &'a [u8], key: &[u8]) -> Result<(u64, &'a [u8]), Fault> {
    let (number, rest) = bytes.split_first_chunk().ok_or_else(|| corrupt(key))?;
    Ok((u64::from_le_bytes(*number), rest))
}

/// Copies the newest file of entries beside itself, under a name that is no log file's.
fn keep_newest_file(dir: &Path) -> Result<Option<PathBuf>, Fault> {
    let mut files: Vec<PathBuf> =
        std::fs::read_dir(dir)?.map(|file| Ok(file?.path())).collect::<std::io::Result<_>>()?;
    files.retain(|path| path.extension().is_some_and(|kind| kind == "raftlog"));
    let Some(newest) = files.into_iter().max() else { return Ok(None) };
    let kept = newest.with_extension("rotten");
    std::fs::copy(&newest, &kept)?;
    Ok(Some(kept))
}

fn corrupt(key: &[u8]) -> Fault {
    Fault::Corrupt { what: "raft log record", key: key.to_vec() }
}

fn fault(error: raft_engine::Error) -> Fault {
    if let raft_engine::Error::Io(error) = error {
        Fault::Io(error)
    } else {
        Fault::Engine(format!("raft log: {error}"))
    }
}
