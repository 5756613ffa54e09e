//! The KV service over a cell, against what etcd 3.7 answered (contract 1.1), down to the bytes of its frames.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use http_body_util::BodyExt;
use prost::Message;
use tokio_stream::StreamExt;
use tonic::body::Body;
use tonic::codegen::Service;
use tonic::{Code, Status};

use super::*;
use crate::inflight::ResponsePermit;
use crate::proto::etcdserverpb::compare::{CompareTarget, TargetUnion};
use crate::proto::etcdserverpb::kv_server::KvServer;
use crate::proto::etcdserverpb::request_op::Request as Op;
use crate::proto::etcdserverpb::response_op::Response as Answer;
use crate::proto::etcdserverpb::{Compare, RequestOp};
use crate::service::testing::{TestCell, identity, request};

/// Keys, count and `more` of one message of a stream.
type Shape = (usize, i64, bool);

struct Kvs {
    cell: TestCell,
    kv: KvService,
}

impl Kvs {
    async fn open() -> Kvs {
        let cell = TestCell::open().await;
        let kv = KvService::new(cell.context());
        Kvs { cell, kv }
    }

    async fn put(&self, key: &str, value: impl Into<Bytes>) -> i64 {
        let put = PutRequest { key: key.to_string().into(), value: value.into(), ..Default::default() };
        self.kv.put(request("default", put)).await.unwrap().into_inner().header.unwrap().revision
    }

    async fn get(&self, range: RangeRequest) -> Result<RangeResponse, Status> {
        self.kv.range(request("default", range)).await.map(Response::into_inner)
    }

    async fn txn(&self, txn: TxnRequest) -> Result<TxnResponse, Status> {
        self.kv.txn(request("default", txn)).await.map(Response::into_inner)
    }

    /// Each message's shape, and what they are together.
    async fn stream(&self, range: RangeRequest) -> Result<(Vec<Shape>, RangeResponse), Status> {
        let mut stream = self.kv.range_stream(request("default", range)).await?.into_inner();
        let mut shapes = Vec::new();
        let mut whole = RangeResponse::default();
        while let Some(message) = stream.next().await {
            let message = message?.range_response.unwrap();
            assert_eq!(whole.header, None, "a header ends the stream");
            shapes.push((message.kvs.keys(), message.count, message.more));
            whole.merge(&message.encode_to_vec()[..]).unwrap();
        }
        Ok((shapes, whole))
    }
}

fn prefix(from: &'static str, to: &'static str) -> RangeRequest {
    RangeRequest { key: from.into(), range_end: to.into(), ..Default::default() }
}

#[tokio::test]
async fn put_range_delete_and_their_headers() {
    let kvs = Kvs::open().await;
    assert_eq!(kvs.get(prefix("a", "")).await.unwrap().header.unwrap().revision, 1);
    assert_eq!(kvs.put("a", "1").await, 2);
    assert_eq!(kvs.put("b", "2").await, 3);
    let all = kvs.get(prefix("a", "c")).await.unwrap();
    assert_eq!((all.count, all.more, all.kvs.keys()), (2, false, 2));
    let old = kvs.get(RangeRequest { revision: 2, ..prefix("a", "c") }).await.unwrap();
    assert_eq!((old.count, old.header.unwrap().revision), (1, 3), "the header tells of now");
    let delete = pb_delete("a", "c", true);
    let deleted = kvs.kv.delete_range(request("default", delete)).await.unwrap().into_inner();
    assert_eq!((deleted.deleted, deleted.prev_kvs.len(), deleted.header.unwrap().revision), (2, 2, 4));
    let header = all.header.unwrap();
    assert!(header.cluster_id != 0 && header.member_id != 0 && header.raft_term != 0);
}

fn pb_delete(key: &'static str, range_end: &'static str, prev_kv: bool) -> DeleteRangeRequest {
    DeleteRangeRequest { key: key.into(), range_end: range_end.into(), prev_kv }
}

