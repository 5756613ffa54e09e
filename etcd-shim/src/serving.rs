//! How many of the threads that serve connections do so.
//!
//! The runtime wakes another thread whenever there might be more to do than the one that is awake gets done. While a processor is free that
//! costs little. Where other processes have the processors (members of a cell on one machine, pods on a full node) the other thread waits for
//! one, finds that all is done, and sleeps again; with three members on two processors such changes between threads were a fifth of what a
//! read cost (decision 0003).
//!
//! So once a [`PERIOD`] the system is asked how long these threads ran, how long they waited for a processor, and whether one was free. If they wait
//! much though this process has less than half of the processors, and one thread less could have done it all, then one more of them rests: it polls
//! a task that blocks. They all serve again as soon as one of that is not so.
//!
//! What must hold: one thread always serves. What a thread that rests has in hand waits no longer than a [`SLICE`] (two, where of three threads or
//! more the same one polls two such tasks): after each it looks at the network and polls all that it has before it goes on to rest. When the
//! watch ends nobody rests, because the runtime waits for its threads.
//!
//! Left out: to keep threads from serving where this process itself has the processors. There a thread less that serves is a smaller share for those
//! who serve, and raft's, apply's and the reading threads have it: fewer operations (decision 0003). And machines, or shares of one, with more than
//! [`THREADS_MAX`] threads, where those that rest would be many and what one of them is woken for in vain is little beside what all do.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use rustix::time::{ClockId, clock_gettime};
use tenure_raft_server::behind_ready_tasks;
use tokio::runtime::Handle;

/// How often it is looked.
const PERIOD: Duration = Duration::from_millis(100);

/// For how long a thread rests before it looks after what it has in hand.
const SLICE: Duration = Duration::from_millis(10);

/// See the module's essay.
const THREADS_MAX: usize = 8;

/// What was done in a period, in processors: 1 is one for the whole of it.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Seen {
    /// By the threads that serve.
    ran: f64,
    /// They were ready to run, without a processor.
    waited: f64,
    /// By the whole process.
    process_ran: f64,
    /// The share of the machine's processors that nobody used.
    free: f64,
}

/// How many of `count` threads should serve in the next period, of which `serving` did in the last.
fn should_serve(seen: Seen, serving: usize, count: usize, processors: f64) -> usize {
    // Once a thread rests the others wait less, and more is free; and nobody comes and goes because of a little more or less.
    let rests = serving < count;
    let (waits_at_least, free_at_most, own_at_most) = if rests { (0.25, 0.4, 0.6) } else { (0.5, 0.25, 0.5) };
    let is_crowded = seen.waited > seen.ran * waits_at_least && seen.free < free_at_most;
    let others_have_most = seen.process_ran < processors * own_at_most;
    // With little to do there is little to gain.
    let has_much_to_do = seen.ran > 0.1;
    let keeps_up = seen.ran < 0.85 * serving as f64;
    if !(is_crowded && others_have_most && has_much_to_do && keeps_up) {
        return count;
    }
    let one_less_would_do = serving > 1 && seen.ran < 0.65 * (serving - 1) as f64;
    if one_less_would_do { serving - 1 } else { serving }
}

/// The threads of a runtime that serve connections.
#[derive(Debug, Default)]
pub struct ServingThreads(Mutex<Vec<File>>);

impl ServingThreads {
    /// Counts the calling thread among them. Where the system does not tell what it did, nobody ever rests.
    pub fn join(&self) {
        let id = rustix::thread::gettid();
        match File::open(format!("/proc/self/task/{id}/schedstat")) {
            Ok(file) => self.0.lock().push(file),
            Err(error) => tracing::debug!(%error, "the system does not tell how long threads wait"),
        }
    }

    /// Whether these are all of so many.
    fn are(&self, count: usize) -> bool {
        self.0.lock().len() == count
    }
}

/// Where it is told what runs.
struct Sources<'a> {
    threads: &'a ServingThreads,
    processors: File,
}

/// Since the beginning: of threads, of the process, of the machine.
#[derive(Clone, Copy)]
struct Times {
    ran: Duration,
    waited: Duration,
    process_ran: Duration,
    free_ticks: u64,
    ticks: u64,
}

