//! Requests as they come off the wire, checked, converted and run as the server does it, beside a model.
//!
//! A step of the input is a request made of few keys and small numbers, so that requests meet, or bytes that are taken
//! for a request. Each answer, each event a watcher sees and, in the end, every state that can still be read must be the
//! model's.

#![no_main]

mod model;

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::sync::Arc;

use arbitrary::{Arbitrary, Result, Unstructured};
use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use prost::Message;
use tenure_etcd_shim::check::{self, TxnPath};
use tenure_etcd_shim::convert::{from_proto, to_proto};
use tenure_etcd_shim::proto::etcdserverpb as pb;
use tenure_etcd_shim::proto::etcdserverpb::compare::TargetUnion;
use tenure_etcd_shim::proto::etcdserverpb::request_op::Request;
use tenure_storage::{
    Command, Envelope, KeyRange, LeaseId, MemoryEngine, NoObserver, Outcome, RangeReply, ReadError, Refusal, Reply,
    StateMachine, TenantCommand, TenantId, TenantReader, WatchMessage, WatchSpec, WatchStream,
};

use self::model::{Event, Model, checks};

/// Small, so that the bound is met.
const TXN_OPS_MAX: usize = 6;
const MAX_REQUEST_BYTES: usize = 3 << 19;
const LEASES: std::ops::RangeInclusive<i64> = -1..=3;
const TENANT: TenantId = TenantId(1);

enum Step {
    Range(pb::RangeRequest),
    Put(pb::PutRequest),
    Delete(pb::DeleteRangeRequest),
    Txn(pb::TxnRequest),
    Compact(i64),
    Reclaim(u32),
    Grant(pb::LeaseGrantRequest),
    Revoke(i64),
    /// Everything in memory is lost but the engine.
    Reopen,
}

/// What a client's bytes are, if they are anything.
fn decode<M: Message + Default>(bytes: &[u8]) -> Option<M> {
    M::decode(bytes).ok()
}

/// Over the wire and back.
fn sent<M: Message + Default>(message: &M) -> M {
    M::decode(&message.encode_to_vec()[..]).expect("what was encoded can be decoded")
}

fn step(u: &mut Unstructured<'_>) -> Result<Option<Step>> {
    let as_bytes = u.ratio(1, 16)?;
    let raw = if as_bytes { <&[u8]>::arbitrary(u)? } else { b"" };
    Ok(Some(match u.int_in_range(0..=15)? {
        0..=2 => match as_bytes {
            true => return Ok(decode(raw).map(Step::Range)),
            false => Step::Range(range(u)?),
        },
        3..=5 => match as_bytes {
            true => return Ok(decode(raw).map(Step::Put)),
            false => Step::Put(put(u)?),
        },
        6 => match as_bytes {
            true => return Ok(decode(raw).map(Step::Delete)),
            false => Step::Delete(delete(u)?),
        },
        7..=10 => match as_bytes {
            true => return Ok(decode(raw).map(Step::Txn)),
            false => Step::Txn(txn(u, 3)?),
        },
        11 => Step::Compact(small(u)?),
        12 => Step::Reclaim(u.int_in_range(1..=9)?),
        13 => Step::Grant(pb::LeaseGrantRequest { ttl: i64::arbitrary(u)?, id: u.int_in_range(LEASES)? }),
        14 => Step::Revoke(u.int_in_range(LEASES)?),
        _ => Step::Reopen,
    }))
}

fn key(u: &mut Unstructured<'_>) -> Result<Bytes> {
    let length = u.int_in_range(0..=3)?;
    // An empty key is refused: not too often.
    let length = if length == 0 && !u.ratio(1, 8)? { 1 } else { length };
    (0..length).map(|_| Ok(*u.choose(&[0, 1, b'a', b'b', 0xff])?)).collect::<Result<Vec<u8>>>().map(Bytes::from)
}

fn range_end(u: &mut Unstructured<'_>) -> Result<Bytes> {
    match u.int_in_range(0..=3)? {
        0 => Ok(Bytes::new()),
        1 => Ok(Bytes::from_static(b"\0")),
        _ => key(u),
    }
}

/// A number around the revisions, limits and versions there are; now and then any.
fn small(u: &mut Unstructured<'_>) -> Result<i64> {
    if u.ratio(1, 32)? { i64::arbitrary(u) } else { u.int_in_range(-2..=24) }
}

fn maybe_small(u: &mut Unstructured<'_>) -> Result<i64> {
    if u.ratio(3, 4)? { Ok(0) } else { small(u) }
}

