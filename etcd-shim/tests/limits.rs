//! What holds a tenant back, as its clients meet it over gRPC: set by an operator while it runs, told in etcd's words, felt by nobody else,
//! and over when the operator says so. The bytes it is sent in a second are in `admin.rs`.

#![allow(clippy::unwrap_used)]

mod client;
mod scene;

use std::collections::BTreeMap;
use std::error::Error as _;
use std::time::Duration;

use bytes::{BufMut as _, Bytes, BytesMut};
use futures::channel::mpsc::{UnboundedSender, unbounded};
use futures::future::join_all;
use http::Request as HttpRequest;
use http::uri::PathAndQuery;
use hyper_util::rt::TokioIo;
use prost::Message;
use tenure_admin_api::v1::{self as api, State, top_response};
use tenure_etcd_shim::codec::WireCodec;
use tenure_etcd_shim::proto::etcdserverpb as pb;
use tenure_etcd_shim::proto::etcdserverpb::request_op::Request as Op;
use tenure_etcd_shim::proto::etcdserverpb::watch_request::RequestUnion;
use tenure_etcd_shim::storage::limits::{EMPTY_TENANT_BYTES, VERSION_OVERHEAD_BYTES};
use tenure_etcd_shim::wire::{RangeResponse, WatchResponse};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tonic::client::Grpc;
use tonic::codec::CompressionEncoding;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status, Streaming};

use client::{Identity, Secured};
use scene::{Scene, closed};

const TOO_MANY: (Code, &str) = (Code::ResourceExhausted, "etcdserver: too many requests");
const NO_SPACE: (Code, &str) = (Code::ResourceExhausted, "etcdserver: mvcc: database space exceeded");
const READ_ONLY: (Code, &str) = (Code::PermissionDenied, "etcdserver: tenant is read-only");
const TOO_LARGE: (Code, &str) = (Code::InvalidArgument, "etcdserver: request is too large");
const TIMED_OUT: (Code, &str) = (Code::Unavailable, "etcdserver: request timed out");

const NOSPACE_ALARM: i32 = 1;

/// Within so much a member closes the connections of who has to leave: `admin.proto` promises it.
const LEAVE_WITHIN: Duration = Duration::from_secs(1);

/// A gRPC client of a tenant on one connection, which it does not make anew.
#[derive(Clone)]
struct Caller(Grpc<Channel>);

/// A request's message, and where it goes.
trait Call: Message + Send + Sync + 'static {
    type Answer: Message + Default + Send + Sync + 'static;
    const PATH: &'static str;
}

macro_rules! calls {
    ($($request:ty => $answer:ty, $path:literal;)*) => {
        $(impl Call for $request {
            type Answer = $answer;
            const PATH: &'static str = $path;
        })*
    };
}

calls! {
    pb::PutRequest => pb::PutResponse, "/etcdserverpb.KV/Put";
    pb::RangeRequest => RangeResponse, "/etcdserverpb.KV/Range";
    pb::DeleteRangeRequest => pb::DeleteRangeResponse, "/etcdserverpb.KV/DeleteRange";
    pb::TxnRequest => pb::TxnResponse, "/etcdserverpb.KV/Txn";
    pb::CompactionRequest => pb::CompactionResponse, "/etcdserverpb.KV/Compact";
    pb::LeaseGrantRequest => pb::LeaseGrantResponse, "/etcdserverpb.Lease/LeaseGrant";
    pb::LeaseRevokeRequest => pb::LeaseRevokeResponse, "/etcdserverpb.Lease/LeaseRevoke";
    pb::AlarmRequest => pb::AlarmResponse, "/etcdserverpb.Maintenance/Alarm";
    pb::StatusRequest => pb::StatusResponse, "/etcdserverpb.Maintenance/Status";
    pb::WatchRequest => WatchResponse, "/etcdserverpb.Watch/Watch";
    pb::LeaseKeepAliveRequest => pb::LeaseKeepAliveResponse, "/etcdserverpb.Lease/LeaseKeepAlive";
}

impl Caller {
    async fn new(scene: &Scene, identity: &Identity) -> Self {
        let mut stream = Some(TokioIo::new(scene.connect(identity).await.unwrap()));
        let connector = tower::service_fn(move |_| {
            let stream = stream.take().ok_or_else(|| std::io::Error::other("there was one connection"));
            async move { stream }
        });
        let channel = Endpoint::from_static("http://localhost").connect_with_connector(connector).await.unwrap();
        Caller(Grpc::new(channel))
    }

    async fn call<Q: Call>(&self, message: Q) -> Result<Q::Answer, Status> {
        let mut grpc = self.0.clone();
        grpc.ready().await.unwrap();
        let (path, codec) = (PathAndQuery::from_static(Q::PATH), WireCodec::<Q, Q::Answer>::default());
        Ok(grpc.unary(Request::new(message), path, codec).await?.into_inner())
    }

    async fn put(&self, key: &str, value: &[u8]) -> Result<pb::PutResponse, Status> {
        self.call(put_request(key, value)).await
    }

    /// Everything from a key on.
    async fn range(&self, key: &str) -> Result<RangeResponse, Status> {
        self.call(everything_from(key)).await
    }

    async fn grant(&self, id: i64) -> Result<pb::LeaseGrantResponse, Status> {
        self.call(pb::LeaseGrantRequest { id, ttl: 600 }).await
    }

    async fn revoke(&self, id: i64) -> Result<pb::LeaseRevokeResponse, Status> {
        self.call(pb::LeaseRevokeRequest { id }).await
    }

    async fn compact(&self, revision: i64) -> Result<pb::CompactionResponse, Status> {
        self.call(pb::CompactionRequest { revision, physical: true }).await
    }

