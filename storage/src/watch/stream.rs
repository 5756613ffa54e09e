//! One client's watch stream: its end of the hub, and the replay of history for its watchers that are behind.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;

use super::hub::{GroupKey, Queue, ReplayPlan, Replayed, StreamId};
use super::{Event, EventKind, WatchMessage, WatchSpec};
use crate::engine::{Cursor, Engine, Family, Reader};
use crate::error::Fault;
use crate::key::rev;
use crate::key_value::{self, KeyValue};
use crate::limits::{WATCH_REPLAY_BYTES_MAX, WATCH_REPLAY_REVISIONS_MAX, WATCH_REPLAY_ROWS_MAX};
use crate::mvcc::read;
use crate::store::{Tenant, tenant_row};
use crate::types::{Revision, TenantId};

/// See [`super`]. Dropping it ends all its watchers without a word to the client.
pub struct WatchStream<E: Engine> {
    engine: Arc<E>,
    tenant: Arc<Tenant>,
    id: StreamId,
    queue: Arc<Queue>,
}

impl<E: Engine> WatchStream<E> {
    pub(crate) fn open(engine: Arc<E>, tenant: Arc<Tenant>, waker: Arc<dyn Fn() + Send + Sync>) -> Self {
        let (id, queue) = tenant.hub.open_stream(waker);
        WatchStream { engine, tenant, id, queue }
    }

    /// Makes a watcher. Queues [`WatchMessage::Created`], or [`WatchMessage::Refused`] if it cannot be.
    pub fn create(&self, spec: WatchSpec) {
        self.tenant.hub.create(self.id, spec, self.tenant.watchers_max());
    }

    /// Ends a watcher. Queues [`WatchMessage::Canceled`], or nothing if there is no such watcher. Events queued before stay.
    pub fn cancel(&self, watch_id: i64) {
        self.tenant.hub.cancel(self.id, watch_id);
    }

    /// Queues [`WatchMessage::Progress`] for the stream if all its watchers are synced and have started; else nothing.
    pub fn request_progress(&self) {
        self.tenant.hub.request_progress(self.id);
    }

    /// One period has passed: queues progress for every watcher that asked for it, is synced and was sent no events
    /// in the period.
    pub fn tick_progress(&self) {
        self.tenant.hub.tick_progress(self.id);
    }

    /// The next message to send. Never blocks.
    pub fn pop(&self) -> Option<WatchMessage> {
        self.queue.pop()
    }

    /// Bytes of events in the message that [`WatchStream::pop`] would give; `None` if there is none.
    pub fn next_bytes(&self) -> Option<usize> {
        self.queue.next_bytes()
    }

    /// Whether some watcher is behind and there is room for what a replay step finds.
    pub fn needs_replay(&self) -> bool {
        self.queue.unsynced.load(Ordering::Relaxed) > 0 && !self.queue.is_full()
    }

    /// Whether so much is queued that no further request should be read from the client now.
    pub fn is_saturated(&self) -> bool {
        self.queue.is_full()
    }

    /// Moves the watcher that is furthest behind one bounded step on. Reads the engine: not for an async thread.
    ///
    /// # Errors
    /// Any [`Fault`] ends this member.
    pub fn replay_step(&self) -> Result<(), Fault> {
        let Some(plan) = self.tenant.hub.plan_replay(self.id) else { return Ok(()) };
        let view = self.engine.view();
        let replayed = replay(&view, self.tenant.id, &plan)?;
        self.tenant.hub.finish_replay(self.id, &plan, replayed);
        Ok(())
    }
}

impl<E: Engine> Drop for WatchStream<E> {
    fn drop(&mut self) {
        self.tenant.hub.close_stream(self.id);
    }
}

/// Reads history from `plan.next` on, up to the bounds of one step, never splitting a revision.
fn replay<R: Reader>(reader: &R, tenant: TenantId, plan: &ReplayPlan) -> Result<Replayed, Fault> {
    // A tenant that was deleted has no history.
    let Some(row) = tenant_row(reader, tenant)? else {
        return Ok(Replayed::Compacted { compact_revision: plan.next });
    };
    if plan.next < row.compact_revision {
        return Ok(Replayed::Compacted { compact_revision: row.compact_revision });
    }
    let bounds = rev::bounds_from(tenant, Revision { main: plan.next, sub: 0 });
    let mut cursor = reader.cursor(Family::Rev, &bounds.lower, &bounds.upper)?;
    let (mut events, mut revisions, mut bytes, mut rows) = (Vec::<Event>::new(), 0, 0, 0);
    let (mut last_event, mut last_row) = (0, plan.next - 1);
    while let Some((key, value)) = cursor.entry() {
        let at = rev::decode_key(key)?;
        let full =
            revisions >= WATCH_REPLAY_REVISIONS_MAX || bytes >= WATCH_REPLAY_BYTES_MAX || rows >= WATCH_REPLAY_ROWS_MAX;
        if full && at.main != last_row {
            return Ok(Replayed::Events { events, reached: at.main - 1, revision: row.revision });
        }
        (last_row, rows) = (at.main, rows + 1);
        let change = rev::Row::decode(Bytes::copy_from_slice(value))?;
        if let Some(event) = event(reader, tenant, &plan.key, at, &change, row.compact_revision)? {
            bytes += event.size_bytes();
            revisions += usize::from(last_event != at.main);
            last_event = at.main;
            events.push(event);
        }
        cursor.advance()?;
    }
    assert!(last_row <= row.revision, "history ends at the tenant's revision");
    Ok(Replayed::Events { events, reached: row.revision.max(plan.next - 1), revision: row.revision })
}

/// The event of one row of history, if the group wants it.
fn event<R: Reader>(
    reader: &R,
    tenant: TenantId,
    group: &GroupKey,
    at: Revision,
    change: &rev::Row,
    compact_revision: i64,
) -> Result<Option<Event>, Fault> {
    let kind = if change.tombstone { EventKind::Delete } else { EventKind::Put };
    if !group.wants(kind) || !group.range.contains(&change.user_key) {
        return Ok(None);
    }
    let kv = match kind {
        EventKind::Delete => key_value::encode_tombstone_event(&change.user_key, at.main),
        EventKind::Put => read::stored(reader, tenant, &change.user_key, at)?,
    };
    // A key that this revision created has no past, even if the same txn deleted it first. And what stood before the compact
    // revision may be gone in part: as etcd, show none of it.
    let created = kind == EventKind::Put && KeyValue::decode(&kv)?.create_revision == at.main;
    let readable = at.main > compact_revision && change.previous.is_some();
    let prev_kv = match group.prev_kv && readable && !created {
        true => read::get(reader, tenant, &change.user_key, at.main - 1)?,
        false => None,
    };
    Ok(Some(Event { kind, key: change.user_key.clone(), kv, prev_kv }))
}
