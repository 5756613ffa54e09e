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
use tenure_tests::cluster::{Cluster, Ended, Member, Told};
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

    // Also with the flags that the cell began with, which begin nothing anew beside it.
    let refusal = gone.refusal(&[]);
    assert!(refusal.contains("has no member with the peer URLs"), "{refusal}");
    add_learner(survivor, &gone.peer_url).await;
    gone.start();
    promote(survivor, id_of(survivor, &gone.peer_url).await).await;
    assert_eq!(get(gone, "k").await.as_deref(), Some("after"));
    assert_eq!(members(gone).await, ["m0", "m1", "m2"]);
}

// A backup is the directory of a member that is stopped, best of one that has no vote. It becomes a cell at other addresses, by itself.
#[tokio::test(flavor = "multi_thread")]
async fn a_cell_is_restored_from_the_copy_of_a_learner() {
    let dir = tempfile::tempdir().unwrap();
    let mut cluster = Cluster::new("http", 5, dir.path(), &[]);
    let three = cluster.initial_cluster(3);
    let (founders, [learner, restored]) = cluster.members.split_at_mut(3) else { panic!("five members") };
    founders.iter_mut().for_each(|member| member.spawn_with(&[&three]));
    founders.iter_mut().for_each(Member::wait_until_ready);
    put(&founders[0], "k", "before").await;
    add_learner(&founders[0], &learner.peer_url).await;
    // Ready: it has what was acknowledged before.
    learner.start_with(&[&three]);
    assert!(learner.stop());
    copy(&learner.data_dir, &restored.data_dir);
    learner.start_with(&[&three]);
    put(&founders[0], "k", "after").await;
    cluster.members.iter_mut().for_each(Member::kill);

    let [.., restored] = &mut cluster.members[..] else { panic!("five members") };
    restored.start_with(&["--force-new-cluster"]);
    assert_eq!(get(restored, "k").await.as_deref(), Some("before"));
    assert_eq!(members(restored).await, ["m4"]);
    // The list has the old address until it is told, and the others find it by the list.
    let everybody = pb::MemberListRequest { linearizable: true };
    let list: pb::MemberListResponse = ask(restored, "/etcdserverpb.Cluster/MemberList", &everybody).await;
    let update = pb::MemberUpdateRequest { id: list.members[0].id, peer_ur_ls: vec![restored.peer_url.clone()] };
    let _: pb::MemberUpdateResponse = ask(restored, "/etcdserverpb.Cluster/MemberUpdate", &update).await;
    assert!(restored.stop());
    restored.start();
    let [next, .., restored] = &mut cluster.members[..] else { panic!("five members") };
    std::fs::remove_dir_all(&next.data_dir).unwrap();
    add_learner(restored, &next.peer_url).await;
    let both = format!("--initial-cluster=m0={},m4={}", next.peer_url, restored.peer_url);
    next.start_with(&[&both, "--initial-cluster-state=existing"]);
    promote(restored, id_of(restored, &next.peer_url).await).await;
    assert_eq!(get(next, "k").await.as_deref(), Some("before"));
}

/// Copies a directory.
fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let to = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &to);
        } else if entry.file_type().unwrap().is_file() {
            std::fs::copy(entry.path(), &to).unwrap();
        }
    }
}

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

