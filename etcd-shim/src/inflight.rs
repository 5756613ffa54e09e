//! How many bytes of answers may be in memory at once. A member has three such budgets, each of its own: answers on their way to clients, requests
//! of which a part has come ([`crate::request_body`]), and replies of applied commands that nobody has fetched ([`crate::cell`]).
//!
//! A range answer has no limit of its own, so a few clients that ask for everything, or that ask and do not read, could
//! fill the memory of all. Every answer of some size therefore holds a [`Reservation`], which grows with it and lives until
//! the answer's body has left: the service puts it, as a [`ResponsePermit`], into the response's extensions, and the gate
//! drops it together with the body.
//!
//! What is small is not counted, unless its tenant has many requests open: one connection may have thousands, whose client reads none of
//! their answers.
//!
//! Nobody waits while holding. A read that is not let grow gives up what it has read, waits without a thread and without
//! bytes until there is room for twice as much, reserves that, and reads again. So answers cannot block each other half
//! done, a tenant over its budget occupies no reading thread, and the work done twice is bounded by a factor of two.
//!
//! What a watcher is told of the past needs room too, and its message holds that until it was sent ([`ReplayRoom`]). Live events are
//! shared, and counted when they are about to be sent.
//!
//! What must hold: the sum over a tenant's reservations is at most [`TENANT_BYTES_MAX`], over all at most
//! [`PROCESS_BYTES_MAX`], except that an answer which is alone may be of any size, that every tenant may hold
//! [`TENANT_FLOOR_BYTES`] whatever the others hold, and what [`Reservation::charge`] adds.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tenure_storage::watch::{Reached, ReplayRoom};
use tenure_storage::{Limit, TenantId};
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::cell::Tenant;
use crate::cell_error::CellError;
use crate::throttle::in_force;

/// Bytes of answers one tenant may have in flight. At the bound its next large read waits.
pub const TENANT_BYTES_MAX: usize = 256 << 20;

/// Bytes of answers all tenants together may have in flight.
pub const PROCESS_BYTES_MAX: usize = 1 << 30;

/// Bytes a tenant may have in flight even when the others have used up the process's: reads of one tenant cannot stop
/// those of another.
pub const TENANT_FLOOR_BYTES: usize = 8 << 20;

/// Answers below this many bytes are not counted as long as their tenant has few requests open: counting would cost every point read
/// a lock.
pub const SMALL_BYTES: usize = 64 << 10;

/// Open requests of a tenant that are few, among them the watch streams of a kube-apiserver: with small answers they hold 32 MiB.
pub const FEW_REQUESTS: usize = 512;

/// Where requests of tenants are counted, and wait for room, by the rest of their ids.
const SLOTS: usize = 1024;

/// Answers below this many bytes are never counted: the request itself takes more.
const TINY_BYTES: usize = 1 << 10;

/// What a growing small answer reserves at a time, if it is counted.
const SMALL_STEP_BYTES: usize = 16 << 10;

/// A growing answer reserves this many bytes at a time.
const STEP_BYTES: usize = 1 << 20;

/// Longest wait for room; then the client is told to try again.
pub const WAIT_MAX: Duration = Duration::from_secs(5);

/// Longest wait of a replay: other watchers of its stream may need less room.
const REPLAY_WAIT_MAX: Duration = Duration::from_millis(500);

const _: () = assert!(TENANT_FLOOR_BYTES <= TENANT_BYTES_MAX && TENANT_BYTES_MAX <= PROCESS_BYTES_MAX);

/// The bounds, in a form that tests can make small.
#[derive(Clone, Copy, Debug)]
pub struct Budget {
    pub tenant_bytes: usize,
    pub process_bytes: usize,
    pub tenant_floor_bytes: usize,
    pub wait_max: Duration,
}

impl Default for Budget {
    fn default() -> Self {
        Budget {
            tenant_bytes: TENANT_BYTES_MAX,
            process_bytes: PROCESS_BYTES_MAX,
            tenant_floor_bytes: TENANT_FLOOR_BYTES,
            wait_max: WAIT_MAX,
        }
    }
}