    /// Opens a stream whose first messages are there before anything is sent, so that they are sent together.
    async fn stream<Q: Call>(&self, first: impl IntoIterator<Item = Q>) -> Result<Stream<Q>, Status> {
        let (requests, sent) = unbounded();
        for message in first {
            requests.unbounded_send(message).unwrap();
        }
        let mut grpc = self.0.clone();
        grpc.ready().await.unwrap();
        let (path, codec) = (PathAndQuery::from_static(Q::PATH), WireCodec::<Q, Q::Answer>::default());
        let answers = grpc.streaming(Request::new(sent), path, codec).await?.into_inner();
        Ok(Stream { requests, answers })
    }

    /// As `etcdctl alarm disarm`: asks which there are, and clears one after the other. Answers how many there were.
    async fn disarm(&self) -> usize {
        let alarms = self.call(pb::AlarmRequest::default()).await.unwrap().alarms;
        for alarm in &alarms {
            let action = pb::alarm_request::AlarmAction::Deactivate.into();
            let clear = pb::AlarmRequest { action, member_id: alarm.member_id, alarm: alarm.alarm };
            assert_eq!(self.call(clear).await.unwrap().alarms.len(), 1);
        }
        alarms.len()
    }
}

/// A stream that goes on until it is dropped.
struct Stream<Q: Call> {
    requests: UnboundedSender<Q>,
    answers: Streaming<Q::Answer>,
}

impl<Q: Call> Stream<Q> {
    async fn next(&mut self) -> Q::Answer {
        self.answers.message().await.unwrap().expect("the stream goes on")
    }

    async fn ask(&mut self, message: Q) -> Q::Answer {
        self.requests.unbounded_send(message).unwrap();
        self.next().await
    }

    /// What it ends with, whatever comes before.
    async fn ended(&mut self) -> Status {
        loop {
            match self.answers.message().await {
                Ok(Some(_)) => {}
                Ok(None) => return Status::ok(""),
                Err(status) => return status,
            }
        }
    }
}

fn put_request(key: &str, value: &[u8]) -> pb::PutRequest {
    let (key, value) = (Bytes::copy_from_slice(key.as_bytes()), Bytes::copy_from_slice(value));
    pb::PutRequest { key, value, ..Default::default() }
}

fn everything_from(key: &str) -> pb::RangeRequest {
    let key = Bytes::copy_from_slice(key.as_bytes());
    pb::RangeRequest { key, range_end: Bytes::from_static(b"\0"), ..Default::default() }
}

fn delete_request(key: &str) -> pb::DeleteRangeRequest {
    pb::DeleteRangeRequest { key: Bytes::copy_from_slice(key.as_bytes()), ..Default::default() }
}

/// Runs the first list, for want of compares.
fn txn_request(success: Vec<Op>, failure: Vec<Op>) -> pb::TxnRequest {
    let ops = |ops: Vec<Op>| ops.into_iter().map(|op| pb::RequestOp { request: Some(op) }).collect();
    pb::TxnRequest { compare: Vec::new(), success: ops(success), failure: ops(failure) }
}

fn watch_request(key: &str) -> pb::WatchRequest {
    let create = pb::WatchCreateRequest { key: Bytes::copy_from_slice(key.as_bytes()), ..Default::default() };
    pb::WatchRequest { request_union: Some(RequestUnion::CreateRequest(create)) }
}

/// A scene with two tenants: one that is held back, and its neighbour.
struct Play {
    scene: Scene,
    acme: Caller,
    globex: Caller,
    /// acme's.
    identity: Identity,
}

impl Play {
    async fn new() -> Self {
        let mut scene = Scene::new().await;
        scene.create("acme").await;
        scene.create("globex").await;
        let (identity, _) = scene.credentials("acme").await;
        let (of_globex, _) = scene.credentials("globex").await;
        let (acme, globex) = (Caller::new(&scene, &identity).await, Caller::new(&scene, &of_globex).await);
        Play { scene, acme, globex, identity }
    }

    /// Streams are open, which nobody waits for.
    async fn end(self) {
        self.scene.tenure.stop_hurried_by(std::future::ready(())).await;
    }

    /// Sets limits of acme's; those that are not mentioned stay, 0 is none.
    async fn limit(&mut self, limits: api::Limits) {
        let update = api::UpdateTenantRequest { name: "acme".to_string(), limits: Some(limits), ..Default::default() };
        self.scene.admin.update_tenant(update).await.unwrap();
    }

    /// Takes a limit of acme's back.
    async fn lift(&mut self, limit: &str) {
        let reset_limits = vec![limit.to_string()];
        let update = api::UpdateTenantRequest { name: "acme".to_string(), reset_limits, ..Default::default() };
        self.scene.admin.update_tenant(update).await.unwrap();
    }

    async fn usage(&mut self, tenant: &str) -> api::Usage {
        let request = api::GetTenantRequest { name: tenant.to_string() };
        self.scene.admin.get_tenant(request).await.unwrap().into_inner().tenant.unwrap().usage.unwrap()
    }

    /// What a tenant does and did.
    async fn top(&mut self, tenant: &str) -> top_response::Row {
        let top = self.scene.admin.top(api::TopRequest { limit: 0 }).await.unwrap().into_inner();
        top.rows.into_iter().find(|row| row.tenant == tenant).unwrap()
    }

    /// How often something of a tenant had to wait or was refused.
    async fn throttled(&mut self, tenant: &str) -> u64 {
        self.top(tenant).await.throttled
    }

    async fn until_throttled(&mut self) {
        while self.throttled("acme").await == 0 {
            tokio::task::yield_now().await;
        }
    }

