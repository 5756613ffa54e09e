//! When leases end.
//!
//! Which leases exist is replicated state; *when* one ends is known on the leader alone, and time enters the state machine
//! only as the [`Command::LeaseRevoke`] that the leader proposes. So nothing here is written to disk: a new leader gives
//! every lease its full TTL again, and one election timeout more, because a client may have renewed just before. A lease
//! can only live longer than its TTL, never shorter, and none ends while nobody leads.
//!
//! Life of a lease: `apply` grants it, the [`Observer`](tenure_storage::Observer) tells [`Lessor::granted`]; keep-alives
//! move its deadline; when it passes, [`Lessor::take_expired`] hands it to the task that proposes the revoke (`cell.rs`);
//! `apply` revokes it and [`Lessor::revoked`] forgets it. Between deadline and revoke the lease is *expired*: it exists, its
//! keys too, but it can no longer be renewed. A keep-alive then waits for the revoke, so that its client never hears of a
//! lease that is about to go.
//!
//! Renewal is lazy: it changes the deadline of the lease and not its place in the queue. When the old deadline comes up the
//! lease is queued again. So a keep-alive costs one hash look-up, and the queue holds one entry for each lease.
//!
//! Tenants do not wait for each other: each has its own queue and may have [`TENANT_EXPIRED_MAX`] leases revoked in a
//! poll, all together [`POLL_EXPIRED_MAX`], those that are due first going first. A tenant without leases has no entry
//! here.
//!
//! Time comes in as an argument, counted from whatever moment the caller likes.
//!
//! [`Command::LeaseRevoke`]: tenure_storage::Command::LeaseRevoke

use std::cmp::Reverse;
use std::collections::{BTreeSet, BinaryHeap, HashMap, HashSet};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tenure_storage::{LeaseId, TenantId};
use tokio::sync::watch;

/// How often expired leases are looked for: etcd's own period.
pub const POLL_PERIOD: Duration = Duration::from_millis(500);

/// Leases of one tenant revoked in one poll: etcd's own number. The rest waits for the next poll.
pub const TENANT_EXPIRED_MAX: usize = 500;

/// Leases of all tenants revoked in one poll. Those due longest go first, the rest waits.
pub const POLL_EXPIRED_MAX: usize = 10_000;

/// After this an expired lease that is still there is handed out again: its revoke was lost.
const RETRY_AFTER: Duration = Duration::from_secs(3);

/// A point in time, counted from the lessor's own zero.
pub type Moment = Duration;

/// The deadlines of one member, in the time of this process.
pub struct Lessor {
    zero: Instant,
    /// One lock for all tenants: it is held for a look-up, or for one poll's work on what is due.
    table: Mutex<LeaseTable>,
    /// The term that this member leads; follows [`LeaseTable::leading`].
    leading: watch::Sender<Option<u64>>,
}

/// What became of a keep-alive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Renewed {
    /// The lease lives for another full TTL.
    For { ttl_seconds: i64 },
    /// There is no such lease (any more).
    Missing,
    /// This member does not lead, so it cannot know.
    NotLeader,
}

/// What is left of a lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Remaining {
    /// Whole seconds, rounded down; 0 for an expired lease that is not revoked yet.
    pub seconds: i64,
    pub granted_seconds: i64,
}

impl Lessor {
    /// Knows no leases and does not lead. `extension` is what a new leader adds to every TTL.
    pub fn new(extension: Duration) -> Self {
        let table = Mutex::new(LeaseTable::new(extension));
        Lessor { zero: Instant::now(), table, leading: watch::Sender::new(None) }
    }

    fn now(&self) -> Moment {
        self.zero.elapsed()
    }

    /// The state was replaced: these leases are what there is, as (tenant, lease, TTL in seconds), and these tenants are suspended.
    /// Nobody sees a part of it.
    pub fn replace(&self, leases: &[(TenantId, LeaseId, i64)], suspended: &[TenantId]) {
        let mut table = self.table.lock();
        let now = self.now();
        table.tenants.clear();
        table.due.clear();
        table.suspended.clear();
        for (tenant, id, ttl_seconds) in leases {
            table.granted(*tenant, *id, *ttl_seconds, now);
        }
        suspended.iter().for_each(|tenant| table.suspend(*tenant));
    }

