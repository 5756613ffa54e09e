use std::ops::RangeInclusive;

use bytes::Bytes;
use proptest::prelude::*;

use super::*;
use crate::limits::WATCHERS_PER_TENANT_MAX;
use crate::watch::stream::Boundless;

fn event(revision: i64) -> Event {
    Event { kind: EventKind::Put, key: Bytes::from_static(b"k"), kv: revision.to_string().into(), prev_kv: None }
}

fn changes(revision: i64) -> Changes {
    Changes { events: vec![event(revision)], with_prev: true }
}

fn spec(start_revision: i64) -> WatchSpec {
    WatchSpec {
        range: KeyRange::Single(Bytes::from_static(b"k")),
        start_revision,
        prev_kv: false,
        no_put: false,
        no_delete: false,
        progress_notify: false,
        fragment: false,
        watch_id: 0,
    }
}

/// A stream and what its client has seen.
struct Seen {
    id: StreamId,
    queue: Arc<Queue>,
    /// By watch: the first revision that is to come, and the last that came.
    watches: BTreeMap<i64, (i64, i64)>,
    /// What the starts of creates were that are not confirmed yet, in order.
    creating: VecDeque<i64>,
    progress: i64,
}

impl Seen {
    fn open(hub: &Hub) -> Self {
        let (id, queue) = hub.open_stream(Arc::new(|| {}));
        Seen { id, queue, watches: BTreeMap::new(), creating: VecDeque::new(), progress: 0 }
    }

    fn create(&mut self, hub: &Hub, start_revision: i64) {
        self.creating.push_back(start_revision);
        hub.create(self.id, spec(start_revision), WATCHERS_PER_TENANT_MAX);
    }

    /// Reads what is queued. Events of each watch are in order, without gaps and repetitions; progress is what it says.
    fn read(&mut self) {
        while let Some(message) = self.queue.pop() {
            match message {
                WatchMessage::Created { watch_id, revision } => {
                    let start = self.creating.pop_front().unwrap();
                    let first = if start == 0 { revision + 1 } else { start };
                    self.watches.insert(watch_id, (first, first - 1));
                }
                WatchMessage::Events { watch_id, batch, .. } => {
                    let (_, last) = self.watches.get_mut(&watch_id).unwrap();
                    for event in &batch.events {
                        *last += 1;
                        assert_eq!(event.kv, last.to_string(), "of watch {watch_id}");
                    }
                }
                WatchMessage::Progress { watch_id: -1, revision } => {
                    assert!(revision >= self.progress, "progress goes forward");
                    self.progress = revision;
                    for (watch_id, (first, last)) in &self.watches {
                        assert!(*last >= revision || *first > revision, "watch {watch_id} has {last}, told {revision}");
                    }
                }
                WatchMessage::Refused { .. }
                | WatchMessage::Canceled { .. }
                | WatchMessage::Compacted { .. }
                | WatchMessage::Progress { .. } => panic!("{message:?}"),
            }
        }
    }

    /// Reads history for the watch whose turn it is, as `replay_step` does.
    fn replay(&self, hub: &Hub, newest: i64) {
        if let Some(plan) = hub.plan_replay(self.id) {
            // In small steps, so that changes come in between.
            let reached = newest.min(plan.next + 2);
            let events = RangeInclusive::new(plan.next, reached).map(event).collect();
            hub.finish_replay(self.id, &plan, Replayed::Events { events, reached, revision: newest }, Boundless);
        }
    }
}

#[test]
fn many_watchers_are_served_in_steps() {
    let hub = Hub::serving_at_once(1, 2);
    let mut streams = [Seen::open(&hub), Seen::open(&hub)];
    for number in 0..5 {
        streams[number % 2].create(&hub, 0);
    }
    let has = |streams: &mut [Seen; 2]| {
        streams.iter_mut().for_each(Seen::read);
        streams.iter().flat_map(|seen| seen.watches.values()).map(|(_, last)| *last).sum::<i64>() - 5
    };
    assert!(hub.publish(2, changes(2)), "nobody knew that something waits");
    assert!(!hub.publish(3, changes(3)), "somebody does");
    hub.request_progress(streams[0].id);
    let mut seen = vec![has(&mut streams)];
    let mut told = vec![streams[0].progress];
    while hub.deliver(3) {
        seen.push(has(&mut streams));
        told.push(streams[0].progress);
    }
    assert_eq!(seen, [0, 3, 6, 9], "events of all watches");
    assert_eq!(told, [0, 0, 0, 0], "not before everything up to what was the newest");
    assert_eq!((has(&mut streams), streams[0].progress), (10, 3));
    assert!(hub.publish(4, changes(4)) && hub.deliver(4) && !hub.deliver(4));
}