    /// The neighbour goes on, and nothing of it is held back.
    async fn the_neighbour_feels_nothing(&mut self) {
        self.globex.put("k", b"v").await.unwrap();
        assert_eq!(self.throttled("globex").await, 0);
    }

    /// The member's metrics, each line's name and labels with its value.
    async fn scrape(&self) -> BTreeMap<String, f64> {
        let mut stream = TcpStream::connect(self.scene.tenure.addresses()[2]).await.unwrap();
        let request = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
        stream.write_all(request).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        let (_, body) = answer.split_once("\r\n\r\n").unwrap();
        let lines = body.lines().filter(|line| !line.starts_with('#'));
        let pairs = lines.filter_map(|line| line.rsplit_once(' '));
        pairs.map(|(name, value)| (name.to_string(), value.parse().unwrap())).collect()
    }
}

fn assert_refused<T: std::fmt::Debug>(answer: Result<T, Status>, expected: (Code, &str), what: &str) {
    let status = answer.expect_err(what);
    assert_eq!((status.code(), status.message()), expected, "{what}");
}

/// What makes a tenant grow, each with its answer. The txn would put if its compares did not hold.
async fn grow(caller: &Caller, key: &str) -> Vec<(&'static str, Result<(), Status>)> {
    let put = || Op::RequestPut(put_request(key, b"v"));
    let range = Op::RequestRange(everything_from(key));
    vec![
        ("put", caller.put(key, b"v").await.map(drop)),
        ("txn that puts", caller.call(txn_request(vec![put()], Vec::new())).await.map(drop)),
        ("txn that may put", caller.call(txn_request(vec![range], vec![put()])).await.map(drop)),
        ("lease grant", caller.grant(0).await.map(drop)),
    ]
}

/// What does not, on a tenant that has the key "kept", a key on lease 7, lease 8 and something to delete as "first" and "second".
async fn do_not_grow(caller: &Caller) {
    let all = caller.range("a").await.unwrap();
    assert!(all.count >= 4, "{all:?}");
    let get = Op::RequestRange(everything_from("kept"));
    assert!(caller.call(txn_request(vec![get], Vec::new())).await.unwrap().succeeded);
    assert_eq!(caller.call(delete_request("first")).await.unwrap().deleted, 1);
    let delete = Op::RequestDeleteRange(delete_request("second"));
    caller.call(txn_request(vec![delete], Vec::new())).await.unwrap();
    let mut keep_alive = caller.stream([pb::LeaseKeepAliveRequest { id: 8 }]).await.unwrap();
    assert_eq!(keep_alive.next().await.ttl, 600);
    caller.revoke(7).await.unwrap();
    let left = caller.range("a").await.unwrap();
    assert_eq!(left.count, all.count - 3, "two deleted, one gone with its lease");
    caller.compact(left.header.unwrap().revision).await.unwrap();
}

/// What [`do_not_grow`] needs.
async fn furnish(caller: &Caller) {
    for key in ["kept", "first", "second"] {
        caller.put(key, b"v").await.unwrap();
    }
    for lease in [7, 8] {
        caller.grant(lease).await.unwrap();
    }
    caller.call(pb::PutRequest { lease: 7, ..put_request("leased", b"v") }).await.unwrap();
}

// A tenant that stores too much must be able to help itself, with the tools that etcd's users know, and must not fill its neighbours' disk.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn over_its_stored_bytes_a_tenant_may_still_shrink() {
    let mut play = Play::new().await;
    let acme = play.acme.clone();
    furnish(&acme).await;
    for _ in 0..10 {
        acme.put("overwritten", &[7; 4 << 10]).await.unwrap();
    }
    let stored_bytes = play.usage("acme").await.stored_bytes;
    play.limit(api::Limits { stored_bytes: Some(stored_bytes), ..Default::default() }).await;
    assert_eq!(play.usage("acme").await.alarms, [""; 0], "a limit alone raises none");
    assert_refused(acme.put("k", b"").await, NO_SPACE, "put");

    assert_eq!(play.usage("acme").await.alarms, ["NOSPACE"]);
    let status = acme.call(pb::StatusRequest {}).await.unwrap();
    assert!(status.errors.iter().any(|error| error.contains("alarm:NOSPACE")), "{:?}", status.errors);
    assert_eq!(status.db_size_quota, i64::try_from(stored_bytes).unwrap());
    for (what, answer) in grow(&acme, "k").await {
        assert_refused(answer, NO_SPACE, what);
    }
    // Disarmed while it is full it is raised again.
    assert_eq!(acme.disarm().await, 1);
    assert_refused(acme.put("k", b"").await, NO_SPACE, "still full");
    assert_eq!(play.usage("acme").await.alarms, ["NOSPACE"]);

    // Not the neighbour's: neither the alarm nor its end.
    assert_eq!(play.usage("globex").await.alarms, [""; 0]);
    assert_eq!(play.globex.disarm().await, 0);
    for (what, answer) in grow(&play.globex, "k").await {
        answer.expect(what);
    }

    // Compacted, there is room; the alarm waits for its user.
    do_not_grow(&acme).await;
    assert!(play.usage("acme").await.stored_bytes < stored_bytes - (30 << 10));
    assert_refused(acme.put("k", b"v").await, NO_SPACE, "the alarm is there");
    let alarms = acme.call(pb::AlarmRequest::default()).await.unwrap().alarms;
    assert_eq!(alarms.iter().map(|alarm| alarm.alarm).collect::<Vec<_>>(), [NOSPACE_ALARM]);
    assert_eq!(acme.disarm().await, 1);
    for (what, answer) in grow(&acme, "k").await {
        answer.expect(what);
    }

    // Full again, and the limit lifted.
    let stored_bytes = play.usage("acme").await.stored_bytes;
    play.limit(api::Limits { stored_bytes: Some(stored_bytes), ..Default::default() }).await;
    assert_refused(acme.put("k", b"v").await, NO_SPACE, "full");
    play.lift("stored_bytes").await;
    assert_eq!(acme.disarm().await, 1);
    acme.put("k", b"v").await.unwrap();
    play.the_neighbour_feels_nothing().await;
    play.end().await;
}

