//! The small services over a cell, against what etcd 3.7 answered.

use tokio_stream::StreamExt;
use tonic::Code;

use super::auth::AuthService;
use super::cluster::ClusterService;
use super::health::HealthService;
use super::kv::KvService;
use super::maintenance::MaintenanceService;
use super::testing::{TestCell, request};
use super::*;
use crate::proto::etcdserverpb as pb;
use crate::proto::etcdserverpb::auth_server::Auth;
use crate::proto::etcdserverpb::cluster_server::Cluster;
use crate::proto::etcdserverpb::kv_server::Kv;
use crate::proto::etcdserverpb::maintenance_server::Maintenance;
use crate::proto::grpc::health::v1::HealthCheckRequest;
use crate::proto::grpc::health::v1::health_server::Health;

const ACTIVATE: i32 = 1;
const DEACTIVATE: i32 = 2;
const NOSPACE: i32 = 1;
const CORRUPT: i32 = 2;

async fn alarm(maintenance: &MaintenanceService, action: i32, member_id: u64, alarm: i32) -> Vec<(u64, i32)> {
    let message = pb::AlarmRequest { action, member_id, alarm };
    let answer = maintenance.alarm(request("default", message)).await.unwrap().into_inner();
    assert!(answer.header.is_some());
    answer.alarms.iter().map(|alarm| (alarm.member_id, alarm.alarm)).collect()
}

#[tokio::test]
async fn alarms_are_raised_listed_and_cleared() {
    let cell = TestCell::open().await;
    let maintenance = MaintenanceService::new(cell.context());
    let get = |kind| alarm(&maintenance, 0, 0, kind);
    assert_eq!(get(0).await, []);
    assert_eq!(alarm(&maintenance, ACTIVATE, 5, 0).await, [], "raising none");
    assert_eq!(alarm(&maintenance, ACTIVATE, 5, NOSPACE).await, [(5, NOSPACE)]);
    assert_eq!(alarm(&maintenance, ACTIVATE, 5, NOSPACE).await, [(5, NOSPACE)], "again");
    assert_eq!(alarm(&maintenance, ACTIVATE, 77, NOSPACE).await, [(77, NOSPACE)]);
    assert_eq!(get(0).await, [(5, NOSPACE), (77, NOSPACE)]);
    assert_eq!(get(CORRUPT).await, []);
    assert_eq!(alarm(&maintenance, DEACTIVATE, 6, NOSPACE).await, [], "no such alarm");
    assert_eq!(alarm(&maintenance, DEACTIVATE, 77, NOSPACE).await, [(77, NOSPACE)]);
    assert_eq!(alarm(&maintenance, ACTIVATE, 5, CORRUPT).await, [(5, CORRUPT)]);

    let status = maintenance.status(request("default", pb::StatusRequest {})).await.unwrap().into_inner();
    assert_eq!(status.errors, ["memberID:5 alarm:NOSPACE", "memberID:5 alarm:CORRUPT"]);
    let other = maintenance.status(request("other", pb::StatusRequest {})).await.unwrap().into_inner();
    assert!(other.errors.is_empty(), "another tenant has no part in it");

    let kv = KvService::new(cell.context());
    let put = pb::PutRequest { key: "a".into(), ..Default::default() };
    assert_eq!(kv.put(request("default", put)).await.unwrap_err().code(), Code::DataLoss);

    let unknown = pb::AlarmRequest { action: 9, ..Default::default() };
    assert_eq!(maintenance.alarm(request("default", unknown)).await.unwrap_err().code(), Code::InvalidArgument);
}

#[tokio::test]
async fn status_tells_of_the_tenant() {
    let cell = TestCell::open().await;
    let maintenance = MaintenanceService::new(cell.context());
    let kv = KvService::new(cell.context());
    for _ in 0..5 {
        let put = pb::PutRequest { key: "a".into(), value: vec![0; 4096].into(), ..Default::default() };
        kv.put(request("default", put)).await.unwrap();
    }
    let status = async |tenant| maintenance.status(request(tenant, pb::StatusRequest {})).await.unwrap().into_inner();
    let (used, fresh) = (status("default").await, status("other").await);
    let header = used.header.unwrap();
    assert_eq!((header.revision, fresh.header.unwrap().revision), (6, 1));
    assert_eq!((used.leader, used.raft_term), (header.member_id, header.raft_term));
    assert!(used.raft_index > 0 && used.raft_applied_index > 0 && used.downgrade_info.is_some());
    assert!(used.db_size >= fresh.db_size + 5 * 4096, "history counts");
    assert!(used.db_size_in_use < used.db_size && fresh.raft_index == 1);
    assert_eq!((used.db_size_quota, used.version, used.storage_version), (2 << 30, "3.7.1".into(), "3.7.0".into()));
}

