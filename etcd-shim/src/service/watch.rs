//! `etcdserverpb.Watch`: one client stream with any number of watchers (contract 1.2).
//!
//! A client's messages are a [`Responses`] stream, which the connection polls when it can send. It holds storage's
//! [`WatchStream`], and each poll moves on whatever can be moved: a request of the client, a step of replay, the periodic
//! progress; then it hands out the next message. There is no task and no channel of its own: the queue inside `WatchStream` is the
//! only one, so a client that does not read costs that queue and is not polled, and its watchers fall behind and replay
//! later.
//!
//! What wakes it: the hub when it queues something (through [`futures::task::AtomicWaker`]), the client's next request, the
//! end of a replay step, the progress timer, the loss of the leader. The waker is stored before the queue is looked at, so
//! nothing queued is slept over.
//!
//! A step of replay needs room for what it finds, as ranges do, and its message takes that along. Each response is counted until it has
//! left: until the encoder, which collects small ones, asks for more with nothing collected.
//!
//! Order is kept because everything for a client goes through the one queue. The pieces of a fragmented response go out
//! before the queue is looked at again, so they are contiguous. Requests are read one per message, and not at all while the
//! queue is full, so neither events nor requests starve the other.
//!
//! A client that half-closes goes on receiving. A stopping server sends nothing: the connection ends.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context as TaskContext, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures::task::AtomicWaker;
use prost::Message;
use rand::Rng;
use tenure_storage::watch::{NoRoom, ReplayPlan, ReplayPosition, ReplayRoom};
use tenure_storage::{CreateRefusal, Fault, KeyRange, RocksEngine, WatchMessage, WatchSpec, WatchStream};
use tokio::runtime::Handle;
use tokio::task::JoinHandle;
use tokio::time::{Instant, Interval, MissedTickBehavior};
use tokio_stream::Stream;
use tonic::{Request, Response, Status, Streaming};

use crate::cell::Tenant;
use crate::cell_error::CellError;
use crate::convert::from_proto;
use crate::inflight::{InFlight, Reservation, Short};
use crate::proto::etcdserverpb::watch_create_request::FilterType;
use crate::proto::etcdserverpb::watch_request::RequestUnion;
use crate::proto::etcdserverpb::watch_server::Watch;
use crate::proto::etcdserverpb::{WatchCancelRequest, WatchCreateRequest, WatchRequest};
use crate::service::{Context, header, wants_leader};
use crate::status::in_etcds_words;
use crate::wire::{WatchResponse, encode_events, split_events};

/// Periodic progress unless `--watch-progress-notify-interval` says otherwise.
pub const PROGRESS_PERIOD_DEFAULT: Duration = Duration::from_secs(10 * 60);

/// The shortest period; shorter ones are raised to it.
pub const PROGRESS_PERIOD_MIN: Duration = Duration::from_millis(100);

/// What etcd allows a response over the largest request: one event of the largest request and its frame fit.
const FRAGMENT_OVERHEAD_BYTES: usize = 512 << 10;

/// From so many bytes on the encoder hands on what it has collected. tonic's default.
const ENCODER_BYTES: usize = 32 << 10;

/// gRPC's, before each message.
const FRAME_HEADER_BYTES: usize = 5;

/// Before a replay step that found no room on the reading threads is tried again.
pub(crate) const REPLAY_RETRY_AFTER: Duration = Duration::from_millis(100);

/// Steps of a poll that bring nothing to send, before other streams get their turn: a client may send requests that are
/// not answered as fast as they can be read.
const SILENT_STEPS_MAX: usize = 128;

/// The key that an empty key in a create request stands for.
const SMALLEST_KEY: &[u8] = b"\0";

/// The Watch service.
#[derive(Clone)]
pub struct WatchService {
    context: Context,
    progress_period: Duration,
}

impl WatchService {
    /// A `progress_period` of zero is the default.
    pub fn new(context: Context, progress_period: Duration) -> Self {
        let progress_period =
            if progress_period.is_zero() { PROGRESS_PERIOD_DEFAULT } else { progress_period.max(PROGRESS_PERIOD_MIN) };
        WatchService { context, progress_period }
    }
}

