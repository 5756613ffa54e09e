//! The only writer of replicated state.
//!
//! `apply` takes committed raft entries in order and turns them into one engine batch that also holds the new applied
//! index: after a crash the state is that of some index, and the log goes on from there. What a command does depends on
//! the command and the state alone: no clock, no randomness, no order of a hash map. A refusal is a result like any
//! other; a fault ends the member.
//!
//! Life of a batch: decode each envelope, run it on an [`Overlay`] of the engine, write the rows of the tenants it touched
//! and the cell's row, hand the batch to the engine; only then publish counters, events and lease changes, and return
//! the outcomes. So nobody sees a revision that the engine does not have.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;

use crate::command::{Command, Envelope, MembersCommand, TenantCommand};
use crate::engine::{Cursor, Engine, Family, Reader};
use crate::error::{Fault, Refusal};
use crate::key;
use crate::key::meta::{self, CellKey, CellRow, TenantRow};
use crate::limits::{ALARMS_MAX, TENANTS_MAX};
use crate::members;
use crate::mvcc::overlay::Overlay;
use crate::mvcc::write::{Step, Writer, accept};
use crate::mvcc::{compact, txn};
use crate::profile::{Limit, Profile, TenantLimits, TenantPhase};
use crate::reply::{Outcome, Reply};
use crate::rules::Rules;
use crate::store::{Shared, Store, Tenant, db_size_bytes};
use crate::types::{Alarm, AlarmKind, LeaseId, Membership, TenantId};
use crate::watch::Changes;

impl Default for CellRow {
    fn default() -> Self {
        CellRow { applied_index: 0, next_tenant: 1, quota_bytes: QUOTA_BYTES_DEFAULT, rules: Rules::FIRST }
    }
}

/// Bytes a tenant may hold unless [`Command::Configure`] says otherwise: etcd's default.
pub const QUOTA_BYTES_DEFAULT: i64 = 2 << 30;

/// Bytes that a round of entries may change before it ends with an entry: a few bytes of the log can copy large values.
pub const ROUND_BYTES: usize = 64 << 20;

/// Told of replicated facts on the apply thread, after they are in the engine and before the replies go out. Must not
/// block: every tenant waits.
pub trait Observer: Send + Sync {
    fn lease_granted(&self, tenant: TenantId, id: LeaseId, ttl_seconds: i64);
    fn lease_revoked(&self, tenant: TenantId, id: LeaseId);
    /// A compaction left rows to reclaim; also called at open for one that did not finish.
    fn reclaim_pending(&self, tenant: TenantId);
    /// Nothing is left to reclaim of this tenant until it is compacted again.
    fn reclaimed(&self, tenant: TenantId);
    /// Events wait for [`Store::deliver`], and before none did.
    fn delivery_pending(&self, tenant: TenantId);
    /// An operator made, changed or deleted this tenant.
    fn tenant_changed(&self, tenant: TenantId, change: TenantChange);
    /// The members of the cell are no longer those of before.
    fn members_changed(&self, membership: &Membership);
    /// The whole state was replaced by a later one: leases and members are what the store says now.
    fn state_replaced(&self);
}

/// What happened to a tenant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TenantChange {
    Created,
    /// Its profile is another one, which the tenant's reader shows.
    Profile,
    /// Its data is gone; its space has to be given back, then [`TenantCommand::Forget`]. Also told at open.
    Deleted,
    /// Nothing is left of it.
    Forgotten,
}

/// An observer for those who do not care.
pub struct NoObserver;

impl Observer for NoObserver {
    fn lease_granted(&self, _: TenantId, _: LeaseId, _: i64) {}
    fn lease_revoked(&self, _: TenantId, _: LeaseId) {}
    fn reclaim_pending(&self, _: TenantId) {}
    fn reclaimed(&self, _: TenantId) {}
    fn delivery_pending(&self, _: TenantId) {}
    fn tenant_changed(&self, _: TenantId, _: TenantChange) {}
    fn members_changed(&self, _: &Membership) {}
    fn state_replaced(&self) {}
}

/// See the module's essay.
pub struct StateMachine<E: Engine> {
    store: Store<E>,
    observer: Arc<dyn Observer>,
    registry: Registry,
}

/// What is kept in memory of the family meta, as the engine has it.
#[derive(Default)]
struct Registry {
    cell: CellRow,
    tenants: BTreeMap<TenantId, Registered>,
    names: BTreeMap<String, TenantId>,
    /// Deleted, and their space not given back: with the names they had.
    deleted: BTreeMap<TenantId, String>,
    membership: Membership,
    defaults: Arc<TenantLimits>,
}

/// A tenant as the engine has it.
struct Registered {
    row: TenantRow,
    profile: Arc<Profile>,
}

impl Registered {
    fn new(row: TenantRow) -> Self {
        Registered { row, profile: Arc::default() }
    }
}

