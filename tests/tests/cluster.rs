//! Three and five members as real processes, under load from clients of all of them, while members are killed, stopped,
//! paused, added and removed: nothing acknowledged is lost, no linearizable read is stale, and in the end all members have the same
//! history.
//!
//! Why: the simulation knows every order of events but no process, no disk and no network. Here they are real.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tenure_etcd_shim::proto::etcdserverpb as pb;
use tenure_etcd_shim::storage::Rules;
use tenure_etcd_shim::wire::RangeResponse;
use tenure_tests::client::{Connection, framed};
use tenure_tests::cluster::{Cluster, Member};
use tenure_tests::load::{Client, Load, PATIENCE, answer, check, leader_of, reconfigure};
use tokio::task::JoinSet;

#[tokio::test(flavor = "multi_thread")]
async fn three_members_survive_kills_pauses_and_restarts() {
    let dir = tempfile::tempdir().unwrap();
    let mut cluster = Cluster::start(3, dir.path(), &["--snapshot-count=200", "--snapshot-catchup-entries=20"]);
    let mut load = Load::start(&cluster);
    load.progress(50).await;
    for _ in 0..3 {
        // The leader is killed, comes back behind what the others still have in their logs, and gets a snapshot.
        let leader = leader_of(&cluster).await;
        cluster.members[leader].kill();
        load.progress(100).await;
        cluster.members[leader].start();
        load.progress(20).await;
    }
    let follower = (leader_of(&cluster).await + 1) % 3;
    cluster.members[follower].kill();
    load.progress(20).await;
    cluster.members[follower].start();
    // A leader that sleeps must not believe, when it wakes, that it leads still.
    let leader = leader_of(&cluster).await;
    cluster.members[leader].pause(true);
    load.progress(4).await;
    cluster.members[leader].pause(false);
    load.progress(20).await;
    for at in 0..3 {
        assert!(cluster.members[at].stop(), "it stops in good order");
        cluster.members[at].start();
        load.progress(10).await;
    }
    let keys = load.end().await;
    check(&cluster, &keys).await;
    // Everybody at once.
    cluster.members.iter_mut().for_each(|member| member.kill());
    cluster.start_all();
    check(&cluster, &keys).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn five_members_survive_two_kills_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let mut cluster = Cluster::start(5, dir.path(), &[]);
    let mut load = Load::start(&cluster);
    load.progress(20).await;
    let leader = leader_of(&cluster).await;
    let other = (leader + 2) % 5;
    cluster.members[leader].kill();
    cluster.members[other].kill();
    load.progress(30).await;
    cluster.members[leader].start();
    cluster.members[other].start();
    load.progress(10).await;
    let keys = load.end().await;
    check(&cluster, &keys).await;
}

async fn status(cluster: &Cluster, at: usize) -> pb::StatusResponse {
    answer(&mut Client::new(cluster.members[at].client), "/etcdserverpb.Maintenance/Status", &pb::StatusRequest {})
        .await
}

/// Whether the key exists: if serializable, as far as this member alone knows.
async fn has_key(cluster: &Cluster, at: usize, key: &'static str, serializable: bool) -> bool {
    let request = pb::RangeRequest { key: Bytes::from(key), serializable, ..Default::default() };
    let found: RangeResponse =
        answer(&mut Client::new(cluster.members[at].client), "/etcdserverpb.KV/Range", &request).await;
    found.count == 1
}

