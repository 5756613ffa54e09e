//! Tenant `globex` tries to get at tenant `acme`, through every method of every service.
//!
//! Why: a tenant is a whole etcd, so nothing that a client can send may read, write, count, lock, exhaust or alarm another one.
//! The list of methods comes from the service definitions: a method without an attempt here fails the test.
//!
//! What is looked at: no byte of `acme`'s comes back; `acme`'s revision, keys, leases and alarms are the same afterwards, but for
//! what it did itself; and it works while its neighbour is out of space.

#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use bytes::Bytes;
use prost::Message as _;
use tenure_etcd_shim::proto::etcdserverpb as pb;
use tenure_etcd_shim::wire::RangeResponse;
use tenure_tests::client::Connection;
use tenure_tests::server::Server;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tonic::{Code, Status};

/// Part of every key and value of `acme`'s, and of nothing else.
const SECRET: &str = "acme-secret";

/// Keys of `acme`'s; `globex` writes the first two names itself.
const KEYS: usize = 20;

/// A lease of `acme`'s.
const LEASE: i64 = 7_777;

/// Both ends of "everything".
const EVERYTHING: &[u8] = b"\0";

/// Methods that exist, as `Service/Method`, from the definitions.
fn methods() -> BTreeSet<String> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../etcd-shim/proto");
    let mut methods = BTreeSet::new();
    for file in ["rpc.proto", "health.proto", "v3lock.proto", "v3election.proto"] {
        let text = std::fs::read_to_string(dir.join(file)).unwrap();
        let package = text.lines().find_map(|line| line.strip_prefix("package ")).unwrap().trim_end_matches(';');
        let mut service = String::new();
        for line in text.lines().map(str::trim) {
            if let Some(name) = line.strip_prefix("service ") {
                service = format!("{package}.{}", name.trim_end_matches('{').trim());
            } else if let Some(name) = line.strip_prefix("rpc ") {
                methods.insert(format!("{service}/{}", name.split('(').next().unwrap().trim()));
            }
        }
    }
    assert!(methods.len() > 50, "{methods:?}");
    methods
}

fn bytes(text: impl Into<Vec<u8>>) -> Bytes {
    Bytes::from(text.into())
}

fn key(number: usize) -> Bytes {
    bytes(format!("/registry/{SECRET}/{number}"))
}

fn range(key: Bytes, range_end: &[u8]) -> pb::RangeRequest {
    pb::RangeRequest { key, range_end: Bytes::copy_from_slice(range_end), ..Default::default() }
}

/// Ranges that would find something of `acme`'s if there were anything to find.
fn ranges(acme_revision: i64) -> Vec<pb::RangeRequest> {
    let mut all = Vec::new();
    for plain in [
        range(key(0), b""),
        range(bytes(EVERYTHING), EVERYTHING),
        range(bytes("/registry/"), b"/registry0"),
        range(key(0), EVERYTHING),
        // Out of one's own prefix, if tenants were prefixes.
        range(bytes([0, 0, 0, 1, 1]), &[0xff; 16]),
        range(bytes([0xff, 0xff]), EVERYTHING),
    ] {
        for serializable in [false, true] {
            all.push(pb::RangeRequest { serializable, ..plain.clone() });
            all.push(pb::RangeRequest { serializable, count_only: true, ..plain.clone() });
            all.push(pb::RangeRequest { serializable, keys_only: true, limit: 1, ..plain.clone() });
            all.push(pb::RangeRequest { serializable, revision: acme_revision, ..plain.clone() });
            all.push(pb::RangeRequest { serializable, revision: 2, min_mod_revision: 1, ..plain.clone() });
        }
    }
    all
}

fn op(request: pb::request_op::Request) -> pb::RequestOp {
    pb::RequestOp { request: Some(request) }
}

