//! `/metrics` under etcd's names, for what exists (contract 7).
//!
//! A tenant's scrape shows its own calls, keys and watches. What the member does for all tenants together (raft's log, the
//! disk), and what its process takes, is shown to `default` alone, the tenant of whoever runs the store: a proposal counted there is
//! some tenant's write, a file that is open some tenant's connection.

mod tenants;
pub(crate) mod text;

use std::fmt::Write as _;
use std::sync::Arc;

use tenure_raft_server::transport::peers::{PeerStats, SnapshotStats};

use self::text::{buckets, family, histogram, metric};
use crate::cell::{Cell, DEFAULT_TENANT, Tenant};
use crate::rpc_metrics::RpcMetrics;
use crate::service::ETCD_VERSION;
use crate::tls;

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
        of_health(&mut out, rpc_metrics);
        of_peers(&mut out, cell);
        tenants::render(&mut out, cell, rpc_metrics, tenants::TENANTS_SHOWN_MAX);
        of_certificates(&mut out);
        of_process(&mut out);
    }
    out
}

/// What tells a tenant no other's business.
fn of_everybody(out: &mut String, cell: &Cell) {
    let status = cell.raft_status();
    let yes_or_no = [
        ("etcd_server_has_leader", "1 if this member knows who leads, else 0", status.leader_id != 0),
        ("etcd_server_is_leader", "1 if this member leads, else 0", status.is_leader),
        ("etcd_server_is_learner", "1 if this member is a learner, else 0", status.is_learner),
    ];
    for (name, help, value) in yes_or_no {
        metric(out, name, "gauge", help, u8::from(value));
    }
    let labelled = [
        (
            "etcd_server_version",
            "Always 1, labelled with the release of etcd that this member answers as",
            "server_version",
            ETCD_VERSION.to_string(),
        ),
        (
            "etcd_cluster_version",
            "Always 1, labelled with the version of etcd's API that all members speak",
            "cluster_version",
            "3.7".to_string(),
        ),
        (
            "etcd_server_id",
            "Always 1, labelled with this member's id in hexadecimal",
            "server_id",
            format!("{:x}", cell.member_id()),
        ),
    ];
    for (name, help, label, value) in labelled {
        family(out, name, "gauge", help);
        let _ = writeln!(out, "{name}{{{label}=\"{value}\"}} 1");
    }
}

fn of_tenant(out: &mut String, tenant: &Tenant) {
    let state = tenant.reader().state();
    let (streams, watchers) = tenant.reader().watch_counts();
    metric(
        out,
        "etcd_server_quota_backend_bytes",
        "gauge",
        "Bytes that the tenant may store, below 0 if there is no limit",
        tenant.quota_bytes(),
    );
    metric(
        out,
        "etcd_mvcc_db_total_size_in_bytes",
        "gauge",
        "Bytes that the tenant stores, in all versions that are kept",
        state.db_size_bytes(),
    );
    metric(
        out,
        "etcd_mvcc_db_total_size_in_use_in_bytes",
        "gauge",
        "The same: what is compacted counts no more at once, so there is never any room to get back",
        state.db_size_bytes(),
    );
    metric(out, "etcd_debugging_mvcc_current_revision", "gauge", "Newest revision of the tenant", state.revision);
    metric(
        out,
        "etcd_debugging_mvcc_compact_revision",
        "gauge",
        "Revision that the tenant was compacted at, -1 if it never was",
        state.compact_revision,
    );
    metric(out, "etcd_debugging_mvcc_keys_total", "gauge", "Keys that the tenant has now", state.usage.live_keys);
    metric(
        out,
        "etcd_debugging_mvcc_watch_stream_total",
        "gauge",
        "Watch streams that the tenant has open at this member",
        streams,
    );
    metric(out, "etcd_debugging_mvcc_watcher_total", "gauge", "Watchers that the tenant has at this member", watchers);
}

fn of_member(out: &mut String, cell: &Cell) {
    of_log(out, cell);
    of_replication(out, cell);
    of_promotions(out, cell);
    of_rules(out, cell);
    of_disk(out, cell);
}

