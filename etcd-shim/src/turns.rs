//! Whose turn it is on the threads that serve connections.
//!
//! The runtime polls tasks in the order in which they became ready. A tenant whose hundreds of connections are always ready would so make
//! each task of a quiet one wait behind all of them, several times a request. Here the tasks of tenants that have used more than a
//! little lately become ready only a few at a time ([`fairly`]): whoever of them is woken while [`Turns`] has no place free waits outside the
//! runtime, and is let in when one of those that are in was polled, the one whose tenant has used less first. Tasks of quiet
//! tenants are never held, so what they find before them is those few.
//!
//! What a tenant has used lately is the time that threads were at work for it ([`Recent`]), of which half is forgotten every
//! [`HALF_LIFE`]. It falls into one of [`LEVELS`] classes, each four times as much as the one before. A tenant that is held back uses
//! less, so what it does next is of a lower class before long; one place in [`TO_LONGEST_EVERY`] goes to whoever has waited longest, of
//! whatever class: nobody waits for ever. While no quiet tenant does anything nobody is held.
//!
//! A turn is short: an answer of many megabytes is written in pieces, one a turn ([`Paced`]), and of the requests that a connection brings
//! as many are polled in its own turn as there is time for ([`may_go_on_here`]).
//!
//! What must hold: where somebody waits all places are taken, and each is given on when its task was polled or dropped. What waits is
//! bounded by the tasks there are, which connections and streams bound.

use std::cell::Cell;
use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};
use std::task::{Context, Poll, Wake, Waker, ready};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::throttle::TenantUse;

/// After this half of what was used is forgotten.
const HALF_LIFE: Duration = Duration::from_millis(50);

/// Classes of tenants. The quiet ones are class 0: up to [`QUIET_NS`], which is what half a percent of one processor comes to.
const LEVELS: usize = 5;
const QUIET_NS: u64 = 400_000;

/// Tenants are told apart by so much, where it matters who is quiet: see [`Turns::has_quiet_beside`].
pub(crate) const QUIET_SLOTS: usize = 16;

/// For so long after a quiet tenant did something, others are held for it.
const HELD_FOR: Duration = Duration::from_secs(1);

/// Places for each thread that polls: one that is polled, and one that is ready when it was.
const PLACES_PER_THREAD: usize = 2;

/// One place in so many goes to whoever has waited longest, so that what was held in a high class is not held for as long as lower
/// ones have enough to do.
const TO_LONGEST_EVERY: u64 = 16;

/// Bytes that one turn may write: about a tenth of a millisecond.
const TURN_BYTES_MAX: usize = 256 << 10;

/// A turn polls no further request of its connection when it has lasted for so long.
const TURN_TIME_MAX: Duration = Duration::from_micros(200);

thread_local! {
    /// What the task that this thread polls may still write in its turn; `None`: it has no turn, and no bound.
    static MAY_WRITE: Cell<Option<usize>> = const { Cell::new(None) };
    /// How long it may go on to poll requests in its turn.
    static GOES_ON: Cell<GoesOn> = const { Cell::new(GoesOn::Nowhere) };
}

#[derive(Clone, Copy)]
enum GoesOn {
    /// It has no turn.
    Nowhere,
    /// It has polled none so far: one it may, whatever came before. Its turn began then.
    Since(Instant),
    Until(Instant),
}

/// Whether the task that this thread polls may poll one more request in its own turn, rather than leave that to a task of the
/// request's, or to its next turn.
pub(crate) fn may_go_on_here() -> bool {
    match GOES_ON.get() {
        GoesOn::Nowhere => false,
        GoesOn::Since(began) => {
            GOES_ON.set(GoesOn::Until(began + TURN_TIME_MAX));
            true
        }
        GoesOn::Until(end) => Instant::now() < end,
    }
}

/// What holds during a turn, also one that panics.
struct Bound;

impl Bound {
    fn set(began: Instant) -> Self {
        MAY_WRITE.set(Some(TURN_BYTES_MAX));
        GOES_ON.set(GoesOn::Since(began));
        Bound
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        MAY_WRITE.set(None);
        GOES_ON.set(GoesOn::Nowhere);
    }
}

