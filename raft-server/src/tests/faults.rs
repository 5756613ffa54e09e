//! A member that cannot keep its promises stops, says why once, and leaves nobody waiting.

use std::sync::atomic::{AtomicBool, Ordering};

use raft::eraftpb::{Entry, Message, MessageType};

use super::*;
use crate::transport::PeerMessage;
use crate::{Appended, Conf, LogStore, LogWrite, MemoryLog, Position, ProposeError, Recovered, start_on};

/// A log whose disk fails when told to.
#[derive(Default)]
struct FailingLog {
    log: MemoryLog,
    broken: AtomicBool,
}

impl LogStore for FailingLog {
    fn recover(&self) -> Result<Recovered, Fault> {
        self.log.recover()
    }

    fn bootstrap(&self, member_id: u64, at: Position, conf: &Conf) -> Result<(), Fault> {
        self.log.bootstrap(member_id, at, conf)
    }

    fn append(&self, write: &LogWrite) -> Result<Appended, Fault> {
        if self.broken.load(Ordering::Relaxed) {
            return Err(Fault::Io(std::io::Error::other("disk is gone")));
        }
        self.log.append(write)
    }

    fn entries(&self, low: u64, high: u64, bytes_max: u64) -> Result<Vec<Entry>, Fault> {
        self.log.entries(low, high, bytes_max)
    }

    fn truncate(&self, through: Position) -> Result<(), Fault> {
        self.log.truncate(through)
    }

    fn begin_install(&self, at: Position, conf: &Conf) -> Result<(), Fault> {
        self.log.begin_install(at, conf)
    }

    fn cancel_install(&self) -> Result<(), Fault> {
        self.log.cancel_install()
    }

    fn finish_install(&self, at: Position, conf: &Conf) -> Result<(), Fault> {
        self.log.finish_install(at, conf)
    }

    fn disk_bytes(&self) -> u64 {
        self.log.disk_bytes()
    }
}

/// Starts a member whose faults are collected, proposes `command`, and gives the faults once the member is gone.
async fn faults_after(command: impl Into<Bytes>, spoil: fn(&FailingLog)) -> Vec<MemberFault> {
    let faults = Shared::<Vec<MemberFault>>::default();
    let collected = Arc::clone(&faults);
    let handler = move |fault: &MemberFault| collected.lock().push(fault.clone());
    let dir = tempfile::tempdir().unwrap();
    let config = Config { fault_handler: Some(Arc::new(handler)), ..config(1, dir.path()) };
    let log = Arc::new(FailingLog::default());
    let probe = Probe::default();
    let (handle, guard) = start_on(config, probe.boot(), log.clone(), NoPeers).unwrap();
    wait_for_leadership(&handle).await;
    patiently(handle.propose(1, Bytes::from_static(b"fine"))).await.unwrap();
    until(|| handle.read_point_now().is_some()).await;
    spoil(&log);
    let unanswered = patiently(handle.propose(1, command.into())).await;
    assert_eq!(unanswered, Err(ProposeError::Dropped), "nobody knows whether it took effect");
    guard.wait();
    assert_eq!(patiently(handle.propose(1, Bytes::new())).await, Err(ProposeError::Stopped));
    assert_eq!(probe.commands(), [&b"fine"[..]]);
    let faults = faults.lock();
    faults.clone()
}

/// What a sole voter applies on raft's thread, and the same with so much behind it that the apply thread does.
fn on_both_threads(command: &str) -> [(&'static str, Vec<u8>); 2] {
    let mut long = command.as_bytes().to_vec();
    long.resize(4_000, b' ');
    [("raft", command.into()), ("raft-apply", long)]
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fault_of_the_state_machine_stops_the_member() {
    for (thread, command) in on_both_threads("fault") {
        let faults = faults_after(command, |_| {}).await;
        assert_eq!(faults.len(), 1);
        assert_eq!((faults[0].thread, faults[0].cause.contains("asked for")), (thread, true));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_panic_of_the_state_machine_stops_the_member() {
    for (thread, command) in on_both_threads("panic") {
        let faults = faults_after(command, |_| {}).await;
        assert_eq!(faults.len(), 1);
        assert_eq!((faults[0].thread, &faults[0].cause[..]), (thread, "asked for"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failing_disk_stops_the_member() {
    let faults = faults_after("lost", |log| log.broken.store(true, Ordering::Relaxed)).await;
    assert_eq!(faults.len(), 1);
    assert_eq!(
        (faults[0].thread, faults[0].cause.contains("disk is gone")),
        ("raft", true),
        "a sole voter writes there"
    );
}

// A copy of the data directory that is put back may lack what this member has acknowledged since: with its vote that could be lost. Whoever
// leads knows how far it was.
#[tokio::test(flavor = "multi_thread")]
async fn a_member_with_older_data_than_it_has_acknowledged_stops_and_says_so() {
    let faults = Shared::<Vec<MemberFault>>::default();
    let collected = Arc::clone(&faults);
    let handler = move |fault: &MemberFault| collected.lock().push(fault.clone());
    let dir = tempfile::tempdir().unwrap();
    let config =
        Config { initial_voters: vec![1, 2, 3], fault_handler: Some(Arc::new(handler)), ..config(1, dir.path()) };
    let log = Arc::new(FailingLog::default());
    let (handle, guard) = start_on(config, Probe::default().boot(), log, NoPeers).unwrap();
    let heartbeat = Message {
        msg_type: MessageType::MsgHeartbeat,
        from: 2,
        to: 1,
        term: 1_000_000,
        commit: 7_000,
        ..Message::default()
    };
    handle.deliver(PeerMessage::Raft(Box::new(heartbeat)));
    guard.wait();
    let cause = faults.lock()[0].cause.clone();
    assert!(cause.contains("entries up to 7000: the data is an older copy; remove this member"), "{cause}");
}
