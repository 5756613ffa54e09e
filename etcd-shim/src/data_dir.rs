//! The data directory: its layout, its lock and its identity.
//!
//! | path | what |
//! |---|---|
//! | `LOCK` | empty; locked (`flock`, exclusive) by the process that serves the directory, and by nobody after a crash |
//! | `MEMBERS` | who was in the cell when this member began, and how it began: see below; written once, before anything else |
//! | `IDENTITY` | who this member is: see below; written once, behind `MEMBERS` |
//! | `log/` | the raft log, in raft-server's format |
//! | `state/` | the replicated state of all tenants, in storage's format |
//! | `snapshot/` | copies of the state on their way to or from other members; emptied at start |
//!
//! `IDENTITY` is text, so that an operator can read it, in exactly this form:
//!
//! ```text
//! tenure-data 3
//! member 8e9e05c52164694d
//! cluster cdf818194e3a8c32
//! token etcd-cluster
//! check 5f3a9c01
//! ```
//!
//! The number in the first line is the version of the whole directory's layout, its log and its state; a program that does not know it
//! refuses to start. An older one is read, and becomes the newest when the directory is opened: what is written from then on a program of
//! before would misread. `token`, the `--initial-cluster-token` of the first start, is missing where that was in version 1. `check` is the
//! CRC-32 of everything before its line, as eight hexadecimal digits. The file is written beside its place, synced and renamed, so it is
//! there whole or not at all.
//!
//! | version | new in it |
//! |---|---|
//! | 1 | |
//! | 2 | the token |
//! | 3 | tenants that operators make: their states, limits and revoked certificates, and the cell's; CAs of tenants; `log/synced` |
//!
//! `MEMBERS` is what a member knows of its cell until its state says more: after a crash that may be in the log alone, and flags say how to
//! begin, not how to go on. Directories of before have none. It is text too:
//!
//! ```text
//! tenure-members 1
//! begun new
//! member 8e9e05c52164694d http://10.0.0.1:2380,http://10.0.1.1:2380
//! member ac7c97ef0ec193b0 http://10.0.0.2:2380
//! check 5f3a9c01
//! ```
//!
//! A directory without `IDENTITY` must be empty (but for `LOCK` and `MEMBERS`): a mistyped `--data-dir` must not be filled with files,
//! and a directory of etcd's must not be taken for one of ours.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use crate::ids::CLUSTER_TOKEN_DEFAULT;

const LOCK: &str = "LOCK";
const IDENTITY: &str = "IDENTITY";
const IDENTITY_NEW: &str = "IDENTITY.new";
const MEMBERS: &str = "MEMBERS";
const MEMBERS_NEW: &str = "MEMBERS.new";

/// Version of the layout that this program writes. It reads those before it too.
const LAYOUT_VERSION: u32 = 3;

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
    #[error("{} is of a cluster with --initial-cluster-token {found:?}, not {given:?}", path.display())]
    OtherToken { path: PathBuf, found: String, given: String },
}

/// Who this member is, for ever.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    pub member_id: u64,
    pub cluster_id: u64,
}

/// How a member began: with a new cell, or by joining one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct First {
    pub is_new_cell: bool,
    /// Ids and peer URLs of all members, this one too.
    pub members: Vec<(u64, Vec<String>)>,
}

/// A data directory that belongs to this process until this is dropped.
#[derive(Debug)]
pub struct DataDir {
    path: PathBuf,
    identity: Identity,
    /// What is written of an earlier layout.
    earlier: Option<Written>,
    /// Closing it releases the lock.
    _lock: File,
}

impl DataDir {
    /// Takes the directory, making it with `identity`, of a cluster with this token, and with what it began with, if there is none yet.
    ///
    /// # Errors
    /// [`DataDirError`]; nothing was changed, except that the directory and its lock file may exist now.
    pub fn open(path: &Path, identity: Identity, token: &str, first: &First) -> Result<Self, DataDirError> {
        // Its user's alone, as etcd's.
        fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(io("create", path))?;
        if !path.join(IDENTITY).exists() {
            check_unused(path)?;
        }
        let lock = take_lock(path)?;
        let (identity, earlier) = match read_identity(path)? {
            Some(found) => (found.identity, Some(found).filter(|found| found.version < LAYOUT_VERSION)),
            None => {
                check_unused(path)?;
                write_whole(path, MEMBERS, MEMBERS_NEW, &first.encode())?;
                let token = Some(written(token));
                write_identity(path, &Written { version: LAYOUT_VERSION, identity, token })?;
                (identity, None)
            }
        };
        let this = DataDir { path: path.to_path_buf(), identity, earlier, _lock: lock };
        for part in [this.log(), this.state()] {
            fs::create_dir_all(&part).map_err(io("create", &part))?;
        }
        Ok(this)
    }

