//! The threads on which large reads run.
//!
//! A range over many keys, a hash or a replay of history may take seconds of disk and processor time. On the threads that
//! serve connections it would hold up everybody's small requests, and without a bound one tenant's lists would be all
//! that the machine does. So such reads run here, on a fixed number of threads, and the pool is fair between tenants:
//!
//! - threads take the tenants in turn, one read of each, not the reads in order of arrival;
//! - one tenant may have as many reads running as leave half of the threads to the others;
//! - one tenant may have [`TENANT_QUEUED_MAX`] reads waiting, all together [`QUEUED_MAX`]. At either bound the next
//!   read is refused with [`CellError::TooManyRequests`]. A tenant's bound is far below the common one, so it takes many tenants at
//!   once to reach that.
//!
//! A read whose caller has gone away is dropped unread if it has not begun; one that runs, runs to its end.

use std::collections::{HashMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::JoinHandle;

use parking_lot::{Condvar, Mutex};
use tenure_storage::TenantId;
use tokio::sync::oneshot;

use crate::cell_error::CellError;

/// Reads of one tenant that wait for a thread. The next one is refused.
pub const TENANT_QUEUED_MAX: usize = 1_000;

/// Reads of all tenants that wait for a thread. The next one is refused.
pub const QUEUED_MAX: usize = 20_000;

const _: () = assert!(TENANT_QUEUED_MAX * 10 <= QUEUED_MAX, "one tenant does not fill the queue of all");

/// The pool. Dropping it lets running reads end and drops the waiting ones.
pub struct ReadPool {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    queue: Mutex<Queue>,
    /// Signalled when a thread may find a read, and when the pool stops.
    work: Condvar,
    tenant_running_max: usize,
}

#[derive(Default)]
struct Queue {
    /// Tenants with something waiting or running.
    tenants: HashMap<TenantId, TenantReads>,
    /// Tenants with something waiting that may start now, in turn.
    turns: VecDeque<TenantId>,
    queued: usize,
    stopping: bool,
}

#[derive(Default)]
struct TenantReads {
    waiting: VecDeque<Job>,
    running: usize,
}

type Job = Box<dyn FnOnce() + Send>;

impl ReadPool {
    /// As many threads as a machine with this many processors can use: some wait for the disk.
    ///
    /// # Errors
    /// If the system gives no more threads.
    pub fn for_this_machine() -> std::io::Result<Self> {
        let processors = std::thread::available_parallelism().map_or(2, usize::from);
        ReadPool::new((2 * processors).clamp(4, 64))
    }

    fn new(threads: usize) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            queue: Mutex::default(),
            work: Condvar::new(),
            tenant_running_max: (threads / 2).max(1),
        });
        let mut pool = ReadPool { shared, threads: Vec::with_capacity(threads) };
        for number in 0..threads {
            let shared = Arc::clone(&pool.shared);
            let thread = std::thread::Builder::new().name(format!("read-{number}"));
            pool.threads.push(thread.spawn(move || shared.run())?);
        }
        Ok(pool)
    }

    /// Runs `read` on a thread of the pool.
    ///
    /// # Errors
    /// [`CellError::TooManyRequests`] at the pool's bounds, [`CellError::Stopped`] when the pool stops, or if `read` panicked.
    pub async fn run<T: Send + 'static>(
        &self,
        tenant: TenantId,
        read: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, CellError> {
        let (reply, answer) = oneshot::channel();
        let job = Box::new(move || {
            if !reply.is_closed() {
                // A caller who has just gone does not want it.
                let _ = reply.send(read());
            }
        });
        self.shared.enqueue(tenant, job)?;
        answer.await.map_err(|_| CellError::Stopped)
    }
}

impl Drop for ReadPool {
    fn drop(&mut self) {
        let mut queue = self.shared.queue.lock();
        queue.stopping = true;
        let waiting = std::mem::take(&mut queue.tenants);
        drop(queue);
        self.shared.work.notify_all();
        drop(waiting);
        let own = std::thread::current().id();
        for thread in self.threads.drain(..) {
            // The last owner of the pool may be one of its own reads.
            if thread.thread().id() != own && thread.join().is_err() {
                tracing::error!("a read thread panicked");
            }
        }
    }
}

impl Shared {
    fn enqueue(&self, tenant: TenantId, job: Job) -> Result<(), CellError> {
        let mut queue = self.queue.lock();
        if queue.stopping {
            return Err(CellError::Stopped);
        }
        if queue.queued >= QUEUED_MAX {
            return Err(CellError::TooManyRequests);
        }
        let reads = queue.tenants.entry(tenant).or_default();
        if reads.waiting.len() >= TENANT_QUEUED_MAX {
            return Err(CellError::TooManyRequests);
        }
        reads.waiting.push_back(job);
        let gets_turn = reads.waiting.len() == 1 && reads.running < self.tenant_running_max;
        queue.queued += 1;
        if gets_turn {
            queue.turns.push_back(tenant);
            drop(queue);
            self.work.notify_one();
        }
        Ok(())
    }