/// A number of an enum that has `known` values.
fn number(u: &mut Unstructured<'_>, known: i32) -> Result<i32> {
    if u.ratio(1, 32)? { i32::arbitrary(u) } else { u.int_in_range(0..=known - 1) }
}

fn range(u: &mut Unstructured<'_>) -> Result<pb::RangeRequest> {
    Ok(pb::RangeRequest {
        key: key(u)?,
        range_end: range_end(u)?,
        limit: maybe_small(u)?,
        revision: maybe_small(u)?,
        sort_order: number(u, 3)?,
        sort_target: number(u, 5)?,
        serializable: u.arbitrary()?,
        keys_only: u.ratio(1, 4)?,
        count_only: u.ratio(1, 8)?,
        min_mod_revision: maybe_small(u)?,
        max_mod_revision: maybe_small(u)?,
        min_create_revision: maybe_small(u)?,
        max_create_revision: maybe_small(u)?,
    })
}

fn put(u: &mut Unstructured<'_>) -> Result<pb::PutRequest> {
    let ignore_value = u.ratio(1, 8)?;
    let ignore_lease = u.ratio(1, 8)?;
    Ok(pb::PutRequest {
        key: key(u)?,
        value: if ignore_value { Bytes::new() } else { key(u)? },
        lease: if u.ratio(1, 2)? { 0 } else { u.int_in_range(LEASES)? },
        prev_kv: u.arbitrary()?,
        ignore_value,
        ignore_lease,
    })
}

fn delete(u: &mut Unstructured<'_>) -> Result<pb::DeleteRangeRequest> {
    Ok(pb::DeleteRangeRequest { key: key(u)?, range_end: range_end(u)?, prev_kv: u.arbitrary()? })
}

fn compare(u: &mut Unstructured<'_>) -> Result<pb::Compare> {
    let target = number(u, 5)?;
    let target_union = match u.int_in_range(0..=9)? {
        0 => None,
        1 => Some(TargetUnion::ModRevision(small(u)?)),
        _ => Some(match target {
            0 => TargetUnion::Version(small(u)?),
            1 => TargetUnion::CreateRevision(small(u)?),
            2 => TargetUnion::ModRevision(small(u)?),
            3 => TargetUnion::Value(key(u)?),
            _ => TargetUnion::Lease(u.int_in_range(LEASES)?),
        }),
    };
    Ok(pb::Compare { result: number(u, 4)?, target, key: key(u)?, range_end: range_end(u)?, target_union })
}

fn op(u: &mut Unstructured<'_>, depth: usize) -> Result<pb::RequestOp> {
    let request = match u.int_in_range(0..=9)? {
        0..=2 => Request::RequestRange(range(u)?),
        3..=5 => Request::RequestPut(put(u)?),
        6 | 7 => Request::RequestDeleteRange(delete(u)?),
        8 if u.ratio(1, 16)? => return Ok(pb::RequestOp { request: None }),
        _ if depth > 0 => Request::RequestTxn(txn(u, depth - 1)?),
        _ => Request::RequestPut(put(u)?),
    };
    Ok(pb::RequestOp { request: Some(request) })
}

fn txn(u: &mut Unstructured<'_>, depth: usize) -> Result<pb::TxnRequest> {
    let compares = u.int_in_range(0..=2)?;
    let success = u.int_in_range(0..=4)?;
    let failure = u.int_in_range(0..=3)?;
    Ok(pb::TxnRequest {
        compare: (0..compares).map(|_| compare(u)).collect::<Result<_>>()?,
        success: (0..success).map(|_| op(u, depth)).collect::<Result<_>>()?,
        failure: (0..failure).map(|_| op(u, depth)).collect::<Result<_>>()?,
    })
}

struct Run {
    engine: Arc<MemoryEngine>,
    machine: StateMachine<MemoryEngine>,
    reader: TenantReader<MemoryEngine>,
    watcher: WatchStream<MemoryEngine>,
    index: u64,
    model: Model,
}

/// A watcher of everything, from `start_revision` on.
fn watcher(reader: &TenantReader<MemoryEngine>, start_revision: i64) -> WatchStream<MemoryEngine> {
    let stream = reader.watch_stream(Arc::new(|| {}));
    stream.create(WatchSpec {
        range: KeyRange::From(Bytes::from_static(b"\0")),
        start_revision,
        prev_kv: true,
        no_put: false,
        no_delete: false,
        progress_notify: false,
        fragment: false,
        watch_id: 0,
    });
    assert!(matches!(stream.pop(), Some(WatchMessage::Created { watch_id: 0, .. })));
    stream
}

