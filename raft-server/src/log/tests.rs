//! The log on disk against its model, and against what crashes and failing disks leave.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use proptest::prelude::*;
use raft::GetEntriesContext;
use raft::Storage as _;

use super::*;

const FLUSH_BYTES: u64 = 256 << 10;

fn entry(index: u64, term: u64, bytes: usize) -> Entry {
    Entry { index, term, data: Bytes::from(vec![index as u8; bytes]), ..Entry::default() }
}

fn write_of(entries: Vec<Entry>, commit: u64) -> LogWrite {
    let term = entries.last().map_or(1, |entry| entry.term);
    let hard_state = HardState { term, commit, ..HardState::default() };
    LogWrite { entries, hard_state: Some(hard_state), conf: None }
}

fn bootstrap(log: &dyn LogStore) {
    let state = ConfState::from((vec![1, 2, 3], vec![]));
    log.bootstrap(1, Position { index: BOOTSTRAP_INDEX, term: 1 }, &Conf { index: BOOTSTRAP_INDEX, state }).unwrap();
}

fn all_entries(log: &dyn LogStore) -> Vec<Entry> {
    read_entries(log).unwrap()
}

fn read_entries(log: &dyn LogStore) -> Result<Vec<Entry>, Fault> {
    let recovered = log.recover()?;
    let (low, high) = (recovered.truncated.index + 1, recovered.last_index + 1);
    let mut entries: Vec<Entry> = Vec::new();
    while low + (entries.len() as u64) < high {
        entries.extend(log.entries(low + entries.len() as u64, high, 1000)?);
    }
    Ok(entries)
}

#[derive(Clone, Debug)]
enum Step {
    /// Entries of a new term from this many before the end, of these sizes.
    Append {
        back: u64,
        sizes: Vec<usize>,
    },
    /// Forget this share of what is there, in percent.
    Truncate(u64),
    Reopen,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0u64..4, prop::collection::vec(0usize..20_000, 1..6))
            .prop_map(|(back, sizes)| Step::Append { back, sizes }),
        2 => (0u64..=100).prop_map(Step::Truncate),
        1 => Just(Step::Reopen),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn the_engine_mirrors_the_model(steps in prop::collection::vec(step(), 1..60)) {
        let dir = tempfile::tempdir().unwrap();
        let model = MemoryLog::default();
        let mut engine = EngineLog::open(dir.path(), FLUSH_BYTES).unwrap();
        prop_assert_eq!(engine.recover().unwrap(), Recovered::default());
        bootstrap(&model);
        bootstrap(&engine);
        for (term, step) in steps.into_iter().enumerate() {
            let recovered = model.recover().unwrap();
            let (truncated, last) = (recovered.truncated.index, recovered.last_index);
            match step {
                Step::Append { back, sizes } => {
                    let first = (last + 1).saturating_sub(back).max(truncated + 1);
                    let entries = (first..).zip(sizes).map(|(index, size)| entry(index, term as u64 + 2, size));
                    let write = write_of(entries.collect(), truncated);
                    model.append(&write).unwrap();
                    engine.append(&write).unwrap();
                }
                Step::Truncate(percent) => {
                    let through = truncated + (last - truncated) * percent / 100;
                    if through > truncated {
                        let term = model.entries(through, through + 1, 1).unwrap()[0].term;
                        model.truncate(Position { index: through, term }).unwrap();
                        engine.truncate(Position { index: through, term }).unwrap();
                    }
                }
                Step::Reopen => {
                    drop(engine);
                    engine = EngineLog::open(dir.path(), FLUSH_BYTES).unwrap();
                }
            }
            prop_assert_eq!(engine.recover().unwrap(), model.recover().unwrap());
            prop_assert_eq!(all_entries(&engine), all_entries(&model));
        }
    }
}

fn newest_file(dir: &Path) -> PathBuf {
    let files = fs::read_dir(dir).unwrap().map(|file| file.unwrap().path());
    files.filter(|file| file.extension().is_some_and(|kind| kind == "raftlog")).max().unwrap()
}

