//! `/metrics` under etcd's names, for what exists (contract 7).
//!
//! A tenant's scrape shows its own calls, keys and watches. What the member does for all tenants together (raft's log, the
//! disk), and what its process takes, is shown to `default` alone, the tenant of whoever runs the store: a proposal counted there is
//! some tenant's write, a file that is open some tenant's connection.

mod tenants;

use std::fmt::Write as _;
use std::sync::Arc;

use tenure_raft_server::HistogramSnapshot;
use tenure_raft_server::transport::peers::{PeerStats, SnapshotStats};

use crate::cell::{Cell, DEFAULT_TENANT, Tenant};
use crate::rpc_metrics::RpcMetrics;
use crate::service::ETCD_VERSION;

/// The whole answer to one scrape, in Prometheus' text form. No tenant: of a member that has none yet.
pub(crate) fn render(cell: &Cell, tenant: Option<&Tenant>, rpc_metrics: &RpcMetrics) -> String {
    let mut out = String::new();
    of_everybody(&mut out, cell);
    if let Some(tenant) = tenant {
        of_tenant(&mut out, tenant);
        rpc_metrics.render(tenant.id(), &mut out);
    }
    if tenant.is_none_or(|tenant| tenant.name() == DEFAULT_TENANT) {
        of_member(&mut out, cell);
        of_peers(&mut out, cell);
        tenants::render(&mut out, cell, rpc_metrics, tenants::TENANTS_SHOWN_MAX);
        of_process(&mut out);
    }
    out
}

fn metric(out: &mut String, name: &str, kind: &str, value: impl std::fmt::Display) {
    let _ = writeln!(out, "# TYPE {name} {kind}\n{name} {value}");
}

/// What tells a tenant no other's business.
fn of_everybody(out: &mut String, cell: &Cell) {
    let status = cell.raft_status();
    metric(out, "etcd_server_has_leader", "gauge", u8::from(status.leader_id != 0));
    metric(out, "etcd_server_is_leader", "gauge", u8::from(status.is_leader));
    metric(out, "etcd_server_is_learner", "gauge", u8::from(status.is_learner));
    let labelled = [
        ("etcd_server_version", "server_version", ETCD_VERSION.to_string()),
        ("etcd_cluster_version", "cluster_version", "3.7".to_string()),
        ("etcd_server_id", "server_id", format!("{:x}", cell.member_id())),
    ];
    for (name, label, value) in labelled {
        let _ = writeln!(out, "# TYPE {name} gauge\n{name}{{{label}=\"{value}\"}} 1");
    }
}

fn of_tenant(out: &mut String, tenant: &Tenant) {
    let state = tenant.reader().state();
    let (streams, watchers) = tenant.reader().watch_counts();
    metric(out, "etcd_server_quota_backend_bytes", "gauge", tenant.quota_bytes());
    metric(out, "etcd_mvcc_db_total_size_in_bytes", "gauge", state.db_size_bytes());
    metric(out, "etcd_mvcc_db_total_size_in_use_in_bytes", "gauge", state.db_in_use_bytes());
    metric(out, "etcd_debugging_mvcc_current_revision", "gauge", state.revision);
    metric(out, "etcd_debugging_mvcc_compact_revision", "gauge", state.compact_revision);
    metric(out, "etcd_debugging_mvcc_keys_total", "gauge", state.usage.live_keys);
    metric(out, "etcd_debugging_mvcc_watch_stream_total", "gauge", streams);
    metric(out, "etcd_debugging_mvcc_watcher_total", "gauge", watchers);
}

