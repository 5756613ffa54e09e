//! The rows of a version: the layout Tenure uses beside two it could have used (decision 0001).
//!
//! All three run here on the production engine, with the production escape and the stored (= wire) form of a version, and do the
//! same work for the same requests. `tenure` is the real store, with everything that a member does beside (usage, leases,
//! events, the command's encoding): it shows how far the sketches are from the whole.
//!
//! `cargo bench -p tenure-benches --bench layout`. `TENURE_BENCH_KEYS` (default 150,000) and `TENURE_BENCH_DIR` (default: the
//! temporary directory) make it smaller or put it elsewhere. What is measured is CPU time of the thread that works, because other
//! load on the machine moves it least; RocksDB's background threads are not in it, bytes on disk are printed first.

use std::hint::black_box;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use criterion::measurement::{Measurement, ValueFormatter, WallTime};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use rustix::time::{ClockId, clock_gettime};
use tenure_storage::engine::{Batch, Cursor, Engine, Family, Reader};
use tenure_storage::fuzz::escape;
use tenure_storage::key_value::KeyValue;
use tenure_storage::{
    Command, Compare, CompareResult, CompareTarget, DeleteRangeRequest, Envelope, KeyRange, LeaseId, NoObserver,
    PutRequest, RangeRequest, Reply, RocksEngine, RocksOptions, StateMachine, TenantCommand, TenantId, TxnOp,
    TxnRequest,
};

const VALUE_BYTES: usize = 1 << 10;
const LIST_KEYS: usize = 10_000;
/// Commands applied together, as a busy member does.
const BATCH: usize = 64;
const PREFIX: &str = "/registry/pods/namespace/";

/// CPU time of the calling thread.
struct ThreadCpu;

impl Measurement for ThreadCpu {
    type Intermediate = Duration;
    type Value = Duration;

    fn start(&self) -> Duration {
        let now = clock_gettime(ClockId::ThreadCPUTime);
        Duration::new(now.tv_sec.unsigned_abs(), u32::try_from(now.tv_nsec).unwrap_or(0))
    }

    fn end(&self, start: Duration) -> Duration {
        self.start() - start
    }

    fn add(&self, a: &Duration, b: &Duration) -> Duration {
        *a + *b
    }

    fn zero(&self) -> Duration {
        Duration::ZERO
    }

    fn to_f64(&self, value: &Duration) -> f64 {
        value.as_secs_f64() * 1e9
    }

    fn formatter(&self) -> &dyn ValueFormatter {
        WallTime.formatter()
    }
}

fn key(n: usize) -> Vec<u8> {
    format!("{PREFIX}pod-{n:08}").into_bytes()
}

/// Half of it compresses, as objects of Kubernetes do.
fn value(n: usize, round: usize) -> Vec<u8> {
    let mut random = Random(((n as u64) << 8) ^ round as u64);
    let mut value: Vec<u8> = (0..VALUE_BYTES / 16).flat_map(|_| random.next().to_be_bytes()).collect();
    value.resize(VALUE_BYTES, b'x');
    value
}

/// A small generator whose sequence is the same on every run (splitmix64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.next() % bound as u64).unwrap_or(0)
    }
}

/// What Kubernetes sends, in the proportions of a busy control plane.
#[derive(Clone, Copy)]
enum Op {
    Update(usize),
    Create(usize),
    Delete(usize),
    Get(usize),
}

/// Batches of different keys each, so that no operation has to see another one of its batch.
fn mix(random: &mut Random, keys: usize, next_new: &mut usize) -> Vec<Op> {
    let stride = keys / BATCH;
    (0..BATCH)
        .map(|slot| {
            let n = slot * stride + random.below(stride);
            match random.below(100) {
                0..70 => Op::Update(n),
                70..80 => {
                    *next_new += 1;
                    Op::Create(*next_new)
                }
                80..85 => Op::Delete(n),
                _ => Op::Get(n),
            }
        })
        .collect()
}

/// The newest version as a txn's compare needs it.
#[derive(Clone, Copy)]
struct Meta {
    create: i64,
    modified: i64,
    version: i64,
    tombstone: bool,
}

