//! The short requests of a connection, on the connection's own task.
//!
//! The HTTP library has each request run by an executor, as a task: it is put into a queue, may wake another thread, and wakes the
//! connection's task when it has an answer. For what is answered in some microseconds that costs more than the answer. So here the
//! service says of a request whether it may be short ([`OwnRequests::next_is`]) before the executor gets it ([`OwnRequests::begin`]). Then it
//! is polled where it was found. One that waits for nothing is done, and what it answers leaves with all else that this turn of the connection
//! writes. One that waits, for its entry of the log or for a read round, is kept here if its handler has said that it is short
//! ([`this_is_short`]), and polled when it is woken. What may be large, or comes in a number beyond [`KEPT_MAX`], is a task as ever: its answer
//! is made beside those of the connection's others, and the connection can be ended meanwhile.
//!
//! The answer of a kept request wakes the connection's task, which has it in hand: [`Woken`] keeps that from the runtime, which would poll the task
//! once more and wake another thread in case there is more to do.
//!
//! What must hold: whoever gets a request after it was polled here polls it once more, because until then nobody is told when it is woken.
//! A turn ends when its time is over ([`may_go_on_here`]). A request that panics ends alone. When the connection ends so do the requests
//! that it keeps.
//!
//! Left out: to poll the connection again in the same turn when a request has answered. It has been woken, and by the time it is polled other
//! requests may have come; that is worth more than the way through the runtime's queue (decision 0003).

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::{Context, Poll, Wake, Waker};

use futures::FutureExt as _;
use futures::stream::{FuturesUnordered, StreamExt as _};
use futures::task::AtomicWaker;
use http::{HeaderValue, Request};
use parking_lot::Mutex;

use crate::turns::may_go_on_here;

/// Requests of a connection that are kept here.
const KEPT_MAX: usize = 32;

/// A request up to here is short, if its answer is.
const SHORT_BYTES_MAX: usize = 16 << 10;

type Kept = Pin<Box<dyn Future<Output = ()> + Send>>;

thread_local! {
    /// What the request says of itself that this thread polls.
    static IS_SHORT: Cell<bool> = const { Cell::new(false) };
}

/// Says that the answer to the request that is being polled is short, before it waits for anything. `bytes`: the request's own length.
pub(crate) fn this_is_short(bytes: usize) {
    IS_SHORT.set(bytes <= SHORT_BYTES_MAX);
}

/// Whether a request may be short. What is compressed is not: that takes time.
pub(crate) fn may_be_short<B>(request: &Request<B>) -> bool {
    let is_plain = |encoding: &HeaderValue| encoding == "identity";
    request.headers().get("grpc-encoding").is_none_or(is_plain)
        && matches!(
            request.uri().path(),
            "/etcdserverpb.KV/Range"
                | "/etcdserverpb.KV/Put"
                | "/etcdserverpb.KV/Txn"
                | "/etcdserverpb.Lease/LeaseGrant"
                | "/etcdserverpb.Lease/LeaseRevoke"
        )
}

/// Of one connection; shared by its service, its executor and its task.
#[derive(Default)]
pub(crate) struct OwnRequests {
    next_is_short: AtomicBool,
    /// Those that are kept, also in `begun`.
    kept: AtomicUsize,
    /// Those that its task does not have yet.
    begun: Mutex<Vec<Kept>>,
}

impl OwnRequests {
    /// Says whether the request that the executor gets next may be short.
    pub(crate) fn next_is(&self, short: bool) {
        self.next_is_short.store(short, Ordering::Relaxed);
    }

    /// Runs a request here; gives it back if it has to be a task.
    pub(crate) fn begin<F>(&self, request: F) -> Option<Pin<Box<F>>>
    where
        F: Future + Send + 'static,
        F::Output: Send,
    {
        let mut request = Box::pin(request);
        if !self.next_is_short.swap(false, Ordering::Relaxed) || !may_go_on_here() {
            return Some(request);
        }
        IS_SHORT.set(false);
        let mut task = Context::from_waker(Waker::noop());
        let polled = catch_unwind(AssertUnwindSafe(|| request.as_mut().poll(&mut task)));
        if !matches!(polled, Ok(Poll::Pending)) {
            return None;
        }
        if !IS_SHORT.get() || self.kept.load(Ordering::Relaxed) >= KEPT_MAX {
            return Some(request);
        }
        self.kept.fetch_add(1, Ordering::Relaxed);
        self.begun.lock().push(Box::pin(AssertUnwindSafe(request).catch_unwind().map(drop)));
        None
    }

