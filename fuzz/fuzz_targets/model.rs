//! What one tenant should hold and answer, written for a reader: every state of a map since the beginning, whole.
//!
//! Follows etcd's contract on etcd's own messages, so that it shares neither conversion nor checks with what it is
//! compared to. Only the stored form of a key is taken from storage; `key_decoding` looks at that.

use std::cmp::Ordering;
use std::collections::BTreeMap;

use bytes::Bytes;
use tenure_etcd_shim::check::CheckError;
use tenure_etcd_shim::proto::etcdserverpb as pb;
use tenure_etcd_shim::proto::etcdserverpb::compare::TargetUnion;
use tenure_etcd_shim::proto::etcdserverpb::request_op::Request;
use tenure_storage::key_value::KeyValue;
use tenure_storage::{EventKind, LeaseId, RangeReply, Refusal, TxnOpReply, TxnReply};

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Version {
    pub value: Vec<u8>,
    pub created: i64,
    pub modified: i64,
    pub version: i64,
    pub lease: i64,
}

impl Version {
    fn stored(&self, key: &[u8]) -> Bytes {
        let kv = KeyValue {
            key,
            create_revision: self.created,
            mod_revision: self.modified,
            version: self.version,
            value: &self.value,
            lease: self.lease,
        };
        kv.encode()
    }
}

pub type Keys = BTreeMap<Vec<u8>, Version>;

/// What a watcher of everything that asked for `prev_kv` is told: kind, key, what it is now, what it was.
pub type Event = (EventKind, Vec<u8>, Bytes, Option<Bytes>);

pub struct Model {
    /// The keys at every revision; 0 and 1 are both the empty store.
    pub states: Vec<Keys>,
    /// The events of every revision.
    pub events: Vec<Vec<Event>>,
    /// -1 = never.
    pub compacted: i64,
    pub leases: BTreeMap<i64, i64>,
}

/// A txn, or a single write, while it runs.
struct Work {
    keys: Keys,
    events: Vec<Event>,
}

pub fn in_range(key: &[u8], start: &[u8], end: &[u8]) -> bool {
    match end {
        [] => key == start,
        [0] => key >= start,
        _ => start <= key && key < end,
    }
}

impl Model {
    pub fn new() -> Self {
        Model { states: vec![Keys::new(); 2], events: vec![Vec::new(); 2], compacted: -1, leases: BTreeMap::new() }
    }

    pub fn revision(&self) -> i64 {
        self.states.len() as i64 - 1
    }

    pub fn now(&self) -> &Keys {
        self.states.last().expect("there is always a state")
    }

    fn work(&self) -> Work {
        Work { keys: self.now().clone(), events: Vec::new() }
    }

    fn take(&mut self, work: Work) {
        if !work.events.is_empty() {
            self.states.push(work.keys);
            self.events.push(work.events);
        }
    }

    fn compacted_refusal(&self) -> Refusal {
        Refusal::Compacted { compact_revision: self.compacted }
    }

    pub fn put(&mut self, put: &pb::PutRequest) -> Result<Option<Bytes>, Refusal> {
        self.check_put(put)?;
        let mut work = self.work();
        let prev = self.do_put(put, &mut work)?;
        self.take(work);
        Ok(prev)
    }

    pub fn delete(&mut self, delete: &pb::DeleteRangeRequest) -> (u64, Vec<Bytes>) {
        let mut work = self.work();
        let reply = self.do_delete(delete, &mut work);
        self.take(work);
        reply
    }

    pub fn txn(&mut self, txn: &pb::TxnRequest) -> Result<TxnReply, Refusal> {
        self.check_txn(txn)?;
        let mut work = self.work();
        let reply = self.do_txn(txn, &mut work)?;
        self.take(work);
        Ok(reply)
    }

    /// Answers what is found, and the revision read.
    pub fn range(&self, range: &pb::RangeRequest) -> Result<RangeReply, Refusal> {
        let at = if range.revision > 0 { range.revision } else { self.revision() };
        if at > self.revision() {
            return Err(Refusal::FutureRevision);
        }
        if at < self.compacted {
            return Err(self.compacted_refusal());
        }
        Ok(read(&self.states[at as usize], range))
    }

    pub fn compact(&mut self, revision: i64) -> Result<(), Refusal> {
        if revision <= self.compacted {
            return Err(self.compacted_refusal());
        }
        if revision > self.revision() {
            return Err(Refusal::FutureRevision);
        }
        self.compacted = revision;
        Ok(())
    }