    /// The tenant's leases end no more until it is resumed.
    pub fn suspend(&self, tenant: TenantId) {
        self.table.lock().suspend(tenant);
    }

    /// The tenant's leases start over, if it was suspended.
    pub fn resume(&self, tenant: TenantId) {
        self.table.lock().resume(tenant, self.now());
    }

    /// The tenant is gone, with all its leases.
    pub fn forget(&self, tenant: TenantId) {
        self.table.lock().forget(tenant);
    }

    /// A lease exists now. Its TTL starts.
    pub fn granted(&self, tenant: TenantId, id: LeaseId, ttl_seconds: i64) {
        self.table.lock().granted(tenant, id, ttl_seconds, self.now());
    }

    /// A lease is gone. Whoever waits for that is woken.
    pub fn revoked(&self, tenant: TenantId, id: LeaseId) {
        self.table.lock().revoked(tenant, id);
    }

    /// This member leads a term now: every lease starts over.
    pub fn promote(&self, term: u64) {
        self.table.lock().promote(self.now());
        self.leading.send_replace(Some(term));
    }

    /// This member leads no longer: nothing expires here.
    pub fn demote(&self) {
        self.table.lock().demote();
        self.leading.send_replace(None);
    }

    /// Whether this member decides about leases.
    pub fn leads(&self) -> bool {
        self.led_term().is_some()
    }

    /// The term in which this member decides about leases. What it decides holds in that term alone: a member that was stopped
    /// for a while, and does not know yet that another leads, must not end what that one lets live, nor promise what it ends.
    pub fn led_term(&self) -> Option<u64> {
        *self.leading.borrow()
    }

    /// Expired leases, each to be revoked. They are handed out again if they still exist some time later.
    pub fn take_expired(&self) -> Vec<(TenantId, LeaseId)> {
        self.table.lock().take_expired(self.now())
    }

    /// Whether a lease that was handed out still is to be revoked.
    pub fn is_expired(&self, tenant: TenantId, id: LeaseId) -> bool {
        self.table.lock().is_expired(tenant, id, self.now())
    }

    /// Moves a lease's deadline. Waits while the lease is expired and not yet revoked: bound it with a timeout. May be
    /// cancelled at any time.
    pub async fn renew(&self, tenant: TenantId, id: LeaseId) -> Renewed {
        loop {
            let mut gone = match self.table.lock().renew(tenant, id, self.now()) {
                Attempt::Done(renewed) => return renewed,
                Attempt::Expired(gone) => gone,
            };
            // Ends when the sender is dropped, with the lease or with leadership.
            while gone.changed().await.is_ok() {}
        }
    }

    /// What is left of a lease; `None` if there is no such lease.
    pub fn remaining(&self, tenant: TenantId, id: LeaseId) -> Option<Remaining> {
        self.table.lock().remaining(tenant, id, self.now())
    }

    /// The tenant's leases, those that end first in front.
    pub fn list(&self, tenant: TenantId) -> Vec<LeaseId> {
        let mut leases = self.table.lock().deadlines(tenant);
        leases.sort_unstable();
        leases.into_iter().map(|(_, id)| id).collect()
    }
}

/// The deadlines themselves; knows no clock.
struct LeaseTable {
    extension: Duration,
    leading: bool,
    /// Tenants that have leases.
    tenants: HashMap<TenantId, TenantLeases>,
    /// For every tenant with a queue, when its first entry is due. Empty while another member leads.
    due: BTreeSet<(Moment, TenantId)>,
    /// Tenants none of whose leases ends; they have no queue.
    suspended: HashSet<TenantId>,
}