impl Sources<'_> {
    fn times(&self) -> io::Result<Times> {
        let (free_ticks, ticks) = processor_ticks(&read(&self.processors)?).ok_or(io::ErrorKind::InvalidData)?;
        let (mut ran, mut waited) = (Duration::ZERO, Duration::ZERO);
        for file in &*self.threads.0.lock() {
            let of_thread = thread_times(&read(file)?).ok_or(io::ErrorKind::InvalidData)?;
            ran += of_thread.0;
            waited += of_thread.1;
        }
        Ok(Times { ran, waited, process_ran: process_time(), free_ticks, ticks })
    }
}

impl Times {
    fn since(&self, before: &Times, period: Duration) -> Seen {
        let share = |now: Duration, before: Duration| now.saturating_sub(before).as_secs_f64() / period.as_secs_f64();
        let free_ticks = self.free_ticks.saturating_sub(before.free_ticks);
        let ticks = self.ticks.saturating_sub(before.ticks);
        Seen {
            ran: share(self.ran, before.ran),
            waited: share(self.waited, before.waited),
            process_ran: share(self.process_ran, before.process_ran),
            free: free_ticks as f64 / ticks.max(1) as f64,
        }
    }
}

/// The beginning of a small file that the system makes when it is read.
fn read(file: &File) -> io::Result<[u8; 256]> {
    let mut bytes = [0; 256];
    file.read_at(&mut bytes, 0)?;
    Ok(bytes)
}

fn process_time() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap_or(0))
}

/// The numbers of the first line.
fn numbers(text: &[u8]) -> impl Iterator<Item = Option<u64>> {
    let line = text.split(|byte| *byte == b'\n').next().unwrap_or_default();
    let words = line.split(u8::is_ascii_whitespace).filter(|word| !word.is_empty());
    words.map(|word| std::str::from_utf8(word).ok()?.parse().ok())
}

/// Of `schedstat`: nanoseconds on a processor, nanoseconds in wait for one, and how often.
fn thread_times(text: &[u8]) -> Option<(Duration, Duration)> {
    let mut numbers = numbers(text);
    let mut next = || numbers.next()?.map(Duration::from_nanos);
    Some((next()?, next()?))
}

/// Of `/proc/stat`, how much of the processors' time nobody used, and all of it: user, nice, system, idle, waiting for disks, interrupts of
/// both kinds, stolen.
fn processor_ticks(text: &[u8]) -> Option<(u64, u64)> {
    let ticks: Vec<u64> = numbers(text.strip_prefix(b"cpu ")?).take(8).collect::<Option<_>>()?;
    Some((ticks.get(3)? + ticks.get(4)?, ticks.iter().sum()))
}

/// Looks after [`ServingThreads`] until it is dropped.
#[derive(Debug)]
pub struct ServingWatch {
    resters: Arc<Resters>,
    thread: Option<JoinHandle<()>>,
}

/// Tasks that keep threads from serving.
#[derive(Debug, Default)]
struct Resters {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    wanted: usize,
    /// Those that there are, though perhaps no thread has polled them yet. Never more than were wanted at a time.
    count: usize,
    #[cfg(test)]
    slices: u64,
    has_ended: bool,
}

impl Resters {
    /// From now on so many; gives how many are missing.
    fn want(&self, wanted: usize) -> usize {
        let mut state = self.state.lock();
        state.wanted = wanted;
        let missing = wanted.saturating_sub(state.count);
        state.count += missing;
        self.changed.notify_all();
        missing
    }

    /// Of one of them: keeps its thread for a slice. Gives whether it is to go on; if not, it is counted no more.
    fn rest(&self) -> bool {
        let mut state = self.state.lock();
        let end = Instant::now() + SLICE;
        #[cfg(test)]
        {
            state.slices += 1;
        }
        while state.count <= state.wanted && !self.changed.wait_until(&mut state, end).timed_out() {}
        let goes_on = state.count <= state.wanted;
        state.count -= usize::from(!goes_on);
        goes_on
    }

