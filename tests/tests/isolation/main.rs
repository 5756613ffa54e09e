//! Tenant `globex` tries to get at tenant `acme`, through every method of every service and every field of what they are sent.
//!
//! Why: a tenant is a whole etcd, so nothing that a client can send may read, write, count, time, lock, exhaust or alarm another one.
//!
//! How it is shown: there are two cells, alike but for `acme`, which has keys, a lease and an alarm in the busy one and nothing in
//! the quiet one. `globex` has the same and does the same in both, and must be told the same, to the last byte: then no value, count,
//! compare, revision, hash, size or error that it gets depends on what `acme` has. And what `acme` has does not move.
//!
//! What is tried is held against the definitions: a service, method, field or value of an enum without an attempt fails the test.
//!
//! What a tenant can see of the cell it lives in is listed in docs/ARCHITECTURE.md.

#![allow(clippy::unwrap_used)]

mod attempts;
mod definitions;
mod world;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use prost::Message as _;
use protox::prost_reflect::{DynamicMessage, MessageDescriptor};
use tenure_admin_api::v1 as api;
use tenure_etcd_shim::proto::etcdserverpb as pb;
use tenure_etcd_shim::proto::etcdserverpb::request_op::Request;
use tenure_etcd_shim::proto::etcdserverpb::response_op::Response;
use tenure_etcd_shim::proto::etcdserverpb::watch_request::RequestUnion;
use tenure_etcd_shim::proto::grpc::health::v1::{HealthCheckRequest, HealthCheckResponse};
use tenure_etcd_shim::wire::WatchResponse;
use tenure_tests::admin;
use tenure_tests::client::{Call, Connection, framed};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tonic::Code;

use crate::attempts::{EVERYTHING, Known, LEASE, SECRET, WATCH, bytes, everything, hidden, shared};
use crate::definitions::{carried, fields, filled, methods};
use crate::world::{Cell, ask, cluster_ids, contains_secret, lease_left, put, state_of, unary};

/// Bounds what should long be over; it judges nothing.
const PATIENCE: Duration = Duration::from_secs(300);

/// A field is a way in that nobody may forget: this is what makes a new one fail until somebody has thought of it.
#[test]
fn every_field_of_every_method_is_tried() {
    let methods = methods();
    let known = Known { revision: 20, first_revision: 2, member_id: 1 };
    let mut tried: BTreeMap<&str, BTreeSet<String>> = BTreeMap::new();
    let attempts = [attempts::calls(&known), attempts::streams(&known)].concat();
    for (method, messages) in &attempts {
        let of = methods.get(method).unwrap_or_else(|| panic!("{method} is no method"));
        assert!(of.served, "{method} is not served: whatever it is sent it refuses");
        let set = messages.iter().flat_map(|message| carried(&decoded(of.input.as_ref(), message)));
        tried.entry(method).or_default().extend(set);
    }
    for (method, of) in &methods {
        let wanted = of.input.as_ref().map(fields).unwrap_or_default();
        let set = match of.served {
            true => tried.remove(method.as_str()).unwrap_or_else(|| panic!("{method} is not tried")),
            false => of.input.iter().flat_map(filled).flat_map(|message| carried(&message)).collect(),
        };
        let missing: Vec<_> = wanted.difference(&set).collect();
        assert!(missing.is_empty(), "{method} is not tried with {missing:#?}");
    }
}

fn decoded(of: Option<&MessageDescriptor>, message: &[u8]) -> DynamicMessage {
    DynamicMessage::decode(of.expect("a served method is defined").clone(), message).unwrap()
}

/// The field that names the cluster in every header.
const CLUSTER_ID: &str = "etcdserverpb.ResponseHeader.cluster_id";

/// How every attempt at a method ends that answers without a header, and why.
fn without_header(method: &str) -> Option<(Code, &'static str)> {
    match method.rsplit_once('/').unwrap() {
        (_, "MemberAdd" | "MemberRemove" | "MemberUpdate" | "MemberPromote" | "MoveLeader") => {
            Some((Code::PermissionDenied, "the members are the operator's"))
        }
        (_, "Defragment") => Some((Code::Ok, "etcd sends none either")),
        (_, "Hash" | "Snapshot" | "Downgrade") => Some((Code::Unimplemented, "not built")),
        (_, "AuthStatus") => None,
        (_, "Authenticate") => Some((Code::FailedPrecondition, "there are no users")),
        (service, _) if service.ends_with(".Auth") => Some((Code::Unimplemented, "not built")),
        _ => None,
    }
}

