//! A small txn that reads very much is refused whole, before it is large.
//!
//! Why: reads of a txn are collected on the apply thread of every member, so a request of kilobytes that names a large key
//! space often enough would be gigabytes there, and again at every replay.

#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use bytes::Bytes;
use tenure_storage::limits::{TXN_REPLY_BYTES_MAX, TXN_ROWS_MAX};
use tenure_storage::{
    Command, Compare, CompareResult, CompareTarget, Envelope, KeyRange, LeaseId, MemoryEngine, NoObserver, Outcome,
    PutRequest, RangeRequest, Refusal, Reply, StateMachine, TenantCommand, TenantId, TxnOp, TxnRequest,
};

struct Machine {
    machine: StateMachine<MemoryEngine>,
    index: u64,
}

impl Machine {
    fn new() -> (Machine, TenantId) {
        let machine = StateMachine::open(Arc::new(MemoryEngine::new()), Arc::new(NoObserver)).unwrap();
        let mut machine = Machine { machine, index: 0 };
        let created = machine.apply(TenantId(0), Command::Tenant(TenantCommand::create("t")));
        let Ok(Reply::Tenant { id, .. }) = created.result else { panic!("{created:?}") };
        (machine, id)
    }

    fn apply(&mut self, tenant: TenantId, command: Command) -> Outcome {
        self.index += 1;
        let entry = Envelope { tenant, member_id: 1, command }.encode();
        self.machine.apply(vec![(self.index, vec![entry])]).unwrap().remove(0).remove(0)
    }

    fn fill(&mut self, tenant: TenantId, keys: usize, value_bytes: usize) {
        for start in (0..keys).step_by(500) {
            let success = (start..keys.min(start + 500)).map(|n| put(&format!("k{n:08}"), value_bytes)).collect();
            let filled = self.apply(tenant, Command::Txn(TxnRequest { success, ..TxnRequest::default() }));
            assert!(filled.result.is_ok(), "{filled:?}");
        }
    }
}

fn put(key: &str, value_bytes: usize) -> TxnOp {
    TxnOp::Put(PutRequest {
        key: Bytes::copy_from_slice(key.as_bytes()),
        value: vec![b'x'; value_bytes].into(),
        lease: LeaseId::NONE,
        prev_kv: false,
        ignore_value: false,
        ignore_lease: false,
    })
}

fn everything() -> KeyRange {
    KeyRange::From(Bytes::from_static(b"k"))
}

fn nested(ops: Vec<TxnOp>) -> TxnOp {
    TxnOp::Txn(TxnRequest { success: ops, ..TxnRequest::default() })
}

#[test]
fn an_answer_that_would_be_too_large_changes_nothing() {
    let (mut machine, tenant) = Machine::new();
    machine.fill(tenant, 1_000, 1 << 10);
    let before = machine.machine.store().reader(tenant).unwrap().state();

    let reads = TXN_REPLY_BYTES_MAX / (1_000 << 10) + 1;
    let ranges = |n: usize| (0..n).map(|_| TxnOp::Range(RangeRequest::new(everything()))).collect::<Vec<_>>();
    let success = vec![put("new", 1), nested(ranges(reads / 2)), nested(ranges(reads / 2 + 1))];
    let outcome = machine.apply(tenant, Command::Txn(TxnRequest { success, ..TxnRequest::default() }));
    assert_eq!(outcome.result, Err(Refusal::TxnTooLarge));
    assert_eq!(machine.machine.store().reader(tenant).unwrap().state(), before);

    let success = vec![put("new", 1), nested(ranges(2))];
    let outcome = machine.apply(tenant, Command::Txn(TxnRequest { success, ..TxnRequest::default() }));
    assert!(outcome.result.is_ok(), "{outcome:?}");
}

#[test]
fn work_is_bounded_even_when_nothing_is_returned() {
    let (mut machine, tenant) = Machine::new();
    machine.fill(tenant, 20_000, 1);
    let before = machine.machine.store().reader(tenant).unwrap().state();
    let passes = usize::try_from(TXN_ROWS_MAX).unwrap() / 20_000 + 2;

    let mut count = RangeRequest::new(everything());
    count.count_only = true;
    let mut success = vec![put("new", 1)];
    success.extend((0..passes).map(|_| TxnOp::Range(count.clone())));
    let outcome = machine.apply(tenant, Command::Txn(TxnRequest { success, ..TxnRequest::default() }));
    assert_eq!(outcome.result, Err(Refusal::TxnTooLarge));

    let compare = Compare { range: everything(), result: CompareResult::Greater, target: CompareTarget::Version(0) };
    let compares = vec![compare; passes];
    let outcome = machine.apply(tenant, Command::Txn(TxnRequest { compares, ..TxnRequest::default() }));
    assert_eq!(outcome.result, Err(Refusal::TxnTooLarge));
    assert_eq!(machine.machine.store().reader(tenant).unwrap().state(), before);
}
