//! What etcd's gRPC library counts of every call: `grpc_server_*` and the bytes to and from clients (contract 7).
//!
//! Counted per tenant, because how much a neighbour does is none of a tenant's business; a tenant that never called costs
//! nothing. Every method is there from the first scrape on, at zero, so that a rate over a counter's first step is not lost.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use parking_lot::RwLock;
use tenure_raft_server::{DurationHistogram, HistogramSnapshot};
use tenure_storage::TenantId;
use tonic::Code;

use crate::metrics::text::{family, metric};
use crate::seldom::Seldom;
use crate::throttle::TenantUse;

const UNARY: &str = "unary";
const SERVER_STREAM: &str = "server_stream";
const BIDI_STREAM: &str = "bidi_stream";

/// Service, method and kind of every call that has a route.
const METHODS: &[(&str, &str, &str)] = &[
    ("etcdserverpb.KV", "Range", UNARY),
    ("etcdserverpb.KV", "RangeStream", SERVER_STREAM),
    ("etcdserverpb.KV", "Put", UNARY),
    ("etcdserverpb.KV", "DeleteRange", UNARY),
    ("etcdserverpb.KV", "Txn", UNARY),
    ("etcdserverpb.KV", "Compact", UNARY),
    ("etcdserverpb.Watch", "Watch", BIDI_STREAM),
    ("etcdserverpb.Lease", "LeaseGrant", UNARY),
    ("etcdserverpb.Lease", "LeaseRevoke", UNARY),
    ("etcdserverpb.Lease", "LeaseKeepAlive", BIDI_STREAM),
    ("etcdserverpb.Lease", "LeaseTimeToLive", UNARY),
    ("etcdserverpb.Lease", "LeaseLeases", UNARY),
    ("etcdserverpb.Cluster", "MemberAdd", UNARY),
    ("etcdserverpb.Cluster", "MemberRemove", UNARY),
    ("etcdserverpb.Cluster", "MemberUpdate", UNARY),
    ("etcdserverpb.Cluster", "MemberList", UNARY),
    ("etcdserverpb.Cluster", "MemberPromote", UNARY),
    ("etcdserverpb.Maintenance", "Alarm", UNARY),
    ("etcdserverpb.Maintenance", "Status", UNARY),
    ("etcdserverpb.Maintenance", "Defragment", UNARY),
    ("etcdserverpb.Maintenance", "Hash", UNARY),
    ("etcdserverpb.Maintenance", "HashKV", UNARY),
    ("etcdserverpb.Maintenance", "Snapshot", SERVER_STREAM),
    ("etcdserverpb.Maintenance", "MoveLeader", UNARY),
    ("etcdserverpb.Maintenance", "Downgrade", UNARY),
    ("etcdserverpb.Auth", "AuthEnable", UNARY),
    ("etcdserverpb.Auth", "AuthDisable", UNARY),
    ("etcdserverpb.Auth", "AuthStatus", UNARY),
    ("etcdserverpb.Auth", "Authenticate", UNARY),
    ("etcdserverpb.Auth", "UserAdd", UNARY),
    ("etcdserverpb.Auth", "UserGet", UNARY),
    ("etcdserverpb.Auth", "UserList", UNARY),
    ("etcdserverpb.Auth", "UserDelete", UNARY),
    ("etcdserverpb.Auth", "UserChangePassword", UNARY),
    ("etcdserverpb.Auth", "UserGrantRole", UNARY),
    ("etcdserverpb.Auth", "UserRevokeRole", UNARY),
    ("etcdserverpb.Auth", "RoleAdd", UNARY),
    ("etcdserverpb.Auth", "RoleGet", UNARY),
    ("etcdserverpb.Auth", "RoleList", UNARY),
    ("etcdserverpb.Auth", "RoleDelete", UNARY),
    ("etcdserverpb.Auth", "RoleGrantPermission", UNARY),
    ("etcdserverpb.Auth", "RoleRevokePermission", UNARY),
    ("grpc.health.v1.Health", "Check", UNARY),
    ("grpc.health.v1.Health", "List", UNARY),
    ("grpc.health.v1.Health", "Watch", SERVER_STREAM),
];

/// Names of the codes, by number.
const CODES: [&str; 17] = [
    "OK",
    "Canceled",
    "Unknown",
    "InvalidArgument",
    "DeadlineExceeded",
    "NotFound",
    "AlreadyExists",
    "PermissionDenied",
    "ResourceExhausted",
    "FailedPrecondition",
    "Aborted",
    "OutOfRange",
    "Unimplemented",
    "Internal",
    "Unavailable",
    "DataLoss",
    "Unauthenticated",
];

#[derive(Debug, Default)]
struct MethodCounters {
    started: AtomicU64,
    messages_received: AtomicU64,
    messages_sent: AtomicU64,
    handled: [AtomicU64; CODES.len()],
}

/// One tenant's counters.
#[derive(Debug)]
struct TenantCounters {
    methods: Vec<MethodCounters>,
    received_bytes: AtomicU64,
    sent_bytes: AtomicU64,
    /// Of unary calls, from the head of the request to the end of the answer.
    latency: DurationHistogram,
    used: Arc<TenantUse>,
}

