//! One tenant's watchers. See the module's essay for what must hold.
//!
//! One lock guards all of it: registration, publication and the end of each replay step must see the same revision. Engine
//! reads happen outside the lock. The queues have locks of their own, taken inside, so that a client being
//! served never holds up publication.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::ops::Bound;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use parking_lot::Mutex;

use super::index::{GroupId, RangeIndex};
use super::{Changes, CreateRefusal, Event, EventBatch, EventKind, ReplayRoom, WatchMessage, WatchSpec};
use crate::limits::{
    WATCH_BACKLOG_BYTES_MAX, WATCH_BACKLOG_REVISIONS_MAX, WATCH_CLOSE_STEP, WATCH_DIRECT_MAX, WATCH_MATCHES_MAX,
    WATCH_QUEUE_BYTES_MAX, WATCH_QUEUE_RESPONSES_MAX,
};
use crate::types::KeyRange;

/// Called when a stream has something to do. Runs on the apply thread: it must only signal.
pub(super) type Waker = Arc<dyn Fn() + Send + Sync>;

pub(super) type StreamId = u64;

/// See the module's essay.
pub(crate) struct Hub {
    state: Mutex<State>,
    /// Watchers that want `prev_kv`: while there are none, `apply` need not read old values.
    prev_kv_watchers: AtomicUsize,
}

struct State {
    /// The last one that was handed in.
    revision: i64,
    /// Everything up to here has been handed to synced watchers. Less than `revision` while there is a backlog.
    delivered: i64,
    /// Revisions that are handed to watchers in steps, in order.
    backlog: VecDeque<Delivery>,
    backlog_bytes: usize,
    /// Streams that asked for progress behind a backlog, and the revision of then, in order.
    progress_asked: VecDeque<(i64, StreamId)>,
    /// Watchers of one revision up to which they are served at once.
    direct_max: usize,
    streams: HashMap<StreamId, Stream>,
    next_stream: StreamId,
    groups: Vec<Option<Group>>,
    free_groups: Vec<GroupId>,
    by_key: HashMap<GroupKey, GroupId>,
    index: RangeIndex,
    watchers: usize,
    /// Of these, synced ones. While there are none nobody is interested in a revision.
    synced: Arc<AtomicUsize>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct GroupKey {
    pub(super) range: KeyRange,
    pub(super) prev_kv: bool,
    pub(super) no_put: bool,
    pub(super) no_delete: bool,
}

impl GroupKey {
    pub(super) fn wants(&self, kind: EventKind) -> bool {
        match kind {
            EventKind::Put => !self.no_put,
            EventKind::Delete => !self.no_delete,
        }
    }
}

/// A revision on its way to its watchers. A group of it may be another one by then: its members have come later and are not
/// interested.
struct Delivery {
    revision: i64,
    /// The last revision behind it that nobody waits for, or its own.
    reached: i64,
    changes: Changes,
    /// Which group wants which event, by its position: in order of both.
    matches: Vec<(GroupId, usize)>,
    /// Matches that all members of their groups have.
    done: usize,
    /// What the members of the next group get; made when the first of them does.
    batch: Option<Arc<EventBatch>>,
    /// The last member of the next group that has its batch.
    after: Option<(StreamId, i64)>,
    size_bytes: usize,
}

struct Group {
    key: GroupKey,
    members: BTreeSet<(StreamId, i64)>,
}

struct Stream {
    queue: Arc<Queue>,
    watchers: BTreeMap<i64, Watcher>,
    /// Those that need replay. They take turns, so that one that is years behind holds up no other.
    unsynced: BTreeSet<i64>,
    /// The one that had its turn last.
    replayed_last: i64,
    /// Synced watchers, here and of the whole hub.
    synced: usize,
    synced_of_all: Arc<AtomicUsize>,
    /// Synced watchers that begin, or have been told of something, behind what was delivered then, as (last revision that does not
    /// concern them any more, id).
    ahead: BTreeSet<(i64, i64)>,
    /// Watchers that want periodic progress.
    notified: BTreeSet<i64>,
    /// From which of them on progress of the last tick is due.
    due_from: Option<i64>,
    /// The last message that concerns all watchers, as in [`Watcher::told`].
    told_all: u64,
    /// Next id to hand out; ids handed out are never reused by the server.
    next_id: i64,
    /// The revision when progress was asked for last, while that is not answered.
    progress_asked: Option<i64>,
}

struct Watcher {
    group: GroupId,
    /// As the client gave it.
    start_revision: i64,
    /// Events below it have been sent or are not wanted.
    next: i64,
    phase: Phase,
    fragment: bool,
    /// Whether events went out since the last tick: they are progress enough.
    sent_since_tick: bool,
    /// The last message that concerns it, as [`Queue::push`] counts them.
    told: u64,
    /// Its entry in [`Stream::ahead`].
    ahead_to: Option<i64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Synced,
    Unsynced,
    /// Told that its history is gone; waits for the client to cancel it.
    Compacted,
}

/// Messages on their way to one client.
pub(super) struct Queue {
    waiting: Mutex<Waiting>,
    /// Watchers of the stream that need replay.
    pub(super) unsynced: AtomicUsize,
    /// Whether a tick's progress is due to some.
    pub(super) owes_progress: AtomicBool,
    waker: Waker,
}

#[derive(Default)]
struct Waiting {
    /// Goes out before all others: see the module's essay.
    replayed: Option<WatchMessage>,
    messages: VecDeque<WatchMessage>,
    /// Of `messages`.
    bytes: usize,
    /// How many messages ever went through `messages`.
    popped: u64,
}

impl Queue {
    pub(super) fn pop(&self) -> Option<WatchMessage> {
        let mut waiting = self.waiting.lock();
        if let Some(replayed) = waiting.replayed.take() {
            return Some(replayed);
        }
        let message = waiting.messages.pop_front()?;
        waiting.bytes -= message.size_bytes();
        waiting.popped += 1;
        Some(message)
    }

