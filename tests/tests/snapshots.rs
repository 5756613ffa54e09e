//! A member that is far behind gets a copy of the state while members die: whoever sends it, whoever receives it, and that one
//! again when it has all of it and makes it its own.
//!
//! Why: a copy is many files, which come one after the other, and takes the place of a state that was whole. What a crash leaves
//! is never served, and never in the way of the next copy.

#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::time::Instant;

use bytes::Bytes;
use tenure_etcd_shim::proto::etcdserverpb as pb;
use tenure_tests::cluster::Cluster;
use tenure_tests::load::{Client, PATIENCE, answer, check_same, leader_of};

/// The first is `default`.
const TENANTS: usize = 2;

/// Of each tenant. Together they are on their way for long enough to be interrupted: a member sends 128 MiB in a second at most.
const VALUES: u64 = 40;
const VALUE_BYTES: usize = 512 << 10;

/// A copy that has come so far is under way; there are as many of it still to come, at least.
const SOME_BYTES: u64 = 4 << 20;

/// Bytes that do not compress.
fn noise(seed: u64) -> Bytes {
    let mut state = seed + 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    (0..VALUE_BYTES / 8).flat_map(|_| next()).collect()
}

/// Bytes of copies that come in, below a data directory.
fn incoming_bytes(data_dir: &Path) -> u64 {
    let copies = std::fs::read_dir(data_dir.join("snapshot")).into_iter().flatten().flatten();
    let incoming = copies.filter(|copy| copy.file_name().to_string_lossy().starts_with("in-"));
    // What is just moved away is not there any more.
    let files = incoming.flat_map(|copy| std::fs::read_dir(copy.path()).into_iter().flatten().flatten());
    files.filter_map(|file| Some(file.metadata().ok()?.len())).sum()
}

/// Waits without a pause: what is waited for is over soon.
fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let began = Instant::now();
    while !is_so() {
        assert!(began.elapsed() < PATIENCE, "{what}");
        std::thread::yield_now();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn members_that_die_while_a_copy_of_the_state_is_on_its_way_go_on() {
    let dir = tempfile::tempdir().unwrap();
    let flags = ["--tenant-listen=other=http://127.0.0.1:0", "--snapshot-count=20", "--snapshot-catchup-entries=5"];
    let mut cluster = Cluster::start(3, dir.path(), &flags);
    let behind = (leader_of(&cluster).await + 1) % 3;
    cluster.members[behind].kill();
    let others = [(behind + 1) % 3, (behind + 2) % 3];
    for tenant in 0..TENANTS {
        let mut client = Client::new(cluster.members[others[0]].addresses[tenant]);
        for number in 0..VALUES {
            let (key, value) = (Bytes::from(format!("key{number}")), noise(number * 2 + tenant as u64));
            let put = pb::PutRequest { key, value, ..Default::default() };
            let _: pb::PutResponse = answer(&mut client, "/etcdserverpb.KV/Put", &put).await;
        }
    }
    let all_bytes = (TENANTS as u64) * VALUES * (VALUE_BYTES as u64);

    // Who sends dies; somebody else leads then, and has a copy of his own.
    let is_under_way = |data_dir: &Path| incoming_bytes(data_dir) > SOME_BYTES;
    let data_dir = cluster.members[behind].data_dir.clone();
    let sender = leader_of(&cluster).await;
    cluster.members[behind].spawn_with(&[]);
    wait_until("a copy is under way", || is_under_way(&data_dir));
    cluster.members[sender].kill();
    assert!(incoming_bytes(&data_dir) < all_bytes, "in the middle");

    // Who receives dies: of the first copy or of the next.
    cluster.members[behind].kill();
    cluster.members[sender].start();
    cluster.members[behind].spawn_with(&[]);
    wait_until("what was left over is gone", || !is_under_way(&data_dir));
    wait_until("another copy is under way", || is_under_way(&data_dir));
    cluster.members[behind].kill();
    assert!(incoming_bytes(&data_dir) < all_bytes, "in the middle");

    // It dies when the copy is just being made its own: it has left the place where copies come in.
    cluster.members[behind].spawn_with(&[]);
    wait_until("what was left over is gone", || !is_under_way(&data_dir));
    wait_until("another copy is under way", || is_under_way(&data_dir));
    wait_until("it is taken over", || !is_under_way(&data_dir));
    cluster.members[behind].kill();

    cluster.members[behind].start();
    for tenant in 0..TENANTS {
        let mut clients: Vec<Client> =
            cluster.members.iter().map(|member| Client::new(member.addresses[tenant])).collect();
        check_same(&mut clients).await;
    }
}
