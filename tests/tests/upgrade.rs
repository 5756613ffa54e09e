//! Data directories that earlier releases wrote, killed as they were: this one opens them and has all that was acknowledged.
//!
//! Why: the formats of the log, of its frames and commands, and of the state have versions, each with a test of its own that
//! an unknown one is refused by name. That the known ones are really read, all of them together, only a directory that an
//! earlier program wrote can show. `tests/fixtures/make.sh` makes one and says what is in it.

#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::process::Command;

use bytes::Bytes;
use tenure_admin_api::v1 as api;
use tenure_etcd_shim::proto::etcdserverpb as pb;
use tenure_etcd_shim::storage::key_value::KeyValue;
use tenure_etcd_shim::wire::RangeResponse;
use tenure_tests::admin;
use tenure_tests::client::Connection;
use tenure_tests::server::Server;
use tonic::Code;

/// Unpacks a fixture below `dir`. Gives where a single member's directory is then.
fn unpack(name: &str, dir: &Path) -> PathBuf {
    let archive = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(name);
    let unpacked = Command::new("tar").arg("-xzf").arg(&archive).arg("-C").arg(dir).status().unwrap();
    assert!(unpacked.success(), "unpack {}", archive.display());
    dir.join("data")
}

/// All keys, as `key=value`, at this revision; 0 is the newest.
async fn everything(connection: &Connection, revision: i64) -> (i64, Vec<String>) {
    let request = pb::RangeRequest {
        key: Bytes::from_static(b"\0"),
        range_end: Bytes::from_static(b"\0"),
        revision,
        ..Default::default()
    };
    let answer: RangeResponse = connection.unary("/etcdserverpb.KV/Range", &request).await.unwrap();
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    let pairs = answer.kvs.iter().map(|stored| {
        let kv = KeyValue::decode(stored).unwrap();
        format!("{}={}", text(kv.key), text(kv.value))
    });
    (answer.header.unwrap().revision, pairs.collect())
}

async fn hash(connection: &Connection) -> (u32, i64) {
    let request = pb::HashKvRequest::default();
    let answer: pb::HashKvResponse = connection.unary("/etcdserverpb.Maintenance/HashKV", &request).await.unwrap();
    (answer.hash, answer.compact_revision)
}