/// The whole of it but for streams: nothing leaks, and nothing moves.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_call_tells_of_another_tenant() {
    let ((busy, known), quiet) = tokio::join!(Cell::start_busy(), Cell::start());
    let alarm = pb::AlarmRequest { action: 1, member_id: known.member_id, alarm: 1 };
    let _: pb::AlarmResponse = unary(&busy.acme, "Maintenance/Alarm", &alarm).await;
    let before = state_of(&busy.acme).await;
    let own_id = state_of(&busy.globex).await.cluster_id;
    assert_ne!(own_id, before.cluster_id, "a cluster is one tenant's");
    assert_eq!(before.alarms.len(), 1);
    let methods = methods();
    let of = |method: &str| (methods[method].input.as_ref(), methods[method].output.as_ref().unwrap());
    secret_is_seen_by_its_owner(&busy.acme, &known, of("etcdserverpb.KV/Range").1).await;

    let mut headers: BTreeMap<String, BTreeSet<u64>> = BTreeMap::new();
    let mut left = lease_left(&busy.acme).await;
    for (method, messages) in attempts::calls(&known) {
        let (input, output) = of(&method);
        let ids = headers.entry(method.clone()).or_default();
        for message in messages {
            let [told, quiet] = [&busy, &quiet].map(|cell| ask(&cell.globex, &method, &message, output));
            let (told, quiet) = tokio::join!(told, quiet);
            let request = decoded(input, &message);
            assert!(!told.contains_secret(), "{method} of {request} answers {told:?}");
            assert_eq!(told, quiet, "{method} of {request} depends on a neighbour");
            if let Some((code, why)) = without_header(&method) {
                assert_eq!(told.code, code, "{method} of {request}, {why}: {told:?}");
            }
            ids.extend(told.messages.iter().flat_map(cluster_ids));
        }
        assert_eq!(state_of(&busy.acme).await, before, "{method} moved a neighbour");
        let left_before = std::mem::replace(&mut left, lease_left(&busy.acme).await);
        assert!(left <= left_before, "{method} renewed a neighbour's lease: {left} after {left_before}");
    }
    for (method, ids) in headers {
        let has_header = fields(of(&method).1).contains(CLUSTER_ID);
        let expected = (has_header && without_header(&method).is_none()).then_some(own_id);
        assert_eq!(ids, expected.into_iter().collect(), "the clusters that {method} speaks of");
    }
}

/// What is looked for can be found.
async fn secret_is_seen_by_its_owner(acme: &Connection, known: &Known, output: &MessageDescriptor) {
    let (method, messages) = attempts::calls(known).swap_remove(0);
    let mut seen = false;
    for message in messages {
        seen |= ask(acme, &method, &message, output).await.contains_secret();
    }
    assert!(seen, "{method} finds what is there");
}

/// What is not for tenants is not there for them, whatever they send: administration, and what members ask each other.
#[tokio::test]
async fn no_tenant_gets_at_what_is_not_served() {
    let cell = Cell::start().await;
    let mut refused = 0;
    for (method, of) in methods().iter().filter(|(_, of)| !of.served) {
        let mut messages: Vec<_> = of.input.iter().flat_map(filled).map(|message| message.encode_to_vec()).collect();
        messages.push(Vec::new());
        for message in messages {
            let (answer, status) = cell.globex.bytes_of(&format!("/{method}"), &message).await;
            let (service, _) = method.rsplit_once('/').unwrap();
            assert_eq!(status.code(), Code::Unimplemented, "{method}: {status:?}");
            assert_eq!(status.message(), format!("unknown service {service}"));
            assert!(answer.is_empty(), "{method} answers {answer:?}");
        }
        refused += 1;
    }
    assert!(refused > 20, "all of the admin API, all that members ask, locks and elections: {refused}");
}