// However the newest file ends, what was written before is there, whole batches only, and the log goes on from there. What was
// synced is not lost that way, so the mark is taken away each time, as if the power had failed before it got to the disk.
#[test]
fn a_torn_or_garbled_tail_loses_only_what_it_held() {
    let dir = tempfile::tempdir().unwrap();
    let log = EngineLog::open(dir.path(), FLUSH_BYTES).unwrap();
    bootstrap(&log);
    // Two entries a batch: half a batch must never be seen.
    for batch in 0..8u64 {
        let first = 2 + batch * 2;
        log.append(&write_of(vec![entry(first, 2, 40), entry(first + 1, 2, 40)], first)).unwrap();
    }
    drop(log);
    let file = newest_file(dir.path());
    let content = fs::read(&file).unwrap();
    let expected = all_entries(&EngineLog::open(dir.path(), FLUSH_BYTES).unwrap());
    assert_eq!(expected.len(), 16);

    // Every seventh byte of the last batches in turn is where the file ends, or is another one, or zeros follow from it.
    let batch_bytes = content.len() / 9;
    for at in (content.len() - 3 * batch_bytes..content.len()).rev().step_by(7) {
        for damage in ["cut", "flipped", "zeroed"] {
            let mut damaged = content.clone();
            match damage {
                "cut" => damaged.truncate(at),
                "flipped" => damaged[at] ^= 0x55,
                _ => damaged[at..].fill(0),
            }
            fs::write(&file, &damaged).unwrap();
            let _ = fs::remove_file(dir.path().join("synced"));
            let log = EngineLog::open(dir.path(), FLUSH_BYTES).unwrap();
            let recovered = log.recover().unwrap();
            let Ok(entries) = read_entries(&log) else {
                // Rot before the last batch is no torn tail: it is found when it is read, not taken for the end.
                assert!(damage == "flipped" && at < content.len() - batch_bytes, "{damage} at {at}");
                continue;
            };
            let unhurt = 16 - (content.len() - at).div_ceil(batch_bytes).max(1) * 2 - 2;
            assert!(entries.len() % 2 == 0 && entries.len() >= unhurt, "{damage} at {at}: {}", entries.len());
            assert_eq!(entries[..], expected[..entries.len()], "{damage} at {at}");
            assert!(recovered.hard_state.commit <= recovered.last_index, "{damage} at {at}");
            let next = recovered.last_index + 1;
            log.append(&write_of(vec![entry(next, 3, 10)], next)).unwrap();
            drop(log);
            let log = EngineLog::open(dir.path(), FLUSH_BYTES).unwrap();
            assert_eq!(log.recover().unwrap().last_index, next, "{damage} at {at}");
        }
    }
}

// Rot in the newest file, in a batch that was synced, takes everything behind it along: the member must not start without that.
#[test]
fn rot_is_not_taken_for_a_torn_tail() {
    let dir = tempfile::tempdir().unwrap();
    let open = || EngineLog::open(dir.path(), FLUSH_BYTES).unwrap();
    let log = open();
    bootstrap(&log);
    for index in 2..10 {
        log.append(&write_of(vec![entry(index, 2, 40)], index)).unwrap();
    }
    drop(log);
    let file = newest_file(dir.path());
    let content = fs::read(&file).unwrap();
    let unhurt = all_entries(&open());
    // By the thirds of the file: its header, its middle, and its last batch.
    for at in [0, content.len() / 2, content.len() - 1] {
        let mut damaged = content.clone();
        damaged[at..].fill(0xee);
        fs::write(&file, &damaged).unwrap();
        for _ in 0..2 {
            let fault = open().recover().unwrap_err().to_string();
            assert!(fault.contains("what was on the disk is lost after entry"), "{at}: {fault}");
        }
        let kept = fs::read(file.with_extension("rotten")).unwrap();
        assert!(
            kept == damaged || kept.len() < damaged.len(),
            "as it was found, or, the second time, what was left of it"
        );
        fs::remove_file(file.with_extension("rotten")).unwrap();
    }
    fs::write(&file, &content).unwrap();
    assert_eq!(all_entries(&open()), unhurt);
    // A write that the mark did not come to know of, and one that makes the log shorter, are right.
    let mark = fs::read(dir.path().join("synced")).unwrap();
    open().append(&write_of(vec![entry(10, 2, 40)], 9)).unwrap();
    fs::write(dir.path().join("synced"), mark).unwrap();
    assert_eq!(open().recover().unwrap().last_index, 10);
    open().append(&write_of(vec![entry(5, 3, 40)], 4)).unwrap();
    assert_eq!(open().recover().unwrap().last_index, 5);
    // Of a log that the mark knows and that is gone, nothing is begun anew.
    for file in fs::read_dir(dir.path()).unwrap().map(|file| file.unwrap().path()) {
        if file.extension().is_some() {
            fs::remove_file(file).unwrap();
        }
    }
    assert!(open().recover().is_err());
}