// What an operator does to a tenant that must not change much: it can be read, and emptied by its clients. Who is full besides hears of the
// operator's word first, since making room would not help.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_read_only_tenant_may_shrink() {
    let mut play = Play::new().await;
    let acme = play.acme.clone();
    furnish(&acme).await;
    let mut watch = acme.stream([watch_request("first")]).await.unwrap();
    assert!(watch.next().await.created);
    play.scene.set_state("acme", State::ReadOnly).await;
    for (what, answer) in grow(&acme, "k").await {
        assert_refused(answer, READ_ONLY, what);
    }
    play.limit(api::Limits { stored_bytes: Some(1), ..Default::default() }).await;
    for (what, answer) in grow(&acme, "k").await {
        assert_refused(answer, READ_ONLY, what);
    }
    assert_eq!(play.usage("acme").await.alarms, [""; 0], "nothing was refused for want of room");
    play.lift("stored_bytes").await;

    do_not_grow(&acme).await;
    assert_eq!(watch.next().await.event_count(), 1, "its connections stay, and see what it does");
    for (what, answer) in grow(&play.globex, "k").await {
        answer.expect(what);
    }
    play.scene.set_state("acme", State::Active).await;
    for (what, answer) in grow(&acme, "k").await {
        answer.expect(what);
    }
    play.end().await;
}

// As etcd, which has this limit for all: the text is one that kube-apiserver looks for. Reads have no size.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tenant_has_a_largest_request() {
    let mut play = Play::new().await;
    let acme = play.acme.clone();
    let large = || "k".repeat(200);
    // What etcd wraps around a request counts: 14 bytes, and one for its length.
    let put = put_request("k", &[7; 150]);
    let request_bytes = u64::try_from(put.encoded_len() + 15 + 1).unwrap();
    play.limit(api::Limits { request_bytes: Some(request_bytes), ..Default::default() }).await;
    let refused = [
        ("put", acme.put("k", &[7; 160]).await.map(drop)),
        ("delete", acme.call(delete_request(&large())).await.map(drop)),
        ("txn", acme.call(txn_request(vec![Op::RequestPut(put.clone())], Vec::new())).await.map(drop)),
    ];
    for (what, answer) in refused {
        assert_refused(answer, TOO_LARGE, what);
    }
    acme.call(put.clone()).await.unwrap();
    acme.range(&large()).await.unwrap();
    play.limit(api::Limits { request_bytes: Some(request_bytes - 2), ..Default::default() }).await;
    assert_refused(acme.call(put.clone()).await, TOO_LARGE, "one byte too many");

    play.globex.put(&large(), &[7; 1_000]).await.unwrap();
    play.the_neighbour_feels_nothing().await;
    play.lift("request_bytes").await;
    acme.put(&large(), &[7; 1_000]).await.unwrap();
    play.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tenant_has_so_many_leases() {
    let mut play = Play::new().await;
    let acme = play.acme.clone();
    acme.grant(1).await.unwrap();
    play.limit(api::Limits { leases: Some(2), ..Default::default() }).await;
    acme.grant(2).await.unwrap();
    for id in [3, 0] {
        assert_refused(acme.grant(id).await, TOO_MANY, "lease");
    }
    acme.put("k", b"v").await.unwrap();
    let mut keep_alive = acme.stream([pb::LeaseKeepAliveRequest { id: 1 }]).await.unwrap();
    assert_eq!(keep_alive.next().await.ttl, 600);
    for id in 1..=4 {
        play.globex.grant(id).await.unwrap();
    }
    play.the_neighbour_feels_nothing().await;
    acme.revoke(1).await.unwrap();
    acme.grant(3).await.unwrap();
    assert_refused(acme.grant(4).await, TOO_MANY, "lease");
    play.lift("leases").await;
    acme.grant(4).await.unwrap();
    play.end().await;
}

// A create is refused as etcd refuses one: the stream goes on, and so do the watchers that are there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tenant_has_so_many_watchers() {
    let mut play = Play::new().await;
    let acme = play.acme.clone();
    let mut first = acme.stream([watch_request("k")]).await.unwrap();
    assert!(first.next().await.created);
    play.limit(api::Limits { watchers: Some(2), ..Default::default() }).await;
    // They count over all streams of the tenant.
    let mut second = acme.stream([watch_request("k")]).await.unwrap();
    let created = second.next().await;
    assert!(created.created && !created.canceled);
    let refused = second.ask(watch_request("other")).await;
    assert!(refused.created && refused.canceled, "{refused:?}");
    assert_eq!((refused.watch_id, refused.cancel_reason.as_str()), (-1, TOO_MANY.1));
    acme.put("k", b"v").await.unwrap();
    for watch in [&mut first, &mut second] {
        assert_eq!(watch.next().await.event_count(), 1);
    }
    let mut of_globex = play.globex.stream([watch_request("k"), watch_request("k"), watch_request("k")]).await.unwrap();
    for _ in 0..3 {
        assert!(!of_globex.next().await.canceled);
    }
    play.the_neighbour_feels_nothing().await;

    // One that ends makes room.
    let cancel = RequestUnion::CancelRequest(pb::WatchCancelRequest { watch_id: created.watch_id });
    assert!(second.ask(pb::WatchRequest { request_union: Some(cancel) }).await.canceled);
    assert!(!second.ask(watch_request("k")).await.canceled);
    assert!(second.ask(watch_request("k")).await.canceled);
    play.lift("watchers").await;
    assert!(!second.ask(watch_request("k")).await.canceled);
    play.end().await;
}

