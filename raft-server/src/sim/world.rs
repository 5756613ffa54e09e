//! The scheduler: what happens next, drawn from a seed.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::hash::{Hash, Hasher};
use std::path::Path;

use bytes::Bytes;
use raft::eraftpb::ConfState;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tenure_storage::{Command, Envelope, Fault, LeaseId, Outcome, PutRequest, Rules, TenantCommand, TenantId};
use tokio::sync::oneshot;

use super::check::{Survivor, Violation, Write, check};
use super::disk::{Cut, Disk};
use super::member::Life;
use super::watcher::Watcher;
use crate::node::{Event, MembersChange};
use crate::pending::Pending;
use crate::snapshot::SnapshotOffer;
use crate::transport::PeerMessage;
use crate::{ChangeError, Config, ReadError};

/// That a change of members was proposed, and what became of it.
type ChangeProposed = Result<Pending<Outcome>, ChangeError>;

const TENANT: TenantId = TenantId(1);

/// Steps of trouble in a run; then everything is healed.
const STEPS: usize = 4_000;

/// Rounds that a healed group may take to answer everybody: some elections' worth.
const ROUNDS_TO_SETTLE: usize = 3_000;

/// Messages under way; further ones push the oldest out.
const WIRE_MAX: usize = 400;

/// Members that there ever are in a run.
const MEMBERS_MAX: u64 = 8;

/// What goes wrong beside what always may: messages that are lost, late or doubled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trouble {
    Crashes,
    Partitions,
    Stalls,
    /// Of members.
    Changes,
}

const TROUBLES: [Trouble; 4] = [Trouble::Crashes, Trouble::Partitions, Trouble::Stalls, Trouble::Changes];

/// A mistake that is made on purpose, to see that it is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bug {
    None,
    /// A linearizable read asks nobody.
    StaleRead,
    /// One member applies the commands of some entries backwards.
    ApplyOutOfOrder,
    /// A command is proposed again at once, without waiting until that is known.
    RetryTooEarly,
    /// The hub does not hand some events to watchers.
    DroppedEvent,
    /// The record of a change of members reaches the disk with the next entries, so maybe after the state that contains its entry, which
    /// is not looked at again. Two seeds found it when it was not on purpose.
    LateRecord,
    /// What others may do for readers is published some turns after the messages that say more.
    LateRole,
}

/// What a run without a violation was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    /// Made from everything that happened, in order.
    pub(crate) trace: u64,
    /// Writes that clients were told of.
    pub(crate) acknowledged: usize,
}

/// A run of one seed, or what was broken.
pub(crate) fn run(seed: u64, bug: Bug, dir: &Path) -> Result<Run, Violation> {
    let mut world = World::drawn(seed, bug, dir);
    for _ in 0..STEPS {
        world.step()?;
        world.collect()?;
    }
    world.settle()?;
    world.verdict()
}

struct Writing {
    number: usize,
    answer: Pending<Outcome>,
    member: u64,
}

pub(super) struct Reading {
    answer: oneshot::Receiver<Result<u64, ReadError>>,
    member: u64,
    acknowledged_before: i64,
}

pub(super) struct World {
    rng: StdRng,
    bug: Bug,
    dir: std::path::PathBuf,
    pub(super) disks: BTreeMap<u64, Disk>,
    pub(super) lives: BTreeMap<u64, Life>,
    lives_begun: u64,
    /// Those that exist from the beginning.
    founders: Vec<u64>,
    /// Those whose removal was asked for, whether or not it came to that. They are never to come back.
    removed: BTreeSet<u64>,
    /// Those of them that are down for good.
    gone: BTreeSet<u64>,
    /// A leader that is to be removed, and hands over first.
    leaving: Option<u64>,
    /// Who waits for changes of members.
    changes: Vec<oneshot::Receiver<ChangeProposed>>,
    wire: VecDeque<PeerMessage>,
    fetches: BTreeMap<u64, SnapshotOffer>,
    /// Pairs whose messages are lost, and for how many steps more.
    pub(super) cut: BTreeSet<(u64, u64)>,
    cut_steps: usize,
    /// Members that do nothing for so many of their turns, as if stopped by a signal; what is sent to them waits.
    stalled: BTreeMap<u64, usize>,
    /// Members whose clocks are slow.
    slow: BTreeSet<u64>,
    writes: Vec<Write>,
    writing: Vec<Writing>,
    pub(super) reading: Vec<Reading>,
    unheard: Vec<Pending<Outcome>>,
    watchers: Vec<Watcher>,
    /// Whether members and messages are quick beside the clocks in this run: then what takes many messages fits between two ticks, as a
    /// write that the one side of a partition acknowledges while the other still believes that it leads. Else the steps of one member
    /// fall between those of another.
    quick: bool,
    /// The kinds of trouble of this run: one kind alone lasts long enough to show what all kinds together would cut short.
    troubles: Vec<Trouble>,
    /// Whether clients compact in this run: then what came before cannot be looked up in the end.
    compacts: bool,
    /// The newest revision that some client was told of.
    pub(super) acknowledged: i64,
    trace: std::collections::hash_map::DefaultHasher,
}

