//! Members on a network: gRPC over HTTP/2, with TLS on both sides if it is configured.
//!
//! To each other member go two streams of frames (see the `wire` module), each on a connection of its own: one for what keeps the
//! group alive, one for entries and commands, so that a heartbeat never waits behind a megabyte. A task per stream
//! connects, sends what is queued, and connects again, with pauses that grow. The server's side of a stream hands messages to
//! the member. Beside the streams there are calls, whose meaning is the layer's above ([`Calls`]), and the fetching of
//! snapshots ([`fetch`]).
//!
//! Who talks. A stream names the cluster, the sender and the receiver; another cluster's, or a receiver that is not us, is
//! refused, and a member that was removed is told so. Names are only as good as the certificates: without TLS
//! anybody who reaches the port is believed.
//!
//! Bounds: a queue holds [`QUEUE_MESSAGES_MAX`] messages and [`QUEUE_BYTES_MAX`] bytes, beyond them messages are dropped; what is
//! queued for a member that cannot be reached is dropped too, it would be old news.

mod client;
mod codec;
mod fetch;
mod link;
mod server;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::{Mutex, RwLock};
use raft::eraftpb::MessageType;
use tokio::sync::{mpsc, watch};
use tokio::task::AbortHandle;

pub use self::client::{CallError, call_url, is_of_other_cluster};
pub use self::server::serve;
use super::{Local, PeerMessage, SendFromAnywhere, Transport};
use crate::handle::Handle;
use crate::metrics::{RoundTripHistogram, SnapshotHistogram};
use crate::snapshot::SnapshotOffer;

/// Messages that wait for one connection. Beyond: dropped.
pub const QUEUE_MESSAGES_MAX: usize = 4_096;

/// Their bytes. Beyond: dropped.
pub const QUEUE_BYTES_MAX: usize = 64 << 20;

/// How long after a heartbeat the next one is late, of a timeout that is the time for an election. etcd says two intervals; an election
/// takes five of them at least, so it is never less than that here.
fn heartbeats_late_after(timeout: Duration) -> Duration {
    timeout * 2 / 5
}

/// What this side is, to others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerIdentity {
    pub member_id: u64,
    pub cluster_id: u64,
}

/// Whom members trust and what they show. Asked for each connection, so that certificates may change while members run.
pub trait PeerTls: std::fmt::Debug + Send + Sync + 'static {
    /// For a connection that another member makes.
    fn server(&self) -> Arc<rustls::ServerConfig>;
    /// For a connection to another member.
    fn client(&self) -> Arc<rustls::ClientConfig>;
}

/// How others are reached.
#[derive(Clone)]
pub struct PeersConfig {
    pub identity: PeerIdentity,
    /// For `https` URLs.
    pub tls: Option<Arc<dyn PeerTls>>,
    /// A connection that takes longer, or that is silent for so long, counts as broken.
    pub timeout: Duration,
    /// Bytes of a snapshot sent to one member in a second. Default 128 MiB.
    pub snapshot_bytes_per_second: u64,
}

/// What the answer to a call is, later.
pub type CallFuture = Pin<Box<dyn Future<Output = Result<Bytes, tonic::Status>> + Send>>;

/// Answers the calls of other members.
pub trait Calls: Send + Sync + 'static {
    /// A call of the member `from`.
    fn call(&self, from: u64, request: Bytes) -> CallFuture;

    /// Of whoever is about to join, and does not know the cluster yet: who is in it.
    fn members(&self) -> CallFuture;

    /// Whether this member was in the group once and is not any more.
    fn is_removed(&self, id: u64) -> bool;
}

/// The other members. Cheap to clone.
#[derive(Clone)]
pub struct Peers(Arc<Inner>);

struct Inner {
    config: PeersConfig,
    runtime: tokio::runtime::Handle,
    members: RwLock<HashMap<u64, Arc<Peer>>>,
    /// The member itself; messages that come before it is there are dropped.
    local: OnceLock<Arc<dyn Local>>,
    calls: OnceLock<Arc<dyn Calls>>,
    fetching: Mutex<Option<AbortHandle>>,
}

/// One other member.
struct Peer {
    id: u64,
    urls: watch::Sender<Vec<String>>,
    /// For heartbeats, votes and read rounds; for everything else.
    queues: [Queue; 2],
    stats: Arc<PeerStats>,
    /// For calls; made when one is needed, and again when it is lost.
    caller: client::Caller,
    tasks: Mutex<Vec<AbortHandle>>,
}

