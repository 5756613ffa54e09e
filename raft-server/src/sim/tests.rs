//! Runs of the simulation: many seeds, the ones that found something, and mistakes made on purpose.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};

use rand::SeedableRng;
use rand::rngs::StdRng;

use super::{Bug, Run, Violation, World, run};

/// Seeds of `make test`; `TENURE_SIM_SEEDS` says otherwise, 0 for no end.
const SEEDS: u64 = 1_000;

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
    (0..100).find_map(|seed| run_in_scratch(seed, bug).err())
}

#[test]
fn mistakes_made_on_purpose_are_found() {
    let stale = found(Bug::StaleRead);
    assert!(matches!(stale, Some(Violation::StaleRead { .. })), "{stale:?}");
    let twice = found(Bug::RetryTooEarly);
    assert!(matches!(twice, Some(Violation::Twice { .. })), "{twice:?}");
    let order = found(Bug::ApplyOutOfOrder);
    assert!(matches!(order, Some(Violation::Differ { .. } | Violation::Lost { .. })), "{order:?}");
    let dropped = found(Bug::DroppedEvent);
    assert!(matches!(dropped, Some(Violation::WatchDiffers { .. })), "{dropped:?}");
    let late = found(Bug::LateRecord);
    assert!(matches!(late, Some(Violation::DifferInMembers { .. } | Violation::Panicked(_))), "{late:?}");
}

/// A leader answers at once who asks it for a read if the two are a quorum (see the essay of `read_index`). Here they are not: two of five, whose
/// clocks stand still, so that they do not find out that the others have elected another leader.
#[test]
fn a_leader_and_a_reader_that_are_too_few_confirm_nothing() {
    let dir = tempfile::tempdir().expect("a directory for snapshots");
    let mut world = World::new(StdRng::seed_from_u64(0), 5, Bug::None, dir.path());
    let everybody = [1, 2, 3, 4, 5];
    let leads = |world: &World, id: u64| world.lives[&id].handle().status().is_leader;
    let rounds = |world: &mut World, ticking: &[u64], until: &dyn Fn(&World) -> bool| {
        for _ in 0..500 {
            if until(world) {
                return;
            }
            world.round(ticking).expect("no promise is broken");
        }
        panic!("it does not come to that");
    };
    rounds(&mut world, &everybody, &|world| everybody.iter().any(|id| leads(world, *id)));
    let old = everybody.into_iter().find(|id| leads(&world, *id)).expect("one leads");
    let mut others = everybody.into_iter().filter(|id| *id != old);
    let reader = others.next().expect("there are five");
    let others: Vec<u64> = others.collect();
    world.write(old);
    world.write(old);
    rounds(&mut world, &everybody, &|world| world.acknowledged > 1);

    world.cut_off(&BTreeSet::from([old, reader]));
    rounds(&mut world, &others, &|world| others.iter().any(|id| leads(world, *id)));
    let before = world.acknowledged;
    world.write(others[0]);
    rounds(&mut world, &others, &|world| world.acknowledged > before);
    world.read(reader);
    for _ in 0..20 {
        world.round(&others).expect("no promise is broken");
    }
    assert!(leads(&world, old), "nobody told it");
    assert_eq!(world.reading.len(), 1, "nobody may answer");
    world.cut.clear();
    rounds(&mut world, &everybody, &|world| world.reading.is_empty());
}

/// Of three members the leader and who asks are a quorum: the read needs nobody's answer but the leader's.
#[test]
fn a_leader_and_a_reader_that_are_a_quorum_ask_nobody_else() {
    let dir = tempfile::tempdir().expect("a directory for snapshots");
    let mut world = World::new(StdRng::seed_from_u64(0), 3, Bug::None, dir.path());
    while !world.lives.values().any(|life| life.handle().status().is_leader) {
        world.round(&[1, 2, 3]).expect("no promise is broken");
    }
    let status = |id| world.lives[&id].handle().status();
    let reader = (1..=3).find(|id| !status(*id).is_leader).expect("there are three");
    for _ in 0..3 {
        world.round(&[]).expect("no promise is broken");
    }
    world.read(reader);
    // The request, and the answer.
    for _ in 0..3 {
        world.round(&[]).expect("no promise is broken");
    }
    assert!(world.reading.is_empty());
}
