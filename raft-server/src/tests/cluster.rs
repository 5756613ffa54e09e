//! Three voters on an in-memory network: the path with peers, before there is a real transport.

use std::collections::BTreeMap;

use super::*;
use crate::transport::Network;
use crate::{ProposeError, ReadError};

struct Member {
    handle: Handle<usize>,
    guard: JoinGuard,
}

struct Cluster {
    network: Network,
    dir: tempfile::TempDir,
    probes: BTreeMap<u64, Probe>,
    members: BTreeMap<u64, Member>,
}

impl Cluster {
    async fn start() -> Self {
        let probes = (1..=3).map(|id| (id, Probe::default())).collect();
        let dir = tempfile::tempdir().unwrap();
        let mut cluster = Cluster { network: Network::default(), dir, probes, members: BTreeMap::new() };
        (1..=3).for_each(|id| cluster.boot(id));
        cluster
    }

    fn boot(&mut self, id: u64) {
        let dir = self.dir.path().join(id.to_string());
        // Long enough that a busy machine does not depose a leader.
        let config =
            Config { initial_voters: vec![1, 2, 3], tick_ms: 10, election_timeout_ticks: 30, ..config(id, &dir) };
        let (handle, guard) = start(config, self.probes[&id].boot(), self.network.endpoint(id)).unwrap();
        self.network.connect(&handle);
        self.members.insert(id, Member { handle, guard });
    }

    /// Stops the member as a crash would; its log stays.
    fn kill(&mut self, id: u64) {
        self.network.disconnect(id);
        self.members.remove(&id).expect("it runs").guard.stop();
    }

    fn handle(&self, id: u64) -> &Handle<usize> {
        &self.members[&id].handle
    }

    /// Waits until one of `ids` leads a term after `term`.
    async fn leader_among(&self, ids: &[u64], term: u64) -> u64 {
        let waits = ids.iter().map(|id| {
            let mut leadership = self.handle(*id).leadership();
            let id = *id;
            tokio::spawn(
                async move { leadership.wait_for(|now| now.is_leader && now.term > term).await.map(|_| id).ok() },
            )
        });
        let mut waits = waits.collect::<Vec<_>>();
        let id = patiently(async {
            std::future::poll_fn(|context| {
                for wait in &mut waits {
                    if let std::task::Poll::Ready(Ok(Some(id))) = std::pin::Pin::new(wait).poll(context) {
                        return std::task::Poll::Ready(id);
                    }
                }
                std::task::Poll::Pending
            })
            .await
        })
        .await;
        waits.iter().for_each(|wait| wait.abort());
        id
    }