// One that has too much waiting reads it from the engine, wherever a step had stopped.
#[test]
fn a_backlog_has_a_bound() {
    let hub = Hub::serving_at_once(1, 1);
    let mut seen = Seen::open(&hub);
    (0..3).for_each(|_| seen.create(&hub, 0));
    assert!(hub.publish(2, changes(2)));
    assert!(hub.deliver(2));
    let newest = 2 + i64::try_from(WATCH_BACKLOG_REVISIONS_MAX).unwrap();
    for revision in 3..=newest {
        assert!(!hub.publish(revision, changes(revision)));
    }
    assert!(!hub.deliver(1), "dropped");
    seen.read();
    assert_eq!(seen.watches.values().map(|(_, last)| *last).collect::<Vec<_>>(), [2, 2, 1]);
    while seen.queue.unsynced.load(Ordering::Relaxed) > 0 {
        seen.replay(&hub, newest);
        seen.read();
    }
    assert!(seen.watches.values().all(|(_, last)| *last == newest));
}

// A watcher that wants to see what was replaced may come when the command has run already, for which nobody kept it. kube-apiserver
// takes an event without it for a broken watch.
#[test]
fn who_wants_to_see_what_was_replaced_reads_it_if_nobody_kept_it() {
    let hub = Hub::new(1);
    let woken = Arc::new(AtomicUsize::new(0));
    let (id, queue) = hub.open_stream({
        let woken = Arc::clone(&woken);
        Arc::new(move || {
            woken.fetch_add(1, Ordering::Relaxed);
        })
    });
    hub.create(id, WatchSpec { prev_kv: true, ..spec(0) }, WATCHERS_PER_TENANT_MAX);
    hub.create(id, spec(0), WATCHERS_PER_TENANT_MAX);
    while queue.pop().is_some() {}
    let woken_before = woken.load(Ordering::Relaxed);
    assert!(!hub.publish(2, Changes { events: vec![event(2)], with_prev: false }));
    assert!(woken.load(Ordering::Relaxed) > woken_before);
    let sent = std::iter::from_fn(|| queue.pop()).collect::<Vec<_>>();
    assert!(matches!(sent[..], [WatchMessage::Events { watch_id: 1, .. }]), "{sent:?}");
    let plan = hub.plan_replay(id).unwrap();
    assert_eq!((plan.watch_id, plan.next), (0, 2));
    hub.finish_replay(id, &plan, Replayed::Events { events: vec![event(2)], reached: 2, revision: 2 }, Boundless);
    assert!(!hub.publish(3, changes(3)));
    assert_eq!(std::iter::from_fn(|| queue.pop()).count(), 3, "the one that was read, and the next for both");
}

// One command may delete a hundred thousand keys under ten thousand watchers: apply must not look for every pair.
#[test]
fn what_very_many_want_is_read_by_them() {
    let hub = Hub::new(1);
    let (id, queue) = hub.open_stream(Arc::new(|| {}));
    let groups = 300;
    for end in 0..groups {
        let range = KeyRange::HalfOpen { start: "a".into(), end: format!("z{end}").into() };
        hub.create(id, WatchSpec { range, ..spec(0) }, WATCHERS_PER_TENANT_MAX);
        queue.pop();
    }
    let many = |events: usize| Changes { events: vec![event(2); events], with_prev: true };
    let _ = hub.publish(2, many(WATCH_MATCHES_MAX / groups + 2));
    assert!(queue.pop().is_none());
    assert_eq!(queue.unsynced.load(Ordering::Relaxed), groups);
    // A single event goes to all, however many they are: there is nothing to find out.
    let hub = Hub::serving_at_once(1, 0);
    let (id, queue) = hub.open_stream(Arc::new(|| {}));
    hub.create(id, spec(0), WATCHERS_PER_TENANT_MAX);
    queue.pop();
    assert!(hub.publish(2, many(1)) && !hub.deliver(1));
    assert!(matches!(queue.pop(), Some(WatchMessage::Events { .. })));
}

