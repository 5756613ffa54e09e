//! Runs of the simulation: many seeds, the ones that found something, and mistakes made on purpose.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use rand::SeedableRng;
use rand::rngs::StdRng;

use super::{Bug, Run, Violation, World, run};
use crate::node::MembersChange;

/// Seeds of `make test`; `TENURE_SIM_SEEDS` says otherwise, 0 for no end.
const SEEDS: u64 = 2_000;

/// Seeds of no other test that broke something, each with what. A seed is a run only for as long as the scheduler draws as it does now: whoever
/// changes that takes the entries away, and keeps what they found as a test of its own or a [`Bug`], as [`Bug::LateRecord`] is.
const FOUND_BEFORE: [(u64, &str); 0] = [];

/// A panic of a member is a violation too: its assertions are checks.
fn run_in_scratch(seed: u64, bug: Bug) -> Result<Run, Violation> {
    let dir = tempfile::tempdir().expect("a directory for snapshots");
    let ran = std::panic::catch_unwind(|| run(seed, bug, dir.path()));
    ran.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string));
        Err(Violation::Panicked(text.unwrap_or_default()))
    })
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok()?.parse().ok()
}

#[test]
fn no_seed_breaks_a_promise() {
    let first = number("TENURE_SIM_FIRST").unwrap_or(0);
    let last = match number("TENURE_SIM_SEEDS").unwrap_or(SEEDS) {
        0 => u64::MAX,
        seeds => first + seeds,
    };
    for (seed, what) in FOUND_BEFORE {
        assert_eq!(run_in_scratch(seed, Bug::None).err(), None, "seed {seed}: {what}");
    }
    let (next, acknowledged) = (AtomicU64::new(first), AtomicU64::new(0));
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= last {
                        return;
                    }
                    match run_in_scratch(seed, Bug::None) {
                        Ok(run) => acknowledged.fetch_add(run.acknowledged as u64, Ordering::Relaxed),
                        Err(violation) => panic!("{violation:?}: make sim FIRST={seed} SEEDS=1"),
                    };
                }
            });
        }
    });
    let acknowledged = acknowledged.into_inner();
    assert!(acknowledged > 20 * (last - first), "runs in which nothing happens show nothing: {acknowledged}");
}

#[test]
fn the_same_seed_is_the_same_run() {
    for seed in 0..20 {
        assert_eq!(run_in_scratch(seed, Bug::None), run_in_scratch(seed, Bug::None), "seed {seed}");
    }
    assert_ne!(run_in_scratch(1, Bug::None), run_in_scratch(2, Bug::None));
}

/// The first violation within some seeds.
fn found(bug: Bug) -> Option<Violation> {
    (0..1_000).find_map(|seed| run_in_scratch(seed, bug).err())
}

#[test]
fn mistakes_made_on_purpose_are_found() {
    let stale = found(Bug::StaleRead);
    assert!(matches!(stale, Some(Violation::StaleRead { .. })), "{stale:?}");
    let twice = found(Bug::RetryTooEarly);
    assert!(matches!(twice, Some(Violation::Twice { .. })), "{twice:?}");
    let order = found(Bug::ApplyOutOfOrder);
    let seen =
        matches!(&order, Some(Violation::Differ { .. } | Violation::Lost { .. } | Violation::WatchDiffers { .. }));
    assert!(seen, "{order:?}");
    let dropped = found(Bug::DroppedEvent);
    assert!(matches!(dropped, Some(Violation::WatchDiffers { .. })), "{dropped:?}");
    let late_role = found(Bug::LateRole);
    assert!(matches!(late_role, Some(Violation::StaleRead { .. })), "{late_role:?}");
    let late = found(Bug::LateRecord);
    // A voter that does not know that it is one gives no vote.
    let seen =
        matches!(late, Some(Violation::DifferInMembers { .. } | Violation::Panicked(_) | Violation::Stuck { .. }));
    assert!(seen, "{late:?}");
}

