//! What one simulated client does: makes its next request, looks at the answer.
//!
//! A [`Client`] is a small state machine without input or output; [`crate::load`] moves its requests. Clients of one run
//! share their [`Keyspace`] and a pool of random bytes that values are cut from, so that a value costs no copy here and no
//! store can compress it away.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;

use bytes::Bytes;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use rand_distr::{Distribution, Zipf};
use tenure_etcd_shim::proto::etcdserverpb::compare::{CompareResult, CompareTarget, TargetUnion};
use tenure_etcd_shim::proto::etcdserverpb::request_op;
use tenure_etcd_shim::proto::etcdserverpb::{
    Compare, LeaseGrantRequest, LeaseKeepAliveRequest, PutRequest, RangeRequest, RequestOp, TxnRequest,
};

use crate::fields::{integer, submessages};

/// What the clients of a run do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Workload {
    /// One key, overwritten.
    Put,
    /// What kube-apiserver's update does: compare the mod revision, put, else get.
    KubeTxn,
    /// One key, linearizable.
    Get,
    /// One key, serializable.
    GetSerializable,
    /// All keys in one answer.
    List,
    /// All keys, page by page.
    ListPaged,
    /// All keys in one RangeStream.
    Stream,
    /// Puts, delivered to many watchers.
    Watch,
    LeaseGrant,
    /// A flood of keep-alives of one lease a client.
    LeaseKeepAlive,
    /// What a cluster at work does: leases of nodes, states of pods, events, reads, lists, under some watches.
    Mixed,
    /// New keys, 64 to a txn.
    Fill,
}

impl Workload {
    /// As the command line names it.
    pub fn name(self) -> String {
        clap::ValueEnum::to_possible_value(&self).map_or_else(String::new, |value| value.get_name().to_string())
    }

    /// What its CPU time is divided by.
    pub fn unit(self) -> &'static str {
        match self {
            Workload::List | Workload::ListPaged | Workload::Stream | Workload::Fill => "key",
            Workload::Watch => "event",
            Workload::Put
            | Workload::KubeTxn
            | Workload::Get
            | Workload::GetSerializable
            | Workload::LeaseGrant
            | Workload::LeaseKeepAlive
            | Workload::Mixed => "op",
        }
    }

    /// Whether the keys must be there before it starts.
    pub fn needs_keys(self) -> bool {
        match self {
            Workload::Get
            | Workload::GetSerializable
            | Workload::List
            | Workload::ListPaged
            | Workload::Stream
            | Workload::KubeTxn
            | Workload::Mixed => true,
            Workload::Put | Workload::Watch | Workload::LeaseGrant | Workload::LeaseKeepAlive | Workload::Fill => false,
        }
    }
}

impl Workload {
    /// Whether clients update keys, each its own, of which they must know the revisions.
    pub fn updates(self) -> bool {
        matches!(self, Workload::KubeTxn | Workload::Mixed)
    }
}

/// A request, ready to be sent.
pub enum Request {
    Put(PutRequest),
    Txn(TxnRequest),
    Range(RangeRequest),
    RangeStream(RangeRequest),
    LeaseGrant(LeaseGrantRequest),
    /// Goes on the client's own stream and is answered there.
    LeaseKeepAlive(LeaseKeepAliveRequest),
}

/// The next thing a client does, and for which tenant.
pub struct Next {
    pub tenant: usize,
    pub request: Request,
}

/// What all clients of a run share.
pub struct Keyspace {
    /// Keys of one run do not meet those of another.
    pub prefix: String,
    pub keys: u64,
    pub value_bytes: usize,
    pub page_keys: i64,
    pub tenants: usize,
    weights: Option<Zipf<f64>>,
    pool: Bytes,
    filled: Cell<u64>,
    /// The tenants whose keys' revisions were asked for.
    learnt: Cell<usize>,
    /// Mod revisions of the keys that clients update, by tenant and key.
    revisions: RefCell<HashMap<(usize, u64), i64>>,
}

/// Random bytes that values are cut from.
const POOL_BYTES: usize = 4 << 20;

/// Puts in a txn of [`Workload::Fill`]; etcd allows 128.
pub const FILL_BATCH: u64 = 64;