fn of_member(out: &mut String, cell: &Cell) {
    let (status, metrics) = (cell.raft_status(), cell.raft_metrics());
    metric(out, "etcd_server_leader_changes_seen_total", "counter", metrics.leader_changes());
    metric(out, "etcd_server_proposals_committed_total", "gauge", status.commit_index);
    metric(out, "etcd_server_proposals_applied_total", "gauge", status.applied_index);
    metric(out, "etcd_server_proposals_pending", "gauge", metrics.proposals_pending());
    metric(out, "etcd_server_proposals_failed_total", "counter", metrics.proposals_failed());
    metric(out, "etcd_server_slow_apply_total", "counter", metrics.slow_applies());
    metric(out, "etcd_disk_wal_write_bytes_total", "gauge", metrics.wal_write_bytes());
    let heartbeats = cell.peer_stats().iter().map(|(_, stats)| stats.heartbeats_dropped()).sum::<u64>();
    metric(out, "etcd_server_heartbeat_send_failures_total", "counter", heartbeats);
    metric(out, "etcd_server_read_indexes_failed_total", "counter", metrics.reads_failed());
    metric(out, "etcd_server_slow_read_indexes_total", "counter", metrics.read_rounds_repeated());
    metric(out, "etcd_server_snapshot_apply_in_progress_total", "gauge", metrics.snapshots_installing());
    metric(out, "etcd_server_learner_promote_successes", "counter", cell.learners_promoted());
    let _ = writeln!(out, "# TYPE etcd_server_learner_promote_failures counter");
    for (reason, count) in cell.promotions_refused() {
        let _ = writeln!(out, "etcd_server_learner_promote_failures{{Reason=\"{reason}\"}} {count}");
    }
    let disk = cell.disk();
    metric(out, "tenure_disk_free_bytes", "gauge", disk.free_bytes());
    metric(out, "tenure_disk_reserve_bytes", "gauge", disk.reserve_bytes());
    metric(out, "tenure_disk_full", "gauge", u8::from(disk.is_full()));
    histogram(out, "etcd_disk_backend_commit_duration_seconds", &metrics.backend_commit_duration.snapshot());
    histogram(out, "etcd_disk_wal_fsync_duration_seconds", &metrics.wal_fsync_duration.snapshot());
    histogram(out, "etcd_disk_wal_write_duration_seconds", &metrics.wal_write_duration.snapshot());
}

fn histogram(out: &mut String, name: &str, snapshot: &HistogramSnapshot) {
    let _ = writeln!(out, "# TYPE {name} histogram");
    buckets(out, name, "", snapshot);
}

/// `labels` in front of a bucket's own, each with its comma.
fn buckets(out: &mut String, name: &str, labels: &str, snapshot: &HistogramSnapshot) {
    for (bound, count) in &snapshot.buckets {
        let bound = if bound.is_finite() { bound.to_string() } else { "+Inf".to_string() };
        let _ = writeln!(out, "{name}_bucket{{{labels}le=\"{bound}\"}} {count}");
    }
    let alone = labels.trim_end_matches(',');
    let braces = if alone.is_empty() { String::new() } else { format!("{{{alone}}}") };
    let _ = writeln!(out, "{name}_sum{braces} {}\n{name}_count{braces} {}", snapshot.sum_seconds, snapshot.count);
}