/// A connection on which the tasks of [`fairly`] write.
#[derive(Debug)]
pub(crate) struct Paced<S>(pub(crate) S);

impl<S: AsyncWrite + Unpin> Paced<S> {
    fn write(
        &mut self,
        task: &mut Context<'_>,
        write: impl FnOnce(Pin<&mut S>, &mut Context<'_>, usize) -> Poll<io::Result<usize>>,
    ) -> Poll<io::Result<usize>> {
        let left = MAY_WRITE.get();
        if left == Some(0) {
            task.waker().wake_by_ref();
            return Poll::Pending;
        }
        let written = ready!(write(Pin::new(&mut self.0), task, left.unwrap_or(usize::MAX)))?;
        MAY_WRITE.set(left.map(|left| left.saturating_sub(written)));
        Poll::Ready(Ok(written))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Paced<S> {
    fn poll_read(mut self: Pin<&mut Self>, task: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(task, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Paced<S> {
    fn poll_write(mut self: Pin<&mut Self>, task: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.write(task, |stream, task, left| stream.poll_write(task, &bytes[..bytes.len().min(left)]))
    }

    // A call takes no more than some frames, so it may go over the bound by that.
    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        task: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.write(task, |stream, task, _| stream.poll_write_vectored(task, slices))
    }

    fn is_write_vectored(&self) -> bool {
        self.0.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, task: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(task)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, task: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(task)
    }
}

/// What one member polls, and what it holds.
#[derive(Debug)]
pub struct Turns {
    places: usize,
    started: Instant,
    /// When a quiet tenant did something last, in milliseconds since the start, plus one; 0: never.
    quiet_at_ms: AtomicU64,
    /// The same by [`TenantUse::slot`].
    quiet_by_slot: [AtomicU64; QUIET_SLOTS],
    held: Mutex<Held>,
}

#[derive(Debug, Default)]
struct Held {
    taken: usize,
    /// Places that went from one to the next.
    given: u64,
    /// Tasks that ever had to wait.
    numbered: u64,
    /// By class, from 1, with their numbers.
    waiting: [VecDeque<(u64, Arc<Woken>)>; LEVELS - 1],
}

impl Held {
    fn next(&mut self) -> Option<Arc<Woken>> {
        self.given = self.given.wrapping_add(1);
        let waiting = self.waiting.iter_mut().filter(|class| !class.is_empty());
        let class = match self.given % TO_LONGEST_EVERY {
            0 => waiting.min_by_key(|class| class.front().map(|(number, _)| *number)),
            _ => { waiting }.next(),
        };
        Some(class?.pop_front()?.1)
    }
}

impl Default for Turns {
    fn default() -> Self {
        Turns::with_places(PLACES_PER_THREAD * std::thread::available_parallelism().map_or(1, usize::from))
    }
}

impl Turns {
    fn with_places(places: usize) -> Self {
        let quiet_by_slot = std::array::from_fn(|_| AtomicU64::new(0));
        Turns { places, started: Instant::now(), quiet_at_ms: AtomicU64::new(0), quiet_by_slot, held: Mutex::default() }
    }

    fn ms(&self, now: Instant) -> u64 {
        u64::try_from(now.saturating_duration_since(self.started).as_millis()).unwrap_or(u64::MAX)
    }

    /// Whether a task of a tenant of this class may become ready whenever it is.
    fn lets_in(&self, used: &TenantUse, level: u8, now: Instant) -> bool {
        let now_ms = self.ms(now);
        let quiet_at_ms = self.quiet_at_ms.load(Ordering::Relaxed);
        if level == 0 {
            for at_ms in [&self.quiet_at_ms, &self.quiet_by_slot[used.slot()]] {
                if at_ms.load(Ordering::Relaxed) != now_ms + 1 {
                    at_ms.store(now_ms + 1, Ordering::Relaxed);
                }
            }
            return true;
        }
        !lately(quiet_at_ms, now_ms)
    }

    /// Whether a quiet tenant, other than that of this slot, did something lately.
    pub(crate) fn has_quiet_beside(&self, slot: usize, now: Instant) -> bool {
        let now_ms = self.ms(now);
        let by_slot = self.quiet_by_slot.iter().enumerate();
        by_slot.filter(|(other, _)| *other != slot).any(|(_, at_ms)| lately(at_ms.load(Ordering::Relaxed), now_ms))
    }

    /// Takes a place for a task that waits for nothing but that, or lets it wait for one.
    fn take(&self, task: &Arc<Woken>, from: u8, level: u8) -> Taken {
        let mut held = self.held.lock();
        let is_free = held.taken < self.places;
        if task
            .state
            .compare_exchange(from, if is_free { PLACED } else { HELD }, Ordering::AcqRel, Ordering::Relaxed)
            .is_err()
        {
            return Taken::Nothing;
        }
        if is_free {
            held.taken += 1;
            return Taken::Place;
        }
        let class = usize::from(level).clamp(1, LEVELS - 1) - 1;
        held.numbered += 1;
        let number = held.numbered;
        held.waiting[class].push_back((number, Arc::clone(task)));
        Taken::Turn
    }

    /// Gives a place to whoever waits for one, or back.
    fn give(&self) {
        let next = {
            let mut held = self.held.lock();
            loop {
                let Some(next) = held.next() else {
                    held.taken -= 1;
                    break None;
                };
                if next.state.compare_exchange(HELD, PLACED, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
                    break Some(next);
                }
            }
        };
        if let Some(next) = next {
            next.wake_task();
        }
    }
}

/// `quiet_at_ms` as in [`Turns`].
fn lately(quiet_at_ms: u64, now_ms: u64) -> bool {
    quiet_at_ms > 0 && u128::from((now_ms + 1).saturating_sub(quiet_at_ms)) <= HELD_FOR.as_millis()
}

/// What came of asking for a place.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Taken {
    Place,
    /// It waits.
    Turn,
    /// Somebody else has woken it meanwhile, or it is gone.
    Nothing,
}

/// What a tenant has used lately. Many threads charge it at once.
#[derive(Debug, Default)]
pub(crate) struct Recent {
    used_ns: AtomicU64,
    /// How many half lives of this process were over when it was halved last.
    halved: AtomicU64,
}

impl Recent {
    pub(crate) fn charge(&self, spent: Duration, now: Instant) {
        let lives = lives(now);
        let halved = self.halved.fetch_max(lives, Ordering::Relaxed);
        if halved < lives {
            let forget = |used_ns| Some(halve(used_ns, lives - halved));
            let _ = self.used_ns.fetch_update(Ordering::Relaxed, Ordering::Relaxed, forget);
        }
        self.used_ns.fetch_add(u64::try_from(spent.as_nanos()).unwrap_or(u64::MAX >> 1), Ordering::Relaxed);
    }

    fn level(&self, now: Instant) -> u8 {
        let used_ns = self.used_ns.load(Ordering::Relaxed);
        if used_ns <= QUIET_NS {
            return 0;
        }
        // It may have been idle since.
        level_of(halve(used_ns, lives(now).saturating_sub(self.halved.load(Ordering::Relaxed))))
    }
}

fn halve(used_ns: u64, times: u64) -> u64 {
    used_ns.checked_shr(u32::try_from(times).unwrap_or(u32::MAX)).unwrap_or(0)
}

/// Half lives since this process began to count.
fn lives(now: Instant) -> u64 {
    static ZERO: LazyLock<Instant> = LazyLock::new(Instant::now);
    let since = now.saturating_duration_since(*ZERO);
    u64::try_from(since.as_nanos() / HALF_LIFE.as_nanos()).unwrap_or(u64::MAX)
}

fn level_of(used_ns: u64) -> u8 {
    let mut bound_ns = QUIET_NS;
    let mut level = 0;
    while used_ns > bound_ns && usize::from(level) < LEVELS - 1 {
        bound_ns *= 4;
        level += 1;
    }
    level
}

// States of a task.
/// It was made and not polled yet.
const NEW: u8 = 0;
/// It is not ready, or is being polled.
const WAITS: u8 = 1;
/// It is ready, and has no place.
const READY: u8 = 2;
/// It is ready, in a place.
const PLACED: u8 = 3;
/// It would be ready, and waits for a place.
const HELD: u8 = 4;
const GONE: u8 = 5;

/// A task of a tenant, as those see it who wake it.
#[derive(Debug)]
struct Woken {
    turns: Arc<Turns>,
    used: Arc<TenantUse>,
    state: AtomicU8,
    /// The runtime's.
    task: Mutex<Option<Waker>>,
}

impl Woken {
    fn wake_task(&self) {
        if let Some(task) = &*self.task.lock() {
            task.wake_by_ref();
        }
    }
}

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        // Not a mere load: whoever polls it next has to see what it was woken for, also where somebody else has woken it already.
        if self.state.fetch_or(0, Ordering::AcqRel) != WAITS {
            return;
        }
        let now = Instant::now();
        let level = self.used.recent().level(now);
        if self.turns.lets_in(&self.used, level, now) {
            if self.state.compare_exchange(WAITS, READY, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
                self.wake_task();
            }
        } else if self.turns.take(self, WAITS, level) == Taken::Place {
            self.wake_task();
        }
    }
}

/// The side of a task that is polled.
struct Turn {
    woken: Arc<Woken>,
    waker: Waker,
    /// The runtime's, as it was last given.
    task: Option<Waker>,
}

impl Drop for Turn {
    fn drop(&mut self) {
        if self.woken.state.swap(GONE, Ordering::AcqRel) == PLACED {
            self.woken.turns.give();
        }
    }
}

/// Taken while the task is polled; given on when it was.
struct Place<'a>(&'a Turns);

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.0.give();
    }
}

