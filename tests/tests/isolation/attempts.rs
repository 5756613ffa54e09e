//! What `globex` sends. It knows `acme`'s keys, revision, lease, watch and member; all it does not know is what is behind them.

use std::ops::RangeInclusive;

use bytes::Bytes;
use prost::Message;
use tenure_etcd_shim::proto::etcdserverpb::compare::{CompareResult, CompareTarget, TargetUnion};
use tenure_etcd_shim::proto::etcdserverpb::range_request::{SortOrder, SortTarget};
use tenure_etcd_shim::proto::etcdserverpb::request_op::Request;
use tenure_etcd_shim::proto::etcdserverpb::watch_request::RequestUnion;
use tenure_etcd_shim::proto::{authpb, etcdserverpb as pb, grpc::health::v1 as health};

/// Part of every value of `acme`'s, and of every key that `globex` never writes.
pub(crate) const SECRET: &str = "acme-secret";

/// A lease of `acme`'s.
pub(crate) const LEASE: i64 = 7_777;

/// A watch of `acme`'s.
pub(crate) const WATCH: i64 = 5;

/// Both ends of "everything".
pub(crate) const EVERYTHING: &[u8] = b"\0";

/// What `globex` knows of `acme`.
#[derive(Default)]
pub(crate) struct Known {
    pub(crate) revision: i64,
    /// At which the first of its keys was made.
    pub(crate) first_revision: i64,
    pub(crate) member_id: u64,
}

pub(crate) fn bytes(text: impl Into<Vec<u8>>) -> Bytes {
    Bytes::from(text.into())
}

/// A key that only `acme` has.
pub(crate) fn hidden(number: usize) -> Bytes {
    bytes(format!("/registry/{SECRET}/{number}"))
}

/// A key that both have.
pub(crate) fn shared(number: usize) -> Bytes {
    bytes(format!("/registry/shared/{number}"))
}

pub(crate) fn value(number: usize) -> Bytes {
    bytes(format!("{SECRET} {number}"))
}

pub(crate) fn range(key: Bytes, range_end: &[u8]) -> pb::RangeRequest {
    pb::RangeRequest { key, range_end: Bytes::copy_from_slice(range_end), ..Default::default() }
}

pub(crate) fn everything() -> pb::RangeRequest {
    range(bytes(EVERYTHING), EVERYTHING)
}

/// Ranges that would find something of `acme`'s if there were anything to find.
fn places() -> Vec<pb::RangeRequest> {
    vec![
        range(hidden(0), b""),
        range(shared(0), b""),
        everything(),
        range(bytes("/registry/"), b"/registry0"),
        range(hidden(0), EVERYTHING),
        // Out of one's own prefix, if tenants were prefixes.
        range(bytes([0, 0, 0, 1, 1]), &[0xff; 16]),
        range(bytes([0xff, 0xff]), EVERYTHING),
    ]
}

fn ranges(acme: &Known) -> Vec<pb::RangeRequest> {
    let mut all = Vec::new();
    for plain in places() {
        all.push(pb::RangeRequest { serializable: true, ..plain.clone() });
        all.push(pb::RangeRequest { count_only: true, ..plain.clone() });
        all.push(pb::RangeRequest { keys_only: true, limit: 1, ..plain.clone() });
        for revision in [-1, 1, 2, acme.first_revision, acme.revision] {
            all.push(pb::RangeRequest { revision, ..plain.clone() });
            all.push(pb::RangeRequest { min_mod_revision: revision, ..plain.clone() });
            all.push(pb::RangeRequest { max_mod_revision: revision, ..plain.clone() });
            all.push(pb::RangeRequest { min_create_revision: revision, ..plain.clone() });
            all.push(pb::RangeRequest { max_create_revision: revision, count_only: true, ..plain.clone() });
        }
        for order in [SortOrder::None, SortOrder::Ascend, SortOrder::Descend] {
            use SortTarget::{Create, Key, Mod, Value, Version};
            for target in [Key, Version, Create, Mod, Value] {
                let (sort_order, sort_target) = (order.into(), target.into());
                all.push(pb::RangeRequest { sort_order, sort_target, limit: 1, ..plain.clone() });
            }
        }
    }
    all
}