#[tonic::async_trait]
impl Watch for WatchService {
    type WatchStream = Responses<Streaming<WatchRequest>>;

    async fn watch(&self, request: Request<Streaming<WatchRequest>>) -> Result<Response<Self::WatchStream>, Status> {
        let tenant = self.context.tenant_of(&request)?;
        let options = Options {
            progress_period: self.progress_period,
            response_bytes_max: self.context.limits.max_request_bytes.saturating_add(FRAGMENT_OVERHEAD_BYTES),
            wants_leader: wants_leader(request.metadata()),
            in_flight: self.context.in_flight.clone(),
        };
        Ok(Response::new(Responses::new(tenant, request.into_inner(), options)))
    }
}

struct Options {
    progress_period: Duration,
    /// From this size on a response goes in pieces, if the client can put them together.
    response_bytes_max: usize,
    /// The client asked to be cut off when no leader is known.
    wants_leader: bool,
    /// Where responses on their way are counted.
    in_flight: InFlight,
}

/// What a stream waits for beside the client and the hub.
type Waiting<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// The messages of one Watch call.
pub struct Responses<R> {
    response_bytes_max: usize,
    /// `None` once the client has half-closed.
    requests: Option<R>,
    watchers: Arc<WatchStream<RocksEngine>>,
    hub_signal: Arc<AtomicWaker>,
    replay: Option<AbortOnDrop>,
    /// By the watcher that had no room last.
    wanted: Option<Wanted>,
    progress: Interval,
    leader_lost: Option<Waiting<()>>,
    /// What is left of a response that goes in pieces.
    pieces: VecDeque<WatchResponse>,
    in_flight: InFlight,
    /// Of the responses that may not have left.
    on_its_way: Vec<Arc<dyn ReplayRoom>>,
    /// Bytes that the encoder has collected of them.
    collected_bytes: usize,
    /// Set while the next response does not fit into what may be in flight, with what there is too little of.
    room: Option<(Option<Short>, Waiting<()>)>,
    // Behind the watchers, which have files open: the last owner of the cell unlocks the data directory.
    tenant: Tenant,
}

/// Whether a part of the stream has done something, so that it is worth asking again.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Advance {
    Moved,
    Waits,
}

impl<R: Stream<Item = Result<WatchRequest, Status>> + Unpin> Responses<R> {
    fn new(tenant: Tenant, requests: R, options: Options) -> Self {
        let hub_signal = Arc::new(AtomicWaker::new());
        let signal = Arc::clone(&hub_signal);
        let watchers = Arc::new(tenant.reader().watch_stream(Arc::new(move || signal.wake())));
        let leader_lost = options.wants_leader.then(|| {
            let tenant = tenant.clone();
            Box::pin(async move { tenant.leader_lost().await }) as Waiting<()>
        });
        Responses {
            tenant,
            response_bytes_max: options.response_bytes_max,
            requests: Some(requests),
            watchers,
            hub_signal,
            replay: None,
            wanted: None,
            progress: progress_timer(options.progress_period),
            leader_lost,
            pieces: VecDeque::new(),
            in_flight: options.in_flight,
            on_its_way: Vec::new(),
            collected_bytes: 0,
            room: None,
        }
    }

    /// Reads one request, unless the client is not taking its answers.
    fn advance_requests(&mut self, task: &mut TaskContext<'_>) -> Result<Advance, Status> {
        let Some(requests) = &mut self.requests else { return Ok(Advance::Waits) };
        if self.watchers.is_saturated() {
            // There are messages to hand out, so this is asked again.
            return Ok(Advance::Waits);
        }
        match Pin::new(requests).poll_next(task) {
            Poll::Ready(Some(Ok(request))) => self.handle(request),
            Poll::Ready(Some(Err(status))) => return Err(in_etcds_words(status)),
            Poll::Ready(None) => self.requests = None,
            Poll::Pending => return Ok(Advance::Waits),
        }
        Ok(Advance::Moved)
    }