impl Turn {
    fn new(turns: &Arc<Turns>, used: &Arc<TenantUse>) -> Self {
        let (turns, used) = (Arc::clone(turns), Arc::clone(used));
        let woken = Arc::new(Woken { turns, used, state: AtomicU8::new(NEW), task: Mutex::new(None) });
        Turn { waker: Waker::from(Arc::clone(&woken)), woken, task: None }
    }

    fn poll<F: Future + ?Sized>(&mut self, task: &Context<'_>, future: Pin<&mut F>) -> Poll<F::Output> {
        let woken = &self.woken;
        if self.task.as_ref().is_none_or(|known| !known.will_wake(task.waker())) {
            self.task = Some(task.waker().clone());
            woken.task.lock().clone_from(&self.task);
        }
        let began = Instant::now();
        let is_in = match woken.state.load(Ordering::Acquire) {
            NEW => {
                let level = woken.used.recent().level(began);
                woken.turns.lets_in(&woken.used, level, began) || woken.turns.take(woken, NEW, level) == Taken::Place
            }
            // Polled for another reason than that it was woken, such as that its connection has to go; its place comes later.
            _ => true,
        };
        if !is_in {
            return Poll::Pending;
        }
        let change = |state| (state != HELD).then_some(WAITS);
        let before = woken.state.fetch_update(Ordering::AcqRel, Ordering::Acquire, change);
        let place = (before == Ok(PLACED)).then(|| Place(&woken.turns));
        let bound = Bound::set(began);
        let polled = future.poll(&mut Context::from_waker(&self.waker));
        drop(bound);
        drop(place);
        let now = Instant::now();
        woken.used.spent(now.saturating_duration_since(began), now);
        polled
    }
}

