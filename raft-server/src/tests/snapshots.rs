//! Copies of the state on their way between members, over connections that damage what they carry, hang and break, from members
//! that go and to members that go.
//!
//! Why: a copy of a large state takes minutes, in which all of that happens, and what arrives becomes the state: half a copy, or one
//! with a wrong byte, must not, and no end of one may keep a member from getting the next.
//!
//! The joiner reaches every other member through a [`Way`], which passes, holds, cuts or damages what it carries of a copy, and
//! notes from where on the joiner asks for it.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::*;
use crate::transport::peers::{PeerIdentity, Peers, PeersConfig, serve};
use crate::{ChangeError, MembersChange, StartError};

const JOINER: u64 = 9;

/// The only file of a copy.
const FILE: &[u8] = b"records";

/// All content of a copy is made of this; nothing else that members say to each other contains it.
const PIECE: &[u8] = b"piece";
const DAMAGED_PIECE: &[u8] = b"peace";

/// What the commands of a state have together: several chunks, and less than a stream takes unread.
const STATE_BYTES: usize = 4 << 20;

/// The joiner has this much of a copy when something happens, and so much is passed on that it comes to have it.
const HAS_BYTES: u64 = 1 << 20;
const PASSED_BYTES: u64 = 2 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rule {
    Pass,
    /// Passes on so many bytes of copies, then none.
    Hold(u64),
    /// Passes on so many bytes of copies, then changes one on each connection.
    Damage(u64),
    /// Breaks the connection that carries a copy, then passes.
    Cut,
}

/// What the joiner's connections go through.
struct Way {
    rule: watch::Sender<Rule>,
    /// From where on the joiner asked for the file, each time.
    asked_from: Mutex<Vec<u64>>,
    passed_bytes: AtomicU64,
    damaged: AtomicU64,
}

impl Way {
    /// Carries connections to `onward`, wherever that is by then.
    async fn open(self: Arc<Self>, door: TcpListener, onward: watch::Receiver<SocketAddr>) {
        loop {
            let (near, _) = door.accept().await.unwrap();
            let (way, onward) = (Arc::clone(&self), *onward.borrow());
            tokio::spawn(async move {
                let Ok(far) = TcpStream::connect(onward).await else { return };
                let ((near_in, near_out), (far_in, far_out)) = (near.into_split(), far.into_split());
                // Whichever ends first ends both.
                tokio::select! {
                    () = way.carry_requests(near_in, far_out) => {}
                    () = way.carry_answers(far_in, near_out) => {}
                }
            });
        }
    }

    async fn carry_requests(&self, mut from: OwnedReadHalf, mut to: OwnedWriteHalf) {
        let mut buffer = vec![0; 16 << 10];
        let mut heard = Vec::new();
        loop {
            let Ok(read @ 1..) = from.read(&mut buffer).await else { return };
            heard.extend_from_slice(&buffer[..read]);
            while let Some(name) = find(&heard, FILE) {
                // The offset stands before the name.
                let offset = heard[..name].last_chunk().expect("a request begins with numbers");
                self.asked_from.lock().push(u64::from_le_bytes(*offset));
                heard.drain(..name + FILE.len());
            }
            // What may be the beginning of another.
            heard.drain(..heard.len().saturating_sub(64));
            if to.write_all(&buffer[..read]).await.is_err() {
                return;
            }
        }
    }

    async fn carry_answers(&self, mut from: OwnedReadHalf, mut to: OwnedWriteHalf) {
        let mut rule = self.rule.subscribe();
        let mut buffer = vec![0; 16 << 10];
        let (mut carries_copy, mut has_damaged) = (false, false);
        loop {
            let Ok(read @ 1..) = from.read(&mut buffer).await else { return };
            let bytes = &mut buffer[..read];
            let piece = find(bytes, PIECE);
            carries_copy |= piece.is_some();
            if carries_copy {
                let passed_bytes = self.passed_bytes.load(Ordering::Relaxed);
                let goes_on = |rule: &Rule| !matches!(rule, Rule::Hold(bytes) if passed_bytes >= *bytes);
                let rule = *rule.wait_for(goes_on).await.expect("the way is there");
                match (rule, piece) {
                    (Rule::Cut, _) => {
                        self.rule.send_replace(Rule::Pass);
                        return;
                    }
                    (Rule::Damage(after_bytes), Some(at)) if passed_bytes >= after_bytes && !has_damaged => {
                        bytes[at..at + PIECE.len()].copy_from_slice(DAMAGED_PIECE);
                        has_damaged = true;
                        self.damaged.fetch_add(1, Ordering::Relaxed);
                    }
                    (Rule::Pass | Rule::Hold(_) | Rule::Damage(_), _) => {}
                }
                self.passed_bytes.fetch_add(read as u64, Ordering::Relaxed);
            }
            if to.write_all(bytes).await.is_err() {
                return;
            }
        }
    }
}

fn find(bytes: &[u8], wanted: &[u8]) -> Option<usize> {
    bytes.windows(wanted.len()).position(|window| window == wanted)
}

struct Member {
    handle: Handle<usize>,
    guard: JoinGuard,
    peers: Peers,
    serving: JoinHandle<()>,
}