/// One way to lay out versions in rows.
trait Layout {
    const NAME: &'static str;
    fn meta<R: Reader>(reader: &R, key: &[u8]) -> Option<Meta>;
    fn get<R: Reader>(reader: &R, key: &[u8]) -> Option<Bytes>;
    /// `old` is the newest version so far; `kv` `None` is a tombstone.
    fn write<R: Reader>(reader: &R, batch: &mut Batch, key: &[u8], old: Option<Meta>, at: i64, kv: Option<Bytes>);
    /// Bytes of the keys of `[start, end)` that existed at `at`.
    fn list<R: Reader>(reader: &R, start: &[u8], end: &[u8], at: i64) -> usize;
    fn count<R: Reader>(reader: &R, start: &[u8], end: &[u8]) -> u64;
}

/// Tenant 1, kind 1: what every row starts with.
const ROW: [u8; 5] = [0, 0, 0, 1, 1];

fn plain(key: &[u8]) -> Vec<u8> {
    [&ROW[..], key].concat()
}

fn versions_of(key: &[u8]) -> Vec<u8> {
    [&ROW[..], &escape(key)].concat()
}

/// Newest first; the last byte tells a tombstone.
fn version_row(key: &[u8], at: i64, tombstone: bool) -> Vec<u8> {
    let mut row = versions_of(key);
    row.extend_from_slice(&(!at.unsigned_abs()).to_be_bytes());
    row.extend_from_slice(&[0xff; 4]);
    row.push(u8::from(tombstone));
    row
}

fn history_row(at: i64) -> Vec<u8> {
    [&ROW[..], &at.to_be_bytes(), &[0; 4]].concat()
}

/// User part, revision and tombstone of a version's row.
fn split(row: &[u8]) -> (&[u8], i64, bool) {
    let (user, rest) = row.split_at(row.len() - 13);
    let mut at = [0; 8];
    at.copy_from_slice(&rest[..8]);
    (user, (!u64::from_be_bytes(at)).cast_signed(), rest[12] == 1)
}

/// The first version at or below `at` of every key in the bounds.
fn scan_versions<R: Reader>(reader: &R, start: &[u8], end: &[u8], at: i64, visit: &mut dyn FnMut(&[u8])) {
    let (lower, upper) = (versions_of(start), versions_of(end));
    let mut cursor = reader.cursor(Family::Kv, &lower, &upper).expect("cursor");
    let mut user = Vec::new();
    let mut done = false;
    let mut steps = 0;
    while let Some((row, stored)) = cursor.entry() {
        let (found, modified, tombstone) = split(row);
        if found != user {
            user.clear();
            user.extend_from_slice(found);
            (done, steps) = (false, 0);
        }
        if !done && modified <= at {
            done = true;
            if !tombstone {
                visit(stored);
            }
        }
        steps += 1;
        if done && steps > 6 {
            let mut behind = user.clone();
            behind.push(0xff);
            cursor.seek(&behind).expect("seek");
        } else {
            cursor.advance().expect("advance");
        }
    }
}

fn newest_version<R: Reader>(reader: &R, key: &[u8], at: i64) -> Option<(Meta, Bytes)> {
    let mut lower = versions_of(key);
    let mut upper = lower.clone();
    upper.push(0xff);
    lower.extend_from_slice(&(!at.unsigned_abs()).to_be_bytes());
    upper.extend_from_slice(&[0xff; 13]);
    let cursor = reader.cursor(Family::Kv, &lower, &upper).expect("cursor");
    let (row, stored) = cursor.entry()?;
    let (_, modified, tombstone) = split(row);
    if tombstone {
        return Some((Meta { create: 0, modified, version: 0, tombstone }, Bytes::new()));
    }
    let kv = KeyValue::decode(stored).expect("stored form");
    let meta = Meta { create: kv.create_revision, modified, version: kv.version, tombstone };
    Some((meta, Bytes::copy_from_slice(stored)))
}

fn encode_meta(meta: Meta) -> Bytes {
    let mut out = Vec::with_capacity(25);
    out.push(u8::from(meta.tombstone));
    for number in [meta.create, meta.modified, meta.version] {
        out.extend_from_slice(&number.to_be_bytes());
    }
    out.into()
}

fn decode_meta(stored: &[u8]) -> Meta {
    let number = |at: usize| i64::from_be_bytes(stored[at..at + 8].try_into().expect("eight bytes"));
    Meta { tombstone: stored[0] == 1, create: number(1), modified: number(9), version: number(17) }
}

fn meta_after(old: Option<Meta>, at: i64, tombstone: bool) -> Meta {
    match old.filter(|old| !old.tombstone) {
        Some(old) => Meta { create: old.create, modified: at, version: old.version + 1, tombstone },
        None => Meta { create: at, modified: at, version: 1, tombstone },
    }
}

