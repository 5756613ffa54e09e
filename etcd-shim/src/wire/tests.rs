//! The hand-written messages against what prost derives for the same fields.

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tenure_storage::key_value::KeyValue;

use super::*;
use crate::proto::etcdserverpb::{PutResponse, RangeStreamResponse, ResponseOp, TxnResponse, response_op};

#[derive(Clone, PartialEq, Message)]
struct PlainKeyValue {
    #[prost(bytes = "bytes", tag = "1")]
    key: Bytes,
    #[prost(int64, tag = "2")]
    create_revision: i64,
    #[prost(int64, tag = "3")]
    mod_revision: i64,
    #[prost(int64, tag = "4")]
    version: i64,
    #[prost(bytes = "bytes", tag = "5")]
    value: Bytes,
    #[prost(int64, tag = "6")]
    lease: i64,
}

#[derive(Clone, PartialEq, Message)]
struct PlainRangeResponse {
    #[prost(message, optional, tag = "1")]
    header: Option<ResponseHeader>,
    #[prost(message, repeated, tag = "2")]
    kvs: Vec<PlainKeyValue>,
    #[prost(bool, tag = "3")]
    more: bool,
    #[prost(int64, tag = "4")]
    count: i64,
}

#[derive(Clone, PartialEq, Message)]
struct PlainEvent {
    #[prost(int32, tag = "1")]
    kind: i32,
    #[prost(message, optional, tag = "2")]
    kv: Option<PlainKeyValue>,
    #[prost(message, optional, tag = "3")]
    prev_kv: Option<PlainKeyValue>,
}

#[derive(Clone, PartialEq, Message)]
struct PlainWatchResponse {
    #[prost(message, optional, tag = "1")]
    header: Option<ResponseHeader>,
    #[prost(int64, tag = "2")]
    watch_id: i64,
    #[prost(bool, tag = "3")]
    created: bool,
    #[prost(bool, tag = "4")]
    canceled: bool,
    #[prost(int64, tag = "5")]
    compact_revision: i64,
    #[prost(string, tag = "6")]
    cancel_reason: String,
    #[prost(bool, tag = "7")]
    fragment: bool,
    #[prost(message, repeated, tag = "11")]
    events: Vec<PlainEvent>,
}

/// A source of messages: small and large, with fields set and unset.
struct Source(StdRng);

impl Source {
    fn seeded(seed: u64) -> Self {
        Source(StdRng::seed_from_u64(seed))
    }

    fn number(&mut self) -> i64 {
        match self.0.random_range(0..4) {
            0 => 0,
            1 => self.0.random_range(1..200),
            2 => self.0.random(),
            _ => i64::MAX,
        }
    }

    fn bytes(&mut self) -> Bytes {
        let len = match self.0.random_range(0..12) {
            0 => 0,
            1..=8 => self.0.random_range(1..200),
            9..=10 => self.0.random_range(200..20_000),
            _ => 1_500_000,
        };
        vec![self.0.random(); len].into()
    }

    fn kv(&mut self) -> PlainKeyValue {
        PlainKeyValue {
            key: self.bytes(),
            create_revision: self.number(),
            mod_revision: self.number(),
            version: self.number(),
            value: self.bytes(),
            lease: self.number(),
        }
    }

    fn header(&mut self) -> Option<ResponseHeader> {
        let full = ResponseHeader { cluster_id: u64::MAX, member_id: 7, revision: self.number(), raft_term: 2 };
        [None, Some(ResponseHeader::default()), Some(full)][self.0.random_range(0..3)]
    }

    fn flag(&mut self) -> bool {
        self.0.random()
    }
}

fn stored(kv: &PlainKeyValue) -> Bytes {
    let stored = KeyValue {
        key: &kv.key,
        create_revision: kv.create_revision,
        mod_revision: kv.mod_revision,
        version: kv.version,
        value: &kv.value,
        lease: kv.lease,
    };
    stored.encode()
}

#[test]
fn a_range_response_is_what_prost_would_write() {
    for seed in 0..60 {
        let mut source = Source::seeded(seed);
        let kvs: Vec<PlainKeyValue> = (0..source.0.random_range(0..40)).map(|_| source.kv()).collect();
        let plain = PlainRangeResponse { header: source.header(), kvs, more: source.flag(), count: source.number() };
        let ours = RangeResponse {
            header: plain.header,
            kvs: plain.kvs.iter().map(stored).collect(),
            more: plain.more,
            count: plain.count,
        };
        let expected = plain.encode_to_vec();
        assert_eq!(ours.encoded_len(), expected.len());
        assert!(ours.encode_to_vec() == expected, "seed {seed}");
        assert_eq!(ours.kvs.keys(), plain.kvs.len());
        assert!(ours.kvs.iter().eq(plain.kvs.iter().map(stored)), "seed {seed}");

        let back = RangeResponse::decode(&expected[..]).unwrap();
        assert!(back.encode_to_vec() == expected, "seed {seed}");

        let mut drained = ours.clone();
        let mut out = Vec::new();
        drained.encode_draining(&mut out);
        assert!(out == expected, "seed {seed}");
        assert_eq!(drained.kvs, KvRope::default(), "nothing is held twice");

        assert_nested(&ours, &plain);
    }
}

#[test]
fn what_is_large_leaves_in_parts_that_make_the_whole() {
    let mut source = Source::seeded(7);
    let kvs: Vec<PlainKeyValue> = (0..3_000).map(|_| source.kv()).collect();
    for (more, count) in [(false, 0), (true, 3_001)] {
        let kvs = kvs.iter().map(stored).collect();
        let mut response = RangeResponse { header: source.header(), kvs, more, count };
        let expected = response.encode_to_vec();
        assert!(expected.len() > LARGE_BYTES);
        let RestOfMessage(parts) = response.take_large().expect("it is large");
        assert!([&[Bytes::from(response.encode_to_vec())], &parts[..]].concat().concat() == expected);
        assert!(response.take_large().is_none(), "what is left is small");
    }
}