impl TenantCounters {
    fn new(tenant: TenantId) -> Self {
        TenantCounters {
            methods: METHODS.iter().map(|_| MethodCounters::default()).collect(),
            received_bytes: AtomicU64::new(0),
            sent_bytes: AtomicU64::new(0),
            latency: DurationHistogram::default(),
            used: Arc::new(TenantUse::of(tenant)),
        }
    }
}

/// What is counted of a tenant, for those who look at all of them.
#[derive(Clone, Debug)]
pub struct TenantTraffic {
    /// Method, code and how often, where it is not never.
    pub handled: Vec<(&'static str, &'static str, u64)>,
    pub received_bytes: u64,
    pub sent_bytes: u64,
    pub latency: HistogramSnapshot,
    pub used: Arc<TenantUse>,
}

impl TenantTraffic {
    /// Calls that were answered, whatever with.
    pub fn requests(&self) -> u64 {
        self.handled.iter().map(|(_, _, times)| times).sum()
    }
}

impl TenantCounters {
    fn traffic(&self) -> TenantTraffic {
        let methods = METHODS.iter().zip(&self.methods);
        let handled = methods.flat_map(|((_, method, _), counters)| {
            let codes = CODES.iter().zip(&counters.handled);
            codes.map(|(code, times)| (*method, *code, times.load(Ordering::Relaxed)))
        });
        TenantTraffic {
            handled: handled.filter(|(_, _, times)| *times > 0).collect(),
            received_bytes: self.received_bytes.load(Ordering::Relaxed),
            sent_bytes: self.sent_bytes.load(Ordering::Relaxed),
            latency: self.latency.snapshot(),
            used: Arc::clone(&self.used),
        }
    }

    /// A counter of each method.
    fn render_methods(&self, out: &mut String, name: &str, help: &str, value: fn(&MethodCounters) -> &AtomicU64) {
        family(out, name, "counter", help);
        for ((service, method, kind), counters) in METHODS.iter().zip(&self.methods) {
            let value = value(counters).load(Ordering::Relaxed);
            let _ = writeln!(
                out,
                "{name}{{grpc_method=\"{method}\",grpc_service=\"{service}\",grpc_type=\"{kind}\"}} {value}"
            );
        }
    }

    /// How often each method was answered with each code.
    fn render_handled(&self, out: &mut String) {
        const NAME: &str = "grpc_server_handled_total";
        family(out, NAME, "counter", "Calls that ended, by method and code");
        for ((service, method, kind), counters) in METHODS.iter().zip(&self.methods) {
            for (code, handled) in CODES.iter().zip(&counters.handled) {
                let value = handled.load(Ordering::Relaxed);
                let _ = writeln!(
                    out,
                    "{NAME}{{grpc_code=\"{code}\",grpc_method=\"{method}\",grpc_service=\"{service}\",\
                     grpc_type=\"{kind}\"}} {value}"
                );
            }
        }
    }
}

/// The counters of all tenants. Cheap to clone; all clones count together.
#[derive(Clone, Debug, Default)]
pub struct RpcMetrics {
    tenants: Arc<RwLock<HashMap<TenantId, Arc<TenantCounters>>>>,
    health: Arc<HealthAnswers>,
}

/// What `/health` has said.
#[derive(Debug, Default)]
struct HealthAnswers {
    successes: AtomicU64,
    failures: AtomicU64,
    /// Of the log, for failures.
    lines: Seldom,
}

impl RpcMetrics {
    /// `/health` has answered.
    pub fn health(&self, is_healthy: bool) {
        let answers = if is_healthy { &self.health.successes } else { &self.health.failures };
        answers.fetch_add(1, Ordering::Relaxed);
    }

    /// How often `/health` has said true, and false.
    pub fn health_answers(&self) -> (u64, u64) {
        let HealthAnswers { successes, failures, .. } = &*self.health;
        (successes.load(Ordering::Relaxed), failures.load(Ordering::Relaxed))
    }

    /// Lines of the log that say why `/health` was false.
    pub(crate) fn unhealthy_lines(&self) -> &Seldom {
        &self.health.lines
    }

    fn of(&self, tenant: TenantId) -> Arc<TenantCounters> {
        if let Some(counters) = self.tenants.read().get(&tenant) {
            return Arc::clone(counters);
        }
        Arc::clone(self.tenants.write().entry(tenant).or_insert_with(|| Arc::new(TenantCounters::new(tenant))))
    }

    /// A call begins; `path` is that of its HTTP request. `None` if there is no such method: it is not counted.
    pub fn begin(&self, tenant: TenantId, path: &str) -> Option<Call> {
        let (service, name) = path.strip_prefix('/')?.split_once('/')?;
        let method = METHODS.iter().position(|(known, method, _)| *method == name && *known == service)?;
        let traffic = Traffic { counters: self.of(tenant), method };
        traffic.method().started.fetch_add(1, Ordering::Relaxed);
        let is_unary = METHODS[method].2 == UNARY;
        Some(Call { traffic, handled: false, began: is_unary.then(Instant::now) })
    }

