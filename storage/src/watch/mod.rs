//! Watching: events after they are applied, and the past replayed from the engine.
//!
//! Each tenant has one [`hub::Hub`]. `apply` hands it every revision once, after the engine has it. A client stream
//! ([`WatchStream`]) holds any number of watchers and one bounded queue through which everything for that client goes, in
//! order: confirmations, events, progress, cancellations.
//!
//! Life of a watcher. It is *synced* when it has been sent everything up to the hub's revision: then events go into the
//! queue as they are applied. It is *unsynced* when it starts in the past, or when its stream's queue was full: then the
//! stream's own task replays history in bounded steps ([`WatchStream::replay`]) until it has caught up. So a slow client
//! costs its queue, not its lag, and nobody waits for it. The watchers of a stream that are behind take turns.
//!
//! What a step reads needs room ([`ReplayRoom`]), which its message keeps until it was sent: history is not shared as live events
//! are, and there may be thousands of streams. A step ends with the last whole revision that there is room for. Nobody waits while
//! holding: a stream has one replayed message at a time, and that goes out before all others. So that this changes the order of
//! nothing that one watcher is told, a watcher is replayed only when nothing is queued that concerns it.
//!
//! `apply` serves the watchers of a revision itself if they are few. If they are many, the revision and all behind it wait in the
//! hub's backlog, which the edge delivers in steps, tenants in turn ([`Store::deliver`](crate::Store::deliver)). A backlog has a bound,
//! behind which its watchers are unsynced.
//!
//! Watchers with the same range, filters and wish for `prev_kv` form a *group* and share one [`EventBatch`] per
//! revision, with one encoded form.
//!
//! What must hold (contract 1.2): events of a watcher are in order, unique and without gaps; the events of one revision are
//! in one message; a progress message says that everything up to its revision has been queued before it.
//!
//! Left out: permissions (the edge asks before it creates), periodic timing (the edge calls [`WatchStream::tick_progress`])
//! and the wire (the edge encodes).

mod hub;
mod index;
mod stream;

use std::sync::{Arc, OnceLock};

use bytes::Bytes;

pub(crate) use self::hub::Hub;
pub use self::hub::{ReplayPlan, ReplayPosition};
pub(crate) use self::index::RangeIndex;
pub use self::stream::{Closing, NoRoom, Reached, ReplayRoom, WatchStream};
use crate::limits::WATCH_EVENT_OVERHEAD_BYTES;
use crate::types::KeyRange;

/// What kind of change an event tells of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventKind {
    Put,
    Delete,
}

/// One change of one key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    pub kind: EventKind,
    pub key: Bytes,
    /// Stored form; of a delete only key and mod_revision are set.
    pub kv: Bytes,
    /// The key as it was before this revision, if it existed then and somebody asked.
    pub prev_kv: Option<Bytes>,
}

impl Event {
    fn size_bytes(&self) -> usize {
        self.kv.len() + self.prev_kv.as_ref().map_or(0, Bytes::len) + WATCH_EVENT_OVERHEAD_BYTES
    }
}

/// What one revision changed.
pub(crate) struct Changes {
    /// In sub-revision order.
    pub(crate) events: Vec<Event>,
    /// Whether they tell what they replaced. Who wants to see that and came only after the command had run, or finds that it was too
    /// much to keep, reads the revision from the engine.
    pub(crate) with_prev: bool,
}

/// Events that go to every watcher of one group together.
#[derive(Debug)]
pub struct EventBatch {
    /// In revision and sub-revision order; never empty, never part of a revision.
    pub events: Vec<Event>,
    size_bytes: usize,
    encoded: OnceLock<Bytes>,
}

impl EventBatch {
    fn new(events: Vec<Event>) -> Self {
        assert!(!events.is_empty(), "a batch tells of something");
        let size_bytes = events.iter().map(Event::size_bytes).sum();
        EventBatch { events, size_bytes, encoded: OnceLock::new() }
    }

    /// The events as `encode` makes them. It runs once, for whichever watcher asks first; the others share its bytes.
    pub fn encoded(&self, encode: impl FnOnce(&[Event]) -> Bytes) -> Bytes {
        self.encoded.get_or_init(|| encode(&self.events)).clone()
    }
}

/// What a client asks of a new watcher.
#[derive(Clone, Debug)]
pub struct WatchSpec {
    pub range: KeyRange,
    /// First revision wanted, inclusive; 0 = what happens from now on.
    pub start_revision: i64,
    pub prev_kv: bool,
    pub no_put: bool,
    pub no_delete: bool,
    /// Wants periodic progress.
    pub progress_notify: bool,
    /// Accepts messages in pieces; handed through to [`WatchMessage::Events`].
    pub fragment: bool,
    /// 0 = the stream picks one.
    pub watch_id: i64,
}

/// Why a watcher was not made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CreateRefusal {
    /// A negative start revision.
    Compacted,
    /// No key can be in the range.
    EmptyRange,
    /// The id chosen by the client is taken on this stream.
    Duplicate,
    /// The tenant has [`crate::limits::WATCHERS_PER_TENANT_MAX`] watchers.
    TooMany,
}

/// One message to a client, in the order to be sent. `revision` is what its header shows.
#[derive(Clone, Debug)]
pub enum WatchMessage {
    Created {
        watch_id: i64,
        revision: i64,
    },
    Refused {
        reason: CreateRefusal,
        revision: i64,
    },
    Events {
        watch_id: i64,
        revision: i64,
        fragment: bool,
        batch: Arc<EventBatch>,
        /// What a replayed message holds until it was sent; live ones hold nothing.
        room: Option<Arc<dyn ReplayRoom>>,
    },
    Canceled {
        watch_id: i64,
        revision: i64,
    },
    /// The watcher needs history that is gone, or a revision that is too large to be sent. The next one that it can have is
    /// `compact_revision`. Its id stays taken until the client cancels it.
    Compacted {
        watch_id: i64,
        compact_revision: i64,
    },
    /// Everything up to `revision` has been sent; of one watcher, or with `watch_id` -1 of all on the stream.
    Progress {
        watch_id: i64,
        revision: i64,
    },
}

impl WatchMessage {
    fn size_bytes(&self) -> usize {
        match self {
            WatchMessage::Events { batch, .. } => batch.size_bytes,
            WatchMessage::Created { .. }
            | WatchMessage::Refused { .. }
            | WatchMessage::Canceled { .. }
            | WatchMessage::Compacted { .. }
            | WatchMessage::Progress { .. } => 0,
        }
    }
}
