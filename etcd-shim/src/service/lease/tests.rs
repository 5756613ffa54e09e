//! The Lease service over a cell, against what etcd 3.7 answered (contract 1.3).

use tenure_storage::Command;
use tonic::Code;

use super::*;
use crate::client::{Client, WatchOptions};
use crate::proto::etcdserverpb as pb;
use crate::service::testing::{TestCell, request};

async fn grant(service: &LeaseService, ttl: i64, id: i64) -> Result<LeaseGrantResponse, Status> {
    Ok(service.lease_grant(request("default", LeaseGrantRequest { ttl, id })).await?.into_inner())
}

async fn time_to_live(service: &LeaseService, tenant: &str, id: i64) -> LeaseTimeToLiveResponse {
    let message = LeaseTimeToLiveRequest { id, keys: true };
    service.lease_time_to_live(request(tenant, message)).await.unwrap().into_inner()
}

#[tokio::test]
async fn grants_are_checked_and_their_ttl_raised() {
    let cell = TestCell::open().await;
    let service = LeaseService::new(cell.context());
    let picked = grant(&service, 100, 0).await.unwrap();
    assert!(picked.id > 0 && picked.ttl == 100 && picked.error.is_empty());
    assert_eq!(picked.header.unwrap().revision, 1, "a grant is not a change");
    assert_eq!(grant(&service, 10, -7).await.unwrap().id, -7);
    for ttl in [i64::MIN, -5, 0, 1] {
        assert_eq!(grant(&service, ttl, 0).await.unwrap().ttl, 2);
    }
    let taken = grant(&service, 100, picked.id).await.unwrap_err();
    assert_eq!((taken.code(), taken.message()), (Code::FailedPrecondition, "etcdserver: lease already exists"));
    let long = grant(&service, 9_000_000_001, picked.id).await.unwrap_err();
    assert_eq!((long.code(), long.message()), (Code::OutOfRange, "etcdserver: too large lease TTL"));
}

#[tokio::test]
async fn a_lease_is_told_of_and_revoked() {
    let cell = TestCell::open().await;
    let service = LeaseService::new(cell.context());
    let tenant = cell.tenant("default");
    grant(&service, 50, 7).await.unwrap();
    let put = |key: &'static str| tenant.propose(Command::Put(pb_put(key, 7)));
    put("b").await.unwrap().result.unwrap();
    put("a").await.unwrap().result.unwrap();
    let told = time_to_live(&service, "default", 7).await;
    assert!((30..=50).contains(&told.ttl), "{}", told.ttl);
    assert_eq!((told.granted_ttl, told.keys), (50, vec!["a".into(), "b".into()]));

    let missing = time_to_live(&service, "other", 7).await;
    assert_eq!((missing.id, missing.ttl, missing.granted_ttl, missing.keys.len()), (7, -1, 0, 0), "another tenant's");
    let of_other = service.lease_leases(request("other", LeaseLeasesRequest {})).await.unwrap().into_inner();
    assert!(of_other.leases.is_empty());

    let revoke = |tenant| service.lease_revoke(request(tenant, LeaseRevokeRequest { id: 7 }));
    assert_eq!(revoke("other").await.unwrap_err().message(), "etcdserver: requested lease not found");
    let revoked = revoke("default").await.unwrap().into_inner();
    assert_eq!(revoked.header.unwrap().revision, 4, "one revision for both keys");
    assert_eq!(revoke("default").await.unwrap_err().code(), Code::NotFound);
    assert_eq!(time_to_live(&service, "default", 7).await.ttl, -1);
}

fn pb_put(key: &'static str, lease: i64) -> tenure_storage::PutRequest {
    crate::convert::from_proto::put(pb::PutRequest { key: key.into(), lease, ..Default::default() })
}

#[tokio::test]
async fn keep_alives_answer_the_ttl_or_zero() {
    let cell = TestCell::open().await;
    let service = LeaseService::new(cell.context());
    let tenant = cell.tenant("default");
    grant(&service, 50, 7).await.unwrap();
    let alive = keep_alive(&tenant, LeaseKeepAliveRequest { id: 7 }).await.unwrap();
    assert_eq!((alive.id, alive.ttl, alive.header.unwrap().revision), (7, 50, 1));
    let missing = keep_alive(&tenant, LeaseKeepAliveRequest { id: 8 }).await.unwrap();
    assert_eq!((missing.id, missing.ttl), (8, 0));
}

/// The shortest lease there is, so this takes its two seconds and up to a poll's period.
#[tokio::test]
async fn an_expired_lease_takes_its_keys_along() {
    let cell = TestCell::open().await;
    let service = LeaseService::new(cell.context());
    let tenant = cell.tenant("default");
    let client = Client::new(tenant.clone());
    let mut watcher = client.watch(WatchOptions::new(tenure_storage::KeyRange::From("a".into()))).unwrap();
    // On a machine that stalls one may be over before its key is written.
    let mut id = 7;
    let granted_at = loop {
        let granted_at = std::time::Instant::now();
        assert_eq!(grant(&service, 1, id).await.unwrap().ttl, 2);
        match tenant.propose(Command::Put(pb_put("a", id))).await.unwrap().result {
            Ok(_) => break granted_at,
            Err(refusal) => {
                assert_eq!(refusal, tenure_storage::Refusal::LeaseNotFound(LeaseId(id)));
                assert!(granted_at.elapsed() >= std::time::Duration::from_secs(2), "never early");
                id += 1;
            }
        }
    };
    assert_eq!(watcher.next().await.unwrap()[0].kind, tenure_storage::EventKind::Put);
    assert_eq!(watcher.next().await.unwrap()[0].kind, tenure_storage::EventKind::Delete);
    assert!(granted_at.elapsed() >= std::time::Duration::from_secs(2), "never early");
    assert_eq!(keep_alive(&tenant, LeaseKeepAliveRequest { id }).await.unwrap().ttl, 0);
}