/// A compare is a question that is answered by one bit: of a key that only a neighbour has it has to be the answer for a key that
/// nobody has, and the branch that runs counts one's own keys.
#[tokio::test]
async fn a_compare_tells_nothing_of_another_tenant() {
    let (cell, known) = Cell::start_busy().await;
    let own = state_of(&cell.globex).await.keys;
    // By target: those that tell `acme` its key apart from none.
    let mut telling = BTreeSet::new();
    for range_end in [None, Some(b'0')] {
        // "/registry/acme-secret/" to "/registry/acme-secret0", and the same of nobody.
        let [of_acme, of_nobody] = [hidden(0), bytes("/registry/nobody/0")].map(|key| match range_end {
            None => attempts::compares(&known, &key, b""),
            Some(last) => {
                let start = key.slice(..key.len() - 1);
                let end = [&key[..key.len() - 2], &[last]].concat();
                attempts::compares(&known, &start, &end)
            }
        });
        for (of_acme, of_nobody) in of_acme.into_iter().zip(of_nobody) {
            for depth in [0, 1] {
                let there = compared(&cell.globex, &of_acme, depth).await;
                assert_eq!(there, compared(&cell.globex, &of_nobody, depth).await, "{of_acme:?} tells of a neighbour");
                assert_eq!(there.1, own, "the branch counts one's own keys");
                if compared(&cell.acme, &of_acme, depth).await.0 != there.0 {
                    telling.insert((of_acme.target, depth, range_end));
                }
            }
        }
    }
    assert_eq!(telling.len(), 5 * 2 * 2, "each target could tell: {telling:?}");
}

/// How a compare comes out in a txn or, with a depth of 1, in a txn in it; and how many keys the branch counts that runs then.
async fn compared(tenant: &Connection, compare: &pb::Compare, depth: usize) -> (bool, i64) {
    let count = || attempts::op(Request::RequestRange(pb::RangeRequest { count_only: true, ..everything() }));
    // One branch is longer.
    let txn =
        pb::TxnRequest { compare: vec![compare.clone()], success: vec![count()], failure: vec![count(), count()] };
    let mut request = txn;
    for _ in 0..depth {
        request = attempts::nested(request);
    }
    let mut answer: pb::TxnResponse = unary(tenant, "KV/Txn", &request).await;
    for _ in 0..depth {
        assert!(answer.succeeded, "nothing is compared outside");
        let Some(Response::ResponseTxn(inner)) = answer.responses.remove(0).response else { panic!("{answer:?}") };
        answer = inner;
    }
    let counts: BTreeSet<i64> = answer.responses.iter().map(counted).collect();
    assert_eq!(answer.responses.len(), if answer.succeeded { 1 } else { 2 }, "the branch that was compared for");
    assert_eq!(counts.len(), 1, "{answer:?}");
    (answer.succeeded, counts.into_iter().next().unwrap())
}

fn counted(of: &pb::ResponseOp) -> i64 {
    let Some(Response::ResponseRange(range)) = &of.response else { panic!("{of:?}") };
    range.count
}

/// A watch of everything, from the beginning, sees one's own; and one's numbers end nobody else's watch.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_stream_tells_of_another_tenant() {
    let ((busy, known), quiet) = tokio::join!(Cell::start_busy(), Cell::start());
    let mut of_acme = busy.acme.call("/etcdserverpb.Watch/Watch").await.unwrap();
    let own = pb::WatchCreateRequest { key: hidden(0), watch_id: WATCH, ..Default::default() };
    of_acme.requests.send(&attempts::create(own)).await.unwrap();
    let created: WatchResponse = of_acme.answers.message().await.unwrap();
    assert_eq!((created.created, created.watch_id), (true, WATCH));
    let before = state_of(&busy.acme).await;

    let seen = tokio::time::timeout(PATIENCE, watched(&busy, &known, Some(&busy.acme))).await.expect("progress");
    let quiet_seen = tokio::time::timeout(PATIENCE, watched(&quiet, &known, None)).await.expect("progress");
    assert_eq!(seen, quiet_seen, "a watch depends on a neighbour");
    assert!(seen.values().any(|seen| !seen.events.is_empty()), "it sees its own");

    let event: WatchResponse = of_acme.answers.message().await.unwrap();
    assert_eq!((event.canceled, event.watch_id, event.event_count()), (false, WATCH, 1), "its watch goes on");
    let after = state_of(&busy.acme).await;
    assert_eq!((after.revision, after.leases), (before.revision + 1, before.leases), "its own put alone");

    for service in ["", "acme"] {
        assert_eq!(health(&busy.globex, service).await, health(&quiet.globex, service).await);
    }
}

