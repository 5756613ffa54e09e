//! Tenants as an operator sees them: made, changed, deleted; and what this member does when that happens to one.
//!
//! A change is a command like any other, so it is the same on all members and all or nothing. When it is applied, the apply thread
//! tells [`Changes`], which must not block it: a counter moves, on which every connection waits that has to look whether it may
//! go on ([`Cell::tenants_changed`]), and the lessor hears whether the tenant's leases end ([`Lessor::suspend`]). A deleted tenant
//! joins a queue besides: the task of [`clear`] rewrites this member's files without it, and when that is done on the leader it
//! forgets the tenant, of which nothing is left then but that its id is not used again.
//!
//! The queue holds each tenant once. It is not persisted: what is deleted and not forgotten is told again at open.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Weak};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use parking_lot::Mutex;
use tenure_storage::{
    Command, Labels, Limit, Outcome, Refusal, Reply, TenantCommand, TenantId, TenantLimits, TenantPhase, next_second_ms,
};
use tokio::sync::{Notify, watch};

use super::{Cell, CellObserver, CreateTenantError, DEFAULT_TENANT, Inner, Tenant, check_tenant_name};
use crate::cell_error::CellError;

/// Pause before it is looked again whether this member leads, and may forget what it has cleared.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// Milliseconds since 1970, by this machine's clock. For what people read and for certificates; nothing else is timed by it.
pub(crate) fn now_ms() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}

/// What happened to tenants.
#[derive(Default)]
pub(super) struct Changes {
    deleted: Mutex<BTreeSet<TenantId>>,
    added: Notify,
    /// Counts up with every change of a tenant that was there, or that is another one now.
    seen: watch::Sender<u64>,
    /// Counts up with every tenant that is made.
    made: watch::Sender<u64>,
}

impl Changes {
    /// Never blocks.
    pub(super) fn deleted(&self, tenant: TenantId) {
        self.deleted.lock().insert(tenant);
        self.added.notify_one();
    }

    /// Something happened to some tenant. Never blocks.
    pub(super) fn count(&self) {
        self.seen.send_modify(|changes| *changes += 1);
    }

    /// A tenant was made. Never blocks.
    pub(super) fn count_made(&self) {
        self.made.send_modify(|made| *made += 1);
    }

    async fn next_deleted(&self) -> TenantId {
        loop {
            if let Some(next) = self.deleted.lock().pop_first() {
                return next;
            }
            self.added.notified().await;
        }
    }
}

/// What an operator changes of a tenant; what is not mentioned stays.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TenantUpdate {
    /// `None` goes back to the cell's default.
    pub limits: Vec<(Limit, Option<u64>)>,
    /// `None` takes a label away.
    pub labels: Vec<(String, Option<String>)>,
}

impl Cell {
    /// Makes a tenant, or finds the one that is there: the second says whether it was made.
    ///
    /// # Errors
    /// [`CreateTenantError`]; [`Refusal::TooManyTenants`] at the cell's bound, [`Refusal::TooManyLabels`].
    pub async fn create_tenant_with(
        &self,
        name: &str,
        limits: TenantLimits,
        labels: Labels,
    ) -> Result<(Tenant, bool), CreateTenantError> {
        check_tenant_name(name)?;
        loop {
            if let Some(tenant) = self.tenant(name) {
                return Ok((tenant, false));
            }
            let (limits, labels) = (limits.clone(), labels.clone());
            let create = TenantCommand::Create { name: name.to_string(), limits, labels, created_at_ms: now_ms() };
            let (_, created) = self.0.change_tenant(TenantId(0), create).await?;
            // Storage publishes a tenant before it answers; but somebody may have deleted it again.
            if let Some(tenant) = self.tenant(name) {
                return Ok((tenant, created));
            }
        }
    }

    /// Changes limits and labels.
    ///
    /// # Errors
    /// [`Refusal::TenantNotFound`], [`Refusal::TooManyLabels`]; nothing was changed.
    pub async fn update_tenant(&self, tenant: &Tenant, update: TenantUpdate) -> Result<(), CellError> {
        let TenantUpdate { limits, labels } = update;
        self.0.change_tenant(tenant.id(), TenantCommand::Update { limits, labels }).await.map(drop)
    }

    /// Changes the limits of tenants that have none of their own; `None` goes back to what members have of themselves.
    ///
    /// # Errors
    /// If it is not known to have been applied.
    pub async fn update_defaults(&self, limits: Vec<(Limit, Option<u64>)>) -> Result<(), CellError> {
        let Outcome { result, .. } = self.0.propose(TenantId(0), Command::SetDefaults { limits }).await?;
        Ok(result.map(drop)?)
    }

    /// Suspends, resumes, or makes read-only. On return it holds on this member; on the others as soon as they have applied it.
    ///
    /// # Errors
    /// [`Refusal::TenantNotFound`].
    pub async fn set_tenant_phase(&self, tenant: &Tenant, phase: TenantPhase) -> Result<(), CellError> {
        self.0.change_tenant(tenant.id(), TenantCommand::SetPhase(phase)).await.map(drop)
    }