    /// Gives whether the watch has ended, at the latest then.
    fn has_ended_by(&self, then: Instant) -> bool {
        let mut state = self.state.lock();
        while !state.has_ended && !self.changed.wait_until(&mut state, then).timed_out() {}
        state.has_ended
    }

    fn end(&self) {
        self.state.lock().has_ended = true;
        self.want(0);
    }
}

/// Keeps the thread that polls it.
async fn rest(resters: Arc<Resters>) {
    loop {
        // Lets go of what waits for this thread alone, and looks at the network.
        tokio::task::yield_now().await;
        // Behind what that has made ready; and a thread that went to sleep meanwhile is woken, since it could not look at the network itself.
        behind_ready_tasks().await;
        if !resters.rest() {
            return;
        }
    }
}

impl ServingWatch {
    /// Of the runtime whose `count` threads are, or will be, in `threads`. It must be dropped before the runtime.
    ///
    /// # Errors
    /// The system's, where it starts no further thread.
    pub fn start(threads: Arc<ServingThreads>, count: usize, runtime: Handle) -> io::Result<Self> {
        let resters = Arc::<Resters>::default();
        if !(2..=THREADS_MAX).contains(&count) {
            return Ok(ServingWatch { resters, thread: None });
        }
        let of_watch = Arc::clone(&resters);
        let watch = move || {
            if let Err(error) = watch(&threads, count, &runtime, &of_watch) {
                tracing::debug!(%error, "the system does not tell how long threads wait");
            }
            of_watch.want(0);
        };
        let thread = std::thread::Builder::new().name("serving-watch".to_owned()).spawn(watch)?;
        Ok(ServingWatch { resters, thread: Some(thread) })
    }
}

impl Drop for ServingWatch {
    fn drop(&mut self) {
        self.resters.end();
        if let Some(thread) = self.thread.take() {
            // It ends with an error of its own or none.
            let _ = thread.join();
        }
    }
}