    pub fn grant(&mut self, id: i64, ttl: i64) -> Result<(), Refusal> {
        if self.leases.contains_key(&id) {
            return Err(Refusal::LeaseExists(LeaseId(id)));
        }
        self.leases.insert(id, ttl);
        Ok(())
    }

    pub fn revoke(&mut self, id: i64) -> Result<(), Refusal> {
        if self.leases.remove(&id).is_none() {
            return Err(Refusal::LeaseNotFound(LeaseId(id)));
        }
        let mut work = self.work();
        for key in self.attached(id) {
            self.remove(&key, &mut work);
        }
        self.take(work);
        Ok(())
    }

    pub fn attached(&self, lease: i64) -> Vec<Vec<u8>> {
        self.now().iter().filter(|(_, found)| found.lease == lease).map(|(key, _)| key.clone()).collect()
    }

    fn check_put(&self, put: &pb::PutRequest) -> Result<(), Refusal> {
        if put.lease != 0 && !self.leases.contains_key(&put.lease) {
            return Err(Refusal::LeaseNotFound(LeaseId(put.lease)));
        }
        if (put.ignore_value || put.ignore_lease) && !self.now().contains_key(&put.key[..]) {
            return Err(Refusal::KeyNotFound);
        }
        Ok(())
    }

    /// The branch a txn takes: decided on the state before it, however deep it is nested.
    fn branch<'a>(&self, txn: &'a pb::TxnRequest) -> (bool, &'a [pb::RequestOp]) {
        let holds = txn.compare.iter().all(|compare| holds(self.now(), compare));
        (holds, if holds { &txn.success } else { &txn.failure })
    }

    fn check_txn(&self, txn: &pb::TxnRequest) -> Result<(), Refusal> {
        for op in self.branch(txn).1 {
            match op.request.as_ref().expect("checked") {
                Request::RequestRange(range) if range.revision == 0 => {}
                Request::RequestRange(range) if range.revision > self.revision() => {
                    return Err(Refusal::FutureRevision);
                }
                Request::RequestRange(range) if range.revision < self.compacted => {
                    return Err(self.compacted_refusal());
                }
                Request::RequestRange(_) | Request::RequestDeleteRange(_) => {}
                Request::RequestPut(put) => self.check_put(put)?,
                Request::RequestTxn(nested) => self.check_txn(nested)?,
            }
        }
        Ok(())
    }

    fn do_txn(&self, txn: &pb::TxnRequest, work: &mut Work) -> Result<TxnReply, Refusal> {
        let (succeeded, ops) = self.branch(txn);
        let mut responses = Vec::new();
        for op in ops {
            let reply = match op.request.as_ref().expect("checked") {
                Request::RequestRange(range) => {
                    // Not above 0 is now, which the checks have left only 0 and -1 of.
                    let keys = if range.revision > 0 { &self.states[range.revision as usize] } else { &work.keys };
                    TxnOpReply::Range { revision: self.revision_in(work), reply: read(keys, range) }
                }
                Request::RequestPut(put) => {
                    let prev_kv = self.do_put(put, work)?;
                    TxnOpReply::Put { revision: self.revision_in(work), prev_kv }
                }
                Request::RequestDeleteRange(delete) => {
                    let (deleted, prev_kvs) = self.do_delete(delete, work);
                    TxnOpReply::DeleteRange { revision: self.revision_in(work), deleted, prev_kvs }
                }
                Request::RequestTxn(nested) => TxnOpReply::Txn(self.do_txn(nested, work)?),
            };
            responses.push(reply);
        }
        Ok(TxnReply { succeeded, responses })
    }

    fn revision_in(&self, work: &Work) -> i64 {
        self.revision() + i64::from(!work.events.is_empty())
    }

    fn do_put(&self, put: &pb::PutRequest, work: &mut Work) -> Result<Option<Bytes>, Refusal> {
        let key = put.key.to_vec();
        let old = work.keys.get(&key).cloned();
        if old.is_none() && (put.ignore_value || put.ignore_lease) {
            return Err(Refusal::KeyNotFound);
        }
        let modified = self.revision() + 1;
        let before = old.clone().unwrap_or(Version { created: modified, ..Version::default() });
        let new = Version {
            value: if put.ignore_value { before.value } else { put.value.to_vec() },
            created: before.created,
            modified,
            version: before.version + 1,
            lease: if put.ignore_lease { before.lease } else { put.lease },
        };
        // A creation has no past, even if the key had one before this revision.
        let prev = old.as_ref().and_then(|_| self.now().get(&key)).map(|prev| prev.stored(&key));
        work.events.push((EventKind::Put, key.clone(), new.stored(&key), prev));
        work.keys.insert(key.clone(), new);
        Ok(old.filter(|_| put.prev_kv).map(|old| old.stored(&key)))
    }

    fn do_delete(&self, delete: &pb::DeleteRangeRequest, work: &mut Work) -> (u64, Vec<Bytes>) {
        let doomed: Vec<Vec<u8>> =
            work.keys.keys().filter(|key| in_range(key, &delete.key, &delete.range_end)).cloned().collect();
        let removed: Vec<Bytes> = doomed.iter().map(|key| self.remove(key, work)).collect();
        (removed.len() as u64, if delete.prev_kv { removed } else { Vec::new() })
    }

    fn remove(&self, key: &[u8], work: &mut Work) -> Bytes {
        let old = work.keys.remove(key).expect("only what exists is removed");
        let told = KeyValue { key, mod_revision: self.revision() + 1, ..KeyValue::default() }.encode();
        let prev = self.now().get(key).map(|prev| prev.stored(key));
        work.events.push((EventKind::Delete, key.to_vec(), told, prev));
        old.stored(key)
    }
}

