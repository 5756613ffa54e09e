//! Answers made of stored bytes.
//!
//! Storage keeps a version exactly as clients receive it, so the large answers are assembled by copying: what a range read
//! hands out is framed as a `kvs` entry and appended to a [`KvRope`], what a watcher is told is framed once as `events`
//! entries and shared by all watchers of the range. No value is decoded on its way out.
//!
//! These types stand in for the generated ones (see `build.rs`), so they are protobuf messages like any other and may be
//! part of another message: a [`RangeResponse`] inside a txn's, a [`StoredKeyValue`] as `prev_kv`.
//!
//! Memory of a large range: the rope grows in chunks, and nothing is moved when it grows. The chunks of a Range's answer leave as they are
//! ([`RangeResponse::take_large`]): the gate puts them behind what gRPC's codec has made of the rest. Where they cannot, because the answer is
//! compressed, [`RangeResponse::encode_draining`] gives each chunk back as soon as it is copied into the buffer that goes out. So the answer is
//! in memory once, and one chunk twice at most. Inside another message, of a txn or a stream, a range is copied whole; both are bounded.
//!
//! Left out: reading an answer back is possible (prost asks for it, tests use it) but copies and is not fast.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use prost::DecodeError;
use prost::Message;
use prost::encoding::{self, DecodeContext, WireType, encode_key, encode_varint, encoded_len_varint, key_len};
use tenure_storage::{Event, EventKind};

use crate::proto::etcdserverpb::ResponseHeader;

/// Smallest chunk of a rope in bytes: a point read of a small object makes one allocation of this size.
const CHUNK_BYTES_MIN: usize = 1 << 10;

/// Largest chunk of a rope in bytes, unless a single entry is larger: what a draining encoder holds twice, and what a piece that a client does not
/// read keeps.
const CHUNK_BYTES_MAX: usize = 1 << 20;

/// From how many bytes on keys are not copied on their way out. Of less a copy costs little, and the chunks are many.
const LARGE_BYTES: usize = 256 << 10;

/// And below how many. What gRPC's frames have no length for, twice as much, is its codec's to refuse.
const LARGE_BYTES_MAX: usize = 2 << 30;

const RANGE_HEADER: u32 = 1;
const RANGE_KVS: u32 = 2;
const RANGE_MORE: u32 = 3;
const RANGE_COUNT: u32 = 4;

const WATCH_HEADER: u32 = 1;
const WATCH_ID: u32 = 2;
const WATCH_CREATED: u32 = 3;
const WATCH_CANCELED: u32 = 4;
const WATCH_COMPACT_REVISION: u32 = 5;
const WATCH_CANCEL_REASON: u32 = 6;
const WATCH_FRAGMENT: u32 = 7;
const WATCH_EVENTS: u32 = 11;

const EVENT_TYPE: u32 = 1;
const EVENT_KV: u32 = 2;
const EVENT_PREV_KV: u32 = 3;

/// `Event.type` of a delete; a put's is 0 and left out.
const EVENT_TYPE_DELETE: u64 = 1;

/// One `mvccpb.KeyValue` as it is stored.
#[derive(Clone, Default, PartialEq, Eq, Hash)]
pub struct StoredKeyValue(pub Bytes);

impl std::fmt::Debug for StoredKeyValue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "StoredKeyValue({} bytes)", self.0.len())
    }
}

impl Message for StoredKeyValue {
    fn encode_raw(&self, buf: &mut impl BufMut) {
        buf.put_slice(&self.0);
    }

    fn encoded_len(&self) -> usize {
        self.0.len()
    }

    fn merge_field(
        &mut self,
        tag: u32,
        wire_type: WireType,
        buf: &mut impl Buf,
        ctx: DecodeContext,
    ) -> Result<(), DecodeError> {
        let mut whole = BytesMut::from(&self.0[..]);
        match wire_type {
            WireType::Varint => {
                encode_key(tag, wire_type, &mut whole);
                encode_varint(encoding::decode_varint(buf)?, &mut whole);
            }
            WireType::LengthDelimited => {
                let mut field = Bytes::new();
                encoding::bytes::merge(wire_type, &mut field, buf, ctx)?;
                put_framed(&mut whole, tag, &field);
            }
            WireType::ThirtyTwoBit | WireType::SixtyFourBit | WireType::StartGroup | WireType::EndGroup => {
                return encoding::skip_field(wire_type, tag, buf, ctx);
            }
        }
        self.0 = whole.freeze();
        Ok(())
    }

    fn clear(&mut self) {
        self.0 = Bytes::new();
    }
}

/// Appends `body` as length-delimited field `tag`.
fn put_framed(out: &mut impl BufMut, tag: u32, body: &[u8]) {
    encode_key(tag, WireType::LengthDelimited, out);
    encode_varint(body.len() as u64, out);
    out.put_slice(body);
}