impl World {
    fn drawn(seed: u64, bug: Bug, dir: &Path) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let quick = rng.random_bool(0.5);
        let all = rng.random_bool(0.25);
        let troubles = TROUBLES.into_iter().filter(|_| all || rng.random_bool(0.5)).collect();
        let founders = [1, 3, 5][rng.random_range(0..3)];
        World { quick, troubles, compacts: seed % 2 == 1, ..World::new(rng, founders, bug, dir) }
    }

    /// A group of so many members, without trouble.
    pub(super) fn new(rng: StdRng, founders: u64, bug: Bug, dir: &Path) -> Self {
        let mut world = World {
            rng,
            bug,
            dir: dir.to_path_buf(),
            disks: BTreeMap::new(),
            lives: BTreeMap::new(),
            lives_begun: 0,
            founders: (1..=founders).collect(),
            removed: BTreeSet::new(),
            gone: BTreeSet::new(),
            leaving: None,
            changes: Vec::new(),
            wire: VecDeque::new(),
            fetches: BTreeMap::new(),
            cut: BTreeSet::new(),
            cut_steps: 0,
            stalled: BTreeMap::new(),
            slow: BTreeSet::new(),
            writes: Vec::new(),
            writing: Vec::new(),
            reading: Vec::new(),
            unheard: Vec::new(),
            watchers: (0..2).map(|_| Watcher::new()).collect(),
            quick: false,
            troubles: Vec::new(),
            compacts: false,
            acknowledged: 1,
            trace: std::collections::hash_map::DefaultHasher::new(),
        };
        for id in world.founders.clone() {
            world.make(id);
        }
        world
    }

    /// A member with an empty disk.
    fn make(&mut self, id: u64) {
        self.disks.insert(id, Disk::new(&self.dir, id, self.bug));
        self.begin(id);
    }

    fn begin(&mut self, id: u64) {
        self.lives_begun += 1;
        // The others join.
        let initial_voters = if self.founders.contains(&id) { self.founders.clone() } else { Vec::new() };
        // Fixed for a life, drawn anew for the next: raft's own draws would not come from the seed. Never that of another member:
        // two that always stand for election at the same time could keep everybody from winning for ever.
        let own = usize::try_from(id).expect("a small id");
        let election_timeout_ticks = 8 + own + self.rng.random_range(0..2) * 6;
        self.stalled.remove(&id);
        if self.rng.random_ratio(1, 4) {
            self.slow.insert(id);
        } else {
            self.slow.remove(&id);
        }
        let config = Config {
            initial_voters,
            election_timeout_ticks,
            election_jitter_ticks: 1,
            read_timeout_ticks: 40,
            life: self.lives_begun,
            log_bytes_flush: 64 << 10,
            log_catchup_entries: 3,
            flush_entries: 8,
            batch_commands_max: self.rng.random_range(1..8),
            batch_bytes_max: 1 << 10,
            event_queue_max: 1 << 16,
            ..Config::new(id, "unused")
        };
        self.lives.insert(id, Life::begin(&self.disks[&id], config, TENANT, self.bug));
    }

    fn note(&mut self, what: impl Hash) {
        what.hash(&mut self.trace);
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> Option<T> {
        (!from.is_empty()).then(|| from[self.rng.random_range(0..from.len())])
    }

    fn has(&self, trouble: Trouble) -> bool {
        self.troubles.contains(&trouble)
    }

    fn alive(&self) -> Vec<u64> {
        self.lives.keys().copied().collect()
    }

    /// One thing that could happen.
    fn step(&mut self) -> Result<(), Violation> {
        let alive = self.alive();
        let Some(id) = self.pick(&alive) else {
            self.restart_one();
            return Ok(());
        };
        if self.stalled.get(&id).is_some_and(|turns| *turns > 0) {
            self.stalled.entry(id).and_modify(|turns| *turns -= 1);
            self.deliver();
            return Ok(());
        }
        match self.rng.random_range(0..1000) {
            0..170 if self.quick => self.tick(id),
            0..470 => self.work(id),
            470..730 => {
                for _ in 0..if self.quick { 4 } else { 1 } {
                    self.deliver();
                }
            }
            730..820 => self.tick(id),
            820..870 => self.write(id),
            870..885 => self.ask_for_leases(id),
            885..890 => self.compact(id),
            890..910 => self.watch(id)?,
            910..940 => self.read(id),
            940..960 => self.fetch(),
            960..965 => {
                self.note(("flush", id));
                self.disks[&id].flush_state();
            }
            965..969 if self.has(Trouble::Crashes) => self.crash(id),
            969..979 => self.restart_one(),
            979..982 if self.has(Trouble::Partitions) => self.partition(),
            982..990 if self.has(Trouble::Changes) => self.change_members(),
            990..992 if self.has(Trouble::Stalls) => self.stall(id),
            _ => self.read(id),
        }
        self.cut_steps = self.cut_steps.saturating_sub(1);
        if self.cut_steps == 0 {
            self.cut.clear();
        }
        self.take_sent();
        Ok(())
    }

    fn life(&mut self, id: u64) -> &mut Life {
        self.lives.get_mut(&id).expect("it is alive")
    }

    /// These and the others do not hear each other any more.
    pub(super) fn cut_off(&mut self, one_side: &BTreeSet<u64>) {
        let pairs = self.disks.keys().flat_map(|from| self.disks.keys().map(|to| (*from, *to)));
        self.cut = pairs.filter(|(from, to)| one_side.contains(from) != one_side.contains(to)).collect();
    }

    fn tick(&mut self, id: u64) {
        if self.slow.contains(&id) && self.rng.random_ratio(3, 4) {
            return;
        }
        self.note(("tick", id));
        let ticked = self.life(id).tick();
        self.unless_lost(id, ticked);
    }

    fn stall(&mut self, id: u64) {
        let turns = self.rng.random_range(1..400);
        self.note(("stall", id, turns));
        self.stalled.insert(id, turns);
    }

    /// A turn of one of the member's threads.
    fn work(&mut self, id: u64) {
        let kind = self.rng.random_range(0..3);
        let (events, at_once) = (self.rng.random_range(1..5), self.rng.random_bool(0.5));
        self.note(("work", id, kind));
        let quick = self.quick;
        let life = self.life(id);
        let worked = match kind {
            _ if quick => life.work_off(),
            0 if at_once => life.turn(events),
            // The end of it is in a later step.
            0 => life.half_turn(events),
            1 if life.is_writing() => life.finish_write(),
            1 => {
                life.begin_write();
                if at_once { life.finish_write() } else { Ok(()) }
            }
            _ => life.apply(),
        };
        self.unless_lost(id, worked);
    }

    /// A fault is the loss of power, or a panic.
    fn unless_lost(&mut self, id: u64, done: Result<(), Fault>) {
        if let Err(fault) = done {
            assert!(self.disks[&id].log.is_cut(), "memory has no faults: {fault}");
            self.lose(id);
        }
    }

    fn take_sent(&mut self) {
        for (id, life) in &self.lives {
            let sent = life.take_sent();
            self.wire.extend(sent.messages);
            if let Some(offer) = sent.offer {
                self.fetches.insert(*id, offer);
            }
        }
        while self.wire.len() > WIRE_MAX {
            self.wire.pop_front();
        }
    }

    fn is_cut(&self, from: u64, to: u64) -> bool {
        self.cut.contains(&(from, to))
    }

    /// A message arrives: mostly the oldest, sometimes another; some are lost, some arrive twice.
    fn deliver(&mut self) {
        if self.wire.is_empty() {
            return;
        }
        let place = if self.rng.random_ratio(4, 5) { 0 } else { self.rng.random_range(0..self.wire.len()) };
        let Some(message) = self.wire.remove(place) else { return };
        let fate = self.rng.random_range(0..100);
        let (from, to) = (message.from(), message.to());
        self.note(("deliver", from, to, fate));
        if fate < 4 || self.is_cut(from, to) {
            return;
        }
        if fate > 95 {
            self.wire.push_back(message.clone());
        }
        if let Some(life) = self.lives.get(&to) {
            life.handle().deliver(message);
        }
    }

    fn fetch(&mut self) {
        let waiting: Vec<u64> = self.fetches.keys().copied().collect();
        let Some(id) = self.pick(&waiting) else { return };
        let Some(offer) = self.fetches.remove(&id) else { return };
        let source = self.lives.get(&offer.from).and_then(|life| life.handle().outgoing_snapshot(offer.at));
        let complete =
            source.is_some_and(|source| copy(&source.path, &offer.path).is_ok()) && !self.is_cut(offer.from, id);
        self.note(("fetch", id, offer.at.index, complete));
        if let Some(life) = self.lives.get(&id) {
            life.handle().snapshot_fetched(offer, complete);
        }
    }

    pub(super) fn write(&mut self, id: u64) {
        let number = self.writes.len();
        let value = format!("<value {number}>");
        let put = PutRequest {
            key: Bytes::from(format!("k{}", number % 5)),
            value: Bytes::from(value.clone()),
            // Refused if there is no such lease.
            lease: if number.is_multiple_of(4) { self.some_lease() } else { LeaseId::NONE },
            prev_kv: false,
            ignore_value: false,
            ignore_lease: false,
        };
        let command = Envelope { tenant: TENANT, member_id: id, command: Command::Put(put) }.encode();
        self.note(("write", id, number));
        if self.acknowledged == 1 {
            // Until the tenant is there; nobody looks at the answer, but what nobody waits for is not proposed.
            let create = Command::Tenant(TenantCommand::create("t"));
            let create = Envelope { tenant: TenantId(0), member_id: id, command: create }.encode();
            self.unheard.extend(self.lives[&id].handle().enqueue(TENANT.0, create, None));
        }
        if number % 64 == 32 {
            // Somewhere in the history; further ones change nothing.
            let raise = Command::RaiseRules { number: Rules::NEWEST.number(), members: Vec::new() };
            let raise = Envelope { tenant: TenantId(0), member_id: id, command: raise }.encode();
            self.unheard.extend(self.lives[&id].handle().enqueue(TENANT.0, raise, None));
        }
        if let Ok(answer) = self.lives[&id].handle().enqueue(TENANT.0, command.clone(), None) {
            self.writes.push(Write { value, acknowledged_before: self.acknowledged, revision: None });
            self.writing.push(Writing { number, answer, member: id });
            if self.bug == Bug::RetryTooEarly && number.is_multiple_of(50) {
                self.unheard.extend(self.lives[&id].handle().enqueue(TENANT.0, command, None));
            }
        }
    }

    fn some_lease(&mut self) -> LeaseId {
        LeaseId(self.rng.random_range(1..4))
    }

    /// A client's command whose answer nobody needs.
    fn ask(&mut self, id: u64, command: Command) {
        self.note(("ask", id, format!("{command:?}")));
        let command = Envelope { tenant: TENANT, member_id: id, command }.encode();
        self.unheard.extend(self.lives[&id].handle().enqueue(TENANT.0, command, None));
    }

    fn ask_for_leases(&mut self, member: u64) {
        let id = self.some_lease();
        let grant = self.rng.random_bool(0.7);
        self.ask(member, if grant { Command::LeaseGrant { id, ttl_seconds: 60 } } else { Command::LeaseRevoke { id } });
    }

    /// Compacts what is not new, or gives back a part of what was compacted.
    fn compact(&mut self, id: u64) {
        if self.compacts {
            let revision = self.acknowledged - self.rng.random_range(0..20);
            let reclaim = self.rng.random_bool(0.5);
            self.ask(id, if reclaim { Command::Reclaim { rows_max: 5 } } else { Command::Compact { revision } });
        }
    }

    /// A watcher takes what it was sent, or goes to another member.
    fn watch(&mut self, id: u64) -> Result<(), Violation> {
        let at = self.rng.random_range(0..self.watchers.len());
        let (leave, messages) = (self.rng.random_ratio(1, 8), self.rng.random_range(1..6));
        self.note(("watch", at, id, leave));
        let (watcher, store) = (&mut self.watchers[at], &self.lives[&id].store);
        if leave {
            watcher.leave();
        }
        if watcher.member().is_none() {
            watcher.connect(id, store, TENANT);
        }
        watcher.listen(messages)
    }

    pub(super) fn read(&mut self, id: u64) {
        self.note(("read", id));
        let (sender, answer) = oneshot::channel();
        let handle = self.lives[&id].handle();
        if let Some(applied) = handle.read_point_now() {
            let _ = sender.send(Ok(applied));
        } else if self.bug == Bug::StaleRead {
            let _ = sender.send(Ok(handle.status().applied_index));
        } else if handle.shared().join_readers(sender).is_err() {
            return;
        }
        self.reading.push(Reading { answer, member: id, acknowledged_before: self.acknowledged });
    }

    /// Looks at the answers that clients got.
    fn collect(&mut self) -> Result<(), Violation> {
        let mut still = Vec::new();
        let mut writing = std::mem::take(&mut self.writing);
        // Reads first: one that is answered in this step must not be held against a write of the same.
        for mut reading in std::mem::take(&mut self.reading) {
            match reading.answer.try_recv() {
                Err(oneshot::error::TryRecvError::Empty) => still.push(reading),
                Err(oneshot::error::TryRecvError::Closed) | Ok(Err(_)) => {}
                Ok(Ok(applied)) => {
                    self.note(("read at", reading.member, applied));
                    let Some(life) = self.lives.get(&reading.member) else { continue };
                    // Not what it has by now: more may have been applied in the same step.
                    let revision = life.revision_at(applied);
                    if revision < reading.acknowledged_before {
                        let acknowledged_before = reading.acknowledged_before;
                        return Err(Violation::StaleRead { revision, acknowledged_before });
                    }
                }
            }
        }
        self.reading = still;
        writing.retain_mut(|Writing { number, answer, .. }| match answer.try_recv() {
            Err(oneshot::error::TryRecvError::Empty) => true,
            Ok(Ok(Outcome { revision, result: Ok(_) })) => {
                ("written", *number, revision).hash(&mut self.trace);
                self.writes[*number].revision = Some(revision);
                self.acknowledged = self.acknowledged.max(revision);
                false
            }
            Ok(Ok(Outcome { result: Err(_), .. })) | Ok(Err(_)) | Err(oneshot::error::TryRecvError::Closed) => false,
        });
        self.writing = writing;
        Ok(())
    }

    /// The member crashes now, or in the middle of what it does next.
    fn crash(&mut self, id: u64) {
        let later = self.rng.random_ratio(2, 3);
        let cut = Cut { batches: self.rng.random_range(0..3), last_is_whole: self.rng.random_bool(0.5) };
        self.note(("crash", id, later, cut));
        if later {
            self.disks[&id].log.cut_power(cut);
        } else {
            self.lose(id);
        }
    }

    /// The member is gone.
    fn lose(&mut self, id: u64) {
        self.note(("lost", id));
        self.watchers.iter_mut().filter(|watcher| watcher.member() == Some(id)).for_each(Watcher::leave);
        // What it sent before is under way.
        self.take_sent();
        self.lives.remove(&id);
        self.fetches.remove(&id);
        self.disks[&id].recover();
    }

    fn restart_one(&mut self) {
        let is_down = |id: &u64| !self.lives.contains_key(id) && !self.gone.contains(id);
        let down: Vec<u64> = self.disks.keys().copied().filter(is_down).collect();
        if let Some(id) = self.pick(&down) {
            self.note(("restart", id));
            self.begin(id);
        }
    }

    /// Cuts one direction between two members, one member off, or the group in two, for a moment or for some elections' time: long enough
    /// for one side to elect another leader, and for the other's to find out later.
    fn partition(&mut self) {
        let ids: Vec<u64> = self.disks.keys().copied().collect();
        let (Some(one), Some(other)) = (self.pick(&ids), self.pick(&ids)) else { return };
        if !self.cut.is_empty() || one == other {
            return;
        }
        let leads = |id: &u64| self.lives.get(id).is_some_and(|life| life.handle().status().is_leader);
        let leader = ids.iter().copied().find(leads);
        let one_side = match self.rng.random_range(0..4) {
            0 => BTreeSet::new(),
            1 => BTreeSet::from([one]),
            2 => ids.iter().copied().filter(|_| self.rng.random_bool(0.5)).collect(),
            // A leader that somebody still follows, but too few.
            _ => BTreeSet::from([leader.unwrap_or(one), other]),
        };
        self.cut_steps =
            if self.rng.random_bool(0.5) { self.rng.random_range(1..200) } else { self.rng.random_range(200..2_000) };
        self.note(("partition", one, other, one_side.len(), self.cut_steps));
        self.cut_off(&one_side);
        if one_side.is_empty() {
            self.cut.insert((one, other));
        }
    }

    /// The leader adds, promotes or removes somebody, or hands over.
    fn change_members(&mut self) {
        let leaders: Vec<u64> =
            self.lives.iter().filter(|(_, life)| life.handle().status().is_leader).map(|(id, _)| *id).collect();
        let Some(leader) = self.pick(&leaders) else { return };
        let conf = self.lives[&leader].conf().state.clone();
        let others: Vec<u64> = self.disks.keys().copied().filter(|id| !conf.voters.contains(id)).collect();
        let joining = others.into_iter().find(|id| !self.removed.contains(id));
        let change = match (self.rng.random_range(0..4), joining) {
            // One whose joining was refused before, or a new one.
            (0, Some(id)) => MembersChange::AddLearner(id),
            (0, None) => match self.disks.keys().next_back().map_or(1, |id| id + 1) {
                id if id <= MEMBERS_MAX => MembersChange::AddLearner(id),
                _ => return,
            },
            (1, Some(id)) => MembersChange::AddVoter(id),
            (2, _) => match self.pick_to_remove(leader, &conf) {
                Some(id) if id == leader => {
                    self.leaving = Some(id);
                    return self.hand_over(leader, 0);
                }
                Some(id) => MembersChange::Remove(id),
                None => return,
            },
            (3, _) => {
                let to = self.pick(&conf.voters).unwrap_or(0);
                return self.hand_over(leader, if to == leader { 0 } else { to });
            }
            _ => return,
        };
        self.propose_change(leader, change);
    }

    pub(super) fn propose_change(&mut self, leader: u64, change: MembersChange) {
        self.note(("change", leader, format!("{change:?}")));
        // Somebody waits for the outcome: what nobody waits for is not proposed again.
        let (reply, outcome) = oneshot::channel();
        self.changes.push(outcome);
        let command =
            Envelope { tenant: TenantId(0), member_id: leader, command: Command::Configure { quota_bytes: -1 } };
        let seen = self.lives[&leader].handle().conf_index();
        let event = Event::Change { change, seen, command: command.encode(), reply };
        if self.lives[&leader].handle().shared().events.try_send(event).is_err() {
            return;
        }
        match change {
            MembersChange::AddLearner(id) if !self.disks.contains_key(&id) => self.make(id),
            MembersChange::Remove(id) => self.remove(id),
            MembersChange::AddLearner(_) | MembersChange::AddVoter(_) => {}
        }
    }

    /// A voter or a learner, the leader too; not the last voter.
    fn pick_to_remove(&mut self, leader: u64, conf: &ConfState) -> Option<u64> {
        let leaving = self.leaving.take_if(|id| *id != leader).filter(|id| conf.voters.contains(id));
        let (voters, learners) = (&conf.voters[..], &conf.learners[..]);
        let candidates = if voters.len() > 1 { [voters, learners].concat() } else { learners.to_vec() };
        let picked = self.pick(&candidates);
        leaving.filter(|_| voters.len() > 1).or(picked)
    }

    fn hand_over(&mut self, leader: u64, to: u64) {
        self.note(("hand over", leader, to));
        self.lives[&leader].handle().transfer_leadership(to);
    }

    /// Asked to go. Mostly it lingers, knowing of it or not; sometimes it was down for good anyway.
    fn remove(&mut self, id: u64) {
        self.removed.insert(id);
        if self.rng.random_ratio(1, 4) {
            self.gone.insert(id);
            if self.lives.contains_key(&id) {
                self.lose(id);
            }
        }
    }

    /// No more trouble: everybody is there and everything arrives. Ends when nobody waits.
    fn settle(&mut self) -> Result<(), Violation> {
        self.cut.clear();
        for id in self.alive() {
            if self.disks[&id].log.is_cut() {
                self.lose(id);
            }
        }
        // Those whose removal did not come to pass are needed; the others do no harm.
        let down: Vec<u64> = self.disks.keys().copied().filter(|id| !self.lives.contains_key(id)).collect();
        for id in down {
            self.begin(id);
        }
        for _ in 0..ROUNDS_TO_SETTLE {
            self.round(&self.alive())?;
            if let Some(members) = self.agreeing() {
                // Who is no member waits for a leader for ever, as it is told to.
                let is_member = |id: &u64| members.iter().any(|member| member.id == *id);
                let waits = self.writing.iter().map(|of| of.member).chain(self.reading.iter().map(|of| of.member));
                if !waits.into_iter().any(|id| is_member(&id)) {
                    return Ok(());
                }
            }
        }
        let members = self.lives.values().map(Life::describe);
        Err(Violation::Stuck { waiting: self.writing.len() + self.reading.len(), members: members.collect() })
    }

    /// The clocks of these tick once, everybody does what there is to do, and what was sent arrives, unless it is cut.
    pub(super) fn round(&mut self, ticking: &[u64]) -> Result<(), Violation> {
        for id in self.alive() {
            let life = self.life(id);
            let ticked = if ticking.contains(&id) { life.tick() } else { Ok(()) };
            ticked.and_then(|()| life.work_off()).expect("memory has no faults");
        }
        self.arrive()
    }

    /// All that was sent arrives.
    pub(super) fn arrive(&mut self) -> Result<(), Violation> {
        self.take_sent();
        for message in std::mem::take(&mut self.wire) {
            if let Some(life) = self.lives.get(&message.to()).filter(|_| !self.is_cut(message.from(), message.to())) {
                life.handle().deliver(message);
            }
        }
        while !self.fetches.is_empty() {
            self.fetch();
        }
        self.collect()
    }

    /// The members of the leader's group, learners too, if they have all applied all that the leader's log holds.
    fn agreeing(&self) -> Option<Vec<Survivor>> {
        let leaders = self.lives.values().filter(|life| life.handle().status().is_leader);
        // One of an earlier term has not heard yet that it was removed.
        let leader = leaders.max_by_key(|life| life.handle().status().term)?;
        let conf = &leader.conf().state;
        let applied = leader.handle().status().applied_index;
        if applied < leader.handle().status().last_index || !conf.voters_outgoing.is_empty() {
            return None;
        }
        let members = conf.voters.iter().chain(&conf.learners).map(|id| {
            let life = &self.lives[id];
            let agrees = life.handle().status().applied_index == applied;
            agrees.then(|| Survivor { id: *id, store: life.store.clone(), conf: life.conf().clone() })
        });
        members.collect()
    }

    fn verdict(mut self) -> Result<Run, Violation> {
        let members = self.agreeing().expect("it has settled");
        check(TENANT, &self.writes, &mut self.watchers, &members)?;
        let acknowledged = self.writes.iter().filter(|write| write.revision.is_some()).count();
        self.note((self.writes.len(), acknowledged));
        Ok(Run { trace: self.trace.finish(), acknowledged })
    }
}

fn copy(from: &Path, to: &Path) -> std::io::Result<()> {
    std::fs::create_dir_all(to)?;
    for file in std::fs::read_dir(from)? {
        let file = file?;
        std::fs::copy(file.path(), to.join(file.file_name()))?;
    }
    Ok(())
}
