//! Clients that are broken or mean. Each gets etcd's answer, costs a bounded amount of memory, and disturbs nobody else.
//!
//! Every test runs a server of its own with two tenants. `acme` is where the bad client connects; on `globex` a well-behaved
//! one writes and reads all the time, on a connection of its own, and none of its requests may fail.

#![allow(clippy::unwrap_used)]

use std::future::Future;
use std::io::Write as _;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use prost::Message;
use tenure_etcd_shim::proto::etcdserverpb as pb;
use tenure_etcd_shim::proto::etcdserverpb::watch_request::RequestUnion;
use tenure_etcd_shim::wire::{RangeResponse, WatchResponse};
use tenure_tests::child::raise_files_limit;
use tenure_tests::client::{Call, Connection, DEFAULT_WINDOW_BYTES, frame_header, framed, grpc_request};
use tenure_tests::server::Server;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::{JoinHandle, JoinSet};
use tonic::{Code, Status};

const RANGE: &str = "/etcdserverpb.KV/Range";
const PUT: &str = "/etcdserverpb.KV/Put";
const DELETE_RANGE: &str = "/etcdserverpb.KV/DeleteRange";
const TXN: &str = "/etcdserverpb.KV/Txn";
const WATCH: &str = "/etcdserverpb.Watch/Watch";

/// `--max-request-bytes`, and what is received at most: 512 KiB more.
const REQUEST_BYTES_MAX: usize = 1_572_864;
const RECEIVE_BYTES_MAX: usize = REQUEST_BYTES_MAX + (512 << 10);

/// What the server takes of memory when it is used at all: RocksDB's write buffers (64 MiB) and block cache (128 MiB), and
/// as much again as the raft log keeps of its newest entries. It is the server's own, not the client's doing.
const ENGINE_BYTES: u64 = 256 << 20;

/// Longest wait for something that has to happen. Nothing here is expected to come near it.
const PATIENCE: Duration = Duration::from_secs(180);

const MIB: u64 = 1 << 20;

async fn soon<T>(what: &str, event: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, event).await.unwrap_or_else(|_| panic!("waited in vain: {what}"))
}

