//! A log that rots on the disk: the member says so and does not start, instead of going on without what it had acknowledged.
//!
//! Why: behind a broken entry all that follows is out of reach. A member that took that for the end of its log would forget
//! writes and votes, and a cell of one member would lose them without a word.

#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use bytes::Bytes;
use prost::Message as _;
use tenure_etcd_shim::proto::etcdserverpb as pb;
use tenure_etcd_shim::wire::RangeResponse;
use tenure_tests::client::Connection;
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
        assert!(said.contains("corrupt raft log") || said.contains("raft log: Corruption"), "{said}");
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