fn puts() -> Vec<pb::PutRequest> {
    let own = pb::PutRequest { key: shared(0), value: bytes("own"), prev_kv: true, ..Default::default() };
    vec![
        own.clone(),
        pb::PutRequest { lease: LEASE, ..own.clone() },
        pb::PutRequest { value: Bytes::new(), ignore_value: true, ..own.clone() },
        pb::PutRequest { ignore_lease: true, ..own.clone() },
        // Only `acme` has what they are to keep.
        pb::PutRequest { key: hidden(0), value: Bytes::new(), ignore_value: true, ..own.clone() },
        pb::PutRequest { key: hidden(0), ignore_lease: true, ..own },
    ]
}

fn deletes() -> Vec<pb::DeleteRangeRequest> {
    let delete = |of: pb::RangeRequest| pb::DeleteRangeRequest { key: of.key, range_end: of.range_end, prev_kv: true };
    places().into_iter().map(delete).collect()
}

/// Compares of every kind, with 0 and with what `acme` has at its first key.
pub(crate) fn compares(acme: &Known, key: &Bytes, range_end: &[u8]) -> Vec<pb::Compare> {
    use CompareTarget::{Create, Lease, Mod, Value, Version};
    let operands = [
        (Version, TargetUnion::Version(0)),
        (Version, TargetUnion::Version(1)),
        (Create, TargetUnion::CreateRevision(0)),
        (Create, TargetUnion::CreateRevision(acme.first_revision)),
        (Mod, TargetUnion::ModRevision(0)),
        (Mod, TargetUnion::ModRevision(acme.first_revision)),
        (Value, TargetUnion::Value(Bytes::new())),
        (Value, TargetUnion::Value(value(0))),
        (Lease, TargetUnion::Lease(0)),
        (Lease, TargetUnion::Lease(LEASE)),
    ];
    let mut all = Vec::new();
    for (target, operand) in operands {
        use CompareResult::{Equal, Greater, Less, NotEqual};
        all.extend([Equal, Greater, Less, NotEqual].map(|result| pb::Compare {
            result: result.into(),
            target: target.into(),
            key: key.clone(),
            range_end: Bytes::copy_from_slice(range_end),
            target_union: Some(operand.clone()),
        }));
    }
    all
}

pub(crate) fn op(request: Request) -> pb::RequestOp {
    pb::RequestOp { request: Some(request) }
}

/// A txn inside a txn.
pub(crate) fn nested(txn: pb::TxnRequest) -> pb::TxnRequest {
    pb::TxnRequest { success: vec![op(Request::RequestTxn(txn))], ..Default::default() }
}

fn txns(acme: &Known) -> Vec<pb::TxnRequest> {
    let mut all = Vec::new();
    let ops = ranges(acme).into_iter().map(Request::RequestRange);
    let ops = ops.chain(puts().into_iter().map(Request::RequestPut));
    let ops = ops.chain(deletes().into_iter().map(Request::RequestDeleteRange)).map(op);
    // What never holds, so that the other branch runs.
    let never = pb::Compare {
        result: CompareResult::Less.into(),
        target: CompareTarget::Version.into(),
        key: shared(0),
        target_union: Some(TargetUnion::Version(0)),
        ..Default::default()
    };
    for op in ops {
        all.push(pb::TxnRequest { success: vec![op.clone()], ..Default::default() });
        all.push(pb::TxnRequest { compare: vec![never.clone()], success: vec![], failure: vec![op] });
    }
    let read = || op(Request::RequestRange(everything()));
    let put = || op(Request::RequestPut(puts().remove(0)));
    let keys = [(hidden(0), &b""[..]), (hidden(0), EVERYTHING), (bytes(EVERYTHING), EVERYTHING)];
    for compare in keys.iter().flat_map(|(key, range_end)| compares(acme, key, range_end)) {
        all.push(pb::TxnRequest { compare: vec![compare], success: vec![read()], failure: vec![put()] });
    }
    let inner: Vec<_> = all.iter().cloned().map(nested).collect();
    all.extend(inner);
    all
}

/// Requests to one method, encoded.
pub(crate) type Attempts = (String, Vec<Vec<u8>>);

fn to<M: Message>(method: &str, messages: impl IntoIterator<Item = M>) -> Attempts {
    (method.to_string(), messages.into_iter().map(|message| message.encode_to_vec()).collect())
}

/// What is sent to each method that ends by itself, in this order: as many attempts as there are ways.
pub(crate) fn calls(acme: &Known) -> Vec<Attempts> {
    let mut all = keys_and_leases(acme);
    all.extend(maintenance(acme));
    all.extend(users());
    for attempts in &mut all {
        attempts.0.insert_str(0, "etcdserverpb.");
    }
    let check = |service: &str| health::HealthCheckRequest { service: service.to_string() };
    all.push(to("grpc.health.v1.Health/Check", ["", "acme"].map(check)));
    all.push(to("grpc.health.v1.Health/List", [health::HealthListRequest {}]));
    all
}