    /// What a tenant uses of this member.
    pub fn used(&self, tenant: TenantId) -> Arc<TenantUse> {
        Arc::clone(&self.of(tenant).used)
    }

    /// What is counted of a tenant; `None`: it never came.
    pub fn traffic(&self, tenant: TenantId) -> Option<TenantTraffic> {
        self.tenants.read().get(&tenant).map(|counters| counters.traffic())
    }

    /// Forgets the tenants that are gone.
    pub fn retain(&self, kept: impl Fn(TenantId) -> bool) {
        self.tenants.write().retain(|tenant, _| kept(*tenant));
    }

    /// Appends the tenant's counters in Prometheus' text form.
    pub fn render(&self, tenant: TenantId, out: &mut String) {
        let none = Arc::new(TenantCounters::new(tenant));
        let counters = self.tenants.read().get(&tenant).cloned().unwrap_or(none);
        let started = "Calls that began, by method";
        counters.render_methods(out, "grpc_server_started_total", started, |method| &method.started);
        let received = "Messages that came in from clients, by method";
        counters.render_methods(out, "grpc_server_msg_received_total", received, |method| &method.messages_received);
        let sent = "Messages that went out to clients, by method";
        counters.render_methods(out, "grpc_server_msg_sent_total", sent, |method| &method.messages_sent);
        counters.render_handled(out);
        for (name, help, bytes) in [
            (
                "etcd_network_client_grpc_received_bytes_total",
                "Bytes of messages that came in from clients",
                &counters.received_bytes,
            ),
            (
                "etcd_network_client_grpc_sent_bytes_total",
                "Bytes of messages that went out to clients",
                &counters.sent_bytes,
            ),
        ] {
            metric(out, name, "counter", help, bytes.load(Ordering::Relaxed));
        }
    }
}

/// Where the traffic of one call is counted.
#[derive(Clone, Debug)]
pub struct Traffic {
    counters: Arc<TenantCounters>,
    method: usize,
}

impl Traffic {
    fn method(&self) -> &MethodCounters {
        &self.counters.methods[self.method]
    }

    pub(crate) fn used(&self) -> &Arc<TenantUse> {
        &self.counters.used
    }

    /// Bytes have come in that complete so many messages.
    pub fn received(&self, bytes: usize, messages: u64) {
        self.counters.received_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        self.method().messages_received.fetch_add(messages, Ordering::Relaxed);
    }

    /// Bytes go out that complete so many messages.
    pub fn sent(&self, bytes: usize, messages: u64) {
        self.counters.sent_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        self.method().messages_sent.fetch_add(messages, Ordering::Relaxed);
    }
}

/// A call that runs. Dropped without an end it was canceled.
#[derive(Debug)]
pub struct Call {
    traffic: Traffic,
    handled: bool,
    /// Of a unary call.
    began: Option<Instant>,
}

impl Call {
    pub fn traffic(&self) -> &Traffic {
        &self.traffic
    }

    /// The call has been answered with this code.
    pub fn end(&mut self, code: Code) {
        if !self.handled {
            self.handled = true;
            let number = usize::try_from(i32::from(code)).unwrap_or(0);
            self.traffic.method().handled[number.min(CODES.len() - 1)].fetch_add(1, Ordering::Relaxed);
            if let Some(began) = self.began {
                self.traffic.counters.latency.observe(began.elapsed());
            }
        }
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        self.end(Code::Cancelled);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_tenant_counts_its_own() {
        let metrics = RpcMetrics::default();
        let rendered = |tenant| {
            let mut out = String::new();
            metrics.render(tenant, &mut out);
            out
        };
        let mut put = metrics.begin(TenantId(1), "/etcdserverpb.KV/Put").unwrap();
        put.traffic().received(100, 1);
        put.end(Code::InvalidArgument);
        drop(put);
        drop(metrics.begin(TenantId(1), "/etcdserverpb.Watch/Watch"));
        assert!(metrics.begin(TenantId(1), "/etcdserverpb.KV/Nope").is_none());

        let labels = "grpc_method=\"Put\",grpc_service=\"etcdserverpb.KV\",grpc_type=\"unary\"";
        let one = rendered(TenantId(1));
        assert!(one.contains(&format!("grpc_server_started_total{{{labels}}} 1")));
        assert!(one.contains(&format!("grpc_server_handled_total{{grpc_code=\"InvalidArgument\",{labels}}} 1")));
        assert!(one.contains(&format!("grpc_server_handled_total{{grpc_code=\"Canceled\",{labels}}} 0")));
        assert!(one.contains("grpc_code=\"Canceled\",grpc_method=\"Watch\",grpc_service=\"etcdserverpb.Watch\",grpc_type=\"bidi_stream\"} 1"));
        assert!(one.contains("etcd_network_client_grpc_received_bytes_total 100"));
        let other = rendered(TenantId(2));
        assert!(other.contains(&format!("grpc_server_started_total{{{labels}}} 0")), "nothing of the neighbour's");
    }
}