    /// Bytes that the next message has no room for yet.
    pub(super) fn next_bytes(&self) -> Option<usize> {
        let waiting = self.waiting.lock();
        match waiting.replayed {
            Some(_) => Some(0),
            None => waiting.messages.front().map(WatchMessage::size_bytes),
        }
    }

    /// At the bound no further events are taken, and the stream reads no further requests.
    pub(super) fn is_full(&self) -> bool {
        self.waiting.lock().is_full()
    }

    /// Up to which message all have been taken out, if there is room for a replayed one.
    fn taken_for_replay(&self) -> Option<u64> {
        let waiting = self.waiting.lock();
        (waiting.replayed.is_none() && !waiting.is_full()).then_some(waiting.popped)
    }

    /// Answers how many messages were queued so far, this one included. The replayed do not count.
    fn push(&self, message: WatchMessage) -> u64 {
        let mut waiting = self.waiting.lock();
        waiting.bytes += message.size_bytes();
        waiting.messages.push_back(message);
        let pushed = waiting.popped + waiting.messages.len() as u64;
        drop(waiting);
        (self.waker)();
        pushed
    }

    fn has_replayed(&self) -> bool {
        self.waiting.lock().replayed.is_some()
    }

    fn push_replayed(&self, message: WatchMessage) {
        let before = self.waiting.lock().replayed.replace(message);
        assert!(before.is_none(), "one at a time is replayed");
        (self.waker)();
    }
}

impl Waiting {
    fn is_full(&self) -> bool {
        self.messages.len() >= WATCH_QUEUE_RESPONSES_MAX || self.bytes >= WATCH_QUEUE_BYTES_MAX
    }
}

/// Watchers of a stream that is not there any more.
pub(super) struct Closed {
    id: StreamId,
    watchers: std::collections::btree_map::IntoIter<i64, Watcher>,
}

/// What one replay step has to read.
#[derive(Debug)]
pub struct ReplayPlan {
    pub(super) watch_id: i64,
    pub(super) key: GroupKey,
    pub(super) next: i64,
    /// As the watcher had it: another one of the same id has been told something else.
    told: u64,
}

/// What a replay step begins at: of which watcher, and at which revision. Another watcher that gets the id was told something else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReplayPosition {
    watch_id: i64,
    next: i64,
    told: u64,
}

impl ReplayPlan {
    pub fn position(&self) -> ReplayPosition {
        ReplayPosition { watch_id: self.watch_id, next: self.next, told: self.told }
    }
}

