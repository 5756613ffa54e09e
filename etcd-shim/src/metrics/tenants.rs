//! `tenure_tenant_*`: what each tenant stores and does, for whoever runs the cell.
//!
//! At most [`TENANTS_SHOWN_MAX`] tenants have series of their own, those that are there longest, so that a series does not come and
//! go; the rest is summed up as "other", without what cannot be summed (revisions). What concerns calls is of this member alone.
//!
//! A counter never goes back, or Prometheus takes it for that of a new process and counts all of it again. So "other" keeps what tenants
//! have counted that are deleted, or that have series of their own since one before them was deleted.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use tenure_raft_server::HistogramSnapshot;
use tenure_storage::{AlarmKind, TenantId, TenantPhase};

use super::text::{buckets, family};
use crate::cell::{Cell, Tenant};
use crate::rpc_metrics::{RpcMetrics, TenantTraffic};
use crate::throttle::{Reason, TenantUse};

/// Tenants with series of their own.
pub(crate) const TENANTS_SHOWN_MAX: usize = 500;

/// What the others are called. A tenant of that name is one of them.
const OTHER: &str = "other";

/// What only grows.
#[derive(Clone, Default)]
struct Counters {
    requests: BTreeMap<(&'static str, &'static str), u64>,
    latency: Option<HistogramSnapshot>,
    received_bytes: u64,
    sent_bytes: u64,
    held_back: [u64; Reason::ALL.len()],
}

impl Counters {
    fn of(traffic: TenantTraffic) -> Self {
        let mut held_back = [0; Reason::ALL.len()];
        for (sum, (_, times)) in held_back.iter_mut().zip(traffic.used.held_back()) {
            *sum = times;
        }
        Counters {
            requests: traffic.handled.into_iter().map(|(method, code, times)| ((method, code), times)).collect(),
            latency: Some(traffic.latency),
            received_bytes: traffic.received_bytes,
            sent_bytes: traffic.sent_bytes,
            held_back,
        }
    }

    fn add(&mut self, other: &Counters) {
        self.received_bytes += other.received_bytes;
        self.sent_bytes += other.sent_bytes;
        for (sum, times) in self.held_back.iter_mut().zip(other.held_back) {
            *sum += times;
        }
        for (call, times) in &other.requests {
            *self.requests.entry(*call).or_default() += times;
        }
        match (&mut self.latency, &other.latency) {
            (_, None) => {}
            (sum @ None, Some(latency)) => *sum = Some(latency.clone()),
            (Some(sum), Some(latency)) => {
                for ((_, sum), (_, count)) in sum.buckets.iter_mut().zip(&latency.buckets) {
                    *sum += count;
                }
                sum.count += latency.count;
                sum.sum_seconds += latency.sum_seconds;
            }
        }
    }
}

/// What "other" has counted. A tenant is among the others from its first scrape on, and once it has left them it does not come back.
#[derive(Default)]
struct Others {
    /// By those that have left, as of the last scrape before.
    left: Option<Counters>,
    now: BTreeMap<TenantId, Counters>,
}

impl Others {
    /// The sum, with these as the others from now on. `None`: there never was one.
    fn sum(&mut self, now: BTreeMap<TenantId, Counters>) -> Option<Counters> {
        for (tenant, counters) in std::mem::replace(&mut self.now, now) {
            if !self.now.contains_key(&tenant) {
                self.left.get_or_insert_default().add(&counters);
            }
        }
        let mut sum = self.left.clone();
        self.now.values().for_each(|counters| sum.get_or_insert_default().add(counters));
        sum
    }
}

/// One for each set of counters that this process has: what nobody's calls are counted in tells them apart, and lives as long.
static OTHERS: Mutex<Vec<(Weak<TenantUse>, Others)>> = Mutex::new(Vec::new());

/// See [`Others::sum`].
fn sum_of_others(rpc_metrics: &RpcMetrics, now: BTreeMap<TenantId, Counters>) -> Option<Counters> {
    let of = Arc::downgrade(&rpc_metrics.used(TenantId(0)));
    let mut all = OTHERS.lock();
    all.retain(|(of, _)| of.strong_count() > 0);
    let at = all.iter().position(|(known, _)| known.ptr_eq(&of)).unwrap_or_else(|| {
        all.push((of, Others::default()));
        all.len() - 1
    });
    all[at].1.sum(now)
}