impl Keyspace {
    /// `zipf`: the exponent of the tenants' weights.
    pub fn new(prefix: &str, keys: u64, value_bytes: usize, page_keys: i64, tenants: usize, zipf: f64) -> Self {
        let mut pool = vec![0; POOL_BYTES + value_bytes];
        SmallRng::seed_from_u64(7).fill(&mut pool[..]);
        let weights = (tenants > 1).then(|| Zipf::new(tenants as f64, zipf).ok()).flatten();
        let (prefix, pool, filled) = (prefix.to_string(), Bytes::from(pool), Cell::new(0));
        let (learnt, revisions) = (Cell::new(0), RefCell::default());
        Keyspace { prefix, keys, value_bytes, page_keys, tenants, weights, pool, filled, learnt, revisions }
    }

    /// A tenant whose keys' revisions nobody has asked for.
    fn next_unlearnt(&self) -> Option<usize> {
        let next = self.learnt.get();
        (next < self.tenants).then(|| {
            self.learnt.set(next + 1);
            next
        })
    }

    /// The newest that is known stays: answers may cross.
    fn learn(&self, tenant: usize, key: u64, mod_revision: i64) {
        let mut revisions = self.revisions.borrow_mut();
        let known = revisions.entry((tenant, key)).or_default();
        *known = mod_revision.max(*known);
    }

    /// A tenant, the first ones more often.
    fn tenant(&self, random: &mut SmallRng) -> usize {
        let Some(weights) = &self.weights else { return 0 };
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a rank from 1 to `tenants`")]
        let rank = weights.sample(random) as usize;
        rank.clamp(1, self.tenants) - 1
    }

    /// Tenants are told apart by their keys too, so that servers which know none can be compared.
    pub fn key(&self, tenant: usize, number: u64) -> Bytes {
        format!("{}t{tenant:04}/{number:08}", self.prefix).into()
    }

    /// All keys of a tenant.
    pub fn range(&self, tenant: usize) -> RangeRequest {
        RangeRequest {
            key: format!("{}t{tenant:04}/", self.prefix).into(),
            range_end: format!("{}t{tenant:04}0", self.prefix).into(),
            ..RangeRequest::default()
        }
    }

    fn value(&self, random: &mut SmallRng, bytes: usize) -> Bytes {
        let from = random.random_range(0..POOL_BYTES);
        self.pool.slice(from..(from + bytes).min(self.pool.len()))
    }
}

/// Nanoseconds, in a watched value's first eight bytes.
pub const STAMP_BYTES: usize = 8;

/// What an answer was, beside having come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Done {
    /// Of the workload's unit.
    pub units: u64,
    /// The answer was not what it must be.
    pub wrong: bool,
}

/// See the module's essay.
pub struct Client {
    workload: Workload,
    number: u64,
    clients: u64,
    space: Rc<Keyspace>,
    random: SmallRng,
    current: Current,
    lease: i64,
    /// The tenant of a client that holds a lease.
    home: Option<usize>,
    /// Of the answer coming in: keys so far.
    keys: u64,
    page: Option<Page>,
    now_ns: Rc<dyn Fn() -> u64>,
}

/// What the answer on its way will be.
enum Current {
    Other,
    Get,
    Txn {
        tenant: usize,
        key: u64,
        succeeded: bool,
    },
    /// Of all keys of the tenant: their revisions.
    Revisions {
        tenant: usize,
    },
    Keys {
        tenant: usize,
        expected: Option<u64>,
    },
    Grant,
}

struct Page {
    tenant: usize,
    next: Bytes,
    revision: i64,
    left: u64,
}

impl Client {
    /// The `number`th of so many `clients`. `now_ns` stamps watched values.
    pub fn new(
        workload: Workload,
        number: u64,
        clients: u64,
        space: Rc<Keyspace>,
        now_ns: Rc<dyn Fn() -> u64>,
    ) -> Self {
        Client {
            workload,
            number,
            clients,
            space,
            random: SmallRng::seed_from_u64(number),
            current: Current::Other,
            lease: 0,
            home: None,
            keys: 0,
            page: None,
            now_ns,
        }
    }

