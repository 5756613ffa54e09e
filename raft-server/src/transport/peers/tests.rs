//! Streams through ways that break, and what a member costs that does not read.
//!
//! Why the first: a member that was killed is dialled many times a second while it is away, and each attempt may break anywhere. One
//! attempt of hundreds never ended, and its stream was silent for ever: a member without heartbeats, a group without votes.

use tokio::io::{AsyncReadExt as _, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc::UnboundedSender;

use super::*;
use crate::log::Position;
use crate::snapshot::OutgoingSnapshot;
use crate::transport::Message;

/// Members that reach for one other at once.
const MEMBERS: u64 = 40;

/// Connections that break before the way is free.
const BROKEN: usize = 800;

const RECEIVER: u64 = 1_000_000;

/// A stream that hangs fails its test after this.
const PATIENCE: Duration = Duration::from_secs(180);

/// Hands on who was heard of.
struct Ear(UnboundedSender<u64>);

impl Local for Ear {
    fn deliver(&self, messages: Vec<PeerMessage>) {
        for message in messages {
            let _ = self.0.send(message.from());
        }
    }

    fn outgoing_snapshot(&self, _: Position) -> Option<Arc<OutgoingSnapshot>> {
        None
    }

    fn snapshot_fetched(&self, _: SnapshotOffer, _: bool) {}

    fn report_unreachable(&self, _: u64) {}

    fn report_removed(&self) {}
}

fn peers(member_id: u64) -> Peers {
    let config = PeersConfig {
        identity: PeerIdentity { member_id, cluster_id: 7 },
        tls: None,
        timeout: Duration::from_secs(10),
        snapshot_bytes_per_second: 1 << 20,
    };
    Peers::new(config, tokio::runtime::Handle::current())
}

/// Breaks the first connections: at once, or after some bytes of what is said on them; then lets all through.
async fn break_and_pass(door: TcpListener, onward: std::net::SocketAddr) {
    for number in 0.. {
        let (mut near, _) = door.accept().await.unwrap();
        tokio::spawn(async move {
            if number < BROKEN {
                let mut heard = vec![0; [0, 1, 24, 60, 100, 150, 250, 400][number % 8]];
                if !number.is_multiple_of(3) && !heard.is_empty() {
                    let _ = near.read_exact(&mut heard).await;
                }
                if number.is_multiple_of(2) {
                    let _ = near.set_zero_linger();
                }
                return;
            }
            let mut far = TcpStream::connect(onward).await.unwrap();
            let _ = copy_bidirectional(&mut near, &mut far).await;
        });
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_come_through_once_the_way_is_free() {
    let receiver = peers(RECEIVER);
    let (ear, mut heard) = mpsc::unbounded_channel();
    assert!(receiver.0.local.set(Arc::new(Ear(ear))).is_ok());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(serve(vec![listener], None, receiver, std::future::pending()));
    let door = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", door.local_addr().unwrap());
    tokio::spawn(break_and_pass(door, address));

    let senders: Vec<_> = (1..=MEMBERS).map(peers).collect();
    for sender in &senders {
        sender.set_members(&[(RECEIVER, vec![url.clone()])]);
    }
    let mut missing: std::collections::BTreeSet<u64> = (1..=MEMBERS).collect();
    let all_heard = async {
        let mut turn = tokio::time::interval(Duration::from_millis(50));
        while !missing.is_empty() {
            tokio::select! {
                from = heard.recv() => drop(missing.remove(&from.unwrap())),
                _ = turn.tick() => for (id, sender) in (1..).zip(&senders) {
                    let mut message = Message { from: id, to: RECEIVER, ..Message::default() };
                    message.set_msg_type(MessageType::MsgHeartbeat);
                    sender.transport().send(vec![PeerMessage::Raft(Box::new(message))]);
                }
            }
        }
    };
    let all_heard = tokio::time::timeout(PATIENCE, all_heard).await;
    assert!(all_heard.is_ok(), "never heard of {missing:?}");
}

fn heartbeat() -> PeerMessage {
    let mut message = Message { from: 1, to: RECEIVER, ..Message::default() };
    message.set_msg_type(MessageType::MsgHeartbeat);
    PeerMessage::Raft(Box::new(message))
}

/// An entry on its way.
fn append(bytes: &Bytes) -> PeerMessage {
    let entry = raft::eraftpb::Entry { data: bytes.clone(), ..Default::default() };
    let mut message = Message { from: 1, to: RECEIVER, entries: vec![entry].into(), ..Message::default() };
    message.set_msg_type(MessageType::MsgAppend);
    PeerMessage::Raft(Box::new(message))
}

/// What one of the queues holds: messages, and bytes.
fn queued(sender: &Peers, message: &PeerMessage) -> (usize, usize) {
    let members = sender.0.members.read();
    let queue = &members[&RECEIVER].queues[usize::from(is_bulk(message))];
    (QUEUE_MESSAGES_MAX - queue.sender.capacity(), queue.bytes.load(Ordering::Relaxed))
}

/// A member whose connections are made and never read.
async fn deaf() -> (TcpListener, String) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    (listener, url)
}

/// Waits for what other tasks bring about.
async fn until(mut is_so: impl FnMut() -> bool) {
    let waiting = async {
        while !is_so() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, waiting).await.unwrap();
}

// Nothing else runs while messages are sent, so the counts are exact.
#[tokio::test]
async fn a_member_that_is_not_reached_costs_a_full_queue() {
    let (_deaf, url) = deaf().await;
    let sender = peers(1);
    sender.set_members(&[(RECEIVER, vec![url])]);
    let mut transport = sender.transport();
    let (_, stats) = sender.stats().remove(0);
    transport.send((0..QUEUE_MESSAGES_MAX).map(|_| heartbeat()).collect());
    assert_eq!(stats.sent_failures(), 0, "they fit");
    transport.send((0..10).map(|_| heartbeat()).collect());
    assert_eq!((stats.sent_failures(), stats.heartbeats_dropped()), (10, 10));
    assert_eq!(queued(&sender, &heartbeat()).0, QUEUE_MESSAGES_MAX);

    let megabyte = Bytes::from(vec![0; 1 << 20]);
    transport.send((0..100).map(|_| append(&megabyte)).collect());
    let (messages, bytes) = queued(&sender, &append(&megabyte));
    assert_eq!(messages, QUEUE_BYTES_MAX >> 20, "a megabyte each, and a little around it");
    assert!(bytes > QUEUE_BYTES_MAX && bytes < QUEUE_BYTES_MAX + (1 << 20), "one message over the bound: {bytes}");
    assert_eq!((stats.sent_failures(), stats.heartbeats_dropped()), (10 + 100 - messages as u64, 10));
}

#[tokio::test]
async fn a_member_that_does_not_read_holds_up_nobody() {
    let (_deaf, url) = deaf().await;
    let sender = peers(1);
    sender.set_members(&[(RECEIVER, vec![url])]);
    let mut transport = sender.transport();
    let (_, stats) = sender.stats().remove(0);
    until(|| stats.connected_for().is_some()).await;

    let megabyte = Bytes::from(vec![0; 1 << 20]);
    let mut sent = 0;
    until(|| {
        transport.send(vec![append(&megabyte)]);
        sent += 1;
        stats.sent_failures() >= 100
    })
    .await;
    let (messages, bytes) = queued(&sender, &append(&megabyte));
    assert!(bytes < QUEUE_BYTES_MAX + (1 << 20), "the queue is full: {bytes}");
    // One frame is being encoded, one waits for room on the connection, one is partly in it.
    let underway = sent - 100 - messages;
    assert!(underway <= 3, "what has left the queue: {underway} of {sent}");
    // The other stream has its own queue.
    transport.send(vec![heartbeat()]);
    assert_eq!((stats.sent_failures(), stats.heartbeats_dropped()), (100, 0));
}