/// What one replay step has read.
pub(super) enum Replayed {
    /// Events from `next` on, with nothing left out up to and including `reached`.
    Events { events: Vec<Event>, reached: i64, revision: i64 },
    /// `next` lies below the compact revision.
    Compacted { compact_revision: i64 },
}

impl Hub {
    pub(crate) fn new(revision: i64) -> Self {
        Hub::serving_at_once(revision, WATCH_DIRECT_MAX)
    }

    fn serving_at_once(revision: i64, direct_max: usize) -> Self {
        let state = State {
            revision,
            delivered: revision,
            backlog: VecDeque::new(),
            backlog_bytes: 0,
            progress_asked: VecDeque::new(),
            direct_max,
            streams: HashMap::new(),
            next_stream: 0,
            groups: Vec::new(),
            free_groups: Vec::new(),
            by_key: HashMap::new(),
            index: RangeIndex::default(),
            watchers: 0,
            synced: Arc::default(),
        };
        Hub { state: Mutex::new(state), prev_kv_watchers: AtomicUsize::new(0) }
    }

    /// Whether events should carry what they replaced.
    pub(crate) fn wants_prev_kv(&self) -> bool {
        self.prev_kv_watchers.load(Ordering::Relaxed) > 0
    }

    /// Streams and watchers now open.
    pub(crate) fn counts(&self) -> (usize, usize) {
        let state = self.state.lock();
        (state.streams.len(), state.watchers)
    }

    /// Takes one applied revision. Revisions come in order, without gaps. Its watchers have it on return if they are few and
    /// nothing waits before it; else it waits for [`Hub::deliver`]. True: something waits now, and before nothing did.
    #[must_use]
    pub(crate) fn publish(&self, revision: i64, changes: Changes) -> bool {
        let mut state = self.state.lock();
        assert_eq!(revision, state.revision + 1, "revisions are published in order");
        state.revision = revision;
        match state.matches(&changes.events) {
            Some(matches) => state.take(Delivery::new(revision, changes, matches)),
            None => {
                state.let_fall_behind();
                false
            }
        }
    }

    /// Hands what waits to at most so many watchers. Answers whether more waits.
    pub(crate) fn deliver(&self, watchers_max: usize) -> bool {
        let mut state = self.state.lock();
        state.deliver(watchers_max);
        !state.backlog.is_empty()
    }

    /// The state was replaced by a later one: whoever had everything is behind now and replays what happened in between.
    pub(crate) fn skip_to(&self, revision: i64) {
        let mut state = self.state.lock();
        assert!(revision >= state.revision, "a state is replaced by a later one");
        state.revision = revision;
        state.let_fall_behind();
    }

    /// See [`Store::lose_next_revision`](crate::Store::lose_next_revision). Watchers are taken to have it already, so that no check of a
    /// flag is needed where events are handed out.
    pub(crate) fn lose_next_revision(&self) {
        let mut state = self.state.lock();
        let next = state.revision + 2;
        for watcher in state.streams.values_mut().flat_map(|stream| stream.watchers.values_mut()) {
            if watcher.phase == Phase::Synced {
                watcher.next = watcher.next.max(next);
            }
        }
    }

    /// Wakes whoever serves a stream: its tenant is gone.
    pub(crate) fn wake_streams(&self) {
        for stream in self.state.lock().streams.values() {
            (stream.queue.waker)();
        }
    }

    pub(super) fn open_stream(&self, waker: Waker) -> (StreamId, Arc<Queue>) {
        let queue = Arc::new(Queue {
            waiting: Mutex::default(),
            unsynced: AtomicUsize::new(0),
            owes_progress: AtomicBool::new(false),
            waker,
        });
        let mut state = self.state.lock();
        let id = state.next_stream;
        let synced_of_all = Arc::clone(&state.synced);
        state.next_stream += 1;
        state.streams.insert(
            id,
            Stream {
                queue: Arc::clone(&queue),
                watchers: BTreeMap::new(),
                unsynced: BTreeSet::new(),
                replayed_last: i64::MIN,
                synced: 0,
                synced_of_all,
                ahead: BTreeSet::new(),
                notified: BTreeSet::new(),
                due_from: None,
                told_all: 0,
                next_id: 0,
                progress_asked: None,
            },
        );
        (id, queue)
    }

