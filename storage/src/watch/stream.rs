//! One client's watch stream: its end of the hub, and the replay of history for its watchers that are behind.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;

use super::hub::{Closed, GroupKey, Queue, ReplayPlan, Replayed, StreamId};
use super::{Event, EventKind, WatchMessage, WatchSpec};
use crate::engine::{Cursor, Engine, Family, Reader};
use crate::error::Fault;
use crate::key::rev;
use crate::key_value::{self, KeyValue};
use crate::limits::{WATCH_REPLAY_BYTES_MAX, WATCH_REPLAY_REVISIONS_MAX, WATCH_REPLAY_ROWS_MAX};
use crate::mvcc::read;
use crate::store::{Tenant, tenant_row};
use crate::types::{Revision, TenantId};

/// Whether there is room for so many bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reached {
    Yes,
    /// There may be later.
    NotNow,
    /// There never is for so much at a time.
    Never,
}

/// Room in memory for the events of one replay step. Dropping it gives it back.
pub trait ReplayRoom: std::fmt::Debug + Send + Sync + 'static {
    /// Makes it large enough for events of so many bytes. Never blocks.
    fn try_reach(&mut self, bytes: usize) -> Reached;

    /// Gives back what so many bytes do not need.
    fn settle(&mut self, bytes: usize);
}

/// A replay step found no room for the first revision it has to tell of: it had reached so many bytes.
#[derive(Debug)]
pub struct NoRoom<M> {
    pub room: M,
    pub bytes: usize,
}

/// For those who count nothing.
#[derive(Debug)]
pub(super) struct Boundless;

impl ReplayRoom for Boundless {
    fn try_reach(&mut self, _bytes: usize) -> Reached {
        Reached::Yes
    }

    fn settle(&mut self, _bytes: usize) {}
}

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

    /// Goes on with what a tick has not told yet, if there is room: with some of it. Answers whether there is more, and room. Cheap if
    /// nothing is due.
    pub fn tell_progress(&self) -> bool {
        let is_due = self.queue.owes_progress.load(Ordering::Relaxed) && !self.queue.is_full();
        is_due && self.tenant.hub.tell_progress(self.id)
    }

    /// The next message to send. Never blocks.
    pub fn pop(&self) -> Option<WatchMessage> {
        self.queue.pop()
    }

    /// Bytes of events in the message that [`WatchStream::pop`] would give; `None` if there is none.
    pub fn next_bytes(&self) -> Option<usize> {
        self.queue.next_bytes()
    }

    /// Whether some watcher is behind and can be replayed now. If not, it may be able to when the queue has become shorter.
    pub fn needs_replay(&self) -> bool {
        self.queue.unsynced.load(Ordering::Relaxed) > 0 && self.tenant.hub.can_replay(self.id)
    }

    /// The watcher whose turn it is to be replayed, if some can be. Cheap while none is behind.
    pub fn plan_replay(&self) -> Option<ReplayPlan> {
        if self.queue.unsynced.load(Ordering::Relaxed) == 0 {
            return None;
        }
        self.tenant.hub.plan_replay(self.id)
    }

    /// Whether so much is queued that no further request should be read from the client now.
    pub fn is_saturated(&self) -> bool {
        self.queue.is_full()
    }

    /// Moves the watcher whose turn it is one bounded step on, and counts nothing. Reads the engine: not for an async thread.
    ///
    /// # Errors
    /// Any [`Fault`] ends this member.
    pub fn replay_step(&self) -> Result<(), Fault> {
        let Some(plan) = self.plan_replay() else { return Ok(()) };
        self.replay(&plan, Boundless).map(|_| ())
    }

    /// Moves a watcher one bounded step on, as far as there is room for its events. If there is not even for the first revision
    /// nothing has happened, and the same plan may be tried again. A watcher whose revision can have no room ever is told that it is
    /// gone. Reads the engine: not for an async thread.
    ///
    /// # Errors
    /// Any [`Fault`] ends this member.
    pub fn replay<M: ReplayRoom>(&self, plan: &ReplayPlan, mut room: M) -> Result<Result<(), NoRoom<M>>, Fault> {
        let view = self.engine.view();
        match replay(&view, self.tenant.id, plan, &mut room)? {
            Step::Found(replayed) => {
                self.tenant.hub.finish_replay(self.id, plan, replayed, room);
                Ok(Ok(()))
            }
            Step::NoRoom { bytes } => Ok(Err(NoRoom { room, bytes })),
        }
    }
}