// etcd's clients take a request that was sent for one that may have happened: they do not repeat a write. So a member that stops
// answers what it was sent, and nobody waits until the others miss it. No election but the one of each hand-over takes place.
#[tokio::test(flavor = "multi_thread")]
async fn a_leader_that_stops_hands_over_and_no_write_fails_or_waits_for_an_election() {
    /// So long that only a hand-over makes another leader, whatever the machine does.
    const ELECTION_TIMEOUT: Duration = Duration::from_secs(20);
    const WRITERS: usize = 3;
    let dir = tempfile::tempdir().unwrap();
    let patient = format!("--election-timeout={}", ELECTION_TIMEOUT.as_millis());
    let mut cluster = Cluster::start(3, dir.path(), &[]);
    // The first leader would take as long to be found. The last to change is the leader, who hands over too.
    let first = leader_of(&cluster).await;
    for at in [(first + 1) % 3, (first + 2) % 3, first] {
        assert!(cluster.members[at].stop(), "it stops in good order");
        cluster.members[at].start_with(&[&patient]);
    }

    let stop = Arc::new(AtomicBool::new(false));
    let written = Arc::new([const { AtomicU64::new(0) }; WRITERS]);
    let mut writers = JoinSet::new();
    for writer in 0..WRITERS {
        let (stop, written) = (Arc::clone(&stop), Arc::clone(&written));
        let addresses: Vec<_> = cluster.members.iter().map(|member| member.client).collect();
        writers.spawn(async move {
            let mut at = writer;
            let mut kept: Option<Connection> = None;
            let mut longest = Duration::ZERO;
            while !stop.load(Ordering::Relaxed) {
                let number = written[writer].load(Ordering::Relaxed) + 1;
                let (key, value) = (Bytes::from(format!("key{writer}")), Bytes::from(number.to_string()));
                let put = prost::Message::encode_to_vec(&pb::PutRequest { key, value, ..Default::default() });
                let began = Instant::now();
                // What was not sent is sent to the next member.
                let mut call = loop {
                    let connection = match kept.clone() {
                        Some(connection) => Ok(connection),
                        None => Connection::try_open(addresses[at]).await,
                    };
                    if let Ok(connection) = connection
                        && let Ok(call) = connection.call("/etcdserverpb.KV/Put").await
                    {
                        kept = Some(connection);
                        break call;
                    }
                    kept = None;
                    at = (at + 1) % addresses.len();
                    tokio::task::yield_now().await;
                };
                call.requests.send_bytes(framed(&put), true).await.expect("it takes what it has agreed to take");
                let answer: pb::PutResponse = call.answers.message().await.expect("what was sent is answered");
                assert!(answer.header.is_some());
                longest = longest.max(began.elapsed());
                written[writer].store(number, Ordering::Relaxed);
            }
            longest
        });
    }
    let progress = async || {
        let targets: Vec<u64> = written.iter().map(|written| written.load(Ordering::Relaxed) + 20).collect();
        let mut look = tokio::time::interval(Duration::from_millis(20));
        let reached = async {
            while written.iter().zip(&targets).any(|(written, target)| written.load(Ordering::Relaxed) < *target) {
                look.tick().await;
            }
        };
        tokio::time::timeout(PATIENCE, reached).await.expect("the cell serves writes");
    };
    progress().await;
    for _ in 0..3 {
        let leader = leader_of(&cluster).await;
        let term = status(&cluster, leader).await.raft_term;
        assert!(cluster.members[leader].stop(), "it stops in good order");
        progress().await;
        assert_eq!(status(&cluster, (leader + 1) % 3).await.raft_term, term + 1, "one election, by hand-over");
        cluster.members[leader].start_with(&[&patient]);
        progress().await;
        assert_eq!(status(&cluster, leader).await.raft_term, term + 1, "whoever comes back disturbs nobody");
    }
    stop.store(true, Ordering::Relaxed);
    while let Some(longest) = writers.join_next().await {
        let longest = longest.unwrap();
        assert!(longest < ELECTION_TIMEOUT, "a write waited for {longest:?}");
    }
}

// A cell without a quorum cannot be told that a lease is kept alive, so no lease may end then, or because of it: not by who led and
// hears nobody any more, and not by who leads next.
#[tokio::test(flavor = "multi_thread")]
async fn leases_outlive_the_loss_of_a_quorum() {
    const TTL: Duration = Duration::from_secs(2);
    let dir = tempfile::tempdir().unwrap();
    let mut cluster = Cluster::start(3, dir.path(), &["--election-timeout=500", "--heartbeat-interval=50"]);
    for (key, leader_stays) in [("leader gone", false), ("leader alone", true)] {
        let leader = leader_of(&cluster).await;
        let stays = if leader_stays { leader } else { (leader + 1) % 3 };
        let gone: Vec<usize> = (0..3).filter(|at| *at != stays).collect();

        let mut client = Client::new(cluster.members[stays].client);
        // A leader takes two election timeouts to see that it is alone; until then time runs.
        let ttl = if leader_stays { 2 * TTL } else { TTL };
        let grant = pb::LeaseGrantRequest { ttl: i64::try_from(ttl.as_secs()).unwrap(), id: 0 };
        let granted: pb::LeaseGrantResponse = answer(&mut client, "/etcdserverpb.Lease/LeaseGrant", &grant).await;
        assert_eq!(granted.ttl, grant.ttl);
        let put = pb::PutRequest { key: Bytes::from(key), lease: granted.id, ..Default::default() };
        let _: pb::PutResponse = answer(&mut client, "/etcdserverpb.KV/Put", &put).await;
        for at in &gone {
            cluster.members[*at].kill();
        }

        let mut look = tokio::time::interval(Duration::from_millis(100));
        let lost = Instant::now();
        while lost.elapsed() < ttl + TTL / 2 {
            assert!(has_key(&cluster, stays, key, true).await, "{key}: ended after {:?}", lost.elapsed());
            look.tick().await;
        }
        let before = Instant::now();
        for at in &gone {
            cluster.members[*at].spawn_with(&[]);
        }
        for at in &gone {
            cluster.members[*at].wait_until_ready();
        }
        let ended = async {
            while has_key(&cluster, gone[0], key, false).await {
                look.tick().await;
            }
        };
        tokio::time::timeout(PATIENCE, ended).await.expect("nobody keeps it alive");
        // It was there when the quorum was back, and did not end with the time that had been left to it.
        assert!(before.elapsed() >= ttl, "{key}: it lives its time again, not {:?}", before.elapsed());
    }
}