/// What is in flight now. Cheap to clone; all clones count together.
#[derive(Clone, Debug)]
pub struct InFlight(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    budget: Budget,
    open: OpenRequests,
    /// A lock, not atomics: the two sums are decided on together. Held for a few instructions.
    held: Mutex<Held>,
    /// Woken whenever bytes of a tenant of the slot are given back: a neighbour's bytes are of no use to who has used up its own.
    room_of_tenants: Box<[Room]>,
    /// Woken whenever bytes are given back, for those who have not.
    room_of_all: Room,
}

/// Where to wait for bytes that are given back.
#[derive(Debug, Default)]
struct Room {
    given_back: Notify,
    /// Mostly nobody, and then nobody need be woken.
    waiting: AtomicUsize,
}

impl Room {
    fn wake(&self) {
        if self.waiting.load(Ordering::SeqCst) > 0 {
            self.given_back.notify_waiters();
        }
    }
}

/// What there is too little of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Short {
    OfTenant,
    OfAll,
}

impl Shared {
    fn room(&self, short: Short, tenant: TenantId) -> &Room {
        match short {
            Short::OfTenant => &self.room_of_tenants[slot_of(tenant)],
            Short::OfAll => &self.room_of_all,
        }
    }
}

fn slot_of(tenant: TenantId) -> usize {
    tenant.0 as usize % SLOTS
}

/// Somebody who waits for room.
struct Waits<'a>(&'a AtomicUsize);

impl<'a> Waits<'a> {
    fn on(room: &'a Room) -> Self {
        room.waiting.fetch_add(1, Ordering::SeqCst);
        Waits(&room.waiting)
    }
}

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

#[derive(Debug, Default)]
struct Held {
    process: usize,
    /// Tenants that hold something.
    tenants: HashMap<TenantId, usize>,
}

/// How many requests tenants have open. Tenants of one slot count together: then small answers of both are counted sooner, which costs
/// a little time and nothing else.
#[derive(Clone, Debug)]
pub struct OpenRequests(Arc<[AtomicUsize; SLOTS]>);

/// One of them, until it is dropped.
#[derive(Debug)]
pub struct OpenOne {
    of: OpenRequests,
    slot: usize,
}

impl Default for OpenRequests {
    fn default() -> Self {
        OpenRequests(Arc::new(std::array::from_fn(|_| AtomicUsize::new(0))))
    }
}

impl OpenRequests {
    /// One more of this tenant, until the result is dropped.
    pub fn open(&self, tenant: TenantId) -> OpenOne {
        let slot = slot_of(tenant);
        self.0[slot].fetch_add(1, Ordering::Relaxed);
        OpenOne { of: self.clone(), slot }
    }

    fn are_few(&self, tenant: TenantId) -> bool {
        self.0[slot_of(tenant)].load(Ordering::Relaxed) <= FEW_REQUESTS
    }
}

impl Drop for OpenOne {
    fn drop(&mut self) {
        self.of.0[self.slot].fetch_sub(1, Ordering::Relaxed);
    }
}

impl InFlight {
    /// `open`: requests of network clients, which those who let them in count there.
    pub fn new(budget: Budget, open: OpenRequests) -> Self {
        InFlight(Arc::new(Shared {
            budget,
            open,
            held: Mutex::default(),
            room_of_tenants: (0..SLOTS).map(|_| Room::default()).collect(),
            room_of_all: Room::default(),
        }))
    }

    /// Where requests are counted.
    pub fn open_requests(&self) -> &OpenRequests {
        &self.0.open
    }

    /// Room for an answer of so many bytes that is there already. `None`: there is none, and it is to be dropped. Never blocks.
    pub fn hold(&self, tenant: TenantId, bytes: usize) -> Option<Reservation> {
        let mut reservation = self.reservation(tenant);
        reservation.try_reach(bytes).then(|| {
            reservation.settle(bytes);
            reservation
        })
    }

    /// A reservation of nothing, for an answer about to be made.
    pub fn reservation(&self, tenant: TenantId) -> Reservation {
        let tenant_bytes = self.0.budget.tenant_bytes;
        let counted_from_bytes = if self.0.open.are_few(tenant) { SMALL_BYTES } else { TINY_BYTES };
        let shared = Arc::clone(&self.0);
        Reservation { shared, tenant, tenant_bytes, counted_from_bytes, bytes: 0, short: None, deadline: None }
    }

