//! The data directory: its layout, its lock and its identity.
//!
//! | path | what |
//! |---|---|
//! | `LOCK` | empty; locked (`flock`, exclusive) by the process that serves the directory, and by nobody after a crash |
//! | `IDENTITY` | who this member is: see below; written once, before anything else |
//! | `log/` | the raft log, in raft-server's format |
//! | `state/` | the replicated state of all tenants, in storage's format |
//!
//! `IDENTITY` is text, so that an operator can read it, in exactly this form:
//!
//! ```text
//! tenure-data 1
//! member 8e9e05c52164694d
//! cluster cdf818194e3a8c32
//! check 5f3a9c01
//! ```
//!
//! The number in the first line is the version of the whole directory's layout; a program that does not know it refuses
//! to start. `check` is the CRC-32 of everything before its line, as eight hexadecimal digits. The file is written beside
//! its place, synced and renamed, so it is there whole or not at all.
//!
//! A directory without `IDENTITY` must be empty (but for `LOCK`): a mistyped `--data-dir` must not be filled with files,
//! and a directory of etcd's must not be taken for one of ours.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

const LOCK: &str = "LOCK";
const IDENTITY: &str = "IDENTITY";
const IDENTITY_NEW: &str = "IDENTITY.new";

/// Version of the layout that this program writes; the only one there is.
const LAYOUT_VERSION: u32 = 1;

/// Why a data directory cannot be used. Each is one clear line for the operator.
#[derive(Debug, thiserror::Error)]
pub enum DataDirError {
    #[error("{what} {}: {error}", path.display())]
    Io { what: &'static str, path: PathBuf, error: io::Error },
    #[error("data directory {} is in use by another process", .0.display())]
    InUse(PathBuf),
    #[error("{} is a data directory of etcd, not of tenured", .0.display())]
    OfEtcd(PathBuf),
    #[error("{} is not empty and is not a data directory of tenured", .0.display())]
    NotOurs(PathBuf),
    #[error("{} has layout version {version}, which this release does not know", path.display())]
    UnknownVersion { path: PathBuf, version: String },
    #[error("{} is damaged", .0.display())]
    Damaged(PathBuf),
}

/// Who this member is, for ever.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    pub member_id: u64,
    pub cluster_id: u64,
}

/// A data directory that belongs to this process until this is dropped.
#[derive(Debug)]
pub struct DataDir {
    path: PathBuf,
    identity: Identity,
    /// Closing it releases the lock.
    _lock: File,
}

impl DataDir {
    /// Takes the directory, making it with `first` as its identity if there is none yet.
    ///
    /// # Errors
    /// [`DataDirError`]; nothing was changed, except that the directory and its lock file may exist now.
    pub fn open(path: &Path, first: Identity) -> Result<Self, DataDirError> {
        fs::create_dir_all(path).map_err(io("create", path))?;
        if path.join("member").is_dir() && !path.join(IDENTITY).exists() {
            return Err(DataDirError::OfEtcd(path.to_path_buf()));
        }
        let lock = take_lock(path)?;
        let identity = match read_identity(path)? {
            Some(identity) => identity,
            None => {
                check_empty(path)?;
                write_identity(path, first)?;
                first
            }
        };
        let this = DataDir { path: path.to_path_buf(), identity, _lock: lock };
        for part in [this.log(), this.state()] {
            fs::create_dir_all(&part).map_err(io("create", &part))?;
        }
        Ok(this)
    }

    pub fn identity(&self) -> Identity {
        self.identity
    }

    /// Where the raft log lives.
    pub fn log(&self) -> PathBuf {
        self.path.join("log")
    }

    /// Where the replicated state lives.
    pub fn state(&self) -> PathBuf {
        self.path.join("state")
    }
}

fn io(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> DataDirError {
    let path = path.to_path_buf();
    move |error| DataDirError::Io { what, path, error }
}

fn take_lock(directory: &Path) -> Result<File, DataDirError> {
    let path = directory.join(LOCK);
    let file = OpenOptions::new().create(true).truncate(false).write(true).open(&path).map_err(io("open", &path))?;
    // SAFETY: the descriptor is open for as long as `file` lives, and flock touches no memory of ours.
    let taken = unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) };
    if taken == 0 {
        return Ok(file);
    }
    let error = io::Error::last_os_error();
    if error.kind() == io::ErrorKind::WouldBlock {
        return Err(DataDirError::InUse(directory.to_path_buf()));
    }
    Err(io("lock", &path)(error))
}

