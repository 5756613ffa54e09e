//! The HTTP side of a client port (contract 3.3): health, version, metrics. Each answers for the connection's tenant.
//!
//! Left out as yet: the JSON gateway below `/v3/`, whose paths say so; profiles (`/debug/pprof/`).

use http::uri::Authority;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, header};
use tenure_storage::{AlarmKind, RangeRequest};
use tonic::Status;
use tonic::body::Body;

use crate::cell::{Cell, DEFAULT_TENANT, Tenant};
use crate::listen::Serves;
use crate::metrics;
use crate::rpc_metrics::RpcMetrics;
use crate::service::{ETCD_VERSION, STORAGE_VERSION};
use crate::tenant::ConnectionIdentity;

/// One check of `/livez` or `/readyz`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Check {
    DataCorruption,
    SerializableRead,
    LinearizableRead,
    NonLearner,
}

impl Check {
    const LIVE: &[Check] = &[Check::SerializableRead];
    const READY: &[Check] =
        &[Check::DataCorruption, Check::SerializableRead, Check::LinearizableRead, Check::NonLearner];

    fn name(self) -> &'static str {
        match self {
            Check::DataCorruption => "data_corruption",
            Check::SerializableRead => "serializable_read",
            Check::LinearizableRead => "linearizable_read",
            Check::NonLearner => "non_learner",
        }
    }

    /// `Err` holds what the failing line says.
    async fn run(self, cell: &Cell, tenant: Option<&Tenant>) -> Result<(), String> {
        match self {
            Check::DataCorruption if has_alarm(tenant, AlarmKind::CORRUPT) => {
                Err("alarm activated: CORRUPT".to_string())
            }
            Check::NonLearner if cell.raft_status().is_learner => Err("not supported for learner".to_string()),
            Check::DataCorruption | Check::NonLearner => Ok(()),
            Check::SerializableRead => local_read(tenant),
            Check::LinearizableRead => {
                // In the words that a client of gRPC gets.
                cell.read_barrier().await.map_err(|error| Status::from(error).message().to_string())?;
                local_read(tenant)
            }
        }
    }
}

fn has_alarm(tenant: Option<&Tenant>, kind: AlarmKind) -> bool {
    tenant.is_some_and(|tenant| tenant.reader().state().alarms.iter().any(|alarm| alarm.kind == kind))
}

/// Reads one key that nobody has: the engine answers. A member that is about to be one of a new cell has nothing to read yet.
fn local_read(tenant: Option<&Tenant>) -> Result<(), String> {
    let Some(tenant) = tenant else { return Ok(()) };
    let request = RangeRequest::new(tenure_storage::KeyRange::Single("health".into()));
    let read = tenant.reader().range(&request, &mut |_: &[u8]| std::ops::ControlFlow::Break(()));
    read.map(|_| ()).map_err(|error| error.to_string())
}

/// Which web pages and which host names the HTTP side serves: `--cors` and `--host-whitelist`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HttpAccess {
    /// Origins whose pages may read answers; `None` = any.
    pub origins: Option<Vec<String>>,
    /// Host names that a cleartext client may call this server by; `None` = any. A page that a browser loaded from elsewhere
    /// cannot get in by a name that was made to point here.
    pub hosts: Option<Vec<String>>,
}

/// What answers the HTTP requests of one listener.
pub(crate) struct Endpoints<'a> {
    pub(crate) cell: &'a Cell,
    pub(crate) rpc_metrics: &'a RpcMetrics,
    pub(crate) access: &'a HttpAccess,
    pub(crate) serves: Serves,
    pub(crate) secure: bool,
}