    fn handle(&self, request: WatchRequest) {
        match request.request_union {
            Some(RequestUnion::CreateRequest(request)) => self.watchers.create(spec(request)),
            Some(RequestUnion::CancelRequest(WatchCancelRequest { watch_id })) => self.watchers.cancel(watch_id),
            Some(RequestUnion::ProgressRequest(_)) => self.watchers.request_progress(),
            None => {}
        }
    }

    /// One step of replay at a time, for the watchers that are behind in turn.
    fn advance_replay(&mut self, task: &mut TaskContext<'_>) -> Result<Advance, Status> {
        if self.replay.is_none() {
            let Some(plan) = self.watchers.plan_replay() else { return Ok(Advance::Waits) };
            let (tenant, in_flight) = (self.tenant.clone(), self.in_flight.clone());
            let step = Step { watchers: Arc::clone(&self.watchers), in_flight, tenant };
            // A task of its own: this stream is not polled while its client takes nothing, and a step holds what others wait for.
            let wanted = self.wanted.filter(|wanted| wanted.at == plan.position());
            self.replay = Some(AbortOnDrop(tokio::spawn(step.run(plan, wanted))));
        }
        let Some(replay) = &mut self.replay else { return Ok(Advance::Waits) };
        match Pin::new(replay).poll(task) {
            Poll::Ready(Ok(wanted)) => {
                self.replay = None;
                self.wanted = wanted.or(self.wanted);
                Ok(Advance::Moved)
            }
            Poll::Ready(Err(fault)) => Err(self.tenant.report(fault).into()),
            Poll::Pending => Ok(Advance::Waits),
        }
    }

    fn advance_timers(&mut self, task: &mut TaskContext<'_>) -> Result<Advance, Status> {
        if let Some(lost) = &mut self.leader_lost
            && lost.as_mut().poll(task).is_ready()
        {
            return Err(CellError::NoLeader.into());
        }
        if self.progress.poll_tick(task).is_ready() {
            self.watchers.tick_progress();
            return Ok(Advance::Moved);
        }
        Ok(if self.watchers.tell_progress() { Advance::Moved } else { Advance::Waits })
    }

    fn advance(&mut self, task: &mut TaskContext<'_>) -> Result<Advance, Status> {
        let steps = [self.advance_requests(task)?, self.advance_replay(task)?, self.advance_timers(task)?];
        Ok(if steps.contains(&Advance::Moved) { Advance::Moved } else { Advance::Waits })
    }

    /// Reserves the next message's bytes. Where there is no room it stays in the watchers' queue, whose events are shared and
    /// whose bound turns watchers unsynced; the task is woken when there may be.
    fn reserve(&mut self, task: &mut TaskContext<'_>) -> Option<Reservation> {
        let bytes = self.watchers.next_bytes()?;
        let mut reservation = self.in_flight.of(&self.tenant);
        while !reservation.try_reach(bytes) {
            let short = reservation.short();
            let before = self.room.take_if(|(of, _)| *of == short);
            let is_new = before.is_none();
            let mut room = before.map_or_else(|| Box::pin(reservation.room()) as Waiting<()>, |(_, room)| room);
            if room.as_mut().poll(task).is_ready() {
                continue;
            }
            self.room = Some((short, room));
            if !is_new {
                return None;
            }
        }
        self.room = None;
        reservation.settle(bytes);
        Some(reservation)
    }

    fn next_response(&mut self, task: &mut TaskContext<'_>) -> Option<WatchResponse> {
        if let Some(piece) = self.pieces.pop_front() {
            return Some(piece);
        }
        let reservation = self.reserve(task)?;
        let message = self.watchers.pop()?;
        if !reservation.is_empty() {
            self.on_its_way.push(Arc::new(reservation));
        }
        if let WatchMessage::Events { room: Some(room), .. } = &message {
            self.on_its_way.push(Arc::clone(room));
        }
        let (mut response, fragment) = response(&self.tenant, message);
        if fragment && response.encoded_len() >= self.response_bytes_max {
            self.pieces = cut(&response, self.response_bytes_max);
            response = self.pieces.pop_front().unwrap_or(response);
        }
        Some(response)
    }
}

