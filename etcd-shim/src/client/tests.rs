//! The in-process client over a cell.

use tenure_storage::{Compare, CompareResult, CompareTarget, SortOrder};

use super::*;
use crate::service::testing::TestCell;

fn put_op(key: &'static str, value: &'static str) -> TxnOp {
    TxnOp::Put(PutRequest {
        key: key.into(),
        value: value.into(),
        lease: LeaseId::NONE,
        prev_kv: true,
        ignore_value: false,
        ignore_lease: false,
    })
}

fn prefix() -> KeyRange {
    KeyRange::HalfOpen { start: "a/".into(), end: "a0".into() }
}

#[tokio::test]
async fn keys_are_written_read_and_deleted() {
    let cell = TestCell::open().await;
    let client = Client::new(cell.tenant("default"));
    assert_eq!(client.put("a/1", "x").await.unwrap(), PutResult { revision: 2, prev_kv: None });
    client.put("a/2", "").await.unwrap();
    let kv = client.get("a/1").await.unwrap().unwrap();
    assert_eq!((&kv.key[..], &kv.value[..]), (&b"a/1"[..], &b"x"[..]));
    assert_eq!((kv.create_revision, kv.mod_revision, kv.version, kv.lease), (2, 2, 1, LeaseId::NONE));
    assert_eq!(client.get("a/2").await.unwrap().unwrap().value, Bytes::new());
    assert_eq!(client.get("b").await.unwrap(), None);
    let found = client
        .range(RangeRequest { limit: 1, order: SortOrder::Descend, ..RangeRequest::new(prefix()) })
        .await
        .unwrap();
    assert_eq!((found.revision, found.count, found.more, &found.kvs[0].key[..]), (3, 2, true, &b"a/2"[..]));
    let deleted = client.delete(DeleteRangeRequest { range: prefix(), prev_kv: true }).await.unwrap();
    assert_eq!((deleted.revision, deleted.deleted, deleted.prev_kvs.len()), (4, 2, 2));
    assert!(Client::new(cell.tenant("other")).get("a/1").await.unwrap().is_none());
}

#[tokio::test]
async fn a_txn_runs_one_of_its_lists() {
    let cell = TestCell::open().await;
    let client = Client::new(cell.tenant("default"));
    let create = TxnRequest {
        compares: vec![Compare {
            range: KeyRange::Single("k".into()),
            result: CompareResult::Equal,
            target: CompareTarget::Mod(0),
        }],
        success: vec![
            put_op("k", "new"),
            TxnOp::Txn(TxnRequest { success: vec![put_op("n", "")], ..Default::default() }),
        ],
        failure: vec![TxnOp::Range(RangeRequest::new(KeyRange::Single("k".into())))],
    };
    let first = client.txn(create.clone()).await.unwrap();
    assert!(first.succeeded && first.results.len() == 2, "{first:?}");
    let second = client.txn(create).await.unwrap();
    assert_eq!((second.succeeded, second.revision), (false, 2));
    let [OpResult::Range(found)] = &second.results[..] else { panic!("a range: {second:?}") };
    assert_eq!(&found.kvs[0].value[..], b"new");
}

#[tokio::test]
async fn wrong_requests_are_refused_before_they_are_written() {
    let cell = TestCell::open().await;
    let client = Client::new(cell.tenant("default"));
    let invalid = |error: ClientError| match error {
        ClientError::Invalid(error) => error,
        ClientError::Cell(_) | ClientError::MismatchedReply => panic!("{error}"),
    };
    assert_eq!(invalid(client.put("", "x").await.unwrap_err()), CheckError::EmptyKey);
    assert_eq!(invalid(client.get("").await.unwrap_err()), CheckError::EmptyKey);
    let delete = TxnOp::DeleteRange(DeleteRangeRequest { range: prefix(), prev_kv: false });
    for success in [vec![put_op("k", ""), put_op("k", "")], vec![delete, put_op("a/1", "")]] {
        let error = client.txn(TxnRequest { success, ..Default::default() }).await.unwrap_err();
        assert_eq!(invalid(error), CheckError::DuplicateKey);
    }
    let mut nested = TxnRequest::default();
    for _ in 0..=TXN_DEPTH_MAX {
        nested = TxnRequest { success: vec![TxnOp::Txn(nested)], ..Default::default() };
    }
    assert_eq!(invalid(client.txn(nested).await.unwrap_err()), CheckError::TooManyOps);
    assert_eq!(client.range(RangeRequest::new(prefix())).await.unwrap().revision, 1, "nothing was written");
}