    /// Refuses one certificate of a tenant, until `ends_at_ms`.
    ///
    /// # Errors
    /// [`Refusal::TenantNotFound`], [`Refusal::TooManyRevoked`].
    pub async fn revoke_serial(&self, tenant: &Tenant, serial: Bytes, ends_at_ms: i64) -> Result<(), CellError> {
        let revoke = TenantCommand::RevokeSerial { serial, ends_at_ms, now_ms: now_ms() };
        self.0.change_tenant(tenant.id(), revoke).await.map(drop)
    }

    /// Refuses every certificate of a tenant that was valid before that moment, or before now if it is still to come. Certificates tell
    /// whole seconds: one made within the second of the moment is refused too. With the same moment again it refuses no more.
    ///
    /// # Errors
    /// [`Refusal::TenantNotFound`].
    pub async fn revoke_before(&self, tenant: &Tenant, moment_ms: i64) -> Result<(), CellError> {
        let valid_from_ms = next_second_ms(moment_ms.min(now_ms()));
        self.0.change_tenant(tenant.id(), TenantCommand::RevokeBefore { valid_from_ms }).await.map(drop)
    }

    /// Has the certificates of a tenant's clients signed by these CAs, in DER, or with none by the cell's. Connections that were made
    /// before are closed.
    ///
    /// # Errors
    /// [`Refusal::TenantNotFound`].
    pub async fn set_trusted_ca(&self, tenant: &Tenant, certificates: Vec<Bytes>) -> Result<(), CellError> {
        self.0.change_tenant(tenant.id(), TenantCommand::SetTrustedCa { certificates }).await.map(drop)
    }

    /// Deletes a tenant: its data is gone and its name is free on return. Ask [`may_be_deleted`] first: members expect `default`.
    ///
    /// # Errors
    /// [`Refusal::TenantNotFound`].
    pub async fn delete_tenant(&self, tenant: &Tenant) -> Result<(), CellError> {
        self.0.change_tenant(tenant.id(), TenantCommand::Delete).await.map(drop)
    }

    /// Counts up whenever something happened to a tenant on this member, but that one was made.
    pub fn tenants_changed(&self) -> watch::Receiver<u64> {
        self.0.changes.seen.subscribe()
    }

    /// Counts up whenever a tenant was made. Apart from other changes: tens of thousands of connections wait for those, and none of
    /// them needs to look up because there is one tenant more.
    pub fn tenants_made(&self) -> watch::Receiver<u64> {
        self.0.changes.made.subscribe()
    }

    /// Deleted tenants whose space is still being given back, with the names they had.
    pub fn deleted_tenants(&self) -> BTreeMap<TenantId, String> {
        self.0.store.deleted_tenants()
    }
}

impl Inner {
    async fn change_tenant(&self, tenant: TenantId, command: TenantCommand) -> Result<(TenantId, bool), CellError> {
        let Outcome { result, .. } = self.propose(tenant, Command::Tenant(command)).await?;
        let Reply::Tenant { id, created } = result? else { unreachable!("the reply to a change of a tenant") };
        Ok((id, created))
    }
}

impl CellObserver {
    /// Lets the tenant's leases end, or not.
    pub(super) fn follow_phase(&self, tenant: TenantId) {
        let Some(reader) = self.store.get().and_then(|store| store.reader(tenant)) else { return };
        match reader.profile().phase {
            TenantPhase::Suspended => self.lessor.suspend(tenant),
            TenantPhase::Active | TenantPhase::ReadOnly => self.lessor.resume(tenant),
        }
    }
}

/// Gives back the space of deleted tenants on this member's disk, one after the other, for ever.
pub(super) async fn clear(cell: Weak<Inner>, changes: Arc<Changes>) {
    loop {
        let tenant = changes.next_deleted().await;
        let Some(for_disk) = cell.upgrade() else { return };
        for_disk.tenants.write().retain(|_, parts| !parts.reader.is_deleted());
        let compacting = Arc::clone(&for_disk.compacting).read_owned().await;
        let cleared = tokio::task::spawn_blocking(move || {
            let cleared = for_disk.store.compact_tenant(tenant).map_err(|fault| for_disk.report(fault)).is_ok();
            drop(for_disk);
            drop(compacting);
            cleared
        });
        if !matches!(cleared.await, Ok(true)) {
            return;
        }
        tokio::spawn(forget(cell.clone(), tenant));
    }
}

/// Waits until the tenant is forgotten; if this member leads it sees to that.
async fn forget(cell: Weak<Inner>, tenant: TenantId) {
    loop {
        {
            let Some(cell) = cell.upgrade() else { return };
            if !cell.store.is_deleted(tenant) {
                return;
            }
            if cell.raft.status().is_leader {
                match cell.change_tenant(tenant, TenantCommand::Forget).await {
                    Ok(_) | Err(CellError::Refused(Refusal::TenantNotFound) | CellError::Stopped) => return,
                    Err(error) => tracing::debug!(%tenant, %error, "forget a deleted tenant"),
                }
            }
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
}

/// Whether a tenant may be deleted at all.
pub fn may_be_deleted(name: &str) -> bool {
    name != DEFAULT_TENANT
}