#[derive(Default)]
struct TenantLeases {
    leases: HashMap<LeaseId, Lease>,
    /// When to look at which lease. May name leases that are gone, and deadlines that have moved on.
    queue: BinaryHeap<Reverse<(Moment, LeaseId)>>,
}

struct Lease {
    ttl_seconds: i64,
    /// Meaningless while another member leads.
    deadline: Moment,
    /// Made by the first who waits for the revoke; dropping it wakes all who do.
    gone: Option<watch::Sender<()>>,
}

enum Attempt {
    Done(Renewed),
    Expired(watch::Receiver<()>),
}

fn seconds(seconds: i64) -> Duration {
    Duration::from_secs(u64::try_from(seconds).unwrap_or(0))
}

impl TenantLeases {
    fn due(&self) -> Option<Moment> {
        self.queue.peek().map(|Reverse((at, _))| *at)
    }

    /// Gives every lease its full TTL, and more.
    fn start_over(&mut self, now: Moment, extension: Duration) {
        for lease in self.leases.values_mut() {
            lease.deadline = now.saturating_add(seconds(lease.ttl_seconds)).saturating_add(extension);
            lease.gone = None;
        }
        self.queue = self.leases.iter().map(|(id, lease)| Reverse((lease.deadline, *id))).collect();
    }
}

impl LeaseTable {
    fn new(extension: Duration) -> Self {
        LeaseTable {
            extension,
            leading: false,
            tenants: HashMap::new(),
            due: BTreeSet::new(),
            suspended: HashSet::new(),
        }
    }

    fn granted(&mut self, tenant: TenantId, id: LeaseId, ttl_seconds: i64, now: Moment) {
        let of_tenant = self.tenants.entry(tenant).or_default();
        let deadline = now.saturating_add(seconds(ttl_seconds));
        of_tenant.leases.insert(id, Lease { ttl_seconds, deadline, gone: None });
        if self.leading && !self.suspended.contains(&tenant) {
            let before = of_tenant.due();
            of_tenant.queue.push(Reverse((deadline, id)));
            let after = of_tenant.due();
            self.move_due(tenant, before, after);
        }
    }

    fn is_expired(&self, tenant: TenantId, id: LeaseId, now: Moment) -> bool {
        let lease = self.tenants.get(&tenant).and_then(|of| of.leases.get(&id));
        self.leading && !self.suspended.contains(&tenant) && lease.is_some_and(|lease| lease.deadline <= now)
    }

    fn revoked(&mut self, tenant: TenantId, id: LeaseId) {
        let Some(of_tenant) = self.tenants.get_mut(&tenant) else { return };
        of_tenant.leases.remove(&id);
        // Revoked leases leave their entry in the queue until it is due: with long TTLs that could be long. A queue that is
        // mostly such entries is made anew, which costs each revoke a constant on average.
        let before = of_tenant.due();
        if of_tenant.queue.len() > 2 * of_tenant.leases.len() + 16 || of_tenant.leases.is_empty() {
            let TenantLeases { leases, queue } = of_tenant;
            queue.retain(|Reverse((_, id))| leases.contains_key(id));
            queue.shrink_to_fit();
        }
        let after = of_tenant.due();
        if of_tenant.leases.is_empty() {
            self.tenants.remove(&tenant);
        }
        self.move_due(tenant, before, after);
    }

    fn move_due(&mut self, tenant: TenantId, before: Option<Moment>, after: Option<Moment>) {
        if before != after {
            if let Some(at) = before {
                self.due.remove(&(at, tenant));
            }
            if let Some(at) = after {
                self.due.insert((at, tenant));
            }
        }
    }

    fn promote(&mut self, now: Moment) {
        self.leading = true;
        self.due.clear();
        for (tenant, of_tenant) in &mut self.tenants {
            if !self.suspended.contains(tenant) {
                of_tenant.start_over(now, self.extension);
                self.due.extend(of_tenant.due().map(|at| (at, *tenant)));
            }
        }
    }