#[tokio::test]
async fn a_watch_tells_the_past_and_then_the_present() {
    let cell = TestCell::open().await;
    let client = Client::new(cell.tenant("default"));
    client.put("a/1", "old").await.unwrap();
    client.put("a/1", "new").await.unwrap();
    let options = WatchOptions { start_revision: 2, prev_kv: true, ..WatchOptions::new(prefix()) };
    let mut watcher = client.watch(options).unwrap();
    let past = watcher.next().await.unwrap();
    assert_eq!(past.iter().map(|event| &event.kv.value[..]).collect::<Vec<_>>(), [b"old", b"new"]);
    assert_eq!(past[1].prev_kv.as_ref().unwrap().value, "old");
    client.delete(DeleteRangeRequest { range: prefix(), prev_kv: false }).await.unwrap();
    let present = watcher.next().await.unwrap();
    assert_eq!((present.len(), present[0].kind, present[0].kv.mod_revision), (1, EventKind::Delete, 4));

    client.compact(4).await.unwrap();
    let mut late = client.watch(WatchOptions { start_revision: 2, ..WatchOptions::new(prefix()) }).unwrap();
    assert!(matches!(late.next().await, Err(WatchError::Compacted { compact_revision: 4 })));
    let empty = KeyRange::HalfOpen { start: "b".into(), end: "a".into() };
    let refused = client.watch(WatchOptions::new(empty));
    assert!(matches!(refused, Err(WatchError::Refused(CreateRefusal::EmptyRange))));
}

#[tokio::test]
async fn leases_carry_keys_away() {
    let cell = TestCell::open().await;
    let client = Client::new(cell.tenant("default"));
    let lease = client.grant_lease(Duration::from_secs(60)).await.unwrap();
    assert_eq!(lease.ttl_seconds, 60);
    client
        .put_with(PutRequest {
            key: "k".into(),
            value: Bytes::new(),
            lease: lease.id,
            prev_kv: false,
            ignore_value: false,
            ignore_lease: false,
        })
        .await
        .unwrap();
    assert!(client.keep_alive(lease.id).await.unwrap());
    assert_eq!(client.lease(lease.id).await.unwrap().unwrap().granted_seconds, 60);
    client.revoke_lease(lease.id).await.unwrap();
    assert_eq!(client.get("k").await.unwrap(), None);
    assert!(!client.keep_alive(lease.id).await.unwrap());
    assert!(client.revoke_lease(lease.id).await.is_err());
}

#[tokio::test]
async fn a_watch_ends_with_its_tenant() {
    let cell = TestCell::open().await;
    let (tenant, admin) = (cell.tenant("other"), cell.context().cell);
    let client = Client::new(tenant.clone());
    let mut waiting = client.watch(WatchOptions::new(prefix())).unwrap();
    let mut behind = client.watch(WatchOptions { start_revision: 1, ..WatchOptions::new(prefix()) }).unwrap();
    let waits = tokio::spawn(async move { waiting.next().await });
    tokio::task::yield_now().await;
    admin.delete_tenant(&tenant).await.unwrap();
    for ended in [waits.await.unwrap(), behind.next().await] {
        assert!(matches!(ended, Err(WatchError::Cell(CellError::Refused(Refusal::TenantNotFound)))), "{ended:?}");
    }
}

/// Reads of a tenant are refused when too many wait; that passes, and a watch has to go on.
#[tokio::test]
async fn a_watch_outlives_a_moment_of_too_many_reads() {
    let cell = TestCell::open().await;
    let tenant = cell.tenant("default");
    let client = Client::new(tenant.clone());
    client.put("a/1", "x").await.unwrap();
    let mut watcher = client.watch(WatchOptions { start_revision: 2, ..WatchOptions::new(prefix()) }).unwrap();
    let (open, gate) = std::sync::mpsc::channel::<()>();
    let gate = Arc::new(std::sync::Mutex::new(gate));
    let mut reads = Vec::new();
    loop {
        let gate = Arc::clone(&gate);
        reads.push(Box::pin(tenant.read(move |_| {
            let _ = gate.lock().map(|gate| gate.recv());
        })));
        if let std::task::Poll::Ready(refused) = futures::poll!(reads.last_mut().unwrap()) {
            assert!(matches!(refused, Err(CellError::TooManyRequests)), "{refused:?}");
            break;
        }
    }
    assert!(futures::poll!(std::pin::pin!(watcher.next())).is_pending(), "it tries again");
    drop((open, reads));
    assert_eq!(watcher.next().await.unwrap().len(), 1);
}
