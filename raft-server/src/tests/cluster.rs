//! Three voters on an in-memory network: the path with peers, before there is a real transport.

use std::collections::BTreeMap;

use super::*;
use crate::snapshot::SnapshotOffer;
use crate::transport::{Endpoint, Network, PeerMessage, Transport};
use crate::{ChangeError, MembersChange, ProposeError};

/// Long enough that a busy machine seldom deposes a leader. It may at any time, and no test takes for granted that it does not.
const ELECTION_TIMEOUT_TICKS: usize = 100;
const TICK_MS: u64 = 10;

/// A member whose raft thread sees all that is said about reads, as in earlier releases.
struct ThroughRaft(Endpoint);

impl Transport for ThroughRaft {
    fn send(&mut self, messages: Vec<PeerMessage>) {
        self.0.send(messages);
    }

    fn fetch(&mut self, offer: SnapshotOffer) {
        self.0.fetch(offer);
    }
}

struct Member {
    handle: Handle<usize>,
    guard: JoinGuard,
}

struct Cluster {
    network: Network,
    dir: tempfile::TempDir,
    probes: BTreeMap<u64, Probe>,
    members: BTreeMap<u64, Member>,
    through_raft: &'static [u64],
}

impl Cluster {
    async fn start() -> Self {
        Self::start_with(&[]).await
    }

    /// Of which these are [`ThroughRaft`].
    async fn start_with(through_raft: &'static [u64]) -> Self {
        let probes = (1..=3).map(|id| (id, Probe::default())).collect();
        let dir = tempfile::tempdir().unwrap();
        let mut cluster = Cluster { network: Network::default(), dir, probes, members: BTreeMap::new(), through_raft };
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
        let config = Config {
            initial_voters,
            tick_ms: TICK_MS,
            election_timeout_ticks: ELECTION_TIMEOUT_TICKS,
            read_timeout_ticks: 50,
            // Little is kept, so that a member falls behind soon.
            log_bytes_flush: 64 << 10,
            log_catchup_entries: 4,
            ..config(id, &dir)
        };
        let (machine, endpoint) = (self.probes[&id].boot(), self.network.endpoint(id));
        let started = if self.through_raft.contains(&id) {
            start(config, machine, ThroughRaft(endpoint))
        } else {
            start(config, machine, endpoint)
        };
        let (handle, guard) = started.unwrap();
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

    /// Waits until one of `ids` leads a term after `term`: the member, and the term that it leads.
    async fn leader_among(&self, ids: &[u64], term: u64) -> (u64, u64) {
        let mut waits = tokio::task::JoinSet::new();
        for id in ids {
            let mut leadership = self.handle(*id).leadership();
            let id = *id;
            waits.spawn(async move {
                let led = leadership.wait_for(|now| now.is_leader && now.term > term).await.map(|now| now.term);
                (id, led.expect("the member lives"))
            });
        }
        patiently(waits.join_next()).await.expect("there are members").unwrap()
    }

    /// Proposes at one of `ids`, whoever leads. Gives the member that leads now.
    async fn write(&self, ids: &[u64], command: &Bytes) -> u64 {
        let at = ids[command.len() % ids.len()];
        patiently(self.handle(at).propose(1, command.clone())).await.expect("nothing is full or stopping");
        self.leader_among(ids, 0).await.0
    }

    /// Makes this member the leader. Raft gives a transfer up after an election timeout, and may elect another afterwards.
    async fn hand_over_to(&self, to: u64) {
        let all: Vec<u64> = self.members.keys().copied().collect();
        let attempt = Duration::from_millis(TICK_MS * ELECTION_TIMEOUT_TICKS as u64);
        patiently(async {
            loop {
                let (leader, _) = self.leader_among(&all, 0).await;
                if leader == to {
                    return;
                }
                self.handle(leader).transfer_leadership(to);
                let mut leadership = self.handle(to).leadership();
                // In vain or not: who leads is looked at again.
                let _ = tokio::time::timeout(attempt, leadership.wait_for(|now| now.is_leader)).await;
            }
        })
        .await;
    }

    /// What the member `at`, as the leader, answers to a change of members, once it is not busy with an earlier one.
    async fn ask_for_change(&self, at: u64, change: MembersChange, command: &'static [u8]) -> Result<(), ChangeError> {
        patiently(async {
            loop {
                self.hand_over_to(at).await;
                let handle = self.handle(at);
                match handle.change_members(change, handle.conf_index(), Bytes::from_static(command)).await {
                    Err(ChangeError::UnderWay | ChangeError::NotLeader { .. }) => {}
                    Err(ChangeError::Propose(ProposeError::OtherTerm)) => {}
                    // Whether it was made is known once what was proposed before is applied, or lost for good.
                    Err(ChangeError::Propose(ProposeError::Dropped)) => {
                        read_point(handle).await;
                        if self.probes[&at].commands().iter().any(|made| made == command) {
                            return Ok(());
                        }
                    }
                    Ok(_) => return Ok(()),
                    Err(error) => return Err(error),
                }
                tokio::task::yield_now().await;
            }
        })
        .await
    }
}

// What a leader decides for its term must not be proposed by anybody else, nor later: not by a leader that was cut off and finds,
// when it is back, that another led meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn a_command_for_one_term_is_proposed_in_it_or_never() {
    let cluster = Cluster::start().await;
    let in_term = async |id: u64, term, command: &'static [u8]| {
        patiently(cluster.handle(id).propose_in_term(term, 1, Bytes::from_static(command))).await
    };
    let (leader, term) = loop {
        let (leader, term) = cluster.leader_among(&[1, 2, 3], 0).await;
        match in_term(leader, term, b"in time").await {
            // Another was elected just then.
            Err(ProposeError::OtherTerm) => {}
            answer => {
                assert_eq!(answer, Ok(1));
                break (leader, term);
            }
        }
    };
    // Too far ahead for an election in between to reach.
    assert_eq!(in_term(leader, term + 1_000, b"early").await, Err(ProposeError::OtherTerm));
    assert_eq!(in_term(leader % 3 + 1, term, b"elsewhere").await, Err(ProposeError::OtherTerm));

    cluster.network.cut(leader);
    let others: Vec<u64> = (1..=3).filter(|id| *id != leader).collect();
    let handle = cluster.handle(leader).clone();
    let late = tokio::spawn(async move { handle.propose_in_term(term, 1, Bytes::from_static(b"late")).await });
    let (next, _) = cluster.leader_among(&others, term).await;
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
    for command in numbered(0..20) {
        cluster.write(&all, &command).await;
    }
    // A read point on any member sees every acknowledged write.
    for id in all {
        read_point(cluster.handle(id)).await;
        assert_eq!(cluster.probes[&id].commands(), numbered(0..20), "member {id}");
        assert_eq!(cluster.handle(id).read_point_now(), None, "a group of three needs rounds");
    }
    let (leader, term) = cluster.leader_among(&all, 0).await;
    assert_eq!(cluster.handle(leader).status().voters, 3);

    cluster.kill(leader);
    let rest: Vec<u64> = all.into_iter().filter(|id| *id != leader).collect();
    let (next, _) = cluster.leader_among(&rest, term).await;
    assert_ne!(next, leader);
    for command in numbered(20..40) {
        cluster.write(&rest, &command).await;
    }

    cluster.boot(leader);
    read_point(cluster.handle(leader)).await;
    assert_eq!(cluster.probes[&leader].commands(), numbered(0..40));
}

