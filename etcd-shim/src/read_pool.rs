//! The threads on which large reads run.
//!
//! A range over many keys, a hash or a replay of history may take seconds of disk and processor time. On the threads that
//! serve connections it would hold up everybody's small requests, and without a bound one tenant's lists would be all
//! that the machine does. So such reads run here, on a fixed number of threads, and the pool is fair between tenants:
//!
//! - the next read is one of the tenant that has had the least thread time, not the one that came first. What a read costs is known
//!   when it has ended, so it is charged then (start-time fair queueing, Goyal, Vin and Cheng 1996): each tenant has a *tag*, the time
//!   that it was served for, and one that comes back starts where the others are. It is charged time, not bytes: a count of a
//!   million keys answers in ten bytes;
//! - one tenant may have as many reads running as leave half of the threads to the others; and, while there are other, quiet tenants
//!   ([`crate::turns`]), half of the processors, since every other thread of this member waits for those too;
//! - one tenant may have [`TENANT_QUEUED_MAX`] reads waiting, all together [`QUEUED_MAX`]. At either bound the next
//!   read is refused with [`CellError::TooManyRequests`]. A tenant's bound is far below the common one, so it takes many tenants at
//!   once to reach that.
//!
//! A read whose caller has gone away is dropped unread if it has not begun; one that runs, runs to its end.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Instant;

use parking_lot::{Condvar, Mutex};
use tenure_storage::TenantId;
use tokio::sync::oneshot;

use crate::cell_error::CellError;
use crate::priority::{READING, step_back};
use crate::throttle::slot_of;
use crate::turns::Turns;

/// Reads of one tenant that wait for a thread. The next one is refused.
pub const TENANT_QUEUED_MAX: usize = 1_000;

/// Reads of all tenants that wait for a thread. The next one is refused.
pub const QUEUED_MAX: usize = 20_000;

/// Charged for each read besides its time: what it costs to hand it over.
const READ_OVERHEAD_NS: u64 = 20_000;

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
    turns: Arc<Turns>,
    /// Reads of one tenant that run at a time, and how many while there are quiet tenants.
    tenant_running_max: usize,
    tenant_running_beside_quiet_max: usize,
}

#[derive(Default)]
struct Queue {
    /// Tenants with something waiting or running, and those in debt.
    tenants: HashMap<TenantId, TenantReads>,
    /// Tenants with something waiting that may start now: the one that had the least is first, among equals the one that waits longest.
    turns: BTreeSet<Turn>,
    /// Tenants with nothing to do whose tag the clock has not reached: if they were forgotten, who asks for one large read after the
    /// other would never pay for any.
    debtors: BTreeSet<(u64, TenantId)>,
    /// The largest tag of a read that was started: where tenants start that had nothing to do.
    clock_ns: u64,
    turns_given: u64,
    queued: usize,
    stopping: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Turn {
    tag_ns: u64,
    number: u64,
    tenant: TenantId,
}

#[derive(Default)]
struct TenantReads {
    waiting: VecDeque<Job>,
    running: usize,
    /// See the module's essay.
    tag_ns: u64,
    /// Its entry in `turns`, if it has one.
    turn: Option<Turn>,
}

impl TenantReads {
    fn is_idle(&self) -> bool {
        self.running == 0 && self.waiting.is_empty()
    }
}

/// Answers what it cost.
type Job = Box<dyn FnOnce() -> u64 + Send>;

impl ReadPool {
    /// As many threads as a machine with this many processors can use: some wait for the disk.
    ///
    /// # Errors
    /// If the system gives no more threads.
    pub fn for_this_machine(turns: Arc<Turns>) -> std::io::Result<Self> {
        let processors = std::thread::available_parallelism().map_or(2, usize::from);
        ReadPool::new((2 * processors).clamp(4, 64), processors / 2, turns)
    }