fn holds(keys: &Keys, compare: &pb::Compare) -> bool {
    let mut in_range = keys.iter().filter(|(key, _)| in_range(key, &compare.key, &compare.range_end)).peekable();
    if in_range.peek().is_some() {
        return in_range.all(|(_, version)| holds_for(compare, Some(version)));
    }
    holds_for(compare, None)
}

fn holds_for(compare: &pb::Compare, found: Option<&Version>) -> bool {
    let nothing = Version::default();
    let stored = found.unwrap_or(&nothing);
    let union = compare.target_union.as_ref();
    let ordering = match (compare.target, union) {
        (0, Some(TargetUnion::Version(given))) => stored.version.cmp(given),
        (0, _) => stored.version.cmp(&0),
        (1, Some(TargetUnion::CreateRevision(given))) => stored.created.cmp(given),
        (1, _) => stored.created.cmp(&0),
        (2, Some(TargetUnion::ModRevision(given))) => stored.modified.cmp(given),
        (2, _) => stored.modified.cmp(&0),
        (3, _) if found.is_none() => return false,
        (3, Some(TargetUnion::Value(given))) => stored.value[..].cmp(&given[..]),
        (3, _) => stored.value[..].cmp(&[]),
        (4, Some(TargetUnion::Lease(given))) => stored.lease.cmp(given),
        (4, _) => stored.lease.cmp(&0),
        _ => Ordering::Equal,
    };
    match compare.result {
        0 => ordering.is_eq(),
        1 => ordering.is_gt(),
        2 => ordering.is_lt(),
        3 => ordering.is_ne(),
        _ => true,
    }
}

/// A range of one state: collect, filter, sort, cut.
fn read(keys: &Keys, range: &pb::RangeRequest) -> RangeReply {
    let mut found: Vec<(&Vec<u8>, &Version)> =
        keys.iter().filter(|(key, _)| in_range(key, &range.key, &range.range_end)).collect();
    let count = found.len() as u64;
    if range.count_only {
        return RangeReply { kvs: Vec::new(), more: false, count };
    }
    let limit = if range.limit > 0 { range.limit as usize } else { usize::MAX };
    let bounds = [range.min_mod_revision, range.max_mod_revision, range.min_create_revision, range.max_create_revision];
    let filtered = bounds != [0; 4];
    if range.sort_order == 0 && range.sort_target != 0 && !filtered {
        // Without an order asked for, the limit comes before the sorting.
        found.truncate(limit.saturating_add(1));
    }
    let within = |revision: i64, min: i64, max: i64| (min == 0 || min <= revision) && (max == 0 || revision <= max);
    found.retain(|(_, version)| {
        within(version.modified, bounds[0], bounds[1]) && within(version.created, bounds[2], bounds[3])
    });
    found.sort_by(|(a_key, a), (b_key, b)| {
        let ascending = match range.sort_target {
            1 => a.version.cmp(&b.version),
            2 => a.created.cmp(&b.created),
            3 => a.modified.cmp(&b.modified),
            4 => a.value.cmp(&b.value),
            _ => a_key.cmp(b_key),
        };
        if range.sort_order == 2 { ascending.reverse() } else { ascending }
    });
    let more = found.len() > limit;
    found.truncate(limit);
    let shown = |(key, version): (&Vec<u8>, &Version)| match (range.keys_only, range.sort_target) {
        (false, _) => version.stored(key),
        // Values were read, and with them the lease.
        (true, 4) => Version { value: Vec::new(), ..version.clone() }.stored(key),
        (true, _) => Version { value: Vec::new(), lease: 0, ..version.clone() }.stored(key),
    };
    RangeReply { kvs: found.into_iter().map(shown).collect(), more, count }
}

