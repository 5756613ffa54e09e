//! SIGKILL at random moments under write load: what was acknowledged is there, txns are whole, revisions never go back,
//! leases and their keys agree.
//!
//! Why: the state has no write-ahead log of its own; everything rests on the raft log, its truncation behind the state's
//! flush, and replay. Only a real process that dies shows that they fit.
//!
//! Each writer has keys and leases of its own and does one thing after the other. So what it should find after a crash is
//! known exactly, but for the one request that was not answered: that has happened whole, or not at all.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicUsize, Ordering};

use bytes::Bytes;
use prost::Message;
use tenure_etcd_shim::proto::etcdserverpb as pb;
use tenure_etcd_shim::proto::etcdserverpb::request_op::Request;
use tenure_etcd_shim::wire::RangeResponse;
use tenure_tests::client::Connection;
use tenure_tests::server::Server;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tonic::{Code, Status};

const KILLS: usize = 50;
const WRITERS: usize = 8;

/// Pairs of keys that a writer uses again and again, so that they move from lease to lease.
const PAIRS: u64 = 12;

/// Leases have this many ids per writer.
const LEASES_PER_WRITER: i64 = 1 << 32;

/// Long enough never to expire: leases start anew at every restart.
const TTL_SECONDS: i64 = 3600;

/// Values of the first writer; they do not compress. It makes the raft log grow so fast that it is cut every few rounds
/// (64 MiB are kept).
const LARGE_VALUE_BYTES: usize = 192 << 10;

/// Writes between two compactions.
const COMPACT_EVERY: usize = 60;

/// Of one writer. Keys with their value and lease.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct State {
    keys: BTreeMap<String, (String, i64)>,
    leases: BTreeSet<i64>,
}

#[derive(Clone, Debug)]
enum Op {
    /// Both keys of a pair, in one txn.
    Put {
        keys: [String; 2],
        value: String,
        lease: i64,
    },
    Delete {
        keys: [String; 2],
    },
    Grant {
        lease: i64,
    },
    Revoke {
        lease: i64,
    },
}

impl State {
    fn after(&self, op: &Op) -> State {
        let mut state = self.clone();
        match op {
            Op::Put { keys, value, lease } => {
                state.keys.extend(keys.iter().map(|key| (key.clone(), (value.clone(), *lease))));
            }
            Op::Delete { keys } => keys.iter().for_each(|key| drop(state.keys.remove(key))),
            Op::Grant { lease } => drop(state.leases.insert(*lease)),
            Op::Revoke { lease } => {
                state.leases.remove(lease);
                state.keys.retain(|_, (_, attached)| attached != lease);
            }
        }
        state
    }
}

/// Shared by the writers of a round.
#[derive(Default)]
struct Progress {
    acknowledged: AtomicUsize,
    /// The newest revision that any answer has shown.
    revision: AtomicI64,
    more: Notify,
}

impl Progress {
    fn acknowledge(&self, header: Option<pb::ResponseHeader>) {
        self.revision.fetch_max(header.unwrap().revision, Ordering::Relaxed);
        self.acknowledged.fetch_add(1, Ordering::Relaxed);
        self.more.notify_waiters();
    }

    /// Returns once `count` writes were acknowledged.
    async fn reaches(&self, count: usize) {
        loop {
            let more = self.more.notified();
            if self.acknowledged.load(Ordering::Relaxed) >= count {
                return;
            }
            more.await;
        }
    }
}

struct Writer {
    number: usize,
    sure: State,
    /// Asked for and not answered.
    maybe: Option<Op>,
    /// Changes of keys so far: each takes one revision.
    changes: i64,
    /// Unanswered requests that had happened, and that had not.
    unanswered: [usize; 2],
    next_lease: i64,
    next_value: u64,
    dice: u64,
}

impl Writer {
    fn new(number: usize) -> Self {
        let next_lease = number as i64 * LEASES_PER_WRITER + 1;
        let dice = 0x9e37_79b9_7f4a_7c15 ^ number as u64;
        Writer {
            number,
            sure: State::default(),
            maybe: None,
            changes: 0,
            unanswered: [0; 2],
            next_lease,
            next_value: 0,
            dice,
        }
    }

