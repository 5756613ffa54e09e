//! A cell with both tenants, and answers in a form that can be compared.

use std::collections::BTreeSet;
use std::fmt;
use std::net::SocketAddr;

use bytes::Bytes;
use prost::Message as _;
use protox::prost_reflect::{DynamicMessage, MessageDescriptor, ReflectMessage as _, Value};
use tempfile::TempDir;
use tenure_etcd_shim::proto::etcdserverpb as pb;
use tenure_etcd_shim::wire::RangeResponse;
use tenure_tests::client::Connection;
use tenure_tests::server::Server;
use tonic::{Code, Status};

use crate::attempts::{EVERYTHING, Known, LEASE, SECRET, bytes, hidden, range, shared, value};

/// Keys that only `acme` has.
const HIDDEN: usize = 20;

/// Keys that both have.
const SHARED: usize = 2;

/// One member with both tenants. Its ids are those of every cell with these flags.
pub(crate) struct Cell {
    server: Server,
    pub(crate) dir: TempDir,
    pub(crate) acme: Connection,
    pub(crate) globex: Connection,
}

impl Cell {
    /// `globex` has the keys that both have, `acme` nothing.
    pub(crate) async fn start() -> Cell {
        let dir = tempfile::tempdir().unwrap();
        let server = Server::start(dir.path(), &["acme", "globex"]);
        let [acme, globex] = [Connection::open(server.address(0)).await, Connection::open(server.address(1)).await];
        for number in 0..SHARED {
            put(&globex, shared(number), "own", 0).await.unwrap();
        }
        Cell { server, dir, acme, globex }
    }

    /// As [`Cell::start`], but `acme` has keys, some of them on a lease, and more revisions than `globex`.
    pub(crate) async fn start_busy() -> (Cell, Known) {
        let cell = Cell::start().await;
        let acme = &cell.acme;
        let grant = pb::LeaseGrantRequest { ttl: 9_000, id: LEASE };
        let granted: pb::LeaseGrantResponse = unary(acme, "Lease/LeaseGrant", &grant).await;
        let header = granted.header.unwrap();
        for number in 0..HIDDEN {
            let lease = if number % 2 == 0 { LEASE } else { 0 };
            let put = pb::PutRequest { key: hidden(number), value: value(number), lease, ..Default::default() };
            let _: pb::PutResponse = unary(acme, "KV/Put", &put).await;
        }
        for number in 0..SHARED {
            put(acme, shared(number), SECRET, LEASE).await.unwrap();
        }
        let revision = state_of(acme).await.revision;
        let known = Known { revision, first_revision: header.revision + 1, member_id: header.member_id };
        (cell, known)
    }

    pub(crate) fn address_of_globex(&self) -> SocketAddr {
        self.server.address(1)
    }
}

pub(crate) async fn unary<A: prost::Message + Default>(
    of: &Connection,
    method: &str,
    request: &impl prost::Message,
) -> A {
    of.unary(&format!("/etcdserverpb.{method}"), request).await.unwrap()
}

pub(crate) async fn put(of: &Connection, key: Bytes, value: &str, lease: i64) -> Result<pb::PutResponse, Status> {
    let request = pb::PutRequest { key, value: bytes(value), lease, ..Default::default() };
    of.unary("/etcdserverpb.KV/Put", &request).await
}

/// What of a tenant must not move.
#[derive(Debug, PartialEq)]
pub(crate) struct State {
    pub(crate) cluster_id: u64,
    pub(crate) revision: i64,
    pub(crate) compact_revision: i64,
    /// Over all versions.
    pub(crate) hash: u32,
    pub(crate) keys: i64,
    pub(crate) leases: Vec<i64>,
    /// Of [`LEASE`].
    pub(crate) granted_ttl: i64,
    pub(crate) lease_keys: Vec<Bytes>,
    pub(crate) alarms: Vec<pb::AlarmMember>,
    pub(crate) stored_bytes: i64,
}

