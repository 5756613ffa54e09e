//! Our side of the connections to other members.

use std::future::Future;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::uri::PathAndQuery;
use tokio::sync::{Mutex, mpsc, watch};
use tonic::{Code, Request, Status};

use super::codec::RawCodec;
use super::link::{Link, with_sources};
use super::{Inner, PeerIdentity, PeerMessage, PeerStats, PeersConfig, size};
use crate::transport::wire;

pub(super) const MESSAGES: &str = "/tenure.peer.v1.Peer/Messages";
pub(super) const CALL: &str = "/tenure.peer.v1.Peer/Call";
pub(super) const MEMBERS: &str = "/tenure.peer.v1.Peer/Members";
pub(super) const FETCH: &str = "/tenure.peer.v1.Peer/Fetch";

pub(super) const FROM_HEADER: &str = "tenure-from";
pub(super) const TO_HEADER: &str = "tenure-to";
pub(super) const CLUSTER_HEADER: &str = "tenure-cluster";
pub(super) const VERSION_HEADER: &str = "tenure-peer-version";

/// What a member of another cluster is told.
pub(super) const OTHER_CLUSTER: &str = "cluster ID mismatch";

/// What a removed member is told, in etcd's words.
pub(super) const REMOVED: &str = "the member has been permanently removed from the cluster";

/// Pauses between attempts to connect: the first, and the longest.
const PAUSE_MIN: Duration = Duration::from_millis(20);
const PAUSE_MAX: Duration = Duration::from_millis(500);

/// Messages and bytes of one frame. A larger message goes alone.
const FRAME_MESSAGES_MAX: usize = 256;
const FRAME_BYTES_MAX: usize = 1 << 20;

/// How often the way to a member is measured.
const PROBE_PERIOD: Duration = Duration::from_secs(3);

/// Connections and streams read whatever the other sends: it is one of us.
const MESSAGE_BYTES_MAX: usize = usize::MAX;

/// Why a call has no answer.
#[derive(Clone, Debug, thiserror::Error)]
pub enum CallError {
    /// It did not get there, or its answer did not get back: whether it was executed is unknown.
    #[error("{0}")]
    Unreachable(String),
    /// The member refused, in the layer's own words.
    #[error("{0}")]
    Refused(Status),
}

pub(super) async fn connect(config: &PeersConfig, url: &str) -> Result<Link, CallError> {
    Link::open(config, url)
        .await
        .map_err(|error| CallError::Unreachable(format!("connect to {url}: {}", with_sources(&*error))))
}

/// A request with the names of both ends.
pub(super) fn named<T>(identity: PeerIdentity, to: u64, message: T) -> Request<T> {
    let mut request = Request::new(message);
    let PeerIdentity { member_id, cluster_id } = identity;
    for (name, id) in [(FROM_HEADER, member_id), (TO_HEADER, to), (CLUSTER_HEADER, cluster_id)] {
        let value = format!("{id:x}").parse().expect("hexadecimal digits are a header's value");
        request.metadata_mut().insert(name, value);
    }
    request.metadata_mut().insert(VERSION_HEADER, wire::PEER_VERSION.parse().expect("so is a digit"));
    request
}

fn grpc(link: Link) -> tonic::client::Grpc<Link> {
    tonic::client::Grpc::new(link)
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX)
}

pub(super) async fn ready(link: Link) -> Result<tonic::client::Grpc<Link>, CallError> {
    let mut grpc = grpc(link);
    grpc.ready().await.map_err(|error| CallError::Unreachable(error.message().to_owned()))?;
    Ok(grpc)
}

async fn connect_any(config: &PeersConfig, urls: &[String]) -> Result<Link, CallError> {
    let mut last = CallError::Unreachable("the member has no peer URL".to_owned());
    for url in urls {
        match connect(config, url).await {
            Ok(link) => return Ok(link),
            Err(error) => last = error,
        }
    }
    Err(last)
}

async fn unary(
    config: &PeersConfig,
    link: Link,
    to: u64,
    path: &'static str,
    request: Bytes,
) -> Result<Bytes, CallError> {
    let request = named(config.identity, to, request);
    let answer = ready(link).await?.unary(request, PathAndQuery::from_static(path), RawCodec).await;
    match answer {
        Ok(answer) => Ok(answer.into_inner()),
        Err(status) if status.code() == Code::Unavailable => Err(CallError::Unreachable(status.message().to_owned())),
        Err(status) => Err(CallError::Refused(status)),
    }
}