    fn roll(&mut self, below: u64) -> u64 {
        self.dice = self.dice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.dice >> 33) % below
    }

    fn prefix(&self) -> String {
        format!("w{}/", self.number)
    }

    fn any_lease(&mut self) -> Option<i64> {
        let position = self.roll(1 + self.sure.leases.len() as u64);
        self.sure.leases.iter().nth(position as usize).copied()
    }

    fn decide(&mut self) -> Op {
        let pair = self.roll(PAIRS);
        let keys = ["left", "right"].map(|half| format!("{}{half}/{pair}", self.prefix()));
        match self.roll(10) {
            0 => Op::Delete { keys },
            1 => {
                self.next_lease += 1;
                Op::Grant { lease: self.next_lease }
            }
            2 => match self.any_lease() {
                Some(lease) => Op::Revoke { lease },
                None => Op::Delete { keys },
            },
            _ => {
                self.next_value += 1;
                let mut value = format!("value {} ", self.next_value);
                if self.number == 0 {
                    value.extend(
                        std::iter::repeat_with(|| char::from(b' ' + self.roll(64) as u8)).take(LARGE_VALUE_BYTES),
                    );
                }
                Op::Put { keys, value, lease: self.any_lease().unwrap_or(0) }
            }
        }
    }

    /// Writes until the server is gone.
    async fn write(mut self, address: SocketAddr, progress: Arc<Progress>) -> Self {
        let connection = Connection::open(address).await;
        loop {
            let op = self.decide();
            self.maybe = Some(op.clone());
            match request(&connection, &op).await {
                Ok(header) => progress.acknowledge(header),
                Err(status) => {
                    assert_gone(&status);
                    return self;
                }
            }
            self.maybe = None;
            self.becomes(self.sure.after(&op));
        }
    }

    fn becomes(&mut self, state: State) {
        self.changes += i64::from(state.keys != self.sure.keys);
        self.sure = state;
    }

    /// Compares with what the server holds, which decides what came of the request that was not answered.
    fn settle(&mut self, found: State) {
        let maybe = self.maybe.take().map(|op| self.sure.after(&op));
        self.unanswered[usize::from(found == self.sure)] += 1;
        if found != self.sure {
            let maybe = maybe.unwrap_or_else(|| self.sure.clone());
            assert!(found == maybe, "{}", difference(self, &found, &maybe));
            self.becomes(found);
        }
    }
}

/// In few words: values may be large.
fn difference(writer: &Writer, found: &State, maybe: &State) -> String {
    let short = |state: &State| {
        let keys: Vec<String> = state
            .keys
            .iter()
            .map(|(key, (value, lease))| format!("{key}={}@{lease:x}", &value[..value.len().min(12)]))
            .collect();
        format!("{keys:?} {:x?}", state.leases)
    };
    format!(
        "writer {}: found\n{}\nneither what was acknowledged\n{}\nnor that with the last request\n{}",
        writer.number,
        short(found),
        short(&writer.sure),
        short(maybe)
    )
}

/// A server that was killed answers nothing; everything else is a failure.
fn assert_gone(status: &Status) {
    assert!(status.message().starts_with("HTTP/2: "), "refused: {status:?}");
}