/// A group without trouble, and the one that leads it.
fn led(founders: u64, dir: &Path) -> (World, u64) {
    let mut world = World::new(StdRng::seed_from_u64(0), founders, Bug::None, dir);
    let everybody: Vec<u64> = (1..=founders).collect();
    rounds(&mut world, &everybody, &|world| leader(world, &everybody).is_some());
    let leader = leader(&world, &everybody).expect("one leads");
    // The first one makes the tenant.
    write(&mut world, leader, &everybody);
    (world, leader)
}

fn leader(world: &World, among: &[u64]) -> Option<u64> {
    among.iter().copied().find(|id| world.lives[id].handle().status().is_leader)
}

/// Rounds in which the clocks of these tick, until it has come to that.
fn rounds(world: &mut World, ticking: &[u64], until: &dyn Fn(&World) -> bool) {
    for _ in 0..500 {
        if until(world) {
            return;
        }
        world.round(ticking).expect("no promise is broken");
    }
    panic!("it does not come to that");
}

/// One of two writes has no lease that might not be there.
fn write(world: &mut World, member: u64, ticking: &[u64]) {
    let before = world.acknowledged;
    world.write(member);
    world.write(member);
    rounds(world, ticking, &|world| world.acknowledged > before);
}

/// A leader answers at once who asks it for a read if the two are a quorum (see the essay of `read_index`). Here they are not: two of five, whose
/// clocks stand still, so that they do not find out that the others have elected another leader.
#[test]
fn a_leader_and_a_reader_that_are_too_few_confirm_nothing() {
    let dir = tempfile::tempdir().expect("a directory for snapshots");
    let (mut world, old) = led(5, dir.path());
    let mut others = (1..=5).filter(|id| *id != old);
    let reader = others.next().expect("there are five");
    let others: Vec<u64> = others.collect();
    world.cut_off(&BTreeSet::from([old, reader]));
    rounds(&mut world, &others, &|world| leader(world, &others).is_some());
    write(&mut world, others[0], &others);
    world.read(reader);
    world.read(old);
    for _ in 0..20 {
        world.round(&others).expect("no promise is broken");
    }
    assert_eq!(leader(&world, &[old]), Some(old), "nobody told it");
    assert_eq!(world.reading.len(), 2, "nobody may answer");
    world.cut.clear();
    rounds(&mut world, &[1, 2, 3, 4, 5], &|world| world.reading.is_empty());
}

/// A leader whose disk does not come back: the others follow it, for it goes on saying that it leads, and commit what it sends; but it applies
/// nothing, so that who asks it for a write, a read or a lease waits for ever.
#[test]
fn a_leader_whose_disk_hangs_hands_over() {
    let dir = tempfile::tempdir().expect("a directory for snapshots");
    let (mut world, old) = led(3, dir.path());
    let everybody = [1, 2, 3];
    let others: Vec<u64> = everybody.into_iter().filter(|id| *id != old).collect();
    world.lives.get_mut(&old).expect("it lives").disk_hangs = true;
    world.write(old);
    rounds(&mut world, &everybody, &|world| leader(world, &others).is_some());
    write(&mut world, others[0], &everybody);
    world.lives.get_mut(&old).expect("it lives").disk_hangs = false;
    write(&mut world, old, &everybody);
}

/// Of three members the leader and who asks are a quorum: the read needs nobody's answer but the leader's.
#[test]
fn a_leader_and_a_reader_that_are_a_quorum_ask_nobody_else() {
    let dir = tempfile::tempdir().expect("a directory for snapshots");
    let (mut world, leader) = led(3, dir.path());
    let reader = (1..=3).find(|id| *id != leader).expect("there are three");
    for _ in 0..3 {
        world.round(&[]).expect("no promise is broken");
    }
    world.read(reader);
    // The request, and the answer.
    for _ in 0..3 {
        world.round(&[]).expect("no promise is broken");
    }
    assert!(world.reading.is_empty());
    // The other way round it asks one of them. Nobody's clock ticks, so that raft asks nobody.
    world.read(leader);
    for _ in 0..3 {
        world.round(&[]).expect("no promise is broken");
    }
    assert!(world.reading.is_empty());
}