/// All events that wait.
fn told(stream: &WatchStream<MemoryEngine>) -> Vec<Event> {
    let mut told = Vec::new();
    while let Some(message) = stream.pop() {
        let WatchMessage::Events { batch, .. } = message else { panic!("only events are expected: {message:?}") };
        let events = batch.events.iter();
        told.extend(events.map(|event| (event.kind, event.key.to_vec(), event.kv.clone(), event.prev_kv.clone())));
    }
    told
}

impl Run {
    fn new() -> Self {
        let engine = Arc::new(MemoryEngine::new());
        let mut machine = StateMachine::open(Arc::clone(&engine), Arc::new(NoObserver)).expect("an empty engine opens");
        let create = Command::Tenant(TenantCommand::create("acme"));
        let create = Envelope { tenant: TenantId(0), member_id: 7, command: create };
        machine.apply(vec![(1, vec![create.encode()])]).expect("nothing can fail");
        let reader = machine.store().reader(TENANT).expect("the tenant was made");
        let watcher = watcher(&reader, 0);
        Run { engine, machine, reader, watcher, index: 1, model: Model::new() }
    }

    /// As a raft entry; the model has already done the same.
    fn apply(&mut self, command: Command) -> std::result::Result<Reply, Refusal> {
        self.index += 1;
        let command = Envelope { tenant: TENANT, member_id: 7, command }.encode();
        let mut outcomes = self.machine.apply(vec![(self.index, vec![command])]).expect("memory does not fail");
        let Outcome { revision, result } = outcomes.remove(0).remove(0);
        assert_eq!(revision, self.model.revision());
        result
    }

    fn step(&mut self, step: Step) {
        let revision_before = self.model.revision();
        match step {
            Step::Range(request) => self.range(sent(&request)),
            Step::Put(request) => self.put(sent(&request)),
            Step::Delete(request) => self.delete(sent(&request)),
            Step::Txn(request) => self.txn(sent(&request)),
            Step::Compact(revision) => {
                let expected = self.model.compact(revision).map(|()| Reply::Compact);
                assert_eq!(self.apply(Command::Compact { revision }), expected);
            }
            Step::Reclaim(rows_max) => {
                assert!(matches!(self.apply(Command::Reclaim { rows_max }), Ok(Reply::Reclaim { .. })));
            }
            Step::Grant(request) => self.grant(sent(&request)),
            Step::Revoke(id) => {
                let expected = self.model.revoke(id).map(|()| Reply::LeaseRevoke);
                assert_eq!(self.apply(Command::LeaseRevoke { id: LeaseId(id) }), expected);
            }
            Step::Reopen => {
                self.machine = StateMachine::open(Arc::clone(&self.engine), Arc::new(NoObserver)).expect("it opens");
                assert_eq!(self.machine.applied_index(), self.index);
                self.reader = self.machine.store().reader(TENANT).expect("the tenant is still there");
                self.watcher = watcher(&self.reader, 0);
            }
        }
        let expected = match self.model.revision() > revision_before {
            true => self.model.events.last().cloned().unwrap_or_default(),
            false => Vec::new(),
        };
        assert_eq!(told(&self.watcher), expected, "what a synced watcher is told");
    }

    fn range(&self, request: pb::RangeRequest) {
        let expected = checks::range(&request);
        assert_eq!(check::range(&request), expected);
        if expected.is_err() {
            return;
        }
        let expected = self.model.range(&request);
        let request = from_proto::range(request).expect("it was checked");
        let mut kvs = Vec::new();
        let found = self.reader.range(&request, &mut |stored: &[u8]| {
            kvs.push(Bytes::copy_from_slice(stored));
            ControlFlow::Continue(())
        });
        let found = match found {
            Ok(found) => {
                assert_eq!(found.revision, self.model.revision());
                Ok(RangeReply { kvs, more: found.more, count: found.count })
            }
            Err(ReadError::Refused(refusal)) => Err(refusal),
            Err(ReadError::Fault(fault)) => panic!("{fault}"),
        };
        assert_eq!(found, expected);
    }

    fn put(&mut self, request: pb::PutRequest) {
        let expected = checks::put(&request);
        assert_eq!(check::put(&request), expected);
        if expected.is_err() || check::size(&request, MAX_REQUEST_BYTES).is_err() {
            return;
        }
        let expected = self.model.put(&request).map(|prev_kv| Reply::Put { prev_kv });
        assert_eq!(self.apply(Command::Put(from_proto::put(request))), expected);
    }