// Damage in a file before the newest is no torn tail: the member must not start without what it held.
#[test]
fn damage_before_the_tail_is_a_fault() {
    let dir = tempfile::tempdir().unwrap();
    let log = EngineLog::open(dir.path(), FLUSH_BYTES).unwrap();
    bootstrap(&log);
    let oldest = newest_file(dir.path());
    for index in 2..40 {
        log.append(&write_of(vec![entry(index, 2, 8000)], index)).unwrap();
    }
    drop(log);
    assert_ne!(newest_file(dir.path()), oldest, "several files");
    let mut content = fs::read(&oldest).unwrap();
    let middle = content.len() / 2;
    // The index of a batch lies after its entries: enough bytes to hit one.
    content[middle..middle + 9000].fill(0xee);
    fs::write(&oldest, &content).unwrap();
    assert!(EngineLog::open(dir.path(), FLUSH_BYTES).is_err());
}

#[test]
fn an_unknown_layout_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let log = EngineLog::open(dir.path(), FLUSH_BYTES).unwrap();
    bootstrap(&log);
    log.put_layout_version_for_test(9);
    let refusal = log.recover().unwrap_err().to_string();
    assert!(refusal.contains("version 9"), "{refusal}");
}

// Emptied files are used again: space follows the truncation.
#[test]
fn disk_space_follows_truncation() {
    let dir = tempfile::tempdir().unwrap();
    let log = EngineLog::open(dir.path(), FLUSH_BYTES).unwrap();
    bootstrap(&log);
    for index in 2..2000 {
        log.append(&write_of(vec![entry(index, 2, 4000)], index)).unwrap();
        if index % 50 == 0 {
            log.truncate(Position { index: index - 5, term: 2 }).unwrap();
        }
    }
    let on_disk: u64 = fs::read_dir(dir.path()).unwrap().map(|file| file.unwrap().metadata().unwrap().len()).sum();
    assert!(on_disk < 8 * FLUSH_BYTES, "{on_disk} bytes for 8 MB written");
}

#[test]
fn later_writes_replace_what_they_overlap() {
    let mut write = write_of(vec![entry(5, 1, 0), entry(6, 1, 0), entry(7, 1, 0)], 4);
    write.merge(write_of(vec![entry(6, 2, 0)], 5));
    let terms: Vec<_> = write.entries.iter().map(|entry| (entry.index, entry.term)).collect();
    assert_eq!(terms, [(5, 1), (6, 2)]);
    assert_eq!(write.hard_state.as_ref().unwrap().commit, 5);
    write.merge(LogWrite::default());
    assert_eq!(write.hard_state.as_ref().unwrap().commit, 5, "nothing said, nothing changed");
}

/// A log with the entries 2..=20 of term 1, all on disk, and room for `cache_bytes` in memory.
fn tailed(cache_bytes: usize) -> Arc<Log> {
    let store = Arc::new(MemoryLog::default());
    bootstrap(&*store);
    let recovered = store.recover().unwrap();
    let log = Arc::new(Log::new(store, recovered, cache_bytes, 100));
    let entries: Vec<_> = (2..=20).map(|index| entry(index, 1, 52)).collect();
    entries.iter().for_each(|entry| log.append(std::slice::from_ref(entry)));
    log.store().append(&write_of(entries, 1)).unwrap();
    log.mark_persisted(Position { index: 20, term: 1 });
    log
}

