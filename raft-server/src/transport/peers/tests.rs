//! Streams through ways that break.
//!
//! Why: a member that was killed is dialled many times a second while it is away, and each attempt may break anywhere. One
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
