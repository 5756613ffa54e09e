//! What is expected here is what etcd 3.7 answered to the same requests.

use bytes::Bytes;

use super::*;
use crate::proto::etcdserverpb::Compare;

const OPS: usize = 128;

fn bytes(s: &'static str) -> Bytes {
    Bytes::from_static(s.as_bytes())
}

fn get(key: &'static str) -> RequestOp {
    Request::RequestRange(RangeRequest { key: bytes(key), ..Default::default() }).into()
}

fn put_op(key: &'static str) -> RequestOp {
    Request::RequestPut(PutRequest { key: bytes(key), ..Default::default() }).into()
}

fn del(key: &'static str) -> RequestOp {
    del_range(key, "")
}

fn del_range(key: &'static str, end: &'static str) -> RequestOp {
    let request = DeleteRangeRequest { key: bytes(key), range_end: bytes(end), prev_kv: false };
    Request::RequestDeleteRange(request).into()
}

fn nested(success: Vec<RequestOp>) -> RequestOp {
    branches(success, vec![])
}

fn branches(success: Vec<RequestOp>, failure: Vec<RequestOp>) -> RequestOp {
    Request::RequestTxn(TxnRequest { compare: vec![], success, failure }).into()
}

impl From<Request> for RequestOp {
    fn from(request: Request) -> Self {
        RequestOp { request: Some(request) }
    }
}

fn of(success: Vec<RequestOp>, failure: Vec<RequestOp>) -> TxnRequest {
    TxnRequest { compare: vec![], success, failure }
}

fn check(success: Vec<RequestOp>) -> Result<(), CheckError> {
    txn(&of(success, vec![]), OPS)
}

const OK: Result<(), CheckError> = Ok(());
const DUPLICATE: Result<(), CheckError> = Err(CheckError::DuplicateKey);
const TOO_MANY: Result<(), CheckError> = Err(CheckError::TooManyOps);

#[test]
fn the_duplicate_rule() {
    let cases: Vec<(&str, Vec<RequestOp>, Result<(), CheckError>)> = vec![
        ("two puts of a key", vec![put_op("d"), put_op("d")], DUPLICATE),
        ("put, then delete", vec![put_op("d"), del("d")], DUPLICATE),
        ("delete, then put", vec![del("d"), put_op("d")], DUPLICATE),
        ("put inside a deleted range", vec![put_op("d"), del_range("c", "e")], DUPLICATE),
        ("put at a deleted range's start", vec![put_op("c"), del_range("c", "e")], DUPLICATE),
        ("put at a deleted range's end", vec![put_op("e"), del_range("c", "e")], OK),
        ("overlapping deletes", vec![del_range("c", "e"), del_range("d", "f")], OK),
        ("the same delete twice", vec![del("c"), del("c")], OK),
        ("put between two deleted ranges", vec![del_range("a", "c"), put_op("d"), del_range("e", "g")], OK),
        ("put in the middle of merged ranges", vec![del_range("a", "c"), del_range("b", "f"), put_op("d")], DUPLICATE),
        ("put in ranges that touch", vec![del_range("c", "e"), del_range("a", "c"), put_op("b")], DUPLICATE),
        ("reads around a put", vec![get("d"), put_op("d"), get("d")], OK),
        ("delete of a key, put of one it is a prefix of", vec![del("d"), put_op("d\0")], OK),
        ("nested put behind a put", vec![put_op("d"), nested(vec![put_op("d")])], DUPLICATE),
        ("nested put before a put", vec![nested(vec![put_op("d")]), put_op("d")], DUPLICATE),
        ("nested put behind a delete", vec![del("d"), nested(vec![put_op("d")])], DUPLICATE),
        ("nested put before a delete", vec![nested(vec![put_op("d")]), del("d")], DUPLICATE),
        ("nested delete behind a put", vec![put_op("d"), nested(vec![del("d")])], DUPLICATE),
        ("nested delete before a put", vec![nested(vec![del("d")]), put_op("d")], DUPLICATE),
        ("then and else put the same key", vec![branches(vec![put_op("d")], vec![put_op("d")])], OK),
        ("then deletes, else puts", vec![branches(vec![del("d")], vec![put_op("d")])], OK),
        ("then puts, else deletes", vec![branches(vec![put_op("d")], vec![del("d")])], OK),
        ("siblings put the same key", vec![nested(vec![put_op("d")]), nested(vec![put_op("d")])], DUPLICATE),
        (
            "a then and a sibling's else put the same key",
            vec![nested(vec![put_op("d")]), branches(vec![], vec![put_op("d")])],
            DUPLICATE,
        ),
        ("QUIRK: a delete to the end of the keys covers no put", vec![put_op("d"), del_range("a", "\0")], OK),
        ("QUIRK: nor behind it", vec![del_range("a", "\0"), put_op("d")], OK),
        ("QUIRK: a reversed delete covers no put", vec![del_range("f", "c"), put_op("d")], OK),
        (
            "QUIRK: a later sibling's delete does not meet an earlier sibling's put",
            vec![nested(vec![put_op("d")]), nested(vec![del("d")])],
            OK,
        ),
        (
            "but an earlier sibling's delete meets a later sibling's put",
            vec![nested(vec![del("d")]), nested(vec![put_op("d")])],
            DUPLICATE,
        ),
        (
            "QUIRK: the same one level down",
            vec![nested(vec![nested(vec![put_op("d")])]), nested(vec![nested(vec![del("d")])])],
            OK,
        ),
        (
            "and its reverse",
            vec![nested(vec![nested(vec![del_range("c", "e")])]), nested(vec![nested(vec![put_op("d")])])],
            DUPLICATE,
        ),
    ];
    for (what, success, expected) in cases {
        assert_eq!(check(success.clone()), expected, "{what}");
        assert_eq!(txn(&of(vec![], success), OPS), expected, "{what}, in the failure branch");
    }
    assert_eq!(txn(&of(vec![put_op("d")], vec![put_op("d")]), OPS), OK, "the branches of the outermost txn are apart");
}

