//! The count of a limited range, or of a range of which only the count is wanted, is how many keys the whole range has at that
//! revision, however it was found: by reading, behind a page, or in a counter that follows the writes.
//!
//! Why: counters are moved by one thread and read by others, each with a view of its own age. A count that is off by one makes a
//! kube-apiserver's list end too early or never, and nothing else would tell.

#![allow(clippy::unwrap_used)]

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use proptest::prelude::*;
use tenure_storage::{
    Command, DeleteRangeRequest, Envelope, KeyRange, LeaseId, MemoryEngine, NoObserver, PutRequest, RangeRequest,
    StateMachine, TenantCommand, TenantId, TenantReader,
};

const TENANT: TenantId = TenantId(1);

/// Enough of them for a counter.
const KEYS: u16 = 120;

struct Machine {
    state: StateMachine<MemoryEngine>,
    index: u64,
}

impl Machine {
    fn new() -> Machine {
        let state = StateMachine::open(Arc::new(MemoryEngine::default()), Arc::new(NoObserver)).unwrap();
        let mut machine = Machine { state, index: 0 };
        machine.apply([Command::Tenant(TenantCommand::create("acme"))]);
        machine.apply((0..KEYS).map(put));
        machine
    }

    /// All in one batch.
    fn apply(&mut self, commands: impl IntoIterator<Item = Command>) {
        self.index += 1;
        let encode = |command| Envelope { tenant: TENANT, member_id: 1, command }.encode();
        self.state.apply(vec![(self.index, commands.into_iter().map(encode).collect())]).unwrap();
    }

    fn reader(&self) -> TenantReader<MemoryEngine> {
        self.state.store().reader(TENANT).unwrap()
    }
}

fn key(number: u16) -> Bytes {
    Bytes::from(format!("key{number:03}"))
}

fn put(number: u16) -> Command {
    Command::Put(PutRequest {
        key: key(number),
        value: Bytes::new(),
        lease: LeaseId::NONE,
        prev_kv: false,
        ignore_value: false,
        ignore_lease: false,
    })
}

fn delete(from: u16, to: u16) -> Command {
    Command::DeleteRange(DeleteRangeRequest {
        range: KeyRange::HalfOpen { start: key(from), end: key(to) },
        prev_kv: false,
    })
}

/// A few ranges that nest, overlap and touch, so that each is asked for often.
fn range(which: u8) -> KeyRange {
    match which {
        0 => KeyRange::From(Bytes::from_static(b"\0")),
        1 => KeyRange::HalfOpen { start: key(0), end: key(60) },
        2 => KeyRange::HalfOpen { start: key(40), end: key(110) },
        _ => KeyRange::HalfOpen { start: key(60), end: Bytes::from_static(b"l") },
    }
}

/// Asks for a count in one of the ways there are, and counts what the range hands out at the revision that was read.
fn check(reader: &TenantReader<MemoryEngine>, which: u8, limit: u64) {
    let request = RangeRequest { limit, count_only: limit == 0, ..RangeRequest::new(range(which)) };
    let summary = reader.range(&request, &mut |_: &[u8]| ControlFlow::Continue(())).unwrap();
    let mut keys = 0;
    let at = RangeRequest { revision: Some(summary.read_revision), ..RangeRequest::new(range(which)) };
    reader
        .range(&at, &mut |_: &[u8]| {
            keys += 1;
            ControlFlow::Continue(())
        })
        .unwrap();
    assert_eq!(summary.count, keys, "range {which} at revision {}", summary.read_revision);
    assert_eq!(summary.more, limit > 0 && keys > limit);
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Put(u16),
    /// Of keys from here, so many.
    Delete(u16, u16),
    Ask(u8, u64),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => (0..KEYS + 40).prop_map(Step::Put),
        2 => (0..KEYS, 0u16..4).prop_map(|(from, keys)| Step::Delete(from, keys)),
        4 => (0u8..4, 0u64..3).prop_map(|(which, limit)| Step::Ask(which, limit)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn counts_follow_the_writes(steps in prop::collection::vec(step(), 1..150)) {
        let mut machine = Machine::new();
        let reader = machine.reader();
        for step in steps {
            match step {
                Step::Put(number) => machine.apply([put(number), put(number)]),
                Step::Delete(from, keys) => machine.apply([delete(from, from + keys), put(from)]),
                Step::Ask(which, limit) => check(&reader, which, limit),
            }
        }
    }
}

#[test]
fn readers_of_all_ages_count_right_while_keys_come_and_go() {
    let mut machine = Machine::new();
    let reader = machine.reader();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for which in 0..4 {
            let (reader, done) = (&reader, &done);
            scope.spawn(move || {
                while !done.load(Ordering::Relaxed) {
                    check(reader, which, u64::from(which % 2));
                }
            });
        }
        for round in 0..4_000u16 {
            let from = round.wrapping_mul(37) % KEYS;
            machine.apply([delete(from, from + 3), put(from + 1), put(KEYS + round % 20)]);
        }
        done.store(true, Ordering::Relaxed);
    });
    // And from the counters as they are now.
    (0..4).for_each(|which| check(&reader, which, 0));
}