    fn delete(&mut self, request: pb::DeleteRangeRequest) {
        assert_eq!(check::delete_range(&request).is_err(), request.key.is_empty());
        if request.key.is_empty() {
            return;
        }
        let (deleted, prev_kvs) = self.model.delete(&request);
        let reply = self.apply(Command::DeleteRange(from_proto::delete_range(request)));
        assert_eq!(reply, Ok(Reply::DeleteRange { deleted, prev_kvs }));
    }

    fn txn(&mut self, request: pb::TxnRequest) {
        let _ = check::txn_cost(&request);
        let expected = checks::txn(&request, TXN_OPS_MAX);
        assert_eq!(check::txn(&request, TXN_OPS_MAX), expected);
        if expected.is_err() || check::size(&request, MAX_REQUEST_BYTES).is_err() {
            return;
        }
        let expected = self.model.txn(&request);
        let path = check::txn_path(&request);
        let request = from_proto::txn(request).expect("it was checked");
        let reply = match path {
            TxnPath::ReadSerializable | TxnPath::ReadLinearizable => match self.reader.txn_read_only(&request) {
                Ok((revision, reply)) => {
                    assert_eq!(revision, self.model.revision());
                    Ok(reply)
                }
                Err(ReadError::Refused(refusal)) => Err(refusal),
                Err(ReadError::Fault(fault)) => panic!("{fault}"),
            },
            TxnPath::Write => match self.apply(Command::Txn(request)) {
                Ok(Reply::Txn(reply)) => Ok(reply),
                Ok(other) => panic!("the reply of another command: {other:?}"),
                Err(refusal) => Err(refusal),
            },
        };
        assert_eq!(reply, expected);
        if let Ok(reply) = reply {
            let message = to_proto::txn(None, reply);
            let bytes = message.encode_to_vec();
            assert_eq!(bytes.len(), message.encoded_len());
            assert_eq!(sent(&message).encode_to_vec(), bytes);
        }
    }

    fn grant(&mut self, request: pb::LeaseGrantRequest) {
        let too_large = request.ttl > 9_000_000_000;
        assert_eq!(check::lease_grant(&request).is_err(), too_large);
        if too_large || request.id == 0 {
            return;
        }
        let (id, ttl_seconds) = (request.id, request.ttl.max(2));
        let expected = self.model.grant(id, ttl_seconds);
        let expected = expected.map(|()| Reply::LeaseGrant { id: LeaseId(id), ttl_seconds });
        assert_eq!(self.apply(Command::LeaseGrant { id: LeaseId(id), ttl_seconds }), expected);
    }

    /// All that can be asked at the end.
    fn check(&self) {
        let state = self.reader.state();
        assert_eq!((state.revision, state.compact_revision), (self.model.revision(), self.model.compacted));
        assert_eq!(state.usage.live_keys, self.model.now().len() as u64);
        assert_eq!(state.usage.leases, self.model.leases.len() as u64);
        let leases = self.reader.leases().expect("memory does not fail").into_iter();
        assert_eq!(leases.map(|(id, ttl)| (id.0, ttl)).collect::<BTreeMap<_, _>>(), self.model.leases);
        for id in LEASES {
            let lease = self.reader.lease(LeaseId(id)).expect("memory does not fail");
            assert_eq!(lease, self.model.leases.get(&id).copied());
            let keys = self.reader.lease_keys(LeaseId(id)).expect("memory does not fail");
            assert_eq!(keys, if id == 0 { Vec::new() } else { self.model.attached(id) });
        }
        let all = pb::RangeRequest { key: b"\0"[..].into(), range_end: b"\0"[..].into(), ..Default::default() };
        for revision in -1..=self.model.revision() + 1 {
            self.range(pb::RangeRequest { revision, ..all.clone() });
            self.range(pb::RangeRequest { revision, limit: 2, ..all.clone() });
        }
        self.check_history();
    }

    /// A watcher that starts behind the compaction is told everything that has happened since.
    fn check_history(&self) {
        let from = (self.model.compacted + 1).max(1);
        let behind = watcher(&self.reader, from);
        let mut seen = Vec::new();
        while behind.needs_replay() {
            behind.replay_step().expect("memory does not fail");
            seen.extend(told(&behind));
        }
        let expected = self.model.events.get(from as usize..).unwrap_or_default().concat();
        assert_eq!(seen, expected, "what is replayed from {from} on");
    }
}

fuzz_target!(|data: &[u8]| {
    let mut u = Unstructured::new(data);
    let mut run = Run::new();
    while !u.is_empty() {
        match step(&mut u) {
            Ok(Some(step)) => run.step(step),
            // Bytes that are no request.
            Ok(None) => {}
            Err(_) => break,
        }
    }
    run.check();
});
