//! The audit log: whatever an administrator does, or somebody who is none tries, is one line that says who, what and with what result.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;
use std::sync::mpsc;

use parking_lot::Mutex;
use prost::Message as _;
use tenure_admin_api::v1::{self as api, State};
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tracing::field::{Field, Visit};
use tracing::subscriber::DefaultGuard;
use tracing_subscriber::layer::{Context, Layer, SubscriberExt as _};

use crate::client;
use crate::office::{Office, SERVICE, answer_of, methods, send, send_head, signing_request};

/// The fields of a line.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Line(BTreeMap<&'static str, String>);

impl Line {
    fn get(&self, field: &str) -> &str {
        self.0.get(field).map_or("", String::as_str)
    }
}

impl Visit for Line {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.0.insert(field.name(), value.to_string());
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.0.insert(field.name(), format!("{value:?}"));
    }
}

/// What this thread logs for auditors. The server's tasks run on the test's own thread.
#[derive(Clone, Default)]
struct AuditLog(Arc<(Mutex<Vec<Line>>, Notify)>);

impl<S: tracing::Subscriber> Layer<S> for AuditLog {
    fn on_event(&self, event: &tracing::Event<'_>, _: Context<'_, S>) {
        if event.metadata().target() == "audit" {
            let mut line = Line::default();
            event.record(&mut line);
            self.0.0.lock().push(line);
            self.0.1.notify_one();
        }
    }
}

impl AuditLog {
    fn begin() -> (Self, DefaultGuard) {
        let log = AuditLog::default();
        let guard = tracing::subscriber::set_default(tracing_subscriber::registry().with(log.clone()));
        (log, guard)
    }

    /// The one line since the last look.
    fn one(&self) -> Line {
        let lines = std::mem::take(&mut *self.0.0.lock());
        assert_eq!(lines.len(), 1, "{lines:?}");
        lines.into_iter().next().unwrap()
    }

    /// As [`AuditLog::one`], once there is one.
    async fn next(&self) -> Line {
        while self.0.0.lock().is_empty() {
            self.0.1.notified().await;
        }
        self.one()
    }

    fn is_empty(&self) -> bool {
        self.0.0.lock().is_empty()
    }
}

/// A call, and what is to be written of it.
struct Case {
    method: &'static str,
    message: Vec<u8>,
    tenant: &'static str,
    asked: &'static str,
    result: &'static str,
}

fn case(
    method: &'static str,
    message: &impl prost::Message,
    tenant: &'static str,
    asked: &'static str,
    result: &'static str,
) -> Case {
    Case { method, message: message.encode_to_vec(), tenant, asked, result }
}