fn of_health(out: &mut String, rpc_metrics: &RpcMetrics) {
    let (successes, failures) = rpc_metrics.health_answers();
    metric(out, "etcd_server_health_success", "counter", "Times that /health said true", successes);
    metric(out, "etcd_server_health_failures", "counter", "Times that /health said false", failures);
}

fn of_log(out: &mut String, cell: &Cell) {
    let (status, metrics) = (cell.raft_status(), cell.raft_metrics());
    metric(
        out,
        "etcd_server_leader_changes_seen_total",
        "counter",
        "Times that this member found a leader, after another one or after none",
        metrics.leader_changes(),
    );
    metric(
        out,
        "etcd_server_proposals_committed_total",
        "gauge",
        "Index in raft's log up to which this member knows it committed",
        status.commit_index,
    );
    metric(
        out,
        "etcd_server_proposals_applied_total",
        "gauge",
        "Index in raft's log up to which this member has applied it",
        status.applied_index,
    );
    metric(
        out,
        "etcd_server_proposals_pending",
        "gauge",
        "Commands that wait at this member for a batch or for their reply",
        metrics.proposals_pending(),
    );
    metric(
        out,
        "etcd_server_proposals_failed_total",
        "counter",
        "Commands that were refused or dropped, or that nobody waited for any more",
        metrics.proposals_failed(),
    );
    metric(
        out,
        "etcd_server_slow_apply_total",
        "counter",
        "Rounds of entries that took longer to apply than --warning-apply-duration",
        metrics.slow_applies(),
    );
    metric(
        out,
        "etcd_disk_wal_write_bytes_total",
        "gauge",
        "Bytes that this process has written to raft's log",
        metrics.wal_write_bytes(),
    );
}

fn of_replication(out: &mut String, cell: &Cell) {
    let metrics = cell.raft_metrics();
    let failures = |stats: &PeerStats| stats.heartbeats_dropped() + stats.heartbeats_late();
    let heartbeats = cell.peer_stats().iter().map(|(_, stats)| failures(stats)).sum::<u64>();
    metric(
        out,
        "etcd_server_heartbeat_send_failures_total",
        "counter",
        "Heartbeats for other members that were dropped before they were sent, or that came late after the one before",
        heartbeats,
    );
    metric(
        out,
        "etcd_server_read_indexes_failed_total",
        "counter",
        "Linearizable reads that no leader confirmed in time",
        metrics.reads_failed(),
    );
    metric(
        out,
        "etcd_server_slow_read_indexes_total",
        "counter",
        "Read rounds that were asked for again, and ticks at which readers gave up",
        metrics.read_rounds_repeated(),
    );
    metric(
        out,
        "etcd_server_snapshot_apply_in_progress_total",
        "gauge",
        "1 while a snapshot becomes the state of this member, else 0",
        metrics.snapshots_installing(),
    );
}

fn of_promotions(out: &mut String, cell: &Cell) {
    metric(
        out,
        "etcd_server_learner_promote_successes",
        "counter",
        "Learners that got their vote from this member as the leader",
        cell.learners_promoted(),
    );
    const FAILURES: &str = "etcd_server_learner_promote_failures";
    family(out, FAILURES, "counter", "Promotions of learners that this member refused as the leader, by reason");
    for (reason, count) in cell.promotions_refused() {
        let _ = writeln!(out, "{FAILURES}{{Reason=\"{reason}\"}} {count}");
    }
}

fn of_rules(out: &mut String, cell: &Cell) {
    metric(
        out,
        "tenure_cell_rules",
        "gauge",
        "Number of the rules that the cell decides by: the newest that all its members know",
        cell.store().rules().number(),
    );
}

