//! A cell on a real engine and a real log: what outlives it, and what it refuses.

use bytes::Bytes;
use tenure_storage::{AlarmKind, DeleteRangeRequest, KeyRange, LeaseId, PutRequest};

use super::*;

fn put(key: &'static str, lease: LeaseId) -> Command {
    Command::Put(PutRequest {
        key: key.into(),
        value: Bytes::from_static(b"v"),
        lease,
        prev_kv: false,
        ignore_value: false,
        ignore_lease: false,
    })
}

async fn write(tenant: &Tenant, command: Command) -> i64 {
    let outcome = tenant.propose(command).await.unwrap();
    outcome.result.unwrap();
    outcome.revision
}

#[tokio::test]
async fn a_new_cell_is_what_etcd_with_no_flags_is() {
    let dir = tempfile::tempdir().unwrap();
    let cell = Cell::open(CellConfig::new(dir.path())).await.unwrap();
    assert_eq!(cell.tenant_names(), [DEFAULT_TENANT]);
    let tenant = cell.tenant(DEFAULT_TENANT).unwrap();
    assert_eq!(format!("{:x}", tenant.member_id()), "8e9e05c52164694d");
    assert_eq!(format!("{:x}", tenant.cluster_id()), "cdf818194e3a8c32");
    assert_eq!(tenant.leader_id(), tenant.member_id());
    assert!(tenant.raft_term() >= 1);
    assert_eq!((tenant.quota_bytes(), tenant.lease_ttl_seconds_min()), (2 << 30, 2));
    assert!(cell.tenant("other").is_none());
    cell.stop().await;
    assert!(matches!(tenant.propose(put("a", LeaseId::NONE)).await, Err(CellError::Stopped)));
}

#[tokio::test]
async fn what_was_written_is_there_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = CellConfig::new(dir.path());
    config.tenants = vec!["acme".to_string(), "acme".to_string()];
    config.quota_backend_bytes = -1;
    let cluster_id = {
        let cell = Cell::open(config.clone()).await.unwrap();
        let tenant = cell.tenant("acme").unwrap();
        assert_eq!(tenant.quota_bytes(), -1);
        assert_ne!(tenant.cluster_id(), cell.cluster_id());
        let lease = tenant.grant_lease(LeaseId::NONE, 1_000).await.unwrap();
        assert_eq!(write(&tenant, put("a", lease.id)).await, 2);
        assert_eq!(write(&tenant, put("b", lease.id)).await, 3);
        cell.stop().await;
        tenant.cluster_id()
    };
    config.tenants.clear();
    config.quota_backend_bytes = 0;
    let cell = Cell::open(config).await.unwrap();
    assert_eq!(cell.tenant_names(), [DEFAULT_TENANT, "acme"]);
    let tenant = cell.tenant("acme").unwrap();
    assert_eq!((tenant.cluster_id(), tenant.quota_bytes()), (cluster_id, QUOTA_BYTES_DEFAULT));
    assert_eq!(tenant.reader().revision(), 3);
    let leases = tenant.leases();
    let [lease] = leases[..] else { panic!("one lease: {leases:?}") };
    let remaining = tenant.lease_remaining(lease).await.unwrap().unwrap();
    assert_eq!(remaining.granted_seconds, 1_000);
    assert!((900..=1_001).contains(&remaining.seconds), "a full TTL again: {remaining:?}");
    assert_eq!(tenant.reader().lease_keys(lease).unwrap(), ["a", "b"]);
    assert_eq!(write(&tenant, Command::LeaseRevoke { id: lease }).await, 4);
    assert_eq!(tenant.leases(), []);
    cell.stop().await;
}

#[tokio::test]
async fn a_directory_belongs_to_one_cell() {
    let dir = tempfile::tempdir().unwrap();
    let cell = Cell::open(CellConfig::new(dir.path())).await.unwrap();
    let Err(error) = Cell::open(CellConfig::new(dir.path())).await else { panic!("opened twice") };
    assert!(error.to_string().ends_with("is in use by another process"), "{error}");
    cell.stop().await;
    drop(cell);
    Cell::open(CellConfig::new(dir.path())).await.unwrap().stop().await;
}

#[tokio::test]
async fn tenants_have_names_that_fit_a_host_name() {
    for good in ["a", "default", "acme-1", &"x".repeat(63)] {
        check_tenant_name(good).unwrap();
    }
    for bad in ["", "-a", "a-", "Acme", "a.b", "a/b", "ä", "a b", &"x".repeat(64)] {
        assert_eq!(check_tenant_name(bad), Err(InvalidTenantName(bad.to_string())));
    }
    let dir = tempfile::tempdir().unwrap();
    let mut config = CellConfig::new(dir.path().join("d"));
    config.tenants = vec!["Acme".to_string()];
    assert!(matches!(Cell::open(config.clone()).await, Err(OpenError::Tenant(CreateTenantError::Name(_)))));
    assert!(!config.data_dir.exists(), "nothing was made");
}

#[tokio::test]
async fn tenants_share_nothing_they_can_see() {
    let dir = tempfile::tempdir().unwrap();
    let cell = Cell::open(CellConfig::new(dir.path())).await.unwrap();
    let a = cell.create_tenant("a").await.unwrap();
    let b = cell.create_tenant("b").await.unwrap();
    let lease = a.grant_lease(LeaseId(7), 100).await.unwrap();
    write(&a, put("k", lease.id)).await;
    write(&a, Command::Alarm { activate: true, member_id: 1, kind: AlarmKind::NOSPACE }).await;
    assert_eq!(b.reader().state().alarms, []);
    assert_eq!((b.reader().revision(), b.leases()), (1, vec![]));
    assert_eq!(b.renew_lease(LeaseId(7)).await.unwrap(), 0);
    assert_eq!(a.renew_lease(LeaseId(7)).await.unwrap(), 100);
    let delete = DeleteRangeRequest { range: KeyRange::From(Bytes::from_static(b"\0")), prev_kv: false };
    assert_eq!(write(&b, Command::DeleteRange(delete)).await, 1, "nothing to delete");
    assert_eq!(a.read(|reader| reader.revision()).await.unwrap(), 2);
    cell.stop().await;
}

/// Compacted rows are given back without anybody asking for it.
#[tokio::test]
async fn compacted_space_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let cell = Cell::open(CellConfig::new(dir.path())).await.unwrap();
    let tenant = cell.tenant(DEFAULT_TENANT).unwrap();
    for _ in 0..10 {
        write(&tenant, put("k", LeaseId::NONE)).await;
    }
    assert_eq!(tenant.reader().state().usage.versions, 10);
    write(&tenant, Command::Compact { revision: 11 }).await;
    while tenant.reader().state().usage.versions > 1 {
        tokio::task::yield_now().await;
    }
    assert_eq!(tenant.reader().state().reclaimed_revision, 11);
    cell.stop().await;
}

#[tokio::test]
async fn a_fault_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let cell = Cell::open(CellConfig::new(dir.path())).await.unwrap();
    let tenant = cell.tenant(DEFAULT_TENANT).unwrap();
    let failed = tokio::spawn({
        let cell = cell.clone();
        async move { cell.failed().await }
    });
    let error = tenant.report(Fault::Engine("bad block".to_string()));
    assert!(matches!(error, CellError::Fault(_)));
    tenant.report(Fault::Engine("and another".to_string()));
    assert_eq!(&*failed.await.unwrap(), "storage engine: bad block");
    cell.stop().await;
}