    /// Takes a stream out, so that it gets nothing more. Its watchers are to be forgotten in steps: a tenant's writes wait for the lock,
    /// and a stream may have a million. `None`: it was taken out before.
    pub(super) fn close_stream(&self, id: StreamId) -> Option<Closed> {
        let mut stream = self.state.lock().streams.remove(&id)?;
        stream.synced_of_all.fetch_sub(stream.synced, Ordering::Relaxed);
        Some(Closed { id, watchers: std::mem::take(&mut stream.watchers).into_iter() })
    }

    /// Forgets some watchers. Answers whether there are more.
    pub(super) fn forget_some(&self, closed: &mut Closed) -> bool {
        let mut state = self.state.lock();
        for (watch_id, watcher) in closed.watchers.by_ref().take(WATCH_CLOSE_STEP) {
            state.leave_group(watcher.group, closed.id, watch_id, &self.prev_kv_watchers);
        }
        closed.watchers.len() > 0
    }

    pub(super) fn create(&self, id: StreamId, spec: WatchSpec, watchers_max: usize) {
        self.state.lock().create(id, spec, watchers_max, &self.prev_kv_watchers);
    }

    pub(super) fn cancel(&self, id: StreamId, watch_id: i64) {
        let mut state = self.state.lock();
        let revision = state.revision;
        let Some(stream) = state.streams.get_mut(&id) else { return };
        let Some(watcher) = stream.watchers.remove(&watch_id) else { return };
        match watcher.phase {
            Phase::Synced => stream.leave_synced(),
            Phase::Unsynced => stream.leave_unsynced(watch_id),
            Phase::Compacted => {}
        }
        if let Some(revision) = watcher.ahead_to {
            stream.ahead.remove(&(revision, watch_id));
        }
        stream.notified.remove(&watch_id);
        stream.queue.push(WatchMessage::Canceled { watch_id, revision });
        state.leave_group(watcher.group, id, watch_id, &self.prev_kv_watchers);
    }

    /// Answers a progress request if every watcher of the stream has everything up to now; where something waits, behind that.
    pub(super) fn request_progress(&self, id: StreamId) {
        let mut state = self.state.lock();
        if state.backlog.is_empty() {
            state.answer_progress(id);
            return;
        }
        let revision = state.revision;
        if let Some(stream) = state.streams.get_mut(&id)
            && stream.progress_asked.replace(revision).is_none()
        {
            state.progress_asked.push_back((revision, id));
        }
    }

    /// Progress is due to all that want it, and told to the first of them. If it still is to some since the last tick, that goes on where it is.
    pub(super) fn tick_progress(&self, id: StreamId) {
        if let Some(stream) = self.state.lock().streams.get_mut(&id) {
            stream.due_from.get_or_insert(i64::MIN);
            stream.queue.owes_progress.store(true, Ordering::Relaxed);
        }
        self.tell_progress(id);
    }

    /// Tells some watchers of progress, up to what was delivered. Answers whether there are more, and room.
    pub(super) fn tell_progress(&self, id: StreamId) -> bool {
        self.tell_some_progress(id).unwrap_or(false)
    }

    fn tell_some_progress(&self, id: StreamId) -> Option<bool> {
        let mut state = self.state.lock();
        let revision = state.delivered;
        let Stream { notified, watchers, queue, due_from, .. } = state.streams.get_mut(&id)?;
        for (visited, watch_id) in notified.range((*due_from)?..).enumerate() {
            if visited == WATCH_CLOSE_STEP || queue.is_full() {
                *due_from = Some(*watch_id);
                return Some(!queue.is_full());
            }
            let watcher = watchers.get_mut(watch_id)?;
            if !std::mem::take(&mut watcher.sent_since_tick) && watcher.has_all_up_to(revision) {
                watcher.told = queue.push(WatchMessage::Progress { watch_id: *watch_id, revision });
            }
        }
        *due_from = None;
        queue.owes_progress.store(false, Ordering::Relaxed);
        Some(false)
    }