/// What is counted of the other members, under etcd's names.
fn of_peers(out: &mut String, cell: &Cell) {
    let peers = cell.peer_stats();
    let own = format!("{:x}", cell.member_id());
    let _ = writeln!(out, "# TYPE etcd_network_known_peers gauge");
    for (id, _) in &peers {
        let _ = writeln!(out, "etcd_network_known_peers{{Local=\"{own}\",Remote=\"{id:x}\"}} 1");
    }
    type Count = (&'static str, fn(&PeerStats) -> u64);
    let counts: [Count; 4] = [
        ("etcd_network_peer_sent_failures_total", PeerStats::sent_failures),
        ("etcd_network_peer_received_failures_total", PeerStats::received_failures),
        ("etcd_network_peer_sent_bytes_total", PeerStats::sent_bytes),
        ("etcd_network_peer_received_bytes_total", PeerStats::received_bytes),
    ];
    for (name, count) in counts {
        let label = if name.contains("received") { "From" } else { "To" };
        let _ = writeln!(out, "# TYPE {name} counter");
        for (id, stats) in &peers {
            let _ = writeln!(out, "{name}{{{label}=\"{id:x}\"}} {}", count(stats));
        }
    }
    snapshots(out, &peers, "send", "To", |stats| &stats.sent_snapshots);
    snapshots(out, &peers, "receive", "From", |stats| &stats.received_snapshots);
    let _ = writeln!(out, "# TYPE etcd_network_active_peers gauge");
    for (id, stats) in &peers {
        let active = u8::from(stats.connected_for().is_some());
        let _ = writeln!(out, "etcd_network_active_peers{{Local=\"{own}\",Remote=\"{id:x}\"}} {active}");
    }
    let _ = writeln!(out, "# TYPE etcd_network_disconnected_peers_total counter");
    for (id, stats) in &peers {
        let times = stats.disconnections();
        let _ = writeln!(out, "etcd_network_disconnected_peers_total{{Local=\"{own}\",Remote=\"{id:x}\"}} {times}");
    }
    const ROUND_TRIP: &str = "etcd_network_peer_round_trip_time_seconds";
    let _ = writeln!(out, "# TYPE {ROUND_TRIP} histogram");
    for (id, stats) in &peers {
        buckets(out, ROUND_TRIP, &format!("To=\"{id:x}\","), &stats.round_trip().snapshot());
    }
}

/// Snapshots in one direction. As in etcd, a peer shows up with its first.
fn snapshots(
    out: &mut String,
    peers: &[(u64, Arc<PeerStats>)],
    direction: &str,
    label: &str,
    of: fn(&PeerStats) -> &SnapshotStats,
) {
    let seen = |stats: &SnapshotStats| stats.succeeded() + stats.failed() > 0 || stats.is_inflight();
    let all: Vec<_> = peers.iter().map(|(id, stats)| (id, of(stats))).filter(|(_, stats)| seen(stats)).collect();
    type Count = (&'static str, &'static str, fn(&SnapshotStats) -> u64);
    let counts: [Count; 3] = [
        ("success", "counter", SnapshotStats::succeeded),
        ("failures", "counter", SnapshotStats::failed),
        ("inflights_total", "gauge", |stats| u64::from(stats.is_inflight())),
    ];
    for (name, kind, count) in counts {
        let _ = writeln!(out, "# TYPE etcd_network_snapshot_{direction}_{name} {kind}");
        for (id, stats) in &all {
            let value = count(stats);
            let _ = writeln!(out, "etcd_network_snapshot_{direction}_{name}{{{label}=\"{id:x}\"}} {value}");
        }
    }
    let name = format!("etcd_network_snapshot_{direction}_total_duration_seconds");
    let _ = writeln!(out, "# TYPE {name} histogram");
    for (id, stats) in &all {
        buckets(out, &name, &format!("{label}=\"{id:x}\","), &stats.duration().snapshot());
    }
}

/// Of this process, from the operating system; what it does not say is left out.
fn of_process(out: &mut String) {
    if let Some(bytes) = resident_bytes() {
        metric(out, "process_resident_memory_bytes", "gauge", bytes);
    }
    if let Ok(files) = std::fs::read_dir("/proc/self/fd") {
        metric(out, "process_open_fds", "gauge", files.count());
    }
    if let Some(files) = rustix::process::getrlimit(rustix::process::Resource::Nofile).current {
        metric(out, "process_max_fds", "gauge", files);
    }
    let used = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    let _ = writeln!(
        out,
        "# TYPE process_cpu_seconds_total counter\nprocess_cpu_seconds_total {}.{:09}",
        used.tv_sec, used.tv_nsec
    );
}

/// Resident memory of this process; `None` where the system does not say.
pub(crate) fn resident_bytes() -> Option<u64> {
    let statm = std::fs::read_to_string("/proc/self/statm").ok()?;
    let pages: u64 = statm.split(' ').nth(1)?.parse().ok()?;
    Some(pages * rustix::param::page_size() as u64)
}
