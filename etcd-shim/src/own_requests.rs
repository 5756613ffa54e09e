//! The short requests of a connection, on the connection's own task.
//!
//! The HTTP library has each request run by an executor, as a task: it is put into a queue, may wake another thread, and wakes the
//! connection's task when it has an answer. For what is answered in some microseconds that costs more than the answer. So here the
//! service says of a request what it is like ([`OwnRequests::next_is`]) before the executor gets it ([`OwnRequests::begin`]): one that
//! mostly waits for nothing is polled where it was found, and what it answers leaves with all else that this turn of the connection
//! writes; one that waits, for its entry of the log or for a read round, is kept here and polled when it is woken, after which the connection is polled once. What may
//! be large, or comes in a number beyond [`KEPT_MAX`], is a task as ever: its answer is made beside those of the connection's others.
//!
//! What must hold: whoever gets a request after it was polled here polls it once more, because until then nobody is told when it is woken.
//! A request that panics ends alone. When the connection ends so do the requests that it keeps.
//!
//! Left out: to poll the connection again in the same turn when a request has answered. It has been woken, and by the time it is polled other
//! requests may have come; that is worth more than the way through the runtime's queue (decision 0003).

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::task::{Context, Poll, Waker};

use futures::FutureExt as _;
use futures::stream::{FuturesUnordered, StreamExt as _};
use parking_lot::Mutex;

use crate::turns::may_begin_here;

/// Requests of a connection that are kept here. A turn may poll all of them.
const KEPT_MAX: usize = 32;

/// What a request is like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Kind {
    /// Its answer may be large, or take long to make.
    Any = 0,
    /// It is mostly answered at once. If not, its handler says whether it is short ([`this_is_short`]).
    AtOnce = 1,
    /// It is short, and waits before it is answered.
    Waits = 2,
}

impl Kind {
    /// That of a path.
    pub(crate) fn of(path: &str) -> Self {
        match path {
            "/etcdserverpb.KV/Range" => Kind::AtOnce,
            "/etcdserverpb.KV/Put"
            | "/etcdserverpb.KV/Txn"
            | "/etcdserverpb.Lease/LeaseGrant"
            | "/etcdserverpb.Lease/LeaseRevoke"
            | "/etcdserverpb.Lease/LeaseKeepAlive" => Kind::Waits,
            _ => Kind::Any,
        }
    }
}

type Request = Pin<Box<dyn Future<Output = ()> + Send>>;

thread_local! {
    /// What the request says of itself that this thread polls.
    static IS_SHORT: Cell<bool> = const { Cell::new(false) };
}

/// Says that the answer to the request that is being polled is short, before it waits for anything.
pub(crate) fn this_is_short() {
    IS_SHORT.set(true);
}

/// Of one connection; shared by its service, its executor and its task.
#[derive(Default)]
pub(crate) struct OwnRequests {
    next: AtomicU8,
    /// Those that are kept, also in `begun`.
    kept: AtomicUsize,
    /// Those that its task does not have yet.
    begun: Mutex<Vec<Request>>,
}

impl OwnRequests {
    /// Says what the request is like that the executor gets next.
    pub(crate) fn next_is(&self, kind: Kind) {
        self.next.store(kind as u8, Ordering::Relaxed);
    }

    /// Runs a request here; gives it back if it has to be a task.
    pub(crate) fn begin<F>(&self, request: F) -> Option<Pin<Box<F>>>
    where
        F: Future + Send + 'static,
        F::Output: Send,
    {
        let kind = self.next.swap(Kind::Any as u8, Ordering::Relaxed);
        if kind == Kind::Waits as u8 && self.has_room() && may_begin_here() {
            self.keep(request);
            return None;
        }
        let mut request = Box::pin(request);
        if kind == Kind::AtOnce as u8 && may_begin_here() {
            IS_SHORT.set(false);
            let mut task = Context::from_waker(Waker::noop());
            let polled = catch_unwind(AssertUnwindSafe(|| request.as_mut().poll(&mut task)));
            if !matches!(polled, Ok(Poll::Pending)) {
                return None;
            }
            if IS_SHORT.get() && self.has_room() {
                self.keep(request);
                return None;
            }
        }
        Some(request)
    }

    fn has_room(&self) -> bool {
        self.kept.load(Ordering::Relaxed) < KEPT_MAX
    }

    fn keep<F>(&self, request: F)
    where
        F: Future + Send + 'static,
        F::Output: Send,
    {
        self.kept.fetch_add(1, Ordering::Relaxed);
        self.begun.lock().push(Box::pin(AssertUnwindSafe(request).catch_unwind().map(drop)));
    }

    /// What drives the connection and its requests.
    pub(crate) fn driver(self: &Arc<Self>) -> Driver {
        Driver { own: Arc::clone(self), kept: FuturesUnordered::new() }
    }
}

/// See [`OwnRequests::driver`].
pub(crate) struct Driver {
    own: Arc<OwnRequests>,
    kept: FuturesUnordered<Request>,
}

impl Driver {
    /// Polls the connection, and those of its requests that were woken or are new.
    pub(crate) fn poll<C: Future + ?Sized>(
        &mut self,
        task: &mut Context<'_>,
        connection: Pin<&mut C>,
    ) -> Poll<C::Output> {
        // Before the connection, which writes what they answer.
        self.poll_kept(task);
        let polled = connection.poll(task);
        let begun = std::mem::take(&mut *self.own.begun.lock());
        if !begun.is_empty() {
            self.kept.extend(begun);
            self.poll_kept(task);
        }
        polled
    }