    /// Proposes at whoever leads among `ids`, following leadership where it goes.
    async fn write(&self, ids: &[u64], command: &Bytes) -> u64 {
        let mut at = self.leader_among(ids, 0).await;
        loop {
            match patiently(self.handle(at).propose(1, command.clone())).await {
                Ok(_) => return at,
                Err(ProposeError::NotLeader { leader }) => {
                    at = match leader {
                        Some(leader) if ids.contains(&leader) => leader,
                        _ => self.leader_among(ids, 0).await,
                    };
                }
                Err(ProposeError::Dropped) => {
                    // A busy machine may depose a leader all the same. Once a read point is confirmed, the entry is
                    // there or never will be.
                    at = self.leader_among(ids, 0).await;
                    patiently(async { while self.handle(at).read_barrier().await.is_err() {} }).await;
                    if self.probes[&at].commands().contains(command) {
                        return at;
                    }
                }
                Err(error) => panic!("nothing is full or stopping: {error}"),
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn elects_replicates_loses_its_leader_and_catches_up() {
    let mut cluster = Cluster::start().await;
    let all = [1, 2, 3];
    let mut leader = 0;
    for command in numbered(0..20) {
        leader = cluster.write(&all, &command).await;
    }
    // A read point on any member sees every acknowledged write.
    for id in all {
        patiently(cluster.handle(id).read_barrier()).await.unwrap();
        assert_eq!(cluster.probes[&id].commands(), numbered(0..20), "member {id}");
        assert_eq!(cluster.handle(id).read_point_now(), None, "a group of three needs rounds");
    }
    assert_eq!(cluster.handle(leader).status().voters, 3);

    let term = cluster.handle(leader).status().term;
    cluster.kill(leader);
    let rest: Vec<u64> = all.into_iter().filter(|id| *id != leader).collect();
    let next = cluster.leader_among(&rest, term).await;
    assert_ne!(next, leader);
    for command in numbered(20..40) {
        cluster.write(&rest, &command).await;
    }

    cluster.boot(leader);
    patiently(cluster.handle(leader).read_barrier()).await.unwrap();
    assert_eq!(cluster.probes[&leader].commands(), numbered(0..40));
}

// A leader cut off from its peers cannot commit; once it knows that it no longer leads, it says that the outcome is
// unknown. Its entry is overwritten by the next leader's.
#[tokio::test(flavor = "multi_thread")]
async fn loss_of_leadership_answers_dropped() {
    let cluster = Cluster::start().await;
    let all = [1, 2, 3];
    let old = cluster.write(&all, &numbered(0..1)[0]).await;
    let term = cluster.handle(old).status().term;
    let followed = all.into_iter().find(|id| *id != old).unwrap();

    cluster.network.cut(old);
    let stranded = patiently(cluster.handle(old).propose(1, Bytes::from_static(b"stranded"))).await;
    assert_eq!(stranded, Err(ProposeError::Dropped));
    let refused = patiently(cluster.handle(old).propose(1, Bytes::from_static(b"too late"))).await;
    assert_eq!(refused, Err(ProposeError::NotLeader { leader: None }));
    assert_eq!(patiently(cluster.handle(old).read_barrier()).await, Err(ReadError::Timeout), "nobody confirms it");

    let rest: Vec<u64> = all.into_iter().filter(|id| *id != old).collect();
    cluster.leader_among(&rest, term).await;
    for command in numbered(1..10) {
        cluster.write(&rest, &command).await;
    }
    cluster.network.heal(old);
    patiently(async { while cluster.handle(old).read_barrier().await.is_err() {} }).await;
    for id in [old, followed] {
        patiently(cluster.handle(id).read_barrier()).await.unwrap();
        assert_eq!(cluster.probes[&id].commands(), numbered(0..10), "member {id}");
    }
}

// Writes from many clients while leaders come and go: what was acknowledged is there, in one order everywhere.
#[tokio::test(flavor = "multi_thread")]
async fn acknowledged_writes_survive_changes_of_leadership() {
    let mut cluster = Cluster::start().await;
    let all = [1, 2, 3];
    let mut acknowledged = Vec::new();
    for round in 0..4 {
        let leader = cluster.leader_among(&all, 0).await;
        let writers: Vec<_> = numbered(round * 100..(round + 1) * 100)
            .into_iter()
            .map(|command| {
                let handle = cluster.handle(leader).clone();
                tokio::spawn(async move { handle.propose(1, command.clone()).await.map(|_| command) })
            })
            .collect();
        let mut writers = writers.into_iter();
        // Some are answered before the crash, the others learn that they do not know.
        for writer in writers.by_ref().take(20) {
            acknowledged.extend(patiently(writer).await.unwrap().ok());
        }
        cluster.kill(leader);
        for writer in writers {
            acknowledged.extend(patiently(writer).await.unwrap().ok());
        }
        cluster.boot(leader);
    }
    let mut logs = Vec::new();
    let last = cluster.write(&all, &Bytes::from_static(b"last")).await;
    assert!(all.contains(&last));
    for id in all {
        patiently(async { while cluster.handle(id).read_barrier().await.is_err() {} }).await;
        logs.push(cluster.probes[&id].commands());
    }
    assert_eq!(logs[0], logs[1]);
    assert_eq!(logs[1], logs[2]);
    for command in &acknowledged {
        assert!(logs[0].contains(command), "{command:?}");
    }
}