    /// What drives the connection and its requests.
    pub(crate) fn driver(self: &Arc<Self>) -> Driver {
        Driver { own: Arc::clone(self), kept: FuturesUnordered::new(), woken: Arc::default() }
    }
}

/// See [`OwnRequests::driver`].
pub(crate) struct Driver {
    own: Arc<OwnRequests>,
    /// And one that never ends: a set whose members have all been polled wakes its task for nothing.
    kept: FuturesUnordered<Kept>,
    woken: Arc<Woken>,
}

/// Wakes the task of a connection, unless it will find out by itself.
#[derive(Default)]
struct Woken {
    task: AtomicWaker,
    /// The task is being polled, and polls all that it drives once more after it has taken this back.
    is_polled_next: AtomicBool,
}

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        // Not a mere load: where this comes before the task's own change, the polls that follow see what it was woken for.
        if !self.is_polled_next.fetch_or(false, Ordering::AcqRel) {
            self.task.wake();
        }
    }
}

impl Driver {
    /// Polls the connection, and those of its requests that were woken or are new.
    pub(crate) fn poll<C: Future + ?Sized>(
        &mut self,
        task: &mut Context<'_>,
        connection: Pin<&mut C>,
    ) -> Poll<C::Output> {
        self.woken.task.register(task.waker());
        let waker = Waker::from(Arc::clone(&self.woken));
        let mut task = Context::from_waker(&waker);
        // Before the connection, which writes what they answer. The library wakes the connection with each answer, and the request too: the
        // task would be polled once more for nothing, and another thread woken to see whether there is more (decision 0003).
        self.woken.is_polled_next.store(true, Ordering::Relaxed);
        self.poll_kept(&mut task);
        self.woken.is_polled_next.swap(false, Ordering::AcqRel);
        let polled = connection.poll(&mut task);
        let begun = std::mem::take(&mut *self.own.begun.lock());
        if !begun.is_empty() && self.kept.is_empty() {
            self.kept.push(Box::pin(std::future::pending()));
        }
        self.kept.extend(begun);
        self.poll_kept(&mut task);
        polled
    }

