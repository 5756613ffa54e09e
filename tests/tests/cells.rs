//! How cells begin and end, as real processes: with TLS between the members, after the loss of a majority, and with
//! what belongs to another cell.
//!
//! Why: whether a member may take part is decided before it serves anybody, from its data, its flags and what others say. A
//! wrong answer joins two histories.

#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use tenure_etcd_shim::proto::etcdserverpb as pb;
use tenure_etcd_shim::storage::key_value::KeyValue;
use tenure_etcd_shim::wire::RangeResponse;
use tenure_tests::client::Connection;
use tenure_tests::cluster::{Cluster, Member, Told};
use tonic::Code;

/// Bounds what should long be over; it judges nothing.
const PATIENCE: Duration = Duration::from_secs(300);

/// Asks until there is an answer: a machine that stalls makes members elect another leader at any time.
async fn ask<Q: prost::Message, A: prost::Message + Default>(member: &Member, method: &str, request: &Q) -> A {
    let mut look = tokio::time::interval(Duration::from_millis(20));
    let answered = async {
        loop {
            look.tick().await;
            let answer = match Connection::try_open(member.client).await {
                Ok(connection) => connection.unary(method, request).await,
                Err(status) => Err(status),
            };
            match answer {
                Ok(answer) => return answer,
                Err(status) => assert_eq!(status.code(), Code::Unavailable, "{status:?}"),
            }
        }
    };
    tokio::time::timeout(PATIENCE, answered).await.expect("the member answers")
}

async fn put(member: &Member, key: &'static str, value: &'static str) {
    let request = pb::PutRequest { key: Bytes::from(key), value: Bytes::from(value), ..Default::default() };
    let _: pb::PutResponse = ask(member, "/etcdserverpb.KV/Put", &request).await;
}

async fn get(member: &Member, key: &'static str) -> Option<String> {
    let request = pb::RangeRequest { key: Bytes::from(key), ..Default::default() };
    let answer: RangeResponse = ask(member, "/etcdserverpb.KV/Range", &request).await;
    let stored = answer.kvs.iter().next();
    stored.map(|stored| String::from_utf8(KeyValue::decode(stored).unwrap().value.to_vec()).unwrap())
}