// The flags that say how to begin are for the beginning. After a crash the state may hold nothing yet, the log all.
#[tokio::test(flavor = "multi_thread")]
async fn members_that_crash_early_start_without_the_flags_they_began_with() {
    const BEGIN: &[&str] = &["initial-advertise-peer-urls", "initial-cluster"];
    let dir = tempfile::tempdir().unwrap();
    let mut cluster = Cluster::new("http", 4, dir.path(), &[]);
    let (three, four) = (cluster.initial_cluster(3), cluster.initial_cluster(4));
    let (joining, founders) = cluster.members.split_last_mut().unwrap();
    founders.iter_mut().for_each(|member| member.spawn_with(&[&three]));
    founders.iter_mut().for_each(Member::wait_until_ready);
    put(&founders[0], "k", "v").await;
    let add = pb::MemberAddRequest { peer_ur_ls: vec![joining.peer_url.clone()], is_learner: false };
    let _: pb::MemberAddResponse = ask(&founders[0], "/etcdserverpb.Cluster/MemberAdd", &add).await;
    // Its id says nothing of its URLs.
    for _ in 0..2 {
        joining.start_with(&[&four, "--initial-cluster-state=existing"]);
        assert_eq!(get(joining, "k").await.as_deref(), Some("v"));
        joining.kill();
    }
    for member in &mut cluster.members {
        member.kill();
        member.forget_flags(BEGIN);
        member.start();
        assert_eq!(get(member, "k").await.as_deref(), Some("v"));
    }
    // Whoever is moved says where it is now.
    let everybody = pb::MemberListRequest { linearizable: true };
    let list: pb::MemberListResponse = ask(&cluster.members[0], "/etcdserverpb.Cluster/MemberList", &everybody).await;
    let url = cluster.members[0].peer_url.clone();
    let id = list.members.iter().find(|member| member.peer_ur_ls == [url.as_str()]).unwrap().id;
    let elsewhere = url.replace("127.0.0.1", "127.0.0.3");
    let update = pb::MemberUpdateRequest { id, peer_ur_ls: vec![elsewhere.clone()] };
    let _: pb::MemberUpdateResponse = ask(&cluster.members[0], "/etcdserverpb.Cluster/MemberUpdate", &update).await;
    let member = &mut cluster.members[0];
    member.kill();
    member.start_with(&[
        &format!("--listen-peer-urls={elsewhere}"),
        &format!("--initial-advertise-peer-urls={elsewhere}"),
        &format!("--initial-cluster=m0={elsewhere}"),
    ]);
    assert_eq!(get(member, "k").await.as_deref(), Some("v"));
    // All at once, so that each has to find the others by itself.
    cluster.members.iter_mut().for_each(Member::kill);
    let (moved, others) = cluster.members.split_first_mut().unwrap();
    moved.spawn_with(&[&format!("--listen-peer-urls={elsewhere}")]);
    others.iter_mut().for_each(|member| member.spawn_with(&[]));
    moved.wait_until_ready();
    others.iter_mut().for_each(Member::wait_until_ready);
    assert_eq!(get(moved, "k").await.as_deref(), Some("v"));
}

// Charts of hosted control planes set auto-compaction: old revisions go then, on every member, and the newest stay.
#[tokio::test(flavor = "multi_thread")]
async fn old_revisions_go_by_themselves() {
    let dir = tempfile::tempdir().unwrap();
    let cluster = Cluster::start(3, dir.path(), &["--auto-compaction-retention=100ms"]);
    for value in ["first", "second"] {
        put(&cluster.members[0], "k", value).await;
    }
    for member in &cluster.members {
        let old = pb::RangeRequest { key: Bytes::from("k"), revision: 2, serializable: true, ..Default::default() };
        let compacted = async {
            let connection = Connection::open(member.client).await;
            loop {
                match connection.unary::<_, RangeResponse>("/etcdserverpb.KV/Range", &old).await {
                    Ok(_) => tokio::task::yield_now().await,
                    Err(status) => return status,
                }
            }
        };
        let status = tokio::time::timeout(PATIENCE, compacted).await.expect("it is compacted");
        assert_eq!(status.message(), "etcdserver: mvcc: required revision has been compacted");
        assert_eq!(get(member, "k").await.as_deref(), Some("second"));
    }
}

// Who hears that a member is removed and stops another one at once must find a quorum in those that are left.
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

/// The id of the member that the others reach there.
async fn id_of(asked: &Member, peer_url: &str) -> u64 {
    let request = pb::MemberListRequest { linearizable: true };
    let list: pb::MemberListResponse = ask(asked, "/etcdserverpb.Cluster/MemberList", &request).await;
    list.members.iter().find(|member| member.peer_ur_ls == [peer_url.to_string()]).expect("it is a member").id
}