/// Tenure's: every version in `kv`, a small row about the newest one in `head`.
struct HeadBeside;

impl Layout for HeadBeside {
    const NAME: &'static str = "head beside";

    fn meta<R: Reader>(reader: &R, key: &[u8]) -> Option<Meta> {
        reader.get(Family::Head, &plain(key)).expect("get").map(|stored| decode_meta(&stored))
    }

    fn get<R: Reader>(reader: &R, key: &[u8]) -> Option<Bytes> {
        let meta = Self::meta(reader, key).filter(|meta| !meta.tombstone)?;
        reader.get(Family::Kv, &version_row(key, meta.modified, false)).expect("get")
    }

    fn write<R: Reader>(_: &R, batch: &mut Batch, key: &[u8], old: Option<Meta>, at: i64, kv: Option<Bytes>) {
        let meta = meta_after(old, at, kv.is_none());
        batch.put(Family::Head, plain(key), encode_meta(meta));
        batch.put(Family::Kv, version_row(key, at, kv.is_none()), kv.unwrap_or_default());
        batch.put(Family::Rev, history_row(at), Bytes::copy_from_slice(key));
    }

    fn list<R: Reader>(reader: &R, start: &[u8], end: &[u8], at: i64) -> usize {
        let mut bytes = 0;
        scan_versions(reader, start, end, at, &mut |stored| bytes += black_box(stored).len());
        bytes
    }

    fn count<R: Reader>(reader: &R, start: &[u8], end: &[u8]) -> u64 {
        let mut cursor = reader.cursor(Family::Head, &plain(start), &plain(end)).expect("cursor");
        let mut count = 0;
        while let Some((_, stored)) = cursor.entry() {
            count += u64::from(!decode_meta(stored).tombstone);
            cursor.advance().expect("advance");
        }
        count
    }
}

/// No second row: the newest version is wherever a seek finds it.
struct VersionsOnly;

impl Layout for VersionsOnly {
    const NAME: &'static str = "versions only";

    fn meta<R: Reader>(reader: &R, key: &[u8]) -> Option<Meta> {
        newest_version(reader, key, i64::MAX).map(|(meta, _)| meta)
    }

    fn get<R: Reader>(reader: &R, key: &[u8]) -> Option<Bytes> {
        newest_version(reader, key, i64::MAX).filter(|(meta, _)| !meta.tombstone).map(|(_, stored)| stored)
    }

    fn write<R: Reader>(_: &R, batch: &mut Batch, key: &[u8], _: Option<Meta>, at: i64, kv: Option<Bytes>) {
        batch.put(Family::Kv, version_row(key, at, kv.is_none()), kv.unwrap_or_default());
        batch.put(Family::Rev, history_row(at), Bytes::copy_from_slice(key));
    }

    fn list<R: Reader>(reader: &R, start: &[u8], end: &[u8], at: i64) -> usize {
        HeadBeside::list(reader, start, end, at)
    }

    fn count<R: Reader>(reader: &R, start: &[u8], end: &[u8]) -> u64 {
        let mut count = 0;
        scan_versions(reader, start, end, i64::MAX, &mut |_| count += 1);
        count
    }
}

/// The newest version whole in `head`; a write moves the one before to `kv`.
struct NewestInline;

/// What stands before an inline version, so that a tombstone can be told.
fn inline(stored: &[u8]) -> Option<&[u8]> {
    stored.split_first().filter(|(tombstone, _)| **tombstone == 0).map(|(_, kv)| kv)
}

impl Layout for NewestInline {
    const NAME: &'static str = "newest inline";

    fn meta<R: Reader>(reader: &R, key: &[u8]) -> Option<Meta> {
        let stored = reader.get(Family::Head, &plain(key)).expect("get")?;
        let Some(kv) = inline(&stored) else {
            return Some(Meta { create: 0, modified: 0, version: 0, tombstone: true });
        };
        let kv = KeyValue::decode(kv).expect("stored form");
        Some(Meta { create: kv.create_revision, modified: kv.mod_revision, version: kv.version, tombstone: false })
    }

    fn get<R: Reader>(reader: &R, key: &[u8]) -> Option<Bytes> {
        let stored = reader.get(Family::Head, &plain(key)).expect("get")?;
        inline(&stored).map(|kv| stored.slice_ref(kv))
    }

