//! Every tunable of a member, with its unit in the name and its default and range in the doc.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use bytes::Bytes;

use crate::error::{MemberFault, StartError};

/// Called once, on the thread that failed, when this member can no longer keep its promises. The default logs and aborts
/// the process. One that returns (tests, embedders) leaves a member that refuses everything.
pub type FaultHandler = Arc<dyn Fn(&MemberFault) + Send + Sync>;

/// See the fields. Clone it, change what differs, [`Config::validate`] is called by `start`.
#[derive(Clone)]
pub struct Config {
    /// This member. Not 0, unique in the group, the same for the life of `data_dir`.
    pub id: u64,
    /// The log's directory, created if missing. Held exclusively.
    pub data_dir: PathBuf,
    /// Where snapshots are kept while they come and go; created if missing, what an earlier life left in it is removed. Must
    /// be on the file system of the state. Default: beside `data_dir`.
    pub snapshot_dir: PathBuf,
    /// Who votes when the group is created; must contain `id`. Empty: the group exists, its leader will send what it holds. Read
    /// on the first start only: afterwards the log knows.
    pub initial_voters: Vec<u64>,
    /// For a majority that is lost for ever: from this start on the member is the only voter and forgets the others, and all
    /// that its log holds is committed, also what was not yet. What the others acknowledged without it is lost. The state
    /// machine hears nothing of it. Of no effect on a new log. Default false.
    pub force_sole_voter: bool,
    /// While true the log is to grow no more: entries and snapshots of a leader are not taken (it sends them again), nor are
    /// other members' commands. For a disk that is nearly full.
    pub append_paused: Arc<AtomicBool>,
    /// Length of raft's clock tick. Default 100, range 1–10,000.
    pub tick_ms: u64,
    /// Ticks without a leader after which a member votes for another one. Default 10, more than `heartbeat_timeout_ticks`.
    pub election_timeout_ticks: usize,
    /// A member stands for election itself one tick later than that, since the others' ticks are not its own and they would
    /// refuse it, and up to so many ticks more, drawn at random, so that not all do at once. Half a timeout is enough for five
    /// voters, and they are without a leader for less time than with a whole one. Default 5, at least 1.
    pub election_jitter_ticks: usize,
    /// Whether a member asks if it could win before it disturbs the others with an election. Default true.
    pub pre_vote: bool,
    /// Ticks between heartbeats. Default 1, at least 1.
    pub heartbeat_timeout_ticks: usize,
    /// Commands of one batch, in bytes; a larger command travels alone. Default 1 MiB, range 1 KiB–64 MiB.
    pub batch_bytes_max: usize,
    /// Commands of one batch. Default 4,096, range 1–1 Mi.
    pub batch_commands_max: usize,
    /// One command, in bytes. Default 16 MiB, range 1 KiB–256 MiB.
    pub command_bytes_max: usize,
    /// Batches proposed and not yet on this disk. While one is, the next starts only when it is full; at the bound none
    /// does. Default 4, range 1–64.
    pub inflight_batches_max: usize,
    /// Commands proposed and not yet applied here. At the bound no batch starts. Default 64 MiB, range 1 KiB–4 GiB.
    pub inflight_bytes_max: usize,
    /// Commands of one lane waiting for a batch. Beyond: `QueueFull`. Default 16 MiB, range 1 KiB–`queue_bytes_max`.
    pub lane_queue_bytes_max: usize,
    /// Commands of all lanes waiting for a batch. No lane may take more than what is left over, so a few busy lanes
    /// cannot lock out a quiet one. Default 256 MiB, range 1 KiB–64 GiB.
    pub queue_bytes_max: usize,
    /// Reads waiting for a read point. Beyond: `QueueFull`. Default 65,536, at least 1.
    pub read_waiters_max: usize,
    /// Ticks until a read without a leader fails. Default 50, at least 1.
    pub read_timeout_ticks: usize,
    /// Messages and notices waiting for the raft thread. Beyond, peers' messages are dropped (raft repeats them). Default 4,096,
    /// range 64–1 Mi.
    pub event_queue_max: usize,
    /// Entries from peers waiting for the log. Beyond, further ones are dropped (raft repeats them). Default 64 MiB.
    pub append_queue_bytes_max: usize,
    /// Entries in one message to a peer, in bytes. Default 1 MiB.
    pub message_bytes_max: u64,
    /// Messages with entries on their way to one peer. Default 256, at least 1.
    pub inflight_messages_max: usize,
    /// Entries handed to one `StateMachine::apply`, in bytes; a larger entry goes alone. Default 4 MiB, at least 1.
    pub apply_bytes_max: usize,
    /// Newest entries kept in memory, so that neither apply nor peers that keep up read the disk. Default 64 MiB.
    pub log_cache_bytes_max: usize,
    /// When the log holds more than this, the state is flushed in the background and the log truncated to it; at twice this,
    /// apply waits for that. So twice this bounds the disk used and the time a restart takes. Default 64 MiB, at least 64 KiB.
    pub log_bytes_flush: u64,
    /// If not 0, the state is flushed too when it has applied this many entries since. Default 0.
    pub flush_entries: u64,
    /// An apply of a round of entries that takes longer is counted and logged. Default 100 ms.
    pub slow_apply: Duration,
    /// Of what the state has durably, the newest entries are kept for members that are behind: this many at most. Default 5,000.
    pub log_catchup_entries: u64,
    /// And of these as many as fit. Default 64 MiB. A sole voter keeps none.
    pub log_catchup_bytes: u64,
    /// Tells this life of the member from others. Default 0: drawn at random.
    pub life: u64,
    /// Whether snapshots are written on raft's own thread. For simulations, whose threads are none. Default false.
    pub snapshots_on_raft_thread: bool,
    /// Whether a clean stop flushes the state, so that the next start replays nothing. Default true.
    pub flush_on_stop: bool,
    /// What a command counts for in a lane's turn, in batches and in `inflight_bytes_max`: at least its length, more if it does far more than it
    /// says. Queues count lengths. The same on all members, or the leader's counts. Default: its length.
    pub cost_bytes: fn(&Bytes) -> usize,
    /// Where replies are sent. On the runtime of those who wait, one wake-up from the apply thread serves all replies of a
    /// round; without, each is its own. It has to be a runtime of several threads, with I/O enabled (starting panics without): a reply comes when it
    /// is driven. The member has a pipe and a task for it.
    pub reply_runtime: Option<tokio::runtime::Handle>,
    /// What happens when this member cannot go on. `None`: log and abort the process.
    pub fault_handler: Option<FaultHandler>,
}