    /// The watcher of the stream whose turn it is; `None` if none is behind, or none can be replayed now.
    pub(super) fn plan_replay(&self, id: StreamId) -> Option<ReplayPlan> {
        let mut state = self.state.lock();
        let State { streams, groups, .. } = &mut *state;
        let stream = streams.get_mut(&id)?;
        let watch_id = stream.next_to_replay()?;
        stream.replayed_last = watch_id;
        let watcher = stream.watchers.get(&watch_id)?;
        assert_eq!(watcher.phase, Phase::Unsynced, "only those behind are listed as behind");
        let group = groups.get(watcher.group)?.as_ref()?;
        Some(ReplayPlan { watch_id, key: group.key.clone(), next: watcher.next, told: watcher.told })
    }

    /// Whether [`Hub::plan_replay`] would find one.
    pub(super) fn can_replay(&self, id: StreamId) -> bool {
        self.state.lock().streams.get(&id).is_some_and(|stream| stream.next_to_replay().is_some())
    }

    /// Queues what a replay step found, unless the watcher was cancelled (or made anew) meanwhile. The message keeps what it needs of
    /// the room.
    pub(super) fn finish_replay(&self, id: StreamId, plan: &ReplayPlan, replayed: Replayed, mut room: impl ReplayRoom) {
        let mut state = self.state.lock();
        let State { revision: published, delivered, streams, groups, .. } = &mut *state;
        let (published, delivered) = (*published, *delivered);
        let Some(stream) = streams.get_mut(&id) else { return };
        let Some(watcher) = stream.watchers.get_mut(&plan.watch_id) else { return };
        let wants_this = groups[watcher.group].as_ref().is_some_and(|group| group.key == plan.key);
        let is_same = (watcher.phase, watcher.next, watcher.told) == (Phase::Unsynced, plan.next, plan.told);
        if !is_same || !wants_this || stream.queue.has_replayed() {
            return;
        }
        match replayed {
            Replayed::Compacted { compact_revision } => {
                watcher.phase = Phase::Compacted;
                stream.leave_unsynced(plan.watch_id);
                stream.queue.push(WatchMessage::Compacted { watch_id: plan.watch_id, compact_revision });
            }
            Replayed::Events { events, reached, revision } => {
                assert!(reached + 1 >= watcher.next, "replay moves forward");
                watcher.next = reached + 1;
                watcher.sent_since_tick |= !events.is_empty();
                let fragment = watcher.fragment;
                let synced = reached >= published;
                if synced {
                    watcher.phase = Phase::Synced;
                }
                if synced {
                    stream.leave_unsynced(plan.watch_id);
                    stream.join_synced(plan.watch_id, delivered);
                }
                if !events.is_empty() {
                    let batch = Arc::new(EventBatch::new(events));
                    room.settle(batch.size_bytes);
                    let (watch_id, room) = (plan.watch_id, Some(Arc::new(room) as Arc<dyn ReplayRoom>));
                    stream.queue.push_replayed(WatchMessage::Events { watch_id, revision, fragment, batch, room });
                }
            }
        }
    }
}

impl Watcher {
    /// One that was made later has been told of a later revision already.
    fn has_all_up_to(&self, revision: i64) -> bool {
        self.phase == Phase::Synced && self.start_revision <= revision && self.next <= revision + 1
    }
}

impl Delivery {
    fn new(revision: i64, changes: Changes, matches: Vec<(GroupId, usize)>) -> Self {
        let events_bytes = changes.events.iter().map(Event::size_bytes).sum::<usize>();
        let size_bytes = events_bytes + size_of_val(&matches[..]);
        Delivery { revision, reached: revision, changes, matches, done: 0, batch: None, after: None, size_bytes }
    }

    /// The next group, and how many matches it has.
    fn next_group(&self) -> Option<(GroupId, usize)> {
        let left = &self.matches[self.done..];
        let (group_id, _) = *left.first()?;
        Some((group_id, left.partition_point(|(other, _)| *other == group_id)))
    }

    /// What the next group's members get; `None`: they have to read it from the engine.
    fn batch_for(&mut self, key: &GroupKey, matches: usize) -> Option<Arc<EventBatch>> {
        if key.prev_kv && !self.changes.with_prev {
            return None;
        }
        let matches = &self.matches[self.done..self.done + matches];
        let make = || {
            let chosen = matches.iter().map(|(_, position)| key.view_of(&self.changes.events[*position]));
            Arc::new(EventBatch::new(chosen.collect()))
        };
        Some(Arc::clone(self.batch.get_or_insert_with(make)))
    }
}