/// One line of the answer each; sums, for "other".
#[derive(Default)]
struct Shown {
    counters: Counters,
    stored_bytes: u64,
    live_bytes: u64,
    quota_bytes: u64,
    keys: u64,
    watchers: u64,
    connections: u64,
    alarms: BTreeMap<&'static str, u64>,
    /// Revision and compact revision.
    revisions: Option<(i64, i64)>,
}

impl Shown {
    /// Adds what a tenant is now, and gives what it has counted.
    fn add(&mut self, tenant: &Tenant, rpc_metrics: &RpcMetrics, shows_revisions: bool) -> Counters {
        let state = tenant.reader().state();
        self.stored_bytes += state.db_size_bytes();
        self.live_bytes += state.db_in_use_bytes();
        self.quota_bytes += u64::try_from(tenant.quota_bytes()).unwrap_or(0);
        self.keys += state.usage.live_keys;
        self.watchers += tenant.reader().watch_counts().1 as u64;
        self.revisions = shows_revisions.then_some((state.revision, state.compact_revision));
        for alarm in &state.alarms {
            let name = match alarm.kind {
                AlarmKind::NOSPACE => "NOSPACE",
                AlarmKind::CORRUPT => "CORRUPT",
                AlarmKind(_) => continue,
            };
            *self.alarms.entry(name).or_default() += 1;
        }
        let Some(traffic) = rpc_metrics.traffic(tenant.id()) else { return Counters::default() };
        self.connections += traffic.used.connections() as u64;
        Counters::of(traffic)
    }
}

/// Appends everything about tenants, of which at most so many have series of their own.
pub(super) fn render(out: &mut String, cell: &Cell, rpc_metrics: &RpcMetrics, shown_max: usize) {
    let mut phases = [("active", 0_u64), ("read-only", 0), ("suspended", 0), ("deleting", 0)];
    let mut shown: Vec<(String, Shown)> = Vec::new();
    let mut other: Option<Shown> = None;
    let mut others_almost_full = 0;
    let mut known = std::collections::BTreeSet::new();
    let mut counted_by_others = BTreeMap::new();
    for name in cell.tenant_names() {
        let Some(tenant) = cell.tenant(&name) else { continue };
        known.insert(tenant.id());
        let phase = match tenant.profile().phase {
            TenantPhase::Active => 0,
            TenantPhase::ReadOnly => 1,
            TenantPhase::Suspended => 2,
        };
        phases[phase].1 += 1;
        if shown.len() < shown_max && name != OTHER {
            let mut of_tenant = Shown::default();
            of_tenant.counters = of_tenant.add(&tenant, rpc_metrics, true);
            shown.push((name, of_tenant));
        } else {
            others_almost_full += u64::from(is_almost_full(&tenant));
            let counters = other.get_or_insert_default().add(&tenant, rpc_metrics, false);
            counted_by_others.insert(tenant.id(), counters);
        }
    }
    phases[3].1 = cell.deleted_tenants().len() as u64;
    // A tenant that is gone is not counted any more. Ids grow: one behind the last was made meanwhile.
    let last = known.last().copied();
    rpc_metrics.retain(|tenant| tenant.0 == 0 || Some(tenant) > last || known.contains(&tenant));
    if let Some(counters) = sum_of_others(rpc_metrics, counted_by_others) {
        other.get_or_insert_default().counters = counters;
    }
    shown.extend(other.map(|other| (OTHER.to_string(), other)));

    family(out, "tenure_tenants", "gauge", "Tenants of the cell, by state");
    for (phase, tenants) in phases {
        let _ = writeln!(out, "tenure_tenants{{state=\"{phase}\"}} {tenants}");
    }
    let help = "Tenants without values of their own that hold more than four fifths of their quota";
    family(out, "tenure_other_tenants_almost_full", "gauge", help);
    let _ = writeln!(out, "tenure_other_tenants_almost_full {others_almost_full}");
    values(out, &shown);
    requests(out, &shown);
    throttled(out, &shown);
    alarms(out, &shown);
    latency(out, &shown);
}