/// Asks until members that have just started count as healthy.
async fn add_learner(asked: &Member, peer_url: &str) {
    let add = pb::MemberAddRequest { peer_ur_ls: vec![peer_url.to_string()], is_learner: true };
    let connection = Connection::open(asked.client).await;
    let added = async {
        loop {
            match connection.unary::<_, pb::MemberAddResponse>("/etcdserverpb.Cluster/MemberAdd", &add).await {
                Ok(_) => return,
                Err(status) => assert_eq!(status.message(), "etcdserver: unhealthy cluster"),
            }
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, added).await.expect("it is added");
}

async fn promote(asked: &Member, id: u64) {
    let request = pb::MemberPromoteRequest { id };
    let connection = Connection::open(asked.client).await;
    let promoted = async {
        loop {
            match connection
                .unary::<_, pb::MemberPromoteResponse>("/etcdserverpb.Cluster/MemberPromote", &request)
                .await
            {
                Ok(_) => return,
                Err(status) => assert!(status.message().contains("in sync with leader"), "{status:?}"),
            }
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, promoted).await.expect("it is promoted");
}

// A StatefulSet gives its pods the same flags for ever, those that the cell began with. One that comes up empty must not begin under the id
// that it had: the cell has removed it.
#[tokio::test(flavor = "multi_thread")]
async fn members_are_replaced_and_added_with_the_flags_that_the_cell_began_with() {
    let dir = tempfile::tempdir().unwrap();
    let mut cluster = Cluster::new("http", 4, dir.path(), &[]);
    let three = cluster.initial_cluster(3);
    let existing: &[&str] = &[&three, "--initial-cluster-state=existing"];
    let [first, second, third, fourth] = &mut cluster.members[..] else { panic!("four members") };
    for member in [&mut *first, &mut *second, &mut *third] {
        member.spawn_with(&[&three]);
    }
    for member in [&mut *first, &mut *second, &mut *third] {
        member.wait_until_ready();
    }
    put(first, "k", "v").await;

    third.kill();
    std::fs::remove_dir_all(&third.data_dir).unwrap();
    for flags in [&[three.as_str()], existing] {
        let refusal = third.refusal(flags);
        assert!(refusal.contains("has already been bootstrapped"), "{refusal}");
    }
    let removal = pb::MemberRemoveRequest { id: id_of(first, &third.peer_url).await };
    let _: pb::MemberRemoveResponse = ask(first, "/etcdserverpb.Cluster/MemberRemove", &removal).await;
    for member in [&mut *third, &mut *fourth] {
        for flags in [&[three.as_str()], existing] {
            let refusal = member.refusal(flags);
            assert!(refusal.contains("has no member with the peer URLs"), "{refusal}");
            assert!(!member.data_dir.exists(), "nothing was made");
        }
    }
    // Whichever of the two the state is said to be.
    for (member, flags) in [(third, &[three.as_str()][..]), (fourth, existing)] {
        add_learner(first, &member.peer_url).await;
        member.start_with(flags);
        promote(first, id_of(first, &member.peer_url).await).await;
        assert_eq!(get(member, "k").await.as_deref(), Some("v"));
        // And again, with the data that it has now.
        assert!(member.stop());
        member.start_with(flags);
        assert_eq!(get(member, "k").await.as_deref(), Some("v"));
    }
    assert_eq!(members(second).await, ["m0", "m1", "m2", "m3"]);
    // It has a vote.
    first.kill();
    put(second, "k", "without the first").await;
}

// Each flag and each directory that does not fit, alone: whoever reads the one line knows which it was. What was refused was not
// changed, and nothing was made.
#[tokio::test(flavor = "multi_thread")]
async fn what_does_not_fit_the_cell_is_refused_in_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let mut cluster = Cluster::start(3, &dir.path().join("ours"), &["--initial-cluster-token=ours"]);
    put(&cluster.members[0], "k", "v").await;
    let [first, second, stray] = &mut cluster.members[..] else { panic!("three members") };
    assert!(stray.stop());

    let at = |data: &Path| format!("--data-dir={}", data.display());
    let of = |name: &str, file: &str, text: &str| {
        let data = dir.path().join(name);
        std::fs::create_dir_all(data.join(file).parent().unwrap()).unwrap();
        std::fs::write(data.join(file), text).unwrap();
        at(&data)
    };
    let (etcds, full) = (of("etcds", "member/wal", ""), of("full", "photo.jpg", ""));
    let damaged = of("damaged", "IDENTITY", "tenure-data 3\nmember 1\n");
    let newer = of("newer", "IDENTITY", "tenure-data 1000\nmember 1\n");

    let empty = dir.path().join("empty");
    let (without, taken) = (at(&empty), at(&first.data_dir));
    let (zero, one, two) = (&first.peer_url, &second.peer_url, &stray.peer_url);
    let cluster_of = |pairs: &[(&str, &String)]| {
        let pairs: Vec<String> = pairs.iter().map(|(name, url)| format!("{name}={url}")).collect();
        format!("--initial-cluster={}", pairs.join(","))
    };
    let nowhere = "http://127.0.0.1:1".to_string();
    let pair = cluster_of(&[("m0", zero), ("m2", two)]);
    let twice = cluster_of(&[("m0", zero), ("m1", zero), ("m2", two)]);
    let elsewhere = cluster_of(&[("m0", zero), ("m1", &nowhere), ("m2", two)]);
    let unreachable = cluster_of(&[("m0", &nowhere), ("m2", two)]);
    let alone = cluster_of(&[("m2", two)]);
    let four = cluster_of(&[("m0", zero), ("m1", one), ("m2", two), ("m3", &nowhere)]);
    let existing = "--initial-cluster-state=existing";
    let advertised = "--initial-advertise-peer-urls=http://127.0.0.1:1";
    let of_first = format!("--initial-advertise-peer-urls={zero}");

    // Flags beside its own, and what is said of them.
    let cases: &[(&[&str], &str)] = &[
        // With its data.
        (&["--initial-cluster-token=theirs"], "is of a cluster with --initial-cluster-token \"ours\", not \"theirs\""),
        (&["--name=m0", &of_first], "but --initial-advertise-peer-urls has those of member"),
        // With what is not its data.
        (&[&taken], "is in use by another process"),
        (&[&etcds], "is a data directory of etcd"),
        (&[&full], "is not empty and is not a data directory of tenured"),
        (&[&damaged], "is damaged"),
        (&[&newer], "has layout version 1000, which this release does not know"),
        // Without data, as a member of a new cell.
        (&[&without, "--name=m9"], "couldn't find local name \"m9\" in the initial cluster configuration"),
        (&[&without, advertised], "for this member but --initial-advertise-peer-urls has http://127.0.0.1:1"),
        (&[&without, &twice], "--initial-cluster has duplicate peer URL"),
        (&[&without], "has already been bootstrapped"),
        (&[&without, "--initial-cluster-token=theirs"], "the members at the URLs of --initial-cluster are of cluster"),
        (&[&without, &pair], "the members at the URLs of --initial-cluster are of cluster"),
        (&[&without, &elsewhere], "the members at the URLs of --initial-cluster are of cluster"),
        // As one of a cell that exists.
        (&[&without, existing], "has already been bootstrapped"),
        (&[&without, existing, &pair], "member count is unequal: the cluster has 3, --initial-cluster has 2"),
        (&[&without, existing, &four], "member count is unequal: the cluster has 3, --initial-cluster has 4"),
        (&[&without, existing, &elsewhere], "unmatched member while checking PeerURLs (m1=http://127.0.0.1:1)"),
        (&[&without, existing, &unreachable], "could not retrieve cluster information from the given URLs: connect to"),
        (&[&without, existing, &alone], "from the given URLs: there is none but its own"),
    ];
    for (flags, expected) in cases {
        let refusal = stray.refusal(flags);
        assert!(refusal.starts_with("tenured: ") && refusal.contains(expected), "{flags:?}: {refusal}");
        assert!(!empty.exists(), "{flags:?}: nothing was made");
    }

    // Another member's data, whole and unused: two with one id would both vote.
    assert!(second.stop());
    let (seconds, own) = (at(&second.data_dir), at(&stray.data_dir));
    let refusal = stray.refusal(&[&seconds]);
    assert!(refusal.contains("but --initial-advertise-peer-urls has those of member"), "{refusal}");
    let refusal = second.refusal(&[&own]);
    assert!(refusal.contains("but --initial-advertise-peer-urls has those of member"), "{refusal}");

    second.start();
    stray.start();
    assert_eq!(get(stray, "k").await.as_deref(), Some("v"));
}

// Whoever comes first finds nobody to ask. It must learn of it when the others come, and not vote with them.
#[tokio::test(flavor = "multi_thread")]
async fn data_of_another_cell_is_refused_also_when_the_others_come_later() {
    let dir = tempfile::tempdir().unwrap();
    let mut cluster = Cluster::start(3, &dir.path().join("ours"), &["--initial-cluster-token=ours"]);
    put(&cluster.members[0], "k", "v").await;
    cluster.members.iter_mut().for_each(Member::kill);

    // The same members begin another one.
    let theirs = |at: usize| {
        [
            "--initial-cluster-token=theirs".to_string(),
            format!("--data-dir={}", dir.path().join(format!("theirs{at}")).display()),
        ]
    };
    for (at, member) in cluster.members.iter_mut().enumerate() {
        member.spawn_with(&theirs(at).each_ref().map(String::as_str));
    }
    put(&cluster.members[2], "k", "theirs").await;
    cluster.members.iter_mut().for_each(Member::kill);

    let [first, second, stray] = &mut cluster.members[..] else { panic!("three members") };
    stray.start_unready(&theirs(2).each_ref().map(String::as_str));
    first.spawn_with(&[]);
    second.start();
    let refusal = stray.failure();
    assert!(refusal.contains("all other members are of another cluster than"), "{refusal}");
    stray.start();
    assert_eq!(get(stray, "k").await.as_deref(), Some("v"));
}

// Operators see it at whatever level they log, and supervisors that it meant to end.
#[tokio::test(flavor = "multi_thread")]
async fn a_removed_member_ends_by_itself_and_says_why() {
    const LINE: &str = "the member has been permanently removed from the cluster";
    let dir = tempfile::tempdir().unwrap();
    let mut cluster = Cluster::new("http", 3, dir.path(), &["--strict-reconfig-check=false"]);
    let [first, second, third] = &mut cluster.members[..] else { panic!("three members") };
    first.spawn_with(&[]);
    second.spawn_with(&[]);
    third.spawn_with(&["--log-level=warn"]);
    put(third, "k", "v").await;

    let own: pb::StatusResponse = ask(third, "/etcdserverpb.Maintenance/Status", &pb::StatusRequest {}).await;
    let removal = pb::MemberRemoveRequest { id: own.header.unwrap().member_id };
    let _: pb::MemberRemoveResponse = ask(first, "/etcdserverpb.Cluster/MemberRemove", &removal).await;
    let Ended { in_good_order, said } = third.wait_for_end();
    assert!(in_good_order, "{said:?}");
    // The others say so too, on each connection that it has lost.
    let own = said.iter().filter(|line| line.ends_with(&format!("\"msg\":\"{LINE}\"}}")));
    assert_eq!(own.count(), 1, "{said:?}");
    assert!(said.iter().all(|line| line.contains("\"level\":\"warn\"")), "{said:?}");

    // Whoever starts it again hears it again, and that the data is of no use.
    let refusal = third.refusal(&[]);
    assert!(refusal.starts_with("tenured: ") && refusal.contains(LINE), "{refusal}");
    assert!(refusal.ends_with("its data directory must be removed"), "{refusal}");
    assert_eq!(members(second).await, ["m0", "m1"]);
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