/// Length of what [`put_framed`] appends for a body of `body_len` bytes.
fn framed_len(tag: u32, body_len: usize) -> usize {
    key_len(tag) + encoded_len_varint(body_len as u64) + body_len
}

/// The `kvs` of a range answer: already framed, in chunks.
#[derive(Clone, Default, PartialEq, Eq, Hash)]
pub struct KvRope {
    chunks: Vec<Vec<u8>>,
    bytes: usize,
    keys: usize,
}

impl std::fmt::Debug for KvRope {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "KvRope({} keys, {} bytes)", self.keys, self.bytes)
    }
}

impl KvRope {
    /// Adds one KeyValue in stored form.
    pub fn push(&mut self, stored: &[u8]) {
        let needed = framed_len(RANGE_KVS, stored.len());
        let chunk = self.chunk_with_room(needed);
        put_framed(chunk, RANGE_KVS, stored);
        self.bytes += needed;
        self.keys += 1;
    }

    fn chunk_with_room(&mut self, needed: usize) -> &mut Vec<u8> {
        let last = self.chunks.last();
        if last.is_none_or(|last| last.capacity() - last.len() < needed) {
            // Doubling what is there keeps the number of chunks small without reserving much for small answers.
            let usual = self.bytes.clamp(CHUNK_BYTES_MIN, CHUNK_BYTES_MAX);
            // What is not small beside it would leave much of it empty.
            let bytes = if needed > usual / 4 { needed.max(CHUNK_BYTES_MIN) } else { usual };
            self.chunks.push(Vec::with_capacity(bytes));
        }
        self.chunks.last_mut().expect("one was just pushed, if none was there")
    }

    /// Bytes on the wire.
    pub fn len_bytes(&self) -> usize {
        self.bytes
    }

    /// Number of KeyValues.
    pub fn keys(&self) -> usize {
        self.keys
    }

    /// The KeyValues in stored form, read back from their frames. For callers in the same process.
    pub fn iter(&self) -> impl Iterator<Item = &[u8]> {
        self.chunks.iter().flat_map(|chunk| Frames { rest: chunk }).map(|frame| frame.body)
    }

    fn copy_to(&self, out: &mut impl BufMut) {
        for chunk in &self.chunks {
            out.put_slice(chunk);
        }
    }

    fn drain_to(&mut self, out: &mut impl BufMut) {
        for chunk in std::mem::take(self).chunks {
            out.put_slice(&chunk);
        }
    }
}

impl<B: AsRef<[u8]>> FromIterator<B> for KvRope {
    fn from_iter<I: IntoIterator<Item = B>>(stored: I) -> Self {
        let mut rope = KvRope::default();
        for kv in stored {
            rope.push(kv.as_ref());
        }
        rope
    }
}

/// One length-delimited entry of a buffer written by [`put_framed`].
struct Frame<'a> {
    /// Tag, length and body.
    len: usize,
    body: &'a [u8],
}

/// The entries of a buffer written by [`put_framed`], in order. Stops at anything else, which no such buffer holds.
struct Frames<'a> {
    rest: &'a [u8],
}

impl<'a> Iterator for Frames<'a> {
    type Item = Frame<'a>;

    fn next(&mut self) -> Option<Frame<'a>> {
        let before = self.rest.len();
        let mut cursor = self.rest;
        encoding::decode_key(&mut cursor).ok()?;
        let body_len = usize::try_from(encoding::decode_varint(&mut cursor).ok()?).ok()?;
        let (body, rest) = cursor.split_at_checked(body_len)?;
        self.rest = rest;
        Some(Frame { len: before - rest.len(), body })
    }
}

/// The encoded end of the one message of an answer that is too large to be copied, in parts. Goes with the response that has the beginning, in its
/// extensions.
#[derive(Clone, Debug)]
pub(crate) struct RestOfMessage(pub(crate) Vec<Bytes>);

/// In a request's extensions: the answer is not compressed, and a [`RestOfMessage`] is put where it belongs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TakesRest;

/// `etcdserverpb.RangeResponse`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct RangeResponse {
    pub header: Option<ResponseHeader>,
    pub kvs: KvRope,
    pub more: bool,
    pub count: i64,
}

impl RangeResponse {
    /// Writes the message and empties it on the way, so that its bytes are never held twice.
    pub fn encode_draining(&mut self, buf: &mut impl BufMut) {
        self.encode_before_kvs(buf);
        self.kvs.drain_to(buf);
        self.encode_after_kvs(buf);
    }

