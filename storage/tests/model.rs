//! Random histories on the store beside a model that a reader can check by eye: a list of all states of a map.
//!
//! Why: reads at a revision, compaction, reclaim and restarts interact in ways no scenario list covers. Every
//! operation runs on RocksDB and on the in-memory engine at once; after each, reads at random revisions must equal the
//! model's, and the counters must equal what the model holds.

#![cfg(feature = "rocksdb")]
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::sync::Arc;

use bytes::Bytes;
use proptest::prelude::*;
use tenure_storage::engine::mirror::Mirror;
use tenure_storage::key_value::KeyValue;
use tenure_storage::{
    Command, Compare, CompareResult, CompareTarget, DeleteRangeRequest, Envelope, KeyRange, LeaseId, MemoryEngine,
    NoObserver, Outcome, PutRequest, RangeRequest, ReadError, Refusal, Reply, RocksEngine, RocksOptions, Rules,
    StateMachine, TenantCommand, TenantId, TxnOp, TxnRequest,
};

type Engine = Mirror<RocksEngine, MemoryEngine>;

/// A key's newest version: value, create revision, mod revision, version, lease.
type Version = (Vec<u8>, i64, i64, i64, i64);
type Keys = BTreeMap<Vec<u8>, Version>;

/// What a tenant should hold: its keys at every revision.
struct Model {
    states: Vec<Keys>,
    compacted: i64,
    leases: Vec<i64>,
}

impl Model {
    fn new() -> Self {
        // Revisions 0 and 1 are both the empty store.
        Model { states: vec![Keys::new(), Keys::new()], compacted: -1, leases: Vec::new() }
    }

    fn revision(&self) -> i64 {
        self.states.len() as i64 - 1
    }

    fn now(&self) -> &Keys {
        self.states.last().unwrap()
    }

    fn change(&mut self, change: impl FnOnce(&mut Keys, i64) -> bool) {
        let mut keys = self.now().clone();
        if change(&mut keys, self.revision() + 1) {
            self.states.push(keys);
        }
    }
}

fn put_in(keys: &mut Keys, main: i64, key: &[u8], value: &[u8], lease: i64) {
    let (create, version) = keys.get(key).map_or((main, 1), |old| (old.1, old.3 + 1));
    keys.insert(key.to_vec(), (value.to_vec(), create, main, version, lease));
}

fn delete_in(keys: &mut Keys, range: &KeyRange) -> bool {
    let before = keys.len();
    keys.retain(|key, _| !range.contains(key));
    keys.len() < before
}

#[derive(Clone, Debug)]
enum Step {
    Put {
        tenant: usize,
        key: Vec<u8>,
        value: Vec<u8>,
        lease: i64,
    },
    Delete {
        tenant: usize,
        range: KeyRange,
    },
    /// If the key is as old as guessed: put it and delete the range; else put `b`.
    Txn {
        tenant: usize,
        key: Vec<u8>,
        version: i64,
        range: KeyRange,
    },
    Grant {
        tenant: usize,
        lease: i64,
    },
    Revoke {
        tenant: usize,
        lease: i64,
    },
    Compact {
        tenant: usize,
        back: i64,
    },
    Reclaim {
        tenant: usize,
        rows: u32,
    },
    /// From here on the cell decides by the newest rules, which must make no difference that a client sees.
    RaiseRules,
    /// Stop and start on what is on disk.
    Restart,
    /// Lose what was not flushed in memory's model of a disk, and replay it.
    Flush,
}

fn key() -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec(prop_oneof![Just(0u8), Just(b'a'), Just(b'b'), Just(0xff)], 1..4)
}

