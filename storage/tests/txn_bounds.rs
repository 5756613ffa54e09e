//! A small txn that reads very much is refused whole, before it is large.
//!
//! Why: reads of a txn are collected on the apply thread of every member, so a request of kilobytes that names a large key
//! space often enough would be gigabytes there, and again at every replay.

#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use bytes::Bytes;
use tenure_storage::apply::ROUND_BYTES;
use tenure_storage::command::cost_bytes;
use tenure_storage::limits::{
    ALARMS_MAX, DELETED_KEYS_MAX, LEASE_KEYS_MAX, ROW_WORK_BYTES, TXN_REPLY_BYTES_MAX, TXN_ROWS_MAX,
    TXN_STORED_BYTES_MAX,
};
use tenure_storage::{
    AlarmKind, Command, Compare, CompareResult, CompareTarget, DeleteRangeRequest, Envelope, KeyRange, LeaseId,
    MemoryEngine, NoObserver, Outcome, PutRequest, RangeRequest, Refusal, Reply, Rules, SortOrder, StateMachine,
    TenantCommand, TenantId, TxnOp, TxnRequest,
};

struct Machine {
    machine: StateMachine<MemoryEngine>,
    index: u64,
}

impl Machine {
    fn new() -> (Machine, TenantId) {
        let machine = StateMachine::open(Arc::new(MemoryEngine::new()), Arc::new(NoObserver)).unwrap();
        let mut machine = Machine { machine, index: 0 };
        machine.raise_rules(Rules::NEWEST);
        let created = machine.apply(TenantId(0), Command::Tenant(TenantCommand::create("t")));
        let Ok(Reply::Tenant { id, .. }) = created.result else { panic!("{created:?}") };
        (machine, id)
    }

    fn raise_rules(&mut self, rules: Rules) {
        let raise = Command::RaiseRules { number: rules.number(), members: Vec::new() };
        assert!(self.apply(TenantId(0), raise).result.is_ok());
    }

    fn apply(&mut self, tenant: TenantId, command: Command) -> Outcome {
        self.index += 1;
        let entry = Envelope { tenant, member_id: 1, command }.encode();
        self.machine.apply(vec![(self.index, vec![entry])]).unwrap().remove(0).remove(0)
    }

    fn fill(&mut self, tenant: TenantId, keys: usize, value_bytes: usize) {
        self.fill_in_batches(tenant, keys, value_bytes, 500);
    }

    fn fill_in_batches(&mut self, tenant: TenantId, keys: usize, value_bytes: usize, batch: usize) {
        for start in (0..keys).step_by(batch) {
            let success = (start..keys.min(start + batch)).map(|n| put(&format!("k{n:08}"), value_bytes)).collect();
            let filled = self.apply(tenant, Command::Txn(TxnRequest { success, ..TxnRequest::default() }));
            assert!(filled.result.is_ok(), "{filled:?}");
        }
    }
}

fn put(key: &str, value_bytes: usize) -> TxnOp {
    TxnOp::Put(put_request(key, value_bytes))
}

fn put_request(key: &str, value_bytes: usize) -> PutRequest {
    PutRequest {
        key: Bytes::copy_from_slice(key.as_bytes()),
        value: vec![b'x'; value_bytes].into(),
        lease: LeaseId::NONE,
        prev_kv: false,
        ignore_value: false,
        ignore_lease: false,
    }
}