impl Registry {
    /// An empty engine is an empty cell.
    fn load<R: Reader>(view: &R) -> Result<Self, Fault> {
        let mut registry = Registry::default();
        if let Some(stored) = view.get(Family::Meta, &meta::cell_key())? {
            registry.cell = CellRow::decode(stored)?;
        }
        if let Some(stored) = view.get(Family::Meta, &meta::defaults_key())? {
            registry.defaults = Arc::new(meta::decode_defaults(stored)?);
        }
        let bounds = meta::all_bounds();
        let mut cursor = view.cursor(Family::Meta, &bounds.lower, &bounds.upper)?;
        while let Some((key, value)) = cursor.entry() {
            if let Some(id) = meta::decode_tenant_key(key) {
                let row = TenantRow::decode(Bytes::copy_from_slice(value))?;
                registry.names.insert(row.name.clone(), id);
                registry.tenants.insert(id, Registered::new(row));
            }
            // Behind the tenant's own row.
            if let Some(id) = meta::decode_profile_key(key) {
                let profile = Profile::decode(Bytes::copy_from_slice(value))?;
                let tenant = registry.tenants.get_mut(&id);
                let damaged = || Fault::Corrupt { what: "profile of no tenant", key: key.to_vec() };
                tenant.ok_or_else(damaged)?.profile = Arc::new(profile);
            }
            match meta::decode_cell_key(key) {
                Some(CellKey::Member(id)) => {
                    registry.membership.members.push(meta::decode_member(id, Bytes::copy_from_slice(value))?);
                }
                Some(CellKey::Removed(id)) => registry.membership.removed.push(id),
                Some(CellKey::Deleted(id)) => {
                    let name = std::str::from_utf8(value);
                    let damaged = |_| Fault::Corrupt { what: "name of a deleted tenant", key: key.to_vec() };
                    registry.deleted.insert(id, name.map_err(damaged)?.to_string());
                }
                None => {}
            }
            cursor.advance()?;
        }
        let next_tenant = registry.cell.next_tenant;
        let mut ids = registry.tenants.keys().chain(registry.deleted.keys());
        assert!(ids.all(|id| id.0 < next_tenant), "tenant ids are never reused");
        let both = registry.deleted.keys().find(|id| registry.tenants.contains_key(*id));
        assert_eq!(both, None, "a deleted tenant has no row");
        Ok(registry)
    }
}

/// Writes copies of the state for members that are too far behind for the log.
pub struct Copier<E>(Arc<E>);

impl<E: Engine> Copier<E> {
    /// Writes the state of some moment to the new directory `dir`, durably, while it goes on changing. Gives the applied
    /// index it is of.
    ///
    /// # Errors
    /// A [`Fault`]: there is no copy, and the engine goes on.
    pub fn write_to(&self, dir: &Path) -> Result<u64, Fault> {
        match self.0.checkpoint(dir, Family::Meta, &meta::cell_key())? {
            Some(stored) => Ok(CellRow::decode(stored)?.applied_index),
            None => Ok(0),
        }
    }
}

/// What becomes visible once the batch is in the engine.
enum Notice {
    Tenant(TenantId, TenantChange),
    /// A deleted tenant's space has been given back.
    Forgotten(TenantId),
    Revision {
        tenant: TenantId,
        revision: i64,
        changes: Changes,
    },
    LeaseGranted {
        tenant: TenantId,
        id: LeaseId,
        ttl_seconds: i64,
    },
    LeaseRevoked {
        tenant: TenantId,
        id: LeaseId,
    },
    ReclaimPending(TenantId),
    Reclaimed(TenantId),
    MembersChanged,
    /// The cell's limits are other ones.
    Defaults,
}

impl Notice {
    /// Whose business it is; `None`: the cell's.
    fn tenant(&self) -> Option<TenantId> {
        match self {
            Notice::Tenant(tenant, _)
            | Notice::Forgotten(tenant)
            | Notice::Revision { tenant, .. }
            | Notice::LeaseGranted { tenant, .. }
            | Notice::LeaseRevoked { tenant, .. }
            | Notice::ReclaimPending(tenant)
            | Notice::Reclaimed(tenant) => Some(*tenant),
            Notice::MembersChanged | Notice::Defaults => None,
        }
    }
}

/// One batch while it is applied.
struct Pending<R> {
    overlay: Overlay<R>,
    /// Tenants whose counters changed: all of them exist.
    dirty: BTreeSet<TenantId>,
    notices: Vec<Notice>,
}

impl<E: Engine> StateMachine<E> {
    /// Loads the registry of tenants from the engine; an empty engine is an empty cell.
    ///
    /// # Errors
    /// [`Fault`] if the engine cannot be read or holds what this version did not write.
    pub fn open(engine: Arc<E>, observer: Arc<dyn Observer>) -> Result<Self, Fault> {
        let registry = Registry::load(&engine.view())?;
        let shared = Arc::new(Shared::new(&registry.cell));
        let machine = StateMachine { store: Store { engine, shared }, observer, registry };
        machine.show_registry();
        Ok(machine)
    }