fn of_disk(out: &mut String, cell: &Cell) {
    let (disk, metrics) = (cell.disk(), cell.raft_metrics());
    metric(
        out,
        "tenure_disk_free_bytes",
        "gauge",
        "Bytes that are free on the disk of the data directory",
        disk.free_bytes(),
    );
    metric(
        out,
        "tenure_disk_total_bytes",
        "gauge",
        "Bytes that the disk of the data directory has",
        disk.total_bytes(),
    );
    metric(
        out,
        "tenure_disk_reserve_bytes",
        "gauge",
        "Bytes of the disk that are not given to clients: with fewer free, their writes are refused",
        disk.reserve_bytes(),
    );
    metric(
        out,
        "tenure_disk_full",
        "gauge",
        "1 while this member refuses writes to keep its reserve of the disk, else 0",
        u8::from(disk.is_full()),
    );
    histogram(
        out,
        "etcd_disk_backend_commit_duration_seconds",
        "Seconds that it took to apply a round of entries to the state",
        &metrics.backend_commit_duration.snapshot(),
    );
    histogram(
        out,
        "etcd_disk_wal_fsync_duration_seconds",
        "Seconds that a sync of raft's log to the disk took",
        &metrics.wal_fsync_duration.snapshot(),
    );
    histogram(
        out,
        "etcd_disk_wal_write_duration_seconds",
        "Seconds that a write to raft's log took, without the sync after it",
        &metrics.wal_write_duration.snapshot(),
    );
}

/// What is counted of the other members, under etcd's names.
fn of_peers(out: &mut String, cell: &Cell) {
    let peers = cell.peer_stats();
    let own = format!("{:x}", cell.member_id());
    family(
        out,
        "etcd_network_known_peers",
        "gauge",
        "Always 1, for each member that this one knows, itself among them",
    );
    for id in peers.iter().map(|(id, _)| *id).chain([cell.member_id()]) {
        let _ = writeln!(out, "etcd_network_known_peers{{Local=\"{own}\",Remote=\"{id:x}\"}} 1");
    }
    messages(out, &peers);
    snapshots(out, &peers, "send", "To", |stats| &stats.sent_snapshots);
    snapshots(out, &peers, "receive", "From", |stats| &stats.received_snapshots);
    family(out, "etcd_network_active_peers", "gauge", "1 while this member's streams to the other one are up, else 0");
    for (id, stats) in &peers {
        let active = u8::from(stats.connected_for().is_some());
        let _ = writeln!(out, "etcd_network_active_peers{{Local=\"{own}\",Remote=\"{id:x}\"}} {active}");
    }
    const DISCONNECTED: &str = "etcd_network_disconnected_peers_total";
    family(out, DISCONNECTED, "counter", "Times that this member lost its streams to the other one");
    for (id, stats) in &peers {
        let times = stats.disconnections();
        let _ = writeln!(out, "{DISCONNECTED}{{Local=\"{own}\",Remote=\"{id:x}\"}} {times}");
    }
    const ROUND_TRIP: &str = "etcd_network_peer_round_trip_time_seconds";
    family(out, ROUND_TRIP, "histogram", "Seconds until another member answered a probe of this one");
    for (id, stats) in &peers {
        buckets(out, ROUND_TRIP, &format!("To=\"{id:x}\","), &stats.round_trip().snapshot());
    }
}

