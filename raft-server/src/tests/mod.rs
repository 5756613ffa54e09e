//! A whole member, and groups of them, through the public interface. What one file can show alone is tested there.
//!
//! Nothing here sleeps: tests wait for replies, for read points and for changes of leadership.

mod cluster;
mod faults;
mod recovery;
mod single;
mod snapshots;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use tenure_storage::Fault;

use crate::{
    CommittedEntry, Config, Handle, JoinGuard, MemberFault, NoPeers, ReadError, Snapshotter, StateMachine, start,
};

/// A member that hangs fails its test after this. It judges nothing else: a machine that is shared may stall for seconds anywhere.
const PATIENCE: Duration = Duration::from_secs(180);

/// What a [`Recorder`] holds: every command, in order.
#[derive(Clone, Debug, Default, PartialEq)]
struct Records {
    applied_index: u64,
    commands: Vec<Bytes>,
}

/// Entries for which a [`Recorder`] has room at a time.
const ROUND_ENTRIES: usize = 3;

/// Remembers every command. Has a memory, lost with it, and a disk, which a test keeps over a crash.
struct Recorder {
    memory: Shared<Records>,
    disk: Shared<Records>,
    /// Held by a test to stop the state machine.
    gate: Arc<tokio::sync::Mutex<()>>,
    /// Commands per `apply`, to see batches.
    entry_sizes: Shared<Vec<usize>>,
    /// Of each command, whether its reply was wanted.
    wanted: Shared<Vec<bool>>,
    flushes: Shared<u64>,
}

type Shared<T> = Arc<Mutex<T>>;

/// What a test keeps of a [`Recorder`] that a member owns.
#[derive(Clone, Default)]
struct Probe {
    memory: Shared<Records>,
    disk: Shared<Records>,
    gate: Arc<tokio::sync::Mutex<()>>,
    entry_sizes: Shared<Vec<usize>>,
    wanted: Shared<Vec<bool>>,
    flushes: Shared<u64>,
}

impl Probe {
    /// The state machine as it comes up with what is on `disk`.
    fn boot(&self) -> Recorder {
        *self.memory.lock() = self.disk.lock().clone();
        Recorder {
            memory: Arc::clone(&self.memory),
            disk: Arc::clone(&self.disk),
            gate: Arc::clone(&self.gate),
            entry_sizes: Arc::clone(&self.entry_sizes),
            wanted: Arc::clone(&self.wanted),
            flushes: Arc::clone(&self.flushes),
        }
    }

    fn commands(&self) -> Vec<Bytes> {
        self.memory.lock().commands.clone()
    }

    /// Stops `apply` until the guard goes.
    async fn close_gate(&self) -> tokio::sync::OwnedMutexGuard<()> {
        Arc::clone(&self.gate).lock_owned().await
    }
}

impl StateMachine for Recorder {
    /// How many commands there are now: the place of the one that is answered, from 1.
    type Reply = usize;

    fn applied_index(&self) -> u64 {
        self.memory.lock().applied_index
    }

    fn apply(&mut self, entries: Vec<CommittedEntry>) -> Result<Vec<Vec<Option<usize>>>, Fault> {
        drop(self.gate.blocking_lock());
        let mut memory = self.memory.lock();
        let mut replies = Vec::new();
        for entry in entries.into_iter().take(ROUND_ENTRIES) {
            let expected = memory.applied_index.max(crate::BOOTSTRAP_INDEX) + 1;
            assert_eq!(entry.index, expected, "each entry once, in order");
            memory.applied_index = entry.index;
            if !entry.commands.is_empty() {
                self.entry_sizes.lock().push(entry.commands.len());
            }
            assert_eq!(entry.wanted.len(), entry.commands.len());
            self.wanted.lock().extend(&entry.wanted);
            let mut entry_replies = Vec::new();
            for command in entry.commands {
                match command.trim_ascii_end() {
                    b"fault" => return Err(Fault::Engine("asked for".to_owned())),
                    b"panic" => panic!("asked for"),
                    _ => memory.commands.push(command),
                }
                entry_replies.push(Some(memory.commands.len()));
            }
            replies.push(entry_replies);
        }
        Ok(replies)
    }