    /// The same, within the limit of a tenant's own.
    pub fn of(&self, tenant: &Tenant) -> Reservation {
        let limit = in_force(Limit::ResponseBytesInFlight, tenant.limit(Limit::ResponseBytesInFlight));
        let tenant_bytes = limit.map_or(usize::MAX, |bytes| usize::try_from(bytes).unwrap_or(usize::MAX));
        let mut reservation = self.reservation(tenant.id());
        reservation.tenant_bytes = tenant_bytes;
        reservation
    }

    /// How many wait for bytes that this tenant can use.
    #[cfg(test)]
    pub(crate) fn waiting(&self, tenant: TenantId) -> usize {
        let on = |short| self.0.room(short, tenant).waiting.load(Ordering::SeqCst);
        on(Short::OfTenant) + on(Short::OfAll)
    }

    /// Bytes in flight of all tenants.
    pub fn bytes(&self) -> usize {
        self.0.held.lock().process
    }
}

/// Bytes held for one answer; given back on drop.
#[derive(Debug)]
pub struct Reservation {
    shared: Arc<Shared>,
    tenant: TenantId,
    /// What the tenant may hold.
    tenant_bytes: usize,
    /// An answer of fewer bytes is not counted.
    counted_from_bytes: usize,
    bytes: usize,
    /// What there was too little of when it could not grow last.
    short: Option<Short>,
    /// Set at the first wait, so that an answer that waits several times waits [`WAIT_MAX`] altogether.
    deadline: Option<Instant>,
}

impl Reservation {
    /// Covers an answer that has reached `bytes`. `false`: there is no room; drop what was made and go to
    /// [`Reservation::wait_for_room`]. Never blocks.
    pub fn try_reach(&mut self, bytes: usize) -> bool {
        if bytes < self.counted_from_bytes || bytes <= self.bytes {
            return true;
        }
        let wanted = bytes.next_multiple_of(if bytes < SMALL_BYTES { SMALL_STEP_BYTES } else { STEP_BYTES });
        self.short = self.try_hold(wanted).err();
        self.short.is_none()
    }

    fn try_hold(&mut self, wanted: usize) -> Result<(), Short> {
        debug_assert!(wanted >= self.bytes, "a reservation only grows");
        let more = wanted - self.bytes;
        let budget = &self.shared.budget;
        let mut held = self.shared.held.lock();
        let tenant = held.tenants.get(&self.tenant).copied().unwrap_or(0);
        let tenant_fits = tenant.saturating_add(more) <= self.tenant_bytes || tenant == self.bytes;
        let process_fits = held.process + more <= budget.process_bytes
            || held.process == self.bytes
            || tenant + more <= budget.tenant_floor_bytes;
        match (tenant_fits, process_fits) {
            (false, _) => return Err(Short::OfTenant),
            (true, false) => return Err(Short::OfAll),
            (true, true) => {}
        }
        held.add(self.tenant, more);
        self.bytes = wanted;
        Ok(())
    }

    /// Resolves when some bytes have been given back, after the first poll, of what [`Reservation::try_reach`] last found too little of;
    /// whether they are enough is for the caller to try. Poll once, try, and only then wait: so no wake-up is missed. If what there
    /// is too little of is another thing by then, it has to be asked for anew.
    pub fn room(&self) -> impl Future<Output = ()> + Send + use<> {
        let (shared, tenant, short) = (Arc::clone(&self.shared), self.tenant, self.short.unwrap_or(Short::OfAll));
        async move {
            let room = shared.room(short, tenant);
            let _waits = Waits::on(room);
            room.given_back.notified().await;
        }
    }

    /// What [`Reservation::try_reach`] last found too little of.
    pub fn short(&self) -> Option<Short> {
        self.short
    }

    /// Covers an answer that already exists and cannot be taken back, without asking. Others then wait for longer.
    pub fn charge(&mut self, bytes: usize) {
        if bytes >= self.counted_from_bytes && bytes > self.bytes {
            self.shared.held.lock().add(self.tenant, bytes - self.bytes);
            self.bytes = bytes;
        }
    }