/// A leader that nobody has told that it is replaced asks a follower for its readers: one that follows another one by now, or has only promised to, does
/// not answer.
#[test]
fn a_leader_that_was_replaced_reads_nothing() {
    let dir = tempfile::tempdir().expect("a directory for snapshots");
    let (mut world, old) = led(3, dir.path());
    let others: Vec<u64> = (1..=3).filter(|id| *id != old).collect();
    world.cut_off(&BTreeSet::from([old]));
    rounds(&mut world, &others, &|world| leader(world, &others).is_some());
    write(&mut world, others[0], &others);
    world.cut.clear();
    world.read(old);
    world.arrive().expect("no promise is broken");
    rounds(&mut world, &[1, 2, 3], &|world| world.reading.is_empty());
    assert_eq!(leader(&world, &[old]), None, "it heard of it with the answer");
}

/// A snapshot takes longer to install than an election is away, and the leader is gone: raft panicked when the member stood for election then.
/// A seed in six thousand found it.
#[test]
fn a_member_that_installs_a_snapshot_does_not_stand_for_election() {
    let dir = tempfile::tempdir().expect("a directory for snapshots");
    let (mut world, leader) = led(3, dir.path());
    let mut others: Vec<u64> = (1..=3).collect();
    let late = others.remove(if leader == 3 { 0 } else { 2 });
    world.cut_off(&BTreeSet::from([late]));
    for _ in 0..20 {
        write(&mut world, leader, &others);
    }
    world.disks[&leader].flush_state();
    write(&mut world, leader, &others);
    world.cut.clear();
    for _ in 0..500 {
        for id in &others {
            let life = world.lives.get_mut(id).expect("it is alive");
            life.tick().and_then(|()| life.work_off()).expect("memory has no faults");
        }
        let life = world.lives.get_mut(&late).expect("it is alive");
        life.turn(usize::MAX).expect("memory has no faults");
        if life.is_installing() {
            break;
        }
        life.work_off().expect("memory has no faults");
        world.arrive().expect("no promise is broken");
    }
    let life = world.lives.get_mut(&late).expect("it is alive");
    assert!(life.is_installing(), "there was a snapshot to install");
    for _ in 0..100 {
        life.tick().expect("memory has no faults");
    }
    assert!(life.is_installing(), "its log and its state did nothing meanwhile");
    rounds(&mut world, &[1, 2, 3], &|world| !world.lives[&late].is_installing());
    write(&mut world, late, &[1, 2, 3]);
}

/// A voter that is alone reads what it has applied. A learner is told of commits too, may have applied more, and answers its own clients.
/// A seed in six thousand found it.
#[test]
fn a_sole_voter_with_a_learner_does_not_read_freely() {
    let dir = tempfile::tempdir().expect("a directory for snapshots");
    let (mut world, _) = led(1, dir.path());
    let reads_freely = |world: &World| world.lives[&1].handle().read_point_now().is_some();
    assert!(reads_freely(&world));
    world.propose_change(1, MembersChange::AddLearner(2));
    rounds(&mut world, &[1, 2], &|world| world.lives[&2].handle().status().is_learner);
    write(&mut world, 2, &[1, 2]);
    assert!(!reads_freely(&world));
    // Nor does it ask: a learner that is away would be waited for.
    world.cut_off(&BTreeSet::from([2]));
    world.read(1);
    world.round(&[]).expect("no promise is broken");
    assert!(world.reading.is_empty());
    world.cut.clear();
    world.propose_change(1, MembersChange::Remove(2));
    rounds(&mut world, &[1, 2], &reads_freely);
}