impl<E: Engine> WatchStream<E> {
    /// Ends all watchers as dropping the stream does, but leaves it to the caller to do that in steps: there may be very many. `None`:
    /// it was closed before.
    pub fn close(&self) -> Option<Closing> {
        let closed = self.tenant.hub.close_stream(self.id)?;
        Some(Closing { tenant: Arc::clone(&self.tenant), closed })
    }
}

impl<E: Engine> Drop for WatchStream<E> {
    fn drop(&mut self) {
        drop(self.close());
    }
}

/// Watchers of a stream that was closed. Dropping it forgets those that are left.
pub struct Closing {
    tenant: Arc<Tenant>,
    closed: Closed,
}

impl Closing {
    /// Forgets some: some tens of microseconds. Answers whether there are more.
    pub fn step(&mut self) -> bool {
        self.tenant.hub.forget_some(&mut self.closed)
    }
}

impl Drop for Closing {
    fn drop(&mut self) {
        while self.step() {}
    }
}

/// What became of a step.
enum Step {
    Found(Replayed),
    /// The first revision had reached so many bytes.
    NoRoom {
        bytes: usize,
    },
}

/// Reads history from `plan.next` on, up to the bounds of one step or of the room, never splitting a revision.
fn replay<R: Reader>(
    reader: &R,
    tenant: TenantId,
    plan: &ReplayPlan,
    room: &mut dyn ReplayRoom,
) -> Result<Step, Fault> {
    let gone_below = |compact_revision| Ok(Step::Found(Replayed::Compacted { compact_revision }));
    // A tenant that was deleted has no history.
    let Some(row) = tenant_row(reader, tenant)? else { return gone_below(plan.next) };
    if plan.next < row.compact_revision {
        return gone_below(row.compact_revision);
    }
    let bounds = rev::bounds_from(tenant, Revision { main: plan.next, sub: 0 });
    let mut cursor = reader.cursor(Family::Rev, &bounds.lower, &bounds.upper)?;
    let (mut events, mut revisions, mut bytes, mut rows) = (Vec::<Event>::new(), 0, 0, 0);
    let (mut last_event, mut last_row) = (0, plan.next - 1);
    // Events of whole revisions, all before the one being read.
    let mut whole = 0;
    while let Some((key, value)) = cursor.entry() {
        let at = rev::decode_key(key)?;
        let up_to_here =
            |events| Ok(Step::Found(Replayed::Events { events, reached: at.main - 1, revision: row.revision }));
        if at.main != last_row {
            let full = revisions >= WATCH_REPLAY_REVISIONS_MAX
                || bytes >= WATCH_REPLAY_BYTES_MAX
                || rows >= WATCH_REPLAY_ROWS_MAX;
            if full {
                return up_to_here(events);
            }
            whole = events.len();
        }
        (last_row, rows) = (at.main, rows + 1);
        let change = rev::Row::decode(Bytes::copy_from_slice(value))?;
        if let Some(event) = event(reader, tenant, &plan.key, at, &change, row.compact_revision)? {
            bytes += event.size_bytes();
            match room.try_reach(bytes) {
                Reached::Yes => {}
                Reached::NotNow | Reached::Never if whole > 0 => {
                    events.truncate(whole);
                    return up_to_here(events);
                }
                Reached::NotNow => return Ok(Step::NoRoom { bytes }),
                Reached::Never => {
                    tracing::debug!(%tenant, revision = at.main, "a revision is too large for a watcher to be told of");
                    return gone_below(at.main + 1);
                }
            }
            revisions += usize::from(last_event != at.main);
            last_event = at.main;
            events.push(event);
        }
        cursor.advance()?;
    }
    assert!(last_row <= row.revision, "history ends at the tenant's revision");
    let reached = row.revision.max(plan.next - 1);
    Ok(Step::Found(Replayed::Events { events, reached, revision: row.revision }))
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::apply::{NoObserver, StateMachine};
    use crate::command::{Command, Envelope, TenantCommand};
    use crate::engine::MemoryEngine;
    use crate::types::{DeleteRangeRequest, KeyRange, LeaseId, PutRequest};

    const VALUE_BYTES: usize = 1_000;

    /// Room for so many bytes, of which so many are free.
    #[derive(Clone, Copy, Debug)]
    struct Room {
        free: usize,
        all: usize,
    }

    impl ReplayRoom for Room {
        fn try_reach(&mut self, bytes: usize) -> Reached {
            match bytes {
                _ if bytes <= self.free => Reached::Yes,
                _ if bytes <= self.all => Reached::NotNow,
                _ => Reached::Never,
            }
        }

        fn settle(&mut self, bytes: usize) {
            self.free = bytes;
        }
    }

    /// Ten keys are put, one a revision from 2 on, and deleted in one. The watch began before.
    fn watched(prev_kv: bool) -> WatchStream<MemoryEngine> {
        let mut state = StateMachine::open(Arc::new(MemoryEngine::default()), Arc::new(NoObserver)).unwrap();
        let put = |number: usize| {
            Command::Put(PutRequest {
                key: format!("key{number}").into(),
                value: vec![b'v'; VALUE_BYTES].into(),
                lease: LeaseId::NONE,
                prev_kv: false,
                ignore_value: false,
                ignore_lease: false,
            })
        };
        let everything = KeyRange::From(Bytes::from_static(&[0]));
        let delete = Command::DeleteRange(DeleteRangeRequest { range: everything.clone(), prev_kv: false });
        let create = Command::Tenant(TenantCommand::create("acme"));
        let commands = [create].into_iter().chain((0..10).map(put)).chain([delete]);
        let tenant = TenantId(1);
        let commands = commands.map(|command| Envelope { tenant, member_id: 1, command }.encode()).collect();
        state.apply(vec![(1, commands)]).unwrap();
        let stream = state.store().reader(tenant).unwrap().watch_stream(Arc::new(|| {}));
        stream.create(WatchSpec {
            range: everything,
            start_revision: 2,
            prev_kv,
            no_put: false,
            no_delete: false,
            progress_notify: false,
            fragment: false,
            watch_id: 0,
        });
        assert!(matches!(stream.pop(), Some(WatchMessage::Created { .. })));
        stream
    }

    /// Replays a step; the events that it told of, or how many bytes found no room.
    fn step(stream: &WatchStream<MemoryEngine>, room: Room) -> Result<usize, usize> {
        let plan = stream.plan_replay().unwrap();
        match stream.replay(&plan, room).unwrap() {
            Ok(()) => match stream.pop() {
                Some(WatchMessage::Events { batch, room: Some(_), .. }) => Ok(batch.events.len()),
                other => panic!("{other:?}"),
            },
            Err(NoRoom { bytes, .. }) => {
                assert!(stream.pop().is_none());
                Err(bytes)
            }
        }
    }

    // Streams that nobody reads, or a revision that replaced all that a tenant has, would else take what memory there is.
    #[test]
    fn a_step_tells_of_the_whole_revisions_that_there_is_room_for() {
        let stream = watched(true);
        let event_bytes = VALUE_BYTES + 300;
        let all = 100 * event_bytes;
        assert!(step(&stream, Room { free: VALUE_BYTES, all }).unwrap_err() > VALUE_BYTES);
        assert_eq!(step(&stream, Room { free: 3 * event_bytes, all }), Ok(3));
        assert_eq!(step(&stream, Room { free: 14 * event_bytes, all }), Ok(7), "not a part of what deleted them");
        assert!(step(&stream, Room { free: 5 * event_bytes, all }).unwrap_err() > 5 * event_bytes);
        assert_eq!(step(&stream, Room { free: all, all }), Ok(10));
        assert!(!stream.needs_replay());
    }

    #[test]
    fn a_revision_that_never_has_room_is_as_one_that_is_gone() {
        let stream = watched(true);
        let all = 5 * (VALUE_BYTES + 300);
        let mut told = 0;
        while told < 10 {
            told += step(&stream, Room { free: all, all }).unwrap();
        }
        let plan = stream.plan_replay().unwrap();
        assert!(stream.replay(&plan, Room { free: all, all }).unwrap().is_ok());
        let message = stream.pop();
        assert!(matches!(message, Some(WatchMessage::Compacted { watch_id: 0, compact_revision: 13 })), "{message:?}");
        // Who does not want to see what was there can be told.
        let stream = watched(false);
        let mut told = 0;
        while told < 20 {
            told += step(&stream, Room { free: all, all }).unwrap();
        }
    }
}