// A leader cut off from its peers cannot commit. Its command waits until it is known that it was lost with that leadership, and
// is then applied in another: once.
#[tokio::test(flavor = "multi_thread")]
async fn a_command_survives_the_loss_of_its_leader() {
    let cluster = Cluster::start().await;
    let all = [1, 2, 3];
    cluster.write(&all, &numbered(0..1)[0]).await;
    let (old, term) = cluster.leader_among(&all, 0).await;

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
        read_point(cluster.handle(id)).await;
        assert_eq!(cluster.probes[&id].commands(), expected, "member {id}");
    }
}

// Whoever leads asks one other member for its readers: one that answers on any thread, on raft's alone as an earlier release does, or not at all.
#[tokio::test(flavor = "multi_thread")]
async fn a_leader_reads_whoever_it_asks() {
    for through_raft in [&[][..], &[2, 3], &[1, 2, 3]] {
        let cluster = Cluster::start_with(through_raft).await;
        let all = [1, 2, 3];
        cluster.leader_among(&all, 0).await;
        cluster.hand_over_to(1).await;
        let mut written = Vec::new();
        for cut in [0, 2, 0, 3, 0] {
            let reachable: Vec<u64> = all.into_iter().filter(|id| *id != cut).collect();
            cluster.network.cut(cut);
            for _ in 0..3 {
                written.extend(numbered(written.len()..written.len() + 1));
                cluster.write(&reachable, &written[written.len() - 1]).await;
                for id in &reachable {
                    read_point(cluster.handle(*id)).await;
                    assert_eq!(cluster.probes[id].commands(), written, "member {id}");
                }
            }
            cluster.network.heal(cut);
        }
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
    // Whoever led may have lost that, and be behind.
    read_point(cluster.handle(leader)).await;
    let before = cluster.probes[&leader].commands();
    cluster.boot(slow);
    read_point(cluster.handle(slow)).await;
    assert_eq!(cluster.probes[&slow].commands(), before);
    let (leader, _) = cluster.leader_among(&all, 0).await;
    cluster.boot_joiner(4);
    cluster.ask_for_change(leader, MembersChange::AddLearner(4), b"add 4").await.unwrap();
    read_point(cluster.handle(4)).await;
    assert!(cluster.handle(4).status().is_learner);
    cluster.ask_for_change(leader, MembersChange::AddVoter(4), b"vote 4").await.unwrap();
    cluster.write(&[1, 2, 3, 4], &Bytes::from_static(b"after")).await;
    read_point(cluster.handle(4)).await;
    let commands = cluster.probes[&4].commands();
    assert_eq!(commands.len(), 53);
    assert_eq!(commands[commands.len() - 3..], [&b"add 4"[..], b"vote 4", b"after"]);
    until(|| cluster.handle(4).voters()[..] == [1, 2, 3, 4]).await;
}

// The command that goes with a change of members records it, and makes none. So one that is lost with its leader must not be
// proposed again, as others are: the state would know of a member that raft does not.
#[tokio::test(flavor = "multi_thread")]
async fn a_lost_change_of_members_does_not_come_back_without_raft() {
    let cluster = Cluster::start().await;
    let (leader, term) = cluster.leader_among(&[1, 2, 3], 0).await;
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
        read_point(cluster.handle(id)).await;
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
    cluster.hand_over_to(next).await;

    // It hands over first, or raft would lead on without a place of its own.
    let itself = cluster.ask_for_change(next, MembersChange::Remove(next), b"remove myself").await;
    assert_eq!(itself, Err(ChangeError::Invalid));

    let leaver = all.into_iter().find(|id| *id != next).unwrap();
    let elsewhere = async {
        let handle = cluster.handle(leaver);
        loop {
            cluster.hand_over_to(next).await;
            let remove = Bytes::from_static(b"remove");
            match handle.change_members(MembersChange::Remove(leaver), handle.conf_index(), remove).await {
                Err(ChangeError::NotLeader { leader: Some(leader) }) if leader == next => return,
                // It does not know yet who leads, or somebody else was elected meanwhile, perhaps itself.
                Err(ChangeError::NotLeader { .. } | ChangeError::Invalid | ChangeError::UnderWay) => {}
                answer => panic!("a member that does not lead tells who does: {answer:?}"),
            }
            tokio::task::yield_now().await;
        }
    };
    patiently(elsewhere).await;
    cluster.ask_for_change(next, MembersChange::Remove(leaver), b"remove").await.unwrap();
    let rest: Vec<u64> = all.into_iter().filter(|id| *id != leaver).collect();
    until(|| cluster.handle(next).voters()[..] == rest[..]).await;
    cluster.kill(leaver);
    for command in numbered(1..5) {
        cluster.write(&rest, &command).await;
    }
    // It need not have led to the end.
    read_point(cluster.handle(next)).await;
    assert_eq!(cluster.probes[&next].commands().len(), 6);
}

// Who was told that a member is gone counts the rest: of three that are left, one may stop at once. It could not while raft still
// asked the members before the change too, of whom the one that is gone never answers: the group would be stuck for good.
#[tokio::test(flavor = "multi_thread")]
async fn a_member_whose_removal_is_acknowledged_is_not_waited_for() {
    let mut cluster = Cluster::start().await;
    let (leader, _) = cluster.leader_among(&[1, 2, 3], 0).await;
    cluster.ask_for_change(leader, MembersChange::AddVoter(4), b"add 4, which never starts").await.unwrap();
    cluster.ask_for_change(leader, MembersChange::Remove(4), b"remove 4").await.unwrap();
    cluster.kill(if leader == 1 { 2 } else { 1 });
    let rest: Vec<u64> = cluster.members.keys().copied().collect();
    cluster.write(&rest, &Bytes::from_static(b"of two of three")).await;
}

// Writes from many clients while leaders come and go: what was acknowledged is there, in one order everywhere.
#[tokio::test(flavor = "multi_thread")]
async fn acknowledged_writes_survive_changes_of_leadership() {
    let mut cluster = Cluster::start().await;
    let all = [1, 2, 3];
    let mut acknowledged = Vec::new();
    for round in 0..4 {
        let (leader, _) = cluster.leader_among(&all, 0).await;
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
        read_point(cluster.handle(id)).await;
        logs.push(cluster.probes[&id].commands());
    }
    assert_eq!(logs[0], logs[1]);
    assert_eq!(logs[1], logs[2]);
    for command in &acknowledged {
        assert!(logs[0].contains(command), "{command:?}");
    }
}