fn keys_and_leases(acme: &Known) -> Vec<Attempts> {
    let live = || [true, false].map(|keys| pb::LeaseTimeToLiveRequest { id: LEASE, keys });
    let compact = |revision, physical| pb::CompactionRequest { revision, physical };
    vec![
        to("KV/Range", ranges(acme)),
        to("KV/RangeStream", ranges(acme)),
        // While it has no lease of that id itself.
        to("Lease/LeaseTimeToLive", live()),
        to("Lease/LeaseKeepAlive", [pb::LeaseKeepAliveRequest { id: LEASE }]),
        to("Lease/LeaseRevoke", [pb::LeaseRevokeRequest { id: LEASE }]),
        to("Lease/LeaseLeases", [pb::LeaseLeasesRequest {}]),
        to("KV/Put", puts()),
        to("KV/Txn", txns(acme)),
        // And while it has.
        to("Lease/LeaseGrant", [pb::LeaseGrantRequest { ttl: 9_000, id: LEASE }]),
        to("KV/Put", puts()),
        to("KV/Txn", txns(acme)),
        to("Lease/LeaseTimeToLive", live()),
        to("Lease/LeaseKeepAlive", [pb::LeaseKeepAliveRequest { id: LEASE }]),
        to("Lease/LeaseLeases", [pb::LeaseLeasesRequest {}]),
        to("KV/Put", puts()),
        to("Lease/LeaseRevoke", [pb::LeaseRevokeRequest { id: LEASE }]),
        to("KV/Put", puts()),
        to("KV/DeleteRange", deletes()),
        to("KV/Compact", [compact(2, false), compact(3, true), compact(acme.revision, true), compact(i64::MAX, false)]),
    ]
}

fn maintenance(acme: &Known) -> Vec<Attempts> {
    let member_id = acme.member_id;
    let urls = || vec!["http://127.0.0.1:1".to_string()];
    let alarm = |action, alarm| pb::AlarmRequest { action, member_id, alarm };
    let downgrade = |action| pb::DowngradeRequest { action, version: "3.6".to_string() };
    vec![
        // Looks, takes away what `acme` has, raises both, takes them away.
        to("Maintenance/Alarm", [alarm(0, 0), alarm(0, 1), alarm(2, 1), alarm(2, 2), alarm(2, 0)]),
        to("Maintenance/Alarm", [alarm(1, 1), alarm(1, 2), alarm(0, 0), alarm(2, 2), alarm(2, 1)]),
        to("Maintenance/Status", [pb::StatusRequest {}]),
        to("Maintenance/Hash", [pb::HashRequest {}]),
        to(
            "Maintenance/HashKV",
            [0, acme.first_revision, acme.revision].map(|revision| pb::HashKvRequest { revision }),
        ),
        to("Maintenance/Snapshot", [pb::SnapshotRequest {}]),
        to("Maintenance/Defragment", [pb::DefragmentRequest {}]),
        to("Maintenance/MoveLeader", [pb::MoveLeaderRequest { target_id: member_id }]),
        to("Maintenance/Downgrade", [0, 1, 2].map(downgrade)),
        to("Cluster/MemberList", [true, false].map(|linearizable| pb::MemberListRequest { linearizable })),
        to("Cluster/MemberAdd", [pb::MemberAddRequest { peer_ur_ls: urls(), is_learner: true }]),
        to("Cluster/MemberRemove", [pb::MemberRemoveRequest { id: member_id }]),
        to("Cluster/MemberUpdate", [pb::MemberUpdateRequest { id: member_id, peer_ur_ls: urls() }]),
        to("Cluster/MemberPromote", [pb::MemberPromoteRequest { id: member_id }]),
    ]
}

