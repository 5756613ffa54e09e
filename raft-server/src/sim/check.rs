//! What must hold of a run, told from what clients saw and what the members have in the end.

use std::collections::BTreeSet;

use bytes::Bytes;
use raft::eraftpb::ConfState;
use tenure_storage::{MemoryEngine, Store, TenantId};

use super::watcher::{self, Watcher};
use crate::log::Conf;

/// A promise that was broken, with what shows it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Violation {
    /// An acknowledged write is not in the history where its revision says.
    Lost { value: String, revision: i64 },
    /// A write is in the history twice.
    Twice { value: String, revisions: Vec<i64> },
    /// A write that was asked for after another was acknowledged has a lower revision.
    OutOfOrder { value: String, revision: i64, acknowledged_before: i64 },
    /// A linearizable read does not show what was acknowledged before it.
    StaleRead { revision: i64, acknowledged_before: i64 },
    /// Two members differ.
    Differ { members: (u64, u64), revision: i64 },
    /// Two members differ in what is not history: leases, or the hash of everything.
    DifferElsewhere { members: (u64, u64) },
    /// Two members that have applied the same know of other members.
    DifferInMembers { members: (u64, u64), confs: Box<(Conf, Conf)> },
    /// A watcher was sent a revision that it had been sent before, or was told of.
    WatchedTwice { member: u64, revision: i64, next: i64 },
    /// What a watcher was sent of a revision is not what the members have.
    WatchDiffers { revision: i64 },
    /// A watcher is not sent what there is.
    WatchStuck { next: i64, last: i64 },
    /// A member found that something it relies on does not hold.
    Panicked(String),
    /// With everything healed, somebody gets no answer.
    Stuck { waiting: usize, members: Vec<String> },
}

/// A member of the group as it is in the end; all have applied the same.
pub(super) struct Survivor {
    pub(super) id: u64,
    pub(super) store: Store<MemoryEngine>,
    pub(super) conf: Conf,
}

/// A write that a client asked for; every one has a value of its own.
pub(super) struct Write {
    pub(super) value: String,
    /// The newest acknowledged revision when it was asked for.
    pub(super) acknowledged_before: i64,
    /// Its revision, if it was acknowledged.
    pub(super) revision: Option<i64>,
}

/// What members must agree in beside their history.
fn rest(store: &Store<MemoryEngine>, tenant: TenantId) -> Option<impl PartialEq> {
    let reader = store.reader(tenant)?;
    let leases = reader.leases().expect("memory has no faults");
    let keys = leases.iter().map(|(id, _)| reader.lease_keys(*id).expect("memory has no faults"));
    let (keys, hash) = (keys.collect::<Vec<_>>(), reader.hash_kv(0).expect("now is readable"));
    Some((leases, keys, hash.hash, hash.compact_revision, reader.state().usage))
}

/// Raft keeps members in no order. (The index says little: a member that got them with a snapshot knows that one's.)
fn sorted(conf: &Conf) -> [BTreeSet<u64>; 4] {
    let ConfState { voters, learners, voters_outgoing, learners_next, .. } = &conf.state;
    [voters, learners, voters_outgoing, learners_next].map(|ids| ids.iter().copied().collect())
}

fn has_value(stored: &[u8], value: &str) -> bool {
    stored.windows(value.len()).any(|window| window == value.as_bytes())
}

/// Holds writes, and what watchers saw, against the history that the members have.
pub(super) fn check(
    tenant: TenantId,
    writes: &[Write],
    watchers: &mut [Watcher],
    members: &[Survivor],
) -> Result<(), Violation> {
    let Some(Survivor { id: first, store, conf }) = members.first() else { return Ok(()) };
    let history = watcher::history(store, tenant);
    for other in &members[1..] {
        let members = (*first, other.id);
        let other_history = watcher::history(&other.store, tenant);
        if other_history != history {
            let differing = (2..).find(|revision| history.get(revision) != other_history.get(revision)).unwrap_or(0);
            return Err(Violation::Differ { members, revision: differing });
        }
        if rest(&other.store, tenant) != rest(store, tenant) {
            return Err(Violation::DifferElsewhere { members });
        }
        if sorted(&other.conf) != sorted(conf) {
            return Err(Violation::DifferInMembers { members, confs: Box::new((conf.clone(), other.conf.clone())) });
        }
    }
    let Some(reader) = store.reader(tenant) else { return Ok(()) };
    let (compacted, last) = (reader.state().compact_revision, reader.revision());
    for (at, watcher) in watchers.iter_mut().enumerate() {
        // Each at another member; those that were compacted away from where they are come back once more.
        let Survivor { id, store, .. } = &members[at % members.len()];
        watcher.drain()?;
        watcher.leave();
        for _ in 0..2 {
            watcher.connect(*id, store, tenant);
            watcher.drain()?;
        }
        watcher.check(&history, compacted, last)?;
    }
    for write in writes {
        let has_it = |changes: &[Bytes]| changes.iter().any(|stored| has_value(stored, &write.value));
        let revisions: Vec<i64> = history.iter().filter(|(_, changes)| has_it(changes)).map(|(at, _)| *at).collect();
        let value = write.value.clone();
        if revisions.len() > 1 {
            return Err(Violation::Twice { value, revisions });
        }
        if let Some(revision) = write.revision {
            // Of what is compacted nobody knows; watchers knew.
            if revision > compacted && revisions != [revision] {
                return Err(Violation::Lost { value, revision });
            }
            if revision <= write.acknowledged_before {
                let acknowledged_before = write.acknowledged_before;
                return Err(Violation::OutOfOrder { value, revision, acknowledged_before });
            }
        }
    }
    Ok(())
}