impl Config {
    /// The defaults, for a group of which `id` is the only voter.
    pub fn new(id: u64, data_dir: impl Into<PathBuf>) -> Self {
        let data_dir = data_dir.into();
        Config {
            id,
            snapshot_dir: data_dir.with_extension("snapshots"),
            data_dir,
            initial_voters: vec![id],
            force_sole_voter: false,
            append_paused: Arc::default(),
            tick_ms: 100,
            election_timeout_ticks: 10,
            election_jitter_ticks: 5,
            pre_vote: true,
            heartbeat_timeout_ticks: 1,
            batch_bytes_max: 1 << 20,
            batch_commands_max: 4096,
            command_bytes_max: 16 << 20,
            inflight_batches_max: 4,
            inflight_bytes_max: 64 << 20,
            lane_queue_bytes_max: 16 << 20,
            queue_bytes_max: 256 << 20,
            read_waiters_max: 65_536,
            read_timeout_ticks: 50,
            event_queue_max: 4096,
            append_queue_bytes_max: 64 << 20,
            message_bytes_max: 1 << 20,
            inflight_messages_max: 256,
            apply_bytes_max: 4 << 20,
            log_cache_bytes_max: 64 << 20,
            log_bytes_flush: 64 << 20,
            flush_entries: 0,
            slow_apply: Duration::from_millis(100),
            log_catchup_entries: 5_000,
            log_catchup_bytes: 64 << 20,
            life: 0,
            snapshots_on_raft_thread: false,
            flush_on_stop: true,
            cost_bytes: Bytes::len,
            reply_runtime: None,
            fault_handler: None,
        }
    }