/// Writes the values of the first keys of [`Machine::fill`] again, without carrying them.
fn keep_values(keys: usize) -> Command {
    let kept = |n| PutRequest { ignore_value: true, ..put_request(&format!("k{n:08}"), 0) };
    let success = (0..keys).map(|n| TxnOp::Put(kept(n))).collect();
    Command::Txn(TxnRequest { success, ..TxnRequest::default() })
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

// A tenant may have few keys and all its bytes in them: a txn that reads them again and again, to answer with one, is as much work.
#[test]
fn work_counts_bytes_too() {
    let (mut machine, tenant) = Machine::new();
    let (keys, value_bytes) = (64, 1 << 20);
    machine.fill_in_batches(tenant, keys, value_bytes, 8);
    let before = machine.machine.store().reader(tenant).unwrap().state();
    let passes = usize::try_from(TXN_ROWS_MAX * ROW_WORK_BYTES).unwrap() / (keys * value_bytes) + 2;

    let last = RangeRequest { order: SortOrder::Descend, limit: 1, ..RangeRequest::new(everything()) };
    let mut success = vec![put("new", 1)];
    success.extend((0..passes).map(|_| TxnOp::Range(last.clone())));
    let outcome = machine.apply(tenant, Command::Txn(TxnRequest { success, ..TxnRequest::default() }));
    assert_eq!(outcome.result, Err(Refusal::TxnTooLarge));

    let target = CompareTarget::Value(Bytes::from_static(b"a"));
    let compare = Compare { range: everything(), result: CompareResult::Greater, target };
    let compares = vec![compare; passes];
    let outcome = machine.apply(tenant, Command::Txn(TxnRequest { compares, ..TxnRequest::default() }));
    assert_eq!(outcome.result, Err(Refusal::TxnTooLarge));
    assert_eq!(machine.machine.store().reader(tenant).unwrap().state(), before);
}

#[test]
fn a_delete_that_would_tell_too_much_deletes_nothing() {
    let (mut machine, tenant) = Machine::new();
    let keys = TXN_REPLY_BYTES_MAX / (1 << 20) + 1;
    machine.fill_in_batches(tenant, keys, 1 << 20, 8);
    let before = machine.machine.store().reader(tenant).unwrap().state();
    let delete = |prev_kv| Command::DeleteRange(DeleteRangeRequest { range: everything(), prev_kv });
    assert_eq!(machine.apply(tenant, delete(true)).result, Err(Refusal::TxnTooLarge));
    assert_eq!(machine.machine.store().reader(tenant).unwrap().state(), before);
    let Ok(Reply::DeleteRange { deleted, .. }) = machine.apply(tenant, delete(false)).result else { panic!() };
    assert_eq!(deleted, keys as u64);
}

// The keys of a delete are in memory of every member while their revision is written, and again at every replay.
#[test]
fn a_delete_of_very_many_keys_deletes_nothing() {
    let (mut machine, tenant) = Machine::new();
    machine.fill_in_batches(tenant, DELETED_KEYS_MAX + 1, 0, 5_000);
    let before = machine.machine.store().reader(tenant).unwrap().state();
    let delete = |range| DeleteRangeRequest { range, prev_kv: false };
    let start = |n: usize| Bytes::from(format!("k{n:08}"));
    let halves = [
        delete(KeyRange::HalfOpen { start: start(0), end: start(DELETED_KEYS_MAX / 2) }),
        delete(KeyRange::From(start(DELETED_KEYS_MAX / 2))),
    ];
    let success = halves.into_iter().map(TxnOp::DeleteRange).collect();
    for command in
        [Command::DeleteRange(delete(everything())), Command::Txn(TxnRequest { success, ..TxnRequest::default() })]
    {
        assert_eq!(machine.apply(tenant, command).result, Err(Refusal::TxnTooLarge));
        assert_eq!(machine.machine.store().reader(tenant).unwrap().state(), before);
    }
    let all_but_one = Command::DeleteRange(delete(KeyRange::From(start(1))));
    let Ok(Reply::DeleteRange { deleted, .. }) = machine.apply(tenant, all_but_one).result else { panic!() };
    assert_eq!(deleted, DELETED_KEYS_MAX as u64);
}

// All keys of a lease go in one revision when it ends, and nobody is there to be refused then.
#[test]
fn a_lease_has_so_many_keys_and_no_more() {
    let (mut machine, tenant) = Machine::new();
    let lease = LeaseId(7);
    assert!(machine.apply(tenant, Command::LeaseGrant { id: lease, ttl_seconds: 60 }).result.is_ok());
    let attached = |n: u64, lease| PutRequest { lease, ..put_request(&format!("k{n:08}"), 0) };
    for first in (0..LEASE_KEYS_MAX).step_by(1_000) {
        let success = (first..first + 1_000).map(|n| TxnOp::Put(attached(n, lease))).collect();
        assert!(machine.apply(tenant, Command::Txn(TxnRequest { success, ..TxnRequest::default() })).result.is_ok());
    }
    let before = machine.machine.store().reader(tenant).unwrap().state();
    let one_more = Command::Put(attached(LEASE_KEYS_MAX, lease));
    assert_eq!(machine.apply(tenant, one_more.clone()).result, Err(Refusal::TooManyLeaseKeys));
    assert_eq!(machine.machine.store().reader(tenant).unwrap().state(), before);
    // One that has it may be put again, and one that leaves makes room.
    assert!(machine.apply(tenant, Command::Put(attached(0, lease))).result.is_ok());
    assert!(machine.apply(tenant, Command::Put(attached(0, LeaseId::NONE))).result.is_ok());
    assert!(machine.apply(tenant, one_more).result.is_ok());
    assert!(machine.apply(tenant, Command::Put(attached(0, lease))).result == Err(Refusal::TooManyLeaseKeys));
    assert!(machine.apply(tenant, Command::LeaseRevoke { id: lease }).result.is_ok());
    let usage = machine.machine.store().reader(tenant).unwrap().state().usage;
    assert_eq!((usage.live_keys, usage.leases), (1, 0));
}

// What an entry was decided by must decide it again when it is replayed by a later release; and who does not know the rules stops.
#[test]
fn rules_hold_from_where_they_were_raised() {
    let machine = StateMachine::open(Arc::new(MemoryEngine::new()), Arc::new(NoObserver)).unwrap();
    let mut machine = Machine { machine, index: 0 };
    let created = machine.apply(TenantId(0), Command::Tenant(TenantCommand::create("t")));
    let Ok(Reply::Tenant { id: tenant, .. }) = created.result else { panic!("{created:?}") };
    assert_eq!(machine.machine.store().rules(), Rules::FIRST);
    let (keys, value_bytes) = (TXN_STORED_BYTES_MAX / (1 << 20) + 1, 1 << 20);
    machine.fill_in_batches(tenant, keys, value_bytes, 8);
    let again = keep_values(keys);
    assert!(machine.apply(tenant, again.clone()).result.is_ok(), "as it was decided before");

    let raise = |number, members| Command::RaiseRules { number, members };
    let other_members = machine.apply(TenantId(0), raise(2, vec![1]));
    assert_eq!(other_members.result, Err(Refusal::MembersChanged));
    machine.raise_rules(Rules::NEWEST);
    assert_eq!(machine.apply(tenant, again.clone()).result, Err(Refusal::TxnTooLarge));
    assert!(machine.apply(TenantId(0), raise(1, Vec::new())).result.is_ok(), "never lowered");
    assert_eq!(machine.apply(tenant, again).result, Err(Refusal::TxnTooLarge));

    let number = Rules::NEWEST.number() + 1;
    let entry = Envelope { tenant, member_id: 1, command: raise(number, Vec::new()) }.encode();
    let stopped = machine.machine.apply(vec![(machine.index + 1, vec![entry])]).unwrap_err().to_string();
    assert!(stopped.contains(&format!("decides by rules {number}, this release knows 1 to")), "{stopped}");
}

// What a put keeps is not in its request: a txn of some kilobytes could write all of a tenant's bytes again, in one batch.
#[test]
fn puts_that_keep_their_values_are_bounded() {
    let (mut machine, tenant) = Machine::new();
    let keys = TXN_STORED_BYTES_MAX / (1 << 20) + 1;
    machine.fill_in_batches(tenant, keys, 1 << 20, 8);
    let before = machine.machine.store().reader(tenant).unwrap().state();
    assert_eq!(machine.apply(tenant, keep_values(keys)).result, Err(Refusal::TxnTooLarge));
    assert_eq!(machine.machine.store().reader(tenant).unwrap().state(), before);
    assert!(machine.apply(tenant, keep_values(keys - 2)).result.is_ok());
}

// Clients choose member ids and kinds of alarms, and the row of a tenant, with all its alarms, is written with each of its batches.
#[test]
fn alarms_have_a_bound() {
    let (mut machine, tenant) = Machine::new();
    let alarm = |member_id| Command::Alarm { activate: true, member_id, kind: AlarmKind(7) };
    for member_id in 0..ALARMS_MAX as u64 {
        assert!(machine.apply(tenant, alarm(member_id)).result.is_ok());
    }
    assert_eq!(machine.apply(tenant, alarm(ALARMS_MAX as u64)).result, Err(Refusal::TooManyAlarms));
    assert!(machine.apply(tenant, alarm(3)).result.is_ok(), "one that is set already");
}

/// Entries of a few bytes that copy large values, applied together: each round must end before it fills memory, at an entry, with all
/// outcomes told once and in order.
#[test]
fn a_round_ends_when_it_has_changed_much() {
    const VALUE_BYTES: usize = 1 << 20;
    let (mut machine, tenant) = Machine::new();
    machine.fill(tenant, 1, VALUE_BYTES);
    let TxnOp::Put(large) = put("k00000000", 0) else { unreachable!("a put") };
    let again = Command::Put(PutRequest { ignore_value: true, value: Bytes::new(), ..large });
    let command = Envelope { tenant, member_id: 1, command: again }.encode();
    assert!(cost_bytes(&command) > VALUE_BYTES, "it counts for what it writes");
    let entries: Vec<_> = (1..=200).map(|n| (machine.index + n, vec![command.clone()])).collect();
    let (mut applied, mut rounds, mut told) = (0, 0, Vec::new());
    while applied < entries.len() {
        let round = machine.machine.apply_round(&entries[applied..], |entry, place, of, outcome| {
            assert_eq!((place, of), (0, tenant));
            told.push((applied + entry, outcome.revision));
        });
        let round = round.unwrap();
        assert!(round * VALUE_BYTES <= ROUND_BYTES + 2 * VALUE_BYTES, "{round} in one");
        (applied, rounds) = (applied + round, rounds + 1);
        assert_eq!(machine.machine.applied_index(), entries[applied - 1].0);
    }
    let first = told[0].1;
    assert_eq!(told, (0..200).zip(first..).collect::<Vec<_>>());
    assert!(rounds >= 3, "{rounds} rounds");
}

/// What lets few commands that do much into one entry.
#[test]
fn commands_count_for_what_they_do() {
    let cost_of = |command| {
        let encoded = Envelope { tenant: TenantId(1), member_id: 1, command }.encode();
        cost_bytes(&encoded) - encoded.len()
    };
    let txn = |success: Vec<TxnOp>| Command::Txn(TxnRequest { success, ..TxnRequest::default() });
    let single = TxnOp::Range(RangeRequest::new(KeyRange::Single(Bytes::from_static(b"k"))));
    let many = TxnOp::Range(RangeRequest::new(everything()));
    assert_eq!(cost_of(txn(vec![put("k", 100), single])), 0);
    let one = cost_of(txn(vec![many.clone()]));
    assert!(one >= 1 << 20);
    assert_eq!(cost_of(txn(vec![put("k", 1), nested(vec![many.clone(), many])])), one, "it is alone with that");
    assert_eq!(cost_of(Command::DeleteRange(DeleteRangeRequest { range: everything(), prev_kv: false })), one);
}