/// What a count is when it has stood still for a second: the server takes no more, or there is no more.
async fn settled(count: &AtomicU64) -> u64 {
    let mut before = u64::MAX;
    while before != count.load(Ordering::Relaxed) {
        before = count.load(Ordering::Relaxed);
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    before
}

fn put(key: impl Into<Bytes>, value: impl Into<Bytes>) -> pb::PutRequest {
    pb::PutRequest { key: key.into(), value: value.into(), ..Default::default() }
}

fn range(key: impl Into<Bytes>) -> pb::RangeRequest {
    pb::RangeRequest { key: key.into(), ..Default::default() }
}

/// Every key there is.
fn everything() -> pb::RangeRequest {
    pb::RangeRequest { range_end: Bytes::from_static(b"\0"), ..range(&b"\0"[..]) }
}

fn create(request: pb::WatchCreateRequest) -> pb::WatchRequest {
    pb::WatchRequest { request_union: Some(RequestUnion::CreateRequest(request)) }
}

/// The well-behaved client of the other tenant.
struct Neighbour {
    stop: Arc<AtomicBool>,
    rounds: Arc<AtomicU64>,
    work: JoinHandle<()>,
}

impl Neighbour {
    fn at(address: SocketAddr) -> Neighbour {
        let (stop, rounds) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stopping, counted) = (Arc::clone(&stop), Arc::clone(&rounds));
        let work = tokio::spawn(async move {
            while !stopping.load(Ordering::Relaxed) {
                // Now and then as a newcomer.
                let connection = soon("the neighbour connects", Connection::open(address)).await;
                for _ in 0..20 {
                    let value = counted.load(Ordering::Relaxed).to_string();
                    let write = put("neighbour", value.clone());
                    let write = connection.unary::<_, pb::PutResponse>(PUT, &write);
                    soon("the neighbour writes", write).await.unwrap();
                    let read = range("neighbour");
                    let read = connection.unary::<_, RangeResponse>(RANGE, &read);
                    let read = soon("the neighbour reads", read).await.unwrap();
                    let kv = read.kvs.iter().next().unwrap().to_vec();
                    assert!(kv.ends_with(value.as_bytes()), "the neighbour reads what it wrote");
                    assert_eq!(read.count, 1);
                    counted.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        Neighbour { stop, rounds, work }
    }

    /// Returns once the neighbour has got some work done from here on.
    async fn works(&mut self) {
        let until = self.rounds.load(Ordering::Relaxed) + 5;
        let working = async {
            while self.rounds.load(Ordering::Relaxed) < until && !self.work.is_finished() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        soon("the neighbour works", working).await;
        if self.work.is_finished() {
            (&mut self.work).await.unwrap();
        }
    }

    async fn stops(self) {
        self.stop.store(true, Ordering::Relaxed);
        self.work.await.unwrap();
    }
}

struct Scene {
    server: Server,
    neighbour: Neighbour,
    resident_before: u64,
    _data: tempfile::TempDir,
}

impl Scene {
    async fn open() -> Scene {
        Self::open_on(|data_dir| Server::start(data_dir, &["acme", "globex"])).await
    }

    async fn open_on(start: impl FnOnce(&Path) -> Server) -> Scene {
        raise_files_limit();
        let data = tempfile::tempdir().unwrap();
        let server = start(&data.path().join("d"));
        let mut neighbour = Neighbour::at(server.address(1));
        neighbour.works().await;
        let mut scene = Scene { server, neighbour, resident_before: 0, _data: data };
        scene.measure_from_here();
        scene
    }

    fn acme(&self) -> SocketAddr {
        self.server.address(0)
    }

    /// What comes before is the test's own preparation.
    fn measure_from_here(&mut self) {
        self.server.forget_peak();
        self.resident_before = self.server.resident_bytes();
    }

    /// The neighbour got its work done, and the server's memory never grew by more than this.
    async fn close(mut self, growth_bytes_max: u64) {
        self.neighbour.works().await;
        self.neighbour.stops().await;
        assert!(self.server.is_alive());
        let growth = self.server.peak_bytes().saturating_sub(self.resident_before);
        eprintln!("memory grew by {} of {} MiB allowed", growth / MIB, growth_bytes_max / MIB);
        assert!(growth <= growth_bytes_max, "memory grew by {} MiB", growth / MIB);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn malformed_requests_have_etcds_answer() {
    let scene = Scene::open().await;
    let acme = Connection::open(scene.acme()).await;
    // Field 1, length-delimited, 100 bytes; then nothing.
    let cut_off = framed(&[0x0a, 100]);
    // Wire type 7 does not exist.
    let no_protobuf = framed(&[0x0f, 0xff, 0xff]);
    let unary = [
        RANGE,
        PUT,
        DELETE_RANGE,
        TXN,
        "/etcdserverpb.KV/Compact",
        "/etcdserverpb.KV/RangeStream",
        "/etcdserverpb.Lease/LeaseGrant",
        "/etcdserverpb.Lease/LeaseRevoke",
        "/etcdserverpb.Lease/LeaseTimeToLive",
        "/etcdserverpb.Maintenance/Alarm",
        "/etcdserverpb.Maintenance/HashKV",
        "/etcdserverpb.Cluster/MemberList",
    ];
    for method in unary.into_iter().chain([WATCH, "/etcdserverpb.Lease/LeaseKeepAlive"]) {
        for body in [&cut_off, &no_protobuf] {
            let status = acme.status_of(method, body.clone()).await;
            assert_eq!(status.code(), Code::Internal, "{method}: {status:?}");
            assert!(status.message().starts_with("grpc: error unmarshalling request: "), "{method}: {status:?}");
        }
    }
    // A txn in a txn in a txn…, deeper than any protobuf library follows.
    let mut nested = Vec::new();
    for _ in 0..10_000 {
        nested = pb_field(2, &pb_field(4, &nested));
    }
    let status = acme.status_of(TXN, framed(&nested)).await;
    assert_eq!(status.code(), Code::Internal, "{status:?}");
    scene.close(ENGINE_BYTES).await;
}

/// A length-delimited protobuf field.
fn pb_field(number: u32, body: &[u8]) -> Vec<u8> {
    let mut field = Vec::with_capacity(body.len() + 6);
    prost::encoding::encode_key(number, prost::encoding::WireType::LengthDelimited, &mut field);
    prost::encoding::encode_varint(body.len() as u64, &mut field);
    field.extend_from_slice(body);
    field
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_framing_has_etcds_answer() {
    let scene = Scene::open().await;
    let acme = Connection::open(scene.acme()).await;
    let frame = |flag: u8, length: usize, body: &[u8]| Bytes::from([&frame_header(flag, length), body].concat());
    let too_large = |length: usize| {
        let text = format!("grpc: received message larger than max ({length} vs. {RECEIVE_BYTES_MAX})");
        (Code::ResourceExhausted, text)
    };
    for method in [RANGE, PUT, TXN, WATCH] {
        // Refused by the length alone: the message never comes.
        for length in [RECEIVE_BYTES_MAX + 1, 1 << 30, u32::MAX as usize] {
            let status = acme.status_of(method, frame(0, length, b"")).await;
            assert_eq!((status.code(), status.message().to_string()), too_large(length), "{method}");
        }
        // Neither "plain" nor "compressed"; compressed, but no word about how.
        for flag in [2, 255, 1] {
            let status = acme.status_of(method, frame(flag, 3, b"abc")).await;
            assert_eq!(status.code(), Code::Internal, "{method}, flag {flag}: {status:?}");
        }
        // The request ends inside a frame header, inside a message.
        for body in [&b"\0\0\0"[..], b"\0\0\0\0\x09abc"] {
            let status = acme.status_of(method, Bytes::from_static(body)).await;
            assert_eq!(status.code(), Code::Internal, "{method}, {body:?}: {status:?}");
        }
    }
    scene.close(ENGINE_BYTES).await;
}

/// 2 GiB of zeros in 2 MiB.
fn bomb() -> Vec<u8> {
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    let zeros = vec![0; 1 << 20];
    while gzip.get_ref().len() < RECEIVE_BYTES_MAX - (64 << 10) {
        gzip.write_all(&zeros).unwrap();
    }
    gzip.finish().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn compression_is_known_and_bounded() {
    let scene = Scene::open().await;
    let acme = Connection::open(scene.acme()).await;
    let compressed = async |encoding: &str, body: &[u8]| {
        let mut request = grpc_request(PUT);
        request.headers_mut().insert("grpc-encoding", encoding.parse().unwrap());
        let mut call = acme.call_with(request).await.unwrap();
        let _ = call.requests.send_bytes([&frame_header(1, body.len()), body].concat().into(), true).await;
        call.answers.status().await
    };
    for unknown in ["zstd", "snappy", "no such thing"] {
        let status = compressed(unknown, b"abc").await;
        let text = format!("grpc: Decompressor is not installed for grpc-encoding \"{unknown}\"");
        assert_eq!((status.code(), status.message()), (Code::Unimplemented, text.as_str()));
    }
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&put("k", "v").encode_to_vec()).unwrap();
    assert_eq!(compressed("gzip", &gzip.finish().unwrap()).await.code(), Code::Ok);
    assert_eq!(compressed("gzip", b"this is not gzip").await.code(), Code::Internal);
    // At most what a message may be is unpacked.
    let bomb = bomb();
    for _ in 0..8 {
        let status = compressed("gzip", &bomb).await;
        assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
    }
    scene.close(ENGINE_BYTES).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_does_not_exist_is_said_not_to() {
    let scene = Scene::open().await;
    let acme = Connection::open(scene.acme()).await;
    for (method, text) in [
        ("/etcdserverpb.KV/Nope", "unknown method Nope for service etcdserverpb.KV"),
        ("/etcdserverpb.Watch/", "unknown method  for service etcdserverpb.Watch"),
        ("/no.Such/Range", "unknown service no.Such"),
    ] {
        let status = acme.status_of(method, framed(b"")).await;
        assert_eq!((status.code(), status.message()), (Code::Unimplemented, text), "{method}");
    }
    let mut wrong = grpc_request(RANGE);
    wrong.headers_mut().insert("content-type", "text/plain".parse().unwrap());
    let status = acme.call_with(wrong).await.unwrap().answers.status().await;
    assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
    let mut wrong = grpc_request(RANGE);
    *wrong.method_mut() = http::Method::GET;
    let status = acme.call_with(wrong).await.unwrap().answers.status().await;
    assert_eq!(status.code(), Code::Internal, "{status:?}");
    scene.close(ENGINE_BYTES).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_beyond_the_limits_have_etcds_answer() {
    let scene = Scene::open().await;
    let acme = Connection::open(scene.acme()).await;
    let status = async |method: &str, message: &dyn Encoded| acme.status_of(method, framed(&message.encoded())).await;
    let is = |status: Status, code: Code, text: &str| assert_eq!((status.code(), status.message()), (code, text));

    let op = |request| pb::RequestOp { request: Some(request) };
    use pb::request_op::Request;
    let no_key = "etcdserver: key is not provided";
    let compare_nothing = pb::TxnRequest { compare: vec![pb::Compare::default()], ..Default::default() };
    let put_nothing = op(Request::RequestPut(put("", "v")));
    let txn_nothing = pb::TxnRequest { failure: vec![put_nothing], ..Default::default() };
    is(status(RANGE, &range("")).await, Code::InvalidArgument, no_key);
    is(status("/etcdserverpb.KV/RangeStream", &range("")).await, Code::InvalidArgument, no_key);
    is(status(PUT, &put("", "v")).await, Code::InvalidArgument, no_key);
    is(status(DELETE_RANGE, &pb::DeleteRangeRequest::default()).await, Code::InvalidArgument, no_key);
    is(status(TXN, &compare_nothing).await, Code::InvalidArgument, no_key);
    is(status(TXN, &txn_nothing).await, Code::InvalidArgument, no_key);
    let empty_op = pb::TxnRequest { success: vec![pb::RequestOp::default()], ..Default::default() };
    is(status(TXN, &empty_op).await, Code::InvalidArgument, "etcdserver: key not found");

    // 128 operations pass, also if they are nested so that a level has less than that left.
    let puts = |n: usize| (0..n).map(|n| op(Request::RequestPut(put(format!("op{n}"), "v")))).collect::<Vec<_>>();
    let txn = |success| pb::TxnRequest { success, ..Default::default() };
    let too_many = "etcdserver: too many operations in txn request";
    is(status(TXN, &txn(puts(128))).await, Code::Ok, "");
    is(status(TXN, &txn(puts(129))).await, Code::InvalidArgument, too_many);
    let nested = |inner| txn(vec![op(Request::RequestTxn(txn(puts(inner))))]);
    is(status(TXN, &nested(127)).await, Code::Ok, "");
    is(status(TXN, &nested(128)).await, Code::InvalidArgument, too_many);
    let twice = [puts(1), puts(1)].concat();
    is(status(TXN, &txn(twice)).await, Code::InvalidArgument, "etcdserver: duplicate key given in txn request");
    // 80,000 operations in nested txns that each stay below the limit.
    let mut many = txn(vec![]);
    for group in 0..1_000 {
        let puts = (0..80).map(|n| op(Request::RequestPut(put(format!("{group}/{n}"), "")))).collect();
        many.success.push(op(Request::RequestTxn(txn(puts))));
    }
    is(status(TXN, &many).await, Code::InvalidArgument, too_many);

    // The largest put that etcd takes, and one byte more.
    let sized = |bytes: usize| {
        // Seven bytes are the key's field, and the tag and length of the value's.
        let request = put("k", vec![b'v'; bytes - 7]);
        assert_eq!(request.encoded_len(), bytes);
        request
    };
    is(status(PUT, &sized(1_572_847)).await, Code::Ok, "");
    for bytes in [1_572_848, RECEIVE_BYTES_MAX] {
        is(status(PUT, &sized(bytes)).await, Code::InvalidArgument, "etcdserver: request is too large");
    }
    let text = format!("grpc: received message larger than max ({} vs. {RECEIVE_BYTES_MAX})", RECEIVE_BYTES_MAX + 1);
    is(status(PUT, &sized(RECEIVE_BYTES_MAX + 1)).await, Code::ResourceExhausted, &text);

    let grant = pb::LeaseGrantRequest { ttl: 9_000_000_001, id: 0 };
    is(status("/etcdserverpb.Lease/LeaseGrant", &grant).await, Code::OutOfRange, "etcdserver: too large lease TTL");
    scene.close(ENGINE_BYTES).await;
}

/// Any message, encoded.
trait Encoded {
    fn encoded(&self) -> Vec<u8>;
}

impl<M: Message> Encoded for M {
    fn encoded(&self) -> Vec<u8> {
        self.encode_to_vec()
    }
}

/// Sends bytes on a connection of their own, and reads until the server ends it.
async fn answer_to(address: SocketAddr, bytes: &[u8]) -> Vec<u8> {
    let mut stream = TcpStream::connect(address).await.unwrap();
    // The server may end the connection before it has read everything.
    let _ = stream.write_all(bytes).await;
    let _ = stream.shutdown().await;
    let mut answer = Vec::new();
    let _ = soon("the server ends the connection", stream.read_to_end(&mut answer)).await;
    answer
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_on_the_port_ends_its_connection_only() {
    let scene = Scene::open().await;
    let acme = scene.acme();
    // Not random, so that a failure can be repeated.
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut garbage = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state.to_be_bytes()[0]
    };
    for length in [1, 3, 24, 100, 10_000, 1 << 20] {
        let bytes: Vec<u8> = (0..length).map(|_| garbage()).collect();
        answer_to(acme, &bytes).await;
        // The same where HTTP/2 frames are expected.
        answer_to(acme, &[b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", &bytes[..]].concat()).await;
    }
    // A TLS client that has the wrong port; half a preface; an HTTP/2 frame of 16 MiB.
    answer_to(acme, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03").await;
    answer_to(acme, b"PRI * HTTP/2.0\r\n\r\nS").await;
    let huge_frame =
        [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0\xff\xff\xff\0\0\0\0\0\x01", &[0; 1 << 16][..]];
    answer_to(acme, &huge_frame.concat()).await;

    let bad_request = async |bytes: &[u8]| {
        let answer = answer_to(acme, bytes).await;
        let answer = String::from_utf8_lossy(&answer).to_string();
        assert!(
            answer.starts_with("HTTP/1.1 4"),
            "{:?}: {answer:?}",
            String::from_utf8_lossy(&bytes[..40.min(bytes.len())])
        );
    };
    bad_request(b"GET\r\n\r\n").await;
    bad_request(b"GET / HTTP/1.1\r\nno colon\r\n\r\n").await;
    bad_request(&[b"GET /", &[b'a'; 1 << 20][..], b" HTTP/1.1\r\n\r\n"].concat()).await;
    bad_request(&[b"GET / HTTP/1.1\r\nx: ", &[b'a'; 1 << 20][..], b"\r\n\r\n"].concat()).await;
    bad_request(&[b"GET / HTTP/1.1\r\n", &b"x: y\r\n".repeat(100_000)[..], b"\r\n"].concat()).await;
    bad_request(b"POST /health HTTP/1.1\r\nHost: h\r\nContent-Length: 99999999999999999999999\r\n\r\n").await;
    bad_request(b"POST /health HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n").await;
    scene.close(ENGINE_BYTES).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_thousand_watches_on_one_connection() {
    const WATCHES: i64 = 100_000;
    let scene = Scene::open().await;
    let acme = Connection::open(scene.acme()).await;
    let Call { mut requests, mut answers } = acme.call(WATCH).await.unwrap();
    let creating = tokio::spawn(async move {
        for number in 0..WATCHES {
            let key = format!("watched/{number:06}");
            let range_end = Bytes::from(format!("watched/{number:06}/"));
            let watch = pb::WatchCreateRequest { key: key.into(), range_end, ..Default::default() };
            requests.send(&create(watch)).await.unwrap();
        }
        requests
    });
    for number in 0..WATCHES {
        let created: WatchResponse = soon("a watch is created", answers.message()).await.unwrap();
        assert_eq!((created.watch_id, created.created, created.canceled), (number, true, false));
    }
    for number in [0, 777, WATCHES - 1] {
        let put = put(format!("watched/{number:06}"), "v");
        acme.unary::<_, pb::PutResponse>(PUT, &put).await.unwrap();
        let event: WatchResponse = soon("the watch tells", answers.message()).await.unwrap();
        assert_eq!((event.watch_id, event.event_count()), (number, 1));
    }
    let mut requests = creating.await.unwrap();
    let progress = RequestUnion::ProgressRequest(pb::WatchProgressRequest {});
    requests.send(&pb::WatchRequest { request_union: Some(progress) }).await.unwrap();
    let progress: WatchResponse = soon("progress", answers.message()).await.unwrap();
    assert_eq!((progress.watch_id, progress.header.unwrap().revision), (-1, 4));
    // 2 KiB a watch: its two keys several times over, in the watcher, its group and the index of ranges; and what the allocator keeps
    // of blocks that grew, which is another share at each run.
    scene.close(WATCHES.cast_unsigned() * 3072 + 32 * MIB).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn watches_are_created_no_faster_than_their_client_reads() {
    const WATCHES: i64 = 100_000;
    let scene = Scene::open().await;
    // A window into which some thousand answers fit.
    let acme = Connection::open_with_window(scene.acme(), DEFAULT_WINDOW_BYTES).await;
    let Call { mut requests, mut answers } = acme.call(WATCH).await.unwrap();
    let sent = Arc::new(AtomicU64::new(0));
    let counting = Arc::clone(&sent);
    let creating = tokio::spawn(async move {
        for number in 0..WATCHES {
            let watch = pb::WatchCreateRequest { key: format!("{number:0256}").into(), ..Default::default() };
            requests.send(&create(watch)).await.unwrap();
            counting.fetch_add(1, Ordering::Relaxed);
        }
        requests
    });
    // Until the server takes no more for a while. How long is no matter: all of them are to fit in neither case.
    let before = settled(&sent).await;
    assert!(before < WATCHES.cast_unsigned(), "the server stops reading when its answers are not read");
    for number in 0..WATCHES {
        let created: WatchResponse = soon("a watch is created", answers.message()).await.unwrap();
        assert_eq!((created.watch_id, created.created), (number, true));
    }
    drop(creating.await.unwrap());
    // As above, with keys of 256 bytes.
    scene.close(WATCHES.cast_unsigned() * 3072 + 32 * MIB).await;
}

/// Fills `acme` with this many values of 512 KiB.
async fn fill(acme: &Connection, values: usize) {
    for number in 0..values {
        acme.unary::<_, pb::PutResponse>(PUT, &put(format!("big/{number}"), vec![b'v'; 512 << 10])).await.unwrap();
    }
}

/// Starts this many calls of one request, on a few connections, and reads none. `end` says whether the request is all
/// that the client has to say.
async fn unread(address: SocketAddr, method: &str, request: &impl Message, calls: usize, end: bool) -> Vec<Call> {
    const CONNECTIONS: usize = 6;
    let request = framed(&request.encode_to_vec());
    let mut unread = Vec::new();
    for _ in 0..CONNECTIONS {
        let connection = Connection::open_with_window(address, DEFAULT_WINDOW_BYTES).await;
        for _ in 0..calls / CONNECTIONS {
            let mut call = connection.call(method).await.unwrap();
            call.requests.send_bytes(request.clone(), end).await.unwrap();
            unread.push(call);
        }
    }
    unread
}

/// 8 MiB, 300 times.
async fn unread_ranges_are_bounded(method: &str) {
    let mut scene = Scene::open().await;
    fill(&Connection::open(scene.acme()).await, 16).await;
    scene.measure_from_here();
    let mut unread = unread(scene.acme(), method, &everything(), 300, true).await;
    // Each begins its answer, or is told to come again when no other has made room for it.
    let mut refused = 0;
    for call in &mut unread {
        if let Some(status) = soon("an answer", call.answers.started()).await {
            let text = "etcdserver: request timed out";
            assert_eq!((status.code(), status.message()), (Code::Unavailable, text));
            refused += 1;
        }
    }
    assert!(refused > 0, "2.4 GiB do not fit");
    scene.neighbour.works().await;
    // Those who leave make room.
    drop(unread);
    let acme = Connection::open(scene.acme()).await;
    let read = soon("a range", acme.unary::<_, RangeResponse>(RANGE, &everything())).await.unwrap();
    assert_eq!(read.count, 16);
    // The tenant's 256 MiB of answers in flight, once more where one is copied into the buffer that goes out.
    scene.close(2 * 256 * MIB + ENGINE_BYTES).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn ranges_that_nobody_reads_are_bounded_in_bytes() {
    unread_ranges_are_bounded(RANGE).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn streamed_ranges_that_nobody_reads_are_bounded_in_bytes() {
    unread_ranges_are_bounded("/etcdserverpb.KV/RangeStream").await;
}

/// Sends a request so often on a few connections whose client has no room for answers, and counts those that are refused.
async fn refused_of_many(address: SocketAddr, method: &str, request: &impl Message, calls: usize) -> (Vec<Call>, u64) {
    // Fewer than a connection may have open: who has more waits with them.
    const CALLS_OF_ONE: usize = 1_000;
    let request = framed(&request.encode_to_vec());
    let mut unread = Vec::new();
    for _ in 0..calls.div_ceil(CALLS_OF_ONE) {
        let connection = Connection::open_with_window(address, 1 << 10).await;
        for _ in 0..calls.min(CALLS_OF_ONE) {
            let mut call = connection.call(method).await.unwrap();
            call.requests.send_bytes(request.clone(), true).await.unwrap();
            unread.push(call);
        }
    }
    let mut refused = 0;
    for call in &mut unread {
        refused += u64::from(soon("an answer", call.answers.started()).await.is_some());
    }
    (unread, refused)
}

/// A server that was away for a moment finds hundreds of requests that were given up meanwhile, by clients that wait for its next answer on the
/// same connection.
#[tokio::test(flavor = "multi_thread")]
async fn many_requests_given_up_at_once_end_no_connection() {
    let scene = Scene::open().await;
    let acme = Connection::open(scene.acme()).await;
    acme.unary::<_, pb::PutResponse>(PUT, &put("k", "v")).await.unwrap();
    let watch = acme.call(WATCH).await.unwrap();
    scene.server.pause(true);
    let mut given_up = Vec::new();
    for _ in 0..400 {
        given_up.push(acme.call(RANGE).await.unwrap());
        // Its headers are to be on their way before it is given up.
        tokio::task::yield_now().await;
    }
    given_up.iter_mut().for_each(|call| call.requests.reset());
    scene.server.pause(false);
    for _ in 0..10 {
        soon("a put", acme.unary::<_, pb::PutResponse>(PUT, &put("k", "v"))).await.unwrap();
    }
    drop((watch, given_up));
    scene.close(ENGINE_BYTES).await;
}

/// 60,000 bytes, 16,000 times: each answer is too small to be counted by itself.
#[tokio::test(flavor = "multi_thread")]
async fn small_answers_that_nobody_reads_are_bounded_in_bytes() {
    const CALLS: usize = 16_000;
    let mut scene = Scene::open().await;
    let acme = Connection::open(scene.acme()).await;
    acme.unary::<_, pb::PutResponse>(PUT, &put("k", vec![b'v'; 60_000])).await.unwrap();
    scene.measure_from_here();
    let (unread, refused) = refused_of_many(scene.acme(), RANGE, &range("k"), CALLS).await;
    assert!(refused > 0, "900 MiB do not fit");
    scene.neighbour.works().await;
    drop(unread);
    soon("a range", acme.unary::<_, RangeResponse>(RANGE, &range("k"))).await.unwrap();
    // The tenant's answers in flight, and what a request costs of whatever size.
    scene.close(256 * MIB + CALLS as u64 * (12 << 10) + ENGINE_BYTES).await;
}

/// Three hundred bytes that answer ten million, 2,000 times, through the log: one entry has room for all of them.
#[tokio::test(flavor = "multi_thread")]
async fn txns_that_answer_far_more_than_they_say_are_bounded_in_bytes() {
    use pb::request_op::Request;
    let mut scene = Scene::open().await;
    let acme = Connection::open(scene.acme()).await;
    acme.unary::<_, pb::PutResponse>(PUT, &put("k", vec![b'v'; 1_500_000])).await.unwrap();
    scene.measure_from_here();
    let op = |request| pb::RequestOp { request: Some(request) };
    let mut success = vec![op(Request::RequestPut(put("a", "b")))];
    success.extend((0..7).map(|_| op(Request::RequestRange(range("k")))));
    let txn = pb::TxnRequest { success, ..Default::default() };
    let (unread, refused) = refused_of_many(scene.acme(), TXN, &txn, 2_000).await;
    assert!(refused > 0, "20 GiB do not fit");
    scene.neighbour.works().await;
    drop(unread);
    soon("a put", acme.unary::<_, pb::PutResponse>(PUT, &put("k", "v"))).await.unwrap();
    // Those that wait to be fetched, those that are sent, once more where one is copied into the buffer that goes out.
    scene.close(3 * 256 * MIB + ENGINE_BYTES).await;
}

/// Few bytes of the log that write a large value again, a thousand times.
#[tokio::test(flavor = "multi_thread")]
async fn puts_that_write_more_than_they_carry_are_bounded_in_bytes() {
    let mut scene = Scene::open().await;
    let acme = Connection::open(scene.acme()).await;
    acme.unary::<_, pb::PutResponse>(PUT, &put("k", vec![b'v'; 1_500_000])).await.unwrap();
    scene.measure_from_here();
    let again = pb::PutRequest { key: Bytes::from("k"), ignore_value: true, ..Default::default() };
    let (unread, refused) = refused_of_many(scene.acme(), PUT, &again, 1_000).await;
    assert_eq!(refused, 0, "they wait, for as long as it takes");
    scene.neighbour.works().await;
    drop(unread);
    // A round's changes, as the engine's batch and in its write buffers.
    scene.close(4 * 64 * MIB + ENGINE_BYTES).await;
}

/// A txn is small, what its ranges read is not. The limit on operations holds for each level of nesting, so that 64 nested
/// txns of 64 ranges are possible; here it is 16 of 16, to spare the machine if the bound does not hold.
#[tokio::test(flavor = "multi_thread")]
async fn a_txn_of_many_ranges_is_bounded_in_bytes() {
    use pb::request_op::Request;
    let mut scene = Scene::open().await;
    let acme = Connection::open(scene.acme()).await;
    fill(&acme, 16).await;
    scene.measure_from_here();
    let ranges = |n: usize| pb::TxnRequest {
        success: vec![pb::RequestOp { request: Some(Request::RequestRange(everything())) }; n],
        ..Default::default()
    };
    let nested = pb::TxnRequest {
        success: vec![pb::RequestOp { request: Some(Request::RequestTxn(ranges(16))) }; 16],
        ..Default::default()
    };
    // One that only reads, and one that goes through the log: answers of 1 and 2 GiB.
    for txn in [ranges(128), nested] {
        let status = soon("an answer", acme.status_of(TXN, framed(&txn.encode_to_vec()))).await;
        let text = "etcdserver: request is too large";
        assert_eq!((status.code(), status.message()), (Code::InvalidArgument, text));
        scene.neighbour.works().await;
    }
    scene.close(2 * 256 * MIB + ENGINE_BYTES).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn watches_that_nobody_reads_cost_their_queue_and_lose_nothing() {
    const STREAMS: u64 = 16;
    const PUTS: i64 = 256;
    let mut scene = Scene::open().await;
    let writer = Connection::open(scene.acme()).await;
    let mut unread = Vec::new();
    for number in 0..STREAMS {
        let acme = Connection::open_with_window(scene.acme(), DEFAULT_WINDOW_BYTES).await;
        let mut call = acme.call(WATCH).await.unwrap();
        // A range of its own, so that nothing is shared with the other streams.
        let range_end = Bytes::from(format!("x{number}"));
        let watch = pb::WatchCreateRequest { key: "w".into(), range_end, prev_kv: true, ..Default::default() };
        call.requests.send(&create(watch)).await.unwrap();
        let created: WatchResponse = soon("a watch", call.answers.message()).await.unwrap();
        assert!(created.created);
        unread.push(call);
    }
    scene.measure_from_here();
    // 256 MiB written, 512 MiB of events: of each also what it replaced.
    for number in 0..PUTS {
        let value = vec![b'a' + u8::try_from(number % 26).unwrap(); 1 << 20];
        writer.unary::<_, pb::PutResponse>(PUT, &put("w", value)).await.unwrap();
    }
    scene.neighbour.works().await;
    let growth = scene.server.peak_bytes() - scene.resident_before;
    // A queue of 4 MiB and one response in pieces on its way, for each.
    let allowed = STREAMS * (4 + 4) * MIB + ENGINE_BYTES;
    assert!(growth <= allowed, "{} MiB", growth / MIB);
    // Who reads after all gets everything, in order.
    let mut late = unread.pop().unwrap();
    drop(unread);
    let mut seen = 0;
    while seen < PUTS {
        let response: WatchResponse = soon("events", late.answers.message()).await.unwrap();
        seen += response.event_count() as i64;
        assert!(response.header.unwrap().revision > seen, "no event is missing in front of it");
    }
    assert_eq!(seen, PUTS);
    scene.close(allowed).await;
}

/// As above, but many streams, each with a first response on its way that is larger than its window.
#[tokio::test(flavor = "multi_thread")]
async fn many_watches_that_nobody_reads_are_bounded_in_bytes() {
    let mut scene = Scene::open().await;
    let watch = create(pb::WatchCreateRequest { key: "w".into(), ..Default::default() });
    let mut unread = unread(scene.acme(), WATCH, &watch, 1_200, false).await;
    for call in &mut unread {
        let created: WatchResponse = soon("a watch", call.answers.message()).await.unwrap();
        assert!(created.created);
    }
    scene.measure_from_here();
    let writer = Connection::open(scene.acme()).await;
    for _ in 0..16 {
        writer.unary::<_, pb::PutResponse>(PUT, &put("w", vec![b'v'; 1 << 20])).await.unwrap();
    }
    scene.neighbour.works().await;
    scene.close(2 * 256 * MIB + ENGINE_BYTES).await;
    drop(unread);
}

/// What is read of the past is shared with nobody: the clients take that their watch is there, and nothing of what it tells.
#[tokio::test(flavor = "multi_thread")]
async fn watches_of_the_past_that_nobody_reads_are_bounded_in_bytes() {
    const PUTS: usize = 12;
    let mut scene = Scene::open().await;
    fill(&Connection::open(scene.acme()).await, PUTS).await;
    scene.measure_from_here();
    let everything = pb::WatchCreateRequest { start_revision: 2, ..watch_everything() };
    let mut unread = unread(scene.acme(), WATCH, &create(everything), 600, false).await;
    for call in &mut unread {
        let created: WatchResponse = soon("a watch", call.answers.message()).await.unwrap();
        assert!(created.created);
    }
    for _ in 0..3 {
        scene.neighbour.works().await;
    }
    let mut late = unread.pop().unwrap();
    drop(unread);
    let mut seen = 0;
    while seen < PUTS {
        let response: WatchResponse = soon("events", late.answers.message()).await.unwrap();
        seen += response.event_count();
    }
    scene.close(2 * 256 * MIB + ENGINE_BYTES).await;
}

/// One delete of all that a tenant has, which each watcher has to read for itself if it wants to see what was there.
#[tokio::test(flavor = "multi_thread")]
async fn watchers_of_a_revision_that_replaced_very_much_are_served_one_after_the_other() {
    const STREAMS: usize = 18;
    const KEYS: usize = 200;
    let mut scene = Scene::open().await;
    let acme = Connection::open(scene.acme()).await;
    fill(&acme, KEYS).await;
    let watch = create(pb::WatchCreateRequest { prev_kv: true, ..watch_everything() });
    let mut unread = unread(scene.acme(), WATCH, &watch, STREAMS, false).await;
    for call in &mut unread {
        let created: WatchResponse = soon("a watch", call.answers.message()).await.unwrap();
        assert!(created.created);
    }
    scene.measure_from_here();
    let delete = pb::DeleteRangeRequest { key: "\0".into(), range_end: "\0".into(), prev_kv: false };
    soon("a delete", acme.unary::<_, pb::DeleteRangeResponse>(DELETE_RANGE, &delete)).await.unwrap();
    for _ in 0..3 {
        scene.neighbour.works().await;
    }
    // Whoever has been read makes room for the next; in which order is nobody's to choose.
    let reads = unread.into_iter().map(|mut call| async move {
        let response: WatchResponse = soon("the delete", call.answers.message()).await.unwrap();
        assert_eq!(response.event_count(), KEYS);
    });
    reads.collect::<JoinSet<()>>().join_all().await;
    scene.neighbour.works().await;
    // What two of them have on their way, as events and as bytes, and what the allocator has not given back of those before; all at once it
    // would be 18 times 200 MiB.
    scene.close(5 * 256 * MIB + ENGINE_BYTES).await;
}

fn watch_everything() -> pb::WatchCreateRequest {
    pb::WatchCreateRequest { key: "\0".into(), range_end: "\0".into(), ..Default::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_that_say_nothing_cost_little() {
    const EACH: usize = 150;
    let mut scene = Scene::open().await;
    let beginnings: [&[u8]; 5] = [
        b"",
        b"PRI * HTTP/2.0\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0",
        // A HEADERS frame that announces more than it brings.
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0\0\x20\0\x01\x04\0\0\0\x01\x82",
        b"GET /health HTT",
    ];
    let mut silent = Vec::new();
    for beginning in beginnings {
        for _ in 0..EACH {
            let mut stream = TcpStream::connect(scene.acme()).await.unwrap();
            stream.write_all(beginning).await.unwrap();
            silent.push(stream);
        }
    }
    scene.neighbour.works().await;
    let acme = Connection::open(scene.acme()).await;
    acme.unary::<_, pb::PutResponse>(PUT, &put("k", "v")).await.unwrap();
    // 64 KiB a connection: the buffers that HTTP begins with, several times over.
    scene.close((EACH * beginnings.len()) as u64 * (64 << 10) + 32 * MIB).await;
    drop(silent);
}

/// More connections than the process may have files open. The neighbour goes on making new ones, and the store opens files.
#[tokio::test(flavor = "multi_thread")]
async fn connections_of_one_tenant_leave_room_for_the_others() {
    const FILES_MAX: u32 = 512;
    let mut scene =
        Scene::open_on(|data_dir| Server::start_with_files(FILES_MAX, data_dir, &["acme", "globex", "default"])).await;
    let mut silent = JoinSet::new();
    let connected = Arc::new(AtomicU64::new(0));
    for _ in 0..FILES_MAX + 100 {
        let (address, connected) = (scene.acme(), Arc::clone(&connected));
        silent.spawn(async move {
            let _stream = TcpStream::connect(address).await.unwrap();
            connected.fetch_add(1, Ordering::Relaxed);
            std::future::pending::<()>().await;
        });
    }
    // Until the listener takes no more, or has them all.
    settled(&connected).await;
    // The neighbour makes a connection every 20 rounds.
    for _ in 0..10 {
        scene.neighbour.works().await;
    }
    let operator = Connection::open(scene.server.address(2)).await;
    let defragment = pb::DefragmentRequest {};
    let method = "/etcdserverpb.Maintenance/Defragment";
    let done = operator.unary::<_, pb::DefragmentResponse>(method, &defragment);
    soon("the store rewrites its files", done).await.unwrap();
    // Who leaves makes room.
    drop(silent);
    let acme = soon("a connection", Connection::open(scene.acme())).await;
    soon("a put", acme.unary::<_, pb::PutResponse>(PUT, &put("k", "v"))).await.unwrap();
    scene.close(ENGINE_BYTES).await;
}

/// Requests that never become whole: 600 of almost 2 MiB, on a few connections.
#[tokio::test(flavor = "multi_thread")]
async fn half_requests_are_bounded_in_bytes() {
    const PIECE_BYTES: usize = 64 << 10;
    let mut scene = Scene::open().await;
    let piece = Bytes::from(vec![0; PIECE_BYTES]);
    let mut sending = JoinSet::new();
    let sent = Arc::new(AtomicU64::new(0));
    for _ in 0..6 {
        let acme = Connection::open(scene.acme()).await;
        for _ in 0..100 {
            let (acme, piece, sent) = (acme.clone(), piece.clone(), Arc::clone(&sent));
            sending.spawn(async move {
                let mut call = acme.call(PUT).await.unwrap();
                let header = Bytes::copy_from_slice(&frame_header(0, RECEIVE_BYTES_MAX));
                let mut taken = call.requests.send_bytes(header, false).await;
                for _ in 1..RECEIVE_BYTES_MAX / PIECE_BYTES {
                    if taken.is_err() {
                        // Refused: as good as any other way to be bounded.
                        break;
                    }
                    taken = call.requests.send_bytes(piece.clone(), false).await;
                    sent.fetch_add(1, Ordering::Relaxed);
                }
                std::future::pending::<()>().await;
                drop(call);
            });
        }
    }
    // Until nothing more is taken for a while: all of it, or what the server has room for.
    let taken = settled(&sent).await;
    eprintln!("{} MiB taken of half requests", taken * PIECE_BYTES as u64 / MIB);
    scene.neighbour.works().await;
    // As for answers: the tenant's 256 MiB, and once more for buffers that are larger than what is in them.
    scene.close(2 * 256 * MIB + ENGINE_BYTES).await;
    drop(sending);
}

#[tokio::test(flavor = "multi_thread")]
async fn floods_of_streams_end_their_connection_only() {
    let mut scene = Scene::open().await;
    // Requests that are taken back at once ("rapid reset").
    let acme = Connection::open(scene.acme()).await;
    let mut made = 0;
    for _ in 0..100_000 {
        let Ok(mut call) = acme.call(RANGE).await else { break };
        call.requests.reset();
        made += 1;
    }
    eprintln!("{made} requests made and taken back");
    scene.neighbour.works().await;

    // Headers without end.
    let acme = Connection::open(scene.acme()).await;
    let mut huge = grpc_request(RANGE);
    for number in 0..1_000 {
        let name: http::HeaderName = format!("x-{number}").parse().unwrap();
        huge.headers_mut().insert(name, "v".repeat(1_000).parse().unwrap());
    }
    let status = match acme.call_with(huge).await {
        Ok(call) => call.answers.status().await,
        Err(error) => Status::unavailable(error.to_string()),
    };
    assert_ne!(status.code(), Code::Ok);

    // Many streams that stay open and say nothing.
    let acme = Connection::open(scene.acme()).await;
    let mut open = Vec::new();
    for _ in 0..20_000 {
        match acme.call(PUT).await {
            Ok(call) => open.push(call),
            Err(_) => break,
        }
    }
    scene.neighbour.works().await;
    // 16 KiB a stream: what HTTP/2 keeps of it and the task that waits for its request.
    scene.close(20_000 * (16 << 10) + 32 * MIB).await;
    drop(open);
}