impl Endpoints<'_> {
    /// Answers one request.
    pub(crate) async fn answer(&self, request: &Request<hyper::body::Incoming>) -> Response<Body> {
        let identity = request.extensions().get::<ConnectionIdentity>();
        let tenant = identity.and_then(|identity| identity.tenant_in(self.cell));
        if self.serves == Serves::Metrics {
            // Also while the member waits for a leader of a new cell, and there is no tenant.
            return self.observe(tenant.as_ref(), request).await;
        }
        let Some(tenant) = tenant else { return error(StatusCode::FORBIDDEN, "no such tenant\n") };
        if !self.secure && !self.is_host_served(request) {
            return error(
                StatusCode::MISDIRECTED_REQUEST,
                "this server is not called by that host name: see --host-whitelist\n",
            );
        }
        let mut headers = self.cors_headers(request);
        let mut response = match *request.method() {
            Method::OPTIONS => Response::new(Body::empty()),
            _ => self.route(&tenant, request).await,
        };
        // In front, as etcd sends them.
        headers.extend(std::mem::take(response.headers_mut()));
        *response.headers_mut() = headers;
        response
    }

    fn is_host_served(&self, request: &Request<hyper::body::Incoming>) -> bool {
        let Some(hosts) = &self.access.hosts else { return true };
        let named = request.headers().get(header::HOST).and_then(|host| host.to_str().ok());
        let host = named.or(request.uri().authority().map(Authority::as_str)).unwrap_or_default();
        let without_port = match host.strip_prefix('[') {
            Some(address) => address.split(']').next(),
            None => host.split(':').next(),
        };
        hosts.iter().any(|known| Some(known.as_str()) == without_port)
    }

    fn cors_headers(&self, request: &Request<hyper::body::Incoming>) -> HeaderMap {
        let origin = match &self.access.origins {
            None => Some(HeaderValue::from_static("*")),
            Some(known) => {
                let origin = request.headers().get(header::ORIGIN).cloned();
                origin.filter(|origin| known.iter().any(|known| known.as_bytes() == origin.as_bytes()))
            }
        };
        let mut headers = HeaderMap::new();
        if let Some(origin) = origin {
            let allowed = HeaderValue::from_static("accept, content-type, authorization");
            headers.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, allowed);
            let methods = HeaderValue::from_static("POST, GET, OPTIONS, PUT, DELETE");
            headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, methods);
            headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
        }
        headers
    }

    async fn route(&self, tenant: &Tenant, request: &Request<hyper::body::Incoming>) -> Response<Body> {
        let path = request.uri().path();
        match path {
            "/version" | "/debug/vars" if request.method() != Method::GET => only_get(),
            "/version" => version(),
            "/debug/vars" => variables(tenant),
            "/v3" => {
                let mut moved = with_type(
                    StatusCode::MOVED_PERMANENTLY,
                    "text/html; charset=utf-8",
                    "<a href=\"/v3/\">Moved Permanently</a>.\n\n".to_string(),
                );
                moved.headers_mut().insert(header::LOCATION, HeaderValue::from_static("/v3/"));
                moved
            }
            _ => match path.strip_prefix("/v3/").or_else(|| path.strip_prefix("/v3beta/")) {
                Some(call) => gateway(call, request.method()),
                None => self.observe(Some(tenant), request).await,
            },
        }
    }

    /// Health and metrics: what a listener for them alone answers.
    async fn observe(&self, tenant: Option<&Tenant>, request: &Request<hyper::body::Incoming>) -> Response<Body> {
        let path = request.uri().path();
        let query = Query::of(request.uri().query().unwrap_or_default());
        let checks = checks_of(path);
        match (path, checks) {
            ("/metrics", _) => {
                let body = metrics::render(self.cell, tenant, self.rpc_metrics);
                with_type(StatusCode::OK, "text/plain; version=0.0.4; charset=utf-8; escaping=underscores", body)
            }
            ("/health", _) | (_, Some(_)) if request.method() != Method::GET => only_get(),
            ("/health", _) => health(self.cell, tenant, self.rpc_metrics, &query).await,
            (_, Some(checks)) => run_checks(self.cell, tenant, &checks, &query).await,
            (_, None) => error(StatusCode::NOT_FOUND, "404 page not found\n"),
        }
    }
}

