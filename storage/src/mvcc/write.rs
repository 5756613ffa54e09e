//! Puts and deletes of one command: all of one main revision, numbered by sub-revision in the order they run.

use std::ops::ControlFlow;

use bytes::Bytes;

use super::overlay::Overlay;
use super::read;
use crate::engine::{Cursor, Family, Reader};
use crate::error::{Fault, Refusal};
use crate::key::head::Head;
use crate::key::lease::Grant;
use crate::key::meta::TenantRow;
use crate::key::{head, lease, rev, version};
use crate::key_value::{self, KeyValue};
use crate::limits::{EVENT_PREV_BYTES_MAX, TXN_REPLY_BYTES_MAX, VERSION_OVERHEAD_BYTES};
use crate::rules::Rules;
use crate::types::{DeleteRangeRequest, LeaseId, PutRequest, Revision, TenantId};
use crate::watch::{Changes, Event, EventKind};

/// Either half may end a step: a refusal is the command's answer, a fault ends the member.
pub(crate) type Step<T> = Result<Result<T, Refusal>, Fault>;

/// Passes a refusal on, as `?` does a fault.
macro_rules! accept {
    ($step:expr) => {
        match $step? {
            Ok(value) => value,
            Err(refusal) => return Ok(Err(refusal)),
        }
    };
}
pub(crate) use accept;

/// One command's changes to one tenant, while they are made.
pub(crate) struct Writer<'a, R> {
    pub(crate) overlay: &'a mut Overlay<R>,
    pub(crate) tenant: TenantId,
    pub(crate) row: &'a mut TenantRow,
    pub(crate) rules: Rules,
    /// Whether some watcher will want to see what events replaced. Turned off at a bound; then no event tells.
    capture_prev: bool,
    /// What the events tell of it.
    prev_bytes: usize,
    /// What puts have stored so far.
    pub(crate) stored_bytes: usize,
    /// Changes made so far, in sub-revision order.
    pub(crate) events: Vec<Event>,
    next_sub: u32,
}

impl<'a, R: Reader> Writer<'a, R> {
    pub(crate) fn new(
        overlay: &'a mut Overlay<R>,
        tenant: TenantId,
        row: &'a mut TenantRow,
        rules: Rules,
        capture_prev: bool,
    ) -> Self {
        Writer {
            overlay,
            tenant,
            row,
            rules,
            capture_prev,
            prev_bytes: 0,
            stored_bytes: 0,
            events: Vec::new(),
            next_sub: 0,
        }
    }

    /// The revision this command's changes get.
    pub(crate) fn main(&self) -> i64 {
        self.row.revision + 1
    }

    /// The tenant's revision as a header inside this command shows it now.
    pub(crate) fn revision_so_far(&self) -> i64 {
        self.row.revision + i64::from(self.next_sub > 0)
    }

    /// Takes the revision, if anything changed. Ends the command.
    pub(crate) fn finish(self) -> Changes {
        assert_eq!(self.events.len(), self.next_sub as usize, "every change is an event");
        if self.next_sub > 0 {
            self.row.revision += 1;
        }
        Changes { events: self.events, with_prev: self.capture_prev }
    }

    /// Drops the record of changes that the overlay has taken back.
    pub(crate) fn forget(&mut self) {
        self.events.clear();
        self.next_sub = 0;
    }

    fn take_sub(&mut self) -> Revision {
        let at = Revision { main: self.main(), sub: self.next_sub };
        self.next_sub += 1;
        at
    }

    /// Whether the lease may be named by a put.
    pub(crate) fn lease_exists(&self, id: LeaseId) -> Result<bool, Fault> {
        Ok(self.overlay.get(Family::Lease, &lease::grant_key(self.tenant, id))?.is_some())
    }

    /// What a put needs to be there, in the contract's order: its lease, then its key.
    pub(crate) fn check_put(&self, put: &PutRequest) -> Step<()> {
        if put.lease != LeaseId::NONE && !self.lease_exists(put.lease)? {
            return Ok(Err(Refusal::LeaseNotFound(put.lease)));
        }
        if (put.ignore_value || put.ignore_lease) && self.live(&put.key)?.is_none() {
            return Ok(Err(Refusal::KeyNotFound));
        }
        Ok(Ok(()))
    }

    fn live(&self, key: &[u8]) -> Result<Option<Head>, Fault> {
        Ok(read::newest(self.overlay, self.tenant, key)?.filter(|newest| !newest.tombstone))
    }