/// The same inside the messages that carry a range answer.
fn assert_nested(ours: &RangeResponse, plain: &PlainRangeResponse) {
    let mut framed = Vec::new();
    encoding::message::encode(1, plain, &mut framed);
    assert!(RangeStreamResponse { range_response: Some(ours.clone()) }.encode_to_vec() == framed);

    let op = ResponseOp { response: Some(response_op::Response::ResponseRange(ours.clone())) };
    let txn = TxnResponse { header: None, succeeded: true, responses: vec![op] };
    let mut expected = vec![2 << 3, 1];
    put_framed(&mut expected, 3, &framed);
    assert!(txn.encode_to_vec() == expected);
}

#[test]
fn a_stored_key_value_inside_a_message_is_what_prost_would_write() {
    let mut source = Source::seeded(1);
    for _ in 0..40 {
        let kv = source.kv();
        let ours = PutResponse { header: None, prev_kv: Some(StoredKeyValue(stored(&kv))) };
        let mut expected = Vec::new();
        encoding::message::encode(2, &kv, &mut expected);
        assert!(ours.encode_to_vec() == expected);
        assert!(PutResponse::decode(&expected[..]).unwrap() == ours);
    }
}

#[test]
fn a_rope_of_small_entries_does_not_reserve_much() {
    let mut rope = KvRope::default();
    rope.push(&[7; 300]);
    assert_eq!(rope.chunks.iter().map(Vec::capacity).sum::<usize>(), CHUNK_BYTES_MIN);
    for _ in 0..100_000 {
        rope.push(&[7; 300]);
    }
    let reserved: usize = rope.chunks.iter().map(Vec::capacity).sum();
    assert!(reserved - rope.len_bytes() <= CHUNK_BYTES_MAX + rope.chunks.len() * 303);
    assert!(rope.chunks.len() < 50, "{} chunks", rope.chunks.len());
}

fn event(source: &mut Source) -> (PlainEvent, Event) {
    let delete = source.flag();
    let kv = source.kv();
    let prev_kv = source.flag().then(|| source.kv());
    let ours = Event {
        kind: if delete { EventKind::Delete } else { EventKind::Put },
        key: kv.key.clone(),
        kv: stored(&kv),
        prev_kv: prev_kv.as_ref().map(stored),
    };
    (PlainEvent { kind: i32::from(delete), kv: Some(kv), prev_kv }, ours)
}

#[test]
fn a_watch_response_is_what_prost_would_write() {
    for seed in 0..40 {
        let mut source = Source::seeded(seed);
        let (plain_events, events): (Vec<PlainEvent>, Vec<Event>) =
            (0..source.0.random_range(0..10)).map(|_| event(&mut source)).unzip();
        let plain = PlainWatchResponse {
            header: source.header(),
            watch_id: source.number(),
            created: source.flag(),
            canceled: source.flag(),
            compact_revision: source.number(),
            cancel_reason: if source.flag() { "mvcc: watcher range is empty".into() } else { String::new() },
            fragment: source.flag(),
            events: plain_events,
        };
        let ours = WatchResponse {
            header: plain.header,
            watch_id: plain.watch_id,
            created: plain.created,
            canceled: plain.canceled,
            compact_revision: plain.compact_revision,
            cancel_reason: plain.cancel_reason.clone(),
            fragment: plain.fragment,
            events: encode_events(&events),
        };
        let expected = plain.encode_to_vec();
        assert_eq!(ours.encoded_len(), expected.len());
        assert!(ours.encode_to_vec() == expected, "seed {seed}");
        assert!(WatchResponse::decode(&expected[..]).unwrap() == ours, "seed {seed}");
        assert_eq!(ours.event_count(), events.len());
    }
}

#[test]
fn events_are_cut_between_events_and_nowhere_else() {
    let event = |bytes: usize| Event {
        kind: EventKind::Put,
        key: Bytes::new(),
        kv: stored(&PlainKeyValue { value: vec![b'v'; bytes].into(), ..Default::default() }),
        prev_kv: None,
    };
    let cases: Vec<(&str, Vec<usize>, Vec<usize>)> = vec![
        ("nothing", vec![], vec![0]),
        ("one that fits", vec![100], vec![1]),
        ("one that does not", vec![5_000], vec![1]),
        ("two that fit together", vec![400, 400], vec![2]),
        ("two that do not", vec![600, 600], vec![1, 1]),
        ("a large one between small ones", vec![10, 10, 5_000, 10, 10], vec![2, 1, 2]),
    ];
    for (what, sizes, expected) in cases {
        let whole = encode_events(&sizes.iter().map(|bytes| event(*bytes)).collect::<Vec<_>>());
        let pieces = split_events(&whole, 1_000);
        let counts: Vec<usize> = pieces.iter().map(|piece| Frames { rest: piece }.count()).collect();
        assert_eq!(counts, expected, "{what}");
        assert_eq!(pieces.concat(), whole, "{what}");
        for piece in pieces.iter().filter(|piece| (Frames { rest: piece }).count() > 1) {
            assert!(piece.len() < 1_000, "{what}");
        }
    }
}

#[test]
fn frames_of_foreign_bytes_end_without_a_panic() {
    for bytes in [&b"\xff"[..], b"\x12", b"\x12\x05ab", b"\x12\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"] {
        assert_eq!(Frames { rest: bytes }.count(), 0);
    }
}