pub(crate) async fn state_of(tenant: &Connection) -> State {
    let hash: pb::HashKvResponse = unary(tenant, "Maintenance/HashKV", &pb::HashKvRequest { revision: 0 }).await;
    let leases: pb::LeaseLeasesResponse = unary(tenant, "Lease/LeaseLeases", &pb::LeaseLeasesRequest {}).await;
    let live = pb::LeaseTimeToLiveRequest { id: LEASE, keys: true };
    let live: pb::LeaseTimeToLiveResponse = unary(tenant, "Lease/LeaseTimeToLive", &live).await;
    let status: pb::StatusResponse = unary(tenant, "Maintenance/Status", &pb::StatusRequest {}).await;
    let count = pb::RangeRequest { count_only: true, ..range(bytes(EVERYTHING), EVERYTHING) };
    let counted: RangeResponse = unary(tenant, "KV/Range", &count).await;
    let alarms: pb::AlarmResponse = unary(tenant, "Maintenance/Alarm", &pb::AlarmRequest::default()).await;
    let header = hash.header.unwrap();
    State {
        cluster_id: header.cluster_id,
        revision: header.revision,
        compact_revision: hash.compact_revision,
        hash: hash.hash,
        keys: counted.count,
        leases: leases.leases.iter().map(|lease| lease.id).collect(),
        granted_ttl: live.granted_ttl,
        lease_keys: live.keys,
        alarms: alarms.alarms,
        stored_bytes: status.db_size,
    }
}

/// Seconds that [`LEASE`] has left.
pub(crate) async fn lease_left(tenant: &Connection) -> i64 {
    let live = pb::LeaseTimeToLiveRequest { id: LEASE, keys: false };
    let live: pb::LeaseTimeToLiveResponse = unary(tenant, "Lease/LeaseTimeToLive", &live).await;
    live.ttl
}

/// See [`Answer::contains_secret`].
pub(crate) fn contains_secret(answer: &[u8]) -> bool {
    answer.windows(SECRET.len()).any(|part| part == SECRET.as_bytes())
}

/// Everything that a call was answered, but for what differs between any two calls.
#[derive(PartialEq)]
pub(crate) struct Answer {
    pub(crate) messages: Vec<DynamicMessage>,
    pub(crate) code: Code,
    pub(crate) text: String,
}

/// Fields that time or the cell's own address changes.
const CHANGING: [&str; 2] = ["etcdserverpb.LeaseTimeToLiveResponse.TTL", "etcdserverpb.Member.clientURLs"];

impl fmt::Debug for Answer {
    /// A dynamic message's own form is that of its descriptors, for pages.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} {:?}", self.code, self.text)?;
        self.messages.iter().try_for_each(|message| write!(f, " {{{message}}}"))
    }
}

impl Answer {
    /// Whether there is something of `acme`'s in it that nobody else has.
    pub(crate) fn contains_secret(&self) -> bool {
        contains_secret(self.text.as_bytes())
            || self.messages.iter().any(|message| contains_secret(&message.encode_to_vec()))
    }
}

/// Sends these bytes to a method that ends by itself.
pub(crate) async fn ask(tenant: &Connection, method: &str, message: &[u8], output: &MessageDescriptor) -> Answer {
    let (answer, status) = tenant.bytes_of(&format!("/{method}"), message).await;
    let mut rest = &answer[..];
    let mut messages = Vec::new();
    while let Some((frame, after)) = rest.split_first_chunk::<5>() {
        let length = u32::from_be_bytes([frame[1], frame[2], frame[3], frame[4]]) as usize;
        let (message, after) = after.split_at(length);
        let mut message = DynamicMessage::decode(output.clone(), message).unwrap();
        without_changing(&mut message);
        messages.push(message);
        rest = after;
    }
    Answer { messages, code: status.code(), text: status.message().to_string() }
}

fn without_changing(message: &mut DynamicMessage) {
    for (field, value) in message.fields_mut() {
        if CHANGING.contains(&field.full_name()) {
            *value = Value::default_value_for_field(&field);
        }
        value.as_message_mut().into_iter().for_each(without_changing);
        value.as_list_mut().into_iter().flatten().filter_map(Value::as_message_mut).for_each(without_changing);
    }
}

/// The cluster ids of all headers in a message, 0 left out: the answers inside a txn's have no ids, as in etcd.
pub(crate) fn cluster_ids(message: &DynamicMessage) -> BTreeSet<u64> {
    const HEADER: &str = "etcdserverpb.ResponseHeader";
    let mut ids = BTreeSet::new();
    if message.descriptor().full_name() == HEADER {
        ids.extend(message.get_field_by_name("cluster_id").and_then(|id| id.as_u64()).filter(|id| *id != 0));
    }
    for (_, value) in message.fields() {
        let inner = value.as_list().unwrap_or(std::slice::from_ref(value));
        ids.extend(inner.iter().filter_map(Value::as_message).flat_map(cluster_ids));
    }
    ids
}