#[tokio::test]
async fn tenants_do_not_meet() {
    let kvs = Kvs::open().await;
    kvs.put("a", "1").await;
    let other = kvs.kv.range(request("other", prefix("a", "z"))).await.unwrap().into_inner();
    assert_eq!((other.count, other.header.unwrap().revision), (0, 1));
    let nobody = kvs.kv.range(request("nobody", prefix("a", "z"))).await.unwrap_err();
    assert_eq!(nobody.code(), Code::PermissionDenied);
    let no_identity = kvs.kv.range(Request::new(prefix("a", "z"))).await.unwrap_err();
    assert_eq!(no_identity.code(), Code::PermissionDenied);
}

#[tokio::test]
async fn txns_show_the_revision_of_each_step() {
    let kvs = Kvs::open().await;
    kvs.put("k", "1").await;
    let get = || RequestOp::from(Op::RequestRange(prefix("k", "")));
    let put = RequestOp::from(Op::RequestPut(PutRequest { key: "k".into(), prev_kv: true, ..Default::default() }));
    let nested = RequestOp::from(Op::RequestTxn(TxnRequest { success: vec![get()], ..Default::default() }));
    let equal = Compare {
        key: "k".into(),
        target: CompareTarget::Mod.into(),
        target_union: Some(TargetUnion::ModRevision(2)),
        ..Default::default()
    };
    let success = vec![get(), put, nested];
    let answer = kvs.txn(TxnRequest { compare: vec![equal], success, failure: vec![] }).await.unwrap();
    assert!(answer.succeeded);
    assert_eq!(answer.header.unwrap().revision, 3);
    let [first, second, third] = &answer.responses[..] else { panic!("three answers") };
    let Some(Answer::ResponseRange(range)) = &first.response else { panic!("a range") };
    assert_eq!(range.header.unwrap(), pb_revision(2));
    let Some(Answer::ResponsePut(put)) = &second.response else { panic!("a put") };
    assert_eq!(put.header.unwrap(), pb_revision(3));
    assert!(put.prev_kv.is_some());
    let Some(Answer::ResponseTxn(nested)) = &third.response else { panic!("a txn") };
    assert_eq!(nested.header, Some(Default::default()), "there, and empty");

    let read_only = kvs.txn(TxnRequest { success: vec![get()], ..Default::default() }).await.unwrap();
    assert_eq!(read_only.header.unwrap().revision, 3);
    let future = RequestOp::from(Op::RequestRange(RangeRequest { revision: 99, ..prefix("k", "") }));
    let refused = kvs.txn(TxnRequest { success: vec![future], ..Default::default() }).await.unwrap_err();
    assert_eq!(refused.message(), "etcdserver: mvcc: required revision is a future revision");
}

fn pb_revision(revision: i64) -> crate::proto::etcdserverpb::ResponseHeader {
    crate::proto::etcdserverpb::ResponseHeader { revision, ..Default::default() }
}

#[tokio::test]
async fn a_request_is_checked_before_its_size() {
    let kvs = Kvs::open().await;
    let put = |key: &'static str, bytes: usize, lease| {
        request("default", PutRequest { key: key.into(), value: vec![0; bytes].into(), lease, ..Default::default() })
    };
    for (put, expected) in [
        (put("", 1_700_000, 0), "etcdserver: key is not provided"),
        (put("a", 1_700_000, 9), "etcdserver: request is too large"),
        (put("a", 0, 9), "etcdserver: requested lease not found"),
    ] {
        assert_eq!(kvs.kv.put(put).await.unwrap_err().message(), expected);
    }
    let large = RangeRequest { key: vec![b'k'; 1_600_000].into(), ..Default::default() };
    assert!(kvs.get(large.clone()).await.is_ok(), "reads have no size");
    let read_only = TxnRequest { success: vec![Op::RequestRange(large).into()], ..Default::default() };
    assert!(kvs.txn(read_only).await.is_ok());
}