/// Users and roles, by names that `acme` would have.
fn users() -> Vec<Attempts> {
    let [name, role, password] = ["acme", "root", "acme"].map(str::to_string);
    let permission = |perm_type| pb::AuthRoleGrantPermissionRequest {
        name: "acme".to_string(),
        perm: Some(authpb::Permission { perm_type, key: bytes(EVERYTHING), range_end: bytes(EVERYTHING) }),
    };
    let add = |no_password| pb::AuthUserAddRequest {
        name: "acme".to_string(),
        password: "acme".to_string(),
        options: Some(authpb::UserAddOptions { no_password }),
        hashed_password: "acme".to_string(),
    };
    vec![
        to("Auth/AuthStatus", [pb::AuthStatusRequest {}]),
        to("Auth/Authenticate", [pb::AuthenticateRequest { name: name.clone(), password: password.clone() }]),
        to("Auth/UserList", [pb::AuthUserListRequest {}]),
        to("Auth/UserGet", [pb::AuthUserGetRequest { name: name.clone() }]),
        to("Auth/UserAdd", [true, false].map(add)),
        to(
            "Auth/UserChangePassword",
            [pb::AuthUserChangePasswordRequest {
                name: name.clone(),
                password: password.clone(),
                hashed_password: password,
            }],
        ),
        to("Auth/UserGrantRole", [pb::AuthUserGrantRoleRequest { user: name.clone(), role: role.clone() }]),
        to("Auth/UserRevokeRole", [pb::AuthUserRevokeRoleRequest { name: name.clone(), role: role.clone() }]),
        to("Auth/RoleList", [pb::AuthRoleListRequest {}]),
        to("Auth/RoleGet", [pb::AuthRoleGetRequest { role: role.clone() }]),
        to("Auth/RoleAdd", [pb::AuthRoleAddRequest { name: name.clone() }]),
        to("Auth/RoleGrantPermission", [0, 1, 2].map(permission)),
        to(
            "Auth/RoleRevokePermission",
            [pb::AuthRoleRevokePermissionRequest {
                role: name.clone(),
                key: bytes(EVERYTHING),
                range_end: bytes(EVERYTHING),
            }],
        ),
        to("Auth/RoleDelete", [pb::AuthRoleDeleteRequest { role }]),
        to("Auth/UserDelete", [pb::AuthUserDeleteRequest { name }]),
        to("Auth/AuthEnable", [pb::AuthEnableRequest {}]),
        to("Auth/AuthDisable", [pb::AuthDisableRequest {}]),
    ]
}

fn watch_request(of: RequestUnion) -> pb::WatchRequest {
    pb::WatchRequest { request_union: Some(of) }
}

pub(crate) fn progress() -> pb::WatchRequest {
    watch_request(RequestUnion::ProgressRequest(pb::WatchProgressRequest {}))
}

pub(crate) fn create(of: pb::WatchCreateRequest) -> pb::WatchRequest {
    watch_request(RequestUnion::CreateRequest(of))
}

pub(crate) fn cancel(watch_id: i64) -> pb::WatchRequest {
    watch_request(RequestUnion::CancelRequest(pb::WatchCancelRequest { watch_id }))
}

/// Watches that begin when `acme` writes next; of `globex`'s own revisions that is far in the future.
pub(crate) const FUTURE_WATCHES: RangeInclusive<i64> = 200..=206;

/// What is sent on one Watch stream: watches of all there is, from all there was, of each kind; and an end to `acme`'s.
pub(crate) fn watches(acme: &Known) -> Vec<pb::WatchRequest> {
    use pb::watch_create_request::FilterType;
    let mut all = vec![cancel(WATCH)];
    for (place, watch_id) in places().into_iter().zip(FUTURE_WATCHES) {
        let plain = pb::WatchCreateRequest { key: place.key, range_end: place.range_end, ..Default::default() };
        for start_revision in [0, 1, acme.first_revision] {
            all.push(create(pb::WatchCreateRequest { start_revision, prev_kv: true, ..plain.clone() }));
        }
        all.push(create(pb::WatchCreateRequest { start_revision: acme.revision, watch_id, ..plain.clone() }));
        for filter in [FilterType::Noput, FilterType::Nodelete] {
            let filters = vec![filter.into()];
            all.push(create(pb::WatchCreateRequest { filters, progress_notify: true, ..plain.clone() }));
        }
        all.push(create(pb::WatchCreateRequest { fragment: true, start_revision: 1, ..plain }));
    }
    let of_id = |watch_id| {
        let (key, range_end) = (bytes(EVERYTHING), bytes(EVERYTHING));
        create(pb::WatchCreateRequest { watch_id, key, range_end, ..Default::default() })
    };
    all.extend([of_id(100), of_id(100), of_id(101), cancel(101), cancel(WATCH + 1_000), progress()]);
    all
}

/// Methods whose calls stay open, with what is sent to them.
pub(crate) fn streams(acme: &Known) -> Vec<Attempts> {
    let services = ["", "acme"].map(|service| health::HealthCheckRequest { service: service.to_string() });
    vec![to("etcdserverpb.Watch/Watch", watches(acme)), to("grpc.health.v1.Health/Watch", services)]
}