    fn write<R: Reader>(reader: &R, batch: &mut Batch, key: &[u8], old: Option<Meta>, at: i64, kv: Option<Bytes>) {
        if let Some(old) = old.filter(|old| !old.tombstone) {
            let stored = Self::get(reader, key).expect("a key that lives");
            batch.put(Family::Kv, version_row(key, old.modified, false), stored);
        }
        let row = match kv {
            Some(kv) => [&[0], &kv[..]].concat(),
            None => {
                batch.put(Family::Kv, version_row(key, at, true), Bytes::new());
                vec![1]
            }
        };
        batch.put(Family::Head, plain(key), row.into());
        batch.put(Family::Rev, history_row(at), Bytes::copy_from_slice(key));
    }

    fn list<R: Reader>(reader: &R, start: &[u8], end: &[u8], at: i64) -> usize {
        let mut cursor = reader.cursor(Family::Head, &plain(start), &plain(end)).expect("cursor");
        let mut bytes = 0;
        while let Some((row, stored)) = cursor.entry() {
            let newest = inline(stored);
            let modified = newest.map_or(0, |kv| KeyValue::decode(kv).expect("stored form").mod_revision);
            if newest.is_some() && modified <= at {
                bytes += black_box(stored).len();
            } else if let Some((meta, old)) = newest_version(reader, &row[ROW.len()..], at) {
                bytes += if meta.tombstone { 0 } else { black_box(old).len() };
            }
            cursor.advance().expect("advance");
        }
        bytes
    }

    fn count<R: Reader>(reader: &R, start: &[u8], end: &[u8]) -> u64 {
        let mut cursor = reader.cursor(Family::Head, &plain(start), &plain(end)).expect("cursor");
        let mut count = 0;
        while let Some((_, stored)) = cursor.entry() {
            count += u64::from(inline(stored).is_some());
            cursor.advance().expect("advance");
        }
        count
    }
}

/// What is measured: a store full of keys.
trait Subject {
    fn name(&self) -> &'static str;
    /// One more version of every key, then the engine at rest.
    fn round(&mut self, keys: usize, round: usize);
    fn rest(&self);
    fn disk_bytes(&self) -> u64;
    fn revision(&self) -> i64;
    fn apply(&mut self, ops: &[Op]);
    fn list(&self, first: usize, keys: usize, at: i64) -> usize;
    fn count(&self) -> u64;
}

struct Sketch<L> {
    engine: RocksEngine,
    revision: i64,
    layout: std::marker::PhantomData<L>,
}

impl<L: Layout> Sketch<L> {
    fn open(dir: &std::path::Path) -> Self {
        let engine = RocksEngine::open(dir, &RocksOptions::default()).expect("open");
        Sketch { engine, revision: 1, layout: std::marker::PhantomData }
    }
}

impl<L: Layout> Subject for Sketch<L> {
    fn name(&self) -> &'static str {
        L::NAME
    }

    fn round(&mut self, keys: usize, round: usize) {
        for start in (0..keys).step_by(BATCH) {
            let mut batch = Batch::default();
            {
                let view = self.engine.view();
                for n in start..keys.min(start + BATCH) {
                    write_one::<L, _>(&view, &mut batch, &mut self.revision, n, Some(value(n, round)));
                }
            }
            self.engine.write(&batch).expect("write");
        }
    }

    fn rest(&self) {
        self.engine.flush().expect("flush");
        self.engine.compact().expect("compact");
    }

    fn disk_bytes(&self) -> u64 {
        self.engine.disk_bytes()
    }

    fn revision(&self) -> i64 {
        self.revision
    }

    fn apply(&mut self, ops: &[Op]) {
        let mut batch = Batch::default();
        {
            let view = self.engine.view();
            for op in ops {
                match *op {
                    Op::Update(n) | Op::Create(n) => {
                        write_one::<L, _>(&view, &mut batch, &mut self.revision, n, Some(value(n, 9)));
                    }
                    Op::Delete(n) => write_one::<L, _>(&view, &mut batch, &mut self.revision, n, None),
                    Op::Get(n) => {
                        black_box(L::get(&view, &key(n)));
                    }
                }
            }
        }
        self.engine.write(&batch).expect("write");
    }

    fn list(&self, first: usize, keys: usize, at: i64) -> usize {
        L::list(&self.engine.view(), &key(first), &key(first + keys), at)
    }

    fn count(&self) -> u64 {
        L::count(&self.engine.view(), PREFIX.as_bytes(), b"/registry/pods0")
    }
}