    /// `None`: nothing is left to do.
    pub fn next_request(&mut self) -> Option<Next> {
        self.keys = 0;
        self.current = Current::Other;
        // While the server warms up: what is measured are updates that succeed.
        if self.workload.updates()
            && let Some(tenant) = self.space.next_unlearnt()
        {
            self.current = Current::Revisions { tenant };
            let request = Request::Range(RangeRequest { keys_only: true, ..self.space.range(tenant) });
            return Some(Next { tenant, request });
        }
        let drawn = self.space.tenant(&mut self.random);
        // Leases belong to one tenant, so who holds one stays there.
        let holds_lease = matches!(self.workload, Workload::LeaseKeepAlive | Workload::Mixed);
        let tenant = if holds_lease { *self.home.get_or_insert(drawn) } else { drawn };
        let request = match self.workload {
            Workload::Put => self.put(tenant),
            Workload::KubeTxn => self.kube_txn(tenant, self.space.value_bytes, 0),
            Workload::Get => self.get(tenant, false),
            Workload::GetSerializable => self.get(tenant, true),
            Workload::List => Request::Range(self.list(tenant)),
            Workload::ListPaged => return Some(self.next_page(tenant)),
            Workload::Stream => Request::RangeStream(self.list(tenant)),
            Workload::Watch => self.stamped_put(tenant),
            Workload::LeaseGrant => Request::LeaseGrant(LeaseGrantRequest { ttl: 3600, id: 0 }),
            Workload::LeaseKeepAlive => self.keep_alive(),
            Workload::Mixed => self.mixed(tenant),
            Workload::Fill => return self.fill(),
        };
        Some(Next { tenant, request })
    }

    fn own_key(&mut self) -> u64 {
        let own = (self.space.keys / self.clients).max(1);
        self.number + self.clients * self.random.random_range(0..own)
    }

    fn put(&mut self, tenant: usize) -> Request {
        let number = self.random.random_range(0..self.space.keys);
        let value = self.space.value(&mut self.random, self.space.value_bytes);
        Request::Put(PutRequest { key: self.space.key(tenant, number), value, ..PutRequest::default() })
    }

    fn stamped_put(&mut self, tenant: usize) -> Request {
        let number = self.random.random_range(0..self.space.keys);
        let mut value = self.space.value(&mut self.random, self.space.value_bytes.max(STAMP_BYTES)).to_vec();
        value[..STAMP_BYTES].copy_from_slice(&(self.now_ns)().to_be_bytes());
        Request::Put(PutRequest { key: self.space.key(tenant, number), value: value.into(), ..PutRequest::default() })
    }

    /// The update of kube-apiserver (contract 5.2). The client is the key's only writer, so the compare holds.
    fn kube_txn(&mut self, tenant: usize, value_bytes: usize, lease: i64) -> Request {
        let number = self.own_key();
        let key = self.space.key(tenant, number);
        let value = self.space.value(&mut self.random, value_bytes);
        self.current = Current::Txn { tenant, key: number, succeeded: false };
        let mod_revision = self.space.revisions.borrow().get(&(tenant, number)).copied().unwrap_or(0);
        let op = |request| RequestOp { request: Some(request) };
        Request::Txn(TxnRequest {
            compare: vec![Compare {
                result: CompareResult::Equal.into(),
                target: CompareTarget::Mod.into(),
                key: key.clone(),
                target_union: Some(TargetUnion::ModRevision(mod_revision)),
                ..Compare::default()
            }],
            success: vec![op(request_op::Request::RequestPut(PutRequest {
                key: key.clone(),
                value,
                lease,
                ..PutRequest::default()
            }))],
            failure: vec![op(request_op::Request::RequestRange(RangeRequest { key, ..RangeRequest::default() }))],
        })
    }

    fn get(&mut self, tenant: usize, serializable: bool) -> Request {
        self.current = Current::Get;
        let number = self.random.random_range(0..self.space.keys);
        Request::Range(RangeRequest { key: self.space.key(tenant, number), serializable, ..RangeRequest::default() })
    }

    fn list(&mut self, tenant: usize) -> RangeRequest {
        self.current = Current::Keys { tenant, expected: Some(self.space.keys) };
        self.space.range(tenant)
    }

    fn next_page(&mut self, tenant: usize) -> Next {
        let page_keys = u64::try_from(self.space.page_keys).unwrap_or(1);
        let (tenant, range, expected) = match &self.page {
            Some(page) => {
                let range =
                    RangeRequest { key: page.next.clone(), revision: page.revision, ..self.space.range(page.tenant) };
                (page.tenant, range, page.left.min(page_keys))
            }
            None => (tenant, self.space.range(tenant), self.space.keys.min(page_keys)),
        };
        self.current = Current::Keys { tenant, expected: Some(expected) };
        Next { tenant, request: Request::Range(RangeRequest { limit: self.space.page_keys, ..range }) }
    }