impl State {
    fn create(&mut self, id: StreamId, spec: WatchSpec, watchers_max: usize, prev_kv_watchers: &AtomicUsize) {
        let revision = self.revision;
        let (watchers, delivered) = (self.watchers, self.delivered);
        let Some(stream) = self.streams.get_mut(&id) else { return };
        let refusal = if spec.start_revision < 0 {
            Some(CreateRefusal::Compacted)
        } else if spec.range.is_empty() {
            Some(CreateRefusal::EmptyRange)
        } else if spec.watch_id != 0 && stream.watchers.contains_key(&spec.watch_id) {
            Some(CreateRefusal::Duplicate)
        } else if watchers >= watchers_max {
            Some(CreateRefusal::TooMany)
        } else {
            None
        };
        if let Some(reason) = refusal {
            stream.queue.push(WatchMessage::Refused { reason, revision });
            return;
        }
        let watch_id = if spec.watch_id == 0 { stream.pick_id() } else { spec.watch_id };
        let next = if spec.start_revision == 0 { revision + 1 } else { spec.start_revision };
        let phase = if next > revision { Phase::Synced } else { Phase::Unsynced };
        if phase == Phase::Unsynced {
            stream.join_unsynced(watch_id);
        }
        let told = stream.queue.push(WatchMessage::Created { watch_id, revision });
        let WatchSpec { prev_kv, no_put, no_delete, .. } = spec;
        let key = GroupKey { range: spec.range.detached(), prev_kv, no_put, no_delete };
        let group = self.join_group(key, id, watch_id, prev_kv_watchers);
        let watcher = Watcher {
            group,
            start_revision: spec.start_revision,
            next,
            phase,
            fragment: spec.fragment,
            sent_since_tick: false,
            told,
            ahead_to: None,
        };
        if let Some(stream) = self.streams.get_mut(&id) {
            stream.watchers.insert(watch_id, watcher);
            if spec.progress_notify {
                stream.notified.insert(watch_id);
            }
            if phase == Phase::Synced {
                stream.join_synced(watch_id, delivered);
            }
        }
    }

    fn join_group(&mut self, key: GroupKey, id: StreamId, watch_id: i64, prev_kv_watchers: &AtomicUsize) -> GroupId {
        self.watchers += 1;
        prev_kv_watchers.fetch_add(usize::from(key.prev_kv), Ordering::Relaxed);
        let group_id = match self.by_key.get(&key) {
            Some(group_id) => *group_id,
            None => self.make_group(key),
        };
        if let Some(group) = &mut self.groups[group_id] {
            group.members.insert((id, watch_id));
        }
        group_id
    }

    fn make_group(&mut self, key: GroupKey) -> GroupId {
        let group_id = self.free_groups.pop().unwrap_or_else(|| {
            self.groups.push(None);
            self.groups.len() - 1
        });
        self.index.insert(&key.range, group_id);
        self.by_key.insert(key.clone(), group_id);
        self.groups[group_id] = Some(Group { key, members: BTreeSet::new() });
        group_id
    }

    fn leave_group(&mut self, group_id: GroupId, id: StreamId, watch_id: i64, prev_kv_watchers: &AtomicUsize) {
        let Some(group) = &mut self.groups[group_id] else { return };
        let left = group.members.remove(&(id, watch_id));
        assert!(left, "a watcher is a member of its group");
        self.watchers -= 1;
        prev_kv_watchers.fetch_sub(usize::from(group.key.prev_kv), Ordering::Relaxed);
        if group.members.is_empty()
            && let Some(group) = self.groups[group_id].take()
        {
            self.index.remove(&group.key.range, group_id);
            self.by_key.remove(&group.key);
            self.free_groups.push(group_id);
        }
    }