    fn suspend(&mut self, tenant: TenantId) {
        self.suspended.insert(tenant);
        if let Some(of_tenant) = self.tenants.get_mut(&tenant) {
            let before = of_tenant.due();
            of_tenant.queue = BinaryHeap::new();
            self.move_due(tenant, before, None);
        }
    }

    fn resume(&mut self, tenant: TenantId, now: Moment) {
        if self.suspended.remove(&tenant)
            && self.leading
            && let Some(of_tenant) = self.tenants.get_mut(&tenant)
        {
            of_tenant.start_over(now, self.extension);
            let after = of_tenant.due();
            self.move_due(tenant, None, after);
        }
    }

    fn forget(&mut self, tenant: TenantId) {
        self.suspended.remove(&tenant);
        if let Some(of_tenant) = self.tenants.remove(&tenant) {
            self.move_due(tenant, of_tenant.due(), None);
        }
    }

    fn demote(&mut self) {
        self.leading = false;
        self.due.clear();
        for of_tenant in self.tenants.values_mut() {
            of_tenant.queue = BinaryHeap::new();
            for lease in of_tenant.leases.values_mut() {
                lease.gone = None;
            }
        }
    }

    fn take_expired(&mut self, now: Moment) -> Vec<(TenantId, LeaseId)> {
        let mut expired = Vec::new();
        let mut served = Vec::new();
        while expired.len() < POLL_EXPIRED_MAX {
            let Some((at, tenant)) = self.due.first().copied().filter(|(at, _)| *at <= now) else { break };
            self.due.remove(&(at, tenant));
            let Some(of_tenant) = self.tenants.get_mut(&tenant) else { continue };
            let room = (POLL_EXPIRED_MAX - expired.len()).min(TENANT_EXPIRED_MAX);
            expired.extend(of_tenant.take_expired(now, room).into_iter().map(|id| (tenant, id)));
            // Not before the end: what is left of this tenant waits for the next poll.
            served.extend(of_tenant.due().map(|at| (at, tenant)));
        }
        self.due.extend(served);
        expired
    }

    fn renew(&mut self, tenant: TenantId, id: LeaseId, now: Moment) -> Attempt {
        if !self.leading {
            return Attempt::Done(Renewed::NotLeader);
        }
        let Some(lease) = self.tenants.get_mut(&tenant).and_then(|of_tenant| of_tenant.leases.get_mut(&id)) else {
            return Attempt::Done(Renewed::Missing);
        };
        if lease.deadline <= now {
            return Attempt::Expired(lease.gone.get_or_insert_with(|| watch::Sender::new(())).subscribe());
        }
        lease.deadline = now.saturating_add(seconds(lease.ttl_seconds));
        Attempt::Done(Renewed::For { ttl_seconds: lease.ttl_seconds })
    }

    fn remaining(&self, tenant: TenantId, id: LeaseId, now: Moment) -> Option<Remaining> {
        let lease = self.tenants.get(&tenant)?.leases.get(&id)?;
        let left = lease.deadline.saturating_sub(now).as_secs();
        let seconds = i64::try_from(left).unwrap_or(i64::MAX);
        Some(Remaining { seconds, granted_seconds: lease.ttl_seconds })
    }

    fn deadlines(&self, tenant: TenantId) -> Vec<(Moment, LeaseId)> {
        let leases = self.tenants.get(&tenant).map(|of_tenant| &of_tenant.leases);
        leases.into_iter().flatten().map(|(id, lease)| (lease.deadline, *id)).collect()
    }
}