/// Every method, done and refused. Those that refuse nothing that is a message at all are refused elsewhere.
fn cases(authority: &client::Authority) -> Vec<Case> {
    let s = str::to_string;
    let labels = || [("team".to_string(), "a b".to_string())].into();
    let limits = api::Limits { leases: Some(5), ..Default::default() };
    let create = |name: &str| api::CreateTenantRequest { name: s(name), limits: Some(limits), labels: labels() };
    let get = |name: &str| api::GetTenantRequest { name: s(name) };
    let list = api::ListTenantsRequest { labels: labels(), deleting: true, ..Default::default() };
    let update = |name: &str| api::UpdateTenantRequest {
        name: s(name),
        limits: Some(api::Limits { watchers: Some(0), ..Default::default() }),
        reset_limits: vec![s("leases")],
        labels: [("env".to_string(), "prod".to_string())].into(),
        remove_labels: vec![s("team")],
    };
    let changes = r#"watchers=0 reset="leases" label="env":"prod" remove_label="team""#;
    let state = |name: &str, state: State| api::SetTenantStateRequest { name: s(name), state: state.into() };
    let issue = |tenant: &str, csr_der: Vec<u8>, user: &str, admin| api::IssueCredentialsRequest {
        tenant: s(tenant),
        csr_der,
        user: s(user),
        ttl_seconds: 60,
        admin,
    };
    let revoke = |serial: &str, all| api::RevokeCredentialsRequest {
        tenant: s("acme"),
        serial: s(serial),
        all,
        ..Default::default()
    };
    let trust = |ca_pem: String| api::SetTrustedCaRequest { tenant: s("acme"), ca_pem };
    let cell = |name: &str| api::UpdateCellRequest { default_limits: Some(limits), reset_limits: vec![s(name)] };
    let delete = |name: &str, id| api::DeleteTenantRequest { name: s(name), id };
    let usage = |name: &str| api::GetUsageRequest { name: s(name) };
    vec![
        case("CreateTenant", &create("acme"), "acme", r#"leases=5 label="team":"a b""#, "OK"),
        case("CreateTenant", &create("Acme"), "Acme", r#"leases=5 label="team":"a b""#, "InvalidArgument"),
        case("GetTenant", &get("acme"), "acme", "", "OK"),
        case("GetTenant", &get("nobody"), "nobody", "", "NotFound"),
        case("ListTenants", &list, "", r#"label="team":"a b" deleting=true"#, "OK"),
        case("UpdateTenant", &update("acme"), "acme", changes, "OK"),
        case("UpdateTenant", &update("nobody"), "nobody", changes, "NotFound"),
        case("SetTenantState", &state("acme", State::ReadOnly), "acme", "state=READ_ONLY", "OK"),
        case("SetTenantState", &state("acme", State::Suspended), "acme", "state=SUSPENDED", "OK"),
        case("SetTenantState", &state("acme", State::Deleting), "acme", "state=DELETING", "InvalidArgument"),
        case("GetUsage", &usage("acme"), "acme", "", "OK"),
        case("GetUsage", &usage("nobody"), "nobody", "", "NotFound"),
        case("Top", &api::TopRequest::default(), "", "", "OK"),
        case(
            "IssueCredentials",
            &issue("acme", signing_request(), "apiserver", false),
            "acme",
            r#"user="apiserver" ttl_seconds=60 admin=false"#,
            "OK",
        ),
        case(
            "IssueCredentials",
            &issue("", signing_request(), "", true),
            "",
            r#"user="" ttl_seconds=60 admin=true"#,
            "OK",
        ),
        case(
            "IssueCredentials",
            &issue("acme", b"key".to_vec(), "", false),
            "acme",
            r#"user="" ttl_seconds=60 admin=false"#,
            "InvalidArgument",
        ),
        case("RevokeCredentials", &revoke("4a:0b", false), "acme", r#"serial="4a:0b""#, "OK"),
        case("RevokeCredentials", &revoke("", true), "acme", "all=true", "OK"),
        case(
            "RevokeCredentials",
            &api::RevokeCredentialsRequest { before_ms: 7_000, ..revoke("", true) },
            "acme",
            "all=true before_ms=7000",
            "OK",
        ),
        case("RevokeCredentials", &revoke("4a", true), "acme", r#"serial="4a" all=true"#, "InvalidArgument"),
        case("SetTrustedCa", &trust(authority.certificate.pem()), "acme", "trusted_ca=set", "OK"),
        case("SetTrustedCa", &trust(String::new()), "acme", "trusted_ca=removed", "OK"),
        case("SetTrustedCa", &trust(s("secret")), "acme", "trusted_ca=set", "InvalidArgument"),
        case("GetCell", &api::GetCellRequest {}, "", "", "OK"),
        case("UpdateCell", &cell("watchers"), "", r#"leases=5 reset="watchers""#, "OK"),
        case("UpdateCell", &cell("speed"), "", r#"leases=5 reset="speed""#, "InvalidArgument"),
        case("DeleteTenant", &delete("default", None), "default", "", "FailedPrecondition"),
        case("DeleteTenant", &delete("acme", Some(2)), "acme", "id=2", "OK"),
    ]
}

/// What is written of an answer.
fn answered(method: &str, answer: &[u8]) -> String {
    match method {
        "CreateTenant" => {
            let answer = api::CreateTenantResponse::decode(answer).unwrap();
            format!("created=true id={}", answer.tenant.unwrap().id)
        }
        "DeleteTenant" => "deleted=true".to_string(),
        "IssueCredentials" => {
            let answer = api::IssueCredentialsResponse::decode(answer).unwrap();
            format!("serial={} not_after_ms={}", answer.serial, answer.not_after_ms)
        }
        _ => String::new(),
    }
}

#[tokio::test]
async fn every_call_is_one_line() {
    let (log, _guard) = AuditLog::begin();
    let office = Office::open().await;
    assert!(log.is_empty(), "nobody has called");
    let cases = cases(&office.authority);
    let covered: BTreeSet<String> = cases.iter().map(|case| case.method.to_string()).collect();
    assert_eq!(covered, methods());
    let who = format!("uid {}", rustix::process::getuid().as_raw());
    for Case { method, message, tenant, asked, result } in cases {
        let outcome = office.call_with(&format!("{SERVICE}{method}"), &message).await;
        let line = log.one();
        let case = format!("{method} {asked}: {line:?} {outcome:?}");
        assert_eq!((line.get("who"), line.get("what"), line.get("tenant")), (who.as_str(), method, tenant), "{case}");
        assert_eq!((line.get("asked"), line.get("result")), (asked, result), "{case}");
        match outcome {
            Ok(answer) => assert_eq!((line.get("answered"), line.get("error")), (&*answered(method, &answer), "")),
            Err(status) => assert_eq!((line.get("answered"), line.get("error")), ("", status.message()), "{case}"),
        }
        assert!(!format!("{line:?}").contains("secret"), "{case}");
    }
    for method in methods() {
        office.call_with(&format!("{SERVICE}{method}"), b"\xff").await.unwrap_err();
        let line = log.one();
        assert_eq!((line.get("what"), line.get("result")), (&*method, "Internal"), "no message: {line:?}");
        assert!(line.get("error").contains("decode"), "{line:?}");
    }
    for path in ["/tenure.admin.v1.Admin/DropTenants", "/etcdserverpb.KV/Range", "/"] {
        office.call_with(path, b"").await.unwrap_err();
        let line = log.one();
        let what = path.strip_prefix(SERVICE).unwrap_or(path);
        assert_eq!((line.get("who"), line.get("what"), line.get("result")), (&*who, what, "Unimplemented"));
    }
    office.close().await;
    assert!(log.is_empty(), "nobody has called any more");
}

// Whoever is shown the door has tried, and an auditor wants to know from where.
#[tokio::test]
async fn who_is_not_let_in_is_one_line() {
    let (log, _guard) = AuditLog::begin();
    let office = Office::open().await;
    let address = office.tenure.addresses()[1];
    let from_here = |line: &Line| line.get("from").starts_with("127.0.0.1:");
    let tenant = office.authority.sign(&["tenure://tenant/acme"]);
    let stranger = client::Authority::new().sign(&["tenure://admin"]);
    for (identity, result) in
        [(Some(&tenant), "PermissionDenied"), (Some(&stranger), "Unauthenticated"), (None, "Unauthenticated")]
    {
        let stream = client::connect(address, &office.authority, identity, b"h2").await;
        let line = log.next().await;
        assert_eq!((line.get("what"), line.get("result")), ("connect", result), "{line:?}");
        assert!(from_here(&line) && !line.get("error").is_empty(), "{line:?}");
        drop(stream);
    }
    // Who only looks whether the port is open is no line; who may come in is none until there is a call.
    drop(TcpStream::connect(address).await.unwrap());
    let admin = office.authority.sign(&["tenure://admin"]);
    let stream = client::connect(address, &office.authority, Some(&admin), b"h2").await.unwrap();
    client::unary(stream, &format!("{SERVICE}Top"), b"").await.unwrap();
    let line = log.one();
    let serial = x509_parser::parse_x509_certificate(&admin.certificate).unwrap().1.raw_serial().to_vec();
    let serial: String = serial.iter().skip_while(|byte| **byte == 0).map(|byte| format!("{byte:02x}")).collect();
    assert_eq!((line.get("what"), line.get("certificate")), ("Top", &*serial));
    assert!(from_here(&line) && line.get("who").contains("rcgen"), "its common name: {line:?}");
    office.close().await;
    assert!(log.is_empty());
}

// The command of a call whose client is gone may be applied, so the call must not be forgotten.
#[tokio::test]
async fn who_does_not_wait_for_the_answer_is_one_line() {
    let (log, _guard) = AuditLog::begin();
    let office = Office::open().await;

    // It goes before it has said what it wants.
    let mut requests = office.connect().await;
    let (response, mut body) = send_head(&mut requests, &format!("{SERVICE}DeleteTenant"));
    body.send_reset(h2::Reason::CANCEL);
    drop(response);
    let line = log.next().await;
    assert_eq!((line.get("what"), line.get("tenant")), ("DeleteTenant", ""));
    assert_ne!(line.get("result"), "OK");

    // It goes while it is served: the tenant's reads wait, so this one does.
    let tenant = office.tenure.cell().tenant("default").unwrap();
    let mut reading = Vec::new();
    for _ in 0..64 {
        let tenant = tenant.clone();
        let (release, released) = mpsc::channel::<()>();
        reading.push((release, tokio::spawn(async move { tenant.read(move |_| released.recv().is_err()).await })));
    }
    tokio::task::yield_now().await;
    let usage = api::GetUsageRequest { name: "default".to_string() }.encode_to_vec();
    let gone = send(&mut requests, &format!("{SERVICE}GetUsage"), &usage).await;
    // This one is answered: so that one has begun.
    let other = send(&mut requests, &format!("{SERVICE}Top"), b"").await;
    answer_of(other).await.unwrap();
    assert_eq!(log.one().get("what"), "Top");
    drop((gone, requests));
    let line = log.next().await;
    assert_eq!((line.get("what"), line.get("tenant"), line.get("result")), ("GetUsage", "default", "unknown"));
    for (release, read) in reading {
        drop(release);
        assert!(read.await.unwrap().unwrap());
    }
    office.close().await;
    assert!(log.is_empty());
}