// Streams are what a tenant can hold open without doing anything; unary calls count while they run.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tenant_has_so_many_requests_open() {
    let mut play = Play::new().await;
    let acme = play.acme.clone();
    acme.grant(7).await.unwrap();
    let mut watch = acme.stream([watch_request("k")]).await.unwrap();
    let mut keep_alive = acme.stream([pb::LeaseKeepAliveRequest { id: 7 }]).await.unwrap();
    assert!(watch.next().await.created);
    assert_eq!(keep_alive.next().await.ttl, 600);
    // Those that are open stay, though they are more than may be opened.
    play.limit(api::Limits { streams: Some(1), ..Default::default() }).await;
    assert_refused(acme.put("k", b"v").await, TOO_MANY, "put");
    assert_refused(acme.range("k").await, TOO_MANY, "range");
    assert_refused(acme.stream([watch_request("k")]).await.map(drop), TOO_MANY, "watch");
    let another = Caller::new(&play.scene, &play.identity).await;
    assert_refused(another.put("k", b"v").await, TOO_MANY, "on another connection");
    assert!(watch.ask(watch_request("other")).await.created);
    assert_eq!(keep_alive.ask(pb::LeaseKeepAliveRequest { id: 7 }).await.ttl, 600);
    assert_eq!(play.throttled("acme").await, 4);
    let mut of_globex = play.globex.stream([watch_request("k")]).await.unwrap();
    assert!(of_globex.next().await.created);
    play.the_neighbour_feels_nothing().await;

    play.lift("streams").await;
    acme.put("k", b"v").await.unwrap();
    assert_eq!(watch.next().await.event_count(), 1);
    assert_eq!(play.throttled("acme").await, 4);
    play.end().await;
}

// One that is not let in is closed before it is spoken to: a gRPC client says UNAVAILABLE then, and tries again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tenant_has_so_many_connections() {
    let mut play = Play::new().await;
    // The two of the play are there when they have been answered.
    let acme = play.acme.clone();
    acme.put("k", b"v").await.unwrap();
    play.limit(api::Limits { connections: Some(2), ..Default::default() }).await;
    let second = play.scene.admitted(&play.identity).await;
    assert!(!play.scene.gets_in(&play.identity).await);
    if let Ok(refused) = play.scene.connect(&play.identity).await {
        closed(refused).await;
    }
    assert_eq!(play.usage("acme").await.connections, 2);
    acme.put("k", b"v").await.unwrap();
    let (of_globex, _) = play.scene.credentials("globex").await;
    let mut open = Vec::new();
    for _ in 0..3 {
        open.push(play.scene.admitted(&of_globex).await);
    }
    play.the_neighbour_feels_nothing().await;

    // One that ends makes room, as soon as the server has seen it.
    drop(second);
    while !play.scene.gets_in(&play.identity).await {
        tokio::task::yield_now().await;
    }
    play.lift("connections").await;
    for _ in 0..3 {
        open.push(play.scene.admitted(&play.identity).await);
    }
    acme.put("k", b"v").await.unwrap();
    play.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tenant_has_so_many_requests_in_a_second() {
    let mut play = Play::new().await;
    let acme = play.acme.clone();
    acme.grant(7).await.unwrap();
    play.limit(api::Limits { requests_per_second: Some(1), ..Default::default() }).await;
    // One at once, one after a second, and so on while the server is slower than its clients: the others are told to come again.
    let answers = join_all((0..30).map(|_| acme.put("k", b"v"))).await;
    let (served, refused): (Vec<_>, Vec<_>) = answers.into_iter().partition(Result::is_ok);
    assert!(!served.is_empty() && !refused.is_empty(), "{} served", served.len());
    for answer in refused {
        assert_refused(answer, TOO_MANY, "put");
    }
    play.the_neighbour_feels_nothing().await;

    // Messages on a stream are requests too. They have come in, so they are answered, and nothing behind them is read for as long as
    // they take: here a quarter of an hour, or until the limit is gone.
    let renewal = pb::LeaseKeepAliveRequest { id: 7 };
    let mut keep_alive = acme.stream(std::iter::repeat_n(renewal, 1_000)).await.unwrap();
    for _ in 0..1_000 {
        assert_eq!(keep_alive.next().await.ttl, 600);
    }
    keep_alive.requests.unbounded_send(renewal).unwrap();
    assert_refused(acme.put("k", b"v").await, TOO_MANY, "put");
    play.the_neighbour_feels_nothing().await;
    play.lift("requests_per_second").await;
    assert_eq!(keep_alive.next().await.ttl, 600);
    acme.put("k", b"v").await.unwrap();
    play.end().await;
}

