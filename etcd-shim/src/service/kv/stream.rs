//! RangeStream: a range in pieces, so that neither side holds it whole (contract 1.1 "RangeStream").
//!
//! Put together, the messages are what Range would have answered; header, `more` and `count` are in the last one only. The
//! revision is pinned by the first piece. Every further piece is a read of its own at that revision: if a compaction
//! passes it, the stream fails with the keys sent so far.
//!
//! One task per stream reads ahead of the client by [`CHUNKS_AHEAD_MAX`] pieces, not more: a client that stops reading
//! stops the task. It ends when the client goes away.

use std::pin::Pin;
use std::task::{Context as TaskContext, Poll};

use tenure_storage::{KeyRange, RangeRequest, SortTarget};
use tokio::sync::mpsc;
use tokio_stream::Stream;
use tonic::Status;

use super::read::{Counting, Read, read_range};
use crate::cell::Tenant;
use crate::cell_error::CellError;
use crate::convert::{from_proto, to_proto};
use crate::inflight::Reservation;
use crate::proto::etcdserverpb as pb;
use crate::service::{Context, header};
use crate::wire::RangeResponse;

/// Keys of the first piece: etcd's number.
const FIRST_CHUNK_KEYS: u64 = 10;

/// Pieces read and not yet taken by the connection, beside the one being read. One hides the time of a read behind the
/// sending of the piece before it; more would only be memory.
const CHUNKS_AHEAD_MAX: usize = 1;

/// One message with the bytes reserved for it.
struct Chunk {
    message: pb::RangeStreamResponse,
    reservation: Reservation,
}

/// The messages of one RangeStream call.
pub struct ChunkStream {
    /// Read before the call was answered, so that its errors are the call's.
    first: Option<Chunk>,
    rest: Option<mpsc::Receiver<Result<Chunk, Status>>>,
    /// Of the message handed out last: it is on its way until the next one is asked for.
    on_its_way: Option<Reservation>,
}

impl ChunkStream {
    /// Reads the first piece and starts reading ahead, if there is more.
    pub(super) async fn open(context: Context, tenant: Tenant, request: pb::RangeRequest) -> Result<Self, Status> {
        let in_one_message = request.limit < 0 || request.count_only;
        let mut request = from_proto::range(request)?;
        // An order of NONE passes with any target, and is key order.
        request.target = SortTarget::Key;
        let in_one_message = in_one_message || matches!(request.range, KeyRange::Single(_)) || request.range.is_empty();
        let mut chunks = Chunks::new(context, tenant, request, in_one_message);
        let first = chunks.next().await?;
        let rest = chunks.is_unfinished().then(|| chunks.read_ahead());
        Ok(ChunkStream { first: Some(first), rest, on_its_way: None })
    }

    fn hand_out(&mut self, chunk: Chunk) -> pb::RangeStreamResponse {
        self.on_its_way = Some(chunk.reservation);
        chunk.message
    }
}

impl Stream for ChunkStream {
    type Item = Result<pb::RangeStreamResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, task: &mut TaskContext<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        this.on_its_way = None;
        if let Some(first) = this.first.take() {
            return Poll::Ready(Some(Ok(this.hand_out(first))));
        }
        let Some(rest) = &mut this.rest else { return Poll::Ready(None) };
        rest.poll_recv(task).map(|item| item.map(|chunk| chunk.map(|chunk| this.hand_out(chunk))))
    }
}

/// The pieces of a range, one read after the other.
struct Chunks {
    context: Context,
    tenant: Tenant,
    /// What is still to be read; its revision is pinned by the first read.
    request: RangeRequest,
    state: State,
    /// Keys the next piece may have; `None` = all.
    chunk_keys: Option<u64>,
    /// Keys the client's limit leaves; `None` = no limit.
    keys_left: Option<u64>,
    keys_sent: u64,
    /// The final header's revision and, if the client's limit may cut the range, its exact count: both of the first read.
    from_first: Option<(i64, Option<u64>)>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Unfinished,
    Finished,
}

impl Chunks {
    fn new(context: Context, tenant: Tenant, request: RangeRequest, in_one_message: bool) -> Self {
        let keys_left = Some(request.limit).filter(|limit| *limit > 0);
        let chunk_keys = (!in_one_message).then_some(FIRST_CHUNK_KEYS);
        Chunks {
            context,
            tenant,
            request,
            state: State::Unfinished,
            chunk_keys,
            keys_left,
            keys_sent: 0,
            from_first: None,
        }
    }

    fn is_unfinished(&self) -> bool {
        self.state == State::Unfinished
    }

    /// Whether counting takes more than adding up what was sent.
    fn counting(&self) -> Counting {
        if self.keys_left.is_some() || self.request.count_only { Counting::Exact } else { Counting::Unwanted }
    }

    async fn next(&mut self) -> Result<Chunk, CellError> {
        let counting = self.counting();
        self.request.limit = match (self.chunk_keys, self.keys_left) {
            (Some(chunk), Some(left)) => chunk.min(left),
            (Some(keys), None) | (None, Some(keys)) => keys,
            (None, None) => 0,
        };
        let Read { summary, kvs, reservation } =
            read_range(&self.context.in_flight, &self.tenant, self.request.clone(), counting).await?;
        let exact = (counting == Counting::Exact).then_some(summary.count);
        let (revision, count) = *self.from_first.get_or_insert((summary.revision, exact));
        self.request.revision = Some(summary.read_revision);
        self.keys_sent += kvs.keys() as u64;
        self.keys_left = self.keys_left.map(|left| left.saturating_sub(kvs.keys() as u64));

        let mut response = RangeResponse { kvs, ..RangeResponse::default() };
        match summary.rest {
            Some(rest) if self.keys_left != Some(0) => {
                self.request.range = rest;
                self.adapt(response.kvs.len_bytes());
            }
            Some(_) | None => {
                self.state = State::Finished;
                response.header = Some(header(&self.tenant, revision));
                response.more = summary.more;
                response.count = to_proto::count(count.unwrap_or(self.keys_sent));
            }
        }
        Ok(Chunk { message: pb::RangeStreamResponse { range_response: Some(response) }, reservation })
    }

    /// Keeps pieces between half and twice the largest request.
    fn adapt(&mut self, chunk_bytes: usize) {
        let target = self.context.limits.max_request_bytes;
        self.chunk_keys = self.chunk_keys.map(|keys| {
            if chunk_bytes < target / 2 {
                keys.saturating_mul(2)
            } else if chunk_bytes > target.saturating_mul(2) {
                (keys / 2).max(1)
            } else {
                keys
            }
        });
    }

    fn read_ahead(mut self) -> mpsc::Receiver<Result<Chunk, Status>> {
        let (sender, receiver) = mpsc::channel(CHUNKS_AHEAD_MAX);
        tokio::spawn(async move {
            while self.is_unfinished() {
                let chunk = self.next().await.map_err(Status::from);
                let failed = chunk.is_err();
                // A client that has gone away wants nothing more.
                if sender.send(chunk).await.is_err() || failed {
                    return;
                }
            }
        });
        receiver
    }
}