/// What one watch was told.
#[derive(Debug, Default, PartialEq)]
struct Seen {
    /// All but events, without the header.
    told: Vec<WatchResponse>,
    /// In whatever pieces they came.
    events: Vec<u8>,
}

/// What each watch of `globex` is told until it has all events of its own; `acme` writes meanwhile.
async fn watched(cell: &Cell, known: &Known, acme: Option<&Connection>) -> BTreeMap<i64, Seen> {
    let own_id = state_of(&cell.globex).await.cluster_id;
    let mut seen: BTreeMap<i64, Seen> = BTreeMap::new();
    let mut take = |mut answer: WatchResponse| {
        assert!(!contains_secret(&answer.encode_to_vec()), "{answer:?}");
        assert_eq!(answer.header.take().unwrap().cluster_id, own_id);
        let of_watch = seen.entry(answer.watch_id).or_default();
        of_watch.events.extend_from_slice(&std::mem::take(&mut answer.events));
        // How often is a matter of time.
        if answer != (WatchResponse { watch_id: answer.watch_id, ..WatchResponse::default() }) {
            of_watch.told.push(answer);
        }
    };
    let mut call = cell.globex.call("/etcdserverpb.Watch/Watch").await.unwrap();
    let mut unconfirmed = 0;
    for request in attempts::watches(known) {
        call.requests.send(&request).await.unwrap();
        unconfirmed += usize::from(matches!(request.request_union, Some(RequestUnion::CreateRequest(_))));
    }
    // All of them begin before what is written now.
    while unconfirmed > 0 {
        let answer: WatchResponse = call.answers.message().await.unwrap();
        unconfirmed -= usize::from(answer.created);
        take(answer);
    }
    if let Some(acme) = acme {
        put(acme, hidden(0), SECRET, 0).await.unwrap();
    }
    put(&cell.globex, shared(0), "event", 0).await.unwrap();
    let delete = pb::DeleteRangeRequest { key: shared(0), ..Default::default() };
    let deleted: pb::DeleteRangeResponse = unary(&cell.globex, "KV/DeleteRange", &delete).await;
    let last_revision = deleted.header.unwrap().revision;
    // No progress is told while there is a watch that has not begun.
    for watch_id in attempts::FUTURE_WATCHES {
        call.requests.send(&attempts::cancel(watch_id)).await.unwrap();
    }
    // Answered when all watches have been told all there was before, and not at all until then.
    let mut ask = tokio::time::interval(Duration::from_millis(50));
    loop {
        let answer = tokio::select! {
            answer = call.answers.message::<WatchResponse>() => answer.unwrap(),
            _ = ask.tick() => {
                call.requests.send(&attempts::progress()).await.unwrap();
                continue;
            }
        };
        let revision = answer.header.unwrap().revision;
        assert!(revision <= last_revision, "{answer:?}");
        if answer.watch_id == -1 && !answer.created && revision == last_revision {
            return seen;
        }
        take(answer);
    }
}

async fn health(tenant: &Connection, service: &str) -> HealthCheckResponse {
    let mut call = tenant.call("/grpc.health.v1.Health/Watch").await.unwrap();
    let request = HealthCheckRequest { service: service.to_string() };
    call.requests.send_bytes(framed(&request.encode_to_vec()), true).await.unwrap();
    call.answers.message().await.unwrap()
}

/// The HTTP side of a tenant's listener: the same for a tenant with a busy neighbour as for one with a quiet one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_page_tells_of_another_tenant() {
    let ((busy, _), quiet) = tokio::join!(Cell::start_busy(), Cell::start());
    let get = ["/metrics", "/health", "/livez?verbose", "/readyz?verbose", "/version", "/debug/vars", "/v3/kv/range"];
    let post = ["/v3/kv/range", "/v3/kv/txn", "/v3/lease/leases", "/v3/maintenance/status", "/v3/cluster/member/list"];
    for (method, path) in get.map(|path| ("GET", path)).into_iter().chain(post.map(|path| ("POST", path))) {
        let [told, quiet] = [&busy, &quiet].map(|cell| page(cell, method, path));
        let (told, quiet) = tokio::join!(told, quiet);
        let differ: Vec<_> = told.symmetric_difference(&quiet).collect();
        assert!(differ.is_empty(), "{method} {path} depends on a neighbour: {differ:#?}");
        assert!(!told.iter().any(|line| line.contains("acme")), "{method} {path} says {told:#?}");
        if method == "POST" {
            let is_refused = told.iter().any(|line| line.starts_with("HTTP/1.1 501"));
            assert!(is_refused, "whoever builds the gateway tries it as the methods are: {told:#?}");
        }
    }
}