    /// Which group wants which of these events; `None`: too many want too much.
    fn matches(&self, events: &[Event]) -> Option<Vec<(GroupId, usize)>> {
        let mut matches: Vec<(GroupId, usize)> = Vec::new();
        if self.synced.load(Ordering::Relaxed) == 0 {
            // Whoever is behind reads it.
            return Some(matches);
        }
        for (position, event) in events.iter().enumerate() {
            self.index.covering(&event.key, |group_id| {
                if self.groups[group_id].as_ref().is_some_and(|group| group.key.wants(event.kind)) {
                    matches.push((group_id, position));
                }
            });
            if matches.len() > WATCH_MATCHES_MAX && position > 0 {
                return None;
            }
        }
        matches.sort_unstable();
        Some(matches)
    }

    /// See [`Hub::publish`].
    fn take(&mut self, mut delivery: Delivery) -> bool {
        let groups =
            delivery.matches.chunk_by(|a, b| a.0 == b.0).filter_map(|matches| self.groups[matches[0].0].as_ref());
        let watchers: usize = groups.map(|group| group.members.len()).sum();
        if let Some(last) = self.backlog.back_mut() {
            if delivery.matches.is_empty() {
                last.reached = delivery.reached;
                return false;
            }
        } else if watchers <= self.direct_max {
            self.hand_out(&mut delivery, watchers);
            self.delivered = delivery.reached;
            return false;
        }
        let was_empty = self.backlog.is_empty();
        self.backlog_bytes += delivery.size_bytes;
        self.backlog.push_back(delivery);
        if self.backlog.len() > WATCH_BACKLOG_REVISIONS_MAX || self.backlog_bytes > WATCH_BACKLOG_BYTES_MAX {
            self.let_fall_behind();
        }
        was_empty && !self.backlog.is_empty()
    }

    fn deliver(&mut self, watchers_max: usize) {
        let mut left = watchers_max;
        while let Some(mut delivery) = self.backlog.pop_front() {
            left -= self.hand_out(&mut delivery, left);
            if delivery.done < delivery.matches.len() {
                self.backlog.push_front(delivery);
                return;
            }
            self.backlog_bytes -= delivery.size_bytes;
            assert!(delivery.reached > self.delivered, "revisions are delivered in order");
            self.delivered = delivery.reached;
            self.answer_asked();
        }
    }

    /// Queues a revision for at most so many watchers, from where the last call stopped. Answers how many were reached.
    fn hand_out(&mut self, delivery: &mut Delivery, watchers_max: usize) -> usize {
        let mut reached = 0;
        while let Some((group_id, matches)) = delivery.next_group() {
            if let Some(group) = &self.groups[group_id] {
                let batch = delivery.batch_for(&group.key, matches);
                let from = delivery.after.map_or(Bound::Unbounded, Bound::Excluded);
                for member in group.members.range((from, Bound::Unbounded)) {
                    if reached == watchers_max {
                        return reached;
                    }
                    let (stream_id, watch_id) = *member;
                    if let Some(stream) = self.streams.get_mut(&stream_id) {
                        stream.offer(watch_id, delivery.revision, batch.as_ref());
                    }
                    delivery.after = Some(*member);
                    reached += 1;
                }
            }
            delivery.done += matches;
            (delivery.batch, delivery.after) = (None, None);
        }
        reached
    }

    /// Whoever had everything has to read what happened since from the engine.
    fn let_fall_behind(&mut self) {
        let (revision, delivered) = (self.revision, self.delivered);
        self.backlog.clear();
        self.backlog_bytes = 0;
        self.progress_asked.clear();
        self.delivered = revision;
        for stream in self.streams.values_mut() {
            stream.progress_asked = None;
            if stream.synced == 0 {
                continue;
            }
            let mut behind = Vec::new();
            for (watch_id, watcher) in &mut stream.watchers {
                let next = watcher.next.max(delivered + 1);
                if watcher.phase == Phase::Synced && next <= revision {
                    (watcher.phase, watcher.next) = (Phase::Unsynced, next);
                    behind.push(*watch_id);
                }
            }
            for watch_id in behind {
                stream.leave_synced();
                stream.join_unsynced(watch_id);
            }
            (stream.queue.waker)();
        }
    }

    /// Says how far a stream is, if all its watchers are.
    fn answer_progress(&mut self, id: StreamId) {
        let revision = self.delivered;
        let Some(stream) = self.streams.get_mut(&id) else { return };
        if stream.has_all_up_to(revision) && !stream.watchers.is_empty() {
            stream.told_all = stream.queue.push(WatchMessage::Progress { watch_id: -1, revision });
        }
    }