// A member that is down may be of a release that knows other rules: it would stop at what it does not know. Once raised, they stay.
#[tokio::test(flavor = "multi_thread")]
async fn newer_rules_wait_for_all_members() {
    const FIRST: f64 = 1.0;
    let dir = tempfile::tempdir().unwrap();
    let mut cluster = Cluster::new("http", 3, dir.path(), &[]);
    let (last, others) = cluster.members.split_last_mut().unwrap();
    others.iter_mut().for_each(|member| member.spawn_with(&[]));
    others.iter_mut().for_each(Member::wait_until_ready);
    let rules =
        |members: &[Member]| members.iter().map(|member| member.metric("tenure_cell_rules")).collect::<Vec<_>>();
    let mut client = Client::new(others[0].client);
    for key in ["a", "b"] {
        let put = pb::PutRequest { key: Bytes::from(key), ..Default::default() };
        let _: pb::PutResponse = answer(&mut client, "/etcdserverpb.KV/Put", &put).await;
    }
    assert_eq!(rules(others), [FIRST, FIRST]);
    last.start();
    for member in &cluster.members {
        member.wait_for("the cell decides by newer rules");
    }
    let newest = f64::from(Rules::NEWEST.number());
    assert_eq!(rules(&cluster.members), [newest; 3]);
    cluster.members.iter_mut().for_each(|member| member.kill());
    cluster.start_all();
    assert_eq!(rules(&cluster.members), [newest; 3]);
}

// How cells grow and shrink in operation: one member at a time, as a learner first, while clients go on; those that leave may lead.
#[tokio::test(flavor = "multi_thread")]
async fn a_cell_grows_to_five_members_and_shrinks_to_one_under_load() {
    let dir = tempfile::tempdir().unwrap();
    let mut cluster = Cluster::new("http", 5, dir.path(), &[]);
    let alone = cluster.initial_cluster(1);
    cluster.members[0].start_with(&[&alone]);
    let mut load = Load::start(&cluster);
    load.progress(10).await;
    let mut client = Client::new(cluster.members[0].client);
    let members = async |client: &mut Client| {
        let request = pb::MemberListRequest { linearizable: true };
        let list: pb::MemberListResponse = answer(client, "/etcdserverpb.Cluster/MemberList", &request).await;
        list.members
    };
    for at in 1..5 {
        let url = vec![cluster.members[at].peer_url.clone()];
        let add = pb::MemberAddRequest { peer_ur_ls: url.clone(), is_learner: true };
        let _: Option<pb::MemberAddResponse> = reconfigure(&mut client, "MemberAdd", &add).await;
        let initial = cluster.initial_cluster(at + 1);
        cluster.members[at].start_with(&[&initial, "--initial-cluster-state=existing"]);
        let id = members(&mut client).await.iter().find(|member| member.peer_ur_ls == url).unwrap().id;
        let promote = pb::MemberPromoteRequest { id };
        let _: Option<pb::MemberPromoteResponse> = reconfigure(&mut client, "MemberPromote", &promote).await;
        load.progress(5).await;
    }
    assert_eq!(members(&mut client).await.iter().filter(|member| !member.is_learner).count(), 5);
    for _ in 0..4 {
        let leader = leader_of(&cluster).await;
        let mut leaving = cluster.members.remove(leader);
        let mut client = Client::new(cluster.members[0].client);
        let list = members(&mut client).await;
        let id = list.iter().find(|member| member.peer_ur_ls == [leaving.peer_url.clone()]).unwrap().id;
        let _: Option<pb::MemberRemoveResponse> =
            reconfigure(&mut client, "MemberRemove", &pb::MemberRemoveRequest { id }).await;
        assert!(leaving.wait_for_end().in_good_order, "a removed member stops by itself");
        load.progress(5).await;
    }
    let names: BTreeSet<String> =
        members(&mut Client::new(cluster.members[0].client)).await.into_iter().map(|member| member.name).collect();
    assert_eq!(names.len(), 1);
    let keys = load.end().await;
    check(&cluster, &keys).await;
}