    /// Writes one version. The lease was checked before; the key is checked here, because an earlier operation of the
    /// same txn may have deleted it.
    pub(crate) fn put(&mut self, put: &PutRequest) -> Step<Option<Bytes>> {
        let newest = read::newest(self.overlay, self.tenant, &put.key)?;
        let live = newest.filter(|newest| !newest.tombstone);
        if live.is_none() && (put.ignore_value || put.ignore_lease) {
            return Ok(Err(Refusal::KeyNotFound));
        }
        let wants_old = put.prev_kv || put.ignore_value || self.capture_prev;
        let old = match live {
            Some(live) if put.ignore_value && self.rules.kept_values_are_work() => {
                Some(read::stored(self.overlay, self.tenant, &put.key, live.at)?)
            }
            Some(live) if wants_old => Some(self.replaced(&put.key, live.at)?),
            Some(_) | None => None,
        };
        let value = match &old {
            Some(old) if put.ignore_value => old.slice_ref(KeyValue::decode(old)?.value),
            Some(_) | None => put.value.clone(),
        };
        let (had, lease) = (live.map_or(LeaseId::NONE, |live| live.lease), put.lease);
        let lease = if put.ignore_lease { had } else { lease };
        accept!(self.move_lease(&put.key, had, lease));

        let at = self.take_sub();
        let kv = KeyValue {
            key: &put.key,
            create_revision: live.map_or(at.main, |live| live.create_revision),
            mod_revision: at.main,
            version: live.map_or(1, |live| live.version + 1),
            value: &value,
            lease: lease.0,
        };
        let stored = kv.encode();
        self.stored_bytes += stored.len();
        let head = Head {
            at,
            tombstone: false,
            create_revision: kv.create_revision,
            version: kv.version,
            lease,
            size_bytes: (put.key.len() + stored.len()) as u64 + VERSION_OVERHEAD_BYTES,
        };
        self.write_version(&put.key, newest, head, stored.clone());

        let prev_kv = self.event_prev(&put.key, live, old.as_ref(), at)?;
        // Not the request's bytes: those are of a whole log entry, which an event that waits must not keep.
        let key = stored.slice_ref(KeyValue::decode(&stored)?.key);
        self.tell(Event { kind: EventKind::Put, key, kv: stored, prev_kv });
        Ok(Ok(old.filter(|_| put.prev_kv)))
    }

    /// The version that a change replaces. Not counted as work: whether it is read depends on this member's watchers too.
    fn replaced(&self, key: &[u8], at: Revision) -> Result<Bytes, Fault> {
        self.overlay.uncounted(|overlay| read::stored(overlay, self.tenant, key, at))
    }

    fn tell(&mut self, event: Event) {
        self.prev_bytes += event.prev_kv.as_ref().map_or(0, Bytes::len);
        self.events.push(event);
        if self.capture_prev && self.prev_bytes > EVENT_PREV_BYTES_MAX {
            self.capture_prev = false;
            self.events.iter_mut().for_each(|event| event.prev_kv = None);
        }
    }

    /// Deletes every key of the range; answers how many, and what they were if asked. Refused, nothing has changed.
    pub(crate) fn delete_range(&mut self, delete: &DeleteRangeRequest) -> Step<(u64, Vec<Bytes>)> {
        let mut doomed = Vec::new();
        let left = self.rules.deleted_keys_max().saturating_sub(self.events.len());
        let mut is_too_large = false;
        read::live_heads(self.overlay, self.tenant, &delete.range, &mut |key, newest| {
            is_too_large = doomed.len() == left;
            if is_too_large {
                return Ok(ControlFlow::Break(()));
            }
            doomed.push((Bytes::copy_from_slice(key), newest));
            Ok(ControlFlow::Continue(()))
        })?;
        if is_too_large {
            return Ok(Err(Refusal::TxnTooLarge));
        }
        let stored_bytes = doomed.iter().map(|(_, newest)| newest.size_bytes).sum::<u64>();
        if delete.prev_kv && stored_bytes > TXN_REPLY_BYTES_MAX as u64 {
            return Ok(Err(Refusal::TxnTooLarge));
        }
        let mut prev_kvs = Vec::new();
        for (key, newest) in &doomed {
            let old = self.delete(key, *newest, delete.prev_kv)?;
            prev_kvs.extend(old.filter(|_| delete.prev_kv));
        }
        Ok(Ok((doomed.len() as u64, prev_kvs)))
    }

    /// Deletes one key that exists. Answers its last version if `want_old` or a watcher wants it.
    fn delete(&mut self, key: &Bytes, live: Head, want_old: bool) -> Result<Option<Bytes>, Fault> {
        assert!(!live.tombstone, "only what exists is deleted");
        let old = match want_old || self.capture_prev {
            true => Some(self.replaced(key, live.at)?),
            false => None,
        };
        let at = self.take_sub();
        let head = Head {
            at,
            tombstone: true,
            create_revision: 0,
            version: 0,
            lease: LeaseId::NONE,
            size_bytes: key.len() as u64 + VERSION_OVERHEAD_BYTES,
        };
        self.write_version(key, Some(live), head, Bytes::new());
        if let Err(refusal) = self.move_lease(key, live.lease, LeaseId::NONE)? {
            unreachable!("a key may always be detached: {refusal}");
        }
        let prev_kv = self.event_prev(key, Some(live), old.as_ref(), at)?;
        let kv = key_value::encode_tombstone_event(key, at.main);
        self.tell(Event { kind: EventKind::Delete, key: key.clone(), kv, prev_kv });
        Ok(old)
    }