#[tokio::test]
async fn a_write_that_does_not_fit_the_quota_raises_the_alarm() {
    let full = TestCell::with_quota(13 * 4096).await;
    let kv = KvService::new(full.context());
    let put = |key: &'static str| PutRequest { key: key.into(), value: vec![0; 4096].into(), ..Default::default() };
    let mut puts = 0;
    let refused = loop {
        match kv.put(request("default", put("abc"))).await {
            Ok(_) => puts += 1,
            Err(refused) => break refused,
        }
    };
    assert!((2..13).contains(&puts), "{puts} puts");
    let no_space = "etcdserver: mvcc: database space exceeded";
    assert_eq!((refused.code(), refused.message()), (Code::ResourceExhausted, no_space));
    let small = kv.put(request("default", PutRequest { key: "z".into(), ..Default::default() })).await.unwrap_err();
    assert_eq!(small.message(), no_space, "the alarm stops what would fit");
    assert_eq!(kv.put(request("default", put(""))).await.unwrap_err().message(), no_space, "before the check");
    assert!(kv.delete_range(request("default", pb_delete("abc", "", false))).await.is_ok());
    assert!(kv.put(request("other", put("abc"))).await.is_ok(), "another tenant has its own quota");
}

#[tokio::test]
async fn a_physical_compaction_leaves_nothing_to_reclaim() {
    let kvs = Kvs::open().await;
    for n in 0..1_500 {
        kvs.put("a", n.to_string()).await;
    }
    let compact = |revision| request("default", CompactionRequest { revision, physical: true });
    let answer = kvs.kv.compact(compact(1_500)).await.unwrap().into_inner();
    assert_eq!(answer.header.unwrap().revision, 1_501);
    let tenant = kvs.cell.tenant("default");
    assert_eq!(tenant.reader().state().reclaimed_revision, 1_500);
    for (revision, text) in [
        (1_500, "etcdserver: mvcc: required revision has been compacted"),
        (9_000, "etcdserver: mvcc: required revision is a future revision"),
    ] {
        let refused = kvs.kv.compact(compact(revision)).await.unwrap_err();
        assert_eq!((refused.code(), refused.message()), (Code::OutOfRange, text));
    }
}

#[tokio::test]
async fn a_stream_is_a_range_in_pieces() {
    let kvs = Kvs::open().await;
    for n in 1..=25 {
        kvs.put(&format!("s/{n:02}"), "x".repeat(n)).await;
    }
    let range = || prefix("s/", "s0");
    let cases: Vec<(&str, RangeRequest, Vec<Shape>)> = vec![
        ("all", range(), vec![(10, 0, false), (15, 25, false)]),
        ("limit 7", RangeRequest { limit: 7, ..range() }, vec![(7, 25, true)]),
        ("limit 25", RangeRequest { limit: 25, ..range() }, vec![(10, 0, false), (15, 25, false)]),
        ("limit 26", RangeRequest { limit: 26, ..range() }, vec![(10, 0, false), (15, 25, false)]),
        ("limit 10", RangeRequest { limit: 10, ..range() }, vec![(10, 25, true)]),
        ("limit 11", RangeRequest { limit: 11, ..range() }, vec![(10, 0, false), (1, 25, true)]),
        ("limit -1", RangeRequest { limit: -1, ..range() }, vec![(25, 25, false)]),
        ("keys only", RangeRequest { keys_only: true, ..range() }, vec![(10, 0, false), (15, 25, false)]),
        ("count only", RangeRequest { count_only: true, ..range() }, vec![(0, 25, false)]),
        ("count only, limit", RangeRequest { count_only: true, limit: 3, ..range() }, vec![(0, 25, false)]),
        ("the past", RangeRequest { revision: 5, ..range() }, vec![(4, 4, false)]),
        ("the past, limit", RangeRequest { revision: 5, limit: 2, ..range() }, vec![(2, 4, true)]),
        ("no such key", prefix("nothing", ""), vec![(0, 0, false)]),
        ("a single key", prefix("s/05", ""), vec![(1, 1, false)]),
        ("reversed", prefix("s0", "s/"), vec![(0, 0, false)]),
        ("from a key", prefix("s/", "\0"), vec![(10, 0, false), (15, 25, false)]),
    ];
    for (what, request, expected) in cases {
        let (shapes, whole) = kvs.stream(request.clone()).await.unwrap();
        assert_eq!(shapes, expected, "{what}");
        let at_once = kvs.get(request).await.unwrap();
        assert!(whole.kvs.iter().eq(at_once.kvs.iter()), "{what}");
        assert_eq!((whole.header, whole.more, whole.count), (at_once.header, at_once.more, at_once.count), "{what}");
    }
    let by_value = RangeRequest { sort_target: 4, ..range() };
    assert_eq!(kvs.stream(by_value).await.unwrap().0, vec![(10, 0, false), (15, 25, false)], "in key order");
    let compacted = kvs.stream(RangeRequest { revision: 99, ..range() }).await.unwrap_err();
    assert_eq!(compacted.code(), Code::OutOfRange);
}