    /// Makes the whole registry known to readers and to the observer.
    fn show_registry(&self) {
        let shared = &self.store.shared;
        shared.show_cell(&self.registry.cell);
        shared.retain(|id| self.registry.tenants.contains_key(&id));
        for (id, Registered { row, profile }) in &self.registry.tenants {
            match shared.tenant(*id) {
                Some(known) => {
                    known.publish(row);
                    known.hub.skip_to(row.revision);
                    known.show_profile(&profile.shown_with(&self.registry.defaults));
                }
                None => shared.add(Tenant::new(*id, row, profile.shown_with(&self.registry.defaults))),
            }
            if row.reclaimed_revision < row.compact_revision {
                self.observer.reclaim_pending(*id);
            }
        }
        *shared.deleted.write() = self.registry.deleted.clone();
        for id in self.registry.deleted.keys() {
            self.observer.tenant_changed(*id, TenantChange::Deleted);
        }
        *shared.defaults.write() = Arc::clone(&self.registry.defaults);
        self.show_members();
    }

    fn show_members(&self) {
        *self.store.shared.membership.write() = Arc::new(self.registry.membership.clone());
        self.observer.members_changed(&self.registry.membership);
    }

    /// Writes copies of this state, from any thread.
    pub fn copier(&self) -> Copier<E> {
        Copier(Arc::clone(&self.store.engine))
    }

    /// Replaces the whole state by the copy in `dir`, which it takes over and which must be of the applied index `index`. Durable
    /// on return. Readers and watchers go on: with the new state, from wherever they were.
    ///
    /// # Errors
    /// As [`StateMachine::apply`]; of a copy of another index, whose state is not taken.
    ///
    /// # Panics
    /// If the copy is older than the state.
    pub fn install(&mut self, dir: &Path, index: u64) -> Result<(), Fault> {
        assert!(index >= self.registry.cell.applied_index, "a state is replaced by a later one");
        self.store.shared.counts.forget_live();
        // Tenants may be missing in the copy: who reads one of them before that is known gets an answer, no fault.
        let _replacing = self.store.shared.replacing();
        self.store.engine.replace(dir, &|row| {
            let key = meta::cell_key();
            let stored = row(Family::Meta, &key)?.map(CellRow::decode).transpose()?;
            match stored {
                Some(cell) if cell.applied_index == index => Ok(()),
                Some(_) | None => Err(Fault::Corrupt { what: "copy of the state", key }),
            }
        })?;
        self.store.shared.counts.written();
        self.registry = Registry::load(&self.store.engine.view())?;
        self.show_registry();
        self.observer.state_replaced();
        Ok(())
    }

    /// The read side.
    pub fn store(&self) -> Store<E> {
        self.store.clone()
    }

    /// Highest raft index whose commands are in the state.
    pub fn applied_index(&self) -> u64 {
        self.registry.cell.applied_index
    }

    /// Applies entries (raft index, encoded [`Envelope`]s) in order. `outcomes[i][j]` answers command j of entry i. On return the state is
    /// visible to readers, not durable.
    ///
    /// # Errors
    /// As [`StateMachine::apply_round`].
    ///
    /// # Panics
    /// If an index does not follow the applied one.
    pub fn apply(&mut self, entries: Vec<(u64, Vec<Bytes>)>) -> Result<Vec<Vec<Outcome>>, Fault> {
        let mut outcomes: Vec<Vec<Outcome>> = Vec::with_capacity(entries.len());
        while outcomes.len() < entries.len() {
            let mut round: Vec<Vec<Outcome>> = entries[outcomes.len()..].iter().map(|_| Vec::new()).collect();
            let applied =
                self.apply_round(&entries[outcomes.len()..], |entry, _, _, outcome| round[entry].push(outcome))?;
            outcomes.extend(round.drain(..applied));
        }
        Ok(outcomes)
    }

    /// Applies entries (raft index, encoded [`Envelope`]s) in order, all or nothing, until they are all applied or what they changed is
    /// [`ROUND_BYTES`]. Gives how many were, at least one. `tell` gets the outcome of each command as soon as it is known, with the place of
    /// its entry, its own in that, and its tenant: how much memory outcomes take is for the caller to bound. On return the state is visible to
    /// readers, not durable.
    ///
    /// # Errors
    /// After any [`Fault`] the state machine must not be used again: memory and engine may disagree.
    ///
    /// # Panics
    /// If there is no entry, or an index does not follow the applied one.
    pub fn apply_round(
        &mut self,
        entries: &[(u64, Vec<Bytes>)],
        mut tell: impl FnMut(usize, usize, TenantId, Outcome),
    ) -> Result<usize, Fault> {
        assert!(!entries.is_empty(), "a round has an entry");
        let engine = Arc::clone(&self.store.engine);
        let mut pending = Pending { overlay: Overlay::new(engine.view()), dirty: BTreeSet::new(), notices: Vec::new() };
        let mut applied = 0;
        for (place, (index, commands)) in entries.iter().enumerate() {
            if place > 0 && pending.overlay.written_bytes() >= ROUND_BYTES {
                break;
            }
            let index = *index;
            assert!(
                index > self.registry.cell.applied_index,
                "entry {index} after {} is applied once",
                self.registry.cell.applied_index
            );
            self.registry.cell.applied_index = index;
            for (at, command) in commands.iter().enumerate() {
                let envelope = Envelope::decode(command.clone())?;
                let tenant = envelope.tenant;
                tell(place, at, tenant, self.apply_one(&mut pending, envelope)?);
            }
            applied += 1;
        }
        self.write(pending)?;
        Ok(applied)
    }