    fn new(threads: usize, beside_quiet: usize, turns: Arc<Turns>) -> std::io::Result<Self> {
        let tenant_running_max = (threads / 2).max(1);
        let shared = Arc::new(Shared {
            queue: Mutex::default(),
            work: Condvar::new(),
            turns,
            tenant_running_max,
            tenant_running_beside_quiet_max: beside_quiet.clamp(1, tenant_running_max),
        });
        let mut pool = ReadPool { shared, threads: Vec::with_capacity(threads) };
        for number in 0..threads {
            let shared = Arc::clone(&pool.shared);
            let thread = std::thread::Builder::new().name(format!("read-{number}"));
            let run = move || {
                step_back(READING);
                shared.run();
            };
            pool.threads.push(thread.spawn(run)?);
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
            let began = Instant::now();
            if !reply.is_closed() {
                // A caller who has just gone does not want it.
                let _ = reply.send(read());
            }
            u64::try_from(began.elapsed().as_nanos()).unwrap_or(u64::MAX)
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
        let waiting = queue.tenants.get(&tenant).map_or(0, |reads| reads.waiting.len());
        if waiting >= TENANT_QUEUED_MAX {
            return Err(CellError::TooManyRequests);
        }
        if queue.push(tenant, job, self.running_max(tenant)) {
            drop(queue);
            self.work.notify_one();
        }
        Ok(())
    }

    fn run(&self) {
        while let Some((tenant, job)) = self.next() {
            let cost_ns = catch_unwind(AssertUnwindSafe(job)).unwrap_or_else(|_| {
                tracing::error!(%tenant, "a read panicked");
                0
            });
            let running_max = self.running_max(tenant);
            self.queue.lock().finish(tenant, cost_ns, running_max);
        }
    }

    /// How many reads of a tenant may run now.
    fn running_max(&self, tenant: TenantId) -> usize {
        if self.turns.has_quiet_beside(slot_of(tenant), Instant::now()) {
            self.tenant_running_beside_quiet_max
        } else {
            self.tenant_running_max
        }
    }

    /// Waits for the next read; `None` when the pool stops.
    fn next(&self) -> Option<(TenantId, Job)> {
        let mut queue = self.queue.lock();
        loop {
            if queue.stopping {
                return None;
            }
            if let Some(next) = queue.start_next(|tenant| self.running_max(tenant)) {
                if !queue.turns.is_empty() {
                    self.work.notify_one();
                }
                return Some(next);
            }
            self.work.wait(&mut queue);
        }
    }
}

impl Queue {
    /// Answers whether the tenant can be served now, but for threads.
    fn push(&mut self, tenant: TenantId, job: Job, tenant_running_max: usize) -> bool {
        let clock_ns = self.clock_ns;
        let reads =
            self.tenants.entry(tenant).or_insert_with(|| TenantReads { tag_ns: clock_ns, ..Default::default() });
        if reads.is_idle() {
            self.debtors.remove(&(reads.tag_ns, tenant));
        }
        reads.waiting.push_back(job);
        let gets_turn = reads.turn.is_none() && reads.running < tenant_running_max;
        self.queued += 1;
        if gets_turn {
            self.give_turn(tenant);
        }
        gets_turn
    }

    /// A tenant is in `turns` once if it has reads waiting and may start one. What may run is less at some times: who has a turn then
    /// loses it when it comes, and gets one again with the next read that comes or ends.
    fn give_turn(&mut self, tenant: TenantId) {
        let Some(reads) = self.tenants.get_mut(&tenant) else { return };
        reads.tag_ns = reads.tag_ns.max(self.clock_ns);
        self.turns_given += 1;
        let turn = Turn { tag_ns: reads.tag_ns, number: self.turns_given, tenant };
        assert!(reads.turn.replace(turn).is_none(), "one turn at a time");
        self.turns.insert(turn);
    }

    fn start_next(&mut self, running_max: impl Fn(TenantId) -> usize) -> Option<(TenantId, Job)> {
        let (tag_ns, tenant, reads) = loop {
            let Turn { tag_ns, tenant, .. } = self.turns.pop_first()?;
            let reads = self.tenants.get_mut(&tenant)?;
            reads.turn = None;
            if reads.running < running_max(tenant) {
                break (tag_ns, tenant, reads);
            }
        };
        let job = reads.waiting.pop_front()?;
        reads.running += 1;
        self.queued -= 1;
        self.clock_ns = self.clock_ns.max(tag_ns);
        if !reads.waiting.is_empty() && reads.running < running_max(tenant) {
            self.give_turn(tenant);
        }
        while let Some((tag_ns, debtor)) = self.debtors.first().copied()
            && tag_ns <= self.clock_ns
        {
            self.debtors.remove(&(tag_ns, debtor));
            self.tenants.remove(&debtor);
        }
        Some((tenant, job))
    }

    fn finish(&mut self, tenant: TenantId, cost_ns: u64, tenant_running_max: usize) {
        let Some(reads) = self.tenants.get_mut(&tenant) else { return };
        reads.running -= 1;
        reads.tag_ns = reads.tag_ns.saturating_add(READ_OVERHEAD_NS).saturating_add(cost_ns);
        if reads.is_idle() {
            self.debtors.insert((reads.tag_ns, tenant));
        }
        // What it has just cost moves the tenant back. At its bound it had lost its turn.
        let gets_turn = reads.running < tenant_running_max && !reads.waiting.is_empty();
        if let Some(turn) = reads.turn.take() {
            self.turns.remove(&turn);
        }
        if gets_turn {
            self.give_turn(tenant);
        }
        if self.tenants.len() == self.debtors.len() {
            // Nobody waits or runs: nobody owes anything.
            *self = Queue { stopping: self.stopping, ..Queue::default() };
        }
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
        let pool = pool_of(2);
        assert_eq!(pool.run(A, || 7).await.unwrap(), 7);
    }

    /// Blocks a thread until the sender is dropped or used.
    fn blocking(gate: mpsc::Receiver<()>) -> Job {
        Box::new(move || {
            let _ = gate.recv();
            0
        })
    }

    fn pool_of(threads: usize) -> ReadPool {
        ReadPool::new(threads, 1, Arc::default()).unwrap()
    }