fn txns() -> Vec<pb::TxnRequest> {
    use pb::compare::{CompareResult, CompareTarget, TargetUnion};
    use pb::request_op::Request;
    let read = op(Request::RequestRange(range(bytes(EVERYTHING), EVERYTHING)));
    let put = op(Request::RequestPut(pb::PutRequest {
        key: key(0),
        value: bytes("stolen"),
        prev_kv: true,
        ..Default::default()
    }));
    let delete = op(Request::RequestDeleteRange(pb::DeleteRangeRequest {
        key: bytes(EVERYTHING),
        range_end: bytes(EVERYTHING),
        prev_kv: true,
    }));
    let with_lease = op(Request::RequestPut(pb::PutRequest { key: key(1), lease: LEASE, ..Default::default() }));
    let exists = |range_end: &[u8]| pb::Compare {
        result: CompareResult::Greater.into(),
        target: CompareTarget::Version.into(),
        key: key(0),
        range_end: Bytes::copy_from_slice(range_end),
        target_union: Some(TargetUnion::Version(0)),
    };
    let nested = pb::TxnRequest { success: vec![read.clone(), delete.clone()], ..Default::default() };
    let branch =
        |compare: Vec<pb::Compare>, success: Vec<pb::RequestOp>| pb::TxnRequest { compare, success, failure: vec![] };
    vec![
        branch(vec![], vec![read.clone()]),
        branch(vec![], vec![put.clone(), read.clone()]),
        branch(vec![], vec![delete]),
        branch(vec![], vec![with_lease]),
        branch(vec![exists(b"")], vec![read.clone()]),
        branch(vec![exists(EVERYTHING)], vec![put]),
        branch(vec![], vec![op(Request::RequestTxn(nested))]),
    ]
}

