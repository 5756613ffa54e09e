//! One voter: the whole path without peers.

use futures_lite::*;

use super::*;
use crate::{ProposeError, ReadError, StartError};

#[tokio::test(flavor = "multi_thread")]
async fn proposals_are_applied_in_order_and_answered() {
    let dir = tempfile::tempdir().unwrap();
    let probe = Probe::default();
    let (handle, guard) = start_single(config(1, dir.path()), &probe).await;
    for (number, command) in numbered(0..50).into_iter().enumerate() {
        assert_eq!(patiently(handle.propose(7, command)).await, Ok(number + 1));
    }
    assert_eq!(probe.commands(), numbered(0..50));
    let status = handle.status();
    assert!(status.is_leader && status.leader_id == 1 && status.voters == 1 && status.proposals_pending == 0);
    assert_eq!((status.commit_index, status.last_index), (status.applied_index, status.applied_index));
    assert_eq!(handle.voters()[..], [1]);
    let metrics = handle.metrics();
    assert!(metrics.wal_write_bytes() > 50 * 10 && metrics.wal_fsync_duration.snapshot().count >= 50);
    guard.stop();
    assert_eq!(patiently(handle.propose(7, Bytes::new())).await, Err(ProposeError::Stopped));
    assert_eq!(patiently(handle.read_barrier()).await, Err(ReadError::Stopped));
}

// Many commands that come while one is on its way travel together: the point of the whole design.
#[tokio::test(flavor = "multi_thread")]
async fn concurrent_proposals_share_entries() {
    let dir = tempfile::tempdir().unwrap();
    let probe = Probe::default();
    let (handle, _guard) = start_single(config(1, dir.path()), &probe).await;
    let tasks: Vec<_> = (0..2000u32)
        .map(|number| {
            let handle = handle.clone();
            tokio::spawn(async move { handle.propose(number % 7, Bytes::from(format!("{number}"))).await })
        })
        .collect();
    for task in tasks {
        patiently(task).await.unwrap().unwrap();
    }
    assert_eq!(probe.commands().len(), 2000);
    let entries = probe.entry_sizes.lock().len();
    assert!(entries < 1000, "{entries} entries for 2,000 commands");
}

