//! Counters of a member, cheap enough to be always on: relaxed atomics, no names, no registry. The layer above exports
//! them under etcd's names, given in the docs.

use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

/// Durations in `N` fixed buckets with upper bounds of `FIRST_US` µs · 2^i, then infinity.
#[derive(Debug)]
pub struct Histogram<const FIRST_US: u64, const N: usize> {
    counts: [AtomicU64; N],
    beyond: AtomicU64,
    sum_ns: AtomicU64,
}

/// Of the disk: etcd's `ExponentialBuckets(0.001, 2, 14)`.
pub type DurationHistogram = Histogram<1000, 14>;

/// Of the way to other members: etcd's `ExponentialBuckets(0.0001, 2, 16)`.
pub type RoundTripHistogram = Histogram<100, 16>;

/// Of snapshots on their way: etcd's `ExponentialBuckets(0.1, 2, 10)`.
pub type SnapshotHistogram = Histogram<100_000, 10>;

impl<const FIRST_US: u64, const N: usize> Default for Histogram<FIRST_US, N> {
    fn default() -> Self {
        let counts = std::array::from_fn(|_| AtomicU64::new(0));
        Histogram { counts, beyond: AtomicU64::new(0), sum_ns: AtomicU64::new(0) }
    }
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

impl<const FIRST_US: u64, const N: usize> Histogram<FIRST_US, N> {
    /// Counts one.
    pub fn observe(&self, duration: Duration) {
        let bucket = (0..N).find(|&i| duration <= bound(FIRST_US, i)).and_then(|i| self.counts.get(i));
        bucket.unwrap_or(&self.beyond).fetch_add(1, Ordering::Relaxed);
        let nanoseconds = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        self.sum_ns.fetch_add(nanoseconds, Ordering::Relaxed);
    }

    /// Not one point in time: an observation made meanwhile may be in the count and not in the sum.
    pub fn snapshot(&self) -> HistogramSnapshot {
        let mut count = 0;
        // As etcd multiplies: so that they print alike.
        let bounds = (0..N).map(|i| FIRST_US as f64 / 1e6 * (1_u64 << i) as f64).chain([f64::INFINITY]);
        let cumulative = |(bound, bucket): (f64, &AtomicU64)| {
            count += bucket.load(Ordering::Relaxed);
            (bound, count)
        };
        let buckets = bounds.zip(self.counts.iter().chain([&self.beyond])).map(cumulative).collect();
        let sum_seconds = Duration::from_nanos(self.sum_ns.load(Ordering::Relaxed)).as_secs_f64();
        HistogramSnapshot { buckets, sum_seconds, count }
    }
}

fn bound(first_us: u64, bucket: usize) -> Duration {
    Duration::from_micros(first_us << bucket)
}

/// What a member counts. All grow only, but for `proposals_pending`.
#[derive(Debug, Default)]
pub struct Metrics {
    /// `etcd_disk_wal_fsync_duration_seconds`.
    pub wal_fsync_duration: DurationHistogram,
    /// `etcd_disk_wal_write_duration_seconds`: the write before the sync.
    pub wal_write_duration: DurationHistogram,
    /// `etcd_disk_backend_commit_duration_seconds`: applying a round of entries to the state.
    pub backend_commit_duration: DurationHistogram,
    pub(crate) wal_write_bytes: AtomicU64,
    /// For a moment it may be below zero, see `complete` and `Pending`.
    pub(crate) proposals_pending: AtomicI64,
    pub(crate) proposals_failed: AtomicU64,
    pub(crate) slow_applies: AtomicU64,
    pub(crate) leader_changes: AtomicU64,
    pub(crate) messages_dropped: AtomicU64,
    pub(crate) reads_failed: AtomicU64,
    pub(crate) read_rounds_repeated: AtomicU64,
    pub(crate) snapshots_installing: AtomicU64,
}

impl Metrics {
    /// `etcd_disk_wal_write_bytes_total`.
    pub fn wal_write_bytes(&self) -> u64 {
        self.wal_write_bytes.load(Ordering::Relaxed)
    }

    /// `etcd_server_proposals_pending`: commands waiting for a batch or for their reply. (`…_committed_total` and
    /// `…_applied_total` are the status's `commit_index` and `applied_index`, as in etcd.)
    pub fn proposals_pending(&self) -> u64 {
        u64::try_from(self.proposals_pending.load(Ordering::Relaxed)).unwrap_or(0)
    }

    /// `etcd_server_proposals_failed_total`: commands that were refused or dropped, or that nobody waited for any more.
    pub fn proposals_failed(&self) -> u64 {
        self.proposals_failed.load(Ordering::Relaxed)
    }

    /// A command that was pending ends without an answer that anybody hears.
    pub(crate) fn count_unanswered(&self) {
        self.proposals_pending.fetch_sub(1, Ordering::Relaxed);
        self.proposals_failed.fetch_add(1, Ordering::Relaxed);
    }

    /// `etcd_server_slow_apply_total`: rounds of entries that took longer to apply than `slow_apply`.
    pub fn slow_applies(&self) -> u64 {
        self.slow_applies.load(Ordering::Relaxed)
    }

    /// `etcd_server_leader_changes_seen_total`.
    pub fn leader_changes(&self) -> u64 {
        self.leader_changes.load(Ordering::Relaxed)
    }

    /// `etcd_server_read_indexes_failed_total`: linearizable reads that no leader confirmed in time.
    pub fn reads_failed(&self) -> u64 {
        self.reads_failed.load(Ordering::Relaxed)
    }

    /// `etcd_server_slow_read_indexes_total`: read rounds that were asked for again, and ticks at which readers gave up.
    pub fn read_rounds_repeated(&self) -> u64 {
        self.read_rounds_repeated.load(Ordering::Relaxed)
    }

    /// `etcd_server_snapshot_apply_in_progress_total`: 1 while a snapshot becomes the state.
    pub fn snapshots_installing(&self) -> u64 {
        self.snapshots_installing.load(Ordering::Relaxed)
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