    /// Makes this release's layout the directory's, which an earlier release then refuses. Call it when nothing is in the way of going on with
    /// what is there, and before anything is written.
    ///
    /// # Errors
    /// [`DataDirError::Io`].
    pub fn adopt_layout(&mut self) -> Result<(), DataDirError> {
        let Some(earlier) = self.earlier.take() else { return Ok(()) };
        let (from, to) = (earlier.version, LAYOUT_VERSION);
        write_identity(&self.path, &Written { version: LAYOUT_VERSION, ..earlier })?;
        tracing::info!(from, to, "the data directory has another layout from now on");
        Ok(())
    }

    /// Who the directory belongs to already; `None` if it has to be decided first, and may be: it is empty, or not there.
    /// `token` must be the one that it was made with, if that is known, or etcd's default: whoever says nothing means any.
    ///
    /// # Errors
    /// As [`DataDir::open`], and [`DataDirError::OtherToken`].
    pub fn identity_in(path: &Path, token: &str) -> Result<Option<Identity>, DataDirError> {
        let Some(found) = read_identity(path)? else {
            return if path.exists() { check_unused(path).map(|()| None) } else { Ok(None) };
        };
        match found.token {
            Some(found) if found != written(token) && token != CLUSTER_TOKEN_DEFAULT => {
                Err(DataDirError::OtherToken { path: path.to_path_buf(), found, given: token.to_string() })
            }
            Some(_) | None => Ok(Some(found.identity)),
        }
    }