    fn write<R: Reader>(&mut self, pending: Pending<R>) -> Result<(), Fault> {
        let Pending { overlay, dirty, notices } = pending;
        let mut batch = overlay.into_batch();
        for tenant in &dirty {
            batch.put(Family::Meta, meta::tenant_key(*tenant), self.registry.tenants[tenant].row.encode());
        }
        // Before the engine has it, so that no reader takes a missing row for damage.
        for notice in &notices {
            if let Notice::Tenant(tenant, TenantChange::Deleted) = notice
                && let Some(known) = self.store.shared.tenant(*tenant)
            {
                known.end();
            }
        }
        batch.put(Family::Meta, meta::cell_key(), self.registry.cell.encode());
        let counts = &self.store.shared.counts;
        counts.announce(notices.iter().filter_map(|notice| match notice {
            Notice::Revision { tenant, revision, changes } => Some((*tenant, *revision, &changes.events[..])),
            Notice::Tenant(..)
            | Notice::Forgotten(_)
            | Notice::LeaseGranted { .. }
            | Notice::LeaseRevoked { .. }
            | Notice::ReclaimPending(_)
            | Notice::Reclaimed(_)
            | Notice::MembersChanged
            | Notice::Defaults => None,
        }))?;
        self.store.engine.write(&batch)?;
        counts.written();
        self.publish(&dirty, notices);
        Ok(())
    }

    /// Shows the world what the engine now has: events last, so that whoever is woken by one finds the counters new, and the
    /// lease gone whose end it is.
    fn publish(&self, dirty: &BTreeSet<TenantId>, mut notices: Vec<Notice>) {
        let shared = &self.store.shared;
        shared.show_cell(&self.registry.cell);
        for tenant in dirty {
            match shared.tenant(*tenant) {
                Some(known) => known.publish(&self.registry.tenants[tenant].row),
                None => tracing::debug!(%tenant, "tenant appears with its creation"),
            }
        }
        notices.sort_by_key(|notice| matches!(notice, Notice::Revision { .. }));
        for notice in notices {
            match notice {
                Notice::Tenant(tenant, change) => {
                    self.show_tenant(tenant, change);
                    self.observer.tenant_changed(tenant, change);
                }
                Notice::Forgotten(tenant) => {
                    shared.deleted.write().remove(&tenant);
                    self.observer.tenant_changed(tenant, TenantChange::Forgotten);
                }
                Notice::Revision { tenant, revision, changes } => {
                    if let Some(known) = shared.tenant(tenant)
                        && known.hub.publish(revision, changes)
                    {
                        self.observer.delivery_pending(tenant);
                    }
                }
                Notice::LeaseGranted { tenant, id, ttl_seconds } => {
                    self.observer.lease_granted(tenant, id, ttl_seconds)
                }
                Notice::LeaseRevoked { tenant, id } => self.observer.lease_revoked(tenant, id),
                Notice::ReclaimPending(tenant) => self.observer.reclaim_pending(tenant),
                Notice::Reclaimed(tenant) => self.observer.reclaimed(tenant),
                Notice::MembersChanged => self.show_members(),
                Notice::Defaults => self.show_defaults(),
            }
        }
    }

    /// Every tenant's limits may be other ones.
    fn show_defaults(&self) {
        for (id, Registered { profile, .. }) in &self.registry.tenants {
            if let Some(known) = self.store.shared.tenant(*id) {
                known.show_profile(&profile.shown_with(&self.registry.defaults));
            }
        }
        *self.store.shared.defaults.write() = Arc::clone(&self.registry.defaults);
    }

    fn show_tenant(&self, tenant: TenantId, change: TenantChange) {
        let shared = &self.store.shared;
        match (change, self.registry.tenants.get(&tenant)) {
            (TenantChange::Created, Some(Registered { row, profile })) => {
                // Events of the same batch follow and count up from here.
                let profile = profile.shown_with(&self.registry.defaults);
                shared.add(Tenant::new(tenant, &TenantRow::new(row.name.clone()), profile));
                if let Some(known) = shared.tenant(tenant) {
                    known.publish(row);
                }
            }
            (TenantChange::Profile, Some(Registered { profile, .. })) => {
                if let Some(known) = shared.tenant(tenant) {
                    known.show_profile(&profile.shown_with(&self.registry.defaults));
                }
            }
            (TenantChange::Deleted, None) => {
                shared.remove(tenant);
                if let Some(name) = self.registry.deleted.get(&tenant) {
                    shared.deleted.write().insert(tenant, name.clone());
                }
            }
            (TenantChange::Created | TenantChange::Profile, None)
            | (TenantChange::Deleted, Some(_))
            | (TenantChange::Forgotten, _) => {
                unreachable!("what is said of a tenant before it is deleted is dropped with it")
            }
        }
    }