fn is_almost_full(tenant: &Tenant) -> bool {
    let quota_bytes = u64::try_from(tenant.quota_bytes()).unwrap_or(u64::MAX);
    tenant.reader().db_size_bytes() > quota_bytes / 5 * 4
}

/// What is one number of a tenant.
fn values(out: &mut String, shown: &[(String, Shown)]) {
    type Value = (&'static str, &'static str, &'static str, fn(&Shown) -> Option<i128>);
    let values: [Value; 11] = [
        ("received_bytes_total", "counter", "Bytes of messages from clients, at this member", |of| {
            Some(of.counters.received_bytes.into())
        }),
        ("sent_bytes_total", "counter", "Bytes of messages to clients, from this member", |of| {
            Some(of.counters.sent_bytes.into())
        }),
        ("stored_bytes", "gauge", "Bytes stored, in all versions that are kept", |of| Some(of.stored_bytes.into())),
        ("live_bytes", "gauge", "Bytes stored in the newest versions of keys", |of| Some(of.live_bytes.into())),
        ("history_bytes", "gauge", "Bytes stored in older versions and deletions, which a compaction may free", |of| {
            Some(of.stored_bytes.saturating_sub(of.live_bytes).into())
        }),
        ("quota_bytes", "gauge", "Bytes that the tenant may store, 0 if there is no limit", |of| {
            Some(of.quota_bytes.into())
        }),
        ("keys", "gauge", "Keys that the tenant has now", |of| Some(of.keys.into())),
        ("watchers", "gauge", "Watchers at this member", |of| Some(of.watchers.into())),
        ("connections", "gauge", "Connections of clients to this member", |of| Some(of.connections.into())),
        ("revision", "gauge", "Newest revision of the tenant", |of| of.revisions.map(|(revision, _)| revision.into())),
        ("compact_revision", "gauge", "Revision of the last compaction, -1 if there was none", |of| {
            of.revisions.map(|(_, compact)| compact.into())
        }),
    ];
    for (name, kind, help, value) in values {
        let name = format!("tenure_tenant_{name}");
        family(out, &name, kind, help);
        for (tenant, of) in shown {
            if let Some(value) = value(of) {
                let _ = writeln!(out, "{name}{{tenant=\"{tenant}\"}} {value}");
            }
        }
    }
}

fn requests(out: &mut String, shown: &[(String, Shown)]) {
    const NAME: &str = "tenure_tenant_requests_total";
    family(out, NAME, "counter", "Calls that ended at this member, by method and code");
    for (tenant, of) in shown {
        for ((method, code), times) in &of.counters.requests {
            let _ = writeln!(out, "{NAME}{{tenant=\"{tenant}\",method=\"{method}\",code=\"{code}\"}} {times}");
        }
    }
}

fn throttled(out: &mut String, shown: &[(String, Shown)]) {
    const NAME: &str = "tenure_tenant_throttled_total";
    family(out, NAME, "counter", "Times that a limit made this member refuse or delay something, by reason");
    for (tenant, of) in shown {
        for (reason, times) in Reason::ALL.into_iter().zip(of.counters.held_back) {
            let _ = writeln!(out, "{NAME}{{tenant=\"{tenant}\",reason=\"{}\"}} {times}", reason.name());
        }
    }
}

fn alarms(out: &mut String, shown: &[(String, Shown)]) {
    const NAME: &str = "tenure_tenant_alarms";
    family(out, NAME, "gauge", "Alarms that are active, of all members, by alarm");
    for (tenant, of) in shown {
        for alarm in ["NOSPACE", "CORRUPT"] {
            let active = of.alarms.get(alarm).copied().unwrap_or(0);
            let _ = writeln!(out, "{NAME}{{tenant=\"{tenant}\",alarm=\"{alarm}\"}} {active}");
        }
    }
}

fn latency(out: &mut String, shown: &[(String, Shown)]) {
    const NAME: &str = "tenure_tenant_request_duration_seconds";
    family(out, NAME, "histogram", "Seconds from the head of a unary call's request to the end of its answer");
    for (tenant, of) in shown {
        if let Some(latency) = &of.counters.latency {
            buckets(out, NAME, &format!("tenant=\"{tenant}\","), latency);
        }
    }
}

#[cfg(test)]
mod tests {
    use tenure_storage::{Command, KeyRange, LeaseId, Limit, PutRequest, WatchSpec};
    use tonic::Code;

    use super::*;
    use crate::service::testing::TestCell;

    /// Values of one tenant, by name and other labels.
    type Series = BTreeMap<(String, String), f64>;

    fn series(cell: &Cell, rpc_metrics: &RpcMetrics, shown_max: usize) -> BTreeMap<String, Series> {
        let mut out = String::new();
        render(&mut out, cell, rpc_metrics, shown_max);
        let mut tenants = BTreeMap::<String, Series>::new();
        for line in out.lines() {
            let Some((name, rest)) = line.split_once("{tenant=\"") else { continue };
            let (tenant, rest) = rest.split_once('"').unwrap();
            let (labels, value) = rest.rsplit_once(' ').unwrap();
            let key = (name.to_string(), labels.to_string());
            let before = tenants.entry(tenant.to_string()).or_default().insert(key, value.parse().unwrap());
            assert_eq!(before, None, "twice: {line}");
        }
        tenants
    }

    async fn busy(cell: &Cell, rpc_metrics: &RpcMetrics, name: &str, times: usize) {
        let tenant = cell.tenant(name).unwrap();
        let put = PutRequest {
            key: "k".into(),
            value: "v".into(),
            lease: LeaseId::NONE,
            prev_kv: false,
            ignore_value: false,
            ignore_lease: false,
        };
        for _ in 0..times {
            tenant.propose(Command::Put(put.clone())).await.unwrap().result.unwrap();
            let mut call = rpc_metrics.begin(tenant.id(), "/etcdserverpb.KV/Put").unwrap();
            call.traffic().received(100, 1);
            call.traffic().sent(10, 1);
            call.end(if times.is_multiple_of(2) { Code::Ok } else { Code::ResourceExhausted });
            rpc_metrics.used(tenant.id()).count(Reason::Streams);
        }
        let alarm = Command::Alarm { activate: true, member_id: tenant.member_id(), kind: AlarmKind::NOSPACE };
        tenant.propose(alarm).await.unwrap().result.unwrap();
    }

    // A cell has more tenants than a Prometheus wants series: what is not shown must not be lost, and what is shown must stay when a
    // tenant comes whose name is earlier in the alphabet.
    #[tokio::test]
    async fn those_that_are_not_shown_are_summed_up() {
        let test = TestCell::open().await;
        let (cell, rpc_metrics) = (test.context().cell, RpcMetrics::default());
        for name in ["z", "y", "x", "a"] {
            let mut limits = tenure_storage::TenantLimits::default();
            limits.set(Limit::StoredBytes, Some(1 << 20));
            cell.create_tenant_with(name, limits, Default::default()).await.unwrap();
        }
        for (times, name) in ["default", OTHER, "z", "y", "x", "a"].into_iter().enumerate() {
            busy(&cell, &rpc_metrics, name, times + 1).await;
        }
        let x = test.tenant("x");
        let watch = x.reader().watch_stream(std::sync::Arc::new(|| {}));
        watch.create(WatchSpec {
            range: KeyRange::Single("k".into()),
            start_revision: 0,
            prev_kv: false,
            no_put: false,
            no_delete: false,
            progress_notify: false,
            fragment: false,
            watch_id: 0,
        });
        let used = [x.id(), test.tenant("a").id()].map(|id| rpc_metrics.used(id));
        let _connections = used.each_ref().map(|used| used.connect(&x.profile(), 1).unwrap());

        let all = series(&cell, &rpc_metrics, 500);
        assert_eq!(all.keys().collect::<Vec<_>>(), ["a", "default", OTHER, "x", "y", "z"]);
        let few = series(&cell, &rpc_metrics, 3);
        assert_eq!(few.keys().collect::<Vec<_>>(), ["default", OTHER, "y", "z"], "those that are there longest");
        for shown in ["default", "y", "z"] {
            assert_eq!(few[shown], all[shown], "{shown}");
        }
        let mut sums = Series::new();
        for hidden in [OTHER, "x", "a"] {
            let summed = all[hidden].iter().filter(|((name, _), _)| !name.ends_with("revision"));
            for (key, value) in summed {
                *sums.entry(key.clone()).or_default() += value;
            }
        }
        assert_eq!(few[OTHER].keys().collect::<Vec<_>>(), sums.keys().collect::<Vec<_>>());
        for (key, sum) in &sums {
            // Seconds have fractions.
            assert!((few[OTHER][key] - sum).abs() < 1e-6, "{key:?}: {} and not {sum}", few[OTHER][key]);
        }
        // 2 of "other", 5 of "x", 6 of "a".
        let value = |name: &str, labels: &str| few[OTHER].get(&(format!("tenure_tenant_{name}"), labels.to_string()));
        for (name, labels, expected) in [
            ("requests_total", ",method=\"Put\",code=\"OK\"}", 8),
            ("requests_total", ",method=\"Put\",code=\"ResourceExhausted\"}", 5),
            ("throttled_total", ",reason=\"streams\"}", 13),
            ("received_bytes_total", "}", 1_300),
            ("sent_bytes_total", "}", 130),
            ("request_duration_seconds_count", "}", 13),
            ("alarms", ",alarm=\"NOSPACE\"}", 3),
            ("keys", "}", 3),
            ("watchers", "}", 1),
            ("connections", "}", 2),
        ] {
            assert_eq!(value(name, labels), Some(&f64::from(expected)), "{name}{labels}");
        }
        assert_eq!((value("revision", "}"), value("compact_revision", "}")), (None, None), "have no sum");
        assert_eq!(series(&cell, &rpc_metrics, 0).keys().collect::<Vec<_>>(), [OTHER]);
    }

    /// The counters of "other", by name and labels.
    fn counters_of_other(cell: &Cell, rpc_metrics: &RpcMetrics) -> Series {
        let all = series(cell, rpc_metrics, 2);
        let is_counter = |name: &str| ["_total", "_bucket", "_count", "_sum"].iter().any(|end| name.ends_with(end));
        all[OTHER].iter().filter(|((name, _), _)| is_counter(name)).map(|(key, value)| (key.clone(), *value)).collect()
    }

    // A sum that falls is taken for a restart: all of it would be counted again, as a peak that never was.
    #[tokio::test]
    async fn what_others_have_counted_never_goes_back() {
        let test = TestCell::open().await;
        let (cell, rpc_metrics) = (test.context().cell, RpcMetrics::default());
        for (times, name) in ["shown", "w", "x", "y"].into_iter().enumerate() {
            cell.create_tenant_with(name, Default::default(), Default::default()).await.unwrap();
            busy(&cell, &rpc_metrics, name, times + 1).await;
        }
        let mut before = counters_of_other(&cell, &rpc_metrics);
        let requests = |of: &Series| -> f64 {
            of.iter().filter(|((name, _), _)| name.ends_with("requests_total")).map(|(_, value)| value).sum()
        };
        assert_eq!(requests(&before), 2.0 + 3.0 + 4.0);
        // One of the others; one with series of its own, whose place "w" takes; the rest, one after the other.
        for gone in ["x", "shown", "w", "y"] {
            let tenant = test.tenant(gone);
            cell.delete_tenant(&tenant).await.unwrap();
            let now = counters_of_other(&cell, &rpc_metrics);
            for (key, value) in &before {
                assert!(now[key] >= *value, "{gone} is gone: {key:?} from {value} to {}", now[key]);
            }
            before = now;
        }
        assert_eq!(requests(&before), 9.0);
        cell.create_tenant_with("z", Default::default(), Default::default()).await.unwrap();
        cell.create_tenant_with("late", Default::default(), Default::default()).await.unwrap();
        busy(&cell, &rpc_metrics, "late", 5).await;
        assert_eq!(requests(&counters_of_other(&cell, &rpc_metrics)), 9.0 + 5.0);
    }
}
