//! A log that rots on the disk: the member says so and does not start, or ends, instead of going on without what it had acknowledged,
//! or with what it had not.
//!
//! Why: behind a broken entry all that follows is out of reach. A member that took that for the end of its log would forget
//! writes and votes, and a cell of one member would lose them without a word.

#![allow(clippy::unwrap_used)]

use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use prost::Message as _;
use tenure_etcd_shim::proto::etcdserverpb as pb;
use tenure_etcd_shim::wire::RangeResponse;
use tenure_tests::client::Connection;
use tenure_tests::cluster::Cluster;
use tenure_tests::load::{Client, answer, check_same, leader_of};
use tenure_tests::server::Server;

/// The newest file of the raft log below a data directory.
fn newest_log_file(dir: &Path) -> PathBuf {
    let (dirs, files): (Vec<PathBuf>, Vec<PathBuf>) =
        std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).partition(|path| path.is_dir());
    let newest = files.into_iter().filter(|path| path.extension().is_some_and(|kind| kind == "raftlog")).max();
    newest
        .or_else(|| dirs.iter().filter(|dir| dir.join("synced").exists()).map(|dir| newest_log_file(dir)).next())
        .unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_whose_log_has_rotted_does_not_start() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    let server = Server::start(&data, &["default"]);
    let connection = Connection::open(server.address(0)).await;
    let put = |number: u32| pb::PutRequest {
        key: Bytes::from(format!("rotten-{number}")),
        value: Bytes::from_static(b"v"),
        ..Default::default()
    };
    for number in 0..100 {
        let answer: pb::PutResponse = connection.unary("/etcdserverpb.KV/Put", &put(number)).await.unwrap();
        assert!(answer.encoded_len() > 0);
    }
    server.kill();

    let file = newest_log_file(&data);
    let whole = std::fs::read(&file).unwrap();
    let of_key = |key: &[u8]| whole.windows(key.len()).position(|bytes| bytes == key).unwrap();
    let (one, next) = (of_key(b"rotten-50"), of_key(b"rotten-51"));
    // One byte of an entry is another; and nothing can be made of a batch and what follows it.
    let flipped = [&whole[..one], b"R", &whole[one + 1..]].concat();
    let mut garbled = whole.clone();
    garbled[one..next].fill(0xee);
    for damaged in [flipped, garbled] {
        std::fs::write(&file, &damaged).unwrap();
        let said = Server::refusal(&data);
        let said: Vec<&str> = said.lines().filter(|line| !line.starts_with('{')).collect();
        assert_eq!(said.len(), 1, "one line says why: {said:?}");
        assert!(said[0].contains("corrupt raft log") || said[0].contains("raft log: Corruption"), "{said:?}");
    }

    // Put right again by whoever has a copy, it has everything.
    std::fs::write(&file, &whole).unwrap();
    let server = Server::start(&data, &["default"]);
    let connection = Connection::open(server.address(0)).await;
    let count = pb::RangeRequest {
        key: Bytes::from_static(b"rotten-"),
        range_end: Bytes::from_static(b"rotten."),
        count_only: true,
        ..Default::default()
    };
    let answer: RangeResponse = connection.unary("/etcdserverpb.KV/Range", &count).await.unwrap();
    assert_eq!(answer.count, 100);
}

// A leader reads old entries from its disk for a member that was away. What is not what it wrote must not reach that one's log, from
// where it would be applied: the leader ends, and says why; the member that was away catches up from another.
#[tokio::test(flavor = "multi_thread")]
async fn a_leader_whose_log_rots_while_it_runs_ends_before_it_spreads() {
    let dir = tempfile::tempdir().unwrap();
    // Who leads must still do so when the member comes back.
    let mut cluster = Cluster::start(3, dir.path(), &["--election-timeout=2000"]);
    let away = (leader_of(&cluster).await + 1) % 3;
    cluster.members[away].kill();
    let rest = [(away + 1) % 3, (away + 2) % 3];
    let mut client = Client::new(cluster.members[rest[0]].client);
    for number in 0..100 {
        let put = pb::PutRequest {
            key: Bytes::from(format!("rotten-{number}")),
            value: Bytes::from_static(b"v"),
            ..Default::default()
        };
        let _: pb::PutResponse = answer(&mut client, "/etcdserverpb.KV/Put", &put).await;
    }
    // After a start nothing of the log is in memory.
    rest.iter().for_each(|at| cluster.members[*at].kill());
    rest.iter().for_each(|at| cluster.members[*at].spawn_with(&[]));
    rest.iter().for_each(|at| cluster.members[*at].wait_until_ready());
    let leader = leader_of(&cluster).await;
    let file = newest_log_file(&cluster.members[leader].data_dir);
    let whole = std::fs::read(&file).unwrap();
    let place = whole.windows(9).position(|bytes| bytes == b"rotten-50").expect("the entry is in the newest file");
    std::fs::OpenOptions::new().write(true).open(file).unwrap().write_all_at(b"R", place as u64).unwrap();

    cluster.members[away].start();
    let failure = cluster.members[leader].failure();
    assert!(failure.starts_with("tenured: this member cannot go on: raft: "), "{failure}");
    assert!(failure.contains("raft log: Corruption"), "{failure}");

    cluster.members.remove(leader);
    let mut clients: Vec<Client> = cluster.members.iter().map(|member| Client::new(member.client)).collect();
    for client in &mut clients {
        let count = pb::RangeRequest {
            key: Bytes::from_static(b"rotten-"),
            range_end: Bytes::from_static(b"rotten."),
            count_only: true,
            ..Default::default()
        };
        let found: RangeResponse = answer(client, "/etcdserverpb.KV/Range", &count).await;
        assert_eq!(found.count, 100);
    }
    check_same(&mut clients).await;
}