// Raft sees one log wherever the seam between disk and memory lies.
#[test]
fn raft_reads_across_the_end_of_the_cache() {
    for cache_bytes in [0, 100, 550, 10_000] {
        let log = tailed(cache_bytes);
        let storage = RaftStorage(Arc::clone(&log));
        let read = |low, high, max: Option<u64>| {
            let entries = storage.entries(low, high, max, GetEntriesContext::empty(false)).unwrap();
            entries.iter().map(|entry| entry.index).collect::<Vec<_>>()
        };
        assert_eq!(read(2, 21, None), (2..=20).collect::<Vec<_>>(), "cache of {cache_bytes}");
        assert_eq!(read(14, 18, Some(250)), [14, 15, 16], "cut where the bytes are reached");
        assert_eq!(read(3, 21, Some(0)), [3], "at least one");
        assert_eq!((storage.term(1), storage.term(2), storage.term(20)), (Ok(1), Ok(1), Ok(1)));
        assert!(storage.term(21).is_err());

        log.hide_through(10).unwrap();
        assert_eq!(storage.first_index(), Ok(11));
        assert_eq!(storage.term(10), Ok(1), "the term before the first entry is kept");
        assert!(storage.entries(10, 12, None, GetEntriesContext::empty(false)).is_err());
        assert!(storage.term(9).is_err());
        let left = log.bytes_after(10);
        assert!((1000..=1100).contains(&left), "{left} of 10 entries of 100 bytes");
        let left = log.bytes_after(15);
        assert!((500..=600).contains(&left), "{left} of 5 entries of 100 bytes");
        assert!((15..=16).contains(&log.index_before_last(500)), "{}", log.index_before_last(500));
        assert_eq!(log.index_before_last(1 << 20), 10);
    }
}

// What is not on disk stays in memory whatever the bound, and a report about replaced entries counts for nothing.
#[test]
fn only_what_is_on_disk_leaves_the_cache() {
    let log = tailed(0);
    log.append(&[entry(21, 1, 10), entry(22, 1, 10)]);
    log.append(&[entry(22, 2, 10)]);
    log.mark_persisted(Position { index: 22, term: 1 });
    let found = log.entries_between(21, 23, u64::MAX).unwrap().unwrap();
    assert_eq!(found.iter().map(|entry| entry.term).collect::<Vec<_>>(), [1, 2]);
    assert_eq!(log.last_index(), 22);
}

// A snapshot takes the place of entries, also of some behind it that another leader never committed; and a crash while it
// is installed leaves the old log with a note, or the new one.
#[test]
fn a_snapshot_replaces_the_log() {
    fn check(reopen: &mut dyn FnMut() -> Arc<dyn LogStore>) {
        let at = Position { index: 15, term: 3 };
        let conf = |index| Conf { index, state: ConfState { voters: vec![index], ..ConfState::default() } };
        let store = reopen();
        store.bootstrap(1, Position { index: 1, term: 1 }, &conf(1)).unwrap();
        store.append(&write_of((2..=20).map(|index| entry(index, 1, 10)).collect(), 1)).unwrap();
        store.begin_install(at, &conf(15)).unwrap();
        drop(store);
        let noted = reopen();
        let found = noted.recover().unwrap();
        assert_eq!((found.installing, found.last_index), (Some((at, conf(15))), 20));
        noted.cancel_install().unwrap();
        assert_eq!(noted.recover().unwrap().installing, None);
        noted.begin_install(at, &conf(15)).unwrap();
        noted.finish_install(at, &conf(15)).unwrap();
        noted.append(&write_of(vec![entry(16, 4, 10)], 4)).unwrap();
        drop(noted);
        let found = reopen().recover().unwrap();
        assert_eq!((found.truncated, found.last_index, found.member_id), (at, 16, Some(1)));
        assert_eq!((found.conf, found.installing, found.hard_state.term), (conf(15), None, 4));
    }
    let dir = tempfile::tempdir().unwrap();
    check(&mut || Arc::new(EngineLog::open(dir.path(), 1 << 20).unwrap()));
    let memory = Arc::new(MemoryLog::default());
    check(&mut || Arc::clone(&memory) as Arc<dyn LogStore>);
}