/// Paths of the JSON gateway, below `/v3/`.
const GATEWAY: &[&str] = &[
    "kv/range",
    "kv/put",
    "kv/deleterange",
    "kv/txn",
    "kv/compaction",
    "kv/lease/revoke",
    "kv/lease/timetolive",
    "kv/lease/leases",
    "watch",
    "lease/grant",
    "lease/revoke",
    "lease/keepalive",
    "lease/timetolive",
    "lease/leases",
    "cluster/member/add",
    "cluster/member/remove",
    "cluster/member/update",
    "cluster/member/list",
    "cluster/member/promote",
    "maintenance/alarm",
    "maintenance/status",
    "maintenance/defragment",
    "maintenance/hash",
    "maintenance/hashkv",
    "maintenance/snapshot",
    "maintenance/transfer-leadership",
    "maintenance/downgrade",
    "auth/enable",
    "auth/disable",
    "auth/status",
    "auth/authenticate",
    "auth/user/add",
    "auth/user/get",
    "auth/user/list",
    "auth/user/delete",
    "auth/user/changepw",
    "auth/user/grant",
    "auth/user/revoke",
    "auth/role/add",
    "auth/role/get",
    "auth/role/list",
    "auth/role/delete",
    "auth/role/grant",
    "auth/role/revoke",
    "lock/lock",
    "lock/unlock",
    "election/campaign",
    "election/proclaim",
    "election/leader",
    "election/observe",
    "election/resign",
];