// The client may cancel a watcher and make another of the same id while history is read for the first.
#[test]
fn what_was_read_for_one_watcher_is_not_given_to_another() {
    let hub = Hub::new(5);
    let (id, queue) = hub.open_stream(Arc::new(|| {}));
    hub.create(id, WatchSpec { watch_id: 7, ..spec(3) }, WATCHERS_PER_TENANT_MAX);
    queue.pop();
    let plan = hub.plan_replay(id).unwrap();
    hub.cancel(id, 7);
    let other = WatchSpec { range: KeyRange::Single("other".into()), watch_id: 7, ..spec(3) };
    hub.create(id, other, WATCHERS_PER_TENANT_MAX);
    while queue.pop().is_some() {}
    hub.finish_replay(id, &plan, Replayed::Events { events: vec![event(3)], reached: 5, revision: 5 }, Boundless);
    assert!(queue.pop().is_none());
    assert_eq!(hub.plan_replay(id).unwrap().next, 3);
}

// The same id, range and start: but its creation has not been told yet, and what is replayed goes out before what waits.
#[test]
fn what_was_read_for_one_watcher_does_not_overtake_the_creation_of_another() {
    let hub = Hub::new(5);
    let (id, queue) = hub.open_stream(Arc::new(|| {}));
    let same = || hub.create(id, WatchSpec { watch_id: 7, ..spec(3) }, WATCHERS_PER_TENANT_MAX);
    same();
    queue.pop();
    let plan = hub.plan_replay(id).unwrap();
    hub.cancel(id, 7);
    same();
    hub.finish_replay(id, &plan, Replayed::Events { events: vec![event(3)], reached: 5, revision: 5 }, Boundless);
    assert!(matches!(queue.pop(), Some(WatchMessage::Canceled { .. })));
    assert!(hub.plan_replay(id).is_none(), "not before it is told");
    assert!(matches!(queue.pop(), Some(WatchMessage::Created { .. })));
    assert_eq!(hub.plan_replay(id).unwrap().next, 3);
}

// One watcher has a million revisions to read; who is behind by one does not wait for that.
#[test]
fn watchers_that_are_behind_take_turns() {
    let newest = 1_000_000;
    let hub = Hub::new(newest);
    let mut seen = Seen::open(&hub);
    seen.create(&hub, 1);
    (0..3).for_each(|_| seen.create(&hub, newest));
    seen.read();
    for _ in 0..4 {
        seen.replay(&hub, newest);
        seen.read();
    }
    assert_eq!(seen.watches.values().map(|(_, last)| *last).collect::<Vec<_>>(), [3, newest, newest, newest]);
}

// What is replayed holds memory, so it may not wait behind what waits for memory.
#[test]
fn what_is_replayed_goes_out_first_and_one_at_a_time() {
    let hub = Hub::new(5);
    let (id, queue) = hub.open_stream(Arc::new(|| {}));
    [0, 4, 4].iter().for_each(|start| hub.create(id, spec(*start), WATCHERS_PER_TENANT_MAX));
    (0..3).for_each(|_| drop(queue.pop()));
    assert!(!hub.publish(6, changes(6)));
    let plan = hub.plan_replay(id).unwrap();
    hub.finish_replay(id, &plan, Replayed::Events { events: vec![event(4)], reached: 4, revision: 5 }, Boundless);
    assert!(hub.plan_replay(id).is_none(), "there is one");
    assert!(matches!(queue.pop(), Some(WatchMessage::Events { watch_id: 1, room: Some(_), .. })));
    assert_eq!(hub.plan_replay(id).unwrap().watch_id, 2);
    assert!(matches!(queue.pop(), Some(WatchMessage::Events { watch_id: 0, room: None, .. })));
}

fn progress(queue: &Queue) -> Vec<(i64, i64)> {
    let told = std::iter::from_fn(|| queue.pop()).filter_map(|message| match message {
        WatchMessage::Progress { watch_id, revision } => Some((watch_id, revision)),
        WatchMessage::Created { .. }
        | WatchMessage::Refused { .. }
        | WatchMessage::Events { .. }
        | WatchMessage::Canceled { .. }
        | WatchMessage::Compacted { .. } => None,
    });
    told.collect()
}