    fn durable_index(&self) -> Result<u64, Fault> {
        Ok(self.disk.lock().applied_index)
    }

    fn flush(&mut self) -> Result<u64, Fault> {
        let memory = self.memory.lock().clone();
        *self.flushes.lock() += 1;
        *self.disk.lock() = memory.clone();
        Ok(memory.applied_index)
    }

    fn snapshotter(&self) -> Arc<dyn Snapshotter> {
        Arc::new(RecordWriter(Arc::clone(&self.memory)))
    }

    fn install(&mut self, dir: &Path, index: u64) -> Result<(), Fault> {
        let text = std::fs::read(dir.join("records"))?;
        let mut lines = text.split(|byte| *byte == b'\n');
        let applied_index = String::from_utf8_lossy(lines.next().unwrap()).parse().unwrap();
        let commands = lines.filter(|line| !line.is_empty()).map(Bytes::copy_from_slice).collect();
        assert_eq!(applied_index, index);
        let records = Records { applied_index, commands };
        *self.memory.lock() = records.clone();
        *self.disk.lock() = records;
        Ok(())
    }
}

/// Writes records as lines; commands of these tests have no newline.
struct RecordWriter(Shared<Records>);

impl Snapshotter for RecordWriter {
    fn write_to(&self, dir: &Path) -> Result<u64, Fault> {
        let Records { applied_index, commands } = self.0.lock().clone();
        let mut text = format!("{applied_index}\n").into_bytes();
        for command in commands {
            text.extend_from_slice(&command);
            text.push(b'\n');
        }
        std::fs::create_dir(dir)?;
        std::fs::write(dir.join("records"), text)?;
        Ok(applied_index)
    }
}

/// Where the member's log is, below its directory.
fn log_dir(dir: &Path) -> PathBuf {
    dir.join("log")
}

/// Small times, and a crash at stop: what was not flushed is gone. All that the member keeps is below `dir`. Its reads wait for as
/// long as the tests do.
fn config(id: u64, dir: &Path) -> Config {
    let tick_ms = 5;
    Config {
        tick_ms,
        read_timeout_ticks: PATIENCE.as_millis() as usize / tick_ms as usize,
        snapshot_dir: dir.join("snapshots"),
        flush_on_stop: false,
        fault_handler: Some(Arc::new(|fault: &MemberFault| panic!("unexpected fault: {fault:?}"))),
        ..Config::new(id, log_dir(dir))
    }
}

async fn start_single(config: Config, probe: &Probe) -> (Handle<usize>, JoinGuard) {
    let (handle, guard) = start(config, probe.boot(), NoPeers).expect("start");
    wait_for_leadership(&handle).await;
    (handle, guard)
}

async fn wait_for_leadership<R: Send + 'static>(handle: &Handle<R>) {
    let mut leadership = handle.leadership();
    patiently(leadership.wait_for(|now| now.is_leader)).await.expect("the member lives");
}

async fn patiently<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.expect("in time")
}

/// Waits until it is so.
async fn until(mut is_so: impl FnMut() -> bool) {
    patiently(async {
        while !is_so() {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

/// A read point of this member, in a group that may elect another leader at any time.
async fn read_point<R: Send + 'static>(handle: &Handle<R>) -> u64 {
    patiently(async {
        loop {
            match handle.read_barrier().await {
                Ok(index) => break index,
                Err(ReadError::Timeout | ReadError::QueueFull) => tokio::task::yield_now().await,
                Err(ReadError::Stopped) => panic!("member {} has stopped", handle.id()),
            }
        }
    })
    .await
}

fn numbered(numbers: std::ops::Range<usize>) -> Vec<Bytes> {
    numbers.map(|number| Bytes::from(format!("command {number}"))).collect()
}
