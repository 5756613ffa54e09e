//! Three voters on an in-memory network: the path with peers, before there is a real transport.

use std::collections::BTreeMap;

use super::*;
use crate::transport::Network;
use crate::{ChangeError, MembersChange, ReadError};

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
        self.boot_with(id, vec![1, 2, 3]);
    }

    /// A member that knows of no group yet.
    fn boot_joiner(&mut self, id: u64) {
        self.probes.insert(id, Probe::default());
        self.boot_with(id, Vec::new());
    }

    fn boot_with(&mut self, id: u64, initial_voters: Vec<u64>) {
        let dir = self.dir.path().join(id.to_string());
        // Long enough that a busy machine does not depose a leader.
        let config = Config {
            initial_voters,
            tick_ms: 10,
            election_timeout_ticks: 30,
            // Little is kept, so that a member falls behind soon.
            log_bytes_flush: 64 << 10,
            log_catchup_entries: 4,
            ..config(id, &dir)
        };
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

    /// Proposes at one of `ids`, whoever leads. Gives the member that leads now.
    async fn write(&self, ids: &[u64], command: &Bytes) -> u64 {
        let at = ids[command.len() % ids.len()];
        patiently(self.handle(at).propose(1, command.clone())).await.expect("nothing is full or stopping");
        self.leader_among(ids, 0).await
    }
}

// What a leader decides for its term must not be proposed by anybody else, nor later: not by a leader that was cut off and finds,
// when it is back, that another led meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn a_command_for_one_term_is_proposed_in_it_or_never() {
    use crate::ProposeError;

    let cluster = Cluster::start().await;
    let leader = cluster.leader_among(&[1, 2, 3], 0).await;
    let term = cluster.handle(leader).status().term;
    let in_term = async |id: u64, term, command: &'static [u8]| {
        patiently(cluster.handle(id).propose_in_term(term, 1, Bytes::from_static(command))).await
    };
    assert_eq!(in_term(leader, term, b"in time").await, Ok(1));
    assert_eq!(in_term(leader, term + 1, b"early").await, Err(ProposeError::OtherTerm));
    assert_eq!(in_term(leader % 3 + 1, term, b"elsewhere").await, Err(ProposeError::OtherTerm));

    cluster.network.cut(leader);
    let others: Vec<u64> = (1..=3).filter(|id| *id != leader).collect();
    let handle = cluster.handle(leader).clone();
    let late = tokio::spawn(async move { handle.propose_in_term(term, 1, Bytes::from_static(b"late")).await });
    let next = cluster.leader_among(&others, term).await;
    cluster.network.heal(leader);
    assert_eq!(patiently(late).await.unwrap(), Err(ProposeError::OtherTerm));
    patiently(cluster.handle(next).propose(1, Bytes::from_static(b"after"))).await.unwrap();
    let applied: [&[u8]; 2] = [b"in time", b"after"];
    assert_eq!(cluster.probes[&next].commands(), applied);
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

// A leader cut off from its peers cannot commit. Its command waits until it is known that it was lost with that leadership, and
// is then applied in another: once.
#[tokio::test(flavor = "multi_thread")]
async fn a_command_survives_the_loss_of_its_leader() {
    let cluster = Cluster::start().await;
    let all = [1, 2, 3];
    let old = cluster.write(&all, &numbered(0..1)[0]).await;
    let term = cluster.handle(old).status().term;

    cluster.network.cut(old);
    let stranded = tokio::spawn({
        let handle = cluster.handle(old).clone();
        async move { handle.propose(1, Bytes::from_static(b"stranded")).await }
    });
    let mut leadership = cluster.handle(old).leadership();
    patiently(leadership.wait_for(|now| !now.is_leader)).await.unwrap();
    assert_eq!(patiently(cluster.handle(old).read_barrier()).await, Err(ReadError::Timeout), "nobody confirms it");

    let rest: Vec<u64> = all.into_iter().filter(|id| *id != old).collect();
    cluster.leader_among(&rest, term).await;
    for command in numbered(1..10) {
        cluster.write(&rest, &command).await;
    }
    cluster.network.heal(old);
    assert_eq!(patiently(stranded).await.unwrap(), Ok(11));
    let mut expected = numbered(0..10);
    expected.push(Bytes::from_static(b"stranded"));
    for id in all {
        patiently(async { while cluster.handle(id).read_barrier().await.is_err() {} }).await;
        assert_eq!(cluster.probes[&id].commands(), expected, "member {id}");
    }
}