impl<R: Stream<Item = Result<WatchRequest, Status>> + Unpin> Stream for Responses<R> {
    type Item = Result<WatchResponse, Status>;

    fn poll_next(self: Pin<&mut Self>, task: &mut TaskContext<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        if this.collected_bytes == 0 && this.pieces.is_empty() {
            this.on_its_way.clear();
        }
        this.hub_signal.register(task.waker());
        for _ in 0..SILENT_STEPS_MAX {
            let advance = match this.advance(task) {
                Ok(advance) => advance,
                Err(status) => return Poll::Ready(Some(Err(status))),
            };
            if let Some(response) = this.next_response(task) {
                this.collected_bytes += FRAME_HEADER_BYTES + response.encoded_len();
                if this.collected_bytes >= ENCODER_BYTES {
                    this.collected_bytes = 0;
                }
                return Poll::Ready(Some(Ok(response)));
            }
            if advance == Advance::Waits {
                this.collected_bytes = 0;
                return Poll::Pending;
            }
        }
        this.collected_bytes = 0;
        task.waker().wake_by_ref();
        Poll::Pending
    }
}

/// A stream may have very many watchers, and this runs on a thread that serves connections.
impl<R> Drop for Responses<R> {
    fn drop(&mut self) {
        let Some(mut closing) = self.watchers.close() else { return };
        if closing.step()
            && let Ok(runtime) = Handle::try_current()
        {
            runtime.spawn(async move {
                while closing.step() {
                    tokio::task::yield_now().await;
                }
            });
        }
    }
}

/// Ticks every period and up to a tenth more, so that the streams of a client do not tick together.
fn progress_timer(period: Duration) -> Interval {
    let period = period + period.mul_f64(rand::rng().random_range(0.0..0.1));
    let mut timer = tokio::time::interval_at(Instant::now() + period, period);
    timer.set_missed_tick_behavior(MissedTickBehavior::Delay);
    timer
}

/// A task that ends with whoever waits for it.
struct AbortOnDrop(JoinHandle<Result<Option<Wanted>, Fault>>);

impl Future for AbortOnDrop {
    type Output = Result<Option<Wanted>, Fault>;

    fn poll(mut self: Pin<&mut Self>, task: &mut TaskContext<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.0).poll(task).map(|ended| match ended {
            Ok(ended) => ended,
            Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
            // The runtime ends.
            Err(_) => Ok(None),
        })
    }
}

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// What a step of replay reads with.
struct Step {
    watchers: Arc<WatchStream<RocksEngine>>,
    in_flight: InFlight,
    // Last, as in `Responses`.
    tenant: Tenant,
}

/// The room that a watcher needs before its next revision can be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Wanted {
    at: ReplayPosition,
    bytes: usize,
}

impl Step {
    /// One step. That it returns does not mean that the watcher has moved: nobody else knows that it is behind, so it has its turn again.
    /// Then what it answers here is waited for first: nothing is read twice while there is no room.
    async fn run(self, plan: ReplayPlan, mut wanted: Option<Wanted>) -> Result<Option<Wanted>, Fault> {
        let plan = Arc::new(plan);
        let mut room = self.in_flight.of(&self.tenant);
        loop {
            if let Some(wanted) = wanted
                && let Err(error) = room.wait_for_replay(wanted.bytes).await
            {
                tracing::debug!(tenant = %self.tenant.id(), %error, "room for a replay");
                return Ok(Some(wanted));
            }
            let (read, watchers) = (Arc::clone(&plan), Arc::clone(&self.watchers));
            let turn = self.tenant.replay_turn().await;
            let replayed = self.tenant.read(move |_| watchers.replay(&read, room)).await;
            drop(turn);
            match replayed {
                Ok(Ok(Ok(()))) => return Ok(None),
                Ok(Ok(Err(NoRoom { room: had, bytes }))) => {
                    room = had;
                    wanted = Some(Wanted { at: plan.position(), bytes });
                }
                Ok(Err(fault)) => return Err(fault),
                Err(error) => {
                    tracing::debug!(tenant = %self.tenant.id(), %error, "replay for a watch stream");
                    tokio::time::sleep(REPLAY_RETRY_AFTER).await;
                    return Ok(wanted);
                }
            }
        }
    }
}

