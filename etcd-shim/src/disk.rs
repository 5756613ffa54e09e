//! Room on the disk of the data directory: writes are refused while there is still some left.
//!
//! A member whose log cannot be written must stop, and one whose engine cannot write its files loses its way back. So a
//! reserve is never given to clients. Once the free bytes fall below it, the member
//!
//! - refuses what makes the store grow, as etcd does without space (`NoSpace`); deletes, compactions and revokes go on, and
//!   so do reads;
//! - hands leadership to another member, if it has it, and again if it gets it back;
//! - says so: once in the log, in `/health`, in its status, in `/metrics`.
//!
//! It goes on taking what the others write, which is not its to refuse, down to a quarter of the reserve. Below that it takes
//! nothing from them either ([`raft::Config::append_paused`](tenure_raft_server::Config)), and is behind until there is room.
//! There is again when a quarter more than the reserve is free, so that it does not go to and fro.
//!
//! The free bytes are looked at twice a second. What another program takes in between, down to the last byte, still stops the
//! member; its data is whole then, and it starts again when there is room.

use std::ffi::CString;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// The reserve, unless the disk is so small that a tenth of it is less.
pub const RESERVE_BYTES_DEFAULT: u64 = 256 << 20;

/// How often the free bytes are looked at.
pub const LOOK_PERIOD: Duration = Duration::from_millis(500);

/// How often a full member tries to get rid of the leadership.
pub const HAND_OVER_PERIOD: Duration = Duration::from_secs(10);

/// The same when it comes back again and again, because the others are full too.
pub const HAND_OVER_PERIOD_MAX: Duration = Duration::from_secs(300);

/// What is known of the disk.
#[derive(Debug)]
pub struct Disk {
    path: PathBuf,
    reserve_bytes: u64,
    free_bytes: AtomicU64,
    total_bytes: AtomicU64,
    is_full: AtomicBool,
    append_paused: Arc<AtomicBool>,
}

impl Disk {
    /// Looks at the disk of this directory, which must exist. A reserve of 0 asks for none.
    ///
    /// # Errors
    /// If the system does not say how much is free.
    pub fn new(path: &Path, reserve_bytes: Option<u64>) -> io::Result<Self> {
        let Space { free_bytes, total_bytes } = space(path)?;
        let disk = Disk {
            path: path.to_path_buf(),
            reserve_bytes: reserve_bytes.unwrap_or(RESERVE_BYTES_DEFAULT.min(total_bytes / 10)),
            free_bytes: AtomicU64::new(free_bytes),
            total_bytes: AtomicU64::new(total_bytes),
            is_full: AtomicBool::new(false),
            append_paused: Arc::default(),
        };
        disk.judge(free_bytes);
        Ok(disk)
    }

    /// Whether clients' writes are refused.
    pub fn is_full(&self) -> bool {
        self.is_full.load(Ordering::Relaxed)
    }

    /// For raft-server: whether the log is to grow no more.
    pub fn append_paused(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.append_paused)
    }

    /// As of the last look.
    pub fn free_bytes(&self) -> u64 {
        self.free_bytes.load(Ordering::Relaxed)
    }

    /// The size of the disk, as of the last look: some grow.
    pub fn total_bytes(&self) -> u64 {
        self.total_bytes.load(Ordering::Relaxed)
    }

    pub fn reserve_bytes(&self) -> u64 {
        self.reserve_bytes
    }

    /// Looks again.
    pub fn look(&self) {
        match space(&self.path) {
            Ok(Space { free_bytes, total_bytes }) => {
                self.total_bytes.store(total_bytes, Ordering::Relaxed);
                self.judge(free_bytes);
            }
            Err(error) => tracing::warn!(%error, path = %self.path.display(), "look for room on the disk"),
        }
    }

    fn judge(&self, free_bytes: u64) {
        let reserve_bytes = self.reserve_bytes;
        let margin_bytes = reserve_bytes / 4;
        self.free_bytes.store(free_bytes, Ordering::Relaxed);
        self.append_paused.store(free_bytes < margin_bytes, Ordering::Relaxed);
        let was_full = self.is_full();
        let is_full = free_bytes < if was_full { reserve_bytes + margin_bytes } else { reserve_bytes };
        self.is_full.store(is_full, Ordering::Relaxed);
        match (was_full, is_full) {
            (false, true) => {
                let path = self.path.display();
                tracing::warn!(%path, free_bytes, reserve_bytes, "the disk is full: writes are refused until there is room");
            }
            (true, false) => tracing::info!(free_bytes, "there is room on the disk: writes go on"),
            (false, false) | (true, true) => {}
        }
    }
}

#[derive(Clone, Copy, Debug)]
struct Space {
    /// For a process without privileges.
    free_bytes: u64,
    total_bytes: u64,
}

fn space(path: &Path) -> io::Result<Space> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut found = std::mem::MaybeUninit::<libc::statvfs64>::uninit();
    // SAFETY: the path is a C string and the structure is there to be filled, both for as long as the call takes. The C
    // library's own, so that a test can put itself in between.
    let failed = unsafe { libc::statvfs64(path.as_ptr(), found.as_mut_ptr()) };
    if failed != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call succeeded, so it filled the structure.
    let found = unsafe { found.assume_init() };
    Ok(Space {
        free_bytes: found.f_bavail.saturating_mul(found.f_frsize),
        total_bytes: found.f_blocks.saturating_mul(found.f_frsize),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reserve_is_kept_and_room_must_be_worth_it() {
        let dir = tempfile::tempdir().unwrap();
        let disk = Disk::new(dir.path(), Some(1_000)).unwrap();
        let paused = disk.append_paused();
        let judge = |free_bytes| {
            disk.judge(free_bytes);
            (disk.is_full(), paused.load(Ordering::Relaxed))
        };
        assert_eq!(judge(1_000), (false, false));
        assert_eq!(judge(999), (true, false));
        assert_eq!(judge(249), (true, true));
        assert_eq!(judge(1_249), (true, false), "not enough to go on");
        assert_eq!(judge(1_250), (false, false));
        let disk = Disk::new(dir.path(), None).unwrap();
        assert!(disk.total_bytes() >= disk.free_bytes());
        assert!(disk.free_bytes() > 0 && (1..=RESERVE_BYTES_DEFAULT).contains(&disk.reserve_bytes()));
        assert!(Disk::new(&dir.path().join("nowhere"), None).is_err());
    }
}