    // While others are at work a tenant reads on fewer threads; what it has waiting is not forgotten over that.
    #[test]
    fn what_may_run_may_change() {
        let mut queue = Queue::default();
        for _ in 0..5 {
            queue.push(A, Box::new(|| MS), 2);
        }
        assert!(queue.start_next(|_| 2).is_some());
        assert!(queue.start_next(|_| 1).is_none(), "it had a turn, and may not");
        queue.push(A, Box::new(|| MS), 2);
        assert!(queue.start_next(|_| 2).is_some(), "and now it may");
        queue.finish(A, MS, 1);
        assert!(queue.start_next(|_| 1).is_none(), "one runs still");
        queue.finish(A, MS, 1);
        let mut read = 2;
        while queue.start_next(|_| 1).is_some() {
            queue.finish(A, MS, 1);
            read += 1;
        }
        assert_eq!(read, 6, "all that were asked for");
        assert!(queue.tenants.is_empty() && queue.turns.is_empty() && queue.queued == 0);
    }

    #[tokio::test]
    async fn one_tenant_leaves_threads_to_another() {
        let pool = pool_of(2);
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
        let pool = pool_of(2);
        let (open, gate) = mpsc::channel::<()>();
        let (started, running) = mpsc::channel::<()>();
        pool.shared
            .enqueue(
                A,
                Box::new(move || {
                    drop(started);
                    let _ = gate.recv();
                    0
                }),
            )
            .unwrap();
        assert!(running.recv().is_err(), "running now");
        for _ in 0..TENANT_QUEUED_MAX {
            pool.shared.enqueue(A, Box::new(|| 0)).unwrap();
        }
        assert!(matches!(pool.run(A, || ()).await, Err(CellError::TooManyRequests)));
        pool.run(B, || ()).await.unwrap();
        drop(open);
    }

    /// One thread's order of these reads, given as whose they are and what they cost, if all are there at the start.
    fn order_of(queue: &mut Queue, reads: &[(TenantId, u64)]) -> Vec<TenantId> {
        for (tenant, cost_ns) in reads {
            let cost_ns = *cost_ns;
            queue.push(*tenant, Box::new(move || cost_ns), 2);
        }
        let mut order = Vec::new();
        while let Some((tenant, job)) = queue.start_next(|_| 2) {
            queue.finish(tenant, job(), 2);
            order.push(tenant);
        }
        order
    }

    const MS: u64 = 1_000_000;

    #[test]
    fn tenants_take_turns() {
        let reads = [(A, MS), (A, MS), (A, MS), (B, MS), (B, MS)];
        assert_eq!(order_of(&mut Queue::default(), &reads), [A, B, A, B, A]);
    }

    // A tenant of large reads and one of small ones get the same time, not the same number.
    #[test]
    fn tenants_share_time() {
        let mut reads = vec![(A, 10 * MS); 3];
        reads.extend([(B, MS); 25]);
        let order = order_of(&mut Queue::default(), &reads);
        let of_b = |upto: usize| order.iter().take(upto).filter(|tenant| **tenant == B).count();
        let of_a: Vec<usize> = (0..order.len()).filter(|at| order[*at] == A).map(of_b).collect();
        assert_eq!(of_a, [0, 10, 20], "so many of B's were before each of A's: {order:?}");
    }

    // Who waits for each answer before it asks again owes for the last one; who comes new owes nothing and has saved nothing.
    #[test]
    fn a_tenant_pays_for_what_it_had_and_saves_nothing() {
        let mut queue = Queue::default();
        queue.push(A, Box::new(|| 10 * MS), 2);
        for _ in 0..4 {
            queue.push(B, Box::new(|| MS), 2);
        }
        let mut order = Vec::new();
        for _ in 0..4 {
            let (tenant, job) = queue.start_next(|_| 2).unwrap();
            queue.finish(tenant, job(), 2);
            order.push(tenant);
            if tenant == A {
                queue.push(A, Box::new(|| 10 * MS), 2);
            }
        }
        assert_eq!(order, [A, B, B, B]);
        let newcomer = TenantId(3);
        assert_eq!(order_of(&mut queue, &[(newcomer, MS)]), [newcomer, B, A], "it starts where the others are");
        assert!(queue.tenants.is_empty() && queue.debtors.is_empty() && queue.turns.is_empty(), "and nothing is left");
    }

    #[tokio::test]
    async fn a_panic_costs_one_answer() {
        let pool = pool_of(1);
        assert!(matches!(pool.run(A, || panic!("on purpose")).await, Err::<(), _>(CellError::Stopped)));
        assert_eq!(pool.run(A, || 7).await.unwrap(), 7);
    }

    #[tokio::test]
    async fn stopping_answers_those_who_wait() {
        let pool = pool_of(1);
        let (open, gate) = mpsc::channel();
        pool.shared.enqueue(A, blocking(gate)).unwrap();
        let shared = Arc::clone(&pool.shared);
        let (reply, answer) = oneshot::channel::<()>();
        let waits = move || {
            drop(reply);
            0
        };
        shared.enqueue(A, Box::new(waits)).unwrap();
        drop(open);
        drop(pool);
        assert!(answer.await.is_err());
        assert!(matches!(shared.enqueue(A, Box::new(|| 0)), Err(CellError::Stopped)));
    }
}