    /// Gives back everything, then waits until an answer of twice the size that did not fit has room, and reserves that.
    ///
    /// # Errors
    /// [`CellError::TimeoutRead`] after [`WAIT_MAX`].
    pub async fn wait_for_room(&mut self, did_not_fit_bytes: usize) -> Result<(), CellError> {
        let twice = did_not_fit_bytes.saturating_mul(2).min(self.tenant_bytes);
        let wait_max = self.shared.budget.wait_max;
        let deadline = *self.deadline.get_or_insert_with(|| Instant::now() + wait_max);
        self.wait_until(twice.max(did_not_fit_bytes).next_multiple_of(STEP_BYTES), deadline).await
    }

    /// As [`Reservation::wait_for_room`], for a watcher, which may try as often as it likes: no longer than [`REPLAY_WAIT_MAX`], and for no more
    /// than an eighth of what its tenant may have beyond what did not fit, or it would have to wait until its tenant has nothing else.
    ///
    /// # Errors
    /// [`CellError::TimeoutRead`].
    pub async fn wait_for_replay(&mut self, did_not_fit_bytes: usize) -> Result<(), CellError> {
        let more = did_not_fit_bytes.saturating_add(did_not_fit_bytes.min(self.tenant_bytes / 8));
        let wanted = more.next_multiple_of(STEP_BYTES).min(self.tenant_bytes).max(did_not_fit_bytes);
        self.wait_until(wanted, Instant::now() + REPLAY_WAIT_MAX.min(self.shared.budget.wait_max)).await
    }

    async fn wait_until(&mut self, wanted: usize, deadline: Instant) -> Result<(), CellError> {
        self.give_back(self.bytes);
        let shared = Arc::clone(&self.shared);
        let Err(mut short) = self.try_hold(wanted) else { return Ok(()) };
        loop {
            let room = shared.room(short, self.tenant);
            let _waits = Waits::on(room);
            // From here on no wake-up is missed, so the try below cannot race with a release.
            let given_back = room.given_back.notified();
            match self.try_hold(wanted) {
                Ok(()) => return Ok(()),
                Err(now) if now != short => short = now,
                Err(_) => tokio::time::timeout_at(deadline, given_back).await.map_err(|_| CellError::TimeoutRead)?,
            }
        }
    }

    /// Whether nothing is held.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Gives back what the finished answer of `bytes` does not need.
    pub fn settle(&mut self, bytes: usize) {
        let needed = if bytes < self.counted_from_bytes { 0 } else { bytes };
        self.give_back(self.bytes.saturating_sub(needed));
    }

    /// What travels with the answer; `None` if it is too small to count.
    pub fn into_permit(self) -> Option<ResponsePermit> {
        (self.bytes > 0).then(|| ResponsePermit(Arc::new(self)))
    }

    fn give_back(&mut self, bytes: usize) {
        if bytes > 0 {
            self.shared.held.lock().remove(self.tenant, bytes);
            self.bytes -= bytes;
            self.shared.room(Short::OfTenant, self.tenant).wake();
            self.shared.room_of_all.wake();
        }
    }
}

/// A revision that is larger than all that a tenant may have in flight would be sent only while the tenant does nothing else, and
/// take several times its size. It counts as gone.
impl ReplayRoom for Reservation {
    fn try_reach(&mut self, bytes: usize) -> Reached {
        let budget = &self.shared.budget;
        if bytes > self.tenant_bytes.clamp(budget.tenant_bytes, budget.process_bytes) {
            return Reached::Never;
        }
        if self.try_reach(bytes) { Reached::Yes } else { Reached::NotNow }
    }

    fn settle(&mut self, bytes: usize) {
        self.settle(bytes);
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.give_back(self.bytes);
    }
}

impl Held {
    fn add(&mut self, tenant: TenantId, bytes: usize) {
        self.process += bytes;
        *self.tenants.entry(tenant).or_default() += bytes;
    }