fn range() -> impl Strategy<Value = KeyRange> {
    prop_oneof![
        key().prop_map(|key| KeyRange::Single(key.into())),
        (key(), key()).prop_map(|(start, end)| KeyRange::HalfOpen { start: start.into(), end: end.into() }),
        key().prop_map(|start| KeyRange::From(start.into())),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let tenant = 0..2usize;
    prop_oneof![
        8 => (tenant.clone(), key(), prop::collection::vec(any::<u8>(), 0..4), 0..3i64)
            .prop_map(|(tenant, key, value, lease)| Step::Put { tenant, key, value, lease }),
        3 => (tenant.clone(), range()).prop_map(|(tenant, range)| Step::Delete { tenant, range }),
        4 => (tenant.clone(), key(), 0..3i64, range())
            .prop_map(|(tenant, key, version, range)| Step::Txn { tenant, key, version, range }),
        2 => (tenant.clone(), 1..3i64).prop_map(|(tenant, lease)| Step::Grant { tenant, lease }),
        1 => (tenant.clone(), 1..3i64).prop_map(|(tenant, lease)| Step::Revoke { tenant, lease }),
        2 => (tenant.clone(), 0..6i64).prop_map(|(tenant, back)| Step::Compact { tenant, back }),
        3 => (tenant, 1..5u32).prop_map(|(tenant, rows)| Step::Reclaim { tenant, rows }),
        1 => Just(Step::RaiseRules),
        1 => Just(Step::Restart),
        1 => Just(Step::Flush),
    ]
}

struct Run {
    machine: StateMachine<Engine>,
    engine: Arc<Engine>,
    index: u64,
    models: [Model; 2],
}

impl Run {
    fn new(dir: &std::path::Path) -> Self {
        let options = RocksOptions { block_cache_bytes: 1 << 20, write_buffer_bytes: 1 << 20, background_threads: 1 };
        let engine = Arc::new(Mirror(RocksEngine::open(dir, &options).unwrap(), MemoryEngine::new()));
        let machine = StateMachine::open(Arc::clone(&engine), Arc::new(NoObserver)).unwrap();
        let mut run = Run { machine, engine, index: 0, models: [Model::new(), Model::new()] };
        for (tenant, name) in ["acme", "globex"].into_iter().enumerate() {
            let reply = run.apply(0, Command::Tenant(TenantCommand::create(name)));
            assert_eq!(reply.result, Ok(Reply::Tenant { id: id_of(tenant), created: true }));
        }
        run
    }

    fn apply(&mut self, tenant: usize, command: Command) -> Outcome {
        self.index += 1;
        let bytes = Envelope { tenant: id_of(tenant), member_id: 7, command }.encode();
        self.machine.apply(vec![(self.index, vec![bytes])]).unwrap().remove(0).remove(0)
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Put { tenant, key, value, lease } => {
                let reply = self.apply(tenant, Command::Put(put(&key, &value, lease)));
                let model = &mut self.models[tenant];
                if lease != 0 && !model.leases.contains(&lease) {
                    assert_eq!(reply.result, Err(Refusal::LeaseNotFound(LeaseId(lease))));
                } else {
                    model.change(|keys, main| {
                        put_in(keys, main, &key, &value, lease);
                        true
                    });
                    assert_eq!(reply.result, Ok(Reply::Put { prev_kv: None }));
                }
                assert_eq!(reply.revision, model.revision());
            }
            Step::Delete { tenant, range } => {
                let delete = DeleteRangeRequest { range: range.clone(), prev_kv: true };
                let reply = self.apply(tenant, Command::DeleteRange(delete));
                let model = &mut self.models[tenant];
                let doomed = model.now().keys().filter(|key| range.contains(key)).count();
                model.change(|keys, _| delete_in(keys, &range));
                let Ok(Reply::DeleteRange { deleted, prev_kvs }) = reply.result else { panic!("{reply:?}") };
                assert_eq!((deleted as usize, prev_kvs.len()), (doomed, doomed));
                assert_eq!(reply.revision, model.revision());
            }
            Step::Txn { tenant, key, version, range } => self.txn(tenant, &key, version, range),
            Step::Grant { tenant, lease } => {
                let reply = self.apply(tenant, Command::LeaseGrant { id: LeaseId(lease), ttl_seconds: 9 });
                let model = &mut self.models[tenant];
                assert_eq!(reply.result.is_ok(), !model.leases.contains(&lease));
                if reply.result.is_ok() {
                    model.leases.push(lease);
                }
            }
            Step::Revoke { tenant, lease } => {
                let reply = self.apply(tenant, Command::LeaseRevoke { id: LeaseId(lease) });
                let model = &mut self.models[tenant];
                assert_eq!(reply.result.is_ok(), model.leases.contains(&lease));
                model.leases.retain(|other| *other != lease);
                model.change(|keys, _| {
                    let before = keys.len();
                    keys.retain(|_, version| version.4 != lease);
                    keys.len() < before
                });
                assert_eq!(reply.revision, model.revision());
            }
            Step::Compact { tenant, back } => {
                let revision = (self.models[tenant].revision() - back).max(0);
                let reply = self.apply(tenant, Command::Compact { revision });
                let model = &mut self.models[tenant];
                assert_eq!(reply.result.is_ok(), revision > model.compacted);
                model.compacted = model.compacted.max(revision);
            }
            Step::Reclaim { tenant, rows } => {
                let reply = self.apply(tenant, Command::Reclaim { rows_max: rows });
                assert!(matches!(reply.result, Ok(Reply::Reclaim { .. })));
            }
            Step::RaiseRules => {
                let raise = Command::RaiseRules { number: Rules::NEWEST.number(), members: Vec::new() };
                assert_eq!(self.apply(0, raise).result, Ok(Reply::Configure));
            }
            Step::Restart => {
                self.machine = StateMachine::open(Arc::clone(&self.engine), Arc::new(NoObserver)).unwrap();
                assert_eq!(self.machine.applied_index(), self.index);
            }
            Step::Flush => assert_eq!(self.machine.flush().unwrap(), self.machine.durable_index().unwrap()),
        }
    }

    fn txn(&mut self, tenant: usize, key: &[u8], version: i64, range: KeyRange) {
        let request = TxnRequest {
            compares: vec![Compare {
                range: KeyRange::Single(Bytes::copy_from_slice(key)),
                result: CompareResult::Equal,
                target: CompareTarget::Version(version),
            }],
            success: vec![
                TxnOp::DeleteRange(DeleteRangeRequest { range: range.clone(), prev_kv: false }),
                TxnOp::Put(put(key, b"txn", 0)),
            ],
            failure: vec![TxnOp::Put(put(b"b", b"else", 0))],
        };
        let reply = self.apply(tenant, Command::Txn(request));
        let model = &mut self.models[tenant];
        let holds = model.now().get(key).map_or(0, |found| found.3) == version;
        model.change(|keys, main| {
            if holds {
                delete_in(keys, &range);
                put_in(keys, main, key, b"txn", 0);
            } else {
                put_in(keys, main, b"b", b"else", 0);
            }
            true
        });
        let Ok(Reply::Txn(txn)) = reply.result else { panic!("{reply:?}") };
        assert_eq!((txn.succeeded, reply.revision), (holds, model.revision()));
    }

    /// Every read of the whole key space, at every revision, with and without a limit; and the counters.
    fn check(&self) {
        for (tenant, model) in self.models.iter().enumerate() {
            let reader = self.machine.store().reader(id_of(tenant)).unwrap();
            for at in 1..=model.revision() + 1 {
                self.check_at(&reader, model, at);
            }
            let state = reader.state();
            assert_eq!((state.revision, state.compact_revision), (model.revision(), model.compacted));
            assert_eq!(state.usage.live_keys as usize, model.now().len());
            assert_eq!(state.usage.leases as usize, model.leases.len());
            for lease in &model.leases {
                let attached: Vec<Vec<u8>> =
                    model.now().iter().filter(|(_, version)| version.4 == *lease).map(|(key, _)| key.clone()).collect();
                assert_eq!(reader.lease_keys(LeaseId(*lease)).unwrap(), attached);
            }
        }
    }

    fn check_at(&self, reader: &tenure_storage::TenantReader<Engine>, model: &Model, at: i64) {
        let mut request = RangeRequest::new(KeyRange::From(Bytes::from_static(b"\0")));
        request.revision = Some(at);
        let mut found = Vec::new();
        let summary = reader.range(&request, &mut |stored: &[u8]| {
            let kv = KeyValue::decode(stored).unwrap();
            let version = (kv.value.to_vec(), kv.create_revision, kv.mod_revision, kv.version, kv.lease);
            found.push((kv.key.to_vec(), version));
            ControlFlow::Continue(())
        });
        if at > model.revision() {
            return assert!(matches!(summary, Err(ReadError::Refused(Refusal::FutureRevision))));
        }
        if at < model.compacted {
            return assert!(matches!(summary, Err(ReadError::Refused(Refusal::Compacted { .. }))));
        }
        let expected: Vec<_> = model.states[at as usize].clone().into_iter().collect();
        assert_eq!(found, expected, "at {at}");
        // Twice: the second time the count comes from what was remembered of the first.
        for _ in 0..2 {
            self.check_pages(reader, &request, expected.len() as u64);
        }
    }

    fn check_pages(&self, reader: &tenure_storage::TenantReader<Engine>, request: &RangeRequest, total: u64) {
        let mut page = RangeRequest { limit: 2, ..request.clone() };
        let mut seen = 0;
        loop {
            let mut here = 0;
            let summary = reader
                .range(&page, &mut |_: &[u8]| {
                    here += 1;
                    ControlFlow::Continue(())
                })
                .unwrap();
            assert_eq!(summary.count, total - seen, "exact count on every page");
            seen += here;
            match summary.rest {
                Some(rest) => page.range = rest,
                None => break,
            }
        }
        assert_eq!(seen, total);
    }
}

fn id_of(tenant: usize) -> TenantId {
    TenantId(tenant as u32 + 1)
}

fn put(key: &[u8], value: &[u8], lease: i64) -> PutRequest {
    PutRequest {
        key: Bytes::copy_from_slice(key),
        value: Bytes::copy_from_slice(value),
        lease: LeaseId(lease),
        prev_kv: false,
        ignore_value: false,
        ignore_lease: false,
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

    #[test]
    fn the_store_is_the_model(steps in prop::collection::vec(step(), 1..60)) {
        let dir = tempfile::tempdir().unwrap();
        let mut run = Run::new(dir.path());
        for (position, step) in steps.into_iter().enumerate() {
            run.step(step);
            if position % 7 == 0 {
                run.check();
            }
        }
        run.check();
    }
}