// What has come in cannot be refused any more, so it is not read on; what comes behind it is told to come again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tenant_may_send_so_many_bytes_in_a_second() {
    let mut play = Play::new().await;
    let acme = play.acme.clone();
    // At a byte a second the put would take days.
    play.limit(api::Limits { request_bytes_per_second: Some(1), ..Default::default() }).await;
    let large = tokio::spawn({
        let acme = acme.clone();
        async move { acme.put("large", &[7; 500 << 10]).await }
    });
    play.until_throttled().await;
    let watch = acme.stream([watch_request("k")]);
    let (put, range, watch) = tokio::join!(acme.put("k", b"v"), acme.range("k"), watch);
    assert_refused(put, TOO_MANY, "put");
    assert_refused(range, TOO_MANY, "range");
    assert_refused(watch.map(drop), TOO_MANY, "watch");
    assert!(!large.is_finished());
    play.globex.put("large", &[7; 500 << 10]).await.unwrap();
    play.the_neighbour_feels_nothing().await;

    play.lift("request_bytes_per_second").await;
    large.await.unwrap().unwrap();
    acme.put("k", b"v").await.unwrap();
    assert_eq!(acme.range("large").await.unwrap().count, 1);
    play.end().await;
}

/// Asks for everything, and reads no more of the answer than that there is one.
async fn ask_and_do_not_read(stream: Secured) -> h2::RecvStream {
    let (requests, connection) = h2::client::handshake(stream).await.unwrap();
    tokio::spawn(connection);
    let request = HttpRequest::post("https://localhost/etcdserverpb.KV/Range");
    let request = request.header("content-type", "application/grpc").header("te", "trailers").body(()).unwrap();
    let mut requests: h2::client::SendRequest<Bytes> = requests.ready().await.unwrap();
    let (response, mut body) = requests.send_request(request, false).unwrap();
    let message = everything_from("a").encode_to_vec();
    let mut framed = BytesMut::from(&[0_u8][..]);
    framed.put_u32(u32::try_from(message.len()).unwrap());
    framed.put_slice(&message);
    body.send_data(framed.freeze(), true).unwrap();
    response.await.unwrap().into_body()
}

// Answers that nobody reads lie in the member's memory: those of one tenant are bounded, and what is small still gets through.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tenant_has_so_many_bytes_of_answers_on_their_way() {
    let mut play = Play::new().await;
    let acme = play.acme.clone();
    for caller in [&acme, &play.globex] {
        for key in ["a", "b", "c"] {
            caller.put(key, &[7; 600 << 10]).await.unwrap();
        }
    }
    play.limit(api::Limits { response_bytes_in_flight: Some(1 << 20), ..Default::default() }).await;
    let mut unread = ask_and_do_not_read(play.scene.connect(&play.identity).await.unwrap()).await;
    assert_refused(acme.range("a").await, TIMED_OUT, "no room came");
    let small = pb::RangeRequest { keys_only: true, ..everything_from("a") };
    assert_eq!(acme.call(small).await.unwrap().count, 3);
    acme.put("d", b"v").await.unwrap();
    assert_eq!(play.globex.range("a").await.unwrap().kvs.keys(), 3);
    play.the_neighbour_feels_nothing().await;

    // Once there is room it goes on: by the operator's word, or because what was on its way is read.
    play.lift("response_bytes_in_flight").await;
    assert_eq!(acme.range("a").await.unwrap().kvs.keys(), 4);
    play.limit(api::Limits { response_bytes_in_flight: Some(1 << 20), ..Default::default() }).await;
    let mut answer = BytesMut::new();
    while let Some(data) = unread.data().await {
        let data = data.unwrap();
        unread.flow_control().release_capacity(data.len()).unwrap();
        answer.extend_from_slice(&data);
    }
    assert_eq!(RangeResponse::decode(&answer[5..]).unwrap().kvs.keys(), 3);
    assert_eq!(acme.range("a").await.unwrap().kvs.keys(), 4);
    play.end().await;
}

// Of a large answer the keys leave as they were read, behind what gRPC's codec has made of the rest.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_large_answer_arrives_whole() {
    let play = Play::new().await;
    let acme = play.acme.clone();
    let mut expected: Vec<Vec<u8>> = Vec::new();
    for number in 0..120u8 {
        let key = format!("k{number:03}");
        acme.put(&key, &vec![number; 100 * usize::from(number)]).await.unwrap();
        let one = pb::RangeRequest { key: key.into(), ..Default::default() };
        expected.extend(acme.call(one).await.unwrap().kvs.iter().map(<[u8]>::to_vec));
    }
    // One that fills several of the largest chunks, and one that is larger than any.
    for (key, bytes) in [("l", 1_200_000), ("m", 700_000), ("n", 300_000), ("o", 1_100_000)] {
        acme.put(key, &vec![b'v'; bytes]).await.unwrap();
        expected.extend(acme.range(key).await.unwrap().kvs.iter().map(<[u8]>::to_vec));
    }
    // Whose answers are compressed gets them from gRPC's codec.
    let gzip = acme.0.clone().send_compressed(CompressionEncoding::Gzip).accept_compressed(CompressionEncoding::Gzip);
    for caller in [&acme, &Caller(gzip)] {
        for limit in [1, 30, 71, 72, 73, 74, 119, 120, 121, 122, 123, 124, 0] {
            let answer = caller.call(pb::RangeRequest { limit, ..everything_from("k") }).await.unwrap();
            let keys = if limit == 0 { expected.len() } else { usize::try_from(limit).unwrap() };
            assert!(answer.kvs.iter().eq(expected[..keys].iter()), "limit {limit}");
            assert_eq!((answer.more, answer.count), (keys < expected.len(), 124), "limit {limit}");
            assert_eq!(answer.header.map(|header| header.revision), Some(125));
        }
    }
    play.end().await;
}