    /// Answers those who asked for progress when what is delivered now was the newest, or before.
    fn answer_asked(&mut self) {
        while let Some((revision, id)) = self.progress_asked.front().copied()
            && revision <= self.delivered
        {
            self.progress_asked.pop_front();
            let Some(stream) = self.streams.get_mut(&id) else { continue };
            match stream.progress_asked {
                Some(asked_again) if asked_again > self.delivered => {
                    self.progress_asked.push_back((asked_again, id));
                }
                Some(_) | None => stream.progress_asked = None,
            }
            self.answer_progress(id);
        }
    }
}

impl GroupKey {
    /// The event as this group's watchers see it.
    fn view_of(&self, event: &Event) -> Event {
        let mut event = event.clone();
        if !self.prev_kv {
            event.prev_kv = None;
        }
        event
    }
}

impl Stream {
    fn pick_id(&mut self) -> i64 {
        while self.watchers.contains_key(&self.next_id) {
            self.next_id += 1;
        }
        self.next_id += 1;
        self.next_id - 1
    }

    /// The watcher behind the one that had its turn last, of those of which nothing is queued.
    fn next_to_replay(&self) -> Option<i64> {
        let taken = self.queue.taken_for_replay().filter(|taken| self.told_all <= *taken)?;
        let later = self.unsynced.range((Bound::Excluded(self.replayed_last), Bound::Unbounded));
        let mut in_turn = later.chain(self.unsynced.range(..=self.replayed_last));
        in_turn.find(|id| self.watchers.get(id).is_some_and(|watcher| watcher.told <= taken)).copied()
    }

    /// Whether every watcher has. Asked where nothing is delivered in part: then all that are not ahead have the same.
    fn has_all_up_to(&self, revision: i64) -> bool {
        self.synced == self.watchers.len() && self.ahead.last().is_none_or(|(reached, _)| *reached <= revision)
    }

    fn join_synced(&mut self, watch_id: i64, delivered: i64) {
        self.synced += 1;
        self.synced_of_all.fetch_add(1, Ordering::Relaxed);
        let Some(watcher) = self.watchers.get_mut(&watch_id) else { return };
        let reached = watcher.start_revision.max(watcher.next - 1);
        let entry = (reached > delivered).then_some(reached);
        if let Some(before) = std::mem::replace(&mut watcher.ahead_to, entry) {
            self.ahead.remove(&(before, watch_id));
        }
        self.ahead.extend(entry.map(|reached| (reached, watch_id)));
    }

    fn leave_synced(&mut self) {
        self.synced -= 1;
        self.synced_of_all.fetch_sub(1, Ordering::Relaxed);
    }

    fn join_unsynced(&mut self, watch_id: i64) {
        let new = self.unsynced.insert(watch_id);
        assert!(new, "a watcher falls behind once");
        self.queue.unsynced.store(self.unsynced.len(), Ordering::Relaxed);
    }

    fn leave_unsynced(&mut self, watch_id: i64) {
        let was = self.unsynced.remove(&watch_id);
        assert!(was, "a watcher behind is listed");
        self.queue.unsynced.store(self.unsynced.len(), Ordering::Relaxed);
    }

    /// Queues a live revision for a synced watcher, or lets it fall behind.
    fn offer(&mut self, watch_id: i64, revision: i64, batch: Option<&Arc<EventBatch>>) {
        let Some(watcher) = self.watchers.get_mut(&watch_id) else { return };
        if watcher.phase != Phase::Synced || revision < watcher.next {
            return;
        }
        let Some(batch) = batch.filter(|_| !self.queue.is_full()) else {
            watcher.phase = Phase::Unsynced;
            watcher.next = revision;
            self.leave_synced();
            self.join_unsynced(watch_id);
            // Whoever has room to read it begins now.
            (self.queue.waker)();
            return;
        };
        watcher.sent_since_tick = true;
        watcher.next = revision + 1;
        let fragment = watcher.fragment;
        let batch = Arc::clone(batch);
        watcher.told = self.queue.push(WatchMessage::Events { watch_id, revision, fragment, batch, room: None });
    }
}

#[cfg(test)]
mod tests;
