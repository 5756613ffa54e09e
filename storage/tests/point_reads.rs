//! One key read while the store is written: what is answered is of the revision that is told.
//!
//! Why: the common read takes no view of the engine ([`TenantReader::range`](tenure_storage::TenantReader::range)). It must be as good as if it
//! did, whatever apply does between its two look-ups, compactions and their cleaning up in one round with the writes included; and beside
//! reads that take a view, nobody may be told of an earlier revision than before.

#![cfg(feature = "rocksdb")]
#![allow(clippy::unwrap_used)]

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use tenure_storage::key_value::KeyValue;
use tenure_storage::{
    Command, DeleteRangeRequest, Envelope, KeyRange, LeaseId, NoObserver, PutRequest, RangeRequest, Reply, RocksEngine,
    RocksOptions, StateMachine, TenantCommand, TenantId, TenantReader,
};

/// Keys that are written in turn: revision `r` puts key `r % KEYS` with its own number for a value, and now and then deletes it instead.
const KEYS: i64 = 3;

/// Revisions that are written.
const REVISIONS: i64 = 30_000;

/// Revisions applied in one round, and how many of the newest stay when it compacts.
const ROUND: i64 = 10;

fn key(number: i64) -> Bytes {
    Bytes::from(format!("k{number}"))
}

fn is_delete(revision: i64) -> bool {
    revision % 11 == 0
}

/// What `number` holds at `revision`: the revision that put it.
fn held(number: i64, revision: i64) -> Option<i64> {
    let newest = (0..KEYS).map(|back| revision - back).find(|at| at % KEYS == number)?;
    (newest > 1 && !is_delete(newest)).then_some(newest)
}

fn write(revision: i64) -> Command {
    let key = key(revision % KEYS);
    if is_delete(revision) {
        return Command::DeleteRange(DeleteRangeRequest { range: KeyRange::Single(key), prev_kv: false });
    }
    let value = revision.to_string().into();
    Command::Put(PutRequest {
        key,
        value,
        lease: LeaseId::NONE,
        prev_kv: false,
        ignore_value: false,
        ignore_lease: false,
    })
}

fn read(reader: &TenantReader<RocksEngine>, range: KeyRange) -> (i64, Option<i64>) {
    let mut found = None;
    let summary = reader.range(&RangeRequest::new(range), &mut |stored: &[u8]| {
        let kv = KeyValue::decode(stored).unwrap();
        let value = String::from_utf8_lossy(kv.value).parse().unwrap();
        assert_eq!(kv.mod_revision, value);
        found.get_or_insert(value);
        ControlFlow::Continue(())
    });
    (summary.unwrap().revision, found)
}

#[test]
fn one_key_is_read_as_of_the_revision_that_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let options = RocksOptions { block_cache_bytes: 1 << 20, write_buffer_bytes: 1 << 20, background_threads: 1 };
    let engine = Arc::new(RocksEngine::open(dir.path(), &options).unwrap());
    let mut machine = StateMachine::open(engine, Arc::new(NoObserver)).unwrap();
    let create = Command::Tenant(TenantCommand::create("t"));
    let create = Envelope { tenant: TenantId(0), member_id: 1, command: create }.encode();
    let created = machine.apply(vec![(1, vec![create])]).unwrap().remove(0).remove(0);
    let Ok(Reply::Tenant { id: tenant, .. }) = created.result else { panic!("{created:?}") };
    let reader = machine.store().reader(tenant).unwrap();
    let is_done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for first in 0..2 {
            let (reader, is_done) = (&reader, &is_done);
            scope.spawn(move || {
                let (mut told, mut reads) = (0, 0u64);
                for number in (first..KEYS).chain(0..first).cycle() {
                    if is_done.load(Ordering::Relaxed) {
                        break;
                    }
                    // Every other one takes a view, by a range that is not one key.
                    let one = KeyRange::Single(key(number));
                    let view = KeyRange::HalfOpen { start: key(number), end: key(number + 1) };
                    let (revision, found) = read(reader, if reads.is_multiple_of(2) { one } else { view });
                    assert_eq!(found, held(number, revision), "key {number} at {revision}");
                    assert!(revision >= told, "{revision} after {told}");
                    (told, reads) = (revision, reads + 1);
                }
                assert!(reads > 100);
            });
        }
        let entry = |command| Envelope { tenant, member_id: 1, command }.encode();
        let mut revision = 1;
        for index in 2.. {
            // As a member does that catches up: writes, a compaction and what it frees in one round.
            let mut commands: Vec<Bytes> = (revision + 1..=revision + ROUND).map(|at| entry(write(at))).collect();
            revision += ROUND;
            commands.push(entry(Command::Compact { revision }));
            commands.push(entry(Command::Reclaim { rows_max: 1_000 }));
            let outcomes = machine.apply(vec![(index, commands)]).unwrap().remove(0);
            // A delete of what is not there would take no revision.
            assert_eq!(outcomes.last().unwrap().revision, revision);
            if revision >= REVISIONS {
                break;
            }
        }
        is_done.store(true, Ordering::Relaxed);
    });
}