// By this an operator finds out who makes the cell slow.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn top_tells_who_works() {
    let mut play = Play::new().await;
    let mut watch = play.acme.stream([watch_request("a"), watch_request("b")]).await.unwrap();
    for _ in 0..2 {
        assert!(watch.next().await.created);
    }
    let (acme, globex) = (play.top("acme").await, play.top("globex").await);
    assert_eq!((acme.watchers, acme.connections, globex.watchers), (2, 1, 0));
    // Another one's is not counted as its own, whoever reads.
    let mut now = acme.clone();
    for number in 0..20 {
        play.acme.put(&format!("k{number}"), &[b'v'; 10_000]).await.unwrap();
        assert_eq!(play.acme.range("k").await.unwrap().kvs.keys(), number + 1);
        let before = std::mem::replace(&mut now, play.top("acme").await);
        assert!(now.cpu_us > before.cpu_us && now.requests == before.requests + 2, "{before:?} {now:?}");
    }
    assert!(now.received_bytes > acme.received_bytes + 200_000 && now.sent_bytes > acme.sent_bytes + 200_000);
    assert_eq!(now.keys, acme.keys + 20);
    let still = play.top("globex").await;
    assert_eq!((still.requests, still.keys), (globex.requests, globex.keys));
    // Its connection may have had something left to do, which was not what the other one's requests took.
    assert!(2 * (still.cpu_us - globex.cpu_us) < now.cpu_us - acme.cpu_us, "{globex:?} {still:?} {acme:?} {now:?}");
    drop(watch);
    play.end().await;
}

/// Why a tenant's clients have to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Leave {
    Suspended,
    Deleted,
    OneRevoked,
    AllRevoked,
}

// A stream goes on for weeks and says nothing of who its client is any more, so it must not outlive its right to be there. Its client sees
// the connection end without a status, which etcd's calls UNAVAILABLE: it tries again, and is in again when it may.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn open_streams_end_when_their_client_has_to_go() {
    let mut play = Play::new().await;
    play.globex.grant(7).await.unwrap();
    let mut stays = play.globex.stream([watch_request("k")]).await.unwrap();
    let mut lives = play.globex.stream([pb::LeaseKeepAliveRequest { id: 7 }]).await.unwrap();
    assert!(stays.next().await.created);
    assert_eq!(lives.next().await.ttl, 600);
    for leave in [Leave::Suspended, Leave::Deleted, Leave::OneRevoked, Leave::AllRevoked] {
        let name = format!("{leave:?}").to_lowercase();
        play.scene.create(&name).await;
        let (identity, issued) = play.scene.credentials(&name).await;
        let caller = Caller::new(&play.scene, &identity).await;
        caller.grant(7).await.unwrap();
        let mut watch = caller.stream([watch_request("k")]).await.unwrap();
        let mut keep_alive = caller.stream([pb::LeaseKeepAliveRequest { id: 7 }]).await.unwrap();
        assert!(watch.next().await.created);
        assert_eq!(keep_alive.next().await.ttl, 600);
        let tenant = play.scene.tenure.cell().tenant(&name).unwrap();
        assert_eq!(tenant.reader().watch_counts(), (1, 1));

        let revoke = |all| api::RevokeCredentialsRequest {
            tenant: name.clone(),
            serial: if all { String::new() } else { issued.serial.clone() },
            all,
            ..Default::default()
        };
        match leave {
            Leave::Suspended => play.scene.set_state(&name, State::Suspended).await,
            Leave::Deleted => {
                let delete = api::DeleteTenantRequest { name: name.clone(), id: None };
                assert!(play.scene.admin.delete_tenant(delete).await.unwrap().into_inner().deleted);
            }
            Leave::OneRevoked => drop(play.scene.admin.revoke_credentials(revoke(false)).await.unwrap()),
            Leave::AllRevoked => drop(play.scene.admin.revoke_credentials(revoke(true)).await.unwrap()),
        }
        let canceled = ["Watch", "LeaseKeepAlive"].map(|method| {
            format!("tenure_tenant_requests_total{{tenant=\"{name}\",method=\"{method}\",code=\"Canceled\"}}")
        });
        let ends = async {
            let statuses = [watch.ended().await, keep_alive.ended().await];
            // And at the member, which holds nothing of them. Of a tenant that is gone it counts nothing.
            while tenant.reader().watch_counts() != (0, 0) {
                tokio::task::yield_now().await;
            }
            let mut counted = leave == Leave::Deleted;
            while !counted {
                let scraped = play.scrape().await;
                counted = canceled.iter().all(|name| scraped.get(name) == Some(&1.0));
            }
            statuses
        };
        let statuses = timeout(LEAVE_WITHIN, ends).await.unwrap_or_else(|_| panic!("{leave:?}: a stream goes on"));
        for status in statuses {
            assert!(status.code() != Code::Ok && status.source().is_some(), "the server said nothing: {status:?}");
        }
        assert!(!play.scene.gets_in(&identity).await, "{leave:?}");
        // The lease's keys are there when it comes back; here, the lease.
        if leave == Leave::Suspended {
            play.scene.set_state(&name, State::Active).await;
            let back = Caller::new(&play.scene, &identity).await;
            let mut keep_alive = back.stream([pb::LeaseKeepAliveRequest { id: 7 }]).await.unwrap();
            assert_eq!(keep_alive.next().await.ttl, 600);
        }

        play.globex.put("k", b"v").await.unwrap();
        assert_eq!(stays.next().await.event_count(), 1);
        assert_eq!(lives.ask(pb::LeaseKeepAliveRequest { id: 7 }).await.ttl, 600);
    }
    play.end().await;
}

/// Of a version that is not a tombstone, by storage's account.
fn version_bytes(key: &str, stored: &[u8]) -> u64 {
    key.len() as u64 + stored.len() as u64 + VERSION_OVERHEAD_BYTES
}