    fn apply_one<R: Reader>(&mut self, pending: &mut Pending<R>, envelope: Envelope) -> Result<Outcome, Fault> {
        let Envelope { tenant, member_id, command } = envelope;
        match command {
            Command::Tenant(command) => {
                let result = self.change_tenant(pending, tenant, command)?;
                Ok(Outcome { revision: 0, result: result.map(|(id, created)| Reply::Tenant { id, created }) })
            }
            Command::Configure { quota_bytes } => {
                self.registry.cell.quota_bytes = quota_bytes;
                Ok(Outcome { revision: 0, result: Ok(Reply::Configure) })
            }
            Command::SetDefaults { limits } => {
                let mut defaults = TenantLimits::clone(&self.registry.defaults);
                defaults.change(limits);
                if defaults != *self.registry.defaults {
                    pending.overlay.put(Family::Meta, meta::defaults_key(), meta::encode_defaults(&defaults));
                    self.registry.defaults = Arc::new(defaults);
                    pending.notices.push(Notice::Defaults);
                }
                Ok(Outcome { revision: 0, result: Ok(Reply::Configure) })
            }
            Command::RaiseRules { number, members } => {
                let result = self.raise_rules(number, &members)?;
                Ok(Outcome { revision: 0, result: result.map(|()| Reply::Configure) })
            }
            Command::Members(command) => Ok(self.change_members(pending, command)),
            Command::Put(_)
            | Command::DeleteRange(_)
            | Command::Txn(_)
            | Command::Compact { .. }
            | Command::Reclaim { .. }
            | Command::LeaseGrant { .. }
            | Command::LeaseRevoke { .. }
            | Command::Alarm { .. } => {
                let Some(Registered { row, profile }) = self.registry.tenants.get_mut(&tenant) else {
                    return Ok(Outcome { revision: 0, result: Err(Refusal::TenantNotFound) });
                };
                let capture_prev = self.store.shared.tenant(tenant).is_some_and(|known| known.hub.wants_prev_kv());
                pending.dirty.insert(tenant);
                let of = |limit| profile.limits.get(limit).or_else(|| self.registry.defaults.get(limit));
                let limit_bytes = quota_bytes(of(Limit::StoredBytes), self.registry.cell.quota_bytes);
                let (quota, leases_max) = (Quota { limit_bytes, member_id }, of(Limit::Leases));
                let rules = self.registry.cell.rules;
                let mut turn = Turn { pending, tenant, row, profile, quota, rules, leases_max, capture_prev };
                let result = turn.run(command)?;
                Ok(Outcome { revision: turn.row.revision, result })
            }
        }
    }

    /// A member that was added after the others were asked may not know these rules.
    fn raise_rules(&mut self, number: u32, members: &[u64]) -> Step<()> {
        if number <= self.registry.cell.rules.number() {
            return Ok(Ok(()));
        }
        if !self.registry.membership.members.iter().map(|member| member.id).eq(members.iter().copied()) {
            return Ok(Err(Refusal::MembersChanged));
        }
        self.registry.cell.rules = Rules::of_number(number).ok_or(Fault::Rules { number })?;
        Ok(Ok(()))
    }

    fn change_members<R: Reader>(&mut self, pending: &mut Pending<R>, command: MembersCommand) -> Outcome {
        let membership = &mut self.registry.membership;
        let touched = match members::apply(membership, command) {
            Ok(touched) => touched,
            Err(refusal) => return Outcome { revision: 0, result: Err(refusal) },
        };
        for id in touched {
            match membership.member(id) {
                Some(member) => pending.overlay.put(Family::Meta, meta::member_key(id), meta::encode_member(member)),
                None => {
                    pending.overlay.delete(Family::Meta, meta::member_key(id));
                    pending.overlay.put(Family::Meta, meta::removed_key(id), Bytes::new());
                }
            }
        }
        pending.notices.push(Notice::MembersChanged);
        Outcome { revision: 0, result: Ok(Reply::Members) }
    }

