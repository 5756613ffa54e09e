//! Tenants that wait for work in the background, each at most once, served in a circle: however much one of them has, the others
//! wait for one step of it.

use std::collections::BTreeSet;
use std::ops::Bound;

use parking_lot::Mutex;
use tenure_storage::TenantId;
use tokio::sync::Notify;

/// At most one entry for each tenant.
#[derive(Default)]
pub(crate) struct Rotation {
    waiting: Mutex<BTreeSet<TenantId>>,
    added: Notify,
}

impl Rotation {
    /// Never blocks. One that waits already is not added again.
    pub(crate) fn add(&self, tenant: TenantId) {
        if self.waiting.lock().insert(tenant) {
            self.added.notify_one();
        }
    }

    /// Never blocks. There is nothing left to do for this tenant.
    pub(crate) fn remove(&self, tenant: TenantId) {
        self.waiting.lock().remove(&tenant);
    }

    /// Takes the one behind `last`, which becomes the last; `None` if nobody waits. Who is added while it is served waits again.
    pub(crate) fn take_behind(&self, last: &mut TenantId) -> Option<TenantId> {
        let mut waiting = self.waiting.lock();
        let behind = waiting.range((Bound::Excluded(*last), Bound::Unbounded)).next();
        *last = behind.or_else(|| waiting.first()).copied()?;
        waiting.remove(last);
        Some(*last)
    }

    /// Waits until one was added since the last wait ended. For one task alone.
    pub(crate) async fn added(&self) {
        self.added.notified().await;
    }
}
