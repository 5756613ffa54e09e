//! A cell under load from clients of all its members, and what must hold of it afterwards.
//!
//! Each writer has one key and writes growing numbers into it, through whatever member comes next. A write that was not
//! answered may or may not have happened, or may happen later; so a number is written on the condition that the key has a smaller
//! one. Then the history of a key is known up to the unanswered writes, and each linearizable read of it must show at least the
//! last number that was acknowledged when it began.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use tenure_etcd_shim::proto::etcdserverpb as pb;
use tenure_etcd_shim::storage::key_value::KeyValue;
use tenure_etcd_shim::wire::RangeResponse;
use tokio::task::JoinSet;
use tonic::{Code, Status};

use crate::client::Connection;
use crate::cluster::Cluster;

const WRITERS: usize = 6;

/// Bounds what should long be over; it judges nothing.
pub const PATIENCE: Duration = Duration::from_secs(300);

/// After this a client asks another member: one that is paused never answers.
const GIVE_UP: Duration = Duration::from_secs(3);

/// Requests to one member, on a connection that is made again when it is lost.
pub struct Client {
    pub address: SocketAddr,
    connection: Option<Connection>,
}

impl Client {
    pub fn new(address: SocketAddr) -> Self {
        Client { address, connection: None }
    }

    pub async fn ask<Q: prost::Message, A: prost::Message + Default>(
        &mut self,
        method: &str,
        request: &Q,
    ) -> Result<A, Status> {
        if self.connection.is_none() {
            self.connection = Some(Connection::try_open(self.address).await?);
        }
        let connection = self.connection.clone().unwrap();
        let answer = tokio::time::timeout(GIVE_UP, connection.unary(method, request)).await;
        let answer = answer.unwrap_or_else(|_| Err(Status::unavailable("no answer")));
        if answer.is_err() {
            self.connection = None;
        }
        answer
    }
}

/// Has the cell do what changes its members, until it has; whether it had done so before is not told apart.
pub async fn reconfigure<Q: prost::Message, A: prost::Message + Default>(
    client: &mut Client,
    method: &str,
    request: &Q,
) -> Option<A> {
    let mut look = tokio::time::interval(Duration::from_millis(20));
    let done = async {
        loop {
            look.tick().await;
            match client.ask(&format!("/etcdserverpb.Cluster/{method}"), request).await {
                Ok(answer) => return Some(answer),
                Err(status) => match status.message() {
                    "etcdserver: member not found"
                    | "etcdserver: Peer URLs already exists"
                    | "etcdserver: can only promote a learner member" => return None,
                    "etcdserver: can only promote a learner member which is in sync with leader" => {}
                    _ => assert!(
                        matches!(status.code(), Code::Unavailable | Code::FailedPrecondition),
                        "{method}: {status:?}"
                    ),
                },
            }
        }
    };
    tokio::time::timeout(PATIENCE, done).await.expect("the members change")
}

/// What all know of one key.
#[derive(Default)]
pub struct Key {
    acknowledged: AtomicU64,
    revision: AtomicI64,
}

pub struct Load {
    stop: Arc<AtomicBool>,
    keys: Arc<Vec<Key>>,
    tasks: JoinSet<()>,
}

/// Writes a number into a key that has a smaller one, or, the first, into one that does not exist.
fn put(key: usize, number: u64) -> pb::TxnRequest {
    use pb::compare::{CompareResult, CompareTarget, TargetUnion};
    // As text they are in the order of numbers.
    let (key, value) = (Bytes::from(format!("key{key}")), Bytes::from(format!("{number:020}")));
    let (result, target, target_union) = match number {
        0 => (CompareResult::Equal, CompareTarget::Version, TargetUnion::Version(0)),
        _ => (CompareResult::Less, CompareTarget::Value, TargetUnion::Value(value.clone())),
    };
    let condition = pb::Compare {
        result: result.into(),
        target: target.into(),
        key: key.clone(),
        target_union: Some(target_union),
        ..Default::default()
    };
    let put = pb::PutRequest { key, value, ..Default::default() };
    let put = pb::RequestOp { request: Some(pb::request_op::Request::RequestPut(put)) };
    pb::TxnRequest { compare: vec![condition], success: vec![put], failure: vec![] }
}

fn get(key: usize) -> pb::RangeRequest {
    pb::RangeRequest { key: Bytes::from(format!("key{key}")), ..Default::default() }
}

/// The number in a key; 0 if there is none.
fn number_in(answer: &RangeResponse) -> u64 {
    let stored = answer.kvs.iter().next();
    let kv = stored.map(|stored| KeyValue::decode(stored).unwrap());
    kv.map_or(0, |kv| std::str::from_utf8(kv.value).unwrap().parse().unwrap())
}