async fn members(member: &Member) -> Vec<String> {
    let request = pb::MemberListRequest { linearizable: true };
    let answer: pb::MemberListResponse = ask(member, "/etcdserverpb.Cluster/MemberList", &request).await;
    let mut names: Vec<String> = answer.members.into_iter().map(|member| member.name).collect();
    names.sort_unstable();
    names
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_majority_is_recovered_by_force() {
    let dir = tempfile::tempdir().unwrap();
    let mut cluster = Cluster::start(3, dir.path(), &[]);
    put(&cluster.members[2], "k", "before").await;
    // It has that now: a linearizable read waits for it.
    assert_eq!(get(&cluster.members[0], "k").await.as_deref(), Some("before"));
    cluster.members.iter_mut().for_each(Member::kill);
    let [survivor, lost, gone] = &mut cluster.members[..] else { panic!("three members") };
    std::fs::remove_dir_all(&gone.data_dir).unwrap();

    survivor.start_with(&["--force-new-cluster"]);
    assert_eq!(get(survivor, "k").await.as_deref(), Some("before"));
    assert_eq!(members(survivor).await, ["m0"]);
    put(survivor, "k", "after").await;
    assert!(survivor.stop());
    survivor.start();
    assert_eq!((get(survivor, "k").await.as_deref(), members(survivor).await.len()), (Some("after"), 1));

    // Another member comes back after all: it is told that it does not belong any more, and must not form a majority with
    // the data it has.
    let refusal = lost.refusal(&[]);
    assert!(
        refusal
            .ends_with("the member has been permanently removed from the cluster; its data directory must be removed")
    );

    // A new one takes its place.
    let request = pb::MemberAddRequest { peer_ur_ls: vec![lost.peer_url.clone()], is_learner: false };
    let connection = Connection::open(survivor.client).await;
    let _: pb::MemberAddResponse = connection.unary("/etcdserverpb.Cluster/MemberAdd", &request).await.unwrap();
    std::fs::remove_dir_all(&lost.data_dir).unwrap();
    let both = format!("--initial-cluster=m0={},m1={}", survivor.peer_url, lost.peer_url);
    lost.start_with(&[&both, "--initial-cluster-state=existing"]);
    assert_eq!(get(lost, "k").await.as_deref(), Some("after"));
    assert_eq!(members(lost).await, ["m0", "m1"]);
}

// The members before a removal are needed until raft has left the joint configuration: who hears of it earlier and stops another
// member leaves the cell without a quorum for good.
// However operators give their flags: a member is who they say.
#[tokio::test(flavor = "multi_thread")]
async fn members_are_told_by_variables_and_by_files_too() {
    let dir = tempfile::tempdir().unwrap();
    let mut cluster = Cluster::new("http", 3, dir.path(), &["--initial-cluster-token=told", "--snapshot-count=1000"]);
    let told = [Told::OnTheCommandLine, Told::InVariables, Told::InAFile];
    for (member, told) in cluster.members.iter_mut().zip(told) {
        member.tell(told);
    }
    cluster.start_all();
    for member in &cluster.members {
        put(member, "k", "v").await;
        assert_eq!(members(member).await, ["m0", "m1", "m2"]);
    }
    for member in &mut cluster.members {
        assert!(member.stop());
        member.start();
        assert_eq!(get(member, "k").await.as_deref(), Some("v"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn of_those_that_a_removal_leaves_one_may_stop_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let mut cluster = Cluster::start(3, dir.path(), &[]);
    put(&cluster.members[0], "k", "before").await;
    let connection = Connection::open(cluster.members[0].client).await;
    let request = pb::MemberAddRequest { peer_ur_ls: vec!["http://127.0.0.1:1".into()], is_learner: false };
    // Members that have just started do not count as healthy yet.
    let added: pb::MemberAddResponse = loop {
        match connection.unary("/etcdserverpb.Cluster/MemberAdd", &request).await {
            Ok(added) => break added,
            Err(status) => assert_eq!(status.message(), "etcdserver: unhealthy cluster"),
        }
        tokio::task::yield_now().await;
    };
    let removal = pb::MemberRemoveRequest { id: added.member.expect("the new member").id };
    let _: pb::MemberRemoveResponse = connection.unary("/etcdserverpb.Cluster/MemberRemove", &removal).await.unwrap();
    cluster.members[2].kill();
    put(&cluster.members[0], "k", "after").await;
    assert_eq!(get(&cluster.members[1], "k").await.as_deref(), Some("after"));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_another_cells_is_refused_in_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let mut cluster = Cluster::start(3, &dir.path().join("ours"), &["--initial-cluster-token=ours"]);
    put(&cluster.members[0], "k", "v").await;
    let stray = &mut cluster.members[2];
    assert!(stray.stop());

    let refusal = stray.refusal(&["--initial-cluster-token=theirs"]);
    assert!(refusal.contains("is of a cluster with --initial-cluster-token \"ours\", not \"theirs\""), "{refusal}");

    // Without data, flags that make another cell of members that have one.
    let empty = dir.path().join("empty");
    let at = |data: &Path| format!("--data-dir={}", data.display());
    let refusal = stray.refusal(&[&at(&empty), "--initial-cluster-token=theirs"]);
    assert!(refusal.contains("the members at the URLs of --initial-cluster are of cluster"), "{refusal}");
    let refusal = stray.refusal(&[&at(&empty)]);
    assert!(refusal.contains("has already been bootstrapped"), "{refusal}");
    assert!(!empty.exists(), "nothing was made");

    // Data of another cell, begun by the same members with another token.
    let theirs = dir.path().join("theirs");
    let mut other = Cluster::new("http", 1, &theirs, &["--initial-cluster-token=theirs"]);
    other.start_all();
    assert!(other.members[0].stop());
    let refusal = stray.refusal(&[&at(&other.members[0].data_dir), "--initial-cluster-token=theirs"]);
    assert!(refusal.contains("are not of cluster"), "{refusal}");

    stray.start();
    assert_eq!(get(stray, "k").await.as_deref(), Some("v"));
}

/// A CA's and a member's files.
fn certificates(dir: &Path, name: &str) -> [PathBuf; 3] {
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca = params.self_signed(&key).unwrap();
    let issuer = Issuer::new(params, key);
    let key = KeyPair::generate().unwrap();
    let certificate = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap().signed_by(&key, &issuer).unwrap();
    [("ca", ca.pem()), ("crt", certificate.pem()), ("key", key.serialize_pem())].map(|(kind, pem)| {
        let path = dir.join(format!("{name}.{kind}"));
        std::fs::write(&path, pem).unwrap();
        path
    })
}

fn peer_flags([ca, certificate, key]: &[PathBuf; 3]) -> Vec<String> {
    vec![
        format!("--peer-trusted-ca-file={}", ca.display()),
        format!("--peer-cert-file={}", certificate.display()),
        format!("--peer-key-file={}", key.display()),
        "--peer-client-cert-auth".to_string(),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn members_talk_tls_and_trust_their_own_alone() {
    let dir = tempfile::tempdir().unwrap();
    let flags = peer_flags(&certificates(dir.path(), "ours"));
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    let mut cluster = Cluster::new("https", 3, dir.path(), &flags);
    cluster.start_all();
    put(&cluster.members[1], "k", "one").await;
    let [first, second, third] = &mut cluster.members[..] else { panic!("three members") };
    first.kill();
    put(second, "k", "two").await;
    first.start();
    assert_eq!(get(first, "k").await.as_deref(), Some("two"));

    // With another CA's certificate it reaches nobody and nobody believes it: the others go on, and so does it when it has its
    // own again.
    third.kill();
    let foreign = peer_flags(&certificates(dir.path(), "theirs"));
    let foreign: Vec<&str> = foreign.iter().map(String::as_str).collect();
    third.start_unready(&foreign);
    put(first, "k", "three").await;
    for member in [&*first, &*second] {
        let has_leader = async {
            let request = pb::StatusRequest {};
            while ask::<_, pb::StatusResponse>(member, "/etcdserverpb.Maintenance/Status", &request).await.leader == 0 {
            }
        };
        tokio::time::timeout(PATIENCE, has_leader).await.expect("it has a leader");
    }
    third.kill();
    third.start();
    assert_eq!(get(third, "k").await.as_deref(), Some("three"));
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_are_replaced_while_members_run() {
    let dir = tempfile::tempdir().unwrap();
    let files = certificates(dir.path(), "ours");
    let flags = peer_flags(&files);
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    let mut cluster = Cluster::new("https", 3, dir.path(), &flags);
    cluster.start_all();
    put(&cluster.members[1], "k", "one").await;
    // Another CA's, in the same files. Who starts knows this one only, and must be believed by who runs.
    certificates(dir.path(), "ours");
    for member in &mut cluster.members {
        member.kill();
        member.start();
    }
    assert_eq!(get(&cluster.members[0], "k").await.as_deref(), Some("one"));
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_of_the_moment_are_enough_to_begin() {
    let dir = tempfile::tempdir().unwrap();
    let mut cluster = Cluster::new("https", 3, dir.path(), &["--peer-auto-tls"]);
    cluster.start_all();
    put(&cluster.members[0], "k", "v").await;
    cluster.members[2].kill();
    cluster.members[2].start();
    assert_eq!(get(&cluster.members[2], "k").await.as_deref(), Some("v"));
}