struct Queue {
    sender: mpsc::Sender<PeerMessage>,
    bytes: Arc<AtomicUsize>,
}

/// What is counted of one other member.
#[derive(Debug, Default)]
pub struct PeerStats {
    /// `etcd_network_peer_sent_failures_total`: messages that were dropped, and connections that broke.
    sent_failures: AtomicU64,
    sent_bytes: AtomicU64,
    received_bytes: AtomicU64,
    /// `etcd_network_peer_received_failures_total`: streams of it that ended with an error or held what is no message.
    received_failures: AtomicU64,
    /// `etcd_network_disconnected_peers_total`.
    disconnections: AtomicU64,
    heartbeats_dropped: AtomicU64,
    heartbeats_late: AtomicU64,
    /// The term and the time of the last heartbeat for it.
    heartbeat: Mutex<Option<(u64, Instant)>>,
    connected: AtomicBool,
    connected_since: Mutex<Option<Instant>>,
    round_trip: RoundTripHistogram,
    /// Whether it said, when it was asked last, that it is of another cluster.
    other_cluster: AtomicBool,
    /// Of snapshots that this member sent to it, and that it got from it.
    pub sent_snapshots: SnapshotStats,
    pub received_snapshots: SnapshotStats,
}

/// Snapshots in one direction: `etcd_network_snapshot_*`.
#[derive(Debug, Default)]
pub struct SnapshotStats {
    succeeded: AtomicU64,
    failed: AtomicU64,
    began: Mutex<Option<Instant>>,
    duration: SnapshotHistogram,
}

impl SnapshotStats {
    pub fn succeeded(&self) -> u64 {
        self.succeeded.load(Ordering::Relaxed)
    }

    pub fn failed(&self) -> u64 {
        self.failed.load(Ordering::Relaxed)
    }

    pub fn is_inflight(&self) -> bool {
        self.began.lock().is_some()
    }

    pub fn duration(&self) -> &SnapshotHistogram {
        &self.duration
    }

    /// One is on its way; what began before goes on.
    fn begin(&self) {
        self.began.lock().get_or_insert_with(Instant::now);
    }