/// Members on a real network, the joiner behind its way.
struct Group {
    dir: tempfile::TempDir,
    probes: BTreeMap<u64, Probe>,
    members: BTreeMap<u64, Member>,
    /// Where each listens in its present life.
    addresses: BTreeMap<u64, watch::Sender<SocketAddr>>,
    /// Where the joiner's way to each begins.
    doors: BTreeMap<u64, SocketAddr>,
    way: Arc<Way>,
}

impl Group {
    /// These voters, with a state.
    async fn start(voters: &[u64]) -> Self {
        let way = Way {
            rule: watch::Sender::new(Rule::Pass),
            asked_from: Mutex::default(),
            passed_bytes: AtomicU64::new(0),
            damaged: AtomicU64::new(0),
        };
        let mut group = Group {
            dir: tempfile::tempdir().unwrap(),
            probes: BTreeMap::new(),
            members: BTreeMap::new(),
            addresses: BTreeMap::new(),
            doors: BTreeMap::new(),
            way: Arc::new(way),
        };
        for id in voters {
            group.boot(*id, voters).await;
            let door = TcpListener::bind("127.0.0.1:0").await.unwrap();
            group.doors.insert(*id, door.local_addr().unwrap());
            tokio::spawn(Arc::clone(&group.way).open(door, group.addresses[id].subscribe()));
        }
        let command_bytes = STATE_BYTES / 8;
        for command in 0..8 {
            let pieces = (0..).map(|piece| format!("{}{command}-{piece:08}.", PIECE.escape_ascii()));
            let command: String = pieces.take(command_bytes / 16).collect();
            assert_eq!(command.len(), command_bytes);
            group.write(command.into()).await;
        }
        group
    }