    fn run(&self) {
        while let Some((tenant, job)) = self.next() {
            if catch_unwind(AssertUnwindSafe(job)).is_err() {
                tracing::error!(%tenant, "a read panicked");
            }
            self.finished(tenant);
        }
    }

    /// Waits for the next read; `None` when the pool stops.
    fn next(&self) -> Option<(TenantId, Job)> {
        let mut queue = self.queue.lock();
        loop {
            if queue.stopping {
                return None;
            }
            if let Some(next) = queue.start_next(self.tenant_running_max) {
                if !queue.turns.is_empty() {
                    self.work.notify_one();
                }
                return Some(next);
            }
            self.work.wait(&mut queue);
        }
    }

    fn finished(&self, tenant: TenantId) {
        let mut queue = self.queue.lock();
        let Some(reads) = queue.tenants.get_mut(&tenant) else { return };
        reads.running -= 1;
        // At its bound the tenant had lost its turn.
        let regains_turn = reads.running + 1 == self.tenant_running_max && !reads.waiting.is_empty();
        if reads.running == 0 && reads.waiting.is_empty() {
            queue.tenants.remove(&tenant);
        }
        if regains_turn {
            queue.turns.push_back(tenant);
        }
    }
}

impl Queue {
    /// A tenant is in `turns` exactly once if it has reads waiting and may start one, else not at all.
    fn start_next(&mut self, tenant_running_max: usize) -> Option<(TenantId, Job)> {
        let tenant = self.turns.pop_front()?;
        let reads = self.tenants.get_mut(&tenant)?;
        let job = reads.waiting.pop_front()?;
        reads.running += 1;
        self.queued -= 1;
        if !reads.waiting.is_empty() && reads.running < tenant_running_max {
            self.turns.push_back(tenant);
        }
        Some((tenant, job))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    const A: TenantId = TenantId(1);
    const B: TenantId = TenantId(2);

    #[tokio::test]
    async fn reads_answer() {
        let pool = ReadPool::new(2).unwrap();
        assert_eq!(pool.run(A, || 7).await.unwrap(), 7);
    }

    /// Blocks a thread until the sender is dropped or used.
    fn blocking(gate: mpsc::Receiver<()>) -> Job {
        Box::new(move || {
            let _ = gate.recv();
        })
    }

    #[tokio::test]
    async fn one_tenant_leaves_threads_to_another() {
        let pool = ReadPool::new(2).unwrap();
        let mut gates = Vec::new();
        for _ in 0..10 {
            let (open, gate) = mpsc::channel();
            gates.push(open);
            pool.shared.enqueue(A, blocking(gate)).unwrap();
        }
        // All of A's reads block; B's goes through.
        assert_eq!(pool.run(B, || "through").await.unwrap(), "through");
        drop(gates);
        assert_eq!(pool.run(A, || "after").await.unwrap(), "after");
    }

    #[tokio::test]
    async fn a_tenant_at_its_bound_is_refused_and_others_are_not() {
        let pool = ReadPool::new(2).unwrap();
        let (open, gate) = mpsc::channel::<()>();
        let (started, running) = mpsc::channel::<()>();
        pool.shared
            .enqueue(
                A,
                Box::new(move || {
                    drop(started);
                    let _ = gate.recv();
                }),
            )
            .unwrap();
        assert!(running.recv().is_err(), "running now");
        for _ in 0..TENANT_QUEUED_MAX {
            pool.shared.enqueue(A, Box::new(|| {})).unwrap();
        }
        assert!(matches!(pool.run(A, || ()).await, Err(CellError::TooManyRequests)));
        pool.run(B, || ()).await.unwrap();
        drop(open);
    }

    #[tokio::test]
    async fn tenants_take_turns() {
        let pool = ReadPool::new(1).unwrap();
        let (open, gate) = mpsc::channel();
        pool.shared.enqueue(TenantId(9), blocking(gate)).unwrap();
        let (report, order) = mpsc::channel();
        for tenant in [A, A, A, B, B] {
            let report = report.clone();
            pool.shared.enqueue(tenant, Box::new(move || report.send(tenant).unwrap())).unwrap();
        }
        drop((open, report));
        assert_eq!(order.into_iter().collect::<Vec<_>>(), [A, B, A, B, A]);
    }

    #[tokio::test]
    async fn a_panic_costs_one_answer() {
        let pool = ReadPool::new(1).unwrap();
        assert!(matches!(pool.run(A, || panic!("on purpose")).await, Err::<(), _>(CellError::Stopped)));
        assert_eq!(pool.run(A, || 7).await.unwrap(), 7);
    }

    #[tokio::test]
    async fn stopping_answers_those_who_wait() {
        let pool = ReadPool::new(1).unwrap();
        let (open, gate) = mpsc::channel();
        pool.shared.enqueue(A, blocking(gate)).unwrap();
        let shared = Arc::clone(&pool.shared);
        let (reply, answer) = oneshot::channel::<()>();
        shared.enqueue(A, Box::new(move || drop(reply))).unwrap();
        drop(open);
        drop(pool);
        assert!(answer.await.is_err());
        assert!(matches!(shared.enqueue(A, Box::new(|| {})), Err(CellError::Stopped)));
    }
}