async fn request(connection: &Connection, op: &Op) -> Result<Option<pb::ResponseHeader>, Status> {
    let txn = |requests: [Request; 2]| pb::TxnRequest {
        success: requests.map(|request| pb::RequestOp { request: Some(request) }).to_vec(),
        ..Default::default()
    };
    match op {
        Op::Put { keys, value, lease } => {
            let put = |key: &String| pb::PutRequest {
                key: key.clone().into(),
                value: value.clone().into(),
                lease: *lease,
                ..Default::default()
            };
            let puts = txn([&keys[0], &keys[1]].map(|key| Request::RequestPut(put(key))));
            Ok(connection.unary::<_, pb::TxnResponse>("/etcdserverpb.KV/Txn", &puts).await?.header)
        }
        Op::Delete { keys } => {
            let delete = |key: &String| pb::DeleteRangeRequest { key: key.clone().into(), ..Default::default() };
            let deletes = txn([&keys[0], &keys[1]].map(|key| Request::RequestDeleteRange(delete(key))));
            Ok(connection.unary::<_, pb::TxnResponse>("/etcdserverpb.KV/Txn", &deletes).await?.header)
        }
        Op::Grant { lease } => {
            let grant = pb::LeaseGrantRequest { ttl: TTL_SECONDS, id: *lease };
            Ok(connection.unary::<_, pb::LeaseGrantResponse>("/etcdserverpb.Lease/LeaseGrant", &grant).await?.header)
        }
        Op::Revoke { lease } => {
            let revoke = pb::LeaseRevokeRequest { id: *lease };
            let method = "/etcdserverpb.Lease/LeaseRevoke";
            Ok(connection.unary::<_, pb::LeaseRevokeResponse>(method, &revoke).await?.header)
        }
    }
}

/// Compacts now and then, and has the engine rewrite its files, so that some kills meet that. `compacted` is the last
/// revision that was acknowledged to be compacted.
async fn compact(address: SocketAddr, progress: Arc<Progress>, compacted: Arc<AtomicI64>) {
    let connection = Connection::open(address).await;
    for turn in 1.. {
        // A server that is gone acknowledges nothing more: this task is ended then.
        progress.reaches(turn * COMPACT_EVERY).await;
        let revision = progress.revision.load(Ordering::Relaxed);
        let request = pb::CompactionRequest { revision, physical: false };
        match connection.unary::<_, pb::CompactionResponse>("/etcdserverpb.KV/Compact", &request).await {
            // Out of range: it is compacted up to there, by a request that a crash left unanswered.
            Err(status) if status.code() == Code::OutOfRange => {}
            Ok(_) => compacted.store(revision, Ordering::Relaxed),
            Err(status) => return assert_gone(&status),
        }
        let defragment = pb::DefragmentRequest {};
        let method = "/etcdserverpb.Maintenance/Defragment";
        if let Err(status) = connection.unary::<_, pb::DefragmentResponse>(method, &defragment).await {
            return assert_gone(&status);
        }
    }
}

async fn range(connection: &Connection, request: pb::RangeRequest) -> Result<RangeResponse, Status> {
    connection.unary("/etcdserverpb.KV/Range", &request).await
}

/// All leases with the keys that the server lists under them.
async fn leases(connection: &Connection) -> BTreeMap<i64, BTreeSet<String>> {
    let list = pb::LeaseLeasesRequest {};
    let list: pb::LeaseLeasesResponse = connection.unary("/etcdserverpb.Lease/LeaseLeases", &list).await.unwrap();
    let mut leases = BTreeMap::new();
    for lease in list.leases {
        let request = pb::LeaseTimeToLiveRequest { id: lease.id, keys: true };
        let method = "/etcdserverpb.Lease/LeaseTimeToLive";
        let found: pb::LeaseTimeToLiveResponse = connection.unary(method, &request).await.unwrap();
        assert_eq!(found.granted_ttl, TTL_SECONDS);
        let keys = found.keys.iter().map(|key| String::from_utf8(key.to_vec()).unwrap());
        leases.insert(lease.id, keys.collect());
    }
    leases
}

/// What the server holds, writer by writer, and the tenant's revision. Checks that keys and leases agree with each other.
async fn states(connection: &Connection) -> (Vec<State>, i64) {
    let everything =
        pb::RangeRequest { key: Bytes::from_static(b"\0"), range_end: Bytes::from_static(b"\0"), ..Default::default() };
    let found = range(connection, everything).await.unwrap();
    let revision = found.header.unwrap().revision;
    let mut listed = leases(connection).await;
    let mut states = vec![State::default(); WRITERS];
    for lease in listed.keys() {
        states[(lease / LEASES_PER_WRITER) as usize].leases.insert(*lease);
    }
    for stored in found.kvs.iter() {
        let kv = mvccpb_key_value(stored);
        let number: usize = kv.key[1..].split_once('/').unwrap().0.parse().unwrap();
        if kv.lease != 0 {
            let under = listed.get_mut(&kv.lease).unwrap_or_else(|| panic!("{} names a lease that is gone", kv.key));
            assert!(under.remove(&kv.key), "{} is not listed under its lease", kv.key);
        }
        states[number].keys.insert(kv.key, (kv.value, kv.lease));
    }
    assert!(listed.values().all(BTreeSet::is_empty), "a lease lists keys that do not name it: {listed:x?}");
    (states, revision)
}