// Little is applied on raft's thread, more on the apply thread: they take turns, and neither passes the other. The recorder asserts
// that each entry comes once and in order.
#[tokio::test(flavor = "multi_thread")]
async fn small_and_large_commands_keep_their_order() {
    let dir = tempfile::tempdir().unwrap();
    let probe = Probe::default();
    let (handle, guard) = start_single(config(1, dir.path()), &probe).await;
    let tasks: Vec<_> = (0..4_usize)
        .map(|task| {
            let (handle, memory) = (handle.clone(), Arc::clone(&probe.memory));
            tokio::spawn(async move {
                let mut last = 0;
                for number in 0..100 {
                    let command = vec![b'0'; if (number + task) % 3 == 0 { 4_000 } else { 10 }];
                    let place = handle.propose(1, command.into()).await.unwrap();
                    assert!(place > last, "a later write is applied later");
                    last = place;
                    assert!(memory.lock().commands.len() >= last, "an answer comes after its effect");
                }
            })
        })
        .collect();
    for task in tasks {
        patiently(task).await.unwrap();
    }
    assert_eq!(probe.commands().len(), 400);
    guard.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_read_barrier_of_a_single_voter_sees_every_acknowledged_write() {
    let dir = tempfile::tempdir().unwrap();
    let probe = Probe::default();
    let (handle, guard) = start_single(config(1, dir.path()), &probe).await;
    until(|| handle.read_point_now().is_some()).await;
    for command in numbered(0..20) {
        patiently(handle.propose(1, command)).await.unwrap();
        let applied = patiently(handle.read_barrier()).await.unwrap();
        assert_eq!(applied, probe.memory.lock().applied_index);
        assert_eq!(handle.read_point_now(), Some(applied), "no round is needed");
    }
    guard.stop();

    // After a crash nothing acknowledged is applied at first: the barrier must wait for the replay.
    let gate = probe.close_gate().await;
    let (handle, _guard) = start(config(1, dir.path()), probe.boot(), NoPeers).unwrap();
    wait_for_leadership(&handle).await;
    assert_eq!(handle.read_point_now(), None);
    let reader = tokio::spawn({
        let handle = handle.clone();
        async move { handle.read_barrier().await }
    });
    drop(gate);
    patiently(reader).await.unwrap().unwrap();
    assert_eq!(probe.commands(), numbered(0..20));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_lane_is_refused_and_others_are_not() {
    let dir = tempfile::tempdir().unwrap();
    let probe = Probe::default();
    let config = Config {
        lane_queue_bytes_max: 4 << 10,
        queue_bytes_max: 64 << 10,
        inflight_bytes_max: 1 << 10,
        command_bytes_max: 2 << 10,
        ..config(1, dir.path())
    };
    let (handle, guard) = start_single(config, &probe).await;
    patiently(handle.read_barrier()).await.unwrap();
    let too_large = patiently(handle.propose(1, Bytes::from(vec![0; (2 << 10) + 1]))).await;
    assert_eq!(too_large, Err(ProposeError::TooLarge));

    let gate = probe.close_gate().await;
    let mut waiting = Vec::new();
    // Until the state machine is stopped, what is in flight and the lane are full.
    let refused = loop {
        let handle = handle.clone();
        let mut proposal = Box::pin(async move { handle.propose(1, Bytes::from(vec![1; 1000])).await });
        match poll_once(&mut proposal).await {
            Some(result) => break result,
            None => waiting.push(proposal),
        }
        assert!(waiting.len() < 1000, "the lane has a bound");
    };
    assert_eq!(refused, Err(ProposeError::QueueFull));
    let mut other = Box::pin(handle.propose(2, Bytes::from_static(b"other")));
    assert!(poll_once(&mut other).await.is_none(), "another lane has room");
    assert!(handle.status().proposals_pending > 3);
    drop(gate);
    patiently(other).await.unwrap();
    for proposal in waiting {
        patiently(proposal).await.unwrap();
    }
    assert_eq!(handle.status().proposals_pending, 0);
    guard.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_future_takes_nothing_back_that_is_on_its_way() {
    let dir = tempfile::tempdir().unwrap();
    let probe = Probe::default();
    let (handle, _guard) = start_single(config(1, dir.path()), &probe).await;
    // The leader's own first entry is not the one that the test waits for.
    patiently(handle.read_barrier()).await.unwrap();
    let gate = probe.close_gate().await;
    // Of a size that is not applied on raft's thread, which is to go on.
    let first = vec![b'0'; 4_000];
    let mut before = Box::pin(handle.propose(1, Bytes::from(first.clone())));
    assert!(poll_once(&mut before).await.is_none());
    until(|| handle.status().commit_index > handle.status().applied_index).await;
    {
        let last_index = handle.status().last_index;
        let mut proposal = Box::pin(handle.propose(1, Bytes::from_static(b"left alone")));
        assert!(poll_once(&mut proposal).await.is_none());
        until(|| handle.status().last_index > last_index).await;
    }
    drop(gate);
    patiently(before).await.unwrap();
    patiently(handle.propose(1, Bytes::from_static(b"next"))).await.unwrap();
    assert_eq!(probe.commands(), [&first[..], b"left alone", b"next"]);
    // Its reply, which may be large, need not be kept.
    assert_eq!(*probe.wanted.lock(), [true, false, true]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_answers_everybody() {
    // Of a size that is not applied on raft's thread, which is to go on.
    let command = Bytes::from(vec![b'0'; 4_000]);
    let dir = tempfile::tempdir().unwrap();
    let probe = Probe::default();
    let (handle, guard) = start_single(config(1, dir.path()), &probe).await;
    let gate = probe.close_gate().await;
    let mut proposal = Box::pin(handle.propose(1, command));
    assert!(poll_once(&mut proposal).await.is_none());
    handle.request_stop();
    let answer = patiently(proposal).await;
    assert!(matches!(answer, Err(ProposeError::Dropped | ProposeError::Stopped)), "{answer:?}");
    drop(gate);
    guard.wait();
    assert_eq!(handle.status().proposals_pending, 0);
}

#[test]
fn blocking_proposals_need_no_runtime() {
    let dir = tempfile::tempdir().unwrap();
    let probe = Probe::default();
    let (handle, _guard) = start(config(1, dir.path()), probe.boot(), NoPeers).unwrap();
    let reply = handle.propose_blocking(1, Bytes::from_static(b"x"));
    assert_eq!(reply, Ok(1));
}

#[test]
fn a_log_is_held_by_one_member_and_keeps_its_id() {
    let dir = tempfile::tempdir().unwrap();
    let (_, guard) = start(config(1, dir.path()), Probe::default().boot(), NoPeers).unwrap();
    let second = start(config(1, dir.path()), Probe::default().boot(), NoPeers);
    assert!(matches!(second, Err(StartError::Fault(_))));
    guard.stop();
    let other = start(config(2, dir.path()), Probe::default().boot(), NoPeers);
    assert!(matches!(other, Err(StartError::OtherMember { found: 1, expected: 2 })));
}

/// The two lines of the futures crates that these tests need.
mod futures_lite {
    use std::future::poll_fn;
    use std::pin::Pin;
    use std::task::Poll;

    /// Polls once: `None` if it is not done.
    pub(super) async fn poll_once<F: Future>(future: &mut Pin<Box<F>>) -> Option<F::Output> {
        poll_fn(|context| match future.as_mut().poll(context) {
            Poll::Ready(output) => Poll::Ready(Some(output)),
            Poll::Pending => Poll::Ready(None),
        })
        .await
    }
}
