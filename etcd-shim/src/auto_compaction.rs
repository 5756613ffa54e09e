//! `--auto-compaction-mode` and `--auto-compaction-retention`: old revisions go without anybody's asking.
//!
//! As etcd does it, for each tenant: `periodic` looks at the revisions ten times an hour, or ten times in the retention if that is shorter,
//! and compacts to what was the revision a retention ago, once an hour or once a retention; `revision` compacts every five minutes and
//! leaves so many revisions. A kube-apiserver compacts its own etcd and needs none of this.
//!
//! Every member looks, so that whoever leads next knows the past; the leader alone proposes, one tenant after the other. What
//! is kept of a tenant is bounded by the looks of a retention; of one that has nothing to compact, nothing is kept.
//!
//! The clock decides here what is proposed, never what is applied.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use tenure_storage::{TenantId, TenantState};

/// What is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AutoCompaction {
    /// The revisions of so long; more than zero.
    Periodic(Duration),
    /// So many revisions; more than zero.
    Revisions(i64),
}

/// Looks between two compactions.
const LOOKS: u32 = 10;

/// Between two compactions of a retention that is longer.
const PERIOD_MAX: Duration = Duration::from_secs(60 * 60);

/// Between two looks at how many revisions there are.
const REVISIONS_PERIOD: Duration = Duration::from_secs(5 * 60);

/// One tenant at a look.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Seen {
    pub(crate) tenant: TenantId,
    pub(crate) revision: i64,
    pub(crate) compact_revision: i64,
}

impl Seen {
    pub(crate) fn of(tenant: TenantId, state: &TenantState) -> Self {
        Seen { tenant, revision: state.revision, compact_revision: state.compact_revision }
    }
}

/// Decides what is due.
pub(crate) struct AutoCompactor {
    kept: AutoCompaction,
    looks: u64,
    /// Of tenants with revisions to compact.
    pasts: BTreeMap<TenantId, Past>,
}

#[derive(Debug, Default)]
struct Past {
    /// What it was at, and from which look on; the oldest that counts first.
    revisions: VecDeque<(u64, i64)>,
    /// The look at which it was last compacted.
    compacted: Option<u64>,
}

impl AutoCompactor {
    pub(crate) fn new(kept: AutoCompaction) -> Self {
        AutoCompactor { kept, looks: 0, pasts: BTreeMap::new() }
    }

    /// Between two looks.
    pub(crate) fn period(&self) -> Duration {
        match self.kept {
            AutoCompaction::Periodic(retention) => (retention.min(PERIOD_MAX) / LOOKS).max(Duration::from_millis(1)),
            AutoCompaction::Revisions(_) => REVISIONS_PERIOD,
        }
    }

    /// Looks at all tenants. Answers to which revisions to compact now.
    pub(crate) fn look(&mut self, tenants: impl IntoIterator<Item = Seen>) -> Vec<(TenantId, i64)> {
        match self.kept {
            AutoCompaction::Periodic(retention) => self.look_at_pasts(retention, tenants),
            AutoCompaction::Revisions(left) => {
                let due = tenants.into_iter().filter_map(|seen| {
                    let revision = seen.revision - left;
                    (revision > seen.compact_revision.max(0)).then_some((seen.tenant, revision))
                });
                due.collect()
            }
        }
    }

    /// A tenant was compacted as the last look said. One that could not be is due again at the next.
    pub(crate) fn compacted(&mut self, tenant: TenantId) {
        if let Some(past) = self.pasts.get_mut(&tenant) {
            past.compacted = Some(self.looks - 1);
        }
    }

    fn look_at_pasts(&mut self, retention: Duration, tenants: impl IntoIterator<Item = Seen>) -> Vec<(TenantId, i64)> {
        let looks_kept = u64::try_from(retention.as_nanos().div_ceil(self.period().as_nanos())).unwrap_or(u64::MAX);
        let look = self.looks;
        self.looks += 1;
        let mut pasts = std::mem::take(&mut self.pasts);
        let mut due = Vec::new();
        for Seen { tenant, revision, compact_revision } in tenants {
            if revision <= compact_revision {
                continue;
            }
            let mut past = pasts.remove(&tenant).unwrap_or_default();
            let revisions = &mut past.revisions;
            if revisions.back().is_none_or(|(_, last)| *last != revision) {
                revisions.push_back((look, revision));
            }
            // The last one that it was at for as long as that.
            while revisions.get(1).is_some_and(|(since, _)| since + looks_kept <= look) {
                revisions.pop_front();
            }
            let is_time = past.compacted.is_none_or(|compacted| look - compacted >= u64::from(LOOKS));
            if is_time
                && let Some((since, revision)) = past.revisions.front()
                && since + looks_kept <= look
                && *revision > compact_revision
            {
                due.push((tenant, *revision));
            }
            self.pasts.insert(tenant, past);
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3_600);

    fn seen(tenant: u32, revision: i64, compact_revision: i64) -> Seen {
        Seen { tenant: TenantId(tenant), revision, compact_revision }
    }

    /// Revision by look, and what is compacted to at which look: what was written within the retention must stay, as with etcd.
    #[test]
    fn a_retention_is_kept_whole() {
        let mut compactor = AutoCompactor::new(AutoCompaction::Periodic(2 * HOUR));
        assert_eq!(compactor.period(), HOUR / 10);
        let mut done = Vec::new();
        let mut compact_revision = -1;
        for look in 0..50 {
            for (tenant, revision) in compactor.look([seen(1, 100 + look, compact_revision)]) {
                assert_eq!(tenant, TenantId(1));
                done.push((look, revision));
                // Nobody leads at the thirtieth.
                if look != 30 {
                    compactor.compacted(tenant);
                    compact_revision = revision;
                }
            }
        }
        assert_eq!(done, [(20, 100), (30, 110), (31, 111), (41, 121)]);
    }

    /// Ten thousand tenants that nobody writes to must cost nothing, and a new one gets its whole time.
    #[test]
    fn who_does_nothing_is_not_kept() {
        let mut compactor = AutoCompactor::new(AutoCompaction::Periodic(HOUR));
        for _ in 0..10 {
            assert_eq!(compactor.look([seen(1, 7, 7), seen(2, 9, 3)]), []);
        }
        assert_eq!(compactor.pasts.values().map(|past| past.revisions.len()).sum::<usize>(), 1);
        assert_eq!(compactor.look([seen(1, 7, 7), seen(2, 9, 3), seen(3, 5, -1)]), [(TenantId(2), 9)]);
        compactor.compacted(TenantId(2));
        for _ in 0..9 {
            assert_eq!(compactor.look([seen(2, 9, 9), seen(3, 5, -1)]), []);
        }
        assert_eq!(compactor.look([seen(2, 9, 9), seen(3, 5, -1)]), [(TenantId(3), 5)]);
        assert_eq!(compactor.look([seen(2, 9, 9), seen(3, 5, 5)]), []);
        assert!(compactor.pasts.is_empty());
    }

    #[test]
    fn so_many_revisions_stay() {
        let mut compactor = AutoCompactor::new(AutoCompaction::Revisions(10));
        assert_eq!(compactor.period(), Duration::from_secs(300));
        let tenants = [seen(1, 10, -1), seen(2, 11, -1), seen(3, 30, 20), seen(4, 31, 20)];
        assert_eq!(compactor.look(tenants), [(TenantId(2), 1), (TenantId(4), 21)]);
    }
}
