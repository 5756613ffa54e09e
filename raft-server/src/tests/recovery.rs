//! What is left after a crash: every acknowledged command, once, in order.

use std::collections::BTreeSet;
use std::ffi::OsString;

use super::*;
use crate::{EngineLog, LogStore, MemoryLog, ProposeError, StartError, start_on};

fn names_in(dir: &Path) -> BTreeSet<OsString> {
    std::fs::read_dir(dir).unwrap().map(|file| file.unwrap().file_name()).collect()
}

/// What a kill -9 at this moment leaves of the log: its files as they are, without the clean end that a stop writes. They are
/// copied one after the other, which is one moment's image if none came, went or was renamed meanwhile: then all but the newest
/// stand still, and of that one a beginning is copied. The mark that says how far they reach at least goes first.
fn copy_log(from: &Path, to: &Path) {
    let (from, to) = (log_dir(from), log_dir(to));
    loop {
        std::fs::create_dir(&to).unwrap();
        let names = names_in(&from);
        let (marks, files): (Vec<_>, Vec<_>) = names.iter().partition(|name| *name == "synced");
        assert_eq!(marks.len(), 1);
        let copied =
            marks.into_iter().chain(files).try_for_each(|name| std::fs::copy(from.join(name), to.join(name)).map(drop));
        match copied {
            Ok(()) if names_in(&from) == names => return,
            Ok(()) => {}
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::NotFound, "{error}"),
        }
        std::fs::remove_dir_all(&to).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_acknowledged_command_survives_any_number_of_crashes() {
    let dir = tempfile::tempdir().unwrap();
    let probe = Probe::default();
    let mut acknowledged = Vec::new();
    for life in 0..5 {
        let (handle, guard) = start_single(config(1, dir.path()), &probe).await;
        for command in numbered(life * 30..(life + 1) * 30) {
            patiently(handle.propose(1, command.clone())).await.unwrap();
            acknowledged.push(command);
        }
        if life == 2 {
            // From here on, a part of the state is durable and must not be applied again.
            *probe.disk.lock() = probe.memory.lock().clone();
        }
        guard.stop();
    }
    let (handle, _guard) = start_single(config(1, dir.path()), &probe).await;
    patiently(handle.read_barrier()).await.unwrap();
    assert_eq!(probe.commands(), acknowledged);
}

// The files are copied while the member writes, so the copy ends anywhere, often in the middle of a batch.
#[tokio::test(flavor = "multi_thread")]
async fn a_kill_at_any_moment_loses_nothing_acknowledged() {
    let dir = tempfile::tempdir().unwrap();
    let probe = Probe::default();
    let small_files = |dir: &Path| Config { log_bytes_flush: 64 << 10, ..config(1, dir) };
    let (handle, guard) = start_single(small_files(dir.path()), &probe).await;
    let writer = tokio::spawn({
        let handle = handle.clone();
        async move {
            let mut number = 0;
            while handle.propose(number % 3, Bytes::from(vec![number as u8; 2000])).await.is_ok() {
                number += 1;
            }
        }
    });
    for _ in 0..10 {
        patiently(handle.propose(9, Bytes::from_static(b"mark"))).await.unwrap();
        // State first: the log may be truncated up to what the state had durably at that moment, not further.
        let image = Probe::default();
        let (acknowledged, copy) = {
            let before = probe.commands();
            let disk_guard = probe.disk.lock();
            *image.disk.lock() = disk_guard.clone();
            let copy = tempfile::tempdir().unwrap();
            copy_log(dir.path(), copy.path());
            (before, copy)
        };
        let (revived, _guard) = start_single(small_files(copy.path()), &image).await;
        patiently(revived.read_barrier()).await.unwrap();
        let found = image.commands();
        assert!(found.len() >= acknowledged.len(), "{} of {}", found.len(), acknowledged.len());
        assert_eq!(found[..acknowledged.len()], acknowledged[..]);
    }
    guard.stop();
    patiently(writer).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_log_is_truncated_to_what_is_flushed_and_no_further() {
    let dir = tempfile::tempdir().unwrap();
    let probe = Probe::default();
    let config = Config { log_bytes_flush: 64 << 10, ..config(1, dir.path()) };
    let (handle, guard) = start_single(config.clone(), &probe).await;
    for number in 0..600 {
        patiently(handle.propose(1, Bytes::from(vec![number as u8; 1000]))).await.unwrap();
    }
    let flushes = *probe.flushes.lock();
    assert!((3..=30).contains(&flushes), "{flushes} flushes for 600 KiB");
    guard.stop();
    // Only now nothing moves any more.
    let durable = handle.status().durable_index;

    let log = EngineLog::open(&log_dir(dir.path()), config.log_bytes_flush).unwrap();
    let recovered = log.recover().unwrap();
    assert!(recovered.truncated.index > 100, "truncated to {}", recovered.truncated.index);
    assert!(recovered.truncated.index <= durable, "no further than durable");
    let disk_bytes = log.disk_bytes();
    assert!(disk_bytes <= 4 * (64 << 10), "{disk_bytes} bytes kept");
    drop(log);

    let (handle, guard) = start_single(config.clone(), &probe).await;
    patiently(handle.read_barrier()).await.unwrap();
    assert_eq!(probe.commands().len(), 600);
    guard.stop();

    // The state is lost, and the log no longer has what it would need.
    let lost = start(config, Probe::default().boot(), NoPeers);
    assert!(matches!(lost, Err(StartError::StateBehindLog { applied: 1, .. })), "{:?}", lost.err());
}

// One of three goes on alone, with all that its log holds: what was committed, what was not yet, and a change of members that
// was to bring a fourth. It must not wait for any of the others.
#[tokio::test(flavor = "multi_thread")]
async fn a_forced_member_goes_on_alone_with_all_it_has() {
    use crate::log::{LogWrite, Position};
    use crate::transport::Network;
    use raft::eraftpb::{ConfChangeSingle, ConfChangeType, ConfChangeV2, Entry, EntryType, HardState};

    let log = Arc::new(MemoryLog::default());
    let dir = tempfile::tempdir().unwrap();
    let three = Config { initial_voters: vec![1, 2, 3], ..config(1, dir.path()) };
    let probe = Probe::default();
    drop(start_on(three.clone(), probe.boot(), log.clone(), Network::default().endpoint(1)).unwrap());
    let committed = LogWrite::of_commands(Position { index: 2, term: 2 }, &numbered(0..2));
    let mut change = ConfChangeSingle::default();
    (change.change_type, change.node_id) = (ConfChangeType::AddNode, 4);
    let change = ConfChangeV2 { changes: vec![change].into(), ..ConfChangeV2::default() };
    let data = protobuf::Message::write_to_bytes(&change).unwrap();
    let (entry_type, data) = (EntryType::EntryConfChangeV2, data.into());
    let change = Entry { index: 3, term: 2, entry_type, data, ..Entry::default() };
    let uncommitted = LogWrite::of_commands(Position { index: 4, term: 2 }, &numbered(2..3));
    let hard_state = Some(HardState { term: 2, vote: 2, commit: 2, ..HardState::default() });
    let entries = [committed.entries, vec![change], uncommitted.entries].concat();
    log.append(&LogWrite { entries, hard_state, conf: None }).unwrap();

    let forced = Config { force_sole_voter: true, ..three };
    let (handle, guard) = start_on(forced.clone(), probe.boot(), log.clone(), NoPeers).unwrap();
    wait_for_leadership(&handle).await;
    patiently(handle.propose(1, Bytes::from_static(b"command 3"))).await.unwrap();
    assert_eq!((probe.commands(), handle.voters().to_vec()), (numbered(0..4), vec![1]));
    guard.stop();
    // Once is enough.
    let (handle, guard) = start_on(config(1, dir.path()), probe.boot(), log, NoPeers).unwrap();
    wait_for_leadership(&handle).await;
    assert_eq!(handle.voters().to_vec(), [1]);
    guard.stop();

    let joining = Config { initial_voters: vec![], ..forced };
    let refused = start_on(joining, Probe::default().boot(), Arc::new(MemoryLog::default()), NoPeers);
    assert!(matches!(refused, Err(StartError::NotAMember)), "{:?}", refused.err());
}

// The crash came after the record of a change that only this member had to agree to, and before the commit index was saved. It must not ask
// the voter that the change brought, which waits for a snapshot that knows of it. (Found by the simulation.)
#[tokio::test(flavor = "multi_thread")]
async fn a_recorded_change_of_members_is_committed() {
    use crate::log::{Conf, LogWrite, Position};
    use crate::transport::Network;
    use raft::eraftpb::{ConfChangeSingle, ConfChangeTransition, ConfChangeV2, ConfState, Entry, EntryType, HardState};

    let simple = ConfState { voters: vec![1, 2], ..ConfState::default() };
    // As an earlier release made changes.
    let joint = ConfState { voters_outgoing: vec![1], auto_leave: true, ..simple.clone() };
    for (transition, state) in [(ConfChangeTransition::Auto, simple), (ConfChangeTransition::Implicit, joint)] {
        let log = Arc::new(MemoryLog::default());
        let dir = tempfile::tempdir().unwrap();
        let probe = Probe::default();
        drop(start_on(config(1, dir.path()), probe.boot(), log.clone(), NoPeers).unwrap());
        let before = LogWrite::of_commands(Position { index: 2, term: 9 }, &numbered(0..2));
        let added = ConfChangeSingle { node_id: 2, ..ConfChangeSingle::default() };
        let change = ConfChangeV2 { transition, changes: vec![added].into(), ..ConfChangeV2::default() };
        let data = protobuf::Message::write_to_bytes(&change).unwrap().into();
        let change = Entry { index: 3, term: 9, entry_type: EntryType::EntryConfChangeV2, data, ..Entry::default() };
        let hard_state = Some(HardState { term: 9, vote: 1, commit: 2, ..HardState::default() });
        let entries = [before.entries, vec![change]].concat();
        log.append(&LogWrite { entries, hard_state, conf: None }).unwrap();
        log.append(&LogWrite { conf: Some(Conf { index: 3, state }), ..LogWrite::default() }).unwrap();

        let endpoint = Network::default().endpoint(1);
        let (handle, _guard) = start_on(config(1, dir.path()), probe.boot(), log, endpoint).unwrap();
        until(|| handle.status().applied_index == 3).await;
        assert_eq!((probe.commands(), handle.voters().to_vec()), (numbered(0..2), vec![1, 2]));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_state_ahead_of_its_log_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let probe = Probe::default();
    let (handle, guard) = start_single(config(1, dir.path()), &probe).await;
    for command in numbered(0..10) {
        patiently(handle.propose(1, command)).await.unwrap();
    }
    guard.stop();
    *probe.disk.lock() = probe.memory.lock().clone();
    let empty = tempfile::tempdir().unwrap();
    let refused = start(config(1, empty.path()), probe.boot(), NoPeers);
    assert!(matches!(refused, Err(StartError::LogBehindState { .. })), "{:?}", refused.err());
}

/// Changes one bit of the byte at the end of `text`, which is in the log once.
fn change_byte_after(text: &[u8], dir: &Path) {
    let mut changed = 0;
    for name in names_in(&log_dir(dir)) {
        let file = log_dir(dir).join(name);
        let mut content = std::fs::read(&file).unwrap();
        if let Some(at) = content.windows(text.len()).position(|window| window == text) {
            content[at + text.len() - 1] ^= 1;
            std::fs::write(&file, content).unwrap();
            changed += 1;
        }
    }
    assert_eq!(changed, 1, "{}", text.escape_ascii());
}

// A disk that gives back another byte than it was given is found out by the entry's check, before anything of the entry is
// applied: a member that went on would have another state than the others, and tell nobody.
#[tokio::test(flavor = "multi_thread")]
async fn a_changed_byte_in_an_entry_stops_the_member_at_its_start() {
    let dir = tempfile::tempdir().unwrap();
    let (handle, guard) = start_single(config(1, dir.path()), &Probe::default()).await;
    for command in numbered(10..30) {
        patiently(handle.propose(1, command)).await.unwrap();
    }
    guard.stop();
    for damaged in [10, 17, 28] {
        let copy = tempfile::tempdir().unwrap();
        copy_log(dir.path(), copy.path());
        change_byte_after(&numbered(damaged..damaged + 1)[0], copy.path());
        let faults = Shared::<Vec<MemberFault>>::default();
        let collected = Arc::clone(&faults);
        let handler = move |fault: &MemberFault| collected.lock().push(fault.clone());
        let config = Config { fault_handler: Some(Arc::new(handler)), ..config(1, copy.path()) };
        let probe = Probe::default();
        let (handle, guard) = start(config, probe.boot(), NoPeers).unwrap();
        until(|| !faults.lock().is_empty()).await;
        guard.wait();
        let faults = faults.lock().clone();
        assert_eq!(faults.len(), 1, "{faults:?}");
        assert!(faults[0].cause.contains("raft log: ") && faults[0].cause.contains("hecksum"), "{faults:?}");
        let applied = probe.commands();
        assert!(numbered(10..damaged).starts_with(&applied), "nothing from the damaged entry on: {applied:?}");
        assert_eq!(patiently(handle.propose(1, Bytes::new())).await, Err(ProposeError::Stopped));
    }
}

// A clean stop leaves nothing to replay.
#[tokio::test(flavor = "multi_thread")]
async fn a_clean_stop_flushes() {
    let dir = tempfile::tempdir().unwrap();
    let probe = Probe::default();
    let (handle, guard) = start_single(Config { flush_on_stop: true, ..config(1, dir.path()) }, &probe).await;
    for command in numbered(0..10) {
        patiently(handle.propose(1, command)).await.unwrap();
    }
    guard.stop();
    assert_eq!(probe.disk.lock().commands, numbered(0..10));
}

// The log's newest part is all that memory holds: with a cache of nothing the same replay comes from disk.
#[tokio::test(flavor = "multi_thread")]
async fn entries_outside_the_cache_are_read_from_disk() {
    let dir = tempfile::tempdir().unwrap();
    let probe = Probe::default();
    let config = Config { log_cache_bytes_max: 0, apply_bytes_max: 500, ..config(1, dir.path()) };
    for life in 0..2 {
        let (handle, guard) = start_single(config.clone(), &probe).await;
        let tasks: Vec<_> = numbered(life * 100..(life + 1) * 100)
            .into_iter()
            .map(|command| {
                let handle = handle.clone();
                tokio::spawn(async move { handle.propose(1, command).await })
            })
            .collect();
        for task in tasks {
            patiently(task).await.unwrap().unwrap();
        }
        guard.stop();
    }
    let (handle, _guard) = start_single(config, &probe).await;
    patiently(handle.read_barrier()).await.unwrap();
    assert_eq!(probe.commands().len(), 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_memory_log_serves_a_member_too() {
    let dir = tempfile::tempdir().unwrap();
    let log = Arc::new(MemoryLog::default());
    let probe = Probe::default();
    for life in 0..3 {
        let config = config(1, dir.path());
        let (handle, _guard) = start_on(config, probe.boot(), log.clone(), NoPeers).unwrap();
        wait_for_leadership(&handle).await;
        for command in numbered(life * 10..(life + 1) * 10) {
            patiently(handle.propose(1, command)).await.unwrap();
        }
    }
    assert_eq!(probe.commands(), numbered(0..30));
}
