//! SIGKILL at random moments under write load. What was acknowledged is there, txns are whole, revisions never go back.
//!
//! Why: the state has no write-ahead log of its own; everything rests on the raft log, its truncation behind the state's
//! flush, and replay. Only a real process that dies shows that they fit.

#![allow(clippy::unwrap_used)]

use std::collections::HashSet;
use std::io::{BufRead as _, BufReader};
use std::process::{Command, Stdio};

use tenure_etcd_shim::Tenure;
use tenure_etcd_shim::storage::{KeyRange, RangeRequest};

const KILLS: usize = 50;

/// Runs the victim, kills it once it has acknowledged `acknowledged_min` writes, and answers all it acknowledged.
fn run_and_kill(dir: &std::path::Path, round: usize, acknowledged_min: usize) -> Vec<(String, i64)> {
    let mut child = Command::new(env!("CARGO_BIN_EXE_crash-child"))
        .arg(dir)
        .arg(round.to_string())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut acknowledged = Vec::new();
    let parse = |line: String| {
        let (name, revision) = line.split_once(' ')?;
        Some((name.to_string(), revision.parse().ok()?))
    };
    while acknowledged.len() < acknowledged_min {
        acknowledged.extend(parse(lines.next().expect("the victim writes until it is killed").unwrap()));
    }
    child.kill().unwrap();
    acknowledged.extend(lines.map_while(Result::ok).filter_map(parse));
    child.wait().unwrap();
    acknowledged
}

/// Names under one half, and the tenant's revision.
async fn names(tenure: &Tenure, half: &str) -> (HashSet<String>, i64) {
    let client = tenure.client("acme").unwrap();
    let range = KeyRange::HalfOpen { start: format!("{half}/").into(), end: format!("{half}0").into() };
    let found = client.range(RangeRequest::new(range)).await.unwrap();
    let name =
        |key: &[u8]| String::from_utf8(key.to_vec()).unwrap().trim_start_matches(&format!("{half}/")).to_string();
    (found.kvs.iter().map(|kv| name(&kv.key)).collect(), found.revision)
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_acknowledged_is_lost() {
    let dir = tempfile::tempdir().unwrap();
    let mut acknowledged: Vec<(String, i64)> = Vec::new();
    let mut revision_before = 0;
    for round in 0..KILLS {
        // The moments differ by the amount of work done before the kill; the scheduler adds its own chance.
        acknowledged.extend(run_and_kill(dir.path(), round, 1 + (round * 37) % 400));
        let tenure = Tenure::builder().data_dir(dir.path()).start().await.unwrap();
        let (left, revision) = names(&tenure, "left").await;
        let (right, _) = names(&tenure, "right").await;
        tenure.stop().await;

        assert_eq!(left, right, "round {round}: a txn is whole or not there");
        for (name, acknowledged_at) in &acknowledged {
            assert!(left.contains(name), "round {round}: lost {name}");
            assert!(*acknowledged_at <= revision, "round {round}: revision went back");
        }
        assert!(revision >= revision_before, "round {round}: revision went back");
        assert_eq!(revision - 1, left.len() as i64, "one revision per txn, without gaps");
        revision_before = revision;
    }
}