/// The fields looked at here of a KeyValue.
#[derive(Clone, PartialEq, Message)]
struct KeyValue {
    #[prost(string, tag = "1")]
    key: String,
    #[prost(string, tag = "5")]
    value: String,
    #[prost(int64, tag = "6")]
    lease: i64,
}

fn mvccpb_key_value(stored: &[u8]) -> KeyValue {
    KeyValue::decode(stored).unwrap()
}

/// Lets the writers write, kills the server once it has acknowledged `acknowledged_min` of their requests, and answers the
/// writers, the last compaction, and the newest revision shown.
async fn write_and_kill(
    server: Server,
    writers: Vec<Writer>,
    compacted: i64,
    acknowledged_min: usize,
) -> (Vec<Writer>, i64, i64) {
    let progress = Arc::new(Progress::default());
    let address = server.address(0);
    let mut writing = JoinSet::new();
    for writer in writers {
        writing.spawn(writer.write(address, Arc::clone(&progress)));
    }
    let mut compacting = JoinSet::new();
    let last = Arc::new(AtomicI64::new(compacted));
    compacting.spawn(compact(address, Arc::clone(&progress), Arc::clone(&last)));
    tokio::select! {
        () = progress.reaches(acknowledged_min) => {}
        ended = writing.join_next() => panic!("a writer ended before the kill: {:?}", ended.unwrap().err()),
    }
    server.kill();

    let mut writers = writing.join_all().await;
    writers.sort_by_key(|writer| writer.number);
    compacting.abort_all();
    while let Some(ended) = compacting.join_next().await {
        assert!(ended.is_ok() || ended.is_err_and(|error| error.is_cancelled()), "the compacting client failed");
    }
    (writers, last.load(Ordering::Relaxed), progress.revision.load(Ordering::Relaxed))
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_acknowledged_is_lost() {
    let data = tempfile::tempdir().unwrap();
    let start = || Server::start(&data.path().join("d"), &["acme"]);
    let mut writers: Vec<Writer> = (0..WRITERS).map(Writer::new).collect();
    let (mut compacted, mut revision_before) = (0, 1);
    let mut server = start();
    for round in 0..KILLS {
        // The moments differ by the amount of work done before the kill; the scheduler adds its own chance.
        let acknowledged_min = 1 + (round * 37) % 400;
        let shown;
        (writers, compacted, shown) = write_and_kill(server, writers, compacted, acknowledged_min).await;

        server = start();
        let connection = Connection::open(server.address(0)).await;
        let (found, revision) = states(&connection).await;
        for (writer, found) in writers.iter_mut().zip(found) {
            writer.settle(found);
        }
        assert!(revision >= shown.max(revision_before), "round {round}: revision went back to {revision}");
        let changes: i64 = writers.iter().map(|writer| writer.changes).sum();
        assert_eq!(revision, 1 + changes, "round {round}: one revision for each change, without gaps");
        if compacted > 1 {
            let request = pb::RangeRequest { key: "w".into(), revision: compacted - 1, ..Default::default() };
            let status = range(&connection, request).await.expect_err("an acknowledged compaction holds");
            assert_eq!(status.code(), Code::OutOfRange, "round {round}: {status:?}");
        }
        revision_before = revision;
    }
    let leases: usize = writers.iter().map(|writer| writer.sure.leases.len()).sum();
    let unanswered = |way: usize| writers.iter().map(|writer| writer.unanswered[way]).sum::<usize>();
    let (happened, not) = (unanswered(0), unanswered(1));
    eprintln!(
        "{revision_before} revisions, compacted at {compacted}, {leases} leases left; {happened} unanswered requests had happened, {not} had not"
    );
    assert!(happened > 0 && not > 0, "the kills met requests on both sides of their commit");
}