/// A guarded write: the newest version is looked at, then replaced.
fn write_one<L: Layout, R: Reader>(
    view: &R,
    batch: &mut Batch,
    revision: &mut i64,
    n: usize,
    new_value: Option<Vec<u8>>,
) {
    let key = key(n);
    let old = L::meta(view, &key);
    if new_value.is_none() && old.is_none_or(|old| old.tombstone) {
        return;
    }
    *revision += 1;
    let meta = meta_after(old, *revision, false);
    let kv = new_value.map(|value| {
        KeyValue {
            key: &key,
            create_revision: meta.create,
            mod_revision: *revision,
            version: meta.version,
            value: &value,
            lease: 0,
        }
        .encode()
    });
    L::write(view, batch, &key, old, *revision, kv);
}

/// The real store.
struct Tenure {
    machine: StateMachine<RocksEngine>,
    tenant: TenantId,
    index: u64,
}

impl Tenure {
    fn open(dir: &std::path::Path) -> Self {
        let engine = Arc::new(RocksEngine::open(dir, &RocksOptions::default()).expect("open"));
        let machine = StateMachine::open(engine, Arc::new(NoObserver)).expect("open");
        let mut tenure = Tenure { machine, tenant: TenantId(0), index: 0 };
        let no_quota = tenure.one(Command::Configure { quota_bytes: -1 });
        assert!(matches!(no_quota, Reply::Configure), "{no_quota:?}");
        let Reply::Tenant { id, .. } = tenure.one(Command::Tenant(TenantCommand::create("bench"))) else {
            panic!("a tenant is created");
        };
        tenure.tenant = id;
        tenure
    }

    fn one(&mut self, command: Command) -> Reply {
        self.all(vec![command]).pop().expect("one reply")
    }

    fn all(&mut self, commands: Vec<Command>) -> Vec<Reply> {
        self.index += 1;
        let entry =
            commands.into_iter().map(|command| Envelope { tenant: self.tenant, member_id: 1, command }.encode());
        let outcomes = self.machine.apply(vec![(self.index, entry.collect())]).expect("apply");
        outcomes.into_iter().flatten().map(|outcome| outcome.result.expect("accepted")).collect()
    }

    fn guarded(n: usize, op: TxnOp, guard: CompareResult) -> Command {
        let range = KeyRange::Single(key(n).into());
        Command::Txn(TxnRequest {
            compares: vec![Compare { range: range.clone(), result: guard, target: CompareTarget::Mod(0) }],
            success: vec![op],
            failure: vec![TxnOp::Range(RangeRequest::new(range))],
        })
    }

    fn put(n: usize, round: usize) -> TxnOp {
        TxnOp::Put(PutRequest {
            key: key(n).into(),
            value: value(n, round).into(),
            lease: LeaseId::NONE,
            prev_kv: false,
            ignore_value: false,
            ignore_lease: false,
        })
    }

    fn reader(&self) -> tenure_storage::TenantReader<RocksEngine> {
        self.machine.store().reader(self.tenant).expect("the tenant exists")
    }
}

impl Subject for Tenure {
    fn name(&self) -> &'static str {
        "tenure"
    }

    fn round(&mut self, keys: usize, round: usize) {
        for start in (0..keys).step_by(BATCH) {
            let puts = (start..keys.min(start + BATCH)).map(|n| Tenure::put(n, round));
            self.all(puts.map(|op| Command::Txn(TxnRequest { success: vec![op], ..TxnRequest::default() })).collect());
        }
    }

    fn rest(&self) {
        self.machine.store().compact_engine().expect("compact");
    }

    fn disk_bytes(&self) -> u64 {
        self.machine.store().engine_bytes()
    }

    fn revision(&self) -> i64 {
        self.reader().state().revision
    }

    fn apply(&mut self, ops: &[Op]) {
        let commands = ops.iter().map(|op| match *op {
            Op::Update(n) => Tenure::guarded(n, Tenure::put(n, 9), CompareResult::NotEqual),
            Op::Create(n) => Tenure::guarded(n, Tenure::put(n, 9), CompareResult::Equal),
            Op::Delete(n) => {
                let range = KeyRange::Single(key(n).into());
                let delete = TxnOp::DeleteRange(DeleteRangeRequest { range, prev_kv: false });
                Tenure::guarded(n, delete, CompareResult::NotEqual)
            }
            Op::Get(n) => Tenure::guarded(
                n,
                TxnOp::Range(RangeRequest::new(KeyRange::Single(key(n).into()))),
                CompareResult::NotEqual,
            ),
        });
        let commands = commands.collect();
        black_box(self.all(commands));
    }

    fn list(&self, first: usize, keys: usize, at: i64) -> usize {
        let range = KeyRange::HalfOpen { start: key(first).into(), end: key(first + keys).into() };
        let mut request = RangeRequest::new(range);
        request.revision = Some(at);
        let mut bytes = 0;
        self.reader()
            .range(&request, &mut |stored: &[u8]| {
                bytes += black_box(stored).len();
                ControlFlow::Continue(())
            })
            .expect("range");
        bytes
    }

    fn count(&self) -> u64 {
        let start = Bytes::from_static(PREFIX.as_bytes());
        let range = KeyRange::HalfOpen { start, end: Bytes::from_static(b"/registry/pods0") };
        let mut request = RangeRequest::new(range);
        request.count_only = true;
        self.reader().range(&request, &mut |_: &[u8]| ControlFlow::Continue(())).expect("range").count
    }
}