    /// What the directory began with; `None` in one of an earlier release.
    ///
    /// # Errors
    /// [`DataDirError::Io`], [`DataDirError::Damaged`].
    pub fn first_in(path: &Path) -> Result<Option<First>, DataDirError> {
        let path = path.join(MEMBERS);
        match fs::read_to_string(&path) {
            Ok(text) => First::decode(&text).map(Some).ok_or(DataDirError::Damaged(path)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(io("read", &path)(error)),
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn identity(&self) -> Identity {
        self.identity
    }

    /// Where the raft log lives.
    pub fn log(&self) -> PathBuf {
        self.path.join("log")
    }

    /// Where copies of the state come and go.
    pub fn snapshots(&self) -> PathBuf {
        self.path.join("snapshot")
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

/// What has no identity must not hold anything else.
fn check_unused(directory: &Path) -> Result<(), DataDirError> {
    if directory.join("member").is_dir() {
        return Err(DataDirError::OfEtcd(directory.to_path_buf()));
    }
    for entry in fs::read_dir(directory).map_err(io("list", directory))? {
        let name = entry.map_err(io("list", directory))?.file_name();
        // A crash may have left the new identity half written; `lost+found` is what an empty volume has.
        if ![LOCK, IDENTITY_NEW, MEMBERS, MEMBERS_NEW, "lost+found"].iter().any(|known| name == *known) {
            return Err(DataDirError::NotOurs(directory.to_path_buf()));
        }
    }
    Ok(())
}

impl First {
    fn encode(&self) -> String {
        let begun = if self.is_new_cell { "new" } else { "existing" };
        let mut body = format!("tenure-members 1\nbegun {begun}\n");
        for (id, urls) in &self.members {
            body.push_str(&format!("member {id:016x} {}\n", urls.join(",")));
        }
        let check = crc32fast::hash(body.as_bytes());
        format!("{body}check {check:08x}\n")
    }

    fn decode(text: &str) -> Option<Self> {
        let mut lines = text.lines();
        lines.next().filter(|line| *line == "tenure-members 1")?;
        let is_new_cell = lines.next()? == "begun new";
        let members = lines.map_while(|line| {
            let (id, urls) = line.strip_prefix("member ")?.split_once(' ')?;
            Some((u64::from_str_radix(id, 16).ok()?, urls.split(',').map(str::to_string).collect()))
        });
        let first = First { is_new_cell, members: members.collect() };
        (first.encode() == text).then_some(first)
    }
}

/// A token as it is written: in one line.
fn written(token: &str) -> String {
    token.escape_default().to_string()
}

/// What the file says.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Written {
    version: u32,
    identity: Identity,
    /// In the form in which it is written.
    token: Option<String>,
}

impl Written {
    fn encode(&self) -> String {
        let Written { version, identity: Identity { member_id, cluster_id }, token } = self;
        let mut body = format!("tenure-data {version}\nmember {member_id:016x}\ncluster {cluster_id:016x}\n");
        if let Some(token) = token {
            body.push_str(&format!("token {token}\n"));
        }
        let check = crc32fast::hash(body.as_bytes());
        format!("{body}check {check:08x}\n")
    }
}

fn read_identity(directory: &Path) -> Result<Option<Written>, DataDirError> {
    let path = directory.join(IDENTITY);
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(io("read", &path)(error)),
    };
    let mut lines = text.lines();
    let mut field = |name: &str| lines.next()?.strip_prefix(name)?.strip_prefix(' ');
    // The version comes first: of another layout nothing else is known, not even that it has a checksum.
    let Some(version) = field("tenure-data") else { return Err(DataDirError::Damaged(path)) };
    let version = match version.parse() {
        Ok(known @ 1..=LAYOUT_VERSION) => known,
        Ok(_) | Err(_) => return Err(DataDirError::UnknownVersion { version: version.to_string(), path }),
    };
    let mut id = |name: &str| field(name).and_then(|digits| u64::from_str_radix(digits, 16).ok());
    let identity = id("member").zip(id("cluster")).map(|(member_id, cluster_id)| Identity { member_id, cluster_id });
    let token = field("token").map(str::to_string);
    match identity.map(|identity| Written { version, identity, token }) {
        Some(found) if found.encode() == text => Ok(Some(found)),
        Some(_) | None => Err(DataDirError::Damaged(path)),
    }
}

fn write_identity(directory: &Path, identity: &Written) -> Result<(), DataDirError> {
    write_whole(directory, IDENTITY, IDENTITY_NEW, &identity.encode())
}

/// Durable on return, and whole at every moment.
fn write_whole(directory: &Path, name: &str, new_name: &str, text: &str) -> Result<(), DataDirError> {
    let new = directory.join(new_name);
    let mut file = File::create(&new).map_err(io("create", &new))?;
    file.write_all(text.as_bytes()).map_err(io("write", &new))?;
    file.sync_all().map_err(io("sync", &new))?;
    fs::rename(&new, directory.join(name)).map_err(io("rename", &new))?;
    let opened = File::open(directory).map_err(io("open", directory))?;
    opened.sync_all().map_err(io("sync", directory))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    const FIRST: Identity = Identity { member_id: 0x8e9e_05c5_2164_694d, cluster_id: 0xcdf8_1819_4e3a_8c32 };

    const TOKEN: &str = "a b";

    fn first() -> First {
        let urls = ["http://10.0.0.1:2380", "http://10.0.1.1:2380"].map(str::to_string);
        First {
            is_new_cell: true,
            members: vec![(FIRST.member_id, urls.to_vec()), (7, vec!["http://b:2380".to_string()])],
        }
    }

    #[test]
    fn what_it_began_with_stays_too() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path();
        // A crash came between the two.
        fs::write(path.join(MEMBERS), "half").unwrap();
        drop(DataDir::open(path, FIRST, TOKEN, &first()).unwrap());
        drop(DataDir::open(path, FIRST, TOKEN, &First { is_new_cell: false, members: Vec::new() }).unwrap());
        assert_eq!(DataDir::first_in(path).unwrap(), Some(first()));
        let good = fs::read_to_string(path.join(MEMBERS)).unwrap();
        for bad in ["", "tenure-members 1\n", &good.replace("new", "old"), &good[..good.len() - 1]] {
            fs::write(path.join(MEMBERS), bad).unwrap();
            assert!(matches!(DataDir::first_in(path), Err(DataDirError::Damaged(_))), "{bad:?}");
        }
        fs::remove_file(path.join(MEMBERS)).unwrap();
        assert_eq!(DataDir::first_in(path).unwrap(), None);
    }

    #[test]
    fn the_first_identity_stays() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("d");
        assert_eq!(DataDir::open(&path, FIRST, TOKEN, &first()).unwrap().identity(), FIRST);
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o700, "nobody else's");
        let other = Identity { member_id: 1, cluster_id: 2 };
        assert_eq!(DataDir::open(&path, other, TOKEN, &first()).unwrap().identity(), FIRST);
    }

