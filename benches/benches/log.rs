//! The raft log: what one synced append costs, in time and in CPU, on raft-engine (the log Tenure uses) and on RocksDB (the
//! alternative of decision 0002); and what a command costs on its whole way through a member.
//!
//! `cargo bench -p tenure-benches --bench log --features rocks-log`; without the feature, raft-engine alone.
//! `TENURE_BENCH_DIR` says on which disk (default: the temporary directory). The tables printed first count all threads' CPU
//! (getrusage) and are what the decision cites; criterion's figures follow.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use bytes::Bytes;
use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use tenure_raft_server::{
    BOOTSTRAP_INDEX, CommittedEntry, Conf, Config, EngineLog, LogStore, LogWrite, NoPeers, Position, Snapshotter,
    StateMachine,
};
use tenure_storage::Fault;
#[cfg(feature = "rocks-log")]
use tenure_storage::RocksLog;

const COMMAND_BYTES: usize = 300;
const BATCHES: [usize; 3] = [1, 16, 128];
/// The log is truncated when it holds this much, as the server does by default.
const FLUSH_BYTES: usize = 64 << 20;

/// A log that appends one entry, synced, and forgets old ones at the usual pace.
trait Candidate {
    const NAME: &'static str;
    fn open(dir: &std::path::Path) -> Self;
    fn append(&mut self, index: u64, commands: &[Bytes]);
    fn truncate(&mut self, through: u64);
}

struct OnRaftEngine(EngineLog);

impl Candidate for OnRaftEngine {
    const NAME: &'static str = "raft-engine";

    fn open(dir: &std::path::Path) -> Self {
        let log = EngineLog::open(dir, FLUSH_BYTES as u64).expect("open");
        log.bootstrap(1, Position { index: BOOTSTRAP_INDEX, term: 1 }, &Conf::default()).expect("bootstrap");
        OnRaftEngine(log)
    }

    fn append(&mut self, index: u64, commands: &[Bytes]) {
        self.0.append(&LogWrite::of_commands(Position { index, term: 1 }, commands)).expect("append");
    }

    fn truncate(&mut self, through: u64) {
        self.0.truncate(Position { index: through, term: 1 }).expect("truncate");
    }
}

#[cfg(feature = "rocks-log")]
struct OnRocks(RocksLog);

#[cfg(feature = "rocks-log")]
impl Candidate for OnRocks {
    const NAME: &'static str = "rocksdb";

    fn open(dir: &std::path::Path) -> Self {
        OnRocks(RocksLog::open(dir).expect("open"))
    }

    fn append(&mut self, index: u64, commands: &[Bytes]) {
        // The entry's data and the hard state, as large as raft's own encoding makes them.
        let mut entry = Vec::with_capacity(16 + commands.len() * (COMMAND_BYTES + 4));
        entry.resize(16, 0);
        for command in commands {
            entry.extend_from_slice(&[0; 4]);
            entry.extend_from_slice(command);
        }
        self.0.append(index, &entry, &index.to_be_bytes()).expect("append");
    }

    fn truncate(&mut self, through: u64) {
        self.0.truncate(through).expect("truncate");
    }
}

/// A log that is written to: the next index, and when to truncate.
struct Writer<L> {
    log: L,
    commands: Vec<Bytes>,
    index: u64,
    since_truncation_bytes: usize,
    _dir: tempfile::TempDir,
}

impl<L: Candidate> Writer<L> {
    fn new(batch: usize) -> Self {
        let dir = bench_dir();
        let (log, commands) = (L::open(dir.path()), (0..batch).map(command).collect());
        Writer { log, commands, index: BOOTSTRAP_INDEX, since_truncation_bytes: 0, _dir: dir }
    }

    fn append(&mut self) {
        self.index += 1;
        self.log.append(self.index, &self.commands);
        self.since_truncation_bytes += self.commands.len() * COMMAND_BYTES;
        if self.since_truncation_bytes >= FLUSH_BYTES {
            self.log.truncate(self.index);
            self.since_truncation_bytes = 0;
        }
    }
}