    /// # Errors
    /// [`StartError::Config`] names the first field out of its range.
    pub fn validate(&self) -> Result<(), StartError> {
        let within = |name: &str, value: u64, low: u64, high: u64| {
            if (low..=high).contains(&value) {
                Ok(())
            } else {
                Err(StartError::Config(format!("{name} is {value}, must be in {low}..={high}")))
            }
        };
        const KIB: u64 = 1 << 10;
        const GIB: u64 = 1 << 30;
        within("id", self.id, 1, u64::MAX)?;
        if !self.initial_voters.is_empty() && !self.initial_voters.contains(&self.id) {
            return Err(StartError::Config(format!("initial_voters must contain id {}", self.id)));
        }
        if self.initial_voters.contains(&0) {
            return Err(StartError::Config("initial_voters must not contain 0".to_owned()));
        }
        within("tick_ms", self.tick_ms, 1, 10_000)?;
        within("heartbeat_timeout_ticks", self.heartbeat_timeout_ticks as u64, 1, 1000)?;
        let heartbeat = self.heartbeat_timeout_ticks as u64;
        within("election_timeout_ticks", self.election_timeout_ticks as u64, heartbeat + 1, 10_000)?;
        within("election_jitter_ticks", self.election_jitter_ticks as u64, 1, 10_000)?;
        within("batch_bytes_max", self.batch_bytes_max as u64, KIB, 64 << 20)?;
        within("batch_commands_max", self.batch_commands_max as u64, 1, 1 << 20)?;
        within("command_bytes_max", self.command_bytes_max as u64, KIB, 256 << 20)?;
        within("inflight_batches_max", self.inflight_batches_max as u64, 1, 64)?;
        within("inflight_bytes_max", self.inflight_bytes_max as u64, KIB, 4 * GIB)?;
        within("queue_bytes_max", self.queue_bytes_max as u64, KIB, 64 * GIB)?;
        within("lane_queue_bytes_max", self.lane_queue_bytes_max as u64, KIB, self.queue_bytes_max as u64)?;
        within("read_waiters_max", self.read_waiters_max as u64, 1, u64::MAX)?;
        within("read_timeout_ticks", self.read_timeout_ticks as u64, 1, u64::MAX)?;
        within("event_queue_max", self.event_queue_max as u64, 64, 1 << 20)?;
        within("inflight_messages_max", self.inflight_messages_max as u64, 1, 1 << 16)?;
        within("apply_bytes_max", self.apply_bytes_max as u64, 1, 4 * GIB)?;
        within("log_bytes_flush", self.log_bytes_flush, 64 * KIB, 1024 * GIB)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_valid_and_faults_are_named() {
        Config::new(1, "x").validate().expect("defaults");
        type Case = (&'static str, fn(&mut Config));
        let cases: [Case; 5] = [
            ("id", |c| c.id = 0),
            ("initial_voters", |c| c.initial_voters = vec![2]),
            ("election_timeout_ticks", |c| c.election_timeout_ticks = 1),
            ("lane_queue_bytes_max", |c| c.lane_queue_bytes_max = c.queue_bytes_max + 1),
            ("log_bytes_flush", |c| c.log_bytes_flush = 1),
        ];
        for (name, spoil) in cases {
            let mut config = Config::new(1, "x");
            spoil(&mut config);
            let error = config.validate().expect_err(name).to_string();
            assert!(error.contains(name), "{error}");
        }
    }
}
