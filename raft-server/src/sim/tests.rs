//! Runs of the simulation: many seeds, the ones that found something, and mistakes made on purpose.

use std::sync::atomic::{AtomicU64, Ordering};

use super::{Bug, Run, Violation, run};

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
