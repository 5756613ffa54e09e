//! Giving back the space that compactions have freed.
//!
//! A compaction only moves the tenant's compact revision. What lies below it is dropped in small replicated steps, so that
//! all members count the same usage and no step holds up writers. This task proposes those steps on the leader: one
//! tenant after the other, one step each, with a short pause in between, until `apply` says that nothing is left.
//!
//! The set of tenants with something left has at most one entry for each tenant, on every member: any may lead next. It is not persisted: when a member opens its
//! state it is told again of compactions that were not finished.

use std::time::Duration;

use tenure_storage::limits::RECLAIM_ROWS_MAX;
use tenure_storage::{Command, Refusal, Reply, TenantId};

use crate::cell_error::CellError;
use crate::rotation::Rotation;

/// Between two steps: etcd's own pause between batches of as many revisions, which leaves the log to the clients.
const PAUSE: Duration = Duration::from_millis(10);

/// After a step that failed, for instance because nobody leads.
const PAUSE_AFTER_FAILURE: Duration = Duration::from_secs(1);

/// Tenants with rows to give back.
#[derive(Default)]
pub struct Reclaimer(Rotation);

/// How far a step came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Nothing is left of any tenant.
    Idle,
    Done,
    Failed,
}

impl Reclaimer {
    /// A compaction of this tenant left something. Never blocks.
    pub fn add(&self, tenant: TenantId) {
        self.0.add(tenant);
    }

    /// The last step of this tenant was applied, whoever proposed it. Never blocks.
    pub fn remove(&self, tenant: TenantId) {
        self.0.remove(tenant);
    }

    /// Proposes steps for ever. `propose` writes one command of one tenant.
    pub async fn run(&self, propose: impl AsyncFn(TenantId, Command) -> Result<Reply, CellError>) {
        let mut last = TenantId(0);
        loop {
            match self.step(&mut last, &propose).await {
                Step::Idle => self.0.added().await,
                Step::Done => tokio::time::sleep(PAUSE).await,
                Step::Failed => tokio::time::sleep(PAUSE_AFTER_FAILURE).await,
            }
        }
    }

    /// One step of the tenant behind `last`, in a circle.
    pub(crate) async fn step(
        &self,
        last: &mut TenantId,
        propose: &impl AsyncFn(TenantId, Command) -> Result<Reply, CellError>,
    ) -> Step {
        let Some(tenant) = self.0.take_behind(last) else { return Step::Idle };
        // Taken out before the step: a compaction that comes in during it puts the tenant back.
        match propose(tenant, Command::Reclaim { rows_max: RECLAIM_ROWS_MAX }).await {
            Ok(Reply::Reclaim { more: false }) => Step::Done,
            Ok(_) => {
                self.add(tenant);
                Step::Done
            }
            // It was deleted, with everything that was left.
            Err(CellError::Refused(Refusal::TenantNotFound)) => Step::Done,
            Err(error) => {
                tracing::debug!(%tenant, %error, "reclaim compacted rows");
                self.add(tenant);
                Step::Failed
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use parking_lot::Mutex;

    use super::*;

    #[tokio::test]
    async fn tenants_take_turns_until_nothing_is_left() {
        let reclaimer = Reclaimer::default();
        for tenant in [1, 2, 1] {
            reclaimer.add(TenantId(tenant));
        }
        let steps_left = Mutex::new([(TenantId(1), 2), (TenantId(2), 1)]);
        let order = Mutex::new(Vec::new());
        let propose = async |tenant: TenantId, _: Command| {
            order.lock().push(tenant.0);
            let mut steps_left = steps_left.lock();
            let left = steps_left.iter_mut().find(|(of, _)| *of == tenant).map(|(_, left)| left).unwrap();
            *left -= 1;
            Ok(Reply::Reclaim { more: *left > 0 })
        };
        let mut last = TenantId(0);
        while reclaimer.step(&mut last, &propose).await != Step::Idle {}
        assert_eq!(*order.lock(), [1, 2, 1]);
    }

    #[tokio::test]
    async fn a_failed_step_is_tried_again() {
        let reclaimer = Reclaimer::default();
        reclaimer.add(TenantId(1));
        let mut last = TenantId(0);
        let fails = async |_: TenantId, _: Command| Err(CellError::NoLeader);
        assert_eq!(reclaimer.step(&mut last, &fails).await, Step::Failed);
        let works = async |_: TenantId, _: Command| Ok(Reply::Reclaim { more: false });
        assert_eq!(reclaimer.step(&mut last, &works).await, Step::Done);
        // The member that led has done it.
        reclaimer.add(TenantId(1));
        reclaimer.remove(TenantId(1));
        assert_eq!(reclaimer.step(&mut last, &works).await, Step::Idle);
        // One that was deleted meanwhile has nothing left.
        reclaimer.add(TenantId(2));
        let gone = async |_: TenantId, _: Command| Err(CellError::from(Refusal::TenantNotFound));
        assert_eq!(reclaimer.step(&mut last, &gone).await, Step::Done);
        assert_eq!(reclaimer.step(&mut last, &works).await, Step::Idle);
    }
}