#[tokio::test]
async fn hash_kv_follows_the_revision_asked_for() {
    let cell = TestCell::open().await;
    let maintenance = MaintenanceService::new(cell.context());
    let hash = async |revision| maintenance.hash_kv(request("default", pb::HashKvRequest { revision })).await;
    let empty = hash(0).await.unwrap().into_inner();
    // What etcd 3.7 answers for an empty store.
    assert_eq!((empty.hash, empty.compact_revision, empty.hash_revision), (1_084_519_789, -1, 1));
    assert_eq!(hash(-5).await.unwrap().into_inner().hash_revision, -5);
    assert_eq!(hash(2).await.unwrap_err().message(), "etcdserver: mvcc: required revision is a future revision");
}

#[tokio::test]
async fn what_is_not_built_says_so() {
    let cell = TestCell::open().await;
    let maintenance = MaintenanceService::new(cell.context());
    let auth = AuthService::new(cell.context());
    let refused = [
        maintenance.hash(request("default", pb::HashRequest {})).await.unwrap_err(),
        maintenance.snapshot(request("default", pb::SnapshotRequest {})).await.map(|_| ()).unwrap_err(),
        auth.auth_enable(request("default", pb::AuthEnableRequest {})).await.unwrap_err(),
    ];
    for refused in refused {
        assert_eq!(refused.code(), Code::Unimplemented);
    }
    let status = auth.auth_status(request("default", pb::AuthStatusRequest {})).await.unwrap().into_inner();
    assert_eq!((status.enabled, status.auth_revision, status.header.unwrap().revision), (false, 1, 1));
    let authenticate = auth.authenticate(request("default", pb::AuthenticateRequest::default())).await.unwrap_err();
    assert_eq!(authenticate.message(), "etcdserver: authentication is not enabled");
}

#[tokio::test]
async fn a_member_list_has_one_member_and_no_revision() {
    let cell = TestCell::open().await;
    let context = cell.context();
    let cluster = ClusterService::new(context.clone());
    let list = pb::MemberListRequest { linearizable: true };
    let list = cluster.member_list(request("default", list)).await.unwrap().into_inner();
    let header = list.header.unwrap();
    assert_eq!((header.revision, header.cluster_id != 0), (0, true));
    let [member] = &list.members[..] else { panic!("one member") };
    assert_eq!((member.id, member.name.as_str()), (header.member_id, "default"));
    assert_eq!(member.client_ur_ls, ["http://localhost:2379"]);

    // A client that follows the list must stay the tenant it is.
    let list = cluster.member_list(request("other", pb::MemberListRequest::default())).await.unwrap().into_inner();
    assert_eq!(list.members[0].client_ur_ls, ["http://localhost:2401"]);
}

#[tokio::test]
async fn health_knows_the_whole_server_only() {
    let of = |service: &str| Request::new(HealthCheckRequest { service: service.to_string() });
    let cell = TestCell::open().await;
    let health = HealthService::new(cell.context());
    assert_eq!(health.check(of("")).await.unwrap().into_inner().status, 1);
    let unknown = health.check(of("etcdserverpb.KV")).await.unwrap_err();
    assert_eq!((unknown.code(), unknown.message()), (Code::NotFound, "unknown service"));
    for (service, status) in [("", 1), ("abc", 3)] {
        let mut watch = health.watch(of(service)).await.unwrap().into_inner();
        assert_eq!(watch.next().await.unwrap().unwrap().status, status);
    }
    let list = health.list(Request::new(Default::default())).await.unwrap().into_inner();
    assert_eq!(list.statuses.len(), 1);
}

#[test]
fn only_true_asks_for_a_leader() {
    for (value, expected) in [("true", true), ("True", false), ("1", false), ("", false)] {
        let mut request = Request::new(());
        request.metadata_mut().insert("hasleader", value.parse().unwrap());
        assert_eq!(wants_leader(request.metadata()), expected, "{value:?}");
    }
    assert!(!wants_leader(Request::new(()).metadata()));
}