/// Raft's messages to other members and from them.
fn messages(out: &mut String, peers: &[(u64, Arc<PeerStats>)]) {
    type Count = (&'static str, &'static str, fn(&PeerStats) -> u64);
    let counts: [Count; 4] = [
        (
            "etcd_network_peer_sent_failures_total",
            "Messages for another member that were dropped, and connections to it that broke",
            PeerStats::sent_failures,
        ),
        (
            "etcd_network_peer_received_failures_total",
            "Streams of another member that broke or held what is no message",
            PeerStats::received_failures,
        ),
        (
            "etcd_network_peer_sent_bytes_total",
            "Bytes of raft's messages sent to another member, without snapshots",
            PeerStats::sent_bytes,
        ),
        (
            "etcd_network_peer_received_bytes_total",
            "Bytes of raft's messages that came from another member, without snapshots",
            PeerStats::received_bytes,
        ),
    ];
    for (name, help, count) in counts {
        let label = if name.contains("received") { "From" } else { "To" };
        family(out, name, "counter", help);
        for (id, stats) in peers {
            let _ = writeln!(out, "{name}{{{label}=\"{id:x}\"}} {}", count(stats));
        }
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
    type Count = (&'static str, &'static str, &'static str, fn(&SnapshotStats) -> u64);
    let counts: [Count; 3] = [
        ("success", "counter", "Snapshots that got across, by the other member", SnapshotStats::succeeded),
        ("failures", "counter", "Snapshots that did not get across, by the other member", SnapshotStats::failed),
        ("inflights_total", "gauge", "Snapshots on their way now, by the other member", |stats| {
            u64::from(stats.is_inflight())
        }),
    ];
    for (name, kind, help, count) in counts {
        let name = format!("etcd_network_snapshot_{direction}_{name}");
        family(out, &name, kind, help);
        for (id, stats) in &all {
            let _ = writeln!(out, "{name}{{{label}=\"{id:x}\"}} {}", count(stats));
        }
    }
    let name = format!("etcd_network_snapshot_{direction}_total_duration_seconds");
    let help = "Seconds that snapshots took to get across or to fail, by the other member";
    family(out, &name, "histogram", help);
    for (id, stats) in &all {
        buckets(out, &name, &format!("{label}=\"{id:x}\","), &stats.duration().snapshot());
    }
}

/// Those that members and clients are shown or judged by: when one ends, nobody gets in any more.
fn of_certificates(out: &mut String) {
    const NAME: &str = "tenure_certificate_not_after_seconds";
    let help = "When the first certificate in a file that this process uses ends, in seconds since 1970; 0 if it cannot be read";
    family(out, NAME, "gauge", help);
    for (path, not_after) in tls::not_after_seconds() {
        let file = path.display().to_string().replace('\\', r"\\").replace('"', "\\\"").replace('\n', r"\n");
        let _ = writeln!(out, "{NAME}{{file=\"{file}\"}} {}", not_after.unwrap_or(0));
    }
}

/// Of this process, from the operating system; what it does not say is left out.
fn of_process(out: &mut String) {
    if let Some(bytes) = memory_bytes(RESIDENT) {
        metric(out, "process_resident_memory_bytes", "gauge", "Bytes of memory that this process holds", bytes);
    }
    if let Some(bytes) = memory_bytes(VIRTUAL) {
        let help = "Bytes of addresses that this process has mapped";
        metric(out, "process_virtual_memory_bytes", "gauge", help, bytes);
    }
    if let Some(seconds) = started_at_seconds() {
        let help = "When this process started, in seconds since 1970";
        metric(out, "process_start_time_seconds", "gauge", help, seconds);
    }
    if let Ok(files) = std::fs::read_dir("/proc/self/fd") {
        let files = files.count();
        for name in ["process_open_fds", "os_fd_used"] {
            metric(out, name, "gauge", "Files and sockets that this process has open", files);
        }
    }
    if let Some(files) = rustix::process::getrlimit(rustix::process::Resource::Nofile).current {
        for name in ["process_max_fds", "os_fd_limit"] {
            metric(out, name, "gauge", "Files and sockets that this process may have open", files);
        }
    }
    let used = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    metric(
        out,
        "process_cpu_seconds_total",
        "counter",
        "Seconds of processor time that this process has taken",
        format_args!("{}.{:09}", used.tv_sec, used.tv_nsec),
    );
}

/// Resident memory of this process; `None` where the system does not say.
pub(crate) fn resident_bytes() -> Option<u64> {
    memory_bytes(RESIDENT)
}

/// Places in `/proc/self/statm`.
const VIRTUAL: usize = 0;
const RESIDENT: usize = 1;

fn memory_bytes(place: usize) -> Option<u64> {
    let statm = std::fs::read_to_string("/proc/self/statm").ok()?;
    let pages: u64 = statm.split(' ').nth(place)?.parse().ok()?;
    Some(pages * rustix::param::page_size() as u64)
}

/// The system counts from its own start.
fn started_at_seconds() -> Option<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    // The name in parentheses may hold anything; what follows it is the third field, and the start is the 22nd.
    let ticks: u64 = stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()?;
    let system = std::fs::read_to_string("/proc/stat").ok()?;
    let booted: u64 = system.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse().ok()?;
    Some(booted as f64 + ticks as f64 / rustix::param::clock_ticks_per_second() as f64)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::service::testing::TestCell;

    /// The families of an answer. Each has one head, its help and then its kind, and after it its own samples and no others.
    fn families(text: &str) -> BTreeSet<&str> {
        let (mut all, mut family) = (BTreeSet::new(), "");
        let mut lines = text.lines();
        while let Some(line) = lines.next() {
            if let Some(head) = line.strip_prefix("# HELP ") {
                let (name, help) = head.split_once(' ').unwrap();
                assert!(!help.is_empty() && help == help.trim() && !help.contains('\\'), "{line}");
                let kind = lines.next().and_then(|line| line.strip_prefix("# TYPE ")?.strip_prefix(name));
                assert!(matches!(kind, Some(" counter" | " gauge" | " histogram")), "{kind:?} after {line}");
                assert!(all.insert(name), "twice: {name}");
                family = name;
            } else {
                let name = line.split(['{', ' ']).next().unwrap();
                let part = name.strip_prefix(family);
                assert!(matches!(part, Some("" | "_bucket" | "_sum" | "_count")), "none of {family:?}: {line}");
            }
        }
        all
    }

    // What a metric means is asked where it is queried, and a head that is not whole or comes twice may cost the whole scrape.
    #[tokio::test]
    async fn every_family_says_what_it_is() {
        let test = TestCell::open().await;
        let (cell, rpc_metrics) = (test.context().cell, RpcMetrics::default());
        cell.peers().set_members(&[(7, vec!["http://127.0.0.1:1".to_string()])]);
        let [default, other] = [DEFAULT_TENANT, "other"].map(|name| test.tenant(name));
        drop(rpc_metrics.begin(default.id(), "/etcdserverpb.KV/Put"));

        let text = render(&cell, Some(&default), &rpc_metrics);
        let all = families(&text);
        let of_each_part = [
            "etcd_server_id",
            "etcd_debugging_mvcc_keys_total",
            "grpc_server_handled_total",
            "etcd_disk_wal_fsync_duration_seconds",
            "etcd_network_snapshot_receive_total_duration_seconds",
            "tenure_tenant_request_duration_seconds",
            "process_cpu_seconds_total",
            "process_start_time_seconds",
        ];
        for name in of_each_part {
            assert!(all.contains(name), "{name}");
        }
        for sample in
            ["etcd_network_peer_round_trip_time_seconds_count{To=\"7\"}", "tenure_tenant_keys{tenant=\"other\"}"]
        {
            assert!(text.contains(sample), "{sample}");
        }
        for tenant in [None, Some(&other)] {
            let some = render(&cell, tenant, &rpc_metrics);
            assert!(families(&some).is_subset(&all), "{some}");
        }
    }

    // Nobody gets in with a certificate that has ended, and the log says so only then.
    #[test]
    fn certificates_in_use_say_when_they_end() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str| dir.path().join(name);
        let certificate = |year: i32| {
            let key = rcgen::KeyPair::generate().unwrap();
            let mut params = rcgen::CertificateParams::new(vec!["localhost".to_string()]).unwrap();
            params.not_after = rcgen::date_time_ymd(year, 1, 1);
            (params.self_signed(&key).unwrap().pem(), key.serialize_pem())
        };
        let (server, key) = certificate(2031);
        std::fs::write(file("server.crt"), server).unwrap();
        std::fs::write(file("server.key"), key).unwrap();
        // An old CA and the one that takes its place.
        std::fs::write(file("ca \".crt"), certificate(2033).0 + &certificate(2032).0).unwrap();
        let said = || {
            let mut out = String::new();
            of_certificates(&mut out);
            let here = dir.path().display().to_string();
            out.lines().filter_map(|line| line.split_once(&here)).map(|(_, rest)| rest.to_string()).collect::<Vec<_>>()
        };
        let files = || crate::flags::TlsFiles::Files {
            cert_file: file("server.crt"),
            key_file: file("server.key"),
            trusted_ca_file: Some(file("ca \".crt")),
        };
        let listen = || tls::Tls::new(files(), Default::default(), &[], None).unwrap();
        let (one, another) = (listen(), listen());
        let both = ["/ca \\\".crt\"} 1956528000", "/server.crt\"} 1924992000"];
        assert_eq!(said(), both);
        drop(one);
        assert_eq!(said(), both, "one of two listeners is left");
        std::fs::write(file("server.crt"), "nonsense").unwrap();
        assert_eq!(said()[1], "/server.crt\"} 0");
        drop(another);
        assert!(said().is_empty());
    }
}