#[tokio::test]
async fn pieces_adapt_to_the_size_of_values() {
    let kvs = Kvs::open().await;
    for n in 0..20 {
        kvs.put(&format!("b/{n:02}"), vec![0; 1_500_000]).await;
    }
    for n in 0..40 {
        kvs.put(&format!("h/{n:02}"), vec![0; 100_000]).await;
    }
    for n in 0..200 {
        kvs.put(&format!("g/{n:03}"), vec![0; 100]).await;
    }
    let keys = |shapes: Vec<Shape>| shapes.into_iter().map(|(keys, ..)| keys).collect::<Vec<_>>();
    assert_eq!(keys(kvs.stream(prefix("b/", "b0")).await.unwrap().0), [10, 5, 2, 2, 1]);
    assert_eq!(keys(kvs.stream(prefix("h/", "h0")).await.unwrap().0), [10, 10, 10, 10]);
    assert_eq!(keys(kvs.stream(prefix("g/", "g0")).await.unwrap().0), [10, 20, 40, 80, 50]);
}

#[tokio::test]
async fn a_stream_stays_at_its_revision_and_fails_when_that_is_compacted() {
    let kvs = Kvs::open().await;
    for n in 0..200 {
        kvs.put(&format!("c/{n:03}"), vec![0; 1_000]).await;
    }
    let open = || async { kvs.kv.range_stream(request("default", prefix("c/", "c0"))).await.unwrap().into_inner() };

    let mut pinned = open().await;
    let mut keys = pinned.next().await.unwrap().unwrap().range_response.unwrap().kvs.keys();
    kvs.put("c/zzz", "later").await;
    while let Some(message) = pinned.next().await {
        let message = message.unwrap().range_response.unwrap();
        keys += message.kvs.keys();
        if let Some(header) = message.header {
            assert_eq!((header.revision, message.count), (201, 200), "as it was at the start");
        }
    }
    assert_eq!(keys, 200);

    let mut overtaken = open().await;
    overtaken.next().await.unwrap().unwrap();
    let now = kvs.put("c/zzz", "and again").await;
    kvs.kv.compact(request("default", CompactionRequest { revision: now, physical: false })).await.unwrap();
    let end = loop {
        match overtaken.next().await.unwrap() {
            Ok(message) => assert_eq!(message.range_response.unwrap().header, None),
            Err(end) => break end,
        }
    };
    assert_eq!(end.message(), "etcdserver: mvcc: required revision has been compacted");
    assert!(overtaken.next().await.is_none());
}

#[tokio::test]
async fn large_answers_are_counted_until_their_permit_is_gone() {
    let kvs = Kvs::open().await;
    for n in 0..4 {
        kvs.put(&format!("h/{n:02}"), vec![0; 100_000]).await;
    }
    let in_flight = &kvs.kv.context.in_flight;
    let mut response = kvs.kv.range(request("default", prefix("h/", "h0"))).await.unwrap();
    assert_eq!(in_flight.bytes(), response.get_ref().kvs.len_bytes());
    let permit = response.extensions_mut().remove::<ResponsePermit>().unwrap();
    drop(response);
    assert!(in_flight.bytes() > 400_000);
    drop(permit);
    assert_eq!(in_flight.bytes(), 0);

    let mut stream = kvs.kv.range_stream(request("default", prefix("h/", "h0"))).await.unwrap().into_inner();
    stream.next().await.unwrap().unwrap();
    assert!(in_flight.bytes() > 400_000);
    assert!(stream.next().await.is_none());
    assert_eq!(in_flight.bytes(), 0);
}

