//! The paths that the profile of a busy member shows, one by one: applying a batch of kube txns, assembling a range's answer,
//! encoding an event for its watchers, escaping a key, appending to the log.
//!
//! `cargo bench -p tenure-benches --bench hot`. `TENURE_BENCH_DIR` says where data goes (default: the temporary directory). These
//! are for comparing two commits on one machine; beside other servers `make bench` measures.

use std::hint::black_box;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use tenure_etcd_shim::wire::{KvRope, RangeResponse, encode_events};
use tenure_raft_server::{BOOTSTRAP_INDEX, Conf, EngineLog, LogStore, LogWrite, Position};
use tenure_storage::fuzz::{escape, unescape};
use tenure_storage::key_value::KeyValue;
use tenure_storage::{
    Command, Compare, CompareResult, CompareTarget, Envelope, Event, EventKind, KeyRange, LeaseId, NoObserver,
    PutRequest, RangeRequest, RocksEngine, RocksOptions, StateMachine, TenantCommand, TenantId, TxnOp, TxnRequest,
};

const KEYS: usize = 10_000;
const VALUE_BYTES: usize = 1 << 10;
/// Commands applied together, as a busy member does.
const BATCH: usize = 64;
const TENANT: TenantId = TenantId(1);

fn bench_dir() -> tempfile::TempDir {
    let root = std::env::var_os("TENURE_BENCH_DIR").map_or_else(std::env::temp_dir, PathBuf::from);
    tempfile::tempdir_in(root).expect("a directory for the bench")
}

fn key(number: usize) -> Bytes {
    format!("/registry/pods/namespace/pod-{number:08}").into()
}

fn put(number: usize) -> PutRequest {
    let value = vec![u8::try_from(number % 251).unwrap_or(0); VALUE_BYTES].into();
    PutRequest {
        key: key(number),
        value,
        lease: LeaseId::NONE,
        prev_kv: false,
        ignore_value: false,
        ignore_lease: false,
    }
}

fn envelope(command: Command) -> Bytes {
    Envelope { tenant: TENANT, member_id: 1, command }.encode()
}

/// An update as kube-apiserver makes it. The compare fails for all but the newest revision, so it is made to hold for any.
fn kube_txn(number: usize) -> Bytes {
    let compare =
        Compare { range: KeyRange::Single(key(number)), target: CompareTarget::Mod(0), result: CompareResult::Greater };
    envelope(Command::Txn(TxnRequest {
        compares: vec![compare],
        success: vec![TxnOp::Put(put(number))],
        failure: vec![TxnOp::Range(RangeRequest::new(KeyRange::Single(key(number))))],
    }))
}

/// A store with one tenant and its keys.
fn filled(dir: &std::path::Path) -> StateMachine<RocksEngine> {
    let engine = RocksEngine::open(dir, &RocksOptions::default()).expect("open");
    let mut state = StateMachine::open(Arc::new(engine), Arc::new(NoObserver)).expect("open");
    let create = envelope(Command::Tenant(TenantCommand::create("bench")));
    let puts = (0..KEYS).map(|number| envelope(Command::Put(put(number))));
    state.apply(vec![(1, [create].into_iter().chain(puts).collect())]).expect("fill");
    state
}

fn apply(criterion: &mut Criterion) {
    let dir = bench_dir();
    let mut state = filled(dir.path());
    let mut next = 0;
    let mut group = criterion.benchmark_group("apply");
    group.throughput(Throughput::Elements(BATCH as u64));
    group.bench_function("64 kube txns", |bencher| {
        bencher.iter_batched(
            || {
                next += BATCH;
                (next - BATCH..next).map(|number| kube_txn(number % KEYS)).collect::<Vec<_>>()
            },
            |commands| {
                let index = state.applied_index() + 1;
                black_box(state.apply(vec![(index, commands)]).expect("apply"))
            },
            BatchSize::SmallInput,
        );
    });
}

fn range(criterion: &mut Criterion) {
    let dir = bench_dir();
    let state = filled(dir.path());
    let reader = state.store().reader(TENANT).expect("the tenant");
    let mut group = criterion.benchmark_group("range");
    for (name, limit) in [("10,000 keys of 1 KiB", 0), ("a page of 500 of them", 500)] {
        let all = KeyRange::From(Bytes::from_static(b"\0"));
        let request = RangeRequest { limit, ..RangeRequest::new(all) };
        group.throughput(Throughput::Elements(if limit == 0 { KEYS as u64 } else { limit }));
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                let mut kvs = KvRope::default();
                let take = &mut |stored: &[u8]| {
                    kvs.push(stored);
                    ControlFlow::Continue(())
                };
                reader.range(&request, take).expect("range");
                let mut answer = RangeResponse { kvs, ..RangeResponse::default() };
                let mut out = BytesMut::new();
                answer.encode_draining(&mut out);
                black_box(out.len())
            });
        });
    }
}

fn events(criterion: &mut Criterion) {
    let stored = |number: i64| {
        let kv = KeyValue {
            mod_revision: number,
            version: number,
            create_revision: 1,
            value: &[7; VALUE_BYTES],
            ..KeyValue::default()
        };
        KeyValue { key: &key(1), ..kv }.encode()
    };
    let event = Event { kind: EventKind::Put, key: key(1), kv: stored(3), prev_kv: Some(stored(2)) };
    criterion.bench_function("encode an event with its previous value", |bencher| {
        bencher.iter(|| black_box(encode_events(std::slice::from_ref(black_box(&event)))));
    });
}

fn keys(criterion: &mut Criterion) {
    let key = key(1);
    criterion.bench_function("escape and unescape a key", |bencher| {
        bencher.iter(|| {
            let escaped = escape(black_box(&key));
            black_box(unescape(&escaped))
        });
    });
}

fn log(criterion: &mut Criterion) {
    let dir = bench_dir();
    let log = EngineLog::open(dir.path(), 64 << 20).expect("open");
    log.bootstrap(1, Position { index: BOOTSTRAP_INDEX, term: 1 }, &Conf::default()).expect("bootstrap");
    let commands: Vec<Bytes> = (0..BATCH).map(kube_txn).collect();
    let mut index = BOOTSTRAP_INDEX;
    let mut group = criterion.benchmark_group("log");
    group.throughput(Throughput::Elements(BATCH as u64));
    group.bench_function("append and sync 64 kube txns", |bencher| {
        bencher.iter(|| {
            index += 1;
            let write = LogWrite::of_commands(Position { index, term: 1 }, &commands);
            log.append(&write).expect("append");
            if index.is_multiple_of(1_000) {
                log.truncate(Position { index: index - 1, term: 1 }).expect("truncate");
            }
        });
    });
}

criterion_group!(benches, apply, range, events, keys, log);
criterion_main!(benches);