    fn end(&self, complete: bool) {
        if let Some(began) = self.began.lock().take() {
            self.duration.observe(began.elapsed());
            if complete { &self.succeeded } else { &self.failed }.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl PeerStats {
    pub fn sent_failures(&self) -> u64 {
        self.sent_failures.load(Ordering::Relaxed)
    }

    pub fn sent_bytes(&self) -> u64 {
        self.sent_bytes.load(Ordering::Relaxed)
    }

    pub fn received_bytes(&self) -> u64 {
        self.received_bytes.load(Ordering::Relaxed)
    }

    pub fn received_failures(&self) -> u64 {
        self.received_failures.load(Ordering::Relaxed)
    }

    /// How often our streams to it were lost.
    pub fn disconnections(&self) -> u64 {
        self.disconnections.load(Ordering::Relaxed)
    }

    /// Heartbeats that were dropped before they were sent: a part of `etcd_server_heartbeat_send_failures_total`.
    pub fn heartbeats_dropped(&self) -> u64 {
        self.heartbeats_dropped.load(Ordering::Relaxed)
    }

    /// Heartbeats that went out late after the one before: the other part.
    pub fn heartbeats_late(&self) -> u64 {
        self.heartbeats_late.load(Ordering::Relaxed)
    }

    /// A heartbeat of this term goes out, as those of its leader do one after the other.
    fn observe_heartbeat(&self, term: u64, now: Instant, late_after: Duration) {
        let before = self.heartbeat.lock().replace((term, now));
        let is_late = before.is_some_and(|(led, sent)| led == term && now.saturating_duration_since(sent) > late_after);
        self.heartbeats_late.fetch_add(u64::from(is_late), Ordering::Relaxed);
    }

    /// Whether it said, when it was asked last, that it is of another cluster.
    pub fn is_of_other_cluster(&self) -> bool {
        self.other_cluster.load(Ordering::Relaxed)
    }

    /// For how long our streams to it have been up; `None` if they are not.
    pub fn connected_for(&self) -> Option<Duration> {
        self.connected_since.lock().map(|since| since.elapsed())
    }

    pub fn round_trip(&self) -> &RoundTripHistogram {
        &self.round_trip
    }

    fn set_connected(&self, connected: bool) {
        let mut since = self.connected_since.lock();
        if connected != self.connected.swap(connected, Ordering::Relaxed) {
            *since = connected.then(Instant::now);
            self.disconnections.fetch_add(u64::from(!connected), Ordering::Relaxed);
        }
    }
}

impl Peers {
    /// Nobody yet. Its tasks run on `runtime`.
    pub fn new(config: PeersConfig, runtime: tokio::runtime::Handle) -> Self {
        Peers(Arc::new(Inner {
            config,
            runtime,
            members: RwLock::default(),
            local: OnceLock::new(),
            calls: OnceLock::new(),
            fetching: Mutex::new(None),
        }))
    }

    /// What raft's thread sends through.
    pub fn transport(&self) -> PeerTransport {
        PeerTransport(self.clone())
    }

    /// From now on messages of others reach this member. Once.
    pub fn attach<R: Send + 'static>(&self, handle: &Handle<R>) {
        let attached = self.0.local.set(Arc::new(handle.clone()));
        assert!(attached.is_ok(), "one member has one set of peers");
    }

    /// From now on calls of others are answered by this. Once.
    pub fn answer_calls(&self, calls: Arc<dyn Calls>) {
        let set = self.0.calls.set(calls);
        assert!(set.is_ok(), "calls are answered in one place");
    }

    /// Who the others are, by id, and where. Those who are not named any more are forgotten.
    pub fn set_members(&self, members: &[(u64, Vec<String>)]) {
        let own = self.0.config.identity.member_id;
        let mut known = self.0.members.write();
        known.retain(|id, peer| {
            let kept = members.iter().any(|(named, _)| named == id);
            if !kept {
                peer.end();
            }
            kept
        });
        for (id, urls) in members.iter().filter(|(id, _)| *id != own) {
            match known.get(id) {
                Some(peer) => drop(peer.urls.send_if_modified(|before| {
                    let changed = before != urls;
                    before.clone_from(urls);
                    changed
                })),
                None => drop(known.insert(*id, self.begin(*id, urls.clone()))),
            }
        }
    }

    fn begin(&self, id: u64, urls: Vec<String>) -> Arc<Peer> {
        let mut receivers = Vec::new();
        let queues = std::array::from_fn(|_| {
            let (sender, receiver) = mpsc::channel(QUEUE_MESSAGES_MAX);
            let bytes = Arc::new(AtomicUsize::new(0));
            receivers.push((receiver, Arc::clone(&bytes)));
            Queue { sender, bytes }
        });
        let stats = Arc::new(PeerStats::default());
        let urls = watch::Sender::new(urls);
        let mut tasks: Vec<AbortHandle> = Vec::new();
        for (receiver, bytes) in receivers {
            let stream = client::Stream::new(Arc::downgrade(&self.0), id, urls.subscribe(), receiver, bytes, &stats);
            tasks.push(self.0.runtime.spawn(stream.run()).abort_handle());
        }
        let probe = client::probe(Arc::downgrade(&self.0), id, urls.subscribe(), Arc::clone(&stats));
        tasks.push(self.0.runtime.spawn(probe).abort_handle());
        Arc::new(Peer { id, urls, queues, stats, caller: client::Caller::default(), tasks: Mutex::new(tasks) })
    }

    /// What is counted of each other member, by growing id.
    pub fn stats(&self) -> Vec<(u64, Arc<PeerStats>)> {
        let members = self.0.members.read();
        let mut stats: Vec<_> = members.values().map(|peer| (peer.id, Arc::clone(&peer.stats))).collect();
        stats.sort_unstable_by_key(|(id, _)| *id);
        stats
    }

    /// Asks another member something.
    ///
    /// # Errors
    /// [`CallError`]: whether it got there is unknown unless it says so.
    pub async fn call(&self, to: u64, request: Bytes, timeout: Duration) -> Result<Bytes, CallError> {
        let peer = self.0.members.read().get(&to).cloned();
        let peer = peer.ok_or_else(|| CallError::Unreachable(format!("member {to:x} is not known")))?;
        let urls = peer.urls.borrow().clone();
        peer.caller.call(&self.0.config, to, &urls, request, timeout).await
    }

    /// Ends every connection to others and forgets them.
    pub fn stop(&self) {
        if let Some(fetching) = self.0.fetching.lock().take() {
            fetching.abort();
        }
        for (_, peer) in self.0.members.write().drain() {
            peer.end();
        }
    }
}

impl Inner {
    fn local(&self) -> Option<&Arc<dyn Local>> {
        self.local.get()
    }

    fn send(&self, messages: impl IntoIterator<Item = PeerMessage>) {
        let (members, late_after) = (self.members.read(), heartbeats_late_after(self.config.timeout));
        for message in messages {
            if let Some(peer) = members.get(&message.to()) {
                peer.send(message, late_after);
            }
        }
    }

    fn stats_of(&self, id: u64) -> Option<Arc<PeerStats>> {
        self.members.read().get(&id).map(|peer| Arc::clone(&peer.stats))
    }
}

impl Peer {
    fn end(&self) {
        for task in self.tasks.lock().drain(..) {
            task.abort();
        }
    }

    fn send(&self, message: PeerMessage, late_after: Duration) {
        let queue = &self.queues[usize::from(is_bulk(&message))];
        let bytes = size(&message);
        let heartbeat = heartbeat_term(&message);
        if let Some(term) = heartbeat {
            self.stats.observe_heartbeat(term, Instant::now(), late_after);
        }
        if queue.bytes.fetch_add(bytes, Ordering::Relaxed) > QUEUE_BYTES_MAX || queue.sender.try_send(message).is_err()
        {
            queue.bytes.fetch_sub(bytes, Ordering::Relaxed);
            self.stats.sent_failures.fetch_add(1, Ordering::Relaxed);
            self.stats.heartbeats_dropped.fetch_add(u64::from(heartbeat.is_some()), Ordering::Relaxed);
        }
    }
}

/// The term of its leader, if it is a heartbeat.
fn heartbeat_term(message: &PeerMessage) -> Option<u64> {
    match message {
        PeerMessage::Raft(message) => (message.get_msg_type() == MessageType::MsgHeartbeat).then_some(message.term),
        PeerMessage::Forward(_) | PeerMessage::Forwarded(_) => None,
    }
}

fn is_bulk(message: &PeerMessage) -> bool {
    match message {
        PeerMessage::Raft(message) => {
            matches!(message.get_msg_type(), MessageType::MsgAppend | MessageType::MsgAppendResponse)
        }
        PeerMessage::Forward(_) | PeerMessage::Forwarded(_) => true,
    }
}

/// What a message counts for in its queue, in bytes.
fn size(message: &PeerMessage) -> usize {
    const AROUND_BYTES: usize = 64;
    AROUND_BYTES
        + match message {
            PeerMessage::Raft(message) => message.entries.iter().map(crate::log::entry_bytes).sum(),
            PeerMessage::Forward(message) => message.commands.iter().map(|(_, _, command)| command.len() + 16).sum(),
            PeerMessage::Forwarded(message) => message.refused.len() * 8,
        }
}

/// What raft's thread sends through; see [`Peers`].
pub struct PeerTransport(Peers);

/// The member has it, and the peers have the member; so it does not keep them.
struct Sender(Weak<Inner>);

impl SendFromAnywhere for Sender {
    fn send(&self, message: PeerMessage) {
        if let Some(inner) = self.0.upgrade() {
            inner.send([message]);
        }
    }
}

impl Transport for PeerTransport {
    fn send(&mut self, messages: Vec<PeerMessage>) {
        self.0.0.send(messages);
    }

    fn sender(&self) -> Option<Arc<dyn SendFromAnywhere>> {
        Some(Arc::new(Sender(Arc::downgrade(&self.0.0))))
    }

    fn fetch(&mut self, offer: SnapshotOffer) {
        let inner = Arc::clone(&self.0.0);
        let urls = inner.members.read().get(&offer.from).map(|peer| peer.urls.borrow().clone()).unwrap_or_default();
        let task = inner.runtime.spawn(fetch::run(Arc::downgrade(&inner), offer, urls));
        if let Some(before) = inner.fetching.lock().replace(task.abort_handle()) {
            before.abort();
        }
    }
}

#[cfg(test)]
mod heartbeat_tests {
    use super::*;

    // A leader whose disk or processors are too slow for its heartbeats is about to lose its followers.
    #[test]
    fn late_heartbeats_are_counted_while_one_leader_sends_them() {
        let (stats, start) = (PeerStats::default(), Instant::now());
        let late_after = heartbeats_late_after(Duration::from_secs(1));
        let mut at = start;
        for (term, after_ms, late) in
            [(3, 0, 0), (3, 100, 0), (3, 400, 0), (3, 401, 1), (5, 9_000, 1), (5, 100, 1), (5, 500, 2)]
        {
            at += Duration::from_millis(after_ms);
            stats.observe_heartbeat(term, at, late_after);
            assert_eq!(stats.heartbeats_late(), late, "{after_ms} ms later, in term {term}");
        }
    }
}