/// The lines of a page, without the time of day, and how long one's own calls took.
async fn page(cell: &Cell, method: &str, path: &str) -> BTreeSet<String> {
    let body = r#"{"key":"AA==","range_end":"AA=="}"#;
    let mut stream = tokio::net::TcpStream::connect(cell.address_of_globex()).await.unwrap();
    let length = body.len();
    let request = format!(
        "{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{body}"
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    let is_time = |line: &&str| {
        ["date:", "content-length:", "grpc_server_handling_seconds"].iter().any(|of_time| line.starts_with(of_time))
    };
    answer.lines().filter(|line| !is_time(line)).map(ToString::to_string).collect()
}

/// What a tenant can look at again and again does not move while a neighbour works, so it cannot tell when that does.
#[tokio::test]
async fn a_neighbours_work_is_not_seen() {
    let (cell, known) = Cell::start_busy().await;
    let mut watch = cell.globex.call("/etcdserverpb.Watch/Watch").await.unwrap();
    watch.requests.send(&attempts::create(pb::WatchCreateRequest::default())).await.unwrap();
    let created: WatchResponse = watch.answers.message().await.unwrap();
    assert!(created.created);
    let of_acme = state_of(&cell.acme).await.revision;
    let before = observed(&cell.globex, &mut watch).await;
    work(&cell.acme, known.member_id).await;
    assert!(state_of(&cell.acme).await.revision > of_acme, "it worked");
    assert_eq!(observed(&cell.globex, &mut watch).await, before);

    let status: pb::StatusResponse = unary(&cell.globex, "Maintenance/Status", &pb::StatusRequest {}).await;
    let revision = status.header.unwrap().revision;
    let as_index = revision.unsigned_abs();
    assert_eq!(
        (status.raft_index, status.raft_applied_index),
        (as_index, as_index),
        "not the log's, which all write to"
    );
    let next = put(&cell.globex, shared(0), "next", 0).await.unwrap();
    assert_eq!(next.header.unwrap().revision, revision + 1);
    // Numbers of the server's choice do not count what others were given: one begins anew in each stream, one is drawn.
    let mut watch = cell.globex.call("/etcdserverpb.Watch/Watch").await.unwrap();
    watch.requests.send(&attempts::create(pb::WatchCreateRequest::default())).await.unwrap();
    let created: WatchResponse = watch.answers.message().await.unwrap();
    assert_eq!(created.watch_id, 0);
    for _ in 0..4 {
        let grant = pb::LeaseGrantRequest { ttl: 60, id: 0 };
        let granted: pb::LeaseGrantResponse = unary(&cell.globex, "Lease/LeaseGrant", &grant).await;
        // Once in 500 million times a drawn one is as low.
        assert!(granted.id > 1 << 32, "{granted:?} was counted");
    }
}

/// All that `globex` is told without doing anything.
async fn observed(globex: &Connection, watch: &mut Call) -> Vec<String> {
    let methods = methods();
    let looks = [
        "KV/Range",
        "Lease/LeaseLeases",
        "Lease/LeaseTimeToLive",
        "Maintenance/Alarm",
        "Maintenance/Status",
        "Maintenance/HashKV",
        "Cluster/MemberList",
        "Auth/AuthStatus",
    ];
    let mut observed = Vec::new();
    for method in looks.map(|method| format!("etcdserverpb.{method}")) {
        let message = if method.ends_with("Range") { everything().encode_to_vec() } else { Vec::new() };
        let answer = ask(globex, &method, &message, methods[&method].output.as_ref().unwrap()).await;
        assert_eq!(answer.code, Code::Ok, "{method}: {answer:?}");
        observed.push(format!("{method} {answer:?}"));
    }
    watch.requests.send(&attempts::progress()).await.unwrap();
    let progress: WatchResponse = watch.answers.message().await.unwrap();
    observed.push(format!("{progress:?}"));
    observed
}

/// Some of everything that a tenant does.
async fn work(acme: &Connection, member_id: u64) {
    for number in 0..20 {
        put(acme, hidden(number), "at work", 0).await.unwrap();
    }
    let delete = pb::DeleteRangeRequest { key: hidden(0), ..Default::default() };
    let deleted: pb::DeleteRangeResponse = unary(acme, "KV/DeleteRange", &delete).await;
    let compact = pb::CompactionRequest { revision: deleted.header.unwrap().revision, physical: true };
    let _: pb::CompactionResponse = unary(acme, "KV/Compact", &compact).await;
    let _: pb::LeaseGrantResponse = unary(acme, "Lease/LeaseGrant", &pb::LeaseGrantRequest { ttl: 60, id: 1 }).await;
    let _: pb::LeaseRevokeResponse = unary(acme, "Lease/LeaseRevoke", &pb::LeaseRevokeRequest { id: LEASE }).await;
    let alarm = pb::AlarmRequest { action: 1, member_id, alarm: 1 };
    let _: pb::AlarmResponse = unary(acme, "Maintenance/Alarm", &alarm).await;
    let mut watch = acme.call("/etcdserverpb.Watch/Watch").await.unwrap();
    watch.requests.send(&attempts::create(pb::WatchCreateRequest::default())).await.unwrap();
    let _: WatchResponse = watch.answers.message().await.unwrap();
}

/// Of each kind so many for `globex`, and no more.
const FEW: u64 = 4;

/// Whoever is at its limits is so alone: at that of space, with its alarm, of leases and of watchers.
#[tokio::test]
async fn a_tenant_at_its_limits_is_so_alone() {
    let (cell, _) = Cell::start_busy().await;
    let before = state_of(&cell.acme).await;
    let limits =
        api::Limits { stored_bytes: Some(4 << 20), leases: Some(FEW), watchers: Some(FEW), ..Default::default() };
    let limits = api::UpdateTenantRequest { name: "globex".to_string(), limits: Some(limits), ..Default::default() };
    admin::connect(&cell.dir.path().join("admin.sock")).update_tenant(limits).await.unwrap();

    let mut granted = 0;
    let refused = loop {
        let grant = pb::LeaseGrantRequest { ttl: 60, id: 0 };
        match cell.globex.unary::<_, pb::LeaseGrantResponse>("/etcdserverpb.Lease/LeaseGrant", &grant).await {
            Ok(_) => granted += 1,
            Err(status) => break status,
        }
    };
    assert_eq!((granted, refused.message()), (FEW, "etcdserver: too many requests"));
    let mut watch = cell.globex.call("/etcdserverpb.Watch/Watch").await.unwrap();
    for number in 0..=FEW {
        let (key, range_end) = (bytes(EVERYTHING), bytes(EVERYTHING));
        let create = pb::WatchCreateRequest { key, range_end, ..Default::default() };
        watch.requests.send(&attempts::create(create)).await.unwrap();
        let created: WatchResponse = watch.answers.message().await.unwrap();
        assert_eq!(created.canceled, number == FEW, "{created:?}");
    }
    let value = "x".repeat(1 << 20);
    let refused = loop {
        if let Err(status) = put(&cell.globex, bytes("fill"), &value, 0).await {
            break status;
        }
    };
    assert_eq!(refused.message(), "etcdserver: mvcc: database space exceeded");
    assert_eq!(state_of(&cell.globex).await.alarms.len(), 1);

    assert_eq!(state_of(&cell.acme).await, before, "a tenant at its limits moved a neighbour");
    let grants = 2 * FEW;
    for _ in 0..grants {
        let grant = pb::LeaseGrantRequest { ttl: 60, id: 0 };
        let _: pb::LeaseGrantResponse = unary(&cell.acme, "Lease/LeaseGrant", &grant).await;
    }
    let mut watch = cell.acme.call("/etcdserverpb.Watch/Watch").await.unwrap();
    for _ in 0..grants {
        let create = pb::WatchCreateRequest { key: hidden(0), ..Default::default() };
        watch.requests.send(&attempts::create(create)).await.unwrap();
        let created: WatchResponse = watch.answers.message().await.unwrap();
        assert!(!created.canceled, "{created:?}");
    }
    put(&cell.acme, hidden(0), &value, 0).await.unwrap();
    let event: WatchResponse = watch.answers.message().await.unwrap();
    assert_eq!(event.event_count(), 1);
}