    /// Takes out what follows the header, if that is much, so that it need not be copied. What is left is no message of its own any more: the rest
    /// belongs right behind its encoding. Only for whoever is answered through somebody that [`TakesRest`].
    pub(crate) fn take_large(&mut self) -> Option<RestOfMessage> {
        if !(LARGE_BYTES..LARGE_BYTES_MAX).contains(&self.kvs.len_bytes()) {
            return None;
        }
        let mut behind = Vec::new();
        self.encode_after_kvs(&mut behind);
        (self.more, self.count) = (false, 0);
        let mut chunks = std::mem::take(&mut self.kvs).chunks;
        // Others are nearly full; this may wait for its client for long.
        chunks.last_mut().into_iter().for_each(Vec::shrink_to_fit);
        let chunks = chunks.into_iter().map(Bytes::from);
        let rest: Vec<Bytes> = chunks.chain((!behind.is_empty()).then(|| Bytes::from(behind))).collect();
        Some(RestOfMessage(rest))
    }

    fn encode_before_kvs(&self, buf: &mut impl BufMut) {
        if let Some(header) = &self.header {
            encoding::message::encode(RANGE_HEADER, header, buf);
        }
    }

    fn encode_after_kvs(&self, buf: &mut impl BufMut) {
        if self.more {
            encoding::bool::encode(RANGE_MORE, &self.more, buf);
        }
        if self.count != 0 {
            encoding::int64::encode(RANGE_COUNT, &self.count, buf);
        }
    }
}

impl Message for RangeResponse {
    fn encode_raw(&self, buf: &mut impl BufMut) {
        self.encode_before_kvs(buf);
        self.kvs.copy_to(buf);
        self.encode_after_kvs(buf);
    }

    fn encoded_len(&self) -> usize {
        self.header.as_ref().map_or(0, |header| encoding::message::encoded_len(RANGE_HEADER, header))
            + self.kvs.len_bytes()
            + if self.more { encoding::bool::encoded_len(RANGE_MORE, &self.more) } else { 0 }
            + if self.count != 0 { encoding::int64::encoded_len(RANGE_COUNT, &self.count) } else { 0 }
    }

    fn merge_field(
        &mut self,
        tag: u32,
        wire_type: WireType,
        buf: &mut impl Buf,
        ctx: DecodeContext,
    ) -> Result<(), DecodeError> {
        match tag {
            RANGE_HEADER => encoding::message::merge(wire_type, self.header.get_or_insert_default(), buf, ctx),
            RANGE_KVS => {
                let mut stored = Bytes::new();
                encoding::bytes::merge(wire_type, &mut stored, buf, ctx)?;
                self.kvs.push(&stored);
                Ok(())
            }
            RANGE_MORE => encoding::bool::merge(wire_type, &mut self.more, buf, ctx),
            RANGE_COUNT => encoding::int64::merge(wire_type, &mut self.count, buf, ctx),
            _ => encoding::skip_field(wire_type, tag, buf, ctx),
        }
    }

    fn clear(&mut self) {
        *self = RangeResponse::default();
    }
}

/// `etcdserverpb.WatchResponse`.
#[derive(Clone, Default, PartialEq, Eq, Hash)]
pub struct WatchResponse {
    pub header: Option<ResponseHeader>,
    pub watch_id: i64,
    pub created: bool,
    pub canceled: bool,
    pub compact_revision: i64,
    pub cancel_reason: String,
    pub fragment: bool,
    /// Framed entries as [`encode_events`] makes them; shared with every other watcher they go to.
    pub events: Bytes,
}

impl std::fmt::Debug for WatchResponse {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WatchResponse")
            .field("header", &self.header)
            .field("watch_id", &self.watch_id)
            .field("created", &self.created)
            .field("canceled", &self.canceled)
            .field("compact_revision", &self.compact_revision)
            .field("cancel_reason", &self.cancel_reason)
            .field("fragment", &self.fragment)
            .field("events_bytes", &self.events.len())
            .finish()
    }
}

impl WatchResponse {
    /// Number of events, counted from their frames.
    pub fn event_count(&self) -> usize {
        Frames { rest: &self.events }.count()
    }
}

impl Message for WatchResponse {
    fn encode_raw(&self, buf: &mut impl BufMut) {
        if let Some(header) = &self.header {
            encoding::message::encode(WATCH_HEADER, header, buf);
        }
        if self.watch_id != 0 {
            encoding::int64::encode(WATCH_ID, &self.watch_id, buf);
        }
        if self.created {
            encoding::bool::encode(WATCH_CREATED, &self.created, buf);
        }
        if self.canceled {
            encoding::bool::encode(WATCH_CANCELED, &self.canceled, buf);
        }
        if self.compact_revision != 0 {
            encoding::int64::encode(WATCH_COMPACT_REVISION, &self.compact_revision, buf);
        }
        if !self.cancel_reason.is_empty() {
            encoding::string::encode(WATCH_CANCEL_REASON, &self.cancel_reason, buf);
        }
        if self.fragment {
            encoding::bool::encode(WATCH_FRAGMENT, &self.fragment, buf);
        }
        buf.put_slice(&self.events);
    }

