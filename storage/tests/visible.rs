//! In which order the world sees what was applied.
//!
//! Why: a client that has seen a lease's key deleted asked for the lease at once, and was told that it lives.

#![allow(clippy::unwrap_used)]

use std::sync::{Arc, Mutex};

use bytes::Bytes;
use tenure_storage::{
    Command, Envelope, KeyRange, LeaseId, Membership, MemoryEngine, Observer, PutRequest, Reply, StateMachine,
    TenantChange, TenantCommand, TenantId, WatchSpec,
};

/// What was seen, in order.
#[derive(Clone, Default)]
struct Seen(Arc<Mutex<Vec<&'static str>>>);

impl Seen {
    fn note(&self, what: &'static str) {
        self.0.lock().unwrap().push(what);
    }

    fn take(&self) -> Vec<&'static str> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

impl Observer for Seen {
    fn lease_granted(&self, _: TenantId, _: LeaseId, _: i64) {
        self.note("granted");
    }

    fn lease_revoked(&self, _: TenantId, _: LeaseId) {
        self.note("revoked");
    }

    fn reclaim_pending(&self, _: TenantId) {}
    fn reclaimed(&self, _: TenantId) {}

    fn delivery_pending(&self, _: TenantId) {}

    fn tenant_changed(&self, _: TenantId, _: TenantChange) {}

    fn state_replaced(&self) {}

    fn members_changed(&self, _: &Membership) {}
}

#[test]
fn a_lease_is_gone_before_its_events_are_seen() {
    let seen = Seen::default();
    let mut machine = StateMachine::open(Arc::new(MemoryEngine::new()), Arc::new(seen.clone())).unwrap();
    let mut index = 0;
    let mut apply = |machine: &mut StateMachine<_>, tenant, commands: Vec<Command>| {
        index += 1;
        let entry = commands.into_iter().map(|command| Envelope { tenant, member_id: 1, command }.encode()).collect();
        machine.apply(vec![(index, entry)]).unwrap().remove(0)
    };
    let created = apply(&mut machine, TenantId(0), vec![Command::Tenant(TenantCommand::create("t"))]).remove(0);
    let Ok(Reply::Tenant { id: tenant, .. }) = created.result else { panic!("{created:?}") };
    let lease = LeaseId(7);
    let put = Command::Put(PutRequest {
        key: Bytes::from_static(b"k"),
        value: Bytes::from_static(b"v"),
        lease,
        prev_kv: false,
        ignore_value: false,
        ignore_lease: false,
    });
    apply(&mut machine, tenant, vec![Command::LeaseGrant { id: lease, ttl_seconds: 60 }, put]);
    seen.take();
    let watches = {
        let seen = seen.clone();
        machine.store().reader(tenant).unwrap().watch_stream(Arc::new(move || seen.note("event")))
    };
    let range = KeyRange::Single(Bytes::from_static(b"k"));
    watches.create(WatchSpec {
        range,
        start_revision: 0,
        prev_kv: false,
        no_put: false,
        no_delete: false,
        progress_notify: false,
        fragment: false,
        watch_id: 0,
    });
    seen.take();
    apply(&mut machine, tenant, vec![Command::LeaseRevoke { id: lease }]);
    assert_eq!(seen.take(), ["revoked", "event"]);
}
