//! Gives the space of removed files back a little at a time.
//!
//! A file system that tells the disk at once what is free (`mount -o discard`, the default of many images) is busy for 50 ms with
//! a file of 64 MiB, and no sync ends meanwhile: not that of the raft log either, which every write waits for (decision
//! 0007). The engine removes such files whenever it has rewritten them, and many in a row after a deletion or a defragmentation.
//!
//! So each of its files gets a second name in the directory [`REMOVED`]. What the engine removes keeps that one, and is cut off
//! from its end, [`PIECE_BYTES`] at a time with pauses, until it is small enough to go. One thread for an engine does both, a
//! round every [`ROUND`].
//!
//! What must hold: only a file that has no other name is cut. A copy for another member has names of its own, and readers keep the
//! engine from removing what they read. Nothing needs to be remembered: after a crash the number of a file's names says
//! as much as before.
//!
//! Bounds: what waits is at most [`WAITING_BYTES`], or half of what the disk has free; more than that goes as files go everywhere, at once.
//! Left out: files that live for less than a round, which are small; file systems without second names, or that do not count them, where this
//! ends.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs::{self, DirEntry, OpenOptions};
use std::io;
use std::os::unix::fs::{DirEntryExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

/// The directory with the second names, below the engine's.
pub(super) const REMOVED: &str = "removed";

/// What is given back between two pauses, if little waits: a millisecond of such a disk. As much again for each
/// [`MORE_FOR_BYTES`] that wait.
const PIECE_BYTES: u64 = 1 << 20;

const MORE_FOR_BYTES: u64 = 256 << 20;

/// However much waits.
const PIECE_BYTES_MAX: u64 = 8 << 20;

const PAUSE: Duration = Duration::from_millis(5);

const ROUND: Duration = Duration::from_millis(250);

/// Pieces of a round in which there is something to cut: then the next look at what is there.
const PIECES: usize = 40;

/// See the module's essay.
const WAITING_BYTES: u64 = 1 << 30;

/// The thread; ends with this, in the middle of a file if there is one.
pub(super) struct Remover {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Remover {
    /// For the files in `base`, and in directories there whose names begin with `prefix`.
    pub(super) fn start(base: &Path, prefix: &'static str) -> io::Result<Self> {
        let (stop, stopped) = channel();
        let rounds = Rounds { base: base.to_path_buf(), prefix };
        let thread = std::thread::Builder::new().name("removal".to_owned()).spawn(move || rounds.run(&stopped))?;
        Ok(Remover { stop: Some(stop), thread: Some(thread) })
    }
}

impl Drop for Remover {
    fn drop(&mut self) {
        drop(self.stop.take());
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the thread that gives space back panicked");
        }
    }
}

struct Rounds {
    base: PathBuf,
    prefix: &'static str,
}

/// What a directory says of a file.
struct Listed {
    inode: u64,
    path: PathBuf,
}

impl Rounds {
    fn run(&self, stopped: &Receiver<()>) {
        let wait = |pause| stopped.recv_timeout(pause) == Err(RecvTimeoutError::Timeout);
        let mut failed = false;
        loop {
            let (dead, piece_bytes) = match self.round() {
                Ok(found) => found,
                Err(error) if matches!(error.kind(), io::ErrorKind::Unsupported | io::ErrorKind::PermissionDenied) => {
                    return tracing::info!(%error, "removed files are given back at once, not piece by piece");
                }
                Err(error) => {
                    if !failed {
                        tracing::warn!(%error, "give the space of removed files back");
                    }
                    failed = true;
                    (Vec::new(), PIECE_BYTES)
                }
            };
            if dead.is_empty() && !wait(ROUND) {
                return;
            }
            let mut files = dead.iter();
            let mut next = files.next();
            for _ in 0..PIECES {
                let Some(file) = next else { break };
                // One that cannot be cut is found again in the next round.
                if cut(file, piece_bytes).unwrap_or(true) {
                    next = files.next();
                }
                if !wait(PAUSE) {
                    return;
                }
            }
        }
    }

    /// Gives second names to what is new, and says which files have no other, the oldest first, and how much of them is to go between two
    /// pauses.
    fn round(&self) -> io::Result<(Vec<PathBuf>, u64)> {
        let removed = self.base.join(REMOVED);
        let live = self.files()?;
        let live_inodes = live.values().map(|file| file.inode).collect::<BTreeSet<_>>();
        let mut named = BTreeSet::new();
        let mut dead = Vec::new();
        match fs::read_dir(&removed) {
            Ok(entries) => {
                for entry in entries {
                    let entry = entry?;
                    if live_inodes.contains(&entry.ino()) {
                        named.insert(entry.ino());
                    } else if live.contains_key(&entry.file_name()) {
                        // After a crash the engine may use the number again of a file that it never noted.
                        fs::remove_file(entry.path())?;
                    } else {
                        let metadata = entry.metadata()?;
                        if metadata.nlink() == 1 {
                            dead.push((metadata.mtime(), metadata.len(), entry.path()));
                        }
                    }
                }
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => fs::create_dir_all(&removed)?,
            Err(error) => return Err(error),
        }
        for (name, file) in live.iter().filter(|(_, file)| !named.contains(&file.inode)) {
            name_again(&file.path, &removed.join(name))?;
        }
        dead.sort();
        let mut waiting = dead.iter().map(|(_, bytes, _)| bytes).sum::<u64>();
        let may_wait = if waiting > WAITING_BYTES { WAITING_BYTES.max(free_bytes(&removed)? / 2) } else { waiting };
        let mut paths = Vec::new();
        for (_, bytes, path) in dead {
            if waiting > may_wait {
                fs::remove_file(&path)?;
                waiting -= bytes;
            } else {
                paths.push(path);
            }
        }
        Ok((paths, (PIECE_BYTES * (1 + waiting / MORE_FOR_BYTES)).min(PIECE_BYTES_MAX)))
    }

    /// The engine's files, by their second names.
    fn files(&self) -> io::Result<BTreeMap<OsString, Listed>> {
        let mut files = BTreeMap::new();
        let mut add = |prefix: OsString, entry: &DirEntry| {
            let mut name = prefix;
            name.push(entry.file_name());
            files.insert(name, Listed { inode: entry.ino(), path: entry.path() });
        };
        for entry in fs::read_dir(&self.base)? {
            let entry = entry?;
            if is_table(&entry) {
                add(OsString::new(), &entry);
            } else if entry.file_name().to_string_lossy().starts_with(self.prefix) && entry.file_type()?.is_dir() {
                let mut prefix = entry.file_name();
                prefix.push("-");
                let inners = match fs::read_dir(entry.path()) {
                    // Removed meanwhile, as a whole.
                    Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                    inners => inners?,
                };
                for inner in inners {
                    let inner = inner?;
                    if is_table(&inner) {
                        add(prefix.clone(), &inner);
                    }
                }
            }
        }
        Ok(files)
    }
}

fn free_bytes(dir: &Path) -> io::Result<u64> {
    let disk = rustix::fs::statvfs(dir)?;
    Ok(disk.f_bavail.saturating_mul(disk.f_frsize))
}

/// Whether the file is of those that are large and written once.
fn is_table(entry: &DirEntry) -> bool {
    Path::new(&entry.file_name()).extension().is_some_and(|extension| extension == "sst")
}

/// Gives a file a second name, if it is still there and the name is free.
fn name_again(path: &Path, name: &Path) -> io::Result<()> {
    match fs::hard_link(path, name) {
        Ok(()) => {}
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::AlreadyExists) => return Ok(()),
        Err(error) => return Err(error),
    }
    // The count is what says later that nobody else has the file: whoever does not keep it is not trusted with that.
    let names = fs::metadata(path).map(|metadata| metadata.nlink());
    if names.is_ok_and(|names| names < 2) {
        fs::remove_file(name)?;
        return Err(io::Error::new(io::ErrorKind::Unsupported, "the file system does not count names of files"));
    }
    Ok(())
}

/// Takes a piece off the file's end, or removes what is left; `true`: it is gone.
fn cut(path: &Path, piece_bytes: u64) -> io::Result<bool> {
    let bytes = fs::metadata(path)?.len();
    if bytes <= piece_bytes {
        fs::remove_file(path)?;
        return Ok(true);
    }
    OpenOptions::new().write(true).open(path)?.set_len(bytes - piece_bytes)?;
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What others still use must stay whole: only what has lost every other name is cut, also after a restart in the middle.
    #[test]
    fn only_what_nobody_else_has_is_cut() {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path();
        fs::create_dir(base.join("db-1")).unwrap();
        let tables = ["1.sst", "2.sst", "db-1/1.sst"].map(|name| base.join(name));
        let bytes = vec![7; 3 << 20];
        for table in &tables {
            fs::write(table, &bytes).unwrap();
        }
        fs::write(base.join("LOG"), "small").unwrap();
        let removed = base.join(REMOVED);
        let sizes = || {
            let entries = fs::read_dir(&removed).unwrap().map(Result::unwrap);
            entries.map(|entry| (entry.file_name(), entry.metadata().unwrap().len())).collect::<BTreeMap<_, _>>()
        };
        let rounds = Rounds { base: base.to_path_buf(), prefix: "db-" };
        let none = (Vec::<PathBuf>::new(), PIECE_BYTES);
        assert_eq!(rounds.round().unwrap(), none);
        assert_eq!(sizes().into_keys().collect::<Vec<_>>(), ["1.sst", "2.sst", "db-1-1.sst"]);

        // A copy for another member.
        let copy = base.join("copy");
        fs::hard_link(&tables[1], &copy).unwrap();
        fs::remove_file(&tables[0]).unwrap();
        fs::remove_file(&tables[1]).unwrap();
        let dead = rounds.round().unwrap();
        assert_eq!(dead, (vec![removed.join("1.sst")], PIECE_BYTES));
        assert!(!cut(&dead.0[0], PIECE_BYTES).unwrap());
        assert_eq!(sizes()[&OsString::from("1.sst")], 2 << 20);

        let rounds = Rounds { base: base.to_path_buf(), prefix: "db-" };
        assert_eq!(rounds.round().unwrap(), dead, "it goes on where it was");
        // The number is used again.
        fs::write(&tables[0], &bytes).unwrap();
        assert_eq!(rounds.round().unwrap(), none);
        rounds.round().unwrap();
        for whole in [&tables[0], &tables[2], &copy] {
            assert_eq!(fs::read(whole).unwrap(), bytes, "{}", whole.display());
        }
        assert_eq!(sizes().into_values().collect::<Vec<_>>(), [3 << 20; 3]);
        fs::remove_file(copy).unwrap();
        assert_eq!(rounds.round().unwrap().0, [removed.join("2.sst")]);
    }

    /// Space must come back without anybody's asking, and an engine that ends must not wait for that.
    #[test]
    fn removed_files_go() {
        let dir = tempfile::tempdir().unwrap();
        let table = dir.path().join("1.sst");
        fs::write(&table, vec![7; 5 << 20]).unwrap();
        let remover = Remover::start(dir.path(), "db-").unwrap();
        let second = dir.path().join(REMOVED).join("1.sst");
        while !second.exists() {
            std::thread::yield_now();
        }
        fs::remove_file(&table).unwrap();
        while second.exists() {
            std::thread::yield_now();
        }
        drop(remover);
    }
}
