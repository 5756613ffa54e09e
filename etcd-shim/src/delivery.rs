//! Events of tenants that have very many watchers, handed out behind apply.
//!
//! Where a revision has few watchers apply serves them itself; else it waits in the tenant's hub (see [`tenure_storage::watch`]), and
//! this task serves it: [`WATCH_DELIVERY_STEP`] watchers of one tenant, then of the next that has something waiting. Each costs
//! the same however large its events are, because all share the bytes; so steps are counted in watchers.

use std::time::Instant;

use tenure_storage::TenantId;
use tenure_storage::limits::WATCH_DELIVERY_STEP;

use crate::priority::GaveWay;
use crate::rotation::Rotation;

/// Tenants with events that wait.
#[derive(Default)]
pub(crate) struct Deliveries(Rotation);

impl Deliveries {
    /// Something waits now, and before nothing did. Never blocks.
    pub(crate) fn add(&self, tenant: TenantId) {
        self.0.add(tenant);
    }

    /// Delivers for ever. `deliver` serves so many watchers of a tenant and answers whether more wait.
    pub(crate) async fn run(&self, deliver: impl Fn(TenantId, usize) -> bool) {
        let mut last = TenantId(0);
        let mut gave_way = GaveWay::NEVER;
        loop {
            match self.0.take_behind(&mut last) {
                Some(tenant) => {
                    if deliver(tenant, WATCH_DELIVERY_STEP) {
                        self.0.add(tenant);
                    }
                    gave_way = gave_way.again(Instant::now());
                    tokio::task::yield_now().await;
                }
                None => self.0.added().await,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    #[tokio::test]
    async fn tenants_take_turns_until_nothing_waits() {
        let deliveries = Deliveries::default();
        for tenant in [1, 2, 1] {
            deliveries.add(TenantId(tenant));
        }
        let steps_left = RefCell::new([2, 1]);
        let order = RefCell::new(Vec::new());
        let (done, finished) = tokio::sync::oneshot::channel();
        let done = RefCell::new(Some(done));
        let deliver = |tenant: TenantId, _: usize| {
            order.borrow_mut().push(tenant.0);
            let left = &mut steps_left.borrow_mut()[tenant.0 as usize - 1];
            *left -= 1;
            if order.borrow().len() == 3 {
                done.borrow_mut().take().unwrap().send(()).unwrap();
            }
            *left > 0
        };
        tokio::select! {
            () = deliveries.run(deliver) => unreachable!("it never ends"),
            ended = finished => ended.unwrap(),
        }
        assert_eq!(*order.borrow(), [1, 2, 1]);
    }
}
