//! Counters of a member, cheap enough to be always on: relaxed atomics, no names, no registry. The layer above exports
//! them under etcd's names, given in the docs.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Buckets of a disk histogram: etcd's `ExponentialBuckets(0.001, 2, 14)`, and one for everything beyond.
const BUCKETS: usize = 14;

/// Durations in fixed buckets with upper bounds of 1 ms · 2^i, i in 0..14, then infinity.
#[derive(Debug, Default)]
pub struct DurationHistogram {
    counts: [AtomicU64; BUCKETS + 1],
    sum_ns: AtomicU64,
}

/// A histogram as it is exported.
#[derive(Clone, Debug, PartialEq)]
pub struct HistogramSnapshot {
    /// Upper bound in seconds and the number of observations at or below it, as Prometheus counts: cumulative. The
    /// last bound is infinity.
    pub buckets: Vec<(f64, u64)>,
    pub sum_seconds: f64,
    pub count: u64,
}

impl DurationHistogram {
    pub(crate) fn observe(&self, duration: Duration) {
        let bucket = (0..BUCKETS).find(|&i| duration <= bound(i)).unwrap_or(BUCKETS);
        self.counts[bucket].fetch_add(1, Ordering::Relaxed);
        let nanoseconds = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        self.sum_ns.fetch_add(nanoseconds, Ordering::Relaxed);
    }

    /// Not one point in time: an observation made meanwhile may be in the count and not in the sum.
    pub fn snapshot(&self) -> HistogramSnapshot {
        let mut count = 0;
        let bounds = (0..BUCKETS).map(|i| bound(i).as_secs_f64()).chain([f64::INFINITY]);
        let cumulative = |(bound, bucket): (f64, &AtomicU64)| {
            count += bucket.load(Ordering::Relaxed);
            (bound, count)
        };
        let buckets = bounds.zip(&self.counts).map(cumulative).collect();
        let sum_seconds = Duration::from_nanos(self.sum_ns.load(Ordering::Relaxed)).as_secs_f64();
        HistogramSnapshot { buckets, sum_seconds, count }
    }
}

fn bound(bucket: usize) -> Duration {
    Duration::from_millis(1 << bucket)
}

/// What a member counts. All grow only, but for `proposals_pending`.
#[derive(Debug, Default)]
pub struct Metrics {
    /// `etcd_disk_wal_fsync_duration_seconds`.
    pub wal_fsync_duration: DurationHistogram,
    /// `etcd_disk_wal_write_duration_seconds`: the write before the sync.
    pub wal_write_duration: DurationHistogram,
    pub(crate) wal_write_bytes: AtomicU64,
    pub(crate) proposals_pending: AtomicU64,
    pub(crate) proposals_failed: AtomicU64,
    pub(crate) leader_changes: AtomicU64,
    pub(crate) messages_dropped: AtomicU64,
}

impl Metrics {
    /// `etcd_disk_wal_write_bytes_total`.
    pub fn wal_write_bytes(&self) -> u64 {
        self.wal_write_bytes.load(Ordering::Relaxed)
    }

    /// `etcd_server_proposals_pending`: commands waiting for a batch or for their reply. (`…_committed_total` and
    /// `…_applied_total` are the status's `commit_index` and `applied_index`, as in etcd.)
    pub fn proposals_pending(&self) -> u64 {
        self.proposals_pending.load(Ordering::Relaxed)
    }

    /// `etcd_server_proposals_failed_total`: commands that were refused or dropped.
    pub fn proposals_failed(&self) -> u64 {
        self.proposals_failed.load(Ordering::Relaxed)
    }

    /// `etcd_server_leader_changes_seen_total`.
    pub fn leader_changes(&self) -> u64 {
        self.leader_changes.load(Ordering::Relaxed)
    }

    /// Messages from peers dropped at a full queue.
    pub fn messages_dropped(&self) -> u64 {
        self.messages_dropped.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn histogram_counts_like_prometheus() {
        let histogram = DurationHistogram::default();
        for milliseconds in [0, 1, 2, 3, 100_000] {
            histogram.observe(Duration::from_millis(milliseconds));
        }
        let snapshot = histogram.snapshot();
        assert_eq!(snapshot.buckets.len(), 15);
        assert_eq!(snapshot.buckets[..4], [(0.001, 2), (0.002, 3), (0.004, 4), (0.008, 4)]);
        assert_eq!(snapshot.buckets[13], (8.192, 4));
        assert_eq!(snapshot.buckets[14], (f64::INFINITY, 5));
        assert_eq!((snapshot.count, snapshot.sum_seconds), (5, 100.006));
    }
}