fn keys() -> usize {
    std::env::var("TENURE_BENCH_KEYS").ok().and_then(|text| text.parse().ok()).unwrap_or(150_000)
}

fn scratch() -> tempfile::TempDir {
    let dir = std::env::var_os("TENURE_BENCH_DIR").map_or_else(std::env::temp_dir, PathBuf::from);
    tempfile::tempdir_in(dir).expect("a directory")
}

fn benches(criterion: &mut Criterion<ThreadCpu>) {
    let keys = keys();
    for versions in [1, 5] {
        let dirs: Vec<_> = (0..4).map(|_| scratch()).collect();
        let mut subjects: Vec<Box<dyn Subject>> = vec![
            Box::new(Sketch::<HeadBeside>::open(dirs[0].path())),
            Box::new(Sketch::<VersionsOnly>::open(dirs[1].path())),
            Box::new(Sketch::<NewestInline>::open(dirs[2].path())),
            Box::new(Tenure::open(dirs[3].path())),
        ];
        let mut older = Vec::new();
        for subject in &mut subjects {
            let mut before_last = 1;
            for round in 0..versions {
                before_last = subject.revision();
                subject.round(keys, round);
            }
            subject.rest();
            older.push(if versions == 1 { subject.revision() } else { before_last });
            eprintln!("{versions} versions, {}: {} MiB on disk", subject.name(), subject.disk_bytes() >> 20);
        }
        let each =
            |criterion: &mut Criterion<ThreadCpu>, what: &str, elements: usize, run: &dyn Fn(&dyn Subject, i64)| {
                let mut group = criterion.benchmark_group(format!("{what}, {versions} versions"));
                group.throughput(Throughput::Elements(elements as u64));
                for (subject, older) in subjects.iter().zip(&older) {
                    group.bench_function(BenchmarkId::from_parameter(subject.name()), |bencher| {
                        bencher.iter(|| run(subject.as_ref(), *older));
                    });
                }
                group.finish();
            };
        let listed = LIST_KEYS.min(keys / 2);
        each(criterion, "list now", listed, &|subject, _| {
            assert!(subject.list(keys / 3, listed, subject.revision()) > listed * VALUE_BYTES);
        });
        each(criterion, "list at an older revision", listed, &|subject, older| {
            assert!(subject.list(keys / 3, listed, older) > listed * VALUE_BYTES);
        });
        each(criterion, "count", keys, &|subject, _| assert_eq!(subject.count(), keys as u64));

        let mut group = criterion.benchmark_group(format!("kube mix, {versions} versions"));
        group.throughput(Throughput::Elements(BATCH as u64));
        for subject in &mut subjects {
            let (mut random, mut next_new) = (Random(7), keys);
            group.bench_function(BenchmarkId::from_parameter(subject.name()), |bencher| {
                bencher.iter(|| subject.apply(&mix(&mut random, keys, &mut next_new)));
            });
        }
        group.finish();
    }
}

fn config() -> Criterion<ThreadCpu> {
    let criterion = Criterion::default().with_measurement(ThreadCpu);
    criterion.sample_size(10).warm_up_time(Duration::from_secs(1)).measurement_time(Duration::from_secs(4))
}

criterion_group! {
    name = layout;
    config = config();
    targets = benches
}
criterion_main!(layout);