/// What a request is refused for without a look at the store.
pub mod checks {
    use super::*;

    pub fn put(put: &pb::PutRequest) -> Result<(), CheckError> {
        match put {
            _ if put.key.is_empty() => Err(CheckError::EmptyKey),
            _ if put.ignore_value && !put.value.is_empty() => Err(CheckError::ValueProvided),
            _ if put.ignore_lease && put.lease != 0 => Err(CheckError::LeaseProvided),
            _ => Ok(()),
        }
    }

    pub fn range(range: &pb::RangeRequest) -> Result<(), CheckError> {
        match range {
            _ if range.key.is_empty() => Err(CheckError::EmptyKey),
            _ if !(0..=2).contains(&range.sort_order) => Err(CheckError::InvalidSortOption),
            _ if !(0..=4).contains(&range.sort_target) => Err(CheckError::InvalidSortOption),
            _ => Ok(()),
        }
    }

    pub fn txn(txn: &pb::TxnRequest, ops_max: usize) -> Result<(), CheckError> {
        ops(txn, ops_max)?;
        touched(&txn.success)?;
        touched(&txn.failure)?;
        Ok(())
    }

    fn ops(txn: &pb::TxnRequest, budget: usize) -> Result<(), CheckError> {
        let longest = txn.compare.len().max(txn.success.len()).max(txn.failure.len());
        let left = budget.checked_sub(longest).ok_or(CheckError::TooManyOps)?;
        if txn.compare.iter().any(|compare| compare.key.is_empty()) {
            return Err(CheckError::EmptyKey);
        }
        for op in txn.success.iter().chain(&txn.failure) {
            match op.request.as_ref().ok_or(CheckError::KeyNotFound)? {
                Request::RequestRange(request) => range(request)?,
                Request::RequestPut(request) => put(request)?,
                Request::RequestDeleteRange(request) if request.key.is_empty() => return Err(CheckError::EmptyKey),
                Request::RequestDeleteRange(_) => {}
                Request::RequestTxn(request) => ops(request, left)?,
            }
        }
        Ok(())
    }

    #[derive(Default)]
    struct Touched<'a> {
        puts: Vec<&'a [u8]>,
        deletes: Vec<(&'a [u8], &'a [u8])>,
    }

    impl<'a> Touched<'a> {
        /// Ends are taken as they are here: one of a zero byte lies before every start.
        fn deletes(&self, key: &[u8]) -> bool {
            self.deletes
                .iter()
                .any(|(start, end)| if end.is_empty() { key == *start } else { *start <= key && key < *end })
        }

        fn add_put(&mut self, key: &'a [u8]) -> Result<(), CheckError> {
            if self.puts.contains(&key) || self.deletes(key) {
                return Err(CheckError::DuplicateKey);
            }
            self.puts.push(key);
            Ok(())
        }
    }

    fn touched(branch: &[pb::RequestOp]) -> Result<Touched<'_>, CheckError> {
        let requests = || branch.iter().filter_map(|op| op.request.as_ref());
        let mut all = Touched::default();
        for request in requests() {
            if let Request::RequestDeleteRange(delete) = request {
                all.deletes.push((&delete.key, &delete.range_end));
            }
        }
        for request in requests() {
            let Request::RequestTxn(nested) = request else { continue };
            let (success, failure) = (touched(&nested.success)?, touched(&nested.failure)?);
            // Only one of the two branches runs: a key may be put in both.
            let mut puts = success.puts;
            puts.extend(failure.puts.iter().filter(|key| !puts.contains(key)).copied().collect::<Vec<_>>());
            for key in puts {
                all.add_put(key)?;
            }
            all.deletes.extend(success.deletes);
            all.deletes.extend(failure.deletes);
        }
        for request in requests() {
            if let Request::RequestPut(put) = request {
                all.add_put(&put.key)?;
            }
        }
        Ok(all)
    }
}