/// As compressible as a Kubernetes object: a common frame around names, numbers and ids of its own.
fn command(number: usize) -> Bytes {
    let id = number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut text = format!(
        "/registry/pods/namespace-{}/deployment-{id:x}-{:x}: {{\"uid\":\"{:032x}\",\"labels\":{{\"app\":\"app-{}\",\"hash\":\"{:x}\"}},\
         \"creationTimestamp\":\"2026-01-01T00:{:02}:{:02}Z\",\"ownerReferences\":[{{\"kind\":\"ReplicaSet\",\"uid\":\"{:032x}\"}}]}}",
        number % 7,
        id >> 40,
        id as u128 * 0x1234_5678_9abc_def1,
        id % 19,
        id >> 20,
        number % 60,
        number % 59,
        id as u128 * 0xfedc_ba98_7654_3211,
    );
    while text.len() < COMMAND_BYTES {
        text.push_str(&format!("{:x}", id.rotate_left(u32::try_from(text.len() % 64).expect("small"))));
    }
    text.truncate(COMMAND_BYTES);
    Bytes::from(text)
}

fn bench_dir() -> tempfile::TempDir {
    let parent = std::env::var_os("TENURE_BENCH_DIR").map_or_else(std::env::temp_dir, PathBuf::from);
    tempfile::tempdir_in(parent).expect("create directory")
}

/// CPU that the process has used so far, all threads together.
fn cpu() -> Duration {
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: the pointer is to a rusage, which the call fills.
    let usage = unsafe {
        assert_eq!(libc::getrusage(libc::RUSAGE_SELF, usage.as_mut_ptr()), 0);
        usage.assume_init()
    };
    let time = |t: libc::timeval| {
        let micros = t.tv_sec * 1_000_000 + t.tv_usec;
        Duration::from_micros(u64::try_from(micros).expect("time used is positive"))
    };
    time(usage.ru_utime) + time(usage.ru_stime)
}

/// Bytes that the process has sent to disks.
fn written_bytes() -> u64 {
    let io = std::fs::read_to_string("/proc/self/io").unwrap_or_default();
    let line = io.lines().find_map(|line| line.strip_prefix("write_bytes: "));
    line.and_then(|bytes| bytes.parse().ok()).unwrap_or(0)
}

fn per_append<L: Candidate>(batch: usize) {
    // Enough to fill and truncate the log some times, so that both pay for their upkeep.
    let appends = (3 * FLUSH_BYTES / (batch * COMMAND_BYTES)).min(20_000);
    let mut writer = Writer::<L>::new(batch);
    (0..200).for_each(|_| writer.append());
    let mut times = Vec::with_capacity(appends);
    let (cpu_before, written_before, start) = (cpu(), written_bytes(), Instant::now());
    for _ in 0..appends {
        let start = Instant::now();
        writer.append();
        times.push(start.elapsed());
    }
    let count = u32::try_from(appends).expect("few");
    let (wall, cpu) = (start.elapsed() / count, (cpu() - cpu_before) / count);
    let amplification = (written_bytes() - written_before) as f64 / (appends * batch * COMMAND_BYTES) as f64;
    times.sort_unstable();
    eprintln!(
        "| {:<11} | {batch:>5} | {:>7.1} | {:>7.1} | {:>7.1} | {:>7.1} | {amplification:>6.2} |",
        L::NAME,
        micros(wall),
        micros(times[appends / 2]),
        micros(times[appends * 99 / 100]),
        micros(cpu),
    );
}

fn micros(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e6
}

fn log_append(criterion: &mut Criterion) {
    eprintln!("\n{COMMAND_BYTES}-byte commands, one entry a batch, each append synced; times in µs per append");
    eprintln!("| log         | batch |    mean |     p50 |     p99 |     CPU | write amplification |");
    for batch in BATCHES {
        per_append::<OnRaftEngine>(batch);
        #[cfg(feature = "rocks-log")]
        per_append::<OnRocks>(batch);
    }
    let mut group = criterion.benchmark_group("log_append");
    for batch in BATCHES {
        fn bench<L: Candidate>(bencher: &mut criterion::Bencher<'_>, batch: &usize) {
            let mut writer = Writer::<L>::new(*batch);
            bencher.iter(|| writer.append());
        }
        group.bench_with_input(BenchmarkId::new(OnRaftEngine::NAME, batch), &batch, bench::<OnRaftEngine>);
        #[cfg(feature = "rocks-log")]
        group.bench_with_input(BenchmarkId::new(OnRocks::NAME, batch), &batch, bench::<OnRocks>);
    }
    group.finish();
}