    /// The three rows of a version, and what they count.
    fn write_version(&mut self, key: &Bytes, newest: Option<Head>, head: Head, stored: Bytes) {
        assert!(newest.is_none_or(|newest| newest.at < head.at), "history only grows");
        let row = rev::Row {
            tombstone: head.tombstone,
            previous: newest.map(|newest| newest.at),
            size_bytes: head.size_bytes,
            user_key: key.clone(),
        };
        self.overlay.put(Family::Kv, version::encode(self.tenant, key, head.at, head.tombstone), stored);
        self.overlay.put(Family::Head, head::encode_key(self.tenant, key), head.encode());
        self.overlay.put(Family::Rev, rev::encode_key(self.tenant, head.at), row.encode());

        let usage = &mut self.row.usage;
        usage.versions += 1;
        usage.total_bytes += head.size_bytes;
        if let Some(live) = newest.filter(|newest| !newest.tombstone) {
            usage.live_keys -= 1;
            usage.live_bytes -= live.size_bytes;
        }
        if !head.tombstone {
            usage.live_keys += 1;
            usage.live_bytes += head.size_bytes;
        }
    }

    /// Refused, nothing has changed: the lease has as many keys as it may.
    fn move_lease(&mut self, key: &[u8], from: LeaseId, to: LeaseId) -> Step<()> {
        if from == to {
            return Ok(Ok(()));
        }
        if to != LeaseId::NONE {
            accept!(self.count_key(to, 1));
            self.overlay.put(Family::Lease, lease::attached_key(self.tenant, to, key), Bytes::new());
        }
        if from != LeaseId::NONE {
            accept!(self.count_key(from, -1));
            self.overlay.delete(Family::Lease, lease::attached_key(self.tenant, from, key));
        }
        Ok(Ok(()))
    }

    /// One key more or less of the lease, whose rows say nothing of that yet.
    fn count_key(&mut self, id: LeaseId, change: i64) -> Step<()> {
        let Some(keys_max) = self.rules.lease_keys_max() else { return Ok(Ok(())) };
        let grant_key = lease::grant_key(self.tenant, id);
        // A lease that is being revoked is gone before its keys.
        let Some(stored) = self.overlay.get(Family::Lease, &grant_key)? else { return Ok(Ok(())) };
        let grant = Grant::decode(stored)?;
        let keys = match grant.keys {
            Some(keys) => keys,
            // Granted before anybody counted.
            None => attached_keys(self.overlay, self.tenant, id)?.len() as u64,
        };
        if change > 0 && keys >= keys_max {
            return Ok(Err(Refusal::TooManyLeaseKeys));
        }
        let keys = keys.checked_add_signed(change).expect("no more keys go than were attached");
        self.overlay.put(Family::Lease, grant_key, Grant { keys: Some(keys), ..grant }.encode());
        Ok(Ok(()))
    }

    /// What the event's `prev_kv` shows: the key as it was before this revision (contract 1.2, Events). Inside one
    /// revision that is not always the version just replaced.
    fn event_prev(
        &self,
        key: &[u8],
        live: Option<Head>,
        old: Option<&Bytes>,
        at: Revision,
    ) -> Result<Option<Bytes>, Fault> {
        match live {
            _ if !self.capture_prev => Ok(None),
            Some(live) if live.at.main == at.main => {
                self.overlay.uncounted(|overlay| read::get(overlay, self.tenant, key, at.main - 1))
            }
            Some(_) => Ok(old.cloned()),
            None => Ok(None),
        }
    }

    /// Makes a lease exist.
    pub(crate) fn grant(&mut self, id: LeaseId, ttl_seconds: i64) -> Step<()> {
        if self.lease_exists(id)? {
            return Ok(Err(Refusal::LeaseExists(id)));
        }
        let grant = Grant { ttl_seconds, keys: self.rules.lease_keys_max().map(|_| 0) };
        self.overlay.put(Family::Lease, lease::grant_key(self.tenant, id), grant.encode());
        self.row.usage.leases += 1;
        Ok(Ok(()))
    }

    /// Removes a lease and, in the same revision, its keys in ascending order.
    pub(crate) fn revoke(&mut self, id: LeaseId) -> Step<()> {
        if !self.lease_exists(id)? {
            return Ok(Err(Refusal::LeaseNotFound(id)));
        }
        self.overlay.delete(Family::Lease, lease::grant_key(self.tenant, id));
        self.row.usage.leases -= 1;
        for key in attached_keys(self.overlay, self.tenant, id)? {
            let live = self.live(&key)?.expect("an attached key exists");
            self.delete(&key, live, false)?;
        }
        Ok(Ok(()))
    }
}

/// The keys attached to a lease, in key order.
pub(crate) fn attached_keys<R: Reader>(reader: &R, tenant: TenantId, id: LeaseId) -> Result<Vec<Bytes>, Fault> {
    let bounds = lease::attached_bounds(tenant, id);
    let mut cursor = reader.cursor(Family::Lease, &bounds.lower, &bounds.upper)?;
    let mut keys = Vec::new();
    while let Some((row, _)) = cursor.entry() {
        keys.push(Bytes::copy_from_slice(lease::attached_user_key(row)));
        cursor.advance()?;
    }
    Ok(keys)
}