async fn within<T>(timeout: Duration, asked: impl Future<Output = Result<T, CallError>>) -> Result<T, CallError> {
    let late = || CallError::Unreachable("no answer in time".to_owned());
    tokio::time::timeout(timeout, asked).await.unwrap_or_else(|_| Err(late()))
}

/// Calls to one member share a connection.
#[derive(Default)]
pub(super) struct Caller(Mutex<Option<Link>>);

impl Caller {
    /// One request to a member at one of these URLs.
    pub(super) async fn call(
        &self,
        config: &PeersConfig,
        to: u64,
        urls: &[String],
        request: Bytes,
        timeout: Duration,
    ) -> Result<Bytes, CallError> {
        let asked = within(timeout, async {
            let link = {
                // Who comes meanwhile waits for the same connection.
                let mut kept = self.0.lock().await;
                match &*kept {
                    Some(link) if !link.is_closed() => link.clone(),
                    Some(_) | None => kept.insert(connect_any(config, urls).await?).clone(),
                }
            };
            unary(config, link, to, CALL, request).await
        });
        let answer = asked.await;
        if matches!(answer, Err(CallError::Unreachable(_))) {
            // It may have moved.
            self.0.lock().await.take();
        }
        answer
    }
}

/// Asks at a URL who is in the cluster: for a member that is about to join one. See [`Calls::members`](super::Calls::members).
///
/// # Errors
/// As [`Peers::call`](super::Peers::call).
pub async fn call_url(config: &PeersConfig, url: &str, timeout: Duration) -> Result<Bytes, CallError> {
    let asked = async { unary(config, connect(config, url).await?, 0, MEMBERS, Bytes::new()).await };
    within(timeout, asked).await
}

/// Whether the member at a URL is of another cluster than `config`'s; `None` if it does not say.
pub async fn is_of_other_cluster(config: &PeersConfig, url: &str, timeout: Duration) -> Option<bool> {
    let asked = async { unary(config, connect(config, url).await?, 0, CALL, Bytes::new()).await };
    match within(timeout, asked).await {
        // What it may have against us besides comes after that.
        Ok(_) => Some(false),
        Err(CallError::Refused(status)) => Some(status.message() == OTHER_CLUSTER),
        Err(CallError::Unreachable(_)) => None,
    }
}

/// One of the streams to a member.
pub(super) struct Stream {
    inner: Weak<Inner>,
    to: u64,
    urls: watch::Receiver<Vec<String>>,
    queue: mpsc::Receiver<PeerMessage>,
    queue_bytes: Arc<AtomicUsize>,
    stats: Arc<PeerStats>,
}

impl Stream {
    pub(super) fn new(
        inner: Weak<Inner>,
        to: u64,
        urls: watch::Receiver<Vec<String>>,
        queue: mpsc::Receiver<PeerMessage>,
        queue_bytes: Arc<AtomicUsize>,
        stats: &Arc<PeerStats>,
    ) -> Self {
        Stream { inner, to, urls, queue, queue_bytes, stats: Arc::clone(stats) }
    }