/// Sends one gRPC message and answers the status and the body's messages.
async fn call(kv: &KvService, path: &str, message: &[u8]) -> (Code, String, Vec<Bytes>) {
    let mut frame = BytesMut::new();
    frame.put_u8(0);
    frame.put_u32(u32::try_from(message.len()).unwrap());
    frame.put_slice(message);
    let http = http::Request::post(format!("/etcdserverpb.KV/{path}"))
        .header("content-type", "application/grpc")
        .extension(identity("default"))
        .body(Body::new(http_body_util::Full::new(frame.freeze())))
        .unwrap();
    let mut server = KvServer::new(kv.clone()).max_encoding_message_size(usize::MAX);
    let (parts, body) = server.call(http).await.unwrap().into_parts();
    let body = body.collect().await.unwrap();
    let headers = body.trailers().unwrap_or(&parts.headers).clone();
    let status = Status::from_header_map(&headers).unwrap();
    let mut bytes = body.to_bytes();
    let mut messages = Vec::new();
    while bytes.has_remaining() {
        assert_eq!(bytes.get_u8(), 0, "not compressed");
        let len = bytes.get_u32() as usize;
        messages.push(bytes.split_to(len));
    }
    (status.code(), status.message().to_string(), messages)
}

#[tokio::test]
async fn frames_hold_what_the_messages_hold() {
    let kvs = Kvs::open().await;
    for n in 0..30 {
        kvs.put(&format!("h/{n:02}"), vec![7; 100_000]).await;
    }
    let range = prefix("h/", "h0");
    let (code, _, messages) = call(&kvs.kv, "Range", &range.encode_to_vec()).await;
    assert_eq!((code, messages.len()), (Code::Ok, 1));
    assert!(messages[0] == kvs.get(range).await.unwrap().encode_to_vec());
    assert_eq!(kvs.kv.context.in_flight.bytes(), 0);
}

#[tokio::test]
async fn malformed_requests_are_refused_by_the_codec() {
    let kvs = Kvs::open().await;
    let (code, text, _) = call(&kvs.kv, "Put", b"\xff\xff\xff").await;
    assert_eq!(code, Code::Internal);
    assert!(text.starts_with("grpc: error unmarshalling request: "), "{text}");

    let (code, ..) = call(&kvs.kv, "Put", b"\x0a\x01k\xf8\x3f\x01").await;
    assert_eq!(code, Code::Ok, "a field of a later release is ignored");

    // A txn around a txn, written by hand: building such a message would need the stack that reading it must not.
    let nested = |depth: usize| {
        (0..depth).fold(Vec::new(), |txn, _| {
            let mut op = Vec::new();
            prost::encoding::bytes::encode(4, &txn, &mut op);
            let mut outer = Vec::new();
            prost::encoding::bytes::encode(2, &op, &mut outer);
            outer
        })
    };
    assert_eq!(call(&kvs.kv, "Txn", &nested(40)).await.0, Code::Ok);
    let (code, text, _) = call(&kvs.kv, "Txn", &nested(2_000)).await;
    assert_eq!(code, Code::Internal, "{text}");

    let mut limited = KvServer::new(kvs.kv.clone()).max_decoding_message_size(16);
    let mut frame = BytesMut::from(&[0, 0, 0, 0, 17][..]);
    frame.put_slice(&[0; 17]);
    let large = http::Request::post("/etcdserverpb.KV/Put")
        .header("content-type", "application/grpc")
        .body(Body::new(http_body_util::Full::new(frame.freeze())))
        .unwrap();
    let refused = Status::from_header_map(limited.call(large).await.unwrap().headers()).unwrap();
    let refused = crate::status::in_etcds_words(refused);
    assert_eq!(refused.message(), "grpc: received message larger than max (17 vs. 16)", "tonic's words are known");
}