    /// Answers the tenant, and whether it is new.
    fn change_tenant<R: Reader>(
        &mut self,
        pending: &mut Pending<R>,
        id: TenantId,
        command: TenantCommand,
    ) -> Step<(TenantId, bool)> {
        Ok(match command {
            TenantCommand::Create { name, limits, labels, created_at_ms } => {
                let labels = labels.into_iter().map(|(name, value)| (name, Some(value))).collect();
                let mut profile = Profile { limits, created_at_ms, ..Profile::default() };
                if let Err(refusal) = profile.change_labels(labels) {
                    return Ok(Err(refusal));
                }
                // Certificates name their tenant: those of the one that had this name before must not open this one.
                if pending.overlay.get(Family::Meta, &meta::former_key(&name))?.is_some() {
                    profile.credentials_valid_from_ms = next_second_ms(created_at_ms);
                }
                self.create_tenant(pending, name, profile)
            }
            TenantCommand::Delete => self.delete_tenant(pending, id),
            TenantCommand::Forget => match self.registry.deleted.remove(&id) {
                None => Err(Refusal::TenantNotFound),
                Some(_) => {
                    pending.overlay.delete(Family::Meta, meta::deleted_key(id));
                    pending.notices.push(Notice::Forgotten(id));
                    Ok((id, false))
                }
            },
            TenantCommand::Update { .. }
            | TenantCommand::SetPhase(_)
            | TenantCommand::RevokeSerial { .. }
            | TenantCommand::RevokeBefore { .. }
            | TenantCommand::SetTrustedCa { .. } => {
                let Some(tenant) = self.registry.tenants.get_mut(&id) else { return Ok(Err(Refusal::TenantNotFound)) };
                let mut profile = Profile::clone(&tenant.profile);
                if let Err(refusal) = change_profile(&mut profile, command) {
                    return Ok(Err(refusal));
                }
                if profile != *tenant.profile {
                    pending.overlay.put(Family::Meta, meta::profile_key(id), profile.encode());
                    tenant.profile = Arc::new(profile);
                    pending.notices.push(Notice::Tenant(id, TenantChange::Profile));
                }
                Ok((id, false))
            }
        })
    }

    fn create_tenant<R: Reader>(
        &mut self,
        pending: &mut Pending<R>,
        name: String,
        profile: Profile,
    ) -> Result<(TenantId, bool), Refusal> {
        if let Some(id) = self.registry.names.get(&name) {
            return Ok((*id, false));
        }
        if self.registry.tenants.len() + self.registry.deleted.len() >= TENANTS_MAX {
            return Err(Refusal::TooManyTenants);
        }
        let id = TenantId(self.registry.cell.next_tenant);
        self.registry.cell.next_tenant += 1;
        self.registry.names.insert(name.clone(), id);
        if profile != Profile::default() {
            pending.overlay.put(Family::Meta, meta::profile_key(id), profile.encode());
        }
        let registered = Registered { row: TenantRow::new(name), profile: Arc::new(profile) };
        assert!(self.registry.tenants.insert(id, registered).is_none(), "tenant ids are never reused");
        pending.dirty.insert(id);
        pending.notices.push(Notice::Tenant(id, TenantChange::Created));
        Ok((id, true))
    }

    fn delete_tenant<R: Reader>(
        &mut self,
        pending: &mut Pending<R>,
        id: TenantId,
    ) -> Result<(TenantId, bool), Refusal> {
        let Some(Registered { row, .. }) = self.registry.tenants.remove(&id) else {
            return Err(Refusal::TenantNotFound);
        };
        assert_eq!(self.registry.names.remove(&row.name), Some(id), "a name is one tenant's");
        // What the same batch did to it before is nobody's business any more.
        pending.dirty.remove(&id);
        pending.notices.retain(|notice| notice.tenant() != Some(id));
        let bounds = key::tenant_bounds(id);
        pending.overlay.clear_range(bounds.lower, bounds.upper);
        pending.overlay.put(Family::Meta, meta::deleted_key(id), Bytes::from(row.name.clone().into_bytes()));
        pending.overlay.put(Family::Meta, meta::former_key(&row.name), Bytes::new());
        self.registry.deleted.insert(id, row.name);
        pending.notices.push(Notice::Tenant(id, TenantChange::Deleted));
        Ok((id, false))
    }

    /// Highest applied index that a crash right now would leave.
    ///
    /// # Errors
    /// As [`StateMachine::apply`].
    pub fn durable_index(&self) -> Result<u64, Fault> {
        match self.store.engine.durable_get(Family::Meta, &meta::cell_key())? {
            Some(stored) => Ok(CellRow::decode(stored)?.applied_index),
            None => Ok(0),
        }
    }

    /// Makes everything applied durable; answers the index up to which it is.
    ///
    /// # Errors
    /// As [`StateMachine::apply`].
    pub fn flush(&mut self) -> Result<u64, Fault> {
        self.store.engine.flush()?;
        Ok(self.registry.cell.applied_index)
    }

    /// Starts what [`StateMachine::flush`] does, without waiting for it.
    ///
    /// # Errors
    /// As [`StateMachine::apply`].
    pub fn begin_flush(&mut self) -> Result<(), Fault> {
        self.store.engine.begin_flush()
    }
}

/// Certificates tell whole seconds: the first one that lies behind this moment.
pub fn next_second_ms(moment_ms: i64) -> i64 {
    moment_ms.div_euclid(1_000).saturating_add(1).saturating_mul(1_000)
}