/// What is sent to each method with one request: as many attempts as there are ways.
fn attempts(acme_revision: i64, member_id: u64) -> BTreeMap<&'static str, Vec<Vec<u8>>> {
    fn all<M: prost::Message>(messages: impl IntoIterator<Item = M>) -> Vec<Vec<u8>> {
        messages.into_iter().map(|message| message.encode_to_vec()).collect()
    }
    let mut of = BTreeMap::new();
    of.insert("KV/Range", all(ranges(acme_revision)));
    of.insert("KV/RangeStream", all(ranges(acme_revision)));
    let put = |lease, ignore_value, ignore_lease| pb::PutRequest {
        key: key(0),
        value: if ignore_value { Bytes::new() } else { bytes("stolen") },
        lease,
        prev_kv: true,
        ignore_value,
        ignore_lease,
    };
    of.insert(
        "KV/Put",
        all([put(0, false, false), put(LEASE, false, false), put(0, true, false), put(0, false, true)]),
    );
    let delete = |key: Bytes, range_end: &[u8]| pb::DeleteRangeRequest {
        key,
        range_end: Bytes::copy_from_slice(range_end),
        prev_kv: true,
    };
    of.insert(
        "KV/DeleteRange",
        all([delete(key(1), b""), delete(bytes(EVERYTHING), EVERYTHING), delete(key(0), EVERYTHING)]),
    );
    of.insert("KV/Txn", all(txns()));
    let compact = |revision, physical| pb::CompactionRequest { revision, physical };
    of.insert(
        "KV/Compact",
        all([compact(acme_revision, false), compact(acme_revision, true), compact(i64::MAX, false)]),
    );
    let grant = |id| pb::LeaseGrantRequest { ttl: 60, id };
    of.insert("Lease/LeaseGrant", all([grant(LEASE), grant(0)]));
    of.insert("Lease/LeaseRevoke", all([pb::LeaseRevokeRequest { id: LEASE }]));
    let live = |keys| pb::LeaseTimeToLiveRequest { id: LEASE, keys };
    of.insert("Lease/LeaseTimeToLive", all([live(true), live(false)]));
    of.insert("Lease/LeaseLeases", all([pb::LeaseLeasesRequest {}]));
    let urls = || vec!["http://127.0.0.1:1".to_string()];
    of.insert("Cluster/MemberAdd", all([pb::MemberAddRequest { peer_ur_ls: urls(), is_learner: true }]));
    of.insert("Cluster/MemberRemove", all([pb::MemberRemoveRequest { id: member_id }]));
    of.insert("Cluster/MemberUpdate", all([pb::MemberUpdateRequest { id: member_id, peer_ur_ls: urls() }]));
    of.insert("Cluster/MemberPromote", all([pb::MemberPromoteRequest { id: member_id }]));
    of.insert("Cluster/MemberList", all([true, false].map(|linearizable| pb::MemberListRequest { linearizable })));
    let alarm = |action, alarm| pb::AlarmRequest { action, member_id, alarm };
    of.insert("Maintenance/Alarm", all([alarm(1, 1), alarm(0, 0), alarm(2, 1), alarm(1, 2), alarm(2, 2), alarm(2, 0)]));
    of.insert("Maintenance/Status", all([pb::StatusRequest {}]));
    of.insert("Maintenance/Defragment", all([pb::DefragmentRequest {}]));
    of.insert("Maintenance/Hash", all([pb::HashRequest {}]));
    of.insert("Maintenance/HashKV", all([0, acme_revision].map(|revision| pb::HashKvRequest { revision })));
    of.insert("Maintenance/Snapshot", all([pb::SnapshotRequest {}]));
    of.insert("Maintenance/MoveLeader", all([pb::MoveLeaderRequest { target_id: member_id }]));
    of.insert("Maintenance/Downgrade", all([pb::DowngradeRequest::default()]));
    // Users and roles are not built: an empty request is enough to see that.
    for method in [
        "Auth/AuthEnable",
        "Auth/AuthDisable",
        "Auth/AuthStatus",
        "Auth/Authenticate",
        "Auth/UserAdd",
        "Auth/UserGet",
        "Auth/UserList",
        "Auth/UserDelete",
        "Auth/UserChangePassword",
        "Auth/UserGrantRole",
        "Auth/UserRevokeRole",
        "Auth/RoleAdd",
        "Auth/RoleGet",
        "Auth/RoleList",
        "Auth/RoleDelete",
        "Auth/RoleGrantPermission",
        "Auth/RoleRevokePermission",
    ] {
        of.insert(method, vec![Vec::new()]);
    }
    let mut of: BTreeMap<_, _> =
        of.into_iter().map(|(method, messages)| (leak(format!("etcdserverpb.{method}")), messages)).collect();
    // Locks and elections live in keys; a lock of this name would be `acme`'s key. Field 1 of all of them is a name or a key.
    let mut named = vec![0x0a, u8::try_from(key(0).len()).unwrap()];
    named.extend_from_slice(&key(0));
    for method in [
        "grpc.health.v1.Health/Check",
        "grpc.health.v1.Health/List",
        "v3lockpb.Lock/Lock",
        "v3lockpb.Lock/Unlock",
        "v3electionpb.Election/Campaign",
        "v3electionpb.Election/Proclaim",
        "v3electionpb.Election/Leader",
        "v3electionpb.Election/Observe",
        "v3electionpb.Election/Resign",
    ] {
        of.insert(method, vec![Vec::new(), named.clone()]);
    }
    of
}

fn leak(text: String) -> &'static str {
    Box::leak(text.into_boxed_str())
}

/// Methods whose calls stay open: tried one by one in [`streams`].
const STREAMS: [&str; 3] =
    ["etcdserverpb.Watch/Watch", "etcdserverpb.Lease/LeaseKeepAlive", "grpc.health.v1.Health/Watch"];

/// Whether there is something of `acme`'s in it: a value, or a key of those that `globex` never wrote itself.
fn contains_secret(answer: &[u8]) -> bool {
    let has = |text: &str| answer.windows(text.len()).any(|part| part == text.as_bytes());
    has(&format!("{SECRET} "))
        || has(&format!("{SECRET}/1")) && (10..KEYS).any(|number| has(&format!("{SECRET}/{number}")))
}