#[test]
fn the_budget_on_operations() {
    let gets = |n| vec![get("a"); n];
    let compares = |n| vec![Compare { key: bytes("a"), ..Default::default() }; n];
    assert_eq!(check(gets(128)), OK);
    assert_eq!(check(gets(129)), TOO_MANY);
    assert_eq!(txn(&of(vec![], gets(129)), OPS), TOO_MANY);
    let full = TxnRequest { compare: compares(128), success: gets(128), failure: gets(128) };
    assert_eq!(txn(&full, OPS), OK, "the lists are not summed");
    assert_eq!(txn(&TxnRequest { compare: compares(129), ..Default::default() }, OPS), TOO_MANY);
    assert_eq!(check(vec![nested(gets(127))]), OK);
    assert_eq!(check(vec![nested(gets(128))]), TOO_MANY, "a parent's longest list is taken off");
    assert_eq!(check(vec![nested(gets(126)), nested(gets(126))]), OK, "siblings are not summed");
    let parent = |n| TxnRequest { compare: compares(10), success: vec![nested(gets(n))], failure: vec![] };
    assert_eq!(txn(&parent(118), OPS), OK);
    assert_eq!(txn(&parent(119), OPS), TOO_MANY, "compares count towards a parent's longest list");
}

#[test]
fn nesting_is_bounded_whatever_the_budget() {
    let deep = |depth| (0..depth).fold(get("a"), |op, _| nested(vec![op]));
    assert_eq!(txn(&of(vec![deep(TXN_DEPTH_MAX)], vec![]), usize::MAX), OK);
    assert_eq!(txn(&of(vec![deep(TXN_DEPTH_MAX + 1)], vec![]), usize::MAX), TOO_MANY);
}

#[test]
fn operations_are_checked_before_duplicates_and_after_the_budget() {
    let range = |sort_order| Request::RequestRange(RangeRequest { key: bytes("a"), sort_order, ..Default::default() });
    let cases: Vec<(&str, Vec<RequestOp>, CheckError)> = vec![
        ("too many, one without key", vec![put_op(""); 129], CheckError::TooManyOps),
        ("duplicate, then one without key", vec![put_op("a"), put_op("a"), put_op("")], CheckError::EmptyKey),
        ("bad order and duplicate", vec![range(9).into(), put_op("a"), put_op("a")], CheckError::InvalidSortOption),
        ("no content", vec![RequestOp { request: None }], CheckError::KeyNotFound),
        ("get without key", vec![get("")], CheckError::EmptyKey),
        ("delete without key", vec![del("")], CheckError::EmptyKey),
        ("nested put without key", vec![nested(vec![put_op("")])], CheckError::EmptyKey),
    ];
    for (what, success, expected) in cases {
        assert_eq!(check(success), Err(expected), "{what}");
    }
    let compare = TxnRequest { compare: vec![Compare::default()], ..Default::default() };
    assert_eq!(txn(&compare, OPS), Err(CheckError::EmptyKey));
}