/// # Errors
/// A [`Refusal`]; the profile must not be used then.
fn change_profile(profile: &mut Profile, command: TenantCommand) -> Result<(), Refusal> {
    match command {
        TenantCommand::Update { limits, labels } => {
            profile.limits.change(limits);
            profile.change_labels(labels)
        }
        TenantCommand::SetPhase(phase) => {
            profile.phase = phase;
            Ok(())
        }
        TenantCommand::RevokeSerial { serial, ends_at_ms, now_ms } => profile.revoke(serial, ends_at_ms, now_ms),
        TenantCommand::RevokeBefore { valid_from_ms } => {
            profile.credentials_valid_from_ms = profile.credentials_valid_from_ms.max(valid_from_ms);
            Ok(())
        }
        TenantCommand::SetTrustedCa { certificates } => {
            profile.trusted_ca = certificates;
            Ok(())
        }
        TenantCommand::Create { .. } | TenantCommand::Delete | TenantCommand::Forget => {
            unreachable!("no change of a profile")
        }
    }
}

/// Bytes a tenant may hold, by what an operator said, or else the cell's configuration; negative = no limit.
pub(crate) fn quota_bytes(limit: Option<u64>, of_cell: i64) -> i64 {
    match limit {
        None => of_cell,
        Some(0) => -1,
        Some(bytes) => i64::try_from(bytes).unwrap_or(i64::MAX),
    }
}

/// The limit a command is held to.
#[derive(Clone, Copy)]
struct Quota {
    /// Negative = none.
    limit_bytes: i64,
    /// Under whose id the alarm is raised.
    member_id: u64,
}

/// One command of one tenant.
struct Turn<'a, R> {
    pending: &'a mut Pending<R>,
    tenant: TenantId,
    row: &'a mut TenantRow,
    profile: &'a Profile,
    quota: Quota,
    rules: Rules,
    /// `None` and 0: the rules' own.
    leases_max: Option<u64>,
    capture_prev: bool,
}