impl Load {
    pub fn start(cluster: &Cluster) -> Load {
        let addresses: Vec<SocketAddr> = cluster.members.iter().map(|member| member.client).collect();
        let stop = Arc::new(AtomicBool::new(false));
        let keys = Arc::new((0..WRITERS).map(|_| Key::default()).collect::<Vec<_>>());
        let mut tasks = JoinSet::new();
        for writer in 0..WRITERS {
            let (stop, keys, addresses) = (Arc::clone(&stop), Arc::clone(&keys), addresses.clone());
            tasks.spawn(async move {
                let mut clients: Vec<Client> = addresses.into_iter().map(Client::new).collect();
                let count = clients.len();
                let (mut number, mut exists) = (0, false);
                while !stop.load(Ordering::Relaxed) {
                    let key = &keys[writer];
                    let client = &mut clients[(writer + usize::try_from(number).unwrap()) % count];
                    // Also where no number is written yet: the next member is asked then.
                    number += 1;
                    let written: Result<pb::TxnResponse, _> =
                        client.ask("/etcdserverpb.KV/Txn", &put(writer, if exists { number } else { 0 })).await;
                    match written {
                        Ok(_) if !exists => exists = true,
                        Ok(written) => {
                            assert!(written.succeeded, "{number} is the largest");
                            let revision = written.header.unwrap().revision;
                            let before = key.revision.swap(revision, Ordering::AcqRel);
                            assert!(revision > before, "revisions follow real time: {revision} after {before}");
                            key.acknowledged.store(number, Ordering::Release);
                        }
                        Err(_) => tokio::task::yield_now().await,
                    }
                    let other = &keys[(writer + 1) % WRITERS];
                    let acknowledged = other.acknowledged.load(Ordering::Acquire);
                    let reader = &mut clients[usize::try_from(number).unwrap() % count];
                    let read: Result<RangeResponse, _> =
                        reader.ask("/etcdserverpb.KV/Range", &get((writer + 1) % WRITERS)).await;
                    if let Ok(read) = read {
                        let found = number_in(&read);
                        assert!(found >= acknowledged, "a stale read: {found} after {acknowledged} was acknowledged");
                    }
                }
            });
        }
        Load { stop, keys, tasks }
    }

    /// Waits until `more` further writes of every key were acknowledged: the cell serves.
    pub async fn progress(&mut self, more: u64) {
        let Load { keys, tasks, .. } = self;
        let targets: Vec<u64> = keys.iter().map(|key| key.acknowledged.load(Ordering::Acquire) + more).collect();
        let all = || keys.iter().zip(&targets).all(|(key, target)| key.acknowledged.load(Ordering::Acquire) >= *target);
        let reached = async {
            let mut look = tokio::time::interval(Duration::from_millis(20));
            while !all() {
                look.tick().await;
                // A writer ends before it is asked to if it has found something.
                if let Some(ended) = tasks.try_join_next() {
                    ended.unwrap();
                }
            }
        };
        tokio::time::timeout(PATIENCE, reached).await.expect("the cell serves writes");
    }

    pub async fn end(mut self) -> Arc<Vec<Key>> {
        self.stop.store(true, Ordering::Relaxed);
        while let Some(task) = self.tasks.join_next().await {
            task.unwrap();
        }
        self.keys
    }
}

/// The place of the member that leads, as the others say.
pub async fn leader_of(cluster: &Cluster) -> usize {
    let mut look = tokio::time::interval(Duration::from_millis(20));
    let found = async {
        loop {
            look.tick().await;
            for (at, member) in cluster.members.iter().enumerate() {
                let mut client = Client::new(member.client);
                let status: Result<pb::StatusResponse, _> =
                    client.ask("/etcdserverpb.Maintenance/Status", &pb::StatusRequest {}).await;
                if let Ok(status) = status
                    && status.leader != 0
                    && status.leader == status.header.unwrap().member_id
                {
                    return at;
                }
            }
        }
    };
    tokio::time::timeout(PATIENCE, found).await.expect("somebody leads")
}

/// Asks until there is an answer: members elect and catch up.
pub async fn answer<Q: prost::Message, A: prost::Message + Default>(
    client: &mut Client,
    method: &str,
    request: &Q,
) -> A {
    let mut look = tokio::time::interval(Duration::from_millis(20));
    let answered = async {
        loop {
            look.tick().await;
            match client.ask(method, request).await {
                Ok(answer) => return answer,
                Err(status) => assert_eq!(status.code(), Code::Unavailable, "{status:?}"),
            }
        }
    };
    tokio::time::timeout(PATIENCE, answered).await.expect("the member answers")
}

/// All members have everything that was acknowledged, and the same history.
pub async fn check(cluster: &Cluster, keys: &[Key]) {
    let mut clients: Vec<Client> = cluster.members.iter().map(|member| Client::new(member.client)).collect();
    for client in &mut clients {
        for (at, key) in keys.iter().enumerate() {
            let found: RangeResponse = answer(client, "/etcdserverpb.KV/Range", &get(at)).await;
            let acknowledged = key.acknowledged.load(Ordering::Acquire);
            assert!(number_in(&found) >= acknowledged, "key{at} lost {acknowledged} at {}", client.address);
        }
    }
    check_same(&mut clients).await;
}

/// All that these clients are of have the same history of their tenant.
pub async fn check_same(clients: &mut [Client]) {
    // A write that nobody waits for any more may still happen, and be applied here before it is there.
    let same = async {
        let mut hashes = BTreeMap::new();
        loop {
            let mut revisions = BTreeSet::new();
            for client in &mut *clients {
                let request = pb::HashKvRequest::default();
                let hash: pb::HashKvResponse = answer(client, "/etcdserverpb.Maintenance/HashKV", &request).await;
                let first = *hashes.entry(hash.hash_revision).or_insert(hash.hash);
                assert_eq!(hash.hash, first, "members differ at revision {}", hash.hash_revision);
                revisions.insert(hash.hash_revision);
            }
            if revisions.len() == 1 {
                return;
            }
        }
    };
    tokio::time::timeout(PATIENCE, same).await.expect("all come to the same revision");
}