impl TenantLeases {
    /// At most `max` leases whose deadline has passed. They stay in the queue, to be tried again.
    fn take_expired(&mut self, now: Moment, max: usize) -> Vec<LeaseId> {
        let mut expired = Vec::new();
        while expired.len() < max {
            let Some(Reverse((_, id))) = self.queue.peek().copied().filter(|Reverse((at, _))| *at <= now) else {
                break;
            };
            self.queue.pop();
            match self.leases.get(&id) {
                None => {}
                Some(lease) if lease.deadline > now => self.queue.push(Reverse((lease.deadline, id))),
                Some(_) => {
                    self.queue.push(Reverse((now.saturating_add(RETRY_AFTER), id)));
                    expired.push(id);
                }
            }
        }
        expired
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: TenantId = TenantId(1);
    const B: TenantId = TenantId(2);

    fn at(milliseconds: u64) -> Moment {
        Duration::from_millis(milliseconds)
    }

    fn leading() -> LeaseTable {
        let mut table = LeaseTable::new(at(1_000));
        table.promote(at(0));
        table
    }

    fn renewed(attempt: Attempt) -> Renewed {
        match attempt {
            Attempt::Done(renewed) => renewed,
            Attempt::Expired(_) => panic!("the lease is expired"),
        }
    }

    #[test]
    fn a_lease_ends_at_its_deadline_and_not_before() {
        let mut table = leading();
        table.granted(A, LeaseId(7), 2, at(100));
        assert_eq!(table.take_expired(at(2_099)), []);
        assert_eq!(table.take_expired(at(2_100)), [(A, LeaseId(7))]);
        table.revoked(A, LeaseId(7));
        assert_eq!(table.remaining(A, LeaseId(7), at(2_100)), None);
        assert!(table.tenants.is_empty() && table.due.is_empty(), "a tenant without leases costs nothing");
    }

    #[test]
    fn renewal_moves_the_deadline() {
        let mut table = leading();
        table.granted(A, LeaseId(7), 2, at(0));
        assert_eq!(renewed(table.renew(A, LeaseId(7), at(1_500))), Renewed::For { ttl_seconds: 2 });
        assert_eq!(table.take_expired(at(2_000)), [], "looked at, and queued again");
        assert_eq!(table.take_expired(at(3_499)), []);
        assert_eq!(table.take_expired(at(3_500)), [(A, LeaseId(7))]);
        assert_eq!(renewed(table.renew(A, LeaseId(8), at(0))), Renewed::Missing);
        assert_eq!(renewed(table.renew(B, LeaseId(7), at(0))), Renewed::Missing, "another tenant's");
    }

    #[test]
    fn leases_of_a_suspended_tenant_do_not_end_and_start_over() {
        let mut table = leading();
        table.granted(A, LeaseId(7), 2, at(0));
        table.granted(B, LeaseId(7), 2, at(0));
        table.suspend(A);
        assert_eq!(table.take_expired(at(10_000)), [(B, LeaseId(7))]);
        table.demote();
        table.promote(at(20_000));
        table.granted(A, LeaseId(8), 1, at(20_000));
        assert_eq!(table.take_expired(at(40_000)), [(B, LeaseId(7))], "another leader does not end them either");
        table.resume(A, at(40_000));
        assert_eq!(table.take_expired(at(41_999)), []);
        assert_eq!(table.take_expired(at(42_000)), [(A, LeaseId(8))]);
        assert_eq!(table.remaining(A, LeaseId(7), at(42_000)), Some(Remaining { seconds: 1, granted_seconds: 2 }));
        table.forget(A);
        table.forget(B);
        assert!(table.tenants.is_empty() && table.due.is_empty() && table.suspended.is_empty());
    }

    #[test]
    fn an_expired_lease_cannot_be_renewed() {
        let mut table = leading();
        table.granted(A, LeaseId(7), 2, at(0));
        let Attempt::Expired(gone) = table.renew(A, LeaseId(7), at(2_000)) else { panic!("not renewed") };
        assert_eq!(table.remaining(A, LeaseId(7), at(2_000)), Some(Remaining { seconds: 0, granted_seconds: 2 }));
        assert!(gone.has_changed().is_ok(), "still waiting");
        table.revoked(A, LeaseId(7));
        assert!(gone.has_changed().is_err(), "woken");
    }

    #[test]
    fn a_lost_revoke_is_handed_out_again() {
        let mut table = leading();
        table.granted(A, LeaseId(7), 2, at(0));
        assert_eq!(table.take_expired(at(2_000)), [(A, LeaseId(7))]);
        assert_eq!(table.take_expired(at(4_999)), []);
        assert_eq!(table.take_expired(at(5_000)), [(A, LeaseId(7))]);
    }

    #[test]
    fn a_new_leader_gives_full_ttls_and_an_election_timeout() {
        let mut table = LeaseTable::new(at(1_000));
        table.granted(A, LeaseId(7), 2, at(0));
        assert_eq!(table.take_expired(at(60_000)), [], "nothing ends while another member leads");
        assert_eq!(renewed(table.renew(A, LeaseId(7), at(60_000))), Renewed::NotLeader);
        table.promote(at(60_000));
        assert_eq!(table.remaining(A, LeaseId(7), at(60_000)), Some(Remaining { seconds: 3, granted_seconds: 2 }));
        assert_eq!(table.take_expired(at(62_999)), []);
        let Attempt::Expired(gone) = table.renew(A, LeaseId(7), at(63_000)) else { panic!("expired") };
        table.demote();
        assert!(gone.has_changed().is_err(), "whoever waits has to ask the new leader");
        assert_eq!(table.take_expired(at(99_000)), []);
    }

    #[test]
    fn a_tenant_with_many_expired_leases_does_not_hold_up_another() {
        let mut table = leading();
        for id in 1..=20_000 {
            table.granted(A, LeaseId(id), 2, at(0));
        }
        table.granted(B, LeaseId(1), 2, at(10));
        let taken = table.take_expired(at(2_500));
        assert_eq!(taken.iter().filter(|(tenant, _)| *tenant == A).count(), TENANT_EXPIRED_MAX);
        assert!(taken.contains(&(B, LeaseId(1))));
        let taken = table.take_expired(at(3_000));
        assert_eq!(taken.len(), TENANT_EXPIRED_MAX);
    }

    #[test]
    fn many_tenants_are_served_within_the_bound_of_a_poll() {
        let mut table = leading();
        for tenant in 0..100 {
            for id in 0..200 {
                table.granted(TenantId(tenant), LeaseId(id + 1), 2, at(u64::from(tenant)));
            }
        }
        let mut all = table.take_expired(at(5_000));
        assert_eq!(all.len(), POLL_EXPIRED_MAX);
        all.extend(table.take_expired(at(5_500)));
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), 20_000);
    }

    #[test]
    fn revoked_leases_leave_nothing_behind() {
        let mut table = leading();
        for id in 1..=10_000 {
            table.granted(A, LeaseId(id), 1_000_000, at(0));
        }
        for id in 2..=10_000 {
            table.revoked(A, LeaseId(id));
        }
        assert!(table.tenants[&A].queue.len() < 64);
        assert_eq!(table.due.len(), 1);
    }

    #[test]
    fn the_list_is_in_order_of_what_is_left() {
        let lessor = Lessor::new(Duration::ZERO);
        lessor.promote(1);
        for (id, ttl_seconds) in [(1, 50), (2, 9_000_000_000), (3, 3), (-7, 10)] {
            lessor.granted(A, LeaseId(id), ttl_seconds);
        }
        assert_eq!(lessor.list(A), [3, -7, 1, 2].map(LeaseId));
        assert_eq!(lessor.list(B), []);
    }

    #[tokio::test]
    async fn waiting_for_a_revoke_ends_with_it() {
        let lessor = std::sync::Arc::new(Lessor::new(Duration::ZERO));
        lessor.promote(1);
        // A TTL of 0 has expired at once; the edge never grants one.
        lessor.granted(A, LeaseId(7), 0);
        let waiting = tokio::spawn({
            let lessor = std::sync::Arc::clone(&lessor);
            async move { lessor.renew(A, LeaseId(7)).await }
        });
        while lessor.table.lock().tenants[&A].leases[&LeaseId(7)].gone.is_none() {
            tokio::task::yield_now().await;
        }
        lessor.revoked(A, LeaseId(7));
        assert_eq!(waiting.await.unwrap(), Renewed::Missing);
    }
}