#[test]
fn ranges_and_puts() {
    let order =
        |sort_order, sort_target| RangeRequest { key: bytes("a"), sort_order, sort_target, ..Default::default() };
    for (number, target) in [(7, 0), (0, 9), (-1, 0)] {
        assert_eq!(range(&order(number, target)), Err(CheckError::InvalidSortOption));
    }
    for (number, target, expected) in [
        (0, 1, Ok(())),
        (0, 4, Ok(())),
        (1, 0, Ok(())),
        (1, 1, Err(CheckError::StreamSortOrder)),
        (2, 0, Err(CheckError::StreamSortOrder)),
        (2, 4, Err(CheckError::StreamSortOrder)),
        (9, 0, Err(CheckError::InvalidSortOption)),
    ] {
        assert_eq!(range_stream(&order(number, target)), expected, "order {number} target {target}");
    }
    let filtered = RangeRequest { key: bytes("a"), max_create_revision: 1, ..Default::default() };
    assert_eq!(range_stream(&filtered), Err(CheckError::StreamRevisionFilter));

    let with = |value, lease, ignore_value, ignore_lease| {
        put(&PutRequest { key: bytes("a"), value: bytes(value), lease, ignore_value, ignore_lease, prev_kv: false })
    };
    assert_eq!(with("v", 0, true, false), Err(CheckError::ValueProvided));
    assert_eq!(with("", 5, false, true), Err(CheckError::LeaseProvided));
    assert_eq!(with("", 0, true, true), Ok(()));
    assert_eq!(put(&PutRequest::default()), Err(CheckError::EmptyKey));
}

#[test]
fn the_largest_put_is_etcds() {
    let put = |bytes| {
        let request =
            PutRequest { key: Bytes::from_static(b"big"), value: vec![0; bytes].into(), ..Default::default() };
        (request.encoded_len(), size(&request, 1_572_864))
    };
    assert_eq!(put(1_572_838), (1_572_847, Ok(1_572_847)));
    assert_eq!(put(1_572_839), (1_572_848, Err(CheckError::RequestTooLarge)));
}

#[test]
fn costs_and_paths() {
    let cost = |success: Vec<RequestOp>, failure| txn_cost(&of(success, failure));
    assert_eq!(cost(vec![], vec![]), 0);
    assert_eq!(cost(vec![put_op("kk")], vec![get("a")]), 258);
    assert_eq!(cost(vec![put_op("kk"), put_op("k2")], vec![put_op("k")]), 516);
    assert_eq!(cost(vec![], vec![nested(vec![put_op("kk")])]), 258);
    assert_eq!(cost(vec![del("a"), get("a")], vec![]), 0);

    let serializable = RequestOp::from(Request::RequestRange(RangeRequest {
        key: bytes("a"),
        serializable: true,
        ..Default::default()
    }));
    let path = |success: Vec<RequestOp>, failure| txn_path(&of(success, failure));
    assert_eq!(path(vec![], vec![]), TxnPath::ReadSerializable);
    assert_eq!(path(vec![serializable.clone()], vec![serializable.clone()]), TxnPath::ReadSerializable);
    assert_eq!(path(vec![serializable], vec![get("a")]), TxnPath::ReadLinearizable);
    assert_eq!(path(vec![nested(vec![])], vec![]), TxnPath::Write);
    assert_eq!(path(vec![get("a")], vec![del("a")]), TxnPath::Write);
}

/// A request of the largest size that spreads its operations over siblings and levels must not occupy a thread for long.
#[test]
fn a_hostile_txn_is_checked_in_bounded_time() {
    let key = |n: usize| Bytes::from(format!("{n:06}"));
    let mut next = 0;
    let mut leaf = || {
        let ops = (0..40).map(|op| {
            next += 2;
            match op % 2 {
                0 => Request::RequestPut(PutRequest { key: key(next), ..Default::default() }).into(),
                _ => {
                    let request = DeleteRangeRequest { key: key(next), range_end: key(next + 1), prev_kv: false };
                    Request::RequestDeleteRange(request).into()
                }
            }
        });
        nested(ops.collect())
    };
    let siblings = (0..40).map(|_| nested((0..40).map(|_| leaf()).collect())).collect();
    // Forty levels over 64,000 operations.
    let deep = (0..40).fold(nested(siblings), |op, _| nested(vec![del("x"), op]));
    let start = std::time::Instant::now();
    assert_eq!(txn(&of(vec![deep], vec![]), 1_000), OK);
    assert!(start.elapsed() < std::time::Duration::from_secs(3), "took {:?}", start.elapsed());
}