// A tenant that writes all the time has a backlog at every tick. Whoever waits behind it has all before it.
#[test]
fn a_tick_tells_how_far_a_backlog_has_been_delivered() {
    let hub = Hub::serving_at_once(1, 0);
    let (id, queue) = hub.open_stream(Arc::new(|| {}));
    let idle = WatchSpec { range: KeyRange::Single("idle".into()), progress_notify: true, ..spec(0) };
    for spec in [idle, WatchSpec { progress_notify: true, ..spec(0) }] {
        hub.create(id, spec, WATCHERS_PER_TENANT_MAX);
    }
    for revision in 2..5 {
        let _ = hub.publish(revision, changes(revision));
    }
    assert!(hub.deliver(2));
    queue.pop();
    hub.tick_progress(id);
    assert_eq!(progress(&queue), [(0, 3)], "the other one was sent events");
    hub.tick_progress(id);
    assert_eq!(progress(&queue), [(0, 3), (1, 3)]);
}

#[test]
fn a_tick_reaches_more_watchers_than_the_queue_holds() {
    let hub = Hub::new(1);
    let (id, queue) = hub.open_stream(Arc::new(|| {}));
    let watchers = i64::try_from(3 * WATCH_QUEUE_RESPONSES_MAX).unwrap();
    for _ in 0..watchers {
        hub.create(id, WatchSpec { progress_notify: true, ..spec(0) }, WATCHERS_PER_TENANT_MAX);
        queue.pop();
    }
    hub.tick_progress(id);
    let mut told = Vec::new();
    while queue.owes_progress.load(Ordering::Relaxed) {
        told.extend(progress(&queue));
        // The next tick may come before that.
        hub.tick_progress(id);
    }
    told.extend(progress(&queue));
    assert!(told.iter().map(|(watch_id, _)| *watch_id).eq(0..watchers), "each once: {told:?}");
}

// Progress of a stream is told from counts, not by asking each of its watchers.
#[test]
fn watchers_of_the_future_hold_up_progress_until_it_comes() {
    let hub = Hub::new(5);
    let (id, queue) = hub.open_stream(Arc::new(|| {}));
    let asked = || {
        hub.request_progress(id);
        progress(&queue)
    };
    hub.create(id, spec(0), WATCHERS_PER_TENANT_MAX);
    assert_eq!(asked(), [(-1, 5)]);
    [7, 100, 4].iter().for_each(|start| hub.create(id, spec(*start), WATCHERS_PER_TENANT_MAX));
    assert_eq!(asked(), []);
    hub.cancel(id, 2);
    hub.cancel(id, 3);
    assert_eq!(asked(), []);
    assert!(!hub.publish(6, changes(6)));
    assert_eq!(asked(), []);
    assert!(!hub.publish(7, changes(7)));
    assert_eq!(asked(), [(-1, 7)]);
    hub.create(id, spec(7), WATCHERS_PER_TENANT_MAX);
    assert_eq!(asked(), [], "it has to be told of that first");
    let plan = hub.plan_replay(id).unwrap();
    // Its view was newer than what was handed in.
    hub.finish_replay(id, &plan, Replayed::Events { events: vec![event(7)], reached: 8, revision: 8 }, Boundless);
    assert_eq!(asked(), [], "one knows more than the others");
    assert!(!hub.publish(8, changes(8)));
    assert_eq!(asked(), [(-1, 8)]);
}

// While all are behind there is nothing to look for, however many they are.
#[test]
fn nothing_is_matched_while_nobody_is_synced() {
    let hub = Hub::new(5);
    let (id, queue) = hub.open_stream(Arc::new(|| {}));
    hub.create(id, spec(0), WATCHERS_PER_TENANT_MAX);
    hub.create(id, spec(3), WATCHERS_PER_TENANT_MAX);
    let matches = || hub.state.lock().matches(&[event(6)]).unwrap().len();
    assert_eq!(matches(), 1);
    hub.skip_to(6);
    assert_eq!(matches(), 0);
    (0..2).for_each(|_| drop(queue.pop()));
    let plan = hub.plan_replay(id).unwrap();
    hub.finish_replay(id, &plan, Replayed::Events { events: vec![], reached: 6, revision: 6 }, Boundless);
    assert_eq!(matches(), 1);
    hub.cancel(id, 0);
    hub.cancel(id, 1);
    assert_eq!((matches(), hub.state.lock().synced.load(Ordering::Relaxed)), (0, 0));
}