// A member that slept while the others truncated their logs gets a copy of the state, and so does one that is new; then
// both go on with the log.
#[tokio::test(flavor = "multi_thread")]
async fn members_too_far_behind_get_a_snapshot() {
    let mut cluster = Cluster::start().await;
    let all = [1, 2, 3];
    let leader = cluster.write(&all, &numbered(0..1)[0]).await;
    let slow = all.into_iter().find(|id| *id != leader).unwrap();
    let rest: Vec<u64> = all.into_iter().filter(|id| *id != slow).collect();
    cluster.kill(slow);
    for command in numbered(1..50) {
        cluster.write(&rest, &Bytes::from([&command[..], &[b'x'; 4000]].concat())).await;
    }
    let before = cluster.probes[&leader].commands();
    cluster.boot(slow);
    patiently(cluster.handle(slow).read_barrier()).await.unwrap();
    assert_eq!(cluster.probes[&slow].commands(), before);
    let leader = cluster.leader_among(&all, 0).await;
    cluster.boot_joiner(4);
    let add = cluster.handle(leader).change_members(
        MembersChange::AddLearner(4),
        cluster.handle(leader).conf_index(),
        Bytes::from_static(b"add 4"),
    );
    patiently(add).await.unwrap();
    patiently(async { while cluster.handle(4).read_barrier().await.is_err() {} }).await;
    assert!(cluster.handle(4).status().is_learner);
    loop {
        let promote = cluster.handle(leader).change_members(
            MembersChange::AddVoter(4),
            cluster.handle(leader).conf_index(),
            Bytes::from_static(b"vote 4"),
        );
        match patiently(promote).await {
            Err(ChangeError::UnderWay) => tokio::task::yield_now().await,
            other => break assert!(other.is_ok(), "{other:?}"),
        }
    }
    cluster.write(&[1, 2, 3, 4], &Bytes::from_static(b"after")).await;
    patiently(cluster.handle(4).read_barrier()).await.unwrap();
    let commands = cluster.probes[&4].commands();
    assert_eq!(commands.len(), 53);
    assert_eq!(commands[commands.len() - 3..], [&b"add 4"[..], b"vote 4", b"after"]);
    patiently(async { while cluster.handle(4).voters()[..] != [1, 2, 3, 4] {} }).await;
}

// The command that goes with a change of members records it, and makes none. So one that is lost with its leader must not be
// proposed again, as others are: the state would know of a member that raft does not.
#[tokio::test(flavor = "multi_thread")]
async fn a_lost_change_of_members_does_not_come_back_without_raft() {
    let cluster = Cluster::start().await;
    let leader = cluster.leader_among(&[1, 2, 3], 0).await;
    let term = cluster.handle(leader).status().term;
    cluster.network.cut(leader);
    let handle = cluster.handle(leader).clone();
    let lost = tokio::spawn(async move {
        let seen = handle.conf_index();
        handle.change_members(MembersChange::AddLearner(4), seen, Bytes::from_static(b"add 4")).await
    });
    let others: Vec<u64> = (1..=3).filter(|id| *id != leader).collect();
    cluster.leader_among(&others, term).await;
    cluster.write(&others, &Bytes::from_static(b"theirs")).await;
    cluster.network.heal(leader);
    // If it was so late that the member did not believe any more that it leads, it was refused at once.
    assert!(patiently(lost).await.unwrap().is_err());
    cluster.write(&[1, 2, 3], &Bytes::from_static(b"after")).await;
    for id in 1..=3 {
        patiently(cluster.handle(id).read_barrier()).await.unwrap();
        assert_eq!(cluster.probes[&id].commands(), [&b"theirs"[..], b"after"]);
        assert_eq!(cluster.handle(id).voters()[..], [1, 2, 3]);
    }
}

// Whoever is removed knows, and the others go on; so does a group whose leader is asked to hand over.
#[tokio::test(flavor = "multi_thread")]
async fn members_leave_and_leaders_hand_over() {
    let mut cluster = Cluster::start().await;
    let all = [1, 2, 3];
    let leader = cluster.write(&all, &numbered(0..1)[0]).await;
    let next = all.into_iter().find(|id| *id != leader).unwrap();
    cluster.handle(leader).transfer_leadership(next);
    let mut leadership = cluster.handle(next).leadership();
    patiently(leadership.wait_for(|now| now.is_leader)).await.unwrap();

    // It hands over first, or raft would lead on without a place of its own.
    let itself = cluster.handle(next).change_members(
        MembersChange::Remove(next),
        cluster.handle(next).conf_index(),
        Bytes::from_static(b"remove myself"),
    );
    assert_eq!(patiently(itself).await, Err(ChangeError::Invalid));

    let leaver = all.into_iter().find(|id| *id != next).unwrap();
    let wrong = cluster.handle(leaver).change_members(
        MembersChange::Remove(leaver),
        cluster.handle(leaver).conf_index(),
        Bytes::from_static(b"remove"),
    );
    assert_eq!(patiently(wrong).await, Err(ChangeError::NotLeader { leader: Some(next) }));
    let remove = cluster.handle(next).change_members(
        MembersChange::Remove(leaver),
        cluster.handle(next).conf_index(),
        Bytes::from_static(b"remove"),
    );
    patiently(remove).await.unwrap();
    let rest: Vec<u64> = all.into_iter().filter(|id| *id != leaver).collect();
    patiently(async { while cluster.handle(next).voters()[..] != rest[..] {} }).await;
    cluster.kill(leaver);
    for command in numbered(1..5) {
        cluster.write(&rest, &command).await;
    }
    // It need not have led to the end.
    patiently(cluster.handle(next).read_barrier()).await.unwrap();
    assert_eq!(cluster.probes[&next].commands().len(), 6);
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