// What is billed and what is alerted on: the numbers must be those of what was done, and of who did it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn metrics_tell_what_each_tenant_did() {
    let mut play = Play::new().await;
    let acme = play.acme.clone();
    let (first, second) = (put_request("a", b"1"), put_request("b", b"2"));
    acme.call(first.clone()).await.unwrap();
    let stored = async |key: &'static str| {
        let request = pb::RangeRequest { key: key.into(), ..Default::default() };
        acme.call(request).await.unwrap().kvs.iter().map(<[u8]>::to_vec).next().unwrap()
    };
    let a = version_bytes("a", &stored("a").await);
    acme.call(second).await.unwrap();
    let b = version_bytes("b", &stored("b").await);
    let empty_key = acme.put("", b"v").await;
    assert_refused(empty_key, (Code::InvalidArgument, "etcdserver: key is not provided"), "put");
    let before = play.scrape().await;
    acme.call(delete_request("b")).await.unwrap();
    let mut watch = acme.stream([watch_request("a"), watch_request("b"), watch_request("c")]).await.unwrap();
    for _ in 0..3 {
        assert!(watch.next().await.created);
    }
    play.limit(api::Limits { streams: Some(1), stored_bytes: Some(1 << 20), ..Default::default() }).await;
    for _ in 0..2 {
        assert_refused(acme.put("k", b"v").await, TOO_MANY, "put");
    }
    let answered = play.globex.call(first.clone()).await.unwrap();
    let scraped = play.scrape().await;

    let of = |scraped: &BTreeMap<String, f64>, tenant: &str, name: &str, labels: &str| {
        scraped.get(&format!("tenure_tenant_{name}{{tenant=\"{tenant}\"{labels}}}")).copied()
    };
    let tombstone = "b".len() as u64 + VERSION_OVERHEAD_BYTES;
    let live = EMPTY_TENANT_BYTES + a;
    let values = [
        ("stored_bytes", live + b + tombstone),
        ("live_bytes", live),
        ("history_bytes", b + tombstone),
        ("quota_bytes", 1 << 20),
        ("keys", 1),
        ("watchers", 3),
        ("connections", 1),
        ("revision", 4),
    ];
    for (name, value) in values {
        assert_eq!(of(&scraped, "acme", name, ""), Some(value as f64), "{name}");
    }
    assert_eq!(of(&scraped, "acme", "compact_revision", ""), Some(-1.0), "never");
    assert_eq!(of(&before, "acme", "stored_bytes", ""), Some((live + b) as f64));
    let requests = [("Put", "OK", 2), ("Put", "InvalidArgument", 1), ("Put", "ResourceExhausted", 2)];
    for (method, code, times) in requests.into_iter().chain([("Range", "OK", 2), ("DeleteRange", "OK", 1)]) {
        let labels = format!(",method=\"{method}\",code=\"{code}\"");
        assert_eq!(of(&scraped, "acme", "requests_total", &labels), Some(f64::from(times)), "{labels}");
    }
    let of_requests =
        scraped.iter().filter(|(name, _)| name.starts_with("tenure_tenant_requests_total{tenant=\"acme\""));
    assert_eq!(of_requests.map(|(_, times)| times).sum::<f64>(), 8.0, "and no others: the watch is open");
    assert_eq!(of(&scraped, "acme", "request_duration_seconds_count", ""), Some(8.0));
    for (reason, times) in [("requests", 0), ("bytes", 0), ("streams", 2), ("connections", 0), ("response_bytes", 0)] {
        let labels = format!(",reason=\"{reason}\"");
        assert_eq!(of(&scraped, "acme", "throttled_total", &labels), Some(f64::from(times)), "{labels}");
    }
    // Messages with their prefixes.
    assert_eq!(of(&scraped, "globex", "received_bytes_total", ""), Some((first.encoded_len() + 5) as f64));
    assert_eq!(of(&scraped, "globex", "sent_bytes_total", ""), Some((answered.encoded_len() + 5) as f64));
    assert_eq!(of(&scraped, "globex", "revision", ""), Some(2.0));
    assert_eq!(of(&scraped, "globex", "throttled_total", ",reason=\"streams\""), Some(0.0));
    assert_eq!(of(&scraped, "default", "revision", ""), Some(1.0));
    assert_eq!(scraped.get("tenure_tenants{state=\"active\"}"), Some(&3.0));

    // What was written over and deleted is given back, and an alarm is seen.
    play.lift("streams").await;
    acme.compact(4).await.unwrap();
    play.limit(api::Limits { stored_bytes: Some(1), ..Default::default() }).await;
    assert_refused(acme.put("k", b"v").await, NO_SPACE, "put");
    play.scene.set_state("globex", State::ReadOnly).await;
    drop(watch);
    while play.usage("acme").await.watchers > 0 {
        tokio::task::yield_now().await;
    }
    let scraped = play.scrape().await;
    assert_eq!(of(&scraped, "acme", "compact_revision", ""), Some(4.0));
    assert_eq!(
        of(&scraped, "acme", "stored_bytes", ""),
        Some((live + tombstone) as f64),
        "a tombstone at the revision stays"
    );
    assert_eq!(of(&scraped, "acme", "watchers", ""), Some(0.0));
    assert_eq!(of(&scraped, "acme", "alarms", ",alarm=\"NOSPACE\""), Some(1.0));
    assert_eq!(of(&scraped, "acme", "alarms", ",alarm=\"CORRUPT\""), Some(0.0));
    assert_eq!(of(&scraped, "globex", "alarms", ",alarm=\"NOSPACE\""), Some(0.0));
    let states = ["active", "read-only"].map(|state| scraped.get(&format!("tenure_tenants{{state=\"{state}\"}}")));
    assert_eq!(states, [Some(&2.0), Some(&1.0)]);
    play.end().await;
}