    fn remove(&mut self, tenant: TenantId, bytes: usize) {
        let held = self.tenants.get_mut(&tenant).expect("only what was added is given back");
        *held -= bytes;
        if *held == 0 {
            self.tenants.remove(&tenant);
        }
        self.process -= bytes;
    }
}

/// Keeps an answer's bytes counted for as long as any clone of it lives. Travels in the response's extensions.
#[derive(Clone, Debug)]
pub struct ResponsePermit(#[expect(dead_code, reason = "held, never looked at")] Arc<Reservation>);

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: usize = 1 << 20;
    const A: TenantId = TenantId(1);
    const B: TenantId = TenantId(2);

    fn small_budget() -> InFlight {
        let budget = Budget {
            tenant_bytes: 8 * MIB,
            process_bytes: 12 * MIB,
            tenant_floor_bytes: 2 * MIB,
            wait_max: Duration::from_millis(50),
        };
        InFlight::new(budget, OpenRequests::default())
    }

    /// One connection may have many thousand requests open, with answers of almost 64 KiB that it never reads.
    #[tokio::test]
    async fn many_small_answers_are_counted() {
        let in_flight = small_budget();
        let open: Vec<_> = (0..=FEW_REQUESTS).map(|_| in_flight.open_requests().open(A)).collect();
        let mut held = Vec::new();
        loop {
            let mut small = in_flight.reservation(A);
            if !small.try_reach(SMALL_BYTES - 1) {
                break;
            }
            small.settle(SMALL_BYTES - 1);
            held.push(small.into_permit().unwrap());
        }
        assert_eq!(held.len(), 8 * MIB / SMALL_BYTES);
        assert!(in_flight.reservation(A).try_reach(0), "one without bytes");
        assert!(in_flight.reservation(B).try_reach(SMALL_BYTES - 1));
        drop((open, held));
        assert_eq!(in_flight.bytes(), 0);
        let mut small = in_flight.reservation(A);
        assert!(small.try_reach(SMALL_BYTES - 1) && small.into_permit().is_none());
    }

    #[tokio::test]
    async fn small_answers_are_free() {
        let in_flight = small_budget();
        let mut small = in_flight.reservation(A);
        assert!(small.try_reach(SMALL_BYTES - 1));
        assert_eq!(in_flight.bytes(), 0);
        assert!(small.into_permit().is_none());
    }

    #[tokio::test]
    async fn a_tenant_has_its_budget_and_the_process_has_one() {
        let in_flight = small_budget();
        let mut first = in_flight.reservation(A);
        assert!(first.try_reach(6 * MIB));
        let mut second = in_flight.reservation(A);
        assert!(second.try_reach(2 * MIB));
        assert!(!second.try_reach(3 * MIB), "the tenant's is used up");
        let mut other = in_flight.reservation(B);
        assert!(other.try_reach(4 * MIB), "another tenant has its own");
        assert!(!other.try_reach(5 * MIB), "the process's is used up");
        let mut third = in_flight.reservation(TenantId(3));
        assert!(third.try_reach(2 * MIB), "what every tenant may have");
        assert!(!third.try_reach(3 * MIB));
        drop((first, second, other, third));
        assert_eq!(in_flight.bytes(), 0);
    }

    #[tokio::test]
    async fn one_that_is_larger_than_the_budget_passes_alone() {
        let in_flight = small_budget();
        let mut large = in_flight.reservation(A);
        assert!(large.try_reach(7 * MIB));
        assert!(large.try_reach(100 * MIB));
        large.settle(90 * MIB + 1);
        assert_eq!(in_flight.bytes(), 90 * MIB + 1);
        let permit = large.into_permit().unwrap();
        let clone = permit.clone();
        drop(permit);
        assert_eq!(in_flight.bytes(), 90 * MIB + 1, "as long as any clone lives");
        drop(clone);
        assert_eq!(in_flight.bytes(), 0);
    }

    #[tokio::test]
    async fn one_that_does_not_fit_waits_without_holding() {
        let in_flight = small_budget();
        let mut first = in_flight.reservation(A);
        assert!(first.try_reach(5 * MIB));
        let mut second = in_flight.reservation(A);
        assert!(second.try_reach(3 * MIB));
        assert!(!second.try_reach(4 * MIB));
        let waiting = tokio::spawn(async move {
            second.wait_for_room(4 * MIB).await.unwrap();
            second
        });
        while in_flight.bytes() != 5 * MIB {
            tokio::task::yield_now().await;
        }
        drop(first);
        assert_eq!(waiting.await.unwrap().bytes, 8 * MIB);
    }

    /// A tenant with a small limit is told of revisions that are larger, when it has nothing else in flight.
    #[tokio::test]
    async fn a_replay_reaches_what_fits_and_knows_what_never_does() {
        let in_flight = small_budget();
        let mut other = in_flight.reservation(A);
        assert!(other.try_reach(2 * MIB));
        let mut limited = in_flight.reservation(A);
        limited.tenant_bytes = MIB;
        let mut usual = in_flight.reservation(A);
        let reach = |room: &mut dyn ReplayRoom, bytes| room.try_reach(bytes);
        assert_eq!(reach(&mut limited, SMALL_BYTES - 1), Reached::Yes);
        assert_eq!(reach(&mut limited, 8 * MIB), Reached::NotNow);
        assert_eq!(reach(&mut limited, 8 * MIB + 1), Reached::Never);
        assert_eq!([6, 7, 9].map(|mib| reach(&mut usual, mib * MIB)), [Reached::Yes, Reached::NotNow, Reached::Never]);
        drop((other, usual));
        assert_eq!(reach(&mut limited, 8 * MIB), Reached::Yes);
        ReplayRoom::settle(&mut limited, 3 * MIB);
        assert_eq!(in_flight.bytes(), 3 * MIB);
    }

    /// A neighbour gives bytes back with every answer. They are of no use to who has used up its own.
    #[tokio::test]
    async fn room_is_waited_for_where_it_is_short() {
        let in_flight = small_budget();
        let [mut own, mut of_b] = [A, B].map(|tenant| in_flight.reservation(tenant));
        assert!(own.try_reach(8 * MIB) && of_b.try_reach(3 * MIB));
        let mut more = in_flight.reservation(A);
        assert!(!more.try_reach(2 * MIB));
        assert_eq!(more.short(), Some(Short::OfTenant));
        let mut room = std::pin::pin!(more.room());
        assert!(futures::poll!(room.as_mut()).is_pending());
        of_b.settle(0);
        assert!(futures::poll!(room.as_mut()).is_pending());
        own.settle(7 * MIB);
        assert!(futures::poll!(room).is_ready());
        let mut of_c = in_flight.reservation(TenantId(3));
        assert!(of_c.try_reach(5 * MIB) && !more.try_reach(MIB + 1));
        assert!(!in_flight.reservation(B).try_reach(3 * MIB));
        own.settle(5 * MIB);
        assert!(more.try_reach(MIB + 1));
    }

    /// What is always in use by others may be little, and then a revision that fits beside it has its turn.
    #[tokio::test]
    async fn a_replay_does_not_wait_until_its_tenant_has_nothing_else() {
        let in_flight = small_budget();
        let mut other = in_flight.reservation(A);
        assert!(other.try_reach(MIB));
        let mut replay = in_flight.reservation(A);
        replay.wait_for_replay(5 * MIB).await.unwrap();
        assert_eq!(replay.bytes, 6 * MIB);
        replay.wait_for_replay(7 * MIB).await.unwrap_err();
        other.settle(0);
        replay.wait_for_replay(8 * MIB).await.unwrap();
        assert_eq!(replay.bytes, 8 * MIB, "no more than there can be");
        replay.settle(0);
        assert!(other.try_reach(MIB));
        assert!(in_flight.reservation(A).wait_for_room(5 * MIB).await.is_err());
    }

    #[tokio::test]
    async fn waiting_ends() {
        let in_flight = small_budget();
        let mut first = in_flight.reservation(A);
        first.charge(20 * MIB);
        let mut second = in_flight.reservation(A);
        assert!(!second.try_reach(MIB));
        let started = Instant::now();
        assert!(matches!(second.wait_for_room(MIB).await, Err(CellError::TimeoutRead)));
        assert!(started.elapsed() >= in_flight.0.budget.wait_max);
    }
}