    /// Starts a member on what an earlier life has left, and tells everybody where it is.
    async fn boot(&mut self, id: u64, initial_voters: &[u64]) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        self.addresses.entry(id).or_insert_with(|| watch::Sender::new(address)).send_replace(address);
        let peers = PeersConfig {
            identity: PeerIdentity { member_id: id, cluster_id: 7 },
            tls: None,
            timeout: Duration::from_secs(10),
            snapshot_bytes_per_second: 1 << 30,
        };
        let peers = Peers::new(peers, tokio::runtime::Handle::current());
        let config = Config {
            initial_voters: initial_voters.to_vec(),
            tick_ms: 10,
            election_timeout_ticks: 100,
            read_timeout_ticks: 50,
            ..config(id, &self.dir.path().join(id.to_string()))
        };
        let probe = self.probes.entry(id).or_default().clone();
        let started = async {
            loop {
                match start(config.clone(), probe.boot(), peers.transport()) {
                    // Threads of an earlier life may still be busy with its copies; a process that is killed takes them along.
                    Err(StartError::Fault(Fault::Io(error))) if error.kind() == ErrorKind::DirectoryNotEmpty => {
                        tokio::task::yield_now().await;
                    }
                    started => return started.unwrap(),
                }
            }
        };
        let (handle, guard) = patiently(started).await;
        peers.attach(&handle);
        let serving = tokio::spawn(serve(vec![listener], None, peers.clone(), std::future::pending()));
        self.members.insert(id, Member { handle, guard, peers, serving });
        for (from, member) in &self.members {
            let url = |to: &u64| match self.doors.get(to) {
                Some(door) if *from == JOINER => format!("http://{door}"),
                Some(_) | None => format!("http://{}", *self.addresses[to].borrow()),
            };
            member.peers.set_members(&self.addresses.keys().map(|to| (*to, vec![url(to)])).collect::<Vec<_>>());
        }
    }

    /// Stops a member as a crash would.
    fn kill(&mut self, id: u64) {
        let Member { guard, peers, serving, .. } = self.members.remove(&id).expect("it runs");
        guard.stop();
        peers.stop();
        serving.abort();
    }

    async fn leader(&self) -> u64 {
        let leads = || self.members.iter().find(|(_, member)| member.handle.status().is_leader).map(|(id, _)| *id);
        until(|| leads().is_some()).await;
        // It may have lost that at once; then whoever asked asks again.
        leads().unwrap_or_else(|| *self.members.keys().next().expect("members run"))
    }

    async fn write(&self, command: Bytes) {
        let handle = &self.members[&self.leader().await].handle;
        patiently(handle.propose(1, command)).await.expect("nothing is full or stopping");
    }

    /// Has the joiner begin, which is behind every log, and waits until it has some of a copy.
    async fn join(&mut self, rule: Rule) {
        self.way.rule.send_replace(rule);
        self.boot(JOINER, &[]).await;
        let added = async {
            loop {
                let handle = &self.members[&self.leader().await].handle;
                let (seen, command) = (handle.conf_index(), Bytes::from_static(b"join"));
                match handle.change_members(MembersChange::AddLearner(JOINER), seen, command).await {
                    Ok(_) => return,
                    // To add it twice is to add it.
                    Err(ChangeError::UnderWay | ChangeError::NotLeader { .. } | ChangeError::Propose(_)) => {}
                    Err(ChangeError::Invalid) => panic!("raft takes a learner"),
                }
                tokio::task::yield_now().await;
            }
        };
        patiently(added).await;
        until(|| self.copied_bytes() >= HAS_BYTES).await;
        assert_eq!(self.probes[&JOINER].memory.lock().applied_index, 0, "it is no state yet");
    }

    /// The file of the copy that a member offers (`out`) or fetches (`in`).
    fn copy_of(&self, id: u64, kind: &str) -> Option<PathBuf> {
        let copies = std::fs::read_dir(self.dir.path().join(id.to_string()).join("snapshots")).unwrap();
        let mut names = copies
            .map(|copy| copy.unwrap())
            .filter(|copy| copy.file_name().as_encoded_bytes().starts_with(kind.as_bytes()));
        names.next().map(|copy| copy.path().join(std::str::from_utf8(FILE).unwrap()))
    }

    /// Whom the joiner fetches from: its copy is named after that member.
    fn source(&self) -> u64 {
        let file = self.copy_of(JOINER, "in").expect("it fetches");
        let name = file.parent().and_then(Path::file_name).and_then(|name| name.to_str()).unwrap();
        u64::from_str_radix(name.split('-').nth(1).unwrap(), 16).unwrap()
    }

    fn copied_bytes(&self) -> u64 {
        // It may just be renamed to be removed.
        let file = self.copy_of(JOINER, "in").and_then(|file| std::fs::metadata(file).ok());
        file.map_or(0, |file| file.len())
    }

    fn asked_from(&self, first: usize) -> Vec<u64> {
        self.way.asked_from.lock()[first..].to_vec()
    }

    /// The joiner comes to have what the others have, also what is written now.
    async fn joiner_catches_up(&self) {
        self.write(Bytes::from_static(b"after")).await;
        read_point(&self.members[&JOINER].handle).await;
        let leader = self.leader().await;
        read_point(&self.members[&leader].handle).await;
        let (own, others) = (self.probes[&JOINER].commands(), self.probes[&leader].commands());
        assert!(own == others, "{} and {} commands, or other ones", own.len(), others.len());
        assert_eq!(own.last().unwrap(), "after");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_chunk_is_refused_and_nothing_is_installed() {
    let mut group = Group::start(&[1]).await;
    group.join(Rule::Damage(PASSED_BYTES)).await;
    // Each on a connection of its own: the one before was given up for its damage.
    until(|| group.way.damaged.load(Ordering::Relaxed) >= 3).await;
    let original = std::fs::read(group.copy_of(1, "out").unwrap()).unwrap();
    let copied = std::fs::read(group.copy_of(JOINER, "in").unwrap()).unwrap();
    assert!(original.starts_with(&copied), "what was written down is right");
    assert!(copied.len() < original.len());
    assert_eq!(group.probes[&JOINER].memory.lock().applied_index, 0);
    group.way.rule.send_replace(Rule::Pass);
    group.joiner_catches_up().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_that_is_cut_off_goes_on_where_it_was() {
    let mut group = Group::start(&[1]).await;
    group.join(Rule::Hold(PASSED_BYTES)).await;
    let copied_bytes = group.copied_bytes();
    let asked = group.asked_from(0).len();
    assert_eq!(group.asked_from(0).first(), Some(&0));
    group.way.rule.send_replace(Rule::Cut);
    until(|| *group.way.rule.borrow() == Rule::Pass).await;
    group.joiner_catches_up().await;
    let asked_from = group.asked_from(asked);
    assert!(!asked_from.is_empty() && asked_from.iter().all(|offset| *offset >= copied_bytes), "{asked_from:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_that_is_killed_while_it_fetches_a_copy_gets_one_when_it_is_back() {
    let mut group = Group::start(&[1]).await;
    group.join(Rule::Hold(PASSED_BYTES)).await;
    group.kill(JOINER);
    assert!(group.copied_bytes() >= HAS_BYTES, "a kill leaves what there is");
    let asked = group.asked_from(0).len();
    group.way.rule.send_replace(Rule::Pass);
    group.boot(JOINER, &[]).await;
    group.joiner_catches_up().await;
    assert!(group.asked_from(asked).contains(&0), "what an earlier life left is not trusted");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_whose_source_is_gone_takes_a_copy_from_the_next_leader() {
    let mut group = Group::start(&[1, 2, 3]).await;
    group.join(Rule::Hold(PASSED_BYTES)).await;
    group.kill(group.source());
    let asked = group.asked_from(0).len();
    // With what it had sent already.
    group.way.rule.send_replace(Rule::Cut);
    group.joiner_catches_up().await;
    assert!(group.asked_from(asked).contains(&0), "another copy has other files");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_comes_back_offers_another_copy() {
    let mut group = Group::start(&[1]).await;
    group.join(Rule::Hold(PASSED_BYTES)).await;
    group.kill(1);
    let asked = group.asked_from(0).len();
    // With what it had sent already.
    group.way.rule.send_replace(Rule::Cut);
    group.boot(1, &[1]).await;
    group.joiner_catches_up().await;
    assert!(group.asked_from(asked).contains(&0), "another copy has other files");
}