/// The answer of a gateway that serves nothing yet.
fn gateway(call: &str, method: &Method) -> Response<Body> {
    let (code, grpc_code, message) = if !GATEWAY.contains(&call) {
        (StatusCode::NOT_FOUND, tonic::Code::NotFound, "Not Found")
    } else if method != Method::POST {
        (StatusCode::NOT_IMPLEMENTED, tonic::Code::Unimplemented, "Method Not Allowed")
    } else {
        (StatusCode::NOT_IMPLEMENTED, tonic::Code::Unimplemented, "the JSON gateway is not built yet")
    };
    let body = format!(r#"{{"code":{}, "message":"{message}"}}"#, i32::from(grpc_code));
    with_type(code, "application/json", body)
}

fn only_get() -> Response<Body> {
    let mut refusal = error(StatusCode::METHOD_NOT_ALLOWED, "Method Not Allowed\n");
    let mut headers = HeaderMap::from_iter([(header::ALLOW, HeaderValue::from_static("GET"))]);
    headers.extend(std::mem::take(refusal.headers_mut()));
    *refusal.headers_mut() = headers;
    refusal
}

/// What this process says of itself. Its command line names tenants, so it is not in it; its memory is that of all tenants, so only
/// `default` is told.
fn variables(tenant: &Tenant) -> Response<Body> {
    let files_max = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    let mut body = serde_json::json!({
        "file_descriptor_limit": files_max,
        "tenured": env!("CARGO_PKG_VERSION"),
    });
    if tenant.name() == DEFAULT_TENANT {
        body["memstats"] = serde_json::json!({ "Sys": metrics::resident_bytes() });
    }
    with_type(StatusCode::OK, "application/json; charset=utf-8", format!("{body:#}\n"))
}

/// The checks behind a path; `None` if it is no path of checks.
fn checks_of(path: &str) -> Option<Vec<Check>> {
    for (root, checks) in [("/livez", Check::LIVE), ("/readyz", Check::READY)] {
        match path.strip_prefix(root) {
            Some("") => return Some(checks.to_vec()),
            Some(rest) => {
                let name = rest.strip_prefix('/')?;
                return checks.iter().find(|check| check.name() == name).map(|check| vec![*check]);
            }
            None => {}
        }
    }
    None
}

/// The parameters that mean something here.
struct Query {
    verbose: bool,
    serializable: bool,
    exclude: Vec<String>,
}

impl Query {
    fn of(query: &str) -> Self {
        let mut parsed = Query { verbose: false, serializable: false, exclude: Vec::new() };
        for (name, value) in url::form_urlencoded::parse(query.as_bytes()) {
            match name.as_ref() {
                "verbose" => parsed.verbose = true,
                "serializable" => parsed.serializable = value == "true",
                "exclude" => parsed.exclude.push(value.into_owned()),
                _ => {}
            }
        }
        parsed
    }
}

async fn run_checks(cell: &Cell, tenant: Option<&Tenant>, checks: &[Check], query: &Query) -> Response<Body> {
    let mut lines = String::new();
    let mut failed = false;
    for check in checks.iter().filter(|check| !query.exclude.iter().any(|name| name == check.name())) {
        match check.run(cell, tenant).await {
            Ok(()) => lines.push_str(&format!("[+]{} ok\n", check.name())),
            Err(error) => {
                failed = true;
                lines.push_str(&format!("[-]{} failed: {error}\n", check.name()));
            }
        }
    }
    match (failed, query.verbose) {
        (true, _) => error(StatusCode::SERVICE_UNAVAILABLE, &format!("{lines}\n")),
        (false, true) => not_sniffed(text(StatusCode::OK, &format!("{lines}ok\n"))),
        (false, false) => not_sniffed(text(StatusCode::OK, "ok\n")),
    }
}

/// As etcd's, with one reason more.
async fn health(cell: &Cell, tenant: Option<&Tenant>, rpc_metrics: &RpcMetrics, query: &Query) -> Response<Body> {
    let excluded = |name: &str| query.exclude.iter().any(|excluded| excluded == name);
    let alarm = [("NOSPACE", AlarmKind::NOSPACE), ("CORRUPT", AlarmKind::CORRUPT)]
        .into_iter()
        .find(|(name, kind)| has_alarm(tenant, *kind) && !excluded(name));
    let reason = if let Some((name, _)) = alarm {
        Some(format!("ALARM {name}"))
    } else if cell.disk().is_full() && !query.serializable && !excluded("NOSPACE") {
        Some("DISK FULL".to_string())
    } else if !query.serializable && cell.leader_id() == 0 {
        Some("RAFT NO LEADER".to_string())
    } else {
        let read = if query.serializable { Check::SerializableRead } else { Check::LinearizableRead };
        read.run(cell, tenant).await.err().map(|error| format!("RANGE ERROR:{error}"))
    };
    rpc_metrics.health(reason.is_none());
    match reason {
        None => text(StatusCode::OK, r#"{"health":"true","reason":""}"#),
        Some(reason) => {
            if let Some(left_out) = rpc_metrics.unhealthy_lines().line(std::time::Instant::now()) {
                let tenant = tenant.map(Tenant::name).unwrap_or_default();
                tracing::warn!(tenant, %reason, left_out, "/health is false");
            }
            let body = format!("{{\"health\":\"false\",\"reason\":{}}}\n", serde_json::Value::String(reason));
            error(StatusCode::SERVICE_UNAVAILABLE, &body)
        }
    }
}

fn version() -> Response<Body> {
    let body =
        format!(r#"{{"etcdserver":"{ETCD_VERSION}","etcdcluster":"{STORAGE_VERSION}","storage":"{STORAGE_VERSION}"}}"#);
    with_type(StatusCode::OK, "application/json", body)
}

/// The tenant has made as many requests as it may for now.
pub(crate) fn too_many_requests() -> Response<Body> {
    error(StatusCode::TOO_MANY_REQUESTS, "etcdserver: too many requests\n")
}

fn error(code: StatusCode, body: &str) -> Response<Body> {
    not_sniffed(text(code, body))
}

/// Browsers are to take the content type for what it says.
fn not_sniffed(mut response: Response<Body>) -> Response<Body> {
    response.headers_mut().insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

fn text(code: StatusCode, body: &str) -> Response<Body> {
    with_type(code, "text/plain; charset=utf-8", body.to_string())
}

fn with_type(code: StatusCode, content_type: &'static str, body: String) -> Response<Body> {
    let mut response = Response::new(Body::new(http_body_util::Full::new(bytes::Bytes::from(body))));
    *response.status_mut() = code;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}