/// What `make.sh` wrote, as this release finds it; and that it can go on from there.
async fn has_everything(data: &Path, flags: &[&str]) {
    let mut hashes = Vec::new();
    // The second start reads what the first has made of it.
    for (start, flags) in [flags, &[]].into_iter().enumerate() {
        let server = Server::start_with_flags(flags, data, &["default", "acme"]);
        let default = Connection::open(server.address(0)).await;
        let expected =
            ["k0=v40", "k1=in-a-txn", "k4=v34", "k5=v35", "k6=v36", "k7=v37", "k8=v38", "k9=v39", "leased=value"];
        assert_eq!(everything(&default, 0).await, (44, expected.map(str::to_owned).to_vec()));
        let before =
            ["k0=v20", "k1=v21", "k2=v22", "k3=v23", "k4=v24", "k5=v15", "k6=v16", "k7=v17", "k8=v18", "k9=v19"];
        assert_eq!(everything(&default, 25).await, (44, before.map(str::to_owned).to_vec()));
        let compacted = pb::RangeRequest { key: Bytes::from_static(b"k1"), revision: 24, ..Default::default() };
        let refusal = default.unary::<_, RangeResponse>("/etcdserverpb.KV/Range", &compacted).await.unwrap_err();
        assert_eq!(refusal.code(), Code::OutOfRange);

        let leases: pb::LeaseLeasesResponse =
            default.unary("/etcdserverpb.Lease/LeaseLeases", &pb::LeaseLeasesRequest {}).await.unwrap();
        let [lease] = &leases.leases[..] else { panic!("one lease") };
        let request = pb::LeaseTimeToLiveRequest { id: lease.id, keys: true };
        let left: pb::LeaseTimeToLiveResponse =
            default.unary("/etcdserverpb.Lease/LeaseTimeToLive", &request).await.unwrap();
        assert_eq!((left.granted_ttl, &left.keys[..]), (1_000_000, &[Bytes::from_static(b"leased")][..]));

        let acme = Connection::open(server.address(1)).await;
        let put =
            |value: String| pb::PutRequest { key: Bytes::from("of-acme"), value: value.into(), ..Default::default() };
        let (revision, pairs) = everything(&acme, 0).await;
        assert_eq!((revision, pairs), (4 + i64::try_from(start).unwrap(), vec![format!("of-acme={}", 3 + start)]));
        let _: pb::PutResponse = acme.unary("/etcdserverpb.KV/Put", &put((4 + start).to_string())).await.unwrap();
        hashes.push(hash(&default).await);
        server.kill();
    }
    assert_eq!(hashes[0], hashes[1]);
    assert_eq!(hashes[0].1, 25);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_single_members_directory_of_before_there_were_cells() {
    let dir = tempfile::tempdir().unwrap();
    has_everything(&unpack("before-cells.tar.gz", dir.path()), &[]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_of_a_member_of_three() {
    let dir = tempfile::tempdir().unwrap();
    has_everything(&unpack("member-of-three.tar.gz", dir.path()), &["--force-new-cluster"]).await;
}

/// What `make-operated.sh` had an operator do, as a member tells it.
async fn is_operated(data: &Path) {
    let mut admin = admin::connect(&data.join("admin.sock"));
    let listed = admin.list_tenants(api::ListTenantsRequest::default()).await.unwrap().into_inner().tenants;
    let of = |name: &str| listed.iter().find(|tenant| tenant.name == name).unwrap();
    let names: Vec<&str> = listed.iter().map(|tenant| tenant.name.as_str()).collect();
    assert_eq!(names, ["default", "acme", "globex", "initech"], "umbrella is deleted");
    let states = [api::State::Active, api::State::Active, api::State::Suspended, api::State::ReadOnly];
    assert_eq!(listed.iter().map(api::Tenant::state).collect::<Vec<_>>(), states);
    let acme = of("acme");
    let limits = acme.limits.unwrap();
    assert_eq!((limits.leases, limits.stored_bytes, limits.watchers), (Some(500), Some(8 << 30), None));
    assert_eq!(acme.effective_limits.unwrap().watchers, Some(1_000), "the cell's");
    assert_eq!(acme.labels.get("team").map(String::as_str), Some("blue"));
    assert!(acme.trusted_ca_pem.starts_with("-----BEGIN CERTIFICATE-----"));
    assert_eq!(of("initech").revoked_serials, ["0102"]);
    let identity = std::fs::read_to_string(data.join("IDENTITY")).unwrap();
    assert!(identity.starts_with("tenure-data 3\n"), "earlier releases refuse it: {identity}");
}

// A cell whose operator suspended, limited and revoked: a release that read all but that would let in who was kept out. Each member is
// started as the one of the release before, and they go on as a cell.
#[tokio::test(flavor = "multi_thread")]
async fn a_cell_of_three_with_what_its_operator_did() {
    let dir = tempfile::tempdir().unwrap();
    unpack("operated-cell-of-three.tar.gz", dir.path());
    let data = |member: u32| dir.path().join(member.to_string()).join("data");
    for start in 0..2 {
        let starting = [1, 2, 3].map(|member| {
            let data = data(member);
            // Where the members know each other to be.
            let peer = format!("http://127.0.0.1:2{member}380");
            let flags = [
                format!("--name=m{member}"),
                format!("--listen-peer-urls={peer}"),
                format!("--initial-advertise-peer-urls={peer}"),
            ];
            std::thread::spawn(move || {
                Server::start_with_flags(&flags.each_ref().map(String::as_str), &data, &["default", "acme"])
            })
        });
        let servers = starting.map(|starting| starting.join().unwrap());
        for member in 1..=3 {
            is_operated(&data(member)).await;
        }
        for server in &servers {
            let acme = Connection::open(server.address(1)).await;
            assert_eq!(everything(&acme, 0).await, (4 + start, vec![format!("of-acme={}", 3 + start)]));
        }
        let put = pb::PutRequest {
            key: Bytes::from_static(b"of-acme"),
            value: (4 + start).to_string().into(),
            ..Default::default()
        };
        let acme = Connection::open(servers[2].address(1)).await;
        let _: pb::PutResponse = acme.unary("/etcdserverpb.KV/Put", &put).await.unwrap();
        servers.into_iter().for_each(Server::kill);
    }
}