/// How many keys an answer to a range or a delete tells of.
fn told(method: &str, message: &[u8]) -> i64 {
    match method {
        "etcdserverpb.KV/Range" => RangeResponse::decode(message).map_or(0, |answer| answer.count),
        "etcdserverpb.KV/DeleteRange" => pb::DeleteRangeResponse::decode(message).map_or(0, |answer| answer.deleted),
        _ => 0,
    }
}

async fn unary<A: prost::Message + Default>(of: &Connection, method: &str, request: &impl prost::Message) -> A {
    of.unary(&format!("/etcdserverpb.{method}"), request).await.unwrap()
}

async fn put(of: &Connection, key: Bytes, value: &str, lease: i64) -> Result<pb::PutResponse, Status> {
    let request = pb::PutRequest { key, value: bytes(value), lease, ..Default::default() };
    of.unary("/etcdserverpb.KV/Put", &request).await
}

/// What must not move: revision, hash over all versions, leases with their keys, alarms.
async fn state_of(acme: &Connection) -> (i64, u32, i64, Vec<i64>, Vec<Bytes>, usize) {
    let hash: pb::HashKvResponse = unary(acme, "Maintenance/HashKV", &pb::HashKvRequest { revision: 0 }).await;
    let leases: pb::LeaseLeasesResponse = unary(acme, "Lease/LeaseLeases", &pb::LeaseLeasesRequest {}).await;
    let live = pb::LeaseTimeToLiveRequest { id: LEASE, keys: true };
    let live: pb::LeaseTimeToLiveResponse = unary(acme, "Lease/LeaseTimeToLive", &live).await;
    let alarms = pb::AlarmRequest { action: 0, member_id: 0, alarm: 0 };
    let alarms: pb::AlarmResponse = unary(acme, "Maintenance/Alarm", &alarms).await;
    let leases = leases.leases.iter().map(|lease| lease.id).collect();
    let revision = hash.header.unwrap().revision;
    (revision, hash.hash, hash.compact_revision, leases, live.keys, alarms.alarms.len())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_method_reaches_another_tenant() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start_with_flags(&["--quota-backend-bytes=8388608"], dir.path(), &["acme", "globex"]);
    let [acme, globex] = [Connection::open(server.address(0)).await, Connection::open(server.address(1)).await];
    let granted: pb::LeaseGrantResponse =
        unary(&acme, "Lease/LeaseGrant", &pb::LeaseGrantRequest { ttl: 9_000, id: LEASE }).await;
    let own_header = granted.header.unwrap();
    for number in 0..KEYS {
        put(&acme, key(number), &format!("{SECRET} {number}"), if number % 2 == 0 { LEASE } else { 0 }).await.unwrap();
    }
    let before = state_of(&acme).await;
    // The check can fail.
    let everything = range(bytes(EVERYTHING), EVERYTHING).encode_to_vec();
    let (own, _) = acme.bytes_of("/etcdserverpb.KV/Range", &everything).await;
    assert!(contains_secret(&own) && told("etcdserverpb.KV/Range", &own[5..]) == KEYS as i64);

    let mut tried: BTreeSet<String> = STREAMS.iter().map(ToString::to_string).collect();
    for (method, messages) in attempts(before.0, own_header.member_id) {
        tried.insert(method.to_string());
        for message in messages {
            let (answer, status) = globex.bytes_of(&format!("/{method}"), &message).await;
            assert!(!contains_secret(&answer), "{method} of {message:?} answers {answer:?}");
            assert!(
                told(method, answer.get(5..).unwrap_or_default()) <= 2,
                "{method} of {message:?} counts a neighbour's keys"
            );
            assert!(!contains_secret(status.message().as_bytes()), "{method}: {status:?}");
            let cell_wide = ["MemberAdd", "MemberRemove", "MemberUpdate", "MemberPromote", "MoveLeader"];
            if cell_wide.iter().any(|name| method.ends_with(name)) {
                assert_eq!(status.code(), Code::PermissionDenied, "{method}: {status:?}");
            }
        }
        assert_eq!(state_of(&acme).await, before, "{method} moved a neighbour");
    }
    assert_eq!(tried, methods(), "every method is tried, and every attempt is of a method");

    streams(&acme, &globex).await;
    http(&server, own_header.cluster_id).await;
    exhaustion(&acme, &globex).await;
}