    fn poll_kept(&mut self, task: &mut Context<'_>) {
        while let Poll::Ready(Some(())) = self.kept.poll_next_unpin(task) {
            self.own.kept.fetch_sub(1, Ordering::Relaxed);
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
    use crate::turns::{Turns, fairly};

    const RANGE: &str = "/etcdserverpb.KV/Range";
    const PUT: &str = "/etcdserverpb.KV/Put";

    /// Within a turn of a connection.
    async fn in_a_turn<T>(turn: impl Future<Output = T>) -> T {
        fairly(Arc::<Turns>::default(), Arc::<TenantUse>::default(), turn).await
    }

    fn begin(own: &OwnRequests, path: &str, request: impl Future<Output = ()> + Send + 'static) -> bool {
        own.next_is(Kind::of(path));
        own.begin(request).is_none()
    }

    #[tokio::test]
    async fn what_waits_for_nothing_is_done_at_once() {
        let own = OwnRequests::default();
        let (done, mut is_done) = oneshot::channel();
        let at_once = async move { done.send(()).unwrap() };
        assert!(in_a_turn(async { begin(&own, RANGE, at_once) }).await);
        is_done.try_recv().unwrap();

        let (go_on, waits) = oneshot::channel::<()>();
        own.next_is(Kind::of(RANGE));
        let given_back = in_a_turn(async { own.begin(async { drop(waits.await) }) }).await.unwrap();
        let task = tokio::spawn(given_back);
        go_on.send(()).unwrap();
        task.await.unwrap();
        assert!(!begin(&own, RANGE, async {}), "not outside of a turn");
        assert!(!in_a_turn(async { begin(&own, "/etcdserverpb.Watch/Watch", async {}) }).await);
        let begun = in_a_turn(async { (0..100).filter(|_| begin(&own, RANGE, async {})).count() }).await;
        assert!((2..100).contains(&begun), "a turn ends");
    }

    #[tokio::test]
    async fn what_waits_is_polled_with_its_connection() {
        let own = Arc::<OwnRequests>::default();
        let mut driver = own.driver();
        let (replies, waiting): (Vec<_>, Vec<_>) = (0..3).map(|_| oneshot::channel::<()>()).unzip();
        let mut waiting = waiting.into_iter();
        let (answers, answered) = std::sync::mpsc::channel();
        let polls = std::cell::Cell::new(0);
        let mut connection = std::pin::pin!(poll_fn(|_| {
            polls.set(polls.get() + 1);
            for reply in waiting.by_ref() {
                let answers = answers.clone();
                assert!(begin(&own, PUT, async move { drop((reply.await, answers.send(()))) }));
            }
            if answered.try_iter().count() == 3 { Poll::Ready(()) } else { Poll::Pending }
        }));
        let mut driven = std::pin::pin!(in_a_turn(poll_fn(|task| driver.poll(task, connection.as_mut()))));
        assert!(futures::poll!(driven.as_mut()).is_pending());
        replies.into_iter().for_each(|reply| reply.send(()).unwrap());
        driven.await;
        assert_eq!((polls.get(), own.kept.load(Ordering::Relaxed)), (2, 0), "once for all of them");
    }

    #[tokio::test]
    async fn who_says_that_it_is_short_is_kept() {
        let own = Arc::<OwnRequests>::default();
        let mut driver = own.driver();
        let connection = std::pin::pin!(async {
            assert!(!begin(&own, RANGE, std::future::pending()), "nobody said so");
            let short = async {
                this_is_short();
                tokio::task::yield_now().await;
            };
            assert!(begin(&own, RANGE, short));
            assert_eq!(own.kept.load(Ordering::Relaxed), 1);
            tokio::task::yield_now().await;
        });
        let mut connection = connection;
        in_a_turn(poll_fn(|task| driver.poll(task, connection.as_mut()))).await;
        assert_eq!(own.kept.load(Ordering::Relaxed), 0);
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
                std::future::pending::<()>().await;
                drop(held);
            };
            let connection = std::pin::pin!(async { begin(&own, PUT, waits) });
            let mut connection = Some(connection);
            let driving = poll_fn(|task| driver.poll(task, connection.take().unwrap()));
            kept += usize::from(in_a_turn(driving).await);
            assert_eq!(kept, (turn + 1).min(KEPT_MAX));
        }
        in_a_turn(async { begin(&own, RANGE, async {}) }).await;
        assert_eq!(Arc::strong_count(&held), KEPT_MAX + 1);
        drop(driver);
        assert_eq!(Arc::strong_count(&held), 1);
    }

    #[tokio::test]
    async fn a_request_that_panics_ends_alone() {
        let own = Arc::<OwnRequests>::default();
        let mut driver = own.driver();
        let connection = std::pin::pin!(async {
            assert!(begin(&own, RANGE, async { panic!("of a test") }));
            assert!(begin(&own, PUT, async { panic!("of a test") }));
        });
        let mut connection = Some(connection);
        in_a_turn(poll_fn(|task| driver.poll(task, connection.take().unwrap()))).await;
        assert_eq!(own.kept.load(Ordering::Relaxed), 0);
    }
}