    fn keep_alive(&mut self) -> Request {
        if self.lease == 0 {
            self.current = Current::Grant;
            return Request::LeaseGrant(LeaseGrantRequest { ttl: 3600, id: 0 });
        }
        Request::LeaseKeepAlive(LeaseKeepAliveRequest { id: self.lease })
    }

    /// Shares and sizes as in a cluster whose nodes renew their leases while a deployment rolls.
    fn mixed(&mut self, tenant: usize) -> Request {
        if self.lease == 0 {
            self.current = Current::Grant;
            return Request::LeaseGrant(LeaseGrantRequest { ttl: 3600, id: 0 });
        }
        match self.random.random_range(0..100) {
            // A node's lease object.
            0..40 => self.kube_txn(tenant, 300, 0),
            // A pod's status.
            40..65 => self.kube_txn(tenant, 2048, 0),
            // An event, which goes with its lease.
            65..75 => self.kube_txn(tenant, 700, self.lease),
            75..95 => self.get(tenant, false),
            95..97 => {
                self.current = Current::Keys { tenant, expected: None };
                Request::Range(RangeRequest { count_only: true, ..self.space.range(tenant) })
            }
            _ => {
                self.current = Current::Keys { tenant, expected: None };
                Request::Range(RangeRequest { limit: self.space.page_keys, ..self.space.range(tenant) })
            }
        }
    }

    fn fill(&mut self) -> Option<Next> {
        let from = self.space.filled.get();
        let all = self.space.keys.saturating_mul(self.space.tenants as u64);
        if from >= all {
            return None;
        }
        let tenant = usize::try_from(from / self.space.keys).unwrap_or(0);
        let number = from % self.space.keys;
        let to = (number + FILL_BATCH).min(self.space.keys);
        self.space.filled.set(from + to - number);
        self.keys = to - number;
        let puts = (number..to).map(|number| {
            let value = self.space.value(&mut self.random, self.space.value_bytes);
            let put = PutRequest { key: self.space.key(tenant, number), value, ..PutRequest::default() };
            RequestOp { request: Some(request_op::Request::RequestPut(put)) }
        });
        Some(Next { tenant, request: Request::Txn(TxnRequest { success: puts.collect(), ..TxnRequest::default() }) })
    }

    /// Takes one message of the answer.
    pub fn message(&mut self, message: &[u8]) {
        match &mut self.current {
            Current::Other => {}
            Current::Get => self.keys += submessages(message, 2).count() as u64,
            Current::Revisions { tenant } => {
                for kv in submessages(message, 2) {
                    let key = submessages(kv, 1).next().unwrap_or_default();
                    if let Some(number) = number_of(key) {
                        self.space.learn(*tenant, number, integer(kv, 3).cast_signed());
                    }
                }
            }
            Current::Txn { tenant, key, succeeded } => {
                let header = submessages(message, 1).next().unwrap_or_default();
                *succeeded = integer(message, 2) == 1;
                let known = if *succeeded {
                    integer(header, 3)
                } else {
                    // The range's answer: the key as somebody left it.
                    let range = submessages(message, 3).flat_map(|op| submessages(op, 1)).next().unwrap_or_default();
                    submessages(range, 2).next().map_or(0, |kv| integer(kv, 3))
                };
                self.space.learn(*tenant, *key, known.cast_signed());
            }
            Current::Keys { tenant, .. } => {
                let tenant = *tenant;
                self.on_keys(tenant, message);
            }
            Current::Grant => self.lease = integer(message, 2).cast_signed(),
        }
    }

    fn on_keys(&mut self, tenant: usize, message: &[u8]) {
        // A RangeStream's messages hold a Range's answer each.
        let inner = if self.workload == Workload::Stream {
            submessages(message, 1).next().unwrap_or_default()
        } else {
            message
        };
        let mut last: &[u8] = &[];
        for kv in submessages(inner, 2) {
            self.keys += 1;
            last = kv;
        }
        if self.workload == Workload::ListPaged {
            let count = integer(inner, 4);
            let header = submessages(inner, 1).next().unwrap_or_default();
            let key = submessages(last, 1).next().unwrap_or_default();
            let revision = self.page.as_ref().map_or(integer(header, 3).cast_signed(), |page| page.revision);
            let left_before = self.page.as_ref().map_or(self.space.keys, |page| page.left);
            // Every count is exact: the rest of the keys, these included.
            let exact = count == left_before;
            let left = count.saturating_sub(self.keys);
            let next = [key, &[0]].concat().into();
            self.page = (left > 0 && exact && self.keys > 0).then_some(Page { tenant, next, revision, left });
            if !exact {
                self.keys = 0;
            }
        }
    }