// A stream is closed in several turns of the lock; nothing of it may stay.
#[test]
fn a_stream_of_many_watchers_is_closed_whole() {
    let hub = Hub::new(1);
    let (id, _queue) = hub.open_stream(Arc::new(|| {}));
    for end in 0..3 * WATCH_CLOSE_STEP {
        let range = KeyRange::HalfOpen { start: "a".into(), end: format!("b{end}").into() };
        hub.create(id, WatchSpec { range, prev_kv: true, ..spec(0) }, WATCHERS_PER_TENANT_MAX);
    }
    let mut closed = hub.close_stream(id).unwrap();
    assert!(hub.forget_some(&mut closed) && hub.forget_some(&mut closed) && !hub.forget_some(&mut closed));
    assert_eq!(hub.counts(), (0, 0));
    assert!(!hub.wants_prev_kv() && !hub.publish(2, changes(2)));
}

#[derive(Clone, Debug)]
enum Step {
    Publish,
    Skip,
    Deliver(usize),
    Create { stream: usize, back: Option<i64> },
    Progress(usize),
    Replay(usize),
    Read(usize),
    Reopen(usize),
}

fn step() -> impl Strategy<Value = Step> {
    let stream = 0usize..3;
    prop_oneof![
        8 => Just(Step::Publish),
        1 => Just(Step::Skip),
        4 => (0usize..5).prop_map(Step::Deliver),
        3 => (stream.clone(), prop::option::of(-2i64..6)).prop_map(|(stream, back)| Step::Create { stream, back }),
        3 => stream.clone().prop_map(Step::Progress),
        3 => stream.clone().prop_map(Step::Replay),
        4 => stream.clone().prop_map(Step::Read),
        1 => stream.prop_map(Step::Reopen),
    ]
}

proptest! {
    // However publication, delivery, replay and clients interleave: every watch sees every revision from its start on, once, in order,
    // and progress is told of nothing that was not sent.
    #[test]
    fn no_watch_misses_or_repeats_a_revision(steps in prop::collection::vec(step(), 1..200)) {
        let hub = Hub::serving_at_once(10, 2);
        let mut newest = 10;
        let mut streams: Vec<Seen> = (0..3).map(|_| Seen::open(&hub)).collect();
        for step in steps {
            match step {
                Step::Publish => {
                    newest += 1;
                    let _ = hub.publish(newest, changes(newest));
                }
                Step::Skip => {
                    newest += 2;
                    hub.skip_to(newest);
                }
                Step::Deliver(watchers_max) => {
                    hub.deliver(watchers_max);
                }
                Step::Create { stream, back } => {
                    let start = back.map_or(0, |back| newest - back);
                    streams[stream].create(&hub, start.max(0));
                }
                Step::Progress(stream) => hub.request_progress(streams[stream].id),
                Step::Replay(stream) => streams[stream].replay(&hub, newest),
                Step::Read(stream) => streams[stream].read(),
                Step::Reopen(stream) => {
                    let mut closed = hub.close_stream(streams[stream].id).unwrap();
                    while hub.forget_some(&mut closed) {}
                    streams[stream] = Seen::open(&hub);
                }
            }
        }
        while hub.deliver(3) {}
        for seen in &mut streams {
            seen.read();
            while hub.plan_replay(seen.id).is_some() {
                seen.replay(&hub, newest);
                seen.read();
            }
            for (watch_id, (first, last)) in &seen.watches {
                prop_assert_eq!(*last, newest.max(first - 1), "of watch {}", watch_id);
            }
            if !seen.watches.is_empty() && seen.watches.values().all(|(first, _)| *first <= newest + 1) {
                let before = seen.progress;
                hub.request_progress(seen.id);
                seen.read();
                prop_assert!(seen.progress >= before);
            }
        }
        prop_assert_eq!(hub.state.lock().backlog_bytes, 0);
    }
}