    fn poll_kept(&mut self, task: &mut Context<'_>) {
        while let Poll::Ready(Some(())) = self.kept.poll_next_unpin(task) {
            self.own.kept.fetch_sub(1, Ordering::Relaxed);
            if !may_go_on_here() {
                task.waker().wake_by_ref();
                break;
            }
        }
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        // They hold the executor, which holds them.
        self.own.begun.lock().clear();
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use tokio::sync::oneshot;

    use super::*;
    use crate::throttle::TenantUse;
    use crate::turns::tests::Runtime;
    use crate::turns::{Turns, fairly};

    /// Within a turn of a connection.
    async fn in_a_turn<T>(turn: impl Future<Output = T>) -> T {
        fairly(Arc::<Turns>::default(), Arc::<TenantUse>::default(), turn).await
    }

    fn begin(own: &OwnRequests, request: impl Future<Output = ()> + Send + 'static) -> bool {
        own.next_is(true);
        own.begin(request).is_none()
    }

    async fn short(waits: impl Future) {
        this_is_short(10);
        let _ = waits.await;
    }

    #[test]
    fn what_is_compressed_or_of_any_length_is_a_task() {
        let request = |path: &str| Request::post(path);
        assert!(may_be_short(&request("/etcdserverpb.KV/Put").body(()).unwrap()));
        assert!(!may_be_short(&request("/etcdserverpb.KV/RangeStream").body(()).unwrap()));
        for (encoding, is_short) in [("identity", true), ("gzip", false)] {
            let request = request("/etcdserverpb.KV/Range").header("grpc-encoding", encoding);
            assert_eq!(may_be_short(&request.body(()).unwrap()), is_short, "{encoding}");
        }
    }

    #[tokio::test]
    async fn what_waits_for_nothing_is_done_at_once() {
        let own = OwnRequests::default();
        let (done, mut is_done) = oneshot::channel();
        let at_once = async move { done.send(()).unwrap() };
        assert!(in_a_turn(async { begin(&own, at_once) }).await);
        is_done.try_recv().unwrap();

        let (go_on, waits) = oneshot::channel::<()>();
        own.next_is(true);
        let given_back = in_a_turn(async { own.begin(async { drop(waits.await) }) }).await.unwrap();
        let task = tokio::spawn(given_back);
        go_on.send(()).unwrap();
        task.await.unwrap();
        assert!(!begin(&own, async {}), "not outside of a turn");
        assert!(in_a_turn(async { own.begin(async {}) }).await.is_some(), "nobody said that it may be short");
    }

    #[tokio::test]
    async fn a_turn_ends_when_its_time_is_over() {
        let own = OwnRequests::default();
        let slow = || async { std::thread::sleep(std::time::Duration::from_millis(1)) };
        let begun = in_a_turn(async { (0..100).filter(|_| begin(&own, slow())).count() }).await;
        assert_eq!(begun, 1);
    }

    #[tokio::test]
    async fn what_waits_is_polled_with_its_connection() {
        let own = Arc::<OwnRequests>::default();
        let mut driver = own.driver();
        let (replies, mut waiting): (Vec<_>, Vec<_>) = (0..3).map(|_| oneshot::channel::<()>()).unzip();
        let (answers, answered) = std::sync::mpsc::channel();
        let mut seen = 0;
        let mut connection = std::pin::pin!(poll_fn(|task| {
            if let Some(reply) = waiting.pop() {
                let answers = answers.clone();
                assert!(begin(&own, async move {
                    short(reply).await;
                    let _ = answers.send(());
                }));
                task.waker().wake_by_ref();
            }
            seen += answered.try_iter().count();
            if seen == 3 { Poll::Ready(()) } else { Poll::Pending }
        }));
        let mut driven = std::pin::pin!(in_a_turn(poll_fn(|task| driver.poll(task, connection.as_mut()))));
        for _ in 0..3 {
            assert!(futures::poll!(driven.as_mut()).is_pending());
        }
        assert_eq!(own.kept.load(Ordering::Relaxed), 3);
        replies.into_iter().for_each(|reply| reply.send(()).unwrap());
        driven.await;
        assert_eq!(own.kept.load(Ordering::Relaxed), 0);
    }

    /// A task that was woken for what it did itself was polled twice for each answer, and a second thread of the runtime woken.
    #[tokio::test]
    async fn an_answer_that_the_connection_is_about_to_write_wakes_nobody() {
        let own = Arc::<OwnRequests>::default();
        let mut driver = own.driver();
        let (reply, waits) = oneshot::channel::<()>();
        let woken_by_answer = Arc::new(Mutex::new(None::<Waker>));
        let connection_of = Arc::clone(&woken_by_answer);
        let mut request = Some(async move {
            short(waits).await;
            // As the library does: the connection is to write, and the request to go on.
            connection_of.lock().take().unwrap().wake();
            poll_fn(|task| {
                task.waker().wake_by_ref();
                Poll::Ready(())
            })
            .await;
        });
        let mut connection = std::pin::pin!(poll_fn(|task| {
            request.take().into_iter().for_each(|request| assert!(begin(&own, request)));
            *woken_by_answer.lock() = Some(task.waker().clone());
            Poll::<()>::Pending
        }));
        let runtime = Arc::<Runtime>::default();
        let waker = Waker::from(Arc::clone(&runtime));
        let mut driven = std::pin::pin!(in_a_turn(poll_fn(|task| driver.poll(task, connection.as_mut()))));
        let mut poll = || assert!(driven.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());
        // The set wakes its task when it has polled all that it was given.
        poll();
        poll();
        let before = runtime.0.load(Ordering::Relaxed);
        reply.send(()).unwrap();
        assert_eq!(runtime.0.load(Ordering::Relaxed), before + 1, "the reply is worth a turn");
        poll();
        assert_eq!(own.kept.load(Ordering::Relaxed), 0);
        assert_eq!(runtime.0.load(Ordering::Relaxed), before + 1);
        woken_by_answer.lock().take().unwrap().wake();
        assert_eq!(runtime.0.load(Ordering::Relaxed), before + 2, "what comes between turns is");
    }

    /// What wakes itself while the answers are made is polled again, though that was kept from the runtime; so is what there was no time for.
    #[tokio::test]
    async fn nothing_that_was_woken_in_a_turn_is_forgotten() {
        for is_slow in [false, true] {
            let own = Arc::<OwnRequests>::default();
            let mut driver = own.driver();
            let (replies, waiting): (Vec<_>, Vec<_>) = (0..4).map(|_| oneshot::channel::<()>()).unzip();
            let mut waiting = waiting.into_iter();
            let mut connection = std::pin::pin!(poll_fn(|_| {
                for reply in waiting.by_ref() {
                    let request = async move {
                        short(reply).await;
                        if is_slow {
                            std::thread::sleep(std::time::Duration::from_micros(300));
                        }
                        let mut polls = 0;
                        poll_fn(|task| {
                            polls += 1;
                            task.waker().wake_by_ref();
                            if polls > 3 { Poll::Ready(()) } else { Poll::Pending }
                        })
                        .await;
                    };
                    assert!(begin(&own, request));
                }
                Poll::<()>::Pending
            }));
            let runtime = Arc::<Runtime>::default();
            let waker = Waker::from(Arc::clone(&runtime));
            let mut driven = std::pin::pin!(in_a_turn(poll_fn(|task| driver.poll(task, connection.as_mut()))));
            let mut poll = || assert!(driven.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());
            poll();
            poll();
            replies.into_iter().for_each(|reply| reply.send(()).unwrap());
            // As the runtime does: a turn for as long as the task is woken.
            while runtime.0.swap(0, Ordering::Relaxed) > 0 {
                poll();
            }
            assert_eq!(own.kept.load(Ordering::Relaxed), 0, "slow: {is_slow}");
        }
    }

    #[tokio::test]
    async fn only_who_says_that_it_is_short_is_kept() {
        let own = Arc::<OwnRequests>::default();
        for (bytes, is_kept) in [(None, false), (Some(SHORT_BYTES_MAX), true), (Some(SHORT_BYTES_MAX + 1), false)] {
            let request = async move {
                bytes.into_iter().for_each(this_is_short);
                std::future::pending().await
            };
            assert_eq!(in_a_turn(async { begin(&own, request) }).await, is_kept, "{bytes:?}");
        }
    }

    #[tokio::test]
    async fn there_is_a_bound_and_what_is_kept_ends_with_the_connection() {
        let own = Arc::<OwnRequests>::default();
        let held = Arc::new(());
        let mut driver = own.driver();
        let mut kept = 0;
        for turn in 0..2 * KEPT_MAX {
            let (own, held) = (Arc::clone(&own), Arc::clone(&held));
            let waits = async move {
                short(std::future::pending::<()>()).await;
                drop(held);
            };
            let connection = std::pin::pin!(async { begin(&own, waits) });
            let mut connection = Some(connection);
            let driving = poll_fn(|task| driver.poll(task, connection.take().unwrap()));
            kept += usize::from(in_a_turn(driving).await);
            assert_eq!(kept, (turn + 1).min(KEPT_MAX));
        }
        let held_by_another = Arc::clone(&held);
        let waits = async move {
            short(std::future::pending::<()>()).await;
            drop(held_by_another);
        };
        own.kept.store(0, Ordering::Relaxed);
        assert!(in_a_turn(async { begin(&own, waits) }).await);
        assert_eq!(Arc::strong_count(&held), KEPT_MAX + 2);
        drop(driver);
        assert_eq!(Arc::strong_count(&held), 1);
    }

    #[tokio::test]
    async fn a_request_that_panics_ends_alone() {
        let own = Arc::<OwnRequests>::default();
        let mut driver = own.driver();
        for request in [false, true] {
            let panics = async move {
                if request {
                    short(tokio::task::yield_now()).await;
                }
                panic!("of a test")
            };
            let mut connection = Some(std::pin::pin!(async { begin(&own, panics) }));
            assert!(in_a_turn(poll_fn(|task| driver.poll(task, connection.take().unwrap()))).await);
        }
        assert_eq!(own.kept.load(Ordering::Relaxed), 0);
    }
}