/// A state machine that does nothing, so that the member's own cost is what is seen.
#[derive(Default)]
struct Nothing {
    applied_index: u64,
    entries: std::sync::Arc<std::sync::atomic::AtomicU64>,
}

impl StateMachine for Nothing {
    type Reply = ();

    fn applied_index(&self) -> u64 {
        self.applied_index
    }

    fn apply(&mut self, entries: Vec<CommittedEntry>) -> Result<Vec<Vec<Option<()>>>, Fault> {
        self.applied_index = entries.last().expect("one at least").index;
        self.entries.fetch_add(entries.len() as u64, std::sync::atomic::Ordering::Relaxed);
        Ok(entries.iter().map(|entry| vec![Some(()); entry.commands.len()]).collect())
    }

    fn durable_index(&self) -> Result<u64, Fault> {
        Ok(self.applied_index)
    }

    fn flush(&mut self) -> Result<u64, Fault> {
        Ok(self.applied_index)
    }

    fn snapshotter(&self) -> std::sync::Arc<dyn Snapshotter> {
        std::sync::Arc::new(NoPeersNoCopies)
    }

    fn install(&mut self, _: &std::path::Path, _: u64) -> Result<(), Fault> {
        Err(Fault::Engine("a member of one voter gets no snapshot".to_owned()))
    }
}

/// A member of one voter sends no snapshot.
struct NoPeersNoCopies;

impl Snapshotter for NoPeersNoCopies {
    fn write_to(&self, _: &std::path::Path) -> Result<u64, Fault> {
        Err(Fault::Engine("a member of one voter sends no snapshot".to_owned()))
    }
}

/// Propose to reply, by so many clients at once, each waiting for its reply before the next command.
fn member_propose(_: &mut Criterion) {
    eprintln!("\n{COMMAND_BYTES}-byte commands through a member of one voter; times in µs per command");
    eprintln!("| clients | commands/s |     p50 |     p99 |     CPU | commands an entry |");
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("runtime");
    for clients in [1, 10, 100, 1000] {
        let dir = bench_dir();
        let state_machine = Nothing::default();
        let entries = std::sync::Arc::clone(&state_machine.entries);
        let (handle, _guard) =
            tenure_raft_server::start(Config::new(1, dir.path()), state_machine, NoPeers).expect("start");
        let command = command(7);
        runtime.block_on(handle.propose(0, command.clone())).expect("propose");
        let commands = if clients == 1 { 5_000 } else { 200_000 };
        let entries_before = entries.load(std::sync::atomic::Ordering::Relaxed);
        let (cpu_before, start) = (cpu(), Instant::now());
        let tasks: Vec<_> = (0..clients)
            .map(|client: u32| {
                let (handle, command) = (handle.clone(), command.clone());
                runtime.spawn(async move {
                    let mut times = Vec::new();
                    for _ in 0..commands / clients {
                        let start = Instant::now();
                        handle.propose(client % 16, command.clone()).await.expect("reply");
                        times.push(start.elapsed());
                    }
                    times
                })
            })
            .collect();
        let mut times: Vec<_> = tasks.into_iter().flat_map(|task| runtime.block_on(task).expect("client")).collect();
        let (wall, cpu) = (start.elapsed(), cpu() - cpu_before);
        let entries = entries.load(std::sync::atomic::Ordering::Relaxed) - entries_before;
        times.sort_unstable();
        eprintln!(
            "| {clients:>7} | {:>10.0} | {:>7.1} | {:>7.1} | {:>7.1} | {:>8.1} |",
            times.len() as f64 / wall.as_secs_f64(),
            micros(times[times.len() / 2]),
            micros(times[times.len() * 99 / 100]),
            micros(cpu) / times.len() as f64,
            times.len() as f64 / entries as f64,
        );
    }
}

criterion_group!(log, log_append, member_propose);
criterion_main!(log);