    /// Connects and sends until it is aborted.
    pub(super) async fn run(mut self) {
        let mut pause = PAUSE_MIN;
        let mut told = None;
        for attempt in 0.. {
            let urls = self.urls.borrow_and_update().clone();
            let Some(inner) = self.inner.upgrade() else { return };
            let began = Instant::now();
            let error = match urls.get(attempt % urls.len().max(1)) {
                Some(url) => self.connected(&inner.config, url).await,
                None => CallError::Unreachable("it has no peer URL".to_owned()),
            };
            self.stats.set_connected(false);
            let is_stranger = matches!(&error, CallError::Refused(status) if status.message() == OTHER_CLUSTER);
            self.stats.other_cluster.store(is_stranger, Ordering::Relaxed);
            self.stats.sent_failures.fetch_add(1, Ordering::Relaxed);
            if let Some(local) = inner.local() {
                local.report_unreachable(self.to);
                if matches!(&error, CallError::Refused(status) if status.message() == REMOVED) {
                    local.report_removed();
                }
            }
            // Once, and once for each reason that the other gives, not for each attempt.
            let reason = match &error {
                CallError::Unreachable(_) => String::new(),
                CallError::Refused(status) => status.message().to_owned(),
            };
            if told.as_ref() != Some(&reason) {
                tracing::warn!(peer = format!("{:x}", self.to), %error, "lost the connection to a peer");
                told = Some(reason);
            }
            if began.elapsed() > inner.config.timeout {
                pause = PAUSE_MIN;
                told = None;
            }
            drop(inner);
            self.drop_queued();
            // A new URL is tried at once.
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                changed = self.urls.changed() => if changed.is_err() { return },
            }
            pause = (2 * pause).min(PAUSE_MAX);
        }
    }

    /// Sends until the connection breaks. Gives why it did.
    async fn connected(&mut self, config: &PeersConfig, url: &str) -> CallError {
        let link = match connect(config, url).await {
            Ok(link) => link,
            Err(error) => return error,
        };
        let mut grpc = match ready(link).await {
            Ok(grpc) => grpc,
            Err(error) => return error,
        };
        self.stats.set_connected(true);
        // The queue stays here: what a broken connection has taken may be kept by its tasks for longer than the next one waits.
        let (frames, mut body) = mpsc::channel(1);
        let request = named(config.identity, self.to, futures::stream::poll_fn(move |context| body.poll_recv(context)));
        let ended = grpc.client_streaming(request, PathAndQuery::from_static(MESSAGES), RawCodec);
        let answer = tokio::select! {
            answer = ended => answer,
            () = self.pump(frames) => return CallError::Unreachable("the member is forgotten".to_owned()),
        };
        match answer {
            Ok(_) => CallError::Unreachable("it ended the stream".to_owned()),
            Err(status) if status.code() == Code::Unavailable => CallError::Unreachable(status.message().to_owned()),
            Err(status) => CallError::Refused(status),
        }
    }

    /// Hands on what is queued, frame by frame, each when the one before is on its way.
    async fn pump(&mut self, frames: mpsc::Sender<Bytes>) {
        loop {
            let Ok(room) = frames.reserve().await else {
                // The stream has ended, and says why.
                return std::future::pending().await;
            };
            let Some(frame) = next_frame(&mut self.queue, &self.queue_bytes).await else { return };
            self.stats.sent_bytes.fetch_add(frame.len() as u64, Ordering::Relaxed);
            room.send(frame);
        }
    }

    fn drop_queued(&mut self) {
        while let Ok(message) = self.queue.try_recv() {
            self.queue_bytes.fetch_sub(size(&message), Ordering::Relaxed);
            self.stats.sent_failures.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Waits for messages and takes those that are there.
async fn next_frame(queue: &mut mpsc::Receiver<PeerMessage>, queue_bytes: &AtomicUsize) -> Option<Bytes> {
    let mut messages = vec![queue.recv().await?];
    let mut bytes = size(messages.first()?);
    while messages.len() < FRAME_MESSAGES_MAX && bytes < FRAME_BYTES_MAX {
        let Ok(message) = queue.try_recv() else { break };
        bytes += size(&message);
        messages.push(message);
    }
    queue_bytes.fetch_sub(bytes, Ordering::Relaxed);
    Some(wire::encode(&messages))
}

/// Measures the way to a member, on a connection that it keeps.
pub(super) async fn probe(inner: Weak<Inner>, to: u64, urls: watch::Receiver<Vec<String>>, stats: Arc<PeerStats>) {
    let mut kept: Option<tonic::client::Grpc<Link>> = None;
    loop {
        tokio::time::sleep(PROBE_PERIOD).await;
        let Some(inner) = inner.upgrade() else { return };
        let url = urls.borrow().first().cloned().unwrap_or_default();
        if kept.is_none() {
            kept = match connect(&inner.config, &url).await {
                Ok(link) => ready(link).await.ok(),
                Err(_) => None,
            };
        }
        let Some(grpc) = &mut kept else { continue };
        let began = Instant::now();
        let request = named(inner.config.identity, to, Bytes::new());
        let asked = async {
            // The service wants to be asked before each request.
            grpc.ready().await?;
            grpc.unary(request, PathAndQuery::from_static(CALL), RawCodec).await
        };
        match tokio::time::timeout(inner.config.timeout, asked).await {
            Ok(Ok(_)) => stats.round_trip.observe(began.elapsed()),
            Ok(Err(_)) | Err(_) => kept = None,
        }
    }
}