/// Runs a task of a tenant when it is its turn, and charges it for the time. It has to be all of its task, or what its task waits for
/// most of the time.
pub(crate) async fn fairly<F: Future>(turns: Arc<Turns>, used: Arc<TenantUse>, future: F) -> F::Output {
    let mut turn = Turn::new(&turns, &used);
    let mut future = std::pin::pin!(future);
    std::future::poll_fn(|task| turn.poll(task, future.as_mut())).await
}

#[cfg(test)]
pub(crate) mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::*;

    /// Counts wakes.
    #[derive(Default)]
    pub(crate) struct Runtime(pub(crate) AtomicUsize);

    impl Wake for Runtime {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// A task that is polled by hand.
    struct Task {
        turn: Turn,
        runtime: Arc<Runtime>,
        polled: usize,
    }

    impl Task {
        fn of(turns: &Arc<Turns>, used: &Arc<TenantUse>) -> Self {
            Task { turn: Turn::new(turns, used), runtime: Arc::default(), polled: 0 }
        }

        fn poll(&mut self) {
            let polled = &mut self.polled;
            let work = std::pin::pin!(std::future::poll_fn(|_| {
                *polled += 1;
                Poll::<()>::Pending
            }));
            let waker = Waker::from(Arc::clone(&self.runtime));
            assert!(self.turn.poll(&Context::from_waker(&waker), work).is_pending());
        }

        fn woken(&self) -> usize {
            self.runtime.0.load(Ordering::Relaxed)
        }
    }

    fn that_used(time: Duration) -> Arc<TenantUse> {
        let used = Arc::new(TenantUse::default());
        used.spent(time, Instant::now());
        used
    }

    #[test]
    fn what_was_used_is_forgotten() {
        let (recent, zero) = (Recent::default(), Instant::now());
        assert_eq!(recent.level(zero), 0);
        recent.charge(Duration::from_nanos(4 * QUIET_NS), zero);
        assert_eq!(recent.level(zero), 1);
        recent.charge(Duration::from_secs(1), zero);
        assert_eq!(usize::from(recent.level(zero)), LEVELS - 1);
        let at = |lives: u32| zero + lives * HALF_LIFE;
        let levels: Vec<u8> = (0..=16).step_by(4).map(|lives| recent.level(at(lives))).collect();
        assert!(levels.is_sorted_by(|a, b| a >= b) && levels[4] == 0, "{levels:?}");
        recent.charge(Duration::from_nanos(1), at(16));
        assert_eq!((recent.level(at(16)), recent.level(at(1_000))), (0, 0));
    }

    /// A tenant that was busy and is not any more has tasks that were held when it was: others of lower classes must not pass them for
    /// ever.
    #[test]
    fn what_was_held_in_a_high_class_comes_to_its_turn() {
        let turns = Arc::new(Turns::with_places(1));
        let (busiest, busy) = (that_used(Duration::from_secs(1_000)), that_used(Duration::from_nanos(2 * QUIET_NS)));
        let busier = that_used(Duration::from_nanos(12 * QUIET_NS));
        let mut quiet = Task::of(&turns, &Arc::default());
        quiet.poll();
        quiet.turn.waker.wake_by_ref();
        quiet.poll();
        let held = |used| {
            let mut task = Task::of(&turns, used);
            task.poll();
            task.turn.waker.wake_by_ref();
            task
        };
        // Also between those that use less and those that use more.
        for class in [&busiest, &busier] {
            let mut placed = held(&busiest);
            let waits = held(class);
            let mut others = Vec::new();
            for turns_taken in 0.. {
                others.push(held(&busiest));
                let next = held(&busy);
                placed.poll();
                if waits.woken() > 0 {
                    break;
                }
                assert!(turns_taken < 2 * TO_LONGEST_EVERY, "it is passed again and again");
                placed = if next.woken() > 0 { next } else { others.remove(0) };
            }
            drop((placed, waits, others));
            assert_eq!(turns.held.lock().taken, 0);
        }
    }

    #[test]
    fn busy_tenants_are_let_in_a_few_at_a_time_while_there_are_quiet_ones() {
        let turns = Arc::new(Turns::with_places(1));
        let busy = that_used(Duration::from_secs(1_000));
        let mut tasks: Vec<Task> = (0..3).map(|_| Task::of(&turns, &busy)).collect();
        tasks.iter_mut().for_each(Task::poll);
        tasks.iter().for_each(|task| task.turn.waker.wake_by_ref());
        assert_eq!(tasks.iter().map(Task::woken).collect::<Vec<_>>(), [1, 1, 1], "there is nobody else");
        tasks.iter_mut().for_each(Task::poll);

        let mut quiet = Task::of(&turns, &Arc::default());
        quiet.poll();
        tasks.iter().for_each(|task| task.turn.waker.wake_by_ref());
        assert_eq!(tasks.iter().map(Task::woken).collect::<Vec<_>>(), [2, 1, 1], "one place");
        quiet.turn.waker.wake_by_ref();
        assert_eq!(quiet.woken(), 1, "it needs none");
        tasks[0].poll();
        assert_eq!(tasks.iter().map(Task::woken).collect::<Vec<_>>(), [2, 2, 1], "given on");
        // One that is gone gives its place on, and gets none.
        drop(tasks.remove(1));
        assert_eq!(tasks.iter().map(Task::woken).collect::<Vec<_>>(), [2, 2]);
        tasks[0].turn.waker.wake_by_ref();
        drop(tasks.remove(0));
        tasks[0].poll();
        assert_eq!((tasks[0].polled, turns.held.lock().taken), (3, 0));
    }

    #[test]
    fn who_used_less_is_let_in_first_and_new_tasks_wait_too() {
        let turns = Arc::new(Turns::with_places(1));
        let mut quiet = Task::of(&turns, &Arc::default());
        quiet.poll();
        let [busiest, busy] = [1_000, 1].map(|seconds| that_used(seconds * Duration::from_millis(20)));
        let mut first = Task::of(&turns, &busiest);
        first.poll();
        assert_eq!(first.polled, 1, "the place was free");
        first.turn.waker.wake_by_ref();
        let mut tasks = [Task::of(&turns, &busiest), Task::of(&turns, &busy)];
        tasks.iter_mut().for_each(Task::poll);
        assert_eq!(tasks.each_ref().map(|task| task.polled), [0, 0], "it is taken");
        first.poll();
        assert_eq!(tasks.each_ref().map(Task::woken), [0, 1]);
        // Polled for another reason, it does not lose its turn.
        tasks[0].poll();
        assert_eq!(tasks[0].polled, 1);
        tasks[1].poll();
        assert_eq!(tasks.each_ref().map(Task::woken), [1, 1]);
        tasks.iter_mut().for_each(Task::poll);
        assert_eq!(turns.held.lock().taken, 0);
    }

    // An answer of many megabytes does not keep its thread.
    #[test]
    fn a_turn_writes_so_much_and_no_more() {
        let mut stream = Paced(Vec::<u8>::new());
        let waker = Waker::from(Arc::<Runtime>::default());
        let mut task = Context::from_waker(&waker);
        let mut write = |task: &mut Context<'_>| Pin::new(&mut stream).poll_write(task, &[0; TURN_BYTES_MAX * 2 / 3]);
        assert!(matches!(write(&mut task), Poll::Ready(Ok(_))), "nobody's turn: no bound");
        let mut turns = Vec::new();
        let mut turn = Turn::new(&Arc::default(), &Arc::default());
        for _ in 0..2 {
            let work = std::pin::pin!(std::future::poll_fn(|task| {
                let mut written = 0;
                while let Poll::Ready(more) = write(task) {
                    written += more.unwrap();
                }
                turns.push(written);
                Poll::<()>::Pending
            }));
            assert!(turn.poll(&Context::from_waker(&waker), work).is_pending());
        }
        assert_eq!(turns, [TURN_BYTES_MAX; 2], "and the next one goes on");
        assert!(matches!(write(&mut task), Poll::Ready(Ok(_))));
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn every_task_comes_to_its_end() {
        let turns = Arc::new(Turns::with_places(1));
        let tenants =
            [that_used(Duration::ZERO), that_used(Duration::from_secs(10)), that_used(Duration::from_secs(1_000))];
        let tasks = (0..300).map(|number: usize| {
            let task = async move {
                for _ in 0..100 {
                    tokio::task::yield_now().await;
                }
                number
            };
            tokio::spawn(fairly(Arc::clone(&turns), Arc::clone(&tenants[number % 3]), task))
        });
        for (number, task) in tasks.enumerate().collect::<Vec<_>>() {
            if number % 10 == 9 {
                task.abort();
            } else {
                assert_eq!(task.await.unwrap(), number);
            }
        }
        let mut held = turns.held.lock();
        while held.taken > 0 {
            // One that was aborted is dropped on its own thread.
            parking_lot::MutexGuard::unlocked(&mut held, std::thread::yield_now);
        }
        assert!(held.waiting.iter().all(VecDeque::is_empty));
        assert!(tenants[0].cpu() > Duration::ZERO);
    }
}