    /// The call has ended well.
    pub fn done(&mut self) -> Done {
        match self.current {
            Current::Keys { expected, .. } => {
                let wrong = expected.is_some_and(|expected| expected != self.keys);
                let units = if self.workload == Workload::Mixed { 1 } else { self.keys };
                Done { units, wrong }
            }
            Current::Get => Done { units: 1, wrong: self.keys != 1 },
            Current::Other if self.workload == Workload::Fill => Done { units: self.keys, wrong: false },
            Current::Txn { succeeded, .. } => Done { units: 1, wrong: !succeeded },
            Current::Other | Current::Revisions { .. } | Current::Grant => Done { units: 1, wrong: false },
        }
    }
}

/// What [`Keyspace::key`] ends with.
fn number_of(key: &[u8]) -> Option<u64> {
    let digits = key.rsplit(|byte| *byte == b'/').next()?;
    std::str::from_utf8(digits).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use prost::Message as _;
    use tenure_etcd_shim::proto::etcdserverpb::{ResponseHeader, TxnResponse};
    use tenure_etcd_shim::wire::{KvRope, RangeResponse};
    use tenure_storage::key_value::KeyValue;

    use super::*;

    fn page(keys: &[Bytes], count: i64) -> Vec<u8> {
        let mut kvs = KvRope::default();
        for key in keys {
            kvs.push(
                &KeyValue { key, mod_revision: 2, create_revision: 2, version: 1, ..KeyValue::default() }.encode(),
            );
        }
        let header = Some(ResponseHeader { revision: 9, ..ResponseHeader::default() });
        RangeResponse { header, kvs, more: count > 2, count }.encode_to_vec()
    }

    /// The issue with paging is the count: a server that answers fast and wrong must not look fast.
    #[test]
    fn a_page_goes_on_behind_the_last_key_and_its_count_is_checked() {
        let space = Rc::new(Keyspace::new("/", 4, 10, 2, 1, 1.0));
        let key = |number| space.key(0, number);
        for (second_count, wrong) in [(2, false), (3, true)] {
            let mut client = Client::new(Workload::ListPaged, 0, 1, Rc::clone(&space), Rc::new(|| 0));
            let Some(Next { request: Request::Range(first), .. }) = client.next_request() else { panic!("a range") };
            assert_eq!((first.limit, first.revision), (2, 0));
            client.message(&page(&[key(0), key(1)], 4));
            assert_eq!(client.done(), Done { units: 2, wrong: false });
            let Some(Next { request: Request::Range(second), .. }) = client.next_request() else { panic!("a range") };
            assert_eq!((second.revision, &second.key[..]), (9, &[&key(1)[..], &[0]].concat()[..]));
            client.message(&page(&[key(2), key(3)], second_count));
            assert_eq!(client.done().wrong, wrong);
        }
    }
    /// Updates whose compares fail write nothing: a run of those would say nothing about writes.
    #[test]
    fn updates_know_the_revision_they_compare_with_and_one_that_fails_is_wrong() {
        let space = Rc::new(Keyspace::new("/", 2, 10, 2, 1, 1.0));
        let mut client = Client::new(Workload::KubeTxn, 0, 2, Rc::clone(&space), Rc::new(|| 0));
        let Some(Next { request: Request::Range(learn), .. }) = client.next_request() else { panic!("a range") };
        assert!(learn.keys_only);
        client.message(&page(&[space.key(0, 0), space.key(0, 1)], 2));
        assert_eq!(client.done(), Done { units: 1, wrong: false });
        for (expected, succeeded) in [(2, true), (7, false)] {
            let Some(Next { request: Request::Txn(update), .. }) = client.next_request() else { panic!("a txn") };
            assert_eq!(update.compare[0].target_union, Some(TargetUnion::ModRevision(expected)));
            let header = Some(ResponseHeader { revision: 7, ..ResponseHeader::default() });
            client.message(&TxnResponse { header, succeeded, ..TxnResponse::default() }.encode_to_vec());
            assert_eq!(client.done(), Done { units: 1, wrong: !succeeded });
        }
    }
}