    #[test]
    fn one_process_at_a_time() {
        let scratch = tempfile::tempdir().unwrap();
        let held = DataDir::open(scratch.path(), FIRST, TOKEN, &first()).unwrap();
        let error = DataDir::open(scratch.path(), FIRST, TOKEN, &first()).unwrap_err();
        assert!(matches!(error, DataDirError::InUse(_)), "{error}");
        drop(held);
        DataDir::open(scratch.path(), FIRST, TOKEN, &first()).unwrap();
    }

    #[test]
    fn foreign_directories_are_refused() {
        let scratch = tempfile::tempdir().unwrap();
        fs::create_dir(scratch.path().join("member")).unwrap();
        assert!(matches!(DataDir::open(scratch.path(), FIRST, TOKEN, &first()), Err(DataDirError::OfEtcd(_))));
        let scratch = tempfile::tempdir().unwrap();
        fs::write(scratch.path().join("thesis.txt"), "").unwrap();
        assert!(matches!(DataDir::open(scratch.path(), FIRST, TOKEN, &first()), Err(DataDirError::NotOurs(_))));
    }

    #[test]
    fn damage_and_other_versions_are_named() {
        let scratch = tempfile::tempdir().unwrap();
        drop(DataDir::open(scratch.path(), FIRST, TOKEN, &first()).unwrap());
        let path = scratch.path().join(IDENTITY);
        let good = fs::read_to_string(&path).unwrap();
        for bad in ["", "tenure-data 3\n", &good.replace("8e9e", "8e9f"), &good[..good.len() - 1]] {
            fs::write(&path, bad).unwrap();
            assert!(
                matches!(DataDir::open(scratch.path(), FIRST, TOKEN, &first()), Err(DataDirError::Damaged(_))),
                "{bad:?}"
            );
        }
        for (version, unknown) in [("0", "0"), ("4", "4"), ("x y", "x y")] {
            fs::write(&path, good.replace("tenure-data 3", &format!("tenure-data {version}"))).unwrap();
            let error = DataDir::open(scratch.path(), FIRST, TOKEN, &first()).unwrap_err();
            assert!(matches!(&error, DataDirError::UnknownVersion { version, .. } if version == unknown), "{error}");
        }
    }

    // What earlier releases wrote. From then on they refuse the directory: they would not see what tenants' states are.
    #[test]
    fn an_older_layout_is_read_and_becomes_the_newest() {
        let version_1 = "tenure-data 1\nmember 8e9e05c52164694d\ncluster cdf818194e3a8c32\ncheck 42b6d483\n";
        let version_2 = Written { version: 2, identity: FIRST, token: Some(written(TOKEN)) }.encode();
        for (text, token) in [(version_1, None), (&version_2, Some(written(TOKEN)))] {
            let scratch = tempfile::tempdir().unwrap();
            let path = scratch.path().join(IDENTITY);
            fs::write(&path, text).unwrap();
            assert_eq!(DataDir::identity_in(scratch.path(), TOKEN).unwrap(), Some(FIRST));
            assert_eq!(fs::read_to_string(&path).unwrap(), text, "only asked");
            let mut opened =
                DataDir::open(scratch.path(), Identity { member_id: 1, cluster_id: 2 }, TOKEN, &first()).unwrap();
            assert_eq!(opened.identity(), FIRST);
            assert_eq!(fs::read_to_string(&path).unwrap(), text, "something may still be in the way");
            opened.adopt_layout().unwrap();
            assert_eq!(read_identity(scratch.path()).unwrap(), Some(Written { version: 3, identity: FIRST, token }));
        }
    }

    #[test]
    fn another_clusters_token_is_refused() {
        let scratch = tempfile::tempdir().unwrap();
        drop(DataDir::open(scratch.path(), FIRST, "one\ntwo ä", &first()).unwrap());
        for token in ["one\ntwo ä", CLUSTER_TOKEN_DEFAULT] {
            assert_eq!(DataDir::identity_in(scratch.path(), token).unwrap(), Some(FIRST));
        }
        let error = DataDir::identity_in(scratch.path(), "another").unwrap_err().to_string();
        assert!(error.contains("of a cluster with --initial-cluster-token") && !error.contains('\n'), "{error}");
    }
}