/// A watch of everything, from the beginning, with what was there before; and keep-alives of a lease that is not one's own.
async fn streams(acme: &Connection, globex: &Connection) {
    let before = state_of(acme).await;
    let mut watch = globex.call("/etcdserverpb.Watch/Watch").await.unwrap();
    for watch_id in [0, 5] {
        let create = pb::WatchCreateRequest {
            key: bytes(EVERYTHING),
            range_end: bytes(EVERYTHING),
            start_revision: if watch_id == 0 { 0 } else { 1 },
            prev_kv: true,
            watch_id,
            ..Default::default()
        };
        let request = pb::watch_request::RequestUnion::CreateRequest(create);
        watch.requests.send(&pb::WatchRequest { request_union: Some(request) }).await.unwrap();
    }
    put(acme, key(0), &format!("{SECRET} event"), 0).await.unwrap();
    // Events come in the order in which they happened: this one is behind the other.
    put(globex, bytes("fence"), "own", 0).await.unwrap();
    let mut seen = Vec::new();
    while !seen.windows(5).any(|part| part == b"fence") {
        let answer: tenure_etcd_shim::wire::WatchResponse = watch.answers.message().await.unwrap();
        seen = answer.encode_to_vec();
        assert!(!contains_secret(&seen), "{seen:?}");
    }

    let mut alive = globex.call("/etcdserverpb.Lease/LeaseKeepAlive").await.unwrap();
    alive.requests.send(&pb::LeaseKeepAliveRequest { id: LEASE }).await.unwrap();
    let answer: pb::LeaseKeepAliveResponse = alive.answers.message().await.unwrap();
    let own: pb::LeaseLeasesResponse = unary(globex, "Lease/LeaseLeases", &pb::LeaseLeasesRequest {}).await;
    let is_own = own.leases.iter().any(|lease| lease.id == LEASE);
    assert_eq!(answer.ttl > 0, is_own, "a lease of the same number is one's own or none");

    let after = state_of(acme).await;
    assert_eq!((after.0, after.3, after.4.len()), (before.0 + 1, before.3, before.4.len() - 1), "its own put alone");
}

/// The HTTP side of a tenant's listener.
async fn http(server: &Server, acme_cluster_id: u64) {
    for path in ["/metrics", "/health", "/livez?verbose", "/readyz?verbose", "/version", "/debug/vars", "/v3/kv/range"]
    {
        let mut stream = tokio::net::TcpStream::connect(server.address(1)).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        for of_acme in ["acme", &format!("{acme_cluster_id}"), &format!("{acme_cluster_id:x}")] {
            assert!(!answer.contains(of_acme), "{path} says {of_acme}: {answer}");
        }
    }
}

/// Whoever is out of space is so alone, and gets nothing back of what others have.
async fn exhaustion(acme: &Connection, globex: &Connection) {
    let full = async {
        let value = "x".repeat(1 << 20);
        for number in 0.. {
            if let Err(status) = put(globex, bytes(format!("fill{number}")), &value, 0).await {
                return status;
            }
        }
        unreachable!("the quota ends it")
    };
    let status = full.await;
    assert_eq!(status.message(), "etcdserver: mvcc: database space exceeded");
    put(acme, key(0), "goes on", 0).await.unwrap();
    let alarms = state_of(acme).await.5;
    assert_eq!(alarms, 0, "an alarm is one tenant's");
    let count = pb::RangeRequest { count_only: true, ..range(bytes(EVERYTHING), EVERYTHING) };
    let counted: RangeResponse = unary(acme, "KV/Range", &count).await;
    assert_eq!(counted.count, KEYS as i64, "all of its keys");
}