fn watch(threads: &ServingThreads, count: usize, runtime: &Handle, resters: &Arc<Resters>) -> io::Result<()> {
    let processors = std::thread::available_parallelism().map_or(1, usize::from) as f64;
    let sources = Sources { threads, processors: File::open("/proc/stat")? };
    let (mut serving, mut before, mut began) = (count, sources.times()?, Instant::now());
    while !resters.has_ended_by(began + PERIOD) {
        let (now, times) = (Instant::now(), sources.times()?);
        let seen = times.since(&before, now.duration_since(began));
        let next = if threads.are(count) { should_serve(seen, serving, count, processors) } else { count };
        assert!((1..=count).contains(&next), "one thread always serves");
        if next != serving {
            tracing::debug!(serving = next, ?seen, "other processes have the processors, or no longer");
        }
        (serving, before, began) = (next, times, now);
        for _ in 0..resters.want(count - serving) {
            runtime.spawn(rest(Arc::clone(resters)));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use tokio::runtime::{Builder, Runtime};

    use super::*;

    const CROWDED: Seen = Seen { ran: 0.4, waited: 0.4, process_ran: 0.5, free: 0.1 };

    #[test]
    fn threads_rest_only_where_others_have_the_processors_and_fewer_keep_up() {
        assert_eq!(should_serve(CROWDED, 2, 2, 2.0), 1);
        assert_eq!(should_serve(CROWDED, 1, 2, 2.0), 1, "one always serves");
        assert_eq!(should_serve(CROWDED, 1, 1, 2.0), 1);
        assert_eq!(should_serve(CROWDED, 8, 8, 8.0), 7, "one at a time");
        for (what, seen) in [
            ("they hardly wait", Seen { waited: 0.05, ..CROWDED }),
            ("a processor is free", Seen { free: 0.5, ..CROWDED }),
            ("this process has the processors", Seen { process_ran: 1.3, ..CROWDED }),
            ("there is little to do", Seen { ran: 0.05, ..CROWDED }),
            ("the others could not keep up", Seen { ran: 0.9, waited: 0.9, ..CROWDED }),
        ] {
            assert_eq!(should_serve(seen, 2, 2, 2.0), 2, "{what}");
            assert_eq!(should_serve(seen, 1, 2, 2.0), 2, "{what}: all serve again");
        }
        for (what, seen) in [
            ("wait less", Seen { waited: 0.15, ..CROWDED }),
            ("more is free", Seen { free: 0.3, ..CROWDED }),
            ("this process has a little more", Seen { process_ran: 1.1, ..CROWDED }),
        ] {
            assert_eq!((should_serve(seen, 2, 2, 2.0), should_serve(seen, 1, 2, 2.0)), (2, 1), "{what}");
        }
        assert_eq!(should_serve(Seen { ran: 1.0, waited: 1.0, ..CROWDED }, 2, 4, 4.0), 2, "two do, one does not");
    }

    #[test]
    fn the_system_tells_what_runs() {
        let threads = ServingThreads::default();
        threads.join();
        assert!(threads.are(1) && !threads.are(2));
        let sources = Sources { threads: &threads, processors: File::open("/proc/stat").unwrap() };
        let (before, began) = (sources.times().unwrap(), Instant::now());
        let seen = loop {
            let seen = sources.times().unwrap().since(&before, began.elapsed());
            if seen.ran > 0.0 && seen.process_ran > 0.0 {
                break seen;
            }
        };
        assert!((0.0..=1.0).contains(&seen.free), "{seen:?}");
    }

    #[test]
    fn what_the_system_tells_is_read_or_refused() {
        assert_eq!(thread_times(b"12 5 3\n\0\0"), Some((Duration::from_nanos(12), Duration::from_nanos(5))));
        assert_eq!([&b""[..], b"12\n", b"12 x 3\n"].map(thread_times), [None; 3]);
        assert_eq!(processor_ticks(b"cpu  1 2 3 40 50 6 7 8 9 10\ncpu0 1 1 1 1 1 1 1 1"), Some((90, 117)));
        assert_eq!([&b"cpu0 1 2 3 4 5"[..], b"cpu  1 2 3\n", b""].map(processor_ticks), [None; 3]);
    }

    fn runtime(threads: usize) -> Runtime {
        Builder::new_multi_thread().worker_threads(threads).enable_all().build().unwrap()
    }

    fn slices(resters: &Resters) -> u64 {
        resters.state.lock().slices
    }

    /// Of one thread, so that all that is done is done between slices; tasks that yield, as the runtime would have it, too.
    #[test]
    fn what_a_thread_has_in_hand_is_polled_between_slices() {
        let (runtime, resters) = (runtime(1), Arc::<Resters>::default());
        assert_eq!(resters.want(1), 1);
        runtime.spawn(rest(Arc::clone(&resters)));
        let (polled, polls) = channel();
        for _ in 0..10 {
            let polled = polled.clone();
            runtime.spawn(async move {
                for _ in 0..3 {
                    tokio::task::yield_now().await;
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
                polled.send(()).unwrap();
            });
        }
        polls.iter().take(10).for_each(drop);
        assert!(slices(&resters) > 2, "the thread rested");
        assert_eq!(resters.want(1), 0, "nobody rests twice");
        resters.end();
        // Waits for its thread.
        drop(runtime);
        assert_eq!(resters.state.lock().count, 0);
    }

    #[test]
    fn those_that_are_not_wanted_serve_again_and_nobody_is_kept_twice() {
        let (runtime, resters) = (runtime(3), Arc::<Resters>::default());
        let spawn = |missing: usize| (0..missing).for_each(|_| drop(runtime.spawn(rest(Arc::clone(&resters)))));
        spawn(resters.want(2));
        while slices(&resters) < 2 {
            std::thread::yield_now();
        }
        resters.want(1);
        while resters.state.lock().count > 1 {
            std::thread::yield_now();
        }
        assert_eq!(resters.want(2), 1);
        assert_eq!(resters.want(0), 0);
        assert!(resters.want(2) <= 1, "one that was not polled since is still there");
        resters.end();
    }

    #[test]
    fn a_watch_ends_when_it_is_dropped() {
        let runtime = runtime(2);
        for count in [1, 2, THREADS_MAX + 1] {
            let watch = ServingWatch::start(Arc::default(), count, runtime.handle().clone()).unwrap();
            assert_eq!(watch.thread.is_some(), count == 2);
        }
    }
}