fn check_empty(directory: &Path) -> Result<(), DataDirError> {
    for entry in fs::read_dir(directory).map_err(io("list", directory))? {
        let name = entry.map_err(io("list", directory))?.file_name();
        // A crash may have left the new identity half written; `lost+found` is what an empty volume has.
        if ![LOCK, IDENTITY_NEW, "lost+found"].iter().any(|known| name == *known) {
            return Err(DataDirError::NotOurs(directory.to_path_buf()));
        }
    }
    Ok(())
}

fn encode_identity(identity: Identity) -> String {
    let Identity { member_id, cluster_id } = identity;
    let body = format!("tenure-data {LAYOUT_VERSION}\nmember {member_id:016x}\ncluster {cluster_id:016x}\n");
    let check = crc32fast::hash(body.as_bytes());
    format!("{body}check {check:08x}\n")
}

fn read_identity(directory: &Path) -> Result<Option<Identity>, DataDirError> {
    let path = directory.join(IDENTITY);
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(io("read", &path)(error)),
    };
    let mut lines = text.lines();
    let mut field = |name: &str| lines.next()?.strip_prefix(name)?.strip_prefix(' ');
    // The version comes first: of another layout nothing else is known, not even that it has a checksum.
    match field("tenure-data") {
        Some(version) if version == LAYOUT_VERSION.to_string() => {}
        Some(version) => return Err(DataDirError::UnknownVersion { version: version.to_string(), path }),
        None => return Err(DataDirError::Damaged(path)),
    }
    let mut id = |name: &str| field(name).and_then(|digits| u64::from_str_radix(digits, 16).ok());
    let identity = id("member").zip(id("cluster")).map(|(member_id, cluster_id)| Identity { member_id, cluster_id });
    match identity {
        Some(identity) if encode_identity(identity) == text => Ok(Some(identity)),
        Some(_) | None => Err(DataDirError::Damaged(path)),
    }
}

fn write_identity(directory: &Path, identity: Identity) -> Result<(), DataDirError> {
    let new = directory.join(IDENTITY_NEW);
    let mut file = File::create(&new).map_err(io("create", &new))?;
    file.write_all(encode_identity(identity).as_bytes()).map_err(io("write", &new))?;
    file.sync_all().map_err(io("sync", &new))?;
    let path = directory.join(IDENTITY);
    fs::rename(&new, &path).map_err(io("rename", &new))?;
    let opened = File::open(directory).map_err(io("open", directory))?;
    opened.sync_all().map_err(io("sync", directory))
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIRST: Identity = Identity { member_id: 0x8e9e_05c5_2164_694d, cluster_id: 0xcdf8_1819_4e3a_8c32 };

    #[test]
    fn the_first_identity_stays() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("d");
        assert_eq!(DataDir::open(&path, FIRST).unwrap().identity(), FIRST);
        let other = Identity { member_id: 1, cluster_id: 2 };
        assert_eq!(DataDir::open(&path, other).unwrap().identity(), FIRST);
    }

    #[test]
    fn one_process_at_a_time() {
        let scratch = tempfile::tempdir().unwrap();
        let held = DataDir::open(scratch.path(), FIRST).unwrap();
        let error = DataDir::open(scratch.path(), FIRST).unwrap_err();
        assert!(matches!(error, DataDirError::InUse(_)), "{error}");
        drop(held);
        DataDir::open(scratch.path(), FIRST).unwrap();
    }

    #[test]
    fn foreign_directories_are_refused() {
        let scratch = tempfile::tempdir().unwrap();
        fs::create_dir(scratch.path().join("member")).unwrap();
        assert!(matches!(DataDir::open(scratch.path(), FIRST), Err(DataDirError::OfEtcd(_))));
        let scratch = tempfile::tempdir().unwrap();
        fs::write(scratch.path().join("thesis.txt"), "").unwrap();
        assert!(matches!(DataDir::open(scratch.path(), FIRST), Err(DataDirError::NotOurs(_))));
    }

    #[test]
    fn damage_and_other_versions_are_named() {
        let scratch = tempfile::tempdir().unwrap();
        drop(DataDir::open(scratch.path(), FIRST).unwrap());
        let path = scratch.path().join(IDENTITY);
        let good = fs::read_to_string(&path).unwrap();
        for bad in ["", "tenure-data 1\n", &good.replace("8e9e", "8e9f"), &good[..good.len() - 1]] {
            fs::write(&path, bad).unwrap();
            assert!(matches!(DataDir::open(scratch.path(), FIRST), Err(DataDirError::Damaged(_))), "{bad:?}");
        }
        fs::write(&path, good.replace("tenure-data 1", "tenure-data 2")).unwrap();
        let error = DataDir::open(scratch.path(), FIRST).unwrap_err();
        assert!(matches!(&error, DataDirError::UnknownVersion { version, .. } if version == "2"), "{error}");
    }
}
