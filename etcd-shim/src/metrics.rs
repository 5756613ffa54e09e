//! `/metrics` under etcd's names, for what exists (contract 7).
//!
//! A tenant's scrape shows its own calls, keys and watches. What the member does for all tenants together (raft's log, the
//! disk) is shown to `default` alone, the tenant of whoever runs the store: a proposal counted there is some tenant's write.

use std::fmt::Write as _;

use tenure_raft_server::HistogramSnapshot;

use crate::cell::{Cell, DEFAULT_TENANT, Tenant};
use crate::rpc_metrics::RpcMetrics;
use crate::service::ETCD_VERSION;

/// The whole answer to one scrape, in Prometheus' text form.
pub(crate) fn render(cell: &Cell, tenant: &Tenant, rpc_metrics: &RpcMetrics) -> String {
    let mut out = String::new();
    of_tenant(&mut out, cell, tenant);
    rpc_metrics.render(tenant.id(), &mut out);
    if tenant.name() == DEFAULT_TENANT {
        of_member(&mut out, cell);
    }
    of_process(&mut out);
    out
}

fn metric(out: &mut String, name: &str, kind: &str, value: impl std::fmt::Display) {
    let _ = writeln!(out, "# TYPE {name} {kind}\n{name} {value}");
}

fn of_tenant(out: &mut String, cell: &Cell, tenant: &Tenant) {
    let state = tenant.reader().state();
    let (streams, watchers) = tenant.reader().watch_counts();
    metric(out, "etcd_server_has_leader", "gauge", u8::from(cell.leader_id() != 0));
    metric(out, "etcd_server_is_leader", "gauge", u8::from(cell.raft_status().is_leader));
    metric(out, "etcd_server_is_learner", "gauge", 0);
    metric(out, "etcd_server_quota_backend_bytes", "gauge", tenant.quota_bytes());
    metric(out, "etcd_mvcc_db_total_size_in_bytes", "gauge", state.db_size_bytes());
    metric(out, "etcd_mvcc_db_total_size_in_use_in_bytes", "gauge", state.db_in_use_bytes());
    metric(out, "etcd_debugging_mvcc_current_revision", "gauge", state.revision);
    metric(out, "etcd_debugging_mvcc_compact_revision", "gauge", state.compact_revision);
    metric(out, "etcd_debugging_mvcc_keys_total", "gauge", state.usage.live_keys);
    metric(out, "etcd_debugging_mvcc_watch_stream_total", "gauge", streams);
    metric(out, "etcd_debugging_mvcc_watcher_total", "gauge", watchers);
    let labelled = [
        ("etcd_server_version", "server_version", ETCD_VERSION.to_string()),
        ("etcd_cluster_version", "cluster_version", "3.7".to_string()),
        ("etcd_server_id", "server_id", format!("{:x}", tenant.member_id())),
    ];
    for (name, label, value) in labelled {
        let _ = writeln!(out, "# TYPE {name} gauge\n{name}{{{label}=\"{value}\"}} 1");
    }
}

fn of_member(out: &mut String, cell: &Cell) {
    let (status, metrics) = (cell.raft_status(), cell.raft_metrics());
    metric(out, "etcd_server_leader_changes_seen_total", "counter", metrics.leader_changes());
    metric(out, "etcd_server_proposals_committed_total", "gauge", status.commit_index);
    metric(out, "etcd_server_proposals_applied_total", "gauge", status.applied_index);
    metric(out, "etcd_server_proposals_pending", "gauge", metrics.proposals_pending());
    metric(out, "etcd_server_proposals_failed_total", "counter", metrics.proposals_failed());
    metric(out, "etcd_disk_wal_write_bytes_total", "gauge", metrics.wal_write_bytes());
    histogram(out, "etcd_disk_wal_fsync_duration_seconds", &metrics.wal_fsync_duration.snapshot());
    histogram(out, "etcd_disk_wal_write_duration_seconds", &metrics.wal_write_duration.snapshot());
}

fn histogram(out: &mut String, name: &str, snapshot: &HistogramSnapshot) {
    let _ = writeln!(out, "# TYPE {name} histogram");
    for (bound, count) in &snapshot.buckets {
        let bound = if bound.is_finite() { bound.to_string() } else { "+Inf".to_string() };
        let _ = writeln!(out, "{name}_bucket{{le=\"{bound}\"}} {count}");
    }
    let _ = writeln!(out, "{name}_sum {}\n{name}_count {}", snapshot.sum_seconds, snapshot.count);
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