impl<R: Reader> Turn<'_, R> {
    /// Checks in the contract's order: CORRUPT, NOSPACE, then the command's own conditions. Before all that, whether the tenant
    /// may be used at all.
    fn run(&mut self, command: Command) -> Step<Reply> {
        if let Err(refusal) = self.check_profile(&command).and_then(|()| self.check_alarms(&command)) {
            return Ok(Err(refusal));
        }
        match command {
            Command::Put(put) => self.change(|writer| {
                accept!(writer.check_put(&put));
                Ok(writer.put(&put)?.map(|prev_kv| Reply::Put { prev_kv }))
            }),
            Command::DeleteRange(delete) => self.change(|writer| {
                Ok(writer.delete_range(&delete)?.map(|(deleted, prev_kvs)| Reply::DeleteRange { deleted, prev_kvs }))
            }),
            Command::Txn(request) => self.change(|writer| Ok(txn::txn(writer, &request)?.map(Reply::Txn))),
            Command::LeaseGrant { id, ttl_seconds } => {
                accept!(self.change(|writer| writer.grant(id, ttl_seconds)));
                self.pending.notices.push(Notice::LeaseGranted { tenant: self.tenant, id, ttl_seconds });
                Ok(Ok(Reply::LeaseGrant { id, ttl_seconds }))
            }
            Command::LeaseRevoke { id } => {
                accept!(self.change(|writer| writer.revoke(id)));
                self.pending.notices.push(Notice::LeaseRevoked { tenant: self.tenant, id });
                Ok(Ok(Reply::LeaseRevoke))
            }
            Command::Compact { revision } => Ok(self.compact(revision)),
            Command::Reclaim { rows_max } => {
                let more = compact::reclaim(&mut self.pending.overlay, self.tenant, self.row, rows_max)?;
                if !more {
                    self.pending.notices.push(Notice::Reclaimed(self.tenant));
                }
                Ok(Ok(Reply::Reclaim { more }))
            }
            Command::Alarm { activate, member_id, kind } => {
                let alarm = Alarm { member_id, kind };
                if activate && self.row.alarms.len() >= ALARMS_MAX && !self.row.alarms.contains(&alarm) {
                    return Ok(Err(Refusal::TooManyAlarms));
                }
                Ok(Ok(self.alarm(activate, alarm)))
            }
            Command::Tenant(_)
            | Command::Configure { .. }
            | Command::SetDefaults { .. }
            | Command::RaiseRules { .. }
            | Command::Members(_) => unreachable!("commands of the cell"),
        }
    }

    /// Space is given back in every phase.
    fn check_profile(&self, command: &Command) -> Result<(), Refusal> {
        match self.profile.phase {
            TenantPhase::Active => {}
            TenantPhase::ReadOnly if command.quota_cost_bytes() > 0 => return Err(Refusal::ReadOnly),
            TenantPhase::Suspended if !matches!(command, Command::Reclaim { .. }) => return Err(Refusal::Suspended),
            TenantPhase::ReadOnly | TenantPhase::Suspended => {}
        }
        if matches!(command, Command::LeaseGrant { .. }) {
            let leases_max = self.leases_max.filter(|max| *max > 0).unwrap_or_else(|| self.rules.leases_max());
            if self.row.usage.leases >= leases_max {
                return Err(Refusal::TooManyLeases);
            }
        }
        Ok(())
    }

    /// Runs what may change keys, and announces the revision it took.
    fn change<T>(&mut self, run: impl FnOnce(&mut Writer<'_, R>) -> Step<T>) -> Step<T> {
        let mut writer = Writer::new(&mut self.pending.overlay, self.tenant, self.row, self.rules, self.capture_prev);
        let reply = accept!(run(&mut writer));
        let changes = writer.finish();
        if !changes.events.is_empty() {
            let revision = self.row.revision;
            self.pending.notices.push(Notice::Revision { tenant: self.tenant, revision, changes });
        }
        Ok(Ok(reply))
    }

    fn check_alarms(&mut self, command: &Command) -> Result<(), Refusal> {
        let changes_keys = match command {
            Command::Put(_)
            | Command::Txn(_)
            | Command::LeaseGrant { .. }
            | Command::DeleteRange(_)
            | Command::Compact { .. }
            | Command::LeaseRevoke { .. } => true,
            Command::Reclaim { .. }
            | Command::Alarm { .. }
            | Command::Tenant(_)
            | Command::Configure { .. }
            | Command::SetDefaults { .. }
            | Command::RaiseRules { .. }
            | Command::Members(_) => false,
        };
        let cost_bytes = command.quota_cost_bytes();
        let active = |kind| self.row.alarms.iter().any(|alarm| alarm.kind == kind);
        if changes_keys && active(AlarmKind::CORRUPT) {
            return Err(Refusal::Corrupt);
        }
        if cost_bytes == 0 {
            return Ok(());
        }
        if active(AlarmKind::NOSPACE) {
            return Err(Refusal::NoSpace);
        }
        if exceeds_quota(self.quota.limit_bytes, db_size_bytes(&self.row.usage), cost_bytes) {
            self.alarm(true, Alarm { member_id: self.quota.member_id, kind: AlarmKind::NOSPACE });
            return Err(Refusal::NoSpace);
        }
        Ok(())
    }

    fn compact(&mut self, revision: i64) -> Result<Reply, Refusal> {
        if revision <= self.row.compact_revision {
            return Err(Refusal::Compacted { compact_revision: self.row.compact_revision });
        }
        if revision > self.row.revision {
            return Err(Refusal::FutureRevision);
        }
        if self.rules.compactions_look_again() && self.row.reclaim_cursor.main == self.row.compact_revision {
            // Tombstones at the old compact revision were kept, and are not any more: its rows are looked at again.
            self.row.reclaim_cursor.sub = 0;
        }
        self.row.compact_revision = revision;
        self.pending.notices.push(Notice::ReclaimPending(self.tenant));
        Ok(Reply::Compact)
    }

    /// Answers the alarms affected: the one set (also if it was set before), or the one cleared.
    fn alarm(&mut self, activate: bool, alarm: Alarm) -> Reply {
        match (self.row.alarms.binary_search(&alarm), activate) {
            (Err(position), true) => self.row.alarms.insert(position, alarm),
            (Ok(position), false) => {
                self.row.alarms.remove(position);
            }
            (Ok(_), true) => {}
            (Err(_), false) => return Reply::Alarm { alarms: Vec::new() },
        }
        Reply::Alarm { alarms: vec![alarm] }
    }
}

impl Command {
    /// What the command counts against the quota, as etcd estimates it, in bytes; 0: it does not make the store grow.
    pub fn quota_cost_bytes(&self) -> u64 {
        match self {
            Command::Put(put) => txn::put_cost(put.key.len(), put.value.len()),
            Command::Txn(request) => txn::quota_cost(request),
            Command::LeaseGrant { .. } => LEASE_COST_BYTES,
            Command::DeleteRange(_)
            | Command::Compact { .. }
            | Command::LeaseRevoke { .. }
            | Command::Reclaim { .. }
            | Command::Alarm { .. }
            | Command::Tenant(_)
            | Command::Configure { .. }
            | Command::SetDefaults { .. }
            | Command::RaiseRules { .. }
            | Command::Members(_) => 0,
        }
    }
}

/// What a lease counts against the quota: etcd's estimate.
pub const LEASE_COST_BYTES: u64 = 64;

/// Whether a write of this cost trips the quota (contract 4, NOSPACE); a negative limit never does.
pub fn exceeds_quota(limit_bytes: i64, size_bytes: u64, cost_bytes: u64) -> bool {
    u64::try_from(limit_bytes).is_ok_and(|limit| cost_bytes > 0 && size_bytes.saturating_add(cost_bytes) >= limit)
}