fn spec(request: WatchCreateRequest) -> WatchSpec {
    let filters = |wanted: FilterType| request.filters.contains(&i32::from(wanted));
    let (no_put, no_delete) = (filters(FilterType::Noput), filters(FilterType::Nodelete));
    WatchSpec {
        range: watched_range(request.key, request.range_end),
        start_revision: request.start_revision,
        prev_kv: request.prev_kv,
        no_put,
        no_delete,
        progress_notify: request.progress_notify,
        fragment: request.fragment,
        watch_id: request.watch_id,
    }
}

/// As every request spells a range, except that an empty key is the smallest one.
fn watched_range(key: Bytes, range_end: Bytes) -> KeyRange {
    let key = if key.is_empty() { Bytes::from_static(SMALLEST_KEY) } else { key };
    from_proto::key_range(key, range_end)
}

fn refusal_text(reason: CreateRefusal) -> &'static str {
    match reason {
        CreateRefusal::Compacted => "etcdserver: mvcc: required revision has been compacted",
        CreateRefusal::EmptyRange => "mvcc: watcher range is empty",
        CreateRefusal::Duplicate => "mvcc: duplicate watch ID provided on the WatchStream",
        CreateRefusal::TooMany => "etcdserver: too many requests",
    }
}

/// A message as its client sees it, and whether it may go in pieces.
fn response(tenant: &Tenant, message: WatchMessage) -> (WatchResponse, bool) {
    let of = |watch_id, revision| WatchResponse {
        header: Some(header(tenant, revision)),
        watch_id,
        ..WatchResponse::default()
    };
    match message {
        WatchMessage::Created { watch_id, revision } => {
            (WatchResponse { created: true, ..of(watch_id, revision) }, false)
        }
        WatchMessage::Refused { reason, revision } => {
            let cancel_reason = refusal_text(reason).to_string();
            (WatchResponse { created: true, canceled: true, cancel_reason, ..of(-1, revision) }, false)
        }
        WatchMessage::Events { watch_id, revision, fragment, batch, .. } => {
            let several = batch.events.len() > 1;
            (WatchResponse { events: batch.encoded(encode_events), ..of(watch_id, revision) }, fragment && several)
        }
        WatchMessage::Canceled { watch_id, revision } => {
            (WatchResponse { canceled: true, ..of(watch_id, revision) }, false)
        }
        // The client takes the revision to start over from out of compact_revision: the header has none.
        WatchMessage::Compacted { watch_id, compact_revision } => {
            (WatchResponse { canceled: true, compact_revision, ..of(watch_id, 0) }, false)
        }
        WatchMessage::Progress { watch_id, revision } => (of(watch_id, revision), false),
    }
}

/// A response in pieces that are each below the limit, unless a single event is not. All but the last say that more
/// follows.
fn cut(response: &WatchResponse, response_bytes_max: usize) -> VecDeque<WatchResponse> {
    let frame_bytes = response.encoded_len() - response.events.len();
    let pieces = split_events(&response.events, response_bytes_max.saturating_sub(frame_bytes));
    let last = pieces.len().saturating_sub(1);
    let piece = |(position, events)| WatchResponse {
        header: response.header,
        watch_id: response.watch_id,
        fragment: position < last,
        events,
        ..WatchResponse::default()
    };
    pieces.into_iter().enumerate().map(piece).collect()
}

#[cfg(test)]
mod tests;
