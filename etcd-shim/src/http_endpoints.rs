//! The HTTP side of a client port (contract 3.3): health, version, metrics. Each answers for the connection's tenant.
//!
//! Left out as yet: the JSON gateway below `/v3/`, `/debug/*`, `--cors` other than `*`, `--host-whitelist`.

use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use tenure_storage::{AlarmKind, RangeRequest};
use tonic::body::Body;

use crate::cell::{Cell, Tenant};
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
    async fn run(self, tenant: &Tenant) -> Result<(), String> {
        match self {
            Check::DataCorruption if has_alarm(tenant, AlarmKind::CORRUPT) => {
                Err("alarm activated: CORRUPT".to_string())
            }
            Check::DataCorruption | Check::NonLearner => Ok(()),
            Check::SerializableRead => local_read(tenant),
            Check::LinearizableRead => {
                tenant.read_barrier().await.map_err(|error| error.to_string())?;
                local_read(tenant)
            }
        }
    }
}

fn has_alarm(tenant: &Tenant, kind: AlarmKind) -> bool {
    tenant.reader().state().alarms.iter().any(|alarm| alarm.kind == kind)
}

/// Reads one key that nobody has: the engine answers.
fn local_read(tenant: &Tenant) -> Result<(), String> {
    let request = RangeRequest::new(tenure_storage::KeyRange::Single("health".into()));
    let read = tenant.reader().range(&request, &mut |_| std::ops::ControlFlow::Break(()));
    read.map(|_| ()).map_err(|error| error.to_string())
}

/// Answers one HTTP request.
pub async fn answer(cell: &Cell, rpc_metrics: &RpcMetrics, request: &Request<hyper::body::Incoming>) -> Response<Body> {
    let tenant = request.extensions().get::<ConnectionIdentity>().and_then(|identity| cell.tenant(identity.tenant()));
    let mut response = match tenant {
        Some(tenant) => route(cell, &tenant, rpc_metrics, request).await,
        None => text(StatusCode::FORBIDDEN, "no such tenant\n"),
    };
    let headers = response.headers_mut();
    headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, HeaderValue::from_static("*"));
    headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::from_static("POST, GET, OPTIONS, PUT, DELETE"));
    headers
        .insert(header::ACCESS_CONTROL_ALLOW_HEADERS, HeaderValue::from_static("accept, content-type, authorization"));
    response
}

async fn route(
    cell: &Cell,
    tenant: &Tenant,
    rpc_metrics: &RpcMetrics,
    request: &Request<hyper::body::Incoming>,
) -> Response<Body> {
    if request.method() == Method::OPTIONS {
        return Response::new(Body::empty());
    }
    let path = request.uri().path();
    let query = Query::of(request.uri().query().unwrap_or_default());
    if path == "/metrics" {
        let body = metrics::render(cell, tenant, rpc_metrics);
        return with_type(StatusCode::OK, "text/plain; version=0.0.4; charset=utf-8", body);
    }
    if path == "/v3" || path.starts_with("/v3/") {
        let body = r#"{"code":12, "message":"the JSON gateway is not built yet"}"#;
        return with_type(StatusCode::NOT_IMPLEMENTED, "application/json", body.to_string());
    }
    let known = checks_of(path).is_some() || matches!(path, "/health" | "/version");
    if known && request.method() != Method::GET {
        let mut refusal = text(StatusCode::METHOD_NOT_ALLOWED, "Method Not Allowed\n");
        refusal.headers_mut().insert(header::ALLOW, HeaderValue::from_static("GET"));
        return refusal;
    }
    match (path, checks_of(path)) {
        (_, Some(checks)) => run_checks(tenant, &checks, &query).await,
        ("/health", None) => health(tenant, &query).await,
        ("/version", None) => version(),
        (_, None) => text(StatusCode::NOT_FOUND, "404 page not found\n"),
    }
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

async fn run_checks(tenant: &Tenant, checks: &[Check], query: &Query) -> Response<Body> {
    let mut lines = String::new();
    let mut failed = false;
    for check in checks.iter().filter(|check| !query.exclude.iter().any(|name| name == check.name())) {
        match check.run(tenant).await {
            Ok(()) => lines.push_str(&format!("[+]{} ok\n", check.name())),
            Err(error) => {
                failed = true;
                lines.push_str(&format!("[-]{} failed: {error}\n", check.name()));
            }
        }
    }
    match (failed, query.verbose) {
        (true, _) => text(StatusCode::SERVICE_UNAVAILABLE, &format!("{lines}\n")),
        (false, true) => text(StatusCode::OK, &format!("{lines}ok\n")),
        (false, false) => text(StatusCode::OK, "ok\n"),
    }
}

async fn health(tenant: &Tenant, query: &Query) -> Response<Body> {
    let excluded = |name: &str| query.exclude.iter().any(|excluded| excluded == name);
    let alarm = [("NOSPACE", AlarmKind::NOSPACE), ("CORRUPT", AlarmKind::CORRUPT)]
        .into_iter()
        .find(|(name, kind)| has_alarm(tenant, *kind) && !excluded(name));
    let reason = if let Some((name, _)) = alarm {
        Some(format!("ALARM {name}"))
    } else if !query.serializable && tenant.leader_id() == 0 {
        Some("RAFT NO LEADER".to_string())
    } else {
        let read = if query.serializable { Check::SerializableRead } else { Check::LinearizableRead };
        read.run(tenant).await.err().map(|error| format!("RANGE ERROR:{error}"))
    };
    match reason {
        None => text(StatusCode::OK, r#"{"health":"true","reason":""}"#),
        Some(reason) => {
            let body = format!("{{\"health\":\"false\",\"reason\":{}}}\n", serde_json::Value::String(reason));
            text(StatusCode::SERVICE_UNAVAILABLE, &body)
        }
    }
}

fn version() -> Response<Body> {
    let body =
        format!(r#"{{"etcdserver":"{ETCD_VERSION}","etcdcluster":"{STORAGE_VERSION}","storage":"{STORAGE_VERSION}"}}"#);
    with_type(StatusCode::OK, "application/json", body)
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