    fn encoded_len(&self) -> usize {
        let flag = |tag, set: bool| if set { encoding::bool::encoded_len(tag, &set) } else { 0 };
        let number = |tag, n: i64| if n != 0 { encoding::int64::encoded_len(tag, &n) } else { 0 };
        self.header.as_ref().map_or(0, |header| encoding::message::encoded_len(WATCH_HEADER, header))
            + number(WATCH_ID, self.watch_id)
            + flag(WATCH_CREATED, self.created)
            + flag(WATCH_CANCELED, self.canceled)
            + number(WATCH_COMPACT_REVISION, self.compact_revision)
            + match self.cancel_reason.len() {
                0 => 0,
                len => framed_len(WATCH_CANCEL_REASON, len),
            }
            + flag(WATCH_FRAGMENT, self.fragment)
            + self.events.len()
    }

    fn merge_field(
        &mut self,
        tag: u32,
        wire_type: WireType,
        buf: &mut impl Buf,
        ctx: DecodeContext,
    ) -> Result<(), DecodeError> {
        match tag {
            WATCH_HEADER => encoding::message::merge(wire_type, self.header.get_or_insert_default(), buf, ctx),
            WATCH_ID => encoding::int64::merge(wire_type, &mut self.watch_id, buf, ctx),
            WATCH_CREATED => encoding::bool::merge(wire_type, &mut self.created, buf, ctx),
            WATCH_CANCELED => encoding::bool::merge(wire_type, &mut self.canceled, buf, ctx),
            WATCH_COMPACT_REVISION => encoding::int64::merge(wire_type, &mut self.compact_revision, buf, ctx),
            WATCH_CANCEL_REASON => encoding::string::merge(wire_type, &mut self.cancel_reason, buf, ctx),
            WATCH_FRAGMENT => encoding::bool::merge(wire_type, &mut self.fragment, buf, ctx),
            WATCH_EVENTS => {
                let mut event = Bytes::new();
                encoding::bytes::merge(wire_type, &mut event, buf, ctx)?;
                let mut events = BytesMut::from(&self.events[..]);
                put_framed(&mut events, WATCH_EVENTS, &event);
                self.events = events.freeze();
                Ok(())
            }
            _ => encoding::skip_field(wire_type, tag, buf, ctx),
        }
    }

    fn clear(&mut self) {
        *self = WatchResponse::default();
    }
}

/// Frames events for [`WatchResponse::events`]. Called once per batch, through `EventBatch::encoded`.
pub fn encode_events(events: &[Event]) -> Bytes {
    let total = events.iter().map(|event| framed_len(WATCH_EVENTS, event_len(event))).sum();
    let mut out = BytesMut::with_capacity(total);
    for event in events {
        encode_key(WATCH_EVENTS, WireType::LengthDelimited, &mut out);
        encode_varint(event_len(event) as u64, &mut out);
        match event.kind {
            EventKind::Put => {}
            EventKind::Delete => encoding::uint64::encode(EVENT_TYPE, &EVENT_TYPE_DELETE, &mut out),
        }
        put_framed(&mut out, EVENT_KV, &event.kv);
        if let Some(prev_kv) = &event.prev_kv {
            put_framed(&mut out, EVENT_PREV_KV, prev_kv);
        }
    }
    debug_assert_eq!(out.len(), total, "what was measured is what was written");
    out.freeze()
}

fn event_len(event: &Event) -> usize {
    let kind = match event.kind {
        EventKind::Put => 0,
        EventKind::Delete => encoding::uint64::encoded_len(EVENT_TYPE, &EVENT_TYPE_DELETE),
    };
    kind + framed_len(EVENT_KV, event.kv.len())
        + event.prev_kv.as_ref().map_or(0, |prev_kv| framed_len(EVENT_PREV_KV, prev_kv.len()))
}

/// Cuts framed events into pieces of less than `max_bytes` each, except that a single event is never cut.
///
/// The watch service calls this for a watcher created with `fragment`, when the whole response would reach its limit
/// (contract 1.2); it sends the pieces one behind the other on the stream, all but the last marked `fragment`. `max_bytes`
/// is the limit on a response's size minus that of its other fields. The pieces share the buffer. At least one piece.
pub fn split_events(events: &Bytes, max_bytes: usize) -> Vec<Bytes> {
    let mut pieces = Vec::new();
    let mut start = 0;
    let mut end = 0;
    for frame in (Frames { rest: events }) {
        if end > start && end - start + frame.len >= max_bytes {
            pieces.push(events.slice(start..end));
            start = end;
        }
        end += frame.len;
    }
    pieces.push(events.slice(start..end));
    pieces
}

#[cfg(test)]
mod tests;
